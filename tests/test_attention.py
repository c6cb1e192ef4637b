# SPDX-License-Identifier: MIT
"""attention.py against plain Python loops, finite differences, torch.nn.MultiheadAttention and transformers' Llama."""

import itertools
import math
import os
import pathlib
import subprocess
import sys
import types

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minimal import attention as module
from minimal.attention import (
    LearnedPositions,
    MultiHeadAttention,
    attention,
    naive_attention,
    rotary,
    sinusoidal_positions,
    tiled_attention,
    torch_attention,
)


def tiled(q, k, v, **options):
    return tiled_attention(q, k, v, block=3, **options)[0]  # tiles that do not divide the lengths


ROOT = pathlib.Path(__file__).resolve().parent.parent
PATHS = {"naive": naive_attention, "torch": torch_attention, "tiled": tiled, "attention": attention}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def loops(q, k, v, *, causal=False, mask=None, scale=None):
    """The contract, number by number, in Python floats. Returns out and lse as float64 tensors."""
    (B, H, Tq, D), (_, Hkv, Tk, Dv) = q.shape, v.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    mask = None if mask is None else mask.broadcast_to(B, H, Tq, Tk).tolist()
    out, lse = torch.zeros(B, H, Tq, Dv, dtype=torch.float64), torch.full((B, H, Tq), -math.inf, dtype=torch.float64)
    for b, h, i in itertools.product(range(B), range(H), range(Tq)):
        group = h // (H // Hkv)
        scores = {}
        for j in range(Tk):
            bias = 0.0 if mask is None else mask[b][h][i][j]
            if bias is False or bias == -math.inf or (causal and j > i + Tk - Tq):
                continue
            bias = 0.0 if bias is True else bias
            scores[j] = scale * sum(x * y for x, y in zip(q[b][h][i], k[b][group][j], strict=True)) + bias
        if scores:
            total = math.fsum(math.exp(s) for s in scores.values())
            lse[b, h, i] = math.log(total)
            for d in range(Dv):
                out[b, h, i, d] = math.fsum(math.exp(s) / total * v[b][group][j][d] for j, s in scores.items())
    return out, lse


def assert_near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def rejected(check, *variant):
    """True if the check fails for this variant: a check that no bug can fail is worth nothing."""
    try:
        check(*variant)
    except AssertionError:
        return True
    return False


LAYOUTS = ("contiguous", "tokens first", "every other", "repeated batch")


def laid_out(x, layout):
    """The same shape with other strides; x itself may change ("repeated batch")."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack((x, x + 1), dim=-1).flatten(-2)[..., ::2]
    return x[:1].expand_as(x) if layout == "repeated batch" else x


@st.composite
def cases(draw, dtypes=tuple(TOLERANCE)):
    """q, k, v and the options of one call."""
    B, Hkv, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    Tq = draw(st.integers(0, 8))
    Tk = Tq if draw(st.booleans()) else draw(st.integers(0, 8))
    D, Dv = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 999)))
    shapes = (B, Hkv * G, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D if draw(st.booleans()) else Dv)
    q, k, v = (laid_out(torch.randn(s).to(dtype), draw(st.sampled_from(LAYOUTS))) for s in shapes)
    mask = None
    if kind := draw(st.sampled_from((None, "bool", "additive", "hides"))):
        shape = [draw(st.sampled_from((1, n))) for n in (B, Hkv * G, Tq, Tk)]
        shape = shape[draw(st.integers(0, 4)) :]  # fewer dims broadcast too
        mask = torch.rand(shape) < draw(st.sampled_from((0.0, 0.3, 0.8)))
        if kind != "bool":  # quarters are exact in every dtype, so no path may round the mask
            hidden, mask = ~mask, torch.randint(-8, 8, shape) / 4
            mask = mask.masked_fill(hidden, -math.inf) if kind == "hides" else mask
            mask = mask.to(draw(st.sampled_from((dtype, torch.float32, torch.float64))))
    scale = draw(st.sampled_from((None, 0.3, 1.0)))
    return q, k, v, {"causal": draw(st.booleans()), "mask": mask, "scale": scale}


# ---- values ----


@every_path
@given(case=cases())
def test_values_are_those_of_the_loops(path, case):
    q, k, v, options = case
    out = path(q, k, v, **options)
    assert out.dtype == q.dtype
    assert_near(out, loops(q, k, v, **options)[0], TOLERANCE[q.dtype])


@given(case=cases(dtypes=(torch.float64, torch.float32)), block=st.integers(1, 9))
def test_tiles_of_any_size_give_the_same_and_the_log_of_the_sum(case, block):
    q, k, v, options = case
    out, lse = tiled_attention(q.requires_grad_(), k, v, block=block, **options)
    assert out.requires_grad and not lse.requires_grad
    expected, expected_lse = loops(q, k, v, **options)
    assert_near(out.detach(), expected, TOLERANCE[q.dtype])
    assert_near(lse, expected_lse, TOLERANCE[q.dtype])


@every_path
@pytest.mark.parametrize("causal", (False, True))
def test_long_rows_in_real_tiles(path, causal):
    """Sizes at which PyTorch's kernel and ours tile; scores that move the running maximum again and again."""
    q, k, v = 4 * torch.randn(1, 4, 70, 16), torch.randn(1, 2, 1100, 16), torch.randn(1, 2, 1100, 16)
    mask = torch.rand(70, 1100) < 0.5
    mask[:, :600] = False  # whole tiles without one visible key, before the first that has any
    mask[3] = False
    wide = [x.double().repeat_interleave(n, 1) for x, n in ((q, 1), (k, 2), (v, 2))]
    S = (wide[0] @ wide[1].mT / 4).masked_fill(~(mask.tril(1030) if causal else mask), -math.inf)
    expected = S.softmax(-1).nan_to_num(0.0) @ wide[2]
    options = {"mask": mask, "causal": causal}
    out = tiled_attention(q, k, v, **options)[0] if path is tiled else path(q, k, v, **options)
    assert_near(out, expected, 2e-5)


@every_path
def test_scores_beyond_the_range_of_exp(path):
    q, k = torch.full((1, 1, 1, 1), 1000.0), torch.tensor([1.0, -1.0, 0.999]).view(1, 1, 3, 1)
    out = path(q, k, torch.eye(3)[None, None], scale=1.0)
    assert_near(out.flatten(), torch.tensor([1, 0, math.exp(-1)], dtype=torch.float64) / (1 + math.exp(-1)), 1e-4)


@every_path
def test_a_float32_mask_beside_float64_queries(path):
    """PyTorch 2.13 accepts a float32 mask beside float64 queries and returns numbers of its own on the CPU."""
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    mask = torch.randint(-8, 8, (5, 5)) / 4
    assert_near(path(q, k, v, mask=mask), loops(q, k, v, mask=mask)[0], 1e-12)


@every_path
def test_bfloat16_sums_are_kept_in_float32(path):
    """Equal scores: the output is the mean of 2,000 values, and a sum kept in 8 bits would stop growing at 512."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.randn(1, 1, 2000, 4), 1 + torch.rand(1, 1, 2000, 4)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert_near(path(q, k, v), v.double().mean(2, keepdim=True), 1e-2)


def test_worked_product_and_softmax_rows():
    X, W = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([[1, 0], [0, 1], [-1, 1]])
    assert (X @ W).tolist() == [[-2, 5], [-2, 11], [-2, 17]]
    Q = (X @ W).double()[None, None]  # (1, 1, 3, 2): a token's projection, used as query, key and value at once
    weights = naive_attention(Q, Q, torch.eye(3, dtype=torch.float64)[None, None])[0, 0]  # v = I returns P itself
    assert_near(weights.sum(-1), torch.ones(3), 1e-15)
    assert_near(weights, loops(Q, Q, torch.eye(3)[None, None])[0][0, 0], 1e-12)


# ---- gradients ----


@pytest.mark.parametrize("path", (naive_attention, torch_attention, tiled), ids=("naive", "torch", "tiled"))
@pytest.mark.parametrize("Tq, Tk", ((4, 4), (2, 5), (5, 2), (1, 3)))
@pytest.mark.parametrize("kind", ("none", "bool", "additive"))
@pytest.mark.parametrize("causal", (False, True))
def test_gradients_by_finite_differences(path, Tq, Tk, kind, causal):
    shapes = (2, 4, Tq, 3), (2, 2, Tk, 3), (2, 2, Tk, 2)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mask = None if kind == "none" else torch.rand(2, 1, Tq, Tk) < 0.6
    if kind == "additive":
        mask = torch.randn(1, 4, Tq, Tk, dtype=torch.float64).masked_fill(torch.rand(1, 4, Tq, Tk) < 0.4, -math.inf)
    assert torch.autograd.gradcheck(lambda *x: path(*x, causal=causal, mask=mask, scale=0.7), inputs)


@pytest.mark.parametrize("path", (naive_attention, torch_attention, attention), ids=("naive", "torch", "attention"))
def test_a_learned_bias_gets_its_gradient(path):
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda bias: path(q, k, v, causal=True, mask=bias), [bias])
    with pytest.raises(ValueError, match="mask requires grad"):
        tiled_attention(q, k, v, mask=bias)


def gradients(path, q, k, v, options, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = path(*inputs, **options)
    torch.manual_seed(1)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=torch.float64).to(q.dtype).to(dtype))


@every_path
@given(case=cases())
def test_gradients_are_those_of_float64(path, case):
    """The definition in float64, itself under finite differences above, judges every path, dtype and layout."""
    q, k, v, options = case
    expected = gradients(naive_attention, q, k, v, options, torch.float64)
    for actual, wanted in zip(gradients(path, q, k, v, options, q.dtype), expected, strict=True):
        assert_near(actual, wanted, 3 * TOLERANCE[q.dtype])


# ---- trap 6: rows with nothing to attend to ----


def check_empty_rows(path, dtype=torch.float32, kind="bool"):
    q, k, v = (torch.randn(2, 2, 4, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, 1] = False  # one row of the first sequence, and every row of the second
    mask[1] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
    out = path(q, k, v, mask=given)
    out.float().square().sum().backward()
    assert (out[0, :, 1] == 0).all() and (out[1] == 0).all(), "an empty row is not zero"
    assert (q.grad[0, :, 1] == 0).all() and all((x.grad[1] == 0).all() for x in (q, k, v)), "its gradient is not zero"
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad)), "NaN leaks into other rows"
    assert (out[0, :, 0] != 0).all() and (v.grad[0] != 0).any(), "rows with keys must not vanish"


@every_path
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ("bool", "additive"))
def test_empty_rows_give_zeros_and_zero_gradients(path, dtype, kind):
    check_empty_rows(path, dtype, kind)


@pytest.mark.parametrize("backend", (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION), ids=lambda b: b.name)
def test_empty_rows_in_each_backend_of_pytorch(backend):
    for dtype, kind in itertools.product(TOLERANCE, ("bool", "additive")):
        with sdpa_kernel(backend):
            check_empty_rows(torch_attention, dtype, kind)


def test_the_check_of_empty_rows_rejects_the_usual_bugs():
    def nan(q, k, v, *, mask):
        return (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1) @ v

    def uniform(q, k, v, *, mask):
        return nan(q, k, v, mask=mask.clamp(min=torch.finfo(mask.dtype).min))

    def forward_only(q, k, v, *, mask):  # zeros come out, and NaN goes back
        return (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1).nan_to_num(0.0) @ v

    for variant in (nan, uniform, forward_only):
        assert rejected(check_empty_rows, variant, torch.float32, "additive"), variant.__name__


@every_path
@pytest.mark.parametrize("Tq, Tk, causal", ((3, 0, False), (1, 0, True), (0, 3, True), (0, 0, False), (5, 2, True)))
def test_no_keys_or_no_queries(path, Tq, Tk, causal):
    q, k, v = torch.randn(2, 4, Tq, 3), torch.randn(2, 2, Tk, 3), torch.randn(2, 2, Tk, 5)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = path(*inputs, causal=causal)
    out.sum().backward()
    assert out.shape == (2, 4, Tq, 5) and all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    unseen = max(Tq - Tk, 0) if causal or Tk == 0 else 0  # rows before the first key
    assert (out[:, :, :unseen] == 0).all() and (q.grad[:, :, :unseen] == 0).all()


# ---- trap 5: causal, bottom-right ----


def check_chunks(path, T=9):
    """Prefill in chunks against a growing cache must equal prefill at once."""
    q, k, v = torch.randn(1, 4, T, 8), torch.randn(1, 2, T, 8), torch.randn(1, 2, T, 8)
    whole = path(q, k, v, causal=True)
    for cuts in ((0, 1, T), (0, 4, 6, T), tuple(range(T + 1)), (0, 3, 3, T)):
        parts = [path(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal=True) for a, b in itertools.pairwise(cuts)]
        assert_near(torch.cat(parts, 2), whole, 1e-5)


@every_path
def test_chunked_prefill_equals_full(path):
    check_chunks(path)


def test_the_check_of_chunks_rejects_top_left():
    def top_left(q, k, v, *, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def blind(q, k, v, *, causal):  # right for chunks of one token, as in plain decoding, and for no others
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] == k.shape[2], enable_gqa=True)

    assert rejected(check_chunks, top_left) and rejected(check_chunks, blind)


@every_path
def test_causal_rows_do_not_see_the_future(path):
    q, k, v = torch.randn(3, 1, 2, 7, 4)
    before = path(q, k, v, causal=True)
    k[:, :, 4:], v[:, :, 4:] = 9.0, -9.0
    after = path(q, k, v, causal=True)
    assert torch.equal(before[:, :, :4], after[:, :, :4]) and not torch.equal(before[:, :, 4:], after[:, :, 4:])


# ---- trap 7: the axis of softmax ----


def check_axis(path):
    """Rows are independent, so a row may be left out or moved; the order of keys is nothing; weights sum to 1."""
    q, k, v = torch.randn(3, 3, 2, 5, 4)
    out = path(q, k, v)
    rows, keys = torch.tensor([4, 0, 2]), torch.randperm(5)
    assert_near(path(q[:, :, rows], k, v), out[:, :, rows], 1e-5)
    assert_near(path(q, k[:, :, keys], v[:, :, keys]), out, 1e-5)
    assert_near(path(q[1:], k[1:], v[1:]), out[1:], 1e-5)
    assert_near(path(q[:, 1:], k[:, 1:], v[:, 1:]), out[:, 1:], 1e-5)
    assert_near(path(q, k, torch.ones_like(v)), torch.ones_like(v), 1e-5)


@every_path
def test_softmax_is_over_the_keys(path):
    check_axis(path)


def test_the_check_of_the_axis_rejects_the_others():
    def over(axis):
        return lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(axis) @ v

    assert [rejected(check_axis, over(axis)) for axis in range(4)] == [True, True, True, False]


# ---- grouped queries ----


def check_groups(path):
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    repeated = path(q, k[:, [0, 0, 0, 1, 1, 1]], v[:, [0, 0, 0, 1, 1, 1]])
    assert_near(path(q, k, v), repeated, 1e-5)


@every_path
def test_neighbouring_query_heads_share_a_key_value_head(path):
    check_groups(path)


def test_the_check_of_groups_rejects_the_other_order():
    def interleaved(q, k, v):  # h % Hkv in place of h // G
        n = q.shape[1] // k.shape[1]
        return naive_attention(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1))

    assert rejected(check_groups, interleaved)


# ---- dropout, errors, paths ----


@pytest.mark.parametrize("path", (naive_attention, torch_attention, attention), ids=("naive", "torch", "attention"))
def test_dropout_drops_weights_and_keeps_their_mean(path):
    q, k = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 40, 8)
    v = torch.eye(40).expand(1, 2, 40, 40)  # v = I returns P itself
    P, kept = path(q, k, v), path(q, k, v, dropout=0.25)
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert_near(kept[kept != 0], P[kept != 0] / 0.75, 1e-5)
    assert (path(q, k, v, dropout=1.0) == 0).all()


@pytest.mark.parametrize("path", (naive_attention, tiled_attention, attention), ids=("naive", "tiled", "attention"))
def test_errors_are_one_line_that_names_the_argument(path):
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    wrong = [
        (ValueError, "key-value heads", (q, k[:, [0, 1, 1]], k[:, [0, 1, 1]]), {}),
        (ValueError, "key-value heads", (q, k[:, :0], k[:, :0]), {}),
        (ValueError, "want q", (q[0], k, k), {}),
        (ValueError, "want q", (q, k[..., :7], k), {}),
        (ValueError, "want q", (q[:1], k, k), {}),
        (ValueError, "want k and v", (q, k, k[:, :, :4]), {}),
        (ValueError, "mask has shape", (q, k, k), {"mask": torch.ones(3, 4, dtype=torch.bool)}),
        (ValueError, "mask has shape", (q[:1], k[:1], k[:1]), {"mask": torch.ones(2, 1, 3, 5)}),  # would widen B
        (ValueError, "mask has shape", (q, k, k), {"mask": torch.ones(1, 1, 1, 3, 5)}),
        (TypeError, "mask has dtype", (q, k, k), {"mask": torch.ones(2, 1, 1, 5, dtype=torch.int64)}),
    ]
    for error, text, tensors, options in wrong:
        with pytest.raises(error, match=text) as caught:
            path(*tensors, **options)
        assert "\n" not in str(caught.value)


def test_tiled_attention_refuses_a_second_derivative():
    q = torch.randn(1, 1, 3, 2, requires_grad=True)
    (first,) = torch.autograd.grad(tiled(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_pytorch_gets_a_mask_only_when_it_needs_one(monkeypatch):
    calls = []

    def record(q, k, v, mask, dropout, causal, **rest):
        calls.append((mask, causal))

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q, k = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 9, 4)
    torch_attention(q, q, q)
    torch_attention(q, q, q, causal=True)
    torch_attention(q[:, :, :1], k, k, causal=True)
    assert calls == [(None, False), (None, True), (None, False)]
    torch_attention(q, k, k, causal=True)
    assert calls[-1][0].shape == (6, 9) and calls[-1][1] is False


def test_attention_takes_the_fused_kernel_when_it_can(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    seen = []

    def why_not(q, k, v, *, mask=None, dropout=0.0):
        return "dropout" if dropout else None

    def fused_attention(q, k, v, *, causal=False, mask=None, scale=None):
        seen.append((causal, mask, scale))
        return naive_attention(q, k, v, causal=causal, mask=mask, scale=scale)

    monkeypatch.setattr(module, "fused", types.SimpleNamespace(why_not=why_not, attention=fused_attention))
    mask = torch.rand(4, 4) < 0.5
    expected = naive_attention(q, k, v, causal=True, mask=mask, scale=0.5)
    assert_near(attention(q, k, v, causal=True, mask=mask, scale=0.5), expected, 1e-5)
    assert seen == [(True, mask, 0.5)]
    attention(q, k, v, dropout=0.5)
    assert len(seen) == 1
    monkeypatch.setattr(module, "fused", None)
    assert_near(attention(q, k, v, causal=True, mask=mask, scale=0.5), expected, 1e-5)
    assert len(seen) == 1


def test_the_switch_for_the_pure_path():
    code = (
        "import torch; from minimal import attention as a; q, k, v = torch.randn(3, 1, 2, 4, 8)\n"
        "print(a.fused.why_not(q, k, v), (a.attention(q, k, v) - a.naive_attention(q, k, v)).abs().max() < 1e-5)"
    )
    environment = {**os.environ, "MINIMAL_FUSED": "0"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "MINIMAL_FUSED=0" in out.stdout and out.stdout.strip().endswith("tensor(True)"), out.stderr


# ---- the layer ----


def torch_twin(layer, C, H):
    """torch.nn.MultiheadAttention with the weights of ours."""
    twin = torch.nn.MultiheadAttention(C, H, batch_first=True, bias=layer.q_proj.bias is not None)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        twin.out_proj.weight.copy_(layer.o_proj.weight)
        if layer.q_proj.bias is not None:
            twin.in_proj_bias.copy_(torch.cat([p.bias for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
            twin.out_proj.bias.copy_(layer.o_proj.bias)
    return twin


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("cross", (False, True), ids=("self", "cross"))
@pytest.mark.parametrize("masked", ("no mask", "padding", "boolean", "additive", "causal"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_layer_equals_torch_multihead_attention(path, cross, masked, bias):
    C, H, B, T = 12, 3, 2, 5
    Tk = 7 if cross else T
    no_dropout = lambda *a, dropout, **options: path(*a, **options)  # noqa: E731
    layer = MultiHeadAttention(C, H, bias=bias, attention=no_dropout if path is tiled else path)
    twin = torch_twin(layer, C, H)
    x, context = torch.randn(B, T, C), torch.randn(B, Tk, C)
    mine, theirs = {}, {}
    if masked == "padding":
        padding = torch.arange(Tk) >= torch.tensor([[Tk], [Tk - 2]])  # (B, Tk), True: hidden
        mine, theirs = {"mask": ~padding[:, None, None, :]}, {"key_padding_mask": padding}
    elif masked == "boolean":
        hidden = (torch.rand(T, Tk) < 0.4).index_fill(1, torch.tensor([0]), False)
        mine, theirs = {"mask": ~hidden}, {"attn_mask": hidden}
    elif masked == "additive":
        added = torch.randn(B, H, T, Tk)
        mine, theirs = {"mask": added}, {"attn_mask": added.flatten(0, 1)}
    elif masked == "causal":
        hidden = torch.ones(T, Tk, dtype=torch.bool).triu(1 + Tk - T)
        mine, theirs = {"causal": True}, {"attn_mask": hidden}

    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    c1, c2 = (context.clone().requires_grad_() if cross else None for _ in range(2))
    out = layer(x1, c1, **mine)
    keys = c2 if cross else x2
    expected = twin(x2, keys, keys, need_weights=False, **theirs)[0]
    assert_near(out, expected, 1e-5)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    assert_near(x1.grad, x2.grad, 1e-5)
    if cross:
        assert_near(c1.grad, c2.grad, 1e-5)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    assert_near(torch.cat([p.weight.grad for p in projections]), twin.in_proj_weight.grad, 1e-5)
    assert_near(layer.o_proj.weight.grad, twin.out_proj.weight.grad, 1e-5)
    if bias:
        assert_near(torch.cat([p.bias.grad for p in projections]), twin.in_proj_bias.grad, 1e-5)
        assert_near(layer.o_proj.bias.grad, twin.out_proj.bias.grad, 1e-5)


@pytest.mark.parametrize("n_kv_heads", (1, 2, 4))
def test_grouped_layer_equals_one_with_repeated_heads(n_kv_heads):
    C, H, D = 16, 4, 4
    grouped, full = MultiHeadAttention(C, H, n_kv_heads), MultiHeadAttention(C, H)
    state = grouped.state_dict()
    for name in ("k_proj", "v_proj"):
        for part in ("weight", "bias"):
            heads = state[f"{name}.{part}"].unflatten(0, (n_kv_heads, D))
            state[f"{name}.{part}"] = heads.repeat_interleave(H // n_kv_heads, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, C)
    assert_near(grouped(x, causal=True), full(x, causal=True), 1e-5)
    assert grouped.k_proj.weight.shape == (n_kv_heads * D, C)


def check_eval(layer):
    """Evaluation twice: the same numbers, and those of the layer without dropout."""
    x = torch.randn(2, 6, 8)
    layer.eval()
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    layer.dropout = 0.0
    assert torch.equal(first, layer(x))


def test_dropout_sleeps_in_eval_and_wakes_in_training():
    layer = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    check_eval(layer)

    class Awake(MultiHeadAttention):  # F.dropout and PyTorch's attention both act unless told otherwise
        training = True

        def train(self, mode=True):
            return self

    assert rejected(check_eval, Awake(8, 2, dropout=0.5))


def check_cache(positions_of):
    layer = MultiHeadAttention(16, 4, 2)
    x = torch.randn(2, 9, 16)
    whole = layer(x, causal=True, positions=torch.arange(9))
    cache, parts = [], []
    for a, b in ((0, 4), (4, 5), (5, 9)):
        parts.append(layer(x[:, a:b], causal=True, positions=positions_of(a, b), cache=cache))
        assert [tuple(c.shape) for c in cache] == [(2, 2, b, 4)] * 2
    assert_near(torch.cat(parts, 1), whole, 1e-5)


def test_cache_with_rotary_equals_the_full_pass():
    check_cache(torch.arange)
    assert rejected(check_cache, lambda a, b: torch.arange(b - a))  # trap 8: positions that start again


def test_rotary_layer_knows_distances_only():
    layer, x = MultiHeadAttention(16, 4, 2), torch.randn(2, 5, 16)
    near, far = (layer(x, positions=torch.arange(5) + start) for start in (0, 100))
    assert_near(near, far, 1e-4)
    assert (near - layer(x)).abs().max() > 1e-3 and (near - layer(x, positions=2 * torch.arange(5))).abs().max() > 1e-3


def test_left_padding_moves_nothing():
    """Two pads in front, hidden by the mask and left out of the positions, change no real token; pads give no NaN."""
    layer = MultiHeadAttention(16, 4, 2)
    x = torch.randn(1, 5, 16)
    padded = torch.cat((torch.randn(1, 2, 16), x), 1)
    mask = torch.tensor([False, False, True, True, True, True, True])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    out = layer(padded, causal=True, mask=mask, positions=positions)
    assert_near(out[:, 2:], layer(x, causal=True, positions=torch.arange(5)), 1e-5)
    assert_near(out[:, :2], layer.o_proj.bias.expand(1, 2, 16), 0.0)


def test_layer_errors():
    for sizes in ((10, 3), (12, 4, 3)):
        with pytest.raises(ValueError, match="want each to divide"):
            MultiHeadAttention(*sizes)
    x = torch.randn(1, 2, 8)
    for options in ({"positions": torch.arange(2)}, {"cache": []}):
        with pytest.raises(ValueError, match="context with"):
            MultiHeadAttention(8, 2)(x, x, **options)


# ---- positions ----


def test_sinusoidal_worked_examples_and_formula():
    table = sinusoidal_positions(3, 4)
    assert_near(table[0], torch.tensor([0.0, 1.0, 0.0, 1.0]), 0.0)
    assert_near(table[1], torch.tensor([0.8415, 0.5403, 0.0100, 0.99995]), 5e-5)
    assert_near(table[2], torch.tensor([0.9093, -0.4161, 0.0200, 0.9998]), 5.1e-5)
    long = sinusoidal_positions(100_001, 6)
    assert long.shape == (100_001, 6) and long.dtype == torch.float32
    for t, i in itertools.product((1, 17, 1000, 100_000), range(3)):
        angle = t / 10000 ** (2 * i / 6)
        assert long[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
        assert long[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)
    with pytest.raises(ValueError, match="d_model=5"):
        sinusoidal_positions(3, 5)


def test_learned_positions_are_an_embedding_of_the_place():
    layer, x = LearnedPositions(6, 4), torch.randn(2, 3, 4)
    for start in (0, 3):
        assert torch.equal(layer(x, start), x + F.embedding(torch.arange(start, start + 3), layer.weight))
    with pytest.raises(ValueError, match="max_length = 6"):
        layer(x, 4)


def check_rotary(turn, base=10000.0, dtype=torch.float32, tolerance=0.0):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=base)
    q, k = torch.randn(2, 4, 9, 16).to(dtype), torch.randn(2, 2, 9, 16).to(dtype)
    positions = torch.arange(9) + torch.tensor([[0], [5000]])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    for mine, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        out = turn(mine, positions, base)
        assert out.dtype == dtype
        assert_near(out, theirs, tolerance)
        assert_near(turn(mine[:1], positions[0], base), theirs[:1], tolerance)


def rotary_neighbours(x, positions, base=10000.0):
    """The paper's pairs, by complex numbers: an independent form, and the wrong one for Hugging Face's weights."""
    D = x.shape[-1]
    angle = positions.double()[..., None] * base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)  # (.., T, D/2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle).unsqueeze(-3)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def test_rotary_equals_transformers():
    check_rotary(rotary)
    check_rotary(rotary, base=500000.0)
    check_rotary(rotary, dtype=torch.bfloat16, tolerance=2e-2)  # they multiply in bfloat16, we round once
    assert rejected(check_rotary, rotary_neighbours)


@given(T=st.integers(0, 5), half=st.integers(1, 4), start=st.integers(0, 3000), base=st.sampled_from((10000.0, 1e6)))
def test_halves_are_the_papers_neighbours_reordered(T, half, start, base):
    """Also the float64 path of rotary, against the complex form of the paper."""
    x, positions = torch.randn(2, 3, T, 2 * half, dtype=torch.float64), torch.arange(start, start + T)
    to_neighbours = torch.arange(2 * half).view(2, half).T.flatten()  # 0, half, 1, half + 1, ...
    expected = rotary_neighbours(x[..., to_neighbours], positions, base)
    assert_near(rotary(x, positions, base)[..., to_neighbours], expected, 1e-9)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)

    def score(m, n):
        return (rotary(q, torch.tensor([m])) * rotary(k, torch.tensor([n]))).sum().item()

    for m, n, far in ((5, 2, 100), (0, 0, 7), (3, 9, 4000)):
        assert score(m, n) == pytest.approx(score(m + far, n + far), abs=1e-10)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3)
    assert rotary(q, torch.tensor([123])).norm().item() == pytest.approx(q.norm().item())
    assert torch.equal(rotary(q, torch.tensor([0])), q)
    with pytest.raises(ValueError, match="head size 3"):
        rotary(torch.randn(1, 1, 1, 3), torch.tensor([0]))
