"""The prompt of a question about a context: one user turn in ChatML, as Cria was trained."""

from herd.prompt.tokenizer import Tokenizer


def ask_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Token ids of `question` and the opening of the answer. Text of the question never becomes a special token."""
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    user, newline, assistant = (tokenizer.encode(text) for text in (f"user\n{question}", "\n", "assistant\n"))
    return [start, *user, end, *newline, start, *assistant]
