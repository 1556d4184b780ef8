"""What is measured of a network: loss, error, chance, averaged weights, points on the spheres."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from lab.data import CHUNK, batches, chunks

POINTS = 512  # at which chance is measured
OF_STEPS = "elr train_loss train_error grad_norm angle radial".split()
OF_LAYERS = "norm elr grad_norm angle".split()
KEPT = 256  # steps whose statistics are kept as tensors before they are summed up


def logits_of(net, x, dtype="fp32"):
    """The output for a batch, computed in --dtype, in float32."""
    if dtype == "bf16":
        with torch.autocast(x.device.type, torch.bfloat16):
            return net(x).float()
    return net(x)


class Means:
    """What an epoch's steps were like on average. The statistics of many steps are computed at
    once, so that the host seldom waits for the device.

    sphere   a SphereSGD, whose `last` each step leaves
    plain    the optimizer that makes the steps, where `sphere` only measures
    """

    def __init__(self, sphere, plain=None):
        self.sphere, self.plain = sphere, plain
        self.kept, self.first, self.steps = [], None, 0
        self.sums, self.layer_sums = 0, 0

    def add(self, *step):
        """loss, wrong [batch], and what `sphere.last` was."""
        self.kept.append(step)
        if len(self.kept) == KEPT:
            self._sum_up()

    def _sum_up(self):
        if not self.kept:
            return
        losses, wrong, *last = (torch.stack(x) for x in zip(*self.kept, strict=True))
        if self.first is None:
            self.first = last
        self.steps += len(self.kept)
        self.kept = []
        stats, layers = self.sphere.stats(last), self.sphere.layer_stats(last)
        if self.plain:
            group = self.plain.param_groups[0]
            pace = group["lr"] / (1 - group.get("momentum", 0))
            stats["elr"], layers["elr"] = pace / stats["radius"] ** 2, pace / layers["norm"] ** 2
            for found in (stats, layers):
                found["angle"] = (found["elr"] * found["grad_norm"]).atan()
        if self.sphere.defaults["angle"]:  # of the means: in some steps γ is next to 0
            elr = stats["angle"].tan().mean() / stats["grad_norm"].mean()
            stats["elr"] = elr.expand_as(stats["elr"])
        columns = [stats["elr"].mean(1), losses.double(), wrong.double().mean(1)]
        columns += [stats["grad_norm"].norm(dim=1), stats["angle"].mean(1)]
        columns += [stats["radial"].abs().mean(1)]
        self.sums = self.sums + torch.stack(columns).sum(1)
        of_layers = torch.stack([layers[name] for name in OF_LAYERS], -1)
        self.layer_sums = self.layer_sums + of_layers.sum(0)

    def row(self):
        """Column → mean: over spheres the norm of γ, of the others the mean."""
        self._sum_up()
        return dict(zip(OF_STEPS, (self.sums / self.steps).tolist(), strict=True))

    def layers(self, names):
        """The same of each tensor on a sphere, a row per name."""
        self._sum_up()
        rows = []
        for name, values in zip(names, (self.layer_sums / self.steps).tolist(), strict=True):
            rows.append({"layer": name, **dict(zip(OF_LAYERS, values, strict=True))})
        return rows


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
def chance(run, seed):
    """Mean and deviation of loss and error on a batch, over random points of the run's spheres, to
    which its network is moved. stepped: the same after a step of 90° along the gradient of another
    batch. constant: of the best constant prediction."""
    run.net.train()
    data, size, values, stepped = run.data, run.config.batch_size, [], []
    generator = torch.Generator().manual_seed(seed)

    def on_batch():
        index = batches(len(data.x), size, generator, run.config.device)[0]
        logits, y = logits_of(run.net, data.inputs(index), run.config.dtype), data.y[index]
        wrong = (logits.argmax(1) != y).double().mean()
        loss = F.cross_entropy(logits, y)
        return loss, torch.stack([loss.detach().double(), wrong])

    def move(directions):
        for p, direction in zip(run.on_spheres, directions, strict=True):
            p.copy_(direction)
        run.sphere.normalize()

    def random_point():
        move([torch.randn(p.shape, generator=generator) for p in run.on_spheres])

    for _ in range(POINTS):
        random_point()
        values.append(on_batch()[1])
    for _ in range(POINTS // 8):
        random_point()
        run.net.zero_grad()
        with torch.enable_grad():
            on_batch()[0].backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.on_spheres]
        rows = [g.flatten(1) if run.config.sphere == "row" else g.reshape(1, -1) for g in gradients]
        if all(row.any(1).all() for row in rows):
            move([-gradient for gradient in gradients])
            stepped.append(on_batch()[1])

    share = F.one_hot(data.y, data.classes).double().mean(0)
    entropy = -share.xlogy(share).sum().item()
    found = summary(values)
    found["constant"] = {"train_loss": entropy, "train_error": 1 - share.max().item()}
    if len(stepped) > 1:
        found["stepped"] = summary(stepped)
    return found


def summary(values):
    """Of a list of [2] tensors, loss and error."""
    loss, error = torch.stack(values).unbind(1)
    found = {"train_loss": loss, "train_error": error}
    found = {name: {"mean": x.mean().item(), "std": x.std().item()} for name, x in found.items()}
    return found | {"points": len(values)}


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
