"""Whose request is answered next, when not all can be answered at once.

Each connection has its turn, however much the others ask: who sends a thousand requests over one connection keeps himself waiting,
and somebody new is answered next.
"""

from __future__ import annotations

import collections
from typing import NamedTuple


class Request(NamedTuple):
    """What was asked, and by whom."""

    data: bytes
    envelope: list[bytes]
    """The first part is the connection's routing id."""
    peer: str
    """Its address."""


class Turns:
    """At most `limit` requests that wait for an answer, those of each connection in their order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._requests: dict[bytes, Request] = {}
        self._queues: dict[bytes, collections.deque[bytes]] = {}
        """By routing id, in the order of their turns: what each connection asks. None is empty."""

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> bool:
        """False if there is no room for it. Its sender gets no answer, then, and asks again."""
        data, (connection, *_) = request.data, request.envelope
        if data not in self._requests:
            if len(self) >= self._limit and not self._make_room(connection):
                return False
            self._queues.setdefault(connection, collections.deque()).append(data)
        self._requests[data] = request  # a repeat keeps its place; its sender listens only to the last
        return True

    def take(self) -> Request:
        """The next one. Raises StopIteration if there is none."""
        connection = next(iter(self._queues))
        queue = self._queues.pop(connection)
        request = self._requests.pop(queue.popleft())
        if queue:
            self._queues[connection] = queue
        return request

    def _make_room(self, connection: bytes) -> bool:
        """Forget the latest request of whoever has most; False if nobody has two more than `connection`."""
        longest = max(self._queues.values(), key=len)
        if len(longest) < len(self._queues.get(connection, ())) + 2:
            return False
        del self._requests[longest.pop()]
        return True
