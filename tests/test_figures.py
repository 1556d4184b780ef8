"""What is drawn: no empty panel, no legend upon a curve, no warning, whatever the logs hold."""

import math
import re
import warnings
from itertools import product

import numpy as np
import pytest
from matplotlib.figure import Figure

import regimes
from lab import figures, style
from lab.loop import Loop

HEADER = "epoch step elr train_loss train_error test_error grad_norm angle".split()
pytestmark = pytest.mark.draws
savefig = Figure.savefig


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are laid out, without a warning on the way."""
    found, save = [], style.save
    monkeypatch.setattr(style, "save", lambda fig, *rest: found.append(fig) or save(fig, *rest))
    monkeypatch.setattr(Figure, "savefig", lambda fig, *_, **__: fig.draw_without_rendering())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def write(path, elr=1e-2, last=0.5, moves=False, columns=HEADER, epochs=12):
    lines = [",".join(columns)]
    for epoch in range(epochs + 1):
        share = last ** (epoch / epochs)
        row = [epoch, 9 * epoch, elr * share if moves else elr, 2 * share, *[0.9 * share] * 2]
        row = dict(zip(HEADER, [*row, 30 * share, min(0.1 * share, 1.5)], strict=True))
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


def test_of_several_seeds_the_median_is_bold_as_long_as_most_go_on(tmp_path, drawn):
    for seed, (last, epochs) in enumerate([(0.1, 12), (0.2, 12), (0.4, 24)]):
        write(tmp_path / f"elr=1e-02.seed={seed}.csv", last=last, epochs=epochs)
    assert figures.main([str(tmp_path)]) == 0
    loss = drawn[0].axes[0]
    bold, *thin = sorted(loss.lines, key=lambda line: -line.get_linewidth())
    assert [len(line.get_xdata()) for line in thin] == [13, 13, 25]
    curves = [line.get_ydata()[:13] for line in thin]
    assert bold.get_xdata().tolist() == [*range(13)]
    assert bold.get_ydata() == pytest.approx(np.sort(curves, axis=0)[1])
    assert loss.get_xlabel() == "epoch, ELR 0.01\n(bold: median of seeds)"
    assert bold.get_linewidth() > thin[0].get_linewidth()


def test_of_second_runs_of_several_seeds_both_looks_are_said(tmp_path, drawn):
    for seed in range(2):
        for then in ("", ".then=1e-04"):
            write(tmp_path / f"elr=1e-02.seed={seed}{then}.csv", epochs=12)
    assert figures.main([str(tmp_path)]) == 0
    said = "epoch, ELR 0.01\n(bold: median of seeds)\n(dotted: --then)"
    assert [ax.get_xlabel() for ax in drawn[0].axes] == [said] * 3


@pytest.mark.parametrize(("kind", "values"), [("elr", 1), ("elr", 3), ("lr", 3)])
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
    assert titles(fig)[-3:] == ["train loss (nats)", "test error", last]
    loss = fig.axes[3 if values == 3 else 0]
    assert max(line.get_xdata()[-1] for line in loss.lines) == 24  # the second runs lie behind
    assert "--then" in loss.get_xlabel()
    if values == 3:
        assert "test, then at 1e-03, mean ± s.e." in labels(fig)
        (test,) = [x for x in fig.axes[1].containers if x.get_label() == "test, mean ± s.e."]
        assert list(test.lines[0].get_xdata()) == [0.01, 0.02, 0.03]
        assert test.lines[0].get_ydata() == pytest.approx([0.09, 0.18, 0.27], rel=0.1)


@pytest.mark.parametrize(
    ("last", "columns"),
    [(0.0, HEADER), (math.nan, HEADER), (math.inf, HEADER[:5]), (1.0, ["epoch", "train_loss"])],
)
def test_whatever_a_log_holds_it_is_drawn(tmp_path, drawn, monkeypatch, last, columns):
    monkeypatch.setattr(Figure, "savefig", savefig)
    folder = tmp_path / "数字 $x_1^ \n net"
    for name in ("log", "_other"):
        write(folder / f"{name}.csv", last=last, columns=columns)
    assert figures.main([str(folder)]) == 0
    picture = folder / "regimes.png"
    assert picture.stat().st_size > 10_000
    picture.write_bytes(b"of both")
    assert figures.main([str(folder / "log.csv")]) == 0
    assert picture.read_bytes() == b"of both"
    assert (folder / "log.regimes.png").stat().st_size > 10_000
    heading = drawn[0].legends[0].get_title().get_text()
    assert "\\u6570\\u5b57" in heading and r"\$x_1^" in heading
    assert regimes.main([str(folder)]) == 0
    assert (folder / "regimes.csv").exists() == ("elr" in columns)
    if "elr" not in columns:
        assert {"log", "other"} <= labels(drawn[0])


def test_every_logarithmic_axis_has_two_ticks_and_all_that_was_drawn():
    seed = np.random.SeedSequence().entropy
    random = np.random.default_rng(seed)
    ax = style.subplots([["a"]], 3)[1]["a"]
    for width in 10 * [0.05, 1, 2, 7]:  # powers of ten
        values = 10 ** (random.uniform(-9, 6) + width * np.sort(random.random(5)))
        values[0] *= random.integers(2)
        ax.clear()
        ax.plot(values, values)
        style.logarithmic(ax)
        style.tick(ax.yaxis)
        low, high = ax.get_ylim()
        assert low <= values[0] and values[-1] <= high
        ticks = [x for x in ax.get_yticks() if low <= x <= high]
        texts = ax.yaxis.get_major_formatter().format_ticks(ticks)
        assert 2 <= len(set(texts)) == len(texts) <= 8, (seed, values, texts)
        if values[0] > 0:  # and they are not all at one end
            assert ticks[-1] / ticks[0] > (high / low) ** 0.4, (seed, values, texts)


@pytest.mark.parametrize(("epochs", "ticks"), [(1, {0, 1}), (12, {0, 5, 10})])
def test_axes_are_tight_and_epochs_whole(tmp_path, drawn, epochs, ticks):
    write(tmp_path / "elr=1e-02.csv", epochs=epochs)  # 0.9 to 0.45
    assert figures.main([str(tmp_path)]) == 0
    low, high = drawn[0].axes[1].get_ylim()
    assert 0.3 < low < 0.45 and 0.9 < high < 1.3
    for ax in drawn[0].axes:
        low, high = ax.get_xlim()
        assert {x for x in ax.get_xticks() if low <= x <= high} == ticks


def test_the_elr_of_a_run_that_blew_up_widens_no_axis(tmp_path, drawn):
    for lr, last in ((0.01, 0.5), (0.1, 0.2), (0.2, 1e20), (1.0, 1e-30)):
        write(tmp_path / f"lr={lr:.0e}.csv", lr, last, moves=True)
    assert figures.main([str(tmp_path)]) == 0
    for ax, low in ((drawn[0].axes[2], 0.005), (drawn[0].axes[5], 0.002)):
        assert 1e-8 < ax.get_ylim()[0] < low and 0.02 < ax.get_ylim()[1] < 1e5


def test_where_seeds_disagree_the_band_is_undecided():
    ax = style.subplots([["a"]], 3)[1]["a"]
    converging, level = {"regime": "convergence"}, {"regime": "equilibrium"}
    style.bands([ax], {0.1: [converging, level], 0.2: [converging]})
    assert [patch.get_label() for patch in ax.patches] == ["undecided", "convergence"]


def test_no_point_is_cut_at_an_edge(tmp_path, drawn):
    """Points, with markers of 2 points in every direction, lie within the panels."""
    for elr, seed in product((0.01, 0.02, 0.04), ("", ".seed=1")):
        write(tmp_path / f"elr={elr:.0e}{seed}.csv", elr, 1e-30 ** (elr / 0.04))
    assert figures.main([str(tmp_path)]) == 0
    for ax in drawn[0].axes[:3]:
        low, high = ax.get_window_extent().get_points()
        radius = 2 * drawn[0].dpi / 72
        for container in ax.containers:
            points = np.array(container.lines[0].get_data(), float).T
            points = ax.transData.transform(points)
            assert (points > low + radius).all() and (points < high - radius).all()


def test_bars_end_within_the_panel_and_never_below_0(tmp_path, drawn):
    for elr, seed in product((0.01, 0.04), range(3)):
        last = 0.5 / (1 + 4 * seed) if elr < 0.02 else 0.3 * 1e-12 ** (seed > 0)
        write(tmp_path / f"elr={elr:.0e}.seed={seed}.csv", elr, last, epochs=40)
    assert figures.main([str(tmp_path)]) == 0
    for ax in drawn[0].axes[:2]:
        low, high = ax.get_ylim()
        for *_, (bars,) in ax.containers:
            inside, through = (path.vertices[:, 1] for path in bars.get_paths())
            assert low < inside.min() < 0.9 * inside.max() < high
            assert 0 <= through.min() < low < through.max() < high


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


def logged(path, log, chance):
    return regimes.Logged(path, math.nan, 0, log, regimes.Verdict(), chance)


def test_a_loop_has_two_legs_and_bands(tmp_path, drawn):
    chance = {"train_loss": {"mean": 2.5}, "train_error": {"mean": 0.9}}
    runs = [logged(tmp_path, loop(melts), chance) for melts in (0.02, 0.04)]
    figures.of_loop(runs, tmp_path / "a.png")
    (fig,) = drawn
    ax = fig.axes[0]
    assert titles(fig) == ["train loss (nats)", "test error", "angle φ (radians)"]
    assert fig.legends[0].get_title().get_text().endswith(" (bold: median of 2 seeds)")
    ways = ["ELR goes down", "ELR goes up"]
    expected = {*ways, "metastable", "chance", "convergence"}
    assert expected | {"chaotic equilibrium", "divergence"} <= labels(fig)
    found = {line.get_label(): line for line in ax.lines}
    down, up = (found[way].get_ydata() for way in ways)
    elrs = found[ways[1]].get_xdata()
    frozen = (elrs > 0.005) & (elrs < 0.015)
    assert (down[frozen] > 50 * up[frozen]).all() and np.allclose(down[-8:], up[-8:], rtol=0.3)
    assert {text.get_text().strip() for text in ax.texts} == {"freezes", "melts", "diverges"}


def test_a_single_metastable_elr_is_drawn_and_marks_stay_inside(tmp_path, drawn, monkeypatch):
    elr = loop(0.02)["elr"].min()
    found = Loop(freezes=(elr, 2 * elr), metastable=(elr, elr))
    monkeypatch.setattr(figures, "classify_loop", lambda *_: found)
    figures.of_loop([logged(tmp_path, loop(0.02), {})], tmp_path / "a.png")
    ax = drawn[0].axes[0]
    (marked,) = (x for x in ax.collections if x.get_label() == "metastable")
    (line,) = marked.get_segments()
    assert np.allclose(line[:, 0], elr)
    assert ax.texts[0].get_window_extent().x0 >= ax.get_window_extent().x0


def test_a_loop_of_which_one_way_diverges_is_undecided(tmp_path, drawn, monkeypatch):
    found = Loop(freezes=(1e-3, 2e-3), divergence=(0.4, 0.7), reversible=(2e-3, 0.4))
    monkeypatch.setattr(figures, "classify_loop", lambda *_: found)
    figures.of_loop([logged(tmp_path, loop(0.02), {})], tmp_path / "a.png")
    ax, spans = drawn[0].axes[0], {}
    for patch in ax.patches:
        ends = ax.transData.inverted().transform(patch.get_window_extent())[:, 0]
        spans.setdefault(patch.get_label(), []).append(math.sqrt(ends.prod()))
    assert list(spans) == ["convergence", "chaotic equilibrium", "undecided", "divergence"]
    assert min(spans["undecided"]) > 0.4 and 0.7 < min(spans["divergence"])
    panel, box = ax.get_window_extent(), ax.texts[1].get_window_extent()
    assert panel.x0 < box.x0 and box.x1 < panel.x1 and panel.y0 < box.y0  # "diverges"


def test_panels_of_a_row_show_one_range_though_a_run_has_died(tmp_path, drawn):
    """Of which one knows the ELR alone."""
    for lr in (0.01, 0.1, 1.0):
        write(tmp_path / f"lr={lr:.0e}.csv", lr, moves=True)
    path = tmp_path / "lr=1e+00.csv"
    path.write_text(
        re.sub(r"^(\d+,\d+,[^,]+),.*$", r"\1,nan,nan,nan,0,0", path.read_text(), flags=re.M)
    )
    assert figures.main([str(tmp_path)]) == 0
    for row in (drawn[0].axes[:3], drawn[0].axes[3:6]):
        assert len({ax.get_xlim() for ax in row}) == 1
    assert drawn[0].axes[0].get_xlim()[1] > 1
