"""What the loss looks like around and between the ends of runs, from their checkpoints alone.

    python -m lab.landscape barrier A.pt B.pt          the loss on the way from one to the other
    python -m lab.landscape distance A.pt B.pt C.pt    angles between them, of each layer, too
    python -m lab.landscape curvature A.pt --k 5       eigenvalues, traces, batch sharpness
    python -m lab.landscape summary logs/digits-convnet    a sweep: landscape.csv, landscape.png

Distances and curvature are those on the unit sphere: angles, and second derivatives times ρ².
BatchNorm's statistics are computed anew at every point. Better optima just above the convergence
boundary: Sadrtdinov et al., NeurIPS 2024 (arXiv 2410.22113).
"""

import argparse
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import regimes
from lab import figures, measure, own
from lab.contents import changed, contents
from lab.curvature import SAMPLES, batch_sharpness, largest, operators, trace
from lab.data import Data, add_label_noise, load
from lab.machine import cores, find_device, set_device
from lab.runs import load_checkpoint, number


@dataclass
class Point:
    """A checkpoint; `spheres` as groups.spheres_of gives them."""

    path: Path
    net: nn.Module
    data: Data
    config: Namespace
    spheres: list[dict]

    def vectors(self):
        return measure.vectors(self.net, self.spheres)

    def network(self):
        """Another one of its kind. Not every network can be copied."""
        return own.build(self.config, self.data).to(self.data.x.device)


def read(path, device="cpu"):
    """A checkpoint; says what has changed since. Raises ValueError where it is no checkpoint."""
    state = load_checkpoint(path, device)
    if state is None:
        raise ValueError(f"{path}: there is no such file")
    config = Namespace(**state["identity"])
    data = _data(config.data, config.modulus, config.label_noise, device)
    point = Point(path, None, data, config, state["spheres"])
    point.net = point.network()
    try:
        point.net.load_state_dict(state["net"])
    except RuntimeError:
        cause = f"{config.model} has changed since: its weights do not fit"
        raise ValueError(f"{path}: {cause}") from None
    if "contents" in state:  # else it is of version 0.3
        here = contents(data, own.files_of(config.model))
        _note(changed({name: x for name, x in state["contents"].items() if name in here}, here))
    return point


@cache
def _note(change):
    if change:
        print(f"note: {change} since the run", file=sys.stderr)


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
    straight, buffers too)."""
    net, state = a.network(), (b if t == 1 else a).net.state_dict()
    net.load_state_dict(state)
    if t in (0, 1):  # exactly, and where the other end is dead
        return net
    for name, y in b.net.state_dict().items():
        if y.is_floating_point():
            state[name] = state[name].lerp(y, t)
    net.load_state_dict(state)
    if way == "circle":
        for sphere, x, y in zip(a.spheres, a.vectors(), b.vectors(), strict=True):
            turn = measure.angles([x], [y])[:, None] / math.pi
            of_x = (1 - t) * torch.sinc((1 - t) * turn) / torch.sinc(turn)
            of_y = t * torch.sinc(t * turn) / torch.sinc(turn)
            unit = of_x * F.normalize(x) + of_y * F.normalize(y)
            radius = torch.lerp(x.norm(dim=1), y.norm(dim=1), t)
            measure.move_to(net, sphere, unit * radius[:, None])
    return net


def barrier(a, b, way="circle", points=21):
    """How far the train loss rises above the line between the ends' losses, nan where it is nan
    anywhere; (t, train loss, test error) along the way. Raises ValueError for two different
    networks."""
    check_same(a, b)
    path = [(t, *evaluate(a, between(a, b, t, way))) for t in np.linspace(0, 1, points).tolist()]
    t, losses, _ = np.array(path).T
    line = (1 - t) * losses[0] + t * losses[-1]
    return float(np.max(losses - line)), path


def check_same(first, *others):
    def kind(point):
        return [(name, p.shape) for name, p in point.net.named_parameters()], point.spheres

    for other in others:
        if kind(first) != kind(other):
            difference = "is another network, or on other spheres, than"
            raise ValueError(f"{other.path} {difference} {first.path}")


def distances(points):
    """Matrices of angles in radians: of the network (the mean over its spheres), of each tensor."""
    check_same(*points)
    parts = {"network": points[0].spheres}
    for sphere in points[0].spheres:
        parts |= {name: [{"names": [name], "rows": False}] for name in sphere["names"]}
    for name, spheres in parts.items():
        places = [measure.vectors(point.net, spheres) for point in points]
        angles = [[measure.angles(x, y).mean().item() for y in places] for x in places]
        parts[name] = np.array(angles)
    return parts


QUANTITIES = "elr seed regime test_error then_test_error avg_test_error then_avg_test_error".split()
QUANTITIES += "sharpness then_sharpness edge barrier_to_next".split()
HEADS = "ELR,seed,regime,test error,second run,averaged,both,λ_max,second run,2/λ_max,to next"


def summarize(folder, device, samples):
    """A row per run of a sweep, nan for what it has not (--then, --average, a loss). Barriers are
    those to the next larger ELR, between second runs where there are some; to a dead run, nan."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    runs, problems = regimes.gather([folder])
    runs = [run for run in runs if run.elr > 0]
    for problem in problems if runs else ():
        print(f"lab.landscape: left out: {problem}", file=sys.stderr)
    if not runs:
        raise ValueError(f"{folder}: no runs here of --elr or --sweep, at an ELR that stays")
    parts, found, last = [], [], {}  # last: of each seed
    for run in runs:
        parts.append([run, *list(figures.second_runs(run).values())[-1:]])
    for both in tqdm(parts, unit="run", disable=None):
        row, run = dict.fromkeys(QUANTITIES, math.nan), both[0]
        row |= {"elr": run.elr, "seed": run.seed, "regime": run.verdict.regime}
        for which, part in zip(("", "then_"), both, strict=False):
            end = read(part.path.with_suffix(".pt"), device)
            sharpness = largest(operators(end, samples)["hessian"], 1)[0]
            row[f"{which}sharpness"] = sharpness
            for error in {"test_error", "avg_test_error"} & part.log.keys():
                row[which + error] = part.log[error][-1]
        row["edge"] = 2 / row["sharpness"]
        before, start = last.get(run.seed, (row, None))
        if math.isnan(sharpness):
            end = None
        if start and end:
            before["barrier_to_next"] = barrier(start, end, points=11)[0]
        last[run.seed] = row, end
        found.append(row)
    return found


def table(rows):
    lines = [HEADS.split(",")]
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append([cell.replace("nan", "–") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def parser():
    style = argparse.RawDescriptionHelpFormatter
    parser = regimes.Parser(prog="lab.landscape", description=__doc__, formatter_class=style)
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    commands = parser.add_subparsers(required=True)

    def command(name, show, **checkpoints):
        one = commands.add_parser(name)
        one.set_defaults(show=show)
        one.add_argument("checkpoints", type=Path, **checkpoints)
        return partial(one.add_argument, type=number(int, 1, 10**6), metavar="N")

    add = command("barrier", show_barrier, nargs=2, metavar="PT")
    add("--points", type=number(int, 3, 10**6), default=21, help="along the way (default: 21)")
    add("--out", type=Path, metavar="PNG", help="(default: barrier.png beside the first)")
    command("distance", show_distances, nargs="+", metavar="PT")
    samples = dict(default=SAMPLES, help=f"over so many training inputs (default: {SAMPLES})")
    add = command("curvature", show_curvature, nargs="+", metavar="PT")
    add("--k", default=3, help="how many eigenvalues (default: 3)")
    add("--samples", **samples)
    command("summary", show_summary, metavar="DIR")("--samples", **samples)
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    try:
        args.device = find_device(args.device)
        set_device(args.device)
        args.show(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        parser().error(str(error).splitlines()[0])
    return 0


def show_summary(args):
    folder = args.checkpoints
    rows = summarize(folder, args.device, args.samples)
    regimes.write_csv(folder / "landscape.csv", rows)
    figures.of_landscape(rows, folder / "landscape.png")
    print(table(rows))
    print(f"written: {folder / 'landscape.csv'}, {folder / 'landscape.png'}")


def show_barrier(args):
    if args.out and args.out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"argument --out: '{args.out}' is no picture: it takes NAME.png")
    a, b = (read(path, args.device) for path in args.checkpoints)
    ways, out = {}, args.out or a.path.with_name("barrier.png")
    for way, name in (("line", "straight line"), ("circle", "great circle")):
        height, ways[name] = barrier(a, b, way, args.points)
        _, losses, _ = np.array(ways[name]).T
        ends = f"train loss {losses[0]:.4g}, {losses[-1]:.4g} at the ends"
        print(f"{name}: barrier {height:.4g}; {ends}, at most {losses.max():.4g}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figures.of_barrier(ways, out, a.path.name, b.path.name)
    print(f"written: {out}")


def show_distances(args):
    points = [read(path, args.device) for path in args.checkpoints]
    for name, angles in distances(points).items():
        print(f"angles in radians, {name}")
        for point, row in zip(points, angles, strict=True):
            print("  ".join(f"{angle:7.4f}" for angle in row) + f"  {point.path}")


def show_curvature(args):
    for path in args.checkpoints:
        point = read(path, args.device)
        n = min(args.samples, len(point.data.x))
        print(f"{path}, on the unit sphere, over {n} training inputs")
        for name, operator in operators(point, args.samples).items():
            values = largest(operator, args.k)
            shown = ", ".join(f"{value:.5g}" for value in values)
            print(f"  {name}: largest eigenvalues {shown}; trace {trace(operator):.5g}")
            if name == "hessian":
                trained = f"trained at {point.config.mode} {point.config.value:g}"
                print(f"  2/λ_max = {2 / values[0]:.4g}: descent above is unstable; {trained}")
        size = point.config.batch_size
        mean, error = batch_sharpness(point, size)
        print(
            f"  batch sharpness {mean:.4g} ± {error:.2g}, batches of {size}; 2/it = {2 / mean:.4g}"
        )


if __name__ == "__main__":
    regimes.finish(main)
