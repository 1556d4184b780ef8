"""The pictures.

    python -m lab.figures logs/digits-convnet        a sweep or a loop again, from its CSVs

Those of the toy and of the landscape are drawn by their own commands.
"""

import math
import re
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np

import regimes
from lab import style
from lab.loop import classify_loop, is_loop, legs, second_runs

TITLES = {
    "train_loss": "train loss (nats)",
    "train_error": "train error",
    "test_error": "test error",
    "grad_norm": "effective gradient norm γ",
    "angle": "angle φ (radians)",
    "elr": "ELR",
}
OUTSIDE = {"elr": 1e4}  # times the median: the ELR of a run that blew up
BEGUN_WITH = {"elr": "first ELR", "angle": "first angle φ (radians)", "lr": "learning rate"}


class Report:
    """regimes.csv and the pictures of a folder, renewed after each run; the pictures as long as
    drawing takes less than a twentieth of the time, which it takes from the runs."""

    def __init__(self, config):
        self.config, self.stale, self.next_drawing = config, True, 0.0
        self.pictures = []

    def renew(self, last=False):
        out, began = self.config.out, time.monotonic()
        runs, problems = regimes.gather([out])
        if self.config.rank or not runs:
            return runs
        for problem in problems if last else ():
            print(f"train.py: left out: {problem}", file=sys.stderr)
        regimes.write_csv(out / "regimes.csv", regimes.rows_of(runs))
        self.stale = self.stale or not last
        if self.stale and (last or began > self.next_drawing):
            self.pictures = draw(runs, out)
            self.next_drawing = began + 20 * (time.monotonic() - began)
            self.stale = False
        return runs


def draw(runs, out, name="regimes.png"):
    """The pictures of a folder: regimes.png, and one of each loop. Returns their paths."""
    loops, others, paths = {}, [], []
    for run in runs:
        if is_loop(run.log):
            loops.setdefault(run.path.stem.partition(".seed")[0], []).append(run)
        else:
            others.append(run)
    for stem, group in loops.items():
        paths.append(out / f"{stem}.png")
        of_loop(group, paths[-1])
    if others:
        paths.append(out / name)
        of_sweep(others, paths[-1])
    return paths


def of_sweep(runs, path):
    """Of each kind of run all epochs; above, of several values, the ends against them."""
    panels, layout = [], []
    for kind, groups in by_value(runs).items():
        there = {column for group in groups.values() for run in group for column in run.log}
        error = "test_error" if "test_error" in there else "train_error"
        wanted = [(_epochs, "grad_norm" if kind == "ELR" else "elr")]
        if len(groups) > 1 and kind:
            wanted.insert(0, (_ends, "angle" if kind == "ELR" else "elr"))
        for draw_panels, third in wanted:
            columns = [column for column in ("train_loss", error, third) if column in there]
            width = 6 // len(columns)
            layout.append([f"{len(panels)} {column}" for column in columns for _ in range(width)])
            panels.append((draw_panels, kind, groups, columns))
    fig, axes = style.subplots(layout, 0.6 + 2.5 * len(panels))
    for i, (draw_panels, kind, groups, columns) in enumerate(panels):
        of_columns = {column: axes[f"{i} {column}"] for column in columns}
        first, *others = of_columns.values()
        for ax in others:  # of a dead run one may have less to show
            ax.sharex(first)
        draw_panels(kind, groups, of_columns)
    style.save(fig, path)


def by_value(runs):
    """What runs were begun with ("ELR" where it stays) → its values → runs; of others' logs "" →
    their names → runs."""
    kinds = {}
    for run in runs:
        named = re.match(rf"(elr|angle|lr)=({regimes.NUMBER})", run.path.name)
        kind, value = "", style.readable(run.name).lstrip("_")[-30:]
        if run.elr > 0:
            kind, value = "ELR", run.elr
        elif named and float(named[2]):
            kind, value = BEGUN_WITH[named[1]], float(named[2])
        kinds.setdefault(kind, {}).setdefault(value, []).append(run)
    return {kind: dict(sorted(groups.items())) for kind, groups in kinds.items()}


def _ends(kind, groups, axes):
    """The ends of runs, and of second runs, against what they were begun with."""
    ends, errors = {}, {"train_error": style.TRAIN, "test_error": style.TEST}
    for value, group in groups.items():
        ends[value] = []
        for run in group:
            row = {"regime": run.verdict.regime} | {name: run.final(name) for name in run.log}
            for elr, second in second_runs(run).items():
                row[f"then {elr}"] = second.final("test_error")
                errors[f"then {elr}"] = style.THEN | {"label": f"test, then at {elr}"}
            ends[value].append(row)
    if kind == "ELR":
        style.bands(axes.values(), ends)
    for column, ax in axes.items():
        title, looks = TITLES[column], {column: style.TRAIN}
        if column.endswith("error"):
            title, looks = "error", errors
        style.means(ax, ends, looks)
        style.logarithmic(ax, OUTSIDE.get(column, math.inf))
        ax.set(xscale="log", xlabel=kind, title=f"final {title}")


def _epochs(kind, groups, axes):
    """All epochs of all runs, of several seeds thin behind their median; dotted those of second
    runs."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    first, *_, last = [*groups, *groups]
    named, scale, xlabel, looks = isinstance(first, str), None, "epoch", set()
    if first != last and not named:
        scale = ScalarMappable(LogNorm(first / 1.001, last * 1.001), "viridis")
    elif not named:
        name, _, unit = kind.strip(")").partition(" (")
        xlabel = f"epoch, {name} {first:g} {unit}".rstrip()
    for i, (value, group) in enumerate(groups.items()):
        look = dict(color=scale.to_rgba(value) if scale else f"C{i}", lw=1)
        if len(group) > 1:
            for column, ax in axes.items():
                logs = [run.log for run in group if column in run.log]
                if logs:
                    ax.plot(*_median(logs, column), **look)
            look |= dict(lw=0.5, alpha=0.5 * len(group) ** -0.4)
            looks.add("bold: median of seeds")
        for run in group:
            label, end = value if named else None, run.log["epoch"][-1]
            lines = [(run.log, 0, dict(label=label))]
            for second in second_runs(run).values():
                lines.append((second.log, end, dict(ls=":")))
                looks.add("dotted: --then")
            for (log, start, own_look), (column, ax) in product(lines, axes.items()):
                if column in log:
                    ax.plot(start + log["epoch"], log[column], **look, **own_look)
    if looks:
        xlabel += "".join(f"\n({look})" for look in sorted(looks))
    for column, ax in axes.items():
        style.logarithmic(ax, OUTSIDE.get(column, math.inf))
        ax.set(xlabel=xlabel, title=TITLES[column])
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    if scale:
        ax.figure.colorbar(scale, ax=list(axes.values()), label=kind, pad=0.01)


def _median(logs, column):
    """Epochs, and the median over the logs, as long as most of them go on."""
    epochs = np.unique(np.concatenate([log["epoch"] for log in logs]))
    found = [np.interp(epochs, log["epoch"], log[column], right=math.nan) for log in logs]
    there = 2 * np.isfinite(found).sum(0) > len(logs)
    return epochs[there], np.nanmedian(np.array(found)[:, there], 0)


def of_loop(runs, path):
    """Loss, error and angle against the ELR, on its way down and up again, of a run per seed."""
    logs, chance = [run.log for run in runs], runs[0].chance or {}
    found = {mark: x for mark, x in vars(classify_loop(logs, chance)).items() if x}
    columns = ["train_loss", "test_error", "angle"]
    first, *others = [column for column in columns if all(column in log for log in logs)]
    fig, axes = style.subplots([[first, first, other] for other in others] or [[first]], 4.4)
    heading = str(path.parent)
    if len(logs) > 1:
        heading += f" (bold: median of {len(logs)} seeds)"
    for column, ax in axes.items():
        elrs, middle = legs(logs, column)[0], {}
        for i, (leg, tone) in enumerate(style.LEGS.items()):
            of_seeds = np.array([legs([log], column)[1][i] for log in logs])
            middle[leg] = np.median(of_seeds, 0)
            ax.plot(elrs, of_seeds.T, color=tone, lw=0.7, alpha=0.5)
            look = dict(color=tone, lw=1.8, marker="<>"[i], markevery=(2 * i, 4), ms=6)
            ax.plot(elrs, middle[leg], label=f"ELR goes {leg}", clip_on=False, **look)
        style.logarithmic(ax)
        low, high = found.get("metastable", (1, 0))
        both = (low <= elrs) & (elrs <= high)
        if both.any():
            look = dict(color=style.LEGS["up"], alpha=0.25, label="metastable")
            if both.sum() > 1:
                ax.fill_between(elrs, middle["down"], middle["up"], where=both, lw=0, **look)
            else:
                ax.vlines(elrs[both], middle["up"][both], middle["down"][both], lw=8, **look)
        ax.set_title(TITLES[column])
        level = chance.get(column.replace("test_", "train_"), {}).get("mean", math.inf)
        if level <= ax.get_ylim()[1]:  # else there is no room for it
            ax.axhline(level, color="black", ls=":", lw=1, label="chance")
    freezes = math.sqrt(math.prod(found.get("freezes", [math.nan])))
    low, high = found.get("reversible", (math.inf, 0))
    names = np.full(len(elrs), "undecided", object)
    names[(low <= elrs) & (elrs <= high) | (elrs >= freezes)] = "equilibrium"
    names[elrs < freezes] = "convergence"
    low, high = found.get("divergence", (math.inf, math.inf))
    names[elrs > low] = "undecided"  # where one way diverges, and the other does not
    names[elrs >= high] = "divergence"
    style.bands(axes.values(), {elr: [{"regime": x}] for elr, x in zip(elrs, names, strict=True)})
    _mark(axes[first], found)
    style.save(fig, path, heading)


def _mark(ax, found):
    """Bars below the curves: from where to where it freezes, melts, diverges."""
    (low, high), where = ax.get_ylim(), dict(transform=ax.get_xaxis_transform())
    if ax.get_yscale() == "log":
        ax.set_ylim(low * (low / high) ** 0.3, high)
    marks = {"freezes": style.LEGS["down"], "melts": style.LEGS["up"], "divergence": "black"}
    for height, (mark, tone) in zip((0.03, 0.1, 0.17), marks.items(), strict=True):
        if mark in found:
            ax.plot(found[mark], [height, height], color=tone, lw=4, solid_capstyle="butt", **where)
            text = "diverges" if mark == "divergence" else mark
            left, right = ax.get_xlim()
            beside = found[mark][0] > left * (right / left) ** 0.2  # else there is no room
            x, side = (found[mark][0], "right") if beside else (found[mark][1], "left")
            ax.text(x, height, f"  {text}  ", color=tone, ha=side, va="center", **where)


def of_toy(rows, alphas, path):
    """F and skill against the ELR, measured and in theory."""
    fig, axes = style.subplots([[*"ab"]], 3.5)
    groups, total = style.by_elr(rows), sum(alphas)
    edges = np.maximum(style.bands(axes.values(), groups), 1 / total)
    fine = np.geomspace(edges[0], edges[-1], 500)
    below = f"1/Σα = {1 / total:.4g}: below, F falls to 0"
    for ax, column in zip(axes.values(), ("loss", "skill"), strict=True):
        theory = (total - 1 / fine) / 2 if column == "loss" else 1 / (total * fine)
        ax.plot(fine, theory, "-", color=style.LEGS["up"], label="theory")
        ax.axvline(1 / total, color=style.LEGS["up"], ls="--", label=below)
        style.means(ax, groups, {column: dict(fmt="o", color="black", label="measured")})
    axes["a"].axhline(total / 2, color="black", ls=":", label="chance, Σα/2")
    axes["a"].set(yscale="log", ylim=(1e-4 * total, 2 * total), title="F, mean of the last half")
    axes["b"].set(yscale="log", ylim=(0.3 * theory[-1], 2), title="skill 1 − F/(Σα/2)")
    style.save(fig, path, "toy, α = " + ", ".join(f"{a:g}" for a in alphas))


def of_landscape(rows, path):
    """Test error, sharpness and barriers against the ELR of first runs."""
    looks = {"": style.TEST | {"label": "end of the run"}}
    looks["then_"] = style.THEN | {"label": "second run"}
    looks["avg_"] = dict(fmt="^--", color=style.LEGS["up"], label="averaged")
    looks["then_avg_"] = dict(fmt="v-.", color=style.LEGS["down"], label="second run, averaged")
    titles = {"test_error": "test error", "sharpness": "sharpness $λ_{max}$"}
    if np.isfinite([row["barrier_to_next"] for row in rows]).any():
        titles["barrier_to_next"] = "barrier to next ELR (nats)"
    fig, axes = style.subplots([[*titles]], 3.3)
    groups = style.by_elr(rows)
    for column, ax in axes.items():
        style.means(ax, groups, {f"{end}{column}": look for end, look in looks.items()})
        if column == "sharpness":
            edge = [2 / elr for elr in groups]
            ax.plot(list(groups), edge, ":", color=style.GREY, label="2/ELR: unstable above")
        style.logarithmic(ax)
        ax.set_title(titles[column])
    style.bands(axes.values(), groups)
    style.save(fig, path)


def of_barrier(ways, path, first, last):
    """Loss and error on the ways from one checkpoint to another."""
    fig, axes = style.subplots([["train_loss", "test_error"]], 3.2)
    for (way, points), fmt, tone in zip(ways.items(), ("o-", "s--"), style.CYCLE, strict=False):
        t, *both = zip(*points, strict=True)
        for ax, y in zip(axes.values(), both, strict=True):
            ax.plot(t, y, fmt, color=tone, label=way)
    for column, ax in axes.items():
        ax.set(title=TITLES[column], xlabel="position on the way from the first to the second")
    style.save(fig, path, f"barrier from {first} to {last}")


def main(argv=None):
    parser = regimes.Parser(prog="lab.figures", description="Draw the pictures of logs again.")
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of logs, or a log")
    path = parser.parse_args(argv).path
    folder, name = path, "regimes.png"
    if not path.is_dir():  # beside the log, not over the picture of its folder
        folder, name = path.parent, f"{path.stem}.regimes.png"
    runs, problems = regimes.gather([path])
    for problem in problems:
        print(f"lab.figures: error: {problem}", file=sys.stderr)
    pictures = draw(runs, folder, name)
    if pictures:
        print(f"written: {', '.join(map(str, pictures))}")
    return 2 if problems else 0


if __name__ == "__main__":
    regimes.finish(main)
