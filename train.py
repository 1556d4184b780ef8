"""Train a scale-invariant network on the sphere and name the regime that it falls into.

    python train.py --elr 0.01                one run at this effective learning rate (ELR)
    python train.py --sweep 1e-4 1 13         13 ELRs, log-spaced (`--sweep` alone does the same)
    python train.py --angle 0.05              an angle per step, falling along a cosine: no ELR
    python train.py --lr 0.05 --wd 5e-3       ordinary training, and the ELR that it implies

Writes into --out (default logs/<data>-<model>): elr=1e-02.csv, a row per epoch; .layers.csv, a row
per epoch and tensor; .pt, the checkpoint; config.json, regimes.csv, regimes.png. The same command
goes on where it stopped. Regimes: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695).
"""

import math
import signal
import sys
import time
from argparse import Namespace
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import regimes
from lab import figures, measure, runs
from lab.data import batches
from lab.machine import Captured, keep_memory, start_quickly, use
from lab.options import parse
from lab.own import build
from sphere_step import SphereSGD

COLUMNS = """epoch step elr train_loss train_error grad_norm angle radial test_loss test_error
    seconds distance""".split()
AVERAGE_COLUMNS = ["avg_train_loss", "avg_test_error"]
LAYER_COLUMNS = ["epoch", "layer", *measure.OF_LAYERS]
STATE = ("epoch", "seconds", "ended", "start")  # in a checkpoint, beside the parts
KEPT = 256  # steps whose statistics are kept as tensors before they are summed up


@dataclass
class Job:
    """Which run: its ELR, angle or learning rate, seed, log, name, and the checkpoint that it
    starts from, if any."""

    value: float
    seed: int
    path: Path
    name: str
    init: dict | None = None


class Run:
    """One run: network, optimizer, order of batches; it saves and loads itself. A seed gives every
    value the same start and the same order."""

    def __init__(self, options, data, job):
        self.options, self.data, self.job = options, data, job
        use(options.device, options.dtype)
        torch.manual_seed(job.seed)
        self.net = build(options, data).to(options.device)
        if job.init:
            self.net.load_state_dict(job.init["net"])
        self.spheres = measure.spheres_of(options.layer_groups, options.sphere)
        self.make_optimizer()
        self.start = measure.vectors(self.net, self.spheres)
        self.order = torch.Generator().manual_seed(job.seed)
        self.averaged = AveragedModel(self.net) if options.average else None
        self.one_step = Captured(self.train_step) if options.graph else self.train_step
        self.epoch, self.epochs, self.seconds, self.ended = -1, options.epochs, 0.0, False

    def make_optimizer(self):
        """What is scale invariant on spheres, the rest by plain SGD. In the whole space, --lr, all
        by torch's SGD, and the spheres only measure."""
        options, net, lr = self.options, self.net, self.job.value
        groups = []
        for sphere in self.spheres:
            params = [net.get_parameter(name) for name in sphere["names"]]
            groups.append(dict(params=params, sphere="row" if sphere["rows"] else "group", lr=lr))
        self.on_spheres = [p for group in groups for p in group["params"]]
        trained = [p for p in net.parameters() if p.requires_grad]
        momentum, angle = options.momentum or 0.0, options.mode == "angle"
        self.plain = None
        if options.mode == "lr":
            self.plain = torch.optim.SGD(trained, lr, momentum, weight_decay=options.wd or 0.0)
            self.sphere = SphereSGD(self.on_spheres, lr=0.0)
            return
        known = set(self.on_spheres)
        rest = [p for p in trained if p not in known]
        if rest:  # at the learning rate that matches the sphere of the whole network, η = η̃ρ²
            square = sum(p.detach().square().sum().item() for p in self.on_spheres)
            groups.append(dict(params=rest, sphere=None, lr=lr if angle else lr * square))
        if options.graph:  # which reads the learning rates from the device's memory
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=options.device)
        self.sphere = SphereSGD(groups, lr=lr, momentum=momentum, angle=angle)

    def train_step(self, index):
        """One step of training. To change what a step does, change this."""
        x, y = self.data.inputs(index, self.options.augment), self.data.y[index]
        logits = measure.logits_of(self.net, x, self.options.dtype)
        loss = F.cross_entropy(logits, y)
        self.net.zero_grad(set_to_none=not self.options.graph)  # a graph knows them by address
        loss.backward()
        for p in self.on_spheres:
            if p.grad is None:  # a layer may be left out at random
                p.grad = torch.zeros_like(p)
        if self.epoch < 0 or self.plain:  # epoch 0 stands still: the row before training
            self.sphere.observe()
        if self.epoch >= 0:
            optimizer = self.plain or self.sphere
            optimizer.step()
        return loss.detach(), logits.detach().argmax(1) != y, *self.sphere.last

    def train_epoch(self):
        """One pass over the training set, in which the host waits for the device once. Returns its
        row, and per tensor on a sphere the means of norm, ELR, γ and φ."""
        self.net.train()
        lr = self.set_lr()
        step = self.train_step if self.epoch < 0 else self.one_step
        x, size = self.data.x, self.options.batch_size
        steps = batches(len(x), size, self.order, x.device)
        sums, layers = 0, 0
        for first in range(0, len(steps), KEPT):
            kept = [step(index) for index in steps[first : first + KEPT]]
            if self.epoch < 0 and not first:
                self.first_steps = kept
            more, of_layers = measure.of_steps(kept, self.sphere, self.plain)
            sums, layers = sums + more, layers + of_layers
        row = dict(zip(measure.OF_STEPS, (sums / len(steps)).tolist(), strict=True))
        if self.options.mode == "elr":
            row["elr"] = lr
        self.epoch += 1
        row |= {"epoch": self.epoch, "step": self.epoch * len(steps)}
        return row, (layers / len(steps)).tolist()

    def set_lr(self):
        """The learning rates of this epoch. Returns that of the spheres."""
        factor = 1.0
        if self.options.schedule == "cosine":
            factor = (1 + math.cos(math.pi * max(self.epoch, 0) / self.epochs)) / 2
        for group in (self.plain or self.sphere).param_groups:
            first = group.setdefault("first_lr", float(group["lr"]))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(first * factor)
            else:
                group["lr"] = first * factor
        return self.job.value * factor

    def evaluate(self, row):
        """The columns of a row that are measured after the epoch."""
        options, net, data = self.options, self.net, self.data
        row |= measure.on_test_set(net, data, options.dtype)
        now = measure.vectors(net, self.spheres)
        row["distance"] = measure.angles(self.start, now).mean().item()
        if self.averaged:
            row |= dict.fromkeys(AVERAGE_COLUMNS, math.nan)
            if self.epoch > self.epochs - options.average:
                self.averaged.update_parameters(net)
                row |= measure.on_average(self.averaged, net, self.spheres, data, options.dtype)

    def loop_over_epochs(self, tell):
        """The epochs that are left, each with its rows in the logs and a checkpoint."""
        path, done, before = self.job.path, self.epoch, None
        began = time.perf_counter() - self.seconds
        if done < 0:
            before = self.train_epoch()
            measure.check_gradient(self, before[0]["radial"], tell)
            del self.first_steps  # with many rows it is large
        columns = COLUMNS + AVERAGE_COLUMNS if self.averaged else COLUMNS
        layers = [name for group in self.options.layer_groups for name in group]
        log = runs.Rows(path, columns, done)
        layer_log = runs.Rows(path.with_suffix(".layers.csv"), LAYER_COLUMNS, done)
        with closing(log), closing(layer_log):
            while self.epoch < self.epochs and not self.ended:
                row, of_layers = before or self.train_epoch()
                before = None
                self.evaluate(row)
                self.seconds = row["seconds"] = time.perf_counter() - began
                log.add([row[column] for column in columns])
                named = zip(layers, of_layers, strict=True)
                layer_log.add(*([self.epoch, layer, *values] for layer, values in named))
                loss, error, gamma = row["train_loss"], row["train_error"], row["grad_norm"]
                self.ended = not math.isfinite(loss + gamma)
                self.save()
                shown = f"loss {loss:.3g}, error {error:.3g}, γ {gamma:.3g}"
                tell("epoch", self.job.name, self.epoch, self.epochs, shown)

    def parts(self):
        parts = dict(net=self.net, sphere=self.sphere, plain=self.plain, averaged=self.averaged)
        return {name: part for name, part in parts.items() if part is not None}

    def identity(self):
        """What a checkpoint must share with this run."""
        identity = {**self.options.config["options"], "mode": self.options.mode}
        identity |= {"value": self.job.value, "seed": self.job.seed}
        if self.options.schedule == "cosine":
            identity["epochs"] = self.epochs
        return identity

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {name: getattr(self, name) for name in STATE}
        state |= {"order": self.order.get_state(), "random": torch.get_rng_state()}
        state |= {"spheres": self.spheres, "origin": self.job.init and self.job.init["checksum"]}
        if "cuda" in self.options.device:
            state["cuda"] = torch.cuda.get_rng_state(self.options.device)
        runs.save_checkpoint(self.job.path.with_suffix(".pt"), self.identity(), state)

    def load(self):
        """Go on from the checkpoint, if there is one from the same start."""
        path = self.job.path.with_suffix(".pt")
        state = runs.load_checkpoint(path, self.identity(), self.options.device)
        if state is None or state["origin"] != (self.job.init and self.job.init["checksum"]):
            return
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for name in STATE:
            setattr(self, name, state[name])
        self.order.set_state(state["order"].cpu())
        torch.set_rng_state(state["random"].cpu())
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.options.device)


def continue_to_epoch(options, data, job, epochs, tell):
    """A run up to this epoch, from its checkpoint. Returns whether there was work to do."""
    run = Run(options, data, job)
    run.epochs = epochs
    run.load()
    if run.epoch >= epochs or run.ended:
        return False
    run.loop_over_epochs(tell)
    return True


def run_to_verdict(options, data, pair, tell, patient):
    """One run (value, seed) to its verdict, and with --then a second one from its end. Returns its
    name, the verdict in words, and whether all was done before. Raises Busy where another process
    is at it, unless `patient`."""
    path, name = runs.name_of(options, pair)
    job = Job(*pair, path, name)
    with runs.lock(path.with_suffix(".lock"), patient):
        epochs, more, worked = 0, options.epochs, False
        while more > epochs:
            epochs = more
            worked = continue_to_epoch(options, data, job, epochs, tell) or worked
            run = regimes.read_run(path, options.chance)
            if run.verdict.regime == "undecided":
                more = min(run.verdict.more_epochs or 0, options.max_epochs or 0)
        text = f"{run.verdict}; test error {run.log['test_error'][-1]:.3f}"
        if options.then:
            init = runs.load_checkpoint(path.with_suffix(".pt"), None, options.device)
            path = path.with_suffix(f".then={regimes.elr_name(options.then)}.csv")
            job = Job(options.then, job.seed, path, f"{name}, then {options.then:g}", init)
            worked = continue_to_epoch(options, data, job, options.epochs, tell) or worked
            log = regimes.read_log(path)[0]
            text += f"; then at {options.then:g}: train loss {log['train_loss'][-1]:.3g}"
            text += f", test error {log['test_error'][-1]:.3f}"
    return name, text, not worked


def measure_chance(options, data, seed):
    """Loss and error at random points of this seed's spheres."""
    options = Namespace(**{**vars(options), "mode": "elr", "graph": None, "average": None})
    run = Run(options, data, Job(1.0, seed, Path(), ""))
    return measure.chance(run.net, run.sphere, data, options, seed)


def stop(number, _):
    raise KeyboardInterrupt(number)


def main(argv=None):
    options, data = parse(argv)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    keep_memory()
    start_quickly()
    values, new, failed = [], options.values, False
    seeds = range(options.seed, options.seed + options.seeds)
    do, report = partial(run_to_verdict, options, data), figures.Report(options)
    try:
        for seed in seeds:
            if str(seed) not in options.chance:
                options.chance[str(seed)] = measure_chance(options, data, seed)
        config = options.config | {"chance": options.chance, "command": options.given}
        config["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
        config |= {"threads": options.threads, "jobs": options.jobs, "labels": data.labels}
        runs.write_config(options.out, config)
        for _ in range(1 + options.refine):
            pairs = [(value, seed) for seed in seeds for value in new]
            failed = runs.run_all(do, pairs, options, report.renew) or failed
            values = values + new
            new = runs.bisect(options.out, values)
        found = report.renew(last=True)
    except KeyboardInterrupt as signalled:
        print(f"interrupted; the same command goes on from {options.out}", file=sys.stderr)
        return 128 + signalled.args[0]
    except BrokenPipeError:
        raise
    except (OSError, ValueError, runs.Busy) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        with suppress(OSError):
            options.out.rmdir()  # if nothing is there
        return 1
    if found and not options.rank:
        if len(values) * len(seeds) > 1:
            print(regimes.table(found))
        print(f"written: {options.out / 'regimes.csv'}, {options.out / 'regimes.png'}")
        for command in runs.what_next(options, found):
            print(f"next: {command}")
    return 1 if failed else 0


if __name__ == "__main__":
    regimes.finish(main)
