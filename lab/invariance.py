"""Which weights of any network are scale invariant? Works alone when copied (torch, numpy, scipy).

from invariance import scale_invariant_groups

net, batch = torchvision.models.resnet18(), torch.randn(4, 3, 64, 64)
scale_invariant_groups(net, batch)  # [["conv1.weight"], ["layer1.0.conv1.weight"], …]
"""

import random
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MAX_EPS = 0.01  # a larger constant in a normalization is taken for a part of the function


def scale_invariant_groups(net, batch, build=None, rows=False):
    """The minimal sets of trainable parameters that are jointly scale invariant, as lists of names.

    A set S is so if multiplying all its tensors by one c > 0 changes no logit in training mode:
    then Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for each batch and direction of the logits. At random ones these
    radial derivatives, in float64 and without eps, make a matrix with a column per tensor. In its
    null space is the indicator vector of each such set, which is verified by multiplying.

    net     any network; it is left as it is, and so are its buffers and the random state
    batch   a tensor of at least two inputs
    build   makes the network to measure; without it a deepcopy is measured
    rows    take sets of matrices each of whose rows may have a factor of its own

    Sets are disjoint: of those that overlap the smallest, then the largest tensors. A tensor
    without effect is a set of its own; one that never has a gradient is in none.
    """

    def measured(dtype):
        with _CopyComputed():
            made = build() if build else deepcopy(net)
        if set(made.parameters()) & set(net.parameters()):
            raise ValueError("build returns the same network each time: it must make a new one")
        found = _find(made.to(dtype), batch.detach(), rows)
        if any(p.grad is not None for p in net.parameters()):
            raise ValueError("a copy computes with the weights of the original (give build=)")
        return found

    if any(torch.nn.parameter.is_lazy(p) for p in net.parameters()):
        raise ValueError("the network has lazy layers: run it once on a batch first")
    with _undisturbed(net):
        try:
            return measured(torch.float64)
        except Exception as error:
            found = measured(torch.float32)
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"measured in float32, to a tolerance of 1e-3: float64 fails ({why})")
            return found


@contextmanager
def _undisturbed(net):
    """Afterwards random numbers and gradients are what they were."""
    states = random.getstate(), np.random.get_state()
    gradients = [(p, p.grad) for p in net.parameters()]
    devices = [p.device for p, _ in gradients if p.is_cuda][:1]
    cudnn = torch.backends.cudnn.flags(enabled=False)  # its BatchNorm takes no eps below 1e-5
    try:
        net.zero_grad()
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            cudnn,
        ):
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])


class _CopyComputed(TorchFunctionMode):
    """Lets deepcopy copy the value of what was computed: an activation that a layer keeps, the
    weight of the old weight_norm."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


def logits(net, inputs, output):
    """A forward hook: of several parts of an output that which is called logits, or the first."""
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the output is a {type(output).__name__} without logits")
    return output


def _find(net, batch, rows):
    """The sets, by name, in a network of this function's own."""
    torch.manual_seed(0)
    trained = [(name, p) for name, p in net.train().named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing is trained: requires_grad is False everywhere")
    names, params = zip(*trained, strict=True)
    dtype = params[0].dtype
    noise, tolerance = (1e-7, 1e-6) if dtype == torch.float64 else (2e-5, 1e-3)
    for p in params:  # at its start, a bias of 0, the network has symmetries that training breaks
        p.data += 0.1 * torch.randn_like(p) * (p.data.square().mean().sqrt() + 0.1)
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def outputs(seed, backward=False):
        """The same in each call with this seed: batch, dropout, buffers."""
        for begin in (random.seed, np.random.seed, torch.manual_seed):
            begin(seed)
        for buffer, value in buffers:
            buffer.data.copy_(value)
        order = torch.randint(len(batch), batch.shape, device=batch.device)
        with _WithoutEps(dtype) as mode:
            x = batch.gather(0, order)  # examples mixed number by number: more kinds of them
            if dtype == torch.float32:  # whole ones: of mixtures the network may know nothing
                x = batch[order.flatten(1)[:, 0]]
            out = logits(net, (), net(x))
            mode.forward = False
            if backward and out.requires_grad:
                out.backward(torch.randn_like(out))
        return out.detach()

    matrix, used = [], set()
    for seed in range(len(params) + 8):
        net.zero_grad()
        outputs(seed, backward=True)
        radial, size = torch.zeros(len(params), dtype=torch.float64), 1e-300
        for i, p in enumerate(params):
            g = p.grad
            if g is None:
                continue
            if g.is_sparse:
                raise ValueError(f"the gradient by {names[i]} is sparse: leave sparse=True out")
            used.add(i)
            radial[i] = (p.detach().double() * g).sum()
            size += p.detach().norm().item() * g.norm().item()
        matrix.append(radial / size)
    if not used:
        raise ValueError("no weight has a gradient (if copies use the original's, give build=)")
    matrix = torch.stack(matrix)
    if not matrix.isfinite().all():
        raise ValueError("its gradients are nan or infinite, on the first batch")
    _, singular, right = torch.linalg.svd(matrix)
    null = right[singular < noise * len(matrix) ** 0.5].numpy()

    def unchanged(chosen):
        """Whether the outputs stay when these tensors, or their rows, are multiplied."""
        if rows and any(params[i].dim() < 2 for i in chosen):
            return False
        before, changes = outputs(0), []
        olds = [(params[i], params[i].detach().clone()) for i in chosen]
        for factor in (0.5, 3.0):
            for p, old in olds:
                torch.manual_seed(1)  # row i has the same power in each tensor
                power = torch.rand(len(p), *[1] * (p.dim() - 1)).to(p) if rows else 1
                p.data.copy_(old * factor**power)
            changes.append((outputs(0) - before).norm())
        for p, old in olds:
            p.data.copy_(old)
        return bool(torch.stack(changes).max() <= tolerance * before.norm())  # not if it is nan

    found = _smallest(null, np.array([p.numel() for p in params]), unchanged)
    # What is invariant, but not in the null space, has a wrong gradient. It is a set, so that the
    # check before training can tell.
    for i, p in enumerate(params):
        if p.dim() > 1 and all(i not in chosen for chosen in found) and unchanged([i]):
            found.append([i])
    found = [sorted(chosen) for chosen in sorted(found, key=min) if used.issuperset(chosen)]
    return [[names[i] for i in chosen] for chosen in found]


class _WithoutEps(TorchDispatchMode):
    """Does every operation of torch without the eps of a normalization, which breaks invariance a
    little, and in one type of numbers: F.layer_norm(x, (8,), eps=1e-5) with an eps of 1e-18,
    x / (x.norm() + 1e-3) with 1e-18 for 1e-3; a .float(), as of Llama, stays in float64."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.forward = True  # in a backward pass constant tensors are gradients

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
        constant = isinstance(x, float)
        if isinstance(x, Tensor) and self.forward and not x.requires_grad:
            constant = len(x.unique()) == 1
        small = constant and 0 < torch.as_tensor(x).abs().max() <= MAX_EPS
        if small and isinstance(other, Tensor) and not other.is_complex() and (other >= 0).all():
            return 0 * x + 1e-18
        return x


def _smallest(null, numel, holds):
    """The disjoint sets that hold of those whose vectors of zeros and ones lie in the space of
    `null` [dimension, n]: the smallest first, then that of more numbers. Each basis vector is 1 at
    one pivot and 0 at the others, so that a vector in the space is the sum of basis vectors times
    its own entries at the pivots: linear, and with zeros and ones alone an integer program."""
    from scipy.linalg import qr  # which takes a moment
    from scipy.optimize import Bounds, LinearConstraint, milp

    found, n, one = [], len(numel), np.eye(len(numel))
    if not len(null):
        return found
    pivots = qr(null, mode="r", pivoting=True)[1][: len(null)]
    basis = np.linalg.solve(null[:, pivots], null)
    basis = np.where(abs(basis - basis.round()) < 1e-4, basis.round(), basis)
    rules = [LinearConstraint(one - basis.T @ one[pivots], -1e-3, 1e-3)]
    rules.append(LinearConstraint(np.ones(n), 1))  # not the empty set
    cost = 1 - numel / (2 * numel.sum()) + 0.01 * np.arange(n) / n**2  # of equals the first
    options = dict(c=cost, integrality=1, options={"mip_rel_gap": 0})
    free = np.ones(n)  # 0 where a set that was found has the tensor
    while (x := milp(bounds=Bounds(0, free), constraints=rules, **options).x) is not None:
        chosen = np.flatnonzero(x > 0.5)
        if holds(chosen):
            found.append(chosen)
            free[chosen] = 0
        else:  # nor may a larger set that has all of it
            rules.append(LinearConstraint(x.round(), ub=len(chosen) - 1))
    return found
