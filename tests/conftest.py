"""One thread per process: pytest-xdist runs the tests on all cores, and our networks are small."""

import os
import random
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=2, help="test_faults.py: how often to kill a sweep"
    )


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "in_the_interpreter" not in item.name)  # the longest first


@pytest.fixture(autouse=True, scope="session")
def quick():
    """What takes longest of the smallest runs: chance, and the picture."""
    from lab import figures, measure  # not above: pytest-xdist's first process needs no torch

    measure.POINTS = 16
    of_sweep, figures.of_sweep = figures.of_sweep, lambda runs, path: path.write_bytes(b"PNG")
    sys.argv = ["train.py"]  # `next:` names the script as it was begun
    return of_sweep


@pytest.fixture
def rng():
    """Fresh numbers in each run; a failure shows the seed that brings them back."""
    import numpy

    seed = int(os.environ.get("SEED", random.randrange(2**31)))
    print(f"SEED={seed}")
    return numpy.random.default_rng(seed)


@pytest.fixture(autouse=True)
def as_it_was(request, quick, monkeypatch):
    """Those that look at pictures ask for them. What a test has set is not left to the next:
    threads that wait take a core."""
    if "draws" in request.keywords:
        monkeypatch.setattr("lab.figures.of_sweep", quick)
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
