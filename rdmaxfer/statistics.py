"""What `statistics()` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

SAMPLED = 8
"""One frame in so many is looked at for latencies; they cost a reading of the clock."""
MAX_SAMPLES = 512

Times = tuple[int, int, int]
"""When a frame was captured (0: the sender did not say), pushed, and taken by `recv`: in nanoseconds since 1970."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Quantiles of the latest few thousand frames, in seconds, from some of them. They are as good as the clocks of both machines
    agree."""

    frames: int
    """How many were looked at."""
    median_s: float
    p90_s: float
    p99_s: float
    most_s: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Latency | None:
        if not nanoseconds:
            return None
        ordered = sorted(nanoseconds)

        def quantile(part: float) -> float:
            return ordered[min(len(ordered) - 1, int(part * len(ordered)))] / 1e9

        return cls(len(ordered), quantile(0.5), quantile(0.9), quantile(0.99), quantile(1.0))


@dataclasses.dataclass(frozen=True)
class SenderStatistics:
    """A snapshot of a sender's counters, since it was made."""

    peers: int
    """Receivers connected now."""
    turned_away: int
    """Connections to endpoints bound here that failed before a word was said: no CURVE key, a wrong one, or no ZeroMQ at all."""
    refused: int
    """Requests to endpoints bound here that were refused: over a limit, malformed, replayed, of the wrong version or role, ..."""
    expired: int
    """Handshakes with endpoints bound here that were not finished, and connections that were not renewed."""
    reconnecting: int
    """Receivers whose connection broke, and that are expected to come back."""
    reconnects: int
    """How often a receiver has come back."""
    peers_lost: int
    """Receivers that were given up, or said goodbye before they had released all frames."""
    frames: int
    """Frames accepted by `push` and `reserve`: each counts once, however many receivers there are."""
    bytes: int
    """Their payload bytes."""
    copied: int
    """Frames that were copied into staging memory first (the others were in registered memory already)."""
    waits: int
    """How often `push` had to wait for credit or staging memory."""
    unreleased: int
    """Frames that the slowest receiver has not released yet."""
    dropped: int
    """Frames dropped by `when_full`, or as too large for a receiver: summed over the receivers. `take_drops` has the numbers."""
    unheard: int
    """Frames pushed while nobody was connected, and every endpoint has a `when_full` that drops."""
    credits_received: int
    """Credit messages received."""
    resizes: int
    """Resizes asked for."""


@dataclasses.dataclass(frozen=True)
class ReceiverStatistics:
    """A snapshot of a receiver's counters, since it was made."""

    peers: int
    """Senders connected now."""
    turned_away: int
    """Connections to endpoints bound here that failed before a word was said: no CURVE key, a wrong one, or no ZeroMQ at all."""
    refused: int
    """Requests to endpoints bound here that were refused: over a limit, malformed, replayed, of the wrong version or role, ..."""
    expired: int
    """Handshakes with endpoints bound here that were not finished, and connections that were not renewed."""
    reconnecting: int
    """Senders whose connection broke, and that are expected to come back."""
    reconnects: int
    """How often a sender has come back."""
    peers_lost: int
    """Senders that were given up: they went without a goodbye, and did not come back."""
    frames: int
    """Frames handed out by `recv` or iteration."""
    bytes: int
    """Their payload bytes."""
    missed: int
    """Numbers missing between these frames: the sum of their gaps."""
    writes: int
    """WRITE_WITH_IMM completions polled: frames that a device placed in registered memory."""
    credits_sent: int
    """Credit messages sent back."""
    leased: int
    """Frames held now: arrived or handed out, not released."""
    resizes: int
    """Rings replaced by larger ones."""
    pinned_bytes: int
    """Memory registered for senders now."""
    push_to_recv: Latency | None
    """From `push` to `recv`; None before the first frame."""
    capture_to_recv: Latency | None
    """From capture to `recv`; None where senders don't say when frames were captured."""


__all__ = ["ReceiverStatistics", "SenderStatistics"]
