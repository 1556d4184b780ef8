"""Is the gradient right? That of scale-invariant weights is orthogonal to them, whatever the data:
what points along them is rounding, or wrong, or the weights are not scale invariant."""

from copy import deepcopy

import torch
import torch.nn.functional as F

from lab.measure import logits_of

# What share of a gradient may point along the weights: by rounding, and by the eps of others'
# normalizations. docs/guide.md has the measurements.
ROUNDING = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
EPS_SHARE = 3e-3
ROW_SHARE = 0.03  # mean |radial| of single rows; of those that are not scale invariant 0.1 and more


def radial_shares(last, sphere, layer_groups):
    """By layer group, which share of its gradient points along the weights:
    |Σ⟨θ,g⟩|/√(Σ‖θ‖²Σ‖g‖²), the root mean square over steps, of which `last` are the sums. Where the
    set is scale invariant, Σ⟨θ,g⟩ = 0: the share is rounding, or the gradient is wrong. That of a
    set without effect is rounding itself: shares are of a tenth of the largest √(Σ‖θ‖²Σ‖g‖²) at
    least."""
    grams = sphere.grams(last)
    lines = [1 for group in layer_groups for _ in group]
    if sphere.param_groups[0]["sphere"] == "row":  # each tensor has a group, each row a matrix
        lines = [len(group["params"][0]) for group in sphere.param_groups if group["sphere"]]
    lines, sums = iter(lines), []
    for part in grams.split([sum(next(lines) for _ in group) for group in layer_groups], dim=1):
        sums.append(part.sum(1))
    tt, tg, gg = torch.stack(sums)[..., :3].unbind(-1)
    along, size = tg.norm(dim=1), (tt * gg).sum(1).sqrt()
    shares = (along / size.clamp(min=0.1 * size.max())).tolist()
    return {" + ".join(group): x for group, x in zip(layer_groups, shares, strict=True)}


def check_gradient(run, means, tell):
    """Before training: is the gradient by each layer group orthogonal to it? Raises ValueError
    where in a network of ours it is not. In other networks, of single rows, and where the loss or
    the gradient was changed on purpose, it need not be: a note."""
    config = run.config
    shares = radial_shares(means.first, run.sphere, run.layer_groups)
    names = max(run.layer_groups, key=lambda group: shares[" + ".join(group)])
    name = " + ".join(names)
    what = f"{shares[name]:.2g} of the gradient by {name} points along the weights"
    where = torch.backends.cpu.get_cpu_capability()
    if config.device != "cpu":
        where = torch.cuda.get_device_name()
    wrong = f"torch {torch.__version__} computes it wrong on this processor ({where})"
    bound = ROUNDING[config.dtype]
    if not hasattr(run.net, "layer_groups"):  # they were found by measuring
        if shares[name] > bound + EPS_SHARE:
            tell("note", "sets", f"note: {what}: they are not scale invariant, or {wrong}")
    elif shares[name] > bound:
        change, share = of_the_cross_entropy(run, names)
        if change > 0.01:
            cause = (
                f"twice the weights changes the logits by {change:.0%}: is there a normalization"
            )
            raise ValueError(f"models.py: {name} is in layer_groups, but {cause} behind it?")
        if share > bound:
            cause = "a backward of its own in the network is wrong, or " + wrong
            raise ValueError(f"{what}: {cause}. See python -m lab.bench check")
        cause = "train_step changes the loss or the gradient; the step leaves that part out"
        tell("note", "sets", f"note: {what}: {cause}")
    radial = means.row()["radial"]
    if config.sphere == "row" and radial > ROW_SHARE:
        what = f"{radial:.2g} of the rows' gradients points along them"
        tell("note", "rows", f"note: {what}: rows are not scale invariant; layers may be")


def of_the_cross_entropy(run, names):
    """By how much, relative, the logits change with twice these weights; which share of the
    gradient of the plain cross-entropy points along them."""
    net, dtype = deepcopy(run.net).train(), run.config.dtype
    params = [net.get_parameter(name) for name in names]
    x = run.data.inputs(torch.arange(run.config.batch_size, device=run.config.device))
    before = logits_of(net, x, dtype)
    F.cross_entropy(before, run.data.y[: len(x)]).backward()
    along = sum((p.detach() * p.grad).sum() for p in params)
    size = sum(p.detach().square().sum() for p in params)
    size = (size * sum(p.grad.square().sum() for p in params)).sqrt()
    with torch.no_grad():
        for p in params:
            p.mul_(2)
        change = (logits_of(net, x, dtype) - before).norm() / before.norm()
    return change.item(), (along.abs() / size).item()
