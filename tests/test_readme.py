"""What the README and the guide show runs: run, sweep, copy, a loop of one's own, a meter."""

import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from data import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def python(*command, cwd=ROOT):
    result = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def shown(command, cwd, *more):
    """Run a command that the README shows, word for word but for where the script is."""
    assert re.search(rf"(^    |&& )python {re.escape(command)}( {{2,}}|$)", README, re.M), command
    script, *options = command.split()
    return python(ROOT / script, *options, *more, cwd=cwd)


def block(section, text=README):
    return re.search(r"```python\n(.*?)```", text.split(f"## {section}\n")[1], re.S)[1]


def test_run_the_main_command_names_the_regime(tmp_path):
    out = shown("train.py --elr 0.01", tmp_path)
    assert out.startswith("elr 1e-02: chaotic equilibrium: ")
    assert out.endswith("logs/digits-convnet/regimes.png\nnext: python train.py --angle 0.05\n")


def test_sweep_several_elrs_make_a_table_which_the_logs_alone_make_again(tmp_path):
    out = shown("train.py --elr 1e-3 1e-2 1e-1", tmp_path, "--epochs", "12")
    table = shown("regimes.py logs/digits-convnet", tmp_path)
    assert re.findall(r"^ +(\S+)  (convergence|chaotic equilibrium|divergence)", table, re.M) == [
        ("1e-03", "convergence"),
        ("1e-02", "chaotic equilibrium"),
        ("1e-01", "divergence"),
    ]
    assert "convergence | chaotic equilibrium: 0.001 to 0.01 (×10)" in table and table in out
    assert shown("figures.py logs/digits-convnet", tmp_path).startswith("written: ")


def test_a_network_and_data_of_ones_own_are_trained_to_named_regimes(tmp_path):
    code = README.split("    # mine.py\n")[1].split("\n\n")[0]
    (tmp_path / "mine.py").write_text(code.replace("\n    ", "\n").removeprefix("    ") + "\n")
    python("mine.py", cwd=tmp_path)
    out = shown("train.py --model mine.py:mlp --data mine.npz --elr 1e-3 1e-2", tmp_path)
    assert "elr 1e-03: convergence: " in out and "elr 1e-02: chaotic equilibrium: " in out
    assert "0.weight + 0.bias" in out  # the sphere that was found


def test_copy_the_one_file_trains_a_network_of_ones_own_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "sphere_step.py", tmp_path)
    before = """
import torch
layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
net = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2))
loss = torch.nn.functional.cross_entropy(net(torch.randn(8, 1, 3, 3)), torch.arange(8) % 2)
norm, head = net[0].weight.norm().item(), net[3].weight.clone()
"""
    after = """
print(abs(net[0].weight.norm().item() / norm - 1) < 1e-6, (net[3].weight != head).any().item())
print(sorted(optimizer.stats()), sorted(optimizer.layer_stats()))
"""
    out = python("-c", before + block("Copy `sphere_step.py`") + after, cwd=tmp_path)
    said = ["angle", "elr", "grad_norm", "radial", "radius"], ["angle", "elr", "grad_norm", "norm"]
    assert out == f"True True\n{said[0]} {said[1]}\n"
    assert len(python("sphere_step.py", cwd=tmp_path).splitlines()) == 2


def test_a_folder_of_images_becomes_a_file_of_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, kind in product(("train", "test"), ("cat", "dog")):
        folder = tmp_path / "pets" / part / kind
        folder.mkdir(parents=True)
        for i, size in enumerate(((20, 24), (40, 32))):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{i}.png")
    exec(block("Files", GUIDE), {})
    data = load("pets.npz")
    assert data.x.shape == data.test_x.shape == (4, 3, 32, 32) and data.y.tolist() == [0, 0, 1, 1]


def test_a_loop_of_ones_own_ends_with_a_regime():
    code = block("A loop of your own", GUIDE)
    assert python("-c", code).startswith("chaotic equilibrium: ")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_six_lines_are_a_meter_for_a_loop_with_another_optimizer(tmp_path):
    lines = block("A meter for any training").rstrip().splitlines()
    assert len(lines) == 6
    code = """
import torch
from data import batches, load
from models import convnet
from sphere_step import SphereSGD
from torch.nn.functional import normalize
torch.manual_seed(0)
data, order, net = load("digits"), torch.Generator().manual_seed(0), convnet(1, 10, 4)
weights = [p for p in net.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=1e-3)
print("epoch,step,train_loss,grad_norm,angle")
for epoch in range(1, 11):
    steps = 0
    {first}
    for index in batches(len(data.x), 64, order):
        loss = torch.nn.functional.cross_entropy(net(data.inputs(index)), data.y[index])
        optimizer.zero_grad()
        loss.backward()
        {rest}
        steps += 1
    print(epoch, epoch * steps, *(sums / steps).tolist(), sep=",")
"""
    rest = "\n        ".join(lines[1:])
    (tmp_path / "my.csv").write_text(python("-c", code.format(first=lines[0], rest=rest)))
    rows = (tmp_path / "my.csv").read_text().splitlines()
    assert all(0 < float(row.split(",")[4]) < 0.3 for row in rows[1:])
    assert python("regimes.py", str(tmp_path / "my.csv")).startswith("my: ")


def test_every_option_of_the_command_line_is_in_the_guide():
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", python("train.py", "--help"))) - {"--help"}
    assert len(options) > 30 and all(f"`{option}" in GUIDE for option in options), options
