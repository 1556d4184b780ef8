"""Second derivatives of the train loss by the weights on spheres, on the unit sphere: those by the
weights times ρ², in training mode. A point is a landscape.Point, or a run: what has `net`, `data`
and `spheres`."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

from lab import measure
from lab.data import chunks

SAMPLES = 1024  # training inputs whose loss is differentiated twice


def weights_of(point):
    """The tensors on spheres; of each of their numbers the radius ρ of its sphere, float64."""
    spheres, radius = point.spheres, []
    for x in measure.vectors(point.net, spheres):
        radius.append(x.norm(dim=1, keepdim=True).expand_as(x).flatten())
    weights = [x for sphere in spheres for x in measure.tensors(point.net, sphere)]
    return weights, torch.cat(radius)


def logits_of(point, index):
    """Of training inputs. Dropout is the same each time, and buffers stay as they are. Raises
    ValueError where there is no second derivative."""
    net, x = point.net.train(), point.data.inputs(index)
    if x.is_floating_point():
        x = x.to(next(net.parameters()).dtype)
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    with torch.random.fork_rng([x.device] if x.is_cuda else []), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        logits = net(x)
    for buffer, before in buffers:
        buffer.data.copy_(before)
    check_twice(logits)
    return logits


def operators(point, samples=SAMPLES):
    """The Hessian D H D of the train loss over so many training inputs, with D = diag(ρ), and the
    generalized Gauss-Newton matrix `ggn`, which for the cross-entropy is the Fisher matrix."""
    weights, radius = weights_of(point)
    n = min(samples, len(point.data.x))

    def product(times, v):
        v, total = (radius * torch.from_numpy(v.ravel()).to(radius)).to(weights[0]), 0
        for index in chunks(n, radius.device):
            of_chunk = times(logits_of(point, index), point.data.y[index], weights, v)
            total = total + of_chunk * len(index) / n
        return (radius * total.double()).cpu().numpy()

    shape, kinds = (len(radius), len(radius)), {"hessian": hessian_times, "ggn": ggn_times}
    times = {name: partial(product, kind) for name, kind in kinds.items()}
    return {name: LinearOperator(shape, x, dtype=np.float64) for name, x in times.items()}


def batch_sharpness(point, size, batches=64):
    """The curvature of the loss of a batch along its own gradient, mean and standard error over
    random batches of so many inputs (arXiv 2412.20553)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batches):
        index = torch.randperm(len(point.data.x), generator=generator)[:size]
        found.append(curvature_along_gradient(point, index.to(point.data.x.device))[0])
    return np.mean(found), np.std(found, ddof=1) / math.sqrt(batches)


def curvature_along_gradient(point, index):
    """Of the loss of these training inputs; with it the square of that gradient, and the loss."""
    weights, radius = weights_of(point)
    radius = radius.to(weights[0])
    loss = F.cross_entropy(logits_of(point, index), point.data.y[index])
    slope = gradient(loss, weights, again=True)
    step = radius * slope.detach()
    along = radius * step / step.norm()
    found = gradient(slope @ along, weights) @ along
    return found.item(), step.square().sum().item(), loss.item()


class Edge:
    """Batch sharpness on the way, as `batch_sharpness` at an end: before every so many-th step of a
    run, of a random batch. Training stays the same to the bit. Who asks imports it: scipy takes a
    while."""

    def __init__(self, run, every):
        self.run, self.every, self.steps = run, every, 0
        self.found = []  # since the last `mean`
        self.order = torch.Generator().manual_seed(run.identity["seed"])  # of these batches
        optimizer = run.plain_sgd or run.sphere_sgd
        optimizer.register_step_pre_hook(self.look)

    @torch.enable_grad()
    def look(self, *_):
        if self.steps % self.every == 0:
            x, kept = self.run.data.x, self.run.random.state_dict()  # the network may draw some
            index = torch.randperm(len(x), generator=self.order)[: self.run.config.batch_size]
            self.found.append(curvature_along_gradient(self.run, index.to(x.device))[0])
            self.run.random.load_state_dict(kept)
        self.steps += 1

    def mean(self):
        found, self.found = self.found, []
        return float(np.mean(found)) if found else math.nan

    def state_dict(self):
        return {"steps": self.steps, "order": self.order.get_state()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.order.set_state(state["order"].cpu())


def gradient(of, by, *directions, again=False):
    """By a list of tensors, as one vector; `again` if it is to be differentiated itself."""
    options = dict(create_graph=again, retain_graph=True, materialize_grads=True)
    return torch.cat([x.reshape(-1) for x in torch.autograd.grad(of, by, *directions, **options)])


def hessian_times(logits, y, weights, v):
    """The Hessian of a batch's loss, times v: the gradient of ⟨gradient, v⟩."""
    return gradient(gradient(F.cross_entropy(logits, y), weights, again=True) @ v, weights)


def ggn_times(logits, y, weights, v):
    """Jᵀ H J v with the Jacobian J of the logits and the Hessian H of the loss by the logits; Jv is
    the gradient of ⟨Jᵀu, v⟩ by u."""
    u, p = torch.zeros_like(logits, requires_grad=True), logits.detach().softmax(1)
    jv = gradient(gradient(logits, weights, u, again=True) @ v, [u]).view_as(p)
    return gradient(logits, weights, p * (jv - (p * jv).sum(1, keepdim=True)) / len(y))


def check_twice(logits):
    """Raise ValueError where a function on the way has no second derivative, which autograd would
    leave out without a word, or a wrong one."""
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
            if "WeightNorm" in node.name():  # wrong from torch 2.7 to 2.14
                raise ValueError("weight_norm has no right second derivative: no curvature")


def largest(operator, k):
    """The k largest eigenvalues, by ARPACK, to 1e-4; nan where the matrix is nan or 0, as that of a
    run that has died. That of the Hessian is λ_max, the sharpness."""
    n = operator.shape[0]
    k, start = min(k, n - 1), np.random.default_rng(0).standard_normal(n)
    first = operator @ start
    if not (np.isfinite(first).all() and first.any()):
        return np.full(k, math.nan)
    values = eigsh(operator, k, which="LA", tol=1e-4, v0=start, return_eigenvectors=False)
    return np.sort(values)[::-1]


def trace(operator, probes=20):
    """Hutchinson's estimate."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (probes, operator.shape[0]))
    return float(np.mean([z @ (operator @ z) for z in signs]))
