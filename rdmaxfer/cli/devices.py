"""`rdmaxfer devices`: which RDMA devices this machine has."""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
from typing import Any

from rdmaxfer.cli.failure import CommandError, Exit
from rdmaxfer.fabric import devices as found

HELP = "list the RDMA devices of this machine"
DESCRIPTION = """\
List the RDMA devices of this machine.

An RDMA device is a network card that can write into another machine's memory by itself, or Soft-RoCE (rxe), a part of
Linux that does the same in software on any network card. Each has ports with a state (only ACTIVE ones work) and a
largest packet (MTU; larger is faster, 4096 is the most), and each port has addresses, called GIDs: an index, an IP
address, the network interface that it belongs to, and a type (over Ethernet rdmaxfer uses ROCE_V2, over InfiniBand IB).
"""
EXAMPLES = """\
examples:
  rdmaxfer devices
  rdmaxfer devices --json
      for programs
  rdmaxfer send tcp://10.0.0.2:7471 photos/ --device rxe0 --gid-index 1
      use this device, and its GID 1, instead of what rdmaxfer would choose
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    devices = found.list_devices()
    if args.json:
        print(json.dumps([as_json(device) for device in devices], indent=2))
        return Exit.OK if devices else Exit.NO_DEVICE
    if not devices:
        raise CommandError(
            "this machine has no RDMA device.",
            fix="`rdmaxfer doctor` says how to get one; any network card will do, by Soft-RoCE.",
            code=Exit.NO_DEVICE,
        )
    for device in devices:
        print("\n".join(describe(device)))
    return Exit.OK


def describe(device: found.Device) -> list[str]:
    """A device in lines for people."""
    if device.error:
        return [f"{device.name}  can't be opened: {device.error}"]
    lines = [f"{device.name}  transport {device.transport}"]
    for port in device.ports:
        lines.append(f"  port {port.number}  {port.state}  {port.link_layer}  MTU {port.active_mtu}")
        rows = [(str(gid.index), str(gid.ip), gid.type, interface(gid)) for gid in port.gids]
        if not rows:
            lines.append("    no GIDs")
            continue
        rows.insert(0, ("GID", "address", "type", "interface"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"    {'  '.join(cells)}".rstrip())
    return lines


def as_json(device: found.Device) -> dict[str, Any]:
    ports = []
    for port in device.ports:
        plain = {field.name: getattr(port, field.name) for field in dataclasses.fields(port) if field.name != "gids"}
        gids = [
            {"index": gid.index, "address": str(gid.ip), "type": gid.type, "interface": interface(gid)}
            for gid in port.gids
        ]
        ports.append({**plain, "gids": gids})
    return {"name": device.name, "transport": device.transport, "error": device.error, "ports": ports}


def interface(gid: found.Gid) -> str:
    """The name of the network interface of a GID, or an empty string."""
    try:
        return socket.if_indextoname(gid.ifindex) if gid.ifindex else ""
    except OSError:
        return ""
