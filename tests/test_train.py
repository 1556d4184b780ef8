"""The command line as a user runs it."""

import csv
import io
import json
import math
import os
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train
from lab import machine, measure, runs
from lab.data import batches, load
from lab.machine import Captured
from lab.options import parse
from lab.runs import Rows, open_folder
from models import MODELS

SLOW = "SLOW" in os.environ
ROOT = Path(__file__).parent.parent
QUICK = ["--width", "2", "--epochs", "2", "--batch-size", "128", "--threads", "1"]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(path)]


def run(*arguments):
    return train.main([str(a) for a in arguments])


@pytest.mark.skipif(not SLOW, reason="test_readme.py does so with seed 0")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_three_regimes_are_named(tmp_path, capsys, seed):
    assert run("--elr", 0.001, 0.01, 0.3, "--seed", seed, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    suffix = f" seed {seed}" if seed else ""
    for elr, regime in (
        ("1e-03", "convergence"),
        ("1e-02", "chaotic equilibrium"),
        ("3e-01", "divergence"),
    ):
        assert f"elr {elr}{suffix}: {regime}: " in out


def test_a_short_run_at_a_tiny_elr_is_not_called_equilibrium_or_divergence(tmp_path, capsys):
    assert (
        run("--elr", 1e-5, "--epochs", 4, "--width", 2, "--batch-size", 64, "--out", tmp_path) == 0
    )
    assert "elr 1e-05: undecided: too short" in capsys.readouterr().out


@pytest.mark.draws
def test_a_run_writes_the_files_of_the_contract(tmp_path):
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    rows = read(tmp_path / "elr=1e-02.csv")
    assert list(rows[0]) == (
        [
            "epoch",
            "step",
            "elr",
            "train_loss",
            "train_error",
            "grad_norm",
            "angle",
            "radial",
            "test_loss",
            "test_error",
            "seconds",
            "distance",
        ]
    )
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and [row["step"] for row in rows] == [
        "0",
        "11",
        "22",
    ]
    for row in rows:
        assert all(math.isfinite(float(cell)) for cell in row.values())
        assert (
            0 <= float(row["train_error"]) <= 1
            and 0 <= float(row["test_error"]) <= 1
            and float(row["radial"]) < 1e-4
        )
    layers = read(tmp_path / "elr=1e-02.layers.csv")
    assert [row["layer"] for row in layers[:4]] == [
        f"conv{i}.weight" for i in (1, 2, 3, 4)
    ] and len(layers) == 12
    for epoch in (
        "0",
        "1",
        "2",
    ):  # the squares of the norms add up to the sphere's, which is what ELR and norm say together
        squares = [float(row["norm"]) ** 2 for row in layers if row["epoch"] == epoch]
        elrs = [float(row["elr"]) for row in layers if row["epoch"] == epoch]
        assert (
            sum(1 / elr for elr in elrs) == pytest.approx(1 / 0.01, rel=0.01) and len(squares) == 4
        )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["command"]["epochs"] == 2 and config["command"]["elr"] == [0.01]
    assert (
        config["options"]["width"] == 2
        and config["chance"]["0"]["points"] == measure.POINTS
        and "torch" in config["versions"]
    )
    assert abs(config["chance"]["0"]["train_error"]["mean"] - 0.9) < 0.05
    checkpoint = torch.load(tmp_path / "elr=1e-02.pt", weights_only=True)
    assert checkpoint["epoch"] == 2 and "conv1.weight" in checkpoint["net"]
    assert len(read(tmp_path / "regimes.csv")) == 1 and (tmp_path / "regimes.png").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_commands_write_equal_bytes_but_for_the_seconds(tmp_path):
    for name in ("a", "b"):
        assert run("--elr", 0.01, 0.1, *QUICK, "--out", tmp_path / name) == 0
    for path in (tmp_path / "a").glob("elr=*.csv"):
        assert without_seconds(path) == without_seconds(tmp_path / "b" / path.name)
    assert (tmp_path / "a" / "regimes.csv").read_bytes() == (
        tmp_path / "b" / "regimes.csv"
    ).read_bytes()


def test_every_elr_starts_from_the_same_point_and_a_seed_changes_it(tmp_path):
    assert run("--elr", 0.01, 0.1, *QUICK, "--out", tmp_path) == 0
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path, "--seed", 1) == 0
    first = [
        float(read(tmp_path / f"{name}.csv")[0]["train_loss"])
        for name in ("elr=1e-02", "elr=1e-01", "elr=1e-02.seed=1")
    ]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize("sphere", ["layer", "row"])
def test_spheres_of_layers_and_rows_fix_every_layers_norm(tmp_path, sphere):
    assert run("--elr", 0.01, *QUICK, "--sphere", sphere, "--out", tmp_path) == 0
    norms = {}
    for row in read(tmp_path / "elr=1e-02.layers.csv"):
        assert float(row["elr"]) == pytest.approx(0.01, rel=1e-5)
        norms.setdefault(row["layer"], []).append(float(row["norm"]))
    assert all(max(values) / min(values) < 1 + 1e-6 for values in norms.values())


def test_the_joint_sphere_lets_the_layers_norms_move(tmp_path):
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    norms = [
        float(row["norm"])
        for row in read(tmp_path / "elr=1e-02.layers.csv")
        if row["layer"] == "conv1.weight"
    ]
    assert max(norms) / min(norms) > 1.001


def test_a_finished_run_is_not_done_again_and_force_starts_afresh(tmp_path, capsys):
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    before = (tmp_path / "elr=1e-02.csv").read_bytes()
    capsys.readouterr()
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    assert (
        "(already done)" in capsys.readouterr().out
        and (tmp_path / "elr=1e-02.csv").read_bytes() == before
    )
    (tmp_path / "notes.txt").write_text("mine")
    assert run("--elr", 0.1, *QUICK, "--out", tmp_path, "--force") == 0
    assert not (tmp_path / "elr=1e-02.csv").exists() and (tmp_path / "notes.txt").exists()


ONE_OF = "one of --elr ELR, --sweep, --angle PHI, --lr LR must say which runs, and only one"
BAD = [
    (["--elr", "0"], "--elr: '0' is not"),
    (["--elr", "-1"], "--elr: '-1' is not"),
    (["--elr", "nan"], "--elr: 'nan' is not"),
    (["--elr", "inf"], "--elr: 'inf' is not a float32 number above 0"),
    (["--elr", "1e308"], "--elr: '1e308' is not a float32 number above 0"),
    (["--elr", "5e-324"], "--elr: '5e-324' is not a float32 number above 0"),
    (["--elr", "1e-320", "1e300"], "--elr: '1e-320' is not a float32 number above 0"),
    (["--elr", "abc"], "--elr: 'abc' is not"),
    ([], ONE_OF),
    (["--elr", "0.1", "--sweep"], "which runs, and only one"),
    (["--elr", "0.1", "--angle", "0.1"], "which runs, and only one"),
    (["--elr", "0.1", "--lr", "0.1"], "which runs, and only one"),
    (["--angle", "0"], "--angle: '0' is not"),
    (
        ["--angle", "1.6"],
        "--angle: '1.6' is not a float32 number above 0 and below 1.5708",
    ),
    (["--elr", "0.1", "--epochs", "0"], "--epochs: '0' is not"),
    (["--elr", "0.1", "--epochs", "2.5"], "--epochs: '2.5' is not a whole"),
    (["--sweep", "1", "1e-5", "9"], "--sweep: it takes LO HI N"),
    (["--sweep", "1e-3", "1"], "--sweep: it takes LO HI N"),
    (["--sweep", "1e-3", "1", "1"], "--sweep: it takes LO HI N"),
    (["--sweep", "1e-3", "1", "99999999"], "it takes LO HI N with LO < HI and 2 ≤ N ≤ 10000"),
    (["--sweep", "1e-3", "x", "5"], "--sweep: 'x' is not a float32 number"),
    (["--elr", "0.1", "--batch-size", "0"], "--batch-size: '0' is not"),
    (["--elr", "0.1", "--batch-size", "5000"], "--batch-size: 5000 is more than the 1437"),
    (["--elr", "0.1", "--data", "nowhere"], "--data: no data set 'nowhere'"),
    (["--elr", "0.1", "--data", "nowhere.npz"], "--data: nowhere.npz: there is no such file"),
    (["--elr", "0.1", "--model", "vgg"], "--model: no network 'vgg'"),
    (["--elr", "0.1", "--model", "transformer"], "--model: the transformer takes tokens"),
    (["--elr", "0.1", "--model", "convnet", "--data", "modular"], "--model: convnet takes images"),
    (["--elr", "0.1", "--data", "modular", "--augment"], "--augment: tokens are no images"),
    (["--elr", "0.1", "--data", "modular", "--width", "6"], "a multiple of 4, not 6"),
    (["--elr", "0.1", "--data", "modular", "--affine"], "the transformer has no affine"),
    (["--elr", "0.1", "--modulus", "7"], "--modulus: this is for --data modular"),
    (["--elr", "0.1", "--data", "modular", "--modulus", "2000"], "--modulus: '2000' is not"),
    (["--elr", "0.1", "--sphere", "ball"], "--sphere: invalid choice: 'ball'"),
    (["--elr", "0.1", "--seed", "-1"], "--seed: '-1' is not a whole number"),
    (["--elr", "0.1", "--device", "abacus"], "--device: 'abacus' is none of cpu"),
    (["--elr", "0.1", "--wd", "0.1"], "--wd: this is for --lr"),
    (
        ["--lr", "0.1", "--sphere", "layer"],
        "--sphere: in the whole space, --lr, there is no sphere",
    ),
    (["--lr", "0.1", "--then", "0.01"], "--then: it takes a constant ELR"),
    (
        ["--elr", "0.1", "--momentum", "1"],
        "--momentum: '1' is not a float32 number above 0 and below 1",
    ),
    (["--elr", "0.1", "--schedule", "linear"], "--schedule: invalid choice: 'linear'"),
    (["--elr", "0.1", "--label-noise", "1"], "--label-noise: '1' is not"),
    (["--elr", "0.1", "--label-noise", "1e-4"], "--label-noise: 0.0001 of 1437 training inputs is"),
    (["--elr", "0.1", "--then", "0.01", "--schedule", "cosine"], "--then: it takes a constant ELR"),
    (["--angle", "0.1", "--then", "3"], "--then: it is no angle below"),
    (["--elr", "0.1", "--average", "21"], "--average: there are 20 epochs: change"),
    (["--elr", "0.1", "--refine", "2"], "--refine: it takes --sweep, or several constant ELRs"),
    (
        ["--sweep", "--refine", "2", "--schedule", "cosine"],
        "--refine: it takes --sweep, or several constant ELRs",
    ),
    (["--angle", "0.1", "--max-epochs", "50"], "--max-epochs: it takes constant ELRs"),
    (
        ["--sweep", "--refine", "1", "--max-epochs", "5"],
        "--max-epochs: it is less than --epochs 20",
    ),
    (
        ["--elr", "0.1", "--average", "2", "--max-epochs", "50"],
        "--max-epochs: it takes constant ELRs, and no --average",
    ),
    (["--elr", "0.1", "--seeds", "0"], "--seeds: '0' is not"),
    (["--elr", "0.1", "--seeds", "99999999"], "--seeds: 1 × 99999999 runs are too many"),
    (["--elr", "0.1", "--threads", "99999"], "--threads: '99999' is not"),
    (["--elr", "0.1", "--jobs", "0"], "--jobs: '0' is not"),
    (["--elr", "0.1", "--dtype", "fp16"], "--dtype: invalid choice"),
    (["--elr", "0.1", "--device", "cpu", "--graph"], "--graph: it takes a GPU"),
    (["--elr", "0.1", "--space", "whole"], "unrecognized arguments: --space whole"),
]
if not torch.cuda.is_available():
    BAD.append((["--elr", "0.1", "--device", "cuda"], "--device: 'cuda' cannot be used"))


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_arguments_are_one_line_status_2_and_nothing_written(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and message in err, err
    assert not list(tmp_path.iterdir())


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        run("--elr", 0.1, "--out", tmp_path / "file" / "logs")
    err = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and err.count("\n") == 1
        and "argument --out" in err
        and "cannot be written" in err
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_with_other_options_names_the_first_that_differs(tmp_path, capsys):
    assert run("--elr", 0.1, *QUICK, "--out", tmp_path) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run("--elr", 0.1, *QUICK, "--width", 3, "--out", tmp_path)
    err = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and err.count("\n") == 1
        and "(width is 2 there, 3 here)" in err
        and "--force" in err
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 3}', "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        open_folder(tmp_path, {"width": 8})


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    rows = Rows(tmp_path / "log.csv", ("epoch", "loss"))
    rows.add([1, 0.1], [2, 1 / 3])
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,0.1\n2,0.333333333\n"
    rows.close()


def test_a_non_finite_loss_ends_the_run_with_a_row_that_says_so_and_the_sweep_goes_on(
    tmp_path, capsys, monkeypatch
):
    calls = []

    def poison(options, data, seed):  # after the network was tried
        calls.append(seed)
        data.std[:] = math.nan
        chance = {"train_loss": {"mean": 6.0, "std": 1.0}, "train_error": {"mean": 0.9, "std": 0.1}}
        return chance | {"points": 1}

    monkeypatch.setattr(train, "measure_chance", poison)
    assert run("--elr", 0.01, 0.1, *QUICK, "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    told = "undecided: in epoch 0 the loss is not finite"
    assert not err and out.count(told) == 2 and len(calls) == 1
    assert read(tmp_path / "elr=1e-01.csv")[-1]["train_loss"] == "nan"


def test_quiet_when_not_on_a_terminal_and_the_last_lines_say_where_the_files_are_and_what_is_next(
    tmp_path, capsys
):
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == 3
    assert lines[2].startswith("next: python train.py --angle")
    assert lines[1] == f"written: {tmp_path / 'regimes.csv'}, {tmp_path / 'regimes.png'}"


NETWORK = """
from torch import nn

def net(channels, classes):
    layers = [nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

def plain(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))

def narrow(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 3), nn.BatchNorm1d(3))

def broken(channels, classes):
    return nn.Linear(3, 3)

def other(options):
    return nn.Linear(64, 10)

number = 3
"""


@pytest.mark.parametrize("sphere", ["network", "layer", "row"])
def test_a_network_of_ones_own_is_trained_on_the_spheres_that_were_found(tmp_path, capsys, sphere):
    (tmp_path / "mine.py").write_text(NETWORK)
    command = [
        "--model",
        f"{tmp_path}/mine.py:net",
        "--elr",
        0.001,
        "--epochs",
        2,
        "--batch-size",
        64,
        "--sphere",
        sphere,
    ]
    assert run(*command, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "  0.weight\n" in out and "  3.weight\n" in out and "by plain SGD:" in out
    layers = {row["layer"] for row in read(tmp_path / "out" / "elr=1e-03.layers.csv")}
    found = {"0.weight", "3.weight"} | (
        set() if sphere == "row" else {"0.bias", "1.weight", "1.bias"}
    )
    assert layers == found
    assert set(out.split("by plain SGD: ")[1].splitlines()[0].split(", ")).isdisjoint(found)
    before = read(tmp_path / "out" / "elr=1e-03.csv")
    assert float(before[2]["train_loss"]) < float(before[0]["train_loss"])


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("{}/none.py:net", [], "none.py cannot be imported (FileNotFoundError"),
        ("{}/mine.py:none", [], "has no function 'none'"),
        ("{}/mine.py:number", [], "has no function 'number'"),
        ("{}/mine.py:plain", [], "no scale-invariant weights"),
        ("{}/mine.py:narrow", [], "the network's output is [16, 3], not [16, 10 classes]"),
        ("{}/mine.py:broken", [], "cannot be run on the data"),
        ("{}/mine.py:other", [], "other() takes 1 positional argument"),
        ("{}/bad.py:net", [], "cannot be imported (SyntaxError"),
        ("{}/mine.py:net", ["--width", "8"], "--width: a network of your own has its own"),
        ("{}/mine.py:net", ["--affine"], "--affine: a network of your own has its own"),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line(
    tmp_path, capsys, monkeypatch, model, more, message
):
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "bad.py").write_text("def net(:")
    with pytest.raises(SystemExit) as exit:
        run("--elr", 0.1, "--model", model.format(tmp_path), *more, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- each option changes what it should, only


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run without further options."""
    folder = tmp_path_factory.mktemp("plain")
    assert run("--elr", 0.01, *QUICK, "--out", folder) == 0
    return folder


def log(folder, name="elr=1e-02"):
    return [{k: float(v) for k, v in row.items()} for row in read(folder / f"{name}.csv")]


def net_of(folder, name="elr=1e-02"):
    return torch.load(folder / f"{name}.pt", weights_only=True)["net"]


def same(a, b, columns):
    return all(x[c] == y[c] for x, y in zip(a, b, strict=True) for c in columns)


LEARNED = ["train_loss", "train_error", "grad_norm", "angle", "radial", "test_loss", "test_error"]
AT_THE_START = ["train_loss", "train_error", "test_loss", "test_error"]


def test_resnet18_runs_through_the_same_loop(tmp_path, capsys):
    assert (
        run(
            "--model",
            "resnet18",
            "--elr",
            0.001,
            "--width",
            2,
            "--epochs",
            1,
            "--batch-size",
            256,
            "--threads",
            1,
            "--sphere",
            "layer",
            "--out",
            tmp_path,
        )
        == 0
    )
    layers = {row["layer"] for row in read(tmp_path / "elr=1e-03.layers.csv")}
    assert len(layers) == 20 and "stage2_block1.shortcut.1.weight" in layers


@pytest.mark.parametrize("model", ["convnet", "resnet18"] if SLOW else ["convnet"])
def test_affine_and_train_head_train_the_rest_by_plain_sgd_and_leave_the_sphere_its_elr(
    tmp_path, model
):
    command = [
        "--model",
        model,
        "--elr",
        0.01,
        "--width",
        2,
        "--epochs",
        2,
        "--batch-size",
        256,
        "--threads",
        1,
    ]
    assert run(*command, "--out", tmp_path / "fixed") == 0
    assert run(*command, "--affine", "--train-head", "--out", tmp_path / "both") == 0
    before, after = log(tmp_path / "fixed"), log(tmp_path / "both")
    assert (
        same(before[:1], after[:1], AT_THE_START)
        and before[1]["train_loss"] != after[1]["train_loss"]
    )
    fixed, both = net_of(tmp_path / "fixed"), net_of(tmp_path / "both")
    assert all(key in both for key in fixed)
    scales = [key for key in both if key not in fixed]
    assert scales and all(
        not torch.equal(both[key], torch.full_like(both[key], "weight" in key)) for key in scales
    )
    torch.manual_seed(0)
    start = MODELS[model](1, 10, 2).head.weight
    assert torch.equal(fixed["head.weight"], start) and not torch.equal(both["head.weight"], start)
    layers = [read(tmp_path / name / "elr=1e-02.layers.csv") for name in ("fixed", "both")]
    assert [row["layer"] for row in layers[0]] == [row["layer"] for row in layers[1]]
    assert sum(1 / float(row["elr"]) for row in layers[1] if row["epoch"] == "0") == pytest.approx(
        1 / 0.01, rel=1e-5
    )


def test_momentum_is_the_heavy_ball_of_the_optimizer(tmp_path, plain):
    assert run("--elr", 0.001, *QUICK, "--momentum", 0.9, "--out", tmp_path) == 0
    rows = log(tmp_path, "elr=1e-03")
    assert same(
        rows[:1],
        log(plain)[:1],
        ["train_loss", "train_error", "grad_norm", "test_loss", "test_error"],
    )
    state = torch.load(tmp_path / "elr=1e-03.pt", weights_only=True)["sphere"]
    assert state["param_groups"][0]["momentum"] == 0.9 and len(state["state"]) == 4
    # Along a slowly turning gradient the steps of the heavy ball are 1/(1 − β) as long.
    assert 2 < math.tan(rows[2]["angle"]) / (0.001 * rows[2]["grad_norm"]) < 10


def test_schedules_set_the_elr_of_each_epoch(tmp_path, plain):
    assert run("--elr", 0.01, *QUICK, "--schedule", "cosine", "--out", tmp_path / "cosine") == 0
    rows = log(tmp_path / "cosine")
    assert [row["elr"] for row in rows] == pytest.approx([0.01, 0.01, 0.005])
    assert (
        same(rows[:2], log(plain)[:2], LEARNED)
        and rows[2]["train_loss"] != log(plain)[2]["train_loss"]
    )
    layers = read(tmp_path / "cosine" / "elr=1e-02.layers.csv")
    assert sum(1 / float(row["elr"]) for row in layers if row["epoch"] == "2") == pytest.approx(
        1 / 0.005, rel=1e-2
    )


def test_each_round_of_refine_bisects_what_the_rounds_before_have_left(
    tmp_path, monkeypatch, capsys
):
    """On made logs, whose boundary is at ELR 0.02; and what is best done next."""

    def made(options, data, pair, tell, patient):
        path, name = runs.name_of(options, pair)
        rows = ["epoch,train_loss,train_error"]
        for epoch in range(41):
            loss = 3 / (1 + epoch) ** 2 if pair[0] < 0.02 else 1 + 0.05 * (-1) ** epoch
            rows.append(f"{epoch},{loss},{loss / 4}")
        path.write_text("\n".join(rows) + "\n")
        return name, "made", False

    monkeypatch.setattr(train, "run_to_verdict", made)
    command = ["--elr", 1e-3, 1e-1, "--jobs", 1, *QUICK, "--out", tmp_path]
    assert run(*command, "--force") == 0
    *_, then, angle = capsys.readouterr().out.splitlines()
    same_options = f"--epochs 2 --width 2 --batch-size 128 --out {tmp_path}"
    assert then == f"next: python train.py --elr 0.1 --then 0.0001 {same_options}"
    assert angle == f"next: python train.py --angle {runs.ANGLE} {same_options}"
    for rounds, expected in ((1, ["0.001", "0.01", "0.1"]), (3, ["0.0178", "0.0316"])):
        assert run(*command, "--refine", rounds, "--max-epochs", 50, "--force") == 0
        found = [row["elr"] for row in read(tmp_path / "regimes.csv")]
        assert set(expected) <= set(found) and len(found) == 2 + rounds


def test_label_noise_is_learned_and_leaves_the_test_set(tmp_path, plain):
    assert run("--elr", 0.001, *QUICK, "--label-noise", 0.25, "--out", tmp_path) == 0
    rows = log(tmp_path, "elr=1e-03")
    more = ["--epochs", 4, "--batch-size", 32, "--label-noise", 0.25, "--out", tmp_path / "wide"]
    assert run("--elr", 0.001, *more) == 0
    wide = log(tmp_path / "wide", "elr=1e-03")[4]
    assert wide["train_error"] > wide["test_error"] + 0.1  # a quarter of its labels is wrong
    assert same(rows[:1], log(plain)[:1], ["test_loss", "test_error"])
    assert rows[0]["train_loss"] != log(plain)[0]["train_loss"]


def test_augment_changes_the_training_images_alone(tmp_path, plain):
    assert run("--elr", 0.01, *QUICK, "--augment", "--out", tmp_path) == 0
    rows, before = log(tmp_path), log(plain)
    assert rows[0]["train_loss"] != before[0]["train_loss"] and [r["step"] for r in rows] == [
        r["step"] for r in before
    ]
    chance = [
        json.loads((folder / "config.json").read_text())["chance"] for folder in (tmp_path, plain)
    ]
    assert chance[0] == chance[1]


def test_the_whole_space_is_torchs_sgd_and_logs_the_elr_that_it_implies(tmp_path, plain, capsys):
    more = ["--lr", 0.05, "--wd", 0.01, "--momentum", 0.9]
    assert run(*QUICK, *more, "--out", tmp_path) == 0
    assert "lr 5e-02: ELR 0.0" in capsys.readouterr().out
    rows = log(tmp_path, "lr=5e-02")
    assert same(rows[:1], log(plain)[:1], AT_THE_START)
    torch.manual_seed(0)
    net, digits, order = (
        MODELS["convnet"](1, 10, 2),
        load("digits"),
        torch.Generator().manual_seed(0),
    )
    weights = [net.get_parameter(name) for (name,) in net.layer_groups]
    sgd = torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.01)
    for row in rows:
        implied = []
        for index in batches(1437, 128, order):
            implied.append(0.05 / 0.1 / sum(w.double().square().sum().item() for w in weights))
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(net(digits.inputs(index)), digits.y[index]).backward()
            if row["epoch"]:
                sgd.step()
        assert row["elr"] == pytest.approx(sum(implied) / len(implied), rel=1e-5)
    ours = net_of(tmp_path, "lr=5e-02")
    assert all(
        torch.allclose(ours[name], net.get_parameter(name), atol=1e-5)
        for (name,) in net.layer_groups
    )
    for row in read(tmp_path / "lr=5e-02.layers.csv")[
        :4
    ]:  # before training, where the mean over the epoch is of equal values
        assert float(row["elr"]) * float(row["norm"]) ** 2 == pytest.approx(
            0.05 / (1 - 0.9), rel=1e-5
        )


def test_in_the_whole_space_ten_times_the_weights_and_a_hundred_times_the_rate_are_the_same_training():
    curves, digits = [], load("digits")
    for factor in (1, 10):
        torch.manual_seed(0)
        net, order = MODELS["convnet"](1, 10, 4).double(), torch.Generator().manual_seed(0)
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.eps = 1e-14  # whose part in the variance is not scale invariant
        weights = [net.get_parameter(name) for (name,) in net.layer_groups]
        torch._foreach_mul_([w.data for w in weights], factor)
        optimizer = torch.optim.SGD(weights, lr=0.01 * factor**2, momentum=0.9)
        curves.append([])
        for index in batches(1437, 64, order):
            loss = torch.nn.functional.cross_entropy(
                net(digits.inputs(index).double()), digits.y[index]
            )
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-6) and curves[0][-1] < 0.7 * curves[0][0]


def test_a_data_set_that_cannot_be_downloaded_is_one_line(tmp_path, capsys, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.chdir(tmp_path)  # where nothing is downloaded yet
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(SystemExit) as exit:
        run(
            "--data",
            "cifar10",
            "--elr",
            0.1,
            "--out",
            tmp_path / "out",
        )
    err = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and err.count("\n") == 1
        and "argument --data: cifar10 cannot be downloaded" in err
    )
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- resume, the toy


def equal_runs(a, b, name="elr=1e-02"):
    """But for the seconds: rows, layers, and every tensor of the checkpoint."""
    assert without_seconds(a / f"{name}.csv") == without_seconds(b / f"{name}.csv")
    assert (a / f"{name}.layers.csv").read_bytes() == (b / f"{name}.layers.csv").read_bytes()
    one, two = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (a, b))
    for state in (one, two):
        del state["seconds"]
    leaves = [torch.utils._pytree.tree_flatten(x) for x in (one, two)]
    assert leaves[0][1] == leaves[1][1]
    pairs = zip(leaves[0][0], leaves[1][0], strict=True)
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize(
    "more",
    [
        ["--momentum", 0.9, "--augment", "--affine"],
        ["--lr", 0.01, "--wd", 1e-3, "--momentum", 0.9],
    ],
)
def test_a_run_that_goes_on_is_the_run_it_would_have_been(tmp_path, more):
    which = [] if "--lr" in more else ["--elr", 0.01]
    command = [*which, "--width", 2, "--batch-size", 64, *more]
    assert run(*command, "--epochs", 3, "--out", tmp_path / "whole") == 0
    for epochs in (1, 3):
        assert run(*command, "--epochs", epochs, "--out", tmp_path / "parts") == 0
    equal_runs(
        tmp_path / "whole", tmp_path / "parts", "lr=1e-02" if "--lr" in more else "elr=1e-02"
    )


def test_rows_beyond_the_checkpoint_and_a_cut_off_row_are_dropped(tmp_path):
    command = ["--elr", 0.01, "--width", 2, "--batch-size", 128]
    assert run(*command, "--epochs", 3, "--out", tmp_path / "whole") == 0
    assert run(*command, "--epochs", 2, "--out", tmp_path / "parts") == 0
    for name, row in (
        ("elr=1e-02.csv", "3,66,0.01,1.5,0.5,1,1,1,1,1,1,1\n4,88,0.0"),
        ("elr=1e-02.layers.csv", "3,conv1.weight,1,2,3"),
    ):
        with open(tmp_path / "parts" / name, "a") as file:
            file.write(row)
    assert run(*command, "--epochs", 3, "--out", tmp_path / "parts") == 0
    equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    (tmp_path / "elr=1e-02.pt").write_bytes(b"junk")
    before = (tmp_path / "elr=1e-02.csv").read_bytes()
    capsys.readouterr()
    assert run("--elr", 0.01, *QUICK, "--epochs", 3, "--out", tmp_path) == 1
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "elr=1e-02.pt is damaged, or no checkpoint of train.py: remove it" in err
    )
    assert (tmp_path / "elr=1e-02.csv").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- fast


def test_bf16_computes_in_bfloat16_but_keeps_weights_and_step_in_float32(tmp_path):
    for dtype in ("fp32", "bf16"):
        assert (
            run("--elr", 0.01, *QUICK, "--dtype", dtype, "--average", 1, "--out", tmp_path / dtype)
            == 0
        )
    single, half = (read(tmp_path / dtype / "elr=1e-02.csv") for dtype in ("fp32", "bf16"))
    for column in (
        "train_loss",
        "grad_norm",
    ):  # the same weights, to the 8 bits of bfloat16 in each of some 20 operations
        assert half[0][column] != single[0][column]
        assert float(half[0][column]) == pytest.approx(float(single[0][column]), rel=0.05)
    assert 10 * float(single[-1]["radial"]) < float(half[-1]["radial"]) < 0.01
    checkpoint = torch.load(tmp_path / "bf16" / "elr=1e-02.pt", weights_only=True)
    weights = [checkpoint["net"][f"conv{i}.weight"] for i in (1, 2, 3, 4)]
    assert all(w.dtype == torch.float32 and (w.bfloat16() != w).any() for w in weights)
    radius = checkpoint["sphere"]["state"][0]["radius"].item()  # met to float32, not to bfloat16
    assert torch.cat([w.flatten() for w in weights]).double().norm().item() == pytest.approx(
        radius, rel=1e-6
    )


def test_an_elr_in_the_devices_memory_follows_the_schedule_too(tmp_path, monkeypatch):
    """As a CUDA graph needs it; here, without one. At an ELR far below the boundary, where what float32
    rounds off the ELR does not grow along the way."""
    monkeypatch.setattr(train, "Captured", lambda step: step)
    more = ["--elr", "1e-06", "--schedule", "cosine", "--affine", "--out"]
    for name in ("number", "tensor"):
        parsed, data = parse([*QUICK, *more, str(tmp_path / name)])
        parsed.graph, parsed.chance = name == "tensor", {"0": None}
        train.run_to_verdict(parsed, data, (1e-6, 0), lambda *message: None, False)
        checkpoint = torch.load(tmp_path / name / "elr=1e-06.pt", weights_only=True)
        lrs = [group["lr"] for group in checkpoint["sphere"]["param_groups"]]
        assert len(lrs) == 2 and all(isinstance(lr, torch.Tensor) == parsed.graph for lr in lrs)
    number, tensor = (read(tmp_path / name / "elr=1e-06.csv") for name in ("number", "tensor"))
    assert [row["elr"] for row in tensor] == ["1e-06", "1e-06", "5e-07"]
    for one, other in zip(number, tensor, strict=True):  # apart by the rounding to float32
        for column in one.keys() - {"seconds", "radial"}:
            assert float(other[column]) == pytest.approx(float(one[column]), rel=2e-3, abs=1e-9)


class Graph:
    """What torch.cuda.CUDAGraph does, as far as it can be done without a GPU: a replay overwrites the captured output."""

    def replay(self):
        self.captured.out[0].copy_(self.captured.function(self.captured.index)[0])


@pytest.mark.parametrize("refuses", [False, True])
def test_a_captured_step_is_the_step_and_where_it_cannot_be_captured_one_line_says_so(
    monkeypatch, refuses
):
    @contextmanager
    def capture(graph, stream):
        if refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        graph.captured = captured
        yield

    fakes = {"graph": capture, "CUDAGraph": Graph}
    for name in ("Stream", "current_stream", "set_stream", "synchronize"):
        fakes[name] = lambda *_: None
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    captured = Captured(lambda index: (index * 2,))
    for i in range(3 if refuses else 6):
        assert captured(torch.tensor([i, 3]))[0].tolist() == [2 * i, 6]
    if refuses:
        with pytest.raises(
            ValueError,
            match="^no CUDA graph: leave --graph out .operation not permitted.*capturing.$",
        ):
            captured(torch.tensor([4, 3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_with_and_without_the_cuda_graph_training_is_the_same_to_rounding(tmp_path):
    for name, more in (("eager", []), ("graph", ["--graph"])):
        assert run("--elr", 0.001, *QUICK, "--augment", *more, "--out", tmp_path / name) == 0
    eager, graph = (read(tmp_path / name / "elr=1e-03.csv") for name in ("eager", "graph"))
    for one, other in zip(eager, graph, strict=True):
        for column in ("train_loss", "grad_norm", "angle", "test_loss"):
            assert float(other[column]) == pytest.approx(float(one[column]), rel=1e-3), column


# --------------------------------------------------------------- the angle, max-epochs, jobs, next


def test_a_run_at_an_angle_turns_by_it_and_logs_the_elr_that_follows(tmp_path, capsys):
    assert run("--elr", 0.001, *QUICK, "--out", tmp_path) == 0
    capsys.readouterr()
    assert run("--angle", 0.1, *QUICK, "--epochs", 5, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("angle 1e-01: ") and "test error " in out.splitlines()[0]
    rows = log(tmp_path, "angle=1e-01")
    for epoch, row in enumerate(rows):
        expected = 0.1 * (1 + math.cos(math.pi * max(epoch - 1, 0) / 5)) / 2
        assert row["angle"] == pytest.approx(expected, rel=1e-6)
        assert row["elr"] == pytest.approx(math.tan(row["angle"]) / row["grad_norm"], rel=1e-6)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    table = [row["elr"] for row in read(tmp_path / "regimes.csv")]
    assert table == ["0.001"]  # a run whose ELR moved has no row
    flags = ["--schedule", "constant", "--sphere", "layer", "--affine", "--out", tmp_path / "more"]
    assert run("--angle", 0.1, *QUICK, *flags, "--then", 0.01) == 0
    assert "; then at 0.01: train loss " in capsys.readouterr().out
    assert {round(row["angle"], 9) for row in log(tmp_path / "more", "angle=1e-01")} == {0.1}
    then = log(tmp_path / "more", "angle=1e-01.then=1e-02")
    assert {round(row["angle"], 9) for row in then} == {0.01}


def test_max_epochs_goes_on_with_an_undecided_run_until_it_is_decided_or_so_long(
    tmp_path, capsys, monkeypatch
):
    """On made logs."""

    def made(options, data, job, epochs, tell):
        rows = [f"{e},{e},{3 / (1 + e) ** 2},{0.9 / (1 + e)},0" for e in range(epochs + 1)]
        text = "epoch,step,train_loss,train_error,test_error\n" + "\n".join(rows) + "\n"
        there = job.path.exists() and job.path.read_text() == text
        job.path.write_text(text)
        return not there

    monkeypatch.setattr(train, "continue_to_epoch", made)
    command = ["--elr", 0.001, *QUICK]
    assert run(*command, "--max-epochs", 5, "--out", tmp_path / "short") == 0
    assert len(log(tmp_path / "short", "elr=1e-03")) == 6  # it asks for 8
    assert run(*command, "--max-epochs", 400, "--out", tmp_path / "long") == 0
    assert "elr 1e-03: convergence: " in capsys.readouterr().out
    length = len(log(tmp_path / "long", "elr=1e-03"))
    assert 8 < length < 400
    assert run(*command, "--max-epochs", 400, "--out", tmp_path / "long") == 0
    assert len(log(tmp_path / "long", "elr=1e-03")) == length


def test_threads_and_jobs_are_chosen_by_the_work_and_kept_in_the_config(tmp_path):
    cores = machine.cores()
    for name, arguments, jobs, threads in (
        ("one", ["--elr", "0.1"], 1, 1),
        ("wide", ["--elr", "0.1", "--width", "64", "--batch-size", "64"], 1, cores),
        ("two", ["--elr", "0.1", "0.2"], min(2, cores), 1),
        ("own", ["--elr", "0.1", "0.2", "--jobs", "1", "--threads", "2"], 1, 2),
    ):
        parsed, _ = parse([*arguments, "--out", str(tmp_path / name)])
        assert (parsed.jobs, parsed.threads) == (jobs, threads), name
    torch.set_num_threads(1)
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["jobs"], config["threads"]) == (1, 1)


# ------------------------------------------------------------------------------ numbers and tokens

MLP = """
from torch import nn

def mlp(example, classes):
    return nn.Sequential(nn.Linear(len(example), 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, classes))

def tokens(tokens, example, classes):
    net = [nn.Embedding(tokens, 8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(8 * len(example), classes)]
    return nn.Sequential(*net)
"""


def test_a_file_of_numbers_trains_a_network_of_ones_own_to_a_named_regime(tmp_path, capsys):
    import numpy as np

    (tmp_path / "mine.py").write_text(MLP)
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=400)
    x = rng.normal(0, 1, (400, 6)) + 2 * np.eye(3, 6)[y]
    np.savez(tmp_path / "mine.npz", x=x[:300], y=y[:300], test_x=x[300:], test_y=y[300:])
    command = ["--data", tmp_path / "mine.npz", "--model", f"{tmp_path}/mine.py:mlp"]
    assert run(*command, "--elr", 3e-3, 0.03, "--epochs", 20, "--out", tmp_path / "out") == 0
    regimes = [row["regime"] for row in read(tmp_path / "out" / "regimes.csv")]
    assert regimes[1] == "equilibrium"
    assert "0.weight" in capsys.readouterr().out
    assert run(*command, "--angle", 1.5, "--epochs", 4, "--out", tmp_path / "out2") == 0


def test_modular_addition_runs_through_the_loop_on_every_kind_of_sphere(tmp_path):
    command = ["--data", "modular", "--modulus", 7, "--width", 8, "--epochs", 2, "--elr", 1e-3]
    for sphere in ("network", "layer", "row"):
        more = ["--sphere", sphere, "--momentum", 0.9, "--out", tmp_path / sphere]
        assert run(*command, *more) == 0
        layers = read(tmp_path / sphere / "elr=1e-03.layers.csv")
        assert {row["layer"] for row in layers} >= {"embedding", "query", "up", "head"}
        elrs = [float(row["elr"]) for row in layers if row["epoch"] == "0"]
        if sphere == "network":
            assert sum(1 / elr for elr in elrs) == pytest.approx(1000, rel=1e-6)
        else:
            assert elrs == pytest.approx([1e-3] * 9, rel=1e-6)
    own = f"{tmp_path}/mine.py:tokens"
    (tmp_path / "mine.py").write_text(MLP)
    more = ["--model", own, "--out", tmp_path / "own"]
    assert run("--data", "modular", "--modulus", 7, "--epochs", 2, "--elr", 1e-3, *more) == 0


# ------------------------------------------------------------------------- extremes of all options

OPTIONS = """--elr --sweep --angle --lr --wd --refine --max-epochs --seed --seeds --epochs --then
    --average --momentum --width --modulus --batch-size --label-noise --jobs
    --threads""".split()
# Among them the ends of what a float, a float32 and an integer of the machine hold.
NUMBERS = st.sampled_from(["0", "-1", "1", "2", "nan", "inf", "1e308", "5e-324", "1e-320", "1e30"])
NUMBERS |= st.sampled_from(["3.4e38", "1.2e-38", "9" * 17, "", "x", "0x10", "1_0", "9" * 5000])
NUMBERS |= st.floats().map(repr) | st.integers().map(str) | st.text(max_size=5)


@settings(max_examples=4000 if SLOW else 120, deadline=None, derandomize=not SLOW)
@given(st.sampled_from(OPTIONS), st.lists(NUMBERS, min_size=3, max_size=3))
def test_an_extreme_number_is_one_line_or_taken(tmp_path_factory, option, numbers):
    """All scripts check before they do anything, so that the check alone is asked here."""
    first = [] if option in ("--elr", "--sweep", "--angle", "--lr") else ["--elr", "0.1"]
    first += ["--out", str(tmp_path_factory.getbasetemp() / "extremes"), "--force"]
    numbers = numbers if option in ("--elr", "--sweep", "--angle", "--lr") else numbers[:1]
    assume(option != "--width" or len(numbers[0]) not in (3, 4, 5))  # which take much memory
    err = io.StringIO()
    try:
        with redirect_stderr(err):
            parsed, _ = parse([*first, option, *numbers])
    except SystemExit as exit:
        assert exit.code in (0, 2) and len(err.getvalue().splitlines()) <= 1, err.getvalue()
        assert len(err.getvalue()) < 6000
    else:
        assert parsed.values and all(1.1e-38 < x < 3.5e38 for x in parsed.values)
    torch.set_num_threads(1)


@pytest.mark.parametrize("elr", ["1.2e-38", "3.3e38"])
def test_the_ends_of_what_float32_holds_run_without_a_traceback(tmp_path, capsys, elr):
    more = ["--width", 2, "--epochs", 1, "--batch-size", 256, "--threads", 1, "--out", tmp_path]
    assert run("--elr", elr, "0.1", *more) == 0
    assert "Traceback" not in capsys.readouterr().err
