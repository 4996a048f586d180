"""Text to token ids and back: tokenizer, chat format and tool calls."""

from herd.prompt.calls import Called, CallParser, parse_calls
from herd.prompt.stop import StopText
from herd.prompt.tokenizer import StreamDecoder, Tokenizer
from herd.prompt.tools import CallPart, ToolCall

__all__ = ["CallParser", "CallPart", "Called", "StopText", "StreamDecoder", "Tokenizer", "ToolCall", "parse_calls"]
