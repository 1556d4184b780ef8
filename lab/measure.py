"""What is measured of a network: loss, error, chance, averaged weights, points on the spheres."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from lab.data import batches, chunks
from lab.own import told

POINTS = 512  # at which chance is measured
STEPPED = 64  # of these after a step
CHUNK = 512  # inputs at once outside of training
# What share of a gradient may point along the weights: by rounding, and by the eps of others'
# normalizations. docs/guide.md has the measurements.
ROUNDING = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
EPS_SHARE = 3e-3
ROWS = 0.03  # mean |radial| of single rows; of those that are not scale invariant 0.1 and more


def logits_of(net, x, dtype="fp32"):
    """The output for a batch, computed in --dtype, in float32."""
    with told("the network cannot be run"):
        if dtype == "bf16":
            with torch.autocast(x.device.type, torch.bfloat16):
                return net(x).float()
        return net(x)


OF_STEPS = "train_loss train_error elr grad_norm angle radial".split()
OF_LAYERS = "norm elr grad_norm angle".split()


def of_steps(kept, sphere, plain):
    """Sums over steps that each left (loss, wrong, *sphere.last): OF_STEPS [6], over spheres the
    norm of γ, else the mean; OF_LAYERS [tensors, 4]. Of a `plain` optimizer the implied ELR."""
    losses, wrong, *last = zip(*kept, strict=True)
    last = [torch.stack(x) for x in last]
    stats, layers = sphere.stats(last), sphere.layer_stats(last)
    if plain:
        pace = plain.param_groups[0]["lr"] / (1 - plain.param_groups[0]["momentum"])
        stats["elr"], layers["elr"] = pace / stats["radius"] ** 2, pace / layers["norm"] ** 2
        for found in (stats, layers):
            found["angle"] = (found["elr"] * found["grad_norm"]).atan()
    if sphere.defaults["angle"]:  # of the means: in some steps γ is next to 0
        stats["elr"] = stats["angle"].tan().mean() / stats["grad_norm"].mean() + 0 * stats["elr"]
    columns = [torch.stack(losses).double(), torch.stack(wrong).double().mean(1)]
    columns += [stats["elr"].mean(1), stats["grad_norm"].norm(dim=1)]
    columns += [stats["angle"].mean(1), stats["radial"].abs().mean(1)]
    of_layers = torch.stack([layers[name] for name in OF_LAYERS], -1)
    return torch.stack(columns).sum(1), of_layers.sum(0)


def radial_shares(kept, sphere, layer_groups):
    """By layer group, which share of its gradient points along the weights:
    |Σ⟨θ,g⟩|/√(Σ‖θ‖²Σ‖g‖²), the root mean square over steps. Where the set is scale invariant,
    Σ⟨θ,g⟩ = 0: the share is rounding, or the gradient is wrong. That of a set without effect is
    rounding itself: shares are of a tenth of the largest √(Σ‖θ‖²Σ‖g‖²) at least."""
    last = zip(*(last for _, _, *last in kept), strict=True)
    grams = sphere.grams([torch.stack(x) for x in last])
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


def check_gradient(run, radial, tell):
    """Raises ValueError where the gradient by a layer group of ours is not orthogonal to it. Those
    of other networks, and single rows, may not be scale invariant: a note."""
    options, where = run.options, torch.backends.cpu.get_cpu_capability()
    if options.device != "cpu":
        where = torch.cuda.get_device_name()
    shares = radial_shares(run.first_steps, run.sphere, options.layer_groups)
    name = max(shares, key=shares.get)
    what = f"{shares[name]:.2g} of the gradient by {name} points along the weights"
    wrong = f"torch {torch.__version__} computes it wrong on this processor ({where})"
    if ":" in options.model:
        if shares[name] > ROUNDING[options.dtype] + EPS_SHARE:
            tell("note", "sets", f"note: {what}: they are not scale invariant, or {wrong}")
    elif shares[name] > ROUNDING[options.dtype]:
        raise ValueError(f"{what}, and none may: {wrong}. See python -m lab.bench check")
    if options.sphere == "row" and radial > ROWS:
        what = f"{radial:.2g} of the rows' gradients points along them"
        tell("note", "rows", f"note: {what}: rows are not scale invariant; layers may be")


@torch.no_grad()
def on_test_set(net, data, dtype):
    """Mean loss and error on the test set, with BatchNorm's running statistics."""
    net.eval()
    parts = [logits_of(net, data.normalized(x), dtype) for x in data.test_x.split(CHUNK)]
    logits = torch.cat(parts)
    wrong = logits.argmax(1) != data.test_y
    loss = F.cross_entropy(logits, data.test_y)
    return {"test_loss": loss.item(), "test_error": wrong.double().mean().item()}


@torch.no_grad()
def on_train_set(net, data, dtype):
    """Mean loss on the training set, with BatchNorm's statistics computed anew over it."""
    order = chunks(len(data.x), CHUNK, data.x.device)
    with torch.autocast(data.x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        update_bn((data.inputs(index) for index in order), net)
    net.eval()
    total = 0.0
    for index in order:
        loss = F.cross_entropy(logits_of(net, data.inputs(index), dtype), data.y[index])
        total += loss.item() * len(index) / len(data.x)
    return total


@torch.no_grad()
def chance(net, sphere, data, options, seed):
    """Mean and deviation of loss and error on a batch, over random points of the spheres, to which
    the network is moved. `stepped`: the same after a step of 90° along the gradient of another
    batch. `constant`: of the best constant prediction."""
    net.train()
    generator, values, stepped = torch.Generator().manual_seed(seed), [], []
    tensors = [p for group in sphere.param_groups if group["sphere"] for p in group["params"]]

    def on_batch():
        index = batches(len(data.x), options.batch_size, generator, data.x.device)[0]
        logits, y = logits_of(net, data.inputs(index), options.dtype), data.y[index]
        wrong = (logits.argmax(1) != y).double().mean()
        return F.cross_entropy(logits, y), torch.stack([F.cross_entropy(logits, y).double(), wrong])

    def move(directions):
        for p, direction in zip(tensors, directions, strict=True):
            p.copy_(direction)
        sphere.normalize()

    def random_point():
        move([torch.randn(p.shape, generator=generator) for p in tensors])

    for _ in range(POINTS):
        random_point()
        values.append(on_batch()[1])
    for _ in range(min(POINTS, STEPPED)):
        random_point()
        with torch.enable_grad():
            gradients = torch.autograd.grad(on_batch()[0], tensors)
        if all(gradient.any() for gradient in gradients):
            move([-gradient for gradient in gradients])
            stepped.append(on_batch()[1])

    def summary(values):
        found = zip(("train_loss", "train_error"), torch.stack(values).unbind(1), strict=True)
        found = {name: {"mean": x.mean().item(), "std": x.std().item()} for name, x in found}
        return found | {"points": len(values)}

    share = data.y.bincount().double() / len(data.y)
    constant = {
        "train_loss": -share.xlogy(share).sum().item(),
        "train_error": 1 - share.max().item(),
    }
    found = summary(values) | {"constant": constant}
    if len(stepped) > 1:
        found["stepped"] = summary(stepped)
    return found


@torch.no_grad()
def on_average(averaged, net, spheres, data, dtype):
    """Train loss and test error of the mean of weights, put back on the spheres of `net`."""
    mean = deepcopy(averaged.module)
    for sphere, x, y in zip(spheres, vectors(mean, spheres), vectors(net, spheres), strict=True):
        put(mean, sphere, F.normalize(x) * y.norm(dim=1, keepdim=True))
    loss = on_train_set(mean, data, dtype)
    return {"avg_train_loss": loss, "avg_test_error": on_test_set(mean, data, dtype)["test_error"]}


def spheres_of(layer_groups, sphere):
    """The spheres: the `names` of their tensors; with `rows` each row of the one is a sphere."""
    names = [name for group in layer_groups for name in group]
    if sphere == "row":
        return [{"names": [name], "rows": True} for name in names]
    if sphere == "network":
        layer_groups = [names]
    return [{"names": names, "rows": False} for names in layer_groups]


def vectors(net, spheres):
    """The points on the spheres, float64: per entry of `spheres` a matrix, a row per sphere."""
    found = []
    for sphere in spheres:
        tensors = [net.get_parameter(name).detach().double() for name in sphere["names"]]
        if sphere["rows"]:
            found.append(tensors[0].reshape(len(tensors[0]), -1))
        else:
            found.append(torch.cat([x.reshape(-1) for x in tensors])[None])
    return found


@torch.no_grad()
def put(net, sphere, points):
    """The inverse of `vectors`, for one entry: write the points into the weights."""
    tensors = [net.get_parameter(name) for name in sphere["names"]]
    parts = points.reshape(-1).split([x.numel() for x in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def angles(some, others):
    """The angle between each sphere's two points, as `vectors` gives them, [spheres] in radians."""
    found = []
    for x, y in zip(some, others, strict=True):
        x, y = F.normalize(x), F.normalize(y)
        found.append(2 * torch.atan2((x - y).norm(dim=1), (x + y).norm(dim=1)))
    return torch.cat(found)
