"""What several test files need: train.py here or in a child, logs, a copy of the project."""

import csv
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch._dynamo  # late imports take seconds: children have it when they are forked

import train
from lab.experiment import prepare
from lab.options import parse

ROOT = Path(__file__).parent.parent
QUICK = "--width 2 --epochs 2 --batch-size 256 --threads 1"
SUMS = "--data modular --modulus 5 --width 4 --epochs 1 --batch-size 8 --jobs 1 --threads 1"
NOTHING = lambda *_, **__: None  # noqa: E731


def words(command, out=None):
    """A command line in one string, as a list; `out` may have spaces."""
    command = shlex.split(command) if isinstance(command, str) else command
    return [*command, *(["--out", str(out)] if out else [])]


def run(command, out=None):
    """train.py in this process. Returns its exit status."""
    return train.main(words(command, out))


def experiment(command, out=None):
    """What train.py makes of a command before it trains; refused as there."""
    return prepare(parse(words(command, out)))


def refused(capsys, command, out=None, main=train.main):
    """The one line with which a command is refused, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(words(command, out))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1, error
    return error


def failed(capsys, command, out=None):
    """The one line with which a run of train.py fails, status 1."""
    capsys.readouterr()
    assert run(command, out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# --- logs


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def log(folder, name="elr=1e-02"):
    return [{k: float(v) for k, v in row.items()} for row in read(folder / f"{name}.csv")]


def checkpoint(folder, name="elr=1e-02"):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def without_seconds(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(path)]


def make_log(path, loss, epochs=40, error=None, **columns):
    """The log of a run of which loss, error and further columns are formulas of the epoch."""
    columns = {"train_loss": loss, "train_error": error or (lambda e: loss(e) / 4), **columns}
    lines = [",".join(["epoch", *columns])]
    for e in range(epochs + 1):
        lines.append(",".join(map(str, [e, *(formula(e) for formula in columns.values())])))
    path.write_text("\n".join(lines) + "\n")


def converging(e):
    return 3 / (1 + e) ** 2


def hovering(e):
    return 1 + 0.05 * (-1) ** e


def equal_runs(a, b, name="elr=1e-02"):
    """But for the seconds: rows, layers, and every tensor of the checkpoint."""
    assert without_seconds(a / f"{name}.csv") == without_seconds(b / f"{name}.csv")
    assert (a / f"{name}.layers.csv").read_bytes() == (b / f"{name}.layers.csv").read_bytes()
    one, two = (checkpoint(folder, name) | {"seconds": 0} for folder in (a, b))
    (one, tree), (two, same) = map(torch.utils._pytree.tree_flatten, (one, two))
    assert tree == same
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def equal_sweeps(a, b):
    for name in {path.name for folder in (a, b) for path in folder.glob("elr=*.pt")}:
        equal_runs(a, b, name.removesuffix(".pt"))
    assert (a / "regimes.csv").read_bytes() == (b / "regimes.csv").read_bytes()
    no_leftovers(b)


def no_leftovers(folder):
    left = [path.name for end in ("tmp", "lock") for path in folder.glob(f"*.{end}")]
    assert not left, left


# --- children


def fork(function):
    """Start a function in a child process whose output goes to a file. Returns its process id and
    that file."""
    output = tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid == 0:
        status = 99
        sys.settrace(None)  # coverage has a lock, which an exception of a signal may leave locked
        try:
            os.setpgid(0, 0)  # so that a signal to its group, as of a terminal, is no signal to us
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w", buffering=1)
            status = function()
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    return pid, output


def start(command, out, before=NOTHING):
    """train.py in a child, which first does `before`."""

    def function():
        before()
        return run(command, out)

    return fork(function)


def end_of(child):
    """Exit status (negative: the signal) and output of a child."""
    pid, output = child
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output.seek(0)
    return status, output.read()


def in_child(command, out, before=NOTHING):
    return end_of(start(command, out, before))


def done(command, out, before=NOTHING):
    """What train.py printed in a child that ended well."""
    status, output = in_child(command, out, before)
    assert status == 0 and "Traceback" not in output, output
    return output


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


# --- a copy


def copy_of_project(to):
    """The scripts, lab and data, to be edited. Returns the folder."""
    to.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, to)
    for folder in ("lab", "data"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def in_copy(folder, command):
    """train.py of a copy, its scripts imported anew in a child, where torch is there already."""

    def function():
        sys.dont_write_bytecode = True  # an edit within the same second would be overlooked
        for name in list(sys.modules):
            if name.partition(".")[0] in ("train", "models", "sphere_step", "regimes", "lab"):
                del sys.modules[name]
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        importlib.import_module("lab.figures").of_sweep = NOTHING
        importlib.import_module("lab.measure").POINTS = 4
        return importlib.import_module("train").main(words(command))

    return end_of(fork(function))


def edit(path, old, new):
    """Replace what stands exactly once in a file."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")
