"""Many runs: the grid of ELRs, the runs one after the other, boundaries bisected, and what all of them say together."""

import math
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

import regimes


def grid(low: float, high: float, n: int) -> list[float]:
    """n ELRs from low to high, evenly spaced in their logarithm, rounded to 3 digits so that their names stay short."""
    return [float(f"{elr:.3g}") for elr in np.geomspace(low, high, n)]


def sweep(
    elrs: Iterable[float],
    seeds: Iterable[int],
    epochs: int,
    runner,
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


def settle(out: Path, elrs: list[float], runner, max_epochs: int) -> None:
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
