"""The page in a real Chromium: files are read, asked about and cited; nothing is lost, and nothing is run."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import herd
from herd.server.library import Library
from tests.server.process import ServerProcess, answer, ask, messages, new_chat
from tests.server.served import Served, serving

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

CHROMIUM = os.environ.get("HERD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium; install Debian's, or name it in HERD_CHROMIUM"
)

EVIL = "<img src=x onerror=alert(1)>"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as its:
        opened = its.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(model: herd.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(model, tmp_path_factory.mktemp("page")) as it:
        it.http.put("/api/settings", json={"max_tokens": 80})
        yield it


@pytest.fixture
def library(server: Served) -> Library:
    return server.app.state.server.library  # type: ignore[no-any-return]


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Open]:
    """Opens tabs of one browser; anything that runs or fails unasked fails the test."""
    context = browser.new_context(
        viewport={"width": 1200, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(30_000)
    wrong = list[str]()

    def open(at: str = "", url: str = server.url) -> Page:
        tab = context.new_page()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda asked: (wrong.append(asked.message), asked.dismiss()))
        tab.on("request", lambda sent: None if sent.url.startswith((url, "data:")) else wrong.append(sent.url))
        tab.goto(f"{url}/{at}")
        tab.wait_for_selector("body[data-ready]")
        return tab

    yield open
    context.close()
    assert wrong == []


def accessible(tab: Page, where: str) -> None:
    """No violation of what axe knows, in this view."""
    found = axe.Axe().run(tab)
    assert found.violations_count == 0, f"{where}: {found.generate_report()}"


def send(tab: Page, text: str) -> None:
    tab.get_by_label("Your question").fill(text)
    tab.keyboard.press("Enter")


def last(tab: Page) -> str:
    """The text of the last message; `inner_text` is empty until the browser has drawn it (`content-visibility`)."""
    return tab.locator(".message .body").last.text_content() or ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / "port.py").write_text("".join(f"# line {n}\n" for n in range(1, 41)) + "PORT = 8080\n")
    (notes / "deep" / f"{EVIL}.txt").write_text("<script>alert(2)</script>\nNAME = <img src=x onerror=alert(3)>\n")
    (notes / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    return notes


def test_a_folder_is_read_asked_about_and_cited(page: Open, folder: Path) -> None:
    tab = page()
    expect(tab.get_by_role("heading", name="What should be read?")).to_be_visible()
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Choose a folder").click()
    chooser.value.set_files(folder)
    expect(tab.locator(".reading .note")).to_contain_text(re.compile(r"Read [\d,]+ tokens"))
    expect(tab.locator(".window")).to_contain_text(re.compile(r"[1-9][\d,]* of 1M tokens"))

    send(tab, "What is PORT?")
    expect(tab.locator(".quote").last).to_contain_text("PORT = 8080")
    chip = tab.locator(".chip").filter(has_text="port.py").first
    place = re.search(r":(\d+)", chip.text_content() or "")
    assert place is not None
    chip.focus()
    tab.keyboard.press("Enter")
    line = tab.locator(f"#line{place.group(1)}")
    expect(line).to_be_in_viewport()
    expect(line.locator("mark")).to_be_visible()
    expect(tab.locator("#lines")).to_contain_text("PORT = 8080")
    accessible(tab, "source")
    tab.keyboard.press("Escape")
    expect(tab.locator("#source")).to_be_hidden()
    expect(chip).to_be_focused()

    send(tab, "What is NAME?")
    expect(tab.locator(".quote").last).to_contain_text("NAME = <img src=")  # a chunk has 64 tokens
    tab.get_by_role("link", name="What it has read").click()
    expect(tab.locator(".skipped")).to_contain_text("notes/image.png – binary")
    tab.get_by_role("button", name=f"notes/deep/{EVIL}.txt", exact=True).click()
    expect(tab.locator("#lines")).to_contain_text("<script>alert(2)</script>")
    assert tab.locator("#view img, #source img, #source script").count() == 0
    tab.get_by_role("button", name="Close").click()
    accessible(tab, "context")
    tab.get_by_role("button", name="Take out notes/port.py").click()
    expect(tab.get_by_role("button", name="notes/port.py", exact=True)).to_have_count(0)


READING = {"sources": 3, "sources_total": 10, "read_tokens": 50_000, "tokens_per_s": 2500.0, "eta_s": 60.0}


def test_a_read_shows_how_fast_it_is_and_what_is_left(page: Open) -> None:
    tab = page()
    entry = {
        "id": "a",
        "name": "a",
        "tokens": 50_000,
        "reading": True,
        "progress": READING,
        "last": None,
        "error": None,
    }
    tab.evaluate(
        """async (entry) => {
          const { readingOf } = await import("/page/context.js");
          document.querySelector(".home").append(readingOf(entry));
        }""",
        entry,
    )
    bar = tab.locator(".reading")
    expect(bar).to_contain_text("Reading: 3 of 10 files · 50,000 tokens · 2,500 tokens/s · 60 s left")
    assert bar.locator("progress").evaluate("(bar) => bar.position") == 0.25
    expect(bar).to_contain_text("50,000 of 1M tokens (4.8 %)")
    accessible(tab, "reading")
    tab.evaluate("document.querySelector('.home h1').style.color = '#ddd'")
    with pytest.raises(AssertionError, match="too pale"):
        accessible(tab, "too pale")


def test_files_are_dropped_anywhere(page: Open) -> None:
    tab = page()
    tab.evaluate(
        """() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["GATE = 4711\\n"], "gate.txt"));
          for (const type of ["dragenter", "drop"])
            document.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }"""
    )
    expect(tab.locator(".reading .note")).to_contain_text("Read ")
    send(tab, "What is GATE?")
    expect(tab.locator(".quote").last).to_contain_text("GATE = 4711")


def test_an_answer_goes_on_through_reloads_and_tabs_until_it_is_stopped(page: Open, server: Served) -> None:
    server.http.put("/api/settings", json={"max_tokens": 200_000})
    try:
        tab = page()
        send(tab, "Again and again")
        expect(tab.get_by_role("button", name="Stop")).to_be_visible()
        expect(tab.locator(".writing .body")).to_contain_text(re.compile(".{20}", re.DOTALL))
        other = page(re.sub(r".*(#.*)", r"\1", tab.url))
        tab.reload()
        tab.wait_for_selector("body[data-ready]")
        for looker in (tab, other):
            expect(looker.locator(".writing")).to_be_visible()
        tab.get_by_role("button", name="Stop").click()
        for looker in (tab, other):
            expect(looker.locator(".stopped")).to_contain_text("stopped here")
            expect(looker.get_by_role("button", name="Ask", exact=True)).to_be_visible()
        assert messages(server.url, tab.url.rpartition("/")[2])[-1]["state"] == "stopped"
        seen, also = (looker.locator(".stopped .body").text_content() for looker in (tab, other))
        assert seen and seen == also
    finally:
        server.http.put("/api/settings", json={"max_tokens": 80})


def test_messages_are_edited_answered_again_copied_and_deleted(page: Open, server: Served) -> None:
    tab = page()
    send(tab, "First question")
    expect(tab.locator(".assistant.done")).to_have_count(1)
    chat = tab.url.rpartition("/")[2]
    before = answer(server.url, chat)
    tab.get_by_role("button", name="Again").click()
    tab.wait_for_function(
        "id => document.querySelector('.assistant.done') && !document.getElementById(id)", arg=f"m{before['id']}"
    )
    assert answer(server.url, chat)["content"] == before["content"]
    tab.locator(".assistant").get_by_role("button", name="Copy").first.click()
    expect(tab.locator("#status")).to_have_text("Copied.")
    assert tab.evaluate("navigator.clipboard.readText()") == before["content"]
    tab.locator(".user").get_by_role("button", name="Edit").click()
    expect(tab.get_by_label("Your question")).to_have_value("First question")
    send(tab, "Second question")
    expect(tab.locator(".user .body")).to_have_text(["Second question"])
    expect(tab.locator(".assistant.done")).to_have_count(1)
    tab.locator(".user").get_by_role("button", name="Delete").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator(".message")).to_have_count(0)
    tab.locator(".head").get_by_role("button", name="Rename").click()
    tab.get_by_role("textbox", name="Name").fill(EVIL)
    tab.keyboard.press("Enter")
    expect(tab.locator("#chats")).to_contain_text(EVIL)
    tab.locator(".head").get_by_role("button", name="Delete").click()
    accessible(tab, "dialog")
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator("#chats")).not_to_contain_text(EVIL)
    expect(tab.get_by_role("heading", name="What should be read?")).to_be_visible()


HOSTILE = f"""# A heading {EVIL}

[click](javascript:alert(1)) [data](data:text/html,<script>alert(1)</script>) [good](https://example.org/a?b=1)
![picture](https://example.org/x.png) <script>alert(1)</script> <svg onload=alert(1)> **bold {EVIL}** `{EVIL}`

- one
  - two {EVIL}

| a | {EVIL} |
|---|---|
| **b** | [x](vbscript:alert) |

```html "onmouseover=alert(1)
{EVIL}
```

> quote [a](JaVaScRiPt:alert(1)) [b](&#106;avascript:alert(1)) [c](\x01javascript:alert(1))
"""


def test_what_a_model_says_is_never_run(page: Open, library: Library) -> None:
    chat = library.new_chat(EVIL)
    library.add_message(chat.id, "user", HOSTILE)
    detail = {"error": EVIL, "context": EVIL, "citations": [{"source": EVIL, "lines": [1, 2], "weight": 0.5}]}
    library.add_message(chat.id, "assistant", HOSTILE, "done", detail)
    tab = page(f"#/chat/{chat.id}")
    body = tab.locator(".assistant .body")
    expect(body.locator("strong").first).to_have_text(f"bold {EVIL}")
    expect(body.locator("pre")).to_have_text(EVIL)
    expect(body.locator("li li")).to_have_text(f"two {EVIL}")
    expect(body.locator("tbody td").first).to_have_text("b")
    links = tab.evaluate("[...document.querySelectorAll('#view .body a')].map((a) => [a.href, a.rel, a.target])")
    safe = ["noopener noreferrer", "_blank"]
    assert links == [["https://example.org/a?b=1", *safe], ["https://example.org/x.png", *safe]]
    assert tab.locator("#view img, #view script, #view svg, #view iframe").count() == 0
    assert (
        tab.evaluate(
            "[...document.querySelectorAll('*')].some((e) => e.getAttributeNames().some((n) => n.startsWith('on')))"
        )
        is False
    )
    accessible(tab, "chat")


def test_a_chat_of_ten_thousand_messages(page: Open, library: Library) -> None:
    chat = library.new_chat("Long")
    with library.together():
        for n in range(5_000):
            library.add_message(chat.id, "user", f"Question {n}")
            library.add_message(chat.id, "assistant", f"**Answer** {n}")
    tab = page(f"#/chat/{chat.id}")
    expect(tab.locator(".message").last).to_be_in_viewport()
    assert last(tab) == "Answer 4999" and tab.locator(".message").count() == 100
    for shown in (200, 300):
        top = tab.locator(".message").first
        tab.get_by_role("button", name="Earlier messages").click()
        expect(tab.locator(".message")).to_have_count(shown)
        expect(top).not_to_have_text("")
    expect(tab.locator(".message .body").first).to_have_text("Question 4850")


def test_settings_are_kept_by_the_server(page: Open, server: Served) -> None:
    tab = page()
    tab.get_by_role("button", name="Settings").click()
    accessible(tab, "settings")
    tab.get_by_label("Temperature").fill("0.7")
    tab.get_by_label("Look").select_option("dark")
    tab.get_by_role("button", name="Save").click()
    expect(tab.locator("html")).to_have_attribute("data-theme", "dark")
    assert server.http.get("/api/state").json()["settings"]["temperature"] == 0.7
    other = page()
    expect(other.locator("html")).to_have_attribute("data-theme", "dark")
    other.get_by_role("button", name="Settings").click()
    expect(other.get_by_label("Temperature")).to_have_value("0.7")
    server.http.put("/api/settings", json={"temperature": None, "theme": None})
    expect(tab.locator("html")).to_have_attribute("data-theme", "")


def test_an_error_says_what_helps_and_keeps_what_was_written(page: Open, server: Served) -> None:
    server.http.put("/api/settings", json={"max_tokens": 1 << 20})
    try:
        tab = page(f"#/chat/{new_chat(server.url)}")
        send(tab, "Too much")
        expect(tab.get_by_role("alert")).to_contain_text("maximum context length is 1,048,576 tokens")
        expect(tab.get_by_label("Your question")).to_have_value("Too much")
        accessible(tab, "error")
    finally:
        server.http.put("/api/settings", json={"max_tokens": 80})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_in_light_and_dark(browser: Browser, server: Served, library: Library, theme: str) -> None:
    chat = library.new_chat("A chat on a phone")
    library.add_message(chat.id, "user", "wide " * 40 + "w" * 300)
    library.add_message(chat.id, "assistant", "```py\n" + "x = 1; " * 80 + "\n```\n\n" + "y" * 300)
    context = browser.new_context(viewport={"width": 390, "height": 780}, color_scheme=theme, has_touch=True)  # type: ignore[arg-type]
    tab = context.new_page()
    for at in ("", f"#/chat/{chat.id}"):
        tab.goto(f"{server.url}/{at}")
        tab.wait_for_selector("body[data-ready]")
        tab.wait_for_selector(".home, .message")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
        accessible(tab, f"phone, {theme}, {at}")
    tab.get_by_role("button", name="Menu").click()
    expect(tab.locator("#chats")).to_be_visible()
    accessible(tab, f"menu, {theme}")
    tab.get_by_role("link", name="New chat").first.click()
    expect(tab.locator("#chats")).to_be_hidden()
    context.close()


def test_the_keyboard_alone_is_enough(page: Open) -> None:
    tab = page()
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to the question")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.get_by_label("Your question")).to_be_focused()
    tab.keyboard.type("By keyboard")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("in two lines")
    tab.keyboard.press("Enter")
    expect(tab.locator(".user .body")).to_have_text("By keyboard\nin two lines", use_inner_text=True)
    expect(tab.locator(".assistant.done")).to_have_count(1)
    expect(tab.locator("#status")).to_contain_text("Answer: ")


def test_the_page_comes_back_with_a_killed_server(page: Open, tiny_model: Path, tmp_path: Path) -> None:
    server = ServerProcess(tiny_model, tmp_path)
    try:
        httpx.put(f"{server.url}/api/settings", json={"max_tokens": 10})
        chat = new_chat(server.url)
        ask(server.url, chat, "Before")
        tab = page(f"#/chat/{chat}", server.url)
        expect(tab.locator(".assistant.done")).to_have_count(1)
        before = last(tab)
        server.kill()
        expect(tab.locator("body.offline")).to_be_visible()
        send(tab, "While it is away")
        expect(tab.get_by_role("alert")).to_contain_text("cannot be reached")
        server.start()
        expect(tab.locator("body.offline")).to_have_count(0)
        expect(tab.locator(".assistant.done")).to_have_count(1)
        assert last(tab) == before
        tab.get_by_role("button", name="Ask", exact=True).click()
        expect(tab.locator(".assistant.done")).to_have_count(2)
        assert messages(server.url, chat)[-1]["detail"]["cached_tokens"] > 0
    finally:
        server.kill()
