"""Runs on node 2 and does there what the tests on node 1 ask for: they make the objects of traffic.py through it.

It talks on the second network, which stays whole when the wire is cut. It ends when somebody connects to END_PORT: run.sh does,
when the tests have ended, however they did.
"""

from __future__ import annotations

import os
import socket
import threading
from multiprocessing.managers import BaseManager

import traffic

PORT, END_PORT = 7998, 7999
AUTHKEY = b"nodes"


class Agent(BaseManager):
    """The remote side's classes, by name."""


def connect(host: str) -> Agent:
    for name in ("End", "Sending", "Receiving"):
        Agent.register(name)
    agent = Agent((host, PORT), AUTHKEY)
    agent.connect()
    return agent


def main() -> None:
    for name in ("End", "Sending", "Receiving"):
        Agent.register(name, getattr(traffic, name))
    here = os.environ["RDMAXFER_ADMIN_ADDRESS"]
    server = Agent((here, PORT), AUTHKEY).get_server()
    with socket.create_server((here, END_PORT)) as end:

        def wait_for_the_end() -> None:
            end.accept()[0].close()
            server.stop_event.set()

        threading.Thread(target=wait_for_the_end, daemon=True).start()
        server.serve_forever()


if __name__ == "__main__":
    main()
