"""Runs on disk, and many of them: folder, rows, checkpoint and lock; grid, bisection, jobs, ranks.

Files are replaced whole or not at all, rows are whole or absent. A lock, which the system releases
when its process dies, keeps a second process out of a run.
"""

import argparse
import errno
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing.connection import wait

import numpy as np
import torch
from tqdm import tqdm

import regimes

OURS = [f"{run}=*.{end}" for run in ("elr", "lr", "angle") for end in ("csv", "pt", "lock")]
STOPS = (signal.SIGINT, signal.SIGTERM)
OURS += ["config.json", "regimes.csv", "regimes.png"]
ANGLE = "0.05"  # what to try without a sweep
# Options that say which runs, and how they are done: what `next:` leaves out.
WHICH = "elr sweep angle lr wd refine max_epochs seeds then average schedule jobs threads force"


class Busy(Exception):
    """The run is in progress in another process."""


def open_folder(out, options, force=False):
    """Make the folder, or find that its runs have these very options; returns its config. `force`
    removes what was there of ours. Raises ValueError, having changed nothing, where the folder
    cannot be written, or its runs have other options or are in progress."""
    path = out / "config.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = regimes.temporary(out / "probe")
        probe.touch()
        probe.unlink()
        remove_leftovers(out)
        if force:
            for held in out.glob("*.lock"):
                with lock(held):
                    pass
            for pattern in OURS:
                for old in out.glob(pattern):
                    old.unlink()
        if not path.exists():
            return {"options": options}
        config = json.loads(path.read_text(encoding="utf-8"))
        what = _difference(config["options"], options)
    except Busy as busy:
        raise ValueError(f"{busy}: wait for it, or choose another --out") from None
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: choose another --out, or --force") from None
    if what:
        raise ValueError(f"{out} holds runs with other options ({what}): another --out, or --force")
    return config


def _difference(there, here):
    """In words, the first entry that differs; "" if none does."""
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
    return ""


def write_config(out, config):
    text = json.dumps(config, indent=2, default=str) + "\n"
    regimes.write_whole(out / "config.json", text.encode())


def save_checkpoint(path, identity, state):
    """The state and whose it is; a checksum."""
    file = io.BytesIO()
    torch.save({**state, "identity": identity}, file)
    content = file.getvalue()
    regimes.write_whole(path, content + hashlib.sha256(content).digest())


def load_checkpoint(path, identity, device):
    """A checkpoint, with its `checksum`; None if there is none. Raises ValueError where it is
    damaged or, if this is asked, of another run."""
    if not path.exists():
        return None
    content, again = path.read_bytes(), "remove it, and this run starts again"
    content, checksum = content[:-32], content[-32:]
    try:
        if hashlib.sha256(content).digest() != checksum:
            raise ValueError
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        there = dict(state["identity"])
    except Exception:  # what is no checkpoint can fail anywhere
        raise ValueError(f"{path} is damaged, or no checkpoint of train.py: {again}") from None
    what = "" if identity is None else _difference(there, identity)
    if what:
        raise ValueError(f"{path} is the checkpoint of another run ({what}): {again}")
    return state | {"checksum": checksum.hex()}


def remove_leftovers(out):
    """Temporary files of this machine's processes that have died."""
    for path in out.glob(f"*.{socket.gethostname()}-*.tmp"):
        pid = path.name.removesuffix(".tmp").rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            pass


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


class Rows:
    """A CSV file that grows by whole rows, floats to 9 digits. Of rows that are there, those up to
    epoch `upto` are kept. Raises ValueError where one is missing."""

    def __init__(self, path, columns, upto=-1):
        kept = []
        try:
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]:
                if upto >= 0 and line.endswith("\n") and int(line.split(",")[0]) <= upto:
                    kept.append(line)
        except (ValueError, FileNotFoundError):
            kept = []
        if {int(line.split(",")[0]) for line in kept} != set(range(upto + 1)):
            checkpoint = path.name.removesuffix(".csv").removesuffix(".layers") + ".pt"
            what = f"remove {checkpoint}, and this run starts again"
            raise ValueError(f"{path} lacks rows or is damaged: {what}")
        regimes.write_whole(path, "".join([",".join(columns) + "\n", *kept]).encode())
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, *rows):
        size, content = os.fstat(self.file).st_size, regimes.csv_lines(rows)
        if os.write(self.file, content) < len(content):  # the disk is full
            os.ftruncate(self.file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        os.close(self.file)


def number(kind, low=0, high=math.inf):
    """An argparse type: a number of that kind between low and high, in float32."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        held = kind is int or 1.18e-38 < value < 3.4e38
        if not (low < value < high and held):
            name = "whole number" if kind is int else "float32 number"
            below = f" and below {high:.6g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} above {low:.6g}{below}")
        return value

    return parse


def grid(low, high, n):
    """n ELRs from low to high, log-spaced, to 3 digits: short names."""
    return [float(f"{elr:.3g}") for elr in np.geomspace(low, high, n)]


def bisect(out, values):
    """For each boundary that was seen among these ELRs one between its sides: the middle, in the
    logarithm, of the widest gap, in as few digits as tell it from both ends."""
    runs, new = [run for run in regimes.read_folder(out) if run.elr in values], []
    for boundary in regimes.boundaries(runs):
        if not boundary.seen:
            continue
        # Between its sides are those that the seeds leave undecided
        inside = [elr for elr in regimes.by_elr(runs) if boundary.low <= elr <= boundary.high]
        low, high = max(pairwise(inside), key=lambda gap: gap[1] / gap[0])
        for digits in range(3, 7):
            middle = float(f"{math.sqrt(low * high):.{digits}g}")
            if low * 1.0001 < middle < high / 1.0001:
                new.append(middle)
                break
    return list(dict.fromkeys(new))


class Watch:
    """What one sees of runs: on a terminal bars; else a line per finished run, and one a minute of
    a run that takes longer."""

    def __init__(self, jobs, total, renew, quiet=False):
        self.renew, self.quiet, self.reported, self.failed = renew, quiet, set(), False
        self.bars, self.last, self.terminal = {}, {}, sys.stderr.isatty()
        hidden = not self.terminal or total == 1
        self.done = tqdm(desc="runs", total=total, position=jobs, leave=False, disable=hidden)

    def tell(self, job, what, name, *more):
        """A run's message: "epoch" (epoch, epochs, text); "finished", "note", "busy", "failed"."""
        if what == "epoch" and self.terminal:
            self._bar(job, name, *more)
        elif what == "epoch":
            self._line(name, *more)
        elif what == "finished":
            text, nothing_to_do = more
            if not (nothing_to_do and (self.quiet or name in self.reported)):
                self.reported.add(name)
                name += " (already done)" if nothing_to_do else ""
                tqdm.write(f"{name}: {text}", file=sys.stdout)
                sys.stdout.flush()
                self.done.update()
                self.renew()
        elif what == "failed":
            self.failed = True
            tqdm.write(f"train.py: error: {name}: {more[0]}", file=sys.stderr)
        elif name not in self.reported and (what == "note" or not self.quiet):
            self.reported.add(name)
            tqdm.write(more[0], file=sys.stderr)

    def _bar(self, job, name, epoch, epochs, shown):
        if self.last.get(job) != name:
            self.last[job] = name
            if job in self.bars:
                self.bars[job].close()
            self.bars[job] = tqdm(desc=name, initial=epoch, position=job, leave=False)
        bar = self.bars[job]
        bar.total = epochs
        bar.update(epoch - bar.n)
        bar.set_postfix_str(shown)

    def _line(self, name, epoch, epochs, shown):
        since = self.last.setdefault(name, time.monotonic())
        if time.monotonic() - since > 60:
            print(f"{name}: epoch {epoch} of {epochs}, {shown}", flush=True)
            self.last[name] = time.monotonic()

    def close(self):
        for bar in (self.done, *self.bars.values()):
            bar.close()


def run_all(do, pairs, options, renew):
    """Do these runs, options.jobs at a time. Returns whether one failed.

    do      ((value, seed), tell, patient) → name of the run, verdict in words, whether there was
            nothing to do. Where another process is at the run it waits if `patient`, or is Busy
    renew   called whenever a run is finished
    """
    jobs = min(options.jobs, len(pairs))
    watch = Watch(jobs, len(pairs), renew, quiet=options.rank > 0)
    try:
        if jobs > 1:
            _side_by_side(do, pairs, jobs, options, watch)
            remove_leftovers(options.out)
        # All, or what a job that died has left; what another process is at comes last.
        tell = partial(watch.tell, 0)
        left = [pair for pair in pairs if not attempt(do, pair, options, tell)]
        if left and len(pairs) == options.ranks == 1:
            raise Busy("there is nothing else to do")
        for pair in left:
            attempt(do, pair, options, tell, patient=True)
    finally:
        watch.close()
    return watch.failed


def name_of(options, pair):
    """A run's log, elr=1e-02.seed=1.csv, and its name, elr 1e-02 seed 1."""
    value, seed = pair
    stem = f"{options.mode}={regimes.elr_name(value)}" + (f".seed={seed}" if seed else "")
    return options.out / f"{stem}.csv", stem.replace("=", " ").replace(".seed", " seed")


def what_next(options, found):
    """The paper's advice: start just above the boundary of convergence, go on well below it. Then
    the angle, which needs no sweep. Commands with the options of this one."""
    ways, more = [], []
    boundary = regimes.boundaries(found)[0]
    if boundary.seen:
        ways.append(["--elr", f"{boundary.high:g}", "--then", f"{boundary.low / 10:.2g}"])
    if options.mode != "angle":
        ways.append(["--angle", ANGLE])
    for name, value in options.given.items():
        if name not in WHICH.split():
            more.append(f"--{name.replace('_', '-')}")
            if value is not True:
                more.append(str(value))
    return [shlex.join(["python", "train.py", *way, *more]) for way in ways]


def attempt(do, pair, options, tell, patient=False):
    """Do a run; one that fails leaves the others their turn. Returns False if it is busy."""
    try:
        tell("finished", *do(pair, tell, patient))
    except Busy as busy:
        tell("busy", str(pair), str(busy))
        return False
    except BrokenPipeError:  # who reads what we print has gone away
        raise
    except (OSError, MemoryError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        tell("failed", name_of(options, pair)[1], what)
    return True


def _side_by_side(do, pairs, jobs, options, watch):
    """The runs in processes of their own, each of which takes what none has taken yet. On Linux
    they fork, with what this process has imported and read."""
    fork = sys.platform == "linux" and options.device == "cpu"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    processes, pipes = [], {}
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until a job has its own handlers
    try:
        for job in range(jobs):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_job, args=(do, pairs, options, there))
            process.start()
            there.close()  # so that the end of the job is the end of the pipe
            processes.append(process)
            pipes[here] = job
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        while pipes:
            for pipe in wait(list(pipes)):
                try:
                    watch.tell(pipes[pipe], *pipe.recv())
                except (EOFError, ConnectionResetError):
                    del pipes[pipe]
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


def _job(do, pairs, options, pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent sees it, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(options.threads)

    def tell(*message):
        what, *_, last = message
        if what != "busy" and not (what == "finished" and last):  # that is others' to tell
            pipe.send(message)

    for pair in pairs:
        attempt(do, pair, options, tell)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)  # which cleans up
