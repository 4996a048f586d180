"""Bytes → text: encodings, HTML, notebooks, PDF, and what is no text."""

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.context import text
from herd.context.text import NotText, decode, to_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_and_without_marks(encoding: str) -> None:
    assert decode("Größe = 5 €\n日本\n".encode(encoding)) == "Größe = 5 €\n日本\n"


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf16_of_both_orders(mark: bytes) -> None:
    order = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"
    assert decode(mark + "naïve".encode(order)) == "naïve"


def test_legacy_encodings() -> None:
    assert decode("café – “quoted”".encode("cp1252")) == "café – “quoted”"
    assert decode(b"# -*- coding: koi8-r -*-\n" + "привет".encode("koi8-r")).endswith("привет")
    assert decode(b"x \x81 y") == "x \x81 y", "no Windows-1252: Latin-1 takes every byte"
    assert decode(b"# coding: no-such-codec\n\xe9").endswith("é")
    assert decode(b"# coding: hex\n\xe9").endswith("é"), "codecs that are no text encodings are not used"


def test_binaries_are_no_text() -> None:
    for data in (b"\x7fELF\0\0", b"\x89PNG\r\n\x1a\n\0", bytes(range(1, 256)) * 4, b"\xff\xfe\x00"):
        with pytest.raises(NotText):
            to_text(data, "x")


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.html", "a.ipynb", "a.py"]))
def test_any_bytes_give_text_or_a_reason(data: bytes, name: str) -> None:
    try:
        result = to_text(data, name)
    except NotText as reason:
        assert str(reason)
    else:
        assert "\r" not in result


def test_line_ends_become_newlines() -> None:
    assert to_text(b"a\r\nb\rc\n", "x.txt") == "a\nb\nc\n"


def test_html_keeps_what_is_seen() -> None:
    page = b"""<html><head><title>Page</title><style>p {color: red}</style><script>alert(1)</script></head>
    <body><h1>Head &amp; tail</h1><p>One <b>bold</b>
    word.<br>Next</p><pre>a
      b</pre><table><tr><td>1</td><td>2</td></tr></table></body></html>"""
    assert to_text(page, "p.html").splitlines() == [
        "Page", "Head & tail", "One bold word.", "Next", "a", "      b", "1", "2"
    ]  # fmt: skip


def test_notebooks_give_cells_and_outputs() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"text": ["1\n"]}, {"data": {"text/plain": "2"}}]},
    ]
    result = to_text(json.dumps({"cells": cells}).encode(), "n.ipynb")
    assert "# cell 1 (markdown)\n# Title\ntext\n" in result and "# output of cell 2\n2\n" in result
    with pytest.raises(NotText, match="notebook"):
        to_text(b"{}", "n.ipynb")
    with pytest.raises(NotText, match="notebook"):
        to_text(b"[" * 100_000, "n.ipynb")


def pdf(page_text: str) -> bytes:
    """A PDF of one page, written by hand."""
    stream = f"BT /F1 12 Tf 50 700 Td ({page_text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    xref = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return body + b"xref\n0 5\n0000000000 65535 f \n%strailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        xref,
        len(body),
    )


def test_pdf_text_comes_page_by_page() -> None:
    assert to_text(pdf("The port is 8443."), "a.pdf").splitlines()[:2] == ["# page 1", "The port is 8443."]


def test_damaged_endless_and_empty_pdfs_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotText, match="PDF"):
        to_text(b"%PDF-1.7\ngarbage", "a.pdf")
    monkeypatch.setattr(text, "PDF_SECONDS", 0.001)
    with pytest.raises(NotText, match="no text after"):
        to_text(pdf("x"), "a.pdf")
