"""Edit and rerun: a run that was made by other contents is trained anew, and the old one is kept."""

import json
import re

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

from lab import contents, landscape, runs
from lab.data import load

SCRIPTS = contents.SCRIPTS
LOSS = "loss = F.cross_entropy(logits, y)"
SMOOTH = "loss = F.cross_entropy(logits, y, label_smoothing=0.1)"

# A folder of somebody's: mine.py, and what it imports from there, in each way that there is.
OWN = {
    "mine.py": """
import parts.deep
from blocks import WIDTH
from parts import *
from parts.layers import head
from models import norm

def net(example, classes):
    from late import relu
    linear = parts.deep.nn.Linear(len(example), WIDTH)
    return parts.deep.nn.Sequential(linear, norm(WIDTH), relu(), head(WIDTH, classes))
""",
    "blocks.py": "WIDTH = 8\n",
    "models.py": "from torch import nn\nnorm = nn.LayerNorm\n",  # has the name of ours
    "late.py": "from torch.nn import ReLU as relu\n",
    "parts/__init__.py": "__all__ = []\n",
    "parts/layers.py": "from . import deep\nfrom .below.here import head\n",
    "parts/deep.py": "from torch import nn\n",
    "parts/below/__init__.py": "",
    "parts/below/here.py": "from .. import beside\nfrom ..deep import nn\nhead = nn.Linear\n",
    "parts/beside.py": "x = 1\n",
}


@pytest.fixture
def project(tmp_path):
    return copy_of_project(tmp_path / "project")


def make_own(folder, shift):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = rng.normal(size=(80, 5)) + shift * y[:, None]
    for name, text in OWN.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        if not (folder / name).exists():
            (folder / name).write_text(text)
    np.savez(folder / "mine.npz", x=x, y=y, test_x=x, test_y=y)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def moved(project, command, output, number, name):
    """One line says that `name` has changed and where the old files are; there they are, whole."""
    status, text = in_copy(project, command)
    assert status == 0 and "(already done)" not in text, text
    (line,) = [line for line in text.splitlines() if "changed" in line]
    there = f"logs/{output.name}/before-{number}"
    told = f"{name} has changed since these runs: trained anew; the old ones are in {there}"
    assert line == told
    return project / there


def test_contents_change_where_code_does_and_only_there(project, monkeypatch):
    """Scripts of ours, a file of theirs, what it imports from its folder, in each way."""
    monkeypatch.setattr(contents, "ROOT", project)
    make_own(project / "own", shift=1)
    model, data = f"{project / 'own'}/mine.py:net", load(str(project / "own" / "mine.npz"))
    before = contents.contents(model, data)
    edited = [*SCRIPTS, *(f"own/{name}" for name in OWN)]
    for name in edited:
        path = project / name
        text = path.read_text().replace('"""\n\n', '\nMore."""\n\n\n', 1)
        text = re.sub(r"^(\w+) = ", r"\1   =   ", text, flags=re.M)
        path.write_text(text + "\n\n# a comment\n")
    assert contents.contents(model, data) == before
    for name in edited:
        with open(project / name, "a") as file:
            file.write("\nADDED = 1\n")
        after = contents.contents(model, data)
        shown = name if name == "own/models.py" else name.removeprefix("own/")
        assert [key for key in before | after if before.get(key) != after.get(key)] == [shown]
        before = after


def test_what_makes_a_run_is_edited_and_it_is_trained_anew(project):
    make_own(project / "own", shift=1)
    command = "--model own/mine.py:net --data own/mine.npz --elr 0.1 --epochs 1 --threads 1"
    status, text = in_copy(project, command)
    (out,) = (project / "logs").iterdir()
    assert status == 0 and "changed" not in text, text
    edited = "train.py own/mine.py own/parts/beside.py sphere_step.py own/mine.npz".split()
    for number, name in enumerate(edited, start=1):
        old, shown = files(out), name.removeprefix("own/")
        if name.endswith(".npz"):
            make_own(project / "own", shift=2)
            shown = "the data"
        else:
            with open(project / name, "a") as file:
                file.write("\nADDED = 1\n")
        assert files(moved(project, command, out, number, shown)) == old, name
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
    old = moved(project, f"{more} logs/a", project / "logs" / "a", 1, "train.py")
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


def make_old(out):
    """What version 0.3 would have left."""
    config = json.loads((out / "config.json").read_text())
    del config["contents"], config["options"]["warmup"], config["options"]["cooldown"]
    (out / "config.json").write_text(json.dumps(config))
    for path in out.glob("*.pt"):
        state = runs.load_checkpoint(path, "cpu")
        identity = state.pop("identity")
        for name in ("warmup", "cooldown"):
            del identity[name]
        del state["contents"], state["checksum"]
        runs.save_checkpoint(path, identity, state)


def test_runs_of_version_0_3_are_kept_read_and_trained_anew(tmp_path, capsys):
    command = f"--elr 0.5 {SUMS}"
    assert run(command, tmp_path) == 0
    make_old(tmp_path)
    old = files(tmp_path)
    capsys.readouterr()
    assert run(command, tmp_path) == 0
    out = capsys.readouterr().out
    assert f"trained anew; the old ones are in {tmp_path / 'before-1'}\n" in out
    assert "(already done)" not in out and files(tmp_path / "before-1") == old
    assert landscape.main(["summary", str(tmp_path / "before-1"), "--samples", "8"]) in (0, None)
    assert "0.5" in capsys.readouterr().out
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
