"""What torch's own tests ask of every optimizer, asked of SphereSGD, with the cases that torch ships
(torch.testing._internal.common_optimizers): its inputs of SGD for groups on no sphere, its schedulers, its
errors. The tests themselves are in torch's repository, not in the wheel; they are written anew here, under
the names that they have there where there is one.
"""

import io
import sys
import types
import unittest
from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sphere_step import SphereSGD

if "expecttest" not in sys.modules:  # which torch's module imports for tests of another kind
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stub

torch.backends.disable_global_flags = lambda: None  # that module calls it, for all other tests
common = pytest.importorskip("torch.testing._internal.common_optimizers")
SGD = next(info for info in common.optim_db if info.optim_cls is torch.optim.SGD)
PLAIN = [(case.desc, case.kwargs) for case in SGD.optim_inputs_func(device="cpu")]
NOT_OURS = {"dampening", "nesterov", "maximize"}
PLAIN = [(name, kwargs) for name, kwargs in PLAIN if not NOT_OURS & set(kwargs)]
SPHERES = [
    ("joint", {}),
    ("lr", {"lr": 1e-4}),
    ("tensor lr", {"lr": torch.tensor(0.001)}),
    ("momentum", {"momentum": 0.9}),
    ("angle", {"angle": True}),
    ("tensor", {"sphere": "tensor", "momentum": 0.9}),
    ("row", {"sphere": "row", "momentum": 0.9}),
    ("radius", {"radius": 2.0}),
]
CASES = [pytest.param(options, id=f"on a sphere, {name}") for name, options in SPHERES]
CASES += [
    pytest.param({**options, "sphere": None}, id=f"no sphere, {name}") for name, options in PLAIN
]
cases = pytest.mark.parametrize("options", CASES)


def made(params, options):
    """With lr and momentum for all groups, and what else torch.optim.SGD takes for the first."""
    options = {"lr": 1e-3, **deepcopy(options)}
    own = {name: options.pop(name) for name in list(options) if name in OF_SGD}
    groups = [dict(group) if isinstance(group, dict) else group for group in params]
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    for group in groups:
        group.update({name: value for name, value in own.items() if name not in group})
    return SphereSGD(groups, **options)


OF_SGD = ("weight_decay",)


def two_parameters(dtype=torch.float32):
    torch.manual_seed(1)
    return Parameter(torch.randn(10, 5, dtype=dtype)), Parameter(torch.randn(10, dtype=dtype))


def closure_of(optimizer, params, x):
    weight, bias = params

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def some_steps(optimizer, params, count=3):
    closure = closure_of(optimizer, params, torch.ones(5, dtype=params[0].dtype))
    return [optimizer.step(closure).item() for _ in range(count)]


@pytest.mark.filterwarnings("ignore")
def test_errors():
    for case in common.get_error_inputs_for_all_optims("cpu", torch.float32):
        given = case.optimizer_error_input
        params = two_parameters() if given.params is None else given.params
        error = ValueError if case.error_type is UserWarning else case.error_type  # we refuse it
        with pytest.raises(error):
            SphereSGD(params, **{"lr": 0.1, **given.kwargs})


@cases
@pytest.mark.parametrize("scheduled", range(len(SGD.scheduler_inputs) + 1))
def test_forloop_goes_right_direction(options, scheduled):
    """With each of the schedulers that torch tries with SGD, and without."""
    params = two_parameters()
    optimizer = made(params, options)
    makers = SGD.scheduler_inputs[scheduled - 1] if scheduled else ()
    schedulers = [make(optimizer) for make in makers]
    losses = []
    for _ in range(20):
        losses += some_steps(optimizer, params, 1)
        for scheduler in schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(losses[-1])
            else:
                scheduler.step()
    assert losses[0] > losses[-1]


@cases
def test_param_groups_lr_and_weight_decay(options):
    weight, bias = two_parameters()
    groups = [{"params": [weight], "lr": 1e-3}, {"params": [bias], "lr": 0.0, "weight_decay": 0.0}]
    optimizer, before = made(groups, options), bias.detach().clone()
    losses = some_steps(optimizer, (weight, bias), 20)
    assert losses[0] > losses[-1]
    if not options.get("radius"):
        assert torch.equal(bias, before)


def test_tensor_lr():
    for dtype in (torch.float32, torch.float64):
        results = []
        for lr in (1e-4, *(torch.full(n, 1e-4, dtype=torch.float64) for n in ((), (1,)))):
            params = two_parameters(dtype)
            some_steps(SphereSGD(params, lr=lr, momentum=0.9), params, 5)
            results.append(params)
        for params in results[1:]:
            for p, first in zip(params, results[0], strict=True):
                assert torch.allclose(p, first, rtol=1e-6)


@cases
@pytest.mark.parametrize("gradients", ["none", "zero"])
def test_step_is_noop_when_params_have_no_grad_or_zero_grads(options, gradients):
    params = two_parameters()
    optimizer = made(params, options)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = None if gradients == "none" else torch.zeros_like(p)
    optimizer.step()
    if gradients == "none" or not options.get("weight_decay") or "sphere" not in options:
        assert all(map(torch.equal, params, before))


@cases
def test_optimizer_can_be_printed(options):
    params = two_parameters()
    optimizer = made(params, options)
    assert repr(optimizer).startswith("SphereSGD")
    some_steps(optimizer, params)
    assert repr(optimizer).startswith("SphereSGD")


@cases
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_state_dict_deterministic_and_save_load_equality(options, groups, weights_only):
    weight, bias = two_parameters()
    params = [{"params": [weight]}, {"params": [bias]}] if groups else [weight, bias]
    optimizer = made(params, options)
    some_steps(optimizer, (weight, bias))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=weights_only)
    copies = [Parameter(p.detach().clone()) for p in (weight, bias)]
    params = [{"params": copies[:1]}, {"params": copies[1:]}] if groups else copies
    other = made(params, options)
    other.load_state_dict(state)
    with torch.no_grad():
        for p, original in zip(copies, (weight, bias), strict=True):
            p.copy_(original)  # which a radius has scaled
    assert some_steps(optimizer, (weight, bias)) == some_steps(other, copies)
    assert torch.equal(weight, copies[0]) and torch.equal(bias, copies[1])


def test_can_load_a_state_of_another_type_and_keeps_the_parameters_own():
    params = two_parameters(torch.float64)
    optimizer = SphereSGD(params, lr=1e-3, momentum=0.9)
    some_steps(optimizer, params)
    narrow = [Parameter(p.detach().bfloat16()) for p in params]
    other = SphereSGD(narrow, lr=1e-3, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert all(other.state[p]["momentum_buffer"].dtype == torch.bfloat16 for p in narrow)
    some_steps(other, narrow)
    assert all(other.state[p]["radius"].dtype == torch.float64 for p in narrow)


@cases
@pytest.mark.parametrize("steps", [0, 3])
def test_deepcopy_copies_all_public_attrs(options, steps):
    params = two_parameters()
    optimizer = made(params, options)
    some_steps(optimizer, params, steps)

    def public(instance):
        return {name for name in dir(instance) if not name.startswith("_")} - {"last"}

    copied = deepcopy(optimizer)
    assert public(copied) == public(optimizer)
    assert repr(copied) == repr(optimizer)
    again = copied.param_groups[0]["params"]
    assert some_steps(copied, again, 2) == some_steps(optimizer, params, 2)


@cases
def test_hooks_of_steps_and_states(options):
    params = two_parameters()
    optimizer, calls = made(params, options), []

    def noted(name):
        return lambda *_: calls.append(name)

    handles = [
        optimizer.register_step_pre_hook(noted("pre")),
        optimizer.register_step_post_hook(noted("post")),
        register_optimizer_step_pre_hook(noted("global pre")),
        register_optimizer_step_post_hook(noted("global post")),
        optimizer.register_state_dict_pre_hook(noted("state pre")),
        optimizer.register_state_dict_post_hook(noted("state post")),
        optimizer.register_load_state_dict_pre_hook(noted("load pre")),
        optimizer.register_load_state_dict_post_hook(noted("load post")),
    ]
    some_steps(optimizer, params, 1)
    assert calls == ["global pre", "pre", "post", "global post"]
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["state pre", "state post", "load pre", "load post"]
    for handle in handles:
        handle.remove()
    calls.clear()
    some_steps(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == []


def test_hooks_that_change_the_state_that_is_saved_or_loaded():
    params = two_parameters()
    optimizer = SphereSGD(params, lr=1e-3, momentum=0.9)
    some_steps(optimizer, params)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    assert optimizer.state_dict()["more"] == 1

    def halved(_, state):
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halved)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3 / 2


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    params = two_parameters()
    optimizer, calls = SphereSGD(params, lr=1e-3), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return torch.tensor(7.0)

    with torch.no_grad():
        assert optimizer.step(closure) == 7
    assert calls == [True] and optimizer.step() is None


def test_named_parameters_are_kept_and_saved():
    net = torch.nn.Linear(5, 10)
    optimizer = SphereSGD(net.named_parameters(), lr=1e-3)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    unnamed = SphereSGD(net.parameters(), lr=1e-3)
    unnamed.load_state_dict(state)
    assert unnamed.param_groups[0]["param_names"] == ["weight", "bias"]


def test_a_group_added_later_is_scheduled_and_stepped():
    weight, bias = two_parameters()
    optimizer = SphereSGD([weight], lr=1e-2, momentum=0.9)
    some_steps(optimizer, (weight, bias), 2)
    optimizer.add_param_group({"params": bias, "lr": 1e-4})
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.001], total_steps=10)
    losses = []
    for _ in range(9):
        losses += some_steps(optimizer, (weight, bias), 1)
        scheduler.step()
    assert losses[0] > losses[-1]
    assert optimizer.param_groups[0]["momentum"] != 0.9  # which the schedule moves, too


def test_gradients_that_were_made_to_be_differentiated_again():
    params = two_parameters()
    optimizer = SphereSGD(params, lr=1e-3, momentum=0.9)
    for _ in range(2):
        loss = (params[0].mv(torch.ones(5)) + params[1]).pow(2).sum()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    assert all(p.is_leaf and p.requires_grad for p in params)


def test_averaged_models_and_gradient_scaling_work_around_it():
    net = torch.nn.Linear(5, 10)
    optimizer = SphereSGD(net.parameters(), lr=1e-3)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = net.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 5)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        averaged.update_parameters(net)
        schedule.step()
    assert not torch.equal(net.weight, before)
    with torch.no_grad():
        net.weight.grad.fill_(float("inf"))
    kept = net.weight.detach().clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)  # which leaves out a step with gradients that are not finite
    assert torch.equal(net.weight, kept)
