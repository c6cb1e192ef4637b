# SPDX-License-Identifier: MIT
"""Calibration of a range: where the even steps of a quantised tensor begin, and how wide they are.

Papers: Krishnamoorthi 2018, arXiv 1806.08342, sec. 3.2 (min-max); Wu et al. 2020, arXiv 2004.09602, sec. 3.3 (max,
percentile); Nagel et al. 2021, arXiv 2106.08295, sec. 3.1 (min-max, mean squared error). Numbers x that share a range
are replaced by the nearest of the levels

    least + scale * code,      code = round((x - least) / scale), cut off at 0 and levels - 1

A range too narrow cuts off large numbers, one too wide makes the steps coarse for all others. What is to be chosen:

    min-max      least = min x, scale = (max x - min x) / (levels - 1)     nothing is cut off
    symmetric    scale = max |x| / (levels // 2 - 1), zero is a level         one end may lie beyond all x
    percentile   min-max of x without its share of extreme numbers         outliers do not count
    mse          the range of least sum_i (x_i - x^_i)^2: of ranges that are min-max's made ever narrower, each once
                 moved to the line of least squares through (code_i, x_i), the one of the least error

All are functions grid(x, levels) of x (N, n), N groups of n numbers, to scale (N,) and least (N,): what quant.py and
gptq.py take as their `grid`. Which is best is a question to the model, and not only to x: of a group of 32 weights, the
largest matter most, so cutting them off often costs more than the sum of squares says (bench/quant.py has the figures).

Departures: the line of least squares, which papers leave out. No choice by entropy: that is for activations.

    quantise(model, bits=4, grid=mse)      # of quant.py; percentile(0.99) is a grid, too
    error(x, *mse(x, 16), 16)              # (N,)
"""

import torch


# Same as minimal/quant.py: minmax
def minmax(x, levels):
    """x (N, n) -> scale and least, (N,) each, of the grid least + scale * code, code 0..levels-1, that just spans x."""
    least, most = x.aminmax(dim=1)
    return (most - least) / (levels - 1), least


def symmetric(x, levels):
    """x (N, n) -> scale and least, (N,) each: code levels // 2 stands for 0 itself, and nothing is cut off."""
    zero = levels // 2
    scale = x.abs().amax(1) / min(zero, levels - 1 - zero)
    return scale, -zero * scale


def percentile(share):
    """The grid that spans the inner part of each group: from its quantile 1 - share to its quantile `share`.

    0.5 < share <= 1, and 1 is min-max. Quantiles between two numbers are interpolated. ValueError: another share."""
    if not 0.5 < share <= 1:
        raise ValueError(f"share={share} is out of range; wanted above 0.5, at most 1")

    def grid(x, levels):
        last = x.shape[1] - 1
        at = share * last
        below, x = min(int(at), max(last - 1, 0)), x.sort(dim=1).values
        most = torch.lerp(x[:, below], x[:, min(below + 1, last)], at - below)
        least = torch.lerp(x[:, last - below], x[:, max(last - below - 1, 0)], at - below)
        return (most - least) / (levels - 1), least

    return grid


def codes(x, scale, least, levels):
    """x (N, n), scale (N,), least (N,) -> the nearest codes (N, n), as whole floats; of a scale of 0: 0."""
    steps = (x - least[:, None]) / scale.clamp_min(torch.finfo(x.dtype).tiny)[:, None]
    return torch.where(scale[:, None] > 0, steps.round_().clamp_(0, levels - 1), 0)


def error(x, scale, least, levels):
    """The mean over each group of the squared error, (N,)."""
    return (codes(x, scale, least, levels) * scale[:, None] + least[:, None] - x).square_().mean(1)


def line(x, q):
    """scale and least, (N,) each, of the least sum over a group of (x - least - scale q)^2; q (N, n) are codes.

    scale is not finite where all codes are equal."""
    mean_x, mean_q = x.mean(1, keepdim=True), q.mean(1, keepdim=True)
    scale = ((q - mean_q) * (x - mean_x)).sum(1) / (q - mean_q).square_().sum(1)
    return scale, mean_x[:, 0] - scale * mean_q[:, 0]


def mse(x, levels, ranges=12, narrowest=0.7):
    """x (N, n) -> scale and least, (N,) each, of nearly the least squared error; never a larger one than min-max's.

    Tried are `ranges` of them, from the whole one to `narrowest` of it, about its middle: 12 cost 24 rounds over x."""
    full, bottom = minmax(x, levels)
    best = full, bottom, error(x, full, bottom, levels)
    for i in range(ranges):
        kept = 1 - (1 - narrowest) * i / max(ranges - 1, 1)
        scale, least = full * kept, bottom + full * (levels - 1) * (1 - kept) / 2
        for _ in range(2):
            off = error(x, scale, least, levels)
            best = [torch.where(off < best[2], new, old) for new, old in zip((scale, least, off), best, strict=True)]
            scale, least = line(x, codes(x, scale, least, levels))  # not finite: its error is not smaller than any
    return tuple(best[:2])


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    grids = {"min-max": minmax, "symmetric": symmetric, "percentile 0.99": percentile(0.99), "mse": mse}
    samples = {"normal": torch.randn(2000, 32), "with outliers": torch.randn(2000, 32).pow(3), "one-sided":
               torch.randn(2000, 32).abs()}  # fmt: skip
    for levels in (16, 4):
        print(f"{levels} levels, groups of 32: root of the mean squared error, relative to x")
        for name, x in samples.items():
            off = {n: (error(x, *grid(x, levels), levels).sum() / x.square().mean(1).sum()) ** 0.5
                   for n, grid in grids.items()}  # fmt: skip
            print(f"  {name:14}" + "".join(f"{n}: {value:.2%}   " for n, value in off.items()))
