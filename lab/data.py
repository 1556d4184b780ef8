"""Data sets as tensors that live on the device; a batch is an indexing there. Own data are a file
.npz of arrays, or a text."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("digits", "modular", "cifar10", "cifar100", "svhn")
DIGITS = Path(__file__).parents[1] / "data" / "digits.npz"
PARTS = ("x", "y", "test_x", "test_y")
KERAS = {"x_train": "x", "y_train": "y", "x_test": "test_x", "y_test": "test_y"}
CHUNK = 512  # inputs at once outside of training


@dataclass
class Data:
    """Inputs x and labels y [N] int64, to train and to test on. x are images [N, channels, H, W]
    uint8, or float32, normalized, numbers [N, features] float32, normalized, or tokens [N, T]
    int64, of which there are `tokens`. mean, std: of uint8, per channel. labels: a file's, if not
    0, 1, 2, … notes: what was made of a file, to be printed."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    labels: list | None = None
    notes: list[str] = field(default_factory=list)
    classes: int = 0
    mean: Tensor | None = None
    std: Tensor | None = None
    tokens: int | None = None

    def inputs(self, index, augment=False):
        """The training inputs at these indices, normalized."""
        x = self.x[index]
        return self.normalized(crop_and_flip(x) if augment else x)

    def normalized(self, x):
        """A copy: float32 of mean 0 and deviation 1; tokens as they are."""
        return x.clone() if self.mean is None else (x - self.mean) / self.std


def load(name: str, modulus: int = 31, device: str = "cpu", root: str = "data") -> Data:
    """The data set `name`, one of NAMES or a file .npz or .txt, on `device`; downloads go to
    `root`. Raises ValueError where it cannot be read. digits: 1,797 of 8×8, Alpaydin and Kaynak
    (UCI, 1998), as in scikit-learn, 1,437 to train on."""
    path = Path(name)
    if name == "digits":
        data = arrays(DIGITS)
    elif name == "modular":
        data = modular(modulus)
    elif name in NAMES:
        data = _download(name, root)
    elif path.suffix not in (".npz", ".txt"):
        raise ValueError(f"no data set {name!r}: choose {', '.join(NAMES)}, FILE.npz, FILE.txt")
    elif not path.is_file():
        raise ValueError(f"{name}: there is no such file")
    else:
        data = text(path) if path.suffix == ".txt" else arrays(path)
    for part in PARTS:
        setattr(data, part, getattr(data, part).to(device))
    data.classes = int(max(data.y.max(), data.test_y.max())) + 1
    if data.classes < 2:
        raise ValueError(f"{name} has a single class: it takes two")
    if data.x.dtype == torch.int64:
        data.tokens = int(max(data.x.max(), data.test_x.max())) + 1
    if data.x.dtype == torch.uint8:
        std, mean = zip(*(torch.std_mean(x.double()) for x in data.x.unbind(1)), strict=True)
        data.mean, data.std = (torch.stack(x).float().view(-1, 1, 1) for x in (mean, std))
        data.std[data.std == 0] = 1
    return data


def modular(p):
    """Addition modulo p: all pairs as tokens a, b and "=" (p); label (a + b) mod p. A random 70 %
    to train on, the same for every seed."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    x, y = torch.stack([a, b, torch.full_like(a, p)], 1), (a + b) % p
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
    train, test = order[: round(0.7 * p * p)], order[round(0.7 * p * p) :]
    return Data(x[train], y[train], x[test], y[test])


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
    return Data(*parts, known, notes)


def arrays(path):
    """The arrays x, y, test_x, test_y of a file .npz, or x_train, …, as in Keras' files. Raises
    ValueError where they are not inputs and labels."""
    found, notes = _read(path), []
    for name, array in found.items():
        try:
            if name.endswith("x"):
                found[name] = _inputs(array, notes)
            else:
                found[name] = _labels(array, len(found[name.replace("y", "x")]))
        except ValueError as error:
            given = f"the array {name} of type {array.dtype} and shape {list(array.shape)}"
            raise ValueError(f"{path}: {given} {error}") from None
    x, y, test_x, test_y = found.values()
    if x.shape[1:] != test_x.shape[1:] or x.dtype != test_x.dtype:
        raise ValueError(f"{path}: test_x is not of the kind and shape of x")
    if (y.dtype.kind == "U") != (test_y.dtype.kind == "U"):
        raise ValueError(f"{path}: of y and test_y one is text, one numbers")
    known, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    n, once, lacking = len(known), (counts == 1).sum(), np.setdiff1d(test_y, known)
    if n > 20 and once > n / 4:
        values = f"y has {n} different values, {once} of them once"
        raise ValueError(f"{path}: {values}: only classes can be trained, no numbers to predict")
    if len(lacking):
        raise ValueError(f"{path}: the label {lacking[0]} is in test_y, not in y")
    labels, notes = known.tolist(), notes[:1]  # what is noted of x goes for test_x, too
    if labels == list(range(n)):
        labels = None
    else:
        renamed = f"{n} labels, {known[0]} to {known[-1]}, are the classes 0 to {n - 1}"
        notes.append(f"{renamed}: see config.json")
    parts = x, y, test_x, np.searchsorted(known, test_y)
    x, y, test_x, test_y = map(torch.from_numpy, parts)
    if x.dtype == torch.float64:
        x, test_x = standardized(x, test_x)
        if not test_x.isfinite().all():
            raise ValueError(f"{path}: test_x has numbers that are far larger than those of x")
    return Data(x, y, test_x, test_y, labels, notes)


def _read(path):
    """The four arrays of the file, by our names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            stored = {KERAS.get(name.lower(), name): name for name in names}
            found = {name: np.asarray(file[stored[name]]) for name in PARTS if name in stored}
    except Exception as error:  # damage can show anywhere
        message = "is damaged, or no .npz file"
        if str(error).startswith("Object arrays"):
            message = "holds Python objects: save numbers or text, as with y.astype(str)"
        raise ValueError(f"{path} {message}") from None
    if len(found) < sum(KERAS.get(name.lower(), name) in PARTS for name in names):
        raise ValueError(f"{path} has an array twice, as x and x_train: {', '.join(names)}")
    for name in PARTS:
        if name not in found:
            there = f"it has {', '.join(stored.values())}, and takes {', '.join(PARTS)}"
            raise ValueError(f"{path} has no array {name}: {there}")
    return found


def _inputs(x, notes):
    """Images [N, C, H, W] uint8 or float64, numbers [N, M] float64, tokens [N, T] int64."""
    few = x.ndim == 2 and x.dtype in (bool, np.uint8)
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "fiub" or few:
        raise ValueError("must be images [N, (C,) H, W], floats [N, M] or tokens int64 [N, T]")
    if not x.size:
        raise ValueError("is empty")
    if x.ndim == 2 and x.dtype.kind in "iu":
        if x.min() < 0 or x.max() > 10**6:
            raise ValueError("has tokens below 0 or above a million: numbers are floats")
        notes.append("whole numbers [N, T] are read as tokens: else save x.astype(float)")
        return x.astype(np.int64, order="C")
    if x.ndim > 2:
        x = _channels_first(x, notes)
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    x = x.astype(np.float64, order="C")
    held = abs(x) < 1e100  # not if it is nan
    if not held.all():
        raise ValueError(f"has nan, inf or more than 1e100 in column {held.all(0).argmin()}")
    return x


def _channels_first(x, notes):
    """[N, H, W] or [N, H, W, C] as [N, C, H, W]. Up to 4 numbers are channels; where both ends have
    so few, or none, channels are last if only so images are square."""
    if x.ndim == 3:
        return x[:, None]
    _, first, middle, last = x.shape
    unclear = (first <= 4) == (last <= 4)
    moved = last <= 4
    if unclear:
        moved = first == middle != last
    if moved:
        x = np.moveaxis(x, 3, 1)
        notes.append(f"x is read as images [N, H, W, channels], {last} channels")
    elif unclear:
        taken = f"x is read as images [N, channels, H, W], {first} channels"
        notes.append(f"{taken}: if they are the last, save np.moveaxis(x, 3, 1)")
    return x


def _labels(y, n):
    """[n], whole numbers or text."""
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8")
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        if ((abs(y) < 2**53) & (y.round() == y)).all():
            y = y.astype(np.int64)
    if y.shape not in ((n,), (n, 1)) or y.dtype.kind not in "biuU":
        raise ValueError(f"must be {n} labels, whole numbers or text: y.astype(int), y.argmax(1)")
    return y.ravel()


def standardized(x, test_x):
    """[N, M], or images, as float32 of mean 0 and deviation 1 in x, by column or channel; 0 where x
    is constant."""
    over = [0, 2, 3][: x.dim() - 1]
    unit = torch.exp2(x.abs().amax(over, keepdim=True).clamp(min=1e-307).log2().floor())
    x, test_x = x / unit, test_x / unit  # exactly: squares of small numbers would be 0
    first = x[:1].amin(over, keepdim=True)  # of time stamps only the last digits differ
    std, mean = torch.std_mean(x - first, over, keepdim=True)
    std[std <= 1e-15 * x.abs().amax(over, keepdim=True)] = torch.inf  # constant but for rounding
    return ((x - first - mean) / std).float(), ((test_x - first - mean) / std).float()


def _download(name, root):
    """A data set of torchvision, from `root` once it is there."""
    from torchvision import datasets

    kind, parts = getattr(datasets, name.upper()), []
    urls, halves = [getattr(kind, "url", "")], (True, False)
    if name == "svhn":
        halves = ("train", "test")
        urls = [kind.split_list[half][0] for half in halves]
    try:
        for half in halves:
            found = kind(root, half, download=True)
            labels = found.labels if name == "svhn" else found.targets
            parts += [torch.from_numpy(_inputs(found.data, [])), torch.as_tensor(labels).long()]
    except (OSError, RuntimeError) as error:  # a wrong checksum is a RuntimeError
        place = f"put {' and '.join(urls)} into {root} by hand"
        raise ValueError(f"{name} cannot be downloaded ({error}): {place}") from None
    return Data(*parts)


def add_label_noise(data, share):
    """Give round(share · N) random training inputs another label, the same for every seed."""
    generator, n = torch.Generator().manual_seed(1), len(data.y)
    chosen = torch.randperm(n, generator=generator)[: round(share * n)].to(data.y.device)
    shift = torch.randint(1, data.classes, (len(chosen),), generator=generator).to(data.y.device)
    data.y = data.y.clone()
    data.y[chosen] = (data.y[chosen] + shift) % data.classes


def crop_and_flip(x):
    """Images [N, channels, H, W], each its own random crop after padding by H/8, half flipped."""
    n, _, height, width = x.shape
    pad = max(1, height // 8)
    top, left = torch.randint(2 * pad + 1, (2, n), device=x.device)
    flip = torch.rand(n, 1, 1, 1, device=x.device) < 0.5
    crops = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    x = crops[torch.arange(n, device=x.device), :, top, left]  # of all crops [N, C, top, left, …]
    return torch.where(flip, x.flip(3), x)


def batches(n, size, generator, device="cpu"):
    """An epoch's batches as index tensors [size], without the last, incomplete one."""
    order = torch.randperm(n, generator=generator).to(device)
    return order[: n - n % size].split(size)


def chunks(n, device="cpu"):
    """The whole set in order, as index tensors of one length, at most CHUNK."""
    return torch.arange(n, device=device).tensor_split(-(-n // CHUNK))
