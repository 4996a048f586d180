"""Herd: the Llama 4 architecture as one small code base. `herd.load` and `herd.Context` are the way in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from herd.errors import CheckpointError, ConfigError, ContextError, HerdError, LibraryError, PromptError, SourceError

if TYPE_CHECKING:
    from herd.api import Answer, Citation, Context, Generated, Model, ReadReport, Sampler, load

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "CheckpointError",
    "Citation",
    "ConfigError",
    "Context",
    "ContextError",
    "Generated",
    "HerdError",
    "LibraryError",
    "Model",
    "PromptError",
    "ReadReport",
    "Sampler",
    "SourceError",
    "load",
]


def __getattr__(name: str) -> Any:
    # torch takes two seconds to import, and `herd --help` needs none of it.
    if name in __all__:
        return getattr(import_module("herd.api"), name)
    raise AttributeError(f"module 'herd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
