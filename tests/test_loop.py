"""The loop of the ELR: made loops of which the truth is known, and the command itself."""

import os
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from helpers import SUMS, read, run, words

import regimes
from lab import figures
from lab.experiment import what_next
from lab.loop import Loop, classify_loop, is_loop
from lab.options import parse
from lab.schedules import grid, leg

SLOW = "SLOW" in os.environ
KINDS = ["reversible", "hysteretic", "continuous", "never learned", "noisy", "no equilibrium"]
KINDS += ["no divergence", "nan at the top", "no melting", "steep equilibrium", "cliff"]


def made(rng, kind):
    """A loop, its chance reference, and the truth. The equilibrium's loss is a power of the ELR; from
    `freeze` on down it falls more steeply to the frozen level, up to `melt` it stays there. With
    the loss the weights come to rest. A steep equilibrium falls next to divergence, and hovers."""
    chance, slope = rng.uniform(2.5, 8), rng.uniform(3, 7)
    low, high = 10 ** rng.uniform(-5.5, -4), 10 ** rng.uniform(-0.5, 0.3)
    n, passes = int(rng.integers(16, 41)), int(rng.choice([1, 1, 2, 4]))
    elrs = np.geomspace(low, high, n)
    x, cell = np.log(elrs), np.log(elrs[1] / elrs[0])
    width = x[-1] - x[0]
    divergence = np.exp(rng.uniform(x[0] + 0.6 * width, x[-1] - 3.2 * cell))
    freeze = np.exp(rng.uniform(x[0] + 0.25 * width, np.log(divergence) - max(1.5, 3 * cell)))
    power, frozen = rng.uniform(0.3, 1), chance * 10 ** rng.uniform(-4, -2.7)
    if kind == "cliff":  # it freezes within a cell
        slope = 100
    melt = freeze
    if kind in ("hysteretic", "noisy", "cliff"):
        melt = min(freeze * np.exp(rng.uniform(0, 2)), divergence / 1.3)
    if kind == "no melting":
        melt = 2 * high

    def level(elr):
        top = 2 * high if kind == "no divergence" else divergence
        return chance * min(1, elr / top) ** power

    def loss_at(way, elr):
        if kind == "steep equilibrium":
            steep_from = divergence * np.exp(-1.2)
            fall = np.clip(elr, steep_from, divergence) / divergence
            return chance * fall**slope * min(1, elr / steep_from) ** power
        if kind == "no equilibrium":
            return chance if elr >= divergence else frozen
        if kind == "never learned":
            return chance if elr >= divergence else chance / 1.6
        if kind == "continuous" or (way == "up" and elr > melt):
            return level(elr)
        if way == "up" and kind in ("hysteretic", "noisy", "no melting", "cliff"):
            return min(frozen, level(elr))
        return max(level(elr) * min(1, elr / freeze) ** slope, min(frozen, level(elr)))

    noise = rng.uniform(0.15, 0.35) if kind == "noisy" else rng.uniform(0.02, 0.12)
    steps, hovering = 100 * passes, rng.uniform(1, 4)  # turn at an ELR
    rows = [(0, 0, high, chance, 0.9, 1.0)]
    for epoch in range(passes * (2 * n - 1)):
        way, elr = leg(elrs, passes, epoch)
        clean = loss_at(way, elr)
        spread = 0.02 if clean > 0.97 * chance else noise
        share = 1 if kind == "never learned" else clean / chance
        error = np.clip(0.9 * share**0.7 + 0.006 * rng.standard_normal(), 0, 1)
        loss = clean * np.exp(spread * rng.standard_normal())
        turn = hovering if kind == "steep equilibrium" else hovering * clean / level(freeze)
        angle = min(turn / np.sqrt(steps), 1.57)
        rows.append((epoch + 1, 100 * (epoch + 1), elr, loss, error, angle))
    columns = ("epoch", "step", "elr", "train_loss", "train_error", "angle")
    log = dict(zip(columns, np.array(rows).T, strict=True))
    if kind == "nan at the top":
        log["train_loss"][1] = np.nan
    reference = {"train_loss": {"mean": chance, "std": 0.5}, "points": 512}
    reference["train_error"] = {"mean": 0.9, "std": 0.05}
    steep_to = freeze * (frozen / level(freeze)) ** (1 / slope)
    truth = dict(cell=np.exp(1.01 * cell + 0.1), divergence=divergence, freeze=freeze, melt=melt)
    truth |= {"steep_to": min(steep_to, freeze), "melts_at": level(melt) / chance}
    return log, reference, truth


def wrong_names(found, kind, truth):
    wrong, cell = [], truth["cell"]
    if kind == "no melting" and (found.melts or found.divergence or found.reversible):
        wrong.append("no melting")

    def misses(interval, low, high):
        return interval and (interval[1] * cell < low or interval[0] / cell > high)

    if kind == "nan at the top":
        return [] if "not finite" in found.problem and not found.freezes else ["nan"]
    if kind not in ("no divergence", "no melting"):
        if misses(found.divergence, truth["divergence"], truth["divergence"]):
            wrong.append("divergence")
    elif found.divergence and found.divergence[1] < truth["divergence"]:
        wrong.append("divergence")
    if kind in ("never learned", "continuous", "no equilibrium", "steep equilibrium"):
        if found.metastable or (kind != "no equilibrium" and (found.freezes or found.melts)):
            wrong.append("freezing")
        if kind == "never learned" and "not learned" not in found.problem:
            wrong.append("learned")
        return wrong
    if misses(found.freezes, truth["steep_to"], truth["freeze"]):
        wrong.append("freezes")
    gradual = kind in ("reversible", "no divergence")
    visible = truth["melts_at"] > 0.01  # else the loss stays negligible above the melting point
    lowest = truth["steep_to"] if gradual else truth["melt"]
    if visible and misses(found.melts, lowest, truth["melt"]):
        wrong.append("melts")
    if found.metastable and gradual:
        wrong.append("metastable")
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_made_loops_are_not_named_what_they_are_not(kind):
    """SLOW=1: none of 10,000."""
    draws, seen = 1250 if SLOW else 30, 0
    for seed in range(draws):
        log, chance, truth = made(np.random.default_rng([7, KINDS.index(kind), seed]), kind)
        found = classify_loop([log], chance)
        seen += bool(found.freezes if kind == "cliff" else found.metastable)
        assert ("no melting" in str(found)) <= (kind == "no melting")
        assert not wrong_names(found, kind, truth), (seed, found, truth)
    assert (seen > draws / 3) == (kind in ("hysteretic", "noisy", "no melting", "cliff"))


def test_where_a_seed_stays_frozen_nothing_is_reversible():
    seen = 0
    for seed in range(12):
        melts, chance, _ = made(np.random.default_rng(seed), "hysteretic")
        stays, *_ = made(np.random.default_rng(seed), "no melting")
        found = classify_loop(9 * [melts] + [stays], chance)
        seen += bool(found.melts and found.unmelted)
        assert not (found.unmelted and found.reversible), (seed, found)
    assert seen > 4


def test_what_a_coarse_grid_cannot_show_is_no_agreement_and_no_melting_below_freezing():
    down = [6.3, 4.9, 3.71, 0.755, 0.05, 0.013, 0.006, 0.004]  # as of --loop 1e-3 0.1 8 on digits
    up = [0.0035, 0.004, 0.02, 0.546, 2.79, 4.6, 6.2]
    elrs = grid(1e-3, 0.1, 8)
    log = {
        "elr": np.array([0.1, *elrs[::-1], *elrs[1:]]),
        "train_loss": np.array([6.5, *down, *up]),
    }
    log["epoch"] = np.arange(16.0)
    found = classify_loop([log], {"train_loss": {"mean": 6.5}})
    assert found.freezes and not found.reversible
    assert not found.melts or found.melts[1] > found.freezes[0]


def test_one_angle_that_is_nan_lets_no_fall_from_divergence_be_freezing():
    for seed in range(20):
        log, chance, _ = made(np.random.default_rng(seed), "steep equilibrium")
        log["angle"][log["elr"].argmin()] = np.nan
        assert not classify_loop([log], chance).freezes, f"seed {seed}"


def test_the_first_learning_is_no_freezing():
    # As of --loop 1e-4 2e-3 8 on digits
    down = [0.705, 0.065, 0.036, 0.027, 0.022, 0.02, 0.019, 0.018]
    up = [0.018, 0.017, 0.017, 0.016, 0.015, 0.014, 0.013]
    elrs = grid(1e-4, 2e-3, 8)
    log = {
        "elr": np.array([2e-3, *elrs[::-1], *elrs[1:]]),
        "train_loss": np.array([6.5, *down, *up]),
        "angle": np.array([0.03, 0.08, *np.geomspace(0.02, 2e-4, 14)]),
    }
    log["epoch"] = np.arange(16.0)
    log["step"] = 89 * log["epoch"]
    chance = {"train_loss": {"mean": 6.5}}
    found = classify_loop([log], chance)
    assert not (found.freezes or found.melts or found.metastable or found.unmelted)
    assert "begin at a larger one" in str(found)
    del log["angle"]  # which alone tells
    assert classify_loop([log], chance).freezes


def test_a_network_that_dies_is_not_told_to_train_longer():
    log, chance, _ = made(np.random.default_rng(0), "never learned")
    log["grad_norm"] = np.where(log["epoch"] < 3, 1.0, 0.0)
    said = str(classify_loop([log], chance))
    assert f"dead: the gradient is 0 from ELR {log['elr'][3]:.3g} on" in said
    assert "more passes" not in said


def test_what_follows_a_loop_are_the_elrs_beside_freezing(tmp_path):
    config = parse(words("--loop --momentum 0.5 --epochs 4"))
    config.out, named = tmp_path, 0
    for seed in range(20):
        log, chance, _ = made(np.random.default_rng(seed), "hysteretic")
        path, moves = tmp_path / "loop=0.0001-1x25x4.csv", regimes.Verdict(moves=True)
        loop = regimes.Logged(path, np.nan, 0, log, moves, chance)
        faster = replace(loop, path=tmp_path / "loop=0.0001-1x25.csv", log={})
        *others, angle = (parse(shlex.split(x)[2:]) for x in what_next(config, [faster, loop]))
        assert angle.angle == [0.05] and angle.momentum == 0.5
        freezes = classify_loop([log], chance).freezes
        assert len(others) == (2 if freezes else 0), f"seed {seed}"
        if freezes:
            named, (first, then) = named + 1, others
            assert [*first.elr, *then.elr] == pytest.approx(freezes, rel=1e-5)
            assert then.then == pytest.approx(freezes[0] / 10, rel=0.06)
            assert first.momentum == then.momentum == 0.5
    assert named > 9
    assert len(what_next(config, [faster])) == 1  # this loop is not there


def test_a_loop_is_trained_drawn_and_read_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "of_loop", lambda runs, path: path.write_bytes(b"PNG"))
    command = f"--loop 1e-3 1 8 {SUMS} --seeds 2"
    assert run(command, tmp_path) == 0
    out, elrs = capsys.readouterr().out, grid(1e-3, 1, 8)
    rows = read(tmp_path / "loop=0.001-1x8.csv")
    assert [float(row["elr"]) for row in rows] == [1.0, *elrs[::-1], *elrs[1:]]
    assert [row["leg"] for row in rows] == ["down"] * 9 + ["up"] * 7
    assert (tmp_path / "loop=0.001-1x8.png").exists() and "loop=0.001-1x8.png" in out
    (told,) = re.findall("^loop 0.001-1x8, 2 seeds: .*$", out, re.M)
    assert regimes.main([str(tmp_path)]) == 0
    assert told in capsys.readouterr().out.splitlines()
    assert run(command, tmp_path) == 0
    assert capsys.readouterr().out.count("(already done)") == 2


def test_a_single_metastable_elr_is_said_as_one():
    found = str(Loop(freezes=(0.002, 0.007), metastable=(0.00464, 0.00464)))
    assert "metastable at 0.00464: at this speed" in found
    found = str(Loop(freezes=(0.002, 0.007), metastable=(0.00464, 0.01)))
    assert "metastable from 0.00464 to 0.01: at this speed" in found


def test_only_what_falls_and_rises_is_a_loop():
    down = np.geomspace(1, 1e-3, 9)
    assert is_loop({"elr": np.concatenate([down[:1], down, down[-2::-1]])})
    assert not is_loop({"elr": np.concatenate([down[:1], down, down])})
    assert not is_loop({"elr": np.full(30, 0.1)}) and not is_loop({})
