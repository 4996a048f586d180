"""What `herd chat` does with a line: asks, or follows a command such as /attach."""

import io
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import herd
from herd.cli.output import Interrupted, note
from herd.cli.progress import reading
from herd.cli.report import TextOut, citation_json, print_citations, print_report, print_skipped
from herd.engine import Engine, Request, Sampler, stream
from herd.errors import HerdError, LibraryError, PromptError, SourceError
from herd.media import open_image
from herd.server.conversations import Conversations
from herd.server.errors import ApiError
from herd.server.images import sized
from herd.server.library import Chat, Library

COMMANDS = {
    "/attach PATH...": "read files and folders, to be asked about them; show images with the next line",
    "/sources": "list what was read",
    "/save FILE": "write the conversation to a new Markdown file",
    "/help": "show this",
}


class Kept:
    """Where conversations are kept: the data folder of `herd serve`, whose page shows them, too."""

    def __init__(self, data: Path, model: herd.Model) -> None:
        self.library = Library(data)
        self._model, self._files = model, Conversations(data / "conversations", model)
        self._engine = Engine(model.transformer, vision=model.vision)

    def generate(
        self,
        chat: str,
        ids: list[int],
        images: Sequence[bytes],
        most: int,
        sampler: Sampler,
        out: Callable[[str], None],
    ) -> str:
        """Go on with a chat from where the model was, now or in an earlier process; its keys and values are kept."""
        model, tokenizer, prefixes = self._model, self._model.tokenizer, self._engine.prefixes
        ids, features = model.look(ids, images)
        names = model.names(ids, features)
        self._engine.add("", *self._files.load(names, prefixes.known("", names)))
        self._engine.submit(Request(ids, most, sampler, tokenizer.eos_ids, images=features, names=names))
        text, said, chosen = tokenizer.stream(), list[str](), list[int]()
        for token in stream(self._engine):
            chosen.append(token.id)
            said.append("" if token.id in tokenizer.eos_ids else text.push(token.id))
            out(said[-1])
        said.append(text.finish())
        out(said[-1])
        self._files.write(chat, prefixes.blocks("", [*names, *chosen]))
        return "".join(said)

    def keep_image(self, path: Path, data: bytes) -> dict[str, Any]:
        """Keep an image, as PNG if it is of a kind that browsers do not show; what a message tells of it."""
        try:
            try:
                its = sized(data)
            except ApiError:
                copy = io.BytesIO()
                open_image(data).save(copy, "PNG")
                data = copy.getvalue()
                its = sized(data)
        except ApiError as error:
            raise SourceError(f"{path} cannot be kept with a chat: {error}") from error
        return {
            "id": self.library.add_image(its.kind, data),
            "name": path.name,
            "width": its.width,
            "height": its.height,
        }


class Talk:
    """A conversation in the terminal. kept None: nothing of it outlives the command."""

    def __init__(
        self,
        model: herd.Model,
        context: herd.Context | None,
        sampler: Sampler,
        most: int,
        quote: bool,
        kept: Kept | None,
    ) -> None:
        self.model, self.context, self.kept = model, context, kept
        self._sampler, self._most, self._quote = sampler, most, quote
        self._chat: Chat | None = None
        self._images: list[bytes] = []  # that the conversation shows
        self._next: list[tuple[Path, bytes]] = []  # that its next line shows
        self.turns: list[dict[str, Any]] = []

    def go_on(self) -> None:
        """Go on with the chat that changed last. LibraryError if there is none."""
        assert self.kept is not None
        library = self.kept.library
        if not (chats := library.chats()):
            raise LibraryError(f"there is no chat in {library.folder} to go on with; leave --continue out")
        self._chat = chats[0]
        for m in library.messages(chats[0].id):
            if m.content or m.images:
                self.turns.append(_turn(m.role, m.content, [image["name"] for image in m.detail.get("images", ())]))
                self._images += [library.image(id)[1] for id in m.images]
        if chats[0].context is not None and self.context is None:
            self.context = herd.Context.open(library.context_folder(chats[0].context) / "kv", self.model)
        note(f"going on with {chats[0].title or 'a chat'}: {len(self.turns):,} messages")

    def show(self, images: Sequence[Path]) -> None:
        """Show images with the next line. PromptError where they cannot be."""
        if images and self.model.vision is None:
            raise PromptError(f"{self.model.name} reads no images: it has no image encoder (given: {images[0]})")
        if images and self.context is not None:
            raise PromptError("contexts are asked without images; show them in a chat without one")
        for path in images:
            open_image(path)
        self._next += [(path, path.read_bytes()) for path in images]

    def ask(self, line: str, *, quiet: bool) -> None:
        """Answer one line."""
        shown, self._next = self._next, []
        held = [] if self.kept is None else [self.kept.keep_image(path, data) for path, data in shown]
        before = len(self._images)
        self._images += [data for _, data in shown]
        self.turns.append(_turn("user", line, [str(path) for path, _ in shown]))
        self._remember("user", line, **({"images": held} if held else {}))
        out = Out(quiet=quiet, marked=self.context is None)
        try:
            reply = self._reply(line, out)
        except KeyboardInterrupt:
            self._remember("assistant", out.text, "stopped")
            raise
        except HerdError:
            self.turns.pop()
            del self._images[before:]
            raise
        finally:
            out.end()
        if (answer := reply.pop("answer", None)) and not quiet:
            print_citations(answer)
        self.turns.append({"role": "assistant", **reply})
        detail = {"citations": reply["citations"], "context": self._context_id} if "citations" in reply else {}
        self._remember("assistant", reply["content"], "done", **detail)

    def _reply(self, line: str, out: "Out") -> dict[str, Any]:
        if self.context is not None:
            answer = self.context.ask(line, max_tokens=self._most, quote=self._quote, on_text=out)
            citations = [citation_json(c) for c in answer.citations]
            return {"content": answer.text, "citations": citations, "answer": answer}
        turns = [_message(turn) for turn in self.turns]
        if self.kept is not None and (system := self.kept.library.settings().get("system")):
            turns.insert(0, {"role": "system", "content": system})
        ids = self.model.tokenizer.chat(turns)
        if self.kept is not None and self._chat is not None:
            args = (self._chat.id, ids, self._images, self._most, self._sampler, out)
            return {"content": self.kept.generate(*args)}
        new = self.model.generate(ids, images=self._images, max_tokens=self._most, sampler=self._sampler, on_text=out)
        return {"content": new.text}

    @property
    def _context_id(self) -> str | None:
        return None if self._chat is None else self._chat.context

    def _remember(self, role: Any, content: str, state: Any = "done", **detail: Any) -> None:
        if self.kept is None:
            return
        if self._chat is None:
            self._chat = self.kept.library.new_chat(" ".join(content.split())[:60])
        self.kept.library.add_message(self._chat.id, role, content, state, detail)

    # Commands

    def follow(self, line: str) -> None:
        """Follow a command. PromptError for one that there is not."""
        try:
            name, *rest = shlex.split(line)
        except ValueError as error:
            raise PromptError(f"{line}: {error}; quotes come in pairs") from error
        if name == "/attach" and rest:
            self._attach(rest)
        elif name == "/sources" and not rest:
            self._sources()
        elif name == "/save" and len(rest) == 1:
            self._save(Path(rest[0]).expanduser())
        elif name == "/help":
            for usage, does in COMMANDS.items():
                note(f"  {usage:16} {does}")
        else:
            raise PromptError(f"{line} is no command; there are {', '.join(COMMANDS)}")

    def _attach(self, given: list[str]) -> None:
        paths = [Path(path).expanduser() for path in given]
        if self.model.vision is not None and all(map(_is_image, paths)):
            self.show(paths)
            note(f"{len(self._next):,} images go with the next line")
            return
        if self.context is None:
            if self.kept is None:
                raise PromptError(
                    "this chat is not kept, so nothing can be attached; start it with --context or --data DIR"
                )
            library = self.kept.library
            entry = library.new_context(paths[0].resolve().name or "files")
            if self._chat is None:
                self._chat = library.new_chat(entry.name)
            self._chat = library.change_chat(self._chat.id, context=entry.id)
            folder = library.context_folder(entry.id)
            (folder / "files").mkdir(parents=True)
            self.context = herd.Context.open(folder / "kv", self.model)
        with reading() as progress:
            print_report(self.context.read(paths, progress=progress))

    def _sources(self) -> None:
        if self.context is None:
            raise PromptError("nothing was read; /attach PATH reads files and folders")
        for source in self.context.sources:
            note(f"  {source.name}  {source.tokens:,} tokens")
        note(f"  {self.context.tokens:,} tokens of {len(self.context.sources):,} sources")
        print_skipped(self.context.skipped)

    def _save(self, file: Path) -> None:
        parts = list[str]()
        for turn in self.turns:
            cited = [f"- {c['source']}:{c['lines'][0]}-{c['lines'][1]}\n" for c in turn.get("citations", ())]
            parts.append(f"## {'You' if turn['role'] == 'user' else 'Herd'}\n\n{turn['content']}\n")
            parts += ["".join(cited)] if cited else []
        try:
            with file.open("x", encoding="utf-8") as target:
                target.write("\n".join(parts))
        except FileExistsError:
            raise SourceError(f"{file} exists; name a new file") from None
        except OSError as error:
            raise SourceError(f"{file} cannot be written: {error.strerror or error}") from error
        note(f"saved {len(self.turns):,} messages to {file}")


class Out(TextOut):
    """Shows an answer as it comes: as Markdown in a terminal, where it is marked up, else as it is."""

    def __init__(self, *, quiet: bool, marked: bool) -> None:
        super().__init__(quiet=quiet)
        self.text = ""
        self._live: Any = None
        if marked and not quiet and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False, vertical_overflow="visible")
            self._live.start()
        self._shown = 0.0

    def __call__(self, piece: str) -> None:
        self.text += piece
        if self._live is None:
            super().__call__(piece)
        elif (now := time.monotonic()) - self._shown > 0.1:
            self._shown = now
            self._show()

    def end(self) -> None:
        """End the line of an answer that has begun."""
        if self._live is None:
            super().end()
            return
        self._show()
        with suppress(Exception):
            self._live.stop()

    def _show(self) -> None:
        from rich.markdown import Markdown

        self._live.update(Markdown(self.text), refresh=True)


def _turn(role: str, content: str, images: Sequence[str]) -> dict[str, Any]:
    return {"role": role, "content": content, **({"images": [*images]} if images else {})}


def _is_image(path: Path) -> bool:
    return (guess_type(path.name)[0] or "").startswith("image/")


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    """What the model's chat template gets."""
    content = turn["content"]
    if images := turn.get("images"):
        text = [{"type": "text", "text": content}] if content else []
        content = [*({"type": "image"} for _ in images), *text]
    return {"role": turn["role"], "content": content}


def interrupted(talk: Talk) -> Interrupted:
    """What is said where a conversation is interrupted."""
    if talk.kept is None:
        return Interrupted("the conversation is not kept; a context is left as it was")
    return Interrupted("the conversation is kept; go on with herd chat --continue")
