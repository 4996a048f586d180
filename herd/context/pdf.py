"""Program: PDF on stdin → UTF-8 text on stdout, each page under a line `# page N`. With caps on memory, time, pages."""

import resource
import sys

import pypdfium2

MAX_PAGES = 5_000
MAX_CHARACTERS = 64 << 20
_MEMORY_BYTES = 2 << 30
_CPU_SECONDS = 120


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    try:
        document = pypdfium2.PdfDocument(sys.stdin.buffer.read())
    except pypdfium2.PdfiumError as error:
        return _fail(str(error))
    if len(document) > MAX_PAGES:
        return _fail(f"{len(document):,} pages, the limit is {MAX_PAGES:,}")
    written = 0
    for number in range(len(document)):
        try:
            text = document[number].get_textpage().get_text_range()
        except pypdfium2.PdfiumError as error:
            return _fail(f"page {number + 1}: {error}")
        written += len(text)
        if written > MAX_CHARACTERS:
            return _fail(f"more than {MAX_CHARACTERS:,} characters")
        page = f"# page {number + 1}\n{text}\n"
        sys.stdout.buffer.write(page.encode("utf-8", "replace"))
    return 0


def _fail(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
