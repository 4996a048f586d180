"""Tools that a model may call: how they are told to it, and how calls are written. `herd.prompt.calls` reads calls.

Llama 4 writes calls in several forms. These are the ones for tools of any name:

- pythonic: `[get_weather(city="Rome", days=2), get_time()]`, the form that Meta recommends;
- json: `{"type": "function", "name": "get_weather", "parameters": {"city": "Rome", "days": 2}}`;
- tag: `<function=get_weather>{"city": "Rome", "days": 2}</function>`.

In all of them, Meta's own tools are written `brave_search.call(query="…")`, and its code interpreter is called by the
code itself between `<|python_start|>` and `<|python_end|>`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from herd.errors import PromptError
from herd.prompt.llama4 import PYTHON_END, PYTHON_START
from herd.prompt.special import Special

ToolForm = Literal["pythonic", "json", "tag"]
SEARCHES = ("brave_search", "wolfram_alpha", "photogen")  # Meta's own tools, of one argument `query`
CODE = "code_interpreter"  # of one argument `code`
NAME = re.compile(r"[A-Za-z_][\w.-]*")
_ARGUMENT = re.compile(r"[A-Za-z_]\w*")

_HOW = {
    "pythonic": "a list of calls\n[function_name(parameter=value, parameter=value), function_name(parameter=value)]",
    "json": 'one line for each call\n{"name": "function_name", "parameters": {"parameter": "value"}}',
    "tag": 'one line for each call\n<function=function_name>{"parameter": "value"}</function>',
}
_TOOLS = """You can call functions, which are listed below. Call one or several of them if the answer needs that.
If none of them fits, answer without a call; if a required parameter is not known, ask for it.
To call functions, answer with nothing but {how}
and add no other text.

The functions, as JSON:
{functions}"""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; arguments are what JSON can say."""

    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON. ValueError or TypeError if that cannot say them."""
        return json.dumps(self.arguments, allow_nan=False)


@dataclass(frozen=True)
class CallPart:
    """What a call goes on with while it is being said: its name, then pieces that joined are its `arguments_json`.

    ends: with this piece the call is whole. What no piece ends was no call, and comes as text, too; its pieces are no
    whole JSON.
    """

    name: str | None = None
    arguments: str = ""
    ends: bool = False


def tools_text(tools: Sequence[Mapping[str, Any]], form: ToolForm = "pythonic") -> str:
    """What a system prompt says of tools, and in which form they are to be called.

    tools: `{"name": ..., "description": ..., "parameters": JSON schema}`, or that as the `function` of an object.
    """
    _check(form)
    listed = json.dumps([_definition(tool) for tool in tools], indent=4, ensure_ascii=False)
    return _TOOLS.format(how=_HOW[form], functions=listed)


def calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
    """The `tool_calls` of a message: each a ToolCall, or `{"name": ..., "arguments": ...}`, or that as the `function`
    of an object. PromptError if one is none of these."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise PromptError(f"tool_calls of a message must be a list; got {type(calls).__name__}")
    return [call if isinstance(call, ToolCall) else _call(call) for call in calls]


def write(calls: Sequence[ToolCall], form: ToolForm = "pythonic") -> list[str]:
    """Calls as a model writes them, in parts to be encoded one by one. PromptError if they cannot be written."""
    _check(form)
    parts, listed = list[str](), list[str]()
    try:
        for call in calls:
            own = _own(call)
            if form == "pythonic" and not own:
                listed.append(_pythonic(call))
                continue
            parts += [*_list(listed), *(own or [_tagged(call) if form == "tag" else _json(call)])]
            listed = []
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"arguments of a tool call must be what JSON can say: {error}") from error
    return [*parts, *_list(listed)]


def _check(form: str) -> None:
    if form not in get_args(ToolForm):
        raise PromptError(f"tool calls are written {', '.join(get_args(ToolForm))}; got {form!r}")


def _definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as Meta's prompts list it."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(name, str) or not NAME.fullmatch(name):
        raise PromptError(f"a tool needs a name of letters, digits, '_', '-' and '.'; got {name!r}")
    schema = inner.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise PromptError(f"the parameters of the tool {name} must be a JSON schema; got {type(schema).__name__}")
    parameters = {"type": "dict", "required": [], "properties": {}, **schema} | {"type": "dict"}
    described = {"description": inner["description"]} if inner.get("description") else {}
    return {"name": name, **described, "parameters": parameters}


def _call(call: Any) -> ToolCall:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name, arguments = (inner.get("name"), inner.get("arguments")) if isinstance(inner, Mapping) else (None, None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"the arguments of a call of {name} are not JSON: {error}") from error
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise PromptError("a tool call needs a name, and arguments as an object or as JSON of one")
    return ToolCall(name, dict(arguments))


def _own(call: ToolCall) -> list[str]:
    """A call of one of Meta's own tools; nothing for others."""
    if call.name in SEARCHES and call.arguments.keys() == {"query"}:
        return [f"{call.name}.call(query={_literal(call.arguments['query'])})"]
    if call.name == CODE and call.arguments.keys() == {"code"} and isinstance(call.arguments["code"], str):
        return [Special(PYTHON_START), call.arguments["code"], Special(PYTHON_END)]
    return []


def _list(calls: list[str]) -> list[str]:
    return [f"[{', '.join(calls)}]"] if calls else []


def _pythonic(call: ToolCall) -> str:
    plain = {name: value for name, value in call.arguments.items() if _ARGUMENT.fullmatch(name)}
    others = {name: value for name, value in call.arguments.items() if name not in plain}
    said = [f"{name}={_literal(value)}" for name, value in plain.items()] + [f"**{_literal(others)}"] * bool(others)
    return f"{_name(call)}({', '.join(said)})"


def _json(call: ToolCall) -> str:
    return json.dumps({"type": "function", "name": call.name, "parameters": call.arguments}, allow_nan=False)


def _tagged(call: ToolCall) -> str:
    return f"<function={_name(call)}>{call.arguments_json}</function>"


def _name(call: ToolCall) -> str:
    if not NAME.fullmatch(call.name):
        raise PromptError(f"a tool needs a name of letters, digits, '_', '-' and '.'; got {call.name!r}")
    return call.name


def _literal(value: Any) -> str:
    """A value as Python writes it, its texts in double quotes."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a key is not text")
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if value is None or isinstance(value, bool):
        return repr(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
