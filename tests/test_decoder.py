# SPDX-License-Identifier: MIT
"""decoder.py and the operator minimal::llama_block. Oracle: minimal/llama.py in float64, on the very weights that the
codes stand for; bound: a few times the rounding of float32."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal import fused, fused_linear, quant
from minimal.decoder import Decoder
from minimal.generate import generate
from minimal.llama import Llama, LlamaConfig
from minimal.lora import add_lora
from minimal.prefix import add_prefix
from minimal.prompt import add_prompt

needs_operators = pytest.mark.skipif(not fused_linear.available(), reason=f"{fused_linear.why_not()}")
KINDS = ("float32", "bfloat16", "int8", "int4")


def llama(**changes):
    sizes = dict(vocab_size=70, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(**sizes | dict(num_key_value_heads=2, max_position_embeddings=700) | changes)
    model = Llama(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "norm" in name else 0, 0.2)
    return model


def held(kind, W):
    return {"weight": W.to(getattr(torch, kind))} if "float" in kind else quant.KINDS[kind][0](W.float())


def product(kind, dynamic=False):
    return lambda W: fused_linear.Product(kind, W.shape, dynamic=dynamic, **held(kind, W.detach()))


def as_coded(model, kind):
    """The model in float64, its weights those that the codes of `kind` stand for."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.Linear):
                parts = held(kind, m.weight)
                m.weight.copy_(m.weight if kind == "float32" else fused_linear.unpack(kind, m.weight.shape, **parts))
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    return model.double()


def near(got, wanted, tolerance=2e-4):
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


shapes = st.fixed_dictionaries({
    "num_attention_heads": st.sampled_from([2, 4]), "num_key_value_heads": st.sampled_from([1, 2]),
    "hidden_size": st.sampled_from([32, 64, 100]), "intermediate_size": st.sampled_from([8, 33, 96]),
    "head_dim": st.sampled_from([8, 32, 64]), "tie_word_embeddings": st.booleans(),
    "rope_scaling": st.sampled_from([None, {"type": "linear", "factor": 2.0}]),
})  # fmt: skip


@needs_operators
@given(changes=shapes, kind=st.sampled_from(KINDS), rows=st.integers(1, 3), in_one=st.booleans(), data=st.data())
def test_pieces_of_a_text_give_the_models_logits(changes, kind, rows, in_one, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    model = llama(**changes)
    decoder = Decoder(model, product(kind), fused.attention, fused_linear.llama_block if in_one else None)
    sizes = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 7, 20]), min_size=1, max_size=6))
    ids, cache, read = torch.randint(70, (rows, sum(sizes))), [], 0
    model = as_coded(model, kind)
    with torch.no_grad():
        logits = model(ids)
    for piece in ids.split(sizes, dim=1):
        read += piece.size(1)
        near(decoder(piece, cache), logits[:, read - 1 : read])
    near(decoder(ids), logits[:, -1:])  # without a cache


def test_plain_pytorch_alone():
    model, ids, cache = llama(tie_word_embeddings=True), torch.randint(70, (2, 30)), []
    decoder = Decoder(model)
    logits = torch.cat([decoder(piece, cache) for piece in ids.split((11, 1, 1, 10, 7), dim=1)], 1)
    with torch.no_grad():
        near(logits, model.double()(ids)[:, [10, 11, 12, 22, 29]])
    with torch.no_grad():
        model.model.norm.weight.zero_()  # the decoder's weights are its own
    assert decoder(ids).abs().max() > 0


@needs_operators
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_buffers_grow_without_loss(dynamic):
    model = llama()
    decoder = Decoder(model, product("int8", dynamic), fused.attention, fused_linear.llama_block)
    ids, cache, sizes = torch.randint(70, (1, 600)), [], []
    decoder(ids[:, :250], cache)
    for i in range(250, 600):
        last = decoder(ids[:, i : i + 1], cache)
        sizes.append(cache[0].kv[0].size(2))
    assert sorted({*sizes}) == [256, 512, 700] and cache[0].length == 600
    with torch.no_grad():
        near(last, as_coded(model, "int8")(ids)[:, -1:], 0.1 if dynamic else 2e-4)


def test_logits_of_the_last_positions_and_a_shorter_length():
    model, ids, cache = llama(), torch.randint(70, (2, 30)), []
    decoder = Decoder(model, last=3)
    with torch.no_grad():
        logits = model.double()(ids)
    near(decoder(ids[:, :20], cache), logits[:, 17:20])
    near(decoder(ids[:, 20:22], cache), logits[:, 20:22])
    decoder(torch.randint(70, (2, 6)), cache)
    cache[0].length = 22  # forgets what came after
    near(decoder(ids[:, 22:], cache), logits[:, 27:])
    with pytest.raises(ValueError, match="last = 0: wanted 1 or more"):
        Decoder(llama(), last=0)


def test_of_a_quantised_model():
    """Its weights are no parameters, and are read anew."""
    model, ids = llama(), torch.randint(70, (2, 9))
    quant.quantise(model, "int8")
    logits = Decoder(model)(ids)
    quant.dequantise(model)
    assert torch.equal(logits, Decoder(model)(ids))


@needs_operators
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_other_bits(tied):
    model, ids = llama(tie_word_embeddings=tied), torch.randint(70, (2, 9))
    decoder = Decoder(model, product("float32"), head=product("int8"))
    with torch.no_grad():
        W = fused_linear.unpack("int8", (70, 64), **held("int8", model.lm_head.weight))
        model.lm_head.weight.copy_(W)  # and with it the embedding, if it is tied
        near(decoder(ids), model.double()(ids)[:, -1:])


def test_generate_takes_it():
    model, ids = llama(), torch.randint(70, (2, 5))
    wanted = generate(model, ids, 40, temperature=0)
    assert torch.equal(generate(Decoder(model), ids, 40, temperature=0), wanted)


def test_errors():
    model = llama(max_position_embeddings=8)
    decoder, cache = Decoder(model), []
    decoder(torch.zeros(1, 6, dtype=torch.long), cache)
    for ids, message in (
        (torch.zeros(1, 3, dtype=torch.long), "6 cached [+] 3 new tokens do not fit the context, 8"),
        (torch.zeros(2, 1, dtype=torch.long), "ids have 2 rows: wanted the cache's 1"),
        (torch.zeros(1, 2), "ids of shape"),
        (torch.zeros(1, 0, dtype=torch.long), "ids of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(ids, cache)
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match="has a hook"):
        Decoder(model)
    for add, named in ((add_prefix, "attention"), (add_prompt, "prompt")):
        with pytest.raises(ValueError, match=f"parameter '.*{named}.*' is no Llama's"):
            add(model := llama(), 3)
            Decoder(model)
    with pytest.raises(ValueError, match="Linear is no Llama"):
        Decoder(torch.nn.Linear(3, 3))


def arguments(**changes):
    """Those of minimal::llama_block: B 2, T 3, C 32, H 2, Hkv 1, D 16, F 24, int8."""
    a = dict(x=torch.randn(6, 32), norm1=torch.ones(32), norm2=torch.ones(32))
    for name, O, C in (("qkv", 64, 32), ("o", 32, 32), ("gate_up", 48, 32), ("down", 32, 24)):
        parts = held("int8", torch.randn(O, C))
        a |= {name: parts["codes"], f"{name}_scale": parts["scale"], f"{name}_least": None}
    a |= dict(
        cos=torch.ones(3, 16), sin=torch.zeros(3, 16), cache=torch.zeros(2, 2, 10, 16), start=3, eps=1e-5, dynamic=False
    )
    assert changes.keys() <= a.keys()
    return (a | changes).values()


@needs_operators
@pytest.mark.parametrize("changes, message", [
    (dict(x=torch.randn(6, 32).double()), "x "), (dict(x=torch.randn(6, 31)), "norm1 has shape"),
    (dict(x=torch.randn(32)), "x has shape"), (dict(x=torch.randn(32, 6).T), "x of shape .* gaps"),
    (dict(x=torch.randn(7, 32)), "x has shape"), (dict(x=torch.randn(3, 32)), "x has shape"),
    (dict(norm2=torch.ones(31)), "norm2 has shape"), (dict(sin=torch.ones(2, 16)), "sin has shape"),
    (dict(cos=torch.ones(0, 16), x=torch.ones(0, 32)), "x has shape"), (dict(cos=torch.ones(16)), "cos has shape"),
    (dict(cos=torch.ones(3, 8)), "cos has shape"), (dict(cache=torch.zeros(2, 3, 10, 16)), "cache has shape"),
    (dict(cache=torch.zeros(2, 2, 10, 15)), "cache has"), (dict(cache=torch.zeros(2, 0, 10, 16)), "cache has shape"),
    (dict(cache=torch.zeros(2, 2, 10, 512)), "cache has shape"), (dict(start=8), "start is 8"),
    (dict(start=-1), "start is -1"), (dict(qkv_scale=None), "qkv of"), (dict(qkv_least=torch.ones(64, 1)), "qkv of"),
    (dict(qkv=torch.zeros(65, 32).to(torch.int8), qkv_scale=torch.ones(65)), "qkv has 65 outputs"),
    (dict(qkv=torch.zeros(32, 32).to(torch.int8), qkv_scale=torch.ones(32)), "qkv has 32 outputs"),
    (dict(o=torch.zeros(32, 31).to(torch.int8)), "o has 31 inputs"), (dict(o=torch.zeros(32, 32)), "o of float32"),
    (dict(down=torch.zeros(32, 23).to(torch.int8)), "down has 23"), (dict(down=torch.zeros(32, 24).long()), "down"),
    (dict(o=torch.zeros(31, 32), o_scale=None), "o, down and gate_up have 31"),
    (dict(gate_up=torch.zeros(47, 32), gate_up_scale=None), "gate_up|down"),
])  # fmt: skip
def test_malformed_arguments_of_the_operator(changes, message):
    torch.ops.minimal.llama_block(*arguments())  # these fit
    with pytest.raises(RuntimeError, match=f"minimal::llama_block: {message}"):
        torch.ops.minimal.llama_block(*arguments(**changes))


@needs_operators
def test_the_operator_writes_nothing_but_its_place():
    values = list(arguments())
    cache = values[-4]
    torch.ops.minimal.llama_block(*values)
    assert cache[:, :, 3:6].abs().min() > 0 and cache[:, :, [0, 1, 2, *range(6, 10)]].abs().max() == 0
    torch.library.opcheck(
        torch.ops.minimal.llama_block.default, tuple(arguments()), test_utils=("test_schema", "test_faketensor")
    )


@needs_operators
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "generic"])
def test_every_instruction_set_in_a_process_of_its_own(isa):
    if isa not in sys.modules["minimal._C"].instruction_sets().split(","):
        pytest.skip(f"this processor or build has no {isa}")
    if os.environ.get("MINIMAL_ISA") == isa:
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "logits or grow or malformed",
    ]
    done = subprocess.run(command, env={**os.environ, "MINIMAL_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
