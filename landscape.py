"""What the loss looks like around and between the ends of runs, from their checkpoints alone.

    python landscape.py barrier A.pt B.pt                the loss on the way from one to the other
    python landscape.py distance A.pt B.pt C.pt          angles between them, of the network and of each layer
    python landscape.py curvature A.pt --k 5             largest eigenvalues and traces of Hessian and Gauss-Newton matrix
    python landscape.py summary logs/digits-convnet      all of it for every ELR of a sweep: landscape.csv, landscape.png

Distances and curvature are those on the unit sphere: angles, and second derivatives times ρ². BatchNorm's statistics are computed
anew at every point. Better optima just above the convergence threshold: Sadrtdinov et al., NeurIPS 2024 (arXiv 2410.22113).
"""

import argparse
import csv
import io
import math
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, aslinearoperator, eigsh
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from data import Data, add_label_noise, chunks, load, subset
from models import LOSSES, builder
from rundir import load_checkpoint, write_whole

warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # torch itself still uses it

CHUNK = 512  # images at once; in the curvature also what BatchNorm normalizes over
DENSE = 200  # weights up to which a matrix is written out, in float64


@dataclass
class Point:
    """A checkpoint: the network, the data that it was trained on (None: the toy), its options, and its spheres: tensors by name,
    whether each row is a sphere, and radii."""

    path: Path
    net: nn.Module
    data: Data | None
    options: dict
    spheres: list[dict]


def read(path: Path, root: Path = Path("data"), device: str = "cpu") -> Point:
    """Raises ValueError where it is missing, damaged or not a checkpoint of train.py, or where its data or network are gone."""
    state = load_checkpoint(path, None, device)
    if state is None:
        raise ValueError(f"{path}: there is no such file")
    options = state["identity"]
    data = None
    if options["model"] != "toy":
        data = _data(
            options["data"],
            root,
            options["image_size"],
            device,
            options["train_size"],
            options["label_noise"],
        )
    net = builder(options)(*(data.x.shape[1], data.classes) if data else ()).to(device)
    try:
        net.load_state_dict(state["net"])
    except RuntimeError:
        raise ValueError(
            f"{path}: {options['model']} has changed since: its weights do not fit"
        ) from None
    return Point(path, net, data, options, state["spheres"])


@cache
def _data(
    name: str,
    root: Path,
    image_size: int | None,
    device: str,
    train_size: int | None,
    label_noise: float | None,
) -> Data:
    data = load(name, root, image_size, device)
    if train_size:
        subset(data, train_size)
    if label_noise:
        add_label_noise(data, label_noise)
    return data


@torch.no_grad()
def evaluate(point: Point, net: nn.Module) -> tuple[float, float]:
    """Train loss and test error of a network with BatchNorm's statistics computed anew over the training set. The toy: F, nan."""
    data = point.data
    if data is None:
        return net().item(), math.nan
    order = chunks(len(data.x), CHUNK, data.x.device)
    update_bn((data.images(index) for index in order), net)
    net.eval()
    loss = LOSSES[point.options["loss"]]
    loss = sum(
        loss(net(data.images(index)), data.y[index]).item() * len(index) for index in order
    ) / len(data.x)
    wrong = sum(
        (net(data.normalized(x)).argmax(1) != y).sum().item()
        for x, y in _parts(data.test_x, data.test_y)
    )
    return loss, wrong / len(data.test_x)


def _parts(x: Tensor, y: Tensor):
    return zip(x.split(CHUNK), y.split(CHUNK), strict=True)


def vectors(net: nn.Module, spheres: list[dict]) -> list[Tensor]:
    """The points on the spheres, float64: per entry of `spheres` a matrix whose rows are spheres."""
    found = []
    for sphere in spheres:
        tensors = [net.get_parameter(name).detach().double() for name in sphere["names"]]
        rows = (
            [x.reshape(len(x), -1) for x in tensors]
            if sphere["rows"]
            else [torch.cat([x.flatten() for x in tensors])[None]]
        )
        found += rows
    return found


def put(net: nn.Module, spheres: list[dict], points: list[Tensor]) -> None:
    """The inverse of `vectors`: write the points into the network's weights."""
    left = list(points)
    for sphere in spheres:
        tensors = [net.get_parameter(name) for name in sphere["names"]]
        for tensor in tensors if sphere["rows"] else ():
            tensor.data.copy_(left.pop(0).view_as(tensor))
        if not sphere["rows"]:
            parts = left.pop(0).flatten().split([x.numel() for x in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.data.copy_(part.view_as(tensor))


def between(a: Point, b: Point, t: float, way: str) -> nn.Module:
    """The network at t in [0, 1] on the way from a to b: "line", the straight line between the weights, or "circle", the great
    circle of each sphere (whose radius goes from a's to b's). What is on no sphere goes straight. At 0 and 1 exactly a and b."""
    if t in (0, 1):
        return deepcopy(b.net if t else a.net)
    net = deepcopy(a.net)
    for p, q in zip(net.parameters(), b.net.parameters(), strict=True):
        p.data.lerp_(q.data, t)
    if way == "circle":
        points = []
        for x, y in zip(vectors(a.net, a.spheres), vectors(b.net, b.spheres), strict=True):
            radius, other = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
            omega = _angle(x, y)[:, None]
            weight = torch.where(
                omega < 1e-9, 1 - t, ((1 - t) * omega).sin() / omega.sin().clamp(min=1e-300)
            )
            weights = (
                weight,
                torch.where(omega < 1e-9, t, (t * omega).sin() / omega.sin().clamp(min=1e-300)),
            )
            points.append(
                (weights[0] * x / radius + weights[1] * y / other) * ((1 - t) * radius + t * other)
            )
        put(net, a.spheres, points)
    return net


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Between the rows of two matrices, in radians; exact where it is small or near π, too."""
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return 2 * torch.atan2((x - y).norm(dim=1), (x + y).norm(dim=1))


def barrier(
    a: Point, b: Point, way: str = "circle", points: int = 21
) -> tuple[float, list[tuple[float, float, float]]]:
    """The height of the barrier, the most by which the train loss exceeds the straight line between the ends' losses, and
    (t, train loss, test error) along the way. Raises ValueError where the two are not the same network."""
    check_same(a, b)
    path = [(t, *evaluate(a, between(a, b, t, way))) for t in np.linspace(0, 1, points).tolist()]
    first, last = path[0][1], path[-1][1]
    return max(loss - ((1 - t) * first + t * last) for t, loss, _ in path), path


def check_same(*points: Point) -> None:
    first = points[0]
    for other in points[1:]:
        shapes = [
            [(name, p.shape) for name, p in point.net.named_parameters()]
            for point in (first, other)
        ]
        if shapes[0] != shapes[1] or [s["names"] for s in first.spheres] != [
            s["names"] for s in other.spheres
        ]:
            raise ValueError(
                f"{other.path} is another network, or on other spheres, than {first.path}"
            )


def distances(points: list[Point]) -> dict[str, np.ndarray]:
    """Matrices of angles in radians: of the whole network (the mean over its spheres), and of each tensor on a sphere."""
    check_same(*points)
    whole = [vectors(point.net, point.spheres) for point in points]
    names = [name for sphere in points[0].spheres for name in sphere["names"]]
    flat = {
        name: [point.net.get_parameter(name).detach().double().reshape(1, -1) for point in points]
        for name in names
    }

    def matrix(angle, items):
        return np.array([[angle(x, y) for y in items] for x in items])

    def of_network(xs, ys):
        return torch.cat([_angle(x, y) for x, y in zip(xs, ys, strict=True)]).mean().item()

    return {"network": matrix(of_network, whole)} | {
        n: matrix(lambda x, y: _angle(x, y).item(), xs) for n, xs in flat.items()
    }


class _OwnLoss(nn.Module):
    """For the toy, whose output is its loss."""

    reduction = "mean"

    def forward(self, output: Tensor, _) -> Tensor:
        return output.mean()


class _OfToy(nn.Module):
    def __init__(self, toy: nn.Module):
        super().__init__()
        self.toy = toy

    def forward(self, _) -> Tensor:
        return self.toy().reshape(1, 1)


def curvature(
    point: Point, k: int = 1, samples: int | None = None, probes: int = 20
) -> dict[str, np.ndarray | float]:
    """`hessian`, the k largest eigenvalues of the first of `operators`, and `hessian_trace`; the same of `ggn` (but for the toy);
    and `edge`, 2/λ_max: gradient descent on a quadratic is stable below it."""
    found = {}
    for name, operator in operators(point, samples).items():
        found |= {name: largest(operator, k), f"{name}_trace": trace(operator, probes)}
    return found | {"edge": 2 / found["hessian"][0]}


def operators(point: Point, samples: int | None = None) -> dict:
    """The Hessian of the train loss on the unit sphere and, but for the toy, the generalized Gauss-Newton matrix `ggn`, which for
    the cross-entropy is the Fisher matrix, as SciPy operators; over all training images or the first so many.

    Second derivatives by the weights on spheres, each times its radius: D H D with D = diag(ρ), for one sphere ρ²H. BatchNorm is
    in training mode, in chunks of the set. In float64 up to DENSE weights. Products by curvlinops (arXiv 2501.19183).
    """
    from curvlinops import (
        GGNLinearOperator,
        HessianLinearOperator,
    )  # not before the filter of warnings above

    net = deepcopy(point.net).train()
    for module in net.modules():  # statistics of the batch, and no trace of them
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    radius = [
        x.norm(dim=1, keepdim=True).expand_as(x).flatten() for x in vectors(net, point.spheres)
    ]
    radius = torch.cat(radius).cpu().numpy()
    net = net.double() if len(radius) <= DENSE else net
    parameters = [net.get_parameter(name) for sphere in point.spheres for name in sphere["names"]]
    dtype = parameters[0].dtype
    if point.data is None:
        dummy = torch.zeros(1, 1, dtype=dtype, device=parameters[0].device)
        net, loss, batches, kinds = (
            _OfToy(net),
            _OwnLoss(),
            [(dummy, dummy)],
            {"hessian": HessianLinearOperator},
        )
    else:
        data, n = point.data, min(samples or len(point.data.x), len(point.data.x))
        mse = point.options["loss"] == "mse"
        target = nn.functional.one_hot(data.y, data.classes).to(dtype) if mse else data.y
        loss, kinds = (
            nn.MSELoss() if mse else nn.CrossEntropyLoss(),
            {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator},
        )
        batches = [
            (data.images(index).to(dtype), target[index])
            for index in chunks(n, CHUNK, data.x.device)
        ]
    found = {}
    for name, kind in kinds.items():
        product = kind(net, loss, parameters, batches, check_deterministic=False).to_scipy(
            dtype=np.float64
        )
        found[name] = LinearOperator(
            product.shape,
            lambda v, a=product: radius * (a @ (radius * v.ravel())),
            dtype=np.float64,
        )
        if len(radius) <= DENSE:
            matrix = np.stack([found[name] @ unit for unit in np.eye(len(radius))])
            found[name] = aslinearoperator((matrix + matrix.T) / 2)
    return found


def largest(operator: LinearOperator, k: int) -> np.ndarray:
    """The k largest eigenvalues, largest first: exact up to DENSE rows, else by ARPACK to 0.1 %, nan where it cannot."""
    n = operator.shape[0]
    if n <= DENSE:
        return np.linalg.eigvalsh(operator @ np.eye(n))[::-1][:k]
    try:
        start = np.random.default_rng(0).standard_normal(n)
        values = eigsh(
            operator, min(k, n - 1), which="LA", return_eigenvectors=False, tol=1e-3, v0=start
        )
    except ArpackNoConvergence as partly:
        values = np.append(partly.eigenvalues, [math.nan] * (k - len(partly.eigenvalues)))
    return np.sort(values)[::-1]


def trace(operator: LinearOperator, probes: int) -> float:
    """Exact up to DENSE rows, else Hutchinson's estimator with so many vectors of random signs."""
    if operator.shape[0] <= DENSE:
        return float(np.trace(operator @ np.eye(operator.shape[0])))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (probes, operator.shape[0]))
    return float(np.mean([z @ (operator @ z) for z in signs]))


# ---------------------------------------------------------------------------------------------------------------- all of a sweep

COLUMNS = """elr seed regime test_error then_test_error avg_test_error then_avg_test_error sharpness then_sharpness edge
    barrier_to_next barrier_of_orders""".split()


def summarize(folder: Path, root: Path, device: str, samples: int) -> list[dict]:
    """A dict of COLUMNS per run of a sweep; nan where it was not trained (--then, --then-orders 2, --average). The barriers are
    those between second runs where there are some: to that of the next larger ELR, and to that with another order of batches."""
    try:
        with open(folder / "regimes.csv", newline="", encoding="utf-8") as file:
            runs = [row for row in csv.DictReader(file) if float(row["elr"]) > 0]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder}: no regimes.csv that can be read: is it the folder of a sweep?"
        ) from None
    found, ends = [], []
    for row in tqdm(runs, unit="run", disable=None):
        seed = int(row["seed"])
        name = np.format_float_scientific(float(row["elr"]), trim="-", exp_digits=2)
        first = folder / (f"elr={name}" + f".seed={seed}" * (seed > 0) + ".pt")
        seconds = sorted(folder.glob(f"{first.stem}.then=*.pt"))
        then, orders = (
            [p for p in seconds if (".order=" in p.name) is other][:1] for other in (False, True)
        )
        point, second = read(first, root, device), read(then[0], root, device) if then else None
        line = {
            "elr": float(row["elr"]),
            "seed": seed,
            "regime": row["regime"],
            "test_error": float(row["test_error"]),
        }
        line |= {"then_test_error": float(row.get("then_test_error") or math.nan)}
        line |= {"avg_test_error": _last(first, "avg_test_error")}
        line |= {"then_avg_test_error": _last(then[0], "avg_test_error") if then else math.nan}
        sharpness = [
            largest(operators(p, samples)["hessian"], 1)[0] if p else math.nan
            for p in (point, second)
        ]
        line |= {
            "sharpness": sharpness[0],
            "then_sharpness": sharpness[1],
            "edge": 2 / sharpness[0],
        }
        line |= {"barrier_to_next": math.nan, "barrier_of_orders": math.nan}
        if second and orders:
            line["barrier_of_orders"] = barrier(second, read(orders[0], root, device), points=11)[0]
        found.append(line)
        ends.append(second or point)
    for seed in {line["seed"] for line in found}:
        same = [i for i, line in enumerate(found) if line["seed"] == seed]
        for i, j in pairwise(same):
            found[i]["barrier_to_next"] = barrier(ends[i], ends[j], points=11)[0]
    return found


def _last(checkpoint: Path, column: str) -> float:
    with open(checkpoint.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1].get(column, math.nan))


def table(lines: list[dict]) -> str:
    heads = [
        "ELR",
        "regime",
        "test error",
        "dropped",
        "averaged",
        "both",
        "λ_max",
        "dropped",
        "2/λ_max",
        "barrier: next",
        "orders",
    ]
    text = ["".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True))]
    for line in lines:
        cells = [f"{line['elr']:.3g}", line["regime"]] + [
            f"{line[name]:.3f}" for name in COLUMNS[3:7]
        ]
        cells += [f"{line[name]:.3g}" for name in COLUMNS[7:]]
        text.append(
            "".join(
                f"{cell.replace('nan', '–'):>{width}}"
                for cell, width in zip(cells, _WIDTHS, strict=True)
            )
        )
    return "\n".join(text)


def best(lines: list[dict]) -> str:
    """From which ELR the test error after the drop is least: in the median over the seeds, and seed by seed."""
    values = {}
    for line in lines:
        if math.isfinite(line["then_test_error"]):
            values.setdefault(line["elr"], []).append(line["then_test_error"])
    if not values:
        return "no second runs: --then 1e-3 makes them"
    elr = min(values, key=lambda e: (np.median(values[e]), np.mean(values[e])))
    text = f"best test error after the drop: {np.median(values[elr]):.4f}, from ELR {elr:.3g}"
    if len(values[elr]) > 1:
        seeds = sorted({line["seed"] for line in lines})
        mine = [
            min((line["then_test_error"], line["elr"]) for line in lines if line["seed"] == seed)
            for seed in seeds
        ]
        text += f" (median of {len(values[elr])} seeds, {min(values[elr]):.4f} to {max(values[elr]):.4f}); seed by seed "
        text += ", ".join(f"{error:.4f} from {elr:.3g}" for error, elr in mine)
    return text


_WIDTHS = (10, 13, 12, 9, 10, 7, 10, 10, 10, 15, 10)
COLOURS = {
    "convergence": "#0072B2",
    "equilibrium": "#E69F00",
    "divergence": "#CC79A7",
    "undecided": "#999999",
}  # Okabe and Ito


def figure(lines: list[dict], path: Path, title: str) -> None:
    """Test error, sharpness and barriers against the ELR of the first run, medians over seeds, over the bands of the regimes."""
    from matplotlib.patches import Patch

    fig, axes = _subplots(3)
    elrs = sorted({line["elr"] for line in lines})
    edges = [math.sqrt(a * b) for a, b in pairwise(elrs)]
    factor = edges[0] / elrs[0] if edges else 2
    edges = [elrs[0] / factor, *edges, elrs[-1] * factor]
    panels = (
        (
            axes[0],
            "test error",
            ("test_error", "then_test_error", "avg_test_error", "then_avg_test_error"),
        ),
        (axes[1], r"sharpness $\lambda_{max}$ on the unit sphere", ("sharpness", "then_sharpness")),
        (axes[2], "barrier (train loss)", ("barrier_to_next", "barrier_of_orders")),
    )
    labels = {
        "test_error": "at the end",
        "then_test_error": "after the drop",
        "avg_test_error": "averaged",
    }
    labels |= {
        "then_avg_test_error": "after the drop, averaged",
        "sharpness": "at the end",
        "then_sharpness": "after the drop",
    }
    labels |= {
        "barrier_to_next": "to the next ELR's run",
        "barrier_of_orders": "between two orders of batches",
    }
    for ax, name, columns in panels:
        for i, elr in enumerate(elrs):
            regimes = [line["regime"] for line in lines if line["elr"] == elr]
            regime = max(dict.fromkeys(regimes), key=regimes.count)
            ax.axvspan(
                edges[i], edges[i + 1], color=COLOURS.get(regime, "#999999"), alpha=0.2, lw=0
            )
        for column, style in zip(columns, ("o-", "s--", "^:", "d-."), strict=False):
            values = [
                np.array([line[column] for line in lines if line["elr"] == elr]) for elr in elrs
            ]
            middle = np.array([np.median(x) for x in values])
            if np.isfinite(middle).any():
                spread = [middle - [x.min() for x in values], [x.max() for x in values] - middle]
                ax.errorbar(
                    elrs,
                    middle,
                    yerr=spread,
                    fmt=style,
                    ms=4,
                    lw=1.3,
                    capsize=2,
                    label=labels[column],
                )
        ax.set(xscale="log", xlabel="ELR of the first run", title=name, xlim=(edges[0], edges[-1]))
        ax.legend(fontsize=8)
    axes[0].set_yscale("symlog", linthresh=0.01)
    axes[0].set_ylim(0, 1.05)
    axes[0].set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes[1].set_yscale("log")
    axes[1].plot(elrs, [2 / elr for elr in elrs], "k:", lw=1)
    axes[1].text(elrs[0], 2 / elrs[0], r" $\lambda = 2/$ELR", va="bottom", fontsize=8)
    axes[2].set_yscale("symlog", linthresh=0.01)
    axes[2].set_ylim(bottom=-0.002)
    bands = [
        Patch(color=COLOURS[regime], alpha=0.3, label=regime)
        for regime in COLOURS
        if any(x["regime"] == regime for x in lines)
    ]
    fig.legend(handles=bands, loc="outside lower center", ncols=len(bands), fontsize=9)
    fig.suptitle(title)
    _save(fig, path)


def figure_of_barrier(ways: dict[str, list], path: Path, title: str) -> None:
    fig, axes = _subplots(2)
    for way, values in ways.items():
        t, loss, error = zip(*values, strict=True)
        axes[0].plot(t, loss, ".-", label=way)
        axes[1].plot(t, error, ".-", label=way)
    axes[0].set(title="train loss", xlabel="position between the two"), axes[0].legend()
    axes[1].set(title="test error", xlabel="position between the two")
    fig.suptitle(title)
    _save(fig, path)


def _subplots(n: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, n, figsize=(4.6 * n, 4), layout="constrained")


def _save(fig, path: Path) -> None:
    import matplotlib.pyplot as plt

    picture = io.BytesIO()
    fig.savefig(picture, dpi=110, format="png")
    plt.close(fig)
    write_whole(path, picture.getvalue())


# --------------------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line and exit status 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"landscape.py: error: {message}\n")


def parser() -> Parser:
    text = "What the loss looks like around and between the ends of runs, from the checkpoints that train.py wrote."
    example = "example: python landscape.py summary logs/digits-convnet (each of the four has its own --help)"
    parser = Parser(prog="landscape.py", description=text, epilog=example)
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="as for train.py (default: data)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    what = parser.add_subparsers(dest="what", required=True)

    def command(name: str, text: str, example: str) -> Callable:
        example = f"example: python landscape.py {name} {example}"
        return what.add_parser(name, help=text, description=text, epilog=example).add_argument

    text = "the loss (nats) on the way from one checkpoint to another, along the straight line and the great circle"
    add = command(
        "barrier", text, "logs/digits-convnet/elr=1e-03.pt logs/digits-convnet/elr=2.15e-03.pt"
    )
    add("checkpoints", nargs=2, type=Path, metavar="PT", help="a checkpoint of train.py")
    add(
        "--points",
        type=int,
        default=21,
        metavar="N",
        help="along the way, the ends included (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("barrier.png"),
        metavar="PNG",
        help="the figure (default: %(default)s)",
    )
    text = "angles (radians) between checkpoints, of the whole network and of each layer"
    add = command("distance", text, "logs/digits-convnet/elr=*.pt")
    add("checkpoints", nargs="+", type=Path, metavar="PT", help="a checkpoint of train.py")
    text = "largest eigenvalues and traces of Hessian and Gauss-Newton matrix on the unit sphere"
    add = command("curvature", text, "logs/digits-convnet/elr=1e-03.pt --samples 512")
    add("checkpoints", nargs="+", type=Path, metavar="PT", help="a checkpoint of train.py")
    add("--k", type=int, default=3, help="how many eigenvalues (default: %(default)s)")
    add(
        "--samples",
        type=int,
        metavar="N",
        help="over the first so many training images (default: all)",
    )
    text = "all of it for every ELR of a sweep: landscape.csv, landscape.png"
    add = command("summary", text, "logs/digits-convnet")
    add("folder", type=Path, metavar="DIR", help="of the sweep")
    add(
        "--samples",
        type=int,
        default=1024,
        help="curvature: over the first so many training images (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name, least in (("points", 2), ("k", 1), ("samples", 2)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            parser().error(f"argument --{name}: {value} is less than {least}")
    try:
        if args.what == "summary":
            lines = summarize(args.folder, args.data_root, args.device, args.samples)
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(
                [f"{x:.6g}" if isinstance(x, float) else x for x in (line[c] for c in COLUMNS)]
                for line in lines
            )
            write_whole(args.folder / "landscape.csv", text.getvalue().encode())
            figure(lines, args.folder / "landscape.png", str(args.folder))
            print(table(lines))
            print(best(lines))
            print(f"written: {args.folder / 'landscape.csv'}, {args.folder / 'landscape.png'}")
            return 0
        points = [read(path, args.data_root, args.device) for path in args.checkpoints]
        if args.what == "barrier":
            ways = {}
            for way, name in (("line", "straight line"), ("circle", "great circle")):
                height, ways[name] = barrier(*points, way, args.points)
                ends = f"train loss {ways[name][0][1]:.4g} and {ways[name][-1][1]:.4g} at the ends"
                print(
                    f"{name}: barrier {height:.4g}; {ends}, at most {max(loss for _, loss, _ in ways[name]):.4g}"
                )
            figure_of_barrier(ways, args.out, " to ".join(p.stem for p in args.checkpoints))
            print(f"written: {args.out}")
        elif args.what == "distance":
            for name, angles in distances(points).items():
                print(f"angles in radians, {name}")
                for path, row in zip(args.checkpoints, angles, strict=True):
                    print("  ".join(f"{angle:7.4f}" for angle in row) + f"  {path}")
        else:
            for path, point in zip(args.checkpoints, points, strict=True):
                found = curvature(point, args.k, args.samples)
                print(f"{path}, on the unit sphere")
                for name in ("hessian", "ggn"):
                    if name in found:
                        values = ", ".join(f"{value:.5g}" for value in found[name])
                        print(
                            f"  {name}: largest eigenvalues {values}; trace {found[f'{name}_trace']:.5g}"
                        )
                print(
                    f"  2/λ_max = {found['edge']:.4g}; trained at the ELR {point.options['rate']:g}"
                )
    except (ValueError, OSError) as error:
        parser().error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
