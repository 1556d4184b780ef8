"""The paper's toy, whose regimes are known exactly: all ELRs, seeds and groups in one array.

    python -m lab.toy --alphas 1 2 4 --seeds 3 --refine 4

F(θ) = Σ α_i x_i²/(x_i² + y_i²), with all groups (x_i, y_i) on one sphere, here of radius 1. Each
group is scale invariant, as a layer is. Gradient descent can converge if and only if the ELR η̃ is
below η̃* = 1/Σα; a random point has E F = Σα/2. Above η̃* there is an orbit of period 2:

    A group's own ELR is η̃_i = η̃/r_i². A step mirrors it, x_i/y_i → −x_i/y_i, if
    2F_i = α_i − 1/η̃_i. All groups must grow alike, so r_i² = α_i/Σα, hence 1/η̃_i = α_i η̃*/η̃:
    F_i = (α_i/2)(1 − η̃*/η̃),    F = (Σα − 1/η̃)/2,    skill = 1 − F/(Σα/2) = η̃*/η̃.

Means over a run are these to five digits up to 1.5 η̃*; above, the path is chaotic. Kodryan
et al., NeurIPS 2022 (arXiv 2209.03695); the orbit is ours.
"""

import math
from pathlib import Path

import numpy as np

import regimes
from lab import figures

LENGTH = 200  # rows of a log


def descend(theta, alphas, elr):
    """One step of all runs: theta [..., groups, 2] of norm 1, elr [..., 1, 1]. Returns the new
    theta, F_i [..., groups] before the step, and its angle φ [...]."""
    x, y = theta[..., 0], theta[..., 1]
    square = x * x + y * y
    slope = 2 * alphas * x * y / (square * square)
    gradient = np.stack([slope * y, -slope * x], -1)  # along the sphere, as F is scale invariant
    new = theta - elr * gradient
    length = np.sqrt((new * new).sum((-1, -2), keepdims=True))
    turn = np.sqrt(np.maximum(length[..., 0, 0] ** 2 - 1, 0))  # tan φ
    return new / length, alphas * x * x / square, np.arctan(turn)


def simulate(alphas, elrs, seeds, steps):
    """A run for each ELR and seed, which is its start, with log and verdict."""
    alpha, total = np.array(alphas), sum(alphas)
    shape = len(alphas), 2
    starts = [np.random.default_rng(seed).standard_normal(shape) for seed in range(seeds)]
    theta = np.tile(np.stack(starts), (len(elrs), 1, 1, 1))  # [elrs, seeds, groups, 2]
    theta /= np.sqrt((theta * theta).sum((-1, -2), keepdims=True))
    elr = np.array(elrs)[:, None, None, None]
    first = descend(theta, alpha, elr)[1].sum(-1)
    ends = np.linspace(0, steps, min(LENGTH, steps) + 1).astype(int)
    losses, angles = [first], [np.zeros_like(first)]
    for begin, end in zip(ends, ends[1:], strict=False):
        loss, angle = 0.0, 0.0
        for _ in range(begin, end):
            theta, of_groups, turn = descend(theta, alpha, elr)
            loss, angle = loss + of_groups.sum(-1), angle + turn
        losses.append(loss / (end - begin))
        angles.append(angle / (end - begin))
    losses, angles = np.stack(losses, -1), np.stack(angles, -1)
    # Of a random point x²/(x² + y²) is the squared cosine of a uniform angle.
    chance = {"mean": total / 2, "std": math.sqrt(sum(a * a for a in alphas) / 8)}
    chance = {"points": 10**9, "train_loss": chance}
    runs = []
    for i, value in enumerate(elrs):
        for seed in range(seeds):
            log = {"epoch": ends.astype(float), "step": ends.astype(float)}
            log |= {"train_loss": losses[i, seed], "angle": angles[i, seed]}
            verdict = regimes.classify(log, chance)
            runs.append(regimes.Logged(Path("toy"), value, seed, log, verdict))
    return runs


def row_of(run, total):
    loss = float(run.log["train_loss"][len(run.log["epoch"]) // 2 + 1 :].mean())
    row = {"elr": run.elr, "seed": run.seed, "regime": run.verdict.regime, "loss": loss}
    row["theory"] = max(0.0, (total - 1 / run.elr) / 2)
    return row | {"skill": 1 - loss / (total / 2)}


def main(argv=None):
    text = "The paper's toy, beside its theory: toy.csv, toy.png."
    parser = regimes.Parser(prog="lab.toy", description=text)
    add = parser.add_argument
    add("--alphas", nargs="+", type=float, default=[1.0, 2.0, 4.0], help="(default: 1 2 4)")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--elr", nargs="+", type=float, help="ELRs")
    three = dict(nargs=3, type=float, default=[1e-2, 1e2, 13], metavar=("LO", "HI", "N"))
    which("--sweep", **three, help="log-spaced (default: 1e-2 1e2 13)")
    add("--seeds", type=int, default=1, metavar="K", help="starts (default: 1)")
    add("--refine", type=int, default=0, metavar="N", help="bisect both boundaries")
    add("--steps", type=int, default=20_000, metavar="N", help="(default: 20000)")
    add("--out", type=Path, default=Path("logs/toy"), metavar="DIR", help="(default: logs/toy)")
    args = parser.parse_args(argv)
    low, high, n = args.sweep
    if low >= high or n not in range(2, 10_001):
        parser.error("argument --sweep: it takes LO HI N with LO < HI and 2 ≤ N ≤ 10000")
    if not all(1e-38 < x < 1e38 for x in [*args.alphas, *(args.elr or [low, high])]):
        parser.error("argument --alphas, --elr, --sweep: they take numbers from 1e-38 to 1e38")
    if min(args.seeds, args.refine + 1, args.steps - 9) < 1:
        parser.error("argument --seeds, --refine, --steps: they are at least 1, 0, 10")
    args.out.mkdir(parents=True, exist_ok=True)
    grid = [float(f"{elr:.4g}") for elr in np.geomspace(low, high, int(n))]
    elrs = sorted(set(args.elr or grid))
    runs, total = [], sum(args.alphas)
    for _ in range(args.refine + 1):
        runs += simulate(args.alphas, elrs, args.seeds, args.steps)
        done, elrs = {run.elr for run in runs}, []
        for boundary in regimes.boundaries(runs):
            middle = float(f"{math.sqrt(boundary.low * boundary.high):.6g}")
            if boundary.seen and middle not in done:  # a middle that is done is undecided
                elrs.append(middle)
    rows = [row_of(run, total) for group in regimes.by_elr(runs).values() for run in group]
    regimes.write_csv(args.out / "toy.csv", rows)
    figures.of_toy(rows, args.alphas, args.out / "toy.png")
    print("       ELR  regime                         F       theory    skill")
    for row in rows:
        cells = f"{regimes.elr_name(row['elr']):>10}  {regimes.title(row['regime']):<19}"
        print(f"{cells}  {row['loss']:11.6g}  {row['theory']:11.6g}  {row['skill']:7.4f}")
    for boundary in regimes.boundaries(runs):
        print(boundary)
    print(f"theory: convergence below 1/Σα = {1 / total:.6g}")
    print(f"written: {args.out / 'toy.csv'}, {args.out / 'toy.png'}")
    return 0


if __name__ == "__main__":
    regimes.finish(main)
