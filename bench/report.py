# SPDX-License-Identifier: MIT
"""What the scripts in here write: one JSON each, with the last figures of every kind of machine it has run on."""

import json
import os
import pathlib
import platform
import re

import torch


def processor():
    """The processor's name and the widest vectors that PyTorch uses on it, such as "AMD EPYC, AVX2"."""
    try:
        name = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _known(name):
    path = pathlib.Path(__file__).with_name(f"{name}.json")
    return path, json.loads(path.read_text()) if path.exists() else {}


def read(name):
    """What a machine of this kind has left in bench/NAME.json, or {}."""
    return _known(name)[1].get(processor(), {})


def write(name, facts):
    """Into bench/NAME.json, beside what other machines have left there."""
    path, known = _known(name)
    known[processor()] = {"cores": os.cpu_count(), "torch": torch.__version__} | facts
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(beside, path)
