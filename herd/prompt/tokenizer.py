"""Tokenizer of a model folder: `tokenizer.json`, or Meta's `tokenizer.model`, and what its JSON files say of special
ids and the chat template.

User text can never become a special token: `encode` treats the text of special tokens as plain text, and `chat`
encodes only those special tokens that the chat format itself wrote.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers

from herd.errors import CheckpointError, PromptError
from herd.prompt import chat, llama4
from herd.prompt.chat import Message
from herd.prompt.special import Special
from herd.prompt.template import ChatTemplate

_LONGEST = 32  # bytes of the longest token that `prefixes` looks for


class Tokenizer:
    """Encoder and decoder of one vocabulary. Safe to share between threads after `load`."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        template: str | None = None,
        named: Mapping[str, str] | None = None,
        pieces: Callable[[str], Iterable[str]] | None = None,
    ):
        """template: Jinja source; named: its variables `bos_token`, `eos_token`; pieces: cuts a text into parts that
        are encoded one by one.

        `core` is changed: special tokens in text are no longer parsed.
        """
        core.no_padding()
        core.no_truncation()
        core.encode_special_tokens = True
        self._core = core
        self._cut = pieces
        self._special = {str(t.content): i for i, t in core.get_added_tokens_decoder().items() if t.special}
        self._special_ids = frozenset(self._special.values())
        self._check_specials_stay_text()
        self.bos_id = self._special.get((named or {}).get("bos_token", ""))
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id
        self._template = ChatTemplate(template, self._special, named or {}) if template is not None else None

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face or Meta model folder. CheckpointError if it is missing or malformed."""
        folder = Path(folder)
        hf, meta = folder / "tokenizer.json", folder / "tokenizer.model"
        settings = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        config = _read_json(folder / "config.json")
        pieces = None
        if hf.is_file():
            core = _read_core(hf)
        elif meta.is_file():
            core, pieces = llama4.read(meta, _BYTE_CHARS), llama4.pieces
            settings = {"bos_token": llama4.BEGIN, "eos_token": llama4.END, "pad_token": llama4.PAD, **settings}
        else:
            raise CheckpointError(f"{folder} has no tokenizer.json, nor Meta's tokenizer.model")
        eos = _first(generation.get("eos_token_id"), config.get("eos_token_id"), _id(core, settings.get("eos_token")))
        pad = _first(generation.get("pad_token_id"), config.get("pad_token_id"), _id(core, settings.get("pad_token")))
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        # Some folders of Llama 4 name only the end of a text, and a turn would not end.
        stops = [core.token_to_id(token) for token in llama4.STOPS]
        if None not in stops:
            eos_ids = [*eos_ids, *(i for i in stops if i not in eos_ids)]
        named = {name: text for name in ("bos_token", "eos_token") if (text := _text(settings.get(name))) is not None}
        template = _template_source(folder, settings)
        return cls(core, eos_ids=eos_ids, pad_id=pad, template=template, named=named, pieces=pieces)

    def to_json(self) -> bytes:
        """The vocabulary and its rules, as a tokenizer.json has them."""
        return str(self._core.to_str()).encode()

    def __len__(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added, and special tokens in `text` are encoded as ordinary characters."""
        return list(chain.from_iterable(self._core.encode(p, add_special_tokens=False).ids for p in self._pieces(text)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        pieces = [self._pieces(text) for text in texts]
        encodings = iter(self._core.encode_batch_fast([p for parts in pieces for p in parts], add_special_tokens=False))
        return [list(chain.from_iterable(next(encodings).ids for _ in parts)) for parts in pieces]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the half-open range of characters of `text` it covers.

        A character that was split into several tokens is covered by each of them.
        """
        ids, offsets, at = list[int](), list[tuple[int, int]](), 0
        for piece in self._pieces(text):
            encoding = self._core.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(at + start, at + end) for start, end in encoding.offsets] if at else encoding.offsets
            at += len(piece)
        return ids, offsets

    def _pieces(self, text: str) -> list[str]:
        return [_valid(text)] if self._cut is None else list(self._cut(_valid(text)))

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. PromptError for an id outside the vocabulary."""
        size = len(self)
        for i in ids:
            if not 0 <= i < size:
                raise PromptError(f"token id {i} is outside the vocabulary of {size} tokens")
        return str(self._core.decode(list(ids), skip_special_tokens=not keep_special))

    def stream(self, *, keep_special: bool = False) -> "StreamDecoder":
        """A decoder that takes one id at a time and never emits half a character."""
        return StreamDecoder(self, keep_special)

    @property
    def byte_level(self) -> bool:
        """Whether its tokens are strings of bytes, as GPT-2's and Llama 4's are: `raw` and `prefixes` need that."""
        return all(self._core.token_to_id(_BYTE_CHARS[byte]) is not None for byte in b" \n" + bytes(range(0x21, 0x7F)))

    def raw(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, special tokens left out. Needs `byte_level`."""
        return bytes(
            _BYTES[char] for i in ids if i not in self._special_ids for char in self._core.id_to_token(i) or ""
        )

    def prefixes(self, data: bytes) -> list[int]:
        """The tokens of up to 32 bytes that these bytes begin with, the shortest first. Needs `byte_level`."""
        text = "".join(_BYTE_CHARS[byte] for byte in data[:_LONGEST])
        found = (self._core.token_to_id(text[:length]) for length in range(1, len(text) + 1))
        return [i for i in found if i is not None and i not in self._special_ids]

    def token_id(self, token: str) -> int:
        """Id of a token of the vocabulary, such as `<|im_end|>`. PromptError if there is none."""
        i = self._core.token_to_id(token)
        if i is None:
            raise PromptError(f"the vocabulary has no token {token!r}")
        return int(i)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of every special token."""
        return dict(self._special)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Ids of a conversation: by the chat template of the model, or without one in Llama 4's format if it has its
        special tokens.

        messages: `{"role": ..., "content": ...}` in order, with `tool_calls` of assistants (`herd.prompt.tools`).
        Content is a text, or a list of parts: `{"type": "text", "text": ...}`, and `{"type": "image"}`, which becomes
        the one token `<|image|>` that `herd.prompt.images.expand` then replaces. variables: those of the template, such
        as `tools=`; of Llama 4's format `tools=` and `tool_form=`.
        PromptError if the model has no chat format, or the conversation does not fit it.
        """
        if wrong := [message for message in messages if not isinstance(message, Mapping)]:
            raise PromptError(f"a message is an object with role and content; got {type(wrong[0]).__name__}")
        if self._template is not None:
            pieces = self._template.pieces(chat.plain_calls(messages), add_generation_prompt, variables)
        elif chat.is_known(self._special):
            pieces = chat.pieces(messages, add_generation_prompt, **variables)
        else:
            raise PromptError("this model has no chat template; encode the text instead, or add chat_template.jinja")
        ids: list[int] = []
        for piece in pieces:
            ids += [self.token_id(piece)] if isinstance(piece, Special) else self.encode(piece)
        return ids

    def _check_specials_stay_text(self) -> None:
        """CheckpointError if plain text can become a special token (a vocabulary that lists it as a word)."""
        special_ids = set(self._special.values())
        for (text, _), ids in zip(self._special.items(), self.encode_batch(list(self._special)), strict=True):
            if special_ids & set(ids):
                raise CheckpointError(f"tokenizer.json turns plain text into the special token {text!r}")


def _byte_chars() -> str:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019, GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    chars = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return "".join(chars[byte] for byte in range(256))


_BYTE_CHARS = _byte_chars()
_BYTES = {char: byte for byte, char in enumerate(_BYTE_CHARS)}


class StreamDecoder:
    """Decodes ids one by one; the concatenated output equals `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, keep_special: bool = False):
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._ids: list[int] = []  # ids since the start of the last emitted piece
        self._done = 0  # how many of them have been emitted

    def push(self, token: int) -> str:
        """Text that became complete with this id; "" while a character is still incomplete."""
        self._ids.append(token)
        text, emitted = self._text(self._ids), self._text(self._ids[: self._done])
        if text.endswith("�"):  # maybe the start of a longer character
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return text[len(emitted) :]

    def finish(self) -> str:
        """What was held back at the end of the stream."""
        rest = self._text(self._ids)[len(self._text(self._ids[: self._done])) :]
        self._ids, self._done = [], 0
        return rest

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, keep_special=self._keep_special)


def _valid(text: str) -> str:
    """The text, with lone surrogates (undecodable file names and the like) replaced: they have no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def _read_core(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file, {} if there is no such file. CheckpointError if it is malformed."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _id(core: tokenizers.Tokenizer, token: Any) -> int | None:
    text = _text(token)
    return core.token_to_id(text) if text is not None else None


def _text(token: Any) -> str | None:
    """A token given as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json (a text, or a list with one named default)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    return next(_templates(settings.get("chat_template")), None)


def _templates(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (t["template"] for t in value if isinstance(t, dict) and t.get("name") == "default")
