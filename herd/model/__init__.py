"""The architecture, on one device."""

from herd.model.cache import Cache, KVCache, KVRow, Memory, bytes_needed
from herd.model.transformer import Transformer

__all__ = ["Cache", "KVCache", "KVRow", "Memory", "Transformer", "bytes_needed"]
