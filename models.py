"""The networks, and which parameters of any network are scale invariant.

Every weight of ours stands before a normalization without parameters, or in the fixed last layer,
so that the function depends on the directions of the weights alone:

    net = convnet(channels=3, classes=10, width=32)
    net.layer_groups        # [["conv1.weight"], ...]: the minimal sets that are scale invariant

With affine=True, train_head=True only the convolutions are, as in common networks.
"""

import importlib.util
import inspect
import math
from collections import OrderedDict, deque
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# BatchNorm divides by sqrt(variance + eps), which is not quite scale invariant. Ten times a layer's
# weights changes the logits by 5e-5 with torch's default of 1e-5, by 5e-8 with this (relative).
EPS = 1e-8


def convnet(channels, classes, width=8, affine=False, train_head=False):
    """The plain network of the paper (arXiv 2209.03695, appendix A), [N, channels, H, W] →
    [N, classes], H and W at least 8.

    3×3 convolutions channels → k → 2k → 4k → 8k, each with BatchNorm and ReLU; a 2×2 max-pool after
    the second, third and fourth, a global max-pool and a fixed linear layer.
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
            self.shortcut = nn.Sequential(norm, nn.Conv2d(before, after, 1, stride, bias=False))

    def forward(self, x):
        h = F.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(h)
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

    With n(x) = x/rms(x) over the last dimension: n(embedding) + n(position); x +
    n(W_o·attention(n(x))), whose queries and keys go through n, too; x + n(W_down·relu(W_up·n(x)));
    logits = 10·⟨n(x)/√d, √classes·W/‖W‖⟩.
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
    """The network that `options` name, for these data.

    Their `model` is one of MODELS, with `width`, `affine` and `train_head`, or FILE.py:FUNCTION.
    Such a function takes (channels, classes), or what it names of channels, classes, tokens (how
    many there are) and example (one input). Raises ValueError where that cannot be.
    """
    model, example = options["model"], data.x[0]
    file, _, name = model.rpartition(":")
    if file:
        function = load_function(file, name)
        known = dict(channels=len(example), classes=data.classes, tokens=data.tokens)
        known["example"] = example
        asked = inspect.signature(function).parameters
        if all(name in known for name in asked):
            return function(**{name: known[name] for name in asked})
        return function(len(example), data.classes)
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


def load_function(file, name):
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"no file {file}: it takes a Python file, path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported ({error!r})") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file} has no function {name!r}")
    return getattr(module, name)


def scale_invariant_groups(model, inputs, tolerance=1e-6):
    """The minimal sets of trainable parameters that are jointly scale invariant, by name.

    A set S is so if multiplying all its tensors by one c > 0 changes no output in training mode: if
    and only if Σ_{p in S} ⟨∂f/∂p, p⟩ = 0 for every batch and direction of the output. Measured on a
    copy in float64 at random batches and directions, these radial derivatives make a matrix with a
    column per tensor. Its null space holds the indicator vector of every such set (and rescaling
    symmetries, whose signs are mixed).

    model      any network; it is left as it is, its buffers and the random state, too
    inputs     one batch of at least two examples, or a tuple of arguments
    tolerance  of the outputs, relative, when a set is multiplied by 0.5 and 3 to verify it

    Returns lists of names, disjoint: of minimal sets that overlap the smallest are taken, then
    those of more numbers. A tensor without effect is a set of its own.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        copy = deepcopy(model).double().train()
        for module in copy.modules():  # eps blurs the invariance
            if isinstance(getattr(module, "eps", None), float):
                module.eps = min(module.eps, 1e-12)
        trained = [(name, p) for name, p in copy.named_parameters() if p.requires_grad]
        names, params = zip(*trained, strict=True)
        with torch.no_grad():
            for p in params:  # to a generic point: a bias of 0 would hide what depends on it
                p.add_(0.1 * torch.randn_like(p) * (p.square().mean().sqrt() + 0.1))

        def outputs(batch, seed):
            torch.manual_seed(seed)  # dropout, if any, drops the same
            leaves = tree_leaves(copy(*batch))
            leaves = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
            return torch.cat([x.flatten() for x in leaves])

        rows, norms = [], torch.stack([p.detach().norm() for p in params])
        while len(rows) < 2 * len(params) + 4:
            batch = tuple(_random_like(x) for x in inputs)
            out = outputs(batch, len(rows))
            for last in (False, False, False, True):
                more = dict(retain_graph=not last, materialize_grads=True)
                gradients = torch.autograd.grad(out, params, torch.randn_like(out), **more)
                with torch.no_grad():
                    pairs = zip(gradients, params, strict=True)
                    row = torch.stack([(g * p).sum() for g, p in pairs])
                    largest = torch.stack([g.norm() for g in gradients]) @ norms
                    rows.append((row / largest.clamp(min=1e-300)).cpu())
        _, singular, right = torch.linalg.svd(torch.stack(rows))
        null = right[singular < 1e-7 * len(rows) ** 0.5]

        batch = tuple(_random_like(x) for x in inputs)
        with torch.no_grad():
            before = outputs(batch, 0)

        @torch.no_grad()
        def unchanged(group):
            for factor in (0.5, 3.0):
                torch._foreach_mul_(group, factor)
                after = outputs(batch, 0)
                torch._foreach_div_(group, factor)
                if not (after - before).norm() <= tolerance * before.norm():
                    return False
            return True

        def small_first(indices):
            return len(indices), -sum(params[i].numel() for i in indices), sorted(indices)

        found, taken = [], set()
        for indices in sorted(_indicators(null), key=small_first):
            if not taken & indices and unchanged([params[i] for i in indices]):
                found.append([names[i] for i in sorted(indices)])
                taken |= indices
    return sorted(found, key=lambda group: names.index(group[0]))


def layer_groups(net, x, classes, sphere):
    """Names of the parameters on each sphere: what our networks say of themselves; what is found in
    others, and then printed.

    x is a batch of inputs, classes how many logits there must be; sphere "row" takes only tensors
    whose rows have directions. Raises ValueError where there are none, or the network does not fit.
    """
    if hasattr(net, "layer_groups"):
        return net.layer_groups
    try:
        logits = net(x)
        found = scale_invariant_groups(net, x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"the network cannot be run on the data ({what})") from error
    if logits.shape != (len(x), classes):
        shape = list(logits.shape)
        raise ValueError(f"the network's output is {shape}, not [{len(x)}, {classes} classes]")
    tensors = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    norms = {name: p.norm().item() for name, p in tensors.items()}
    usable = []
    for group in found:
        has_direction = any(norms[name] > 0 for name in group)
        if sphere == "row":  # those of a vector, one number each, have none
            rows = [tensors[name].flatten(1) for name in group if tensors[name].dim() > 1]
            whole = all(row.norm(dim=1).min() > 0 for row in rows)
            has_direction = len(rows) == len(group) and whole
        if has_direction:
            usable.append(group)
    if not usable:
        raise ValueError("no scale-invariant weights: is there a normalization layer?")
    print(f"{'norm':>9}  sphere")
    for group in usable:
        norm = math.hypot(*(norms[name] for name in group))
        print(f"{norm:9.3g}  {' + '.join(group)}")
    rest = [name for name in norms if not any(name in group for group in usable)]
    print(f"{'':9}  off the spheres, by plain SGD: {', '.join(rest) or 'nothing'}")
    return usable


def _random_like(x):
    """A random batch like x: normal with its mean and deviation, or whole numbers of its range."""
    if not isinstance(x, Tensor) or x.dtype == torch.bool:
        return x
    if x.is_floating_point():
        x = x.double()
        return torch.randn_like(x) * (x.std() if x.std() > 0 else 1) + x.mean()
    return torch.randint_like(x, int(x.min()), int(x.max()) + 1)


def _indicators(null):
    """The vectors of zeros and ones in a space, given by its basis [dimension, n], that contain no
    other such vector.

    In the reduced echelon form each basis vector has a 1 at its own pivot and 0 at the others', so
    that a vector of zeros and ones is a sum of some of them. The search adds to one those that mend
    an entry that is not 0 or 1, or exchange some.
    """
    basis = null.clone()
    for i in range(len(basis)):  # Gauss and Jordan with complete pivoting
        at = int(basis[i:].abs().argmax())
        row, column = i + at // basis.shape[1], at % basis.shape[1]
        basis[[i, row]] = basis[[row, i]]
        basis[i] /= basis[i, column].clone()
        others = [k for k in range(len(basis)) if k != i]
        basis[others] -= basis[others, column, None] * basis[i]
    basis = torch.where((basis - basis.round()).abs() < 1e-4, basis.round(), basis)

    found, seen = set(), set()
    queue = deque(frozenset([start]) for start in range(len(basis)))  # sums of few come first
    while queue and len(seen) < 50_000:
        chosen = queue.popleft()
        if chosen in seen:
            continue
        seen.add(chosen)
        total = basis[list(chosen)].sum(0)
        wrong = ((total != 0) & (total != 1)).nonzero()[:, 0]
        if not len(wrong):
            found.add(frozenset(total.nonzero()[:, 0].tolist()))
            more = (basis[:, total == 1] < 0).any(1)  # which exchange some
        else:
            more = basis[:, wrong[0]] != 0
        if len(chosen) < 12:
            queue.extend(chosen | {k} for k in more.nonzero()[:, 0].tolist() if k not in chosen)
    return {s for s in found if not any(other < s for other in found)}
