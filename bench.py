"""Time what users wait for, beside the usual ways and what the machine could do at best.

    python bench.py step           the optimizer's step: checked against float64, then timed
    python bench.py iteration      an iteration of the default run, and what it is made of
    python bench.py epoch          an epoch over 2,560 images, against a loop over a DataLoader
    python bench.py sweep          the default sweep and four short runs: default jobs, one job

All ways of a case take turns, and medians are printed: ratios hold on a shared machine. The limits,
rates of a matrix product and of a copy, are of the same run. The table goes to benchmarks/.
"""

import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import measure
import regimes
import train
from data import load
from models import MODELS, convnet
from options import parse
from runs import number
from speed import flops, keep_memory
from sphere_step import SphereSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parent
IMAGES, BATCH = 2560, 128  # of an epoch


# Median seconds of a method; limit: the least that the machine could need.
Row = namedtuple("Row", "case method seconds limit", defaults=[None])


def machine():
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def interleaved(ways, repetitions, warm=1):
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


def limits():
    """The best of nine tries: floating-point operations per second of a matrix product in float32
    and bfloat16, bytes per second of a copy."""
    keep_memory()
    n = 8192 if DEVICE == "cuda" else 2048

    def rate(way, work):
        return work / min(interleaved({"": way}, 1)[""] for _ in range(9))

    best = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=DEVICE, dtype=dtype)
        best.append(rate(partial(torch.mm, a, a), 2 * n**3))
    source = torch.zeros(2**26, device=DEVICE)
    best.append(rate(partial(torch.zeros_like(source).copy_, source), 8 * len(source)))
    print(f"at best {best[0] / 1e9:,.0f} GFLOP/s in float32, {best[1] / 1e9:,.0f} in bfloat16, "
          f"a copy {best[2] / 1e9:,.1f} GB/s")  # fmt: skip
    return tuple(best)


def report(what, rows, baseline):
    """Print and write the table, each method's speed as a multiple of the baseline's."""
    print(f"\n{'':48}{'ms':>11}{'speed':>9}{'of the limit':>14}")
    for case in dict.fromkeys(row.case for row in rows):
        print(case)
        of_case = [row for row in rows if row.case == case]
        base = next(row.seconds for row in of_case if row.method.startswith(baseline))
        for row in of_case:
            limit = f"{row.limit / row.seconds:14.0%}" if row.limit else ""
            print(f"  {row.method:46}{row.seconds * 1e3:11.3f}{base / row.seconds:9.2f}{limit}")
    about = {"machine": machine(), "cores": os.cpu_count() if DEVICE == "cpu" else ""}
    about |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    name = "".join(c if c.isalnum() else "-" for c in f"{what} {machine()}")
    path = HERE / "benchmarks" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    regimes.write_csv(path, [row._asdict() | about for row in rows])
    print(f"written: {path.relative_to(HERE)}")


def check(cases=30):
    """The largest relative error of a step against the formula in float64."""
    worst = 0.0
    for case in range(cases):
        sphere = ("group", "tensor", "row")[case % 3]
        shapes = torch.randint(1, 200, (int(torch.randint(1, 12, ())), 2)).tolist()
        tensors = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
        for p in tensors:
            p.grad = torch.randn_like(p) + 0.3 * p.detach()
        before = [(p.detach().double().cpu(), p.grad.double().cpu()) for p in tensors]
        before = spheres_of(before, sphere)
        elr = 1 / max((x.norm() * g.norm()).item() for x, g in before)
        SphereSGD(tensors, lr=elr, sphere=sphere).step()
        after = spheres_of([(p.detach().double().cpu(),) for p in tensors], sphere)
        for (x, g), (new,) in zip(before, after, strict=True):
            v = x - elr * x.norm() ** 2 * (g - (x * g).sum() / (x * x).sum() * x)
            worst = max(worst, ((new - x.norm() * v / v.norm()).norm() / x.norm()).item())
    return worst


def spheres_of(tensors, sphere):
    if sphere == "group":
        return [tuple(torch.cat([x.flatten() for x in xs]) for xs in zip(*tensors, strict=True))]
    if sphere == "row":
        return [row for xs in tensors for row in zip(*xs, strict=True)]
    return tensors


def step(repetitions):
    """A step over our networks' convolutions. The limit: to read θ and g and write θ once, at the
    speed of a copy."""
    worst = check()
    print(f"largest relative error against float64 in 30 random cases: {worst:.1e}")
    if worst > 1e-6:
        raise SystemExit("bench.py: error: the step is wrong")
    *_, copy = limits()
    rows = []
    for model, width in (("convnet", 8), ("resnet18", 16), ("resnet18", 32), ("resnet18", 64)):
        net = MODELS[model](3, 10, width)
        shapes = [p.shape for p in net.parameters() if p.requires_grad]
        count = sum(math.prod(shape) for shape in shapes)
        case = f"{model} of width {width}: {count / 1e6:.2f} million parameters"
        for method, seconds in step_of(shapes, repetitions if width > 32 else 40 * repetitions):
            rows.append(Row(case, method, seconds, 12 * count / copy))
    report("step", rows, "SGD, then norms")


def step_of(shapes, repetitions):
    elr = 1e-9  # so small that the weights stay what they are, however often
    params = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    plain, norms = torch.optim.SGD(params, lr=elr), [p.detach().norm().item() for p in params]

    def usual():
        plain.step()
        with torch.no_grad():
            for p, norm in zip(params, norms, strict=True):
                p.mul_(norm / p.norm().item())

    ways = {"SphereSGD, joint sphere": SphereSGD(params, lr=elr).step}
    ways["SphereSGD, a sphere per tensor"] = SphereSGD(params, elr, "tensor").step
    ways["SphereSGD, momentum 0.9"] = SphereSGD(params, elr, momentum=0.9).step
    if DEVICE == "cuda":
        ways["the same in PyTorch"] = SphereSGD(params, elr, backend="torch").step
    ways["SGD, then norms and scaling"] = usual
    with suppress(ImportError):
        import geoopt

        flat = [p.detach().view(-1) for p in params]  # its sphere is over the last dimension
        balls = [geoopt.ManifoldParameter(x / x.norm(), manifold=geoopt.Sphere()) for x in flat]
        for ball, p in zip(balls, params, strict=True):
            ball.grad = p.grad.view(-1)
        ways["geoopt RiemannianSGD, Sphere"] = geoopt.optim.RiemannianSGD(balls, lr=elr).step
    ways["plain SGD, fused"] = torch.optim.SGD(params, lr=elr, fused=True).step
    return list(interleaved(ways, repetitions, warm=3).items())


def our_run(*options):
    parsed, data = parse([*options, "--elr", "1e-3", "--force"])
    run = train.Run(parsed, data, train.Job(1e-3, 0, Path(), ""))
    run.epoch, run.epochs = 0, 1
    return run


def iteration(repetitions):
    """An iteration of a default run, its passes, and its step."""
    rows = []
    for name, options in (("digits, convnet of width 8", []), ("modular", ["--data", "modular"])):
        with tempfile.TemporaryDirectory() as out:
            run = our_run(*options, "--out", out)
        index = torch.arange(run.options.batch_size)
        x, y = run.data.inputs(index), run.data.y[index]

        def passes(run=run, x=x, y=y):
            run.net.zero_grad()
            F.cross_entropy(run.net(x), y).backward()

        ways = {"forward and backward": passes, "iteration": partial(run.step, index)}
        ways["step of SphereSGD"] = run.sphere.step
        times = interleaved(ways, 400 * repetitions, warm=50)
        kept = [run.step(index) for _ in range(89)]
        began = time.perf_counter()
        measure.of_steps(kept, run.sphere, None)
        times["statistics, at the end of the epoch"] = (time.perf_counter() - began) / 89
        rows += [Row(name, method, seconds) for method, seconds in times.items()]
    report("iteration", rows, "forward and backward")


def usual_loop(pipe, file, net, threads):
    """In a process of its own, with memory as PyTorch has it: an epoch whenever asked."""
    torch.set_num_threads(threads)
    data, (model, width) = load(file), net
    images = torch.utils.data.TensorDataset(data.normalized(data.x), data.y)
    more = dict(shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    loader = torch.utils.data.DataLoader(images, BATCH, **more)
    net = MODELS[model](3, data.classes, width)
    net = net.to(DEVICE, memory_format=torch.contiguous_format)
    optimizer = SphereSGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    while pipe.recv():
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.to(DEVICE)), y.to(DEVICE))
            loss.backward()
            optimizer.step()
            loss.item()
        wait()
        pipe.send(None)


def epoch(repetitions):
    """An epoch of train.py, and of the usual loop: a DataLoader with two workers, .item() each
    step. Same network and optimizer."""
    rates = dict(zip(("fp32", "bf16"), limits(), strict=False))
    rows, generator = [], np.random.default_rng(0)
    x = generator.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    y = generator.integers(0, 10, IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", x=x, y=y, test_x=x[:256], test_y=y[:256])
        for net in (("convnet", 8), ("convnet", 32), ("resnet18", 8)):
            case = f"{net[0]} of width {net[1]}, {IMAGES} images, batch {BATCH}"
            rows += [Row(case, *row) for row in epoch_of(folder, net, repetitions, rates)]
    report("epoch", rows, "the usual loop")


def epoch_of(folder, net, repetitions, rates):
    options = ["--data", f"{folder}/images.npz", "--out", f"{folder}/out"]
    options += ["--batch-size", str(BATCH), "--model", net[0], "--width", str(net[1])]
    ways, limit, index = {}, {}, torch.arange(BATCH, device=DEVICE)
    for dtype, graph in product(rates, ([], ["--graph"]) if DEVICE == "cuda" else ([],)):
        run = our_run(*options, "--dtype", dtype, *graph)
        x, y = run.data.inputs(index), run.data.y[index]

        def passes(run=run, x=x, y=y):
            for _ in range(IMAGES // BATCH):
                F.cross_entropy(measure.logits_of(run.net, x, run.options.dtype), y).backward()

        name = f"{dtype}, CUDA graph" if graph else dtype
        least = flops(run.net, x) * (IMAGES // BATCH) / rates[dtype]
        for way, what in ((run.train_epoch, "train.py"), (passes, "  of which both passes")):
            ways[f"{what}, {name}"], limit[f"{what}, {name}"] = way, least
    pipe, other_end = multiprocessing.Pipe()
    arguments = (other_end, f"{folder}/images.npz", net, run.options.threads)
    child = multiprocessing.get_context("spawn").Process(target=usual_loop, args=arguments)
    child.start()
    other_end.close()  # should the child die, recv ends in an error and does not wait

    def usual():
        pipe.send(True)
        pipe.recv()

    ways["the usual loop: DataLoader, 2 workers, fp32"] = usual
    times = interleaved(ways, repetitions)
    pipe.send(False)
    child.join()
    return [(name, times[name], limit.get(name, limit["train.py, fp32"])) for name in ways]


def run_train(*options):
    command = [sys.executable, HERE / "train.py", *options]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def sweep(repetitions):
    """The default sweep and four runs of 8 epochs, as a user types them, and with one job. The
    limit: their operations at the rate of a large matrix product."""
    single, *_ = limits()
    of_run = 20 * 89 * flops(convnet(1, 10), torch.randn(16, 1, 8, 8)) / single
    short = ["--elr", "1e-3", "3e-3", "1e-2", "3e-2", "--epochs", "8"]
    rows = []
    with tempfile.TemporaryDirectory() as out:
        for case, options, runs in (
            ("--sweep: 13 runs of 20 epochs", ["--sweep"], 13),
            ("4 runs of 8 epochs", short, 1.6),
        ):
            more = ["--out", out, "--force"]
            ways = {"one job": partial(run_train, *options, *more, "--jobs", "1", "--threads", "1")}
            ways["default jobs"] = partial(run_train, *options, *more)
            times = interleaved(ways, repetitions, warm=0)
            rows += [Row(case, name, s, runs * of_run) for name, s in times.items()]
    report("sweep", rows, "one job")


def main():
    text = "Time what users wait for, beside the usual ways and the limits of the machine."
    parser = regimes.Parser(prog="bench.py", description=text)
    ways = dict(step=step, iteration=iteration, epoch=epoch, sweep=sweep)
    parser.add_argument("what", choices=tuple(ways), help="what to time")
    text = "medians are over so many (default: %(default)s)"
    how = dict(type=number(int, 0, 10**6), default=5, metavar="N")
    parser.add_argument("--repetitions", **how, help=text)
    args = parser.parse_args()
    print(f"on {machine()}, torch {torch.__version__}; medians of {args.repetitions}")
    ways[args.what](args.repetitions)
    return 0


if __name__ == "__main__":
    regimes.finish(main)
