"""A run whose ELR falls along a grid and rises again: where does it freeze, melt and diverge? From
the log alone; from those of several seeds more precisely.

On the way down a network freezes where log loss falls most steeply against log ELR, to where the
weights hardly turn any more. On the way up it melts where the loss leaves the level that it had
when frozen. Where the two ways agree the state does not depend on the past. docs/findings.md has
the measurements behind the thresholds.
"""

import glob
import math
import re
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from regimes import FLOORS, MIN_TAIL, NEGLIGIBLE, NUMBER, TURN, Z99, read_run

SHARP = 1.5  # slope of log loss against log ELR where a network freezes; a level has 1 at most
LEAVES = 3.0  # factor by which the loss rises, at least, where it melts
LEARNED = 0.3  # skill of a task that is learned
SAME = 0.1  # log losses that differ by less agree
OTHER = 0.2  # those that differ by more do not, however noisy
NEAREST = 7  # third differences, of which a step in the loss spoils three
FEWEST = 8  # ELRs
SAYS = {
    "divergence": "diverges from {} to {} on",
    "freezes": "freezes on the way down, at {} to {}",
    "melts": "melts on the way up, at {} to {}",
    "reversible": "reversible from {} to {}: up and down have the same loss",
    "metastable": "metastable from {} to {}: at this speed frozen on the way up, not down",
}
LOWER, HIGHER = "begin at a lower one, --loop LO HI N", "begin at a larger one, --loop LO HI N"
FROZEN = "frozen on the way up to the end"


@dataclass
class Loop:
    """Intervals (low, high) of the ELR; None: not seen. metastable: where the way up is still
    frozen, and the way down surely is not. passes: at each ELR."""

    divergence: tuple | None = None
    freezes: tuple | None = None
    melts: tuple | None = None
    reversible: tuple | None = None
    metastable: tuple | None = None
    passes: int = 1
    unmelted: str = ""  # in words, which seeds do not melt
    problem: str = ""

    def __str__(self):
        lines = []
        for name, sentence in SAYS.items():
            if getattr(self, name):
                low, high = (f"{elr:.3g}" for elr in getattr(self, name))
                said = sentence.format(low, high)
                lines.append(said.replace(f"from {low} to {low}:", f"at {low}:"))
        rest = "no freezing shown: where weights come to rest, loss falls gently, or noise hides it"
        if self.freezes:
            rest = "no metastable state at this speed"
        if self.metastable:
            rest = lines.pop()
        rest += f"; --epochs {4 * self.passes} goes through it more slowly"
        return "\n    ".join(filter(None, [*lines, self.unmelted, self.problem or rest]))


def is_loop(log):
    """Whether the ELR of a log falls to its least and rises to where it began."""
    elr = log.get("elr", np.empty(0))[1:]
    if len(elr) < 2 * FEWEST - 1 or not np.isfinite(elr).all():
        return False
    coldest = elr.argmin()
    falls, rises = (np.diff(elr[:coldest]) <= 0).all(), (np.diff(elr[coldest:]) >= 0).all()
    return bool(0 < coldest < len(elr) - 1 and falls and rises and elr[coldest] < elr.max())


def legs(logs, column):
    """ELRs in rising order [n]; on the ways down and up the mean of the later half of the rows at
    each, over seeds [2, n]. The cold end belongs to both."""
    elrs = np.unique(logs[0]["elr"])
    means = np.full((len(logs), 2, len(elrs)), math.nan)
    for of_seed, log in zip(means, logs, strict=True):
        elr, rows = log["elr"], np.arange(len(log["elr"]))
        coldest = rows[elr == elr.min()][-1]
        ways = (log["epoch"] > 0) & (rows <= coldest), rows > coldest
        for way, on_way in enumerate(ways):
            for i, value in enumerate(elrs):
                found = log[column][on_way & (elr == value)]
                if len(found):
                    of_seed[way, i] = found[len(found) // 2 :].mean()
    means[:, 1, 0] = means[:, 0, 0]
    return elrs, means.mean(0)


def noise(y):
    """Standard error of each point of a leg [n]: of third differences, which see no smooth curve,
    the median over the nearest, or over all if that is larger."""
    rough = np.abs(np.diff(y, 3)) / (0.6745 * math.sqrt(20))
    middles = np.arange(len(rough)) + 1.5
    nearest = [np.argsort(np.abs(middles - i), kind="stable")[:NEAREST] for i in range(len(y))]
    return np.maximum([np.median(rough[near]) for near in nearest], np.median(rough))


def middle(interval):
    return math.sqrt(math.prod(interval))


def classify_loop(logs, chance=None):
    """What the logs of a loop, one per seed, show. logs and chance: as in regimes.classify. Of
    several seeds the losses are averaged; each melts where it does, and the interval spans them."""
    found = of_mean(logs, chance)
    if len(logs) > 1 and found.freezes:
        each = [of_mean([log], chance) for log in logs]
        for name in ("melts", "metastable"):
            ends = [end for loop in each for end in getattr(loop, name) or ()]
            setattr(found, name, (min(ends), max(ends)) if ends else None)
        if found.metastable:
            low, high = found.metastable
            elrs = np.unique(logs[0]["elr"])
            low = max(low, elrs[elrs >= middle(found.freezes)][0])
            found.metastable = (low, high) if low <= high else None
        unmelted, found.unmelted = sum(bool(loop.unmelted) for loop in each), ""
        if found.reversible:  # where none is frozen any more
            low, high = found.reversible
            low = max([low] + [loop.melts[1] for loop in each if loop.melts])
            found.reversible = (low, high) if low < high and not unmelted else None
        if unmelted:
            found.unmelted = f"no melting in {unmelted} of {len(each)} seeds: {FROZEN}"
    return found


def of_mean(logs, chance):
    """The same, of the mean over the logs."""
    problem = broken(logs)
    if problem:
        return Loop(problem=f"{problem}: {LOWER}")
    elrs, loss = legs(logs, "train_loss")
    if np.isnan(loss).any() or len(elrs) < FEWEST:
        return Loop(problem=f"it takes a whole loop over {FEWEST} ELRs")
    top = chance["train_loss"]["mean"] if chance else loss.max()
    y = np.log(np.maximum(loss, 1e-6 * top))
    error = np.array([noise(leg) for leg in y])
    found = Loop(passes=int((logs[0]["elr"][1:] == elrs[-1]).sum() // 2) or 1)

    # From which ELR on neither way can be told from chance
    better, skill = beside_chance(logs, chance, loss, top)
    top_better = len(elrs) - 1
    if better.any(1).all() and not better[:, -1].any():
        ends = [np.flatnonzero(way)[-1] for way in better]
        top_better = min(ends)
        found.divergence = elrs[top_better], elrs[max(ends) + 1]

    # Down to which ELR the ways agree
    apart = np.abs(y[1] - y[0]) > np.minimum(SAME + Z99 * np.hypot(*error), OTHER)
    lowest = np.flatnonzero(np.append(True, apart[: top_better + 1]))[-1]
    if lowest < top_better:
        found.reversible = elrs[lowest], elrs[top_better]

    if skill.max() < LEARNED:
        found.problem = f"not learned: try more passes at each ELR, --epochs {4 * found.passes}"
        return found
    turn = turns(logs, found.passes)
    if turn[-2:].min() < TURN:  # that fall may be the first learning
        found.problem = f"no freezing shown: it hardly moves from the first ELRs on, {HIGHER}"
        return found
    fall = steepest_fall(elrs, y[0], error[0], turn)
    if fall:
        found.freezes = elrs[fall[0]], elrs[fall[1]]
        find_melting(found, elrs, y, error, NEGLIGIBLE * top, fall[0])
    return found


def broken(logs):
    """In words, where the loss is not finite, or the gradient 0 for good."""
    for log in logs:
        bad = ~np.isfinite(log["train_loss"])
        if bad.any():
            return f"at ELR {log['elr'][bad][0]:.3g} the loss is not finite"
        gradient = log.get("grad_norm", np.ones(1))
        alive = len(np.trim_zeros(gradient, "b"))
        if alive <= len(gradient) - MIN_TAIL and log["train_loss"][-1] > 0:
            return f"dead: the gradient is 0 from ELR {log['elr'][alive]:.3g} on, for good"
    return ""


def beside_chance(logs, chance, loss, top):
    """Where the ways [2, n] are better than chance, and their skill, of the error if there is one.
    top: the loss by chance."""
    skill, better = 1 - loss / top, np.zeros(loss.shape, bool)
    for name, floor in FLOORS.items():
        if chance and name in chance and name in logs[0]:
            mean = chance[name]["mean"]
            if name == "train_error":  # to guess the most frequent class is no skill
                mean = min(mean, chance.get("constant", {}).get(name, 1.0))
            of_column = 1 - legs(logs, name)[1] / mean
            better |= of_column > floor
            skill = of_column if name == "train_error" else skill
    return better, skill


def turns(logs, passes):
    """The angle of a random walk of the steps at each ELR of the way down [n]; infinite where no
    angle is logged."""
    if not all({"angle", "step"} <= log.keys() for log in logs):
        return np.full(len(np.unique(logs[0]["elr"])), math.inf)
    steps = passes * np.diff(logs[0]["step"]).mean()
    return legs(logs, "angle")[1][0] * math.sqrt(steps)


def steepest_fall(elrs, y, error, turn):
    """Where the way down freezes, as places in elrs (first, last): the steepest fall of log loss y
    to where the weights come to rest, and what noise may hide beside it. None: it surely is nowhere
    steep. Falls among larger turns lead from divergence to equilibrium."""
    width = np.diff(np.log(elrs))
    slope = np.diff(y) / width
    slope[(turn[:-1] > TURN) & (turn[:-1] < math.inf)] = -math.inf
    margin = np.hypot(error[1:], error[:-1]) / width
    steepest = slope.argmax()
    if slope[steepest] - Z99 * margin[steepest] < SHARP:
        return None
    as_steep = slope + 1.645 * np.hypot(margin, margin[steepest]) >= slope[steepest]
    gentler = np.flatnonzero(~as_steep)
    first = max(gentler[gentler < steepest], default=-1) + 1
    return first, min(gentler[gentler > steepest], default=len(slope))


def find_melting(found, elrs, y, error, negligible, freezes):
    """Where the way up leaves its frozen level for good, and where it is metastable till then.
    y: log losses of the ways [2, n]; freezes: the first place of the fall."""
    frozen = np.median(y[1, : max(freezes + 1, 3)])
    left = y[1] > frozen + np.maximum(math.log(LEAVES), 2 * error[1])
    left &= y[1] > math.log(negligible)
    gone, stays = np.flatnonzero(left), np.flatnonzero(~left)
    last = elrs[-1]
    if len(gone):
        for_good = stays[-1] < len(elrs) - 1
        if gone[0] <= freezes or not for_good:
            return
        found.melts = elrs[gone[0] - 1], elrs[stays[-1] + 1]
        last = found.melts[0]
    both = (y[0] - y[1] > math.log(LEAVES) + Z99 * np.hypot(*error)) & ~left
    both &= (elrs >= middle(found.freezes)) & (elrs <= last)
    if both.any():
        found.metastable = elrs[both][0], elrs[both][-1]
        if not found.melts:
            found.unmelted = f"no melting: {FROZEN}"


def second_runs(run):
    """The runs that began at the end of this one (--then), by their ELR as text."""
    found = {}
    for path in sorted(run.path.parent.glob(f"{glob.escape(run.path.stem)}.then=*.csv")):
        with suppress(ValueError):  # it has just begun, or has layers
            found[path.stem.partition(".then=")[2]] = read_run(path, {})
    return found


def _spread(values):
    """The standard error of several seeds, in words."""
    n = len(values)
    return f" ± {np.std(values) / math.sqrt(n - 1):.4f} ({n} seeds)" if n > 1 else ""


def summary(runs):
    """Lines on runs. Of those whose ELR moves, by what was set: what a loop shows, or test error,
    loss and range of the ELR over the seeds; that of second runs; and the best."""
    lines, errors, groups = [], {}, {}
    for run in sorted(
        runs, key=lambda run: [*map(float, re.findall(NUMBER, run.name))] or [math.inf]
    ):
        groups.setdefault(run.name.split(" seed")[0], []).append(run)
    for name, group in groups.items():
        logs, seeds = [run.log for run in group], f"{len(group)} seeds"
        if group[0].elr > 0:
            lines += map(str, group)
        elif all(map(is_loop, logs)):
            whose = f"{name}, {seeds}" if len(group) > 1 else name
            lines.append(f"{whose}: {classify_loop(logs, group[0].chance)}")
        elif all({"elr", "test_error"} <= log.keys() for log in logs):
            loss = np.mean([run.final("train_loss") for run in group])
            elrs = np.concatenate([log["elr"] for log in logs])
            found = {name: [run.final("test_error") for run in group]}
            for run in group:
                for elr, second in second_runs(run).items():
                    of_seeds = found.setdefault(f"{name}, then {elr}", [])
                    of_seeds.append(second.final("test_error"))
            for begun, of_seeds in found.items():
                broken = np.sum(~np.isfinite(of_seeds))
                if broken:
                    lines.append(f"{begun}: {broken} of {len(of_seeds)} broke down: nan")
                    continue
                errors[begun] = np.mean(of_seeds)
                lines.append(f"{begun}: test error {errors[begun]:.4f}{_spread(of_seeds)}")
                if begun == name:
                    elr_range = f"ELR {elrs.min():.3g} to {elrs.max():.3g}"
                    lines[-1] += f", train loss {loss:.3g}, {elr_range}"
        else:
            lines += map(str, group)
    if len(errors) > 1:
        lines.append(f"best: {min(errors, key=errors.get)}")
    return lines
