"""Data sets as tensors that live on the device; a batch is an indexing there."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.own_data import PARTS, arrays, inputs, text

NAMES = ("digits", "modular", "cifar10", "cifar100", "svhn")
DIGITS = Path(__file__).parents[1] / "data" / "digits.npz"
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
        data = Data(*arrays(DIGITS))
    elif name == "modular":
        data = modular(modulus)
    elif name in NAMES:
        data = _download(name, root)
    elif path.suffix not in (".npz", ".txt"):
        raise ValueError(f"no data set {name!r}: choose {', '.join(NAMES)}, FILE.npz, FILE.txt")
    elif not path.is_file():
        raise ValueError(f"{name}: there is no such file")
    else:
        data = Data(*(text if path.suffix == ".txt" else arrays)(path))
    for part in PARTS:
        setattr(data, part, getattr(data, part).to(device))
    data.classes = int(max(data.y.max(), data.test_y.max())) + 1
    if data.classes < 2:
        raise ValueError(f"{name} has a single class: it takes two")
    if data.x.dtype == torch.int64:
        data.tokens = int(max(data.x.max(), data.test_x.max())) + 1
    else:
        normalize(data)
    return data


def normalize(data):
    """Mean 0 and deviation 1 over the training set, by column or channel; 0 where it is constant.
    Images uint8 stay so, and are normalized batch by batch."""
    over, parts = [0, 2, 3][: data.x.dim() - 1], (data.x.double(), data.test_x.double())
    low, high = (end(parts[0], over, keepdim=True) for end in (torch.amin, torch.amax))
    size = high - low  # the unit, so that squares neither vanish nor overflow
    constant = size <= torch.finfo(torch.float64).eps * low.abs()  # but for rounding
    size[constant] = 1
    std, mean = torch.std_mean((parts[0] - low) / size, over, keepdim=True)
    std[constant] = torch.inf
    if data.x.dtype == torch.uint8:
        data.mean, data.std = (low + size * mean)[0].float(), (size * std)[0].float()
    else:
        data.x, data.test_x = ((((x - low) / size - mean) / std).float() for x in parts)


def modular(p):
    """Addition modulo p: all pairs as tokens a, b and "=" (p); label (a + b) mod p. A random 70 %
    to train on, the same for every seed."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    x, y = torch.stack([a, b, torch.full_like(a, p)], 1), (a + b) % p
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
    train, test = order.tensor_split([round(0.7 * p * p)])
    return Data(x[train], y[train], x[test], y[test])


def _download(name, root):
    """A data set of torchvision, from `root` once it is there."""
    from torchvision import datasets

    kind, parts = getattr(datasets, name.upper()), []
    for half in ("train", "test") if name == "svhn" else (True, False):
        try:
            found = kind(root, half, download=True)
        except (OSError, RuntimeError) as error:  # a wrong checksum is a RuntimeError
            url = kind.split_list[half][0] if name == "svhn" else kind.url
            place = f"put {url} into {root} by hand"
            raise ValueError(f"{name} cannot be downloaded ({error}): {place}") from None
        labels = found.labels if name == "svhn" else found.targets
        parts += [torch.from_numpy(inputs(found.data, [])), torch.as_tensor(labels).long()]
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


class RandomNumbers:
    """The random numbers of a run, all from its seed: the `order` of its batches, and torch's,
    numpy's and Python's, from which a network may draw. A checkpoint has them as a state."""

    def __init__(self, seed):
        self.order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def of_torch(self):
        return [self.order, torch.default_generator, *torch.cuda.default_generators]

    def state_dict(self):
        kind, keys, *rest = np.random.get_state()
        state = dict(numpy=[kind, keys.tolist(), *rest], python=random.getstate())
        return state | dict(torch=[generator.get_state() for generator in self.of_torch()])

    def load_state_dict(self, state):
        for generator, of_generator in zip(self.of_torch(), state["torch"], strict=False):
            generator.set_state(of_generator.cpu())
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
