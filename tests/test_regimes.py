"""The rule on made logs whose regime an expert would not doubt, and the files that are read and written."""

import csv
import json
import math
import os
import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

import regimes
from lab import figures
from regimes import ORDER, classify

CHANCE = {
    "points": 512,
    "train_loss": {"mean": 6.0, "std": 1.0},
    "train_error": {"mean": 0.9, "std": 0.08},
}
ALONE = {"points": 512, "train_loss": CHANCE["train_loss"]}
TURNING, STILL = 0.3, 0.002  # angles of a step
SLOW = "SLOW" in os.environ
many = settings(max_examples=1000 if SLOW else 50, deadline=None, derandomize=not SLOW)


def noise(rng, n, sd, r):
    """Stationary noise with autocorrelation r of lag 1."""
    x = rng.normal(size=n)
    for i in range(1, n):
        x[i] = r * x[i - 1] + math.sqrt(1 - r * r) * x[i]
    return sd * x


def log_of(rng, loss, angle=TURNING):
    """A log as train.py writes it: a train error that goes with the loss, a row before training."""
    error = 0.9 * (1 - np.exp(-0.5 * loss)) / (1 - math.exp(-3)) + rng.normal(0, 0.004, len(loss))
    loss, error = np.insert(loss, 0, 6.0), np.insert(np.clip(error, 0, 1), 0, 0.9)
    epoch = np.arange(len(loss), dtype=float)
    log = {"epoch": epoch, "step": 90 * epoch, "train_loss": loss, "train_error": error}
    return log | {"angle": np.full(len(epoch), angle)}


def less(log, *names):
    return {name: column for name, column in log.items() if name not in names}


def power_law(rng, t):
    return rng.uniform(0.5, 5) * t ** -rng.uniform(0.8, 2) * np.exp(noise(rng, len(t), 0.1, 0.3))


def equilibrium(rng, t):
    level, start = rng.uniform(0.1, 3), 3 * np.exp(-t / len(t) * 20)
    return level * np.exp(noise(rng, len(t), rng.uniform(0.05, 0.2), rng.uniform(0, 0.6))) + start


def quiet(rng, t):
    return 1.5 * np.exp(noise(rng, len(t), 0.05, 0.3))


def catapult(rng, t):
    peak = rng.uniform(0.05, 0.15) * len(t)
    after = 2 * (t / peak) ** -1.5 * np.exp(noise(rng, len(t), 0.1, 0.3))
    return 12 * np.exp(-((np.log(t / peak)) ** 2)) + after


def late_escape(rng, t):
    escape = rng.uniform(0.5, 0.7) * len(t)
    fall = np.maximum(t / escape, 1) ** -rng.uniform(4, 10)
    return rng.uniform(0.5, 2) * fall * np.exp(noise(rng, len(t), 0.1, 0.3))


def pure_chance(rng, t):
    return 6 + noise(rng, len(t), 0.15, rng.uniform(0, 0.6))


EXPERT = [(kind, "convergence", STILL) for kind in (power_law, catapult, late_escape)]
EXPERT += [(equilibrium, "equilibrium", TURNING), (pure_chance, "divergence", 1.0)]


@pytest.mark.parametrize(("kind", "expected", "angle"), EXPERT)
def test_the_verdict_is_the_experts_in_49_of_50_draws(kind, expected, angle):
    rng, wrong = np.random.default_rng(0), []
    for _ in range(50):
        t = np.arange(1, rng.integers(60, 200) + 1, dtype=float)
        verdict = classify(log_of(rng, kind(rng, t), angle), CHANCE)
        wrong += [verdict] * (verdict.regime != expected)
        assert len(str(verdict)) <= 90
    assert len(wrong) <= 1, wrong[:5]
    log = {name: column[:3] for name, column in log_of(rng, kind(rng, t)).items()}
    verdict = classify(log, CHANCE)
    assert verdict.regime == "undecided" and "too short" in verdict.why
    assert verdict.more_epochs >= 8 and "twice the length may decide" in str(verdict)


# ------------------------------------------------------------- what a log does not show


@pytest.mark.parametrize("n", [8, 9, 10, 11, 12, 13, 16, 20, 40, 80])
def test_a_fall_without_noise_is_no_level_at_any_length(n):
    """2·t^−0.45 was an equilibrium with 8 to 12 rows, when every interval was infinite."""
    log = {"epoch": np.arange(1.0, n + 1)}
    log["train_loss"] = 2 * log["epoch"] ** -0.45
    assert classify(log, ALONE).regime in ("convergence", "undecided")
    log |= {"step": 90 * log["epoch"], "angle": np.full(n, TURNING)}
    assert classify(log, ALONE).regime in ("convergence", "undecided")


def test_a_curve_is_no_noise():
    """80 rows from 0.15 to 0.0013 along a smooth curve: the interval was −inf to +inf."""
    log = {"epoch": np.arange(1.0, 81), "train_loss": np.geomspace(0.15, 0.0013, 80)}
    assert classify(log).regime == classify(log, ALONE).regime == "convergence"


def test_the_interval_of_a_slope_covers_it():
    rng, x, inside = np.random.default_rng(0), np.log(np.arange(50, 100)), 0
    for _ in range(300):
        found = regimes.trend(x, -0.7 * x + rng.normal(0, 0.1, 50))
        inside += found.low <= -0.7 <= found.high
    assert inside >= 294  # 99 % of 300, less two standard deviations


@pytest.mark.parametrize("level", [0.25, 1.5, 6.0])
def test_a_level_is_a_regime_only_where_the_run_has_forgotten_its_start(level):
    """Else it may be a plateau, or a floor. Without angle or step that is not known, and said."""
    rng = np.random.default_rng(0)
    log = log_of(rng, level * np.exp(noise(rng, 40, 0.03, 0.0)))
    log["train_error"] = np.full(41, 0.15 * level)
    expected = "divergence" if level == 6.0 else "equilibrium"
    still = classify({**log, "angle": np.full(41, STILL)}, CHANCE)
    assert still.regime == "undecided" and "has turned by only 0.085 rad" in still.why
    assert still.more_epochs > 40 and not still.notes
    turning = classify(log, CHANCE)
    assert turning.regime == expected and turning.turn == pytest.approx(0.3 * 1800**0.5)
    for unknown in (less(log, "angle"), less(log, "step"), {**log, "angle": np.full(41, math.nan)}):
        verdict = classify(unknown, CHANCE)
        assert verdict.regime == expected and "no angle or step: a plateau" in verdict.notes[-1]


def test_a_uniform_prediction_far_below_a_random_points_loss_is_no_divergence():
    """The plateau of a transformer: loss ln 31 where a random point has 4.78, error at chance."""
    chance = {"points": 512, "train_loss": {"mean": 4.78, "std": 0.5}}
    chance["train_error"] = {"mean": 30 / 31, "std": 0.05}
    rng = np.random.default_rng(0)
    log = log_of(rng, np.log(31) + rng.normal(0, 0.02, 60))
    log["train_error"] = 30 / 31 + rng.normal(0, 0.005, 61)
    verdict = classify(log, chance)
    assert verdict.regime == "equilibrium" and verdict.why.startswith("loss 3.44 (chance 4.78), le")
    assert [skill.told for skill in verdict.skills] == [False, True]
    assert classify({**log, "angle": np.full(61, 1e-3)}, chance).regime == "undecided"


def test_guessing_the_most_frequent_class_is_no_skill():
    """A text at steps of 90°: loss 14, worse than chance, error 8 % better than a random point's."""
    rng = np.random.default_rng(0)
    log = log_of(rng, 14 * np.exp(noise(rng, 40, 0.1, 0.2)), angle=1.571)
    log["train_error"] = 0.83 + rng.normal(0, 0.005, 41)
    verdict = classify(log, CHANCE)
    assert verdict.regime == "divergence" and "error 0.83 (chance 0.9), loss 1" in verdict.why
    log["angle"][:] = 0.5
    assert classify(log, CHANCE).regime != "divergence"
    assert classify(log, CHANCE | {"constant": {"train_error": 0.82}}).regime == "divergence"
    # After a step of 90° a point knows one batch: where that is measured, it is the reference.
    log["angle"][:] = 1.571
    for error, expected in ((0.83, "divergence"), (0.95, "equilibrium")):
        stepped = {**CHANCE, "train_error": {"mean": error, "std": 0.05}}
        assert classify(log, {**CHANCE, "stepped": stepped}).regime == expected


def test_a_loss_that_is_noisy_but_surely_worse_than_a_random_points_is_divergence():
    rng = np.random.default_rng(0)
    log = log_of(rng, 14 * np.exp(noise(rng, 40, 0.4, 0.2)))
    log["train_error"] = 0.9 + rng.normal(0, 0.005, 41)
    verdict = classify(log, CHANCE)
    assert verdict.regime == "divergence" and verdict.skills[1].margin > 0.1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(power_law, "convergence"), (quiet, "equilibrium"), (pure_chance, "divergence")],
)
def test_a_log_of_losses_alone_is_classified_and_says_what_was_missing(kind, expected):
    rng, t = np.random.default_rng(0), np.arange(1, 61, dtype=float)
    log = less(log_of(rng, kind(rng, t)), "train_error", "angle")
    verdict = classify(log)
    assert verdict.regime == expected
    assert "no train_error: skill from the loss" in verdict.notes
    assert "no chance reference: the row of epoch 0 stands in" in verdict.notes
    verdict = classify({name: column[1:] for name, column in log.items()})
    assert verdict.regime == ("convergence" if expected == "convergence" else "undecided")
    assert verdict.more_epochs is None and "may decide" not in str(verdict)


@pytest.mark.parametrize("row", [10, 40])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -0.3])
def test_a_loss_that_has_no_logarithm_is_undecided_and_named(row, loss):
    log = log_of(np.random.default_rng(0), np.full(40, 1.5))
    log["train_loss"][row] = loss
    verdict = classify(log, CHANCE)
    what = "negative: no logarithm" if loss < 0 else "not finite"
    assert str(verdict) == f"undecided: in epoch {row} the loss is {what}"
    assert verdict.broken == (not loss < 0)


def test_a_dead_network_is_named_and_no_epoch_more_is_asked_for():
    log = log_of(np.random.default_rng(0), np.full(40, 1.5), angle=0.0)
    log["grad_norm"] = np.where(log["epoch"] < 2, 8e9, 0.0)
    verdict = classify(log, CHANCE)
    assert "dead: the gradient is 0 since epoch 2, at loss 1.5; lower the" in str(verdict)
    assert verdict.broken and verdict.more_epochs is None
    log["train_loss"][3:] = 0
    assert classify(log, CHANCE).regime == "convergence"


@pytest.mark.parametrize("name", ["elr", "lr"])
def test_a_rate_that_falls_in_the_log_is_not_a_fixed_one(name):
    log = log_of(np.random.default_rng(0), np.full(40, 1.5))
    fixed = classify({**log, name: np.full(41, 0.1)}, CHANCE)
    assert fixed.regime == "equilibrium" and not fixed.moves
    verdict = classify({**log, name: np.geomspace(0.1, 0.01, 41)}, CHANCE)
    assert verdict.moves and str(verdict) == f"{name.upper()} 0.1 to 0.01, not a fixed one"
    warm = np.full(41, 0.1)
    warm[:3] = 0.01
    assert not classify({**log, name: warm}, CHANCE).moves


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("zeros", [4, 20, 39])
def test_a_loss_that_has_reached_0_is_convergence(start, zeros):
    """Whether there is a row before training or not, and whatever came before."""
    loss = np.full(40, 0.5)
    loss[-zeros:] = 0
    log = {"epoch": np.arange(1, 41.0), "train_loss": loss}
    if start:
        log = {"epoch": np.arange(41.0), "step": np.arange(41.0)}
        log["train_loss"] = np.insert(loss, 0, 2.3)
    assert classify(log).regime == "convergence"


def test_an_error_in_percent_or_without_chance_is_left_out():
    error = 0.5 + np.random.default_rng(0).normal(0, 0.01, 24)
    log = {"epoch": np.arange(24.0), "train_loss": LEVEL, "train_error": error}
    chance = {"train_error": {"mean": 0.9, "std": 0.0}, "train_loss": {"mean": 2.3, "std": 0.0}}
    assert len(classify(log, chance).skills) == 2
    of_loss = {"train_loss": chance["train_loss"]}
    for other in (classify({**log, "train_error": 100 * error}, chance), classify(log, of_loss)):
        assert [skill.of for skill in other.skills] == ["train_loss"]
        assert "no train_error: skill from the loss" in other.notes


# ------------------------------------------------------------- folders, tables, command line


def write(path, columns, rows=None):
    rows = zip(*columns.values(), strict=True) if rows is None else rows
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def sweep(tmp_path):
    """A folder of seven made runs, in order: three converge, two are in equilibrium, two diverge."""
    rng, t = np.random.default_rng(0), np.arange(1, 61, dtype=float)
    kinds = [(power_law, STILL)] * 3 + [(equilibrium, TURNING)] * 2 + [(pure_chance, 1.0)] * 2
    for elr, (kind, angle) in zip((1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0), kinds, strict=True):
        log = log_of(rng, kind(rng, t), angle)
        write(tmp_path / f"elr={regimes.elr_name(elr)}.csv", log)
    return tmp_path


def run(*arguments):
    return regimes.main([str(argument) for argument in arguments])


@pytest.mark.draws
def test_a_folder_gives_table_boundaries_rows_and_figure(sweep, capsys):
    assert run(sweep) == 0
    out, err = capsys.readouterr()
    assert "convergence | chaotic equilibrium: 0.002 to 0.005 (×2.5)" in out
    assert "chaotic equilibrium | divergence: 0.01 to 0.1 (×10)" in out and not err
    with open(sweep / "regimes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = ["convergence"] * 3 + ["equilibrium"] * 2 + ["divergence"] * 2
    assert [row["regime"] for row in rows] == expected
    assert [float(row["elr"]) for row in rows] == [1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0]
    assert run(sweep) == 0  # its own files are no logs
    assert figures.main([str(sweep)]) == 0
    assert (sweep / "regimes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_folder_on_a_read_only_medium_gets_its_table_and_one_line(sweep, capsys, monkeypatch):
    def refuse(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(regimes, "write_whole", refuse)
    assert run(sweep) == 2
    out, err = capsys.readouterr()
    assert "0.002 to 0.005" in out and err.count("\n") == 1
    assert "regimes.csv not written: Read-only file system" in err


def test_damaged_files_are_named_and_the_others_still_reported(sweep, capsys):
    good = (sweep / "elr=1e-02.csv").read_text()
    bad = {"3": "", "4": "epoch,val_loss\n1,2\n", "5": "epoch,train_loss\n1,abc\n"}
    bad |= {"6": "epoch,train_loss\n2,1\n1,1\n", "7": "epoch,train_loss\n1\n2,3\n"}
    bad |= {"8": "epoch,train_loss\n", "9": "\xff\xfe\x00epoch"}
    for name, text in bad.items():
        (sweep / f"elr={name}.csv").write_bytes(text.encode("latin-1"))
    (sweep / "elr=1e-02.csv").write_text(good[: good.rindex(",")])
    assert run(sweep, sweep / "nowhere.csv") == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == len(bad) + 1
    for name in [*(f"elr={name}.csv" for name in bad), "nowhere.csv"]:
        assert sum(name in line for line in err.splitlines()) == 1
    assert out.count("convergence ") >= 3 and "    1e-02  chaotic equilibrium" in out
    log, cut = regimes.read_log(sweep / "elr=1e-02.csv")  # its last row is left out
    assert cut and log["epoch"][-1] == 59
    path = sweep / "elr=1e-02.csv"  # a log may be named twice
    assert run(path, path) == 0
    assert capsys.readouterr().out.count("elr 1e-02: chaotic equilibrium: ") == 2


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert figures.main([str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "text", ["nonsense", '{"chance": 3}', '{"chance": {"0": {"points": 0}}}', "[" * 100_000, "\x00"]
)
def test_a_damaged_config_is_named_and_no_run_classified_by_another_chance(sweep, capsys, text):
    (sweep / "config.json").write_text(text)
    assert run(sweep) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "config.json is damaged" in err and not out.strip()
    assert run(sweep, "--chance", "6") == 0 and "divergence" in capsys.readouterr().out


def sides(names):
    """Runs of seeds by ELR, in the letters of their regimes; u: undecided, b: broken."""
    regime = {"c": "convergence", "e": "equilibrium", "d": "divergence"}
    for elr, seeds in names.items():
        for letter in seeds:
            verdict = regimes.Verdict(regime.get(letter, "undecided"), broken=letter == "b")
            yield regimes.Logged(None, elr, 0, {}, verdict)


@pytest.mark.parametrize(
    ("seeds", "first", "second"),
    [
        ({1: "ccc", 2: "ccc", 3: "eee", 4: "ddd"}, (2, 3), (3, 4)),
        ({1: "ccc", 2: "cce", 3: "ecc", 4: "eee", 5: "ddd"}, (1, 4), (4, 5)),  # seeds disagree
        ({1: "ccc", 2: "ccu", 3: "uuu", 4: "eee", 5: "ddd"}, (1, 4), (4, 5)),  # or are undecided
        ({1: "uuu", 2: "ccc", 3: "eee", 4: "ueu"}, (2, 3), (3, None)),  # elsewhere they may be
        ({1: "c", 2: "e", 3: "c", 4: "e", 5: "d"}, (1, 4), (4, 5)),  # out of order
        ({1: "e", 2: "e", 3: "b", 4: "b"}, (None, 1), (2, 3)),  # what broke down lies above
    ],
)
def test_a_boundary_spans_the_elrs_at_which_seeds_disagree(seeds, first, second):
    for boundary, ends in zip(regimes.boundaries(list(sides(seeds))), (first, second), strict=True):
        found = [None if math.isnan(x) else x for x in (boundary.low, boundary.high)]
        assert found == list(ends) and boundary.seen == (None not in ends)


def test_several_seeds_are_summed_up_by_median_and_majority(tmp_path, capsys):
    rng, t = np.random.default_rng(0), np.arange(1, 41)
    for elr, seed in product(("1e-03", "1e-02"), (0, 1, 2)):
        falls = elr == "1e-03" or seed == 2
        log = log_of(rng, (power_law if falls else quiet)(rng, t), STILL if falls else TURNING)
        write(tmp_path / f"elr={elr}{f'.seed={seed}' if seed else ''}.csv", log)
    chance = {"chance": {str(seed): CHANCE for seed in range(3)}}
    (tmp_path / "config.json").write_text(json.dumps(chance))
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "convergence | chaotic equilibrium: 0.001 to – (not seen)" in out and " 2/3 " in out
    found = regimes.rows(regimes.read_folder(tmp_path))
    losses = [row["train_loss"] for row in found if row["elr"] == 0.01]
    assert len(losses) == 3 and f" {np.median(losses):.4g} " in out
    assert run(*sorted(tmp_path.glob("*.csv"))[:2]) == 0  # files: a line each, with the evidence
    level, other = capsys.readouterr().out.splitlines()
    assert level.startswith("elr 1e-02: chaotic equilibrium: error 0.4") and len(level) <= 100
    assert "(chance 0.9), level at loss 1.47" in level and "(slope " in level
    assert other.startswith("elr 1e-02 seed 1: chaotic equilibrium: ")


@pytest.mark.draws
def test_runs_whose_elr_moves_are_summed_up_by_what_was_set(tmp_path, capsys):
    errors = {"angle=5e-02": (0.02, 0.04), "angle=1e-01": (0.01, 0.02)}
    epoch = np.arange(5.0)
    for name, of_seeds in errors.items():
        for seed, error in zip(("", ".seed=1"), of_seeds, strict=True):
            log = {"epoch": epoch, "step": epoch, "elr": [0.1, 0.009, 0.005, 0.002, 0.001]}
            log |= {"train_loss": [6, 2, 1, 0.5, 0.1], "test_error": np.full(5, error)}
            write(tmp_path / f"{name}{seed}.csv", log)
    assert run(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    line = "angle 5e-02: test error 0.0300 ± 0.0100 (2 seeds), train loss 0.1, ELR 0.001 to 0.1"
    assert line in lines and lines[-1] == "best: angle 1e-01" and len(lines) == 3
    with open(tmp_path / "regimes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["regime"] for row in rows] == ["not fixed"] * 4
    assert {row["elr_min"] for row in rows} == {"0.001"} and rows[0]["run"] in out_names(errors)
    assert figures.main([str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "regimes.png").stat().st_size > 10_000


def out_names(errors):
    return [name.replace("=", " ") for name in errors]


# ------------------------------------------------------------------------- other people's logs


LOSSES = np.round(2.0 / np.arange(1, 25) ** 1.2, 6)  # falls
LEVEL = np.round(1.5 + np.random.default_rng(3).normal(0, 0.02, 24), 6)  # does not


def keras(losses):
    rows = [f"{i},0.5,{loss},0.4,{loss + 0.1:.6f}" for i, loss in enumerate(losses)]
    return "\n".join(["epoch,accuracy,loss,val_accuracy,val_loss", *rows]) + "\n"


def lightning(losses):
    """Several rows of an epoch, with empty cells; rows of the learning rate alone have no epoch."""
    rows = ["epoch,lr-SGD,step,train_loss_epoch,train_loss_step,val_loss"]
    for i, loss in enumerate(losses):
        step = 100 * (i + 1) - 1
        rows += [f",0.1,{step - 50},,,", f"{i},,{step - 50},,{2 * loss},"]
        rows += [f"{i},,{step},,,{loss + 0.1}", f"{i},,{step},{loss},,"]
    return "\n".join([*rows, f"{len(losses)},,{step + 1},,,0.5"]) + "\n"


def wandb_chart(losses):
    rows = [f'"{10 * i}","{loss}","{loss}","{loss}","{i}"' for i, loss in enumerate(losses)]
    run = "my-run - with a dash-1 - train/loss"
    return "\n".join([f'"Step","{run}","{run}__MIN","{run}__MAX","my-run - _step"', *rows]) + "\n"


def wandb_history(losses):
    rows = [f"{i},{1.5 * i},{i},1732700000.5,{i},{loss}," for i, loss in enumerate(losses)]
    return "\n".join([",_runtime,_step,_timestamp,epoch,train/loss,val/loss", *rows]) + "\n"


def history(losses):
    """pandas.DataFrame(model.fit(…).history).to_csv(): the epoch is the index."""
    rows = [f"{i},{loss},0.5" for i, loss in enumerate(losses)]
    return "\n".join([",loss,accuracy", *rows]) + "\n"


def tensorboard(losses):
    rows = [f"1654943296.2,{i},{loss}" for i, loss in enumerate(losses)]
    return "\n".join(["Wall time,Step,Value", *rows]) + "\n"


def hugging_face(losses):
    """log_history: evaluations between, a summary in the end."""
    history = []
    for i, loss in enumerate(losses):
        history.append({"epoch": i + 1.0, "loss": loss, "grad_norm": 1.5, "step": 500 * (i + 1)})
        history.append({"epoch": i + 1.0, "eval_loss": 2.0, "step": 500 * (i + 1)})
    return [*history, {"epoch": len(losses), "train_loss": 0.7, "train_runtime": 99.5}]


def trainer_state(losses):
    return json.dumps({"best_metric": None, "log_history": hugging_face(losses)}, indent=2)


def of_pandas(losses):
    """pandas.DataFrame(log_history).to_csv()"""
    history = hugging_face(losses)
    head = ["", *dict.fromkeys(name for row in history for name in row)]
    rows = [[i, *(row.get(name, "") for name in head[1:])] for i, row in enumerate(history)]
    return "\n".join(",".join(map(str, row)) for row in [head, *rows]) + "\n"


def mmengine(losses):
    rows = [{"lr": 0.01, "loss": x, "epoch": i + 1, "iter": i} for i, x in enumerate(losses)]
    return "\n".join(map(json.dumps, [*rows, {"accuracy/top1": 71.0, "step": 3}])) + "\n"


def detectron(losses):
    rows = [{"iteration": 20 * i + 19, "total_loss": x, "lr": 0.02} for i, x in enumerate(losses)]
    return "\n".join(map(json.dumps, rows)) + "\n"


OTHERS = [trainer_state, mmengine, detectron, keras, lightning, wandb_chart, wandb_history]
OTHERS += [of_pandas, history, tensorboard]


@pytest.mark.parametrize("make", OTHERS)
def test_other_peoples_logs_are_read_and_their_epoch_0_is_no_chance(tmp_path, capsys, make):
    """A level loss of 1.5 with chance at 2.3 was "divergence", a run stuck at ln 2 "equilibrium"."""
    (tmp_path / "log.csv").write_text(make(LOSSES))
    columns = {"train_loss": "Value"} if make is tensorboard else {}
    log, cut = regimes.read_log(tmp_path / "log.csv", columns)
    assert np.array_equal(log["train_loss"], LOSSES) and not cut
    assert len(np.unique(np.diff(log["epoch"]))) == 1
    words = [f"{ours}={theirs}" for ours, theirs in columns.items()]
    words = ["--columns", *words] if words else []
    stuck = math.log(2) + (LEVEL - 1.5) / 20
    for losses, chance, expected in (
        (LOSSES, [], "convergence"),
        (LEVEL, [], "undecided"),
        (LEVEL, ["--chance", "2.303"], "chaotic equilibrium"),
        (stuck, [], "undecided"),
        (stuck, ["--chance", "0.6931"], "divergence"),
    ):
        (tmp_path / "log.csv").write_text(make(losses))
        assert regimes.main([str(tmp_path / "log.csv"), *words, *chance]) == 0
        assert capsys.readouterr().out.startswith(f"log: {expected}: ")


def test_epoch_0_is_before_training_only_where_step_says_0():
    rng, t = np.random.default_rng(0), np.arange(1, 41.0)
    log = log_of(rng, equilibrium(rng, t))
    assert classify(log).regime == "equilibrium"
    for steps in ({}, {"step": log["step"] + 90}, {"step": np.full(41, math.nan)}):
        later = {name: x for name, x in log.items() if name != "step"} | steps
        verdict = classify(later)
        assert verdict.regime == "undecided" and "--chance" in verdict.why
        counted = classify({**later, "epoch": later["epoch"] + 1}, CHANCE)
        assert numbers_of(classify(later, CHANCE)) == numbers_of(counted)


VARIANTS = {
    "semicolons": lambda text: text.replace(",", ";"),
    "tabs": lambda text: text.replace(",", "\t"),
    "byte order mark": lambda text: "\ufeff" + text,
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: text.replace("\n3,", "\n\n3,"),
    "spaces": lambda text: text.replace(",", " , "),
    "quotes": lambda text: "".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in text.splitlines()
    ),
    "no newline in the end": str.rstrip,
    "an index": lambda text: "\n".join(f"{i},{x}" for i, x in enumerate(text.split("\n"))).replace(
        "0,epoch", ",epoch"
    )[:-3],
    "not yet": lambda text: text + "24,0.9,,0.8,0.7\n",
    "a column of words": lambda text: text.replace(",accuracy,", ",time,").replace(
        ",0.5,", ",10:03,"
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_csv_file_may_be_written_in_many_ways(tmp_path, variant):
    (tmp_path / "log.csv").write_bytes(VARIANTS[variant](keras(LOSSES)).encode())
    log, cut = regimes.read_log(tmp_path / "log.csv")
    assert np.array_equal(log["train_loss"], LOSSES) and not cut
    assert np.array_equal(log["epoch"], np.arange(24.0))


REFUSED = [  # the cure first
    (
        "epoch,loss,loss\n1,2,3\n",
        "say --columns train_loss=COLUMN: 2 columns train_loss in epoch, ",
    ),
    ("epoch,epoch,loss\n1,2,3\n", "say --columns epoch=COLUMN: 2 columns epoch in epoch, epoch"),
    ("epoch,loss,train_error,train_error\n1,2,0,1\n", "say --columns train_error=COLUMN: 2 "),
    ("Step,a - loss,b - loss\n1,2,3\n", "say --columns train_loss=COLUMN: 2 columns train_loss in"),
    ("Wall time,Step,Value\n1,2,3\n", "say --columns train_loss=COLUMN: no columns train_loss in"),
    ("loss\n1\n", "say --columns epoch=COLUMN: no columns epoch in loss"),
    ("0,2.3\n1,2.2\n", "put the names of the columns into a first line: there is no header"),
    ("My best run\nepoch,loss\n1,2\n", "remove the title before the names of the columns"),
    ('epoch,loss\n1,"1,234"\n', "line 2: could not convert string to float: '1,234'"),
    ("epoch;loss\n1;2,303\n", "line 2: could not convert string to float: '2,303'"),
    ("epoch,loss\n1,2\n1/10,3\n", "line 3: could not convert string to float: '1/10'"),
    ("epoch,loss\n1,2\nnan,3\n", "line 3: one run a file, in order: epoch nan comes after 1"),
    ("epoch,loss\n1,2\n,3\n", "line 3: one run a file, in order: epoch nan comes after 1"),
    ("epoch,loss\n-1,2\n0,3\n", "line 2: one run a file, in order: epoch -1 comes after 0"),
    ("epoch,loss\n0,3\n1,2\n0,3\n1,2\n", "line 4: one run a file, in order: epoch 0 comes after 1"),
    ("epoch,loss\n0,3\n1,2\n1,2.1\n2,1\n", "line 4: drop a row, or say --columns epoch=step: epo"),
    ("epoch,phase,loss\n0,train,3\n0,val,4\n", "line 3: drop a row, or say --columns epoch=step"),
    ("epoch,loss\n0,\n1,\n", "no row with a loss"),
    ("epoch,loss\n0,1,2\n1,2\n", "line 2: 3 cells, the header has 2"),
    ("epoch,loss\n0\n1,2\n", "line 2: 1 cells, the header has 2"),
    ("epoch,step,loss,angle\n0,1,2,0.1\n1,2,3,x\n", "line 3: could not convert string to float"),
    ('{"epoch": 1, "loss": 2}\n{"epoch"', "Expecting ':' delimiter"),
    ('{"loss": [3, 2, 1]}', "say --columns epoch=COLUMN: no columns epoch in loss"),
    ("[1, 2]", "'int' object is not iterable"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=lambda x: x[:30])
def test_what_cannot_be_read_is_refused_in_one_line_with_the_cure(tmp_path, capsys, text, message):
    (tmp_path / "log.csv").write_text(text)
    assert regimes.main([str(tmp_path / "log.csv")]) == 2
    out, err = capsys.readouterr()
    assert not out.strip() and err.count("\n") == 1
    assert f"log.csv: {message}" in err.replace("line 1: ", "")


def test_columns_are_named_on_the_command_line(tmp_path, capsys):
    rows = [f"{i},{i},{loss},{1 - loss / 3},{2 * loss}" for i, loss in enumerate(LOSSES)]
    text = "\n".join(["Epoch,it,a - loss,b - loss,g", *rows]) + "\n"
    (tmp_path / "log.csv").write_text(text)
    command = [str(tmp_path / "log.csv"), "--columns"]
    assert regimes.main([*command, "train_loss=a - loss", "epoch=Epoch", "grad_norm=g"]) == 0
    assert capsys.readouterr().out.startswith("log: convergence: ")
    columns = {"train_loss": "a - loss", "step": "it", "epoch": "it", "grad_norm": "g"}
    log = regimes.read_log(tmp_path / "log.csv", columns)[0]
    assert np.array_equal(log["step"], log["epoch"]) and log["grad_norm"][3] == 2 * LOSSES[3]
    assert regimes.main([*command, "train_loss=c"]) == 2
    assert (
        "say --columns train_loss=COLUMN: no columns c in Epoch, it, a - loss, b - loss, g"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--columns", "loss=train_loss"],
        ["--columns", "log.csv"],
        ["--columns", "train_loss"],
        ["--columns", "train_loss="],
        ["--columns", "train_loss=a", "train_loss=b"],
        ["--chance", "x"],
        ["--chance", "0"],
        ["--chance", "nan"],
        ["--chance", "inf"],
        ["--chance", "2.3", "90"],
        ["--chance", "2.3", "0.9", "1"],
    ],
)
def test_bad_options_are_one_line(capsys, words):
    with pytest.raises(SystemExit) as exit:
        regimes.main(["log.csv", *words])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and f"argument {words[0]}: " in err


def test_the_help_has_a_line_for_keras_lightning_and_wandb(capsys):
    with pytest.raises(SystemExit):
        regimes.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("Keras", "Lightning", "W&B"):
        assert sum("python regimes.py " in line and name in line for line in lines) == 1


@pytest.mark.parametrize("kind", ORDER)
def test_a_log_of_ten_thousand_rows_gets_its_regime(kind):
    for seed in range(4):
        assert classify(made(kind, 10_000, seed), CHANCE).regime == kind


# ------------------------------------------------------------------- properties, over made logs


def made(kind, n, seed):
    """A log of n epochs of one kind, with noise of some kind around it, as train.py writes them."""
    rng, t = np.random.default_rng(seed), np.arange(1, n + 1.0)
    sort = rng.integers(4)
    if sort == 0:  # white
        around = rng.normal(0, rng.uniform(0.02, 0.15), n)
    elif sort == 1:  # correlated
        around = noise(rng, n, rng.uniform(0.02, 0.15), rng.uniform(0.2, 0.8))
    elif sort == 2:  # rare spikes
        around = rng.normal(0, 0.03, n) + (rng.random(n) < 0.05) * rng.uniform(0.2, 1, n)
    else:  # heavy tails
        around = 0.04 * rng.standard_t(3, n)
    angle = 0.3
    if kind == "convergence":
        loss, angle = rng.uniform(0.5, 5) * t ** -rng.uniform(0.9, 2), 0.01
    elif kind == "equilibrium":
        loss = np.full(n, rng.uniform(0.2, 3.5))
    elif kind == "divergence":
        loss, angle = np.full(n, rng.uniform(5.9, 7)), 1.5
    else:  # rising
        loss = 0.5 * t ** rng.uniform(0.2, 0.8)
    log = log_of(rng, loss * np.exp(around))
    if kind == "divergence":
        log["train_error"] = 0.9 + rng.normal(0, 0.006, n + 1)
    log |= {"step": 90 * log["epoch"], "angle": np.full(n + 1, angle)}
    extra = {name: rng.random(n + 1) for name in ("test_loss", "test_error", "seconds", "radial")}
    return log | extra


KINDS = st.sampled_from(["convergence", "equilibrium", "divergence", "rising"])
LOGS = st.builds(made, KINDS, st.integers(10, 400), st.integers(0, 10**6))


@many
@given(LOGS, st.sampled_from(["test_loss", "test_error", "seconds", "radial"]))
def test_a_column_that_the_rule_does_not_use_changes_nothing(log, column):
    less = {name: x for name, x in log.items() if name != column}
    assert classify(less, CHANCE) == classify(log, CHANCE)


def numbers_of(verdict):
    skills = [(skill.of, skill.value, skill.margin) for skill in verdict.skills]
    numbers = [x for skill in skills for x in skill[1:]]
    return verdict.regime, numbers + [verdict.trend.slope, verdict.trend.low, verdict.trend.high]


@many
@given(LOGS, st.floats(0.01, 1000))
def test_counting_epochs_in_another_unit_changes_nothing_but_words(log, unit):
    one, two = classify(log, CHANCE), classify({**log, "epoch": log["epoch"] * unit}, CHANCE)
    assert numbers_of(one)[0] == numbers_of(two)[0]
    assert numbers_of(two)[1] == pytest.approx(numbers_of(one)[1], rel=1e-6, abs=1e-9)


@many
@given(LOGS, st.floats(1e-6, 1e6))
def test_multiplying_loss_and_chance_loss_by_one_number_changes_nothing(log, factor):
    of_loss = {name: factor * x for name, x in CHANCE["train_loss"].items()}
    one = classify(log, CHANCE)
    two = classify(
        {**log, "train_loss": factor * log["train_loss"]}, {**CHANCE, "train_loss": of_loss}
    )
    assert numbers_of(one)[0] == numbers_of(two)[0]
    assert numbers_of(two)[1] == pytest.approx(numbers_of(one)[1], rel=1e-6, abs=1e-9)


@many
@given(KINDS.filter(ORDER.__contains__), st.integers(10, 400), st.integers(0, 10**6))
@example("divergence", 10, 1224)  # these an earlier rule got wrong
@example("divergence", 12, 1950)
@example("divergence", 14, 2877)
@example("divergence", 20, 3054)
@example("divergence", 26, 1315)
@example("equilibrium", 36, 333)
@example("equilibrium", 36, 1180)
def test_a_made_regime_is_never_called_one_of_the_other_two(kind, n, seed):
    assert classify(made(kind, n, seed), CHANCE).regime in (kind, "undecided")


@pytest.mark.parametrize(("rows", "most"), [(20, 0.2), (50, 0.03), (200, 0.02)])
def test_how_often_a_made_regime_is_undecided(rows, most):
    """Printed by `-s`; the bounds are some twice what was seen."""
    for kind in ORDER:
        seeds = range(1000 if SLOW else 100)
        found = [classify(made(kind, rows, seed), CHANCE).regime for seed in seeds]
        share = found.count("undecided") / len(found)
        print(f"{kind}, {rows} rows: undecided {share:.1%}")
        assert share <= most


def test_the_regimes_are_told_apart_in_grey():
    grey = {}
    for name, tone in figures.COLOURS.items():
        luminance = np.dot(to_rgb(tone), (0.299, 0.587, 0.114))
        grey[name] = 1 - figures.SHADES[name] * (1 - luminance)  # over white
    order = ["convergence", "undecided", "equilibrium", "divergence"]
    assert (np.diff([grey[name] for name in order]) < -0.03).all()


@pytest.mark.draws
@pytest.mark.parametrize("share", [1.0, math.nan])
def test_a_single_short_run_is_drawn_without_a_warning(tmp_path, share):
    """Or one that has nothing but nan."""
    log = {"epoch": [0, 1, 2], "step": [0, 9, 18], "elr": [1e-3] * 3, "train_loss": [6.0, 2, 1]}
    log |= {
        "grad_norm": [261.0, 42, 29],
        "angle": [0.255400128, 0.0422811919, 0.029313165],
        "test_error": [0.9, 0.2, 0.1],
    }
    for name in ("train_loss", "grad_norm", "angle", "test_error"):
        log[name] = [share * value for value in log[name]]
    write(tmp_path / "elr=1e-03.csv", log, zip(*log.values(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert figures.main([str(tmp_path)]) == 0
    assert (tmp_path / "regimes.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "head, more",
    [("step,loss", ()), ("epoch,step,train_loss_step", ("--columns", "epoch=step"))],
)
def test_a_step_that_stands_in_for_the_epoch_tells_of_no_row_before_training(
    tmp_path, capsys, head, more
):
    noise = 1.5 + 0.01 * np.random.default_rng().normal(size=40)
    lines = [head]
    for i, loss in enumerate(noise):
        lines.append(f"{i},{loss}" if head == "step,loss" else f"{i // 9},{i},{loss}")
    (tmp_path / "log.csv").write_text("\n".join(lines))
    assert run(tmp_path / "log.csv", *more) == 0
    assert "undecided: equilibrium and divergence look alike" in capsys.readouterr().out
