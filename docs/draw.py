"""Draw docs/modular.png and docs/angle.png, and print their tables, from the logs of the commands
in the guide: python docs/draw.py LOGS"""

import csv
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import figures  # noqa: E402
import regimes  # noqa: E402

TASKS = {  # folder with angles and constant ELRs, folder with a cosine of ELRs
    "digits, convnet": ("digits3", "digits-cos"),
    "digits, resnet18": ("r8", "r8-cos"),
    "digits, half wrong": ("noise", "noise-cos"),
    "digits, MLP": ("mlp", "mlp-cos"),
    "modular 31": ("mod31", "mod31-cos"),
}


def first_below(run: regimes.Run, column: str, level: float = 0.05) -> float:
    epochs = run.log["epoch"][run.log[column] < level]
    return float(epochs[0]) if len(epochs) else math.inf


def after(run: regimes.Run, epoch: int, column: str = "test_error") -> float:
    """A column after so many epochs: the mean of the ten rows up to there."""
    log = run.log
    rows = (log["epoch"] <= epoch) & (log["epoch"] > epoch - 10)
    return float(log[column][rows].mean()) if log["epoch"][-1] >= epoch else math.nan


def converged(run: regimes.Run, epoch: int) -> bool:
    """Whether the run had converged after so many epochs."""
    log = {name: x[run.log["epoch"] <= epoch] for name, x in run.log.items()}
    return regimes.classify(log, CHANCE.get(str(run.seed))).regime == "convergence"


CHANCE = {}


def modular(logs: Path) -> None:
    CHANCE.update(regimes.read_chance(logs / "mod31"))
    groups = regimes.by_elr(regimes.read_folder(logs / "mod31"))
    rows = []
    print("| ELR | converged after 400 epochs | test error of those, median (range) | of all |"
          " train error < 5 % at | test error < 5 % at |")  # fmt: skip
    for elr, group in groups.items():
        for run in group:
            row = {"elr": elr, "seed": run.seed, "regime": run.verdict.regime}
            row |= {f"test_error_{e}": after(run, e) for e in (100, 400, 1600)}
            row |= {f"converged_{e}": float(converged(run, e)) for e in (100, 400)}
            row["train_below_5"] = first_below(run, "train_error")
            row["test_below_5"] = first_below(run, "test_error")
            row["angle_400"] = after(run, 400, "angle")
            rows.append(row)
        here = [row for row in rows if row["elr"] == elr]
        good = [row["test_error_400"] for row in here if row["converged_400"]]
        text = f"{np.median(good):.3f} ({min(good):.3f} to {max(good):.3f})" if good else "–"
        of_all = [row["test_error_400"] for row in here]
        times = [
            np.median([row[name] for row in here]) for name in ("train_below_5", "test_below_5")
        ]
        cells = [f"{elr:g}", f"{len(good)} of {len(here)}", text, f"{np.nanmedian(of_all):.3f}"]
        print("| " + " | ".join(cells + [f"{x:g}".replace("inf", "–") for x in times]) + " |")
    write("modular.csv", rows)
    fig, axes = figures.subplots([["a", "b"]], (12.5, 5))
    fig.subplots_adjust(bottom=0.23)
    elrs = list(groups)
    names = [regimes.majority(group)[0] for group in groups.values()]
    for key in ("a", "b"):
        figures.bands(axes[key], elrs, names)
        axes[key].set(xlabel="ELR")
    for column, style, tone in ((100, "o:", "#56B4E9"), (1600, "^--", "#D55E00")):
        name = f"test_error_{column}"
        known = [e for e in elrs if any(r[name] == r[name] for r in rows if r["elr"] == e)]
        values = [[r[name] for r in rows if r["elr"] == e and r[name] == r[name]] for e in known]
        middle = [np.median(v) for v in values]
        axes["a"].plot(known, middle, style, color=tone, label=f"after {column:,} epochs, median")
    for wanted, face, label in ((1, "black", "converged"), (0, "white", "not converged")):
        some = [(r["elr"], r["test_error_400"]) for r in rows if r["converged_400"] == wanted]
        look = dict(ls="", marker="s", ms=5, mfc=face, mec="black", zorder=3)
        axes["a"].plot(*zip(*some, strict=True), **look, label=f"after 400 epochs, {label}")
    axes["a"].set_title("(a) test error, a square per seed", pad=30)
    axes["a"].set_ylim(-0.02, 1.02)
    axes["a"].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    for column, style, tone, label in (
        ("train_below_5", "o-", "#0072B2", "train error below 5 %"),
        ("test_below_5", "s-", "#D55E00", "test error below 5 %"),
    ):
        known = {
            e: [r[column] for r in rows if r["elr"] == e and math.isfinite(r[column])] for e in elrs
        }
        known = {e: values for e, values in known.items() if values}
        figures.spread(axes["b"], list(known), list(known.values()), style, color=tone, label=label)
    axes["b"].set(yscale="log", ylabel="epoch")
    axes["b"].set_title("(b) first epoch (of the seeds that get there)", pad=30)
    axes["b"].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    fig.suptitle("addition modulo 31, transformer of width 64")
    figures.save(fig, ROOT / "docs" / "modular.png")


def angle(logs: Path) -> None:
    """Test error at the end against φ₀, ELR and learning rate, task by task."""
    fig, axes = figures.subplots([list("abcde")], (17, 3.8), apart=0.35)
    others, rows = {}, []
    path = next((ROOT / "benchmarks").glob("optimizers-*.csv"), None)
    if path:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                key = row["task"].replace("digits,", "digits,"), row["optimizer"], float(row["lr"])
                others.setdefault(key, []).append(float(row["test_error"]))
    heads = ["task", "φ₀ = 0.01", "0.02", "0.05", "0.1", "0.2"]
    heads += ["best cosine ELR", "best constant ELR", "AdamW", "SGD"]
    print("| " + " | ".join(heads) + " |")
    for key, (task, (folder, cosine)) in zip("abcde", TASKS.items(), strict=True):
        ends = {"angle": {}, "cosine": {}, "constant": {}, "adamw": {}, "sgd": {}}
        for run in regimes.read_folder(logs / folder) if (logs / folder).exists() else ():
            value = float(run.path.stem.split("=")[1].removesuffix(".seed"))
            kind = "angle" if run.path.name.startswith("angle") else "constant"
            epoch = 400 if folder == "mod31" else 20
            error = run.log["test_error"][run.log["epoch"] == epoch]
            if len(error):
                ends[kind].setdefault(value, []).append(float(error[0]))
        for run in regimes.read_folder(logs / cosine) if (logs / cosine).exists() else ():
            value = float(run.path.stem.split("=")[1].removesuffix(".seed"))
            ends["cosine"].setdefault(value, []).append(float(run.log["test_error"][-1]))
        for (name, kind, lr), values in others.items():
            if name == task or (name == "digits" and task == "digits, convnet"):
                ends[kind][lr] = values
        ax = axes[key]
        looks = {
            "angle": ("o-", "#D55E00", "cosine from the angle φ₀"),
            "cosine": ("s--", "#0072B2", "cosine from an ELR"),
        }
        looks |= {
            "constant": ("^:", "#009E73", "constant ELR"),
            "adamw": ("d-.", "#000000", "AdamW"),
            "sgd": ("v-.", "#999999", "SGD, momentum"),
        }
        for kind, (style, tone, label) in looks.items():
            values = dict(sorted(ends[kind].items()))
            if values:
                figures.spread(
                    ax, list(values), list(values.values()), style, color=tone, label=label
                )
            for value, found in values.items():
                rows += [
                    {"task": task, "kind": kind, "value": value, "test_error": x} for x in found
                ]
        ax.set(xscale="log", title=task, xlabel="φ₀, ELR or learning rate")
        figures.errors(ax)

        def best(kind: str, ends: dict = ends) -> str:
            if not ends[kind]:
                return "–"
            ranked = [(np.median(x), np.mean(x), value) for value, x in ends[kind].items()]
            value = min(ranked)[2]
            return f"{np.median(ends[kind][value]):.3f} ({value:g})"

        cells = [
            f"{np.median(ends['angle'][v]):.3f}" if v in ends["angle"] else "–"
            for v in (0.01, 0.02, 0.05, 0.1, 0.2)
        ]
        print(
            "| "
            + " | ".join([task, *cells, *(best(k) for k in ("cosine", "constant", "adamw", "sgd"))])
            + " |"
        )
    handles, labels = axes["a"].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", ncol=5, bbox_to_anchor=(0.5, 0.93))
    fig.suptitle("test error at the end, medians of three seeds, least and greatest")
    figures.save(fig, ROOT / "docs" / "angle.png")
    write("angle.csv", rows)


def sizes(logs: Path) -> None:
    """Modular addition at other sizes: per ELR how many converge, and the test error of those."""
    print("| task | ELR: converged, median test error of those; or regime |\n| --- | --- |")
    names = {"mod23": "modulus 23", "mod43": "modulus 43", "mod31d32": "modulus 31, width 32"}
    for folder, name in names.items():
        cells = []
        for elr, group in regimes.by_elr(regimes.read_folder(logs / folder)).items():
            good = [run for run in group if run.verdict.regime == "convergence"]
            if good:
                error = np.median([run.final("test_error") for run in good])
                cells.append(f"{elr:g}: {len(good)} of {len(group)}, {error:.3f}")
            else:
                cells.append(f"{elr:g}: {regimes.title(regimes.majority(group)[0])}")
        print(f"| {name} | {'; '.join(cells)} |")


def boundary_angles(logs: Path) -> None:
    heads = ["task", "φ just above the convergence boundary"]
    heads += ["φ at the divergence boundary, below and above"]
    print("| " + " | ".join(heads) + " |")
    for name in ("digits3", "r8", "r4", "noise", "mlp", "mod31", "mod23", "mod43", "mod31d32"):
        if not (logs / name).exists():
            continue
        runs = regimes.read_folder(logs / name)
        groups = regimes.by_elr(runs)
        try:
            lower, upper = regimes.boundaries(runs)
        except ValueError as error:
            print(f"| {name} | {error} |")
            continue

        def phi(elr: float, groups: dict = groups) -> str:
            return (
                f"{np.median([run.final('angle') for run in groups[elr]]):.3g} ({elr:g})"
                if elr in groups
                else "–"
            )

        print(f"| {name} | {phi(lower.high)} | {phi(upper.low)}, {phi(upper.high)} |")


def write(name: str, rows: list[dict]) -> None:
    with open(ROOT / "benchmarks" / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})


if __name__ == "__main__":
    modular(Path(sys.argv[1]))
    angle(Path(sys.argv[1]))
    sizes(Path(sys.argv[1]))
    boundary_angles(Path(sys.argv[1]))
