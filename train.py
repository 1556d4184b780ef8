"""Train a scale-invariant network on the sphere at a fixed effective learning rate (ELR) and name the regime it falls into.

    python train.py --elr 0.01                        one run
    python train.py --elr 1e-4 1e-3 1e-2              these runs
    python train.py --sweep 1e-4 1 13                 13 ELRs, evenly spaced in their logarithm (`--sweep` alone does the same)
    python train.py --sweep --seeds 3 --refine 3      three seeds of each, and both boundaries bisected three times
    python train.py --model toy --alphas 1 2 4 --sweep          the paper's toy, whose threshold is known: 1/Σα
    python train.py --space whole --lr 0.1 --wd 5e-4 --momentum 0.9      ordinary training, and the ELR that it implies

Writes into --out (default logs/<data>-<model>): elr=1e-02.csv, a row per epoch; elr=1e-02.layers.csv, a row per epoch and
tensor; elr=1e-02.pt, the checkpoint; config.json; regimes.csv and regimes.png. The same command again goes on where it stopped.
Regimes: Kodryan et al., NeurIPS 2022.
"""

import argparse
import ctypes
import math
import os
import platform
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

import regimes
from data import NAMES, Data, add_label_noise, batches, chunks, load, subset
from models import LOSSES, MODELS, builder, layer_groups
from rundir import Busy, Rows, load_checkpoint, lock, open_folder, random_state, save_checkpoint, set_random_state, write_config
from sphere_step import SphereSGD, WholeSpaceSGD
from sweep import Runner, Stopped, grid, named, sweep

Optimizer = SphereSGD | WholeSpaceSGD

COLUMNS = "epoch step elr train_loss train_error grad_norm angle radial test_loss test_error seconds distance".split()
NOISE_COLUMNS = "clean_error noisy_error".split()
AVERAGE_COLUMNS = "avg_train_loss avg_test_error".split()
FULL_PASS_COLUMNS = "full_train_loss full_train_error full_grad_norm batch_grad_norm batch_grad_norm_std".split()
LAYER_COLUMNS = "epoch layer norm elr grad_norm angle".split()


def build(args: Namespace, data: Data | None, rate: float, seed: int, init: dict | None = None) -> tuple[nn.Module, Optimizer]:
    """The network and its optimizer at an ELR (in the whole space: a learning rate). The same seed gives every rate the same
    initialization, unless there is a checkpoint `init` to start from."""
    torch.manual_seed(seed)
    net = args.make(*(data.x.shape[1], data.classes) if data else ()).to(args.device)
    if init:
        net.load_state_dict(init["net"])
    return net, make_optimizer(args, net, rate)


def make_optimizer(args: Namespace, net: nn.Module, rate: float) -> Optimizer:
    """What is scale invariant on spheres (--sphere), the rest in plain SGD; or all of it in the whole space."""
    groups = [[net.get_parameter(name) for name in names] for names in args.layer_groups]
    if args.sphere != "layer":
        groups = [[p for group in groups for p in group]]
    on_spheres = [p for group in groups for p in group]
    momentum = args.momentum or 0.0
    if args.space == "whole":
        trained = [p for p in net.parameters() if p.requires_grad]
        return WholeSpaceSGD(trained, on_spheres, rate, momentum, args.wd or 0.0)
    groups = [{"params": group} for group in groups]

    def lr(x: float) -> float | Tensor:  # a CUDA graph reads it from the device's memory at each replay
        return torch.tensor(x, device=args.device) if args.graph else x

    rest = [p for p in net.parameters() if p.requires_grad and all(p is not q for q in on_spheres)]
    if rest:  # plain SGD at the learning rate that matches the ELR on the sphere of the whole network, η = η̃ρ²
        square = sum(p.detach().square().sum().item() for p in on_spheres)
        groups.append({"params": rest, "sphere": None, "lr": lr(args.head_lr or rate * square)})
    return SphereSGD(groups, lr=lr(rate), sphere="row" if args.sphere == "row" else "group", momentum=momentum)


def steps_of_epoch(args: Namespace, data: Data | None, order: torch.Generator) -> list[list[Tensor]]:
    """The epoch's steps, each a list of index tensors whose gradients it accumulates: one batch, or the whole set in chunks."""
    if data is None:
        return [[(0,)]] * args.steps
    if args.full_batch:
        return [chunks(len(data.x), args.batch_size, args.device)]
    return [[index] for index in batches(len(data.x), args.batch_size, order, args.device)]


def logits_of(args: Namespace, net: nn.Module, x: Tensor) -> Tensor:
    """The output of the network for a batch of images, computed in --dtype, in float32."""
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bf16"):
        return net(x).float()


def loss_of(
    args: Namespace, data: Data | None, net: nn.Module, index: Tensor | None, augment: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and what is logged of it: means over the batch."""
    if data is None:
        loss = net()
        return loss, {"train_loss": loss.detach()}
    y = data.y[index]
    logits = logits_of(args, net, data.images(index, augment))
    loss = LOSSES[args.loss](logits, y)
    wrong = (logits.detach().argmax(1) != y).double()
    found = {"train_loss": loss.detach().double(), "train_error": wrong.mean()}
    if data.noisy is not None:
        noisy = data.noisy[index].double()
        found |= {"noisy": noisy.mean(), "clean_error": (wrong * (1 - noisy)).mean(), "noisy_error": (wrong * noisy).mean()}
    return loss, found


def step_on(
    args: Namespace, data: Data | None, net: nn.Module, optimizer: Optimizer, move: Callable, *indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward, backward and `move` (optimizer.step, or optimizer.measure to stand still) on the mean loss of these batches.

    Returns what train_epoch adds up: of the step [loss, error, …, ELR, γ, φ, |radial|], of the tensors [tensors, 4]."""
    optimizer.zero_grad(set_to_none=not args.graph)
    size, parts = sum(map(len, indices)), 0
    for index in indices:
        loss, found = loss_of(args, data, net, index, args.augment)
        (loss * (len(index) / size)).backward()
        parts = parts + torch.stack(list(found.values())) * (len(index) / size)
    move()
    spheres = optimizer.stats()
    spheres = [spheres["elr"].mean(), spheres["grad_norm"].norm(), spheres["angle"].mean(), spheres["radial"].abs().mean()]
    return torch.cat([parts, torch.stack(spheres)]), torch.stack(list(optimizer.layer_stats().values()), 1)


class Captured:
    """A function of one index tensor, captured whole in a CUDA graph: three calls run as usual, all later ones are replays, a
    single launch each. Where it cannot be captured (a network that asks the device for a number), all run as usual."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]):
        self.function, self.calls, self.graph, self.stream = function, 0, None, torch.cuda.Stream()

    def __call__(self, index: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls <= 3:  # on the stream of the capture, which has to know all memory that it meets
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.function(index)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if self.calls == 4:
            self.index, graph = index.clone(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self.out = self.function(self.index)
                self.graph = graph
            except RuntimeError as error:
                print(f"no CUDA graph, going on without: {str(error).splitlines()[0]}", file=sys.stderr)
        if self.graph is None:
            return self.function(index)
        self.index.copy_(index)
        self.graph.replay()
        return self.out


def train_epoch(
    args: Namespace, net: nn.Module, steps: list[list[Tensor]], step: Callable, progress: dict
) -> tuple[dict[str, float], list[list[float]]]:
    """One pass over `steps`, calling `step` (see step_on) on each.

    Returns the means over the steps of loss, error, ELR, γ, φ and |radial|, and per tensor of (norm, ELR, γ, φ). Of several
    spheres γ is the norm of all their γ, the others are means. The host waits for the device once, at the end. `progress` holds
    how many steps are done and the sums so far: the pass goes on from there, and where it is Stopped it can go on later.
    """
    net.train()
    for indices in steps[progress["done"] :]:
        sums, layers = step(*indices)
        progress["sums"], progress["layers"] = progress["sums"] + sums, progress["layers"] + layers
        progress["done"] += 1
        if args.signals:
            raise Stopped
    names = ["train_loss"] + ["train_error"] * (args.model != "toy") + ["noisy", *NOISE_COLUMNS] * (args.label_noise is not None)
    means = progress["sums"] / len(steps)
    means = dict(zip([*names, "elr", "grad_norm", "angle", "radial"], means.tolist(), strict=True))
    noisy = means.pop("noisy", None)
    if noisy is not None:  # an epoch leaves out the last, incomplete batch, and may so have seen one kind only
        means["clean_error"] = means["clean_error"] / (1 - noisy) if noisy < 1 else math.nan
        means["noisy_error"] = means["noisy_error"] / noisy if noisy else math.nan
    return means, (progress["layers"] / len(steps)).tolist()


@torch.no_grad()
def test(args: Namespace, data: Data | None, net: nn.Module, size: int = 512) -> dict[str, float]:
    """Mean loss and error on the test set, with BatchNorm's running statistics."""
    if data is None:
        return {}
    net.eval()
    logits = torch.cat([logits_of(args, net, data.normalized(x)) for x in data.test_x.split(size)])
    wrong = logits.argmax(1) != data.test_y
    return {"test_loss": LOSSES[args.loss](logits, data.test_y).item(), "test_error": wrong.double().mean().item()}


def full_pass(args: Namespace, data: Data, net: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """Over the whole training set, with the weights held still, statistics of the batch and no augmentation: loss, error, γ of
    the mean gradient, mean and standard deviation over the batches of each one's γ. Leaves no trace in the network."""
    net.train()
    buffers = [b.clone() for b in net.buffers()]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    mean, gammas, total = [torch.zeros_like(p) for p in trained], [], 0
    with torch.random.fork_rng([args.device] if "cuda" in args.device else []):
        for index in chunks(len(data.x), args.batch_size, args.device):
            loss, found = loss_of(args, data, net, index)
            optimizer.zero_grad(set_to_none=not args.graph)
            loss.backward()
            optimizer.measure()
            gammas.append(optimizer.stats()["grad_norm"].norm())
            total = total + torch.stack([found["train_loss"], found["train_error"]]) * (len(index) / len(data.x))
            for total_of_p, p in zip(mean, trained, strict=True):
                if p.grad is not None:  # a tensor without effect has none
                    total_of_p.add_(p.grad, alpha=len(index) / len(data.x))
    for p, gradient in zip(trained, mean, strict=True):
        if p.grad is not None:
            p.grad.copy_(gradient)  # in place: a CUDA graph knows gradients by their addresses
    optimizer.measure()
    gamma = optimizer.stats()["grad_norm"].norm()
    torch._foreach_copy_(list(net.buffers()), buffers)
    spread = torch.stack(gammas)
    values = torch.cat([total, torch.stack([gamma, spread.mean(), spread.std(correction=0)])])
    return dict(zip(FULL_PASS_COLUMNS, values.tolist(), strict=True))


@torch.no_grad()
def test_average(args: Namespace, data: Data, averaged: AveragedModel, optimizer: Optimizer) -> dict[str, float]:
    """Of the mean of weights, put back on the spheres: loss on the training set and error on the test set, with the BatchNorm
    statistics of a pass over the training set."""
    net = on_spheres(args, averaged, optimizer)
    order = chunks(len(data.x), args.batch_size, args.device)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bf16"):
        update_bn((data.images(index) for index in order), net)
    net.eval()
    losses = [loss_of(args, data, net, index)[1]["train_loss"].item() * len(index) / len(data.x) for index in order]
    return {"avg_train_loss": sum(losses), "avg_test_error": test(args, data, net)["test_error"]}


def on_spheres(args: Namespace, averaged: AveragedModel, optimizer: Optimizer) -> nn.Module:
    """The averaged network, its spheres back on the radii of the optimizer (in the whole space: as it is)."""
    net = deepcopy(averaged.module)
    if args.space == "sphere":
        projector = make_optimizer(args, net, 1.0)
        for group, radii in zip(projector.param_groups, optimizer.param_groups, strict=True):
            if group["sphere"]:
                group["radii"] = radii["radii"]
        projector.normalize()
    return net


def directions(optimizer: Optimizer) -> list[Tensor]:
    """The unit vectors of all spheres, one after the other, float64."""
    spheres = optimizer.meter if isinstance(optimizer, WholeSpaceSGD) else optimizer
    vectors = []
    for group in (g for g in spheres.param_groups if g["sphere"]):
        rows = [p.detach().double().reshape(len(p) if group["sphere"] == "row" else 1, -1) for p in group["params"]]
        vectors += rows if group["sphere"] == "row" else [torch.cat(rows, 1)]
    return [x / x.norm(dim=1, keepdim=True) for x in vectors]


def angle_between(some: list[Tensor], others: list[Tensor]) -> float:
    """Mean over the spheres of the angle between two points, in radians; exact where it is small, too."""
    halves = [(a - b).norm(dim=1) / 2 for a, b in zip(some, others, strict=True)]
    return (2 * torch.cat(halves).clamp(max=1).asin()).mean().item()


@torch.no_grad()
def measure_chance(args: Namespace, data: Data | None, seed: int, points: int = 512) -> dict:
    """Mean and standard deviation of loss and error on a batch, over uniformly random points of the spheres."""
    net, optimizer = build(Namespace(**{**vars(args), "space": "sphere"}), data, 1.0, seed)
    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(points):
        for p in (p for group in optimizer.param_groups if group["sphere"] for p in group["params"]):
            p.copy_(torch.randn(p.shape, generator=generator))
        optimizer.normalize()
        index = next(batches(len(data.x), args.batch_size, generator, args.device)) if data else None
        found = loss_of(args, data, net, index)[1]
        names = [name for name in ("train_loss", "train_error") if name in found]
        values.append(torch.stack([found[name] for name in names]))
    columns = zip(names, torch.stack(values).double().unbind(1), strict=True)
    return {"points": points} | {name: {"mean": x.mean().item(), "std": x.std().item()} for name, x in columns}


def train(args: Namespace, data: Data | None, rate: float, seed: int, epochs: int, wait: Callable | None = None) -> str:
    """One run, from initialization, or from where it stopped, to its verdict, which it returns, and then the runs that start
    from its end; what is finished is not done again. Raises Busy where another process is at it, unless there is `wait`."""
    (path, name), after = named(args, rate, seed), ""
    with lock(path.with_suffix(".lock"), wait):
        done = run(args, data, rate, seed, epochs, path, name, args.init_state, seed)
        for i in range(args.then_orders if args.then else 0):
            init = load_checkpoint(path.with_suffix(".pt"), None, args.device)
            if init is None:
                raise ValueError(
                    f"{path.with_suffix('.pt')} is gone, from which to go on: remove {path.name}, and it is made again"
                )
            then = path.with_suffix(f".then={regimes.elr_name(args.then)}" + f".order={i}" * (i > 0) + ".csv")
            run(args, data, args.then, seed, args.then_epochs, then, f"{name}, then {args.then:g}", init, seed + 1000 * i)
            log = regimes.read_log(then)[0]
            after += f"; then at {args.then:g}: train loss {log['train_loss'][-1]:.3g}"
            after += f", test error {log['test_error'][-1]:.3f}" if data else ""
    verdict = regimes.classify(regimes.read_log(path)[0], args.chance[str(seed)])
    return f"{name}{' (already done)' * done}: {regimes.TITLE.get(verdict.regime, verdict.regime)}: {verdict.why}{after}"


def run(
    args: Namespace,
    data: Data | None,
    rate: float,
    seed: int,
    epochs: int,
    path: Path,
    name: str,
    init: dict | None,
    order_seed: int,
) -> bool:
    """The training itself, from the checkpoint `init` if there is one. Returns whether there was nothing left to do."""
    identity = {**args.config["options"], "rate": rate, "seed": seed, "order_seed": order_seed}
    origin = init and init["checksum"]
    last = load_checkpoint(path.with_suffix(".pt"), identity, args.device)
    if last and last["origin"] != origin:  # what it started from has gone on since
        last = None
    elif last["epoch"] >= epochs or last["ended"] if last else finished(path, epochs):
        return True
    net, optimizer = build(args, data, rate, seed, init)
    factor = args.schedule(epochs)
    scheduler = LambdaLR(optimizer, factor)
    averaged = AveragedModel(net) if args.average else None
    order = torch.Generator().manual_seed(order_seed)  # the same order of batches for every ELR
    start, upto, progress, seconds = directions(optimizer), -1, None, 0.0
    if last:
        net.load_state_dict(last["net"]), optimizer.load_state_dict(last["optimizer"])
        scheduler.load_state_dict(last["scheduler"]), order.set_state(last["order"].cpu())
        set_random_state(args.device, last["random"])
        if averaged:
            averaged.load_state_dict(last["averaged"])
        upto, progress, seconds = last["epoch"], last["progress"], last["seconds"]
    columns = [c for c in COLUMNS if data or c not in ("train_error", "test_loss", "test_error")]
    columns += NOISE_COLUMNS * (args.label_noise is not None) + FULL_PASS_COLUMNS * bool(args.eval_train)
    columns += AVERAGE_COLUMNS * (averaged is not None)
    layer_names = [layer for group in args.layer_groups for layer in group]
    layer_names = ["'" * (layer[0] in "=+-@\t\r") + layer for layer in layer_names]  # no formula for a spreadsheet
    rows, layer_rows = Rows(path, columns, upto), Rows(path.with_suffix(".layers.csv"), LAYER_COLUMNS, upto)
    look = dict(desc=name, unit="epoch", initial=upto + 1, total=epochs + 1, disable=None, position=args.job, leave=not args.job)
    bar = tqdm(range(upto + 1, epochs + 1), **look)
    began = time.perf_counter() - seconds

    def save(epoch: int, order_state: Tensor, progress: dict | None = None, ended: bool = False) -> None:
        state = {"epoch": epoch, "progress": progress, "ended": ended, "seconds": time.perf_counter() - began}
        state |= {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        state |= {"order": order_state, "random": random_state(args.device), "origin": origin}
        state |= {"spheres": spheres_of(net, optimizer), "averaged": averaged.state_dict() if averaged else None}
        save_checkpoint(path.with_suffix(".pt"), identity, state)

    stand = partial(step_on, args, data, net, optimizer, optimizer.measure)
    step = partial(step_on, args, data, net, optimizer, optimizer.step)
    if args.graph:
        step = Captured(step)
    try:
        for epoch in bar:
            before = order.get_state()
            steps, progress = steps_of_epoch(args, data, order), progress or {"done": 0, "sums": 0, "layers": 0}
            try:
                row, layers = train_epoch(args, net, steps, step if epoch else stand, progress)
            except Stopped:
                save(epoch - 1, before, progress)
                raise
            progress = None
            row |= test(args, data, net) | (full_pass(args, data, net, optimizer) if args.eval_train else {})
            row |= {"epoch": epoch, "step": epoch * len(steps), "distance": angle_between(start, directions(optimizer))}
            row |= {"elr": rate * factor(max(epoch - 1, 0))} if args.space == "sphere" else {}
            if averaged:
                row |= dict.fromkeys(AVERAGE_COLUMNS, math.nan)
                if epoch > epochs - args.average:
                    averaged.update_parameters(net)
                    row |= test_average(args, data, averaged, optimizer)
            row["seconds"] = time.perf_counter() - began
            rows.add([row[column] for column in columns])
            layer_rows.add(*([epoch, layer, *values] for layer, values in zip(layer_names, layers, strict=True)))
            if epoch:
                scheduler.step()
            ended = not all(map(math.isfinite, (row["train_loss"], row["grad_norm"])))
            if ended or epoch == epochs or epoch % args.checkpoint_every == 0:
                save(epoch, order.get_state(), ended=ended)
            shown = {"loss": "train_loss", "error": "train_error", "γ": "grad_norm"}
            bar.set_postfix({label: f"{row[column]:.3g}" for label, column in shown.items() if column in row})
            if ended:
                print(f"{name}: stopped: loss or gradient is not finite in epoch {epoch}", file=sys.stderr)
                break
    finally:
        rows.close(), layer_rows.close(), bar.close()
    return False


def spheres_of(net: nn.Module, optimizer: Optimizer) -> list[dict]:
    """The spheres by the names of their tensors, for who reads the checkpoint: `names`, `rows` (each row is one), `radii`."""
    names = {p: name for name, p in net.named_parameters()}
    groups = (optimizer.meter if isinstance(optimizer, WholeSpaceSGD) else optimizer).param_groups
    found = [g for g in groups if g["sphere"]]
    return [{"names": [names[p] for p in g["params"]], "rows": g["sphere"] == "row", "radii": g["radii"]} for g in found]


def finished(path: Path, epochs: int) -> bool:
    """Whether a log without a checkpoint holds the whole run."""
    try:
        log, problem = regimes.read_log(path)
    except ValueError:
        return False
    return not problem and log["epoch"][-1] >= epochs


def job(argv: list[str], number: int, pairs: list[tuple[float, int]], epochs: int) -> None:
    """One of the processes of --jobs: the same command, but only these runs."""
    args, data = parse([x for x in argv if x != "--force"])
    args.job = number
    with Runner(args, partial(train, args, data)) as runner, suppress(Stopped, KeyboardInterrupt):
        for pair in pairs:
            runner.run(*pair, epochs, patient=False, quiet=True)


def main(argv: list[str] | None = None) -> int:
    args, data = parse(sys.argv[1:] if argv is None else argv)
    with Runner(args, partial(train, args, data), job) as runner:
        try:
            seeds = range(args.seed, args.seed + args.seeds)
            for seed in seeds:
                if str(seed) not in args.chance:
                    args.chance[str(seed)] = measure_chance(args, data, seed)
            versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
            more = {"chance": args.chance, "versions": versions, "threads": args.threads, "command": args.command}
            write_config(args.out, args.config | more)
            sweep(args.rates, seeds, args.epochs, runner, args.out, args.title, args.refine, args.max_epochs)
        except (Stopped, KeyboardInterrupt):
            print(f"interrupted; the finished rows are in {args.out}, and the same command goes on from there", file=sys.stderr)
            return 128 + (args.signals or [signal.SIGINT])[-1]
        except (OSError, Busy) as error:
            print(f"train.py: error: {error}", file=sys.stderr)
            return 1
    return 1 if runner.failed else 0


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step, which would otherwise be fetched, page by page and zeroed, from the system
    again: with large activations that takes as long as the arithmetic. Elsewhere than on Linux nothing changes."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, -1)  # M_MMAP_MAX: all from the heap; M_TRIM_THRESHOLD: which never shrinks


# --------------------------------------------------------------------------------------------------------- the command line


def number(kind: type, low: float = 0, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of that kind, low < number < high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            what = f"{'whole' if kind is int else 'finite'} number above {low}" + f" and below {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
        return value

    return parse


def schedule(text: str) -> tuple[float | None, Callable[[int], Callable[[int], float]]]:
    """An argparse type: `constant`, `cosine`, or values by epoch, "0:1e-2,20:1e-4". Gives (first value or None, a function of the
    number of epochs, which makes the factor of the learning rate after t epochs)."""
    if text == "constant":
        return None, lambda epochs: lambda t: 1.0
    if text == "cosine":
        return None, lambda epochs: lambda t: (1 + math.cos(math.pi * t / epochs)) / 2
    try:
        starts, values = zip(*((int(e), number(float)(v)) for e, v in (x.split(":") for x in text.split(","))), strict=True)
        if starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError
    except (ValueError, argparse.ArgumentTypeError):
        message = f'{text!r} is neither constant nor cosine nor rates by epoch, as in "0:1e-2,20:1e-4"'
        raise argparse.ArgumentTypeError(message) from None
    return values[0], lambda epochs: lambda t: values[np.searchsorted(starts, t, side="right") - 1] / values[0]


DEFAULTS = dict(data="digits", data_root=Path("data"), batch_size=16, loss="ce", width=8, sphere="network")
DEFAULTS |= dict(dtype="fp32", alphas=[1.0, 2.0, 4.0], steps=100, then_epochs=20, then_orders=1)
IDENTITY = """space wd momentum schedule data image_size train_size label_noise augment model width affine train_head sphere
    head_lr loss batch_size full_batch eval_train alphas steps init average dtype device""".split()  # common to a folder
OF_IMAGES = """data data_root image_size train_size label_noise augment loss width affine train_head head_lr batch_size full_batch
    eval_train average dtype graph""".split()


def parser() -> argparse.ArgumentParser:
    parser = regimes.Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Train on the sphere at a fixed effective learning rate (ELR) and name the regime.",
        epilog="example: python train.py --sweep 1e-4 1 13 --epochs 40",
    )
    flag = dict(action="store_true", default=None)
    add = parser.add_argument_group("which runs").add_argument
    add("--elr", nargs="+", type=number(float), metavar="ELR", help="one run at each of these ELRs")
    text = "N ELRs from LO to HI, log-spaced; alone: 1e-4 1 13 (toy: 1e-2 1e2 13)"
    add("--sweep", nargs="*", metavar="LO HI N", help=text)
    add("--refine", type=number(int), default=0, metavar="N", help="then bisect both boundaries of the regimes N times")
    add("--max-epochs", type=number(int), help="refine: go on with an undecided run up to here (default: 4 times --epochs)")
    add("--seed", type=int, default=0, help="of initialization and order of batches (default: %(default)s)")
    add("--seeds", type=number(int), default=1, metavar="K", help="this many seeds of each run, from --seed on (default: 1)")
    add("--epochs", type=number(int), default=20, help="passes over the training set (default: %(default)s)")
    add("--init", type=Path, metavar="PT", help="start every run from this checkpoint instead of a random point")
    add("--then", type=number(float), metavar="ELR", help="from the end of each run, another run at this ELR")
    add("--then-epochs", type=number(int), help="of those second runs (default: 20)")
    add("--then-orders", type=number(int), metavar="K", help="K second runs, with other orders of the batches (default: 1)")
    add("--average", type=number(int), metavar="K", help="also test the mean of the last K epochs' weights")
    add = parser.add_argument_group("the step").add_argument
    add("--sphere", choices=("network", "layer", "row"), help="which tensors share a norm (default: network)")
    add("--momentum", type=number(float, 0, 1), help="β of the heavy ball (default: none)")
    text = 'constant, cosine, or values by epoch, "0:1e-2,20:1e-4", in the place of --elr (default: constant)'
    add("--schedule", default="constant", help=text)
    add("--head-lr", type=number(float), help="learning rate off the spheres (default: ELR times squared radius)")
    add("--full-batch", **flag, help="one step per epoch, along the gradient of the whole set, summed batch by batch")
    add("--space", choices=("sphere", "whole"), default="sphere", help="whole: conventional SGD, on no sphere (default: sphere)")
    add("--lr", nargs="+", type=number(float), help="whole space: one run at each of these learning rates")
    add("--wd", type=number(float), help="whole space: weight decay (default: none)")
    add = parser.add_argument_group("the network").add_argument
    text = f"{', '.join(MODELS)}, toy, or FILE.py:FUNCTION of (channels, classes) (default: convnet)"
    add("--model", default="convnet", help=text)
    add("--width", type=number(int), help="width k of our networks (default: 8)")
    add("--affine", **flag, help="train the BatchNorms' scales and shifts, too")
    add("--train-head", **flag, help="train the last layer, too")
    add("--loss", choices=tuple(LOSSES), help="cross-entropy, or squared error to one-hot labels (default: ce)")
    add("--alphas", nargs="+", type=number(float), metavar="A", help="toy: α of each group (default: 1 2 4)")
    add("--steps", type=number(int), help="toy: steps per epoch (default: 100)")
    add = parser.add_argument_group("the data").add_argument
    add("--data", help=f"{', '.join(NAMES)}, or a folder with train/ and test/ (default: digits)")
    add("--data-root", type=Path, metavar="DIR", help="where data sets are downloaded and cached (default: data)")
    add("--image-size", type=number(int, 7), metavar="S", help="bring a folder's images to S × S")
    add("--batch-size", type=number(int), help="images per step (default: 16)")
    add("--train-size", type=number(int), metavar="N", help="train on N images drawn at random (default: all)")
    add("--label-noise", type=number(float, 0, 1), metavar="P", help="give this share of the training images a wrong label")
    add("--augment", **flag, help="random crops and flips of the training images")
    add("--eval-train", **flag, help="also measure loss, error and gradient on the whole training set after each epoch")
    add = parser.add_argument_group("the machine and the files").add_argument
    add("--jobs", type=number(int), default=1, metavar="N", help="runs at a time, each in a process of its own (default: 1)")
    add("--threads", type=number(int), metavar="T", help="CPU threads of each process (default: all, shared out)")
    text = "of the network's arithmetic; weights and step stay float32 (default: fp32)"
    add("--dtype", choices=("fp32", "bf16"), help=text)
    add("--graph", **flag, help="GPU: capture each step in a CUDA graph and replay it")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda if there, else cpu)")
    add("--out", type=Path, metavar="DIR", help="folder to write into (default: logs/<data>-<model>)")
    add("--checkpoint-every", type=number(int), default=1, metavar="N", help="epochs from checkpoint to checkpoint (default: 1)")
    add("--force", action="store_true", help="start afresh: remove the runs in --out first")
    return parser


class Refused(Exception):
    """An option, by name, and why it cannot be."""


def parse(argv: list[str]) -> tuple[Namespace, Data | None]:
    """The options, checked, and the data (None: the toy has none). Adds to the options what follows from them: rates, make,
    layer_groups, init_state, title, config and chance. Refuses in one line, with exit status 2, before anything is written."""
    cli = parser()
    args = cli.parse_args(argv)
    given = vars(args).copy()
    args.argv, args.job = argv, 0
    args.command = {name: str(x) if isinstance(x, Path) else x for name, x in given.items()}  # as it was given, to be kept
    for name, value in DEFAULTS.items():
        setattr(args, name, given[name] or value)
    try:
        check_options(args, given)
        choose_machine(args)
        data = None if args.model == "toy" else read_data(args)
        make_network(args, data)
        open_out(args, given["schedule"])
    except Refused as refused:
        name, why = refused.args
        cli.error(f"argument --{name.replace('_', '-')}: {why}" if name else why)
    return args, data


def check_options(args: Namespace, given: dict) -> None:
    """What needs no data: which options go together, and which rates to run."""
    toy, whole, own_file = args.model == "toy", args.space == "whole", ":" in args.model

    def only(names: list[str], condition: bool, why: str) -> None:
        for name in names:
            if not condition and given[name] not in (None, False, 0):
                raise Refused(name, f"{why}: leave it out")

    only(OF_IMAGES, not toy, "the toy has no data set and no layers")
    only(["alphas", "steps"], toy, "this is for --model toy")
    only(["width", "affine", "train_head"], not own_file, f"this is for our own networks; {args.model} has its own")
    only(["lr", "wd"], whole, "this is for --space whole; on the sphere there are --elr and --head-lr")
    only(["elr", "sweep", "refine", "sphere", "head_lr"], not whole, "in the whole space there is --lr, and no sphere")
    only(["image_size"], args.data not in NAMES, "this is for --data FOLDER")
    only(["data_root"], args.data != "digits", "the digits come with the repository")
    try:
        first, args.schedule = schedule(args.schedule)
    except argparse.ArgumentTypeError as error:
        raise Refused("schedule", str(error)) from None
    said = sum(given[name] is not None for name in ("elr", "sweep", "lr")) + (first is not None)
    if said != 1:
        ways = "--elr ELR, --sweep or a --schedule of values" if not whole else "--lr LR or a --schedule of values"
        raise Refused("", f"one of {ways} must say which rates to run" + (", and only one" if said else ""))
    default = ["1e-2", "1e2", "13"] if toy else ["1e-4", "1", "13"]
    args.rates = [first] if first else args.elr or args.lr or sweep_elrs(args.sweep or default)
    args.rates = list(dict.fromkeys(float(f"{rate:.9g}") for rate in args.rates))  # as many digits as the logs keep
    only(["refine"], len(args.rates) > 1, "it takes a sweep, or several ELRs, between which to bisect")
    only(["refine"], given["schedule"] == "constant", "a regime belongs to a constant ELR")
    only(["max_epochs"], args.refine, "this is for --refine")
    only(["then_epochs", "then_orders"], args.then, "this is for --then")
    only(["then"], given["schedule"] == "constant" and not whole, "it takes a constant ELR, on the sphere")
    only(["graph"], not whole and not args.full_batch, "this is for steps of one batch on the sphere")
    if (args.average or 0) > args.epochs:
        raise Refused("average", f"{args.average} is more than the {args.epochs} epochs")
    args.max_epochs = args.max_epochs or 4 * args.epochs
    if args.max_epochs < args.epochs:
        raise Refused("max_epochs", f"{args.max_epochs} is less than --epochs {args.epochs}")
    if not 0 <= args.seed < 2**31 - args.seeds:
        raise Refused("seed", f"{args.seed} is not between 0 and 2147483647")


def sweep_elrs(texts: list[str]) -> list[float]:
    try:
        low, high, n = number(float)(texts[0]), number(float)(texts[1]), number(int)(texts[2])
        if len(texts) != 3 or not low < high or n < 2:
            raise IndexError
    except argparse.ArgumentTypeError as error:
        raise Refused("sweep", str(error)) from None
    except IndexError:
        why = f"{' '.join(texts)} is not LO HI N with LO < HI and N ≥ 2, as in --sweep 1e-4 1 13"
        raise Refused("sweep", why) from None
    return grid(low, high, n)


def choose_machine(args: Namespace) -> None:
    """Device, threads, and which of torchrun's ranks this is."""
    args.rank, args.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.force and args.ranks > 1:
        raise Refused("force", "the ranks of torchrun share the folder and would remove each other's runs: remove it before")
    args.threads = args.threads or max(1, torch.get_num_threads() // args.jobs)
    torch.set_num_threads(args.threads)
    keep_memory()
    local = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    args.device = args.device or (local if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        why = f"{args.device!r} cannot be used here ({str(error).splitlines()[0]}); cpu always can"
        raise Refused("device", why) from None
    if args.graph and "cuda" not in args.device:
        raise Refused("graph", "this is for a GPU: leave it out")


def read_data(args: Namespace) -> Data:
    try:
        data = load(args.data, args.data_root, args.image_size, args.device)
    except ValueError as error:
        raise Refused("data", str(error)) from None
    if (args.train_size or 0) > len(data.x):
        raise Refused("train_size", f"{args.train_size} is more than the {len(data.x)} training images")
    if args.train_size:
        subset(data, args.train_size)
    if args.label_noise and not round(args.label_noise * len(data.x)):
        raise Refused("label_noise", f"{args.label_noise:g} of {len(data.x)} training images is none")
    if args.label_noise:
        add_label_noise(data, args.label_noise)
    if args.batch_size > len(data.x):
        raise Refused("batch_size", f"{args.batch_size} is more than the {len(data.x)} training images")
    return data


def make_network(args: Namespace, data: Data | None) -> None:
    """How to make it (`make`), what is on which sphere (`layer_groups`), the checkpoint to start from (`init_state`)."""
    try:
        args.make = builder(vars(args))
        torch.manual_seed(args.seed)
        net = args.make(*(data.x.shape[1], data.classes) if data else ()).to(args.device)
        x = data.images(torch.arange(min(32, len(data.x)), device=args.device)) if data else None
        args.layer_groups = layer_groups(net, x, data.classes if data else None, args.sphere)
    except ValueError as error:
        raise Refused("model", str(error)) from None
    on_spheres = {name for group in args.layer_groups for name in group}
    if args.head_lr and not any(p.requires_grad and name not in on_spheres for name, p in net.named_parameters()):
        raise Refused("head_lr", f"all that {args.model} trains is on the spheres; leave it out")
    args.init_state = None
    if args.init:
        try:
            args.init_state = load_checkpoint(args.init, None, args.device)
            net.load_state_dict(args.init_state["net"])
        except (ValueError, OSError, RuntimeError, TypeError) as error:
            why = "there is no such file" if args.init_state is None and not args.init.exists() else str(error).splitlines()[0]
            raise Refused("init", why if str(args.init) in why else f"{args.init}: {why}") from None
        args.init = str(args.init)


def open_out(args: Namespace, schedule: str) -> None:
    """The folder to write into, whose runs must have the same options, and the figure's title."""
    toy, whole = args.model == "toy", args.space == "whole"
    name = "toy" if toy else f"{Path(args.data).name}-{args.model.rpartition(':')[2]}"
    args.out = args.out or Path("logs") / (name + "-whole" * whole)
    args.title = "toy, α = " + ", ".join(f"{a:g}" for a in args.alphas) if toy else f"{args.data}, {args.model}"
    args.title += f" of width {args.width}" * (args.model in MODELS) + (", whole space" if whole else f", sphere: {args.sphere}")
    values = {**vars(args), "schedule": schedule, "device": args.device.split(":")[0]}
    identity = {name: values[name] for name in IDENTITY if name not in (OF_IMAGES if toy else ("alphas", "steps"))}
    identity |= {"epochs": args.epochs} if schedule == "cosine" or args.average else {}
    try:
        args.config = open_folder(args.out, identity, args.force)
        args.chance = regimes.read_chance(args.out)
    except ValueError as error:
        raise Refused("out", str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
