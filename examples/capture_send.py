"""Sends what a program in C or C++ (capture.c, capture.cpp) captures: it fills frames in memory of this process. Nothing is copied.

python capture_send.py tcp://0.0.0.0:7471
"""

from __future__ import annotations

import argparse
import signal

import rdmaxfer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", help="where receivers connect to, such as tcp://0.0.0.0:7471")
    parser.add_argument("--name", default="camera", help="by which the program attaches (camera)")
    args = parser.parse_args()
    with rdmaxfer.Sender() as sender:
        print("receivers connect to", sender.bind(args.endpoint), flush=True)
        with sender.intake(args.name, slots=16, slot_bytes=640 * 480 * 2) as intake:
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        print(f"sent {intake.frames} frames, copied {sender.statistics().copied}")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
