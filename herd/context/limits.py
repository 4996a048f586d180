"""How much can be read and asked. Imports nothing heavy: the help of the command names these limits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herd.context.store import Store

MAX_BYTES = 64 << 20  # of one source


def apart(stores: Sequence["Store"]) -> str | None:
    """Why contexts cannot be asked together, and what helps; None if they can."""
    alone = next((store.folder for store in stores if store.spec.sequential), None)
    if len(stores) == 1 or alone is None:
        return None
    return (
        f"{alone} was read in sequence from its own beginning, so it can only be asked alone; "
        "read the sources into one context, or into several with --reading independent"
    )


def start_position(stores: Sequence["Store"], positions: int, room: int = 1) -> int:
    """Where a question about contexts starts that needs `room` positions together with its answer, if there are enough.

    Behind a whole attention chunk of positions for every chunk, however short it is. Where a model has not so many, the
    gaps behind short chunks shrink: the question starts as late as it can, but behind as many positions as tokens. It
    always starts an attention chunk. What was read in sequence depends on its positions, so there no gap shrinks. See
    "Positions" in docs/architecture.md.
    """
    if any(store.spec.sequential for store in stores):
        return sum(store.end_position for store in stores)
    chunk, tokens = stores[0].spec.chunk, sum(store.tokens for store in stores)
    latest = max(_whole(positions - room, chunk), _whole(tokens + chunk - 1, chunk))
    return min(sum(store.end_position for store in stores), latest)


def too_long(stores: Sequence["Store"], positions: int) -> str | None:
    """Why a model with so many positions cannot be asked about contexts together, and what helps; None if it can."""
    if start_position(stores, positions) < positions:
        return None
    tokens = sum(store.tokens for store in stores)
    if len(stores) > 1:
        names, fix = f"{len(stores)} contexts have", "ask fewer at a time"
    else:
        names = f"{stores[0].folder} has"
        fix = "read parts of the sources into contexts of their own and ask each by itself"
    return f"{names} {tokens:,} tokens, and this model has {positions:,} positions for them and a question; {fix}"


def _whole(tokens: int, chunk: int) -> int:
    return tokens // chunk * chunk
