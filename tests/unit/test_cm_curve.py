"""CURVE keys: files, the directory of those allowed, and control threads that use them. No device."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from cm_fakes import ANY_PORT, PATIENCE_S, Client, Server, make_hello, wait_until

from rdmaxfer.cm.connection import BoundServer, Connection
from rdmaxfer.cm.control import Control
from rdmaxfer.cm.curve import AllowedKeys, Curve, load_identity, load_public_key, make_keys
from rdmaxfer.errors import CurveError, LocalProtocolError, RdmaxferError, Refused


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with pairs of keys for `server`, `client`, `other`, and a directory `allowed` with the client's."""
    for name in ("server", "client", "other"):
        make_keys(tmp_path / name)
    allow(tmp_path, "client")
    return tmp_path


def allow(keys: Path, name: str) -> None:
    (keys / "allowed").mkdir(exist_ok=True)
    (keys / "allowed" / f"{name}.key").write_bytes((keys / f"{name}.key").read_bytes())


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_new_pair_belongs_together_and_the_secret_is_its_owners(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        public, secret = make_keys(tmp_path / "me")
    finally:
        os.umask(before)
    assert (public.name, secret.name) == ("me.key", "me.key_secret")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    identity = load_identity(secret)
    assert identity.public == load_public_key(public) == zmq.curve_public(identity.secret)
    assert identity.secret not in public.read_bytes()


@pytest.mark.parametrize("taken", ["me.key", "me.key_secret"])
def test_keys_are_never_overwritten(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(CurveError, match="choose another name"):
        make_keys(tmp_path / "me")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(taken, "precious")]


def test_keys_can_not_be_made_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CurveError, match="choose a directory"):
        make_keys(tmp_path / "nowhere" / "me")


def test_a_secret_that_others_can_read_is_refused(keys: Path) -> None:
    secret = keys / "client.key_secret"
    for mode in (0o640, 0o604):
        secret.chmod(mode)
        with pytest.raises(CurveError, match="chmod 600"):
            load_identity(secret)


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "no such file"), (b"", "No public key"), (b'public-key = "short"', "5 characters"), (b"\xff" * 99, "No")],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes | None, what: str) -> None:
    file = tmp_path / "bad.key"
    if content is not None:
        file.write_bytes(content)
    for load in (load_public_key, load_identity):
        with pytest.raises(CurveError, match=what) as caught:
            load(file)
        assert "keygen" in caught.value.fix


def test_a_public_key_is_no_identity(keys: Path) -> None:
    with pytest.raises(CurveError, match=r"ends in \.key_secret"):
        load_identity(keys / "client.key")


def test_allowed_keys_come_and_go_without_a_restart(keys: Path) -> None:
    allowed = AllowedKeys(keys / "allowed")
    client, other = (load_public_key(keys / f"{name}.key") for name in ("client", "other"))
    assert (allowed.name_of(client), allowed.name_of(other)) == ("client", None)
    allow(keys, "other")
    assert allowed.name_of(other) == "other"
    (keys / "allowed" / "client.key").unlink()
    assert (allowed.name_of(client), allowed.name_of(other)) == (None, "other")
    (keys / "allowed" / "bad.key").write_text("rubbish")
    assert allowed.name_of(other) == "other", "one bad file locks out everybody"
    for file in (keys / "allowed").iterdir():
        file.unlink()
    (keys / "allowed").rmdir()
    assert allowed.name_of(other) is None


def test_a_directory_of_allowed_keys_must_be_one_and_hold_keys(keys: Path) -> None:
    with pytest.raises(CurveError, match="is no directory"):
        AllowedKeys(keys / "nowhere")
    (keys / "allowed" / "bad.key").write_text("rubbish")
    with pytest.raises(CurveError, match=r"bad\.key"):
        AllowedKeys(keys / "allowed")


# --- control threads ---------------------------------------------------------------------------------------------------

Join = Callable[..., tuple[Connection, Client]]


class Party:
    """A bound side, and whoever wants to join it."""

    def __init__(self, keys: Path) -> None:
        self.keys = keys
        self.failures: list[BaseException] = []
        self.controls: list[Control] = []
        self.handler = Server()

    def control(self, name: str | None, *, allowed: bool = False) -> Control:
        curve = None
        if name is not None:
            allowed_keys = AllowedKeys(self.keys / "allowed") if allowed else None
            curve = Curve(load_identity(self.keys / f"{name}.key_secret"), allowed_keys)
        self.controls.append(Control(name or "plain", self.failures.append, curve))
        return self.controls[-1]

    def bind(self, name: str | None) -> BoundServer:
        return self.control(name, allowed=True).bind(ANY_PORT, self.handler)

    def join(self, server: BoundServer, name: str | None, expects: str | None) -> tuple[Connection, Client]:
        client = Client()
        key = load_public_key(self.keys / f"{expects}.key") if expects is not None else None
        control = self.control(name)
        return control.connect(server.endpoint, make_hello(), client, timeout_s=PATIENCE_S, peer_key=key), client


@pytest.fixture
def party(keys: Path) -> Iterator[Party]:
    made = Party(keys)
    yield made
    for control in made.controls:
        control.close(0.2)
    assert not made.failures
    assert not [thread for thread in threading.enumerate() if thread.name == "rdmaxfer-control"]


def refusal(connection: Connection) -> RdmaxferError:
    began = time.monotonic()
    with pytest.raises(Refused) as caught:
        connection.wait_started(PATIENCE_S)
    assert time.monotonic() - began < 5, "it was not told at once"
    assert caught.value.code == "curve"
    assert caught.value.fix
    return caught.value


def test_who_has_an_allowed_key_gets_in(party: Party) -> None:
    server = party.bind("server")
    connection, _ = party.join(server, "client", "server")
    connection.wait_started(PATIENCE_S)
    assert party.handler.ready_ones == {connection.session}
    assert server.turned_away == 0


@pytest.mark.parametrize(
    ("bound", "name", "expects", "text"),
    [
        ("server", "other", "server", "does not let this side's key in"),
        ("server", "client", "other", "does not have the key that was expected"),
        ("server", None, None, "wants a CURVE key"),
        (None, "client", "server", "does not use CURVE"),
    ],
)
def test_keys_that_do_not_fit_are_refused_at_once_counted_and_harm_nobody(
    party: Party, bound: str | None, name: str | None, expects: str | None, text: str
) -> None:
    server = party.bind(bound)
    good, bystander = party.join(server, "client" if bound else None, "server" if bound else None)
    good.wait_started(PATIENCE_S)
    connection, client = party.join(server, name, expects)
    assert text in str(refusal(connection))
    assert len(client.ends) == 1
    wait_until(lambda: server.turned_away >= 1)
    assert party.handler.open == {good.session}, "somebody got in"
    assert not bystander.ends
    another, _ = party.join(server, "client" if bound else None, "server" if bound else None)
    another.wait_started(PATIENCE_S)


def test_a_key_can_be_allowed_later(party: Party) -> None:
    server = party.bind("server")
    refusal(party.join(server, "other", "server")[0])
    allow(party.keys, "other")
    party.join(server, "other", "server")[0].wait_started(PATIENCE_S)


def test_a_stranger_that_comes_first_waits_for_nobody(party: Party) -> None:
    """The bound side is not there yet: being turned away once it is must not need the whole timeout."""
    server = party.bind("server")
    endpoint = server.endpoint
    party.controls.pop().close(0.2)
    client = Client()
    control = party.control("other")
    connection = control.connect(
        endpoint, make_hello(), client, timeout_s=PATIENCE_S, peer_key=load_public_key(party.keys / "server.key")
    )
    party.control("server", allowed=True).bind(endpoint, party.handler)
    refusal(connection)


def test_binding_without_allowed_keys_is_refused_rather_than_open_to_all(party: Party) -> None:
    with pytest.raises(LocalProtocolError, match="without allowed keys"):
        party.control("server").bind(ANY_PORT, party.handler)


def test_a_hundred_strangers_at_once_are_counted_and_the_friend_is_served(party: Party) -> None:
    server = party.bind("server")
    with zmq.Context() as context:
        strangers = []
        for _ in range(100):
            socket = context.socket(zmq.REQ)
            socket.linger = 0
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = load_public_key(party.keys / "server.key")
            socket.connect(server.endpoint)
            strangers.append(socket)
        connection, _ = party.join(server, "client", "server")
        connection.wait_started(PATIENCE_S)
        wait_until(lambda: server.turned_away >= 100)
        assert party.handler.open == {connection.session}
        for socket in strangers:
            socket.close(linger=0)
