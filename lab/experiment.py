"""What a command line comes to: data, network and folder; and what is best done next."""

import shlex
import sys
from dataclasses import fields
from typing import NamedTuple

import torch

import regimes
from lab import own
from lab.contents import changed, contents, of_scripts
from lab.data import Data, add_label_noise, load
from lab.groups import layer_groups
from lab.loop import classify_loop
from lab.machine import choose_threads, cores, keep_memory
from lab.options import COURSE, DATA, MACHINE, NETWORK, RUNS, STEP, Config, flag, refuse, refusing
from lab.runs import add_to_config, jobs_of, open_folder


class Experiment(NamedTuple):
    """What all runs of a command share. layer_groups: names of the tensors that are scale invariant
    together, from groups.layer_groups; contents: what contents.contents made of the files."""

    config: Config
    data: Data
    layer_groups: list[list[str]]
    contents: dict[str, str]

    def build(self):
        """The network. Raises ValueError where its files are not those that `contents` has."""
        net = own.build(self.config, self.data)
        now = of_scripts(own.files_of(self.config.model))
        now = {name: now.get(name, x) for name, x in self.contents.items()}
        edits = changed(self.contents, now)
        if edits:
            raise ValueError(f"{edits} since this command began: give it again")
        return net


def prepare(config):
    """Load the data, try the network, open the folder. Refuses what does not work, in one line."""
    torch.set_num_threads(1)  # jobs fork from one
    if config.jobs is None:
        alone = config.ranks > 1 or config.device != "cpu"
        config.jobs = 1 if alone else cores()
    config.jobs = min(config.jobs, len(config.values) * config.seeds)
    data = read_data(config)
    with refusing("model"):
        net, x, groups = layer_groups(config, data)
    choose_threads(config, net, x)
    made_by = contents(data, own.files_of(config.model))
    with refusing("out"):
        given, config.out = config.out, config.folder()
        note = open_folder(config.out, config.identity(), made_by, given)
        about = dict(command=config.given, threads=config.threads, labels=data.labels)
        about["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
        add_to_config(config.out, **about)
    if note:
        print(note, file=sys.stderr)  # the ranks of torchrun but the first have no stdout
    keep_memory()
    return Experiment(config, data, groups, made_by)


def read_data(config):
    """The data set, with label noise."""
    with refusing("data"):
        data = load(config.data, config.modulus, config.device)
    for note in data.notes:
        print(note)
    n, noise = len(data.x), config.label_noise
    if config.augment and data.x.dim() != 4:
        refuse("augment", "this is for images: leave it out")
    if config.batch_size > n:
        refuse("batch_size", f"{config.batch_size} is more than the training set: take at most {n}")
    if noise and not round(noise * n):
        refuse("label_noise", f"{noise:g} of {n} training inputs is none")
    if noise:
        add_label_noise(data, noise)
    return data


def words(config, *groups):
    """The options of these groups that were given, but for how long, as on a command line."""
    found = []
    for one in fields(config):
        value = config.given.get(one.name)
        if value is None or one.metadata["group"] not in groups or "epochs" in one.name:
            continue
        if str(value).startswith("-"):  # the name of a file
            found.append(f"{flag(one)}={value}")
            continue
        found.append(flag(one))
        if value is not True:
            for x in value if isinstance(value, list) else [value]:
                found.append(f"{x:.15g}" if isinstance(x, float) else str(x))
    return found


def what_next(config, found):
    """Commands. Where a run is undecided, this one with twice the epochs. The paper's advice: start
    just above the boundary of convergence, go on well below it; after a loop, that is where it
    freezes, and first the ELR below it. Then the angle, which needs no sweep; these with the step,
    network, data and --epochs of this one."""
    commands, shared, epochs = [], words(config, STEP, NETWORK, DATA), config.epochs
    longer = max(run.verdict.more_epochs or 0 for run in found)
    if longer and config.mode == "elr" and config.constant and not config.average:
        again = words(config, RUNS, STEP, COURSE, NETWORK, DATA, MACHINE)
        epochs = max(longer, 2 * config.epochs)
        commands.append([*again, "--epochs", str(epochs)])
    if "epochs" in config.given and not config.loop:  # of a loop they are those at each ELR
        shared += ["--epochs", str(epochs)]
    boundary = regimes.boundaries(found)[0]
    below, above = boundary.low, boundary.high
    freezes = _freezes(config, found)
    if freezes:
        below, above = freezes
        commands.append(["--elr", f"{below:g}", *shared])
    if below < above:
        commands.append(["--elr", f"{above:g}", "--then", f"{below / 10:.2g}", *shared])
    if config.mode != "angle":
        commands.append(["--angle", "0.05", *shared])
    return [shlex.join(["python", sys.argv[0], *command]) for command in commands]


def _freezes(config, found):
    """The interval in which the loop of this command freezes, if it is one that does."""
    if not config.loop:
        return None
    seeds = range(config.seed, config.seed + config.seeds)
    paths = [job.path for job in jobs_of(config, config.values, seeds)]
    loops = [run for run in found if run.path in paths]
    return classify_loop([run.log for run in loops], loops[0].chance).freezes if loops else None
