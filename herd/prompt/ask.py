"""The prompt of a question about a context: one user turn, in ChatML as Cria was trained, else as the model chats."""

from herd.prompt.tokenizer import Tokenizer


def ask_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Token ids of `question` and the opening of the answer, to stand behind the texts of a context.

    Text of the question never becomes a special token. PromptError if the model has no chat format.
    """
    if "<|im_start|>" not in tokenizer.special_tokens:
        ids = tokenizer.chat([{"role": "user", "content": question}])
        return ids[1:] if ids[0] == tokenizer.bos_id else ids
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    user, newline, assistant = (tokenizer.encode(text) for text in (f"user\n{question}", "\n", "assistant\n"))
    return [start, *user, end, *newline, start, *assistant]
