"""Right on every machine: gradients, precision, device and cores are what they should be."""

import os
import random
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NOTHING, experiment, refused
from torch import nn
from torch._subclasses import FakeTensorMode

import models
import sphere_step
import train
from lab import bench, landscape, machine, measure, own, runs
from lab.data import batches, load
from lab.groups import EPS_SHARE, ROUNDING, radial_shares, spheres_of
from lab.invariance import scale_invariant_groups
from models import MODELS

SLOW = "SLOW" in os.environ


class Wrong(torch.autograd.Function):
    """The weights, whose gradient is wrong by a factor along one direction."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        direction = ctx.saved_tensors[0].clone()
        direction[:, 1:] = 0
        direction /= direction.norm()
        return gradient + 4 * (gradient * direction).sum() * direction


class WrongConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, Wrong.apply(self.weight), self.bias)


# --- the sphere as a witness


@pytest.mark.parametrize("fault", ["gradient", "normalization"])
def test_a_network_of_ours_that_is_not_orthogonal_to_its_gradient_is_refused(
    tmp_path, capsys, monkeypatch, fault
):
    net = MODELS["convnet"](1, 10)
    if fault == "normalization":
        net.norm4 = nn.Identity()
    else:
        net.conv4.__class__ = WrongConv
    monkeypatch.setattr(own, "build", lambda options, data: net)
    error = refused(capsys, "--elr 0.01 --epochs 2", tmp_path / "out")
    assert "conv4.weight points along the weights: is there a normalization behind it" in error
    for named in (torch.__version__, torch.backends.cpu.get_cpu_capability(), "lab.bench check"):
        assert named in error
    assert not (tmp_path / "out").exists()


OWN = """
from torch import nn
from test_machine import WrongConv

def network(channels, classes):
    layers = [nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [WrongConv(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
"""


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("--model {}/a_network.py:network", "3.weight points along the weights"),
        ("--model resnet18 --width 1 --batch-size 256 --sphere row", "rows are not scale"),
    ],
)
def test_what_is_not_orthogonal_in_a_network_of_ones_own_or_in_rows_is_a_note(
    tmp_path, capsys, monkeypatch, command, what
):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    (tmp_path / "a_network.py").write_text(OWN)
    experiment(f"--elr 0.01 {command.format(tmp_path)}", tmp_path / "out")
    err = capsys.readouterr().err
    assert err.count("note:") == 1 and what in err


def shares(net, groups, sphere="layer", dtype="fp32", data=None):
    data = data or load("digits")
    options = SimpleNamespace(batch_size=16, dtype=dtype)
    return radial_shares(net, spheres_of(groups, sphere), data, options)


def healthy(rng):
    """One of our networks, or one of layers as others have them: biases, affine, default eps."""
    width = rng.choice([16, 32, 64])  # of few ReLUs all may be dead
    if rng.random() < 0.3:
        net = MODELS[rng.choice(["convnet", "resnet18"])](1, 10, rng.randint(1, 12))
        return net, net.layer_groups
    kind = rng.choice([nn.BatchNorm2d, nn.InstanceNorm2d, partial(nn.GroupNorm, 2), nn.LayerNorm])
    bias = rng.random() < 0.5
    layers = [nn.LazyConv2d(width, 3, padding=1, bias=bias)]
    if kind is nn.LayerNorm:
        layers = [nn.Flatten(), nn.LazyLinear(width, bias=bias)]
    net = nn.Sequential(*layers, kind(width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    x = load("digits").inputs(torch.arange(32))
    net(x)
    return net, scale_invariant_groups(net, x)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_healthy_network_raises_an_alarm(dtype):
    seed = random.randrange(2**31) if SLOW else 0
    rng = random.Random(seed)
    for _ in range(200 if SLOW else 3):
        torch.manual_seed(rng.randrange(2**31))
        net, groups = healthy(rng)
        found = shares(net, groups, dtype=dtype)
        bound = ROUNDING[dtype]
        if not hasattr(net, "layer_groups"):
            bound += EPS_SHARE
        assert found.max() <= bound, (seed, net, found)


@pytest.mark.parametrize("sphere", ["layer", "row"])
def test_a_share_is_that_of_the_gradient_along_the_weights(sphere):
    """Against its definition, by autograd in float64, on a network that is not invariant at all."""
    data, groups = load("digits"), [["1.weight"], ["2.weight", "3.weight"]]
    layers = nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 7), nn.Linear(7, 10)
    net = nn.Sequential(*layers).double()
    data.mean, data.std = data.mean.double(), data.std.double()
    found = shares(net, groups, sphere, data=data)

    def cut(one, two, three):
        if sphere == "row":
            return [*one, *two, *three]
        return [one.flatten(), torch.cat([two.flatten(), three.flatten()])]

    sums, weights = 0, [net[i].weight for i in (1, 2, 3)]
    for index in batches(len(data.x), 16, torch.Generator().manual_seed(0))[:8]:
        loss = F.cross_entropy(net(data.inputs(index)), data.y[index])
        gradients = cut(*torch.autograd.grad(loss, weights))
        pairs = zip(cut(*(w.detach() for w in weights)), gradients, strict=True)
        sums += torch.tensor([[(x @ g) ** 2, (x @ x) * (g @ g)] for x, g in pairs])
    along, size = sums.T
    expected = (along / size.clamp(min=0.01 * size.max())).sqrt()
    assert torch.allclose(found, expected, rtol=1e-6)


# --- bench.py check


def test_the_check_of_this_machine_says_a_line_per_check_and_passes(capsys):
    found = {name: x for name, x in bench.checks().items() if "convolutions" not in name}
    quick = {name: x for name, x in found.items() if "bf16" not in name and "resnet18" not in name}
    assert len(bench.checks()) >= 21 and bench.check(quick) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["allowed", *["ok"] * len(quick), "right"]


def product_with_ten_bits(a, b):
    """As TF32 rounds."""
    if a.dtype != torch.float32:
        return torch.mm(a, b)
    bits = (a.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.mm(bits.view(torch.float32), b)


def rms_norm_without_the_gradient_of_its_scale(x):
    return x / x.detach().square().mean(-1, keepdim=True).sqrt()


def a_step_that_forgets_the_renormalization(rule, *vectors):
    alone, k, *rest = rule
    sphere_step.RIGHT((alone - k + 1.0, 1.0, *rest), *vectors)


def a_half_precision_step_that_truncates(rule, dtype, theta, *vectors):
    sphere_step.RIGHT(rule, dtype, theta, *vectors)
    if theta.element_size() < 4:
        theta.view(torch.int16).bitwise_and_(-4)


def a_convolution_with_a_wrong_gradient(conv, x):
    weight = conv.weight if conv.weight.dtype == torch.float64 else Wrong.apply(conv.weight)
    return conv._conv_forward(x, weight, conv.bias)


@pytest.mark.parametrize(
    ("where", "name", "fault", "check"),
    [
        (torch.Tensor, "__matmul__", product_with_ten_bits, "product"),
        (sphere_step, "_move", a_step_that_forgets_the_renormalization, "step, torch, sphere group, float32"),
        (sphere_step, "_move", a_half_precision_step_that_truncates, "step, torch, sphere tensor, bfloat16"),
        (nn.Conv2d, "forward", a_convolution_with_a_wrong_gradient, "convolutions of widths 1 to 16, threads: 1"),
        (models, "norm", rms_norm_without_the_gradient_of_its_scale, "transformer, fp32"),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", ""),
)  # fmt: skip
def test_the_check_finds_planted_faults(monkeypatch, capsys, where, name, fault, check):
    if where is sphere_step:
        monkeypatch.setattr(sphere_step, "RIGHT", sphere_step._move, raising=False)
    monkeypatch.setattr(where, name, fault)
    monkeypatch.setattr(bench, "WIDTHS", [3])
    chosen = {key: x for key, x in bench.checks().items() if check in key}
    assert bench.check(chosen) == 1
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith("allowed") and line.endswith("WRONG")


# --- device, precision, cores


def test_a_device_that_is_none_is_one_line(tmp_path, capsys):
    for name in ("mps", "cpu:1", "", "cuda:x"):
        error = refused(capsys, f"--elr 0.1 --device '{name}'", tmp_path / "out")
        error += refused(capsys, f"--device '{name}' distance a.pt", main=landscape.main)
        assert error.count(f"{name!r} is none of cpu, cuda, cuda:N") == 2
    assert not (tmp_path / "out").exists()


def tf32():
    """Whether convolutions and products on a GPU may round to TF32, by every flag that says so."""
    backends = torch.backends
    with backends.cudnn.flags(enabled=False):
        pass  # it reads them all, and sets them again
    said = [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]
    if hasattr(backends, "fp32_precision"):
        parts = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
        said += [part.fp32_precision == "tf32" for part in parts]
    assert len(set(said)) == 1, said
    return said[0]


def test_fp32_is_float32_in_convolutions_too_whatever_was_set_and_tf32_a_choice(tmp_path):
    machine.set_device("cpu", "tf32")
    setting = "import torch\ntorch.set_float32_matmul_precision('high')\n"
    (tmp_path / "a_network.py").write_text(setting + OWN.replace("WrongConv(", "nn.Conv2d("))
    made = experiment(f"--elr 0.1 --model {tmp_path}/a_network.py:network", tmp_path / "out")
    train.Run(made, runs.Job(0.1, 0, tmp_path / "log.csv", ""))
    assert not tf32()
    for dtype in ("tf32", "bf16", "tf32", "fp32"):
        machine.set_device("cpu", dtype)
        assert tf32() == (dtype == "tf32")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="as on macOS")
def test_cores_are_those_that_one_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.cores() == 1
    monkeypatch.setattr("lab.experiment.cores", lambda: 3)
    assert experiment("--sweep", tmp_path / "out").config.jobs == 3


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="before 2.9 fake tensors ask for a driver"
)
def test_on_a_gpu_training_statistics_evaluation_and_chance_mix_no_devices(tmp_path, monkeypatch):
    """On fake tensors, which know their device and have no numbers; the step is that in PyTorch."""
    made = experiment("--elr 0.01 --augment --batch-size 512", tmp_path)
    config, data, _, _ = made
    net, config.device = own.build(config, data), "cuda:0"

    def on_gpu(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda:0")

    def norms(group, zeros=False):
        return [torch.ones(1, dtype=torch.float64)] * len(group["params"])

    def backward(loss):
        for p in net.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    for where, name, fake in (
        (sphere_step, "triton", None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (sphere_step, "_norms", norms),
        (sphere_step, "_check_overlaps", NOTHING),
        (torch.Tensor, "pin_memory", lambda x: x),
        (torch.Tensor, "item", lambda x: 1.0),  # the waits of an evaluation
        (torch.Tensor, "tolist", lambda x: [1.0] * len(x)),
        (torch.Tensor, "numpy", lambda x: np.ones(x.shape)),
        (torch.Tensor, "backward", backward),
        (torch.random, "fork_rng", lambda devices: nullcontext()),
        (measure, "POINTS", 2),
        (train, "set_device", NOTHING),
        (own, "build", lambda options, data: net),
        (net, "to", lambda device: net),
        (torch.__future__, "_overwrite_module_params_on_conversion", True),
    ):
        monkeypatch.setattr(where, name, fake, raising=False)
    with FakeTensorMode():
        for name in ("x", "y", "test_x", "test_y", "mean", "std"):
            setattr(data, name, on_gpu(getattr(data, name)))
        net._apply(on_gpu)
        run = train.Run(made, runs.Job(0.01, 0, tmp_path, ""))
        run.set_lr()
        for move in (False, True):
            means = measure.Means(run)
            for index in batches(len(data.x), 512, run.random.order, "cuda:0"):
                means.add(*train.train_step(run, index, move))
            means.row()
            means.layers(run.spheres, 0)
            measure.on_test_set(net, data, "fp32")
            measure.angles(run.start, measure.vectors(net, run.spheres))
        measure.chance(run, 0, train.loss_of)
