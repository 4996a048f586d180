"""Text to token ids and back: tokenizer and chat format."""

from herd.prompt.stop import StopText
from herd.prompt.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StopText", "StreamDecoder", "Tokenizer"]
