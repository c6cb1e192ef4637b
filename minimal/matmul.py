# SPDX-License-Identifier: MIT
"""Float32 products on AMD's processors with AVX-512: twice the rate and no digit less, oneDNN's in place of MKL's.

On a CPU PyTorch multiplies floats with MKL, whose AVX-512 kernels run on Intel's processors alone. On an AMD whose
vectors are as wide (Zen 5: 264 GFLOP/s a core) it stays at 107; oneDNN, which PyTorch brings along for bfloat16, asks
what the processor can do and not who made it, and reaches 215. One setting hands it float32 as well,

    torch.set_float32_matmul_precision("medium")

and allows it to round to bfloat16 on the way. What it may do and what it does differ: oneDNN converts only where a unit
for bfloat16 products repays it, AMX (oneDNN's developer guide, "Floating-point math mode"), and no AMD has that.
So `use_onednn` looks for an AMD with AVX-512, sets it, multiplies numbers that bfloat16 cannot hold, and takes it back
if they come out rounded. Elsewhere nothing changes, and nothing would be won: on Intel's MKL is as fast.

    from minimal.matmul import use_onednn
    print(use_onednn() or "oneDNN multiplies")  # once, before training; all of PyTorch's products in this process

The setting is also read by CUDA, where "medium" does round: for processes that compute on the CPU. Another library sums
in another order, so the last digits of a product differ from MKL's, as they do between two machines.
"""

import pathlib

import torch

CPUINFO = "/proc/cpuinfo"


def _rounds():
    """Whether a product loses what bfloat16, of 8 bits, cannot hold: (1 + 2^-12)^2 summed 256 times."""
    x = torch.full((256, 256), 1 + 2.0**-12)
    return not torch.allclose(x @ x, torch.tensor(256 * (1 + 2.0**-12) ** 2), rtol=1e-6)


def why_not():
    """None where oneDNN's float32 product is the faster one; else in one line why this is no place for it."""
    if torch.get_float32_matmul_precision() != "highest":
        return f"float32 products are set to {torch.get_float32_matmul_precision()!r} already"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if (has := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        return f"PyTorch runs with {has}, which MKL knows on every processor"
    try:
        amd = "AuthenticAMD" in pathlib.Path(CPUINFO).read_text(encoding="utf-8")
    except OSError:
        return f"{CPUINFO} does not say who made the processor"
    return None if amd else "not an AMD: MKL is as fast"


def use_onednn():
    """Lets oneDNN compute PyTorch's float32 products in this process, where it is faster and as exact.

    -> None if this call has set it; else in one line why not, such as that it was set before: nothing has changed."""
    if reason := why_not():
        return reason
    torch.set_float32_matmul_precision("medium")
    if not _rounds():
        return None
    torch.set_float32_matmul_precision("highest")
    return "oneDNN rounds to bfloat16 here"


if __name__ == "__main__":
    import time

    def rate(N, C, O):
        x, W = torch.randn(N, C), torch.randn(O, C)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            y = x @ W.mT  # (N, C) x (C, O) -> (N, O)
            times.append(time.perf_counter() - start)
        off = ((y - x.double() @ W.double().mT).norm() / y.norm()).item()
        return 2e-9 * N * C * O / sorted(times)[10], off

    torch.manual_seed(0)
    shapes = (768, 128, 512), (2048, 576, 1536), (2048, 2048, 2048)
    before = [rate(*shape) for shape in shapes]
    print(f"{torch.get_num_threads()} threads:", use_onednn() or "oneDNN multiplies")
    for shape, (mkl, off), (now, still_off) in zip(shapes, before, [rate(*shape) for shape in shapes], strict=True):
        print("{:4d} rows, {:4d} -> {:4d}:".format(*shape), f"{mkl:4.0f} GFLOP/s before, {now:4.0f} now; "
              f"off by {off:.0e} and {still_off:.0e} of the product")  # fmt: skip
