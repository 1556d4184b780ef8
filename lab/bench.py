"""Is this machine right, and how fast is it?

    python -m lab.bench check          is it right? the step, gradients, the GPU
    python -m lab.bench step           the optimizer's step, beside torch's SGD and a mere copy
    python -m lab.bench kernels        the kernels as compiled for nine GPUs, without one
    python -m lab.bench iteration      an iteration of the default run, and what it is made of

All ways of a case take turns, and medians are printed: ratios hold on a shared machine.
"""

import argparse
import math
import platform
import re
import statistics
import tempfile
import time
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

import models
import regimes
import train
from lab import groups, kernels, measure
from lab.data import load
from lab.experiment import prepare
from lab.machine import Captured, keep_memory, set_device
from lab.options import parse
from lab.runs import Job, number
from models import MODELS
from sphere_step import ALONE, INTERPRET, SphereSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a step may be wrong by, relative to ρ. In half precision each weight is rounded once.
STEP_ERRORS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SPHERES = ("group", "tensor", "row")
WIDTHS = range(1, 17)  # of networks whose convolutions are checked


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


def machine():
    """The name of the GPU, or of the processor."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, TypeError):
        return re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.machine()


def report(case, times, moved, elements):
    """Print the milliseconds of each way; of those that move bytes how many of an element, and the
    time that a copy would take for them as a share of their own."""
    print(f"\n{case:48}{'ms':>11}{'bytes':>9}{'share':>9}" if moved else f"\n{case:48}{'ms':>11}")
    for name, seconds in times.items():
        line = f"  {name:46}{seconds * 1e3:11.3f}"
        if name in moved:
            share = moved[name] / moved["copy"] * times["copy"] / seconds
            line += f"{moved[name] / elements:9.1f}{share:9.0%}"
        print(line)


def checks():
    """What is checked, by name: the function that returns its error, and what is allowed."""
    found = {"product of matrices in float32": (product_error, 1e-5)}
    backends = ["torch"]
    if DEVICE == "cuda" or INTERPRET:
        backends.append("triton")
    for backend, sphere, dtype in product(backends, SPHERES, STEP_ERRORS):
        if backend == "torch" or dtype != torch.float64:
            name = f"step, {backend}, sphere {sphere}, {str(dtype)[6:]}"
            found[name] = partial(step_error, sphere, dtype, backend), STEP_ERRORS[dtype]
    for threads in (1, 2) if DEVICE == "cpu" else (1,):
        name = f"gradients of all convolutions of widths 1 to 16, threads: {threads}"
        found[name] = partial(convolution_error, threads), 1e-5
    for model, dtype in product(MODELS, ("fp32", "bf16")):
        name = f"gradients along the weights, {model}, {dtype}"
        found[name] = partial(largest_share, model, dtype), groups.ROUNDING[dtype]
    if DEVICE == "cuda":
        last = f"cuda:{torch.cuda.device_count() - 1}"
        on_last = partial(step_error, "group", torch.float32, "triton", last)
        found[f"step, triton, on {last}"] = on_last, 1e-6
        found["launches of a step, how many"] = launches, 3
        found["CUDA graph against eager steps"] = graph_error, 1e-4
    return found


def check(found):
    """Is this machine right? A line per check with its error. Returns 1 if one is wrong."""
    set_device(DEVICE)
    wrong = 0
    print(f"{'the largest error, as a share of what is right':60}{'found':>9}{'allowed':>9}")
    for name, (error_of, most) in found.items():
        print(f"{name:60}", end="", flush=True)  # should it crash, one sees where
        error = error_of()
        right = error <= most  # not if it is nan
        wrong += not right
        print(f"{error:9.2g}{most:9.2g} {'ok' if right else 'WRONG'}", flush=True)
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
        options = dict(sphere=sphere, momentum=beta, angle=angle, backend=backend)
        optimizer = SphereSGD(params, lr=0.3 if angle else 1e-4, **options)
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
    for model, width, size in product(("convnet", "resnet18"), WIDTHS, (8, 32)):
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
    worst, data = 0.0, load("modular" if model == "transformer" else "digits", device=DEVICE)
    config = argparse.Namespace(batch_size=16, dtype=dtype)
    for width in (4, 16, 64) if model == "transformer" else (1, 2, 3, 4, 8, 16):
        net = models.build(model, data, width=width).to(DEVICE)
        spheres = groups.spheres_of(net.layer_groups, "layer")
        shares = groups.radial_shares(net, spheres, data, config)
        worst = max(worst, shares.max().item())
    return worst


def launches():
    """Kernels of ours that a step over a ResNet-18 launches."""
    run = our_run("--model", "resnet18")
    train.train_step(run, torch.arange(16, device=DEVICE))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.sphere_sgd.step()
        wait()
    return sum("_pass" in event.name for event in profile.events())


def graph_error():
    """How far twenty steps as replays of a CUDA graph end from twenty eager ones, relative."""
    ends = []
    for run in (our_run(), our_run("--graph")):
        step = partial(train.train_step, run)
        if run.config.graph:
            step = Captured(step)
        for index in torch.arange(320, device=DEVICE).split(16):
            step(index)
        ends += measure.vectors(run.net, run.spheres)
    return relative(ends[1], ends[0])


def time_step(repetitions):
    """A step over our networks' convolutions."""
    cases = {"embedding of 50,257 words": [(50257, 64)]}
    for model, width in (("convnet", 8), ("resnet18", 16), ("resnet18", 32), ("resnet18", 64)):
        net = MODELS[model](3, 10, width)
        cases[f"{model} of width {width}"] = [p.shape for p in net.parameters() if p.requires_grad]
    for name, shapes in cases.items():
        count = sum(math.prod(shape) for shape in shapes)
        turns = repetitions if count > 3e6 else 40 * repetitions
        time_one_step(f"{name}, {count / 1e6:.2f} million", shapes, turns)


def time_one_step(case, shapes, turns, dtype=torch.float32):
    """Each way to make a step over tensors of these shapes."""
    elr = 1e-13  # so small that the weights stay what they are, however often
    params = [torch.randn(x, device=DEVICE, dtype=dtype).requires_grad_() for x in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    plain, norms = torch.optim.SGD(params, lr=elr), [p.detach().norm().item() for p in params]

    def usual():
        plain.step()
        with torch.no_grad():
            for p, norm in zip(params, norms, strict=True):
                p.mul_(norm / p.norm().item())

    source = torch.zeros(3 * sum(p.numel() for p in params) // 2, device=DEVICE, dtype=dtype)
    ways = {"copy": partial(torch.zeros_like(source).copy_, source)}
    moved = {"copy": 2 * source.nbytes}
    for sphere, beta in (*product(SPHERES, (0.0,)), ("group", 0.9)):
        name = f"SphereSGD, a sphere per {sphere}, momentum {beta}"
        ways[name] = SphereSGD(params, elr, sphere, momentum=beta).step
        moved[name] = least_bytes(params, sphere, beta)
    if DEVICE == "cuda":
        ways["a sphere per group in PyTorch"] = SphereSGD(params, elr, backend="torch").step
    ways["SGD, then norms and scaling"] = usual
    ways["plain SGD, fused"] = torch.optim.SGD(params, lr=elr, fused=True).step
    times = interleaved(ways, turns, warm=3)
    report(case, times, moved, sum(p.numel() for p in params))


def least_bytes(params, sphere, beta):
    """What a step has to move: a sphere of one tile, or all that the L2 cache holds, is read once,
    else twice; θ and m are written once. In float32 12 or 20 an element, with momentum 20 or 32."""
    written = 2 if beta else 1
    read, size, total = written + 1, params[0].element_size(), 0
    everything = sum(p.numel() for p in params)
    cache = 0  # unknown
    if DEVICE == "cuda":
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    lengths = {"group": [everything], "tensor": [p.numel() for p in params]}
    lengths["row"] = [p[0].numel() for p in params for _ in p]
    for length in lengths[sphere]:
        once = length * size <= ALONE or read * everything * size <= cache
        total += length * size * (written + read * (1 if once else 2))
    return total


def our_run(*options):
    """A run as train.py makes it, not yet trained."""
    with tempfile.TemporaryDirectory() as out:
        experiment = prepare(parse([*options, "--elr", "1e-3", "--out", out]))
    return train.Run(experiment, Job(1e-3, 0, Path(), ""))


def time_iteration(repetitions):
    """An iteration of a default run, its passes, and its step."""
    for name, options in (("digits, convnet of width 8", []), ("modular", ["--data", "modular"])):
        run = our_run(*options)
        index = torch.arange(run.config.batch_size)
        x, y = run.data.inputs(index), run.data.y[index]

        def passes(run=run, x=x, y=y):
            run.net.zero_grad()
            F.cross_entropy(run.net(x), y).backward()

        ways = {"forward and backward": passes, "iteration": partial(train.train_step, run, index)}
        ways["step of SphereSGD"] = run.sphere_sgd.step
        kept = [train.train_step(run, index) for _ in range(89)]

        def statistics(run=run, kept=kept):
            means = measure.Means(run)
            for step in kept:
                means.add(*step)
            return means.row()

        ways["statistics of 89 steps"] = statistics
        times = interleaved(ways, 400 * repetitions, warm=50)
        report(name, times, {}, 0)


def show_kernels(repetitions):
    kernels.show()
    if DEVICE == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            time_one_step(f"134 million, {str(dtype)[6:]}", [(2**14, 2**13)], repetitions, dtype)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = regimes.Parser(prog="lab.bench", description=__doc__, formatter_class=style)
    ways = dict(step=time_step, kernels=show_kernels, iteration=time_iteration)
    parser.add_argument("command", choices=("check", *ways))
    text = "medians are over so many (default: %(default)s)"
    add = parser.add_argument
    add("--repetitions", type=number(int, 1, 10**6), default=5, metavar="N", help=text)
    args = parser.parse_args()
    print(f"on {machine()}, torch {torch.__version__}", flush=True)
    if args.command == "check":
        return check(checks())
    keep_memory()
    ways[args.command](args.repetitions)
    return 0


if __name__ == "__main__":
    regimes.finish(main)
