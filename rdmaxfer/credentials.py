"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("iII")


class Peer(NamedTuple):
    pid: int
    uid: int


def peer(connection: socket.socket) -> Peer:
    """Process and user that connected or listened there, as the kernel has it: SO_PEERCRED, unix(7)."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)
