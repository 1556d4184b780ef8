"""The command line of train.py: `Config` has every option; below, what is refused, and why."""

import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import regimes
from lab.contents import hash_of, seen_from_here
from lab.data import NAMES
from lab.machine import find_device
from lab.runs import number
from lab.schedules import SCHEDULES, grid
from models import MODELS

# Groups of options. The runs of a folder share all but those of RUNS and MACHINE.
RUNS, STEP, COURSE = "which runs", "the step", "the course of a run"
NETWORK, DATA, MACHINE = "the network", "the data", "the machine and the files"
WAYS = {"elr", "sweep", "angle", "lr", "loop"}  # of which one says which runs
OF_OUR_NETWORKS = ("width", "affine", "train_head")
SWITCH = dict(action="store_true")
REAL, SHARE, RADIANS = number(float), number(float, 0, 1), number(float, high=math.pi / 2)
POSITIVE, UP_TO_1024, COUNT = number(int), number(int, 1, 1024), number(int, 0, 2**30)


def refuse(name, why):
    """End with one line about an option, status 2."""
    parser().error(f"argument --{name.replace('_', '-')}: {why}")


@contextmanager
def refusing(name):
    """What goes wrong inside refuses this option."""
    try:
        yield
    except (ValueError, MemoryError, RuntimeError) as error:
        refuse(name, str(error).partition("\n")[0])


def option(group, default, text, **of_argparse):
    """A field of Config; of_argparse: arguments of add_argument."""
    return field(default=default, metadata=dict(group=group, help=text, **of_argparse))


def flag(field):
    return "--" + field.name.replace("_", "-")


@dataclass
class Config:
    """What one asked for. Each field is an option; --label-noise is label_noise."""

    elr: list = option(RUNS, None, "runs at these ELRs", nargs="+", type=REAL)
    sweep: list = option(RUNS, None, "log-spaced: LO HI N (1e-4 1 13)", nargs="*", type=REAL)
    angle: list = option(RUNS, None, "radians of a step, falling to 0", nargs="+", type=RADIANS)
    lr: list = option(RUNS, None, "plain SGD at these rates", nargs="+", type=REAL)
    loop: list = option(
        RUNS, None, "a run down N ≥ 8 ELRs and up: LO HI N (1e-4 1 25)", nargs="*", type=REAL
    )
    refine: int = option(RUNS, 0, "then bisect both boundaries N times", type=number(int, 0, 1024))
    max_epochs: int = option(RUNS, None, "undecided runs go on, up to N epochs", type=POSITIVE)
    seed: int = option(RUNS, 0, "of weights and batches", type=COUNT)
    seeds: int = option(RUNS, 1, "number of seeds, from --seed on", type=UP_TO_1024)
    epochs: int = option(RUNS, None, "default: 20; modular: 400", type=POSITIVE)
    then: float = option(RUNS, None, "from each end a run at this ELR or angle", type=REAL)

    sphere: str = option(STEP, "network", "what shares a norm", choices=["network", "layer", "row"])
    momentum: float = option(STEP, None, "β of the heavy ball", type=SHARE)
    dtype: str = option(STEP, "fp32", "of the arithmetic", choices=["fp32", "tf32", "bf16"])

    wd: float = option(COURSE, None, "weight decay, with --lr", type=number(float, 0))
    schedule: str = option(COURSE, None, "default: constant; --angle: cosine", choices=SCHEDULES)
    warmup: int = option(COURSE, 0, "epochs in which the ELR rises", type=COUNT)
    cooldown: float = option(
        COURSE, 0.4, "share of epochs in which wsd falls", type=number(float, high=1)
    )
    average: int = option(COURSE, None, "test the mean weights of the last K epochs", type=COUNT)

    edge: int = option(COURSE, None, "batch sharpness, before every K-th step", type=POSITIVE)

    model: str = option(NETWORK, None, f"{', '.join(MODELS)}, FILE.py:FUNCTION")
    width: int = option(NETWORK, None, "8; transformer: 64", type=number(int, 1, 16383))
    affine: bool = option(NETWORK, False, "train BatchNorm's scales and shifts, too", **SWITCH)
    train_head: bool = option(NETWORK, False, "train the last layer, too", **SWITCH)

    data: str = option(DATA, "digits", f"{', '.join(NAMES)}, FILE.npz, FILE.txt")
    modulus: int = option(DATA, 31, "of --data modular", type=number(int, 3, 1024))
    batch_size: int = option(DATA, 16, "training inputs of a step", type=POSITIVE)
    label_noise: float = option(DATA, None, "share of training labels made wrong", type=SHARE)
    augment: bool = option(DATA, False, "random crops and flips", **SWITCH)

    device: str = option(MACHINE, None, "cpu, cuda, cuda:1 (default: cuda if there)")
    jobs: int = option(MACHINE, None, "runs at a time (default: CPU cores, GPU 1)", type=UP_TO_1024)
    threads: int = option(
        MACHINE, None, "CPU threads of a run (default: what helps)", type=UP_TO_1024
    )
    graph: bool = option(MACHINE, False, "GPU: replay each step as a CUDA graph", **SWITCH)
    out: str = option(MACHINE, None, "folder (default: by the options)")

    def __post_init__(self):
        self.given = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value == 0:  # none, as where it is not given
                setattr(self, one.name, one.default)
            elif value != one.default:
                self.given[one.name] = value
        modular = self.data == "modular"
        tokens = modular or self.data.endswith(".txt")
        if self.model is None:
            self.model = "transformer" if tokens else "convnet"
        self.epochs = self.epochs or (400 if modular else 20)
        self.schedule = self.schedule or ("cosine" if self.angle else "constant")
        self.rank = int(os.environ.get("RANK", 0))  # of torchrun
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.sweep == []:
            self.sweep = [1e-5, 0.1, 13] if modular else [1e-4, 1.0, 13]
        if self.loop == []:
            self.loop = [1e-5, 2.15e-3, 15] if modular else [1e-4, 1.0, 25]
        if self.loop and len(self.loop) == 3:
            self.passes = self.given.get("epochs") or (20 if modular else 1)
            self.epochs = self.passes * (2 * int(self.loop[2]) - 1)
        if self.refine and not self.max_epochs and not self.average:
            self.max_epochs = 4 * self.epochs

    @property
    def mode(self):
        """What names a run: "elr", "angle", "loop", or "lr", that of plain SGD."""
        return next((mode for mode in ("angle", "loop", "lr") if getattr(self, mode)), "elr")

    @property
    def constant(self):
        """Whether a run that goes on has the same beginning."""
        return self.schedule == "constant" and not self.warmup and not self.loop

    @property
    def values(self):
        """ELRs, angles or learning rates, as 9 digits say them, for so do logs."""
        values = self.elr or self.angle or self.lr or (self.loop or [])[1:2] or grid(*self.sweep)
        return list(dict.fromkeys(float(f"{value:.9g}") for value in values))

    def identity(self):
        """What the runs of a folder share."""
        found = {"mode": self.mode}
        for one in fields(self):
            if one.metadata["group"] not in (RUNS, MACHINE):
                found[one.name] = getattr(self, one.name)
        if ":" in self.model:
            found["model"] = seen_from_here(self.model)
        if self.data not in NAMES:
            found["data"] = seen_from_here(self.data)
        found["device"] = (self.device or find_device(None)).partition(":")[0]
        if not self.loop and (self.average or not self.constant):
            found["epochs"] = self.epochs
        return found

    def folder(self):
        """Where the logs are: --out, or a name made of the options."""
        if self.out:
            return Path(self.out)
        usual = Config(data=self.data, model=self.model, **{self.mode: getattr(self, self.mode)})
        usual, here = {"epochs": usual.epochs} | usual.identity(), self.identity()
        data, model = here.pop("data"), here.pop("model")
        files = f"{data}-{model}"
        model = model.replace(".py:", ".")  # mine.mlp
        if data.removesuffix(".npz") not in NAMES:
            data = data.removesuffix(".npz")
        name = f"{data}-{model}".strip("/").replace("/", ".")
        if self.mode != "elr":
            name += f"-{self.mode}"
        for option, value in here.items():
            if value != usual[option]:
                name += f"-{option}" if value is True else f"-{option}={value}"
        plain = re.fullmatch(r"\w+(\.npz|\.txt)?-\w+(\.py:\w+)?", files)
        whole = name.encode()
        if not plain or len(whole) > 150:  # of 255; a/b.npz is not a.b.npz
            name = whole[:120].decode(errors="ignore")
            name += "-" + hash_of(files.encode(), whole)[:8]
        return Path("logs") / name


def parser():
    text = "Train on the sphere at a fixed effective learning rate (ELR), name its regime."
    parser = regimes.Parser("train.py", description=text, allow_abbrev=False)
    groups = {}
    for one in fields(Config):
        of_argparse = dict(one.metadata)
        title = of_argparse.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if one.default:
            of_argparse["help"] += f" (default: {one.default})"
        groups[title].add_argument(flag(one), default=one.default, **of_argparse)
    return parser


def parse(argv=None):
    """The options of a command line; what cannot be is refused."""
    config = Config(**vars(parser().parse_args(argv)))
    check(config)
    return config


def check(config):
    """Refuse what does not go together, or not with this machine."""
    if len(WAYS & config.given.keys()) != 1:
        refuse("elr", "give exactly one of --elr, --sweep, --angle, --lr, --loop")
    for name, fewest, usual in (("sweep", 2, 13), ("loop", 8, 25)):
        grid, numbers = getattr(config, name), range(fewest, 10_001)
        if grid and (len(grid) != 3 or grid[0] >= grid[1] or grid[2] not in numbers):
            refuse(name, f"it takes LO HI N, LO < HI, {fewest} ≤ N ≤ 10000: 1e-4 1 {usual}")
    with refusing("device"):
        config.device = find_device(config.device)

    whole, turn, gpu = config.mode == "lr", config.mode == "angle", config.device != "cpu"
    fixed = config.mode == "elr" and config.constant
    uneven = config.model == "transformer" and (config.width or 0) % 4  # heads
    several = config.sweep or len(config.values) > 1
    rules = [  # option, what must hold where it is given, why not
        ("wd", whole, "this is for --lr"),
        ("refine", several and fixed, "it takes --sweep, or several constant ELRs"),
        ("max_epochs", fixed and not config.average, "it takes constant ELRs, and no --average"),
        ("max_epochs", (config.max_epochs or 0) >= config.epochs, "it is less than --epochs"),
        ("warmup", config.warmup < config.epochs, "it is not less than --epochs"),
        ("average", (config.average or 0) <= config.epochs, "it is more than --epochs"),
        *((name, not config.loop, "--loop has its own") for name in ("schedule", "warmup")),
        ("cooldown", config.schedule == "wsd", "this is for --schedule wsd"),
        ("then", fixed or turn, "it takes a constant ELR"),
        ("then", not turn or (config.then or 0) < math.pi / 2, "it is no angle below π/2"),
        ("edge", not config.graph, "it cannot look into a CUDA graph"),
        ("graph", gpu and not whole, "it takes a GPU, and no --lr"),
        ("dtype", gpu or config.dtype != "tf32", "tf32 takes a GPU"),
        ("modulus", config.data == "modular", "this is for --data modular"),
        ("width", not uneven, "a transformer's is a multiple of 4"),
        ("out", config.out != "", "it takes a folder"),
        *((name, ":" not in config.model, "yours has its own") for name in OF_OUR_NETWORKS),
    ]
    for name, good, why in rules:
        if name in config.given and not good:
            refuse(name, f"{why}: change that, or leave it out")
