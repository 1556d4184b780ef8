"""The data sets, in the real formats of small files that these tests make."""

import hashlib
import io
import json
import pickle
import tarfile
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from helpers import experiment, refused, run, words
from torchvision import datasets

from lab.data import DIGITS, add_label_noise, batches, crop_and_flip, load


def test_digits_are_the_files_own_split_normalized_by_the_training_set():
    digits = load("digits")
    assert digits.x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
    assert digits.x.dtype == torch.uint8 and digits.y.dtype == torch.int64
    assert digits.classes == 10 and not digits.notes
    with np.load(DIGITS) as file:
        images, test = file["x"].astype(np.float64), file["test_x"].astype(np.float64)
        labels = np.concatenate([file["y"], file["test_y"]])
    x, expected = digits.normalized(digits.test_x), (test - images.mean()) / images.std(ddof=1)
    assert x.dtype == torch.float32 and np.allclose(x[:, 0].numpy(), expected, atol=1e-5)
    assert torch.equal(digits.inputs(torch.tensor([3, 5])), digits.normalized(digits.x[[3, 5]]))
    assert np.array_equal(torch.cat([digits.y, digits.test_y]).numpy(), labels)


def test_an_epoch_is_a_seeded_permutation_in_whole_batches():
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.stack(list(batches(100, 16, generator))) for _ in range(2))
    assert first.shape == (6, 16) and len(first.unique()) == 96 and first.max() < 100
    assert not torch.equal(second, first)
    again = torch.stack(list(batches(100, 16, torch.Generator().manual_seed(3))))
    assert torch.equal(first, again)


# ---------------------------------------------------------------------------------- torchvision's


def images(n, size=32):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_cifar_placed_by_hand_is_read_by_torchvision(tmp_path, monkeypatch):
    """The python version's tar.gz: pickles of rows of 3072 bytes, red then green then blue."""
    kind = datasets.CIFAR100
    x, labels, md5 = images(12), [0, 99, 5, 7, 1, 2, 3, 4, 6, 8, 3, 4], {}
    rows = x.transpose(0, 3, 1, 2).reshape(12, -1)
    contents = {
        "train": {"data": rows[:10], "fine_labels": labels[:10]},
        "test": {"data": rows[10:], "fine_labels": labels[10:]},
        "meta": {"fine_label_names": [str(i) for i in range(100)]},
    }
    with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
        for name, content in contents.items():
            content = pickle.dumps(content)
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size, md5[name] = len(content), hashlib.md5(content).hexdigest()
            archive.addfile(info, io.BytesIO(content))
    of_archive = hashlib.md5((tmp_path / kind.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "tgz_md5", of_archive)
    monkeypatch.setattr(kind, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5["meta"]})
    found = load("cifar100", root=tmp_path)
    assert np.array_equal(found.x, x[:10].transpose(0, 3, 1, 2)) and found.y.tolist() == labels[:10]
    assert np.array_equal(found.test_x, x[10:].transpose(0, 3, 1, 2))
    assert found.test_y.tolist() == [3, 4] and found.classes == 100
    normal = found.normalized(found.x).double()
    assert normal.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_svhn_calls_the_ten_a_zero(tmp_path, monkeypatch):
    from scipy.io import savemat

    x, lists = images(6), dict(datasets.SVHN.split_list)
    for part, at, labels in (("train", slice(0, 4), [10, 9, 1, 2]), ("test", slice(4, 6), [3, 10])):
        url, name, _ = lists[part]
        savemat(tmp_path / name, {"X": x[at].transpose(1, 2, 3, 0), "y": np.array(labels)[:, None]})
        lists[part] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    found = load("svhn", root=tmp_path)
    assert found.y.tolist() == [0, 9, 1, 2] and found.test_y.tolist() == [3, 0]
    assert np.array_equal(found.x.numpy(), x[:4].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_where_a_download_is_impossible_one_line_says_how_to_place_the_files(
    tmp_path, monkeypatch, name
):
    kind, away = getattr(datasets, name.upper()), "http://127.0.0.1:9/x"
    if name == "svhn":
        files = {part: [away, *rest] for part, (_, *rest) in kind.split_list.items()}
        monkeypatch.setattr(kind, "split_list", files)
    else:
        monkeypatch.setattr(kind, "url", away)
    with pytest.raises(ValueError, match=f"{name} cannot be downloaded") as error:
        load(name, root=tmp_path / "root")
    assert "\n" not in str(error.value) and f"get {away} as {tmp_path}/root" in str(error.value)


# ----------------------------------------------------------------------------- what changes data


def test_label_noise_is_random_but_always_the_same():
    full, some, again = load("digits"), load("digits"), load("digits")
    add_label_noise(some, 0.3)
    add_label_noise(again, 0.3)
    wrong = some.y != full.y
    assert wrong.sum() == round(0.3 * 1437) and torch.equal(some.y, again.y)
    assert len(((some.y - full.y) % 10)[wrong].unique()) == 9  # every other label occurs
    assert torch.equal(some.test_y, full.test_y)


def test_augmentation_is_a_crop_of_the_padded_image_and_half_the_time_flipped():
    x = torch.randint(1, 256, (400, 2, 16, 12), dtype=torch.uint8)
    out = crop_and_flip(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for image, big in zip(out.numpy(), padded, strict=True):
        match = []
        for dy, dx, flip in product(range(5), range(5), (0, 1)):
            crop = big[:, dy : dy + 16, dx : dx + 12][:, :, :: 1 - 2 * flip]
            if np.array_equal(crop, image):
                match.append((dy, dx, flip))
        seen.add(match[0])
    assert len(seen) > 45 and len({flip for *_, flip in seen}) == 2


@pytest.mark.parametrize("p", [2, 31])
def test_modular_is_all_sums_and_the_same_split_each_time(p):
    one, two = load("modular", modulus=p), load("modular", modulus=p)
    x, y = torch.cat([one.x, one.test_x]), torch.cat([one.y, one.test_y])
    assert len(x) == len(torch.unique(x, dim=0)) == p * p and len(one.x) == round(0.7 * p * p)
    assert torch.equal(y, (x[:, 0] + x[:, 1]) % p) and (x[:, 2] == p).all()
    assert one.tokens == p + 1 and one.classes == p and torch.equal(one.x, two.x)
    assert torch.equal(one.inputs(torch.tensor([0])), one.x[:1])  # tokens stay whole numbers


# ------------------------------------------------------------------------------- files of arrays


@pytest.fixture
def read(tmp_path):
    """Write these arrays to a file and load it."""

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


@pytest.mark.parametrize("kind", ["u1", "f2", "f4", ">f8", "i8", "?"])
@pytest.mark.parametrize("shape", [(8, 9), (2, 8, 9), (8, 9, 3), (8, 7, 1)])
def test_images_of_any_type_and_order_are_those_of_float64(read, kind, shape):
    """[N, H, W], [N, C, H, W], [N, H, W, C]; each channel of mean 0 and deviation 1."""
    x = draw(kind, *shape)
    data = read(arrays(x))
    expected = x.astype(float)
    if len(shape) == 2:
        expected = expected[:, None]
    elif shape[2] in (1, 3):
        expected = expected.transpose(0, 3, 1, 2)
    mean = expected.mean((0, 2, 3), keepdims=True)
    expected = (expected - mean) / expected.std((0, 2, 3), keepdims=True, ddof=1)
    found = data.inputs(torch.arange(20))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(data.normalized(data.test_x), expected[:10], atol=1e-5)
    assert data.inputs(torch.arange(20), augment=True).shape == found.shape
    assert bool(data.notes) == (shape[-1] in (1, 3))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, ">f8"])
def test_floats_of_any_type_are_read_without_a_warning(read, kind):
    x = np.asfortranarray(arrays()["x"].astype(kind))
    expected = torch.from_numpy(x.astype(np.float64))
    expected = (expected - expected.mean(0)) / expected.std(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(arrays(x)).inputs(torch.arange(20))
    assert found.is_contiguous() and torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [np.int64, ">i8", np.int16, np.uint32])
def test_tokens_of_any_whole_type_but_bytes(read, kind):
    x = np.asfortranarray(draw(kind, 4))
    data = read(arrays(x))
    assert data.x.dtype == torch.int64 and data.x.is_contiguous() and np.array_equal(data.x, x)
    assert data.tokens == x.max() + 1 and "are read as tokens" in data.notes[0]


@pytest.mark.parametrize(
    "names", ["x_train y_train x_test y_test", "X_train Y_train X_test Y_test"]
)
def test_the_names_of_kerass_files_are_known(read, names):
    ours = arrays(draw("u1", 8, 8))
    data = read(dict(zip(names.split(), ours.values(), strict=True)))
    assert np.array_equal(data.x[:, 0], ours["x"]) and np.array_equal(data.test_y, ours["test_y"])


LABELS = [[1, 2], [17, 900000], [-1, 1], [0, 2, 7], [0, 1], [2**40, 2**41]]
LABELS += [["cat", "dog"], ["a", "z", "Ä"], [False, True], np.array([0, 1], ">i4")]
LABELS += [np.array([0, 1], np.uint64)]


@pytest.mark.parametrize("known", LABELS)
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_are_renumbered_in_their_order(read, known, shape):
    """{17, 900000} made a network of 900,001 outputs, and chance counted classes that are not there."""
    which = np.random.default_rng(0).permutation(np.arange(20) % len(known))
    y = np.array(known)[which].reshape(shape)
    data = read(arrays() | {"y": y, "test_y": y[::-1][:10]})
    assert data.classes == len(known) and data.y.dtype == data.test_y.dtype == torch.int64
    assert data.y.tolist() == which.tolist() and data.test_y.tolist() == which[::-1][:10].tolist()
    expected = None if list(known) == [0, 1] else known
    assert data.labels == expected and json.dumps(data.labels)
    assert bool(data.notes) == (expected is not None)


def test_many_classes_of_few_inputs_are_classes(read):
    data = read(arrays(n=200) | {"y": np.arange(200) // 2, "test_y": np.arange(100)})
    assert data.classes == 100


def test_renumbered_labels_are_told_and_kept_and_chance_counts_the_classes_there_are(
    tmp_path, capsys
):
    """Coin tosses labelled {5, 6} were 43 % better than chance."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (200, 8, 8), dtype=np.uint8), rng.integers(5, 7, 200)
    np.savez(tmp_path / "mine.npz", x=x, y=y, test_x=x, test_y=y)
    command = f"--elr 1e-3 --epochs 1 --width 2 --jobs 1 --data {tmp_path}/mine.npz"
    assert run(command, tmp_path / "out") == 0
    told = "2 labels, 5 to 6, are the classes 0 to 1: see config.json\n"
    assert capsys.readouterr().out.count(told) == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["labels"] == [5, 6]
    assert config["chance"]["0"]["train_error"]["mean"] == pytest.approx(0.5, abs=0.2)  # of 7: 0.86


def test_a_column_of_time_stamps_keeps_its_digits(read):
    """Of 400 Unix seconds float32 had 4 values left."""
    rng = np.random.default_rng(0)
    columns = [1.7e9 + rng.permutation(400), 1e15 + rng.integers(0, 50, 400)]
    columns += [rng.normal(0, 1, 400), 1e-30 * rng.normal(5, 1, 400), 1e90 * rng.normal(0, 1, 400)]
    x, y = np.stack(columns, 1), np.arange(400) % 2
    data = read(dict(x=x[:300], y=y[:300], test_x=x[300:], test_y=y[300:]))
    found = torch.cat([data.inputs(torch.arange(300)), data.normalized(data.test_x)])
    assert found.dtype == torch.float32 and len(found[:300, 0].unique()) == 300
    x = np.longdouble(x) - np.longdouble(x[3])
    expected = (x - x[:300].mean(0)) / x[:300].std(0, ddof=1)
    assert np.allclose(found, expected.astype(float), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.7e9, -3e80])
def test_a_constant_column_of_numbers_becomes_0(read, value):
    """One that is constant but for a rounding, too."""
    found = arrays()
    found["x"][:, 2] = value
    found["x"][3, 2] = np.nextafter(value, 2 * value)
    found["test_x"] = found["x"][:10].copy()
    found["test_x"][0, 2] = 7.0
    data = read(found)
    assert (data.inputs(torch.arange(20))[:, 2] == 0).all() and (data.test_x[:, 2] == 0).all()


def test_a_channel_without_variance_stays_finite(read):
    x = draw("u1", 3, 8, 8)
    x[:, 1] = 0
    found = read(arrays(x))
    assert (found.normalized(found.x)[:, 1] == 0).all() and found.std[1] == 1


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


RANDOM = np.random.default_rng(0)
MANY = arrays(n=1200)
WRONG = [
    (dict(x=None), "has no array x: it has y, test_x, test_y, and takes x, y, test_x, test_y"),
    (dict(y=np.arange(20.0)), "the array y of type float64 and shape [20] must be 20 labels, whole numbers or text: y.astype(int)"),
    (dict(y=np.arange(19)), "and shape [19] must be 20 labels"),
    (dict(y=np.eye(20, dtype=int)), "and shape [20, 20] must be 20 labels"),
    (dict(test_y=np.array(["a"] * 10)), "the label a is in test_y, not in y"),
    (MANY | dict(y=RANDOM.integers(0, 700, 1200)), "only classes can be trained"),
    (dict(y=np.zeros(20, int), test_y=np.zeros(10, int)), "has a single class"),
    (dict(x=np.zeros((20, 5, 2, 3, 3))), "the array x of type float64 and shape [20, 5, 2, 3, 3] must be images"),
    (dict(x=np.full((20, 5), np.nan)), "the array x of type float64 and shape [20, 5] has nan"),
    (dict(x=np.full((20, 5, 5), np.inf)), "and shape [20, 5, 5] has nan, inf or more"),
    (dict(test_x=np.where(np.eye(10, 5), 1e200, 1.0)), "test_x of type float64 and shape [10, 5] has nan, inf or more than 1e100 in column 0"),
    (dict(x=np.float32(3)), "the array x of type float32 and shape [] must be images"),
    (dict(x=np.zeros((20, 5), complex)), "must be images"),
    (dict(x=np.zeros((20, 64), np.uint8)), "must be images [N, (C,) H, W], floats [N, M] or tokens"),
    (dict(x=np.full((20, 5), -1)), "tokens below 0 or above a million: numbers are floats"),
    (dict(x=np.zeros((0, 5)), y=np.zeros(0, int)), "the array x of type float64 and shape [0, 5] is empty"),
    (dict(test_x=np.zeros((10, 6))), "test_x is not of the kind and shape of x"),
    (dict(test_x=np.zeros((10, 5), int)), "test_x is not of the kind and shape of x"),
    (dict(x=np.array([Evil()] * 20, dtype=object)), "no .npz file of numbers and text"),
    (dict(y=np.array(["a", None] * 10)), "(objects: save x.astype(str))"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_an_array_is_one_line_that_names_it(read, capsys, change, message):
    with pytest.raises(ValueError) as error:
        read({name: x for name, x in {**arrays(), **change}.items() if x is not None})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "mine.npz" in str(error.value) and not capsys.readouterr().out


# -------------------------------------------------------------------------------------- a text


def test_a_text_is_windows_of_characters_and_the_next_one(tmp_path):
    """In a text that counts, the next character follows from the window."""
    path = tmp_path / "mine.txt"
    digits = "".join(f"{i % 10}" for i in range(20_000)) + "0123456789ß" * 200
    path.write_text(digits, encoding="utf-8-sig")
    data, again = load(str(path)), load(str(path))
    assert data.x.shape == (20_000, 16) and data.test_x.shape == (4_000, 16)
    assert data.labels == list("0123456789") and data.tokens == data.classes == 10
    for x, y in ((data.x, data.y), (data.test_x, data.test_y)):
        windows = torch.cat([x, y[:, None]], 1)
        assert ((windows[:, 1:] - windows[:, :-1]) % 10 == 1).all()
        assert len(x[:, 0].unique()) == 10
    assert torch.equal(data.x, again.x) and torch.equal(data.test_y, again.test_y)
    assert data.notes[0] == "22200 characters, 10 different ones, in windows of 16"
    assert data.notes[1] == "left out, as only the last tenth has them: 'ß'"


def test_train_and_test_windows_come_from_different_parts_of_the_text(tmp_path):
    (tmp_path / "mine.txt").write_text("ab" + "a" * 17_998 + "b" * 2_000)
    data = load(str(tmp_path / "mine.txt"))
    assert (data.x == 0).double().mean() > 0.99 and (data.test_x == 1).all()


def test_a_text_gets_the_transformer_of_its_own_accord(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("the cat sat on the mat. " * 900)
    made = experiment(words(f"--elr 1e-3 --width 8 --data {tmp_path}/mine.txt", tmp_path / "out"))
    assert "21600 characters, 11 different ones, in windows of 16\n" in capsys.readouterr().out
    assert made.config.model == "transformer" and len(made.layer_groups) == 9


FILES = [
    ("none.txt", None, "none.txt: there is no such file"),
    ("none.npz", None, "none.npz: there is no such file"),
    ("mine.csv", b"x,y", "no data set 'mine.csv': choose digits, modular,"),
    ("mine.npz", b"", "mine.npz is damaged, or no .npz file"),
    ("mine.npz", b"x,y\n1,2\n", "mine.npz is damaged, or no .npz file"),
    ("mine.npz", b"PK\x03\x04junk", "mine.npz is damaged, or no .npz file"),
    ("mine.txt", b"too short" * 1000, "mine.txt is too short: it takes 10,000 characters"),
    ("mine.txt", b"a" * 18_000 + b"b" * 2_000, "mine.txt is too short"),  # of known ones
    ("mine.txt", b"a" * 20_000, "mine.txt has a single class"),
    ("mine.txt", "Käse ".encode("latin1") * 4000, "mine.txt cannot be read as text in UTF-8"),
    ("mine.txt", "text ".encode("utf-16") * 4000, "mine.txt cannot be read as text in UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_what_is_no_data_is_one_line(tmp_path, monkeypatch, capsys, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = refused(capsys, f"--elr 1 --data {name}")
    assert f"argument --data: {message}" in error and "Errno" not in error
