"""Many runs: the grid of ELRs, the runs one after the other or side by side, boundaries bisected, and what all of them say.

with Runner(args, do) as runner:
    sweep(grid(1e-4, 1, 13), seeds=[0, 1, 2], epochs=20, runner=runner, out=Path("logs"), refine=3)
"""

import math
import multiprocessing
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

import regimes
from rundir import Busy


def grid(low: float, high: float, n: int) -> list[float]:
    """n ELRs from low to high, evenly spaced in their logarithm, rounded to 3 digits so that their names stay short."""
    return [float(f"{elr:.3g}") for elr in np.geomspace(low, high, n)]


def sweep(
    elrs: Iterable[float],
    seeds: Iterable[int],
    epochs: int,
    runner: "Runner",
    out: Path,
    title: str = "",
    refine: int = 0,
    max_epochs: int = 0,
) -> None:
    """Do runner.run_all([(elr, seed), …], epochs) over every ELR and seed, then bisect each boundary of the regimes `refine`
    times; then print the table of all that the folder holds and write regimes.csv, summary.csv and regimes.png.

    A run leaves a log in `out`; a finished one is not done again, and a shorter one goes on. A run inside a bracket that is
    undecided goes on for as long as it says it takes, up to max_epochs, before it counts.
    """
    elrs, seeds = list(elrs), list(seeds)
    several = len(elrs) > 1
    runner.run_all([(elr, seed) for elr in elrs for seed in seeds], epochs)
    for _ in range(refine):
        settle(out, elrs, runner, max_epochs)
        # From the runs of this sweep alone, so that the same command again bisects in the same places and finds them done.
        new = [elr for elr in dict.fromkeys(between(bracket) for bracket in brackets(read_runs(out, elrs))) if elr]
        elrs += new
        runner.run_all([(elr, seed) for elr in new for seed in seeds], epochs)
    if refine:
        settle(out, elrs, runner, max_epochs)
    runs = read_runs(out)
    if not runs or runner.args.rank:
        return
    report = regimes.report(runs, out, title)
    if several:
        print(report)
    print(f"written: {out / 'regimes.csv'}, {out / 'regimes.png'}")


def read_runs(out: Path, elrs: list[float] | None = None) -> list[regimes.Run]:
    """The runs in a folder, of these ELRs or of all; one that failed may have left no row."""
    chance, runs = regimes.read_chance(out), []
    for path in regimes.find_logs(out):
        with suppress(ValueError):
            runs.append(regimes.read_run(path, chance))
    return [run for run in runs if elrs is None or run.elr in elrs]


def brackets(runs: list[regimes.Run]) -> list[list[float]]:
    """Each boundary that was seen: the ELRs on its two sides, and between them those that the seeds leave undecided."""
    try:
        seen = [b for b in regimes.boundaries(runs) if math.isfinite(b.low) and math.isfinite(b.high)]
    except ValueError:  # out of order: there is no one boundary, and the table says so
        return []
    return [[elr for elr in regimes.by_elr(runs) if b.low <= elr <= b.high] for b in seen]


def between(bracket: list[float]) -> float | None:
    """The middle, in the logarithm, of the widest gap, in as few digits as tell it from both ends; None if there is no room."""
    low, high = max(pairwise(bracket), key=lambda gap: gap[1] / gap[0])
    for digits in range(3, 7):
        middle = float(f"{math.sqrt(low * high):.{digits}g}")
        if low * 1.0001 < middle < high / 1.0001:
            return middle
    return None


def settle(out: Path, elrs: list[float], runner: "Runner", max_epochs: int) -> None:
    """Go on with the undecided runs inside the brackets until they are decided or max_epochs long."""
    tried = set()
    while True:
        runs = read_runs(out, elrs)
        inside = {elr for bracket in brackets(runs) for elr in bracket[1:-1]}
        longer = {}
        for run in runs:
            epochs = min(run.verdict.more_epochs or 0, max_epochs)
            if run.elr in inside and epochs > run.log["epoch"][-1] and (run.path, epochs) not in tried:
                tried.add((run.path, epochs))  # a run that stopped for a loss that is not finite will never be longer
                longer.setdefault(epochs, []).append((run.elr, run.seed))
        for epochs, pairs in longer.items():
            runner.run_all(pairs, epochs)
        if not longer:
            return


def named(args: Namespace, rate: float, seed: int) -> tuple[Path, str]:
    """The log of a run, elr=1e-02.seed=1.csv, and its name for people, elr 1e-02 seed 1."""
    stem = f"{'lr' if args.space == 'whole' else 'elr'}={regimes.elr_name(rate)}" + f".seed={seed}" * (seed != 0)
    return args.out / f"{stem}.csv", stem.replace("=", " ").replace(".seed", " seed")


class Stopped(Exception):
    """SIGINT or SIGTERM was received, and a step has been finished since."""


class Runner:
    """Does runs, here or in processes of their own, and stops after a step when SIGINT or SIGTERM asks for it. As a context it
    holds the handlers.

    args    the options; those read here: jobs, argv, rank, ranks, rates, seeds, out, space. Adds `signals`, the list of those
            received, at which whoever does a run looks after every step, and raises Stopped.
    do      function of (ELR, seed, epochs, wait): does that run and returns its verdict in words. Raises Busy where another
            process is at it, unless there is `wait`, which it then calls until the run is free.
    job     function of (argv, number, [(ELR, seed), …], epochs), the body of each process of --jobs.
    """

    def __init__(self, args: Namespace, do: Callable[..., str], job: Callable | None = None):
        self.args, self.do, self.job, self.failed = args, do, job, False
        args.signals = []

    def __enter__(self):
        self.before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, _) -> None:
        """Ask for an end after this step; a second SIGINT ends at once."""
        self.args.signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait(self) -> None:
        if self.args.signals:
            raise Stopped
        time.sleep(0.2)

    def run(self, rate: float, seed: int, epochs: int, patient: bool, quiet: bool = False) -> bool:
        """Do a run. Returns False if another process is at it; one that fails leaves the others their turn."""
        try:
            verdict = self.do(rate, seed, epochs, self.wait if patient else None)
            if "(already done)" not in verdict or not (quiet or self.args.rank):
                print(verdict, flush=True)
        except Busy as busy:
            if not quiet and self.args.ranks == 1:
                print(busy, file=sys.stderr)
            return False
        except (OSError, MemoryError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            self.failed = True
            print(f"train.py: error: {named(self.args, rate, seed)[1]}: {str(error).splitlines()[0]}", file=sys.stderr)
        return True

    def run_all(self, pairs: list[tuple[float, int]], epochs: int) -> None:
        """Do these runs; in --jobs processes, if there are more than one, each of which takes what none has taken yet."""
        jobs = []
        if self.args.jobs > 1 and len(pairs) > 1:
            context = multiprocessing.get_context("spawn")
            more = [(self.args.argv, i + 1, pairs, epochs) for i in range(min(self.args.jobs, len(pairs)))]
            jobs = [context.Process(target=self.job, args=x) for x in more]
        try:
            for process in jobs:
                process.start()
            for process in jobs:
                while process.is_alive():
                    self.wait()
        finally:
            for process in jobs:
                if process.is_alive():
                    process.terminate()
                process.join()
        # What another process is at is left to it, and looked at again last: it may have died.
        left = [pair for pair in pairs if not self.run(*pair, epochs, False, quiet=bool(jobs))]
        if left and len(self.args.rates) * self.args.seeds == self.args.ranks == 1:
            raise Busy("there is nothing else to do")
        for pair in left:
            self.run(*pair, epochs, True, quiet=bool(jobs))
