"""Name the training regime of each run from its CSV log: convergence, equilibrium or divergence.

    python regimes.py logs/digits-convnet          every run of a folder: table, boundaries
    python regimes.py mine.csv yours.csv           anybody's logs: columns epoch and train_loss

The rule (`classify`) looks at the last half of the epochs:

    skill   1 − value/chance, of error and loss: how much better than a random point of the sphere
    slope   of log loss against log epoch: Theil and Sen's, with a 99 % interval
    turn    φ √steps: the angle that a random walk of the run's own steps covers

    convergence   the slope is surely negative and not small, or the loss is next to nothing
    divergence    neither error nor loss can be told from chance, and turn ≥ 1
    equilibrium   one of them can, there is no trend, and turn ≥ 1: the run has forgotten its start
    undecided     none of these for sure

It needs numpy alone. Regimes: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695).
"""

import argparse
import csv
import io
import json
import math
import os
import re
import socket
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

ORDER = {"convergence": 0, "equilibrium": 1, "divergence": 2}
OURS = ("*.layers.csv", "*.then=*", "regimes.csv", "landscape.csv", "toy.csv")  # no first runs

MIN_TAIL = 4  # rows of the tail: with fewer the interval of no slope is finite
NEGLIGIBLE = 0.003  # of the chance loss: below, all runs tried went on falling
STEEP = -0.5  # slope of a falling loss: 1/epoch has −1, a level 0
FLAT = 0.1  # slopes this small change a loss by 7 % while the epochs double
FLOORS = {"train_error": 0.03, "train_loss": 0.1}  # so much skill a random walk may seem to have
TURN = 1.0  # radians: a walk that has turned less remembers its start
Z99 = 2.576  # standard normal quantile of a two-sided 99 % interval


@dataclass
class Skill:
    """1 − value/chance of a column, and its standard error. It is `told` from chance, or noise may
    hide that it is."""

    of: str
    value: float
    error: float

    @property
    def told(self):
        return self.value - Z99 * self.error >= FLOORS[self.of]

    @property
    def hidden(self):
        floor = FLOORS[self.of]
        noisy = self.error > floor and self.value + Z99 * self.error > floor
        return not self.told and (noisy or self.value >= floor)

    def __str__(self):
        return f"{self.of[6:]} {self.value:.0%} ± {self.error:.1%} better than chance"


@dataclass
class Trend:
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def level(self):
        no_trend = self.low <= 0 <= self.high or abs(self.slope) <= FLAT
        return no_trend and self.slope >= STEEP

    def __str__(self):
        interval = f"99 % interval {self.low:+.2f} to {self.high:+.2f}"
        return f"slope {self.slope:+.2f}, {interval.replace('inf', '∞')}"


@dataclass
class Verdict:
    """What `classify` found, and why. `more_epochs`: in all, to decide an undecided run. `moves`:
    the ELR was not fixed."""

    regime: str = "undecided"
    why: str = ""
    skills: list = field(default_factory=list)
    trend: Trend = field(default_factory=Trend)
    turn: float = math.nan
    more_epochs: int | None = None
    notes: list = field(default_factory=list)
    moves: bool = False

    def __str__(self):
        return f"{title(self.regime)}: {self.why}"

    @property
    def skill(self):
        """The first that is told from chance, else the first."""
        skills = [skill for skill in self.skills if skill.told] + self.skills
        return skills[0].value if skills else math.nan


def classify(log, chance=None):
    """The regime of one run.

    log      columns of equal length, a row per epoch: `epoch` (0 = before training), `train_loss`
             in nats; where there are `train_error` in [0, 1], `step`, `angle` (φ in radians)
    chance   {"train_loss": {"mean", "std"}, "train_error": {"mean", "std"}, "points": n}, at n
             random points of the sphere. Without it the row of epoch 0 stands in.
    """
    verdict, epoch, loss = Verdict(), log["epoch"], log["train_loss"]
    notes, good = verdict.notes, np.isfinite(loss) & (loss >= 0)
    if len(loss) and not good[-1]:
        verdict.why = f"stopped in epoch {epoch[-1]:g}: the loss is not finite"
        return verdict
    elrs = log.get("elr", np.ones(1))
    elrs = elrs[np.isfinite(elrs)]
    if len(elrs) and np.ptp(elrs) > 1e-6 * elrs.max():
        what = f"the ELR moved from {elrs[0]:.3g} to {elrs[-1]:.3g}"
        verdict.moves, verdict.why = True, f"{what}, and a regime needs a fixed one"
        return verdict
    if not good.all():
        notes.append(f"{(~good).sum()} rows without a finite loss left out")
    last = epoch[-1] if len(epoch) else 0
    tail = good & (epoch > 0) & (epoch > last / 2)
    longer = good & (epoch > 0) & (epoch > last / 4)
    verdict.more_epochs = max(2 * MIN_TAIL, 2 * math.ceil(last))
    if tail.sum() < MIN_TAIL:
        what = f"too short: {tail.sum()} rows in the last half"
        verdict.why = f"{what}; it takes {verdict.more_epochs} epochs at least"
        return verdict
    if chance is None and epoch[0] == 0 and good[0]:
        chance = {name: {"mean": log[name][0], "std": 0.0} for name in FLOORS if name in log}
        notes.append("no chance reference: the row of epoch 0 stands in")
    chance = chance or {}
    for name in FLOORS:
        known = name in log and np.isfinite(log[name][longer]).all()
        if known and name in chance and chance[name]["mean"] > 0:
            verdict.skills.append(_skill(name, log, tail, longer, chance))
        elif name == "train_error":
            notes.append("no train_error: skill from the loss")
    if "angle" in log and "step" in log:
        verdict.turn = float(np.mean(log["angle"][tail]) * math.sqrt(max(log["step"][-1], 0)))
    else:
        notes.append("no angle or step: not asked whether the run has left its start")
    # A loss of 0 has no logarithm.
    loss = np.maximum(loss, 1e-38 * loss[good].max() or 1.0)
    verdict.trend = Trend(*theil_sen(np.log(epoch[tail]), np.log(loss[tail])))
    longer = Trend(*theil_sen(np.log(epoch[longer]), np.log(loss[longer])))
    level = chance["train_loss"]["mean"] if chance else math.nan
    verdict.regime, verdict.why = _decide(verdict, longer, loss[tail], level)
    if verdict.regime == "undecided":
        verdict.why += f"; {verdict.more_epochs} epochs may decide"
    return verdict


def _decide(verdict, longer, loss, chance):
    """Regime and why. Slow noise may look like a trend, or hide one: so `longer`, that of the last
    three quarters, is asked, too."""
    trend, skills, turn = verdict.trend, verdict.skills, verdict.turn
    if np.median(loss) < NEGLIGIBLE * chance:
        share = loss.mean() / chance
        return "convergence", f"the loss has fallen to {share:.2%} of chance ({trend})"
    falls = trend.high < 0 and trend.slope < STEEP and longer.slope < STEEP
    if falls and (not skills or any(skill.value >= Z99 * skill.error for skill in skills)):
        return "convergence", f"the loss keeps falling ({trend}), now at {loss[-1]:.3g}"
    if not skills:
        return "undecided", f"without chance, equilibrium and divergence look alike ({trend})"
    told = [skill for skill in skills if skill.told]
    better = str(told[0]) if told else " and ".join(map(str, skills))
    if turn < TURN:
        walk = f"a random walk of its steps covers {turn:.2g} rad"
        return "undecided", f"{better}, but {walk}: it has hardly left its start"
    if told and (trend.level or longer.level):
        return "equilibrium", f"{better}, and the loss stays at about {loss.mean():.3g} ({trend})"
    falling = trend.high < 0 and trend.slope < -FLAT and max(skill.value for skill in skills) > 0
    if told or falling:
        return "undecided", f"{better}, but the loss is not level ({trend})"
    hidden = [str(skill) for skill in skills if skill.hidden]
    if hidden:
        return "undecided", f"too noisy to tell from chance: {hidden[0]}"
    return "divergence", f"no better than chance: {better}"


def _skill(name, log, tail, longer, chance):
    epoch, values, n = log["epoch"], log[name], tail.sum()
    # Around a line: a curve through few rows would take slow noise for a trend.
    residual, inflation = _around_trend(np.log(epoch[longer]), values[longer], degree=1)
    own = residual.std(ddof=2) * math.sqrt(inflation / n)
    own *= 1 + 3 / n  # Student's quantiles are farther out
    mean, points = chance[name]["mean"], chance.get("points", 1)
    error = math.hypot(own, chance[name]["std"] / math.sqrt(points))
    return Skill(name, 1 - values[tail].mean() / mean, error / mean)


def theil_sen(x, y):
    """Median of the slopes of all pairs, and its 99 % interval (Sen, JASA 63, 1968), wider by the
    autocorrelation that training logs have."""
    i, j = np.triu_indices(len(x), 1)
    slopes, n = np.sort((y[j] - y[i]) / (x[j] - x[i])), len(x)
    sigma = math.sqrt(n * (n - 1) * (2 * n + 5) / 18 * _around_trend(x, y, degree=3)[1])
    low = math.floor((len(slopes) - Z99 * sigma) / 2)
    high = math.ceil((len(slopes) + Z99 * sigma) / 2)
    # Beyond the ends: too few points for an interval.
    low = float(slopes[low]) if low >= 0 else -math.inf
    high = float(slopes[high]) if high < len(slopes) else math.inf
    return float(np.median(slopes)), low, high


def _around_trend(x, y, degree):
    """y around a polynomial, and by how much its autocorrelation r at lag 1, corrected for bias,
    inflates the variance of a mean: (1 + r)/(1 − r)."""
    n = len(y)
    residual = y - np.polynomial.Polynomial.fit(x, y, min(degree, n // 4))(x)
    square = residual @ residual
    if square <= (1e-12 * np.abs(y).max()) ** 2:
        return residual, 1.0
    r = (residual[1:] @ residual[:-1]) / square
    r = min(max(r + (1 + 4 * r) / n, 0.0), 0.95)
    return residual, (1 + r) / (1 - r)


def title(regime):
    return "chaotic equilibrium" if regime == "equilibrium" else regime


@dataclass
class Run:
    """A log (column → array), its verdict; `problem`: what was wrong with it."""

    path: Path
    elr: float
    seed: int
    log: dict
    verdict: Verdict
    problem: str = ""

    @property
    def name(self):
        return self.path.stem.replace("=", " ").replace(".seed", " seed")

    def final(self, column):
        """Mean of a column over the last tenth of the rows."""
        values = self.log.get(column, np.array([math.nan]))
        return float(values[-max(1, len(values) // 10) :].mean())


def elr_name(elr):
    return np.format_float_scientific(elr, trim="-", exp_digits=2)


def read_log(path):
    """A CSV log as columns, and a complaint about a last row that was cut off, else "". Raises
    ValueError, in one line, where it is no log."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        header, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a CSV file ({error})") from None
    header = [cell.strip() for cell in header]
    if not {"epoch", "train_loss"} <= set(header):
        have = str(header)[:200]
        raise ValueError(f"{path}: it takes the columns epoch and train_loss, and has {have}")
    problem = ""
    if rows and (not text.endswith("\n") or len(rows[-1]) < len(header)):
        problem = f"{path}: the last row (line {len(rows) + 1}) is cut off and left out"
        rows.pop()
    log = {name: np.full(len(rows), math.nan) for name in header}
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{path}: line {i + 2} has {len(row)} cells, the header {len(header)}")
        for name, cell in zip(header, row, strict=True):
            try:
                log[name][i] = float(cell.replace("_", "?") or "nan")  # Python reads 1_0 as 10
            except ValueError:
                if name in ("epoch", "train_loss"):
                    what = f"line {i + 2}: {name} is {cell[:40]!r}, not a number"
                    raise ValueError(f"{path}: {what}") from None
    epoch = log["epoch"]
    if not rows:
        raise ValueError(f"{path}: a header, but no whole row")
    if not (np.isfinite(epoch).all() and (np.diff(epoch) > 0).all() and epoch[0] >= 0):
        raise ValueError(f"{path}: the epochs do not increase")
    return log, problem


def read_chance(folder):
    """The chance references in a folder's config.json, by seed. Raises ValueError if damaged."""
    path = folder / "config.json"
    try:
        chance = json.loads(path.read_text(encoding="utf-8")).get("chance", {})
        for reference in chance.values():
            numbers = [reference["points"] - 1]
            for name in FLOORS:
                numbers += reference[name].values()
            if not all(0 <= x < math.inf for x in numbers):
                raise ValueError
    except FileNotFoundError:
        return {}
    except Exception:  # damaged JSON can fail anywhere
        raise ValueError(f"{path} is damaged: it has no chance reference") from None
    return chance


def read_run(path, chance):
    """Read and classify a log. Its ELR is in the column `elr` or its name, the seed in the name."""
    log, problem = read_log(path)
    named = re.search(r"elr=([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)", path.name)
    elr = float(named[1]) if named else math.nan
    if "elr" in log:
        elr = float(log["elr"][0])
    seed = re.search(r"seed=([0-9]{1,18})", path.name)
    seed = int(seed[1]) if seed else 0
    verdict = classify(log, chance.get(str(seed)))
    if not 0 < elr < math.inf or verdict.moves:
        elr = math.nan
    return Run(path, elr, seed, log, verdict, problem)


def gather(paths):
    """The runs of these folders and logs, by ELR and seed; what was wrong with some."""
    runs, problems, logs = [], [], []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.csv"))
            logs += [x for x in found if not any(x.match(pattern) for pattern in OURS)]
        else:
            logs.append(path)
    if not logs:
        problems.append(f"{paths[0]}: no logs here; a log has the columns epoch and train_loss")
    for path in logs:
        chance = {}
        try:
            chance = read_chance(path.parent)
        except ValueError as error:
            problems.append(str(error))
        try:
            runs.append(read_run(path, chance))
            problems.append(runs[-1].problem)
        except ValueError as error:
            problems.append(str(error))
    runs.sort(key=lambda run: (math.isnan(run.elr), run.elr, run.seed))
    return runs, [problem for problem in dict.fromkeys(problems) if problem]


def read_folder(folder):
    return gather([folder])[0]


def by_elr(runs):
    """The runs of each ELR, in order of ELR and seed."""
    groups = {}
    for run in sorted(runs, key=lambda run: (run.elr, run.seed)):
        if not math.isnan(run.elr):
            groups.setdefault(run.elr, []).append(run)
    return groups


def majority(runs):
    """The regime of over half of the runs, else undecided; the largest share."""
    names = [run.verdict.regime for run in runs]
    regime = max(dict.fromkeys(names), key=names.count)
    share = names.count(regime) / len(runs)
    return (regime, share) if share > 0.5 else ("undecided", share)


@dataclass
class Boundary:
    """Between two regimes: the largest ELR below, the smallest above; nan: not seen."""

    left: str
    right: str
    low: float = math.nan
    high: float = math.nan

    @property
    def seen(self):
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self):
        text = f"{title(self.left)} | {title(self.right)}"
        if self.seen:
            return f"{text}: {self.low:.4g} to {self.high:.4g} (×{self.high / self.low:.3g})"
        if math.isfinite(self.high):
            return f"{text}: below {self.high:.3g}"
        return f"{text}: " + (f"above {self.low:.3g}" if self.low > 0 else "not seen")


def boundaries(runs):
    """The two boundaries of a sweep, by the majority of seeds. Raises ValueError where the regimes
    are out of order."""
    found = [Boundary(left, right) for left, right in pairwise(ORDER)]
    regimes = [(elr, majority(group)[0]) for elr, group in by_elr(runs).items()]
    decided = [(elr, name) for elr, name in regimes if name in ORDER]
    for (elr, name), (after, then) in pairwise(decided):
        if ORDER[then] < ORDER[name]:
            raise ValueError(f"out of order: {name} at ELR {elr:.3g}, but {then} at {after:.3g}")
    for boundary in found:
        for elr, name in decided:
            if ORDER[name] <= ORDER[boundary.left]:
                boundary.low = elr
            elif math.isnan(boundary.high):
                boundary.high = elr
    return found


COLUMNS = "elr seed regime skill slope train_loss train_error test_error grad_norm angle".split()


def rows(runs):
    """A row per run with an ELR; from `train_loss` on means of the last tenth of the epochs."""
    found = []
    for run in sum(by_elr(runs).values(), []):
        values = [run.elr, run.seed, run.verdict.regime]
        values += [run.verdict.skill, run.verdict.trend.slope]
        values += [run.final(name) for name in COLUMNS[5:]]
        row = dict(zip(COLUMNS, values, strict=True))
        found.append(row | {"epochs": int(run.log["epoch"][-1])})
    return found


def table(runs):
    """The sweep as text: per ELR its regime, how many seeds are in it, medians over the seeds; the
    boundaries; the way of each run whose ELR moved."""
    lines, groups = [], by_elr(runs)
    if groups:
        heads = [name.replace("_", " ") for name in COLUMNS[3:]]
        lines = [f"{'ELR':>10}  {'regime':<20}seeds" + "".join(f"{head:>12}" for head in heads)]
    for elr, group in groups.items():
        (regime, share), of_elr = majority(group), rows(group)
        seeds = f"{round(share * len(group))}/{len(group)}"
        medians = [np.median([row[name] for row in of_elr]) for name in COLUMNS[3:]]
        cells = [f"{x:.4g}".replace("nan", "–") for x in medians]
        line = f"{elr_name(elr):>10}  {title(regime):<20}{seeds:>5}"
        lines.append(line + "".join(f"{cell:>12}" for cell in cells))
    try:
        lines += [str(boundary) for boundary in boundaries(runs)] if groups else []
    except ValueError as error:
        lines.append(f"no boundaries: {error}")
    return "\n".join(lines + [f"{run.name}: {way(run, runs)}" for run in runs if run.verdict.moves])


def way(run, runs):
    """Through which regimes a run went whose ELR moved: those of the sweep's nearest ELRs."""
    elrs = np.maximum(run.log["elr"], 1e-300)
    text = f"ELR {elrs[0]:.3g} to {elrs[-1]:.3g}"
    sweep, before = by_elr(runs), ""
    if not sweep:
        return f"{text}; a sweep beside it names the regimes"
    for epoch, elr in zip(run.log["epoch"], elrs, strict=True):
        name = "outside the sweep"
        if min(sweep) <= elr <= max(sweep):
            nearest = min(sweep, key=lambda other: abs(math.log(other / elr)))
            name = title(majority(sweep[nearest])[0])
        if name != before:
            text += f"{',' if before else ':'} {name} from epoch {epoch:g}"
        before = name
    return text


def csv_lines(rows):
    """Rows as CSV, numbers to 9 digits."""
    text = io.StringIO()
    for row in rows:
        cells = [f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row]
        csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def write_csv(path, rows):
    head = rows[0] if rows else COLUMNS
    write_whole(path, csv_lines([head, *(row.values() for row in rows)]))


def temporary(path):
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_whole(path, content):
    """Whole or not at all: beside it, then renamed."""
    try:
        with open(temporary(path), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary(path), path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def finish(main):
    """Exit as `main` says; silently where the reader has gone away (| head)."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def main(argv=None):
    text = "Name the regime of each run from its CSV log; of a folder write regimes.csv."
    parser = Parser(prog="regimes.py", description=text)
    text = "folder of logs, or CSV with columns epoch, train_loss"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=text)
    parser.add_argument("--explain", action="store_true", help="also each verdict's reasons")
    args = parser.parse_args(argv)
    runs, problems = gather(args.paths)
    in_table = [run for run in runs if not math.isnan(run.elr) or run.verdict.moves]
    if in_table:
        print(table(runs))
        if len(args.paths) == 1 and args.paths[0].is_dir():
            write_csv(args.paths[0] / "regimes.csv", rows(runs))
    for run in runs:
        if args.explain or run not in in_table:
            print(f"{run.name}: {'; '.join([str(run.verdict), *run.verdict.notes])}")
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    finish(main)
