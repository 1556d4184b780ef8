"""Test errors of angles, ELRs, Adam's and Muon's directions on spheres, AdamW and SGD: the same
networks, data, batches and epochs, along a cosine unless the kind says otherwise. Writes a row per
run into --out, and goes on where it was interrupted; then prints means and, seed by seed, the
differences to the best AdamW and to the best ELR.

    python docs/optimizers.py --tasks "few digits, convnet" --seeds 16 --jobs 2
"""

import csv
import io
import itertools
import multiprocessing
import signal
import sys
import tempfile
from collections import defaultdict
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import draw  # noqa: E402

import regimes  # noqa: E402
import train  # noqa: E402
from lab import bench, runs  # noqa: E402
from lab.experiment import Experiment, prepare  # noqa: E402
from lab.jobs import heed_stops  # noqa: E402
from lab.machine import keep_memory  # noqa: E402
from lab.options import parse  # noqa: E402
from lab.runs import Busy, lock, number  # noqa: E402
from sphere_step import SphereSGD  # noqa: E402

FEW_DIGITS = ROOT / "logs" / "few.npz"
ON_FEW = ["--data", str(FEW_DIGITS), "--epochs", "40"]
ON_DIGITS = ["--data", "digits"]
RESNET = ["--model", "resnet18"]
MLP = ["--model", f"{Path(__file__).resolve()}:mlp"]
ON_MODULAR = ["--data", "modular"]
TASKS = {
    "few digits, convnet": ON_FEW,
    "few digits, resnet18": ON_FEW + RESNET,
    "few digits, MLP": ON_FEW + MLP,
    "digits, half wrong": [*ON_DIGITS, "--label-noise", "0.5"],
    "modular 31": [*ON_MODULAR, "--epochs", "100"],  # 4,200 steps; 23: 4,600
    "modular 23": [*ON_MODULAR, "--modulus", "23", "--epochs", "200"],
    "digits, convnet": ON_DIGITS,
    "digits, resnet18": ON_DIGITS + RESNET,
    "digits, MLP": ON_DIGITS + MLP,
}
DEFAULT_TASKS = list(TASKS)[:6]
SLOW = ("few digits, resnet18", "digits, half wrong", "modular 31", "modular 23")
SLOW_SEEDS = 8  # of these, whose runs take five seconds or more


class Kind(NamedTuple):
    """A way to train: options of train.py, whose own value is replaced; values; weight decays."""

    options: list
    values: tuple
    decays: tuple = (0.0,)


ANGLES = (0.01, 0.02, 0.05, 0.1, 0.2)
BY_ANGLE, COSINE = ["--angle", "1"], ["--schedule", "cosine"]
KINDS = {
    "angle": Kind(BY_ANGLE, ANGLES),
    "angle, layer": Kind([*BY_ANGLE, "--sphere", "layer"], ANGLES),
    "angle, linear": Kind([*BY_ANGLE, "--schedule", "linear"], ANGLES[2:4]),
    "angle, constant, then linear": Kind([*BY_ANGLE, "--schedule", "wsd"], ANGLES[2:4]),
    "adam": Kind(BY_ANGLE, ANGLES),
    "muon": Kind(BY_ANGLE, ANGLES),
    "elr": Kind(["--elr", "1", *COSINE], (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "adamw": Kind(
        ["--lr", "1", *COSINE], (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), (0.01, 0.1, 1.0, 3.0)
    ),
    "sgd": Kind(
        ["--lr", "1", "--momentum", "0.9", *COSINE],
        (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
        (5e-4, 5e-3, 5e-2),
    ),
}
IF_ASKED = ("angle, linear", "angle, constant, then linear")  # only when asked for
# The search for the best values of a kind: in each round, how many values are left, and how many
# seeds they get (None: all). Angles on one sphere, of which one is to be the default, get all; on
# digits, other angles, too.
ROUNDS = ((None, 1), (10, 3), (4, None))
SLOW_ROUNDS = ((None, 1), (5, 2), (2, None))
MODULAR_ROUNDS = ((None, 1), (4, 2), (1, None))


class BadFile(Exception):
    """--out holds something else."""


class Trial(NamedTuple):
    task: str
    kind: str
    value: float
    decay: float
    seed: int


def mlp(example: Tensor, classes: int) -> nn.Module:
    """A network of one's own, with LayerNorm."""
    n = example.numel()
    layers = [nn.Flatten(), nn.Linear(n, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128)]
    return nn.Sequential(*layers, nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, classes))


def few_digits(path: Path) -> None:
    """The digits turned round: 360 to train on, 1,437 to test on."""
    with np.load(ROOT / "data" / "digits.npz") as a:
        np.savez(path, x=a["test_x"], y=a["test_y"], test_x=a["x"], test_y=a["y"])


# ------------------------------------------------------------------------------- directions


def adam(p: Tensor, state: dict, beta1: float = 0.9, beta2: float = 0.95) -> Tensor:
    """Adam's direction (arXiv 1412.6980), of the shape of p, from p.grad and those before."""
    if not state:
        state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
    state["step"] += 1
    state["m"].lerp_(p.grad, 1 - beta1)
    state["v"].lerp_(p.grad.square(), 1 - beta2)
    m = state["m"] / (1 - beta1 ** state["step"])
    v = state["v"] / (1 - beta2 ** state["step"])
    return m / (v.sqrt() + 1e-8)


def muon(p: Tensor, state: dict, beta: float = 0.95, steps: int = 5) -> Tensor:
    """Muon's direction (kellerjordan.github.io/posts/muon): Nesterov's momentum as a matrix, whose
    singular values Newton and Schulz bring near 1; of root mean square about 1, as Adam's is."""
    momentum = state.setdefault("m", torch.zeros_like(p))
    momentum.lerp_(p.grad, 1 - beta)
    x = p.grad.lerp(momentum, beta).flatten(1)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(steps):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    x = x.T if tall else x
    return (max(x.shape) ** 0.5 * x).reshape(p.shape)


def hyperball(run: train.Run, direction) -> SphereSGD:
    """AdamH and MuonH (arXiv 2606.16899), with projection and an exact angle: each matrix on a
    sphere of its own. The rest moves along Adam's direction, at the learning rate that follows;
    so do, on their spheres, embeddings and the head."""
    on_spheres = {name for sphere in run.spheres for name in sphere["names"]}
    matrices, rest, directions, states = [], [], {}, defaultdict(dict)
    for name, p in run.net.named_parameters():
        if not p.requires_grad:
            continue
        directions[p] = adam
        if name in on_spheres and p.dim() > 1:
            matrices.append(p)
            if name not in ("embedding", "position", "head"):
                directions[p] = direction
        else:
            rest.append(p)
    groups = [dict(params=matrices, sphere="tensor")]
    if rest:
        groups.append(dict(params=rest, sphere=None))
    optimizer = SphereSGD(groups, lr=run.value, angle=True)

    def change_direction(*_):
        for p, direction in directions.items():
            if p.grad is not None:
                p.grad = direction(p, states[p])  # what lies there is the direction

    optimizer.register_step_pre_hook(change_direction)
    return optimizer


# ------------------------------------------------------------------------------------- runs


@cache
def prepared(task: str, kind: str) -> Experiment:
    """Options, data and spheres of train.py."""
    argv = [*TASKS[task], *KINDS[kind].options, "--threads", "1"]
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        return prepare(parse([*argv, "--out", out]))


def make_run(job: Trial, out: str) -> train.Run:
    """The run, not yet trained, whose log is in `out`."""
    experiment = prepared(job.task, job.kind)
    experiment.config.wd = job.decay
    log = Path(out) / "log.csv"
    run = train.Run(experiment, runs.Job(job.value, job.seed, log, job.kind))
    if job.kind == "adamw":
        params = run.plain_sgd.param_groups[0]["params"]
        run.plain_sgd = torch.optim.AdamW(params, lr=job.value, weight_decay=job.decay)
    if job.kind == "adam":
        run.plain_sgd = hyperball(run, adam)
    if job.kind == "muon":
        run.plain_sgd = hyperball(run, muon)
    return run


def train_one(job: Trial) -> float:
    """The test error after the task's epochs."""
    with tempfile.TemporaryDirectory() as out:
        run = make_run(job, out)
        train.train(run, tell=lambda *_, **__: None)
        return float(runs.read_run(run.path).log["test_error"][-1])


def with_error(job: Trial) -> tuple[Trial, float]:
    return job, train_one(job)


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees it, too
    keep_memory()


def seeds_of(task: str, seeds: int) -> int:
    return min(seeds, SLOW_SEEDS) if task in SLOW else seeds


def wanted(errors: dict, task: str, kind: str, seeds: int) -> list[Trial]:
    """The jobs of a task and a kind, as far as they are known from those that are done."""
    pairs = itertools.product(KINDS[kind].values, KINDS[kind].decays)
    values = [(task, kind, *pair) for pair in pairs]
    modular = task.startswith("modular")
    rounds = SLOW_ROUNDS if task in SLOW else ROUNDS
    if modular:
        rounds = MODULAR_ROUNDS
    if kind == "angle" or (kind.startswith("angle") and not modular):
        rounds = ((None, None),)
    before = 0  # seeds that every value has that is left

    def mean(value):
        return np.mean([errors[Trial(*value, seed)] for seed in range(before)] or 0)

    for left, of_each in rounds:
        values = sorted(values, key=mean)[:left]
        before = min(of_each or seeds, seeds)
        jobs = [Trial(*value, seed) for value in values for seed in range(before)]
        if any(job not in errors for job in jobs):
            break
    return jobs


def measure_all(errors: dict, tasks: list, kinds: list, seeds: int, jobs: int, path: Path) -> None:
    """Do what `errors` lacks, and add it there and to the file."""
    file = open(path, "ab")
    pool = multiprocessing.get_context("spawn").Pool(jobs, start_worker) if jobs > 1 else None
    tasks = list(tasks)
    try:
        while tasks:  # one after the other: what is interrupted has whole tasks
            todo = []
            for kind in kinds:
                of_kind = wanted(errors, tasks[0], kind, seeds_of(tasks[0], seeds))
                todo += [job for job in of_kind if job not in errors]
            if not todo:
                tasks.pop(0)
            done = pool.imap_unordered(with_error, todo) if pool else map(with_error, todo)
            for job, error in tqdm(done, total=len(todo), unit="run", disable=None):
                errors[job] = error
                row = [*job, error, bench.machine(), torch.__version__]
                file.write(regimes.csv_lines([row]))
                file.flush()
    finally:
        file.close()
        if pool:
            pool.terminate()


def read(path: Path) -> dict:
    """Trial → test error. A last row that is not whole is removed; a missing file is made."""
    head = ",".join([*Trial._fields, "test_error", "machine", "torch"]) + "\n"
    text = path.read_text(encoding="utf-8") if path.exists() else head
    if head.startswith(text):  # empty, or interrupted at once
        text = head
    text = text[: text.rfind("\n") + 1]
    if not text.startswith(head):
        raise BadFile(f"{path} has other columns: choose another --out")
    regimes.write_whole(path, text.encode())
    errors = {}
    for row in csv.DictReader(io.StringIO(text)):
        value, decay, seed = float(row["value"]), float(row["decay"]), int(row["seed"])
        errors[Trial(row["task"], row["kind"], value, decay, seed)] = float(row["test_error"])
    return errors


def main(argv=None) -> int:
    parser = regimes.Parser(prog="optimizers.py", description="Test errors, paired by seed.")
    add = parser.add_argument
    few = dict(nargs="+", metavar="NAME")
    add("--tasks", choices=TASKS, default=DEFAULT_TASKS, **few, help=f"of {'; '.join(TASKS)}")
    usual = [kind for kind in KINDS if kind not in IF_ASKED]
    add("--kinds", choices=KINDS, default=usual, **few, help=f"of {'; '.join(KINDS)}")
    add("--seeds", type=number(int), default=16, metavar="K", help="default: 16")
    add("--jobs", type=number(int), default=2, metavar="N", help="runs at a time (default: 2)")
    out = ROOT / "benchmarks" / "optimizers.csv"
    add("--out", type=Path, default=out, metavar="CSV", help="default: benchmarks/optimizers.csv")
    args = parser.parse_args(argv)
    try:
        with lock(args.out.with_suffix(".lock")):
            errors = read(args.out)
            FEW_DIGITS.parent.mkdir(exist_ok=True)
            few_digits(FEW_DIGITS)
            measure_all(errors, args.tasks, args.kinds, args.seeds, args.jobs, args.out)
    except (Busy, OSError, BadFile) as error:
        parser.error(f"argument --out: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    tasks = draw.read_errors(args.out)
    draw.print_comparison({task: tasks[task] for task in args.tasks if task in tasks})
    return 0


if __name__ == "__main__":
    heed_stops()
    regimes.finish(main)
