"""The step in PyTorch: random sequences against the reference, what these do not reach, refusals.

SEED=123 repeats a random sequence; SLOW=1 draws a thousand new ones, else they are always the same.
"""

import math
import os
import random
import sys
import warnings
import weakref
from copy import deepcopy
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from spheres import INTERPRET, LARGE, SHAPES, Sequence, step_of
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import sphere_step
from sphere_step import SphereSGD, sphere_rule

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
SLOW = "SLOW" in os.environ


def parameter(*shape, scale=1.0, dtype=torch.float32):
    p = Parameter((scale * torch.randn(shape)).to(dtype))
    p.grad = torch.randn(shape).to(dtype)
    return p


def close(a, b):
    return (a.double() - b.double()).norm() <= 1e-6 * b.double().norm()


def on_and_off(*shapes, **options):
    """Tensors, their values, and an optimizer that has all but the last on a sphere."""
    params = [parameter(*shape) for shape in shapes]
    groups = [{"params": params[:-1]}, {"params": params[-1:], "sphere": None}]
    optimizer = SphereSGD(groups, **{"lr": 0.1} | options)
    return params, [p.detach().clone() for p in params], optimizer


@pytest.mark.parametrize("draw", range(1000 if SLOW else 100))
def test_random_sequences_are_those_of_the_reference(draw):
    seed = int(os.environ.get("SEED", random.randrange(2**31) if SLOW else draw))
    sequence = Sequence(seed, "torch", DTYPES, shapes=30 * SHAPES + LARGE)
    sequence.run(sequence.draw.randint(2, 5))


# --- numbers


def test_the_rule_follows_from_the_gram_matrix_at_the_ends_of_its_ranges(rng):
    """k, b, u against the vectors of which the Gram matrix is."""
    for _ in range(300):
        x, g, m = rng.normal(size=(3, 5)) * 10.0 ** rng.uniform(-12, 12, (3, 1))
        gram = [float(a @ b) for a, b in [(x, x), (x, g), (g, g), (x, m), (g, m), (m, m)]]
        radius, beta, angle = rng.choice([0.0, 3.7]), rng.choice([0.0, 0.9]), rng.random() < 0.5
        rho = radius or math.sqrt(gram[0])
        new = beta * (m - gram[3] / gram[0] * x) + g - gram[1] / gram[0] * x
        tan = 10.0 ** rng.uniform(-15, 15)
        lr = tan * math.sqrt(gram[0]) / (rho**2 * np.linalg.norm(new))
        if angle:
            lr = math.atan(tan)
        k, b, u, elr, found_radius, found_beta = sphere_rule(gram, radius, lr, beta, angle)
        v = x / math.sqrt(gram[0]) - tan * new / np.linalg.norm(new)
        expected = rho * v / np.linalg.norm(v)
        found = k * x + b * (beta * m + g + u * x)
        cancels = (np.linalg.norm(g) + beta * np.linalg.norm(m)) / np.linalg.norm(new)
        tolerance = 1e-12 * cancels**2
        assert np.linalg.norm(found - expected) <= tolerance * rho
        tan = elr * rho**2 * np.linalg.norm(new) / math.sqrt(gram[0])
        assert (found_radius, found_beta) == (pytest.approx(rho), beta)
        if not angle:
            assert elr == lr


@pytest.mark.parametrize("sphere, elr", [("group", 1e3), ("row", 1e-3)])
def test_the_norm_is_the_radius_after_many_float32_steps(sphere, elr):
    theta = [parameter(3, 4, 3), parameter(5, 9)]
    optimizer = SphereSGD(theta, lr=elr, sphere=sphere)
    optimizer.observe()
    radius = optimizer.stats()["radius"]
    for _ in range(200):
        for p in theta:
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.observe()
    assert torch.allclose(optimizer.stats()["radius"], radius, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e18, 1e28, 1e34])
def test_a_gradient_whose_square_float32_cannot_hold_turns_by_the_angle(scale, sphere, dtype):
    """Any one, and one that is orthogonal to the weights; of two tensors, one sphere or two."""
    for orthogonal in (True, False):
        theta, g = torch.randn(2, 2, 2100).to(dtype)
        if orthogonal:
            x, y = theta.double(), g.double()
            g = y - x * (x * y).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True)
        g = (scale * g.double()).to(dtype)
        params = [Parameter(x.view(1, -1).clone()) for x in theta]
        for p, own in zip(params, g, strict=True):
            p.grad = own.view_as(p)
        optimizer = SphereSGD(params, lr=0.1, sphere=sphere, angle=True)
        optimizer.step()
        stats = optimizer.stats()
        if sphere == "group":
            theta, g = theta.view(1, -1), g.view(1, -1)
        for i, (x, own) in enumerate(zip(theta, g, strict=True)):
            _, expected = step_of(x, own, 0.1, angle=True)
            for name in ("angle", "grad_norm"):
                assert stats[name][i].item() == pytest.approx(expected[name], rel=1e-4), name


def test_a_radius_for_all_groups_scales_what_is_on_a_sphere():
    weight, bias = parameter(5, 3), parameter(5)
    before = bias.detach().clone()
    groups = [{"params": [weight]}, {"params": [bias], "sphere": None}]
    SphereSGD(groups, lr=0.1, radius=2.0)
    assert weight.norm().item() == pytest.approx(2) and torch.equal(bias, before)


@pytest.mark.parametrize("share", [1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("angle", [True] if INTERPRET else [False, True])
@pytest.mark.parametrize("count", [40, 3000] if INTERPRET else [40, 3000, 140_000])
@pytest.mark.parametrize("dtype", DTYPES[1:2] if INTERPRET else DTYPES)
def test_a_gradient_that_is_all_but_radial(dtype, count, angle, share):
    """In 16 bits c·θ has a direction, by rounding; where there is none, nothing turns."""
    theta = torch.randn(count).to(dtype)
    x, across = theta.double(), torch.randn(count).double()
    across -= x * (x @ across) / (x @ x)
    factor = 2.0 if share or dtype in (torch.float64, torch.float32) else 1.37
    p = Parameter(theta.clone())
    p.grad = (factor * (x + share * across * (x.norm() / across.norm()))).to(dtype)
    g = p.grad.double()
    rest = ((g - x * (x @ g) / (x @ x)).norm() / g.norm()).item()
    lr = 0.1 if angle else 0.1 / (x.norm() * g.norm()).item()
    optimizer = SphereSGD([p], lr=lr, angle=angle)
    optimizer.step()
    expected, _ = step_of(x, g, lr, angle=angle)
    if 1.5e-7 < rest < 6e-7:
        return  # at the threshold
    if rest < 3e-7:
        assert torch.equal(p, theta)
        return
    sums = 2.0**-48  # by which pairs of float32 are off
    bound = (3e-6 + sums / rest**2) * x.norm() / count**0.5 + 1e-6 * x.abs()
    if p.element_size() == 2:  # rounded once
        bound += torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((p - expected).abs() <= bound).all()


def test_rows_whose_gradient_is_mostly_radial_keep_their_norm():
    """Near 90° all of the new weights are the rest that the projection leaves."""
    theta, across = torch.randn(8, 45), torch.randn(8, 45)
    p = Parameter(theta.clone())
    p.grad = theta + 0.18 * across
    x, g = theta.double(), p.grad.double()
    SphereSGD([p], lr=1.57, angle=True, sphere="row", radius=3.5).step()
    rest = g - (x * g).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    normal = torch.nn.functional.normalize
    expected = 3.5 * (math.cos(1.57) * normal(x) - math.sin(1.57) * normal(rest))
    assert ((p - expected).norm(dim=1) < 8e-7 * 3.5).all()


@pytest.mark.parametrize("scale, dtype", [(1e-40, torch.float32), (1e-50, torch.float64)])
def test_a_factor_that_does_not_fit_float32_leaves_the_sphere_and_says_nan(scale, dtype):
    """An angle, with a direction shorter than about 3e-39·ρ sin φ."""
    if INTERPRET and dtype == torch.float64:
        pytest.skip("not in float64")
    for sphere in ("group", "row"):
        p = parameter(2, 40, dtype=dtype)
        p.grad, before = scale * p.grad, p.detach().clone()
        optimizer = SphereSGD([p], lr=1.0, sphere=sphere, angle=True)
        optimizer.step()
        assert torch.equal(p, before) and optimizer.stats()["elr"].isnan().all()


@pytest.mark.parametrize("angle", [False, True])
@pytest.mark.parametrize("sphere", ["group", "row"])
def test_an_lr_that_became_nan_leaves_the_sphere_and_says_nan(sphere, angle):
    """And what is on no sphere."""
    lr = torch.tensor(0.1)
    params, before, optimizer = on_and_off((4, 3), (3,), lr=lr, sphere=sphere, angle=angle)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(math.nan)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(optimizer.stats()[name].isnan().all() for name in ("elr", "angle", "grad_norm"))


def test_what_is_on_no_sphere_takes_the_median_pace_of_the_spheres_that_move():
    (theta, bias), (_, before), optimizer = on_and_off((5, 4), (3,), sphere="row", angle=True)
    theta.grad[2:] = 0
    optimizer.step()
    stats = optimizer.stats()
    lr = (stats["elr"] * stats["radius"] ** 2)[:2].min()  # the lower one of two
    assert close(bias, before - lr * bias.grad)


def test_statistics_of_several_steps_are_those_of_each():
    theta, kept, found = [parameter(4, 3), parameter(7)], [], []
    optimizer = SphereSGD(theta, lr=0.1, momentum=0.5)
    for _ in range(3):
        theta[0].grad = torch.randn(4, 3)
        optimizer.step()
        kept.append(optimizer.last)
        found.append((optimizer.grams(), optimizer.stats(), optimizer.layer_stats()))
    kept = [torch.stack(x) for x in zip(*kept, strict=True)]
    grams, stats, layers = zip(*found, strict=True)
    assert torch.allclose(optimizer.grams(kept), torch.stack(grams))
    for of_each, method in ((stats, optimizer.stats), (layers, optimizer.layer_stats)):
        for name, value in method(kept).items():
            assert torch.allclose(value, torch.stack([x[name] for x in of_each]))


# --- beside other code


@pytest.mark.parametrize("tensor", ["θ", "m"])
def test_a_backward_pass_through_a_graph_from_before_the_step_is_an_error(tensor):
    p = parameter(4, 3)
    optimizer = SphereSGD([p], lr=0.1, momentum=0.9 if tensor == "m" else 0.0)
    x = p if tensor == "θ" else optimizer.state[p]["momentum_buffer"].requires_grad_()
    loss = x.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not compiled")
@pytest.mark.parametrize("what", ["step", "function"])
def test_the_first_step_of_all_may_be_a_compiled_one(what):
    torch._dynamo.reset()
    params, _, optimizer = on_and_off((4, 5), (4,), momentum=0.9)
    copies, one = deepcopy((params, optimizer))

    def observed():
        optimizer.observe()
        optimizer.step()

    step = torch.compile(optimizer.step if what == "step" else observed, backend="eager")
    for _ in range(2):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step()
        one.step()
        assert all(map(close, params, copies))
        for name, value in one.stats().items():
            assert torch.allclose(optimizer.stats()[name], value, rtol=1e-4, atol=1e-6)


def test_a_default_device_is_nothing_to_it():
    p = parameter(4, 3)
    torch.set_default_device("meta")
    try:
        optimizer = SphereSGD([p], lr=0.1, sphere="row", angle=True)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert optimizer.stats()["angle"].tolist() == pytest.approx([0.1] * 4)


def test_a_wrapper_that_takes_its_class_reads_its_attributes():
    """As Lightning Fabric's: what the class has of its own would hide the optimizer's."""

    class Wrapper:
        def __init__(self, optimizer):
            self.inner = optimizer
            self.__class__ = type("Wrapped", (Wrapper, SphereSGD), {})

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def step(self):
            self.inner.step()

    inner = SphereSGD([parameter(4, 3)], lr=0.1)
    outer = Wrapper(inner)
    for _ in range(2):
        outer.step()
        assert outer.stats() == inner.stats() and torch.equal(outer.grams(), inner.grams())


SCHEDULERS = {
    "StepLR": dict(step_size=2),
    "CosineAnnealingLR": dict(T_max=9),
    "LambdaLR": dict(lr_lambda=lambda epoch: 0.9**epoch),
    "OneCycleLR": dict(max_lr=0.01, total_steps=9),
    "CyclicLR": dict(base_lr=0.001, max_lr=0.01, step_size_up=2),
    "ReduceLROnPlateau": dict(patience=0, threshold=10.0),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_elr_as_it_sets_the_lr_of_sgd(name, tensor):
    optimizer = SphereSGD([parameter(4, 3)], torch.tensor(0.01) if tensor else 0.01, momentum=0.9)
    sgd, kind = torch.optim.SGD([parameter(3)], 0.01, 0.9), getattr(lr_scheduler, name)
    schedulers = [kind(x, **SCHEDULERS[name]) for x in (optimizer, sgd)]
    for _ in range(5):
        optimizer.step()
        sgd.step()
        expected = sgd.param_groups[0]["lr"]
        assert optimizer.stats()["elr"].item() == pytest.approx(expected)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert expected != 0.01


def test_schedules_leave_their_options_and_every_group_has_a_weight_decay():
    for name, how in dict(OneCycleLR=dict(total_steps=9), CyclicLR=dict(base_lr=0.01)).items():
        optimizer = SphereSGD([{"params": [parameter(4, 3)], "name": "a"}], lr=0.1, momentum=0.9)
        getattr(lr_scheduler, name)(optimizer, max_lr=0.1, **how)
        extra = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        optimizer.add_param_group({"params": [parameter(2)], **extra})
        optimizer.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("steps", [0, 1] if not INTERPRET else [0])
def test_weights_that_something_else_has_moved_are_told_of_once(sphere, steps):
    """Before or between steps; the kernels, which do not wait, look before the first."""
    params, _, optimizer = on_and_off((4, 3), (5, 2), (3,), sphere=sphere)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(steps):
            optimizer.step()
        params[2].data.mul_(3)  # is on no sphere
        for factor in (1.001, 3):  # rounding may do the first
            params[1].data.mul_(factor)
            if not INTERPRET:  # at the norms that they have
                optimizer.observe()
    with pytest.warns(UserWarning, match="weights were changed since the optimizer was made"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for p in params:
            p.data.mul_(3)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


def test_where_a_tensor_has_no_gradient_the_others_keep_their_norm_and_nothing_is_told():
    params = [parameter(4, 3), parameter(5)]
    optimizer, params[0].grad = SphereSGD(params, lr=0.1), None
    params[1].data.mul_(3)
    norm = params[1].detach().norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step()
    assert close(params[1].detach().norm(), norm)


def test_statistics_of_layers_have_the_names_that_were_given():
    net = torch.nn.Linear(3, 4)
    groups = [{"params": [("w", net.weight)]}, {"params": [("b", net.bias)], "sphere": None}]
    optimizer = SphereSGD(groups, lr=0.1)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.layer_stats()["name"] == ["w"]


def test_without_a_sphere_or_a_step_there_are_no_statistics():
    """Nor of another optimizer's `last`, or one that was kept from before a state was loaded."""
    plain, loaded = (SphereSGD([parameter(3)], lr=0.1, sphere=x) for x in (None, "group"))
    for optimizer in (plain, loaded):
        optimizer.step()
    kept = loaded.last
    loaded.load_state_dict(loaded.state_dict())
    for one in (plain, loaded, SphereSGD([parameter(3)], lr=0.1)):
        for statistics, last in product((one.stats, one.layer_stats, one.grams), (None, kept)):
            with pytest.raises(RuntimeError, match="no statistics before the first step"):
                statistics(last)
    SphereSGD([{"params": []}], lr=0.1).step()


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    optimizer, calls = SphereSGD([parameter(3)], lr=0.1), []
    with torch.no_grad():
        assert optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 7) == 7
    assert calls == [True] and optimizer.step() is None


def test_gradients_that_were_made_to_be_differentiated_again():
    p = parameter(4, 3)
    optimizer = SphereSGD([p], lr=0.1, momentum=0.9)
    for _ in range(2):
        (p.grad,) = torch.autograd.grad(p.sin().sum(), p, create_graph=True)
        optimizer.step()
    assert p.is_leaf and p.requires_grad


def test_a_state_of_another_type_takes_the_type_of_the_weights_but_for_the_radius():
    wide, narrow = parameter(4, 3, dtype=torch.float64), parameter(4, 3, dtype=torch.bfloat16)
    narrow.data.copy_(wide)
    one, other = (SphereSGD([p], lr=0.1, sphere="row", momentum=0.9) for p in (wide, narrow))
    one.step()
    other.load_state_dict(one.state_dict())
    other.step()
    assert other.state[narrow]["momentum_buffer"].dtype == torch.bfloat16
    assert other.state[narrow]["radius"].dtype == torch.float64


def test_a_state_of_torchs_sgd_leaves_the_radii():
    theta = [parameter(4), parameter(3)]
    norm = sum(p.detach().norm() ** 2 for p in theta)
    optimizer = SphereSGD(theta, lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    state["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(state)
    optimizer.step()
    assert torch.allclose(sum(p.detach().norm() ** 2 for p in theta), norm)


def test_a_state_is_what_the_hooks_of_load_state_dict_make_of_it():
    """As torch describes it: tensors are found by their names."""
    a, b = parameter(4, 3), parameter(4, 3, scale=10.0)
    one, two = (
        SphereSGD(pairs, lr=0.1, sphere="tensor", momentum=0.9)
        for pairs in ([("a", a), ("b", b)], [("b", Parameter(b.data)), ("a", Parameter(a.data))])
    )

    def by_name(optimizer, state_dict):
        (group,) = state_dict["param_groups"]
        number = dict(zip(group["param_names"], group["params"], strict=True))
        names = optimizer.param_groups[0]["param_names"]
        state = {i: state_dict["state"][number[name]] for i, name in enumerate(names)}
        return {"state": state, "param_groups": [group | {"param_names": names}]}

    two.register_load_state_dict_pre_hook(by_name)
    for _ in range(2):
        two.load_state_dict(one.state_dict())
    radii = [two.state[p]["radius"].item() for p in two.param_groups[0]["params"]]
    assert radii == [one.state[p]["radius"].item() for p in (b, a)]


@pytest.mark.parametrize("lrs", [(0.1, 0.3), (0.3, 0.3)])
def test_groups_that_share_a_tensor_as_lr_take_each_its_own_value(lrs):
    lr = torch.tensor(0.2)
    ours = SphereSGD([{"params": [parameter(3)]}, {"params": [parameter(3)]}], lr=lr)
    state = ours.state_dict()
    for group, value in zip(state["param_groups"], lrs, strict=True):
        group["lr"] = value
    ours.load_state_dict(state)
    found = [group["lr"] for group in ours.param_groups]
    assert found == pytest.approx(lrs) and found[0] is lr
    assert (found[1] is lr) == (lrs[0] == lrs[1])


@pytest.mark.parametrize("flat", [False, True])
def test_another_optimizer_takes_a_state_by_way_of_distributed_checkpoints(flat):
    """Also where a tensor has neither radius nor momentum."""
    module = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    how = dict(options=module.StateDictOptions(flatten_optimizer_state_dict=flat))
    nets = [torch.nn.Linear(3, 4) for _ in range(2)]
    one, two = (
        SphereSGD([{"params": [net.weight]}, {"params": [net.bias], "sphere": None}], lr=lr)
        for net, lr in zip(nets, (0.1, 0.2), strict=True)
    )
    state = module.get_optimizer_state_dict(nets[0], one, **how)
    module.set_optimizer_state_dict(nets[1], two, state, **how)
    assert two.state[nets[1].weight] == one.state[nets[0].weight]
    assert [group["lr"] for group in two.param_groups] == [0.1, 0.1]


# --- costs


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


def test_large_weights_are_not_copied_whole():
    p = parameter(1 << 20)
    with Sizes() as sizes:
        SphereSGD([p], lr=0.1).step()
    assert 0 < sizes.largest <= p.numel() // 4


def test_a_gradient_is_not_kept_after_the_step():
    """Its memory would be missing in the next backward pass."""
    p = parameter(4, 3)
    optimizer = SphereSGD([p], lr=0.1)
    optimizer.step()
    gradient, p.grad = weakref.ref(p.grad), None
    assert gradient() is None


def test_many_groups_take_calls_in_proportion():
    def calls(count):
        groups, found = [{"params": [parameter(3)]} for _ in range(count)], [0]

        def profile(frame, event, argument):
            ours = frame.f_code.co_filename == sphere_step.__file__  # torch's own are quadratic
            found[0] += ours and event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            optimizer = SphereSGD(groups, lr=0.1)
            optimizer.step()
            optimizer.step()
        finally:
            sys.setprofile(None)
        return found[0]

    assert calls(80) < 5 * calls(20)


# --- refusals


def views(start):
    flat = torch.randn(9)
    return [Parameter(flat[:6]), Parameter(flat[start:])]


def flat_parameter():
    p = parameter(12)
    p._fsdp_flattened = True  # by FSDP1
    return [p]


def twice():
    p = parameter(3, 2)
    return [p, parameter(2), Parameter(p.detach())]


BAD = {
    "lr": (-0.1, math.nan, math.inf, None, "0.1", torch.ones(2), True),
    "sphere": ("ball", ["row"]),
    "radius": (-1.0, "1", True),
    "momentum": (1.0, -0.1, None, "0.9", True),
    "angle": (0.05, 1),
    "weight_decay": (-1.0, math.nan, None),
    "backend": ("cuda",),
}
OPTIONS = [(name, {name: value}) for name, values in BAD.items() for value in values]
OPTIONS += [("lr", {"lr": 1.6, "angle": True})]
OPTIONS += [("angle", {"angle": True, "sphere": None})]
UNKNOWN = ["betas", "weight_decy", "dampening", "nesterov", "maximize"]
holes, again = r"shape \(2, 3\) has holes", r"parameter 2 of shape \(3, 2\) is parameter 0 again"
part, zero = "parameter 1 .* is parameter 0 again, or a part of it", "has norm zero"
TENSORS = [
    (lambda: [parameter(3), torch.randn(2, 3, 2)[..., 0]], {}, f"parameter 1 of {holes}"),
    (lambda: [torch.randn(4, 5).t()], dict(sphere="row"), "scattered rows"),
    (twice, {}, again),
    (twice, dict(sphere=None), again),
    (lambda: views(3), {}, part),
    (lambda: views(3), dict(sphere=None), part),
    (lambda: [torch.zeros(3)], {}, zero),
    (lambda: [torch.zeros(0), torch.zeros(3)], {}, zero),
    (lambda: [torch.zeros(0), torch.zeros(3)], dict(sphere="tensor"), f"tensor 1 {zero}"),
    (lambda: [torch.eye(3)[:, 1:]], dict(sphere="row"), "holes|norm zero"),
    (lambda: [torch.eye(3)[:2] * torch.tensor([[1], [0]])], dict(sphere="row"), zero),
    (lambda: [torch.tensor([1.0, math.nan])], {}, "not finite"),
    (lambda: [parameter(9, scale=1e-22)], {}, "too small or too large"),
    (lambda: [parameter(9, scale=1e30)], {}, "too small or too large"),
    (lambda: [parameter(4, dtype=torch.float16)], dict(radius=1e6), "radius=.*too large"),
    (lambda: [parameter(5, 5)], dict(radius=1e25), "radius=.*too large for 25 numbers"),
    (lambda: [parameter(5, 5, dtype=torch.float16)], dict(radius=1e-9), "radius=.*too small"),
    (lambda: [torch.empty(3, device="meta")], {}, "float32 on meta"),
    (lambda: [torch.zeros(3, dtype=torch.float8_e4m3fn)], {}, "is torch.float8_e4m3fn"),
    (lambda: [torch.randn(2), torch.ones(3).int()], {}, r"1 of shape \(3,\) is .*int"),
    (flat_parameter, {}, "flat parameter"),
    (lambda: [torch.zeros(3) + 1j], dict(sphere=None), "is torch.complex64"),
]


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_a_bad_option_is_refused_by_name(name, options):
    with pytest.raises(ValueError, match=f"^{name}="):
        SphereSGD([parameter(3)], **{"lr": 0.1, **options})


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_option_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}=.*there is no such option"):
        SphereSGD([{"params": [parameter(3)], "sphere": None, name: True}], lr=0.1)


@pytest.mark.parametrize("params, options, message", TENSORS)
def test_what_cannot_be_stepped_is_refused_when_it_is_made(params, options, message):
    with pytest.raises(ValueError, match=message):
        SphereSGD(params(), **{"lr": 0.1, **options})
    optimizer = SphereSGD([parameter(5)], lr=0.1)
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": params(), **options})
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and len(optimizer.stats()["elr"]) == 1


def test_a_tensor_of_another_group_is_refused():
    p = parameter(3, 2)
    for again in (p, Parameter(p.detach()[:2])):
        with pytest.raises(ValueError):
            SphereSGD([{"params": [p]}, {"params": [again], "sphere": None}], lr=0.1)
    optimizer = SphereSGD([p], lr=0.1)
    optimizer.add_param_group({"params": [again]})
    with pytest.raises(ValueError, match=part):
        optimizer.step()


def everything(optimizer):
    groups = [dict(group) for group in optimizer.param_groups]
    weights = [p.detach().clone() for group in groups for p in group.pop("params")]
    state = [dict(state) for state in optimizer.state.values()]
    return repr((groups, weights, deepcopy(state), optimizer.stats()))


def stepped(*shapes, apart=False, **options):
    params = [parameter(*shape) for shape in shapes]
    groups = [{"params": [p]} for p in params] if apart else params
    optimizer = SphereSGD(groups, **{"lr": 0.1, "momentum": 0.9} | options)
    optimizer.step()
    return optimizer


shape = r"parameter 1 of shape \(5, 3\).*"
STATES = [
    (lambda: stepped((2, 2), (8, 3), sphere="tensor").state_dict(), shape + r"\(8, 3\)"),
    (lambda: stepped((2, 2), (12,), sphere="tensor").state_dict(), shape + r"\(12,\)"),
    (lambda: stepped((4, 2), (5, 3), sphere="row").state_dict(), r"shape \(2, 2\).*\(4, 2\)"),
    (lambda: torch.optim.SGD([torch.ones(2), torch.ones(5)]).state_dict(), "sphere='missing'"),
    (lambda: stepped((2, 2)).state_dict(), "doesn't match the size"),
    (lambda: stepped((2, 2), (5, 3), apart=True).state_dict(), "number of parameter groups"),
]
# A state that was edited, or is that of something else: where | what is there.
EDITED = [
    ("state", None, "'state'"),
    ("param_groups", None, "'param_groups'"),
    ("param_groups", [], "parameter groups"),
    ("param_groups", 3, "no state of an optimizer"),
    ("param_groups 0", None, "parameter groups"),
    ("param_groups 0 params", None, "'params'"),
    ("param_groups 0 params", [0], "doesn't match the size"),
    ("param_groups 0 lr", None, "lr=None"),
    ("param_groups 0 lr", [0.1], r"lr=\[0.1\]"),
    ("param_groups 0 momentum", [0.9], r"momentum=\[0.9\]"),
    ("param_groups 0 momentum", None, "momentum='missing'"),
    ("state", [], "no state of an optimizer"),
    ("state 1", [1], "no state of an optimizer"),
    ("state 1 momentum_buffer", [1.0], "a momentum_buffer that is no tensor"),
    ("state 1 momentum_buffer", torch.full((5, 3), math.inf), "radius or momentum that is not"),
    ("state 1 radius", [1.0], "a radius that is no vector"),
    ("state 1 radius", torch.tensor(1.0), "a radius that is no vector"),
    ("state 1 radius", torch.ones(3), "1 spheres, but 3 radii"),
    ("state 1 radius", torch.tensor([-1.0]), "the state has a radius"),
    ("state 1 radius", torch.tensor([math.nan]), "the state has a radius"),
    ("state 1 radius", torch.tensor([1e-30]), "the state's radius: too small or too large"),
    ("state 1 radius", torch.tensor([1e40], dtype=torch.float64), "too small or too large"),
]


def edited(where, what):
    """A state, where this was put, or nothing is left."""
    state = part = deepcopy(stepped((2, 2), (5, 3), sphere="tensor").state_dict())
    *path, last = [int(word) if word.isdigit() else word for word in where.split()]
    for step in path:
        part = part[step]
    part[last] = what
    if what is None:
        del part[last]
    return state


STATES += [(partial(edited, where, what), message) for where, what, message in EDITED]


def test_a_joint_sphere_has_one_radius():
    ours = stepped((2, 2), (5, 3))
    state = deepcopy(ours.state_dict())
    state["state"][1]["radius"] *= 3
    with pytest.raises(ValueError, match="several radii for one sphere"):
        ours.load_state_dict(state)


@pytest.mark.parametrize("state, message", STATES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changed(state, message):
    ours = stepped((2, 2), (5, 3), sphere="tensor")
    before = everything(ours)
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(state())
    assert everything(ours) == before
    ours.step()


def by_hand(**changes):
    """Of the weights' data, gradient and momentum, and of options of the other group."""

    def change(optimizer, p):
        for name, value in changes.items():
            if name in ("data", "grad"):
                setattr(p, name, value)
            elif name == "momentum_buffer":
                optimizer.state[p][name] = value
            else:
                optimizer.param_groups[1][name] = value

    return change


STEPS = {
    r"shape \(30,\) was put into param_groups": by_hand(
        params=[parameter(30)]
    ),  # as DeepSpeed does
    "a tensor was taken out of param_groups": by_hand(params=[]),
    "had 30 elements: make the optimizer anew": by_hand(
        data=torch.randn(3, 2), momentum_buffer=None
    ),
    r"momentum_buffer of shape \(6, 5\)": by_hand(data=torch.randn(3, 10)),
    r"gradient of shape \(6, 5\) for .* of shape \(3, 10\)": by_hand(
        data=torch.randn(3, 10), momentum_buffer=torch.zeros(3, 10)
    ),
    "holes in memory": by_hand(data=torch.randn(5, 6, 2)[..., 0].t(), grad=None),
    r"momentum_buffer .*shape \(1,\)": by_hand(momentum_buffer=torch.zeros(1)),
    r"shape \(6, 5\) has a momentum_buffer of shape \(5, 6\)": by_hand(
        momentum_buffer=torch.ones(5, 6)
    ),
    "is sparse: make it without sparse=True": by_hand(grad=torch.randn(6, 5).to_sparse()),
    "momentum=1.5": by_hand(momentum=1.5),
    "weight_decay=None": by_hand(weight_decay=None),
    "angle=0.1": by_hand(angle=0.1),
    "radius=-1.0": by_hand(radius=-1.0),
}


@pytest.mark.parametrize("message", STEPS)
@pytest.mark.parametrize("steps", [0, 1])
def test_what_was_changed_by_hand_is_refused_by_the_step(message, steps):
    (p, other), _, optimizer = on_and_off((6, 5), (4,), lr=0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.step()
    STEPS[message](optimizer, p)
    before = p.detach().clone(), other.detach().clone()
    momentum = optimizer.state[p]["momentum_buffer"]
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=message):
            optimizer.step()
    assert torch.equal(p, before[0]) and torch.equal(other, before[1])
    assert optimizer.state[p]["momentum_buffer"] is momentum


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("lr", [math.pi / 2, 2.0, -0.1, math.inf])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nothing_moves_where_one_group_has_a_bad_lr(bad, lr, kind):
    params = [parameter(4), parameter(5), parameter(6)]
    before = [p.detach().clone() for p in params]
    groups = [{"params": [p], "angle": True} for p in params]
    groups[1]["sphere"] = None
    optimizer = SphereSGD(groups, lr=0.1)
    optimizer.param_groups[bad]["lr"] = kind(lr)
    with pytest.raises(ValueError, match="lr=.*an angle below π/2"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_a_radius_that_was_changed_is_refused_by_the_next_step():
    optimizer = stepped((2, 2), radius=1.0)
    optimizer.param_groups[0]["radius"] = 2.0
    with pytest.raises(ValueError, match="radius=2.0: it cannot change between steps"):
        optimizer.step()
    optimizer.load_state_dict(stepped((2, 2), radius=3.0).state_dict())
    optimizer.normalize()
    optimizer.step()
    assert optimizer.stats()["radius"] == 3.0


def test_nothing_is_scaled_where_another_group_is_refused():
    p = parameter(4)
    before = p.detach().clone()
    for other in ({"params": [parameter(2)], "lr": -1}, {"params": [p.detach()[:2]]}):
        with pytest.raises(ValueError):
            SphereSGD([{"params": [p], "radius": 2.0}, other], lr=0.1)
        assert torch.equal(p, before)


def test_small_tensors_of_a_joint_sphere_are_put_back_on_it():
    params = [parameter(4), parameter(4)]
    optimizer = SphereSGD(params, lr=0.1, radius=2.5)
    params[1].data.fill_(1e-20)
    optimizer.normalize()
    assert params[0].detach().norm().item() == pytest.approx(2.5)
