"""C and C++ programs that fill frames: the examples, built and run; the library's calls one at a time; programs that err."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, pair, wait_until
from ring_library import Failed, Program, Ring

import rdmaxfer
from rdmaxfer.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
COUNT = 40


def config(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["config", *options]) == 0
    return capsys.readouterr().out.split()


def build(compiler: str, source: str, *options: str, to: Path) -> Path:
    assert shutil.which(compiler), f"{compiler} is needed"
    program = to / source.replace(".", "_")
    command = [compiler, "-Wall", "-Wextra", "-Werror", str(EXAMPLES / source), *options, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return program


def frames_of(program: list[str], name: str) -> None:
    """Run it, and see that what arrives is what it fills."""
    expected = np.arange(640 * 480).astype(np.uint16).reshape(480, 640)
    with pair() as (sender, receiver), sender.intake(name, slots=4, slot_bytes=640 * 480 * 2) as intake:
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            for number in range(COUNT):
                with receiver.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.seq == number
                    assert frame.metadata == {"number": number}
                    assert frame.array.dtype == np.uint16
                    assert np.array_equal(frame.array, expected + np.uint16(number))
            said, complained = running.communicate(timeout=TIMEOUT_S)
        assert (running.returncode, complained) == (0, "")
        assert said == f"filled {COUNT} frames, all released\n"
        wait_until(lambda: intake.frames == COUNT, "all frames counted")
        assert sender.statistics().copied == 0


def goes_on(receiver: rdmaxfer.Receiver, name: str) -> None:
    """The next program that attaches is served."""
    with Ring(name) as ring:
        for number in range(5):
            ring.fill(np.full(100, number, np.uint8))
            with receiver.recv(timeout=TIMEOUT_S) as frame:
                assert np.all(frame.array == number)
        ring.flush()


def test_the_example_in_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = build("cc", "capture.c", *config(capsys, "--cflags", "--libs"), to=tmp_path)
    frames_of([str(program), "c", str(COUNT)], "c")


def test_the_example_in_cpp_with_the_library_opened_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = build("c++", "capture.cpp", "-std=c++17", *config(capsys, "--cflags"), "-ldl", to=tmp_path)
    frames_of([str(program), *config(capsys, "--library"), "cpp", str(COUNT)], "cpp")


def test_the_example_that_sends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = build("cc", "capture.c", *config(capsys, "--cflags", "--libs"), to=tmp_path)
    command = [sys.executable, str(EXAMPLES / "capture_send.py"), "tcp://127.0.0.1:*", "--name", "example"]
    with (
        rdmaxfer.Receiver() as receiver,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sending,
    ):
        assert sending.stdout is not None
        receiver.connect(sending.stdout.readline().split()[-1])
        with subprocess.Popen([str(program), "example", "10"], stdout=subprocess.DEVNULL) as running:
            for number in range(10):
                with receiver.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.metadata == {"number": number}
            assert running.wait(TIMEOUT_S) == 0
        sending.send_signal(signal.SIGINT)
        assert sending.communicate(timeout=TIMEOUT_S)[0] == "sent 10 frames, copied 0\n"


def test_what_goes_along() -> None:
    with pair() as (sender, receiver), sender.intake("along", slots=2, slot_bytes=1000), Ring("along") as ring:
        assert (ring.slots, ring.slot_bytes) == (2, 1000)
        ring.fill(np.arange(6, dtype=">f8").reshape(1, 2, 3), captured_ns=12345, metadata='{"gain": 2.5, "name": "ä"}')
        with receiver.recv(timeout=TIMEOUT_S) as frame:
            assert frame.captured_ns == 12345
            assert frame.metadata == {"gain": 2.5, "name": "ä"}
            assert frame.array.dtype == np.dtype(">f8")
            assert np.array_equal(frame.array, np.arange(6.0).reshape(1, 2, 3))
        slot = ring.reserve()
        ring.publish(slot, (), "<u4")
        ring.publish(ring.reserve(), (0, 7), "u1")
        shapes = []
        for _ in range(2):
            with receiver.recv(timeout=TIMEOUT_S) as frame:
                shapes.append(frame.array.shape)
        assert shapes == [(), (0, 7)]


def test_no_more_than_there_is_room_for_and_nothing_lost() -> None:
    """Without a receiver slots fill up; when one comes, it gets all of them, in order."""
    with rdmaxfer.Sender() as sender:
        endpoint = sender.bind("tcp://127.0.0.1:*")
        with sender.intake("full", slots=3, slot_bytes=100), Ring("full") as ring:
            for number in range(3):
                ring.fill(np.full(100, number, np.uint8))
            with pytest.raises(Failed, match="all 3 slots") as failed:
                ring.reserve(timeout_ms=50)
            assert failed.value.code == errno.ETIMEDOUT
            with pytest.raises(Failed, match="have not released 3 of the frames"):
                ring.flush(timeout_ms=50)
            with rdmaxfer.Receiver() as receiver:
                receiver.connect(endpoint)
                for number in range(3):
                    with receiver.recv(timeout=TIMEOUT_S) as frame:
                        assert np.all(frame.array == number)
                ring.flush()
                slots = [ring.reserve(timeout_ms=0) for _ in range(3)]
                assert len({slot.number for slot in slots}) == 3
                ring.discard(slots[1])
                assert ring.reserve(timeout_ms=0).number == slots[1].number


def test_a_slot_is_not_given_back_before_its_frame_is_released() -> None:
    with pair() as (sender, receiver), sender.intake("held", slots=4, slot_bytes=100), Ring("held") as ring:
        for number in range(4):
            ring.fill(np.full(100, number, np.uint8))
        held = receiver.recv(timeout=TIMEOUT_S)
        for number in range(1, 4):
            with receiver.recv(timeout=TIMEOUT_S) as frame:
                assert np.all(frame.array == number)
        with pytest.raises(Failed, match="all 4 slots"):  # frames are released in their order
            ring.reserve(timeout_ms=200)
        assert np.all(held.array == 0)
        held.release()
        ring.flush()
        assert sorted(ring.reserve(timeout_ms=0).number for _ in range(4)) == [0, 1, 2, 3]


def test_what_was_published_is_sent_though_the_program_leaves_at_once() -> None:
    with pair() as (sender, receiver), sender.intake("leaves", slots=4, slot_bytes=100) as intake:
        for number in range(20):
            with Ring("leaves") as ring:
                ring.fill(np.full(100, number, np.uint8))
            with receiver.recv(timeout=TIMEOUT_S) as frame:
                assert np.all(frame.array == number)
        wait_until(lambda: intake.attached is None, "the program has left")
        with Ring("leaves") as ring:
            ring.fill(np.full(100, 77, np.uint8))
            intake.close()
            with receiver.recv(timeout=TIMEOUT_S) as frame:
                assert np.all(frame.array == 77)
            with pytest.raises(Failed, match="attach again") as failed:
                ring.reserve(timeout_ms=20_000)
            assert failed.value.code == errno.EPIPE


def test_programs_that_come_and_go_leave_nothing_behind() -> None:
    with pair() as (sender, receiver), sender.intake("goes", slots=2, slot_bytes=100) as intake:

        def come_and_go(number: int) -> None:
            with Ring("goes") as ring:
                ring.reserve()
                ring.fill(np.full(100, number, np.uint8))
                with receiver.recv(timeout=TIMEOUT_S) as frame:
                    assert np.all(frame.array == number)
                ring.flush()
            wait_until(lambda: intake.attached is None, "the program has left")

        come_and_go(0)
        wait_until(lambda: not intake._old, "its memory is gone")
        before = len(os.listdir("/proc/self/fd"))
        for number in range(30):
            come_and_go(number)
        wait_until(lambda: not intake._old, "their memory is gone")
        # By shared memory, the receiver lets go of a segment when it hears of it: some time later.
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 8, "no file is left open")


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from ring_library import Ring
ring = Ring("killed")
slots = [ring.reserve() for _ in range(2)]
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_program_that_is_killed_takes_nothing_with_it() -> None:
    with pair() as (sender, receiver), sender.intake("killed", slots=2, slot_bytes=100) as intake:
        command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "holds\n"
            assert intake.attached == program.pid
            with pytest.raises(Failed, match="another program is attached"):
                Ring("killed", timeout_ms=50)
            program.kill()
        goes_on(receiver, "killed")


def test_more_programs_than_may_wait_at_the_door(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as (sender, receiver), sender.intake("door", slots=2, slot_bytes=100) as intake:
        with Ring("door"):
            for _ in range(12):  # they give up, and their places in the queue stay taken
                with pytest.raises(Failed, match="another program is attached") as failed:
                    Ring("door", timeout_ms=20)
                assert failed.value.code == errno.ETIMEDOUT
            waiting = Background(lambda: Ring("door"))
        with waiting.result() as ring:
            ring.fill(np.full(100, 8, np.uint8))
            with receiver.recv(timeout=TIMEOUT_S) as frame:
                assert np.all(frame.array == 8)
        assert (intake.error, caplog.text) == (None, "")


@pytest.mark.parametrize(
    ("publish", "match"),
    [
        ({"shape": (101,)}, "takes 101 bytes, and a slot of this intake has 100"),
        ({"shape": (100,), "dtype": "nonsense"}, "numpy makes no dtype of 'nonsense'"),
        ({"shape": (1 << 63, 1 << 63)}, "can't be sent"),
        ({"shape": (5,), "dtype": "O"}, "dtype object can't be sent"),
        ({"shape": (5,), "dtype": "O,u1"}, "can't be sent"),
        ({"shape": (5,), "metadata": "{"}, "no JSON"),
        ({"shape": (5,), "metadata": "[1]"}, "no JSON object"),
        ({"shape": (5,), "metadata": '{"deep": ' + "[" * 4000}, "no JSON: maximum recursion"),
    ],
)
def test_frames_that_are_none(publish: dict[str, Any], match: str, caplog: pytest.LogCaptureFixture) -> None:
    """The program is told why, and sent away; the next one may come."""
    with pair() as (sender, receiver), sender.intake("none", slots=2, slot_bytes=100) as intake:
        with Ring("none") as ring:
            ring.publish(ring.reserve(), **publish)
            with pytest.raises(Failed, match=match) as failed:
                ring.flush()
            assert failed.value.code == errno.EPIPE
            with pytest.raises(Failed):
                ring.reserve()
        assert intake.error is not None
        assert "can't be sent" in caplog.text
        goes_on(receiver, "none")


def test_what_the_library_refuses_itself() -> None:
    with pair() as (sender, _), sender.intake("refuses", slots=2, slot_bytes=100), Ring("refuses") as ring:
        for options, match in (
            ({"shape": (1,), "ndim": 9}, "up to 8 dimensions"),
            ({"shape": (1,), "dtype": ""}, "needs a dtype"),
            ({"shape": (1,), "dtype": "x" * 64}, "needs a dtype"),
            ({"shape": (1,), "metadata": "x" * 5000}, "4096 bytes"),
        ):
            slot = ring.reserve()
            with pytest.raises(Failed, match=match) as failed:
                ring.publish(slot, **options)  # type: ignore[arg-type]
            assert failed.value.code == errno.EINVAL
        with pytest.raises(Failed, match="not reserved"):
            ring.publish(slot, (1,))
        with pytest.raises(Failed, match="not reserved"):
            ring.discard(slot)


def test_nobody_there_another_abi_and_a_name_that_is_taken() -> None:
    with pytest.raises(Failed, match="nobody on this machine offers the intake nobody"):
        Ring("nobody", timeout_ms=50)
    with pytest.raises(Failed, match="1 to 64 characters"):
        Ring("x" * 65)
    with pytest.raises(Failed, match="build it again"):
        Ring("nobody", abi=2)
    with pair() as (sender, _), sender.intake("taken", slot_bytes=100):
        with pytest.raises(rdmaxfer.EndpointError, match="another process of this machine has an intake 'taken'"):
            sender.intake("taken", slot_bytes=100)
        with pytest.raises(rdmaxfer.EndpointError, match="no name of an intake"):
            sender.intake("a/b", slot_bytes=100)
        with pytest.raises(ValueError, match="1 to 1024 slots"):
            sender.intake("none", slots=0, slot_bytes=100)


def test_strangers_at_the_socket(caplog: pytest.LogCaptureFixture) -> None:
    """Another ABI, nothing at all, and what is no greeting: turned away, and the next program is served."""
    with pair() as (sender, receiver), sender.intake("strange", slots=2, slot_bytes=100):
        for greeting, answer in ((b"\x07\0\0\0", b"it has ABI 7"), (b"hello", b"it has ABI 0"), (b"", b"")):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.settimeout(TIMEOUT_S)
                stranger.connect(f"\0rdmaxfer-intake/{os.geteuid()}/strange")
                if greeting:
                    stranger.send(greeting)
                    assert answer in stranger.recv(1000)
        goes_on(receiver, "strange")


def test_a_program_that_publishes_a_slot_twice(caplog: pytest.LogCaptureFixture) -> None:
    """The library would refuse; so this writes into the queue as it does."""
    with pair() as (sender, receiver), sender.intake("twice", slots=2, slot_bytes=100):
        with Program("twice") as program:
            program.publish(0)
            held = receiver.recv(timeout=TIMEOUT_S)
            program.publish(0)
            assert program.told() == b"it published a slot that it did not have"
            held.release()
        for item, why in (
            ({"imm": 2}, b"a slot that it did not have"),
            ({"imm": 1 << 31}, b"a slot that it did not have"),
            ({"kind": 2}, b"a slot that it did not have"),
            ({"ndim": 9}, b"a frame of 9 dimensions"),
            ({"data_bytes": 3}, b"the program published what is no frame"),
        ):
            with Program("twice") as program:
                program.publish(**{"imm": 0, **item})
                assert why in program.told(), item
        goes_on(receiver, "twice")


def test_too_few_file_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """A program waits until there are some, and the sender goes on."""
    with pair() as (sender, receiver), sender.intake("files", slots=2, slot_bytes=100):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as program:
            program.settimeout(TIMEOUT_S)
            spare = os.dup(0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
            os.close(spare)
            held = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        held.append(os.dup(0))
                program.connect(f"\0rdmaxfer-intake/{os.geteuid()}/files")
                wait_until(lambda: "no program can attach" in caplog.text, "it says so")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for fd in held:
                    os.close(fd)
        goes_on(receiver, "files")


def test_closing_it_in_a_forked_child_leaves_the_parent_alone() -> None:
    with pair() as (sender, receiver), sender.intake("forked", slots=2, slot_bytes=100) as intake:
        child = os.fork()
        if child == 0:
            intake.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert intake._end_s is None
        assert not select.select([intake._wake_fd], [], [], 0)[0]
        goes_on(receiver, "forked")


def test_closing_the_sender_ends_it() -> None:
    started_s = time.monotonic()
    with pair() as (sender, _):
        sender.intake("ends", slots=2, slot_bytes=100)
        ring = Ring("ends")
    with ring, pytest.raises(Failed) as failed:
        ring.reserve()
    assert failed.value.code == errno.EPIPE
    assert time.monotonic() - started_s < TIMEOUT_S
