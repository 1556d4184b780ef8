"""One thread per test process, and the kernels' run in Triton's interpreter beside all other tests: it takes as long as they."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: our networks are small, and two cores are for two runs

INTERPRETER_RUN = "test_the_kernels_pass_in_the_interpreter"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="test_faults.py: how often to kill a sweep")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name == INTERPRETER_RUN)  # it is asked for its result last


def pytest_collection_finish(session):
    if not session.config.option.collectonly and any(item.name == INTERPRETER_RUN for item in session.items):
        import test_kernels

        session.config.interpreter_run = test_kernels.start_interpreter_run()


def pytest_unconfigure(config):
    process = getattr(config, "interpreter_run", None)
    if process is not None and process.poll() is None:
        process.kill()
