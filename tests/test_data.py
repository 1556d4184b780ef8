"""The data sets, in the real formats of small files that these tests make."""

import json
import warnings
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import experiment, refused
from scipy.io import savemat
from torchvision import datasets

from lab.data import DIGITS, add_label_noise, batches, crop_and_flip, load


def test_digits_are_the_files_split_normalized_by_the_training_set():
    digits = load("digits")
    assert digits.x.shape == (1437, 1, 8, 8) and digits.x.dtype == torch.uint8
    assert digits.classes == 10 and not digits.notes
    with np.load(DIGITS) as file:
        images, test = file["x"].astype(np.float64), file["test_x"].astype(np.float64)
        assert np.array_equal(digits.y, file["y"]) and np.array_equal(digits.test_y, file["test_y"])
    x, expected = digits.normalized(digits.test_x), (test - images.mean()) / images.std(ddof=1)
    assert x.dtype == torch.float32 and np.allclose(x[:, 0], expected, atol=1e-5)
    assert torch.equal(digits.inputs(torch.tensor([3, 5])), digits.normalized(digits.x[[3, 5]]))


def test_an_epoch_is_a_seeded_permutation_in_whole_batches():
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    orders = [torch.stack(list(batches(100, 16, generator))) for generator in (one, one, two)]
    assert orders[0].shape == (6, 16) and len(orders[0].unique()) == 96 and orders[0].max() < 100
    assert not torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])


# --- torchvision's


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
CHANNELS_FIRST = IMAGES.transpose(0, 3, 1, 2)


def test_cifars_channels_come_first(monkeypatch):
    def cifar(root, train, download):
        if train:
            return SimpleNamespace(data=IMAGES[:4], targets=[0, 99, 5, 7])
        return SimpleNamespace(data=IMAGES[4:], targets=[0, 99])

    monkeypatch.setattr(datasets, "CIFAR100", cifar)
    found = load("cifar100")
    assert np.array_equal(found.x, CHANNELS_FIRST[:4]) and found.y.tolist() == [0, 99, 5, 7]
    assert np.array_equal(found.test_x, CHANNELS_FIRST[4:])
    assert found.test_y.tolist() == [0, 99] and found.classes == 100


def test_svhn_calls_the_ten_a_zero(tmp_path, monkeypatch):
    for part, at, labels in (("train", slice(0, 4), [10, 9, 1, 2]), ("test", slice(4, 6), [3, 10])):
        x, y = IMAGES[at].transpose(1, 2, 3, 0), np.array(labels)[:, None]
        savemat(tmp_path / datasets.SVHN.split_list[part][1], {"X": x, "y": y})
    for module in (datasets.utils, datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    found = load("svhn", root=tmp_path)
    assert found.y.tolist() == [0, 9, 1, 2] and found.test_y.tolist() == [3, 0]
    assert np.array_equal(found.x, CHANNELS_FIRST[:4])


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_without_a_download_one_line_says_where_files_go(tmp_path, monkeypatch, name):
    kind, away = getattr(datasets, name.upper()), "http://127.0.0.1:9/x"
    files = {part: [away, part, ""] for part in ("train", "test")}
    monkeypatch.setattr(kind, "split_list", files, raising=False)
    monkeypatch.setattr(kind, "url", away, raising=False)
    with pytest.raises(ValueError, match=f"{name} cannot be downloaded") as error:
        load(name, root=tmp_path / "root")
    assert "\n" not in str(error.value)
    assert f"put {away}" in str(error.value) and f"into {tmp_path}/root by" in str(error.value)


# --- what changes data


def test_label_noise_is_random_but_always_the_same():
    full, some, again = load("digits"), load("digits"), load("digits")
    add_label_noise(some, 0.3)
    add_label_noise(again, 0.3)
    wrong = some.y != full.y
    assert wrong.sum() == round(0.3 * 1437) and torch.equal(some.y, again.y)
    assert len(((some.y - full.y) % 10)[wrong].unique()) == 9  # every other label occurs
    assert torch.equal(some.test_y, full.test_y)


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror():
    x = torch.randint(1, 256, (400, 2, 16, 12), dtype=torch.uint8)
    out = crop_and_flip(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for image, big in zip(out.numpy(), padded, strict=True):
        crops = {}
        for dy, dx, flip in product(range(5), range(5), (1, -1)):
            crop = big[:, dy : dy + 16, dx : dx + 12][:, :, ::flip]
            crops[crop.tobytes()] = dy, dx, flip
        seen.add(crops[image.tobytes()])
    assert len(seen) > 45


@pytest.mark.parametrize("p", [2, 31])
def test_modular_is_all_sums_and_the_same_split_each_time(p):
    one, two = load("modular", p), load("modular", p)
    x, y = torch.cat([one.x, one.test_x]), torch.cat([one.y, one.test_y])
    assert len(x) == len(torch.unique(x, dim=0)) == p * p and len(one.x) == round(0.7 * p * p)
    assert torch.equal(y, (x[:, 0] + x[:, 1]) % p) and (x[:, 2] == p).all()
    assert one.tokens == p + 1 and one.classes == p and torch.equal(one.x, two.x)
    assert torch.equal(one.inputs(torch.tensor([0])), one.x[:1])  # tokens stay whole numbers


# --- files of arrays


@pytest.fixture
def read(tmp_path):
    def read(found):
        np.savez(tmp_path / "mine.npz", **found)
        return load(str(tmp_path / "mine.npz"))

    return read


def arrays(x=None, n=20):
    if x is None:
        x = np.random.default_rng(0).normal(3, 2, (n, 5))
    y = np.arange(n) % 3
    return {"x": x, "y": y, "test_x": x[: n // 2], "test_y": y[: n // 2]}


def draw(kind, *shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 2 if kind == "?" else 120, (20, *shape)).astype(kind)


# Where the channels are: of two small ends, or none, at the first, unless that is not square.
SHAPES = {(5,): None, (8, 9): None, (2, 8, 9): "first", (8, 9, 2): "last", (8, 7, 1): "last"}
SHAPES |= {(8, 8, 5): "last", (4, 4, 3): "last", (5, 8, 8): "first", (8, 9, 5): "first"}
SHAPES |= {(3, 8, 4): "first"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["f2", ">f8", "u1", "i8", "?"])
def test_images_of_any_type_and_order_are_those_of_float64(read, kind, shape):
    """And floats [N, M]: each channel or column has mean 0 and deviation 1, without a warning."""
    x, channels = draw(kind, *shape), SHAPES[shape]
    if len(shape) == 1:
        x = x.astype("f4")  # whole numbers are tokens
    expected = x.astype(float)
    if len(shape) == 2:
        expected = expected[:, None]
    if channels == "last":
        expected = expected.transpose(0, 3, 1, 2)
    over = (0, 2, 3)[: expected.ndim - 1]
    expected -= expected.mean(over, keepdims=True)
    expected /= expected.std(over, keepdims=True, ddof=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read(arrays(np.asfortranarray(x)))
    found = data.inputs(torch.arange(20))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(data.normalized(data.test_x), expected[:10], atol=1e-5)
    order = {"first": "channels, H, W", "last": "H, W, channels"}
    told = f"x is read as images [N, {order.get(channels)}], {expected.shape[1]} channels"
    assert [note.partition(":")[0] for note in data.notes] == [told] * (channels is not None)


@pytest.mark.parametrize("kind", [">i8", np.uint32, np.int8])
def test_whole_numbers_are_tokens_and_keras_names_are_known(read, kind):
    x = np.asfortranarray(draw(kind, 4))
    names = "x_train Y_train X_test y_test".split()
    data = read(dict(zip(names, arrays(x).values(), strict=True)))
    assert data.x.dtype == torch.int64 and data.x.is_contiguous() and np.array_equal(data.x, x)
    assert data.tokens == x.max() + 1 and "are read as tokens" in data.notes[0]
    assert np.array_equal(data.test_x, x[:10]) and np.array_equal(data.y, np.arange(20) % 3)


LABELS = [[17, 900000], [-1, 1], [0, 2, 7], [0, 1], [2**40, 2**41], ["cat", "dog"]]
LABELS += [["a", "z", "Ä"], [False, True], [0.0, 1.0], [-1.0, 1.0, 3.0]]
LABELS += [np.array([0, 1], kind) for kind in (">i4", np.uint64, np.float16)]
LABELS += [np.char.encode(["cat", "Ä"], "utf-8")]


@pytest.mark.parametrize("known", LABELS)
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_are_renumbered_in_their_order(read, known, shape):
    which = np.random.default_rng(0).permutation(np.arange(20) % len(known))
    y = np.array(known)[which].reshape(shape)
    data = read(arrays() | {"y": y, "test_y": y[::-1][:10]})
    assert data.classes == len(known) and data.y.dtype == data.test_y.dtype == torch.int64
    assert data.y.tolist() == which.tolist() and data.test_y.tolist() == which[::-1][:10].tolist()
    if y.dtype.kind == "S":
        known = ["cat", "Ä"]
    assert data.labels == (None if list(known) == [0, 1] else known) and json.dumps(data.labels)
    assert bool(data.notes) == bool(data.labels)


def test_many_classes_of_few_inputs_are_classes(read):
    data = read(arrays(n=200) | {"y": np.arange(200) // 2, "test_y": np.arange(100)})
    assert data.classes == 100


def test_renumbered_labels_are_told_and_kept(tmp_path, capsys):
    y = np.arange(20) % 3 + 5
    np.savez(tmp_path / "mine.npz", **arrays(draw("u1", 8, 8)) | {"y": y, "test_y": y[:10]})
    experiment(f"--elr 1e-3 --width 2 --data {tmp_path}/mine.npz", tmp_path / "out")
    told = "3 labels, 5 to 7, are the classes 0 to 2: see config.json\n"
    assert capsys.readouterr().out.count(told) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["labels"] == [5, 6, 7]


def test_a_column_of_time_stamps_keeps_its_digits(read):
    """Of 400 Unix seconds float32 had 4 values left."""
    rng = np.random.default_rng(0)
    columns = [1.7e9 + rng.permutation(400), 1e12 + rng.permutation(400)]
    columns += [1e-30 * rng.normal(5, 1, 400), 1e90 * rng.normal(0, 1, 400)]
    columns += [1e15 + rng.integers(2, size=400), 1e-200 * rng.normal(5, 1, 400)]
    x, y = np.stack(columns, 1), np.arange(400) % 2
    data = read(dict(x=x[:300], y=y[:300], test_x=x[300:], test_y=y[300:]))
    found = torch.cat([data.inputs(torch.arange(300)), data.normalized(data.test_x)])
    assert found.dtype == torch.float32 and len(found[:300, 0].unique()) == 300
    x = np.longdouble(x) - np.longdouble(x[3])
    expected = (x - x[:300].mean(0)) / x[:300].std(0, ddof=1)
    assert np.allclose(found, expected.astype(float), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.7e9, -3e80])
def test_a_constant_column_of_numbers_becomes_0(read, value):
    """One that is constant but for a rounding, too, and a channel."""
    found = arrays()
    found["x"][:, 2] = value
    found["x"][3, 2] = np.nextafter(value, 2 * value)
    found["test_x"] = found["x"][:10].copy()
    found["test_x"][0, 2] = 7.0
    data = read(found)
    assert (data.inputs(torch.arange(20))[:, 2] == 0).all() and (data.test_x[:, 2] == 0).all()
    images = draw("u1", 3, 8, 8)
    images[:, 1] = 5
    x = read(arrays(images)).inputs(torch.arange(20))
    assert (x[:, 1] == 0).all() and x[:, 2].std() > 0.9


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


MANY = arrays(n=1200)
WRONG = [
    (dict(x=None), "has y, test_x, test_y: it takes x, y, test_x, test_y, each once"),
    (dict(X_train=np.zeros((20, 5))), "has x, y, test_x, test_y, X_train: it takes"),
    (dict(y=np.arange(20) / 2), "the array y of type float64 and shape [20] has fractions or nan"),
    (dict(y=np.array([1e300, np.inf] * 10)), "has fractions or nan"),
    (dict(y=np.array([b"\xff"] * 20)), 'is no UTF-8: save np.char.decode(y, "latin-1")'),
    (dict(y=np.arange(19)), "and shape [19] must be 20 labels"),
    (dict(y=np.eye(20, dtype=int)), "and shape [20, 20] must be 20 labels"),
    (dict(test_y=np.arange(10)), "the label 3 is in test_y, not in y"),
    (MANY | dict(y=np.arange(1200) * 7 % 1000), "only classes can be trained"),
    (dict(y=np.zeros(20, int), test_y=np.zeros(10, int)), "has a single class"),
    (dict(x=np.zeros((20, 5, 2, 3, 3))), "and shape [20, 5, 2, 3, 3] must be images"),
    (dict(x=np.float32(3)), "the array x of type float32 and shape [] must be images"),
    (dict(x=np.zeros((20, 5), complex)), "must be images [N, (C,) H, W], floats [N, M] or tokens"),
    (dict(x=np.zeros((20, 64), np.uint8)), "must be images [N, (C,) H, W], floats"),
    (dict(x=np.full((20, 5), np.nan)), "the array x of type float64 and shape [20, 5] has nan"),
    (dict(test_x=np.where(np.eye(10, 5), 1e200, 1.0)), "has nan, inf or more than 1e100"),
    (dict(x=np.full((20, 5), -1)), "tokens below 0 or above a million: numbers are floats"),
    (dict(x=np.full((20, 5), 10**7)), "tokens below 0 or above a million: numbers are floats"),
    (dict(x=np.zeros((0, 5)), y=np.zeros(0, int)), "and shape [0, 5] is empty"),
    (dict(test_x=np.zeros((10, 6))), "test_x is not of the kind and shape of x"),
    (dict(test_x=np.zeros((10, 5), int)), "test_x is not of the kind and shape of x"),
    (dict(x=np.array([Evil()] * 20, dtype=object)), "Object arrays cannot be loaded when allow_"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_an_array_is_one_line_that_names_it(read, capsys, change, message):
    with pytest.raises(ValueError) as error:
        read({name: x for name, x in {**arrays(), **change}.items() if x is not None})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "mine.npz" in str(error.value) and not capsys.readouterr().out


# --- a text


def test_a_text_is_windows_of_characters_and_the_next_one(tmp_path):
    """This one counts up; in the last tenth, of which is the test set, down."""
    path = tmp_path / "mine.txt"
    path.write_text("0123456789" * 1800 + "9876543210ß" * 182, encoding="utf-8-sig")
    data, again = load(str(path)), load(str(path))
    assert data.x.shape == (20_000, 16) and data.test_x.shape == (4_000, 16)
    assert data.labels == list("0123456789") and data.tokens == data.classes == 10
    for x, y, change in ((data.x, data.y, 1), (data.test_x, data.test_y, 9)):
        windows = torch.cat([x, y[:, None]], 1)
        assert ((windows[:, 1:] - windows[:, :-1]) % 10 == change).all()
        assert len(x[:, 0].unique()) == 10
    assert torch.equal(data.x, again.x) and torch.equal(data.test_y, again.test_y)
    assert data.notes[0] == "20002 characters, 10 different ones, in windows of 16"
    assert data.notes[1] == "left out, as only the last tenth has them: 'ß'"


FILES = [
    ("none.txt", None, "none.txt: there is no such file"),
    ("mine.csv", b"x,y", "no data set 'mine.csv': choose digits, modular,"),
    ("mine.npz", b"", "mine.npz is no .npz file of numbers and text"),
    ("mine.npz", b"x,y\n1,2\n", "mine.npz is no .npz file of numbers and text"),
    ("mine.npz", b"PK\x03\x04junk", "mine.npz is no .npz file of numbers and text"),
    ("mine.txt", b"too short" * 1111, "mine.txt is too short: it takes 10,000 characters"),
    ("mine.txt", b"a" * 18_000 + b"b" * 2_000, "mine.txt is too short"),  # of known ones
    ("mine.txt", b"a" * 20_000, "mine.txt has a single class"),
    ("mine.txt", "Käse ".encode("latin1") * 4000, "mine.txt cannot be read as text in UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_what_is_no_data_is_one_line(tmp_path, monkeypatch, capsys, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = refused(capsys, f"--elr 1 --data {name}")
    assert f"argument --data: {message}" in error and "Errno" not in error
