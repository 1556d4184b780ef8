"""Which tensors of a network share a sphere: what our networks say, what is found in others."""

import math
import sys

import torch

from lab import measure, own
from lab.invariance import MAX_EPS, scale_invariant_groups
from lab.machine import use


def layer_groups(options, data):
    """The network, a batch, and the names of the parameters in each layer group: what our networks
    say; what is found in others, and printed. For sphere "row" only tensors whose rows are scale
    invariant. Raises ValueError where there are none, or the network cannot be trained."""
    use(options.device, options.dtype)

    def make():
        torch.manual_seed(options.seed)
        return own.build(options, data).to(data.x.device)

    net = make()
    own.rehearse(net, data, options)
    x = data.inputs(torch.arange(min(32, len(data.x)), device=data.x.device))
    ours = ":" not in options.model and hasattr(net, "layer_groups")
    if ours:
        groups = net.layer_groups
    else:
        failure = f"{options.model} cannot be measured"
        if options.average:
            make = None
            failure += " on a copy, as --average takes"
        with own.explained(failure):
            found = scale_invariant_groups(net, x, make, options.sphere == "row")
        groups = _usable(net, found, options.sphere)
    with own.running(options.model):
        notes = measure.check_gradient(net, groups, data, options, ours)
    for note in notes:
        print(note, file=sys.stderr)
    return net, x, groups


def _usable(net, found, sphere):
    """Those that are not zero, which have no direction; printed with their norms."""
    lines, usable = [f"{'norm':>9}  sphere"], []
    rest = [name for name, p in net.named_parameters() if p.requires_grad]
    for group in found:
        points = measure.vectors(net, measure.spheres_of([group], sphere))
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
