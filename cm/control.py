"""The control thread of a Sender or Receiver: it alone touches the zmq sockets, and calls all handlers.

Other threads hand it calls (`Control.call`) and wait for the results in slices of a tenth of a second, so that Ctrl-C
gets through. If the thread dies, every wait, present and future, raises the reason.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

import zmq

from rdmaxfer.cm.client import ClientChannel
from rdmaxfer.cm.connection import CALL_TIMEOUT_S, SLICE_S, BoundServer, Connection, Watching, monotonic_s
from rdmaxfer.cm.curve import Curve
from rdmaxfer.cm.gate import Gate
from rdmaxfer.cm.latch import Call
from rdmaxfer.cm.messages import Hello, RefuseCode
from rdmaxfer.cm.protocol import ClientHandler, ServerHandler
from rdmaxfer.cm.server import ServerChannel
from rdmaxfer.errors import ClosedError, ForkedError, LocalProtocolError, RdmaxferError, TimeoutExpired

__all__ = ["BoundServer", "Connection", "Control", "Later"]

T = TypeVar("T")

DEFAULT_LEASE_S: Final = 10.0
DEFAULT_MAX_SESSIONS: Final = 256
DEFAULT_HANDSHAKE_TIMEOUT_S: Final = 10.0


LATE_S: Final = 0.2
"""A thread that is so late was held up."""


class Later:
    """A call that waits for its time; `cancel` it from the control thread, or from any other."""

    def __init__(self, fn: Callable[[], object]) -> None:
        self.fn: Callable[[], object] | None = fn

    def cancel(self) -> None:
        self.fn = None


class Control:
    """See the module. `name` is for error messages. `on_failure` is told, on that thread, what the thread died of. With `curve`,
    every endpoint is encrypted, and bound ones let in only who has an allowed key."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None], curve: Curve | None = None) -> None:
        self._name = name
        self._curve = curve
        self._gate: Gate | None = None
        self._on_failure = on_failure
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._calls: deque[Call[Any]] = deque()
        self._open = True
        """Whether calls are taken. Changes, like the use of `_wake_fd`, with the lock held."""
        self._failure: BaseException | None = None
        self._closing = False
        self._close_by_s: float | None = None
        self._watched: dict[int, Callable[[], bool]] = {}
        self._later: list[tuple[float, int, Later]] = []
        self._order = itertools.count()
        self._servers: list[ServerChannel] = []
        self._clients: list[ClientChannel] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._thread = threading.Thread(target=self._main, name="rdmaxfer-control", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Control of {self._name}: {len(self._servers)} bound, {len(self._clients)} connecting or connected>"

    # --- for any thread --------------------------------------------------------------------------------------------

    @property
    def is_control_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def bind(
        self,
        endpoint: str,
        handler: ServerHandler,
        *,
        lease_s: float = DEFAULT_LEASE_S,
        handshake_timeout_s: float = DEFAULT_HANDSHAKE_TIMEOUT_S,
        max_sessions: int = DEFAULT_MAX_SESSIONS,
        handshakes_per_s: float = math.inf,
    ) -> BoundServer:
        """Answer who connects to `endpoint`. Raises EndpointError, and LocalProtocolError if CURVE is used without allowed keys."""

        def bind() -> BoundServer:
            if self._curve is not None and self._gate is None:
                if self._curve.allowed is None:
                    raise LocalProtocolError("an endpoint was to be bound with CURVE, but without allowed keys")
                # Before the socket: without anybody to ask, ZeroMQ lets every key in.
                self._gate = Gate(self._context, self._curve.allowed)
                self._poller.register(self._gate.socket, zmq.POLLIN)
            channel = ServerChannel(
                self._context,
                endpoint,
                handler,
                lease_s=lease_s,
                handshake_timeout_s=handshake_timeout_s,
                max_sessions=max_sessions,
                handshakes_per_s=handshakes_per_s,
                identity=self._curve.identity if self._curve is not None else None,
            )
            self._servers.append(channel)
            self._poller.register(channel.socket, zmq.POLLIN)
            self._poller.register(channel.watch.socket, zmq.POLLIN)
            return BoundServer(self, channel)

        return self.run(bind)

    def connect(
        self,
        endpoint: str,
        hello: Hello,
        handler: ClientHandler,
        *,
        timeout_s: float | None = DEFAULT_HANDSHAKE_TIMEOUT_S,
        peer_key: bytes | None = None,
    ) -> Connection:
        """Ask for a connection and return at once. `hello.session` is its id, `hello.lease_s` the lease asked for. The
        handshake may take `timeout_s`; None is for ever. `peer_key`: the peer's public key, with CURVE. Raises EndpointError,
        and LocalProtocolError for an invalid HELLO."""
        connection = Connection(self, endpoint, hello)

        def connect() -> Connection:
            channel = ClientChannel(
                self._context,
                endpoint,
                Watching(handler, connection),
                hello,
                handshake_timeout_s=math.inf if timeout_s is None else timeout_s,
                identity=self._curve.identity if self._curve is not None else None,
                peer_key=peer_key,
            )
            try:
                channel.session.start(monotonic_s())
            except BaseException:
                channel.close_socket()
                raise
            connection.attach(channel)
            self._clients.append(channel)
            for socket in channel.sockets:
                self._poller.register(socket, zmq.POLLIN)
            return connection

        return self.run(connect)

    def watch_fd(self, fd: int, on_readable: Callable[[], bool]) -> Call[None]:
        """Call `on_readable` on the control thread whenever `fd` is readable (or broken), until it returns False. Whoever closes
        the file closes this Control before."""

        def watch() -> None:
            self._watched[fd] = on_readable
            self._poller.register(fd, zmq.POLLIN)

        return self.call(watch)

    def end(self, session_id: bytes, reason: str, code: RefuseCode = RefuseCode.CLOSING) -> Call[bool]:
        """End a session of a bound endpoint; `gone` is called. The result tells whether there was one."""
        return self.call(lambda: any(channel.sessions.end(session_id, reason, code) for channel in self._servers))

    def call(self, fn: Callable[[], T]) -> Call[T]:
        """Run `fn` on the control thread; what it returns or raises is kept for who asks. Raises ClosedError, ForkedError, or
        the reason why the control thread died."""
        call = Call(fn)
        self._check_pid()
        with self._lock:
            if not self._open:
                raise self._gone_error()
            self._calls.append(call)
            os.eventfd_write(self._wake_fd, 1)
        return call

    def call_later(self, delay_s: float, fn: Callable[[], object]) -> Later:
        """Run `fn` on the control thread in `delay_s` seconds, unless it closes or dies before. What `fn` raises is a
        failure of the control thread."""
        later = Later(fn)
        due_s = monotonic_s() + delay_s

        def add() -> None:
            heapq.heappush(self._later, (due_s, next(self._order), later))

        if self.is_control_thread:
            add()
        else:
            self.call(add)
        return later

    def run(self, fn: Callable[[], T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Run `fn` on the control thread and return what it returns. On the control thread itself: at once. Raises what
        `fn` raises, what `call` raises, or TimeoutExpired; then `fn` is not run any more, if it had not begun."""
        if self.is_control_thread:
            self._check_pid()
            if not self._open:
                raise self._gone_error()
            return fn()
        call = self.call(fn)
        end_s = monotonic_s() + timeout_s
        try:
            while not call.wait(max(0.0, min(SLICE_S, end_s - monotonic_s()))):
                if monotonic_s() >= end_s:
                    text = f"the control thread of {self._name} was busy for more than {timeout_s:g} s."
                    raise TimeoutExpired(text, fix="registering very large rings takes long: make them smaller.")
        finally:
            call.cancel()
        return call.result()

    def check_not_control_thread(self) -> None:
        """Raises LocalProtocolError on the control thread, which can't wait for itself."""
        if self.is_control_thread:
            raise LocalProtocolError("the control thread was to wait for itself")

    def check_alive(self) -> None:
        """Raises ClosedError, ForkedError, or the reason why the control thread died."""
        self._check_pid()
        if not self._open:
            raise self._gone_error()

    def close(self, timeout_s: float = 1.0) -> None:
        """Say BYE wherever connected, for `timeout_s` at most, end all sessions and the control thread. May be called
        again. In a forked child it only lets go. Raises LocalProtocolError on the control thread, and TimeoutExpired if
        a handler does not return."""
        if os.getpid() != self._pid:
            return
        self.check_not_control_thread()
        with self._lock:
            if self._open:
                self._closing = True
                self._close_by_s = min(self._close_by_s or float("inf"), monotonic_s() + timeout_s)
                os.eventfd_write(self._wake_fd, 1)
        end_s = monotonic_s() + timeout_s + CALL_TIMEOUT_S
        while self._thread.is_alive():
            self._thread.join(SLICE_S)
            if monotonic_s() >= end_s:
                raise TimeoutExpired(f"the control thread of {self._name} did not end.")

    def _check_pid(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"{self._name} was made by process {self._pid}, and can't be used in its child.",
                fix="make it in the child, or start processes by the method 'spawn'.",
            )

    def _gone_error(self) -> RdmaxferError:
        failure = self._failure
        if failure is None:
            return ClosedError(f"{self._name} is closed.")
        error = LocalProtocolError(f"the control thread of {self._name} died: {failure!r}")
        error.__cause__ = failure
        return error

    # --- the control thread ----------------------------------------------------------------------------------------

    def _main(self) -> None:
        failure: BaseException | None = None
        try:
            self._loop()
        except BaseException as error:  # given to on_failure, whatever it is
            failure = error
        try:
            self._stop(failure)
        except BaseException as error:
            failure = failure or error
            self._failure = failure
        if failure is not None:
            self._on_failure(failure)

    def _loop(self) -> None:
        leaving = False
        while True:
            due_s = self._due_s()
            events = dict(self._poller.poll(_poll_ms(due_s)))
            began_s = min(due_s, monotonic_s())
            if self._wake_fd in events:
                os.eventfd_read(self._wake_fd)
            # What has arrived comes before what has run out: a thread that was held up must not find its peers dead.
            now_s = monotonic_s()
            if self._gate is not None and self._gate.socket in events:
                self._gate.on_readable()
            for server in self._servers:
                if server.watch.socket in events:
                    server.on_handshake()
                if server.socket in events:
                    server.on_readable(now_s)
            for client in self._clients:
                if client.watch.socket in events:
                    client.on_handshake()
                if client.socket in events:
                    client.on_readable(now_s)
            for fd in [fd for fd in self._watched if fd in events]:
                if not self._watched[fd]():
                    self._poller.unregister(fd)
                    del self._watched[fd]
            for server in self._servers:
                server.on_turn(monotonic_s)
            self._run_calls()
            if self._closing and not leaving:
                leaving = True
                self._leave()
            self._run_later()
            now_s = monotonic_s()
            late = now_s - began_s > LATE_S
            for server in self._servers:
                if late:
                    server.sessions.on_late(now_s)
                server.sessions.on_tick(now_s)
            for client in self._clients:
                if late:
                    client.session.on_late(now_s)
                client.session.on_tick(now_s)
            self._flush()
            if leaving and (not self._clients or monotonic_s() >= (self._close_by_s or 0.0)):
                return

    def _due_s(self) -> float:
        """When there is something to do, whatever may come."""
        if any(channel.busy for channel in self._servers):
            return monotonic_s()
        deadlines = [channel.sessions.next_deadline() for channel in self._servers]
        deadlines += [channel.session.next_deadline() for channel in self._clients]
        if self._later:
            deadlines.append(self._later[0][0])
        if self._closing:
            deadlines.append(self._close_by_s)
        return min((deadline for deadline in deadlines if deadline is not None), default=math.inf)

    def _run_calls(self) -> None:
        # Only what is there now: calls that beget calls must not keep the loop from its sockets.
        for _ in range(len(self._calls)):
            self._calls.popleft().run()

    def _run_later(self) -> None:
        while self._later and self._later[0][0] <= monotonic_s():
            fn = heapq.heappop(self._later)[2].fn
            if fn is not None:
                fn()

    def _flush(self) -> None:
        for client in list(self._clients):
            before = client.sockets
            if client.flush():
                for socket in before:
                    self._poller.unregister(socket)
                for socket in client.sockets:
                    self._poller.register(socket, zmq.POLLIN)
            if client.ended:
                for socket in client.sockets:
                    self._poller.unregister(socket)
                client.close_socket()
                self._clients.remove(client)

    def _leave(self) -> None:
        for server in self._servers:
            server.close("the peer has closed its endpoint.")
        deadline_s = self._close_by_s or monotonic_s()
        for client in self._clients:
            client.session.bye("closed", monotonic_s(), deadline_s)

    def _stop(self, failure: BaseException | None) -> None:
        """Free everything; every handler hears of the end, every call that waits gets an answer."""
        with self._lock:
            self._failure = failure
            self._open = False
            calls, self._calls = self._calls, deque()
            os.close(self._wake_fd)
        errors: list[BaseException] = []
        for server in self._servers:
            try:
                server.close("the peer has closed its endpoint.")
            except Exception as error:
                errors.append(error)
        for client in self._clients:
            try:
                client.session.abort(self._gone_error() if failure is not None else None)
            except Exception as error:
                errors.append(error)
        self._servers.clear()
        self._clients.clear()
        self._later.clear()
        for call in calls:
            call.fail(self._gone_error())
        self._context.destroy(linger=0)
        if errors:
            raise errors[0]


def _poll_ms(due_s: float) -> int:
    if math.isinf(due_s):
        return -1
    # Rounded up: a poll that ends a little too early would be followed by many of no length.
    left_s = due_s - monotonic_s()
    return int(min(3600.0, left_s) * 1000) + 1 if left_s > 0 else 0
