"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1), and compiled ahead of time.

`test_the_kernels_pass_in_the_interpreter` runs this file again with the interpreter on, so that plain pytest covers it.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import test_sphere_step  # noqa: F401  (mends the interpreter)
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sphere_step
from sphere_step import INTERPRET, SphereSGD

HERE = Path(__file__)
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
BLOCK = sphere_step.SMALLEST
SLOW = GPU or "SLOW" in os.environ  # the interpreter takes milliseconds for each tile
STEPS = 1000 if SLOW else 5
PASSES = "_gram_pass", "_rule_pass", "_move_pass"
KINDS = "direction_from zero_gradient half_precision non_finite plain_sgd random_sequences".split()
KINDS += "turns_by_the_given does_not_fit".split()
runs = pytest.mark.skipif(
    not (GPU or INTERPRET),
    reason="needs a GPU, or TRITON_INTERPRET=1 (which plain pytest sets below)",
)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA or ROCm device; there is none")


@pytest.mark.skipif(INTERPRET, reason="this is that run")
@pytest.mark.skipif(sphere_step.triton is None, reason="Triton is not installed")
def test_the_kernels_pass_in_the_interpreter():
    """This file and the tests of the step again, in another process, with the kernels in the place
    of PyTorch; by default those of each kind of sphere, of zeros, what is not finite, angles."""
    which = "not ten_thousand and not ahead_of_time and not compiled and not a_copy_of"
    which += " and not large_tensor"
    if not SLOW:
        which += f" and (test_kernels or {' or '.join(KINDS)})"
    files = [str(HERE), str(HERE.with_name("test_sphere_step.py"))]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", which]
    command = [sys.executable, "-m", "pytest", *options, *files]
    # Without what measures coverage, which would take twice the time.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("COV") and k != "PYTEST_ADDOPTS"
    }
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]


@runs
def test_the_check_of_bench_py_finds_the_kernels_equal_to_float64(monkeypatch):
    from lab import bench

    if not SLOW:  # small tensors
        monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.full(size, 12))

    kernels = {name: x for name, x in bench.checks().items() if "triton" in name}
    assert len(kernels) >= 9
    some = {name: x for name, x in kernels.items() if SLOW or "group, float32" in name}
    assert bench.check(some) == 0


def reference(theta, g, m, radius, elr, beta):
    """One step on one sphere, in float64 vectors, by the design's formula with explicit projections."""
    n = theta / theta.norm()
    m = beta * (m - n * (n @ m)) + g - n * (n @ g)
    v = theta - elr * radius**2 * m
    return radius * v / v.norm(), m


def cut(tensors, sphere):
    """The tensors as float64 vectors, one per sphere."""
    flat = [t.detach().double().cpu() for t in tensors]
    if sphere == "group":
        return [torch.cat([t.reshape(-1) for t in flat])]
    if sphere == "row":
        return [row.reshape(-1) for t in flat for row in (t if t.dim() else t[None])]
    return [t.reshape(-1) for t in flat]


def random_shape(rng, largest):
    kind = rng.integers(6)
    if kind == 0:
        return ()
    if kind == 1:
        return (1,)
    if kind == 2:
        return (int(rng.integers(0, 2)), int(rng.integers(1, 9)))
    n = int(math.exp(rng.uniform(0, math.log(largest))))
    rows = int(rng.integers(1, min(n, 12) + 1))
    return (rows, max(1, n // rows))


def random_case(rng, dtype):
    """Param groups of every kind with random tensors, and what each should be after a step."""
    groups, count, largest = [], int(rng.integers(1, 13)), 40_000 if rng.random() < 0.1 else 2_000
    for sphere in rng.permutation(["group", "tensor", "row", None])[: min(count, 4)]:
        tensors = []
        for _ in range(max(1, count // 4)):
            t = torch.randn(random_shape(rng, largest)) * 10 ** rng.uniform(-2, 2)
            tensors.append(t.to(DEVICE, dtype).requires_grad_())
        groups.append(
            {"params": tensors, "sphere": sphere, "momentum": float(rng.choice([0.0, 0.0, 0.9]))}
        )
    for group in groups:
        for t in group["params"]:
            g = torch.randn(t.shape) + rng.uniform(-1, 1) * t.detach().cpu().float()  # radial, too
            t.grad = (g * 10 ** rng.uniform(-3, 1.5)).to(DEVICE, dtype)
        # So that η̃ρ‖g‖, which bounds the step, is between 1e-3 and 3.
        sizes = [x.norm() * y.norm() for x, y in pairs(group) if len(x)]
        group["lr"] = 10 ** rng.uniform(-3, 0.5) / (max(map(float, sizes), default=1.0) or 1.0)
        if (
            group["sphere"] is None
        ):  # torch's own SGD takes no learning rate that float16 cannot hold
            group["lr"] = min(group["lr"], 1e4)
    return groups


def pairs(group):
    return list(
        zip(
            cut(group["params"], group["sphere"]),
            cut([t.grad for t in group["params"]], group["sphere"]),
            strict=True,
        )
    )


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_cases_agree_with_float64(dtype):
    """Two of each type, the same ones; on a GPU 70, new ones. float32: 1e-6 of each sphere's norm; half precision: one unit in the
    last place of each weight (but plain SGD, which is torch's own and rounds in between). The more
    radial the gradient, the larger the terms that cancel in the step, and their rounding."""
    import numpy as np

    rng = np.random.default_rng(None if SLOW else 0)
    for _ in range(70 if SLOW else 2):
        seed = int(rng.integers(2**31))
        torch.manual_seed(seed)
        groups = random_case(np.random.default_rng(seed), dtype)
        optimizer = SphereSGD([dict(group) for group in groups], lr=0.1, backend="triton")
        expected = []
        for group in groups:
            moments = [torch.randn(t.shape).to(DEVICE, dtype) for t in group["params"]]
            sphere, lr, beta = group["sphere"], group["lr"], group["momentum"]
            if beta:
                for t, m in zip(group["params"], moments, strict=True):
                    optimizer.state[t]["momentum_buffer"] = m
            for (x, g), m in zip(pairs(group), cut(moments, sphere), strict=True):
                if sphere is None:
                    new = beta * m + g if beta else g
                    size = float(g.norm() + beta * m.norm())
                    expected.append((x - lr * new, new, 1.0, True, size))
                elif len(x) == 0:
                    expected.append((x, m, 0.0, False, 0.0))
                else:
                    y, new = reference(x, g, m, x.norm(), lr, beta)
                    reach = lr * x.norm() * (g.norm() + beta * m.norm())  # of the terms, in radii
                    reach = reach / (1 + (lr * x.norm() * new.norm()) ** 2) ** 0.5
                    size = float(g.norm() + beta * m.norm())  # of what m is the rest of
                    expected.append((y, new, float(reach), False, size))
        before = [x for group in groups for x in cut(group["params"], group["sphere"])]
        optimizer.step()
        after = [x for group in groups for x in cut(group["params"], group["sphere"])]
        moved = []
        for group in groups:
            kind, buffers = group["sphere"], [optimizer.state[t] for t in group["params"]]
            if group["momentum"]:
                moved += cut([state["momentum_buffer"] for state in buffers], kind)
            else:
                moved += [None] * len(cut(group["params"], kind))
        cases = zip(before, after, moved, expected, strict=True)
        for old, x, m, (y, new, reach, plain, total) in cases:
            rounding = 1e-6 * (1 + reach / 2)
            if dtype == torch.float32:
                assert (x - y).norm() <= rounding * old.norm().clamp(min=y.norm()), seed
            elif not plain:
                tiny = torch.finfo(dtype).tiny
                unit = torch.finfo(dtype).eps * 2.0 ** y.abs().clamp(min=tiny).log2().floor()
                size = old.abs() + (y - old).abs() + reach * old.norm() / max(len(old), 1) ** 0.5
                assert ((x - y).abs() <= unit + 3e-6 * size).all(), seed
            if m is not None:
                eps = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                assert (m - new).norm() <= eps * (total + 1e-30), seed


def several(dtype=torch.float32, device=DEVICE):
    """Every kind of sphere and of tile, as param groups."""
    long = 2 * BLOCK if SLOW else 1100  # one tile of one line
    shapes = {
        "group": [(40, 30), (BLOCK + 5,) if SLOW else (900,), (7,)],
        "tensor": [(2, 3), (long,)],
        "row": [(2, 9), (3, 70), (1, long)],
        None: [(11,)],
    }
    groups = []
    for sphere, sizes in shapes.items():
        tensors = [torch.randn(size, dtype=dtype, device=device).requires_grad_() for size in sizes]
        groups.append({"params": tensors, "sphere": sphere})
    return groups


def give_gradients(groups, scale=1.0):
    for group in groups:
        for t in group["params"]:
            t.grad = scale * torch.randn_like(t)


def copy_of(groups):
    copies = []
    for group in groups:
        tensors = [t.detach().clone().requires_grad_() for t in group["params"]]
        for t, original in zip(tensors, group["params"], strict=True):
            t.grad = None if original.grad is None else original.grad.clone()
        copies.append({**group, "params": tensors})
    return copies


def weights(groups):
    return [t.detach() for group in groups for t in group["params"]]


@runs
@pytest.mark.parametrize("momentum", [0.0, 0.9] if SLOW else [0.9])
def test_weights_and_statistics_equal_the_pytorch_path(momentum):
    groups = several()
    give_gradients(groups)
    groups[0]["params"][2].grad = None  # left out of its sphere
    others = copy_of(groups)
    a = SphereSGD(groups, lr=1e-5, momentum=momentum, backend="triton")
    b = SphereSGD(others, lr=1e-5, momentum=momentum, backend="torch")
    for _ in range(2):
        a.step(), b.step()
        for x, y in zip(weights(groups), weights(others), strict=True):
            assert (x - y).norm() <= 2e-6 * y.norm()
        for name in ("stats", "layer_stats"):
            for key, value in getattr(b, name)().items():
                assert torch.allclose(
                    getattr(a, name)()[key], value, rtol=1e-4, atol=1e-6, equal_nan=True
                ), (name, key)
    assert torch.equal(groups[0]["params"][2], others[0]["params"][2])


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_launches():
    """The names of the kernels that are launched, in order."""
    launches, kernels = [], PASSES

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(sphere_step, name)

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                launches.append(self.name)
                with torch.utils._python_dispatch._disable_current_modes():
                    return self.kernel[grid](*args, **kwargs)

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in kernels:
            patch.setattr(sphere_step, name, Counted(name))
        yield launches


@runs
def test_a_step_is_at_most_three_launches_and_nothing_else():
    """No other operation means no allocation, no copy and no wait for the device."""
    groups = [group for group in several() if group["sphere"]]
    optimizer = SphereSGD(groups, lr=1e-3, momentum=0.9, backend="triton")
    give_gradients(groups)
    optimizer.step()
    with counted_launches() as launches, Operations() as operations:
        optimizer.step()
    assert launches == list(PASSES)
    assert [name for name in operations.names if not name.startswith("profiler.")] == []


@runs
def test_a_replay_after_observe_steps_on_the_same_radii():
    """A CUDA graph replays the launches alone: what the host uploads in between must not change them."""
    groups, replay = [group for group in several() if group["sphere"]], []
    optimizer = SphereSGD(groups, lr=1e-4)
    give_gradients(groups)
    radii = norms_of(optimizer)
    recorded(optimizer, replay)
    assert len(replay) == 3
    with torch.no_grad():
        for t in weights(groups):
            t.mul_(1.5)
    optimizer.observe()
    assert not torch.allclose(optimizer.stats()["radius"].cpu(), radii)
    for launch in replay:
        launch()
    assert torch.allclose(norms_of(optimizer), radii, rtol=1e-6)


def norms_of(optimizer):
    """Of the spheres, [spheres] float64."""
    groups = optimizer.param_groups
    vectors = [
        x for group in groups if group["sphere"] for x in cut(group["params"], group["sphere"])
    ]
    return torch.stack([x.norm() for x in vectors])


def recorded(optimizer, replay):
    """A step whose launches go to the list `replay` with what they were given, as into a CUDA graph."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PASSES:

            class Recorded:
                kernel = getattr(sphere_step, name)

                def __getitem__(self, grid):
                    def launch(*args, **how):
                        replay.append(partial(self.kernel[grid], *args, **how))
                        replay[-1]()

                    return launch

            patch.setattr(sphere_step, name, Recorded())
        optimizer.step()


@runs
def test_what_an_eager_step_uploads_after_the_capture_does_not_reach_the_replays():
    groups, replay = [group for group in several() if group["sphere"]], []
    give_gradients(groups)
    optimizer = SphereSGD(groups, lr=1e-4)
    recorded(optimizer, replay)
    kept = [t.grad for group in groups for t in group["params"]]
    give_gradients(groups)  # at other addresses
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    before = [t.clone() for t in weights(groups)]
    for launch in replay:
        launch()
    replayed = [t.clone() for t in weights(groups)]
    params = [t for group in groups for t in group["params"]]
    with torch.no_grad():
        for t, old, g in zip(params, before, kept, strict=True):
            t.copy_(old)
            t.grad = g
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    optimizer.step()
    assert all(map(torch.equal, params, replayed))


@runs
def test_launches_are_at_most_three_per_type_of_weights():
    tensors = [torch.randn(2 * BLOCK, device=DEVICE).to(dtype) for dtype in sphere_step.DTYPES]
    tensors = [t.requires_grad_() for t in tensors]  # on one joint sphere
    for t in tensors:
        t.grad = torch.randn_like(t)
    before = [t.detach().double().cpu() for t in tensors]
    optimizer = SphereSGD(tensors, lr=1e-5, backend="triton")
    with counted_launches() as launches:
        optimizer.step()
    assert launches == ["_gram_pass"] * 3 + ["_rule_pass"] + ["_move_pass"] * 3
    x, g = torch.cat(before), torch.cat([t.grad.double().cpu() for t in tensors])
    expected, _ = reference(x, g, 0 * x, x.norm(), 1e-5, 0.0)
    new = torch.cat([t.detach().double().cpu() for t in tensors])
    assert (new - expected).norm() < 3e-3 * x.norm()  # a third of it is rounded to bfloat16


@runs
def test_gradients_at_other_addresses_in_every_step_change_nothing_and_lay_nothing_out_anew():
    groups = several()
    give_gradients(groups)
    others = copy_of(groups)
    moving, still = (SphereSGD(g, lr=1e-4, momentum=0.9) for g in (groups, others))
    moving.step(), still.step()
    tables = id(moving._gram_tiles), id(moving._move_tiles), id(moving._lines)
    kept = []  # so that no address is used again
    for _ in range(2 if SLOW else 1):
        for group, other in zip(groups, others, strict=True):
            for t, u in zip(group["params"], other["params"], strict=True):
                kept.append(t.grad)
                t.grad = torch.randn_like(t)
                u.grad.copy_(t.grad)
        moving.step(), still.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(groups), weights(others), strict=True))
    assert tables == (id(moving._gram_tiles), id(moving._move_tiles), id(moving._lines))


@runs
def test_the_rule_of_the_kernels_is_the_rule_in_python():
    """On random Gram matrices, the ends of the ranges included."""
    import numpy as np

    rng = np.random.default_rng(None if SLOW else 0)
    grams, settings = [], []
    for case in range(300 if SLOW else 60):
        vectors = rng.standard_normal((3, 5)) * 10.0 ** rng.uniform(-12, 12, (3, 1))
        if case % 5 == 0:
            vectors[1] *= 0  # no gradient
        if case % 7 == 0:
            vectors[1] = vectors[0] * rng.standard_normal()  # purely radial
        gram = (vectors @ vectors.T)[[0, 0, 1, 0, 1, 2], [0, 1, 1, 2, 2, 2]]
        if case % 11 == 0:
            gram[rng.integers(6)] = rng.choice([np.nan, np.inf])
        angle = float(case % 3 == 0)
        lr = rng.uniform(0, 1.57) if angle else 10.0 ** rng.uniform(-320, 308)
        lr = 0.0 if case % 13 == 0 else lr
        grams.append(gram)
        radius = rng.choice([0.0, math.sqrt(gram[0]) if gram[0] > 0 else 1.0])
        settings.append([radius, lr, rng.choice([0.0, 0.9]), angle])
    n, new = len(grams), dict(dtype=torch.float64, device=DEVICE)
    partials, settings = torch.tensor(np.array(grams), **new), torch.tensor(settings, **new)
    radii = settings[:, 0].clone()
    fixed = (torch.arange(n, **new) % 4 > 0).double()  # else at their norms
    tan = torch.where(settings[:, 3] > 0, settings[:, 1].tan(), -1.0)
    # A group of its own for each
    groups = torch.stack([settings[:, 1], settings[:, 2], tan, fixed, 0 * tan, 0 * tan], 1)
    settings[fixed == 0, 0] = 0
    many, found = torch.arange(n, device=DEVICE), torch.zeros(n, 6, **new)
    spheres = torch.stack([many, 0 * many + 1, many], 1)
    tables = many, many, many, spheres, radii, groups.contiguous(), partials, found
    with np.errstate(all="ignore"):
        sphere_step._rule_pass[(n,)](many, *tables, BLOCK=16, **sphere_step.HOW)
    expected = []
    for gram, (radius, lr, beta, angle) in zip(grams, settings.tolist(), strict=True):
        expected.append(sphere_step.sphere_rule(gram.tolist(), radius, lr, beta, angle > 0))
    expected, found = torch.tensor(expected, dtype=torch.float64), found.cpu()
    # A compiler that joins multiplications and additions rounds otherwise: all the more, the more
    # of ‖g‖² + β²‖m‖² cancels in ‖new m‖².
    tt, tg, gg, tm, gm, mm = partials.cpu().unbind(1)
    beta = settings[:, 2].cpu()
    total = gg + beta**2 * mm
    s2 = total - tg * tg / tt + 2 * beta * (gm - tm * tg / tt) - (beta * tm) ** 2 / tt
    tolerance = 1e-9 + 1e-14 * total / torch.maximum(s2, 1e-14 * total)
    near = (found - expected).abs() <= tolerance.nan_to_num(1e-9)[:, None] * expected.abs()
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert (near | same).all(), (found[~(near | same).all(1)], expected[~(near | same).all(1)])


@runs
def test_equal_inputs_give_equal_bits():
    groups = several()
    give_gradients(groups)
    others = copy_of(groups)
    SphereSGD(groups, lr=1e-3, momentum=0.9).step(), SphereSGD(others, lr=1e-3, momentum=0.9).step()
    assert all(torch.equal(a, b) for a, b in zip(weights(groups), weights(others), strict=True))


@runs
def test_the_elr_is_read_from_device_memory_at_every_step():
    groups = several()
    give_gradients(groups)
    elr = torch.tensor(1e-4, device=DEVICE)
    optimizer = SphereSGD(groups, lr=elr)
    optimizer.step()
    tables = optimizer._gram_tiles
    for value in (1e-5, 0.0):
        elr.fill_(value)
        optimizer.step()
        stats = optimizer.stats()
        assert torch.allclose(stats["angle"].tan(), value * stats["grad_norm"], rtol=1e-5)
    assert optimizer._gram_tiles is tables  # nothing was laid out anew


@runs
def test_gradients_may_move_change_type_and_disappear_between_steps():
    groups = several()
    others = copy_of(groups)
    a, b = (
        SphereSGD(groups, lr=1e-4, momentum=0.9),
        SphereSGD(others, lr=1e-4, momentum=0.9, backend="torch"),
    )
    for step in range(3):
        for group, other in zip(groups, others, strict=True):
            for i, (t, u) in enumerate(zip(group["params"], other["params"], strict=True)):
                g = torch.randn_like(t)
                t.grad, u.grad = (None, None) if (i + step) % 3 == 2 else (g, g.clone())
        a.step(), b.step()
    assert all(
        (x - y).norm() <= 5e-6 * y.norm()
        for x, y in zip(weights(groups), weights(others), strict=True)
    )


@runs
def test_the_norm_is_the_radius_after_many_steps():
    """Of spheres that are one tile, and of one that takes all passes."""
    theta = [torch.randn(n, device=DEVICE).requires_grad_() for n in (100, 1100, 600, 7)]
    groups = [{"params": theta[:2], "sphere": "tensor"}, {"params": theta[2:]}]
    optimizer = SphereSGD(groups, lr=1e-3, backend="triton")
    radii = norms_of(optimizer)
    noise = torch.randn(2 * BLOCK, device=DEVICE)
    for t in theta:
        t.grad = torch.empty_like(t)
    for step in range(STEPS):
        for t in theta:
            t.grad.copy_(noise[step : step + len(t)])
        optimizer.step()
    assert torch.allclose(norms_of(optimizer), radii, rtol=1e-6, atol=0)


@runs
def test_weights_that_are_not_aligned_and_gradients_in_another_layout_take_the_same_step():
    base, g = torch.randn(6, 50, device=DEVICE), torch.randn(6, 50, device=DEVICE)
    memory = torch.zeros(1000, device=DEVICE)
    memory[1:301] = base.reshape(-1)
    for sphere in ("group", "row"):
        expected = base.clone().requires_grad_()
        expected.grad = g.clone()
        SphereSGD([expected], lr=1e-2, sphere=sphere, backend="triton").step()
        cases = [(memory[1:301].view(6, 50), g.clone()), (base.clone(), g.t().contiguous().t())]
        if sphere == "group":
            cases.append((base.t().contiguous().t(), g.clone()))
        for t, gradient in cases:
            t = t.detach()
            t.copy_(base)
            t.requires_grad_().grad = gradient
            SphereSGD([t], lr=1e-2, sphere=sphere, backend="triton").step()
            assert (t - expected).norm() <= 1e-6 * expected.norm()


def test_asking_for_triton_where_it_cannot_run_says_where_it_can(monkeypatch):
    where = "'triton': it must be 'auto', 'torch' or, on a GPU, not in float64, 'triton'"
    with pytest.raises(ValueError, match="backend='cuda'"):
        SphereSGD([torch.randn(3).requires_grad_()], lr=0.1, backend="cuda")
    if not INTERPRET:
        with pytest.raises(ValueError, match=where):
            SphereSGD([torch.randn(3).requires_grad_()], lr=0.1, backend="triton")
    double = torch.randn(3, dtype=torch.float64, device=DEVICE).requires_grad_()
    with pytest.raises(ValueError, match=where):
        SphereSGD([double], lr=0.1, backend="triton")
    double.grad = torch.randn_like(double)
    SphereSGD([double], lr=0.1).step()
    monkeypatch.setattr(sphere_step, "triton", None)
    with pytest.raises(ValueError, match=where):
        SphereSGD([torch.randn(3).requires_grad_()], lr=0.1, backend="triton")


def compile_ahead(which, target, momentum, half):
    """A pass compiled as the optimizer launches it, with no GPU present."""
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    function = getattr(sphere_step, which)
    constants = {"MOMENTUM": momentum, "BLOCK": 512, "MOVE": True}
    constants["DTYPE"] = tl.bfloat16 if half else tl.float32
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = dict.fromkeys(function.arg_names, "*i64")
    signature |= dict.fromkeys(("radii", "groups", "parts", "rules"), "*fp64")
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options=sphere_step.HOW)


def disassembled(compiled):
    """The machine code, and what its function takes, by the tools that Triton brings."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ways = (
            [str(folder / "nvdisasm"), file.name],
            [str(folder / "cuobjdump"), "-res-usage", file.name],
        )
        return [subprocess.run(way, capture_output=True, text=True).stdout for way in ways]


ahead = pytest.mark.skipif(
    INTERPRET or sphere_step.triton is None,
    reason="compiles, so neither in the interpreter nor without Triton",
)


@ahead
@pytest.mark.parametrize(
    "which, half",
    [(which, half) for which in PASSES for half in (False, True)]
    if SLOW
    else [("_gram_pass", False), ("_rule_pass", True), ("_move_pass", True)],
)
def test_compiled_ahead_of_time_for_cuda(which, half):
    """128 bits at a time, no stack, two blocks to a processor, no float64 in the sums, and none of
    their operations fused."""
    from triton.backends.compiler import GPUTarget

    for capability in (80, 90) if "SLOW" in os.environ else (90,):
        code, usage = disassembled(
            compile_ahead(which, GPUTarget("cuda", capability, 32), SLOW, half)
        )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        assert stack == 0 and "LDL" not in code and "STL" not in code
        assert 2 * registers * 32 * sphere_step.HOW["num_warps"] <= 65536
        if which != "_rule_pass":
            assert len(re.findall(r"LDG\.E[\w.]*\.128", code)) >= 3
            assert len(re.findall(r"STG\.E[\w.]*\.128", code)) >= 2
        if which == "_gram_pass" and not half:  # FFMA only where a product's error is taken
            fused = len(re.findall(r"\sFFMA ", code))
            assert 0 < fused < len(re.findall(r"\sFADD ", code))


@ahead
@pytest.mark.parametrize("which", PASSES if SLOW else PASSES[2:])
def test_compiled_ahead_of_time_for_mi300(which):
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if "amd" not in backends:
        pytest.skip("this Triton has no AMD compiler")
    if tuple(map(int, sphere_step.triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("before 3.4 Triton calls a linker of ROCm, which it does not bring")
    assert compile_ahead(which, GPUTarget("hip", "gfx942", 64), True, True).asm["hsaco"]


class Launches:
    """In the place of a kernel: what it would have been launched with."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args, **how: self.calls.append(args)


ONES = [torch.ones(n, dtype=torch.float64) for n in range(10)]  # real numbers


def norms_of_ones(group, zeros=False):
    rows = [len(p) if group["sphere"] == "row" else 1 for p in group["params"]]
    return [ONES[n] for n in rows if group["sphere"]]


class Addresses:
    """An address for each tensor, far from the others."""

    def __init__(self):
        self.known = []

    def of(self, x):
        if not any(x is known for known in self.known):
            self.known.append(x)
        return (1 + [x is known for known in self.known].index(True)) << 24


@contextmanager
def fake_gpu(calls):
    """Tensors on "cuda" that have types and shapes but no numbers: to mix devices, or to wait for a
    number, is an error."""
    from torch._subclasses import FakeTensorMode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sphere_step, "triton", object())
        patch.setattr(sphere_step, "INTERPRET", False)
        for name in PASSES:
            patch.setattr(sphere_step, name, Launches(calls))
        patch.setattr(sphere_step, "_norms", norms_of_ones)
        # The first step may wait
        patch.setattr(SphereSGD, "_warn_of_moved_weights", lambda self: None)
        patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        # Of these there is no fake.
        patch.setattr(torch.Tensor, "nanmedian", torch.Tensor.sum)
        addresses = Addresses()
        patch.setattr(torch.Tensor, "data_ptr", lambda x: addresses.of(x))
        card = type("card", (), {"multi_processor_count": 132})
        patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                torch.ones(2, device="cuda")[0]
            except RuntimeError:
                pytest.skip("this torch asks for a driver even where tensors are fake")
            yield


@pytest.mark.skipif(INTERPRET or sphere_step.triton is None, reason="for the compiled kernels")
@pytest.mark.parametrize("angle", [False, True])
def test_a_step_mixes_no_devices_and_waits_for_no_number(angle, monkeypatch):
    guarded, calls = [], []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guard(guarded, x))
    with fake_gpu(calls):
        groups = several(device="cuda")
        give_gradients(groups)
        optimizer = SphereSGD(groups, lr=0.1, momentum=0.9, angle=angle)
        for lr in (0.1, torch.full((), 0.1, device="cuda"), torch.tensor(0.1)):
            for group in optimizer.param_groups:
                group["lr"] = lr
            calls.clear()
            optimizer.step()
            optimizer.observe()
            assert len(calls) == 3 + 2
            for args in calls:
                assert all(x.device.type == "cuda" for x in args if isinstance(x, torch.Tensor))
            for stats in (optimizer.stats(), optimizer.layer_stats()):
                assert all(x.device.type == "cuda" for x in stats.values())
            assert optimizer.grams().device.type == "cuda"
    assert len(guarded) == 6 and {x.type for x in guarded} == {"cuda"}


@contextmanager
def guard(devices, x):
    devices.append(x.device)
    yield


@gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_the_last_of_several_gpus():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    groups = several(device=last)
    give_gradients(groups)
    others = copy_of(groups)
    SphereSGD(groups, lr=1e-3).step()
    SphereSGD(others, lr=1e-3, backend="torch").step()
    for x, y in zip(weights(groups), weights(others), strict=True):
        assert (x - y).norm() <= 5e-6 * y.norm()


@gpu
@needs_gpu
def test_an_angle_on_the_gpu_that_becomes_too_large_stays_the_last_valid_one():
    p = torch.randn(5000, device="cuda", requires_grad=True)
    angle = torch.tensor(0.1, device="cuda")
    optimizer = SphereSGD([p], lr=angle, angle=True)
    p.grad = torch.randn_like(p)
    for value, turned in ((0.2, 0.2), (2.0, 0.2), (math.inf, 0.2), (0.3, 0.3)):
        angle.fill_(value)
        optimizer.step()
        assert math.isclose(optimizer.stats()["angle"].item(), turned, rel_tol=1e-6)


@gpu
@needs_gpu
def test_a_captured_step_replays_with_a_new_elr():
    groups = several()
    elr = torch.tensor(1e-3, device="cuda")
    give_gradients(groups)
    others = copy_of(groups)
    optimizer, eager = (
        SphereSGD(groups, lr=elr, momentum=0.9),
        SphereSGD(others, lr=1e-3, momentum=0.9, backend="torch"),
    )
    optimizer.step(), eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (1e-3, 1e-2):
        elr.fill_(value)
        for group in eager.param_groups:
            group["lr"] = value
        graph.replay(), eager.step()
    assert all(
        (x - y).norm() <= 5e-6 * y.norm()
        for x, y in zip(weights(groups), weights(others), strict=True)
    )


SCALES = {torch.float32: [1.0, 1e-22, 1e22], torch.bfloat16: [1.0, 1e-22, 1e22] if SLOW else [1.0]}


@runs
@pytest.mark.parametrize("dtype, scale", [(dtype, x) for dtype in SCALES for x in SCALES[dtype]])
def test_scalar_products_are_exact_to_a_trillionth_of_the_norms(dtype, scale):
    """Of tiles of each kind, with gradients whose squares float32 cannot hold, too."""
    if SLOW:
        cases = ("row", (140, 40)), ("row", (20, 300)), ("group", (9000,))
    else:
        cases = ("row", (130, 9)), ("row", (17, 80)), ("group", (1100,))
    for sphere, shape in cases:
        p = torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype))
        p.grad = (scale * torch.randn(shape, device=DEVICE)).to(dtype)
        m = (scale * torch.randn(shape, device=DEVICE)).to(dtype)
        optimizer = SphereSGD([p], lr=0.1, sphere=sphere, momentum=0.9, backend="triton")
        optimizer.state[p]["momentum_buffer"] = m
        vectors = [torch.stack(cut([x], sphere)) for x in (p, p.grad, m)]
        optimizer.observe()
        found = optimizer.grams().cpu()
        pairs = [(x, y) for i, x in enumerate(vectors) for y in vectors[: i + 1]]
        for column, (x, y) in zip(found.T, pairs, strict=True):
            error = (column - (x * y).sum(1)).abs() / (x.norm(dim=1) * y.norm(dim=1))
            assert error.max() < 1e-12
