"""Llama 4's vocabulary from Meta's `tokenizer.model`: 200,000 strings of bytes in tiktoken's format.

The file has no special tokens, and Meta's code does more than tiktoken: it cuts long texts. Both are here, so that ids
are those of Meta's code.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from herd.errors import CheckpointError

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>"
HEADER_START, HEADER_END = "<|header_start|>", "<|header_end|>"
END_OF_MESSAGE, END_OF_TURN = "<|eom|>", "<|eot|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
STOPS = (END, END_OF_MESSAGE, END_OF_TURN)  # any of them ends what a model says

_TOKENS, _SPECIAL = 200_000, 2_048
_PIECE, _RUN = 400_000, 25_000  # Meta's limits, in characters
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_RUN + 1},}}+|(?<!\s)\s{{{_RUN + 1},}}+")

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _SHORT = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS = "|".join(
    [
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}",
        rf"{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _special_tokens() -> tuple[str, ...]:
    """All special tokens, in the order of their ids."""
    first = """begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step"""
    vision = """image_start image_end vision_reserved_special_token_0 vision_reserved_special_token_1 tile_x_separator
    tile_y_separator vision_reserved_special_token_2 vision_reserved_special_token_3 vision_reserved_special_token_4
    vision_reserved_special_token_5 image vision_reserved_special_token_6 patch"""
    names = [
        *first.split(),
        *_reserved("text_post_train_", 0, 6),
        *("python_start", "python_end", "finetune_right_pad"),
        *_reserved("text_post_train_", 8, 69),
        *vision.split(),
        *_reserved("vision_", 7, 1048),
        *_reserved("reasoning_", 0, 8),
        *("reasoning_thinking_start", "reasoning_thinking_end"),
    ]
    names += _reserved("", 0, _SPECIAL - len(names))
    return tuple(f"<|{name}|>" for name in names)


def _reserved(kind: str, start: int, end: int) -> list[str]:
    return [f"{kind}reserved_special_token_{i}" for i in range(start, end)]


SPECIAL_TOKENS = _special_tokens()


def read(path: Path, byte_chars: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.model`. CheckpointError if that is not Llama 4's format or size.

    byte_chars: the character that stands for each byte.
    """
    shown = dict(enumerate(byte_chars))
    names = [token.decode("latin-1").translate(shown) for token in _tokens(path)]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names) or not vocab.keys() >= set(byte_chars):
        raise CheckpointError(f"{path} lists a token twice, or not every single byte; it is damaged, fetch it again")
    # tiktoken joins any two neighbours whose join is a token, that of the lowest id first. Until both halves of a token
    # stand side by side, only its own bytes were joined, in the order in which they would be without their neighbours:
    # so one split of each token ever occurs, and the order of the splits among themselves does not matter.
    merges = [
        (left, right)
        for name in names
        for cut in range(1, len(name))
        if (left := name[:cut]) in vocab and (right := name[cut:]) in vocab
    ]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return core


def _tokens(path: Path) -> list[bytes]:
    """Tokens in the order of their ids, which each line states after its token."""
    tokens = list[bytes]()
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, i = line.split(b" ")
                if int(i) != len(tokens):
                    raise ValueError(f"the line of token {len(tokens)} says {int(i)}")
                tokens.append(base64.b64decode(token, validate=True))
    except (OSError, ValueError) as error:
        reason = f"{path} is not in tiktoken's format ({error})"
        raise CheckpointError(f"{reason}; Llama 4's tokenizer.model and any tokenizer.json can be read") from error
    if len(tokens) != _TOKENS:
        raise CheckpointError(f"{path} has {len(tokens):,} tokens, Llama 4's has {_TOKENS:,}; use a tokenizer.json")
    return tokens


def pieces(text: str) -> Iterator[str]:
    """The parts of a text that Meta's code encodes one by one: it cuts long texts, and long runs without a blank or of
    blanks only."""
    if len(text) <= _RUN:
        yield text
        return
    for at in range(0, len(text), _PIECE):
        piece, start = text[at : at + _PIECE], 0
        for run in _LONG_RUN.finditer(piece):
            for cut in range(run.start() + _RUN, run.end(), _RUN):
                yield piece[start:cut]
                start = cut
        yield piece[start:]
