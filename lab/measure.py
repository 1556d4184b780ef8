"""What is measured of a network: loss, error, chance, averaged weights, points on its spheres; and
whether its gradient is right."""

from copy import deepcopy
from operator import attrgetter  # ScriptModules have no get_parameter

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from lab.data import CHUNK, batches, chunks

POINTS = 512  # at which chance is measured
KEPT = 256  # steps whose statistics are kept as tensors before they are summed up

# What share of a gradient may point along the weights: by rounding, and by the eps of others'
# normalizations. docs/guide.md has the measurements.
ROUNDING = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
EPS_SHARE = 3e-3
ROW_SHARE = 0.03  # mean |radial| of single rows; of those that are not scale invariant 0.1 and more


def logits_of(net, x, dtype="fp32"):
    """The output for a batch, computed in --dtype, in float32."""
    if dtype == "bf16":
        with torch.autocast(x.device.type, torch.bfloat16):
            return net(x).float()
    return net(x)


def loss_and_error(logits, y):
    """Of a batch; the error is the share of wrong predictions, float64."""
    return F.cross_entropy(logits, y), (logits.argmax(1) != y).double().mean()


class Means:
    """What an epoch's steps were like on average. The statistics of many steps are computed at
    once, so that the host seldom waits for the device.

    sphere     a SphereSGD, whose `last` each step leaves
    ordinary   the optimizer that makes the steps, where `sphere` only measures
    """

    def __init__(self, sphere, ordinary=None):
        self.sphere, self.ordinary = sphere, ordinary
        self.kept, self.steps = [], 0
        self.sums, self.layer_sums = {}, {}  # column → [], and → [tensors on spheres]

    def add(self, *step):
        """loss, wrong [batch], and what `sphere.last` was."""
        self.kept.append(step)
        if len(self.kept) == KEPT:
            self._sum_up()

    def _sum_up(self):
        if not self.kept:
            return
        losses, wrong, *last = (torch.stack(x) for x in zip(*self.kept, strict=True))
        self.steps += len(self.kept)
        self.kept = []
        stats, layers = self.sphere.stats(last), self.sphere.layer_stats(last)
        if self.ordinary:
            group = self.ordinary.param_groups[0]
            lr = group["lr"] / (1 - group.get("momentum", 0))
            for found, norm in ((stats, "radius"), (layers, "norm")):
                found["elr"] = lr / found[norm] ** 2
                found["angle"] = (found["elr"] * found["grad_norm"]).atan()
        if self.sphere.defaults["angle"]:  # of the means: in some steps γ is next to 0
            elr = stats["angle"].tan().mean() / stats["grad_norm"].mean()
            stats["elr"] = elr.expand_as(stats["elr"])
        columns = {
            "elr": stats["elr"].mean(1),
            "train_loss": losses.double(),
            "train_error": wrong.double().mean(1),
            "grad_norm": stats["grad_norm"].norm(dim=1),
            "angle": stats["angle"].mean(1),
            "radial": stats["radial"].abs().mean(1),
        }
        for sums, found in ((self.sums, columns), (self.layer_sums, layers)):
            for name, values in found.items():
                sums[name] = sums.get(name, 0) + values.sum(0)

    def row(self):
        """Column → mean: over spheres the norm of γ, of the others the mean."""
        self._sum_up()
        return {name: (x / self.steps).item() for name, x in self.sums.items()}

    def layers(self, spheres, epoch):
        """The same of each tensor on these spheres: a row with its name and this epoch."""
        self._sum_up()
        columns = {name: (x / self.steps).tolist() for name, x in self.layer_sums.items()}
        rows = []
        for i, layer in enumerate(name for sphere in spheres for name in sphere["names"]):
            of_layer = {name: values[i] for name, values in columns.items()}
            rows.append({"epoch": epoch, "layer": layer, **of_layer})
        return rows


@torch.no_grad()
def on_test_set(net, data, dtype):
    """Mean loss and error on the test set, with BatchNorm's running statistics."""
    net.eval()
    parts = [logits_of(net, data.normalized(x), dtype) for x in data.test_x.split(CHUNK)]
    loss, error = loss_and_error(torch.cat(parts), data.test_y)
    return {"test_loss": loss.item(), "test_error": error.item()}


@torch.no_grad()
def on_train_set(net, data, dtype):
    """Mean loss on the training set, with BatchNorm's statistics computed anew over it."""
    order = chunks(len(data.x), data.x.device)
    with torch.autocast(data.x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        update_bn((data.inputs(index) for index in order), net)
    net.eval()
    total = 0.0
    for index in order:
        loss = F.cross_entropy(logits_of(net, data.inputs(index), dtype), data.y[index])
        total += loss.item() * len(index) / len(data.x)
    return total


@torch.no_grad()
def on_average(averaged, net, spheres, data, dtype):
    """Train loss and test error of the mean of weights, put back on the spheres of `net`."""
    mean = deepcopy(averaged.module)
    to_norms_of(vectors(net, spheres), mean, spheres)
    loss = on_train_set(mean, data, dtype)
    return {"avg_train_loss": loss, "avg_test_error": on_test_set(mean, data, dtype)["test_error"]}


# ------------------------------------------------------------------------- points on the spheres


def spheres_of(layer_groups, sphere):
    """The spheres: the `names` of their tensors; with `rows` each row of the one is a sphere."""
    names = [name for group in layer_groups for name in group]
    if sphere == "row":
        return [{"names": [name], "rows": True} for name in names]
    if sphere == "network":
        layer_groups = [names]
    return [{"names": names, "rows": False} for names in layer_groups]


def tensors(net, sphere):
    """The tensors of an entry of `spheres_of`."""
    return [attrgetter(name)(net) for name in sphere["names"]]


@torch.no_grad()
def vectors(net, spheres, gradient=False):
    """The points on the spheres, float64: per entry of `spheres` a matrix, a row per sphere. Or the
    gradients there."""
    found = []
    for sphere in spheres:
        parts = tensors(net, sphere)
        if gradient:
            parts = [torch.zeros_like(x) if x.grad is None else x.grad for x in parts]
        rows = len(parts[0]) if sphere["rows"] else 1
        found.append(torch.cat([x.double().reshape(rows, -1) for x in parts], 1))
    return found


@torch.no_grad()
def move_to(net, sphere, points):
    """The inverse of `vectors`, for one entry: write the points into the weights."""
    parts = tensors(net, sphere)
    for x, point in zip(parts, points.reshape(-1).split([x.numel() for x in parts]), strict=True):
        x.copy_(point.view_as(x))


def to_norms_of(points, net, spheres):
    """Scale the weights on each sphere to the norm that the point there has."""
    for sphere, x, y in zip(spheres, vectors(net, spheres), points, strict=True):
        move_to(net, sphere, F.normalize(x) * y.norm(dim=1, keepdim=True))


def angles(some, others):
    """The angle between each sphere's two points, as `vectors` gives them, [spheres] in radians."""
    found = []
    for x, y in zip(some, others, strict=True):
        x, y = F.normalize(x), F.normalize(y)
        found.append(2 * torch.atan2((x - y).norm(dim=1), (x + y).norm(dim=1)))
    return torch.cat(found)


# ---------------------------------------------------------------------------------------- chance


@torch.no_grad()
def chance(run, seed):
    """Mean and deviation of loss and error on a batch, over random points of the run's spheres, to
    which its network is moved. stepped: the same after a step of 90° along the gradient of another
    batch. constant: of the best constant prediction."""
    net, data, config = run.net.train(), run.data, run.config
    generator = torch.Generator().manual_seed(seed)
    values, stepped = [], []

    def on_batch():
        order = torch.randperm(len(data.x), generator=generator)
        index = order[: config.batch_size].to(config.device)
        return loss_and_error(logits_of(net, data.inputs(index), config.dtype), data.y[index])

    def move_along(directions):
        for p, direction in zip(run.sphere_weights, directions, strict=True):
            p.copy_(direction)
        to_norms_of(run.start, net, run.spheres)

    for i in range(POINTS + POINTS // 8):
        move_along([torch.randn(p.shape, generator=generator) for p in run.sphere_weights])
        if i < POINTS:
            values.append(on_batch())
            continue
        net.zero_grad()
        with torch.enable_grad():
            on_batch()[0].backward()
        gradients = [p.grad for p in run.sphere_weights if p.grad is not None and p.grad.any()]
        if len(gradients) == len(run.sphere_weights):
            move_along(-gradient for gradient in gradients)
            stepped.append(on_batch())

    share = F.one_hot(data.y, data.classes).double().mean(0)
    constant = {"train_loss": -share.xlogy(share).sum().item()}
    constant["train_error"] = 1 - share.max().item()
    found = _summary(values) | {"constant": constant}
    if len(stepped) > 1:
        found["stepped"] = _summary(stepped)
    return found


def _summary(values):
    """Of pairs of loss and error."""
    found = {"points": len(values)}
    for i, name in enumerate(("train_loss", "train_error")):
        std, mean = torch.std_mean(torch.stack([value[i] for value in values]).double())
        found[name] = {"mean": mean.item(), "std": std.item()}
    return found


# ------------------------------------------------------------------------- is the gradient right?


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
