"""Data sets as uint8 tensors that live on the device; a batch is an indexing, normalized and augmented there.

data = load("cifar10", root="data", device="cuda")
x, y = data.images(index), data.y[index]
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

DIGITS = Path(__file__).parent / "data" / "digits.npz"
NAMES = ("digits", "cifar10", "cifar100", "svhn")


@dataclass
class Data:
    """Images [N, channels, H, W] uint8 and labels [N] int64, to train on and to test on; `noisy` [N] bool says which training
    labels `add_label_noise` has changed. mean, std: [channels, 1, 1] float32, of the training images."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: Tensor
    std: Tensor
    noisy: Tensor | None = None

    def images(self, index: Tensor, augment: bool = False) -> Tensor:
        """The training images at these indices, normalized: [len(index), channels, H, W] float32."""
        x = self.x[index]
        return self.normalized(crop_and_flip(x) if augment else x)

    def normalized(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std


def load(name: str, root: Path | str = "data", image_size: int | None = None, device: torch.device | str = "cpu") -> Data:
    """The data set `name`, on `device`: digits, cifar10, cifar100, svhn, or a folder with `train/` and `test/`, each a folder of
    class folders of images, which are brought to image_size × image_size.

    digits are 1,797 images of handwritten digits, 8×8 with values 0 to 16, by Alpaydin and Kaynak (UCI, 1998), as scikit-learn
    ships them: the first 1,437 to train on, the other 360 to test. What torchvision downloads or decodes is kept in `root` as one
    file of uint8 tensors and read from there the next time. Raises ValueError for a name that is no data set, for images that
    cannot be read, and where a download is impossible.
    """
    if name == "digits":
        with np.load(DIGITS) as file:
            x, y = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"]).long()
        parts = [x[:1437], y[:1437], x[1437:], y[1437:]]
    elif name in NAMES:
        parts = _cached(Path(root) / f"{name}.pt", lambda: _download(name, Path(root)))
    elif Path(name).is_dir():
        parts = _folder(Path(name), Path(root), image_size)
    else:
        raise ValueError(f"no data set {name!r}: choose {', '.join(NAMES)}, or a folder with train/ and test/")
    # Exact moments, in little memory: of each channel the values are counted.
    counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in parts[0].unbind(1)]).double()
    values, n = torch.arange(256, dtype=torch.float64), counts.sum(1)
    mean = counts @ values / n
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / (n - 1)).sqrt()
    moments = (m[:, None, None].float().to(device) for m in (mean, torch.where(std > 0, std, 1)))
    return Data(*(t.to(device) for t in parts), int(parts[1].max()) + 1, *moments)


def _cached(path: Path, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """[x, y, test_x, test_y] from the file, which is made first if it is not there."""
    if not path.exists():
        parts = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        torch.save(parts, temporary)
        os.replace(temporary, path)
    try:
        parts = torch.load(path, weights_only=True)
        if [t.dtype for t in parts] != [torch.uint8, torch.int64] * 2:
            raise ValueError
    except Exception:
        raise ValueError(f"{path} is damaged: remove it, and it will be made again") from None
    return parts


def _download(name: str, root: Path) -> list[Tensor]:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN}[name]
    options = [dict(split=part) if name == "svhn" else dict(train=part == "train") for part in ("train", "test")]
    files = [kind.split_list[p][:2] for p in ("train", "test")] if name == "svhn" else [(kind.url, kind.filename)]
    try:
        sets = [kind(root, download=True, **o) for o in options]
    except (ImportError, OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        where = " and ".join(f"{url} as {root / file}" for url, file in files)
        raise ValueError(f"{name} cannot be downloaded ({error}): get {where} by hand, then run this again") from None
    images = [torch.from_numpy(s.data if name == "svhn" else s.data.transpose(0, 3, 1, 2).copy()) for s in sets]
    labels = [torch.as_tensor(s.labels if name == "svhn" else s.targets).long() for s in sets]
    return [images[0], labels[0], images[1], labels[1]]


def _folder(path: Path, root: Path, size: int | None) -> list[Tensor]:
    from torchvision.datasets import ImageFolder

    try:
        sets = [ImageFolder(path / part) for part in ("train", "test")]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {error}: it takes train/ and test/, each with a folder of images per class") from None
    if sets[0].classes != sets[1].classes:
        raise ValueError(f"{path}: train/ has the classes {sets[0].classes}, test/ {sets[1].classes}: they must be the same")

    def decode() -> list[Tensor]:
        parts, shape = [], (size, size) if size else None
        for part in sets:
            images = None
            for i in tqdm(range(len(part)), desc=f"reading {part.root}", unit="image", disable=None):
                file, _ = part.samples[i]
                try:
                    image = part.loader(file)
                except OSError as error:
                    raise ValueError(f"{file} cannot be read as an image ({error})") from None
                shape = shape or image.size  # (width, height)
                if image.size != shape:
                    if not size:
                        raise ValueError(f"{file} is {image.size}, others {shape}: bring all to one size with --image-size")
                    image = image.resize(shape)
                if images is None:
                    images = np.empty((len(part), 3, shape[1], shape[0]), dtype=np.uint8)
                images[i] = np.asarray(image).transpose(2, 0, 1)
            parts += [torch.from_numpy(images), torch.tensor(part.targets)]
        return parts

    files = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for part in sets for file, _ in part.samples]
    state = hashlib.sha256(repr((size, files)).encode()).hexdigest()[:12]  # of other files or another size, another cache
    return _cached(root / f"{path.resolve().name}-{state}.pt", decode)


def subset(data: Data, n: int) -> None:
    """Keep n training images, drawn at random, the same for every seed of a run; the normalization stays that of all."""
    keep = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))[:n].sort().values.to(data.x.device)
    data.x, data.y = data.x[keep], data.y[keep]


def add_label_noise(data: Data, share: float) -> None:
    """Give round(share · N) training images, drawn at random, another label than theirs, the same for every seed of a run."""
    generator, n = torch.Generator().manual_seed(1), len(data.y)
    chosen = torch.randperm(n, generator=generator)[: round(share * n)].to(data.y.device)
    shift = torch.randint(1, data.classes, (len(chosen),), generator=generator).to(data.y.device)
    data.y, data.noisy = data.y.clone(), torch.zeros(n, dtype=torch.bool, device=data.y.device)
    data.y[chosen] = (data.y[chosen] + shift) % data.classes
    data.noisy[chosen] = True


def crop_and_flip(x: Tensor) -> Tensor:
    """Of images [N, channels, H, W], each its own random crop of the image padded with zeros by H/8 (4 pixels at 32), and half of
    them flipped left to right; one gather, on their device."""
    n, _, height, width = x.shape
    pad = max(1, height // 8)
    shift = torch.randint(2 * pad + 1, (2, n, 1), device=x.device)
    rows = shift[0] + torch.arange(height, device=x.device)
    columns = shift[1] + torch.arange(width, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def batches(n: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """The epoch's batches as index tensors [size]: a fresh permutation of n, without the last, incomplete batch."""
    order = torch.randperm(n, generator=generator).to(device)
    return iter(order[: n - n % size].split(size))


def chunks(n: int, size: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """The whole set in its own order, as index tensors of equal length, at most `size`."""
    return list(torch.arange(n, device=device).tensor_split(-(-n // size)))
