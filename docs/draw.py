"""Draw the pictures in docs/, and print the tables of the findings.

python docs/draw.py          step.png; angle.png and its tables, modular.png, from benchmarks/
python docs/draw.py logs     law.png, too, and the tables of the logs of the findings' commands
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import regimes  # noqa: E402
from lab import figures  # noqa: E402

OPTIMIZERS = ROOT / "benchmarks" / "optimizers.csv"
MODULAR = ROOT / "benchmarks" / "modular.csv"
EARLY, EPOCHS = 100, 400  # of modular addition
SEEDS = 8  # that each comparison has at least
ANGLES = (0.01, 0.02, 0.05, 0.1, 0.2)

KINDS = {  # of training: style and colour of the line, label
    "angle": ("o-", "#D55E00", "angle, one sphere"),
    "angle, layer": ("o--", "#E69F00", "angle, a sphere per layer"),
    "adam": ("^-", "#009E73", "Adam's direction"),
    "muon": ("v-", "#56B4E9", "Muon's direction"),
    "elr": ("s--", "#0072B2", "cosine ELR"),
    "adamw": ("d-.", "#000000", "AdamW"),
    "sgd": ("x-.", "#999999", "SGD"),
}
ON_ALL_TASKS = ("angle", "angle, layer")  # each value is shown, as one is to serve all tasks
SCHEDULES = {  # of the angle on one sphere, other than the cosine
    "angle, linear": "linear",
    "angle, constant, then linear": "constant, then linear",
}
SIZES = {"mod23": "modulus 23", "mod43": "modulus 43", "mod31d32": "modulus 31, width 32"}
LAW = {  # folders of logs/law: label, colour
    "w4": ("few digits, width 4", "#56B4E9"),
    "w8": ("few digits, width 8", "#0072B2"),
    "w16": ("few digits, width 16", "#000000"),
    "mod23": ("modular 23", "#D55E00"),
}
WITH_BOUNDARIES = {
    "digits3": "digits, convnet of width 8",
    "r8": "digits, resnet18 of width 8",
    "r4": "digits, resnet18 of width 4, one seed",
    "noise": "digits, half of the labels wrong",
    "mod31": "modular 31, transformer of width 64, five seeds",
    "mod23": "modular 23",
    "mod31d32": "modular 31, width 32",
}


def line(*cells):
    print("| " + " | ".join(cells) + " |")


def heads(*names):
    print()
    line(*names)
    line(*["---"] * len(names))


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
    fig, axes = figures.subplots([["a"]], 4.7)
    ax, phi = axes["a"], 0.56
    origin, theta, tangent = np.zeros(2), np.array([0.0, 1.0]), np.array([1.0, 0.0])
    moved = theta + np.tan(phi) * tangent
    new = moved / np.linalg.norm(moved)
    gradient = theta + np.array([0.34, 0.21])
    projected = theta + 0.34 * tangent
    blue, orange = figures.LEGS.values()
    green, grey = figures.TRAIN["color"], figures.GREY

    def arrow(start, end, tone, width=2.0):
        look = dict(arrowstyle="-|>", color=tone, lw=width, shrinkA=0, shrinkB=0, mutation_scale=13)
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
    arrow(theta, moved, orange)
    arrow(theta, gradient, grey)
    arrow(theta, projected, green, 3)
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
    figures.save(fig, ROOT / "docs" / "step.png", "")


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
    groups = regimes.by_elr(regimes.read_folder(folder))
    of_elr = {elr: [modular_row(run, chance) for run in group] for elr, group in groups.items()}
    rows = [row for rows in of_elr.values() for row in rows]
    regimes.write_csv(MODULAR, rows)
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
    with open(MODULAR, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(cell) for name, cell in row.items() if name != "regime"}
    of_elr = figures.by_elr(rows)
    fig, axes = figures.subplots([["a", "b"]], 3.6)
    error, time = axes["a"], axes["b"]
    look = dict(fmt="o:", color=figures.THEN["color"], label=f"{EARLY} epochs, mean ± s.e.")
    figures.means(error, of_elr, {f"test_error_{EARLY}": look})
    for wanted, face, label in ((1, "black", "converged"), (0, "white", "not converged")):
        some = [row for row in rows if row["converged_400"] == wanted]
        x, y = [row["elr"] for row in some], [row["test_error_400"] for row in some]
        look = dict(ls="", marker="s", ms=5, mfc=face, mec="black", zorder=3)
        error.plot(x, y, **look, label=f"{EPOCHS} epochs, {label}")
    error.set(title="test error, a square per seed", ylim=(-0.02, 1.02))
    for column, look in (("train", figures.TRAIN), ("test", figures.TEST)):
        known = {}
        for elr, rows in of_elr.items():
            inside = [row for row in rows if math.isfinite(row[f"{column}_below_5"])]
            if inside:
                known[elr] = inside
        look = look | {"label": f"{column} error"}
        figures.means(time, known, {f"{column}_below_5": look})
    time.set(yscale="log", ylabel="epoch", title="first error below 5 %, mean ± s.e.")
    figures.bands(axes.values(), of_elr)
    figures.save(fig, ROOT / "docs" / "modular.png", "addition modulo 31, transformer of width 64")


# ----------------------------------------- angles and other optimizers, from docs/optimizers.py


def read_errors():
    """Task → kind and values → seed → test error, of tasks that have been searched to the end."""
    tasks = {}
    with open(OPTIMIZERS, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            way = row["kind"], float(row["value"]), float(row["decay"])
            of_seed = tasks.setdefault(row["task"], {}).setdefault(way, {})
            of_seed[int(row["seed"])] = float(row["test_error"])
    return {task: ways for task, ways in tasks.items() if all(found(ways, kind) for kind in KINDS)}


def found(ways, kind):
    """Whether the search of a kind has come to its end."""
    return any(len(of_seed) >= SEEDS for way, of_seed in ways.items() if way[0] == kind)


def best(ways, kind):
    """Of the values of a kind that have the most seeds, the one with the least mean."""
    of_kind = {way: list(ways[way].values()) for way in ways if way[0] == kind}
    most = max(map(len, of_kind.values()), default=0)
    whole = [way for way in of_kind if len(of_kind[way]) == most]
    return min(whole, key=lambda way: np.mean(of_kind[way]), default=None)


def mean_and_error(x, form=".4f"):
    """Mean ± its standard error, and whether that is surely not 0."""
    if len(x) == 1:
        return f"{x[0]:{form}}".replace("-", "−"), False
    error = np.std(x, ddof=1) / math.sqrt(len(x))
    return f"{np.mean(x):{form}} ± {error:.4f}".replace("-", "−"), abs(np.mean(x)) > 2 * error


def error_cell(ways, way, seeds):
    """Test error of a way, and the number of its seeds where it has fewer than others."""
    if way not in ways:
        return "–"
    errors = list(ways[way].values())
    text, _ = mean_and_error(errors)
    return text if len(errors) == seeds else f"{text} ({len(errors)})"


def difference_cell(ways, way, other):
    """Test error of a way above that of another, seed by seed. A star: more than two errors."""
    if way not in ways or other is None or way == other:
        return "–"
    common = ways[way].keys() & ways[other].keys()
    differences = [ways[way][seed] - ways[other][seed] for seed in common]
    text, sure = mean_and_error(differences, "+.4f")
    if sure:
        text += " *"
    return text if len(common) == len(ways[other]) else f"{text} ({len(common)})"


def optimizers():
    """Test errors of each angle and of the best of each other kind; differences between them."""
    tasks = read_errors()
    draw_optimizers(tasks)
    rows = []
    for kind in ON_ALL_TASKS:
        for value in ANGLES:
            rows.append((f"{KINDS[kind][2]}, {value:g}", dict.fromkeys(tasks, (kind, value, 0.0))))
    others = [kind for kind in KINDS if kind not in ON_ALL_TASKS]
    for kind in others:
        ways = {task: best(tasks[task], kind) for task in tasks}
        rows.append((f"{KINDS[kind][2]}, best", ways))
    seeds = {task: max(map(len, ways.values())) for task, ways in tasks.items()}
    heads("test error", *(f"{task}, {seeds[task]} seeds" for task in tasks))
    for label, of_task in rows:
        line(label, *(error_cell(tasks[task], way, seeds[task]) for task, way in of_task.items()))
    heads("at the value, weight decay", *tasks)
    for label, of_task in rows[-len(others) :]:
        cells = []
        for way in of_task.values():
            text = f"{way[1]:g}" if way else "–"
            cells.append(f"{text}, {way[2]:g}" if way and way[2] else text)
        line(label, *cells)
    for kind in ("adamw", "elr"):
        heads(f"− {KINDS[kind][2]}, best", *tasks)
        for label, of_task in rows:
            cells = []
            for task, way in of_task.items():
                cells.append(difference_cell(tasks[task], way, best(tasks[task], kind)))
            line(label, *cells)
    heads("− cosine from the same φ₀", *tasks)
    for kind, label in SCHEDULES.items():
        for value in ANGLES[2:4]:
            way, cosine = (kind, value, 0.0), ("angle", value, 0.0)
            cells = [difference_cell(ways, way, cosine) for ways in tasks.values()]
            line(f"{label}, {value:g}", *cells)


def draw_optimizers(tasks):
    """Mean test errors against φ₀, ELR and learning rate; of each learning rate the best decay."""
    fig, axes = figures.subplots([list("ab"), list("cd"), list("ef")][: (len(tasks) + 1) // 2], 9.5)
    for ax, (task, ways) in zip(axes.values(), tasks.items(), strict=False):
        for kind, (style, tone, label) in KINDS.items():
            rows = {}
            for value in sorted({way[1] for way in ways if way[0] == kind}):
                at_value = {way: x for way, x in ways.items() if way[1] == value}
                errors = list(at_value[best(at_value, kind)].values())
                rows[value] = [{"error": x} for x in errors]
            look = dict(fmt=style, color=tone, label=label, elinewidth=0.7)
            figures.means(ax, rows, {"error": look})
        ax.set(xscale="log", xlabel="φ₀, ELR or learning rate", title=f"test error, {task}")
        figures.logarithmic(ax)
    for ax in list(axes.values())[len(tasks) :]:
        ax.remove()
    figures.save(fig, ROOT / "docs" / "angle.png", "")


# ------------------------------------------------------------------- tables of the findings alone


def sizes(logs):
    """Modular addition at other sizes: per ELR how many converge, and the test error of those."""
    heads("task", "ELR: converged, median test error of those; or regime")
    for folder, name in SIZES.items():
        cells = []
        for elr, group in regimes.by_elr(regimes.read_folder(logs / folder)).items():
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
        runs = regimes.read_folder(logs / folder)
        groups = regimes.by_elr(runs)
        lower, upper = regimes.boundaries(runs)
        cells = []
        for elr in (lower.high, upper.low, upper.high):
            phi = np.median([run.final("angle") for run in groups[elr]])
            cells.append(f"{phi:.3g} ({elr:g})")
        line(name, cells[0], ", ".join(cells[1:]))


def law(logs):
    """Where the convergence boundary lies, and the angle just above it, by task and batch size."""
    fig, axes = figures.subplots([["a", "b"]], 3.4)
    heads("task", "batch size", "boundary, ELR", "φ just above it, by seed")
    for number, (name, (label, tone)) in enumerate(LAW.items()):
        sizes, lows, highs, angles = [], [], [], []
        for batch in (8, 16, 32, 64):
            folder = logs / "law" / f"{name}-b{batch}"
            runs = regimes.read_folder(folder) if folder.is_dir() else []
            boundary = regimes.boundaries(runs)[0]
            if not boundary.seen:
                continue
            above = regimes.by_elr(runs)[boundary.high]
            phis = sorted(run.final("angle") for run in above)
            text = ", ".join(f"{phi:.2g}" for phi in phis)
            line(label, f"{batch}", f"{boundary.low:.2g} to {boundary.high:.2g}", text)
            sizes.append(batch * (0.94 + 0.04 * number))  # side by side
            lows.append(boundary.low)
            highs.append(boundary.high)
            angles.append(phis)
        look = dict(color=tone, label=label)
        axes["a"].vlines(sizes, lows, highs, lw=4, **look)
        for size, phis in zip(sizes, angles, strict=True):
            axes["b"].plot([size] * len(phis), phis, "o", color=tone, ms=5)
    axes["a"].plot([8, 64], [3e-3, 2.4e-2], ":", color="#777777", label="in proportion")
    axes["a"].set(title="convergence boundary (ELR)")
    axes["b"].set(title="angle φ just above it (radians)")
    for ax in axes.values():
        ax.set(xscale="log", yscale="log", xlabel="batch size")
        ax.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
    figures.save(fig, ROOT / "docs" / "law.png", "")


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
    parser = regimes.Parser(prog="draw.py", description=__doc__)
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


if __name__ == "__main__":
    regimes.finish(main)
