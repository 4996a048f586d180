"""Meta's tokenizer file and code, from the installed `llama_models`, and what transformers makes of the file."""

from functools import cache
from pathlib import Path

import llama_models
import tokenizers
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

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


@cache
def converted() -> tokenizers.Tokenizer:
    """What transformers makes of Meta's file; this is what stands in a tokenizer.json."""
    special = list(theirs().special_tokens)
    file = str(FOLDER / "tokenizer.model")
    return TikTokenConverter(file, pattern=theirs().O200K_PATTERN, extra_special_tokens=special).converted()
