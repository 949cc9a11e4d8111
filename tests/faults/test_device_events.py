"""Devices that fail, go and come back while frames are on their way. Each test has a Soft-RoCE device of its own to ruin."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, check_frames, pair, picture, wait_until
from soft_roce import ADDRESS, OTHER_ADDRESS, SoftRoCE, run
from streams import streaming

import rdmaxfer
from rdmaxfer.cli.counters import device_parent
from rdmaxfer.fabric.devices import Route
from rdmaxfer.fabric.route import gid_to_ip

pytestmark = pytest.mark.verbs

PROMPTLY_S = 10.0


@pytest.fixture
def device(route: Route) -> Iterator[SoftRoCE]:
    if device_parent(route.device) is None:
        pytest.skip("a network card is tested here, and it is not ours to ruin; Soft-RoCE may not be there")
    made = SoftRoCE()
    made.make()
    yield made
    made.unmake()


@contextlib.contextmanager
def connected(
    device: SoftRoCE, bind: str, *, reconnect: bool = False
) -> Iterator[tuple[rdmaxfer.Sender, rdmaxfer.Receiver]]:
    options: dict[str, Any] = {"device": device.name, "reconnect": reconnect}
    with pair(bind=bind, host=ADDRESS, sender=options, receiver=options) as made:
        yield made


@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_a_device_that_is_removed_under_a_stream(device: SoftRoCE, route: Route, bind: str) -> None:
    elsewhere = {"device": route.device}
    with pair(sender=elsewhere, receiver=elsewhere) as (other_tx, other_rx), connected(device, bind) as (tx, rx):
        check_frames(tx, rx)

        def receive() -> None:
            while True:
                rx.recv(timeout=TIMEOUT_S).release()

        def send() -> None:
            while True:
                tx.push(np.zeros(100_000, np.uint8), timeout=TIMEOUT_S)

        receiving, sending = Background(receive), Background(send)
        pushed = tx.statistics().frames
        wait_until(lambda: tx.statistics().frames > pushed + 20, "the stream flows")
        began = time.monotonic()
        device.delete()
        wait_until(lambda: tx.statistics().peers == rx.statistics().peers == 0, "both sides noticed")
        assert time.monotonic() - began < PROMPTLY_S
        tx_lost, rx_lost = tx.statistics().peers_lost, rx.statistics().peers_lost
        assert (tx_lost, rx_lost) == (1, 1)
        # Who connected hears of it; who is bound waits for others.
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            (sending if bind == "receiver" else receiving).result()
        assert isinstance(caught.value, rdmaxfer.RdmaxferError)
        check_frames(other_tx, other_rx)
        began = time.monotonic()
        with contextlib.suppress(rdmaxfer.DeviceLost):  # again, if frames were on their way that nobody was told of
            tx.close()
        rx.close()
        assert time.monotonic() - began < PROMPTLY_S
        for each in (sending, receiving):
            with pytest.raises(rdmaxfer.RdmaxferError):
                each.result()


@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_a_device_that_is_removed_while_nobody_polls_and_comes_back(device: SoftRoCE, bind: str) -> None:
    with connected(device, bind) as (tx, rx):
        check_frames(tx, rx)
        device.delete()
        wait_until(lambda: tx.statistics().peers == rx.statistics().peers == 0, "both sides noticed")
        connecting = tx if bind == "receiver" else rx
        with pytest.raises(rdmaxfer.DeviceLost, match=f"{device.name}.*failed or was removed") as caught:
            tx.push(picture(1), timeout=0.5) if connecting is tx else rx.recv(timeout=0.5)
        assert isinstance(caught.value, rdmaxfer.DeviceError)
        assert "rdmaxfer devices" in caught.value.fix
        with pytest.raises(rdmaxfer.NoDevice):
            connecting.connect(f"tcp://{ADDRESS}:9", timeout=1)
        device.add()
        bound = rx if bind == "receiver" else tx
        connecting.connect(bound.bind(f"tcp://{ADDRESS}:*"), timeout=TIMEOUT_S)
        bound.wait_for_peers(1, timeout=TIMEOUT_S)
        check_frames(tx, rx)
        tx.flush(timeout=TIMEOUT_S)


@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_a_stream_goes_on_when_its_device_is_back(device: SoftRoCE, bind: str) -> None:
    with connected(device, bind, reconnect=True) as (tx, rx):
        count = 200

        def receive() -> int:
            for seq in range(count):
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.seq == seq
                    assert frame.gap is None
                    assert frame.array.tobytes() == picture(seq).tobytes()
            return count

        receiving = Background(receive)
        for seq in range(count):
            tx.push(picture(seq), timeout=TIMEOUT_S)
            if seq in (50, 120):
                device.delete()
                wait_until(lambda: tx.statistics().peers == rx.statistics().peers == 0, "both sides noticed")
                assert tx.statistics().reconnecting == rx.statistics().reconnecting == 1
                device.add()
        tx.flush(timeout=TIMEOUT_S)
        assert receiving.result() == count
        assert tx.statistics().reconnects == rx.statistics().reconnects == 2


@pytest.mark.parametrize("removed", [True, False], ids=["after it was removed", "while it is there"])
@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_a_stream_goes_on_when_its_device_has_another_address(device: SoftRoCE, bind: str, removed: bool) -> None:
    options: dict[str, Any] = {"device": device.name, "lease_s": 2.0}
    with (
        pair(bind=bind, sender=options, receiver=options) as (tx, rx),  # the control plane has an address that stays
        streaming(tx, rx) as stream,
    ):
        stream.goes_on()
        assert gid_used(rx) == ADDRESS
        if removed:
            device.delete()
            wait_until(lambda: tx.statistics().peers == rx.statistics().peers == 0, "both sides noticed")
        device.renumber()
        if removed:
            device.add()
        wait_until(
            lambda: tx.statistics().reconnects == rx.statistics().reconnects == 1, "both sides are connected again"
        )
        stream.goes_on()
        assert gid_used(tx) == gid_used(rx) == OTHER_ADDRESS


def gid_used(node: rdmaxfer.Sender | rdmaxfer.Receiver) -> str:
    (link,) = node._links
    return str(gid_to_ip(link.endpoint.route.gid))


def test_frames_and_registered_memory_outlive_their_device(device: SoftRoCE) -> None:
    with connected(device, "receiver") as (tx, rx):
        source = np.ones(5000, np.uint8)
        registration = tx.register(source)
        tx.push(source, timeout=TIMEOUT_S)
        frame = rx.recv(timeout=TIMEOUT_S)
        device.delete()
        wait_until(lambda: tx.statistics().peers == rx.statistics().peers == 0, "both sides noticed")
        with pytest.raises(rdmaxfer.DeviceLost) as caught:
            tx.push(source, timeout=0.5)
        assert caught.value.unreleased == (0,)
        assert frame.array.tobytes() == source.tobytes()
        frame.release()
        registration.close()
        device.add()
        tx.connect(rx.bind(f"tcp://{ADDRESS}:*"), timeout=TIMEOUT_S)
        with tx.register(source):
            tx.push(source, timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
            tx.flush(timeout=TIMEOUT_S)


def test_a_port_that_goes_down_and_up_is_mentioned(device: SoftRoCE, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rdmaxfer"), connected(device, "receiver") as (tx, rx):
        check_frames(tx, rx)
        run("ip", "link", "set", device.netdev, "down")
        wait_until(lambda: f"port 1 of {device.name} is down" in caplog.text, "it was mentioned")
        run("ip", "link", "set", device.netdev, "up")
        wait_until(lambda: f"port 1 of {device.name} is up" in caplog.text, "it was mentioned")


def test_no_file_is_left_of_a_device_that_comes_and_goes(device: SoftRoCE) -> None:

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    counts = []
    for _ in range(5):
        with connected(device, "receiver") as (tx, rx):
            check_frames(tx, rx)
            device.delete()
            wait_until(lambda: tx.statistics().peers == rx.statistics().peers == 0, "both sides noticed")
        device.add()
        counts.append(files())
    assert len(set(counts)) == 1, counts
