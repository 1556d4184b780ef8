"""Time what users wait for, beside the usual ways and what the machine could do at best.

    python bench.py check          is this machine right? the step, gradients, the GPU
    python bench.py step           the optimizer's step: checked against float64, then timed
    python bench.py iteration      an iteration of the default run, and what it is made of
    python bench.py epoch          an epoch over 2,560 images, against a loop over a DataLoader
    python bench.py sweep          the default sweep: default jobs, one job

All ways of a case take turns, and medians are printed: ratios hold on a shared machine. The limits,
rates of a matrix product and of a copy, are of the same run. The table goes to benchmarks/.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import measure
import regimes
import train
from models import MODELS, convnet
from options import parse
from runs import number
from speed import bf16_slowness, cores, flops, keep_memory, machine, use
from sphere_step import INTERPRET, SphereSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parent
IMAGES, BATCH = 2560, 128  # of an epoch
# What a step may be wrong by, relative to ρ. In half precision each weight is rounded once.
STEP_ERRORS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SPHERES = ("group", "tensor", "row")


# Median seconds of a method; limit: the least that the machine could need.
Row = namedtuple("Row", "case method seconds limit", defaults=[None])


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

    def rate(way, work):
        return work / min(interleaved({"": way}, 1)[""] for _ in range(9))

    best = []
    for dtype in (torch.float32, torch.bfloat16):
        n = 8192 if DEVICE == "cuda" else 2048
        if DEVICE == "cpu" and dtype == torch.bfloat16 and bf16_slowness() > 4:
            n = 256  # 2048 would take minutes
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
    about = {"machine": machine(DEVICE), "cores": cores() if DEVICE == "cpu" else ""}
    about |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    name = "".join(c if c.isalnum() else "-" for c in f"{what} {machine(DEVICE)}")
    path = HERE / "benchmarks" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    regimes.write_csv(path, [row._asdict() | about for row in rows])
    print(f"written: {path.relative_to(HERE)}")


def checks():
    """What is checked, by name: the function that returns its error, and what is allowed."""
    found = {"product of matrices in float32": (product_error, 1e-5)}
    kernels = ["triton"] if DEVICE == "cuda" or INTERPRET else []
    for backend, sphere, dtype in product(["torch", *kernels], SPHERES, STEP_ERRORS):
        if backend == "torch" or dtype != torch.float64:
            name = f"step, {backend}, sphere {sphere}, {str(dtype)[6:]}"
            found[name] = partial(step_error, sphere, dtype, backend), STEP_ERRORS[dtype]
    for threads in (1, 2) if DEVICE == "cpu" else (1,):
        name = f"gradients of all convolutions of widths 1 to 16, threads: {threads}"
        found[name] = partial(convolution_error, threads), 1e-5
    for model, dtype in product(MODELS, ("fp32", "bf16")):
        name = f"gradients along the weights, {model}, {dtype}"
        found[name] = partial(largest_share, model, dtype), measure.ROUNDING[dtype]
    if DEVICE == "cuda":
        last = f"cuda:{torch.cuda.device_count() - 1}"
        on_last = partial(step_error, "group", torch.float32, "triton", last)
        found[f"step, triton, on {last}"] = on_last, 1e-6
        found["launches of a step"] = launches, 3
        found["CUDA graph against eager steps"] = graph_error, 1e-4
    return found


def check(found):
    """Is this machine right? A line per check with its error. Returns 1 if one is wrong."""
    use(DEVICE)
    wrong = 0
    for name, (error_of, most) in found.items():
        print(f"{name:60}", end="", flush=True)  # should it crash, one sees where
        error = error_of()
        right = error <= most  # not if it is nan
        wrong += not right
        print(f"{error:9.2g}, at most {most:<6.2g} {'ok' if right else 'WRONG'}", flush=True)
    print(f"{wrong} of {len(found)} are WRONG" if wrong else f"all {len(found)} are right")
    return 1 if wrong else 0


def product_error():
    a, b = torch.randn(2, 300, 300, device=DEVICE)
    return relative(a @ b, a.double() @ b.double())


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def step_error(sphere, dtype, backend, device=DEVICE):
    """The largest relative error of a step against the formula in float64, in six random cases:
    with and without momentum, at an ELR and at an angle."""
    worst = 0.0
    for case in range(6):
        shapes = torch.randint(8, 150, (1 + case, 2)).tolist()  # short rows may be nearly radial
        beta, angle = case % 2 * 0.9, case > 2
        theta, g, m = ([torch.randn(shape).to(device, dtype) for shape in shapes] for _ in range(3))
        params = [x.clone().requires_grad_() for x in theta]
        how = dict(sphere=sphere, momentum=beta, angle=angle, backend=backend)
        optimizer = SphereSGD(params, lr=0.3 if angle else 1e-4, **how)
        for p, gradient, buffer in zip(params, g, m, strict=True):
            p.grad = gradient
            if beta:
                optimizer.state[p]["momentum_buffer"] = buffer.clone()
        optimizer.step()
        vectors = [cut(tensors, sphere) for tensors in (theta, g, m, params)]
        for x, gradient, buffer, new in zip(*vectors, strict=True):
            n = x / x.norm()
            direction = beta * (buffer - n * (n @ buffer)) + gradient - n * (n @ gradient)
            tan = 1e-4 * x.norm() * direction.norm()
            if angle:
                tan = math.tan(0.3)
            reference = n - tan * direction / direction.norm()
            worst = max(worst, relative(new, x.norm() * reference / reference.norm()))
    return worst


def cut(tensors, sphere):
    """The tensors as vectors in float64, one per sphere."""
    tensors = [x.detach().double() for x in tensors]
    if sphere == "row":
        return [row for x in tensors for row in x]
    flat = [x.flatten() for x in tensors]
    return flat if sphere == "tensor" else [torch.cat(flat)]


def convolution_error(threads):
    """The largest relative error of a gradient in float32 against float64, of every convolution of
    our networks of widths 1 to 16, each by itself."""
    errors = {}

    def compare(conv, inputs):
        shape = (conv.stride, *conv.weight.shape, *inputs[0].shape)
        if shape in errors:
            return
        gradients, y = [], conv.forward(inputs[0])  # without this hook
        direction = torch.randn_like(y)
        for dtype in (torch.float64, torch.float32):
            one, x = deepcopy(conv).to(dtype), inputs[0].detach().to(dtype).requires_grad_()
            one.forward(x).backward(direction.to(dtype))
            gradients.append((one.weight.grad, x.grad))
        errors[shape] = max(relative(b, a) for a, b in zip(*gradients, strict=True))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for model, width, size in product(("convnet", "resnet18"), range(1, 17), (8, 32)):
        channels = 1 if size == 8 else 3
        net = MODELS[model](channels, 10, width).to(DEVICE)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(compare)
        net(torch.randn(2, channels, size, size, device=DEVICE))
    torch.set_num_threads(before)
    return max(errors.values())


def largest_share(model, dtype):
    """The largest share of a gradient along the weights, over widths."""
    worst, data = 0.0, "modular" if model == "transformer" else "digits"
    for width in (4, 16, 64) if model == "transformer" else (1, 2, 3, 4, 8, 16):
        options = ["--data", data, "--model", model, "--width", str(width), "--dtype", dtype]
        with tempfile.TemporaryDirectory() as out:
            run = our_run(*options, "--out", out)
        run.epoch, run.data.x = -1, run.data.x[:128]
        run.train_epoch()
        shares = measure.radial_shares(run.first_steps, run.sphere, run.options.layer_groups)
        worst = max(worst, *shares.values())
    return worst


def launches():
    """Kernels of ours that a step over a ResNet-18 launches."""
    params = [p for p in MODELS["resnet18"](3, 10, 16).to(DEVICE).parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = SphereSGD(params, lr=1e-3)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        wait()
    return sum("_pass" in event.name for event in profile.events())


def graph_error():
    """How far twenty steps as replays of a CUDA graph end from twenty eager ones, relative."""
    ends = []
    for more in ([], ["--graph"]):
        with tempfile.TemporaryDirectory() as out:
            run = our_run(*more, "--out", out)
        for index in torch.arange(320, device=DEVICE).split(16):
            run.one_step(index)
        ends.append(torch.cat([x.flatten() for x in measure.vectors(run.net, run.spheres)]))
    return relative(ends[1], ends[0])


def step(repetitions):
    """A step over our networks' convolutions. The limit: to read θ and g and write θ once, at the
    speed of a copy."""
    worst = max(step_error(sphere, torch.float32, "auto") for sphere in SPHERES)
    print(f"largest relative error against float64: {worst:.1e}")
    if not worst < 1e-6:
        raise SystemExit("bench.py: error: the step is wrong")
    *_, copy = limits()
    rows, cases = [], {"embedding of 50,257 words": [(50257, 64)]}
    for model, width in (("convnet", 8), ("resnet18", 16), ("resnet18", 32), ("resnet18", 64)):
        net = MODELS[model](3, 10, width)
        cases[f"{model} of width {width}"] = [p.shape for p in net.parameters() if p.requires_grad]
    for name, shapes in cases.items():
        count = sum(math.prod(shape) for shape in shapes)
        case = f"{name}: {count / 1e6:.2f} million parameters"
        for method, seconds in step_of(shapes, repetitions if count > 3e6 else 40 * repetitions):
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
    ways["SphereSGD, a sphere per row"] = SphereSGD(params, elr, "row").step
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


def epoch(repetitions):
    """An epoch of train.py, and of the usual loop: a DataLoader with two workers, .item() each
    step. Same network and optimizer. The limit: its operations at the rate of a large product."""
    fp32, bf16, _ = limits()
    rates = {"fp32": fp32, "bf16": bf16}
    if bf16 < fp32 / 4:
        del rates["bf16"]  # it would take minutes
    rows, generator = [], np.random.default_rng(0)
    x = generator.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    y = generator.integers(0, 10, IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", x=x, y=y, test_x=x[:256], test_y=y[:256])
        for model, width in (("convnet", 8), ("convnet", 32), ("resnet18", 8)):
            case = f"{model} of width {width}, {IMAGES} images, batch {BATCH}"
            options = ["--data", f"{folder}/images.npz", "--out", f"{folder}/out"]
            options += ["--batch-size", str(BATCH), "--model", model, "--width", str(width)]
            ways, least = {}, {}
            for dtype, graph in product(rates, [[], ["--graph"]] if DEVICE == "cuda" else [[]]):
                run = our_run(*options, "--dtype", dtype, *graph)
                name = " ".join(["train.py,", dtype, *graph])
                ways[name] = run.train_epoch
                images = torch.randn(BATCH, 3, 32, 32, device=DEVICE)
                least[name] = flops(run.net, images) * (IMAGES // BATCH) / rates[dtype]
            ways["the usual loop: DataLoader, 2 workers, fp32"] = usual_loop(run.data, model, width)
            for name, seconds in interleaved(ways, repetitions).items():
                rows.append(Row(case, name, seconds, least.get(name, least["train.py, fp32"])))
    report("epoch", rows, "the usual loop")


def usual_loop(data, model, width):
    images = torch.utils.data.TensorDataset(data.normalized(data.x).cpu(), data.y.cpu())
    more = dict(shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    loader = torch.utils.data.DataLoader(images, BATCH, **more)
    net = MODELS[model](3, data.classes, width)
    net = net.to(DEVICE, memory_format=torch.contiguous_format)
    optimizer = SphereSGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)

    def loop():
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.to(DEVICE)), y.to(DEVICE))
            loss.backward()
            optimizer.step()
            loss.item()

    return loop


def run_train(*options):
    command = [sys.executable, HERE / "train.py", *options]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def sweep(repetitions):
    """The default sweep, as a user types it, and with one job. The limit: its operations at the
    rate of a large matrix product."""
    fp32, *_ = limits()
    limit = 13 * 20 * 89 * flops(convnet(1, 10), torch.randn(16, 1, 8, 8)) / fp32
    with tempfile.TemporaryDirectory() as out:
        command = ["--sweep", "--out", out, "--force"]
        ways = {"one job": partial(run_train, *command, "--jobs", "1", "--threads", "1")}
        ways["default jobs"] = partial(run_train, *command)
        times = interleaved(ways, repetitions, warm=0)
    case = "--sweep: 13 runs of 20 epochs"
    report("sweep", [Row(case, name, s, limit) for name, s in times.items()], "one job")


def main():
    text = "Time what users wait for, beside the usual ways and the limits of the machine."
    parser = regimes.Parser(prog="bench.py", description=text)
    ways = dict(step=step, iteration=iteration, epoch=epoch, sweep=sweep)
    parser.add_argument("what", choices=("check", *ways), help="what to check or to time")
    text = "medians are over so many (default: %(default)s)"
    how = dict(type=number(int, 0, 10**6), default=5, metavar="N")
    parser.add_argument("--repetitions", **how, help=text)
    args = parser.parse_args()
    print(f"on {machine(DEVICE)}, torch {torch.__version__}", flush=True)
    if args.what == "check":
        return check(checks())
    ways[args.what](args.repetitions)
    return 0


if __name__ == "__main__":
    regimes.finish(main)
