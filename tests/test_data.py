import numpy as np
import pytest
import torch

from data import DIGITS, batches, load


def test_digits_are_the_files_own_split_standardized_by_the_training_set():
    data = load("digits")
    assert data.x.shape == (1437, 1, 8, 8) and data.test_x.shape == (360, 1, 8, 8) and data.classes == 10
    assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64
    with np.load(DIGITS) as file:
        images, labels = file["images"].astype(np.float64), file["labels"]
    mean, std = images[:1437].mean(), images[:1437].std(ddof=1)
    assert np.allclose(data.test_x[:, 0].numpy(), (images[1437:] - mean) / std, atol=1e-5)
    assert np.array_equal(torch.cat([data.y, data.test_y]).numpy(), labels)


def test_an_epoch_is_a_seeded_permutation_in_whole_batches():
    first, again = (torch.stack(list(batches(100, 16, torch.Generator().manual_seed(3)))) for _ in range(2))
    assert first.shape == (6, 16) and len(first.unique()) == 96 and first.max() < 100
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(3)
    list(batches(100, 16, generator))
    assert not torch.equal(torch.stack(list(batches(100, 16, generator))), first)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        load("nowhere")
