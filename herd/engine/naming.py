"""What a model looks at where its answer names what was asked for, in whatever way it would have begun."""

from collections.abc import Sequence
from typing import cast

from herd.context.cache import ContextCache, ContextRow
from herd.context.quoting import Try
from herd.engine.engine import Engine, stream
from herd.engine.request import Request
from herd.model import Transformer


def try_again(transformer: Transformer, cache: ContextCache, tries: Sequence[Try], max_tokens: int) -> list[Try | None]:
    """For each of some tries of at most max_tokens tokens, which have ended, another one that may end better: it may
    also quote what the names that its question asks for lead to. None if the first is not doubted, or nothing else is
    left."""
    doubted = [(one.prompt, one.guide) for one in tries if one.doubted and one.guide is not None]
    named = [(g, [*prompt, *ids]) for prompt, g in doubted for ids in g.namings() if len(ids) < max_tokens]
    if named:  # one pass over the contexts, by the last token of every name
        engine = Engine(transformer, cache=cache.glances(), rows=len(named))
        rows = [engine.row(engine.submit(Request(prompt, max_tokens=1))) for _, prompt in named]
        for _ in stream(engine):
            pass
        for (guide, _), row in zip(named, rows, strict=True):
            guide.look(cast(ContextRow, row))
    return [one.again() for one in tries]
