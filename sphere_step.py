"""Train scale-invariant weights on a sphere at a fixed effective learning rate (ELR).

A sphere is a set of tensors that share one norm. θ is their concatenation, ρ the radius (fixed),
g the gradient, m the momentum (without it β = 0), η̃ the ELR. One step is

    r = ⟨θ,g⟩/‖θ‖²      g_t = g − rθ                   projection on the tangent space
    q = ⟨θ,m⟩/‖θ‖²      m ← β(m − qθ) + g_t            Riemannian heavy ball
    θ ← ρ (θ − η̃ρ²m) / ‖θ − η̃ρ²m‖                     step and renormalization
    γ = ρ‖g_t‖          tan φ = η̃ρ²‖m‖/‖θ‖            effective gradient norm, angular step

or φ is given, and η̃ follows. All scalars follow from the Gram matrix of (θ, g, m), a sum over
tiles and tensors: `sphere_rule` makes k, b, u of it, and m ← βm + g + uθ, θ ← kθ + bm.

Source: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695). Needs torch; Triton for the kernels.
"""

from __future__ import annotations

import math
import os
from inspect import unwrap
from numbers import Real

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # as on macOS
    triton = None

    def jit(function):
        return function


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = torch.float32, torch.bfloat16, torch.float16  # of the kernels
BLOCK, WARPS = 4096, 8  # elements of a tile, and its warps
PIECE = 1 << 18  # elements at once in PyTorch: float32 sums of more are not accurate
SMALL = 1024  # so few are summed in float64
KNOWN = "params param_names name lr sphere radius momentum angle weight_decay".split()
OF_SGD = "dampening nesterov maximize".split()  # on no sphere


def _formula(tt, tg, gg, tm, gm, mm, radius, lr, beta, turn, where, root):
    """`sphere_rule` for Python, tensors and Triton, which bring `where` and a square root. turn is
    tan φ, or -1: from η̃."""
    good = (tt > 0) & ((tt + tg + gg + tm + gm + mm) * 0.0 == 0.0) & (lr >= 0) & (lr * 0.0 == 0.0)
    tt = where(good, tt, 1.0)
    norm, r, q = root(tt), tg / tt, tm / tt
    radius, u = where(radius == 0, norm, radius), -(r + beta * q)
    s2 = gg - r * tg + 2 * beta * (gm - q * tg) + beta * beta * (mm - q * tm)  # ‖new m‖²
    s = root(where(s2 > 1e-14 * (gg + beta * beta * mm), s2, 0.0))  # a smaller part is rounding
    tan = where(turn < 0, lr * radius * radius * s / norm, turn)
    tan = where(tan < 1e100, tan, 1e100)
    stays = (s == 0) | (tan == 0)
    tan, s = where(stays, 0.0, tan), where(stays, 1.0, s)
    cos = 1 / root(1 + tan * tan)
    k, b = where(stays, 1.0, radius * cos / norm), -radius * cos * tan / s
    elr = where(turn < 0, lr, tan * norm / radius / radius / s)
    good = good & (k * k + b * b + u * u < 1e77)  # they fit float32
    bad = where(good, 0.0, float("nan"))
    return k + bad, b + bad, u + bad, elr + bad, radius + bad, beta + bad


def sphere_rule(gram, radius, lr, beta, angle):
    """k, b and u of a step from the Gram matrix of its sphere; then η̃, ρ and β.

    gram: ⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩, ⟨θ,m⟩, ⟨g,m⟩, ⟨m,m⟩; radius: ρ, 0 for the norm of θ; lr: η̃, with
    `angle` φ. Gram and radius may be tensors, of many spheres. A step of length 0 gives k = 1,
    b = 0; what is not finite, or does not fit float32, nan: the sphere stays.
    """
    turn = math.tan(lr) if angle else -1.0
    if isinstance(radius, Tensor):
        lr, beta, turn = radius.new_tensor([[lr], [beta], [turn]])
        return torch.stack(_formula(*gram, radius, lr, beta, turn, torch.where, torch.sqrt))
    return _formula(*gram, radius, lr, beta, turn, _pick, math.sqrt)


def _pick(condition, a, b):
    return a if condition else b


# The tables of the kernels, made by SphereSGD._lay_out and _triton_step. A sphere is the sum of its
# lines (tensors, or rows of one), a line that of its tiles of at most BLOCK elements.
#
#     tiles      [tiles of a dtype, 5] int64: tensor, start, elements, sphere, number of the tile
#     addresses  [tensors, 3] int64: of θ, g, m; 0 for what there is not
#     spheres    [spheres, 3] int64: first tile, tiles, group
#     many       [spheres of several tiles] int64: which
#     radii      [spheres] float64: ρ
#     groups     [groups, 4] float64: η̃ or φ, β, 1 if that is an angle, 1 if at radius ρ
#     partials   [tiles, 6] float64, written: Gram matrices
#     rule       [spheres, 6] float64, written: k, b, u, η̃, ρ, β


@jit
def _where(condition, a, b):
    return tl.where(condition, a, b)


@jit
def _root(x):
    return tl.sqrt(x)


_kernel_formula = jit(_formula)


@jit
def _store_six(ptr, values):
    for i in tl.static_range(6):
        tl.store(ptr + i, values[i])


@jit
def _rule(gram, radius_ptr, group_ptr, rule_ptr):
    """`sphere_rule` of a sphere: its Gram matrix, and where its ρ, its group and its rule lie."""
    lr, beta = tl.load(group_ptr), tl.load(group_ptr + 1)
    is_angle, at_radius = tl.load(group_ptr + 2), tl.load(group_ptr + 3)
    radius = tl.load(radius_ptr) * at_radius
    turn = tl.where(is_angle != 0, tl.sin(lr) / tl.cos(lr), -1.0)
    tt, tg, gg, tm, gm, mm = gram
    rule = _kernel_formula(tt, tg, gg, tm, gm, mm, radius, lr, beta, turn, _where, _root)
    _store_six(rule_ptr, rule)
    return rule


@jit
def _load(address, start, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """n elements as float32, then 0; in 128-bit accesses where they are aligned."""
    ptr, offsets = address.to(tl.pointer_type(DTYPE)) + start, tl.arange(0, BLOCK)
    if (n == BLOCK) & (ptr.to(tl.int64) % 16 == 0):
        aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + start, 16)  # here alone
        x = tl.load(aligned + offsets)
    else:
        x = tl.load(ptr + offsets, mask=offsets < n, other=0.0)
    return x.to(tl.float32)


@jit
def _store(address, start, x, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    ptr, offsets = address.to(tl.pointer_type(DTYPE)) + start, tl.arange(0, BLOCK)
    if (n == BLOCK) & (ptr.to(tl.int64) % 16 == 0):
        aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + start, 16)
        tl.store(aligned + offsets, x.to(DTYPE))
    else:
        tl.store(ptr + offsets, x.to(DTYPE), mask=offsets < n)


@jit
def _tile_pass(tiles, addresses, spheres, radii, groups, partials, rule, FIRST: tl.constexpr,
               MOVE: tl.constexpr, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """A program per tile of one dtype. FIRST: its Gram matrix; a sphere of one tile is finished at
    once. Else, after `_rule_pass`: the rule applied to the tiles of other spheres, from the last
    on, which the cache still has. The arguments are the tables above."""
    # Which tile, of which tensor and sphere
    pid = tl.program_id(0).to(tl.int64)
    if not FIRST:
        pid = tl.num_programs(0) - 1 - pid
    tile_ptr = tiles + 5 * pid
    tensor, start, n = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    sphere, number = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)
    theta_at = tl.load(addresses + 3 * tensor)
    g_at, m_at = tl.load(addresses + 3 * tensor + 1), tl.load(addresses + 3 * tensor + 2)
    sphere_ptr, rule_ptr = spheres + 3 * sphere, rule + 6 * sphere
    alone = tl.load(sphere_ptr + 1) == 1
    n = tl.where(g_at == 0, 0, n)  # no gradient: nothing is read
    if not FIRST:
        n = tl.where(alone, 0, n)  # finished
    n_m = tl.where(m_at == 0, 0, n)

    # Load
    theta = _load(theta_at, start, n, DTYPE, BLOCK)
    g = _load(g_at, start, n, DTYPE, BLOCK)
    m = g
    if MOMENTUM:
        m = _load(m_at, start, n_m, DTYPE, BLOCK)

    # The Gram matrix and, where it is that of the whole sphere, the rule
    if FIRST:
        x, y = theta.to(tl.float64), g.to(tl.float64)
        b = tl.full([], 0, tl.float64)
        gram = tl.sum(x * x), tl.sum(x * y), tl.sum(y * y), b, b, b
        if MOMENTUM:
            z = m.to(tl.float64)
            gram = gram[0], gram[1], gram[2], tl.sum(x * z), tl.sum(y * z), tl.sum(z * z)
        _store_six(partials + 6 * number, gram)
        k, u, beta = b * float("nan"), b, b
        if alone:
            group_ptr = groups + 4 * tl.load(sphere_ptr + 2)
            k, b, u, _, _, beta = _rule(gram, radii + sphere, group_ptr, rule_ptr)
    else:
        k, b = tl.load(rule_ptr), tl.load(rule_ptr + 1)
        u, beta = tl.load(rule_ptr + 2), tl.load(rule_ptr + 5)

    # m ← βm + g + uθ, θ ← kθ + bm, and store
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
    """A program per sphere of several tiles: their Gram matrices, summed in a fixed order, BLOCK at
    a time; then the rule. The arguments are the tables above."""
    # Which sphere, and its tiles
    pid = tl.program_id(0)
    sphere = tl.load(many + pid)
    sphere_ptr = spheres + 3 * sphere
    first, count, group = tl.load(sphere_ptr), tl.load(sphere_ptr + 1), tl.load(sphere_ptr + 2)

    # Load, and sum
    columns = tl.arange(0, 8)[None, :]
    sums = tl.zeros([BLOCK, 8], tl.float64)
    for start in range(0, count, BLOCK):
        tile = start + tl.arange(0, BLOCK)[:, None]
        mask = (tile < count) & (columns < 6)
        sums += tl.load(partials + 6 * (first + tile) + columns, mask=mask, other=0.0)
    gram = ()
    for i in tl.static_range(6):
        gram += (tl.sum(tl.where(columns == i, sums, 0.0)),)

    # The rule
    _rule(gram, radii + sphere, groups + 4 * group, rule + 6 * sphere)


class SphereSGD(torch.optim.Optimizer):
    """Gradient descent on spheres at a fixed effective learning rate, or angle.

    params    tensors, or param groups with options of their own
    lr        the ELR η̃, a float or a tensor of one; every torch.optim.lr_scheduler works on it
    sphere    what shares a norm: "group", all tensors of the param group; "tensor"; "row", each
              slice tensor[i] (output filter); None: nothing, and the group is stepped by
              torch.optim.SGD and may have its options (weight_decay has no effect on a sphere)
    radius    to which the weights are scaled at once; None: the norms that they have
    momentum  β of the Riemannian heavy ball
    angle     lr is the angle φ < π/2 by which each sphere turns; what is on no sphere has the
              learning rate η̃ρ² of the spheres (the median)
    backend   "triton": kernels, at most three launches per dtype, on a GPU (on the CPU with
              TRITON_INTERPRET=1); "torch"; "auto": Triton where it can run

    A tensor without a gradient stays out of that step; a sphere that is not finite stays.
    In a CUDA graph: step once before, lr a tensor on the GPU (the last valid angle holds),
    zero_grad(set_to_none=False). Raises ValueError for a bad option, a tensor given twice, with
    holes in memory or in shards, a sphere of norm zero, a state of other shapes; RuntimeError for
    a sparse gradient.
    """

    _layouts = None  # of the parameters for which the tables were made

    def __init__(self, params, lr, sphere="group", radius=None, momentum=0.0, angle=False,
                 backend="auto"):  # fmt: skip
        self.backend = backend
        defaults = dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum, angle=angle)
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.pop("radii", None)
        try:
            _check_options(group)
            self._check()
            for name in set(group) - set(KNOWN if group["sphere"] else KNOWN + OF_SGD):
                if not name.endswith("_lr"):  # as schedulers leave
                    raise ValueError(f"{name}={group[name]!r}: there is no such option")
            if group["sphere"]:
                group["radii"] = _norms(group)
        except Exception:
            self.param_groups.pop()
            raise
        self._layouts = None
        if group["radius"]:
            group["radii"] = torch.full_like(group["radii"], group["radius"])
            self.normalize()

    def __getstate__(self):
        return super().__getstate__() | {"backend": self.backend}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._layouts = None
        for group in self._on_spheres():  # a list before version 0.3
            group["radii"] = torch.as_tensor(group.get("radii", ()), dtype=torch.float64).cpu()

    def load_state_dict(self, state_dict):
        before = dict(self.__dict__)
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                _check_options(group)
            self._check()
        except Exception:
            self.__dict__ = before  # nothing changed
            raise

    @torch.no_grad()
    def normalize(self):
        """Put the weights back on their spheres, from which something else moved them."""
        for group in self._on_spheres():
            scales = group["radii"] / _norms(group)
            for p in group["params"]:
                rows, _ = _rows(group, p)
                shape = [-1, *[1] * p.dim()][: p.dim()]
                p.mul_(scales[:rows].view(shape).to(p.device))
                if group["sphere"] != "group":
                    scales = scales[rows:]

    @torch.no_grad()
    def step(self, closure=None):
        """One step along the gradients in `.grad`. Returns the closure's loss, if any."""
        with torch.enable_grad():
            loss = closure() if closure else None
        self._apply(move=True)
        return loss

    @torch.no_grad()
    def observe(self):
        """As `step`, at the norms that the weights have, but nothing moves: for `stats`."""
        self._apply(move=False)

    @property
    def last(self):
        """What `stats` are made of: Gram matrices of tiles, and what `sphere_rule` returned."""
        if self._layouts is None or not self._on_spheres():
            raise RuntimeError("no statistics before the first step on a sphere")
        return self._table(self._partials), self._table(self._rule)

    def _table(self, sixes):
        """[n, 6] of the kernels' table, or of what the PyTorch path leaves."""
        if isinstance(sixes, Tensor):
            return sixes.clone()
        new = self._radii.new_tensor
        return torch.cat([x.T if isinstance(x, Tensor) else new([x]) for x in sixes])

    def grams(self, last=None):
        """Gram matrices (θθ, θg, gg, θm, gm, mm) of the last step, [lines, 6] float64: of each
        tensor on a sphere, or of its rows where they are spheres; 0 without a gradient. With the
        `last` of several steps, stacked: [steps, lines, 6]."""
        return _sums((last or self.last)[0], self._line_of_tile, len(self._lines))

    def stats(self, last=None):
        """Of the last step, [spheres] float64: `radius` ρ, `elr` η̃, `grad_norm` γ, `angle` φ,
        `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan without a gradient. Several steps: as `grams`."""
        last = last or self.last
        grams = _sums(self.grams(last), self._lines[:, 0], len(self._spheres))
        _, g2, angle, radial, elr, radius = _described(grams, last[1])
        return dict(
            radius=radius, elr=elr, grad_norm=radius * g2.sqrt(), angle=angle, radial=radial
        )

    def layer_stats(self, last=None):
        """The same per tensor on a sphere: its `norm` ρ_i before the step, its own ELR `elr`
        = η̃ρ²/ρ_i², `grad_norm` = ρ_i‖g_i − r_iθ_i‖, the `angle` by which it turned. Where rows are
        spheres: the tensor's norm, η̃, the norm of its rows' γ, the mean φ."""
        last = last or self.last
        sphere, tensor = self._lines.T
        tt, g2, angle, _, elr, radius = _described(self.grams(last), last[1][..., sphere, :])
        lines = torch.stack([tt, elr * radius**2 / tt, tt * g2, angle, tt**0], -1)
        tt, elr, gamma2, angle, n = _sums(lines, tensor, self._tensors).unbind(-1)
        return dict(norm=tt.sqrt(), elr=elr / n, grad_norm=gamma2.sqrt(), angle=angle / n)

    def _on_spheres(self):
        return [group for group in self.param_groups if group.get("sphere")]

    def _check(self):
        """The device, and whether to use the kernels. ValueError where no step can be made."""
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        device = pairs[0][1].device if pairs else torch.device("cpu")
        possible = triton is not None and device.type == ("cpu" if INTERPRET else "cuda")
        possible = possible and all(p.dtype in DTYPES for _, p in pairs)
        if self.backend not in ("auto", "torch", "triton" if possible else "auto"):
            what = "'auto', 'torch' or, on a GPU, not in float64, 'triton'"
            raise ValueError(f"backend={self.backend!r}: it must be {what}")
        seen = {}
        for number, (group, p) in enumerate(pairs):
            first = seen.setdefault(p.data_ptr() or p, number)
            m, problem = self.state.get(p, {}).get("momentum_buffer"), None
            if p.device != device or not p.is_floating_point():
                problem = f"is {p.dtype} on {p.device}, not float on {device}"
            elif first != number:
                problem = f"is parameter {first} again: give it once"
            elif m is not None and m.shape != p.shape:
                problem = f"has a momentum_buffer of shape {tuple(m.shape)}"
            elif group["sphere"]:
                problem = _problem(group, p)
            if problem:
                raise ValueError(f"parameter {number} of shape {tuple(p.shape)} {problem}")
        for group in self._on_spheres():
            spheres = sum(_rows(group, p)[0] for p in group["params"])
            if group["sphere"] == "group":
                spheres = min(spheres, 1)
            if len(group.get("radii", range(spheres))) != spheres:
                raise ValueError(f"a group has {spheres} spheres, but {len(group['radii'])} radii")
        return device, possible and self.backend != "torch"

    def _lay_out(self, layouts):
        """Makes the tables. PyTorch's tiles are its pieces, or rows."""
        self._device, self._use_triton = self._check()
        size = BLOCK if self._use_triton else PIECE
        tiles, spheres, lines, line_of_tile, tensors = {}, [], [], [], 0
        for i, group in enumerate(self._on_spheres()):
            whole = group["sphere"] == "row" and not self._use_triton
            for p in group["params"]:
                rows, length = _rows(group, p)
                step = max(length, size) if whole else size
                for row in range(rows):
                    if group["sphere"] != "group" or p is group["params"][0]:
                        spheres.append([len(line_of_tile), 0, i])
                    for start in range(0, max(length, 1), step):
                        place = tensors, row * length + start, min(step, length - start)
                        tile = *place, len(spheres) - 1, len(line_of_tile)
                        tiles.setdefault(p.dtype, []).append(tile)
                        line_of_tile.append(len(lines))
                        spheres[-1][1] += 1
                    lines.append((len(spheres) - 1, tensors))
                tensors += 1
        self._launches = [(str(x)[6:], self._upload(own, (-1, 5))) for x, own in tiles.items()]
        self._spheres = self._upload(spheres, (-1, 3))
        self._many = self._upload([i for i, sphere in enumerate(spheres) if sphere[1] > 1])
        self._lines = self._upload(lines, (-1, 2))  # [lines, 2] int64: sphere, tensor
        self._line_of_tile = self._upload(line_of_tile)  # [tiles] int64
        radii = [x for group in self._on_spheres() for x in group["radii"].tolist()]
        self._radii = self._upload(radii, dtype=torch.float64)
        self._partials = self._radii.new_zeros(len(line_of_tile), 6)
        self._rule = self._radii.new_zeros(len(spheres), 6)
        self._groups = self._radii.new_zeros(len(self._on_spheres()), 4)
        self._tensors, self._sgd = tensors, torch.optim.SGD([torch.zeros(0)], lr=0.0)
        self._written, self._copies, self._layouts = None, {}, layouts

    def _upload(self, values, shape=-1, dtype=torch.long):
        """A table on the device, without a wait."""
        table = torch.tensor(values, dtype=dtype).view(shape)
        if self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                cure = "step once before, zero_grad(set_to_none=False)"
                raise RuntimeError(f"a tensor moved in the capture of a CUDA graph: {cure}")
            table = table.pin_memory()
        return table.to(self._device, non_blocking=True)

    def _apply(self, move):
        apply = self._apply_now
        if torch.compiler.is_compiling():
            apply = torch.compiler.disable(apply)  # which takes a second to import
        apply(move)

    def _apply_now(self, move):
        layouts = [[_layout(p) for p in group["params"]] for group in self.param_groups]
        if layouts != self._layouts:
            self._lay_out(layouts)
        groups = []
        for group, of_group in zip(self.param_groups, layouts, strict=True):
            if group["sphere"]:
                pairs = zip(group["params"], of_group, strict=True)
                tensors = [self._vectors(group, *pair) for pair in pairs]
                lr = _lr(group, wait=not self._use_triton)
                # A part of a sphere steps on the norm that it has
                fixed = move and (group["sphere"] != "group" or all(len(x) > 1 for x in tensors))
                groups.append((group, tensors, (lr, group["momentum"], group["angle"], fixed)))
        if groups:
            step = self._triton_step if self._use_triton else self._torch_step
            step(groups, move)
        if move and len(groups) < len(self.param_groups):
            self._plain_step()

    def _vectors(self, group, p, layout):
        """θ, g and, with momentum, m, which lie in memory as θ does; without a gradient θ."""
        g = p.grad
        if g is None:
            return (p,)
        if g.layout != torch.strided:
            raise RuntimeError("a gradient is sparse: take sparse=False")
        if _layout(g) != layout:
            g = _copy(g, self._copies.setdefault(p, torch.empty_like(p)))
        if not group["momentum"]:
            return p, g
        state = self.state[p]
        m = state.get("momentum_buffer")
        if m is None:
            m = state["momentum_buffer"] = torch.zeros_like(p)
        elif _layout(m) != layout:
            m = state["momentum_buffer"] = _copy(m, torch.empty_like(p))
        return p, g, m

    def _torch_step(self, groups, move):
        """Gram matrix and rule of a sphere are numbers or, of a group's rows at once, [6, rows]."""
        self._partials, self._rule = [], []
        for group, tensors, (lr, beta, angle, fixed) in groups:
            for pieces, radius in _spheres(group, tensors, self._device):
                grams = [_gram(beta, *vectors) for vectors in pieces]
                gram = grams[0]
                if group["sphere"] == "row":
                    gram = torch.cat(grams, dim=1)
                elif len(grams) > 1:
                    gram = [sum(entry) for entry in zip(*grams, strict=True)]
                rule = sphere_rule(gram, radius * fixed, lr, beta, angle)
                self._partials += grams
                self._rule.append(rule)
                rules = [rule] * len(pieces)
                if group["sphere"] == "row":
                    rules = rule.split([len(vectors[0]) for vectors in pieces], dim=1)
                for own, vectors in zip(rules[::-1], pieces[::-1], strict=True) if move else ():
                    _move(own, *vectors)

    def _triton_step(self, groups, move):
        numbers, addresses = [], []
        for _, tensors, (lr, *rest) in groups:
            numbers.append([0.0 if isinstance(lr, Tensor) else lr, *rest])
            addresses += [[*(x.data_ptr() for x in vectors), 0, 0][:3] for vectors in tensors]
        before = self._groups
        if self._written != (numbers, addresses):  # into new memory: a graph may read the old
            self._groups = self._upload(numbers, (-1, 4), torch.float64)
            self._addresses = self._upload(addresses, (-1, 3))
            self._written = numbers, addresses
        for i, (_, _, (lr, _, angle, _)) in enumerate(groups):
            if isinstance(lr, Tensor):
                if angle:  # or the last valid one
                    lr = torch.where(lr >= math.pi / 2, before[i, 0], lr)
                self._groups[i, 0] = lr
        tables = self._spheres, self._radii, self._groups, self._partials, self._rule
        momentum, many = any(beta for _, beta, *_ in numbers), len(self._many)
        how = dict(MOVE=move, MOMENTUM=momentum, BLOCK=BLOCK, num_warps=WARPS)
        with torch.cuda.device_of(self._radii):  # else Triton launches on the current one
            for first in (True, False) if move and many else (True,):
                for dtype, tiles in self._launches:
                    more = dict(FIRST=first, DTYPE=getattr(tl, dtype), **how)
                    _tile_pass[(len(tiles),)](tiles, self._addresses, *tables, **more)
                if first and many:
                    _rule_pass[(many,)](self._many, *tables, BLOCK=1024, num_warps=WARPS)
        if self._radii.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured = dict(vars(self))  # its memory stays as long as this optimizer

    def _plain_step(self):
        """torch.optim.SGD's, without hooks: this optimizer's have been called."""
        plain = []
        for group in self.param_groups:
            if group["sphere"]:
                continue
            lr = _lr(group, wait=False)
            if group["angle"]:
                rule = self.last[1]
                lr = (rule[:, 3] * rule[:, 4] ** 2).nanmedian().nan_to_num(0).float()
            on_gpu = isinstance(lr, Tensor) and lr.is_cuda
            lr = lr.squeeze() if on_gpu else float(lr)
            plain.append(self._sgd.defaults | group | dict(lr=lr, fused=on_gpu))
        self._sgd.param_groups, self._sgd.state = plain, self.state
        unwrap(torch.optim.SGD.step)(self._sgd)


class watch:
    """Measures γ and the angle φ of each step of any optimizer, jointly and of each tensor.

    optimizer  of torch, also as Accelerate and Lightning wrap it
    params     the scale-invariant weights, or pairs (name, tensor); None: all of two or more
               dimensions

    `row()` returns the steps so far and the means since the last call; `layers` then has those of
    the tensors. `last`, [2, 1 + tensors] float64, is γ and φ of the last step, first jointly. The
    gradient is that of the step: clipped, unscaled, with a closure that of its first call; a tensor
    without one stays out. It takes a copy of the weights, and a pass over them before and after
    each step. Raises ValueError for no tensors, or shards.
    """

    def __init__(self, optimizer, params=None):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if params is None:
            params = [p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1]
        pairs = [x if isinstance(x, tuple) else (str(i), x) for i, x in enumerate(params)]
        if not pairs or any(hasattr(p, "__tensor_flatten__") for _, p in pairs):
            raise ValueError("params: watch takes at least one tensor, and no shards")
        self.names, self.params = zip(*pairs, strict=True)
        self.last, self.layers, self._steps = None, [], 0
        self._sums = torch.zeros(3, 1 + len(pairs), dtype=torch.float64).to(pairs[0][1].device)
        before = optimizer.register_step_pre_hook(self._before)
        self.hooks = before, optimizer.register_step_post_hook(self._after)  # each has remove()

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs):
        self._old, self._gram = [p.clone() for p in self.params], None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return self._observe(optimizer)

        def observed():
            loss = closure()
            if self._gram is None:
                self._observe(optimizer)
            return loss

        return args[:1], kwargs | {"closure": observed}

    @torch.no_grad()
    def _observe(self, optimizer):
        """⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩ and 1 of each tensor; 0 without a gradient."""
        self._gram = self._sums.new_zeros(4, len(self.params))
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler's, where the step unscales
        for i, p in enumerate(self.params):
            if p.grad is not None:
                x, g = p.double().reshape(-1), p.grad.to_dense().double().reshape(-1)
                g = g if scale is None else g / scale
                gram = torch.dot(x, x), torch.dot(x, g), torch.dot(g, g), g.new_ones(())
                self._gram[:, i] = torch.stack(gram)

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs):
        moves = torch.zeros_like(self._gram[:2])
        for i, (p, old) in enumerate(zip(self.params, self._old, strict=True)):
            old = old.double().reshape(-1)
            d = p.double().reshape(-1) - old
            moves[:, i] = torch.stack([torch.dot(old, d), torch.dot(d, d)])
        gram = torch.cat([self._gram, moves * self._gram[3]])
        tt, tg, gg, n, td, dd = torch.cat([gram.sum(1, keepdim=True), gram], dim=1)
        gamma = (tt * gg - tg * tg).clamp(min=0).sqrt()
        angle = torch.atan2((tt * dd - td * td).clamp(min=0).sqrt(), tt + td)
        self.last = torch.stack([gamma, angle])
        if getattr(optimizer, "found_inf", None) is not None:  # then GradScaler skips the step
            n = n * (optimizer.found_inf == 0)
        self._sums += torch.where(n > 0, torch.stack([gamma, angle, tt**0]), 0.0)

    def row(self):
        sums = self._sums.tolist()
        self._sums.zero_()
        self._steps += int(sums[2][0])
        rows = []
        for gamma, angle, n in zip(*sums, strict=True):
            rows.append(dict(grad_norm=gamma / n, angle=angle / n) if n else {})
        self.layers = [dict(layer=x) | row for x, row in zip(self.names, rows[1:], strict=True)]
        return dict(step=self._steps) | rows[0]


def _check_options(group):
    """ValueError for an option of a param group that it cannot have."""
    sphere, radius = group.get("sphere", "missing"), group.get("radius", "missing")
    momentum = group.get("momentum", "missing")
    if sphere not in ("group", "tensor", "row", None):
        raise ValueError(f"sphere={sphere!r}: it must be 'group', 'tensor', 'row' or None")
    if radius is not None and not (isinstance(radius, Real) and sphere and 0 < radius < math.inf):
        raise ValueError(f"radius={radius!r}: it must be positive, on a sphere")
    if not (isinstance(momentum, Real) and 0 <= momentum < 1):
        raise ValueError(f"momentum={momentum!r}: it must be in [0, 1)")
    if math.isnan(_lr(group)):
        raise ValueError(f"lr={group['lr']!r}: it must be a number")


def _lr(group, wait=True):
    """η̃ or φ as a number; on a GPU, where one does not wait, the tensor."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.is_cuda and not wait:
        return lr
    number = isinstance(lr, Real) or isinstance(lr, Tensor) and lr.numel() == 1
    value = float(lr) if number else -1.0
    if value < 0 or value >= (math.pi / 2 if group.get("angle") else math.inf):  # not if it is nan
        raise ValueError(f"lr={lr!r}: it must be finite, ≥ 0 (an angle below π/2)")
    return value


def _problem(group, p):
    """Why a tensor cannot be on a sphere, or None."""
    order = sorted(range(p.dim()), key=p.stride, reverse=True)  # as they lie in memory
    if group["sphere"] == "row":
        order.sort(key=bool)  # row after row
    if hasattr(p, "__tensor_flatten__"):
        return f"is a {type(p).__name__}: a sphere takes plain tensors, no shards"
    if not p.permute(order).is_contiguous():
        return "has holes in memory, or scattered rows: clone it"
    return None


def _layout(x):
    return x.dtype, x.device, x.shape, x.stride()


def _copy(x, new):
    if x.shape != new.shape:
        what = f"a gradient or momentum_buffer of shape {tuple(x.shape)}"
        raise ValueError(f"{what} for a parameter of shape {tuple(new.shape)}")
    return new.copy_(x)


def _rows(group, p):
    """Lines of a tensor, and their length."""
    rows = len(p) if group["sphere"] == "row" and p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def _norms(group):
    """Of the spheres, [spheres] float64 on the CPU."""
    squares = [p.double().square().reshape(_rows(group, p)).sum(1).cpu() for p in group["params"]]
    elements = [p.numel() for p in group["params"]]
    if group["sphere"] == "group" and squares:
        squares, elements = [torch.cat(squares).sum(0, keepdim=True)], [sum(elements)]
    for i, square in enumerate(squares):
        if elements[i] and not (square.isfinite() & (square > 0)).all():
            raise ValueError(f"the sphere of tensor {i} has norm zero, or is not finite")
    return torch.cat([torch.zeros(0, dtype=torch.float64), *squares]).sqrt()


def _sums(x, index, n):
    """x [..., m, k] summed into n rows, [..., n, k]: row i into row index[i]."""
    return x.new_zeros(*x.shape[:-2], n, x.shape[-1]).index_add(-2, index, x)


def _rest(gram, beta):
    """‖new m‖² (β = 0: ‖g_t‖²), and the sum of squares of which the projection leaves this."""
    tt, tg, gg, tm, gm, mm = gram
    rest = gg - tg * tg / tt + 2 * beta * (gm - tm * tg / tt) + beta * beta * (mm - tm * tm / tt)
    return rest, gg + beta * beta * mm


def _described(gram, rule):
    """‖θ‖², ‖g_t‖², φ, radial, η̃, ρ from Gram matrices and what the rule made, [..., 6] each."""
    tt, tg, gg, tm, _, _ = gram = torch.where(gram[..., :1] > 0, gram, math.nan).unbind(-1)
    k, b, u, elr, radius, beta = rule.unbind(-1)
    g2, whole = _rest(gram, 0)
    g2 = torch.where(g2 > 1e-14 * whole, g2, 0 * g2)
    s2, _ = _rest(gram, beta)
    along = (tg + beta * tm) / tt + u
    angle = torch.atan2(b.abs() * s2.clamp(min=0).sqrt(), tt.sqrt() * (k + b * along))
    return tt, g2, angle, tg / (tt * gg).sqrt().clamp(min=1e-300), elr, radius


def _spheres(group, tensors, device):
    """Per sphere (θ, g, m) in pieces, vectors as they lie in memory, and its radius; where rows are
    spheres, pieces [rows, length] of all of them, and their radii."""
    spheres = []
    for vectors in tensors:
        rows, length = _rows(group, vectors[0])
        shape, strides, step = (length,), (1,), PIECE
        if group["sphere"] == "row":
            shape, strides, step = (rows, length), (length, 1), max(1, PIECE // max(length, 1))
        pieces = [[x.as_strided(shape, strides) for x in vectors]]
        if rows * length > PIECE:
            pieces = list(zip(*(x.split(step) for x in pieces[0]), strict=True))
        spheres.append(pieces)
    if group["sphere"] == "tensor":
        return zip(spheres, group["radii"].tolist(), strict=True)
    if not spheres:
        return []
    radii = group["radii"]
    return [(sum(spheres, []), radii.item() if group["sphere"] == "group" else radii.to(device))]


def _gram(beta, theta, *others):
    """The Gram matrix of (θ, g, m) as in `sphere_rule`; 0 without a gradient."""
    vectors = [theta, *others] if others else [0 * theta]
    if theta.dim() == 2:
        return _wide_gram(vectors)
    small = len(theta) <= SMALL or not others
    if small or theta.element_size() < 4:
        vectors = [x.double() if small else x.float() for x in vectors]
    gram = [torch.dot(x, y).item() for i, x in enumerate(vectors) for y in vectors[: i + 1]]
    gram += [0.0] * (6 - len(gram))
    if small or _exact(gram, 0) and _exact(gram, beta):
        return gram
    return _wide_gram(vectors).tolist()


def _wide_gram(vectors):
    """In float64, [6, ...]; summed by pairs, unlike torch.dot."""
    vectors = [x.double() for x in vectors]
    gram = [(x * y).sum(-1) for i, x in enumerate(vectors) for y in vectors[: i + 1]]
    return torch.stack(gram + [0 * gram[0]] * (6 - len(gram)))


def _exact(gram, beta):
    """Whether float32 sums are good enough: not too small, nor mostly cancelled."""
    rest, whole = _rest(gram, beta) if min(gram[0], gram[2]) > 1e-25 else (0, 0)
    return rest > 1e-2 * whole


def _move(rule, theta, g=None, m=None):
    """m ← βm + g + uθ, θ ← kθ + bm, in place; nothing where k is nan."""
    k, b, u, _, _, beta = rule
    rows = theta.dim() == 2
    if g is None or not rows and math.isnan(k):
        return
    if rows or theta.element_size() < 4:  # in float32, rounded once
        wide = torch.promote_types(theta.dtype, torch.float32)
        factors = [torch.as_tensor(x, dtype=wide, device=theta.device) for x in (k, b, u, beta)]
        k, b, u, beta = (x[:, None] for x in factors) if rows else factors
        x = theta.to(wide)
        new = torch.addcmul(g.to(wide), x, u)
        if m is not None:
            new.addcmul_(m.to(wide), beta)
            m.copy_(torch.where(k.isnan(), m, new))
        theta.copy_(torch.where(k.isnan(), x, (k * x).addcmul_(new, b)))
    elif m is None:
        theta.mul_(k + b * u).add_(g, alpha=b)
    else:
        m.mul_(beta).add_(g).add_(theta, alpha=u)
        theta.mul_(k).add_(m, alpha=b)


if __name__ == "__main__":
    print("SphereSGD: steps on a sphere at a fixed ELR or angle. Copy this one file.")
    print("Is it right on this machine? python -m lab.bench check")
