"""Is the gradient right? That of a scale-invariant set of weights is orthogonal to them, for every
batch: a share along them is rounding, or a fault."""

import torch
import torch.nn.functional as F

from lab.data import batches
from lab.measure import logits_of, spheres_of, vectors

# What share of a gradient may point along the weights: by rounding, and by the eps of others'
# normalizations. docs/guide.md has the measurements.
ROUNDING = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
EPS_SHARE = 3e-3
ROW_SHARE = 0.03  # mean |radial| of single rows; of those that are not scale invariant 0.1 and more


def radial_shares(net, spheres, data, options):
    """Which share of the gradient points along the weights, over 8 batches, [spheres]:
    √(Σ⟨θ,g⟩²/Σ‖θ‖²‖g‖²).

    Where the set is scale invariant, ⟨θ,g⟩ = 0, whatever the data: the share is rounding, or the
    gradient is wrong. That of a set without effect is rounding itself, and so shares are of a tenth
    of the largest √Σ‖θ‖²‖g‖² at least."""
    along, size = 0, 0
    generator = torch.Generator().manual_seed(0)
    net.train()
    for index in batches(len(data.x), options.batch_size, generator, data.x.device)[:8]:
        net.zero_grad()
        logits = logits_of(net, data.inputs(index), options.dtype)
        F.cross_entropy(logits, data.y[index]).backward()
        points, gradients = vectors(net, spheres), vectors(net, spheres, gradient=True)
        pairs = list(zip(points, gradients, strict=True))
        along = along + torch.cat([(x * g).sum(1) for x, g in pairs]) ** 2
        size = size + torch.cat([x.norm(dim=1) * g.norm(dim=1) for x, g in pairs]) ** 2
    return (along / size.clamp(min=0.01 * size.max())).sqrt()


def check_gradient(net, layer_groups, data, options, ours):
    """Is the gradient by each layer group orthogonal to it? Raises ValueError where in a network of
    ours it is not. Elsewhere, and by single rows, it need not be: returns notes."""
    notes, bound = [], ROUNDING[options.dtype]
    if not ours:
        bound += EPS_SHARE
    share, worst = radial_shares(net, spheres_of(layer_groups, "layer"), data, options).max(0)
    if share > bound:
        processor = torch.backends.cpu.get_cpu_capability()
        if data.x.is_cuda:
            processor = torch.cuda.get_device_name()
        message = (
            f"{share:.2g} of the gradient by {' + '.join(layer_groups[worst])} points along the "
            "weights: is there a normalization behind it, and a right backward? Else torch "
            f"{torch.__version__} computes it wrong on this processor ({processor}): "
            "see python -m lab.bench check"
        )
        if ours:
            raise ValueError(message)
        notes.append(f"note: {message}")
    if options.sphere == "row":
        share = radial_shares(net, spheres_of(layer_groups, "row"), data, options).mean()
        if share > ROW_SHARE:
            along = f"{share:.2g} of the rows' gradients points along them"
            notes.append(f"note: {along}: rows are not scale invariant; layers may be")
    return notes
