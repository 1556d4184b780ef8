import pytest

from regimes import elr_name
from sweep import grid


def test_the_grid_is_even_in_the_logarithm_and_its_names_read_back():
    elrs = grid(1e-4, 1, 13)
    assert elrs[0] == 1e-4 and elrs[-1] == 1 and len(elrs) == 13
    assert all(
        b / a == pytest.approx(10 ** (1 / 3), rel=0.01)
        for a, b in zip(elrs, elrs[1:], strict=False)
    )
    assert all(float(elr_name(elr)) == elr for elr in elrs)
    assert [elr_name(elr) for elr in elrs[:2]] == ["1e-04", "2.15e-04"]
