"""Train a scale-invariant network on the sphere and name the regime that it falls into.

    python train.py --elr 0.01                one run at this effective learning rate (ELR)
    python train.py --elr 1e-4 1e-3 1e-2      these runs
    python train.py --sweep 1e-4 1 13         13 ELRs, log-spaced (`--sweep` alone does the same)
    python train.py --sweep --seeds 3 --refine 3      three seeds each, both boundaries bisected
    python train.py --angle 0.05              an angle per step, falling along a cosine: no ELR
    python train.py --lr 0.05 --wd 5e-3       ordinary training, and the ELR that it implies

Writes into --out (default logs/<data>-<model>): elr=1e-02.csv, a row per epoch; .layers.csv, a row
per epoch and tensor; .pt, the checkpoint; config.json, regimes.csv, regimes.png. The same command
goes on where it stopped. Regimes: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695).
"""

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
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import figures
import measure
import regimes
from data import Data, batches, chunks
from graph import Captured
from models import LOSSES, build
from options import again, parse
from runs import (
    Busy,
    Rows,
    bisect,
    load_checkpoint,
    lock,
    name_of,
    run_all,
    save_checkpoint,
    write_config,
)
from sphere_step import SphereSGD

COLUMNS = (
    "epoch step elr train_loss train_error grad_norm angle radial test_loss test_error".split()
)
COLUMNS += ["seconds", "distance"]
NOISE_COLUMNS = ["clean_error", "noisy_error"]
AVERAGE_COLUMNS = ["avg_train_loss", "avg_test_error"]
LAYER_COLUMNS = ["epoch", "layer", "norm", "elr", "grad_norm", "angle"]
KEPT = 256  # steps whose statistics are kept as tensors before they are summed up


class Run:
    """One run: the network, its optimizer, the order of its batches; it saves and loads itself.

    `value` is its ELR, angle or learning rate. The same seed gives every value the same start,
    unless there is a checkpoint `init`, and the same order of batches.
    """

    def __init__(self, options: Namespace, data: Data, value: float, seed: int, init: dict | None):
        self.options, self.data, self.value = options, data, value
        torch.manual_seed(seed)
        self.net = build(vars(options), data).to(options.device)
        if init:
            self.net.load_state_dict(init["net"])
        self.make_optimizer()
        self.spheres = measure.spheres_of(self.net, self.sphere)
        self.start = measure.vectors(self.net, self.spheres)
        self.order = torch.Generator().manual_seed(seed)
        self.averaged = AveragedModel(self.net) if options.average else None
        self.one_step = Captured(self.step) if options.graph else self.step
        self.epoch, self.seconds, self.ended = -1, 0.0, False

    def make_optimizer(self) -> None:
        """What is scale invariant on spheres, the rest by plain SGD. In the whole space all is by
        torch's SGD, and the spheres only measure."""
        options, net = self.options, self.net
        groups = [[net.get_parameter(name) for name in names] for names in options.layer_groups]
        on_spheres = [p for group in groups for p in group]
        trained = [p for p in net.parameters() if p.requires_grad]
        momentum = options.momentum or 0.0
        self.plain = None
        if options.mode == "lr":
            more = dict(momentum=momentum, weight_decay=options.wd or 0.0)
            self.plain = torch.optim.SGD(trained, lr=self.value, **more)
            self.sphere = SphereSGD(on_spheres, lr=0.0)
            return
        if options.sphere != "layer":
            groups = [on_spheres]
        kind = "row" if options.sphere == "row" else "group"
        groups = [dict(params=group, sphere=kind, lr=self.value) for group in groups]
        rest = [p for p in trained if all(p is not q for q in on_spheres)]
        if rest:  # at the learning rate that matches the sphere of the whole network, η = η̃ρ²
            square = sum(p.detach().square().sum().item() for p in on_spheres)
            head = dict(params=rest, sphere=None, lr=options.head_lr or self.value * square)
            if options.mode == "angle":  # what the step on the sphere implies, unless it is given
                head["angle"] = options.head_lr is None
                head["lr"] = options.head_lr or self.value
            groups.append(head)
        if options.graph:  # which reads the learning rates from the device's memory
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=options.device)
        angle = options.mode == "angle"
        self.sphere = SphereSGD(groups, lr=self.value, momentum=momentum, angle=angle)

    def step(self, index: Tensor) -> tuple[Tensor, ...]:
        """One step of training on one batch. To change what a step does, change this."""
        x, y = self.data.inputs(index, self.options.augment), self.data.y[index]
        logits = measure.logits_of(self.net, x, self.options.dtype)
        loss = LOSSES[self.options.loss](logits, y)
        self.zero_grad()
        loss.backward()
        self.move()
        wrong = logits.detach().argmax(1) != y
        return loss.detach(), wrong, *self.sphere.last

    def full_step(self, indices: list[Tensor]) -> tuple[Tensor, ...]:
        """One step along the gradient of the whole training set, summed batch by batch."""
        losses, wrong, n = [], [], len(self.data.x)
        self.zero_grad()
        for index in indices:
            x, y = self.data.inputs(index, self.options.augment), self.data.y[index]
            logits = measure.logits_of(self.net, x, self.options.dtype)
            loss = LOSSES[self.options.loss](logits, y) * (len(index) / n)
            loss.backward()
            losses.append(loss.detach())
            wrong.append(logits.detach().argmax(1) != y)
        self.move()
        return torch.stack(losses).sum(), torch.cat(wrong), *self.sphere.last

    def zero_grad(self) -> None:
        optimizer = self.plain or self.sphere
        optimizer.zero_grad(set_to_none=not self.options.graph)  # a graph knows them by address

    def move(self) -> None:
        if self.epoch < 0:  # epoch 0 stands still: the row before training
            self.sphere.measure()
        elif self.plain:
            self.sphere.measure()
            self.plain.step()
        else:
            self.sphere.step()

    def train_epoch(self) -> tuple[dict[str, float], list[list[float]]]:
        """One pass over the training set. Returns its row, and per tensor on a sphere the means
        over the steps of norm, ELR, γ and φ. The host waits for the device once, at the end."""
        options, device = self.options, self.data.x.device
        self.net.train()
        lr = self.set_lr()
        step, n = self.step if self.epoch < 0 else self.one_step, len(self.data.x)
        steps = batches(n, options.batch_size, self.order, device)
        if options.full_batch:
            step, steps = self.full_step, [chunks(n, options.batch_size, device)]
        sums, layers = 0, 0
        for first in range(0, len(steps), KEPT):
            some = steps[first : first + KEPT]
            more, of_layers = self.summary([step(index) for index in some], some)
            sums, layers = sums + more, layers + of_layers
        names = ["train_loss", "train_error", "elr", "grad_norm", "angle", "radial", "noisy"]
        means = (sums / len(steps)).tolist()
        row = dict(zip(names + NOISE_COLUMNS, means, strict=False))
        if options.mode == "elr":
            row["elr"] = lr
        if options.label_noise:  # an epoch leaves out the last batch, and may have seen one kind
            noisy = row["noisy"]
            row["clean_error"] = row["clean_error"] / (1 - noisy) if noisy < 1 else math.nan
            row["noisy_error"] = row["noisy_error"] / noisy if noisy else math.nan
        self.epoch += 1
        row |= {"epoch": self.epoch, "step": self.epoch * len(steps)}
        return row, (layers / len(steps)).tolist()

    def summary(self, kept: list[tuple], indices: list) -> tuple[Tensor, Tensor]:
        """Sums over these steps: of loss, error, ELR, γ, φ and |radial| (of several spheres the
        norm of their γ, the means of the others), and per tensor of norm, ELR, γ and φ."""
        losses, wrong, *last = zip(*kept, strict=True)
        steps = list(zip(*last, strict=True))
        stats, layers = self.sphere.stats(steps), self.sphere.layer_stats(steps)
        if self.plain:  # the ELR that ordinary training implies
            group = self.plain.param_groups[0]
            pace = group["lr"] / (1 - group["momentum"])
            stats["elr"], layers["elr"] = pace / stats["radius"] ** 2, pace / layers["norm"] ** 2
            for found in (stats, layers):
                found["angle"] = (found["elr"] * found["grad_norm"]).atan()
        wrong = torch.stack(wrong).double()
        columns = [torch.stack(losses).double(), wrong.mean(1)]
        gamma, elr = stats["grad_norm"].norm(dim=1), stats["elr"].mean(1)
        if self.options.mode == "angle":  # tan φ/γ of the means: in some steps γ is next to 0
            elr = 0 * gamma + stats["angle"].tan().mean() / stats["grad_norm"].mean()
        columns += [elr, gamma]
        columns += [stats["angle"].mean(1), stats["radial"].abs().mean(1)]
        if self.options.label_noise:
            index = torch.stack([i if isinstance(i, Tensor) else torch.cat(i) for i in indices])
            noisy = self.data.noisy[index].double()
            columns += [noisy.mean(1), (wrong * (1 - noisy)).mean(1), (wrong * noisy).mean(1)]
        layers = torch.stack([layers[name] for name in LAYER_COLUMNS[2:]], -1)
        return torch.stack(columns).sum(1), layers.sum(0)

    def set_lr(self) -> float:
        """The learning rates of the coming epoch. Returns that of the spheres."""
        t, factor, starts = max(self.epoch, 0), 1.0, self.options.starts
        if self.options.schedule == "cosine":
            factor = (1 + math.cos(math.pi * t / self.epochs)) / 2
        elif starts:
            factor = [value for epoch, value in starts if epoch <= t][-1] / starts[0][1]
        for group in (self.plain or self.sphere).param_groups:
            first = group.setdefault("first_lr", float(group["lr"]))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(first * factor)
            else:
                group["lr"] = first * factor
        return self.value * factor

    def measure(self, row: dict) -> None:
        """The columns of a row that are measured after the epoch."""
        options, net, data = self.options, self.net, self.data
        row |= measure.on_test_set(net, data, options)
        if options.eval_train:
            row |= measure.full_pass(net, data, self.sphere, options)
        now = measure.vectors(net, self.spheres)
        row["distance"] = measure.angles(self.start, now).mean().item()
        if self.averaged:
            row |= dict.fromkeys(AVERAGE_COLUMNS, math.nan)
            if self.epoch > self.epochs - options.average:
                self.averaged.update_parameters(net)
                spheres = self.spheres if options.mode != "lr" else []
                row |= measure.on_average(self.averaged, spheres, data, options)

    def train(self, epochs: int, path: Path, name: str, tell: Callable) -> None:
        """Epochs up to this one, each with its rows in the logs and a checkpoint."""
        options, self.epochs = self.options, epochs
        columns = list(COLUMNS)
        if options.label_noise:
            columns += NOISE_COLUMNS
        if options.eval_train:
            columns += measure.FULL_PASS.split()
        if options.average:
            columns += AVERAGE_COLUMNS
        layers = [layer for group in options.layer_groups for layer in group]
        layers = [
            f"'{x}" if x[0] in "=+-@\t\r" else x for x in layers
        ]  # no formulas in spreadsheets
        rows = Rows(path, columns, self.epoch)
        layer_rows = Rows(path.with_suffix(".layers.csv"), LAYER_COLUMNS, self.epoch)
        began = time.perf_counter() - self.seconds
        try:
            while self.epoch < epochs and not self.ended:
                row, of_layers = self.train_epoch()
                self.measure(row)
                self.seconds = row["seconds"] = time.perf_counter() - began
                rows.add([row[column] for column in columns])
                named = zip(layers, of_layers, strict=True)
                layer_rows.add(*([self.epoch, layer, *values] for layer, values in named))
                self.ended = not (
                    math.isfinite(row["train_loss"]) and math.isfinite(row["grad_norm"])
                )
                self.save(path)
                shown = f"loss {row['train_loss']:.3g}, error {row['train_error']:.3g}"
                tell("epoch", name, self.epoch, epochs, f"{shown}, γ {row['grad_norm']:.3g}")
        finally:
            rows.close()
            layer_rows.close()

    def save(self, path: Path) -> None:
        state = {"epoch": self.epoch, "seconds": self.seconds, "ended": self.ended}
        state |= {"net": self.net.state_dict(), "sphere": self.sphere.state_dict()}
        state |= {"plain": self.plain.state_dict() if self.plain else None}
        state |= {"order": self.order.get_state(), "random": torch.get_rng_state()}
        state |= {"averaged": self.averaged.state_dict() if self.averaged else None}
        state |= {"start": self.start, "spheres": self.spheres, "origin": self.origin}
        if "cuda" in self.options.device:
            state["cuda"] = torch.cuda.get_rng_state(self.options.device)
        save_checkpoint(path.with_suffix(".pt"), self.identity, state)

    def load(self, state: dict) -> None:
        self.epoch, self.seconds, self.ended = state["epoch"], state["seconds"], state["ended"]
        self.net.load_state_dict(state["net"])
        self.sphere.load_state_dict(state["sphere"])
        if self.plain:
            self.plain.load_state_dict(state["plain"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        self.start = state["start"]
        self.order.set_state(state["order"].cpu())
        torch.set_rng_state(state["random"].cpu())
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.options.device)


def train(options: Namespace, data: Data, pair: tuple, tell: Callable, patient: bool) -> tuple:
    """One run (value, seed) to its verdict, and then the runs that start from its end. What is
    finished is not done again. Returns its name and the verdict in words. Raises Busy where another
    process is at it, unless `patient`."""
    (value, seed), (path, name) = pair, name_of(options, pair)
    job = Namespace(value=value, seed=seed, order=seed, init=options.init_state)
    job.path, job.name = path, name
    with lock(path.with_suffix(".lock"), patient):
        done, epochs = True, options.epochs
        while True:
            done = not train_one(options, data, job, epochs, tell) and done
            run = regimes.read_run(path, options.chance)
            verdict = run.verdict
            more = min(verdict.more_epochs or 0, options.max_epochs or 0)
            if verdict.regime != "undecided" or more <= epochs:
                break
            epochs = more
        after = second_runs(options, data, job, tell)
    again = " (already done)" if done else ""
    text = f"{again}: {regimes.title(verdict.regime)}: {verdict.why}"
    if verdict.moves:
        text = f"{again}: {regimes.way(run, regimes.read_folder(options.out))}"
    return name, f"{text}; test error {run.log['test_error'][-1]:.3f}{after}"


def second_runs(options: Namespace, data: Data, first: Namespace, tell: Callable) -> str:
    """The runs that --then asks for, from the end of this one; what they gave, in words."""
    text = ""
    for i in range(options.then_orders if options.then else 0):
        init = load_checkpoint(first.path.with_suffix(".pt"), None, options.device)
        if init is None:
            what = f"{first.path.with_suffix('.pt')} is gone, from which to go on"
            raise ValueError(f"{what}: remove {first.path.name}, and it is made again")
        then = f".then={regimes.elr_name(options.then)}" + (f".order={i}" if i else "") + ".csv"
        job = Namespace(**vars(first))
        job.value, job.path, job.init = options.then, first.path.with_suffix(then), init
        job.name, job.order = f"{first.name}, then {options.then:g}", first.seed + 1000 * i
        train_one(options, data, job, options.then_epochs, tell)
        log = regimes.read_log(job.path)[0]
        text += f"; then at {options.then:g}: train loss {log['train_loss'][-1]:.3g}"
        text += f", test error {log['test_error'][-1]:.3f}"
    return text


def train_one(options: Namespace, data: Data, job: Namespace, epochs: int, tell: Callable) -> bool:
    """A single run, from where its checkpoint left off. Returns whether there was work to do."""
    identity = {**options.config["options"], "value": job.value, "mode": options.mode}
    identity |= {"seed": job.seed, "order_seed": job.order}
    if options.schedule == "cosine":
        identity["epochs"] = epochs
    origin = job.init and job.init["checksum"]
    last = load_checkpoint(job.path.with_suffix(".pt"), identity, options.device)
    if last and last["origin"] != origin:  # what it started from has gone on since
        last = None
    if last and (last["epoch"] >= epochs or last["ended"]):
        return False
    if last is None and job.init is None:  # a log without a checkpoint may hold the whole run
        with suppress(ValueError):
            log, problem = regimes.read_log(job.path)
            if not problem and log["epoch"][-1] >= epochs:
                return False
    run = Run(options, data, job.value, job.seed, job.init)
    run.identity, run.origin = identity, origin
    run.order.manual_seed(job.order)
    if last:
        run.load(last)
    run.train(epochs, job.path, job.name, tell)
    if run.ended:
        what = f"stopped: loss or gradient is not finite in epoch {run.epoch}"
        tell("note", f"{job.name} stopped", f"{job.name}: {what}")
    return True


def measure_chance(options: Namespace, data: Data, seed: int) -> dict:
    """Loss and error at random points of this seed's spheres."""
    options = Namespace(**{**vars(options), "mode": "elr", "graph": None, "average": None})
    run = Run(options, data, 1.0, seed, options.init_state)
    return measure.chance(run.net, run.sphere, data, options, seed)


def report(options: Namespace, last: bool = False) -> list[regimes.Run]:
    """regimes.csv and regimes.png of all runs in the folder. The picture is left for later where
    drawing would take more than a tenth of the time."""
    runs, began = regimes.read_folder(options.out), time.monotonic()
    if runs and not options.rank:
        regimes.write_csv(options.out / "regimes.csv", regimes.rows(runs))
        options.stale = options.stale or not last
        if options.stale and (last or began > options.next_drawing):
            figures.of_sweep(runs, options.out / "regimes.png", options.title)
            ended = time.monotonic()
            options.stale, options.next_drawing = False, ended + 10 * (ended - began)
    return runs


def what_next(options: Namespace, runs: list[regimes.Run]) -> list[str]:
    """The paper's advice made concrete: start just above the boundary of convergence and go on well
    inside it, at a tenth. And the angle, which needs no sweep."""
    lines = []
    try:
        boundary = regimes.boundaries(runs)[0]
    except ValueError:
        boundary = None
    if boundary and boundary.seen:
        elr, then = boundary.high, float(f"{boundary.low / 10:.2g}")
        lines.append("next: " + again(options, "--elr", f"{elr:g}", "--then", f"{then:g}"))
        given = [run.final("then_test_error") for run in runs if run.elr == elr and run.then]
        if given:
            lines[-1] += f"  (gave test error {sorted(given)[len(given) // 2]:.3f} here)"
    if options.mode != "angle":
        lines.append("next: " + again(options, "--angle", "0.05"))
    return lines


def main(argv: list[str] | None = None) -> int:
    options, data = parse(sys.argv[1:] if argv is None else argv)
    options.signals = []

    def stop(number: int, _) -> None:
        options.signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    keep_memory()
    do, renew = partial(train, options, data), partial(report, options)
    options.stale, options.next_drawing = True, 0.0
    seeds = range(options.seed, options.seed + options.seeds)
    try:
        for seed in seeds:
            if str(seed) not in options.chance:
                options.chance[str(seed)] = measure_chance(options, data, seed)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        given = {k: str(x) if isinstance(x, Path) else x for k, x in options.given.items()}
        more = {"chance": options.chance, "versions": versions, "command": given}
        more |= {"threads": options.threads, "jobs": options.jobs}
        write_config(options.out, options.config | more)
        values = options.values
        pairs = [(value, seed) for seed in seeds for value in values]
        failed = run_all(do, pairs, options, renew)
        for _ in range(options.refine):
            new = bisect(options.out, values)
            values = values + new
            pairs = [(value, seed) for seed in seeds for value in new]
            failed = run_all(do, pairs, options, renew) or failed
        runs = report(options, last=True)
    except KeyboardInterrupt:
        what = f"the finished rows are in {options.out}, and the same command goes on from there"
        print(f"interrupted; {what}", file=sys.stderr)
        return 128 + options.signals[-1]
    except (OSError, Busy) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    if options.rank == 0 and runs:
        if len(values) * len(seeds) > 1:
            print(regimes.table(runs))
        print(f"written: {options.out / 'regimes.csv'}, {options.out / 'regimes.png'}")
        print("\n".join(what_next(options, runs)))
    return 1 if failed else 0


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step, which would otherwise be fetched from the
    system again, page by page and zeroed: with large activations that takes as long as the
    arithmetic. Elsewhere than on Linux nothing changes."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone away: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
