"""Draw the pictures in docs/, and print the tables of the findings.

    python docs/draw.py          step.png; angle.png, modular.png, law.png, tables of benchmarks/
    python docs/draw.py logs     also the tables of the logs of the findings' commands

Those commands are at the end of docs/findings.md.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import regimes  # noqa: E402
from lab import style  # noqa: E402

OPTIMIZERS = ROOT / "benchmarks" / "optimizers.csv"
MODULAR_CSV = ROOT / "benchmarks" / "modular.csv"
ANGLE_CSV = ROOT / "benchmarks" / "angle.csv"  # means of the runs in OPTIMIZERS
LAW = ROOT / "benchmarks" / "law.csv"
EARLY, EPOCHS = 100, 400  # of modular addition
SEEDS = 8  # that each comparison has at least
ANGLES = (0.01, 0.02, 0.05, 0.1, 0.2)

STYLES = {  # of training: style and colour of the line, label
    "angle": ("o-", "#D55E00", "angle, one sphere"),
    "angle, layer": ("o--", "#E69F00", "angle, a sphere per layer"),
    "adam": ("^-", "#009E73", "Adam's direction"),
    "muon": ("v-", "#56B4E9", "Muon's direction"),
    "elr": ("s--", "#0072B2", "cosine ELR"),
    "adamw": ("d-.", "#000000", "AdamW"),
    "sgd": ("x-.", "#999999", "SGD"),
}
ON_ALL_TASKS = ("angle", "angle, layer")  # each value is shown, as one is to serve all tasks
OTHER_SCHEDULES = {  # of the angle on one sphere, other than the cosine
    "angle, linear": "linear",
    "angle, constant, then linear": "constant, then linear",
}
SIZES = {"mod23": "modulus 23", "mod43": "modulus 43", "mod31d32": "modulus 31, width 32"}
OF_LAW = {  # task and width: folders in logs/law, colour
    ("few digits", 4): ("w4", "#56B4E9"),
    ("few digits", 8): ("w8", "#0072B2"),
    ("few digits", 16): ("w16", "#000000"),
    ("modular 23", 64): ("mod23", "#D55E00"),
}
WITH_BOUNDARIES = {
    "digits3": "digits, convnet of width 8",
    "r8": "digits, ResNet-18 of width 8",
    "r4": "digits, ResNet-18 of width 4, one seed",
    "noise": "digits, half of the labels wrong",
    "mod31": "modular 31, transformer of width 64, five seeds",
    "mod23": "modular 23",
    "mod31d32": "modular 31, width 32",
}
# Tasks of docs/optimizers.py as the findings call them
SHOWN = {"few digits, resnet18": "few digits, ResNet-18", "digits, half wrong": "half wrong"}


def line(*cells):
    print("| " + " | ".join(cells) + " |")


def heads(*names):
    print()
    line(*names)
    line(*["---"] * len(names))


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def middle(values):
    """Median, least and greatest, as text; of nothing, or nan, a dash."""
    if not np.isfinite(values).any():
        return "–"
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def value_of(path):
    """ELR, angle or learning rate of a log, from its name."""
    return float(path.stem.split("=")[1].removesuffix(".seed").removesuffix(".then"))


# ------------------------------------------------------------------------------- the step


def step():
    """The step: projection on the tangent space, the turn by φ, renormalization."""
    fig, axes = style.subplots([["a"]], 4.7)
    ax, phi = axes["a"], 0.56
    origin, theta, tangent = np.zeros(2), np.array([0.0, 1.0]), np.array([1.0, 0.0])
    moved = theta + np.tan(phi) * tangent
    new = moved / np.linalg.norm(moved)
    gradient = theta + np.array([0.34, 0.21])
    projected = theta + 0.34 * tangent
    blue, orange = style.LEGS.values()
    green, grey = style.TRAIN["color"], style.GREY

    def arrow(start, end, tone, width=2.0):
        look = dict(
            arrowstyle="-|>", color=tone, lw=width, shrinkA=0, shrinkB=0, mutation_scale=11 + width
        )
        ax.annotate("", end, start, arrowprops=look)

    def dashed(start, end, tone=grey):
        ax.plot(*zip(start, end, strict=True), "--", color=tone, lw=1)

    def arc(radius, start, end, **look):
        turn = np.linspace(start, end, 100)
        ax.plot(radius * np.sin(turn), radius * np.cos(turn), **look)

    arc(1, -0.75, 1.15, color="black", lw=1)
    arc(0.3, 0, phi, color="black", lw=1)
    ax.plot([-0.55, 0.95], [1, 1], color=grey, lw=0.8)
    dashed(origin, moved)
    dashed(gradient, projected)
    arrow(origin, theta, "black")
    arrow(origin, new, blue)
    arrow(theta, gradient, grey)
    arrow(theta, projected, green, 5)
    arrow(theta, moved, orange)  # upon the projected gradient, which it is a multiple of
    arrow(moved, new, blue, 1.5)
    ax.plot(0, 0, "o", color="black", ms=4)

    def text(x, y, words, tone="black", **look):
        ax.text(x, y, words, color=tone, fontsize=10, **look)

    text(-0.03, 0.5, "θ, of norm ρ", ha="right")
    text(0.075, 0.2, "φ", ha="center")
    text(0.36, 1.22, "−g", grey)
    text(0.17, 0.93, "$−g_t$", green, ha="center", va="top")
    text(0.37, 1.05, "step: −η̃ρ²$g_t$", orange)
    text(0.63, 0.9, "back to norm ρ", blue)
    text(0.36, 0.46, "the new θ", blue)
    text(-0.54, 1.02, "tangent space", grey)
    text(0.94, 0.4, "sphere of radius ρ")
    text(0.36, 0.14, "tan φ = η̃ρ²‖$g_t$‖/‖θ‖")
    ax.set(xlim=(-0.8, 1.3), ylim=(-0.05, 1.3))
    ax.set_aspect("equal")
    ax.axis("off")
    style.save(fig, ROOT / "docs" / "step.png", "")


# ---------------------------------------------------------------- modular addition, along the ELR


def first_below(run, column, level=0.05):
    epochs = run.log["epoch"][run.log[column] < level]
    return float(epochs[0]) if len(epochs) else math.inf


def after(run, epoch, column="test_error"):
    """A column after so many epochs: the mean of the ten rows up to there; nan of shorter runs."""
    log = run.log
    rows = (log["epoch"] <= epoch) & (log["epoch"] > epoch - 10)
    return float(log[column][rows].mean()) if log["epoch"][-1] >= epoch else math.nan


def converged(run, epoch, chance):
    """Whether the run had converged after so many epochs."""
    log = {name: x[run.log["epoch"] <= epoch] for name, x in run.log.items()}
    return regimes.classify(log, chance[str(run.seed)]).regime == "convergence"


def modular_row(run, chance):
    row = {"elr": run.elr, "seed": run.seed, "regime": run.verdict.regime}
    for epoch in (EARLY, EPOCHS):
        row[f"test_error_{epoch}"] = after(run, epoch)
    for epoch in (EARLY, EPOCHS):
        row[f"converged_{epoch}"] = float(converged(run, epoch, chance))
    row["train_below_5"] = first_below(run, "train_error")
    row["test_below_5"] = first_below(run, "test_error")
    row["angle_400"] = after(run, EPOCHS, "angle")
    return row


def modular(logs):
    folder = logs / "mod31"
    chance = regimes.read_chance(folder)
    groups = regimes.by_elr(regimes.gather([folder])[0])
    of_elr = {elr: [modular_row(run, chance) for run in group] for elr, group in groups.items()}
    rows = [row for rows in of_elr.values() for row in rows]
    regimes.write_csv(MODULAR_CSV, rows)
    heads("ELR", "converged after 400 epochs", "test error of those, median (range)", "of all",
          "train error < 5 % at", "test error < 5 % at")  # fmt: skip
    for elr, rows in of_elr.items():
        good = [row["test_error_400"] for row in rows if row["converged_400"]]
        cells = [f"{elr:g}", f"{len(good)} of {len(rows)}", middle(good)]
        cells.append(f"{np.median([row['test_error_400'] for row in rows]):.3f}")
        for column in ("train_below_5", "test_below_5"):
            cells.append(f"{np.median([row[column] for row in rows]):g}".replace("inf", "–"))
        line(*cells)


def draw_modular():
    """Test errors at two epochs, and when the errors fall below 5 %, against the ELR."""
    rows = rows_of(MODULAR_CSV)
    for row in rows:
        row |= {name: float(cell) for name, cell in row.items() if name != "regime"}
    of_elr = style.by_elr(rows)
    fig, axes = style.subplots([["a", "b"]], 3.6)
    error, time = axes["a"], axes["b"]
    look = dict(fmt="o:", color=style.THEN["color"], label=f"{EARLY} epochs")
    style.means(error, of_elr, {f"test_error_{EARLY}": look})
    for wanted, face, label in ((1, "black", "converged"), (0, "white", "not converged")):
        some = [row for row in rows if row["converged_400"] == wanted]
        x, y = [row["elr"] for row in some], [row["test_error_400"] for row in some]
        look = dict(ls="", marker="s", ms=5, mfc=face, mec="black", zorder=3)
        error.plot(x, y, **look, label=f"{EPOCHS} epochs, {label}")
    error.set(title="test error, a square per seed", ylim=(-0.02, 1.02))
    for column, look in (("train", style.TRAIN), ("test", style.TEST)):
        of_seeds = {elr: [row[f"{column}_below_5"] for row in rows] for elr, rows in of_elr.items()}
        medians = [np.median(epochs) for epochs in of_seeds.values()]  # infinite: not yet
        label = f"{column} error, median over seeds"
        time.plot([*of_seeds], medians, look["fmt"], color=look["color"], label=label)
        for elr, epochs in of_seeds.items():
            time.plot([elr] * len(epochs), epochs, ".", color=look["color"], alpha=0.4, ms=4)
    time.set(yscale="log", xscale="log", xlabel="ELR", title="first epoch with an error below 5 %")
    style.bands(axes.values(), of_elr)
    style.save(fig, ROOT / "docs" / "modular.png", "addition modulo 31, transformer of width 64")


# ----------------------------------------- angles and other optimizers, from docs/optimizers.py


def read_errors(path):
    """Task → kind and values → seed → test error."""
    tasks = {}
    for row in rows_of(path):
        way = row["kind"], float(row["value"]), float(row["decay"])
        of_seed = tasks.setdefault(row["task"], {}).setdefault(way, {})
        of_seed[int(row["seed"])] = float(row["test_error"])
    return tasks


def found(ways, kind):
    """Whether the search of a kind has come to its end."""
    return any(len(of_seed) >= SEEDS for way, of_seed in ways.items() if way[0] == kind)


def best(ways, kind):
    """Of the values of a kind that have the most seeds, the one with the least mean."""
    of_kind = {way: list(ways[way].values()) for way in ways if way[0] == kind}
    most = max(map(len, of_kind.values()), default=0)
    whole = [way for way in of_kind if len(of_kind[way]) == most]
    return min(whole, key=lambda way: np.mean(of_kind[way]), default=None)


def mean_and_error(x):
    """Mean and its standard error; "" where there is none."""
    return np.mean(x), np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else ""


def compared(task, ways):
    """A row for each angle, and for the best of each other kind: mean error, and seed by seed its
    difference to the best AdamW, the best ELR, the cosine from the same angle."""
    chosen = []
    for kind in (*ON_ALL_TASKS, *OTHER_SCHEDULES):
        label = (
            STYLES[kind][2] if kind in STYLES else f"{STYLES['angle'][2]}, {OTHER_SCHEDULES[kind]}"
        )
        chosen += [(label, f"{label}, {value:g}", (kind, value, 0.0)) for value in ANGLES]
    for kind in [kind for kind in STYLES if kind not in ON_ALL_TASKS]:
        chosen.append((STYLES[kind][2], f"{STYLES[kind][2]}, best", best(ways, kind)))
    rows = {}
    for method, label, way in chosen:
        if way not in ways:
            continue
        mean, error = mean_and_error([*ways[way].values()])
        row = dict(task=task, method=method, value=way[1], weight_decay=way[2])
        row |= dict(seeds=len(ways[way]), test_error=mean, standard_error=error)
        others = {"adamw": best(ways, "adamw"), "elr": best(ways, "elr"), "cosine": None}
        if way[0] in OTHER_SCHEDULES:
            others["cosine"] = "angle", *way[1:]
        for name, other in others.items():
            pairs = []
            if other and other != way:
                pairs = [
                    ways[way][seed] - ways[other][seed] for seed in ways[way] & ways[other].keys()
                ]
            mean, error = mean_and_error(pairs) if pairs else ("", "")
            row |= {f"minus_{name}": mean, f"minus_{name}_error": error}
        rows[label] = row
    return rows


def cell(row, column, error, form, most):
    """Mean ± its standard error, with a star where a difference is surely not 0, and the number of
    seeds where others have more."""
    if row is None or row[column] == "":
        return "–"
    text = f"{row[column]:{form}}".replace("-", "−")
    if row[error] != "":
        text += f" ± {row[error]:.4f}"
        if form[0] == "+" and abs(row[column]) > 2 * row[error]:
            text += " *"
    return text if row["seeds"] == most else f"{text} ({row['seeds']})"


def optimizers():
    """Picture and tables of the tasks that have been searched to the end."""
    tasks = read_errors(OPTIMIZERS)
    whole = [task for task in tasks if all(found(tasks[task], kind) for kind in STYLES)]
    tasks = {SHOWN.get(task, task): tasks[task] for task in whole}
    draw_optimizers(tasks)
    rows = print_comparison(tasks)
    regimes.write_csv(ANGLE_CSV, [row for of_task in rows.values() for row in of_task.values()])


def print_comparison(tasks):
    """Test errors of each angle and of the best of each other kind; differences between them.
    Returns the rows, by task and label."""
    rows = {task: compared(task, ways) for task, ways in tasks.items()}
    most = {task: max(row["seeds"] for row in of_task.values()) for task, of_task in rows.items()}
    labels = list(dict.fromkeys(label for of_task in rows.values() for label in of_task))

    def table(head, heads_of_tasks, column, error, form):
        heads(head, *heads_of_tasks)
        for label in labels:
            found = {task: rows[task].get(label) for task in tasks}
            cells = [cell(row, column, error, form, most[task]) for task, row in found.items()]
            if any(text != "–" for text in cells):
                line(label, *cells)

    seeds = [f"{task}, {most[task]} seeds" for task in tasks]
    table("test error", seeds, "test_error", "standard_error", ".4f")
    heads("at the value, weight decay", *tasks)
    for label in labels:
        if label.endswith("best"):
            cells = []
            for of_task in rows.values():
                row = of_task.get(label, {"value": math.nan, "weight_decay": 0})
                decay = f", {row['weight_decay']:g}" if row["weight_decay"] else ""
                cells.append(f"{row['value']:g}{decay}".replace("nan", "–"))
            line(label, *cells)
    names = {"adamw": "AdamW, best", "elr": "cosine ELR, best", "cosine": "cosine from the same φ₀"}
    for name, words in names.items():
        table(f"− {words}", tasks, f"minus_{name}", f"minus_{name}_error", "+.4f")
    return rows


def draw_optimizers(tasks):
    """Mean test errors against φ₀, ELR and learning rate; of each learning rate the best decay."""
    from matplotlib.colors import to_rgba

    fig, axes = style.subplots([list("ab"), list("cd"), list("ef")][: (len(tasks) + 1) // 2], 9.5)
    for ax, (task, ways) in zip(axes.values(), tasks.items(), strict=False):
        for kind, (fmt, tone, label) in STYLES.items():
            rows = {}
            for value in sorted({way[1] for way in ways if way[0] == kind}):
                at_value = {way: x for way, x in ways.items() if way[1] == value}
                errors = list(at_value[best(at_value, kind)].values())
                rows[value] = [{"error": x} for x in errors]
            look = dict(fmt=fmt, color=tone, label=label, ecolor=to_rgba(tone, 0.4))
            style.means(ax, rows, {"error": look}, said="")
        ax.set(
            xscale="log", xlabel="φ₀ (radians), ELR or learning rate", title=f"test error, {task}"
        )
        style.logarithmic(ax)
    for ax in list(axes.values())[len(tasks) :]:
        ax.remove()
    style.save(fig, ROOT / "docs" / "angle.png", "means ± s.e. over seeds")


# ------------------------------------------------------------------- tables of the findings alone


def sizes(logs):
    """Modular addition at other sizes: per ELR how many converge, and the test error of those."""
    heads("task", "ELR: converged, median test error of those; or regime")
    for folder, name in SIZES.items():
        cells = []
        for elr, group in regimes.by_elr(regimes.gather([logs / folder])[0]).items():
            good = [run for run in group if run.verdict.regime == "convergence"]
            text = regimes.title(regimes.majority(group)[0])
            if good:
                error = np.median([run.final("test_error") for run in good])
                text = f"{len(good)} of {len(group)}, {error:.3f}"
            cells.append(f"{elr:g}: {text}")
        line(name, "; ".join(cells))


def whole_space(logs):
    """Ordinary SGD on modular addition, and the ELR that it implies."""
    heads("lr", "weight decay", "test error", "ELR from the first to the last epoch")
    for folder, decay in (("mod31-wd3", "1e-3"), ("mod31-wd2", "1e-2")):
        for path in sorted((logs / folder).glob("lr=*.csv")):
            if path.name.endswith(".layers.csv"):
                continue
            log = regimes.read_log(path)
            elr, error = log["elr"][1:], log["test_error"][-1]
            text = f"{elr[0]:.2g} to {elr[-1]:.2g}, at most {elr.max():.2g}"
            line(f"{value_of(path):g}", decay, f"{error:.3f}", text)


def boundary_angles(logs):
    heads("task", "φ just above the convergence boundary",
          "φ at the divergence boundary, below and above")  # fmt: skip
    for folder, name in WITH_BOUNDARIES.items():
        runs = regimes.gather([logs / folder])[0]
        groups = regimes.by_elr(runs)
        lower, upper = regimes.boundaries(runs)
        cells = []
        for elr in (lower.high, upper.low, upper.high):
            phi = np.median([run.final("angle") for run in groups[elr]])
            cells.append(f"{phi:.3g} ({elr:g})")
        line(name, cells[0], ", ".join(cells[1:]))


def law(logs):
    """Where the convergence boundary lies, and the angle just above it, by task and batch size."""
    rows = []
    for (task, width), (name, _) in OF_LAW.items():
        for batch in (8, 16, 32, 64):
            runs = regimes.gather([logs / "law" / f"{name}-b{batch}"])[0]
            boundary = regimes.boundaries(runs)[0]
            if boundary.seen:
                angles = [run.final("angle") for run in regimes.by_elr(runs)[boundary.high]]
                row = dict(task=task, width=width, batch_size=batch, boundary_low=boundary.low)
                row |= dict(boundary_high=boundary.high)
                rows.append(row | dict(angle_low=min(angles), angle_high=max(angles)))
    regimes.write_csv(LAW, rows)


def draw_law():
    fig, axes = style.subplots([["a", "b"]], 3.4)
    heads("task", "width", "batch size", "boundary, ELR", "φ just above it, over seeds")
    for row in rows_of(LAW):
        task, width, batch, *numbers = row.values()
        low, high, least, greatest = map(float, numbers)
        line(task, width, batch, f"{low:.2g} to {high:.2g}", f"{least:.2g} to {greatest:.2g}")
        kind = task, int(width)
        at = float(batch) * (0.94 + 0.04 * list(OF_LAW).index(kind))  # side by side
        look = dict(color=OF_LAW[kind][1], label=f"{task}, width {width}")
        axes["a"].vlines(at, low, high, lw=4, **look)
        axes["b"].plot([at, at], [least, greatest], "o-", ms=5, color=look["color"])
    axes["a"].plot([8, 64], [3e-3, 2.4e-2], ":", color=style.GREY, label="in proportion")
    axes["a"].set(title="convergence boundary (ELR)")
    axes["b"].set(title="angle φ just above it (radians)")
    for ax in axes.values():
        ax.set(xscale="log", yscale="log", xlabel="batch size")
        ax.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        ax.set_xticks([], minor=True)
    style.save(fig, ROOT / "docs" / "law.png", "")


def second_runs(logs):
    """Modular addition after a drop of the ELR to 1e-4."""
    heads("first ELR", "test error after --then 1e-4, median (range) over the seeds")
    found = {}
    for path in sorted((logs / "mod31-then").glob("*.then=*.csv")):
        if not path.name.endswith(".layers.csv"):
            first = float(path.name.split("=")[1].split(".seed")[0].split(".then")[0])
            found.setdefault(first, []).append(regimes.read_log(path)["test_error"][-1])
    for first, errors in sorted(found.items()):
        line(f"{first:g}", middle(errors))


def main(argv=None):
    lines = argparse.RawDescriptionHelpFormatter
    parser = regimes.Parser(prog="draw.py", description=__doc__, formatter_class=lines)
    text = "the folder of the findings' logs; without it, what needs no logs"
    parser.add_argument("logs", type=Path, nargs="?", metavar="LOGS", help=text)
    logs = parser.parse_args(argv).logs
    folders = {"law", "mod31", "mod31-then", "mod31-wd2", "mod31-wd3", *SIZES, *WITH_BOUNDARIES}
    for name in sorted(folders if logs else ()):
        if not (logs / name).is_dir():
            parser.error(f"argument LOGS: {logs / name} is not there: see docs/findings.md")
    if not OPTIMIZERS.exists():
        parser.error(f"{OPTIMIZERS} is not there: python docs/optimizers.py makes it")
    step()
    optimizers()
    if logs:
        for part in (modular, sizes, whole_space, boundary_angles, law, second_runs):
            part(logs)
    draw_modular()
    draw_law()


if __name__ == "__main__":
    regimes.finish(main)
