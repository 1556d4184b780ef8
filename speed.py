"""The machine, of which a reader of the loop need not know: device, precision, cores, threads,
memory, CUDA graph.
"""

import ctypes
import os
import platform
import re
import sys
import timeit
from contextlib import suppress
from functools import cache
from inspect import unwrap
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

MFLOP_PER_THREAD = 200  # of a step: below, a second thread costs more than it gives


def machine(device="cpu"):
    """The name of the processor, or GPU."""
    if "cuda" in device:
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def find_device(name):
    """The device of this name, by default a GPU if there is one; of torchrun's ranks each its own.
    Raises ValueError where it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise ValueError(f"{name!r} is none of cpu, cuda, cuda:N")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{name!r} cannot be used here ({why})") from None
    return device


def use(device, dtype="fp32"):
    """Make it the current device, and float32 mean float32 there: by default PyTorch computes a
    GPU's convolutions in TF32."""
    if device != "cpu":
        torch.cuda.set_device(device)
    if hasattr(torch.backends, "fp32_precision"):
        precision = "tf32" if dtype == "tf32" else "ieee"
        torch.backends.cudnn.conv.fp32_precision = precision
        torch.backends.cuda.matmul.fp32_precision = precision
    else:  # before torch 2.9
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"


def cores(groups=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """CPU cores that this process may use: those of its affinity, or fewer by a container's quota
    (cgroup, version 2 or 1)."""
    n = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        n = len(os.sched_getaffinity(0))
    quotas = [groups / "cpu" / "cpu.cfs_quota_us"]
    with suppress(OSError):
        inner = groups / own.read_text().rpartition("::/")[2].strip()
        quotas += [folder / "cpu.max" for folder in (inner, *inner.parents)]
    for path in quotas:
        with suppress(OSError, ValueError):  # "max", or -1: no quota
            quota, *period = path.read_text().split()
            period = period or path.with_name("cpu.cfs_period_us").read_text().split()
            if int(quota) > 0:
                n = min(n, max(1, int(quota) // int(period[0])))
    return n


@cache
def bf16_slowness():
    """How many times as long a matrix product takes in bfloat16 as in float32, on the CPU: many
    where the processor has no instructions for it."""
    best = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(256, 256, dtype=dtype)
        best.append(min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=3)))
    return best[0] / best[1]


class Captured:
    """A function of one index tensor, captured in a CUDA graph. Three calls run as usual, later
    ones are replays, a single launch each, or run as usual where it cannot be captured. Returns
    copies: a replay overwrites its output."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self, index):
        self.calls += 1
        if self.calls <= 3:  # on the stream of the capture, which has to know all memory it meets
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.function(index)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if self.calls == 4:
            self._capture(index)
        if self.graph is None:
            return self.function(index)
        self.index.copy_(index)
        self.graph.replay()
        return tuple(x.clone() for x in self.out)

    def _capture(self, index):
        self.index, graph = index.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.out = self.function(self.index)
            self.graph = graph
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            print(f"no CUDA graph, going on without: {what}", file=sys.stderr)


def flops(net, x):
    """Floating-point operations of a batch's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return counter.get_total_flops()


def choose_threads(options, net, x):
    """CPU threads of each run: one; of a single run as many as it gains from."""
    if options.threads is None:
        options.threads = 1
        # Counting costs a second. Most that there can be: every weight at every position.
        positions = x[0].numel() / len(x[0]) if x[0].dim() > 1 else len(x[0])
        most = 6 * positions * sum(p.numel() for p in net.parameters()) * options.batch_size
        if options.jobs == 1 and options.device == "cpu" and most > 1.5e6 * MFLOP_PER_THREAD:
            mflop = flops(net.train(), x) / 1e6 / len(x) * options.batch_size
            options.threads = max(1, min(cores(), round(mflop / MFLOP_PER_THREAD)))
    if options.jobs == 1:
        torch.set_num_threads(options.threads)


def keep_memory():
    """Let glibc keep freed memory for the next step. To fetch it from the system again, zeroed,
    takes as long as the arithmetic where activations are large."""
    with suppress(AttributeError, OSError, TypeError):  # not on Linux
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def start_quickly():
    """Take decorators off torch's optimizers that import torch.compile's machinery, which takes a
    second."""
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        setattr(Optimizer, name, unwrap(getattr(Optimizer, name)))
