"""docs/optimizers.py: which runs the search for the best values of a kind takes."""

import importlib.util
import math

import pytest
from helpers import ROOT, refused

spec = importlib.util.spec_from_file_location("optimizers", ROOT / "docs" / "optimizers.py")
optimizers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(optimizers)

ROUNDS = """task; kind; by round, values that are left and their seeds
digits, convnet; elr; 6 x 1, 6 x 3, 4 x 16
digits, convnet; adamw; 28 x 1, 10 x 3, 4 x 16
digits, convnet; angle, layer; 5 x 16
few digits, resnet18; adamw; 28 x 1, 5 x 2, 2 x 8
modular 31; adamw; 28 x 1, 4 x 2, 1 x 8
modular 31; angle; 5 x 8
modular 31; angle, layer; 5 x 1, 4 x 2, 1 x 8"""


def error(job):
    """The first seed takes another value for the best than the mean over more does."""
    shift = 0.3 if job.seed == 0 else -0.2
    return abs(math.log10(job.value) + 2 - shift) + 0.1 * job.decay


@pytest.mark.parametrize("case", ROUNDS.splitlines()[1:])
def test_each_round_of_the_search_leaves_the_best_values_and_gives_them_more_seeds(case):
    task, kind, rounds = case.split("; ")
    seeds, errors, left = optimizers.seeds_of(task, 16), {}, None
    for number in rounds.split(", "):
        most, of_each = map(int, number.split(" x "))
        jobs = optimizers.wanted(errors, task, kind, seeds)
        found = {job[2:4] for job in jobs}
        assert len(jobs) == len(set(jobs)) == most * of_each and len(found) == most
        assert {job.seed for job in jobs} == set(range(of_each))
        assert left is None or found == set(sorted(left, key=left.get)[:most])
        errors |= {job: error(job) for job in jobs}
        mean = {value: [errors[job] for job in jobs if job[2:4] == value] for value in found}
        left = {value: sum(of) / len(of) for value, of in mean.items()}
    assert set(optimizers.wanted(errors, task, kind, seeds)) <= set(errors)


def test_no_seeds_are_one_line(capsys, tmp_path):
    for option in ("--seeds 0", "--jobs 0"):
        error = refused(capsys, f"{option} --out {tmp_path}/new.csv", main=optimizers.main)
        assert f"argument {option[:-2]}: " in error and "whole number from 1" in error
    assert not any(tmp_path.iterdir())
