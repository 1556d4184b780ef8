"""Many runs: the grid of ELRs, one run after the other, and what they say together."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import regimes


def grid(low: float, high: float, n: int) -> list[float]:
    """n ELRs from low to high, evenly spaced in their logarithm, rounded to 3 digits so that their names stay short."""
    return [float(f"{elr:.3g}") for elr in np.geomspace(low, high, n)]


def sweep(elrs: Iterable[float], run_one: Callable[[float], None], out: Path, title: str = "") -> None:
    """Do one run per ELR; then print the table of all that the folder holds and write regimes.csv and regimes.png."""
    elrs = list(elrs)
    for elr in elrs:
        run_one(elr)
    chance = regimes.read_chance(out)
    report = regimes.report([regimes.read_run(path, chance) for path in regimes.find_logs(out)], out, title)
    if len(elrs) > 1:
        print(report)
    print(f"written: {out / 'regimes.csv'}, {out / 'regimes.png'}")
