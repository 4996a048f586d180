"""Files <-> model: loading, saving and upcycling of checkpoints in Hugging Face's Llama 4 layout."""

from herd.checkpoint.upcycle import upcycle

__all__ = ["upcycle"]
