"""What the loss looks like around and between the ends of runs, from their checkpoints alone.

    python -m lab.landscape barrier A.pt B.pt          the loss on the way from one to the other
    python -m lab.landscape distance A.pt B.pt C.pt    angles between them, of each layer, too
    python -m lab.landscape curvature A.pt --k 5       eigenvalues and traces of Hessian and GGN
    python -m lab.landscape summary logs/digits-convnet    all of it for every ELR of a sweep

Distances and curvature are those on the unit sphere: angles, and second derivatives times ρ².
BatchNorm's statistics are computed anew at every point. Better optima just above the convergence
boundary: Sadrtdinov et al., NeurIPS 2024 (arXiv 2410.22113).
"""

import math
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction
from tqdm import tqdm

import regimes
from lab import figures, measure
from lab.data import Data, add_label_noise, chunks, load
from lab.machine import cores, find_device, use
from lab.own import build
from lab.runs import load_checkpoint, number

SAMPLES = 1024  # training inputs whose loss is differentiated twice
PRODUCTS = 35  # with the Hessian: about 22 of ARPACK, and the time of a barrier


@dataclass
class Point:
    """A checkpoint; `spheres` as measure.spheres_of gives them."""

    path: Path
    net: nn.Module
    data: Data
    options: dict
    spheres: list[dict]

    def vectors(self):
        return measure.vectors(self.net, self.spheres)


def read(path, device="cpu"):
    """A checkpoint. Raises ValueError where it is none of train.py."""
    state = load_checkpoint(path, device)
    if state is None:
        raise ValueError(f"{path}: there is no such file")
    options = state["identity"]
    data = _data(options["data"], options["modulus"], options["label_noise"], device)
    net = build(Namespace(**options), data).to(device)
    try:
        net.load_state_dict(state["net"])
    except RuntimeError:
        what = f"{options['model']} has changed since: its weights do not fit"
        raise ValueError(f"{path}: {what}") from None
    return Point(path, net, data, options, state["spheres"])


@cache
def _data(name, modulus, noise, device):
    data = load(name, modulus, device)
    if noise:
        add_label_noise(data, noise)
    return data


def evaluate(point, net):
    """Train loss and test error, BatchNorm's statistics computed anew."""
    loss = measure.on_train_set(net, point.data, "fp32")
    return loss, measure.on_test_set(net, point.data, "fp32")["test_error"]


def between(a, b, t, way):
    """The network at t in [0, 1] on the way from a to b: a straight "line" between the weights, or
    the great "circle" of each sphere, whose radius goes from a's to b's (what is on no sphere goes
    straight). At 0 and 1 exactly a and b."""
    net = build(Namespace(**a.options), a.data).to(
        a.data.x.device
    )  # not every network can be copied
    net.load_state_dict((b if t == 1 else a).net.state_dict())
    if t in (0, 1):
        return net
    for p, q in zip(net.parameters(), b.net.parameters(), strict=True):
        p.data.lerp_(q.data, t)
    if way == "line":
        return net
    for sphere, x, y in zip(a.spheres, a.vectors(), b.vectors(), strict=True):
        radius, other = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
        omega = measure.angles([x], [y])[:, None]
        sine = omega.sin().clamp(min=1e-300)
        of_x = torch.where(omega < 1e-9, 1 - t, ((1 - t) * omega).sin() / sine)
        of_y = torch.where(omega < 1e-9, t, (t * omega).sin() / sine)
        unit = of_x * x / radius + of_y * y / other
        measure.put(net, sphere, unit * ((1 - t) * radius + t * other))
    return net


def barrier(a, b, way="circle", points=21):
    """By how much at most the train loss exceeds the line between the ends' losses; (t, train loss,
    test error) along the way. Raises ValueError for two different networks."""
    check_same(a, b)
    path = [(t, *evaluate(a, between(a, b, t, way))) for t in np.linspace(0, 1, points).tolist()]
    first, last = path[0][1], path[-1][1]
    return max(loss - ((1 - t) * first + t * last) for t, loss, _ in path), path


def check_same(*points):
    first, *others = points
    for other in others:
        one, two = ([(n, p.shape) for n, p in x.net.named_parameters()] for x in (first, other))
        if one != two or first.spheres != other.spheres:
            what = "is another network, or on other spheres, than"
            raise ValueError(f"{other.path} {what} {first.path}")


def distances(points):
    """Matrices of angles in radians: of the network (the mean over its spheres), of each tensor."""
    check_same(*points)
    parts = {"network": points[0].spheres}
    for sphere in points[0].spheres:
        parts |= {name: [{"names": [name], "rows": False}] for name in sphere["names"]}
    found = {}
    for name, spheres in parts.items():
        places = [measure.vectors(point.net, spheres) for point in points]
        rows = [[measure.angles(x, y).mean().item() for y in places] for x in places]
        found[name] = np.array(rows)
    return found


def operators(point, samples=SAMPLES):
    """The Hessian of the train loss on the unit sphere, and the generalized Gauss-Newton matrix
    `ggn`, which for the cross-entropy is the Fisher matrix; over so many training inputs.

    Second derivatives by the weights on spheres, each times its radius: D H D with D = diag(ρ), in
    training mode, in chunks of the set. Raises ValueError where there are none.
    """
    net, data = point.net.train(), point.data
    weights = [net.get_parameter(name) for sphere in point.spheres for name in sphere["names"]]
    radius = [x.norm(dim=1, keepdim=True).expand_as(x).flatten() for x in point.vectors()]
    radius, n = torch.cat(radius).cpu().numpy(), min(samples or len(data.x), len(data.x))
    buffers, batches = [(x, x.clone()) for x in net.buffers()], []
    devices = [weights[0].device] if weights[0].is_cuda else []
    for index in chunks(n, data.x.device):
        x = data.inputs(index)
        batches.append((x.to(weights[0]) if x.is_floating_point() else x, data.y[index]))

    def product(kind, v):
        v, total = torch.from_numpy(radius * v.ravel()).to(weights[0]), 0
        for x, y in batches:
            with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
                torch.manual_seed(0)  # the same dropout in each product
                logits = net(x)
                check_twice(logits)
                total = total + kind(logits, y, weights, v) * len(y) / n
        for buffer, before in buffers:
            buffer.copy_(before)
        return radius * total.double().cpu().numpy()

    shape = (len(radius), len(radius))
    kinds = {"hessian": hessian_times, "ggn": ggn_times}
    how = {name: partial(product, kind) for name, kind in kinds.items()}
    return {name: LinearOperator(shape, times, dtype=np.float64) for name, times in how.items()}


def gradient(of, by, *directions, again=False):
    """By a list of tensors, as one vector; `again` if it is to be differentiated itself."""
    how = dict(create_graph=again, retain_graph=True, materialize_grads=True)
    return torch.cat([x.reshape(-1) for x in torch.autograd.grad(of, by, *directions, **how)])


def hessian_times(logits, y, weights, v):
    """The Hessian of a batch's loss, times v: the gradient of ⟨gradient, v⟩."""
    return gradient(gradient(F.cross_entropy(logits, y), weights, again=True) @ v, weights)


def ggn_times(logits, y, weights, v):
    """Jᵀ H J v with the Jacobian J of the logits and the Hessian H of the loss by the logits; Jv is
    the gradient of ⟨Jᵀu, v⟩ by u."""
    u, p = torch.zeros_like(logits, requires_grad=True), logits.detach().softmax(1)
    jv = gradient(gradient(logits, weights, u, again=True) @ v, [u]).view_as(p)
    return gradient(logits, weights, p * (jv - (p * jv).sum(1, keepdim=True)) / len(y))


def check_twice(logits):
    """Raise ValueError where a function on the way has no second derivative, which autograd would
    leave out without a word, or a wrong one."""
    nodes, seen = [logits.grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            function = getattr(node, "_forward_cls", None)  # a torch.autograd.Function
            once = hasattr(getattr(function, "backward", None), "__wrapped__")
            if once or function is CheckpointFunction:  # which takes use_reentrant=False
                raise ValueError(f"{function.__name__} has no second derivative: no curvature")
            if "WeightNorm" in node.name():  # wrong from torch 2.7 to 2.14
                raise ValueError("weight_norm has no right second derivative: no curvature")


def largest(operator, k):
    """The k largest eigenvalues, by ARPACK, to 0.1 %; nan where the matrix is nan or 0, as that of
    a run that has died."""
    n = operator.shape[0]
    k, start = min(k, n - 1), np.random.default_rng(0).standard_normal(n)
    first = operator @ start
    if not (np.isfinite(first).all() and first.any()):
        return np.full(k, math.nan)
    how = dict(which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
    return np.sort(eigsh(operator, k, **how))[::-1]


def trace(operator, probes=20):
    """Hutchinson's estimate."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (probes, operator.shape[0]))
    return float(np.mean([z @ (operator @ z) for z in signs]))


COLUMNS = "elr seed regime test_error then_test_error avg_test_error then_avg_test_error".split()
COLUMNS += "sharpness then_sharpness edge barrier_to_next".split()
HEADS = "ELR,seed,regime,test error,dropped,averaged,both,λ_max,dropped,2/λ_max,to next"


def summarize(folder, device, samples):
    """A row per run of a sweep, nan for what it has not (--then, --average, a loss). Barriers are
    those to the next larger ELR, between second runs where there are some."""
    runs = [run for group in regimes.by_elr(regimes.read_folder(folder)).values() for run in group]
    parts, found, ends = [], [], []
    for run in runs:
        parts.append({run.path: run.log})
        for then, log in figures.second_runs(run).items():
            parts[-1][run.path.with_suffix(f".then={then}.csv")] = log
    paths = [path.with_suffix(".pt") for logs in parts for path in logs]
    if not paths:
        raise ValueError(f"{folder}: no runs here whose ELR stays")
    tell_time(read(paths[0], device), len(paths), samples)
    for run, logs in zip(tqdm(runs, unit="run", disable=None), parts, strict=True):
        row = dict.fromkeys(COLUMNS, math.nan)
        row |= {"elr": run.elr, "seed": run.seed, "regime": run.verdict.regime}
        for path, log in logs.items():
            which = "" if path == run.path else "then_"
            end = read(path.with_suffix(".pt"), device)
            row[f"{which}test_error"] = log["test_error"][-1]
            row[f"{which}avg_test_error"] = log.get("avg_test_error", [math.nan])[-1]
            row[f"{which}sharpness"] = largest(operators(end, samples)["hessian"], 1)[0]
        row["edge"] = 2 / row["sharpness"]
        found.append(row)
        ends.append(end)
    for seed in {row["seed"] for row in found}:
        for i, j in pairwise([i for i, row in enumerate(found) if row["seed"] == seed]):
            found[i]["barrier_to_next"] = barrier(ends[i], ends[j], points=11)[0]
    return found


def tell_time(point, checkpoints, samples):
    operator = operators(point, samples)["hessian"]
    operator @ np.ones(operator.shape[0])  # the first is slower
    began = time.perf_counter()
    operator @ np.ones(operator.shape[0])
    minutes = checkpoints * PRODUCTS * (time.perf_counter() - began) / 60
    print(f"{checkpoints} checkpoints: about {minutes:.2g} minutes", file=sys.stderr)


def table(rows):
    lines = ["".join(f"{head:>12}" for head in HEADS.split(","))]
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append("".join(f"{cell.replace('nan', '–'):>12}" for cell in cells))
    return "\n".join(lines)


def parser():
    text = "What the loss looks like around and between the ends of runs, from their checkpoints."
    example = "example: python -m lab.landscape summary logs/digits-convnet"
    parser = regimes.Parser(prog="lab.landscape", description=text, epilog=example)
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    what = parser.add_subparsers(dest="what", required=True)

    def command(name, text):
        return what.add_parser(name, help=text, description=text).add_argument

    points = dict(type=Path, metavar="PT", help="a checkpoint of train.py")
    few, many = number(int, 1, 10**6), number(int, 2, 10**6)
    text = "the loss (nats) between two, on the straight line and on the great circle"
    add = command("barrier", text)
    add("checkpoints", nargs=2, **points)
    add("--points", type=many, default=21, metavar="N", help="along the way (default: 21)")
    add("--out", type=Path, metavar="PNG", help="(default: barrier.png beside the first)")
    text = "angles (radians) between checkpoints, of the network and of each layer"
    command("distance", text)("checkpoints", nargs="+", **points)
    text = "eigenvalues and traces of Hessian and Gauss-Newton matrix on the unit sphere"
    add = command("curvature", text)
    add("checkpoints", nargs="+", **points)
    add("--k", type=few, default=3, help="how many eigenvalues (default: 3)")
    samples = dict(type=many, default=SAMPLES, metavar="N")
    samples["help"] = f"over so many training inputs (default: {SAMPLES})"
    add("--samples", **samples)
    add = command("summary", "all of it for a sweep: landscape.csv, landscape.png")
    add("folder", type=Path, metavar="DIR", help="of the sweep")
    add("--samples", **samples)
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    try:
        args.device = find_device(args.device)
        use(args.device)
        if args.what == "summary":
            show_summary(args)
            return 0
        points = [read(path, args.device) for path in args.checkpoints]
        show = dict(barrier=show_barrier, distance=show_distances, curvature=show_curvature)
        show[args.what](args, points)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        parser().error(str(error).splitlines()[0])
    return 0


def show_summary(args):
    rows = summarize(args.folder, args.device, args.samples)
    regimes.write_csv(args.folder / "landscape.csv", rows)
    figures.of_landscape(rows, args.folder / "landscape.png", str(args.folder))
    print(table(rows))
    print(f"written: {args.folder / 'landscape.csv'}, {args.folder / 'landscape.png'}")


def show_barrier(args, points):
    ways, out = {}, args.out or points[0].path.with_name("barrier.png")
    if not out.parent.is_dir():
        raise ValueError(f"argument --out: {out.parent} is no folder: make it first")
    for way, name in (("line", "straight line"), ("circle", "great circle")):
        height, ways[name] = barrier(*points, way, args.points)
        losses = [loss for _, loss, _ in ways[name]]
        ends = f"train loss {losses[0]:.4g}, {losses[-1]:.4g} at the ends"
        print(f"{name}: barrier {height:.4g}; {ends}, at most {np.max(losses):.4g}")
    figures.of_barrier(ways, out, " to ".join(point.path.stem for point in points))
    print(f"written: {out}")


def show_distances(args, points):
    for name, angles in distances(points).items():
        print(f"angles in radians, {name}")
        for point, row in zip(points, angles, strict=True):
            print("  ".join(f"{angle:7.4f}" for angle in row) + f"  {point.path}")


def show_curvature(args, points):
    for point in points:
        n = min(args.samples, len(point.data.x))
        print(f"{point.path}, on the unit sphere, over {n} training inputs")
        for name, operator in operators(point, args.samples).items():
            values = largest(operator, args.k)
            if name == "hessian":
                edge = 2 / values[0]
            shown = ", ".join(f"{value:.5g}" for value in values)
            print(f"  {name}: largest eigenvalues {shown}; trace {trace(operator):.5g}")
        how = "trained at {mode} {value:g}".format_map(point.options)
        print(f"  2/λ_max = {edge:.4g}, above which descent is unstable; {how}")


if __name__ == "__main__":
    regimes.finish(main)
