"""Which weights of a network are scale invariant?

    from invariance import scale_invariant_groups

    net, batch = torchvision.models.resnet18(), torch.randn(4, 3, 64, 64)
    scale_invariant_groups(net, batch)  # [["conv1.weight"], ["layer1.0.conv1.weight"], …]

Works alone if copied (torch, numpy, scipy).
"""

import random
from contextlib import ExitStack
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import map_aggregate
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAX_EPS = 0.01  # a larger one is part of the function


@torch.inference_mode(False)
@torch.backends.cudnn.flags(enabled=False)  # it takes no eps below 1e-5
def scale_invariant_groups(net, batch, rows=False):
    """The minimal sets of trainable parameters that are jointly scale invariant, as lists of names.

    A set S is so if multiplying all its tensors by one c > 0 changes no logit in training mode:
    then Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for all weights and directions of the logits. These radial
    derivatives at random ones, in float64 and without eps, are a matrix with a column per tensor.
    In its null space is the indicator vector of each such set; it is verified by multiplying.

    net     any network; a copy is measured
    batch   a tensor of at least two inputs
    rows    take sets of matrices each of whose rows may have a factor of its own

    Sets are disjoint: of those that overlap the smallest, then the largest tensors. A tensor
    without effect, as a bias before BatchNorm, is in none. ValueError: no copy can be measured.
    """
    if not isinstance(batch, Tensor) or len(batch) < 2:
        raise ValueError("batch is no tensor of at least two inputs")
    with ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        after.enter_context(torch.random.fork_rng([batch.device] if batch.is_cuda else []))
        try:
            return _Trial(net, batch, rows, torch.float64).sets()
        except Exception as error:
            found = _Trial(net, batch, rows, torch.float32).sets()
            print(f"measured in float32: float64 fails ({error!r:.200})")
            return found


def logits(net, inputs, out):
    """A forward hook: of several outputs the logits, or the first."""
    out = out.get("logits", out) if isinstance(out, dict) else getattr(out, "logits", out)
    if isinstance(out, tuple | list):
        out = out[0]
    if not isinstance(out, Tensor):
        raise TypeError(f"the output is a {type(out).__name__} without logits")
    return out


def place(x):
    """Its memory, shared by views."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


class _Trial(TorchDispatchMode):
    """A copy of a network, run with other weights; `with self` in one type of numbers and without
    eps: 1e-18 for 1e-3 in x / (x.norm() + 1e-3)."""

    def __init__(self, net, batch, rows, dtype):
        super().__init__()
        self.originals, copies = set(), {}  # where deepcopy fails
        for x in tree_leaves([vars(module) for module in net.modules()]):
            if is_lazy(x):
                copies[id(x)] = type(x)(x.requires_grad, x.device, x.dtype)
            elif isinstance(x, Tensor):
                self.originals |= {place(x)} - {0}
                if not x.is_leaf:
                    copies[id(x)] = x.detach().clone()
        try:
            self.net = deepcopy(net, copies)
        except Exception as error:
            raise ValueError(f"the network cannot be copied: {error}") from error
        tensors = [*self.net.parameters(), *self.net.buffers()]
        shared = {place(x) for x in tensors if not is_lazy(x)} & self.originals
        if shared or {*net.modules()} & {*self.net.modules()}:
            raise ValueError("a __deepcopy__ in it copies nothing")
        self.net.to(dtype).train()
        self.tolerance = 1e-6 if dtype == torch.float64 else 1e-3
        self.batch, self.rows, self.dtype, self.start = batch.detach(), rows, dtype, []
        self.outputs(0)  # for lazy layers
        self.start = [(x, x.data) for x in (*self.net.parameters(), *self.net.buffers())]
        named = self.net.named_parameters()
        self.named = [(n, p) for n, p in named if p.requires_grad and (p.dim() > 1 or not rows)]
        self.params = [p for _, p in self.named]

    def sets(self):
        """The sets, by name."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        passes = []
        for seed in range(len(self.params) + 8):
            passes.append(self.radial(seed))
            matrix, self.sizes = np.stack(passes, 1)
            if not np.isfinite(matrix).all():
                raise ValueError("its weights or gradients are nan or infinite")
            _, singular, right = np.linalg.svd(matrix)
            rank = (singular >= self.tolerance / 10 * len(passes) ** 0.5).sum()
            if self.sizes.any(0).all() and seed >= rank + 7:
                break
        used = self.sizes.max(0) > self.tolerance**2  # else rounding
        if not used.any():
            raise ValueError("its logits depend on no weight that is trained")
        found = []  # matrices first: a later check sees wrong gradients
        for i, p in enumerate(self.params):
            if used[i] and p.dim() > 1 and self.unchanged([i]):
                found.append([i])
                used[i] = False
        n, numel = len(used), np.array([p.numel() for p in self.params])
        space = LinearConstraint(right[:rank], -1e-3, 1e-3)
        rules = [space, LinearConstraint(np.ones(n), 1)]  # not the empty set
        cost = 1 - numel / (2 * numel.sum()) + 0.01 * np.arange(n) / n**2
        options = dict(c=cost, integrality=1, bounds=Bounds(0, used), options={"mip_rel_gap": 0})
        while (x := milp(constraints=rules, **options).x) is not None:
            chosen = np.flatnonzero(x > 0.5)
            most = len(chosen) - 1  # of these in another set
            if self.unchanged(chosen):
                found.append(chosen)
                most = 0
            rules.append(LinearConstraint(x.round(), ub=most))
        return [[self.named[i][0] for i in chosen] for chosen in sorted(found, key=min)]

    def radial(self, seed):
        """⟨∂f/∂p, p⟩ and ‖∂f/∂p‖‖p‖ of each tensor p [2, n], at random weights and direction."""
        for x, start in self.start:
            if x.requires_grad:  # a bias of 0 has symmetries
                size = 0.4 * start.square().mean().sqrt() + 0.04
                x.data = start + size * (torch.rand_like(start) - 0.5)
        out, found = self.outputs(seed), np.zeros((2, len(self.params)))
        if out.requires_grad:
            with self:
                direction = torch.randn_like(out)
                grads = torch.autograd.grad(out, self.params, direction, materialize_grads=True)
            for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
                found[0, i] = (p.data.flatten() @ grad.flatten()).item()
                found[1, i] = (p.data.norm() * grad.norm()).item()
        return found / (found[1].sum() + 1e-300)

    def unchanged(self, chosen):
        """Whether the logits stay when these tensors, or their rows, are multiplied."""
        seed = int(self.sizes[:, chosen].sum(1).argmax())  # where they are used
        found = []
        for factor in (0.5, 128, 2**-6, 1):  # ends as before
            for i in chosen:
                x = self.params[i].data
                power = torch.arange(len(x)).cos().to(x) if self.rows else 1
                x.transpose(0, -1).mul_(factor**power)
            found.append(self.outputs(seed).detach())
        *changed, same, again = found
        if (again - same).norm() > self.tolerance * same.norm():
            raise ValueError("a second pass gives other logits, whatever torch's seed")
        return all((x - same).norm() <= self.tolerance * same.norm() for x in changed)

    def outputs(self, seed):
        """The logits; a seed gives the same dropout."""
        for begin in (random.seed, np.random.seed, torch.manual_seed):
            begin(seed)
        for x, start in self.start:
            if not x.requires_grad:
                x.data = start.clone()
        with self:
            return logits(self.net, (), self.net(self.batch.clone()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, mutable = function.overloadpacket.__name__, function._schema.is_mutable
        if name.rstrip("_") in ("add", "sub", "hypot"):
            a, b, *others = args
            args = self.without_eps(a, b), self.without_eps(b, a), *others
        elif "_norm" in name:
            args = [1e-18 if isinstance(x, float) and 0 < x <= 0.1 else x for x in args]

        def cast(x):
            if isinstance(x, Tensor) and place(x) in self.originals:
                raise ValueError("a copy of it computes with the original: make lambdas methods")
            if isinstance(x, Tensor) and x.is_floating_point() and not mutable:
                return x.to(self.dtype)
            if isinstance(x, torch.dtype) and x.is_floating_point:
                return self.dtype
            return x

        args, kwargs = map_aggregate((args, kwargs or {}), cast)
        return map_aggregate(function(*args, **kwargs), cast)

    def without_eps(self, x, other):
        """x, or 1e-18 if it is an eps: a small constant, added to what is nowhere negative."""
        constant = isinstance(x, float)
        if isinstance(x, Tensor) and not x.requires_grad:
            constant = len(x.unique()) == 1
        small = constant and 0 < torch.as_tensor(x).abs().max() <= MAX_EPS
        if small and isinstance(other, Tensor) and not other.is_complex() and (other >= 0).all():
            return 0 * x + 1e-18
        return x
