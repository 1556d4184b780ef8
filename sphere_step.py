"""Train scale-invariant weights on a sphere at a fixed effective learning rate (ELR).

A sphere is a set of tensors that share one norm. θ is their concatenation, ρ the radius (fixed),
g the gradient, m the momentum (without it β = 0), η̃ the ELR. One step is

    r = ⟨θ,g⟩/‖θ‖²      g_t = g − rθ                   projection on the tangent space
    q = ⟨θ,m⟩/‖θ‖²      m ← β(m − qθ) + g_t            Riemannian heavy ball
    θ ← ρ (θ − η̃ρ²m) / ‖θ − η̃ρ²m‖                     step and renormalization
    γ = ρ‖g_t‖          tan φ = η̃ρ²‖m‖/‖θ‖            effective gradient norm, angular step

or φ is given, and η̃ follows. Every scalar here is a function of the Gram matrix of (θ, g, m), whose
entries are plain sums: tiles and tensors add up. `sphere_rule` makes three numbers of them, and
then m ← βm + g + uθ and θ ← kθ + bm.

Source: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695). Needs torch; Triton for the kernels.
"""

from __future__ import annotations

import math
import os
from functools import partial

import torch
from torch import Tensor
from torch.optim.sgd import sgd

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # as on macOS
    triton = None

    def jit(function):
        return function


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = torch.float32, torch.bfloat16, torch.float16
BLOCK, WARPS = 4096, 8  # elements of a tile, and its warps
PIECE = 1 << 18  # elements of a tile in PyTorch, so that float32 sums are accurate
SMALL = 1024  # up to here they are float64: gradients may be nearly radial
TINY = 1e-14  # a smaller part of a sum of squares is rounding


def sphere_rule(gram, radius, lr, beta, angle):
    """k, b and u of a step from the Gram matrix of its sphere; then η̃, ρ and β.

    gram: ⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩, ⟨θ,m⟩, ⟨g,m⟩, ⟨m,m⟩; radius: ρ, 0 for the norm of θ; lr: η̃, with
    `angle` φ. A step of length 0 gives k = 1, b = 0; a Gram matrix that is not finite, nan.
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
def _put(at, values):
    for i in tl.static_range(6):
        tl.store(at + i, values[i])


@jit
def _rule(gram, radius, group, out):
    """`sphere_rule`, from and into device memory."""
    tt, tg, gg, tm, gm, mm = gram
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
    _put(out, (k, b, u, elr, radius + bad, beta + bad))
    return k, b, u, beta


@jit
def _load(address, start, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """n elements as float32, then 0; in 128-bit accesses where they are aligned."""
    at, offsets = address.to(tl.pointer_type(DTYPE)) + start, tl.arange(0, BLOCK)
    if (n == BLOCK) & (at.to(tl.int64) % 16 == 0):
        x = tl.load(tl.multiple_of(at, 16) + offsets)
    else:
        x = tl.load(at + offsets, mask=offsets < n, other=0.0)
    return x.to(tl.float32)


@jit
def _store(address, start, x, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at, offsets = address.to(tl.pointer_type(DTYPE)) + start, tl.arange(0, BLOCK)
    if (n == BLOCK) & (at.to(tl.int64) % 16 == 0):
        tl.store(tl.multiple_of(at, 16) + offsets, x.to(DTYPE))
    else:
        tl.store(at + offsets, x.to(DTYPE), mask=offsets < n)


@jit
def _tile_pass(tiles, addresses, spheres, radii, groups, partials, rule, FIRST: tl.constexpr,
               MOVE: tl.constexpr, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """First, per tile: its Gram matrix; a sphere of one tile is finished at once. Third: the rule
    applied to the tiles of other spheres, from the last on, which the cache still has."""
    tile = tl.program_id(0).to(tl.int64)
    if not FIRST:
        tile = tl.num_programs(0) - 1 - tile
    line = tiles + 5 * tile
    at, start = addresses + 3 * tl.load(line), tl.load(line + 1)
    theta_at, g_at, m_at = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    sphere = tl.load(line + 3)
    own, out = spheres + 3 * sphere, rule + 6 * sphere
    n = tl.where(g_at == 0, 0, tl.load(line + 2))  # no gradient
    if not FIRST:
        n = tl.where(tl.load(own + 1) == 1, 0, n)  # finished
    n_m = tl.where(m_at == 0, 0, n)
    theta = _load(theta_at, start, n, DTYPE, BLOCK)
    g = _load(g_at, start, n, DTYPE, BLOCK)
    m = g
    if MOMENTUM:
        m = _load(m_at, start, n_m, DTYPE, BLOCK)
    if FIRST:
        x, y = theta.to(tl.float64), g.to(tl.float64)
        b = tl.full([], 0, tl.float64)
        gram = tl.sum(x * x), tl.sum(x * y), tl.sum(y * y), b, b, b
        if MOMENTUM:
            z = m.to(tl.float64)
            gram = gram[0], gram[1], gram[2], tl.sum(x * z), tl.sum(y * z), tl.sum(z * z)
        _put(partials + 6 * tl.load(line + 4), gram)
        k, u, beta = b * float("nan"), b, b
        if tl.load(own + 1) == 1:
            k, b, u, beta = _rule(gram, radii + sphere, groups + 4 * tl.load(own + 2), out)
    else:
        k, b, u, beta = tl.load(out), tl.load(out + 1), tl.load(out + 2), tl.load(out + 5)
    if MOVE and k == k:  # not nan
        g += u.to(tl.float32) * theta
        if MOMENTUM:
            g += beta.to(tl.float32) * m
            _store(m_at, start, g, n_m, DTYPE, BLOCK)
        if b != 0:
            theta = k.to(tl.float32) * theta + b.to(tl.float32) * g
            _store(theta_at, start, theta, n, DTYPE, BLOCK)


@jit
def _rule_pass(many, spheres, radii, groups, partials, rule, BLOCK: tl.constexpr):
    """Second, per sphere of several tiles: their Gram matrices summed in a fixed order."""
    sphere = tl.load(many + tl.program_id(0))
    own, columns = spheres + 3 * sphere, tl.arange(0, 8)[None, :]
    start, count = tl.load(own), tl.load(own + 1)
    sums = tl.zeros([BLOCK, 8], tl.float64)
    for first in range(0, count, BLOCK):
        tile = first + tl.arange(0, BLOCK)[:, None]
        mask = (tile < count) & (columns < 6)
        sums += tl.load(partials + 6 * (start + tile) + columns, mask=mask, other=0.0)
    gram = ()
    for i in tl.static_range(6):
        gram += (tl.sum(tl.where(columns == i, sums, 0.0)),)
    _rule(gram, radii + sphere, groups + 4 * tl.load(own + 2), rule + 6 * sphere)


class SphereSGD(torch.optim.Optimizer):
    """Gradient descent on spheres at a fixed effective learning rate, or angle.

    params    tensors, or param groups with options of their own
    lr        the ELR η̃, a float or a 0-d tensor; every torch.optim.lr_scheduler works on it
    sphere    what shares a norm: "group", all tensors of the param group, as in the paper;
              "tensor"; "row", each slice tensor[i] (output filter); None: nothing, plain SGD
    radius    to which the weights are scaled at once; None: the norms that they have
    momentum  β of the Riemannian heavy ball
    angle     lr is the angle φ < π/2 by which a step turns each sphere; what is on no sphere has
              the learning rate η̃ρ² of the spheres in that step (the median)
    backend   "triton": fused kernels, at most three launches per type of weights, on a GPU (on the
              CPU with TRITON_INTERPRET=1); "torch"; "auto": Triton where it can run

    A tensor without a gradient stays out of that step; a sphere that is not finite stays as it is.
    In a CUDA graph: a step before the capture, lr as a tensor, zero_grad(set_to_none=False). Raises
    ValueError for a bad option, a sphere of norm zero, a tensor with holes in memory; RuntimeError
    for a sparse gradient.
    """

    def __init__(self, params, lr, sphere="group", radius=None, momentum=0.0, angle=False,
                 backend="auto"):  # fmt: skip
        self.backend = backend
        defaults = dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum, angle=angle)
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._use_triton = _check(self.param_groups, self.backend)
            if group["sphere"]:
                group["radii"] = _norms(group).tolist()
        except ValueError:
            self.param_groups.pop()
            raise
        if group["radius"]:
            group["radii"] = [group["radius"]] * len(group["radii"])
            self.normalize()
        self._tiles = None  # laid out at the next step

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._tiles = None

    @torch.no_grad()
    def normalize(self):
        """Put the weights back on their spheres, from which something else moved them."""
        for group in self._on_spheres():
            scales = torch.tensor(group["radii"], dtype=torch.float64) / _norms(group)
            rows = [_rows(group, p)[0] for p in group["params"]]
            if group["sphere"] == "group":
                scales = scales.expand(len(rows))
            for p, scale in zip(group["params"], scales.split(rows), strict=True):
                new = p.reshape(_rows(group, p)) * scale.to(p.device)[:, None]
                p.copy_(new.view_as(p))

    @torch.no_grad()
    def step(self, closure=None):
        """One step along the gradients in `.grad`. Returns the closure's loss, if any."""
        with torch.enable_grad():
            loss = closure() if closure else None
        self._apply(move=True)
        return loss

    @torch.no_grad()
    def measure(self):
        """As `step`, at the norms that the weights have, but nothing moves."""
        self._apply(move=False)

    @property
    def last(self):
        """What `stats` are made of: Gram matrices of tiles, and what `sphere_rule` returned."""
        if not self._tiles:
            raise RuntimeError("no statistics before the first step on a sphere")
        return self._partials.clone(), self._rule.clone()

    def stats(self, last=None):
        """Of the last step, [spheres] float64: `radius` ρ, `elr` η̃, `grad_norm` γ, `angle` φ in
        radians, `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan without a gradient. With the `last` of several steps,
        stacked: [steps, spheres]."""
        _, g2, angle, radial, elr, radius = self._of_parts(last, False)
        gamma = radius * g2.sqrt()
        return dict(radius=radius, elr=elr, grad_norm=gamma, angle=angle, radial=radial)

    def layer_stats(self, last=None):
        """The same per tensor on a sphere: its `norm` ρ_i before the step, its own ELR `elr`
        = η̃ρ²/ρ_i², `grad_norm` = ρ_i‖g_i − r_iθ_i‖, the `angle` by which the step turned it. Where
        rows are spheres: the tensor's norm, η̃, the norm of its rows' γ, the mean φ."""
        tt, g2, angle, _, elr, radius = self._of_parts(last, True)
        lines = torch.stack([tt, elr * radius**2 / tt, tt * g2, angle], -1)
        tt, elr, gamma2, angle = _sums(lines, self._rows).unbind(-1)
        n = self._rows
        return dict(norm=tt.sqrt(), elr=elr / n, grad_norm=gamma2.sqrt(), angle=angle / n)

    def _of_parts(self, last, lines):
        """‖θ‖², ‖g_t‖², φ, radial, η̃, ρ of spheres, or of their lines."""
        partials, rule = self.last if last is None else last
        tiles, sphere = self._lines if lines else self._whole
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
        """What no step changes. A sphere is the sum of its lines (tensors, or rows of one), a line
        that of its tiles: (tensor, start, elements, sphere, own number)."""
        size = BLOCK if self._use_triton else PIECE
        device = self.param_groups[0]["params"][0].device
        table = partial(torch.tensor, dtype=torch.long, device=device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._tiles, launches, rows_of, lines, spheres = [], {}, [], [], []
        for i, group in enumerate(self._on_spheres()):
            for p in group["params"]:
                rows, length = _rows(group, p)
                for row in range(rows):
                    if group["sphere"] != "group" or p is group["params"][0]:
                        spheres.append(i)
                    sphere, starts = len(spheres) - 1, range(row * length, (row + 1) * length, size)
                    lines.append((len(starts), sphere))
                    for at in starts:
                        place = len(rows_of), at, min(size, starts.stop - at)
                        self._tiles.append((*place, sphere, len(self._tiles)))
                        launches.setdefault(p.dtype, []).append(self._tiles[-1])
                rows_of.append(rows)
        tiles, self._rows = table(self._tiles).view(-1, 5), table(rows_of)
        self._lines = table(lines).view(-1, 2).unbind(1)
        counts = torch.bincount(tiles[:, 3], minlength=len(spheres))
        self._whole = counts, torch.arange(len(spheres), device=device)
        self._spheres = torch.stack([counts.cumsum(0) - counts, counts, table(spheres)], 1)
        self._many = counts.gt(1).nonzero()
        self._launches = [(str(dtype)[6:], table(own)) for dtype, own in launches.items()]
        radii = sum([group["radii"] for group in self._on_spheres()], [])
        self._radii = torch.tensor(radii, dtype=torch.float64, device=device)
        self._groups = zeros(len(self._on_spheres()), 4)
        self._partials, self._rule = zeros(len(tiles), 6), zeros(len(spheres), 6)
        self._addresses = table([0, 0, 0] * len(rows_of))
        self._written, self._copies = {}, {}

    def _apply(self, move):
        if self._tiles is None:
            self._lay_out()
        on_spheres, plain = [], []
        for group in self.param_groups:
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
        """θ, g and, with momentum, m; nothing without a gradient."""
        g = p.grad
        if g is None:
            return ()
        if g.layout != torch.strided:
            raise RuntimeError("a gradient is sparse: take sparse=False")
        if g.dtype != p.dtype or g.stride() != p.stride():
            g = self._copies.setdefault(p, torch.empty_like(p)).copy_(g)
        if not group["momentum"]:
            return p, g
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return p, g, self.state[p]["momentum_buffer"]

    def _torch_step(self, tensors, move):
        grams, partials, tiles, rule = [[0.0] * 6] * len(self._radii), [], [], []
        for tensor, at, n, sphere, _ in self._tiles:  # as they lie in memory
            parts = [x.as_strided((n,), (1,), x.storage_offset() + at) for x in tensors[tensor]]
            partials.append(_gram(*parts))
            tiles.append((sphere, parts))
            grams[sphere] = [a + b for a, b in zip(grams[sphere], partials[-1], strict=True)]
        for group in self._on_spheres():
            how = float(group["lr"]), group["momentum"], group["angle"]
            for radius in group["radii"]:
                radius = radius if move and not _free(group) else 0.0
                rule.append(sphere_rule(grams[len(rule)], radius, *how))
        self._partials = self._partials.new_tensor(partials)
        self._rule = self._rule.new_tensor(rule)
        for sphere, parts in reversed(tiles) if move else ():
            if parts and not math.isnan(rule[sphere][0]):
                _move(rule[sphere], *parts)

    def _triton_step(self, tensors, move):
        groups, addresses = [], []
        for group in self._on_spheres():
            lr = 0.0 if isinstance(group["lr"], Tensor) else group["lr"]
            groups.append([lr, group["momentum"], group["angle"], not _free(group)])
        for parts in tensors:
            addresses += [x.data_ptr() for x in parts] + [0] * (3 - len(parts))
        for table, new in ((self._groups, groups), (self._addresses, addresses)):
            if new != self._written.get(table):
                if table.is_cuda and torch.cuda.is_current_stream_capturing():
                    cure = "step once before, and zero_grad(set_to_none=False)"
                    raise RuntimeError(f"a tensor moved while a CUDA graph was captured: {cure}")
                self._written[table] = new
                new = torch.tensor(new, dtype=table.dtype, pin_memory=table.is_cuda)
                table.copy_(new, non_blocking=True)
        for i, group in enumerate(self._on_spheres()):
            if isinstance(group["lr"], Tensor):
                self._groups[i, 0] = group["lr"]
        radii, many = self._radii if move else 0 * self._radii, len(self._many)
        tables = self._spheres, radii, self._groups, self._partials, self._rule
        momentum = any(beta for _, beta, *_ in groups)
        how = dict(MOVE=move, MOMENTUM=momentum, BLOCK=BLOCK, num_warps=WARPS)
        for first in (True, False) if move and many else (True,):
            for dtype, tiles in self._launches:
                more = dict(FIRST=first, DTYPE=getattr(tl, dtype), **how)
                _tile_pass[(len(tiles),)](tiles, self._addresses, *tables, **more)
            if first and many:
                _rule_pass[(many,)](self._many, *tables, BLOCK=1024, num_warps=WARPS)

    def _plain_step(self, group, params=(), grads=(), buffers=()):
        lr, on_gpu = group["lr"], self._radii.is_cuda
        if group["angle"]:
            lr = (self._rule[:, 3] * self._rule[:, 4] ** 2).nanmedian().nan_to_num(0).float()
        if not on_gpu:
            lr = float(lr)
        buffers = list(buffers) or [None] * len(params)
        sgd(list(params), list(grads), buffers, fused=on_gpu, lr=lr, momentum=group["momentum"],
            weight_decay=0, dampening=0, nesterov=False, maximize=False)  # fmt: skip


def _check(groups, backend):
    """Whether the kernels are to be used. Raises ValueError for a bad last group."""
    group, device = groups[-1], groups[0]["params"][0].device
    sphere, radius = group["sphere"], group["radius"]
    most = math.pi / 2 if group["angle"] else math.inf
    possible = triton is not None and device.type == ("cpu" if INTERPRET else "cuda")
    possible = possible and all(p.dtype in DTYPES for each in groups for p in each["params"])
    ways = ("auto", "torch", "triton") if possible else ("auto", "torch")
    for name, good, what in (
        ("sphere", sphere in ("group", "tensor", "row", None), "'group', 'tensor', 'row' or None"),
        ("lr", 0 <= float(group["lr"]) < most, "finite, ≥ 0 (an angle below π/2)"),
        ("radius", radius is None or sphere and 0 < radius < math.inf, "positive, on a sphere"),
        ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
        ("backend", backend in ways, "'auto', 'torch' or, on a GPU, not in float64, 'triton'"),
    ):
        if not good:
            raise ValueError(f"{name}={group.get(name, backend)!r}: it must be {what}")
    for i, p in enumerate(group["params"]):
        name = f"parameter {i} of shape {tuple(p.shape)}"
        if p.device != device or not p.is_floating_point():
            raise ValueError(f"{name} is {p.dtype} on {p.device}, not float on {device}")
        order = sorted(range(p.dim()), key=p.stride, reverse=True)  # as they lie in memory
        if sphere == "row":
            order.sort(key=bool)  # row after row
        if sphere and not p.permute(order).is_contiguous():
            raise ValueError(f"{name} has holes in memory, or scattered rows: clone it")
    return possible and backend != "torch"


def _rows(group, p):
    rows = len(p) if group["sphere"] == "row" and p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def _free(group):
    """Whether the radius is the norm of the weights with a gradient."""
    return group["sphere"] == "group" and any(p.grad is None for p in group["params"])


def _norms(group):
    squares = [p.double().square().reshape(_rows(group, p)).sum(1).cpu() for p in group["params"]]
    if group["sphere"] == "group":
        squares = [torch.cat(squares).sum(0, keepdim=True)]
    for i, square in enumerate(squares):
        if group["params"][i].numel() and not (square.isfinite() & (square > 0)).all():
            raise ValueError(f"the sphere of tensor {i} has norm zero, or is not finite")
    return torch.cat(squares).sqrt()


def _sums(x, lengths):
    """Sums over stretches of these lengths, [..., n, k] → [..., len(lengths), k]."""
    x = x.movedim(-2, 0).contiguous()
    return torch.segment_reduce(x, "sum", lengths=lengths, axis=0, unsafe=True).movedim(0, -2)


def _gram(*vectors):
    """The Gram matrix of (θ, g, m) as in `sphere_rule`; 0 for what there is not."""
    if vectors and len(vectors[0]) <= SMALL:
        vectors = [x.double() for x in vectors]
    elif vectors and vectors[0].element_size() < 4:
        vectors = [x.float() for x in vectors]
    gram = [torch.dot(x, y).item() for i, x in enumerate(vectors) for y in vectors[: i + 1]]
    return gram + [0.0] * (6 - len(gram))


def _move(rule, *vectors):
    """m ← βm + g + uθ, θ ← kθ + bm, in place."""
    k, b, u, _, _, beta = rule
    theta, g, *m = vectors
    if theta.element_size() < 4:  # in float32, rounded once
        wide = [x.float() for x in vectors]
        _move(rule, *wide)
        torch._foreach_copy_(vectors, wide)
    elif m:
        m[0].mul_(beta).add_(g).add_(theta, alpha=u)
        theta.mul_(k).add_(m[0], alpha=b)
    else:
        theta.mul_(k + b * u).add_(g, alpha=b)


if __name__ == "__main__":
    print("SphereSGD: steps on a sphere at a fixed effective learning rate. Copy this one file.")
    print("Checked against float64 in tests/, and on this machine by: python bench.py step")
