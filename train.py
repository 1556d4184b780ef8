"""Train a scale-invariant network on the sphere and name the regime that it falls into.

    python train.py --elr 0.01                one run at this effective learning rate (ELR)
    python train.py --sweep 1e-4 1 13         13 ELRs, log-spaced (`--sweep` alone does the same)
    python train.py --angle 0.05              an angle per step, falling along a cosine: no ELR
    python train.py --lr 0.05 --wd 5e-3       ordinary training, and the ELR that it implies

Writes into logs/<data>-<model>, or --out: elr=1e-02.csv, a row per epoch; .layers.csv, a row per
epoch and tensor; .pt, the checkpoint; config.json, regimes.csv, regimes.png. The same command goes
on where it stopped; what was made by other code is trained anew. Regimes: Kodryan et al., NeurIPS
2022 (arXiv 2209.03695).
"""

import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
import sys
import time
from contextlib import closing
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import regimes
from lab import figures, measure, own, runs
from lab.data import batches
from lab.machine import Captured, keep_memory, use
from lab.options import Refused, parse, parser, prepare, what_next
from lab.schedules import value_at
from sphere_step import SphereSGD


def train_step(run, index, move=True):
    """One step on the training inputs at these indices [batch]; without `move` only measured.
    Returns loss, wrong [batch] and the sums from which the sphere's statistics follow."""
    config = run.config
    x, y = run.data.inputs(index, config.augment), run.data.y[index]
    logits = measure.logits_of(run.net, x, config.dtype)
    loss = F.cross_entropy(logits, y)

    run.net.zero_grad(set_to_none=not config.graph)  # a CUDA graph knows gradients by address
    loss.backward()
    for p in run.on_spheres:
        if p.grad is None:  # a layer may be left out at random
            p.grad = torch.zeros_like(p)
    if run.plain or not move:
        run.sphere.observe()
    if move:
        # What lies in .grad is the direction of the step: here it could be changed.
        optimizer = run.plain or run.sphere
        optimizer.step()
    return loss.detach(), logits.detach().argmax(1) != y, *run.sphere.last


def train(run, tell):
    """The epochs that are left, from the run's checkpoint on: each is a pass over the training set,
    rows in the logs, and a checkpoint. Returns whether there were any. tell: as runs.Watch.tell."""
    run.load()
    if not run.goes_on():
        return False
    config, net, size = run.config, run.net, run.config.batch_size
    began = time.perf_counter() - run.seconds
    upto = run.epoch if run.started else None
    log = runs.Log(run.path, upto)
    layer_log = runs.Log(run.path.with_suffix(".layers.csv"), upto)
    step = Captured(partial(train_step, run)) if config.graph else partial(train_step, run)

    with closing(log), closing(layer_log), own.running(config.model):
        while run.goes_on():
            run.set_lr()
            if run.started:
                net.train()
                means = measure.Means(run.sphere, run.plain)
                for index in batches(len(run.data.x), size, run.order, config.device):
                    means.add(*step(index))
                run.epoch += 1
            else:
                means = before_training(run)
                run.started = True

            steps = len(run.data.x) // size
            row = {"epoch": run.epoch, "step": run.epoch * steps, **means.row()}
            if config.mode in ("elr", "loop"):
                row["elr"] = run.lr  # as it was set, not a mean of the steps
            row |= measure.on_test_set(net, run.data, config.dtype)
            run.seconds = row["seconds"] = time.perf_counter() - began
            turned = measure.angles(run.start, measure.vectors(net, run.spheres))
            row["distance"] = turned.mean().item()
            if config.loop:
                row["leg"] = run.leg
            if run.averaged:
                row |= run.average()
            # To log one more column, give the row one more entry here.
            log.add(row)
            layer_log.add(*({"epoch": run.epoch, **layer} for layer in means.layers(run.layers)))
            run.ended = not math.isfinite(row["train_loss"] + row["grad_norm"])
            run.save()
            shown = "loss {train_loss:.3g}, error {train_error:.3g}, γ {grad_norm:.3g}"
            tell("epoch", run.name, run.epoch, run.epochs, shown.format(**row))
    return True


def before_training(run):
    """The means of epoch 0: a pass over the training set in which nothing moves."""
    run.net.train()
    means = measure.Means(run.sphere, run.plain)
    for index in batches(len(run.data.x), run.config.batch_size, run.order, run.config.device):
        means.add(*train_step(run, index, move=False))
    return means


class Run:
    """One run: network, optimizer, order of batches; it saves and loads itself. A seed gives every
    value the same start and the same order.

    experiment   options.Experiment: options, data, layer groups, hashes of what made it
    job          runs.Job: value (ELR, angle or learning rate), seed, path of the log
    """

    # In a checkpoint, beside what has a state_dict
    STATE = ("epoch", "seconds", "ended", "start")

    def __init__(self, experiment, job):
        config, self.data, layer_groups, self.contents = experiment
        self.config, self.value, self.init = config, job.value, job.init
        self.path, self.name = job.path, job.name
        # What a checkpoint must share with this run
        self.identity = config.identity() | dict(value=job.value, seed=job.seed, name=job.name)
        use(config.device, config.dtype)
        torch.manual_seed(job.seed)
        self.net = own.build(config, self.data).to(config.device)
        if job.init:
            self.net.load_state_dict(job.init["net"])
        self.layer_groups = layer_groups
        self.layers = [name for group in layer_groups for name in group]
        self.spheres = measure.spheres_of(layer_groups, config.sphere)
        self.make_optimizer()
        self.start = measure.vectors(self.net, self.spheres)  # float64, per sphere
        self.order = torch.Generator().manual_seed(job.seed)  # of the batches
        self.averaged = AveragedModel(self.net) if config.average else None
        self.started = False  # whether the row before training is there
        self.epoch, self.epochs = 0, config.epochs  # finished, and wanted
        self.seconds, self.ended = 0.0, False

    def make_optimizer(self):
        """What is scale invariant on spheres, the rest by plain SGD. In the whole space, --lr, all
        by torch's SGD, and the spheres only measure."""
        config, net = self.config, self.net
        groups = []
        for sphere in self.spheres:
            params = [attrgetter(name)(net) for name in sphere["names"]]
            groups.append(dict(params=params, sphere="row" if sphere["rows"] else "group"))
        self.on_spheres = [p for group in groups for p in group["params"]]
        trained = [p for p in net.parameters() if p.requires_grad]
        momentum = config.momentum or 0.0
        self.plain = None
        if config.mode == "lr":
            self.plain = torch.optim.SGD(trained, self.value, momentum, weight_decay=config.wd or 0)
            self.sphere = SphereSGD(groups, lr=0.0)
            return
        known = set(self.on_spheres)
        rest = [p for p in trained if p not in known]
        if rest:
            group = dict(params=rest, sphere=None)
            if config.mode != "angle":  # the sphere of the whole network has η = η̃ρ²
                square = sum(p.detach().square().sum().item() for p in self.on_spheres)
                group["lr"] = self.value * square
            groups.append(group)
        if config.graph:  # which reads the learning rates from the device's memory
            for group in groups:
                group["lr"] = torch.tensor(group.get("lr", self.value), device=config.device)
        angle = config.mode == "angle"
        self.sphere = SphereSGD(groups, lr=self.value, momentum=momentum, angle=angle)

    def goes_on(self):
        """Whether epochs are left. A run that is undecided gets more, up to --max-epochs."""
        if not self.started:
            return True
        if self.epoch >= self.epochs and self.config.max_epochs and not self.init:
            verdict = runs.read_run(self.path).verdict
            if verdict.regime == "undecided":
                more = min(verdict.more_epochs or 0, self.config.max_epochs)
                self.epochs = max(self.epochs, more)
        return self.epoch < self.epochs and not self.ended

    def set_lr(self):
        """The learning rates of the epoch that begins."""
        self.leg, self.lr = value_at(self.config, self.value, self.epoch, self.epochs)
        factor = self.lr / self.value
        optimizers = [x for x in self.parts().values() if isinstance(x, torch.optim.Optimizer)]
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            first = group.setdefault("first_lr", float(group["lr"]))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(first * factor)
            else:
                group["lr"] = first * factor

    def average(self):
        """The columns of --average: of the mean weights of the last epochs."""
        if self.epoch <= self.epochs - self.config.average:
            return {"avg_train_loss": math.nan, "avg_test_error": math.nan}
        self.averaged.update_parameters(self.net)
        return measure.on_average(
            self.averaged, self.net, self.spheres, self.data, self.config.dtype
        )

    def parts(self):
        """What has a state_dict: network, optimizers, averaged weights."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {name: getattr(self, name) for name in self.STATE}
        state |= {"order": self.order.get_state(), "random": torch.get_rng_state()}
        state |= {"spheres": self.spheres, "contents": self.contents}
        state["origin"] = self.init and self.init["checksum"]
        if "cuda" in self.config.device:
            state["cuda"] = torch.cuda.get_rng_state(self.config.device)
        runs.save_checkpoint(self.path.with_suffix(".pt"), self.identity, state)

    def load(self):
        """Go on from the checkpoint, if there is one from the same start."""
        path = self.path.with_suffix(".pt")
        state = runs.load_checkpoint(path, self.config.device, self.identity, self.contents)
        if state is None or state["origin"] != (self.init and self.init["checksum"]):
            return
        runs.restore(self.parts(), state, path)
        for name in self.STATE:
            setattr(self, name, state[name])
        self.started = True
        self.order.set_state(state["order"].cpu())
        torch.set_rng_state(state["random"].cpu())
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.config.device)


def work(experiment, jobs, tell, patient=False):
    """The runs, one after another; one that fails leaves the others their turn. One that another
    process is at is left out, or waited for if `patient`."""
    config = experiment.config
    for job in jobs:
        try:
            with runs.lock(job.path.with_suffix(".lock"), patient):
                worked = train(Run(experiment, job), tell)
                found = runs.result(job.path)
                if config.then:
                    second = runs.second_job(job, config.then, config.device)
                    worked = train(Run(experiment, second), tell) or worked
                    found += f"; then at {config.then:g}: {runs.result(second.path)}"
            tell("finished", job.name, found, not worked)
        except runs.Busy as busy:
            tell("busy", job.name, f"{busy}: this waits for it")
        except BrokenPipeError:  # who reads what we print has gone away
            raise
        except (OSError, MemoryError, ValueError, RuntimeError) as error:
            if not runs.is_expected(error):
                raise
            tell("failed", job.name, (str(error) or type(error).__name__).splitlines()[0])


def measure_chance(experiment, seeds):
    """Loss and error at random points of the sphere, and what the runs are made with, into the
    folder's config.json."""
    config = experiment.config
    chances = regimes.read_chance(config.out)
    for seed in seeds:
        if str(seed) not in chances:
            with own.running(config.model):
                at_start = Run(experiment, runs.Job(1.0, seed, Path(), ""))
                chances[str(seed)] = measure.chance(at_start, seed)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    about = dict(command=config.given, threads=config.threads, labels=experiment.data.labels)
    runs.add_to_config(config.out, chance=chances, versions=versions, **about)


def stop(number, _):
    """Ctrl-C, or SIGTERM: the next one has no effect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main(argv=None):
    config = parse(argv)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if config.rank:  # of torchrun's processes the first tells what all have done
        sys.stdout = open(os.devnull, "w")
    values, new, failed = [], config.values, False
    seeds = range(config.seed, config.seed + config.seeds)
    try:
        experiment = prepare(config)
        keep_memory()
        measure_chance(experiment, seeds)
        report = figures.Report(config)
        for _ in range(1 + config.refine):
            jobs = runs.jobs_of(config, new, seeds)
            with closing(runs.Watch(config, jobs, report.renew)) as watch:
                if config.jobs > 1:
                    runs.side_by_side(work, experiment, jobs, watch.tell)
                for patient in (False, True):  # what another process is at comes last
                    work(experiment, watch.left(), watch.tell, patient)
            failed = failed or watch.failed
            values = values + new
            new = runs.bisect(config.out, values)
        found = report.renew(last=True)
    except Refused as refused:
        parser().error(str(refused))
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        if not runs.is_expected(error):
            raise
        print(f"train.py: error: {error}", file=sys.stderr)
        runs.leave(config.folder())
        return 1
    except KeyboardInterrupt as signalled:
        print(f"interrupted; the same command goes on from {config.folder()}", file=sys.stderr)
        return 128 + signalled.args[0]
    if found:
        if len(values) * len(seeds) > 1:
            print(regimes.table(found))
        written = [config.out / "regimes.csv", *report.pictures]
        print(f"written: {', '.join(map(str, written))}")
        for command in what_next(config, found):
            print(f"next: {command}")
    return 1 if failed else 0


if __name__ == "__main__":
    regimes.finish(main)
