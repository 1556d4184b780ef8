"""Every picture, in one style: as wide as a page, legends beside curves, a thing of one colour.

python -m lab.figures logs/digits-convnet                             a sweep again, from its CSVs
python -m lab.figures logs/digits-convnet logs/digits-convnet-whole --out logs/both    two together
"""

import glob
import io
import math
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

import regimes
from lab.loop import classify_loop, is_loop, leg_of
from regimes import by_elr, majority, title

WIDTH = 8.1  # inches
COLOURS = {"convergence": "#0072B2", "equilibrium": "#E69F00", "divergence": "#CC79A7"}
COLOURS["undecided"] = "#999999"  # all of Okabe and Ito
SHADES = {"convergence": 0.06, "equilibrium": 0.34, "divergence": 0.42, "undecided": 0.2}  # in grey
TEST = dict(fmt="o-", color="black", label="test")
TRAIN = dict(fmt="s--", color="#009E73", label="train")
THEN = dict(fmt="D:", color="#56B4E9")  # second runs, from the end of others
LEGS = {"down": "#0072B2", "up": "#D55E00"}
GREY = "#777777"
TONES = ["black", "#D55E00", "#0072B2", "#009E73"]
NAMES = {  # of columns
    "train_loss": "train loss (nats)",
    "train_error": "train error",
    "test_error": "test error",
    "grad_norm": "effective gradient norm γ",
    "angle": "angle φ (radians)",
    "elr": "ELR",
}
# What runs are begun with, by the names of their logs.
VALUES = {"elr": "first ELR", "angle": "angle φ (radians)", "lr": "learning rate"}


def subplots(layout, height):
    """A figure and its axes by name, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    style |= {"lines.linewidth": 1.3, "lines.markersize": 4, "errorbar.capsize": 2}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    plt.rcParams.update(style)
    fig, axes = plt.subplot_mosaic(layout, figsize=(WIDTH, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return fig, axes


def save(fig, path, name=""):
    """Letter the panels, put one legend above them, where it hides nothing, and write."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    titled = [ax for ax in fig.axes if ax.get_title("left")]
    for letter, ax in zip("abcdefghijklmnop", titled, strict=False):
        ax.set_title(f"({letter}) {ax.get_title('left')}")
    found = {}
    for ax in fig.axes:
        tick(ax.xaxis, *sorted(ax.get_xlim()))
        tick(ax.yaxis, *sorted(ax.get_ylim()))
        ax.minorticks_off()  # they take half of the time
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    labels = sorted(found, key=lambda label: isinstance(found[label], Patch))  # lines first
    widths = [len(label) + 7 for label in labels]
    columns = len(labels) if sum(widths) <= 125 else 125 // max(widths)
    look = dict(ncol=max(1, columns), columnspacing=1.2, handlelength=1.8)
    handles = [found[label] for label in labels]
    legend = fig.legend(handles, labels, loc="outside upper center", **look)
    legend.set_title(readable(name), {"size": 10})
    legend.get_title().set_parse_math(False)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=160, format="png")
    plt.close(fig)
    regimes.write_whole(path, picture.getvalue())


def tick(axis, low, high):
    """Enough ticks on a logarithmic axis, where powers of ten are too few."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if axis.get_scale() == "log" and high < 30 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
        axis.set_major_formatter("{x:g}")


def readable(text):
    """A text of at most 100 characters, those that the font has not by their numbers."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    for character in set(text):
        if not (character.isprintable() and font.get_char_index(ord(character))):
            number = character.encode("ascii", "backslashreplace").decode()
            text = text.replace(character, number)
    return text if len(text) <= 100 else f"…{text[-99:]}"


def vertical(ax, column):
    """The axis of a column: for errors one that shows small ones and 0; else logarithmic, where
    something above 0 has been drawn."""
    if column.endswith("error"):
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set_ylim(-0.0005, 1.1)
        ax.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    elif 0 < ax.dataLim.ymax < math.inf:
        ax.set_yscale("log")


def bands(axes, names):
    """The regimes (ELR → name) as bands along logarithmic axes. Returns their edges."""
    elrs = list(names)
    edges = [math.sqrt(a * b) for a, b in pairwise(elrs)]
    margin = edges[0] / elrs[0] if edges else 2.0
    edges = [elrs[0] / margin, *edges, elrs[-1] * margin]
    for ax in axes:
        for (low, high), name in zip(pairwise(edges), names.values(), strict=True):
            look = dict(color=COLOURS[name], alpha=SHADES[name], lw=0, zorder=0)
            ax.axvspan(low, high, label=title(name), **look)
        ax.set(xscale="log", xlim=(edges[0], edges[-1]), xlabel="ELR")
    return edges


def ends(ax, groups, looks):
    """Means over seeds ± their standard errors. groups: value → rows; looks: column → look."""
    for column, look in looks.items():
        values = [[row.get(column, math.nan) for row in rows] for rows in groups.values()]
        means = np.array([np.mean(x) for x in values])
        if np.isfinite(means).any():
            bars = np.nan_to_num([standard_error(x) for x in values])
            ax.errorbar(list(groups), means, bars, **look)


def standard_error(x):
    """Of a mean; nan of a single value."""
    return np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan


def rows_by_elr(rows):
    """ELR → its rows, and ELR → the most frequent regime."""
    groups, names = {}, {}
    for row in sorted(rows, key=lambda row: row["elr"]):
        groups.setdefault(row["elr"], []).append(row)
    for elr, group in groups.items():
        names[elr] = Counter(row["regime"] for row in group).most_common(1)[0][0]
    return groups, names


class Report:
    """regimes.csv and regimes.png of a folder, renewed after each run, as long as drawing takes
    less than half of the time."""

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
            self.pictures = draw(runs, out, self.options.title)
            self.next_drawing = 2 * time.monotonic() - began
            self.stale = False
        return runs


def draw(runs, out, name=""):
    """The pictures of a folder: regimes.png, and one of each loop. Returns their paths."""
    loops, others, paths = {}, [], []
    for run in runs:
        if is_loop(run.log):
            stem = run.path.stem.partition(".seed")[0]
            loops.setdefault(stem, []).append(run)
        else:
            others.append(run)
    for stem, group in loops.items():
        logs, chance = [run.log for run in group], group[0].chance
        paths.append(out / f"{stem}.png")
        of_loop(logs, paths[-1], name, classify_loop(logs, chance), chance)
    if others:
        paths.append(out / "regimes.png")
        of_sweep(others, paths[-1], name)
    return paths


def of_sweep(runs, path, name=""):
    """Of several ELRs, angles or learning rates the ends of the runs against them; all epochs.
    Dotted: second runs (--then)."""
    there = {column for run in runs for column in run.log}
    error = "test_error" if "test_error" in there else "train_error"
    kinds, rows = by_value(runs), []
    for kind, groups in kinds.items():
        if len(groups) > 1:
            columns = ["train_loss", error, "angle" if kind == "ELR" else "elr"]
            rows.append((partial(_against, kind, groups), columns))
    last = "elr" if any(run.verdict.moves for run in runs) else "grad_norm"
    rows.append((partial(_epochs, kinds), ["train_loss", error, last]))
    layout = []
    for i, (_, columns) in enumerate(rows):
        columns[:] = [column for column in columns if column in there]
        layout.append([f"{i} {column}" for column in columns for _ in range(6 // len(columns))])
    fig, axes = subplots(layout, 0.6 + 2.5 * len(rows))
    for i, (draw, columns) in enumerate(rows):
        draw({column: axes[f"{i} {column}"] for column in columns})
    save(fig, path, name)


def by_value(runs):
    """What runs are begun with ("ELR" where it stays) → its values → runs. A log that does not say
    is a kind of its own, of value 0."""
    kinds = {"ELR": by_elr(runs)}
    for run in runs:
        named = re.match(r"(elr|angle|lr)=(\d[\d.e+-]*\d|\d)", run.path.name)
        if math.isnan(run.elr):
            kind, value = (VALUES[named[1]], named[2]) if named else (readable(run.name), 0)
            kinds.setdefault(kind, {}).setdefault(float(value), []).append(run)
    return {kind: dict(sorted(groups.items())) for kind, groups in kinds.items() if groups}


def second_runs(run):
    """The logs of runs that began at the end of this one (--then), by their ELR as text."""
    found = {}
    for path in sorted(run.path.parent.glob(f"{glob.escape(run.path.stem)}.then=*.csv")):
        with suppress(ValueError):  # it has just begun, or has layers
            found[path.stem.partition(".then=")[2]] = regimes.read_log(path)
    return found


def _against(kind, groups, axes):
    """The ends of runs against what they were begun with."""
    rows, then = {}, {}
    for value, group in groups.items():
        rows[value] = [{column: run.final(column) for column in run.log} for run in group]
        for row, run in zip(rows[value], group, strict=True):
            for elr, log in second_runs(run).items():
                row[f"then {elr}"] = log["test_error"][-1]
                what = "angle" if kind.startswith("angle") else "ELR"
                then[f"then {elr}"] = THEN | {"label": f"test, then {what} {elr}"}
    for column, ax in axes.items():
        looks = {column: TRAIN if column == "train_loss" else TEST}
        if column.endswith("error"):
            looks |= {"train_error": TRAIN} | then
        ends(ax, rows, looks)
        vertical(ax, column)
        name = "error, mean ± s.e." if column.endswith("error") else NAMES[column]
        ax.set(xscale="log", xlabel=kind, title=f"final {name}")
    if kind != "ELR":
        return
    bands(axes.values(), {elr: majority(group)[0] for elr, group in groups.items()})
    hatch = dict(facecolor="none", edgecolor=GREY, hatch="/////", lw=0, label="boundary")
    for boundary in regimes.boundaries(sum(groups.values(), [])):
        for ax in axes.values():
            if boundary.seen:
                ax.axvspan(boundary.low, boundary.high, zorder=0, **hatch)


def _epochs(kinds, axes):
    """All epochs: medians over the seeds, from the least to the greatest shaded."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    values = [value for groups in kinds.values() for value in groups if value]
    norm = LogNorm(min(values, default=1), max(values, default=1) * 1.001)
    colour = plt.cm.ScalarMappable(norm, plt.get_cmap("viridis"))
    for i, (kind, groups) in enumerate(kinds.items()):
        for value, group in groups.items():
            look = dict(color=TONES[i % 4], ls="--" if i else "-")
            if len(values) > 1 and value:
                look["color"] = colour.to_rgba(value)
            if len(kinds) > 1:
                look["label"] = kind
            _lines(axes, group, look)
    for column, ax in axes.items():
        vertical(ax, column)
        ax.set(xlabel="epoch", title=NAMES[column])
    if len(values) > 1:
        label = ", ".join(kind for kind, groups in kinds.items() if any(groups))
        ax.figure.colorbar(colour, ax=list(axes.values()), label=label, pad=0.01)


def _lines(axes, group, look):
    """A group of seeds, and dotted their second runs behind them."""
    ways = [(0, [run.log for run in group], look)]
    seconds = [second_runs(run) for run in group]
    for name in seconds[0]:
        logs = [found[name] for found in seconds if name in found]
        ways.append((group[0].log["epoch"][-1], logs, {"color": look["color"], "ls": ":"}))
    for start, logs, look in ways:
        n = min(len(log["epoch"]) for log in logs)
        epoch, band = start + logs[0]["epoch"][:n], dict(color=look["color"], alpha=0.2, lw=0)
        for column, ax in axes.items():
            values = [log.get(column, math.nan * log["epoch"])[:n] for log in logs]
            ax.plot(epoch, np.median(values, 0), **look)
            ax.fill_between(epoch, np.min(values, 0), np.max(values, 0), **band)


def of_loop(loops, path, name="", verdict=None, chance=None):
    """Loss, error and angle against the ELR, on its way down and up again.

    loops    a log for each seed
    verdict  its intervals (low, high) or None: freezes, melts, divergence, coexistence
    chance   as regimes.classify takes it
    """
    if verdict is not None and not isinstance(verdict, dict):
        verdict = vars(verdict)
    found = {mark: ends for mark, ends in (verdict or {}).items() if ends}
    fig, axes = subplots([[*"aab"], [*"aac"]], 4.4)
    for ax, column in zip(axes.values(), ("train_loss", "test_error", "angle"), strict=True):
        if not all(column in log for log in loops):
            ax.set_visible(False)
            continue
        down, up = (_leg(ax, loops, column, leg) for leg in LEGS)
        low, high = found.get("coexistence", (1, 0))
        both = [elr for elr in up if elr in down and low <= elr <= high]
        if both:
            look = dict(color=GREY, alpha=0.3, lw=0, label="metastable")
            ax.fill_between(both, [down[elr] for elr in both], [up[elr] for elr in both], **look)
        vertical(ax, column)
        ax.set_title(NAMES[column])
        column = column.replace("test_", "train_")
        if chance and column in chance:
            level, look = chance[column]["mean"], dict(transform=ax.get_yaxis_transform())
            ax.axhline(level, color="black", ls=":", lw=1)
            ax.text(0.01, level, "chance", va="top", fontsize=8, **look)
    freezes = math.sqrt(math.prod(found.get("freezes", [math.nan])))
    diverges = math.sqrt(math.prod(found.get("divergence", [math.inf])))
    low, high = found.get("reversible", (math.inf, 0))
    names = dict.fromkeys(sorted(down), "undecided")
    for elr in names:
        if elr < freezes:
            names[elr] = "convergence"
        elif elr > diverges:
            names[elr] = "divergence"
        elif elr >= freezes or low <= elr <= high:
            names[elr] = "equilibrium"
    bands(axes.values(), names)
    _marks(axes["a"], found)
    axes["b"].set_xlabel("")
    save(fig, path, name)


def _leg(ax, loops, column, leg):
    """Means over the passes at each ELR: of each seed thin, their median with arrows. Returns that
    by ELR."""
    tone, of_seeds = LEGS[leg], {}
    for log in loops:
        rows = (log["epoch"] > 0) & (leg_of(log) == leg)
        elrs, values = log["elr"][rows], log[column][rows]
        means = {elr: values[elrs == elr].mean() for elr in elrs}  # in the order of time
        for elr, mean in means.items():
            of_seeds.setdefault(elr, []).append(mean)
        if len(loops) > 1:
            ax.plot(means.keys(), means.values(), color=tone, lw=0.7, alpha=0.5)
    middle = {elr: np.median(means) for elr, means in of_seeds.items()}
    ax.plot(middle.keys(), middle.values(), color=tone, lw=1.8, label=f"ELR goes {leg}")
    path = list(middle.items())
    look = dict(arrowstyle="-|>", color=tone, shrinkA=0, shrinkB=0, mutation_scale=13)
    for i in range(len(path) // 8, len(path) - 1, max(1, len(path) // 4)):
        ax.annotate("", path[i + 1], path[i], arrowprops=look)
    return middle


def _marks(ax, found):
    """Intervals as bars in a strip below the curves."""
    (low, high), where = ax.get_ylim(), ax.get_xaxis_transform()
    if ax.get_yscale() == "log":
        ax.set_ylim(low * (low / high) ** 0.3, high)
    tones = dict(freezes=LEGS["down"], melts=LEGS["up"], divergence="black")
    for height, (mark, tone) in zip((0.02, 0.09, 0.16), tones.items(), strict=True):
        if mark in found:
            look = dict(color=tone, transform=where)
            ax.plot(found[mark], [height, height], lw=4, solid_capstyle="butt", **look)
            ax.text(found[mark][1], height, f" {mark}", va="center", **look)


def of_toy(rows, alphas, path):
    """F and skill against the ELR, measured and in theory."""
    fig, axes = subplots([[*"ab"]], 3.5)
    (groups, names), total = rows_by_elr(rows), sum(alphas)
    edges = np.maximum(bands(axes.values(), names), 1 / total)
    fine = np.geomspace(edges[0], edges[-1], 500)
    for ax, column in zip(axes.values(), ("loss", "skill"), strict=True):
        theory = (total - 1 / fine) / 2 if column == "loss" else 1 / (total * fine)
        ax.plot(fine, theory, "-", color=LEGS["up"], label="theory")
        ax.axvline(1 / total, color=LEGS["up"], ls="--", label=f"1/Σα = {1 / total:.4g}")
        ends(ax, groups, {column: dict(fmt="o", color="black", label="measured")})
    axes["a"].axhline(total / 2, color="black", ls=":", label="chance, Σα/2")
    axes["a"].set(yscale="log", ylim=(1e-4 * total, 2 * total), title="F, mean of the last half")
    axes["b"].set(yscale="log", ylim=(1e-5, 2), title="skill 1 − F/(Σα/2)")
    save(fig, path, "toy, α = " + ", ".join(f"{a:g}" for a in alphas))


ENDS = {  # columns of landscape.csv begin so
    "": TEST | {"label": "end of the run"},
    "then_": THEN | {"label": "then"},
    "avg_": TRAIN | {"label": "averaged"},
    "then_avg_": dict(fmt="v-.", color=LEGS["down"], label="then, averaged"),
}


def of_landscape(lines, path, name):
    """Test error, sharpness and barriers against the ELR of the first run."""
    fig, axes = subplots([[*"abc"]], 3.3)
    groups, names = rows_by_elr(lines)
    titles = {"test_error": "test error", "sharpness": "sharpness λ_max"}
    titles["barrier_to_next"] = "barrier to the next ELR (nats)"
    for ax, (column, text) in zip(axes.values(), titles.items(), strict=True):
        ends(ax, groups, {f"{end}{column}": look for end, look in ENDS.items()})
        ax.set_title(text)
    vertical(axes["a"], "test_error")
    axes["b"].plot(list(groups), [2 / elr for elr in groups], ":", color=GREY, label="2/ELR")
    vertical(axes["b"], "sharpness")
    axes["c"].set_yscale("symlog", linthresh=0.01)
    axes["c"].set_ylim(bottom=-0.002)
    bands(axes.values(), names)
    for ax in axes.values():
        ax.set_xlabel("ELR of the first run")
    save(fig, path, name)


def of_barrier(ways, path, name):
    """Loss and error on the ways from one checkpoint to another."""
    fig, axes = subplots([[*"ab"]], 3.2)
    for (way, values), fmt, tone in zip(ways.items(), ("o-", "s--"), LEGS.values(), strict=True):
        t, *both = zip(*values, strict=True)
        for ax, y in zip(axes.values(), both, strict=True):
            ax.plot(t, y, fmt, color=tone, label=way)
            ax.set_xlabel("position between the two")
    axes["a"].set_title(NAMES["train_loss"])
    axes["b"].set_title(NAMES["test_error"])
    save(fig, path, name)


def main(argv=None):
    parser = regimes.Parser(prog="lab.figures", description="Draw regimes.png of logs again.")
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="folders of logs, or logs")
    add("--out", type=Path, metavar="DIR", help="for regimes.png (default: that of the first)")
    args = parser.parse_args(argv)
    first = args.paths[0]
    out = args.out or (first if first.is_dir() else first.parent)
    if not out.is_dir():
        parser.error(f"argument --out: {out} is no folder: make it first")
    runs, problems = regimes.gather(args.paths)
    for problem in problems:
        print(f"lab.figures: error: {problem}", file=sys.stderr)
    if runs:
        pictures = draw(runs, out, ", ".join(str(path) for path in args.paths))
        print(f"written: {', '.join(map(str, pictures))}")
    return 2 if problems else 0


if __name__ == "__main__":
    regimes.finish(main)
