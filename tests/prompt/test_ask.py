"""Questions about a context are put in the format that a model knows, behind the texts of the context."""

from herd.prompt import Tokenizer
from herd.prompt.ask import ask_prompt
from tests.prompt.meta import ours
from tests.prompt.test_tokenizer import CHATML, core

QUESTION = "What is <|eot|>?"


def test_a_llama_4_is_asked_in_its_own_format():
    tokenizer = ours()
    ids, names = ask_prompt(tokenizer, QUESTION), tokenizer.special_tokens
    header = "<|header_start|>{}<|header_end|>\n\n"
    said = f"{header.format('user')}{QUESTION}<|eot|>{header.format('assistant')}"
    assert tokenizer.decode(ids, keep_special=True) == said
    assert ids.count(names["<|eot|>"]) == 1, "what the question says is text"
    assert names["<|begin_of_text|>"] not in ids, "texts stand before it"


def test_cria_is_asked_in_chatml():
    tokenizer = Tokenizer(core(), template=CHATML)
    ids = ask_prompt(tokenizer, "Who?")
    assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
