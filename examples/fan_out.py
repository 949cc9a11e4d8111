"""Frames spread over worker processes: each goes to the worker that has the most room."""

import argparse
import multiprocessing
import time

import numpy as np

import rdmaxfer


def work(number: int, endpoint: str, seconds_each: float, results: "multiprocessing.Queue[tuple[int, int]]") -> None:
    frames = 0
    with rdmaxfer.Receiver(slots=4) as receiver:
        receiver.connect(endpoint)
        for frame in receiver:  # until the sender says goodbye
            with frame:
                frame.array.sum()
                time.sleep(seconds_each)  # stands for work
            frames += 1
    results.put((number, frames))


def main(workers: int, count: int) -> None:
    # Not "fork": RDMA devices can't be shared with a forked child.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with rdmaxfer.Sender(distribute="balance", slots=4) as sender:
        endpoint = sender.bind("tcp://127.0.0.1:*")
        processes = [
            # The last worker takes three times as long for each frame, and so gets fewer.
            context.Process(target=work, args=(number, endpoint, 0.003 if number == workers - 1 else 0.001, results))
            for number in range(workers)
        ]
        for process in processes:
            process.start()
        sender.wait_for_peers(workers, timeout=60)
        for number in range(count):
            sender.push(np.full((256, 256), number, np.uint16))
        sender.flush()
    taken = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    for number, frames in sorted(taken.items()):
        print(f"worker {number} took {frames} frames")
    print(f"all together: {sum(taken.values())} of {count}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args()
    main(args.workers, args.count)
