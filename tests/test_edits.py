"""Edit and rerun: a run that was made by other contents is trained anew, and the old one is kept."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import (
    SUMS,
    copy_of_project,
    edit,
    end_of,
    equal_runs,
    in_copy,
    read,
    refused,
    run,
    start_copy,
)

from lab import contents, landscape, own, runs
from lab.data import Data, load

LOSS = "loss = F.cross_entropy(logits, y)"
SMOOTH = "loss = F.cross_entropy(logits, y, label_smoothing=0.1)"

# A folder of somebody's: mine.py, and what it imports, in each way that there is.
OWN = {
    "own/mine.py": """
import os
import sys
import parts.deep
from blocks import WIDTH
from parts import *
from parts.layers import head
from models import norm
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "elsewhere"))
from inserted import scale
from own.beside_it import bias
if WIDTH < 0:
    import wrong

def net(example, classes):
    from late import relu
    linear = parts.deep.nn.Linear(len(example), WIDTH, bias)
    return parts.deep.nn.Sequential(linear, norm(WIDTH), relu(), head(WIDTH * scale, classes))
""",
    "own/blocks.py": "WIDTH = 8\n",
    "own/models.py": "from torch import nn\nnorm = nn.LayerNorm\n",  # has the name of ours
    "own/late.py": "from torch.nn import ReLU as relu\n",
    "own/parts/__init__.py": "__all__ = []\n",
    "own/parts/layers.py": "from . import deep\nfrom .below.here import head\n",
    "own/parts/deep.py": "from torch import nn\n",
    "own/parts/below/__init__.py": "",
    "own/parts/below/here.py": "from .. import beside\nfrom ..deep import nn\nhead = nn.Linear\n",
    "own/parts/beside.py": "x = 1\n",
    "own/beside_it.py": "bias = True\n",  # from the folder that one is in
    "elsewhere/inserted.py": "scale = 1\n",  # from sys.path
}
WRONG = "own/wrong.py"  # not imported


@pytest.fixture
def project(tmp_path):
    folder = copy_of_project(tmp_path / "project")
    make_own(folder, shift=1)
    return folder


def make_own(folder, shift):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = rng.normal(size=(80, 5)) + shift * y[:, None]
    for name, text in {**OWN, WRONG: "syntax error"}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        if not (folder / name).exists():
            (folder / name).write_text(text)
    np.savez(folder / "own" / "mine.npz", x=x, y=y, test_x=x, test_y=y)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def moved(project, command, output, number, what):
    """One line says what has changed and where the old files are; there they are, whole."""
    status, text = in_copy(project, command)
    assert status == 0 and "(already done)" not in text, text
    there = f"logs/{output.name}/before-{number}"
    (line,) = [line for line in text.splitlines() if "before-" in line]
    assert line == f"{what}: trained anew; the old runs are in {there}"
    return project / there


def test_contents_change_where_code_does_and_only_there(project, monkeypatch):
    """Scripts of ours, a file of theirs, all that it has imported."""
    monkeypatch.setattr(contents, "ROOT", project)
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))  # as `python train.py` does
    mine, data = project / "own" / "mine.py", load(str(project / "own" / "mine.npz"))
    own.load(f"{mine}:net", data)

    def now():
        return contents.contents(data, own.LOADED[mine])

    before = now()
    assert set(before) == {*contents.SCRIPTS, *OWN, "the data"}
    for name in before.keys() - {"the data"}:
        text = (project / name).read_text().replace('"""\n\n', '\nMore."""\n\n\n', 1)
        text = re.sub(r"^(\w+) = ", r"\1   =   ", text, flags=re.M)
        (project / name).write_text(text + "\n\n# a comment\n")
    assert now() == before
    for name in before.keys() - {"the data"}:
        with open(project / name, "a") as file:
            file.write("\nADDED = 1\n")
        after = now()
        assert [key for key in before | after if before.get(key) != after.get(key)] == [name]
        before = after


def test_what_lies_beside_our_scripts_and_an_array_of_another_shape_count(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in contents.SCRIPTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "labels.py").write_text("smoothing = 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "labels", raising=False)
    importlib.import_module("labels")
    found = []
    for shape in ((4, 1, 8, 8), (4, 1, 4, 16)):
        x, y = torch.zeros(shape, dtype=torch.uint8), torch.zeros(4).long()
        found.append(contents.contents(Data(x, y, x, y)))
    assert "labels.py" in found[0] and found[0]["the data"] != found[1]["the data"]
    monkeypatch.delitem(sys.modules, "labels")


def test_what_makes_a_run_is_edited_and_it_is_trained_anew(project):
    command = "--model own/mine.py:net --data own/mine.npz --elr 0.1 --epochs 1 --threads 1"
    status, text = in_copy(project, command)
    assert status == 0 and "before-" not in text, text
    (out,) = (project / "logs").iterdir()
    edited = """train.py own/mine.py own/parts/beside.py own/beside_it.py elsewhere/inserted.py
        own/mine.npz lab/options.py""".split()
    for number, name in enumerate(edited, start=1):
        old, what = files(out), f"{name} has changed"
        if name.endswith(".npz"):
            make_own(project, shift=2)
            what = "the data has changed"
        elif name == "lab/options.py":  # a default
            edit(project / name, 'DATA, 16, "training', 'DATA, 20, "training')
            what = "batch_size is 16 there, 20 here"
        else:
            with open(project / name, "a") as file:
                file.write("\nADDED = 1\n")
        assert files(moved(project, command, out, number, what)) == old, name
        assert files(out).keys() == old.keys()
    with open(project / "own" / "mine.py", "a") as file:
        file.write("\n# a comment\n")
    assert "(already done)" in in_copy(project, command)[1]


def test_after_an_edit_nothing_goes_on_from_the_old_weights(project, tmp_path):
    """Neither with more epochs nor beside runs of another ELR."""
    command = f"{SUMS} --elr 0.1 0.5 --out"
    assert in_copy(project, f"{command} logs/a")[0] == 0
    edit(project / "train.py", LOSS, SMOOTH)
    more = f"{SUMS} --elr 0.5 --epochs 3 --out"
    old = moved(project, f"{more} logs/a", project / "logs" / "a", 1, "train.py has changed")
    assert len(read(old / "regimes.csv")) == 2
    assert [row["elr"] for row in read(project / "logs" / "a" / "regimes.csv")] == ["0.5"]
    assert in_copy(project, f"{more} {tmp_path / 'whole'}")[0] == 0
    equal_runs(tmp_path / "whole", project / "logs" / "a", "elr=5e-01")
    status, text = in_copy(project, f"{command} logs/a --epochs 3")
    assert status == 0 and text.count("(already done)") == 1 and "elr 1e-01 (" not in text


def test_while_a_run_is_in_progress_nothing_is_moved(project):
    out = project / "logs"
    command = f"{SUMS} --elr 0.1 0.5 --out logs"
    assert in_copy(project, command)[0] == 0
    edit(project / "train.py", LOSS, SMOOTH)
    with runs.lock(out / "elr=5e-01.lock"):
        old = files(out)
        status, text = in_copy(project, command)
        assert status == 2 and text.count("\n") == 1 and "elr=5e-01 is in progress" in text, text
        assert files(out) == old and not list(out.glob("before*"))


def test_the_ranks_of_torchrun_move_the_old_runs_once(project):
    out = project / "logs"
    command = f"{SUMS} --elr 0.1 0.5 --out logs"
    assert in_copy(project, command)[0] == 0
    edit(project / "train.py", LOSS, SMOOTH)
    children = [start_copy(project, command, RANK=rank, WORLD_SIZE="2") for rank in "01"]
    outputs = [end_of(child) for child in children]
    assert [status for status, _ in outputs] == [0, 0], outputs
    assert "".join(text for _, text in outputs).count("trained anew") == 1
    assert [path.name for path in out.glob("before*")] == ["before-1"]
    assert len(read(out / "regimes.csv")) == 2


# What version 0.3 wrote of the run of SUMS.
OLD = dict(space="sphere", wd=None, momentum=None, data="modular", modulus=5, label_noise=None)
OLD |= dict(augment=False, model="transformer", width=4, affine=False, train_head=False)
OLD |= dict(sphere="network", batch_size=8, average=None, dtype="fp32", schedule=None)
OLD["device"] = "cpu"


def test_runs_of_version_0_3_are_kept_read_and_trained_anew(tmp_path, capsys):
    command = f"--elr 0.5 {SUMS}"
    assert run(command, tmp_path) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    del config["contents"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"options": OLD}))
    path = tmp_path / "elr=5e-01.pt"
    state = runs.load_checkpoint(path, "cpu")
    for name in ("contents", "checksum", "identity"):
        del state[name]
    runs.save_checkpoint(path, OLD | dict(mode="elr", value=0.5, seed=0), state)
    old = files(tmp_path)
    capsys.readouterr()
    assert run(command, tmp_path) == 0
    (out, err), before = capsys.readouterr(), tmp_path / "before-1"
    assert err.endswith(f": trained anew; the old runs are in {before}\n")
    assert "(already done)" not in out and files(before) == old
    assert landscape.main(["summary", str(before), "--samples", "8"]) in (0, None)
    assert "0.5" in capsys.readouterr().out
    path.write_bytes(old[path.name])  # beside new ones
    assert run(f"{command} --epochs 3", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "elr=5e-01.pt is the checkpoint of another run" in error
    assert "(width is 4 there, 8 here)" in refused(capsys, f"{command} --width 8", tmp_path)


def test_a_checkpoint_of_other_contents_is_refused_by_name(tmp_path, capsys):
    command = f"--elr 0.5 {SUMS}"
    assert run(command, tmp_path) == 0
    path = tmp_path / "elr=5e-01.pt"
    state = torch.load(path, weights_only=True)
    state["contents"]["train.py"] = "another"
    runs.save_checkpoint(path, state["identity"], state)
    capsys.readouterr()
    assert run(f"{command} --epochs 3", tmp_path) == 1
    what = "is the checkpoint of another run (train.py has changed): remove it"
    assert what in capsys.readouterr().err
