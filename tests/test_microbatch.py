# SPDX-License-Identifier: MIT
"""microbatch.py. Oracle: brute force over all divisors, and buffers of known size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal import microbatch
from minimal.microbatch import free_bytes, largest_microbatch, peak_bytes


@given(rows=st.integers(1, 96), a=st.integers(0, 100), b=st.integers(0, 50), budget=st.integers(0, 2000))
def test_it_is_the_largest_divisor_that_fits(rows, a, b, budget):
    def peak(r):
        assert 1 <= r <= max(2, rows)
        return a + b * r

    fitting = [r for r in range(1, rows + 1) if rows % r == 0 and peak(r) <= budget]
    if fitting:
        assert largest_microbatch(peak, rows, budget) == max(fitting)
    else:
        with pytest.raises(ValueError, match=rf"one row needs {(a + b) / 1e9:.2f} GB"):
            largest_microbatch(peak, rows, budget)


def test_what_was_chosen_is_measured():
    def peak(r):  # with more than four rows an operator takes a hungrier way
        return 10 * r if r <= 4 else 100 * r

    asked = []
    assert largest_microbatch(lambda r: asked.append(r) or peak(r), 16, 200) == 4 and asked == [1, 2, 16, 8, 4]
    with pytest.raises(ValueError, match="rows = 0"):
        largest_microbatch(peak, 0, 10)


@pytest.mark.skipif(not microbatch.pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is told by Linux")
def test_the_peak_of_a_buffer():
    def hold(megabytes):
        return torch.ones(megabytes * 2**18)  # float32

    hold(200)  # the peak of before must not count
    low, high = peak_bytes(lambda: hold(1)), peak_bytes(lambda: hold(101))
    assert high - low == pytest.approx(100 * 2**20, rel=0.1)
    assert free_bytes() > high


def test_a_system_that_does_not_say(monkeypatch):
    class Missing:
        def __init__(self, *name):
            pass

        def read_text(self):
            raise FileNotFoundError

        def write_text(self, text):
            raise FileNotFoundError

    monkeypatch.setattr(microbatch.pathlib, "Path", Missing)
    for call in (free_bytes, lambda: peak_bytes(lambda: None)):
        with pytest.raises(RuntimeError, match="not told by this system: wanted Linux or CUDA"):
            call()
