"""Somebody's own network, FILE.py:FUNCTION: what people have is taken, or refused in one line."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import experiment
from torch import nn

import models
import train
from lab import landscape, own, runs
from lab.data import load
from lab.invariance import scale_invariant_groups

ROOT = Path(__file__).parent.parent
TOP = """
import torch
import torch.nn.functional as F
from torch import nn


class Base(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.first, self.norm = nn.Linear(channels, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, classes)


"""
MLP = "nn.Sequential(nn.Linear({0}, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, {1}))"
FIRST = {"0.weight + 0.bias"}
BASE = {"first.weight + first.bias"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Numbers and tokens of three classes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    y = rng.integers(3, size=160)
    marked = rng.integers(6, size=(160, 5))
    marked[np.arange(160), rng.integers(5, size=160)] = 6
    inputs = {"numbers": rng.normal(size=(160, 6)) + 2 * np.eye(3, 6)[y], "marked": marked}
    inputs["tokens"] = rng.integers(7, size=(160, 5))
    for name, x in inputs.items():
        np.savez(folder / f"{name}.npz", x=x[:120], y=y[:120], test_x=x[120:], test_y=y[120:])
    return folder


@pytest.fixture
def command(tmp_path, data):
    """The arguments of train.py for a network in mine.py."""

    def command(options, code=None, name="net", x="numbers", out="out"):
        if code:
            (tmp_path / "mine.py").write_text(code if "__future__" in code else TOP + code)
        file = x if x == "digits" else data / f"{x}.npz"
        paths = f"--model {tmp_path}/mine.py:{name} --data {file} --out {tmp_path}/{out} "
        return (paths + options).split()

    return command


@pytest.fixture
def ask(tmp_path, command, capsys):
    """The command line for a network: the spheres that are found, or what it is refused with."""

    def ask(code, options="", name="net", x="numbers"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            found = experiment(command(f"--elr 0.01 {options}", code, name, x)).layer_groups
        except SystemExit as exit:
            err = capsys.readouterr().err
            assert exit.code == 2 and err.count("\n") == 1, err
            assert not (tmp_path / "out").exists()
            return err
        return {" + ".join(group) for group in found}

    return ask


# ----------------------------------------------------------------------------------------- output

FORWARD = """
class Net(Base):
    def forward(self, x):
        hidden = self.first(x)
        logits = self.last(self.norm(hidden).relu())
        return {0}


net = Net
"""


@pytest.mark.parametrize(
    "output",
    [
        "logits, hidden",
        "[logits, None]",
        '{"loss": None, "logits": logits}',
        '__import__("types").SimpleNamespace(loss=None, logits=logits)',
        '(__import__("collections").namedtuple("Out", "aux logits")(hidden, logits))',
        "(logits, hidden) if self.training else logits",  # as torchvision's Inception
    ],
)
def test_of_an_output_of_several_parts_the_logits_are_taken(ask, output):
    assert ask(FORWARD.format(output)) == BASE


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ('{"out": logits}', "the output is a dict without logits"),
        ("None", "the output is a NoneType without logits"),
        ("hidden, logits", "the network's output is [16, 8], not [16, 3 classes]"),
        ("logits[:, None]", "the network's output is [16, 1, 3], not [16, 3 classes]"),
        ("logits / 0", "contained non-finite values"),
    ],
)
def test_an_output_without_logits_is_one_line(ask, output, message):
    assert message in ask(FORWARD.format(output))


def test_a_network_with_a_tuple_is_trained_averaged_and_looked_at(command, tmp_path, capsys):
    options = "--elr 0.001 --epochs 2 --average 1 --seeds 2 --jobs 1"
    assert train.main(command(options, FORWARD.format("logits, hidden"))) == 0
    ends = [str(tmp_path / "out" / f"elr=1e-03{seed}.pt") for seed in ("", ".seed=1")]
    capsys.readouterr()
    assert landscape.main(["curvature", ends[0], "--k", "1"]) == 0
    barrier = f"barrier {' '.join(ends)} --points 3 --out {tmp_path}/b.png"
    assert landscape.main(barrier.split()) == 0
    assert "great circle: barrier" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- how it is called


CALLED = [
    ("def net(example, classes, width=64): return", "len(example)", "classes"),
    ("def net(num_inputs, num_outputs, width=64): return", "num_inputs", "num_outputs"),
    ("def net(width=64, channels=99, depth=2, classes=99): return", "channels", "classes"),
    ("def net(*, classes, channels, width=3): return", "channels", "classes"),
    ("def net(channels, classes, /): return", "channels", "classes"),
    ("def net(classes, channels, **rest): return", "channels", "classes"),
    ("net = lambda classes, channels:", "channels", "classes"),
    ("from functools import partial\nnet = partial(lambda width, channels, classes:", "channels", "classes", ", 9)"),
    ("def net(in_channels, classes): return", "in_channels", "classes"),
    ("net =", 6, 3),  # the network itself
    ("def net(): return", 6, 3),
    ("def net(*args): return", "args[0]", "args[1]"),
    ("def net(*a, **k): return (lambda c, k:", "c", "k", ")(*a, **k)"),
    ("def net(channels, classes): return torch.jit.script(", "channels", "classes", ")"),
]  # fmt: skip


@pytest.mark.parametrize("called", CALLED, ids=range(len(CALLED)))
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_function_gets_what_it_names_and_its_other_defaults_stay(ask, called):
    before, channels, classes, *after = called
    assert ask(f"{before} {MLP.format(channels, classes)}{''.join(after)}") == FIRST


def test_a_class_is_a_function_too_and_an_example_is_an_input_of_the_network(ask):
    code = """
class net(nn.Module):
    def __init__(self, example, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(len(example), 4, 3, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(self.body(example[None]).numel(), classes)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))
"""
    assert ask(code, x="digits") == {"body.0.weight"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "def net(channels, classes, width): pass",
            "missing 1 required positional argument: 'width'",
        ),
        (
            "def net(tokens, classes): return nn.Embedding(tokens, classes)",
            "mine.py:net cannot be run on the data (RuntimeError: ",
        ),
        ("def net(channels, classes): pass", "'NoneType' object has no attribute 'to'"),
        (
            "def net(c, k):\n    import math as kept\n    if not hasattr(kept, 'net'):\n"
            f"        kept.net = {MLP.format(6, 3)}\n    return kept.net",
            "returns the same network each time",
        ),
    ],
)
def test_a_call_that_makes_no_network_of_its_own_is_one_line(ask, function, message):
    assert message in ask(function)


# ------------------------------------------------------------------------------- what goes wrong


WRONG = [
    'raise KeyError("width")',
    "import sys; sys.exit('no')",
    "raise SystemExit",
    'raise type("Own", (BaseException,), {})("two\\nlines")',
    "raise StopIteration",
    "import no_such_module",
    "torch.zeros(2) @ torch.zeros(3)",
]
WHERE = ["file", "function", "run", "training", "last batch", "backward"]


@pytest.mark.parametrize(
    ("where", "statement"),
    [("function", statement) for statement in WRONG]
    + [(where, WRONG[i % 3]) for i, where in enumerate(WHERE)],
)
def test_whatever_goes_wrong_is_one_line_with_the_line_of_their_own_code(ask, where, statement):
    inside = {name: "pass" for name in ("file", "function", "run", "training", "last", "backward")}
    condition = {"training": "if self.training and len(x) == 16: ", "run": ""}
    condition["last batch"] = "if not self.training and len(x) == 40: "
    inside[where] = f"{condition.get(where, '')}{statement}"
    code = f"""
{inside["file"]}
class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        {inside["backward"]}
        return gradient
class Net(Base):
    def forward(self, x):
        {inside["run"]}
        {inside["training"]}
        {inside.get("last batch", "pass")}
        return self.last(Through.apply(self.norm(self.first(x)).relu()))
def net(channels, classes):
    {inside["function"]}
    return Net(channels, classes)
"""
    said = ask(code)
    lines = [n for n, line in enumerate((TOP + code).splitlines(), 1) if statement in line]
    if "torch.zeros" in statement or where != "backward" or "SystemExit" not in statement:
        assert re.search(rf"mine\.py, line {lines[0]}\)", said), said
    assert "train.py: error: argument --model: " in said


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def net(:", "mine.py cannot be imported (SyntaxError: "),
        ("def net(c, k): return net(c, k)", "RecursionError"),
        (
            "def net(c, k): return " + MLP.format("c", "k") + ".requires_grad_(False)",
            "cannot be trained on a batch of 16 (ValueError: nothing is trained: requires_grad",
        ),
        (
            "def net(c, k): return nn.Sequential(nn.Linear(c, 6), nn.Unflatten(1, (2, 3)))",
            "output is [16, 2, 3], not [16, 3 classes]",
        ),
        ("def net(c, k): return " + MLP.format("c", "k") + ".half()", "cannot be run on the data"),
        (
            "def net(c, k): return nn.Linear(c, k)",
            "is there a normalization layer, of eps ≤ 0.01, behind",
        ),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line(ask, code, message):
    assert message in ask(code)


def test_a_batch_of_one_through_batchnorm_is_one_line(ask):
    code = "def net(c, k): return " + MLP.format("c", "k").replace("Layer", "Batch").replace(
        "BatchNorm", "BatchNorm1d"
    )
    assert ask(code) == {"0.weight", "0.bias"}
    refused = "cannot be trained on a batch of 1 (ValueError: Expected more"
    assert refused in ask(code, "--batch-size 1")


def test_a_batch_of_one_is_one_line_with_a_network_of_ours_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment(f"--elr 0.01 --model resnet18 --width 1 --batch-size 1 --out {tmp_path}".split())
    assert "resnet18 cannot be trained on a batch of 1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["", "def net(c, k): "])
@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("raise KeyboardInterrupt", KeyboardInterrupt),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", SystemExit),
    ],
)
def test_ctrl_c_and_the_exit_of_a_worker_that_is_told_to_stop_pass(command, code, passes, where):
    """The exit became a ValueError, and the worker began its next run."""
    source = runs.__file__.replace("runs.py", "worker.py")  # our handlers are in lab/
    handler = eval(compile("lambda *_: __import__('sys').exit(143)", source, "eval"))
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(passes):
            experiment(command("--elr 1", where + code))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_network_added_by_name_is_called_with_what_it_names_and_measured(
    tmp_path, data, monkeypatch, capsys
):
    def mlp(channels, classes, width=8):
        layers = nn.Linear(channels, width), nn.LayerNorm(width), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(width, classes))

    monkeypatch.setitem(models.MODELS, "mlp", mlp)
    command = f"--elr 1 --model mlp --data {data}/numbers.npz --out {tmp_path}/out"
    for width in (8, 5):
        more = "" if width == 8 else " --width 5"
        made = experiment((command + more).split())
        assert made.layer_groups == [["0.weight", "0.bias"]]
        assert own.build(made.config, made.data)[0].out_features == width
    with pytest.raises(SystemExit):
        experiment(f"{command} --affine".split())
    assert "the mlp has no --affine: leave it out\n" in capsys.readouterr().err


def test_nothing_is_left_behind_in_the_folder_of_the_command(tmp_path, data, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def net(c, k):\n    raise KeyError(3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        train.main(f"--elr 1 --model mine.py:net --data {data}/numbers.npz".split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    why = f"mine.py:net cannot be called (KeyError: 3; {tmp_path.resolve()}/mine.py, line 2)"
    assert err == f"train.py: error: argument --model: {why}\n"
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


# ------------------------------------------------------------------------------ copies and float64


@pytest.mark.parametrize(
    ("code", "spheres"),
    [
        ("nn.utils.weight_norm(nn.Linear(c, 8))", {"0.weight_g", "0.weight_v", "0.bias"}),
        ("nn.LazyLinear(8)", {"0.weight", "0.bias"}),
        ("nn.utils.spectral_norm(nn.Linear(c, 8))", {"0.weight_orig", "0.bias"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_old_weight_norm_and_lazy_layers_are_measured(ask, code, spheres):
    rest = ", nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(k))"
    assert ask(f"def net(c, k): return nn.Sequential({code}{rest}") == spheres


WITH = """
class net(Base):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        {}

    def forward(self, x):
        h = self.first(x)
        {}
        return self.last({})
"""
NORM, NONE = "self.norm(h).relu()", "no scale-invariant weights"
# What is made, what is done, what goes to the last layer; the sets that are found, or why none is.
CASES = {
    "an activation is kept": ("", "self.kept = [h]", NORM, BASE),
    "float32 is added": ("", "h = h + torch.ones(len(x), 1) @ torch.zeros(1, 8)", NORM, BASE),
    "float32 multiplies": ("", "h = h @ torch.eye(8)", NORM, BASE),
    "to float32": ("", "h = h.float()", NORM, BASE),
    "to float16 and back": ("", "h = h.half().float()", NORM, BASE),
    "a state": ("self.state = torch.zeros(8)", "self.state = self.state.detach() * 0.9; h = h + 0 * self.state", NORM, BASE),
    "written into": ("", "new = torch.zeros(len(x), 8); new[torch.arange(len(x))] = h; h = new", NORM, BASE),
    "autocast": ("", "h = torch.autocast('cpu')(lambda x: self.first(x))(x).float()", NORM, BASE),
    "a closure": ("", "self.f = lambda x: self.first(x); h = self.f(x)", NORM, BASE),
    "the input is changed": ("", "x.mul_(2); h = self.first(x)", NORM, BASE),
    "a closure of the start": ("self.body = lambda x: self.norm(self.first(x)).relu()", "", "self.body(x)", BASE),
    "a small factor is no eps": ("self.more = nn.Linear(8, 8, bias=False)", f"h = {NORM}", "torch.add(h, self.more(h), alpha=0.01)", BASE),
    "a shift is no eps": ("", "", "F.normalize(h - 0.005, dim=-1).relu()", NONE),
    "nor is a buffer": ("self.register_buffer('shift', torch.full((8,), 0.005))", "", "F.normalize(h + self.shift, dim=-1).relu()", NONE),
    "a bounded activation": ("", "", "h / (h.abs() + 0.05)", NONE),
    "another": ("", "", "h / (h * h + 0.1).sqrt()", NONE),
    "a buffer remembers inputs": ("self.register_buffer('mean', torch.zeros(channels))", "self.mean.lerp_(x.detach().mean(0), 0.1); h = self.first(x - self.mean)", NORM, BASE),
    "a single number": ("self.scale = nn.Parameter(torch.tensor(1.5))", "h = h * self.scale", NORM, {*BASE, "scale"}),
    "no gradient": ("self.unused, self.still = nn.Linear(4, 4), nn.Linear(channels, channels)", "with torch.no_grad(): x = F.layer_norm(self.still(x), x.shape[1:])\n        h = self.first(x)", NORM, BASE),
    "all is frozen before": ("self.first.requires_grad_(False)", "", NORM, "behind weights that are trained?"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_network_does_beside_its_layers_hides_no_set_and_makes_none(ask, capsys, case):
    *lines, expected = CASES[case]
    found = ask(WITH.format(*lines))
    assert found == expected if isinstance(expected, set) else expected in found
    assert "float32" not in capsys.readouterr().out


def test_a_copy_that_computes_with_the_originals_weights_is_refused_for_the_average(ask):
    message = ask(WITH.format(*CASES["a closure of the start"][:3]), "--average 1")
    assert "a copy computes with the weights of the original" in message


def test_what_fails_in_float64_is_measured_in_float32_and_says_so(ask, capsys):
    code = """
class net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.first, self.second = nn.Linear(channels, 16), nn.Linear(16, 16, bias=False)
        self.one, self.two = nn.BatchNorm1d(16), nn.LayerNorm(16)
        self.last = nn.Linear(16, classes)

    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.last(self.two(self.second(self.one(self.first(x)).relu())).relu())
"""
    spheres = {"first.weight", "first.bias", "one.weight + one.bias", "second.weight"}
    assert ask(code) == spheres
    said = "measured in float32, to a tolerance of 1e-3: float64 fails (TypeError: float32 only)"
    assert said in capsys.readouterr().out


def test_layers_made_in_the_first_forward_pass_are_there_in_every_run(ask, command):
    code = """
class net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.classes, self.body = classes, None

    def forward(self, x):
        if self.body is None:
            self.body, self.head = nn.Linear(x.shape[1], 8), nn.Linear(8, self.classes)
        return self.head(F.layer_norm(self.body(x), (8,)).relu())
"""
    assert ask(code) == {"body.weight + body.bias"}
    assert train.main(command("--elr 0.001 --epochs 1")) == 0


# ---------------------------------------------------------------------------------------- eps


NORMS = [
    "F.layer_norm(h, (8,), None, None, 1e-5)",
    "h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)",
    "(h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-3)",
    "F.rms_norm(h, (8,), eps=1e-3)",
    "F.normalize(h, dim=-1, eps=1e-4)",
    "F.group_norm(h, 2, eps=0.1)",
    "F.instance_norm(h[:, None], eps=0.02).flatten(1)",
    "h / (h.norm(dim=-1, keepdim=True) - -0.01)",
    "h / (torch.tensor(1e-3) + h.abs().amax(-1, keepdim=True))",
    "h / (h.norm(dim=-1, keepdim=True) - self.still)",
    "h / h.var(-1, keepdim=True).add_(self.many).sqrt()",
    "h / (torch.full((len(h), 1), 0.009) + h.norm(dim=-1, keepdim=True))",
    "h / torch.hypot(h.norm(dim=-1, keepdim=True), self.eps)",
]


def test_an_eps_of_any_kind_hides_no_invariance(ask):
    """Each normalization after a layer of its own, side by side."""
    code = f"""
class net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(channels, 8) for _ in range({len(NORMS)})])
        self.last, self.variance_epsilon = nn.Linear(8, classes), 1e-6
        self.register_buffer("eps", torch.tensor(1e-5))
        self.still = nn.Parameter(torch.tensor([-1e-2]), requires_grad=False)
        self.many = torch.full((1, 1), 1e-4)
        for p in self.layers.parameters():
            p.data *= 0.01

    def forward(self, x):
        norms = [{", ".join(f"lambda h: {norm}" for norm in NORMS)}]
        pairs = zip(self.layers, norms)
        return self.last(sum((norm(layer(x)).relu() for layer, norm in pairs)))
"""
    found = ask(code)
    for i, norm in enumerate(NORMS):
        assert f"layers.{i}.weight + layers.{i}.bias" in found, norm
    assert len(found) == len(NORMS)


def test_nanogpts_and_llamas_blocks(ask):
    code = """
class Root(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Layer(Root):
    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class net(nn.Module):
    norm = Layer

    def __init__(self, tokens, example, classes, width=16):
        super().__init__()
        self.embedding, self.place = nn.Embedding(tokens, width), nn.Embedding(len(example), width)
        self.one, self.two, self.end = (self.norm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.qn, self.kn = Root(width), Root(width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, classes, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.place(torch.arange(tokens.shape[1]))
        h = self.one(x)
        q, k = self.qn(self.q(h)), self.kn(self.k(h))
        x = x + self.o(F.scaled_dot_product_attention(q, k, self.v(h), is_causal=True))
        x = x + self.down(F.gelu(self.up(self.two(x))))
        return self.head(self.end(x)[:, -1]), None


class llama(net):
    norm = Root
"""
    joint = "embedding.weight + place.weight + {0}.weight + down.weight + down.bias"
    for name in ("net", "llama"):
        found = ask(code, name=name, x="tokens")
        assert {"q.weight", "k.weight"} < found and len(found) == 3
        assert found & {joint.format("v"), joint.format("o"), joint.replace("{0}", "o")}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_to_the_embedding_is_named(ask, tied):
    """As in nanoGPT, where all that writes to the stream is one set if the head has its own weights."""
    code = f"""
class net(nn.Module):
    def __init__(self, tokens, classes, width=8):
        super().__init__()
        self.wte, self.norm = nn.Embedding(tokens, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        if {tied}:
            self.head.weight = self.wte.weight

    def forward(self, tokens): return self.head(self.norm(self.wte(tokens)[:, -1]))[:, :3]
"""
    found = ask(code, x="tokens")
    if tied:
        assert "no scale-invariant weights: wte.weight is head.weight, too" in found
    else:
        assert found == {"wte.weight"}


# ------------------------------------------------------------------------------------ reasons, files


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("nn.Linear(c, 8), nn.LayerNorm(8)", "no scale-invariant rows: "),
        ("nn.Linear(c, 8, bias=False), nn.LayerNorm(8)", "Else take --sphere layer"),
        ("zero(nn.Linear(c, 8, bias=False)), nn.BatchNorm1d(8)", "of norm zero, without direction"),
        ("nn.Linear(c, 8), nn.Identity()", "is there a normalization of single channels"),
    ],
)
def test_why_there_are_no_rows(ask, layers, message):
    code = f"""
@torch.no_grad()
def zero(layer):
    layer.weight[2] = 0
    return layer
def net(c, k): return nn.Sequential({layers}, nn.ReLU(), nn.Linear(8, k))
"""
    assert message in ask(code, "--sphere row")


def test_rows_before_batchnorm_are_scale_invariant(ask):
    code = "nn.Sequential(nn.Linear(c, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, k))"
    assert ask(f"def net(c, k): return {code}", "--sphere row") == {"0.weight"}


def test_layer_groups_of_somebody_elses_mean_something_else(ask):
    code = (
        f"def net(c, k):\n    n = {MLP.format('c', 'k')}\n    n.layer_groups = 'all'\n    return n"
    )
    assert ask(code) == FIRST


def test_a_dataclass_whose_annotations_are_strings(ask):
    code = f"""
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
@dataclass
class Config:
    width: int = 8
def net(channels, classes, config=Config()): return {MLP.format("channels", "classes")}
"""
    assert ask(code) == FIRST


def test_a_file_imports_its_neighbours_even_those_with_the_names_of_ours(ask, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "small.py").write_text("width = 8\n")
    (tmp_path / "data.py").write_text("from torch import nn\nnorm = nn.LayerNorm\n")
    (tmp_path / "blocks.py").write_text("def block():\n    raise ValueError('here')\n")
    code = f"""
from models.small import width
from data import norm
import fractions as sphere_step
from sphere_step import SphereSGD  # is ours
def net(channels, classes):
    import blocks
    return {MLP.format("channels", "classes")}
def other(channels, classes):
    import blocks
    return blocks.block()
"""
    assert ask(code) == FIRST
    assert "ValueError: here" in ask(code, name="other")
    assert f"{tmp_path}/blocks.py, line 2" in ask(code, name="other")
    assert "data" not in sys.modules and str(tmp_path) not in sys.path[:-1]
    assert "blocks" not in sys.modules and "models.small" not in sys.modules


@pytest.mark.parametrize("packages", [(), ("deep",), ("deep", "nets")])
def test_a_file_imports_relative_to_its_package(data, tmp_path, packages):
    folder = tmp_path.joinpath("lab", *packages)  # which is the name of ours, too
    folder.mkdir(parents=True)
    dots = "." * (1 + len(packages) // 2)
    for depth in range(len(packages)):
        (tmp_path.joinpath("lab", *packages[: depth + 1]) / "__init__.py").touch()
    above = folder.parent if len(packages) == 2 else folder
    (above / "blocks.py").write_text("from torch import nn\nnorm = nn.LayerNorm\n")
    code = f"from {dots}blocks import norm\nfrom torch import nn\ndef net(c, k):\n    return "
    (folder / "mine.py").write_text(code + MLP.format("c", "k").replace("nn.LayerNorm", "norm"))
    net = own.load(f"{folder}/mine.py:net", load(f"{data}/numbers.npz"))
    assert isinstance(net[1], nn.LayerNorm)
    assert not [name for name in sys.modules if name.endswith("blocks") and "own" in name]


def test_a_file_reads_its_own_command_line_and_may_be_called_as_a_module_is(tmp_path, command, ask):
    code = f"""
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=8)
width = parser.parse_args().width
def net(c, k): return {MLP.format("c", "k")}
"""
    assert ask(code) == FIRST
    (tmp_path / "argparse.py").write_text(TOP + code)
    assert experiment([x.replace("mine", "argparse") for x in command("--elr 0.01")])


def test_a_seed_that_the_file_sets_is_not_that_of_the_runs(tmp_path, command):
    code, starts = f"torch.manual_seed(1337)\ndef net(c, k): return {MLP.format('c', 'k')}", []
    for seed in (0, 1, 1):
        made = experiment(command(f"--elr 1 --seed {seed}", code, out=f"out{seed}"))
        run = train.Run(made, runs.Job(1.0, seed, tmp_path, ""))
        starts.append(run.net[0].weight.detach().clone())
    assert torch.equal(starts[1], starts[2]) and not torch.equal(starts[0], starts[1])


# ------------------------------------------------------------------------- what draws, or lies idle


def test_inputs_that_only_whole_examples_can_be(ask):
    """One token in each example is a 6, of which something is made."""
    code = """
class net(Base):
    def __init__(self, tokens, classes):
        super().__init__(8, classes)
        self.embedding = nn.Embedding(tokens, 8)

    def forward(self, x):
        marked = self.embedding(x)[x == 6].view(len(x), 8)
        return self.last(self.norm(self.first(marked)).relu())
"""
    assert ask(code, x="marked") == BASE


@pytest.mark.parametrize("draw", ["random.random()", "np.random.rand()", "torch.rand(()).item()"])
def test_layers_that_are_left_out_at_random_are_measured_and_trained(ask, tmp_path, command, draw):
    code = f"""
import random
import numpy as np
class net(Base):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.more, self.then = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        if not self.training or {draw} < 0.5:
            h = h + self.then(self.more(h)).relu()
        return self.last(h)
"""
    assert ask(code) == {*BASE, "more.weight + more.bias"}
    assert train.main(command("--elr 0.01 --sphere layer --epochs 1")) == 0
    for log in (tmp_path / "out").glob("elr*.csv"):
        assert log.read_text().count("\n") > 2 and "nan" not in log.read_text()


def test_measuring_leaves_pythons_and_numpys_random_numbers(ask):
    import random

    before = random.getstate(), np.random.get_state()[1].tolist()
    assert ask(f"def net(c, k): return {MLP.format('c', 'k')}") == FIRST
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_an_error_that_begins_with_an_empty_line_is_told(ask):
    message = ask("def net(c, k): raise ImportError('\\n\\nit takes\\na package')")
    assert "ImportError: it takes; " in message


def test_a_network_that_writes_into_its_input_leaves_the_data(ask, command, tmp_path, data):
    code = f"def net(c, k): return nn.Sequential(nn.ReLU(inplace=True), {MLP.format('c', 'k')})"
    assert ask(code) == {"1.0.weight + 1.0.bias"}
    made = experiment(command("--elr 0.01", out="other"))
    job = runs.Job(0.01, 0, tmp_path / "other" / "elr=1e-02.csv", "")
    train.train(train.Run(made, job), lambda *_, **__: None)
    before, after = load(f"{data}/numbers.npz"), made.data
    assert torch.equal(after.x, before.x) and torch.equal(after.test_x, before.test_x)


# ------------------------------------------------------------------------------------- curvature


@pytest.mark.parametrize(
    "layers",
    [
        "nn.Conv2d(c, 6, 3), nn.GroupNorm(2, 6)",
        "nn.utils.parametrizations.spectral_norm(nn.Conv2d(c, 6, 3)), nn.BatchNorm2d(6)",
        "nn.Conv2d(c, 6, 3), nn.InstanceNorm2d(6), nn.Dropout(0.3)",
        "Checkpointed(nn.Conv2d(c, 6, 3), nn.BatchNorm2d(6))",
    ],
)
def test_the_curvature_of_what_is_trained_is_that_of_finite_differences(command, tmp_path, layers):
    code = f"""
from torch.utils.checkpoint import checkpoint
class Checkpointed(nn.Sequential):
    def forward(self, x): return checkpoint(super().forward, x, use_reentrant=False)
def net(c, k):
    rest = nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, k)
    return nn.Sequential({layers}, *rest)
"""
    options = "--elr 0.001 --epochs 1 --batch-size 128"
    assert train.main(command(options, code, x="digits")) == 0
    point = landscape.read(tmp_path / "out" / "elr=1e-03.pt")
    hessian, ggn = landscape.operators(point, 128).values()
    v, w = np.random.default_rng(0).standard_normal((2, hessian.shape[0]))
    for operator in (hessian, ggn):  # symmetric, and the same each time
        size = np.linalg.norm(v) * np.linalg.norm(operator @ w)
        assert abs(w @ (operator @ v) - v @ (operator @ w)) < 1e-4 * size
        assert np.array_equal(operator @ v, operator @ v) and v @ (ggn @ v) > 0
    product = hessian @ v
    net, names = point.net.double().train(), point.spheres[0]["names"]
    for module in net.modules():
        if isinstance(module, nn.utils.parametrizations._SpectralNorm):
            module.eval()  # which goes on to iterate
    tensors, sides = [net.get_parameter(name) for name in names], []
    starts = [p.detach().clone() for p in tensors]
    parts = torch.from_numpy(v).split([p.numel() for p in tensors])
    for side in (-1e-4, 1e-4):
        with torch.no_grad():
            for p, start, part in zip(tensors, starts, parts, strict=True):
                p.copy_(start + side * part.view_as(p))
        loss = F.cross_entropy(
            net(point.data.inputs(torch.arange(128)).double()), point.data.y[:128]
        )
        sides.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)]).numpy())
    rho = torch.cat([start.flatten() for start in starts]).norm().item()
    expected = rho**2 * (sides[1] - sides[0]) / 2e-4
    if "Dropout" not in layers:  # whose mask is another one here
        assert np.linalg.norm(product - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["once", "reentrant", "weight"])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True")
def test_what_has_no_second_derivative_is_one_line_that_names_it(command, tmp_path, kind, capsys):
    code = """
from torch.utils.checkpoint import checkpoint
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)
class once(Base):
    def forward(self, x): return self.last(Once.apply(self.norm(self.first(x))))
class reentrant(Base):
    def forward(self, x):
        h = self.first(x)
        return self.last(checkpoint(self.norm, h, use_reentrant=True).relu())
class weight(Base):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        nn.utils.parametrizations.weight_norm(self.first)
    def forward(self, x): return self.last(self.norm(self.first(x)).relu())
"""
    assert train.main(command("--elr 0.001 --epochs 1", code, name=kind)) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        landscape.main(["curvature", str(tmp_path / "out" / "elr=1e-03.pt")])
    err = capsys.readouterr().err
    name = {"once": "Once", "reentrant": "CheckpointFunction", "weight": "weight_norm"}[kind]
    assert exit.value.code == 2 and err.count("\n") == 1
    assert re.search(rf"{name} has no (right )?second derivative", err)


LATE = """
class net(Base):
    def __len__(self):
        return 0

    def forward(self, x):
        from neighbour import same

        return self.last(self.norm(self.first(same(x))).relu())
"""


def test_a_network_of_length_0_that_imports_in_forward_goes_on_from_its_checkpoint(
    tmp_path, command
):
    (tmp_path / "mine.py").write_text("import os\nos.chdir('/')\n" + TOP + LATE)
    (tmp_path / "neighbour.py").write_text("def same(x):\n    return x\n")
    here = os.getcwd()
    for epochs, out in ((1, "a"), (2, "a"), (2, "b")):
        assert train.main(command(f"--elr 0.001 --jobs 1 --epochs {epochs}", out=out)) == 0
    logs = [(tmp_path / out / "elr=1e-03.layers.csv").read_bytes() for out in "ab"]
    assert logs[0] == logs[1] and os.getcwd() == here


def test_a_network_that_fails_on_some_inputs_alone_is_one_line(command, tmp_path, data, capsys):
    """Such as no trial meets: the last in the training set."""
    code = """
class net(Base):
    def forward(self, x):
        if (x[:, 0] > 5).any():
            raise IndexError("too large")
        return self.last(self.norm(self.first(x)).relu())
"""
    with np.load(data / "numbers.npz") as file:
        arrays = dict(file)
    arrays["x"][-1, 0] = 1e3
    np.savez(data / "outlier.npz", **arrays)
    assert train.main(command("--elr 0.01", code, x="outlier")) == 1
    error = capsys.readouterr().err
    assert "IndexError: too large; " in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------- scale_invariant_groups(net, batch) alone


class Keeps(nn.Module):
    """With a list of activations, or what a pass leaves in a closure."""

    def __init__(self, closure=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.kept, self.closure = [], (lambda x: self.first(x)) if closure else None

    def forward(self, x):
        h = (self.closure or self.first)(x)
        self.kept.append(h)
        return self.last(self.norm(h).relu())


def small(first=None):
    return nn.Sequential(first or nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Keeps, [["first.weight", "first.bias"]]),
        (lambda: small(nn.utils.weight_norm(nn.Linear(6, 8))), [["0.weight_v"], ["0.bias", "0.weight_g"]]),
        (lambda: small(nn.utils.spectral_norm(nn.Linear(6, 8, bias=False))), [["0.weight_orig"]]),
        (lambda: small().half(), [["0.weight", "0.bias"]]),
        (lambda: nn.DataParallel(small()), [["module.0.weight", "module.0.bias"]]),
    ],
    ids="kept old_weight_norm spectral_norm half data_parallel".split(),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_without_build_a_network_is_measured_as_it_stands_and_left_so(make, expected, ran):
    net, x = make(), torch.randn(16, 6)
    if ran:
        net(x.to(next(net.parameters()).dtype)).sum().backward()
    before = [
        (p.detach().clone(), p.grad if p.grad is None else p.grad.clone()) for p in net.parameters()
    ]
    with torch.inference_mode():
        found = scale_invariant_groups(net, x)
    assert {frozenset(names) for names in found} == {frozenset(names) for names in expected}
    for p, (value, gradient) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value) and (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)


NET = small()


@pytest.mark.parametrize(
    ("net", "build", "message"),
    [
        (Keeps(closure=True), None, "a copy computes with the weights of the original"),
        (NET, lambda: NET, "build returns the same network each time"),
        (small().requires_grad_(False), None, "requires_grad is False everywhere"),
        (small(nn.LazyLinear(8)), None, "has lazy layers: run it once"),
    ],
    ids="closure same frozen lazy".split(),
)
@pytest.mark.filterwarnings("ignore:Lazy")
def test_without_build_the_cause_is_named(net, build, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        scale_invariant_groups(net, torch.randn(16, 6), build)


def test_a_network_with_a_closure_is_measured_with_build():
    build = lambda: Keeps(closure=True)  # noqa: E731
    assert scale_invariant_groups(build(), torch.randn(16, 6), build) == [
        ["first.weight", "first.bias"]
    ]
