"""Endpoints: what is accepted, and what the error says otherwise."""

from __future__ import annotations

import pytest

from rdmaxfer.cm.endpoint import Endpoint, from_zmq, parse, plain_address
from rdmaxfer.errors import EndpointError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp://127.0.0.1:7471", "127.0.0.1", 7471),
        ("tcp://[::1]:1", "::1", 1),
        ("tcp://[fe80::1%eth0]:7471", "fe80::1%eth0", 7471),
        ("tcp://localhost:65535", "localhost", 65535),
        ("tcp://node-7.example.org:7471", "node-7.example.org", 7471),
    ],
)
def test_good_endpoints(text: str, host: str, port: int) -> None:
    for bind in (False, True):
        assert parse(text, bind=bind) == Endpoint(host, port)
        assert str(parse(text, bind=bind)) == text


@pytest.mark.parametrize("text", ["tcp://*:7471", "tcp://*:*", "tcp://127.0.0.1:*", "tcp://0.0.0.0:0", "tcp://[::]:*"])
def test_wildcards_are_for_binding(text: str) -> None:
    parse(text, bind=True)
    with pytest.raises(EndpointError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:7471",
        "udp://127.0.0.1:7471",
        "ipc:///tmp/x",
        "tcp://127.0.0.1",
        "tcp://[::1]",
        "tcp://::1:7471",
        "tcp://[nonsense]:7471",
        "tcp://[127.0.0.1]:7471",
        "tcp://[::1%]:7471",
        "tcp://:7471",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:x",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:٣",
        "tcp://127.0.0:7471",
        "tcp://300.1.1.1:7471",
        "tcp://a b:7471",
        "tcp://eth0;10.0.0.1:7471",
        "tcp://-host:7471",
        "tcp://host:7471/path",
        "tcp://" + "a" * 64 + ":1",
    ],
)
def test_bad_endpoints_are_explained(text: str) -> None:
    for bind in (False, True):
        with pytest.raises(EndpointError, match="Fix: write tcp://HOST:PORT"):
            parse(text, bind=bind)


def test_only_strings_are_endpoints() -> None:
    with pytest.raises(EndpointError):
        parse(b"tcp://127.0.0.1:7471")  # type: ignore[arg-type]


def test_addresses_from_zmq_are_simplified() -> None:
    assert str(from_zmq("tcp://[::ffff:127.0.0.1]:4711")) == "tcp://127.0.0.1:4711"
    assert str(from_zmq("tcp://[fe80::1%eth0]:4711")) == "tcp://[fe80::1%eth0]:4711"
    assert plain_address("::ffff:10.0.0.7") == "10.0.0.7"
    assert plain_address("fe80::1%eth0") == "fe80::1%eth0"
