"""What a run was made by: hashes of the scripts that make its numbers, of a network of one's own,
of the data. Who edits one of them and runs the same command again sees a new run."""

import ast
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = """train.py sphere_step.py models.py lab/data.py lab/measure.py
    lab/schedules.py lab/own.py lab/invariance.py lab/machine.py""".split()


def contents(model, data):
    """File → hash: of our scripts, of the file in `model` ("FILE.py:FUNCTION", or one of ours) with
    what it imports from its own folder, and of the arrays of the data. Of a script its syntax tree
    counts, not comments, docstrings and layout."""
    files = {name: ROOT / name for name in SCRIPTS}
    if ":" in model:
        path = Path(model.rpartition(":")[0]).resolve()
        for file in sorted(imported(path)):
            name = file.relative_to(package_root(path)).as_posix()
            if file != files.get(name, file):  # theirs is called like one of ours
                name = f"{package_root(path).name}/{name}"
            files[name] = file
    found = {name: hash_of(code(path).encode()) for name, path in files.items()}
    arrays = [x.cpu().contiguous().numpy() for x in (data.x, data.y, data.test_x, data.test_y)]
    return found | {"the data": hash_of(*arrays)}


def hash_of(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def code(path):
    """The text of a script without comments, docstrings and layout."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [line for line in body if not is_text(line)] or [ast.Pass()]
    return ast.unparse(tree)


def is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def package_root(path):
    """The folder of a script, or that of the package that it is in."""
    root = path.parent
    while (root / "__init__.py").exists():
        root = root.parent
    return root


def imported(path):
    """A script and all that it imports from its own folder or package, as paths."""
    root = package_root(path)
    found, left = set(), [path]
    while left:
        file = left.pop()
        if file in found or not file.is_file() or not file.is_relative_to(root):
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            places, names = [file.parent, path.parent, root], []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                if node.level:  # from . import blocks
                    places = [file.parents[node.level - 1]]
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            for name in names:
                for place in places:  # a.b.c: what a and b are runs, too
                    for part in name.strip(".").split("."):
                        left.append(place / "__init__.py")
                        place = place / part
                        left += [place.with_suffix(".py"), place / "__init__.py"]
    return found


def changed(there, here):
    """Which contents differ, as the beginning of a sentence; "" if none do."""
    names = [name for name in here if there.get(name) != here[name]]
    names += [name for name in there if name not in here]
    if not there:
        return "Version 0.4 has changed things"
    if not names:
        return ""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} changed"
