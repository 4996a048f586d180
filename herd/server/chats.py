"""The routes of the page: chats, messages, contexts, what is read into them, settings, exports.

Programs ask `/v1`; what is here goes with the page and changes with it.
"""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import Field
from starlette.background import BackgroundTask

from herd import __version__, media
from herd.errors import HerdError
from herd.prompt.images import image_ids
from herd.server import exports, images
from herd.server.errors import ApiError
from herd.server.library import Library
from herd.server.readings import Readings
from herd.server.schemas import Body
from herd.server.state import Client, Server, client, server
from herd.server.talks import Talks, talks

MAX_TEXT = 8_000_000  # characters of a message
PAGE = 100  # messages that are fetched at a time
LINES = 2000  # of a source that are shown at a time
_ALIVE_S, _LOOK_S = 15.0, 1.0  # of silence after which a stream says that it lives; between looks if it is to end

router = APIRouter(prefix="/api", include_in_schema=False)
Parts = Annotated[Server, Depends(server)]
Said = Annotated[Talks, Depends(talks)]
Who = Annotated[Client, Depends(client)]
Title = Annotated[str, Field(max_length=200)]
Json = dict[str, Any]


def readings(request: Request) -> Readings:
    """What is being read at the server that a request came to."""
    found = request.app.state.readings
    assert isinstance(found, Readings)
    return found


Read = Annotated[Readings, Depends(readings)]


class NewChat(Body):
    """A chat that is to be made."""

    context: str | None = None


class ChangedChat(Body):
    """What is to be otherwise; context "": none."""

    title: Title | None = None
    context: str | None = None


class Shown(Body):
    """An image that was brought before (`POST /api/images`)."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    name: Annotated[str, Field(max_length=300)]


class Question(Body):
    """before: the message that it takes the place of, with all after it."""

    content: Annotated[str, Field(max_length=MAX_TEXT)]
    before: int | None = None
    images: Annotated[list[Shown], Field(max_length=images.MAX_IMAGES, default_factory=list)]


class Named(Body):
    """A name."""

    name: Annotated[str, Field(min_length=1, max_length=200)]


class Settings(Body):
    """How answers are made. None: as the model does by itself. Ranges are those of `herd.engine.Sampler`."""

    system: Annotated[str, Field(max_length=100_000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None
    theme: Literal["light", "dark"] | None = None


# What there is


@router.get("/state")
async def state(its: Parts, read: Read) -> Json:
    """All that the page shows beside a chat."""
    model = its.model
    return {
        "version": __version__,
        "model": its.settings.name,
        "images": model.vision is not None,
        "window": model.config.max_position_embeddings,
        "chats": [asdict(chat) for chat in its.library.chats()],
        "contexts": [await read.shown(entry) for entry in its.library.contexts()],
        "settings": its.library.settings(),
    }


@router.get("/events")
async def events(request: Request, said: Said) -> StreamingResponse:
    """What happens from now on, as server-sent events; the first one says that it is heard."""
    stopping = getattr(request.app.state, "stopping", lambda: False)
    return StreamingResponse(
        _stream(said, stopping), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _stream(said: Talks, stopping: Callable[[], bool]) -> AsyncIterator[str]:
    yield 'data: {"type": "hello"}\n\n'
    source, quiet = said.events(), 0.0
    waiting = asyncio.ensure_future(anext(source, None))
    try:
        while not stopping():
            done, _ = await asyncio.wait([waiting], timeout=_LOOK_S)
            quiet = 0.0 if done else quiet + _LOOK_S
            if quiet >= _ALIVE_S:  # a word now and then tells both sides that the other one is there
                quiet = 0.0
                yield ": alive\n\n"
            if done:
                if (event := waiting.result()) is None:
                    return
                yield f"data: {json.dumps(event)}\n\n"
                waiting = asyncio.ensure_future(anext(source, None))
    finally:
        waiting.cancel()


# Chats


@router.post("/chats", status_code=201)
async def new_chat(body: NewChat, its: Parts, said: Said) -> Json:
    """Make a chat."""
    chat = its.library.new_chat(context=body.context or None)
    said.tell_chat(chat)
    return asdict(chat)


@router.get("/chats/{id}")
async def show_chat(
    id: str,
    its: Parts,
    said: Said,
    before: Annotated[int | None, Query(ge=0, lt=1 << 62)] = None,
    most: Annotated[int, Query(ge=1, le=1000)] = PAGE,
) -> Json:
    """A chat and its last messages, or those before another one."""
    chat = its.library.chat(id)
    messages = its.library.messages(id, before=before, most=most + 1)
    shown = [said.shown(message) for message in messages[-most:]]
    return {"chat": asdict(chat), "messages": shown, "more": len(messages) > most}


@router.patch("/chats/{id}")
async def change_chat(id: str, body: ChangedChat, its: Parts, said: Said) -> Json:
    """Give a chat another title or context."""
    chat = its.library.change_chat(id, title=body.title, context=body.context)
    said.tell_chat(chat)
    return asdict(chat)


@router.delete("/chats/{id}", status_code=204)
async def delete_chat(id: str, its: Parts, said: Said) -> None:
    """Delete a chat."""
    await said.delete(its.library.chat(id))


@router.post("/chats/{id}/messages", status_code=201)
async def ask(id: str, body: Question, its: Parts, said: Said, who: Who) -> Json:
    """Ask something; the answer comes as events. The question is on disk when this returns."""
    if not (body.content.strip() or body.images):
        raise ApiError(400, "a question holds at least one character that is no blank, or an image", param="content")
    shown = [await asyncio.to_thread(_shown, its.library, image) for image in body.images]
    return said.shown(await said.say(its.library.chat(id), body.content, who, before=body.before, images=shown))


def _shown(library: Library, image: Shown) -> Json:
    its = images.sized(library.image(image.id)[1])
    return {"id": image.id, "name": image.name, "width": its.width, "height": its.height}


@router.post("/chats/{id}/again", status_code=201)
async def again(id: str, its: Parts, said: Said, who: Who) -> Json:
    """Answer the last question once more."""
    return said.shown(await said.again(its.library.chat(id), who))


@router.post("/chats/{id}/stop", status_code=204)
async def stop(id: str, its: Parts, said: Said) -> None:
    """Stop the answer that is being written."""
    await said.stop(its.library.chat(id))


@router.delete("/chats/{id}/messages/{message}", status_code=204)
async def cut(id: str, message: int, its: Parts, said: Said) -> None:
    """Delete a message and all after it."""
    await said.cut(its.library.chat(id), message)


# Images


@router.post("/images", status_code=201)
async def add_image(file: UploadFile, its: Parts) -> Json:
    """Bring an image that a question will show; errors say at once what is wrong with it."""
    if its.model.vision is None:
        raise ApiError(400, f"{its.settings.name} reads no images: it has no image encoder", param="file")
    data = await file.read(images.MAX_BYTES + 1)
    seen = images.sized(data, "file")
    tokens = await asyncio.to_thread(_tokens, its, data)
    id = await asyncio.to_thread(its.library.add_image, seen.kind, data)
    return {"id": id, "width": seen.width, "height": seen.height, "tokens": tokens}


def _tokens(its: Server, data: bytes) -> int:
    """Tokens of an image in a prompt. SourceError where its pixels cannot be read."""
    assert its.model.vision is not None
    cfg = its.model.vision.config
    with its.looking:
        tiles = media.cut(media.open_image(data), cfg)
    return len(image_ids(its.model.tokenizer.special_tokens, tiles.rows, tiles.columns, cfg.tokens_per_tile))


@router.get("/images/{id}")
async def image(id: str, its: Parts) -> Response:
    """An image as it was brought."""
    kind, data = await asyncio.to_thread(its.library.image, id)
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=31536000, immutable"})


# Contexts


@router.post("/contexts", status_code=201)
async def new_context(body: Named, its: Parts, read: Read) -> Json:
    """Make a context."""
    id = await asyncio.to_thread(its.contexts.create, body.name)
    return await read.tell(id)


@router.get("/contexts/{id}")
async def show_context(id: str, its: Parts, read: Read) -> Json:
    """A context with its sources and what was skipped."""
    return await read.whole(its.library.context(id))


@router.patch("/contexts/{id}")
async def rename_context(id: str, body: Named, its: Parts, read: Read) -> Json:
    """Give a context another name."""
    its.library.rename_context(id, body.name)
    return await read.tell(id)


@router.delete("/contexts/{id}", status_code=204)
async def delete_context(id: str, its: Parts, said: Said) -> None:
    """Delete a context with its files; its chats stay."""
    await its.contexts.delete(id)
    said.tell({"type": "context deleted", "context": id})


@router.post("/contexts/{id}/files", status_code=202)
async def add_files(
    id: str, files: list[UploadFile], names: Annotated[list[str], Form()], its: Parts, read: Read
) -> Json:
    """Upload files under their names (paths from a folder on) and begin to read them; progress comes as events."""
    entry = its.library.context(id)
    if len(files) != len(names):
        raise ApiError(400, f"{len(files):,} files came with {len(names):,} names; send one for each", param="names")
    await asyncio.to_thread(read.keep, id, files, names)
    return await read.shown(entry)


@router.delete("/contexts/{id}/files", status_code=202)
async def remove_file(id: str, name: Annotated[str, Query(max_length=4096)], its: Parts, read: Read) -> Json:
    """Take out a source, or a folder of them."""
    entry = its.library.context(id)
    await read.remove(id, name)
    return await read.shown(entry)


@router.get("/contexts/{id}/source")
async def source(
    id: str,
    name: Annotated[str, Query(max_length=10_000)],
    its: Parts,
    line: Annotated[int, Query(ge=1, lt=1 << 40)] = 1,
) -> Json:
    """The lines of a source around one of them, as the model read them."""
    context = await asyncio.to_thread(its.contexts.now, id)
    first = max(1, line - LINES // 2)
    lines, last = await asyncio.to_thread(context.lines, name, first, first + LINES)
    return {"name": name, "first": first, "lines": lines, "last": last}


# Settings and copies


@router.put("/settings")
async def change_settings(body: Settings, its: Parts, said: Said) -> Json:
    """Set those that are given; null: back to what it is without."""
    its.library.set({name: getattr(body, name) for name in body.model_fields_set})
    settings = its.library.settings()
    said.tell({"type": "settings", "settings": settings})
    return settings


@router.get("/export")
async def export(its: Parts) -> FileResponse:
    """All chats, contexts and settings as one zip file."""
    scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=its.library.folder, prefix="export"))
    clean = BackgroundTask(shutil.rmtree, scratch, ignore_errors=True)
    try:
        await asyncio.to_thread(exports.export, its.library, scratch / "herd.zip")
    except BaseException:
        await clean()
        raise
    return FileResponse(scratch / "herd.zip", filename="herd.zip", media_type="application/zip", background=clean)


@router.post("/import", status_code=201)
async def import_(file: UploadFile, its: Parts, said: Said) -> Json:
    """Add what another server exported."""
    try:
        rows = await asyncio.to_thread(exports.import_, its.library, file.file)
    except HerdError as error:
        raise ApiError(400, str(error), param="file") from error
    said.tell({"type": "all"})
    return {"chats": len(rows.chats), "contexts": len(rows.contexts), "messages": len(rows.messages)}
