"""Data sets as tensors that live on the device; a batch is an indexing."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIGITS = Path(__file__).parent / "data" / "digits.npz"


@dataclass
class Data:
    """Images [N, channels, H, W] float32, standardized with the training set's mean and deviation; labels [N] int64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(name: str, device: torch.device | str = "cpu") -> Data:
    """The data set `name`, on `device`. Raises ValueError for a name that is no data set.

    digits: 1,797 images of handwritten digits, 8×8 with values 0 to 16, by Alpaydin and Kaynak (UCI, 1998), as scikit-learn
    ships them: the first 1,437 to train on, the other 360 to test.
    """
    if name != "digits":
        raise ValueError(f"no data set {name!r}: choose digits")
    with np.load(DIGITS) as file:
        images = torch.from_numpy(file["images"])[:, None].float()
        labels = torch.from_numpy(file["labels"]).long()
    x, test_x = images[:1437], images[1437:]
    mean, std = x.mean(), x.std()
    x, test_x = (x - mean) / std, (test_x - mean) / std
    return Data(*(t.to(device) for t in (x, labels[:1437], test_x, labels[1437:])), classes=10)


def batches(n: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """The epoch's batches as index tensors [size]: a fresh permutation of n, without the last, incomplete batch."""
    order = torch.randperm(n, generator=generator).to(device)
    return iter(order[: n - n % size].split(size))
