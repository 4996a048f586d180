"""Chat templates: Jinja in a sandbox, rendered so that user text cannot turn into a special token."""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from herd.errors import CheckpointError, PromptError

# A noncharacter of Unicode: never in text meant for interchange, so it can mark where user text must not join up.
_MARK = "\ufdd0"
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class ChatTemplate:
    """One compiled template and the special tokens it may write."""

    def __init__(self, source: str, special: Mapping[str, int], named: Mapping[str, str]):
        """named: texts the template may use as variables (`bos_token`, `eos_token`).

        CheckpointError if the template is not valid Jinja.
        """
        self._special = dict(special)
        self._named = dict(named)
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._heads = {token[:n] for token in special for n in range(1, len(token))}
        self._tails = {token[n:] for token in special for n in range(1, len(token))}
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = _to_json
        env.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from error

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> Iterator[tuple[str, int | None]]:
        """Rendered conversation as (text, None) and (special token, id) in order."""
        text = self._render(messages, add_generation_prompt, variables)
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > start:
                yield text[start : match.start()].replace(_MARK, ""), None
            yield match.group(), self._special[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:].replace(_MARK, ""), None

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        for message in messages:
            role = message.get("role")
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise PromptError(f"a message needs a role made of letters, such as 'user'; got {role!r}")
        try:
            return self._template.render(
                messages=[self._guard(dict(message)) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._named,
                **{name: self._guard(value) for name, value in variables.items()},
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refused the conversation: {error}") from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PromptError(f"the chat template cannot render these messages: {error!r}") from error

    def _guard(self, value: Any) -> Any:
        """The same value with every special token inside its texts broken up by a mark."""
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value

    def _guard_text(self, text: str) -> str:
        text = text.replace(_MARK, "")
        if self._pattern is None:
            return text
        text = self._pattern.sub(lambda match: match.group()[0] + _MARK + match.group()[1:], text)
        longest = max(map(len, self._special))
        # Half a token at either end could be completed by the template or by a neighbouring text.
        if any(text[-n:] in self._heads for n in range(1, min(longest, len(text) + 1))):
            text += _MARK
        if any(text[:n] in self._tails for n in range(1, min(longest, len(text) + 1))):
            text = _MARK + text
        return text


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """The `tojson` that chat templates are written for: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
