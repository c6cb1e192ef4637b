# SPDX-License-Identifier: MIT
"""Ranges: numpy's quantiles, brute force over all ranges, and numpy's least squares are the oracles."""

import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch
from torch import nn

from minimal import quant
from minimal.calibrate import codes, error, line, minmax, mse, percentile, symmetric

GRIDS = {"minmax": minmax, "symmetric": symmetric, "percentile": percentile(0.95), "mse": mse}


@st.composite
def groups(draw):
    N, n = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    x = torch.randn(N, n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = x ** draw(st.sampled_from([1, 3])) * 10.0 ** draw(st.integers(-3, 3)) + draw(st.sampled_from([0.0, 2.0]))
    if draw(st.booleans()):
        x[0] = draw(st.sampled_from([0.0, 1.5]))  # a group of equal numbers
    return x


@hypothesis.given(groups(), st.sampled_from([4, 16, 255]), st.sampled_from(list(GRIDS)))
def test_any_grid(x, levels, name):
    scale, least = GRIDS[name](x, levels)
    assert scale.shape == least.shape == x.shape[:1]
    assert scale.isfinite().all() and least.isfinite().all() and (scale >= 0).all()
    q = codes(x, scale, least, levels)
    assert ((q >= 0) & (q < levels) & (q == q.round())).all()
    # the nearest of the levels, by comparing with all of them
    grid = least[:, None].double() + scale[:, None].double() * torch.arange(levels)
    best = (x[:, :, None].double() - grid[:, None]).abs().amin(-1).square().mean(1)
    torch.testing.assert_close(error(x, scale, least, levels).double(), best, rtol=1e-3, atol=1e-9 * x.abs().max() ** 2)
    if name in ("minmax", "symmetric"):  # nothing is cut off
        assert (error(x, scale, least, levels) <= (0.51 * scale) ** 2 + 1e-9 * x.abs().max() ** 2).all()


@hypothesis.given(groups(), st.sampled_from([4, 16]))
def test_zero_is_a_level_of_the_symmetric_grid(x, levels):
    scale, least = symmetric(x, levels)
    assert torch.equal(least + scale * (levels // 2), torch.zeros_like(scale))
    assert torch.equal(symmetric(-x, levels)[0], scale)


@hypothesis.given(groups(), st.floats(0.51, 1.0))
def test_percentile_is_numpy_s(x, share):
    scale, least = percentile(share)(x, 16)
    low, high = (numpy.quantile(x.double().numpy(), q, axis=1) for q in (1 - share, share))
    tolerance = 1e-5 * x.abs().max().item()
    numpy.testing.assert_allclose(least.numpy(), low, rtol=1e-5, atol=tolerance)
    numpy.testing.assert_allclose((least + 15 * scale).numpy(), high, rtol=1e-5, atol=2 * tolerance)


def test_percentile_of_everything_is_min_max():
    x = torch.randn(5, 40)
    for a, b in zip(percentile(1)(x, 16), minmax(x, 16), strict=True):
        torch.testing.assert_close(a, b)
    for share in (0.5, 1.01, -1, float("nan")):
        with pytest.raises(ValueError, match=f"share={share} is out of range; wanted above 0.5, at most 1"):
            percentile(share)


@hypothesis.given(groups(), st.sampled_from([2, 4, 16, 255]))
def test_mse_is_never_worse_than_min_max(x, levels):
    assert (error(x, *mse(x, levels), levels) <= error(x, *minmax(x, levels), levels)).all()


@pytest.mark.parametrize("levels, slack", [(4, 1.25), (16, 1.10)])
def test_mse_beside_brute_force(levels, slack):
    """All ranges whose ends lie on a fine raster, each end by itself: thousands, where mse looks at two dozen."""
    for power in (1, 3):
        x = torch.randn(40, 32) ** power
        full, bottom = minmax(x, levels)
        best = torch.full((40,), torch.inf)
        for low in torch.linspace(0, 0.7, 36):
            for high in torch.linspace(0, 0.7, 36):
                if low + high < 0.95:
                    scale, least = full * (1 - low - high), bottom + full * (levels - 1) * low
                    best = torch.minimum(best, error(x, scale, least, levels))
        ours, plain = error(x, *mse(x, levels), levels), error(x, full, bottom, levels)
        assert ours.mean() <= (slack if power == 1 else 1.6) * best.mean() < plain.mean()


def test_the_line_is_that_of_least_squares():
    x, q = torch.randn(6, 30), torch.randint(0, 16, (6, 30)).float()
    scale, least = line(x, q)
    for i in range(6):
        want = numpy.polyfit(q[i].double().numpy(), x[i].double().numpy(), 1)
        assert (scale[i].item(), least[i].item()) == pytest.approx(tuple(want), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind, bound", [("int8", 1.0), ("int4", 0.95)])
def test_in_a_model(kind, bound):
    """The weights of a model come nearer than by min-max, also once the constants are rounded to float16."""
    plain = nn.Linear(96, 50)
    nn.init.normal_(plain.weight)
    off = {}
    for name, grid in GRIDS.items():
        model = nn.Sequential(nn.Linear(96, 50))
        model[0].weight.data.copy_(plain.weight)
        quant.quantise(model, kind, grid=grid)
        off[name] = (model[0].weight - plain.weight).norm().item()
    assert off["mse"] < bound * off["minmax"] <= bound * off["symmetric"]
    if kind == "int8":
        assert off["minmax"] == off["symmetric"]  # int8 always is
