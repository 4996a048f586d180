"""Ids of Llama 4's vocabulary are those of Meta's code and of transformers' conversion, for any text."""

import base64
import json
import shutil
import sysconfig
from itertools import chain, pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import CheckpointError, PromptError
from herd.prompt import Tokenizer, llama4
from tests.prompt.meta import FOLDER, converted, meta_ids, ours, theirs

VECTORS = [
    ("Hello, world!", [19873, 24, 3817, 13]),
    ("user", [1556]),
    ("system", [15651]),
    ("assistant", [140680]),
    ("ipython", [607, 6934]),
    ("\n\n", [368]),
    ("don't", [127161]),
    (" =", [319]),
    ("12345", [7235, 2127]),
    ("Roses are red,", [62, 19441, 583, 4242, 24]),
    ("  leading", [220, 10855]),
    ("日本語のテスト", [21764, 16728, 1169, 107459]),
    ("a/b\r\n//x", [77, 4790, 13266, 405, 100]),
]
# Each where some splitting rule decides: case, marks, digits, blanks, contractions in odd cases, long s, joiners.
ODD = st.sampled_from(
    """'s 'S 'ſ 'LL ’s ſ K ǅ ʰ \u0301 \u200d \ufe0f 🦙 👩\u200d👩\u200d👧 1 ½ ٣ ² Ⅷ \u180e \0 / // ... \\ a B aB ß ñ Ж
    好 の 한국 ไทย हिन्दी עברית العربية <|eot|> <| |>""".split()  # noqa: SIM905
) | st.sampled_from(["  ", "\r\n", *" \t\n\u00a0\u2028\x1c\x85\u3000"])
TEXTS = st.text(max_size=60) | st.lists(ODD | st.text(max_size=2), max_size=40).map("".join)


@pytest.mark.parametrize(("text", "ids"), VECTORS)
def test_vectors(text, ids):
    assert ours().encode(text) == ids == meta_ids(text)


def test_special_tokens():
    assert ours().special_tokens == theirs().special_tokens
    assert len(ours()) == theirs().n_words == 202_048
    assert (ours().bos_id, ours().pad_id) == (theirs().bos_id, theirs().pad_id)
    assert sorted(ours().eos_ids) == sorted(theirs().stop_tokens)


@given(TEXTS)
def test_ids_equal_meta(text):
    ids = ours().encode(text)
    assert ids == meta_ids(text)
    assert ours().encode_batch([text, ""]) == [ids, []]
    assert ours().decode(ids) == text
    assert max(ids, default=0) < 200_000, "no text becomes a special token"


@given(st.lists(st.integers(0, 202_047), max_size=12), st.data())
def test_decoding_equals_meta(ids, data):
    assert ours().decode(ids, keep_special=True) == theirs().decode(ids)
    plain = [i for i in ids if i < 200_000]
    assert ours().raw(ids) == theirs().model.decode_bytes(plain)
    stream = ours().stream(keep_special=True)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == theirs().decode(ids)


@given(TEXTS)
def test_streams_never_split_a_character(text):
    stream = ours().stream()
    pieces = [stream.push(i) for i in ours().encode(text)]
    rest = stream.finish()
    assert "".join([*pieces, rest]) == text
    assert not rest or text.endswith("\ufffd"), "only what looks like half a character waits for the end"


def test_tokens_and_characters():
    """The texts of tokens, one by one, and each character of Unicode between letters, digits and blanks."""
    tokens = [data.decode(errors="replace") for data in theirs().model.token_byte_values()]
    chars = [f"{chr(i)}\na{chr(i)}B 1{chr(i)} {chr(i)}\n" for i in range(0x32000) if not 0xD800 <= i < 0xE000]
    texts = [*tokens[::10], *("".join(chars[at : at + 256]) for at in range(0, len(chars), 256))]
    assert ours().encode_batch(texts) == theirs().model.encode_ordinary_batch(texts, num_threads=2)


def test_a_corpus():
    """Whole sources of installed packages: some of each kind, and of packages that speak of languages, all."""
    site = Path(sysconfig.get_paths()["purelib"])
    files = [sorted(site.rglob(kind))[::150] for kind in ("*.py", "*.md", "*.json", "*.h", "*.txt", "*.js")]
    files += [sorted((site / name).rglob("*.py")) for name in ("rich", "idna", "pip/_vendor/chardet", "sympy/printing")]
    texts = [path.read_text("utf-8", "replace") for path in chain(*files) if path.stat().st_size < 1_000_000]
    assert sum(map(len, texts)) > 2_000_000
    assert ours().encode_batch(texts) == [meta_ids(text) for text in texts]


LONG = [
    "a" * 25_000,
    "a" * 25_001,
    "ab" * 40_000 + " " * 60_000 + "c" * 25_001,
    " " * 24_999 + "x" * 50_001,
    "\x1c" * 30_000,
    "🦙" * 30_000,
    "word, " * 80_000,
    "x" * 399_999 + "'s 12345",
    "1" * 400_001 + "\n" * 26_000,
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_texts_are_cut_as_meta_does(text):
    ids, offsets = ours().encode_with_offsets(text)
    assert ids == meta_ids(text) == ours().encode(text) == ours().encode_batch([text])[0]
    assert offsets[0][0] == 0
    assert offsets[-1][1] == len(text)
    assert all(end >= start >= before[0] for before, (start, end) in pairwise(offsets))


@given(st.lists(st.tuples(st.sampled_from([" ", "a", "\n"]), st.integers(1, 60_000)), max_size=12))
def test_pieces_equal_meta(runs):
    text = "".join(char * times for char, times in runs)
    split = theirs()._split_whitespaces_or_nonwhitespaces
    wanted = [p for i in range(0, max(len(text), 1), 400_000) for p in split(text[i : i + 400_000], 25_000)]
    assert list(llama4.pieces(text)) == wanted


def test_ids_equal_transformers(tmp_path):
    converted().save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_tokens == ours().special_tokens
    assert sorted(loaded.eos_ids) == sorted(ours().eos_ids), "they end turns, though no file says so"
    messages = [{"role": "user", "content": "Hi <|eot|>"}]
    assert loaded.chat(messages) == ours().chat(messages)

    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.encode_special_tokens = True  # transformers' split_special_tokens

    @given(TEXTS)
    def same(text):
        assert loaded.encode(text) == ours().encode(text) == plain.encode(text, add_special_tokens=False).ids

    same()
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]
    texts = [path.read_text("utf-8", "replace") for path in files]
    assert loaded.encode_batch(texts) == ours().encode_batch(texts)


def test_files_beside_metas_file_are_obeyed(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 200001, "pad_token_id": 200002}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_ids, loaded.pad_id, loaded.bos_id) == ([200001, 200007, 200008], 200002, 200000)
    assert loaded.chat([{"role": "user", "content": "user"}]) == [200000, 1556]


def lines(n: int) -> list[bytes]:
    return [base64.b64encode(bytes([i])) + b" %d" % i for i in range(n)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x0b\x08\x01 sentencepiece", "not in tiktoken's format"),
        (b"YQ== 0\nnot base64 1\n", "not in tiktoken's format"),
        (b"YQ== 0\nYQ 1\n", "not in tiktoken's format"),
        (b"YQ== 0\nYg== 2\n", "line of token 1 says 2"),
        (b"YQ== x\n", "not in tiktoken's format"),
        (b"", "has 0 tokens, Llama 4's has 200,000"),
        (b"\n".join(lines(256)), "has 256 tokens"),
        (b"\n".join(b"YQ== %d" % i for i in range(200_000)), "lists a token twice"),
    ],
)
def test_malformed_files(tmp_path, data, message):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_no_chat_without_its_tokens():
    with pytest.raises(PromptError, match="no chat template"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE())).chat([])
