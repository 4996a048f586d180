"""Answers that keep to a JSON schema: the guide of a request leaves only tokens that lead to one (llguidance).

Schemas come from anyone. What compiling one and each step may take is bounded (`_LIMITS`), and a schema that needs more
is refused, or ends its own answer.

Shape suffix: V vocabulary.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from herd.errors import PromptError
from herd.model import KVRow
from herd.prompt import Tokenizer

Schema = Mapping[str, Any] | bool
MAX_SCHEMA_BYTES = 1 << 17
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,  # 10 ms
    step_lexer_fuel=100_000,  # 7 ms
    step_max_items=20_000,
    max_lexer_states=20_000,  # 2 kB each
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Between values there may be some white space, but not so much that an answer is nothing else.
_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{1,16}"}


class Grammars:
    """Makes guides for a model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._vocabulary: LLTokenizer | None = None  # takes a second, so it is made when it is wanted

    def matcher(self, schema: Schema) -> LLMatcher:
        """Of a JSON schema, to be copied for each answer. PromptError for one that is none, or too large."""
        if not self._tokenizer.byte_level:
            raise PromptError("answers that keep to JSON need a byte-level vocabulary, which this model has not")
        said = json.dumps(schema)
        if len(said) > MAX_SCHEMA_BYTES:
            raise PromptError(f"the schema has {len(said):,} bytes; it may have {MAX_SCHEMA_BYTES:,}")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
        try:
            grammar = LLMatcher.grammar_from_json_schema(said, overrides=_OPTIONS)
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=_LIMITS)
        except ValueError as error:
            raise PromptError(f"the schema cannot be used: {_line(error)}") from error
        if matcher.is_error():
            raise PromptError(f"the schema cannot be used: {_line(matcher.get_error())}")
        return matcher


class Guided:
    """Guides one answer (`herd.engine.Request`): adds biases, and leaves only what the matcher allows.

    failed: why no answer keeps to the schema, or finding one takes too much; None if neither was seen.
    """

    def __init__(
        self, ends: Sequence[int], bias: Mapping[int, float], matcher: LLMatcher | None, schema: Schema | None = None
    ) -> None:
        """schema: that the matcher is of, for other processes to make the same guide."""
        self.bias, self.schema = bias, schema
        self.failed: str | None = None
        self._ends, self._taken = list(ends), 0
        self._matcher = None if matcher is None else matcher.deep_copy()
        self._ids, self._values = torch.tensor(list(bias), dtype=torch.long), torch.tensor(list(bias.values()))

    def __call__(self, ids: Sequence[int], logits_V: Tensor, row: KVRow) -> Tensor:
        """Logits of the next token after the answer's ids."""
        if len(self._ids):
            logits_V = logits_V.index_add(0, self._ids, self._values.to(logits_V))
        if self._matcher is None:
            return logits_V
        self._matcher.consume_tokens(list(ids[self._taken :]))
        self._taken = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.failed = f"the schema allows no answer, or is too complex: {_line(self._matcher.get_error())}"
            # One answer must not end the step of all others. Its client is told at the end, which comes now.
            forced_V = torch.full_like(logits_V, -math.inf)
            forced_V[self._ends] = 0.0
            return forced_V
        # What is behind the last bit is not allowed.
        allowed_V = torch.from_numpy(np.unpackbits(bits, count=len(logits_V), bitorder="little")).view(torch.bool)
        return torch.where(allowed_V.to(logits_V.device), logits_V, -math.inf)


def call_schema(tools: Sequence[tuple[str, Mapping[str, Any] | None]]) -> dict[str, Any]:
    """The schema of a call of one of these tools (name and parameters), as JSON calls are written."""
    parameters = [_moved(schema or {"type": "object"}, f"#/$defs/{at}") for at, (_, schema) in enumerate(tools)]
    return {
        "$defs": {str(at): schema for at, schema in enumerate(parameters)},
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{at}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for at, (name, _) in enumerate(tools)
        ],
    }


def _moved(value: Any, place: str) -> Any:
    """A schema that stands at another place: what it refers to in itself is there, too."""
    if isinstance(value, Mapping):
        return {key: place + its[1:] if _refers(key, its) else _moved(its, place) for key, its in value.items()}
    return [_moved(item, place) for item in value] if isinstance(value, list) else value


def _refers(key: str, value: Any) -> bool:
    return key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/"))


class _Words:
    """A vocabulary as llguidance wants it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = {id: text for text, id in tokenizer.special_tokens.items()}
        self.eos_token_id, self.bos_token_id = tokenizer.eos_ids[0], tokenizer.bos_id
        self.special_token_ids = sorted(special)
        self.tokens = [special[id].encode() if id in special else tokenizer.raw([id]) for id in range(len(tokenizer))]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    words: Any = _Words(tokenizer)
    return LLTokenizer(words, eos_token=list(tokenizer.eos_ids))


def _line(error: object) -> str:
    return " ".join(_words(str(error)))[:300]


def _words(text: str) -> Iterator[str]:
    """Up to where the parser's state is told."""
    return iter(text.partition("<state>")[0].split())
