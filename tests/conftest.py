"""One thread per process: pytest-xdist runs the tests on all cores, and our networks are small."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


@pytest.fixture(autouse=True, scope="session")
def few_points():
    """Random points enough for what the tests ask of chance."""
    from lab import measure  # not above: pytest-xdist's first process needs no torch

    measure.POINTS = 64


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=2, help="test_faults.py: how often to kill a sweep"
    )


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "in_the_interpreter" not in item.name)  # the longest first


@pytest.fixture(autouse=True)
def one_thread():
    """What a test has set is not left to the next: threads that wait take a core."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def begun_as_train_py(monkeypatch):
    """`next:` names the script as it was begun."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch):
    """Drawing takes longer than most runs of the tests: those that look at pictures ask for it."""
    if "draws" in request.keywords:
        return
    from lab import figures

    monkeypatch.setattr(figures, "of_sweep", lambda runs, path, name="": path.write_bytes(b"PNG"))
