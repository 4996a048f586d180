"""Memory that is given back to the system: what the C library keeps of it, and pages of files."""

import ctypes
import functools
import mmap

from torch import Tensor


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of that name
        return None


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library would keep it for what comes later.

    Loading frees copies of weights, and what they leave between the weights that stay may never be asked for again.
    """
    if (trim := getattr(_library(), "malloc_trim", None)) is not None:  # glibc's; others have none
        trim(0)


def forget(mapped: Tensor) -> None:
    """Let go of the whole pages that a contiguous tensor has of a file, which is mapped into memory and was not written
    to: where they are used again, the system takes them from the file again. What else is in memory would be lost."""
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = getattr(_library(), "madvise", None)
    if advise is not None and hasattr(mmap, "MADV_DONTNEED") and mapped.is_contiguous() and end > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
