"""Train scale-invariant weights on a sphere at a fixed effective learning rate (ELR).

    optimizer = SphereSGD(weights_before_normalization_layers, lr=1e-2)      # lr *is* the ELR
    optimizer = SphereSGD([dict(params=convs), dict(params=head, sphere=None, lr=0.1)], lr=1e-2)

A network with normalization layers is scale invariant in the weights before them, L(cθ) = L(θ), so only the direction
θ/‖θ‖ matters, and the learning rate that matters is the ELR η̃ = η/‖θ‖². A *sphere* is a set of tensors that share one
norm: with θ their concatenation, ρ its radius (fixed for the whole run) and g the gradient, one step is

    r   = ⟨θ, g⟩ / ‖θ‖²                          radial coefficient, 0 up to rounding when L is scale invariant
    g_t = g − r θ                                projection on the tangent space
    m   ← β (m − q θ) + g_t,  q = ⟨θ, m⟩/‖θ‖²    Riemannian heavy ball; without momentum m = g_t
    θ   ← ρ (θ − η̃ρ² m) / ‖θ − η̃ρ² m‖            step and renormalization

and the diagnostics that tell the regimes of training apart fall out of the same dot products:

    γ = ρ ‖g_t‖                                  effective gradient norm: the gradient norm on the unit sphere
    φ = atan(η̃ρ² ‖m‖ / ‖θ‖)                      angular step

Source: Kodryan, Lobacheva, Nakhodnov, Vetrov, "Training Scale-Invariant Neural Networks on the Sphere Can Happen in Three
Regimes", NeurIPS 2022 (arXiv 2209.03695). This file depends on torch alone: copy it into any project.
"""

import math
import os

import torch
from torch import Tensor
from torch.optim.sgd import sgd

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS: the step in plain PyTorch serves there
    triton = None

SPHERES = ("group", "tensor", "row", None)
BACKENDS = ("auto", "triton", "torch")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so when this file is imported
BLOCK, WARPS = 8192, 8  # elements of a tile, and the warps that work on it
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def sphere_rule(dots: Tensor, radius: Tensor, elr: Tensor, beta: Tensor) -> Tensor:
    """From a sphere's dot products to the coefficients of its step and what the step tells.

    dots [n, 3 or 6] float64: ⟨θ,θ⟩ ⟨θ,g⟩ ⟨g,g⟩ and, with momentum, ⟨θ,m⟩ ⟨g,m⟩ ⟨m,m⟩; radius ρ, elr η̃, beta β: [n] float64.
    Returns [n, 7]: k, b, u, γ, tan φ, radial, η̃ of
        m ← β m + g + u θ,   θ ← k θ + b m      (without momentum: θ ← (k + b u) θ + b g)
    A tangent step that is exactly 0 gives k = 1, b = 0: θ stays bit for bit. Where a dot product is not finite, all is nan.
    """
    tt, tg, gg, *rest = dots.unbind(1)
    r = tg / tt
    gg_t = gg - r * tg  # ‖g_t‖²
    gg_t = torch.where(gg_t > 8 * torch.finfo(dots.dtype).eps * gg, gg_t, 0)  # below the dot products' rounding there is nothing
    mm_t, u = gg_t, -r
    if rest:
        tm, gm, mm = rest
        q = tm / tt
        mm_t = (beta**2 * (mm - q * tm) + 2 * beta * (gm - q * tg) + gg_t).clamp(min=0)
        u = -(r + beta * q)
    norm, length = tt.sqrt(), elr * radius**2 * mm_t.sqrt()  # of θ, and of the step along the tangent
    stays = length == 0
    k = torch.where(stays, 1, radius / torch.hypot(norm, length))
    b = torch.where(stays, 0, -k * elr * radius**2)
    radial = torch.where(gg == 0, 0, tg / (norm * gg.sqrt()))
    table = torch.stack([k, b, u, radius * gg_t.sqrt(), length / norm, radial], 1)
    table = torch.where(dots.sum(1, keepdim=True).isfinite(), table, math.nan)
    return torch.cat([table, elr[:, None]], 1)


if triton is not None:
    # A tile is up to BLOCK consecutive elements of one tensor that lie on one sphere. Its line in the table of tiles says where
    # θ, g and m are (addresses), how many elements they have, their types, what the tile is (FLAGS), and whose numbers it makes.

    @triton.jit
    def _load_as(address, offsets, n, vectors, dtype: tl.constexpr):
        if vectors:  # a whole tile at a multiple of 16 bytes: 128-bit loads
            x = tl.load(tl.multiple_of(address.to(tl.pointer_type(dtype)), 16) + offsets)
        else:
            x = tl.load(address.to(tl.pointer_type(dtype)) + offsets, mask=offsets < n, other=0.0)
        return x.to(tl.float32)

    @triton.jit
    def _load(address, dtype, offsets, n, vectors, HALF: tl.constexpr):
        """A tile as float32; dtype 0 is float32, 1 bfloat16, 2 float16. HALF says whether there are others than float32."""
        if HALF:
            if dtype == 0:
                x = _load_as(address, offsets, n, vectors, tl.float32)
            elif dtype == 1:
                x = _load_as(address, offsets, n, vectors, tl.bfloat16)
            else:
                x = _load_as(address, offsets, n, vectors, tl.float16)
        else:
            x = _load_as(address, offsets, n, vectors, tl.float32)
        return x

    @triton.jit
    def _store_as(address, x, offsets, n, vectors, dtype: tl.constexpr):
        if vectors:
            tl.store(tl.multiple_of(address.to(tl.pointer_type(dtype)), 16) + offsets, x.to(dtype))
        else:
            tl.store(address.to(tl.pointer_type(dtype)) + offsets, x.to(dtype), mask=offsets < n)

    @triton.jit
    def _store(address, dtype, x, offsets, n, vectors, HALF: tl.constexpr):
        if HALF:
            if dtype == 0:
                _store_as(address, x, offsets, n, vectors, tl.float32)
            elif dtype == 1:
                _store_as(address, x, offsets, n, vectors, tl.bfloat16)
            else:
                _store_as(address, x, offsets, n, vectors, tl.float16)
        else:
            _store_as(address, x, offsets, n, vectors, tl.float32)

    @triton.jit
    def _sphere(spheres, lrs, sphere):
        """ρ, β and η̃ of a sphere, float64; η̃ is read from where the user's or our own tensor holds it at this moment."""
        lr = tl.load(tl.load(lrs + sphere).to(tl.pointer_type(tl.float32)))
        return tl.load(spheres + 2 * sphere), tl.load(spheres + 2 * sphere + 1), lr.to(tl.float64)

    @triton.jit
    def _rule(tt, tg, gg, gg_t, mm_t, r, q, radius, beta, elr, rule):
        """`sphere_rule` for one sphere, in float64 scalars; writes its line of the rule's table and returns k, b, u."""
        norm = tl.sqrt(tt)
        length = elr * radius * radius * tl.sqrt(mm_t)
        stays = length == 0
        k = tl.where(stays, 1.0, radius / tl.sqrt(tt + length * length))
        b = tl.where(stays, 0.0, -k * elr * radius * radius)
        u = -(r + beta * q)
        radial = tl.where(gg == 0, 0.0, tg / (norm * tl.sqrt(tl.where(gg == 0, 1.0, gg))))
        bad = (tt + tg + gg + mm_t) * 0.0  # 0, or nan where one is not finite
        tl.store(rule + 0, k + bad)
        tl.store(rule + 1, b + bad)
        tl.store(rule + 2, u + bad)
        tl.store(rule + 3, radius * tl.sqrt(gg_t) + bad)
        tl.store(rule + 4, length / norm + bad)
        tl.store(rule + 5, radial + bad)
        tl.store(rule + 6, elr)
        return k + bad, b + bad, u + bad

    @triton.jit
    def _first_pass(tiles, spheres, lrs, partials, dots, rule, count, MOMENTUM: tl.constexpr, HALF: tl.constexpr,
                    MOVE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """Per tile: of a large sphere the partial dot products; of a sphere that is this one tile the whole step; plain SGD."""
        tile = tl.program_id(0).to(tl.int64)
        line = tiles + 8 * tile
        theta_at, g_at, m_at, n = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
        dtypes, flags, at, sphere = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
        kind, vectors = flags // 2, flags % 2 == 1
        theta_dtype, g_dtype = dtypes // 3, dtypes % 3
        offsets = tl.arange(0, BLOCK)
        theta = _load(theta_at, theta_dtype, offsets, n, vectors, HALF)
        g = _load(g_at, g_dtype, offsets, n, vectors, HALF)
        if MOMENTUM:
            m_n = tl.where(m_at == 0, 0, n)
            m_vectors = vectors and m_at != 0
            m = _load(m_at, theta_dtype, offsets, m_n, m_vectors, HALF)
        if kind == 2:
            if MOVE:
                _, beta, lr = _sphere(spheres, lrs, sphere)
                if MOMENTUM:
                    g = beta.to(tl.float32) * m + g
                    _store(m_at, theta_dtype, g, offsets, m_n, m_vectors, HALF)
                _store(theta_at, theta_dtype, theta - lr.to(tl.float32) * g, offsets, n, vectors, HALF)
        else:
            tt, tg, gg = tl.sum(theta * theta), tl.sum(theta * g), tl.sum(g * g)
            if MOMENTUM:
                tm, gm, mm = tl.sum(theta * m), tl.sum(g * m), tl.sum(m * m)
            if kind == 0:
                tl.store(partials + tile, tt)
                tl.store(partials + count + tile, tg)
                tl.store(partials + 2 * count + tile, gg)
                if MOMENTUM:
                    tl.store(partials + 3 * count + tile, tm)
                    tl.store(partials + 4 * count + tile, gm)
                    tl.store(partials + 5 * count + tile, mm)
            else:
                radius, beta, elr = _sphere(spheres, lrs, sphere)
                # θ and g are on the chip: project elementwise, twice, which leaves nothing radial behind (Gram and Schmidt).
                r = tg / tt
                step = g - r * theta
                again = tl.sum(theta * step) / tt
                step = step - again * theta
                r, q, gg_t = r + again, 0.0, tl.sum(step * step)
                mm_t = gg_t
                if MOMENTUM:
                    q = tm / tt
                    m = m - q * theta
                    again = tl.sum(theta * m) / tt
                    q = q + again
                    step = beta.to(tl.float32) * (m - again * theta) + step
                    mm_t = tl.sum(step * step)
                k, b, u = _rule(tt.to(tl.float64), tg.to(tl.float64), gg.to(tl.float64), gg_t.to(tl.float64),
                                mm_t.to(tl.float64), r, q, radius, beta, elr, rule + 7 * sphere)  # fmt: skip
                out = dots + at * (6 if MOMENTUM else 3)
                tl.store(out, tt.to(tl.float64))
                tl.store(out + 1, tg.to(tl.float64))
                tl.store(out + 2, gg.to(tl.float64))
                if MOMENTUM:
                    tl.store(out + 3, tm.to(tl.float64))
                    tl.store(out + 4, gm.to(tl.float64))
                    tl.store(out + 5, mm.to(tl.float64))
                if MOVE:
                    if k == k:  # not nan
                        if MOMENTUM:
                            _store(m_at, theta_dtype, step, offsets, m_n, m_vectors, HALF)
                        if b != 0:
                            new = k.to(tl.float32) * theta + b.to(tl.float32) * step
                            _store(theta_at, theta_dtype, new, offsets, n, vectors, HALF)

    @triton.jit
    def _finalize(jobs, spheres, lrs, partials, dots, rule, count, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr):
        """Per job: the partial dot products of a range of tiles, summed in a fixed order in float64, for a tensor's line of dot
        products, or a sphere's rule, or both."""
        job = jobs + 4 * tl.program_id(0)
        start, end, line, sphere = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        tt, tg, gg = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        if MOMENTUM:
            tm, gm, mm = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for at in range(start, end, BLOCK):
            here = at + tl.arange(0, BLOCK)
            mask = here < end
            tt += tl.load(partials + here, mask=mask, other=0.0).to(tl.float64)
            tg += tl.load(partials + count + here, mask=mask, other=0.0).to(tl.float64)
            gg += tl.load(partials + 2 * count + here, mask=mask, other=0.0).to(tl.float64)
            if MOMENTUM:
                tm += tl.load(partials + 3 * count + here, mask=mask, other=0.0).to(tl.float64)
                gm += tl.load(partials + 4 * count + here, mask=mask, other=0.0).to(tl.float64)
                mm += tl.load(partials + 5 * count + here, mask=mask, other=0.0).to(tl.float64)
        tt, tg, gg = tl.sum(tt), tl.sum(tg), tl.sum(gg)
        if MOMENTUM:
            tm, gm, mm = tl.sum(tm), tl.sum(gm), tl.sum(mm)
        if line >= 0:
            out = dots + line * (6 if MOMENTUM else 3)
            tl.store(out, tt)
            tl.store(out + 1, tg)
            tl.store(out + 2, gg)
            if MOMENTUM:
                tl.store(out + 3, tm)
                tl.store(out + 4, gm)
                tl.store(out + 5, mm)
        if sphere >= 0:
            radius, beta, elr = _sphere(spheres, lrs, sphere)
            r, q = tg / tt, 0.0
            gg_t = gg - r * tg
            gg_t = tl.where(gg_t > 1.8e-15 * gg, gg_t, 0.0)
            mm_t = gg_t
            if MOMENTUM:
                q = tm / tt
                mm_t = tl.maximum(beta * beta * (mm - q * tm) + 2 * beta * (gm - q * tg) + gg_t, 0.0)
            _rule(tt, tg, gg, gg_t, mm_t, r, q, radius, beta, elr, rule + 7 * sphere)

    @triton.jit
    def _second_pass(tiles, moving, spheres, rule, MOMENTUM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
        """Per tile of a large sphere: θ ← k θ + b m, m ← β m + g + u θ. Backwards: what was read last may be in the cache."""
        tile = tl.load(moving + tl.num_programs(0) - 1 - tl.program_id(0))
        line = tiles + 8 * tile
        theta_at, g_at, m_at, n = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
        dtypes, flags, sphere = tl.load(line + 4), tl.load(line + 5), tl.load(line + 7)
        vectors = flags % 2 == 1
        theta_dtype, g_dtype = dtypes // 3, dtypes % 3
        k, b, u = tl.load(rule + 7 * sphere), tl.load(rule + 7 * sphere + 1), tl.load(rule + 7 * sphere + 2)
        if k == k:  # not nan
            offsets = tl.arange(0, BLOCK)
            theta = _load(theta_at, theta_dtype, offsets, n, vectors, HALF)
            g = _load(g_at, g_dtype, offsets, n, vectors, HALF)
            if MOMENTUM:
                m_n = tl.where(m_at == 0, 0, n)
                m_vectors = vectors and m_at != 0
                beta = tl.load(spheres + 2 * sphere + 1).to(tl.float32)
                m = _load(m_at, theta_dtype, offsets, m_n, m_vectors, HALF)
                m = beta * m + g + u.to(tl.float32) * theta
                _store(m_at, theta_dtype, m, offsets, m_n, m_vectors, HALF)
                new = k.to(tl.float32) * theta + b.to(tl.float32) * m
            else:
                new = (k + b * u).to(tl.float32) * theta + b.to(tl.float32) * g
            if b != 0:
                _store(theta_at, theta_dtype, new, offsets, n, vectors, HALF)


class SphereSGD(torch.optim.Optimizer):
    """Stochastic gradient descent on spheres at a fixed effective learning rate.

    params    tensors, or param groups, each of which may set its own `lr`, `sphere`, `radius` and `momentum`.
    lr        the ELR η̃ ≥ 0, a float or a 0-d tensor; the ordinary learning rate where `sphere=None`. Every
              `torch.optim.lr_scheduler` works on it.
    sphere    "group": all tensors of the param group on one joint sphere, as in the paper;
              "tensor": each tensor a sphere;  "row": each slice tensor[i] (output filter) a sphere;
              None: no sphere but plain SGD, for whatever is not scale invariant.
    radius    of every sphere of the group, to which the weights are rescaled at once; None keeps the initial norms.
    momentum  β in [0, 1) of the Riemannian heavy ball (of the ordinary one where `sphere=None`).
    backend   "triton": fused kernels, at most three launches a step (on a GPU; on the CPU under TRITON_INTERPRET=1);
              "torch": plain PyTorch; "auto": Triton where it can run. Weights in float64 take PyTorch.

    In a CUDA graph: give lr as a float32 tensor on the GPU, take a step before the capture, and keep the gradients where they
    are with zero_grad(set_to_none=False).
    A tensor without a gradient is left out of its sphere for that step. A sphere whose weights or gradient are not finite
    stays as it is, and `stats()` says nan. Nothing in `step()` waits for a GPU. Raises ValueError for a bad option or a
    sphere of norm zero, RuntimeError for a sparse gradient.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor,
        sphere: str | None = "group",
        radius: float | None = None,
        momentum: float = 0.0,
        backend: str = "auto",
    ):
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}: it must be one of {', '.join(map(repr, BACKENDS))}")
        self.backend = backend
        super().__init__(params, dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum))

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group, self.param_groups[0]["params"][0].device)
            obstacle = _no_triton(self.param_groups)
            if self.backend == "triton" and obstacle:
                raise ValueError(f"backend is 'triton', but {obstacle}: use 'auto' or 'torch'")
            self._use_triton = self.backend != "torch" and not obstacle
            if group["sphere"] is not None:
                group["radii"] = _norms(group)
                if not bool(group["radii"].isfinite().all()):
                    raise ValueError("a sphere has weights that are not finite: check them before making the optimizer")
                if group["radius"] is not None:
                    group["radii"].fill_(group["radius"])
                    _normalize(group)
        except ValueError:
            self.param_groups.pop()
            raise
        # Every tensor on a sphere has one line of dot products (where rows are spheres, one per row); whose sphere each is.
        self._lines = [_rows(p) if g["sphere"] == "row" else 1 for g in self._on_spheres() for p in g["params"]]
        owner, first = [torch.empty(0, dtype=torch.long)], 0
        for g in self._on_spheres():
            spheres = torch.arange(first, first + len(g["radii"]))
            owner.append(spheres.expand(len(g["params"])) if g["sphere"] == "group" else spheres)
            first += len(spheres)
        self._owner = torch.cat(owner).to(group["params"][0].device)
        self._last = self._key = None
        self._lrs = torch.empty(len(self.param_groups), device=self._owner.device)
        self._lr_written = [math.nan] * len(self.param_groups)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group in self._on_spheres():  # torch moves the parameters' state to their device, but not the groups'
            group["radii"] = group["radii"].to(group["params"][0].device)
        self._last = self._key = None

    def _on_spheres(self) -> list[dict]:
        return [group for group in self.param_groups if group["sphere"] is not None]

    @torch.no_grad()
    def normalize(self) -> None:
        """Put every sphere back on its radius, θ ← ρ θ/‖θ‖: after averaging weights, or filling them with noise."""
        for group in self._on_spheres():
            _normalize(group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step along the gradients in `.grad`. Returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply(move=True)
        return loss

    @torch.no_grad()
    def measure(self) -> None:
        """Find what a `step()` would report in `stats()` and `layer_stats()`, without moving weights or momentum."""
        self._apply(move=False)

    def _apply(self, move: bool) -> None:
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor) and not 0 <= group["lr"] < math.inf:
                raise ValueError(f"lr is {group['lr']}: it must be finite and not negative")
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError("sparse gradients have no place here: make the embedding with sparse=False")
        if self._use_triton:
            self._triton_step(move)
        else:
            self._torch_step(move)

    def stats(self) -> dict[str, Tensor]:
        """Of the last step, per sphere in the order of the param groups (float64, on the device, without waiting for it):
        `radius` ρ, `grad_norm` γ, `angle` φ in radians, `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan where there was no gradient."""
        _, rule, radii, _ = self._last_step()
        rule = rule.clone()  # the kernels write every step into the same table
        return dict(radius=radii, grad_norm=rule[:, 3], angle=rule[:, 4].atan(), radial=rule[:, 5])

    def layer_stats(self) -> dict[str, Tensor]:
        """The same per tensor on a sphere, in the order of the param groups: its `norm` ρ_i before the step, its individual ELR
        `elr` = η̃ρ²/ρ_i², its effective gradient norm `grad_norm` = ρ_i‖g_i − r_i θ_i‖, and the `angle` by which the step turns
        it (radians). Where rows are spheres: the tensor's norm, η̃, the norm of its rows' γ and the mean of their φ."""
        dots, rule, radii, beta = self._last_step()
        radii, beta = radii[self._owner], beta[self._owner]
        k, b, u, *_, elr = rule[self._owner].unbind(1)
        tt, tg, gg, *rest = dots.unbind(1)
        gg_t = (gg - tg**2 / tt).clamp(min=0)
        mm_t, along = gg_t, tg / tt + u  # of the tensor's step: its square across θ_i, its coefficient along θ_i
        if rest:
            tm, gm, mm = rest
            mm_t = (beta**2 * (mm - tm**2 / tt) + 2 * beta * (gm - tm * tg / tt) + gg_t).clamp(min=0)
            along = along + beta * tm / tt
        angle = torch.atan2(b.abs() * mm_t.sqrt(), tt.sqrt() * (k + b * along))
        lines = torch.stack([tt, elr * radii**2 / tt, tt * gg_t, angle], 1)
        tt, elr, gamma2, angle = torch.stack([part.sum(0) for part in lines.split(self._lines)]).unbind(1)
        rows = tt.new_tensor(self._lines)
        return dict(norm=tt.sqrt(), elr=elr / rows, grad_norm=gamma2.sqrt(), angle=angle / rows)

    def _last_step(self) -> tuple[Tensor, ...]:
        if self._last is None:
            raise RuntimeError("no statistics yet: they come with the first step() over a sphere")
        return self._last

    def _torch_step(self, move: bool) -> None:
        """The step in plain PyTorch: dot products, the rule, the update; each over all spheres of all groups."""
        width = 6 if any(group["momentum"] for group in self._on_spheres()) else 3
        moving, lines, of_sphere, first = [], [], [], 0  # of_sphere: per group, the sums of its lines and its ρ, η̃, β
        for group in self.param_groups:
            kind, lr = group["sphere"], group["lr"]
            here = []
            for p in group["params"]:
                rows = _rows(p) if kind == "row" else 1
                if p.grad is None:
                    here.append(None)
                else:
                    m = self._momentum_of(p) if group["momentum"] else None
                    moving.append((p, m, group, slice(first, first + rows) if kind == "row" and p.dim() else first))
                    here.append(_dots(p, p.grad, m, rows, width) if kind else None)
                first += rows if kind in ("row", "tensor") else 0
            if kind is None:
                continue
            nothing = group["radii"].new_full((1, width), math.nan)
            for p, d in zip(group["params"], here, strict=True):
                lines.append(nothing.expand(_rows(p) if kind == "row" else 1, -1) if d is None else d)
            sums, radii = torch.cat(lines[-len(here) :]), group["radii"]
            if kind == "group":
                first += 1
                left_out = [p.reshape(-1) for p, d in zip(group["params"], here, strict=True) if d is None]
                sums = torch.cat([nothing[:0]] + [d for d in here if d is not None]).sum(0, keepdim=True)
                radii = (radii**2 - sum(_dot(x, x) for x in left_out)).clamp(min=0).sqrt() if left_out else radii
            elr = lr.to(radii).expand_as(radii) if isinstance(lr, Tensor) else torch.full_like(radii, lr)
            of_sphere.append((sums, radii, elr, torch.full_like(radii, group["momentum"])))
        rule = None
        if of_sphere:
            sums, radii, elr, beta = (torch.cat(column) for column in zip(*of_sphere, strict=True))
            rule = sphere_rule(sums, radii, elr, beta)
            self._last = torch.cat(lines), rule, radii, beta
        if not move:
            return
        # On the CPU the coefficients become numbers, which is faster; on a GPU that would wait for the device.
        table = rule[:, :3].tolist() if rule is not None and rule.device.type == "cpu" else rule
        for p, m, group, at in reversed(moving):  # what was read last is still in the cache
            if group["sphere"] is None:
                k, b, u = 1.0, -group["lr"], 0.0
            elif isinstance(at, slice):
                k, b, u = (x.view(-1, *[1] * (p.dim() - 1)) for x in rule[at, :3].unbind(1))
            else:
                k, b, u = table[at][:3]
            _move(p, p.grad, m, k, b, u, group["momentum"])

    def _triton_step(self, move: bool) -> None:
        """The step in at most three launches over all tensors of all spheres; what they read is laid out by `_lay_out`."""
        key = []
        for group in self.param_groups:
            key.append(group["lr"].data_ptr() if isinstance(group["lr"], Tensor) else None)
            for p in group["params"]:
                if p.grad is not None:
                    m = self._momentum_of(p).data_ptr() if group["momentum"] else 0
                    key.append((p.data_ptr(), p.grad.data_ptr(), m, p.grad.stride(), p.grad.dtype, group["momentum"]))
                else:
                    key.append(None)
        if key != self._key:
            self._lay_out()
            self._key = key
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device == self._lrs.device:
                if lr.dtype != torch.float32:
                    self._lrs[i].copy_(lr)
            elif lr != self._lr_written[i]:
                self._lrs[i].fill_(float(lr))
                self._lr_written[i] = float(lr)
        for staged, original, _ in self._staged:
            staged.copy_(original)
        count, flags = len(self._tiles), {"MOMENTUM": self._width == 6, "num_warps": WARPS}
        tables = self._spheres, self._lr_addresses, self._partials, self._dots, self._rule, count
        if count:
            _first_pass[(count,)](self._tiles, *tables, HALF=self._half, MOVE=move, BLOCK=BLOCK, **flags)
        if len(self._jobs):
            _finalize[(len(self._jobs),)](self._jobs, *tables, BLOCK=1024, **flags)
        if len(self._moving) and move:
            _second_pass[(len(self._moving),)](
                self._tiles, self._moving, self._spheres, self._rule, HALF=self._half, BLOCK=BLOCK, **flags
            )
        for staged, original, back in self._staged:
            if back and move:
                original.copy_(staged)

    def _lay_out(self) -> None:
        """The tables that the kernels read, on the device: tiles, jobs, spheres, learning rates. Made anew when an address or a
        momentum changes, without waiting for the device. A tensor whose elements do not lie densely and aligned to 16 bytes, or
        whose gradient lies otherwise than itself, goes through a copy."""
        device, on_spheres = self._owner.device, self._on_spheres()
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a tensor moved while a CUDA graph was captured: step once before, and zero_grad(set_to_none=False)"
            )

        def upload(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

        self._width = 6 if any(group["momentum"] for group in self.param_groups) else 3
        plain = sum(len(g["radii"]) for g in on_spheres)  # a plain group has a line among the spheres too, after them
        tiles, jobs, radii, betas, lrs, self._staged = [], [], [], [], [], []
        line, sphere, tile = 0, 0, 0
        for i, group in enumerate(self.param_groups):
            kind, params = group["sphere"], [p for p in group["params"] if p.grad is not None and p.numel()]
            start, radius = tile, group.get("radii", self._owner.new_zeros(1, dtype=torch.float64))
            here = plain if kind is None else sphere
            for p in group["params"]:
                rows = _rows(p) if kind == "row" else 1
                if p.grad is not None and p.numel():
                    theta, g, m = self._stage(p, kind == "row")
                    length = p.numel() // rows
                    per = -(-length // BLOCK)
                    part = torch.arange(rows).repeat_interleave(per)
                    inside = torch.arange(per).repeat(rows) * BLOCK
                    offset, n = part * length + inside, (length - inside).clamp(max=BLOCK)
                    what = 2 if kind is None else int(per == 1 and (kind != "group" or len(params) == 1))
                    vectors = (n == BLOCK) & (offset % 8 == 0)
                    at = [x.data_ptr() + offset * x.element_size() for x in (theta, g)]
                    at.append(torch.zeros_like(offset) if m is None else m.data_ptr() + offset * m.element_size())
                    dtypes = torch.full_like(offset, 3 * DTYPES[theta.dtype] + DTYPES[g.dtype])
                    owner = part + here if kind == "row" else torch.full_like(part, here)
                    tiles.append(torch.stack([*at, n, dtypes, 2 * what + vectors, line + part, owner], 1))
                    if what == 0:
                        first = tile + torch.arange(rows) * per
                        whose = torch.full_like(first, -1) if kind == "group" else here + torch.arange(rows)
                        jobs.append(torch.stack([first, first + per, line + torch.arange(rows), whose], 1))
                    tile += rows * per
                line += rows if kind is not None else 0
                here += rows if kind in ("row", "tensor") else 0
            if kind == "group":
                left_out = [p.reshape(-1) for p in group["params"] if p.grad is None]
                if left_out and params:
                    radius = (radius**2 - sum(_dot(x, x) for x in left_out)).clamp(min=0).sqrt()
                if len(params) > 1 or tile - start > 1:
                    jobs.append(torch.tensor([[start, tile, -1, sphere]]))
            plain += kind is None
            sphere += len(radius) if kind is not None else 0
            lr = group["lr"]
            own = isinstance(lr, Tensor) and lr.device == device and lr.dtype == torch.float32
            lrs.append((kind is None, torch.full((len(radius),), (lr if own else self._lrs[i]).data_ptr())))
            radii.append((kind is None, radius))
            betas.append((kind is None, torch.full((len(radius),), float(group["momentum"]), dtype=torch.float64)))
        # The spheres first, then the plain groups; Python's sort keeps the order within each.
        lrs, radii, betas = (torch.cat([x for _, x in sorted(column, key=lambda x: x[0])]) for column in (lrs, radii, betas))
        tiles = torch.cat(tiles) if tiles else torch.empty(0, 8, dtype=torch.long)
        self._half = bool((tiles[:, 4] != 0).any())
        self._moving = upload((tiles[:, 5] // 2 == 0).nonzero()[:, 0])
        self._tiles, self._lr_addresses = upload(tiles), upload(lrs)
        self._jobs = upload(torch.cat(jobs) if jobs else torch.empty(0, 4, dtype=torch.long))
        betas = upload(betas)
        self._spheres = torch.stack([radii, betas], 1)
        self._partials = torch.empty(self._width, len(tiles), device=device)
        self._rule = torch.full((len(betas), 7), math.nan, dtype=torch.float64, device=device)
        self._dots = torch.full((line, self._width), math.nan, dtype=torch.float64, device=device)
        self._last = (self._dots, self._rule[:sphere], radii[:sphere], betas[:sphere]) if sphere else None

    def _stage(self, p: Tensor, rows: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """θ, g and m as the kernels can read them: the tensors themselves, or copies that every step refreshes."""
        m, theta = self.state[p].get("momentum_buffer"), p
        if not _dense(p) or p.data_ptr() % 16 or (rows and _rows(p) > 1 and p.stride(0) * len(p) != p.numel()):
            theta = torch.empty_like(p, memory_format=torch.contiguous_format)
            self._staged.append((theta, p, True))
        found = [theta]
        for x, back in ((p.grad, False), (m, True)):
            same = x is not None and all(a == b or n == 1 for a, b, n in zip(theta.stride(), x.stride(), x.shape, strict=True))
            if x is not None and (not same or x.data_ptr() % 16 or x.dtype not in DTYPES or (back and x.dtype != p.dtype)):
                copy = torch.empty_like(theta)
                self._staged.append((copy, x, back))
                x = copy
            found.append(x)
        return tuple(found)

    def _momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _no_triton(groups: list[dict]) -> str:
    """Why the kernels cannot run on these parameters; "" if they can."""
    params = [p for group in groups for p in group["params"]]
    if triton is None:
        return "Triton is not installed"
    if params[0].device.type != ("cpu" if INTERPRET else "cuda"):
        return f"the parameters are on {params[0].device}, where Triton runs " + (
            "no kernels that TRITON_INTERPRET=1 made" if INTERPRET else "only under TRITON_INTERPRET=1"
        )
    return "".join({f"a parameter is {p.dtype}, which the kernels do not take" for p in params if p.dtype not in DTYPES})


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their stretch of memory without holes or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check(group: dict, device: torch.device) -> None:
    lr, sphere, radius, momentum = (group[name] for name in ("lr", "sphere", "radius", "momentum"))
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr is {float(lr)}: it must be finite and not negative")
    if sphere not in SPHERES:
        raise ValueError(f"sphere is {sphere!r}: it must be one of {', '.join(map(repr, SPHERES))}")
    if radius is not None and (sphere is None or not 0 < radius < math.inf):
        raise ValueError(f"radius is {radius} with sphere={sphere!r}: it must be None, or finite and positive on a sphere")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: it must be in [0, 1)")
    for p in group["params"]:
        if p.device != device or not p.is_floating_point():
            raise ValueError(f"a parameter is {p.dtype} on {p.device}: all must be real floating point, on one device ({device})")


def _rows(p: Tensor) -> int:
    return len(p) if p.dim() else 1


def _norms(group: dict) -> Tensor:
    """The norm of every sphere of a group, [spheres] float64. Raises ValueError if one that has elements is 0."""
    kind, params = group["sphere"], group["params"]
    squares = [_dots(p, p, None, _rows(p) if kind == "row" else 1, 3)[:, 0] for p in params]
    if kind == "group":
        squares = [torch.stack(squares).sum(0)]
    for i, x in enumerate(squares):
        if bool((x == 0).any()) and (params if kind == "group" else params[i : i + 1])[0].numel():
            what = {"group": "the whole group", "tensor": f"tensor {i}", "row": f"a row of tensor {i}"}[kind]
            raise ValueError(f"a sphere has norm zero, so no direction: {what}. Initialize it, or give it sphere=None")
    return torch.cat(squares).sqrt()


def _normalize(group: dict) -> None:
    scale = group["radii"] / _norms(group)
    first = 0
    for p in group["params"]:
        n = _rows(p) if group["sphere"] == "row" else 1
        p.mul_(scale[first : first + n].view(-1, *[1] * (p.dim() - 1)).to(torch.promote_types(p.dtype, torch.float32)))
        first += 0 if group["sphere"] == "group" else n


def _dots(p: Tensor, g: Tensor, m: Tensor | None, rows: int, width: int) -> Tensor:
    """⟨θ,θ⟩ ⟨θ,g⟩ ⟨g,g⟩ (width 6: ⟨θ,m⟩ ⟨g,m⟩ ⟨m,m⟩) of a tensor or of its rows: [rows, width] float64."""
    pairs = [(p, p), (p, g), (g, g)] + ([(p, m), (g, m), (m, m)] if m is not None else [])
    if rows != 1:
        products = [x.double() * y for x, y in pairs]
        dots = [x.flatten(1).sum(1) if x.dim() > 1 else x for x in products]
    else:
        order = sorted(range(p.dim()), key=p.stride, reverse=True)  # as they lie in memory, so that a dense tensor is not copied
        flat = {id(x): x.permute(order).reshape(-1) for x in (p, g, m) if x is not None}
        dots = [_dot(flat[id(x)], flat[id(y)]).view(1) for x, y in pairs]
    return torch.stack(dots + [torch.zeros_like(dots[0])] * (width - len(dots)), 1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of two vectors in float64: exact for small ones, for large ones in float32 by pieces whose sum is float64."""
    if x.numel() <= 4096 or torch.float64 in (x.dtype, y.dtype):
        return torch.dot(x.double(), y.double())
    return torch.stack(
        [torch.dot(a.float(), b.float()).double() for a, b in zip(x.split(1 << 18), y.split(1 << 18), strict=True)]
    ).sum()


def _move(p: Tensor, g: Tensor, m: Tensor | None, k, b, u, beta: float) -> None:
    """m ← β m + g + u θ, θ ← k θ + b m in place, with k, b, u numbers or tensors; nothing where they are nan."""
    if isinstance(k, float) and math.isnan(k):
        return
    if m is None and p.device.type == "cpu" and p.dtype == g.dtype == torch.float32 and p.is_contiguous() and g.is_contiguous():
        # torch's fused SGD, θ − lr (g + wd θ), is the one kernel that does a θ + b g in one pass over memory.
        a = k + b * u
        if isinstance(a, float) and 1e-30 < -b < 1e30 and abs((1 - a) / b) < 1e30:
            options = {"momentum": 0, "dampening": 0, "nesterov": False, "maximize": False}
            sgd([p], [g], [None], fused=True, lr=-b, weight_decay=(a - 1) / b, **options)
            return
    wide = torch.promote_types(p.dtype, torch.float32)
    theta, step = p.to(wide), g.to(wide)
    if m is None:
        new = (k + b * u) * theta + b * step
    else:
        step = beta * m.to(wide) + step + u * theta
        new = k * theta + b * step
    if isinstance(k, Tensor):
        new = torch.where(k.isnan(), theta, new)
        step = torch.where(k.isnan(), m, step) if m is not None else step
    p.copy_(new)
    if m is not None:
        m.copy_(step)
