"""What the C library keeps of memory that was freed."""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no library of that name
        return None


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library would keep it for what comes later.

    Loading frees copies of weights, and what they leave between the weights that stay may never be asked for again.
    """
    if (trim := _trim()) is not None:
        trim(0)
