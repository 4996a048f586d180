"""Cria, the model that ships with Herd: SmolLM2-135M-Instruct, upcycled, plus the trained difference."""

from herd.checkpoint.cria.build import build, cria_path, upcycle_base
from herd.checkpoint.cria.delta import apply_delta, make_delta, read_recipe

__all__ = ["apply_delta", "build", "cria_path", "make_delta", "read_recipe", "upcycle_base"]
