"""A bound socket's answers to those who are not connected: whoever asks much keeps only himself waiting."""

from __future__ import annotations

import itertools

import zmq
from cm_fakes import ANY_PORT, PATIENCE_MS, Server, make_hello

from rdmaxfer.cm import messages as m
from rdmaxfer.cm.server import ServerChannel


def test_a_newcomer_is_answered_next() -> None:
    handler = Server()
    with zmq.Context() as context:
        channel = ServerChannel(
            context,
            ANY_PORT,
            handler,
            lease_s=10.0,
            handshake_timeout_s=10.0,
            max_sessions=1000,
            handshakes_per_s=1000.0,
            identity=None,
        )
        with context.socket(zmq.DEALER) as flood, context.socket(zmq.DEALER) as newcomer:
            for socket in (flood, newcomer):
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(channel.endpoint)
            for _ in range(100):
                flood.send_multipart([b"", m.encode(make_hello())])
            clock = map(float, itertools.count())  # each look at it is later than a turn lasts: one answer a turn

            def turn() -> None:
                channel.on_readable(0.0)
                channel.on_turn(clock.__next__)

            assert channel.socket.poll(PATIENCE_MS)
            turn()
            assert len(handler.open) == 1
            hello = make_hello()
            newcomer.send_multipart([b"", m.encode(hello)])
            while not newcomer.poll(0):
                turn()
                assert len(handler.open) < 50, "the newcomer waits for the flood"
                newcomer.poll(10)  # sockets have threads of their own
            assert isinstance(m.decode(newcomer.recv_multipart()[-1]), m.Accept)
            assert hello.session in handler.open
            while channel.busy or channel.socket.poll(100):
                turn()
            assert len(handler.open) == 101, "the others are answered, too"
        channel.close("the test is over")
        channel.close_socket()
