"""What a fabric offers to a link: memory that a peer may write to, and an endpoint that writes in order.

`verbs.py`, `shm.py` and `tcp.py` are implementations. The words are those of verbs, the meaning is not bound to them:

- **Order.** An endpoint has one or more lanes. On each, writes take effect in the order in which they were posted, and an immediate
  comes after all data before it; between lanes there is no order.
- **Write without the peer's help.** The receiving program does nothing for data to arrive. But each immediate and message takes a
  receive that was posted for it, and waits until there is one.
- **Completions** come in each lane's order. Unsignalled work is done when a later signalled one is. A completed write has left
  this side's memory; that the peer has it, only its credit tells. But an endpoint that `lends` has the peer read it where it
  is, until the peer has released it.
- **Failure.** What can't be carried out ends the endpoint: a completion with a status says so, and `explain` why. But that the peer
  has gone, a device may never say: Soft-RoCE repeats for ever.
- **An end.** `drain` cancels what is outstanding; after it nothing reads from or writes to the memory.
- **Memory** is described by (address, length, key), and no key of one peer's works on another's.
- **Ctrl-C** can come at any moment of any call, and afterwards `last_posted` and `last_reposted` say what had happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

AnyRoute: TypeAlias = Any
"""How to reach a peer: a `Route`, `ShmRoute` or `TcpRoute`. Has `fabric`, `device`, and the `reason` why it was chosen."""


@runtime_checkable
class Region(Protocol):
    """Registered memory. `lkey` is for our own work requests; `rkey` lets the peer write, if that was asked for."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def lkey(self) -> int: ...
    @property
    def rkey(self) -> int: ...

    def close(self) -> None: ...


class Domain(Protocol):
    """Where connections of one kind are made: an open device, or a thread that serves sockets."""

    name: str
    reports: bool
    """Whether it has asynchronous events."""
    lost: bool

    def protection_domain(self) -> Any: ...
    def close(self) -> None: ...


class ProtectionDomain(Protocol):
    """Memory and endpoints that may work together."""

    domain: Any

    def endpoint(
        self,
        route: AnyRoute,
        *,
        send_depth: int,
        recv_depth: int,
        recv_bytes: int = 0,
        lanes: int = 1,
        remote_write: bool,
        max_write_bytes: int = 0,
    ) -> Any: ...
    def register(self, buffer: Any, *, remote_write: bool) -> Any: ...
    def register_memory(self, address: int, nbytes: int, keepalive: object, *, remote_write: bool) -> Any: ...
    def close(self) -> None: ...


@runtime_checkable
class Endpoint(Protocol):
    """One end of a reliable connection. Calls only post; what became of them, completions tell."""

    route: AnyRoute
    pd: Any
    in_ring: bool
    """Whether what the peer writes lies in the ring. Otherwise it is where it came, and the completion's `placed` says where."""
    lends: bool
    """Whether the peer reads what is written where it is, and goes on to do so."""
    gathers: bool
    """Whether a `write` of several pieces copies none of them."""
    holds: object
    """What has to stay as long as memory may be read from, if that is longer than this endpoint is open."""

    @property
    def address(self) -> Any:
        """What the peer must know of it."""

    def connect(self, **peer: Any) -> None:
        """Connect to the peer's endpoint, by what its address said."""

    def start(self) -> None:
        """Both sides are connected; nobody polls yet."""

    @property
    def lanes(self) -> int:
        """How many lanes there are; they are numbered from 0."""

    def wr_count(self, nbytes: int) -> int:
        """Work requests that a `write` of so many bytes takes, if the payload is in one piece."""

    def write(
        self,
        header_address: int,
        header_bytes: int,
        header_lkey: int,
        address: int,
        nbytes: int,
        lkey: int,
        remote_address: int,
        rkey: int,
        imm: int,
        wr_id: int,
        signaled: bool,
        lane: int = 0,
        more: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Write header and payload, one after the other, to the peer's memory, and then give it the immediate. `more`: address,
        length and lkey of what follows in the payload, if it lies in several pieces; each takes another work request at the most.
        """

    def cork(self) -> None:
        """From now on, `write` may keep what it is given back, up to `uncork` or whatever else is posted on that lane: so that many
        cost one doorbell."""

    def uncork(self) -> None:
        """Hand over what was kept back. After an interruption, again. Raises VerbsError."""

    def write_empty(self, wr_id: int, lane: int = 0) -> None:
        """Nothing but a completion here, after those of everything posted before on this lane."""

    def write_imm(self, imm: int, wr_id: int, lane: int = 0) -> None:
        """Only an immediate, after all data posted before on this lane."""

    def send_inline(self, data: bytes, wr_id: int, signaled: bool) -> None:
        """A small message into a receive of the peer's, on lane 0."""

    def repost_recv(self, wr_ids: Iterable[int], lane: int = 0) -> None:
        """Make receives available again whose completion was handled."""

    def clear_reposted(self) -> None:
        """Begin to count `last_reposted`."""

    @property
    def last_reposted(self) -> int:
        """Receives made available since then, whatever interrupted the call."""

    def recv_payload(self, wr_id: int, nbytes: int) -> bytes:
        """A copy of the message that a receive took."""

    def clear_posted(self) -> None:
        """Begin to count `last_posted`."""

    @property
    def last_posted(self) -> int:
        """What was posted since then, whatever interrupted the call."""

    def explain(self, status: int, vendor_err: int) -> str:
        """A failed completion in words."""

    def to_error(self) -> None:
        """Give up the connection: everything outstanding completes, with a status, and what the peer writes fails."""

    def drain(self, timeout_s: float) -> bool:
        """Cancel what is outstanding. True if nothing is any more, so that all memory may be reused."""

    def close(self) -> None: ...


@runtime_checkable
class Poller(Protocol):
    """Takes the completions of several endpoints, with their endpoint, in each endpoint's order."""

    def watch(self, endpoints: Sequence[Any]) -> None: ...
    def poll(self) -> list[tuple[Any, Any]]: ...
    def wait(self, spin_s: float, timeout_s: float | None) -> list[tuple[Any, Any]]: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
