"""What torch's own tests ask of every optimizer, asked of SphereSGD, with the cases that torch ships
(torch.testing._internal.common_optimizers): its inputs of SGD for groups on no sphere, its
schedulers, its errors. The tests themselves are in torch's repository, not in the wheel; they are
written anew here, under the names that they have there where there is one.
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
MOMENTUM = {"sphere": "row", "momentum": 0.9}
SPHERES = {
    "joint": {},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "angle": {"angle": True},
    "tensor": {"sphere": "tensor", "momentum": 0.9},
    "row": MOMENTUM,
    "radius": {"radius": 2.0},
}
CASES = [pytest.param(options, id=f"on a sphere, {name}") for name, options in SPHERES.items()]
for name, options in PLAIN:
    if not NOT_OURS & set(options):
        CASES.append(pytest.param({**options, "sphere": None}, id=f"no sphere, {name}"))
cases = pytest.mark.parametrize("options", CASES)


def made(params, options):
    return SphereSGD(params, **{"lr": 1e-3, **deepcopy(options)})


def two_parameters(dtype=torch.float32):
    torch.manual_seed(1)
    return Parameter(torch.randn(10, 5, dtype=dtype)), Parameter(torch.randn(10, dtype=dtype))


def some_steps(optimizer, params, count=3):
    weight, bias = params
    x = torch.ones(5, dtype=weight.dtype)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

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
def test_forloop_goes_right_direction(options, makers=()):
    params = two_parameters()
    optimizer = made(params, options)
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


@pytest.mark.parametrize("makers", SGD.scheduler_inputs)
def test_forloop_goes_right_direction_with_schedulers(makers):
    test_forloop_goes_right_direction(MOMENTUM, makers)


@cases
def test_param_groups_lr_and_weight_decay(options):
    weight, bias = two_parameters()
    groups = [{"params": [weight], "lr": 1e-3}, {"params": [bias], "lr": 0.0, "weight_decay": 0.0}]
    optimizer, before = made(groups, options), bias.detach().clone()
    losses = some_steps(optimizer, (weight, bias), 20)
    assert losses[0] > losses[-1]
    assert options.get("radius") or torch.equal(bias, before)


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
    before = repr(optimizer)
    assert before.startswith("SphereSGD")
    some_steps(optimizer, params)
    assert repr(optimizer) == before


@cases
def test_state_dict_deterministic_and_save_load_equality(options):
    params = two_parameters()
    optimizer = made(params, options)
    some_steps(optimizer, params)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copies = [Parameter(p.detach().clone()) for p in params]
    other = made(copies, options)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for p, original in zip(copies, params, strict=True):
        p.data.copy_(original)  # which a radius has scaled
    assert some_steps(optimizer, params) == some_steps(other, copies)
    assert all(map(torch.equal, params, copies))


def test_can_load_a_state_of_another_type_and_keeps_the_parameters_own():
    params = two_parameters(torch.float64)
    optimizer = made(params, MOMENTUM)
    some_steps(optimizer, params)
    narrow = [Parameter(p.detach().bfloat16()) for p in params]
    other = made(narrow, MOMENTUM)
    other.load_state_dict(optimizer.state_dict())
    assert all(other.state[p]["momentum_buffer"].dtype == torch.bfloat16 for p in narrow)
    some_steps(other, narrow)
    assert all(other.state[p]["radius"].dtype == torch.float64 for p in narrow)


@pytest.mark.parametrize("options", [MOMENTUM, {"sphere": None}], ids=str)
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
    optimizer = made(params, MOMENTUM)
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
    optimizer, calls = made(two_parameters(), {}), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return torch.tensor(7.0)

    with torch.no_grad():
        assert optimizer.step(closure) == 7
    assert calls == [True] and optimizer.step() is None


def test_named_parameters_are_kept_and_saved():
    net = torch.nn.Linear(5, 10)
    state = SphereSGD(net.named_parameters(), lr=1e-3).state_dict()
    unnamed = SphereSGD(net.parameters(), lr=1e-3)
    unnamed.load_state_dict(state)
    for groups in (state["param_groups"], unnamed.param_groups):
        assert groups[0]["param_names"] == ["weight", "bias"]


def test_gradients_that_were_made_to_be_differentiated_again():
    params = two_parameters()
    optimizer = made(params, MOMENTUM)
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
    kept = net.weight.detach().clone()
    assert not torch.equal(kept, before)
    net.weight.grad.fill_(float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)  # which leaves out a step with gradients that are not finite
    assert torch.equal(net.weight, kept)
