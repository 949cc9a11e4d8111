"""The command line without a device: arguments, exit codes and output, with stand-ins for Sender and Receiver."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import rdmaxfer
from rdmaxfer import errors
from rdmaxfer.cli import main, options
from rdmaxfer.cli.app import make_parser
from rdmaxfer.cli.failure import CommandError, Exit, exit_code, printable, report
from rdmaxfer.cli.progress import Progress, megabytes

Array = np.ndarray[Any, Any]


class FakeNode:
    """Records what a command does with its Sender or Receiver."""

    made: ClassVar[list[Any]]

    def __init__(self, **arguments: Any) -> None:
        if arguments.get("slots") == 5000:
            raise ValueError("slots is a number from 1 to 4096, not 5000")
        self.arguments = arguments
        self.calls: list[tuple[Any, ...]] = []
        type(self).made.append(self)

    def bind(self, endpoint: str) -> str:
        self.calls.append(("bind", endpoint))
        return endpoint.replace(":0", ":7471")

    def connect(self, endpoint: str, timeout: float | None = 30.0, *, peer_key: str | None = None) -> None:
        self.calls.append(("connect", endpoint, timeout, *([peer_key] if peer_key is not None else [])))

    def wait_for_peers(self, count: int = 1, timeout: float | None = None) -> None:
        self.calls.append(("wait_for_peers", count, timeout))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(("close",))


class FakeSender(FakeNode):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.pushed: list[tuple[Array, dict[str, Any]]] = []

    def push(self, array: Array, *, metadata: dict[str, Any], captured_ns: int, timeout: float | None) -> int:
        self.pushed.append((np.array(array), dict(metadata)))
        return len(self.pushed) - 1

    def flush(self, timeout: float | None = None) -> None:
        self.calls.append(("flush", timeout))


class FakeFrame:
    def __init__(
        self, array: Array, seq: int = 0, metadata: dict[str, Any] | None = None, peer: str = "host/1"
    ) -> None:
        self.array, self.seq, self.metadata, self.peer = array, seq, metadata or {}, peer
        self.nbytes = array.nbytes
        self.released = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.released = True


class FakeReceiver(FakeNode):
    """Hands out `frames`, then raises `end`."""

    frames: ClassVar[list[FakeFrame]]
    end: ClassVar[BaseException]
    state: ClassVar[dict[str, int]]

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.timeouts: list[float | None] = []
        self._left = iter(list(type(self).frames))

    def recv(self, timeout: float | None = None) -> FakeFrame:
        self.timeouts.append(timeout)
        for frame in self._left:
            return frame
        raise type(self).end

    def statistics(self) -> SimpleNamespace:
        return SimpleNamespace(**{"peers": 0, "frames": len(type(self).frames), "peers_lost": 0, **type(self).state})


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdmaxfer, "Sender", FakeSender)
    monkeypatch.setattr(rdmaxfer, "Receiver", FakeReceiver)
    monkeypatch.delenv("RDMAXFER_DEBUG", raising=False)
    FakeSender.made, FakeReceiver.made = [], []
    FakeReceiver.frames, FakeReceiver.end, FakeReceiver.state = [], errors.EndOfStream("over."), {}


ENDPOINT = "tcp://127.0.0.1:7471"


# --- the parser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["doctor"], ["devices"], ["demo"], ["send"], ["recv"]])
def test_every_help_has_an_example_and_the_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "exit codes:" in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert rdmaxfer.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["send"],
        ["send", ENDPOINT],
        ["send", ENDPOINT, "--pattern", "4x4:uint8", "--count", "0"],
        ["send", ENDPOINT, "--pattern", "4x4:uint8", "--fps", "0"],
        ["send", ENDPOINT, "--pattern", "4x4:uint8", "--repeat", "never"],
        ["send", ENDPOINT, "--pattern", "4x4:uint8", "--timeout", "inf"],
        ["send", ENDPOINT, "--pattern", "4by4"],
        ["send", ENDPOINT, "--pattern", "4x4:uint8", "some.npy"],
        ["send", ENDPOINT, "--pattern", "4x4:uint8", "--slots", "5000"],
        ["send", ENDPOINT, "does-not-exist.npy"],
        ["recv"],
        ["recv", ENDPOINT, "--count", "x"],
        ["recv", ENDPOINT, "--slot-bytes", "2X"],
        ["recv", ENDPOINT, "--slots", "5000"],
    ],
)
def test_wrong_arguments_are_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.err
    assert "Traceback" not in captured.err
    assert not any(sender.pushed for sender in FakeSender.made)


def test_an_unsupported_dtype_of_a_pattern_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["send", ENDPOINT, "--pattern", "4x4:object"]) == Exit.FAILED
    assert "astype" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("64K", 65536), ("8m", 8 << 20), ("1G", 1 << 30), ("2MiB", 2 << 20)]
)
def test_sizes(text: str, value: int) -> None:
    assert options.size(text) == value


@pytest.mark.parametrize("text", ["", "0", "K", "-1", "1.5M", "1T", "1KK", "\u0662"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.size(text)


# --- failing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NoDevice("none."), 3),
        (errors.VerbsUnavailable("none."), 3),
        (errors.ConnectTimeout("nobody."), 4),
        (errors.Refused("no.", code="X"), 4),
        (errors.EndpointError("no tcp."), 2),
        (errors.PeerLost("gone."), 1),
        (errors.VerbsError("bad.", verb="ibv_x", errno=5), 1),
        (CommandError("x", code=Exit.NOT_VERIFIED), 5),
        (KeyboardInterrupt(), 130),
        (OSError(2, "No such file", "f"), 1),
        (RuntimeError("bug"), 1),
    ],
)
def test_errors_have_their_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_an_error_is_one_paragraph_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(errors.NoDevice("there is\n no device.", fix="get one.")) == Exit.NO_DEVICE
    assert capsys.readouterr().err == "rdmaxfer: there is no device. Fix: get one.\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDMAXFER_DEBUG", "1")
    report(RuntimeError("a bug"))
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_what_others_wrote_can_not_control_the_terminal() -> None:
    assert printable("a\x1b[2J\nb" + "c" * 999) == "a?[2J?b" + "c" * 193


def test_ctrl_c_tells_the_totals_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    FakeReceiver.frames, FakeReceiver.end = [FakeFrame(np.zeros(8))], KeyboardInterrupt()
    assert main(["recv", ENDPOINT]) == 130
    captured = capsys.readouterr()
    assert "received 1 frame, 64 bytes" in captured.out
    assert "stopped by Ctrl-C" in captured.err
    assert FakeReceiver.made[0].calls[-1] == ("close",)


def test_keys_go_to_where_they_belong(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert main(["send", ENDPOINT, str(tmp_path / "a.npy"), "--secret-key", "me", "--peer-key", "you"]) == 0
    assert FakeSender.made[0].arguments["secret_key"] == "me"
    assert FakeSender.made[0].calls[0] == ("connect", ENDPOINT, 30.0, "you")
    assert main(["recv", ENDPOINT, "--count", "1", "--secret-key", "me", "--allowed-keys", "them"]) in (0, 1)
    assert FakeReceiver.made[0].arguments["allowed_keys"] == "them"


def test_keygen_makes_two_files_and_says_whose_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path / "me")]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["me.key", "me.key_secret"]
    assert "yours alone" in capsys.readouterr().out
    assert main(["keygen", str(tmp_path / "me")]) == Exit.USAGE
    assert "choose another name" in capsys.readouterr().err


# --- send -------------------------------------------------------------------------------------------------------------


def test_send_connects_pushes_and_flushes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = np.arange(12, dtype=">i2").reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    assert main(["send", ENDPOINT, str(tmp_path / "a.npy"), "--timeout", "7", "--device", "rxe9", "--slots", "4"]) == 0
    (sender,) = FakeSender.made
    device = {"device": "rxe9", "port": None, "gid_index": None}
    assert sender.arguments == {**device, "secret_key": None, "allowed_keys": None, "fabric": None, "slots": 4}
    assert sender.calls == [("connect", ENDPOINT, 7.0), ("flush", 7.0), ("close",)]
    ((pushed, metadata),) = sender.pushed
    assert pushed.dtype == array.dtype
    assert np.array_equal(pushed, array)
    expected = hashlib.sha256(array.tobytes()).hexdigest()
    assert metadata == {"name": "a.npy", "index": 0, "source": "npy", "sha256": expected}
    assert "sent 1 frame, 24 bytes" in capsys.readouterr().out


def test_send_may_listen_instead(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pattern", "4x4:uint8", "--count", "2", "--bind", "--peers", "3", "--hash", "none"]
    assert main(["send", "tcp://0.0.0.0:0", *arguments]) == 0
    (sender,) = FakeSender.made
    assert sender.calls == [("bind", "tcp://0.0.0.0:0"), ("wait_for_peers", 3, None), ("flush", None), ("close",)]
    assert [metadata for _, metadata in sender.pushed] == [
        {"name": f"pattern-{number}", "index": number, "source": "pattern"} for number in range(2)
    ]
    assert "listening at tcp://0.0.0.0:7471" in capsys.readouterr().err


def test_a_sender_to_whom_nobody_comes_fails_with_4(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(self: FakeSender, count: int, timeout: float | None) -> None:
        raise errors.TimeoutExpired("nobody.")

    monkeypatch.setattr(FakeSender, "wait_for_peers", nobody)
    assert main(["send", ENDPOINT, "--pattern", "4:uint8", "--bind", "--timeout", "1"]) == Exit.NO_PEER


@pytest.mark.parametrize(("unreleased", "code"), [((), Exit.OK), ((3, 4), Exit.FAILED)])
def test_a_receiver_may_leave_first_if_it_has_taken_all(
    unreleased: tuple[int, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(self: FakeSender, timeout: float | None = None) -> None:
        raise errors.PeerLost("the receiver left.", unreleased=unreleased)

    monkeypatch.setattr(FakeSender, "flush", flush)
    assert main(["send", ENDPOINT, "--pattern", "4:uint8"]) == code


def test_count_and_repeat_limit_files(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.zeros(3))
    main(["send", ENDPOINT, str(tmp_path), "--repeat", "forever", "--count", "5"])
    main(["send", ENDPOINT, str(tmp_path), "--repeat", "2"])
    names = [[metadata["name"][0] for _, metadata in sender.pushed] for sender in FakeSender.made]
    assert names == [list("ababa"), list("abab")]


def test_fps_paces(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("rdmaxfer.cli.send.time.sleep", slept.append)
    monkeypatch.setattr("rdmaxfer.cli.send.time.monotonic", lambda: 100.0)
    assert main(["send", ENDPOINT, "--pattern", "4:uint8", "--count", "3", "--fps", "10"]) == 0
    assert slept == pytest.approx([0, 0.1, 0.2])


# --- recv -------------------------------------------------------------------------------------------------------------


def hashed(array: Array, seq: int, **changes: Any) -> FakeFrame:
    return FakeFrame(array, seq, {"sha256": hashlib.sha256(array.tobytes()).hexdigest(), **changes})


def test_recv_listens_and_ends_with_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    FakeReceiver.frames = [hashed(np.arange(5), seq) for seq in range(3)]
    assert main(["recv", ENDPOINT, "--verify"]) == 0
    (receiver,) = FakeReceiver.made
    assert receiver.calls == [("bind", ENDPOINT), ("close",)]
    assert all(frame.released for frame in FakeReceiver.frames)
    assert "verified: 3 right, 0 wrong, 0 missing" in capsys.readouterr().out


def test_recv_may_connect_instead() -> None:
    assert main(["recv", ENDPOINT, "--connect"]) == 0
    assert FakeReceiver.made[0].calls[0] == ("connect", ENDPOINT, 30.0)


def test_recv_ends_after_count() -> None:
    FakeReceiver.frames, FakeReceiver.end = [FakeFrame(np.zeros(1), seq) for seq in range(9)], AssertionError()
    assert main(["recv", ENDPOINT, "--count", "4"]) == 0
    assert len(FakeReceiver.made[0].timeouts) == 4


@pytest.mark.parametrize(
    "frames",
    [
        [hashed(np.arange(5), 0, sha256="0" * 64)],
        [FakeFrame(np.arange(5), 0)],
        [FakeFrame(np.arange(5), 0, {"sha256": 5})],
        [hashed(np.arange(5), 0), hashed(np.arange(5), 2)],
        [hashed(np.arange(5), 1), hashed(np.arange(5), 0)],
    ],
)
def test_what_is_not_verified_is_told_and_exits_with_5(
    frames: list[FakeFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    FakeReceiver.frames = frames
    assert main(["recv", ENDPOINT, "--verify"]) == Exit.NOT_VERIFIED
    assert f"frame {frames[-1].seq} of host/1: " in capsys.readouterr().err


def test_each_sender_has_its_own_numbers_and_may_be_joined_late() -> None:
    first = [hashed(np.arange(5), seq) for seq in (7, 8)]
    second = [hashed(np.arange(5), seq) for seq in (0, 1)]
    for frame in second:
        frame.peer = "host/2"
    FakeReceiver.frames = [first[0], second[0], first[1], second[1]]
    assert main(["recv", ENDPOINT, "--verify"]) == 0


def test_once_ends_when_the_senders_have_left() -> None:
    FakeReceiver.frames, FakeReceiver.end = [FakeFrame(np.zeros(1))], errors.TimeoutExpired("nothing.")
    assert main(["recv", ENDPOINT, "--once"]) == 0


def test_once_with_a_sender_that_was_lost_fails() -> None:
    FakeReceiver.end, FakeReceiver.state = errors.TimeoutExpired("nothing."), {"peers_lost": 1}
    assert main(["recv", ENDPOINT, "--once"]) == Exit.FAILED


@pytest.mark.parametrize(("peers", "code"), [(0, Exit.NO_PEER), (1, Exit.FAILED)])
def test_a_timeout_tells_whether_anybody_was_there(peers: int, code: int) -> None:
    FakeReceiver.end, FakeReceiver.state = errors.TimeoutExpired("nothing."), {"peers": peers}
    assert main(["recv", ENDPOINT, "--timeout", "1.2", "--once"]) == code
    assert FakeReceiver.made[0].timeouts == pytest.approx([0.5, 0.5, 0.2])


def test_out_saves_by_number_and_never_by_the_name_that_the_peer_gives(tmp_path: Path) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    FakeReceiver.frames = [
        FakeFrame(pixels, 3, {"name": "../../evil.npy"}),
        FakeFrame(pixels, 3, {"name": "/etc/passwd"}, peer="other/2"),
    ]
    out = tmp_path / "new" / "directory"
    assert main(["recv", ENDPOINT, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["frame-00000003.npy", "sender2-frame-00000003.npy"]
    assert np.array_equal(np.load(out / "frame-00000003.npy"), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_images_are_saved_as_png(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    FakeReceiver.frames = [
        FakeFrame(pixels, 0, {"source": "image"}),
        FakeFrame(pixels.astype(np.float32), 1, {"source": "image"}),
        FakeFrame(pixels[:0], 2, {"source": "image"}),
    ]
    assert main(["recv", ENDPOINT, "--out", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy", ".npy", ".png"]
    with image.open(tmp_path / "frame-00000000.png") as saved:
        assert np.array_equal(np.asarray(saved), pixels)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "frame-00000000.npy").write_text("precious")
    FakeReceiver.frames = [FakeFrame(np.zeros(3))]
    assert main(["recv", ENDPOINT, "--out", str(tmp_path)]) == Exit.FAILED
    assert (tmp_path / "frame-00000000.npy").read_text() == "precious"
    assert "is there already" in capsys.readouterr().err
    assert main(["recv", ENDPOINT, "--out", str(tmp_path / "frame-00000000.npy")]) == Exit.USAGE


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self, tty: bool) -> None:
        self.text, self._tty = "", tty

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self._tty


@pytest.mark.parametrize("tty", [False, True])
def test_progress_is_a_line_each_second(tty: bool) -> None:
    now, terminal = [0.0], Terminal(tty)
    progress = Progress("sent", stream=terminal, clock=lambda: now[0])  # type: ignore[arg-type]
    progress.start()
    for _ in range(25):
        now[0] += 0.1
        progress.add(1_000_000)
    progress.clear()
    lines = [line for line in terminal.text.replace("\r", "\n").splitlines() if "now" in line]
    assert len(lines) == 2
    assert "now 10.0 frames/s, 10.0 MB/s" in lines[1]
    assert ("\r" in terminal.text) == tty
    assert str(progress) == "sent 25 frames, 25.0 MB in 2.50 s: 10.0 frames/s, 10.0 MB/s"


def test_amounts_are_readable() -> None:
    assert [megabytes(value) for value in (0, 64, 123_456, 5e9, 2e11)] == [
        "0 bytes",
        "64 bytes",
        "0.1 MB",
        "5000.0 MB",
        "200.00 GB",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_can_complete_arguments(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("record", "--slot-bytes", "verbs"):
        assert word in script
    if shell == "bash":  # which is sure to be here, and knows what is no script
        (tmp_path / "rdmaxfer").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "rdmaxfer"], check=True, timeout=60)


def test_completion_without_its_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert "pip install 'rdmaxfer[completion]'" in capsys.readouterr().err


def test_the_manual_page_has_every_command_and_option() -> None:
    """It is made by scripts/docs.sh, of the same parser."""
    page = (Path(__file__).parents[2] / "docs" / "man" / "rdmaxfer.1").read_text(encoding="utf-8").replace("\\-", "-")
    parser = make_parser()
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert f"rdmaxfer {name}" in page, "run scripts/docs.sh"
        section = page.partition(f".SS \\fBrdmaxfer {name}\\fR")[2].partition(".SS ")[0]
        for action in command._actions:
            for option in action.option_strings[-1:]:
                assert option == "--help" or option in section, f"{name} {option}: run scripts/docs.sh"
