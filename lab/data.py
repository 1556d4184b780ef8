"""Data sets as tensors that live on the device; a batch is an indexing there."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = Path(__file__).parents[1] / "data" / "digits.npz"
NAMES = ("digits", "modular", "cifar10", "cifar100", "svhn")


@dataclass
class Data:
    """Inputs x and labels y [N] int64, to train and to test on. x are images [N, channels, H, W]
    uint8, numbers [N, features] float32, normalized, or tokens [N, T] int64, of which there are
    `tokens`. mean, std: of training images, per channel. labels: a file's, if not 0, 1, 2, …"""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: Tensor | None = None
    std: Tensor | None = None
    tokens: int | None = None
    labels: list | None = None

    def inputs(self, index, augment=False):
        """The training inputs at these indices, normalized."""
        x = self.x[index]
        return self.normalized(crop_and_flip(x) if augment else x)

    def normalized(self, x):
        """A copy: float32 of mean 0 and deviation 1; tokens as they are."""
        return x.clone() if self.mean is None else (x - self.mean) / self.std


def load(name: str, modulus: int = 31, device: str = "cpu", root: str = "data") -> Data:
    """The data set `name`, one of NAMES or a file .npz, on `device`; downloads go to `root`. Raises
    ValueError where it cannot be read. digits: 1,797 of 8×8, Alpaydin and Kaynak (UCI, 1998), as
    in scikit-learn, 1,437 to train on."""
    if name == "digits":
        parts = _npz(DIGITS)
    elif name == "modular":
        parts = modular(modulus)
    elif name in NAMES:
        parts = _download(name, Path(root))
    elif name.endswith(".npz"):
        parts = _npz(Path(name))
    else:
        raise ValueError(f"no data set {name!r}: choose {', '.join(NAMES)} or a file .npz")
    x, y, test_x, test_y = parts
    labels = None
    if name.endswith(".npz"):
        if x.dtype == torch.float64:
            x, test_x = standardized(x, test_x)
            if not test_x.isfinite().all():
                raise ValueError(f"{name}: test_x is too far from x for float32")
        known, y = y.unique(return_inverse=True)
        lacking = test_y[~torch.isin(test_y, known)].tolist()
        if lacking:
            raise ValueError(f"{name}: the label {lacking[0]} is in test_y, not in y")
        test_y = torch.searchsorted(known, test_y)
        if len(known) <= known[-1] or known[0] < 0:
            labels = known.tolist()
    classes = int(max(y.max(), test_y.max())) + 1
    if classes < 2:
        raise ValueError(f"{name} has a single class: it takes two")
    data = Data(*(part.to(device) for part in (x, y, test_x, test_y)), classes, labels=labels)
    if x.dtype == torch.int64:
        data.tokens = int(max(x.max(), test_x.max())) + 1
    if x.dtype == torch.uint8:  # the values are counted
        counts = [torch.bincount(c.flatten(), minlength=256) for c in x.unbind(1)]
        counts, values = torch.stack(counts).double(), torch.arange(256, dtype=torch.float64)
        n = counts.sum(1)
        mean = (counts @ values / n)[:, None]
        std = ((counts * (values - mean) ** 2).sum(1) / (n - 1)).sqrt()
        std = torch.where(std > 0, std, 1)
        data.mean, data.std = (part.float().view(-1, 1, 1).to(device) for part in (mean, std))
    return data


def standardized(x, test_x):
    """[N, M] as float32 of mean 0 and deviation 1 in x; a constant column as 0."""
    least = 1e-15 * x.abs().amax(0)  # rounding
    # Of time stamps only the last digits differ; quarters fit float64.
    x, test_x = x / 4 - x[0] / 4, test_x / 4 - x[0] / 4
    scale = x.abs().amax(0)
    scale[scale <= least] = torch.inf
    x, test_x = x / scale, test_x / scale
    mean, std = x.mean(0), x.std(0).clamp(min=1e-300)
    return ((x - mean) / std).float(), ((test_x - mean) / std).float()


def modular(p):
    """Addition modulo p: all pairs as tokens a, b and "=" (p); label (a + b) mod p. A random 70 %
    to train on, the same for every seed."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    x, y = torch.stack([a, b, torch.full_like(a, p)], 1), (a + b) % p
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
    train, test = order[: round(0.7 * p * p)], order[round(0.7 * p * p) :]
    return [x[train], y[train], x[test], y[test]]


def _npz(path):
    """[x, y, test_x, test_y] from a file of these."""
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ("x", "y", "test_x", "test_y"):
                arrays[name] = None  # in an error
                arrays[name] = file[name]
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except KeyError:
        raise ValueError(f"{path} has no array {name}: it takes x, y, test_x, test_y") from None
    except Exception as error:  # damage can show anywhere
        what = f"the array {name} cannot be read" if arrays else "it is no .npz file"
        raise ValueError(f"{path}: {what} ({str(error)[:100]})".replace("\n", " ")) from None
    parts, first = [], arrays["x"]
    for name in ("x", "test_x"):
        x, y = arrays[name], arrays[name.replace("x", "y")]
        image = x.dtype == np.uint8 and x.ndim in (3, 4)
        number = x.dtype.kind == "f" and x.ndim == 2
        token = x.dtype.kind in "iu" and x.ndim == 2 and x.dtype != np.uint8
        what, wrong = f"{path}: the array {name} of type {x.dtype} and shape {list(x.shape)}", ""
        if not x.size:
            wrong = "is empty"
        elif not (image or number or token):
            wrong = "must be images uint8 [N, (C,) H, W], floats [N, M] or tokens int64 [N, T]"
        elif number and not np.isfinite(x).all():
            wrong = f"has nan or inf in column {np.isfinite(x).all(0).argmin()}"
        elif token and (x.min() < 0 or x.max() > 10**6):
            wrong = "has tokens below 0 or above a million: numbers are floats"
        elif x.shape[1:] != first.shape[1:] or x.dtype.kind != first.dtype.kind:
            wrong = "is not of the kind and shape of x"
        elif y.dtype.kind not in "biu" or y.shape != x.shape[:1]:
            what = f"{path}: the array {name.replace('x', 'y')} of type {y.dtype}"
            wrong = f"and shape {list(y.shape)} must be labels [N]: y.astype(int), ravel, argmax"
        if wrong:
            raise ValueError(f"{what} {wrong}")
        x = x[:, None] if image and x.ndim == 3 else x
        kind = np.uint8 if image else np.float64 if number else np.int64
        parts += [x.astype(kind, order="C"), y.astype(np.int64)]
    return list(map(torch.from_numpy, parts))


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
