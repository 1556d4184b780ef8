"""The step written a second time, in numpy and float64, and random sequences of what one does to an
optimizer, held against it. Mends Triton's interpreter, too."""

import io
import math
import pickle
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import sphere_step
from sphere_step import INTERPRET, SphereSGD

if INTERPRET:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    @sphere_step.jit
    def sum_pairs(a, da, b, db, c, dc):  # without tl.reduce, which takes a millisecond per element
        pairs = ((a, da), (b, db), (c, dc))
        return tuple(tl.sum(x.to(tl.float64) + dx.to(tl.float64), 1) for x, dx in pairs)

    sphere_step._sum_pairs = sum_pairs

    def create_fma(self, x, y, z):  # rounded once
        exact = x.data.astype("float64") * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def call(self, *args, **kwargs):  # without patching the language anew, half of the time
        ours = self.fn.__module__ in (sphere_step.__name__, __name__)
        return self.rewrite()(*args, **kwargs) if ours else original_call(self, *args, **kwargs)

    InterpreterBuilder.create_fma = create_fma
    original_call = InterpretedFunction.__call__
    if hasattr(InterpretedFunction, "rewrite"):
        InterpretedFunction.__call__ = call


# --- the reference


def length(v):
    return np.linalg.norm(v, axis=-1, keepdims=True)


def tangent(x, v):
    """What of v is across x; once more, as it may be a small part."""
    n = x / np.where(length(x) == 0, 1, length(x))
    for _ in range(2):
        v = v - n * (n * v).sum(-1, keepdims=True)
    return v


def turn(x, y):
    """The angle between x and y, exact where it is small."""
    a, b = x / length(x), y / length(y)
    return 2 * np.arctan2(length(a - b), length(a + b))


@np.errstate(all="ignore")
def reference_step(x, g, m, radius, lr, beta=0.0, angle=False):
    """One step on spheres by explicit projections. Returns new θ, new m and the statistics.

    x, g, m: [spheres, elements] float64; radius: [spheres, 1], 0 for the norm of x; lr: η̃ or φ
    """
    norm, whole = length(x), length(g) + beta * length(m)
    rho = np.where(radius > 0, radius, norm)
    new = beta * tangent(x, m) + tangent(x, g)
    size = length(new)
    size = np.where(size > 1e-7 * whole, size, 0 * whole)  # a smaller part is rounding
    elr = lr + 0 * norm
    tan = lr * rho**2 * size / norm
    if angle:
        elr = np.where(size > 0, math.tan(lr) * norm / (size * rho**2), 0)
        tan = np.where(size > 0, math.tan(lr), 0)
    direction = new / np.where(size > 0, size, 1)
    from_zero = (norm == 0) & (radius > 0) & (length(g) > 0)
    moved = rho * (x / norm - tan * direction) / np.sqrt(1 + tan**2)
    moved = np.where(from_zero & (lr > 0), -rho * direction, np.where(tan == 0, x, moved))
    good = np.isfinite(norm + whole) & ((norm > 0) | from_zero)
    stats = dict(
        radius=rho,
        elr=elr,
        grad_norm=rho * length(tangent(x, g)),
        angle=np.arctan(tan),
        radial=(x * g).sum(-1, keepdims=True) / np.maximum(norm * length(g), 1e-300),
        whole=whole,  # of which m is what is left
        # The same of the step; 0: bit for bit
        reach=np.where(from_zero & (lr > 0), 1, np.where(size > 0, tan * whole / size, 0)),
        doubt=np.where(size > 0, 1e-15 * (whole / size) ** 2, 0),  # of ‖m‖ by the Gram matrix
    )
    stats = {name: np.where(good, value, np.nan) for name, value in stats.items()}
    return np.where(good, moved, x), np.where(good, new, m), stats


def step_of(x, g, lr, radius=0.0, angle=False):
    """Of one sphere without momentum, of any shape: new θ in float64, and its statistics."""
    vectors = [t.detach().double().cpu().numpy().reshape(1, -1) for t in (x, g)]
    new, _, stats = reference_step(*vectors, 0 * vectors[0], radius, lr, 0.0, angle)
    return torch.from_numpy(new).view(x.shape), {name: v.item() for name, v in stats.items()}


# --- random sequences

SPHERES = "group", "tensor", "row", None
SHAPES = [
    (),
    (1,),
    (2,),
    (0, 3),
    (4, 0),
    (3, 4),
    (3, 4),
    (7, 2, 3),
    (4, 3, 3, 2),
    (70, 5),
    (2, 600),
]
LARGE = [(2**18 + 7,), (2, 2**18 + 3), (300, 1000)]  # in several pieces
EVENTS = "load copy add set_momentum observe lay_out retype normalize nothing".split()


def saved(things):
    buffer = io.BytesIO()
    torch.save(things, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(things):
    return pickle.loads(pickle.dumps(things))


def laid_out(x, how):
    """The same numbers, elsewhere in memory."""
    if how == "channels last" and x.dim() == 4:
        return x.clone(memory_format=torch.channels_last)
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if how == "unaligned":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return x.clone(memory_format=torch.contiguous_format)


def lines_of(group, x):
    """A tensor as [lines, elements] float64: its rows where they are spheres, else one line."""
    rows = len(x) if group["sphere"] == "row" and x.dim() else 1
    x = x.detach().double().cpu().reshape(rows, x.numel() // max(rows, 1))
    return x.numpy().copy()


def norms_of(group):
    """Of each tensor the norms of its spheres, [lines, 1]."""
    lines = [lines_of(group, p) for p in group["params"]]
    if group["sphere"] == "group" and lines:
        return [length(np.concatenate(lines, 1))] * len(lines)
    return [length(x) for x in lines]


class Sequence:
    """An optimizer, and what its groups should be: dicts of params, options and `radii`, [lines, 1]
    of each tensor. `spheres`: of the first groups."""

    def __init__(self, seed, backend, dtypes, device="cpu", shapes=SHAPES, spheres=None):
        print(f"SEED={seed}")  # pytest shows it on failure
        self.draw, self.device, self.shapes = random.Random(seed), device, shapes
        torch.manual_seed(seed)
        self.range = self.draw.choice(["half precision", "any weights", "any gradients"])
        self.dtypes = [x for x in dtypes if x != torch.float16 or self.range == "half precision"]
        self.dtype, self.scale, self.scales = self.draw.choice(self.dtypes), 1.0, [1.0]
        if self.range == "any weights":
            self.scale = self.draw.choice([1.0, 1e-10, 1e10])
        if self.range == "any gradients":
            self.scales = [1.0, 1.0, 1.0, 1e-33, 1e-22, 1e15]
        self.groups, self.optimizer, self.backend = [], None, backend
        for sphere in spheres or [self.draw.choice(SPHERES)]:
            self.add(sphere)

    def pick(self, probability):
        return self.draw.random() < probability

    def run(self, steps):
        for _ in range(steps):
            event = self.draw.choice(EVENTS)
            print(event)
            getattr(self, event)()
            self.give_gradients()
            self.step()

    # --- events

    def add(self, *sphere):
        """One more group; or the optimizer, with its first."""
        (sphere,) = sphere or [self.draw.choice(SPHERES)]
        params = []
        for _ in range(self.draw.randint(0 if self.groups else 1, 4)):
            scale = self.scale * 10 ** self.draw.uniform(-1, 1)
            x = scale * torch.randn(self.draw.choice(self.shapes))
            x = laid_out(x.to(self.device, self.dtype), self.draw_layout(sphere))
            params.append(Parameter(x))
        group = dict(params=params, sphere=sphere, radius=None, lr=1.0)
        if sphere and self.range != "half precision" and self.pick(0.3):
            group["radius"] = 2.5
            for p in params[self.draw.randint(0, 4) :]:
                p.data.zero_()
        may_turn = sphere or self.range == "any weights" and self.on_spheres()
        group["angle"] = bool(may_turn and params) and self.pick(0.4)
        group["momentum"] = self.draw.choice([0.0, 0.9])
        group["weight_decay"] = 0.0 if group["angle"] else self.draw.choice([0.0, 0.1])
        before, norms = [lines_of(group, p) for p in params], norms_of(group)
        if self.groups:
            self.optimizer.add_param_group(dict(group))
        else:
            self.optimizer = SphereSGD([dict(group)], lr=1.0, backend=self.backend)
        group["radii"] = norms
        if group["radius"]:
            group["radii"] = [np.full_like(norm, 2.5) for norm in norms]
        self.groups.append(group)
        self.check_scaling(group, before, norms)

    def load(self):
        """Another optimizer, made for other weights, with the state of this one."""
        weights = [[p.detach().clone() for p in group["params"]] for group in self.groups]
        self.groups, given = deepcopy(self.groups), []
        for group in self.groups:
            for p in group["params"]:
                p.data.mul_(2)
            given.append({name: group[name] for name in ("params", "sphere", "radius")})
            given[-1]["lr"] = torch.tensor(1.0, dtype=torch.float64)
        other = SphereSGD(given, lr=1.0, backend=self.backend)
        other.load_state_dict(saved(self.optimizer.state_dict()))
        self.optimizer = other
        for group, own, x in zip(self.groups, other.param_groups, weights, strict=True):
            assert isinstance(own["lr"], torch.Tensor) and own["lr"].item() == group["lr"]
            for p, old in zip(group["params"], x, strict=True):
                p.data.copy_(old)

    def copy(self):
        way = self.draw.choice([deepcopy, pickled, saved])
        self.groups, self.optimizer = way((self.groups, self.optimizer))
        assert self.optimizer.backend == self.backend
        with pytest.raises(RuntimeError, match="no statistics before the first step"):
            self.optimizer.stats()

    def set_momentum(self):
        for group, own in zip(self.groups, self.optimizer.param_groups, strict=True):
            group["momentum"] = own["momentum"] = self.draw.choice([0.0, 0.5, 0.9])

    def observe(self):
        """At other norms: as a step there, but nothing moves."""
        weights = [(p, p.detach().clone()) for group in self.groups for p in group["params"]]
        self.rescale()
        self.give_gradients()
        self.step(move=False)
        for p, x in weights:
            p.data.copy_(x)

    def normalize(self):
        self.rescale()
        lines = [[lines_of(group, p) for p in group["params"]] for group in self.groups]
        norms = [norms_of(group) for group in self.groups]
        self.optimizer.normalize()
        for before in zip(self.groups, lines, norms, strict=True):
            self.check_scaling(*before)

    def rescale(self):
        for p in self.params():
            p.data.mul_(self.draw.choice([1.0, 0.5, 2.0]))

    def lay_out(self):
        for group in self.groups:
            for p in group["params"]:
                p.data = laid_out(p.data, self.draw_layout(group["sphere"]))

    def draw_layout(self, sphere):
        ways = ["contiguous", "contiguous", "channels last", "unaligned", "transposed"]
        return self.draw.choice(ways[: 4 if sphere == "row" else 5])

    def retype(self):
        self.dtype = self.draw.choice(self.dtypes)
        for p in self.params():
            p.data, p.grad = p.data.to(self.dtype), None

    def nothing(self):
        pass

    def params(self):
        return [p for group in self.groups for p in group["params"]]

    def on_spheres(self):
        return [group for group in self.groups if group["sphere"] and group["params"]]

    def give_gradients(self):
        """New ones, some missing, zero, radial or not finite, and perhaps another lr."""
        for group, own in zip(self.groups, self.optimizer.param_groups, strict=True):
            square, scale = 0.0, self.draw.choice(self.scales)
            for p in group["params"]:
                g = torch.randn(p.shape).to(p.device, p.dtype)
                if self.pick(0.2):  # mostly radial
                    g += 10 ** self.draw.uniform(-1, 2) / self.scale * p.detach()
                g = scale * g
                if self.pick(0.1) and group["sphere"]:
                    g = self.draw.choice([0.0, 2.0]) * p.detach()
                square += g.double().square().sum().item()
                if self.pick(0.05) and group["sphere"] and g.numel():
                    g[tuple(-1 for _ in g.shape)] = self.draw.choice([math.nan, math.inf])
                g = laid_out(g, self.draw_layout(None))
                if self.pick(0.1):
                    p.grad = None
                elif self.pick(0.05) and g.numel() < 10_000:  # float32 sums of more are inaccurate
                    p.grad = g.mean().expand(g.shape)
                elif self.pick(0.3) and p.grad is not None and 0 not in p.grad.stride():
                    p.grad.copy_(g)  # where the last one was
                else:
                    p.grad = g
            if group["lr"] != 1.0 and self.pick(0.3):
                continue  # as it was
            lr = 10 ** self.draw.uniform(-3, 0)
            if group["sphere"] and not group["angle"]:  # steps of about lr in radians, or extreme
                norm = sum(float(x.max(initial=0)) for x in norms_of(group))
                lr *= 10 ** self.draw.choice([0, 0, 0, 0, -20, 10]) / max(norm * square**0.5, 1e-30)
            elif not group["angle"]:
                lr /= max(scale, 1.0)
            group["lr"] = 0.0 if self.pick(0.05) else lr
            lr = torch.tensor(group["lr"], dtype=torch.float64)
            own["lr"] = self.draw.choice([group["lr"], lr, lr[None]])

    # --- against the reference

    def step(self, move=True):
        """Steps, or observes, and holds weights, buffers and statistics against the reference."""
        before = []
        for group in self.groups:
            vectors = []  # θ, g, m of each tensor; g is nan where there is none
            for p in group["params"]:
                g, m = p.grad, self.optimizer.state[p].get("momentum_buffer")
                g = torch.full_like(p, math.nan) if g is None else g
                m = torch.zeros_like(p) if m is None else m.to(p.dtype)
                vectors.append([lines_of(group, x) for x in (p, g, m)])
            before.append((group, vectors))
        (self.optimizer.step if move else self.optimizer.observe)()
        self.spheres, self.tensors = [], []
        before.sort(key=lambda pair: pair[0]["sphere"] is None)  # they need the statistics
        for group, vectors in before:
            stepped = self.stepped if group["sphere"] else self.stepped_by_sgd
            expected = stepped(group, vectors, move)
            for p, old, new in zip(group["params"], vectors, expected, strict=True):
                self.check_move(group, p, old, *new, move)
                if group["sphere"]:
                    self.tensors.append((group, p, old, *new))
        if self.tensors:
            self.check_statistics()

    def stepped(self, group, vectors, move):
        """Of each tensor new θ, new m, and the statistics of its lines."""
        how = group["lr"], group["momentum"], group["angle"]
        if group["sphere"] != "group":
            found = []
            for own, radius in zip(vectors, group["radii"], strict=True):
                found.append(reference_step(*own, radius * move, *how))
                self.spheres.append((length(own[0]), found[-1][-1]))
            return found
        if not vectors:
            return []
        here = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        whole = move and len(here) == len(vectors)
        chosen = zip(*(vectors[i] for i in here or [0]), strict=True)
        joint = [np.concatenate(own, 1) for own in chosen]
        new, m, stats = reference_step(*joint, group["radii"][0] * whole, *how)
        self.spheres.append((length(joint[0]), stats))
        without = {name: value * math.nan for name, value in stats.items()}
        found = [(x, m, without) for x, _, m in vectors]
        ends = np.cumsum([vectors[i][0].size for i in here])[:-1]
        for i, own, own_m in zip(here, np.split(new, ends, 1), np.split(m, ends, 1), strict=False):
            found[i] = own, own_m, stats
        return found

    @np.errstate(all="ignore")
    def stepped_by_sgd(self, group, vectors, move):
        lr, beta, decay = group["lr"], group["momentum"], group["weight_decay"]
        if group["angle"]:  # the median of the spheres that move
            stats = self.optimizer.stats()
            paces = stats["elr"] * stats["radius"] ** 2
            paces = sorted(paces[paces > 0].tolist())
            lr = paces[(len(paces) - 1) // 2] if paces else 0.0
        found = []
        for x, g, m in vectors:
            whole = length(g) + beta * length(m) + decay * length(x)
            new = beta * m + g + decay * x
            reach = lr * whole / np.maximum(length(x), 1e-300)
            there = ~np.isnan(g)
            moved, kept = np.where(there, x - lr * new, x), np.where(there, new, m)
            found.append((moved, kept, dict(whole=whole, reach=reach, doubt=0.0)))
        return found

    def check_scaling(self, group, before, norms):
        """The weights were scaled from these norms to the radii."""
        for p, x, norm, radius in zip(group["params"], before, norms, group["radii"], strict=True):
            if group["sphere"]:
                x = x * np.where(norm > 0, radius / np.where(norm > 0, norm, 1), 1)
            error = np.abs(lines_of(group, p) - x)
            assert (error <= 2 * torch.finfo(p.dtype).eps * np.abs(x) + 1e-7).all()

    def check_move(self, group, p, before, new, new_m, stats, move):
        x, _, m = before
        root = max(x.shape[1], 1) ** 0.5
        spread = np.abs(x) + length(x) / root
        size = np.abs(new - x) + (1 + stats["reach"]) * spread
        doubt = stats["doubt"] * (np.abs(new) + spread)
        moves = stats["reach"] > 0 if move else np.zeros((1, 1), bool)
        self.check_rounded(group, p, new, size, doubt, moves, x)
        buffer = self.optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).to(p.dtype)
        changes = np.isfinite(stats["whole"]) & (move and group["momentum"] > 0)
        size = stats["whole"] * (3 / root + spread / np.maximum(length(x), 1e-300))
        self.check_rounded(group, buffer, new_m, size, 0.0, changes, m)

    def check_rounded(self, group, tensor, expected, size, doubt, changes, before):
        """Rounded once to 16 bits; where nothing changes, the same bits."""
        info, found = torch.finfo(tensor.dtype), lines_of(group, tensor)
        single = 2e-6 if self.scales == [1.0] else 3e-4  # squares near the end of float32
        tolerance = {64: 1e-11, 32: single, 16: 2e-5}[info.bits]
        bound = tolerance * (size + np.abs(expected)) + doubt + 4 * info.eps * info.tiny
        if info.bits == 16:  # the interpreter truncates to bfloat16
            unit = info.eps if INTERPRET and tensor.dtype == torch.bfloat16 else info.eps / 2
            bound += unit * np.maximum(np.abs(expected), info.tiny)
        near = np.abs(found - expected) <= bound
        near |= (np.abs(expected) > info.max) & ~np.isfinite(found)  # what is on no sphere may grow
        wrong = np.where(changes, ~near, found != before)
        what = {name: value for name, value in group.items() if name not in ("params", "radii")}
        assert not wrong.any(), (what, found[wrong][:4], expected[wrong][:4], before[wrong][:4])

    @np.errstate(all="ignore")
    def check_statistics(self):
        norms, stats = zip(*self.spheres, strict=True)
        norms = np.concatenate(norms)
        stats = {name: np.concatenate([x[name] for x in stats]) for name in stats[0]}
        sizes = dict(grad_norm=stats["radius"] * stats["whole"], angle=stats["reach"], radial=1.0)
        sizes["elr"] = 1e8 * stats["doubt"] * stats["elr"]
        for name, found in self.optimizer.stats().items():
            self.check(name, found[:, None], stats[name], sizes.get(name, 0.0), norms != 0)

        grams, gram_sizes, layers, there = [], [], [], []
        for group, p, (x, g, m), new, _, stats in self.tensors:
            vectors = x, g, m * (group["momentum"] > 0)
            pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[: i + 1]]
            gram = np.stack([(a * b).sum(1) for a, b in pairs], 1)
            grams.append(gram * 0 if p.grad is None else gram)
            gram_sizes.append(np.concatenate([length(a) * length(b) for a, b in pairs], 1))
            n = max(len(x), 1)
            norm = length(x) if p.grad is not None else length(x) * math.nan
            gamma, angle = norm * length(tangent(x, g)), turn(x, new) + 0 * stats["elr"]
            reach = (stats["reach"] * stats["radius"] / norm).sum() / n + 1e-8
            layer = dict(norm=(length(norm.T).item(), 0.0))  # and its size
            layer["elr"] = (stats["elr"] * stats["radius"] ** 2 / norm**2).sum() / n, 0.0
            layer["grad_norm"] = length(gamma.T).item(), length((norm * length(g)).T).item()
            layer["angle"] = angle.sum() / n, reach
            layers.append(layer)
            there.append(x.size > 0 and (norm != 0).all())
        grams = np.concatenate(grams)
        finite = np.isfinite(grams).all(1, keepdims=True)
        self.check("grams", self.optimizer.grams(), grams, np.concatenate(gram_sizes), finite)
        for name, found in self.optimizer.layer_stats().items():
            expected, size = np.array([layer[name] for layer in layers]).T
            self.check(name, found, expected, size, there)

    def check(self, name, found, expected, size, there):
        """Equal but for rounding, also of what cancels."""
        of_size, relative = (1e-7, 1e-8) if self.dtype == torch.float64 else (1e-6, 3e-4)
        bound = np.nan_to_num(of_size * size + relative * np.abs(expected)) + 1e-37
        found = found.cpu().numpy()
        near = (np.abs(found - expected) <= bound) | np.isnan(found) & np.isnan(expected)
        wrong = ~near & there
        assert not wrong.any(), (name, found[wrong][:4], expected[wrong][:4])
