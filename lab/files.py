"""Somebody's own data: FILE.npz, of arrays, or FILE.txt, a text. What is wrong with it is told in
one line that names it."""

import numpy as np
import torch

KERAS = {"x_train": "x", "y_train": "y", "x_test": "test_x", "y_test": "test_y"}


def text(path, length=16):
    """The characters of a file as tokens, the next one as label: 20,000 windows at random from the
    first nine tenths, 4,000 from the last, the same for every seed."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read as text in UTF-8 ({error})") from None
    cut, generator, parts = len(content) * 9 // 10, torch.Generator().manual_seed(0), []
    known = sorted(set(content[:cut]))
    tokens = {character: token for token, character in enumerate(known)}
    for part, n in ((content[:cut], 20_000), (content[cut:], 4_000)):
        codes = torch.tensor([tokens[character] for character in part if character in tokens])
        if len(codes) < 1000:
            raise ValueError(f"{path} is too short: it takes 10,000 characters")
        start = torch.randint(len(codes) - length, (n, 1), generator=generator)
        windows = codes[start + torch.arange(length + 1)]
        parts += [windows[:, :-1], windows[:, -1]]
    notes = [f"{len(content)} characters, {len(known)} different ones, in windows of {length}"]
    unknown = sorted(set(content[cut:]) - set(known))
    if unknown:
        notes.append(f"left out, as only the last tenth has them: {' '.join(map(repr, unknown))}")
    x, y, test_x, test_y = parts
    return dict(x=x, y=y, test_x=test_x, test_y=test_y, labels=known, notes=notes)


def arrays(path):
    """The arrays x, y, test_x, test_y of a file .npz, or x_train, …, as lab.data.Data has them.
    Raises ValueError where they are not inputs and labels."""
    found, parts = {}, []
    try:
        with np.load(path, allow_pickle=False) as file:
            there = {KERAS.get(name.lower(), name): name for name in file.files}
            for name in ("x", "y", "test_x", "test_y"):
                found[name] = None  # in an error
                found[name] = file[there[name]]
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except KeyError:
        what = f"it has {', '.join(there.values())}, and takes x, y, test_x, test_y"
        raise ValueError(f"{path} has no array {name}: {what}") from None
    except Exception as error:  # damage can show anywhere
        what = f"the array {name} cannot be read" if found else "it is no .npz file"
        raise ValueError(f"{path}: {what} ({str(error)[:100]})".replace("\n", " ")) from None
    for name in ("x", "test_x"):
        x, y, wrong = found[name], found[name.replace("x", "y")], ""
        kind, what = x.dtype.kind, f"{path}: the array {name} of type {x.dtype}"
        what += f" and shape {list(x.shape)}"
        token = x.ndim == 2 and kind in "iu" and x.dtype != np.uint8
        if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
            x = np.moveaxis(x, 3, 1)
        x = x[:, None] if x.ndim == 3 else x
        to = np.uint8 if x.dtype == np.uint8 else np.int64 if token else np.float64
        if not x.size:
            wrong = "is empty"
        elif not (token or x.ndim == 2 and kind == "f" or x.ndim == 4 and kind in "fiub"):
            wrong = "must be images [N, (C,) H, W], floats [N, M] or tokens int64 [N, T]"
        elif kind == "f" and not np.isfinite(x).all():
            wrong = f"has nan or inf in column {np.isfinite(x).all(0).argmin()}"
        elif token and (x.min() < 0 or x.max() > 10**6):
            wrong = "has tokens below 0 or above a million: numbers are floats"
        elif parts and (x.shape[1:] != parts[0].shape[1:] or to != parts[0].dtype):
            wrong = "is not of the kind and shape of x"
        elif y.shape not in ((len(x),), (len(x), 1)) or y.dtype.kind not in "biuSU":
            what = f"{path}: the array {name.replace('x', 'y')} of type {y.dtype} and shape"
            wrong = f"{list(y.shape)} must be {len(x)} labels: y.astype(int), ravel, argmax, bins"
        if wrong:
            raise ValueError(f"{what} {wrong}")
        y = np.char.decode(y, "latin1") if y.dtype.kind == "S" else y
        parts += [x.astype(to, order="C"), y.ravel()]
    x, y, test_x, test_y = parts
    known, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    n, once = len(known), (counts == 1).sum()
    if n > 20 and once > n / 4:
        what = f"y has {n} different values, {once} of them once"
        raise ValueError(f"{path}: {what}: only classes can be trained, no numbers to predict")
    lacking = test_y[~np.isin(test_y, known)].tolist()
    if lacking:
        raise ValueError(f"{path}: the label {lacking[0]} is in test_y, not in y")
    test_y, labels, notes = np.searchsorted(known, test_y), None, []
    if known.tolist() != list(range(n)):
        labels = known.tolist()
        what = f"{n} labels, {known[0]} to {known[-1]}"
        notes.append(f"{what}, are the classes 0 to {n - 1}: see config.json")
    if x.dtype == np.int64:
        what = "whole numbers [N, T] are read as tokens"
        notes.append(f"{what}: if they are numbers, save x.astype(float)")
    elif x.shape != found["x"].shape:
        notes.append(f"x is read as images [N, channels, H, W] = {list(x.shape)}")
    x, y, test_x, test_y = map(torch.from_numpy, (x, y, test_x, test_y))
    if x.dtype == torch.float64:
        x, test_x = standardized(x, test_x)
        if not test_x.isfinite().all():
            raise ValueError(f"{path}: test_x is too far from x for float32")
    return dict(x=x, y=y, test_x=test_x, test_y=test_y, labels=labels, notes=notes)


def standardized(x, test_x):
    """[N, M], or images, as float32 of mean 0 and deviation 1 in x, by column or channel; 0 where x
    is constant."""
    over = [0, 2, 3][: x.dim() - 1]
    least = 1e-15 * x.abs().amax(over, keepdim=True)  # rounding
    # Of time stamps only the last digits differ; quarters fit float64.
    first = x[:1].amin(over, keepdim=True) / 4
    x, test_x = x / 4 - first, test_x / 4 - first
    scale = x.abs().amax(over, keepdim=True)
    scale[scale <= least] = torch.inf
    x, test_x = x / scale, test_x / scale
    mean, std = x.mean(over, keepdim=True), x.std(over, keepdim=True).clamp(min=1e-300)
    return ((x - mean) / std).float(), ((test_x - mean) / std).float()
