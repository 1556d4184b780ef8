"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, for which a test
runs this file again in a child, with those of the step and of shards that are for the kernels, too.
"""

import gc
import math
import os
import random
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from inspect import unwrap
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from spheres import INTERPRET, SHAPES, SPHERES, Sequence, lines_of, step_of
from torch.nn import Parameter

import sphere_step
from sphere_step import SphereSGD, sphere_rule

HERE = Path(__file__)
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
SLOW = GPU or "SLOW" in os.environ
HALVES = torch.bfloat16, torch.float16
THREE = ["_gram_pass", "_rule_pass", "_move_pass"]
SHARED = """a_gradient_that_is_all_but_radial a_factor_that_does_not_fit_float32
a_backward_pass_through_a_graph an_lr_that_became_nan something_else_has_moved""".split()
runs = pytest.mark.skipif(not (GPU or INTERPRET), reason="needs a GPU, or TRITON_INTERPRET=1")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA or ROCm device; there is none")
compiled = pytest.mark.skipif(INTERPRET or sphere_step.triton is None, reason="not interpreted")


@pytest.mark.skipif(INTERPRET, reason="this is that run")
@pytest.mark.skipif(sphere_step.triton is None, reason="Triton is not installed")
def test_the_kernels_pass_in_the_interpreter():
    which = " or ".join(["test_kernels", "several_processes_step", *SHARED])
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", which]
    files = [HERE, HERE.with_name("test_sphere_step.py"), HERE.with_name("test_shards.py")]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    # Without what measures coverage, which would take twice the time.
    environment = {k: v for k, v in os.environ.items() if k[:3] != "COV" and k != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]


# --- numbers


@runs
@pytest.mark.parametrize("draw", range(100 if GPU else 20 if SLOW else 1))
def test_random_sequences_are_those_of_the_reference(draw):
    """Each kind of sphere and of tile, moved by one and by three passes."""
    seed = int(os.environ.get("SEED", random.randrange(2**31) if SLOW else draw))
    dtypes = torch.float32, *HALVES
    shapes = [(), (3, 4), (4, 3, 3, 2), (3, 70), (1100,), (2100,)]
    if SLOW:
        shapes = SHAPES + [(2100,), (20_000,), (3, 9000)]
    sequence = Sequence(seed, "triton", dtypes, DEVICE, shapes, SPHERES)
    sequence.run(3 if SLOW else 1)


@runs
@pytest.mark.parametrize(
    ("dtype", "scale", "near"),
    [
        (torch.float32, 1.0, False),
        (torch.float32, 1e-22, False),
        (torch.float32, 1e22, False),
        (torch.bfloat16, 1.0, False),
        (torch.bfloat16, 1.0, True),
    ],
)
def test_scalar_products_are_exact_to_a_trillionth_of_the_norms(dtype, scale, near):
    """Of tiles of each kind, with gradients whose squares float32 cannot hold, too. Of 16 bits
    eight products are summed in float32, unless two vectors are nearly parallel."""
    shapes = ("row", (130, 9)), ("row", (17, 80)), ("row", (5, 600)), ("group", (2100,))
    for sphere, shape in shapes:
        group = {"params": [Parameter(torch.randn(shape).to(DEVICE, dtype))], "sphere": sphere}
        optimizer = SphereSGD([group], lr=0.1, momentum=0.9, backend="triton")
        (p,) = group["params"]
        p.grad, m = (scale * torch.randn(2, *shape)).to(DEVICE, dtype)
        if near:
            p.grad = (3 * p + 0.01 * p.grad).detach()
        optimizer.state[p]["momentum_buffer"] = m
        optimizer.observe()
        vectors = [torch.from_numpy(lines_of(group, x)) for x in (p, p.grad, m)]
        pairs = [(x, y) for i, x in enumerate(vectors) for y in vectors[: i + 1]]
        for column, (x, y) in zip(optimizer.grams().cpu().T, pairs, strict=True):
            error = (column - (x * y).sum(1)).abs() / (x.norm(dim=1) * y.norm(dim=1))
            rounded = dtype != torch.float32 and not near
            assert error.max() < (7 * 2**-24 if rounded else 1e-12)


@runs
def test_16_bit_sums_are_exact_where_the_parts_of_g_and_m_across_the_weights_cancel():
    """Though no two of θ, g, m are parallel: g_t = −βm_t, but for one number."""
    n, scale = 8000, 2.0 ** torch.randint(-3, 4, (8000,))
    theta, w = ((8 * torch.randn(2, n)).round() / 8 * scale).to(torch.bfloat16)
    p, g, m = Parameter(theta.to(DEVICE)), 2 * theta + w, -2 * w
    m[0] += 2.0**-4 * scale[0]
    optimizer = SphereSGD([p], lr=0.01, momentum=0.5, angle=True, backend="triton")
    p.grad, optimizer.state[p]["momentum_buffer"] = g.to(DEVICE), m.to(DEVICE)
    optimizer.observe()
    vectors = [x.double() for x in (theta, g, m)]
    pairs = [(x, y) for i, x in enumerate(vectors) for y in vectors[: i + 1]]
    exact = torch.stack([x @ y for x, y in pairs])
    sizes = torch.stack([x.norm() * y.norm() for x, y in pairs])
    assert ((optimizer.grams()[0].cpu() - exact).abs() < 1e-12 * sizes).all()


@runs
def test_the_rule_of_the_kernels_is_the_rule_in_python():
    for angle, lr in ((True, 1.57), (False, 1e-300), (False, 1e-3), (False, 1e250)):
        scales = 10.0 ** torch.empty(3, 40, 1).uniform_(-12, 12)
        x, g, m = scales * torch.randn(3, 40, 5)
        g[::5], g[::7], g[3, 2] = 0.0, 2 * x[::7], math.nan
        rows, joint = Parameter(x.to(DEVICE)), Parameter(x[:4].reshape(-1).clone().to(DEVICE))
        groups = [{"params": [rows], "sphere": "row"}, {"params": [joint]}]
        options = dict(momentum=0.9, angle=angle, backend="triton")
        optimizer = SphereSGD(groups, lr=lr, **options)
        for p, gradient, buffer in ((rows, g, m), (joint, g[6].repeat(4), m[:4].reshape(-1))):
            p.grad = gradient.to(DEVICE)
            optimizer.state[p]["momentum_buffer"] = buffer.to(DEVICE)
        optimizer.step()
        grams, found = optimizer.grams().cpu(), optimizer.last[1].cpu()
        radii = [optimizer.state[p]["radius"].cpu() for p in (rows, joint)]
        each = zip(grams.tolist(), torch.cat(radii).tolist(), strict=True)
        expected = [sphere_rule(*pair, lr, 0.9, angle) for pair in each]
        expected = torch.tensor(expected, dtype=torch.float64)
        # A compiler that joins operations rounds otherwise, the more of ‖m‖ cancels
        tt, tg, gg, tm, gm, mm = grams.T
        whole = gg + 0.81 * mm
        rest = whole - tg**2 / tt + 1.8 * (gm - tm * tg / tt) - 0.81 * tm**2 / tt
        tolerance = (1e-9 + 1e-14 * whole / torch.maximum(rest, 1e-14 * whole)).nan_to_num(1e-9)
        near = (found - expected).abs() <= tolerance[:, None] * expected.abs()
        same = (found == expected) | found.isnan() & expected.isnan()
        assert (near | same).all(), (found[~(near | same)], expected[~(near | same)])


@runs
@pytest.mark.skipif(not SLOW, reason="takes minutes in the interpreter: SLOW=1, or a GPU")
def test_the_check_of_bench_finds_the_kernels_equal_to_float64():
    from lab import bench

    kernels = {name: x for name, x in bench.checks().items() if "triton" in name}
    assert len(kernels) >= 9 and bench.check(kernels) == 0


# --- launches


def several(device=DEVICE, plain=False):
    shapes = {
        "group": [(40, 30), (9000,) if SLOW else (900,), (7,)],
        "tensor": [(2, 3), (9000,) if SLOW else (1100,)],
        "row": [(2, 9), (3, 70), (1, 1100)],
    }
    if plain:
        shapes[None] = [(11,)]
    groups = []
    for sphere, sizes in shapes.items():
        params = [Parameter(torch.randn(size).to(device)) for size in sizes]
        groups.append({"params": params, "sphere": sphere})
    give_gradients(groups)
    return groups


def give_gradients(groups):
    for p in params_of(groups):
        p.grad = torch.randn_like(p)


def params_of(groups):
    return [p for group in groups for p in group["params"]]


@contextmanager
def launches(run=True):
    """Of the kernels: their names, how they are launched, and a way to launch them again."""
    found = []
    kind = type(sphere_step._gram_pass)
    if not hasattr(kind, "run"):
        pytest.skip("the interpreter of an old Triton")
    plain = kind.run

    def taken(kernel, *args, **how):
        again = partial(plain, kernel, *args, **how)
        found.append((kernel.__name__, args, how, again))
        if run:
            with torch.utils._python_dispatch._disable_current_modes():
                again()

    with patch.object(kind, "run", taken):
        yield found


def names(found):
    return [name for name, *_ in found]


@runs
def test_a_step_is_at_most_three_launches_and_nothing_else():
    """No other operation: no allocation, no copy, no wait; other addresses are one table anew."""
    groups = several()
    optimizer = SphereSGD(groups, lr=1e-3, momentum=0.9, backend="triton")
    step = partial(unwrap(SphereSGD.step), optimizer)  # without torch's profiler
    with launches(run=False):
        step()
    counts = []
    for move in (False, True):
        if move:
            kept = [p.grad for p in params_of(groups)]  # so that no address is used again
            give_gradients(groups)
        with launches(run=False) as found, torch.autograd.profiler.profile() as profile:
            step()
        assert names(found) == THREE
        outer = [event for event in profile.function_events if event.cpu_parent is None]
        counts.append(len(outer))
    assert kept and counts[0] == 0 and counts[1] < 9


@runs
def test_launches_are_at_most_three_per_type_of_weights():
    params = [Parameter(torch.randn(5000).to(DEVICE, x)) for x in (torch.float32, *HALVES)]
    give_gradients([{"params": params}])

    def joint(tensors):
        return torch.cat([x.detach().double().cpu() for x in tensors])

    expected, _ = step_of(joint(params), joint(p.grad for p in params), 1e-5)
    with launches() as found:
        SphereSGD(params, lr=1e-5, backend="triton").step()
    assert names(found) == 3 * THREE[:1] + THREE[1:2] + 3 * THREE[2:]
    # A third of it is rounded to bfloat16
    assert (joint(params) - expected).norm() < 3e-3 * expected.norm()


@runs
def test_what_is_done_after_a_capture_does_not_reach_the_replays():
    """A CUDA graph replays the launches alone: at the radii, ELR and addresses of the capture,
    whatever the host uploads in between; and the same bits as the step."""
    groups = several()
    optimizer = SphereSGD(groups, lr=1e-4, backend="triton")
    params = params_of(groups)
    with launches(run=False):
        optimizer.step()
    start, kept = [p.detach().clone() for p in params], [p.grad for p in params]
    with launches() as found:
        optimizer.step()
    once = [p.detach().clone() for p in params]
    give_gradients(groups)  # at other addresses
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    with launches(run=False):  # it is the uploads that could reach them
        optimizer.step()
        optimizer.observe()
    for p, x in zip(params, start, strict=True):
        p.data.copy_(x)
    for *_, again in found:
        again()
    assert kept and all(map(torch.equal, params, once))


@runs
@pytest.mark.parametrize("captured", [False, True])
def test_after_a_load_there_is_what_a_captured_step_reads_and_writes(captured):
    """Tables, sums, momentum buffers; of a step that no graph has nothing is kept."""
    groups = several(plain=True)
    optimizer = SphereSGD(groups, lr=1e-4, momentum=0.9, backend="triton")
    for capturing in (False, captured):
        with launches(run=False) as found:
            with patch.object(sphere_step._ByKernels, "capturing", lambda self, is_=capturing: is_):
                optimizer.step()
    used = [x for _, args, *_ in found for x in args if isinstance(x, torch.Tensor)]
    used += [optimizer.state[p]["momentum_buffer"] for p in params_of(groups)]
    used = [*map(weakref.ref, used)]
    found.clear()
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    gc.collect()
    assert [x() is not None for x in used] == [captured] * len(used)


@runs
def test_a_step_that_was_refused_leaves_the_next_one_right():
    """Though a gradient lies otherwise than its weights, of which the kernels read a copy."""
    params = [Parameter(torch.randn(4, 3, device=DEVICE)) for _ in range(2)]
    copies = deepcopy(params)
    options = dict(lr=0.01, sphere="tensor", momentum=0.9)
    optimizer = SphereSGD(params, backend="triton", **options)
    one = SphereSGD(copies, backend="torch", **options)
    for p, q in zip(params, copies, strict=True):
        p.grad = torch.randn(3, 4, device=DEVICE).t()
        q.grad = p.grad.clone()
    optimizer.step()
    one.step()
    state = optimizer.state[params[1]]
    momentum, state["momentum_buffer"] = state["momentum_buffer"], torch.ones(1)
    with pytest.raises(ValueError, match="has a momentum_buffer of shape"):
        optimizer.step()
    state["momentum_buffer"] = momentum
    for p, q in zip(params, copies, strict=True):
        p.grad.neg_()
        q.grad.neg_()
    optimizer.step()
    one.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("why", ["float64", "no Triton", *([] if INTERPRET else ["no GPU"])])
def test_asking_for_triton_where_it_cannot_run_says_where_it_can(monkeypatch, why):
    dtype, device = (torch.float64, DEVICE) if why == "float64" else (torch.float32, "cpu")
    if why == "no Triton":
        monkeypatch.setattr(sphere_step, "triton", None)
    p = Parameter(torch.randn(3, dtype=dtype, device=device))
    where = "'triton': it must be 'auto', 'torch' or, on a GPU, not in float64, 'triton'"
    with pytest.raises(ValueError, match=where):
        SphereSGD([p], lr=0.1, backend="triton")
    p.grad = torch.randn_like(p)
    SphereSGD([p], lr=0.1).step()


# --- without a GPU


@contextmanager
def fake_gpu():
    """Tensors "on cuda" that have types and shapes but no numbers: to mix devices, or to wait for a
    number, is an error. In the place of the driver: what it says of the card, and addresses."""
    from torch._subclasses import FakeTensorMode

    card = type("card", (), {"multi_processor_count": 132})
    library = torch.library.Library("aten", "IMPL")
    with suppress(RuntimeError):  # where torch has it
        library.impl("nanmedian", lambda x: x.new_empty(()), "Meta")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        patch.object(torch.Tensor, "data_ptr", lambda x: id(x) << 8),
        patch.object(torch.Tensor, "pin_memory", lambda x: x),
        patch.object(torch.cuda, "get_device_properties", lambda device: card),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mode,
    ):
        try:
            torch.ones(2, device="cuda")[0]
        except RuntimeError:
            pytest.skip("this torch asks for a driver even where tensors are fake")
        yield mode


def moved_to(mode, optimizer):
    """A copy of an optimizer with fake weights and states."""
    fakes = {}
    for p, state in optimizer.state.items():
        fakes[id(p)] = Parameter(mode.from_tensor(p.detach()).to("cuda"))
        for x in state.values():
            fakes[id(x)] = mode.from_tensor(x).to("cuda")
    return deepcopy(optimizer, fakes)


@compiled
@pytest.mark.parametrize("angle", [False, True])
def test_a_step_mixes_no_devices_and_waits_for_no_number(angle):
    guarded = []

    def device_of(x):
        guarded.append(x.device.type)
        return nullcontext()

    made = SphereSGD(several("cpu", plain=True), lr=0.1, momentum=0.9, angle=angle)
    with fake_gpu() as mode, patch.object(torch.cuda, "device_of", device_of):
        optimizer = moved_to(mode, made)
        give_gradients(optimizer.param_groups)
        with launches(run=False):
            optimizer.observe()  # the first look may wait
        for lr in (0.1, torch.full((), 0.1, device="cuda"), torch.tensor(0.1)):
            for group in optimizer.param_groups:
                group["lr"] = lr
            with launches(run=False) as found:
                optimizer.step()
                optimizer.observe()
            assert names(found) == THREE + THREE[:2]
            for _, args, how, _ in found:
                assert how["enable_fp_fusion"] is False  # which would break the sums
                assert all(x.device.type == "cuda" for x in args if isinstance(x, torch.Tensor))
            for stats in (optimizer.stats(), optimizer.layer_stats()):
                assert all(x.device.type == "cuda" for x in stats.values())
            assert optimizer.grams().device.type == "cuda"
    assert set(guarded) == {"cuda"}


@compiled
def test_a_first_step_in_a_capture_says_what_to_do():
    """It waits for no number before."""
    made = SphereSGD(several("cpu", plain=True), lr=0.1, momentum=0.9)
    with (
        fake_gpu() as mode,
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        pytest.raises(RuntimeError, match="capture of a CUDA graph: step once before"),
    ):
        optimizer = moved_to(mode, made)
        give_gradients(optimizer.param_groups)
        optimizer.step()


# --- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_the_last_of_several_gpus():
    p = Parameter(torch.randn(3000, device=f"cuda:{torch.cuda.device_count() - 1}"))
    p.grad = torch.randn_like(p)
    expected, _ = step_of(p, p.grad, 1e-3)
    SphereSGD([p], lr=1e-3).step()
    assert torch.allclose(p.cpu().double(), expected, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_an_angle_on_the_gpu_that_becomes_too_large_stays_the_last_valid_one():
    p = Parameter(torch.randn(5000, device="cuda"))
    angle = torch.tensor(0.1, device="cuda")
    optimizer = SphereSGD([p], lr=angle, angle=True)
    p.grad = torch.randn_like(p)
    for value, turned in ((0.2, 0.2), (2.0, 0.2), (math.inf, 0.2), (0.3, 0.3)):
        angle.fill_(value)
        optimizer.step()
        assert math.isclose(optimizer.stats()["angle"].item(), turned, rel_tol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_step_replays_with_a_new_elr():
    groups, elr = several(plain=True), torch.tensor(1e-3, device="cuda")
    copies = deepcopy(groups)
    for p, q in zip(params_of(copies), params_of(groups), strict=True):
        p.grad = q.grad.clone()
    optimizer = SphereSGD(groups, lr=elr, momentum=0.9)
    eager = SphereSGD(copies, lr=1e-3, momentum=0.9, backend="torch")
    optimizer.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (1e-3, 1e-2):
        elr.fill_(value)
        for group in eager.param_groups:
            group["lr"] = value
        graph.replay()
        eager.step()
    for p, q in zip(params_of(groups), params_of(copies), strict=True):
        assert torch.allclose(p, q, atol=5e-6 * q.norm().item())
