# SPDX-License-Identifier: MIT
"""The largest microbatch that fits into a memory budget, found by measuring two small ones.

No paper: gradient accumulation. The gradient of a batch of R rows is the sum of those of its parts, so a step may take
R / r parts of r rows each, in the memory of one part. For rows of one length that memory is affine in r,

    peak(r) = a + b r        a: weights, gradients, optimiser        b: activations and logits of one row

so peak(1) and peak(2) say which r fits: the largest divisor of R with peak(1) + (r - 1) b within the budget. That one
is measured too before it is believed, as an operator may choose another algorithm for a larger batch.

    r = largest_microbatch(lambda r: peak_bytes(lambda: step(r)), rows=32, budget=4e9)
    for part in batch.split(r):
        loss(part).backward()             # then divide once, by the terms of all parts

A measured peak counts all that the process holds: on a GPU what PyTorch has allocated there, on Linux the resident set.
"""

import contextlib
import ctypes
import gc
import pathlib
import re

import torch


def _resident(field):
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(call, device="cpu"):
    """The most memory in use, in bytes, while call() runs: on a CUDA device, or of the whole process (Linux).

    RuntimeError where the system does not say: neither CUDA nor /proc/self/clear_refs."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # what was freed goes back to the system, or it would count
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except OSError:
        raise RuntimeError("peak memory is not told by this system: wanted Linux or CUDA") from None
    call()
    return _resident("VmHWM")


def free_bytes(device="cpu"):
    """What this process may use in all, in bytes: what it holds, and what the machine or the CUDA device has left."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    try:
        left = re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())
    except OSError:
        raise RuntimeError("free memory is not told by this system: wanted Linux or CUDA") from None
    return int(left[1]) * 1024 + _resident("VmRSS")


def largest_microbatch(peak, rows, budget):
    """The largest divisor r of rows whose peak fits into the budget, all in bytes.

    peak(r): measures a forward and backward pass of r rows. It is called for 1 and 2 rows and for what is chosen.
    ValueError: rows < 1, or not even one row fits; the message says what it needs."""
    if rows < 1:
        raise ValueError(f"rows = {rows}: wanted at least 1")
    one = peak(1)
    if one > budget:
        raise ValueError(f"{budget / 1e9:.2f} GB: one row needs {one / 1e9:.2f} GB")
    sizes = [r for r in range(1, rows + 1) if rows % r == 0]
    if len(sizes) > 1:
        each = max(0, peak(2) - one)
        sizes = [r for r in sizes if r == 1 or one + (r - 1) * each <= budget]
    while sizes[-1] > 1 and peak(sizes[-1]) > budget:
        sizes.pop()
    return sizes[-1]


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()) for _ in range(8)))
    batch = torch.randn(64, 512, 256)  # 64 rows of 512 tokens

    def step(r):
        model(batch[:r]).square().sum().backward()

    def measured(r):
        found = peak_bytes(lambda: step(r))
        model.zero_grad(set_to_none=True)
        print(f"  {r:2d} rows: {found / 1e6:6.0f} MB")
        return found

    step(1)
    start = measured(1)
    for more in (80e6, 250e6, 4e9):
        print(f"{(start + more) / 1e6:.0f} MB:")
        print(f"  -> {largest_microbatch(measured, 64, start + more)} rows at a time")
    gradients = []
    for r in (64, 8):
        model.zero_grad()
        for part in batch.split(r):
            model(part).square().sum().backward()
        gradients.append(model[0][0].weight.grad.clone())
    off = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    print(f"gradient of 64 rows at once, and of 8 parts of 8: off by {off:.0e}")
