"""What the README and the guide show runs: run, sweep, copy, a loop of one's own, a meter."""

import re
import runpy
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from PIL import Image

import regimes
import train
from lab import measure, options
from lab.data import batches, load
from models import convnet

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train.main, "regimes.py": regimes.main}


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "POINTS", 64)

    def run(command, *more):
        shown = rf"(^    |&& )python {re.escape(command)}( {{2,}}|$)"
        assert re.search(shown, README, re.M), command
        script, *argv = shlex.split(command)
        assert not SCRIPTS[script]([*argv, *more])
        return capsys.readouterr().out

    return run


def block(section, text=README):
    return re.search(r"```python\n(.*?)```", text.split(f"## {section}\n")[1], re.S)[1]


def test_the_commands_and_the_logs_alone_name_the_same_regime(shown):
    out = shown("train.py --elr 0.01", "--jobs", "1")
    assert re.search("^elr 1e-02: chaotic equilibrium: error ", out, re.M)
    assert "\nwritten: logs/digits-convnet/regimes.csv, logs/digits-convnet/regimes.png\n" in out
    out = shown("train.py --elr 1e-3 1e-2 1e-1", "--epochs", "1", "--jobs", "1")  # two new ones
    table = shown("regimes.py logs/digits-convnet")
    assert table in out
    found = re.findall(r"^ +(\S+)  (undecided|chaotic equilibrium) +1/1 ", table, re.M)
    names = "undecided", "chaotic equilibrium", "undecided"
    assert found == list(zip(("1e-03", "1e-02", "1e-01"), names, strict=True))


def test_a_network_and_data_of_ones_own_have_regimes(shown):
    code = README.split("    # mine.py\n")[1].split("\n\n")[0]
    Path("mine.py").write_text(code.replace("\n    ", "\n").removeprefix("    ") + "\n")
    runpy.run_path("mine.py", run_name="__main__")
    out = shown("train.py --model mine.py:mlp --data mine.npz --elr 1e-3 1e-2", "--jobs", "1")
    assert "elr 1e-03: convergence: " in out and "elr 1e-02: chaotic equilibrium: " in out
    assert "0.weight + 0.bias" in out  # the sphere that was found


def test_sphere_step_as_shown_keeps_the_norm_and_moves_the_rest():
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
    net = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2))
    loss = F.cross_entropy(net(torch.randn(8, 1, 3, 3)), torch.arange(8) % 2)
    filters, head = net[0].weight.detach().clone(), net[3].weight.detach().clone()
    names = {"net": net, "loss": loss}
    exec(block("Copy `sphere_step.py`"), names)
    assert net[0].weight.norm().item() == pytest.approx(filters.norm().item(), rel=1e-6)
    assert (net[0].weight != filters).any() and (net[3].weight != head).any()
    promised = re.search(r"# per sphere: (.*); layer_stats", README)[1].replace(",", " ").split()
    assert set(names["optimizer"].stats()) == set(promised) - {"γ", "φ"}
    assert len(names["optimizer"].layer_stats()["norm"]) == 1


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


def test_a_loop_of_ones_own_ends_with_a_regime(capsys):
    code = block("A loop of your own", GUIDE)
    exec(code, {})
    assert capsys.readouterr().out.startswith("chaotic equilibrium: ")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_one_line_is_a_meter_for_another_optimizer(tmp_path, capsys):
    begin, end = block("A meter for any training").split("...  # train as always\n")
    torch.manual_seed(0)
    data, order, net = load("digits"), torch.Generator().manual_seed(0), convnet(1, 10, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    names, rows = {"net": net, "optimizer": optimizer}, []
    exec(begin, names)
    for epoch in range(1, 11):
        for index in batches(len(data.x), 128, order):
            loss = F.cross_entropy(net(data.inputs(index)), data.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        names |= {"epoch": epoch, "loss": loss.item()}
        exec(end, names)
        rows.append(names["row"])
        assert rows[-1]["step"] == 11 * epoch and 0 < rows[-1]["angle"] < 0.3
    regimes.write_csv(tmp_path / "my.csv", rows)
    assert not regimes.main([str(tmp_path / "my.csv")])
    out = capsys.readouterr().out
    assert out.startswith("my: ") and "no angle" not in out


def test_every_option_of_the_command_line_is_in_the_guide():
    names = set(re.findall(r"(?<![\w-])--[a-z-]+", options.parser().format_help())) - {"--help"}
    assert len(names) > 30
    assert [name for name in sorted(names) if f"`{name}" not in GUIDE] == []
