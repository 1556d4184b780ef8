"""Train scale-invariant weights on a sphere at a fixed effective learning rate (ELR).

A sphere is a set of tensors that share one norm. θ is their concatenation, ρ the radius (fixed),
g the gradient, m the momentum (without it β = 0), η̃ the ELR. One step is

    r = ⟨θ,g⟩/‖θ‖²      g_t = g − rθ                   projection on the tangent space
    q = ⟨θ,m⟩/‖θ‖²      m ← β(m − qθ) + g_t            Riemannian heavy ball
    θ ← ρ (θ − η̃ρ²m) / ‖θ − η̃ρ²m‖                     step and renormalization
    γ = ρ‖g_t‖          tan φ = η̃ρ²‖m‖/‖θ‖            effective gradient norm, angular step

or φ is given, and η̃ follows. All scalars follow from the Gram matrix of (θ, g, m), a sum over
tiles and tensors: `sphere_rule` makes k, b, u of it, and m ← βm + g + uθ, θ ← kθ + bm. With k = 1,
b = −η and u = λ, the weight decay, this is SGD: the step of what is on no sphere.

Source: Kodryan et al., NeurIPS 2022 (arXiv 2209.03695). Needs torch and numpy; the kernels
need Triton.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections import Counter
from functools import partial
from inspect import unwrap
from itertools import product
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    from torch.distributed import all_reduce
except ImportError:  # a torch without it
    all_reduce = None

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
PIECE = 1 << 17  # elements at once in PyTorch: float32 sums of more are not accurate
FLOAT64_SUMS = 1024  # a vector of so few elements is summed in float64
IN_PYTHON = 12  # spheres: the rules of more are made in numpy
STACKED = 8192  # elements of tensors that are stacked with others of their shape
OPTIONS = "sphere", "radius", "momentum", "angle", "weight_decay"
OTHER_KEYS = "params", "param_names", "name", "lr", "differentiable"  # of a param group


# -------------------------------------------------------------------------------------- the rule


def _where(condition, a, b):
    if not isinstance(condition, np.ndarray):
        return a if condition else b
    true = np.count_nonzero(condition)  # which is quick
    if true == condition.size:  # of many rules the same way is mostly that of all
        return a
    return np.where(condition, a, b) if true else b


def _per_root(x):
    return 1 / x**0.5


def _formula(tt, tg, gg, tm, gm, mm, lr, beta, tan, radius, where, per_root):
    """`sphere_rule` for Python, numpy and Triton, which bring `where` and 1/√x. tan is tan φ where
    the angle is set, else -1: it follows from lr = η̃."""
    # All is finite, and θ has a direction. If it is zero, but ρ is given: θ ← −ρ m/‖m‖
    nan = float("nan")  # Triton 3.3 takes no tuple of numbers
    infinite = float("inf")
    good = (tt + gg + mm < infinite) & (lr >= 0) & (lr < infinite)
    zero = (tt == 0) & (gg > 0) & (radius > 0)
    good = good & ((tt > 0) | zero)
    measured, tt = tt, where(tt > 0, tt, where(zero, radius * radius, 1.0))

    # With d = g + βm the new m is d + uθ, orthogonal to θ; s is its norm, 0 if it is mere rounding
    per_norm = per_root(tt)
    td, dd = tg + beta * tm, gg + beta * (2 * gm + beta * mm)
    u = -td * per_norm * per_norm
    s2 = dd + u * td
    s2 = where(s2 > 1e-13 * (gg + beta * beta * mm), s2, 0.0)

    # tan φ = η̃ρ²s/‖θ‖, or η̃ from a given tan φ
    norm = tt * per_norm
    radius = where(radius == 0, norm, radius)
    radius2 = radius * radius
    way2 = s2 * radius2 * radius2
    per_way = per_root(where(way2 > 0, way2, 1.0))  # 1/(ρ²s)
    from_lr = tan < 0
    tan = where(from_lr, lr * way2 * per_way * per_norm, tan)
    tan = where(tan < 1e100, tan, 1e100)
    stays = (way2 == 0) | (tan == 0)
    elr = where(from_lr, lr, where(stays, 0.0, tan * norm * per_way))

    # θ ← ρ (cos φ θ/‖θ‖ − sin φ m/s) = kθ + bm
    tan = where(zero, 1e100, tan)
    along = radius * per_root(1 + tan * tan)  # ρ cos φ
    k = where(stays, 1.0, along * per_norm)
    b = where(stays, 0.0, -along * tan * per_way * radius2)
    good = good & (k < 1e38) & (b > -1e38) & (u < 1e38) & (u > -1e38)  # they fit float32

    # Whether something else moved θ: its norm is off by more than steps in 16 bits leave it
    off = (measured > 0) & ((measured < 0.98 * radius2) | (measured > 1.02 * radius2))
    moved = where(good & off & (b != 0), 1.0, 0.0)
    bu = b * u
    wide = where((bu > 100 * k) | (bu < -100 * k), 1.0, 0.0)  # g + uθ cancels: in float64
    k, b, u = where(good, k, nan), where(good, b, nan), where(good, u, nan)
    elr, radius, beta = where(good, elr, nan), where(good, radius, nan), where(good, beta, nan)
    return k, b, u, elr, radius, beta, moved, wide, k + bu


_rule_of_numbers = partial(_formula, where=_where, per_root=_per_root)


def sphere_rule(gram, radius, lr, beta, angle):
    """k, b and u of a step from the Gram matrix of its sphere; then η̃, ρ and β.

    gram: ⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩, ⟨θ,m⟩, ⟨g,m⟩, ⟨m,m⟩; radius: ρ, 0 for the norm of θ; lr: η̃, with
    `angle` φ. A step of length 0 gives k = 1, b = 0; what is not finite, or does not fit float32,
    nan: the sphere stays.
    """
    tan = math.tan(lr) if angle else -1.0
    return _rule_of_numbers(*gram, lr, beta, tan, radius)[:6]


# --------------------------------------------------------------------------------- the optimizer


class SphereSGD(torch.optim.Optimizer):
    """Gradient descent on spheres at a fixed effective learning rate, or angle.

    params    tensors, or param groups with options of their own
    lr        the ELR η̃, a float or a tensor of one; every torch.optim.lr_scheduler works on it
    sphere    what shares a norm: "group", all tensors of the param group; "tensor"; "row", each
              slice tensor[i] (output filter); None: nothing, and the group is stepped by SGD
    radius    to which spheres are scaled at once; None: the norms that they have. With it, a sphere
              of zeros takes its direction from its first gradient
    momentum  β of the heavy ball, Riemannian on a sphere
    angle     True: lr is the angle φ < π/2 by which each sphere turns; what is on no sphere has the
              learning rate η̃ρ² of the spheres that move (the median; of rows that are shared out
              over ranks the median of the ranks' medians)
    weight_decay  λ of what is on no sphere; without effect on one
    backend   "triton": kernels, at most three launches per dtype, on a GPU (to test them, on a CPU
              with TRITON_INTERPRET=1, whose fma rounds twice: nearly radial gradients are less
              exact there); "torch"; "auto": Triton where it can run

    A tensor without a gradient stays out of that step; a sphere that is not finite stays. 16-bit
    weights lose what is smaller than half a unit in their last place: with bfloat16 an angle below
    about 2e-3 is mostly rounded away, whatever the statistics say.
    The radii are those of the moment when the optimizer is made: load weights before. The next step
    takes those that are loaded later to the old norms, and warns once (Triton: the first step).
    Shards: of DTensors (FSDP2, tensor parallelism) on one mesh the Gram matrices are added up by an
    all_reduce per process group; `stats` are the global ones, of rows those on this rank. ZeRO's
    partitions of a param group cannot share a "group" sphere: take "tensor".
    In a CUDA graph: step once before, lr a tensor on the GPU (the last valid angle holds),
    zero_grad(set_to_none=False). Raises ValueError for a bad option, a tensor given twice or in
    parts, with holes in memory, a sphere of norm zero, a state of other shapes, a sparse gradient.
    """

    def __init__(self, params, lr, sphere="group", radius=None, momentum=0.0, angle=False,
                 weight_decay=0.0, backend="auto"):  # fmt: skip
        self.backend = backend
        self._layout = None  # of the tensors as lines and spheres: made at the first step
        self._captured = []  # what CUDA graphs read and write
        self._sizes = {}  # elements of each tensor when it was given
        self._checked = None  # the options of the groups that were found sound
        self._warned = False  # of weights that something else has moved
        self._made = False  # until all groups are found sound, nothing is scaled
        defaults = dict(lr=lr, sphere=sphere, radius=radius, momentum=momentum, angle=angle)
        super().__init__(params, defaults | dict(weight_decay=weight_decay))
        self._check()
        self._made = True
        for group in self.param_groups:
            self._scale(group)

    # torch wraps this and the next ones for torch.compile, which takes a second to import
    state_dict = unwrap(torch.optim.Optimizer.state_dict)

    @torch.no_grad()
    def add_param_group(self, param_group):
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group, new=True)
            for name in group.keys() - {*OPTIONS, *OTHER_KEYS}:  # those of schedulers: initial_lr
                other = not name.endswith(("_lr", "_momentum"))
                _refuse(other, f"{name}={group[name]!r}: there is no such option")
            for number, p in enumerate(group["params"], len(self._sizes)):
                _check_tensor(group, p, f"parameter {number} of shape {tuple(p.shape)}")
            _check_overlaps(group["params"])  # with other groups: when it is made, or steps
            norms = _norms(group, zeros=group["radius"] is not None)
        except Exception:
            self.param_groups.pop()
            raise
        for i, p in enumerate(group["params"]):
            self._sizes[p] = p.numel()
            state = self.state[p]  # an empty one, too: torch.distributed.checkpoint asks for it
            if group["sphere"]:
                radii = torch.full_like(norms[i], group["radius"]) if group["radius"] else norms[i]
                state["radius"] = _like_rows(group, p, radii)
            if group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(p)
        if self._made:
            self._scale(group)

    def __getstate__(self):
        return super().__getstate__() | {"backend": self.backend}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._layout, self._captured, self._checked = None, [], None
        self._made, self._warned = True, False
        self._sizes = {p: p.numel() for group in self.param_groups for p in group["params"]}

    def load_state_dict(self, state_dict):
        """As torch's. An lr that is a tensor stays that tensor and takes the value."""
        before, made = dict(self.__dict__), []
        try:
            # The last pre-hook sees the state as the others have changed it
            with self.register_load_state_dict_pre_hook(lambda _, state: made.append(state)):
                unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)
            (state_dict,) = made
            self._captured, self._sizes = before["_captured"], before["_sizes"]
            for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
                _check_options(group, new=True)
                for p, key in zip(group["params"], given["params"], strict=True):
                    state, saved = self.state[p], state_dict["state"].get(key, {})
                    if state.get("momentum_buffer", p) is None:  # as torch's SGD leaves it
                        del state["momentum_buffer"]
                    if group["sphere"]:  # torch has made it of the parameter's type
                        radius = saved.get("radius", before["state"][p].get("radius"))
                        vector = isinstance(radius, Tensor) and radius.dim() == 1
                        _refuse(not vector, "the state has a radius that is no vector")
                        state["radius"] = radius.to(p.device, torch.float64)
                    _check_state(group, p, state)
                if group["sphere"] == "group" and group["params"]:
                    radii = [self.state[p]["radius"] for p in group["params"]]
                    several = any(not torch.equal(radius, radii[0]) for radius in radii)
                    _refuse(several, "the state has several radii for one sphere")
            self._check()
        except Exception as error:
            self.__dict__ = before  # nothing changed
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"this is no state of an optimizer: {error!r}") from error
        lrs = {}  # groups that share a tensor may have different values now
        for group, old in zip(self.param_groups, before["param_groups"], strict=True):
            lr, value = old["lr"], float(group["lr"])
            if isinstance(lr, Tensor):
                same = lrs.setdefault(id(lr), value) == value
                group["lr"] = (lr if same else lr.clone()).fill_(value)

    @torch.no_grad()
    def normalize(self):
        """Put the weights back on their spheres, from which something else moved them."""
        for group in self.param_groups:
            self._scale(group, always=True)

    def _scale(self, group, always=False):
        """To its radius, if one is given, or always; zeros stay."""
        norms = _norms(group, zeros=True) if always or group["radius"] else []
        for p, norm in zip(group["params"], norms, strict=False):
            x, radius = _local(p.detach()), _local(self.state[p]["radius"])
            scale = torch.where(norm > 0, radius / norm, 1.0)
            if x.element_size() >= 4:  # without a copy in float64
                scale = scale.to(x.dtype)
            x.mul_(scale.view([-1, *[1] * x.dim()][: x.dim()]))

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

    def _apply(self, move):
        apply = self._apply_now
        if torch.compiler.is_compiling():
            apply = torch.compiler.disable(apply)  # which takes a second to import
        apply(move)

    def _apply_now(self, move):
        options = [[group.get(name, "missing") for name in OPTIONS] for group in self.param_groups]
        if options != self._checked:
            for group, before in zip(self.param_groups, self._checked or [], strict=False):
                radius = group.get("radius")
                _refuse(radius != before[1], f"radius={radius!r}: it cannot change between steps")
            for group in self.param_groups:
                _check_options(group)
            self._checked = options
        if self._layout is None or not self._layout.fits():
            kind, device = self._check()
            params = [p for group in self.param_groups for p in group["params"]]
            fewer = len(params) < len(self._sizes)
            _refuse(fewer, "a tensor was taken out of param_groups: make the optimizer anew")
            for p in params:
                name = f"a tensor of shape {tuple(p.shape)} was put into param_groups"
                _refuse(p not in self._sizes, f"{name} (a flat partition?): call add_param_group")
            self._layout = kind(self, device)
        layout = self._layout
        lrs = [_lr(group, wait=not layout.kernels) for group in self.param_groups]
        layout.refresh()  # raises, if anything does, before anything moves
        options = []
        for group, lr, whole in zip(self.param_groups, lrs, layout.whole, strict=True):
            tan = math.tan(lr) if group["angle"] and not isinstance(lr, Tensor) else -1.0
            # Without the gradient of one tensor the others keep the norm that they have together
            at_radius = float(whole and move)
            plain = float(group["sphere"] is None)
            options.append((lr, group["momentum"], tan, at_radius, plain, group["weight_decay"]))
        layout.step(options, move)
        if layout.capturing():
            self._captured.append((vars(layout).copy(), options))
        if layout.moved_before and not self._warned:
            self._warned = True
            problem = "weights were changed since the optimizer was made, as by load_state_dict"
            cure = "this step takes them to the norms of then. To keep the new ones, make it anew"
            warnings.warn(f"{problem}: {cure}", stacklevel=6)

    @property
    def last(self):
        """Of the last step two tensors, to be kept and given to `stats` and the others later: the
        sums [parts, 6] of which their Gram matrices are made, and the six numbers of `sphere_rule`
        for each sphere [spheres, 6]."""
        return self._stepped().last()

    def grams(self, last=None):
        """Gram matrices (θθ, θg, gg, θm, gm, mm) of the last step, [lines, 6] float64: of each
        tensor on a sphere, or of its rows where they are spheres; 0 without a gradient. With the
        `last` of several steps, stacked: [steps, lines, 6]."""
        layout = self._stepped()
        parts, _ = last or layout.last()
        return _sums_by(parts, layout.line_of_part, len(layout.sphere_of_line))

    def stats(self, last=None):
        """Of the last step, [spheres] float64: `radius` ρ, `elr` η̃, `grad_norm` γ, `angle` φ,
        `radial` ⟨θ,g⟩/(‖θ‖‖g‖); nan without a gradient. Several steps: as `grams`."""
        layout = self._stepped()
        last = last or layout.last()
        grams = _sums_by(self.grams(last), layout.sphere_of_line, len(layout.radii))
        _, g2, angle, radial, elr, radius = _described(grams, last[1])
        gamma = radius * g2.sqrt()
        return dict(radius=radius, elr=elr, grad_norm=gamma, angle=angle, radial=radial)

    def layer_stats(self, last=None):
        """The same per tensor on a sphere: its `norm` ρ_i before the step, its own ELR `elr`
        = η̃ρ²/ρ_i², `grad_norm` = ρ_i‖g_i − r_iθ_i‖, the `angle` by which it turned. Where rows are
        spheres: the tensor's norm, η̃, the norm of its rows' γ, the mean φ. If the parameters were
        given with names: `name`, a list of them."""
        layout = self._stepped()
        last = last or layout.last()
        rules, tensor = last[1][..., layout.sphere_of_line, :], layout.tensor_of_line
        tt, g2, angle, _, elr, radius = _described(self.grams(last), rules)
        lines = torch.stack([tt, elr * radius**2 / tt, tt * g2, angle, tt**0], -1)
        names = [name for group in self._on_spheres() for name in group.get("param_names", ())]
        tensors = sum(len(group["params"]) for group in self._on_spheres())
        tt, elr, gamma2, angle, n = _sums_by(lines, tensor, tensors).unbind(-1)
        found = dict(norm=tt.sqrt(), elr=elr / n, grad_norm=gamma2.sqrt(), angle=angle / n)
        return dict(name=names, **found) if names else found

    def _stepped(self):
        """The layout of the last step. RuntimeError where there is none."""
        if self._layout is None or not self._on_spheres():
            raise RuntimeError("no statistics before the first step on a sphere")
        return self._layout

    def _on_spheres(self):
        return [group for group in self.param_groups if group.get("sphere")]

    def _check(self):
        """How a step is made, and the device. ValueError where none can be made."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        device = params[0].device if params else torch.device("cpu")
        possible = triton is not None and device.type == ("cpu" if INTERPRET else "cuda")
        possible = possible and all(p.dtype in DTYPES for p in params)
        right = "auto", "torch", "triton" if possible else "auto"
        cure = "it must be 'auto', 'torch' or, on a GPU, not in float64, 'triton'"
        _refuse(self.backend not in right, f"backend={self.backend!r}: {cure}")
        turns, spheres = any(x["angle"] for x in groups), any(x["sphere"] for x in groups)
        _refuse(turns and not spheres, "angle=True: there is no sphere that could turn by it")
        for number, (group, p) in enumerate(zip(groups, params, strict=True)):
            name, state = f"parameter {number} of shape {tuple(p.shape)}", self.state.get(p, {})
            _check_tensor(group, p, name)
            _refuse(p.device != device, f"{name} is on {p.device}, not on {device}")
            _check_momentum(p, state.get("momentum_buffer"), name)
            size = self._sizes.get(p, p.numel())
            _refuse(size != p.numel(), f"{name} had {size} elements: make the optimizer anew")
            if "radius" in state and group["sphere"]:
                radii, rows = _local(state["radius"]).numel(), _rows(group, _local(p))[0]
                _refuse(radii != rows, f"{name} has {rows} spheres, but {radii} radii")
        _check_overlaps(params)
        meshes = {p.device_mesh for p in params if _is_dtensor(p)}
        _refuse(len(meshes) > 1, "the DTensors are on several device meshes: an optimizer for each")
        return _ByKernels if possible and self.backend != "torch" else _InPyTorch, device


class watch:
    """Measures γ and the angle φ of each step of any optimizer, jointly and of each tensor.

    optimizer  of torch, also as Accelerate and Lightning wrap it
    params     the scale-invariant weights, or pairs (name, tensor); None: all of two or more
               dimensions

    `row()` returns the steps so far and the means since the last call; `layers` then has those of
    the tensors. `last`, [2, 1 + tensors] float64, is γ and φ of the last step, first jointly. The
    gradient is that of the step: clipped, unscaled, with a closure that of its first call; a tensor
    without one stays out: nan in `last`. It takes a copy of the weights, and a pass over them
    before and after each step. Raises ValueError for shards, or none of the optimizer's tensors.
    """

    def __init__(self, optimizer, params=None):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        own = [p for group in optimizer.param_groups for p in group["params"]]
        if params is None:
            params = [p for p in own if p.dim() > 1]
        pairs = [x if isinstance(x, tuple) else (str(i), x) for i, x in enumerate(params)]
        none = {id(p) for p in own}.isdisjoint(id(p) for _, p in pairs)
        shards = any(hasattr(p, "__tensor_flatten__") for _, p in pairs)
        default = "by default those of two or more dimensions"
        _refuse(none or shards, f"params: it takes tensors of the optimizer, {default}, no shards")
        self.names, self.params = zip(*pairs, strict=True)
        self.last, self.layers, self._steps = None, [], 0
        self._old, self._gram = [], None  # during a step: the weights before it, and their products
        self._before_step = None  # what `_sums` was before it
        device = pairs[0][1].device
        self._sums = torch.zeros(3, 1 + len(pairs), dtype=torch.float64, device=device)
        before = optimizer.register_step_pre_hook(self._before)
        self.hooks = before, optimizer.register_step_post_hook(self._after)  # each has remove()

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs):
        self._old, self._gram = [p.clone() for p in self.params], None
        self._before_step = self._sums.clone()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            return self._observe(optimizer)

        def observed():
            loss = closure()
            if self._gram is None:
                self._observe(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, kwargs | {"closure": observed}

    @torch.no_grad()
    def _observe(self, optimizer):
        """⟨θ,θ⟩, ⟨θ,g⟩, ⟨g,g⟩ and 1 of each tensor; 0 without a gradient."""
        self._gram = self._sums.new_zeros(len(self.params), 4)
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler's, where the step unscales
        for gram, p in zip(self._gram, self.params, strict=True):
            if p.grad is not None:
                g = p.grad.to_dense().double()
                gram[:3] = _gram_of_two(p, g if scale is None else g / scale)
                gram[3] = 1

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs):
        moves = torch.zeros_like(self._gram[:, :2])
        for i, (p, old) in enumerate(zip(self.params, self._old, strict=True)):
            moves[i] = _gram_of_two(old, p.double() - old.double())[1:]
        gram = torch.cat([self._gram, moves * self._gram[:, 3:]], 1)
        tt, tg, gg, n, td, dd = torch.cat([gram.sum(0, keepdim=True), gram]).T
        gamma = (tt * gg - tg * tg).clamp(min=0).sqrt()
        angle = torch.atan2((tt * dd - td * td).clamp(min=0).sqrt(), tt + td)
        if getattr(optimizer, "found_inf", None) is not None:  # then GradScaler skips the step
            n = n * (optimizer.found_inf == 0)
        self.last = torch.where(n > 0, torch.stack([gamma, angle]), math.nan)
        # Not +=: a step that calls its parent's runs the hooks twice, and is to count once
        step = torch.where(n > 0, torch.stack([gamma, angle, tt**0]), 0.0)
        self._sums.copy_(self._before_step + step)

    def row(self):
        sums = self._sums.tolist()
        self._sums.zero_()
        self._steps += int(sums[2][0])
        rows = []
        for gamma, angle, n in zip(*sums, strict=True):
            rows.append(dict(grad_norm=gamma / n, angle=angle / n) if n else {})
        self.layers = [dict(layer=x) | row for x, row in zip(self.names, rows[1:], strict=True)]
        return dict(step=self._steps) | rows[0]


def _gram_of_two(x, y):
    """⟨x,x⟩, ⟨x,y⟩, ⟨y,y⟩ in float64."""
    x, y = x.double().reshape(-1), y.double().reshape(-1)
    return torch.stack([x.dot(x), x.dot(y), y.dot(y)])


# -------------------------------------------------------- options, tensors, norms, and their shards


def _refuse(bad, message):
    if bad:
        raise ValueError(message)


def _check_options(group, new=False):
    """ValueError for an option of a param group that it cannot have; its lr if it is new."""
    group.setdefault("weight_decay", 0.0)
    sphere, radius, momentum, angle, decay = (group.get(name, "missing") for name in OPTIONS)
    at_radius = _is_number(radius) and 0 < radius < math.inf
    rules = [
        ("sphere", sphere in ("group", "tensor", "row", None), "'group', 'tensor', 'row' or None"),
        ("radius", radius is None or at_radius, "a positive number, or None"),
        ("momentum", _is_number(momentum) and 0 <= momentum < 1, "in [0, 1)"),
        ("angle", isinstance(angle, bool), "True or False; lr is the angle"),
        ("weight_decay", _is_number(decay) and 0 <= decay < math.inf, "finite, ≥ 0"),
    ]
    for name, good, wanted in rules:
        _refuse(not good, f"{name}={group.get(name, 'missing')!r}: it must be {wanted}")
    if new:
        _lr(group, nan=False)


def _is_number(x):
    return isinstance(x, Real) and not isinstance(x, bool)


def _lr(group, wait=True, nan=True):
    """η̃ or φ as a number, or nan; on a GPU, where one does not wait, the tensor."""
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.is_cuda and not wait:
        return lr.squeeze()
    number = isinstance(lr, float) or _is_number(lr) or isinstance(lr, Tensor) and lr.numel() == 1
    value = float(lr) if number else -1.0
    most = math.pi / 2 if group.get("angle") else math.inf
    if value < 0 or value >= most or (math.isnan(value) and not nan):  # at each step
        raise ValueError(f"lr={lr!r}: it must be finite, ≥ 0 (an angle below π/2)")
    return value


def _check_tensor(group, p, name):
    """ValueError where a tensor cannot be stepped."""
    x = _local(p)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)  # as they lie in memory
    if group["sphere"] == "row":
        order.sort(key=bool)  # row after row
    other = hasattr(p, "__tensor_flatten__") and not _is_dtensor(p)
    _refuse(other, f"{name} is a {type(p).__name__}: it must be a plain tensor or a DTensor")
    for placement in p.placements if _is_dtensor(p) else ():
        known = type(placement).__name__ in ("Replicate", "Shard", "_StridedShard")
        _refuse(not known, f"{name} is a DTensor of {placement!r}: take Shard or Replicate")
    odd = p.dtype not in (*DTYPES, torch.float64) or p.device.type == "meta"
    kinds = "it must be of 16, 32 or 64 bits, with numbers"
    _refuse(odd, f"{name} is {p.dtype} on {p.device}: {kinds}")
    flat = getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False)
    _refuse(flat, f"{name} is in FSDP1's flat parameter, cut anywhere: take fully_shard")
    holes = not x.permute(order).is_contiguous()
    _refuse(holes, f"{name} has holes in memory, or scattered rows: clone it")


def _check_momentum(p, m, name):
    """ValueError for a momentum_buffer that cannot be that of a tensor; None is none as yet."""
    if m is not None:
        _refuse(m.shape != p.shape, f"{name} has a momentum_buffer of shape {tuple(m.shape)}")
        one = "or its momentum_buffer is a DTensor, not both: load it by set_optimizer_state_dict"
        _refuse(_is_dtensor(m) != _is_dtensor(p), f"{name} {one}")


def _check_state(group, p, state):
    """ValueError for a state that was loaded and cannot be that of the tensor."""
    m, radius = state.get("momentum_buffer", p), _local(state.get("radius", torch.ones(1)))
    _refuse(not isinstance(m, Tensor), "the state has a momentum_buffer that is no tensor")
    finite = _local(m).isfinite().all() and radius.isfinite().all()
    _refuse(not finite, "the state has a radius or momentum that is not finite")
    if p.numel() and "radius" in state:  # the sphere of an empty tensor is a point
        _refuse((radius <= 0).any(), "the state has a radius that is not positive")
        _check_size("the state's radius", radius, _rows(group, p)[1], p.dtype)


def _check_overlaps(params):
    local = [_local(p) for p in params]
    places = [(x.data_ptr(), i, x.numel() * x.element_size()) for i, x in enumerate(local)]
    end, last = 0, 0
    for start, i, size in sorted(place for place in places if place[2]):
        first, again = sorted((last, i))
        name = f"parameter {again} of shape {tuple(params[again].shape)} is parameter {first} again"
        _refuse(start < end, f"{name}, or a part of it: give it once")
        if start + size > end:
            end, last = start + size, i


def _in_memory(x):
    """How a tensor lies there."""
    return x.dtype, x.device, x.shape, x.stride()


def _rows(group, p):
    """Lines of a tensor, and their length."""
    rows = len(p) if group["sphere"] == "row" and p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def _norms(group, zeros=False):
    """Of each tensor the norms of its spheres, [1] or [rows] float64. ValueError for one that is
    not finite, or zero where none may be."""
    squares, elements = [], []
    for p in group["params"] if group["sphere"] else ():
        x = _local(p.detach())
        rows, length = _rows(group, x)
        square = torch.zeros(rows, dtype=torch.float64, device=x.device)
        for row, column, *size in _cut(rows, length):
            start = x.storage_offset() + row * length + column
            matrix = x.as_strided(size, (length, 1), start).double()
            square[row : row + size[0]] += matrix.square().sum(1)
        for process_group in _split_over(group, p):
            all_reduce(square, group=process_group)
        squares.append(square)
        elements.append(p.numel() if group["sphere"] == "group" else p.numel() // max(rows, 1))
    if group["sphere"] == "group" and squares:
        squares, elements = [sum(squares)] * len(squares), [sum(elements)] * len(squares)
    norms = [square.sqrt() for square in squares]
    for i, (p, norm, n) in enumerate(zip(group["params"], norms, elements, strict=False)):
        good = n == 0 or norm.isfinite().all() and (zeros or (norm > 0).all())
        _refuse(not good, f"the sphere of tensor {i} has norm zero, or is not finite")
        _check_size(f"the weights of tensor {i}", norm, n, p.dtype)
        if group["radius"]:
            _check_size(f"radius={group['radius']!r}", norm.new_tensor(group["radius"]), n, p.dtype)
    return norms


def _check_size(name, norm, n, dtype):
    """ValueError for norms with which n elements are too small or too large for their type."""
    info, root = torch.finfo(dtype), n**0.5
    least, most = max(1e-15, info.tiny * info.eps) * root, min(1e15 * root, info.max)
    bad = n and ((norm <= least) & (norm > 0) | (norm >= most)).any()
    _refuse(bad, f"{name}: too small or too large for {n} numbers of {dtype}: scale them")


def _is_dtensor(x):
    """Without the import, which takes a second: before it there is no DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _local(x):
    """A DTensor's part on this rank."""
    return x.to_local() if _is_dtensor(x) else x


def _placements(x):
    return getattr(x, "placements", None)


def _split_over(group, p, rows=False):
    """The process groups over which the lines of a tensor are split; or its rows, each whole."""
    if not group["sphere"] or not _is_dtensor(p):
        return []
    found = []
    for i, placement in enumerate(p.placements):
        if not placement.is_replicate() and _has_rows(group, placement) == rows:
            found.append(p.device_mesh.get_group(i))
    return found


def _has_rows(group, placement):
    """Whether it gives each rank some of the rows, which are spheres, whole: a Shard of them, or a
    _StridedShard, which torch does not call a shard."""
    return group["sphere"] == "row" and getattr(placement, "dim", None) == 0


def _like_rows(group, p, radii):
    """The radii as they are kept in the state: a DTensor where the rows are shards."""
    if not _is_dtensor(p) or group["sphere"] != "row":
        return radii
    tensor = sys.modules["torch.distributed.tensor"]
    placements = [x if _has_rows(group, x) else tensor.Replicate() for x in p.placements]
    size = dict(shape=(len(p),), stride=(1,))
    mesh = p.device_mesh
    return tensor.DTensor.from_local(radii, mesh, placements, run_check=False, **size)


# --------------------------------------------------------------------------------- the statistics


def _sums_by(x, index, n):
    """x [..., m, k] summed into n rows, [..., n, k]: row i into row index[i]."""
    return x.new_zeros(*x.shape[:-2], n, x.shape[-1]).index_add(-2, index, x)


def _described(gram, rule):
    """‖θ‖², ‖g_t‖², φ, radial, η̃, ρ from Gram matrices and what the rule made, [..., 6] each."""
    tt, tg, gg, tm, gm, mm = torch.where(gram[..., :1] > 0, gram, math.nan).unbind(-1)
    k, b, u, elr, radius, beta = rule.unbind(-1)
    g2 = gg - tg * tg / tt
    g2 = torch.where(g2 > 1e-13 * gg, g2, 0 * g2)
    td, dd = tg + beta * tm, gg + beta * (2 * gm + beta * mm)  # of d = g + βm
    s2, along = dd - td * td / tt, td / tt + u
    angle = torch.atan2(b.abs() * s2.clamp(min=0).sqrt(), tt.sqrt() * (k + b * along))
    return tt, g2, angle, tg / (tt * gg).sqrt().clamp(min=1e-300), elr, radius


# ------------------------------------------------------------------------------ lines and spheres


class _Place(NamedTuple):
    """Of a tensor its number, its group's, its lines, their length, the first line and sphere."""

    tensor: int
    group: int
    rows: int
    length: int
    line: int
    sphere: int


class _Layout:
    """The tensors of an optimizer as lines and spheres. A line is a tensor, or a row of one where
    rows are spheres. What is on no sphere comes last."""

    def __init__(self, optimizer, device):
        self.groups, self.device = optimizer.param_groups, device
        self.params = [p for group in self.groups for p in group["params"]]
        self.states = [[optimizer.state[p] for p in group["params"]] for group in self.groups]
        self.sharded = any(map(_is_dtensor, self.params))
        self.ids, self.layouts = self.identify()
        self.copies = {}  # number of a tensor → its gradient, which lies otherwise than its θ
        self.whole = []  # of each group: no tensor of a joint sphere is without a gradient
        self.moved_before = False  # whether weights had left their spheres before the last step

        numbers = [number for number, group in enumerate(self.groups) for _ in group["params"]]
        order = sorted(range(len(numbers)), key=lambda i: self.groups[numbers[i]]["sphere"] is None)
        self.places, self.group_of_sphere = [], []
        self.owners = []  # the sphere of each line
        radii, tensor_of_line = [torch.zeros(0, dtype=torch.float64, device=device)], []
        for i in order:
            number, p = numbers[i], self.params[i]
            group = self.groups[number]
            rows, length = _rows(group, _local(p))
            begun = self.group_of_sphere[-1:] == [number]
            if not begun or group["sphere"] in ("tensor", "row"):
                self.group_of_sphere += [number] * rows
                if group["sphere"]:
                    radii.append(_local(optimizer.state[p]["radius"]).to(device))
            sphere = len(self.group_of_sphere) - rows
            self.places.append(_Place(i, number, rows, length, len(self.owners), sphere))
            self.owners += range(sphere, sphere + rows)
            if group["sphere"]:
                tensor_of_line += [len(self.places) - 1] * rows
        self.radii = torch.cat(radii)  # without a wait
        self.sphere_of_line = self.upload(self.owners[: len(tensor_of_line)])
        self.tensor_of_line = self.upload(tensor_of_line)
        self.line_of_part = torch.arange(len(tensor_of_line), device=device)
        self.reductions = self.find_shards()  # of the lines that are split over ranks
        self.row_groups = {}  # process groups of which each rank has some of the rows
        for place in self.places:
            over = _split_over(self.groups[place.group], self.params[place.tensor], rows=True)
            self.row_groups |= dict.fromkeys(over)

    def fits(self):
        """Whether the tensors are still those, and lie as they did."""
        return self.identify() == (self.ids, self.layouts)

    def identify(self):
        """Which tensors there are, and what shares a norm; how each lies in memory."""
        ids = [(group["sphere"], *map(id, group["params"])) for group in self.groups]
        return ids, [_in_memory(x) for x in self.local_params()]

    def local_params(self):
        return [*map(_local, self.params)] if self.sharded else self.params

    def gather(self):
        """(θ, g) or (θ, g, m) of each tensor, on this rank, in the layout of θ; None without a
        gradient."""
        self.copies, self.whole, found = {}, [], []
        local = self.local_params()
        for group, states in zip(self.groups, self.states, strict=True):
            first = len(found)
            for p, state in zip(group["params"], states, strict=True):
                x, g, layout = local[len(found)], p.grad, self.layouts[len(found)]
                if g is None:
                    found.append(None)
                    continue
                moved = self.sharded and _placements(g) != _placements(p)
                if self.sharded:
                    g = _gradient(p)
                if moved or _in_memory(g) != layout:
                    shapes = f"shape {tuple(g.shape)} for a parameter of shape {tuple(x.shape)}"
                    _refuse(g.shape != x.shape, f"a gradient of {shapes}")
                    _refuse(
                        g.layout != torch.strided,
                        "a gradient is sparse: make it without sparse=True",
                    )
                    g = self.copies[len(found)] = torch.empty_like(x).copy_(g)
                found.append((x, g))
                if group["momentum"]:
                    m = state.get("momentum_buffer")
                    moved = self.sharded and _placements(m) != _placements(p)
                    if m is None:
                        m = state["momentum_buffer"] = torch.zeros_like(p)
                    elif moved or _in_memory(_local(m)) != layout:
                        _check_momentum(p, m, f"a tensor of shape {tuple(p.shape)}")
                        m = state["momentum_buffer"] = torch.zeros_like(p).copy_(m)
                    found[-1] += (_local(m),)
            self.whole.append(group["sphere"] != "group" or None not in found[first:])
        return found

    def find_shards(self):
        """For each process group the lines to add up over it, and 0 for those that another of its
        ranks counts, else 1: [(process group, lines, counted)]."""
        split, found = {}, []  # process group → its tensors and their spheres
        for place in self.places:
            for over in _split_over(self.groups[place.group], self.params[place.tensor]):
                split.setdefault(over, {})[place.tensor] = place.sphere
        for process_group, tensors in split.items():
            spheres, lines, counted = set(tensors.values()), [], []
            for place in self.places:
                if place.sphere in spheres:
                    lines += range(place.line, place.line + place.rows)
                    mine = place.tensor in tensors or process_group.rank() == 0
                    counted += [float(mine)] * place.rows
            counted = self.upload(counted, (-1, 1), torch.float64)
            found.append((process_group, self.upload(lines), counted))
        return found

    def add_up(self, grams):
        """Gram matrices of lines [lines, 6], added up over the ranks, in place."""
        for process_group, lines, counted in self.reductions:
            sums = grams[lines] * counted
            all_reduce(sums, group=process_group)
            grams[lines] = sums

    def pace(self, rules):
        """The median η̃ρ² of the spheres that move, [spheres, 6]; of shards of rows the median of
        the ranks' medians, the same on all. 0 if none moves."""
        pace = rules[:, 3] * rules[:, 4] ** 2
        pace = torch.where(pace > 0, pace, math.nan).nanmedian()
        for process_group in self.row_groups:
            paces = self.radii.new_zeros(process_group.size())
            paces[process_group.rank()] = pace
            all_reduce(paces, group=process_group)
            pace = paces.nanmedian()
        return pace.nan_to_num(0)

    def upload(self, values, shape=-1, dtype=torch.long):
        """A table on the device, without a wait."""
        table = torch.tensor(values, dtype=dtype, device="cpu").view(shape)
        if self.device.type == "cuda":
            if self.capturing():
                cure = "step once before, zero_grad(set_to_none=False)"
                raise RuntimeError(f"a tensor moved in the capture of a CUDA graph: {cure}")
            table = table.pin_memory()
        return table.to(self.device, non_blocking=True)

    def capturing(self):
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _gradient(p):
    """On this rank, placed as the parameter is."""
    if not _is_dtensor(p):
        return p.grad
    return p.grad.redistribute(p.device_mesh, p.placements).to_local()


# ------------------------------------------------------------------------ the step in PyTorch


class _Unit(NamedTuple):
    """What one call of torch takes: small tensors of one shape, stacked, or a piece of a tensor."""

    group: int
    tensors: list[int]
    start: int  # in the tensor
    size: list[int]  # lines and their length, or of one line the length
    parts: slice | int  # its lines among those of all units
    rules: slice | int  # those of its lines, or the one of all


class _InPyTorch(_Layout):
    kernels = False

    def __init__(self, optimizer, device):
        super().__init__(optimizer, device)
        self.vectors = []  # θ, g, m of each tensor, during a step
        self.present = None  # which tensors had a gradient
        self.units = []  # first what is on spheres
        self.spheres = []  # of each rule, last of groups on none
        self.first_parts = None  # of each rule, whose parts are side by side
        self.lines = None  # of each part that is on a sphere
        self.options = None  # for which these tables were made
        self.parts, self.grams = None, None  # Gram matrices [6, parts]; of lines, of all ranks
        self.numbers, self.rules = None, None  # what `_formula` takes and makes, [10 and 9, rules]
        self.turns = None  # which rules have the pace of the spheres

    def refresh(self):
        self.vectors = self.gather()
        present = [vectors is not None for vectors in self.vectors]
        if present != self.present:
            self.present = present
            self.make_units()

    def make_units(self):
        together, elements = {}, Counter()
        for place in self.places:
            key, size = place.tensor, place.rows * place.length
            if size <= STACKED:  # of one shape as many as make a piece
                shape = place.group, self.layouts[place.tensor]
                key = *shape, elements[shape] // PIECE
                elements[shape] += size
            if self.present[place.tensor]:
                together.setdefault(key, []).append(place)
        self.units, lines, rules, spheres = [], [], [], {}
        for places in together.values():
            tensors = [place.tensor for place in places]
            _, group, rows, length, *_ = places[0]
            for place in places if self.reductions and not length else ():
                spheres.setdefault(place.sphere, len(spheres))  # other ranks have its parts
            for row, column, *size in _cut(rows, length):
                first, start = len(lines), row * length + column
                for place in places:
                    lines += range(place.line + row, place.line + row + size[0])
                for line in lines[first:]:
                    rules.append(spheres.setdefault(self.owners[line], len(spheres)))
                if len(lines) == first + 1:
                    size = size[1:]
                own = slice(first, len(lines)), slice(rules[first], rules[-1] + 1)
                own = [x.start if x.stop == x.start + 1 else x for x in own]
                self.units.append(_Unit(group, tensors, start, size, *own))
        self.lines = self.upload([line for line in lines if line < len(self.sphere_of_line)])
        self.spheres, self.options = list(spheres), None
        _, self.first_parts = np.unique(rules, return_index=True)

    def set_options(self, options):
        """Makes the tables: what stays from step to step."""
        own = [options[self.group_of_sphere[sphere]] for sphere in self.spheres]
        lr, beta, tan, radius, plain, decay = numbers = np.array(own).reshape(-1, 6).T
        n = np.count_nonzero(plain == 0)
        radius[:n] *= self.radii.cpu().numpy()[self.spheres[:n]]
        self.parts, self.rules = np.zeros((6, len(self.lines))), np.zeros((9, len(plain)))
        self.numbers = np.concatenate((numbers, numbers))[:10, :n]
        k = 1.0 + 0.0 * (lr + decay)
        self.rules[[0, 1, 2, 5, 8]] = k, -lr, decay, beta, k - lr * decay
        self.turns = np.flatnonzero(plain * (tan >= 0))
        self.options = options

    def last(self):
        n = len(self.numbers[0])
        rules = np.full((6, len(self.radii)), math.nan)
        rules[:, self.spheres[:n]] = self.rules[:6, :n]
        grams = self.grams if self.reductions else self.sum_lines()
        return grams, torch.from_numpy(rules.T).to(self.device)

    def sum_lines(self):
        parts = torch.from_numpy(self.parts.T).to(self.device)
        return _sums_by(parts, self.lines, len(self.sphere_of_line))

    @np.errstate(all="ignore")
    def step(self, options, move):
        vectors, self.vectors = self.vectors, []
        if options != self.options:
            self.set_options(options)
        parts, rules, n = self.parts, self.rules, len(self.numbers[0])

        # The Gram matrices of parts; in float64 where float32 is not enough
        work = []
        for unit in self.units:
            matrices = _matrices(unit, vectors)
            work.append((unit, matrices))
            _, beta, _, _, plain, _ = options[unit.group]
            if plain:
                continue
            if len(unit.size) == 1 and unit.size[0] <= FLOAT64_SUMS:
                matrices = [x.double() for x in matrices]
            elif matrices[0].element_size() < 4:
                matrices = [x.float() for x in matrices]
            sums = _sum_products(matrices)
            if not _enough(beta, *sums):  # by pairs, unlike vectors
                sums = _sum_products([x.double().view(-1, unit.size[-1]) for x in matrices])
            parts[: len(sums), unit.parts] = sums

        # Those of spheres, and the rules
        if self.reductions:
            self.grams = self.sum_lines()
            self.add_up(self.grams)
            sums = _sums_by(self.grams, self.sphere_of_line, len(self.radii))
            self.numbers[:6] = sums[self.spheres[:n]].T.cpu()
        elif n < parts.shape[1]:
            self.numbers[:6] = np.add.reduceat(parts, self.first_parts[:n], axis=1)
        else:
            self.numbers[:6] = parts
        if n <= IN_PYTHON:
            rules[:, :n] = np.array([_rule_of_numbers(*x) for x in self.numbers.T.tolist()]).T
        else:
            for row, values in zip(rules, _rule_of_numbers(*self.numbers), strict=True):
                row[:n] = values
        if len(self.turns):
            rules[1, self.turns] = -self.pace(torch.from_numpy(rules[:, :n].T)).item()
            rules[8, n:] = 1 + rules[1, n:] * rules[2, n:]
        k, *_, self.moved_before, wide, _ = np.maximum.reduce(rules, 1, initial=0.0).tolist()
        if not move:
            return

        # The moves, from the last on, which the cache still has
        least = torch.float64 if wide else torch.float32
        columns = {}  # the rules [9, rules, 1] by type
        for unit, matrices in reversed(work):
            dtype = torch.promote_types(matrices[0].dtype, least)
            if isinstance(unit.rules, int):
                rule = rules[:, unit.rules].tolist()
            else:
                if dtype not in columns:
                    columns[dtype] = torch.from_numpy(rules[..., None]).to(self.device, dtype)
                rule = columns[dtype][:, unit.rules]
            before = [x.clone() for x in matrices[::2]] if math.isnan(k) else []
            _move(rule, dtype, *matrices)
            for x, old in zip(matrices[::2], before, strict=False):
                x.copy_(torch.where(torch.as_tensor(rule[0], device=x.device).isnan(), old, x))
            for i, matrix in enumerate(matrices[::2] if len(unit.tensors) > 1 else ()):
                own = [vectors[tensor][2 * i] for tensor in unit.tensors]
                torch._foreach_copy_(own, matrix.view(len(own), *own[0].shape).unbind())


def _cut(rows, length):
    """Pieces of a matrix, of about PIECE elements: first row and column, rows and columns."""
    most = max(1, PIECE // max(1, length))
    corners = product(range(0, rows, most), range(0, length, PIECE))
    return [(i, j, min(most, rows - i), min(PIECE, length - j)) for i, j in corners]


def _matrices(unit, vectors):
    """The lines of θ, g, m, as they lie in memory; of several tensors a copy."""
    if len(unit.tensors) > 1:
        together = zip(*(vectors[tensor] for tensor in unit.tensors), strict=True)
        return [torch.stack(x).reshape(-1, unit.size[1]) for x in together]
    own, strides = vectors[unit.tensors[0]], [*unit.size[1:], 1]
    if unit.size == [own[0].numel()] and own[0].is_contiguous():
        return [x.view(-1) for x in own]
    return [x.as_strided(unit.size, strides, x.storage_offset() + unit.start) for x in own]


def _sum_products(matrices):
    """Scalar products of each with those before it and itself: numbers, or arrays [lines]."""
    dot = Tensor.dot if matrices[0].dim() == 1 else torch.linalg.vecdot
    products = [dot(x, y) for i, x in enumerate(matrices) for y in matrices[: i + 1]]
    if products[0].numel() == 1:
        return [x.item() for x in products]
    return [x.cpu().numpy() for x in products]


def _enough(beta, tt, tg, gg, tm=None, gm=None, mm=None):
    """Whether float32 holds the squares, and what is left of them across θ is not mere rounding."""
    enough = (tt > 1e-25) & (gg > 1e-25) & (tt + gg < 1e30) & (tg * tg < 0.9 * tt * gg)
    if tm is not None:
        td, dd = tg + beta * tm, gg + beta * (2 * gm + beta * mm)  # of d = g + βm
        enough = enough & (tt * dd - td * td > 0.1 * tt * (gg + beta * beta * mm))
    return enough if isinstance(enough, bool) else enough.all()


def _move(rule, dtype, theta, g, m=None):
    """m ← βm + g + uθ, θ ← kθ + bm, in place, in `dtype`, rounded once; by one rule or many."""
    x = theta
    if x.dtype != dtype:
        x, g = theta.to(dtype), g.to(dtype)
    if m is None:  # k + bu, b
        _add(x.mul_(rule[8]), g, rule[1])
    else:
        k, b, u, _, _, beta, *_ = rule
        new = _add(m.to(dtype).mul_(beta).add_(g), x, u)
        _add(x.mul_(k), new, b)
        m.copy_(new)
    if x is not theta:
        theta.copy_(x)


def _add(x, y, factor):
    return x.addcmul_(y, factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


# ----------------------------------------------------------------------------------- the kernels
#
# `_ByKernels` makes the tables:
#
#     tiles      [tiles of a dtype, 6] int64: kind, first line, lines, start, stop, first part
#     lines      [lines, 4] int64: tensor, start in it, elements, sphere; short ones last
#     addresses  [tensors, 3] int64: of θ, g, m; 0 for what there is not
#     spheres    [spheres, 3] int64: first part, parts, group
#     many       [spheres of several tiles, and groups on no sphere] int64: which
#     radii      [spheres] float64: ρ
#     groups     [groups, 6] float64: η̃ or η, β, tan φ or -1, 1 if at ρ, 1 if on no sphere, λ
#     parts      [parts, 6] float64, written: Gram matrices of the lines of tiles
#     rules      [spheres, 7] float64, written: k, b, u, η̃, ρ, β, 1 if it was off its radius
#
# The kind of a tile is how many lines × elements its 128 threads take at a time, V to an access of
# 128 bits: PLAIN (on no sphere), PART and WHOLE 1 × 128V, SOME 4 × 32V, FEW 16 × 8V, MANY 128 × V.
# From WHOLE on they are whole spheres, and finished at once. Each thread computes the rule of a
# line in FP64: the more lines, the less often per element.
#
# Sums are pairs of float32, total and what it lacks (Ogita, Rump, Oishi 2005): as exact as float64,
# for which many GPUs have next to no units. Contraction would break them: it is off. Of 16-bit
# numbers V products are summed in float32 first, unless θ, g, m nearly cancel.

PLAIN, PART, WHOLE, SOME, FEW, MANY = range(6)
LINES = {MANY: 128, FEW: 16, SOME: 4, WHOLE: 1}
ALONE = 1 << 15  # bytes of θ in a tile of whole spheres, at most: it is read again from the cache
SMALLEST, LARGEST = 4096, 1 << 17  # elements of a tile of one line
HOW = dict(num_warps=4, enable_fp_fusion=False)
if torch.version.hip:
    HOW["num_warps"] = 2  # of 64 threads
else:
    HOW["maxnreg"] = 255  # two blocks to a processor; left alone, ptxas spills for a third


@jit
def _tl_where(condition, a, b):
    return tl.where(condition, a, b)


@jit
def _tl_rsqrt(x):
    return tl.rsqrt(x)


_kernel_formula = jit(_formula)


@jit
def _store_all(ptr, values, N: tl.constexpr, mask):
    for i in tl.static_range(N):
        tl.store(ptr + i, values[i], mask=mask)


@jit
def _rule(gram, sphere, here, tables):
    """`sphere_rule` of the spheres [n] that are `here`, a thread for each."""
    spheres, radii, groups, rules = tables[2], tables[3], tables[4], tables[6]
    group = groups + 6 * tl.load(spheres + 3 * sphere + 2, mask=here, other=0)
    lr, beta = tl.load(group, mask=here, other=0.0), tl.load(group + 1, mask=here, other=0.0)
    tan = tl.load(group + 2, mask=here, other=0.0)
    radius = tl.load(radii + sphere, mask=here, other=0.0)
    radius *= tl.load(group + 3, mask=here, other=0.0)
    tt, tg, gg, tm, gm, mm = gram
    rule = _kernel_formula(tt, tg, gg, tm, gm, mm, lr, beta, tan, radius, _tl_where, _tl_rsqrt)
    _store_all(rules + 7 * sphere, rule, 7, here)
    return rule


@jit
def _load(address, columns, stop, aligned, DTYPE: tl.constexpr):
    """Columns below `stop` [lines, 1] as float32, then 0; 128 bits at a time if all is aligned."""
    V: tl.constexpr = 4 if DTYPE == tl.float32 else 8
    ptr = address.to(tl.pointer_type(DTYPE))
    if aligned:
        vectors = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), [16, 16])  # here alone
        x = tl.load(vectors + columns, mask=columns < stop // V * V, other=0.0)
    else:
        x = tl.load(ptr + columns, mask=columns < stop, other=0.0)
    return x.to(tl.float32)


@jit
def _store(address, columns, x, stop, aligned, DTYPE: tl.constexpr):
    V: tl.constexpr = 4 if DTYPE == tl.float32 else 8
    ptr = address.to(tl.pointer_type(DTYPE))
    if aligned:
        vectors = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), [16, 16])
        tl.store(vectors + columns, x.to(DTYPE), mask=columns < stop // V * V)
    else:
        tl.store(ptr + columns, x.to(DTYPE), mask=columns < stop)


@jit
def _two_sum(a, b):
    """a + b rounded, and what that lacks (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@jit
def _add_pair(a, da, b, db):
    a, error = _two_sum(a, b)
    return a, da + db + error


@jit
def _add_products(total, rest, x, y, careful, EXACT: tl.constexpr):
    """total + rest + xy, V neighbours of which, those of one thread, are added to one number. Of
    16-bit numbers, whose products float32 holds, these sums are rounded if not `careful`."""
    V: tl.constexpr = x.shape[1] // total.shape[1]
    product = x * y
    part, error = tl.sum(tl.reshape(product, [x.shape[0], total.shape[1], V]), 2), 0.0 * rest
    if careful or not EXACT:
        part, error = _halved(product, tl.fma(x, y, -product))
        part, error = _halved(part, error)
        if EXACT:
            part, error = _halved(part, error)
    return _add_pair(total, rest, part, error)


@jit
def _halved(x, dx):
    """Neighbouring columns added up, as pairs: half as many."""
    twos: tl.constexpr = [x.shape[0], x.shape[1] // 2, 2]
    a, b = tl.split(tl.reshape(x, twos))
    da, db = tl.split(tl.reshape(dx, twos))
    return _add_pair(a, da, b, db)


@jit
def _add_pairs(a, da, b, db, c, dc, x, dx, y, dy, z, dz):
    a, ea = _two_sum(a, x)
    b, eb = _two_sum(b, y)
    c, ec = _two_sum(c, z)
    return a, da + dx + ea, b, db + dy + eb, c, dc + dz + ec


@jit
def _sum_pairs(a, da, b, db, c, dc):
    """Three sums of pairs over the columns, in float64."""
    a, da, b, db, c, dc = tl.reduce((a, da, b, db, c, dc), 1, _add_pairs)
    a = a.to(tl.float64) + da.to(tl.float64)
    b = b.to(tl.float64) + db.to(tl.float64)
    return a, b, c.to(tl.float64) + dc.to(tl.float64)


@jit
def _power(address, stop, longest, aligned, DTYPE: tl.constexpr, LANES: tl.constexpr):
    """Of each line the power of two next to its largest element."""
    largest = 0.0 * stop.to(tl.float32)
    for first in range(0, longest, LANES):
        x = _load(address, first + tl.arange(0, LANES)[None, :], stop, aligned, DTYPE)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1)[:, None])
    bits = tl.minimum(tl.maximum(largest, 1e-37), 1e37).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@jit
def _gram(where, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
          LANES: tl.constexpr):  # fmt: skip
    """The Gram matrices of lines, six vectors [ROWS]. A second time, of scaled lines and with care,
    where float32 cannot hold the squares, or the rule would subtract what is rounded."""
    theta_at, g_at, m_at, stop, stop_m, longest, aligned = where
    EXACT: tl.constexpr = DTYPE != tl.float32
    V: tl.constexpr = 4 if DTYPE == tl.float32 else 8
    zero = tl.zeros([ROWS, LANES // V], tl.float32)
    none = tl.zeros([ROWS], tl.float64)
    tt, tg, gg, tm, gm, mm = none, none, none, none, none, none
    size_x = tl.full([ROWS, 1], 1.0, tl.float32)
    size_y, size_z = size_x, size_x
    tries = 1
    while tries <= 2:
        per_x, per_y, per_z = 1.0 / size_x, 1.0 / size_y, 1.0 / size_z
        stt, stg, sgg, stm, sgm, smm = zero, zero, zero, zero, zero, zero
        dtt, dtg, dgg, dtm, dgm, dmm = zero, zero, zero, zero, zero, zero
        for first in range(0, longest, LANES):
            columns = first + tl.arange(0, LANES)[None, :]
            x = per_x * _load(theta_at, columns, stop, aligned, DTYPE)
            y = per_y * _load(g_at, columns, stop, aligned, DTYPE)
            stt, dtt = _add_products(stt, dtt, x, x, tries == 2, EXACT)
            stg, dtg = _add_products(stg, dtg, x, y, tries == 2, EXACT)
            sgg, dgg = _add_products(sgg, dgg, y, y, tries == 2, EXACT)
            if MOMENTUM:
                z = per_z * _load(m_at, columns, stop_m, aligned, DTYPE)
                stm, dtm = _add_products(stm, dtm, x, z, tries == 2, EXACT)
                sgm, dgm = _add_products(sgm, dgm, y, z, tries == 2, EXACT)
                smm, dmm = _add_products(smm, dmm, z, z, tries == 2, EXACT)
        tt, tg, gg = _sum_pairs(stt, dtt, stg, dtg, sgg, dgg)
        held = (tt > 1e-20) & (gg > 1e-20) & (tt + gg < 1e30) | (tl.sum(stop, 1) == 0)
        if EXACT:
            held &= tg * tg <= 0.99 * tt * gg
        if MOMENTUM:
            tm, gm, mm = _sum_pairs(stm, dtm, sgm, dgm, smm, dmm)
            held &= (mm > 1e-20) & (mm < 1e30) | (tl.sum(stop_m, 1) == 0)
            if EXACT:
                held &= tm * tm <= 0.99 * tt * mm
                across = tt * gm - tg * tm  # of what is across θ: g_t ≈ −βm_t would cancel
                whole = (tt * gg - tg * tg) * (tt * mm - tm * tm)
                held &= (across >= 0) | (across * across <= 0.99 * whole)
        if (tries == 1) & (tl.min(held.to(tl.int32), 0) == 0):
            size_x = _power(theta_at, stop, longest, aligned, DTYPE, LANES)
            size_y = _power(g_at, stop, longest, aligned, DTYPE, LANES)
            size_z = _power(m_at, stop_m, longest, aligned, DTYPE, LANES)
        else:
            tries = 2
        tries += 1
    x, y, z = tl.sum(size_x, 1), tl.sum(size_y, 1), tl.sum(size_z, 1)
    x, y, z = x.to(tl.float64), y.to(tl.float64), z.to(tl.float64)
    return tt * x * x, tg * x * y, gg * y * y, tm * x * z, gm * y * z, mm * z * z


@jit
def _move_lines(where, k, b, u, beta, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr,
                LANES: tl.constexpr):  # fmt: skip
    """m ← βm + g + uθ, θ ← kθ + bm, rounded once; nothing where k is nan, θ stays where b is 0."""
    theta_at, g_at, m_at, stop, stop_m, longest, aligned = where
    k, b = k[:, None].to(tl.float32), b[:, None].to(tl.float32)
    u, beta = u[:, None], beta[:, None].to(tl.float32)
    u_rest = (u - u.to(tl.float32).to(tl.float64)).to(tl.float32)  # of a nearly radial gradient
    u = u.to(tl.float32)
    stop, stop_m = tl.where(k == k, stop, 0), tl.where(k == k, stop_m, 0)
    stop_theta = tl.where(b != 0, stop, 0)
    for first in range(0, longest, LANES):
        columns = first + tl.arange(0, LANES)[None, :]
        theta = _load(theta_at, columns, stop, aligned, DTYPE)
        m = tl.fma(u, theta, _load(g_at, columns, stop, aligned, DTYPE))
        m = tl.fma(u_rest, theta, m)
        if MOMENTUM:
            m = tl.fma(beta, _load(m_at, columns, stop_m, aligned, DTYPE), m)
            _store(m_at, columns, m, stop_m, aligned, DTYPE)
        theta = tl.fma(b, m, k * theta)
        _store(theta_at, columns, theta, stop_theta, aligned, DTYPE)


@jit
def _tile(tile, tables, GRAM: tl.constexpr, MOVE: tl.constexpr, MOMENTUM: tl.constexpr,
          DTYPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """GRAM: the Gram matrices of ROWS lines; if these are whole spheres, they are moved, too. Else
    the line is moved by the rule of its sphere."""
    # Which lines, of which tensors and spheres
    BYTES: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    lines, addresses, parts, rules = tables[0], tables[1], tables[5], tables[6]
    row = tl.arange(0, ROWS)
    here = row < tl.load(tile + 2)
    line = tl.load(tile + 1) + row
    start, stop = tl.load(tile + 3), tl.load(tile + 4)
    tensor = tl.load(lines + 4 * line, mask=here, other=0)
    offset = (tl.load(lines + 4 * line + 1, mask=here, other=0) + start) * BYTES
    length = tl.load(lines + 4 * line + 2, mask=here, other=0)
    sphere = tl.load(lines + 4 * line + 3, mask=here, other=0)
    theta_at = tl.load(addresses + 3 * tensor, mask=here, other=0) + offset
    g_at = tl.load(addresses + 3 * tensor + 1, mask=here, other=0)
    m_at = tl.load(addresses + 3 * tensor + 2, mask=here, other=0)

    # How far to read: not at all without a gradient; whether 128 bits at a time
    longest = stop - start
    stop = tl.where(g_at == 0, 0, tl.minimum(length, stop) - start)
    stop_m = tl.where(m_at == 0, 0, stop)
    g_at += offset
    m_at += tl.where(m_at == 0, 0, offset)
    odd = (theta_at | g_at | m_at | stop * BYTES) % 16 != 0
    aligned = tl.max((odd & (stop > 0)).to(tl.int32), 0) == 0
    where = (theta_at[:, None], g_at[:, None], m_at[:, None], stop[:, None], stop_m[:, None],
             longest, aligned)  # fmt: skip

    # The Gram matrices, and the rule; the move
    if GRAM:
        gram = _gram(where, MOMENTUM, DTYPE, ROWS, LANES)
        _store_all(parts + 6 * (tl.load(tile + 5) + row), gram, 6, here)
        if tl.load(tile) > 1:
            rule = _rule(gram, sphere, here, tables)
            if MOVE:
                k, b, u, beta = rule[0], rule[1], rule[2], rule[5]
                _move_lines(where, k, b, u, beta, MOMENTUM, DTYPE, LANES)
    else:
        k, b = tl.load(rules + 7 * sphere), tl.load(rules + 7 * sphere + 1)
        u, beta = tl.load(rules + 7 * sphere + 2), tl.load(rules + 7 * sphere + 5)
        _move_lines(where, k, b, u, beta, MOMENTUM, DTYPE, LANES)


@jit
def _gram_pass(tiles, lines, addresses, spheres, radii, groups, parts, rules,
               MOVE: tl.constexpr, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A program per tile: Gram matrices; what is a whole sphere moves at once."""
    V: tl.constexpr = 4 if DTYPE == tl.float32 else 8
    tables = (lines, addresses, spheres, radii, groups, parts, rules)
    tile = tiles + 6 * tl.program_id(0).to(tl.int64)
    kind = tl.load(tile)
    if kind < 3:
        _tile(tile, tables, True, MOVE, MOMENTUM, DTYPE, 1, 128 * V)
    elif kind == 3:
        _tile(tile, tables, True, MOVE, MOMENTUM, DTYPE, 4, 32 * V)
    elif kind == 4:
        _tile(tile, tables, True, MOVE, MOMENTUM, DTYPE, 16, 8 * V)
    else:
        _tile(tile, tables, True, MOVE, MOMENTUM, DTYPE, 128, V)


@jit
def _rule_pass(many, lines, addresses, spheres, radii, groups, parts, rules,
               BLOCK: tl.constexpr):  # fmt: skip
    """A program per sphere of several tiles: its Gram matrices, summed in a fixed order, BLOCK at
    a time; then the rule. Of a group on no sphere k = 1, b = -η, u = λ."""
    tables = (lines, addresses, spheres, radii, groups, parts, rules)
    sphere = tl.load(many + tl.program_id(0) + tl.arange(0, 1))
    first, count = tl.load(spheres + 3 * sphere)[:, None], tl.load(spheres + 3 * sphere + 1)
    group = groups + 6 * tl.load(spheres + 3 * sphere + 2)
    columns = tl.arange(0, 8)[None, :]
    sums = tl.zeros([BLOCK, 8], tl.float64)
    for start in range(0, tl.max(count, 0), BLOCK):
        part = start + tl.arange(0, BLOCK)[:, None]
        mask = (part < count[:, None]) & (columns < 6)
        sums += tl.load(parts + 6 * (first + part) + columns, mask=mask, other=0.0)
    sums = tl.sum(sums, 0)[None, :]
    gram = ()
    for i in tl.static_range(6):
        gram += (tl.sum(tl.where(columns == i, sums, 0.0), 1),)
    if tl.max(tl.load(group + 4), 0) == 0:
        _rule(gram, sphere, sphere >= 0, tables)
    else:
        zero, lr = gram[0] * 0.0, tl.load(group)
        decay = tl.load(group + 5)
        k = zero + 1.0 + 0.0 * (lr + decay)  # nan: it stays
        rule = (k, -lr, decay, lr, zero, tl.load(group + 1), zero)
        _store_all(rules + 7 * sphere, rule, 7, sphere >= 0)


@jit
def _move_pass(tiles, lines, addresses, spheres, radii, groups, parts, rules,
               MOMENTUM: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A program per tile, from the last on, which the cache still has: the rule applied."""
    tables = (lines, addresses, spheres, radii, groups, parts, rules)
    tile = tiles + 6 * (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    _tile(tile, tables, False, True, MOMENTUM, DTYPE, 1, 512 * (4 if DTYPE == tl.float32 else 8))


class _ByKernels(_Layout):
    kernels = True

    def __init__(self, optimizer, device):
        """Makes the tables, which say above what they hold."""
        super().__init__(optimizer, device)
        self.seen, self.now = None, ()  # what `look` found at the last upload of addresses, and now
        self.addresses = None  # of θ, g, m
        self.moved = []  # the tensors that a step changes
        self.numbers = None  # the options that `settings` holds
        self.first = True
        size = SMALLEST
        if device.type == "cuda":  # some tiles for each processor, but not too many
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            while size < LARGEST and sum(p.numel() for p in self.params) > 16 * processors * size:
                size *= 2
        lines, parts, many, tiles = [], [], set(), {}  # tiles by dtype
        for place in sorted(self.places, key=self.order):
            kind, dtype = self.kind(place), str(self.params[place.tensor].dtype)[6:]
            own, step = tiles.setdefault(dtype, []), size if kind <= PART else place.length or 1
            for row in range(place.rows):
                for start in range(0, max(place.length, 1), step):
                    if not own or own[-1][0] != kind or own[-1][2] == LINES.get(kind, 1):
                        own.append([kind, len(lines), 0, start, start, len(parts)])
                    own[-1][2] += 1
                    own[-1][4] = max(own[-1][4], min(start + step, place.length))
                    if kind > PLAIN:
                        parts.append(place.line + row)
                if kind <= PART:
                    many.add(place.sphere + row)
                lines.append((place.tensor, row * place.length, place.length, place.sphere + row))
        spheres = [[0, 0, number] for number in self.group_of_sphere]
        for i, line in enumerate(range(len(self.sphere_of_line)) if self.reductions else parts):
            sphere = spheres[self.owners[line]]
            if not sphere[1]:
                sphere[0] = i
            sphere[1] += 1
        self.gram_tiles, self.move_tiles = [], []
        for dtype, own in tiles.items():
            for found, kinds in (self.gram_tiles, (PART, MANY)), (self.move_tiles, (PLAIN, PART)):
                some = [tile for tile in own if kinds[0] <= tile[0] <= kinds[1]]
                if some:
                    found.append((dtype, self.upload(some, (-1, 6))))
        self.lines, self.spheres = self.upload(lines, (-1, 4)), self.upload(spheres, (-1, 3))
        self.many, self.part_lines = self.upload(sorted(many)), self.upload(parts)
        if not self.reductions:
            self.line_of_part = self.part_lines
        self.parts = self.sums = self.radii.new_zeros(len(parts), 6)
        self.rules = self.radii.new_zeros(len(spheres), 7)
        self.settings = self.radii.new_zeros(len(self.groups), 6)

    def kind(self, place):
        """That of the tiles of a tensor."""
        group = self.groups[place.group]
        if not group["sphere"]:
            return PLAIN
        alone = group["sphere"] != "group" or len(group["params"]) == 1
        if not alone or _split_over(group, self.params[place.tensor]):
            return PART
        size = place.length * self.params[place.tensor].element_size()
        return next((kind for kind, lines in LINES.items() if lines * size <= ALONE), PART)

    def order(self, place):
        """First what is moved by parts, so that those of a sphere are together; then the rest."""
        kind = self.kind(place)
        return (kind, str(self.params[place.tensor].dtype)) if kind in LINES else (PART, "")

    def look(self):
        """Which tensors there are, where θ, g, m are and how they lie."""
        seen = [len(self.groups)]
        for group, states in zip(self.groups, self.states, strict=False):
            momentum = group["momentum"] > 0
            seen += momentum, group["sphere"], len(group["params"])
            for p, state in zip(group["params"], states, strict=False):
                seen.append(id(p))
                g, m = p.grad, state.get("momentum_buffer") if momentum else None
                if self.sharded:
                    p, g, m = _local(p), _local(g), _local(m)
                for x in (p, g, m):
                    if x is None:
                        seen.append(None)
                    else:
                        seen += x.data_ptr(), x.stride()
        return seen

    def fits(self):
        self.now = self.look()
        return self.now == self.seen or super().fits()

    def refresh(self):
        """Brings the addresses up to date."""
        if self.now == self.seen:
            for i, copy in self.copies.items():
                copy.copy_(_gradient(self.params[i]))
            return
        self.seen = None  # until all is found sound
        vectors = self.gather()
        if self.capturing() and None in vectors:
            raise RuntimeError("a gradient is None in the capture of a CUDA graph")
        addresses = []
        self.moved = []
        for own in vectors:
            own = own or ()
            addresses.append([*[x.data_ptr() for x in own], 0, 0, 0][:3])
            self.moved += own[::2]  # θ, m
        self.addresses = self.upload(addresses, (-1, 3))
        self.seen = self.look()

    def step(self, options, move):
        before = self.settings
        numbers = [[0.0 if isinstance(lr, Tensor) else lr, *rest] for lr, *rest in options]
        if numbers != self.numbers:  # into new memory: a graph may read the old
            self.settings = self.upload(numbers, (-1, 6), torch.float64)
            self.numbers = numbers
        for i, (lr, *_) in enumerate(options):
            if isinstance(lr, Tensor):
                if self.groups[i]["angle"]:
                    lr = torch.where(lr >= math.pi / 2, before[i, 0], lr)  # or the last valid one
                    self.settings[i, 2] = lr.double().tan()
                self.settings[i, 0] = lr
        tables = [self.lines, self.addresses, self.spheres, self.radii, self.settings, self.sums]
        tables.append(self.rules)
        momentum = any(group["momentum"] for group in self.groups)
        with torch.cuda.device_of(self.radii):  # else Triton launches on the current one
            for dtype, tiles in self.gram_tiles:
                constants = dict(MOVE=move, MOMENTUM=momentum, DTYPE=getattr(tl, dtype))
                _gram_pass[(len(tiles),)](tiles, *tables, **constants, **HOW)
            if self.reductions:
                grams = _sums_by(self.sums, self.part_lines, len(self.sphere_of_line))
                self.add_up(grams)
                self.parts = tables[5] = grams
            if len(self.many):
                _rule_pass[(len(self.many),)](self.many, *tables, BLOCK=512, **HOW)
            for sphere, number in enumerate(self.group_of_sphere):
                group = self.groups[number]
                if group["angle"] and group["sphere"] is None:
                    self.rules[sphere, 1] = -self.pace(self.rules[: len(self.radii)])
            for dtype, tiles in self.move_tiles if move else ():
                constants = dict(MOMENTUM=momentum, DTYPE=getattr(tl, dtype))
                _move_pass[(len(tiles),)](tiles, *tables, **constants, **HOW)
        self.moved_before = self.first and move and bool(self.rules[:, 6].any())  # waits
        self.first = False
        if move:  # else a backward pass through an old graph would not notice
            torch.autograd.graph.increment_version(self.moved)

    def last(self):
        return self.parts.clone(), self.rules[: len(self.radii), :6].clone()
