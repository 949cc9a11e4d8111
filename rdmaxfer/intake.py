"""Frames that a C or C++ program on this machine fills, in memory that lies here: they go out from where they are.

rdmaxfer.h is what such a program uses, _native/intake.h what both sides say to each other, over the queues of shm.h. What the
program writes is not believed: it may be broken.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import select
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from rdmaxfer import credentials
from rdmaxfer.errors import (
    ClosedError,
    EndpointError,
    ForkedError,
    NotConnected,
    PeerLost,
    RdmaxferError,
    TimeoutExpired,
)
from rdmaxfer.memory import Buffer
from rdmaxfer.outgoing import whole
from rdmaxfer.published import Published, parse
from rdmaxfer.staging import PAGE, Holder, StagingSlot, Use
from rdmaxfer.status import AGAIN_S
from rdmaxfer.waiting import Deadline

if TYPE_CHECKING:
    from typing_extensions import Self

    from rdmaxfer.sender import Sender

ABI: Final = 1
PREFIX: Final = "rdmaxfer-intake/"
MAGIC: Final = b"rdmaxint"
MAX_NAME: Final = 64
MAX_SLOTS: Final = 1024
WELCOME: Final = struct.Struct("=8sIIIIQQ512s")
GREETING: Final = struct.Struct("=I")
GREETING_S: Final = 1.0
"""How long to wait for a program that has connected to say what it is."""
TURN_S: Final = 0.2
"""How often to see, while there is no room for a frame, whether it is to end."""

log = logging.getLogger("rdmaxfer")


class _Bad(Exception):
    """The program has done what it must not; its text is for whoever wrote it."""


class Intake:
    """What `Sender.intake` gives: programs attach to it by its name, one at a time, and it pushes what they publish.

    Close it, or use it in a `with` block; closing the sender does so, too. Closing it pushes what was published.
    """

    def __init__(self, sender: Sender, name: str, slots: int, slot_bytes: int) -> None:
        if not re.fullmatch(rf"[\w.-]{{1,{MAX_NAME}}}", name, re.ASCII):
            raise EndpointError(
                f"{name!r} is no name of an intake.", fix=f"up to {MAX_NAME} of a-z, 0-9, '_', '-', '.'."
            )
        if not 1 <= slots <= MAX_SLOTS or slot_bytes < 1:
            raise ValueError(f"an intake has 1 to {MAX_SLOTS} slots of at least a byte, not {slots} of {slot_bytes}")
        self.name = name
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.frames = 0
        """How many were pushed."""
        self.error: Exception | None = None
        """Why the latest program was sent away, if it was."""
        self._sender = sender
        self._lock = threading.Lock()
        """Over all that the thread that gives slots back uses, too. The sender's may be taken with it, not the other way round."""
        self._ring: _Ring | None = None
        self._old: list[_Ring] = []
        """Whose program has gone, with frames on their way."""
        self._gone: deque[weakref.ref[Holder]] = deque()
        """Uses of slots that have ended."""
        self._end_s: float | None = None
        """When it has to be over, once it is being closed."""
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._listener = _listen(name)
        except BaseException:
            os.close(self._wake_fd)
            raise
        self._threads = [
            threading.Thread(target=self._guard, args=(what,), name=f"rdmaxfer-intake-{number}", daemon=True)
            for number, what in enumerate((self._take_in, self._give_back))
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"<Intake {self.name!r}, {self.slots} slots of {self.slot_bytes} bytes, {self.frames} frames>"

    @property
    def attached(self) -> int | None:
        """The process id of the program that is attached, if one is."""
        ring = self._ring
        return ring.pid if ring is not None else None

    def close(self, timeout: float = 5.0) -> None:
        """Push what was published, then let go of the program, within `timeout` seconds. Twice is harmless."""
        if self._sender._forked:
            return
        if self._end_s is None:
            self._end_s = time.monotonic() + timeout
            os.eventfd_write(self._wake_fd, 1)
        self._threads[0].join(timeout + GREETING_S + 2 * TURN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def over(self) -> bool:
        """Whether it is closed, and no frame of it is on its way."""
        return not self._threads[0].is_alive() and not self._old and self._ring is None

    # --- for the sender --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Unregister all memory: nothing reads from it any more. (The second thread ends with the sender.)"""
        self._threads[0].join(GREETING_S + 2 * TURN_S)
        with self._lock, self._sender._lock:
            for ring in [*self._old, self._ring]:
                if ring is not None:
                    ring.free()
            self._old.clear()
            self._ring = None
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    # --- threads ---------------------------------------------------------------------------------------------------------

    def _guard(self, what: Callable[[], None]) -> None:
        try:
            what()
        except (ClosedError, ForkedError):
            pass
        except BaseException as error:
            self._sender.control_failed(error)

    def _give_back(self) -> None:
        """Receivers release frames while nobody calls the sender."""
        seen = 0
        while True:
            seen = self._sender.wait_for_release(seen)
            self._collect()

    def _collect(self) -> None:
        """Slots whose frames are done with go back to the program, or to nobody if it has gone."""
        with self._lock:
            while self._gone:
                use = self._gone.popleft()
                if isinstance(use, Use):
                    for ring in [*self._old, self._ring]:
                        if ring is not None:
                            ring.give_back(use.slot)
            for ring in [old for old in self._old if old.idle]:
                with self._sender._lock:  # endpoints hear that they lose the memory: nobody may use them meanwhile
                    ring.free()
                self._old.remove(ring)

    def _take_in(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._listener.close)
            poll = stack.enter_context(select.epoll())
            poll.register(self._listener, select.EPOLLIN)
            poll.register(self._wake_fd, select.EPOLLIN)
            while self._end_s is None:
                poll.poll()
                if self._sender.closed:
                    return
                try:
                    guest, _ = self._listener.accept()
                except (BlockingIOError, ConnectionAbortedError):  # gone already
                    continue
                except OSError as error:  # too few descriptors: it goes on waiting at the door
                    log.warning("no program can attach to the intake %s now: %s", self.name, error)
                    select.select([self._wake_fd], [], [], AGAIN_S)
                    continue
                with guest:
                    self._serve(guest)

    def _serve(self, guest: socket.socket) -> None:
        """From the greeting of a program to its end."""
        try:
            if not self._greeted(guest):
                return
            ring = _Ring(self.slots, self.slot_bytes, self._wake_fd, guest)
        except (RdmaxferError, OSError) as error:
            log.error("no program can attach to the intake %s: %s", self.name, error)
            self._say(guest, error, welcome=True)
            return
        with self._lock:
            self._ring = ring
        try:
            ring.welcome(guest)
            log.info("process %d is attached to the intake %s", ring.pid, self.name)
            while self._end_s is None and ring.wait():
                self._push_all(ring)
            self._push_all(ring)  # what it published before it went
        except _Bad as error:
            self._turn_out(guest, error)
        except (TimeoutExpired, OSError) as error:
            log.warning("the intake %s has let go of process %d: %s", self.name, ring.pid, error)
        except (ClosedError, ForkedError):
            raise
        except RdmaxferError as error:
            self._turn_out(guest, error)
        finally:
            with self._lock:
                ring.leave()
                self._ring = None
                self._old.append(ring)
            self._collect()

    def _turn_out(self, guest: socket.socket, error: Exception) -> None:
        self.error = error.with_traceback(None)  # which would keep the frame's memory
        log.error("a frame of the intake %s can't be sent: %s", self.name, error)
        self._say(guest, error)

    def _greeted(self, guest: socket.socket) -> bool:
        guest.settimeout(GREETING_S)
        try:
            greeting = guest.recv(GREETING.size + 1)
        except (TimeoutError, ConnectionError):
            return False
        guest.setblocking(False)
        if not greeting or credentials.peer(guest).uid != os.geteuid():
            return False
        abi = GREETING.unpack(greeting)[0] if len(greeting) == GREETING.size else 0
        with contextlib.suppress(BlockingIOError):
            if not guest.recv(1, socket.MSG_PEEK):  # it did not want to wait so long
                return False
        if abi != ABI:
            self._say(
                guest, _Bad(f"it has ABI {abi}, and this rdmaxfer ABI {ABI}: build it with this one's rdmaxfer.h"), True
            )
        return abi == ABI

    def _say(self, guest: socket.socket, error: Exception, welcome: bool = False) -> None:
        text = str(error).encode()[:500]
        with contextlib.suppress(OSError):
            guest.send(WELCOME.pack(MAGIC, ABI, 0, 0, 0, 0, 0, text) if welcome else text)

    def _push_all(self, ring: _Ring) -> None:
        """What has been published."""
        for slot, published in ring.published():
            self._push(ring, slot, published)
            self._collect()

    def _push(self, ring: _Ring, slot: StagingSlot, published: Published) -> None:
        kind, metadata, captured_ns = published
        pieces, holder = whole(slot, kind.payload_bytes), Holder()
        slot.hold(holder, self._gone.append)
        sender = self._sender
        try:
            while not holder.sent:
                try:
                    with sender._lock:
                        sender._push(kind, pieces, holder, metadata, captured_ns, Deadline(TURN_S))
                except (TimeoutExpired, NotConnected) as error:
                    if self._end_s is not None and time.monotonic() >= self._end_s:
                        raise
                    if isinstance(error, NotConnected):  # yet
                        select.select([self._wake_fd], [], [], TURN_S)
                except PeerLost as error:
                    log.warning("%s", error)
            self.frames += 1
        finally:
            if not holder.sent:
                slot.let_go(holder)
                with self._lock:
                    ring.leave()  # or the program would take it for a frame that was released
                    ring.give_back(slot)


def _listen(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(f"\0{PREFIX}{os.geteuid()}/{name}")
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise EndpointError(
            f"another process of this machine has an intake {name!r}, or it can't be had: {error.strerror}.",
            fix="choose another name, or end that process.",
        ) from None
    return listener


class _Ring:
    """The memory that one program fills. Another one gets other memory: who has ended badly may still have this."""

    def __init__(self, slots: int, slot_bytes: int, wake_fd: int, guest: socket.socket) -> None:
        module: Any = importlib.import_module("rdmaxfer._shm")
        self._ffi, self._lib = module.ffi, module.lib
        self.pid = credentials.peer(guest).pid
        self._slot_bytes = slot_bytes
        self._stride = -(-slot_bytes // PAGE) * PAGE
        self._capacity = 1 << (slots - 1).bit_length()
        self._guest = guest
        self._wake_fd = wake_fd
        self._buffer = Buffer(slots * self._stride, shared=True)
        self.slots = [StagingSlot(self._buffer, number * self._stride, slot_bytes) for number in range(slots)]
        self._numbers = {slot: number for number, slot in enumerate(self.slots)}
        self._theirs = [True] * slots
        """Slots that the program may fill."""
        self._here = True
        self._arrived = 0
        self._queues = Buffer(self._lib.sx_bytes(self._capacity), shared=True)
        self._memory = self._ffi.from_buffer(self._queues.view(0, self._queues.nbytes))
        self._item = self._ffi.new("sx_item *")
        self._came = self._ffi.new("sx_item *")
        self._fds = self._ffi.new("int[4]")
        self._slept = self._ffi.new("int *")
        with contextlib.ExitStack() as stack:
            self._own_fd, self._peer_fd = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
            stack.callback(os.close, self._own_fd)
            stack.callback(os.close, self._peer_fd)
            self._epoll = stack.enter_context(select.epoll())
            for fd in (self._own_fd, guest.fileno(), wake_fd):
                self._epoll.register(fd, select.EPOLLIN)
            self._ep = self._lib.sx_new(self._memory, self._capacity, 1, self._own_fd, self._peer_fd)
            if self._ep == self._ffi.NULL:
                raise MemoryError
            stack.callback(self._lib.sx_free, self._ep)
            self._eps = self._ffi.new("sx_ep *[]", [self._ep])
            self._lib.sx_set_receives(self._ep, 1 << 63)
            for number in range(slots):
                self._post(number)
            self._stack = stack.pop_all()

    def __repr__(self) -> str:
        return f"<_Ring of process {self.pid}>"

    def welcome(self, guest: socket.socket) -> None:
        assert self._buffer.fd is not None
        assert self._queues.fd is not None
        fds = [self._buffer.fd, self._queues.fd, self._peer_fd, self._own_fd]
        about = (len(self.slots), self._capacity, 0, self._slot_bytes, self._stride)
        socket.send_fds(guest, [WELCOME.pack(MAGIC, ABI, *about, b"")], fds)

    def _post(self, number: int) -> None:
        self._item[0] = {"kind": self._lib.SX_IMM, "imm": number}
        if self._lib.sx_post(self._ep, self._item, self._ffi.NULL, 0, 0) < 0:
            log.debug("%r has spoilt its queue", self)  # taking from the other one will find out

    def give_back(self, slot: StagingSlot) -> None:
        """The slot's frame is done with, if it is one of this ring."""
        number = self._numbers.get(slot)
        if number is None or self._theirs[number] or not slot.free:
            return
        self._theirs[number] = True
        if not self._here:
            return
        if not slot.lent:
            self._post(number)
        elif all(each.lent for each in self.slots):
            with contextlib.suppress(OSError):
                self._guest.send(
                    b"receivers that are gone may still read all of its memory: attach again, for other memory"
                )
                self._guest.shutdown(socket.SHUT_RDWR)

    @property
    def idle(self) -> bool:
        return all(self._theirs)

    def wait(self) -> bool:
        """Wait until something was published; False if the program has gone, or this side is to end."""
        count = self._lib.sx_wait(
            self._eps, 1, self._epoll.fileno(), self._wake_fd, 0, -1, self._fds, len(self._fds), self._slept
        )
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return bool(count == 0)  # its socket says nothing but its end

    def published(self) -> Iterator[tuple[StagingSlot, Published]]:
        """Each frame that was published, once. Raises _Bad, FrameError."""
        while True:
            count = self._lib.sx_arrived(self._ep, self._came, 1)
            if count < 0:
                raise _Bad("the memory that is shared with it is damaged")
            if count == 0:
                return
            slot, data = self._read()
            self._arrived += 1
            self._lib.sx_consume(self._ep, 0, self._arrived)
            published = parse(data, self._slot_bytes)
            self._theirs[self._numbers[slot]] = False
            yield slot, published

    def _read(self) -> tuple[StagingSlot, bytes]:
        """What has come first."""
        item = self._came
        slot = self.slots[item.imm] if item.imm < len(self.slots) else None
        if item.kind != self._lib.SX_WRITE or slot is None or slot.lent or not self._theirs[item.imm]:
            raise _Bad("it published a slot that it did not have")
        return slot, bytes(self._ffi.buffer(self._lib.sx_data(self._ep, 0), item.data_bytes))

    def leave(self) -> None:
        """The program has gone: what it had in its hands is nobody's."""
        self._here = False

    def free(self) -> None:
        """Unregister the memory, and let go of the queues. Twice is harmless."""
        self._here = False
        for slot in self.slots:
            slot.unregister()
        self._stack.close()


__all__ = ["Intake"]
