"""What a fabric offers to a link: memory that a peer may write to, and an endpoint that writes in order.

`verbs.py` is the one implementation. The words are those of verbs, the meaning is not bound to them: an endpoint has one or
more lanes; on each, writes arrive in the order they were posted, and a write with an immediate completes at the peer after all
earlier data; between lanes there is no order. Memory is described by (address, length, key).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable


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


@runtime_checkable
class Endpoint(Protocol):
    """One end of a reliable connection. Calls only post; what became of them, completions tell."""

    @property
    def lanes(self) -> int:
        """How many lanes there are; they are numbered from 0."""

    def wr_count(self, nbytes: int) -> int:
        """Work requests that a `write` of so many bytes takes."""

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
    ) -> None:
        """Write header and payload, one after the other, to the peer's memory, and then give it the immediate."""

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
