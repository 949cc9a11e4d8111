"""Handlers for control threads that need no device, and what goes with them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

from rdmaxfer.cm import messages as m
from rdmaxfer.errors import RdmaxferError

ANY_PORT = "tcp://127.0.0.1:*"
PATIENCE_S = 20.0
PATIENCE_MS = 20_000

VERBS = m.VerbsAddress(
    device="rxe0",
    gid=bytes(16),
    lid=0,
    queue_pairs=(m.QueuePair(qp_num=1, psn=2),),
    link_layer="ethernet",
    active_mtu=1024,
    max_msg_sz=1 << 23,
)
RING = m.RingAddress(address=4096, rkey=7, slots=4, slot_bytes=4096, slot_stride=12288, payload_offset=8192, epoch=0)


def make_hello(lease_s: float = 10.0) -> m.Hello:
    return m.Hello(
        session=secrets.token_bytes(16),
        request=1,
        role="sender",
        node=b"n" * 16,
        stream=b"s" * 16,
        attempt=1,
        identity="",
        resume=None,
        fabrics=(VERBS,),
        slots=4,
        slot_bytes=4096,
        max_slot_bytes=1 << 20,
        lease_s=lease_s,
        reconnect_s=30.0,
        name="client",
    )


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        pause.wait(0.005)


class Server:
    def __init__(self) -> None:
        self.open: set[bytes] = set()
        self.ready_ones: set[bytes] = set()
        self.gone_ones: list[tuple[bytes, bool]] = []
        self.errors: list[Exception] = []
        self.peers: set[str] = set()
        self.raises: Exception | None = None
        self.threads: set[str] = set()

    def hello(self, hello: m.Hello, peer: str) -> m.Accept | m.Refuse:
        self.threads.add(threading.current_thread().name)
        self.peers.add(peer)
        if self.raises is not None:
            raise self.raises
        self.open.add(hello.session)
        return m.Accept(
            session=hello.session,
            request=1,
            role="receiver",
            node=b"m" * 16,
            start=m.Progress(released=0, received=0),
            fabric=VERBS,
            reason="because",
            path_mtu=1024,
            max_msg_sz=1 << 23,
            slots=4,
            slot_bytes=4096,
            max_slot_bytes=1 << 20,
            lease_s=1.0,
            name="server",
            ring=RING,
        )

    def ready(self, session: bytes, ready: m.Ready) -> m.Started | m.Refuse:
        self.ready_ones.add(session)
        return m.Started(session=session, request=1)

    def wanted(self, session: bytes) -> int:
        return 0

    def resize(self, session: bytes, resize: m.Resize) -> m.Resized | m.Refuse:
        return m.Resized(session=session, request=1, ring=RING)

    def gone(self, session: bytes, reason: str, end: m.End) -> None:
        self.open.remove(session)
        self.gone_ones.append((session, end == "goodbye"))

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


class Client:
    def __init__(self) -> None:
        self.answers: list[m.Resized | m.Refuse] = []
        self.ends: list[RdmaxferError | None] = []
        self.raises: Exception | None = None

    def accepted(self, accept: m.Accept) -> m.RingAddress | None:
        return None

    def started(self) -> None:
        pass

    def resized(self, resized: m.Resized | m.Refuse) -> None:
        self.answers.append(resized)

    def renewed(self, wanted_bytes: int) -> None:
        self.wanted = wanted_bytes

    def ended(self, error: RdmaxferError | None) -> None:
        self.ends.append(error)
        if self.raises is not None:
            raise self.raises
