"""Bad input: each kind gets a sentence of its own that says what to do, soon, and both sides stay usable."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from helpers import TIMEOUT_S, check_frames, pair, picture, wait_until

import rdmaxfer
from rdmaxfer.cm import messages

PROMPTLY_S = 10.0
"""What is wrong at once is said at once; on a busy, emulated machine that takes a little."""


@contextlib.contextmanager
def promptly(limit_s: float = PROMPTLY_S) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit_s


def check_fix(error: rdmaxfer.RdmaxferError) -> None:
    assert error.fix
    assert str(error).endswith(f" Fix: {error.fix}")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:7471",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:*",
        "tcp://*:7471",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:seven",
        "tcp://fd77::1:7471",
        "tcp://300.1.1.1:7471",
        "ipc:///tmp/socket",
        "tcp://127.0.0.1:7471/path",
        "tcp://a b:7471",
        None,
        7471,
    ],
)
def test_a_wrong_endpoint(endpoint: Any) -> None:
    with pair() as (tx, rx):
        for node in (tx, rx):
            with promptly(), pytest.raises(rdmaxfer.EndpointError, match=r"Fix: write tcp://HOST:PORT") as caught:
                node.connect(endpoint, timeout=TIMEOUT_S)
            check_fix(caught.value)
        check_frames(tx, rx)


@pytest.mark.parametrize("endpoint", ["tcp://203.0.113.7:7471", "tcp://127.0.0.1", "tcp://no-such-dev0:7471", "x"])
def test_an_endpoint_that_can_not_be_bound(endpoint: str) -> None:
    with pair() as (tx, rx):
        for node in (tx, rx):
            with promptly(), pytest.raises(rdmaxfer.EndpointError) as caught:
                node.bind(endpoint)
            check_fix(caught.value)
        check_frames(tx, rx)


def test_a_port_that_is_taken() -> None:
    with pair() as (tx, rx):
        endpoint = rx.bind("tcp://127.0.0.1:*")
        with promptly(), pytest.raises(rdmaxfer.EndpointError, match="choose another port") as caught:
            tx.bind(endpoint)
        check_fix(caught.value)
        check_frames(tx, rx)


def test_nobody_there() -> None:
    with pair() as (tx, rx):
        for node in (tx, rx):
            with (
                promptly(),
                pytest.raises(rdmaxfer.ConnectTimeout, match=r"127\.0\.0\.1:9 did not connect within") as caught,
            ):
                node.connect("tcp://127.0.0.1:9", timeout=0.5)
            assert isinstance(caught.value, TimeoutError)
            check_fix(caught.value)
        check_frames(tx, rx)


def test_a_host_name_that_nobody_knows() -> None:
    with pair() as (tx, rx):
        with promptly(30), pytest.raises(rdmaxfer.RdmaxferError, match=r"no-such-host\.invalid") as caught:
            tx.connect("tcp://no-such-host.invalid:7471", timeout=0.5)
        check_fix(caught.value)
        check_frames(tx, rx)


@pytest.mark.verbs
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "mlx5_77"}, "no RDMA device 'mlx5_77'; there is"),
        ({"port": 9}, "no port 9"),
        ({"gid_index": 200}, "200"),
    ],
)
def test_a_wrong_device_port_or_gid(options: dict[str, Any], says: str) -> None:
    with pair() as (tx, rx), rdmaxfer.Sender(**options) as wrong:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        for _ in range(2):
            with promptly(), pytest.raises(rdmaxfer.NoDevice, match=says) as caught:
                wrong.connect(endpoint, timeout=TIMEOUT_S)
            check_fix(caught.value)
        check_frames(tx, rx)


@pytest.mark.verbs
def test_binding_with_a_wrong_device_is_refused_at_once() -> None:
    with pair() as (tx, rx), rdmaxfer.Receiver(device="mlx5_77") as wrong:
        with promptly(), pytest.raises(rdmaxfer.NoDevice, match="no RDMA device 'mlx5_77'; there is") as caught:
            wrong.bind("tcp://127.0.0.1:*")
        check_fix(caught.value)
        check_frames(tx, rx)


@pytest.mark.verbs
def test_the_device_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDMAXFER_DEVICE", "mlx5_78")
    with rdmaxfer.Sender() as tx, promptly(), pytest.raises(rdmaxfer.NoDevice, match="mlx5_78"):
        tx.connect("tcp://127.0.0.1:9")


@pytest.mark.parametrize("cls", [rdmaxfer.Sender, rdmaxfer.Receiver])
def test_two_of_a_kind(cls: Any) -> None:
    with pair() as (tx, rx), cls() as other:
        node = tx if cls is rdmaxfer.Sender else rx
        with promptly(), pytest.raises(rdmaxfer.Refused, match="both sides are a") as caught:
            other.connect(node.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        assert caught.value.code == "role"
        check_frames(tx, rx)


# --- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [np.array([object()]), np.array(["text"]), np.array([b"x"]), np.zeros(2, [("a", "O")]), np.zeros(3, np.longdouble)],
    ids=lambda array: str(array.dtype),
)
def test_an_unsupported_dtype(array: np.ndarray[Any, Any]) -> None:
    with pair() as (tx, rx):
        with promptly(), pytest.raises(rdmaxfer.UnsupportedDtype, match="can't be sent") as caught:
            tx.push(array, timeout=TIMEOUT_S)
        assert isinstance(caught.value, TypeError)
        check_fix(caught.value)
        with promptly(), pytest.raises(rdmaxfer.UnsupportedDtype):
            tx.reserve((1,), array.dtype)
        check_frames(tx, rx)


@pytest.mark.parametrize("bind", ["receiver", "sender"])
def test_a_frame_beyond_the_limit(bind: str) -> None:
    with pair(bind=bind, receiver={"slot_bytes": 4096, "max_frame_bytes": 100_000}) as (tx, rx):
        for _ in range(2):
            with promptly(), pytest.raises(rdmaxfer.FrameTooLarge, match="limit of 100000 bytes") as caught:
                tx.push(np.zeros(100_001, np.uint8), timeout=TIMEOUT_S)
            assert isinstance(caught.value, ValueError)
            assert "Receiver(max_frame_bytes=100001)" in caught.value.fix
            check_fix(caught.value)
        tx.push(np.zeros(100_000, np.uint8), timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()
        check_frames(tx, rx)


@pytest.mark.parametrize("shape", [(1 << 62,), (1 << 40, 1 << 40), (0, 1 << 63), (1,) * 9, (-1,)])
def test_a_frame_beyond_any_limit(shape: tuple[int, ...]) -> None:
    with pair() as (tx, rx):
        with promptly(), pytest.raises(rdmaxfer.FrameTooLarge) as caught:
            tx.reserve(shape, np.uint8)
        check_fix(caught.value)
        check_frames(tx, rx)


def test_memory_that_is_not_there_for_a_frame_within_the_limit() -> None:
    """More than this machine's address space has."""
    with pair(receiver={"max_frame_bytes": messages.MAX_SLOT_BYTES, "slots": 2}) as (tx, rx):
        with promptly(), pytest.raises((rdmaxfer.RdmaxferError, MemoryError)):  # noqa: PT012
            tx.reserve((messages.MAX_SLOT_BYTES,), np.uint8, timeout=5).discard()
            tx.push(np.broadcast_to(np.uint8(1), (messages.MAX_SLOT_BYTES,)), timeout=5)
        check_frames(tx, rx)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_is_none(timeout: float) -> None:
    with pair() as (tx, rx):
        for call in (
            lambda: tx.push(picture(0), timeout=timeout),
            lambda: rx.recv(timeout=timeout),
            lambda: tx.flush(timeout=timeout),
            lambda: tx.connect("tcp://127.0.0.1:9", timeout=timeout),
            lambda: rx.wait_for_peers(1, timeout=timeout),
        ):
            with promptly(), pytest.raises(ValueError, match="timeout"):
                call()
        check_frames(tx, rx)


# --- locked memory -----------------------------------------------------------------------------------------------------

FEW_LOCKED = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
import numpy as np, rdmaxfer
said = []
def attempt(call):
    began = time.monotonic()
    try:
        call()
        said.append(["", "", ""])
    except rdmaxfer.RdmaxferError as error:
        said.append([type(error).__name__, str(error), error.fix])
    assert time.monotonic() - began < 10
endpoint = sys.argv[1]
with rdmaxfer.Receiver() as rx, rdmaxfer.Sender(slots=2) as tx:
    attempt(lambda: tx.connect(rx.bind("tcp://127.0.0.1:*"), timeout=30))   # the ring is too large: rx refuses
with rdmaxfer.Sender(slots=2) as tx:
    tx.connect(endpoint, timeout=30)
    attempt(lambda: tx.push(np.zeros(1 << 20, np.uint8), timeout=30))
    attempt(lambda: tx.register(np.zeros(1 << 20, np.uint8)))
    attempt(lambda: tx.push(np.arange(10), timeout=30))
print(json.dumps(said))
"""


@pytest.mark.verbs
def test_a_memlock_limit_of_64_kib() -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv, "install util-linux"
    with rdmaxfer.Receiver(slots=2) as rx:
        done = subprocess.run(
            [setpriv, "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", sys.executable, "-c", FEW_LOCKED]  # noqa: RUF005
            + [rx.bind("tcp://127.0.0.1:*")],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        connect, push, register, small = json.loads(done.stdout)
        assert connect[0] == "Refused"
        assert push[0] == register[0] == "MemlockError", (push, register)
        for _, message, fix in (connect, push, register):
            assert "`ulimit -l`: 64" in message
            assert "memlock unlimited" in fix
        assert small == ["", "", ""]
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.array.tolist() == list(range(10))


# --- what else may come to the control port ----------------------------------------------------------------------------


def hello(**changes: Any) -> messages.Hello:
    fabric = messages.VerbsAddress(
        device="rxe9",
        gid=bytes(10) + b"\xff\xff" + bytes([192, 168, 77, 1]),
        lid=0,
        queue_pairs=(messages.QueuePair(qp_num=17, psn=1),),
        link_layer="ethernet",
        active_mtu=1024,
        max_msg_sz=1 << 20,
    )
    fields = {
        "session": secrets.token_bytes(16),
        "request": 1,
        "role": "sender",
        "node": secrets.token_bytes(16),
        "stream": secrets.token_bytes(16),
        "attempt": 1,
        "identity": "",
        "resume": None,
        "fabrics": (fabric,),
        "slots": 4,
        "slot_bytes": 0,
        "max_slot_bytes": 1 << 20,
        "lease_s": 1.0,
        "reconnect_s": 0.0,
        "name": "stranger",
    }
    return messages.Hello(**{**fields, **changes})


def test_a_peer_that_connects_with_another_protocol_version() -> None:
    with pair() as (tx, rx), zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(rx.bind("tcp://127.0.0.1:*"))
        data = bytearray(messages.encode(hello()))
        data[7] = 2
        with promptly():
            stranger.send(bytes(data))
            refusal = messages.decode(stranger.recv())
        assert isinstance(refusal, messages.Refuse)
        assert (refusal.code, refusal.limit) == (messages.RefuseCode.VERSION, 1)
        assert "version 1 of the protocol is spoken here, not version 2" in refusal.message
        assert refusal.fix
        check_frames(tx, rx)


@pytest.mark.parametrize("polite", [True, False])
def test_a_bound_peer_of_another_protocol_version(polite: bool) -> None:
    with pair() as (tx, rx), zmq.Context() as context, context.socket(zmq.REP) as stranger:
        stranger.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        stranger.setsockopt(zmq.LINGER, 0)
        port = stranger.bind_to_random_port("tcp://127.0.0.1")
        for node in (tx, rx):
            from helpers import Background

            def answer() -> None:
                request = messages.decode(stranger.recv())
                if polite:
                    refusal = messages.Refuse(
                        session=request.session,
                        request=request.request,
                        code=messages.RefuseCode.VERSION,
                        message="version 2 of the protocol is spoken here, not version 1.",
                        fix="run releases of rdmaxfer on both sides that share a protocol version.",
                        limit=2,
                    )
                    data = bytearray(messages.encode(refusal))
                else:
                    data = bytearray(messages.encode(hello()))
                data[7] = 2
                stranger.send(bytes(data))

            answering = Background(answer)
            expected = rdmaxfer.Refused if polite else rdmaxfer.RemoteProtocolError
            with promptly(), pytest.raises(expected, match="version 2") as caught:
                node.connect(f"tcp://127.0.0.1:{port}", timeout=TIMEOUT_S)
            check_fix(caught.value)
            answering.result()
            while not polite and stranger.poll(1500):  # the BYE that follows
                stranger.recv()
                stranger.send(b"?")
        check_frames(tx, rx)


RUBBISH = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(4096),
    "noise": np.random.default_rng(1).bytes(100_000),
    "half a greeting": b"\xff\0\0\0\0\0\0\0\x01\x7f",
    "a greeting and noise": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48) + b"\x04\xff\xff\xff" * 100,
}


@pytest.mark.parametrize("what", RUBBISH)
def test_garbage_on_the_control_port(what: str) -> None:
    with pair() as (tx, rx):
        for node in (tx, rx):
            host, _, port = node.bind("tcp://127.0.0.1:*").removeprefix("tcp://").rpartition(":")
            for _ in range(3):
                with socket.create_connection((host, int(port)), TIMEOUT_S) as stranger, contextlib.suppress(OSError):
                    stranger.sendall(RUBBISH[what])
            endpoint = f"tcp://{host}:{port}"
            other: Any = rdmaxfer.Receiver() if node is tx else rdmaxfer.Sender()
            with other:
                with promptly():
                    other.connect(endpoint, timeout=TIMEOUT_S)
                node.wait_for_peers(2, timeout=TIMEOUT_S)
            wait_until(lambda node=node: gone(node), "it left")
        check_frames(tx, rx)


def gone(node: Any) -> bool:
    with contextlib.suppress(rdmaxfer.PeerLost, rdmaxfer.TimeoutExpired, rdmaxfer.RdmaxferError):
        node.wait_for_peers(99, timeout=0.01)
    return node.statistics().peers == 1


ODD = {
    "empty": b"",
    "noise": np.random.default_rng(2).bytes(1000),
    "no map": messages._PREFIX + b"\x93\x01\x02\x03",
    "deep": messages._PREFIX + b"\x91" * 5000,
    "a length that lies": messages._PREFIX + b"\xdf\xff\xff\xff\xff",
    "no request": messages.encode(
        messages.Gone(session=bytes(15) + b"\1", request=1),
    ),
    "session zero": messages.encode(hello(session=bytes(16))),
    "a goodbye of nobody": messages.encode(
        messages.Bye(session=secrets.token_bytes(16), request=4, end="goodbye", reason="")
    ),
    "an address that is none": messages.encode(
        hello(
            fabrics=(
                messages.VerbsAddress(
                    **{
                        **{
                            f: getattr(hello().fabrics[0], f)
                            for f in ("device", "lid", "queue_pairs", "link_layer", "active_mtu", "max_msg_sz")
                        },
                        "gid": bytes(16),
                    }
                ),
            )
        )
    ),
    "infiniband": messages.encode(
        hello(
            fabrics=(
                messages.VerbsAddress(
                    **{
                        **{
                            f: getattr(hello().fabrics[0], f)
                            for f in ("device", "lid", "queue_pairs", "gid", "active_mtu", "max_msg_sz")
                        },
                        "link_layer": "infiniband",
                    }
                ),
            )
        )
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_messages_are_refused_with_a_reason(what: str) -> None:
    with pair() as (tx, rx), zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(rx.bind("tcp://127.0.0.1:*"))
        with promptly():
            stranger.send(ODD[what])
            refusal = messages.decode(stranger.recv())
        assert isinstance(refusal, messages.Refuse), refusal
        assert refusal.message
        assert refusal.code is not messages.RefuseCode.INTERNAL, refusal
        check_frames(tx, rx)


def test_a_message_beyond_the_limit_is_cut_off() -> None:
    with pair() as (tx, rx), zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(rx.bind("tcp://127.0.0.1:*"))
        stranger.send_multipart([b"", bytes(1 << 20)])
        stranger.send_multipart([b"x"] * 1000)
        stranger.send_multipart([b"", b"", b"", b""])
        check_frames(tx, rx)
