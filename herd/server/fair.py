"""Who is next: clients in turn, however many requests each of them has waiting."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests of several clients. Each client's come in their order, and clients take turns."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._waiting.values() for item in items)

    def push(self, client: str, item: T) -> None:
        """Queue a request behind the client's others."""
        self._waiting.setdefault(client, deque()).append(item)

    def first(self) -> T:
        """The one that is next. There must be one."""
        return next(iter(self._waiting.values()))[0]

    def pop(self) -> T:
        """Take the one that is next; its client then comes last."""
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[client] = items
        return item

    def remove(self, item: T) -> bool:
        """Take one out of turn; False if it is not there."""
        for client, items in self._waiting.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._waiting[client]
                return True
        return False
