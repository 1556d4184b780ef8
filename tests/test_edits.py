"""Edit and rerun: a run of other contents is trained anew, and the old one is kept."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SUMS,
    checkpoint,
    copy_of_project,
    edit,
    end_of,
    equal_runs,
    failed,
    files,
    in_copy,
    read,
    refused,
    run,
    start,
)

import regimes
import train
from lab import contents, landscape, own, runs
from lab.data import Data, load

# A folder of somebody's: mine.py, and what it reads, in each way that there is.
MINE = """
import json, os, sys
from importlib.util import module_from_spec, spec_from_file_location
import torch
from blocks import WIDTH
from models import norm
from parts.layers import head
here = os.path.dirname(__file__)
sys.path.insert(0, f"{here}/../elsewhere")
from inserted import scale
from own.below_here import bias
if WIDTH < 0:
    import wrong
spec = spec_from_file_location("unknown", f"{here}/loaded.py")
spec.loader.exec_module(module_from_spec(spec))
exec(open(f"{here}/executed.py", "r+").read())
sys.audit("import", "compiled", f"{here}/compiled.so", None, None, None)  # as of one in C
open(f"{here}/.cache/x.json").close()

class Net(torch.nn.Sequential):
    def forward(self, x):
        if self.training:
            import trained
        return super().forward(x)

def net(example, classes):
    from late import relu
    settings = json.load(open(f"{here}/settings.json"))
    linear = torch.nn.Linear(len(example), WIDTH, bias)
    linear.weight.data *= torch.load(f"{here}/weights.pt")
    print("a line", file=open(f"{here}/my.log", "a+"))
    return Net(linear, norm(WIDTH), relu(), head(WIDTH * scale, classes))
"""
OWN = {
    "own/mine.py": MINE,
    "own/blocks.py": "WIDTH = 8\n",
    "own/models.py": "from torch.nn import LayerNorm as norm\n",  # has the name of ours
    "own/late.py": "from torch.nn import ReLU as relu\n",
    "own/parts/__init__.py": "",
    "own/parts/layers.py": "from .deep.here import head\n",
    "own/parts/deep/here.py": "from torch.nn import Linear as head\n",
    "own/below_here.py": "bias = True\n",
    "elsewhere/inserted.py": "scale = 1\n",
    "own/loaded.py": "x = 1\n",
    "own/executed.py": "x = 1\n",
    "own/trained.py": "x = 1\n",
    "own/settings.json": "{}",
    "own/compiled.so": "",
    "own/weights.pt": "",
}
NOT_READ = {"own/wrong.py": "syntax error", "own/.cache/x.json": ""}
COMMAND = "--model own/mine.py:net --data own/mine.npz --threads 1 --jobs 1 --elr 0.1"


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    folder = tmp_path / "theirs"
    for name, text in {**OWN, **NOT_READ}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    change(folder / "own" / "weights.pt", 1)
    change(folder / "own" / "mine.npz", 1)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # as `python mine.py` does
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit in the same second counts
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def change(path, value=2):
    if path.suffix == ".npz":
        y = np.arange(80) % 2
        x = np.random.default_rng(0).normal(size=(80, 5)) + value * y[:, None]
        np.savez(path, x=x, y=y, test_x=x, test_y=y)
    elif path.suffix == ".pt":
        torch.save(torch.tensor(float(value)), path)
    else:
        with open(path, "a") as file:
            file.write("\nADDED = 1\n" if path.suffix == ".py" else " \n")


def comment(path):
    path.write_text(f'"""A text."""\n{path.read_text()}\n\n# a comment\n')


def is_moved(text, out, number, what):
    """One line says what has changed and where the old files are; returns that folder's name."""
    assert "(already done)" not in text
    (line,) = [line for line in text.splitlines() if "before-" in line]
    assert line == f"{what}: trained anew; the old runs are in {out}/before-{number}"
    return Path(f"{out}/before-{number}")


def test_contents_change_where_a_file_does_and_only_there(theirs, monkeypatch):
    options = SimpleNamespace(model="own/mine.py:net", batch_size=16, dtype="fp32", average=None)

    def now():
        sys.modules.pop("trained", None)
        data = load("own/mine.npz")
        own.rehearse(own.build(options, data), data, options)
        return contents.contents(data, own.files_of(options.model))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)
        before = now()
    own.LOADED.clear()
    assert now() == before  # now it is bytecode that is read
    assert set(before) == {*contents.SCRIPTS, *OWN, "the data"}
    for name in OWN:
        if name.endswith(".py"):
            comment(theirs / name)
    assert now() == before
    for name in (*OWN, "own/mine.npz"):
        change(theirs / name)
        after, what = now(), "the data" if name.endswith(".npz") else name
        assert contents.changed(before, after) == f"{what} has changed"
        before = after


def test_ours_those_beside_them_and_shapes_of_arrays_count(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("labels.py", "lab/losses.py", *contents.SCRIPTS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    for name, folder in (("labels", tmp_path), ("losses", tmp_path / "lab")):
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setitem(sys.modules, name, None)  # so that it is forgotten afterwards
        del sys.modules[name]
        importlib.import_module(name)

    def now(*shape):
        x, y = torch.zeros(shape, dtype=torch.uint8), torch.zeros(4).long()
        return contents.contents(Data(x, y, x, y), {})

    before = now(4, 1, 8, 8)
    assert set(before) == {"labels.py", "lab/losses.py", *contents.SCRIPTS, "the data"}
    assert contents.changed(before, now(4, 1, 4, 16)) == "the data has changed"
    for name in before.keys() - {"the data"}:
        comment(tmp_path / name)
        assert now(4, 1, 8, 8) == before
        change(tmp_path / name)
        assert contents.changed(before, before := now(4, 1, 8, 8)) == f"{name} has changed"


def test_a_script_too_deep_to_be_parsed_counts_as_it_is():
    deep = f"x = {'+'.join(['1'] * 5000)}".encode()
    assert contents.code(deep) == deep


def test_after_an_edit_nothing_goes_on_from_old_weights(theirs, tmp_path, capsys):
    out, command = tmp_path / "out", f"{COMMAND} 0.5 --epochs 1"
    assert run(command, out) == 0
    capsys.readouterr()
    for number, name in enumerate(("mine.py", "mine.npz"), 1):
        old, what = files(out), "the data" if name == "mine.npz" else f"own/{name}"
        change(theirs / "own" / name)
        assert run(command, out) == 0
        moved = is_moved("".join(capsys.readouterr()), out, number, f"{what} has changed")
        assert files(moved) == old and files(out).keys() == old.keys()
    comment(theirs / "own" / "mine.py")
    assert run(command, out) == 0
    assert capsys.readouterr().out.count("(already done)") == 2

    edit(theirs / "own" / "blocks.py", "8", "6")
    assert run(f"{COMMAND} --epochs 3", out) == 0
    old = is_moved("".join(capsys.readouterr()), out, 3, "own/blocks.py has changed")
    assert len(read(old / "regimes.csv")) == 2
    assert [row["elr"] for row in read(out / "regimes.csv")] == ["0.1"]
    assert run(f"{COMMAND} --epochs 3", tmp_path / "whole") == 0
    equal_runs(tmp_path / "whole", out, "elr=1e-01")


@pytest.mark.parametrize(
    ("name", "jobs"),
    [("own/mine.py", ""), ("own/mine.py", " --jobs 2"), ("own/settings.json", "")]
    + [("own/trained.py", ""), ("train.py", "")],
)
def test_an_edit_while_runs_train_is_not_mixed_with_them(
    name, jobs, theirs, tmp_path, capsys, monkeypatch
):
    """Each run of somebody's network reads its files anew; what stays in memory is no edit."""
    began, train_one = tmp_path / "began", train.train

    def train_and_edit(run, tell):
        worked = train_one(run, tell)
        if not began.exists():
            began.touch()
            comment(theirs / "own" / "mine.py")
            change(theirs / name)
        return worked

    (theirs / "train.py").write_text("")
    mine = theirs / "own" / "mine.py"
    monkeypatch.setitem(contents.AT_START, mine, mine.read_bytes())  # as if it lay beside ours
    monkeypatch.setattr(train, "train", train_and_edit)
    fails = name in ("own/mine.py", "own/settings.json")
    assert run(f"{COMMAND} 0.5 0.7 --epochs 1{jobs}", tmp_path / "out") == fails
    error = capsys.readouterr().err
    cure = f"{name} has changed since this command began: give it again\n"
    lines = [line for line in error.splitlines() if "has changed" in line]
    assert bool(lines) == fails and all(f"{line}\n".endswith(cure) for line in lines), error
    assert len(read(tmp_path / "out" / "regimes.csv")) + len(lines) == 3


def test_what_is_saved_while_a_command_begins_is_not_taken_for_what_runs(
    tmp_path, capsys, monkeypatch
):
    script = "import sys; sys.modules['torch'] = None\ntry: import train\n"
    script += "except ImportError: print('lab.contents' in sys.modules)"
    ends = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ends.stdout == "True\n", ends.stderr
    path = ROOT / "models.py"
    monkeypatch.setitem(contents.AT_START, path, path.read_bytes() + b"# a comment")
    assert run(f"--elr 0.1 {SUMS}", tmp_path / "out") == 0
    monkeypatch.setitem(contents.AT_START, path, path.read_bytes() + b"x = 1")
    error = failed(capsys, f"--elr 0.1 {SUMS}", tmp_path / "other")
    assert error.endswith("error: models.py was saved while this command began: give it again\n")
    assert not (tmp_path / "other").exists()


def test_while_a_run_is_in_progress_nothing_is_moved(theirs, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(f"{COMMAND} --epochs 1", out) == 0
    change(theirs / "own" / "mine.py")
    with runs.lock(out / "elr=5e-01.lock"):
        old = files(out)
        assert "elr=5e-01 is in progress" in refused(capsys, f"{COMMAND} --epochs 1", out)
        assert files(out) == old and not list(out.glob("before*"))


def test_the_ranks_of_torchrun_move_the_old_runs_once(theirs, tmp_path, monkeypatch):
    out, command = tmp_path / "out", f"{COMMAND} 0.5 --epochs 1"
    assert run(command, out) == 0
    change(theirs / "own" / "mine.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    children = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        children.append(start(command, out))
    outputs = [end_of(child) for child in children]
    assert [status for status, _ in outputs] == [0, 0], outputs
    assert "".join(text for _, text in outputs).count("trained anew") == 1
    assert [path.name for path in out.glob("before*")] == ["before-1"]
    assert len(read(out / "regimes.csv")) == 2


def test_our_scripts_are_edited_and_the_runs_trained_anew(tmp_path):
    folder = copy_of_project(tmp_path / "project")
    command = SUMS.replace("--batch-size 8", "--elr 0.1")
    assert in_copy(folder, command)[0] == 0
    (out,) = (folder / "logs").iterdir()
    old = read(out / "elr=1e-01.csv")
    edit(folder / "train.py", "F.cross_entropy(logits, y)", "2 * F.cross_entropy(logits, y)")
    is_moved(in_copy(folder, command)[1], f"logs/{out.name}", 1, "train.py has changed")
    new = read(out / "elr=1e-01.csv")
    assert float(new[0]["train_loss"]) == pytest.approx(2 * float(old[0]["train_loss"]))
    before, now = regimes.read_chance(out / "before-1")["0"], regimes.read_chance(out)["0"]
    assert now["train_loss"]["mean"] == pytest.approx(2 * before["train_loss"]["mean"])
    assert now["train_error"] == before["train_error"]
    edit(folder / "lab" / "options.py", 'DATA, 16, "training', 'DATA, 8, "training')
    what = "batch_size is 16 there, 8 here"
    is_moved(in_copy(folder, command)[1], f"logs/{out.name}", 2, what)


# What version 0.3 wrote of the run of SUMS.
OLD = dict.fromkeys("wd momentum label_noise average schedule".split())
OLD |= dict.fromkeys("augment affine train_head".split(), False)
OLD |= dict(space="sphere", data="modular", modulus=5, model="transformer", width=4, device="cpu")
OLD |= dict(sphere="network", batch_size=8, dtype="fp32")


def test_runs_of_version_0_3_are_kept_read_and_trained_anew(tmp_path, capsys):
    command, path = f"--elr 0.5 {SUMS}", tmp_path / "elr=5e-01.pt"
    assert run(command, tmp_path) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    del config["contents"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"options": OLD}))
    state = checkpoint(tmp_path, path.stem)
    for name in ("contents", "identity"):
        del state[name]
    runs.save_checkpoint(path, OLD | dict(mode="elr", value=0.5, seed=0), state)
    old, before = files(tmp_path), tmp_path / "before-1"
    capsys.readouterr()
    assert run(command, tmp_path) == 0
    out, err = capsys.readouterr()
    assert err.endswith(f": trained anew; the old runs are in {before}\n")
    assert "(already done)" not in out and files(before) == old
    assert not landscape.main(["summary", str(before), "--samples", "8"])
    assert "0.5" in capsys.readouterr().out
    path.write_bytes(old[path.name])  # beside new ones
    error = failed(capsys, f"{command} --epochs 3", tmp_path)
    assert "elr=5e-01.pt is the checkpoint of another run" in error
    assert "(width is 4 there, 8 here)" in refused(capsys, f"{command} --width 8", tmp_path)
