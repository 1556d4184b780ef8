"""The step against float64 references written another way: autograd through the normalization, and invariants."""

import io
import math
import os
import pickle
import random
from copy import deepcopy

import pytest
import torch

import sphere_step
from sphere_step import INTERPRET, SphereSGD

ROUNDING = 1e-12  # relative, float64

if INTERPRET:
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):  # rounded once
        exact = x.data.astype("float64") * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def call(self, *args, **kwargs):  # without patching the language anew, half of the time
        ours = self.fn.__module__ == sphere_step.__name__
        return self.rewrite()(*args, **kwargs) if ours else original_call(self, *args, **kwargs)

    InterpreterBuilder.create_fma = create_fma
    original_call = InterpretedFunction.__call__
    if hasattr(InterpretedFunction, "rewrite"):
        InterpretedFunction.__call__ = call


def invariant_loss(theta):
    """Some scale-invariant function of the concatenation of two tensors, in float64."""
    x = torch.cat([t.flatten() for t in theta])
    u = x / x.norm()
    return (torch.linspace(-1, 3, len(u), dtype=u.dtype) * u**2).sum() + (
        u[:-1] * u[1:]
    ).sin().sum()


def other_loss(theta):
    """A function that is not scale invariant."""
    x = torch.cat([t.flatten() for t in theta])
    return (x**2 * torch.linspace(0.1, 1, len(x), dtype=x.dtype)).sum() + x.cos().sum()


def two_tensors(dtype=torch.float64):
    return [
        torch.randn(4, 3, 3, dtype=dtype, requires_grad=True),
        torch.randn(7, dtype=dtype, requires_grad=True),
    ]


def spheres_of(theta, sphere):
    """The tensors cut into what each sphere holds, as flat vectors."""
    if sphere == "group":
        return [torch.cat([t.flatten() for t in theta])]
    return (
        [t.flatten() for t in theta]
        if sphere == "tensor"
        else [row.flatten() for t in theta for row in t]
    )


def radii_of(optimizer):
    """Of the tensors, one after the other; a joint sphere's once for each."""
    return torch.cat([state["radius"] for state in optimizer.state.values()])


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("elr", [1e-6, 0.03, 10.0])
def test_step_on_an_invariant_loss_is_normalized_gradient_descent(sphere, elr):
    theta = two_tensors()
    theta[1] = torch.randn(
        7, 2, dtype=torch.float64, requires_grad=True
    )  # rows of one element have no tangent
    optimizer = SphereSGD(theta, lr=elr, sphere=sphere)
    loss = {"group": invariant_loss, "tensor": lambda t: sum(invariant_loss([x]) for x in t)}.get(
        sphere, lambda t: sum(invariant_loss([r]) for x in t for r in x)
    )
    before = [t.detach().clone().requires_grad_() for t in theta]
    gradient = torch.autograd.grad(loss(before), before)
    loss(theta).backward()
    optimizer.step()
    cut = zip(*(spheres_of(t, sphere) for t in (before, gradient, theta)), strict=True)
    for x, g, new in cut:
        rho = x.norm()
        v = x - elr * rho**2 * g
        assert close(new, rho * v / v.norm(), ROUNDING)


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_on_any_loss_follow_the_projected_formula_and_report_gamma_phi_radial(
    sphere, momentum
):
    theta, elr = two_tensors(), 0.01
    optimizer = SphereSGD(theta, lr=elr, sphere=sphere, momentum=momentum)
    x = [v.detach().clone() for v in spheres_of(theta, sphere)]
    rho, m = [v.norm() for v in x], [torch.zeros_like(v) for v in x]
    for _ in range(4):
        optimizer.zero_grad()
        other_loss(theta).backward()
        g = spheres_of([t.grad for t in theta], sphere)
        optimizer.step()
        stats = optimizer.stats()
        for i in range(len(x)):
            n = x[i] / x[i].norm()
            tangent = torch.eye(len(n), dtype=n.dtype) - torch.outer(n, n)
            m[i] = momentum * tangent @ m[i] + tangent @ g[i]
            v = x[i] - elr * rho[i] ** 2 * m[i]
            cosine = (x[i] @ v / x[i].norm() / v.norm()).clamp(max=1)
            gamma = (rho[i] * (tangent @ g[i]).norm()).item()
            scale = (
                rho[i] * g[i].norm()
            ).item()  # a row of one element has no tangent: its γ is 0 up to rounding
            assert math.isclose(stats["grad_norm"][i], gamma, rel_tol=1e-9, abs_tol=1e-7 * scale)
            assert math.isclose(
                stats["angle"][i], cosine.acos(), rel_tol=1e-6, abs_tol=1e-7 * (1 + elr * scale)
            )
            assert math.isclose(
                stats["radial"][i], n @ g[i] / g[i].norm(), rel_tol=1e-9, abs_tol=1e-12
            )
            x[i] = rho[i] * v / v.norm()
        for new, reference in zip(spheres_of(theta, sphere), x, strict=True):
            assert close(new, reference, 1e-11)


def test_layer_stats_are_each_tensors_norm_individual_elr_gradient_norm_and_turn():
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.02, momentum=0.5)
    for _ in range(3):
        before = [t.detach().clone() for t in theta]
        optimizer.zero_grad()
        invariant_loss(theta).backward()
        optimizer.step()
        layers, rho2 = optimizer.layer_stats(), sum(t.norm() ** 2 for t in before)
        for i, (old, new) in enumerate(zip(before, theta, strict=True)):
            g, n = theta[i].grad.flatten(), old.flatten() / old.norm()
            assert math.isclose(layers["norm"][i], old.norm(), rel_tol=ROUNDING)
            assert math.isclose(layers["elr"][i], 0.02 * rho2 / old.norm() ** 2, rel_tol=1e-10)
            assert math.isclose(
                layers["grad_norm"][i], old.norm() * (g - n * (n @ g)).norm(), rel_tol=1e-9
            )
            cosine = torch.nn.functional.cosine_similarity(
                old.flatten(), new.detach().flatten(), dim=0
            )
            assert math.isclose(layers["angle"][i], cosine.clamp(max=1).acos(), rel_tol=1e-5)


def test_layer_stats_of_rows_gather_the_rows():
    theta = [torch.randn(5, 6, requires_grad=True)]
    optimizer = SphereSGD(theta, lr=0.1, sphere="row")
    theta[0].grad = torch.randn(5, 6)
    norm = theta[0].norm().item()
    optimizer.step()
    stats, layers = optimizer.stats(), optimizer.layer_stats()
    assert math.isclose(layers["norm"][0], norm, rel_tol=1e-6)
    assert math.isclose(layers["elr"][0], 0.1, rel_tol=1e-6)
    assert math.isclose(layers["grad_norm"][0], stats["grad_norm"].norm(), rel_tol=1e-6)
    assert math.isclose(layers["angle"][0], stats["angle"].mean(), rel_tol=1e-6)


@pytest.mark.parametrize(
    "sphere, elr, steps",
    [
        ("group", 1e-3, 10_000),
        ("group", 1e3, 1000),
        ("tensor", 1.0, 1000),
        ("row", 1e-6, 500),
        ("row", 1e3, 500),
    ],
)
def test_the_norm_is_the_radius_after_ten_thousand_float32_steps(sphere, elr, steps):
    theta = [torch.randn(3, 4, 3, 3, requires_grad=True), torch.randn(5, 9, requires_grad=True)]
    radii = [x.detach().double().norm() for x in spheres_of(theta, sphere)]
    optimizer = SphereSGD(theta, lr=elr, sphere=sphere)
    for _ in range(steps):
        for t in theta:
            t.grad = torch.randn_like(t)
        optimizer.step()
    for x, radius in zip(spheres_of(theta, sphere), radii, strict=True):
        assert abs(x.double().norm() / radius - 1) < 1e-6


def test_a_large_tensor_keeps_its_norm_too():
    theta = torch.randn(
        700, 1000, requires_grad=True
    )  # more than one piece of the float32 dot product
    radius = theta.detach().double().norm()
    optimizer = SphereSGD([theta], lr=1e-3)
    for _ in range(2 if INTERPRET else 50):
        theta.grad = torch.randn_like(theta)
        optimizer.step()
    assert abs(theta.double().norm() / radius - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_step_in_float32_and_round_once(dtype):
    theta = torch.randn(40, 30).to(dtype).requires_grad_()
    old, g = theta.detach().double(), torch.randn(40, 30)
    optimizer = SphereSGD([theta], lr=0.05)
    theta.grad = g.to(dtype)
    optimizer.step()
    g, rho = theta.grad.double(), old.norm()
    v = old - 0.05 * rho**2 * (g - (old * g).sum() / rho**2 * old)
    reference = rho * v / v.norm()
    unit = torch.finfo(dtype).eps * reference.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((theta.double() - reference).abs() <= unit).all()


def test_zero_gradient_leaves_the_weights_bit_for_bit():
    theta = [torch.randn(6, 5, requires_grad=True), torch.randn(3, requires_grad=True)]
    optimizer = SphereSGD([{"params": theta[:1]}, {"params": theta[1:], "sphere": "row"}], lr=0.3)
    before = [t.detach().clone() for t in theta]
    for t in theta:
        t.grad = torch.zeros_like(t)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))
    assert (optimizer.stats()["grad_norm"] == 0).all() and (optimizer.stats()["angle"] == 0).all()


def test_purely_radial_gradient_leaves_the_weights_to_rounding():
    theta = torch.randn(50, 40, requires_grad=True)
    before = theta.detach().clone()
    optimizer = SphereSGD([theta], lr=1e-3)
    theta.grad = 3 * before
    optimizer.step()
    assert close(theta, before, 1e-5)
    assert math.isclose(optimizer.stats()["radial"][0], 1, rel_tol=1e-6)


@pytest.mark.parametrize("product", [1e-20, 1e-8, 1.0, 1e5, 1e10])
def test_any_size_of_step_stays_finite_and_on_the_sphere(product):
    theta = torch.randn(100, 10, requires_grad=True)
    radius, g = theta.detach().norm(), torch.randn(100, 10)
    optimizer = SphereSGD([theta], lr=product / (radius * g.norm()).item())
    theta.grad = g
    optimizer.step()
    assert abs(theta.norm() / radius - 1) < 1e-6
    assert math.isclose(optimizer.stats()["angle"][0], math.atan(product), rel_tol=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sphere_with_a_non_finite_gradient_stays_and_says_so_while_the_others_step(bad, momentum):
    theta = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    optimizer = SphereSGD(
        [{"params": theta[:2], "sphere": "tensor"}, {"params": theta[2:], "sphere": "row"}],
        0.1,
        momentum=momentum,
    )
    before = [t.detach().clone() for t in theta]
    for t in theta:
        t.grad = torch.randn_like(t)
    theta[0].grad[1, 2] = theta[2].grad[3, 0] = bad
    optimizer.step()
    assert torch.equal(theta[0], before[0]) and not torch.equal(theta[1], before[1])
    assert torch.equal(theta[2][3], before[2][3]) and not torch.equal(theta[2][:3], before[2][:3])
    assert optimizer.stats()["grad_norm"].isnan().tolist() == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    assert all(t.isfinite().all() for t in theta)


def test_a_tensor_without_gradient_is_left_out_of_its_sphere():
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.1)
    alone = theta[0].detach().clone().requires_grad_()
    reference = SphereSGD([alone], lr=0.1)
    theta[0].grad = torch.randn_like(theta[0])
    alone.grad = theta[0].grad.clone()
    before = theta[1].detach().clone()
    optimizer.step(), reference.step()
    assert torch.equal(theta[1], before)
    assert close(theta[0], alone, ROUNDING)
    assert optimizer.layer_stats()["norm"].isnan().tolist() == [False, True]


def test_without_a_sphere_it_is_plain_sgd():
    a, b = torch.randn(5, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    c, d = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    ours = SphereSGD([a, b], lr=0.1, sphere=None, momentum=0.9)
    theirs = torch.optim.SGD([c, d], lr=0.1, momentum=0.9)
    for _ in range(3):
        for p, q in ((a, c), (b, d)):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
    assert close(a, c, 1e-6) and close(b, d, 1e-6)
    for optimizer in (ours, SphereSGD([a], lr=0.1)):
        with pytest.raises(RuntimeError, match="no statistics before the first step"):
            optimizer.stats()
        with pytest.raises(RuntimeError, match="no statistics before the first step"):
            optimizer.layer_stats()


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
def test_given_radius_rescales_at_once_and_normalize_returns_to_it(sphere):
    """Directions stay; in other memory layouts and without dimensions, too."""
    images = torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last)
    theta = [*two_tensors(torch.float32), images, torch.tensor(-0.3), torch.randn(3).bfloat16()]
    theta = [t.detach().requires_grad_() for t in theta]
    rows = sphere == "row"  # of which a number has none: it is one itself
    cut = [t.detach().reshape(1) if rows and not t.dim() else t.detach() for t in theta]
    before = [x.double() for x in spheres_of(cut, sphere)]
    optimizer = SphereSGD(theta, lr=0.1, sphere=sphere, radius=2.5, backend="torch")
    for scale in (1.0, 3.0):
        with torch.no_grad():
            for t in theta:
                t.mul_(scale)
        optimizer.normalize()
        for old, new in zip(before, spheres_of(cut, sphere), strict=True):
            # bfloat16 is rounded five times, each by up to 2^-8
            assert torch.allclose(new.double(), 2.5 * old / old.norm(), rtol=2e-2, atol=1e-6)
            assert math.isclose(new.double().norm(), 2.5, rel_tol=1e-2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    theta = two_tensors()
    SphereSGD(theta, lr=0.1, sphere=sphere, radius=2.5)
    for x in spheres_of(theta, sphere):
        assert math.isclose(x.detach().norm(), 2.5, rel_tol=ROUNDING)


def test_measure_reports_what_step_would_without_moving_anything():
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.1, momentum=0.9)
    other_loss(theta).backward()
    optimizer.step()
    before, state = (
        [t.detach().clone() for t in theta],
        {k: v["momentum_buffer"].clone() for k, v in optimizer.state.items()},
    )
    optimizer.observe()
    measured = optimizer.stats()
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))
    assert all(torch.equal(optimizer.state[k]["momentum_buffer"], m) for k, m in state.items())
    optimizer.step()
    for name, value in optimizer.stats().items():
        assert torch.allclose(measured[name], value, rtol=1e-12)  # the radius, and the norm met


def test_state_dict_round_trips_radii_and_momentum():
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.1, momentum=0.9)
    other_loss(theta).backward()
    optimizer.step()
    copy = [
        (2 * t.detach()).requires_grad_() for t in theta
    ]  # twice the radius, until the state is loaded
    other = SphereSGD(copy, lr=0.5)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for a, b in zip(copy, theta, strict=True):
            a.copy_(b)
            a.grad = b.grad.clone()
    optimizer.step(), other.step()
    assert all(torch.equal(a, b) for a, b in zip(copy, theta, strict=True))


def test_schedulers_drive_the_elr_as_number_and_as_tensor():
    for lr in (0.1, torch.tensor(0.1)):
        theta = two_tensors()
        optimizer = SphereSGD(theta, lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
        for elr in (0.1, 0.01):
            theta[0].grad, theta[1].grad = torch.randn_like(theta[0]), torch.randn_like(theta[1])
            optimizer.step()
            stats = optimizer.stats()
            assert math.isclose(stats["angle"][0].tan(), elr * stats["grad_norm"][0], rel_tol=1e-6)
            scheduler.step()


def test_any_memory_layout_gives_the_same_step():
    base = torch.randn(8, 6, 4, 4)
    g = torch.randn(8, 6, 4, 4)
    layouts = [
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ]
    results = []
    for layout in layouts:
        for gradient_layout in layouts:
            theta = layout(base).requires_grad_()
            optimizer = SphereSGD([theta], lr=0.01)
            theta.grad = gradient_layout(g)
            optimizer.step()
            results.append(theta.detach().clone())
    assert all(close(x, results[0], 1e-6) for x in results)


def test_a_parameter_with_holes_in_memory_is_refused_by_index_and_shape():
    holes = torch.randn(2, 3, 2)[..., 0].requires_grad_()
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(2, 3\) has holes"):
        SphereSGD([torch.randn(3, requires_grad=True), holes], lr=0.1)
    scattered = torch.randn(4, 5).t().requires_grad_()
    with pytest.raises(ValueError, match="scattered rows"):
        SphereSGD([scattered], lr=0.1, sphere="row")
    SphereSGD([scattered], lr=0.1)


def test_empty_and_scalar_tensors_are_no_trouble():
    for sphere in ("group", "tensor", "row"):
        theta = [
            torch.randn(0, 3),
            torch.randn(()),
            torch.randn(1),
            torch.randn(4, 0),
            torch.randn(6, 2),
        ]
        before = [t.clone() for t in theta]
        optimizer = SphereSGD([t.requires_grad_() for t in theta], lr=0.1, sphere=sphere)
        for t in theta:
            t.grad = torch.randn_like(t)
        optimizer.step(), optimizer.stats(), optimizer.layer_stats()
        assert all(t.isfinite().all() for t in theta) and not torch.equal(theta[4], before[4])
        if sphere != "group":  # a sphere of one number is two points: there is no tangent
            assert torch.equal(theta[1], before[1]) and torch.equal(theta[2], before[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": 0.1, "sphere": "ball"}, "sphere='ball'"),
        ({"lr": 0.1, "radius": -1.0}, "radius=-1.0"),
        ({"lr": 0.1, "radius": 1.0, "sphere": None}, "radius=1.0"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SphereSGD(two_tensors(), **options)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    theta = torch.randn(5, requires_grad=True)
    optimizer = SphereSGD([theta], lr=0.1)
    for bad in ({"momentum": 2.0}, {"params": [torch.zeros(3, requires_grad=True)]}):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": [torch.randn(3, requires_grad=True)]} | bad)
    theta.grad = torch.randn(5)
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and len(optimizer.stats()["elr"]) == 1


def test_a_sphere_of_norm_zero_and_sparse_gradients_are_refused():
    for sphere in ("group", "tensor"):
        with pytest.raises(ValueError, match="norm zero"):
            SphereSGD([torch.zeros(3, requires_grad=True)], lr=0.1, sphere=sphere)
    with pytest.raises(ValueError, match="the sphere of tensor 0 has norm zero"):
        SphereSGD(
            [torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)], lr=0.1, sphere="row"
        )
    with pytest.raises(ValueError, match="not finite"):
        SphereSGD([torch.tensor([1.0, math.nan], requires_grad=True)], lr=0.1)
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = SphereSGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_measure_is_a_meter_of_weights_that_something_else_moves():
    """γ at the norm that the weights have, however far from where they were when it was made."""
    theta = two_tensors()
    meter = SphereSGD(theta, lr=0)
    with torch.no_grad():
        for t in theta:
            t.mul_(3.7)
    before = [t.detach().clone() for t in theta]
    other_loss(theta).backward()
    meter.observe()
    stats, layers = meter.stats(), meter.layer_stats()
    x, g = (torch.cat([t.flatten() for t in ts]) for ts in (before, [t.grad for t in theta]))
    across = g - x * (x @ g) / (x @ x)
    assert stats["radius"].item() == pytest.approx(x.norm().item(), rel=1e-12)
    assert stats["grad_norm"].item() == pytest.approx((x.norm() * across.norm()).item(), rel=1e-10)
    assert layers["norm"].tolist() == pytest.approx([t.norm().item() for t in before], rel=1e-12)
    meter.step()  # of length 0
    assert all(torch.equal(t, old) for t, old in zip(theta, before, strict=True))


# ------------------------------------------------------------------------------------ the angle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.9] if INTERPRET else [0.0, 0.9])
@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
def test_each_sphere_turns_by_the_given_angle(sphere, momentum, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    theta = [torch.randn(4, 3, 3, dtype=dtype), torch.randn(2, 7, dtype=dtype)]
    theta = [t.requires_grad_() for t in theta]
    for phi in (1e-3, 0.05, 1.2):
        optimizer = SphereSGD(theta, lr=phi, sphere=sphere, momentum=momentum, angle=True)
        for _ in range(2):
            before = [x.detach().double().clone() for x in spheres_of(theta, sphere)]
            optimizer.zero_grad()
            sum(invariant_loss([x]) for x in spheres_of(theta, sphere)).backward()
            optimizer.step()
            after = [x.detach().double() for x in spheres_of(theta, sphere)]
            for x, y in zip(before, after, strict=True):
                x, y = x / x.norm(), y / y.norm()
                turned = 2 * math.atan2((x - y).norm(), (x + y).norm())
                assert abs(turned - phi) < tolerance
            assert optimizer.stats()["angle"].tolist() == pytest.approx(
                [phi] * len(after), rel=1e-12
            )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_angle_is_the_step_at_the_elr_that_it_implies_whatever_the_scale_of_the_loss(momentum):
    first, scaled = two_tensors(), None
    scaled, plain = ([t.detach().clone().requires_grad_() for t in first] for _ in range(2))
    one = SphereSGD(first, lr=0.1, angle=True, momentum=momentum)
    two = SphereSGD(scaled, lr=0.1, angle=True, momentum=momentum)
    three = SphereSGD(plain, lr=1.0, momentum=momentum)
    for _ in range(4):
        for theta, factor in ((first, 1.0), (scaled, 1e4), (plain, 1.0)):
            for t in theta:
                t.grad = None
            (factor * other_loss(theta)).backward()
        one.step(), two.step()
        elr = one.stats()["elr"].item()
        assert two.stats()["elr"].item() == pytest.approx(elr / 1e4, rel=1e-9)
        if momentum == 0:
            gamma = one.stats()["grad_norm"].item()
            assert elr == pytest.approx(math.tan(0.1) / gamma, rel=1e-12)
        three.param_groups[0]["lr"] = elr
        three.step()
        for a, b, c in zip(first, scaled, plain, strict=True):
            assert close(b, a, 1e-10) and close(c, a, 1e-10)


def test_an_angle_of_a_zero_or_radial_gradient_stays_and_schedulers_work_on_it():
    theta = [torch.randn(6, 5, requires_grad=True), torch.randn(1, requires_grad=True)]
    optimizer = SphereSGD(theta, lr=0.3, sphere="tensor", angle=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = [t.detach().clone() for t in theta]
    theta[0].grad, theta[1].grad = torch.zeros(6, 5), torch.randn(1)  # one number has no tangent
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))
    assert optimizer.stats()["elr"].tolist() == [0, 0]
    scheduler.step()
    theta[0].grad = torch.randn(6, 5)
    optimizer.step()
    assert optimizer.stats()["angle"].tolist() == pytest.approx([0.15, 0], abs=1e-12)


def test_what_is_on_no_sphere_follows_the_angle_at_the_learning_rate_that_it_implies():
    theta, rest = torch.randn(6, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    groups = [{"params": [theta]}, {"params": [rest], "sphere": None}]
    optimizer = SphereSGD(groups, lr=0.2, angle=True)
    theta.grad, rest.grad, before = torch.randn(6, 5), torch.randn(4), rest.detach().clone()
    optimizer.step()
    stats = optimizer.stats()
    lr = (stats["elr"] * stats["radius"] ** 2).item()
    assert close(rest, before - lr * rest.grad, 1e-6)
    with pytest.raises(ValueError, match="lr=1.6"):
        SphereSGD([theta], lr=1.6, angle=True)


def test_statistics_of_several_steps_are_those_of_each():
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.1, momentum=0.5)
    kept, stats, layers = [], [], []
    for _ in range(3):
        optimizer.zero_grad()
        other_loss(theta).backward()
        optimizer.step()
        kept.append(optimizer.last)
        stats.append(optimizer.stats())
        layers.append(optimizer.layer_stats())
    kept = [torch.stack(x) for x in zip(*kept, strict=True)]
    for name, value in optimizer.stats(kept).items():
        assert value.shape == (3, 1) and torch.equal(value, torch.stack([s[name] for s in stats]))
    for name, value in optimizer.layer_stats(kept).items():
        assert torch.allclose(value, torch.stack([s[name] for s in layers]), rtol=1e-12)


# ------------------------------------------------- what training code does to optimizers and networks


def reference_step(x, g, m, radius, lr, beta, angle=False):
    """One step on one sphere, in float64, by explicit projections; the new θ and m."""
    n = x / x.norm()
    m = beta * (m - n * (n @ m)) + g - n * (n @ g)
    tan = math.tan(lr) if angle else lr * radius**2 * m.norm() / x.norm()
    v = x - tan * x.norm() * m / m.norm()
    return radius * v / v.norm(), m


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
def test_another_memory_format_in_the_middle_of_training_changes_nothing(sphere):
    """Of the parameter, the gradient, and the state that is loaded into a network in the other."""
    start, gradients = torch.randn(4, 3, 3, 2), [torch.randn(4, 3, 3, 2) for _ in range(4)]
    results = []
    for change in (False, True):
        p = torch.nn.Parameter(start.clone())
        optimizer = SphereSGD([p], lr=0.01, sphere=sphere, momentum=0.9)
        for i, g in enumerate(gradients):
            if change and i == 1:
                p.data = channels_last(p.data)
            if change and i == 2:
                saved = deepcopy(optimizer.state_dict())
                p = torch.nn.Parameter(p.detach().contiguous().clone())
                optimizer = SphereSGD([p], lr=0.01, sphere=sphere, momentum=0.9)
                optimizer.load_state_dict(saved)
            p.grad = channels_last(g) if i % 2 else g.clone()
            optimizer.step()
        results.append(p.detach())
    assert close(results[1], results[0], 1e-6)


def test_plain_groups_survive_another_memory_format_too():
    start, results = torch.randn(4, 3, 3, 2), []
    gradients = [torch.randn_like(start) for _ in range(3)]
    for change in (False, True):
        p = torch.nn.Parameter(start.clone())
        optimizer = SphereSGD([p], lr=0.1, sphere=None, momentum=0.9)
        for i, g in enumerate(gradients):
            if change and i == 1:
                p.data = channels_last(p.data)
            p.grad = g.clone()
            optimizer.step()
        results.append(p.detach())
    assert close(results[1], results[0], 1e-6)


def stepped(shapes, groups=1, **options):
    """An optimizer after a step, a group per tensor or one for all."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    given = [{"params": [p]} for p in params] if groups > 1 else params
    optimizer = SphereSGD(given, **{"lr": 0.1, "momentum": 0.9} | options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def everything(optimizer):
    """A copy of weights, state, options and statistics."""
    groups = [dict(group) for group in optimizer.param_groups]
    weights = [p.detach().clone() for group in groups for p in group.pop("params")]
    state = [dict(state) for state in optimizer.state.values()]
    return repr((groups, weights, deepcopy(state), optimizer.stats()))


def test_a_state_of_other_shapes_is_refused_and_nothing_changed():
    ours = stepped([(2, 2), (5, 3)], sphere="tensor")
    before = everything(ours)
    cases = [
        (stepped([(2, 2), (8, 3)], sphere="tensor"), r"parameter 1 of shape \(5, 3\).*\(8, 3\)"),
        (stepped([(2, 2), (12,)], sphere="tensor"), r"parameter 1 of shape \(5, 3\).*\(12,\)"),
        (stepped([(4, 2), (5, 3)], sphere="row"), r"parameter 0 of shape \(2, 2\).*\(4, 2\)"),
        (torch.optim.SGD([torch.ones(2, 2), torch.ones(5, 3)], lr=0.1), "sphere='missing'"),
        (stepped([(2, 2)]), "doesn't match the size"),
        (stepped([(2, 2), (5, 3)], groups=2), "different number of parameter groups"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(other.state_dict())
        assert everything(ours) == before
    longer = ours.state_dict()
    longer["state"] = {
        key: {**own, "radius": torch.ones(3)} for key, own in longer["state"].items()
    }
    with pytest.raises(ValueError, match="1 spheres, but 3 radii"):
        ours.load_state_dict(longer)
    assert everything(ours) == before
    for p in ours.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    ours.step()


def test_a_state_that_was_put_there_by_hand_is_not_read_beyond_its_end():
    optimizer = stepped([(5, 3)])
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    optimizer.state[p]["momentum_buffer"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"shape \(1,\) for a parameter of shape \(5, 3\)"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("sphere", ["group", "tensor", "row", None])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_tensor_given_twice_is_refused_by_number(sphere):
    a, b = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(3, 2))
    for twice in ([a, b, a], [a, b, torch.nn.Parameter(a.detach())]):
        with pytest.raises(ValueError, match=r"parameter 2 of shape \(3, 2\) is parameter 0 again"):
            SphereSGD(twice, lr=0.1, sphere=sphere)
    with pytest.raises(ValueError):
        SphereSGD([{"params": [a, b]}, {"params": [a]}], lr=0.1, sphere=sphere)
    tied = torch.nn.Parameter(a.detach()[:2])
    with pytest.raises(ValueError, match=r"parameter 2 of shape \(2, 2\) is parameter 0 again"):
        SphereSGD([{"params": [a, b]}, {"params": [tied]}], lr=0.1, sphere=sphere)


@pytest.mark.parametrize("lr", [math.pi / 2, 2.0, -0.1, math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_an_angle_that_a_scheduler_made_too_large_is_an_error_and_nothing_moves(lr, kind):
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.1, angle=True)
    other_loss(theta).backward()
    optimizer.param_groups[0]["lr"] = kind(lr)
    before = [t.detach().clone() for t in theta]
    with pytest.raises(ValueError, match="lr=.*an angle below π/2"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "options", [dict(weight_decay=0.3), dict(weight_decay=0.3, lr=0.0), {}], ids=str
)
def test_options_of_torchs_sgd_hold_in_a_group_on_no_sphere(options, momentum):
    ours = [torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    sphere = torch.randn(5, requires_grad=True)
    groups = [{"params": [sphere]}, {"params": ours, "sphere": None, "lr": 0.1, **options}]
    a = SphereSGD(groups, lr=0.1, momentum=momentum)
    b = torch.optim.SGD(theirs, **{"lr": 0.1, "momentum": momentum, **options})
    for step in range(4):
        sphere.grad = torch.randn(5)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if i == 1 and step == 0 else torch.randn_like(p)  # one starts later
            q.grad = None if p.grad is None else p.grad.clone()
        a.step()
        b.step()
        assert all(close(p, q, 1e-6) for p, q in zip(ours, theirs, strict=True))


def test_options_that_no_group_has_are_refused_and_weight_decay_leaves_a_sphere_alone():
    p = torch.randn(5, requires_grad=True)
    given = [{"betas": (0.9, 0.99)}, {"nesterov": True}, {"sphere": None, "weight_decy": 0.1}]
    given += [{"sphere": None, name: True} for name in ("dampening", "nesterov", "maximize")]
    for group in given:
        with pytest.raises(ValueError, match="there is no such option"):
            SphereSGD([{"params": [p], **group}], lr=0.1)
    results = []
    for decay in ({}, {"weight_decay": 0.5}):
        q = torch.nn.Parameter(torch.arange(1.0, 6.0))
        q.grad = torch.ones(5)
        named = {"name": "first", "initial_lr": 0.1}
        SphereSGD([{"params": [q], **decay, **named}], lr=0.1).step()
        results.append(q.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("sphere", ["group", "row"])
@pytest.mark.parametrize("angle", [False, True])
def test_an_lr_that_became_nan_leaves_the_sphere_and_its_statistics_say_nan(sphere, angle):
    theta = torch.randn(4, 3, requires_grad=True)
    optimizer = SphereSGD([theta], lr=torch.tensor(0.1), sphere=sphere, angle=angle)
    theta.grad, before = torch.randn(4, 3), theta.detach().clone()
    optimizer.param_groups[0]["lr"].fill_(math.nan)
    optimizer.step()
    assert torch.equal(theta, before)
    assert all(optimizer.stats()[name].isnan().all() for name in ("elr", "angle", "grad_norm"))


@pytest.mark.parametrize("sphere", ["group", "row"])
def test_a_factor_that_does_not_fit_float32_leaves_the_sphere_and_its_statistics_say_nan(sphere):
    """An angle with a direction shorter than about 3e-39·ρ sin φ."""
    for scale, dtype in ((1e-40, torch.float32), (1e-50, torch.float64)):
        if INTERPRET and dtype == torch.float64:
            continue
        theta = torch.randn(2, 40, dtype=dtype, requires_grad=True)
        optimizer = SphereSGD([theta], lr=1.0, sphere=sphere, angle=True)
        theta.grad, before = scale * torch.randn(2, 40, dtype=dtype), theta.detach().clone()
        optimizer.step()
        assert torch.equal(theta, before)
        assert optimizer.stats()["elr"].isnan().all()


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e-35])
def test_gradients_whose_squares_float32_cannot_hold_turn_by_the_given_angle(scale):
    theta = torch.randn(5000, requires_grad=True)
    before = theta.detach().double()
    optimizer = SphereSGD([theta], lr=0.1, angle=True)
    theta.grad = scale * torch.randn(5000)
    optimizer.step()
    expected, _ = reference_step(
        before, theta.grad.double(), 0 * before, before.norm(), 0.1, 0, True
    )
    assert close(theta.double(), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [10, 10**3, 10**5, 10**7])
@pytest.mark.parametrize("angle", [False, True])
def test_a_nearly_radial_gradient_steps_as_in_float64(dtype, count, angle):
    """Its factor rounded: in float32 nothing is left of it, in half precision there is a direction."""
    many = 10**3 if INTERPRET else 10**5
    if count > many and (count == 10**7 and INTERPRET or angle or dtype == torch.float16):
        pytest.skip("takes long, and is tried with others")
    theta = torch.randn(count).to(dtype)
    x, factor = theta.double(), 2.0 if dtype == torch.float64 else 1.37
    g = (factor * theta).double()
    rest = (g - x * (x @ g) / (x @ x)).norm() / g.norm()
    lr = 0.1 if angle else 0.1 / (x.norm() * g.norm()).item()
    p = theta.requires_grad_()
    optimizer = SphereSGD([p], lr=lr, angle=angle)
    p.grad = g.to(dtype)
    optimizer.step()
    expected = x
    if rest > 1e-6:
        expected, _ = reference_step(x, g, 0 * x, x.norm(), lr, 0, angle)
    p = p.detach().double()
    unit = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    if dtype in (torch.bfloat16, torch.float16):
        assert ((p - expected).abs() <= 1.001 * unit + 3e-6 * x.norm() / count**0.5).all()
    else:
        assert close(p, expected, 1e-6)
        assert optimizer.stats()["angle"].item() == 0


# -------------------------------------------------------------- copies, compilers, odd groups, resizing


def saved_and_loaded(things):
    buffer = io.BytesIO()
    torch.save(things, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": deepcopy,
    "pickle": lambda things: pickle.loads(pickle.dumps(things)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_network_and_optimizer_goes_on_as_the_original(how, steps):
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    groups = [
        {"params": [net[0].weight], "sphere": "row"},
        {"params": [net[1].weight, net[1].bias]},
        {"params": [net[0].bias], "sphere": None, "weight_decay": 0.1},
    ]
    x, y = torch.randn(7, 5), torch.randn(7, 3)

    def train(net, optimizer):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()

    optimizer = SphereSGD(groups, lr=0.05, momentum=0.9)
    for _ in range(steps):
        train(net, optimizer)
    other_net, other = COPIES[how]((net, optimizer))
    assert other.backend == optimizer.backend
    with pytest.raises(RuntimeError, match="no statistics before the first step"):
        other.stats()
    for _ in range(2):
        train(net, optimizer)
        train(other_net, other)
    assert all(map(torch.equal, net.parameters(), other_net.parameters()))
    assert all(map(torch.equal, optimizer.stats().values(), other.stats().values()))


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not compiled")
@pytest.mark.parametrize("what", ["step", "function", "measure"])
def test_the_first_step_of_all_may_be_a_compiled_one(what):
    torch._dynamo.reset()
    nets = [torch.nn.Linear(5, 4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, optimizers = torch.randn(3, 5), []
    for net in nets:
        groups = [{"params": [net.weight]}, {"params": [net.bias], "sphere": None}]
        optimizers.append(SphereSGD(groups, lr=0.1, momentum=0.9))

    def step(net, optimizer):
        net(x).square().sum().backward()
        if what == "measure":
            optimizer.observe()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    if what == "step":
        compiled_step = torch.compile(optimizers[0].step, backend="eager")

        def compiled(net, _):
            net(x).square().sum().backward()
            compiled_step()

    for _ in range(3):
        compiled(nets[0], optimizers[0])
        step(nets[1], optimizers[1])
        assert all(map(close, nets[0].parameters(), nets[1].parameters(), (1e-6, 1e-6)))
        for key, value in optimizers[1].stats().items():
            assert torch.allclose(optimizers[0].stats()[key], value, rtol=1e-4, atol=1e-6)
        for net in nets:
            net.zero_grad()


@pytest.mark.parametrize("sphere", ["group", "tensor", "row", None])
def test_groups_without_tensors_are_no_trouble(sphere):
    p = torch.randn(5, 2, requires_grad=True)
    empty = {"params": [], "sphere": sphere, "lr": 0.3}
    for groups in ([empty, {"params": [p]}], [{"params": [p]}, empty], [empty]):
        optimizer = SphereSGD([dict(group) for group in groups], lr=0.1, momentum=0.9)
        p.grad, before = torch.randn(5, 2), p.detach().clone()
        optimizer.step()
        optimizer.observe()
        optimizer.normalize()
        assert torch.equal(p, before) == (len(groups) == 1)
        if len(groups) > 1:
            assert optimizer.stats()["elr"].shape == (1,)
            assert optimizer.grams().shape == (1, 6)
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None}, "lr=None"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": torch.ones(2)}, "lr="),
        ({"lr": 0.1, "momentum": None}, "momentum=None"),
        ({"lr": 0.1, "momentum": "0.9"}, "momentum='0.9'"),
        ({"lr": 0.1, "radius": "1"}, "radius='1'"),
        ({"lr": 0.1, "sphere": ["row"]}, "sphere="),
    ],
)
def test_options_of_another_type_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SphereSGD(two_tensors(), **options)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(3) + 1j])
def test_tensors_that_are_not_real_floats_are_refused(bad):
    for sphere in ("group", None):
        with pytest.raises(
            ValueError, match=r"parameter 1 of shape \(3,\) is torch\.(int|complex)64"
        ):
            SphereSGD([torch.randn(2), bad], lr=0.1, sphere=sphere)


def test_an_empty_tensor_does_not_hide_a_sphere_of_norm_zero():
    for first in (torch.zeros(0), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="norm zero"):
            SphereSGD([first, torch.zeros(3)], lr=0.1)
    with pytest.raises(ValueError, match="the sphere of tensor 1 has norm zero"):
        SphereSGD([torch.zeros(0), torch.zeros(3)], lr=0.1, sphere="tensor")
    SphereSGD([torch.zeros(0), torch.ones(3)], lr=0.1)


def test_a_vocabulary_of_rows_is_told_in_few_words():
    optimizer = SphereSGD([torch.nn.Parameter(torch.randn(50257, 2))], lr=0.1, sphere="row")
    assert len(repr(optimizer)) < 1000


@pytest.mark.skipif(INTERPRET, reason="the interpreter takes a tile at a time")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum, piece", [(0.0, 1000), (0.9, 1000), (0.9, 5)])
def test_a_vocabulary_of_rows_steps_as_its_rows_do(momentum, piece, dtype, monkeypatch):
    """In several pieces, of one row, too; one row without a gradient, one with a bad one."""
    monkeypatch.setattr(sphere_step, "PIECE", piece)
    p = torch.nn.Parameter(torch.randn(301, 7).to(dtype))
    optimizer = SphereSGD([p], lr=0.03, sphere="row", momentum=momentum)
    m, radii = torch.zeros(301, 7, dtype=torch.float64), radii_of(optimizer)
    for _ in range(3):
        x, g = p.detach().double().clone(), torch.randn(301, 7).to(dtype)
        g[5], g[7, 3] = 0, math.nan
        p.grad = g
        optimizer.step()
        for i in (0, 1, 141, 142, 143, 299, 300):
            new, m[i] = reference_step(x[i], g[i].double(), m[i], radii[i], 0.03, momentum)
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 4e-3)
            assert close(p.detach()[i].double(), new, tolerance)
            if momentum:
                m[i] = optimizer.state[p]["momentum_buffer"][i].double()
        assert torch.equal(p.detach()[[5, 7]], x[[5, 7]].to(dtype))
    assert optimizer.stats()["angle"].isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_type_after_the_first_step_goes_on(kind, sphere):
    p = torch.nn.Parameter(torch.randn(6, 5))
    optimizer = SphereSGD([p], lr=0.02, sphere=sphere, momentum=0.9)
    p.grad = torch.randn(6, 5)
    optimizer.step()
    p.data, p.grad = p.data.to(kind), None
    p.grad = torch.randn(6, 5).to(kind)
    m = optimizer.state[p]["momentum_buffer"].to(kind)
    x, g, m = (spheres_of([t.detach().double().clone()], sphere) for t in (p, p.grad, m))
    radii = radii_of(optimizer)
    optimizer.step()
    assert p.dtype == optimizer.state[p]["momentum_buffer"].dtype == kind
    for i, new in enumerate(spheres_of([p.detach().double()], sphere)):
        expected, _ = reference_step(x[i], g[i], m[i], radii[i], 0.02, 0.9)
        assert close(new, expected, 1e-12 if kind == torch.float64 else torch.finfo(kind).eps)


def test_a_resized_parameter_and_a_foreign_gradient_are_refused():
    p = torch.nn.Parameter(torch.randn(6, 5))
    optimizer = SphereSGD([p], lr=0.02)
    p.grad = torch.randn(6, 5)
    optimizer.step()
    p.data = torch.randn(3, 2)
    with pytest.raises(ValueError, match="had 30 elements: make the optimizer anew"):
        optimizer.step()
    p = torch.nn.Parameter(torch.randn(6, 5))
    optimizer = SphereSGD([p], lr=0.02, momentum=0.9)
    p.grad = torch.randn(6, 5)
    p.data = torch.randn(3, 10)
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(6, 5\)"):
        optimizer.step()
    optimizer.state[p]["momentum_buffer"] = torch.zeros(3, 10)
    with pytest.raises(ValueError, match=r"gradient of shape \(6, 5\) for .* of shape \(3, 10\)"):
        optimizer.step()
    p.data = torch.randn(5, 6, 2)[..., 0].t()
    with pytest.raises(ValueError, match="holes in memory"):
        optimizer.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_momentum_that_a_scheduler_switches_on_and_groups_that_come_later(to_none):
    theta = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = SphereSGD(theta[:1], lr=0.1)
    x = [t.detach().clone().flatten() for t in theta]
    rho, m = [v.norm() for v in x], [0 * v for v in x]
    for step, beta in enumerate((0.0, 0.9, 0.0, 0.5)):
        if step == 2:
            optimizer.add_param_group({"params": theta[1:], "sphere": "tensor"})
        count = len(optimizer.param_groups)
        optimizer.zero_grad(set_to_none=to_none)
        for i, group in enumerate(optimizer.param_groups):
            group["momentum"] = beta
            theta[i].grad = torch.randn_like(theta[i])
        optimizer.step()
        for i in range(count):
            x[i], new = reference_step(x[i], theta[i].grad.flatten(), m[i], rho[i], 0.1, beta)
            m[i] = new if beta else m[i]
            assert close(theta[i].detach().flatten(), x[i], 1e-11)


def test_a_state_without_momentum_or_radii_is_loaded_before_the_first_step():
    """As torch's SGD writes it; the radii stay those that they were."""
    theta = two_tensors()
    optimizer = SphereSGD(theta, lr=0.1, momentum=0.9)
    state, norm = optimizer.state_dict(), radii_of(optimizer)[0].item()
    state["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(state)
    other_loss(theta).backward()
    optimizer.step()
    assert math.isclose(sum(t.detach().norm() ** 2 for t in theta), norm**2, rel_tol=1e-12)


def test_lr_tensors_of_one_element_are_numbers():
    results = []
    for lr in (
        0.1,
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float64),
    ):
        theta = [torch.arange(1.0, 6.0).requires_grad_(), torch.arange(2.0, 5.0).requires_grad_()]
        groups = [{"params": theta[:1]}, {"params": theta[1:], "sphere": None}]
        optimizer = SphereSGD(groups, lr=lr)
        for t in theta:
            t.grad = torch.ones_like(t)
        optimizer.step()
        results.append(theta)
    for theta in results[1:]:
        assert all(map(torch.equal, theta, results[0]))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_grams_are_the_scalar_products_of_each_line_of_the_last_step(momentum):
    shapes = {
        "group": [(4, 3), (5000,)],
        "row": [(3, 4), ()],
        "tensor": [(2, 2), (6,)],
        None: [(3,)],
    }
    groups = [
        {"params": [torch.randn(s).requires_grad_() for s in sizes], "sphere": sphere}
        for sphere, sizes in shapes.items()
    ]
    optimizer, kept = SphereSGD(groups, lr=1e-3, momentum=momentum), []
    for _ in range(2):
        lines = []
        for group in groups:
            for i, p in enumerate(group["params"]):
                p.grad = None if i == 1 and group["sphere"] == "tensor" else torch.randn_like(p)
                m = optimizer.state.get(p, {}).get("momentum_buffer", torch.zeros_like(p))
                vectors = [p.detach(), torch.zeros_like(p) if p.grad is None else p.grad, m]
                rows = group["sphere"] == "row" and p.dim() > 0
                vectors = [t.double().reshape(len(p) if rows else 1, -1).clone() for t in vectors]
                for x, g, m in zip(*vectors, strict=True) if group["sphere"] else ():
                    line = [x @ x, x @ g, g @ g, x @ m, g @ m, m @ m]
                    lines.append(torch.stack(line) * (p.grad is not None))
        optimizer.step()
        kept.append(optimizer.last)
        expected = torch.stack(lines).cpu()
        assert optimizer.grams().dtype == torch.float64
        assert torch.allclose(optimizer.grams(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(optimizer.grams()[expected[:, 0] == 0], expected[expected[:, 0] == 0])
    stacked = optimizer.grams([torch.stack(x) for x in zip(*kept, strict=True)])
    assert stacked.shape == (2, 2 + 4 + 2, 6)
    assert torch.allclose(stacked[1], optimizer.grams(), rtol=1e-12)


# ------------------------------------------------------------------- what is refused, and what is told


def parameter(*shape, scale=1.0, dtype=torch.float32):
    p = torch.nn.Parameter((scale * torch.randn(shape)).to(dtype))
    p.grad = torch.randn_like(p)
    return p


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy", "pickle"])
def test_groups_are_added_after_a_copy_or_a_state(how):
    optimizer = SphereSGD([parameter(4, 3)], lr=0.1, momentum=0.9)
    if how == "load_state_dict":
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    else:
        optimizer = COPIES[how](optimizer)
    optimizer.add_param_group({"params": [parameter(5)], "sphere": "tensor"})
    optimizer.step()
    assert len(optimizer.stats()["elr"]) == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_backward_pass_through_a_graph_from_before_the_step_is_an_error(momentum):
    p = parameter(4, 3)
    optimizer = SphereSGD([p], lr=0.1, momentum=momentum)
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


def test_what_others_flatten_is_refused():
    p, flat = parameter(4, 3), parameter(12)
    optimizer = SphereSGD([p], lr=0.1)
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed does
    with pytest.raises(ValueError, match=r"shape \(12,\) was put into param_groups"):
        optimizer.step()
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="flat parameter"):
        SphereSGD([flat], lr=0.1)


def test_spheres_that_stay_do_not_slow_down_what_is_on_none():
    """The median is of those that move."""
    theta, bias = parameter(5, 4), parameter(3)
    theta.grad[1:] = 0
    before = bias.detach().clone()
    groups = [{"params": [theta], "sphere": "row"}, {"params": [bias], "sphere": None}]
    optimizer = SphereSGD(groups, lr=0.1, angle=True)
    optimizer.step()
    lr = optimizer.stats()["elr"][0] * optimizer.stats()["radius"][0] ** 2
    assert close(bias, before - lr * bias.grad, 1e-5)


def test_nothing_moves_where_one_group_has_a_bad_lr():
    params = [parameter(4), parameter(5), parameter(6)]
    before = [p.detach().clone() for p in params]
    groups = [{"params": params[:1]}, {"params": params[1:2], "sphere": None}]
    optimizer = SphereSGD([*groups, {"params": params[2:]}], lr=0.1)
    for bad in (0, 1, 2):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = -1.0 if i == bad else 0.1
        with pytest.raises(ValueError, match="lr=-1.0"):
            optimizer.step()
        assert all(map(torch.equal, params, before))


def flat_views():
    flat = torch.randn(9)
    return [torch.nn.Parameter(flat[:6]), torch.nn.Parameter(flat[3:])]


@pytest.mark.parametrize(
    "params, options, message",
    [
        (lambda: [parameter(3)], dict(angle=0.05), "angle=0.05: it must be True or False"),
        (lambda: [parameter(3)], dict(angle=1), "angle=1: it must be True or False"),
        (lambda: [parameter(3)], dict(sphere=None, angle=True), "angle=True: there is no sphere"),
        (lambda: [parameter(3)], dict(weight_decay=-1.0), "weight_decay=-1.0"),
        (flat_views, {}, "parameter 1 .* is parameter 0 again, or a part of it"),
        (flat_views, dict(sphere=None), "parameter 1 .* is parameter 0 again, or a part of it"),
        (lambda: [parameter(9, scale=1e-22)], {}, "too small or too large"),
        (lambda: [parameter(9, scale=1e30)], {}, "too small or too large"),
        (lambda: [parameter(4, dtype=torch.float16)], dict(radius=1e6), "radius=1000000.0: .*hold"),
        (lambda: [torch.nn.Parameter(torch.empty(3, device="meta"))], {}, "float32 on meta"),
        (lambda: [torch.zeros(3, dtype=torch.float8_e4m3fn)], {}, "is torch.float8_e4m3fn"),
    ],
)
def test_what_cannot_be_stepped_is_refused_when_it_is_made(params, options, message):
    with pytest.raises(ValueError, match=message):
        SphereSGD(params(), **{"lr": 0.1, **options})


@pytest.mark.parametrize("name, value", [("radius", -1.0), ("radius", math.nan),
                                         ("momentum_buffer", math.nan)])  # fmt: skip
def test_a_state_of_bad_numbers_is_refused(name, value):
    optimizer = stepped([(3, 2)])
    before, state = everything(optimizer), deepcopy(optimizer.state_dict())
    state["state"][0][name].fill_(value)
    with pytest.raises(ValueError, match="the state has a radius"):
        optimizer.load_state_dict(state)
    assert everything(optimizer) == before


def test_schedules_leave_their_options_and_every_group_has_a_weight_decay():
    for name in ("OneCycleLR", "CyclicLR"):
        optimizer = SphereSGD([parameter(4, 3)], lr=0.1, momentum=0.9)
        how = dict(max_lr=0.1) | (dict(base_lr=0.01) if name == "CyclicLR" else dict(total_steps=9))
        getattr(torch.optim.lr_scheduler, name)(optimizer, **how)
        extra = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        optimizer.add_param_group({"params": [parameter(2)], **extra})
        optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_no_attribute_is_the_class_s():
    assert not [name for name in vars(SphereSGD) if not callable(getattr(SphereSGD, name))
                and not name.startswith("__") and name != "last"]  # fmt: skip


def test_weights_that_were_loaded_after_the_optimizer_was_made_are_told_of_once():
    p = parameter(4, 3)
    optimizer = SphereSGD([p], lr=0.1)
    with torch.no_grad():
        p.mul_(3)
    with pytest.warns(UserWarning, match="weights have moved since the optimizer was made"):
        optimizer.step()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


def test_statistics_of_layers_have_the_names_that_were_given():
    net = torch.nn.Linear(3, 4)
    groups = [{"params": [("w", net.weight)]}, {"params": [("b", net.bias)], "sphere": None}]
    optimizer = SphereSGD(groups, lr=0.1)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.layer_stats()["name"] == ["w"]


def test_many_groups_of_large_weights_take_no_copy_of_all():
    """A group's norm is taken in pieces."""
    p = torch.nn.Parameter(torch.randn(4 * sphere_step.PIECE))
    largest = [0]
    plain = torch.Tensor.double

    def double(x):
        largest[0] = max(largest[0], x.numel())
        return plain(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "double", double)
        SphereSGD([p], lr=0.1)
    assert 0 < largest[0] <= sphere_step.PIECE


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("angle", [False, True])
def test_zeros_take_their_direction_from_the_first_gradient(sphere, angle):
    p = torch.nn.Parameter(torch.zeros(4, 30))
    p.grad = torch.randn(4, 30)
    optimizer = SphereSGD([p], lr=0.1, sphere=sphere, radius=2.0, angle=angle, momentum=0.9)
    optimizer.normalize()
    assert (p == 0).all()
    optimizer.step()
    for x, g in zip(spheres_of([p.detach()], sphere), spheres_of([p.grad], sphere), strict=True):
        assert close(x, -2 * g / g.norm(), 1e-6)
    optimizer.step()
    assert optimizer.stats()["radius"].tolist() == pytest.approx(
        [2.0] * len(optimizer.stats()["elr"])
    )


@pytest.mark.parametrize("share", [1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("count", [40, 3000] if INTERPRET else [40, 3000, 10**6])
@pytest.mark.parametrize("sphere", ["group", "row"])
def test_a_gradient_that_is_all_but_radial(share, count, sphere):
    """What is across is at least rounding of float32; where that is nothing, nothing turns."""
    theta = torch.randn(2, count // 2)
    across = torch.randn_like(theta)
    x, across = theta.double(), across.double()
    across -= x * (x * across).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True)
    p = torch.nn.Parameter(theta.clone())
    optimizer = SphereSGD([p], lr=0.1, sphere=sphere, angle=True)
    p.grad = (2 * x + 2 * share * across * (x.norm() / across.norm())).float()
    optimizer.step()
    cut = (spheres_of([t.double()], sphere) for t in (theta, p.grad, p.detach()))
    for x, g, new in zip(*cut, strict=True):
        rest = (g - x * (x @ g) / (x @ x)).norm() / g.norm()
        expected = x
        if rest > 1e-7:
            expected, _ = reference_step(x, g, 0 * x, x.norm(), 0.1, 0, True)
        if rest > 1e-7 or not share:
            assert close(new, expected, 3e-6 + 1e-15 / rest.clamp(min=1e-7) ** 2)
    if not share:
        assert torch.equal(p, theta)


# --------------------------------------------------------- random sequences of everything at once

DRAWS = 1000 if "SLOW" in os.environ else 100
if INTERPRET:
    DRAWS = 20 if "SLOW" in os.environ else 2


class Model:
    """What the optimizer should do, in float64 vectors, a dict per param group."""

    def __init__(self):
        self.groups = []

    def add(self, params, **options):
        x = self.cut([p.detach() for p in params], options["sphere"])
        radii = [v.norm() for v in x]
        self.groups.append(dict(x=x, m=[0 * v for v in x], radii=radii, **options))

    @staticmethod
    def cut(tensors, sphere):
        return [v.double().clone() for v in spheres_of(tensors, sphere or "tensor")]

    def step(self, gradients):
        for group, tensors in zip(self.groups, gradients, strict=True):
            g = self.cut(tensors, group["sphere"])
            lr, beta = group["lr"], group["momentum"]
            for i, x in enumerate(group["x"]):
                if group["sphere"] and len(x) == 1:
                    continue  # two points: there is no tangent
                if group["sphere"]:
                    m = group["m"][i]
                    new, m = reference_step(x, g[i], m, group["radii"][i], lr, beta, group["angle"])
                else:
                    m = beta * group["m"][i] + g[i] + group["weight_decay"] * x
                    new = x - lr * m
                group["x"][i], group["m"][i] = new, m if beta else group["m"][i]


def random_group(draw, dtype):
    sphere = draw.choice(["group", "tensor", "row", None])
    shapes = [
        draw.choice([(2,), (3, 4), (7, 2, 3), (70, 5), (2, 600)]) for _ in range(draw.randint(1, 4))
    ]
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    angle = sphere is not None and draw.random() < 0.3
    options = dict(sphere=sphere, angle=angle, momentum=draw.choice([0.0, 0.9]))
    options |= dict(lr=10 ** draw.uniform(-5, -3), weight_decay=draw.choice([0.0, 0.1]))
    return params, options


@pytest.mark.parametrize("draw", range(DRAWS))
def test_random_sequences_of_steps_and_all_else(draw):
    seed = random.randrange(2**31)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = torch.float32 if INTERPRET else draw.choice([torch.float32, torch.float64])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    params, options = random_group(draw, dtype)
    model, groups = Model(), [params]
    model.add(params, **options)
    optimizer = SphereSGD([{"params": params, **options}], lr=1.0)
    for _ in range(draw.randint(3, 8)):
        what = draw.choice(["load", "copy", "add", "lr", "observe", "lay out", "none"])
        if what == "load":
            other = SphereSGD(
                [{**x, "params": x["params"]} for x in optimizer.param_groups], lr=1.0
            )
            other.load_state_dict(deepcopy(optimizer.state_dict()))
            optimizer = other
        elif what == "copy":
            groups, optimizer = deepcopy((groups, optimizer))
        elif what == "add" and len(groups) < 3:
            params, options = random_group(draw, dtype)
            groups.append(params)
            model.add(params, **options)
            optimizer.add_param_group({"params": params, **options})
        elif what == "lr":
            for group, of_model in zip(optimizer.param_groups, model.groups, strict=True):
                group["lr"] = of_model["lr"] = of_model["lr"] * draw.choice([0.5, 2.0])
        elif what == "lay out":
            for p in groups[0]:  # elsewhere
                p.data = p.data.clone()
        gradients = [[torch.randn(p.shape).to(dtype) for p in params] for params in groups]
        for params, own in zip(groups, gradients, strict=True):
            for p, g in zip(params, own, strict=True):
                p.grad = g
        if what == "observe":
            optimizer.observe()
        optimizer.step()
        model.step(gradients)
        for params, group in zip(groups, model.groups, strict=True):
            for x, expected in zip(
                Model.cut([p.detach() for p in params], group["sphere"]), group["x"], strict=True
            ):
                assert (x - expected).norm() <= tolerance * expected.norm(), seed
