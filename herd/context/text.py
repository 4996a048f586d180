"""The bytes of a file → its text: encodings, HTML, notebooks, PDF. Line ends become "\\n".

Line numbers of citations count lines of this text: for plain files those of the file itself, for HTML, notebooks and
PDF those of the extracted text.
"""

import codecs
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

PDF_SECONDS = 120
_BOMS = (  # longest first: the UTF-32 mark begins with the UTF-16 one
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARED = re.compile(rb"(?:coding[:=]\s*|charset=[\"']?|encoding=[\"'])([-\w.]+)")
_CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")
_MAX_CONTROL = 0.01  # share of control bytes above which bytes without an encoding are no text


class NotText(Exception):
    """Why a file has no text to read."""


def to_text(data: bytes, name: str) -> str:
    """Text of a file's bytes; its name's ending tells HTML and notebooks apart. NotText gives the reason."""
    if data.startswith(b"%PDF-"):
        return _pdf(data)
    text = decode(data).replace("\r\n", "\n").replace("\r", "\n")
    suffix = Path(name).suffix.lower()
    if suffix in (".html", ".htm", ".xhtml"):
        return _html(text)
    return _notebook(text) if suffix == ".ipynb" else text


def is_binary(data: bytes) -> bool:
    """True if these bytes, or a file that begins with them, cannot be text: a zero byte outside UTF-16 and UTF-32."""
    return b"\0" in data and not data.startswith((b"%PDF-", *(mark for mark, _ in _BOMS)))


def decode(data: bytes) -> str:
    """By byte-order mark, else UTF-8, else the encoding that the head declares, else Windows-1252 or Latin-1."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise NotText(f"not valid {encoding.upper()}: {error.reason} at byte {error.start:,}") from error
    if is_binary(data):
        raise NotText("binary file")
    declared = _DECLARED.search(data[:1024])
    for encoding in ("utf-8", declared[1].decode() if declared else "cp1252", "cp1252"):
        try:
            text = data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
        if encoding == "utf-8" or (isinstance(text, str) and not _looks_binary(data)):
            return text
    if _looks_binary(data):
        raise NotText("binary file")
    return data.decode("latin-1")


def _looks_binary(data: bytes) -> bool:
    return len(_CONTROL.findall(data)) > _MAX_CONTROL * len(data)


class _Extractor(HTMLParser):
    """Visible text of a page; blocks become lines."""

    _BLOCKS = re.compile(
        "address|article|aside|blockquote|br|caption|d[dlt]|div|fieldset|figcaption|figure|footer|form|h[1-6r]|header|"
        "li|main|nav|[ou]l|option|p|pre|section|summary|table|td|th|title|tr"
    )
    _HIDDEN = frozenset(("script", "style", "template", "noscript"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._HIDDEN:
            self._hidden += 1
        self._pre += tag == "pre"
        if self._BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN and self._hidden:
            self._hidden -= 1
        if tag == "pre" and self._pre:
            self._pre -= 1
        if self._BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def _html(text: str) -> str:
    extractor = _Extractor()
    try:
        extractor.feed(text)
        extractor.close()
    except AssertionError as error:  # the parser asserts on some malformed declarations
        raise NotText(f"malformed HTML: {error}") from error
    lines = "".join(extractor.parts).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def _notebook(text: str) -> str:
    """Cells in order, each under a comment line with its number and kind, then the text of its outputs."""
    try:
        parts = []
        for number, cell in enumerate(json.loads(text)["cells"], 1):
            parts.append(f"# cell {number} ({cell['cell_type']})\n{_joined(cell['source'])}\n")
            for output in cell.get("outputs", []):
                shown = output.get("text") or output.get("data", {}).get("text/plain")
                if shown:
                    parts.append(f"# output of cell {number}\n{_joined(shown)}\n")
        return "".join(parts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotText(f"not a readable notebook: {error!r}") from error


def _joined(value: object) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)


def _pdf(data: bytes) -> str:
    """Text of a PDF, extracted by a process of its own: a hostile file can cost its time and memory, not ours."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("pdf.py"))]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=PDF_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotText(f"PDF: no text after {PDF_SECONDS} seconds") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotText(f"PDF: {said[-1] if said else f'extraction ended with status {done.returncode}'}")
    text = done.stdout.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise NotText("PDF: no text in it (scanned pages?)")
    return text
