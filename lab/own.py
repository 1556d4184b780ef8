"""Somebody's own network, FILE.py:FUNCTION: loaded and tried. What goes wrong in their code is told
in one line."""

import inspect
import os
import random
import sys
import traceback
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
# Of whose lines nobody is told.
LIBRARIES = (str(Path(torch.__file__).parents[1]), str(Path(os.__file__).parent), "<")
LIBRARIES += (str(ROOT / "lab"), str(ROOT / "models.py"))


OURS = ("train", "sphere_step", "models", "regimes", "lab")


def load(model, data):
    """The network, on the device of the data, whose output are its logits. The file runs anew each
    time. Raises ValueError where that cannot be."""
    file, _, name = model.rpartition(":")
    x, path = data.normalized(data.x[:2]), Path(file).resolve()
    devices = [x.device] if x.is_cuda else []
    known = dict(channels=x.shape[1], classes=data.classes, example=x[0].cpu())
    if data.tokens is not None:
        known["tokens"] = data.tokens
    with _beside(path):
        # A seed that the file sets is not that of the run.
        with told(f"{file} cannot be imported"), torch.random.fork_rng(devices):
            module = ModuleType(f"_{path.stem}")
            module.__file__ = str(path)
            sys.modules[module.__name__] = module  # where dataclasses look for it
            exec(compile(path.read_bytes(), path, "exec"), vars(module))
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"{file} has no function {name!r}")
        with told(f"{model} cannot be called"):
            net = function if isinstance(function, nn.Module) else _call(function, known)
        with told(f"{model} cannot be run on the data"), torch.no_grad():
            net.to(x.device).eval()(x)  # what is lazy is made now
            net.register_forward_hook(logits)
    return net.train()


def _call(function, known):
    """Call it with what it names of `known`, or with (channels, classes)."""
    signature = inspect.signature(function)
    named = {name: known[name] for name in signature.parameters if name in known}
    starred = any(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()
    )
    positional = starred and not named
    try:
        signature.bind(**named)
    except TypeError:
        positional = True
    if positional:
        return function(known["channels"], known["classes"])
    return function(**named)


def logits(net, inputs, output):
    """Of an output of several parts that which is called logits, or the first."""
    if isinstance(output, dict):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the output is a {type(output).__name__} without logits")
    return output


def rehearse(make, data, options):
    """A network, made by `make`. Raises ValueError where it cannot be run as it will be."""
    net, model, device = make(), options["model"], data.x.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options["dtype"] == "bf16")
    size = options["batch_size"]
    x, y = data.inputs(torch.arange(size, device=device)), data.y[:size]
    with told(f"{model} cannot be trained on a batch of {size}"):
        with autocast:
            out = net(x).float()
        if out.shape != (size, data.classes):
            wanted = f"[{size}, {data.classes} classes]"
            raise ValueError(f"the network's output is {list(out.shape)}, not {wanted}")
        F.cross_entropy(out, y).backward()
        for p in net.parameters():
            if p.is_complex() or (p.grad is not None and p.grad.is_sparse):
                raise ValueError("a parameter is complex, or its gradient sparse")
    if ":" not in model:
        return net
    last, other = data.test_x.split(512)[-1], make()  # the last batch of measure.on_test_set
    with told(f"{model} cannot be tested on a batch of {len(last)}"), autocast, torch.no_grad():
        net.eval()(data.normalized(last))
    if any(p is q for p, q in zip(net.parameters(), other.parameters(), strict=False)):
        raise ValueError(f"{model} is the same network each time, and each run trains its own")
    if options["average"]:
        with told(f"{model} cannot be copied, for --average"):
            deepcopy(other)(x).sum().backward()
            if any(p.grad is not None for p in other.parameters()):
                raise ValueError("a copy computes with the weights of the original")
    return net


@contextmanager
def told(what):
    """Whatever goes wrong in somebody's code, as a ValueError of one line, with the last line of
    their own that it passed."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except BaseException as error:  # sys.exit, too
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        for frame in traceback.extract_tb(error.__traceback__)[::-1]:
            if not frame.filename.startswith(LIBRARIES):
                why += f"; {frame.filename}, line {frame.lineno}"
                break
        raise ValueError(f"{what} ({why})") from error


def seed_all(seed):
    """Python's, numpy's and torch's random numbers begin anew."""
    for begin in (random.seed, np.random.seed, torch.manual_seed):
        begin(seed)


@contextmanager
def measuring(net):
    """Without cuDNN, which needs its eps. Afterwards all random numbers go on as if nothing had
    happened."""
    devices = [p.device for p in net.parameters() if p.is_cuda][:1]
    pythons, numpys, cudnn = random.getstate(), np.random.get_state(), torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)
        torch.backends.cudnn.enabled = cudnn


@contextmanager
def _beside(path):
    """While somebody's file runs, modules of its folder come first, even those with the names of
    ours, and the command line is its own."""
    folder, before, argv, places = path.parent, dict(sys.modules), sys.argv, list(sys.path)
    here = os.getcwd()
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    sys.argv = [str(path)]
    try:
        yield
    finally:
        sys.path[:] = dict.fromkeys([*places, str(folder)])  # last: forward may import, too
        sys.argv = argv
        os.chdir(here)
        for name in set(sys.modules) - set(before):
            file = getattr(sys.modules[name], "__file__", None) or "<"
            theirs = file.startswith(str(folder)) and not file.startswith(LIBRARIES)
            if theirs and file != str(path):  # what type hints name is looked up in it
                del sys.modules[name]
        sys.modules.update(before)
