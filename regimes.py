"""Name the training regime of each run from its CSV log: convergence, equilibrium or divergence.

    python regimes.py logs/digits-convnet          every run of a folder: table, boundaries
    python regimes.py mine.csv yours.csv           anybody's logs: columns epoch and train_loss

The rule (`classify`) looks at the last half of the epochs.

    skill = 1 − value/chance          of the error and of the loss: how much better than a random
                                      point of the sphere, each with its uncertainty
    slope = d log loss / d log epoch  Theil and Sen's median over all pairs, with a 99 % interval
    turn  = φ √steps                  the angle that a random walk of the run's own steps covers

    convergence   the slope is surely negative and not small, or the loss is next to nothing
    divergence    neither error nor loss can be told from chance, and turn ≥ 1
    equilibrium   one of them can, there is no trend, and turn ≥ 1: the run has forgotten its start
    undecided     none of these for sure; it says what would decide

This file needs numpy alone. Regimes: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695).
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
TITLE = {"equilibrium": "chaotic equilibrium"}
TABLES = ("regimes.csv", "landscape.csv", "toy.csv")

# The constants of the rule.
MIN_TAIL = 4  # rows of the tail: with fewer the interval of no slope is finite
NEGLIGIBLE = 0.003  # of the chance loss: below, all runs tried that went on went on falling
NOTHING = 1e-9  # of the chance loss: what hovers down here is rounding
STEEP = -0.5  # slope of a falling loss: 1/epoch has −1, a level 0, and this lies between
FLAT = 0.1  # slopes this small change a loss by 7 % while the epochs double: no trend
FLOORS = {"train_error": 0.03, "train_loss": 0.1}  # skill below this is none: a random walk's mean
# over a run strays so far from chance, the loss, whose tail is long, farther than the error
TURN = 1.0  # radians: a walk that has turned less still remembers its start
Z99 = 2.576  # standard normal quantile of a two-sided 99 % interval


@dataclass
class Skill:
    """1 − value/chance over the tail, with its standard error, of `train_error` or `train_loss`."""

    of: str
    value: float
    error: float

    @property
    def told(self) -> bool:
        """Whether it is told from chance."""
        return self.value >= max(FLOORS[self.of], Z99 * self.error)

    @property
    def may_be_told(self) -> bool:
        """Whether the noise may hide that it can be told. Surely worse than chance, it does not."""
        floor = FLOORS[self.of]
        return self.error > floor and self.value + Z99 * self.error > floor

    def __str__(self) -> str:
        return f"{self.of[6:]} {self.value:.0%} ± {self.error:.1%} better than chance"


@dataclass
class Verdict:
    """What `classify` found. `why` says it in words; `skill` is the one that decided, of `skills`;
    slope_low, slope_high are a 99 % interval; `more_epochs` is how many epochs in all would
    probably decide an undecided run; `moves`: the ELR was not held fixed."""

    regime: str
    why: str
    skills: list[Skill] = field(default_factory=list)
    slope: float = math.nan
    slope_low: float = math.nan
    slope_high: float = math.nan
    turn: float = math.nan
    more_epochs: int | None = None
    notes: list[str] = field(default_factory=list)
    moves: bool = False

    @property
    def skill(self) -> float:
        told = [skill for skill in self.skills if skill.told] + self.skills
        return told[0].value if told else math.nan


def classify(log: dict[str, np.ndarray], chance: dict | None = None) -> Verdict:
    """The regime of one run.

    log      columns of equal length, a row per epoch: `epoch` (0 = before training), `train_loss`
             in nats; where present `train_error` in [0, 1], `step`, `angle` (mean φ in radians).
    chance   {"train_loss": {"mean", "std"}, "train_error": {"mean", "std"}, "points": n}: loss and
             error at n random points of the sphere. Without it the row of epoch 0 stands in.
    """
    notes, epoch, loss = [], log["epoch"], log["train_loss"]
    good = np.isfinite(loss) & (loss >= 0)
    if len(loss) and not good[-1]:
        return Verdict("undecided", f"stopped in epoch {epoch[-1]:g}: the loss is not finite")
    elrs = log["elr"][np.isfinite(log["elr"])] if "elr" in log else np.ones(1)
    if len(elrs) and np.ptp(elrs) > 1e-6 * elrs.max():
        why = f"the ELR moved from {elrs[0]:.3g} to {elrs[-1]:.3g}, and a regime needs a fixed one"
        return Verdict("undecided", why, moves=True)
    if not good.all():
        notes.append(f"{(~good).sum()} rows without a finite loss left out")
    trained = good & (epoch > 0)
    tail = trained & (epoch > epoch[-1] / 2) if len(epoch) else trained
    if tail.sum() < MIN_TAIL:
        last = int(epoch[-1]) if len(epoch) else 0
        needs = max(2 * MIN_TAIL, 2 * last)
        why = f"too short: {tail.sum()} rows in the last half; it takes {needs} epochs at least"
        return Verdict("undecided", why, more_epochs=needs, notes=notes)

    # The level, against chance.
    if chance is None and epoch[0] == 0 and good[0]:
        names = [name for name in FLOORS if name in log]
        chance = {name: {"mean": log[name][0], "std": 0.0} for name in names}
        notes.append("no chance reference: the row of epoch 0 stands in")
    skills = []
    for name in FLOORS:
        known = name in log and np.isfinite(log[name][tail]).all() and name in (chance or {})
        if known and chance[name]["mean"] > 0:
            skills.append(_skill(name, log, tail, chance))
        elif name == "train_error":
            notes.append("no train_error: skill from the loss")
    told = [skill for skill in skills if skill.told]
    level = chance["train_loss"]["mean"] if chance else math.nan
    turn = _turn(log, tail)
    if math.isnan(turn):
        notes.append("no angle or step: not asked whether the run has left its start")

    # The trend. A loss of 0 has no logarithm: it counts as next to nothing.
    log_loss = np.log(np.maximum(loss, 1e-38 * np.nanmax(loss[good])) + (loss.max() == 0))
    slope, low, high = theil_sen(np.log(epoch[tail]), log_loss[tail])
    where = f"epochs {epoch[tail][0]:g} to {epoch[tail][-1]:g}"
    trend = f"slope {slope:+.2f}, {_interval(low, high)}, over {where}"
    numbers = dict(skills=skills, slope=slope, slope_low=low, slope_high=high, turn=turn)
    numbers["notes"] = notes

    def undecided(why: str, factor: float) -> Verdict:
        more = math.ceil(epoch[-1] * min(max(factor, 2), 16))
        why = f"{why}; {more} epochs would probably decide"
        return Verdict("undecided", why, more_epochs=more, **numbers)

    middle, mean = np.median(loss[tail]), loss[tail].mean()
    hovers = abs(slope) < FLAT and low > STEEP and middle > NOTHING * level
    if middle < NEGLIGIBLE * level and not hovers:
        why = f"the loss has fallen to {mean / level:.2%} of chance ({trend})"
        return Verdict("convergence", why, **numbers)
    above = [skill for skill in skills if skill.value >= Z99 * skill.error]
    if high < 0 and slope < STEEP and (above or not skills):
        why = f"the loss keeps falling ({trend}), now at {loss[-1]:.3g}"
        return Verdict("convergence", why, **numbers)
    if not skills:
        notes.append("no chance reference and no row of epoch 0")
        return undecided(f"without chance, equilibrium and divergence look alike ({trend})", 1)
    better = str((told or skills)[0])
    if not told:
        better = " and ".join(map(str, skills))
        if turn < TURN:
            return undecided(f"at chance, but {_hardly(turn)}", 1 / max(turn, 1e-9) ** 2)
        if high < 0 and slope < -FLAT and max(skill.value for skill in skills) > 0:
            return undecided(f"near chance ({better}), but the loss is falling ({trend})", 4)
        noisy = [skill for skill in skills if skill.may_be_told]
        if noisy:
            factor = (Z99 * noisy[0].error / FLOORS[noisy[0].of]) ** 2
            return undecided(f"too noisy to tell from chance: {noisy[0]}", factor)
        return Verdict("divergence", f"no better than chance: {better}, over {where}", **numbers)
    if slope < STEEP or (high < 0 and slope < -FLAT) or (low > 0 and slope > FLAT):
        # Not a clear fall, but no level either. The last three quarters show more of a trend.
        word = "the loss may be falling or not"
        if slope > 0:
            word = "the loss is rising"
        elif high < 0:
            word = "the loss is still falling slowly"
        longer = trained & (epoch > epoch[-1] / 4)
        slope, low, high = theil_sen(np.log(epoch[longer]), log_loss[longer])
        if slope < STEEP or high < 0 or low > 0:
            return undecided(f"{better}, but {word} ({trend})", 4)
        trend += f"; {slope:+.2f}, {_interval(low, high)}, over the last three quarters"
    if turn < TURN:
        return undecided(f"{better}, but {_hardly(turn)}", 1 / max(turn, 1e-9) ** 2)
    why = f"{better}, and the loss stays at about {mean:.3g} ({trend})"
    return Verdict("equilibrium", why, **numbers)


def _skill(name: str, log: dict, tail: np.ndarray, chance: dict) -> Skill:
    values, mean = log[name][tail], chance[name]["mean"]
    # Around a straight line: a curve through few rows would take slow noise for a trend.
    residual, inflation = _around_trend(np.log(log["epoch"][tail]), values, degree=1)
    own = residual.std(ddof=2) * math.sqrt(inflation / len(values))
    own *= 1 + 3 / len(values)  # as Student's quantiles are farther out than the normal's
    of_chance = chance[name]["std"] / math.sqrt(chance.get("points", 1))
    return Skill(name, 1 - values.mean() / mean, math.hypot(own, of_chance) / mean)


def _hardly(turn: float) -> str:
    return f"a random walk of its steps covers {turn:.2g} rad: it has hardly left its start"


def theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Median of the slopes of all pairs, and its 99 % interval (Sen, JASA 63, 1968: the ranks of
    Kendall's statistic). The rank's variance is inflated for the autocorrelation around the trend,
    which a training log always has."""
    i, j = np.triu_indices(len(x), 1)
    slopes, n = np.sort((y[j] - y[i]) / (x[j] - x[i])), len(x)
    sigma = math.sqrt(n * (n - 1) * (2 * n + 5) / 18 * _around_trend(x, y)[1])
    low = math.floor((len(slopes) - Z99 * sigma) / 2)
    high = math.ceil((len(slopes) + Z99 * sigma) / 2)
    # Ranks beyond the ends: so few points give no interval at this confidence.
    return (
        float(np.median(slopes)),
        float(slopes[low]) if low >= 0 else -math.inf,
        float(slopes[high]) if high < len(slopes) else math.inf,
    )


def _interval(low: float, high: float) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f"99 % interval {low:+.2f} to {high:+.2f}"
    return "too few independent rows for a 99 % interval"


def _around_trend(x: np.ndarray, y: np.ndarray, degree: int = 3) -> tuple[np.ndarray, float]:
    """What is left of y around a polynomial of at most this degree, and by how much its lag-1
    autocorrelation r, corrected for bias, inflates the variance of a mean: (1 + r)/(1 − r)."""
    n = len(y)
    residual = y - np.polynomial.Polynomial.fit(x, y, min(degree, n // 4))(x)
    square = residual @ residual
    if square <= (1e-12 * np.abs(y).max()) ** 2:
        return residual, 1.0
    r = (residual[1:] @ residual[:-1]) / square
    r = min(max(r + (1 + 4 * r) / n, 0.0), 0.95)
    return residual, (1 + r) / (1 - r)


def _turn(log: dict[str, np.ndarray], tail: np.ndarray) -> float:
    """φ √steps in radians; nan where the log does not say."""
    if "angle" not in log or "step" not in log:
        return math.nan
    return float(np.mean(log["angle"][tail]) * math.sqrt(max(log["step"][-1], 0)))


def autocorrelation_time(x: np.ndarray) -> float:
    """Integrated autocorrelation time of a stationary series, in rows; 1 is white noise. 1 + 2 Σ
    r_k up to the first k that is five times the sum so far (Sokal's window)."""
    x = x - x.mean()
    r = np.correlate(x, x, "full")[len(x) - 1 :] / max(x @ x, 1e-300)
    sums = 2 * np.cumsum(r) - 1
    window = np.nonzero(np.arange(len(sums)) >= 5 * sums)[0]
    return float(max(sums[window[0] if len(window) else -1], 1.0))


def random_walk(log: dict[str, np.ndarray]) -> np.ndarray:
    """Per row, the angle to its start (radians) of a walk of the run's own angular steps in random
    directions: on a sphere of any dimension E cos = Π cos φ."""
    steps = np.diff(log["step"], prepend=0)
    cosine = np.maximum(np.cos(log["angle"]), 1e-300)
    return np.arccos(np.exp(np.cumsum(steps * np.log(cosine))))


def explain(run: "Run") -> str:
    """The numbers behind a verdict, a line each."""
    verdict, log = run.verdict, run.log
    lines = [f"{run.name}: {title(verdict.regime)}: {verdict.why}"]
    for skill in verdict.skills:
        lines.append(f"skill of the {skill.of[6:]} {skill.value:+.4f} ± {skill.error:.4f}"
                     f" ({'told' if skill.told else 'not told'} from chance)")  # fmt: skip
    tail = (log["epoch"] > max(log["epoch"][-1] / 2, 0)) & (log["train_loss"] > 0)
    if math.isfinite(verdict.slope) and tail.sum() >= MIN_TAIL:
        epoch, loss = log["epoch"][tail], log["train_loss"][tail]
        interval = _interval(verdict.slope_low, verdict.slope_high)
        lines.append(f"slope {verdict.slope:+.3f}, {interval}; turn {verdict.turn:.3g} rad")
        tau, per_row = autocorrelation_time(loss), (epoch[-1] - epoch[0]) / (len(epoch) - 1)
        error = loss.std(ddof=1) * math.sqrt(tau / len(loss))
        level = f"loss {loss.mean():.4g} over the last half"
        if verdict.regime == "equilibrium":
            level += f", ± {error:.2g}; autocorrelation time {tau * per_row:.1f} epochs"
        lines.append(level)
        gamma = log.get("grad_norm", np.zeros(len(tail)))[tail]
        if (gamma > 0).all():
            slope, low, high = theil_sen(np.log(epoch), np.log(gamma))
            word = "falling" if high < 0 else "rising" if low > 0 else "no sure trend"
            lines.append(f"γ {np.median(gamma):.4g}, slope {slope:+.3f}: {word}")
        if all(
            name in log and np.isfinite(log[name]).all() for name in ("angle", "distance", "step")
        ):
            come, walk = log["distance"][-1], random_walk(log)[-1]
            lines.append(
                f"angle to the start {come:.3g} rad; of a random walk of its steps {walk:.3g}"
            )
    if verdict.regime == "undecided" and verdict.more_epochs:
        lines.append(f"--epochs {verdict.more_epochs} goes on from here")
    return "\n    ".join(lines + verdict.notes)


def title(regime: str) -> str:
    return TITLE.get(regime, regime)


# --------------------------------------------------------------------------------------- logs


@dataclass
class Run:
    """One log (column → array) and its verdict. `problem`: what was wrong with the file, if
    anything; `then`: the log of the run that started from this one's end."""

    path: Path
    elr: float
    seed: int
    log: dict[str, np.ndarray]
    verdict: Verdict
    problem: str = ""
    then: dict[str, np.ndarray] | None = None

    @property
    def name(self) -> str:
        if self.verdict.moves:
            return self.path.stem.replace("=", " ").replace(".seed", " seed")
        if math.isnan(self.elr):
            return self.path.stem
        return f"elr {elr_name(self.elr)}" + (f" seed {self.seed}" if self.seed else "")

    def final(self, column: str) -> float:
        """Mean of a column over the last tenth of the rows, nan if there is none. `then_…` is the
        second run's."""
        log, name = self.log, column
        if column.startswith("then_"):
            log, name = self.then or {}, column[5:]
        values = log.get(name, np.array([math.nan]))
        return float(values[-max(1, len(values) // 10) :].mean())


def elr_name(elr: float) -> str:
    """The shortest scientific notation that reads back as the same number: 1e-02."""
    return np.format_float_scientific(elr, trim="-", exp_digits=2)


def read_log(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """A CSV log as columns, and a complaint about a last row that was cut off (left out), else "".

    Raises ValueError, in one line that names the file, where it is no log: unreadable, empty,
    without `epoch` or `train_loss`, with a cell that is no number, or epochs that do not increase.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        what = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read as a CSV file ({what})") from None
    header, rows = ([cell.strip() for cell in rows[0]], rows[1:]) if rows else ([], [])
    missing = [name for name in ("epoch", "train_loss") if name not in header]
    if missing:
        have = " ".join(", ".join(header).split())[:200] or "none: it is empty"
        raise ValueError(f"{path}: no column {' and no '.join(missing)}; its columns are {have}")
    problem = ""
    if rows and (not text.endswith("\n") or len(rows[-1]) < len(header)):
        problem = f"{path}: the last row (line {len(rows) + 1}) is cut off and left out"
        rows.pop()
    if not rows:
        raise ValueError(f"{path}: a header, but no whole row")
    table = np.full((len(rows), len(header)), math.nan)
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{path}: line {i + 2} has {len(row)} cells, the header {len(header)}")
        for j, cell in enumerate(row):
            try:
                if cell.strip():
                    table[i, j] = float(cell.replace("_", "?"))  # Python would read 1_0 as 10
            except ValueError:
                if header[j] in ("epoch", "train_loss"):
                    what = f"{header[j]} is {cell[:40]!r}, not a number"
                    raise ValueError(f"{path}: line {i + 2}: {what}") from None
    log = {name: table[:, j] for j, name in enumerate(header)}
    epoch = log["epoch"]
    if not (np.isfinite(epoch).all() and (np.diff(epoch) > 0).all() and epoch[0] >= 0):
        raise ValueError(f"{path}: the epochs do not increase from row to row")
    return log, problem


def read_chance(folder: Path) -> dict[str, dict]:
    """The chance references in a folder's config.json, by seed; none if there is no such file.
    Raises ValueError if it is damaged."""
    path = folder / "config.json"
    try:
        chance = json.loads(path.read_text(encoding="utf-8")).get("chance", {})
        for reference in chance.values():
            numbers = [reference["points"] - 1]
            for name in FLOORS:
                if name in reference or name == "train_loss":
                    numbers += [reference[name]["mean"], reference[name]["std"]]
            if not all(math.isfinite(x) and x >= 0 for x in numbers):
                raise ValueError
    except FileNotFoundError:
        return {}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):
        raise ValueError(f"{path}: damaged: no chance reference can be read from it") from None
    return chance


def read_run(path: Path, chance: dict[str, dict]) -> Run:
    """Read and classify one log. ELR from its column `elr`, else from `elr=…` in its name; seed
    from `seed=…` in its name."""
    log, problem = read_log(path)
    in_name = re.search(r"elr=([0-9.]+(?:e[+-]?[0-9]+)?)", path.name)
    elr = float(in_name[1].rstrip(".")) if in_name else math.nan
    if "elr" in log:
        elr = float(log["elr"][0])
    seed = re.search(r"seed=([0-9]{1,18})", path.name)
    seed = int(seed[1]) if seed else 0
    verdict = classify(log, chance.get(str(seed)))
    if not (0 < elr < math.inf) or verdict.moves:
        elr = math.nan
    run = Run(path, elr, seed, log, verdict, problem)
    for then in sorted(path.parent.glob(f"{glob.escape(path.stem)}.then=*.csv")):
        if ".order=" not in then.name and not then.name.endswith(".layers.csv") and not run.then:
            with suppress(ValueError):  # it may just have been started
                run.then = read_log(then)[0]
    return run


def read_folder(folder: Path) -> list[Run]:
    """The runs in a folder that can be read; one that failed may have left no row."""
    chance, runs = read_chance(folder), []
    for path in find_logs(folder):
        with suppress(ValueError):
            runs.append(read_run(path, chance))
    return runs


def find_logs(folder: Path) -> list[Path]:
    """The runs' logs in a folder: all CSV files but the layers', second runs' and our tables."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        ours = path.name in TABLES or path.name.endswith(".layers.csv") or ".then=" in path.name
        if not ours:
            found.append(path)
    return found


# ------------------------------------------------------------------------------------- sweeps


def by_elr(runs: list[Run]) -> dict[float, list[Run]]:
    """The runs (seeds) of each ELR, by increasing ELR."""
    groups = {}
    for run in sorted(runs, key=lambda run: (run.elr, run.seed)):
        if not math.isnan(run.elr):
            groups.setdefault(run.elr, []).append(run)
    return groups


def majority(runs: list[Run]) -> tuple[str, float]:
    """The regime that most of the runs are in, and their share; undecided if none has over half."""
    names = [run.verdict.regime for run in runs]
    regime = max(dict.fromkeys(names), key=names.count)
    share = names.count(regime) / len(runs)
    return (regime, share) if share > 0.5 else ("undecided", share)


@dataclass
class Boundary:
    """Between two regimes: the largest ELR on the lower side, the smallest on the upper, nan where
    a side was not seen."""

    left: str
    right: str
    low: float
    high: float
    shares: tuple[float, float]

    @property
    def seen(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        name = f"{title(self.left)} | {title(self.right)}: "
        if self.seen:
            name += f"{self.low:.4g} to {self.high:.4g} (×{self.high / self.low:.3g})"
            if self.shares != (1, 1):
                below, above = self.shares
                name += f", {below:.0%} of the seeds below, {above:.0%} above"
            return name
        if math.isfinite(self.high):
            return name + f"below {self.high:.3g}"
        return name + (f"above {self.low:.3g}" if math.isfinite(self.low) else "not seen")


def boundaries(runs: list[Run]) -> list[Boundary]:
    """The two boundaries of a sweep as brackets of neighbouring decided ELRs, by the majority of
    seeds. Raises ValueError where the regimes are out of order along the ELR."""
    decided = [(elr, *majority(group)) for elr, group in by_elr(runs).items()]
    decided = [line for line in decided if line[1] in ORDER]
    for (elr, regime, _), (after, then, _) in pairwise(decided):
        if ORDER[then] < ORDER[regime]:
            raise ValueError(f"out of order: {regime} at ELR {elr:.3g}, but {then} at {after:.3g}")
    found = []
    for left, right in pairwise(ORDER):
        below = [(elr, share) for elr, name, share in decided if ORDER[name] <= ORDER[left]]
        above = [(elr, share) for elr, name, share in decided if ORDER[name] >= ORDER[right]]
        low, high = below[-1] if below else (math.nan, 1), above[0] if above else (math.nan, 1)
        found.append(Boundary(left, right, low[0], high[0], (low[1], high[1])))
    return found


COLUMNS = (
    "elr seed regime skill slope train_loss train_error test_error grad_norm angle epochs".split()
)
THEN_COLUMNS = ["then_test_error", "then_train_loss"]  # where there are second runs


def rows(runs: list[Run]) -> list[dict]:
    """A row of COLUMNS per run with an ELR, in order of ELR and seed; losses, errors, γ and φ are
    means of the last tenth of the epochs."""
    table, second = [], any(run.then for run in runs)
    for group in by_elr(runs).values():
        for run in group:
            row = {"elr": run.elr, "seed": run.seed, "regime": run.verdict.regime}
            row |= {"skill": run.verdict.skill, "slope": run.verdict.slope}
            row |= {name: run.final(name) for name in COLUMNS[5:10]}
            row["epochs"] = int(run.log["epoch"][-1])
            table.append(row | ({name: run.final(name) for name in THEN_COLUMNS} if second else {}))
    return table


def table(runs: list[Run]) -> str:
    """The sweep as text: a line per ELR, where there are several seeds with medians, least and
    greatest; then the boundaries, and the way of each run whose ELR moved."""
    lines, found, groups = [], rows(runs), by_elr(runs)
    several = any(len(group) > 1 for group in groups.values())
    if groups:
        head = "       ELR  regime               " + ("seeds   " if several else "")
        lines.append(head + "skill        slope  train loss                    error  test error"
                     "               γ    angle")  # fmt: skip
    for elr, group in groups.items():
        regime, share = majority(group)
        of_elr = [row for row in found if row["elr"] == elr]

        def spread(name: str, width: int, form: str, of_elr: list = of_elr) -> str:
            values = [row[name] for row in of_elr]
            text = f"{np.median(values):{width}{form}}"
            if several:
                text += f"  {f'{min(values):{form}} to {max(values):{form}}':<18}"
            return text

        told = [skill.of[6:] for run in group for skill in run.verdict.skills if skill.told]
        what = "loss" if told and "error" not in told else "error" if told else ""
        cells = [f"{elr_name(elr):>10}", f"{title(regime):<19}"]
        cells += [f"{round(share * len(group))}/{len(group)}".rjust(5)] if several else []
        cells += [f"{np.median([row['skill'] for row in of_elr]):6.3f} {what:<5}"]
        cells += [f"{np.median([row['slope'] for row in of_elr]):+6.2f}"]
        cells += [f"{spread('train_loss', 10, '.4g'):<30}"]
        cells += [f"{np.median([row['train_error'] for row in of_elr]):5.3f}"]
        cells += [f"{spread('test_error', 10, '.3f'):<10}"]
        cells += [
            f"{np.median([row[name] for row in of_elr]):8.3g}" for name in ("grad_norm", "angle")
        ]
        lines.append("  ".join(cells).replace("+nan", "   –").replace("nan", "  –"))
    try:
        lines += [str(boundary) for boundary in boundaries(runs)] if groups else []
    except ValueError as error:
        lines.append(f"no boundaries: {error}")
    return "\n".join(lines + [f"{run.name}: {way(run, runs)}" for run in runs if run.verdict.moves])


def way(run: Run, runs: list[Run]) -> str:
    """Through which regimes a run went whose ELR moved: by epoch the regime of the sweep's ELR that
    is nearest in the logarithm, as far as the sweep reaches."""
    elrs = np.maximum(run.log["elr"], 1e-300)
    text = f"ELR {elrs[0]:.3g} to {elrs[-1]:.3g}"
    bands = {elr: majority(group)[0] for elr, group in by_elr(runs).items()}
    if not bands:
        return f"{text}; a sweep beside it says through which regimes that leads"
    nearest = np.abs(np.log(np.array(list(bands)) / elrs[:, None])).argmin(1)
    names = []
    for elr, index in zip(elrs, nearest, strict=True):
        inside = min(bands) <= elr <= max(bands)
        names.append(title(list(bands.values())[index]) if inside else "outside the sweep")
    changes = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    parts = [f"{names[i]} from epoch {run.log['epoch'][i]:g}" for i in changes]
    return f"{text}: " + ", ".join(parts)


def write_csv(path: Path, found: list[dict]) -> None:
    """A CSV of these rows; numbers to 6 digits, ELRs to 9."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(found[0] if found else COLUMNS)
    for row in found:
        cells = []
        for name, cell in row.items():
            digits = 9 if name == "elr" else 6
            cells.append(f"{cell:.{digits}g}" if isinstance(cell, float) else cell)
        writer.writerow(cells)
    replace(path, text.getvalue().encode())


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it, flushed to disk, then renamed."""
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


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line and exit status 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def gather(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs of these folders and logs, in order of ELR and seed; what was wrong with some."""
    runs, problems, chances = [], [], {}
    for path in [
        log for given in paths for log in (find_logs(given) if given.is_dir() else [given])
    ]:
        if path.parent not in chances:
            chances[path.parent] = {}
            try:
                chances[path.parent] = read_chance(path.parent)
            except ValueError as error:
                problems.append(str(error))
        try:
            runs.append(read_run(path, chances[path.parent]))
            problems += [runs[-1].problem] if runs[-1].problem else []
        except ValueError as error:
            problems.append(str(error))
    if not runs and not problems:
        what = "no logs here; a log is a CSV file with the columns epoch and train_loss"
        problems.append(f"{paths[0]}: {what}")
    return sorted(runs, key=lambda run: (math.isnan(run.elr), run.elr, run.seed)), problems


def main(argv: list[str] | None = None) -> int:
    text = "Name the training regime of each run from its CSV log, and write regimes.csv."
    example = "example: python regimes.py --explain logs/digits-convnet"
    parser = Parser(prog="regimes.py", description=text, epilog=example)
    text = "folder of logs, or a CSV with the columns epoch and train_loss"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=text)
    text = "where regimes.csv goes (default: the folder given)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "also print the numbers behind each verdict"
    parser.add_argument("--explain", action="store_true", help=text)
    args = parser.parse_args(argv)
    out = args.out or (args.paths[0] if len(args.paths) == 1 and args.paths[0].is_dir() else None)
    if args.out and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is no folder: make it first")
    runs, problems = gather(args.paths)
    in_table = [run for run in runs if not math.isnan(run.elr) or run.verdict.moves]
    if in_table:
        print(table(runs))
    if in_table and out:
        write_csv(out / "regimes.csv", rows(runs))
    for run in runs:
        if args.explain:
            print(explain(run))
        elif run not in in_table:
            notes = f" [{'; '.join(run.verdict.notes)}]" if run.verdict.notes else ""
            print(f"{run.name}: {title(run.verdict.regime)}: {run.verdict.why}{notes}")
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader has gone away: | head
        os._exit(0)
