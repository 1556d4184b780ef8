"""The command line of train.py: what can be asked, what is refused, and why."""

import math
import os
import shlex
from argparse import ArgumentTypeError
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import regimes
from data import NAMES, add_label_noise, load
from models import MODELS, build, layer_groups
from regimes import number
from runs import grid, open_folder

MFLOP_PER_THREAD = 200  # of a step: below, a second thread costs more than it gives
# What all runs of a folder have in common.
IDENTITY = """space wd momentum schedule data modulus label_noise augment model width affine
    train_head sphere batch_size eval_train average dtype""".split()
# Which runs, and how they are done, not what they are: `next:` leaves them out.
WHICH = """elr sweep angle lr wd refine max_epochs seeds then average schedule jobs threads
    force""".split()
DEFAULTS = dict(data="digits", modulus=31, batch_size=16, sphere="network", dtype="fp32")


class Refused(Exception):
    """An option, by name, and why it cannot be."""


def parser():
    text = "Train on the sphere at a fixed effective learning rate (ELR), and name the regime."
    example = "example: python train.py --sweep 1e-4 1 13 --epochs 40"
    more = dict(description=text, epilog=example)
    parser = regimes.Parser(prog="train.py", allow_abbrev=False, **more)
    flag = dict(action="store_true", default=None)
    whole, real, share = number(int), number(float), number(float, 0, 1)
    few, angle = number(int, 0, 1025), number(float, 0, math.pi / 2)

    add = parser.add_argument_group("which runs").add_argument
    add("--elr", nargs="+", type=real, metavar="ELR", help="a run at each of these ELRs")
    text = "N ELRs, log-spaced (alone: 1e-4 1 13; modular: 1e-5 1e-1 13)"
    add("--sweep", nargs="*", metavar="LO HI N", help=text)
    text = "runs whose steps turn the weights by PHI radians, falling along a cosine"
    add("--angle", nargs="+", type=angle, metavar="PHI", help=text)
    add("--lr", nargs="+", type=real, help="ordinary training at these learning rates")
    add("--wd", type=real, help="weight decay, with --lr (default: none)")
    add("--refine", type=few, default=0, metavar="N", help="then bisect both boundaries N times")
    text = "undecided runs go on until decided or so long (--refine: 4 times --epochs)"
    add("--max-epochs", type=whole, metavar="N", help=text)
    add("--seed", type=int, default=0, help="of initialization and order (default: 0)")
    add("--seeds", type=whole, default=1, metavar="K", help="from --seed on (default: 1)")
    add("--epochs", type=whole, help="default: 20; modular: 400")
    text = "from the end of each run, another at this ELR (or angle)"
    add("--then", type=real, metavar="ELR", help=text)
    text = "also test the mean of the last K epochs' weights"
    add("--average", type=whole, metavar="K", help=text)

    add = parser.add_argument_group("the step").add_argument
    text = "which tensors share a norm (default: network)"
    add("--sphere", choices=("network", "layer", "row"), help=text)
    add("--momentum", type=share, help="β of the heavy ball (default: none)")
    text = "of the ELR (default: constant; with --angle cosine)"
    add("--schedule", choices=("constant", "cosine"), help=text)

    add = parser.add_argument_group("the network").add_argument
    text = f"{', '.join(MODELS)}, FILE.py:FUNCTION (default: convnet; modular: transformer)"
    add("--model", help=text)
    add("--width", type=number(int, 0, 2**14), help="of ours (default: 8; transformer: 64)")
    add("--affine", **flag, help="train the BatchNorms' scales and shifts, too")
    add("--train-head", **flag, help="train the last layer, too")

    add = parser.add_argument_group("the data").add_argument
    text = f"{', '.join(NAMES)}, FILE.npz (default: digits)"
    add("--data", help=text)
    text = "addition modulo P, for --data modular (default: 31)"
    add("--modulus", type=number(int, 2, 1025), metavar="P", help=text)
    add("--batch-size", type=whole, help="default: 16")
    text = "give this share of the training inputs a wrong label"
    add("--label-noise", type=share, metavar="P", help=text)
    add("--augment", **flag, help="random crops and flips of the training images")
    text = "also measure loss, error and gradient on the whole training set"
    add("--eval-train", **flag, help=text)

    add = parser.add_argument_group("the machine and the files").add_argument
    text = "runs at a time (default: on a CPU one per core, on a GPU 1)"
    add("--jobs", type=few, metavar="N", help=text)
    text = f"of each (default: 1; of a single run one per {MFLOP_PER_THREAD} MFLOP of a step)"
    add("--threads", type=few, metavar="T", help=text)
    text = "of the arithmetic; weights and step stay float32 (default: fp32)"
    add("--dtype", choices=("fp32", "bf16"), help=text)
    add("--graph", **flag, help="GPU: capture each step in a CUDA graph and replay it")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there, else cpu)")
    text = "folder to write into (default: logs/<data>-<model>)"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--force", action="store_true", help="remove the runs in --out first")
    return parser


def parse(argv):
    """The options, checked, and the data. Adds what follows from them: mode, values, layer_groups,
    title, config and chance. Refuses in one line, with exit status 2, before anything is
    written."""
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
        open_out(options)
    except Refused as refused:
        name, why = refused.args
        cli.error(f"argument --{name.replace('_', '-')}: {why}" if name else why)
    return options, data


def check(options, given):
    """Which options go together; what needs no data."""
    options.mode = "lr" if given["lr"] else "angle" if given["angle"] else "elr"
    whole, own_file = options.mode == "lr", ":" in options.model
    options.space = "whole" if whole else "sphere"
    default = "cosine" if options.mode == "angle" else "constant"
    options.schedule = options.schedule or default
    fixed = options.mode == "elr" and options.schedule == "constant"
    several = given["sweep"] is not None or len(given["elr"] or []) > 1
    tokens = options.data == "modular"
    rules = [
        ("wd", whole, "this is for --lr"),
        ("sphere", not whole, "in the whole space, --lr, there is no sphere"),
        ("refine", several and fixed, "it takes --sweep, or several constant ELRs"),
        ("max_epochs", fixed and not options.average, "it takes constant ELRs, and no --average"),
        ("then", fixed or options.mode == "angle", "it takes a constant ELR"),
        ("graph", not whole, "in the whole space, --lr, nothing is captured"),
        ("modulus", tokens, "this is for --data modular"),
        ("augment", not tokens, "tokens are no images"),
    ]
    for name in ("width", "affine", "train_head"):
        rules.append((name, not own_file, "a network of your own has its own"))
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


def choose_values(options, given):
    """Which ELRs, angles or learning rates to run."""
    said = [name for name in ("elr", "sweep", "angle", "lr") if given[name] is not None]
    if len(said) != 1:
        more = ", and only one" if said else ""
        ways = "--elr ELR, --sweep, --angle PHI or --lr LR"
        raise Refused("", f"one of {ways} must say which runs{more}")
    values = given[said[0]]
    if said == ["sweep"]:
        default = ["1e-5", "1e-1", "13"] if options.data == "modular" else ["1e-4", "1", "13"]
        values = values or default
        try:
            low, high, n = values
            low, high, n = number(float)(low), number(float)(high), number(int, 1, 10_001)(n)
            if low >= high:
                raise ValueError
        except (ValueError, ArgumentTypeError):
            what = "LO HI N with LO < HI and 2 ≤ N ≤ 10000, as in --sweep 1e-4 1 13"
            raise Refused("sweep", f"{' '.join(values)[:200]} is not {what}") from None
        values = grid(low, high, n)
    options.values = list(dict.fromkeys(float(f"{value:.9g}") for value in values))  # as logs do
    if len(options.values) * options.seeds > 10**5:
        raise Refused("seeds", f"{len(options.values)} × {options.seeds} runs are too many")


def choose_machine(options):
    """Device and jobs, and which of torchrun's ranks this is."""
    options.rank = int(os.environ.get("RANK", "0"))
    options.ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if options.force and options.ranks > 1:
        raise Refused("force", "the ranks of torchrun share the folder: remove it before")
    torch.set_num_threads(1)  # until a single run is sure to gain from more; jobs fork from one
    if options.device is None:
        local = os.environ.get("LOCAL_RANK")
        on_gpu = "cuda" if local is None else f"cuda:{local}"
        options.device = on_gpu if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise Refused("device", f"{options.device!r} cannot be used here ({why})") from None
    if options.graph and "cuda" not in options.device:
        raise Refused("graph", "this is for a GPU: leave it out")
    if options.jobs is None:
        alone = options.ranks > 1 or options.device != "cpu"
        options.jobs = 1 if alone else os.cpu_count()
    options.jobs = min(options.jobs, len(options.values) * options.seeds)


def read_data(options):
    try:
        data = load(options.data, options.modulus, options.device)
    except ValueError as error:
        raise Refused("data", str(error)) from None
    if options.augment and data.x.dtype != torch.uint8:
        raise Refused("augment", "this is for images: leave it out")
    n, noise = len(data.x), options.label_noise
    if noise and not round(noise * n):
        raise Refused("label_noise", f"{noise:g} of {n} training inputs is none")
    if noise:
        add_label_noise(data, noise)
    if options.batch_size > n:
        raise Refused("batch_size", f"{options.batch_size} is more than the {n} training inputs")
    return data


def find_spheres(options, data):
    """What is on which sphere, and the threads of a single run."""
    x = data.inputs(torch.arange(min(32, len(data.x)), device=options.device))
    try:
        torch.manual_seed(options.seed)
        net = build(vars(options), data).to(options.device)
        options.layer_groups = layer_groups(net, x, data.classes, options.sphere)
    except (ValueError, MemoryError, RuntimeError) as error:
        raise Refused("model", str(error).splitlines()[0]) from None
    alone = options.jobs == 1
    # At most: every weight at every position. Counting costs a second, for what torch imports.
    positions = x[0].numel() / len(x[0]) if x[0].dim() > 1 else len(x[0])
    flops = 6 * positions * sum(p.numel() for p in net.parameters()) * options.batch_size
    many = flops / 1e6 > 1.5 * MFLOP_PER_THREAD
    if many and options.threads is None and alone and options.device == "cpu":
        with FlopCounterMode(display=False) as counter:
            net.train()(x).sum().backward()
        flops = counter.get_total_flops() / len(x) * options.batch_size
        options.threads = min(os.cpu_count(), round(flops / 1e6 / MFLOP_PER_THREAD))
    options.threads = max(1, options.threads or 1)
    if alone:
        torch.set_num_threads(options.threads)


def open_out(options):
    """The folder to write into, whose runs must have the same options, and the figure's title."""
    name = f"{Path(options.data).stem}-{options.model.rpartition(':')[2]}"
    space = f"sphere: {options.sphere}"
    if options.mode == "lr":
        name, space = f"{name}-whole", "whole space"
    options.out = options.out or Path("logs") / name
    width = f" of width {options.width}" if options.width else ""
    options.title = f"{options.data}, {options.model}{width}, {space}"
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity |= {"schedule": options.given["schedule"], "device": options.device.split(":")[0]}
    if options.schedule == "cosine" and options.mode != "angle" or options.average:
        identity["epochs"] = options.epochs
    try:
        options.config = open_folder(options.out, identity, options.force)
        options.chance = regimes.read_chance(options.out)
    except ValueError as error:
        raise Refused("out", str(error)) from None


def again(options, *instead):
    """The command with these options in the place of those that said which runs."""
    words = ["python", "train.py", *instead]
    for name, value in options.given.items():
        if value not in (None, False) and name not in WHICH and (name != "seed" or value):
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words)
