"""Runs on disk: their names, folder, rows, checkpoint and lock; bisection.

Files are replaced whole or not at all, rows are whole or absent. A lock, which the system releases
when its process dies, keeps a second process out of a run.
"""

import argparse
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import signal
import socket
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

import regimes
from lab.contents import ROOT, changed
from lab.loop import LOWER, classify_loop, is_loop

# The files of runs, and those of their folder.
LOGS = [f"{run}=*.{end}" for run in ("elr", "lr", "angle", "loop") for end in ("csv", "pt", "lock")]
FILES = [*LOGS, "loop=*.png", "barrier.png", "config.json"]
FILES += ["regimes.csv", "regimes.png", "landscape.csv", "landscape.png"]
STOPS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "remove it, and this run starts again"


class Busy(Exception):
    """The run is in progress in another process."""


@dataclass
class Job:
    """A run to do: its ELR, angle or learning rate, seed, log and name; the checkpoint that it
    starts from, if any."""

    value: float
    seed: int
    path: Path
    name: str
    init: dict | None = None


def jobs_of(config, values, seeds):
    """The jobs: elr=1e-02.seed=1.csv is the log of "elr 1e-02 seed 1"."""
    jobs = []
    for seed in seeds:
        for value in values:
            stem = f"{config.mode}={regimes.elr_name(value)}"
            if config.loop:
                low, high, n = config.loop
                stem = f"loop={low:g}-{high:g}x{n:g}"
                if config.passes > 1:
                    stem += f"x{config.passes}"
            if seed:
                stem += f".seed={seed}"
            name = stem.replace("=", " ").replace(".seed", " seed")
            jobs.append(Job(value, seed, config.out / f"{stem}.csv", name))
    return jobs


def second_job(job, value):
    """The job of --then: from the end of another one, at another value."""
    init = load_checkpoint(job.path.with_suffix(".pt"), "cpu")
    path = job.path.with_suffix(f".then={regimes.elr_name(value)}.csv")
    return Job(value, job.seed, path, second_name(job, value), init)


def second_name(job, value):
    return f"{job.name}, then {value:g}"


def read_run(path):
    """A log and its verdict, with the chance reference of its folder."""
    return regimes.read_run(path, regimes.read_chance(path.parent))


def result(path):
    """What a run gave, in a line: its regime; where its ELR moves, how it ended."""
    run = read_run(path)
    error, zeros = f"test error {run.final('test_error'):.3f}", ""
    if names := became_zero(path):
        zeros = f"; the weights of {', '.join(names)} became 0: nothing learns after that"
    if is_loop(run.log):
        return f"{classify_loop([run.log], run.chance)}{zeros}"
    if run.verdict.broken and path.name.startswith("loop="):
        return f"{run.verdict}: {LOWER}"
    if run.verdict.moves:
        loss, elr = run.final("train_loss"), run.log["elr"]
        return f"{error}, train loss {loss:.3g}, ELR {elr.min():.3g} to {elr.max():.3g}{zeros}"
    return f"{run.verdict}; {error}{zeros}"


def became_zero(path):
    """The tensors that had a norm in the log, and have none in the end: divergence can drive them
    down to 0."""
    norms, above_zero = {}, set()
    with suppress(FileNotFoundError), open(path.with_suffix(".layers.csv"), newline="") as file:
        for row in csv.DictReader(file):
            norms[row["layer"]] = row["norm"]
            if row["norm"] != "nan":
                above_zero.add(row["layer"])
    return [name for name, norm in norms.items() if norm == "nan" and name in above_zero]


def is_expected(error):
    """Whether the one line of an error tells enough: it is of the machine, of files, of somebody's
    network. Of one in an edit of train.py one wants to see the place."""
    if isinstance(error, BrokenPipeError):  # who reads what we print has gone away
        return False
    if isinstance(error, OSError | MemoryError) or "memory" in str(error):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised_in.parent in (ROOT, ROOT / "lab") and raised_in.name != "train.py"
    return isinstance(error, ValueError) and ours


def open_folder(out, identity, contents, given):
    """Make the folder, or find that its runs have these options and were made by these contents.
    Where not, the old runs move into out/before-1, or -2, …: returns a note on it.

    Raises ValueError, having changed nothing, where the folder cannot be written, where its runs
    are in progress, or have other options although this folder was `given`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out / "folder.lock", patient=True):
            remove_leftovers(out)
            about, note = read_config(out), ""
            if not [old for pattern in LOGS for old in out.glob(pattern)]:
                about = {}
            elif "contents" not in about:
                note = "config.json is missing, or of version 0.3"
            else:
                note = difference(about["options"], identity)
                if note and given:
                    others = f"{out} holds runs with other options ({note})"
                    raise ValueError(f"{others}: choose another --out, or remove it")
                note = note or changed(about["contents"], contents)
            if note:
                note += f": trained anew; the old runs are in {move_aside(out)}"
            if note or not about:
                write_config(out, {"options": identity, "contents": contents})
            return note
    except Busy as busy:
        raise ValueError(f"{busy}: wait for it, or choose another --out") from None
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None


def read_config(out):
    """A folder's config.json; empty if there is none. Raises ValueError where it is damaged."""
    path = out / "config.json"
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        for part in (about["options"], about.get("contents", {})):
            part.keys()
        return about
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: choose another --out, or remove it") from None


def write_config(out, about):
    text = json.dumps(about, indent=2, default=str) + "\n"
    regimes.write_whole(out / "config.json", text.encode())


def add_to_config(out, **entries):
    """Write these into a folder's config.json, in the place of those of their names."""
    with lock(out / "folder.lock", patient=True):
        write_config(out, read_config(out) | entries)


def move_aside(out):
    """Move what is ours in a folder into a new one in it. Raises Busy, having done nothing, where a
    run is in progress."""
    for held in out.glob("*=*.lock"):
        with lock(held):
            pass
    number = 1
    while (out / f"before-{number}").exists():
        number += 1
    place = out / f"before-{number}"
    place.mkdir()
    for pattern in FILES:
        for old in out.glob(pattern):
            old.rename(place / old.name)
    return place


def difference(there, here):
    """In words, the first entry that differs; "" if none does."""
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
    return ""


def save_checkpoint(path, identity, state):
    """The state and whose it is; a checksum."""
    file = io.BytesIO()
    torch.save(state | {"identity": identity}, file)
    content = file.getvalue()
    regimes.write_whole(path, content + hashlib.sha256(content).digest())


def load_checkpoint(path, device, identity=None, contents=None):
    """A checkpoint, with its `checksum`; None if there is none. Raises ValueError where it is
    damaged or, if this is asked, of another run, or lost."""
    if not path.exists():
        for log in (path.with_suffix(".csv"), path.with_suffix(".layers.csv")):
            rows = log.read_bytes().splitlines()[1:] if log.exists() else []
            if identity and not all(row.startswith(b"0,") for row in rows):  # before training
                cure = "to train anew, move it away or remove it"
                raise ValueError(f"{log} is there without its checkpoint {path.name}: {cure}")
        return None
    content = path.read_bytes()
    content, checksum = content[:-32], content[-32:]
    try:
        if hashlib.sha256(content).digest() != checksum:
            raise ValueError
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        there = dict(state["identity"])
    except Exception:  # what is no checkpoint can fail anywhere
        cure = AGAIN if identity else "it takes the .pt of a run"
        raise ValueError(f"{path} is damaged, or no checkpoint of train.py: {cure}") from None
    other = difference(there, identity) if identity else ""
    if contents and not other:
        other = changed(state.get("contents", {}), contents)
    if other:
        raise ValueError(f"{path} is the checkpoint of another run ({other}): {AGAIN}")
    return state | {"checksum": checksum.hex()}


def restore(parts, state, path):
    """Load network and optimizers from a checkpoint. Raises ValueError where they do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, KeyError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} does not fit ({why}): {AGAIN}") from None


def remove_leftovers(out):
    """What processes that have died left behind: locks, and temporary files of this machine."""
    for held in out.glob("*=*.lock"):
        with suppress(Busy), lock(held):
            pass
    for path in out.glob(f"*.{socket.gethostname()}-*.tmp"):
        if not is_alive(path.name.removesuffix(".tmp").rpartition("-")[2]):
            path.unlink(missing_ok=True)


def is_alive(pid):
    """Whether a process is there that has not ended; a dead one may wait for its parent's look."""
    try:
        os.kill(int(pid), 0)
        _, _, state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")
        return state[0] != "Z"
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # no number; another user's; no /proc
        return True


@contextmanager
def lock(path, patient=False):
    """Hold the lock of a run. Where another process does, wait if `patient`, else raise Busy."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                break  # else its holder has just removed it
        except BlockingIOError:
            if not patient:
                holder = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                raise Busy(f"{path.stem} is in progress: {holder} holds {path}") from None
            time.sleep(0.2)
        os.close(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


class Log:
    """A CSV file that grows by whole rows, floats to 9 digits; it begins with the first row, whose
    columns it has. Of rows that are there, those up to `last_epoch` are kept; None: none of them.
    Raises ValueError where one is missing."""

    def __init__(self, path, last_epoch=None):
        self.path, self.file = path, None
        if last_epoch is not None:
            self._open(_rows_up_to(path, last_epoch))

    def _open(self, content=b""):
        if not content or self.path.read_bytes() != content:
            regimes.write_whole(self.path, content)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, *rows):
        lines = [row.values() for row in rows]
        if self.file is None:
            self._open()
            lines.insert(0, rows[0].keys())
        size, content = os.fstat(self.file).st_size, regimes.csv_lines(lines)
        if os.write(self.file, content) < len(content):  # the disk is full
            os.ftruncate(self.file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self):
        if self.file is not None:
            os.close(self.file)


def _rows_up_to(path, last_epoch):
    """The header of a log, and its whole rows up to that epoch, in bytes."""
    kept, rows = [], Counter()  # of each epoch
    with suppress(ValueError, FileNotFoundError):
        header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept.append(header)
        for line in lines:
            epoch = int(line.partition(",")[0])
            whole = line.endswith("\n") and line.count(",") == header.count(",")
            if whole and epoch <= last_epoch:
                kept.append(line)
                rows[epoch] += 1
    if rows.keys() != set(range(last_epoch + 1)) or len(set(rows.values())) > 1:
        checkpoint = path.name.removesuffix(".csv").removesuffix(".layers") + ".pt"
        cure = f"remove {checkpoint}, and this run starts again"
        raise ValueError(f"{path} lacks rows or is damaged: {cure}")
    return "".join(kept).encode()


def number(kind, low=None, high=math.inf):
    """An argparse type: a whole number from low (1) to high; or a number that float32 holds, above
    0, or from 0 on if that is low, and below high."""
    whole = kind is int
    if whole:
        low = 1 if low is None else low
        name = f"whole number from {low}"
    else:
        name = "float32 number above 0" if low is None else "float32 number from 0 on"
    if high < math.inf:
        name += f" to {high}" if whole else f" and below {high:.6g}"

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if whole:
                good = low <= value <= high
            else:
                good = value == low or 1.18e-38 < value < min(high, 3.4e38)
            if good:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name}")

    return parse


def bisect(out, values):
    """For each boundary that was seen among these ELRs one between its sides: the middle, in the
    logarithm, of the widest gap, in as few digits as tell it from both ends."""
    runs, new = [run for run in regimes.gather([out])[0] if run.elr in values], []
    for boundary in regimes.boundaries(runs):
        if not boundary.seen:
            continue
        # Between the two sides may lie ELRs at which the seeds disagree
        inside = [elr for elr in regimes.by_elr(runs) if boundary.low <= elr <= boundary.high]
        low, high = max(pairwise(inside), key=lambda gap: gap[1] / gap[0])
        for digits in range(3, 7):
            middle = float(f"{math.sqrt(low * high):.{digits}g}")
            if low * 1.0001 < middle < high / 1.0001:
                new.append(middle)
                break
    return list(dict.fromkeys(new))
