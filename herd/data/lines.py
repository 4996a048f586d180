"""Evidence that is a line of a text."""


def whole_line(text: str, start: int) -> str:
    """The whole line at `start` with the line breaks around it, so that it matches nowhere else."""
    end = text.find("\n", start)
    return text[max(start - 1, 0) : end + 1 if end >= 0 else len(text)]
