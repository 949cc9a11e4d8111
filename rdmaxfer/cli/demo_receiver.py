"""The receiving process of `rdmaxfer demo`: `python -m rdmaxfer.cli.demo_receiver WISHES`.

WISHES is JSON, and so are the two lines that it prints: where it listens, and what it received. It stays until its
input ends, so that the sender may say goodbye first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import rdmaxfer
from rdmaxfer.cli.digest import check
from rdmaxfer.cli.failure import report

PATIENCE_S = 300.0


def receive(wishes: dict[str, Any]) -> None:
    """Take `count` frames with hashes and as many without; say how many were right."""
    right, distinct, saved = 0, set(), ""
    with rdmaxfer.Receiver(**wishes["arguments"]) as receiver:
        print(json.dumps({"endpoint": receiver.bind(f"tcp://{wishes['host']}:*")}), flush=True)
        for number in range(2 * wishes["count"]):
            with receiver.recv(timeout=PATIENCE_S) as frame:
                if number >= wishes["count"]:
                    continue
                if frame.metadata.get("index") == number and not check(frame.array, frame.metadata):
                    right += 1
                distinct.add(frame.metadata.get(wishes["algorithm"]))
                if number == 0:
                    saved = _save(frame.array, wishes["save"])
        state = receiver.statistics()
        result = {
            "frames": state.frames,
            "right": right,
            "distinct": len(distinct),
            "writes": state.writes,
            "saved": saved,
            "pid": os.getpid(),
        }
        print(json.dumps(result), flush=True)
        sys.stdin.read()


def _save(array: Any, path: str) -> str:
    from PIL import Image

    Image.fromarray(array).save(path)
    return path


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="rdmaxfer (receiving): %(message)s")
    try:
        receive(json.loads(sys.argv[1]))
        return 0
    except KeyboardInterrupt:  # the sending process gets it too, and says so
        return 130
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
