"""Train scale-invariant weights on a sphere at a fixed effective learning rate (ELR).

A sphere is a set of tensors that share one norm. θ is their concatenation, ρ the radius (fixed),
g the gradient, m the momentum (without it β = 0), η̃ the ELR. One step is

    r = ⟨θ,g⟩/‖θ‖²      g_t = g − rθ                   projection on the tangent space
    q = ⟨θ,m⟩/‖θ‖²      m ← β(m − qθ) + g_t            Riemannian heavy ball
    θ ← ρ (θ − η̃ρ²m) / ‖θ − η̃ρ²m‖                     step and renormalization
    γ = ρ‖g_t‖          tan φ = η̃ρ²‖m‖/‖θ‖            effective gradient norm, angular step

or φ is given, and η̃ follows. Every scalar in it is a function of the Gram matrix of (θ, g, m),
whose six entries are plain sums: tiles and tensors add up. From them follow three numbers per
sphere (`sphere_rule`), and then m ← βm + g + uθ and θ ← kθ + bm.

Source: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695). Needs torch; Triton for the kernels.
"""

from __future__ import annotations

import math
import os
from functools import partial
from inspect import unwrap

import torch
from torch import Tensor
from torch.optim.sgd import sgd

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # there is no Triton for macOS: PyTorch does the step there
    triton = None

    def jit(function):
        return function


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks when a kernel is defined
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BLOCK, WARPS = 4096, 8  # elements of a tile, and the warps that work on it
PIECE = 1 << 18  # elements of a tile in PyTorch: its float32 sums stay accurate
SMALL = 1024  # up to here they are in float64: few dimensions make nearly radial gradients
TINY = 1e-14  # a part of a sum of squares that is smaller is rounding


def sphere_rule(gram: list, radius: float, lr: float, beta: float, angle: bool) -> list[float]:
    """k, b and u of a step from the Gram matrix of its sphere; then η̃, ρ and β.

    gram is ⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩, ⟨θ,m⟩, ⟨g,m⟩, ⟨m,m⟩; radius ρ, 0 for the norm that θ has; lr η̃,
    or with `angle` φ. A step of length 0 gives k = 1, b = 0; a Gram matrix that is not finite, or
    of no weights at all, nan.
    """
    tt, tg, gg, tm, gm, mm = gram
    if not (tt > 0 and math.isfinite(sum(gram))):
        return [math.nan] * 6
    norm, r, q = math.sqrt(tt), tg / tt, tm / tt
    radius, u = radius or norm, -(r + beta * q)
    s2 = gg - r * tg + 2 * beta * (gm - q * tg) + beta * beta * (mm - q * tm)  # ‖new m‖²
    s = math.sqrt(s2) if s2 > TINY * (gg + beta * beta * mm) else 0.0
    tan = math.tan(lr) if angle else lr * radius * radius * s / norm
    tan = min(tan, 1e100)
    if s == 0 or tan == 0:
        return [1.0, 0.0, u, 0.0 if angle else lr, radius, beta]
    cos = 1 / math.sqrt(1 + tan * tan)
    elr = tan * norm / (radius * radius * s) if angle else lr
    return [radius * cos / norm, -radius * cos * tan / s, u, elr, radius, beta]


@jit
def _put(at, a, b, c, d, e, f):
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
    tl.store(at + 4, e)
    tl.store(at + 5, f)


@jit
def _rule(tt, tg, gg, tm, gm, mm, radius, group, out):
    """`sphere_rule`, with ρ, lr, β, angle read from device memory and its results written."""
    lr, beta, angle = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    radius = tl.load(radius) * tl.load(group + 3)
    good = ((tt + tg + gg + tm + gm + mm) * 0.0 == 0.0) & (tt > 0)
    bad = tl.where(good, 0.0, float("nan"))
    tt = tl.where(good, tt, 1.0)
    norm, r, q = tl.sqrt(tt), tg / tt, tm / tt
    radius, u = tl.where(radius == 0, norm, radius), -(r + beta * q) + bad
    s2 = gg - r * tg + 2 * beta * (gm - q * tg) + beta * beta * (mm - q * tm)
    s = tl.sqrt(tl.where(s2 > 1e-14 * (gg + beta * beta * mm), s2, 0.0))
    tan = lr * radius * radius * s / norm
    if angle != 0:
        tan = tl.sin(lr) / tl.cos(lr)
    tan = tl.minimum(tan, 1e100)
    stays = (s == 0) | (tan == 0)
    tan = tl.where(stays, 0.0, tan)
    s = tl.where(stays, 1.0, s)
    cos = 1 / tl.sqrt(1 + tan * tan)
    k = tl.where(stays, 1.0, radius * cos / norm) + bad
    b = -radius * cos * tan / s + bad
    elr = tl.where(angle != 0, tan * norm / (radius * radius * s), lr) + bad
    _put(out, k, b, u, elr, radius + bad, beta + bad)
    return k, b, u, beta


@jit
def _load(address, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """n elements at this address as float32, 0 beyond; 128 bits at a time where that can be."""
    at, offsets = address.to(tl.pointer_type(DTYPE)), tl.arange(0, BLOCK)
    if (n == BLOCK) & (address % 16 == 0):
        x = tl.load(tl.multiple_of(at, 16) + offsets)
    else:
        x = tl.load(at + offsets, mask=offsets < n, other=0.0)
    return x.to(tl.float32)


@jit
def _store(address, x, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at, offsets = address.to(tl.pointer_type(DTYPE)), tl.arange(0, BLOCK)
    if (n == BLOCK) & (address % 16 == 0):
        tl.store(tl.multiple_of(at, 16) + offsets, x.to(DTYPE))
    else:
        tl.store(at + offsets, x.to(DTYPE), mask=offsets < n)


@jit
def _tile_pass(tiles, addresses, spheres, radii, groups, partials, rule, FIRST: tl.constexpr,
               MOVE: tl.constexpr, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """First, per tile: its Gram matrix. A sphere that is this one tile is finished at once. Third,
    per tile of other spheres: their rule applied. Backwards, for what the cache still has."""
    tile = tl.program_id(0).to(tl.int64)
    if not FIRST:
        tile = tl.num_programs(0) - 1 - tile
    line = tiles + 5 * tile
    at, offset = addresses + 3 * tl.load(line), tl.load(line + 1) * (DTYPE.primitive_bitwidth // 8)
    theta_at, g_at, m_at = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    n = tl.where(g_at == 0, 0, tl.load(line + 2))  # no gradient: the tensor stays out of this step
    n_m = tl.where(m_at == 0, 0, n)  # no momentum
    theta = _load(theta_at + offset, n, DTYPE, BLOCK)
    g = _load(g_at + offset, n, DTYPE, BLOCK)
    m = g
    if MOMENTUM:
        m = _load(m_at + offset, n_m, DTYPE, BLOCK)
    sphere = tl.load(line + 3)
    own, out = spheres + 3 * sphere, rule + 6 * sphere
    if FIRST:
        x, y = theta.to(tl.float64), g.to(tl.float64)  # so that the products are exact
        tt, tg, gg = tl.sum(x * x), tl.sum(x * y), tl.sum(y * y)
        tm, gm, mm = tt * 0.0, tt * 0.0, tt * 0.0
        if MOMENTUM:
            z = m.to(tl.float64)
            tm, gm, mm = tl.sum(x * z), tl.sum(y * z), tl.sum(z * z)
        _put(partials + 6 * tl.load(line + 4), tt, tg, gg, tm, gm, mm)
        k, b, u, beta = tt * float("nan"), tt, tt, tt
        if tl.load(own + 1) == 1:
            group = groups + 4 * tl.load(own + 2)
            k, b, u, beta = _rule(tt, tg, gg, tm, gm, mm, radii + sphere, group, out)
    else:
        k, b, u, beta = tl.load(out), tl.load(out + 1), tl.load(out + 2), tl.load(out + 5)
    if MOVE and k == k:  # not nan
        g += u.to(tl.float32) * theta
        if MOMENTUM:
            g += beta.to(tl.float32) * m
            _store(m_at + offset, g, n_m, DTYPE, BLOCK)
        if b != 0:
            theta = k.to(tl.float32) * theta + b.to(tl.float32) * g
            _store(theta_at + offset, theta, n, DTYPE, BLOCK)


@jit
def _rule_pass(many, spheres, radii, groups, partials, rule, BLOCK: tl.constexpr):
    """Second, per sphere of several tiles: their Gram matrices summed in a fixed order."""
    sphere = tl.load(many + tl.program_id(0))
    own = spheres + 3 * sphere
    start, count, group = tl.load(own), tl.load(own + 1), groups + 4 * tl.load(own + 2)
    tt = tl.zeros([BLOCK], tl.float64)
    tg, gg, tm, gm, mm = tt, tt, tt, tt, tt
    for first in range(0, count, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        at, mask = partials + 6 * (start + tile), tile < count
        tt += tl.load(at, mask=mask, other=0.0)
        tg += tl.load(at + 1, mask=mask, other=0.0)
        gg += tl.load(at + 2, mask=mask, other=0.0)
        tm += tl.load(at + 3, mask=mask, other=0.0)
        gm += tl.load(at + 4, mask=mask, other=0.0)
        mm += tl.load(at + 5, mask=mask, other=0.0)
    _rule(tl.sum(tt), tl.sum(tg), tl.sum(gg), tl.sum(tm), tl.sum(gm), tl.sum(mm),
          radii + sphere, group, rule + 6 * sphere)  # fmt: skip


class SphereSGD(torch.optim.Optimizer):
    """Stochastic gradient descent on spheres, at a fixed effective learning rate or angle.

    params    tensors, or param groups, each of which may set its own options
    lr        the ELR η̃, a float or a 0-d tensor; every torch.optim.lr_scheduler works on it
    sphere    what shares a norm: "group", all tensors of the param group, as in the paper;
              "tensor"; "row", each slice tensor[i] (output filter); None: nothing, plain SGD
    radius    of every sphere, to which the weights are scaled at once; None: the norms they have
    momentum  β of the Riemannian heavy ball
    angle     lr is the angle φ < π/2 by which a step turns each sphere. What is on no sphere
              follows at the learning rate η̃ρ² of the spheres in that step (the median)
    backend   "triton": fused kernels, at most three launches per type of weights (on a GPU; on the
              CPU under TRITON_INTERPRET=1); "torch"; "auto": Triton where it can run

    A tensor without a gradient stays out of that step; the others of its sphere keep their norm. A
    sphere that is not finite stays, and `stats()` says nan. In a CUDA graph: step once before the
    capture, lr as a tensor, zero_grad(set_to_none=False). Raises ValueError for a bad option, a
    sphere of norm zero, a parameter with holes in memory; RuntimeError for a sparse gradient.
    """

    # Without their decorators, which import torch._dynamo: a second, for what is never compiled.
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    _add = unwrap(torch.optim.Optimizer.add_param_group)

    def __init__(self, params, lr, sphere="group", radius=None, momentum=0.0, angle=False,
                 backend="auto"):  # fmt: skip
        self.backend = backend
        defaults = dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum, angle=angle)
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group):
        self._add(param_group)
        group = self.param_groups[-1]
        try:
            self._use_triton = _check(self.param_groups, self.backend)
            if group["sphere"]:
                group["radii"] = _norms(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["radius"]:
            group["radii"].fill_(group["radius"])
            self.normalize()
        self._tensors = None  # laid out at the next step

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self._on_spheres():  # a checkpoint may come from another device
            group["radii"] = group["radii"].cpu()
        self._tensors = None

    @torch.no_grad()
    def normalize(self):
        """Put every sphere back on its radius, after weights were averaged or filled with noise."""
        for group in self._on_spheres():
            scales, first = group["radii"] / _norms(group), 0
            for p in group["params"]:
                rows = _rows(group, p)[0]
                wide = torch.promote_types(p.dtype, torch.float32)
                scale = scales[first : first + rows].to(p.device, wide)
                p.mul_(scale.view(-1, *[1] * (p.dim() - 1)))
                first += 0 if group["sphere"] == "group" else rows

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One step along the gradients in `.grad`. Returns the loss of the closure, if any."""
        with torch.enable_grad():
            loss = closure() if closure else None
        self._apply(move=True)
        return loss

    @torch.no_grad()
    def measure(self):
        """Find what a step would report, at the norms that the weights have, and move nothing."""
        self._apply(move=False)

    @property
    def last(self):
        """What the last step left, for `stats` and `layer_stats`: the Gram matrices of its tiles,
        and per sphere what `sphere_rule` returns."""
        if not self._tensors:
            raise RuntimeError("no statistics yet: they come with the first step over a sphere")
        if self._use_triton:  # whose kernels write every step into the same tables
            return self._partials.clone(), self._rule.clone()
        return self._partials, self._rule

    def stats(self, steps: list[tuple] | None = None) -> dict[str, Tensor]:
        """Of the last step, per sphere in the order of the param groups (float64, on the device):
        `radius` ρ, `elr` η̃, `grad_norm` γ, `angle` φ in radians, `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan
        where there was no gradient. Of several steps, each as `last` gave it: [steps, spheres]."""
        _, g2, angle, radial, elr, radius = self._of_parts(steps, *self._whole)
        gamma = radius * g2.sqrt()
        return dict(radius=radius, elr=elr, grad_norm=gamma, angle=angle, radial=radial)

    def layer_stats(self, steps: list[tuple] | None = None) -> dict[str, Tensor]:
        """The same per tensor on a sphere: its `norm` ρ_i before the step, its individual ELR `elr`
        = η̃ρ²/ρ_i², `grad_norm` = ρ_i‖g_i − r_iθ_i‖, and the `angle` by which the step turns it.
        Where rows are spheres: the tensor's norm, η̃, the norm of its rows' γ, the mean φ."""
        tt, g2, angle, _, elr, radius = self._of_parts(steps, *self._lines)
        lines = torch.stack([tt, elr * radius**2 / tt, tt * g2, angle], -1)
        tt, elr, gamma2, angle = _sums(lines, self._rows).unbind(-1)
        elr, angle = elr / self._rows, angle / self._rows
        return dict(norm=tt.sqrt(), elr=elr, grad_norm=gamma2.sqrt(), angle=angle)

    def _of_parts(self, steps, tiles, sphere):
        """‖θ‖², ‖g_t‖², φ, radial, η̃, ρ of spheres or of parts of them: of so many `tiles` each, on
        which `sphere`."""
        if steps is None:
            partials, rule = self.last
        else:
            partials, rule = (torch.stack(x) for x in zip(*steps, strict=True))
        gram, (k, b, u, elr, radius, beta) = _sums(partials, tiles), rule[..., sphere, :].unbind(-1)
        tt, tg, gg, tm, gm, mm = torch.where(gram[..., :1] > 0, gram, math.nan).unbind(-1)
        g2 = gg - tg * tg / tt
        s2 = g2 + 2 * beta * (gm - tm * tg / tt) + beta**2 * (mm - tm * tm / tt)
        g2 = torch.where(g2 > TINY * gg, g2, 0 * g2)
        along = (tg + beta * tm) / tt + u
        angle = torch.atan2(b.abs() * s2.clamp(min=0).sqrt(), tt.sqrt() * (k + b * along))
        return tt, g2, angle, tg / (tt * gg).sqrt().clamp(min=1e-300), elr, radius

    def _on_spheres(self):
        return [group for group in self.param_groups if group["sphere"]]

    def _lay_out(self):
        """What does not change from step to step. The Gram matrix of a sphere is a sum over its
        lines (tensors, or rows of one), that of a line over its tiles: (tensor, offset, elements,
        sphere, own number)."""
        size = BLOCK if self._use_triton else PIECE
        device = self.param_groups[0]["params"][0].device
        table = partial(torch.tensor, dtype=torch.long, device=device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._tensors, self._tiles, rows_of, lines, spheres = [], [], [], [], []
        for i, group in enumerate(self._on_spheres()):
            for p in group["params"]:
                rows, length = _rows(group, p)
                for row in range(rows):
                    start = row * length
                    if group["sphere"] != "group" or p is group["params"][0]:
                        spheres.append(i)
                    lines.append((-(-length // size), len(spheres) - 1))
                    for at in range(start, start + length, size):
                        place = len(self._tensors), at, min(size, start + length - at)
                        self._tiles.append((*place, len(spheres) - 1, len(self._tiles)))
                self._tensors.append(p)
                rows_of.append(rows)
        tiles, self._rows = table(self._tiles).view(-1, 5), table(rows_of)
        self._lines = table(lines).view(-1, 2).unbind(1)
        counts = torch.bincount(tiles[:, 3], minlength=len(spheres))
        self._whole = counts, torch.arange(len(spheres), device=device)
        self._spheres = torch.stack([counts.cumsum(0) - counts, counts, table(spheres)], 1)
        self._many, self._launches = counts.gt(1).nonzero(), []
        for dtype, name in DTYPES.items():  # all tiles of this type, those of spheres of several
            own = [tile for tile in self._tiles if self._tensors[tile[0]].dtype == dtype]
            own = table(own).view(-1, 5)
            self._launches.append((name, own, own[counts[own[:, 3]] > 1]))
        self._radii, self._groups = zeros(len(spheres)), zeros(len(self._on_spheres()), 4)
        if spheres:
            self._radii.copy_(torch.cat([group["radii"] for group in self._on_spheres()]))
        self._partials, self._rule = zeros(len(tiles), 6), zeros(len(spheres), 6)
        self._addresses = table([0, 0, 0] * len(self._tensors))
        self._written, self._copies = (None, None), {}

    def _apply(self, move):
        if self._tensors is None:
            self._lay_out()
        on_spheres, plain = [], []
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor) and not 0 <= group["lr"] < math.inf:
                raise ValueError(f"lr is {group['lr']}: it must be finite and not negative")
            parts = [self._parts(group, p) for p in group["params"]]
            if group["sphere"]:
                on_spheres += parts
            else:
                plain.append((group, parts))
        if on_spheres and self._use_triton:
            self._triton_step(on_spheres, move)
        elif on_spheres:
            self._torch_step(on_spheres, move)
        for group, parts in plain if move else ():
            self._plain_step(group, *zip(*filter(None, parts), strict=True))

    def _parts(self, group, p):
        """θ, g and, with momentum, m of a tensor; nothing where it has no gradient."""
        g = p.grad
        if g is None:
            return ()
        if g.layout != torch.strided:
            raise RuntimeError("a gradient is sparse: make the embedding with sparse=False")
        if g.dtype != p.dtype or g.stride() != p.stride():
            g = self._copies.setdefault(p, torch.empty_like(p)).copy_(g)
        if not group["momentum"]:
            return p, g
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return p, g, self.state[p]["momentum_buffer"]

    def _torch_step(self, tensors, move):
        """The three passes in PyTorch, sums and rule in Python: for the CPU, and for float64."""
        grams, partials, tiles, rule = [[0.0] * 6] * len(self._radii), [], [], []
        for tensor, at, n, sphere, _ in self._tiles:  # as they lie in memory
            parts = [x.as_strided((n,), (1,), x.storage_offset() + at) for x in tensors[tensor]]
            partials.append(_gram(*parts))
            tiles.append((sphere, parts))
            grams[sphere] = [a + b for a, b in zip(grams[sphere], partials[-1], strict=True)]
        for group in self._on_spheres():
            how, free = (float(group["lr"]), group["momentum"], group["angle"]), _free(group, move)
            for radius in group["radii"].tolist():
                rule.append(sphere_rule(grams[len(rule)], 0.0 if free else radius, *how))
        new = dict(dtype=torch.float64, device=self._radii.device)
        self._partials, self._rule = torch.tensor(partials, **new), torch.tensor(rule, **new)
        for sphere, parts in reversed(tiles) if move else ():
            if parts and not math.isnan(rule[sphere][0]):
                _move(rule[sphere], *parts)

    def _triton_step(self, tensors, move):
        """The three passes in the kernels. What has changed costs one small upload."""
        groups, addresses, on_spheres = [], [], self._on_spheres()
        for group in on_spheres:
            lr = 0.0 if isinstance(group["lr"], Tensor) else group["lr"]
            groups.append([lr, group["momentum"], group["angle"], not _free(group, move)])
        for parts in tensors:
            addresses += [x.data_ptr() for x in parts] + [0] * (3 - len(parts))
        if groups != self._written[0]:
            _upload(groups, self._groups)
        if addresses != self._written[1]:
            if self._radii.is_cuda and torch.cuda.is_current_stream_capturing():
                what = "a tensor moved while a CUDA graph was captured"
                raise RuntimeError(f"{what}: step once before, and zero_grad(set_to_none=False)")
            _upload(addresses, self._addresses)
        self._written = groups, addresses
        for i, group in enumerate(on_spheres):
            if isinstance(group["lr"], Tensor):
                self._groups[i, 0] = group["lr"]
        tables = self._spheres, self._radii, self._groups, self._partials, self._rule
        momentum = any(group["momentum"] for group in on_spheres)
        how = dict(MOVE=move, MOMENTUM=momentum, BLOCK=BLOCK, num_warps=WARPS)
        for first in (True, False) if move else (True,):
            for dtype, *tiles in self._launches:
                tiles = tiles[0 if first else 1]
                if len(tiles):
                    more = dict(FIRST=first, DTYPE=getattr(tl, dtype), **how)
                    _tile_pass[(len(tiles),)](tiles, self._addresses, *tables, **more)
            if first and len(self._many):
                _rule_pass[(len(self._many),)](self._many, *tables, BLOCK=1024, num_warps=WARPS)

    def _plain_step(self, group, params=(), grads=(), buffers=()):
        """Plain SGD by torch's own function, in one launch on a GPU."""
        lr, on_gpu = group["lr"], self._radii.is_cuda
        if group["angle"]:
            lr = (self._rule[:, 3] * self._rule[:, 4] ** 2).nanmedian().nan_to_num(0).float()
        if not on_gpu:
            lr = float(lr)
        buffers = list(buffers) or [None] * len(params)
        sgd(list(params), list(grads), buffers, fused=on_gpu, lr=lr, momentum=group["momentum"],
            weight_decay=0, dampening=0, nesterov=False, maximize=False)  # fmt: skip


def _check(groups, backend):
    """Whether Triton's kernels can be used. Raises ValueError for an option of the last group."""
    group, device, wrong = groups[-1], groups[0]["params"][0].device, []
    lr, sphere, radius, momentum = (group[x] for x in ("lr", "sphere", "radius", "momentum"))
    if sphere not in ("group", "tensor", "row", None):
        wrong.append(f"{sphere=}: it must be 'group', 'tensor', 'row' or None")
    if not 0 <= float(lr) < (math.pi / 2 if group["angle"] else math.inf):
        wrong.append(f"lr={float(lr)}: it must be finite, not negative, an angle < π/2")
    if radius is not None and not (sphere and 0 < radius < math.inf):
        wrong.append(f"{radius=} with {sphere=}: it must be None, or positive on a sphere")
    if not 0 <= momentum < 1:
        wrong.append(f"{momentum=}: it must be in [0, 1)")
    for i, p in enumerate(group["params"]):
        name = f"parameter {i} of shape {tuple(p.shape)}"
        if p.device != device or not p.is_floating_point():
            wrong.append(f"{name} is {p.dtype} on {p.device}: not real floats on {device}")
        # The dimensions in the order in which they lie in memory; rows have to lie one by one.
        order = sorted(range(p.dim()), key=p.stride, reverse=True)
        if sphere == "row":
            order.sort(key=bool)
        if sphere and not p.permute(order).is_contiguous():
            wrong.append(f"{name} has holes in memory, or rows that lie scattered: clone it")
    obstacle = ""
    if any(p.dtype not in DTYPES for each in groups for p in each["params"]):
        obstacle = "a parameter is not of " + ", ".join(DTYPES.values())
    if device.type != ("cpu" if INTERPRET else "cuda"):
        obstacle = f"the parameters are on {device} (the CPU takes TRITON_INTERPRET=1)"
    if triton is None:
        obstacle = "Triton is not installed"
    if backend not in ("auto", "torch") and (backend != "triton" or obstacle):
        wrong.append(f"{backend=}: {obstacle or 'no such one'}")
    if wrong:
        raise ValueError(wrong[0])
    return backend != "torch" and not obstacle


def _rows(group, p):
    """How many lines a tensor has, and how many elements each."""
    rows = len(p) if group["sphere"] == "row" and p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def _free(group, move):
    """Whether the sphere has no fixed radius, but the norm that its weights have."""
    joint = group["sphere"] == "group"
    return not move or (joint and any(p.grad is None for p in group["params"]))


def _norms(group):
    """The norm of every sphere of a group, [spheres] float64, on the CPU."""
    squares = [p.double().square().reshape(_rows(group, p)).sum(1).cpu() for p in group["params"]]
    if group["sphere"] == "group":
        squares = [torch.cat(squares).sum(0, keepdim=True)]
    for i, square in enumerate(squares):
        if group["params"][i].numel() and not (square.isfinite() & (square > 0)).all():
            what = "has norm zero, so no direction, or is not finite: initialize it"
            raise ValueError(f"sphere={group['sphere']!r}: that of tensor {i} {what}")
    return torch.cat(squares).sqrt()


def _sums(x, lengths):
    """[…, n, k] → […, len(lengths), k]: sums over stretches of these lengths."""
    x = x.movedim(-2, 0).contiguous()
    return torch.segment_reduce(x, "sum", lengths=lengths, axis=0, unsafe=True).movedim(0, -2)


def _upload(numbers, table):
    new = torch.tensor(numbers, dtype=table.dtype, pin_memory=table.is_cuda)
    table.copy_(new, non_blocking=True)


def _gram(*vectors):
    """The Gram matrix of (θ, g, m) as in `sphere_rule`; 0 where they are not: no gradient."""
    if vectors and len(vectors[0]) <= SMALL:
        vectors = [x.double() for x in vectors]
    elif vectors and vectors[0].element_size() < 4:
        vectors = [x.float() for x in vectors]
    gram = [torch.dot(x, y).item() for i, x in enumerate(vectors) for y in vectors[: i + 1]]
    return gram + [0.0] * (6 - len(gram))


def _move(rule, theta, g, m=None):
    """m ← βm + g + uθ, θ ← kθ + bm, in place."""
    k, b, u, _, _, beta = rule
    if theta.element_size() < 4:  # the step is in float32, rounded once
        new, step = theta.float(), None if m is None else m.float()
        _move(rule, new, g.float(), step)
        theta.copy_(new)
        if m is not None:
            m.copy_(step)
    elif m is None:
        theta.mul_(k + b * u).add_(g, alpha=b)
    else:
        m.mul_(beta).add_(g).add_(theta, alpha=u)
        theta.mul_(k).add_(m, alpha=b)


if __name__ == "__main__":
    print("SphereSGD: steps on a sphere at a fixed effective learning rate. Copy this one file.")
    print("Checked against float64 in tests/; `python bench.py step` checks and times it here.")
