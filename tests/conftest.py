# SPDX-License-Identifier: MIT
"""Settings that every test shares: one hypothesis profile, one thread count, no network."""

import os
import pathlib
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in train.py: for tests beside other work
if "PYTEST_XDIST_WORKER" in os.environ:  # and what it starts: else all would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# A shell that runs this in the background leaves SIGINT ignored, for children too; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `import train` works however pytest was called

# No deadline: the first example of a test may compile or page in a library. A failing example is printed with its seed.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def float32_products():
    """train.py may have set how they are computed; the next test begins as PyTorch does."""
    yield
    torch.set_float32_matmul_precision("highest")
