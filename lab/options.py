"""The command line of train.py: what can be asked, what is refused, and why."""

import math
import os
import sys
from pathlib import Path
from timeit import repeat

import torch

import regimes
from lab.data import NAMES, add_label_noise, load
from lab.machine import choose_threads, cores, find_device
from lab.own import layer_groups
from lab.runs import grid, number, open_folder
from models import MODELS

# What all runs of a folder have in common.
IDENTITY = """space wd momentum data modulus label_noise augment model width affine train_head
    sphere batch_size average dtype""".split()


class Refused(Exception):
    """An option, by name, and why it cannot be."""


def parser():
    text = "Train on the sphere at a fixed effective learning rate (ELR), and name the regime."
    example = "example: python train.py --sweep 1e-4 1 13 --epochs 40"
    parser = regimes.Parser("train.py", description=text, epilog=example, allow_abbrev=False)
    flag, whole, real = dict(action="store_true"), number(int), number(float)
    few, share, angle = number(int, 0, 1025), number(float, 0, 1), number(float, 0, math.pi / 2)

    add = parser.add_argument_group("which runs").add_argument
    add("--elr", nargs="+", type=real, metavar="ELR", help="runs at these ELRs")
    text = "N ELRs, log-spaced (alone: 1e-4 1 13; modular: 1e-5 1e-1 13)"
    add("--sweep", nargs="*", type=real, metavar="LO HI N", help=text)
    add("--angle", nargs="+", type=angle, metavar="PHI", help="radians of a step, falling to 0")
    add("--lr", nargs="+", type=real, help="ordinary training at these learning rates")
    add("--wd", type=real, help="weight decay, with --lr (default: none)")
    add("--refine", type=few, default=0, metavar="N", help="then bisect both boundaries N times")
    add("--max-epochs", type=whole, metavar="N", help="undecided runs go on, up to N epochs")
    add("--seed", type=number(int, -1, 2**30), default=0, help="of start and order (default: 0)")
    add("--seeds", type=whole, default=1, metavar="K", help="from --seed on (default: 1)")
    add("--epochs", type=whole, help="default: 20; modular: 400")
    add("--then", type=real, metavar="ELR", help="from each end a second run at this ELR or angle")
    add("--average", type=whole, metavar="K", help="test the mean weights of the last K epochs")

    add = parser.add_argument_group("the step").add_argument
    text = "which tensors share a norm (default: network)"
    add("--sphere", choices=("network", "layer", "row"), default="network", help=text)
    add("--momentum", type=share, help="β of the heavy ball (default: none)")
    add("--schedule", choices=("constant", "cosine"), help="default: constant; with --angle cosine")

    add = parser.add_argument_group("the network").add_argument
    text = f"{', '.join(MODELS)}, FILE.py:FUNCTION (default: convnet; modular: transformer)"
    add("--model", help=text)
    add("--width", type=number(int, 0, 2**14), help="of ours (default: 8; transformer: 64)")
    add("--affine", **flag, help="train the BatchNorms' scales and shifts, too")
    add("--train-head", **flag, help="train the last layer, too")

    add = parser.add_argument_group("the data").add_argument
    add("--data", default="digits", help=f"{', '.join(NAMES)}, FILE.npz (default: digits)")
    modulus = dict(type=number(int, 2, 1025), default=31, metavar="P")
    add("--modulus", **modulus, help="addition modulo P, for --data modular (default: 31)")
    add("--batch-size", type=whole, default=16, help="default: 16")
    add("--label-noise", type=share, metavar="P", help="share of training labels made wrong")
    add("--augment", **flag, help="random crops and flips of the training images")

    add = parser.add_argument_group("the machine and the files").add_argument
    add("--jobs", type=few, metavar="N", help="runs at a time (default: CPU one per core, GPU 1)")
    add("--threads", type=few, metavar="T", help="CPU threads of a run (default: what helps)")
    text = "of the arithmetic, not of the weights (default: fp32)"
    add("--dtype", choices=("fp32", "tf32", "bf16"), default="fp32", help=text)
    add("--graph", **flag, help="GPU: replay each step as a CUDA graph")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there)")
    add("--out", type=Path, metavar="DIR", help="folder of the logs (default: logs/<data>-<model>)")
    add("--force", **flag, help="remove the runs in --out first")
    return parser


def parse(argv):
    """The options, checked, with what follows from them, and the data. Refuses in one line, with
    exit status 2, before anything is written."""
    cli = parser()
    options = cli.parse_args(argv)
    given = {name: x for name, x in vars(options).items() if x != cli.get_default(name)}
    options.given = given
    modular = options.data == "modular"
    tokens = modular or options.data.endswith(".txt")
    options.model = options.model or ("transformer" if tokens else "convnet")
    options.epochs = options.epochs or (400 if modular else 20)
    try:
        choose_values(options, given)
        choose_machine(options)
        check(options, given)
        data = read_data(options)
        find_spheres(options, data)
        open_out(options, given)
    except Refused as refused:
        name, why = refused.args
        cli.error(f"argument --{name.replace('_', '-')}: {why}" if name else why)
    return options, data


def check(options, given):
    """Which options go together."""
    whole, turn, tokens = bool(options.lr), bool(options.angle), options.data == "modular"
    options.space = "whole" if whole else "sphere"
    options.schedule = options.schedule or ("cosine" if turn else "constant")
    fixed = options.mode == "elr" and options.schedule == "constant"
    several = "sweep" in given or len(options.elr or []) > 1
    most, average = options.max_epochs or options.epochs, options.average or 0
    rules = [
        ("wd", whole, "this is for --lr"),
        ("sphere", not whole, "in the whole space, --lr, there is no sphere"),
        ("refine", several and fixed, "it takes --sweep, or several constant ELRs"),
        ("max_epochs", fixed and not average, "it takes constant ELRs, and no --average"),
        ("max_epochs", most >= options.epochs, f"it is less than --epochs {options.epochs}"),
        ("average", average <= options.epochs, f"there are {options.epochs} epochs"),
        ("then", fixed or turn, "it takes a constant ELR"),
        ("then", not turn or (options.then or 0) < math.pi / 2, "it is no angle below π/2"),
        ("graph", not whole and "cuda" in options.device, "it takes a GPU, and no --lr"),
        ("dtype", options.dtype != "tf32" or options.device != "cpu", "tf32 takes a GPU"),
        ("modulus", tokens, "this is for --data modular"),
        ("augment", not tokens, "tokens are no images"),
    ]
    for name in ("width", "affine", "train_head"):
        rules.append((name, ":" not in options.model, "a network of your own has its own"))
    for name, good, why in rules:
        if name in given and not good:
            raise Refused(name, f"{why}: change that, or leave it out")
    if options.refine and not options.max_epochs and not average:
        options.max_epochs = 4 * options.epochs


def choose_values(options, given):
    """Which ELRs, angles or learning rates."""
    said = [name for name in ("elr", "sweep", "angle", "lr") if name in given]
    if len(said) != 1:
        ways = "--elr ELR, --sweep, --angle PHI, --lr LR"
        raise Refused("", f"one of {ways} must say which runs, and only one")
    options.mode = "lr" if options.lr else "angle" if options.angle else "elr"
    values = given[said[0]]
    if said == ["sweep"]:
        values = values or ([1e-5, 0.1, 13] if options.data == "modular" else [1e-4, 1.0, 13])
        if len(values) != 3 or values[0] >= values[1] or values[2] not in range(2, 10_001):
            what = "LO HI N with LO < HI and 2 ≤ N ≤ 10000, as in --sweep 1e-4 1 13"
            raise Refused("sweep", f"it takes {what}")
        values = grid(values[0], values[1], int(values[2]))
    options.values = list(dict.fromkeys(float(f"{value:.9g}") for value in values))  # as logs do
    if len(options.values) * options.seeds > 10**5:
        raise Refused("seeds", f"{len(options.values)} × {options.seeds} runs are too many")


def choose_machine(options):
    """Device, jobs, and which of torchrun's ranks this is."""
    options.rank = int(os.environ.get("RANK", 0))
    options.ranks = int(os.environ.get("WORLD_SIZE", 1))
    if options.force and options.ranks > 1:
        raise Refused("force", "the ranks of torchrun share the folder: remove it by hand")
    torch.set_num_threads(1)  # jobs fork from one
    try:
        options.device = find_device(options.device)
    except ValueError as error:
        raise Refused("device", str(error)) from None
    slowness = bf16_slowness() if options.dtype == "bf16" and options.device == "cpu" else 1
    if slowness > 2:
        print(f"note: bf16 takes {slowness:.0f} × the time of fp32 here", file=sys.stderr)
    if options.jobs is None:
        alone = options.ranks > 1 or options.device != "cpu"
        options.jobs = 1 if alone else cores()
    options.jobs = min(options.jobs, len(options.values) * options.seeds)


def bf16_slowness():
    """How many times as long a product takes in bfloat16 as in float32, on the CPU."""
    x, y = torch.ones(256, 256, dtype=torch.bfloat16), torch.ones(256, 256)
    slow, fast = repeat(lambda: x @ x, number=1), repeat(lambda: y @ y, number=1)
    return min(slow) / min(fast)


def read_data(options):
    try:
        data = load(options.data, options.modulus, options.device)
    except ValueError as error:
        raise Refused("data", str(error)) from None
    for note in data.notes:
        print(note)
    if options.augment and data.x.dim() != 4:
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
    """What is on which sphere, and the threads that this takes."""
    try:
        net, x, options.layer_groups = layer_groups(options, data)
    except (ValueError, MemoryError, RuntimeError) as error:
        raise Refused("model", str(error).splitlines()[0]) from None
    choose_threads(options, net, x)


def open_out(options, given):
    """The folder to write into, whose runs must have the same options, and the figure's title."""
    name = f"{Path(options.data).stem}-{options.model.rpartition(':')[2]}"
    space = f"sphere: {options.sphere}"
    if options.mode == "lr":
        name, space = f"{name}-whole", "whole space"
    options.out = options.out or Path("logs") / name
    width = f" of width {options.width}" if options.width else ""
    options.title = f"{options.data}, {options.model}{width}, {space}"
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity |= {"schedule": given.get("schedule"), "device": options.device.split(":")[0]}
    if options.schedule == "cosine" and options.mode != "angle" or options.average:
        identity["epochs"] = options.epochs
    try:
        options.config = open_folder(options.out, identity, options.force)
        options.chance = regimes.read_chance(options.out)
    except ValueError as error:
        raise Refused("out", str(error)) from None
