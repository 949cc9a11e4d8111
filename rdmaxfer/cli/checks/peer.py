"""The way to another machine, up to frames that a receiver there has released."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import rdmaxfer
from rdmaxfer.cli.checks.finding import Check, failed
from rdmaxfer.cli.digest import digest
from rdmaxfer.cm.endpoint import Endpoint, parse
from rdmaxfer.errors import ConnectTimeout, NoDevice, RdmaxferError, Refused, VerbsUnavailable
from rdmaxfer.fabric.devices import choose_gid, list_devices
from rdmaxfer.fabric.route import local_ip_towards, resolve

TCP_S = 5.0
CONNECT_S = 10.0
FRAMES_S = 15.0
PROBES = (4096, 4 << 20)
"""Payload bytes: one packet, and a thousand of them."""


def examine(
    endpoint: str,
    wanted: dict[str, Any],
    *,
    fabric: Any = None,
    secret_key: str | None = None,
    peer_key: str | None = None,
) -> Iterator[Check]:
    """Step by step; ends at the first one that fails, since no other one could work. Raises EndpointError, CurveError."""
    there = parse(endpoint)
    for step in (address(there), choice(there, wanted), tcp(there)):
        yield step
        if step.status == "failed":
            return
    sender = rdmaxfer.Sender(**wanted, fabric=fabric, secret_key=secret_key, reconnect=False)
    try:
        sender.connect(endpoint, timeout=CONNECT_S, peer_key=peer_key)
        (link,) = sender.links()
        slow = link.fabric == "tcp" and fabric != "tcp"
        yield Check(
            "meeting",
            "warning" if slow else "ok",
            f"{link.peer} is there; frames go over {link.fabric}: {link.reason}",
            "mend what that says; `rdmaxfer doctor` on the other machine, too." if slow else "",
        )
        yield frames(sender, link)
    except (Refused, ConnectTimeout, NoDevice, VerbsUnavailable) as error:
        yield _meeting_failed(there, error)
    finally:
        with contextlib.suppress(RdmaxferError):  # frames that did not get there were told of already
            sender.close()


def address(there: Endpoint) -> Check:
    name = "address"
    ip = resolve(there.host)
    if ip is None:
        return Check(
            name,
            "failed",
            f"the host name {there.host!r} is not known",
            f"check it: getent hosts {there.host}; or use an address.",
        )
    local = local_ip_towards(there.host)
    if local is None:
        return Check(name, "failed", f"there is no route to {ip}", f"see `ip route get {ip}`.")
    here = "this machine" if local == ip else "another machine"
    return Check(name, "ok", f"{there.host} is {ip}, {here}; packets leave from {local}")


def choice(there: Endpoint, wanted: dict[str, Any]) -> Check:
    """The device and GID that would be used, and why."""
    name = "choice"
    ip, local = resolve(there.host), local_ip_towards(there.host)
    try:
        route = choose_gid(list_devices(), **wanted, local_ip=local, peer_ip=ip)
    except (NoDevice, VerbsUnavailable) as error:
        return Check(
            name,
            "warning" if wanted["device"] is None else "failed",
            f"no RDMA device leads there, so only TCP is left: {failed(name, error).detail}",
            error.fix,
        )
    return Check(name, "ok", route.reason)


def tcp(there: Endpoint) -> Check:
    """Whether anything listens there at all."""
    name = "TCP"
    listen = f"start `rdmaxfer recv tcp://0.0.0.0:{there.port} --verify`, or your receiver, on {there.host}"
    began_s = time.monotonic()
    try:
        with socket.create_connection((there.host, there.port), timeout=TCP_S):
            return Check(name, "ok", f"port {there.port} answers, within {(time.monotonic() - began_s) * 1e3:.1f} ms")
    except ConnectionRefusedError:
        return Check(name, "failed", f"nothing listens at port {there.port} of {there.host}", f"{listen}.")
    except TimeoutError:
        return Check(
            name,
            "failed",
            f"no answer from port {there.port} of {there.host} within {TCP_S:g} s",
            f"let the port in through the firewall there: sudo ufw allow {there.port}/tcp, or sudo firewall-cmd "
            f"--add-port={there.port}/tcp; and see whether the machine is up: ping {there.host}.",
        )
    except OSError as error:
        return Check(
            name,
            "failed",
            f"{there.host} can't be reached: {error.strerror or error}",
            f"see `ip route get {there.host}`.",
        )


def _meeting_failed(there: Endpoint, error: RdmaxferError) -> Check:
    if isinstance(error, Refused) and error.code == "role":
        return Check(
            "meeting",
            "failed",
            f"a sender is bound at port {there.port}, and this probe is one, too: so far all is well",
            f"to see whether frames get through, start `rdmaxfer recv tcp://0.0.0.0:{there.port + 1} --verify` there, and name "
            "that port here.",
        )
    if isinstance(error, ConnectTimeout):
        return Check(
            "meeting",
            "failed",
            f"something listens at port {there.port}, but it does not answer as an rdmaxfer does",
            "check the port, that both sides run the same release (`rdmaxfer --version`), and that both use keys, or neither.",
        )
    return failed("meeting", error)


def frames(sender: rdmaxfer.Sender, link: rdmaxfer.LinkInfo) -> Check:
    """Whether frames are written there, taken and given back."""
    name = "frames"
    took_ms = []
    try:
        for nbytes in PROBES:
            array = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
            metadata = {"name": "rdmaxfer doctor", "sha256": digest(array, "sha256")}
            began_s = time.monotonic()
            sender.push(array, metadata=metadata, timeout=FRAMES_S)
            sender.flush(timeout=FRAMES_S)
            took_ms.append((time.monotonic() - began_s) * 1e3)
    except RdmaxferError as error:
        found = failed(name, error)
        if link.fabric != "verbs":
            return found
        return found._replace(
            fix="let in UDP port 4791, by which RoCE comes, through the firewalls of both machines, and give both, and the switch "
            f"between them, the same MTU. {found.fix}"
        )
    return Check(
        name,
        "ok",
        f"{link.peer} took a frame of 4 KiB after {took_ms[0]:.1f} ms and one of 4 MiB after {took_ms[1]:.1f} ms, over "
        f"{link.fabric}",
    )
