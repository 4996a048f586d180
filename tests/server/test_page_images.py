"""Images in chats of the page: kept with them, seen by models that see, refused clearly by others."""

import base64
import io
import json
import sqlite3
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

import herd
from herd.errors import LibraryError
from herd.server import exports
from herd.server.images import MAX_BYTES
from herd.server.library import Library, Unknown
from tests.server.process import ServerProcess, answer, messages, new_chat
from tests.server.served import Served, serving
from tests.server.test_page import Open, accessible, browser, page, pytestmark, send  # noqa: F401
from tests.test_images import folder, pictures  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, Page, Route, expect  # noqa: E402


@pytest.fixture(scope="module")
def sees(folder: Path) -> herd.Model:  # noqa: F811
    return herd.load(folder)


@pytest.fixture(scope="module")
def server(sees: herd.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(sees, tmp_path_factory.mktemp("images")) as it:
        it.http.put("/api/settings", json={"max_tokens": 12})
        yield it


def png(width: int, height: int, color: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    file.seek(0)
    Image.blend(Image.open(file), Image.new("RGB", (width, height), color), 0.6).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def bring(its: Served | ServerProcess, data: bytes, status: int = 201) -> dict[str, str]:
    reply = its.http.post("/api/images", files={"file": ("file", data)})
    assert reply.status_code == status, reply.text
    return reply.json() if status == 201 else reply.json()["error"]  # type: ignore[no-any-return]


def say(its: Served | ServerProcess, chat: str, text: str, *images: str, before: int | None = None) -> str:
    shown = [{"id": id, "name": "a.png"} for id in images]
    reply = its.http.post(f"/api/chats/{chat}/messages", json={"content": text, "images": shown, "before": before})
    assert reply.status_code == 201, reply.text
    return str(answer(its.url, chat)["content"])


def alone(model: herd.Model, *turns: tuple[str, str, list[bytes]]) -> str:
    """What the model says to a conversation that it reads whole."""
    said = [
        {"role": role, "content": [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]}
        for role, text, shown in turns
    ]
    files = [data for _, _, shown in turns for data in shown]
    return model.generate(model.tokenizer.chat(said), images=files, max_tokens=12).text


def test_a_chat_with_images_is_answered_as_if_it_were_read_whole(server: Served, sees: herd.Model) -> None:
    """Two images of one size have the same token ids: what was kept of the one must not stand for the other."""
    first, second, chat = png(20, 28), png(20, 28, "red"), new_chat(server.url)
    a, b = (bring(server, data)["id"] for data in (first, second))
    turns: list[tuple[str, str, list[bytes]]] = []
    for text, shown in (("Hello", []), ("See", [(a, first)]), ("And?", []), ("Both", [(b, second), (a, first)])):
        turns.append(("user", text, [data for _, data in shown]))
        turns.append(("assistant", say(server, chat, text, *(id for id, _ in shown)), []))
        assert turns[-1][1] == alone(sees, *turns[:-1])
    question = messages(server.url, chat)[2]
    other = say(server, chat, "See", b, before=question["id"])
    assert other == alone(sees, *turns[:2], ("user", "See", [second])) != turns[3][1]


def test_images_live_and_go_with_their_messages(server: Served) -> None:
    data, chat = png(30, 20), new_chat(server.url)
    id = bring(server, data)["id"]
    say(server, chat, "", id)
    reply = server.http.get(f"/api/images/{id}")
    assert reply.content == data and reply.headers["content-type"] == "image/png"
    assert reply.headers["x-content-type-options"] == "nosniff"
    shown = messages(server.url, chat)[0]
    assert shown["detail"]["images"] == [{"id": id, "name": "a.png", "width": 30, "height": 20}]
    before = answer(server.url, chat)
    assert server.http.post(f"/api/chats/{chat}/again").status_code == 201
    assert answer(server.url, chat)["content"] == before["content"]
    say(server, chat, "Edited", id, before=shown["id"])
    assert messages(server.url, chat)[0]["detail"]["images"][0]["id"] == id
    server.http.delete(f"/api/chats/{chat}/messages/{messages(server.url, chat)[0]['id']}")
    assert server.http.get(f"/api/images/{id}").status_code == 404, "nobody shows it any more"
    gone = server.http.post(f"/api/chats/{chat}/messages", json={"content": "", "images": [{"id": id, "name": ""}]})
    assert gone.status_code == 404 and "bring it again" in gone.text


def test_images_that_are_bombs_or_none(server: Served, model: herd.Model, tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    for data, said in (
        (bomb.getvalue(), "10,000 × 10,000 pixels; it may have 33,554,432"),
        (b"\0" * (MAX_BYTES + 1), "larger than 20,971,520 bytes"),
        (b"<svg onload=alert(1)>", "one of PNG, JPEG, WEBP, GIF"),
        (png(300, 300)[:200], "cannot read an image of 200 bytes"),
    ):
        assert said in bring(server, data, 400)["message"]
    with serving(model, tmp_path) as blind:
        assert "tiny reads no images" in bring(blind, png(9, 9), 400)["message"]
    assert say(server, new_chat(server.url), "Still there?")


def test_images_are_exported_and_imported(tmp_path: Path) -> None:
    first, second, data = Library(tmp_path / "a"), Library(tmp_path / "b"), png(20, 10)
    chat = first.new_chat("seen")
    id = first.add_image("image/png", data)
    shown = {"images": [{"id": id, "name": "a.png", "width": 20, "height": 10}]}
    first.add_message(chat.id, "user", "What?", detail=shown)
    first.add_image("image/png", png(1, 1))  # which no message shows
    exports.export(first, tmp_path / "all.zip")
    first.delete_chat(chat.id)
    with pytest.raises(Unknown):
        first.image(id)
    exports.import_(second, tmp_path / "all.zip")
    assert second.image(id) == ("image/png", data)
    assert [m.detail for m in second.messages(second.chats()[0].id)] == [shown]
    with zipfile.ZipFile(tmp_path / "all.zip") as whole:
        rows = whole.read("library.json")
        assert [name for name in whole.namelist() if name != "library.json"] == [f"images/{id}"]
    for name, content in (("images/../x", data), (f"images/{id}", png(3, 3)), (f"images/{id}", b"<svg>"), ("y", b"")):
        with zipfile.ZipFile(bad := io.BytesIO(), "w") as packed:
            packed.writestr("library.json", rows)
            packed.writestr(name, content)
        with pytest.raises(LibraryError, match="nothing was imported"):
            exports.import_(second, bad)
    assert len(second.chats()) == 1
    first.close()
    second.close()


def test_a_library_of_before_images_is_opened(tmp_path: Path) -> None:
    old = Library(tmp_path)
    chat = old.new_chat("old")
    old.close()
    db = sqlite3.connect(tmp_path / "herd.sqlite")
    db.executescript("DROP TABLE image; PRAGMA user_version = 1;")
    db.close()
    now = Library(tmp_path)
    assert now.chat(chat.id) == chat
    assert now.image(now.add_image("image/png", b"x")) == ("image/png", b"x")
    now.close()


GIVE = """([type, name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: kind }));
  if (type === "paste") document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
  else for (const step of ["dragenter", "drop"])
    document.dispatchEvent(new DragEvent(step, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


def give(tab: Page, how: str, name: str, data: bytes, kind: str = "image/png") -> None:
    tab.evaluate(GIVE, [how, name, kind, base64.b64encode(data).decode()])


def choose(tab: Page, *names: str) -> None:
    """Files by "Choose files": images, and others of one line."""
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Choose files").click()
    kinds = [("image/png", png(300, 200)) if name.endswith(".png") else ("text/plain", b"GATE = 1\n") for name in names]
    chooser.value.set_files(
        [{"name": n, "mimeType": kind, "buffer": data} for n, (kind, data) in zip(names, kinds, strict=True)]
    )


def test_of_files_that_are_chosen_images_go_to_the_question(page: Open, server: Served) -> None:  # noqa: F811
    tab, before = page(), server.http.get("/api/state").json()["contexts"]
    choose(tab, "sea.png")
    expect(tab.locator("#shown img")).to_have_count(1)
    expect(tab.get_by_role("heading", name="What should be read?")).to_be_visible()
    send(tab, "What is this?")
    expect(tab.locator(".user .pictures img")).to_have_count(1)
    assert server.http.get("/api/state").json()["contexts"] == before
    tab.get_by_role("link", name="New chat").first.click()
    tab.route("**/files", lambda route: route.fulfill(json={}))  # chunks of this model are too short to read into
    choose(tab, "sky.png", "gate.txt")
    expect(tab.get_by_role("alert")).to_contain_text("Contexts are asked without images, so sky.png is not taken")
    expect(tab.get_by_label("Answers come from")).to_contain_text("gate.txt")
    expect(tab.locator("#shown img")).to_have_count(0)


def test_images_are_dropped_pasted_chosen_taken_out_and_shown(page: Open, server: Served) -> None:  # noqa: F811
    tab = page()
    give(tab, "drop", "sea.png", png(300, 200))
    give(tab, "paste", "<img src=x onerror=alert(1)>.png", png(200, 300, "orange"))
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Show images").click()
    chooser.value.set_files({"name": "sky.png", "mimeType": "image/png", "buffer": png(400, 300, "navy")})
    expect(tab.locator("#shown img")).to_have_count(3)
    expect(tab.locator("#shown")).to_contain_text("tokens")
    accessible(tab, "images of a question")
    tab.get_by_role("button", name="Take out <img src=x onerror=alert(1)>.png").click()
    expect(tab.locator("#shown img")).to_have_count(2)
    send(tab, "What is this?")
    expect(tab.locator("#shown")).to_be_hidden()
    expect(tab.locator(".user .pictures img")).to_have_count(2)
    expect(tab.get_by_role("img", name="sky.png")).to_be_visible()
    expect(tab.locator(".assistant.done")).to_have_count(1, timeout=30_000)  # two images are looked at
    accessible(tab, "images of a chat")
    tab.reload()
    expect(tab.get_by_role("img", name="sea.png")).to_be_visible()
    tab.wait_for_function("() => [...document.querySelectorAll('.pictures img')].every((i) => i.naturalWidth > 200)")
    tab.locator(".user").get_by_role("button", name="Edit").click()
    expect(tab.locator("#shown img")).to_have_count(2)
    tab.get_by_role("button", name="Take out sea.png").click()
    send(tab, "And this?")
    expect(tab.locator(".user .body")).to_have_text(["And this?"])
    expect(tab.locator(".user .pictures img")).to_have_count(1)
    give(tab, "drop", "broken.png", b"\x89PNG")
    expect(tab.get_by_role("alert")).to_contain_text("broken.png: an image cannot be read")
    accessible(tab, "a broken image")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_images_on_a_phone(browser: Browser, server: Served, theme: str) -> None:  # noqa: F811
    chat = new_chat(server.url)
    say(server, chat, "Wide", bring(server, png(1400, 200))["id"], bring(server, png(100, 900, "red"))["id"])
    context = browser.new_context(viewport={"width": 390, "height": 780}, color_scheme=theme, has_touch=True)  # type: ignore[arg-type]
    tab = context.new_page()
    tab.goto(f"{server.url}/#/chat/{chat}")
    expect(tab.locator(".pictures img")).to_have_count(2)
    give(tab, "drop", "a name that is quite long " * 4 + ".png", png(50, 50))
    expect(tab.locator("#shown img")).to_have_count(1)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    accessible(tab, f"images on a phone, {theme}")
    context.close()


def test_a_model_that_sees_no_images_says_so_at_once(
    page: Open,  # noqa: F811
    model: herd.Model,
    tmp_path: Path,
) -> None:
    with serving(model, tmp_path) as blind:
        tab = page(url=blind.url)
        expect(tab.get_by_role("button", name="Show images")).to_be_hidden()
        for how in ("drop", "paste"):
            give(tab, how, f"{how}.png", png(9, 9))
            expect(tab.get_by_role("alert")).to_contain_text(f"tiny reads no images, so {how}.png is not shown to it")
        assert blind.http.get("/api/state").json()["contexts"] == []
        id = blind.http.post("/api/contexts", json={"name": "docs"}).json()["id"]
        tab.goto(f"{blind.url}/#/context/{id}")
        expect(tab.get_by_role("heading", name="docs")).to_be_visible()
        give(tab, "drop", "again.png", png(9, 9))
        expect(tab.get_by_role("alert")).to_contain_text("again.png is not shown")
        accessible(tab, "no images")
        choose(tab, "chosen.png", "gate.txt")
        expect(tab.get_by_role("alert")).to_contain_text("tiny reads no images, so chosen.png is not shown to it")
        expect(tab.get_by_role("button", name="gate.txt", exact=True)).to_be_visible()
        assert blind.http.get(f"/api/contexts/{id}").json()["skipped"] == []


def test_what_others_write_is_seen_without_a_reload(page: Open, server: Served) -> None:  # noqa: F811
    tab = page()
    other = Library(server.app.state.server.library.folder)  # as `herd chat` opens it
    chat = other.new_chat("From a terminal")
    other.add_message(chat.id, "user", "Typed elsewhere")
    tab.locator("#chats").get_by_role("link", name="From a terminal").click()
    expect(tab.locator(".user .body")).to_have_text(["Typed elsewhere"])
    other.add_message(chat.id, "assistant", "Said elsewhere")
    expect(tab.locator(".assistant .body")).to_have_text(["Said elsewhere"])
    other.close()


def test_what_is_said_while_a_chat_is_fetched_is_shown(page: Open, server: Served) -> None:  # noqa: F811
    chat, tab = new_chat(server.url), page()

    def later(route: Route) -> None:
        before = route.fetch()
        say(server, chat, "Meanwhile")
        tab.locator("#chats").get_by_role("link", name="Meanwhile").wait_for()  # it has heard of it
        its = before.json()
        route.fulfill(response=before, json={**its, "chat": {**its["chat"], "title": "As it was"}})

    tab.route(f"**/api/chats/{chat}", later, times=1)
    tab.goto(f"{server.url}/#/chat/{chat}")
    expect(tab.get_by_role("heading", name="As it was")).to_be_visible()
    expect(tab.locator(".user .body")).to_have_text(["Meanwhile"])
    expect(tab.locator(".assistant.done")).to_have_count(1)


def test_a_chat_with_images_goes_on_after_a_kill(
    page: Open,  # noqa: F811
    server: Served,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """It is answered as at a server that never stopped."""
    its = ServerProcess(folder, tmp_path)
    try:
        its.http.put("/api/settings", json={"max_tokens": 12})
        asked = {one.url: (one, new_chat(one.url)) for one in (server, its)}
        first = [say(*at, "See", bring(at[0], png(60, 40))["id"]) for at in asked.values()]
        assert first[0] == first[1]
        chat = asked[its.url][1]
        tab = page(f"#/chat/{chat}", its.url)
        expect(tab.locator(".pictures img")).to_have_count(1)
        while not remembered(tmp_path):
            tab.wait_for_timeout(20)
        its.kill()
        its.start()
        tab.reload()
        tab.wait_for_function("() => document.querySelector('.pictures img')?.naturalWidth === 60")
        send(tab, "And?")
        expect(tab.locator(".assistant.done")).to_have_count(2)
        say(*asked[server.url], "And?")
        never, again = (messages(url, chat)[-1] for url, (_, chat) in asked.items())
        assert again["content"] == never["content"]
        assert again["detail"]["cached_tokens"] == never["detail"]["cached_tokens"] > 0
    finally:
        its.kill()


def remembered(data: Path) -> int:
    """Chats whose keys and values are on disk."""
    db = sqlite3.connect(data / "conversations" / "kv.sqlite")
    try:
        return int(db.execute("SELECT count(*) FROM chat").fetchone()[0])
    finally:
        db.close()


def test_answers_of_the_page_follow_drain(tiny_model: Path, tmp_path: Path) -> None:
    for drain, state in ((0, "stopped"), (60, "done")):
        its = ServerProcess(tiny_model, tmp_path, "--drain", drain)
        try:
            httpx.put(f"{its.url}/api/settings", json={"max_tokens": 1500})
            chat = new_chat(its.url)
            httpx.post(f"{its.url}/api/chats/{chat}/messages", json={"content": "Go on"})
            while not messages(its.url, chat)[-1]["content"]:
                pass
            assert its.stop() == 0
        finally:
            its.kill()
        library = Library(tmp_path)
        last = library.messages(chat)[-1]
        library.close()
        assert last.state == state and last.content, (drain, json.dumps(last.detail))


def test_an_answer_that_ends_before_its_chat_is_shown_is_told(page: Open, server: Served) -> None:  # noqa: F811
    tab = page()

    def late(route: Route) -> None:
        """The page learns that its question is there when the answer is."""
        response = route.fetch()
        chat = route.request.url.split("/chats/")[1].split("/")[0]
        while messages(server.url, chat)[-1]["state"] == "writing":
            tab.wait_for_timeout(20)
        route.fulfill(response=response)

    tab.route("**/messages", late)
    send(tab, "Quick")
    expect(tab.locator(".assistant.done")).to_have_count(1)
    expect(tab.locator("#status")).to_contain_text("Answer: ")
