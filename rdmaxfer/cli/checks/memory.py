"""Memory that may be locked, and huge pages."""

from __future__ import annotations

import resource
from pathlib import Path

from rdmaxfer.cli.checks.finding import Check

HEADER_BYTES = 8192
FILLED_AT_ONCE = (5, 14)
"""Since this release a program can make sure that huge pages are there before it uses them: MADV_POPULATE_WRITE, madvise(2)."""
_CAP_IPC_LOCK = 14  # linux/capability.h


def ring_bytes(slots: int, slot_bytes: int) -> int:
    """What a Receiver registers for each sender: its slots, each with a header."""
    return slots * (slot_bytes + HEADER_BYTES)


def memlock(need_bytes: int) -> Check:
    name = "locked memory"
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    need = f"a receiver's ring locks {_mib(need_bytes)} for each sender"
    if soft == resource.RLIM_INFINITY:
        return Check(name, "ok", f"no limit ({need})")
    if may_lock_any_amount():
        return Check(name, "ok", f"limit {_mib(soft)}, which does not hold for this user ({need})")
    if soft >= 4 * need_bytes:
        return Check(name, "ok", f"limit {_mib(soft)} ({need})")
    here = ""
    if hard == resource.RLIM_INFINITY or hard >= 4 * need_bytes:
        here = f"`ulimit -l {'unlimited' if hard == resource.RLIM_INFINITY else hard >> 10}` in this shell, before the program; "
    return Check(
        name,
        "failed" if soft < need_bytes else "warning",
        f"limit {_mib(soft)} (`ulimit -l`), at most {'any' if hard == resource.RLIM_INFINITY else _mib(hard)} (`ulimit -H -l`), "
        f"but {need}",
        f"{here}for good: echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/rdma.conf, and a new login; "
        "LimitMEMLOCK=infinity in a systemd unit; --ulimit memlock=-1 for docker and podman; or fewer and smaller slots.",
    )


def may_lock_any_amount(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process has CAP_IPC_LOCK."""
    for line in status.read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def huge_pages(need_bytes: int, release: tuple[int, int], meminfo: Path = Path("/proc/meminfo")) -> Check:
    """`release`: the kernel's."""
    name = "huge pages"
    if release < FILLED_AT_ONCE:
        since = ".".join(map(str, FILLED_AT_ONCE))
        return Check(
            name, "note", f"used from Linux {since} on; large rings take longer to register without, and no more"
        )
    values = {}
    for line in meminfo.read_text().splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0])
    page_bytes = values.get("Hugepagesize", 0) << 10
    if not page_bytes:
        return Check(name, "note", "this kernel has none; large rings take longer to register")
    wanted = -(-need_bytes // page_bytes)
    free = values.get("HugePages_Free", 0)
    if free >= wanted:
        return Check(name, "ok", f"{free} of {page_bytes >> 20} MiB are free; a ring takes {wanted}")
    return Check(
        name,
        "note",
        f"{free} of {page_bytes >> 20} MiB are free, and a ring of {_mib(need_bytes)} would take {wanted}: without them it takes "
        "longer to register, and no more",
        f"sudo sysctl vm.nr_hugepages={values.get('HugePages_Total', 0) + wanted - free} (for good: a line of that in "
        "/etc/sysctl.d).",
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.4g} MiB"
