"""What is drawn: no empty panel, no legend upon a curve, no warning, whatever the logs hold."""

import math
import warnings

import numpy as np
import pytest

import regimes
from lab import figures

HEADER = "epoch step elr train_loss train_error test_error grad_norm angle".split()
pytestmark = pytest.mark.draws


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, without a warning on the way."""
    found, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda fig, *rest: found.append(fig) or save(fig, *rest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def write(path, elr=1e-2, last=0.5, moves=False, columns=HEADER):
    lines = [",".join(columns)]
    for epoch in range(13):
        share = last ** (epoch / 12)
        row = [epoch, 9 * epoch, elr * share if moves else elr, 2 * share, *[0.9 * share] * 2]
        row = dict(zip(HEADER, [*row, 30 * share, 0.1 * share], strict=True))
        lines.append(",".join(f"{row.get(column, 1):g}" for column in columns))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def titles(fig):
    panels = [ax for ax in fig.axes if ax.get_title("left")]
    for ax in panels:
        assert ax.has_data() and ax.get_legend() is None and ax.get_xlabel()
    found = [ax.get_title("left").partition(") ")[2] for ax in panels]
    assert not any("_" in title.replace("$λ_{max}$", "") for title in found)
    return found


def labels(fig):
    return {text.get_text() for text in fig.legends[0].get_texts()}


@pytest.mark.parametrize(("kind", "values"), [("elr", 1), ("elr", 3), ("angle", 3), ("lr", 3)])
def test_the_panels_follow_from_the_runs(tmp_path, drawn, kind, values):
    for value in range(1, 1 + values):
        for seed in ("", ".seed=1"):
            path = tmp_path / f"{kind}={value}e-02{seed}.csv"
            write(path, value / 100, 0.1 * value, moves=kind != "elr")
            write(path.with_suffix(".then=1e-03.csv"), 1e-3)
            path.with_suffix(".then=1e-03.layers.csv").write_text("epoch,layer,norm\n0,a,1\n")
    assert figures.main([str(tmp_path)]) == 0
    (fig,) = drawn
    last = "effective gradient norm γ" if kind == "elr" else "ELR"
    epochs = ["train loss (nats)", "test error", last]
    loss = fig.axes[3 if values == 3 else 0]
    assert titles(fig)[-3:] == epochs
    assert max(line.get_xdata()[-1] for line in loss.lines) == 24  # the second runs lie behind
    assert "--then" in loss.get_xlabel()
    if values == 3:
        assert "mean ± s.e." in titles(fig)[1] and "test, then at 1e-03" in labels(fig)
        (test,) = [x for x in fig.axes[1].containers if x.get_label() == "test"]
        assert list(test.lines[0].get_xdata()) == [0.01, 0.02, 0.03]
        assert test.lines[0].get_ydata() == pytest.approx([0.09, 0.18, 0.27], rel=0.1)


@pytest.mark.parametrize(
    ("last", "columns"),
    [(0.0, HEADER), (math.nan, HEADER), (math.inf, HEADER[:5]), (1.0, ["epoch", "train_loss"])],
)
def test_whatever_a_log_holds_it_is_drawn(tmp_path, drawn, last, columns):
    """Also into a folder that is to be made."""
    folder, out = tmp_path / "数字 $x_1^ \n net", tmp_path / "new" / "folder"
    for name in ("log", "_other"):
        write(folder / f"{name}.csv", last=last, columns=columns)
    assert figures.main([str(folder), "--out", str(out)]) == 0
    assert (out / "regimes.png").stat().st_size > 10_000
    heading = drawn[0].legends[0].get_title().get_text()
    assert "\\u6570\\u5b57" in heading and r"\$x_1^" in heading
    if "elr" not in columns:
        assert {"log", "other"} <= labels(drawn[0])


def test_two_folders_are_not_taken_for_seeds_of_one(tmp_path, drawn):
    for folder in ("one", "two"):
        for elr in (0.01, 0.02):
            write(tmp_path / folder / f"elr={elr:.0e}.csv", elr)
    write(tmp_path / "two" / "other.csv", columns=["epoch", "train_loss"])  # has a row of its own
    assert figures.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert {"ELR (one)", "ELR (two)"} <= {ax.get_xlabel() for ax in drawn[0].axes}
    assert len(titles(drawn[0])) == 13 and (tmp_path / "one" / "regimes.png").exists()


def test_every_logarithmic_axis_has_two_ticks_and_all_that_was_drawn():
    seed = np.random.SeedSequence().entropy
    random = np.random.default_rng(seed)
    ax = figures.subplots([["a"]], 3)[1]["a"]
    for width in 20 * [0.05, 1, 2, 7]:  # powers of ten
        values = 10 ** (random.uniform(-9, 6) + width * np.sort(random.random(5)))
        values[0] *= random.integers(2)
        ax.clear()
        ax.plot(values, values)
        figures.logarithmic(ax)
        figures.tick(ax.yaxis)
        low, high = ax.get_ylim()
        assert low <= values[0] and values[-1] <= high
        ticks = [x for x in ax.get_yticks() if low <= x <= high]
        texts = ax.yaxis.get_major_formatter().format_ticks(ticks)
        assert 2 <= len(set(texts)) == len(texts) <= 8, (seed, values, texts)
        if values[0] > 0:  # and they are not all at one end
            assert ticks[-1] / ticks[0] > (high / low) ** 0.4, (seed, values, texts)


def test_an_error_axis_is_no_larger_than_the_errors(tmp_path, drawn):
    write(tmp_path / "elr=1e-02.csv")  # 0.9 to 0.45
    assert figures.main([str(tmp_path)]) == 0
    low, high = drawn[0].axes[1].get_ylim()
    assert 0.3 < low < 0.45 and 0.9 < high < 1.3


def loop(melts):
    """A loop that freezes around 0.003, and melts where it is said."""
    grid = np.geomspace(1, 1e-4, 25)
    elr, up = np.concatenate([grid[:1], grid, grid[::-1]]), np.arange(51) > 25
    loss = np.minimum(2500, 6000 * elr**0.5) ** (1 / (1 + (0.003 / elr) ** 2))
    loss = 1e-3 * np.where(up & (elr < melts), 1, loss)
    loss *= np.exp(0.02 * np.random.default_rng(0).standard_normal(51))
    error = np.minimum(loss / 2.5, 1) * 0.9
    log = {"epoch": np.arange(51.0), "elr": elr, "angle": np.minimum(1.5, 30 * elr)}
    return log | {"train_loss": loss, "train_error": error, "test_error": error}


def test_a_loop_has_two_legs_and_bands(tmp_path, drawn):
    chance = {"train_loss": {"mean": 2.5}, "train_error": {"mean": 0.9}}
    runs = [
        regimes.Logged(tmp_path, math.nan, 0, loop(x), regimes.Verdict(), chance)
        for x in (0.02, 0.04)
    ]
    figures.of_loop(runs, tmp_path / "a.png", "name")
    assert titles(drawn[0]) == ["train loss (nats)", "test error", "angle φ (radians)"]
    expected = {"ELR goes down", "ELR goes up", "metastable", "chance", "convergence"}
    assert expected | {"chaotic equilibrium", "divergence"} <= labels(drawn[0])
    found = {line.get_label(): line for line in drawn[0].axes[0].lines}
    down, up = (found[f"ELR goes {leg}"].get_ydata() for leg in ("down", "up"))
    elrs = found["ELR goes up"].get_xdata()
    frozen = (elrs > 0.005) & (elrs < 0.015)
    assert (down[frozen] > 50 * up[frozen]).all() and np.allclose(down[-8:], up[-8:], rtol=0.3)
    bars = {text.get_text().strip() for text in drawn[0].axes[0].texts}
    assert bars == {"freezes", "melts", "divergence"}
