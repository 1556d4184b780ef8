"""The command line of train.py: what can be asked, what is refused, and why."""

import argparse
import math
import os
import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import regimes
from data import NAMES, Data, add_label_noise, load, subset
from models import LOSSES, MODELS, build, layer_groups
from runs import grid, load_checkpoint, open_folder

DESCRIPTION = """Train a scale-invariant network on the sphere, at a fixed effective learning rate
(ELR), and name the regime that it falls into."""
MFLOP_PER_THREAD = 200  # of a step: below, a second thread costs more than it gives
# What all runs of a folder have in common.
IDENTITY = """space wd momentum schedule data modulus image_size train_size label_noise augment
    model width affine train_head sphere head_lr loss batch_size full_batch eval_train init
    average dtype device""".split()
DEFAULTS = dict(data="digits", data_root=Path("data"), batch_size=16, loss="ce", sphere="network")
DEFAULTS |= dict(dtype="fp32", modulus=31, then_epochs=20, then_orders=1)


class Refused(Exception):
    """An option, by name, and why it cannot be."""


def number(kind: type, low: float = 0, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of that kind, low < number < high, that float32 can hold."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if kind is float and value > 0 and not 1.18e-38 < value < 3.4e38:
            raise ArgumentTypeError(f"{text!r} is a number that float32 cannot hold")
        if not low < value < high:
            what = f"{'whole' if kind is int else 'finite'} number above {low:.4g}"
            what += f" and below {high:.4g}" if high < math.inf else ""
            raise ArgumentTypeError(f"{text!r} is not a {what}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    example = "example: python train.py --sweep 1e-4 1 13 --epochs 40"
    options = dict(prog="train.py", allow_abbrev=False, description=DESCRIPTION, epilog=example)
    parser = regimes.Parser(**options)
    flag = dict(action="store_true", default=None)
    whole, real, share = number(int), number(float), number(float, 0, 1)
    few = number(int, 0, 1025)

    add = parser.add_argument_group("which runs").add_argument
    add("--elr", nargs="+", type=real, metavar="ELR", help="one run at each of these ELRs")
    text = "N ELRs from LO to HI, log-spaced; alone: 1e-4 1 13 (modular: 1e-5 1e-1 13)"
    add("--sweep", nargs="*", metavar="LO HI N", help=text)
    text = "runs whose every step turns the weights by PHI radians, which falls along a cosine"
    add("--angle", nargs="+", type=number(float, 0, math.pi / 2), metavar="PHI", help=text)
    text = "ordinary training in the whole space, one run at each of these learning rates"
    add("--lr", nargs="+", type=real, help=text)
    add("--wd", type=real, help="weight decay, with --lr (default: none)")
    add("--refine", type=few, default=0, metavar="N", help="then bisect both boundaries N times")
    text = "an undecided run goes on until it is decided or this long (refine: 4 times --epochs)"
    add("--max-epochs", type=whole, metavar="N", help=text)
    add("--seed", type=int, default=0, help="of initialization and order of batches (default: 0)")
    text = "this many seeds of each run, from --seed on (default: 1)"
    add("--seeds", type=whole, default=1, metavar="K", help=text)
    text = "passes over the training set (default: 20; modular: 400)"
    add("--epochs", type=whole, help=text)
    add("--init", type=Path, metavar="PT", help="start every run from this checkpoint")
    text = "from the end of each run, a second run at this ELR (or angle)"
    add("--then", type=real, metavar="ELR", help=text)
    add("--then-epochs", type=whole, help="of those second runs (default: 20)")
    text = "K second runs, with other orders of the batches (default: 1)"
    add("--then-orders", type=few, metavar="K", help=text)
    text = "also test the mean of the last K epochs' weights"
    add("--average", type=whole, metavar="K", help=text)

    add = parser.add_argument_group("the step").add_argument
    text = "which tensors share a norm (default: network)"
    add("--sphere", choices=("network", "layer", "row"), help=text)
    add("--momentum", type=share, help="β of the heavy ball (default: none)")
    text = 'constant, cosine, or ELRs by epoch, "0:1e-2,20:1e-4", in the place of --elr'
    add("--schedule", help=text + " (default: constant; with --angle cosine)")
    text = "learning rate of what is on no sphere (default: ELR times squared radius)"
    add("--head-lr", type=real, help=text)
    add("--full-batch", **flag, help="one step per epoch, along the gradient of the whole set")

    add = parser.add_argument_group("the network").add_argument
    text = f"{', '.join(MODELS)}, or FILE.py:FUNCTION (default: convnet; modular: transformer)"
    add("--model", help=text)
    add("--width", type=number(int, 0, 2**14), help="width of ours (default: 8; transformer: 64)")
    add("--affine", **flag, help="train the BatchNorms' scales and shifts, too")
    add("--train-head", **flag, help="train the last layer, too")
    add("--loss", choices=tuple(LOSSES), help="cross-entropy, or squared error (default: ce)")

    add = parser.add_argument_group("the data").add_argument
    text = f"{', '.join(NAMES)}, a folder with train/ and test/, or FILE.npz (default: digits)"
    add("--data", help=text)
    add("--data-root", type=Path, metavar="DIR", help="where downloads are kept (default: data)")
    text = "addition modulo P, for --data modular (default: 31)"
    add("--modulus", type=number(int, 2, 1025), metavar="P", help=text)
    text = "bring a folder's images to S × S"
    add("--image-size", type=number(int, 7, 4097), metavar="S", help=text)
    add("--batch-size", type=whole, help="inputs per step (default: 16)")
    add("--train-size", type=whole, metavar="N", help="train on N inputs drawn at random")
    text = "give this share of the training inputs a wrong label"
    add("--label-noise", type=share, metavar="P", help=text)
    add("--augment", **flag, help="random crops and flips of the training images")
    text = "also measure loss, error and gradient on the whole training set after each epoch"
    add("--eval-train", **flag, help=text)

    add = parser.add_argument_group("the machine and the files").add_argument
    text = "runs at a time, in processes of their own (default: on a CPU its cores, on a GPU 1)"
    add("--jobs", type=few, metavar="N", help=text)
    text = "CPU threads of each (default: 1; of a single run one per "
    text += f"{MFLOP_PER_THREAD} MFLOP of a step)"
    add("--threads", type=few, metavar="T", help=text)
    text = "of the network's arithmetic; weights and step stay float32 (default: fp32)"
    add("--dtype", choices=("fp32", "bf16"), help=text)
    add("--graph", **flag, help="GPU: capture each step in a CUDA graph and replay it")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there, else cpu)")
    text = "folder to write into (default: logs/<data>-<model>)"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--force", action="store_true", help="start afresh: remove the runs in --out first")
    return parser


def parse(argv: list[str]) -> tuple[Namespace, Data]:
    """The options, checked, and the data. Adds what follows from them: mode, values, layer_groups,
    init_state, title, config and chance. Refuses in one line, with exit status 2, before anything
    is written."""
    cli = parser()
    options = cli.parse_args(argv)
    given = vars(options).copy()
    options.given = given
    for name, value in DEFAULTS.items():
        if given[name] is None:
            setattr(options, name, value)
    modular = options.data == "modular"
    options.model = options.model or ("transformer" if modular else "convnet")
    options.epochs = options.epochs or (400 if modular else 20)
    try:
        check(options, given)
        choose_values(options, given)
        choose_machine(options)
        data = read_data(options)
        find_spheres(options, data)
        open_out(options, given)
    except Refused as refused:
        name, why = refused.args
        cli.error(f"argument --{name.replace('_', '-')}: {why}" if name else why)
    return options, data


def check(options: Namespace, given: dict) -> None:
    """Which options go together; what needs no data."""
    options.mode = "lr" if given["lr"] else "angle" if given["angle"] else "elr"
    options.space = "whole" if options.mode == "lr" else "sphere"
    whole, own_file = options.mode == "lr", ":" in options.model
    tokens = options.data == "modular"
    schedule = options.schedule or ("cosine" if options.mode == "angle" else "constant")
    options.schedule, constant = schedule, schedule == "constant"
    several = given["sweep"] is not None or len(given["elr"] or []) > 1
    on_sphere = "in the whole space there is --lr, and no sphere"
    rules = [
        ("wd", whole, "this is for --lr; on the sphere there is no weight decay"),
        ("sphere", not whole, on_sphere),
        ("head_lr", not whole, on_sphere),
        ("refine", several, "it takes --sweep, or several ELRs, between which to bisect"),
        ("refine", constant, "a regime belongs to a constant ELR"),
        ("max_epochs", constant and options.mode == "elr", "a regime belongs to a constant ELR"),
        ("max_epochs", not options.average, "--average has to know the last epochs"),
        ("then", not whole and (constant or options.mode == "angle"), "it takes a constant ELR"),
        ("then_epochs", options.then, "this is for --then"),
        ("then_orders", options.then, "this is for --then"),
        ("graph", not whole and not options.full_batch, "this is for steps of one batch"),
        ("width", not own_file, f"this is for our own networks; {options.model} has its own"),
        ("affine", not own_file, f"this is for our own networks; {options.model} has its own"),
        ("train_head", not own_file, f"this is for our own networks; {options.model} has its own"),
        ("modulus", tokens, "this is for --data modular"),
        ("augment", not tokens, "tokens are no images"),
        ("image_size", options.data not in NAMES, "this is for --data FOLDER"),
        ("data_root", options.data not in ("digits", "modular"), "there is nothing to download"),
    ]
    for name, good, why in rules:
        if given[name] and not good:
            raise Refused(name, f"{why}: leave it out")
    if (options.average or 0) > options.epochs:
        raise Refused("average", f"{options.average} is more than the {options.epochs} epochs")
    if options.max_epochs and options.max_epochs < options.epochs:
        what = f"{options.max_epochs} is less than --epochs {options.epochs}"
        raise Refused("max_epochs", what)
    if options.refine and not options.max_epochs and not options.average:
        options.max_epochs = 4 * options.epochs
    if not 0 <= options.seed < 2**31 - options.seeds:
        raise Refused("seed", f"{options.seed} is not between 0 and 2147483647")
    if options.then and options.mode == "angle" and options.then >= math.pi / 2:
        raise Refused("then", f"{options.then} is no angle below π/2")


def choose_values(options: Namespace, given: dict) -> None:
    """Which ELRs, angles or learning rates to run."""
    try:
        options.starts = schedule(options.schedule)
    except ArgumentTypeError as error:
        raise Refused("schedule", str(error)) from None
    said = [name for name in ("elr", "sweep", "angle", "lr") if given[name] is not None]
    said += ["schedule"] if options.starts else []
    if len(said) != 1:
        more = ", and only one" if said else ""
        ways = "--elr ELR, --sweep, --angle PHI, --lr LR or a --schedule of values"
        raise Refused("", f"one of {ways} must say which runs{more}")
    default = ["1e-5", "1e-1", "13"] if options.data == "modular" else ["1e-4", "1", "13"]
    if options.starts:
        values = [options.starts[0][1]]
    elif said == ["sweep"]:
        values = sweep(options.sweep or default)
    else:
        values = given[said[0]]
    options.values = list(dict.fromkeys(float(f"{value:.9g}") for value in values))  # as logs do
    if len(options.values) * options.seeds > 10**5:
        raise Refused("seeds", f"{len(options.values)} × {options.seeds} runs are too many")


def sweep(texts: list[str]) -> list[float]:
    try:
        low, high, n = number(float)(texts[0]), number(float)(texts[1]), number(int, 1)(texts[2])
        if len(texts) != 3 or not low < high or n > 10**4:
            raise IndexError
    except ArgumentTypeError as error:
        raise Refused("sweep", str(error)) from None
    except IndexError:
        what = "LO HI N with LO < HI and 2 ≤ N ≤ 10000, as in --sweep 1e-4 1 13"
        raise Refused("sweep", f"{' '.join(texts)} is not {what}") from None
    return grid(low, high, n)


def schedule(text: str) -> list[tuple[int, float]]:
    """The (epoch, ELR) pairs of "0:1e-2,20:1e-4"; none for `constant` and `cosine`."""
    if text in ("constant", "cosine"):
        return []
    try:
        pairs = [x.split(":") for x in text.split(",")]
        pairs = [(int(epoch), number(float)(elr)) for epoch, elr in pairs]
        epochs = [epoch for epoch, _ in pairs]
        if epochs[0] != 0 or epochs != sorted(set(epochs)):
            raise ValueError
    except (ValueError, ArgumentTypeError):
        what = 'neither constant nor cosine nor ELRs by epoch, as in "0:1e-2,20:1e-4"'
        raise ArgumentTypeError(f"{text!r} is {what}") from None
    return pairs


def choose_machine(options: Namespace) -> None:
    """Device, jobs and threads, and which of torchrun's ranks this is."""
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    options.rank, options.ranks = int(rank), int(ranks)
    if options.force and options.ranks > 1:
        what = "the ranks of torchrun share the folder: remove it before"
        raise Refused("force", what)
    torch.set_num_threads(1)  # until a single run is sure to gain from more; jobs fork from one
    if options.device is None:
        local = os.environ.get("LOCAL_RANK")
        on_gpu = "cuda" if local is None else f"cuda:{local}"
        options.device = on_gpu if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        what = str(error).splitlines()[0]
        what = f"{options.device!r} cannot be used here ({what}); cpu always can"
        raise Refused("device", what) from None
    if options.graph and "cuda" not in options.device:
        raise Refused("graph", "this is for a GPU: leave it out")
    if options.jobs is None:
        alone = options.ranks > 1 or options.device != "cpu"
        options.jobs = 1 if alone else os.cpu_count()
    options.jobs = min(options.jobs, len(options.values) * options.seeds)


def read_data(options: Namespace) -> Data:
    more = options.image_size, options.modulus, options.device
    try:
        data = load(options.data, options.data_root, *more)
    except ValueError as error:
        raise Refused("data", str(error)) from None
    n, noise = len(data.x), options.label_noise
    if options.augment and data.x.dtype != torch.uint8:
        raise Refused("augment", "this is for images: leave it out")
    if (options.train_size or 0) > n:
        raise Refused("train_size", f"{options.train_size} is more than the {n} training inputs")
    if options.train_size:
        subset(data, options.train_size)
    n = len(data.x)
    if noise and not round(noise * n):
        raise Refused("label_noise", f"{noise:g} of {n} training inputs is none")
    if noise:
        add_label_noise(data, noise)
    if options.batch_size > n:
        raise Refused("batch_size", f"{options.batch_size} is more than the {n} training inputs")
    return data


def find_spheres(options: Namespace, data: Data) -> None:
    """What is on which sphere, the checkpoint to start from, and the threads of a single run."""
    x = data.inputs(torch.arange(min(32, len(data.x)), device=options.device))
    try:
        torch.manual_seed(options.seed)
        net = build(vars(options), data).to(options.device)
        options.layer_groups = layer_groups(net, x, data.classes, options.sphere)
    except (ValueError, MemoryError, RuntimeError) as error:
        raise Refused("model", str(error).splitlines()[0]) from None
    on_spheres = {name for group in options.layer_groups for name in group}
    rest = [n for n, p in net.named_parameters() if p.requires_grad and n not in on_spheres]
    if options.head_lr and not rest:
        raise Refused("head_lr", f"all that {options.model} trains is on the spheres")
    options.init_state = None
    if options.init:
        try:
            options.init_state = load_checkpoint(options.init, None, options.device)
            if options.init_state is None:
                raise ValueError("there is no such file")
            net.load_state_dict(options.init_state["net"])
        except (ValueError, OSError, RuntimeError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise Refused("init", f"{options.init}: {why}") from None
        options.init = str(options.init)
    if options.threads is None:
        options.threads = 1
        if options.jobs == 1 and options.device == "cpu":
            with FlopCounterMode(display=False) as counter:
                net.train()(x).sum().backward()
            flops = counter.get_total_flops() / len(x) * options.batch_size
            most = os.cpu_count()
            options.threads = max(1, min(most, round(flops / 1e6 / MFLOP_PER_THREAD)))
    if options.jobs == 1:
        torch.set_num_threads(options.threads)


def open_out(options: Namespace, given: dict) -> None:
    """The folder to write into, whose runs must have the same options, and the figure's title."""
    name = f"{Path(options.data).stem}-{options.model.rpartition(':')[2]}"
    if options.mode == "lr":
        name += "-whole"
    options.out = options.out or Path("logs") / name
    options.title = f"{options.data}, {options.model}"
    if options.width:
        options.title += f" of width {options.width}"
    options.title += ", whole space" if options.mode == "lr" else f", sphere: {options.sphere}"
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity |= {"schedule": given["schedule"], "device": options.device.split(":")[0]}
    if options.schedule == "cosine" and options.mode != "angle" or options.average:
        identity["epochs"] = options.epochs
    try:
        options.config = open_folder(options.out, identity, options.force)
        options.chance = regimes.read_chance(options.out)
    except ValueError as error:
        raise Refused("out", str(error)) from None


def again(options: Namespace, *instead: str) -> str:
    """The command with these options in the place of those that said which runs."""
    left_out = "elr sweep angle lr wd refine max_epochs seeds then then_epochs then_orders average"
    left_out += " schedule jobs threads force init"
    words = ["python", "train.py", *instead]
    for name, value in options.given.items():
        if value in (None, False) or name in left_out.split() or (name == "seed" and not value):
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += [] if value is True else [str(value)]
    return shlex.join(words)
