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
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

ORDER = {"convergence": 0, "equilibrium": 1, "divergence": 2}
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
    trend = f"slope {slope:+.2f}, 99 % interval {low:+.2f} to {high:+.2f}, over {where}"
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
        trend += f"; {slope:+.2f}, {low:+.2f} to {high:+.2f}, over the last three quarters"
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

    @property
    def name(self) -> str:
        return self.path.stem if math.isnan(self.elr) else f"elr {elr_name(self.elr)}" + f" seed {self.seed}" * (self.seed != 0)

    def final(self, column: str) -> float:
        """Mean of a column over the last tenth of the rows; nan if the log has none."""
        values = self.log.get(column, np.array([math.nan]))
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
        raise ValueError(f"{path}: no column {' and no column '.join(missing)}; its columns are {', '.join(header)[:200]}")
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
                table[i, j] = float(cell) if cell.strip() else math.nan
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
    return Run(path, elr, seed, log, verdict, problem)


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
        text = name + f"{self.low:.3g} to {self.high:.3g} (×{self.high / self.low:.3g})"
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


def rows(runs: list[Run]) -> list[list]:
    """One row of COLUMNS per run with an ELR, in order of ELR and seed; losses, errors and γ as means of the last tenth."""
    table = []
    for group in by_elr(runs).values():
        for run in group:
            measured = [run.final(name) for name in COLUMNS[4:8]]
            epochs = int(run.log["epoch"][-1])
            table.append([run.elr, run.verdict.regime, run.verdict.skill, run.verdict.slope, *measured, epochs, run.seed])
    return table


def table(runs: list[Run]) -> str:
    """The sweep as text: a line per run, then the boundaries."""
    seeds = len({run.seed for run in runs}) > 1
    lines = ["       ELR  regime               skill   slope  train loss  error  test error         γ  epochs" + "  seed" * seeds]
    for elr, regime, skill, slope, loss, error, test_error, gamma, epochs, seed in rows(runs):
        cells = (f"{elr_name(elr):>10}", f"{TITLE.get(regime, regime):<19}", f"{skill:6.3f}", f"{slope:+6.2f}", f"{loss:10.4g}")
        cells += (f"{error:5.3f}", f"{test_error:10.3f}", f"{gamma:8.3g}", f"{epochs:6d}") + (f"{seed:4d}",) * seeds
        lines.append("  ".join(cells).replace("nan", "  –"))
    try:
        lines += [str(boundary) for boundary in boundaries(runs)]
    except ValueError as error:
        lines.append(f"no boundaries: {error}")
    return "\n".join(lines)


def write_csv(runs: list[Run], path: Path) -> None:
    """regimes.csv: `rows`, with numbers to 6 digits."""
    lines = [COLUMNS, *([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows(runs))]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    os.replace(temporary, path)


COLOURS = {"convergence": "#0072B2", "equilibrium": "#E69F00", "divergence": "#CC79A7", "undecided": "#999999"}  # Okabe and Ito


def figure(runs: list[Run], path: Path, title: str = "") -> None:
    """Five panels, written to `path` (PNG): loss, error and γ per epoch, the phase diagram, and the regimes along the ELR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    groups = by_elr(runs)
    elrs = np.array(list(groups))
    span = (elrs[0], elrs[-1]) if len(elrs) > 1 else (elrs[0] / 2, elrs[0] * 2)
    colour = plt.cm.ScalarMappable(LogNorm(*span), plt.get_cmap("viridis"))
    fig, axes = plt.subplot_mosaic([["a", "b", "c"], ["d", "e", "e"]], figsize=(12.5, 7), layout="constrained")

    def curves(ax, column, label, scale, **options):
        for elr, group in groups.items():
            epoch, middle, low, high = _over_seeds(group, column)
            ax.plot(epoch, middle, color=colour.to_rgba(elr), lw=1.3)
            if len(group) > 1:
                ax.fill_between(epoch, low, high, color=colour.to_rgba(elr), alpha=0.2, lw=0)
        ax.set(xlabel="epoch", title=label)
        if logged(column):
            ax.set_yscale(scale, **options)

    def logged(column):
        """Whether a run has such a column with values that a logarithmic axis can show."""
        return any((run.log.get(column, np.zeros(1)) > 0).any() for run in runs)

    curves(axes["a"], "train_loss", "(a) train loss (nats)", "log")
    curves(axes["b"], "test_error", "(b) test error", "symlog", linthresh=0.01)
    axes["b"].set_ylim(0, 1.05)
    axes["b"].set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    curves(axes["c"], "grad_norm", r"(c) effective gradient norm $\gamma$, epoch mean", "log")

    ax = axes["d"]
    for elr, group in groups.items():
        gamma, loss = _over_seeds(group, "grad_norm")[1], _over_seeds(group, "train_loss")[1]
        ax.plot(gamma, loss, ".-", color=colour.to_rgba(elr), lw=0.8, ms=3)
        ax.plot(gamma[-1:], loss[-1:], "o", color=colour.to_rgba(elr), ms=5, mec="black", mew=0.5, zorder=3)
    starts = [
        (run.log["grad_norm"][0], run.log["train_loss"][0]) for run in runs if run.log["epoch"][0] == 0 and "grad_norm" in run.log
    ]
    if starts:
        ax.plot(*zip(*starts, strict=True), "*", color="black", ms=11, ls="none", label="start", zorder=4)
        ax.legend(loc="upper left", frameon=False)
    ax.set(xlabel=r"effective gradient norm $\gamma$", ylabel="train loss (nats)")
    if logged("grad_norm") and logged("train_loss"):
        ax.set(xscale="log", yscale="log")
    ax.set_title("(d) phase diagram, end of each run circled")
    fig.colorbar(colour, ax=[axes["a"], axes["b"], axes["c"]], label="ELR", pad=0.01)

    _along_the_elr(axes["e"], runs, groups)
    if title:
        fig.suptitle(title)
    temporary = path.with_name(path.name + ".tmp")
    fig.savefig(temporary, dpi=110, format="png")
    plt.close(fig)
    os.replace(temporary, path)


def _over_seeds(group: list[Run], column: str) -> tuple[np.ndarray, ...]:
    """Epochs that all seeds have, with the median, the least and the greatest value over the seeds."""
    epochs = sorted(set.intersection(*(set(run.log["epoch"]) for run in group)))
    empty = np.full(len(epochs), math.nan)
    values = [run.log[column][np.isin(run.log["epoch"], epochs)] if column in run.log else empty for run in group]
    return np.array(epochs), np.median(values, 0), np.min(values, 0), np.max(values, 0)


def _along_the_elr(ax, runs: list[Run], groups: dict[float, list[Run]]) -> None:
    """Panel (e): final loss (left axis) and errors (right axis) against ELR, over the bands of the regimes."""
    elrs = np.array(list(groups))
    right = ax.twinx()
    series = [(ax, "train_loss", "o-", "black", "train loss"), (right, "train_error", "s--", "#009E73", "train error")]
    series.append((right, "test_error", "^:", "#D55E00", "test error"))
    handles = []
    for axis, column, style, colour, label in series:
        finals = [[run.final(column) for run in group] for group in groups.values()]
        middle = np.array([np.median(values) for values in finals])
        spread = [middle - [min(values) for values in finals], [max(values) for values in finals] - middle]
        if np.isfinite(middle).any():
            look = {"fmt": style, "color": colour, "ms": 4, "lw": 1.3, "capsize": 2 * (len(runs) > len(groups))}
            handles.append(axis.errorbar(elrs, middle, yerr=spread, label=label, **look))
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
                "ha": "center",
                "va": "bottom",
                "fontsize": 9,
                "bbox": {"fc": "white", "ec": "none", "pad": 1.5, "alpha": 0.75},
            }
            text, middle = f"{boundary.low:.3g} – {boundary.high:.3g}", math.sqrt(boundary.low * boundary.high)
            ax.text(middle, 0.03, text, transform=ax.get_xaxis_transform(), **look)
    if any(run.final("train_loss") > 0 for run in runs):
        ax.set_yscale("log")
    ax.set(xscale="log", xlabel="ELR", ylabel="final train loss (nats)", xlim=(edges[0], edges[-1]))
    ax.set_title("(e) regimes along the ELR, boundaries hatched", pad=28)
    right.set(ylabel="final error", ylim=(-0.03, 1.03))
    ax.legend(handles=handles, loc="upper left", fontsize=9)


def report(runs: list[Run], out: Path | None, title: str = "") -> str:
    """The table as text; regimes.csv and regimes.png are written into `out`, if given."""
    if out is not None and by_elr(runs):
        write_csv(runs, out / "regimes.csv")
        figure(runs, out / "regimes.png", title)
    return table(runs)


def find_logs(folder: Path) -> list[Path]:
    """The runs' logs in a folder: all CSV files but the layers' and our own tables."""
    return sorted(p for p in folder.glob("*.csv") if not p.name.endswith(".layers.csv") and p.name != "regimes.csv")


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="regimes.py", description="Name the training regime of each run from its CSV log.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of logs, or a CSV with epoch and train_loss")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where regimes.csv and regimes.png go (default: a folder given)")
    parser.add_argument("--why", action="store_true", help="also print the reason of each verdict")
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
    if by_elr(runs):
        print(report(runs, out))
    for run in runs:
        if args.why or math.isnan(run.elr):
            notes = f" [{'; '.join(run.verdict.notes)}]" if run.verdict.notes else ""
            print(f"{run.name}: {TITLE.get(run.verdict.regime, run.verdict.regime)}: {run.verdict.why}{notes}")
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
