"""A detector at a fixed rate, which is never held up: what a slow reader misses is dropped, counted and told."""

import argparse
import multiprocessing
import time

import numpy as np

import rdmaxfer

SHAPE, DTYPE = (512, 512), np.uint16


def detect(endpoint: str, rate: float, seconds: float) -> None:
    """The detector: fills registered memory in place, so that nothing is copied."""
    with rdmaxfer.Sender(slots=32) as sender:
        sender.connect(endpoint, when_full="drop_oldest")
        begun_s = time.monotonic()
        for number in range(int(rate * seconds)):
            time.sleep(max(0.0, begun_s + number / rate - time.monotonic()))
            with sender.reserve(SHAPE, DTYPE, metadata={"pulse": number}) as slot:
                slot.array[:] = number % 4096
                slot.captured_ns = time.time_ns()
        sender.flush()
        print(f"detector: {sender.statistics().frames} frames, {sender.statistics().dropped} dropped")


def main(rate: float, seconds: float, plot: str) -> None:
    latencies_ms = []
    with rdmaxfer.Receiver(slots=32) as receiver:
        endpoint = receiver.bind("tcp://127.0.0.1:*")
        detector = multiprocessing.get_context("spawn").Process(target=detect, args=(endpoint, rate, seconds))
        detector.start()
        missed = 0
        while True:
            try:
                frame = receiver.recv(timeout=0.5 if latencies_ms else 60)
            except rdmaxfer.TimeoutExpired:
                break
            with frame:
                latencies_ms.append((time.time_ns() - frame.captured_ns) / 1e6)
                missed += frame.gap.count if frame.gap else 0
        detector.join()
    low, middle, high = np.percentile(latencies_ms, [50, 90, 99])
    print(f"received {len(latencies_ms)} frames, missed {missed}")
    print(f"from capture to here: median {low:.2f} ms, 90 % {middle:.2f} ms, 99 % {high:.2f} ms")
    if plot:
        save_plot(plot, latencies_ms)


def save_plot(path: str, latencies_ms: list[float]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3))
    axes.plot(latencies_ms, ".", markersize=2)
    axes.set(xlabel="frame", ylabel="ms from capture", yscale="log")
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=500.0, help="frames a second")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--plot", default="", help="save a plot of all latencies there (needs matplotlib)")
    args = parser.parse_args()
    main(args.rate, args.seconds, args.plot)
