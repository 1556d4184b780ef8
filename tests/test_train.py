"""The command line as a user runs it."""

import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NOTHING,
    QUICK,
    SUMS,
    checkpoint,
    converging,
    equal_runs,
    equal_sweeps,
    experiment,
    files,
    hovering,
    log,
    make_log,
    no_leftovers,
    read,
    refused,
    run,
    words,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sphere_step
import train
from lab import figures, machine, measure, options, runs
from lab.data import batches, load
from lab.experiment import prepare, what_next
from lab.options import parse
from lab.schedules import value_at
from models import MODELS

SLOW = "SLOW" in os.environ
LEARNED = ["train_loss", "train_error", "test_loss", "test_error"]
COLUMNS = """epoch step elr train_loss train_error grad_norm angle radial test_loss test_error
    seconds distance"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("plain"), io.StringIO()
    with redirect_stdout(text):
        assert run(f"--elr 0.01 {QUICK}", folder) == 0
    (folder / "printed").write_text(text.getvalue())
    return folder


def layers_of(folder, name="elr=1e-02"):
    """Of each epoch layer → norm, ELR."""
    found = {}
    for row in read(folder / f"{name}.layers.csv"):
        layers = found.setdefault(row["epoch"], {})
        layers[row["layer"]] = float(row["norm"]), float(row["elr"])
    return list(found.values())


def joint_elr(layers):
    """The squares of the norms add up to the sphere's: so do the inverse ELRs."""
    return 1 / sum(1 / elr for _, elr in layers.values())


# --- what is written


def test_a_run_writes_the_files_of_the_contract(plain):
    rows = log(plain)
    assert list(rows[0]) == COLUMNS.split()
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 0), (1, 5), (2, 10)]
    for row in rows:
        assert all(map(math.isfinite, row.values())) and row["radial"] < 1e-4
        assert 0 <= row["train_error"] <= 1 and 0 <= row["test_error"] <= 1
    epochs = layers_of(plain)
    assert [list(layers) for layers in epochs] == 3 * [[f"conv{i}.weight" for i in range(1, 5)]]
    assert [joint_elr(layers) for layers in epochs] == pytest.approx(3 * [0.01], rel=0.01)
    config = json.loads((plain / "config.json").read_text())
    assert config["command"]["epochs"] == 2 and config["command"]["elr"] == [0.01]
    assert config["options"]["width"] == 2 and config["threads"] == 1
    assert "torch" in config["versions"]
    assert {"train.py", "sphere_step.py", "models.py", "the data"} <= set(config["contents"])
    assert abs(config["chance"]["0"]["train_error"]["mean"] - 0.9) < 0.05
    state = checkpoint(plain)
    assert state["epoch"] == 2 and state["contents"] == config["contents"]
    assert len(read(plain / "regimes.csv")) == 1 and (plain / "regimes.png").exists()
    no_leftovers(plain)


@pytest.mark.draws
def test_verdict_files_and_what_is_next_are_printed(plain, capsys):
    verdict, written, longer, following = (plain / "printed").read_text().splitlines()
    assert verdict.startswith("elr 1e-02: undecided: too short")
    assert written == f"written: {plain / 'regimes.csv'}, {plain / 'regimes.png'}"
    again = "next: python train.py --elr 0.01 --width 2 --batch-size 256 --threads 1"
    assert longer == f"{again} --out {plain} --epochs 8"
    assert following == "next: python train.py --angle 0.05 --width 2 --batch-size 256 --epochs 8"
    before = (plain / "elr=1e-02.csv").read_bytes()
    assert run(f"--elr 0.01 {QUICK}", plain) == 0
    out, err = capsys.readouterr()
    assert out.startswith("elr 1e-02 (already done): undecided: ") and not err
    assert (plain / "elr=1e-02.csv").read_bytes() == before
    assert (plain / "regimes.png").stat().st_size > 10_000


def test_weights_that_became_zero_are_named(plain, tmp_path, capsys):
    """As a transformer's by divergence: their norm in the log is nan, from some epoch to the end."""
    out = shutil.copytree(plain, tmp_path / "run")
    path = out / "elr=1e-02.layers.csv"
    *others, one, two = [line.split(",") for line in path.read_text().splitlines()]
    zeros = [row[:2] + ["nan"] * len(row[2:]) for row in (one, two)]
    always = [row[:2] + ["nan"] * len(row[2:]) for row in others if row[1] == two[1]]  # from 0 on
    without = [row for row in others if row[1] != two[1]]
    for rows in (others + [one, two], others + zeros, without + always + zeros):
        path.write_text("".join(",".join(row) + "\n" for row in rows))
        assert run(f"--elr 0.01 {QUICK}", out) == 0
    _, first, again, one_began_so = capsys.readouterr().out.split("(already done)")
    assert "became 0" not in first and f"of {one[1]}, {two[1]} became 0" in again
    assert f"of {one[1]} became 0" in one_began_so


def test_an_error_of_an_edit_shows_where_it_is(tmp_path, monkeypatch):
    def train_step(run, index, move=True):
        return F.cross_entropy(torch.zeros(3, 2), torch.zeros(4).long())

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(ValueError, match="to match target batch_size"):
        run(f"--elr 0.01 {SUMS}", tmp_path)


def test_equal_commands_write_equal_files_and_start_at_one_point(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        assert run(f"--elr 0.01 0.1 {SUMS}", folder) == 0
    equal_sweeps(a, b)
    assert run(f"--elr 0.01 {SUMS} --seed 1", a) == 0
    names = "elr=1e-02", "elr=1e-01", "elr=1e-02.seed=1"
    first = [log(a, name)[0]["train_loss"] for name in names]
    assert first[0] == first[1] != first[2]


def test_the_figure_is_renewed_within_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def draw(*_):
        drawn.append(now[0])
        now[0] += 1
        return []

    monkeypatch.setattr(figures, "draw", draw)
    monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: now[0]))
    make_log(tmp_path / "elr=1e-02.csv", converging, epochs=1)
    report = figures.Report(SimpleNamespace(out=tmp_path, rank=0))
    for _ in range(100):
        now[0] += 1
        (tmp_path / "regimes.csv").unlink(missing_ok=True)
        report.renew()
        assert len(read(tmp_path / "regimes.csv")) == 1
    assert drawn[0] == 1 and 3 <= len(drawn) <= 1 + now[0] / 20
    for _ in range(2):  # with the last run once, however soon
        report.renew(last=True)
        assert drawn[-1] == now[0] - 1


def test_a_loss_that_is_not_finite_ends_that_run_alone(tmp_path, capsys, monkeypatch):
    def poisoned(run, *args):  # after the network was tried
        found = chance(run, *args)
        run.data.std[:] = math.nan
        return found

    chance = measure.chance
    monkeypatch.setattr(measure, "chance", poisoned)
    assert run(f"--elr 0.01 0.1 {QUICK} --jobs 1", tmp_path) == 0
    out, err = capsys.readouterr()
    assert not err and out.count("undecided: the loss is nan in epoch 0") == 2
    assert read(tmp_path / "elr=1e-01.csv")[-1]["train_loss"] == "nan"


# --- what is refused

# Command | what its one line says.
BAD = """
 | argument --elr: give exactly one of --elr, --sweep, --angle, --lr, --loop
--elr 0.1 --lr 0.1 | --elr: give exactly one of
--elr 0 | --elr: '0' is not a float32 number above 0
--elr abc | --elr: 'abc' is not
--angle 1.6 | --angle: '1.6' is not a float32 number above 0 and below 1.5708
--sweep 1 1e-5 9 | --sweep: it takes LO HI N, LO < HI, 2 ≤ N ≤ 10000: 1e-4 1 13
--sweep 1e-3 1 | --sweep: it takes LO HI N
--sweep 1e-3 1 1 | --sweep: it takes LO HI N
--sweep 1e-3 1 99999999 | --sweep: it takes LO HI N
--loop 1e-3 1 3 | --loop: it takes LO HI N, LO < HI, 8 ≤ N ≤ 10000: 1e-4 1 25
--loop --schedule cosine | --schedule: --loop has its own
--loop --warmup 1 | --warmup: --loop has its own
--elr 0.1 --epochs 2 --warmup 2 | --warmup: it is not less than --epochs
--elr 0.1 --epochs 2 --average 3 | --average: it is more than --epochs
--sweep --refine 2 --schedule cosine | --refine: it takes --sweep, or several constant
--sweep --refine 1 --max-epochs 5 | --max-epochs: it is less than --epochs
--angle 0.1 --max-epochs 50 | --max-epochs: it takes constant ELRs
--angle 0.1 --then 3 | --then: it is no angle below
--lr 0.1 --then 0.01 | --then: it takes a constant ELR
"""
OF_ONE_RUN = """
--epochs 2.5 | --epochs: '2.5' is not a whole number from 1
--batch-size 5000 | --batch-size: 5000 is more than the training set: take at most 1437
--model vgg | --model: no network 'vgg'
--model '' | --model: no network ''
--out '' | --out: it takes a folder
--cooldown 0 --schedule wsd | --cooldown: '0' is not a float32 number above 0
--model transformer | --model: the transformer takes tokens
--model mine.py:net --width 8 | --width: yours has its own
--model convnet --data modular | --model: convnet takes images
--data modular --augment | --augment: this is for images
--data modular --width 6 | argument --width: a transformer's is a multiple of 4
--modulus 7 | --modulus: this is for --data modular
--seed -1 | --seed: '-1' is not a whole number from 0 to 1073741824
--wd 0.1 | --wd: this is for --lr
--momentum 1 | --momentum: '1' is not a float32 number from 0 on and below 1
--cooldown 0.5 | --cooldown: this is for --schedule wsd
--label-noise 1e-4 | --label-noise: 0.0001 of 1437 training inputs is
--then 0.01 --schedule cosine | --then: it takes a constant ELR
--refine 2 | --refine: it takes --sweep, or several constant ELRs
--average 2 --max-epochs 50 | --max-epochs: it takes constant ELRs, and no --average
--device cpu --dtype tf32 | --dtype: tf32 takes a GPU
--device cpu --graph | --graph: it takes a GPU
--force | unrecognized arguments: --force
"""
if not torch.cuda.is_available():
    OF_ONE_RUN += "--device cuda | --device: 'cuda' cannot be used"
BAD = [*BAD.strip("\n").splitlines(), *(f"--elr 1 {x}" for x in OF_ONE_RUN.strip().splitlines())]


@pytest.mark.parametrize("line", BAD)
def test_a_bad_argument_is_one_line(tmp_path, capsys, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    command, message = line.split("| ")
    assert message in refused(capsys, command)
    assert not list(tmp_path.iterdir())


def test_zero_is_none_where_it_may(tmp_path, capsys):
    zeros = "--momentum 0 --label-noise 0 --average 0 --warmup 0 --seed 0"
    assert run(f"--elr 0.1 {QUICK}", tmp_path) == 0
    assert run(f"--elr 0.1 {QUICK} {zeros} --refine 0 --epochs 2", tmp_path) == 0
    assert capsys.readouterr().out.count("(already done)") == 1
    assert parse("--lr 0.1 --wd 0".split()).folder() == parse("--lr 0.1".split()).folder()


def test_an_out_that_cannot_be_used_is_one_line(tmp_path, plain, capsys):
    (tmp_path / "file").write_text("mine")
    error, before = refused(capsys, "--elr 0.1", tmp_path / "file" / "logs"), files(plain)
    assert "argument --out" in error and "cannot be written" in error
    assert (tmp_path / "file").read_text() == "mine"
    for more, what in (
        ("--elr 0.1 --width 3", "width is 2 there, 3 here"),
        ("--angle 0.1", "mode is 'elr' there, 'angle' here"),
    ):
        error = refused(capsys, f"{QUICK} {more}", plain)
        assert f"holds runs with other options ({what}): choose another --out, or rem" in error
    assert files(plain) == before


# --- the default folder

FOLDERS = """
--elr 0.1 | digits-convnet
--sweep --refine 2 --seeds 3 --schedule constant | digits-convnet
--elr 0.1 --seed 5 --epochs 7 --jobs 1 --threads 2 | digits-convnet
--elr 0.1 --schedule linear --epochs 9 | digits-convnet-schedule=linear-epochs=9
--angle 0.05 --schedule cosine --epochs 20 | digits-convnet-angle
--angle 0.05 --label-noise 0.5 | digits-convnet-angle-label_noise=0.5
--lr 0.1 --wd 0.01 | digits-convnet-lr-wd=0.01
--loop 1e-3 1 9 --epochs 2 --augment | digits-convnet-loop-augment
--elr 0.1 --data digits.npz | digits.npz-convnet
--elr 0.1 --data mine.npz --model mine.py:mlp | mine-mine.mlp
"""
NETS = "convnet", "a.py:b", "b.py:a", "a/b.py:c", "a.b.py:c", "b-c.py:d", "c.py:d"
CHANGES = """|--width 4|--momentum 0.9|--epochs 3|--average 2|--augment|--label-noise 0.5
    |--sphere layer|--model a.py:net|--model b.py:net|--data mine.npz|--data modular""".split("|")


def test_the_default_folder_is_named_after_what_is_no_default(tmp_path, monkeypatch):
    """Two commands share it where their runs may lie side by side, and only there. To parse reads,
    writes and makes nothing."""
    monkeypatch.chdir(tmp_path)

    def folder_of(command):
        return parse(command.split()).folder()

    for line in FOLDERS.strip().splitlines():
        command, name = line.split(" | ")
        assert folder_of(command) == Path("logs", name), command
    assert folder_of("--elr 1 --out mine") == Path("mine")
    long = {folder_of(f"--elr 1 --data {60 * '機械'}{i}.npz").name for i in range(2)}
    assert len(long) == 2 and all(len(name.encode()) < 150 for name in long)
    names = "a/b", "a.b", "a-b", "a", "a/b.npz", "b/a"
    cases = list(product(names, (".npz", ".txt"), NETS))
    found = {folder_of(f"--elr 1 --data {x}{end} --model {net}").name for x, end, net in cases}
    assert len(found) == len(cases) and max(map(len, found)) < 60
    which = "--elr 0.1", "--angle 0.05", "--lr 0.1", "--lr 0.1 --wd 0.01", "--elr 0.1 --warmup 2"
    identities = {}
    for parts in product(which, CHANGES, ("", "--batch-size 8")):
        config = parse(" ".join(parts).split())
        assert len(str(config.folder())) < 120
        same = identities.setdefault(config.folder(), config.identity())
        assert same == config.identity(), parts
    assert not list(tmp_path.iterdir())


# --- what is said at the end, and what is next


def made(run, tell):
    """In the place of train.train, a log: convergence below 0.02, above it none. What is printed
    follows from it."""
    config = run.config

    def elr(epoch):
        if config.mode == "elr":
            return value_at(config, run.value, max(epoch - 1, 0), 40)[1]
        return run.value / (1 + epoch)

    loss = converging if run.value < 0.02 else hovering
    make_log(run.path, loss, elr=elr, test_error=loss)
    return True


WAYS = "--angle 0.1 --schedule constant --then 0.01|--elr 0.1 --schedule linear|--lr 0.1"


@pytest.mark.parametrize("way", WAYS.split("|"))
def test_a_run_whose_elr_moves_says_what_it_gave(tmp_path, capsys, monkeypatch, way):
    """Test error and train loss of the last tenth, range of the ELR; no more of a single run."""
    monkeypatch.setattr(train, "train", made)
    assert run(f"{SUMS} {way}", tmp_path) == 0
    ends = []
    for path in sorted(tmp_path.glob("*=*[0-9].csv")):
        rows = log(tmp_path, path.stem)
        error, loss = (np.mean([r[x] for r in rows[-4:]]) for x in ("test_error", "train_loss"))
        elrs = [row["elr"] for row in rows]
        ends.append(f"test error {error:.3f}, train loss {loss:.3g}, ")
        ends[-1] += f"ELR {min(elrs):.3g} to {max(elrs):.3g}"
    said, written, *_ = capsys.readouterr().out.splitlines()
    assert said == f"{way.split()[0][2:]} 1e-01: {'; then at 0.01: '.join(ends)}"
    assert written == f"written: {tmp_path / 'regimes.csv'}, {tmp_path / 'regimes.png'}"


MLP = """
from torch import nn

def mlp(example, classes):
    layers = nn.Linear(len(example), 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, classes)
    return nn.Sequential(*layers)
"""
KINDS = """
--elr 1e-3 1e-1 --schedule wsd --cooldown 0.5 --epochs 3 --width 1
--elr 1e-3 1e-1 --warmup 1 --average 1 --augment --affine --train-head --dtype bf16 --out first
--elr 1e-3 1e-1 --momentum 0.9 --label-noise 0.5 --sphere layer --max-epochs 40 --seed 3
--elr 1e-3 1e-1 --sphere row --jobs 2 --seeds 2 --refine 1 --then 0.001 --out first --width 1
--elr 1e-3 1e-1 --model=-mine.py:mlp --data=-mine.npz --out=-first
--elr 1e-3 1e-1 --data modular --modulus 5 --width 4 --batch-size 8 --out first
--lr 1e-3 1e-1 --wd 0.01 --momentum 0.9
--angle 0.1 --schedule constant --then 0.01 --out first"""


@pytest.mark.parametrize("kind", KINDS.strip().splitlines())
def test_what_is_printed_to_do_next_can_be_done(tmp_path, capsys, monkeypatch, kind):
    """It is parsed and prepared, which looks at network, data and folder; one also runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["../project/train.py"])
    x, y = np.random.default_rng(0).normal(size=(100, 6)), np.arange(100) % 3
    np.savez("-mine.npz", x=x, y=y, test_x=x, test_y=y)
    Path("-mine.py").write_text(MLP)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", made)
        assert run(f"--threads 1 --batch-size 50 {kind}") == 0
    out = capsys.readouterr().out
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("next: ")]
    assert commands or "angle" in kind
    boundary = "--elr" in kind and "schedule" not in kind
    assert sum("--then" in x and "--refine" not in x for x in commands) == boundary
    for begin, python, script, *argv in commands:
        assert (begin, python, script) == ("next:", "python", "../project/train.py")
        if "modular" in kind:
            assert run([*argv, "--epochs", "1"]) == 0, argv
        else:
            prepare(parse(argv))
    assert "Traceback" not in capsys.readouterr().err


AGAIN = "--elr 0.01 1e-05 --jobs 2 --seeds 2 --max-epochs 9", "--sweep --refine 2"


@pytest.mark.parametrize("command", AGAIN)
def test_undecided_runs_are_told_to_take_twice_the_epochs(tmp_path, command):
    config = parse(words(f"{command} --momentum 0.5 --affine --epochs 6", tmp_path))
    spread = {"mean": 9.0, "std": 0.1}
    chance = {"0": {"points": 9, "train_loss": spread, "train_error": spread}}
    (tmp_path / "config.json").write_text(json.dumps({"chance": chance}))
    for reached, epochs in ((5, 12), (9, 18)):  # 9 by way of --max-epochs
        columns = dict(step=lambda e: 10 * e, angle=lambda e: 1e-3)
        make_log(tmp_path / "elr=1e-02.csv", lambda e: 3 + e % 3, epochs=reached, **columns)
        again, *_ = what_next(config, [runs.read_run(tmp_path / "elr=1e-02.csv")])
        again = parse(shlex.split(again)[2:])
        given = {name: x for name, x in config.given.items() if name != "max_epochs"}
        assert again.given == given | {"epochs": epochs} and again.folder() == config.folder()


def test_each_round_of_refine_bisects_what_is_left(tmp_path, capsys, monkeypatch):
    """The boundary is at ELR 0.02."""
    monkeypatch.setattr(train, "train", made)
    command = f"--elr 1e-3 1e-1 {SUMS}"
    assert run(command, tmp_path / "0") == 0
    *_, then, _ = capsys.readouterr().out.splitlines()
    assert then.startswith("next: python train.py --elr 0.1 --then 0.0001 --width 4 --data modular")
    assert then.endswith(" --epochs 1")
    for rounds, expected in ((1, {"0.001", "0.01", "0.1"}), (3, {"0.0178", "0.0316"})):
        out = tmp_path / str(rounds)
        assert run(f"{command} --refine {rounds} --max-epochs 50", out) == 0
        found = {row["elr"] for row in read(out / "regimes.csv")}
        assert expected <= found and len(found) == 2 + rounds


# --- each option changes what it should, only


@pytest.mark.parametrize("sphere", ["network", "layer", "row"])
def test_layers_keep_their_norms_but_on_the_joint_sphere(tmp_path, sphere):
    assert run(f"{SUMS} --elr 1e-3 --epochs 2 --sphere {sphere} --momentum 0.9", tmp_path) == 0
    state = checkpoint(tmp_path, "elr=1e-03")["sphere_sgd"]
    assert state["param_groups"][0]["momentum"] == 0.9 and len(state["state"]) == 9
    start, *_, end = layers_of(tmp_path, "elr=1e-03")
    assert len(start) == 9 and start.keys() >= {"embedding", "query", "up", "head"}
    moved = max(abs(end[name][0] / norm - 1) for name, (norm, _) in start.items())
    if sphere == "network":
        assert moved > 1e-3 and joint_elr(start) == pytest.approx(1e-3, rel=1e-6)
    else:
        assert moved < 1e-6
        assert [elr for _, elr in start.values()] == pytest.approx([1e-3] * 9, rel=1e-6)


def test_affine_and_train_head_train_the_rest_by_plain_sgd(tmp_path, plain):
    assert run(f"--elr 0.01 {QUICK} --affine --train-head", tmp_path) == 0
    (start, fixed_head, _), (same, trained, _) = log(plain), log(tmp_path)
    assert all(start[column] == same[column] for column in LEARNED)
    assert fixed_head["train_loss"] != trained["train_loss"]
    fixed, both = checkpoint(plain)["net"], checkpoint(tmp_path)["net"]
    assert fixed.keys() < both.keys()
    for key in both.keys() - fixed.keys():  # scales and shifts
        assert not torch.equal(both[key], torch.full_like(both[key], "weight" in key))
    torch.manual_seed(0)
    start = MODELS["convnet"](1, 10, 2).head.weight
    assert torch.equal(fixed["head.weight"], start) and not torch.equal(both["head.weight"], start)
    first, *_ = layers_of(tmp_path)
    assert list(first) == list(layers_of(plain)[0])
    assert joint_elr(first) == pytest.approx(0.01, rel=1e-5)
    _, rest = checkpoint(tmp_path)["sphere_sgd"]["param_groups"]
    assert rest["lr"] == pytest.approx(0.01 * sum(norm**2 for norm, _ in first.values()), rel=1e-5)


def test_lr_is_torchs_sgd_and_logs_the_elr_that_it_implies(tmp_path, plain):
    assert run(f"{QUICK} --lr 0.05 --wd 0.01 --momentum 0.9", tmp_path) == 0
    rows = log(tmp_path, "lr=5e-02")
    assert all(rows[0][column] == log(plain)[0][column] for column in LEARNED)
    torch.manual_seed(0)
    net, digits = MODELS["convnet"](1, 10, 2), load("digits")
    order = torch.Generator().manual_seed(0)
    weights = [net.get_parameter(name) for (name,) in net.layer_groups]
    sgd = torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.01)

    def direction():
        return F.normalize(torch.cat([w.detach().double().flatten() for w in weights]), dim=0)

    for row in rows:
        implied, turned = [], []
        for index in batches(1437, 256, order):
            square = sum(w.double().square().sum().item() for w in weights)
            implied.append(0.05 / (1 - 0.9) / square)
            sgd.zero_grad()
            F.cross_entropy(net(digits.inputs(index)), digits.y[index]).backward()
            before = direction()
            if row["epoch"]:
                sgd.step()
            turned.append(2 * math.asin((direction() - before).norm().item() / 2))
        assert row["elr"] == pytest.approx(sum(implied) / len(implied), rel=1e-5)
        if row["epoch"]:
            assert row["angle"] == pytest.approx(sum(turned) / len(turned), rel=1e-3)
    ours = checkpoint(tmp_path, "lr=5e-02")["net"]
    for (name,) in net.layer_groups:
        assert torch.allclose(ours[name], net.get_parameter(name), atol=1e-5)
    for norm, elr in layers_of(tmp_path, "lr=5e-02")[0].values():  # where nothing moves
        assert elr * norm**2 == pytest.approx(0.05 / (1 - 0.9), rel=1e-5)


def test_of_rows_lr_logs_the_mean_angle_or_none(tmp_path):
    assert run(f"{QUICK} --lr 0.05 --sphere row --epochs 1", tmp_path / "plain") == 0
    row = log(tmp_path / "plain", "lr=5e-02")[1]
    torch.manual_seed(0)
    net, digits, turned = MODELS["convnet"](1, 10, 2), load("digits"), []
    order = torch.Generator().manual_seed(0)
    weights = [net.get_parameter(name) for (name,) in net.layer_groups]
    sgd = torch.optim.SGD(weights, lr=0.05)

    def directions():
        rows = [F.normalize(w.detach().double().flatten(1)) for w in weights]
        return [x for w in rows for x in w]

    for epoch in (0, 1):
        for index in batches(1437, 256, order):
            before = directions()
            if epoch:
                sgd.zero_grad()
                F.cross_entropy(net(digits.inputs(index)), digits.y[index]).backward()
                sgd.step()
                moves = [(x - y).norm().item() for x, y in zip(before, directions(), strict=True)]
                turned.append(np.mean([2 * math.asin(move / 2) for move in moves]))
            else:
                net(digits.inputs(index))
    assert row["angle"] == pytest.approx(np.mean(turned), rel=1e-3)
    assert run(f"{QUICK} --lr 0.05 --sphere row --momentum 0.9 --epochs 1", tmp_path / "m") == 0
    assert all(math.isnan(row["angle"]) for row in log(tmp_path / "m", "lr=5e-02"))


def test_of_another_optimizer_the_angle_is_measured_and_no_elr_claimed(tmp_path, monkeypatch):
    """As by an edit of train.py: signs of the gradient, so that all weights move by lr."""

    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad.sign()

    def with_signs(self):
        make_optimizer(self)
        self.plain_sgd = Signs(self.sphere_weights, self.value)
        self.meters = [sphere_step.watch(self.plain_sgd, self.sphere_weights)]

    make_optimizer = train.Run.make_optimizer
    monkeypatch.setattr(train.Run, "make_optimizer", with_signs)
    assert run(f"{QUICK} --lr 1e-6 --epochs 1", tmp_path) == 0
    _, row = log(tmp_path, "lr=1e-06")
    (weights,) = checkpoint(tmp_path, "lr=1e-06")["start"]
    largest = 1e-6 * math.sqrt(weights.numel()) / weights.norm().item()
    assert math.isnan(row["elr"]) and 0.8 * largest < row["angle"] < 1.001 * largest


def test_an_angle_is_turned_by_and_logs_the_elr_that_follows(tmp_path):
    assert run(f"--angle 0.1 {QUICK} --batch-size 128 --epochs 5", tmp_path) == 0
    rows = log(tmp_path, "angle=1e-01")
    for epoch, row in enumerate(rows):
        expected = 0.1 * (1 + math.cos(math.pi * max(epoch - 1, 0) / 5)) / 2
        assert row["angle"] == pytest.approx(expected, rel=1e-6)
        assert row["elr"] == pytest.approx(math.tan(row["angle"]) / row["grad_norm"], rel=1e-6)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    more = f"--angle 0.1 {SUMS} --schedule constant --sphere layer --then 0.01"
    assert run(more, tmp_path / "more") == 0
    for name, angle in (("angle=1e-01", 0.1), ("angle=1e-01.then=1e-02", 0.01)):
        assert {round(row["angle"], 9) for row in log(tmp_path / "more", name)} == {angle}


def test_a_run_goes_on_until_it_is_decided_or_has_max_epochs(tmp_path, capsys):
    command = f"--elr 1e-3 {SUMS}"
    assert run(f"{command} --max-epochs 5", tmp_path / "a") == 0
    assert len(log(tmp_path / "a", "elr=1e-03")) == 6  # it asks for 8
    assert "undecided" in capsys.readouterr().out
    for _ in range(2):
        assert run(f"{command} --max-epochs 2000", tmp_path / "b") == 0
    out = capsys.readouterr().out
    assert "undecided" not in out and out.count("elr 1e-03 (already done): ") == 1
    length = len(log(tmp_path / "b", "elr=1e-03")) - 1
    assert 8 <= length < 2000 and length in [2**k for k in range(3, 11)]
    assert run(f"{command} --epochs {length}", tmp_path / "whole") == 0
    equal_runs(tmp_path / "whole", tmp_path / "b", "elr=1e-03")


def test_threads_and_jobs_are_chosen_by_the_work(tmp_path, monkeypatch):
    for place in ("machine", "experiment"):
        monkeypatch.setattr(f"lab.{place}.cores", lambda: 2)
    for command, jobs, threads in (
        ("--elr 0.1", 1, 1),
        ("--elr 0.1 --width 32 --batch-size 32", 1, 2),
        ("--elr 0.1 0.2", 2, 1),
        ("--elr 0.1 0.2 --jobs 1 --threads 2", 1, 2),
    ):
        config = experiment(command, tmp_path / command).config
        assert (config.jobs, config.threads) == (jobs, threads), command


# --- schedules

# Of 10 epochs, after a warm-up of 3; --cooldown 0.5.
RISE = [1 / 4, 2 / 4, 3 / 4]
FACTORS = {
    "constant": ([1.0] * 10, [1.0] * 7),
    "cosine": (np.cos(np.pi * np.arange(10) / 20) ** 2, np.cos(np.pi * np.arange(7) / 14) ** 2),
    "linear": (np.linspace(1, 0, 11)[:-1], np.linspace(1, 0, 8)[:-1]),
    "wsd --cooldown 0.5": ([1.0] * 6 + [0.8, 0.6, 0.4, 0.2], [1.0] * 4 + [6 / 7, 4 / 7, 2 / 7]),
}


@pytest.mark.parametrize("schedule", FACTORS)
def test_a_schedule_sets_the_elr_of_each_epoch(schedule):
    straight, after_rise = FACTORS[schedule]
    for warmup, factors in (("", straight), (" --warmup 3", [*RISE, *after_rise])):
        config = parse(f"--elr 1e-4 --epochs 10 --schedule {schedule}{warmup}".split())
        found = [value_at(config, 1e-4, epoch, 10)[1] for epoch in range(10)]
        assert found == pytest.approx(1e-4 * np.array(factors), rel=1e-8)


def test_a_run_is_trained_at_the_elrs_of_its_schedule(tmp_path):
    assert run(f"--elr 1e-4 {SUMS} --epochs 4 --schedule linear --warmup 1", tmp_path) == 0
    elrs = [row["elr"] for row in log(tmp_path, "elr=1e-04")]
    assert elrs == pytest.approx([5e-5, 5e-5, 1e-4, 2e-4 / 3, 1e-4 / 3], rel=1e-8)
    assert list(map(joint_elr, layers_of(tmp_path, "elr=1e-04"))) == pytest.approx(elrs, rel=1e-2)


def test_the_elr_of_the_steps_is_logged_where_an_edit_sets_another(tmp_path, monkeypatch):
    step = train.train_step

    def another(run, index, move=True):
        run.sphere_sgd.param_groups[0]["lr"] = 3e-4
        return step(run, index, move)

    monkeypatch.setattr(train, "train_step", another)
    assert run(f"--elr 0.01 {SUMS}", tmp_path) == 0
    assert [row["elr"] for row in log(tmp_path)] == [3e-4, 3e-4]
    assert read(tmp_path / "regimes.csv")[0]["elr"] == "0.0003"


# --- resume

RESUMED = [f"{SUMS} --elr 0.1", f"{SUMS} --angle 0.1 --schedule constant"]
RESUMED += [f"{QUICK} --width 1 --elr 0.1 --momentum 0.9 --augment --affine"]
RESUMED += [f"{QUICK} --width 1 --lr 0.1 --wd 1e-3 --momentum 0.9"]
OTHERWISE = "--angle 0.1|--elr 0.1 --schedule wsd|--lr 0.1 --warmup 1|--elr 0.1 --average 1"


@pytest.mark.parametrize("command", RESUMED)
def test_more_epochs_are_those_of_a_straight_run(tmp_path, command):
    """Rows beyond the checkpoint, and a cut-off row, are dropped."""
    assert run(f"{command} --epochs 2", tmp_path / "whole") == 0
    assert run(f"{command} --epochs 1", tmp_path / "parts") == 0
    (name,) = (path.stem for path in (tmp_path / "parts").glob("*.pt"))
    for end, row in (("csv", "2,44,0.1,1.5\n3,88,0.0"), ("layers.csv", "2,embedding,1,2,3")):
        with open(tmp_path / "parts" / f"{name}.{end}", "a") as file:
            file.write(row)
    assert run(f"{command} --epochs 2", tmp_path / "parts") == 0
    equal_runs(tmp_path / "whole", tmp_path / "parts", name)


@pytest.mark.parametrize("lost", ["row", "cell", "layer", "csv", "pt", "csv and pt"])
def test_of_a_finished_run_nothing_that_is_lost_is_passed_over(plain, tmp_path, capsys, lost):
    out = shutil.copytree(plain, tmp_path / "run")
    path = out / "elr=1e-02.csv"
    if lost == "row":
        first, *others = path.read_text().splitlines(keepends=True)
        path.write_text(first + "".join(others[:-2] + others[-1:]))
    elif lost == "cell":
        path.write_text(path.read_text().rpartition(",")[0] + "\n")
    elif lost == "layer":
        layers = path.with_suffix(".layers.csv")
        layers.write_text(layers.read_text().rstrip().rpartition("\n")[0] + "\n")
    else:
        for end in lost.split(" and "):
            path.with_suffix(f".{end}").unlink()
    before = {name: content for name, content in files(out).items() if "elr=" in name}
    assert run(f"--elr 0.01 {QUICK}", out) == 1
    out_text, told = capsys.readouterr()
    assert "already done" not in out_text and "remove" in told and path.stem in told
    assert files(out) | before == files(out)


@pytest.mark.parametrize("way", OTHERWISE.split("|"))
def test_more_epochs_are_refused_where_they_begin_otherwise(tmp_path, capsys, way):
    assert run(f"{SUMS} {way} --epochs 2", tmp_path) == 0
    before = files(tmp_path)
    assert "(epochs is 2 there, 4 here)" in refused(capsys, f"{SUMS} {way} --epochs 4", tmp_path)
    assert files(tmp_path) == before


# --- fast


def test_bf16_keeps_weights_and_step_in_float32(tmp_path, plain):
    assert run(f"--elr 0.01 {QUICK} --dtype bf16 --average 1", tmp_path) == 0
    single, half = log(plain), log(tmp_path)
    for column in ("train_loss", "grad_norm"):
        # The same weights, to the 8 bits of bfloat16 in each of some 20 operations
        assert half[0][column] != single[0][column]
        assert half[0][column] == pytest.approx(single[0][column], rel=0.05)
    assert 10 * single[-1]["radial"] < half[-1]["radial"] < 0.01
    state = checkpoint(tmp_path)
    weights = [state["net"][f"conv{i}.weight"] for i in (1, 2, 3, 4)]
    assert all(w.dtype == torch.float32 and (w.bfloat16() != w).any() for w in weights)
    start = torch.cat([x.flatten() for x in state["start"]]).norm().item()
    norm = torch.cat([w.flatten() for w in weights]).double().norm().item()
    assert norm == pytest.approx(start, rel=1e-6)  # to float32, not to bfloat16


def test_an_elr_in_the_devices_memory_follows_the_schedule(tmp_path, monkeypatch):
    """As a CUDA graph needs it; here, without one. Far below the boundary, where what float32
    rounds off the ELR does not grow along the way."""
    captured = []
    monkeypatch.setattr(train, "Captured", lambda step: captured.append(step) or step)
    monkeypatch.setattr(options, "check", NOTHING)  # which wants a GPU
    command, logs = f"{QUICK} --device cpu --elr 1e-06 --schedule cosine --affine", []
    for more in ("", "--graph"):
        out = tmp_path / f"out{more}"
        assert run(f"{command} {more}", out) == 0
        groups = checkpoint(out, "elr=1e-06")["sphere_sgd"]["param_groups"]
        assert [torch.is_tensor(group["lr"]) for group in groups] == 2 * [bool(more)]
        logs.append(log(out, "elr=1e-06"))
    assert len(captured) == 1
    assert [row["elr"] for row in logs[1]] == [1e-6, 1e-6, 5e-7]
    for one, other in zip(*logs, strict=True):  # apart by the rounding to float32
        for column in one.keys() - {"seconds", "radial"}:
            assert other[column] == pytest.approx(one[column], rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_captured_step_is_the_step_or_one_line(monkeypatch, refuses):
    """As far as it can be seen without a GPU: a replay overwrites the captured output."""

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        if refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        graph.replay = lambda: captured.out[0].copy_(captured.function(captured.index)[0])
        yield

    fakes = dict.fromkeys("Stream current_stream set_stream synchronize".split(), NOTHING)
    for name, fake in (fakes | {"graph": capture, "CUDAGraph": SimpleNamespace}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    captured = machine.Captured(lambda index: (index * 2,))
    for i in range(3 if refuses else 6):
        assert captured(torch.tensor([i, 3]))[0].tolist() == [2 * i, 6]
    if refuses:
        why = "no CUDA graph: leave --graph out (operation not permitted when stream is capturing)"
        with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
            captured(torch.tensor([4, 3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_trains_the_same_to_rounding(tmp_path):
    for name, more in (("eager", ""), ("graph", "--graph")):
        assert run(f"--elr 0.001 {QUICK} --augment {more}", tmp_path / name) == 0
    logs = [log(tmp_path / name, "elr=1e-03") for name in ("eager", "graph")]
    for one, other in zip(*logs, strict=True):
        for column in ("train_loss", "grad_norm", "angle", "test_loss"):
            assert other[column] == pytest.approx(one[column], rel=1e-3), column


# --- extremes of all options

WHICH = "--elr --sweep --loop --angle --lr".split()
OPTIONS = """--wd --refine --max-epochs --seed --seeds --epochs --then --average --momentum --width
    --modulus --batch-size --label-noise --jobs --threads --warmup --cooldown --edge""".split()
# Among them the ends of what a float, a float32 and an integer of the machine hold.
NUMBERS = ["0", "-1", "1", "2", "nan", "inf", "1e308", "5e-324", "1e-320", "1e30", "3.4e38"]
NUMBERS += ["1.2e-38", "9" * 17, "", "x", "0x10", "1_0", "9" * 5000]
numbers = st.sampled_from(NUMBERS) | st.floats().map(repr) | st.integers().map(str)
numbers |= st.text(max_size=5)


@settings(max_examples=4000 if SLOW else 40, deadline=None, derandomize=not SLOW)
@given(st.sampled_from(WHICH + OPTIONS), st.lists(numbers, min_size=3, max_size=3))
def test_an_extreme_number_is_one_line_or_taken(tmp_path_factory, option, numbers):
    first = [] if option in WHICH else ["--elr", "0.1"]
    first += words(SUMS, tmp_path_factory.mktemp("extremes"))
    numbers = numbers if option in WHICH else numbers[:1]
    assume(option != "--width" or len(numbers[0]) not in (3, 4, 5))  # which take much memory
    err = io.StringIO()
    try:
        with redirect_stderr(err):
            config = parse([*first, option, *numbers])
            prepare(config)
    except SystemExit as exit:
        assert exit.code in (0, 2) and len(err.getvalue().splitlines()) <= 1, err.getvalue()
        assert len(err.getvalue()) < 6000
    else:
        assert config.values and all(1.1e-38 < x < 3.5e38 for x in config.values)
    torch.set_num_threads(1)


def test_the_ends_of_what_float32_holds_run(tmp_path, capsys):
    assert run(f"--elr 1.2e-38 0.1 3.3e38 {SUMS}", tmp_path) == 0
    assert "Traceback" not in capsys.readouterr().err
