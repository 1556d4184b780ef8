"""The command line as a user runs it."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from rundir import Rows, open_folder

ROOT = Path(__file__).parent.parent
QUICK = ["--width", "2", "--epochs", "2", "--batch-size", "64"]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(path)]


def run(*arguments):
    return train.main([str(a) for a in arguments])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_three_regimes_are_named(tmp_path, capsys, seed):
    assert run("--elr", 0.001, 0.01, 0.3, "--seed", seed, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    suffix = f" seed {seed}" if seed else ""
    for elr, regime in (("1e-03", "convergence"), ("1e-02", "chaotic equilibrium"), ("3e-01", "divergence")):
        assert f"elr {elr}{suffix}: {regime}: " in out


def test_a_short_run_at_a_tiny_elr_is_not_called_equilibrium_or_divergence(tmp_path, capsys):
    assert run("--elr", 1e-5, "--epochs", 4, "--out", tmp_path) == 0
    assert "elr 1e-05: undecided: too short" in capsys.readouterr().out


def test_a_run_writes_the_files_of_the_contract(tmp_path, capsys):
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
        ]
    )
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and [row["step"] for row in rows] == ["0", "22", "44"]
    for row in rows:
        assert all(math.isfinite(float(cell)) for cell in row.values())
        assert 0 <= float(row["train_error"]) <= 1 and 0 <= float(row["test_error"]) <= 1 and float(row["radial"]) < 1e-4
    layers = read(tmp_path / "elr=1e-02.layers.csv")
    assert [row["layer"] for row in layers[:4]] == [f"conv{i}.weight" for i in (1, 2, 3, 4)] and len(layers) == 12
    for epoch in ("0", "1", "2"):  # the squares of the norms add up to the sphere's, which is what ELR and norm say together
        squares = [float(row["norm"]) ** 2 for row in layers if row["epoch"] == epoch]
        elrs = [float(row["elr"]) for row in layers if row["epoch"] == epoch]
        assert sum(1 / elr for elr in elrs) == pytest.approx(1 / 0.01, rel=0.01) and len(squares) == 4
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["width"] == 2 and config["chance"]["0"]["points"] == 512 and "torch" in config["versions"]
    assert abs(config["chance"]["0"]["train_error"]["mean"] - 0.9) < 0.02
    checkpoint = torch.load(tmp_path / "elr=1e-02.pt", weights_only=True)
    assert checkpoint["epoch"] == 2 and "conv1.weight" in checkpoint["net"]
    assert len(read(tmp_path / "regimes.csv")) == 1 and (tmp_path / "regimes.png").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_commands_write_equal_bytes_but_for_the_seconds(tmp_path):
    for name in ("a", "b"):
        assert run("--elr", 0.01, 0.1, *QUICK, "--out", tmp_path / name) == 0
    for path in (tmp_path / "a").glob("elr=*.csv"):
        assert without_seconds(path) == without_seconds(tmp_path / "b" / path.name)
    assert (tmp_path / "a" / "regimes.csv").read_bytes() == (tmp_path / "b" / "regimes.csv").read_bytes()


def test_every_elr_starts_from_the_same_point_and_a_seed_changes_it(tmp_path):
    assert run("--elr", 0.01, 0.1, *QUICK, "--out", tmp_path) == 0
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path, "--seed", 1) == 0
    first = [float(read(tmp_path / f"{name}.csv")[0]["train_loss"]) for name in ("elr=1e-02", "elr=1e-01", "elr=1e-02.seed=1")]
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
    norms = [float(row["norm"]) for row in read(tmp_path / "elr=1e-02.layers.csv") if row["layer"] == "conv1.weight"]
    assert max(norms) / min(norms) > 1.001


def test_a_finished_run_is_not_done_again_and_force_starts_afresh(tmp_path, capsys):
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    before = (tmp_path / "elr=1e-02.csv").read_bytes()
    capsys.readouterr()
    assert run("--elr", 0.01, *QUICK, "--out", tmp_path) == 0
    assert "(already done)" in capsys.readouterr().out and (tmp_path / "elr=1e-02.csv").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert run("--elr", 0.1, *QUICK, "--out", tmp_path, "--force") == 0
    assert not (tmp_path / "elr=1e-02.csv").exists() and (tmp_path / "notes.txt").exists()


BAD = [
    (["--elr", "0"], "--elr: '0' is not"),
    (["--elr", "-1"], "--elr: '-1' is not"),
    (["--elr", "nan"], "--elr: 'nan' is not"),
    (["--elr", "inf"], "--elr: 'inf' is not"),
    (["--elr", "abc"], "--elr: 'abc' is not"),
    ([], "--elr --sweep is required"),
    (["--elr", "0.1", "--sweep"], "not allowed with"),
    (["--elr", "0.1", "--epochs", "0"], "--epochs: '0' is not"),
    (["--elr", "0.1", "--epochs", "2.5"], "--epochs: '2.5' is not a whole"),
    (["--sweep", "1", "1e-5", "9"], "--sweep: 1 1e-5 9 is not LO HI N"),
    (["--sweep", "1e-3", "1"], "--sweep: 1e-3 1 is not LO HI N"),
    (["--sweep", "1e-3", "1", "1"], "--sweep: 1e-3 1 1 is not LO HI N"),
    (["--sweep", "1e-3", "x", "5"], "--sweep: 'x' is not"),
    (["--elr", "0.1", "--batch-size", "0"], "--batch-size: '0' is not"),
    (["--elr", "0.1", "--batch-size", "5000"], "--batch-size: 5000 is more than the 1437"),
    (["--elr", "0.1", "--data", "nowhere"], "--data: no data set 'nowhere'"),
    (["--elr", "0.1", "--model", "vgg"], "--model: no network 'vgg'"),
    (["--elr", "0.1", "--sphere", "ball"], "--sphere: invalid choice: 'ball'"),
    (["--elr", "0.1", "--seed", "-1"], "--seed: -1 is not"),
    (["--elr", "0.1", "--device", "abacus"], "--device: 'abacus' cannot be used"),
]
if not torch.cuda.is_available():
    BAD.append((["--elr", "0.1", "--device", "cuda"], "--device: 'cuda' cannot be used"))


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_arguments_are_one_line_status_2_and_nothing_written(tmp_path, capsys, monkeypatch, arguments, message):
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
    assert exit.value.code == 2 and err.count("\n") == 1 and "argument --out" in err and "cannot be written" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_with_other_options_names_the_first_that_differs(tmp_path, capsys):
    assert run("--elr", 0.1, *QUICK, "--out", tmp_path) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run("--elr", 0.1, *QUICK, "--width", 3, "--out", tmp_path)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and "(width is 2 there, 3 here)" in err and "--force" in err
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


def test_a_non_finite_loss_ends_the_run_with_a_row_that_says_so_and_the_sweep_goes_on(tmp_path, capsys, monkeypatch):
    real, calls = train.load, []

    def poisoned(*arguments):
        data = real(*arguments)
        data.x[7] = math.nan
        return data

    monkeypatch.setattr(train, "load", poisoned)
    monkeypatch.setattr(
        train,
        "measure_chance",
        lambda *a: (
            calls.append(a) or {"points": 1, "train_loss": {"mean": 6.0, "std": 1.0}, "train_error": {"mean": 0.9, "std": 0.1}}
        ),
    )
    assert run("--elr", 0.01, 0.1, *QUICK, "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    assert err.count("is not finite in epoch 0") == 2 and out.count("undecided: stopped in epoch 0") == 2 and len(calls) == 1
    assert read(tmp_path / "elr=1e-01.csv")[-1]["train_loss"] == "nan"


def test_interrupt_leaves_whole_rows_and_exit_status_130(tmp_path):
    command = [sys.executable, "train.py", "--elr", "0.01", "--epochs", "1000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "elr=1e-02.csv"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("\n") == 1 and "interrupted" in err and "Traceback" not in err
    text = log.read_text()
    assert text.endswith("\n") and {line.count(",") for line in text.splitlines()} == {10}


def test_quiet_when_not_on_a_terminal_and_the_last_line_says_where_the_files_are(tmp_path):
    command = [sys.executable, "train.py", "--elr", "0.01", *QUICK, "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert len(result.stdout.splitlines()) == 2 and result.stdout.splitlines()[1].startswith("written: ")


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

number = 3
"""


@pytest.mark.parametrize("sphere", ["network", "layer", "row"])
def test_a_network_of_ones_own_is_trained_on_the_spheres_that_were_found(tmp_path, capsys, sphere):
    (tmp_path / "mine.py").write_text(NETWORK)
    command = ["--model", f"{tmp_path}/mine.py:net", "--elr", 0.001, "--epochs", 2, "--batch-size", 64, "--sphere", sphere]
    assert run(*command, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "  0.weight\n" in out and "  3.weight\n" in out and "by plain SGD:" in out
    layers = {row["layer"] for row in read(tmp_path / "out" / "elr=1e-03.layers.csv")}
    found = {"0.weight", "3.weight"} | (set() if sphere == "row" else {"0.bias", "1.weight", "1.bias"})
    assert layers == found
    assert set(out.split("by plain SGD: ")[1].splitlines()[0].split(", ")).isdisjoint(found)
    before = read(tmp_path / "out" / "elr=1e-03.csv")
    assert run(*command, "--out", tmp_path / "other", "--head-lr", 1e-6) == 0
    after = read(tmp_path / "other" / "elr=1e-03.csv")
    assert before[0]["train_loss"] == after[0]["train_loss"] and before[2]["train_loss"] != after[2]["train_loss"]


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("{}/none.py:net", [], "--model: no file"),
        ("{}/mine.py:none", [], "has no function 'none'"),
        ("{}/mine.py:number", [], "has no function 'number'"),
        ("{}/mine.py:plain", [], "no scale-invariant weights found"),
        ("{}/mine.py:narrow", [], "the network's output is (32, 3)"),
        ("{}/mine.py:broken", [], "cannot be run on the data"),
        ("{}/bad.py:net", [], "cannot be imported (SyntaxError"),
        ("{}/mine.py:net", ["--width", "8"], "--width is for our own networks"),
        ("convnet", ["--head-lr", "0.1"], "--head-lr: all that convnet trains is on the spheres"),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line(tmp_path, capsys, monkeypatch, model, more, message):
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "bad.py").write_text("def net(:")
    with pytest.raises(SystemExit) as exit:
        run("--elr", 0.1, "--model", model.format(tmp_path), *more, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()


def test_resnet18_runs_through_the_same_loop(tmp_path, capsys):
    assert run("--model", "resnet18", "--elr", 0.001, *QUICK, "--sphere", "layer", "--out", tmp_path) == 0
    layers = {row["layer"] for row in read(tmp_path / "elr=1e-03.layers.csv")}
    assert len(layers) == 20 and "stage2_block1.shortcut.1.weight" in layers
