"""The measurements of docs/findings.md that train.py alone does not make, by its own loop over
epochs. Each adds rows to benchmarks/loop-WHAT.csv and goes on where it was interrupted.

    python docs/loops.py up      a loop that begins with the way up, from random weights
    python docs/loops.py hold    how long a network that was cooled slowly stays converged when held
    python docs/loops.py escape  such an escape, step by step: loss, γ, ELR times batch sharpness
    python docs/loops.py cold    few digits: test error at the cold end of a descent
    python docs/loops.py full    few digits, whole batches: a loop, and λ_max at each ELR
    python docs/loops.py edge logs/digits-convnet    ELR times batch sharpness at the ends of runs
    python docs/loops.py speeds logs/digits-convnet-loop  hysteresis against the speed
"""

import argparse
import contextlib
import csv
import io
import itertools
import math
import sys
import tempfile
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import chi2, poisson

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import optimizers  # noqa: E402

import regimes  # noqa: E402
import train  # noqa: E402
from lab import curvature, loop, runs  # noqa: E402
from lab.experiment import prepare  # noqa: E402
from lab.options import Config, parse  # noqa: E402

GRID = ["1e-4", "0.0316", "16"]  # of the loop: six ELRs a decade, up to the edge of divergence
HELD = (0.0046, 0.0056, 0.0068, 0.0083, 0.01, 0.0121, 0.0147, 0.0178)  # ELRs of cold ends
LONGEST = 200  # epochs
LATE = 100  # epochs, up to which the rates are fitted that foretell the escapes of later ones
SHAPES = np.geomspace(0.2, 3, 41)  # of Weibull distributions; 1 is the exponential
THROWN = 0.1  # loss of a batch that has thrown a network out
ESCAPE = 0.0068  # the ELR at which an escape is looked at step by step
EVERY = 3  # steps between two measurements of batch sharpness
ESCAPED = 10.0  # times the loss at the start of the hold, which is that of the cold end
CROSSED = 0.03  # loss between those of converged and of hovering networks, on the digits
BELOW = 0.02  # ELR up to which the area between the ways counts: no divergence
WHOLE_BATCHES = ["1e-3", "0.0681", "12"]  # the loop of whole batches
DESCENTS = (("1e-4", "0.1"), ("1e-3", "0.1"), ("1e-4", "0.03"), ("1e-3", "0.03"))


@cache
def prepared(*argv):
    """Options, data and spheres of train.py."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        return prepare(parse([*argv, "--threads", "1", "--device", "cpu", "--out", out]))


@contextlib.contextmanager
def new_run(argv, value, seed, init=None, kind=train.Run):
    """A run of train.py, not yet trained, with a log that is forgotten."""
    with tempfile.TemporaryDirectory() as out:
        yield kind(prepared(*argv), runs.Job(value, seed, Path(out) / "log.csv", "", init))


def train_until(run, epochs):
    """Train up to so many epochs. Returns the rows of the log, of epoch 0, too."""
    run.epochs = epochs
    train.train(run, tell=lambda *_, **__: None)
    return regimes.read_log(run.path)


class UpFirst(train.Run):
    """A loop that begins with its way up."""

    def set_lr(self):
        way_down = self.config.passes * (int(self.config.loop[2]) - 1)
        self.epoch += way_down
        super().set_lr()
        self.epoch -= way_down


def up(table, seeds, passes):
    """Rows of the way up from random weights."""
    for seed in range(seeds):
        if table.has(passes, seed):
            continue
        argv = ["--loop", *GRID, "--epochs", str(passes)]
        with new_run(argv, 1.0, seed, kind=UpFirst) as run:
            log = train_until(run, passes * int(GRID[2]))
        columns = (log[name] for name in ("epoch", "elr", "train_loss", "train_error"))
        table.add([(passes, seed, *row) for row in zip(*columns, strict=True)])


def hold(table, seeds, passes, data):
    """A row per network that is held at an ELR from a cold end on, until it escapes: each cold end
    at each ELR, with an order of the batches of its own."""
    for seed, (i, elr) in itertools.product(range(seeds), enumerate(HELD)):
        if table.has(data, passes, seed, elr):
            continue
        init, edge = cold_end(passes, seed, "--data", data)
        order = 1000 * (i + 1) + seed
        with new_run(["--elr", "1", "--data", data], elr, order, init) as run:
            log = hold_until_escape(run)
        loss = log["train_loss"]
        row = (order, log["epoch"][-1], int(escaped(loss)), edge, loss[0], loss[-1])
        table.add([(data, passes, seed, elr, *row)])


def escaped(loss):
    return loss[-1] > max(ESCAPED * loss[0], CROSSED)


def hold_until_escape(run):
    """Train epoch by epoch. Returns the log."""
    log = train_until(run, 1)
    while log["epoch"][-1] < LONGEST and not escaped(log["train_loss"]):
        log = train_until(run, run.epoch + 1)
    return log


def escape(table, seeds, passes):
    """A row per step of networks held at ESCAPE from a cold end on, until they escape."""
    for seed in range(seeds):
        if not table.has(passes, seed):
            init, _ = cold_end(passes, seed)
            with new_run(["--elr", "1"], ESCAPE, 1000 + seed, init) as run:
                table.add([(passes, seed, *row) for row in steps_until_escape(run)])


def steps_until_escape(run):
    """Step, loss of the batch on which it is, γ, and ELR times the curvature along γ."""
    n, size, rows = len(run.data.x), run.config.batch_size, []
    order, steps = torch.Generator().manual_seed(run.identity["seed"]), itertools.count()
    train.batches(n, size, order)  # those of epoch 0

    @torch.enable_grad()
    def look(*_):
        nonlocal indices
        step = next(steps)
        if step % (n // size) == 0:
            indices = train.batches(n, size, order)
        found, square, loss = curvature.curvature_along_gradient(run, indices[step % (n // size)])
        rows.append((step, loss, math.sqrt(square), run.value * found))

    indices = []
    run.sphere_sgd.register_step_pre_hook(look)
    hold_until_escape(run)
    return rows


def few_digits():
    """The path of the file."""
    optimizers.FEW_DIGITS.parent.mkdir(exist_ok=True)
    optimizers.few_digits(optimizers.FEW_DIGITS)
    return str(optimizers.FEW_DIGITS)


def cold(table, seeds):
    """Test errors after 40 epochs of descent, one at each of 40 ELRs, on the few digits."""
    for low, high in DESCENTS:
        for seed in range(seeds):
            if table.has(float(low), float(high), seed):
                continue
            argv = ["--data", few_digits(), "--loop", low, high, "40"]
            with new_run(argv, 1.0, seed) as run:
                log = train_until(run, 40)
            ends = log["train_loss"][-1], log["test_error"][-1]
            table.add([(float(low), float(high), seed, *ends)])


def full(table, seeds, passes):
    """Rows of a loop on the few digits whose batches are the whole training set, a step each: at
    each ELR the loss at its end, and λ_max there."""
    for seed in range(seeds):
        if table.has(passes, seed):
            continue
        argv = [
            "--data",
            few_digits(),
            "--batch-size",
            "360",
            "--loop",
            *WHOLE_BATCHES,
            "--epochs",
            "1",
        ]
        with new_run(argv, 1.0, seed) as run:
            table.add([(passes, seed, *row) for row in down_and_up(run, passes)])


def down_and_up(run, steps):
    everything = torch.arange(len(run.data.x))
    for place in range(run.epochs):
        run.epoch = place
        run.set_lr()
        for _ in range(steps):
            loss, *_ = train.train_step(run, everything)
        sharpness = curvature.largest(curvature.operators(run)["hessian"], 1)[0]
        yield run.leg, run.lr, loss.item(), sharpness


# ------------------------------------------------------------------------------------ the edge


def sharpness_on_the_way(run, epochs, every):
    """Train so many epochs; before every so many-th step the curvature of a random batch. Returns
    [3, measured] as `curvature_along_gradient`, and the mean train loss of the epochs."""
    generator = torch.Generator().manual_seed(run.identity["seed"])
    n, size, found, steps = len(run.data.x), run.config.batch_size, [], itertools.count()

    @torch.enable_grad()
    def look(*_):
        if next(steps) % every == 0:
            index = train.batches(n, size, generator)[0]
            found.append(curvature.curvature_along_gradient(run, index))

    run.sphere_sgd.register_step_pre_hook(look)
    log = train_until(run, epochs)
    return np.array(found).T, log["train_loss"][1:].mean()


@cache
def cold_end(passes, seed, *options):
    """The weights at the cold end of a loop's way down, and 2 over their batch sharpness."""
    with new_run(["--loop", *GRID, "--epochs", str(passes), *options], 1.0, seed) as run:
        train_until(run, passes * int(GRID[2]))
        indices = train.batches(len(run.data.x), run.config.batch_size, run.random.order)
        run.net.train()
        found = np.mean([curvature.curvature_along_gradient(run, index)[0] for index in indices])
        return {"net": run.net.state_dict(), "checksum": ""}, 2 / found


def edge(table, folders):
    """A row per run of these folders at a fixed ELR, which is trained one epoch longer: ELR times
    batch sharpness. mean: of the curvatures; weighted: by the squares of the gradients."""
    for folder in folders:
        for found in itertools.chain(*regimes.by_elr(regimes.gather([folder])[0]).values()):
            if found.verdict.moves or table.has(folder.name, found.elr, found.seed):
                continue
            init = runs.load_checkpoint(found.path.with_suffix(".pt"), "cpu")
            options = {one.name: init["identity"].get(one.name) for one in fields(Config)}
            options = {name: x for name, x in options.items() if x is not None}
            with tempfile.TemporaryDirectory() as out:
                config = Config(**options | dict(elr=[found.elr], out=Path(out), threads=1))
                config.device = "cpu"
                job = runs.Job(found.elr, 1000 + found.seed, Path(out) / "log.csv", "", init)
                run = train.Run(prepare(config), job)
                (sharp, weight, _), loss = sharpness_on_the_way(run, 1, EVERY)
            weighted = (sharp * weight).sum() / weight.sum()
            values = sharp.mean(), sharp.std(ddof=1) / math.sqrt(len(sharp)), weighted
            row = folder.name, found.elr, found.seed, found.verdict.regime, loss
            table.add([(*row, *(found.elr * value for value in values))])


# ----------------------------------------------------------------------------------- the table


COLUMNS = {
    "up": "passes seed epoch elr train_loss train_error",
    "hold": "data passes seed elr order epochs escaped edge first_loss last_loss",
    "escape": "passes seed step loss grad_norm elr_sharpness",
    "cold": "low high seed train_loss test_error",
    "full": "passes seed leg elr train_loss sharpness",
    "speeds": "folder low high elrs passes seed level down up area",
    "edge": "folder elr seed regime train_loss mean error weighted",
}


class Table:
    """A CSV file that grows; `has` tells whether rows begin with these cells. `groups`: rows as
    dicts of numbers and names, by the values of these columns."""

    def __init__(self, name):
        self.path = ROOT / "benchmarks" / f"loop-{name}.csv"
        if not self.path.exists():
            self.path.write_bytes(regimes.csv_lines([COLUMNS[name].split()]))

    def rows(self, first=1):
        with open(self.path, newline="") as file:
            return list(csv.reader(file))[first:]

    def has(self, *cells):
        (line,) = regimes.csv_lines([cells]).decode().splitlines()
        return any(",".join(row).startswith(line + ",") for row in self.rows())

    def add(self, rows):
        with open(self.path, "ab") as file:
            file.write(regimes.csv_lines(rows))

    def groups(self, *columns):
        found, head = {}, self.rows(0)[0]
        for cells in self.rows():
            row = {name: number_or_name(x) for name, x in zip(head, cells, strict=True)}
            found.setdefault(tuple(row[name] for name in columns), []).append(row)
        return dict(sorted(found.items()))


def number_or_name(cell):
    try:
        return float(cell)
    except ValueError:
        return cell


def column(rows, name):
    return np.array([row[name] for row in rows])


def show(name, table):
    """What the rows say, as a table."""
    if name == "up":
        for (passes, elr), rows in table.groups("passes", "elr").items():
            late = [row for row in rows if row["epoch"] and row["epoch"] % passes == 0]
            losses = " ".join(f"{loss:.3g}" for loss in column(late, "train_loss"))
            print(f"{passes:g} passes, ELR {elr:.3g}: train loss {losses}")
    if name == "hold":
        for (data, passes), rows in table.groups("data", "passes").items():
            print(f"from the cold end of {passes:g} passes at each ELR, {data}")
            show_lives(rows)
    if name == "escape":
        for (_, seed), rows in table.groups("passes", "seed").items():
            show_escape(seed, rows)
    if name == "cold":
        for (low, high), rows in table.groups("low", "high").items():
            print(f"{high:g} to {low:g}: test error {mean(column(rows, 'test_error'), 4)}", end="")
            print(f", {len(rows)} seeds; train loss {mean(column(rows, 'train_loss'), 4)}")
    if name == "speeds":
        for (folder, level), rows in table.groups("folder", "level").items():
            print(f"{folder}: loop, passes, seeds, down and up cross {level:g}, ratio, area")
            show_speeds(rows)
    if name == "full":
        for (passes, leg, elr), rows in table.groups("passes", "leg", "elr").items():
            loss = " ".join(f"{x:.2g}" for x in column(rows, "train_loss"))
            edge = " ".join(f"{elr * x / 2:.2g}" for x in column(rows, "sharpness"))
            print(f"{passes:g} steps, {leg}, ELR {elr:.3g}: loss {loss}; ELR × λ_max / 2 {edge}")
    if name == "edge":
        for row in itertools.chain(*table.groups("folder", "elr", "seed").values()):
            shown = "{folder:16} {elr:8.3g} {seed:g} {regime:12} loss {train_loss:9.3g}"
            print(f"{shown}  {{mean:9.3g}} ± {{error:.2g}} ({{weighted:.3g}})".format(**row))


def show_lives(rows):
    """Lives in epochs by ELR and by cold end, and whether they are exponential."""
    for name in ("elr", "seed"):
        for value in sorted({row[name] for row in rows}):
            held = [row for row in rows if row[name] == value]
            if name == "seed":
                loss, edge = np.median(column(held, "first_loss")), held[0]["edge"]
                print(f"loss {loss:.2g}, 2 over batch sharpness {edge:.2g}", end=", ")
            each = [f"{row['epochs']:g}{'' if row['escaped'] else '+'}" for row in held]
            epochs, out = column(held, "epochs").sum(), column(held, "escaped").sum()
            mean = f"{epochs / out:.3g} epochs an escape" if out else f"none in {epochs:g} epochs"
            print(f"{name} {value:g}: {' '.join(each)}; {mean}, {out:g} of {len(held)}")
    alike, own = len(rows) * [0], column(rows, "seed")
    for name, ends in {"alike": alike, "each with a scale of its own": own}.items():
        fits = [fit_lives(rows, ends, shape) for shape in SHAPES]
        fit, powers = np.array([(likelihood, power) for likelihood, power, _ in fits]).T
        best, inside = fit.argmax(), SHAPES[fit > fit.max() - chi2.ppf(0.95, 1) / 2]
        p = chi2.sf(2 * (fit[best] - np.interp(1, SHAPES, fit)), 1)
        shape = f"{SHAPES[best]:.2f} ({inside[0]:.2f} to {inside[-1]:.2f})"
        print(f"Weibull, cold ends {name}: scale as ELR to the power {-powers[best]:.1f}", end=", ")
        print(f"shape {shape}; that it is 1, exponential: p = {p:.2g}")
    show_late(rows)


def show_escape(seed, rows):
    """The batch that throws a network out, and whether the fifty steps before it foretell it."""
    loss, gamma, edge = (column(rows, x) for x in ("loss", "grad_norm", "elr_sharpness"))
    out = np.argmax(loss > THROWN)
    before = {"in the 50 steps before": slice(out - 50, out), "earlier": slice(out - 50)}
    after = " ".join(f"{x:.2g}" for x in loss[out : out + 4])
    print(f"seed {seed:g}: batches from step {out} on have losses {after}", end="; before it ")
    print(f"the median is {np.median(loss[:out]):.2g}, the largest {max(loss[:out]):.2g}")
    for name, part in before.items():
        share = np.mean(edge[part] > 2)
        print(f"    {name}: median γ {np.median(gamma[part]):.2g}, edge above 2 in {share:.1%}")


def show_late(rows):
    """Escapes after epoch LATE, and how many of them constant rates, fitted up to it, foretell."""
    epochs, late = column(rows, "epochs"), column(rows, "epochs") > LATE
    if not late.any():
        return
    cut = [dict(row) for row in rows]
    for row in itertools.compress(cut, late):
        row.update(epochs=LATE, escaped=0)
    *_, rates = fit_lives(cut, column(rows, "seed"), 1.0)
    foretold = (rates * (epochs - LATE))[late].sum()
    seen = column(rows, "escaped")[late].sum()
    p = poisson.cdf(seen, foretold)
    print(f"{late.sum()} lives went on after epoch {LATE}: {seen:g} escapes", end=", ")
    print(f"{foretold:.1f} foretold by constant rates (p = {p:.1g})")


def fit_lives(rows, ends, shape):
    """Weibull distributions whose scale is a power of the ELR, times a factor of each of the `ends`
    [row]: log likelihood, power, 1 over the scales [row]. An epoch tells only that it was in it."""
    elrs, groups = np.log(column(rows, "elr") / HELD[0]), np.unique(ends, return_inverse=True)[1]
    epochs, out = column(rows, "epochs"), column(rows, "escaped") == 1

    def rates(p):
        return np.exp(p[0] * elrs - p[1:][groups])

    def loss(p):
        before, now = ((rates(p) * (epochs - x)) ** shape for x in (1, 0))
        within = np.log(np.maximum(-np.expm1(before - now), 1e-300)) - before
        return -np.where(out, within, -now).sum()

    start = np.full(groups.max() + 2, 4.0)
    best = minimize(loss, start, bounds=[(0, 20)] + [(-4, 14)] * (len(start) - 1))
    return -best.fun, best.x[0], rates(best.x)


def crossing(elrs, loss, level):
    """The lowest ELR [log-interpolated] at which a leg rises through this loss."""
    over = np.flatnonzero(loss > level)
    if not len(over) or over[0] == 0:
        return math.nan
    i, (x, y) = over[0], np.log((elrs, loss))
    t = (math.log(level) - y[i - 1]) / (y[i] - y[i - 1])
    return math.exp(x[i - 1] + t * (x[i] - x[i - 1]))


def speeds(table, folders, level):
    """A row per loop of these folders: where its legs cross a loss, and the area between them, log
    loss over log₁₀ ELR, up to the ELR BELOW."""
    for folder in folders:
        for path in sorted(folder.glob("loop=*.csv")):
            run = None if ".layers" in path.name else runs.read_run(path)
            if run and loop.is_loop(run.log):
                elrs, loss = loop.legs([run.log], "train_loss")
                passes = loop.classify_loop([run.log]).passes
                row = folder.name, elrs[0], elrs[-1], len(elrs), passes, run.seed, level
                if np.isnan(loss).any() or table.has(*row):
                    continue
                ends = [crossing(elrs, leg, level) for leg in loss]
                y, inside = np.log(loss), elrs < BELOW
                area = np.trapezoid((y[0] - y[1])[inside], np.log10(elrs)[inside])
                table.add([(*row, *ends, area)])


def show_speeds(rows):
    """Means over seeds by passes at each ELR; how the area grows with each doubling of them."""
    slopes, loops = [], {}
    for row in rows:
        key = row["passes"], row["low"], row["high"], row["elrs"]
        loops.setdefault(key, []).append(row)
    for (passes, *grid), found in sorted(loops.items()):
        down, up, area = (column(found, name) for name in ("down", "up", "area"))
        shown = " | ".join(geometric(x) for x in (down, up, up / down))
        loop_of = " ".join(f"{x:g}" for x in grid)
        print(f"| {loop_of} | {passes:g} | {len(found)} | {shown} | {mean(area)} |")
    for seed in sorted({row["seed"] for row in rows}):
        found = [row for row in rows if row["seed"] == seed]
        if len(found) > 1:
            slopes.append(np.polyfit(np.log2(column(found, "passes")), column(found, "area"), 1)[0])
    if slopes:
        print(f"each doubling adds to the area {mean(np.array(slopes))}, {len(slopes)} seeds")


def mean(x, digits=2):
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return f"{x.mean():.{digits}f} ± {error:.{digits}f}"


def geometric(x):
    """Mean and standard error as factors, and the range; without nan, where a leg never crosses."""
    crossed = x[~np.isnan(x)]
    if not len(crossed):
        return "–"
    y = np.log(crossed)
    error = math.exp(y.std(ddof=1) / math.sqrt(len(y))) if len(y) > 1 else math.nan
    shown = f"{math.exp(y.mean()):.3g} ×/÷ {error:.2f} ({crossed.min():.3g} to {crossed.max():.3g}"
    return f"{shown}; {len(crossed)} of {len(x)} seeds)"


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("name", choices=COLUMNS)
    add("folders", nargs="*", type=Path, help="of logs, for edge and speeds")
    add("--seeds", type=int, default=3, metavar="K", help="0 to K - 1 (default: 3)")
    add("--passes", type=int, default=4, metavar="N", help="at each ELR of a loop (default: 4)")
    add("--data", default="digits", help="for hold (default: digits)")
    text = f"for speeds: the loss that says where the ways freeze and melt (default: {CROSSED})"
    add("--level", type=float, default=CROSSED, metavar="LOSS", help=text)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table, seeds = Table(args.name), args.seeds
    ways = {
        "up": lambda: up(table, seeds, args.passes),
        "hold": lambda: hold(table, seeds, args.passes, args.data),
        "escape": lambda: escape(table, seeds, args.passes),
        "cold": lambda: cold(table, seeds),
        "full": lambda: full(table, seeds, args.passes),
        "speeds": lambda: speeds(table, args.folders, args.level),
        "edge": lambda: edge(table, args.folders),
    }
    ways[args.name]()
    show(args.name, table)


if __name__ == "__main__":
    main()
