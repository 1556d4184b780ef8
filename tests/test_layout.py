"""The house: what lies at the top, which script imports which of ours, and that those that are meant
to be copied work alone."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT, end_of, fork

FOUR = ("models.py", "regimes.py", "sphere_step.py", "train.py")
FILES = {name[:-3]: ROOT / name for name in FOUR}
FILES |= {path.stem: path for path in (ROOT / "lab").glob("[!_]*.py")}
OURS = set(FILES)
BELOW = {"data", "machine", "measure", "models", "own", "regimes", "runs"}
IMPORTS = {
    "train": OURS - {"toy", "landscape", "bench"},
    "sphere_step": set(),
    "models": set(),
    "regimes": {"loop"},  # read when it is there
    "loop": {"regimes"},
    "options": {"contents", "data", "machine", "models", "regimes", "runs", "schedules"},
    "experiment": BELOW | {"contents", "groups", "loop", "options"},
    "jobs": {"runs"},
    "data": {"own_data"},
    "own_data": set(),
    "invariance": set(),
    "own": {"models", "invariance", "contents"},
    "groups": {"data", "invariance", "machine", "measure", "own", "sphere_step"},
    "measure": {"data", "sphere_step"},
    "contents": set(),
    "schedules": set(),
    "runs": {"regimes", "contents", "loop"},
    "figures": {"regimes", "loop", "style"},
    "style": {"regimes"},
    "machine": set(),
    "toy": {"regimes", "figures"},
    "curvature": {"data", "measure"},
    "landscape": BELOW | {"curvature", "figures", "contents"},
    "kernels": {"sphere_step"},
    "bench": OURS,
}
TOP = """CHANGELOG.md CONTRIBUTING.md LICENSE README.md benchmarks data docs lab models.py
    pyproject.toml regimes.py requirements.txt sphere_step.py tests train.py""".split()


def test_at_the_top_lie_four_scripts():
    assert all((ROOT / name).exists() for name in FOUR)
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
        assert sorted(name for name in top if name[0] != ".") == sorted(TOP)


def test_no_two_constants_have_one_name():
    """In a script the second would silently be the first one's value, too."""
    found = []
    for path in FILES.values():
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign):
                found += [node.id for node in ast.walk(statement) if is_new_constant(node)]
    twice = {name for name, n in Counter(found).items() if n > 1}
    assert "PIECE" in found and not twice, twice


def is_new_constant(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper()


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_script_imports_only_those_below_it(name):
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lab":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.rpartition(".")[2])
    assert found & OURS <= IMPORTS[name]


def alone(tmp_path, file, code):
    """Run code in an empty folder that holds a copy of this file and nothing else of ours, in a
    child that has torch but none of our modules."""
    shutil.copy(ROOT / file, tmp_path)

    def function():
        for name in list(sys.modules):
            if name.partition(".")[0] in {*OURS, "lab"}:
                del sys.modules[name]
        others = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
        sys.path[:] = [str(tmp_path), *others]
        os.chdir(tmp_path)
        exec(code, {})

    status, output = end_of(fork(function))
    assert status == 0, output
    return output


def test_a_copied_sphere_step_trains(tmp_path):
    code = """
import torch
from sphere_step import SphereSGD
torch.manual_seed(0)
x = torch.randn(256, 20)
y = (x[:, 0] * x[:, 1] > 0).long()
first, norm = torch.nn.Linear(20, 64, bias=False), torch.nn.BatchNorm1d(64)
net = torch.nn.Sequential(first, norm, torch.nn.ReLU(), torch.nn.Linear(64, 2))
first, *rest = net.parameters()
optimizer = SphereSGD([{"params": [first]}, {"params": rest, "sphere": None, "lr": 0.1}], lr=0.01)
norm = first.norm().item()
for _ in range(300):
    loss = torch.nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad(), loss.backward(), optimizer.step()
assert loss.item() < 0.1 and abs(first.norm().item() / norm - 1) < 1e-6
assert optimizer.stats()["grad_norm"].item() > 0
"""
    alone(tmp_path, "sphere_step.py", code)


def test_a_copied_invariance_finds_the_sets(tmp_path):
    code = """
import torch
from invariance import scale_invariant_groups
net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
print(scale_invariant_groups(net, torch.randn(4, 5)))
"""
    assert alone(tmp_path, "lab/invariance.py", code) == "[['0.weight', '0.bias']]\n"


def test_a_copied_regimes_names_the_regime(tmp_path):
    rows = [f"{epoch},{3 / (1 + epoch) ** 1.5}" for epoch in range(31)]
    (tmp_path / "mine.csv").write_text("epoch,train_loss\n" + "\n".join(rows) + "\n")
    out = alone(tmp_path, "regimes.py", "import regimes; regimes.main(['mine.csv'])")
    assert out.startswith("mine: convergence: ")


@pytest.mark.parametrize("script", ["optimizers", "loops", "draw"])
def test_a_script_of_docs_begins(script):
    def function():
        sys.argv = [script, "--help"]
        runpy.run_path(str(ROOT / "docs" / f"{script}.py"), run_name="__main__")

    status, output = end_of(fork(function))
    assert status == 0 and output.startswith("usage: "), output
