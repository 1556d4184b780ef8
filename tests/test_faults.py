"""What happens to runs under faults: killed or interrupted at any moment, a full disk, two
processes in one folder, damaged files.

`python -m pytest tests/test_faults.py --kills 50`: 50 random moments instead of 2.
"""

import ctypes
import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    NOTHING,
    QUICK,
    ROOT,
    SUMS,
    checkpoint,
    done,
    end_of,
    equal_runs,
    equal_sweeps,
    failed,
    fork,
    in_child,
    make_log,
    no_leftovers,
    read,
    run,
    start,
    wait_for,
    words,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regimes
import train
from lab import figures, jobs, machine, runs

ONE_SUM = f"{SUMS} --elr 0.5"
LONGER = "--data modular --modulus 7 --width 4 --batch-size 8 --threads 1"  # 4 steps an epoch
CALLS = ("open", "write", "fsync", "replace", "close", "ftruncate")


def holders(folder):
    found = []
    for path in folder.glob("*=*.lock"):
        with suppress(FileNotFoundError):  # released in this moment
            text = path.read_text()
            if text.startswith("process "):
                found.append(int(text.split()[1]))
    return found


def alive(pid):
    """The processes of its group that have not ended; one may still wait to be asked how."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def rows_in(out):
    return sum(path.read_text().count("\n") for path in out.glob("elr=*.layers.csv"))


@pytest.fixture(scope="module", autouse=True)
def undisturbed(tmp_path_factory):
    """A run here, so that what torch imports late is there when children are forked."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(ONE_SUM, folder) == 0
    return folder


# --- does it stop?

OWN = """
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        try:
            return super().forward(x)
        except Exception:  # which is no place to stop at
            raise RuntimeError from None

def net(channels, classes):
    body = nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return Net(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
"""


def test_a_sweep_stops_when_it_is_told_to_and_goes_on(tmp_path, pytestconfig):
    """Ctrl-C at a terminal is SIGINT to all processes of a group, `kill` SIGTERM to the parent."""
    (tmp_path / "mine.py").write_text(OWN)
    command = "--elr 1e-4 1e-3 1e-2 --epochs 2000 --batch-size 128 --jobs 2 --threads 1"
    command += f" --model {tmp_path}/mine.py:net"
    for i in range(pytestconfig.getoption("--kills")):
        out = tmp_path / str(i // 2)
        rows, seed = rows_in(out), random.randrange(10**6)
        child = start(command, out)
        wait_for(lambda out=out, rows=rows: rows_in(out) > rows)  # it goes on
        wait_for(lambda out=out: len(holders(out)) == 2)
        time.sleep(random.Random(seed).uniform(0, 1))
        if i % 2:
            os.kill(child[0], signal.SIGTERM)
        else:
            os.killpg(child[0], signal.SIGINT)
        with suppress(AssertionError):
            wait_for(lambda pid=child[0]: pid not in alive(pid))
        left = alive(child[0])
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        status, output = end_of(child)
        lines = [line for line in output.splitlines() if not line.startswith(("elr ", " ", "note"))]
        assert (status, left) == (143 if i % 2 else 130, []), (i, seed, output)
        assert lines == [f"interrupted; the same command goes on from {out}"], (seed, output)
        no_leftovers(out)


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path, pytestconfig):
    command = words(f"{sys.executable} {ROOT}/train.py {SUMS} --elr 0.1 --epochs 100000", tmp_path)
    for _ in range(pytestconfig.getoption("--kills") // 2):
        seed = random.randrange(10**6)
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        maps = Path(f"/proc/{child.pid}/maps")
        wait_for(lambda maps=maps: "torch" in maps.read_text())  # Python itself has started
        time.sleep(random.Random(seed).uniform(0, 3))
        child.send_signal(signal.SIGINT)
        output = child.communicate(timeout=60)[0].decode()
        assert child.returncode in (-signal.SIGINT, 130), (seed, child.returncode)
        assert "Traceback" not in output and output.count("\n") <= 1, (seed, output)


def test_a_signal_ends_at_once_and_the_run_goes_on(tmp_path):
    command = f"{LONGER} --elr 0.01 --epochs 24 --momentum 0.9"
    parts = tmp_path / "parts"
    checkpoint = parts / "elr=1e-02.pt"
    done(command, tmp_path / "whole")
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = start(command, parts)
        wait_for(lambda pid=child[0]: checkpoint.exists() and pid in holders(parts))
        os.kill(child[0], number)
        status, output = end_of(child)
        assert status == expected, output
        assert output == f"interrupted; the same command goes on from {parts}\n"
        text = checkpoint.with_suffix(".csv").read_text()  # whole rows
        assert text.endswith("\n") and {line.count(",") for line in text.splitlines()} == {11}
    done(command, parts)
    equal_runs(tmp_path / "whole", parts)


class Signalling:
    """In a destructor, where Python drops what is raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", ["at once", "in a destructor"])
def test_a_signal_before_there_is_a_folder_leaves_nothing(tmp_path, where):
    def prepare(config):
        if where == "at once":
            os.kill(os.getpid(), signal.SIGINT)
        Signalling()
        time.sleep(60)

    child = in_child(ONE_SUM, tmp_path / "out", before=lambda: setattr(train, "prepare", prepare))
    assert child == (130 if where == "at once" else 143, "interrupted; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_who_is_told_to_stop_does_not_wait_for_torch():
    def function():
        try:
            regimes.finish(lambda: print("told") or 143)
        finally:
            print("taken down")

    assert end_of(fork(function)) == (143, "told\n")


# --- killed


class DyingOs:
    """The module os, whose n-th call that writes is the last thing that this process does (a write:
    half of it)."""

    def __init__(self, n):
        self.left = n

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in CALLS:
            return call

        def counted(*arguments):
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counted


def die_at(n):
    runs.os = regimes.os = DyingOs(n)


def test_killed_between_any_two_system_calls_a_run_goes_on(tmp_path, pytestconfig):
    """By default at every seventh, from a random one on."""
    calls, whole = 10**9, tmp_path / "whole"

    def count():
        die_at(calls)
        # The figure is the last that is written.
        figures.of_sweep = lambda *_: print("calls:", calls - runs.os.left)

    total = int(re.search(r"calls: (\d+)", done(ONE_SUM, whole, before=count))[1])
    assert total > 20
    step = 7 if pytestconfig.getoption("--kills") == 2 else 1
    for n in range(random.randint(1, step), total + 1, step):
        folder = tmp_path / str(n)
        status, output = in_child(ONE_SUM, folder, before=lambda n=n: die_at(n))
        assert status == -signal.SIGKILL, (n, output)
        done(ONE_SUM, folder)
        equal_sweeps(whole, folder)


# --- many runs, one writer

MANY = f"{LONGER} --elr 0.01 0.02 0.04 --epochs 8"


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_by_one")
    done(f"{MANY} --jobs 1", folder)
    return folder


def test_a_second_process_waits_and_says_for_whom(tmp_path):
    command = f"{LONGER} --elr 0.01 --epochs"
    first = start(f"{command} 100000", tmp_path)
    wait_for(lambda: (tmp_path / "elr=1e-02.pt").exists())
    second = start(f"{command} 3", tmp_path)
    who = f"elr=1e-02 is in progress: process {first[0]} on "
    wait_for(lambda: os.pread(second[1].fileno(), 1000, 0).startswith(who.encode()))
    os.kill(first[0], signal.SIGKILL)  # which leaves no stale lock
    status, output = end_of(second)
    assert status == 0 and output.count(who) == 1 and ": this waits for it\n" in output
    assert end_of(first)[0] == -signal.SIGKILL
    assert not list(tmp_path.glob("*.lock"))
    assert run(f"{command} 3", tmp_path) == 0  # what was half written goes with the next command
    no_leftovers(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_what_a_zombie_left_is_removed(tmp_path):
    pid = os.fork()
    if not pid:
        os._exit(0)
    wait_for(lambda: ") Z " in Path(f"/proc/{pid}/stat").read_text())
    left = [tmp_path / f"regimes.csv.{socket.gethostname()}-{x}.tmp" for x in (pid, os.getpid())]
    for path in left:
        path.touch()
    runs.remove_leftovers(tmp_path)
    os.waitpid(pid, 0)
    assert [path.exists() for path in left] == [False, True]


@pytest.mark.parametrize("which", ["jobs", "parent"])
def test_a_sweep_whose_jobs_or_parent_are_killed_is_finished(tmp_path, one_by_one, which):
    child = start(f"{MANY} --jobs 2", tmp_path)
    wait_for(lambda: len(holders(tmp_path)) == 2)
    jobs = holders(tmp_path)
    for pid in jobs if which == "jobs" else [child[0]]:
        os.kill(pid, signal.SIGKILL)
    if which == "parent":
        assert end_of(child)[0] == -signal.SIGKILL
        wait_for(lambda: not set(jobs) & set(alive(child[0])))
        child = start(f"{MANY} --jobs 2", tmp_path)
    status, output = end_of(child)
    assert status == 0 and "Traceback" not in output, output
    equal_sweeps(one_by_one, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 1


def test_ranks_of_torchrun_share_a_sweep_and_are_resumed(tmp_path, one_by_one, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ranks.append(start(MANY, tmp_path))
    wait_for(lambda: len(holders(tmp_path)) == 2)
    os.kill(ranks[1][0], signal.SIGKILL)
    assert end_of(ranks[1])[0] == -signal.SIGKILL
    again = start(MANY, tmp_path)  # as torchrun does it
    (status, output), (other, _) = end_of(ranks[0]), end_of(again)
    assert status == other == 0, output
    equal_sweeps(one_by_one, tmp_path)
    assert output.count("written: ") == 1


def test_a_long_run_says_a_line_a_minute(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    job = runs.Job(0.01, 0, Path(), "elr 1e-02")
    config = SimpleNamespace(rank=0, epochs=9, then=0.001)
    watch = jobs.Watch(config, [job], renew=NOTHING)
    for epoch in range(20):
        name = "elr 1e-02" if epoch < 10 else "elr 1e-02, then 0.001"
        watch.tell("epoch", name, epoch % 10, 9, "loss 2, error 0.5, γ 3")
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 8  # of 20, in 400 seconds
    for line in lines:
        said = r"(\d+) of 18 epochs; elr 1e-02(.*), epoch (\d): loss 2, error 0.5, γ 3"
        done, then, epoch = re.fullmatch(said, line).groups()
        assert int(done) == int(epoch) + (9 if then else 0) and then in ("", ", then 0.001")


def test_a_log_in_the_folder_that_cannot_be_read_is_told(tmp_path, capsys):
    command = f"--elr 0.01 {QUICK}"
    assert run(command, tmp_path) == 0
    (tmp_path / "elr=1e-03.csv").write_text("epoch,train_loss\n1,abc\n")
    assert run(command, tmp_path) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: left out: ") and "elr=1e-03.csv: line 2: " in line


def test_on_a_terminal_there_is_a_bar_of_all_epochs(tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    child = start(f"{MANY} --jobs 2", tmp_path, before=lambda: os.dup2(theirs, 2))
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal is gone when the last process has ended
        while piece := os.read(ours, 65536):
            shown += piece
    status, verdicts = end_of(child)
    shown = shown.decode(errors="replace")
    assert status == 0 and verdicts.count("; test error ") == 3
    assert "/24 [" in shown and "epoch" in shown  # with the time that is left
    assert re.search("elr 1e-02, epoch [0-9]: loss ", shown) and "γ" in shown


# --- faults


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path):
    command, out = f"{LONGER} --elr 0.01 --momentum 0.9 --epochs", tmp_path / "out"
    done(f"{command} 1", out)
    good = (out / "elr=1e-02.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2,) * 2)

    status, output = in_child(f"{command} 3", out, before=limit)
    assert status == 1 and "Traceback" not in output, output
    assert re.search("^train.py: error: .*elr.*File too large", output, re.M), output
    assert (out / "elr=1e-02.pt").read_bytes() == good
    for place in (out, tmp_path / "whole"):
        done(f"{command} 3", place)
    equal_runs(tmp_path / "whole", out)


def test_rows_are_on_disk_at_once_and_whole(tmp_path, monkeypatch):
    path, write = tmp_path / "log.csv", os.write
    log = runs.Log(path)
    assert not path.exists()
    log.add({"epoch": 1, "x": torch.tensor(0.1).double()}, {"epoch": 2, "x": 1 / 3})
    rows = "epoch,x\n1,0.100000001\n2,0.333333333\n"
    assert path.read_text() == rows
    monkeypatch.setattr(runs.os, "write", lambda file, content: write(file, content[:3]))
    with pytest.raises(OSError, match="No space left on device"):
        log.add({"epoch": 3, "x": 0.25})
    monkeypatch.undo()
    log.close()
    assert path.read_text() == rows


def test_a_reader_that_goes_away_ends_the_program_silently(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)

    def function():
        os.dup2(writer, 1)
        regimes.finish(lambda: run(f"{ONE_SUM} 0.1", tmp_path))

    assert end_of(fork(function)) == (0, "")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="as on macOS")
def test_freed_memory_is_kept_for_the_next_step():
    def pages_fetched():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            _ = [torch.ones(10**6) for _ in range(3)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def function():
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 65536)  # as at the start of a process
        mallopt(-1, 2**17)
        usually = pages_fetched()
        machine.keep_memory()
        pages_fetched()
        print(usually, pages_fetched())

    usually, kept = map(int, end_of(fork(function))[1].split())
    assert usually > 20 * kept


def test_a_folder_removed_during_a_run_is_one_line(tmp_path):
    out = tmp_path / "out"
    child = start(f"{LONGER} --elr 0.01 --epochs 10000", out)
    wait_for(lambda: (out / "elr=1e-02.pt").exists())
    shutil.rmtree(out)
    status, output = end_of(child)
    assert status == 1 and "Traceback" not in output, output
    assert "No such file or directory" in output


FAULTS = OSError(errno.EROFS, "Read-only file system"), torch.OutOfMemoryError("Out of memory.\n…")


@pytest.mark.parametrize("error", FAULTS)
def test_one_run_fails_and_the_others_go_on(tmp_path, capsys, monkeypatch, error):
    real = train.train

    def failing(run, tell):
        if run.value == 0.1:
            raise error
        return real(run, tell)

    monkeypatch.setattr(train, "train", failing)
    said = failed(capsys, f"{ONE_SUM} 0.1 1", tmp_path)
    assert said == f"train.py: error: elr 1e-01: {str(error).splitlines()[0]}\n"
    assert [row["elr"] for row in read(tmp_path / "regimes.csv")] == ["0.5", "1"]


# --- trust


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, capsys, undisturbed):
    out, path = tmp_path / "out", tmp_path / "out" / "elr=1e-01.pt"
    assert run(f"{SUMS} --elr 0.1", out) == 0
    assert run(f"{SUMS} --elr 0.1 --momentum 0.5", tmp_path / "ball") == 0
    state = checkpoint(out, "elr=1e-01")
    state["contents"]["train.py"] = "another"
    runs.save_checkpoint(tmp_path / "edited.pt", state["identity"], state)
    for source, what in (
        (undisturbed / "elr=5e-01.pt", "value is 0.5 there, 0.1 here"),
        (tmp_path / "ball" / "elr=1e-01.pt", "momentum is 0.5 there, None here"),
        (tmp_path / "edited.pt", "train.py has changed"),
    ):
        shutil.copy(source, path)
        error = failed(capsys, f"{SUMS} --elr 0.1 --epochs 3", out)
        assert f"elr=1e-01.pt is the checkpoint of another run ({what}): remove it" in error


def test_nothing_in_a_checkpoint_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    runs.save_checkpoint(tmp_path / "evil.pt", {}, {"epoch": 1, "net": Evil()})
    with pytest.raises(ValueError, match="evil.pt is damaged"):
        runs.load_checkpoint(tmp_path / "evil.pt", "cpu", {})
    assert not (tmp_path / "ran").exists()


def one_line(error):
    return str(error).count("\n") == 0 and len(str(error)) < 2000


# The same 120 inputs each time; with SLOW=1 many more, and new ones.
slow = "SLOW" in os.environ
quick = settings(
    max_examples=2000 if slow else 40,
    derandomize=not slow,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@quick
@given(data=st.data())
def test_a_damaged_checkpoint_is_one_line_or_read(tmp_path_factory, undisturbed, data):
    good = (undisturbed / "elr=5e-01.pt").read_bytes()
    content, kind = bytearray(good), data.draw(st.sampled_from(["flip", "cut", "junk"]))
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content = data.draw(st.binary(max_size=300))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(bytes(content))
    try:
        found = runs.load_checkpoint(path, "cpu")
    except ValueError as error:
        assert one_line(error) and "damaged.pt" in str(error)
    else:
        assert bytes(content) == good and bytes.fromhex(found["checksum"]) == good[-32:]


KEYS = st.sampled_from(["options", "chance", "0", "mean", "train_loss", "points"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)
configs = anything | anything.map(lambda x: {"options": {"width": 8}, "contents": x})


@quick
@given(
    content=st.binary(max_size=200)
    | configs.map(lambda x: json.dumps(x).encode())
    | st.integers(1, 10**5).map(lambda n: b"[" * n)
)
def test_a_damaged_config_is_one_line_or_read(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    for read_config, kind in (
        (lambda: runs.open_folder(folder, {"width": 8}, {"mine.py": "hash"}, True), str),
        (lambda: regimes.read_chance(folder), dict),
    ):
        (folder / "config.json").write_bytes(content)
        try:
            assert isinstance(read_config(), kind)
        except ValueError as error:
            assert one_line(error) and str(folder) in str(error)


JUNK = ["\0", "1_0", "x" * 200_000, "=1+1", '"', "nan", "inf", "-1", "1e999", "", ",,,"]


@quick
@given(data=st.data())
def test_a_damaged_log_is_one_line_or_no_wrong_verdict(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.csv"
    make_log(path, lambda e: 6 / (1 + e) ** 1.5, epochs=30, error=lambda e: 0.9 / (1 + e))
    lines = path.read_text().splitlines()
    at, cell = data.draw(st.integers(0, 31)), data.draw(st.integers(0, 2))
    cells = lines[at].split(",")
    cells[cell] = data.draw(st.text(max_size=20) | st.sampled_from(JUNK))
    lines[at] = ",".join(cells)
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    content = ("\n".join(lines) + "\n").encode(encoding, errors="replace")
    end = data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2, 5, 0]))
    path.write_bytes(content[:end])
    try:
        found = regimes.read_run(path, {})
    except ValueError as error:
        assert one_line(error) and "damaged.csv" in str(error)
    else:
        assert found.verdict.regime in ("convergence", "undecided")
