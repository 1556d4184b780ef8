"""Scale invariance of the networks, measured in float64."""

import pytest
import torch
import torch.nn.functional as F

from models import convnet

EPS_BREAKS = 1e-6  # BatchNorm's eps is why this is not 1e-12


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def scaled(weight, factor):
    with torch.no_grad():
        weight.mul_(factor)


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 8), (3, 100, 32), (2, 3, 19)])
def test_scaling_a_layer_by_ten_leaves_the_logits(channels, classes, size):
    net = convnet(channels, classes, width=4).double()
    x = torch.randn(32, channels, size, size, dtype=torch.float64)
    logits = net(x)
    assert logits.shape == (32, classes)
    for (name,) in net.layer_groups:
        scaled(net.get_parameter(name), 10)
        print(f"{name}: {relative(net(x), logits):.1e}")
        assert relative(net(x), logits) < EPS_BREAKS
        scaled(net.get_parameter(name), 1 / 10)


def test_the_gradient_is_orthogonal_to_every_layer():
    net = convnet(1, 10, width=4).double()
    x, y = torch.randn(32, 1, 8, 8, dtype=torch.float64), torch.randint(10, (32,))
    F.cross_entropy(net(x), y).backward()
    for (name,) in net.layer_groups:
        p = net.get_parameter(name)
        assert abs((p * p.grad).sum() / p.norm() / p.grad.norm()) < EPS_BREAKS


def test_only_the_convolutions_are_trained_and_all_are_on_spheres():
    net = convnet(3, 7, width=5)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for group in net.layer_groups for name in group}
    assert [tuple(net.get_parameter(f"conv{i}.weight").shape[:2]) for i in (1, 2, 3, 4)] == [(5, 3), (10, 5), (20, 10), (40, 20)]


def test_the_head_has_norm_ten_and_a_bias():
    head = convnet(1, 10).head
    assert abs(head.weight.norm().item() - 10) < 1e-5 and head.bias is not None
    assert not head.weight.requires_grad and not head.bias.requires_grad
