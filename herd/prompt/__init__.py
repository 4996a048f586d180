"""Text to token ids and back: tokenizer and chat format."""

from herd.prompt.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
