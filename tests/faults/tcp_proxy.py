"""A TCP proxy for the control plane that fails on command: it sits between a connecting and a bound side.

    with TcpProxy(rx.bind("tcp://127.0.0.1:*")) as proxy:
        tx.connect(proxy.endpoint)
        proxy.drop()  # both directions, from now on, on connections that there are and on those that come
        wait_until(lambda: proxy.counts().dropped_bytes > 0, "something was dropped")
        proxy.resume()

All work is done by one thread. Every command is carried out there and has taken effect when it returns, also in the middle of a
message: with `after=n`, the next n bytes of each connection still pass. TO_BOUND is the way of requests, TO_CONNECTING of replies.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import selectors
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import zmtp

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
Direction = Literal["to_bound", "to_connecting"]
TO_BOUND: Direction = "to_bound"
TO_CONNECTING: Direction = "to_connecting"
BOTH: tuple[Direction, ...] = (TO_BOUND, TO_CONNECTING)
CHUNK_BYTES = 1 << 16
COMMAND_S = 10.0


@dataclasses.dataclass
class Counts:
    """What the proxy did, since it was made."""

    connections: int = 0
    turned_away: int = 0
    """Connections reset as soon as they were there."""
    open: int = 0
    """Connections that there are now."""
    passed_bytes: int = 0
    dropped_bytes: int = 0
    held_bytes: int = 0
    """That wait now, before the proxy or in it: for a stall to end, or a delay."""
    truncated: int = 0
    """Connections closed by `truncate`."""
    cut: int = 0
    """Connections ended by `cut`."""
    delayed: int = 0
    """Messages that were passed on later than they came."""
    lost: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Messages taken out by `lose`, by type."""
    passed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Messages passed on wholly and at once, by type."""


@dataclasses.dataclass
class _Rule:
    """What happens to one direction: after `after` more bytes of a connection, `what`."""

    what: Literal["pass", "drop", "stall", "close"] = "pass"
    after: int = 0
    delay_s: float = 0.0


class _Pipe:
    """One direction of a connection."""

    def __init__(self, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.target = target
        self.splitter = zmtp.Splitter()
        self.waiting: collections.deque[tuple[float, bytes]] = collections.deque()
        self.left = 0
        """Bytes that may pass before the rule is carried out."""
        self.ended = False
        """The source has said its last."""
        self.shut = False
        """So has the target been told."""

    @property
    def held_bytes(self) -> int:
        return sum(len(data) for _, data in self.waiting)


class TcpProxy:
    """See the module. `target` is the bound side's endpoint, tcp://ADDRESS:PORT; `endpoint` is where to connect instead."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Keeps the port while nobody listens, so that connections are refused, and nobody else gets it.
        self._keeper = self._bind(("::1" if ":" in host else "127.0.0.1", 0))
        self._address = self._keeper.getsockname()[:2]
        name = f"[{self._address[0]}]" if ":" in host else self._address[0]
        self.endpoint = f"tcp://{name}:{self._address[1]}"
        self.messages: list[tuple[Direction, str, bytes]] = []
        """All messages of rdmaxfer that came, whatever became of them: direction, type, and what was said."""
        self._rules = {direction: _Rule() for direction in BOTH}
        self._losing: dict[str, int | None] = {}
        self._at: dict[str, Callable[[], object]] = {}
        self._turning_away = False
        self._counts = Counts()
        self._links: list[tuple[_Pipe, _Pipe]] = []
        self._listener: socket.socket | None = None
        self._commands: collections.deque[tuple[Callable[[], Any], list[Any], threading.Event]] = collections.deque()
        self._woken, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._over = False
        self._listen()
        self._thread = threading.Thread(target=self._main, name="tcp-proxy", daemon=True)
        self._thread.start()

    # --- commands ----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Pass on everything from now on, what was held first; take new connections. What was dropped stays dropped."""

        def resume() -> None:
            self._turning_away = False
            self._losing.clear()
            self._at.clear()
            self._listen()
            for direction in BOTH:
                self._set(direction, _Rule())

        self._do(resume)

    def drop(self, *directions: Direction, after: int = 0) -> None:
        """Read and throw away; that one side closes is not passed on either, until `resume`."""
        self._rule(directions, _Rule("drop", after))

    def stall(self, *directions: Direction, after: int = 0) -> None:
        """Stop reading. Nothing is lost, and all TCP connections stay as they are."""
        self._rule(directions, _Rule("stall", after))

    def truncate(self, after: int, *directions: Direction) -> None:
        """Pass on `after` more bytes of each connection, then close it."""
        self._rule(directions, _Rule("close", after))

    def delay(self, seconds: float, *directions: Direction) -> None:
        """Pass everything on so much later, in its order."""
        self._rule(directions, _Rule("pass", 0, seconds))

    def cut(self, *, reset: bool = True) -> None:
        """End all connections at once, by RST or by FIN. New ones are taken as before."""

        def cut() -> None:
            for link in list(self._links):
                self._counts.cut += 1
                self._close(link, reset=reset)

        self._do(cut)

    def turn_away(self) -> None:
        """Reset new connections as soon as they are there, until `resume`."""
        self._do(lambda: setattr(self, "_turning_away", True))

    def refuse(self) -> None:
        """Have the kernel refuse new connections, as if nobody was bound, until `resume`. They can't be counted."""
        self._do(self._unlisten)

    def lose(self, kind: str, times: int | None = None) -> None:
        """Take whole messages of that type out, the next ones or (None) all, and pass on the others."""
        self._do(lambda: self._losing.__setitem__(kind, times))

    def at(self, kind: str, command: Callable[[], object]) -> None:
        """Carry out a command (of this proxy) once, before the next message of that type passes: it is the first to meet it."""
        self._do(lambda: self._at.__setitem__(kind, command))

    def counts(self) -> Counts:
        def copy() -> Counts:
            pipes = [pipe for link in self._links for pipe in link]
            held = sum(pipe.held_bytes + _readable(pipe.source) for pipe in pipes)
            return dataclasses.replace(
                self._counts,
                open=len(self._links),
                held_bytes=held,
                lost=self._counts.lost.copy(),
                passed=self._counts.passed.copy(),
            )

        return self._do(copy)

    def close(self) -> None:
        """End all connections, and the thread. Twice is harmless."""
        if self._over:
            return
        self._do(lambda: setattr(self, "_over", True))
        self._thread.join(COMMAND_S)
        assert not self._thread.is_alive(), "the proxy's thread did not end"
        self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _do(self, function: Callable[[], T]) -> T:
        """Run `function` on the proxy's thread."""
        if threading.current_thread() is self._thread:
            return function()
        done, result = threading.Event(), []
        self._commands.append((function, result, done))
        self._wake.send(b"!")
        assert done.wait(COMMAND_S), "the proxy's thread does not answer"
        if isinstance(result[0], BaseException):
            raise result[0]
        value: T = result[0]
        return value

    def _rule(self, directions: tuple[Direction, ...], rule: _Rule) -> None:
        def set_all() -> None:
            for direction in directions or BOTH:
                self._set(direction, rule)

        self._do(set_all)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not self._over:
                for key, _ in self._selector.select(self._pause_s()):
                    if key.fileobj is self._woken:
                        self._run_commands()
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif key.data is not None and key.data in self._links:
                        self._read(key.data, key.fileobj)
                for link in list(self._links):
                    self._pump(link)
        finally:
            self._over = True
            for link in list(self._links):
                self._close(link, reset=True)
            self._unlisten()
            self._keeper.close()
            self._selector.close()
            self._woken.close()

    def _run_commands(self) -> None:
        self._woken.recv(CHUNK_BYTES)
        while self._commands:
            function, result, done = self._commands.popleft()
            try:
                result.append(function())
            except Exception as error:
                result.append(error)
            done.set()

    def _pause_s(self) -> float | None:
        due = [
            pipe.waiting[0][0] + self._rules[pipe.direction].delay_s
            for link in self._links
            for pipe in link
            if pipe.waiting and self._rules[pipe.direction].delay_s
        ]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _bind(self, address: tuple[str, int]) -> socket.socket:
        made = socket.socket(self._family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
        return made

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = self._bind(self._address)
            self._listener.listen(1024)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        near, _ = self._listener.accept()
        if self._turning_away:
            self._counts.turned_away += 1
            _reset(near)
            return
        try:
            far = socket.create_connection(self._target, COMMAND_S)
        except OSError:
            _reset(near)
            return
        for each in (near, far):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = (_Pipe(TO_BOUND, near, far), _Pipe(TO_CONNECTING, far, near))
        self._links.append(link)
        self._counts.connections += 1
        for pipe in link:
            pipe.left = self._rules[pipe.direction].after
            self._watch(link, pipe)

    def _set(self, direction: Direction, rule: _Rule) -> None:
        self._rules[direction] = rule
        for link in self._links:
            for pipe in link:
                if pipe.direction == direction:
                    pipe.left = rule.after
                    self._watch(link, pipe)

    def _watch(self, link: tuple[_Pipe, _Pipe], pipe: _Pipe) -> None:
        """Read from its source, or not."""
        stalled = self._rules[pipe.direction].what == "stall" and pipe.left == 0
        with contextlib.suppress(KeyError):
            self._selector.unregister(pipe.source)
        if not stalled and not pipe.ended:
            self._selector.register(pipe.source, selectors.EVENT_READ, link)

    def _read(self, link: tuple[_Pipe, _Pipe], source: Any) -> None:
        pipe = link[0] if link[0].source is source else link[1]
        try:
            data = source.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            pipe.ended = True
            self._watch(link, pipe)
            return
        now_s = time.monotonic()
        for message in pipe.splitter.feed(data):
            kind = zmtp.kind(message)
            if kind:
                self.messages.append((pipe.direction, kind, zmtp.body(message)))
                self._meet(kind)
                if self._loses(kind):
                    continue
            if link not in self._links:
                return  # it was cut, by what was to be done at this message or the one before
            pipe.waiting.append((now_s, message))
            self._flush(link, pipe)

    def _meet(self, kind: str) -> None:
        command = self._at.pop(kind, None)
        if command is not None:
            command()

    def _loses(self, kind: str) -> bool:
        if kind not in self._losing:
            return False
        left = self._losing[kind]
        if left is not None:
            self._losing[kind] = left - 1
            if left == 1:
                del self._losing[kind]
        self._counts.lost[kind] += 1
        return True

    def _pump(self, link: tuple[_Pipe, _Pipe]) -> None:
        for pipe in link:
            if link in self._links:
                self._flush(link, pipe)
        if link in self._links and all(pipe.shut for pipe in link):
            self._close(link, reset=False)

    def _flush(self, link: tuple[_Pipe, _Pipe], pipe: _Pipe) -> None:
        """Do with what waits what the rule says."""
        rule = self._rules[pipe.direction]
        while pipe.waiting:
            came_s, data = pipe.waiting[0]
            late = rule.delay_s > 0
            if late and time.monotonic() < came_s + rule.delay_s:
                return
            passing = data if rule.what == "pass" else data[: pipe.left]
            try:
                sent = pipe.target.send(passing) if passing else 0
            except BlockingIOError:
                return  # cannot last: a message of the control plane fits in any socket buffer
            except OSError:
                self._close(link, reset=True)
                return
            self._counts.passed_bytes += sent
            self._counts.delayed += late
            rest = data[sent:]
            if not rest and (kind := zmtp.kind(data)):
                self._counts.passed[kind] += 1
            if rule.what != "pass":
                pipe.left -= sent
                if pipe.left == 0 and rule.what == "close":
                    self._counts.truncated += 1
                    self._close(link, reset=False)
                    return
                if pipe.left == 0 and rule.what == "drop":
                    self._counts.dropped_bytes += len(rest)
                    rest = b""
            pipe.waiting.popleft()
            if rest:
                pipe.waiting.appendleft((came_s, rest))
                if rule.what == "stall" and pipe.left == 0:
                    self._watch(link, pipe)
                    return
        if rule.what == "stall" and pipe.left == 0:
            self._watch(link, pipe)
        elif pipe.ended and not pipe.shut and rule.what != "drop":
            pipe.shut = True
            with contextlib.suppress(OSError):
                pipe.target.shutdown(socket.SHUT_WR)

    def _close(self, link: tuple[_Pipe, _Pipe], *, reset: bool) -> None:
        self._links.remove(link)
        for pipe in link:
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe.source)
        for pipe in link:
            _reset(pipe.source) if reset else pipe.source.close()


def _reset(connection: socket.socket) -> None:
    """Close with RST: the peer loses even what it has received and not read."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _readable(connection: socket.socket) -> int:
    """Bytes that wait to be read."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))[0])
