"""Which weights of any network are scale invariant?

    from invariance import scale_invariant_groups

    net, batch = torchvision.models.resnet18(), torch.randn(4, 3, 64, 64)
    scale_invariant_groups(net, batch)  # [["conv1.weight"], ["layer1.0.conv1.weight"], …]

Works alone when copied (torch, numpy, scipy).
"""

import random
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MAX_EPS = 0.01  # a larger one in a normalization is a part of the function


@torch.inference_mode(False)
@torch.backends.cudnn.flags(enabled=False)  # its BatchNorm takes no eps below 1e-5
def scale_invariant_groups(net, batch, rows=False):
    """The minimal sets of trainable parameters that are jointly scale invariant, as lists of names.

    A set S is so if multiplying all its tensors by one c > 0 changes no logit in training mode:
    then Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for all weights and directions of the logits. These radial
    derivatives at random ones, in float64 and without eps, are a matrix with a column per tensor.
    In its null space is the indicator vector of each such set; it is verified by multiplying.

    net     any network; afterwards it and the random state are what they were
    batch   a tensor of at least two inputs
    rows    take sets of matrices each of whose rows may have a factor of its own

    Sets are disjoint: of those that overlap the smallest, then the largest tensors. A tensor
    without effect is a set of its own; one that never has a gradient is in none.
    """
    try:
        return _measured(net, batch, rows, torch.float64)
    except Exception as error:
        found = _measured(net, batch, rows, torch.float32)
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"measured in float32, to a tolerance of 1e-3: float64 fails ({why})")
        return found


def _measured(net, batch, rows, dtype):
    with _undisturbed(net):
        if _copy_is_apart(net, batch):
            net = deepcopy(net)
        return _Trial(net, batch, rows, dtype).sets()


def _copy_is_apart(net, batch):
    """Whether a copy can be made, and computes with weights of its own."""
    try:
        copy = deepcopy(net).train()
        logits(copy, (), copy(batch.detach().clone())).abs().sum().backward()
    except Exception:
        return False
    return all(p.grad is None for p in net.parameters())


@contextmanager
def _undisturbed(net):
    """Afterwards the network and the random state are as they were."""
    randoms = random.getstate(), np.random.get_state()
    modes = [(module, module.training) for module in net.modules()]
    tensors = [(x, x.data, x.grad) for x in (*net.parameters(), *net.buffers())]
    places = [vars(module) for module in net.modules()]
    places += [x for place in places for x in place.values() if type(x) in (dict, list)]
    attributes = [(place, place.copy()) for place in places]
    net.zero_grad()
    try:
        with torch.random.fork_rng([x.device for x, *_ in tensors if x.is_cuda][:1]):
            yield
    finally:
        random.setstate(randoms[0])
        np.random.set_state(randoms[1])
        for place, before in attributes:
            place.clear()
            getattr(place, "update", getattr(place, "extend", None))(before)
        for module, training in modes:
            module.training = training
        for x, data, gradient in tensors:
            x.data, x.grad = data, gradient


def logits(net, inputs, out):
    """A forward hook: of several parts of an output that which is called logits, or the first."""
    out = out.get("logits", out) if isinstance(out, dict) else getattr(out, "logits", out)
    if isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise TypeError(f"the output is a {type(out).__name__} without logits")
    return out


class _Trial:
    """A network that is run with other weights."""

    def __init__(self, net, batch, rows, dtype):
        self.net, self.batch, self.rows, self.dtype = net.train(), batch.detach(), rows, dtype
        self.tolerance = 1e-6 if dtype == torch.float64 else 1e-3
        least = 2 if rows else 0  # dimensions
        trained = {n: p for n, p in net.named_parameters() if p.requires_grad and p.dim() >= least}
        if not trained:
            raise ValueError("nothing is trained: requires_grad is False everywhere")
        self.names, self.params = [*trained], [*trained.values()]
        self.start = [(x, x.data) for x in (*net.parameters(), *net.buffers())]

    def sets(self):
        """The sets, by name."""
        matrix = torch.stack([self.radial(seed) for seed in range(len(self.params) + 8)])
        if not matrix.isfinite().all():
            raise ValueError("its gradients are nan or infinite")
        _, singular, right = torch.linalg.svd(matrix)
        null = right[singular < self.tolerance / 10 * len(matrix) ** 0.5].numpy()
        found = _smallest(null, np.array([p.numel() for p in self.params]), self.unchanged)
        # A wrong gradient is not in the null space: here it is, for a later check
        for i, p in enumerate(self.params):
            if p.dim() > 1 and all(i not in chosen for chosen in found) and self.unchanged([i]):
                found.append([i])
        used = {i for i, p in enumerate(self.params) if p.grad is not None}
        found = filter(used.issuperset, sorted(found, key=min))
        return [[self.names[i] for i in chosen] for chosen in found]

    def radial(self, seed):
        """⟨∂f/∂p, p⟩ of each tensor p, for random weights and direction of the logits."""
        self.net.zero_grad(set_to_none=False)  # once there it is not None
        torch.manual_seed(seed)
        for x, start in self.start:
            if x.requires_grad:  # a bias of 0 has symmetries
                noise = (0.1 * start.square().mean().sqrt() + 0.01) * torch.randn_like(start)
                x.data = start.to(self.dtype) + noise
        self.outputs(seed, backward=True)
        found, size = torch.zeros(len(self.params), dtype=torch.float64), 1e-300
        for i, p in enumerate(self.params):
            if p.grad is not None:
                found[i] = (p.data.double() * p.grad).sum()
                size += (p.data.norm() * p.grad.norm()).item()
        return found / size

    def unchanged(self, chosen):
        """Whether the logits stay when these tensors, or their rows, are multiplied."""
        before, change = self.outputs(0), 0.0
        olds = [(self.params[i], self.params[i].data) for i in chosen]
        for factor in (0.5, 3.0):
            for p, old in olds:
                power = torch.arange(len(p)).cos().to(old) if self.rows else 1
                p.data = (old.transpose(0, -1) * factor**power).transpose(0, -1)
            change += (self.outputs(0) - before).norm()
        for p, old in olds:
            p.data = old
        return bool(change <= self.tolerance * before.norm())

    def outputs(self, seed, backward=False):
        """The logits; a seed gives the same dropout."""
        for begin in (random.seed, np.random.seed, torch.manual_seed):
            begin(seed)
        for x, start in self.start:
            if not x.requires_grad:
                dtype = self.dtype if start.is_floating_point() else start.dtype
                x.data = start.to(dtype, copy=True)
        with _WithoutEps(self.dtype):
            out = logits(self.net, (), self.net(self.batch.clone()))
            if backward and out.requires_grad:
                out.backward(torch.randn_like(out))
        return out.detach()


class _WithoutEps(TorchDispatchMode):
    """Does every operation of torch without the eps of a normalization, which breaks invariance a
    little, and in one type of numbers: F.layer_norm(x, (8,), eps=1e-5) with an eps of 1e-18,
    x / (x.norm() + 1e-3) with 1e-18 for 1e-3; a .float(), as of Llama, stays in float64."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, mutable = function.overloadpacket.__name__, function._schema.is_mutable
        if name.rstrip("_") in ("add", "sub", "hypot"):
            a, b, *others = args
            args = [self.without_eps(a, b), self.without_eps(b, a), *others]
        elif "_norm" in name and name != "linalg_vector_norm":
            args = [1e-18 if isinstance(x, float) and 0 < x <= 0.1 else x for x in args]

        def cast(x):  # torch's tree_map takes longer than the arithmetic
            if isinstance(x, list | tuple):
                return type(x)(map(cast, x))
            if isinstance(x, Tensor) and x.is_floating_point() and not mutable:
                return x.to(self.dtype)
            if isinstance(x, torch.dtype) and x.is_floating_point:
                return self.dtype
            return x

        named = {key: cast(x) for key, x in (kwargs or {}).items()}
        return cast(function(*cast(list(args)), **named))

    def without_eps(self, x, other):
        """x, or 1e-18 if it is an eps: a small constant, added to what is nowhere negative."""
        constant = isinstance(x, float)  # of tensors gradients can be
        if isinstance(x, Tensor) and torch.is_grad_enabled() and not x.requires_grad:
            constant = len(x.unique()) == 1
        small = constant and 0 < torch.as_tensor(x).abs().max() <= MAX_EPS
        if small and isinstance(other, Tensor) and not other.is_complex() and (other >= 0).all():
            return 0 * x + 1e-18
        return x


def _smallest(null, numel, holds):
    """The disjoint sets that hold of those whose vectors of zeros and ones lie in the space of
    `null`, orthonormal [dimension, n]: the smallest first, then that of more numbers."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    found, n, one = [], len(numel), np.eye(len(numel))
    rules = [LinearConstraint(one - null.T @ null, -1e-3, 1e-3)]  # x lies in the space
    rules.append(LinearConstraint(one.sum(0), 1))  # not the empty set
    cost = 1 - numel / (2 * numel.sum()) + 0.01 * np.arange(n) / n**2
    options = dict(c=cost, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
    while (x := milp(constraints=rules, **options).x) is not None:
        chosen = np.flatnonzero(x > 0.5)
        most = len(chosen) - 1  # of these in another set
        if holds(chosen):
            found.append(chosen)
            most = 0
        rules.append(LinearConstraint(x.round(), ub=most))
    return found
