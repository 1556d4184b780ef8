"""What a run was made by: hashes of the scripts that make its numbers, of a network of one's own,
of the data. Who edits one of them and runs the same command again sees a new run."""

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = """train.py sphere_step.py models.py lab/data.py lab/measure.py
    lab/schedules.py lab/own.py lab/invariance.py lab/machine.py""".split()


def contents(data, files=()):
    """Name → hash: of our scripts and what they import beside them, of somebody's files and what
    was imported beside those, of the arrays of the data. Of a script its syntax tree counts, not
    comments, docstrings and layout."""
    paths = {name: ROOT / name for name in SCRIPTS}
    roots = {ROOT, *map(package_root, files)}
    for path in sorted({*files, *loaded_below(roots)}):
        name = seen_from_here(path)
        if paths.get(name, path) != path:  # theirs is called like one of ours
            name = str(path)
        paths[name] = path
    found = {}
    for name, path in paths.items():
        text = path.read_bytes()
        found[name] = hash_of(code(text) if path.suffix == ".py" else text)
    arrays = [x.cpu().contiguous().numpy() for x in (data.x, data.y, data.test_x, data.test_y)]
    return found | {"the data": hash_of(*arrays)}


def loaded_below(roots):
    """The files of modules that are loaded from these folders, but for libraries and what makes no
    numbers."""
    others = {ROOT / name for name in ("regimes.py", "lab", "tests", "docs")}
    found = set()
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        if not path.is_absolute() or path.suffix != ".py" or "site-packages" in path.parts:
            continue
        path = path.resolve()
        if roots & set(path.parents) and not others & {path, *path.parents} and path.is_file():
            found.add(path)
    return found


def hash_of(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{getattr(part, 'shape', '')} {getattr(part, 'dtype', '')};".encode())
        digest.update(part)
    return digest.hexdigest()[:16]


@cache
def code(text):
    """A script without comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [line for line in body if not is_text(line)] or [ast.Pass()]
    return ast.unparse(tree).encode()


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
