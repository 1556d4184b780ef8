"""Train a scale-invariant network on the sphere at a fixed effective learning rate (ELR) and name the regime it falls into.

    python train.py --elr 0.01                        one run
    python train.py --elr 1e-4 1e-3 1e-2              these runs
    python train.py --sweep 1e-4 1 13                 13 ELRs, evenly spaced in their logarithm (`--sweep` alone does the same)

Writes into --out (default logs/<data>-<model>): elr=1e-02.csv, a row per epoch; elr=1e-02.layers.csv, a row per epoch and
tensor; elr=1e-02.pt, the trained network; config.json; regimes.csv and regimes.png. Regimes: Kodryan et al., NeurIPS 2022.
"""

import argparse
import importlib.util
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import regimes
from data import Data, batches, load
from models import MODELS, scale_invariant_groups
from rundir import Rows, open_folder, save_checkpoint, write_config
from sphere_step import SphereSGD
from sweep import grid, sweep

COLUMNS = "epoch step elr train_loss train_error grad_norm angle radial test_loss test_error seconds".split()
LAYER_COLUMNS = "epoch layer norm elr grad_norm angle".split()


def build(args: argparse.Namespace, data: Data, elr: float) -> tuple[torch.nn.Module, SphereSGD]:
    """The network and its optimizer. The same seed gives every ELR the same initialization."""
    torch.manual_seed(args.seed)
    net = args.make(data.x.shape[1], data.classes).to(args.device)
    groups = [[net.get_parameter(name) for name in names] for names in args.layer_groups]
    if args.sphere != "layer":
        groups = [[p for group in groups for p in group]]
    on_spheres = {p for group in groups for p in group}
    groups = [{"params": group} for group in groups]
    rest = [p for p in net.parameters() if p.requires_grad and p not in on_spheres]
    if rest:  # plain SGD at the learning rate that matches the ELR on the sphere of the whole network, η = η̃ρ²
        square = sum(p.detach().square().sum().item() for p in on_spheres)
        groups.append({"params": rest, "sphere": None, "lr": args.head_lr or elr * square})
    return net, SphereSGD(groups, lr=elr, sphere="row" if args.sphere == "row" else "group")


def train_epoch(net: torch.nn.Module, data: Data, order, optimizer: SphereSGD, step) -> tuple[list, list]:
    """One pass over the batches of `order`, calling `step` (optimizer.step, or optimizer.measure to stand still) on each.

    Returns the means over the steps of (loss, error, γ, φ, |radial|), and per tensor of (norm, ELR, γ, φ). Of several spheres
    γ is the norm of all their γ, φ and radial the mean. The host waits for the device once, at the end.
    """
    net.train()
    total, layers, steps = 0, 0, 0
    for index in order:
        x, y = data.x[index], data.y[index]
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        step()
        error = (logits.detach().argmax(1) != y).double().mean()
        of_spheres = optimizer.stats()
        gamma, phi, radial = of_spheres["grad_norm"].norm(), of_spheres["angle"].mean(), of_spheres["radial"].abs().mean()
        total = total + torch.stack([loss.detach().double(), error, gamma, phi, radial])
        layers = layers + torch.stack(list(optimizer.layer_stats().values()), 1)
        steps += 1
    return (total / steps).tolist(), (layers / steps).tolist()


@torch.no_grad()
def test(net: torch.nn.Module, data: Data, size: int = 1024) -> tuple[float, float]:
    """Mean loss (nats) and error on the test set, with BatchNorm's running statistics."""
    net.eval()
    logits = torch.cat([net(x) for x in data.test_x.split(size)])
    return F.cross_entropy(logits, data.test_y).item(), (logits.argmax(1) != data.test_y).double().mean().item()


@torch.no_grad()
def measure_chance(args: argparse.Namespace, data: Data, points: int = 512) -> dict:
    """Mean and standard deviation of loss and error on a batch, over uniformly random points of the spheres."""
    net, optimizer = build(args, data, elr=1.0)
    generator = torch.Generator().manual_seed(args.seed)
    values = []
    for _ in range(points):
        for p in (p for group in optimizer.param_groups if group["sphere"] for p in group["params"]):
            p.copy_(torch.randn(p.shape, generator=generator))
        optimizer.normalize()
        index = next(batches(len(data.x), args.batch_size, generator, args.device))
        logits, y = net(data.x[index]), data.y[index]
        values.append(torch.stack([F.cross_entropy(logits, y), (logits.argmax(1) != y).float().mean()]))
    columns = zip(("train_loss", "train_error"), torch.stack(values).double().unbind(1), strict=True)
    return {"points": points} | {name: {"mean": x.mean().item(), "std": x.std().item()} for name, x in columns}


def train(args: argparse.Namespace, data: Data, elr: float, chance: dict) -> None:
    """One run, from initialization to its named regime; a run that the folder already holds is not done again."""
    path = args.out / f"elr={regimes.elr_name(elr)}{f'.seed={args.seed}' if args.seed else ''}.csv"
    name = path.stem.replace("=", " ").replace(".seed", " seed")
    if not finished(path, args.epochs):
        net, optimizer = build(args, data, elr)
        generator = torch.Generator().manual_seed(args.seed)  # the same order of batches for every ELR
        layer_names = [layer for group in args.layer_groups for layer in group]
        rows, layer_rows = Rows(path, COLUMNS), Rows(path.with_suffix(".layers.csv"), LAYER_COLUMNS)
        bar = tqdm(range(args.epochs + 1), desc=name, unit="epoch", disable=None)
        start = time.perf_counter()
        for epoch in bar:
            order = batches(len(data.x), args.batch_size, generator, args.device)
            means, layers = train_epoch(net, data, order, optimizer, optimizer.step if epoch else optimizer.measure)
            row = [*means, *test(net, data)]
            rows.add([epoch, epoch * (len(data.x) // args.batch_size), elr, *row, time.perf_counter() - start])
            layer_rows.add(*([epoch, layer, *values] for layer, values in zip(layer_names, layers, strict=True)))
            bar.set_postfix(loss=f"{row[0]:.3g}", error=f"{row[1]:.3f}", γ=f"{row[2]:.3g}")
            if not all(map(math.isfinite, row)):
                print(f"{name}: stopped: loss or gradient is not finite in epoch {epoch}", file=sys.stderr)
                break
        rows.close(), layer_rows.close(), bar.close()
        save_checkpoint(path.with_suffix(".pt"), {"epoch": epoch, "net": net.state_dict(), "optimizer": optimizer.state_dict()})
        done = ""
    else:
        done = " (already done)"
    verdict = regimes.classify(regimes.read_log(path)[0], chance)
    print(f"{name}{done}: {regimes.TITLE.get(verdict.regime, verdict.regime)}: {verdict.why}", flush=True)


def finished(path: Path, epochs: int) -> bool:
    try:
        log, problem = regimes.read_log(path)
    except ValueError:
        return False
    return not problem and (log["epoch"][-1] == epochs or not np.isfinite(log["train_loss"][-1]))


def positive(kind):
    """An argparse type: a finite number of that kind above 0."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole' if kind is int else 'finite'} number above 0")
        return value

    return parse


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Data]:
    parser = regimes.Parser(
        prog="train.py",
        description="Train on the sphere at a fixed effective learning rate (ELR) and name the regime.",
        epilog="example: python train.py --sweep 1e-4 1 13 --epochs 40",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--elr", nargs="+", type=positive(float), metavar="ELR", help="one run at each of these ELRs")
    which.add_argument("--sweep", nargs="*", metavar=("LO", "HI N"), help="N ELRs from LO to HI, log-spaced; alone: 1e-4 1 13")
    run = parser.add_argument_group("the run")
    run.add_argument("--data", default="digits", help="data set: digits (default: %(default)s)")
    run.add_argument(
        "--model",
        default="convnet",
        help=f"{', '.join(MODELS)}, or FILE.py:FUNCTION of (channels, classes) (default: %(default)s)",
    )
    run.add_argument("--width", type=positive(int), help="width k of our networks (default: 8)")
    run.add_argument(
        "--sphere",
        choices=("network", "layer", "row"),
        default="network",
        help="which tensors share a norm (default: %(default)s)",
    )
    run.add_argument("--head-lr", type=positive(float), help="learning rate off the spheres (default: ELR times squared radius)")
    run.add_argument("--epochs", type=positive(int), default=20, help="passes over the training set (default: %(default)s)")
    run.add_argument("--batch-size", type=positive(int), default=16, help="images per step (default: %(default)s)")
    run.add_argument("--seed", type=int, default=0, help="of initialization and order of batches (default: %(default)s)")
    run.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda if there, else cpu)")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, help="folder to write into (default: logs/<data>-<model>)")
    files.add_argument("--force", action="store_true", help="start afresh: remove the runs in --out first")
    args = parser.parse_args(argv)

    if args.sweep is not None:
        args.elr = sweep_elrs(parser, args.sweep or ["1e-4", "1", "13"])
    args.elr = list(dict.fromkeys(args.elr))
    if not 0 <= args.seed < 2**31:
        parser.error(f"argument --seed: {args.seed} is not between 0 and 2147483647")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {args.device!r} cannot be used here ({str(error).splitlines()[0]}); cpu always can")
    try:
        data = load(args.data, args.device)
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    if args.batch_size > len(data.x):
        parser.error(f"argument --batch-size: {args.batch_size} is more than the {len(data.x)} training images")
    try:
        args.make = model_maker(args)
        torch.manual_seed(args.seed)
        net = args.make(data.x.shape[1], data.classes).to(args.device)
        args.layer_groups = layer_groups(net, data, args.sphere)
    except ValueError as error:
        parser.error(f"argument --model: {error}")
    on_spheres = {name for group in args.layer_groups for name in group}
    if args.head_lr and not any(p.requires_grad and name not in on_spheres for name, p in net.named_parameters()):
        parser.error(f"argument --head-lr: all that {args.model} trains is on the spheres; leave it out")
    args.out = args.out or Path("logs") / f"{args.data}-{args.model.rpartition(':')[2]}"
    options = {k: getattr(args, k) for k in "data model width sphere head_lr epochs batch_size device".split()}
    try:
        args.config = open_folder(args.out, options, args.force)
    except ValueError as error:
        parser.error(f"argument --out: {error}")
    return args, data


def model_maker(args: argparse.Namespace):
    """The function of (channels, classes) that makes the network. Raises ValueError where --model names none."""
    file, _, name = args.model.rpartition(":")
    if not file:
        if args.model not in MODELS:
            raise ValueError(f"no network {args.model!r}: choose {', '.join(MODELS)} or FILE.py:FUNCTION")
        args.width = args.width or 8
        return lambda channels, classes: MODELS[args.model](channels, classes, args.width)
    if args.width:
        raise ValueError(f"--width is for our own networks; {args.model} has its own")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"no file {file}: it must be a Python file, as in path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file} has no function {name!r}")
    return getattr(module, name)


def layer_groups(net: torch.nn.Module, data: Data, sphere: str) -> list[list[str]]:
    """Which parameters are on which sphere: what our networks say of themselves, what is found in others and then printed."""
    if hasattr(net, "layer_groups"):
        return net.layer_groups
    x = data.x[:32]
    try:
        logits = net(x)
        found = scale_invariant_groups(net, x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the network cannot be run on the data ({str(error).splitlines()[0]})") from error
    if logits.shape != (len(x), data.classes):
        raise ValueError(f"the network's output is {tuple(logits.shape)}, not (batch, classes) = {(len(x), data.classes)}")
    sizes = {name: p.detach().norm().item() for name, p in net.named_parameters() if p.requires_grad}
    found = [group for group in found if any(sizes[name] > 0 for name in group)]  # a norm of 0 has no direction
    if sphere == "row":  # nor has a row of one number, which is all that a vector's rows are
        tensors = dict(net.named_parameters())
        found = [
            group
            for group in found
            if all(tensors[name].dim() > 1 and tensors[name].flatten(1).norm(dim=1).min() > 0 for name in group)
        ]
    if not found:
        raise ValueError("no scale-invariant weights found: is there a normalization layer behind any?")
    print(f"{'norm':>9}  sphere")
    for group in found:
        print(f"{math.hypot(*(sizes[name] for name in group)):9.3g}  {' + '.join(group)}")
    rest = [name for name in sizes if not any(name in group for group in found)]
    print(f"{'':9}  off the spheres, by plain SGD: {', '.join(rest) or 'nothing'}")
    return found


def sweep_elrs(parser: argparse.ArgumentParser, texts: list[str]) -> list[float]:
    try:
        low, high, n = positive(float)(texts[0]), positive(float)(texts[1]), positive(int)(texts[2])
        if len(texts) != 3 or not low < high or n < 2:
            raise IndexError
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --sweep: {error}")
    except IndexError:
        parser.error(f"argument --sweep: {' '.join(texts)} is not LO HI N with LO < HI and N ≥ 2, as in --sweep 1e-4 1 13")
    return grid(low, high, n)


def main(argv: list[str] | None = None) -> int:
    args, data = parse(argv)
    try:
        chance = args.config.setdefault("chance", {})
        if str(args.seed) not in chance:
            chance[str(args.seed)] = measure_chance(args, data)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        write_config(args.out, {**args.config, "versions": versions, "threads": torch.get_num_threads()})
        title = f"{args.data}, {args.model}{f' of width {args.width}' if args.width else ''}, sphere: {args.sphere}"
        sweep(args.elr, lambda elr: train(args, data, elr, chance[str(args.seed)]), args.out, title)
    except KeyboardInterrupt:
        print(f"interrupted; the finished rows are in {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
