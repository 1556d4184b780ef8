"""What the loop need not know of the machine: device, threads, memory, CUDA graph."""

import ctypes
import os
import re
from contextlib import suppress

import torch
from loky import cpu_count as cores  # those of affinity and a container's quota
from torch.utils.flop_counter import FlopCounterMode


def find_device(name):
    """The device, by default a GPU if there is one, each of torchrun's ranks its own; ValueError
    where it cannot be used."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise ValueError(f"{name!r} is none of cpu, cuda, cuda:N")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    if device != "cpu" and int(device[5:]) >= gpus:
        raise ValueError(f"{name!r} cannot be used: PyTorch sees {gpus} GPUs here")
    return device


def set_device(device, dtype="fp32"):
    """Make it the current device, where float32 is float32: convolutions are TF32 by default.

    The setters are those of before torch 2.9: after fp32_precision others can no longer be read."""
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


class Captured:
    """A function of one index tensor as a CUDA graph: three calls run as usual, later ones are
    replays, a single launch each. Returns copies: a replay overwrites its output."""

    def __init__(self, function):
        self.function, self.calls = function, 0
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured

    def __call__(self, index):
        self.calls += 1
        if self.calls <= 3:
            return self.function(index)
        if self.calls == 4:
            self.index, self.graph = index.clone(), torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            mode = dict(capture_error_mode="thread_local")  # other threads may allocate meanwhile
            try:
                with torch.cuda.graph(self.graph, stream=stream, **mode):
                    self.out = self.function(self.index)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise ValueError(f"no CUDA graph: leave --graph out ({why})") from None
        self.index.copy_(index)
        self.graph.replay()
        return tuple(x.clone() for x in self.out)


def choose_threads(config, net, x):
    """CPU threads of a run: one; if it is the only one, one per 200 MFLOP of a step. With less to
    do, a second thread costs more than it gives."""
    if config.threads is None:
        config.threads = 1
        most = 6e-6 * config.batch_size * x[0].numel() * sum(p.numel() for p in net.parameters())
        if config.jobs == 1 and config.device == "cpu" and most > 300:  # to count takes a second
            with FlopCounterMode(display=False) as counter:
                net.train()(x).sum().backward()
            mflop = counter.get_total_flops() / 1e6 / len(x) * config.batch_size
            config.threads = max(1, min(cores(), round(mflop / 200)))
    if config.jobs == 1:
        torch.set_num_threads(config.threads)


def keep_memory():
    """Let glibc keep freed memory: to fetch it anew takes as long as the arithmetic on it."""
    with suppress(AttributeError, OSError, TypeError):  # not on Linux
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks
