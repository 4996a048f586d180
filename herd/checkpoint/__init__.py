"""Files <-> model: loading, saving and upcycling of checkpoints in Hugging Face's Llama 4 layout."""

from herd.checkpoint.fingerprint import fingerprint
from herd.checkpoint.hf import load, read_config, save
from herd.checkpoint.upcycle import upcycle

__all__ = ["fingerprint", "load", "read_config", "save", "upcycle"]
