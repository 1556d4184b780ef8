"""Time what users wait for, beside the usual ways of doing it and beside what the machine could do at best.

    python bench.py step                      the optimizer's step, against plain PyTorch and geoopt
    python bench.py epoch                     an epoch over 2,560 PNG files of 32×32, against the usual loop over a DataLoader
    python bench.py sweep                     eight default runs: what checkpoints cost, and two jobs at a time
    python bench.py scale                     seconds per image of small and large sets, memory of short and long runs

All ways of a case take turns, in one process but for the usual loop and whole runs, and medians are printed, so that the ratios
hold on a machine that others use too. The limits are measured in the same run: the rate of a large matrix product and
that of a copy in memory. The table goes into benchmarks/ as well, as CSV, with machine, versions and date.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sphere_step
import train
from data import Data
from models import MODELS, convnet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parent


@dataclass
class Row:
    """A line of the table: median seconds; `limit`, the least that the machine could need, where one can say so."""

    case: str
    method: str
    seconds: float
    limit: float | None = None


def machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def interleaved(ways: dict[str, Callable], repetitions: int, warm: int = 1) -> dict[str, float]:
    """Median seconds of each way, all taking turns, after `warm` turns that do not count."""
    times = {name: [] for name in ways}
    for repetition in range(warm + repetitions):
        for name, way in ways.items():
            wait()
            began = time.perf_counter()
            way()
            wait()
            if repetition >= warm:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def limits() -> tuple[float, float, float]:
    """What the machine does at best, the fastest of nine in a row: floating-point operations per second in float32 and in
    bfloat16, of a large matrix product or of the same one as a convolution, whichever is faster (they can be of different
    libraries); bytes per second of a copy, read and written."""
    train.keep_memory()
    n = 8192 if DEVICE == "cuda" else 2048

    def rate(way: Callable, work: float) -> float:
        return work / min(interleaved({"": way}, 1)[""] for _ in range(9))

    best = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=DEVICE, dtype=dtype)
        image, weight = a.t().reshape(1, n, n // 32, 32), a.view(n, n, 1, 1)
        image, weight = (x.contiguous(memory_format=torch.channels_last) for x in (image, weight))
        best.append(
            max(
                rate(partial(torch.mm, a, a), 2 * n**3),
                rate(partial(F.conv2d, image, weight), 2 * n**3),
            )
        )
    source = torch.zeros(2**26, device=DEVICE)
    best.append(rate(partial(torch.zeros_like(source).copy_, source), 8 * len(source)))
    print(
        f"at best {best[0] / 1e9:,.0f} GFLOP/s in float32, {best[1] / 1e9:,.0f} in bfloat16; a copy: {best[2] / 1e9:,.1f} GB/s"
    )
    return tuple(best)


def report(what: str, rows: list[Row], baseline: str) -> None:
    """Print the table, with each method's speed as a multiple of the baseline's, and write it to benchmarks/."""
    print(f"\n{'':44}{'ms':>11}{'speed':>9}{'of the limit':>14}")
    for case in dict.fromkeys(row.case for row in rows):
        print(case)
        base = next(
            row.seconds for row in rows if row.case == case and row.method.startswith(baseline)
        )
        for row in (row for row in rows if row.case == case):
            limit = f"{row.limit / row.seconds:14.0%}" if row.limit else ""
            print(f"  {row.method:42}{row.seconds * 1e3:11.2f}{base / row.seconds:9.2f}{limit}")
    threads = torch.get_num_threads() if DEVICE == "cpu" else ""
    about = [
        machine(),
        threads,
        torch.__version__,
        getattr(sphere_step.triton, "__version__", ""),
        time.strftime("%Y-%m-%d"),
    ]
    name = "".join(
        c if c.isalnum() else "-"
        for c in f"{what} {machine()}" + f" {threads} threads" * bool(threads)
    )
    path = HERE / "benchmarks" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("case method seconds limit machine threads torch triton date".split())
        for row in rows:
            writer.writerow(
                [
                    row.case,
                    row.method,
                    f"{row.seconds:.6g}",
                    f"{row.limit:.6g}" if row.limit else "",
                    *about,
                ]
            )
    print(f"written: {path.relative_to(HERE)}")


def step(repetitions: int) -> None:
    """A step over the convolutions of ResNet-18. The limit: reading θ and g and writing θ, once, at the speed of a copy."""
    *_, copy = limits()
    rows = []
    for width in (16, 32, 64):
        shapes = sphere_step.resnet18_shapes(width)
        count = sum(np.prod(shape) for shape in shapes)
        for method, seconds in sphere_step.measure_steps(shapes, DEVICE, repetitions).items():
            case = f"ResNet-18 of width {width}, {count / 1e6:.1f} million parameters"
            rows.append(Row(case, method, seconds, 12 * count / copy))
    report("step", rows, "SGD, then norms")


def make_images(folder: Path, n: int, size: int = 32, classes: int = 10) -> None:
    """n random PNG images to train on and n / 10 to test on, in class folders."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", n), ("test", n // 10)):
        for i in range(count):
            path = folder / part / f"class{i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def usual_loop(
    pipe: Connection,
    folder: str,
    model: str,
    width: int,
    batch: int,
    mean: list[float],
    std: list[float],
) -> None:
    """In a process of its own, which manages memory as PyTorch does by itself: an epoch whenever the pipe says so."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    images = ImageFolder(
        f"{folder}/train",
        transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)]),
    )
    loader = torch.utils.data.DataLoader(
        images, batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    net = MODELS[model](3, len(images.classes), width).to(
        DEVICE, memory_format=torch.contiguous_format
    )
    optimizer = sphere_step.SphereSGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    while pipe.recv():
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.to(DEVICE)), y.to(DEVICE))
            loss.backward()
            optimizer.step()
            loss.item()
        wait()
        pipe.send(None)


def epoch(repetitions: int, n: int = 2560, batch: int = 128) -> None:
    """An epoch of train.py, and of the usual loop: a DataLoader with two workers that decodes and normalizes each image, the
    network and its memory as PyTorch has them, the loss asked for with .item() at each step. Same network and optimizer."""
    single, half, _ = limits()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), n)
        for model, width in (("convnet", 8), ("convnet", 32), ("resnet18", 8)):
            rows += epoch_of(
                folder, model, width, repetitions, n, batch, {"fp32": single, "bf16": half}
            )
    report("epoch", rows, "the usual loop")


def our_epoch(*options: str) -> tuple[Callable, Namespace, Data, nn.Module]:
    """An epoch of train.py with these options, and what it works on."""
    args, data = train.parse([*options, "--elr", "1e-3", "--force"])
    args.signals, order = [], torch.Generator()
    net, optimizer = train.build(args, data, 1e-3, 0)
    step = partial(train.step_on, args, data, net, optimizer, optimizer.step)
    step = train.Captured(step) if args.graph else step

    def run():
        steps = train.steps_of_epoch(args, data, order)
        train.train_epoch(args, net, steps, step, {"done": 0, "sums": 0, "layers": 0})

    return run, args, data, net


def flops(net: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a batch's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(x), torch.arange(len(x), device=x.device) % 10).backward()
    return counter.get_total_flops()


def epoch_of(
    folder: str,
    model: str,
    width: int,
    repetitions: int,
    n: int,
    batch: int,
    rates: dict[str, float],
) -> list[Row]:
    options = [
        "--data",
        folder,
        "--data-root",
        f"{folder}/cache",
        "--out",
        f"{folder}/out",
        "--batch-size",
        str(batch),
    ]
    options += ["--model", model, "--width", str(width)]
    ways, limit = {}, {}
    for graph in (False, True) if DEVICE == "cuda" else (False,):
        for dtype, rate in rates.items():
            way, args, data, net = our_epoch(*options, "--dtype", dtype, *["--graph"] * graph)
            x, y = data.images(torch.arange(batch, device=DEVICE)), data.y[:batch]

            def forward_backward(
                args: Namespace = args, net: nn.Module = net, x: Tensor = x, y: Tensor = y
            ) -> None:
                for _ in range(n // batch):
                    F.cross_entropy(train.logits_of(args, net, x), y).backward()

            name = f"train.py, {dtype}" + ", CUDA graph" * graph
            ways[name], limit[name] = way, flops(net, x) * (n // batch) / rate
            if not graph:
                name = f"  of which forward and backward, {dtype}"
                ways[name], limit[name] = forward_backward, flops(net, x) * (n // batch) / rate

    mean, std = ((m.flatten() / 255).tolist() for m in (data.mean, data.std))
    pipe, other_end = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=usual_loop, args=(other_end, folder, model, width, batch, mean, std)
    )
    child.start()
    other_end.close()  # ours: should the child die, recv ends in an error and does not wait
    name = "the usual loop: DataLoader, 2 workers, fp32"
    ways[name], limit[name] = lambda: (pipe.send(True), pipe.recv()), limit["train.py, fp32"]
    times = interleaved(ways, repetitions)
    pipe.send(False)
    child.join()
    return [
        Row(f"{model} of width {width}, {n} images, batch {batch}", name, times[name], limit[name])
        for name in ways
    ]


def run(*options: str) -> tuple[float, float]:
    """Seconds that train.py takes with these options, and its largest memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *options], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench.py: error: train.py {' '.join(options)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def sweep(repetitions: int) -> None:
    """Eight runs of the default task: one after the other with a checkpoint after every epoch and with one at the end, and two
    at a time with half of the threads each. The limit: their multiplications at the rate of a large matrix product."""
    single, *_ = limits()
    limit = 8 * 21 * 89 * flops(convnet(1, 10), torch.randn(16, 1, 8, 8)) / single
    elrs = [
        "--elr",
        *"1e-4 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1".split(),
        "--epochs",
        "20",
        "--force",
    ]
    more = {
        "one job": [],
        "one job, a checkpoint at the end only": ["--checkpoint-every", "1000"],
        "two jobs": ["--jobs", "2"],
    }
    with tempfile.TemporaryDirectory() as out:
        times = interleaved(
            {name: partial(run, *elrs, "--out", out, *x) for name, x in more.items()},
            repetitions,
            warm=0,
        )
    rows = [
        Row("eight runs of 20 epochs: digits, convnet of width 8", name, s, limit)
        for name, s in times.items()
    ]
    report("sweep", rows, "one job")


def scale(repetitions: int) -> None:
    """Does an epoch take time in proportion to the images, and does memory stay flat however long a run is?"""
    rows, sizes = [], (1000, 2000, 4000, 8000)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), sizes[-1])
        options = [
            "--data",
            folder,
            "--data-root",
            f"{folder}/cache",
            "--batch-size",
            "125",
            "--out",
            f"{folder}/out",
        ]
        ways = {f"{n} images": our_epoch(*options, "--train-size", str(n))[0] for n in sizes}
        times = interleaved(ways, repetitions)
        for n, (name, seconds) in zip(sizes, times.items(), strict=True):
            rows.append(
                Row(
                    "an epoch, per 1,000 images of 32×32: convnet of width 8",
                    name,
                    seconds * 1000 / n,
                )
            )
        memory = {
            epochs: run("--elr", "0.01", "--epochs", str(epochs), "--out", folder, "--force")[1]
            for epochs in (30, 300)
        }
    report("scale", rows, "1000 images")
    print(
        f"largest memory of a run of 30 epochs: {memory[30]:.0f} MiB, of 300 epochs: {memory[300]:.0f} MiB"
    )


def main() -> int:
    text = "Time what users wait for, beside the usual ways of doing it and beside what the machine could do at best."
    parser = argparse.ArgumentParser(
        prog="bench.py", description=text, epilog="example: python bench.py epoch --repetitions 9"
    )
    text = "the optimizer's step; an epoch; eight default runs; how time grows with the set and memory with the epochs"
    parser.add_argument("what", choices=("step", "epoch", "sweep", "scale"), help=text)
    parser.add_argument(
        "--repetitions",
        type=int,
        default=5,
        metavar="N",
        help="medians are over so many (default: %(default)s)",
    )
    args = parser.parse_args()
    threads = f", {torch.get_num_threads()} threads" if DEVICE == "cpu" else ""
    print(f"on {machine()}{threads}, torch {torch.__version__}; medians of {args.repetitions}")
    {"step": step, "epoch": epoch, "sweep": sweep, "scale": scale}[args.what](args.repetitions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
