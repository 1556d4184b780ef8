"""What happens to runs under faults: killed at any moment, a full disk, two processes in one folder, damaged files.

`python -m pytest tests/test_faults.py --kills 50` kills a sweep at 50 random moments instead of 3.
"""

import ctypes
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import equal_runs, read, without_seconds

import regimes
import train
from lab import figures, machine, measure, runs

ROOT = Path(__file__).parent.parent
SUMS = ["--data", "modular", "--modulus", "5", "--width", "4", "--epochs", "1", "--batch-size", "8"]
SUMS += ["--jobs", "1", "--threads", "1", "--elr", "0.5", "0.1"]
CALLS = ("open", "write", "fsync", "replace", "close", "ftruncate")


def fork(function):
    """Start a function in a child process whose output goes to a file. Returns its process id and that file."""
    output = tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid == 0:
        status = 99
        sys.settrace(None)  # coverage has a lock, which an exception of a signal may leave locked
        try:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = function()
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status or 0)
    return pid, output


def end_of(child):
    """Exit status (negative: the signal) and output of a child."""
    pid, output = child
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output.seek(0)
    return status, output.read()


def start(*arguments, before=lambda: None):
    """train.py in a child, without the figure, which takes longer than such a run."""

    def function():
        figures.of_sweep = lambda *_: None
        before()
        return train.main([str(a) for a in arguments])

    return fork(function)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def holders(folder):
    """The process ids in the locks of a folder."""
    found = []
    for path in folder.glob("*.lock"):
        with suppress(FileNotFoundError):  # released in this moment
            text = path.read_text()
            found += [int(text.split()[1])] if text.startswith("process ") else []
    return found


def holder_of_a_lock(folder):
    """The first process that is seen to hold one."""
    found = []
    wait_for(lambda: found.extend(holders(folder)) or found)
    return found[0]


class DyingOs:
    """The module os, whose n-th call that writes is the last thing that this process does (a write: half of it)."""

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


def equal_sweeps(a, b):
    for name in {path.name for folder in (a, b) for path in folder.glob("elr=*.pt")}:
        equal_runs(a, b, name.removesuffix(".pt"))
    assert (a / "regimes.csv").read_bytes() == (b / "regimes.csv").read_bytes()
    assert not list(b.glob("*.tmp")) and not list(b.glob("*.lock"))


@pytest.fixture(scope="module", autouse=True)
def undisturbed(tmp_path_factory):
    """A small sweep; in this process, so that what torch imports late is there when children are
    forked."""
    folder = tmp_path_factory.mktemp("undisturbed")
    points, measure.POINTS = measure.POINTS, 4  # it is the files that count here
    draw, figures.of_sweep = figures.of_sweep, lambda *_: None
    assert train.main([*SUMS, "--out", str(folder)]) == 0
    figures.of_sweep = draw
    yield folder
    measure.POINTS = points


def test_killed_between_any_two_system_calls_a_run_goes_on_to_the_same_files(
    tmp_path,
):
    counter, calls = tmp_path / "calls", 10**9
    whole = tmp_path / "whole"
    assert end_of(start(*SUMS[:-1], "--out", whole))[0] == 0

    def count():
        runs.os = regimes.os = DyingOs(calls)
        # The figure is the last that is written.
        figures.of_sweep = lambda *_: counter.write_text(str(calls - runs.os.left))

    assert end_of(start(*SUMS[:-1], "--out", tmp_path / "counted", before=count))[0] == 0
    total = int(counter.read_text())
    assert total > 20
    for n in range(1, total + 1):
        folder = tmp_path / str(n)
        status, output = end_of(start(*SUMS[:-1], "--out", folder, before=lambda n=n: die_at(n)))
        assert status == -signal.SIGKILL, output
        status, output = end_of(start(*SUMS[:-1], "--out", folder))
        assert status == 0 and "Traceback" not in output, (n, output)
        equal_sweeps(whole, folder)
        shutil.rmtree(folder)


def gone(pid):
    """Whether a process has ended; it may still wait to be asked how."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_killed_at_random_moments_a_sweep_loses_nothing(tmp_path, pytestconfig):
    kills = pytestconfig.getoption("--kills")
    epochs = 2 * kills  # so that there is work left for each of them
    command = ["--elr", 0.01, 0.1, "--width", 2, "--batch-size", 64, "--epochs", epochs]
    command += ["--jobs", 1, "--threads", 1, "--out"]
    assert end_of(start(*command, tmp_path / "undisturbed"))[0] == 0
    out, finished, ends = tmp_path / "disturbed", {}, []
    for _ in range(kills):
        child = start(*command, out)
        wait_for(lambda pid=child[0]: gone(pid) or pid in holders(out))
        time.sleep(random.uniform(0, 0.2))
        os.kill(child[0], signal.SIGKILL)
        ends.append(end_of(child)[0])
        for path in out.glob("elr=*.csv"):  # what was a whole row before is one still
            rows = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
            kept = [row.rsplit(",", 2)[0] for row in finished.get(path.name, [])]
            same = [row.rsplit(",", 2)[0] for row in rows[: len(kept)]] == kept
            assert same or len(rows) < len(kept)
            whole = path.with_suffix(".pt").exists() and "layers" not in path.name
            if whole and len(rows) == epochs + 2:
                finished[path.name] = rows
    print(f"{ends.count(-signal.SIGKILL)} of {kills} kills met a sweep that was at work")
    assert end_of(start(*command, out))[0] == 0
    for name, rows in finished.items():
        assert (out / name).read_text() == "".join(rows)
    equal_sweeps(tmp_path / "undisturbed", out)


def test_a_signal_ends_at_once_and_the_run_goes_on_from_the_last_whole_epoch(tmp_path):
    command = ["--elr", 0.01, "--width", 2, "--epochs", 3, "--batch-size", 32]
    command += ["--momentum", 0.9, "--augment"]
    checkpoint = tmp_path / "parts" / "elr=1e-02.pt"
    assert end_of(start(*command, "--out", tmp_path / "whole"))[0] == 0
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = start(*command, "--out", tmp_path / "parts")
        wait_for(lambda pid=child[0]: checkpoint.exists() and pid in holders(checkpoint.parent))
        os.kill(child[0], number)
        status, output = end_of(child)
        assert status == expected and output.count("\n") == 1, output
        assert output.startswith("interrupted; the same command goes on from")
        assert torch.load(checkpoint, weights_only=True)["epoch"] < 3
        text = checkpoint.with_suffix(".csv").read_text()  # whole rows
        assert text.endswith("\n") and {line.count(",") for line in text.splitlines()} == {11}
    assert end_of(start(*command, "--out", tmp_path / "parts"))[0] == 0
    equal_runs(tmp_path / "whole", tmp_path / "parts")


# ----------------------------------------------------------------------------------------------------------------- one writer


def test_a_second_process_is_kept_out_of_a_run_and_told_who_is_in_it(tmp_path):
    command = ["--elr", 0.01, "--width", 2, "--epochs", 1000, "--out", tmp_path]
    child = start(*command)
    wait_for(lambda: (tmp_path / "elr=1e-02.pt").exists())
    status, output = end_of(start(*command))
    assert status == 1 and "Traceback" not in output
    assert output.splitlines()[0].startswith(f"elr=1e-02 is in progress: process {child[0]} on ")
    status, output = end_of(start(*command, "--force"))
    assert (
        status == 2
        and output.count("\n") == 1
        and "argument --out: elr=1e-02 is in progress" in output
    )
    os.kill(child[0], signal.SIGKILL)
    assert end_of(child)[0] == -signal.SIGKILL
    with runs.lock(tmp_path / "elr=1e-02.lock"):  # no stale lock
        pass


# ------------------------------------------------------------------------------------------------------- many runs at a time

MANY = ["--elr", "0.01", "0.02", "0.04", "--width", "2", "--epochs", "4", "--batch-size", "64"]
MANY += ["--threads", "1"]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_by_one")
    assert end_of(start(*MANY, "--out", folder))[0] == 0
    return folder


def test_a_sweep_started_twice_shares_the_work(tmp_path, one_by_one):
    children = [start(*MANY, "--jobs", 1, "--out", tmp_path) for _ in range(2)]
    outputs = [end_of(child) for child in children]
    assert [status for status, _ in outputs] == [0, 0], outputs
    text = "".join(output for _, output in outputs)  # each is done once and reported twice
    assert text.count("(already done)") == 3 and text.count("elr 4e-02") == 2
    equal_sweeps(one_by_one, tmp_path)


def test_jobs_stop_together_and_a_killed_one_does_not_take_the_others_along(tmp_path, one_by_one):
    command = [*MANY, "--jobs", 2, "--out", tmp_path]
    child = start(*command)
    holder_of_a_lock(tmp_path)
    os.kill(child[0], signal.SIGTERM)
    status, output = end_of(child)
    assert status == 143 and output.startswith("interrupted; ") and output.count("\n") == 1, output
    child = start(*command)
    os.kill(holder_of_a_lock(tmp_path), signal.SIGKILL)
    status, output = end_of(child)
    assert status == 0 and "Traceback" not in output, output
    equal_sweeps(one_by_one, tmp_path)  # which were written by one process, one after the other
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 1


def test_where_all_jobs_are_killed_their_parent_finishes_the_sweep(tmp_path, one_by_one):
    child = start(*MANY, "--jobs", 2, "--out", tmp_path)
    wait_for(lambda: len(holders(tmp_path)) == 2)
    for job in holders(tmp_path):
        os.kill(job, signal.SIGKILL)
    status, output = end_of(child)
    assert status == 0 and "Traceback" not in output, output
    equal_sweeps(one_by_one, tmp_path)


def test_a_long_run_says_a_line_a_minute(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    watch = runs.Watch(1, 1, renew=lambda: None)
    for epoch in range(9):
        watch.tell(0, "epoch", "elr 1e-02", epoch, 9, "loss 2, error 0.5, γ 3")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and len(lines) < 9
    assert all(line.startswith("elr 1e-02: epoch ") for line in lines)
    assert all(line.endswith(" of 9, loss 2, error 0.5, γ 3") for line in lines)


def test_on_a_terminal_there_is_a_bar_per_job_and_one_for_the_sweep(tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    quick = "--elr 0.01 0.02 --width 2 --epochs 3 --batch-size 64 --jobs 2 --out".split()
    child = start(*quick, tmp_path, before=lambda: os.dup2(theirs, 2))
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal is gone when the last process has ended
        while piece := os.read(ours, 65536):
            shown += piece
    status, verdicts = end_of(child)
    shown = shown.decode(errors="replace")
    assert status == 0 and verdicts.count("; test error ") == 2
    assert "runs: " in shown and "/2 [" in shown  # with the time that is left
    assert "elr 1e-02: " in shown and "/3 [" in shown and "γ" in shown


def test_jobs_whose_parent_is_killed_end_too_and_the_same_command_finishes_the_sweep(
    tmp_path, one_by_one
):
    command = [*MANY, "--jobs", 2, "--out", tmp_path]
    child = start(*command)
    wait_for(lambda: len(holders(tmp_path)) == 2)
    jobs = holders(tmp_path)
    os.kill(child[0], signal.SIGKILL)
    assert end_of(child)[0] == -signal.SIGKILL
    wait_for(lambda: all(gone(pid) for pid in jobs), seconds=10)
    status, output = end_of(start(*command))
    assert status == 0 and "Traceback" not in output, output
    equal_sweeps(one_by_one, tmp_path)


def test_the_ranks_of_torchrun_share_a_sweep_and_one_that_is_killed_is_resumed(
    tmp_path, one_by_one, monkeypatch
):
    """With what torchrun says to its processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ranks.append(start(*MANY, "--out", tmp_path))
    wait_for(lambda: len(holders(tmp_path)) == 2)
    os.kill(ranks[1][0], signal.SIGKILL)
    assert end_of(ranks[1])[0] == -signal.SIGKILL
    again = start(*MANY, "--out", tmp_path)  # as torchrun does it
    (status, output), (other, _) = end_of(ranks[0]), end_of(again)
    assert status == other == 0, output
    equal_sweeps(one_by_one, tmp_path)
    assert output.count("written: ") == 1


# --------------------------------------------------------------------------------------------------------------------- faults


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_goes_on(tmp_path):
    folder, command = (
        tmp_path / "small",
        ["--elr", 0.01, "--width", 4, "--batch-size", 256, "--momentum", 0.9, "--threads", 1],
    )
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
        ).returncode
        == 0
    )
    try:
        assert end_of(start(*command, "--epochs", 1, "--out", folder / "out"))[0] == 0
        good = (folder / "out" / "elr=1e-02.pt").read_bytes()

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2,) * 2)

        if mounted:
            with open(folder / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
                while file.write(bytes(4096)):
                    pass
            with open(folder / "filler", "rb+") as file:  # leave room for half of a checkpoint
                file.truncate(max(0, os.fstat(file.fileno()).st_size - len(good) // 2))
        status, output = end_of(
            start(
                *command,
                "--epochs",
                3,
                "--out",
                folder / "out",
                before=(lambda: None) if mounted else limit,
            )
        )
        assert status == 1 and "Traceback" not in output and "elr" in output, output
        errors = [line for line in output.splitlines() if line.startswith("train.py: error: ")]
        assert errors and ("No space left" if mounted else "File too large") in errors[0]
        assert (folder / "out" / "elr=1e-02.pt").read_bytes() == good
        (folder / "filler").unlink(missing_ok=True)
        assert end_of(start(*command, "--epochs", 3, "--out", folder / "out"))[0] == 0
        assert end_of(start(*command, "--epochs", 3, "--out", tmp_path / "whole"))[0] == 0
        equal_runs(tmp_path / "whole", folder / "out")
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_a_reader_that_goes_away_ends_the_program_silently(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)

    def function():
        os.dup2(writer, 1)
        regimes.finish(lambda: train.main([*SUMS, "--out", str(tmp_path)]))

    assert end_of(fork(function)) == (0, "")


def pages_fetched():
    """While 15 times 40 MB are used and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        _ = [torch.ones(10**7) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_for_the_next_step():
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")

    def function():
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 65536), mallopt(-1, 2**17)  # as at the start of a process
        usually = pages_fetched()
        machine.keep_memory()
        pages_fetched()
        print(usually, pages_fetched())

    usually, kept = map(int, end_of(fork(function))[1].split())
    assert usually > 20 * kept


def test_a_folder_removed_during_a_run_is_one_line(tmp_path):
    child = start("--elr", 0.01, "--width", 2, "--epochs", 1000, "--out", tmp_path / "out")
    wait_for(lambda: (tmp_path / "out" / "elr=1e-02.pt").exists())
    shutil.rmtree(tmp_path / "out")
    status, output = end_of(child)
    assert status == 1 and "Traceback" not in output and "No such file or directory" in output, (
        output
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
    ],
)
def test_where_one_run_of_a_sweep_fails_the_others_go_on(tmp_path, capsys, monkeypatch, error):
    real = train.continue_to_epoch

    def failing(options, data, job, epochs, tell):
        if job.value == 0.1:
            raise error
        return real(options, data, job, epochs, tell)

    monkeypatch.setattr(train, "continue_to_epoch", failing)
    command = [*SUMS, "1"]
    command += ["--out", str(tmp_path)]
    assert train.main(command) == 1
    out, err = capsys.readouterr()
    assert (
        err.count("\n") == 1
        and err.startswith("train.py: error: elr 1e-01: ")
        and str(error).splitlines()[0] in err
    )
    assert [row["elr"] for row in read(tmp_path / "regimes.csv")] == ["0.5", "1"]
    monkeypatch.undo()
    assert train.main(command) == 0 and len(read(tmp_path / "regimes.csv")) == 3


# ---------------------------------------------------------------------------------------------------------------------- trust


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, capsys):
    for name, more in (("a", []), ("b", ["--momentum", "0.5"])):
        assert end_of(start(*SUMS, *more, "--out", tmp_path / name))[0] == 0
    a = tmp_path / "a"
    for source, what in (
        (a / "elr=1e-01.pt", "value is 0.1 there, 0.5 here"),
        (tmp_path / "b" / "elr=5e-01.pt", "momentum is 0.5 there, None here"),
    ):
        shutil.copy(source, a / "elr=5e-01.pt")
        assert train.main([*SUMS, "--out", str(a), "--epochs", "3"]) == 1
        err = capsys.readouterr().err
        assert (
            err.count("\n") == 1
            and f"elr=5e-01.pt is the checkpoint of another run ({what}): remove it" in err
        )


def test_nothing_in_a_checkpoint_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    runs.save_checkpoint(tmp_path / "evil.pt", {}, {"epoch": 1, "net": Evil()})
    with pytest.raises(ValueError, match="evil.pt is damaged"):
        runs.load_checkpoint(tmp_path / "evil.pt", {}, "cpu")
    assert not (tmp_path / "ran").exists()


def one_line(error):
    return str(error).count("\n") == 0 and len(str(error)) < 2000


@pytest.fixture(scope="module")
def good(undisturbed):
    path = undisturbed / "elr=5e-01.pt"
    identity = torch.load(path, weights_only=True)["identity"]
    return path.read_bytes(), identity, runs.load_checkpoint(path, identity, "cpu")


# The same 210 inputs each time; with SLOW=1 many more, and new ones.
slow = "SLOW" in os.environ
quick = settings(
    max_examples=2000 if slow else 70,
    derandomize=not slow,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@quick
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_in_one_line_or_read_correctly(
    tmp_path_factory, good, data
):
    content, identity, state = bytearray(good[0]), good[1], good[2]
    kind = data.draw(st.sampled_from(["flip", "cut", "junk"]))
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
        found = runs.load_checkpoint(path, identity, "cpu")
    except ValueError as error:
        assert one_line(error) and "damaged.pt" in str(error)
    else:
        assert bytes(content) == good[0] and found["checksum"] == state["checksum"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["options", "chance", "0", "mean", "train_loss", "points"]), inner
        )
    ),
    max_leaves=12,
)


@quick
@given(
    content=st.binary(max_size=200)
    | anything.map(lambda x: json.dumps(x).encode())
    | st.integers(1, 10**5).map(lambda n: b"[" * n)
)
def test_a_damaged_config_is_refused_in_one_line_or_read(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    for read_config in (
        lambda: runs.open_folder(folder, {"width": 8}),
        lambda: regimes.read_chance(folder),
    ):
        try:
            assert isinstance(read_config(), dict)
        except ValueError as error:
            assert one_line(error) and str(folder) in str(error)


@quick
@given(data=st.data())
def test_a_damaged_log_is_refused_in_one_line_or_read_without_a_wrong_verdict(
    tmp_path_factory, data
):
    epochs = np.arange(31)
    lines = [
        "epoch,train_loss,train_error",
        *(f"{e},{6 / (1 + e) ** 1.5:.5g},{0.9 / (1 + e):.5g}" for e in epochs),
    ]
    at, cell = data.draw(st.integers(0, 31)), data.draw(st.integers(0, 2))
    cells = lines[at].split(",")
    junk = st.text(max_size=20) | st.sampled_from(
        ["\0", "1_0", "x" * 200_000, "=1+1", '"', "nan", "inf", "-1", "1e999", "", ",,,"]
    )
    cells[cell] = data.draw(junk)
    lines[at] = ",".join(cells)
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    content = ("\n".join(lines) + "\n").encode(encoding, errors="replace")
    content = content[: data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2, 5, 0]))]
    path = tmp_path_factory.getbasetemp() / "damaged.csv"
    path.write_bytes(content)
    try:
        run = regimes.read_run(path, {})
    except ValueError as error:
        assert one_line(error) and "damaged.csv" in str(error)
    else:
        assert run.verdict.regime in ("convergence", "undecided")


def test_rows_that_cannot_be_written_whole_are_not_written(tmp_path, monkeypatch):
    rows = runs.Rows(tmp_path / "log.csv", ["epoch", "loss"])
    rows.add([0, 0.5])

    write = os.write
    monkeypatch.setattr(runs.os, "write", lambda file, content: write(file, content[:3]))
    with pytest.raises(OSError, match="No space left on device"):
        rows.add([1, 0.25])
    monkeypatch.undo()
    rows.close()
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n0,0.5\n"
    assert without_seconds(tmp_path / "log.csv") == [{"epoch": "0", "loss": "0.5"}]
