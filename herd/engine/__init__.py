"""Generation in token ids: requests in, tokens out. Text, chat and contexts live outside."""

from herd.engine.engine import Engine, generate, stream
from herd.engine.images import Source, look
from herd.engine.naming import try_again
from herd.engine.prefixes import Block, Prefixes, named
from herd.engine.request import Finish, Guide, Request, Token, check_prompt
from herd.engine.sampler import Sampler

__all__ = [
    "Block",
    "Engine",
    "Finish",
    "Guide",
    "Prefixes",
    "Request",
    "Sampler",
    "Source",
    "Token",
    "check_prompt",
    "generate",
    "look",
    "named",
    "stream",
    "try_again",
]
