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
        self._least = 0  # what the last that was served had been given

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

    def first(self) -> T:
        """The one that is next. There must be one."""
        return self._waiting[self._next()][0]

    def pop(self) -> T:
        """Take the one that is next; that alone counts as one token."""
        client = self._next()
        self._least = self._given[client]
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

    def _next(self) -> str:
        return min(self._waiting, key=lambda client: (self._given[client], self._size(self._waiting[client][0])))
