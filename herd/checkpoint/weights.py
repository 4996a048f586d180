"""Weights of a Llama 4 checkpoint by Hugging Face name, in whatever format; each is read when it is asked for."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from herd.config import TextConfig, VisionConfig
from herd.errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """One tensor in the files.

    dtype: the type its values come in. kind, nbytes: how they are kept in the files, and how many bytes that takes.
    read: gives it in a type, memory-mapped where that is the type and layout of the file. forget: gives those pages of
    the files back that hold it and were read; they are read again when they are wanted.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    nbytes: int
    read: Callable[[torch.dtype], Tensor]
    forget: Callable[[], None]


class Weights:
    """The tensors of a checkpoint that fits its configuration. Use as a context manager; see `open_weights`.

    Names are those of Llama4ForCausalLM; images add `vision_model.` and `multi_modal_projector.`.
    vision: None if it is a text model. files: those with weights in them. tokenizer: files of its vocabulary and
    generation settings, by the name they have in a Hugging Face folder.
    """

    def __init__(
        self,
        path: Path,
        text: TextConfig,
        vision: VisionConfig | None,
        stored: dict[str, Stored],
        files: list[Path],
        tokenizer: Callable[[], dict[str, bytes]],
        opened: ExitStack,
    ) -> None:
        self.path, self.text, self.vision, self.files, self.tokenizer = path, text, vision, files, tokenizer
        self._stored, self._opened = stored, opened

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def stored(self, name: str) -> Stored:
        """What is known of a tensor without reading it. CheckpointError if there is none of this name."""
        if name not in self._stored:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read for that. CheckpointError if there is none of this name."""
        return self.stored(name).shape

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in a type; None: as stored, and bfloat16 for those in 8 bits or less.

        CheckpointError if there is none of this name or its bytes cannot be read.
        """
        stored = self.stored(name)
        return stored.read(dtype or stored.dtype)

    def finite(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As `tensor`; CheckpointError if it holds infinities or NaN, also such as come from a narrower type."""
        value = self.tensor(name, dtype)
        if not all_finite(value):
            raise CheckpointError(f"{name} in {self.path} holds values that are not finite numbers in {value.dtype}")
        return value

    def forget(self, name: str) -> None:
        """Let the files' pages of a tensor go, which was read and is not needed soon. What was read stays as it is."""
        self.stored(name).forget()

    def drop(self, name: str) -> None:
        """Leave a tensor out."""
        del self._stored[name]

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of its values come in."""
        counts: dict[torch.dtype, int] = {}
        for stored in self._stored.values():
            counts[stored.dtype] = counts.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return max(counts, key=counts.__getitem__)


def all_finite(value: Tensor) -> bool:
    """Whether every value is a finite number; reads a large tensor in parts, so that little memory is needed."""
    parts = value.view(-1).split(1 << 24) if value.is_contiguous() else (value,)
    return all(bool(part.isfinite().all()) for part in parts)
