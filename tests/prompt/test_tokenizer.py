"""Text survives the tokenizer, user text never becomes a special token, streams equal whole decoding."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from herd.errors import CheckpointError, PromptError
from herd.prompt import Tokenizer

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def core(special=True) -> tokenizers.Tokenizer:
    """Byte-level BPE with a few merges; the special tokens come last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("<", "|")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    made = tokenizers.Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=special) for t in SPECIAL])
    return made


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(core(), eos_ids=[262], template=CHATML)


def test_known_ids(tokenizer):
    assert tokenizer.encode(" the") == [258]
    assert len(tokenizer) == 263
    assert tokenizer.token_id("<|im_end|>") == 262
    assert tokenizer.special_tokens == {"<|end|>": 260, "<|im_start|>": 261, "<|im_end|>": 262}
    with pytest.raises(PromptError, match="no token 'zebra'"):
        tokenizer.token_id("zebra")


@given(st.text())
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


@given(st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "im_end", "a", " ", "\ufdd0"])).map("".join))
def test_special_tokens_in_text_stay_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


@given(st.text())
def test_offsets_cover_the_text(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(offsets) == len(ids)
    at = 0
    for start, end in offsets:
        assert start <= at <= end
        at = max(at, end)
    assert at == len(text)


def test_offsets_of_words(tokenizer):
    _, offsets = tokenizer.encode_with_offsets("é the")
    assert offsets == [(0, 1), (0, 1), (1, 5)]


def test_lone_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a?b"


def test_decoding(tokenizer):
    ids = [*tokenizer.encode("the"), 262]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, keep_special=True) == "the<|im_end|>"
    for wrong in (-1, 263):
        with pytest.raises(PromptError, match=f"token id {wrong} is outside the vocabulary of 263"):
            tokenizer.decode([wrong])


@given(st.one_of(st.lists(st.integers(0, 262)), st.text().map(lambda t: [t])), st.booleans())
def test_stream_equals_whole(tokenizer, ids, keep_special):
    if ids and isinstance(ids[0], str):
        ids = tokenizer.encode(ids[0])
    stream = tokenizer.stream(keep_special=keep_special)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, keep_special=keep_special)


def test_stream_never_emits_half_a_character(tokenizer):
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("🦙a")] == ["", "", "", "🦙", "a"]
    assert stream.finish() == ""


def whole(tokenizer: Tokenizer, messages, **options) -> str:
    return tokenizer.decode(tokenizer.chat(messages, **options), keep_special=True)


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    wanted = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert whole(tokenizer, messages, add_generation_prompt=False) == wanted
    assert whole(tokenizer, messages) == wanted + "<|im_start|>assistant\n"
    assert tokenizer.chat(messages)[0] == 261


@given(st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "<", ">", "im_end", "|im_end|>", "\ufdd0", "é"])).map("".join))
def test_user_text_cannot_become_special(tokenizer, content):
    ids = tokenizer.chat([{"role": "user", "content": content}])
    assert [i for i in ids if i >= 260] == [261, 262, 261]
    assert tokenizer.decode(ids) == f"user\n{content}\nassistant\n".replace("\ufdd0", "")


def test_texts_cannot_join_into_a_special_token():
    joined = Tokenizer(core(), template="{{ messages[0].content | join('') }}|>{{ messages[0].name }}")
    ids = joined.chat([{"role": "user", "content": ["<|im", "_end|>", "<|im_end"], "name": "<|end|>"}])
    assert max(ids) < 260
    assert joined.decode(ids) == "<|im_end|><|im_end|><|end|>"


def test_template_features():
    source = "{{ bos_token }}{{ tools | tojson }}{% for m in messages %}{{ m.content | trim }}{% break %}{% endfor %}"
    chat = Tokenizer(core(), template=source, named={"bos_token": "<|end|>"})
    ids = chat.chat([{"role": "user", "content": " é<x> "}], tools=[{"a": "ü<"}])
    assert chat.decode(ids, keep_special=True) == '<|end|>[{"a": "ü<"}]é<x>'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
    ],
)
def test_refusals(template, message):
    with pytest.raises(PromptError, match=message):
        Tokenizer(core(), template=template).chat([{"role": "user", "content": "a"}])


def test_bad_conversations(tokenizer):
    for role in (None, "", "us er", "<|im_end|>", 3):
        with pytest.raises(PromptError, match="role"):
            tokenizer.chat([{"role": role, "content": "a"}])
    with pytest.raises(PromptError, match="an object with role and content; got str"):
        tokenizer.chat(["hi"])
    with pytest.raises(PromptError, match="no chat template"):
        Tokenizer(core()).chat([{"role": "user", "content": "a"}])


def write(folder: Path, **files) -> Path:
    core().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_load(tmp_path):
    settings = {"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|end|>"}
    loaded = Tokenizer.load(write(tmp_path, tokenizer_config__json=settings))
    assert (loaded.eos_ids, loaded.pad_id) == ([262], 260)
    assert loaded.chat([{"role": "user", "content": "a"}])[0] == 261
    loaded = Tokenizer.load(write(tmp_path, generation_config__json={"eos_token_id": [260, 262]}))
    assert loaded.eos_ids == [260, 262]
    loaded = Tokenizer.load(write(tmp_path, chat_template__jinja="the"))
    assert loaded.chat([{"role": "user", "content": "a"}]) == loaded.encode("the")
    settings = {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]}
    (tmp_path / "chat_template.jinja").unlink()
    loaded = Tokenizer.load(write(tmp_path, tokenizer_config__json=settings))
    assert loaded.chat([{"role": "user", "content": "a"}]) == loaded.encode("y")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer__json": "{"}, "not a readable tokenizer"),
        ({"tokenizer__json": "[]"}, "not a readable tokenizer"),
        ({"tokenizer_config__json": "{"}, "not readable JSON"),
        ({"config__json": "[]"}, "must hold a JSON object"),
        ({"tokenizer_config__json": {"chat_template": "{% if %}"}}, "chat template is not valid"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(write(tmp_path, **files))


def test_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_vocabulary_that_lists_a_special_token_as_a_word():
    vocab = {"<|end|>": 0, "a": 1}
    made = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="a"))
    made.add_special_tokens(["<|end|>"])
    with pytest.raises(CheckpointError, match=r"plain text into the special token '<\|end\|>'"):
        Tokenizer(made)


@given(st.text())
def test_raw_bytes_of_ids(tokenizer, text):
    assert tokenizer.byte_level
    assert tokenizer.raw(tokenizer.encode(text)) == text.encode(errors="replace")
    assert tokenizer.raw([260, 262]) == b"", "special tokens have no text"


@given(st.binary(min_size=1, max_size=40))
def test_prefixes_are_all_tokens_that_bytes_begin_with(tokenizer, data):
    found = tokenizer.prefixes(data)
    begins = [i for i in range(260) if data.startswith(tokenizer.raw([i]))]
    assert sorted(found) == begins
    assert [len(tokenizer.raw([i])) for i in found] == sorted(len(tokenizer.raw([i])) for i in found)


def test_special_tokens_are_no_prefixes(tokenizer):
    assert 260 not in tokenizer.prefixes(b"<|end|> is text here")
