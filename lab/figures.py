"""Every picture, in one style.

python -m lab.figures logs/digits-convnet                             a sweep again, from its CSVs
python -m lab.figures logs/digits-convnet logs/digits-convnet-whole --out logs/both    two together
"""

import io
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

import regimes
from regimes import by_elr, majority, title

COLOURS = {"convergence": "#0072B2", "equilibrium": "#E69F00", "divergence": "#CC79A7"}
COLOURS["undecided"] = "#999999"  # all of Okabe and Ito
SHADES = {"convergence": 0.08, "equilibrium": 0.4, "divergence": 0.5, "undecided": 0.25}  # in grey


def subplots(layout, size, apart=0.3):
    """A figure and its axes by name, without a display. apart: between columns, in widths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "lines.linewidth": 1.3})
    fig, axes = plt.subplot_mosaic(layout, figsize=size)
    width, height = size
    edges = dict(left=0.65 / width, right=1 - 0.65 / width, bottom=0.55 / height)
    fig.subplots_adjust(**edges, top=1 - 0.9 / height, wspace=apart, hspace=0.45)
    return fig, axes


def save(fig, path):
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    for ax in fig.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            if isinstance(axis.get_major_locator(), LogLocator) and high < 20 * low:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # powers of ten are too few
                axis.set_major_formatter("{x:g}")
        ax.minorticks_off()  # they take half of the time
    picture = io.BytesIO()
    fig.savefig(picture, dpi=110, format="png")
    plt.close(fig)
    regimes.write_whole(path, picture.getvalue())


def errors(ax):
    """A vertical axis for errors, which shows small ones and 0."""
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(0, 1.05)
    ax.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])


def bands(ax, elrs, names):
    """The regimes along a logarithmic axis of ELRs, as bands. Returns their edges."""
    edges = [math.sqrt(a * b) for a, b in pairwise(elrs)]
    margin = edges[0] / elrs[0] if edges else 2.0
    edges = [elrs[0] / margin, *edges, elrs[-1] * margin]
    for i, name in enumerate(names):
        look = dict(color=COLOURS[name], alpha=SHADES[name], lw=0, zorder=0)
        ax.axvspan(edges[i], edges[i + 1], **look)
    for name in dict.fromkeys(names):
        if name == "undecided":  # its band is narrow
            continue
        inside = [i for i, other in enumerate(names) if other == name]
        middle = math.sqrt(edges[inside[0]] * edges[inside[-1] + 1])
        label = title(name).replace(" ", "\n")
        where = ax.get_xaxis_transform()
        ax.text(middle, 1.01, label, transform=where, ha="center", va="bottom", fontsize=9)
    ax.set(xscale="log", xlim=(edges[0], edges[-1]))
    return edges


def spread(ax, x, values, style, **look):
    """Medians, with the least and the greatest as error bars."""
    middle = np.array([np.median(v) for v in values])
    if not np.isfinite(middle).any():
        return None
    ends = [middle - [np.min(v) for v in values], [np.max(v) for v in values] - middle]
    caps = 2 if any(len(v) > 1 for v in values) else 0
    return ax.errorbar(x, middle, yerr=np.nan_to_num(ends), fmt=style, ms=4, capsize=caps, **look)


def most_frequent(rows):
    names = [row["regime"] for row in rows]
    return max(dict.fromkeys(names), key=names.count)


class Report:
    """regimes.csv and regimes.png of a folder, renewed after each run, as long as drawing takes
    less than half of the time."""

    def __init__(self, options):
        self.options, self.stale, self.next_drawing = options, True, 0.0

    def renew(self, last=False):
        out, began = self.options.out, time.monotonic()
        runs = regimes.read_folder(out)
        if self.options.rank or not runs:
            return runs
        regimes.write_csv(out / "regimes.csv", regimes.rows(runs))
        self.stale = self.stale or not last
        if self.stale and (last or began > self.next_drawing):
            of_sweep(runs, out / "regimes.png", self.options.title)
            self.next_drawing = 2 * time.monotonic() - began
            self.stale = False
        return runs


def of_sweep(runs, path, name=""):
    """Loss, error, γ per epoch; the phase diagram; along the ELR regimes and angle. Dashed: runs
    whose ELR moved."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    groups, moving = by_elr(runs), {}
    for run in runs:
        if run.verdict.moves:
            moving.setdefault(run.name.split(" seed")[0], []).append(run)
    if not groups and not moving:
        return
    fig, axes = subplots([[*"aabbccdd"], [*"eeeeefff"]], (12.5, 7), apart=1.6)
    low, high = min(groups, default=1.0), max(groups, default=1.0)
    if high < 1.01 * low:
        low, high = low / 2, high * 2
    colour = plt.cm.ScalarMappable(LogNorm(low, high), plt.get_cmap("viridis"))
    lines = [(colour.to_rgba(elr), "-", None, group) for elr, group in groups.items()]
    dashed = [(f"C{i % 10}", "--", *item) for i, item in enumerate(moving.items())]
    for key, column in (("a", "train_loss"), ("b", "test_error"), ("c", "grad_norm")):
        for tone, style, label, group in lines + dashed:
            epoch, middle, least, most = over_seeds(group, column)
            axes[key].plot(epoch, middle, style, color=tone, label=label)
            if len(group) > 1:
                axes[key].fill_between(epoch, least, most, color=tone, alpha=0.2, lw=0)
        axes[key].set(xlabel="epoch", title=f"({key}) {column.replace('_', ' ')}")
        log_scale(axes[key], "y", [run.log[column] for run in runs if column in run.log])
    errors(axes["b"])
    if dashed:
        axes["a"].legend(fontsize=8, loc="lower left")
    _phase_diagram(axes["d"], runs, lines + dashed)
    fig.colorbar(colour, ax=axes["d"], label="ELR", pad=0.02)
    paths = [(tone, run.log) for tone, _, _, group in dashed for run in group]
    _along_the_elr(axes["e"], runs, groups, paths)
    _angles(axes["f"], groups, paths)
    if name:
        fig.suptitle(name)
    save(fig, path)


def log_scale(ax, axis, columns):
    """Logarithmic where there is something above 0 to show."""
    if any((values > 0).any() for values in columns):
        ax.set(**{f"{axis}scale": "log"})


def over_seeds(group, column):
    """Epochs that all seeds have; median, least and greatest of them."""
    epochs = sorted(set.intersection(*(set(run.log["epoch"]) for run in group)))
    values = []
    for run in group:
        of_run = run.log.get(column, np.full(len(run.log["epoch"]), math.nan))
        values.append(of_run[np.isin(run.log["epoch"], epochs)])
    return np.array(epochs), np.median(values, 0), np.min(values, 0), np.max(values, 0)


def _phase_diagram(ax, runs, lines):
    for tone, style, _, group in lines:
        gamma, loss = over_seeds(group, "grad_norm")[1], over_seeds(group, "train_loss")[1]
        ax.plot(gamma, loss, "." + style, color=tone, lw=0.8, ms=3)
        ax.plot(gamma[-1:], loss[-1:], "o", color=tone, ms=5, mec="black", mew=0.5, zorder=3)
    logs = [run.log for run in runs if "grad_norm" in run.log]
    ax.set(xlabel="effective gradient norm γ", ylabel="train loss (nats)")
    ax.set_title("(d) phase diagram, ○ the end")
    log_scale(ax, "x", [log["grad_norm"] for log in logs])
    log_scale(ax, "y", [log["train_loss"] for log in logs])


def _along_the_elr(ax, runs, groups, paths):
    """Final loss (left) and errors (right) against ELR; of the runs whose ELR moved the path."""
    right, elrs, handles = ax.twinx(), list(groups), []
    series = [(ax, "train_loss", "o-", "black"), (right, "train_error", "s--", "#009E73")]
    series.append((right, "test_error", "^:", "#D55E00"))
    for axis, column, style, tone in series:
        values = [[run.final(column) for run in group] for group in groups.values()]
        label = column.replace("_", " ")
        handles.append(spread(axis, elrs, values, style, color=tone, label=label))
    for tone, log in paths:
        ax.plot(log["elr"], log["train_loss"], ".--", color=tone)
        ax.plot(log["elr"][-1], log["train_loss"][-1], "o", color=tone, ms=6, mec="black")
    log_scale(ax, "y", [run.log["train_loss"] for run in runs])
    ax.set(xscale="log", xlabel="ELR", ylabel="final train loss (nats)")
    ax.set_title("(e) regimes along the ELR; hatched: boundaries", pad=28)
    right.set(ylabel="final error", ylim=(-0.03, 1.03))
    if groups:
        edges = bands(ax, elrs, [majority(group)[0] for group in groups.values()])
        if paths:
            ax.set_xlim(edges[0] / 10, edges[-1] * 10)
    for boundary in regimes.boundaries(runs):
        if boundary.seen:
            look = dict(facecolor="none", edgecolor="black", alpha=0.4, hatch="////", lw=0)
            ax.axvspan(boundary.low, boundary.high, **look)
    handles = [handle for handle in handles if handle is not None]
    below = dict(loc="upper right", bbox_to_anchor=(1.02, -0.1), ncol=3, frameon=False)
    ax.legend(handles=handles, fontsize=8, **below)


def _angles(ax, groups, paths):
    ax.set(xscale="log", yscale="log", xlabel="ELR")
    ax.set_title("(f) angular step φ at the end (radians)", pad=28)
    for angle in (0.05, 1.0):  # a single point would leave the axis without a height
        ax.axhline(angle, color="black", ls=":", lw=0.8)
    if groups:
        values = [[run.final("angle") for run in group] for group in groups.values()]
        spread(ax, list(groups), values, "o-", color="black")
        bands(ax, list(groups), [majority(group)[0] for group in groups.values()])
    for tone, log in paths:
        if "angle" in log:
            ax.plot(log["elr"], log["angle"], ".--", color=tone)


def of_toy(rows, alphas, path):
    fig, axes = subplots([["a", "b"]], (12, 4.2))
    elrs, total = sorted({row["elr"] for row in rows}), sum(alphas)
    of_elr = [[row for row in rows if row["elr"] == elr] for elr in elrs]
    names = [most_frequent(group) for group in of_elr]
    for key, column, label in (("a", "loss", "F"), ("b", "skill", "skill")):
        ax = axes[key]
        edges = bands(ax, elrs, names)
        fine = np.geomspace(edges[0], edges[-1], 500)
        above = fine * total > 1
        theory = (total - 1 / fine) / 2 if column == "loss" else 1 / (total * fine)
        ax.plot(fine[above], theory[above], "-", color="#D55E00", label="theory")
        values = [[max(row[column], 1e-12) for row in group] for group in of_elr]
        spread(ax, elrs, values, "o", color="black", label="measured")
        ax.axvline(1 / total, color="#D55E00", ls="--", label=f"threshold 1/Σα = {1 / total:.4g}")
        ax.set(yscale="log", xlabel="ELR")
        ax.set_title(f"({key}) {label}, mean of the last half", pad=30)
    axes["a"].axhline(total / 2, color="black", ls=":", label="chance, Σα/2")
    axes["a"].set_ylim(1e-4 * total, 2 * total)
    axes["b"].set_ylim(1e-5, 2)
    for ax in axes.values():
        ax.legend(fontsize=8)
    fig.suptitle("toy, α = " + ", ".join(f"{a:g}" for a in alphas))
    save(fig, path)


def of_landscape(lines, path, name):
    """Test error, sharpness and barriers against the ELR of the first run."""
    fig, axes = subplots([["a", "b", "c"]], (14, 5))
    fig.subplots_adjust(bottom=0.24)
    elrs = sorted({line["elr"] for line in lines})
    groups = [[line for line in lines if line["elr"] == elr] for elr in elrs]
    names = [most_frequent(group) for group in groups]
    panels = {
        "a": ("test error", "test_error then_test_error avg_test_error then_avg_test_error"),
        "b": ("sharpness λ_max on the unit sphere", "sharpness then_sharpness"),
        "c": ("barrier (train loss)", "barrier_to_next"),
    }
    for key, (label, columns) in panels.items():
        for column, style in zip(columns.split(), ("o-", "s--", "^:", "d-."), strict=False):
            values = [[line[column] for line in group] for group in groups]
            spread(axes[key], elrs, values, style, label=column.replace("_", " "))
        bands(axes[key], elrs, names)
        axes[key].set(xlabel="ELR of the first run")
        axes[key].set_title(f"({key}) {label}", pad=28)
    errors(axes["a"])
    axes["b"].set_yscale("log")
    axes["b"].plot(elrs, [2 / elr for elr in elrs], "k:", lw=1, label="2/ELR")
    axes["c"].set_yscale("symlog", linthresh=0.01)
    axes["c"].set_ylim(bottom=-0.002)
    for ax in axes.values():
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    fig.suptitle(name)
    save(fig, path)


def of_barrier(ways, path, name):
    fig, axes = subplots([["a", "b"]], (9.5, 4))
    for way, values in ways.items():
        t, loss, error = zip(*values, strict=True)
        axes["a"].plot(t, loss, ".-", label=way)
        axes["b"].plot(t, error, ".-", label=way)
    axes["a"].set(title="(a) train loss", xlabel="position between the two")
    axes["b"].set(title="(b) test error", xlabel="position between the two")
    axes["a"].legend()
    fig.suptitle(name)
    save(fig, path)


def main(argv=None):
    parser = regimes.Parser(prog="lab.figures", description="Draw regimes.png of logs again.")
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="folders of logs, or logs")
    add("--out", type=Path, metavar="DIR", help="for regimes.png (default: the first folder)")
    args = parser.parse_args(argv)
    out = args.out or args.paths[0]
    if not out.is_dir():
        parser.error(f"argument --out: {out} is no folder: make it first")
    runs, problems = regimes.gather(args.paths)
    for problem in problems:
        print(f"lab.figures: error: {problem}", file=sys.stderr)
    if runs:
        of_sweep(runs, out / "regimes.png", ", ".join(str(path) for path in args.paths))
        print(f"written: {out / 'regimes.png'}")
    return 2 if problems else 0


if __name__ == "__main__":
    regimes.finish(main)
