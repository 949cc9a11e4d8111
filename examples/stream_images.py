"""Images from one machine to another.

there$  python stream_images.py receive tcp://0.0.0.0:7471
here$   python stream_images.py send tcp://THERE:7471
"""

import argparse
import time

import numpy as np

import rdmaxfer


def picture(number: int) -> np.ndarray:
    """Stands for a camera: a gradient that moves."""
    y, x = np.mgrid[:480, :640]
    return np.stack([(x + 4 * number) % 256, y % 256, (x + y) // 5 % 256], axis=2).astype(np.uint8)


def send(endpoint: str, count: int) -> None:
    with rdmaxfer.Sender() as sender:
        sender.connect(endpoint)
        print(f"connected over {sender.links()[0].fabric}")
        for number in range(count):
            metadata = {"pixel_format": "RGB8", "last": number == count - 1}
            sender.push(picture(number), metadata=metadata, captured_ns=time.time_ns())
        sender.flush()  # until the receiver is done with all of them
        print(f"sent {count} images")


def receive(endpoint: str) -> None:
    with rdmaxfer.Receiver() as receiver:
        print(f"listening at {receiver.bind(endpoint)}", flush=True)
        for frame in receiver:
            with frame:  # the frame is ours until the end of this block
                brightness = frame.array.mean()
                last = frame.metadata["last"]
                print(f"image {frame.seq} of {frame.timestamp}: {frame.shape}, brightness {brightness:.1f}")
            if last:
                break
        latency = receiver.statistics().push_to_recv
        if latency is not None:
            print(f"from push to recv: median {latency.median_s * 1e3:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["send", "receive"])
    parser.add_argument("endpoint")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    if args.what == "send":
        send(args.endpoint, args.count)
    else:
        receive(args.endpoint)
