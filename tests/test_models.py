"""Scale invariance of the networks, measured in float64."""

import os
from copy import deepcopy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import Toy, convnet, resnet18, scale_invariant_groups
from sphere_step import SphereSGD

slow = pytest.mark.skipif(
    "SLOW" not in os.environ, reason="takes a minute or more: SLOW=1 python -m pytest runs it"
)
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
    assert [tuple(net.get_parameter(f"conv{i}.weight").shape[:2]) for i in (1, 2, 3, 4)] == [
        (5, 3),
        (10, 5),
        (20, 10),
        (40, 20),
    ]


def test_the_head_has_norm_ten_and_a_bias():
    head = convnet(1, 10).head
    assert abs(head.weight.norm().item() - 10) < 1e-5 and head.bias is not None
    assert not head.weight.requires_grad and not head.bias.requires_grad


# ---------------------------------------------------------------------------------------------------------------- the toy


def test_the_toy_is_its_formula_and_each_group_is_scale_invariant():
    net = Toy([1.0, 2.0, 4.0])
    x, y = torch.stack(list(net.groups)).detach().unbind(1)
    expected = sum(a * x[i] ** 2 / (x[i] ** 2 + y[i] ** 2) for i, a in enumerate([1, 2, 4]))
    assert net().item() == pytest.approx(expected.item(), rel=1e-14)
    gradients = torch.autograd.grad(net(), list(net.groups))
    assert all(abs(p @ g) < 1e-14 for p, g in zip(net.groups, gradients, strict=True))


def test_a_random_point_of_the_toy_has_half_the_sum_of_the_alphas_on_average():
    values = torch.tensor([Toy([1.0, 2.0, 4.0])().item() for _ in range(4000)], dtype=torch.float64)
    assert abs(values.mean() - 3.5) < 5 * values.std() / 4000**0.5


@slow
@pytest.mark.parametrize("alphas", [[1], [1, 2], [1, 2, 4], [5, 1, 1, 1, 1]])
@pytest.mark.parametrize("factor", [1.2, 3])
def test_at_equilibrium_the_toys_mean_over_100000_steps_is_the_same_for_every_seed(alphas, factor):
    """Ten seeds at once: each is a row, and every row is a sphere. Within 1 % of their mean, since little above the threshold two
    attractors can coexist: with α = (5, 1, 1, 1, 1), at 1.2 times it, levels of 0.7500 and, for one seed in ten, 0.7426."""
    theta = torch.randn(10, len(alphas), 2, dtype=torch.float64).requires_grad_()
    alpha, total = torch.tensor(alphas, dtype=torch.float64), 0
    optimizer = SphereSGD([theta], lr=factor / sum(alphas), sphere="row")
    for step in range(101_000):
        square = theta.square()
        losses = (alpha * square[..., 0] / square.sum(2)).sum(1)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        if step >= 1000:
            total = total + losses.detach() / 100_000
    print(f"α = {alphas}, {factor} times the threshold: {total.min():.5f} to {total.max():.5f}")
    assert (total / total.mean() - 1).abs().max() < 0.01


# ------------------------------------------------------------------------------------------- finding the spheres of any network


def test_resnet18_has_twelve_sets_none_of_whose_parts_is_invariant():
    net = resnet18(2, 5, width=2).double()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = (
            1e-13  # a channel of small variance shows eps: up to 4e-7 in 60 draws, once above 1e-6
        )
    x = torch.randn(16, 2, 16, 16, dtype=torch.float64)
    logits = net(x)
    assert logits.shape == (16, 5) and len(net.layer_groups) == 12
    assert sorted(map(len, net.layer_groups)) == [1] * 8 + [3] * 4
    for group in net.layer_groups:
        params = [net.get_parameter(name) for name in group]
        for size in range(1, len(params) + 1):
            for part in combinations(params, size):
                for p in part:
                    scaled(p, 10)
                error = relative(net(x), logits)
                for p in part:
                    scaled(p, 1 / 10)
                assert error < EPS_BREAKS if size == len(params) else error > 1e-3


def as_sets(groups):
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("build", [convnet, resnet18])
def test_the_sets_found_are_those_that_our_networks_declare(build):
    net = build(3, 10, width=4)
    assert as_sets(scale_invariant_groups(net, torch.randn(8, 3, 16, 16))) == as_sets(
        net.layer_groups
    )


@pytest.mark.parametrize("seed", range(5))
def test_affine_batchnorm_adds_the_scales_and_shifts_that_another_normalization_follows(seed):
    torch.manual_seed(seed)
    net = resnet18(3, 10, width=4, affine=True)
    found = as_sets(scale_invariant_groups(net, torch.randn(8, 3, 16, 16)))

    def affine(*norms):
        return frozenset(f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias"))

    names = [f"stage{stage}_block{block}" for stage in (1, 2, 3, 4) for block in (1, 2)]
    expected = as_sets(net.layer_groups) | {affine(f"{name}.norm1") for name in names}
    # What a stage writes to its stream can be scaled before its last convolutions, too. The shift in the last shortcut has no
    # effect: it adds a constant to a stream that only normalizations read.
    streams = [
        affine(*(f"stage{s}_{x}" for x in ("block1.norm2", "block2.norm2", "block1.shortcut.0")))
        for s in (2, 3, 4)
    ]
    shift = frozenset({"stage4_block1.shortcut.0.bias"})
    assert found == expected | {streams[0], streams[1], streams[2] - shift, shift}


def check_by_scaling(net, x, found, whole=True):
    """Each set leaves the outputs when it is scaled; with `whole`, no single parameter left over does."""
    net = deepcopy(net).double().train()
    for module in net.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-12
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = x.double() if x.is_floating_point() else x

    def outputs():
        torch.manual_seed(0)
        with torch.no_grad():
            return net(x)

    before, params = outputs(), dict(net.named_parameters())
    assert sum(map(len, found)) == len(set().union(*found))  # disjoint
    for group in found:
        for name in group:
            scaled(params[name], 2)
        assert relative(outputs(), before) < 1e-6, group
        for name in group:
            scaled(params[name], 1 / 2)
    for name in set(params) - set().union(*found) if whole else ():
        scaled(params[name], 2)
        assert relative(outputs(), before) > 1e-6, name
        scaled(params[name], 1 / 2)


def test_torchvisions_resnet18_in_full():
    net = torchvision.models.resnet18(num_classes=10)
    x = torch.randn(4, 3, 64, 64)
    state, rng = deepcopy(net.state_dict()), torch.get_rng_state()
    found = as_sets(scale_invariant_groups(net, x))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    expected = {frozenset({name}) for name, p in net.named_parameters() if p.dim() == 4}
    for stage in (1, 2, 3, 4):
        expected |= {
            frozenset({f"layer{stage}.{block}.bn1.{kind}" for kind in ("weight", "bias")})
            for block in (0, 1)
        }
        stream = [f"layer{stage}.{block}.bn2" for block in (0, 1)] + [
            "bn1" if stage == 1 else f"layer{stage}.0.downsample.1"
        ]
        if stage < 4:  # the last stream goes to the head without another normalization
            expected.add(
                frozenset({f"{name}.{kind}" for name in stream for kind in ("weight", "bias")})
            )
    assert found == expected
    check_by_scaling(net, x, found)


def test_torchvisions_mobilenet_v3_small_by_scaling_every_set_and_every_parameter_left():
    net, x = torchvision.models.mobilenet_v3_small(num_classes=10), torch.randn(4, 3, 64, 64)
    found = as_sets(scale_invariant_groups(net, x))
    assert {
        frozenset({name})
        for name, p in net.named_parameters()
        if name.endswith(".0.weight") and p.dim() == 4
    } <= found
    check_by_scaling(net, x, found)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=slow)])
def test_torchvisions_vgg11_bn_in_full(whole):
    """Without `whole` the classifier, of whose 120 million weights none is invariant, is a small one of the same kind."""
    net, x = torchvision.models.vgg11_bn(num_classes=10), torch.randn(2, 3, 64, 64)
    if not whole:
        net.classifier = nn.Sequential(
            nn.Linear(512 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )
    found = as_sets(scale_invariant_groups(net, x))
    convs = [name for name, p in net.named_parameters() if p.dim() == 4]
    expected = {frozenset({name}) for name in convs} | {
        frozenset({name.replace("weight", "bias")}) for name in convs
    }
    norms = [
        f"features.{int(name.split('.')[1]) + 1}" for name in convs[:-1]
    ]  # the last is followed by the classifier
    expected |= {frozenset({f"{name}.weight", f"{name}.bias"}) for name in norms}
    assert found == expected


def mlp(norm):
    return nn.Sequential(
        nn.Linear(5, 7),
        norm(7),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(7, 6),
        norm(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def test_an_mlp_with_layernorm_and_dropout_has_its_linear_layers_but_the_last():
    net, x = mlp(nn.LayerNorm), torch.randn(8, 5)
    found = as_sets(scale_invariant_groups(net, x))
    assert found == {frozenset({"0.weight", "0.bias"}), frozenset({"4.weight", "4.bias"})}
    check_by_scaling(net, x, found)


def test_nothing_is_found_without_normalization_despite_rescaling_symmetries():
    assert scale_invariant_groups(mlp(nn.Identity), torch.randn(8, 5)) == []


def test_the_direction_of_a_weight_normalized_layer_is_invariant():
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 3)
    )
    assert scale_invariant_groups(net, torch.randn(8, 5)) == [
        ["0.parametrizations.weight.original1"]
    ]


class Tied(nn.Module):
    """Token embedding and output layer share a tensor, used before and after a normalization."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = F.layer_norm(self.embed(tokens), (8,), eps=0.0)
        return self.out(F.layer_norm(self.hidden(x), (8,), eps=0.0))


def test_a_tied_weight_counts_once_and_is_not_invariant_for_one_of_its_two_uses():
    assert scale_invariant_groups(Tied(), torch.randint(11, (4, 5))) == [["hidden.weight"]]


class Attention(nn.Module):
    """A transformer's block with QK-norm: queries and keys are normalized before their product."""

    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        n = F.layer_norm(x, x.shape[-1:], eps=1e-12)
        q, k = (F.normalize(layer(n), dim=-1) for layer in (self.q, self.k))
        x = x + self.o((4 * q @ k.transpose(-1, -2)).softmax(-1) @ self.v(n))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:], eps=1e-12))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(11, 8),
            nn.Sequential(Attention(), Attention()),
            nn.Linear(8, 3),
        )

    def forward(self, tokens):
        return self.head(self.blocks(self.embed(tokens)).mean(1))


def test_in_a_transformer_with_qk_norm_the_queries_and_keys_are_invariant_and_nothing_else():
    """The stream meets no normalization before the head, so nothing that writes to it is."""
    found = scale_invariant_groups(Encoder(), torch.randint(11, (4, 6)))
    assert as_sets(found) == {
        frozenset({f"blocks.{block}.{name}.weight"}) for block in (0, 1) for name in "qk"
    }
