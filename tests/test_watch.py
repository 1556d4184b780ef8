"""`watch`: γ and the angle of any optimizer's steps, against their definition in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from spheres import length, tangent, turn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_step import SphereSGD, watch

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, 0.02, weight_decay=0.5),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, 0.02, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, 0.3, momentum=0.9),
    "SphereSGD": lambda params: SphereSGD(params, 0.02),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda params: torch.optim.Muon(params, 0.02)
HOW = "plain", "clipping", "accumulation", "bf16", "GradScaler", "closure", "compiled"
CASES = [(name, "plain") for name in OPTIMIZERS] + [("SGD", how) for how in HOW[1:]]
CASES += [("AdamW, fused", "GradScaler"), ("SphereSGD", "closure")]


def network():
    torch.manual_seed(1)
    layers = nn.Linear(10, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4, bias=False)
    return nn.Sequential(*layers)


def loss_of(net, seed, bf16=False):
    x, y = torch.randn(8, 10, generator=torch.manual_seed(seed)), torch.arange(8) % 4
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return F.cross_entropy(net(x), y)


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors]).numpy()


def defined(theta, g, after):
    return [(length(theta) * length(tangent(theta, g))).item(), turn(theta, after).item()]


def one_step(net, optimizer, seed, how, scaler=None):
    """A step of the training `how`, and the gradients that it got, unscaled."""
    got = []

    def backward():
        optimizer.zero_grad()
        loss = loss_of(net, seed, how == "bf16")
        scaler.scale(loss).backward() if scaler else loss.backward()
        if how == "accumulation":
            loss_of(net, seed + 100).backward()
        if how == "clipping":
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scale = scaler.get_scale() if scaler else 1.0
        got.append([p.grad / scale for p in (net[0].weight, net[3].weight)])
        return loss

    if how == "closure":
        optimizer.step(backward)
        return got[0]
    backward()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    return got[0]


@pytest.mark.parametrize("name, how", CASES)
def test_gamma_and_angle_are_those_of_the_definition(name, how):
    net, scaler = network(), None
    if how == "GradScaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = [net[0].weight, net[3].weight]
    optimizer = OPTIMIZERS[name]([{"params": [p]} for p in weights])
    meter, expected = watch(optimizer), []
    if how == "compiled":
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        before = [p.detach().clone() for p in weights]
        g = one_step(net, optimizer, seed, how, scaler)
        cases = [(before, g, weights)]
        cases += [([x], [y], [z]) for x, y, z in zip(before, g, weights, strict=True)]
        expected.append([defined(*map(flat, case)) for case in cases])
        assert meter.last.T.tolist() == [pytest.approx(x, rel=1e-5) for x in expected[-1]]
    joint, *each = torch.tensor(expected).mean(0).tolist()
    row = meter.row()
    assert row == dict(step=3, grad_norm=pytest.approx(joint[0]), angle=pytest.approx(joint[1]))
    assert [[x["grad_norm"], x["angle"]] for x in meter.layers] == [pytest.approx(x) for x in each]
    assert meter.row() == dict(step=3) and meter.last is not None  # nothing since


def test_without_a_gradient_nothing_is_measured():
    """The tensor is nan in `last`; so is all where no tensor has one, and the step does not count."""
    net = network()
    weights = [net[0].weight, net[3].weight]
    optimizer = torch.optim.SGD(weights, 0.1)
    meter = watch(optimizer)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert meter.last.isnan().tolist() == 2 * [[False, False, True]]
    weights[0].grad = None
    optimizer.step()
    assert meter.last.isnan().all() and meter.row()["step"] == 1


def test_a_closure_that_is_called_again_counts_with_its_first_gradient():
    net = network()
    weights = [net[0].weight, net[3].weight]
    optimizer = torch.optim.LBFGS(net.parameters(), 0.1, max_iter=4)
    meter, before = watch(SimpleNamespace(optimizer=optimizer)), flat(weights)  # as wrapped
    g = flat(one_step(net, optimizer, 0, "closure"))
    gamma, angle = defined(before, g, flat(weights))
    assert meter.row() == dict(step=1, grad_norm=pytest.approx(gamma), angle=pytest.approx(angle))


def test_what_has_no_gradient_is_frozen_or_zero_and_steps_that_a_scaler_skips():
    net = network()
    net[3].requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, fused=True)
    meter, scaler = watch(optimizer, net.named_parameters()), torch.amp.GradScaler("cpu")
    for seed in range(3):
        before = [p.detach().clone() for p in net[:2].parameters()]
        scaler.scale(loss_of(net, seed)).backward()
        if seed == 1:
            net[0].weight.grad.fill_(torch.inf)
        g = flat(p.grad / scaler.get_scale() for p in net[:2].parameters())
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        if seed != 1:
            expected = defined(flat(before), g, flat(net[:2].parameters()))
            assert meter.last[:, 0].tolist() == pytest.approx(expected)
    assert meter.row()["step"] == 2
    assert [x["layer"] for x in meter.layers] == [name for name, _ in net.named_parameters()]
    assert meter.layers[-1] == {"layer": "3.weight"}


class Waits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "waits for the device"
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_and_hooks_go_away():
    net = network()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    meter = watch(optimizer)
    loss_of(net, 0).backward()
    with Waits():
        optimizer.step()
    for hook in meter.hooks:
        hook.remove()
    optimizer.step()
    assert meter.row()["step"] == 1


class Wide(torch.optim.SGD):
    """Once torch has hooked its parent, too, a step of it is two for the hooks."""

    def step(self, first, scale, *, power=1):
        assert (scale, power) == (0.5, 2)
        return super().step(first if callable(first) else None)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_step_of_its_parent_is_one_and_keeps_its_arguments(with_closure):
    net = network()
    weights = [net[0].weight, net[3].weight]
    torch.optim.SGD(weights, 0.3), Wide(weights, 0.3)  # hook both classes
    optimizer = Wide(weights, 0.3)
    meter = watch(optimizer)
    for _ in range(2):
        before = flat(weights)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        first = closure if with_closure else closure().item()
        optimizer.step(first, 0.5, power=2)
        g = flat(p.grad for p in weights)
        assert meter.last[:, 0].tolist() == pytest.approx(defined(before, g, flat(weights)))
    assert meter.row()["step"] == 2


@pytest.mark.parametrize(
    "params", [None, [], torch.ones(3, 3), network(), [torch.ones(2)], {"weight": None}]
)
def test_what_is_no_list_of_the_tensors_is_refused(params):
    """The rows of a tensor, too, and other things of which nothing has ever a gradient."""
    with pytest.raises(ValueError, match="params: it takes tensors of the optimizer"):
        watch(torch.optim.SGD([torch.ones(3)], 0.1), params)
