"""Using what was found: our own way to the device, as much memory as a receiver needs, and a frame to ourselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import rdmaxfer
from rdmaxfer.cli.checks.finding import Check, failed
from rdmaxfer.errors import MemlockError, NoDevice, RdmaxferError
from rdmaxfer.fabric.devices import Device, choose_gid
from rdmaxfer.fabric.route import local_ip_towards
from rdmaxfer.fabric.verbs import Domain
from rdmaxfer.memory import Buffer

LOOPBACK_S = 20.0


def practice(devices: tuple[Device, ...], wanted: dict[str, Any], ring_bytes: int) -> Iterator[Check]:
    ip = local_ip_towards("127.0.0.1")
    try:
        route = choose_gid(devices, **wanted, local_ip=ip, peer_ip=ip)
    except NoDevice as error:
        yield failed("choice", error)
        return
    yield Check("choice", "ok", f"for peers on this machine: {route.reason}")
    try:
        with Domain(route) as domain, domain.protection_domain() as pd:
            yield Check(
                "pyverbs and native core", "ok", f"they fit together: both use one protection domain of {route.device}"
            )
            try:
                with pd.register(Buffer(ring_bytes), remote_write=True):
                    yield Check("memory registration", "ok", f"{ring_bytes >> 20} MiB can be registered")
            except MemlockError as error:
                yield failed("memory registration", error)
                return
    except RdmaxferError as error:
        yield failed("pyverbs and native core", error)
        return
    yield loopback(wanted)


def loopback(wanted: dict[str, Any]) -> Check:
    """A frame by RDMA WRITE from this process to itself."""
    name = "a frame to ourselves"
    picture = np.arange(1 << 18, dtype=np.uint32).reshape(512, 512)
    try:
        with (
            rdmaxfer.Receiver(**wanted, fabric="verbs") as receiver,
            rdmaxfer.Sender(**wanted, fabric="verbs") as sender,
        ):
            sender.connect(receiver.bind("tcp://127.0.0.1:*"), timeout=LOOPBACK_S)
            sender.push(picture, timeout=LOOPBACK_S)
            with receiver.recv(timeout=LOOPBACK_S) as frame:
                same = np.array_equal(frame.array, picture)
    except RdmaxferError as error:
        return failed(name, error)
    if same:
        return Check(name, "ok", "1 MiB was written by RDMA and arrived byte for byte")
    return Check(
        name, "failed", "1 MiB was written by RDMA, but other bytes arrived", "the device or its driver damages data."
    )
