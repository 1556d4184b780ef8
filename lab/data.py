"""Data sets as tensors that live on the device; a batch is an indexing there."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab import files

DIGITS = Path(__file__).parents[1] / "data" / "digits.npz"
CHUNK = 512  # inputs at once outside of training
NAMES = ("digits", "modular", "cifar10", "cifar100", "svhn")


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
        data = Data(**files.arrays(DIGITS) | {"notes": []})
    elif name == "modular":
        data = Data(*modular(modulus))
    elif name in NAMES:
        data = Data(*_download(name, Path(root)))
    elif name.endswith(".npz"):
        data = Data(**files.arrays(Path(name)))
    elif name.endswith(".txt"):
        data = Data(**files.text(Path(name)))
    else:
        raise ValueError(f"no data set {name!r}: choose {', '.join(NAMES)}, FILE.npz, FILE.txt")
    for part in ("x", "y", "test_x", "test_y"):
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
    return [x[train], y[train], x[test], y[test]]


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


def chunks(n, device="cpu"):
    """The whole set in order, as index tensors of one length, at most CHUNK."""
    return torch.arange(n, device=device).tensor_split(-(-n // CHUNK))
