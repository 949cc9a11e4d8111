"""One process receives a stream; others on that machine read the same memory, each as long as it needs."""

import argparse
import multiprocessing

import numpy as np

import rdmaxfer

NAME = "example-camera"


def read(
    number: int, ready: "multiprocessing.Queue[int]", results: "multiprocessing.Queue[tuple[int, int, int]]"
) -> None:
    frames, total = 0, 0
    with rdmaxfer.attach(NAME) as reader:
        ready.put(number)
        for frame in reader:
            with frame:  # it lies where the receiving process has it: nothing was copied
                total += int(frame.array[0, 0])
            frames += 1
    results.put((number, frames, total))


def main(readers: int, count: int) -> None:
    context = multiprocessing.get_context("spawn")
    ready, results = context.Queue(), context.Queue()
    with rdmaxfer.Receiver(share=NAME) as receiver, rdmaxfer.Sender() as sender:  # usually on another machine
        sender.connect(receiver.bind("tcp://127.0.0.1:*"))
        processes = [context.Process(target=read, args=(number, ready, results)) for number in range(readers)]
        for process in processes:
            process.start()
        for _ in processes:
            ready.get(timeout=60)
        for number in range(count):
            sender.push(np.full((512, 512), number, np.uint16))
            with receiver.recv() as frame:  # which hands it to the readers, too
                assert frame.array[0, 0] == number
        sender.flush()  # until this process and all readers have released all frames
    for _ in processes:
        number, frames, total = results.get(timeout=60)
        print(f"reader {number} saw {frames} frames, the right ones: {total == sum(range(count))}")
    for process in processes:
        process.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    main(args.readers, args.count)
