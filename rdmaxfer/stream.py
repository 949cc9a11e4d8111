"""The frames between one sender and one receiver. A stream outlives its connections: a *link* is one of them.

When a link breaks, its stream waits for the next one: the side that connected asks for it, the other keeps a place. A goodbye, or
too long a wait, ends the stream for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from rdmaxfer.link import Link

if TYPE_CHECKING:
    from rdmaxfer.cm.messages import Progress
    from rdmaxfer.errors import PeerLost

L = TypeVar("L", bound=Link)


class Origin(NamedTuple):
    """Whom to connect to, once more if need be."""

    endpoint: str
    host: str
    peer_key: bytes | None


class Stream(Generic[L]):
    """What both directions share. With the node's lock held."""

    def __init__(self, id_: bytes, origin: Origin | None) -> None:
        self.id = id_
        self.origin = origin
        """None: the peer connects to us."""
        self.peer = origin.host if origin is not None else ""
        """As it calls itself; until it has, its host."""
        self.identity = ""
        """What a successor of this peer would be recognised by; "" for nothing."""
        self.reconnect_s = 0.0
        """How long to wait for another connection when one breaks."""
        self.link: L | None = None
        """The connection in use; None while it waits for one."""
        self.lost: PeerLost | None = None
        """Why it waits."""
        self.latest: L | None = None
        """The connection in use, or the one before: to be torn down before the stream goes on."""
        self.attempt = 0
        """Of the latest HELLO about it, sent or received."""
        self.unwanted = False
        """Whether who asked for it has given it up, while it was being connected for the first time."""
        self.waits = 0
        """How often it has begun to wait."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with {self.peer}{' (waiting)' if self.link is None else ''}>"

    def progress(self) -> Progress | None:
        """What to say of it in HELLO."""
        raise NotImplementedError
