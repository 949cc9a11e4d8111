"""Frames that one process receives, for others on the same machine: where to find it, and handing frames on.

Who shares holds a lock on a small file, `NAME.endpoint` in a directory of this user, with the endpoint of a Sender over shared
memory. The kernel lets go of the lock when that process ends, in whatever way; so a file that is left behind misleads nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdmaxfer.errors import ClosedError, EndpointError, ForkedError, PeerLost
from rdmaxfer.receiver import Receiver
from rdmaxfer.sender import Sender

if TYPE_CHECKING:
    from rdmaxfer.lease import Frame
    from rdmaxfer.waiting import Deadline

MAX_NAME = 64
LOOK_S = 0.02
"""How often `attach` looks for one that shares."""


def directory() -> Path:
    """Where the files are: $XDG_RUNTIME_DIR/rdmaxfer, or a directory in /tmp that is nobody else's. Raises EndpointError."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "rdmaxfer" if base else Path(tempfile.gettempdir()) / f"rdmaxfer-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EndpointError(
            f"{path} is not a directory of this user alone.",
            fix="remove it, or set XDG_RUNTIME_DIR to a directory that is.",
        )
    return path


def _file(name: str) -> Path:
    if not re.fullmatch(rf"[\w.-]{{1,{MAX_NAME}}}", name) or name.startswith("."):
        raise EndpointError(
            f"{name!r} is no name to share by.", fix="letters, digits, '_', '-' and '.', not at the beginning."
        )
    return directory() / f"{name}.endpoint"


class Sharing:
    """Hands frames on to whoever has attached; `collect` is called when some of them were released. Raises EndpointError if another
    process shares by this name."""

    def __init__(self, name: str, collect: Callable[[], None]) -> None:
        self._path = _file(name)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise EndpointError(
                f"another process shares frames as {name!r} already.", fix="choose another name, or end that process."
            ) from None
        # On one machine a connection breaks only with its process: frames are not to be held for it.
        self._sender = Sender(fabric="shm", reconnect=False)
        try:
            endpoint = self._sender.bind("tcp://127.0.0.1:*")
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, endpoint.encode() + b"\n", 0)
        except BaseException:
            self._sender.close()
            os.close(self._fd)
            raise
        self._collect = collect
        self._thread = threading.Thread(target=self._main, name="rdmaxfer-share", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        """Nobody else may be waiting for what is released."""
        seen = 0
        try:
            while True:
                seen = self._sender.wait_for_release(seen)
                self._collect()
        except (ClosedError, ForkedError):
            pass
        except BaseException as error:
            self._sender.control_failed(error)

    def forward(self, frame: Frame, deadline: Deadline) -> None:
        """Give a frame to all that are attached now, once there is room for it at each. Called again for the same frame, after
        TimeoutExpired or Ctrl-C, it does so once."""
        lease = frame._lease
        if lease is None or lease.forwarded or not self._sender.heard:
            return
        before = self._sender.next_seq
        try:
            with contextlib.suppress(PeerLost):  # who has gone needs no frames
                left_s = deadline.left_s()
                self._sender.forward(frame, timeout=None if math.isinf(left_s) else max(0.0, left_s))
        finally:
            lease.forwarded = self._sender.next_seq != before

    async def room(self, frame: Frame, deadline: Deadline) -> None:
        """Wait until all that are attached have room for `frame`."""
        sender, nbytes = self._sender, frame.nbytes
        with contextlib.suppress(PeerLost):
            await sender._alarm.until(
                lambda: sender._takers(nbytes) if sender.heard else [],
                deadline,
                "waiting for those that have attached to have room for a frame",
            )

    def close(self, timeout_s: float) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.ftruncate(fd, 0)
        os.close(fd)
        with contextlib.suppress(PeerLost):
            self._sender.close(timeout_s)
        self._thread.join(timeout_s)


def attach(name: str, timeout: float | None = 30.0, **options: Any) -> Receiver:
    """A Receiver of the frames that a process of this user on this machine receives with `Receiver(share=name)`, from now on.

    They are read where that process has them, and nothing is copied. Each process has its own lease: a slot goes back to its
    sender when all have released it, so whoever holds frames for long holds up all. `options`: as those of Receiver. Waits up to
    `timeout` seconds for somebody to share by that name. Raises ConnectTimeout, EndpointError.
    """
    path = _file(name)
    end_s = None if timeout is None else time.monotonic() + timeout
    receiver = Receiver(fabric="shm", **options)
    try:
        while True:
            endpoint = _look(path)
            left_s = None if end_s is None else max(0.0, end_s - time.monotonic())
            if endpoint:
                receiver.connect(endpoint, left_s)
                return receiver
            if left_s == 0:
                raise EndpointError(
                    f"nobody shares frames as {name!r} on this machine.",
                    fix=f"start a Receiver(share={name!r}) first, as the same user.",
                )
            time.sleep(LOOK_S)
    except BaseException:
        receiver.close()
        raise


def _look(path: Path) -> str:
    """Where the frames of that file are to be had; "" if nowhere."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 256, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
    return ""


__all__ = ["Sharing", "attach"]
