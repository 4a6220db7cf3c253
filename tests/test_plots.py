from __future__ import annotations

import importlib
import itertools
import math
import os
import runpy
import sys
import warnings
import xml.etree.ElementTree as ET

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gd_plugin import plots
from gd_plugin.plots import plot_curves, plot_reliability

PLOTS = [plot_curves, plot_reliability]
LONG = "a_rather_long_name_of_a_run_on_some_data_set_seed_"


def record(name="beta5", beta=5.0, epochs=3) -> dict:
    """A record with every curve, and a reliability diagram with an empty, an over- and an underconfident bin."""
    return {
        "name": name,
        "epochs": [
            {
                "epoch": float(e),
                "step": 10 * e,
                "cross_entropy": 1.0 / e,
                "loss": 1.0 / e + math.log(beta),
                "gd_beta": beta,
                "eval_accuracy": 1 - 0.5 / e,
                "eval_loss": 1.5 / e,
                "eval_nll": 1.2 / e,
                "eval_ece": 0.1 / e,
            }
            for e in range(1, epochs + 1)
        ],
        "log": [{"step": s, "loss": 1.0, "gd_beta": beta} for s in range(1, 10 * epochs + 1)],
        "final": {"accuracy": 0.8, "ece": 0.05, "confidence_gap": -0.03},
        "reliability": [
            {"lower": 0.0, "upper": 0.25, "count": 0, "confidence": None, "accuracy": None},
            {"lower": 0.25, "upper": 0.5, "count": 10, "confidence": 0.4, "accuracy": 0.2},
            {"lower": 0.5, "upper": 0.75, "count": 30, "confidence": 0.7, "accuracy": 0.7},
            {"lower": 0.75, "upper": 1.0, "count": 60, "confidence": 0.9, "accuracy": 0.95},
        ],
    }


@pytest.fixture
def draw(monkeypatch):
    """Call a plot function; the figure, neither laid out nor written."""

    def draw(function, records) -> Figure:
        figures = []
        monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
        function(records, "unused.png")
        return figures[0]

    return draw


def overlaps(figure: Figure) -> list[tuple]:
    """Panels (with their labels) and legends that overlap each other, or that leave the picture."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.get_tightbbox(renderer).padded(-1) for axes in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    page = figure.bbox.padded(1)
    outside = [(i,) for i, box in enumerate(boxes) if not page.containsx(box.x0) or not page.containsx(box.x1)]
    outside += [(i,) for i, box in enumerate(boxes) if not page.containsy(box.y0) or not page.containsy(box.y1)]
    return outside + [(i, j) for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2) if a.overlaps(b)]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", PLOTS)
def test_writes_png_and_svg(plot, tmp_path):
    plot([record()], str(tmp_path / "a.PNG"))
    plot([record()], tmp_path / "a.svg")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG\r\n")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert sorted(os.listdir(tmp_path)) == ["a.PNG", "a.svg"]


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("name", ["a.pdf", "a"])
def test_other_formats_are_refused(plot, name, tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot([record()], tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("plot", "owner", "method"),
    [(plot_curves, Figure, "savefig"), (plot_curves, os, "replace"), (plot_reliability, os, "replace")],
)
def test_a_failure_leaves_the_old_picture(plot, owner, method, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(KeyboardInterrupt):
        plot([record() | {"epochs": []}], path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def settings() -> dict:
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}  # reading it sets it


def test_pyplot_is_not_used_and_settings_stay(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError):  # whoever imports it now fails
        importlib.import_module("matplotlib.pyplot")
    before = settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module is loaded already
        fresh = runpy.run_module("gd_plugin.plots")
    fresh["plot_curves"]([record()], tmp_path / "a.png")
    fresh["plot_reliability"]([record()], tmp_path / "b.png")
    assert settings() == before


# Curves ---------------------------------------------------------------------------------------------------------------


def test_each_panel_shows_its_curve(draw):
    one, other = record(epochs=3), record("other", 0.1, epochs=4)
    figure = draw(plot_curves, [one, other])
    assert len(figure.axes) == 6
    keys = ["cross_entropy", "loss", "gd_beta", "eval_accuracy", "eval_nll", "eval_ece"]
    for axes, key in zip(figure.axes, keys, strict=True):
        part, x = ("log", "step") if key == "gd_beta" else ("epochs", "epoch")
        for line, source in zip(axes.lines, (one, other), strict=True):
            assert list(line.get_xdata()) == [entry[x] for entry in source[part]]
            assert list(line.get_ydata()) == [entry[key] for entry in source[part]]
        assert axes.get_title() and x in axes.get_xlabel()
        assert axes.get_yscale() == ("log" if key == "gd_beta" else "linear")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["beta5", "other"]


def test_eval_loss_stands_in_for_eval_nll(draw):
    one = record()
    for entry in one["epochs"]:
        del entry["eval_nll"]
    assert list(draw(plot_curves, [one]).axes[4].lines[0].get_ydata()) == [1.5, 0.75, 0.5]


@pytest.mark.parametrize(
    "keys",
    [
        ["loss"],
        ["loss", "eval_loss"],
        ["cross_entropy", "loss", "eval_accuracy"],
        ["cross_entropy", "loss", "eval_accuracy", "eval_nll"],
        ["cross_entropy", "loss", "eval_accuracy", "eval_nll", "eval_ece"],
    ],
)
def test_panels_without_data_are_left_out(draw, keys):
    one = record() | {"log": []}
    one["epochs"] = [{key: entry[key] for key in ["epoch", *keys]} for entry in one["epochs"]]
    figure = draw(plot_curves, [one])
    assert len(figure.axes) == len(keys)
    assert all(len(axes.lines[0].get_ydata()) == 3 for axes in figure.axes)
    assert not overlaps(figure)


def test_a_curve_that_one_record_lacks(draw):
    one, other = record("one"), record("other")
    other["log"] = []
    other["epochs"][1]["eval_ece"] = None  # a null in the file: not a finite number
    figure = draw(plot_curves, [other, one])
    assert [len(line.get_ydata()) for line in figure.axes[2].lines] == [0, 30]
    assert list(figure.axes[5].lines[0].get_xdata()) == [1.0, 3.0]
    assert {axes.lines[1].get_color() for axes in figure.axes} == {figure.legends[0].get_lines()[1].get_color()}


@pytest.mark.parametrize("beta", [1e-6, 0.03, 1.0, 5.0, 700.0])
def test_beta_axis_has_labels_when_beta_is_constant(draw, beta):
    figure = draw(plot_curves, [record(beta=beta) | {"epochs": []}])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    labels = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert low < beta < high and 2 <= len(labels) <= 6
    assert all(float(label.replace("\N{MINUS SIGN}", "-")) > 0 for label in labels)


def test_many_records_can_be_told_apart(draw):
    figure = draw(plot_curves, [record(f"run {i}") | {"epochs": []} for i in range(20)])
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 20


def test_no_curve_at_all(tmp_path):
    for records in ([], [record() | {"epochs": [], "log": []}]):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot_curves(records, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


# Reliability ----------------------------------------------------------------------------------------------------------


def test_reliability_shows_accuracy_gap_and_counts(draw):
    diagram, histogram = draw(plot_reliability, [record("name")]).axes
    bars = [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in diagram.patches]
    accuracy = [(0.25, 0, 0.25, 0.2), (0.5, 0, 0.25, 0.7), (0.75, 0, 0.25, 0.95)]
    gap = [(0.25, 0.2, 0.25, 0.2), (0.5, 0.7, 0.25, 0.0), (0.75, 0.95, 0.25, -0.05)]
    assert bars == [pytest.approx(bar) for pair in zip(accuracy, gap, strict=True) for bar in pair]
    assert diagram.patches[1].get_hatch() != diagram.patches[5].get_hatch()
    assert [list(line.get_xydata().ravel()) for line in diagram.lines] == [[0, 0, 1, 1]]
    assert [bar.get_height() for bar in histogram.patches] == [0.1, 0.3, 0.6]
    assert diagram.get_title() == "name\naccuracy 80.0%, ECE 5.0%\nconfidence gap -3.0%"


@pytest.mark.parametrize(("final", "text"), [({}, "name"), ({"ece": 0.05, "accuracy": None}, "name\nECE 5.0%")])
def test_final_metrics_that_are_absent(draw, final, text):
    assert draw(plot_reliability, [record("name") | {"final": final}]).axes[0].get_title() == text


def test_records_without_reliability_are_left_out(draw, tmp_path):
    bare = record("bare") | {"reliability": None}
    assert len(draw(plot_reliability, [bare, record("full")]).axes) == 2
    with pytest.raises(ValueError, match="no record has 'reliability'"):
        plot_reliability([bare], tmp_path / "a.png")


# Layout and text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize(("count", "name"), [(1, LONG), (4, "run"), (10, LONG)])
def test_nothing_overlaps(draw, plot, count, name):
    figure = draw(plot, [record(f"{name}{i}") for i in range(count)])
    assert len(figure.axes) == (6 if plot is plot_curves else 2 * count)
    assert not overlaps(figure)


def test_overlaps_are_seen(draw, monkeypatch):
    monkeypatch.setattr(plots, "layout", lambda: None)
    assert overlaps(draw(plot_curves, [record()]))


@pytest.mark.parametrize("plot", PLOTS)
def test_names_are_shown_as_they_are(draw, plot, tmp_path):
    names = [r"$\frac{$", "$x_1$", "_hidden", "a_b", r"100\$", "a & <b>"]
    plot([record(name) for name in names], tmp_path / "a.svg")
    figure = draw(plot, [record(name) for name in names])
    legend, diagrams = figure.legends[0].get_texts(), [axes.title for axes in figure.axes if axes.get_title()]
    texts = legend if plot is plot_curves else diagrams
    assert [text.get_text().split("\n")[0] for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)


def test_mathematics_would_fail():
    figure = Figure()
    figure.text(0, 0, r"$\frac{$")
    with pytest.raises(ValueError, match="frac"):
        figure.draw_without_rendering()
