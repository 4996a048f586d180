"""What a model looks at where its answer names what was asked for, in whatever way it would have begun."""

from collections.abc import Sequence
from typing import cast

from herd.context.cache import ContextCache, ContextRow
from herd.context.quoting import Try
from herd.engine.engine import Engine, stream
from herd.engine.request import Request
from herd.model import Transformer


def look_by_names(transformer: Transformer, cache: ContextCache, tries: Sequence[Try], max_tokens: int) -> None:
    """Let tries of at most max_tokens tokens, and those that come after them, quote what their names lead to: one pass
    over the contexts, by the last token of every name."""
    guides = [(one.prompt, one.guide) for one in tries if one.guide is not None]
    named = [(g, [*prompt, *ids]) for prompt, g in guides for ids in g.namings() if len(ids) < max_tokens]
    engine = Engine(transformer, cache=cache.glances(), rows=max(len(named), 1))
    rows = [engine.row(engine.submit(Request(prompt, max_tokens=1))) for _, prompt in named]
    for _ in stream(engine):
        pass
    for (guide, _), row in zip(named, rows, strict=True):
        guide.look(cast(ContextRow, row))
