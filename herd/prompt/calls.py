"""Finds tool calls in what a model says, while it says it. Nothing is evaluated, and no character is lost.

Calls are looked for where a line begins, behind another call, and anywhere behind `<function=` and `<|python_start|>`.
What may become a call is held back until it is one, or certainly none and so text. Each of the readers below is a
generator, which yields when it needs more text than there is, and raises NoCall.
"""

import re
from dataclasses import dataclass
from typing import Any

from herd.prompt.llama4 import PYTHON_END, PYTHON_START
from herd.prompt.scan import (
    JSON_MARKS,
    PYTHON_MARKS,
    NoCall,
    Reader,
    Said,
    find,
    goes_on,
    no_call,
    of_json,
    of_python,
    run,
    value_end,
)
from herd.prompt.tools import CODE, NAME, SEARCHES, ToolCall

Found = tuple[int, tuple[ToolCall, ...]]  # where calls end, and the calls

_TAG, _TAG_END = "<function=", "</function>"
# Where calls may begin: anywhere, or where a line does.
_AT_LINE = rf"[ \t]*[\[{{{''.join(sorted({name[0] for name in SEARCHES}))}]"
_BEGINS = re.compile(rf"<|(?<=\n){_AT_LINE}")
_BEGINS_HERE = re.compile(rf"<|(?:\A|(?<=\n)){_AT_LINE}")
_FRESH = re.compile(rf"(?:\n|{re.escape(PYTHON_START)}|{re.escape(PYTHON_END)})[ \t]*\Z")
_BLANK, _WORD, _STARS, _KEY = (re.compile(p) for p in (r"\s{0,256}", r"[\w.-]{0,256}", r"\*{0,2}", r'["\w]{0,16}'))
_JSON_KEYS = {f'"{key}"' for key in ("type", "id", "function", "name", "parameters", "arguments")}
_SEARCHES = {f"{name}.call": name for name in SEARCHES}
_PYTHON_ENDS = re.compile(re.escape(PYTHON_END))


@dataclass(frozen=True)
class Called:
    """Calls, and the text that they were read from."""

    text: str
    calls: tuple[ToolCall, ...]


class CallParser:
    """Takes text piece by piece and gives it back as text and Called. The texts of all of them joined are what it took,
    and they do not depend on how that was cut but for where text is cut."""

    def __init__(self) -> None:
        self._said = Said()
        self._reader: Reader[Found] | None = None
        self._before = "\n"  # the end of what was given back

    def push(self, piece: str) -> list[str | Called]:
        """What is now certain: text, and calls that are complete."""
        self._said.text += piece
        events = list[str | Called]()
        while self._said.text:
            if self._reader is None:
                here = _BEGINS_HERE if _FRESH.search(self._before) else _BEGINS
                found = here.search(self._said.text)
                self._give(found.end() - 1 if found else len(self._said.text), events)
                if not found:
                    break
                self._reader = _read(self._said)
            try:
                next(self._reader)
            except StopIteration as done:
                end, calls = done.value
                events.append(Called(self._said.text[:end], calls))
                self._before, self._said.text = "\n", self._said.text[end:]
            except NoCall as none:
                self._give(none.certain, events)
            else:
                break
            self._reader = None
        return events

    def finish(self) -> list[str | Called]:
        """What was held back, at the end of the text."""
        self._said.ended = True
        events = self.push("")
        assert not self._said.text, "nothing waits for more than there will be"
        return events

    def _give(self, end: int, events: list[str | Called]) -> None:
        text, self._said.text = self._said.text[:end], self._said.text[end:]
        before = self._before + text
        self._before = "\n" if _FRESH.search(before) else before[-len(PYTHON_START) :]
        if text and events and isinstance(events[-1], str):
            events[-1] += text
        elif text:
            events.append(text)


def parse_calls(text: str) -> list[str | Called]:
    """A whole text as text and calls."""
    parser = CallParser()
    events = parser.push(text)
    for event in parser.finish():
        if isinstance(event, str) and events and isinstance(events[-1], str):
            events[-1] += event
        else:
            events.append(event)
    return events


def _read(said: Said) -> Reader[Found]:
    """Calls that begin with the first character."""
    match said.text[0]:
        case "[":
            return (yield from _list(said))
        case "{":
            end, value = yield from _object(said, 0, keys=_JSON_KEYS)
            return end, (_call_of(value),)
        case "<":
            return (yield from _marked(said))
        case _:
            end = yield from run(said, 0, _WORD)
            if said.text[:end] not in _SEARCHES:
                raise NoCall
            end, call = yield from _call(said, 0)
            return end, (ToolCall(_SEARCHES[call.name], call.arguments),)


def _marked(said: Said) -> Reader[Found]:
    if (yield from goes_on(said, 0, PYTHON_START)):
        return (yield from _code(said))
    if (yield from goes_on(said, 0, PYTHON_END)):
        raise NoCall(len(PYTHON_END))
    if not (yield from goes_on(said, 0, _TAG)):
        raise NoCall
    start = len(_TAG)
    end = yield from run(said, start, _WORD)
    name = said.text[start:end]
    if not NAME.fullmatch(name) or said.text[end : end + 1] != ">":
        raise NoCall
    at = yield from run(said, end + 1, _BLANK)
    end, arguments = yield from _object(said, at)
    at = yield from run(said, end, _BLANK)
    closed = yield from goes_on(said, at, _TAG_END)
    return at + len(_TAG_END) if closed else end, (ToolCall(name, arguments),)


def _code(said: Said) -> Reader[Found]:
    """Calls between the marks of Python, or else code; text, if a call follows, as some templates write."""
    start = len(PYTHON_START)
    found = yield from find(said, _PYTHON_ENDS, start)
    inner, end = (said.text[start : found.start()], found.end()) if found else (said.text[start:], len(said.text))
    if PYTHON_START not in inner:
        events = parse_calls(inner)
        if all(isinstance(event, Called) or not event.strip() for event in events):
            calls = tuple(call for event in events if isinstance(event, Called) for call in event.calls)
            return end, calls or no_call(start)
    at = yield from run(said, end, _BLANK)
    if said.text[at : at + 1] in ("[", "{", "<"):
        raise NoCall(start)
    return end, (ToolCall(CODE, {"code": inner}),)


def _list(said: Said) -> Reader[Found]:
    calls, at = list[ToolCall](), 1
    while True:
        at = yield from run(said, at, _BLANK)
        if calls and said.text[at : at + 1] == "]":
            return at + 1, tuple(calls)
        at, call = yield from _call(said, at)
        calls.append(call)
        at = yield from run(said, at, _BLANK)
        mark = said.text[at : at + 1]
        if mark not in ("]", ","):
            raise NoCall
        at += mark == ","


def _call(said: Said, start: int) -> Reader[tuple[int, ToolCall]]:
    end = yield from run(said, start, _WORD)
    name = said.text[start:end]
    at = yield from run(said, end, _BLANK)
    if not NAME.fullmatch(name) or said.text[at : at + 1] != "(":
        raise NoCall
    arguments = dict[str, Any]()
    mark = "("
    while mark != ")":
        at = yield from run(said, at + 1, _BLANK)
        if said.text[at : at + 1] == ")":
            break
        at, more = yield from _argument(said, at)
        if more.keys() & arguments.keys():
            raise NoCall
        arguments |= more
        mark = said.text[at]
    return at + 1, ToolCall(name, arguments)


def _argument(said: Said, start: int) -> Reader[tuple[int, dict[str, Any]]]:
    """One argument, or several as `**{…}`, and where the comma or bracket behind it is."""
    at = yield from run(said, start, _STARS)
    many, name = at == start + 2, ""
    if not many:
        end = yield from run(said, start, _WORD)
        name = said.text[start:end]
        at = yield from run(said, end, _BLANK)
        if not NAME.fullmatch(name) or said.text[at : at + 1] != "=":
            raise NoCall
        at += 1
    end = yield from value_end(said, at, PYTHON_MARKS)
    if said.text[end] not in ",)":
        raise NoCall
    value = of_python(said.text[at:end])
    if many and not isinstance(value, dict):
        raise NoCall
    return end, value if many else {name: value}


def _object(said: Said, start: int, keys: set[str] | None = None) -> Reader[tuple[int, dict[str, Any]]]:
    """A JSON object and where it ends; its first key is one of these."""
    if said.text[start : start + 1] != "{":
        raise NoCall
    if keys is not None:
        at = yield from run(said, start + 1, _BLANK)
        end = yield from run(said, at, _KEY)
        if said.text[at:end] not in keys:
            raise NoCall
    end = yield from value_end(said, start + 1, JSON_MARKS)
    value = of_json(said.text[start : end + 1])
    return end + 1, value if isinstance(value, dict) else no_call()


def _call_of(value: dict[str, Any]) -> ToolCall:
    inner = value.get("function", value)
    if not isinstance(inner, dict) or ("parameters" in inner) == ("arguments" in inner):
        raise NoCall
    name, arguments = inner.get("name"), inner.get("parameters", inner.get("arguments"))
    if isinstance(arguments, str):
        arguments = of_json(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict) or value.get("type", "function") != "function":
        raise NoCall
    return ToolCall(name, arguments)
