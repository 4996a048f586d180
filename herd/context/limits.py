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


def too_long(stores: Sequence["Store"], positions: int) -> str | None:
    """Why a model with so many positions cannot be asked about contexts together, and what helps; None if it can.

    Each chunk takes a whole attention chunk of positions, however short it is, and a question stands behind them all.
    """
    chunks, most = sum(len(store.chunks) for store in stores), (positions - 1) // stores[0].spec.chunk
    if chunks <= most:
        return None
    if len(stores) > 1:
        names, fix = f"{len(stores)} contexts have", "ask fewer at a time"
    else:
        names, fix = (
            f"{stores[0].folder} has",
            (
                "read parts of the sources into contexts of their own and ask each by itself, "
                "or join small files first, for each takes a chunk"
            ),
        )
    return f"{names} {chunks:,} chunks, and this model can be asked about {most:,} at most; {fix}"
