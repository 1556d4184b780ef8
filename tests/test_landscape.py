"""Barriers, distances and curvature against closed forms, dense Hessians and invariants."""

import math
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, checkpoint, equal_runs, experiment, log, read, refused, run
from torch import nn

import train
from lab import landscape, measure, runs
from lab.curvature import curvature_along_gradient, largest, operators, trace
from lab.data import load
from lab.groups import spheres_of
from lab.landscape import Point, barrier, between, distances, evaluate
from lab.measure import vectors
from models import fixed_head

QUICK = "--width 1 --batch-size 16 --epochs 1 --jobs 1 --threads 1"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(ROOT / "data" / "digits.npz") as a:
        np.savez(path, **{name: a[name][: 20 if "test" in name else 48] for name in a})
    return f"{QUICK} --data {path}"


@pytest.fixture(scope="module")
def ends(tmp_path_factory, few):
    """A sweep with second runs, on one sphere, and two runs on the other kinds of sphere."""
    folder = tmp_path_factory.mktemp("ends")
    sweep = f"--elr 0.003 0.01 --seeds 2 --then 1e-3 --average 1 {few}"
    assert run(sweep, folder / "network") == 0
    for sphere in ("layer", "row"):
        more = f"--elr 0.003 --seeds 2 --affine --train-head --sphere {sphere} {few}"
        assert run(more, folder / sphere) == 0
    return folder


def two_ends(folder):
    return [landscape.read(folder / f"elr=3e-03{seed}.pt") for seed in ("", ".seed=1")]


def dense_matrices(net, data):
    """Gradient, Hessian and Gauss-Newton matrix of the train loss, from torch.func."""
    pure, names = deepcopy(net), [name for (name,) in net.layer_groups]
    torch.func.replace_all_batch_norm_modules_(pure)
    shapes = [net.get_parameter(name).shape for name in names]
    theta = torch.cat([net.get_parameter(name).detach().flatten() for name in names])
    x, y = data.inputs(torch.arange(len(data.x))).double(), data.y

    def logits(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(pure, weights, x)

    def loss(theta):
        return F.cross_entropy(logits(theta), y)

    slope, hessian = torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)
    jacobian = torch.func.jacrev(logits)(theta).reshape(-1, len(theta))
    of_logits = torch.func.hessian(lambda z: F.cross_entropy(z.view(-1, 10), y))
    return slope, hessian, jacobian.T @ of_logits(logits(theta).flatten()) @ jacobian


def test_curvature_is_that_of_the_dense_matrices_on_the_unit_sphere():
    data, layers = load("digits"), []
    data.x, data.y = data.x[:30], data.y[:30]
    for before, after in ((1, 2), (2, 3)):
        layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after, affine=False), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), fixed_head(nn.Linear(3, 10))]
    net = nn.Sequential(*layers).double()
    net.layer_groups = [["0.weight"], ["4.weight"]]
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    slope, *both = dense_matrices(net, data)
    for sphere in ("network", "layer", "row"):
        point = Point("p", net, data, {}, spheres_of(net.layer_groups, sphere))
        radius = [x.norm(dim=1, keepdim=True).expand_as(x).flatten() for x in point.vectors()]
        radius = torch.cat(radius)
        for operator, matrix in zip(operators(point).values(), both, strict=True):
            dense = radius[:, None] * matrix * radius
            v = torch.randn(len(radius), dtype=torch.float64)
            assert np.allclose(operator @ v.numpy(), (dense @ v).numpy(), rtol=1e-6, atol=1e-9)
        along = F.normalize(radius * slope, dim=0) * radius
        found, _, _ = curvature_along_gradient(point, torch.arange(30))
        assert found == pytest.approx((along @ both[0] @ along).item(), rel=1e-6)
    # By ARPACK and Hutchinson, of the last of them.
    values = torch.linalg.eigvalsh(dense).flip(0)[:3].numpy()
    assert largest(operator, 3) == pytest.approx(values, rel=5e-3)
    deviation = math.sqrt(2 * (dense - dense.diag().diag()).square().sum().item() / 50)
    assert abs(trace(operator, probes=50) - dense.trace().item()) < 5 * deviation
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())  # no trace


@pytest.mark.parametrize("sphere", ["network", "layer", "row"])
def test_the_great_circle_joins_the_checkpoints_and_keeps_every_norm(ends, sphere):
    a, b = two_ends(ends / sphere)
    own = [evaluate(a, p.net)[0] for p in (a, b)]
    for way in ("circle", "line"):
        height, path = barrier(a, b, way, points=3)
        assert (path[0][1], path[-1][1]) == pytest.approx(own, rel=1e-4) and height >= 0
    before, first, last = a.vectors(), a.vectors(), b.vectors()
    for t in (0.25, 0.5, 0.75, 1.0):
        points = vectors(between(a, b, t, "circle"), a.spheres)
        for x, y, z, earlier in zip(points, first, last, before, strict=True):
            norm = (1 - t) * y.norm(dim=1) + t * z.norm(dim=1)
            assert torch.allclose(x.norm(dim=1), norm, rtol=1e-6)
            step, whole = measure.angles([x], [earlier]), measure.angles([y], [z])
            assert torch.allclose(4 * step, whole, rtol=1e-3, atol=1e-5)  # at even pace
        before = points


def test_distances_are_the_angles(ends):
    points = two_ends(ends / "network")
    layers = [f"conv{i}.weight" for i in (1, 2, 3, 4)]
    found = distances(points)
    assert list(found) == ["network", *layers]
    for name, angles in found.items():
        spheres = [{"names": layers if name == "network" else [name], "rows": False}]
        x, y = (torch.cat(vectors(point.net, spheres)).flatten() for point in points)
        angle = math.acos((x @ y / x.norm() / y.norm()).item())
        assert angles.ravel() == pytest.approx([0, angle, angle, 0])


def test_an_average_lies_on_the_spheres(tmp_path, few, monkeypatch):
    """That of equal weights is those weights."""
    given = experiment(f"--elr 0.01 --average 1 --sphere layer {few}", tmp_path)
    made, seen = train.Run(given, runs.Job(0.01, 0, tmp_path, "")), []
    look = lambda net, *_: seen.append(vectors(net, made.spheres))  # noqa: E731
    monkeypatch.setattr(measure, "on_train_set", look)
    start = [x.clone() for x in vectors(made.net, made.spheres)]
    other = [F.normalize(torch.randn_like(x)) * x.norm() for x in start]
    for points, times in ((start, 3), (other, 1)):
        for sphere, x in zip(made.spheres, points, strict=True):
            measure.move_to(made.net, sphere, x)
        for _ in range(times):
            made.averaged.update_parameters(made.net)
        measure.on_average(made.averaged, made.net, made.spheres, made.data, "fp32")
    for same, mean, old, new in zip(*seen, start, other, strict=True):
        assert torch.allclose(same, old, rtol=1e-6)
        expected = F.normalize(3 * old + new) * old.norm()
        assert torch.allclose(mean, expected, rtol=1e-4, atol=1e-6)


def test_average_adds_its_columns_and_changes_nothing_else(tmp_path, few):
    logs = []
    for more in ("", "--average 2"):
        assert run(f"--elr 0.01 {few} --epochs 3 {more}", tmp_path / f"out{more}") == 0
        logs.append(log(tmp_path / f"out{more}"))
    for x, y in zip(*logs, strict=True):
        assert all(x[key] == y[key] for key in x if key != "seconds")
        assert math.isnan(y["avg_test_error"]) == (y["epoch"] < 2)
    assert y["avg_train_loss"] < 10 and 0 <= y["avg_test_error"] <= 1


ON_ALL = "--elr 0.01 --width 1 --batch-size 1437 --threads 1"  # a step an epoch


def test_edge_is_the_elr_times_the_curvature_along_the_gradient(tmp_path):
    assert run(f"{ON_ALL} --epochs 1 --edge 1", tmp_path) == 0
    before, after = log(tmp_path)
    prepared = experiment(f"{ON_ALL} --epochs 1", tmp_path / "2")
    at_start = train.Run(prepared, runs.Job(0.01, 0, None, ""))
    curvature, *_ = curvature_along_gradient(at_start, torch.arange(1437))
    assert math.isnan(before["edge"]) and after["edge"] == pytest.approx(0.01 * curvature, rel=1e-3)


def test_edge_changes_nothing_else_and_a_resumed_run_ends_as_an_undisturbed_one(tmp_path):
    command, edge = "--elr 0.01 --width 2 --batch-size 128 --threads 1", "--edge 5"
    assert run(f"{command} --epochs 3", tmp_path / "without") == 0
    assert run(f"{command} --epochs 3 {edge}", tmp_path / "with") == 0
    for row, other in zip(log(tmp_path / "with"), log(tmp_path / "without"), strict=True):
        assert math.isfinite(row.pop("edge")) == (row["epoch"] > 0)
        assert row | {"seconds": 0} == other | {"seconds": 0}
    for epochs in (1, 3):
        assert run(f"{command} --epochs {epochs} {edge}", tmp_path / "resumed") == 0
    equal_runs(tmp_path / "with", tmp_path / "resumed")


def test_then_starts_from_the_end_of_a_run_at_its_own_elr(ends):
    names = "elr=1e-02", "elr=1e-02.then=1e-03"
    points = [landscape.read(ends / "network" / f"{name}.pt").vectors() for name in names]
    start = checkpoint(ends / "network", names[1])["start"]
    for x, y, z in zip(start, *points, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)
        assert x.norm().item() == pytest.approx(z.norm().item(), rel=1e-6)
    assert [row["elr"] for row in log(ends / "network", names[1])] == [1e-3, 1e-3]


DEAD = {0.02: math.nan, 0.03: 0.0, 0.04: 1e30}  # what the weights are multiplied by


def test_a_summary_prints_and_draws_all_and_of_dead_runs_nan(ends, tmp_path, capsys):
    some = shutil.ignore_patterns("*1e-02.seed*")
    shutil.copytree(ends / "network", tmp_path, dirs_exist_ok=True, ignore=some)
    for elr, factor in DEAD.items():
        state = runs.load_checkpoint(tmp_path / "elr=3e-03.pt", "cpu")
        for x in state["net"].values():
            if x.is_floating_point():
                x.mul_(factor)
        runs.save_checkpoint(tmp_path / f"elr={elr:.0e}.pt", state["identity"], state)
        text = (tmp_path / "elr=3e-03.csv").read_text()
        (tmp_path / f"elr={elr:.0e}.csv").write_text(text.replace(",0.003,", f",{elr},"))
    (tmp_path / "elr=5e-02.csv").write_text("epoch,train_loss\n1,abc\n")
    capsys.readouterr()
    assert landscape.main(f"summary {tmp_path} --samples 32".split()) == 0
    out, err = capsys.readouterr()
    assert f"lab.landscape: left out: {tmp_path}/elr=5e-02.csv: line 2" in err
    assert len(out.splitlines()) == 8
    assert max(map(len, out.splitlines()[:7])) <= 110
    assert (tmp_path / "landscape.png").stat().st_size > 10_000
    found = {(float(row["elr"]), row["seed"]): row for row in read(tmp_path / "landscape.csv")}
    assert list(found) == [(0.003, "0"), (0.003, "1"), (0.01, "0"), *((x, "0") for x in DEAD)]
    for (elr, seed), row in found.items():
        dead = elr in DEAD
        assert (row["sharpness"] == "nan") == (row["edge"] == "nan") == dead
        assert dead or all(float(row[key]) >= 0 for key in row if "sharp" in key or "error" in key)
        assert (row["barrier_to_next"] == "nan") == ((elr, seed) != (0.003, "0"))
    first, second = (tmp_path / f"elr={elr}.pt" for elr in ("3e-03", "1e-02"))
    assert landscape.main(f"curvature {first} --k 2 --samples 32".split()) == 0
    out = capsys.readouterr().out
    value = float(out.split("largest eigenvalues ")[1].split(",")[0])
    assert value == pytest.approx(float(found[0.003, "0"]["sharpness"]), rel=2e-4) and value > 0
    assert float(out.split("2/λ_max = ")[1].split(":")[0]) == pytest.approx(2 / value, rel=1e-3)
    assert "trained at elr 0.003" in out and "batch sharpness " in out
    assert landscape.main(f"barrier {first} {second} --points 3".split()) == 0
    assert landscape.main(f"distance {first} {second}".split()) == 0
    out = capsys.readouterr().out
    assert "great circle: barrier" in out and "conv4.weight" in out
    assert (tmp_path / "barrier.png").exists()


def test_a_barrier_is_nan_where_the_loss_is_nan_on_the_way(ends, monkeypatch):
    a, b = two_ends(ends / "network")
    losses = iter([1.0, math.nan, 1.0])
    monkeypatch.setattr(landscape, "evaluate", lambda *_: (next(losses), 0.5))
    assert math.isnan(barrier(a, b, points=3)[0])
    monkeypatch.undo()
    next(iter(b.net.parameters())).data.fill_(math.nan)
    _, ((_, alive, _), *_, (_, dead, _)) = barrier(a, b, points=3)
    assert math.isfinite(alive) and math.isnan(dead)


def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys, ends):
    good, damaged = ends / "network" / "elr=3e-03.pt", "is damaged, or no checkpoint of train.py"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"net": 3}, tmp_path / "foreign.pt")
    for command, message in (
        ("curvature none.pt", "none.pt: there is no such file"),
        (f"curvature {tmp_path}/junk.pt", f"junk.pt {damaged}"),
        (f"distance {good} {tmp_path}/foreign.pt", f"foreign.pt {damaged}"),
        (f"barrier {good} {ends}/layer/elr=3e-03.pt", "is another network, or on other spheres"),
        (f"summary {tmp_path}", "no runs here of --elr or --sweep"),
        (f"summary {tmp_path}/none", "none: there is no such folder"),
        (f"curvature {good} --k 0", "argument --k: '0' is not a whole number"),
        (f"barrier {good} {good} --points 1e9", "argument --points: '1e9' is not a whole number"),
        (
            f"barrier {good} {good} --points 2",
            "argument --points: '2' is not a whole number from 3",
        ),
        (f"barrier {good} {good} --out x", "argument --out: 'x' is no picture: it takes NAME.png"),
        (f"distance {good} {ends}/network/config.json", "config.json is damaged, or no checkpoint"),
        (f"flatness {good}", "invalid choice"),
    ):
        assert message in refused(capsys, command, main=landscape.main)


def test_a_reader_that_goes_away_is_no_error_of_ours(monkeypatch):
    """As in `python -m lab.landscape distance … | head -1`; regimes.finish ends it silently."""

    def show(args):
        raise BrokenPipeError

    monkeypatch.setattr(landscape, "show_distances", show)
    with pytest.raises(BrokenPipeError):
        landscape.main(["distance", "a.pt"])


def test_it_says_once_what_has_changed_since_the_runs(ends, capsys, monkeypatch):
    command = f"distance {ends}/network/elr=3e-03.pt {ends}/network/elr=1e-02.pt".split()
    landscape.main(command)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(landscape, "contents", lambda data, files: {"mine.py": "another"})
    landscape.main(command)
    assert capsys.readouterr().err == "note: mine.py has changed since the run\n"
