"""librdmaxfer_shm by ctypes, for tests: what a C program does, one call at a time."""

from __future__ import annotations

import ctypes
import errno
import importlib
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np

import rdmaxfer

LIBRARY = Path(rdmaxfer.__file__).parent / "lib" / "librdmaxfer_shm.so"
ABI = 1


class Slot(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("number", ctypes.c_uint32))


class FrameOfC(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_char_p),
        ("ndim", ctypes.c_uint32),
        ("shape", ctypes.c_uint64 * 8),
        ("captured_ns", ctypes.c_int64),
        ("metadata", ctypes.c_char_p),
    )


class Failed(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{errno.errorcode[-code]}: {text}")
        self.code = -code


def load() -> Any:
    library = ctypes.CDLL(str(LIBRARY))
    library.rdmaxfer_error.restype = ctypes.c_char_p
    library.rdmaxfer_slot_bytes.restype = ctypes.c_size_t
    for name, arguments in {
        "attach": [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)],
        "reserve": [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Slot)],
        "publish": [ctypes.c_void_p, ctypes.POINTER(Slot), ctypes.POINTER(FrameOfC)],
        "discard": [ctypes.c_void_p, ctypes.POINTER(Slot)],
        "flush": [ctypes.c_void_p, ctypes.c_int],
        "detach": [ctypes.c_void_p],
        "slots": [ctypes.c_void_p],
        "slot_bytes": [ctypes.c_void_p],
    }.items():
        getattr(library, f"rdmaxfer_{name}").argtypes = arguments
    return library


class Ring:
    def __init__(self, name: str, timeout_ms: int = 20_000, abi: int = ABI) -> None:
        self._library = load()
        self._ring = ctypes.c_void_p()
        self._check(self._library.rdmaxfer_attach(abi, name.encode(), timeout_ms, ctypes.byref(self._ring)))

    def __enter__(self) -> Ring:  # noqa: PYI034 (Self is not in Python 3.10)
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _check(self, code: int) -> None:
        if code:
            raise Failed(code, self._library.rdmaxfer_error().decode())

    @property
    def slots(self) -> int:
        return int(self._library.rdmaxfer_slots(self._ring))

    @property
    def slot_bytes(self) -> int:
        return int(self._library.rdmaxfer_slot_bytes(self._ring))

    def reserve(self, timeout_ms: int = 20_000) -> Slot:
        slot = Slot()
        self._check(self._library.rdmaxfer_reserve(self._ring, timeout_ms, ctypes.byref(slot)))
        return slot

    def publish(
        self,
        slot: Slot,
        shape: tuple[int, ...],
        dtype: str = "u1",
        *,
        metadata: str | None = None,
        captured_ns: int = 0,
        ndim: int | None = None,
    ) -> None:
        frame = FrameOfC(
            dtype.encode(),
            len(shape) if ndim is None else ndim,
            (ctypes.c_uint64 * 8)(*shape),
            captured_ns,
            None if metadata is None else metadata.encode(),
        )
        self._check(self._library.rdmaxfer_publish(self._ring, ctypes.byref(slot), ctypes.byref(frame)))

    def discard(self, slot: Slot) -> None:
        self._check(self._library.rdmaxfer_discard(self._ring, ctypes.byref(slot)))

    def flush(self, timeout_ms: int = 20_000) -> None:
        self._check(self._library.rdmaxfer_flush(self._ring, timeout_ms))

    def fill(self, array: Any, **options: Any) -> None:
        """Reserve, copy and publish."""
        slot = self.reserve()
        ctypes.memmove(slot.data, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        self.publish(slot, array.shape, array.dtype.str, **options)

    def detach(self) -> None:
        ring, self._ring = self._ring, ctypes.c_void_p()
        self._library.rdmaxfer_detach(ring)


class Program:
    """One without the library, which writes what it likes into its queue."""

    def __init__(self, name: str) -> None:
        module: Any = importlib.import_module("rdmaxfer._shm")
        self._ffi, self._lib = module.ffi, module.lib
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(60)
        self._socket.connect(f"\0rdmaxfer-intake/{os.geteuid()}/{name}")
        self._socket.send(struct.pack("=I", ABI))
        welcome, self._fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
        self._capacity = struct.unpack_from("=I", welcome, 16)[0]
        self._queues = mmap.mmap(self._fds[1], self._lib.sx_bytes(self._capacity))
        self._memory = self._ffi.from_buffer(self._queues)
        self._ep = self._lib.sx_new(self._memory, self._capacity, 0, self._fds[2], self._fds[3])

    def __enter__(self) -> Program:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.sx_free(self._ep)
        self._ffi.release(self._memory)
        self._queues.close()
        self._socket.close()
        for fd in self._fds:
            os.close(fd)

    def publish(self, imm: int, *, kind: int = 1, ndim: int = 1, data_bytes: int = 144) -> None:
        """A frame of 100 bytes in slot `imm`, or what looks like one."""
        frame = struct.pack("=q8QI64sI", 0, 100, *[0] * 7, ndim, b"u1", 0)
        room = self._ffi.new("char[]", frame.ljust(self._lib.SX_ROOM, b"\0"))
        item = self._ffi.new("sx_item *", {"kind": kind, "imm": imm, "data_bytes": data_bytes})
        assert self._lib.sx_post(self._ep, item, room, 0, 0) == 1

    def told(self) -> bytes:
        """Why it was sent away."""
        return self._socket.recv(1000)
