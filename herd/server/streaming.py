"""How answers leave: whole, or as server-sent events. Where a client goes, what it asked for ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from herd.server.asks import Answers
from herd.server.errors import ApiError, told

T = TypeVar("T")
DONE = "data: [DONE]\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to; cancels it when the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client is gone")
        return task.result()
    finally:
        for its in (task, watch):
            its.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events about some answers, which are cancelled if it ends before them."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(
            guarded(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        async with self._answers:
            await super().__call__(scope, receive, send)


def event(value: object, name: str | None = None) -> str:
    """One event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def guarded(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Events, and the error that ends them if one does."""
    try:
        async for one in events:
            yield one
    except Exception as error:
        yield event(told(error).body)
