"""Barriers, distances and curvature against closed forms, dense Hessians and invariants."""

import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import log, read
from torch import nn

import regimes
import train
from lab import bench, figures, landscape, measure, runs
from lab.data import load
from lab.landscape import Point, barrier, between, distances, evaluate, largest, operators, trace
from lab.measure import vectors
from lab.options import parse, prepare
from models import fixed_head

SMALL = ["--width", "1", "--batch-size", "256", "--epochs", "1", "--jobs", "1"]


def run(*arguments):
    return train.main([str(a) for a in arguments])


def make(net, sphere="network", samples=60):
    """A point that was not trained, on the digits."""
    names = [name for (name,) in net.layer_groups]
    spheres = [{"names": [name], "rows": sphere == "row"} for name in names]
    if sphere == "network":
        spheres = [{"names": names, "rows": False}]
    data = load("digits")
    data.x, data.y = data.x[:samples], data.y[:samples]
    return Point("p", net, data, {"model": "convnet"}, spheres)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A sweep with second runs, on one sphere, and two runs on the other kinds of sphere."""
    folder, more = tmp_path_factory.mktemp("ends"), ["--affine", "--train-head"]
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(measure, "POINTS", 2)
        quick.setattr(figures, "of_sweep", lambda runs, path, name="": path.write_bytes(b"PNG"))
        sweep = [*SMALL, "--then", 1e-3, "--average", 1, "--out", folder / "network"]
        assert run("--elr", 0.003, 0.01, "--seeds", 2, *sweep) == 0
        for sphere in ("layer", "row"):
            where = ["--sphere", sphere, "--out", folder / sphere]
            assert run("--elr", 0.003, "--seeds", 2, *SMALL, *more, *where) == 0
    return folder


def two_ends(folder):
    return [landscape.read(folder / f"elr=3e-03{seed}.pt") for seed in ("", ".seed=1")]


def two_layers(first, second):
    """A scale-invariant network of 9 · first · (1 + second) weights, and the same as a function of them."""
    layers = []
    for before, after in ((1, first), (first, second)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after, affine=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    net = nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), fixed_head(nn.Linear(second, 10))
    )
    net.layer_groups = [["0.weight"], ["4.weight"]]
    shapes = [net.get_parameter(name).shape for (name,) in net.layer_groups]

    def logits(theta, x):
        for weight, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True):
            x = F.batch_norm(F.conv2d(x, weight.view(shape), padding=1), None, None, training=True)
            x = F.max_pool2d(F.relu(x), 2)
        return F.linear(x.amax((2, 3)), net[-1].weight.to(x.dtype), net[-1].bias.to(x.dtype))

    return net, logits


def dense_matrices(net, logits, data):
    """Hessian and Gauss-Newton matrix of the train loss, from torch.func in float64."""
    names = [name for (name,) in net.layer_groups]
    theta = torch.cat([net.get_parameter(name).detach().double().flatten() for name in names])
    x, y = data.inputs(torch.arange(len(data.x))).double(), data.y

    def loss_of(out):
        return F.cross_entropy(out, y)

    hessian = torch.func.hessian(lambda t: loss_of(logits(t, x)))(theta)
    jacobian = torch.func.jacrev(logits)(theta, x).reshape(-1, len(theta))
    of_out = torch.func.hessian(lambda out: loss_of(out.view(-1, 10)))(logits(theta, x).flatten())
    return hessian, jacobian.T @ of_out @ jacobian


def test_curvature_is_that_of_the_dense_matrices_on_the_unit_sphere():
    net, logits = two_layers(3, 5)
    net.double()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    both = dense_matrices(net, logits, make(net).data)
    for sphere in ("network", "layer", "row"):
        point = make(net, sphere)
        radius = [x.norm(dim=1, keepdim=True).expand_as(x).flatten() for x in point.vectors()]
        radius = torch.cat(radius)
        for operator, matrix in zip(operators(point).values(), both, strict=True):
            dense = radius[:, None] * matrix * radius
            v = torch.randn(len(radius), dtype=torch.float64)
            assert np.allclose(operator @ v.numpy(), (dense @ v).numpy(), rtol=1e-6, atol=1e-9)
    # By ARPACK and Hutchinson, of the last of them.
    values = torch.linalg.eigvalsh(dense).flip(0)[:3].numpy()
    assert largest(operator, 3) == pytest.approx(values, rel=5e-3)
    deviation = math.sqrt(2 * (dense - dense.diag().diag()).square().sum().item() / 50)
    assert abs(trace(operator, probes=50) - dense.trace().item()) < 5 * deviation
    # No trace in the network.
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize("sphere", ["network", "layer", "row"])
def test_the_great_circle_begins_and_ends_at_the_checkpoints_and_keeps_every_norm(ends, sphere):
    a, b = two_ends(ends / sphere)
    for way in ("circle", "line"):
        height, path = barrier(a, b, way, points=3)
        own = [evaluate(a, p.net)[0] for p in (a, b)]
        assert (path[0][1], path[-1][1]) == pytest.approx(own, rel=1e-6) and height >= 0
    radii = [[x.norm(dim=1) for x in p.vectors()] for p in (a, b)]
    whole = [measure.angles([x], [y]) for x, y in zip(a.vectors(), b.vectors(), strict=True)]
    before = a.vectors()
    for t in (0.25, 0.5, 0.75, 1.0):
        points = vectors(between(a, b, t, "circle"), a.spheres)
        for x, ra, rb in zip(points, *radii, strict=True):
            assert torch.allclose(x.norm(dim=1), (1 - t) * ra + t * rb, rtol=1e-6)
        for x, y, angle in zip(before, points, whole, strict=True):  # at even pace
            assert torch.allclose(4 * measure.angles([x], [y]), angle, rtol=1e-3, atol=1e-5)
        before = points


def test_distances_are_the_angles(ends):
    points = two_ends(ends / "network")
    found = distances(points)
    weights = [
        [p.net.get_parameter(f"conv{i}.weight").detach().double().flatten() for i in (1, 2, 3, 4)]
        for p in points
    ]

    def angle(x, y):
        return math.acos((x @ y / x.norm() / y.norm()).item())

    assert found["network"][0, 1] == pytest.approx(angle(*map(torch.cat, weights)))
    assert found["network"][0, 0] == 0
    for i in range(4):
        expected = angle(weights[0][i], weights[1][i])
        assert found[f"conv{i + 1}.weight"][1, 0] == pytest.approx(expected)


def test_averages_lie_on_the_spheres_and_that_of_equal_weights_is_those_weights(tmp_path):
    more = "--elr 0.01 --width 2 --average 3 --epochs 4 --sphere layer --out"
    experiment = prepare(parse([*more.split(), str(tmp_path)]))
    made, data = train.Run(experiment, runs.Job(0.01, 0, tmp_path, "")), experiment.data
    start, seen = [x.clone() for x in vectors(made.net, made.spheres)], []
    real = measure.on_train_set
    measure.on_train_set = lambda net, *_: seen.append(vectors(net, made.spheres)) or 0.0
    try:
        for _ in range(3):
            made.averaged.update_parameters(made.net)
        measure.on_average(made.averaged, made.net, made.spheres, data, "fp32")
        other = [torch.nn.functional.normalize(torch.randn_like(x)) * x.norm() for x in start]
        for sphere, x in zip(made.spheres, other, strict=True):
            measure.put(made.net, sphere, x)
        made.averaged.update_parameters(made.net)
        measure.on_average(made.averaged, made.net, made.spheres, data, "fp32")
    finally:
        measure.on_train_set = real
    for same, old in zip(seen[0], start, strict=True):
        assert torch.allclose(same, old, rtol=1e-6)
    for mean, old, new in zip(seen[1], start, other, strict=True):
        expected = (3 * old + new) / 4
        assert mean.norm().item() == pytest.approx(old.norm().item(), rel=1e-6)
        assert torch.allclose(mean, expected * old.norm() / expected.norm(), rtol=1e-4, atol=1e-6)


def test_average_adds_its_columns_in_the_last_epochs_and_changes_nothing_else(tmp_path):
    for name, more in (("plain", []), ("average", ["--average", 2])):
        more += [*SMALL, "--epochs", 3, "--out", tmp_path / name]
        assert run("--elr", 0.01, *more) == 0
    plain, average = log(tmp_path / "plain"), log(tmp_path / "average")
    for x, y in zip(plain, average, strict=True):
        assert all(x[key] == y[key] for key in x if key != "seconds")
    assert [math.isnan(row["avg_test_error"]) for row in average] == [True, True, False, False]
    assert average[3]["avg_train_loss"] < 10 and 0 <= average[3]["avg_test_error"] <= 1


def test_then_starts_from_the_end_of_a_run_and_ends_far_below_an_equilibrium(tmp_path, capsys):
    more = ["--epochs", 4, "--then", 1e-3, "--jobs", 1, "--out", tmp_path]
    assert run("--elr", 0.01, *more) == 0
    assert capsys.readouterr().out.count("; then at 0.001: ") == 1
    first, then = (log(tmp_path, f"elr=1e-02{x}") for x in ("", ".then=1e-03"))
    assert then[-1]["train_loss"] < first[-1]["train_loss"] / 10
    assert then[-1]["test_error"] < first[-1]["test_error"]
    assert {row["elr"] for row in then} == {1e-3} and len(then) == 5
    start, end = (landscape.read(tmp_path / f"elr=1e-02{x}.pt") for x in ("", ".then=1e-03"))
    for x, y in zip(start.vectors(), end.vectors(), strict=True):
        assert x.norm().item() == pytest.approx(y.norm().item(), rel=1e-6)


def test_the_command_line_prints_and_draws_all_of_a_sweep(ends, capsys):
    folder = ends / "network"
    assert landscape.main(["summary", str(folder), "--samples", "64"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 6 and "undecided" in out
    assert (folder / "landscape.png").stat().st_size > 10_000
    found = read(folder / "landscape.csv")
    runs = [(row["elr"], row["seed"]) for row in found]
    assert runs == [("0.003", "0"), ("0.003", "1"), ("0.01", "0"), ("0.01", "1")]
    for row in found:
        assert all(float(row[key]) >= 0 for key in row if "sharp" in key or "error" in key)
        assert (row["barrier_to_next"] == "nan") == (row["elr"] == "0.01")
    a, b = str(folder / "elr=3e-03.pt"), str(folder / "elr=1e-02.pt")
    assert landscape.main(["barrier", a, b, "--points", "3"]) == 0
    assert landscape.main(["distance", a, b]) == 0
    assert landscape.main(["curvature", a, "--k", "2", "--samples", "64"]) == 0
    out = capsys.readouterr().out
    assert "great circle: barrier" in out and "conv4.weight" in out and "2/λ_max = " in out
    assert (folder / "barrier.png").exists()


def test_a_run_that_died_is_nan_in_its_row_and_in_no_other(ends, tmp_path, capsys):
    """One whose weights are nan, and one whose loss does not depend on them: its Hessian is 0."""
    for path in (ends / "network").iterdir():
        if "=1" not in path.name and path.suffix in (".csv", ".json", ".pt"):
            shutil.copy(path, tmp_path)
    point = tmp_path / "elr=3e-03.pt"
    for dead in (math.nan, 0.0):
        state = runs.load_checkpoint(point, "cpu")
        for x in state["net"].values():
            x.copy_(x * dead)
        runs.save_checkpoint(tmp_path / "elr=4e-03.pt", state["identity"], state)
        text = (tmp_path / "elr=3e-03.csv").read_text()
        (tmp_path / "elr=4e-03.csv").write_text(text.replace(",0.003,", ",0.004,"))
        assert landscape.main(["summary", str(tmp_path), "--samples", "64"]) == 0
        out, err = capsys.readouterr()
        assert "2 checkpoints: about " in err
        good, bad = read(tmp_path / "landscape.csv")
        assert float(good["sharpness"]) > 0 and bad["sharpness"] == bad["edge"] == "nan"
        assert landscape.main(["curvature", str(point), "--k", "1", "--samples", "64"]) == 0
        value = capsys.readouterr().out.split("largest eigenvalues ")[1].split(";")[0]
        assert float(value) == pytest.approx(float(good["sharpness"]), rel=1e-3)


def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys, ends):
    good = ends / "network" / "elr=3e-03.pt"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"net": 3}, tmp_path / "foreign.pt")
    cases = [
        (["curvature", "none.pt"], "none.pt: there is no such file"),
        (["curvature", tmp_path / "junk.pt"], "junk.pt is damaged, or no checkpoint of train.py"),
        (
            ["distance", good, tmp_path / "foreign.pt"],
            "foreign.pt is damaged, or no checkpoint of train.py",
        ),
        (
            ["barrier", good, ends / "layer" / "elr=3e-03.pt"],
            "is another network, or on other spheres, than",
        ),
        (["summary", tmp_path], "no runs here"),
        (["curvature", good, "--k", "0"], "argument --k: '0' is not a whole number from 1"),
        (["flatness", good], "invalid choice"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as exit:
            landscape.main([str(a) for a in arguments])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.count("\n") == 1 and message in err, err


EXTREME = ["0", "-1", "nan", "inf", "1e308", "99999999999999999999", "", "x"]


@pytest.mark.parametrize("option", ["--points", "--k", "--samples"])
def test_an_extreme_number_is_one_line(tmp_path, capsys, option):
    what = "barrier" if option == "--points" else "curvature"
    files = ["none.pt"] * (2 if what == "barrier" else 1)
    for number in EXTREME:
        with pytest.raises(SystemExit) as exit:
            landscape.main([what, *files, option, number])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.count("\n") == 1, err


def test_an_extreme_number_of_repetitions_is_one_line(capsys, monkeypatch):
    for number in EXTREME:
        monkeypatch.setattr(sys, "argv", ["bench.py", "step", "--repetitions", number])
        with pytest.raises(SystemExit) as exit:
            bench.main()
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.count("\n") == 1, err


def test_a_reader_that_goes_away_ends_it_silently(monkeypatch, capfd, ends):
    """As in `python -m lab.landscape distance … | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        point = str(ends / "network" / "elr=3e-03.pt")
        with pytest.raises(SystemExit) as exit:
            regimes.finish(lambda: landscape.main(["distance", point]))
    assert exit.value.code == 0 and capfd.readouterr().err == ""
