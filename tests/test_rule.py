"""The rule on logs of an SGD that is not ours: scale-invariant MLPs on the sphere, in plain torch, many
runs at once. What a run is, four times its length and another seed say."""

import math
import os
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regimes import classify

SLOW = "SLOW" in os.environ
KINDS = "blobs teacher noisy overlap unequal coin augmented parity modular".split()
CUTS = (8, 10, 12, 16, 20, 30, 40, 80) if SLOW else (10, 20)
COLUMNS = ("train_loss", "train_error", "grad_norm", "angle")


def data(kind, n, d, classes, g):
    """x [n, d], y [n], and the deviation of noise that is added to an input whenever it is seen."""
    x, y, fresh = torch.randn(n, d, generator=g), torch.randint(classes, (n,), generator=g), 0.0
    centres = F.normalize(torch.randn(classes, d, generator=g))
    if kind in ("blobs", "overlap", "augmented"):
        apart, fresh = {"blobs": (4, 0), "overlap": (1.5, 0.5), "augmented": (3, 1)}[kind]
        x = x + apart * centres[y]
    elif kind in ("teacher", "noisy"):
        hidden, out = torch.randn(d, 16, generator=g), torch.randn(16, classes, generator=g)
        y = (torch.tanh(x @ hidden) @ out).argmax(1)
        if kind == "noisy":
            wrong = torch.rand(n, generator=g) < 0.1 + 0.5 * torch.rand(1, generator=g)
            y = torch.where(wrong, torch.randint(classes, (n,), generator=g), y)
    elif kind == "unequal":
        y = (classes * torch.rand(n, generator=g) ** 4).long()
        x = x + 3 * centres[y]
    elif kind == "coin":  # labels that the inputs do not tell
        y, fresh = (torch.rand(n, generator=g) < 0.03).long(), 1.0
    elif kind == "parity":
        x = x.sign()
        y = ((x[:, :2].prod(1) > 0) + 2 * (x[:, 2:4].prod(1) > 0).long()) % classes
    else:  # modular addition, which plateaus
        a, b = torch.randint(d // 2, (2, n), generator=g)
        x = torch.cat([F.one_hot(a, d // 2), F.one_hot(b, d // 2)], 1) * math.sqrt(d / 4)
        y = (a + b) % classes
    return x, y, fresh


def network(weights, head, x, over, act):
    for w in weights:
        x = x @ w.transpose(1, 2)
        x = x - x.mean(over, keepdim=True)
        x = act(x * ((x * x).mean(over, keepdim=True) + 1e-8).rsqrt())
    return x @ head.transpose(1, 2)


def train(seed, epochs):
    """Runs of one shape: four kinds of data, eight ELRs over the three regimes, two seeds. Returns
    per run [columns, epochs + 1], its kind, and chance; and the steps per epoch."""
    g, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    classes, d, width = (int(draw.choice(x)) for x in ((2, 4, 8), (12, 16), (8, 16)))
    batch, steps, depth = (int(draw.choice(x)) for x in ((4, 8, 16), (8, 12, 16), (1, 2, 2)))
    over, act = int(draw.integers(1, 3)), (torch.relu, torch.tanh)[draw.integers(2)]
    size, beta = float(draw.choice([5, 10, 20])), float(draw.choice([0, 0, 0.9]))
    elrs = 10 ** draw.uniform(-4.5, -3.5) * np.geomspace(1, 5000, 8)
    runs = list(product(draw.choice(KINDS, 4, replace=False), elrs, range(2)))
    n, many = batch * steps, len(runs)
    sets = {kind: data(kind, n, d, classes, g) for kind in dict.fromkeys(kind for kind, *_ in runs)}
    x, y = (torch.stack([sets[kind][i] for kind, *_ in runs]) for i in range(2))
    fresh = torch.tensor([sets[kind][2] for kind, *_ in runs])[:, None, None]
    elr = torch.tensor([elr for _, elr, _ in runs]).float()[:, None]
    shapes = [(width, d)] + [(width, width)] * (depth - 1)
    head = F.normalize(torch.randn(many, classes * width, generator=g)) * size
    start = [torch.randn(many, a * b, generator=g) / math.sqrt(b) for a, b in shapes]
    theta = torch.cat(start, 1)
    rho, m = theta.norm(dim=1, keepdim=True), torch.zeros_like(theta)

    def measure(theta, index):
        inputs = x.gather(1, index[:, :, None].expand(-1, -1, d))
        inputs = inputs + fresh * torch.randn(inputs.shape, generator=g)
        labels, parts = y.gather(1, index), theta.split([a * b for a, b in shapes], 1)
        weights = [part.view(many, *shape) for part, shape in zip(parts, shapes, strict=True)]
        logits = network(weights, head.view(many, classes, width), inputs, over, act)
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
        return loss, (logits.argmax(2) != labels).float().mean(1)

    points = []
    with torch.no_grad():
        for _ in range(32):
            point = rho * F.normalize(torch.randn(theta.shape, generator=g))
            points.append(torch.stack(measure(point, torch.randint(n, (many, batch), generator=g))))
    points = torch.stack(points).view(32, 2, 4, 16).permute(2, 1, 0, 3).reshape(4, 2, -1).double()
    rows = torch.zeros(epochs + 1, 4, many)
    for epoch in range(epochs + 1):
        for index in torch.rand(many, n, generator=g).argsort(1).split(batch, 1):
            theta.requires_grad_()
            loss, error = measure(theta, index)
            (grad,) = torch.autograd.grad(loss.sum(), theta)
            theta = theta.detach()
            m = beta * m * (epoch > 0) + grad
            m = m - (m * theta).sum(1, keepdim=True) / rho**2 * theta
            gamma = (
                rho
                * (grad - (grad * theta).sum(1, keepdim=True) / rho**2 * theta).norm(dim=1)[:, None]
            )
            angle = (elr * rho * m.norm(dim=1, keepdim=True)).atan()
            if epoch:
                theta = rho * F.normalize(theta - elr * rho**2 * m)
            rows[epoch] += torch.stack([loss.detach(), error, gamma[:, 0], angle[:, 0]]) / steps
    found = []
    for i, (kind, *_) in enumerate(runs):
        loss, error = points[i // 16]
        chance = {
            "points": loss.numel(),
            "train_loss": {"mean": loss.mean().item(), "std": loss.std().item()},
        }
        chance["train_error"] = {"mean": error.mean().item(), "std": error.std().item()}
        share = torch.bincount(sets[kind][1]).max().item() / n
        chance["constant"] = {"train_error": 1 - share}
        found.append((rows[:, :, i].T.double().numpy(), kind, chance))
    return found, steps


def truth(run, mate, chance, steps, cut):
    """What a run is after `cut` epochs. Falling: lower by a quarter at four times the length, so
    with another seed. Equilibrium: the level is the same at twice, three and four times the length
    and with another seed, the run has forgotten where it was, and is better than chance."""
    loss, error, _, angle = run
    both = (loss + mate[0]) / 2

    def mean(values, begin, end):
        return values[int(begin * cut) + 1 : int(end * cut) + 1].mean()

    now, later = mean(loss, 0.75, 1), mean(loss, 3, 4)
    if now < 0.003 * chance["train_loss"]["mean"]:
        return "negligible"
    lower = mean(both, 3, 4) < 0.75 * mean(both, 0.75, 1)
    if lower and max(later, mean(loss, 3.75, 4)) < 0.75 * now:
        return "falling"
    by_chance = min(chance["train_error"]["mean"], chance["constant"]["train_error"])
    skill, better = 1 - later / chance["train_loss"]["mean"], by_chance - mean(error, 3, 4)
    turn = mean(angle, 2, 4) * math.sqrt(2 * cut * steps)
    if turn < 2:
        return "still"
    if skill < 0.07 and better < 0.02:
        return "divergence"
    others = [now, mean(loss, 2, 3), mean(loss, 3.75, 4), mean(mate[0], 3, 4)]
    level = all(abs(other / later - 1) < 0.1 for other in others)
    if level and skill > 0.15:
        return "equilibrium"
    return "between"


@pytest.fixture(scope="module")
def found():
    """(whether with all columns, truth, cut) → how often which name. Seeds are printed."""
    first = int(os.environ.get("SEED", 0))
    seeds = range(first, first + (32 if SLOW else 2))
    print(f"\nSEED={first}, {len(seeds)} shapes of 64 runs")
    torch.set_num_threads(1)
    counts = {}
    for seed in seeds:
        runs, steps = train(seed, 4 * CUTS[-1])
        for i, (rows, _, chance) in enumerate(runs):
            for cut in CUTS:
                what = truth(rows, runs[i ^ 1][0], chance, steps, cut)
                epoch = np.arange(cut + 1.0)
                log = dict(zip(COLUMNS, rows[:, : cut + 1], strict=True))
                log |= {"epoch": epoch, "step": steps * epoch}
                alone = {"epoch": epoch[1:], "train_loss": rows[0, 1 : cut + 1]}
                loss = {name: chance[name] for name in ("points", "train_loss")}
                for whole, name in (
                    (True, classify(log, chance).regime),
                    (False, classify(alone, loss).regime),
                ):
                    counts.setdefault((whole, what, cut), Counter())[name] += 1
    return counts


def share(found, whole, what, names, cuts=CUTS):
    """How many of `what`, and the share of them with one of these names, in percent by cut."""
    of = {cut: found.get((whole, what, cut), Counter()) for cut in cuts}
    total = sum(sum(names_of.values()) for names_of in of.values())
    named = sum(of[cut][name] for cut in cuts for name in names)
    by_cut = [100 * sum(c[name] for name in names) / max(sum(c.values()), 1) for c in of.values()]
    print(
        f"{'all' if whole else 'loss'}: {what} named {', '.join(names)}: "
        + ", ".join(f"{cut}: {x:.1f} %" for cut, x in zip(cuts, by_cut, strict=True))
        + f" ({total})"
    )
    return named, total


@pytest.mark.parametrize(
    ("whole", "what", "names", "most"),
    [
        (True, "falling", ("equilibrium", "divergence"), 0.01),
        (True, "equilibrium", ("convergence", "divergence"), 0.0),
        (True, "divergence", ("convergence", "equilibrium"), 0.001),
        (False, "falling", ("equilibrium", "divergence"), 0.01),
        (False, "equilibrium", ("convergence", "divergence"), 0.01),
        (False, "divergence", ("convergence", "equilibrium"), 0.001),
    ],
)
def test_hardly_a_run_gets_a_wrong_name(found, whole, what, names, most):
    wrong, total = share(found, whole, what, names, CUTS)
    assert wrong <= 3 + 2 * most * total


@pytest.mark.parametrize(
    ("whole", "what", "name", "least"),
    [
        (True, "falling", "convergence", 0.85),
        (True, "equilibrium", "equilibrium", 0.85),
        (True, "divergence", "divergence", 0.8),
        (False, "equilibrium", "equilibrium", 0.6),
        (False, "falling", "convergence", 0.4),
    ],
)
def test_most_runs_get_their_name_from_20_rows_on(found, whole, what, name, least):
    cuts = [cut for cut in CUTS if cut >= 20]
    named, total = share(found, whole, what, [name], cuts)
    assert named >= 0.8 * least * total - 3
