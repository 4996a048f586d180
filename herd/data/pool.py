"""A pool of context chunks and questions about them, as token ids with the position of every answer's evidence.

Shape suffixes: N tokens of all chunks, M tokens of all questions, C chunks, Q questions.
"""

import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np

from herd.context.chunks import cut
from herd.data import code, facts, prose
from herd.data.phrasings import FRAMES
from herd.data.question import Question
from herd.errors import ConfigError
from herd.prompt import Tokenizer
from herd.prompt.ask import ask_prompt

NO_EVIDENCE = -1  # this token is not copied
NULL_EVIDENCE = -2  # here the model must find that nothing in the context fits
_FROM_FILE, _FROM_FOLDER = 4, 16  # chunks at a time, so that none of them fills the pool
_FRAMED = 0.3  # share of questions with words around them
_WORDINGS = 3  # of each question about code, of which there are fewer than about facts


@dataclass(frozen=True)
class Pool:
    """Flat arrays; item i of a kind spans [start[i], start[i + 1])."""

    chunk_ids_N: np.ndarray  # int32
    chunk_start_C: np.ndarray  # int64, C + 1
    question_ids_M: np.ndarray  # int32, prompt then answer then end of turn
    question_start_Q: np.ndarray  # int64, Q + 1
    answer_start_Q: np.ndarray  # int32: tokens of the prompt
    evidence_M: np.ndarray  # int32: where in its chunk the *next* token stands, or one of the constants above
    chunk_of_Q: np.ndarray  # int32: the chunk that holds the evidence, -1 when the answer is absent
    twin_of_Q: np.ndarray  # int32: for an absent question, the chunk that must not be in the context, or -1
    family_Q: np.ndarray  # str

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **vars(self))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Pool":
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


@dataclass(frozen=True)
class PoolRecipe:
    """What to read and how much of it.

    paths may hold `*` and `{stdlib}`, `{purelib}` (sysconfig's names); hold_out: path parts that are never read.
    """

    paths: tuple[str, ...]
    hold_out: tuple[str, ...]
    chunks: int
    chunk_size: int
    facts_per_chunk: int = 4
    questions_per_chunk: int = 12
    quotes_per_chunk: int = 2
    absent_share: float = 0.15
    passages_per_chunk: int = 1  # of plain text
    passage_tokens: int = 192
    seed: int = 0


def build(recipe: PoolRecipe, tokenizer: Tokenizer) -> Pool:
    """Read real text, insert facts, ask. The same recipe over the same files gives the same pool."""
    rng = Random(recipe.seed)
    made = [_chunk(text, rng, recipe, tokenizer) for text in _texts(recipe, rng, tokenizer)]
    drafts = [draft for draft in made if draft is not None]
    defined = Counter(name for text, _ in drafts for name in code.definitions(text))
    keys = Counter(key for _, asked in drafts for key in {q.key for q in asked if q.key})
    everything = "\0".join(text for text, _ in drafts)
    writer = _Writer(tokenizer)
    for text, asked in drafts:
        unique = [q for q in asked if not q.key or (keys[q.key] == 1 and defined[q.key] <= 1)]
        unique = [q for q in unique if q.family != "quote" or everything.count(q.key) == 1]
        chunk = writer.add_chunk(text)
        rng.shuffle(unique)
        for question in unique[: recipe.questions_per_chunk]:
            if rng.random() < _FRAMED:
                before, after = rng.choice(FRAMES)
                question = replace(question, question=before + question.question + after)
            writer.add_question(question, chunk, text)
            if question.key and not question.family.startswith("absent") and rng.random() < recipe.absent_share:
                writer.add_question(question.as_absent(), chunk, text)
    for _ in range(int(recipe.absent_share * len(writer.answer_start) / 2)):
        family = rng.choice(code.FAMILIES)
        writer.add_question(code.absent(family, rng, lambda name: name in defined), -1, "")
    return writer.finish()


def _texts(recipe: PoolRecipe, rng: Random, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of chunks from random places: a few of some files of one folder, then of the next folder."""
    files = [f for pattern in recipe.paths for f in _expand(pattern) if not set(f.parts) & set(recipe.hold_out)]
    if not files:
        raise ConfigError(f"the recipe's paths {', '.join(recipe.paths)} match no file here")
    folders: dict[Path, list[Path]] = {}
    for file in rng.sample(files, len(files)):
        folders.setdefault(file.parent, []).append(file)
    room = recipe.chunk_size - 48 * recipe.facts_per_chunk
    made = 0
    while made < recipe.chunks:
        before = made
        # Text of one folder is much alike: neighbours in the pool are hard to tell apart, as in a real context.
        for folder in folders.values():
            for text in islice(_of_folder(folder, room, rng, recipe, tokenizer), recipe.chunks - made):
                yield text
                made += 1
        if made == before:
            raise ConfigError(f"{len(files)} files hold no chunk of {recipe.chunk_size // 4} tokens or more")


def _of_folder(files: list[Path], room: int, rng: Random, recipe: PoolRecipe, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of at most _FROM_FOLDER chunks of a folder's files."""
    left = _FROM_FOLDER
    for file in rng.sample(files, len(files)):
        chunks = cut("/".join(file.parts[-2:]), _read(file), tokenizer, room)
        good = [c for c in chunks if len(c.ids) > recipe.chunk_size // 4]
        chosen = rng.sample(good, min(_FROM_FILE, left, len(good)))
        yield from (chunk.text for chunk in chosen)
        left -= len(chosen)
        if not left:
            return


def _expand(pattern: str) -> list[Path]:
    places = sysconfig.get_paths()
    try:
        pattern = pattern.format(**places)
    except (KeyError, ValueError, IndexError):
        raise ConfigError(f"path {pattern!r} of the recipe may name {{{'}, {'.join(places)}}} in braces") from None
    root = Path(pattern[: pattern.index("*")]).parent if "*" in pattern else Path(pattern)
    found = root.glob(str(Path(pattern).relative_to(root))) if "*" in pattern else [root]
    return sorted(f for f in found if f.is_file() and f.stat().st_size < 400_000)


def _read(file: Path) -> str:
    raw = file.read_bytes()
    return "" if b"\0" in raw else raw.decode("utf-8", errors="replace")


def _chunk(text: str, rng: Random, recipe: PoolRecipe, tokenizer: Tokenizer) -> tuple[str, list[Question]] | None:
    asked: list[Question] = []
    for _ in range(rng.randint(0, recipe.facts_per_chunk)):
        fact = facts.make(rng, "train")
        ordered = [line for line in (fact.older, fact.sentence) if line]
        for lines in (ordered, *([line] for line in (fact.first_hop, *fact.distractors) if line)):
            text = _insert(text, lines, rng)
        asked += fact.questions
    if len(tokenizer.encode(text)) > recipe.chunk_size:
        return None
    for _ in range(_WORDINGS):
        asked += code.questions(text, rng)
    asked += prose.questions(text, rng)
    asked += [quote for _ in range(recipe.quotes_per_chunk) if (quote := _quote(text, rng))]
    return text, [q for q in asked if text.count(q.evidence) == 1]


def _insert(text: str, sentences: Sequence[str], rng: Random) -> str:
    """Put sentences, in their order, on lines of their own somewhere below the header."""
    lines = text.splitlines(keepends=True)
    places = sorted(rng.randint(1, len(lines)) for _ in sentences)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        lines.insert(place, sentence + "\n")
    return "".join(lines)


_QUOTE = ("Continue: {}", "What comes after this text? {}", "Quote the line that begins with: {}", "Go on from: {}")


def _quote(text: str, rng: Random) -> Question | None:
    """Given the first words of a line, go on to its end: dense practice in copying."""
    lines = [line.strip() for line in text.splitlines() if 50 <= len(line.strip()) <= 200]
    if not lines:
        return None
    line = rng.choice(lines)
    cue = line[: line.find(" ", rng.randint(14, 28))].strip()
    if not 14 <= len(cue) <= len(line) - 16:
        return None
    return Question("quote", rng.choice(_QUOTE).format(cue), line, line, line, line, key=cue)


class _Writer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.chunk_ids: list[list[int]] = []
        self.offsets: list[list[tuple[int, int]]] = []
        self.question_ids: list[list[int]] = []
        self.evidence: list[list[int]] = []
        self.answer_start: list[int] = []
        self.chunk_of: list[int] = []
        self.twin_of: list[int] = []
        self.family: list[str] = []

    def add_chunk(self, text: str) -> int:
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        self.chunk_ids.append(ids)
        self.offsets.append(offsets)
        return len(self.chunk_ids) - 1

    def add_question(self, question: Question, chunk: int, text: str) -> None:
        prompt = ask_prompt(self.tokenizer, question.question)
        answer, spans = self.tokenizer.encode_with_offsets(question.answer)
        absent = not question.copied
        evidence = [NO_EVIDENCE] * (len(prompt) + len(answer) + 1)
        first = len(prompt) - 1  # the row whose next token is the answer's first
        if absent:
            known = question.answer.index(question.key) + len(question.key)
            decided = next(i for i, (_, stop) in enumerate(spans) if stop > known)
            evidence[first + decided] = NULL_EVIDENCE
        for copied, source in question.hops or ([(question.copied, question.evidence)] if not absent else []):
            self._align(question, copied, text.index(source) + source.index(copied), chunk, spans, first, evidence)
        self.question_ids.append([*prompt, *answer, self.tokenizer.token_id("<|im_end|>")])
        self.evidence.append(evidence)
        self.answer_start.append(len(prompt))
        self.chunk_of.append(-1 if absent else chunk)
        self.twin_of.append(chunk if absent else -1)
        self.family.append(question.family)

    def _align(
        self, question: Question, copied: str, at: int, chunk: int, spans: list, first: int, evidence: list[int]
    ) -> None:
        """Note for every copied token of the answer where its characters stand in the chunk."""
        begin = question.answer.rindex(copied)
        known = begin + (copied.find(question.key) + len(question.key) if question.key in copied else 0)
        token_at = {char: i for i, (start, stop) in enumerate(self.offsets[chunk]) for char in range(start, stop)}
        for i, (start, stop) in enumerate(spans):
            # Before the key is complete nothing identifies the place. A token may begin with the blank before the copy.
            if known < stop <= begin + len(copied):
                evidence[first + i] = token_at[at + max(start - begin, 0)]

    def finish(self) -> Pool:
        def flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
            starts = np.cumsum([0, *(len(x) for x in lists)])
            return np.fromiter((i for x in lists for i in x), np.int32, starts[-1]), starts

        chunk_ids, chunk_start = flat(self.chunk_ids)
        question_ids, question_start = flat(self.question_ids)
        evidence, _ = flat(self.evidence)
        return Pool(
            chunk_ids, chunk_start, question_ids, question_start, np.array(self.answer_start, np.int32), evidence,
            np.array(self.chunk_of, np.int32), np.array(self.twin_of, np.int32), np.array(self.family),
        )  # fmt: skip
