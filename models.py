"""The scale-invariant networks, the toy, and which parameters live on which sphere.

Every convolution is followed by a BatchNorm without affine parameters, and the last linear layer is fixed, so the whole
function depends on the directions of the convolutions' weights alone:

    net = convnet(channels=3, classes=10, width=32)
    net.layer_groups        # [["conv1.weight"], ...]: the minimal sets that are scale invariant, each by itself

With affine=True, train_head=True only the convolutions are scale invariant, as in common networks.
"""

import importlib.util
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# BatchNorm divides by sqrt(variance + eps), which is not quite scale invariant: ten times a layer's weights changes the logits
# by 5e-5 at initialization with torch's default of 1e-5 (float64, relative), by 5e-8 with this.
EPS = 1e-8


def convnet(channels: int, classes: int, width: int = 8, affine: bool = False, train_head: bool = False) -> nn.Sequential:
    """The plain network of the paper (arXiv 2209.03695, appendix A): [N, channels, H, W] → [N, classes], H and W at least 8.

    3×3 convolutions channels → k → 2k → 4k → 8k without bias, each with BatchNorm and ReLU; a 2×2 max-pool after the second,
    third and fourth, a global max-pool and a fixed linear layer.
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
    return net.to(memory_format=torch.channels_last)  # NHWC throughout, which convolutions like best


def fixed_head(head: nn.Linear, norm: float = 10.0) -> nn.Linear:
    """The last layer at its random initialization, its weight rescaled to the given Frobenius norm, not trained."""
    with torch.no_grad():
        head.weight.mul_(norm / head.weight.norm())
    return head.requires_grad_(False)


class PreActivationBlock(nn.Module):
    """norm → ReLU → 3×3 convolution, twice, added to the input; where the shape changes, to its 1×1 convolution."""

    def __init__(self, before: int, after: int, stride: int, affine: bool):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before, affine=affine, eps=EPS)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after, affine=affine, eps=EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != after:
            norm = nn.BatchNorm2d(before, affine=affine, eps=EPS)
            self.shortcut = nn.Sequential(norm, nn.Conv2d(before, after, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return out + (x if self.shortcut is None else self.shortcut(F.relu(x)))


def resnet18(channels: int, classes: int, width: int = 8, affine: bool = False, train_head: bool = False) -> nn.Sequential:
    """Pre-activation ResNet-18 of width k for small images: [N, channels, H, W] → [N, classes], H and W at least 8.

    3×3 stem, stages k, 2k, 4k, 8k of two blocks with strides 1, 2, 2, 2, final BatchNorm, ReLU, global average pool and a fixed
    linear layer without bias. The tensors that write to one residual stream are only jointly scale invariant.
    """
    layers, before = OrderedDict(stem=nn.Conv2d(channels, width, 3, padding=1, bias=False)), width
    groups, stream = [], ["stem.weight"]
    for stage in range(4):
        after = width * 2**stage
        for block in range(2):
            name = f"stage{stage + 1}_block{block + 1}"
            layers[name] = PreActivationBlock(before, after, 2 if stage and not block else 1, affine)
            if layers[name].shortcut is not None:
                groups.append(stream)
                stream = [f"{name}.shortcut.1.weight"]
            groups.append([f"{name}.conv1.weight"])
            stream.append(f"{name}.conv2.weight")
            before = after
    layers["norm"] = nn.BatchNorm2d(before, affine=affine, eps=EPS)
    layers["relu"], layers["global_pool"], layers["flatten"] = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["head"] = fixed_head(nn.Linear(before, classes, bias=False)).requires_grad_(train_head)
    net = nn.Sequential(layers)
    net.layer_groups = [*groups, stream]
    return net.to(memory_format=torch.channels_last)


MODELS = {"convnet": convnet, "resnet18": resnet18}


class Toy(nn.Module):
    """The paper's toy, in float64: F(θ) = Σ_i α_i x_i² / (x_i² + y_i²) of groups θ_i = (x_i, y_i); its output is its loss.

    Each group is scale invariant by itself. On their joint sphere gradient descent at an ELR η̃ can converge if and only if
    η̃ < 1/Σα_i; a uniformly random point has E F = Σα_i/2.
    """

    def __init__(self, alphas: list[float]):
        super().__init__()
        self.register_buffer("alphas", torch.tensor(alphas, dtype=torch.float64))
        self.groups = nn.ParameterList(torch.randn(2, dtype=torch.float64) for _ in alphas)
        self.layer_groups = [[f"groups.{i}"] for i in range(len(alphas))]

    def forward(self) -> Tensor:
        square = torch.stack(list(self.groups)).square()
        return (self.alphas * square[:, 0] / square.sum(1)).sum()


LOSSES = {
    "ce": F.cross_entropy,
    "mse": lambda logits, y: F.mse_loss(logits, F.one_hot(y, logits.shape[1]).to(logits.dtype)),
}


def builder(options: dict) -> Callable[..., nn.Module]:
    """The function of (channels, classes) that makes the network which `options` name: their `model` is one of MODELS, with
    `width`, `affine` and `train_head`, or toy, with `alphas`, or FILE.py:FUNCTION. Raises ValueError where it names none."""
    model = options["model"]
    if model == "toy":
        return lambda channels=None, classes=None: Toy(options["alphas"])
    file, _, name = model.rpartition(":")
    if not file:
        if model not in MODELS:
            raise ValueError(f"no network {model!r}: choose {', '.join(MODELS)}, toy or FILE.py:FUNCTION")
        more = options["width"], bool(options["affine"]), bool(options["train_head"])
        return lambda channels, classes: MODELS[model](channels, classes, *more)
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"no file {file}: it must be a Python file, as in path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file} has no function {name!r}")
    return getattr(module, name)


def scale_invariant_groups(model: nn.Module, inputs: Tensor | tuple, tolerance: float = 1e-6) -> list[list[str]]:
    """The minimal sets of trainable parameters that are jointly scale invariant, by name; all other parameters are not.

    A set S is jointly scale invariant if multiplying all its tensors by one c > 0 changes no output in training mode, that is if
    and only if Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for every batch and every direction of the output. Measured on a copy in float64 at
    random batches and directions, these radial derivatives make a matrix with a column per tensor, whose null space holds the
    indicator vector of every such set (and rescaling symmetries, up in one layer and down in the next, whose signs are mixed).

    model   any network; it is left as it is, its buffers and the random state too. Names and types of modules do not matter.
    inputs  one batch of at least two examples, or a tuple of arguments; random batches like it are drawn.
    tolerance  relative, for the outputs when a set that was found is multiplied by 0.5 and by 3 to verify it.

    The sets returned are disjoint: where minimal sets overlap (a bias after a normalized, then a linear layer, belongs to both),
    the smallest are taken, then those of more numbers. A tensor that has no effect at all is a set of its own.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        copy = deepcopy(model).double().train()
        for module in copy.modules():  # eps blurs the invariance
            if isinstance(getattr(module, "eps", None), float):
                module.eps = min(module.eps, 1e-12)
        names, params = zip(*((n, p) for n, p in copy.named_parameters() if p.requires_grad), strict=True)
        with torch.no_grad():
            for p in params:  # to a generic point: a bias of 0 would hide what depends on it
                p.add_(0.1 * torch.randn_like(p) * (p.square().mean().sqrt() + 0.1))

        def outputs(batch, seed):
            torch.manual_seed(seed)  # dropout, if any, drops the same
            leaves = tree_leaves(copy(*batch))
            return torch.cat([x.flatten() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()])

        rows, norms = [], torch.stack([p.detach().norm() for p in params])
        while len(rows) < 2 * len(params) + 4:
            batch = tuple(_random_like(x) for x in inputs)
            out = outputs(batch, len(rows))
            for last in (False, False, False, True):
                direction = torch.randn_like(out)
                gradients = torch.autograd.grad(out, params, direction, retain_graph=not last, allow_unused=True)
                with torch.no_grad():
                    pairs = [(torch.zeros_like(p) if g is None else g, p) for g, p in zip(gradients, params, strict=True)]
                    row = torch.stack([torch.dot(g.reshape(-1), p.reshape(-1)) for g, p in pairs])
                    size = torch.stack([g.norm() for g, _ in pairs]) @ norms  # what the row could amount to
                    rows.append((row / size.clamp(min=1e-300)).cpu())
        _, singular, right = torch.linalg.svd(torch.stack(rows))
        null = right[singular < 1e-7 * len(rows) ** 0.5]

        batch = tuple(_random_like(x) for x in inputs)
        with torch.no_grad():
            before = outputs(batch, 0)

        @torch.no_grad()
        def unchanged(group):
            """Whether multiplying these parameters by 0.5 and by 3 leaves the outputs."""
            for factor in (0.5, 3.0):
                torch._foreach_mul_(group, factor)
                after = outputs(batch, 0)
                torch._foreach_div_(group, factor)
                if not (after - before).norm() <= tolerance * before.norm():
                    return False
            return True

        found, taken = [], set()
        sizes = [p.numel() for p in params]
        for indices in sorted(_indicators(null), key=lambda s: (len(s), -sum(sizes[i] for i in s), sorted(s))):
            if not taken & indices and unchanged([params[i] for i in indices]):
                found.append([names[i] for i in sorted(indices)])
                taken |= indices
    return sorted(found, key=lambda group: names.index(group[0]))


def layer_groups(net: nn.Module, x: Tensor | None, classes: int | None, sphere: str) -> list[list[str]]:
    """Which parameters are on which sphere: what our networks say of themselves, what is found in others and then printed.

    x is a batch of images, classes how many logits there must be; sphere "row" takes only tensors whose rows have directions.
    Raises ValueError where the network does not fit or has no scale-invariant weights.
    """
    if hasattr(net, "layer_groups"):
        return net.layer_groups
    try:
        logits = net(x)
        found = scale_invariant_groups(net, x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the network cannot be run on the data ({str(error).splitlines()[0]})") from error
    if logits.shape != (len(x), classes):
        raise ValueError(f"the network's output is {tuple(logits.shape)}, not (batch, classes) = {(len(x), classes)}")
    sizes = {name: p.detach().norm().item() for name, p in net.named_parameters() if p.requires_grad}
    found = [group for group in found if any(sizes[name] > 0 for name in group)]  # a norm of 0 has no direction
    if sphere == "row":  # nor has a row of one number, which is all that a vector's rows are
        tensors = dict(net.named_parameters())
        found = [
            group
            for group in found
            if all(tensors[name].dim() > 1 and tensors[name].flatten(1).norm(dim=1).min() > 0 for name in group)
        ]
    if not found:
        raise ValueError("no scale-invariant weights found: is there a normalization layer behind any?")
    print(f"{'norm':>9}  sphere")
    for group in found:
        print(f"{math.hypot(*(sizes[name] for name in group)):9.3g}  {' + '.join(group)}")
    rest = [name for name in sizes if not any(name in group for group in found)]
    print(f"{'':9}  off the spheres, by plain SGD: {', '.join(rest) or 'nothing'}")
    return found


def _random_like(x):
    """A random batch like x: normal with its mean and deviation, or whole numbers of its range; what is no tensor stays."""
    if not isinstance(x, Tensor) or x.dtype == torch.bool:
        return x
    if x.is_floating_point():
        x = x.double()
        return torch.randn_like(x) * (x.std() if x.std() > 0 else 1) + x.mean()
    return torch.randint_like(x, int(x.min()), int(x.max()) + 1)


def _indicators(null: Tensor) -> set[frozenset[int]]:
    """The vectors of zeros and ones in a space, given by its basis [dimension, n], that contain no other such vector.

    In the reduced echelon form each basis vector has a 1 at its own pivot and 0 at the others' pivots, so that a vector of zeros
    and ones is a sum of some of them: the search adds, to one, those that mend an entry not 0 or 1, or exchange some.
    """
    basis, pivots = null.clone(), []
    for i in range(len(basis)):  # Gauss and Jordan with complete pivoting
        at = int(basis[i:].abs().argmax())
        row, column = i + at // basis.shape[1], at % basis.shape[1]
        basis[[i, row]] = basis[[row, i]]
        basis[i] /= basis[i, column].clone()
        others = [k for k in range(len(basis)) if k != i]
        basis[others] -= basis[others, column, None] * basis[i]
        pivots.append(column)
    basis = torch.where((basis - basis.round()).abs() < 1e-4, basis.round(), basis)

    found, seen = set(), set()
    queue = deque(frozenset([start]) for start in range(len(basis)))  # breadth first: sums of few before sums of many
    while queue and len(seen) < 50_000:
        chosen = queue.popleft()
        if chosen in seen:
            continue
        seen.add(chosen)
        total = basis[list(chosen)].sum(0)
        wrong = ((total != 0) & (total != 1)).nonzero()[:, 0]
        if not len(wrong):
            found.add(frozenset(total.nonzero()[:, 0].tolist()))
            more = (basis[:, total == 1] < 0).any(1)  # those that exchange some of the set for others
        else:
            more = basis[:, wrong[0]] != 0
        if len(chosen) < 12:
            queue.extend(chosen | {k} for k in more.nonzero()[:, 0].tolist() if k not in chosen)
    return {s for s in found if not any(other < s for other in found)}
