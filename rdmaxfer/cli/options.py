"""Arguments that several commands have, and the Sender or Receiver made from them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, get_args

import rdmaxfer
from rdmaxfer import metrics
from rdmaxfer.cli.failure import CommandError, Exit
from rdmaxfer.errors import CurveError, TimeoutExpired
from rdmaxfer.fabric.choice import Fabric

ENDPOINT_HELP = (
    "address of the meeting point, tcp://HOST:PORT. The side that connects names the other machine; the side that "
    "listens names one of its own addresses, or 0.0.0.0 for all of them. Any free port above 1024 will do"
)
CONNECT_TIMEOUT_S = 30.0


def add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "RDMA device", "Found by itself; needed only on machines with several (see `rdmaxfer devices`)."
    )
    group.add_argument("--device", metavar="NAME", help="name of the device, e.g. rxe0 or mlx5_0 [RDMAXFER_DEVICE]")
    group.add_argument("--device-port", metavar="N", type=whole_number(1), help="port of the device, counted from 1")
    group.add_argument(
        "--gid-index", metavar="N", type=whole_number(0), help="which of the port's addresses (GIDs) to send from"
    )


def add_fabric_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fabric",
        choices=get_args(Fabric),
        help="what carries the frames: verbs (RDMA), shm (shared memory, within one machine), tcp, or auto: the first of shm, "
        "verbs and tcp that both sides can do [RDMAXFER_FABRIC, or auto]",
    )


def add_slot_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots", metavar="N", type=whole_number(1), default=16, help="frames that may be on their way at a time (16)"
    )


def add_metrics_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics",
        metavar="PORT",
        type=whole_number(0),
        help="answer Prometheus at this port of 127.0.0.1 (0: any free one)",
    )


def serve_metrics(args: argparse.Namespace) -> None:
    if args.metrics is None:
        return
    try:
        port = metrics.serve(args.metrics)
    except ImportError:
        raise CommandError(
            "--metrics needs the package prometheus-client.", fix="pip install 'rdmaxfer[metrics]'."
        ) from None
    except (OSError, OverflowError) as error:
        raise CommandError(f"port {args.metrics} can't be used for --metrics: {error}.", fix="another port.") from None
    say(f"metrics at http://127.0.0.1:{port}/metrics")


def add_key_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("keys", "So that only known peers can connect (see `rdmaxfer keygen`).")
    group.add_argument("--secret-key", metavar="FILE", help="this side's own NAME.key_secret")
    group.add_argument("--peer-key", metavar="FILE", help="the side that connects: NAME.key of the other one")
    group.add_argument(
        "--allowed-keys", metavar="DIR", help="the side that listens: directory with NAME.key of each peer"
    )


def node_arguments(args: argparse.Namespace) -> dict[str, Any]:
    keys = {name: getattr(args, name, None) for name in ("secret_key", "allowed_keys")}  # not every command has them
    return {**device_arguments(args), **keys, "fabric": getattr(args, "fabric", None)}


def device_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "port": args.device_port, "gid_index": args.gid_index}


def make_receiver(args: argparse.Namespace, **more: Any) -> rdmaxfer.Receiver:
    try:
        return rdmaxfer.Receiver(**node_arguments(args), **more)
    except CurveError:
        raise
    except ValueError as error:
        raise CommandError(f"{error}.", code=Exit.USAGE) from None


def make_sender(args: argparse.Namespace, **more: Any) -> rdmaxfer.Sender:
    try:
        return rdmaxfer.Sender(**node_arguments(args), **more)
    except CurveError:
        raise
    except ValueError as error:
        raise CommandError(f"{error}.", code=Exit.USAGE) from None


def say(text: str) -> None:
    """Something the user should know while a command runs."""
    print(f"rdmaxfer: {text}", file=sys.stderr, flush=True)


def wait_for_peers(sender: rdmaxfer.Sender, number: int, timeout: float | None) -> None:
    try:
        sender.wait_for_peers(number, timeout=timeout)
    except TimeoutExpired:
        raise CommandError(
            f"fewer than {number} receivers connected within {timeout:g} s.",
            fix="start `rdmaxfer recv --connect` with an address of this machine and this port, and check that no "
            "firewall blocks the TCP port.",
            code=Exit.NO_PEER,
        ) from None


# --- types of arguments -----------------------------------------------------------------------------------------------


def whole_number(least: int) -> Callable[[str], int]:
    """The type of a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def positive(text: str) -> float:
    """A positive number, such as seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text: str) -> int:
    """A number of bytes, such as 4096, 64K, 8M or 1G."""
    number, unit = text.upper().removesuffix("IB").removesuffix("B"), ""
    if number[-1:] in _UNITS:
        number, unit = number[:-1], number[-1:]
    if not number.isascii() or not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 4096, 64K, 8M or 1G")
    return int(number) * _UNITS[unit]
