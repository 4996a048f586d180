"""Chats of the page as they go on: answers are written whether somebody looks or not, and told to all who look.

Whoever looks gets events. Of an answer being written, each event carries the number of the piece, and what can be
fetched carries the number of the last: so nobody misses or doubles a piece, whenever they come.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import Request
from torch import Tensor

from herd.engine import Sampler, Token
from herd.errors import HerdError
from herd.prompt.ask import ask_prompt
from herd.server.asks import Answers, Ask, End
from herd.server.conversations import Conversations
from herd.server.errors import ApiError, told
from herd.server.images import MAX_IMAGES
from herd.server.library import Chat, Message, State
from herd.server.say import Spec, Voice, saying
from herd.server.state import Client, Server

SAVE_S = 1.0  # between two saves of an answer that is being written
LOOK_S = 1.0  # between two looks whether others have written to the library
MAX_TOKENS = 1024  # of an answer, unless the settings say otherwise
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_TITLE = 60  # characters
_log = logging.getLogger("herd.server")
Event = dict[str, Any]


@dataclass(eq=False)
class _Talk:
    """An answer on its way: its message, the pieces it came in so far, and whether it is to stop."""

    ask: Ask
    answers: Answers | None = None
    message: Message = field(default_factory=lambda: Message(0, "", "assistant", "", "writing"))
    pieces: int = 0
    ids: list[int] = field(default_factory=list)
    first: float | None = None
    stopping: bool = False
    saved: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.perf_counter)
    task: asyncio.Task[None] | None = None

    @property
    def plain(self) -> bool:
        """Whether it goes on from the conversation alone, and not from a context."""
        return not self.ask.contexts

    def stopped(self, token: Token) -> bool:
        """See `Ask`."""
        return self.stopping

    def count(self, tokens: Sequence[Token]) -> None:
        """These tokens came."""
        if self.first is None:
            self.first = time.perf_counter() - self.began
        self.ids += [token.id for token in tokens]

    @property
    def measured(self) -> Event:
        """Its tokens and times."""
        first = None if self.first is None else round(self.first, 3)
        seconds = round(time.perf_counter() - self.began, 3)
        return {"prompt_tokens": len(self.ask.ids), "tokens": len(self.ids), "first_s": first, "seconds": seconds}


class Talks:
    """All chats of a server. Belongs to its event loop."""

    def __init__(self, server: Server) -> None:
        self._server, self._library = server, server.library
        self._conversations = Conversations(server.library.folder / "conversations", server.model)
        self._answers: dict[str, _Talk] = {}  # by chat
        self._begins: set[str] = set()
        self._lookers: set[asyncio.Queue[Event]] = set()
        self._saving: dict[str, asyncio.Task[None]] = {}
        self._watch = asyncio.create_task(self._others())

    # What is looked at

    def shown(self, message: Message) -> Event:
        """A message as it is now."""
        talk = self._answers.get(message.chat)
        if talk is not None and talk.message.id == message.id:
            return {**asdict(talk.message), "pieces": talk.pieces}
        return {**asdict(message), "pieces": 0}

    async def events(self) -> AsyncIterator[Event]:
        """What happens from now on, to all chats and contexts."""
        mine: asyncio.Queue[Event] = asyncio.Queue(10_000)
        self._lookers.add(mine)
        try:
            while True:
                event = await mine.get()
                yield event
                if event["type"] == "lost":
                    return
        finally:
            self._lookers.discard(mine)

    def tell(self, event: Event) -> None:
        """Tell all who look. Who does not keep up is told to come again."""
        for looker in tuple(self._lookers):
            if looker.full():
                self._lookers.discard(looker)
                looker.get_nowait()
                looker.put_nowait({"type": "lost"})
            else:
                looker.put_nowait(event)

    def tell_chat(self, chat: Chat) -> None:
        """A chat is new or has changed."""
        self.tell({"type": "chat", "chat": asdict(chat)})

    async def _others(self) -> None:
        """Have all who look see what others write, such as `herd chat`."""
        seen = self._library.version
        while True:
            await asyncio.sleep(LOOK_S)
            with suppress(HerdError):
                if (now := self._library.version) != seen:
                    seen = now
                    self.tell({"type": "all"})

    # What is said

    async def say(
        self,
        chat: Chat,
        content: str,
        client: Client,
        *,
        before: int | None = None,
        images: Sequence[Mapping[str, Any]] = (),
    ) -> Message:
        """Ask something, and begin to answer; before: in place of this message and all after it; images: what it shows,
        each `{"id", "name", "width", "height"}`. The answer's message.

        What cannot be answered, such as a question too long for the model, changes nothing.
        """
        with self._beginning(chat.id):
            earlier = self._library.messages(chat.id, before=before)
            question = Message(0, chat.id, "user", content, detail={"images": [*images]} if images else {})
            talk = await self._submit(chat, [*earlier, question], client)
            title = title_of(content or images[0]["name"]) if not (earlier or chat.title) else None
            return await self._begin(chat, question, talk, before, title)

    async def again(self, chat: Chat, client: Client) -> Message:
        """Answer the last question once more."""
        with self._beginning(chat.id):
            messages = self._library.messages(chat.id)
            last = messages.pop() if messages and messages[-1].role == "assistant" else None
            if not messages or messages[-1].role != "user":
                raise ApiError(400, "this chat ends with no question that could be answered again")
            talk = await self._submit(chat, messages, client)
            return await self._begin(chat, None, talk, None if last is None else last.id, None)

    async def stop(self, chat: Chat) -> None:
        """Stop the answer that is being written, if there is one; what was written stays."""
        talk = self._answers.get(chat.id)
        if talk is None or talk.task is None:
            return
        talk.stopping = True
        # An answer that has begun ends with its next token, so that what was seen is kept; others end at once.
        if not (talk.plain and talk.ids):
            talk.task.cancel()
        await asyncio.wait([talk.task])

    async def cut(self, chat: Chat, first: int) -> None:
        """Delete a message and all after it."""
        await self.stop(chat)
        self._library.cut(chat.id, first)
        self.tell({"type": "cut", "chat": chat.id, "first": first})

    async def delete(self, chat: Chat) -> None:
        """Delete a chat with all that is kept of it."""
        await self.stop(chat)
        if chat.id in self._saving:
            await asyncio.wait([self._saving[chat.id]])
        self._library.delete_chat(chat.id)
        await asyncio.to_thread(self._conversations.forget, chat.id)
        self.tell({"type": "deleted", "chat": chat.id})

    async def close(self, seconds: float) -> None:
        """Wait so long for answers, and stop the others; what was written of them is kept."""
        self._watch.cancel()
        tasks = [talk.task for talk in self._answers.values() if talk.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for task in tasks:
            task.cancel()
        if waiting := [*tasks, *self._saving.values()]:
            await asyncio.wait(waiting)
        self.tell({"type": "lost"})

    @contextmanager
    def _beginning(self, chat: str) -> Iterator[None]:
        """One answer at a time is written in a chat."""
        if chat in self._answers or chat in self._begins:
            raise ApiError(409, "an answer is being written in this chat; stop it, or wait for its end")
        self._begins.add(chat)
        try:
            yield
        finally:
            self._begins.discard(chat)

    async def _submit(self, chat: Chat, messages: list[Message], client: Client) -> _Talk:
        """Ask the service. Errors if it cannot be asked."""
        ask = await self._ask(chat, messages, client)
        talk = _Talk(ask)
        if talk.plain:
            await self._recall(chat.id, ask)
        talk.answers = await self._server.service.submit(replace(ask, stopped=talk.stopped, here=True))
        return talk

    async def _begin(
        self, chat: Chat, asked: Message | None, talk: _Talk, cut: int | None, title: str | None
    ) -> Message:
        assert talk.answers is not None
        try:
            if title is not None:
                self._library.change_chat(chat.id, title=title)
            content, detail = (None, None) if asked is None else (asked.content, asked.detail)
            question, message = self._library.add_turn(chat.id, content, cut, detail)
        except BaseException:
            async with talk.answers:  # which cancels it
                raise
        if cut is not None:
            self.tell({"type": "cut", "chat": chat.id, "first": cut})
        source = {} if talk.plain else {"context": chat.context, "quoted": talk.ask.question is not None}
        talk.message = message = replace(message, detail=source)
        self._answers[chat.id] = talk
        for new in (question, message):
            if new is not None:
                self.tell({"type": "message", "message": self.shown(new)})
        self.tell_chat(self._library.chat(chat.id))
        talk.task = asyncio.create_task(self._answer(chat, talk))
        return message

    async def _ask(self, chat: Chat, messages: list[Message], client: Client) -> Ask:
        """What the service is asked."""
        settings, tokenizer = self._library.settings(), self._server.model.tokenizer
        most = int(settings.get("max_tokens", MAX_TOKENS))
        if chat.context is not None:
            if messages[-1].images:
                raise ApiError(400, "contexts are asked without images; take them out, or ask in a chat without one")
            context, question = self._server.contexts.now(chat.context), messages[-1].content
            ids = await asyncio.to_thread(ask_prompt, tokenizer, question)
            held = question if tokenizer.byte_level else None
            return Ask(ids, most, contexts=(context,), question=held, client=client.turn)
        turns = [{"role": m.role, "content": _content(m)} for m in messages if m.content or m.images]
        if system := settings.get("system"):
            turns.insert(0, {"role": "system", "content": system})
        ids = await asyncio.to_thread(tokenizer.chat, turns)
        ids, features = await asyncio.to_thread(self._look, ids, [id for m in messages for id in m.images])
        sampler = Sampler(**{name: settings[name] for name in SAMPLED if name in settings})
        return Ask(ids, most, sampler, images=features, client=client.turn, scope=client.scope)

    def _look(self, ids: list[int], shown: Sequence[str]) -> tuple[list[int], list[Tensor]]:
        """A prompt with the tokens of its images, and their features."""
        if not shown:
            return ids, []
        if len(shown) > MAX_IMAGES:
            raise ApiError(
                400,
                f"this chat would show {len(shown):,} images; it may show {MAX_IMAGES}: begin another one",
                param="images",
            )
        files = [self._library.image(id)[1] for id in shown]
        with self._server.looking:
            return self._server.model.look(ids, files)

    # The answer

    async def _answer(self, chat: Chat, talk: _Talk) -> None:
        detail = dict(talk.message.detail)
        state: State = "done"
        try:
            assert talk.answers is not None
            async with talk.answers as answers:
                async for said in saying(answers, [Voice(self._server.model.tokenizer, Spec())]):
                    talk.count(said.tokens)
                    self._piece(talk, "".join(part for part in said.parts if isinstance(part, str)))
                    if said.end is not None:
                        detail |= _told(said.end)
                        if talk.plain:
                            self._saving[chat.id] = asyncio.create_task(self._remember(chat.id, talk))
        except asyncio.CancelledError:
            talk.stopping = True
        except Exception as error:
            state, detail["error"] = "failed", str(told(error))
        state = "stopped" if talk.stopping and state == "done" else state
        message = talk.message = replace(talk.message, state=state, detail=detail | talk.measured)
        try:
            self._library.write(message.id, message.content, message.state, message.detail)
        except HerdError:  # such as a full disk; what was saved before it is there
            _log.exception("the end of an answer was not saved")
        del self._answers[chat.id]
        self.tell({"type": "message", "message": {**asdict(message), "pieces": talk.pieces}})

    def _piece(self, talk: _Talk, text: str) -> None:
        if not text:
            return
        talk.pieces += 1
        message = talk.message = replace(talk.message, content=talk.message.content + text)
        self.tell({"type": "piece", "chat": message.chat, "message": message.id, "piece": talk.pieces, "text": text})
        if (now := time.monotonic()) - talk.saved > SAVE_S:
            talk.saved = now
            with suppress(HerdError):  # it is written once more at its end
                self._library.write(message.id, message.content, detail=message.detail)

    async def _recall(self, chat: str, ask: Ask) -> None:
        """Have what the model has seen of a prompt in memory, as far as it is on disk."""
        if chat in self._saving:
            await self._saving[chat]
        service, scope = self._server.service, ask.scope
        names = await asyncio.to_thread(service.names, ask)
        known = await service.call(partial(service.known, scope, names))
        try:
            found = await asyncio.to_thread(self._conversations.load, names, known)
        except sqlite3.Error:  # such as a full disk
            _log.exception("what the model has seen of a chat was not read; it will be computed again")
            return
        if found[1]:
            await service.call(partial(service.add, scope, *found))

    async def _remember(self, chat: str, talk: _Talk) -> None:
        """Save what the model has seen of a chat. Without it, a chat would only go on more slowly."""
        service, ask = self._server.service, talk.ask
        try:
            names = await asyncio.to_thread(service.names, ask)
            blocks = await service.call(partial(service.blocks, ask.scope, [*names, *talk.ids]))
            await asyncio.to_thread(self._conversations.write, chat, blocks)
        except Exception:  # such as a full disk
            _log.exception("what the model has seen of a chat was not saved; it will be computed again")
        finally:
            self._saving.pop(chat, None)


def talks(request: Request) -> Talks:
    """Those of the server that a request came to."""
    found = request.app.state.talks
    assert isinstance(found, Talks)
    return found


def _content(message: Message) -> str | list[dict[str, str]]:
    """What the chat template gets of a message."""
    if not message.images:
        return message.content
    text = [{"type": "text", "text": message.content}] if message.content else []
    return [*({"type": "image"} for _ in message.images), *text]


def title_of(content: str) -> str:
    """A title for a chat that begins so."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), "")
    return line if len(line) <= _TITLE else line[: _TITLE - 1].rstrip() + "…"


def _told(end: End) -> Event:
    citations = [{"source": c.source, "lines": list(c.lines), "weight": c.weight} for c in end.citations]
    return {"finish": end.finish, "cached_tokens": end.cached_tokens, "citations": citations}
