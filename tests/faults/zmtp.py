"""ZeroMQ's wire protocol (https://rfc.zeromq.org/spec/23), as far as a proxy must know it: where a message ends."""

from __future__ import annotations

import struct

import msgspec

from rdmaxfer.cm.messages import MAGIC, PREFIX_BYTES

GREETING_BYTES = 64
MORE = 1
LONG = 2
COMMAND = 4


class Splitter:
    """Cuts one direction of a connection into whole messages, with their frame headers. The greeting comes in the pieces that it
    came in, and so does all of a stream that is not ZeroMQ's."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._greeted = 0
        self._raw = False

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now."""
        found = []
        if self._greeted < GREETING_BYTES and not self._raw:
            if self._greeted == 0 and data[:1] != b"\xff":
                self._raw = True
            greeting = data[: GREETING_BYTES - self._greeted]
            if not self._raw:
                self._greeted += len(greeting)
                found.append(greeting)
                data = data[len(greeting) :]
        if self._raw:
            return [data]
        self._data += data
        while (end := self._end()) is not None:
            found.append(bytes(self._data[:end]))
            del self._data[:end]
        return [each for each in found if each]

    def _end(self) -> int | None:
        at = 0
        while True:
            found = frame_at(self._data, at)
            if found is None:
                return None
            flags, _, at = found
            if not flags & MORE:
                return at


def frame_at(data: bytes | bytearray, at: int) -> tuple[int, int, int] | None:
    """(flags, beginning of the body, its end) of the frame at `at`, if all of it is there."""
    if at >= len(data):
        return None
    flags = data[at]
    head = 9 if flags & LONG else 2
    if len(data) < at + head:
        return None
    size = struct.unpack_from(">Q", data, at + 1)[0] if flags & LONG else data[at + 1]
    return (flags, at + head, at + head + size) if len(data) >= at + head + size else None


def body(message: bytes) -> bytes:
    """The last frame of a message: what rdmaxfer said."""
    at, last = 0, b""
    while (found := frame_at(message, at)) is not None:
        _, begin, at = found
        last = message[begin:at]
    return last


def kind(message: bytes) -> str:
    """The type of rdmaxfer's message in it; "" if there is none, or it is encrypted."""
    said = body(message)
    if not said.startswith(MAGIC):
        return ""
    try:
        return str(msgspec.msgpack.decode(said[PREFIX_BYTES:])["type"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return ""
