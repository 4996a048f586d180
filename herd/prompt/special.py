"""Pieces of a prompt: text, and special tokens, which text never becomes whatever it says."""


class Special(str):
    """A special token by its text; in a prompt any other `str` is plain text, even if it reads the same."""
