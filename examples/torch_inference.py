"""A network of PyTorch on frames where they lie, and its results back by a second stream."""

import argparse
import multiprocessing

import numpy as np

import rdmaxfer


def infer(images_at: str, results_at: str) -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    ).eval()
    with rdmaxfer.Receiver() as images, rdmaxfer.Sender() as results, torch.inference_mode():
        images.connect(images_at)
        results.connect(results_at)
        for frame in images:
            with frame:
                tensor = torch.from_dlpack(frame)  # the slot itself: nothing is copied
                scores = network(tensor.permute(2, 0, 1)[None].float() / 255)
                del tensor
            results.push(scores[0], metadata={"image": frame.seq})
        results.flush()


def main(count: int) -> None:
    context = multiprocessing.get_context("spawn")
    with rdmaxfer.Receiver() as results:
        results_at = results.bind("tcp://127.0.0.1:*")
        with rdmaxfer.Sender() as images:
            images_at = images.bind("tcp://127.0.0.1:*")
            network = context.Process(target=infer, args=(images_at, results_at))
            network.start()
            images.wait_for_peers(1, timeout=60)
            for number in range(count):
                images.push(np.random.default_rng(number).integers(0, 256, (240, 320, 3), np.uint8))
                with results.recv(timeout=60) as scores:
                    print(f"image {scores.metadata['image']}: class {scores.array.argmax()}, {scores.array.round(3)}")
        network.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    main(parser.parse_args().count)
