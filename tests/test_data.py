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
from torchvision import datasets

import train
from lab.data import DIGITS, add_label_noise, batches, crop_and_flip, load


def test_digits_are_the_files_own_split_normalized_by_the_training_set():
    digits = load("digits")
    assert (
        digits.x.shape == (1437, 1, 8, 8)
        and digits.test_x.shape == (360, 1, 8, 8)
        and digits.classes == 10
    )
    assert digits.x.dtype == torch.uint8 and digits.y.dtype == torch.int64
    with np.load(DIGITS) as file:
        images, test = file["x"].astype(np.float64), file["test_x"].astype(np.float64)
        labels = np.concatenate([file["y"], file["test_y"]])
    mean, std = images.mean(), images.std(ddof=1)
    x = digits.normalized(digits.test_x)
    assert x.dtype == torch.float32 and np.allclose(x[:, 0].numpy(), (test - mean) / std, atol=1e-5)
    assert torch.equal(digits.inputs(torch.tensor([3, 5])), digits.normalized(digits.x[[3, 5]]))
    assert np.array_equal(torch.cat([digits.y, digits.test_y]).numpy(), labels)


def test_an_epoch_is_a_seeded_permutation_in_whole_batches():
    first, again = (
        torch.stack(list(batches(100, 16, torch.Generator().manual_seed(3)))) for _ in range(2)
    )
    assert first.shape == (6, 16) and len(first.unique()) == 96 and first.max() < 100
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(3)
    list(batches(100, 16, generator))
    assert not torch.equal(torch.stack(list(batches(100, 16, generator))), first)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        load("nowhere")


# ------------------------------------------------------------------------------------------------------------- torchvision's


def images(n, size=32):
    return np.random.default_rng().integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
    return hashlib.md5(content).hexdigest()


CIFAR = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels", "batches.meta", "label_names"),
    "cifar100": (["train"], "test", "fine_labels", "meta", "fine_label_names"),
}  # fmt: skip


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_placed_by_hand_is_read_by_torchvision(tmp_path, monkeypatch, name):
    """The python version's tar.gz: pickles of rows of 3072 bytes, red then green then blue."""
    kind, (train_parts, test_part, key, meta, names) = getattr(datasets, name.upper()), CIFAR[name]
    x, labels, md5 = images(12), [0, 9, 5, 7, 1, 2, 3, 4, 6, 8, 3, 4], {}
    if name == "cifar100":
        labels[1] = 99
    classes = [str(i) for i in range(int(name[5:]))]
    parts = dict(zip(train_parts, np.split(np.arange(10), len(train_parts)), strict=True))
    parts[test_part] = np.array([10, 11])
    with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
        for part, at in parts.items():
            rows = x[at].transpose(0, 3, 1, 2).reshape(len(at), -1)
            content = pickle.dumps({"data": rows, key: [labels[i] for i in at]})
            md5[part] = add(archive, f"{kind.base_folder}/{part}", content)
        md5[meta] = add(archive, f"{kind.base_folder}/{meta}", pickle.dumps({names: classes}))
    of_archive = hashlib.md5((tmp_path / kind.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "tgz_md5", of_archive)
    monkeypatch.setattr(kind, "train_list", [[part, md5[part]] for part in train_parts])
    monkeypatch.setattr(kind, "test_list", [[test_part, md5[test_part]]])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": names, "md5": md5[meta]})
    found = load(name, root=tmp_path)
    assert np.array_equal(found.x, x[:10].transpose(0, 3, 1, 2)) and found.y.tolist() == labels[:10]
    assert np.array_equal(found.test_x, x[10:].transpose(0, 3, 1, 2))
    assert found.test_y.tolist() == [3, 4] and found.classes == (100 if name == "cifar100" else 10)
    normal = found.normalized(found.x).double()
    assert normal.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 1e-5
    (tmp_path / kind.filename).unlink()  # the extracted files are enough
    assert torch.equal(load(name, root=tmp_path).x, found.x)
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/x")
    (tmp_path / kind.base_folder / train_parts[-1]).write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{name} cannot be downloaded"):
        load(name, root=tmp_path)


def test_svhn_calls_the_ten_a_zero(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    x, lists = images(6), dict(SVHN.split_list)
    for part, at, labels in (("train", slice(0, 4), [10, 9, 1, 2]), ("test", slice(4, 6), [3, 10])):
        name = lists[part][1]
        savemat(tmp_path / name, {"X": x[at].transpose(1, 2, 3, 0), "y": np.array(labels)[:, None]})
        lists[part] = [
            lists[part][0],
            name,
            hashlib.md5((tmp_path / name).read_bytes()).hexdigest(),
        ]
    monkeypatch.setattr(SVHN, "split_list", lists)
    found = load("svhn", root=tmp_path)
    assert found.y.tolist() == [0, 9, 1, 2] and found.test_y.tolist() == [3, 0]
    assert np.array_equal(found.x.numpy(), x[:4].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_where_a_download_is_impossible_one_line_says_how_to_place_the_files(
    tmp_path, monkeypatch, name
):
    kind, away = getattr(datasets, name.upper()), "http://127.0.0.1:9/x"
    if name == "svhn":
        files = {part: [away, *rest] for part, (_, *rest) in kind.split_list.items()}
        monkeypatch.setattr(kind, "split_list", files)
    else:
        monkeypatch.setattr(kind, "url", away)
    with pytest.raises(ValueError) as error:
        load(name, root=tmp_path / "root")
    text = str(error.value)
    assert (
        text.count("\n") == 0
        and f"{name} cannot be downloaded" in text
        and f"get {away} as {tmp_path / 'root'}" in text
    )


# ----------------------------------------------------------------------------------------------------------- what changes data


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
        ways = product(range(5), range(5), (0, 1))
        crops = {
            (dy, dx, flip): big[:, dy : dy + 16, dx : dx + 12][:, :, :: 1 - 2 * flip]
            for dy, dx, flip in ways
        }
        match = [how for how, crop in crops.items() if np.array_equal(crop, image)]
        assert match
        seen.add(match[0])
    assert len(seen) > 45 and len({flip for *_, flip in seen}) == 2


def test_a_channel_without_variance_stays_finite(tmp_path):
    found = arrays("colour")
    for name in ("x", "test_x"):
        found[name][:, 1] = 0
    np.savez(tmp_path / "mine.npz", **found)
    found = load(str(tmp_path / "mine.npz"))
    assert (found.normalized(found.x)[:, 1] == 0).all() and found.std[1] == 1


# --------------------------------------------------------------------------- numbers and tokens


@pytest.mark.parametrize("p", [2, 5, 31])
def test_modular_is_all_sums_and_the_same_split_each_time(p):
    one, two = load("modular", modulus=p), load("modular", modulus=p)
    x, y = torch.cat([one.x, one.test_x]), torch.cat([one.y, one.test_y])
    assert (
        len(x) == p * p
        and len(torch.unique(x, dim=0)) == p * p
        and len(one.x) == round(0.7 * p * p)
    )
    assert torch.equal(y, (x[:, 0] + x[:, 1]) % p) and (x[:, 2] == p).all()
    assert one.tokens == p + 1 and one.classes == p and torch.equal(one.x, two.x)
    assert torch.equal(one.inputs(torch.tensor([0])), one.x[:1])  # tokens stay whole numbers


@pytest.fixture
def read(tmp_path):
    """Write these arrays to a file and load it."""

    def read(found):
        np.savez(tmp_path / "mine.npz", **found)
        return load(str(tmp_path / "mine.npz"))

    return read


def arrays(kind="numbers", n=20, seed=0):
    rng = np.random.default_rng(seed)
    x = {
        "numbers": rng.normal(3, 2, (n, 5)),
        "images": rng.integers(0, 256, (n, 8, 8), dtype=np.uint8),
        "colour": rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8),
        "tokens": rng.integers(0, 7, (n, 4)),
    }[kind]
    y = np.arange(n) % 3
    return {"x": x, "y": y, "test_x": x[: n // 2], "test_y": y[: n // 2]}


@pytest.mark.parametrize("kind", ["numbers", "images", "colour", "tokens"])
def test_a_file_of_arrays_is_a_data_set(read, kind):
    found = arrays(kind)
    data = read(found)
    x = data.inputs(torch.arange(20))
    assert data.classes == 3 and len(data.test_x) == 10
    if kind == "tokens":
        assert torch.equal(x, torch.from_numpy(found["x"])) and data.tokens == found["x"].max() + 1
        return
    expected = torch.from_numpy(found["x"]).double()
    expected = expected[:, None] if kind == "images" else expected
    over = (0,) if kind == "numbers" else (0, 2, 3)
    expected = (expected - expected.mean(over, keepdim=True)) / expected.std(over, keepdim=True)
    assert x.dtype == torch.float32 and torch.allclose(x.double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["f2", "f4", ">f8", "i8", "u2", "?"])
@pytest.mark.parametrize("shape", [(8, 9), (2, 8, 9), (8, 9, 3)])
def test_images_of_any_type_and_order_are_those_of_float64(read, kind, shape):
    """[N, H, W], [N, C, H, W], [N, H, W, C]; each channel of mean 0 and deviation 1."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2 if kind == "?" else 200, (20, *shape)).astype(kind)
    data = read({**arrays(), "x": x, "test_x": x[:10]})
    expected = x.astype(float)
    if len(shape) == 2:
        expected = expected[:, None]
    elif shape[2] == 3:
        expected = expected.transpose(0, 3, 1, 2)
    mean = expected.mean((0, 2, 3), keepdims=True)
    expected = (expected - mean) / expected.std((0, 2, 3), keepdims=True, ddof=1)
    found = data.inputs(torch.arange(20))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert np.allclose(found, expected, atol=1e-5) and np.allclose(
        data.test_x, expected[:10], atol=1e-5
    )
    assert data.inputs(torch.arange(20), augment=True).shape == found.shape
    assert bool(data.notes) == (found.shape != x.shape)


def test_bytes_whose_channels_are_last_are_images(read):
    """[N, 8, 9, 3] was trained as 8 channels."""
    x = images(20, 8)[:, :, :7]
    data = read({**arrays(), "x": x, "test_x": x[:10]})
    assert data.x.dtype == torch.uint8 and np.array_equal(data.x, x.transpose(0, 3, 1, 2))
    assert np.array_equal(data.test_x, data.x[:10]) and data.mean.shape == (3, 1, 1)
    assert data.notes == ["x is read as images [N, channels, H, W] = [20, 3, 8, 7]"]


@pytest.mark.parametrize(
    "names", ["x_train y_train x_test y_test", "X_train y_train X_test y_test"]
)
def test_the_names_of_kerass_files_are_known(read, names):
    ours = arrays("images")
    data = read(dict(zip(names.split(), ours.values(), strict=True)))
    assert np.array_equal(data.x[:, 0], ours["x"]) and np.array_equal(data.test_y, ours["test_y"])


LABELS = [[1, 2], [17, 900000], [-1, 1], [0, 2, 7], [0, 1], [2**40, 2**41]]
LABELS += [["cat", "dog"], ["a", "z", "Ä"], [b"cat", b"dog"], [False, True]]


@pytest.mark.parametrize("known", LABELS)
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_are_renumbered_in_their_order(read, known, shape):
    """{17, 900000} made a network of 900,001 outputs, and chance counted classes that are not there."""
    which = np.random.default_rng(0).permutation(np.arange(20) % len(known))
    y, test_y = (
        np.array(known)[which].reshape(shape),
        np.array(known)[which[::-1][:10]].reshape(shape),
    )
    data = read(arrays() | {"y": y, "test_y": test_y})
    assert data.classes == len(known) and data.y.dtype == data.test_y.dtype == torch.int64
    assert data.y.tolist() == which.tolist() and data.test_y.tolist() == which[::-1][:10].tolist()
    text = [name.decode() if isinstance(name, bytes) else name for name in known]
    assert data.labels == (None if known == [0, 1] else text) and json.dumps(data.labels)


def test_many_classes_of_few_inputs_are_classes(read):
    found = arrays(n=200)
    data = read(found | {"y": np.arange(200) // 2, "test_y": np.arange(100)})
    assert data.classes == 100


def test_renumbered_labels_are_told_and_kept_and_chance_counts_the_classes_there_are(
    tmp_path, capsys
):
    """Coin tosses labelled {5, 6} were 43 % better than chance."""
    y = np.random.default_rng(0).integers(5, 7, 200)
    np.savez(tmp_path / "mine.npz", **arrays("images", 200) | {"y": y, "test_y": y[:100]})
    command = "--elr 1e-3 --epochs 1 --width 2 --jobs 1 --data {0}/mine.npz --out {0}/out"
    assert train.main(command.format(tmp_path).split()) == 0
    out = capsys.readouterr().out
    assert out.count("2 labels, 5 to 6, are the classes 0 to 1: see config.json\n") == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["labels"] == [5, 6]
    assert config["chance"]["0"]["train_error"]["mean"] == pytest.approx(0.5, abs=0.2)  # of 7: 0.86


def test_whole_numbers_are_said_to_be_tokens(tmp_path, capsys):
    """The error came from a matrix product alone."""
    np.savez(tmp_path / "mine.npz", **arrays("tokens"))
    code = "from torch import nn\ndef net(channels, classes): return nn.Linear(4, classes)"
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(SystemExit):
        train.main(f"--elr 1 --data {tmp_path}/mine.npz --model {tmp_path}/mine.py:net".split())
    out, err = capsys.readouterr()
    assert "read as tokens: if they are numbers, save x.astype(float)\n" in out and err


@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint64, np.int8, ">i4"])
def test_labels_of_any_whole_type(read, kind):
    y = np.arange(20) % 2
    data = read(arrays() | {"y": y.astype(kind), "test_y": y[:10].astype(kind)})
    assert data.y.tolist() == y.tolist() and data.classes == 2 and data.labels is None


def standardized(x, test_x):
    """In numpy's longest type, column by column, in units of the largest number."""
    columns = []
    for column, of_test in zip(x.T, test_x.T, strict=True):
        unit = np.abs(column).max()
        column, of_test = np.longdouble(column) / unit, np.longdouble(of_test) / unit
        mean = column[3] + (column - column[3]).mean()
        std = np.sqrt(((column - mean) ** 2).sum() / (len(column) - 1))
        columns.append((np.concatenate([column, of_test]) - mean) / std)
    return np.stack(columns, 1).astype(float)


def test_a_column_of_time_stamps_keeps_its_digits_and_large_numbers_do_not_overflow(read):
    """Of 400 Unix seconds float32 had 4 values left."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    columns = [1.7e9 + rng.permutation(400), 1e15 + rng.integers(0, 50, 400)]
    columns += [rng.normal(0, 1, 400), 1e-30 * rng.normal(5, 1, 400)]
    huge = [1e200 * rng.normal(0, 1, 400), 1.7e308 * rng.uniform(-1, 1, 400)]
    y = np.arange(400) % 2
    x = np.stack([*columns, *huge], 1)
    data = read(dict(x=x[:300], y=y[:300], test_x=x[300:], test_y=y[300:]))
    found = data.inputs(torch.arange(300)), data.normalized(data.test_x)
    assert found[0].dtype == found[1].dtype == torch.float32 and len(found[0][:, 0].unique()) == 300
    assert np.allclose(torch.cat(found), standardized(x[:300], x[300:]), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.7e9, -3e300])
def test_a_constant_column_of_numbers_becomes_0(read, value):
    """One that is constant but for a rounding, too."""
    found = arrays()
    found["x"][:, 2] = value
    found["x"][3, 2] = np.nextafter(value, 2 * value)
    found["test_x"] = found["x"][:10].copy()
    found["test_x"][0, 2] = 7.0
    data = read(found)
    assert (data.inputs(torch.arange(20))[:, 2] == 0).all() and (data.test_x[:, 2] == 0).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.longdouble, ">f8", ">f4"])
def test_floats_of_any_type_are_read_without_a_warning(read, kind):
    found = arrays()
    expected = torch.from_numpy(found["x"].astype(kind).astype(np.float64))
    expected = (expected - expected.mean(0)) / expected.std(0)
    for name in ("x", "test_x"):
        found[name] = np.asfortranarray(found[name].astype(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read(found)
    x = data.inputs(torch.arange(20))
    assert x.is_contiguous() and torch.allclose(x.double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [">i8", np.int16, np.uint32])
def test_tokens_of_any_whole_type_but_bytes(read, kind):
    found = arrays("tokens")
    for name in ("x", "test_x"):
        found[name] = np.asfortranarray(found[name].astype(kind))
    x = read(found).x
    assert x.dtype == torch.int64 and x.is_contiguous() and np.array_equal(x, found["x"])


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


RANDOM = np.random.default_rng(0)
MANY = arrays(n=1200)
WRONG = [
    (dict(x=None), "has no array x: it has y, test_x, test_y, and takes x, y, test_x, test_y"),
    (dict(test_y=None), "has no array test_y"),
    (dict(y=np.arange(20.0)), "the array y of type float64 and shape [20] must be 20 labels"),
    (dict(y=np.arange(19)), "and shape [19] must be 20 labels"),
    (dict(y=np.eye(20, dtype=int)), "and shape [20, 20] must be 20 labels: y.astype(int), ravel"),
    (dict(y=np.array(3)), "the array y of type int64 and shape [] must be 20 labels"),
    (dict(y=np.array(["a", None] * 10)), "the array y cannot be read (Object arrays"),
    (dict(test_y=np.array(["a"] * 10)), "the label a is in test_y, not in y"),
    (dict(test_y=np.arange(10)), "the label 3 is in test_y, not in y"),
    (MANY | dict(y=RANDOM.integers(0, 700, 1200)), "only classes can be trained"),
    (MANY | dict(y=RANDOM.normal(size=1200)), "the array y of type float64"),
    (dict(y=np.full(20, -1), test_y=np.full(10, -1)), "has a single class"),
    (dict(y=np.zeros(20, int), test_y=np.zeros(10, int)), "has a single class"),
    (dict(x=np.zeros((20, 5, 2, 3, 3))), "the array x of type float64 and shape [20, 5, 2, 3, 3] must"),
    (dict(x=np.full((20, 5), np.nan)), "the array x of type float64 and shape [20, 5] has nan or inf"),
    (dict(x=np.full((20, 5, 5), np.inf)), "and shape [20, 5, 5] has nan or inf"),
    (dict(test_x=np.where(np.eye(10, 5), np.inf, 1.0)), "test_x of type float64 and shape [10, 5] has nan"),
    (dict(test_x=np.full((10, 5), 1e300)), "test_x is too far from x for float32"),
    (dict(x=np.float32(3)), "the array x of type float32 and shape [] must be images"),
    (dict(x=np.zeros(20, dtype=[("a", float)])), "and shape [20] must be images"),
    (dict(x=np.zeros((20, 5), complex)), "must be images"),
    (dict(x=np.zeros((20, 64), np.uint8)), "must be images [N, (C,) H, W], floats [N, M] or tokens"),
    (dict(test_x=np.zeros((0, 5)), test_y=np.zeros(0, int)), "test_x of type float64 and shape [0, 5] is empty"),
    (dict(x=np.full((20, 5), -1)), "tokens below 0 or above a million: numbers are floats"),
    (dict(x=np.array(["a"] * 20)), "must be images"),
    (dict(x=np.zeros((0, 5)), y=np.zeros(0, int)), "the array x of type float64 and shape [0, 5] is empty"),
    (dict(test_x=np.zeros((10, 6))), "test_x of type float64 and shape [10, 6] is not of the kind"),
    (dict(test_x=np.zeros((10, 5), int)), "test_x of type int64 and shape [10, 5] is not of the kind"),
    (dict(x=np.array([Evil()] * 20, dtype=object)), "the array x cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_an_array_is_one_line_that_names_it(read, capsys, change, message):
    with pytest.raises(ValueError) as error:
        read({name: x for name, x in {**arrays(), **change}.items() if x is not None})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "mine.npz" in str(error.value) and not capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_what_is_no_file_of_arrays_is_one_line(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    for name in ("mine.npz", "none.npz"):
        with pytest.raises(ValueError, match=f"{name}: ") as error:
            load(str(tmp_path / name))
        assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short" * 1000, "is too short: it takes 10,000 characters"),
        (b"", "is too short"),
        (b"a" * 18_000 + b"b" * 2_000, "is too short"),  # nothing is left of the last tenth
        (b"a" * 20_000, "has a single class"),
        ("Käse ".encode("latin1") * 4000, "cannot be read as text in UTF-8 ('utf-8' codec"),
        ("text ".encode("utf-16") * 4000, "cannot be read as text in UTF-8"),
        (None, "cannot be read as text in UTF-8 ([Errno 2] No such file"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(str(tmp_path / "mine.txt"))
    assert message in str(error.value) and "mine.txt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_is_learned_by_the_transformer_of_its_own_accord(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("the cat sat on the mat. " * 900)
    command = "--elr 1e-3 --epochs 1 --batch-size 256 --width 16 --data {0}/mine.txt --out {0}/out"
    assert train.main(command.format(tmp_path).split()) == 0
    out = capsys.readouterr().out
    assert "21600 characters, 11 different ones, in windows of 16\n" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["options"]["model"] == "transformer" and len(config["labels"]) == 11
