# SPDX-License-Identifier: MIT
"""GGUF: a Llama's sizes and weights out of the one file that llama.cpp reads, under Hugging Face's names, in float32.

No paper; the format is that of G. Gerganov and others, ggml, docs/gguf.md (versions 2 and 3), little-endian:

    file     "GGUF", version u32, number of tensors u64, number of entries u64, entries, tensors, padding, data
    entry    key, kind u32, value; a string is its length u64 and UTF-8; an array its kind u32, length u64 and items
    tensor   name, number of dimensions u32, each of them u64 (the fastest first), type u32, offset u64 into the data
    Q8_0     32 weights in 34 bytes: w_i = d q_i with q_i int8 and one d in float16
    Q4_1     32 weights in 20 bytes: w_i = d q_i + m with q_i from 0 to 15; the other types are of this kind

Where such a file differs from Hugging Face's folder, each a known trap:
- The rotation turns neighbours there, (x0 y0 x1 y1 ..), halves here, (x0 x1 .. y0 y1 ..): the rows of W_q and W_k are
  re-ordered. Forgotten, all shapes fit and tokens at one position still score alike; only at a distance it shows.
- Llama 3.1's scaling is there a tensor, rope_freqs: what each frequency f_i = theta^(-2i/D) is divided by. That is
  1 / (k_i + (1 - k_i) / factor) with k_i = clamp((8192 f_i / 2 pi - 1) / (4 - 1), 0, 1): the factor is its largest.
- A tied head is left out of the file. The size of the vocabulary is that of the embedding.

Departures: quantised weights become float32, so a file of 5 bits a weight takes six times its size in memory; to read
them one at a time, as minimal/decoder.py can, there is open_llama. The tokenizer is not read (minimal/gguf_format.py:
tokenizer_of).

    config, tensors = read_llama("model.gguf")                  # config: a dict as in config.json
    model = Llama.from_tensors(config, tensors)                 # of minimal/llama.py
    safetensors.torch.save_file(tensors, "model.safetensors")   # beside config as config.json: Hugging Face's folder

Letters: H heads (of q, or of k), D head size, C width.
"""

import importlib
import math
import re
import struct
import tempfile
from pathlib import Path

import torch

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ENTRIES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"GGUF files are read with {name}: pip install {name}") from None


def read_llama(path):
    """-> (config, {name: float32 tensor}) of a .gguf that holds a Llama; any type that gguf's package can dequantise.

    config has the names and meanings of Hugging Face's config.json; tensors have Hugging Face's names, shapes and order
    of rows. Raises ValueError, one line with the file's name, for a damaged file, another architecture, biases, experts
    and scaled positions other than linear ones or Llama 3.1's. Whether each tensor is there, and of the right shape, is
    for the model to check. Time and memory are bounded by the size of the file.
    """
    config, outline, tensor = open_llama(path)
    return config, {name: tensor(name) for name in outline}


def open_llama(path):
    """-> (config, outline, tensor): as read_llama, but no weight is read yet. Raises the same; a type that cannot be
    dequantised is refused by `tensor`.

    outline: {name: a tensor on the meta device that has its shape}, of which Llama.from_tensors makes a model without
    memory; tensor(name) reads and dequantises one, anew at each call: for Decoder's `weights`, of minimal/decoder.py.
    """
    gguf, numpy = _library("gguf"), _library("numpy")
    try:
        entries, stored, read = _open(path, gguf, numpy)
        if (architecture := entries.get("general.architecture")) != "llama":
            raise ValueError(f"general.architecture = {architecture!r}, wanted 'llama'")
        said = {name.removeprefix("llama."): value for name, value in entries.items()}
        said.setdefault("attention.head_count_kv", said.get("attention.head_count"))
        for name in _ENTRIES.values():
            if name == "attention.key_length" and name not in said:
                said[name] = said["embedding_length"] // said["attention.head_count"]
            if type(x := said.get(name)) is not (float if name.endswith("epsilon") else int) or not x > 0:
                raise ValueError(f"llama.{name} = {x!r}, wanted a number above 0")
        D, scaling = said["attention.key_length"], said.get("rope.scaling.type", "none")
        for name, value in {"rope.dimension_count": D, "attention.value_length": D, "expert_count": 0}.items():
            if said.get(name, value) != value:
                raise ValueError(f"llama.{name} = {said[name]!r}, wanted {value!r}")
        if scaling not in ("none", "linear"):
            raise ValueError(f"llama.rope.scaling.type = {scaling!r}, wanted 'none' or 'linear'")
        if "token_embd.weight" not in stored:
            raise ValueError("the tensor token_embd.weight is missing")
        config = {"model_type": "llama", "vocab_size": len(stored["token_embd.weight"])}
        config |= {ours: said[name] for ours, name in _ENTRIES.items()}
        config |= {"tie_word_embeddings": "output.weight" not in stored, "rope_scaling": None}
        config |= {"rope_theta": said.get("rope.freq_base", 10000.0)}
        config |= {name: entries.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
        if scaling == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": said.get("rope.scaling.factor")}
        if "rope_freqs.weight" in stored:
            del stored["rope_freqs.weight"]
            config["rope_scaling"] = _llama3(read("rope_freqs.weight"), D, config["rope_theta"], scaling)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        outline, places = {}, {}
        for place, t in stored.items():
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", place)
            if not match or match[2] not in _NAMES:
                raise ValueError(f"the tensor {place} is none of a Llama's")
            name = (f"model.layers.{match[1]}." if match[1] else "") + f"{_NAMES[match[2]]}.weight"
            outline[name], places[name] = _halves(t, heads.get(match[2])), (place, heads.get(match[2]))
    except Exception as error:
        raise _in_one_line(path, error) from None

    def tensor(name):
        place, count = places[name]
        try:
            return _halves(read(place), count)
        except Exception as error:
            raise _in_one_line(path, error) from None

    return config, outline, tensor


# Same as minimal/llama.py: _in_one_line
def _in_one_line(where, error):  # libraries raise all kinds on damaged bytes; a name in a file may hold line ends
    said = str(error) if isinstance(error, ValueError) else f"unreadable ({type(error).__name__}: {error})"
    return ValueError("".join(c if c.isprintable() else " " for c in f"{where}: {said}"[:600]))


def _halves(w, heads):
    """Rows of W_q or W_k whose pairs are neighbours, (x0 y0 x1 y1 ..) in each head -> halves, (x0 x1 .. y0 y1 ..).
    heads: None for another weight, which stays as it is."""
    if heads is None:
        return w
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (H D, C) -> (H, D/2, 2, C) -> (H D, C)


def _llama3(divisors, D, theta, scaling):
    """rope_freqs (D/2,) -> rope_scaling as in config.json."""
    if divisors.shape == (D // 2,) and scaling == "none":
        turns = 8192 / (2 * math.pi) * theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        keep, factor = ((turns - 1) / (4 - 1)).clamp(0, 1), divisors.max().item()
        if torch.allclose(divisors.double(), 1 / (keep + (1 - keep) / factor), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192}  # fmt: skip
    raise ValueError("rope_freqs.weight: wanted the divisors of Llama 3.1, for a context of 8192 made longer")


def _open(path, gguf, numpy):
    """Entries (arrays left out); the tensors by name, on the meta device; what reads one of them, in float32.

    gguf's own reader takes sizes on trust, and seconds for a vocabulary; here no more is read than there are bytes."""
    at, entries, found, end, data = 0, {}, {}, 0, memoryview(numpy.memmap(path, numpy.uint8, "r"))

    def take(form):  # a tuple of values
        nonlocal at
        if (size := struct.calcsize("<" + form)) > len(data) - at:
            raise ValueError("the file ends within its header")
        at += size
        return struct.unpack_from("<" + form, data, at - size)

    def text():
        return take(f"{min(*take('Q'), len(data))}s")[0]

    def value(kind):
        if kind == 8:
            return text().decode()
        if kind != 9:
            return take("BbHhIif???Qqd"[kind])[0]
        kind, n = take("IQ")  # an array: none is of use here
        if kind == 9 or n > len(data) - at:
            raise ValueError(f"an array of {n} values of type {kind}: wanted fewer than there are bytes, and no arrays")
        if kind == 8:
            for _ in range(n):
                text()
        else:
            take(f"{n * struct.calcsize('BbHhIif???Qqd'[kind])}x")
        return f"an array of {n}"

    magic, version, tensor_count, entry_count = take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"begins with {magic!r}, version {version}: wanted GGUF of version 2 or 3, little-endian")
    for _ in range(entry_count):
        key, kind = text().decode(), take("I")[0]
        entries[key] = value(kind)
    align = entries.get("general.alignment", 32)
    for _ in range(tensor_count):
        name, n = text().decode(), take("I")[0]
        shape, (kind, offset) = take(f"{min(n, 9)}Q")[::-1], take("IQ")  # the file names the fastest dimension first
        kind = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not 1 <= n <= 4 or shape[-1] % block or offset != end or name in found or align < 1:
            raise ValueError(f"{name}, {kind.name} {shape} at {offset}: wanted whole blocks of {block}, and byte {end}")
        rows = *shape[:-1], shape[-1] // block * size  # in bytes
        end += math.prod(rows) + -math.prod(rows) % align
        found[name] = kind, offset, rows, shape
    start = at + -at % align
    if start + end >= len(data) + align:  # the last tensor may lack its padding
        raise ValueError(f"the file ends at {len(data)}, its tensors at {start + end}")

    def read(name):
        kind, offset, rows, shape = found[name]
        stored, whole = data[start + offset :][: math.prod(rows)], torch.empty(math.prod(shape[:-1]), shape[-1])
        for i in range(0, len(whole), 4096):  # by pieces: what is needed in between is several times as large
            blocks = numpy.array(stored[i * rows[-1] : (i + 4096) * rows[-1]]).reshape(-1, rows[-1])
            whole[i : i + 4096] = torch.from_numpy(gguf.dequantize(blocks, kind))
        return whole.view(shape)

    return entries, {name: torch.empty(shape, device="meta") for name, (*_, shape) in found.items()}, read


if __name__ == "__main__":
    torch.manual_seed(0)
    gguf, sizes = _library("gguf"), {"embedding_length": 64, "feed_forward_length": 96, "block_count": 1}
    shapes = {"token_embd": (65, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")} | {"blk.0.ffn_gate": (96, 64)}
    shapes |= {"blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96)}
    weights = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}  # rows in Hugging Face's order
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(path := Path(folder) / "model.gguf", "llama")
        for name, value in (sizes | {"context_length": 128, "attention.head_count": 2}).items():
            writer.add_uint32(f"llama.{name}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        for name, w in weights.items():
            if name.endswith(("attn_q", "attn_k")):  # halves -> neighbours, as llama.cpp's converter does
                w = w.unflatten(0, (2, 2, 16)).transpose(1, 2).flatten(0, 2)
            kind = gguf.GGMLQuantizationType.Q8_0 if w.dim() == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(f"{name}.weight", gguf.quantize(w.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config, tensors = read_llama(path)
        print(f"{path.stat().st_size} bytes hold {sum(t.numel() for t in tensors.values())} numbers; {config}")

    def score(W_q, W_k, distance):
        q, k = (W[:32] @ x for W, x in ((W_q, inputs[0]), (W_k, inputs[1])))  # (D,) each, of the first head
        angle, (a, b) = distance * 10000.0 ** -(torch.arange(16) / 16), q.chunk(2)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())) @ k

    inputs, ours = torch.randn(2, 64), [tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk"]
    forgotten = [W.unflatten(0, (2, 2, 16)).transpose(1, 2).flatten(0, 2) for W in ours]
    for distance in (0, 1, 2, 8):
        scores = [score(*pair, distance) for pair in ([weights[f"blk.0.attn_{n}"] for n in "qk"], ours, forgotten)]
        print("q . k at distance {}: {:6.3f}; read {:6.3f}; rows left as they are {:6.3f}".format(distance, *scores))
