"""Time what users wait for, beside the usual way of doing it, interleaved in one process.

    python bench.py epoch                     an epoch over 2,560 PNG files of 32×32, against torchvision's DataLoader
    python bench.py sweep                     eight default runs: what checkpoints cost, and two jobs at a time

The step alone: `python sphere_step.py`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import batches, load
from models import convnet
from sphere_step import SphereSGD


def make_images(folder: Path, n: int, size: int = 32, classes: int = 10) -> None:
    """n random PNG images to train on and n / 10 to test on, in class folders."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", n), ("test", n // 10)):
        for i in range(count):
            path = folder / part / f"class{i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def epoch(repetitions: int, width: int, n: int = 2560, batch: int = 128) -> None:
    """Seconds of an epoch: the same network, batches and step, fed by data.py, and by a DataLoader with two workers that decodes
    and normalizes each image (the usual loop, which also asks for the loss with .item() at each step)."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), n)
        began = time.perf_counter()
        data = load(folder, Path(folder) / "cache", device=device)
        reading = time.perf_counter() - began
        mean, std = ((m.flatten() / 255).tolist() for m in (data.mean, data.std))
        images = ImageFolder(f"{folder}/train", transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)]))
        options = dict(batch_size=batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
        loader = torch.utils.data.DataLoader(images, **options)
        order = torch.Generator().manual_seed(0)

        def ours():
            for index in batches(len(data.x), batch, order, device):
                yield data.images(index), data.y[index]

        def usual():
            for x, y in loader:
                yield x.to(device), y.to(device)

        def run(net, optimizer, feed, ask):
            for x, y in feed():
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                if ask:
                    loss.item()
            if device == "cuda":
                torch.cuda.synchronize()

        ways = {}
        for name, feed, ask in (("data.py", ours, False), ("DataLoader, 2 workers", usual, True)):
            net = convnet(3, 10, width).to(device)
            optimizer = SphereSGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
            ways[name] = (net, optimizer, feed, ask), []
        for repetition in range(repetitions + 1):
            for way, times in ways.values():
                began = time.perf_counter()
                run(*way)
                if repetition:  # the first ones start the workers and warm up
                    times.append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, (_, times) in ways.items()}
    machine = torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    print(f"an epoch of {n} images of 32×32, convnet of width {width}, on {machine}; median of {repetitions}")
    for name, seconds in medians.items():
        print(f"{name:24}{seconds:8.2f} s  ×{seconds / medians['data.py']:.2f}")
    print(f"reading the files once, before the first epoch: {reading:.2f} s")


def sweep(repetitions: int) -> None:
    """Seconds of eight runs of the default task: one after the other with a checkpoint after every epoch and with one at the end,
    and two at a time with half of the threads each."""
    ways = {"a checkpoint every epoch": [], "one at the end": ["--checkpoint-every", "1000"], "two jobs": ["--jobs", "2"]}
    times = {name: [] for name in ways}
    script = Path(__file__).with_name("train.py")
    elrs = ["--elr", *"1e-4 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1".split()]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repetitions):
            for name, more in ways.items():
                command = [sys.executable, script, *elrs, "--epochs", "20", "--out", folder, "--force", *more]
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"eight runs of 20 epochs, digits, convnet of width 8, on {torch.get_num_threads()} threads; median of {repetitions}")
    for name, seconds in medians.items():
        print(f"{name:28}{seconds:8.2f} s  ×{seconds / medians['one at the end']:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description="Time what users wait for, beside the usual way.")
    parser.add_argument("what", choices=("epoch", "sweep"))
    parser.add_argument("--width", type=int, default=32, help="epoch: of the convnet (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="medians are over this many (default: %(default)s)")
    args = parser.parse_args()
    epoch(args.repetitions, args.width) if args.what == "epoch" else sweep(args.repetitions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
