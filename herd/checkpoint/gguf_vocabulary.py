"""The vocabulary of a tokenizer.json (byte-level BPE) as GGUF metadata."""

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from herd.checkpoint.gguf_tokenizer import SPLITTING, splitting
from herd.config import TextConfig
from herd.errors import CheckpointError

_EOT, _EOM = "<|eot|>", "<|eom|>"


def add_vocabulary(writer: gguf.GGUFWriter, path: Path, files: dict[str, bytes], cfg: TextConfig) -> None:
    """CheckpointError if there is no tokenizer.json, or llama.cpp has no name for how it cuts text."""
    if "tokenizer.json" not in files:
        raise CheckpointError(f"{path} has no tokenizer.json, which GGUF needs; put the model's beside its weights")
    core, settings = _parsed(path, files, "tokenizer.json"), _parsed(path, files, "tokenizer_config.json")
    try:
        model, added = core["model"], {token["content"]: token for token in core["added_tokens"]}
        vocab = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        special = {text for text, token in added.items() if token["special"]}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"tokenizer.json of {path} is no byte-level BPE: {error!r}") from error
    tokens = {i: text for text, i in vocab.items()}
    if outside := sorted(i for i in tokens if not 0 <= i < cfg.vocab_size):
        raise CheckpointError(f"tokenizer.json of {path} has token {outside[0]}, the model has {cfg.vocab_size}")
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(path, files["tokenizer.json"]))
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(cfg.vocab_size)])
    writer.add_token_types([_kind(tokens.get(i), special, added.keys(), kinds) for i in range(cfg.vocab_size)])
    writer.add_token_merges(merges)
    _add_ids(writer, vocab, cfg)
    if isinstance(add_bos := settings.get("add_bos_token"), bool):
        writer.add_add_bos_token(add_bos)
    template = files.get("chat_template.jinja", b"").decode("utf-8", "replace") or settings.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _parsed(path: Path, files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} of {path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} of {path} must hold a JSON object, not {type(value).__name__}")
    return value


def _kind(token: str | None, special: set[str], added: Any, kinds: type[gguf.TokenType]) -> gguf.TokenType:
    if token is None:
        return kinds.UNUSED
    if token in special:
        return kinds.CONTROL
    return kinds.USER_DEFINED if token in added else kinds.NORMAL


def _add_ids(writer: gguf.GGUFWriter, vocab: dict[str, int], cfg: TextConfig) -> None:
    """The special ids; of several that end a text, llama.cpp has a key each for three."""
    if cfg.bos_token_id is not None:
        writer.add_bos_token_id(cfg.bos_token_id)
    if cfg.pad_token_id is not None:
        writer.add_pad_token_id(cfg.pad_token_id)
    named = {vocab.get(_EOT): writer.add_eot_token_id, vocab.get(_EOM): writer.add_eom_token_id}
    rest = [i for i in cfg.eos_token_id if i not in named]
    for i in cfg.eos_token_id:
        if i in named:
            named[i](i)
    if rest:
        writer.add_eos_token_id(rest[0])


def _split_name(path: Path, tokenizer: bytes) -> str:
    """llama.cpp's name for the rule by which a tokenizer cuts text into words before merging."""
    try:
        found = Tokenizer.from_str(tokenizer.decode()).pre_tokenizer
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise CheckpointError(f"tokenizer.json of {path} is not a readable tokenizer: {error}") from error
    for name in SPLITTING:
        if found is not None and _rule(found) == _rule(splitting(name)):
            return name
    known = ", ".join(SPLITTING)
    raise CheckpointError(f"tokenizer.json of {path} splits text by a rule without a name in llama.cpp; it has {known}")


def _rule(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """What a pre-tokenizer does, without what only concerns offsets."""
    state = json.loads(pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
