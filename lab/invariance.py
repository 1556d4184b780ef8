"""Which weights of any network are scale invariant?

    from invariance import scale_invariant_groups

    net, batch = torchvision.models.resnet18(), torch.randn(4, 3, 64, 64)
    scale_invariant_groups(net, batch)  # [["conv1.weight"], ["layer1.0.conv1.weight"], …]

Works alone when copied (torch, numpy, scipy).
"""

import random
from contextlib import ExitStack
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAX_EPS = 0.01  # a larger one in a normalization is a part of the function


@torch.inference_mode(False)
@torch.backends.cudnn.flags(enabled=False)  # its BatchNorm takes no eps below 1e-5
def scale_invariant_groups(net, batch, rows=False):
    """The minimal sets of trainable parameters that are jointly scale invariant, as lists of names.

    A set S is so if multiplying all its tensors by one c > 0 changes no logit in training mode:
    then Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for all weights and directions of the logits. These radial
    derivatives at random ones, in float64 and without eps, are a matrix with a column per tensor.
    In its null space is the indicator vector of each such set; it is verified by multiplying.

    net     any network; a copy of it is measured, in training mode
    batch   a tensor of at least two inputs
    rows    take sets of matrices each of whose rows may have a factor of its own

    Sets are disjoint: of those that overlap the smallest, then the largest tensors. A tensor
    without effect is in none, or alone. ValueError: all are, or no copy can be measured.
    """
    with ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        after.enter_context(torch.random.fork_rng([batch.device] if batch.is_cuda else []))
        try:
            return _Trial(net, batch, rows, torch.float64).sets()
        except Exception as error:
            found = _Trial(net, batch, rows, torch.float32).sets()
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"measured in float32, to a tolerance of 1e-3: float64 fails ({why})")
            return found


def logits(net, inputs, out):
    """A forward hook: of several parts of an output that which is called logits, or the first."""
    out = out.get("logits", out) if isinstance(out, dict) else getattr(out, "logits", out)
    if isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise TypeError(f"the output is a {type(out).__name__} without logits")
    return out


def place(x):
    """Its memory, which views share."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


class _Trial(TorchDispatchMode):
    """A copy of a network that is run with other weights; `with self` in one type of numbers, also
    behind a .float() as of Llama, and without the eps of normalizations, which break invariance a
    little: 1e-18 for 1e-3 in x / (x.norm() + 1e-3), for 1e-5 in F.layer_norm(x, (8,), eps=1e-5)."""

    def __init__(self, net, batch, rows, dtype):
        super().__init__()
        kept = tree_leaves([vars(module) for module in net.modules()])
        kept = [x for x in kept if isinstance(x, Tensor) and not x.is_leaf]  # of a pass
        try:
            self.net = deepcopy(net, {id(x): x.detach().clone() for x in kept})
        except Exception as error:
            raise ValueError(f"the network cannot be copied: {error}") from error
        self.net.to(dtype).train()
        weights = [x for x in (*net.parameters(), *net.buffers()) if not is_lazy(x)]
        self.dtype, self.originals = dtype, {place(x) for x in weights} - {0}
        self.tolerance = 1e-6 if dtype == torch.float64 else 1e-3
        self.batch, self.rows, self.start = batch.detach(), rows, []
        self.outputs(0)  # lazy layers get their shapes
        self.start = [(x, x.data) for x in (*self.net.parameters(), *self.net.buffers())]
        named, least = self.net.named_parameters(), 2 if rows else 0  # dimensions
        self.named = [(n, p) for n, p in named if p.requires_grad and p.dim() >= least]
        self.params = [p for _, p in self.named]

    def sets(self):
        """The sets, by name."""
        rows = []
        for seed in range(len(self.params) + 8):
            rows.append(self.radial(seed))
            self.matrix = torch.stack(rows)
            if not self.matrix.isfinite().all():
                raise ValueError("its gradients are nan or infinite")
            _, singular, right = torch.linalg.svd(self.matrix)
            rank = (singular >= self.tolerance / 10 * len(rows) ** 0.5).sum()
            used = self.matrix.any(dim=0)
            if used.all() and seed >= rank + 7:
                break
        if not used.any():
            raise ValueError("its logits depend on no weight that is trained")
        numel = np.array([p.numel() for p in self.params])
        found = _smallest(right[rank:].numpy(), numel, used.numpy(), self.unchanged)
        # A wrong gradient is not in the null space: here it is, for a later check
        for i, p in enumerate(self.params):
            rest = used[i] and p.dim() > 1 and all(i not in chosen for chosen in found)
            if rest and self.unchanged([i]):
                found.append([i])
        return [[self.named[i][0] for i in chosen] for chosen in sorted(found, key=min)]

    def radial(self, seed):
        """⟨∂f/∂p, p⟩ of each tensor p, for random weights and direction of the logits."""
        for x, start in self.start:
            if x.requires_grad:  # a bias of 0 has symmetries
                most = 0.2 * start.square().mean().sqrt().item() + 0.02
                x.data = torch.empty_like(start).uniform_(-most, most).add_(start)
        out, along, size = self.outputs(seed), [0.0] * len(self.params), 1e-300
        if out.requires_grad:
            with self:
                direction = torch.randn_like(out)
                grads = torch.autograd.grad(out, self.params, direction, materialize_grads=True)
            for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
                along[i] = (p.data.flatten() @ grad.flatten()).item()
                size += (p.data.norm() * grad.norm()).item()
        return torch.tensor(along, dtype=torch.float64) / size

    def unchanged(self, chosen):
        """Whether the logits stay when these tensors, or their rows, are multiplied."""
        seed = int(self.matrix[:, chosen].abs().sum(dim=1).argmax())  # where they are in use
        start, found = [(self.params[i], self.params[i].data) for i in chosen], []
        for factor in (0.5, 3.0, 1.0, 1.0):
            for p, x in start:
                power = torch.arange(len(p)).cos().to(x) if self.rows else 1
                p.data = (x.transpose(0, -1) * factor**power).transpose(0, -1)
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
            args = [self.without_eps(a, b), self.without_eps(b, a), *others]
        elif "_norm" in name:
            args = [1e-18 if isinstance(x, float) and 0 < x <= 0.1 else x for x in args]

        def cast(x):  # torch's tree_map takes longer than the arithmetic
            if isinstance(x, Tensor) and place(x) in self.originals:
                raise ValueError("a copy of it computes with the original: make lambdas methods")
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
        constant = isinstance(x, float)
        if isinstance(x, Tensor) and torch.is_grad_enabled() and not x.requires_grad:
            constant = len(x.unique()) == 1
        small = constant and 0 < torch.as_tensor(x).abs().max() <= MAX_EPS
        if small and isinstance(other, Tensor) and not other.is_complex() and (other >= 0).all():
            return 0 * x + 1e-18
        return x


def _smallest(null, numel, used, holds):
    """The disjoint sets that hold of those whose vectors of zeros and ones lie in the space of
    `null`, orthonormal [dimension, n]: the smallest first, then that of more numbers."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    found, n = [], len(numel)
    space = LinearConstraint(np.eye(n) - null.T @ null, -1e-3, 1e-3)  # of x
    rules = [space, LinearConstraint(np.ones(n), 1)]  # not the empty set
    cost = 1 - numel / (2 * numel.sum()) + 0.01 * np.arange(n) / n**2
    options = dict(c=cost, integrality=1, bounds=Bounds(0, used), options={"mip_rel_gap": 0})
    while (x := milp(constraints=rules, **options).x) is not None:
        chosen = np.flatnonzero(x > 0.5)
        most = len(chosen) - 1  # of these in another set
        if holds(chosen):
            found.append(chosen)
            most = 0
        rules.append(LinearConstraint(x.round(), ub=most))
    return found
