"""Draw docs/modular.png and docs/angle.png, and print the tables of the README and the guide, from
the logs of the commands in the guide: python docs/draw.py LOGS"""

import csv
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import figures  # noqa: E402
import regimes  # noqa: E402

EPOCHS = 400  # of modular addition; what went on is looked at after LONG, too
EARLY, LONG = 100, 1600
ANGLES = (0.01, 0.02, 0.05, 0.1, 0.2)

TASKS = {  # folder with angles and constant ELRs; with -cos after it the cosines
    "digits, convnet": "digits3",
    "digits, resnet18": "r8",
    "digits, half wrong": "noise",
    "digits, MLP": "mlp",
    "modular 31": "mod31",
}
KINDS = {  # of training: style and colour of the line, label
    "angle": ("o-", "#D55E00", "cosine from the angle φ₀"),
    "cosine": ("s--", "#0072B2", "cosine from an ELR"),
    "constant": ("^:", "#009E73", "constant ELR"),
    "adamw": ("d-.", "#000000", "AdamW"),
    "sgd": ("v-.", "#999999", "SGD, momentum"),
}
SIZES = {"mod23": "modulus 23", "mod43": "modulus 43", "mod31d32": "modulus 31, width 32"}
WITH_BOUNDARIES = {
    "digits3": "digits, convnet of width 8",
    "r8": "digits, resnet18 of width 8",
    "r4": "digits, resnet18 of width 4, one seed",
    "noise": "digits, half of the labels wrong",
    "mod31": "modular 31, transformer of width 64, five seeds",
    "mod23": "modular 23",
    "mod31d32": "modular 31, width 32",
}
OTHERS = {  # what else the guide tells in a sentence
    "mod31-then": "modulus 31, --then 1e-4",
    "noise-flat": "half wrong, constant angle",
    "noise-layer": "half wrong, a sphere per layer",
    "mod23": "modulus 23, angles",
    "mod43": "modulus 43, angles",
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
    for epoch in (EARLY, EPOCHS, LONG):
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
    regimes.write_csv(ROOT / "benchmarks" / "modular.csv", rows)
    heads("ELR", "converged after 400 epochs", "test error of those, median (range)", "of all",
          "train error < 5 % at", "test error < 5 % at", "of all after 1,600")  # fmt: skip
    for elr, rows in of_elr.items():
        good = [row["test_error_400"] for row in rows if row["converged_400"]]
        cells = [f"{elr:g}", f"{len(good)} of {len(rows)}", middle(good)]
        cells.append(f"{np.median([row['test_error_400'] for row in rows]):.3f}")
        for column in ("train_below_5", "test_below_5"):
            cells.append(f"{np.median([row[column] for row in rows]):g}".replace("inf", "–"))
        line(*cells, middle([row["test_error_1600"] for row in rows]))
    names = [regimes.majority(group)[0] for group in groups.values()]
    draw_modular(of_elr, names)


def draw_modular(of_elr, names):
    fig, axes = figures.subplots([["a", "b"]], (12.5, 5))
    fig.subplots_adjust(bottom=0.23)
    error, time = axes["a"], axes["b"]
    for epoch, style, tone in ((EARLY, "o:", "#56B4E9"), (LONG, "^--", "#D55E00")):
        name, label = f"test_error_{epoch}", f"after {epoch:,} epochs, median"
        medians = [np.median([row[name] for row in rows]) for rows in of_elr.values()]
        error.plot(list(of_elr), medians, style, color=tone, label=label)
    rows = [row for rows in of_elr.values() for row in rows]
    for wanted, face, label in ((1, "black", "converged"), (0, "white", "not converged")):
        some = [row for row in rows if row["converged_400"] == wanted]
        x, y = [row["elr"] for row in some], [row["test_error_400"] for row in some]
        look = dict(ls="", marker="s", ms=5, mfc=face, mec="black", zorder=3)
        error.plot(x, y, **look, label=f"after 400 epochs, {label}")
    error.set_title("(a) test error, a square per seed", pad=30)
    error.set_ylim(-0.02, 1.02)
    for column, style, tone, label in (
        ("train_below_5", "o-", "#0072B2", "train error below 5 %"),
        ("test_below_5", "s-", "#D55E00", "test error below 5 %"),
    ):
        known = {}
        for elr, rows in of_elr.items():
            epochs = [row[column] for row in rows if math.isfinite(row[column])]
            if epochs:
                known[elr] = epochs
        figures.spread(time, list(known), list(known.values()), style, color=tone, label=label)
    time.set(yscale="log", ylabel="epoch")
    time.set_title("(b) first epoch (of the seeds that get there)", pad=30)
    for ax in (error, time):
        figures.bands(ax, list(of_elr), names)
        ax.set(xlabel="ELR")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    fig.suptitle("addition modulo 31, transformer of width 64; grey: undecided")
    figures.save(fig, ROOT / "docs" / "modular.png")


# ------------------------------------------------------- tasks: angle, ELR, learning rate of others


def errors_of(task, logs, optimizers):
    """Kind of training → its values → test errors of the seeds at the end of the task's epochs, or
    where the loss was no longer finite."""
    found = {kind: {} for kind in KINDS}
    for folder in (TASKS[task], f"{TASKS[task]}-cos"):
        for run in regimes.read_folder(logs / folder):
            kind = "angle" if run.path.name.startswith("angle") else "constant"
            if folder.endswith("-cos"):
                kind = "cosine"
            up_to_end = run.log["epoch"] <= (EPOCHS if task == "modular 31" else 20)
            error = float(run.log["test_error"][up_to_end][-1])
            found[kind].setdefault(value_of(run.path), []).append(error)
    for row in optimizers:
        if row["task"] == task:
            error = float(row["test_error"])
            found[row["optimizer"]].setdefault(float(row["lr"]), []).append(error)
    return {kind: dict(sorted(of_value.items())) for kind, of_value in found.items()}


def best(of_value):
    """The least median over the seeds, and where."""
    value = min(of_value, key=lambda v: (np.median(of_value[v]), np.mean(of_value[v]), v))
    return f"{np.median(of_value[value]):.3f} ({value:g})"


def angle(logs):
    """Test error at the end against φ₀, ELR and learning rate, task by task."""
    with open(next((ROOT / "benchmarks").glob("optimizers-*.csv")), newline="") as file:
        optimizers = list(csv.DictReader(file))
    fig, axes = figures.subplots([list("abcde")], (13, 3.4), apart=0.35)
    written = []
    names = ["best cosine ELR", "best constant ELR", "AdamW", "SGD"]
    heads("task", "φ₀ = 0.01", *(f"{value:g}" for value in ANGLES[1:]), *names)
    for key, task in zip("abcde", TASKS, strict=True):
        found, ax = errors_of(task, logs, optimizers), axes[key]
        for kind, of_value in found.items():
            style, tone, label = KINDS[kind]
            errors = list(of_value.values())
            figures.spread(ax, list(of_value), errors, style, color=tone, label=label)
            for value, of_seeds in of_value.items():
                row = {"task": task, "kind": kind, "value": value}
                written += [row | {"test_error": error} for error in of_seeds]
        ax.set(xscale="log", title=task, xlabel="φ₀, ELR or learning rate")
        figures.errors(ax)
        cells = [f"{np.median(found['angle'][value]):.3f}" for value in ANGLES]
        line(task, *cells, *(best(found[kind]) for kind in list(KINDS)[1:]))
    handles, labels = axes["a"].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", ncol=5, bbox_to_anchor=(0.5, 0.93))
    fig.suptitle("test error at the end, medians of three seeds, least and greatest")
    figures.save(fig, ROOT / "docs" / "angle.png")
    regimes.write_csv(ROOT / "benchmarks" / "angle.csv", written)


# ------------------------------------------------------------------- tables of the guide alone


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
            log = regimes.read_log(path)[0]
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


def others(logs):
    heads("task", "value: test error at the end, median (range) over the seeds")
    for folder, name in OTHERS.items():
        pattern = "*.then=*.csv" if folder.endswith("then") else "angle=*.csv"
        found = {}
        for path in sorted((logs / folder).glob(pattern)):
            if not path.name.endswith(".layers.csv"):
                error = regimes.read_log(path)[0]["test_error"][-1]
                found.setdefault(value_of(path), []).append(error)
        line(name, "; ".join(f"{value:g}: {middle(x)}" for value, x in sorted(found.items())))


def main():
    parser = regimes.Parser(prog="draw.py", description=__doc__)
    parser.add_argument("logs", type=Path, metavar="LOGS", help="the folder of the guide's logs")
    logs = parser.parse_args().logs
    folders = {*TASKS.values(), *(f"{name}-cos" for name in TASKS.values()), *SIZES, *OTHERS}
    for name in sorted(folders | {*WITH_BOUNDARIES, "mod31-wd2", "mod31-wd3"}):
        if not (logs / name).is_dir():
            parser.error(f"argument LOGS: {logs / name} is not there: its command is in the guide")
    for part in (modular, angle, sizes, whole_space, boundary_angles, others):
        part(logs)


if __name__ == "__main__":
    main()
