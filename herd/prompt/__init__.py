"""Text to token ids and back: tokenizer, chat format and tool calls."""

from herd.prompt.calls import Called, CallParser, parse_calls
from herd.prompt.stop import StopText
from herd.prompt.tokenizer import StreamDecoder, Tokenizer
from herd.prompt.tools import ToolCall

__all__ = ["CallParser", "Called", "StopText", "StreamDecoder", "Tokenizer", "ToolCall", "parse_calls"]
