"""The network of a run: ours by name, or somebody's own, FILE.py:FUNCTION, loaded and tried. What
goes wrong in their code is told in one line."""

import inspect
import math
import os
import sys
import traceback
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from lab.invariance import MAX_EPS, logits, scale_invariant_groups
from models import MODELS

ROOT = Path(__file__).resolve().parents[1]
OURS = ("train", "sphere_step", "models", "regimes", "lab")
# Of whose lines nobody is told.
LIBRARIES = (str(Path(torch.__file__).parents[1]), str(Path(os.__file__).parent), "<")
LIBRARIES += (str(ROOT / "lab"), str(ROOT / "models.py"), str(ROOT / "train.py"))


def build(options, data):
    """The network that `options` name for these data: their `model` is one of MODELS, with `width`,
    `affine` and `train_head`, or FILE.py:FUNCTION. Raises ValueError where that cannot be."""
    model, example = options.model, data.x[0]
    if ":" in model:
        return load(model, data)
    if model not in MODELS:
        raise ValueError(f"no network {model!r}: choose {', '.join(MODELS)} or FILE.py:FUNCTION")
    takes = inspect.signature(MODELS[model]).parameters
    if "tokens" in takes and data.tokens is None:
        raise ValueError(f"the {model} takes tokens, as --data modular has, not these")
    images = example.dim() == 3 and min(example.shape[1:]) >= 8
    if model in ("convnet", "resnet18") and not images:
        raise ValueError(f"{model} takes images of at least 8 × 8, not {list(example.shape)}")
    for name in ("affine", "train_head"):
        if getattr(options, name) and name not in takes:
            raise ValueError(f"the {model} has no --{name.replace('_', '-')}: leave it out")
    known = dict(channels=len(example), classes=data.classes, tokens=data.tokens)
    known |= dict(length=len(example), affine=options.affine, train_head=options.train_head)
    if options.width:
        known["width"] = options.width
    return MODELS[model](**{name: known[name] for name in takes if name in known})


def load(model, data):
    """The network FILE.py:FUNCTION, on the device of the data, whose output are its logits. The
    file runs anew each time. Raises ValueError where that cannot be."""
    file, _, name = model.rpartition(":")
    x, path = data.normalized(data.x[:2]), Path(file).resolve()
    devices = [x.device] if x.is_cuda else []
    known = dict(channels=x.shape[1], classes=data.classes, example=x[0].cpu())
    if data.tokens is not None:
        known["tokens"] = data.tokens
    with beside(path) as package:
        # A seed that the file sets is not that of the run.
        with explained(f"{file} cannot be imported"), torch.random.fork_rng(devices):
            module = ModuleType(f"_{path.stem}")
            module.__file__, module.__package__ = str(path), package
            sys.modules[module.__name__] = module  # where dataclasses look for it
            exec(compile(path.read_bytes(), path, "exec"), vars(module))
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"{file} has no function {name!r}")
        with explained(f"{model} cannot be called"):
            net = function if isinstance(function, nn.Module) else _call(function, known)
        with explained(f"{model} cannot be run on the data"), torch.no_grad():
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


@contextmanager
def beside(path):
    """While somebody's file runs, `import x` finds the x in its folder, as if they had run it.

    Their project may well have a models.py, too: when mine.py says `from models import Block`, that
    is the one next to it, not ours. `from sphere_step import SphereSGD` gets ours if there is none
    next to it. Afterwards ours are back, and theirs are forgotten: the next network imports them
    anew. Yields the name of the package in which `from .blocks import Block` is looked up.
    """
    root = path.parent
    while (root / "__init__.py").exists():
        root = root.parent
    package = ModuleType("_own")
    package.__path__ = [str(root)]
    modules, argv, places, here = dict(sys.modules), sys.argv, list(sys.path), os.getcwd()
    for name in modules:
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    sys.modules["_own"] = package
    folders = dict.fromkeys([str(path.parent), str(root)])
    sys.path[:0] = folders
    sys.argv = [str(path)]
    try:
        yield ".".join(["_own", *path.parent.relative_to(root).parts])
    finally:
        sys.path[:] = dict.fromkeys([*places, *folders])  # last: forward may import, too
        sys.argv = argv
        os.chdir(here)
        for name in set(sys.modules) - set(modules):
            file = getattr(sys.modules[name], "__file__", None) or "<"
            theirs = file.startswith(str(root)) and not file.startswith(LIBRARIES)
            if theirs and file != str(path):  # what type hints name is looked up in it
                del sys.modules[name]
        sys.modules.update(modules)


@contextmanager
def explained(what):
    """Whatever goes wrong in somebody's code, as a ValueError of one line, with the last line of
    their own that it passed. Ctrl-C passes, and the exit that a signal handler of ours raises."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except BaseException as error:  # sys.exit in their file, too
        frames = traceback.extract_tb(error.__traceback__)[::-1]
        ours = frames[0].filename.startswith(str(ROOT / "lab"))
        if ours and not isinstance(error, Exception):
            raise
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        for frame in frames:
            if not frame.filename.startswith(LIBRARIES):
                why += f"; {frame.filename}, line {frame.lineno}"
                break
        raise ValueError(f"{what} ({why})") from error


@contextmanager
def running(model):
    """`explained` for a whole run of somebody's network; of ours one wants to see the traceback."""
    if ":" not in model:
        yield
        return
    try:
        with explained(f"{model} cannot be trained"):
            yield
    except ValueError as error:
        if isinstance(error.__cause__, OSError | MemoryError):  # a full disk
            raise error.__cause__ from None
        raise


def rehearse(make, data, options):
    """A network, made by `make`. Raises ValueError where it cannot be run as it will be."""
    net, model, device = make(), options.model, data.x.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16")
    size = options.batch_size
    x, y = data.inputs(torch.arange(size, device=device)), data.y[:size]
    with explained(f"{model} cannot be trained on a batch of {size}"):
        with autocast:
            out = net(x).float()
        if out.shape != (size, data.classes):
            wanted = f"[{size}, {data.classes} classes]"
            raise ValueError(f"the network's output is {list(out.shape)}, not {wanted}")
        if not out.requires_grad:
            raise ValueError("nothing is trained: requires_grad is False everywhere")
        F.cross_entropy(out, y).backward()
        for p in net.parameters():
            if p.is_complex() or (p.grad is not None and p.grad.is_sparse):
                raise ValueError("a parameter is complex, or its gradient sparse")
    if ":" not in model:
        return net
    last, other = data.test_x.split(512)[-1], make()  # the last batch of measure.on_test_set
    with explained(f"{model} cannot be tested on a batch of {len(last)}"):
        with autocast, torch.no_grad():
            net.eval()(data.normalized(last))
    if any(p is q for p, q in zip(net.parameters(), other.parameters(), strict=False)):
        raise ValueError(f"{model} is the same network each time, and each run trains its own")
    if options.average:
        with explained(f"{model} cannot be copied, for --average"):
            deepcopy(other)(x).sum().backward()
            if any(p.grad is not None for p in other.parameters()):
                raise ValueError("a copy computes with the weights of the original")
    return net


def layer_groups(options, data):
    """The network, a batch, and the names of the parameters on each sphere: what our networks say
    of themselves; what is found in others, and then printed.

    On sphere "row" are only tensors whose rows are scale invariant. Raises ValueError where there
    are none, or the network cannot be run as it will be.
    """
    model, device, rows = options.model, data.x.device, options.sphere == "row"

    def make():
        torch.manual_seed(options.seed)
        return build(options, data).to(device)

    net = rehearse(make, data, options)
    x = data.inputs(torch.arange(min(32, len(data.x)), device=device))
    if ":" not in model:
        return net, x, net.layer_groups
    with explained(f"{model} cannot be measured"):
        found = scale_invariant_groups(net, x, build=make, rows=rows)
    tensors = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    norms, usable = {name: p.norm().item() for name, p in tensors.items()}, []
    for group in found:
        least = max(norms[name] for name in group)
        if rows:
            least = min(tensors[name].flatten(1).norm(dim=1).min() for name in group)
        if least > 0:
            usable.append(group)
    if not usable:
        why = f"no scale-invariant weights: is there a normalization layer, of eps ≤ {MAX_EPS}?"
        if rows:
            what = "is there a normalization of single channels, as BatchNorm?"
            why = f"no scale-invariant rows: {what} Else take --sphere layer"
        if found:
            why = f"of norm zero, without direction, is {', '.join(map(' + '.join, found))}"
        raise ValueError(why)
    print(f"{'norm':>9}  sphere")
    for group in usable:
        norm = math.hypot(*(norms[name] for name in group))
        print(f"{norm:9.3g}  {' + '.join(group)}")
    rest = [name for name in norms if not any(name in group for group in usable)]
    print(f"{'':9}  off the spheres, by plain SGD: {', '.join(rest) or 'nothing'}")
    return net, x, usable
