"""The network of a run: ours by name, or somebody's own, FILE.py:FUNCTION, loaded and tried. What
goes wrong in their code is said in one line."""

import inspect
import os
import random
import sys
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import models
from lab.contents import is_library, package_root, recorded
from lab.invariance import logits

OUR_MODULES = ("train", "sphere_step", "models", "regimes", "lab")
LOADED = {}  # somebody's file → the hashes of all files that were read for it, and of itself


def build(config, data):
    """The network that `config` names for these data, by model, width, affine and train_head.
    Raises ValueError where that cannot be."""
    if ":" in config.model:
        return load(config.model, data)
    ours = dict(width=config.width, affine=config.affine, train_head=config.train_head)
    return models.build(config.model, data, **ours)


def load(model, data):
    """The network FILE.py:FUNCTION, on the device of the data, whose output are its logits. The
    file runs anew each time. Raises ValueError."""
    file, _, name = model.rpartition(":")
    path = Path(file).resolve()
    if not name or not path.is_file():
        raise ValueError(f"{model} is no FILE.py:FUNCTION that is there")
    x = data.normalized(data.x[:2])
    devices = [x.device] if x.is_cuda else []
    known = dict(channels=x.shape[1], classes=data.classes, example=x[0].cpu())
    if data.tokens is not None:
        known["tokens"] = data.tokens
    with beside(path) as package, explained(f"{model} cannot be loaded"):
        with ExitStack() as after:  # a seed that the file sets is not that of the run
            after.callback(random.setstate, random.getstate())
            after.callback(np.random.set_state, np.random.get_state())
            after.enter_context(torch.random.fork_rng(devices))
            module = ModuleType(f"_{path.stem}")
            module.__file__, module.__package__ = str(path), package
            sys.modules[module.__name__] = module  # where dataclasses look for it
            exec(compile(path.read_bytes(), path, "exec"), vars(module))
        net = getattr(module, name)
        if not isinstance(net, nn.Module):
            net = _call(net, known)
        if not isinstance(net, nn.Module):
            raise TypeError(f"{name} returns a {type(net).__name__}, no nn.Module")
        with torch.no_grad():
            _first_pass(net.to(x.device), x)
        if not isinstance(net, torch.jit.ScriptModule):  # which has no hooks
            net.register_forward_hook(logits)
    return net.train()


def _first_pass(net, x):
    """Lazy layers get their shapes here, some in training alone."""
    try:
        net.eval()(x)
        if any(is_lazy(p) for p in net.parameters()):
            net.train()(x)
    except RuntimeError as error:
        types = {str(p.dtype)[6:] for p in net.parameters()} - {"float32"}
        if types:
            cure = f"its weights are {types.pop()}, and inputs float32: take net.float()"
            raise TypeError(f"{error}: {cure}") from error
        raise


def _call(function, known):
    """Call it with what it names of `known`, or with (channels, classes)."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named = {name: known[name] for name in signature.parameters if name in known}
    unnamed = not named and any(p.kind is p.VAR_POSITIONAL for p in parameters)
    try:
        signature.bind(**named)
    except TypeError:
        unnamed = True
    if unnamed:
        return function(known["channels"], known["classes"])
    return function(**named)


def files_of(model):
    """The files of somebody's network, its own and what was read for it: file → hash."""
    if ":" not in model:
        return {}
    return LOADED.setdefault(Path(model.rpartition(":")[0]).resolve(), {})


@contextmanager
def beside(path):
    """While somebody's file runs, `import x` finds the x in its folder, as if they had run it.

    When mine.py says `from models import Block`, that is the models.py next to it, not ours. `from
    sphere_step import SphereSGD` gets ours if there is none next to it. Afterwards ours are back,
    and theirs forgotten, so that the next network imports them anew. Yields the package in which
    `from .blocks import Block` is looked up. What is read goes into LOADED.
    """
    root = package_root(path)
    folders = [str(path.parent), str(root)]
    modules, argv, places, here = dict(sys.modules), sys.argv, list(sys.path), os.getcwd()
    for name in modules:
        if name.partition(".")[0] in OUR_MODULES:
            del sys.modules[name]
    package = sys.modules["_own"] = ModuleType("_own")
    package.__path__ = [str(root)]
    sys.path[:0] = folders
    sys.argv = [str(path)]
    try:
        with recorded(LOADED.setdefault(path, {})):
            yield ".".join(["_own", *path.parent.relative_to(root).parts])
    finally:
        sys.path[:] = dict.fromkeys([*places, *folders])  # last: forward may import, too
        sys.argv = argv
        os.chdir(here)
        for name in set(sys.modules) - set(modules):
            file = getattr(sys.modules[name], "__file__", None) or "<"
            theirs = file.startswith(str(root)) and not is_library(file)
            if theirs and file != str(path):  # dataclasses and type hints look names up in it later
                del sys.modules[name]
        sys.modules.update(modules)


@contextmanager
def explained(failure, passing=()):
    """What goes wrong in somebody's code, as a ValueError of one line, with the last line of their
    own that it passed. Ctrl-C passes, and what is in `passing`."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError, *passing):
        raise
    except BaseException as error:  # sys.exit in their file, too
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if not is_library(frame.filename):  # their user can mend it
                why += f"; {frame.filename}, line {frame.lineno}"
                break
        raise ValueError(f"{failure} ({why})") from error


@contextmanager
def running(model):
    """`explained` for a whole run of somebody's network; of ours one wants to see the traceback."""
    if ":" not in model:
        yield
        return
    with explained(f"{model} cannot be trained", passing=(OSError, MemoryError)):  # a full disk
        yield


def rehearse(net, data, config):
    """Raises ValueError where the network cannot be run on a batch as it will be."""
    size = config.batch_size
    x = data.inputs(torch.arange(size, device=data.x.device))
    bf16 = torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bf16")
    read = nullcontext()
    if ":" in config.model:  # it may import something in training alone
        read = recorded(files_of(config.model))
    with explained(f"{config.model} cannot be trained on a batch of {size}"), bf16, read:
        out = net(x)
        if out.shape != (size, data.classes):
            wanted = f"[{size}, {data.classes} classes]"
            raise ValueError(f"the network's output is {list(out.shape)}, not {wanted}")
        if any(getattr(layer, "sparse", False) for layer in net.modules()):
            raise ValueError("its gradients are sparse: leave sparse=True out")
