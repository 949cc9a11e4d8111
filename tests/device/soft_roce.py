"""A Soft-RoCE device of a test's own, to ruin."""

from __future__ import annotations

import contextlib
import subprocess

from helpers import TIMEOUT_S

ADDRESS = "10.97.31.1"
OTHER_ADDRESS = "10.97.44.9"


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=TIMEOUT_S)


class SoftRoCE:
    """A Soft-RoCE device on a network device of its own."""

    name = "rxtest"
    netdev = "rxnet"

    def add(self) -> None:
        run("rdma", "link", "add", self.name, "type", "rxe", "netdev", self.netdev)

    def delete(self) -> None:
        run("rdma", "link", "delete", self.name)

    def make(self) -> None:
        try:
            run("ip", "link", "add", self.netdev, "type", "dummy")
            run("ip", "address", "add", f"{ADDRESS}/24", "dev", self.netdev)
            run("ip", "link", "set", self.netdev, "up")
            self.add()
        except subprocess.CalledProcessError:
            self.unmake()
            raise

    def renumber(self) -> None:
        """Another address, and so another GID."""
        run("ip", "address", "add", f"{OTHER_ADDRESS}/24", "dev", self.netdev)
        run("ip", "address", "del", f"{ADDRESS}/24", "dev", self.netdev)

    def unmake(self) -> None:
        for command in (("rdma", "link", "delete", self.name), ("ip", "link", "delete", self.netdev)):
            with contextlib.suppress(subprocess.CalledProcessError):
                run(*command)
