"""Generation in token ids: prompts in, ids out. Text, chat and contexts live outside."""

from herd.engine.generate import Token, check_prompts, generate, stream
from herd.engine.sampler import Sampler

__all__ = ["Sampler", "Token", "check_prompts", "generate", "stream"]
