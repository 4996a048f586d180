"""Stop strings: text comes out until one of them does."""

from collections.abc import Sequence

from herd.errors import PromptError


class StopText:
    """Takes text piece by piece and gives it back up to the stop string that is complete first.

    What could be the start of a stop string is held back, so nothing that was given is taken back, and the result does
    not depend on how the text was cut. PromptError for an empty stop string.
    """

    def __init__(self, stop: str | Sequence[str] = ()) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise PromptError("a stop string is empty; it would stop before the first token")
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def push(self, piece: str) -> str:
        """Text that certainly stands before any stop string; "" once one was found."""
        if self.found is not None:
            return ""
        self._held += piece
        # The one that ends first; of those that end together the longest.
        places = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if places:
            _, keep, self.found = min(places)
        else:
            keep = len(self._held) - self._maybe()
        out, self._held = self._held[:keep], self._held[keep:]
        return out

    def finish(self) -> str:
        """What was held back at the end of the text; "" once a stop string was found."""
        out, self._held = self._held if self.found is None else "", ""
        return out

    def _maybe(self) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._starts(self._held[-n:])), 0)

    def _starts(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
