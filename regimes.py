"""Name the training regime of each run from its log.

    python regimes.py logs/digits-convnet         a folder: table, boundaries
    python regimes.py log.csv --chance 2.303      anybody's log

The regimes are those of arXiv 2209.03695.
"""

import signal

if __name__ == "__main__":  # Ctrl-C in an import: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import io
import json
import os
import re
import socket
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from math import ceil, expm1, hypot, inf, isnan, nan, pi, sqrt
from pathlib import Path

import numpy as np

ORDER = {"convergence": 0, "equilibrium": 1, "divergence": 2}
USUAL = dict.fromkeys("train_error step angle elr grad_norm test_error avg_test_error".split(), "")
# others'; "my-run - train/loss" is "loss"
USUAL["epoch"] = "step _step global_step iteration iter index"
USUAL["train_loss"] = "loss_epoch loss loss_step total_loss"
USUAL["lr"] = r"learning_rate (lr|learning_rate)_(?!.*(momentum|decay)).*"
LOG = r"(?!(regimes|landscape|toy|.*\.layers)\.csv|.*\.then=).*(\.csv|\.jsonl|trainer_state\.json)"
NUMBER = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?"

# benchmarks/thresholds.csv: at what cost
MIN_TAIL = 4  # least rows of the last half, ≥ 3
WINDOWS = (1 / 2, 1 / 4, 1 / 8)  # where the fits begin
BLOCKS = 24  # of rows, whose means are fitted
FALLS, STEEP = 0.02, 0.15  # slope of log loss that surely falls; where the run has forgotten
LEVEL = (-0.2, 0.2, -0.4)  # ends of the slope of a level, least end of its interval
NO_ANGLE = (-0.035, 0.1, -0.3)  # where no angle is logged
TURN = 0.7  # radians of a random walk in the last half: with less a run remembers
RIGHT_ANGLE = 1.5  # radians: a step by more leaves nothing of the weights
NEGLIGIBLE = 0.003  # of the chance loss
FLOORS = {"train_error": 0.03, "train_loss": 0.1}  # skill that a random walk may seem to have
Z99 = 2.576  # two-sided, 99 %


def trend(x, y):
    """Slope, half of its 99 % interval, mean, half of its, of the line through the means of blocks,
    or 3 rows and more. What is left beside it is noise."""
    blocks = min(BLOCKS, len(x))
    starts = np.arange(blocks) * len(x) // blocks
    x, y = (np.add.reduceat(z, starts) / np.diff(starts, append=len(z)) for z in (x, y))
    away, free = x - x.mean(), blocks - 2
    slope = (away @ y) / (away @ away)
    left = y - y.mean() - slope * away
    # Student's quantile (Wallace, Ann. Math. Stat. 30, 1959)
    normal = Z99 * (8 * free + 3) / (8 * free + 1)
    noise = sqrt(expm1(normal**2 / free)) * hypot(*left)
    return slope, noise / sqrt(away @ away), y.mean(), noise / sqrt(blocks)


@dataclass
class Verdict:
    """What `classify` found, and why."""

    regime: str = "undecided"
    why: str = ""
    slope: float = nan  # that decides
    skill: float = nan  # of the error, else of the loss
    notes: tuple = ()
    more_epochs: int | None = None  # that may decide
    moves: bool = False  # its ELR
    broken: bool = False  # by nan, or a gradient of 0

    def __str__(self):
        return self.why if self.moves else f"{title(self.regime)}: {self.why}"


def classify(log, chance=None):
    """The regime of one run.

    log      columns, a row per epoch: `epoch`, `train_loss` in nats; what there is of `train_error`
             in [0, 1], `step`, `angle` in radians, `grad_norm`, `elr`, `lr`
    chance   of n random points: {"train_loss": {"mean", "std"}, "train_error": the same, "points":
             n}; "stepped": after a step of 90°; "constant": {"train_error"} of the best constant
    """
    loss, chance = log["train_loss"], chance or {}
    log = {name: np.full(len(loss), nan) for name in USUAL} | log
    for when, value in zip(log["epoch"], loss, strict=True):
        if not 0 <= value < inf:
            return Verdict(why=f"the loss is {value:g} in epoch {when:g}", broken=not value < 0)
    for name in ("elr", "lr"):
        rate = finite(log[name])
        late = rate[len(rate) // 8 :]
        if len(late) and np.ptp(late) > 1e-6 * late.max():
            why = f"{name.upper()} {rate[0]:.3g} to {rate[-1]:.3g}, not a fixed one"
            return Verdict(why=why, moves=True)
    epoch = finished(log)
    windows = [epoch > epoch[-1] * begin for begin in WINDOWS]
    last = windows[0]
    n, longer = last.sum(), 2 * max(ceil(epoch[-1]), MIN_TAIL)
    if n < MIN_TAIL:
        why = f"too short: the last half has {n} of at least {MIN_TAIL} rows"
        return Verdict(why=why, more_epochs=longer)

    angles = finite(log["angle"][last])
    angle = angles.mean() if len(angles) else nan
    steps = np.ptp(log["step"][last]) or nan  # 0 is no count
    turn = angle * sqrt(steps * n / (n - 1))
    skills = _skills(log, epoch, last, chance, angle)
    nothing = NEGLIGIBLE * chance["train_loss"]["mean"] if chance else 0
    gradient, now = log["grad_norm"], f"loss {loss[-1]:.3g}"
    if (loss[last] < nothing).mean() >= 0.75 or not loss[-2:].any():
        verdict = Verdict("convergence", f"{now}, mostly next to nothing")
    elif not gradient[-MIN_TAIL:].any():
        since = log["epoch"][len(np.trim_zeros(gradient, "b"))]
        why = f"dead: the gradient is 0 since epoch {since:g}, at {now}; lower the learning rate"
        verdict = Verdict(why=why, broken=True)
    else:
        y = np.log(np.maximum(loss, 1e-38 * loss.max()))  # 0 has no logarithm
        slopes = [trend(np.log(epoch[window]), y[window])[:2] for window in windows]
        verdict = Verdict(*_decide(slopes, turn, skills, now, loss[last].mean()))
        if verdict.regime == "undecided" and skills:
            verdict.more_epochs = longer
            verdict.why += "; twice the length may decide"
    verdict.skill = next(iter(skills.values()), (nan,))[0]
    if skills and "train_error" not in skills and not angle > RIGHT_ANGLE:
        verdict.notes += ("judged by the loss alone: no train_error in [0, 1], or no chance of it",)
    if skills and isnan(turn) and verdict.regime != "convergence":
        verdict.notes += ("no angle or step: a plateau, floor or slow start looks the same",)
    return verdict


def _decide(slopes, turn, skills, now, mean):
    """Regime, why, and the slope that decides. slopes: (slope, half of its interval) by window."""
    known, remembers = not isnan(turn), turn < TURN
    falling = [fit for fit in slopes if sum(fit) < -FALLS]  # the whole interval
    falls = falling if remembers else all(sum(fit) < -STEEP for fit in slopes)
    least, most, end = LEVEL if known else NO_ANGLE
    level = [fit for fit in slopes if least < fit[0] < most and fit[0] - fit[1] > end]
    if falls or (falling and not known):
        level = []
    decides, margin = min(level or falling or slopes, key=lambda fit: fit[1])
    slope = f"(slope {decides:+.2f} ± {margin:.2f})"
    said = {better: text for _, better, text in reversed(skills.values())}
    regime = "undecided"
    if falls:
        turned = f", turning by {turn:.2g} rad" if known else ""
        regime, why = "convergence", f"{now} falls {slope}{turned}"
    elif not skills:
        why = f"equilibrium and divergence look alike without --chance {slope}"
    elif remembers:
        why = f"{now}, but has turned by only {turn:.2g} rad"
    elif not level:
        why = f"{now}, not shown to be level {slope}"
    elif True in said:
        regime, why = "equilibrium", f"{said[True]}, level at loss {mean:.3g} {slope}"
    elif None in said:
        why = f"too noisy: {said[None]}"
    else:
        texts = ", ".join(text for *_, text in skills.values())
        regime, why = "divergence", f"no better than chance: {texts}"
    return regime, why, decides


def _skills(log, epoch, last, chance, angle):
    """Of error and loss: skill, whether there is any (None: noise hides it), in words."""
    skills, constant = {}, chance.get("constant", {})  # to guess one class is no skill
    if angle > RIGHT_ANGLE:  # the network knows one batch
        chance = chance.get("stepped", chance | {"train_error": {"mean": 0.0}})
    for name, floor in FLOORS.items():
        values, reference = log[name][last], chance.get(name, {"mean": 0.0})
        by_chance, top = reference["mean"], inf
        if name == "train_error":
            by_chance, top = min(by_chance, constant.get(name, 1.0)), 1.0
        if not (by_chance > 0 and 0 <= values.min() and finite(log[name]).max() <= top):  # percent
            continue
        _, _, mean, error = trend(np.log(epoch[last]), values)
        spread = Z99 * reference.get("std", 0.0) / sqrt(chance.get("points", 1))
        skill, margin = 1 - mean / by_chance, hypot(error, spread) / by_chance
        better, text = skill - margin >= floor, f"{name[6:]} {mean:.3g} (chance {by_chance:.3g})"
        if not better and (skill >= floor or (margin > floor and skill + margin > floor)):
            better, text = None, f"{text} ± {margin * by_chance:.2g}"
        skills[name] = skill, better, text
    return skills


def finite(column):
    return column[np.isfinite(column)]


def finished(log):
    """Epochs finished: row 0 is before training only where `step` says 0."""
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
        values = self.log.get(column, [nan])
        return float(np.mean(values[-max(1, len(values) // 10) :]))


def elr_name(elr):
    return np.format_float_scientific(elr, trim="-", exp_digits=2)


def _parsed(path):
    """Names of columns; (line, row), of CSV or JSON."""
    text = path.read_text(encoding=json.detect_encoding(path.read_bytes())).lstrip("\n")
    if text.startswith(("{", "[")):
        text = text.strip().removeprefix("[").removesuffix("]").rstrip(",")
        text = re.sub(r"}(\s*\n){", r"},\1{", text)
        try:
            found = json.loads(f"[{text}]")
        except ValueError:  # cut off
            text = re.sub(r"(?s)(.*}),\s*{.*", r"\1", text)
            found = json.loads(f"[{text}]")
        if len(found) == 1 and isinstance(found[0], dict):
            found = found[0].get("log_history", found[0])
        if isinstance(found, dict):  # Keras' lists, or one row
            rows = zip_longest(*map(np.atleast_1d, found.values()))
            found = [dict(zip(["", *found], [i, *row], strict=True)) for i, row in enumerate(rows)]
        if not all(isinstance(row, dict) for row in found):
            raise ValueError('it takes objects like {"loss": 2.3}')
        return [*dict.fromkeys(name for row in found for name in row)], enumerate(found, 1)
    lines = text.split("\n")
    delimiter = max(",;\t", key=lines[0].count)
    if lines[-1].count(delimiter) < lines[0].count(delimiter):
        lines.pop()  # cut off
    if delimiter == ";" and "." not in "".join(lines[1:]):  # decimal commas
        lines = [line.replace(",", ".") for line in lines]
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    return reader.fieldnames, ((reader.line_num, row) for row in reader)


def _names(header, columns):
    """Our names of columns → theirs."""
    if "train_runtime" in header:  # Hugging Face's train_loss is one number
        columns = {"train_loss": "loss"} | columns
    places, names = {}, {}
    for name in header:
        word = re.sub(r"\W+", "_", name.rpartition(" - ")[2].lower()).removeprefix("train_")
        places.setdefault(word or "index", []).append(name)  # pandas does not name it
    places |= {name: [name] * header.count(name) for name in header}
    for ours, usual in USUAL.items():
        words = [re.escape(columns[ours])] if ours in columns else [ours, *usual.split()]
        fits = (place for word in words for place in places if re.fullmatch(word, place))
        found = places.get(next(fits, None), [])
        if len(found) == 1:
            names[ours] = found[0]
        elif found or ours in columns or ours in ("epoch", "train_loss"):
            line = f"{ours}=COLUMN: {', '.join(filter(None, header)) or 'there is nothing'}"
            raise ValueError(f"name one column {columns.get(ours, ours)}, or say --columns {line}")
    return names


def read_log(path, columns=None):
    """The columns we know, rows of an epoch joined. ValueError: it is no log."""
    at, last, joined = 1, {"epoch": 0.0, "step": 0.0}, {}
    try:
        header, rows = _parsed(path)
        names = _names(header, columns or {})
        for at, row in rows:  # noqa: B007
            if None in row:
                raise ValueError("more cells than columns")
            cells = {ours: re.sub(r"\s*%", "e-2", str(row.get(x))) for ours, x in names.items()}
            numbers = {ours: float(x) for ours, x in cells.items() if x not in ("", "None", "null")}
            if "epoch" not in numbers:  # Lightning's rates
                numbers |= last
            for name, before in last.items():
                now = last[name] = numbers.get(name, before)
                if not before <= now < inf:
                    raise ValueError(f"one run a file: {name} {now:g} comes after {before:g}")
            if not 0 <= np.nan_to_num(numbers.get("angle", 0)) <= pi:
                raise ValueError("angles are radians in [0, π]")
            epoch = numbers["epoch"]
            before = joined.setdefault(epoch, {})
            if "train_loss" in before and "train_loss" in numbers:
                raise ValueError(f"drop a row, or say --columns epoch=STEPS: epoch {epoch:g} again")
            before.update(numbers)
        whole = [numbers for numbers in joined.values() if "train_loss" in numbers]
        if not whole:
            raise ValueError("no row with a loss")
    except Exception as error:  # damage shows anywhere
        why, at = str(getattr(error, "strerror", error))[:200], getattr(error, "lineno", at)
        raise ValueError(f"{path}: line {at}: {why}") from None
    return {ours: np.array([row.get(ours, nan) for row in whole]) for ours in names}


def read_chance(folder):
    """Of config.json, by seed. ValueError: it is damaged."""
    path, chance = folder / "config.json", {}
    try:
        if path.exists():
            chance = json.loads(path.read_bytes()).get("chance", {})
        for known in chance.values():
            sum(known[name][x] / known["points"] for name in FLOORS for x in ("mean", "std"))
    except Exception:
        raise ValueError(f'{path} is damaged: remove it, or its "chance"') from None
    return chance


def read_run(path, chance, columns=None):
    """A log, classified. `chance`: by seed, or under "" one for all."""
    log = read_log(path, columns)
    named = dict(re.findall(rf"(elr|seed)=({NUMBER})", path.name))
    elr = log["elr"][-1] if "elr" in log else float(named.get("elr", nan))
    seed = int(float(named.get("seed", 0)))
    reference = chance.get(str(seed), chance.get(""))
    verdict = classify(log, reference)
    if verdict.moves or not 0 < elr < inf:
        elr = nan
    return Logged(path, float(elr), seed, log, verdict, reference)


def in_words(runs):
    """Lines; of moving ELRs by lab.loop, if there."""
    try:
        from lab.loop import summary
    except ImportError:
        return map(str, runs)
    return summary(runs)


def gather(paths, columns=None, chance=None):
    """Runs, sorted, and problems. `chance`: not config.json's."""
    runs, problems, logs = [], [], []
    for path in paths:
        found = sorted(log for log in path.glob("*") if re.fullmatch(LOG, log.name))
        logs += found if path.is_dir() else [path]
    if not logs:
        problems.append(f"{paths[0]}: no logs here")
    for path in logs:
        try:
            known = {"": chance} if chance else read_chance(path.parent)
            runs.append(read_run(path, known, columns))
        except ValueError as error:
            problems.append(str(error))
    runs.sort(key=lambda run: (isnan(run.elr), run.elr, run.seed))
    return runs, [*dict.fromkeys(problems)]


def by_elr(runs):
    """Runs by ELR, in its order."""
    elrs = sorted({run.elr for run in runs if not isnan(run.elr)})
    return {elr: [run for run in runs if run.elr == elr] for elr in elrs}


def majority(runs):
    """The regime of most runs, or undecided; how many have the commonest."""
    regime, n = Counter(run.verdict.regime for run in runs).most_common(1)[0]
    return regime if 2 * n > len(runs) else "undecided", n


@dataclass
class Boundary:
    """The largest ELR below, the smallest above; nan: not seen."""

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
    """From the largest ELR with all runs below, and none above up to it, to the smallest of which
    the reverse is true. What broke down lies above."""
    ranks, found = {}, []
    for elr, group in by_elr(runs).items():
        verdicts = [run.verdict for run in group]
        ranks[elr] = np.array([2 if v.broken else ORDER.get(v.regime, nan) for v in verdicts])
    for rank, sides in enumerate(pairwise(ORDER)):
        first = min((elr for elr in ranks if (ranks[elr] > rank).any()), default=inf)
        last = max((elr for elr in ranks if (ranks[elr] <= rank).any()), default=0.0)
        low = max((elr for elr in ranks if elr < first and (ranks[elr] <= rank).all()), default=nan)
        high = min((elr for elr in ranks if elr > last and (ranks[elr] > rank).all()), default=nan)
        found.append(Boundary(*sides, low, high))
    return found


ENDS = "train_loss train_error test_error grad_norm angle".split()
MEDIANS = ["skill", "slope", *ENDS]


def rows_of(runs):
    """A row per run with an ELR; ENDS are means over the last tenth."""
    found = []
    for run in runs:
        verdict, elrs = run.verdict, run.log.get("elr", [run.elr])
        regime = "not fixed" if verdict.moves else verdict.regime
        row = {"elr": run.elr, "seed": run.seed, "regime": regime, "skill": verdict.skill}
        row |= {"slope": verdict.slope} | {name: run.final(name) for name in ENDS}
        row |= {"epochs": int(finished(run.log)[-1]), "run": run.name}
        row |= {"elr_min": min(elrs), "elr_max": max(elrs)}
        if not isnan(elrs[-1]):
            found.append(row)
    return found


def table(runs):
    """Medians by ELR, boundaries, others."""
    lines = []
    for elr, group in by_elr(runs).items():
        regime, n = majority(group)
        medians = [np.median([row[name] for row in rows_of(group)]) for name in MEDIANS]
        cells = "".join(f"{median:12.4g}" for median in medians).replace("nan", "  –")
        lines.append(f"{elr_name(elr):>10}  {title(regime):<20}{n:>3}/{len(group)}{cells}")
    if lines:
        heads = "".join(f"{name.replace('_', ' '):>12}" for name in MEDIANS)
        lines = [f"{'ELR':>10}  {'regime':<20}seeds{heads}", *lines, *map(str, boundaries(runs))]
    return "\n".join([*lines, *in_words(run for run in runs if isnan(run.elr))])


def csv_lines(rows):
    """Rows as CSV, numbers to 9 digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([x if isinstance(x, int | str | None) else f"{x:.9g}" for x in row])
    return text.getvalue().encode()


def write_csv(path, rows):
    """Of dicts with equal keys."""
    write_whole(path, csv_lines(rows[:1] + [row.values() for row in rows]))


def write_whole(path, content):
    """Whole, or not."""
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
    """Exit as `main` says; Ctrl-C, | head and a full disk are no tracebacks."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
        if status and status > 128:  # torch takes seconds to end
            os._exit(status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        status = f"error: {error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def main(argv=None):
    style, ours = argparse.RawDescriptionHelpFormatter, ", ".join(USUAL)
    parser = Parser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="logs, or folders")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=f"ours are {ours}")
    text = "of random weights: for C classes mostly above ln C and 1 − 1/C"
    add("--chance", nargs="+", default=[], type=float, metavar=("LOSS", "ERROR"), help=text)
    args = parser.parse_args(argv)
    columns = dict(word.partition("=")[::2] for word in args.columns)
    if not (all(columns.values()) and columns.keys() <= USUAL.keys()):
        parser.error(f"argument --columns: behind PATH, as OURS=THEIRS, of {ours}")
    values = args.chance
    if not all(0 < x < inf for x in values) or any(x > 1 for x in values[1:]) or values[2:]:
        parser.error("argument --chance: it takes LOSS above 0, and ERROR in (0, 1]")
    chance = {name: {"mean": x} for name, x in zip(reversed(FLOORS), values, strict=False)}
    runs, problems = gather(args.paths, columns, chance)
    folder, found = args.paths[0], rows_of(runs)
    text = table(runs) if folder.is_dir() else "\n".join(in_words(runs))
    if text:
        print(text)
    for problem in problems:
        print(f"regimes.py: error: {problem}", file=sys.stderr)
    if found and folder.is_dir() and len(args.paths) == 1:
        write_csv(folder / "regimes.csv", found)
    return 2 if problems else 0


if __name__ == "__main__":
    finish(main)
