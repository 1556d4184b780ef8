"""Test errors of AdamW, and of SGD with momentum, on the tasks of the README: the same networks,
data, batches and epochs as train.py. Writes benchmarks/optimizers-….csv.

    python docs/optimizers.py 3          three seeds; a task's name after it: that task alone
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import measure  # noqa: E402
import regimes  # noqa: E402
import train  # noqa: E402
from options import parse  # noqa: E402

TASKS = {
    "digits, convnet": ["--data", "digits"],
    "digits, resnet18": ["--data", "digits", "--model", "resnet18"],
    "digits, half wrong": ["--data", "digits", "--label-noise", "0.5"],
    "digits, MLP": ["--data", "digits", "--model", f"{__file__}:mlp"],
    "modular 31": ["--data", "modular"],
}
RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}


def mlp(example: Tensor, classes: int) -> nn.Module:
    """A network of one's own, with LayerNorm."""
    n = example.numel()
    layers = [nn.Flatten(), nn.Linear(n, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128)]
    return nn.Sequential(*layers, nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, classes))


def optimizers(seeds: int, tasks: list[str]) -> None:
    """Test error after the task's epochs of AdamW and of SGD with momentum 0.9, weight decay and a
    cosine, over learning rates; the same networks, data, batches and epochs as train.py."""
    found = []
    for task, options in TASKS.items():
        if tasks and task not in tasks:
            continue
        for kind, rates in RATES.items():
            for lr in rates:
                values = [train_with(options, kind, lr, seed) for seed in range(seeds)]
                for seed, x in enumerate(values):
                    row = {"task": task, "optimizer": kind, "lr": lr, "seed": seed, "test_error": x}
                    found.append(row | {"machine": bench.machine(), "torch": torch.__version__})
                error = statistics.median(values)
                print(f"{task:20}{kind:8}{lr:8g}  {error:.4f}", flush=True)
    name = "optimizers-" + bench.machine().replace(" ", "-")
    regimes.write_csv(ROOT / "benchmarks" / f"{name}.csv", found)


def train_with(options: list[str], kind: str, lr: float, seed: int) -> float:
    with tempfile.TemporaryDirectory() as out:
        parsed, data = parse([*options, "--elr", "1", "--seed", str(seed), "--out", out])
        run = train.Run(parsed, data, train.Job(1.0, seed, Path(), ""))
    params = [p for p in run.net.parameters() if p.requires_grad]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, parsed.epochs)
    run.net.train()
    for _ in range(parsed.epochs):
        for index in train.batches(len(data.x), parsed.batch_size, run.order):
            optimizer.zero_grad()
            F.cross_entropy(run.net(data.inputs(index)), data.y[index]).backward()
            optimizer.step()
        scheduler.step()
    return measure.on_test_set(run.net, data, "fp32")["test_error"]


if __name__ == "__main__":
    optimizers(int(sys.argv[1]), sys.argv[2:])
