"""The networks, and which parameters of any network are scale invariant.

Every weight of ours stands before a normalization without parameters, or in the fixed last layer:

    net = convnet(channels=3, classes=10, width=32)
    net.layer_groups        # [["conv1.weight"], ...]: the minimal sets that are scale invariant
"""

import math
from collections import OrderedDict
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lab.own import load, logits, measuring, rehearse, seed_all, told

# Ten times a layer's weights changes the logits by 5e-8 with this, by 5e-5 with torch's 1e-5.
EPS = 1e-8
MAX_EPS = 0.01  # of what others call a normalization


def convnet(channels, classes, width=8, affine=False, train_head=False):
    """The plain network of the paper (arXiv 2209.03695, appendix A), [N, channels, H, W] →
    [N, classes], H and W at least 8.

    3×3 convolutions to k, 2k, 4k, 8k channels, each with BatchNorm and ReLU; a 2×2 max-pool after
    the last three, a global max-pool and a fixed linear layer.
    """
    layers, before = OrderedDict(), channels
    for i in range(4):
        after = width * 2**i
        layers[f"conv{i + 1}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{i + 1}"] = nn.BatchNorm2d(after, affine=affine, eps=EPS)
        layers[f"relu{i + 1}"] = nn.ReLU()
        if i > 0:
            layers[f"pool{i + 1}"] = nn.MaxPool2d(2)
        before = after
    layers["global_pool"] = nn.AdaptiveMaxPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = fixed_head(nn.Linear(before, classes)).requires_grad_(train_head)
    net = nn.Sequential(layers)
    net.layer_groups = [[f"conv{i + 1}.weight"] for i in range(4)]
    return net.to(memory_format=torch.channels_last)  # which convolutions like best


def fixed_head(head, norm=10.0):
    """The last layer, not trained, its weight scaled to this Frobenius norm."""
    with torch.no_grad():
        head.weight.mul_(norm / head.weight.norm())
    return head.requires_grad_(False)


class PreActivationBlock(nn.Module):
    """norm → ReLU → 3×3 convolution, twice, added to the input. Where the shape changes, BatchNorm
    and a 1×1 convolution of the first activation take its place."""

    def __init__(self, before, after, stride, affine):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before, affine=affine, eps=EPS)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after, affine=affine, eps=EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != after:
            norm = nn.BatchNorm2d(before, affine=affine, eps=EPS)
            self.shortcut = nn.Sequential(norm, nn.Conv2d(before, after, 1, bias=False))
        self.stride = stride

    def forward(self, x):
        h = F.relu(self.norm1(x))
        if self.shortcut is not None:
            norm, conv = self.shortcut
            # A strided convolution would do the same, but oneDNN may compute its gradient wrong:
            # github.com/uxlfoundation/oneDNN/issues/6035 (1×1, stride above 1, few channels)
            x = conv(norm(h)[:, :, :: self.stride, :: self.stride])
        h = F.relu(self.norm2(self.conv1(h)))
        return x + self.conv2(h)


def resnet18(channels, classes, width=8, affine=False, train_head=False):
    """Pre-activation ResNet-18 of width k for small images, [N, channels, H, W] → [N, classes].

    3×3 stem, stages k, 2k, 4k, 8k of two blocks with strides 1, 2, 2, 2, final BatchNorm, ReLU,
    global average pool and a fixed linear layer without bias. The tensors that write to one
    residual stream are only jointly scale invariant.
    """
    layers = OrderedDict(stem=nn.Conv2d(channels, width, 3, padding=1, bias=False))
    before, groups, stream = width, [], ["stem.weight"]
    for stage in range(4):
        after = width * 2**stage
        for block in range(2):
            name = f"stage{stage + 1}_block{block + 1}"
            stride = 2 if stage > 0 and block == 0 else 1
            layers[name] = PreActivationBlock(before, after, stride, affine)
            if layers[name].shortcut is not None:
                groups.append(stream)
                stream = [f"{name}.shortcut.1.weight"]
            groups.append([f"{name}.conv1.weight"])
            stream.append(f"{name}.conv2.weight")
            before = after
    layers["norm"] = nn.BatchNorm2d(before, affine=affine, eps=EPS)
    layers["relu"] = nn.ReLU()
    layers["global_pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    head = nn.Linear(before, classes, bias=False)
    layers["head"] = fixed_head(head).requires_grad_(train_head)
    net = nn.Sequential(layers)
    net.layer_groups = [*groups, stream]
    return net.to(memory_format=torch.channels_last)


class transformer(nn.Module):
    """A causal transformer of one layer, all of whose weights are scale invariant: tokens [N, T]
    int64 → [N, classes], the prediction at the last token.

    With n(x) = x/rms(x): n(embedding) + n(position); x + n(W_o·attention(n(x))), queries and keys
    through n, too; x + n(W_down·relu(W_up·n(x))); logits = 10·⟨n(x)/√d, √classes·W/‖W‖⟩.
    """

    def __init__(self, tokens, length, classes, width=64, heads=4):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width of a transformer is a multiple of {heads}, not {width}")

        def weight(rows, columns):
            return nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))

        self.heads = heads
        self.embedding, self.position = weight(tokens, width), weight(length, width)
        self.query, self.key, self.value = (weight(width, width) for _ in range(3))
        self.out = weight(width, width)
        self.up, self.down = weight(4 * width, width), weight(width, 4 * width)
        self.head = weight(classes, width)
        self.layer_groups = [[name] for name, _ in self.named_parameters()]

    def forward(self, tokens):
        x = norm(self.embedding)[tokens] + norm(self.position)
        h = norm(x)
        split = (len(x), -1, self.heads, x.shape[-1] // self.heads)
        # Only the last token's output is wanted: it is the one query, and sees all tokens.
        q = norm(F.linear(h[:, -1], self.query).view(split).transpose(1, 2))
        k = norm(F.linear(h, self.key).view(split).transpose(1, 2))
        v = F.linear(h, self.value).view(split).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v).flatten(1)  # [N, width], head after head
        x = x[:, -1] + norm(F.linear(h, self.out))
        x = x + norm(F.linear(F.relu(F.linear(norm(x), self.up)), self.down))
        scale = 10 * math.sqrt(len(self.head) / x.shape[-1])
        return scale * F.linear(norm(x), self.head / self.head.norm())


def norm(x):
    """Scaled to root mean square 1 over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


MODELS = {"convnet": convnet, "resnet18": resnet18, "transformer": transformer}


def build(options, data):
    """The network that `options` name for these data: their `model` is one of MODELS, with `width`,
    `affine` and `train_head`, or FILE.py:FUNCTION. Raises ValueError where that cannot be."""
    model, example = options["model"], data.x[0]
    if ":" in model:
        return load(model, data)
    if model not in MODELS:
        raise ValueError(f"no network {model!r}: choose {', '.join(MODELS)} or FILE.py:FUNCTION")
    if model == "transformer":
        if data.tokens is None:
            raise ValueError("the transformer takes tokens, as --data modular has, not these")
        if options["affine"] or options["train_head"]:
            raise ValueError("the transformer has no affine parameters, and its head is trained")
        width = options["width"] or 64
        return transformer(data.tokens, len(example), data.classes, width)
    if example.dim() != 3 or min(example.shape[1:]) < 8:
        raise ValueError(f"{model} takes images of at least 8 × 8, not {list(example.shape)}")
    more = (options["width"] or 8, options["affine"], options["train_head"])
    return MODELS[model](len(example), data.classes, *more)


def layer_groups(options, data):
    """The network, a batch, and the names of the parameters on each sphere: what our networks say
    of themselves; what is found in others, and then printed.

    On sphere "row" are only tensors whose rows are scale invariant. Raises ValueError where there
    are none, or the network cannot be run as it will be.
    """
    model, device, rows = options["model"], data.x.device, options["sphere"] == "row"

    def make():
        torch.manual_seed(options["seed"])
        return build(options, data).to(device)

    net = rehearse(make, data, options)
    x = data.inputs(torch.arange(min(32, len(data.x)), device=device))
    if ":" not in model:
        return net, x, net.layer_groups
    with told(f"{model} cannot be measured"):
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


def scale_invariant_groups(model, inputs, build=None, rows=False):
    """The minimal sets of trainable parameters that are jointly scale invariant, by name.

    A set S is so if multiplying all its tensors by one c > 0 changes no logit in training mode:
    then Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for every batch and direction of the logits. At random ones these
    radial derivatives, in float64 and without eps, make a matrix with a column per tensor. In its
    null space is the indicator vector of every such set. Sets are verified by multiplying them.

    model   any network; it is left as it is, its buffers and the random state, too
    inputs  a batch of at least two examples
    build   makes the network to measure; without it a copy is measured
    rows    take sets of matrices each of whose rows may have a factor of its own

    Where float64 fails it is float32, and says so. Returns lists of names, disjoint: of sets that
    overlap the smallest, then the largest tensors. A tensor without effect is a set of its own; one
    that never has a gradient is in none.
    """
    build = build or (lambda: deepcopy(model))
    with measuring(model):
        try:
            return _find(build().to(torch.float64), inputs, rows)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"measured in float32, to a tolerance of 1e-3: float64 fails ({why})")
            return _find(build().to(torch.float32), inputs, rows)


def _find(net, inputs, rows):
    torch.manual_seed(0)
    trained = [(name, p) for name, p in net.train().named_parameters() if p.requires_grad]
    names, params = zip(*trained, strict=True)
    dtype = params[0].dtype
    noise, tolerance = (1e-7, 1e-6) if dtype == torch.float64 else (2e-5, 1e-3)
    for p in params:  # a bias of 0 would hide something
        p.data += 0.1 * torch.randn_like(p) * (p.data.square().mean().sqrt() + 0.1)

    state = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def outputs(seed, backward=False):
        seed_all(seed)  # dropout drops the same
        for buffer, first in state:
            buffer.data.copy_(first)
        order = torch.randint(len(inputs), inputs.shape, device=inputs.device)
        with _Sharp(dtype) as sharp:
            x = inputs.gather(0, order)  # mixed
            if dtype == torch.float32:  # or whole examples
                x = inputs[order.flatten(1)[:, 0]]
            out = logits(net, (), net(x))
            sharp.forward = False
            if backward and out.requires_grad:
                out.backward(torch.randn_like(out))
        return out.detach()

    matrix, used = [], set()
    for seed in range(len(params) + 8):
        net.zero_grad()
        outputs(seed, backward=True)
        radial, size = torch.zeros(len(params), dtype=torch.float64), 1e-300
        for i, p in enumerate(params):
            if p.grad is not None:
                used.add(i)
                radial[i] = (p.detach().double() * p.grad).sum()
                size += p.detach().norm().item() * p.grad.norm().item()
        matrix.append(radial / size)
    _, singular, right = torch.linalg.svd(torch.stack(matrix))

    def unchanged(chosen):
        if rows and any(params[i].dim() < 2 for i in chosen):
            return False
        before, olds = outputs(0), [(params[i], params[i].detach().clone()) for i in chosen]
        changes = []
        for factor in (0.5, 3.0):
            for p, old in olds:
                torch.manual_seed(1)
                power = torch.rand(len(p), *[1] * (p.dim() - 1)) if rows else torch.ones(())
                p.data.copy_(old * factor ** power.to(p))
            changes.append((outputs(0) - before).norm())
        for p, old in olds:
            p.data.copy_(old)
        return all(change <= tolerance * before.norm() for change in changes)

    null = right[singular < noise * len(matrix) ** 0.5].numpy()
    found = _smallest(null, np.array([p.numel() for p in params]), unchanged)
    # A weight that is so when multiplied has a wrong gradient: the check before training tells.
    for i, p in enumerate(params):
        if p.dim() > 1 and all(i not in chosen for chosen in found) and unchanged([i]):
            found.append([i])
    found = [sorted(chosen) for chosen in sorted(found, key=min) if used.issuperset(chosen)]
    return [[names[i] for i in chosen] for chosen in found]


class _Sharp(TorchDispatchMode):
    """Without what blurs scale invariance: eps is next to 0, and all arithmetic in one type."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.forward = dtype, True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, mutable = function.overloadpacket.__name__, function._schema.is_mutable
        if name.rstrip("_") in ("add", "sub", "hypot"):
            a, b, *more = args
            args = [self.without_eps(a, b), self.without_eps(b, a), *more]
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

    def without_eps(self, x, other):
        """As in x / (norm + eps): a small constant beside what is nowhere negative."""
        constant = isinstance(x, float)
        if isinstance(x, Tensor) and self.forward and not x.requires_grad:
            constant = len(x.unique()) == 1
        small = constant and 0 < torch.as_tensor(x).abs().max() <= MAX_EPS
        if small and isinstance(other, Tensor) and not other.is_complex() and (other >= 0).all():
            return 0 * x + 1e-18
        return x


def _smallest(null, numel, holds):
    """The sets that hold of those whose vectors of zeros and ones lie in a space, given by a basis
    [dimension, n]: disjoint, the smallest first, then that of more numbers.

    In the reduced echelon form each basis vector has a 1 at its own pivot and 0 at the others':
    there a vector has its coordinates. The rest is integer programming.
    """
    from scipy.linalg import qr  # which takes a moment
    from scipy.optimize import Bounds, LinearConstraint, milp

    found, n, one = [], len(numel), np.eye(len(numel))
    if not len(null):
        return found
    free = np.ones(n)
    pivots = qr(null, mode="r", pivoting=True)[1][: len(null)]
    basis = np.linalg.solve(null[:, pivots], null)
    basis = np.where(abs(basis - basis.round()) < 1e-4, basis.round(), basis)
    rules = [LinearConstraint(one - basis.T @ one[pivots], -1e-3, 1e-3)]
    rules.append(LinearConstraint(np.ones(n), 1))
    cost = 1 - numel / (2 * numel.sum()) + 0.01 * np.arange(n) / n**2  # of equals the first
    how = dict(c=cost, integrality=1, options={"mip_rel_gap": 0})
    while (x := milp(bounds=Bounds(0, free), constraints=rules, **how).x) is not None:
        chosen = np.flatnonzero(x > 0.5)
        if holds(chosen):
            found.append(chosen)
            free[chosen] = 0
        else:
            rules.append(LinearConstraint(x.round(), ub=len(chosen) - 1))
    return found
