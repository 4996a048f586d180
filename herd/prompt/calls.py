"""Finds tool calls in what a model says, while it says it. Nothing is evaluated, and no character is lost.

Calls are looked for where a line begins, behind another call, and anywhere behind `<function=` and `<|python_start|>`.
What may become a call is held back until it is one, or certainly none and so text; but its parts are told as soon as
they are said, from the name of a tool on, behind which nearly always a call follows. Each of the readers below is a
generator, see `herd.prompt.scan`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from herd.prompt.llama4 import PYTHON_END, PYTHON_START
from herd.prompt.scan import (
    BLANK,
    JSON,
    PYTHON,
    NoCall,
    Reader,
    Said,
    goes_on,
    no_call,
    of_json,
    run,
    string_end,
    value,
)
from herd.prompt.tools import CODE, NAME, SEARCHES, CallPart, ToolCall

Found = tuple[int, tuple[ToolCall, ...]]  # where calls end, and the calls

_TAG, _TAG_END = "<function=", "</function>"
# Where calls may begin: anywhere, or where a line does.
_AT_LINE = rf"[ \t]*[\[{{{''.join(sorted({name[0] for name in SEARCHES}))}]"
_BEGINS = re.compile(rf"<|(?<=\n){_AT_LINE}")
_BEGINS_HERE = re.compile(rf"<|(?:\A|(?<=\n)){_AT_LINE}")
_FRESH = re.compile(rf"(?:\n|{re.escape(PYTHON_START)}|{re.escape(PYTHON_END)})[ \t]*\Z")
_WORD, _STARS, _KEY = (re.compile(p) for p in (r"[\w.-]{0,256}", r"\*{0,2}", r'["\w]{0,16}'))
_JSON_KEYS = {f'"{key}"' for key in ("type", "id", "function", "name", "parameters", "arguments")}
_SEARCHES = {f"{name}.call": name for name in SEARCHES}


@dataclass(frozen=True)
class Called:
    """Calls, and the text that they were read from."""

    text: str
    calls: tuple[ToolCall, ...]


Event = str | Called | CallPart


class CallParser:
    """Takes text piece by piece and gives it back as text and Called. The texts of all of them joined are what it took,
    and they do not depend on how that was cut but for where text is cut.

    Before a Called come the parts of its calls; those of what turns out to be no call, and is text, have no end.
    """

    def __init__(self, names: frozenset[str] | None = None) -> None:
        """names: of the tools that there are; calls of others are text. None: any."""
        self._said = Said(names)
        self._reader: Reader[Found] | None = None
        self._before = "\n"  # the end of what was given back

    def push(self, piece: str) -> list[Event]:
        """What is now certain: text, and calls that are complete; and parts of calls."""
        self._said.text += piece
        events = list[Event]()
        while self._said.text:
            if self._reader is None:
                here = _BEGINS_HERE if _FRESH.search(self._before) else _BEGINS
                found = here.search(self._said.text)
                self._give(found.end() - 1 if found else len(self._said.text), events)
                if not found:
                    break
                self._reader = _read(self._said)
            try:
                part = next(self._reader)
            except StopIteration as done:
                end, calls = done.value
                events.append(Called(self._said.text[:end], calls))
                self._before, self._said.text = "\n", self._said.text[end:]
            except NoCall as none:
                self._give(none.certain, events)
            else:
                if part is None:
                    break
                events.append(part)
                continue
            self._reader = None
        return events

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        self._said.ended = True
        events = self.push("")
        assert not self._said.text, "nothing waits for more than there will be"
        return events

    def _give(self, end: int, events: list[Event]) -> None:
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
    events = list[str | Called]()
    for event in [*parser.push(text), *parser.finish()]:
        if isinstance(event, str) and events and isinstance(events[-1], str):
            events[-1] += event
        elif not isinstance(event, CallPart):
            events.append(event)
    return events


def _read(said: Said) -> Reader[Found]:
    """Calls that begin with the first character."""
    match said.text[0]:
        case "[":
            return (yield from _list(said))
        case "{":
            end, call = yield from _json(said)
        case "<":
            return (yield from _marked(said))
        case _:
            name, at = yield from _head(said, 0, _SEARCHES)
            end, call = yield from _call(said, at, name)
            yield _end(call)
    return end, (call,)


def _end(call: ToolCall) -> CallPart:
    """What ends a call whose arguments were told one by one."""
    return CallPart(arguments="}" if call.arguments else "{}", ends=True)


def _whole(call: ToolCall) -> Iterator[CallPart]:
    """The parts of a call of which nothing was told."""
    yield CallPart(call.name)
    yield CallPart(arguments=call.arguments_json, ends=True)


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
    if not NAME.fullmatch(name) or not said.allows(name) or said.text[end : end + 1] != ">":
        raise NoCall
    at = yield from run(said, end + 1, BLANK)
    end, arguments = yield from _arguments(said, at, name)
    call = ToolCall(name, arguments)
    yield _end(call)
    at = yield from run(said, end, BLANK)
    closed = yield from goes_on(said, at, _TAG_END)
    return at + len(_TAG_END) if closed else end, (call,)


def _code(said: Said) -> Reader[Found]:
    """Calls between the marks of Python, or else code; text, if a call follows, as some templates write. Code is told
    when it is whole: only what follows says what it was."""
    start = len(PYTHON_START)
    end, events, rest = yield from _inner(said, start)
    inner = said.text[start:end].removesuffix(PYTHON_END)
    if PYTHON_START not in inner and all(isinstance(event, Called) or not event.strip() for event in events):
        calls = tuple(call for event in events if isinstance(event, Called) for call in event.calls)
        yield from rest
        return end, calls or no_call(start)
    at = yield from run(said, end, BLANK)
    if said.text[at : at + 1] in ("[", "{", "<"):
        raise NoCall(start)
    if not said.allows(CODE):
        raise NoCall(end)
    call = ToolCall(CODE, {"code": inner})
    yield from _whole(call)
    return end, (call,)


def _inner(said: Said, start: int) -> Reader[tuple[int, list[str | Called], list[CallPart]]]:
    """What stands up to the end of Python, and where that is. Parts of the first call are told, but for its end; the
    rest of the parts are for when it is certain that there are calls and nothing else."""
    parser, events, rest, at, found = CallParser(said.names), list[str | Called](), list[CallPart](), start, -1
    while found < 0:
        found = said.text.find(PYTHON_END, max(start, at - len(PYTHON_END)))
        last = said.text.rfind("<", max(at, len(said.text) - len(PYTHON_START)))  # of a mark, perhaps
        stop = found if found >= 0 else len(said.text) if said.ended or last < 0 else last
        nested = PYTHON_START in said.text[start:stop]
        more = [] if nested else parser.push(said.text[at:stop])
        at = stop
        over = found >= 0 or said.ended
        for event in [*more, *(parser.finish() if over and not nested else [])]:
            if not isinstance(event, CallPart):
                events.append(event)
            elif rest or event.ends or any(isinstance(one, str) and one.strip() for one in events):
                rest.append(event)
            else:
                yield event
        if over:
            break
        yield None
    return found + len(PYTHON_END) if found >= 0 else len(said.text), events, rest


def _list(said: Said) -> Reader[Found]:
    """A list of calls. A call is one once the next has begun or the list ends; what goes wrong later is text."""
    calls, at, sure = list[ToolCall](), 1, (0, 0)
    try:
        while True:
            at = yield from run(said, at, BLANK)
            if calls and said.text[at : at + 1] == "]":
                yield _end(calls[-1])
                return at + 1, tuple(calls)
            begun = at
            name, at = yield from _head(said, at)
            if calls:
                yield _end(calls[-1])
            sure = (len(calls), begun)
            at, call = yield from _call(said, at, name)
            calls.append(call)
            at = yield from run(said, at, BLANK)
            mark = said.text[at : at + 1]
            if mark not in ("]", ","):
                raise NoCall
            at += mark == ","
    except NoCall:
        count, end = sure
        if not count:
            raise
        return end, tuple(calls[:count])


def _head(said: Said, start: int, known: Mapping[str, str] | None = None) -> Reader[tuple[str, int]]:
    """The name of a call in Python, and where its bracket is; behind that, a first argument begins or it closes.

    known: those names that it can be, and what stands for them.
    """
    end = yield from run(said, start, _WORD)
    name = said.text[start:end]
    if known is not None:
        name = known.get(name) or no_call()
    at = yield from run(said, end, BLANK)
    if not NAME.fullmatch(name) or not said.allows(name) or said.text[at : at + 1] != "(":
        raise NoCall
    first = yield from run(said, at + 1, BLANK)
    if said.text[first : first + 1] != ")":
        yield from _key(said, first)
    return name, at


def _call(said: Said, at: int, name: str) -> Reader[tuple[int, ToolCall]]:
    """A call whose bracket is at `at`, and where it ends. It is told but for its end."""
    yield CallPart(name)
    arguments = dict[str, Any]()
    mark = "("
    while mark != ")":
        at = yield from run(said, at + 1, BLANK)
        if said.text[at : at + 1] == ")":
            break
        at = yield from _argument(said, at, arguments)
        mark = said.text[at]
    return at + 1, ToolCall(name, arguments)


def _key(said: Said, start: int) -> Reader[tuple[str | None, int]]:
    """The name of an argument, None for `**`, and where its value begins."""
    at = yield from run(said, start, _STARS)
    if at == start + 2:
        return None, at
    end = yield from run(said, start, _WORD)
    name = said.text[start:end]
    at = yield from run(said, end, BLANK)
    if not NAME.fullmatch(name) or said.text[at : at + 1] != "=":
        raise NoCall
    return name, at + 1


def _argument(said: Said, start: int, arguments: dict[str, Any]) -> Reader[int]:
    """One argument, or several as `**{…}`, is added to others; where the comma or bracket behind it is."""
    name, at = yield from _key(said, start)
    at = yield from run(said, at, BLANK)
    if name is not None:
        yield _begin(name, arguments)
        at, arguments[name] = yield from value(said, at, PYTHON, told=True)
    else:
        at, many = yield from value(said, at, PYTHON)
        if not isinstance(many, dict) or many.keys() & arguments.keys():
            raise NoCall
        for key, one in many.items():
            begun = _begin(key, arguments)
            yield CallPart(arguments=begun.arguments + json.dumps(one, allow_nan=False))
            arguments[key] = one
    if said.text[at] not in ",)":
        raise NoCall
    return at


def _begin(key: str, before: dict[str, Any]) -> CallPart:
    """What stands before the value of an argument. NoCall if there is one of this name."""
    if key in before:
        raise NoCall
    return CallPart(arguments=f"{', ' if before else '{'}{json.dumps(key)}: ")


def _arguments(said: Said, start: int, name: str) -> Reader[tuple[int, dict[str, Any]]]:
    """The arguments of a call as a JSON object, and where it ends. It is told but for its end."""
    if said.text[start : start + 1] != "{":
        raise NoCall
    yield CallPart(name)
    return (yield from _members(said, start, partial(_member, said)))


def _member(said: Said, at: int, key: str, before: dict[str, Any]) -> Reader[tuple[int, Any]]:
    yield _begin(key, before)
    return (yield from value(said, at, JSON, told=True))


def _members(
    said: Said, at: int, read: Callable[[int, str, dict[str, Any]], Reader[tuple[int, Any]]]
) -> Reader[tuple[int, dict[str, Any]]]:
    """A JSON object whose bracket is at `at`, and where it ends. read: the value at a place, by its key and what stands
    before."""
    found, mark = dict[str, Any](), "{"
    while mark != "}":
        at = yield from run(said, at + 1, BLANK)
        if not found and said.text[at : at + 1] == "}":
            break
        if said.text[at : at + 1] != '"':
            raise NoCall
        end = yield from string_end(said, '"', at + 1)
        key = of_json(said.text[at:end])
        at = yield from run(said, end, BLANK)
        if key in found or said.text[at : at + 1] != ":":
            raise NoCall
        at = yield from run(said, at + 1, BLANK)
        at, found[key] = yield from read(at, key, found)
        at = yield from run(said, at, BLANK)
        mark = said.text[at : at + 1]
        if mark not in (",", "}"):
            raise NoCall
    return at + 1, found


def _json(said: Said) -> Reader[tuple[int, ToolCall]]:
    """A call as a JSON object. Its arguments are told while they are said if its name stands before them."""
    at = yield from run(said, 1, BLANK)
    end = yield from run(said, at, _KEY)
    if said.text[at:end] not in _JSON_KEYS:
        raise NoCall
    told = list[str]()

    def read(at: int, key: str, before: dict[str, Any], inner: bool = False) -> Reader[tuple[int, Any]]:
        is_object, name = said.text[at : at + 1] == "{", before.get("name")
        if key == "function" and not inner and told:
            raise NoCall
        if key == "function" and not inner and is_object:
            return (yield from _members(said, at, partial(read, inner=True)))
        is_call = before.get("type", "function") == "function" and not told and "function" not in before
        if key in ("parameters", "arguments") and is_object and is_call and isinstance(name, str) and said.allows(name):
            told.append(name)
            return (yield from _arguments(said, at, name))
        return (yield from value(said, at, JSON))

    end, found = yield from _members(said, 0, read)
    call = _call_of(found)
    if not said.allows(call.name):
        raise NoCall
    yield from [_end(call)] if told else _whole(call)
    return end, call


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
