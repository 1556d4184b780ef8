"""A folder of runs on disk: config.json, and per run its rows (`elr=1e-02.csv`, `.layers.csv`) and checkpoint (`.pt`)."""

import csv
import json
import os
from pathlib import Path

import torch

OURS = ("config.json", "regimes.csv", "regimes.png", "summary.csv", "elr=*.csv", "elr=*.pt", "lr=*.csv", "lr=*.pt", "*.tmp")


def open_folder(out: Path, options: dict, force: bool = False) -> dict:
    """Make the folder, or find that it holds runs of these very options; returns its config, {"options": options} if new.

    With `force` what was there of ours is removed. Raises ValueError, having changed nothing, where the folder cannot be
    written or its runs have other options, whose name it says.
    """
    path = out / "config.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / "probe.tmp"
        probe.touch()
        probe.unlink()
        if force:
            for old in (p for pattern in OURS for p in out.glob(pattern)):
                old.unlink()
        if not path.exists():
            return {"options": options}
        config = json.loads(path.read_text(encoding="utf-8"))
        there = config["options"]
        different = [k for k in {**options, **there} if there.get(k) != options.get(k)]
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: choose another --out, or start afresh with --force") from None
    if different:
        what = f"{different[0]} is {there.get(different[0])!r} there, {options.get(different[0])!r} here"
        raise ValueError(f"{out} holds runs with other options ({what}): choose another --out, or start afresh with --force")
    return config


def write_config(out: Path, config: dict) -> None:
    _replace(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def save_checkpoint(path: Path, state: dict) -> None:
    _replace(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, device: str) -> dict | None:
    """The last checkpoint of a run, None if there is none. Raises ValueError if it cannot be read."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception:
        raise ValueError(f"{path} is damaged: remove it, and this run starts again") from None


def _replace(path: Path, write) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Rows:
    """A CSV file that grows by whole rows, each written and flushed at once. Floats are kept to 9 digits (float32).

    Where a run is resumed, the rows up to epoch `upto` that are there already are kept, and what comes after them is dropped.
    """

    def __init__(self, path: Path, columns: list[str], upto: int = -1):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if upto >= 0 else []
        lines = [",".join(columns) + "\n", *(line for line in lines if line[-1] == "\n" and int(line.split(",")[0]) <= upto)]
        _replace(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
        self.file = open(path, "a", newline="", encoding="utf-8")

    def add(self, *rows) -> None:
        text = [[f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
        csv.writer(self.file, lineterminator="\n").writerows(text)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
