"""Meta's tokenizer file and code, from the installed `llama_models`."""

from functools import cache
from pathlib import Path

import llama_models
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

from herd.prompt import Tokenizer

FOLDER = Path(llama_models.__file__).parent / "llama4"


@cache
def ours() -> Tokenizer:
    """Herd's tokenizer of the folder that holds Meta's file."""
    return Tokenizer.load(FOLDER)


@cache
def theirs() -> MetaTokenizer:
    return MetaTokenizer(FOLDER / "tokenizer.model")


def meta_ids(text: str) -> list[int]:
    return theirs().encode(text, bos=False, eos=False)
