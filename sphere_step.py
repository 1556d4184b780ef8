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

import torch
from torch import Tensor
from torch.optim.sgd import sgd

SPHERES = ("group", "tensor", "row", None)


def sphere_rule(dots: Tensor, radius: Tensor, elr: Tensor, beta: Tensor) -> Tensor:
    """From a sphere's dot products to the coefficients of its step and what the step tells.

    dots [n, 3 or 6] float64: ⟨θ,θ⟩ ⟨θ,g⟩ ⟨g,g⟩ and, with momentum, ⟨θ,m⟩ ⟨g,m⟩ ⟨m,m⟩; radius ρ, elr η̃, beta β: [n] float64.
    Returns [n, 6]: k, b, u, γ, tan φ, radial of
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
    return torch.where(dots.sum(1, keepdim=True).isfinite(), table, math.nan)


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

    A tensor without a gradient is left out of its sphere for that step. A sphere whose weights or gradient are not finite
    stays as it is, and `stats()` says nan. Nothing in `step()` waits for a GPU. Raises ValueError for a bad option or a
    sphere of norm zero, RuntimeError for a sparse gradient.
    """

    def __init__(
        self, params, lr: float | Tensor, sphere: str | None = "group", radius: float | None = None, momentum: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum))

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group, self.param_groups[0]["params"][0].device)
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
        self._last = None

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group in self._on_spheres():  # torch moves the parameters' state to their device, but not the groups'
            group["radii"] = group["radii"].to(group["params"][0].device)

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
        self._torch_step(move=True)
        return loss

    @torch.no_grad()
    def measure(self) -> None:
        """Find what a `step()` would report in `stats()` and `layer_stats()`, without moving weights or momentum."""
        self._torch_step(move=False)

    def stats(self) -> dict[str, Tensor]:
        """Of the last step, per sphere in the order of the param groups (float64, on the device, without waiting for it):
        `radius` ρ, `grad_norm` γ, `angle` φ in radians, `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan where there was no gradient."""
        _, rule, radii, *_ = self._last_step()
        return dict(radius=radii, grad_norm=rule[:, 3], angle=rule[:, 4].atan(), radial=rule[:, 5])

    def layer_stats(self) -> dict[str, Tensor]:
        """The same per tensor on a sphere, in the order of the param groups: its `norm` ρ_i before the step, its individual ELR
        `elr` = η̃ρ²/ρ_i², its effective gradient norm `grad_norm` = ρ_i‖g_i − r_i θ_i‖, and the `angle` by which the step turns
        it (radians). Where rows are spheres: the tensor's norm, η̃, the norm of its rows' γ and the mean of their φ."""
        dots, rule, *of_sphere = self._last_step()
        radii, elr, beta = (x[self._owner] for x in of_sphere)
        k, b, u = rule[self._owner, :3].unbind(1)
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
            if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
                raise ValueError(f"lr is {lr}: it must be finite and not negative")
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
            self._last = torch.cat(lines), rule, radii, elr, beta
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

    def _momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


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
