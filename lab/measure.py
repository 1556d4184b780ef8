"""What is measured of a network: loss, error, chance, averaged weights, points on its spheres."""

import math
from copy import deepcopy
from operator import attrgetter  # ScriptModules have no get_parameter

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from lab.data import CHUNK, chunks

POINTS = 512  # for chance
KEPT = 256  # steps whose statistics are summed at once


def logits_of(net, x, dtype="fp32"):
    """The output for a batch, computed in --dtype, in float32."""
    if dtype == "bf16":
        with torch.autocast(x.device.type, torch.bfloat16):
            return net(x).float()
    return net(x)


class Means:
    """What an epoch's steps of a run were like on average; the host seldom waits for the device.
    Where run.plain_sgd makes them, sphere_sgd only measures, and run.meters the angles."""

    def __init__(self, run):
        self.sphere_sgd, self.plain_sgd, self.meters = run.sphere_sgd, run.plain_sgd, run.meters
        self.kept, self.steps = [], 0
        self.sums, self.layer_sums = {}, {}  # column → [], and → [tensors on spheres]

    def add(self, *step):
        """loss, wrong [batch], `sphere_sgd.last`, and what `meters` say."""
        self.kept.append(step)
        if len(self.kept) == KEPT:
            self._sum_up()

    def _sum_up(self):
        if not self.kept:
            return
        kept = map(torch.stack, zip(*self.kept, strict=True))
        losses, wrong, sums, rules, *metered = kept
        self.steps += len(self.kept)
        self.kept, last = [], (sums, rules)
        stats, layers = self.sphere_sgd.stats(last), self.sphere_sgd.layer_stats(last)
        if self.plain_sgd:
            group = self.plain_sgd.param_groups[0]
            lr = group["lr"] if isinstance(self.plain_sgd, torch.optim.SGD) else math.nan
            beta = group.get("momentum", 0)
            known = 1.0 if self.meters or not beta else math.nan
            for found, norm in ((stats, "radius"), (layers, "norm")):
                first_elr = lr / found[norm] ** 2
                found["elr"] = first_elr / (1 - beta)
                found["angle"] = known * (first_elr * found["grad_norm"]).atan()  # of a first step
        if metered:
            stats["angle"] = torch.stack([x[:, 1, 0] for x in metered], 1)
            layers["angle"] = torch.cat([x[:, 1, 1:] for x in metered], 1)
        if self.sphere_sgd.defaults["angle"]:  # of the means: in some steps γ is next to 0
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
        """Column → mean; over spheres the norm of γ."""
        self._sum_up()
        return {name: (x / self.steps).item() for name, x in self.sums.items()}

    def layers(self, spheres, epoch):
        """A row per tensor on these spheres: epoch, name, means."""
        self._sum_up()
        columns = {name: (x / self.steps).tolist() for name, x in self.layer_sums.items()}
        names, rows = [name for sphere in spheres for name in sphere["names"]], []
        for layer, *values in zip(names, *columns.values(), strict=True):
            rows.append({"epoch": epoch, "layer": layer} | dict(zip(columns, values, strict=True)))
        return rows


@torch.no_grad()
def evaluated(net, inputs, y, dtype):
    """Mean loss and error over batches of inputs, with BatchNorm's running statistics."""
    net.eval()
    logits = torch.cat([logits_of(net, x, dtype) for x in inputs])
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) != y).double().mean().item()


def on_test_set(net, data, dtype):
    """Mean loss and error on the test set."""
    inputs = map(data.normalized, data.test_x.split(CHUNK))
    loss, error = evaluated(net, inputs, data.test_y, dtype)
    return {"test_loss": loss, "test_error": error}


def on_train_set(net, data, dtype):
    """Mean loss on the training set, with BatchNorm's statistics computed anew over it."""
    order = chunks(len(data.x), data.x.device)
    with torch.autocast(data.x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        update_bn((data.inputs(index) for index in order), net)
    return evaluated(net, (data.inputs(index) for index in order), data.y, dtype)[0]


@torch.no_grad()
def on_average(averaged, net, spheres, data, dtype):
    """Train loss and test error of the mean of weights, put back on the spheres of `net`."""
    mean = deepcopy(averaged.module)
    to_norms_of(vectors(net, spheres), mean, spheres)
    loss = on_train_set(mean, data, dtype)
    return {"avg_train_loss": loss, "avg_test_error": on_test_set(mean, data, dtype)["test_error"]}


def tensors(net, sphere):
    """The tensors of an entry of groups.spheres_of."""
    return [attrgetter(name)(net) for name in sphere["names"]]


@torch.no_grad()
def vectors(net, spheres, gradient=False):
    """The points on the spheres, or the gradients there: per entry of `spheres` a matrix, a row per
    sphere, float64."""
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
    sizes = [x.numel() for x in parts]
    for x, point in zip(parts, points.reshape(-1).split(sizes), strict=True):
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


@torch.no_grad()
def chance(run, seed, loss_of):
    """Mean and deviation of loss and error on a batch, over random points of the run's spheres, to
    which its network is moved. stepped: the same after a step of 90° along the gradient of another
    batch. constant: of the best constant prediction. loss_of: of logits and y."""
    net, data, config = run.net.train(), run.data, run.config
    generator = torch.Generator().manual_seed(seed)
    values, stepped = [], []

    def on_batch():
        order = torch.randperm(len(data.x), generator=generator)
        index = order[: config.batch_size].to(config.device)
        logits, y = logits_of(net, data.inputs(index), config.dtype), data.y[index]
        return loss_of(logits, y), (logits.argmax(1) != y).double().mean()

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
    found = _summary(values) | {"constant": {"train_error": 1 - share.max().item()}}
    if len(stepped) > 1:
        found["stepped"] = _summary(stepped)
    return found


def _summary(values):
    """Of pairs of loss and error."""
    found = {"points": len(values)}
    for name, column in zip(("train_loss", "train_error"), zip(*values, strict=True), strict=True):
        std, mean = torch.std_mean(torch.stack(column).double())
        found[name] = {"mean": mean.item(), "std": std.item()}
    return found
