"""`/v1/contexts`: what the model has read."""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, File, Query, Request, UploadFile
from fastapi.responses import PlainTextResponse

from herd.api import ReadReport
from herd.server.contexts import Info
from herd.server.errors import told
from herd.server.schemas import ContextRequest
from herd.server.state import Server, server

router = APIRouter(prefix="/v1/contexts")
_Kept: TypeAlias = "tempfile.TemporaryDirectory[str]"
_reads = set[asyncio.Task[None]]()  # that nobody waits for


@router.post("", status_code=201)
def create(body: ContextRequest, request: Request) -> dict[str, Any]:
    """An empty context."""
    its = server(request)
    id = its.contexts.create(body.name, kv=body.kv, reading=body.reading)
    return info_json(its.contexts.show(id))


@router.get("")
def listed(request: Request) -> dict[str, Any]:
    """All contexts, the newest first."""
    return {"object": "list", "data": [info_json(info) for info in server(request).contexts.all()]}


@router.get("/{id}")
def show(id: str, request: Request) -> dict[str, Any]:
    """One context with its sources, and what was found and not read."""
    its = server(request)
    info = its.contexts.show(id)
    if info.error is not None:
        return {**info_json(info), "files": [], "skipped": []}
    context = its.contexts.now(id)
    files = [{"name": source.name, "tokens": source.tokens} for source in context.sources]
    skipped = [{"name": name, "reason": reason} for name, reason in context.skipped]
    return {**info_json(info), "files": files, "skipped": skipped, "too_long": context.too_long}


@router.delete("/{id}")
async def delete(id: str, request: Request) -> dict[str, Any]:
    """Delete a context with its files."""
    await server(request).contexts.delete(id)
    return {"id": id, "object": "context.deleted", "deleted": True}


@router.post("/{id}/sources")
async def add(
    id: str,
    request: Request,
    files: Annotated[list[UploadFile], File(description="Files; a file's name may be its path in a folder.")],
    wait: Annotated[bool, Query(description="Answer when all is read, not when all is there.")] = True,
) -> dict[str, Any]:
    """Add up to 1,000 files and read them. What cannot be read is listed with its reason."""
    its = server(request)
    await asyncio.to_thread(its.contexts.show, id)
    kept = tempfile.TemporaryDirectory(prefix="herd-")
    named = await asyncio.to_thread(_keep, files, Path(kept.name))
    task = asyncio.create_task(_read(its, id, named, kept))
    if wait:
        return await asyncio.shield(task)
    quiet = asyncio.create_task(_quietly(task))
    _reads.add(quiet)
    quiet.add_done_callback(_reads.discard)
    return info_json(its.contexts.show(id))


@router.get("/{id}/sources/{name:path}")
def source(id: str, name: str, request: Request) -> PlainTextResponse:
    """The text of a source, as it was read."""
    text = server(request).contexts.text(id, name)
    return PlainTextResponse(text, headers={"Content-Disposition": "attachment"})


@router.delete("/{id}/sources/{name:path}")
async def remove(id: str, name: str, request: Request) -> dict[str, Any]:
    """Take an uploaded file, or a folder of them, out of a context."""
    return report_json(await server(request).contexts.remove(id, name))


def info_json(info: Info) -> dict[str, Any]:
    """What is said of a context."""
    reading = None if info.reading is None else vars(info.reading)
    return {
        "id": info.id,
        "object": "context",
        "name": info.name,
        "created": info.created,
        "tokens": info.tokens,
        "sources": info.sources,
        "reading": reading,
        "error": info.error,
    }


def report_json(report: ReadReport) -> dict[str, Any]:
    """What a read did."""
    return {
        "object": "context.read",
        "sources": report.sources,
        "tokens": report.tokens,
        "read_tokens": report.read_tokens,
        "reused_tokens": report.reused_tokens,
        "skipped": [{"name": skip.name, "reason": skip.reason} for skip in report.skipped],
        "seconds": round(report.seconds, 3),
    }


def _keep(files: list[UploadFile], folder: Path) -> list[tuple[str, Path]]:
    """The files on disk, under numbers: their names are nobody's."""
    named = []
    for number, file in enumerate(files):
        place = folder / str(number)
        with place.open("wb") as out:
            while piece := file.file.read(1 << 20):
                out.write(piece)
        named.append((file.filename or "", place))
    return named


async def _read(its: Server, id: str, named: list[tuple[str, Path]], kept: _Kept) -> dict[str, Any]:
    with kept:
        return report_json(await its.contexts.add(id, named))


async def _quietly(task: "asyncio.Task[dict[str, Any]]") -> None:
    try:
        await task
    except Exception as error:
        told(error)  # logs what is the server's fault
