"""Chat templates: Jinja in a sandbox, rendered so that user text cannot turn into a special token.

A template comes with a model, from anyone. It is rendered in a process of its own, with caps on time, memory and size.
"""

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import jinja2

from herd.errors import CheckpointError, PromptError
from herd.prompt.render import environment
from herd.prompt.special import Special

SECONDS = 10.0  # that a template may take
LONGEST = 1_000_000  # characters of a template
# A noncharacter of Unicode: never in text meant for interchange, so it can mark where user text must not join up.
_MARK = "\ufdd0"
_ESCAPED = r"\ufdd0"  # as Python and JSON may print it
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class ChatTemplate:
    """One template and the special tokens it may write."""

    def __init__(self, source: str, special: Mapping[str, int], named: Mapping[str, str], seconds: float = SECONDS):
        """named: texts the template may use as variables (`bos_token`, `eos_token`).

        CheckpointError if the template is not valid Jinja.
        """
        self._named = dict(named)
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._longest = max(map(len, special), default=0)
        self._heads = {token[:n] for token in special for n in range(1, len(token))}
        self._tails = {token[n:] for token in special for n in range(1, len(token))}
        if len(source) > LONGEST:
            raise CheckpointError(f"the chat template has {len(source):,} characters, at most {LONGEST:,} can be read")
        try:
            environment().parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from error
        self._renderer = _Renderer(source, seconds)

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> Iterator[str]:
        """The rendered conversation, cut where there are special tokens."""
        text = self._render(messages, add_generation_prompt, variables)
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > start:
                yield _unmarked(text[start : match.start()])
            yield Special(match.group())
            start = match.end()
        if start < len(text):
            yield _unmarked(text[start:])

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        for message in messages:
            role = message.get("role")
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise PromptError(f"a message needs a role made of letters, such as 'user'; got {role!r}")
        try:
            guarded = {name: self._guard(value) for name, value in variables.items()}
            guarded["messages"] = [{**self._guard(_plain(m)), "role": m["role"]} for m in messages]
            return self._renderer.render({"add_generation_prompt": add_generation_prompt, **self._named, **guarded})
        except RecursionError as error:
            raise PromptError("a message is nested too deeply for a chat template") from error

    def _guard(self, value: Any) -> Any:
        """The same value with every special token inside its texts broken up by a mark."""
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise PromptError(f"a chat template cannot be given a {type(value).__name__}, only what JSON can say")

    def _key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise PromptError(f"a chat template cannot be given the key {key!r}, only texts")
        return self._guard_text(key)

    def _guard_text(self, text: str) -> str:
        text = text.replace(_MARK, "").replace(_ESCAPED, _ESCAPED[:2] + _MARK + _ESCAPED[2:])
        if self._pattern is None:
            return text
        text = self._pattern.sub(lambda match: match.group()[0] + _MARK + match.group()[1:], text)
        # Half a token at either end could be completed by the template or by a neighbouring text.
        if any(text[-n:] in self._heads for n in range(1, min(self._longest, len(text) + 1))):
            text += _MARK
        if any(text[:n] in self._tails for n in range(1, min(self._longest, len(text) + 1))):
            text = _MARK + text
        return text


def _unmarked(text: str) -> str:
    return text.replace(_ESCAPED, "").replace(_MARK, "")


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of whose images only the places are left."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    image = {"type": "image"}
    return {
        **message,
        "content": [image if isinstance(p, Mapping) and p.get("type") == "image" else p for p in content],
    }


class _Renderer:
    """A process that renders one template. It is started at the first request, and anew once it has ended."""

    def __init__(self, source: str, seconds: float):
        self._source, self._seconds = source, seconds
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """PromptError if the template refuses the variables, fails or goes beyond its caps."""
        said = json.dumps(variables)
        # Templates say every text about once; no memory is needed but for what goes in and comes out.
        caps = {"chars": 4 * len(said) + 1_000_000, "bytes": (1 << 29) + 32 * len(said), "seconds": self._seconds}
        with self._lock:
            try:
                if self._child is None or self._child.poll() is not None:
                    self._start()
                self._socket.send_bytes(json.dumps(caps).encode())
                self._socket.send_bytes(said.encode())
                if not self._socket.poll(self._seconds):
                    raise PromptError(f"the chat template was not done in {self._seconds:g} s; give the model another")
                reply = json.loads(self._socket.recv_bytes())
            except BaseException as error:  # such as KeyboardInterrupt: the reply would be taken for that of the next
                if self._child is not None:
                    self._end()
                    self._child = None
                if isinstance(error, EOFError | OSError):
                    raise PromptError("the process of the chat template ended; give the model another") from error
                raise
        if "error" in reply:
            raise PromptError(f"the chat template {' '.join(reply['error'].split())}")
        return str(reply["text"])

    def _start(self) -> None:
        self._socket, theirs = Pipe()
        program = Path(__file__).with_name("render.py")
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(program), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt of this process is none of that one
            )
        self._end = weakref.finalize(self, _end, self._child, self._socket)
        self._socket.send_bytes(self._source.encode("utf-8", "replace"))


def _end(child: "subprocess.Popen[bytes]", socket: Connection) -> None:
    socket.close()
    child.kill()
    child.wait()
