"""A folder of runs on disk: config.json, and per run its rows (`elr=1e-02.csv`, `.layers.csv`), checkpoint (`.pt`) and lock.

Files are replaced whole or not at all, rows are whole or absent, and a lock that the operating system releases when its process
dies keeps a second process out of a run.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten

OURS = [f"{run}.{end}" for run in ("elr=*", "lr=*") for end in ("csv", "pt", "lock")]
OURS += ["config.json", "regimes.csv", "regimes.png", "summary.csv"]


class Busy(Exception):
    """The run is in progress in another process."""


def open_folder(out: Path, options: dict, force: bool = False) -> dict:
    """Make the folder, or find that it holds runs of these very options; returns its config, {"options": options} if new.

    With `force` what was there of ours is removed. Raises ValueError, having changed nothing, where the folder cannot be
    written, its runs have other options, whose name it says, or with `force` where one of them is in progress.
    """
    path = out / "config.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = _temporary(out / "probe")
        probe.touch()
        probe.unlink()
        _remove_leftovers(out)
        if force:
            for held in out.glob("*.lock"):
                with lock(held):
                    pass
            for old in (p for pattern in OURS for p in out.glob(pattern)):
                old.unlink()
        if not path.exists():
            return {"options": options}
        config = json.loads(path.read_text(encoding="utf-8"))
        there = config["options"]
        different = [k for k in {**options, **there} if there.get(k) != options.get(k)]
    except Busy as busy:
        raise ValueError(f"{busy}: wait for it, or choose another --out") from None
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: choose another --out, or start afresh with --force") from None
    if different:
        what = f"{different[0]} is {there.get(different[0])!r} there, {options.get(different[0])!r} here"
        raise ValueError(f"{out} holds runs with other options ({what}): choose another --out, or start afresh with --force")
    return config


def write_config(out: Path, config: dict) -> None:
    write_whole(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def save_checkpoint(path: Path, identity: dict, state: dict) -> None:
    """The state (tensors, numbers, strings, lists and dicts of them), with whose it is and a checksum of all."""
    state = {**state, "identity": identity}
    file = io.BytesIO()
    torch.save({**state, "checksum": _checksum(state)}, file)
    write_whole(path, file.getbuffer())


def load_checkpoint(path: Path, identity: dict | None, device: str) -> dict | None:
    """The last checkpoint of a run, None if there is none. Raises ValueError where it is damaged or not of this very run;
    without `identity` whose it is does not matter."""
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location=device, weights_only=True)
        checksum, there = state["checksum"], dict(state["identity"])
        if checksum != _checksum({key: x for key, x in state.items() if key != "checksum"}):
            raise ValueError
    except Exception:  # a damaged file can fail anywhere in the reading of it
        raise ValueError(f"{path} is damaged, or no checkpoint of train.py: remove it, and this run starts again") from None
    for key in {**identity, **there} if identity is not None else ():
        if identity.get(key) != there.get(key):
            what = f"{key} is {there.get(key)!r} there, {identity.get(key)!r} here"
            raise ValueError(f"{path} is the checkpoint of another run ({what}): remove it, and this run starts again")
    return state


def _checksum(state: dict) -> str:
    leaves, structure = tree_flatten(state)
    sha = hashlib.sha256(repr(structure).encode())
    for x in leaves:
        if isinstance(x, torch.Tensor):
            sha.update(repr((x.dtype, tuple(x.shape))).encode())
            sha.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            sha.update(repr(x).encode())
    return sha.hexdigest()


def random_state(device: str) -> list[torch.Tensor]:
    """The states of torch's own random numbers, of the CPU and of a GPU, for a checkpoint."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if "cuda" in device else [])]


def set_random_state(device: str, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0].cpu())
    if "cuda" in device:
        torch.cuda.set_rng_state(state[1].cpu(), device)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def _remove_leftovers(out: Path) -> None:
    """The temporary files of processes of this machine that have died."""
    for path in out.glob(f"*.{socket.gethostname()}-*.tmp"):
        pid = path.name.removesuffix(".tmp").rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            pass


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed."""
    temporary = _temporary(path)
    file = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
    try:
        try:
            _write(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(file: int, content: bytes) -> None:
    if os.write(file, content) < len(content):  # a disk that fills up in the middle does not say so at once
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def lock(path: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a run. Raises Busy, which says who holds it, where another process does; with `wait` it is called, which
    may sleep or raise, until the lock is free."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:  # else its holder has just removed it
                break
        except BlockingIOError:
            if wait is None:
                holder = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                raise Busy(f"{path.name.removesuffix('.lock')} is in progress: {holder} holds {path}") from None
            wait()
        os.close(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


class Rows:
    """A CSV file that grows by whole rows. Floats are kept to 9 digits (float32).

    Where a run is resumed, the rows up to epoch `upto` are kept and what comes after them is dropped. Raises ValueError where
    rows up to there are missing.
    """

    def __init__(self, path: Path, columns: list[str], upto: int = -1):
        lines = []
        if upto >= 0:
            try:
                lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if line[-1] == "\n"]
                lines = [line for line in lines if int(line.split(",")[0]) <= upto]
                if {int(line.split(",")[0]) for line in lines} != set(range(upto + 1)):
                    raise ValueError
            except (ValueError, FileNotFoundError):
                checkpoint = path.name.removesuffix(".csv").removesuffix(".layers") + ".pt"
                raise ValueError(f"{path} lacks rows or is damaged: remove {checkpoint}, and this run starts again") from None
        write_whole(path, "".join([",".join(columns) + "\n", *lines]).encode())
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, *rows) -> None:
        text = io.StringIO()
        cells = [[f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
        csv.writer(text, lineterminator="\n").writerows(cells)
        size = os.fstat(self.file).st_size
        try:
            _write(self.file, text.getvalue().encode())
        except OSError:
            os.ftruncate(self.file, size)
            raise

    def close(self) -> None:
        os.close(self.file)
