"""Files <-> model: checkpoints of Hugging Face, Meta and llama.cpp: loading, saving, conversion, and upcycling."""

from herd.checkpoint.convert import convert
from herd.checkpoint.fingerprint import fingerprint
from herd.checkpoint.hf import save
from herd.checkpoint.load import load, open_weights, read_config
from herd.checkpoint.packed import is_packed, load_packed, load_packed_vision
from herd.checkpoint.upcycle import upcycle
from herd.checkpoint.vision import load_vision
from herd.checkpoint.weights import Weights

__all__ = [
    "Weights",
    "convert",
    "fingerprint",
    "is_packed",
    "load",
    "load_packed",
    "load_packed_vision",
    "load_vision",
    "open_weights",
    "read_config",
    "save",
    "upcycle",
]
