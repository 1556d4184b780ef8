"""The rule on made logs whose regime an expert would not doubt; what is read and written."""

import json
import os
import re
import subprocess
import sys
from math import log as ln
from math import nan

import numpy as np
import pytest
from helpers import hovering, make_log, read, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

import regimes
from lab import figures, style
from regimes import ORDER, classify

CHANCE = {"points": 512, "train_loss": {"mean": 6.0, "std": 1.0}}
ALONE = dict(CHANCE)
CHANCE["train_error"] = {"mean": 0.9, "std": 0.08}
TURNING, STILL = 0.3, 0.002  # angles of a step
SLOW = "SLOW" in os.environ


def made(slope=0.0, noise=0.02, n=40, loss=1.5, angle=TURNING, error=None, seed=3):
    """A log as of train.py: a row before training, then n whose log loss has this slope. The error
    goes with the loss."""
    rng, epoch = np.random.default_rng(seed), np.arange(n + 1.0)
    losses = loss * np.maximum(epoch / n, 1e-9) ** -slope * np.exp(rng.normal(0, noise, n + 1))
    error = 0.15 * np.minimum(losses, 6) if error is None else error
    log = {"epoch": epoch, "step": 90 * epoch, "train_loss": losses, "angle": 0 * epoch + angle}
    log["train_error"] = np.clip(error + rng.normal(0, 0.004, n + 1), 0, 1)
    log["train_loss"][0], log["train_error"][0] = 6.0, 0.9
    return log


def named(log, chance=None):
    return classify(log, chance).regime


def less(log, *names):
    return {name: column for name, column in log.items() if name not in names}


def of_kind(kind, n, seed):
    """A log of n epochs of one kind, with noise that is white, correlated, spiky or heavy-tailed."""
    rng = np.random.default_rng(seed)
    noise, sort = rng.normal(0, rng.uniform(0.02, 0.12), n + 1), rng.integers(4)
    if sort == 1:
        noise[1:] = 0.7 * (noise[1:] + noise[:-1])
    elif sort == 2:
        noise += (rng.random(n + 1) < 0.05) * rng.uniform(0.2, 1, n + 1)
    elif sort == 3:
        noise = 0.04 * rng.standard_t(3, n + 1)
    how = {"loss": rng.uniform(0.2, 3.5)}
    if kind == "convergence":
        how = {"slope": rng.uniform(0.9, 2), "loss": 0.1, "angle": STILL}
    elif kind == "divergence":
        how = {"loss": rng.uniform(5.9, 7), "angle": 1.0, "error": 0.9}
    elif kind == "rising":
        how = {"slope": -rng.uniform(0.2, 0.8)}
    log = made(noise=0.0, n=n, seed=seed, **how)
    log["train_loss"][1:] *= np.exp(noise[1:])
    return log


LEVEL = np.round(made()["train_loss"][1:], 6)
KINDS = st.sampled_from([*ORDER, "rising"])


@settings(max_examples=1000 if SLOW else 25, deadline=None, derandomize=not SLOW)
@given(KINDS, st.integers(10, 400), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_a_made_regime_is_never_called_another_and_units_change_nothing(kind, n, seed, factor):
    log = of_kind(kind, n, seed)
    found = classify(log, CHANCE)
    assert found.regime in (kind, "undecided") or kind == "rising" != found.regime
    assert len(str(found)) <= 100 and (n < 100 or kind == found.regime or kind == "rising")
    more = log | {name: np.random.random(n + 1) for name in ("test_loss", "seconds", "radial")}
    scaled = CHANCE | {"train_loss": {"mean": 6.0 * factor, "std": factor}}
    for other, chance in (
        (more, CHANCE),
        ({**log, "epoch": log["epoch"] * factor}, CHANCE),
        ({**log, "train_loss": log["train_loss"] * factor}, scaled),
    ):
        verdict = classify(other, chance)
        assert verdict.regime == found.regime
        numbers = [verdict.slope, verdict.skill], [found.slope, found.skill]
        np.testing.assert_allclose(*numbers, rtol=1e-6, atol=1e-9)


# --- what a log does not show


@pytest.mark.parametrize("n", [8, 9, 10, 11, 12, 13, 16, 20, 40, 80])
def test_a_fall_without_noise_is_no_level_at_any_length(n):
    for angle in (TURNING, nan):
        assert named(made(0.45, 0.0, n, angle=angle), ALONE) == "convergence"
    log = {"epoch": np.arange(1.0, n + 1), "train_loss": np.geomspace(0.15, 0.0013, n)}
    assert named(log) == named(log, ALONE) == "convergence"


@pytest.mark.parametrize("rows", [4, 50])
def test_the_interval_of_a_slope_covers_it(rows):
    rng, x, inside = np.random.default_rng(0), np.log(np.arange(rows, 2 * rows)), 0
    for _ in range(600):
        slope, margin, *_ = regimes.trend(x, -0.7 * x + rng.normal(0, 0.1, rows))
        inside += abs(slope + 0.7) <= margin
    assert 588 <= inside < 600  # 99 % of 600, less two standard deviations


@pytest.mark.parametrize(("loss", "expected"), [(1.5, "equilibrium"), (6.0, "divergence")])
def test_a_level_is_a_regime_only_where_the_run_has_forgotten_its_start(loss, expected):
    """Else it may be a plateau, or a floor. Without angle or step that is not known, and said."""
    still = classify(made(loss=loss, angle=STILL, error=0.15 * loss), CHANCE)
    assert still.why.endswith("; twice the length may decide")
    assert still.regime == "undecided" and "has turned by only 0.085 rad" in still.why
    assert still.more_epochs == 80 and not still.notes
    for angle, regime in ((0.9, "undecided"), (1.1, expected)):  # of 0.7 rad in 1,800 steps
        log = made(loss=loss, angle=angle * 0.7 / 1800**0.5, error=0.15 * loss)
        assert named(log, CHANCE) == regime
    for unknown in (less(log, "angle"), less(log, "step"), {**log, "angle": np.full(41, nan)}):
        verdict = classify(unknown, CHANCE)
        assert verdict.regime == expected and "no angle or step: a plateau" in verdict.notes[-1]
    log["angle"][::3] = nan  # not logged in each row
    assert named(log, CHANCE) == expected and not classify(log, CHANCE).notes


SLOPES = """how it falls, its noise, angle: on both sides of each threshold
0.025 1e-4 0.002 convergence
0.015 1e-4 0.002 undecided, it falls by less than 0.02
0.16 1e-4 0.3 convergence
0.14 1e-4 0.3 equilibrium, less than 0.15, and within 0.2
0.19 0.1 0.3 equilibrium, -0.16 ± 0.09
0.27 0.15 0.3 undecided, -0.23 ± 0.14
-0.18 1e-3 0.3 equilibrium
-0.22 1e-3 0.3 undecided, it rises
0.05 0.4 0.3 equilibrium, +0.06 ± 0.37
0.1 0.5 0.3 undecided, +0.04 ± 0.46 may fall by 0.4
0.16 1e-4 nan convergence
0.14 1e-4 nan undecided
0.015 1e-4 nan equilibrium
0.025 1e-4 nan undecided, falls by 0.02: no level where no angle is logged
0.03 0.03 nan equilibrium, -0.02 ± 0.03
0.06 0.05 nan undecided, -0.05 ± 0.05
-0.09 1e-3 nan equilibrium
-0.11 1e-3 nan undecided, it rises
0.05 0.3 nan equilibrium, +0.03 ± 0.28
0.08 0.4 nan undecided, +0.03 ± 0.37 may fall by 0.3"""


@pytest.mark.parametrize("case", SLOPES.splitlines()[1:])
def test_thresholds_of_slopes(case):
    slope, noise, angle, expected = case.partition(",")[0].split()
    assert named(made(float(slope), float(noise), angle=float(angle)), ALONE) == expected


def test_all_windows_are_looked_at():
    early, late = made(noise=1e-3, n=80), made(noise=1e-3, n=80)
    late["train_loss"] *= np.maximum(1, late["epoch"] / 40) ** -0.3
    early["train_loss"][1:] *= np.maximum(1, 40 / late["epoch"][1:]) ** 0.5
    for log in (late, early):
        assert named(log | {"angle": np.full(81, STILL)}, ALONE) == "convergence"
        assert named(log, ALONE) == "equilibrium"
        verdict = classify(less(log, "angle"), ALONE)
        assert verdict.regime == "undecided" and verdict.slope < -0.1  # the one that says so
    middle = made(noise=0.0, n=24)  # the early one falls, the late one is not known
    middle["train_loss"] *= np.exp(0.15 * (-1) ** middle["epoch"] + (middle["epoch"] <= 6))
    assert classify(middle, ALONE).slope == pytest.approx(0.04, abs=0.01)


def test_many_rows_are_fitted_in_blocks():
    found = []
    for seed in range(40):
        walk = np.random.default_rng(seed).normal(0, 0.02, 801)
        for i in range(1, 801):
            walk[i] += 0.95 * walk[i - 1]
        log = made(noise=0.0, n=800, angle=STILL)
        log["train_loss"][1:] *= np.exp(walk[1:])
        found.append(classify(log, ALONE).regime)
    assert found.count("convergence") <= 6


SKILLS = """  of the loss, or of the error
loss   0.15  0.1  equilibrium
loss   0.06  0.1  divergence   a random walk may seem to have a skill of 0.1
loss   0.12  0.1  undecided    it may be less than 0.1
loss   0.12  2.0  undecided    noise of the reference hides it
loss   0.02  3.0  undecided
loss  -1.0   1.0  divergence
error  0.05  0.0  equilibrium
error  0.02  0.0  divergence"""


@pytest.mark.parametrize("case", SKILLS.splitlines()[1:])
def test_thresholds_of_skill(case):
    name, skill, std, expected, *_ = case.split()
    mean = {"loss": 1.5, "error": 0.225}[name] / (1 - float(skill))
    chance = {"points": 16, f"train_{name}": {"mean": mean, "std": float(std)}}
    verdict = classify(made(noise=1e-3), {"train_loss": {"mean": 1.0}} | chance)
    assert verdict.regime == expected and verdict.skill == pytest.approx(float(skill), abs=5e-3)
    assert ("too noisy: loss 1.5 (chance 1" in verdict.why) == (expected == "undecided")
    assert "too noisy" in classify(made(noise=0.3), {"train_loss": {"mean": 1.9}}).why  # its own


def test_next_to_nothing_is_convergence_without_a_slope():
    for loss, expected in ((0.9, "convergence"), (1.1, "undecided")):
        log = made(loss=loss * 0.003 * 6.0, angle=STILL)
        assert named(log, ALONE) == expected
        log["train_loss"][-1] = 0.003 * 6.0 * (3 - 2 * loss)  # the last row alone
        assert named(log, ALONE) == expected
    log = made(loss=0.004, noise=0, angle=STILL)
    log["train_loss"][-18::2] *= 10  # it hovers, although its median is next to nothing
    assert named(log, ALONE) == "undecided"


def test_a_uniform_prediction_far_below_a_random_points_loss_is_no_divergence():
    """The plateau of a transformer: loss ln 31 where a random point has 4.78, error at chance."""
    chance = {"points": 512, "train_loss": {"mean": 4.78, "std": 0.5}}
    chance["train_error"] = {"mean": 30 / 31, "std": 0.05}
    assert named(made(loss=ln(31), error=30 / 31), chance) == "equilibrium"


def test_guessing_the_most_frequent_class_is_no_skill():
    """A text at steps of 90°: loss 14, worse than chance, error 8 % better than a random point's."""
    log = made(noise=0.1, loss=14, angle=1.571, error=0.83)
    # After a step of 90° a point knows one batch: where that is measured, it is the reference.
    assert named(log, CHANCE) == "divergence"
    for error, expected in ((0.83, "divergence"), (0.95, "equilibrium")):
        stepped = {**CHANCE, "train_error": {"mean": error, "std": 0.05}}
        assert named(log, {**CHANCE, "stepped": stepped}) == expected
    log["angle"][:] = 1.4
    assert named(log, CHANCE) == "equilibrium"
    constant = classify(log, CHANCE | {"constant": {"train_error": 0.82, "train_loss": 2.3}})
    assert constant.regime == "divergence" and constant.why.endswith(" (chance 6)")


@pytest.mark.parametrize("kind", ORDER)
def test_a_log_of_losses_alone_is_classified_and_says_what_was_missing(kind):
    log = less(of_kind(kind, 60, 0), "train_error", "angle")
    verdict = classify(log, ALONE)
    assert verdict.regime == kind
    assert "judged by the loss alone: no train_error in [0, 1], or no chance of it" in verdict.notes
    verdict = classify(log)  # a row before training is one point: no chance
    assert verdict.regime == ("convergence" if kind == "convergence" else "undecided")
    assert verdict.more_epochs is None and "may decide" not in str(verdict)
    assert not verdict.notes
    for rows, few in ((3, 1), (7, 3), (8, 4)):
        short = classify({name: column[:rows] for name, column in log.items()}, CHANCE)
        said = f"too short: the last half has {few} of at least 4 rows" in str(short)
        assert said == (few < 4) and (few == 4 or short.more_epochs == max(2 * (rows - 1), 8))


def test_a_loss_without_a_logarithm_is_named():
    log = made()
    for row, loss in ((40, nan), (20, np.inf), (10, -0.3)):
        log["train_loss"][row] = loss
        verdict = classify(log, CHANCE)
        assert str(verdict) == f"undecided: the loss is {loss:g} in epoch {row}"
        assert verdict.broken == (loss != -0.3)


def test_a_dead_network_is_named_and_no_epoch_more_is_asked_for():
    log = made(noise=0.0, angle=0.0)
    log["grad_norm"] = np.where(log["epoch"] < 2, 8e9, 0.0)
    verdict = classify(log, CHANCE)
    assert "dead: the gradient is 0 since epoch 2, at loss 1.5; lower the" in str(verdict)
    assert verdict.broken and verdict.more_epochs is None
    assert "since epoch 0" in classify({**log, "grad_norm": np.zeros(41)}, CHANCE).why
    log["train_loss"][-1] = 0  # one batch, perhaps
    assert named(less(log, "grad_norm"), CHANCE) != "convergence"
    for zeros in (1, 3, 4):  # of gradients in the end: one alone is no death
        log = made() | {"grad_norm": 1.0 * (np.arange(41) <= 40 - zeros)}
        verdict = classify(log, CHANCE)
        assert ("dead" in verdict.why) == verdict.broken == (zeros == 4)
    log["grad_norm"][:] = 0
    for zeros in (2, 20, 39):  # a loss of 0 is convergence, whatever came before
        log["train_loss"][-zeros:] = 0
        assert named(log, CHANCE) == "convergence"
        assert named(less(log, "step", "grad_norm")) == "convergence"


@pytest.mark.parametrize("name", ["lr/pg0", "lr-AdamW/pg1", "lr_0", "learning_rate_1"])
def test_the_rate_of_any_param_group_is_looked_at(tmp_path, run, name):
    epoch = np.arange(1, 41)
    write(tmp_path / "a.csv", {"epoch": epoch, "loss": 1 + 0.01 * (-1) ** epoch, name: 1 / epoch})
    assert run(tmp_path / "a.csv", "--chance", "2.3")[1] == "a: LR 1 to 0.025, not a fixed one\n"


@pytest.mark.parametrize("name", ["elr", "lr"])
def test_a_rate_that_falls_in_the_log_is_not_a_fixed_one(name):
    log, warm, sparse = made(), np.full(41, 0.1), np.geomspace(0.1, 0.01, 41)
    warm[:3] = 0.01
    for fixed in (np.full(41, 0.1), warm, np.full(41, nan)):
        verdict = classify({**log, name: fixed}, CHANCE)
        assert verdict.regime == "equilibrium" and not verdict.moves
    sparse[[2, 39]] = nan  # not logged in each row
    verdict = classify({**log, name: sparse}, CHANCE)
    assert verdict.moves and str(verdict) == f"{name.upper()} 0.1 to 0.01, not a fixed one"
    assert classify({**log, name: np.linspace(0.1, 0.099, 41)}, CHANCE).moves


def test_an_error_in_percent_not_logged_or_without_chance_is_left_out():
    log = made()
    assert classify(log, CHANCE).why.startswith("error ")
    percent = {**log, "train_error": 100 * log["train_error"]}
    rare = {**log, "train_error": np.where(log["epoch"] % 3, nan, 0.9)}
    for other, chance in ((percent, CHANCE), (rare, CHANCE), (log, ALONE)):
        verdict = classify(other, chance)
        assert verdict.why.startswith("loss ")
        assert (
            "judged by the loss alone: no train_error in [0, 1], or no chance of it"
            in verdict.notes
        )


# --- folders, tables, command line


def write(path, columns):
    rows = zip(*columns.values(), strict=True)
    path.write_text(csv_text(",".join(columns), rows))


def csv_text(head, rows):
    return "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"


SWEEP = {1e-4: 0, 1e-3: 0, 2e-3: 0, 5e-3: 1, 1e-2: 1, 0.1: 2, 1.0: 2}
SWEEP = {elr: list(ORDER)[rank] for elr, rank in SWEEP.items()}


@pytest.fixture
def sweep(tmp_path):
    for seed, (elr, kind) in enumerate(SWEEP.items()):
        write(tmp_path / f"elr={regimes.elr_name(elr)}.csv", of_kind(kind, 60, seed))
    (tmp_path / "config.json").write_text(json.dumps({"chance": {"0": CHANCE}}))
    return tmp_path


@pytest.fixture
def run(capsys):
    """Exit status, output, lines of errors of regimes.py."""

    def run(*arguments):
        status = regimes.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def test_a_folder_gives_table_boundaries_and_rows(sweep, run):
    status, out, err = run(sweep)
    assert status == 0 and not err
    assert "convergence | chaotic equilibrium: 0.002 to 0.005 (×2.5)" in out
    assert "chaotic equilibrium | divergence: 0.01 to 0.1 (×10)" in out
    assert {float(row["elr"]): row["regime"] for row in read(sweep / "regimes.csv")} == SWEEP
    assert run(sweep)[0] == 0  # its own files are no logs


def test_a_folder_on_a_read_only_medium_gets_its_table_and_one_line(sweep, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system", "regimes.csv")

    monkeypatch.setattr(regimes, "write_whole", refuse)
    with pytest.raises(SystemExit, match="^error: regimes.csv: Read-only file system$"):
        regimes.finish(lambda: regimes.main([str(sweep)]))
    assert "0.002 to 0.005" in capsys.readouterr().out


def test_damaged_files_are_named_and_the_others_still_reported(sweep, run):
    path, bad = sweep / "elr=1e-02.csv", [sweep / "elr=3.csv", sweep / "nowhere.csv"]
    bad[0].write_text("epoch,val_loss\n1,2\n")
    good = path.read_text()
    path.write_text(good[: good.rindex(",")])
    status, out, err = run(sweep, bad[1])
    assert status == 2 and not (sweep / "regimes.csv").exists()  # not of one folder
    for line, name in zip(err, bad, strict=True):
        assert str(name) in line
    assert out.count("convergence ") >= 3 and "    1e-02  chaotic equilibrium" in out
    assert regimes.read_log(path)["epoch"][-1] == 59  # a last row that is cut off is left out


def test_an_empty_folder_is_one_line(tmp_path, run, capsys):
    assert len(run(tmp_path)[2]) == 1
    assert figures.main([str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["nonsense", '{"chance": {"0": {"points": 0}}}'])
def test_a_damaged_config_is_named_and_no_run_classified_by_another_chance(sweep, run, text):
    (sweep / "config.json").write_text(text)
    status, out, (line,) = run(sweep)
    assert status == 2 and "config.json is damaged" in line and not out.strip()
    status, out, _ = run(sweep, "--chance", "6")
    assert status == 0 and "divergence" in out


LETTERS = {"c": "convergence", "e": "equilibrium", "d": "divergence"}


BOUNDARIES = """letters of the seeds at ELRs 1, 2, … (b: broken): the two boundaries; 0: not seen
ccc ccc eee ddd: 23 34
ccc cce ecc eee ddd: 14 45 seeds disagree
ccc ccu uuu eee ddd: 14 45 or are undecided
uuu ccc eee ueu: 23 30 elsewhere they may be
c e c e d: 14 45 out of order
e e b b: 01 23 what broke down lies above"""


@pytest.mark.parametrize("case", BOUNDARIES.splitlines()[1:])
def test_a_boundary_spans_the_elrs_at_which_seeds_disagree(case):
    seeds, expected = (part.split() for part in case.split(":"))
    runs = []
    for elr, letter in [(elr, letter) for elr, of in enumerate(seeds, 1) for letter in of]:
        verdict = regimes.Verdict(LETTERS.get(letter, "undecided"), broken=letter == "b")
        runs.append(regimes.Logged(None, elr, 0, {}, verdict))
    for boundary, ends in zip(regimes.boundaries(runs), expected[:2], strict=True):
        assert ends == "".join(f"{x:.0f}" for x in np.nan_to_num([boundary.low, boundary.high]))
        assert boundary.seen == ("0" not in ends)


def test_half_of_the_seeds_are_no_majority():
    runs = [regimes.Logged(None, 1, i, {}, regimes.Verdict(LETTERS["cede"[i]])) for i in range(4)]
    for first, regime in ((0, "undecided"), (1, "equilibrium")):
        assert regimes.majority(runs[first:]) == (regime, 2)


def test_several_seeds_are_summed_up_by_median_and_majority(tmp_path, run):
    kinds = ["convergence"] * 3 + ["equilibrium"] * 2 + ["convergence"]
    for i, kind in enumerate(kinds):
        name = f"elr=1e-0{3 - i // 3}" + (f".seed={i % 3}" if i % 3 else "")
        write(tmp_path / f"{name}.csv", of_kind(kind, 60, i))
    chance = {"chance": {str(seed): CHANCE for seed in range(3)}}
    (tmp_path / "config.json").write_text(json.dumps(chance))
    _, out, _ = run(tmp_path)
    assert "convergence | chaotic equilibrium: 0.001 to – (not seen)" in out and " 2/3 " in out
    rows = [row for row in read(tmp_path / "regimes.csv") if row["elr"] == "0.01"]
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert f" {np.median([float(row['train_loss']) for row in rows]):.4g} " in out
    _, out, _ = run(*sorted(tmp_path.glob("elr*.csv"))[:2])  # files: a line each, with the evidence
    level, other = out.splitlines()
    assert re.match(r"elr 1e-02: chaotic equilibrium: error 0\.\d+ \(chance 0\.9\), level", level)
    assert other.startswith("elr 1e-02 seed 1: chaotic equilibrium: ")


def test_runs_whose_elr_moves_are_summed_up_by_what_was_set(tmp_path, run):
    epoch, nans = np.arange(5.0), np.full(5, nan)
    log = {"epoch": epoch, "step": epoch, "elr": [0.1, 0.009, 0.005, 0.002, 0.001]}
    log["train_loss"] = [6, 2, 1, 0.5, 0.1]

    def write_seeds(name, *errors, **columns):
        for seed, error in zip(("", ".seed=1"), errors, strict=False):
            path = tmp_path / f"{name.replace('SEED', seed)}.csv"
            write(path, log | {"test_error": np.full(5, error)} | columns)

    write_seeds("angle=1e-01SEED", 0.01, 0.02)
    write_seeds("angle=5e-02SEED", 0.02, 0.04)
    write(tmp_path / "other.csv", {"epoch": epoch, "train_loss": epoch, "lr": 1 / (1 + epoch)})
    line, other, unknown, best = run(tmp_path)[1].splitlines()  # by value, not by name
    of_seeds = "test error 0.0300 ± 0.0100 (2 seeds), train loss 0.1, ELR 0.001 to 0.1"
    assert line == f"angle 5e-02: {of_seeds}" and other.startswith("angle 1e-01: test error 0.0150")
    assert unknown == "other: LR 1 to 0.2, not a fixed one" and best == "best: angle 1e-01"
    rows = read(tmp_path / "regimes.csv")
    assert [row["regime"] for row in rows] == ["not fixed"] * 4
    assert {row["elr_min"] for row in rows} == {"0.001"} and rows[0]["run"] == "angle 1e-01"
    write_seeds("angle=2e-01", nan, elr=nans)
    write_seeds("angle=1e-01SEED.then=1e-02", 0.001, 0.003, elr=nans)
    lines = run(tmp_path)[1].splitlines()
    assert "angle 2e-01: 1 of 1 broke down: nan" in lines
    assert "angle 1e-01, then 1e-02: test error 0.0020 ± 0.0010 (2 seeds)" in lines
    assert lines[-1] == "best: angle 1e-01, then 1e-02"


# --- other people's logs


LOSSES = np.round(2.0 / np.arange(1, 25) ** 1.2, 6)  # falls


wandb = "my-run - with a dash-1 - train/loss"
OTHERS = {  # head, the rows of epoch {i} with loss {x}, what follows
    "keras": ("epoch,accuracy,loss,val_loss", "{i},0.5,{x},0.8", ""),
    "trainer_state": (  # evaluations between, a summary in the end
        '{"best_metric": null,\n"log_history": [',
        '{{"epoch": {i}.0, "loss": {x}, "grad_norm": null, "step": 5}}, {{"epoch": {i}, "eval": 2}},',
        '{"epoch": 99.0, "train_loss": 0.7, "train_runtime": 99.5}]}',
    ),
    "pandas": (  # DataFrame(log_history).to_csv()
        ",epoch,loss,step,eval_loss,train_loss,train_runtime",
        "8,{i},{x},5,,,\n9,{i},,5,2.0,,",
        "9,99,,,,0.7,99.5",
    ),
    "mmengine": (
        "",
        '{{"lr": 0.01, "loss": {x}, "epoch": {i}, "iter": 5}}',
        '{"accuracy/top1": 71.0, "iter": 3}',  # of a test: it counts anew
    ),
    "keras history": ("", "", ""),  # one object of lists
    "detectron": ("", '{{"iteration": {i}.5, "total_loss": {x}}}', ""),
    "lightning": (  # rows of the learning rate alone have no epoch
        "epoch,lr-SGD,step,train_loss_epoch,train_loss_step,val_loss",
        ",0.1,5,,,\n{i},,5,,0.7,\n{i},,5,,,0.7\n{i},,5,{x},,",
        "",
    ),
    "wandb chart": (f'"Step","{wandb}","{wandb}__MIN","my-run - _step"', "{i}0,{x},{x},{i}", ""),
    "wandb history": (
        ",_runtime,_step,_timestamp,epoch,train/loss,val/loss",
        "{i},1.5,{i},1732700000.5,{i},{x},",
        "",
    ),
    "history": (",loss,accuracy", "{i},{x},0.5", ""),  # the epoch is the index
    "tensorboard": ("Wall time,Step,Value", "1654943296.2,{i},{x}", ""),
}


def written(name, losses):
    if name == "keras history":
        return json.dumps({"loss": [*losses], "val_loss": [1.0], "lr": [0.1] * len(losses)})
    head, rows, tail = OTHERS[name]
    return "\n".join([head, *(rows.format(i=i, x=x) for i, x in enumerate(losses)), tail])


@pytest.mark.parametrize("name", OTHERS)
def test_other_peoples_logs_are_read_and_their_epoch_0_is_no_chance(tmp_path, run, name):
    path = tmp_path / "log.csv"
    path.write_text(written(name, LOSSES))
    words = ["--columns", "train_loss=Value"] if name == "tensorboard" else []
    log = regimes.read_log(path, {"train_loss": "Value"} if words else {})
    assert np.array_equal(log["train_loss"], LOSSES) and len(set(np.diff(log["epoch"]))) == 1
    stuck = ln(2) + (LEVEL - 1.5) / 20
    for losses, chance, expected in (
        (LOSSES, [], "convergence"),
        (LEVEL, [], "undecided: equilibrium and divergence look alike"),
        (LEVEL, ["--chance", "2.303"], "chaotic equilibrium"),
        (stuck, ["--chance", "0.6931"], "divergence"),
    ):
        path.write_text(written(name, losses))
        status, out, _ = run(path, *words, *chance)
        assert status == 0 and out.startswith(f"log: {expected}")


def test_epochs_may_be_counted_from_0():
    """A row of epoch 0 is before training only where step says 0."""
    log = less(made(), "step")
    for steps in ({}, {"step": made()["step"] + 90}, {"step": np.full(41, nan)}):
        counted = classify(log | steps | {"epoch": log["epoch"] + 1}, CHANCE)
        assert classify(log | steps, CHANCE).slope == counted.slope
    assert classify(made(), CHANCE).slope != counted.slope


VARIANTS = {
    "semicolons": lambda text: text.replace(",", ";"),
    "tabs": lambda text: text.replace(",", "\t"),
    "byte order mark": lambda text: "\ufeff" + text,
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: "\n" + text.replace("\n3,", "\n\n3,"),
    "spaces": lambda text: text.replace(",", ", "),
    "decimal commas": lambda text: text.replace(",", ";").replace(".", ","),
    "null": lambda text: text.replace(",0.8\n", ",null\n").replace("22,0.5", "22,None"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 of big ends, without a mark": lambda text: text.encode("utf-16-be"),
    "quotes": lambda text: '"' + text.replace(",", '","').replace("\n", '"\n"')[:-1],
    "no newline in the end": str.rstrip,
    "not yet": lambda text: text + "24,0.9,,0.8\n",
    "cut off": lambda text: text + "24,0.9,0.0",
    "a column of words": lambda text: text.replace("accuracy", "time").replace(",0.5,", ",10:03,"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_csv_file_may_be_written_in_many_ways(tmp_path, variant):
    text = VARIANTS[variant](written("keras", LOSSES))
    (tmp_path / "log.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    log = regimes.read_log(tmp_path / "log.csv", {"test_error": "val_loss"})
    assert np.array_equal(log["train_loss"], LOSSES)
    assert np.array_equal(log["epoch"], np.arange(24.0))
    assert np.isnan(log["test_error"]).all() == (variant == "null")


@pytest.mark.parametrize("text", ['{"loss": 2, "epoch": 0}\n', '[{"loss": 2, "epoch": 0},\n'])
def test_json_of_a_run_that_still_writes_is_read_without_the_last_line(tmp_path, text):
    path, last = tmp_path / "log.jsonl", '{"loss": 1, "of": {"each": {"lr": [0.1]}}, "epoch": 1}'
    for end in range(len(last)):
        path.write_text(text + last[:end])
        assert regimes.read_log(path)["train_loss"].tolist() == [2]
    path.write_text(text + last + "]" * text.startswith("["))
    assert regimes.read_log(path)["train_loss"].tolist() == [2, 1]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_that_is_cut_off_is_read_as_far_as_it_is_whole(tmp_path, indent):
    path, rows = tmp_path / "log.jsonl", [{"loss": 3 - e, "epoch": e} for e in range(3)]
    text = json.dumps(rows, indent=indent)
    for end in range(text.rindex("}")):
        path.write_text(text[:end])
        whole = 2 if end > text.index("}", text.index("}") + 1) else end > text.index("}")
        if whole:
            assert regimes.read_log(path)["train_loss"].tolist() == [3, 2][:whole]


@pytest.mark.filterwarnings("error")
def test_a_huge_loss_overflows_nowhere_and_percent_are_read(tmp_path, run):
    def percent(e):
        return f"{89 + e % 2}{' ' * (e % 2)}%"

    make_log(tmp_path / "log.csv", lambda e: 1e300 * hovering(e), error=percent)
    status, out, err = run(tmp_path / "log.csv", "--chance", "2.3", "0.9")
    assert status == 0 and not err and "divergence" in out and "error 0.895 (chance 0.9)" in out


def test_angles_and_steps_of_others_are_asked_for_the_turn(tmp_path, run):
    rows = [(e, 9 * e, x, 0.01) for e, x in enumerate(LEVEL, 1)]
    for head, note in (
        ("epoch,step,loss,train/angle", ""),
        ("epoch,s,loss,a", "no angle or step"),
        ("epoch,step,loss,angle", "no angle or step"),
    ):
        if head.endswith("loss,angle"):  # the steps of an epoch, always the same
            rows = [(e, 100, x, angle) for e, _, x, angle in rows]
        (tmp_path / "log.csv").write_text(csv_text(head, rows))
        out = run(tmp_path / "log.csv", "--chance", "2.303")[1]
        assert ("has turned by only 0.13 rad" in out) == (not note) and note in out


REFUSED = r"""the file | what the line says: the cure first
epoch,loss,loss\n1,2,3 | name one column train_loss, or say --columns train_loss=COLUMN: epoch, loss
epoch,loss,lr,lr\n1,2,0,1 | --columns lr=COLUMN: epoch, loss, lr, lr
Step,a - loss,b - loss\n1,2,3 | --columns train_loss=COLUMN: Step, a - loss, b - loss
loss\n1 | --columns epoch=COLUMN: loss
0,2.3\n1,2.2 | --columns epoch=COLUMN: 0, 2.3
epoch,loss\n1,"1,234" | line 2: could not convert string to float: '1,234'
epoch,loss\n1,2\nnan,3 | line 3: one run a file: epoch nan comes after 1
epoch,loss\n1,2\n,3 | line 3: drop a row, or say --columns epoch=STEPS: epoch 1 again
epoch,loss\n-1,2\n0,3 | line 2: one run a file: epoch -1 comes after 0
epoch,loss\n0,3\n1,2\n0,3 | line 4: one run a file: epoch 0 comes after 1
epoch,loss\n0,3\n1,2\n1,2.1\n2,1 | line 4: drop a row
epoch,loss\n0,3\nepoch,loss\n0,3 | line 3: could not convert string to float: 'epoch'
\x1f\x8b\x08 | 'utf-8' codec can't decode byte 0x8b
 | --columns epoch=COLUMN: there is nothing
epoch,loss\n0,\n1, | line 3: no row with a loss
epoch,loss\n0,1,2\n1,2 | line 2: more cells than columns
{"epoch": 1, "loss": true} | line 1: could not convert string to float: 'True'
[1, 2, 3] | line 1: it takes objects like {"loss": 2.3}
{"a": 1} | --columns train_loss=COLUMN: a
epoch;step;loss\n1;1.100;2,3 | line 2: could not convert string to float: '2,3'
{"epoch": 1, "lo | line 1: Unterminated string
{"epoch": 1, "loss": 2}\n\n{"epoch"}\n{"epoch": 2} | line 3: Expecting ':' delimiter
epoch,loss,angle\n0,3,0.1\n1,2,3.15 | line 3: angles are radians in [0, π]
epoch,loss,angle\n0,3,0.1\n1,2,-0.1 | line 3: angles are radians in [0, π]
epoch,loss,step\n0,3,9\n1,2,8 | line 3: one run a file: step 8 comes after 9"""


@pytest.mark.parametrize("case", REFUSED.splitlines()[1:])
def test_what_cannot_be_read_is_refused_in_one_line_with_the_cure(tmp_path, run, case):
    text, message = case.split(" | ")
    text = text.encode().decode("unicode_escape")
    (tmp_path / "log.csv").write_bytes(text.encode("latin-1"))
    status, out, (line,) = run(tmp_path / "log.csv")
    assert status == 2 and not out.strip()
    assert "log.csv: " in line and message in line


def test_columns_are_named_on_the_command_line(tmp_path, run):
    path = tmp_path / "log.csv"
    rows = [(i, i, loss, 1 - loss / 3, 2 * loss) for i, loss in enumerate(LOSSES)]
    path.write_text(csv_text("Epoch,it,a - loss,b - loss,g", rows))
    words = "--columns", "train_loss=a - loss", "epoch=Epoch", "grad_norm=g"
    assert run(path, *words)[1].startswith("log: convergence: ")
    columns = {"train_loss": "a - loss", "step": "it", "epoch": "it", "grad_norm": "g"}
    log = regimes.read_log(path, columns)
    assert np.array_equal(log["step"], log["epoch"]) and log["grad_norm"][3] == 2 * LOSSES[3]
    status, _, (line,) = run(path, "--columns", "train_loss=c")
    assert status == 2 and "--columns train_loss=COLUMN: Epoch, it, " in line


BAD = "--columns|loss=train_loss --columns|log.csv --columns|train_loss --columns|train_loss= "
BAD += "--chance|x --chance|0 --chance|nan --chance|inf --chance|2.3|90 --chance|2.3|0.9|0.5"


@pytest.mark.parametrize("words", BAD.split())
def test_bad_options_are_one_line(capsys, words):
    error = refused(capsys, ["log.csv", *words.split("|")], main=regimes.main)
    assert f"argument {words.partition('|')[0]}: " in error


def test_the_regimes_are_told_apart_in_grey():
    grey = []
    for name in ("convergence", "undecided", "equilibrium", "divergence"):
        luminance = np.dot(to_rgb(style.COLOURS[name]), (0.299, 0.587, 0.114))
        grey.append(1 - style.SHADES[name] * (1 - luminance))  # over white
    assert (np.diff(grey) < -0.03).all()


def test_ctrl_c_while_numpy_is_imported_is_no_traceback(tmp_path):
    """It kills the process as long as no handler is there."""
    (tmp_path / "numpy.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    command = [sys.executable, regimes.__file__, "x"]
    found = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert found.returncode == -2 and not found.stderr
