"""The command line of train.py: `Config` has every option; below, what is refused, and why."""

import math
import os
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

import regimes
from lab import own
from lab.contents import contents
from lab.data import NAMES, Data, add_label_noise, load
from lab.machine import choose_threads, cores, find_device
from lab.runs import number, open_folder
from lab.schedules import SCHEDULES, grid
from models import MODELS

# Options that choose runs, or say how they are done: no part of what a run is.
WHICH = """elr sweep angle lr loop refine max_epochs seed seeds epochs then
    device jobs threads graph out force""".split()
GROUPS = {"elr": "which runs", "sphere": "the step", "model": "the network", "data": "the data"}
GROUPS["dtype"] = "the machine and the files"
FLAG = dict(action="store_true")
REAL, SHARE, ANGLE = number(float), number(float, 0, 1), number(float, 0, math.pi / 2)
WHOLE, FEW, WIDTH = number(int), number(int, 0, 1025), number(int, 0, 2**14)
SEED, MODULUS = number(int, -1, 2**30), number(int, 2, 1025)


class Refused(ValueError):
    """An option, by name, and why it cannot be."""

    def __str__(self):
        name, why = self.args
        return f"argument --{name.replace('_', '-')}: {why}" if name else why


def option(default, text, **how):
    """A field of Config; `how`: the arguments of argparse's add_argument."""
    return field(default=default, metadata=dict(help=text, **how))


@dataclass
class Config:
    """What one asked for. Each field is the option of its name; --label-noise is label_noise."""

    # Which runs
    elr: list = option(None, "runs at these ELRs", nargs="+", type=REAL)
    sweep: list = option(None, "log-spaced: LO HI N (1e-4 1 13)", nargs="*", type=REAL)
    angle: list = option(None, "radians of a step, falling to 0", nargs="+", type=ANGLE)
    lr: list = option(None, "ordinary training at these learning rates", nargs="+", type=REAL)
    loop: list = option(None, "one run down an ELR grid and up again", nargs="*", type=REAL)
    refine: int = option(0, "then bisect both boundaries N times", type=FEW)
    max_epochs: int = option(None, "undecided runs go on, up to N epochs", type=WHOLE)
    seed: int = option(0, "of start and order", type=SEED)
    seeds: int = option(1, "so many, from --seed on", type=WHOLE)
    epochs: int = option(None, "default: 20; modular: 400", type=WHOLE)
    then: float = option(None, "from each end a second run at this ELR or angle", type=REAL)
    # The step
    sphere: str = option("network", "what shares a norm", choices=("network", "layer", "row"))
    momentum: float = option(None, "β of the heavy ball", type=SHARE)
    wd: float = option(None, "weight decay, with --lr", type=REAL)
    schedule: str = option(None, "default: constant; with --angle cosine", choices=SCHEDULES)
    warmup: int = option(0, "epochs in which it first rises", type=WHOLE)
    cooldown: float = option(0.4, "share of the epochs in which wsd falls", type=SHARE)
    average: int = option(None, "test the mean weights of the last K epochs", type=WHOLE)
    # The network
    model: str = option(None, f"{', '.join(MODELS)}, FILE.py:FUNCTION (default: by the data)")
    width: int = option(None, "of ours (default: 8; transformer: 64)", type=WIDTH)
    affine: bool = option(False, "train the BatchNorms' scales and shifts, too", **FLAG)
    train_head: bool = option(False, "train the last layer, too", **FLAG)
    # The data
    data: str = option("digits", f"{', '.join(NAMES)}, FILE.npz, FILE.txt")
    modulus: int = option(31, "addition modulo P, for --data modular", type=MODULUS)
    batch_size: int = option(16, "training inputs of a step", type=WHOLE)
    label_noise: float = option(None, "share of training labels made wrong", type=SHARE)
    augment: bool = option(False, "random crops and flips of the training images", **FLAG)
    # The machine and the files
    dtype: str = option("fp32", "of the arithmetic alone", choices=("fp32", "tf32", "bf16"))
    device: str = option(None, "cpu, cuda, cuda:1 (default: cuda if there)")
    jobs: int = option(None, "runs at a time (default: CPU one per core, GPU 1)", type=FEW)
    threads: int = option(None, "CPU threads of a run (default: what helps)", type=FEW)
    graph: bool = option(False, "GPU: replay each step as a CUDA graph", **FLAG)
    out: Path = option(None, "folder of the logs (default: named after the options)", type=Path)
    force: bool = option(False, "remove the runs in --out first", **FLAG)

    def __post_init__(self):
        defaults = {one.name: one.default for one in fields(self)}
        self.given = {name: x for name, x in vars(self).items() if x != defaults[name]}
        modular = self.data == "modular"
        tokens = modular or self.data.endswith(".txt")
        self.usual_epochs = 400 if modular else 20
        self.model = self.model or ("transformer" if tokens else "convnet")
        self.epochs = self.epochs or self.usual_epochs
        self.schedule = self.schedule or ("cosine" if self.angle else "constant")
        self.rank = int(os.environ.get("RANK", 0))  # of torchrun
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        low, high = (1e-5, 0.1) if modular else (1e-4, 1.0)
        if self.sweep == []:
            self.sweep = [low, high, 13]
        if self.loop == []:
            self.loop = [low, high, 25]
        if self.mode == "loop" and len(self.loop) == 3:
            self.passes = self.given.get("epochs") or (20 if modular else 1)
            self.epochs = self.passes * (2 * int(self.loop[2]) - 1)
        if self.refine and not self.max_epochs and not self.average:
            self.max_epochs = 4 * self.epochs

    @property
    def mode(self):
        """What a run is named by: "elr", "angle", "loop", or "lr", that of ordinary training."""
        for mode in ("angle", "loop", "lr"):
            if getattr(self, mode):
                return mode
        return "elr"

    @property
    def title(self):
        """What a figure is of."""
        width = f" of width {self.width}" if self.width else ""
        space = "whole space" if self.mode == "lr" else f"sphere: {self.sphere}"
        return f"{self.data}, {self.model}{width}, {space}"

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
        """What all runs of a folder have in common: every option but those of WHICH."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        found = {name: value for name, value in found.items() if name not in WHICH}
        found["schedule"] = self.given.get("schedule")  # angles fall, and ELRs beside them do not
        for name in ("data", "model"):
            found[name] = seen_from_here(found[name])
        found["space"] = "whole" if self.mode == "lr" else "sphere"
        longer = self.epochs != self.usual_epochs and not self.loop
        if longer and (self.average or not self.constant):
            found["epochs"] = self.epochs
        found["device"] = (self.device or find_device(None)).partition(":")[0]
        return found

    def folder(self):
        """Where the logs are: --out, or a name that follows from the options."""
        if self.out:
            return self.out
        usual = Config(data=self.data, model=self.model).identity()
        data = Path(seen_from_here(self.data)).with_suffix("").as_posix()
        model = seen_from_here(self.model).replace(".py:", ".")  # mine.mlp
        name = f"{data}-{model}".strip("/").replace("/", ".")
        for option, value in self.identity().items():
            if value != usual.get(option):
                name += f"-{option}" if value is True else f"-{option}={value}"
        return Path("logs") / name


def seen_from_here(name):
    """A file, FILE.py:FUNCTION too, always written in one way; the name of ours as it is."""
    if ":" not in name and not name.endswith((".npz", ".txt")):
        return name
    path = Path(name).resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return path.as_posix()


class Experiment(NamedTuple):
    """What all runs of a command share. layer_groups: names of the tensors that are scale invariant
    together, as own.layer_groups finds them; contents: what contents.contents made of the files."""

    config: Config
    data: Data
    layer_groups: list[list[str]]
    contents: dict[str, str]


def parser():
    text = "Train on the sphere at a fixed effective learning rate (ELR), and name the regime."
    example = "example: python train.py --sweep 1e-4 1 13 --epochs 40"
    parser = regimes.Parser("train.py", description=text, epilog=example, allow_abbrev=False)
    for one in fields(Config):
        if one.name in GROUPS:
            group = parser.add_argument_group(GROUPS[one.name])
        flag = "--" + one.name.replace("_", "-")
        how = dict(one.metadata)
        if one.default:
            how["help"] += f" (default: {one.default})"
        group.add_argument(flag, default=one.default, **how)
    return parser


def parse(argv=None):
    """The options of a command line. Ends in one line, with exit status 2, where they cannot be."""
    try:
        config = Config(**vars(parser().parse_args(argv)))
        check(config)
    except Refused as refused:
        parser().error(str(refused))
    return config


def check(config):
    """Raises Refused where options do not go together, or not with this machine."""
    said = [name for name in ("elr", "sweep", "angle", "lr", "loop") if name in config.given]
    if len(said) != 1:
        ways = "--elr ELR, --sweep, --angle PHI, --lr LR, --loop"
        raise Refused("", f"one of {ways} must say which runs, and only one")
    for name, fewest, usual in (("sweep", 2, 13), ("loop", 8, 25)):
        values, numbers = getattr(config, name), range(fewest, 10_001)
        if values and (len(values) != 3 or values[0] >= values[1] or values[2] not in numbers):
            what = f"LO HI N with LO < HI and {fewest} ≤ N ≤ 10000, as in --{name} 1e-4 1 {usual}"
            raise Refused(name, f"it takes {what}")
    try:
        config.device = find_device(config.device)
    except ValueError as error:
        raise Refused("device", str(error)) from None

    whole, turn, average = config.mode == "lr", config.mode == "angle", config.average or 0
    fixed = config.mode == "elr" and config.constant
    several = config.sweep or len(config.values) > 1
    most = config.max_epochs or config.epochs
    modular = config.data == "modular"
    runs = len(config.values) * config.seeds
    rules = [
        ("wd", whole, "this is for --lr"),
        ("sphere", not whole, "in the whole space, --lr, there is no sphere"),
        ("refine", several and fixed, "it takes --sweep, or several constant ELRs"),
        ("max_epochs", fixed and not average, "it takes constant ELRs, and no --average"),
        ("max_epochs", most >= config.epochs, f"it is less than --epochs {config.epochs}"),
        ("average", average <= config.epochs, f"there are {config.epochs} epochs"),
        ("warmup", config.warmup < config.epochs, f"it is not less than --epochs {config.epochs}"),
        ("schedule", not config.loop, "--loop has its own"),
        ("warmup", not config.loop, "--loop has its own"),
        ("cooldown", config.schedule == "wsd", "this is for --schedule wsd"),
        ("then", fixed or turn, "it takes a constant ELR"),
        ("then", not turn or (config.then or 0) < math.pi / 2, "it is no angle below π/2"),
        ("graph", not whole and "cuda" in config.device, "it takes a GPU, and no --lr"),
        ("dtype", config.dtype != "tf32" or config.device != "cpu", "tf32 takes a GPU"),
        ("modulus", modular, "this is for --data modular"),
        ("augment", not modular, "tokens are no images"),
        ("force", config.ranks == 1, "the ranks of torchrun share the folder"),
        ("seeds", runs <= 10**5, f"{len(config.values)} × {config.seeds} runs are too many"),
    ]
    for name in ("width", "affine", "train_head"):
        rules.append((name, ":" not in config.model, "a network of your own has its own"))
    for name, good, why in rules:
        if name in config.given and not good:
            raise Refused(name, f"{why}: change that, or leave it out")


def prepare(config):
    """What takes a look at the data, the network and the folder; says what is refused there, and
    opens the folder. Raises Refused."""
    torch.set_num_threads(1)  # jobs fork from one
    if config.jobs is None:
        alone = config.ranks > 1 or config.device != "cpu"
        config.jobs = 1 if alone else cores()
    config.jobs = min(config.jobs, len(config.values) * config.seeds)
    data = read_data(config)
    try:
        net, x, layer_groups = own.layer_groups(config, data)
    except (ValueError, MemoryError, RuntimeError) as error:
        raise Refused("model", str(error).splitlines()[0]) from None
    choose_threads(config, net, x)
    made_by = contents(config.model, data)
    config.out = config.folder()
    try:
        told = open_folder(config.out, config.identity(), made_by, config.force)
    except ValueError as error:
        raise Refused("out", str(error)) from None
    if told:
        print(told)
    return Experiment(config, data, layer_groups, made_by)


def read_data(config):
    """The data set, with label noise. Raises Refused."""
    try:
        data = load(config.data, config.modulus, config.device)
    except ValueError as error:
        raise Refused("data", str(error)) from None
    for note in data.notes:
        print(note)
    if config.augment and data.x.dim() != 4:
        raise Refused("augment", "this is for images: leave it out")
    n, noise = len(data.x), config.label_noise
    if noise and not round(noise * n):
        raise Refused("label_noise", f"{noise:g} of {n} training inputs is none")
    if noise:
        add_label_noise(data, noise)
    if config.batch_size > n:
        raise Refused("batch_size", f"{config.batch_size} is more than the {n} training inputs")
    return data


def what_next(config, found):
    """The paper's advice: start just above the boundary of convergence, go on well below it. Then
    the angle, which needs no sweep. Commands with the options of this one that they can have."""
    ways, commands = [], []
    boundary = regimes.boundaries(found)[0]
    if boundary.seen:
        ways.append(["--elr", f"{boundary.high:g}", "--then", f"{boundary.low / 10:.2g}"])
    if config.mode != "angle":
        ways.append(["--angle", "0.05"])
    for words in ways:
        for name, value in config.given.items():
            if name in WHICH or name in ("wd", "schedule", "warmup", "cooldown", "average"):
                continue
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(str(value))
        kept = [*words, "--out", str(config.given.get("out"))]
        if "out" in config.given and parse(words).identity() == config.identity():
            words = kept
        commands.append(shlex.join(["python", "train.py", *words]))
    return commands
