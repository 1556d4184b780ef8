"""Adam's and Muon's directions on spheres, against float64, and the comparison that uses them."""

import importlib.util
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, read, refused
from spheres import step_of

from lab.data import load
from sphere_step import SphereSGD

FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("optimizers", ROOT / "docs" / "optimizers.py")
optimizers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(optimizers)
Job = optimizers.Trial
SHAPES = (8, 3, 3, 3), (40, 6), (5, 5)


def reference_adam(gradients):
    """By the sums that the running means stand for."""
    t = len(gradients)
    m = sum(0.1 * 0.9 ** (t - 1 - i) * g for i, g in enumerate(gradients)) / (1 - 0.9**t)
    v = sum(0.05 * 0.95 ** (t - 1 - i) * g**2 for i, g in enumerate(gradients)) / (1 - 0.95**t)
    return m / (np.sqrt(v) + 1e-8)


def reference_muon(gradients):
    """The polynomial applied to each singular value."""
    t = len(gradients)
    momentum = sum(0.05 * 0.95 ** (t - 1 - i) * g for i, g in enumerate(gradients))
    matrix = (0.05 * gradients[-1] + 0.95 * momentum).reshape(len(momentum), -1)
    left, s, right = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return ((left * s) @ right).reshape(momentum.shape)


@pytest.mark.parametrize("name", ("adam", "muon"))
def test_each_tensor_turns_by_the_angle_along_the_direction(name, rng):
    direction, reference = getattr(optimizers, name), globals()[f"reference_{name}"]
    params = [torch.nn.Parameter(torch.from_numpy(rng.normal(size=s)).float()) for s in SHAPES]
    expected = [p.detach().double() for p in params]
    optimizer = SphereSGD(params, lr=0.1, sphere="tensor", angle=True)
    states, history = [{} for _ in params], [[] for _ in params]
    for _ in range(4):
        for i, p in enumerate(params):
            g = rng.normal(size=p.shape).astype(np.float32)
            history[i].append(g.astype(np.float64))
            p.grad = torch.from_numpy(g)
            p.grad = direction(p, states[i])
            g = torch.from_numpy(reference(history[i]))
            expected[i], _ = step_of(expected[i], g, 0.1, angle=True)
            assert 0.25 < p.grad.square().mean().sqrt() < 1.4  # of both directions
        optimizer.step()
    for p, wanted in zip(params, expected, strict=True):
        # Four steps in float32; Newton and Schulz multiply the rounding of small singular values,
        # by 3.4 a round.
        assert (p.detach() - wanted).norm() < 2e-4 * wanted.norm()
    assert torch.allclose(optimizer.stats()["angle"], torch.tensor(0.1).double(), atol=1e-6)


def test_the_five_lines_of_the_findings_make_the_steps_of_another_optimizer_directions():
    section = FINDINGS.split("## Any direction\n")[1]
    lines = re.search(r"AdamH.*?```python\n(.*?)```", section, re.S)[1]
    assert len(lines.splitlines()) == 5
    start = [torch.randn(s) for s in SHAPES]
    convs, ours = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizer, other = (SphereSGD(x, 0.05, "tensor", angle=True) for x in (convs, ours))
    adam, states = torch.optim.Adam(convs, lr=1.0, betas=(0.9, 0.95)), [{} for _ in ours]
    for _ in range(5):
        for p, q, state in zip(convs, ours, states, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            q.grad = optimizers.adam(q, state)
        exec(lines, {"adam": adam, "optimizer": optimizer, "matrices": convs})
        other.step()
    for p, q, x in zip(convs, ours, start, strict=True):
        assert torch.allclose(p, q, atol=1e-5) and (p - x).norm() > 0.05 * x.norm()


QUICK = "--data digits --epochs 1 --batch-size 256 --width 2".split()
SUMS = "--data modular --modulus 7 --epochs 1 --width 16".split()
TINY = {"tiny": QUICK, "tiny, MLP": [*QUICK[:-2], *optimizers.MLP], "tiny, transformer": SUMS}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(optimizers, "TASKS", TINY)
    optimizers.prepared.cache_clear()
    yield
    optimizers.prepared.cache_clear()


def test_each_sort_of_kind_trains_each_network(tiny):
    ways = [("tiny", "angle, layer"), ("tiny", "adamw"), ("tiny, MLP", "muon")]
    for task, kind in [*ways, *(("tiny, transformer", kind) for kind in ("adam", "elr", "sgd"))]:
        job = Job(task, kind, 0.02, optimizers.KINDS[kind].decays[-1], 0)
        error = optimizers.train_one(job)
        assert 0 <= error <= 1
    assert error == optimizers.train_one(job)


def directions_of(run):
    """Name of each parameter → "muon" or "adam": what a step puts in the place of its gradient."""
    found, copies = {}, {}
    for name, p in run.net.named_parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
            copies[name] = torch.nn.Parameter(p.detach().clone())
            copies[name].grad = p.grad.clone()
    run.plain_sgd.step()
    for name, copy in copies.items():
        for way in ("adam", "muon")[: copy.dim()]:
            if torch.equal(run.net.get_parameter(name).grad, getattr(optimizers, way)(copy, {})):
                found[name] = way
    assert found.keys() == copies.keys()
    return found


def test_matrices_are_on_spheres_of_their_own_and_the_rest_moves_by_adam(tiny):
    run = optimizers.make_run(Job("tiny, MLP", "muon", 0.1, 0.0, 0), "")
    on_spheres, _ = run.plain_sgd.param_groups
    assert on_spheres["sphere"] == "tensor"
    matrices = {name for name, p in run.net.named_parameters() if p in set(on_spheres["params"])}
    found = directions_of(run)
    assert matrices and {name for name in found if found[name] == "muon"} == matrices
    found = directions_of(optimizers.make_run(Job("tiny, transformer", "muon", 0.1, 0.0, 0), ""))
    assert [name for name in found if found[name] == "adam"] == ["embedding", "position", "head"]
    for kind in ("adamw", "sgd"):
        (group,) = optimizers.make_run(Job("tiny", kind, 0.1, 0.3, 0), "").plain_sgd.param_groups
        assert group["weight_decay"] == 0.3 and group["lr"] == 0.1


def made_up(job):
    """An error that a way and a seed determine; some kinds differ by a constant alone."""
    rng = np.random.default_rng(job.seed)
    return 0.1 + 0.01 * rng.random() + list(optimizers.KINDS).index(job.kind) / 100 + job.value / 50


def test_an_interrupted_comparison_goes_on_and_ends_in_the_same_rows(tiny, tmp_path, monkeypatch):
    out, done = tmp_path / "errors.csv", []

    def train_one(job):
        done.append(job)
        if len(done) == 31:
            raise KeyboardInterrupt
        return made_up(job)

    monkeypatch.setattr(optimizers, "train_one", train_one)
    monkeypatch.setattr(optimizers, "FEW_DIGITS", tmp_path / "few.npz")
    command = f"--tasks tiny --seeds 6 --jobs 1 --out {out}".split()
    out.write_text("task,kind,val")  # killed at once
    assert optimizers.main(command) == 130
    out.write_text(out.read_text()[:-9])  # as if it had been killed while it wrote
    assert optimizers.main(command) == 0
    assert len(done) == len(set(done)) + 2  # the one that was interrupted, the row that was cut
    rows, before = read(out), out.read_bytes()
    assert len(rows) == len(set(done))
    assert float(rows[0]["test_error"]) == pytest.approx(made_up(done[0]), rel=1e-8)
    assert optimizers.main(command) == 0 and out.read_bytes() == before
    assert len(done) == len(set(done)) + 2  # nothing was left to do


def test_the_table_pairs_by_seed(capsys, rng):
    """Of a kind it takes the value with most seeds and the least mean; differences seed by seed."""
    adamw, elr, angle = rng.normal(size=(3, 5)) / 1000 + rng.normal(size=5) / 10
    angle -= 0.02
    ways = {("adamw", 0.1, 0.1): [-1.0], ("adamw", 0.01, 0.1): adamw, ("adamw", 0.3, 0): adamw + 1}
    ways |= {("elr", 0.01, 0): elr, ("angle", 0.05, 0): angle, ("angle", 0.1, 0): angle[:1]}
    ways = {way: dict(enumerate(errors)) for way, errors in ways.items()}
    rows = optimizers.draw.print_comparison({"tiny": ways})["tiny"]
    row, adamw_row = rows["angle, one sphere, 0.05"], rows["AdamW, best"]
    assert (row["seeds"], adamw_row["value"], adamw_row["weight_decay"]) == (5, 0.01, 0.1)
    for name, x in (("minus_adamw", angle - adamw), ("minus_elr", angle - elr)):
        mean, error = np.mean(x), np.std(x, ddof=1) / 5**0.5
        assert [row[name], row[f"{name}_error"]] == pytest.approx([mean, error])
    assert row["minus_cosine"] == adamw_row["minus_adamw"] == ""
    out = capsys.readouterr().out.replace("−", "-")
    assert f"| angle, one sphere, 0.05 | {mean:+.4f} ± {error:.4f} * |" in out
    assert f"| angle, one sphere, 0.1 | {angle[0]:.4f} (1) |" in out
    assert "| AdamW, best | 0.01, 0.1 |" in out


def test_the_few_digits_are_the_digits_turned_round(tmp_path, monkeypatch):
    optimizers.few_digits(tmp_path / "ours.npz")
    section = FINDINGS.split("## How the figures were made\n")[1]
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "digits.npz", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], {})
    digits = load("digits")
    for name in ("ours.npz", "few.npz"):
        few = load(name)
        assert len(few.x) == 360 and len(few.test_x) == 1437
        assert torch.equal(few.x, digits.test_x) and torch.equal(few.test_y, digits.y)


def test_what_is_refused_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimizers, "FEW_DIGITS", tmp_path / "few.npz")
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with optimizers.lock(tmp_path / "held.lock"):
        for command, why in (
            (f"--out {tmp_path}/mine.csv", "has other columns: choose another --out"),
            (f"--out {tmp_path}/held.csv", "is in progress"),
            (f"--out {tmp_path}/nowhere/x.csv", "argument --out: "),
        ):
            assert why in refused(capsys, command, main=optimizers.main)
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    assert not (tmp_path / "held.csv").exists()
