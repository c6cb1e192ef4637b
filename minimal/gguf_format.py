# SPDX-License-Identifier: MIT
r"""GGUF: the one file that llama.cpp reads, weights, sizes and tokenizer together; written from a Hugging Face folder.

No paper; the format is that of G. Gerganov and others, ggml, docs/gguf.md (version 3), little-endian throughout:

    file      "GGUF", version u32, number of tensors u64, number of entries u64, entries, tensors, padding, data
    entry     key, kind u32, value; a string is its length u64 and UTF-8; an array its kind u32, length u64 and items
    tensor    name, number of dimensions u32, each of them u64 (the fastest first), type u32, offset u64 into the data

Where the two worlds differ, each a known trap:
- Rotary positions turn neighbours (x0 y0 x1 y1 ..) in GGUF, halves (x0 x1 .. y0 y1 ..) in Hugging Face: the rows of q
  and k are re-ordered. Llama 3's scaling becomes a tensor, rope_freqs: what each frequency is divided by.
- GPT-2's Conv1D keeps (in, out): transposed. A tied head is left out of the file.
- A pre-tokenizer is only a name, behind which llama.cpp has its own patterns. Where it has none the tokenizer is
  refused: a wrong one would cut words wrongly and say nothing. It normalizes nothing: Qwen 2's NFC is lost there.

Departures: Llama without biases and GPT-2 only, in float32, of which llama-quantize makes smaller types. A bit that
flips in a weight or within a token goes unseen: GGUF has no checksum.

    write_gguf("SmolLM2-135M", "smollm2.gguf")                           # then: llama-cli -m smollm2.gguf
    metadata, tensors = read_header("smollm2.gguf")                      # checked against the size of the file
    tree, chat_template, facts = tokenizer_of("smollm2.gguf")            # tree: as a parsed tokenizer.json

Letters: V vocabulary, C width, F the MLP's width, P context, L layers, H heads, Hkv key-value heads, D head size.
"""

import array
import contextlib
import importlib
import json
import math
import mmap
import os
import pathlib
import struct
import tempfile

import torch

FORMATS = ["B", "b", "H", "h", "I", "i", "f", "?", "string", "array", "Q", "q", "d"]  # of an entry's kinds 0 to 12
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type; USER: user-defined


def _cut(*patterns):
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not patterns}
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


WORDS, ONE_DIGIT = _cut()["pretokenizers"][0], {"type": "Digits", "individual_digits": True}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PRE = {  # llama.cpp's name: (pre_tokenizer, normalizer, ignore_merges) of the models that it is named after
    "gpt-2": (WORDS, None, False),
    "smollm": ({"type": "Sequence", "pretokenizers": [ONE_DIGIT, WORDS]}, None, False),
    "llama-bpe": (_cut(LLAMA3), None, True),
    "qwen2": (_cut(LLAMA3.replace("{1,3}", "")), {"type": "NFC"}, False),
    "default": (_cut(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), None, False),  # llama.cpp's guess
}


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"reads and writes GGUF files: pip install {name}") from None


def read_header(path):
    """The header of a .gguf: ({key: value}, {tensor: (type, shape with the fastest dimension last, offset, bytes)}).

    type is a name such as "Q8_0", offset counts from the start of the file; arrays become lists or array.array. Every
    count and length is held against the size of the file before anything is read, which bounds time and memory. Raises
    ValueError, one line with the file's name, for a damaged or other file.
    """
    gguf = _library("gguf")
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(data, gguf)
        except (ValueError, LookupError, TypeError, OverflowError) as error:  # an empty file, no UTF-8, ...
            raise ValueError(f"{path} is damaged or no GGUF file: {str(error):.200}") from None


def _header(data, gguf):
    at = 0

    def take(form):  # a tuple of values
        nonlocal at
        at += (size := struct.calcsize("<" + form))
        if at > len(data):
            raise ValueError(f"its header goes on past the end of the file at byte {len(data)}")
        return struct.unpack_from("<" + form, data, at - size)

    def value(kind):
        if (form := FORMATS[kind]) == "string":
            return take(f"{min(*take('Q'), len(data) + 1)}s")[0].decode()  # one past the end is as good as a thousand
        if form != "array":
            return take(form)[0]
        kind, count = take("IQ")
        if kind == 8:
            return [value(kind) for _ in range(count)]
        numbers = array.array(FORMATS[kind].replace("?", "B"))  # fails for an array of arrays
        numbers.frombytes(take(f"{min(count * numbers.itemsize, len(data) + 1)}s")[0])
        return numbers

    magic, version, tensor_count, entry_count = take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}, wanted b'GGUF' and 2 or 3, little-endian")
    metadata, tensors = {}, {}
    for _ in range(entry_count):
        key, (kind,) = value(8), take("I")
        metadata[key] = value(kind)
    for _ in range(tensor_count):
        name, (dimensions,) = value(8), take("I")
        if name in tensors or not 1 <= dimensions <= 4:
            raise ValueError(f"it has the tensor {name!r} twice, or with {dimensions} dimensions")
        tensors[name] = take(f"{dimensions}QIQ")
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1):
        raise ValueError(f"general.alignment must be a power of two, got {align!r}")
    start = at + -at % align
    for name, (*shape, kind, offset) in tensors.items():
        kind = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        size *= math.prod(shape) // block
        if shape[0] % block or offset % align or start + offset + size > len(data):
            raise ValueError(f"the tensor {name!r}, {kind.name} {shape}, does not fit at {offset} in {len(data)} bytes")
        tensors[name] = kind.name, tuple(shape[::-1]), start + offset, size
    return metadata, tensors


def tokenizer_of(path):
    """The tokenizer in a .gguf: (tree, chat_template or None, facts).

    tree: as a parsed tokenizer.json. Tokens of type CONTROL are special added tokens there, user-defined ones plain
    added tokens; normalizer and pre_tokenizer are those of the models that tokenizer.ggml.pre is named after. facts:
    eos_id, bos_id, pad_id (int or None), add_bos, add_eos (bool, or None where the file leaves it open).
    Raises ValueError, one line with the file's name, for a damaged file and, by name, for other tokenizers.
    """
    metadata, _ = read_header(path)
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if said.get("model") != "gpt2" or str(said.get("pre")) not in PRE:
        what = f"{said.get('model')!r} with the pre-tokenizer {said.get('pre')!r}"
        raise ValueError(f"{path} has the tokenizer {what:.200}, wanted 'gpt2' with {', '.join(PRE)}")
    cutter, normalizer, ignore_merges = PRE[said["pre"]]
    try:
        tokens, template = said["tokens"], metadata.get("tokenizer.chat_template")
        vocab, merges = {t: i for i, t in enumerate(tokens)}, [merge.split(" ") for merge in said["merges"]]
        facts = {f"{key[:3]}_id": said.get(f"{key}_token_id") for key in ("eos", "bos", "padding")}
        if not {*facts.values()} <= {None, *vocab.values()} or not isinstance(template, str | None):
            raise ValueError(f"one of {facts} is no token, or the chat template no text")
        facts |= {"add_bos": said.get("add_bos_token"), "add_eos": said.get("add_eos_token")}
        flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
        all_ = zip(vocab.items(), said["token_type"], strict=True)  # fails for a token that is there twice
        added = [{"id": i, "content": t, "special": k == CONTROL} | flags for (t, i), k in all_ if k in (CONTROL, USER)]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged tokenizer: {type(error).__name__} {str(error):.200}") from None
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    tree = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": cutter}
    tree |= {"decoder": WORDS, "model": model}
    return tree, template, facts


# Same as minimal/pretrained_bpe.py: steps
def steps(part, key):
    """A normalizer, pre_tokenizer or decoder of the file as a flat list: Sequences (their list is `key`) may nest."""
    part = part or {"type": "Sequence", key: []}
    return [s for inner in part[key] for s in steps(inner, key)] if part["type"] == "Sequence" else [part]


def pre_of(tree):
    """The name that llama.cpp has for how a tokenizer.json cuts words. Raises ValueError where it has none."""

    def essence(cutter, normalizer, ignore_merges):
        cuts = [{"use_regex": True} | step | {"trim_offsets": None} for step in steps(cutter, "pretokenizers")]
        return cuts, [form["type"] for form in steps(normalizer, "normalizers")], ignore_merges

    own = tree.get("pre_tokenizer"), tree.get("normalizer"), tree["model"].get("ignore_merges", False)
    for name in (name for name, parts in PRE.items() if essence(*parts) == essence(*own)):
        return name
    raise ValueError(f"llama.cpp has no name for {str(own):.300} (pre_tokenizer, normalizer, ignore_merges)")


def _json(file, needed=True):
    try:
        return json.loads(file.read_bytes()) if needed or file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None


def _tokenizer_entries(folder, config):
    tree, said = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json", needed=False)
    model, added = tree["model"], {token["content"]: token for token in tree.get("added_tokens") or []}
    ids = model["vocab"] | {content: token["id"] for content, token in added.items()}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise ValueError("tokenizer.json must hold a byte-level BPE with merges")
    if sorted(ids.values()) != [*range(len(ids))] or len(ids) > config["vocab_size"]:
        raise ValueError(f"tokenizer.json has {len(ids)} tokens, wanted ids from 0 on, at most vocab_size")
    if odd := [t for t in added if any(added[t][flag] for flag in ("lstrip", "rstrip", "single_word"))]:
        raise ValueError(f"the added token {odd[0]!r} has lstrip, rstrip or single_word, which llama.cpp lacks")
    tokens = sorted(ids, key=ids.get)
    kinds = [(CONTROL if added[t]["special"] else USER) if t in added else NORMAL for t in tokens]
    unused = [f"[PAD{i}]" for i in range(len(tokens), config["vocab_size"])]  # rows of the embedding that no token has

    def named(name):
        token, number = said.get(f"{name}_token"), config.get(f"{name}_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        number = number[0] if isinstance(number, list) else number  # where there are several the first is the usual one
        return ids.get(token, number if number in ids.values() else None)

    ends = [named("eos"), *map(ids.get, ("<|endoftext|>", "<|im_end|>", "</s>", "<|end_of_text|>"))]
    if (eos := next((i for i in ends if i is not None), None)) is None:  # llama.cpp would take token 11
        raise ValueError("nothing ends a text: config.json needs the eos_token_id of a token")
    around = [step for step in steps(tree.get("post_processor"), "processors") if step["type"] == "TemplateProcessing"]
    frame = ["Sequence", *(what for step in around for item in step["single"] for what in item), "Sequence"]
    entries = {"model": "gpt2", "pre": pre_of(tree), "tokens": tokens + unused}
    entries |= {"token_type": kinds + [UNUSED] * len(unused), "eos_token_id": eos, "padding_token_id": named("pad")}
    entries |= {"merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]}
    entries |= {"bos_token_id": eos if (bos := named("bos")) is None else bos}  # GPT-2 has one for both
    entries |= {"add_bos_token": "SpecialToken" in frame[:2], "add_eos_token": "SpecialToken" in frame[-2:]}
    file, template = folder / "chat_template.jinja", said.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    entries["chat_template"] = file.read_text(encoding="utf-8") if file.exists() else template
    return {f"tokenizer.{'' if 'chat' in key else 'ggml.'}{key}": value for key, value in entries.items()}


def _model_entries(config):
    """(entries, {further tensor: (shape, function that gives it)}) of a Llama or GPT-2."""
    wanted = {"model_type": ["llama", "gpt2"], "hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
              "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_weights": [True],
              "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False]}  # fmt: skip
    for name, values in wanted.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"config.json has {name} {config[name]!r}, wanted {' or '.join(map(repr, values))}")
    if (arch := config["model_type"]) == "gpt2":
        P, C, L, H = (config[name] for name in ("n_positions", "n_embd", "n_layer", "n_head"))
        F, D, Hkv, extra = config.get("n_inner") or 4 * C, C // H, H, {}
        entries = {"attention.layer_norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5))}
    else:
        P, C, F = (config[name] for name in ("max_position_embeddings", "hidden_size", "intermediate_size"))
        L, H = config["num_hidden_layers"], config["num_attention_heads"]
        D, Hkv, extra = config.get("head_dim") or C // H, config.get("num_key_value_heads") or H, {}
        rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})  # the older name, the newer
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 1e4)
        entries = {"attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]), "rope.freq_base": theta}
        entries |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), D)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            entries |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        elif kind == "llama3" and D < 1 << 16:
            frequency = theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)  # (D/2,)
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the shorter context
            slow, fast = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = ((turns - slow) / (fast - slow)).clamp(0, 1)  # 1: a fast pair, as it was; 0: a slow one, stretched
            extra["rope_freqs.weight"] = kept.shape, lambda: 1 / ((1 - kept) / rope["factor"] + kept)
        elif kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"config.json has rotary positions {rope}, wanted the type default, linear or llama3")
    if any(type(n) is not int or not 0 < n < 1 << 31 for n in (P, C, L, H, F, D, Hkv)) or L > 999:
        raise ValueError(f"config.json has sizes that are no positive integers, or {L} layers, more than 999")
    entries |= {"context_length": P, "embedding_length": C, "feed_forward_length": F, "block_count": L}
    entries |= {"attention.head_count": H, "attention.head_count_kv": Hkv, "vocab_size": config["vocab_size"]}
    return {f"{arch}.{key}": value for key, value in entries.items()}, extra


def _tensors(config, entries, parts, gguf):
    """{GGUF's name: (shape, function that reads it)} of open safetensors files."""
    arch, gpt2 = config["model_type"], config["model_type"] == "gpt2"
    L, H, Hkv = (entries[f"{arch}.{key}"] for key in ("block_count", "attention.head_count", "attention.head_count_kv"))
    heads = {} if gpt2 else {"attn_q": H, "attn_k": Hkv}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], L)
    tied, tensors = config.get("tie_word_embeddings", gpt2), {}
    for file, here in ((part, here) for part in parts for here in part.keys()):
        if here.endswith((".attn.bias", ".attn.masked_bias", ".inv_freq")) or (tied and here == "lm_head.weight"):
            continue  # masks and frequencies, which old files keep, and what the embedding is already
        there, shape = names.get_name(here, (".weight", ".bias")), file.get_slice(here).get_shape()
        if there is None or there in tensors:
            raise ValueError(f"the tensor {here!r} is none of such a model's, or there twice")
        conv1d, n = gpt2 and there.startswith("blk") and len(shape) == 2, heads.get(there.split(".")[-2])

        def read(file=file, here=here, conv1d=conv1d, n=n):
            w = file.get_tensor(here).float()
            w = w.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2) if n else w  # (H, 2, D/2, C) -> (H, D/2, 2, C)
            return w.t() if conv1d else w

        tensors[there] = shape[::-1] if conv1d else shape, read
    count, size = (
        (12 * L + 4 if gpt2 else 9 * L + 2) + (not tied),
        [config["vocab_size"], entries[f"{arch}.embedding_length"]],
    )
    if len(tensors) != count or tensors["token_embd.weight"][0] != size:
        raise ValueError(f"config.json tells of {count} tensors and an embedding of {size}, the weights are others")
    return tensors


def write_gguf(folder, path):
    """A Hugging Face folder (Llama or GPT-2, safetensors, byte-level BPE, perhaps a chat template) as one .gguf.

    In float32; one tensor is in memory at a time. Written beside and renamed. Raises ValueError, one line with the
    folder's name, for what is damaged and for what llama.cpp would not compute or cut the same.
    """
    gguf, safetensors = _library("gguf"), _library("safetensors")
    folder, path = pathlib.Path(folder), pathlib.Path(path)
    kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32", list: "ARRAY"}
    written = path.with_name(path.name + ".tmp")
    try:
        config = _json(folder / "config.json")
        entries, extra = _model_entries(config)
        parts = [safetensors.safe_open(file, "pt") for file in sorted(folder.glob("model*.safetensors"))]
        tensors = _tensors(config, entries, parts, gguf) | extra
        entries |= _tokenizer_entries(folder, config) | {"general.file_type": 0, "general.name": folder.resolve().name}
        with contextlib.closing(gguf.GGUFWriter(None, config["model_type"])) as writer:
            for key, value in ((key, value) for key, value in entries.items() if value is not None):
                writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
            for name, (shape, _) in tensors.items():
                writer.add_tensor_info(name, shape, None, 4 * math.prod(shape), gguf.GGMLQuantizationType.F32)
            writer.write_header_to_file(written)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, read in tensors.values():
                writer.write_tensor_data(read().float().contiguous().numpy())
        os.replace(written, path)
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, RuntimeError, TypeError, ValueError,
            struct.error, safetensors.SafetensorError) as error:  # fmt: skip
        what = f"{type(error).__name__} {str(error):.400}".replace("\n", " ")
        raise ValueError(f"{folder} cannot become a GGUF file: {what}") from None
    finally:
        written.unlink(missing_ok=True)


if __name__ == "__main__":
    vocab = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))] + ["Ġt", "he", "Ġthe", "</s>"]
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(vocab)}, "merges": ["Ġ t", "h e", "Ġt he"]}
    config = {"model_type": "gpt2", "vocab_size": 260, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    weights = {"wte.weight": (260, 32), "wpe.weight": (64, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    shapes = {"ln_1": (32,), "ln_2": (32,), "attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128)}
    for name, shape in (shapes | {"mlp.c_proj": (128, 32)}).items():
        weights |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[-1:]}
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = pathlib.Path(name), {name: torch.randn(shape) for name, shape in weights.items()}
        _library("safetensors.torch").save_file(numbers, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": WORDS}))
        write_gguf(folder, folder / "model.gguf")
        metadata, tensors = read_header(folder / "model.gguf")
        tree, _, facts = tokenizer_of(folder / "model.gguf")
    print(f"{len(metadata)} entries, {len(tensors)} tensors; q, k, v: {tensors['blk.0.attn_qkv.weight']}")
    print(f"cuts words as {pre_of(tree)}; {len(tree['model']['vocab'])} tokens, {facts}")
