"""tokenizer.json of the vocabulary inside a GGUF file (byte-level BPE, GGUF's `gpt2` model)."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from herd.checkpoint.gguf_file import GgufFile
from herd.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA4_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTING = ("llama4", "llama-bpe", "smollm", "gpt-2")
_ALIASES = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, as bytes by file name.

    CheckpointError for vocabularies that are not byte-level BPE, or whose splitting rule is unknown here.
    """
    path = file.path
    kind, split = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise CheckpointError(
            f"{path} has a {kind!r} vocabulary; only byte-level BPE ('gpt2') can be converted. "
            "Use the model's Hugging Face folder instead"
        )
    parts: list[list[Any]] = [file.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "merges", "token_type")]
    tokens, merges, types = parts
    if not all(isinstance(part, list) and part for part in parts) or len(tokens) != len(types):
        raise CheckpointError(f"{path} lacks the tokens, token types or merges of its vocabulary")
    core = _bpe(path, tokens, merges)
    rule = _ALIASES.get(split, split)
    if rule not in SPLITTING:
        raise CheckpointError(
            f"{path} splits text by the rule {split!r}, known are {', '.join(SPLITTING)}. "
            "Use the model's Hugging Face folder instead"
        )
    core.pre_tokenizer = splitting(rule)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _of_type(tokens, types, _CONTROL)])
    core.add_tokens([AddedToken(t, normalized=False) for t in _of_type(tokens, types, _USER_DEFINED)])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(file.get("tokenizer.ggml.add_bos_token", False)),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = file.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(i, int) and i < len(tokens):
            settings[f"{name}_token"] = tokens[i]
    if isinstance(template := file.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return {
        "tokenizer.json": core.to_str().encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _bpe(path: Path, tokens: list[str], merges: list[str]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{path} lists {len(tokens) - len(vocab)} tokens of its vocabulary twice")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"{path} has a merge that is not a pair: {merge!r}")
        pairs.append((left, right))
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the library raises bare Exception for merges outside the vocabulary
        raise CheckpointError(f"{path} has merges that do not fit its vocabulary: {error}") from error


def splitting(name: str) -> pre_tokenizers.PreTokenizer:
    """The rule that cuts text into words before merging, by llama.cpp's name for it: one of SPLITTING."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return words
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    split = pre_tokenizers.Split(Regex(_LLAMA4_SPLIT if name == "llama4" else _LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _of_type(tokens: list[str], types: list[int], wanted: int) -> list[str]:
    return [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
