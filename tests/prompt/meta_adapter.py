"""Herd's reading of tool calls under the names by which Meta's own tests import theirs."""

import uuid
from types import ModuleType

from llama_models.datatypes import BuiltinTool, RawMessage, StopReason
from llama_models.datatypes import ToolCall as MetaCall

from herd.prompt import Tokenizer
from herd.prompt.calls import Called, parse_calls
from herd.prompt.tools import ToolCall


def calls(text: str) -> list[ToolCall]:
    return [call for event in parse_calls(text) if isinstance(event, Called) for call in event.calls]


class ToolUtils:
    """The first call of a text, of any tool or of Meta's own."""

    @staticmethod
    def maybe_extract_custom_tool_call(text: str) -> tuple[str, dict] | None:
        return next(((c.name, c.arguments) for c in calls(text) if c.name not in BuiltinTool.__members__), None)

    @staticmethod
    def maybe_extract_builtin_tool_call(text: str) -> tuple[str, str] | None:
        return next(((c.name, *c.arguments.values()) for c in calls(text) if c.name in BuiltinTool.__members__), None)


def is_valid_python_list(text: str) -> bool:
    return text.startswith("[") and all(isinstance(event, Called) for event in parse_calls(text))


def parse_python_list_for_function_calls(text: str) -> list[tuple[str, dict]]:
    return [(call.name, call.arguments) for call in calls(text)]


class ChatFormat:
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def decode_assistant_message_from_content(self, content: str, stop_reason: StopReason) -> RawMessage:
        custom = ToolUtils.maybe_extract_custom_tool_call(content)
        own = ToolUtils.maybe_extract_builtin_tool_call(content)
        found = [ToolCall(*custom)] if custom else [ToolCall(own[0], {"query": own[1]})] if own else []
        made = [
            MetaCall(
                call_id=str(uuid.uuid4()), tool_name=c.name, arguments=c.arguments, arguments_json=c.arguments_json
            )
            for c in found
        ]
        return RawMessage(role="assistant", content="" if made else content, stop_reason=stop_reason, tool_calls=made)


def modules() -> dict[str, ModuleType]:
    """Stand-ins for the modules of Meta's code."""
    made = {}
    for name, members in {
        "llama_models.llama4.chat_format": [ChatFormat],
        "llama_models.llama4.tokenizer": [Tokenizer],
        "llama_models.llama3.tool_utils": [ToolUtils, is_valid_python_list, parse_python_list_for_function_calls],
    }.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update({member.__name__: member for member in members})
    return made
