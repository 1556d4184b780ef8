"""Data sets as tensors that live on the device; a batch is an indexing there."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = Path(__file__).parents[1] / "data" / "digits.npz"
NAMES = ("digits", "modular", "cifar10", "cifar100", "svhn")
# What the arrays of a file may be called, the second as Keras does.
ARRAYS = ["x y test_x test_y".split(), "x_train y_train x_test y_test".split()]


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
    classes: int = 0
    mean: Tensor | None = None
    std: Tensor | None = None
    tokens: int | None = None
    labels: list | None = None
    notes: list[str] = field(default_factory=list)

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
    if name == "digits":
        data = _arrays(DIGITS)
    elif name == "modular":
        data = Data(*modular(modulus))
    elif name in NAMES:
        data = Data(*_download(name, Path(root)))
    elif name.endswith(".npz"):
        data = _arrays(Path(name))
    elif name.endswith(".txt"):
        data = text(Path(name))
    else:
        raise ValueError(f"no data set {name!r}: choose {', '.join(NAMES)}, FILE.npz, FILE.txt")
    data.classes = int(max(data.y.max(), data.test_y.max())) + 1
    if data.classes < 2:
        raise ValueError(f"{name} has a single class: it takes two")
    if data.x.dtype == torch.int64:
        data.tokens = int(max(data.x.max(), data.test_x.max())) + 1
    if data.x.dtype == torch.uint8:
        channels = [x.double() for x in data.x.unbind(1)]
        data.mean = torch.stack([x.mean() for x in channels]).float().view(-1, 1, 1)
        std = torch.stack([x.std() for x in channels]).float().view(-1, 1, 1)
        data.std = torch.where(std > 0, std, 1)
    for part in ("x", "y", "test_x", "test_y", "mean", "std"):
        if getattr(data, part) is not None:
            setattr(data, part, getattr(data, part).to(device))
    return data


def modular(p):
    """Addition modulo p: all pairs as tokens a, b and "=" (p); label (a + b) mod p. A random 70 %
    to train on, the same for every seed."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    x, y = torch.stack([a, b, torch.full_like(a, p)], 1), (a + b) % p
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
    train, test = order[: round(0.7 * p * p)], order[round(0.7 * p * p) :]
    return [x[train], y[train], x[test], y[test]]


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
    return Data(*parts, labels=known, notes=notes)


def _arrays(path):
    """The data in a file of arrays."""
    names, arrays, parts = ARRAYS[0], {}, []
    try:
        with np.load(path, allow_pickle=False) as file:
            there = {name.lower(): name for name in file.files}
            for way in ARRAYS:
                if there.keys() >= set(way):
                    names = way
            for name in names:
                arrays[name] = None  # in an error
                arrays[name] = file[there[name]]
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except KeyError:
        what = f"it takes {', '.join(names)}, and there are {', '.join(there.values())}"
        raise ValueError(f"{path} has no array {name}: {what}") from None
    except Exception as error:  # damage can show anywhere
        what = f"the array {name} cannot be read" if arrays else "it is no .npz file"
        raise ValueError(f"{path}: {what} ({str(error)[:100]})".replace("\n", " ")) from None
    for x, y in (names[:2], names[2:]):
        parts.append(_inputs(arrays[x], f"{path}: the array {x}"))
        parts.append(_labels(arrays[y], len(parts[-1]), f"{path}: the array {y}"))
    x, y, test_x, test_y = parts
    if x.shape[1:] != test_x.shape[1:] or x.dtype != test_x.dtype:
        raise ValueError(f"{path}: the array {names[2]} is not of the kind and shape of {names[0]}")
    known, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    n, once = len(known), (counts == 1).sum()
    if n > 20 and once > n / 4:
        what = f"{n} different numbers in {names[1]}, {once} of them once"
        raise ValueError(f"{path}: {what}: only classes can be trained, no regression")
    lacking = test_y[~np.isin(test_y, known)].tolist()
    if lacking:
        raise ValueError(f"{path}: the label {lacking[0]} is in {names[3]}, not in {names[1]}")
    data = Data(*map(torch.from_numpy, (x, y, test_x, np.searchsorted(known, test_y))))
    if known.tolist() != list(range(n)):
        data.labels = known.tolist()
        what = f"{n} labels, {known[0]} to {known[-1]}"
        data.notes.append(f"{what}, are the classes 0 to {n - 1}: see config.json")
    if x.dtype == np.int64:
        what = "whole numbers [N, T] are read as tokens"
        data.notes.append(f"{what}: if they are numbers, save x.astype(float)")
    elif x.shape != arrays[names[0]].shape:
        what = f"{names[0]} {list(arrays[names[0]].shape)}"
        data.notes.append(f"{what} is read as images [N, channels, H, W] {list(x.shape)}")
    if x.dtype == np.float64:
        data.x, data.test_x = standardized(data.x, data.test_x)
        if not data.test_x.isfinite().all():
            raise ValueError(f"{path}: {names[2]} is too far from {names[0]} for float32")
    return data


def _inputs(x, name):
    """As images [N, channels, H, W] uint8, other numbers float64, tokens [N, T] int64."""
    kind, name = x.dtype.kind, f"{name} of type {x.dtype} and shape {list(x.shape)}"
    if not x.size:
        raise ValueError(f"{name} is empty")
    if kind == "f" and not np.isfinite(x).all():
        raise ValueError(f"{name} has nan or inf in column {np.isfinite(x).all(0).argmin()}")
    if x.ndim == 2 and kind in "iu" and x.dtype != np.uint8:
        if x.min() < 0 or x.max() > 10**6:
            raise ValueError(f"{name} has tokens below 0 or above a million: numbers are floats")
        return x.astype(np.int64, order="C")
    if not (x.ndim == 2 and kind == "f" or x.ndim in (3, 4) and kind in "fiub"):
        kinds = "images [N, (C,) H, W], numbers [N, M] as floats or tokens [N, T] as int64"
        raise ValueError(f"{name} must be {kinds}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = np.moveaxis(x, 3, 1)
    return x.astype(np.uint8 if x.dtype == np.uint8 else np.float64, order="C")


def _labels(y, n, name):
    """[n], or [n, 1], of whole numbers or text."""
    if y.shape not in ((n,), (n, 1)):
        shape = f"{list(y.shape)} must be labels [{n}], one for each input"
        raise ValueError(f"{name} of shape {shape}: ravel, or argmax of one-hot rows")
    if y.dtype.kind not in "biuSU":
        what = "must be labels, not numbers to predict: if it is, save y.astype(int)"
        raise ValueError(f"{name} of type {y.dtype} {what}")
    if y.dtype.kind == "S":
        y = np.char.decode(y, "latin1")
    return (y.astype(int) if y.dtype == bool else y).ravel()


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


def _download(name, root):
    """The same of a data set of torchvision, from `root` once it is there."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN}[name]
    svhn, parts = name == "svhn", []
    try:
        for part in ("train", "test"):
            which = dict(split=part) if svhn else dict(train=part == "train")
            found = kind(root, download=True, **which)
            x, y = torch.from_numpy(found.data), found.labels if svhn else found.targets
            x = x if svhn else x.permute(0, 3, 1, 2).contiguous()
            parts += [x, torch.as_tensor(y).long()]
    except (ImportError, OSError, RuntimeError) as error:  # a wrong checksum is a RuntimeError
        files = list(kind.split_list.values())[:2] if svhn else [(kind.url, kind.filename)]
        where = " and ".join(f"{url} as {root / file}" for url, file, *_ in files)
        what = f"{name} cannot be downloaded ({error})"
        raise ValueError(f"{what}: get {where} by hand") from None
    return parts


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
    shift = torch.randint(2 * pad + 1, (2, n, 1), device=x.device)
    rows = shift[0] + torch.arange(height, device=x.device)
    columns = shift[1] + torch.arange(width, device=x.device)
    flip = torch.rand(n, 1, device=x.device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def batches(n, size, generator, device="cpu"):
    """An epoch's batches as index tensors [size], without the last, incomplete one."""
    order = torch.randperm(n, generator=generator).to(device)
    return order[: n - n % size].split(size)


def chunks(n, size, device="cpu"):
    """The whole set in order, as index tensors of one length, at most `size`."""
    return torch.arange(n, device=device).tensor_split(-(-n // size))
