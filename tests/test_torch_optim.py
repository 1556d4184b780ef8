"""What torch's own tests ask of every optimizer, where the random sequences do not: schedulers,
hooks, states."""

from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from sphere_step import SphereSGD

MOMENTUM = {"sphere": "row", "momentum": 0.9}


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
    lr, params = (torch.tensor(0.01) if tensor else 0.01), two_parameters()
    optimizers = made(params, MOMENTUM | {"lr": lr}), torch.optim.SGD(two_parameters(), 0.01, 0.9)
    kind = getattr(lr_scheduler, name)
    schedulers = [kind(optimizer, **SCHEDULERS[name]) for optimizer in optimizers]
    for _ in range(5):
        some_steps(optimizers[0], params, 1)
        expected = optimizers[1].param_groups[0]["lr"]
        assert optimizers[0].stats()["elr"].tolist() == pytest.approx([expected] * 20)
        optimizers[1].step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert expected != 0.01


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


def test_hooks_of_steps_and_states():
    params, calls = two_parameters(), []
    optimizer = made(params, MOMENTUM)

    def noted(name):
        return lambda *_: calls.append(name)

    optimizer.register_step_pre_hook(noted("pre"))
    optimizer.register_step_post_hook(noted("post"))
    optimizer.register_state_dict_pre_hook(noted("state pre"))
    optimizer.register_load_state_dict_post_hook(noted("load post"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})

    def halved(_, state):
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halved)
    some_steps(optimizer, params, 1)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert calls == ["pre", "post", "state pre", "load post"]
    assert state["more"] == 1 and optimizer.param_groups[0]["lr"] == 1e-3 / 2


def test_a_gradient_scaler_leaves_out_what_is_not_finite():
    params = two_parameters()
    optimizer, scaler = made(params, {}), torch.amp.GradScaler("cpu", init_scale=64.0)
    start = params[0].detach().clone()
    for factor, moves in ((1.0, True), (torch.inf, False)):
        optimizer.zero_grad()
        scaler.scale(factor * params[0].mv(torch.ones(5)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0], start) != moves
        start = params[0].detach().clone()


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    optimizer, calls = made(two_parameters(), {}), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return torch.tensor(7.0)

    with torch.no_grad():
        assert optimizer.step(closure) == 7
    assert calls == [True] and optimizer.step() is None


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
