"""Which tensors of a network share a sphere: what ours say, what is found in others; and what
measures their steps. Is the gradient right? That of a scale-invariant set of weights is orthogonal
to them, for every batch: a share along them is rounding, or a fault."""

import math
import sys

import torch
import torch.nn.functional as F

from lab import own
from lab.data import RandomNumbers, batches
from lab.invariance import MAX_EPS, scale_invariant_groups
from lab.machine import set_device
from lab.measure import logits_of, vectors
from sphere_step import watch

# What share of a gradient may point along the weights: by rounding, and by the eps of others'
# normalizations. docs/guide.md has the measurements.
ROUNDING = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
EPS_SHARE = 3e-3
ROW_SHARE = 0.03  # mean |radial| of single rows; of those that are not scale invariant 0.1 and more


def spheres_of(layer_groups, sphere):
    """The spheres: the `names` of their tensors; with `rows` each row of the one is a sphere."""
    names = [name for group in layer_groups for name in group]
    if sphere == "row":
        return [{"names": [name], "rows": True} for name in names]
    if sphere == "network":
        layer_groups = [names]
    return [{"names": names, "rows": False} for names in layer_groups]


def last_step(run):
    """What measure.Means takes of the last step: the sums and rules of the spheres, and of each
    meter γ and φ [2, 1 + tensors], if it has seen a step."""
    meters = [meter.last for meter in run.meters if meter.last is not None]
    return [*run.sphere_sgd.last, *meters]


def meters_of(optimizer, groups):
    """What measures the angles of its steps, for each param group of a sphere; for rows nothing."""
    return [watch(optimizer, group["params"]) for group in groups if group["sphere"] != "row"]


def layer_groups(config, data):
    """The network, a batch, and the names of the parameters in each layer group: what our networks
    say; what is found in others, and printed. For sphere "row" only tensors whose rows are scale
    invariant. Raises ValueError where there are none, or the network cannot be trained."""
    set_device(config.device, config.dtype)
    RandomNumbers(config.seed)
    net = own.build(config, data).to(data.x.device)
    own.rehearse(net, data, config)
    x = data.inputs(torch.arange(min(32, len(data.x)), device=data.x.device))
    ours = ":" not in config.model and hasattr(net, "layer_groups")
    if ours:
        groups = net.layer_groups
    else:
        with own.explained(f"{config.model} cannot be measured"):
            found = scale_invariant_groups(net, x, rows=config.sphere == "row")
        groups = _usable(net, found, config.sphere)
    with own.running(config.model):
        check_gradient(net, groups, data, config, ours)
    return net, x, groups


def _usable(net, found, sphere):
    """Those that are not zero, which have no direction; printed with their norms."""
    lines, usable = [f"{'norm':>9}  sphere"], []
    rest = [name for name, p in net.named_parameters() if p.requires_grad]
    for group in found:
        points = vectors(net, spheres_of([group], sphere))
        if all(x.any(dim=1).all() for x in points):
            usable.append(group)
            norm = math.hypot(*(x.norm() for x in points))
            lines.append(f"{norm:9.3g}  {' + '.join(group)}")
            rest = [name for name in rest if name not in group]
    if not usable:
        raise ValueError(_why_none(net, found, sphere))
    print(*lines, sep="\n")
    print(f"{'':9}  off the spheres, by plain SGD: {', '.join(rest) or 'nothing'}")
    return usable


def _why_none(net, found, sphere):
    if found:
        return f"of norm zero, without direction, is {', '.join(map(' + '.join, found))}"
    if sphere == "row":
        return "no scale-invariant rows, as before a BatchNorm: take --sphere layer"
    where = f"a normalization layer, of eps ≤ {MAX_EPS}, behind weights that are trained"
    first = {p: name for name, p in net.named_parameters()}
    for name, p in net.named_parameters(remove_duplicate=False):
        if name != first[p]:  # as of a head that is tied to the embedding
            where = f"a normalization behind both uses of {first[p]}, which is {name}, too"
    return f"no scale-invariant weights: is there {where}?"


def radial_shares(net, spheres, data, config):
    """Which share of the gradient points along the weights, over 8 batches, [spheres]:
    √(Σ⟨θ,g⟩²/Σ‖θ‖²‖g‖²).

    Where the set is scale invariant, ⟨θ,g⟩ = 0, whatever the data: the share is rounding, or the
    gradient is wrong. That of a set without effect is rounding itself, and so shares are of a tenth
    of the largest √Σ‖θ‖²‖g‖² at least."""
    along, size = 0, 0
    generator = torch.Generator().manual_seed(0)
    net.train()
    for index in batches(len(data.x), config.batch_size, generator, data.x.device)[:8]:
        net.zero_grad()
        logits = logits_of(net, data.inputs(index), config.dtype)
        F.cross_entropy(logits, data.y[index]).backward()
        points, gradients = vectors(net, spheres), vectors(net, spheres, gradient=True)
        pairs = list(zip(points, gradients, strict=True))
        along = along + torch.cat([(x * g).sum(1) for x, g in pairs]) ** 2
        size = size + torch.cat([x.norm(dim=1) * g.norm(dim=1) for x, g in pairs]) ** 2
    return (along / size.clamp(min=0.01 * size.max())).sqrt()


def check_gradient(net, groups, data, config, ours):
    """Is the gradient by each layer group orthogonal to it? Raises ValueError where in a network of
    ours it is not. Elsewhere, and by single rows, it need not be: a note on stderr."""
    bound = ROUNDING[config.dtype]
    if not ours:
        bound += EPS_SHARE
    share, worst = radial_shares(net, spheres_of(groups, "layer"), data, config).max(0)
    if share > bound:
        processor = torch.backends.cpu.get_cpu_capability()
        if data.x.is_cuda:
            processor = torch.cuda.get_device_name()
        message = (
            f"{share:.2g} of the gradient by {' + '.join(groups[worst])} points along the "
            "weights: is there a normalization behind it, and a right backward? Else torch "
            f"{torch.__version__} computes it wrong on this processor ({processor}): "
            "see python -m lab.bench check"
        )
        if ours:
            raise ValueError(message)
        print(f"note: {message}", file=sys.stderr)
    if config.sphere == "row":
        share = radial_shares(net, spheres_of(groups, "row"), data, config).mean()
        if share > ROW_SHARE:
            along = f"{share:.2g} of the rows' gradients points along them"
            print(f"note: {along}: rows are not scale invariant; layers may be", file=sys.stderr)
