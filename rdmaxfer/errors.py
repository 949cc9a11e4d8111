"""Every exception that rdmaxfer raises.

Two families matter to a caller: what *you* can repair (a wrong argument, a missing package, a closed object) and what *the
world* did (a peer that died, a device that failed). Every message ends with the fix where one is known; it is also in `.fix`.
"""

from __future__ import annotations


class RdmaxferError(Exception):
    """Base of every error of this package. `fix` says what to do about it, or is empty."""

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(f"{message} Fix: {fix}" if fix else message)
        self.fix = fix
        self.pushed: tuple[int, ...] = ()
        """What `Sender.push_many` had sent before: sequence numbers."""


# --- the caller's side -------------------------------------------------------------------------------------------------


class ClosedError(RdmaxferError):
    """The object was closed (by you) before or during the call."""


class ForkedError(RdmaxferError):
    """A child process used an object that it inherited by fork(): verbs resources belong to the process that made them."""


class EndpointError(RdmaxferError, ValueError):
    """An endpoint is not of the form tcp://HOST:PORT, or can't be bound."""


class CurveError(RdmaxferError, ValueError):
    """A CURVE key, or a directory of keys, is missing, can't be read, or is readable by too many."""


class FrameError(RdmaxferError):
    """Base of what can be wrong with a frame or its metadata."""


class UnsupportedDtype(FrameError, TypeError):
    """The dtype can't travel: only fixed-size numeric, bool, complex, datetime64, timedelta64 and structures of these can."""


class FrameTooLarge(FrameError, ValueError):
    """The frame, its header or its metadata is above a limit."""


class FrameReleased(FrameError):
    """A frame or slot was used after it was released, committed or discarded, or after its owner was closed."""


class TimeoutExpired(RdmaxferError, TimeoutError):
    """A blocking call did not end within its `timeout`. Nothing was half done: the call may be repeated."""


# --- the machine -------------------------------------------------------------------------------------------------------


class DeviceError(RdmaxferError):
    """Base of what can be wrong with the RDMA device, its driver or its libraries."""


class VerbsUnavailable(DeviceError):
    """pyverbs, libibverbs or the native core is missing, or they don't fit together."""


class NoDevice(DeviceError):
    """There is no RDMA device, none of that name, or none that leads to the peer."""


class VerbsError(DeviceError):
    """A verb failed. `verb` is its C name, `errno` the number it gave."""

    def __init__(self, message: str, *, verb: str, errno: int, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.verb = verb
        self.errno = errno


class NoMemory(DeviceError, MemoryError):
    """The machine has no memory for slots of this size."""


class MemlockError(VerbsError):
    """Memory could not be registered because of the limit on locked memory (`ulimit -l`)."""


# --- the peer ----------------------------------------------------------------------------------------------------------


class PeerError(RdmaxferError):
    """Base of what a peer, or the way to it, can do wrong."""


class ConnectTimeout(PeerError, TimeoutError):
    """Nobody answered, or the handshake did not end, within the timeout."""


class Refused(PeerError):
    """The peer refused the handshake or a request. `code` is a `rdmaxfer.cm.messages.RefuseCode` value, or "curve" where the keys
    don't fit."""

    def __init__(self, message: str, *, code: str, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.code = code


class NotConnected(RdmaxferError):
    """The object is neither bound nor connected, so that waiting for a peer would never end."""


class PeerLost(PeerError):
    """A connection ended: without a goodbye, or before all frames were released. `unreleased` are the sequence numbers of
    frames that the peer may not have received, or had not released."""

    def __init__(self, message: str, *, unreleased: tuple[int, ...] = (), fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.unreleased = unreleased


class DeviceLost(PeerLost, DeviceError):
    """A connection ended because this side's own device failed or was removed. `unreleased` as in PeerLost."""


class EndOfStream(PeerError):
    """Every sender that this receiver connected to has said goodbye, and all their frames were received."""


class RemoteProtocolError(PeerError):
    """The peer sent bytes that break the protocol. It is the only error that bytes from a peer can raise."""


class LocalProtocolError(RdmaxferError):
    """A call out of order: a bug in rdmaxfer, not in your program."""
