"""Lines of a text: what answers quote ends where lines do, so that it ends where the text's tokens end."""


def line_end(text: str, at: int) -> int:
    """Where the line at `at` ends, without the blanks at its end (never before `at`)."""
    end = text.find("\n", at)
    return at + len(text[at : end if end >= 0 else len(text)].rstrip())


def whole_line(text: str, start: int) -> str:
    """The whole line at `start` with the line breaks around it, so that it matches nowhere else."""
    end = text.find("\n", start)
    return text[max(start - 1, 0) : end + 1 if end >= 0 else len(text)]
