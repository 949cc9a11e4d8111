"""What a Sender or Receiver says of itself to other processes of its user, and to root, on this machine, such as `rdmaxfer top`.

It listens at a socket in the kernel's abstract name space (unix(7)): nothing is left behind when the process ends, in whatever way,
and it costs nothing as long as nobody asks. Who connects gets one JSON object, and the connection ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from rdmaxfer import credentials
from rdmaxfer.waiting import PATIENCE_S

if TYPE_CHECKING:
    from rdmaxfer.node import Node

PREFIX = "rdmaxfer/"
ANSWER_S = 1.0
"""How long to wait for an answer: a process may have been stopped."""
AGAIN_S = 1.0
"""When to try again to answer, if there were too few file descriptors."""
MAX_BYTES = 1 << 20
MAX_LINKS = 100
MAX_ARGUMENT = 200


Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Quantiles(msgspec.Struct):
    median_s: float
    p99_s: float


class _Statistics(msgspec.Struct):
    frames: Count
    bytes: Count
    reconnecting: Count
    unreleased: Count = 0
    leased: Count = 0
    dropped: Count = 0
    unheard: Count = 0
    missed: Count = 0
    push_to_recv: _Quantiles | None = None


class _Link(msgspec.Struct):
    peer: str
    fabric: str


class Told(msgspec.Struct):
    """What has to be right in an answer: root asks other users' processes, too. There is more in it."""

    pid: Count
    role: Literal["sender", "receiver"]
    program: list[str]
    since_s: float
    at_s: float
    slots: Count
    endpoints: list[str] = []
    links: list[_Link] = []
    statistics: _Statistics | None = None


_TOLD = msgspec.json.Decoder(Told)


class Status:
    """See the module. `answer` is called on the control thread of `node`, when `fd` is readable."""

    def __init__(self, node: Node[Any, Any]) -> None:
        self._node = node
        self._since_s = time.time()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(f"\0{PREFIX}{os.geteuid()}/{os.getpid()}/{secrets.token_hex(4)}")
            self._socket.listen(8)
        except BaseException:
            self._socket.close()
            raise

    def __repr__(self) -> str:
        return f"<Status of {self._node!r}>"

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def answer(self) -> bool:
        """Tell whoever has connected. False if it can't be done now, and the socket would only say so again at once."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone already
            return True
        except OSError:  # too few descriptors; closed
            return False
        with connection, contextlib.suppress(OSError):
            if credentials.peer(connection).uid in (0, os.geteuid()):
                connection.setblocking(False)
                connection.send(json.dumps(self._describe()).encode())  # it fits into the socket's buffer, or is cut
        return True

    def _describe(self) -> dict[str, Any]:
        node = self._node
        known: dict[str, Any] = {
            "pid": os.getpid(),
            "role": node.role,
            "name": node.identity or node.name,
            "program": [each[:MAX_ARGUMENT] for each in sys.argv[:8]],
            "since_s": self._since_s,
            "at_s": time.time(),
            "slots": node.slots,
        }
        if not node._lock.acquire(timeout=PATIENCE_S):  # leases are renewed on this thread
            return {**known, "busy": True}
        try:
            known["endpoints"] = [server.endpoint for server in node._servers]
            known["links"] = [dataclasses.asdict(link) for link in node.links()[:MAX_LINKS]]
            known["statistics"] = dataclasses.asdict(node.statistics())
        finally:
            node._lock.release()
        return known


def find(unix: Path = Path("/proc/net/unix")) -> Iterator[dict[str, Any]]:
    """What the Senders and Receivers of this user on this machine say of themselves, or of all users, if this is root. Those that
    don't answer are left out."""
    me = os.geteuid()
    names = set(re.findall(rf"@({PREFIX}(\d+)/\S+)$", unix.read_text(errors="replace"), re.MULTILINE))
    for name, owner in sorted(names):
        uid = int(owner)
        if me in (0, uid):
            known = _ask(name, uid)
            if known is not None:
                yield {**known, "uid": uid}


def _ask(name: str, uid: int) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, RecursionError), socket.socket(socket.AF_UNIX) as connection:
        end_s = time.monotonic() + ANSWER_S
        connection.settimeout(ANSWER_S)
        connection.connect(f"\0{name}")
        if credentials.peer(connection).uid != uid:  # anybody can take a name like ours
            return None
        parts: list[bytes] = []
        while part := connection.recv(1 << 16):
            parts.append(part)
            left_s = end_s - time.monotonic()
            if left_s <= 0 or sum(map(len, parts)) > MAX_BYTES:
                return None
            connection.settimeout(left_s)
        _TOLD.decode(b"".join(parts))  # raises a ValueError
        answer: dict[str, Any] = json.loads(b"".join(parts))
        return answer
    return None


__all__ = ["AGAIN_S", "Status", "find"]
