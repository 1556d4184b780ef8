"""Train scale-invariant weights on a sphere at a fixed effective learning rate (ELR).

    optimizer = SphereSGD(weights_before_normalization_layers, lr=0.01)              # the ELR
    optimizer = SphereSGD(weights_before_normalization_layers, lr=0.05, angle=True)  # radians

A sphere is a set of tensors that share one norm. θ is their concatenation, ρ the radius (fixed),
g the gradient, m the momentum (without it β = 0), η̃ the ELR. One step is

    r = ⟨θ,g⟩/‖θ‖²      g_t = g − rθ                   projection on the tangent space
    q = ⟨θ,m⟩/‖θ‖²      m ← β(m − qθ) + g_t            Riemannian heavy ball
    θ ← ρ (θ − η̃ρ²m) / ‖θ − η̃ρ²m‖                     step and renormalization
    γ = ρ‖g_t‖          tan φ = η̃ρ²‖m‖/‖θ‖            effective gradient norm, angular step

With angle=True φ is given and η̃ follows. Every scalar in the step is a function of the Gram matrix
of (θ, g, m), whose six entries are plain sums: tiles and tensors add up. From them follow three
numbers per sphere (`sphere_rule`), and then m ← βm + g + uθ and θ ← kθ + bm.

Source: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695). Needs torch, and Triton for its kernels.
"""

import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.sgd import sgd

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS: PyTorch does the step there
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks when a kernel is defined
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BLOCK, WARPS = 4096, 8  # elements of a tile, and the warps that work on it
PIECE = 1 << 18  # elements of a tile in PyTorch: its float32 sums stay accurate
SMALL = 1024  # up to here they are in float64: few dimensions make nearly radial gradients
TINY = 1e-14  # a part of a sum of squares that is smaller is rounding


def sphere_rule(gram: list, radius: float, lr: float, beta: float, angle: bool) -> list[float]:
    """The coefficients and the statistics of a step from the sphere's Gram matrix.

    gram is ⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩, ⟨θ,m⟩, ⟨g,m⟩, ⟨m,m⟩; radius ρ, 0 for the norm that θ has; lr η̃,
    or with `angle` φ. Returns k, b, u, γ, tan φ, ⟨θ,g⟩/(‖θ‖‖g‖), η̃, ρ, β. A step of length 0 gives
    k = 1, b = 0; a Gram matrix that is not finite, or of no weights at all, nan.
    """
    tt, tg, gg, tm, gm, mm = gram
    if not (tt > 0 and math.isfinite(sum(gram))):
        return [math.nan] * 9
    norm, r, q = math.sqrt(tt), tg / tt, tm / tt
    radius = radius or norm
    g2 = gg - r * tg  # ‖g_t‖²
    g2 = g2 if g2 > TINY * gg else 0.0
    s2 = g2 + 2 * beta * (gm - q * tg) + beta * beta * (mm - q * tm)  # ‖new m‖²
    s = math.sqrt(s2) if s2 > TINY * (gg + beta * beta * mm) else 0.0
    tan = math.tan(lr) if angle else lr * radius * radius * s / norm
    tan = min(tan, 1e100)
    k, b, elr = 1.0, 0.0, 0.0 if angle else lr
    if s == 0 or tan == 0:
        tan = 0.0
    else:
        cos = 1 / math.sqrt(1 + tan * tan)
        k = radius * cos / norm
        b = -radius * cos * tan / s
        elr = tan * norm / (radius * radius * s) if angle else lr
    radial = tg / (norm * math.sqrt(gg)) if gg > 0 else 0.0
    return [k, b, -(r + beta * q), radius * math.sqrt(g2), tan, radial, elr, radius, beta]


if triton is not None:

    @triton.jit
    def _rule(tt, tg, gg, tm, gm, mm, settings, out):
        """`sphere_rule`, with ρ, lr, β, angle read from device memory and its results written."""
        radius, lr = tl.load(settings), tl.load(settings + 1)
        beta, angle = tl.load(settings + 2), tl.load(settings + 3)
        good = ((tt + tg + gg + tm + gm + mm) * 0.0 == 0.0) & (tt > 0)
        bad = tl.where(good, 0.0, float("nan"))
        tt = tl.where(good, tt, 1.0)
        norm, r, q = tl.sqrt(tt), tg / tt, tm / tt
        radius = tl.where(radius == 0, norm, radius)
        g2 = gg - r * tg
        g2 = tl.where(g2 > 1e-14 * gg, g2, 0.0)
        s2 = g2 + 2 * beta * (gm - q * tg) + beta * beta * (mm - q * tm)
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
        u = -(r + beta * q) + bad
        tl.store(out, k)
        tl.store(out + 1, b)
        tl.store(out + 2, u)
        tl.store(out + 3, radius * tl.sqrt(g2) + bad)
        tl.store(out + 4, tan + bad)
        tl.store(out + 5, tg / (norm * tl.sqrt(tl.where(gg > 0, gg, 1.0))) + bad)
        tl.store(out + 6, tl.where(angle != 0, tan * norm / (radius * radius * s), lr) + bad)
        tl.store(out + 7, radius + bad)
        tl.store(out + 8, beta + bad)
        return k, b, u, beta

    @triton.jit
    def _load(address, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
        """n elements at this address as float32, 0 beyond; 128 bits at a time where that can be."""
        at, offsets = address.to(tl.pointer_type(DTYPE)), tl.arange(0, BLOCK)
        if (n == BLOCK) & (address % 16 == 0):
            x = tl.load(tl.multiple_of(at, 16) + offsets)
        else:
            x = tl.load(at + offsets, mask=offsets < n, other=0.0)
        return x.to(tl.float32)

    @triton.jit
    def _store(address, x, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
        at, offsets = address.to(tl.pointer_type(DTYPE)), tl.arange(0, BLOCK)
        if (n == BLOCK) & (address % 16 == 0):
            tl.store(tl.multiple_of(at, 16) + offsets, x.to(DTYPE))
        else:
            tl.store(at + offsets, x.to(DTYPE), mask=offsets < n)

    @triton.jit
    def _tile(line, addresses, DTYPE: tl.constexpr):
        """Where θ, g and m of a tile are, its elements, those of m (0: no momentum), its sphere."""
        at = addresses + 3 * tl.load(line)
        theta, g, m = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        offset = tl.load(line + 1) * (DTYPE.primitive_bitwidth // 8)
        n = tl.where(g == 0, 0, tl.load(line + 2))  # no gradient: the tensor stays out of this step
        n_m = tl.where(m == 0, 0, n)
        return theta + offset, g + offset, m + offset, n, n_m, tl.load(line + 3)

    @triton.jit
    def _update(theta, g, m, theta_at, m_at, n, n_m, k, b, u, beta,
                MOMENTUM: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """m ← βm + g + uθ, θ ← kθ + bm."""
        g += u.to(tl.float32) * theta
        if MOMENTUM:
            g += beta.to(tl.float32) * m
            _store(m_at, g, n_m, DTYPE, BLOCK)
        if b != 0:
            theta = k.to(tl.float32) * theta + b.to(tl.float32) * g
            _store(theta_at, theta, n, DTYPE, BLOCK)

    @triton.jit
    def _gram_pass(tiles, addresses, ranges, settings, partials, rule, MOMENTUM: tl.constexpr,
                   MOVE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """First, per tile: its Gram matrix. A sphere that is this one tile is finished at once."""
        line = tiles + 5 * tl.program_id(0).to(tl.int64)
        theta_at, g_at, m_at, n, n_m, sphere = _tile(line, addresses, DTYPE)
        theta, g = _load(theta_at, n, DTYPE, BLOCK), _load(g_at, n, DTYPE, BLOCK)
        x, y = theta.to(tl.float64), g.to(tl.float64)  # so that the products are exact
        tt, tg, gg = tl.sum(x * x), tl.sum(x * y), tl.sum(y * y)
        m, tm, gm, mm = g, tt * 0.0, tt * 0.0, tt * 0.0
        if MOMENTUM:
            m = _load(m_at, n_m, DTYPE, BLOCK)
            z = m.to(tl.float64)
            tm, gm, mm = tl.sum(x * z), tl.sum(y * z), tl.sum(z * z)
        out = partials + 6 * tl.load(line + 4)
        tl.store(out, tt)
        tl.store(out + 1, tg)
        tl.store(out + 2, gg)
        tl.store(out + 3, tm)
        tl.store(out + 4, gm)
        tl.store(out + 5, mm)
        if tl.load(ranges + 2 * sphere + 1) - tl.load(ranges + 2 * sphere) == 1:
            own = settings + 4 * sphere
            k, b, u, beta = _rule(tt, tg, gg, tm, gm, mm, own, rule + 9 * sphere)
            if MOVE and k == k:  # not nan
                _update(theta, g, m, theta_at, m_at, n, n_m, k, b, u, beta, MOMENTUM, DTYPE, BLOCK)

    @triton.jit
    def _rule_pass(many, ranges, settings, partials, rule, BLOCK: tl.constexpr):
        """Second, per sphere of several tiles: their Gram matrices summed in a fixed order."""
        sphere = tl.load(many + tl.program_id(0))
        start, end = tl.load(ranges + 2 * sphere), tl.load(ranges + 2 * sphere + 1)
        tt = tl.zeros([BLOCK], tl.float64)
        tg, gg, tm, gm, mm = tt, tt, tt, tt, tt
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            here, mask = partials + 6 * at, at < end
            tt += tl.load(here, mask=mask, other=0.0)
            tg += tl.load(here + 1, mask=mask, other=0.0)
            gg += tl.load(here + 2, mask=mask, other=0.0)
            tm += tl.load(here + 3, mask=mask, other=0.0)
            gm += tl.load(here + 4, mask=mask, other=0.0)
            mm += tl.load(here + 5, mask=mask, other=0.0)
        _rule(tl.sum(tt), tl.sum(tg), tl.sum(gg), tl.sum(tm), tl.sum(gm), tl.sum(mm),
              settings + 4 * sphere, rule + 9 * sphere)  # fmt: skip

    @triton.jit
    def _move_pass(tiles, addresses, rule, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
        """Third, per tile of those spheres: the update. Backwards, for what the cache still has."""
        line = tiles + 5 * (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
        theta_at, g_at, m_at, n, n_m, sphere = _tile(line, addresses, DTYPE)
        own = rule + 9 * sphere
        k, b, u = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        if k == k:  # not nan
            theta, g = _load(theta_at, n, DTYPE, BLOCK), _load(g_at, n, DTYPE, BLOCK)
            m, beta = g, tl.load(own + 8)
            if MOMENTUM:
                m = _load(m_at, n_m, DTYPE, BLOCK)
            _update(theta, g, m, theta_at, m_at, n, n_m, k, b, u, beta, MOMENTUM, DTYPE, BLOCK)


class SphereSGD(torch.optim.Optimizer):
    """Stochastic gradient descent on spheres, at a fixed effective learning rate or angle.

    params    tensors, or param groups, each of which may set its own options
    lr        the ELR η̃ ≥ 0, a float or a 0-d tensor; every torch.optim.lr_scheduler works on it
    sphere    "group": all tensors of the param group on one joint sphere, as in the paper;
              "tensor": each tensor a sphere; "row": each slice tensor[i] (output filter) a sphere;
              None: plain SGD at the learning rate lr, for what is not scale invariant
    radius    of every sphere, to which the weights are scaled at once; None: the norms they have
    momentum  β in [0, 1) of the Riemannian heavy ball (of the ordinary one where sphere=None)
    angle     lr is the angle φ in [0, π/2) by which a step turns each sphere. A group on no sphere
              follows at the learning rate η̃ρ² of the spheres in that step (the median)
    backend   "triton": fused kernels, at most three launches per type of weights (on a GPU; on the
              CPU under TRITON_INTERPRET=1); "torch"; "auto": Triton where it can run

    A tensor without a gradient stays out of that step; the others of its sphere keep their norm. A
    sphere whose weights or gradient are not finite stays, and `stats()` says nan. In a CUDA graph:
    step once before the capture, lr as a tensor, zero_grad(set_to_none=False). Raises ValueError
    for a bad option, a sphere of norm zero, a parameter with holes in memory; RuntimeError for a
    sparse gradient.
    """

    def __init__(self, params: Iterable, lr: float | Tensor, sphere: str | None = "group",
                 radius: float | None = None, momentum: float = 0.0, angle: bool = False,
                 backend: str = "auto"):  # fmt: skip
        self.backend = backend
        defaults = dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum, angle=angle)
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        _undecorated(torch.optim.Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        try:
            self._use_triton = _check(self.param_groups, self.backend)
            if group["sphere"]:
                group["radii"] = _norms(group)
                if group["radius"]:
                    group["radii"].fill_(group["radius"])
                    _normalize(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._tensors = None  # laid out at the next step

    def state_dict(self) -> dict:
        return _undecorated(torch.optim.Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group in self._on_spheres():  # torch moves the state of tensors, but not of groups
            group["radii"] = group["radii"].to(group["params"][0].device)
        self._tensors = None

    def _on_spheres(self) -> list[dict]:
        return [group for group in self.param_groups if group["sphere"]]

    @torch.no_grad()
    def normalize(self) -> None:
        """Put every sphere back on its radius, after weights were averaged or filled with noise."""
        for group in self._on_spheres():
            _normalize(group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One step along the gradients in `.grad`. Returns the loss of the closure, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply(move=True)
        return loss

    @torch.no_grad()
    def measure(self) -> None:
        """Find what a step would report, at the norms that the weights have, and move nothing."""
        self._apply(move=False)

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """What the last step left, to be kept for `stats` and `layer_stats`: the Gram matrices of
        its tiles, and per sphere what `sphere_rule` returns."""
        if not self._tensors or self._rule is None:
            raise RuntimeError("no statistics yet: they come with the first step over a sphere")
        if self._use_triton:  # whose kernels write every step into the same tables
            return self._partials.clone(), self._rule.clone()
        return self._partials, self._rule

    def stats(self, steps: list[tuple] | None = None) -> dict[str, Tensor]:
        """Of the last step, per sphere in the order of the param groups (float64, on the device):
        `radius` ρ, `elr` η̃, `grad_norm` γ, `angle` φ in radians, `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan
        where there was no gradient. Of several steps, each as `last` gave it: [steps, spheres]."""
        rule = self.last[1] if steps is None else torch.stack([rule for _, rule in steps])
        gamma, tan, radial, elr, radius = rule[..., 3:8].unbind(-1)
        return dict(radius=radius, elr=elr, grad_norm=gamma, angle=tan.atan(), radial=radial)

    def layer_stats(self, steps: list[tuple] | None = None) -> dict[str, Tensor]:
        """The same per tensor on a sphere: its `norm` ρ_i before the step, its individual ELR `elr`
        = η̃ρ²/ρ_i², `grad_norm` = ρ_i‖g_i − r_iθ_i‖, and the `angle` by which the step turns it; nan
        for a tensor without a gradient. Where rows are spheres: the tensor's norm, η̃, the norm of
        its rows' γ, the mean of their φ."""

        def sums(x: Tensor, lengths: Tensor) -> Tensor:
            return torch.segment_reduce(x, "sum", lengths=lengths, axis=0, unsafe=True)

        partials, rule = zip(*([self.last] if steps is None else steps), strict=True)
        gram = sums(torch.stack(partials, 1), self._pieces)
        k, b, u, _, _, _, elr, radius, beta = torch.stack(rule, 1)[self._owner].unbind(-1)
        tt, tg, gg, tm, gm, mm = torch.where(gram[..., :1] > 0, gram, math.nan).unbind(-1)
        g2 = (gg - tg * tg / tt).clamp(min=0)
        s2 = g2 + 2 * beta * (gm - tm * tg / tt) + beta**2 * (mm - tm * tm / tt)
        along = (tg + beta * tm) / tt + u
        angle = torch.atan2(b.abs() * s2.clamp(min=0).sqrt(), tt.sqrt() * (k + b * along))
        lines = torch.stack([tt, elr * radius**2 / tt, tt * g2, angle], -1)
        lines = sums(lines, self._rows).transpose(0, 1)
        tt, elr, gamma2, angle = (lines[0] if steps is None else lines).unbind(-1)
        elr, angle = elr / self._rows, angle / self._rows
        return dict(norm=tt.sqrt(), elr=elr, grad_norm=gamma2.sqrt(), angle=angle)

    def _lay_out(self) -> None:
        """What does not change from step to step. The Gram matrix of a sphere is a sum over its
        lines (tensors, or rows of one), that of a line over its tiles: (tensor, offset, elements,
        sphere, own number)."""
        size = BLOCK if self._use_triton else PIECE
        self._tensors, self._tiles, pieces, owner, sphere = [], [], [], [], 0
        for group in self._on_spheres():
            joint = group["sphere"] == "group"
            for p in group["params"]:
                rows, length = _rows(group, p)
                for row in range(rows):
                    owner.append(sphere)
                    pieces.append(-(-length // size))
                    for at in range(0, length, size):
                        tile = len(self._tensors), row * length + at, min(size, length - at), sphere
                        self._tiles.append((*tile, len(self._tiles)))
                    sphere += 0 if joint else 1
                self._tensors.append((group, p))
            sphere += 1 if joint else 0
        self._spheres, self._rule = sphere, None
        self._device = self.param_groups[0]["params"][0].device
        self._rows = self._table([_rows(group, p)[0] for group, p in self._tensors])
        self._pieces, self._owner = self._table(pieces), self._table(owner)
        if self._use_triton:
            self._lay_out_tables()

    def _table(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self._device)

    def _lay_out_tables(self) -> None:
        counts = torch.bincount(self._table([t[3] for t in self._tiles]), minlength=self._spheres)
        ends = counts.cumsum(0)
        self._ranges, self._many = torch.stack([ends - counts, ends], 1), counts.gt(1).nonzero()
        self._launches = []  # per type of weights: all tiles, and those of spheres of several
        for dtype, name in DTYPES.items():
            tiles = [tile for tile in self._tiles if self._tensors[tile[0]][1].dtype == dtype]
            if tiles:
                tiles = self._table(tiles)
                self._launches.append((getattr(tl, name), tiles, tiles[counts[tiles[:, 3]] > 1]))
        new = dict(dtype=torch.float64, device=self._device)
        self._partials = torch.zeros(len(self._tiles), 6, **new)
        self._rule = torch.full((self._spheres, 9), math.nan, **new)
        self._settings = torch.zeros(self._spheres, 4, **new)
        self._addresses = self._table([0] * 3 * len(self._tensors))
        self._written, self._known, self._copies = {}, None, {}

    def _apply(self, move: bool) -> None:
        if self._tensors is None:
            self._lay_out()
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor) and not 0 <= group["lr"] < math.inf:
                raise ValueError(f"lr is {group['lr']}: it must be finite and not negative")
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError("a gradient is sparse: make the embedding with sparse=False")
                if p.grad is not None and group["momentum"] and not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if self._tensors and self._use_triton:
            self._triton_step(move)
        elif self._tensors:
            self._torch_step(move)
        for group in self.param_groups if move else ():
            if group["sphere"] is None:
                self._plain_step(group)

    def _momentum(self, group: dict, p: Tensor) -> Tensor | None:
        return self.state[p].get("momentum_buffer") if group["momentum"] else None

    def _torch_step(self, move: bool) -> None:
        """The three passes in PyTorch, sums and rule in Python: for the CPU, and for float64."""
        tensors = []
        for group, p in self._tensors:
            g = p.grad
            if g is not None and g.stride() != p.stride():
                g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            tensors.append((p, g, self._momentum(group, p), group["momentum"]))
        grams, partials, moves, rule = [[0.0] * 6] * self._spheres, [], [], []
        for tensor, at, n, sphere, _ in self._tiles:
            p, g, m, beta = tensors[tensor]
            gram = [0.0] * 6  # without a gradient: the tensor stays out of this step
            if g is not None:
                theta, g = _stretch(p, at, n), _stretch(g, at, n)
                m = None if m is None else _stretch(m, at, n)
                gram = _gram(theta, g, m)
                moves.append((sphere, theta, g, m, beta))
            grams[sphere] = [a + b for a, b in zip(grams[sphere], gram, strict=True)]
            partials.append(gram)
        for group in self._on_spheres():
            how, free = (float(group["lr"]), group["momentum"], group["angle"]), _free(group, move)
            for radius in group["radii"].tolist():
                rule.append(sphere_rule(grams[len(rule)], 0.0 if free else radius, *how))
        new = dict(dtype=torch.float64, device=self._device)
        self._partials, self._rule = torch.tensor(partials, **new), torch.tensor(rule, **new)
        for sphere, theta, g, m, beta in reversed(moves) if move else ():
            k, b, u = rule[sphere][:3]
            if not math.isnan(k):
                _move(theta, g, m, beta, k, b, u)

    def _triton_step(self, move: bool) -> None:
        """The three passes in the kernels. New addresses cost one small upload."""
        first = 0
        for i, group in enumerate(self._on_spheres()):
            lr, here = group["lr"], slice(first, first + len(group["radii"]))
            first, free = here.stop, _free(group, move)
            now = 0.0 if isinstance(lr, Tensor) else lr, group["momentum"], float(group["angle"])
            if self._written.get(i) != (now, free):
                self._settings[here, 0] = 0.0 if free else group["radii"]
                self._settings[here, 1:] = torch.tensor(now, dtype=torch.float64)
                self._written[i] = now, free
            if isinstance(lr, Tensor):
                self._settings[here, 1] = lr
        addresses = []
        for group, p in self._tensors:
            g, m = p.grad, self._momentum(group, p)
            if g is not None and (g.dtype != p.dtype or g.stride() != p.stride()):
                g = self._copies.setdefault(p, torch.empty_like(p)).copy_(g)
            addresses += [0 if x is None or g is None else x.data_ptr() for x in (p, g, m)]
        if addresses != self._known:
            on_gpu = self._device.type == "cuda"
            if on_gpu and torch.cuda.is_current_stream_capturing():
                what = "a tensor moved while a CUDA graph was captured"
                raise RuntimeError(f"{what}: step once before, and zero_grad(set_to_none=False)")
            new = torch.tensor(addresses, pin_memory=on_gpu)
            self._addresses.copy_(new, non_blocking=True)
            self._known = addresses
        momentum = any(group["momentum"] for group in self._on_spheres())
        how = dict(MOMENTUM=momentum, BLOCK=BLOCK, num_warps=WARPS)
        tables = self._ranges, self._settings, self._partials, self._rule
        for dtype, tiles, _ in self._launches:
            grid, more = (len(tiles),), dict(MOVE=move, DTYPE=dtype, **how)
            _gram_pass[grid](tiles, self._addresses, *tables, **more)
        if len(self._many):
            _rule_pass[(len(self._many),)](self._many, *tables, BLOCK=1024, num_warps=WARPS)
        for dtype, _, tiles in self._launches if move else ():
            if len(tiles):
                _move_pass[(len(tiles),)](tiles, self._addresses, self._rule, DTYPE=dtype, **how)

    def _plain_step(self, group: dict) -> None:
        """Plain SGD by torch's own function, in one launch on a GPU."""
        params = [p for p in group["params"] if p.grad is not None]
        lr, on_gpu = group["lr"], bool(params) and params[0].is_cuda
        if group["angle"]:
            lr = (self._rule[:, 6] * self._rule[:, 7] ** 2).nanmedian().nan_to_num(0).float()
        if not on_gpu:
            lr = float(lr)
        grads, buffers = [p.grad for p in params], [self._momentum(group, p) for p in params]
        sgd(params, grads, buffers, fused=on_gpu, lr=lr, momentum=group["momentum"],
            weight_decay=0, dampening=0, nesterov=False, maximize=False)  # fmt: skip


def _undecorated(function: Callable) -> Callable:
    """Without its decorator, which imports torch._dynamo: a second, for what is never compiled."""
    return getattr(function, "__wrapped__", function)


def _check(groups: list[dict], backend: str) -> bool:
    """Whether Triton's kernels can be used. Raises ValueError for an option of the last group."""
    group, device, wrong, obstacle = groups[-1], groups[0]["params"][0].device, [], ""
    lr, sphere, radius = float(group["lr"]), group["sphere"], group["radius"]
    if backend not in ("auto", "triton", "torch"):
        wrong.append(f"backend is {backend!r}: no such one")
    if sphere not in ("group", "tensor", "row", None):
        wrong.append(f"sphere is {sphere!r}: it must be group, tensor, row or None")
    if not 0 <= lr < (math.pi / 2 if group["angle"] else math.inf):
        wrong.append(f"lr is {lr}: it must be finite, not negative, an angle < π/2")
    if radius is not None and not (sphere and 0 < radius < math.inf):
        wrong.append(f"radius is {radius} with {sphere=}: it must be None, or positive on one")
    if not 0 <= group["momentum"] < 1:
        wrong.append(f"momentum is {group['momentum']}: it must be in [0, 1)")
    for i, p in enumerate(group["params"]):
        name = f"parameter {i} of shape {tuple(p.shape)}"
        if p.device != device or not p.is_floating_point():
            wrong.append(f"{name} is {p.dtype} on {p.device}: not real floats on {device}")
        # The dimensions in the order in which they lie in memory; rows have to lie one by one.
        order = sorted(range(p.dim()), key=p.stride, reverse=True)
        if sphere == "row":
            order.sort(key=bool)
        if sphere and not p.permute(order).is_contiguous():
            wrong.append(f"{name} has holes in memory, or rows that lie scattered: clone it first")
    if any(p.dtype not in DTYPES for each in groups for p in each["params"]):
        obstacle = "a parameter is not of " + ", ".join(DTYPES.values())
    if device.type != ("cpu" if INTERPRET else "cuda"):
        obstacle = f"the parameters are on {device} (the CPU takes TRITON_INTERPRET=1)"
    if triton is None:
        obstacle = "Triton is not installed"
    if backend == "triton" and obstacle:
        wrong.append(f"backend is 'triton', but {obstacle}: use 'auto' or 'torch'")
    if wrong:
        raise ValueError(wrong[0])
    return backend != "torch" and not obstacle


def _rows(group: dict, p: Tensor) -> tuple[int, int]:
    """How many lines a tensor has, and how many elements each."""
    rows = len(p) if group["sphere"] == "row" and p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def _free(group: dict, move: bool) -> bool:
    """Whether the sphere has no fixed radius, but the norm that its weights have."""
    joint = group["sphere"] == "group"
    return not move or (joint and any(p.grad is None for p in group["params"]))


def _norms(group: dict) -> Tensor:
    """The norm of every sphere of a group, [spheres] float64. Raises ValueError where one is 0."""
    squares = [p.double().square().reshape(_rows(group, p)).sum(1) for p in group["params"]]
    if group["sphere"] == "group":
        squares = [torch.cat(squares).sum(0, keepdim=True)]
    for i, square in enumerate(squares):
        empty = group["params"][i].numel() == 0
        if not (square.isfinite() & ((square > 0) | empty)).all():
            what = "has norm zero, so no direction, or is not finite: initialize it"
            raise ValueError(f"sphere={group['sphere']!r}: that of tensor {i} {what}")
    return torch.cat(squares).sqrt()


def _normalize(group: dict) -> None:
    scales, first = group["radii"] / _norms(group), 0
    for p in group["params"]:
        rows, _ = _rows(group, p)
        scale = scales[first : first + rows].to(torch.promote_types(p.dtype, torch.float32))
        p.mul_(scale.view(-1, *[1] * (p.dim() - 1)))
        first += 0 if group["sphere"] == "group" else rows


def _stretch(x: Tensor, at: int, n: int) -> Tensor:
    """n elements of a tensor from element `at` on, as they lie in memory."""
    return x.as_strided((n,), (1,), x.storage_offset() + at)


def _gram(theta: Tensor, g: Tensor, m: Tensor | None) -> list[float]:
    """The entries of the Gram matrix of (θ, g, m)."""
    wide = torch.float64 if len(theta) <= SMALL else torch.promote_types(theta.dtype, torch.float32)
    theta, g = theta.to(wide), g.to(wide)
    gram = [torch.dot(theta, theta).item(), torch.dot(theta, g).item(), torch.dot(g, g).item()]
    if m is None:
        return gram + [0.0, 0.0, 0.0]
    m = m.to(wide)
    return gram + [torch.dot(theta, m).item(), torch.dot(g, m).item(), torch.dot(m, m).item()]


def _move(theta: Tensor, g: Tensor, m: Tensor | None, beta: float, k, b, u) -> None:
    """m ← βm + g + uθ, θ ← kθ + bm, in place."""
    if theta.dtype in (torch.bfloat16, torch.float16):  # the step is in float32, rounded once
        new, step = theta.float(), None if m is None else m.float()
        _move(new, g.float(), step, beta, k, b, u)
        theta.copy_(new)
        if m is not None:
            m.copy_(step)
    elif m is None:
        theta.mul_(k + b * u).add_(g, alpha=b)
    else:
        m.mul_(beta).add_(g).add_(theta, alpha=u)
        theta.mul_(k).add_(m, alpha=b)


if __name__ == "__main__":
    steps = "Triton kernels on a GPU, PyTorch elsewhere" if triton else "PyTorch; no Triton here"
    print(f"SphereSGD: steps on a sphere at a fixed effective learning rate ({steps}). Copy me.")
    print("Checked against float64 in tests/; `python bench.py step` checks and times it here.")
