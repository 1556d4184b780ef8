"""What makes runs faster and a reader of the loop need not know: a CUDA graph, threads, memory."""

import ctypes
import os
import sys
from contextlib import suppress
from inspect import unwrap

import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

MFLOP_PER_THREAD = 200  # of a step: below, a second thread costs more than it gives


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
            options.threads = max(1, min(os.cpu_count(), round(mflop / MFLOP_PER_THREAD)))
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
