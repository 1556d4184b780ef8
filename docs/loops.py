"""The measurements of docs/findings.md that train.py alone does not make, by its own loop over
epochs. Each adds rows to benchmarks/loop-WHAT.csv and goes on where it was interrupted.

    python docs/loops.py up      a loop that begins with the way up, from random weights
    python docs/loops.py hold    how long a network that was cooled slowly stays converged when held
    python docs/loops.py cold    few digits: test error at the cold end of a descent
    python docs/loops.py edge logs/digits-convnet    ELR times batch sharpness at the ends of runs
    python docs/loops.py speeds logs/digits-convnet  what the loops of a folder show, by speed
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
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import optimizers  # noqa: E402

import regimes  # noqa: E402
import train  # noqa: E402
from lab import landscape, loop, runs  # noqa: E402
from lab.experiment import prepare  # noqa: E402
from lab.options import Config, parse  # noqa: E402

GRID = ["1e-4", "0.0316", "16"]  # of the loop: six ELRs a decade, up to the edge of divergence
HELD = (0.0046, 0.0051, 0.0056, 0.0062, 0.0068, 0.0083, 0.01)  # ELRs at which cold ends are held
LONGEST = 40  # epochs
ESCAPE = 0.0068  # the ELR at which an escape is looked at step by step
EVERY = 3  # steps between two measurements of batch sharpness
ESCAPED = 10.0  # times the loss at the start of the hold, which is that of the cold end
CROSSED = 0.03  # loss between those of converged and of hovering networks, on the digits
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


def hold(table, seeds, passes, orders):
    """Rows of networks held at an ELR from a cold end on, until they escape: from each cold end at
    each ELR in so many orders of the batches."""
    for order, seed, elr in itertools.product(range(orders), range(seeds), HELD):
        if table.has(passes, seed, order, elr):
            continue
        init, edge = cold_end(passes, seed)
        with new_run(["--elr", "1"], elr, 1000 * (order + 1) + seed, init) as run:
            log = hold_until_escape(run)
        rows = zip(log["epoch"], log["train_loss"], strict=True)
        table.add([(passes, seed, order, elr, edge, *row) for row in rows])


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
        found, square, loss = curvature(run, indices[step % (n // size)])
        rows.append((step, loss, math.sqrt(square), run.value * found))

    indices = []
    run.sphere_sgd.register_step_pre_hook(look)
    hold_until_escape(run)
    return rows


def cold(table, seeds):
    """Test errors after 40 epochs of descent, one at each of 40 ELRs, on the few digits."""
    optimizers.FEW_DIGITS.parent.mkdir(exist_ok=True)
    optimizers.few_digits(optimizers.FEW_DIGITS)
    for low, high in DESCENTS:
        for seed in range(seeds):
            if table.has(float(low), float(high), seed):
                continue
            argv = ["--data", str(optimizers.FEW_DIGITS), "--loop", low, high, "40"]
            with new_run(argv, 1.0, seed) as run:
                log = train_until(run, 40)
            ends = log["train_loss"][-1], log["test_error"][-1]
            table.add([(float(low), float(high), seed, *ends)])


# ------------------------------------------------------------------------------------ the edge


def curvature(run, index):
    """Of these training inputs' loss along its own gradient, on the unit sphere (where spheres are
    several, each scaled to radius 1); the square of that gradient; the loss."""
    weights = [run.net.get_parameter(name) for sphere in run.spheres for name in sphere["names"]]
    points = train.measure.vectors(run.net, run.spheres)
    radius = [x.norm(dim=1, keepdim=True).expand_as(x).flatten() for x in points]
    radius = torch.cat(radius).to(weights[0])
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        loss = F.cross_entropy(run.net(run.data.inputs(index)), run.data.y[index])
    gradient = landscape.gradient(loss, weights, again=True)
    along = radius * gradient.detach()
    square = along.square().sum()
    along = radius * along / square.sqrt()
    found = landscape.gradient(gradient @ along, weights) @ along
    return found.item(), square.item(), loss.item()


def sharpness_on_the_way(run, epochs, every):
    """Train so many epochs; before every so many-th step the curvature of a random batch. Returns
    [3, measured] as `curvature`, and the mean train loss of the epochs."""
    generator, found, steps = (
        torch.Generator().manual_seed(run.identity["seed"]),
        [],
        itertools.count(),
    )

    @torch.enable_grad()
    def look(*_):
        if next(steps) % every == 0:
            size = run.config.batch_size
            found.append(curvature(run, train.batches(len(run.data.x), size, generator)[0]))

    run.sphere_sgd.register_step_pre_hook(look)
    log = train_until(run, epochs)
    return np.array(found).T, log["train_loss"][1:].mean()


@cache
def cold_end(passes, seed):
    """The weights at the cold end of a loop's way down, and 2 over their batch sharpness."""
    with new_run(["--loop", *GRID, "--epochs", str(passes)], 1.0, seed) as run:
        train_until(run, passes * int(GRID[2]))
        indices = train.batches(len(run.data.x), run.config.batch_size, run.order)
        run.net.train()
        found = np.mean([curvature(run, index)[0] for index in indices])
        return {"net": run.net.state_dict(), "checksum": ""}, 2 / found


def edge(table, folders):
    """A row per run of these folders at a fixed ELR, which is trained one epoch longer: ELR times
    batch sharpness. mean: of the curvatures; weighted: by the squares of the gradients."""
    for folder in folders:
        for found in itertools.chain(*regimes.by_elr(regimes.read_folder(folder)).values()):
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
    "hold": "passes seed order elr edge epoch train_loss",
    "escape": "passes seed step loss grad_norm elr_sharpness",
    "cold": "low high seed train_loss test_error",
    "edge": "folder elr seed regime train_loss mean error weighted",
}


class Table:
    """A CSV file that grows; `has` tells whether rows begin with these cells. `groups`: rows as
    dicts of numbers and names, by the values of these columns."""

    def __init__(self, what):
        self.path = ROOT / "benchmarks" / f"loop-{what}.csv"
        if not self.path.exists():
            self.path.write_bytes(regimes.csv_lines([COLUMNS[what].split()]))

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


def show(what, table):
    """What the rows say, as a table."""
    if what == "up":
        for (passes, elr), rows in table.groups("passes", "elr").items():
            late = [row for row in rows if row["epoch"] and row["epoch"] % passes == 0]
            losses = " ".join(f"{loss:.3g}" for loss in column(late, "train_loss"))
            print(f"{passes:g} passes, ELR {elr:.3g}: train loss {losses}")
    if what == "hold":
        lives = {}
        for (passes, elr, *_), rows in table.groups("passes", "elr", "seed", "order").items():
            loss = column(rows, "train_loss")
            lives.setdefault((passes, elr), []).append((len(loss) - 1, escaped(loss)))
        for (passes, elr), found in lives.items():
            epochs, out = map(sum, zip(*found, strict=True))
            each = " ".join(f"{n}{'' if over else '+'}" for n, over in found)
            life = f"{epochs / out:.1f}" if out else f"over {epochs}"
            print(f"{passes:g} passes, ELR {elr:g}: epochs {each}; {life} an escape")
    if what == "cold":
        for (low, high), rows in table.groups("low", "high").items():
            print(f"{high:g} to {low:g}: test error {mean(column(rows, 'test_error'), 4)}", end="")
            print(f", {len(rows)} seeds; train loss {mean(column(rows, 'train_loss'), 4)}")
    if what == "edge":
        for row in itertools.chain(*table.groups("folder", "elr", "seed").values()):
            shown = "{folder:16} {elr:8.3g} {seed:g} {regime:12} loss {train_loss:9.3g}"
            print(f"{shown}  {{mean:9.3g}} ± {{error:.2g}} ({{weighted:.3g}})".format(**row))


def crossing(elrs, loss, level):
    """The lowest ELR [log-interpolated] at which a leg rises through this loss."""
    over = np.flatnonzero(loss > level)
    if not len(over) or over[0] == 0:
        return math.nan
    i, (x, y) = over[0], np.log((elrs, loss))
    t = (math.log(level) - y[i - 1]) / (y[i] - y[i - 1])
    return math.exp(x[i - 1] + t * (x[i] - x[i - 1]))


def speeds(folder, level):
    """By passes at each ELR: where the legs cross a loss, and the area between them."""
    groups = {}
    for path in sorted(folder.glob("loop=*.csv")):
        if ".layers" not in path.name:
            found = runs.read_run(path).log
            if loop.is_loop(found):
                passes = loop.classify_loop([found]).passes
                groups.setdefault(passes, []).append(found)
    print("| passes | seeds | down crosses | up crosses | their ratio | area |")
    print("| --- | --- | --- | --- | --- | --- |")
    for passes, logs in sorted(groups.items()):
        cells = []
        for log in logs:
            elrs, loss = loop.legs([log], "train_loss")
            down, back = (crossing(elrs, leg, level) for leg in loss)
            y, x = np.log(loss), np.log10(elrs)
            inside = elrs < 0.02  # below divergence
            area = np.trapezoid((y[0] - y[1])[inside], x[inside])
            cells.append((down, back, back / down, area))
        down, back, ratio, area = np.array(cells).T
        shown = [f"{geometric(x)}" for x in (down, back, ratio)]
        print(f"| {passes} | {len(logs)} | {' | '.join(shown)} | {mean(area)} |")


def mean(x, digits=2):
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return f"{x.mean():.{digits}f} ± {error:.{digits}f}"


def geometric(x):
    """Mean and standard error as factors, and the range; without nan, where a leg never crosses."""
    crossed = x[~np.isnan(x)]
    y = np.log(crossed)
    error = math.exp(y.std(ddof=1) / math.sqrt(len(y))) if len(y) > 1 else math.nan
    shown = f"{math.exp(y.mean()):.3g} ×/÷ {error:.2f} ({crossed.min():.3g} to {crossed.max():.3g}"
    return f"{shown}; {len(crossed)} of {len(x)} seeds)"


def main(argv=None):
    parser = argparse.ArgumentParser(description="The measurements of docs/findings.md.")
    parser.add_argument("what", choices=[*COLUMNS, "speeds"])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=4, help="at each ELR of a loop (default: 4)")
    parser.add_argument("--orders", type=int, default=2, help="of batches, in hold (default: 2)")
    parser.add_argument("--level", type=float, default=CROSSED)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "speeds":
        for folder in args.folders:
            speeds(folder, args.level)
        return
    table, seeds = Table(args.what), args.seeds
    ways = {
        "up": lambda: up(table, seeds, args.passes),
        "hold": lambda: hold(table, seeds, args.passes, args.orders),
        "escape": lambda: escape(table, seeds, args.passes),
        "cold": lambda: cold(table, seeds),
        "edge": lambda: edge(table, args.folders),
    }
    ways[args.what]()
    show(args.what, table)


if __name__ == "__main__":
    main()
