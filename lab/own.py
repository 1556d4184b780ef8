"""The network of a run: ours by name, or somebody's own, FILE.py:FUNCTION, loaded and tried. What
goes wrong in their code is told in one line."""

import inspect
import math
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

import models
from lab.contents import ROOT, package_root
from lab.data import CHUNK
from lab.invariance import MAX_EPS, logits, scale_invariant_groups

OUR_MODULES = ("train", "sphere_step", "models", "regimes", "lab")
LAB = str(ROOT / "lab")
# Files whose lines are not shown in an error: their user cannot mend them.
LIBRARIES = (str(Path(torch.__file__).parents[1]), str(Path(os.__file__).parent), "<", LAB)
LIBRARIES += (str(ROOT / "models.py"), str(ROOT / "train.py"))
LOADED = {}  # somebody's file → the files of all modules that it has loaded, and itself


def build(options, data):
    """The network that `options` name for these data, by model, width, affine and train_head.
    Raises ValueError where that cannot be."""
    if ":" in options.model:
        return load(options.model, data)
    ours = dict(width=options.width, affine=options.affine, train_head=options.train_head)
    return models.build(options.model, data, **ours)


def load(model, data):
    """The network FILE.py:FUNCTION, on the device of the data, whose output are its logits. The
    file runs anew each time. Raises ValueError."""
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
            net.to(x.device).eval()(x)  # lazy layers get their shapes here
            if not isinstance(net, torch.jit.ScriptModule):  # which has no hooks
                net.register_forward_hook(logits)
    return net.train()


def _call(function, known):
    """Call it with what it names of `known`, or with (channels, classes)."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named = {p.name: known[p.name] for p in parameters if p.name in known}
    starred = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    try:
        signature.bind(**named)
    except TypeError:
        starred, named = True, {}
    if starred and not named:
        return function(known["channels"], known["classes"])
    return function(**named)


@contextmanager
def beside(path):
    """While somebody's file runs, `import x` finds the x in its folder, as if they had run it.

    When mine.py says `from models import Block`, that is the models.py next to it, not ours. `from
    sphere_step import SphereSGD` gets ours if there is none next to it. Afterwards ours are back,
    and theirs forgotten, so that the next network imports them anew. Yields the package in which
    `from .blocks import Block` is looked up.
    """
    root = package_root(path)
    package = ModuleType("_own")
    package.__path__ = [str(root)]
    modules, argv, places, here = dict(sys.modules), sys.argv, list(sys.path), os.getcwd()
    known = files_of_modules()
    for name in modules:
        if name.partition(".")[0] in OUR_MODULES:
            del sys.modules[name]
    sys.modules["_own"] = package
    folders = dict.fromkeys([str(path.parent), str(root)])
    sys.path[:0] = folders
    sys.argv = [str(path)]
    try:
        yield ".".join(["_own", *path.parent.relative_to(root).parts])
    finally:
        files = {file for file in files_of_modules() - known if not file.startswith(LIBRARIES)}
        LOADED.setdefault(path, {path}).update(Path(file).resolve() for file in files)
        sys.path[:] = dict.fromkeys([*places, *folders])  # last: forward may import, too
        sys.argv = argv
        os.chdir(here)
        for name in set(sys.modules) - set(modules):
            file = getattr(sys.modules[name], "__file__", None) or "<"
            theirs = file.startswith(str(root)) and not file.startswith(LIBRARIES)
            if theirs and file != str(path):  # dataclasses and type hints look names up in it later
                del sys.modules[name]
        sys.modules.update(modules)


def files_of_modules():
    """Where the modules that are loaded came from, but for what torch.compile writes."""
    modules = [module for name, module in sys.modules.items() if not name.startswith("torch.")]
    return {getattr(module, "__file__", None) or "<" for module in modules}


@contextmanager
def explained(what):
    """What goes wrong in somebody's code, as a ValueError of one line, with the last line of their
    own that it passed. Ctrl-C passes, and an exit by a signal handler of ours."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except BaseException as error:  # sys.exit in their file, too
        frames = traceback.extract_tb(error.__traceback__)
        if frames[-1].filename.startswith(LAB) and not isinstance(error, Exception):
            raise
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        theirs = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
        if theirs:
            why += f"; {theirs[-1].filename}, line {theirs[-1].lineno}"
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


def rehearse(net, data, options):
    """Raises ValueError where the network cannot be run as it will be."""
    model, device, size = options.model, data.x.device, options.batch_size
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16")
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
    last = data.test_x.split(CHUNK)[-1]  # the last batch of measure.on_test_set
    with explained(f"{model} cannot be tested on a batch of {len(last)}"):
        with autocast, torch.no_grad():
            net.eval()(data.normalized(last))


def layer_groups(options, data):
    """The network, a batch, and the names of the parameters in each layer group: what our networks
    say; what is found in others, and printed. For sphere "row" only tensors whose rows are scale
    invariant. Raises ValueError where there are none, or the network cannot be trained."""
    model, rows = options.model, options.sphere == "row"

    def make():
        torch.manual_seed(options.seed)
        return build(options, data).to(data.x.device)

    net = make()
    rehearse(net, data, options)
    x = data.inputs(torch.arange(min(32, len(data.x)), device=data.x.device))
    if ":" not in model and hasattr(net, "layer_groups"):
        return net, x, net.layer_groups
    with explained(f"{model} cannot be measured"):
        found = scale_invariant_groups(net, x, make, rows)
    if options.average:
        with explained(f"{model} cannot be copied, for --average"):
            scale_invariant_groups(net, x, rows=rows)
    weights = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def has_direction(group):
        if rows:
            return all(weights[name].flatten(1).any(dim=1).all() for name in group)
        return any(weights[name].any() for name in group)

    usable = [group for group in found if has_direction(group)]
    if not usable:
        raise ValueError(_why_none(net, found, rows))
    print(f"{'norm':>9}  sphere")
    for group in usable:
        norm = math.hypot(*(weights.pop(name).norm().item() for name in group))
        print(f"{norm:9.3g}  {' + '.join(group)}")
    print(f"{'':9}  off the spheres, by plain SGD: {', '.join(weights) or 'nothing'}")
    return net, x, usable


def _why_none(net, found, rows):
    if found:
        return f"of norm zero, without direction, is {', '.join(map(' + '.join, found))}"
    if rows:
        what = "is there a normalization of single channels, as BatchNorm?"
        return f"no scale-invariant rows: {what} Else take --sphere layer"
    why = f"is there a normalization layer, of eps ≤ {MAX_EPS}, behind weights that are trained?"
    once = {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters(remove_duplicate=False):
        if name not in once:  # as a head that is tied to the embedding
            other = next(first for first, q in net.named_parameters() if q is p)
            why = f"{other} is {name}, too, and is there a normalization behind both?"
    return f"no scale-invariant weights: {why}"
