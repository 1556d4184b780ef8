"""Many runs at a time: in processes side by side, and what one sees of them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import wait

import torch
from tqdm import tqdm

from lab import runs


class Watch:
    """What one sees of runs: a bar of all their epochs, outside of a terminal a line a minute; a
    line for each that has finished, whereupon `renew` is called."""

    def __init__(self, config, jobs, renew):
        self.jobs, self.renew = jobs, renew
        names = [job.name for job in jobs]
        if config.then:
            names += [runs.second_name(job, config.then) for job in jobs]
        self.epochs = dict.fromkeys(names, (0, config.epochs))  # done, wanted
        self.finished, self.busy, self.failed = set(), set(), False
        hidden = config.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(unit="epoch", leave=False, disable=hidden)
        self.next_line = time.monotonic() + 60

    def left(self):
        """The jobs that have not reported their end."""
        return [job for job in self.jobs if job.name not in self.finished]

    def tell(self, event, name, *details):
        """A run's message: "epoch" (epoch, epochs, text), "finished" (verdict, whether there was
        nothing to do), "busy" (text), "failed" (text)."""
        if event == "epoch":
            epoch, epochs, shown = details
            self.epochs[name] = epoch, epochs
            done, total = map(sum, zip(*self.epochs.values(), strict=True))
            self.bar.total = total
            shown = f"{name}, epoch {epoch}: {shown}"
            self.bar.set_description_str(shown, refresh=False)
            self.bar.update(done - self.bar.n)
            if time.monotonic() > self.next_line and self.bar.disable:
                print(f"{done} of {total} epochs; {shown}", flush=True)
                self.next_line += 60
        elif event == "finished":
            self.finished.add(name)
            verdict, nothing_to_do = details
            done = " (already done)" if nothing_to_do else ""
            tqdm.write(f"{name}{done}: {verdict}", file=sys.stdout)
            sys.stdout.flush()
            self.renew()
        elif event == "failed" and name not in self.finished:  # each worker tries it
            self.failed = True
            self.finished.add(name)
            tqdm.write(f"train.py: error: {name}: {details[0]}", file=sys.stderr)
        elif event == "busy" and name not in self.busy:
            self.busy.add(name)
            tqdm.write(details[0], file=sys.stderr)

    def close(self):
        self.bar.close()


def side_by_side(work, experiment, jobs, tell):
    """Do `work(experiment, jobs, tell)` in config.jobs processes; each does what no other one is
    at. On Linux they fork, with what this process has imported and read."""
    fork = sys.platform == "linux" and experiment.config.device == "cpu"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    processes, pipes = [], []
    signal.pthread_sigmask(signal.SIG_BLOCK, runs.STOPS)  # until a worker has its own handlers
    try:
        for _ in range(min(experiment.config.jobs, len(jobs))):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(work, experiment, jobs, there))
            process.start()
            there.close()  # so that the end of the worker is the end of the pipe
            processes.append(process)
            pipes.append(here)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, runs.STOPS)
        while pipes:
            for pipe in wait(pipes):
                try:
                    tell(*pipe.recv())
                except (EOFError, ConnectionResetError):
                    pipes.remove(pipe)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        runs.remove_leftovers(experiment.config.out)


def _worker(work, experiment, jobs, pipe):
    # Ctrl-C reaches the parent, too, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it at once: files are whole at any moment
    signal.pthread_sigmask(signal.SIG_UNBLOCK, runs.STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(experiment.config.threads)

    def tell(*message):
        event, *_, last = message
        done_before = event == "finished" and last
        if event != "busy" and not done_before:  # the parent tells these itself
            pipe.send(message)

    work(experiment, jobs, tell)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def heed_stops():
    """Ctrl-C and SIGTERM, the first of them alone, raise KeyboardInterrupt(number). Python drops
    what is raised in a destructor or a weakref's callback: then it is raised again, 10 ms later."""

    def stop(number, _):
        for each in runs.STOPS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    def dropped(unraisable):
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt):
            return sys.__unraisablehook__(unraisable)
        signal.signal(signal.SIGALRM, lambda *_: stop(*error.args, None))
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    for each in runs.STOPS:
        signal.signal(each, stop)
    sys.unraisablehook = dropped
