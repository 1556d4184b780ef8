"""Name the training regime of each run from its log.

    python regimes.py logs/digits-convnet                a folder: table, boundaries
    python regimes.py log.csv --chance 2.303             Keras, ten classes
    python regimes.py metrics.csv trainer_state.json     Lightning; Hugging Face
    python regimes.py export.csv --columns epoch=Step    W&B; most are known

Convergence: the loss surely falls. Equilibrium: it is level and better than chance, and the run has
forgotten where it was. Divergence: neither error nor loss can be told from chance. Kodryan et al.,
NeurIPS 2022 (arXiv 2209.03695). Each threshold below was measured: docs/guide.md, The rule.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while numpy is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
USUAL["epoch"] = "epoch step _step global_step iteration iter index"
USUAL["train_loss"] = "loss_epoch loss loss_step total_loss"
USUAL["lr"] = "lr learning_rate lr_sgd lr_adam lr_adamw"
KINDS = ("*.csv", "*.jsonl", "trainer_state.json")  # logs in a folder
OURS = ("*.layers.csv", "*.then=*", "regimes.csv", "landscape.csv", "toy.csv")  # no first runs

MIN_TAIL = 4  # rows that the last half must have; 3 is the least of which a slope has an interval
WINDOWS = (1 / 2, 3 / 4, 7 / 8)  # the last shares of a run whose slopes are looked at
BLOCKS = 24  # of rows, whose means are fitted
FALLS, STEEP = 0.05, 0.1  # slope of log loss that surely falls; where the run has forgotten, too
LEVEL, LEVEL_ALONE = 0.2, 0.05  # slope of a level, at most; where no angle is logged
SURE = 0.3  # a level's slope is known to ±0.3
TURN = 0.7  # radians of a random walk within the last half: having turned less, a run remembers
RIGHT_ANGLE = 1.5  # radians: a step that turns the weights by more leaves nothing of them
NEGLIGIBLE = 0.003  # of the chance loss: below, all runs tried went on falling
FLOORS = {"train_error": 0.03, "train_loss": 0.1}  # skill that a random walk may seem to have
Z99 = 2.576  # normal quantile of a two-sided 99 % interval


class Trend(NamedTuple):
    """A straight line through a column: slope and mean, and half of their 99 % intervals."""

    slope: float = math.nan
    margin: float = math.nan
    mean: float = math.nan
    error: float = math.nan

    def __str__(self):
        return f"slope {self.slope:+.2f} ± {self.margin:.2f}"


def trend(x, y):
    """The line through the means of at most BLOCKS blocks of rows, at least 3. What is left beside
    it, curvature too, is noise."""
    blocks = min(BLOCKS, len(x))
    starts = np.arange(blocks) * len(x) // blocks
    sizes = np.diff(starts, append=len(x))
    x, y = (np.add.reduceat(z, starts) / sizes for z in (x, y))
    away, free = x - x.mean(), blocks - 2
    slope = (away @ y) / (away @ away)
    left = y - y.mean() - slope * away
    # Student's quantile from the normal one (Wallace, Ann. Math. Stat. 30, 1959)
    quantile = Z99 * (8 * free + 3) / (8 * free + 1)
    quantile = math.sqrt(free * math.expm1(quantile**2 / free))
    deviation = quantile * math.sqrt(left @ left / free)
    margin, error = deviation / math.sqrt(away @ away), deviation / math.sqrt(blocks)
    return Trend(slope, margin, y.mean(), error)


class Skill(NamedTuple):
    """How much lower than by chance a column is, as a share, half of the 99 % interval, and whether
    it is lower; None where noise hides that."""

    of: str
    mean: float
    chance: float
    value: float
    margin: float
    told: bool | None

    def __str__(self):
        return f"{self.of[6:]} {self.mean:.3g} (chance {self.chance:.3g})"


@dataclass
class Verdict:
    """What `classify` found, and why. `moves`: its ELR does. `broken`: nan, or a gradient of 0."""

    regime: str = "undecided"
    why: str = ""
    skills: list = field(default_factory=list)
    trend: Trend = Trend()
    more_epochs: int | None = None  # in all, that may decide
    notes: list = field(default_factory=list)
    moves: bool = False
    broken: bool = False

    def __str__(self):
        if self.moves:
            return self.why
        more = "; twice the length may decide" if self.more_epochs and self.skills else ""
        return f"{title(self.regime)}: {self.why}{more}"


def classify(log, chance=None):
    """The regime of one run.

    log      columns, a row per epoch: `epoch`, `train_loss` in nats; where there are `train_error`
             in [0, 1], `step`, `angle` in radians, `grad_norm`, `elr`, `lr`
    chance   {"train_loss": {"mean", "std"}, "train_error": {"mean", "std"}, "points": n}, at n
             random points of the sphere; without it a row before training stands in. "stepped": the
             same after a step of 90° along each point's gradient; "constant": {"train_error"} of
             the best constant prediction
    """
    epoch, loss, verdict = finished(log), log["train_loss"], Verdict()
    bad = ~(np.isfinite(loss) & (loss >= 0))
    if bad.any():
        verdict.broken = not np.isfinite(loss[bad][0])
        what = "not finite" if verdict.broken else "negative: no logarithm"
        verdict.why = f"in epoch {log['epoch'][bad][0]:g} the loss is {what}"
        return verdict
    counts = [int((epoch > epoch[-1] * (1 - share)).sum()) for share in WINDOWS]
    n = counts[0]
    for name in ("elr", "lr"):
        values = log.get(name, epoch[:0])
        late = values[-counts[-1] :][np.isfinite(values[-counts[-1] :])]
        if len(late) and np.ptp(late) > 1e-6 * late.max():
            why = f"{name.upper()} {values[0]:.3g} to {values[-1]:.3g}, not a fixed one"
            return Verdict(why=why, moves=True)
    more = max(2 * MIN_TAIL, 2 * math.ceil(epoch[-1]))
    if n < MIN_TAIL:
        why = f"too short: the last half has {n} of at least {MIN_TAIL} rows"
        return Verdict(why=why, more_epochs=more)

    if chance is None and epoch[0] == 0:
        chance = {name: {"mean": log[name][0], "std": 0.0} for name in FLOORS if name in log}
        verdict.notes.append("no chance reference: the row of epoch 0 stands in")
    angle = log["angle"][-n:].mean() if "angle" in log else math.nan
    step = log.get("step", np.full(len(loss), math.nan))
    turn = angle * math.sqrt(max((step[-1] - step[-n]) * n / (n - 1), 0))
    least = 1e-38 * loss.max() or 1.0  # 0 has no logarithm
    x, y = np.log(np.maximum(epoch, 1e-300)), np.log(np.maximum(loss, least))
    verdict.skills = _skills(log, x[-n:], chance or {}, angle)
    if "train_error" not in [skill.of for skill in verdict.skills]:
        verdict.notes.append("no train_error: skill from the loss")
    nothing = NEGLIGIBLE * chance["train_loss"]["mean"] if chance else 0
    gradient = log.get("grad_norm", np.ones(n))
    if np.median(loss[-n:]) < nothing or not loss[-MIN_TAIL:].any():
        verdict.regime, verdict.why = "convergence", f"loss {loss[-1]:.3g}, next to nothing"
    elif not gradient[-MIN_TAIL:].any():
        since = epoch[np.flatnonzero(np.append(1, gradient))[-1]]
        verdict.broken = True
        verdict.why = f"dead: the gradient is 0 since epoch {since:g}, at loss {loss[-1]:.3g}; "
        verdict.why += "lower the learning rate of what is on no sphere"
    else:
        _decide(verdict, [trend(x[-k:], y[-k:]) for k in counts], loss[-n:], turn)
        if verdict.regime == "undecided" and verdict.skills:
            verdict.more_epochs = more
    return verdict


def _decide(verdict, trends, loss, turn):
    """Sets regime, why, and the trend that decides. `turn`: φ√steps of the last half."""
    known, remembers, skills = not math.isnan(turn), turn < TURN, verdict.skills
    told = [skill for skill in skills if skill.told]
    noisy = [skill for skill in skills if skill.told is None]
    evidence, now = ", ".join(map(str, told[:1] or skills)), f"loss {loss[-1]:.3g}"
    flat = LEVEL if known else LEVEL_ALONE
    falling = [trend for trend in trends if trend.slope + trend.margin < -FALLS]
    level = [trend for trend in trends if trend.margin < SURE and abs(trend.slope) < flat]
    if falling and not known:
        level = []
    if not remembers and any(trend.slope + trend.margin > -STEEP for trend in trends):
        falling = []
    best = verdict.trend = min(falling or level or trends, key=lambda trend: trend.margin)
    if falling:
        turned = f", turning by {turn:.2g} rad" if known else ""
        verdict.regime, verdict.why = "convergence", f"{now} falls ({best}){turned}"
    elif not skills:
        verdict.why = f"equilibrium and divergence look alike without --chance ({best})"
    elif remembers:
        verdict.why = f"{now}, but has turned by only {turn:.2g} rad"
    elif not level:
        verdict.why = f"{now}, not shown to be level ({best})"
    elif told:
        verdict.regime = "equilibrium"
        verdict.why = f"{evidence}, level at loss {loss.mean():.3g} ({best})"
    elif noisy:
        verdict.why = f"too noisy: {noisy[0]} ± {noisy[0].margin * noisy[0].chance:.2g}"
    else:
        verdict.regime, verdict.why = "divergence", f"no better than chance: {evidence}"
    if skills and not known:
        verdict.notes.append("no angle or step: a plateau, floor or slow start looks the same")


def _skills(log, x, chance, angle):
    """Of error and loss in the last half, where chance is known. After steps of 90° a network knows
    one batch: that, or the loss alone, tells it from chance."""
    most = chance.get("constant", {}).get("train_error", 1.0)  # to guess one class is no skill
    forgets, skills = angle > RIGHT_ANGLE, []
    if forgets and "stepped" in chance:
        chance, forgets = chance["stepped"], False
    for name, floor in FLOORS.items():
        values, known = log.get(name, np.array([-1.0])), chance.get(name, {"mean": 0, "std": 0})
        is_error = name == "train_error"
        mean = min(known["mean"], most) if is_error else known["mean"]
        if mean <= 0 or values.min() < 0 or (is_error and values.max() > 1):
            continue  # unknown, or in percent
        own = trend(x, values[-len(x) :])
        spread = Z99 * known["std"] / math.sqrt(chance.get("points", 1))
        value, margin = 1 - own.mean / mean, math.hypot(own.error, spread) / mean
        told = False
        if value - margin >= floor:
            told = not (is_error and forgets)
        elif value >= floor or (margin > floor and value + margin > floor):
            told = None
        skills.append(Skill(name, own.mean, mean, value, margin, told))
    return skills


def finished(log):
    """Epochs finished: a row of epoch 0 is before training only where `step` says 0."""
    epoch = log["epoch"]
    if len(epoch) > 1 and epoch[0] == 0 and log.get("step", [1])[0] != 0:
        return epoch + epoch[1]
    return epoch


def title(regime):
    return "chaotic equilibrium" if regime == "equilibrium" else regime


@dataclass
class Logged:
    """A log (column → array) and its verdict."""

    path: Path
    elr: float
    seed: int
    log: dict
    verdict: Verdict
    chance: dict | None = None

    @property
    def name(self):
        return self.path.stem.replace("=", " ").replace(".seed", " seed")

    def __str__(self):
        return "\n    ".join([f"{self.name}: {self.verdict}", *self.verdict.notes])

    def final(self, column):
        """Mean of a column over its last tenth."""
        values = self.log.get(column, np.array([math.nan]))
        return float(values[-max(1, len(values) // 10) :].mean())


def elr_name(elr):
    return np.format_float_scientific(elr, trim="-", exp_digits=2)


def _lines(path):
    """The lines of a log. JSON becomes CSV: objects under log_history (Hugging Face), or one a line
    (MMEngine, detectron2)."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith(("{", "[")):
        return text.split("\n")
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict):
        found = found.get("log_history", [found])
    header = dict.fromkeys(name for row in found for name in row)
    rows = [[row.get(name, "") for name in header] for row in found]
    return csv_lines([header, *rows]).decode().split("\n")


def read_log(path, columns=None):
    """The columns of a log that we know, rows of one epoch joined. `columns`: ours → theirs. Raises
    ValueError where it is no log."""
    line, last, joined = 1, 0.0, {}
    try:
        lines = _lines(path)
        reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
        rows = filter(None, reader)
        header = [cell.strip() for cell in next(rows, [])]
        if len(header) == 1 < len(next(csv.reader(lines[1:2]), [])):
            raise ValueError("remove the title before the names of the columns")
        places = _places(header, columns or {})
        for row in rows:
            line = reader.line_num
            if len(row) < len(header) and not any(rows):
                break  # the last one, cut off
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, the header has {len(header)}")
            numbers = {name: float(row[i]) for name, i in places.items() if row[i].strip()}
            epoch = numbers.get("epoch", last)  # Lightning's learning rates have none
            if not last <= epoch < math.inf:
                raise ValueError(f"one run a file, in order: epoch {epoch:g} comes after {last:g}")
            before, last = joined.setdefault(epoch, {}), epoch
            if "train_loss" in before and "train_loss" in numbers:
                raise ValueError(f"drop a row, or say --columns epoch=step: epoch {epoch:g} again")
            before.update(numbers)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: line {line}: {str(error)[:200]}") from None
    whole = [numbers for numbers in joined.values() if "train_loss" in numbers]
    if not whole:
        raise ValueError(f"{path}: no row with a loss")
    return {name: np.array([row.get(name, math.nan) for row in whole]) for name in places}


def _places(header, columns):
    """Where each of our columns is."""
    if header and all(re.fullmatch(r"[-+.\deE]+", name) for name in header):
        raise ValueError("put the names of the columns into a first line: there is no header")
    if "train_runtime" in header:  # Hugging Face's train_loss is one number, at the end
        columns = {"train_loss": "loss"} | columns
    plain, places = [], {}
    for name in header:
        name = re.sub(r"\W+", "_", name.rpartition(" - ")[2].lower())
        plain.append(name.removeprefix("train_") or "index")  # pandas does not name it
    for ours, usual in USUAL.items():
        asked = columns.get(ours, ours)
        found = [i for i, name in enumerate(header) if name == asked]
        for name in [] if found or ours in columns else usual.split():
            found = found or [i for i, other in enumerate(plain) if other == name]
        if len(found) == 1:
            places[ours] = found[0]
        elif found or ours in columns or ours in ("epoch", "train_loss"):
            what = f"{len(found) or 'no'} columns {asked} in {', '.join(header)}"
            raise ValueError(f"say --columns {ours}=COLUMN: {what}")
    if places.get("step") == places["epoch"] and "step" not in columns:
        del places["step"]  # standing in for the epoch, 0 does not say that it is before training
    return places


def read_chance(folder):
    """The chance references in a folder's config.json, by seed. Raises ValueError if damaged."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        chance = json.loads(path.read_text(encoding="utf-8")).get("chance", {})
        for reference in chance.values():
            numbers = [reference[name][x] for name in FLOORS for x in ("mean", "std")]
            if not all(0 <= x < math.inf for x in [reference["points"] - 1, *numbers]):
                raise ValueError
    except Exception:  # damaged JSON can fail anywhere
        raise ValueError(f"{path} is damaged: it has no chance reference") from None
    return chance


def read_run(path, chance, columns=None):
    """Read and classify a log. `chance`: references by seed, or under "" one for all."""
    log = read_log(path, columns)
    elr = re.search(r"elr=(\d+(\.\d+)?(e[+-]?\d+)?)", path.name)
    seed = re.search(r"seed=(\d{1,18})", path.name)
    elr, seed = float(elr[1]) if elr else math.nan, int(seed[1]) if seed else 0
    elr = float(log["elr"][-1]) if "elr" in log else elr
    reference = chance.get(str(seed), chance.get(""))
    verdict = classify(log, reference)
    loop = loop_of([log], reference)
    if loop:
        verdict.moves, verdict.why = True, str(loop)
    if not 0 < elr < math.inf or verdict.moves:
        elr = math.nan
    return Logged(path, elr, seed, log, verdict, reference)


def loop_of(logs, chance):
    """What lab/loop.py says of logs whose ELR falls and rises again. None: of other logs, or where
    this file has been copied alone."""
    try:
        from lab.loop import classify_loop, is_loop
    except ImportError:
        return None
    return classify_loop(logs, chance) if all(map(is_loop, logs)) else None


def gather(paths, columns=None, chance=None):
    """The runs of these folders and logs, by ELR and seed, and what was wrong with them. `chance`:
    instead of config.json's."""
    runs, problems, logs = [], [], []
    for path in paths:
        found = sorted(log for kind in KINDS for log in path.glob(kind))
        found = [log for log in found if not any(map(log.match, OURS))]
        logs += found if path.is_dir() else [path]
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
    """The regime of over half of the runs, else undecided; how many have the most frequent one."""
    regime, n = Counter(run.verdict.regime for run in runs).most_common(1)[0]
    return regime if 2 * n > len(runs) else "undecided", n


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
    """Of a sweep: from the largest ELR at which all runs lie below, and no run above before it, to
    the smallest of which the reverse is true. Between, seeds disagree or are undecided. A run that
    broke down lies above."""
    ranks, found = {}, []
    for elr, group in by_elr(runs).items():
        verdicts = [run.verdict for run in group]
        ranks[elr] = np.array([2 if v.broken else ORDER.get(v.regime, math.nan) for v in verdicts])
    for rank, (left, right) in enumerate(pairwise(ORDER)):
        first = min((elr for elr in ranks if (ranks[elr] > rank).any()), default=math.inf)
        last = max((elr for elr in ranks if (ranks[elr] <= rank).any()), default=0.0)
        below = [elr for elr in ranks if elr < first and (ranks[elr] <= rank).all()]
        above = [elr for elr in ranks if elr > last and (ranks[elr] > rank).all()]
        ends = max(below, default=math.nan), min(above, default=math.nan)
        found.append(Boundary(left, right, *ends))
    return found


ENDS = "train_loss train_error test_error grad_norm angle".split()
MEDIANS = ["skill", "slope", *ENDS]


def rows(runs):
    """A row per run that has an ELR; of ENDS means of the last tenth of the epochs."""
    found = []
    for run in runs:
        verdict, elrs = run.verdict, run.log.get("elr", [run.elr])
        if math.isnan(elrs[-1]):
            continue
        row = {"elr": run.elr, "seed": run.seed}
        row["regime"] = "not fixed" if verdict.moves else verdict.regime
        row["skill"] = verdict.skills[0].value if verdict.skills else math.nan
        row["slope"] = verdict.trend.slope
        row |= {name: run.final(name) for name in ENDS}
        row |= {"epochs": int(finished(run.log)[-1]), "run": run.name}
        found.append(row | {"elr_min": min(elrs), "elr_max": max(elrs)})
    return found


def table(runs):
    """Runs as text: by ELR the regime, its share of the seeds, medians over them; boundaries. Runs
    whose ELR moves by what was set, and the best; those without an ELR."""
    lines, moving, others, errors = [], {}, [], {}
    for elr, group in by_elr(runs).items():
        regime, n = majority(group)
        found = rows(group)
        cells = [f"{np.median([row[name] for row in found]):12.4g}" for name in MEDIANS]
        cells = "".join(cells).replace("nan", "  –")
        lines.append(f"{elr_name(elr):>10}  {title(regime):<20}{n:>3}/{len(group)}{cells}")
    if lines:
        heads = [f"{name.replace('_', ' '):>12}" for name in MEDIANS]
        lines.insert(0, f"{'ELR':>10}  {'regime':<20}seeds{''.join(heads)}")
        lines += map(str, boundaries(runs))
    for run in runs:
        if run.verdict.moves and "test_error" in run.log:
            moving.setdefault(run.name.split(" seed")[0], []).append(run)
        elif math.isnan(run.elr):
            others.append(str(run))
    for name, group in sorted(moving.items(), key=lambda item: _number_in(item[0])):
        said = loop_of([run.log for run in group], group[0].chance)
        if said:
            name += f", {len(group)} seeds"
        else:
            found = {name: [row[name] for row in rows(group)] for name in rows(group)[0]}
            error, loss = found["test_error"], np.mean(found["train_loss"])
            errors[name] = np.mean(error)
            said = f"test error {errors[name]:.4f}"
            if len(group) > 1:
                spread = np.std(error) / math.sqrt(len(group) - 1)
                said += f" ± {spread:.4f} ({len(group)} seeds)"
            low, high = min(found["elr_min"]), max(found["elr_max"])
            said += f", train loss {loss:.3g}, ELR {low:.3g} to {high:.3g}"
        lines.append(f"{name}: {said}")
    if len(errors) > 1:
        lines.append(f"best: {min(errors, key=errors.get)}")
    return "\n".join(lines + others)


def _number_in(name):
    found = re.search(r"\d[\d.]*(e[-+]?\d+)?", name)
    return float(found[0]) if found else math.inf


def csv_lines(rows):
    """Rows as CSV, numbers to 9 digits."""
    text = io.StringIO()
    for row in rows:
        cells = [cell.item() if hasattr(cell, "item") else cell for cell in row]  # of tensors
        cells = [f"{cell:.9g}" if isinstance(cell, float) else cell for cell in cells]
        csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def write_csv(path, rows):
    """Of dicts with the same keys."""
    write_whole(path, csv_lines(rows[:1] + [row.values() for row in rows]))


def write_whole(path, content):
    """Whole or not at all: beside it, then renamed."""
    beside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    add, ours = parser.add_argument, ", ".join(USUAL)
    add("paths", nargs="+", type=Path, metavar="PATH", help="logs, or folders of logs")
    text = f"names of columns; ours are {ours}"
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=text)
    text = "of random weights: for C classes mostly above ln C and 1 − 1/C"
    add("--chance", nargs="+", default=[], type=float, metavar=("LOSS", "ERROR"), help=text)
    args = parser.parse_args(argv)
    columns = dict(word.partition("=")[::2] for word in args.columns)
    if not (len(columns) == len(args.columns) and all(columns.values()) and {*columns} <= {*USUAL}):
        parser.error(f"argument --columns: behind PATH, as OURS=THEIRS, each once of {ours}")
    given = dict(zip(("train_loss", "train_error"), args.chance, strict=False))
    sound = all(0 < mean < math.inf for mean in args.chance) and given.get("train_error", 1) <= 1
    if len(args.chance) > 2 or not sound:
        parser.error("argument --chance: it takes LOSS above 0, and ERROR in (0, 1]")
    chance = {name: {"mean": mean, "std": 0.0} for name, mean in given.items()}
    runs, problems = gather(args.paths, columns, chance)
    folder = args.paths[0]
    if not any(path.is_dir() for path in args.paths):
        text = "\n".join(map(str, runs))
    else:
        text, found = table(runs), rows(runs)
        if runs and not found:
            text += "\nno regimes.csv: no run here has an ELR"
        try:
            if len(args.paths) == 1 and found:
                write_csv(folder / "regimes.csv", found)
        except OSError as error:
            problems.append(f"{folder / 'regimes.csv'} not written: {error.strerror}")
    if text:
        print(text)
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    finish(main)
