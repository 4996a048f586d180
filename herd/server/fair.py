"""Who is next: of the clients that wait, the one that was given least, however many requests each has waiting."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests of several clients. Each client's come in their order.

    Whoever comes after a while begins with as much as the least that others who wait were given: nothing is saved up,
    and who asks now and then is next, as long as that is less than others get.
    """

    def __init__(self, size: Callable[[T], int]) -> None:
        """size: of a request. Of clients that were given the same, the one with the smaller request is next."""
        self._size = size
        self._waiting: dict[str, deque[T]] = {}
        self._given: dict[str, int] = {}  # tokens, from a common beginning
        self._least = 0  # what the one of them that was given least had been given, when one was served last

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._waiting.values() for item in items)

    def count(self, client: str) -> int:
        """Requests of a client."""
        return len(self._waiting.get(client, ()))

    def push(self, client: str, item: T) -> None:
        """Queue a request behind the client's others."""
        if client not in self._waiting:
            self._given[client] = max(self._given.get(client, 0), self._least)
        self._waiting.setdefault(client, deque()).append(item)

    def first(self, most: int | None = None) -> T | None:
        """The one that is next, None if there is none. most: of those that are at most so large."""
        client = self._next(most)
        return None if client is None else self._waiting[client][0]

    def pop(self, most: int | None = None) -> T:
        """Take `first`, which there must be; that alone counts as one token."""
        client, least = self._next(most), self._next()
        assert client is not None and least is not None, "there is one"
        self._least = self._given[least]
        items = self._waiting[client]
        item = items.popleft()
        if not items:
            del self._waiting[client]
        self.give(client, 1)
        self._given = {
            name: tokens for name, tokens in self._given.items() if tokens > self._least or name in self._waiting
        }
        return item

    def give(self, client: str, tokens: int) -> None:
        """Note what a client was given."""
        self._given[client] = max(self._given.get(client, 0), self._least) + tokens

    def remove(self, item: T) -> bool:
        """Take one out of turn; False if it is not there."""
        for client, items in self._waiting.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._waiting[client]
                return True
        return False

    def _next(self, most: int | None = None) -> str | None:
        sizes = {client: self._size(items[0]) for client, items in self._waiting.items()}
        fit = [client for client, size in sizes.items() if most is None or size <= most]
        return min(fit, key=lambda client: (self._given[client], sizes[client]), default=None)
