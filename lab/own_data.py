"""Somebody's own data: a file .npz of arrays, or a text. ValueErrors say in a line what is not as
it should be."""

import numpy as np
import torch

PARTS = ("x", "y", "test_x", "test_y")
KERAS = {"x_train": "x", "y_train": "y", "x_test": "test_x", "y_test": "test_y"}


def text(path, length=16):
    """The characters of a file as tokens, the next one as label: 20,000 windows at random from the
    first nine tenths, 4,000 from the last, the same for every seed. Returns x, y, test_x, test_y as
    tensors, the characters, and notes on what was made of the file."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read as text in UTF-8 ({error})") from None
    cut, generator, parts = len(content) * 9 // 10, torch.Generator().manual_seed(0), []
    known = sorted(set(content[:cut]))
    tokens = {character: token for token, character in enumerate(known)}
    for part, n in ((content[:cut], 20_000), (content[cut:], 4_000)):
        codes = torch.tensor([tokens[character] for character in part if character in tokens])
        if len(content) < 10_000 or len(codes) < 1000:
            most = "it takes 10,000 characters, and in the last tenth 1,000 that occur before"
            raise ValueError(f"{path} is too short: {most}")
        start = torch.randint(len(codes) - length, (n, 1), generator=generator)
        windows = codes[start + torch.arange(length + 1)]
        parts += [windows[:, :-1], windows[:, -1]]
    notes = [f"{len(content)} characters, {len(known)} different ones, in windows of {length}"]
    unknown = sorted(set(content[cut:]) - set(known))
    if unknown:
        notes.append(f"left out, as only the last tenth has them: {' '.join(map(repr, unknown))}")
    return *parts, known, notes


def arrays(path):
    """The arrays x, y, test_x, test_y of a file .npz, or x_train, …, as Keras calls them. Returns
    tensors, y as classes; the labels of the classes, if not 0, 1, 2, …; and notes."""
    found, notes = _read(path), []
    for part in PARTS:
        array = found[part]
        try:
            if part.endswith("x"):
                found[part] = inputs(array, notes)
            else:
                found[part] = _labels(array, len(found[part.replace("y", "x")]))
        except ValueError as error:
            given = f"the array {part} of type {array.dtype} and shape {list(array.shape)}"
            raise ValueError(f"{path}: {given} {error}") from None
    x, y, test_x, test_y = (found[part] for part in PARTS)
    if x.shape[1:] != test_x.shape[1:] or x.dtype != test_x.dtype:
        raise ValueError(f"{path}: test_x is not of the kind and shape of x")
    labels, classes = np.unique(np.concatenate([y, test_y]), return_inverse=True)
    y, test_y = np.split(classes, [len(y)])
    n, counts = len(labels), np.bincount(y, minlength=len(labels))
    if n > 20 and (counts == 1).sum() > n / 4:
        values = f"y has {n} different values, many of them once"
        raise ValueError(f"{path}: {values}: only classes can be trained, no numbers to predict")
    if not counts.all():
        raise ValueError(f"{path}: the label {labels[counts.argmin()]} is in test_y, not in y")
    labels, notes = labels.tolist(), notes[:1]  # what is noted of x goes for test_x, too
    if labels == list(range(n)):
        labels = None
    else:
        renamed = f"{n} labels, {labels[0]} to {labels[-1]}, are the classes 0 to {n - 1}"
        notes.append(f"{renamed}: see config.json")
    return *map(torch.from_numpy, (x, y, test_x, test_y)), labels, notes


def _read(path):
    """The four arrays of the file, by our names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ours = {name: KERAS.get(name.lower(), name) for name in file.files}
            found = {ours[name]: file[name] for name in ours if ours[name] in PARTS}
    except Exception as error:  # damage can show anywhere
        made = "np.savez(path, x=x, y=y.astype(str), …) makes one"
        raise ValueError(f"{path} is no .npz file of numbers and text ({error}): {made}") from None
    if sorted(part for part in ours.values() if part in PARTS) != sorted(PARTS):
        raise ValueError(f"{path} has {', '.join(ours)}: it takes {', '.join(PARTS)}, each once")
    return found


def inputs(x, notes):
    """Images [N, C, H, W] uint8 or float64, numbers [N, M] float64, tokens [N, T] int64."""
    flat = x.ndim == 2 and x.dtype in (bool, np.uint8)  # images, more likely than tokens
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "fiub" or flat:
        kinds = "images [N, (C,) H, W], floats [N, M] or tokens int64 [N, T]"
        raise ValueError(f"must be {kinds}: x.reshape(-1, H, W), x.astype(float)")
    if not x.size:
        raise ValueError("is empty")
    if x.ndim == 2 and x.dtype.kind != "f":
        if x.min() < 0 or x.max() > 10**6:
            raise ValueError("has tokens below 0 or above a million: numbers are floats")
        notes.append("whole numbers [N, T] are read as tokens: else save x.astype(float)")
        return x.astype(np.int64, order="C")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4:
        x = _channels_first(x, notes)
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    x = x.astype(np.float64, order="C")
    if not (abs(x) < 1e100).all():  # not if it is nan
        raise ValueError("has nan, inf or more than 1e100")
    return x


def _channels_first(x, notes):
    """[N, C, H, W] of this or [N, H, W, C]. An end of 1 to 4 is the channels; where both ends are
    so small, or neither, it is the first, unless only with the last images are square."""
    _, first, middle, last = x.shape
    moved = last <= 4
    if (first <= 4) == (last <= 4):
        moved = first == middle != last
    if moved:
        x = np.moveaxis(x, 3, 1)
    order = "H, W, channels" if moved else "channels, H, W"
    read = f"x is read as images [N, {order}], {x.shape[1]} channels"
    notes.append(f"{read}: else save them in that order")
    return x


def _labels(y, n):
    """[n], whole numbers or text."""
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeError:
            raise ValueError('is no UTF-8: save np.char.decode(y, "latin-1")') from None
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        if ((abs(y) < 2**53) & (y.round() == y)).all():
            y = y.astype(np.int64)
        else:
            raise ValueError("has fractions or nan: only classes can be trained, no numbers")
    if y.shape not in ((n,), (n, 1)) or y.dtype.kind not in "biuU":
        raise ValueError(f"must be {n} labels, whole numbers or text, as y.argmax(1)")
    return y.ravel()
