"""Name the training regime of each run from its CSV log.

    python regimes.py logs/digits-convnet                a folder: table, boundaries
    python regimes.py log.csv --chance 2.303 0.9         Keras, ten classes
    python regimes.py metrics.csv                        Lightning
    python regimes.py export.csv --columns epoch=Step    W&B; most names are known

A run converges if its loss surely keeps falling, or is next to nothing. It diverges if neither
error nor loss can be told from a random point's of the sphere. It is in equilibrium if one of them
can, the loss is level and the start forgotten. Else it is undecided.

Regimes: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695).
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
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

ORDER = {"convergence": 0, "equilibrium": 1, "divergence": 2}
USUAL = dict.fromkeys("train_error step angle elr grad_norm test_error".split(), "")
USUAL["epoch"] = "epoch step global_step iteration index"  # what others call it, the best first
USUAL["train_loss"] = "loss_epoch loss loss_step"
USUAL["train_accuracy"] = "accuracy acc"
OURS = ("*.layers.csv", "*.then=*", "regimes.csv", "landscape.csv", "toy.csv")  # no first runs

MIN_TAIL = 4  # rows of the tail: with fewer the interval of no slope is finite
NEGLIGIBLE = 0.003  # of the chance loss: below, all runs tried went on falling
STEEP = -0.5  # slope of a falling loss: 1/epoch has −1, a level 0
FLAT = 0.1  # slopes this small change a loss by 7 % while the epochs double
FLOORS = {"train_error": 0.03, "train_loss": 0.1}  # skill that a random walk may seem to have
TURN = 1.0  # radians: a walk that has turned less remembers its start
BLOCKS = 600  # whose means stand for more than twice as many rows
Z99 = 2.576  # standard normal quantile of a two-sided 99 % interval


@dataclass
class Skill:
    """1 − value/chance of a column, and its standard error."""

    of: str
    value: float
    error: float

    @property
    def told(self):
        return self.value - Z99 * self.error >= FLOORS[self.of]

    def __str__(self):
        return f"{self.of[6:]} {self.value:.0%} ± {self.error:.1%} better than chance"


class Trend(NamedTuple):
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def level(self):
        no_trend = self.low <= 0 <= self.high or abs(self.slope) <= FLAT
        return no_trend and self.slope >= STEEP

    def __str__(self):
        text = f"slope {self.slope:+.2f}, 99 % interval {self.low:+.2f} to {self.high:+.2f}"
        return text.replace("inf", "∞")


@dataclass
class Verdict:
    """What `classify` found, and why. `moves`: its ELR does."""

    regime: str = "undecided"
    why: str = ""
    skills: list = field(default_factory=list)
    trend: Trend = Trend()
    turn: float = math.nan  # φ √steps, of a random walk
    more_epochs: int | None = None  # in all, that may decide
    notes: list = field(default_factory=list)
    moves: bool = False

    def __str__(self):
        return f"{title(self.regime)}: {self.why}"

    @property
    def skill(self):
        """The first that is told from chance, else the first."""
        none = Skill("", math.nan, math.nan)
        return max(self.skills, key=lambda skill: skill.told, default=none).value


def classify(log, chance=None):
    """The regime of one run.

    log      columns, a row per epoch: `epoch`, `train_loss` in nats; where there are `train_error`
             or `train_accuracy` in [0, 1], `step`, `angle` in radians
    chance   {"train_loss": {"mean", "std"}, "train_error": {"mean", "std"}, "points": n}, at n
             random points of the sphere; without it a row before training stands in
    """
    loss = log["train_loss"]
    good = np.isfinite(loss)
    if len(loss) and not good[-1]:
        return Verdict(why=f"stopped in epoch {log['epoch'][-1]:g}: the loss is not finite")
    if (loss < 0).any():
        first = log["epoch"][loss < 0][0]
        return Verdict(why=f"the loss is negative in epoch {first:g}: no logarithm")
    elrs = [elr for elr in log.get("elr", []) if math.isfinite(elr)]
    if elrs and max(elrs) - min(elrs) > 1e-6 * max(elrs):
        why = f"the ELR moved from {elrs[0]:.3g} to {elrs[-1]:.3g}, and a regime needs a fixed one"
        return Verdict(why=why, moves=True)
    log = {name: x[good] for name, x in (log | {"epoch": finished(log)}).items()}
    epoch, loss = log["epoch"], log["train_loss"]
    last = epoch[-1] if len(epoch) else 0
    n = (epoch > last / 2).sum()
    verdict = Verdict(more_epochs=max(2 * MIN_TAIL, 2 * math.ceil(last)))
    note = verdict.notes.append
    if not good.all():
        note(f"{(~good).sum()} rows without a finite loss left out")
    unknown = np.full(len(loss), math.nan)
    accuracy = log.get("train_accuracy", unknown)
    if "train_error" not in log and (accuracy <= 1).all():
        log["train_error"] = 1 - accuracy
        note("train_error is 1 − train_accuracy")
    if n < MIN_TAIL:
        least = f"it takes {verdict.more_epochs} epochs at least"
        verdict.why = f"too short: {n} rows in the last half; {least}"
        return verdict
    if chance is None and epoch[0] == 0:
        chance = {name: {"mean": log[name][0], "std": 0.0} for name in FLOORS if name in log}
        note("no chance reference: the row of epoch 0 stands in")
    chance = chance or {}
    # The last three quarters of the epochs, of which the last n rows are the last half.
    longer = epoch > last / 4
    x = np.log(epoch[longer])
    for name in FLOORS:
        values = log.get(name, unknown)[longer]
        known = name == "train_loss" or ((values >= 0) & (values <= 1)).all()  # not in percent
        if known and name in chance and chance[name]["mean"] > 0:
            verdict.skills.append(_skill(name, x, values, n, chance))
        elif name == "train_error":
            note(f"no {'chance of ' if known else ''}train_error: skill from the loss")
    if "angle" in log and "step" in log:
        verdict.turn = log["angle"][-n:].mean() * math.sqrt(max(log["step"][-1], 0))
    else:
        note("no angle or step: not asked whether the run has left its start")
    y = np.log(np.maximum(loss, 1e-38 * loss.max() or 1.0))[longer]  # 0 has no logarithm
    verdict.trend = theil_sen(x[-n:], y[-n:])
    level = chance["train_loss"]["mean"] if chance else math.nan
    verdict.regime, verdict.why = _decide(verdict, theil_sen(x, y), loss[-n:], level)
    if verdict.regime == "undecided":
        verdict.why += f"; {verdict.more_epochs} epochs may decide"
    return verdict


def finished(log):
    """Epochs finished. A row of epoch 0 is before training only where `step` says 0: Keras and
    others count from 0."""
    epoch = log["epoch"]
    if len(epoch) > 1 and epoch[0] == 0 and log.get("step", [1])[0] != 0:
        return epoch + epoch[1]
    return epoch


def _decide(verdict, longer, loss, chance):
    """Regime and why. Slow noise may look like a trend, or hide one: so `longer`, that of the last
    three quarters, is asked, too."""
    trend, skills = verdict.trend, verdict.skills
    if np.median(loss) < NEGLIGIBLE * chance:
        share = loss.mean() / chance
        return "convergence", f"the loss has fallen to {share:.2%} of chance ({trend})"
    if np.median(loss) == 0 or not loss[-MIN_TAIL:].any():
        return "convergence", "the loss has reached 0"
    falls = trend.high < 0 and trend.slope < STEEP and longer.slope < STEEP
    if falls and (not skills or any(skill.value >= Z99 * skill.error for skill in skills)):
        return "convergence", f"the loss keeps falling ({trend}), now at {loss[-1]:.3g}"
    if not skills:
        return "undecided", f"equilibrium and divergence look alike without --chance ({trend})"
    told = [skill for skill in skills if skill.told]
    better = " and ".join(map(str, told[:1] or skills))
    if verdict.turn < TURN:
        walk = f"a random walk of its steps covers {verdict.turn:.2g} rad"
        return "undecided", f"{better}, but {walk}: it has hardly left its start"
    if told and (trend.level or longer.level):
        return "equilibrium", f"{better}, and the loss stays at about {loss.mean():.3g} ({trend})"
    falling = trend.high < 0 and trend.slope < -FLAT and max(skill.value for skill in skills) > 0
    if told or falling:
        return "undecided", f"{better}, but the loss is not level ({trend})"
    for skill in skills:
        floor = FLOORS[skill.of]
        noisy = skill.error > floor and skill.value + Z99 * skill.error > floor
        if noisy or skill.value >= floor:
            return "undecided", f"too noisy to tell from chance: {skill}"
    return "divergence", f"no better than chance: {better}"


def _skill(name, x, values, n, chance):
    # Around a line: a curve through few rows would take slow noise for a trend.
    residual, inflation = _around_trend(x, values, degree=1)
    own = residual.std(ddof=2) * math.sqrt(inflation / n)
    own *= 1 + 3 / n  # Student's quantiles are farther out
    mean, points = chance[name]["mean"], chance.get("points", 1)
    error = math.hypot(own, chance[name]["std"] / math.sqrt(points))
    return Skill(name, 1 - values[-n:].mean() / mean, error / mean)


def theil_sen(x, y):
    """Median slope of all pairs, and its 99 % interval (Sen, JASA 63, 1968), wider by the
    autocorrelation of training logs. Of long logs: between means of blocks of equal width."""
    if len(x) > 2 * BLOCKS:
        edges = np.linspace(x[0], x[-1], BLOCKS, endpoint=False)
        starts = np.unique(np.searchsorted(x, edges))
        sizes = np.diff(starts, append=len(x))
        x, y = (np.add.reduceat(z, starts) / sizes for z in (x, y))
    i, j = np.triu_indices(len(x), 1)
    slopes, n = np.sort((y[j] - y[i]) / (x[j] - x[i])), len(x)
    slopes = np.pad(slopes, 1, constant_values=(-math.inf, math.inf))  # of too few points
    sigma = math.sqrt(n * (n - 1) * (2 * n + 5) / 18 * _around_trend(x, y, degree=3)[1])
    low = math.floor((len(slopes) - Z99 * sigma) / 2)
    high = math.ceil((len(slopes) + Z99 * sigma) / 2)
    low, high = slopes[max(low, 0)], slopes[min(high, len(slopes) - 1)]
    return Trend(np.median(slopes), low, high)


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


def read_log(path, columns=None):
    """A CSV log as columns, rows of one epoch joined; what is wrong with its last row, or "".
    `columns`: ours → theirs. Raises ValueError, in one line, where it is no log."""
    line, problem, table, last = 1, "", {}, 0.0
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        lines = ["" if line.startswith("#") else line for line in lines]
        delimiter = max(",;\t", key=next(filter(None, lines), "").count)
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        rows = filter(None, reader)
        header = [cell.strip() for cell in next(rows, [""])]
        at, ours = _places(header, columns or {})
        for row in rows:
            line = reader.line_num
            if len(row) < len(header) and not any(rows):
                problem = f"{path}: the last row (line {line}) is cut off and left out"
                break
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, the header has {len(header)}")
            values = tuple(_number(cell, i in ours) for i, cell in enumerate(row))
            epoch, loss = values[at["epoch"]], values[at["train_loss"]]
            if epoch is None and loss is None:
                continue
            if epoch is None or not last <= epoch < math.inf:
                raise ValueError("no epoch, or not the next one: one run, in order")
            if epoch in table:
                old = table[epoch]
                if None not in (loss, old[at["train_loss"]]):
                    again = f"epoch {epoch:g} again: keep one row of each"
                    raise ValueError(f"{again}, or count by --columns epoch=step")
                both = zip(values, old, strict=True)
                values = tuple(before if new is None else new for new, before in both)
            table[epoch], last = values, epoch
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: line {line}: {error}") from None
    whole = [values for values in table.values() if values[at["train_loss"]] is not None]
    if not whole:
        raise ValueError(f"{path}: a header, but no whole row with a loss")
    table = np.array(whole, float).T  # nan where a cell is empty
    return {name: table[i] for name, i in at.items()}, problem


def _number(cell, ours):
    try:
        return float(cell.replace("_", "?"))  # Python reads 1_0 as 10
    except ValueError:
        if ours and cell.strip().lower() not in ("", "-", "na", "n/a", "none", "null"):
            raise ValueError(f"{cell[:40]!r} is not a number such as 1234.5") from None
        return None


def _places(header, columns):
    """Where each column is, by its own name and by ours; which of them are ours."""
    at = {name: i for i, name in enumerate(header)}
    for name in filter(None, header):
        if header.count(name) > 1:
            raise ValueError(f"two columns are called {name!r}")
    if "train_runtime" in at:  # Hugging Face's train_loss is one number, at the end
        columns = {"train_loss": "loss"} | columns
    plain, found = [], {}
    for name in header:  # W&B: "my-run - train/loss"; pandas does not name the index
        name = re.sub(r"\W+", "_", name.rpartition(" - ")[2].lower()).strip("_")
        plain.append(name.removeprefix("train_") or "index")
    for ours, usual in USUAL.items():
        asked = columns.get(ours, ours)
        same = [at[asked]] if asked in at else []
        for name in [] if ours in columns else usual.split():
            same = same or [i for i, other in enumerate(plain) if other == name]
        if len(same) > 1 and ours != "epoch":
            which = " or ".join(header[i] for i in same)
            raise ValueError(f"is it {which}? Say --columns {ours}=COLUMN")
        if same:
            found[ours] = same[0]
        elif ours in columns or ours in ("epoch", "train_loss"):
            have = ", ".join(header)[:200]
            raise ValueError(f"no column {asked} in {have}: say --columns {ours}=COLUMN")
    return at | found, set(found.values())


def read_chance(folder):
    """The chance references in a folder's config.json, by seed. Raises ValueError if damaged."""
    path = folder / "config.json"
    try:
        chance = json.loads(path.read_text(encoding="utf-8")).get("chance", {})
        for reference in chance.values():
            numbers = [x for name in FLOORS for x in reference[name].values()]
            if not all(0 <= x < math.inf for x in [reference["points"] - 1, *numbers]):
                raise ValueError
    except FileNotFoundError:
        return {}
    except Exception:  # damaged JSON can fail anywhere
        raise ValueError(f"{path} is damaged: it has no chance reference") from None
    return chance


def read_run(path, chance, columns=None):
    """Read and classify a log. `chance`: references by seed, or under "" one for all."""
    log, problem = read_log(path, columns)
    named = re.search(r"elr=([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)", path.name)
    elr = float(named[1]) if named else math.nan
    if "elr" in log:
        elr = float(log["elr"][0])
    seed = re.search(r"seed=([0-9]{1,18})", path.name)
    seed = int(seed[1]) if seed else 0
    verdict = classify(log, chance.get(str(seed), chance.get("")))
    if not 0 < elr < math.inf or verdict.moves:
        elr = math.nan
    return Run(path, elr, seed, log, verdict, problem)


def gather(paths, columns=None, chance=None):
    """The runs of these folders and logs, by ELR and seed, and what was wrong with them. `chance`:
    not that in config.json."""
    runs, problems, logs = [], [], []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.csv"))
            logs += [x for x in found if not any(map(x.match, OURS))]
        else:
            logs.append(path)
    if not logs:
        problems.append(f"{paths[0]}: no logs here; a log has the columns epoch and train_loss")
    for path in logs:
        known = {}
        try:
            known = {"": chance} if chance else read_chance(path.parent)
        except ValueError as error:
            problems.append(str(error))
        try:
            runs.append(read_run(path, known, columns))
            problems.append(runs[-1].problem)
        except ValueError as error:
            problems.append(str(error))
    runs.sort(key=lambda run: (math.isnan(run.elr), run.elr, run.seed))
    return runs, [problem for problem in dict.fromkeys(problems) if problem]


def read_folder(folder):
    return gather([folder])[0]


def by_elr(runs):
    """The runs of each ELR, in order of ELR."""
    groups = {}
    for run in runs:
        if not math.isnan(run.elr):
            groups.setdefault(run.elr, []).append(run)
    return dict(sorted(groups.items()))


def majority(runs):
    """The regime of over half of the runs, else undecided; the largest share."""
    regime, n = Counter(run.verdict.regime for run in runs).most_common(1)[0]
    share = n / len(runs)
    return (regime, share) if share > 0.5 else ("undecided", share)


@dataclass
class Boundary:
    """Between two regimes: the largest ELR below, the smallest above; nan: not seen."""

    left: str
    right: str
    low: float
    high: float

    @property
    def seen(self):
        return self.low < self.high

    def __str__(self):
        where = "not seen"
        if self.seen:
            where = f"{self.low:.4g} to {self.high:.4g} (×{self.high / self.low:.3g})"
        elif self.high > 0:
            where = f"below {self.high:.3g}"
        elif self.low > 0:
            where = f"above {self.low:.3g}"
        return f"{title(self.left)} | {title(self.right)}: {where}"


def boundaries(runs):
    """Of a sweep, by the majority of seeds. Raises ValueError if regimes are out of order."""
    decided = [(elr, majority(group)[0]) for elr, group in by_elr(runs).items()]
    decided = [(elr, name) for elr, name in decided if name in ORDER]
    for (elr, name), (after, then) in pairwise(decided):
        if ORDER[then] < ORDER[name]:
            raise ValueError(f"out of order: {name} at ELR {elr:.3g}, but {then} at {after:.3g}")
    found = []
    for left, right in pairwise(ORDER):
        below = [elr for elr, name in decided if ORDER[name] <= ORDER[left]]
        above = [elr for elr, name in decided if ORDER[name] > ORDER[left]]
        found.append(Boundary(left, right, [math.nan, *below][-1], [*above, math.nan][0]))
    return found


COLUMNS = "elr seed regime skill slope train_loss train_error test_error grad_norm angle epochs"
COLUMNS = COLUMNS.split()
MEDIANS = COLUMNS[3:-1]


def rows(runs):
    """A row per run with an ELR; from `train_loss` on means of the last tenth of the epochs."""
    found = []
    for run in sum(by_elr(runs).values(), []):
        verdict = run.verdict
        values = [run.elr, run.seed, verdict.regime, verdict.skill, verdict.trend.slope]
        values += [run.final(name) for name in MEDIANS[2:]]
        found.append(dict(zip(COLUMNS, [*values, int(finished(run.log)[-1])], strict=True)))
    return found


def table(runs):
    """The sweep as text: per ELR the regime, its share of the seeds, medians over them."""
    lines, groups = [], by_elr(runs)
    for elr, group in groups.items():
        regime, share = majority(group)
        seeds = f"{round(share * len(group))}/{len(group)}"
        line = f"{elr_name(elr):>10}  {title(regime):<20}{seeds:>5}"
        for name in MEDIANS:
            median = np.median([row[name] for row in rows(group)])
            line += f"{median:.4g}".replace("nan", "–").rjust(12)
        lines.append(line)
    if groups:
        heads = [f"{name.replace('_', ' '):>12}" for name in MEDIANS]
        lines.insert(0, f"{'ELR':>10}  {'regime':<20}seeds{''.join(heads)}")
        try:
            lines += map(str, boundaries(runs))
        except ValueError as error:
            lines.append(f"no boundaries: {error}")
    return "\n".join(lines + [f"{run.name}: {way(run, runs)}" for run in runs if run.verdict.moves])


def way(run, runs):
    """The regimes that a run went through whose ELR moved: those of the sweep's nearest ELRs."""
    elrs = run.log["elr"]
    text = f"ELR {elrs[0]:.3g} to {elrs[-1]:.3g}"
    sweep = {elr: title(majority(group)[0]) for elr, group in by_elr(runs).items()}
    if not sweep:
        return f"{text}; a sweep beside it names the regimes"
    parts = [""]
    for epoch, elr in zip(run.log["epoch"], elrs, strict=True):
        name = "outside the sweep"
        if min(sweep) <= elr <= max(sweep):
            name = sweep[min(sweep, key=lambda other: abs(math.log(other / elr)))]
        if not parts[-1].startswith(name):
            parts.append(f"{name} from epoch {epoch:g}")
    return f"{text}: {', '.join(parts[1:])}"


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
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="regimes.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="logs, or folders of logs")
    add("--explain", action="store_true", help="also each verdict's reasons")
    text = f"names of columns; ours are {', '.join(USUAL)}"
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=text)
    text = "of random weights; for C classes mostly above a uniform prediction's ln C and 1 − 1/C"
    add("--chance", nargs="+", default=[], type=float, metavar=("LOSS", "ERROR"), help=text)
    args = parser.parse_args(argv)
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    if not columns.keys() <= USUAL.keys():
        parser.error(f"argument --columns: behind PATH, as OURS=THEIRS, of {', '.join(USUAL)}")
    of_loss, of_error = (*args.chance, 1.0, 1.0)[:2]
    if len(args.chance) > 2 or not (0 < of_loss < math.inf and 0 < of_error <= 1):
        parser.error("argument --chance: it takes LOSS above 0, and ERROR above 0, at most 1")
    given = zip(("train_loss", "train_error"), args.chance, strict=False)
    chance = {name: {"mean": mean, "std": 0.0} for name, mean in given}
    runs, problems = gather(args.paths, columns, chance)
    alone = [run for run in runs if math.isnan(run.elr) and not run.verdict.moves]
    if len(alone) < len(runs):
        print(table(runs))
        if len(args.paths) == 1 and args.paths[0].is_dir():
            write_csv(args.paths[0] / "regimes.csv", rows(runs))
    for run in runs if args.explain else alone:
        print(f"{run.name}: {'; '.join([str(run.verdict), *run.verdict.notes])}")
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    finish(main)
