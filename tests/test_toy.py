"""The toy against its closed form, and its step against SphereSGD's."""

import re

import numpy as np
import pytest
import torch
from helpers import NOTHING, read, refused, words

import regimes
from lab import figures, toy
from sphere_step import SphereSGD

STEPS = 9_000
CASES = [[1.0], [1.0, 2.0, 4.0], [5.0, 1.0, 1.0, 1.0, 1.0]]


def test_its_step_is_that_of_sphere_sgd(rng):
    alphas, elr = [1.0, 2.0, 4.0], 0.2
    theta = rng.standard_normal((3, 2))
    theta /= np.linalg.norm(theta)
    groups = [torch.tensor(x).requires_grad_() for x in theta]
    optimizer = SphereSGD(groups, lr=elr)
    for _ in range(20):
        parts = [a * x[0] ** 2 / (x @ x) for a, x in zip(alphas, groups, strict=True)]
        optimizer.zero_grad()
        sum(parts).backward()
        optimizer.step()
        theta, of_groups, angle = toy.descend(theta, np.array(alphas), elr)
        assert of_groups == pytest.approx([part.item() for part in parts], rel=1e-9)
        assert angle == pytest.approx(optimizer.stats()["angle"].item(), rel=1e-6)
        for x, y in zip(theta, groups, strict=True):
            assert x == pytest.approx(y.detach().numpy(), rel=1e-9, abs=1e-12)


def test_above_the_threshold_is_the_orbit_of_period_two():
    alphas, factors = np.array([1.0, 2.0, 4.0]), np.array([1.05, 1.2, 1.35, 1.5])
    total, elr = alphas.sum(), factors[:, None, None] / alphas.sum()
    theta, losses, squares = np.random.default_rng(1).standard_normal((3, 2)), [], []
    theta = np.tile(theta / np.linalg.norm(theta), (4, 1, 1))
    for step in range(STEPS):
        before = theta
        theta, of_groups, _ = toy.descend(theta, alphas, elr)
        if step >= STEPS // 3:
            losses.append(of_groups)
            squares.append((before**2).sum(-1))
            flips = np.sign(theta[..., 0] / theta[..., 1])
            assert (flips == -np.sign(before[..., 0] / before[..., 1])).all()
    loss, square = np.mean(losses, 0), np.mean(squares, 0)
    assert loss == pytest.approx(np.outer(1 - 1 / factors, alphas / 2), rel=1e-4)
    assert loss.sum(-1) == pytest.approx((total - 1 / elr.ravel()) / 2, rel=1e-4)
    assert square == pytest.approx(np.tile(alphas / total, (4, 1)), rel=1e-4)


@pytest.mark.parametrize("alphas", CASES)
def test_regimes_and_levels_are_those_that_theory_says(alphas):
    """F within 3 % of the closed form up to 1,000 times the threshold, within 6 % for uneven α."""
    factors, total = [0.95, 1.2, 3.0, 30.0, 1000.0], sum(alphas)
    runs = toy.simulate(alphas, [factor / total for factor in factors], seeds=3, steps=6000)
    rows = [toy.row_of(run, total) for run in runs]
    expected = ["convergence", "equilibrium", "equilibrium", None, "divergence"]
    for i, row in enumerate(rows):
        regime = expected[i // 3]
        assert row["regime"] == regime or regime is None, row
        if factors[i // 3] > 1:
            near = 0.06 if max(alphas) > 4 else 0.03
            assert row["loss"] == pytest.approx(row["theory"], rel=near)
            assert row["skill"] == pytest.approx(1 / factors[i // 3], abs=0.04)


def test_a_random_point_has_half_the_sum_of_the_alphas_on_average():
    runs = toy.simulate([1.0, 2.0, 4.0], [1e-6], seeds=200, steps=10)
    values = np.array([run.log["train_loss"][0] for run in runs])
    assert abs(values.mean() - 3.5) < 5 * values.std() / 200**0.5
    assert values.std() == pytest.approx((21 / 8) ** 0.5, rel=0.15)  # what classify is told


def test_an_elr_is_taken_as_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "of_toy", NOTHING)
    assert toy.main(f"--elr 0.14285714 0.1234567 --steps 10 --out {tmp_path}".split()) == 0
    assert [row["elr"] for row in read(tmp_path / "toy.csv")] == ["0.1234567", "0.14285714"]


def test_a_sweep_brackets_the_threshold(tmp_path, capsys):
    command = "--alphas 5 1 1 --sweep 0.02 2 5 --refine 6 --steps 2000 --seeds 2"
    assert toy.main(words(command, tmp_path / "out")) == 0
    text = capsys.readouterr().out
    low, high = map(float, re.search(r"convergence \| chaotic .*: (\S+) to (\S+)", text).groups())
    assert low <= 1 / 7 <= high < 1.06 * low
    rows = read(tmp_path / "out" / "toy.csv")
    assert list(rows[0]) == ["elr", "seed", "regime", "loss", "theory", "skill"]
    assert {row["regime"] for row in rows} <= set(regimes.ORDER) | {"undecided"}
    assert (tmp_path / "out" / "toy.png").stat().st_size > 10_000


NUMBERS = "--alphas, --elr, --sweep: they take numbers from 1e-38"
GRID = "--sweep: it takes LO HI N"
LEAST = "--seeds, --refine, --steps: they are at least 1, 0, 10"


BAD = {"--alphas nan": NUMBERS, "--elr 0": NUMBERS, "--sweep 0 1 3": NUMBERS}
BAD |= {"--sweep 1 0.1 5": GRID, "--sweep 0.1 1 2.5": GRID}
BAD |= {"--elr 1 --sweep 0.1 1 5": "--sweep: not allowed with argument --elr"}
BAD |= {"--seeds 0": LEAST, "--steps 9": LEAST, "--refine -1": LEAST}


@pytest.mark.parametrize(("command", "message"), BAD.items())
def test_bad_arguments_are_one_line(tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, command, main=toy.main)
    assert not list(tmp_path.iterdir())
