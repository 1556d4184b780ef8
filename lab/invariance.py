"""Which weights of a network are scale invariant? Measured, so it takes any network. Works alone
when copied (torch, numpy, scipy).

    net = torchvision.models.resnet18()
    scale_invariant_groups(net, torch.randn(4, 3, 64, 64))      # [["conv1.weight"], …]
"""

import random
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MAX_EPS = 0.01  # the largest that is taken for the eps of a normalization
# Numbers of type, each input drawn from the whole batch (or whole examples), tried in this order.
WAYS = ((torch.float64, True), (torch.float64, False), (torch.float32, False))
# By type: a singular value that is 0, and a change of the logits that is none.
ZERO = {torch.float64: (1e-7, 1e-6), torch.float32: (2e-5, 1e-3)}


def scale_invariant_groups(net, batch, build=None, rows=False):
    """The minimal sets of trainable parameters that are jointly scale invariant, by name.

    A set S is so if multiplying all its tensors by one c > 0 changes no logit in training mode:
    then Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for every batch and direction of the logits. At random ones these
    radial derivatives, in float64 and without eps, make a matrix with a column per tensor. In its
    null space is the indicator vector of every such set. Sets are verified by multiplying them.

    net     any network; it is left as it is, its buffers and the random state, too
    batch   a tensor of at least two inputs
    build   makes the network to measure; without it a copy is measured
    rows    take sets of matrices each of whose rows may have a factor of its own

    Where float64 fails it is float32, and says so. Returns lists of names, disjoint: of sets that
    overlap the smallest, then the largest tensors. A tensor without effect is a set of its own; one
    that never has a gradient is in none. Raises ValueError where this cannot be measured.
    """
    if not isinstance(batch, Tensor) or len(batch) < 2:
        what = f"tensor of {len(batch)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"the batch is a {what}: it takes a tensor of at least two inputs")

    def make():
        made = build() if build else _copy(net)
        params = list(made.parameters())
        if not params or any(map(is_lazy, params)):  # they are made in the first forward pass
            with torch.no_grad():
                made.train()(batch)
        return made

    with _undisturbed(net):
        made = make()
        if not any(p.requires_grad for p in made.parameters()):
            raise ValueError("no parameter is trained: all have requires_grad=False")
        if set(made.parameters()) & set(net.parameters()):
            raise ValueError("build returns the same parameters again: it must make new ones")
        for dtype, mixed in WAYS:
            try:
                groups = _find(_Probe(make(), batch, dtype, mixed), rows)
                break
            except Exception as error:
                if dtype == torch.float32:
                    raise
                why = f"{type(error).__name__}: {error}".partition("\n")[0]
        if any(p.grad is not None for p in net.parameters()):
            raise ValueError("a copy computes with the weights of the original: give build=")
        if dtype == torch.float32:
            print(f"measured in float32, to a tolerance of 1e-3: float64 fails ({why})")
    return groups


@contextmanager
def _undisturbed(net):
    """What is measured meanwhile leaves no trace in random numbers and gradients. Without cuDNN,
    which insists on its eps."""
    python, numpys, cudnn = random.getstate(), np.random.get_state(), torch.backends.cudnn.enabled
    params = list(net.parameters())
    gradients = [p.grad for p in params]
    torch.backends.cudnn.enabled = False
    try:
        for p in params:
            p.grad = None
        with torch.random.fork_rng([p.device for p in params if p.is_cuda][:1]):
            with torch.enable_grad():
                yield
    finally:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        random.setstate(python)
        np.random.set_state(numpys)
        torch.backends.cudnn.enabled = cudnn


class _CopyValues(TorchFunctionMode):
    """deepcopy refuses a tensor that was computed, such as an activation that a layer keeps, or the
    weight of torch.nn.utils.weight_norm. Here its value is copied."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def _copy(net):
    try:
        with _CopyValues():
            return deepcopy(net)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"the network cannot be copied ({why}): give build=") from error


def logits(net, inputs, output):
    """Of an output of several parts that which is called logits, or the first. A forward hook."""
    if isinstance(output, dict):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the output is a {type(output).__name__} without logits")
    return output


class _Probe:
    """A network in training mode, whose logits for a random batch follow from a seed."""

    def __init__(self, net, batch, dtype, mixed):
        torch.manual_seed(0)
        self.net, self.batch, self.dtype, self.mixed = net.to(dtype).train(), batch, dtype, mixed
        trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        self.names, self.params = zip(*trained, strict=True)
        for p in self.params:  # a bias of 0 would hide something
            p.data += 0.1 * torch.randn_like(p) * (p.data.square().mean().sqrt() + 0.1)
        self.buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def logits(self, seed, backward=False):
        """Of the batch of this seed, and with `backward` the gradients of a random sum of them."""
        for begin in (random.seed, np.random.seed, torch.manual_seed):  # dropout drops the same
            begin(seed)
        for buffer, value in self.buffers:
            buffer.data.copy_(value)
        self.net.zero_grad()
        order = torch.randint(len(self.batch), self.batch.shape, device=self.batch.device)
        with _WithoutEps(self.dtype) as without_eps:
            x = self.batch[order.flatten(1)[:, 0]]
            if self.mixed:
                x = self.batch.gather(0, order)
            out = logits(self.net, (), self.net(x))
            without_eps.forward = False
            if backward and out.requires_grad:
                out.backward(torch.randn_like(out))
        return out.detach()

    def unchanged(self, chosen, rows):
        """Whether the logits stay when these parameters are multiplied."""
        before, tensors = self.logits(0), [self.params[i] for i in chosen]
        if rows and any(p.dim() < 2 for p in tensors):
            return False
        values, changes = [p.detach().clone() for p in tensors], []
        for factor in (0.5, 3.0):
            for p, value in zip(tensors, values, strict=True):
                power = torch.ones(())
                if rows:  # each its own
                    torch.manual_seed(1)
                    power = torch.rand(len(p), *[1] * (p.dim() - 1))
                p.data.copy_(value * factor ** power.to(p))
            changes.append((self.logits(0) - before).norm())
        for p, value in zip(tensors, values, strict=True):
            p.data.copy_(value)
        return all(change <= ZERO[self.dtype][1] * before.norm() for change in changes)


class _WithoutEps(TorchDispatchMode):
    """Each operation of torch passes here, and is done without eps and in one type of numbers.

    A normalization divides by norm + eps. Ten times the weights then change its output by 1e-5 or
    so, and scale invariance could not be told from its absence. So F.layer_norm(x, (8,), eps=1e-5)
    is computed with an eps of 1e-18, x / (x.norm() + 1e-3) with 1e-18 for the 1e-3, and a .float()
    inside a network of float64, as in Llama's normalization, does not round.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.forward = dtype, True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, mutable = function.overloadpacket.__name__, function._schema.is_mutable
        if name.rstrip("_") in ("add", "sub", "hypot"):
            a, b, *others = args
            args = [self.small_as_0(a, b), self.small_as_0(b, a), *others]
        elif "_norm" in name and name != "linalg_vector_norm":
            args = [1e-18 if isinstance(x, float) and 0 < x <= 0.1 else x for x in args]

        def cast(x):
            if isinstance(x, list | tuple):
                return type(x)(cast(part) for part in x)
            if isinstance(x, Tensor) and x.is_floating_point() and not mutable:
                return x.to(self.dtype)
            if isinstance(x, torch.dtype) and x.is_floating_point:
                return self.dtype
            return x

        kwargs = {name: cast(x) for name, x in (kwargs or {}).items()}
        return cast(function(*cast(args), **kwargs))

    def small_as_0(self, x, other):
        """x, or 1e-18 where x is an eps: a small constant, added to what is nowhere negative."""
        constant = isinstance(x, float)
        if isinstance(x, Tensor) and self.forward and not x.requires_grad:
            constant = len(x.unique()) == 1
        small = constant and 0 < torch.as_tensor(x).abs().max() <= MAX_EPS
        if small and isinstance(other, Tensor) and not other.is_complex() and (other >= 0).all():
            return 0 * x + 1e-18
        return x


def _find(probe, rows):
    params = probe.params
    matrix, used = [], set()
    for seed in range(len(params) + 8):
        probe.logits(seed, backward=True)
        radial, size = torch.zeros(len(params), dtype=torch.float64), 1e-300
        for i, p in enumerate(params):
            if p.grad is not None:
                used.add(i)
                radial[i] = (p.detach().double() * p.grad).sum()
                size += p.detach().norm().item() * p.grad.norm().item()
        matrix.append(radial / size)
    _, singular, right = torch.linalg.svd(torch.stack(matrix))
    null_space = right[singular < ZERO[probe.dtype][0] * len(matrix) ** 0.5].numpy()

    def holds(chosen):
        return probe.unchanged(chosen, rows)

    found = _smallest_sets(null_space, np.array([p.numel() for p in params]), holds)
    # Of a gradient that torch computes wrong the null space knows nothing; multiplying shows it.
    for i, p in enumerate(params):
        if p.dim() > 1 and all(i not in chosen for chosen in found) and holds([i]):
            found.append([i])
    found = [sorted(chosen) for chosen in sorted(found, key=min) if used.issuperset(chosen)]
    return [[probe.names[i] for i in chosen] for chosen in found]


def _smallest_sets(null_space, numel, holds):
    """Of the sets whose vectors of zeros and ones lie in a space, given by a basis [dimension, n],
    those that hold: disjoint, the smallest first, then that of more numbers.

    In the reduced echelon form each basis vector has a 1 at its own pivot and 0 at the others':
    there a vector has its coordinates. The rest is integer programming.
    """
    from scipy.linalg import qr  # which takes a moment
    from scipy.optimize import Bounds, LinearConstraint, milp

    found, n, one = [], len(numel), np.eye(len(numel))
    if not len(null_space):
        return found
    free = np.ones(n)
    pivots = qr(null_space, mode="r", pivoting=True)[1][: len(null_space)]
    basis = np.linalg.solve(null_space[:, pivots], null_space)
    basis = np.where(abs(basis - basis.round()) < 1e-4, basis.round(), basis)
    rules = [LinearConstraint(one - basis.T @ one[pivots], -1e-3, 1e-3)]
    rules.append(LinearConstraint(np.ones(n), 1))
    cost = 1 - numel / (2 * numel.sum()) + 0.01 * np.arange(n) / n**2  # of equals the first
    options = dict(c=cost, integrality=1, options={"mip_rel_gap": 0})
    while (x := milp(bounds=Bounds(0, free), constraints=rules, **options).x) is not None:
        chosen = np.flatnonzero(x > 0.5)
        if holds(chosen):
            found.append(chosen)
            free[chosen] = 0
        else:
            rules.append(LinearConstraint(x.round(), ub=len(chosen) - 1))
    return found
