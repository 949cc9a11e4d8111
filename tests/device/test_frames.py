"""What is pushed arrives, byte for byte, whatever it is and however it is pushed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
from helpers import FABRIC, TIMEOUT_S, Background, pair, picture

import rdmaxfer
from rdmaxfer.fabric import devices

DTYPES = [
    *"?bBhHiIlLqQefdFD",
    *(">i2", ">u4", ">f8", ">c16", "<f4"),
    *("M8[ns]", "M8[25us]", "m8[s]", ">M8[D]"),
    [("x", "<f4"), ("y", ">i2"), ("when", "M8[us]")],
    {"names": ["a", "b"], "formats": ["u1", ("<f8", (2, 3))], "offsets": [3, 8], "itemsize": 64},
    [("outer", [("inner", "<i4"), ("z", "<c8")]), ("flag", "?")],
]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (5, 4, 3), (1, 2, 1, 2, 1, 2, 1, 2), (1000, 33)]


def filled(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    noise = np.random.default_rng(count).integers(0, 2 if kind == np.bool_ else 256, count, np.uint8)
    return np.frombuffer(noise.tobytes(), kind).reshape(shape) if count else np.zeros(shape, kind)


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_round_trips(dtype: Any) -> None:
    with pair() as (tx, rx):
        for shape in SHAPES:
            array = filled(shape, dtype)
            tx.push(array, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert same(frame.array, array)
                assert not frame.array.flags.writeable


@pytest.mark.parametrize("data", [b"", b"\0some \xffbytes\0", bytes(range(256)) * 40], ids=len)
def test_bytes_and_their_like_are_arrays_of_uint8(data: bytes) -> None:
    class Whole:  # like a tensor of another library
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
            return np.array(bytearray(data), np.uint8)

    with pair() as (tx, rx):
        for given in (data, bytearray(data), memoryview(data), memoryview(bytearray(data)), Whole()):
            tx.push(given, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tobytes() == data
                assert (frame.array.dtype, frame.array.shape) == (np.uint8, (len(data),))


@pytest.mark.verbs
@pytest.mark.smoke
@pytest.mark.parametrize("bind", ["receiver", "sender"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "192.168.77.1", "[fd77::1]"])
def test_either_side_binds_over_ipv4_and_ipv6(bind: str, host: str) -> None:
    with pair(bind=bind, host=host) as (tx, rx):
        for seed in range(40):
            tx.push(picture(seed), metadata={"seed": seed}, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.seq == seed == frame.metadata["seed"]
                assert same(frame.array, picture(seed))
        tx.flush(timeout=TIMEOUT_S)


@pytest.mark.verbs
def test_the_gid_is_the_one_that_leads_to_the_peer() -> None:
    for host, gid in (("192.168.77.1", "192.168.77.1"), ("[fd77::1]", "fd77::1")):
        with pair(host=host) as (tx, rx):
            assert f"({gid}, ROCE_V2)" in tx._links[0].reason
            assert f"({gid}, ROCE_V2)" in rx._links[0].reason


def test_push_reserve_and_register_give_the_same_bytes() -> None:
    array = picture(1, (480, 640, 3))
    with pair() as (tx, rx):
        tx.push(array, timeout=TIMEOUT_S)
        with tx.reserve(array.shape, array.dtype, timeout=TIMEOUT_S) as slot:
            slot.array[...] = array
        assert tx.statistics().copied == 1
        with tx.register(array):
            tx.push(array, timeout=TIMEOUT_S)
            tx.push(array[100:200], timeout=TIMEOUT_S)
            tx.push(array[:, ::2], timeout=TIMEOUT_S)  # not contiguous: copied
            assert tx.statistics().copied == (4 if FABRIC == "shm" else 2)  # it can share only memory of its own
            for expected in (array, array, array, array[100:200], array[:, ::2]):
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    assert same(frame.array, np.ascontiguousarray(expected))
            tx.flush(timeout=TIMEOUT_S)


def test_an_exception_in_a_reserved_block_discards_the_frame() -> None:
    with pair() as (tx, rx):
        with pytest.raises(ZeroDivisionError), tx.reserve((4,), np.uint8) as slot:
            slot.array[0] = 1 // 0
        with pytest.raises(rdmaxfer.FrameReleased):
            _ = slot.array
        for _ in range(40):  # more often than there are slots: none was lost
            tx.reserve((4,), np.uint8, timeout=TIMEOUT_S).discard()
            tx.reserve((4,), np.uint8, timeout=TIMEOUT_S)  # forgotten altogether
        tx.push(np.arange(3), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.seq == 0
            assert frame.array.tolist() == [0, 1, 2]


def test_metadata_and_times_travel_along() -> None:
    metadata = {
        "name": "détecteur",
        "exposure_ms": 4.5,
        "roi": [1, 2, 3],
        "raw": b"\0\xff",
        "nested": {"on": True, "none": None},
    }
    with pair() as (tx, rx):
        tx.push(np.zeros(3), metadata=metadata, captured_ns=1_700_000_000_000_000_001, timeout=TIMEOUT_S)
        tx.push(np.zeros(3), metadata={"blob": b"x" * 4000}, timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.metadata == metadata
            assert frame.captured_ns == 1_700_000_000_000_000_001
            assert frame.pushed_ns > 1_700_000_000_000_000_000
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.metadata == {"blob": b"x" * 4000}
        with pytest.raises(rdmaxfer.FrameTooLarge):
            tx.push(np.zeros(3), metadata={"blob": b"x" * 5000})


@pytest.mark.parametrize("bind", ["receiver", "sender"])
def test_slots_grow_in_mid_stream_while_leases_are_held(bind: str) -> None:
    shapes = [(100,), (10_000,), (64, 1024), (300_000,), (50,), (2, 1 << 20), (1 << 20,)]
    with pair(bind=bind, receiver={"slot_bytes": 4096, "slots": 4}) as (tx, rx):
        arrays = [picture(seed, shape) for seed, shape in enumerate(shapes)]
        pushing = Background(lambda: [tx.push(array, timeout=TIMEOUT_S) for array in arrays])
        held: list[rdmaxfer.Frame] = []
        for array in arrays:
            frame = rx.recv(timeout=TIMEOUT_S)
            assert same(frame.array, array)
            held.append(frame)
            if len(held) == 3:  # the oldest lease outlives the ring that it is on
                oldest = held.pop(0)
                assert same(oldest.array, arrays[oldest.seq])
                oldest.release()
        assert pushing.result() == list(range(len(shapes)))
        for frame in held:
            assert same(frame.array, arrays[frame.seq])
            frame.release()
        tx.flush(timeout=TIMEOUT_S)
        assert rx.statistics().resizes >= 3


@pytest.mark.parametrize("bind", ["receiver", "sender"])
def test_a_frame_beyond_the_receivers_limit_is_refused_and_the_stream_goes_on(bind: str) -> None:
    with pair(bind=bind, receiver={"slot_bytes": 4096, "max_frame_bytes": 1 << 20}) as (tx, rx):
        with pytest.raises(rdmaxfer.FrameTooLarge, match="max_frame_bytes=2097152"):
            tx.push(np.zeros(2 << 20, np.uint8), timeout=TIMEOUT_S)
        with pytest.raises(rdmaxfer.FrameTooLarge):
            tx.reserve((2 << 20,), np.uint8)
        tx.push(picture(3, (1 << 20,)), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert same(frame.array, picture(3, (1 << 20,)))


@pytest.mark.verbs
@pytest.mark.parametrize("nbytes", [65536 - 128, 65536 - 64, 65536, 3 * 65536 + 5, 1 << 20])
def test_frames_above_max_msg_sz_are_split(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = devices.choose_gid
    monkeypatch.setattr(devices, "choose_gid", lambda *a, **k: dataclasses.replace(choose(*a, **k), max_msg_sz=65536))
    with pair() as (tx, rx):
        array = picture(nbytes, (nbytes,))
        assert tx._links[0].endpoint.wr_count(nbytes) == -(-nbytes // 65536)
        with tx.register(array):
            for _ in range(40):
                tx.push(array, timeout=TIMEOUT_S)
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    assert same(frame.array, array)
            tx.flush(timeout=TIMEOUT_S)


@pytest.mark.smoke
def test_one_sender_to_four_receivers_and_four_senders_to_one_receiver() -> None:
    count = 30
    with rdmaxfer.Sender() as tx:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        receivers = [rdmaxfer.Receiver() for _ in range(4)]
        try:
            for rx in receivers:
                rx.connect(endpoint, timeout=TIMEOUT_S)
            tx.wait_for_peers(4, timeout=TIMEOUT_S)
            taking = [Background(lambda rx=rx: take(rx, count)) for rx in receivers]
            for seed in range(count):
                tx.push(picture(seed), timeout=TIMEOUT_S)
            for each in taking:
                assert each.result() == [(seed, picture(seed).tobytes()) for seed in range(count)]
            tx.flush(timeout=TIMEOUT_S)
        finally:
            for rx in receivers:
                rx.close()

    with rdmaxfer.Receiver() as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        senders = [rdmaxfer.Sender() for _ in range(4)]
        try:
            for each_tx in senders:
                each_tx.connect(endpoint, timeout=TIMEOUT_S)
            pushing = [
                Background(
                    lambda tx=tx, i=i: [
                        tx.push(picture(100 * i + n), metadata={"i": i}, timeout=TIMEOUT_S) for n in range(count)
                    ]
                )
                for i, tx in enumerate(senders)
            ]
            seen: dict[int, list[int]] = {i: [] for i in range(4)}
            for _ in range(4 * count):
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    i = frame.metadata["i"]
                    assert same(frame.array, picture(100 * i + frame.seq))
                    seen[i].append(frame.seq)
            assert seen == {i: list(range(count)) for i in range(4)}
            for pushed in pushing:
                pushed.result()
        finally:
            for each_tx in senders:
                each_tx.close()


def take(rx: rdmaxfer.Receiver, count: int) -> list[tuple[int, bytes]]:
    got = []
    for _ in range(count):
        with rx.recv(timeout=TIMEOUT_S) as frame:
            got.append((frame.seq, frame.array.tobytes()))
    return got


def test_a_receiver_that_comes_late_gets_what_is_pushed_from_then_on() -> None:
    with rdmaxfer.Sender() as tx, rdmaxfer.Receiver() as early, rdmaxfer.Receiver() as late:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        early.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        tx.push(picture(0), timeout=TIMEOUT_S)
        late.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(2, timeout=TIMEOUT_S)
        tx.push(picture(1), timeout=TIMEOUT_S)
        assert [seq for seq, _ in take(early, 2)] == [0, 1]
        assert [seq for seq, _ in take(late, 1)] == [1]
        late.close()
        tx.push(picture(2), timeout=TIMEOUT_S)
        assert [seq for seq, _ in take(early, 1)] == [2]


@pytest.mark.parametrize("distribute", ["all", "balance"])
def test_who_has_said_goodbye_gets_nothing_more(distribute: Literal["all", "balance"]) -> None:
    """Also where only the control plane has brought it, and what was sent before is still on its way."""
    with rdmaxfer.Sender(distribute=distribute) as tx, rdmaxfer.Receiver() as stays, rdmaxfer.Receiver() as leaves:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        stays.connect(endpoint, timeout=TIMEOUT_S)
        leaves.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(2, timeout=TIMEOUT_S)
        leaves._say_goodbye = lambda deadline: None  # type: ignore[method-assign]  # in band
        leaves.close()
        assert tx.statistics().peers == 2, "its last messages are waited for"
        for seq in range(4):
            tx.push(picture(seq), timeout=TIMEOUT_S)
        assert [seq for seq, _ in take(stays, 4)] == [0, 1, 2, 3]
        tx.flush(timeout=TIMEOUT_S)
        assert tx.statistics().peers_lost == 0


def test_objects_that_can_not_travel_are_refused_and_the_stream_goes_on() -> None:
    with pair() as (tx, rx):
        for bad in (np.array([object()]), np.array(["text"]), np.array([b"bytes"])):
            with pytest.raises(rdmaxfer.UnsupportedDtype, match="Fix:"):
                tx.push(bad)
        with pytest.raises(rdmaxfer.FrameError):
            tx.push(np.zeros(3), metadata={"bad": object()})
        tx.push(np.arange(4), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.array.tolist() == [0, 1, 2, 3]
