"""What a run was made by: hashes of the scripts that make its numbers, of all files that a network
of one's own reads, of the data. Who edits one of them and runs the same command again sees a new
run."""

import ast
import hashlib
import os
import sys
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import source_from_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Ours that make no numbers; all others of lab do.
NO_NUMBERS = """regimes.py lab/__init__.py lab/bench.py lab/contents.py
    lab/figures.py lab/jobs.py lab/kernels.py lab/landscape.py lab/loop.py lab/options.py
    lab/runs.py lab/style.py lab/toy.py""".split()
SCRIPTS = {"train.py", "sphere_step.py", "models.py"}
SCRIPTS |= {f"lab/{path.name}" for path in (ROOT / "lab").glob("*.py")} - {*NO_NUMBERS}
STANDARD_LIBRARY = Path(os.__file__).parent
CACHES = {".cache", ".triton", ".git"}  # folders of which only Python code counts
WRITING = os.O_WRONLY | os.O_CREAT
# Our scripts, and others beside them, as they run, whatever is saved later: train.py imports this
# before torch
AT_START = {path: path.read_bytes() for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]}
_recordings = []  # of `recorded`, the innermost last: (file, whether it is written)


def contents(data, files):
    """Name → hash: of the scripts, as `of_scripts`, and of the arrays of the data. Raises
    ValueError where one of ours may have been read before it was saved, or after."""
    for name in sorted(SCRIPTS):
        path = ROOT / name
        if path in AT_START and code(path.read_bytes()) != code(AT_START[path]):
            raise ValueError(f"{name} was saved while this command began: give it again")
    arrays = [x.cpu().contiguous().numpy() for x in (data.x, data.y, data.test_x, data.test_y)]
    return of_scripts(files) | {"the data": hash_of(*arrays)}


def of_scripts(files):
    """Name → hash: of our scripts and what they import beside them, as they were at the start, and
    of somebody's files: file → hash, as `recorded` read them. Of a script its syntax tree counts,
    not comments, docstrings and layout."""
    paths = {name: ROOT / name for name in sorted(SCRIPTS)}
    for path in sorted({*files, *imported_beside_ours()} - set(paths.values())):
        name = seen_from_here(path)
        if name in paths:  # theirs is called like one of ours
            name = str(path)
        paths[name] = path
    there = {name: path for name, path in paths.items() if path.is_file()}  # no temporary one
    found = {}
    for name, path in there.items():
        at_start = AT_START.get(path) or path.read_bytes()
        found[name] = files.get(path) or hash_of_file(path, at_start)
    return found


def hash_of_file(path, content):
    return hash_of(code(content) if path.suffix == ".py" else content)


@contextmanager
def recorded(files):
    """Into `files` goes what is read meanwhile, however that is done: modules, weights, settings;
    and its hash. Not what is written, too, nor what is a library's or in a cache."""
    _listen()
    opened = []
    _recordings.append(opened)
    try:
        yield
    finally:
        _recordings.pop()
        written = {file for file, writing in opened if writing}
        for file in {file for file, _ in opened} - written:
            if file.endswith(".pyc"):
                with suppress(ValueError):  # of one that has no source
                    file = source_from_cache(file)
            path = Path(file).resolve()
            kept = path.suffix == ".py" or CACHES.isdisjoint(path.parts)
            if kept and path.is_file() and not is_library(file):
                files[path] = hash_of_file(path, path.read_bytes())


@cache
def _listen():
    """From now on Python tells of each file that it opens. This cannot be taken back."""

    def hear(event, args):
        if not _recordings or event not in ("open", "import"):
            return
        file = args[0] if event == "open" else args[1]  # which only compiled modules have
        if isinstance(file, str | bytes | os.PathLike):
            writing = event == "open" and args[2] & WRITING
            _recordings[-1].append((os.path.abspath(os.fsdecode(file)), writing))

    sys.addaudithook(hear)


def imported_beside_ours():
    """The files of modules in the folder of our scripts, but for what makes no numbers."""
    others = {ROOT / name for name in ("tests", "docs")}
    modules = list(sys.modules.values())
    files = [getattr(module, "__file__", None) or "" for module in modules]
    paths = {Path(file) for file in files if file.startswith(f"{ROOT}/") and file.endswith(".py")}
    return {p for p in paths if not is_library(p) and others.isdisjoint({p, *p.parents})}


def is_library(file):
    """Whether it is of a library or ours, is no file, as "<string>", or torch.compile's."""
    path = Path(file)
    places = {path, *path.parents}
    ours = {ROOT / name for name in SCRIPTS.union(NO_NUMBERS)}
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    generated = str(file).startswith("<") or "/torchinductor_" in str(file)
    return bool(installed or generated or places & {*ours, STANDARD_LIBRARY, Path("/proc")})


def hash_of(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{getattr(part, 'shape', '')} {getattr(part, 'dtype', '')};".encode())
        digest.update(part)
    return digest.hexdigest()[:16]


@cache
def code(text):
    """A script without comments, docstrings and layout."""
    try:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                body[:] = [line for line in body if not is_text(line)] or [ast.Pass()]
        return ast.unparse(tree).encode()
    except (SyntaxError, ValueError, RecursionError):  # it was read, not run; or is too deep
        return text


def is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def seen_from_here(path):
    """A path, always written in one way: below this folder from here, else from the root."""
    path = Path(path).resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return path.as_posix()


def package_root(path):
    """The folder of a script, or that of the package that it is in."""
    root = path.parent
    while (root / "__init__.py").exists():
        root = root.parent
    return root


def changed(there, here):
    """Which contents differ, as the beginning of a sentence; "" if none do."""
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if not names:
        return ""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} changed"
