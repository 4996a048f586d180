"""The architecture, on one device."""

from herd.model.cache import Cache, KVCache
from herd.model.transformer import Transformer

__all__ = ["Cache", "KVCache", "Transformer"]
