"""Train a scale-invariant network on the sphere and name its regime.

    python train.py --elr 0.01                one run at this effective learning rate (ELR)
    python train.py --sweep 1e-4 1 13         13 ELRs, log-spaced
    python train.py --loop                    one run down 25 ELRs and up again
    python train.py --angle 0.05              an angle per step: no ELR
    python train.py --lr 0.05 --wd 5e-3       plain SGD, and its ELR

Writes into logs/<data>-<model>, or --out: of each run .csv, a row per epoch, .layers.csv, also by
tensor, .pt, the checkpoint; config.json, regimes.csv, regimes.png. The same command goes on where
it stopped; runs of older code are trained anew. Regimes: Kodryan et al., arXiv 2209.03695.
"""

import signal

import lab.contents  # noqa: F401 (reads what runs, before torch is there)

if __name__ == "__main__":  # Ctrl-C while torch is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
import sys
import time
from contextlib import closing
from functools import partial

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import regimes
from lab import figures, measure, own, runs
from lab.data import RandomNumbers, batches
from lab.experiment import prepare, what_next
from lab.groups import last_step, meters_of, spheres_of
from lab.jobs import Watch, heed_stops, side_by_side
from lab.machine import Captured, set_device
from lab.options import parse
from lab.schedules import value_at
from sphere_step import SphereSGD


def loss_of(logits, y):
    """Minimized, and measured at random weights."""
    return F.cross_entropy(logits, y)


def train_step(run, index, move=True):
    """One step on the training inputs at these indices [batch]; without `move` only measured.
    Returns loss, wrong [batch] and the sums from which the sphere's statistics follow."""
    config = run.config
    x, y = run.data.inputs(index, config.augment), run.data.y[index]
    logits = measure.logits_of(run.net, x, config.dtype)
    loss = loss_of(logits, y)

    run.net.zero_grad(set_to_none=not config.graph)  # a CUDA graph knows gradients by address
    loss.backward()
    for p in run.sphere_weights:
        if p.grad is None:  # a layer may be left out at random
            p.grad = torch.zeros_like(p)
    if run.plain_sgd or not move:  # with --lr, or before training
        run.sphere_sgd.observe()
    if move:
        # What lies in .grad is the direction of the step: change it here.
        optimizer = run.plain_sgd or run.sphere_sgd
        optimizer.step()
    return loss.detach(), logits.detach().argmax(1) != y, *last_step(run)


def train(run, tell):
    """The epochs that are left, from the checkpoint on: each is a pass over the training set, rows
    in the logs, and a checkpoint. Returns whether any were. tell: jobs.Watch.tell."""
    run.load()
    config, net, data = run.config, run.net, run.data
    began = time.perf_counter() - run.seconds
    last_epoch = run.epoch if run.started else None
    log = runs.Log(run.path, last_epoch)
    layer_log = runs.Log(run.path.with_suffix(".layers.csv"), last_epoch)
    step = partial(train_step, run)
    if config.graph:
        step = Captured(step)

    with closing(log), closing(layer_log), own.running(config.model):
        run.prolong()
        worked = not run.finished()
        while not run.finished():
            run.set_lr()
            net.train()
            means = measure.Means(run)
            indices = batches(len(data.x), config.batch_size, run.random.order, config.device)
            if run.started:
                for index in indices:
                    means.add(*step(index))
                run.epoch += 1
            else:
                before_training(run, indices, means)

            row = {"epoch": run.epoch, "step": run.epoch * len(indices), **means.row()}
            if config.mode in ("elr", "loop") and not abs(row["elr"] - run.lr) > 1e-6 * run.lr:
                row["elr"] = run.lr  # as it was set: not rounded, nor nan in a run that broke down
            row |= measure.on_test_set(net, data, config.dtype)
            run.seconds = row["seconds"] = time.perf_counter() - began
            now = measure.vectors(net, run.spheres)
            row["distance"] = measure.angles(run.start, now).mean().item()
            if config.loop:
                row["leg"] = run.leg
            if config.edge:
                row["edge"] = row["elr"] * run.edge.mean()
            if run.averaged:
                row |= {"avg_train_loss": math.nan, "avg_test_error": math.nan}
                if run.epoch > run.epochs - config.average:
                    run.averaged.update_parameters(net)
                    row |= measure.on_average(run.averaged, net, run.spheres, data, config.dtype)
            # To log one more column, add an entry here.
            log.add(row)
            layer_log.add(*means.layers(run.spheres, run.epoch))
            run.ended = not math.isfinite(row["train_loss"] + row["grad_norm"])
            run.save()
            shown = "loss {train_loss:.3g}, error {train_error:.3g}, γ {grad_norm:.3g}"
            tell("epoch", run.name, run.epoch, run.epochs, shown.format(**row))
            run.prolong()
    return worked


def before_training(run, indices, means):
    """A pass for the row before training: nothing moves."""
    for index in indices:
        means.add(*train_step(run, index, move=False))
    run.started = True


class Run:
    """A runs.Job of an Experiment: network, optimizer, order of batches; it saves and loads
    itself. A seed gives every value the same start and the same order."""

    # In a checkpoint, beside what has a state_dict
    STATE = "epoch seconds ended start spheres contents began_from".split()

    def __init__(self, experiment, job):
        config, self.data, layer_groups, self.contents = experiment
        self.config, self.value, self.path, self.name = config, job.value, job.path, job.name
        # What a checkpoint must share with this run
        self.identity = config.identity() | dict(value=job.value, seed=job.seed, name=job.name)
        self.random = RandomNumbers(job.seed)
        self.net = experiment.build().to(config.device)
        set_device(config.device, config.dtype)  # over what that has set
        if job.init:
            self.net.load_state_dict(job.init["net"])
        self.began_from = job.init and job.init["checksum"]  # the end of another run
        self.spheres = spheres_of(layer_groups, config.sphere)
        self.make_optimizer()
        self.start = measure.vectors(self.net, self.spheres)
        self.averaged = AveragedModel(self.net) if config.average else None
        self.started = False  # whether the row before training is there
        self.epoch, self.epochs = 0, config.epochs  # finished, and wanted
        self.seconds, self.ended = 0.0, False
        if config.edge:
            from lab.curvature import Edge

            self.edge = Edge(self, config.edge)

    def make_optimizer(self):
        """Scale-invariant weights on spheres, the rest by plain SGD; with --lr all by torch's SGD,
        and the spheres only measure."""
        config, value = self.config, self.value
        groups = []
        for sphere in self.spheres:
            kind = "row" if sphere["rows"] else "group"
            groups.append(dict(params=measure.tensors(self.net, sphere), sphere=kind))
        self.sphere_weights = [p for group in groups for p in group["params"]]
        trained = [p for p in self.net.parameters() if p.requires_grad]
        rest = [p for p in trained if p not in set(self.sphere_weights)]
        momentum, angle = config.momentum or 0.0, config.mode == "angle"
        self.plain_sgd, self.meters = None, []
        if config.mode == "lr":
            self.plain_sgd = torch.optim.SGD(trained, value, momentum, weight_decay=config.wd or 0)
            self.meters = meters_of(self.plain_sgd, groups)
            momentum = 0.0
        elif rest:
            group = dict(params=rest, sphere=None)
            if not angle:  # the sphere of the whole network has η = η̃ρ²
                square = sum(p.detach().square().sum().item() for p in self.sphere_weights)
                group["lr"] = value * square
            groups.append(group)
        if config.graph:  # which reads them from the device's memory
            for group in groups:
                group["lr"] = torch.tensor(group.get("lr", value), device=config.device)
        self.sphere_sgd = SphereSGD(groups, lr=value, momentum=momentum, angle=angle)

    def finished(self):
        return self.ended or self.epoch >= self.epochs

    def prolong(self):
        """Up to --max-epochs, while the log leaves it undecided."""
        most = self.config.max_epochs
        if most and self.epoch >= self.epochs and not self.began_from:
            verdict = runs.read_run(self.path).verdict
            if verdict.regime == "undecided":
                self.epochs = max(self.epochs, min(verdict.more_epochs or 0, most))

    def set_lr(self):
        """Of the epoch that begins."""
        self.leg, self.lr = value_at(self.config, self.value, self.epoch, self.epochs)
        factor = self.lr / self.value
        for part in self.parts().values():
            for group in getattr(part, "param_groups", ()):
                initial_lr = group.setdefault("initial_lr", float(group["lr"]))
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(initial_lr * factor)
                else:
                    group["lr"] = initial_lr * factor

    def parts(self):
        """What has a state_dict: network, optimizers, mean weights, random numbers."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {name: getattr(self, name) for name in self.STATE}
        runs.save_checkpoint(self.path.with_suffix(".pt"), self.identity, state)

    def load(self):
        """Go on from the checkpoint, if there is one that began where this run does."""
        path = self.path.with_suffix(".pt")
        state = runs.load_checkpoint(path, self.config.device, self.identity, self.contents)
        if state is None or state["began_from"] != self.began_from:
            return
        runs.restore(self.parts(), state, path)
        for name in self.STATE:
            setattr(self, name, state[name])
        self.started = True


def work(experiment, jobs, tell, patient=False):
    """The runs, one after another; one that fails leaves the others their turn. One that another
    process holds is left out, or waited for if `patient`."""
    then = experiment.config.then
    for job in jobs:
        try:
            with runs.lock(job.path.with_suffix(".lock"), patient):
                worked = train(Run(experiment, job), tell)
                found = runs.result(job.path)
                if then:
                    second = runs.second_job(job, then)
                    worked = train(Run(experiment, second), tell) or worked
                    found += f"; then at {then:g}: {runs.result(second.path)}"
            tell("finished", job.name, found, not worked)
        except runs.Busy as busy:
            tell("busy", job.name, f"{busy}: this waits for it")
        except Exception as error:
            if not runs.is_expected(error):
                raise
            tell("failed", job.name, (str(error) or type(error).__name__).splitlines()[0])


def measure_chance(experiment, seeds):
    """Chance at each seed, into the folder's config.json."""
    config = experiment.config
    chances = regimes.read_chance(config.out)
    for seed in seeds:
        if str(seed) not in chances:
            with own.running(config.model):
                run = Run(experiment, runs.Job(1.0, seed, None, ""))
                chances[str(seed)] = measure.chance(run, seed, loss_of)
    runs.add_to_config(config.out, chance=chances)


def main(argv=None):
    config = parse(argv)
    heed_stops()
    if config.rank:  # torchrun's first process tells for all
        sys.stdout = open(os.devnull, "w")
    values, new, failed = [], config.values, False
    seeds = range(config.seed, config.seed + config.seeds)
    try:
        experiment = prepare(config)
        measure_chance(experiment, seeds)
        report = figures.Report(config)
        for _ in range(1 + config.refine):
            jobs = runs.jobs_of(config, new, seeds)
            with closing(Watch(config, jobs, report.renew)) as watch:
                if config.jobs > 1:
                    side_by_side(work, experiment, jobs, watch.tell)
                for patient in (False, True):  # what another process is at comes last
                    work(experiment, watch.left(), watch.tell, patient)
                runs.remove_leftovers(config.out)  # of a process that was killed meanwhile
            failed = failed or watch.failed
            values = values + new
            new = runs.bisect(config.out, values)
        found = report.renew(last=True)
    except KeyboardInterrupt as signalled:
        out = config.folder()
        begun = f"the same command goes on from {out}" if out.exists() else "nothing was written"
        print(f"interrupted; {begun}", file=sys.stderr)
        return 128 + signalled.args[0]
    except Exception as error:
        if not runs.is_expected(error):
            raise
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    if found:
        if len(values) * len(seeds) > 1:
            print(regimes.table(found))
        print("written:", ", ".join(map(str, [config.out / "regimes.csv", *report.pictures])))
        for command in what_next(config, found):
            print("next:", command)
    return int(failed)


if __name__ == "__main__":
    regimes.finish(main)
