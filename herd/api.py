"""Herd from Python: load a model, read files into a context, ask.

Shape suffixes: T tokens, V vocabulary.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from herd import checkpoint
from herd.checkpoint.names import find_model
from herd.checkpoint.room import parse_bytes
from herd.config import TextConfig
from herd.context import shown
from herd.context.cache import ContextCache, ContextRow
from herd.context.citations import Citation, cite
from herd.context.limits import apart, too_long
from herd.context.quoting import Quoting, Try
from herd.context.read import Progress, Reader, ReadReport, read
from herd.context.segment import SEQUENTIAL
from herd.context.store import SourceInfo, Store, spec_for
from herd.engine import Engine, Finish, Request, Sampler, Source, Token, check_prompt, look, named, stream, try_again
from herd.errors import ConfigError, ContextError
from herd.formats import BF16, Weights
from herd.model import Transformer
from herd.model.calibrate import calibrate
from herd.model.fusion import find
from herd.model.quantized import Fill, pack_halves, quantize
from herd.model.vision import Vision
from herd.prompt import StopText, Tokenizer
from herd.prompt.ask import ask_prompt

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """What a model went on with. ids and text are without the end token, text also without the stop string and what
    came after it; tokens are all that were chosen, with their logprobs if the sampler asks for them.

    finish: "stop" at an end token or stop string, "length" after max_tokens.
    """

    text: str
    ids: tuple[int, ...]
    finish: Finish
    tokens: tuple[Token, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model. `fingerprint` names its weights; a context is bound to the fingerprint that read it.

    name: what `load` was given. vision: what images are seen with, None if the model sees none.
    """

    name: str
    path: Path
    config: TextConfig
    tokenizer: Tokenizer
    transformer: Transformer
    fingerprint: str
    vision: Vision | None = None

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], images: Sequence[Source] = ()) -> Tensor:
        """Logits after each token of one sequence, float32 [T, V]; T is larger than `ids` where they have images, see
        `generate`. PromptError for no ids or one out of range."""
        ids, features = self.look(ids, images)
        check_prompt(self.config, ids)
        patches = None if self.vision is None else find(ids, self.vision.config.image_token_index, features)
        return self.transformer(torch.tensor([ids]), patches=patches)[0]

    def look(self, ids: Sequence[int], images: Sequence[Source]) -> tuple[list[int], list[Tensor]]:
        """Ids and features of images that an engine takes (`herd.engine.Request`) for a prompt with images."""
        return look(self.vision, self.tokenizer.special_tokens, ids, images)

    def names(self, ids: Sequence[int], images: Sequence[Tensor]) -> tuple[int, ...]:
        """Names of a prompt's tokens (`herd.engine.Request`); ids and images as `look` gives them."""
        return named(ids, images, None if self.vision is None else self.vision.config.image_token_index)

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        images: Sequence[Source] = (),
        sampler: Sampler | None = None,
        stop: str | Sequence[str] = (),
        on_text: OnText | None = None,
    ) -> Generated:
        """Go on from token ids until an end token, the first of the `stop` strings, or for max_tokens.

        images: paths of image files or what they hold, which take the places of the `<|image|>` tokens in ids, in their
        order. sampler None: greedy. on_text is called with each new piece of text, none of which is taken back: what
        could be the start of a stop string is held back. PromptError if prompt and answer do not fit the model, or the
        images the prompt; SourceError for an image that cannot be read.
        """
        ids, features = self.look(ids, images)
        text, stops, pieces = self.tokenizer.stream(), StopText(stop), list[str]()
        tokens, ends = list[Token](), self.tokenizer.eos_ids

        def say(piece: str) -> None:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        engine = Engine(self.transformer, vision=self.vision)
        request = engine.submit(Request(ids, max_tokens, sampler or Sampler(), ends, images=features))
        for token in stream(engine):
            tokens.append(token)
            if token.id not in ends:
                say(stops.push(text.push(token.id)))
            if stops.found:
                engine.cancel(request)
        say(stops.push(text.finish()) + stops.finish())
        finish = "stop" if stops.found else tokens[-1].finish
        assert finish is not None, "only a stop string ends a request early"
        return Generated("".join(pieces), tuple(t.id for t in tokens if t.id not in ends), finish, tuple(tokens))


def load(
    path_or_name: str | Path = "cria",
    *,
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    calibration: Tensor | None = None,
) -> Model:
    """Load "cria" (built first if it is not there yet), or a checkpoint: a folder of Hugging Face's or Meta's, a GGUF
    file, a folder with one and its `mmproj` file, or a packed folder.

    `@int8`, `@int4`, such as `@int4:32`, or `@fp8` after the name rounds the weights to a format, in groups of at most
    64 inputs or that many; such as `@experts=int4,shared=int4,head=int8` does so part by part (experts, shared,
    attention, head; the others are bf16). `@bf16` leaves them. Without, Cria is int8 and other models are as stored.
    Contexts are bound to it. dtype: of weights that are not quantised; None: as stored, bfloat16 if only some parts are
    quantised. memory: of a packed folder (`herd.checkpoint.packed`), bytes that weights may take, such as "3G"; what
    they have beyond that is read from disk as it is needed. None: what the variable HERD_MEMORY says, or else what this
    process may still take. calibration: ids of texts [rows, tokens] (`herd.data.calibration`) that weights in 8 and 4
    bits are rounded for, which takes longer. CheckpointError or ConfigError if there is no such model or format, or it
    cannot be loaded.
    """
    folder, weights = find_model(path_or_name)
    if calibration is not None and weights is None:
        raise ConfigError(f"{path_or_name} names no weights to calibrate; name a format, such as {path_or_name}@int4")
    if checkpoint.is_packed(folder):
        if weights is not None or dtype is not None:
            raise ConfigError(f"the weights of {folder} are packed: they have their format; ask for no other")
        room = os.environ.get("HERD_MEMORY") if memory is None else memory
        transformer = checkpoint.load_packed(folder, None if not room else parse_bytes(room))
        identity = checkpoint.fingerprint(folder)
        tokenizer, vision = Tokenizer.load(folder), checkpoint.load_packed_vision(folder)
        return Model(str(path_or_name), folder, transformer.config, tokenizer, transformer, identity, vision)
    if memory is not None:
        raise ConfigError(f"memory can be bounded for packed folders, which `herd convert` writes; {folder} is none")
    if dtype is None and weights is not None and BF16 in weights.formats.values():
        dtype = torch.bfloat16

    def change(transformer: Transformer, fill: Fill) -> None:
        if weights is not None and calibration is None:
            quantize(transformer, weights, fill)
        elif weights is None and transformer.memory_dtype == torch.bfloat16:
            pack_halves(transformer, fill)

    transformer = checkpoint.load(folder, dtype, change=change)
    identity = checkpoint.fingerprint(folder)
    if weights is not None:
        identity = hashlib.sha256(f"{identity} {_told(weights, calibration)}".encode()).hexdigest()
        if calibration is not None:
            calibrate(transformer, calibration, weights)
    tokenizer, vision = load_tokenizer(folder), checkpoint.load_vision(folder, dtype)
    return Model(str(path_or_name), folder, transformer.config, tokenizer, transformer, identity, vision)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; the vocabulary in a GGUF file becomes a folder's for that."""
    if path.is_dir() and not any(path.glob("*.gguf")):
        return Tokenizer.load(path)
    with checkpoint.open_weights(path) as weights, TemporaryDirectory() as folder:
        for name, content in weights.tokenizer().items():
            (Path(folder) / name).write_bytes(content)
        return Tokenizer.load(folder)


def _told(weights: Weights, calibration: Tensor | None) -> str:
    """What a fingerprint says of weights that were rounded."""
    # A format of all parts in steps is told as it was before parts could be chosen: contexts are bound to it.
    form = weights.uniform
    told = str((form.bits, form.group)) if form is not None and form.whole else str(weights)
    return told if calibration is None else f"{told} {calibration.tolist()}"


@dataclass(frozen=True)
class Answer:
    """An answer, and the chunks that carried its attention, the heaviest first.

    quoted: it stands, after the name of what was asked for, in texts that the model looked at, or says that there is
    nothing (`herd.prompt.quotes`); else it is in the model's own words.
    missed_mass: of no token's attention a larger share than this can have been left out (`herd.context.scan.MISSED`).
    """

    text: str
    citations: tuple[Citation, ...]
    ids: tuple[int, ...]
    missed_mass: float = 0.0
    quoted: bool = False


class Context:
    """What one model has read: a durable folder that is asked, and kept up to date, through this object."""

    def __init__(self, store: Store, model: Model) -> None:
        """Use `Context.open`."""
        self._store, self._model = store, model

    @classmethod
    def open(cls, folder: str | Path, model: Model, *, kv: str | None = None, reading: str | None = None) -> "Context":
        """Open a context folder; a missing or empty folder becomes an empty context.

        kv: the format in which keys and values are kept, int8, int4 or float32; None: as the context has it, int8 for
        a new one. reading: of a model with several global layers, "sequential" (exact: each chunk after all before it)
        or "independent" (each chunk on its own, which changes answers); None: as the context has it, sequential for a
        new one. With one global layer both are the same, and exact. ContextError if it has another format or was read
        otherwise, another model read it, it is damaged, or the model has no global layers or no chunks.
        """
        spec = spec_for(model.config, model.fingerprint, kv or "int8", reading or SEQUENTIAL)
        return cls(Store.open(folder, spec, any_dtype=kv is None, any_reading=reading is None), model)

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self._store.folder

    @property
    def tokens(self) -> int:
        """Tokens it holds."""
        return self._store.tokens

    @property
    def sources(self) -> list[SourceInfo]:
        """Every source in it, with its name, path, chunks and tokens."""
        return list(self._store.sources)

    def text(self, source: str) -> str:
        """All of a source, as it was read. ContextError if there is no such source."""
        return shown.text(self._store, source, self._model.tokenizer)

    def lines(self, source: str, first: int = 1, stop: int = 1 << 62) -> tuple[list[str], int]:
        """Lines first..stop-1 of a source, counted from 1, as they were read, and the number of its last line.

        ContextError if there is no such source.
        """
        return shown.lines(self._store, source, first, stop, self._model.tokenizer)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of everything that was found and not read."""
        return list(self._store.skipped)

    @property
    def too_long(self) -> str | None:
        """Why no question can be asked about it and what helps, in one line; None if one can."""
        return too_long([self._store], self._model.config.max_position_embeddings)

    def read(
        self,
        paths: Iterable[str | Path],
        *,
        progress: Callable[[Progress], None] | None = None,
        reader: Reader | None = None,
    ) -> ReadReport:
        """Bring the context up to date with files, folders and "-" (stdin): unchanged chunks are not read again.

        In a sequence, a chunk is unchanged if all before it are, too. New sources come after those that are there.
        SourceError for a path that does not exist; what was found but cannot be read is listed in the report. progress:
        told how far it is, and may end it (`herd.context.read.Stopped`). reader: who computes chunks instead of this
        process (`herd.scale.spread`); ContextError with one for a sequence.
        """
        return read(paths, self._store, self._model.transformer, self._model.tokenizer, progress, reader)

    def ask(
        self,
        question: str,
        *,
        also: Sequence["Context"] = (),
        max_tokens: int = 256,
        quote: bool = True,
        on_text: OnText | None = None,
    ) -> Answer:
        """Answer one question, greedily; on_text is called with each new piece of text.

        quote: hold the answer to a quote of what the model looks at, or to `... is not in the context.`; False: the
        model's own words, whether they stand anywhere or not.
        also: further contexts of the same model, which count as if they had been read into this one. ContextError if
        one of them is empty or, of several, was read in sequence, or if they have more tokens than the model has
        positions (`too_long`). PromptError if question and answer need more positions than are left.
        """
        return self._ask([question], also, max_tokens, quote, on_text)[0]

    def ask_many(
        self, questions: Sequence[str], *, also: Sequence["Context"] = (), max_tokens: int = 256, quote: bool = True
    ) -> list[Answer]:
        """Answers to independent questions, the same as one by one; each pass over the context serves them all."""
        return self._ask(questions, also, max_tokens, quote, None)

    def memory(self, also: Sequence["Context"] = (), room: int = 1) -> ContextCache:
        """What an engine's requests see these contexts with, of up to `room` tokens each (`Engine(cache=...)`).

        Errors as of `ask`.
        """
        contexts = [self, *also]
        for context in contexts:
            if not context.tokens:
                raise ContextError(f"{context.folder} is empty; read something into it first")
            if context._model.fingerprint != self._model.fingerprint:
                raise ContextError(f"{context.folder} was read by another model than {self.folder}; ask them apart")
        if len({context.folder.resolve() for context in contexts}) < len(contexts):
            raise ContextError("the same context is named twice; name each once")
        stores = [context._store for context in contexts]
        if (reason := apart(stores) or too_long(stores, self._model.config.max_position_embeddings)) is not None:
            raise ContextError(reason)
        return ContextCache(stores, self._model.config, self._model.transformer.memory_dtype, room)

    def _ask(
        self, questions: Sequence[str], also: Sequence["Context"], max_tokens: int, quote: bool, on_text: OnText | None
    ) -> list[Answer]:
        tokenizer = self._model.tokenizer
        prompts = [ask_prompt(tokenizer, question) for question in questions]
        cache = self.memory(also, max(map(len, prompts), default=0) + max_tokens)
        quote = quote and tokenizer.byte_level
        guides = [Quoting(question, tokenizer) if quote else None for question in questions]
        tries = [Try(prompt, guide) for prompt, guide in zip(prompts, guides, strict=True)]
        said = _Said(tokenizer, on_text)
        self._run(tries, cache, max_tokens, said)
        second = try_again(self._model.transformer, cache, tries, max_tokens)
        self._run([one for one in second if one is not None], cache, max_tokens)
        tries = [one.or_sure(new) for one, new in zip(tries, second, strict=True)]
        said.finish(tries)
        return [self._answer(one, quote) for one in tries]

    def _run(self, tries: list[Try], cache: ContextCache, max_tokens: int, said: "_Said | None" = None) -> None:
        """Go on with all of them to their ends; said: tells at once what stays as it is."""
        model, ends = self._model, self._model.tokenizer.eos_ids
        engine = Engine(model.transformer, cache=cache, rows=max(len(tries), 1))
        for one in tries:
            guide = None if one.guide is None else one.guided
            engine.submit(Request([*one.prompt, *one.ids], max_tokens - len(one.ids), eos_ids=ends, guide=guide))
        for request, one in enumerate(tries):
            one.row = engine.row(request)
        for token in stream(engine):
            if token.id not in ends:
                tries[token.request].take(token.id)
                if said is not None:
                    said.say(tries[token.request])

    def _answer(self, one: Try, quoted: bool) -> Answer:
        assert isinstance(one.row, ContextRow)
        tokenizer = self._model.tokenizer
        citations = tuple(cite(one.row, tokenizer))
        return Answer(tokenizer.decode(one.ids), citations, tuple(one.ids), max(one.missed, one.row.missed), quoted)


class _Said:
    """Tells the text of one answer as it comes. Nothing is taken back."""

    def __init__(self, tokenizer: Tokenizer, on_text: OnText | None) -> None:
        self._text, self._on_text, self._count = tokenizer.stream(), on_text, 0

    def say(self, one: Try) -> None:
        """Tell what may become a quote."""
        self._tell(one.ids[: one.kept])

    def finish(self, tries: Sequence[Try]) -> None:
        """Tell the rest of the answer."""
        if self._on_text is not None:
            self._tell(tries[0].ids)
            self._on_text(self._text.finish())

    def _tell(self, ids: Sequence[int]) -> None:
        if self._on_text is not None:
            for id in ids[self._count :]:
                self._on_text(self._text.push(id))
            self._count = max(self._count, len(ids))
