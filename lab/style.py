"""The one style of all pictures: as wide as a page, legends beside curves, a thing of one colour,
axes that say in numbers what they show."""

import io
import math
import re
from collections import Counter
from itertools import groupby, pairwise

import numpy as np

import regimes

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
    if handles or heading:
        fig.legend(handles, labels, title=heading, title_fontsize=10, **look)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=160, format="png")
    regimes.write_whole(path, picture.getvalue())


def readable(text):
    """The last 100 characters of a name, those that the font may lack by their numbers."""
    text = re.sub(r"[^\x20-\u0500]", lambda found: ascii(found[0])[1:-1], text)
    return text.replace("$", r"\$")[-100:]  # no formulas


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
    short = 1e-4 <= low and high <= min(1e5, 1e4 * low)
    powers = np.isin(ticks, decades).all() and not short
    axis.set_major_formatter(LogFormatterMathtext() if powers else "{x:g}")


def logarithmic(ax, outside=math.inf):
    """The vertical axis, as what has been drawn needs it: with a 0 only where there is one; without
    what is so many times above or below the median of all, or the far ends of long bars."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines] or [[]])
    positive = drawn[(drawn > 0) & (drawn < math.inf)]
    if len(positive):
        middle = np.median(positive)
        positive = positive[(positive > middle / outside) & (positive < middle * outside)]
        low, high = positive.min(), positive.max()
        ends = [bar.vertices[:, 1] for *_, (bars,) in ax.containers for bar in bars.get_paths()]
        ends = np.concatenate([positive, *ends])
        ends = ends[(ends > low / 10) & (ends < 10 * high)]  # others go through the edge
        low, high = ends.min(), ends.max()
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


def means(ax, groups, looks, said=", mean ± s.e."):
    """Means over seeds ± their standard errors, which labels say. groups: value → rows; looks:
    column → look."""
    several = max(map(len, groups.values()), default=0) > 1
    for column, look in looks.items():
        values = [[row.get(column, math.nan) for row in rows] for rows in groups.values()]
        middle = np.array([np.mean(x) for x in values])
        if np.isfinite(middle).any():
            errors = [np.std(x) / math.sqrt(max(len(x) - 1, 1)) for x in values]
            look = look | {"label": look["label"] + (said if several else "")}
            errors = np.nan_to_num(errors)
            below = np.where(middle > 0, np.minimum(errors, middle), errors)  # to 0 at most
            ax.errorbar(list(groups), middle, [below, errors], **look)


def by_elr(rows):
    """ELR → its rows, in order of ELR."""
    rows = sorted(rows, key=lambda row: row["elr"])
    return {elr: list(group) for elr, group in groupby(rows, lambda row: row["elr"])}
