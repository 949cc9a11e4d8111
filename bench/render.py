#!/usr/bin/env python3
"""Makes docs/performance.md and its plots of what scripts/bench.sh has measured."""

# ruff: noqa: E501  # rows of tables are as wide as they are

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = {64: "64 B", 4096: "4 KiB", 65536: "64 KiB", 1 << 20: "1 MiB", 8 << 20: "8 MiB", 64 << 20: "64 MiB"}
OURS, BATCHES, PERFTEST = "#1b6ca8", "#6bb3e0", "#9a9a9a"


def median(row: dict[str, Any], who: str, figure: str = "value") -> float:
    return statistics.median(each[who][figure] for each in row["rounds"])


def ratio(row: dict[str, Any], who: str, to: str) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(each[who]["value"] / each[to]["value"] for each in row["rounds"])


def bandwidth(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| bytes | CPUs | rdmaxfer, MB/s | of ib_write_bw | with as many QPs | in batches of 8 | of ib_write_bw | CPU a frame, µs: sender, receiver | ib_write_bw's sender |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {NAMES[row['bytes']]} | {row['cpus']} | {median(row, 'rdmaxfer'):.1f} | **{ratio(row, 'rdmaxfer', 'perftest'):.2f}** "
        f"| {ratio(row, 'rdmaxfer', 'as many QPs'):.2f} | {median(row, 'batches'):.1f} "
        f"| **{ratio(row, 'batches', 'perftest'):.2f}** "
        f"| {median(row, 'rdmaxfer', 'cpu_us'):.0f}, {median(row, 'rdmaxfer', 'peer_cpu_us'):.0f} "
        f"| {median(row, 'perftest', 'cpu_us'):.0f} |"
        for row in rows
    ]
    return lines


def latency(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| bytes | rdmaxfer, µs | ib_write_lat, µs | ratio | rdmaxfer, median and 99 % | ib_write_lat, typical and 99 % |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {NAMES[row['bytes']]} | {median(row, 'rdmaxfer'):.0f} | {median(row, 'perftest'):.0f} "
        f"| {ratio(row, 'rdmaxfer', 'perftest'):.1f} "
        f"| {median(row, 'timed', 'p50'):.0f}, {median(row, 'timed', 'p99'):.0f} "
        f"| {median(row, 'perftest', 'p50'):.0f}, {median(row, 'perftest', 'p99'):.0f} |"
        for row in rows
    ]
    return lines


ENGINES = {"dlslime": "DLSlime", "mooncake": "Mooncake", "nixl": "NIXL"}


def against(row: dict[str, Any], engine: str, figure: str) -> float | None:
    """The median of ours by an engine's, in the rounds that it got through."""
    both = [each["rdmaxfer"][figure] / each[engine][figure] for each in row["rounds"] if engine in each]
    return statistics.median(both) if both else None


def engines(rows: list[dict[str, Any]]) -> list[str]:
    titles = [f"{name}: MB/s, ours by it | µs, ours by it" for name in ENGINES.values()]
    lines = [f"| bytes | rdmaxfer: MB/s, µs | {' | '.join(titles)} |", "|---" * (2 + 2 * len(ENGINES)) + "|"]
    for row in rows:
        cells = [
            f"{statistics.median(each['rdmaxfer'][figure] for each in row['rounds']):.1f}" for figure in ("mb_s", "us")
        ]
        line = f"| {NAMES[row['bytes']]} | {', '.join(cells)} "
        for engine in ENGINES:
            for figure in ("mb_s", "us"):
                found = [each[engine][figure] for each in row["rounds"] if engine in each]
                times = against(row, engine, figure)
                line += f"| {statistics.median(found):.1f}, **{times:.2f}** " if times else "| - "
        lines.append(line + "|")
    return lines


def plot(path: Path, rows: list[dict[str, Any]], lat: list[dict[str, Any]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for axes, part, names, title in (
        (
            left,
            rows,
            (("rdmaxfer", OURS), ("batches", BATCHES), ("perftest", PERFTEST)),
            "throughput, MB/s (more is better)",
        ),
        (right, lat, (("rdmaxfer", OURS), ("perftest", PERFTEST)), "one way, µs (less is better)"),
    ):
        width = 0.8 / len(names)
        for index, (name, colour) in enumerate(names):
            at = [number + index * width for number in range(len(part))]
            bars = axes.bar(at, [median(row, name) for row in part], width, color=colour, label=LABELS[name])
            axes.bar_label(
                bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", fontsize=7, padding=1
            )
        axes.set_xticks(
            [number + 0.4 - width / 2 for number in range(len(part))], [NAMES[row["bytes"]] for row in part]
        )
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle("rdmaxfer and perftest on Soft-RoCE, one machine, medians of alternating rounds", fontsize=11)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130, metadata={"Date": None} if suffix == ".svg" else None)


LABELS = {"rdmaxfer": "push, recv", "batches": "push_many, recv_many", "perftest": "perftest"}


def pyzmq_ratio(row: dict[str, Any]) -> float:
    return statistics.median(a / b for a, b in zip(row["rdmaxfer"], row["pyzmq"], strict=True))


def pyzmq_lines(rows: list[dict[str, Any]]) -> list[str]:
    return ["| bytes | rdmaxfer over TCP, MB/s | pyzmq, MB/s | ratio |", "|---|---|---|---|"] + [
        f"| {NAMES[each['bytes']]} | {statistics.median(each['rdmaxfer']):.0f} | {statistics.median(each['pyzmq']):.0f} "
        f"| {pyzmq_ratio(each):.2f} |"
        for each in rows
    ]


def goal_row(figure: str, wanted: str, value: str, met: bool) -> str:
    return f"| {figure} | {wanted} | {value} | {'met' if met else '**not met**'} |"


def best_engine(rows: list[dict[str, Any]]) -> list[str]:
    """Our goals against the best of the engines, at each size."""
    faster = [
        min(found) for row in rows if (found := [x for e in ENGINES if (x := against(row, e, "mb_s")) is not None])
    ]
    slower = [max(found) for row in rows if (found := [x for e in ENGINES if (x := against(row, e, "us")) is not None])]
    if not faster:
        return []
    return [
        goal_row("best engine at any size: throughput, ours by its", "> 1", f"≥ {min(faster):.2f}", min(faster) > 1),
        goal_row("best engine at any size: one way, ours by its", "< 1", f"≤ {max(slower):.2f}", max(slower) < 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="directory with the measurements")
    parser.add_argument("docs", type=Path)
    args = parser.parse_args()
    perftest = json.loads((args.results / "perftest.json").read_text())
    handover = json.loads((args.results / "handover.json").read_text())
    spinning = json.loads((args.results / "spinning.json").read_text())
    pyzmq = json.loads((args.results / "pyzmq.json").read_text())
    figures = json.loads((args.results / "figures.json").read_text())
    here = {
        name: json.loads((args.results / f"host_{name}.json").read_text()) for name in ("figures", "handover", "pyzmq")
    }
    figures["import_ms"] = here["figures"]["import_ms"]
    peers_file = args.results / "peers.json"
    peers = json.loads(peers_file.read_text()) if peers_file.exists() else {"rows": [], "failed": {}}
    about = (args.results / "about.txt").read_text().strip().splitlines()
    rows = {kind: [row for row in perftest["rows"] if row["kind"] == kind] for kind in ("bw", "lat")}
    shared = [row for row in rows["bw"] if row["cpus"] == "shared"]
    split = [row for row in rows["bw"] if row["cpus"] == "split"]
    plot(args.docs / "performance", shared, rows["lat"])
    by_size = {row["bytes"]: row for row in shared}
    tcp = {row["bytes"]: pyzmq_ratio(row) for row in pyzmq}
    shm = {row["bytes"]: row for row in spinning if row["fabric"] == "shm"}

    def at(size: int, who: str = "rdmaxfer") -> float:
        return ratio(by_size[size], who, "perftest")

    row = goal_row

    eight = figures["eight_us"] / figures["one_us"]
    small = rows["lat"][0]
    goals = [
        row("1 MiB in place vs ib_write_bw", "≥ 0.97", f"{at(1 << 20):.2f}", at(1 << 20) >= 0.97),
        row("8 MiB in place vs ib_write_bw", "≥ 0.97", f"{at(8 << 20):.2f}", at(8 << 20) >= 0.97),
        row(
            "64 KiB vs ib_write_bw (in batches)",
            "≥ 0.95",
            f"{at(65536):.2f} ({at(65536, 'batches'):.2f})",
            at(65536) >= 0.95,
        ),
        row(
            "4 KiB frames a second vs ib_write_bw (in batches)",
            "≥ 0.80",
            f"{at(4096):.2f} ({at(4096, 'batches'):.2f})",
            at(4096) >= 0.8,
        ),
        row(
            "64 B one-way latency vs ib_write_lat",
            "≤ 1.5",
            f"{ratio(small, 'rdmaxfer', 'perftest'):.1f}",
            ratio(small, "rdmaxfer", "perftest") <= 1.5,
        ),
        *best_engine(peers["rows"]),
        row("user CPU a frame above perftest's", "≤ 2 µs", "the guest tells no user time; see below", False),
        row(
            "payload bytes copied per byte moved, in place (`statistics().copied`; else the run fails)", "0", "0", True
        ),
        row("8 receivers vs 1, sender time a frame", "≤ 8.4 times", f"{eight:.1f} times", eight <= 8.4),
        row(
            "handshake on one host, verbs",
            "≤ 20 ms",
            f"{figures['handshake_verbs_ms']:.0f} ms",
            figures["handshake_verbs_ms"] <= 20,
        ),
        row("tcp fabric vs raw pyzmq at 1 MiB", "≥ 0.9", f"{tcp[1 << 20]:.2f}", tcp[1 << 20] >= 0.9),
        row(
            "shm hand-off in place (`push`), 1 MiB and 64 MiB",
            "≤ 10 µs",
            f"{shm[1 << 20]['push_us']:.0f} and {shm[64 << 20]['push_us']:.0f} µs",
            max(shm[1 << 20]["push_us"], shm[64 << 20]["push_us"]) <= 10,
        ),
        row(
            "`import rdmaxfer` above numpy and zmq, on the machine itself",
            "≤ 60 ms",
            f"{figures['import_ms']:.0f} ms",
            figures["import_ms"] <= 60,
        ),
        row("a waiting receiver", "< 1 % of a core", f"{figures['idle_percent']:.1f} %", figures["idle_percent"] < 1),
    ]
    text = (Path(__file__).parent / "performance.in.md").read_text()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("rdmaxfer", "numpy", "pyzmq"))
    filled = {
        "DATE": time.strftime("%Y-%m-%d"),
        "ABOUT": "\n".join(f"- {line}" for line in [*about, f"Python {platform.python_version()}, {versions}"]),
        "GOALS": "\n".join(["| figure | goal | measured | |", "|---|---|---|---|", *goals]),
        "BANDWIDTH": "\n".join(bandwidth(shared + split)),
        "LATENCY": "\n".join(latency(rows["lat"])),
        "HANDOVER": "\n".join(
            [
                "| fabric | bytes | sleeping: one way, µs | of that, push | spinning: one way, µs | of that, push |",
                "|---|---|---|---|---|---|",
            ]
            + [
                f"| {a['fabric']} | {NAMES[a['bytes']]} | {a['one_way_us']:.0f} | {a['push_us']:.0f} | {b['one_way_us']:.0f} | {b['push_us']:.0f} |"
                for a, b in zip(handover, spinning, strict=True)
            ]
        ),
        "PYZMQ": "\n".join(pyzmq_lines(pyzmq)),
        "HOST_PYZMQ": "\n".join(pyzmq_lines(here["pyzmq"])),
        "HOST_HANDOVER": "\n".join(
            ["| fabric | bytes | one way, µs | of that, push |", "|---|---|---|---|"]
            + [
                f"| {each['fabric']} | {NAMES[each['bytes']]} | {each['one_way_us']:.0f} | {each['push_us']:.0f} |"
                for each in here["handover"]
            ]
        ),
        "HOST_HANDSHAKES": ", ".join(
            f"{fabric} {here['figures'][f'handshake_{fabric}_ms']:.1f} ms" for fabric in ("shm", "tcp")
        ),
        "ENGINES": "\n".join(engines(peers["rows"]))
        + "".join(f"\n\n{ENGINES[name]} failed {why}." for name, why in peers["failed"].items()),
        "PINNED": f"{figures['pinned_sender_mib']:.1f} MiB at the sender and {figures['pinned_receiver_mib']:.1f} MiB at the receiver",
        "CONNECTIONS": f"{figures['connections_1_mb_s']:.0f} MB/s from one process to one receiver, {figures['connections_4_mb_s']:.0f} MB/s from four",
        "ONE_EIGHT": f"{figures['one_us']:.0f} µs and {figures['eight_us']:.0f} µs",
        "HANDSHAKES": ", ".join(
            f"{fabric} {figures[f'handshake_{fabric}_ms']:.0f} ms" for fabric in ("verbs", "shm", "tcp")
        ),
    }
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    (args.docs / "performance.md").write_text(text)


if __name__ == "__main__":
    main()
