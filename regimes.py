"""Name the training regime of each run from its CSV log.

    python regimes.py logs/digits-convnet                a folder: table, boundaries
    python regimes.py log.csv --chance 2.303             Keras, ten classes
    python regimes.py metrics.csv                        Lightning
    python regimes.py export.csv --columns epoch=Step    W&B; most are known

Convergence: the loss surely keeps falling, or is next to nothing. Divergence: neither error nor
loss can be told from chance. Equilibrium: one of them can, and the loss is level. Kodryan et
al., NeurIPS 2022 (arXiv 2209.03695).
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
USUAL = dict.fromkeys("train_error step angle elr grad_norm test_error avg_test_error".split(), "")
# What others call them, the best first; of "my-run - train/loss" it is "loss".
USUAL["epoch"] = "epoch step _step global_step iteration index"
USUAL["train_loss"] = "loss_epoch loss loss_step"
OURS = ("*.layers.csv", "*.then=*", "regimes.csv", "landscape.csv", "toy.csv")  # no first runs

MIN_TAIL = 4  # rows of the last half: with fewer the interval of no slope is finite
NEGLIGIBLE = 0.003  # of the chance loss: below, all runs tried went on falling
STEEP = -0.5  # slope of a falling loss: 1/epoch has −1, a level 0
FLAT = 0.1  # slopes this small change a loss by 7 % while the epochs double
FLOORS = {"train_error": 0.03, "train_loss": 0.1}  # skill that a random walk may seem to have
TURN = 1.0  # radians: a walk that has turned less remembers its start
BLOCKS = 600  # whose means stand for more than twice as many rows
Z99 = 2.576  # normal quantile of a two-sided 99 % interval


@dataclass
class Skill:
    """1 − value/chance of a column, and its standard error."""

    of: str
    value: float
    error: float

    @property
    def told(self):
        """Whether it is better than chance; None where noise hides that."""
        floor, margin = FLOORS[self.of], Z99 * self.error
        if self.value - margin >= floor:
            return True
        if self.value >= floor or (self.error > floor and self.value + margin > floor):
            return None
        return False

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
        return f"slope {self.slope:+.2f}, 99 % interval {self.low:+.2f} to {self.high:+.2f}"


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
        if self.moves:
            return self.why
        more = f"; {self.more_epochs} epochs may decide" if self.more_epochs else ""
        return f"{title(self.regime)}: {self.why}{more}"


def classify(log, chance=None):
    """The regime of one run.

    log      columns, a row per epoch: `epoch`, `train_loss` in nats; where there are `train_error`
             in [0, 1], `step`, `angle` in radians
    chance   {"train_loss": {"mean", "std"}, "train_error": {"mean", "std"}, "points": n}, at n
             random points of the sphere; without it a row before training stands in
    """
    loss = log["train_loss"]
    for bad, what in ((~np.isfinite(loss), "not finite"), (loss < 0, "negative: no logarithm")):
        if bad.any():
            return Verdict(why=f"in epoch {log['epoch'][bad][0]:g} the loss is {what}")
    elrs = [elr for elr in log.get("elr", []) if math.isfinite(elr)]
    if elrs and max(elrs) - min(elrs) > 1e-6 * max(elrs):
        return Verdict(why=f"ELR {elrs[0]:.3g} to {elrs[-1]:.3g}, not a fixed one", moves=True)

    epoch, verdict = finished(log), Verdict()
    late = epoch > epoch[-1] / 4  # the last three quarters; their last n rows are the last half
    n = (epoch > epoch[-1] / 2).sum()
    note = verdict.notes.append
    more = max(2 * MIN_TAIL, 2 * math.ceil(epoch[-1]))
    if n < MIN_TAIL:
        return Verdict(why=f"too short: {n} rows in the last half", more_epochs=more)
    if chance is None and epoch[0] == 0:
        chance = {name: {"mean": log[name][0], "std": 0.0} for name in FLOORS if name in log}
        note("no chance reference: the row of epoch 0 stands in")
    log = {name: values[late] for name, values in log.items()} | {"epoch": epoch[late]}

    verdict.skills = _skills(log, n, chance or {})
    if "train_error" not in [skill.of for skill in verdict.skills]:
        note("no train_error: skill from the loss")
    if "angle" in log and "step" in log:
        verdict.turn = log["angle"][-n:].mean() * math.sqrt(max(log["step"][-1], 0))
    if math.isnan(verdict.turn):
        note("no angle or step: not asked whether the run has left its start")
    least = 1e-38 * loss.max() or 1.0  # 0 has no logarithm
    x, y = np.log(log["epoch"]), np.log(np.maximum(log["train_loss"], least))
    verdict.trend = theil_sen(x[-n:], y[-n:])
    level = chance["train_loss"]["mean"] if chance else math.nan
    verdict.regime, verdict.why = _decide(verdict, theil_sen(x, y), loss[-n:], level)
    if verdict.regime == "undecided" and verdict.skills:
        verdict.more_epochs = more
    return verdict


def _decide(verdict, longer, loss, chance):
    """Regime and why. `loss`: of the last half, and by chance. Slow noise may look like a trend, or
    hide one: so `longer`, that of the last three quarters, is asked, too."""
    trend, skills = verdict.trend, verdict.skills
    told = [skill for skill in skills if skill.told]
    better = " and ".join(map(str, told[:1] or skills))

    if np.median(loss) < NEGLIGIBLE * chance:
        share = loss.mean() / chance
        return "convergence", f"the loss has fallen to {share:.2%} of chance ({trend})"
    if np.median(loss) == 0 or not loss[-MIN_TAIL:].any():
        return "convergence", "the loss has reached 0"
    steep = trend.high < 0 and trend.slope < STEEP and longer.slope < STEEP
    if steep and (not skills or any(skill.value >= Z99 * skill.error for skill in skills)):
        return "convergence", f"the loss keeps falling ({trend}), now at {loss[-1]:.3g}"

    if not skills:
        return "undecided", f"equilibrium and divergence look alike without --chance ({trend})"
    if verdict.turn < TURN:
        return "undecided", f"{better}, but has hardly left its start ({verdict.turn:.2g} rad)"

    if told and (trend.level or longer.level):
        return "equilibrium", f"{better}, and the loss stays at about {loss.mean():.3g} ({trend})"
    falls = trend.high < 0 and trend.slope < -FLAT and max(skill.value for skill in skills) > 0
    if told or falls:
        return "undecided", f"{better}, but the loss is not level ({trend})"
    for skill in skills:
        if skill.told is None:
            return "undecided", f"too noisy to tell from chance: {skill}"
    return "divergence", f"no better than chance: {better}"


def _skills(log, n, chance):
    """Of error and loss over the last n rows, where chance is known; what is told first."""
    skills = []
    for name in FLOORS:
        values = log.get(name)
        if values is None or name not in chance or not chance[name]["mean"] > 0:
            continue
        if name == "train_error" and not ((values >= 0) & (values <= 1)).all():  # in percent
            continue
        # Around a line: a curve through few rows would take slow noise for a trend.
        residual, inflation = _around_trend(np.log(log["epoch"]), values, degree=1)
        own = residual.std(ddof=2) * math.sqrt(inflation / n)
        own *= 1 + 3 / n  # Student's quantiles are farther out
        mean, std = chance[name]["mean"], chance[name]["std"]
        error = math.hypot(own, std / math.sqrt(chance.get("points", 1)))
        skills.append(Skill(name, 1 - values[-n:].mean() / mean, error / mean))
    return sorted(skills, key=lambda skill: not skill.told)


def finished(log):
    """Epochs finished: a row of epoch 0 is before training only where `step` says 0."""
    epoch = log["epoch"]
    if len(epoch) > 1 and epoch[0] == 0 and log.get("step", [1])[0] != 0:
        return epoch + epoch[1]
    return epoch


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
    """A log (column → array) and its verdict."""

    path: Path
    elr: float
    seed: int
    log: dict
    verdict: Verdict

    @property
    def name(self):
        return self.path.stem.replace("=", " ").replace(".seed", " seed")

    def __str__(self):
        return f"{self.name}: {'; '.join([str(self.verdict), *self.verdict.notes])}"

    def final(self, column):
        """Mean of a column over its last tenth."""
        values = self.log.get(column, np.array([math.nan]))
        return float(values[-max(1, len(values) // 10) :].mean())


def elr_name(elr):
    return np.format_float_scientific(elr, trim="-", exp_digits=2)


def read_log(path, columns=None):
    """The columns of a CSV log that we know, rows of one epoch joined; whether its last row is cut
    off, and left out. `columns`: ours → theirs. Raises ValueError where it is no log."""
    line, cut, last, joined = 1, False, 0.0, {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
        rows = filter(None, reader)
        header = [cell.strip() for cell in next(rows, [])]
        places = _places(header, columns or {})
        for row in rows:
            line = reader.line_num
            cut = len(row) < len(header) and not any(rows)
            if cut:
                break
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, the header has {len(header)}")
            cells = {name: row[i] for name, i in places.items() if row[i].strip()}
            numbers = {name: float(cell) for name, cell in cells.items()}
            if not numbers.keys() & {"epoch", "train_loss"}:
                continue
            epoch = numbers.get("epoch", math.nan)
            if not last <= epoch < math.inf:
                raise ValueError("no epoch, or not the next one: one run, in order")
            before, last = joined.setdefault(epoch, {}), epoch
            if "train_loss" in before and "train_loss" in numbers:
                raise ValueError(f"epoch {epoch:g} again: drop a row, or say --columns epoch=step")
            before.update(numbers)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: line {line}: {str(error)[:400]}") from None
    whole = [numbers for numbers in joined.values() if "train_loss" in numbers]
    if not whole:
        raise ValueError(f"{path}: no row with a loss")
    log = {name: [numbers.get(name, math.nan) for numbers in whole] for name in places}
    return {name: np.array(values) for name, values in log.items()}, cut


def _places(header, columns):
    """Where each of our columns is."""
    if "train_runtime" in header:  # Hugging Face's train_loss is one number, at the end
        columns = {"train_loss": "loss"} | columns
    plain, places = [], {}
    for name in header:
        name = re.sub(r"\W+", "_", name.rpartition(" - ")[2].lower())
        plain.append(name.removeprefix("train_") or "index")  # pandas does not name it
    for ours, usual in USUAL.items():
        asked = columns.get(ours, ours)
        found = [i for i, name in enumerate(header) if name == asked]
        for name in [] if ours in columns else usual.split():
            found = found or [i for i, other in enumerate(plain) if other == name]
        if len(found) == 1:
            places[ours] = found[0]
        elif found or usual or ours in columns:
            what = f"{len(found) or 'no'} columns {asked} in {', '.join(header)}"
            raise ValueError(f"{what}: say --columns {ours}=COLUMN")
    # Of a step that stands in for the epoch, 0 does not say that it is before training.
    if places.get("step") == places["epoch"] and "step" not in columns:
        del places["step"]
    return places


def read_chance(folder):
    """The chance references in a folder's config.json, by seed. Raises ValueError if damaged."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        chance = json.loads(path.read_text(encoding="utf-8")).get("chance", {})
        for reference in chance.values():
            numbers = [x for name in FLOORS for x in reference[name].values()]
            if not all(0 <= x < math.inf for x in [reference["points"] - 1, *numbers]):
                raise ValueError
    except Exception:  # damaged JSON can fail anywhere
        raise ValueError(f"{path} is damaged: it has no chance reference") from None
    return chance


def read_run(path, chance, columns=None):
    """Read and classify a log. `chance`: references by seed, or under "" one for all."""
    log, _ = read_log(path, columns)
    elr = re.search(r"elr=(\d+(\.\d+)?(e[+-]?\d+)?)", path.name)
    elr = float(elr[1]) if elr else math.nan
    if "elr" in log:
        elr = float(log["elr"][0])
    seed = re.search(r"seed=(\d{1,18})", path.name)
    seed = int(seed[1]) if seed else 0
    verdict = classify(log, chance.get(str(seed), chance.get("")))
    if not 0 < elr < math.inf or verdict.moves:
        elr = math.nan
    return Run(path, elr, seed, log, verdict)


def gather(paths, columns=None, chance=None):
    """The runs of these folders and logs, by ELR and seed, and what was wrong with them. `chance`:
    instead of config.json's."""
    runs, problems, logs = [], [], []
    for path in paths:
        inside = [log for log in sorted(path.glob("*.csv")) if not any(map(log.match, OURS))]
        logs += inside if path.is_dir() else [path]
    if not logs:
        problems.append(f"{paths[0]}: no logs here")
    for path in logs:
        try:
            known = {"": chance} if chance else read_chance(path.parent)
            runs.append(read_run(path, known, columns))
        except ValueError as error:
            problems.append(str(error))
    runs.sort(key=lambda run: (math.isnan(run.elr), run.elr, run.seed))
    return runs, list(dict.fromkeys(problems))


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
    return regime if 2 * n > len(runs) else "undecided", n / len(runs)


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
        where = f"{self.low:.4g} to {self.high:.4g}".replace("nan", "–")
        factor = f"×{self.high / self.low:.3g}" if self.seen else "not seen"
        return f"{title(self.left)} | {title(self.right)}: {where} ({factor})"


def boundaries(runs):
    """Of a sweep, by the majority of seeds."""
    ranks = {elr: ORDER.get(majority(group)[0], math.nan) for elr, group in by_elr(runs).items()}
    found = []
    for left, right in pairwise(ORDER):  # undecided: rank nan, on no side
        below = [elr for elr, rank in ranks.items() if rank <= ORDER[left]]
        above = [elr for elr, rank in ranks.items() if rank > ORDER[left]]
        found.append(Boundary(left, right, [math.nan, *below][-1], [*above, math.nan][0]))
    return found


MEDIANS = "skill slope train_loss train_error test_error grad_norm angle".split()
COLUMNS = ["elr", "seed", "regime", *MEDIANS, "epochs"]


def rows(runs):
    """A row per run with an ELR; from `train_loss` on means of the last tenth of the epochs."""
    found = []
    for run in sum(by_elr(runs).values(), []):
        verdict = run.verdict
        skill = verdict.skills[0].value if verdict.skills else math.nan
        values = [run.elr, run.seed, verdict.regime, skill, verdict.trend.slope]
        values += [run.final(name) for name in MEDIANS[2:]]
        found.append(dict(zip(COLUMNS, [*values, int(finished(run.log)[-1])], strict=True)))
    return found


def table(runs):
    """The sweep as text: per ELR the regime, its share of the seeds, medians over them; below, the
    runs without an ELR."""
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
        lines += map(str, boundaries(runs))
    return "\n".join(lines + [str(run) for run in runs if math.isnan(run.elr)])


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
    beside = temporary(path)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def finish(main):
    """Exit as `main` says; silently if the reader is gone (| head), or at Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="regimes.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="logs, or folders of logs")
    ours = ", ".join(USUAL)
    text = f"names of columns; ours are {ours}"
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=text)
    text = "of random weights; for C classes mostly above a uniform prediction's ln C and 1 − 1/C"
    add("--chance", nargs="+", default=[], type=float, metavar=("LOSS", "ERROR"), help=text)
    args = parser.parse_args(argv)
    pairs = [word.partition("=")[::2] for word in args.columns]
    columns = dict(pairs)
    if len(columns) < len(pairs) or not columns.keys() <= USUAL.keys() or "" in columns.values():
        parser.error(f"argument --columns: behind PATH, as OURS=THEIRS, each once of {ours}")
    of_loss, of_error = (*args.chance, 1.0, 1.0)[:2]
    if len(args.chance) > 2 or not (0 < of_loss < math.inf and 0 < of_error <= 1):
        parser.error("argument --chance: it takes LOSS above 0, and ERROR in (0, 1]")
    given = zip(("train_loss", "train_error"), args.chance, strict=False)
    chance = {name: {"mean": mean, "std": 0.0} for name, mean in given}
    runs, problems = gather(args.paths, columns, chance)
    whole = any(path.is_dir() for path in args.paths)
    text = table(runs) if whole else "\n".join(map(str, runs))
    if text:
        print(text)
    if whole and len(args.paths) == 1 and runs:
        write_csv(args.paths[0] / "regimes.csv", rows(runs))
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    finish(main)
