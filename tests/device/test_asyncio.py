"""Coroutines: what they do, that they can be cancelled anywhere, and that they leave the event loop to others."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, picture, resources, wait_until

import rdmaxfer
from rdmaxfer.errors import ConnectTimeout, FrameReleased, NotConnected, PeerLost, TimeoutExpired

LOOPS = ["asyncio", "uvloop"]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine to its end, with one event loop or the other."""
    if request.param == "asyncio":
        return lambda main: asyncio.run(asyncio.wait_for(main, TIMEOUT_S))
    import uvloop

    return lambda main: uvloop.run(asyncio.wait_for(main, TIMEOUT_S))


class Pair:
    """A connected sender and receiver, made and closed by coroutines."""

    def __init__(self, sender: dict[str, Any] | None = None, receiver: dict[str, Any] | None = None) -> None:
        self.tx = rdmaxfer.Sender(**(sender or {}))
        self.rx = rdmaxfer.Receiver(**(receiver or {}))

    async def __aenter__(self) -> tuple[rdmaxfer.Sender, rdmaxfer.Receiver]:
        await self.tx.connect_async(self.rx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        await self.rx.wait_for_peers_async(timeout=TIMEOUT_S)
        return self.tx, self.rx

    async def __aexit__(self, *_: object) -> None:
        await self.tx.close_async()
        await self.rx.close_async()


async def cancelled(waits: Coroutine[Any, Any, Any], until: Callable[[], bool]) -> None:
    """Cancel it once `until()`, and see that it ends by that."""
    task = asyncio.create_task(waits)
    while not until():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def waiting(node: rdmaxfer.Sender | rdmaxfer.Receiver) -> Callable[[], bool]:
    """Whether a coroutine waits for something of `node`."""
    return lambda: bool(node._alarm._wants)


async def soon(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_frames_go_from_one_task_to_another_in_order(run: Callable[..., Any]) -> None:
    count = 300

    async def produce(tx: rdmaxfer.Sender) -> None:
        for seed in range(count):
            seq = await tx.push_async(picture(seed), metadata={"seed": seed}, timeout=TIMEOUT_S)
            assert seq == seed
        await tx.flush_async(TIMEOUT_S)

    async def consume(rx: rdmaxfer.Receiver) -> None:
        expected = 0
        async for frame in rx:
            with frame:
                assert frame.seq == expected == frame.metadata["seed"]
                assert frame.array.tobytes() == picture(expected).tobytes()
            expected += 1
            if expected == count:
                return

    async def main() -> None:
        async with Pair() as (tx, rx):
            await asyncio.gather(produce(tx), consume(rx))

    before = resources()
    run(main())
    gc.collect()
    assert resources() == before


def test_the_end_of_the_stream_ends_the_loop(run: Callable[..., Any]) -> None:
    async def main() -> list[int]:
        seen = []
        async with rdmaxfer.Sender() as tx:
            endpoint = tx.bind("tcp://127.0.0.1:*")

            async def consume() -> None:
                async with rdmaxfer.Receiver() as rx:
                    await rx.connect_async(endpoint, timeout=TIMEOUT_S)
                    async for frame in rx:
                        with frame:
                            seen.append(int(frame.array[0]))

            consumer = asyncio.create_task(consume())
            await tx.wait_for_peers_async(timeout=TIMEOUT_S)
            for number in range(5):
                await tx.push_async(np.array([number]))
            await tx.close_async()
            await consumer
        return seen

    assert run(main()) == [0, 1, 2, 3, 4]


def test_closing_ends_whatever_waits(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair() as (tx, rx):
            await tx.push_async(np.zeros(9))
            held = await rx.recv_async()
            looped = asyncio.create_task(all_of(rx))
            for _ in range(40):  # until there is no room left
                try:
                    await tx.push_async(np.zeros(9), timeout=0.0)
                except TimeoutExpired:
                    break
            pushed = asyncio.create_task(tx.push_async(np.zeros(9)))
            flushed = asyncio.create_task(tx.flush_async())
            await soon(lambda: len(tx._alarm._wants) > 0)
            with contextlib.suppress(PeerLost):  # the receiver holds frames
                await tx.close_async(0.2)
            await rx.close_async()
            await asyncio.wait([pushed, flushed, looped], timeout=TIMEOUT_S)
            for each in (pushed, flushed):
                # Between goodbye and the end, the receiver may leave first.
                assert isinstance(each.exception(), (rdmaxfer.ClosedError, PeerLost))
            held.release()
            assert looped.exception() is None
            assert not tx._alarm._wants
            assert not rx._alarm._wants

    async def all_of(rx: rdmaxfer.Receiver) -> None:
        assert len([frame async for frame in rx]) < 40

    run(main())


def test_a_receiver_that_is_cancelled_loses_no_frame(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair() as (tx, rx):
            for number in range(50):
                await cancelled(rx.recv_async(), waiting(rx))
                # ... and at the very moment at which the frame comes.
                task = asyncio.create_task(rx.recv_async())
                await soon(waiting(rx))
                await tx.push_async(np.array([number]))
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    with await task as frame:
                        assert int(frame.array[0]) == number
                    continue
                with await rx.recv_async(TIMEOUT_S) as frame:
                    assert int(frame.array[0]) == number

    run(main())


def test_a_push_that_is_cancelled_was_sent_to_nobody(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair(sender={"slots": 2}, receiver={"slots": 2}) as (tx, rx):
            for number in range(30):
                for _ in range(2):
                    await tx.push_async(np.array([number]), timeout=TIMEOUT_S)
                await cancelled(tx.push_async(np.array([-1])), waiting(tx))
                assert tx.next_seq == 2 * number + 2
                for _ in range(2):
                    with await rx.recv_async(TIMEOUT_S) as frame:
                        assert int(frame.array[0]) == number
                await tx.flush_async(TIMEOUT_S)

    run(main())


def test_frames_are_forwarded_and_no_slot_is_lost_to_those_that_are_cancelled(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair() as (source, first), Pair({"slots": 2}, {"slots": 2}) as (onward, last):
            for seed in range(2):
                await source.push_async(picture(seed), metadata={"seed": seed})
                with await first.recv_async(TIMEOUT_S) as frame:
                    assert await onward.forward_async(frame, timeout=TIMEOUT_S) == seed
            await source.push_async(picture(2))
            with await first.recv_async(TIMEOUT_S) as frame:  # no room for it
                for _ in range(5):
                    task = asyncio.ensure_future(onward.forward_async(frame))
                    await soon(waiting(onward))
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    del task
                with pytest.raises(TimeoutExpired):
                    await onward.forward_async(frame, timeout=0.05)
                for seed in range(2):
                    with await last.recv_async(TIMEOUT_S) as arrived:
                        assert arrived.array.tobytes() == picture(seed).tobytes()
                        assert arrived.metadata == {"seed": seed}
                assert await onward.forward_async(frame, metadata={"last": True}, timeout=TIMEOUT_S) == 2
            with await last.recv_async(TIMEOUT_S) as arrived:
                assert arrived.array.tobytes() == picture(2).tobytes()
                assert arrived.metadata == {"last": True}
            assert last.statistics().frames == 3
            gc.collect()
            await source.flush_async(TIMEOUT_S)  # all slots have come back
            assert first.statistics().leased == 0
            with pytest.raises(FrameReleased):
                await onward.forward_async(arrived)

    run(main())


def test_no_slot_is_lost_to_cancelled_reservations(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair(sender={"slots": 2}) as (tx, rx):
            held = [await tx.reserve_async(100) for _ in range(4)]
            for turn in range(20):
                await cancelled(tx.reserve_async(100), waiting(tx))
                # ... and at the moment at which there is one.
                task = asyncio.create_task(tx.reserve_async(100))
                await soon(waiting(tx))
                held.pop().discard()
                for _ in range(turn % 5):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    held.append(await task)
                    continue
                held.append(await tx.reserve_async(100, timeout=TIMEOUT_S))

            async def commit_all() -> None:
                for number, slot in enumerate(held):
                    async with slot:
                        slot.array[:] = number

            committing = asyncio.create_task(commit_all())
            for number in range(4):
                with await rx.recv_async(TIMEOUT_S) as frame:
                    assert (frame.array == number).all()
            await committing

    run(main())


def test_a_reserved_slot_is_pushed_or_discarded(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair() as (tx, rx):
            async with await tx.reserve_async((4, 5), "f4", metadata={"n": 1}) as slot:
                slot.array[:] = 7
                slot.captured_ns = 99
            with pytest.raises(ZeroDivisionError):
                async with await tx.reserve_async(3) as discarded:
                    raise ZeroDivisionError
            with pytest.raises(FrameReleased):
                await discarded.commit_async()
            with await rx.recv_async(TIMEOUT_S) as frame:
                assert frame.seq == slot.seq == 0
                assert (frame.captured_ns, frame.metadata) == (99, {"n": 1})
                assert (frame.array == np.full((4, 5), 7, "f4")).all()
            with pytest.raises(TimeoutExpired):
                await rx.recv_async(0.0)

    run(main())


def test_large_and_registered_arrays(run: Callable[..., Any]) -> None:
    large = np.random.default_rng(3).integers(0, 256, (5, 1 << 20), np.uint8)

    async def main() -> None:
        async with Pair() as (tx, rx):

            async def check(array: np.ndarray[Any, Any]) -> None:
                with await rx.recv_async(TIMEOUT_S) as frame:
                    assert frame.array.shape == array.shape
                    assert frame.array.tobytes() == array.tobytes()

            await asyncio.gather(tx.push_async(large, timeout=TIMEOUT_S), check(large))
            await asyncio.gather(tx.push_async(large[:, ::2], timeout=TIMEOUT_S), check(large[:, ::2]))
            await asyncio.gather(tx.push_async(large, copy=False, timeout=TIMEOUT_S), check(large))
            await asyncio.gather(tx.push_async([large[0], large[3]], timeout=TIMEOUT_S), check(large[[0, 3]]))
            await tx.flush_async(TIMEOUT_S)
            with tx.register(large):
                await asyncio.gather(tx.push_async(large[1:3], timeout=TIMEOUT_S), check(large[1:3]))
                await tx.flush_async(TIMEOUT_S)

    run(main())


def test_timeouts_say_what_was_waited_for(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair(sender={"slots": 2}, receiver={"slots": 2}) as (tx, rx):
            for timeout in (0.0, 0.05):
                with pytest.raises(TimeoutExpired, match="waiting for a frame"):
                    await rx.recv_async(timeout)
            for _ in range(2):
                await tx.push_async(b"x", timeout=TIMEOUT_S)
            with pytest.raises(TimeoutExpired, match="every receiver to have a free slot"):
                await tx.push_async(b"x", timeout=0.05)
            with pytest.raises(TimeoutExpired, match="has not released 2 frames, the first is 0"):
                await tx.flush_async(0.05)
            held = [await tx.reserve_async(1, timeout=TIMEOUT_S) for _ in range(2)]
            with pytest.raises(TimeoutExpired, match="staging memory"):
                await tx.reserve_async(1, timeout=0.05)
            with pytest.raises(TimeoutExpired, match="2 peers"):
                await rx.wait_for_peers_async(2, timeout=0.05)
            with pytest.raises(ValueError, match="timeout"):
                await rx.recv_async(-1)
            del held
            for _ in range(2):
                (await rx.recv_async(TIMEOUT_S)).release()

    run(main())


def test_errors_reach_whoever_waits_and_are_told_once(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with rdmaxfer.Receiver() as rx:
            with pytest.raises(NotConnected):
                await rx.recv_async(1)
        tx = rdmaxfer.Sender()
        async with rdmaxfer.Receiver(reconnect=False) as rx:
            await rx.connect_async(tx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
            await tx.wait_for_peers_async(timeout=TIMEOUT_S)
            task = asyncio.create_task(rx.recv_async())
            await soon(waiting(rx))
            for link in list(rx._links):
                link.fail(PeerLost("the wire was cut."))
            rx._waiter.nudge()
            with pytest.raises(PeerLost, match="wire was cut"):
                await task
        await tx.close_async()

    run(main())


def test_an_error_that_a_cancelled_coroutine_was_to_get_is_kept_for_the_next(run: Callable[..., Any]) -> None:
    async def main() -> None:
        tx = rdmaxfer.Sender()
        async with rdmaxfer.Receiver(reconnect=False) as rx:
            await rx.connect_async(tx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
            task = asyncio.create_task(rx.recv_async())
            await soon(waiting(rx))
            for link in list(rx._links):
                link.fail(PeerLost("the wire was cut."))
            rx._waiter.nudge()
            # Not one turn of the event loop: what the thread tells is there, and the task has not seen it.
            wait_until(lambda: not rx._alarm._wants, "the thread has told")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(PeerLost, match="wire was cut"):
                await rx.recv_async(TIMEOUT_S)
        await tx.close_async()

    run(main())


def test_connecting_can_be_given_up(run: Callable[..., Any]) -> None:
    async def main() -> float:
        async with rdmaxfer.Sender() as tx:
            task = asyncio.create_task(tx.connect_async("tcp://127.0.0.1:9", timeout=None))
            await soon(lambda: bool(tx._opening))
            began_s = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            took_s = time.monotonic() - began_s
            assert not tx._opening
            with pytest.raises(ConnectTimeout):
                await tx.connect_async("tcp://127.0.0.1:9", timeout=0.1)
            return took_s

    before = resources()
    assert run(main()) < 10
    gc.collect()
    assert resources() == before


def test_other_tasks_run_all_the_while(run: Callable[..., Any]) -> None:
    """Of a task that does nothing but give way: it gets its turn also while frames come and go without a pause."""
    frames = 2000

    async def main() -> tuple[int, float]:
        turns, longest_s = 0, 0.0
        async with Pair() as (tx, rx):

            async def others() -> None:
                nonlocal turns, longest_s
                while True:
                    began_s = time.monotonic()
                    await asyncio.sleep(0)
                    longest_s = max(longest_s, time.monotonic() - began_s)
                    turns += 1

            other = asyncio.create_task(others())
            array = np.zeros(64)
            for _ in range(frames // 8):  # neither of the two ever has to wait
                for _ in range(8):
                    await tx.push_async(array)
                for _ in range(8):
                    (await rx.recv_async()).release()
            other.cancel()
        return turns, longest_s

    turns, longest_s = run(main())
    assert turns > 20
    assert longest_s < 1  # a switch of threads on a busy machine; not the whole stream, which takes longer


def test_several_tasks_and_threads_share_one_receiver(run: Callable[..., Any]) -> None:
    count = 120

    async def main() -> None:
        seen: list[int] = []
        async with Pair() as (tx, rx):

            async def take() -> None:
                while len(seen) < count:
                    with contextlib.suppress(TimeoutExpired), await rx.recv_async(0.1) as frame:
                        seen.append(int(frame.array[0]))

            def take_in_thread() -> None:
                while len(seen) < count:
                    with contextlib.suppress(TimeoutExpired), rx.recv(0.1) as frame:
                        seen.append(int(frame.array[0]))

            threads = [Background(take_in_thread) for _ in range(2)]
            tasks: list[Awaitable[None]] = [asyncio.create_task(take()) for _ in range(3)]
            for number in range(count):
                await tx.push_async(np.array([number]), timeout=TIMEOUT_S)
            await asyncio.gather(*tasks)
            await asyncio.to_thread(lambda: [each.result() for each in threads])
        assert sorted(seen) == list(range(count))

    run(main())


def test_no_thread_stays_behind(run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair() as (tx, rx):
            task = asyncio.create_task(rx.recv_async())
            await soon(waiting(rx))
            assert any(thread.name == "rdmaxfer-asyncio" for thread in threading.enumerate())
            await tx.push_async(b"x")
            (await task).release()

    run(main())
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("rdmaxfer")] == []


def test_who_shares_waits_for_those_that_have_attached(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    slots = 2

    async def main() -> None:
        async with (
            Pair(receiver={"share": "camera", "slots": 8}) as (tx, rx),
            rdmaxfer.attach("camera", TIMEOUT_S, slots=slots) as reader,
        ):
            assert rx._sharing is not None
            shared_by = rx._sharing._sender
            await shared_by.wait_for_peers_async(timeout=TIMEOUT_S)
            for number in range(slots + 1):
                await tx.push_async(np.array([number]), timeout=TIMEOUT_S)
            for _ in range(slots):
                (await rx.recv_async(TIMEOUT_S)).release()
            with pytest.raises(TimeoutExpired):
                await rx.recv_async(0.05)
            task = asyncio.create_task(rx.recv_async(TIMEOUT_S))
            await soon(waiting(shared_by))
            await cancelled(rx.recv_async(), lambda: len(shared_by._alarm._wants) == 2)
            for number in range(slots):
                with await reader.recv_async(TIMEOUT_S) as frame:
                    assert int(frame.array[0]) == number
            with await task as frame:
                assert int(frame.array[0]) == slots
            with await reader.recv_async(TIMEOUT_S) as frame:
                assert int(frame.array[0]) == slots

    run(main())
