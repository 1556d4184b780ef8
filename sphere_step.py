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
Regimes", NeurIPS 2022 (arXiv 2209.03695). This file depends on torch, and on Triton where that runs: copy it into any project.
`python sphere_step.py` checks it against float64 and times it.
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
except ImportError:  # there is no Triton for macOS: the step in plain PyTorch serves there
    triton = None

SPHERES = ("group", "tensor", "row", None)
BACKENDS = ("auto", "triton", "torch")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so when this file is imported
BLOCK, WARPS = 8192, 8  # elements of a tile, and the warps that work on it
SMALL, PIECE = 4096, 1 << 18  # elements up to which plain PyTorch sums in float64 throughout, and in one float32 dot product
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def sphere_rule(moments: Tensor, radius: Tensor, elr: Tensor, beta: Tensor) -> Tensor:
    """From the moments of each sphere to the coefficients of its step and what the step tells.

    moments [n, 3 or 6] float64: ‖θ‖², r, ‖g_t‖² and, with momentum, q, ⟨g_t, m_t⟩, ‖m_t‖², where g = r θ + g_t and
    m = q θ + m_t are split along and across θ; radius ρ, elr η̃, beta β: [n] float64.
    Returns [n, 7]: k, b, u, γ, tan φ, radial, η̃ of
        m ← β m + g + u θ,   θ ← k θ + b m      (without momentum: θ ← (k + b u) θ + b g)
    A tangent step that is exactly 0 gives k = 1, b = 0: θ stays bit for bit. Where a moment is not finite, all is nan.
    """
    tt, r, gg, *rest = moments.unbind(1)
    mm, u = gg, -r
    if rest:
        q, gm, mm = rest
        mm, u = (beta**2 * mm + 2 * beta * gm + gg).clamp(min=0), -(r + beta * q)
    norm, length = tt.sqrt(), elr * radius**2 * mm.sqrt()  # of θ, and of the step along the tangent
    stays = length == 0
    k = torch.where(stays, 1, radius / torch.hypot(norm, length))
    b = torch.where(stays, 0, -k * elr * radius**2)
    radial = torch.where(r == 0, 0, r * norm / torch.hypot(r * norm, gg.sqrt()))
    table = torch.stack([k, b, u, radius * gg.sqrt(), length / norm, radial], 1)
    table = torch.where(moments.sum(1, keepdim=True).isfinite(), table, math.nan)
    return torch.cat([table, elr[:, None]], 1)


def join(moments: Tensor) -> Tensor:
    """The moments of one sphere, [1, 3 or 6], from those of its parts. Like the variance of joined samples: r of the whole is the
    mean of the parts' r, weighted by ‖θ‖², and what they differ by counts as across θ. Nothing cancels, however radial g is."""
    tt, r, gg, *rest = moments.unbind(1)
    total = tt.sum()

    def mean(x):
        return (tt * x).sum() / total

    out = [total, mean(r), (gg + tt * (r - mean(r)) ** 2).sum()]
    if rest:
        q, gm, mm = rest
        out += [mean(q), (gm + tt * (r - mean(r)) * (q - mean(q))).sum(), (mm + tt * (q - mean(q)) ** 2).sum()]
    return torch.stack(out)[None]


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
    def _rule(tt, r, gg, mm, q, radius, beta, elr, rule):
        """`sphere_rule` for one sphere, in float64 scalars; writes its line of the rule's table and returns k, b."""
        norm = tl.sqrt(tt)
        length = elr * radius * radius * tl.sqrt(mm)
        stays = length == 0
        bad = (tt + r + gg + mm) * 0.0  # 0, or nan where one is not finite
        k = tl.where(stays, 1.0, radius / tl.sqrt(tt + length * length)) + bad
        b = tl.where(stays, 0.0, -k * elr * radius * radius) + bad
        gnorm = tl.sqrt(r * r * tt + gg)
        tl.store(rule + 0, k)
        tl.store(rule + 1, b)
        tl.store(rule + 2, -(r + beta * q) + bad)
        tl.store(rule + 3, radius * tl.sqrt(gg) + bad)
        tl.store(rule + 4, length / norm + bad)
        tl.store(rule + 5, tl.where(r == 0, 0.0, r * norm / tl.where(gnorm == 0, 1.0, gnorm)) + bad)
        tl.store(rule + 6, elr)
        return k, b

    @triton.jit
    def _write(out, tt, r, gg, q, gm, mm, MOMENTUM: tl.constexpr):
        tl.store(out, tt)
        tl.store(out + 1, r)
        tl.store(out + 2, gg)
        if MOMENTUM:
            tl.store(out + 3, q)
            tl.store(out + 4, gm)
            tl.store(out + 5, mm)

    @triton.jit
    def _first_pass(tiles, spheres, lrs, partials, moments, rule, MOMENTUM: tl.constexpr, HALF: tl.constexpr,
                    MOVE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """Per tile: of a large sphere the moments; of a sphere that is this one tile the whole step; plain SGD."""
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
            # Split g = r θ + step and m = q θ + m' along and across θ; twice, which leaves nothing along θ (Gram and Schmidt).
            tt = tl.sum(theta * theta)
            scale = tl.where(tt == 0, 0.0, 1.0 / tl.where(tt == 0, 1.0, tt))
            r = tl.sum(theta * g) * scale
            g = g - r * theta
            again = tl.sum(theta * g) * scale
            g = g - again * theta
            r = r.to(tl.float64) + again.to(tl.float64)
            gg = tl.sum(g * g).to(tl.float64)
            q, gm, mm = r * 0.0, gg * 0.0, gg * 0.0
            if MOMENTUM:
                q1 = tl.sum(theta * m) * scale
                m = m - q1 * theta
                again = tl.sum(theta * m) * scale
                m = m - again * theta
                q = q1.to(tl.float64) + again.to(tl.float64)
                gm, mm = tl.sum(g * m).to(tl.float64), tl.sum(m * m).to(tl.float64)
            tt = tt.to(tl.float64)
            if kind == 0:
                _write(partials + tile * (6 if MOMENTUM else 3), tt, r, gg, q, gm, mm, MOMENTUM)
            else:
                _write(moments + at * (6 if MOMENTUM else 3), tt, r, gg, q, gm, mm, MOMENTUM)
                radius, beta, elr = _sphere(spheres, lrs, sphere)
                if MOMENTUM:
                    g = beta.to(tl.float32) * m + g
                    mm = tl.sum(g * g).to(tl.float64)
                else:
                    mm = gg
                k, b = _rule(tt, r, gg, mm, q, radius, beta, elr, rule + 7 * sphere)
                if MOVE:
                    if k == k:  # not nan
                        if MOMENTUM:
                            _store(m_at, theta_dtype, g, offsets, m_n, m_vectors, HALF)
                        if b != 0:
                            new = k.to(tl.float32) * theta + b.to(tl.float32) * g
                            _store(theta_at, theta_dtype, new, offsets, n, vectors, HALF)

    @triton.jit
    def _finalize(jobs, spheres, lrs, partials, moments, rule, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr):
        """Per job: the moments of a range of tiles joined in a fixed order (see `join`), as a tensor's line of moments, or for a
        sphere's rule, or both."""
        job = jobs + 4 * tl.program_id(0)
        start, end, line, sphere = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        WIDTH: tl.constexpr = 6 if MOMENTUM else 3
        tt, tr, tq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for at in range(start, end, BLOCK):
            here = partials + WIDTH * (at + tl.arange(0, BLOCK))
            mask = at + tl.arange(0, BLOCK) < end
            t = tl.load(here, mask=mask, other=0.0)
            tt += t
            tr += t * tl.load(here + 1, mask=mask, other=0.0)
            if MOMENTUM:
                tq += t * tl.load(here + 3, mask=mask, other=0.0)
        total = tl.sum(tt)
        r, q = tl.sum(tr) / total, tl.sum(tq) / total
        gg, gm, mm = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for at in range(start, end, BLOCK):
            here = partials + WIDTH * (at + tl.arange(0, BLOCK))
            mask = at + tl.arange(0, BLOCK) < end
            t = tl.load(here, mask=mask, other=0.0)
            dr = tl.load(here + 1, mask=mask, other=0.0) - r
            gg += tl.load(here + 2, mask=mask, other=0.0) + t * dr * dr
            if MOMENTUM:
                dq = tl.load(here + 3, mask=mask, other=0.0) - q
                gm += tl.load(here + 4, mask=mask, other=0.0) + t * dr * dq
                mm += tl.load(here + 5, mask=mask, other=0.0) + t * dq * dq
        g2, gm1, m2 = tl.sum(gg), tl.sum(gm), tl.sum(mm)
        if line >= 0:
            _write(moments + line * WIDTH, total, r, g2, q, gm1, m2, MOMENTUM)
        if sphere >= 0:
            radius, beta, elr = _sphere(spheres, lrs, sphere)
            m2 = tl.maximum(beta * beta * m2 + 2 * beta * gm1 + g2, 0.0) if MOMENTUM else g2
            _rule(total, r, g2, m2, q, radius, beta, elr, rule + 7 * sphere)

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
                new = k.to(tl.float32) * theta + b.to(tl.float32) * (g + u.to(tl.float32) * theta)
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
        params: Iterable,
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
        # Every tensor on a sphere has one line of moments (where rows are spheres, one per row); whose sphere each is.
        self._lines = [_rows(p) if g["sphere"] == "row" else 1 for g in self._on_spheres() for p in g["params"]]
        owner, first = [torch.empty(0, dtype=torch.long)], 0
        for g in self._on_spheres():
            spheres = torch.arange(first, first + len(g["radii"]))
            owner.append(spheres.expand(len(g["params"])) if g["sphere"] == "group" else spheres)
            first += len(spheres)
        self._owner = torch.cat(owner).to(group["params"][0].device)
        self._rows = torch.tensor(self._lines, dtype=torch.float64, device=self._owner.device)
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
    def step(self, closure: Callable | None = None) -> Tensor | None:
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
        `radius` ρ, `elr` η̃, `grad_norm` γ, `angle` φ in radians, `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan where there was no gradient."""
        _, rule, radii, _ = self._last_step()
        rule = rule.clone()  # the kernels write every step into the same table
        return dict(radius=radii, elr=rule[:, 6], grad_norm=rule[:, 3], angle=rule[:, 4].atan(), radial=rule[:, 5])

    def layer_stats(self) -> dict[str, Tensor]:
        """The same per tensor on a sphere, in the order of the param groups: its `norm` ρ_i before the step, its individual ELR
        `elr` = η̃ρ²/ρ_i², its effective gradient norm `grad_norm` = ρ_i‖g_i − r_i θ_i‖, and the `angle` by which the step turns
        it (radians). Where rows are spheres: the tensor's norm, η̃, the norm of its rows' γ and the mean of their φ."""
        moments, rule, radii, beta = self._last_step()
        radii, beta = radii[self._owner], beta[self._owner]
        k, b, u, *_, elr = rule[self._owner].unbind(1)
        tt, r, gg, *rest = moments.unbind(1)
        mm, along = gg, r + u  # of the tensor's step: its square across θ_i, its coefficient along θ_i
        if rest:
            q, gm, mm = rest
            mm, along = (beta**2 * mm + 2 * beta * gm + gg).clamp(min=0), along + beta * q
        angle = torch.atan2(b.abs() * mm.sqrt(), tt.sqrt() * (k + b * along))
        lines = torch.stack([tt, elr * radii**2 / tt, tt * gg, angle], 1)
        tt, elr, gamma2, angle = torch.stack([part.sum(0) for part in lines.split(self._lines)]).unbind(1)
        return dict(norm=tt.sqrt(), elr=elr / self._rows, grad_norm=gamma2.sqrt(), angle=angle / self._rows)

    def _last_step(self) -> tuple[Tensor, ...]:
        if self._last is None:
            raise RuntimeError("no statistics yet: they come with the first step() over a sphere")
        return self._last

    def _torch_step(self, move: bool) -> None:
        """The step in plain PyTorch: moments, the rule, the update; each over all spheres of all groups."""
        width = 6 if any(group["momentum"] for group in self._on_spheres()) else 3
        lines, whole, moving, sphere = [], [], {}, 0  # moving: sphere, or slice of spheres → tensors that move together
        for group in self.param_groups:
            kind = group["sphere"]
            for p in group["params"]:
                rows = _rows(p) if kind == "row" else 1
                at = None if kind is None else slice(sphere, sphere + rows) if kind == "row" and p.dim() else sphere
                m = self._momentum_of(p) if group["momentum"] and p.grad is not None else None
                if p.grad is not None:
                    key = (id(group), at.start, at.stop) if isinstance(at, slice) else (id(group), at)
                    moving.setdefault(key, (group, at, []))[2].append((p, p.grad, m))
                if kind is not None:
                    if p.grad is None:
                        lines.append(p.new_full((rows, width), math.nan, dtype=torch.float64))
                    elif kind == "row":
                        lines.append(_moments_of_rows(p, p.grad, m, rows, width))
                    else:
                        lines.append(None)  # one of `whole`, below
                        whole.append((p, p.grad, m))
                sphere += rows if kind in ("tensor", "row") else 0
            sphere += kind == "group"
        rule = None
        if lines:
            found = iter(_moments(whole, width).split(1) if whole else ())
            lines = [next(found) if line is None else line for line in lines]
            radii, of_sphere, rest = [], [], lines
            for group in self._on_spheres():
                here, rest = rest[: len(group["params"])], rest[len(group["params"]) :]
                radius = group["radii"]
                if group["sphere"] == "group":
                    left_out = [p.reshape(-1) for p in group["params"] if p.grad is None]
                    if left_out:
                        radius = (radius**2 - sum(x.double() @ x.double() for x in left_out)).clamp(min=0).sqrt()
                        here = [x for x, p in zip(here, group["params"], strict=True) if p.grad is not None] or here
                    here = [join(torch.cat(here))]
                of_sphere += here
                radii.append(radius)
            elr, beta = (
                torch.cat([_filled(x, g["radii"]) for g in self._on_spheres() for x in (g[y],)]) for y in ("lr", "momentum")
            )
            moments, radii = torch.cat(of_sphere), torch.cat(radii)
            rule = sphere_rule(moments, radii, elr, beta)
            self._last = torch.cat(lines), rule, radii, beta
        if not move:
            return
        # On the CPU the coefficients become numbers, which is faster; on a GPU that would wait for the device.
        table = rule[:, :3].tolist() if rule is not None and rule.device.type == "cpu" else rule
        for group, at, tensors in reversed(moving.values()):  # what was read last is still in the cache
            if at is None:
                k, b, u = 1.0, -group["lr"], 0.0
            elif isinstance(at, slice):
                k, b, u = rule[at, :3].unbind(1)
            else:
                k, b, u = table[at][:3]
            _move(tensors, k, b, u, group["momentum"])

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
        tables = self._spheres, self._lr_addresses, self._partials, self._moments, self._rule
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
                    radius = (radius**2 - sum(x.double() @ x.double() for x in left_out)).clamp(min=0).sqrt()
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
        self._partials = torch.empty(len(tiles), self._width, dtype=torch.float64, device=device)
        self._rule = torch.full((len(betas), 7), math.nan, dtype=torch.float64, device=device)
        self._moments = torch.full((line, self._width), math.nan, dtype=torch.float64, device=device)
        self._last = (self._moments, self._rule[:sphere], radii[:sphere], betas[:sphere]) if sphere else None

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


class WholeSpaceSGD(torch.optim.SGD):
    """Conventional SGD with weight decay, in the whole space, that tells the ELR which it implies: `stats()` and `layer_stats()`
    as in `SphereSGD`, with `elr` = η/((1 − β)‖θ‖²) at the norm of the moment (of all `scale_invariant` tensors, and of each).

    params            tensors or param groups, as in torch.optim.SGD.
    scale_invariant   those of them that are; the statistics are theirs.
    """

    def __init__(
        self, params: Iterable, scale_invariant: list[Tensor], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.meter = SphereSGD(scale_invariant, lr=1.0)

    def measure(self) -> None:
        """Find what `step()` would report, without moving."""
        self.meter.measure()

    def step(self, closure: Callable | None = None) -> Tensor | None:
        self.meter.measure()
        return super().step(closure)

    def stats(self) -> dict[str, Tensor]:
        found, norms = self.meter.stats(), self.meter.layer_stats()["norm"]
        radius = norms.norm()[None]
        gamma = found["grad_norm"] * radius / found["radius"]
        elr = self._pace() / radius**2
        return dict(radius=radius, elr=elr, grad_norm=gamma, angle=(elr * gamma).atan(), radial=found["radial"])

    def layer_stats(self) -> dict[str, Tensor]:
        found = self.meter.layer_stats()
        elr = self._pace() / found["norm"] ** 2
        return found | dict(elr=elr, angle=(elr * found["grad_norm"]).atan())

    def _pace(self) -> float:
        group = self.param_groups[0]
        return group["lr"] / (1 - group["momentum"])


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
    squares = [p.double().square().reshape(_rows(p) if kind == "row" else 1, -1 if p.numel() else 0).sum(1) for p in params]
    if kind == "group":
        squares = [torch.cat(squares).sum(0, keepdim=True)]
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


def _moments(tensors: list[tuple], width: int) -> Tensor:
    """The moments (see `sphere_rule`) of each of the tensors (θ, g, m or None): [tensors, width] float64."""
    flat, dots, counts = [], [], []
    for p, g, m in tensors:
        wide = torch.float64 if p.numel() <= SMALL else torch.promote_types(p.dtype, torch.float32)
        if p.is_contiguous() and g.is_contiguous():
            theta, g = p.view(-1), g.view(-1)
        else:  # as they lie in memory, so that a dense tensor is not copied
            order = sorted(range(p.dim()), key=p.stride, reverse=True)
            theta, g = p.permute(order).reshape(-1), g.permute(order).reshape(-1)
            m = None if m is None else m.permute(order)
        theta, g, m = theta.to(wide), g.to(wide), None if m is None else m.reshape(-1).to(wide)
        flat.append((theta, g))
        # Large tensors by pieces: all dot products of one while it is in the cache, and float32 sums that stay accurate.
        pieces = [(theta, g, m)]
        if len(theta) > PIECE:
            pieces = zip(*([None] * -(-len(theta) // PIECE) if x is None else x.split(PIECE) for x in (theta, g, m)), strict=True)
        before = len(dots)
        for a, b, c in pieces:
            dots += [torch.dot(a, a), torch.dot(a, b), torch.dot(b, b)]
            if width == 6:
                dots += [torch.dot(a, c), torch.dot(b, c), torch.dot(c, c)] if c is not None else [a.new_zeros(())] * 3
        counts.append((len(dots) - before) // width)
    dots = torch.stack(dots).double().view(-1, width)
    if max(counts) > 1:
        dots = torch.stack([x.sum(0) for x in dots.split(counts)])
    tt, tg, gg, *rest = dots.unbind(1)
    r = torch.where(tt == 0, 0, tg / tt)
    across = gg - r * tg
    # Where g is nearly radial this cancels, in float32 sooner: there subtract before squaring. A GPU must not be asked where.
    cancels = (across < 1e-3 * gg).tolist() if tt.device.type == "cpu" else [True] * len(tensors)
    for i, (theta, g) in enumerate(flat):
        if cancels[i] and theta.dtype != torch.float64:
            across[i] = torch.linalg.vector_norm(g - r[i].to(theta.dtype) * theta, dtype=torch.float64) ** 2
    out = [tt, r, torch.where(across > 8 * torch.finfo(torch.float64).eps * gg, across, 0 * across)]
    if rest:
        tm, gm, mm = rest
        q = torch.where(tt == 0, 0, tm / tt)
        out += [q, gm - q * tg, (mm - q * tm).clamp(min=0)]
    return torch.stack(out, 1)


def _moments_of_rows(p: Tensor, g: Tensor, m: Tensor | None, rows: int, width: int) -> Tensor:
    """The moments of each row of a tensor, [rows, width] float64, in float64 throughout."""
    theta, g, m = (None if x is None else x.double().reshape(rows, p.numel() // max(rows, 1)) for x in (p, g, m))
    tt = (theta * theta).sum(1)

    def split(x):
        along = torch.where(tt == 0, 0, (theta * x).sum(1) / tt)
        return along, x - along[:, None] * theta

    r, g = split(g)
    out = [tt, r, (g * g).sum(1)]
    if width == 6:
        q, m = split(m) if m is not None else (0 * r, 0 * g)
        out += [q, (g * m).sum(1), (m * m).sum(1)]
    return torch.stack(out, 1)


def _filled(x: float | Tensor, like: Tensor) -> Tensor:
    return x.to(like).expand_as(like) if isinstance(x, Tensor) else torch.full_like(like, x)


def _move(tensors: list[tuple], k, b, u, beta: float) -> None:
    """m ← β m + g + u θ, θ ← k θ + b m in place for all (θ, g, m) of one sphere (or of a range of spheres, the rows of one
    tensor: then k, b, u are vectors). k, b, u are numbers or tensors; where they are nan nothing changes."""
    numbers = isinstance(k, float) and isinstance(b, float)
    if numbers and math.isnan(k):
        return
    if numbers and all(_fits_fused(*x) for x in tensors):
        # torch's fused SGD does m ← β m + g + wd θ, θ ← θ − lr m in one pass over memory; without m it has room for k as well.
        ps, gs, ms = (list(x) for x in zip(*tensors, strict=True))
        lr, wd = (-b / k, u) if beta else (-b, (1 - k - b * u) / -b if b else 0.0)
        if 1e-30 < lr < 1e30 and abs(wd) < 1e30:
            sgd(ps, gs, ms, fused=True, lr=lr, weight_decay=wd, momentum=beta, dampening=0, nesterov=False, maximize=False)
            if beta and k != 1:
                torch._foreach_mul_(ps, k)
            return
    for p, g, m in tensors:
        wide = torch.promote_types(p.dtype, torch.float32)
        theta, step = p.to(wide), g.to(wide)
        if isinstance(k, Tensor) and k.dim():
            k, b, u = (x.view(-1, *[1] * (p.dim() - 1)) for x in (k, b, u))
        step = (step if m is None else beta * m.to(wide) + step) + u * theta
        new = k * theta + b * step
        if not numbers:
            stays = torch.isnan(b) if isinstance(b, Tensor) else torch.tensor(False)
            new, step = torch.where(stays, theta, new), step if m is None else torch.where(stays, m, step)
        p.copy_(new)
        if m is not None:
            m.copy_(step)


def _fits_fused(p: Tensor, g: Tensor, m: Tensor | None) -> bool:
    same = all(x is None or (x.dtype == p.dtype and x.stride() == p.stride()) for x in (g, m))
    return p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) and same and _dense(p)


# ------------------------------------------------------------------------------- python sphere_step.py: check, then measure


def check(cases: int = 30) -> float:
    """The largest relative error of a float32 step against the formula in float64, over random shapes, spheres and ELRs."""
    worst, device = 0.0, "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    for _ in range(cases):
        sphere = SPHERES[torch.randint(3, ()).item()]
        shapes = torch.randint(1, 200, (torch.randint(1, 12, ()).item(), 2)).tolist()
        tensors = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        for p in tensors:
            p.grad = torch.randn_like(p) + 0.3 * p.detach()
        before = [(p.detach().double().cpu(), p.grad.double().cpu()) for p in tensors]
        if sphere == "group":
            before = [tuple(torch.cat([x.flatten() for x in column]) for column in zip(*before, strict=True))]
        if sphere == "row":
            before = [row for pair in before for row in zip(*pair, strict=True)]
        elr = 1 / max((x.norm() * g.norm()).item() for x, g in before)
        SphereSGD(tensors, lr=elr, sphere=sphere).step()
        after = [p.detach().double().cpu() for p in tensors]
        after = [torch.cat([x.flatten() for x in after])] if sphere == "group" else after
        after = [row for x in after for row in x] if sphere == "row" else after
        for (x, g), new in zip(before, after, strict=True):
            v = x - elr * x.norm() ** 2 * (g - (x * g).sum() / (x * x).sum() * x)
            worst = max(worst, ((new - x.norm() * v / v.norm()).norm() / x.norm()).item())
    return worst


def resnet18_shapes(width: int) -> list[tuple[int, ...]]:
    """The convolutions of a ResNet-18 of width k: 20 tensors, 11.2 million parameters at width 64."""
    shapes, before = [(width, 3, 3, 3)], width
    for after in (width, 2 * width, 4 * width, 8 * width):
        shapes += [(after, before, 3, 3), (after, after, 3, 3), (after, after, 3, 3), (after, after, 3, 3)]
        shapes += [(after, before, 1, 1)] if before != after else []
        before = after
    return shapes


def measure_steps(shapes: list[tuple[int, ...]], device: str, repetitions: int) -> dict[str, float]:
    """Median seconds of a step over tensors of these shapes, by this file and by its peers, interleaved in one process."""
    import statistics
    import time

    elr = 1e-9  # so small that the weights stay what they are, however often the step is repeated
    params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    plain = torch.optim.SGD(params, lr=elr)
    norms = [p.detach().norm().item() for p in params]

    def usual():
        plain.step()
        with torch.no_grad():
            for p, norm in zip(params, norms, strict=True):
                p.mul_(norm / p.norm().item())

    @torch.compile
    def formula(thetas, grads, radius, elr):
        tt = sum((x * x).sum() for x in thetas)
        r = sum((x * g).sum() for x, g in zip(thetas, grads, strict=True)) / tt
        steps = [x - elr * radius**2 * (g - r * x) for x, g in zip(thetas, grads, strict=True)]
        scale = radius / sum((x * x).sum() for x in steps).sqrt()
        for x, new in zip(thetas, steps, strict=True):
            x.copy_(scale * new)

    def compiled():
        with torch.no_grad():
            formula(params, [p.grad for p in params], radius, elr)

    radius = math.sqrt(sum(norm**2 for norm in norms))
    methods = {"SphereSGD, joint sphere": SphereSGD(params, lr=elr).step}
    methods["SphereSGD, sphere per tensor"] = SphereSGD(params, lr=elr, sphere="tensor").step
    if not _no_triton([{"params": params}]):
        methods["the same in PyTorch, joint sphere"] = SphereSGD(params, lr=elr, backend="torch").step
    each = [SphereSGD([p], lr=elr) for p in params]
    methods["one SphereSGD per tensor"] = lambda: [optimizer.step() for optimizer in each]
    methods["torch.compile of the formula"] = compiled
    methods["SGD, then norms and scaling"] = usual
    try:
        import geoopt

        flat = [p.detach().view(-1) for p in params]  # its sphere is over the last dimension
        balls = [geoopt.ManifoldParameter(x / x.norm(), manifold=geoopt.Sphere()) for x in flat]
        for ball, p in zip(balls, params, strict=True):
            ball.grad = p.grad.view(-1)
        methods["geoopt RiemannianSGD, Sphere"] = geoopt.optim.RiemannianSGD(balls, lr=elr).step
    except ImportError:
        pass
    methods["plain SGD (foreach)"] = torch.optim.SGD(params, lr=elr, foreach=True).step
    methods["plain SGD (fused)"] = torch.optim.SGD(params, lr=elr, fused=True).step
    if device == "cuda":
        source = torch.empty(sum(p.numel() for p in params), device=device)
        target = torch.empty_like(source)
        methods["copy, 8 bytes"] = lambda: target.copy_(source)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {name: [] for name in methods}
    for repetition in range(repetitions + 2):
        for name, step in methods.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            if repetition >= 2:  # the first ones compile and lay out
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    import argparse

    text = "Check the step against float64, then time it beside its peers."
    argparse.ArgumentParser(description=text, epilog="example: TRITON_INTERPRET=1 python sphere_step.py").parse_args()
    device = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    kernels = not _no_triton([{"params": [torch.empty(1, device=device)]}])
    how = "the Triton kernels" + " (interpreted)" * INTERPRET if kernels else "the step in PyTorch (Triton's kernels need a GPU)"
    worst = check()
    print(f"{how} against float64: largest relative error {worst:.1e} in 30 random cases")
    if worst > 1e-6:
        return 1
    if INTERPRET:
        return 0
    machine = torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    print(f"on {machine}, median of a step")
    cases = {f"ResNet-18, width {k}": (resnet18_shapes(k), 50 if k < 64 else 20) for k in (16, 32, 64)}
    cases["one tensor of 100 million"] = [(10_000, 10_000)], 5
    for name, (shapes, repetitions) in cases.items():
        count = sum(math.prod(shape) for shape in shapes)
        times = measure_steps(shapes, device, repetitions)
        floor = min(seconds for method, seconds in times.items() if method.startswith("plain"))
        print(f"\n{name}: {count / 1e6:.1f} million parameters in {len(shapes)} tensors")
        print(f"{'':36}{'µs':>10}{'GB/s at 12 bytes':>18}{'× plain SGD':>13}")
        for method, seconds in times.items():
            gigabytes = (8 if method.startswith("copy") else 12) * count / seconds / 1e9
            print(f"{method:36}{seconds * 1e6:10.0f}{gigabytes:18.1f}{seconds / floor:13.2f}")
    if device == "cpu":
        print("\nThe rows of the fused kernels, and the copy they are held against, need a GPU.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
