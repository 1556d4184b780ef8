"""What is drawn: no empty panel, no legend upon a curve, no warning, whatever the logs hold."""

import math
import warnings

import numpy as np
import pytest

import regimes
from lab import figures

COLUMNS = "epoch step elr train_loss train_error test_error grad_norm angle".split()
pytestmark = pytest.mark.draws


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as they are closed, without a warning on the way."""
    import matplotlib.pyplot as plt

    found, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda fig: found.append(fig) or close(fig))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def write(path, elr=1e-2, last=0.5, moves=False, columns=COLUMNS):
    lines = [",".join(columns)]
    for epoch in range(13):
        share = last ** (epoch / 12)
        row = [epoch, 9 * epoch, elr * share if moves else elr, 2 * share, *[0.9 * share] * 2]
        row += [30 * share, 0.1 * share]
        row = dict(zip(COLUMNS, row, strict=True))
        lines.append(",".join(f"{row.get(column, 1):g}" for column in columns))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def titles(fig):
    for ax in fig.axes[:-1]:
        assert ax.has_data()
        assert ax.get_legend() is None
    return [ax.get_title("left").partition(") ")[2] for ax in fig.axes if ax.get_title("left")]


@pytest.mark.parametrize("kind", ["elr", "angle", "lr"])
@pytest.mark.parametrize("values", [1, 3])
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
    if values == 1:
        assert titles(fig) == epochs
    else:
        assert titles(fig)[3:] == epochs and "mean ± s.e." in titles(fig)[1]
        errors = fig.axes[1].get_legend_handles_labels()[1]
        then = "angle" if kind == "angle" else "ELR"
        assert f"test, then {then} 1e-03" in errors
        (test,) = [x for x in fig.axes[1].containers if x.get_label() == "test"]
        assert list(test.lines[0].get_xdata()) == [0.01, 0.02, 0.03]
        assert test.lines[0].get_ydata() == pytest.approx([0.09, 0.18, 0.27], rel=0.1)
    loss = fig.axes[-4 if values == 3 else 0]
    assert max(line.get_xdata()[-1] for line in loss.lines) == 24  # the second runs lie behind


@pytest.mark.parametrize("last", [0.0, math.nan, math.inf, 1.0, 0.999])
@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[:1] + COLUMNS[3:4], COLUMNS[:5]])
def test_whatever_a_log_holds_it_is_drawn(tmp_path, drawn, last, columns):
    """Also one without an ELR, which was told to be written and was not."""
    folder = tmp_path / "数字 $x_1^ \n net"
    for name in ("log", "_other"):
        write(folder / f"{name}.csv", last=last, columns=columns)
    assert figures.main([str(folder)]) == 0
    assert figures.main([str(folder / "log.csv")]) == 0
    assert (folder / "regimes.png").stat().st_size > 10_000
    heading = drawn[0].legends[0].get_title().get_text()
    assert "\\u6570\\u5b57" in heading and "$x_1^" in heading
    assert len(drawn) == 2


@pytest.mark.parametrize("high", [1.3, 3, 12, 90, 1e6])
def test_an_axis_has_at_least_two_ticks(tmp_path, drawn, high):
    fig, axes = figures.subplots([["a"]], 3)
    axes["a"].plot([1.1, high], [0.011, 0.011 * high])
    axes["a"].set(xscale="log", yscale="log")
    figures.save(fig, tmp_path / "a.png")
    for axis in (axes["a"].xaxis, axes["a"].yaxis):
        low, high = axis.get_view_interval()
        assert sum(low <= tick <= high for tick in axis.get_majorticklocs()) >= 2


def loop(melts):
    """A loop that freezes at 0.003, and melts where it is said."""
    grid = np.geomspace(1, 1e-4, 25)
    elr, leg = np.concatenate([grid[:1], grid, grid[::-1]]), np.array(["down"] * 26 + ["up"] * 25)
    cold = elr < np.where(leg == "down", 0.003, melts)
    log = {"epoch": np.arange(51.0), "elr": elr, "leg": leg, "angle": np.minimum(1.5, 30 * elr)}
    return log | {"train_loss": np.where(cold, 1e-3, 2.0), "test_error": np.where(cold, 0.0, 0.7)}


def test_a_loop_has_two_legs_and_bands(tmp_path, drawn):
    loops = [loop(0.01), loop(0.02)]
    verdict = dict(freezes=(2e-3, 4e-3), melts=(0.01, 0.02), coexistence=(4e-3, 0.01))
    verdict |= dict(divergence=(0.1, 0.2), reversible=None)
    chance = {"train_loss": {"mean": 2.5}, "train_error": {"mean": 0.9}}
    figures.of_loop(loops, tmp_path / "a.png", "name", verdict, chance)
    figures.of_loop(loops, tmp_path / "b.png", "name", regimes.Verdict())
    assert titles(drawn[0]) == ["train loss (nats)", "test error", "angle φ (radians)"]
    handles, labels = drawn[0].axes[0].get_legend_handles_labels()
    legs = {line.get_label(): line for line in drawn[0].axes[0].lines}
    for leg, direction in (("down", -1), ("up", 1)):
        assert (np.diff(legs[f"ELR goes {leg}"].get_xdata()) * direction > 0).all()
    assert {"convergence", "chaotic equilibrium", "divergence", "metastable"} <= set(labels)
    assert "undecided" in drawn[1].axes[0].get_legend_handles_labels()[1]
