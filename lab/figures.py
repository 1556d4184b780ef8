"""Every picture, in one style: as wide as a page, legends beside curves, a thing of one colour.

python -m lab.figures logs/digits-convnet        a sweep or a loop again, from its CSVs
"""

import glob
import io
import math
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path

import numpy as np

import regimes
from lab.loop import classify_loop, is_loop, legs

WIDTH = 8.1  # inches
COLOURS = {"convergence": "#0072B2", "equilibrium": "#E69F00", "divergence": "#CC79A7"}
COLOURS["undecided"] = "#999999"  # all of Okabe and Ito
SHADES = {"convergence": 0.06, "equilibrium": 0.34, "divergence": 0.42, "undecided": 0.2}  # in grey
TEST = dict(fmt="o-", color="black", label="test")
TRAIN = dict(fmt="s--", color="#009E73", label="train")
THEN = dict(fmt="D:", color="#56B4E9")  # second runs, from the end of others
LEGS = {"down": "#0072B2", "up": "#D55E00"}
GREY = "#777777"
CYCLE = ["black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # C0 to C6
TITLES = {
    "train_loss": "train loss (nats)",
    "train_error": "train error",
    "test_error": "test error",
    "grad_norm": "effective gradient norm γ",
    "angle": "angle φ (radians)",
    "elr": "ELR",
}
BEGUN_WITH = {"elr": "first ELR", "angle": "angle φ (radians)", "lr": "learning rate"}


def subplots(layout, height):
    """A figure and its axes by name; without pyplot, it needs no display."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    style |= {"lines.linewidth": 1.3, "lines.markersize": 4, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.prop_cycle": matplotlib.cycler(color=CYCLE)}
    matplotlib.rcParams.update(style)
    fig = Figure((WIDTH, height), layout="constrained")
    return fig, fig.subplot_mosaic(layout)


def save(fig, path, name=None):
    """Letter the panels, put one legend above them, where it hides nothing, and write. name: the
    heading, by default the folder."""
    from matplotlib.patches import Patch

    titled, found = [ax for ax in fig.axes if ax.get_title("left")], {}
    for letter, ax in zip("abcdefghijklmnopqrstuvwxyz", titled, strict=False):
        ax.set_title(f"({letter}) {ax.get_title('left')}")
    for ax in fig.axes:
        tick(ax.xaxis)
        tick(ax.yaxis)
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    labels = sorted(found, key=lambda label: isinstance(found[label], Patch))  # lines first
    handles = [found[label] for label in labels]
    heading = readable(str(path.parent) if name is None else name)
    look = dict(loc="outside upper center", ncol=3)
    fig.legend(handles, labels, title=heading, title_fontsize=10, **look)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=160, format="png")
    regimes.write_whole(path, picture.getvalue())


def tick(axis):
    """At least two labelled ticks on a logarithmic axis, where powers of ten may be too few."""
    from matplotlib.ticker import FixedLocator, LogFormatterMathtext, MaxNLocator

    if axis.get_scale() == "linear" or isinstance(axis.get_major_locator(), FixedLocator):
        return
    low, high = sorted(axis.get_view_interval())
    zero = [0] if low <= 0 else []
    if zero:
        low = axis.get_transform().linthresh
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.log10(high))
    digits = [1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 6, 8]
    ways = [np.outer(decades, x).ravel() for x in digits]
    for way in (*ways, MaxNLocator(6).tick_values(low, high)):
        ticks = [x for x in way if low <= x <= high]
        if len(ticks) > 2 and ticks[-1] > ticks[0] * (high / low) ** 0.4:  # not all at one end
            break
    axis.set_ticks(zero + ticks[:: math.ceil(len(ticks) / 7)])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(LogFormatterMathtext() if high > 1e4 * low else "{x:g}")


def readable(text):
    """The last 100 characters of a name, those that the font may lack by their numbers."""
    lacking = r"[^\x20-\u0500]"
    text = re.sub(lacking, lambda found: ascii(found[0])[1:-1], text)
    return text.replace("$", r"\$")[-100:]  # no formulas


def logarithmic(ax):
    """The vertical axis, as what has been drawn needs it: with a 0 only where there is one."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines] or [[]])
    positive = drawn[(drawn > 0) & (drawn < math.inf)]
    if len(positive):
        low, high = positive.min(), positive.max()
        margin = max(1.3, (high / low) ** 0.07)  # no point is cut at an edge
        bottom = low / margin
        ax.set_yscale("log")
        if (drawn == 0).any():
            ax.set_yscale("symlog", linthresh=low, linscale=0.5)
            bottom = -low / 10
        ax.set_ylim(bottom, margin * high)


def bands(axes, groups):
    """The regimes of most of the rows at each ELR, as bands along logarithmic axes. Returns their
    edges. groups: ELR → rows with a `regime`."""
    elrs = list(groups)
    edges = [math.sqrt(a * b) for a, b in pairwise(elrs)]
    margin = edges[0] / elrs[0] if edges else 2.0
    edges = [elrs[0] / margin, *edges, elrs[-1] * margin]
    for (low, high), rows in zip(pairwise(edges), groups.values(), strict=True):
        regime, n = Counter(row["regime"] for row in rows).most_common(1)[0]
        if 2 * n <= len(rows):
            regime = "undecided"
        look = dict(color=COLOURS[regime], alpha=SHADES[regime], label=regimes.title(regime))
        for ax in axes:
            ax.axvspan(low, high, lw=0, zorder=0, **look)
    for ax in axes:
        ax.set(xscale="log", xlim=(edges[0], edges[-1]), xlabel="ELR")
    return edges


def means(ax, groups, looks):
    """Means over seeds ± their standard errors. groups: value → rows; looks: column → look."""
    for column, look in looks.items():
        values = [[row.get(column, math.nan) for row in rows] for rows in groups.values()]
        middle = np.array([np.mean(x) for x in values])
        if np.isfinite(middle).any():
            errors = [np.std(x) / math.sqrt(max(len(x) - 1, 1)) for x in values]
            ax.errorbar(list(groups), middle, np.nan_to_num(errors), **look)


def by_elr(rows):
    """ELR → its rows, in order of ELR."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["elr"]):
        groups.setdefault(row["elr"], []).append(row)
    return groups


class Report:
    """regimes.csv and the pictures of a folder, renewed after each run; the pictures as long as
    drawing takes less than a twentieth of the time, which it takes from the runs."""

    def __init__(self, options):
        self.options, self.stale, self.next_drawing = options, True, 0.0
        self.pictures = []

    def renew(self, last=False):
        out, began = self.options.out, time.monotonic()
        runs = regimes.read_folder(out)
        if self.options.rank or not runs:
            return runs
        regimes.write_csv(out / "regimes.csv", regimes.rows(runs))
        self.stale = self.stale or not last
        if self.stale and (last or began > self.next_drawing):
            self.pictures = draw(runs, out)
            self.next_drawing = began + 20 * (time.monotonic() - began)
            self.stale = False
        return runs


def draw(runs, out):
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
        paths.append(out / "regimes.png")
        of_sweep(others, paths[-1])
    return paths


def of_sweep(runs, path):
    """Of each kind of run all epochs; above, of several values, the ends against them."""
    rows, layout = [], []
    for kind, groups in by_value(runs).items():
        there = {column for group in groups.values() for run in group for column in run.log}
        error = "test_error" if "test_error" in there else "train_error"
        fixed = kind == "ELR"
        if len(groups) > 1 and kind:
            rows.append((_ends, kind, groups, ["train_loss", error, "angle" if fixed else "elr"]))
        rows.append((_epochs, kind, groups, ["train_loss", error, "grad_norm" if fixed else "elr"]))
        for *_, columns in rows[len(layout) :]:
            columns[:] = [column for column in columns if column in there]
            width = 6 // len(columns)
            layout.append([f"{len(layout)} {column}" for column in columns for _ in range(width)])
    fig, axes = subplots(layout, 0.6 + 2.5 * len(rows))
    for i, (draw_row, kind, groups, columns) in enumerate(rows):
        draw_row(kind, groups, {column: axes[f"{i} {column}"] for column in columns})
    save(fig, path)


def by_value(runs):
    """What runs were begun with ("ELR" where it stays) → its values → runs; of others' logs "" →
    their names → runs."""
    kinds = {}
    for run in runs:
        named = re.match(r"(elr|angle|lr)=(\d+(\.\d+)?(e[+-]?\d+)?)", run.path.name)
        kind, value = "", readable(run.name).lstrip("_")[-30:]
        if run.elr > 0:
            kind, value = "ELR", run.elr
        elif named and float(named[2]):
            kind, value = BEGUN_WITH[named[1]], float(named[2])
        kinds.setdefault(kind, {}).setdefault(value, []).append(run)
    return {kind: dict(sorted(groups.items())) for kind, groups in kinds.items()}


def second_runs(run):
    """The runs that began at the end of this one (--then), by their ELR as text."""
    found = {}
    for path in sorted(run.path.parent.glob(f"{glob.escape(run.path.stem)}.then=*.csv")):
        with suppress(ValueError):  # it has just begun, or has layers
            found[path.stem.partition(".then=")[2]] = regimes.read_run(path, {})
    return found


def _ends(kind, groups, axes):
    """The ends of runs, and of second runs, against what they were begun with."""
    ends, errors = {}, {"train_error": TRAIN, "test_error": TEST}
    for value, group in groups.items():
        ends[value] = []
        for run in group:
            row = {"regime": run.verdict.regime} | {name: run.final(name) for name in run.log}
            for elr, second in second_runs(run).items():
                row[f"then {elr}"] = second.final("test_error")
                errors[f"then {elr}"] = THEN | {"label": f"test, then at {elr}"}
            ends[value].append(row)
    if kind == "ELR":
        bands(axes.values(), ends)
    for column, ax in axes.items():
        title, looks = TITLES[column], {column: TRAIN}
        if column.endswith("error"):
            title, looks = "error", errors
            if max(map(len, ends.values())) > 1:
                title = "error, mean ± s.e."
        means(ax, ends, looks)
        logarithmic(ax)
        ax.set(xscale="log", xlabel=kind, title=f"final {title}")


def _epochs(kind, groups, axes):
    """All epochs of all runs; dotted, behind them, those of second runs."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    first, *_, last = [*groups, *groups]
    named, scale, xlabel = isinstance(first, str), None, "epoch"
    if first != last and not named:
        scale = ScalarMappable(LogNorm(first / 1.001, last * 1.001), "viridis")
    elif not named:
        xlabel = f"epoch, at {kind} {first:g}"
    for i, (value, group) in enumerate(groups.items()):
        look = dict(color=scale.to_rgba(value) if scale else f"C{i}", lw=1)
        look["alpha"] = len(group) ** -0.4  # of many seeds one sees where most are
        for run, (column, ax) in product(group, axes.items()):
            if column in run.log:
                label = value if named else None
                ax.plot(run.log["epoch"], run.log[column], label=label, **look)
            for second in second_runs(run).values():
                xlabel = "epoch (dotted: second runs, --then)"
                if column in second.log:
                    epoch = run.log["epoch"][-1] + second.log["epoch"]
                    ax.plot(epoch, second.log[column], ":", **look)
    for column, ax in axes.items():
        logarithmic(ax)
        ax.set(xlabel=xlabel, title=TITLES[column])
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    if scale:
        ax.figure.colorbar(scale, ax=list(axes.values()), label=kind, pad=0.01)


def of_loop(runs, path):
    """Loss, error and angle against the ELR, on its way down and up again, of a run per seed."""
    logs, chance = [run.log for run in runs], runs[0].chance or {}
    found = {mark: x for mark, x in vars(classify_loop(logs, chance)).items() if x}
    columns = ["train_loss", "test_error", "angle"]
    first, *others = [column for column in columns if all(column in log for log in logs)]
    fig, axes = subplots([[first, first, other] for other in others] or [[first]], 4.4)
    seeds = f", median of {len(logs)} seeds" if len(logs) > 1 else ""
    for column, ax in axes.items():
        elrs, middle = legs(logs, column)[0], {}
        for i, (leg, tone) in enumerate(LEGS.items()):
            of_seeds = np.array([legs([log], column)[1][i] for log in logs])
            middle[leg] = np.median(of_seeds, 0)
            ax.plot(elrs, of_seeds.T, color=tone, lw=0.7, alpha=0.5)
            look = dict(color=tone, lw=1.8, marker="<>"[i], markevery=(2 * i, 4), ms=6)
            ax.plot(elrs, middle[leg], label=f"ELR goes {leg}{seeds}", clip_on=False, **look)
        logarithmic(ax)
        low, high = found.get("coexistence", (1, 0))
        both = (low <= elrs) & (elrs <= high)
        if both.any():
            look = dict(where=both, color=GREY, alpha=0.3, lw=0, label="metastable")
            ax.fill_between(elrs, middle["down"], middle["up"], **look)
        ax.set_title(TITLES[column])
        level = chance.get(column.replace("test_", "train_"))
        if level:
            ax.axhline(level["mean"], color="black", ls=":", lw=1, label="chance")
    freezes = math.sqrt(math.prod(found.get("freezes", [math.nan])))
    low, high = found.get("reversible", (math.inf, 0))
    names = np.full(len(elrs), "undecided", object)
    names[(low <= elrs) & (elrs <= high) | (elrs >= freezes)] = "equilibrium"
    names[elrs < freezes] = "convergence"
    low, high = found.get("divergence", (math.inf, math.inf))
    names[elrs > low] = "undecided"  # where one way diverges, and the other does not
    names[elrs >= high] = "divergence"
    bands(axes.values(), {elr: [{"regime": x}] for elr, x in zip(elrs, names, strict=True)})
    _mark(axes[first], found)
    save(fig, path)


def _mark(ax, found):
    """Bars below the curves: from where to where it freezes, melts, diverges."""
    (low, high), where = ax.get_ylim(), dict(transform=ax.get_xaxis_transform())
    if ax.get_yscale() == "log":
        ax.set_ylim(low * (low / high) ** 0.3, high)
    marks = {"freezes": LEGS["down"], "melts": LEGS["up"], "divergence": "black"}
    for height, (mark, tone) in zip((0.03, 0.1, 0.17), marks.items(), strict=True):
        if mark in found:
            ax.plot(found[mark], [height, height], color=tone, lw=4, solid_capstyle="butt", **where)
            text = "diverges" if mark == "divergence" else mark
            look = dict(color=tone, ha="right", va="center", **where)
            ax.text(found[mark][0], height, f"{text}  ", **look)


def of_toy(rows, alphas, path):
    """F and skill against the ELR, measured and in theory."""
    fig, axes = subplots([[*"ab"]], 3.5)
    groups, total = by_elr(rows), sum(alphas)
    edges = np.maximum(bands(axes.values(), groups), 1 / total)
    fine = np.geomspace(edges[0], edges[-1], 500)
    below = f"1/Σα = {1 / total:.4g}: below, F falls to 0"
    for ax, column in zip(axes.values(), ("loss", "skill"), strict=True):
        theory = (total - 1 / fine) / 2 if column == "loss" else 1 / (total * fine)
        ax.plot(fine, theory, "-", color=LEGS["up"], label="theory")
        ax.axvline(1 / total, color=LEGS["up"], ls="--", label=below)
        means(ax, groups, {column: dict(fmt="o", color="black", label="measured")})
    axes["a"].axhline(total / 2, color="black", ls=":", label="chance, Σα/2")
    axes["a"].set(yscale="log", ylim=(1e-4 * total, 2 * total), title="F, mean of the last half")
    axes["b"].set(yscale="log", ylim=(0.3 * theory[-1], 2), title="skill 1 − F/(Σα/2)")
    save(fig, path, "toy, α = " + ", ".join(f"{a:g}" for a in alphas))


def of_landscape(rows, path):
    """Test error, sharpness and barriers against the ELR of first runs."""
    looks = {"": TEST | {"label": "end of the run"}, "then_": THEN | {"label": "second run"}}
    looks["avg_"] = dict(fmt="^--", color=LEGS["up"], label="averaged")
    looks["then_avg_"] = dict(fmt="v-.", color=LEGS["down"], label="second run, averaged")
    titles = {"test_error": "test error", "sharpness": "sharpness $λ_{max}$"}
    if np.isfinite([row["barrier_to_next"] for row in rows]).any():
        titles["barrier_to_next"] = "barrier to next ELR (nats)"
    fig, axes = subplots([[*titles]], 3.3)
    groups = by_elr(rows)
    for column, ax in axes.items():
        means(ax, groups, {f"{end}{column}": look for end, look in looks.items()})
        if column == "sharpness":
            edge = [2 / elr for elr in groups]
            ax.plot(list(groups), edge, ":", color=GREY, label="2/ELR: unstable above")
        logarithmic(ax)
        ax.set_title(titles[column])
    bands(axes.values(), groups)
    save(fig, path)


def of_barrier(ways, path, first, last):
    """Loss and error on the ways from one checkpoint to another."""
    fig, axes = subplots([["train_loss", "test_error"]], 3.2)
    for (way, points), fmt, tone in zip(ways.items(), ("o-", "s--"), CYCLE, strict=False):
        t, *both = zip(*points, strict=True)
        for ax, y in zip(axes.values(), both, strict=True):
            ax.plot(t, y, fmt, color=tone, label=way)
    for column, ax in axes.items():
        ax.set(title=TITLES[column], xlabel="position on the way from the first to the second")
    save(fig, path, f"barrier from {first} to {last}")


def main(argv=None):
    parser = regimes.Parser(prog="lab.figures", description="Draw the pictures of logs again.")
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of logs, or a log")
    path = parser.parse_args(argv).path
    folder = path if path.is_dir() else path.parent
    runs, problems = regimes.gather([path])
    for problem in problems:
        print(f"lab.figures: error: {problem}", file=sys.stderr)
    try:
        pictures = draw(runs, folder)
    except OSError as error:
        parser.error(f"{folder} cannot be written: {error.strerror}")
    if pictures:
        print(f"written: {', '.join(map(str, pictures))}")
    return 2 if problems else 0


if __name__ == "__main__":
    regimes.finish(main)
