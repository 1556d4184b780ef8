"""Hessian and Gauss-Newton matrix of a network's loss, as products with vectors: their largest
eigenvalues and traces. By double backward, which more layers have than forward mode.

    hessian = operators(point)["hessian"]      of a point of landscape.py
    largest(hessian, 3), trace(hessian, probes=20)
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from data import chunks

CHUNK = 512  # inputs at once, over which BatchNorm normalizes
DENSE = 200  # weights up to which a matrix is written out


def operators(point, samples=None):
    """The Hessian of the train loss on the unit sphere, and the generalized Gauss-Newton matrix
    `ggn`, which for the cross-entropy is the Fisher matrix; over so many training inputs.

    Second derivatives by the weights on spheres, each times its radius: D H D with D = diag(ρ), in
    training mode, in chunks of the set. Raises ValueError where there are none.
    """
    net, data = point.copy().train(), point.data
    weights = [net.get_parameter(name) for sphere in point.spheres for name in sphere["names"]]
    radius = [x.norm(dim=1, keepdim=True).expand_as(x).flatten() for x in point.vectors()]
    radius, n = torch.cat(radius).cpu().numpy(), min(samples or len(data.x), len(data.x))
    buffers, batches = [(x, x.clone()) for x in net.buffers()], []
    devices = [weights[0].device] if weights[0].is_cuda else []
    for index in chunks(n, CHUNK, data.x.device):
        x = data.inputs(index)
        batches.append((x.to(weights[0]) if x.is_floating_point() else x, data.y[index]))

    def product(kind, v):
        v, total = torch.from_numpy(radius * v.ravel()).to(weights[0]), 0
        for x, y in batches:
            with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), PlainWeightNorm():
                torch.manual_seed(0)  # the same dropout in each product
                logits = net(x)
                check_twice(logits)
                total = total + kind(logits, y, weights, v) * len(y) / n
        for buffer, before in buffers:
            buffer.copy_(before)
        return radius * total.double().cpu().numpy()

    shape = (len(radius), len(radius))
    kinds = {"hessian": hessian_times, "ggn": ggn_times}
    how = {name: partial(product, kind) for name, kind in kinds.items()}
    return {name: LinearOperator(shape, times, dtype=np.float64) for name, times in how.items()}


def gradient(of, by, *directions, again=False):
    """By a list of tensors, as one vector; `again` if it is to be differentiated itself."""
    how = dict(create_graph=again, retain_graph=True, materialize_grads=True)
    return torch.cat([x.reshape(-1) for x in torch.autograd.grad(of, by, *directions, **how)])


def hessian_times(logits, y, weights, v):
    """The Hessian of a batch's loss, times v: the gradient of ⟨gradient, v⟩."""
    return gradient(gradient(F.cross_entropy(logits, y), weights, again=True) @ v, weights)


def ggn_times(logits, y, weights, v):
    """Jᵀ H J v with the Jacobian J of the logits and the Hessian H of the loss by the logits; Jv is
    the gradient of ⟨Jᵀu, v⟩ by u."""
    u, p = torch.zeros_like(logits, requires_grad=True), logits.detach().softmax(1)
    jv = gradient(gradient(logits, weights, u, again=True) @ v, [u]).view_as(p)
    return gradient(logits, weights, p * (jv - (p * jv).sum(1, keepdim=True)) / len(y))


class PlainWeightNorm(TorchFunctionMode):
    """The second derivative of torch's own weight_norm is wrong (2.7 to 2.14)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch._weight_norm:
            return function(*args, **(kwargs or {}))
        v, g, dim = (*args, 0)[:3]
        return v * (g / torch.norm_except_dim(v, 2, dim))


def check_twice(logits):
    """Raise ValueError where a function on the way has no second derivative, which autograd would
    leave out without a word."""
    nodes, seen = [logits.grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            function = getattr(node, "_forward_cls", None)  # a torch.autograd.Function
            once = hasattr(getattr(function, "backward", None), "__wrapped__")
            if once or function is CheckpointFunction:  # which takes use_reentrant=False
                raise ValueError(f"{function.__name__} has no second derivative: no curvature")


def largest(operator, k):
    """The k largest eigenvalues: exact up to DENSE rows, else by ARPACK to 0.1 %, or nan."""
    n = operator.shape[0]
    if n <= DENSE:
        return np.linalg.eigvalsh(operator @ np.eye(n))[::-1][:k]
    start, how = np.random.default_rng(0).standard_normal(n), dict(which="LA", tol=1e-3)
    try:
        values = eigsh(operator, min(k, n - 1), return_eigenvectors=False, v0=start, **how)
    except ArpackNoConvergence as partly:
        values = np.append(partly.eigenvalues, [math.nan] * (k - len(partly.eigenvalues)))
    return np.sort(values)[::-1]


def trace(operator, probes):
    """Exact up to DENSE rows, else Hutchinson's estimator with so many probes."""
    n = operator.shape[0]
    if n <= DENSE:
        return float(np.trace(operator @ np.eye(n)))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (probes, n))
    return float(np.mean([z @ (operator @ z) for z in signs]))
