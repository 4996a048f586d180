"""`herd context`: look after a context folder. None of these needs the model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.output import JsonFlag, KvOption, examples, interruptible, note, print_json
from herd.cli.report import print_skipped

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look after a context folder: show, verify, compact, export, import, merge. None of these needs the model.",
    epilog=examples(
        "herd context show ./ctx",
        "herd context verify ./ctx --json",
        "herd context export ./ctx ctx.herd",
        "herd context merge ./ctx ./other",
    ),
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The context.")]
UNTOUCHED = "the context is as it was"


@app.command(epilog=examples("herd context show ./ctx", "herd context show ./ctx --json"))
def show(folder: Folder, as_json: JsonFlag = False) -> None:
    """List what was read: every source with its tokens, and what was skipped."""
    from herd.context.segment import bytes_per_token
    from herd.context.store import Store

    store = Store.open(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    result: dict[str, Any] = {
        "dir": str(folder),
        "tokens": store.tokens,
        "chunks": len(store.chunks),
        "chunk_tokens": store.spec.chunk,
        "kv": store.spec.dtype,
        "global_layers": store.spec.layers,
        "reading": store.spec.reading,
        "kv_bytes_per_token": bytes_per_token(store.spec),
        "bytes": size,
        "model": store.spec.fingerprint,
        "sources": [{"source": s.name, "tokens": s.tokens, "chunks": s.chunks} for s in store.sources],
        "skipped": [{"source": name, "reason": reason} for name, reason in store.skipped],
    }
    if as_json:
        print_json(result)
        return
    for source in store.sources:
        print(f"{source.tokens:>12,}  {source.name}")
    layers = f" of {store.spec.layers} global layers, {store.spec.reading}" if store.spec.layers > 1 else ""
    sources = f"{len(store.sources):,} sources in {size:,} bytes"
    print(f"{store.tokens:>12,}  tokens of {sources}, K/V as {store.spec.dtype}{layers}")
    print_skipped(store.skipped)


@app.command(epilog=examples("herd context verify ./ctx"))
def verify(folder: Folder, as_json: JsonFlag = False) -> None:
    """Check every byte. Problems are listed on stderr with the fix, and the exit code is 1."""
    from herd.context.maintain import verify

    found = verify(folder)
    if as_json:
        print_json({**vars(found), "ok": not found.problems})
    for problem in found.problems:
        note(f"damaged: {problem}")
    if found.problems:
        raise typer.Exit(1)
    if not as_json:
        print(f"{folder} is sound: {found.tokens:,} tokens, {found.chunks:,} chunks, {found.sources:,} sources")


@app.command(epilog=examples("herd context compact ./ctx", "herd context compact ./ctx --kv int4"))
def compact(folder: Folder, kv: KvOption = None, as_json: JsonFlag = False) -> None:
    """Drop damaged chunks and those no source uses, and join small segments. Answers stay the same.

    With --kv keys and values are also converted to a narrower format, for which answers may change.
    """
    from herd.context.maintain import compact

    with interruptible(UNTOUCHED):
        done = compact(folder, kv)
    if as_json:
        print_json(vars(done))
        return
    print(f"{done.bytes_before:,} bytes before, {done.bytes_after:,} after; {done.dropped_chunks:,} chunks dropped")
    for source in done.damaged_sources:
        note(f"damaged and dropped, read it again: {source}")


@app.command(epilog=examples("herd context merge ./ctx ./other"))
def merge(
    folder: Folder,
    others: Annotated[list[Path], typer.Argument(metavar="OTHER...", help="Contexts of the same model.")],
    as_json: JsonFlag = False,
) -> None:
    """Copy all sources of other contexts into DIR; nothing is read again."""
    from herd.context.maintain import merge

    with interruptible("what was merged so far is kept; the same command goes on from there"):
        copied = sum(merge(folder, other) for other in others)
    if as_json:
        print_json({"dir": str(folder), "copied_tokens": copied})
    else:
        print(f"{copied:,} tokens copied into {folder}")


@app.command(epilog=examples("herd context export ./ctx ctx.herd"))
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write; it must not exist.")],
    as_json: JsonFlag = False,
) -> None:
    """Write a context to one file, with checksums. Paths of this machine are left out."""
    from herd.context.archive import export

    with interruptible(f"{file} was not written"):
        size = export(folder, file)
    if as_json:
        print_json({"file": str(file), "bytes": size})
    else:
        print(f"{file}: {size:,} bytes")


@app.command("import", epilog=examples("herd context import ctx.herd ./ctx"))
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive that export wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    as_json: JsonFlag = False,
) -> None:
    """Unpack an archive into a new folder, if every part of it proves sound."""
    from herd.context.archive import import_

    with interruptible(f"{folder} was not written"):
        store = import_(file, folder)
    result = {"dir": str(folder), "tokens": store.tokens, "sources": len(store.sources)}
    if as_json:
        print_json(result)
    else:
        print(f"{folder}: {store.tokens:,} tokens of {len(store.sources):,} sources")
