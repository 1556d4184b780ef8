"""Name the training regime of each run from its CSV log alone: convergence, chaotic equilibrium or divergence.

    python regimes.py logs/digits-convnet          every run of a folder: table, boundaries, regimes.csv, regimes.png
    python regimes.py mine.csv yours.csv           anybody's logs; only the columns epoch and train_loss are needed

The rule (`classify`) looks at the tail of a run, the last half of its epochs, through two numbers:

    skill = 1 − error/chance_error                 how much better than a random point of the sphere (from the loss if need be)
    slope = d log loss / d log epoch               Theil and Sen's median of the slopes of all pairs, with a 99 % interval

    divergence    skill cannot be told from 0
    convergence   the slope is surely negative and not small, or the loss has fallen to a negligible part of chance
    equilibrium   skill is surely above 0, and no trend
    undecided     none of these for sure; it says how many epochs would decide

This file depends on numpy and matplotlib alone. Regimes: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695).
"""

import argparse
import csv
import glob
import io
import json
import math
import os
import re
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

ORDER = {"convergence": 0, "equilibrium": 1, "divergence": 2}
TABLES = ("regimes.csv", "summary.csv", "landscape.csv")
TITLE = {"equilibrium": "chaotic equilibrium"}

MIN_TAIL = 4  # rows that the tail needs before it says anything
NEGLIGIBLE = 0.003  # of the chance loss: so far down, convergence needs no further proof
NOTHING = 1e-9  # of the chance loss: what hovers here is rounding
STEEP = -0.5  # a slope below this is a falling loss; 1/epoch has slope −1, a stationary level 0
FLAT = 0.1  # a slope within ±this is no trend, however sure
FLOOR = {"train_error": 0.03, "train_loss": 0.1}  # skill below this is no skill, however sure
Z99 = 2.576  # standard normal quantile of a two-sided 99 % interval


@dataclass
class Verdict:
    """What `classify` found. `why` says it in words; skill_error and slope_low, slope_high are uncertainties (standard
    error, 99 % interval); `more_epochs` is how many epochs in all would probably decide, for an undecided run."""

    regime: str
    why: str
    skill: float = math.nan
    skill_error: float = math.nan
    slope: float = math.nan
    slope_low: float = math.nan
    slope_high: float = math.nan
    more_epochs: int | None = None
    notes: list[str] = field(default_factory=list)
    moves: bool = False  # the ELR was not held fixed


def classify(log: dict[str, np.ndarray], chance: dict | None = None) -> Verdict:
    """The regime of one run.

    log      columns of equal length, a row per epoch: `epoch` (0 = before training) and `train_loss` in nats; used where
             present: `train_error` in [0, 1], `step`, `angle` (mean angular step φ in radians).
    chance   {"train_loss": {"mean", "std"}, "train_error": {"mean", "std"}, "points": n}: loss and error at n random
             points of the same sphere. Without it the row of epoch 0 stands in: initialization is a random point.
    """
    notes = []
    epoch, loss = log["epoch"], log["train_loss"]
    good = np.isfinite(loss) & (loss >= 0)
    if len(loss) and not good[-1]:
        return Verdict("undecided", f"stopped in epoch {epoch[-1]:g}: the loss is not finite")
    elrs = log["elr"][np.isfinite(log["elr"])] if "elr" in log else np.ones(1)
    if len(elrs) and np.ptp(elrs) > 1e-6 * elrs.max():
        why = f"the ELR moved from {elrs[0]:.3g} to {elrs[-1]:.3g}, and a regime belongs to a fixed one"
        return Verdict("undecided", why, moves=True)
    if not good.all():
        notes.append(f"{(~good).sum()} rows without a finite loss left out")
    trained = good & (epoch > 0)
    tail = trained & (epoch > epoch[-1] / 2) if len(epoch) else trained
    n, epochs = int(tail.sum()), int(epoch[-1]) if len(epoch) else 0
    if n < MIN_TAIL:
        needs = max(2 * MIN_TAIL, 2 * epochs)
        return Verdict(
            "undecided", f"too short: {n} rows in the last half; it takes {needs} epochs at least", more_epochs=needs, notes=notes
        )
    where = f"epochs {epoch[tail][0]:g} to {epoch[tail][-1]:g}"

    # The level, against chance.
    has_error = "train_error" in log and np.isfinite(log["train_error"][tail]).all()
    what = "train_error" if has_error and (chance is None or "train_error" in chance) else "train_loss"
    if what == "train_loss":
        notes.append("no train_error: skill from the loss")
    if chance is None and epoch[0] == 0 and good[0]:
        chance = {key: {"mean": log[key][0], "std": 0.0} for key in ("train_loss", what)}
        notes.append("no chance reference: the row of epoch 0 stands in")
    level = skill = skill_error = math.nan
    if chance is not None:
        level = chance["train_loss"]["mean"]
        reference, points = chance[what]["mean"], chance.get("points", 1)
        value = log[what][tail]
        residual, inflation = _around_trend(np.log(epoch[tail]), value)
        skill = 1 - value.mean() / reference
        own = chance[what]["std"] / math.sqrt(points)
        skill_error = math.hypot(residual.std(ddof=1) / math.sqrt(n / inflation), own) / reference

    # The trend. A loss of exactly 0 has no logarithm: it counts as the smallest positive float32.
    log_loss, log_epoch = np.log(np.maximum(loss[tail], 1e-38)), np.log(epoch[tail])
    slope, low, high = theil_sen(log_epoch, log_loss)
    numbers = dict(skill=skill, skill_error=skill_error, slope=slope, slope_low=low, slope_high=high, notes=notes)
    trend = f"slope {slope:+.2f}, {_interval(low, high)}, over {where}"
    mean_loss = loss[tail].mean()

    def undecided(why: str, factor: float) -> Verdict:
        more = math.ceil(epochs * min(max(factor, 2), 16))
        return Verdict("undecided", f"{why}; {more} epochs would probably decide", more_epochs=more, **numbers)

    level_off = abs(slope) < FLAT and low > STEEP and np.median(loss[tail]) > NOTHING * level  # hovers, however low
    if np.median(loss[tail]) < NEGLIGIBLE * level and not level_off:
        return Verdict("convergence", f"the loss has fallen to {mean_loss / level:.2%} of chance ({trend})", **numbers)
    if high < 0 and slope < STEEP and not skill < Z99 * skill_error:
        return Verdict("convergence", f"the loss keeps falling ({trend}), now at {loss[-1]:.3g}", **numbers)
    if math.isnan(skill):
        numbers["notes"].append("no chance reference and no row of epoch 0")
        return undecided(f"without a chance reference equilibrium and divergence look alike ({trend})", 1)

    floor = FLOOR[what]
    better = f"{skill:.0%} ± {skill_error:.1%} better than chance"
    if skill < max(floor, Z99 * skill_error):
        turn = _walked(log, tail)
        if turn < 1:
            return undecided(f"at chance, but its random walk covers {turn:.2g} rad: it has hardly left its start", 1 / turn**2)
        if high < 0 and slope < -FLAT and skill > 0:
            return undecided(f"near chance ({better}), but the loss is falling ({trend})", 4)
        if skill_error > floor:
            return undecided(f"too noisy to tell from chance: {better}", (Z99 * skill_error / floor) ** 2)
        return Verdict("divergence", f"no better than chance: skill {skill:+.3f} ± {skill_error:.3f} over {where}", **numbers)
    if slope < STEEP or (high < 0 and slope < -FLAT) or (low > 0 and slope > FLAT):
        # Not a clear fall, but no level either: ask the last three quarters, where a trend would show more and noise less.
        word = "rising" if slope > 0 else "still falling slowly" if high < 0 else "the loss may be falling or not"
        longer = trained & (epoch > epoch[-1] / 4)
        slope, low, high = theil_sen(np.log(epoch[longer]), np.log(np.maximum(loss[longer], 1e-38)))
        if slope < STEEP or high < 0 or low > 0:
            return undecided(f"{better}, but {word} ({trend})", 4)
        trend += f"; {slope:+.2f}, {_interval(low, high)}, over the last three quarters"
    return Verdict("equilibrium", f"{better}, and the loss stays at about {mean_loss:.3g} ({trend})", **numbers)


def theil_sen(x: np.ndarray, y: np.ndarray, z: float = Z99) -> tuple[float, float, float]:
    """Median of the slopes of all pairs, and its interval (Sen, JASA 63, 1968: the ranks of Kendall's statistic). The rank's
    variance is inflated for the autocorrelation around the trend, which a training log always has."""
    i, j = np.triu_indices(len(x), 1)
    slopes = np.sort((y[j] - y[i]) / (x[j] - x[i]))
    slope, n = float(np.median(slopes)), len(x)
    sigma = math.sqrt(n * (n - 1) * (2 * n + 5) / 18 * _around_trend(x, y)[1])
    low, high = (len(slopes) - z * sigma) / 2, (len(slopes) + z * sigma) / 2
    # Ranks beyond the ends mean that so few points give no interval at this confidence: say so with an infinite one.
    return (
        slope,
        float(slopes[math.floor(low)]) if low >= 0 else -math.inf,
        float(slopes[math.ceil(high)]) if math.ceil(high) < len(slopes) else math.inf,
    )


def _interval(low: float, high: float) -> str:
    known = math.isfinite(low) and math.isfinite(high)
    return f"99 % interval {low:+.2f} to {high:+.2f}" if known else "too few independent rows for a 99 % interval"


def _around_trend(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """What is left of y around a smooth trend (a polynomial of at most degree 3, since few losses fall along a straight line),
    and by how much its autocorrelation r of lag 1 inflates the variance of a mean: (1 + r)/(1 − r), r corrected for bias."""
    n = len(y)
    degree = min(3, n // 4)
    residual = y - np.polynomial.Polynomial.fit(x, y, degree)(x)
    square = residual @ residual
    if square <= (1e-12 * np.abs(y).max()) ** 2:
        return residual, 1.0
    r = (residual[1:] @ residual[:-1]) / square
    r = min(max(r + (1 + 4 * r) / n, 0.0), 0.95)
    return residual, (1 + r) / (1 - r)


def _walked(log: dict[str, np.ndarray], tail: np.ndarray) -> float:
    """Angle in radians that a random walk of this run's angular steps is from its start, φ √steps; inf if not logged."""
    if "angle" not in log or "step" not in log:
        return math.inf
    return float(np.nanmean(log["angle"][tail]) * math.sqrt(log["step"][-1]))


def autocorrelation_time(x: np.ndarray) -> float:
    """Integrated autocorrelation time of a stationary series, in rows: 1 + 2 Σ_k r_k, summed up to the first k that is at least
    five times the sum so far (Sokal's window), which keeps the noise of the far lags out. 1 is white noise."""
    x = x - x.mean()
    r = np.correlate(x, x, "full")[len(x) - 1 :] / max(x @ x, 1e-300)
    sums = 2 * np.cumsum(r) - 1
    window = np.nonzero(np.arange(len(sums)) >= 5 * sums)[0]
    return float(max(sums[window[0] if len(window) else -1], 1.0))


def random_walk(log: dict[str, np.ndarray]) -> np.ndarray:
    """Per row, the angle to the start (radians) at which a walk of the run's own angular steps in random directions would be.

    An isotropic step by φ turns the expected cosine to the start by cos φ, on a sphere of any dimension: E cos = Π cos φ, which
    ends at the right angle. Of a row's steps the mean φ is known."""
    steps = np.diff(log["step"], prepend=0)
    return np.arccos(np.exp(np.cumsum(steps * np.log(np.maximum(np.cos(log["angle"]), 1e-300)))))


def explain(run: "Run", chance: dict | None) -> str:
    """The numbers behind a verdict, a line each."""
    verdict, log = run.verdict, run.log
    lines = [f"{run.name}: {TITLE.get(verdict.regime, verdict.regime)}: {verdict.why}"]
    tail = (log["epoch"] > max(log["epoch"][-1] / 2, 0)) & np.isfinite(log["train_loss"]) & (log["train_loss"] > 0)
    if math.isfinite(verdict.slope) and tail.sum() >= MIN_TAIL:
        epoch, loss = log["epoch"][tail], log["train_loss"][tail]
        lines.append(f"skill {verdict.skill:+.4f} ± {verdict.skill_error:.4f} (standard error)")
        lines.append(f"slope {verdict.slope:+.3f}, {_interval(verdict.slope_low, verdict.slope_high)}")
        against = (
            f"chance {chance['train_loss']['mean']:.4g} ± {chance['train_loss']['std']:.2g} from point to point" if chance else ""
        )
        lines.append(f"loss {loss.mean():.4g} over the last half" + (f"; {against}" if against else ""))
        if verdict.regime == "equilibrium":
            tau, per_row = autocorrelation_time(loss), (epoch[-1] - epoch[0]) / (len(epoch) - 1)
            error = loss.std(ddof=1) * math.sqrt(tau / len(loss))
            lines.append(
                f"level {loss.mean():.4g} ± {error:.2g}; autocorrelation time {tau * per_row:.1f} epochs, from {len(loss)} rows"
            )
        gamma = log.get("grad_norm", np.zeros(len(tail)))[tail]
        if (gamma > 0).all():
            slope, low, high = theil_sen(np.log(epoch), np.log(gamma))
            word = "falling" if high < 0 else "rising" if low > 0 else "no trend that is sure: stationary as far as one can tell"
            lines.append(f"γ {np.median(gamma):.4g}, its slope {slope:+.3f}, {_interval(low, high)}: {word}")
        if all(name in log and np.isfinite(log[name]).all() for name in ("angle", "distance", "step")):
            walk, words = random_walk(log), []
            rows = sorted({int(i) for i in np.geomspace(1, len(walk) - 1, 4)}) if len(walk) > 1 else []
            for i in rows:
                words.append(f"{log['distance'][i] ** 2:.3g} ({walk[i] ** 2:.3g}) after {log['step'][i]:g} steps")
            lines.append(
                "squared angle to the start, and that of a random walk of such steps, at most (π/2)² = 2.47: " + ", ".join(words)
            )
    if verdict.regime == "undecided" and verdict.more_epochs:
        lines.append(f"undecided until about epoch {verdict.more_epochs}: --epochs {verdict.more_epochs} goes on from here")
    lines += verdict.notes
    return "\n    ".join(lines)


# ---------------------------------------------------------------------------------------------------------------- logs


@dataclass
class Run:
    """One log and its verdict. `log` maps column to array; `problem` says what was wrong with the file, if anything."""

    path: Path
    elr: float
    seed: int
    log: dict[str, np.ndarray]
    verdict: Verdict
    problem: str = ""
    then: dict[str, np.ndarray] | None = None  # the log of the run that started from this one's end

    @property
    def name(self) -> str:
        if self.verdict.moves:
            return self.path.stem.replace("=", " ").replace(".seed", " seed")
        return self.path.stem if math.isnan(self.elr) else f"elr {elr_name(self.elr)}" + f" seed {self.seed}" * (self.seed != 0)

    def final(self, column: str) -> float:
        """Mean of a column over the last tenth of the rows; nan if the log has none. `then_…` is that of the second run."""
        log, name = (self.then or {}, column[5:]) if column.startswith("then_") else (self.log, column)
        values = log.get(name, np.array([math.nan]))
        return float(values[-max(1, len(values) // 10) :].mean())


def elr_name(elr: float) -> str:
    """The shortest scientific notation that reads back as the same number: 1e-02."""
    return np.format_float_scientific(elr, trim="-", exp_digits=2)


def read_log(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """A CSV log as columns, and a complaint about a last row that was cut off (then left out), else "".

    Raises ValueError, in one line that names the file, where it is no log: unreadable, empty, without the columns `epoch`
    and `train_loss`, with a cell that is no number, or with epochs that do not increase.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a CSV file ({getattr(error, 'strerror', None) or error})") from None
    if not rows:
        raise ValueError(f"{path}: empty; a log has a header and a row per epoch")
    header, rows = [cell.strip() for cell in rows[0]], rows[1:]
    missing = [name for name in ("epoch", "train_loss") if name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column {' and no column '.join(missing)}; its columns are {' '.join(', '.join(header).split())[:200]}"
        )
    problem = ""
    if rows and (not text.endswith("\n") or len(rows[-1]) < len(header)):
        problem = f"{path}: the last row (line {len(rows) + 1}) is cut off and left out"
        rows.pop()
    if not rows:
        raise ValueError(f"{path}: a header, but no whole row")
    table = np.empty((len(rows), len(header)))
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{path}: line {i + 2} has {len(row)} cells, the header {len(header)}")
        for j, cell in enumerate(row):
            try:
                table[i, j] = float(cell.replace("_", "?")) if cell.strip() else math.nan  # Python would read 1_0 as 10
            except ValueError:
                if header[j] in ("epoch", "train_loss"):
                    raise ValueError(f"{path}: line {i + 2}: {header[j]} is {cell[:40]!r}, not a number") from None
                table[i, j] = math.nan
    log = {name: table[:, j] for j, name in enumerate(header)}
    if not (np.isfinite(log["epoch"]).all() and (np.diff(log["epoch"]) > 0).all() and log["epoch"][0] >= 0):
        raise ValueError(f"{path}: the epochs do not increase from row to row")
    return log, problem


def read_chance(folder: Path) -> dict[str, dict]:
    """The chance references in a folder's config.json, by seed; none if there is no such file. Raises ValueError if it is
    damaged."""
    path = folder / "config.json"
    try:
        chance = json.loads(path.read_text(encoding="utf-8")).get("chance", {})
        for reference in chance.values():
            numbers = [reference[key][k] for key in ("train_loss", "train_error") if key in reference for k in ("mean", "std")]
            if not numbers or not all(math.isfinite(x) for x in numbers) or not reference["points"] >= 1:
                raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise ValueError(f"{path}: damaged: no chance reference can be read from it") from None
    return chance


def read_run(path: Path, chance: dict[str, dict]) -> Run:
    """Read and classify one log. ELR from its column `elr`, else from `elr=…` in its name; seed from `seed=…` in its name."""
    log, problem = read_log(path)
    in_name = re.search(r"elr=([0-9.]+(?:e[+-]?[0-9]+)?)", path.name)
    elr = float(log["elr"][0]) if "elr" in log else float(in_name[1].rstrip(".")) if in_name else math.nan
    seed = re.search(r"seed=([0-9]{1,18})", path.name)
    seed = int(seed[1]) if seed else 0
    verdict = classify(log, chance.get(str(seed)))
    elr = elr if elr > 0 and math.isfinite(elr) and not verdict.moves else math.nan
    then = sorted(path.parent.glob(f"{glob.escape(path.stem)}.then=*.csv"))
    then = [p for p in then if ".order=" not in p.name and not p.name.endswith(".layers.csv")]
    run = Run(path, elr, seed, log, verdict, problem)
    with suppress(ValueError):  # it may just have been started
        run.then = read_log(then[0])[0] if then else None
    return run


# -------------------------------------------------------------------------------------------------------------- sweeps


def by_elr(runs: list[Run]) -> dict[float, list[Run]]:
    """The runs (seeds) of each ELR, by increasing ELR."""
    elrs = sorted({run.elr for run in runs if not math.isnan(run.elr)})
    return {elr: sorted((run for run in runs if run.elr == elr), key=lambda run: run.seed) for elr in elrs}


def majority(runs: list[Run]) -> tuple[str, float]:
    """The regime that most of the runs are in, and their share; undecided if none has more than half."""
    regimes = [run.verdict.regime for run in runs]
    regime = max(dict.fromkeys(regimes), key=regimes.count)
    share = regimes.count(regime) / len(runs)
    return (regime, share) if share > 0.5 else ("undecided", share)


@dataclass
class Boundary:
    """Between two regimes: the largest ELR on the lower side, the smallest on the upper, nan where a side was not seen."""

    left: str
    right: str
    low: float
    high: float
    shares: tuple[float, float]

    def __str__(self) -> str:
        name = f"{TITLE.get(self.left, self.left)} | {TITLE.get(self.right, self.right)}: "
        if math.isnan(self.low) and math.isnan(self.high):
            return name + "not seen"
        if math.isnan(self.low):
            return name + f"below {self.high:.3g}"
        if math.isnan(self.high):
            return name + f"above {self.low:.3g}"
        text = name + f"{self.low:.4g} to {self.high:.4g} (×{self.high / self.low:.3g})"
        return text if self.shares == (1, 1) else text + f", {self.shares[0]:.0%} of the seeds below, {self.shares[1]:.0%} above"


def boundaries(runs: list[Run]) -> list[Boundary]:
    """The two boundaries of a sweep as brackets of neighbouring decided ELRs, by the majority of seeds. Raises ValueError
    where the regimes are out of order along the ELR, so that there is no one boundary."""
    decided = [(elr, *majority(group)) for elr, group in by_elr(runs).items()]
    decided = [(elr, regime, share) for elr, regime, share in decided if regime in ORDER]
    for (elr, regime, _), (after, then, _) in pairwise(decided):
        if ORDER[then] < ORDER[regime]:
            raise ValueError(f"out of order: {regime} at ELR {elr:.3g}, but {then} at {after:.3g}")
    found = []
    for left, right in (("convergence", "equilibrium"), ("equilibrium", "divergence")):
        below = [(elr, share) for elr, regime, share in decided if ORDER[regime] <= ORDER[left]]
        above = [(elr, share) for elr, regime, share in decided if ORDER[regime] >= ORDER[right]]
        low, high = below[-1] if below else (math.nan, 1), above[0] if above else (math.nan, 1)
        found.append(Boundary(left, right, low[0], high[0], (low[1], high[1])))
    return found


COLUMNS = ("elr", "regime", "skill", "slope", "train_loss", "train_error", "test_error", "grad_norm", "epochs", "seed")
THEN_COLUMNS = ("then_test_error", "then_train_loss")  # where there are second runs


def rows(runs: list[Run]) -> list[list]:
    """One row of COLUMNS per run with an ELR, in order of ELR and seed; losses, errors and γ as means of the last tenth."""
    table = []
    for group in by_elr(runs).values():
        for run in group:
            measured = [run.final(name) for name in COLUMNS[4:8]]
            epochs = int(run.log["epoch"][-1])
            table.append([run.elr, run.verdict.regime, run.verdict.skill, run.verdict.slope, *measured, epochs, run.seed])
            table[-1] += [run.final(name) for name in THEN_COLUMNS] if any(run.then for run in runs) else []
    return table


def summary(runs: list[Run]) -> list[dict]:
    """A dict per ELR: its regime by the majority of the seeds, their share and number; and of skill, losses, errors and γ (means
    of the last tenth of the epochs) the median over the seeds, the least (`_low`) and the greatest (`_high`)."""
    found = []
    for elr, group in by_elr(runs).items():
        regime, share = majority(group)
        row = {"elr": elr, "regime": regime, "share": share, "seeds": len(group)}
        for name in ("skill", "train_loss", "train_error", "test_error", "grad_norm"):
            values = [run.verdict.skill if name == "skill" else run.final(name) for run in group]
            row |= {name: float(np.median(values)), f"{name}_low": min(values), f"{name}_high": max(values)}
        found.append(row)
    return found


def table(runs: list[Run]) -> str:
    """The sweep as text: a line per ELR, where there are several seeds with their median and spread; then the boundaries, and
    the way of each run whose ELR moved."""
    lines = []
    if len({run.seed for run in runs}) > 1:
        lines = ["       ELR  regime               seeds   skill  train loss, least to greatest      test error               γ"]
        for row in summary(runs):
            seeds = f"{round(row['share'] * row['seeds'])}/{row['seeds']}"
            loss, error = ([row[name + end] for end in ("", "_low", "_high")] for name in ("train_loss", "test_error"))
            cells = (f"{elr_name(row['elr']):>10}", f"{TITLE.get(row['regime'], row['regime']):<19}", f"{seeds:>5}")
            cells += (f"{row['skill']:6.3f}", f"{loss[0]:10.4g}  {f'{loss[1]:.4g} to {loss[2]:.4g}':<20}")
            cells += (f"{error[0]:5.3f}  {f'{error[1]:.3f} to {error[2]:.3f}':<14}", f"{row['grad_norm']:8.3g}")
            lines.append("  ".join(cells).replace("+nan", "   –").replace("nan", "  –"))
    elif by_elr(runs):
        lines = ["       ELR  regime               skill   slope  train loss  error  test error         γ  epochs"]
        for elr, regime, skill, slope, loss, error, test_error, gamma, epochs, *_ in rows(runs):
            cells = (
                f"{elr_name(elr):>10}",
                f"{TITLE.get(regime, regime):<19}",
                f"{skill:6.3f}",
                f"{slope:+6.2f}",
                f"{loss:10.4g}",
            )
            cells += (f"{error:5.3f}", f"{test_error:10.3f}", f"{gamma:8.3g}", f"{epochs:6d}")
            lines.append("  ".join(cells).replace("+nan", "   –").replace("nan", "  –"))
    try:
        lines += [str(boundary) for boundary in boundaries(runs)] if by_elr(runs) else []
    except ValueError as error:
        lines.append(f"no boundaries: {error}")
    return "\n".join(lines + [f"{run.name}: {way(run, runs)}" for run in runs if run.verdict.moves])


def way(run: Run, runs: list[Run]) -> str:
    """Through which regimes the ELR of a run went that was not held fixed: by epoch the regime of the sweep's ELR nearest in the
    logarithm, as far as the sweep reaches."""
    elrs = run.log["elr"]
    text = f"ELR {elrs[0]:.3g} to {elrs[-1]:.3g}"
    bands = {elr: majority(group)[0] for elr, group in by_elr(runs).items()}
    if not bands:
        return f"{text}; a sweep given beside it says through which regimes that leads"
    inside = (elrs >= min(bands)) & (elrs <= max(bands))
    nearest = np.abs(np.log(np.array(list(bands)) / elrs[:, None])).argmin(1)
    names = [list(bands.values())[i] if ok else "outside the sweep" for i, ok in zip(nearest, inside, strict=True)]
    changes = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    return f"{text}: " + ", ".join(f"{TITLE.get(names[i], names[i])} from epoch {run.log['epoch'][i]:g}" for i in changes)


def write_csv(path: Path, lines: list[list]) -> None:
    """The lines, the first of them the names of the columns; numbers to 6 digits, the ELR, which comes first, to 9."""
    text = io.StringIO()
    cells = ([f"{x:.{6 if i else 9}g}" if isinstance(x, float) else x for i, x in enumerate(line)] for line in lines)
    csv.writer(text, lineterminator="\n").writerows(cells)
    _replace(path, text.getvalue().encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


COLOURS = {"convergence": "#0072B2", "equilibrium": "#E69F00", "divergence": "#CC79A7", "undecided": "#999999"}  # Okabe and Ito


def figure(runs: list[Run], path: Path, title: str = "") -> None:
    """Five panels, written to `path` (PNG): loss, error and γ per epoch, the phase diagram, and the regimes along the ELR. Of the
    toy, whose theory is known, the second panel shows the individual ELRs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    groups = by_elr(runs)
    moving = [run for run in runs if run.verdict.moves]
    elrs = np.array([*groups, *(x for run in moving for x in run.log["elr"])])
    span = (elrs.min(), elrs.max()) if np.ptp(elrs) > 0 else (elrs[0] / 2, elrs[0] * 2)
    colour = plt.cm.ScalarMappable(LogNorm(*span), plt.get_cmap("viridis"))
    fig, axes = plt.subplot_mosaic([["a", "b", "c"], ["d", "e", "e"]], figsize=(12.5, 7), layout="constrained")
    lines = [(colour.to_rgba(elr), "-", group) for elr, group in groups.items()] + [("black", "--", [run]) for run in moving]

    def curves(ax, column, label, scale, **options):
        for tone, style, group in lines:
            epoch, middle, low, high = _over_seeds(group, column)
            ax.plot(epoch, middle, style, color=tone, lw=1.3, label=group[0].name if style == "--" else None)
            if len(group) > 1:
                ax.fill_between(epoch, low, high, color=tone, alpha=0.2, lw=0)
        ax.set(xlabel="epoch", title=label)
        if logged(column):
            ax.set_yscale(scale, **options)

    def logged(column):
        """Whether a run has such a column with values that a logarithmic axis can show."""
        return any((run.log.get(column, np.zeros(1)) > 0).any() for run in runs)

    alphas = _alphas(runs)
    curves(axes["a"], "train_loss", "(a) train loss (nats)" if not alphas else "(a) F", "log")
    if moving:
        axes["a"].legend(fontsize=9)
    if alphas:
        axes["a"].set_ylim(1e-6 * sum(alphas), 2 * sum(alphas))  # what converges falls without end
        axes["a"].axhline(sum(alphas) / 2, color="black", ls=":", lw=1)
        axes["a"].text(0.98, sum(alphas) / 2, "chance, Σα/2", transform=axes["a"].get_yaxis_transform(), ha="right", va="bottom")
        _individual_elrs(axes["b"], runs, alphas)
    else:
        curves(axes["b"], "test_error", "(b) test error", "symlog", linthresh=0.01)
        axes["b"].set_ylim(0, 1.05)
        axes["b"].set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    curves(axes["c"], "grad_norm", r"(c) effective gradient norm $\gamma$, epoch mean", "log")
    if alphas:
        axes["c"].set_ylim(1e-3, 2 * max(run.log["grad_norm"].max() for run in runs))

    ax = axes["d"]
    for tone, style, group in lines:
        gamma, loss = _over_seeds(group, "grad_norm")[1], _over_seeds(group, "train_loss")[1]
        ax.plot(gamma, loss, "." + style, color=tone, lw=0.8, ms=3)
        ax.plot(gamma[-1:], loss[-1:], "o", color=tone, ms=5, mec="black", mew=0.5, zorder=3)
    starts = [
        (run.log["grad_norm"][0], run.log["train_loss"][0]) for run in runs if run.log["epoch"][0] == 0 and "grad_norm" in run.log
    ]
    if starts:
        ax.plot(*zip(*starts, strict=True), "*", color="black", ms=11, ls="none", label="start", zorder=4)
        ax.legend(loc="upper left", frameon=False)
    ax.set(xlabel=r"effective gradient norm $\gamma$", ylabel="train loss (nats)" if not alphas else "F")
    if logged("grad_norm") and logged("train_loss"):
        ax.set(xscale="log", yscale="log")
    if alphas:
        ax.set(xlim=axes["c"].get_ylim(), ylim=axes["a"].get_ylim())
    ax.set_title("(d) phase diagram, end of each run circled")
    fig.colorbar(colour, ax=[axes["a"], axes["b"], axes["c"]], label="ELR", pad=0.01)

    _along_the_elr(axes["e"], runs, groups, moving, alphas)
    if title:
        fig.suptitle(title)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=110, format="png")
    plt.close(fig)
    _replace(path, picture.getbuffer())


def _alphas(runs: list[Run]) -> list[float]:
    """The toy's α, if these are runs of the toy; from the config.json beside them."""
    try:
        alphas = json.loads((runs[0].path.parent / "config.json").read_text(encoding="utf-8"))["options"]["alphas"]
        return [float(a) for a in alphas]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return []


def _individual_elrs(ax, runs: list[Run], alphas: list[float]) -> None:
    """The toy: α_i η̃_i of every group, on both sides of the threshold. Group i contracts while it is below 1."""
    groups = by_elr(runs)
    sides = {"below": [e for e in groups if e * sum(alphas) < 1][-1:], "above": [e for e in groups if e * sum(alphas) > 1][:1]}
    for (side, elrs), style in zip(sides.items(), ("-", ":"), strict=True):
        for elr in elrs:
            path = groups[elr][0].path.with_suffix(".layers.csv")
            with open(path, encoding="utf-8") as file:
                found = [(float(row["epoch"]), float(row["elr"])) for row in csv.DictReader(file)]
            paths = np.array(found).reshape(-1, len(alphas), 2)
            for i, alpha in enumerate(alphas):
                label = f"α = {alpha:g}, ELR {elr:.4g} ({side})"
                ax.plot(paths[:, i, 0], alpha * paths[:, i, 1], style, color=f"C{i}", lw=1.5, label=label)
    ax.axhline(1, color="black", lw=1)
    ax.set(xlabel="epoch", ylim=(0, None), title="(b) individual ELR of each group, times its α")
    ax.legend(fontsize=8, loc="upper right")


def _over_seeds(group: list[Run], column: str) -> tuple[np.ndarray, ...]:
    """Epochs that all seeds have, with the median, the least and the greatest value over the seeds."""
    epochs = sorted(set.intersection(*(set(run.log["epoch"]) for run in group)))
    empty = np.full(len(epochs), math.nan)
    values = [run.log[column][np.isin(run.log["epoch"], epochs)] if column in run.log else empty for run in group]
    return np.array(epochs), np.median(values, 0), np.min(values, 0), np.max(values, 0)


def _along_the_elr(ax, runs: list[Run], groups: dict[float, list[Run]], moving: list[Run], alphas: list[float]) -> None:
    """Panel (e): final loss (left axis) and errors (right axis) against ELR, over the bands of the regimes; of the runs whose ELR
    moved the path, of the toy the threshold."""
    elrs = np.array(list(groups))
    right = ax.twinx()
    series = [(ax, "train_loss", "o-", "black", "train loss" if not alphas else "F")]
    series += [(right, "train_error", "s--", "#009E73", "train error"), (right, "test_error", "^:", "#D55E00", "test error")]
    handles = []
    for axis, column, style, colour, label in series if groups else ():
        finals = [[run.final(column) for run in group] for group in groups.values()]
        middle = np.array([np.median(values) for values in finals])
        spread = [middle - [min(values) for values in finals], [max(values) for values in finals] - middle]
        if np.isfinite(middle).any():
            seeds = any(len(group) > 1 for group in groups.values())
            look = {"fmt": style, "color": colour, "ms": 4, "lw": 1.3, "capsize": 2 * seeds}
            handles.append(axis.errorbar(elrs, middle, yerr=spread, label=label, **look))
    for i, run in enumerate(moving):
        handles += ax.plot(run.log["elr"], run.log["train_loss"], ".--", color=f"C{i}", lw=1.3, label=run.name)
        ax.plot(run.log["elr"][0], run.log["train_loss"][0], "*", color=f"C{i}", ms=11)
        ax.plot(run.log["elr"][-1], run.log["train_loss"][-1], "o", color=f"C{i}", ms=6, mec="black")
    if any(run.final("train_loss") > 0 for run in runs):
        ax.set_yscale("log")
    ax.set(xscale="log", xlabel="ELR", ylabel="final train loss (nats)" if not alphas else "F, mean of the last tenth")
    ax.legend(handles=handles, loc="upper left", fontsize=9)
    ax.set_title("(e) regimes along the ELR, boundaries hatched", pad=28)
    if any("train_error" in run.log or "test_error" in run.log for run in runs):
        right.set(ylabel="final error", ylim=(-0.03, 1.03))
    else:
        right.set_axis_off()
    if not groups:
        return
    if alphas:
        ax.axvline(1 / sum(alphas), color="#D55E00", lw=1.5)
        ax.axhline(sum(alphas) / 2, color="black", ls=":", lw=1)
        ax.set_ylim(1e-6 * sum(alphas), 2 * sum(alphas))
        look = {"transform": ax.get_xaxis_transform(), "color": "#D55E00", "va": "top", "ha": "right"}
        ax.text(0.95 / sum(alphas), 0.75, f"theory: 1/Σα = {1 / sum(alphas):.4g}", **look)
    edges = np.sqrt(elrs[1:] * elrs[:-1])
    margin = edges[0] / elrs[0] if len(edges) else 2.0
    edges = np.concatenate([[elrs[0] / margin], edges, [elrs[-1] * margin]])
    verdicts = [majority(group)[0] for group in groups.values()]
    for regime in dict.fromkeys(verdicts):
        for i, verdict in enumerate(verdicts):
            if verdict == regime:
                ax.axvspan(edges[i], edges[i + 1], color=COLOURS[regime], alpha=0.2, lw=0)
        inside = [i for i, verdict in enumerate(verdicts) if verdict == regime]
        middle = math.sqrt(edges[inside[0]] * edges[inside[-1] + 1])
        label = TITLE.get(regime, regime).replace(" ", "\n")
        ax.text(middle, 1.01, label, transform=ax.get_xaxis_transform(), ha="center", va="bottom", color="black", fontsize=9)
    try:
        found = boundaries(runs)
    except ValueError:
        found = []
    for boundary in found:
        if math.isfinite(boundary.low) and math.isfinite(boundary.high):
            ax.axvspan(boundary.low, boundary.high, facecolor="none", edgecolor="black", alpha=0.25, hatch="////", lw=0)
            look = {
                "rotation": 90,
                "ha": "left",
                "va": "bottom",
                "fontsize": 9,
                "bbox": {"fc": "white", "ec": "none", "pad": 1.5, "alpha": 0.75},
            }
            text = f"{boundary.low:.4g} – {boundary.high:.4g}"
            ax.text(boundary.high, 0.03, text, transform=ax.get_xaxis_transform(), **look)
    everywhere = [*edges, *(x for run in moving for x in run.log["elr"])]
    ax.set_xlim(min(everywhere), max(everywhere))


def report(runs: list[Run], out: Path | None, title: str = "") -> str:
    """The table as text; regimes.csv, summary.csv and regimes.png are written into `out`, if given."""
    if out is not None and (by_elr(runs) or any(run.verdict.moves for run in runs)):
        then = THEN_COLUMNS if any(run.then for run in runs) else ()
        write_csv(out / "regimes.csv", [[*COLUMNS, *then], *rows(runs)])
        found = summary(runs)
        write_csv(out / "summary.csv", [list(row.values()) for row in [dict(zip(x, x, strict=True)) for x in found[:1]] + found])
        figure(runs, out / "regimes.png", title)
    return table(runs)


def find_logs(folder: Path) -> list[Path]:
    """The runs' logs in a folder: all CSV files but the layers' and our own tables."""
    return sorted(
        p for p in folder.glob("*.csv") if not p.name.endswith(".layers.csv") and p.name not in TABLES and ".then=" not in p.name
    )


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line and exit status 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    text = "Name the training regime of each run (convergence, chaotic equilibrium or divergence) from its CSV log alone."
    example = "example: python regimes.py --explain logs/digits-convnet"
    parser = Parser(prog="regimes.py", description=text, epilog=example)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of logs, or a CSV with epoch and train_loss")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where regimes.csv and regimes.png go (default: a folder given)")
    parser.add_argument("--explain", action="store_true", help="also print the numbers behind each verdict")
    args = parser.parse_args(argv)
    folders = [path for path in args.paths if path.is_dir()]
    out = args.out or (folders[0] if len(args.paths) == len(folders) == 1 else None)
    if args.out and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is no folder: make it first")
    runs, problems, chances = [], [], {}
    for path in [log for given in args.paths for log in (find_logs(given) if given.is_dir() else [given])]:
        try:
            if path.parent not in chances:
                chances[path.parent] = {}
                chances[path.parent] = read_chance(path.parent)
        except ValueError as error:
            problems.append(str(error))
        try:
            run = read_run(path, chances[path.parent])
            runs.append(run)
            problems += [run.problem] if run.problem else []
        except ValueError as error:
            problems.append(str(error))
    if not runs and not problems:
        problems.append(f"{args.paths[0]}: no logs here; a log is a CSV file with the columns epoch and train_loss")
    runs.sort(key=lambda run: (math.isnan(run.elr), run.elr, run.seed))
    if by_elr(runs) or any(run.verdict.moves for run in runs):
        print(report(runs, out))
    for run in runs:
        if args.explain:
            print(explain(run, chances[run.path.parent].get(str(run.seed))))
        elif math.isnan(run.elr) and not run.verdict.moves:
            notes = f" [{'; '.join(run.verdict.notes)}]" if run.verdict.notes else ""
            print(f"{run.name}: {TITLE.get(run.verdict.regime, run.verdict.regime)}: {run.verdict.why}{notes}")
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
