import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import figures


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def rendered(figure):
    """The figure as SVG: drawing it is what finds a broken artist."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def prevalences(bags, num_classes, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(num_classes), bags)


ROWS = [
    *(
        {"step": s, "split": "train", "loss": 1 / s, "learning_rate": 0.1}
        for s in range(1, 101)
    ),
    *(
        {"step": s, "split": "validation", "loss": 2 / s, "absolute_error": 0.1}
        for s in range(20, 101, 20)
    ),
    {"step": 100, "split": "test", "loss": 0.02, "absolute_error": 0.1},
]


def test_measures_come_before_what_only_training_knows():
    assert figures.metric_names(ROWS) == ["loss", "absolute_error", "learning_rate"]


def test_names_of_what_is_no_measured_number_are_left_out():
    row = {"step": 1, "split": "test", "a": 1, "b": None, "c": "x", "d": True}
    assert figures.metric_names([row]) == ["a", "b"]


def test_one_panel_per_metric_and_one_line_per_split():
    figure = figures.training_curves(ROWS)
    loss, error, rate = figure.axes
    assert set(lines_of(loss)) == {"train", "validation", "test"}
    assert set(lines_of(error)) == {"validation", "test"}
    assert set(lines_of(rate)) == {"train"}
    np.testing.assert_allclose(
        lines_of(loss)["validation"], [[s, 2 / s] for s in range(20, 101, 20)]
    )
    assert (loss.get_yscale(), rate.get_yscale()) == ("log", "linear")
    assert all(axes.get_xlabel() == "training step" for axes in figure.axes)
    rendered(figure)


def test_long_curves_keep_their_mean_and_extremes():
    value = np.random.default_rng(0).normal(size=10_000)
    rows = [
        {"step": s, "split": "train", "loss": float(v)} for s, v in enumerate(value)
    ]
    (axes,) = figures.training_curves(rows).axes
    drawn = lines_of(axes)["train"]
    assert len(drawn) < 500
    np.testing.assert_allclose(drawn.mean(axis=0), [9999 / 2, value.mean()])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (value.min(), value.max())


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.floats(width=32), st.integers(-3, 3)),
        min_size=1,
        max_size=8,
    )
)
def test_curves_of_any_numbers_are_drawn_from_the_finite_ones(values):
    rows = [
        {"step": s, "split": "train", "loss": value} for s, value in enumerate(values)
    ]
    # As a reader of the file gets them.
    rows = [json.loads(json.dumps(row)) for row in rows]
    figure = figures.training_curves(rows)
    (axes,) = figure.axes
    finite = [
        [s, value]
        for s, value in enumerate(values)
        if value is not None and math.isfinite(value)
    ]
    drawn = lines_of(axes)
    if finite:
        np.testing.assert_allclose(drawn["train"], finite)
    else:
        assert "train" not in drawn
    first = [s for s in range(len(values)) if s not in dict(finite)][:1]
    assert [text.get_text() for text in axes.texts] == [
        f"not finite at step {s}" for s in first
    ]
    rendered(figure)


def test_no_numbers_no_figure():
    with pytest.raises(ValueError, match="rows must hold at least one number"):
        figures.training_curves([{"step": 1, "split": "train"}])


@pytest.mark.parametrize(("num_classes", "panels"), [(2, 1), (3, 3), (10, 10)])
def test_diagonal_draws_every_class_and_its_bias(num_classes, panels):
    true = prevalences(200, num_classes)
    estimate = true.copy()
    estimate[:, 1] += 0.05
    estimate[:, 0] -= 0.05
    names = [f"name {k}" for k in range(num_classes)]
    figure = figures.prevalence_diagonal(true, estimate, names)
    assert len(figure.axes) == panels
    of_one = figure.axes[0 if num_classes == 2 else 1]
    assert of_one.get_title(loc="left") == "name 1\nbias +0.0500"
    diagonal, dots, median = (line.get_xydata() for line in of_one.get_lines())
    np.testing.assert_allclose(diagonal[:, 0], diagonal[:, 1])
    assert len(dots) == 200
    for points in (dots, median):
        np.testing.assert_allclose(points[:, 1] - points[:, 0], 0.05)
    rendered(figure)


def test_diagonal_of_many_bags_stays_light():
    true = prevalences(5000, 10)
    figure = figures.prevalence_diagonal(true, true[::-1], list("abcdefghij"))
    assert len(rendered(figure)) < 1_000_000


def test_error_by_shift_is_the_mean_in_groups_of_equal_shift():
    num_classes, bags = 4, 500
    true = prevalences(bags, num_classes)
    train = np.full(num_classes, 0.25)
    shift = 0.5 * np.abs(true - train).sum(axis=1)
    good = true.copy()
    # An error that grows with the shift, and is its tenth.
    bad = true + 0.1 * shift[:, None] * np.array([1, -1, 1, -1])
    figure = figures.error_by_shift(true, {"bad": bad, "good": good}, train)
    (axes,) = figure.axes
    drawn = lines_of(axes)
    # The best method is named first, with its mean error.
    assert list(drawn) == ["good 0.0000", f"bad {0.1 * shift.mean():.4f}"]
    np.testing.assert_allclose(drawn["good 0.0000"][:, 1], 0, atol=1e-12)
    x, y = list(drawn.values())[1].T
    assert len(x) == 10
    assert (np.diff(x) > 0).all()
    np.testing.assert_allclose(y, 0.1 * x, rtol=1e-6)
    np.testing.assert_allclose(x.mean(), shift.mean())
    rendered(figure)


@pytest.mark.parametrize(
    ("num_classes", "num_axes"),
    [pytest.param(3, 2, id="lines"), pytest.param(8, 3, id="heat map, colour bar")],
)
def test_the_features_that_tell_classes_apart_are_drawn(num_classes, num_axes):
    features, bins = 5, 8
    histograms = np.full((num_classes, features, bins), 1 / bins)
    # Feature 3 tells every class from the rest, feature 1 the first class alone.
    histograms[:, 3] = np.eye(num_classes, bins)
    histograms[0, 1] = np.eye(bins)[0]
    names = [f"name {k}" for k in range(num_classes)]
    figure = figures.learned_histograms(histograms, names, num_features=2)
    assert len(figure.axes) == num_axes
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == ["feature 3", "feature 1"]
    if num_classes == 3:
        drawn = [patch.get_data().values for patch in figure.axes[0].patches]
    else:
        drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn, histograms[:, 3])
    text = rendered(figure)
    assert all(name in text for name in names)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: figures.prevalence_diagonal(p, p[:1], ["a", "b", "c"]),
            r"true and estimate must both be of shape \[bags, K\]",
        ),
        (
            lambda p: figures.prevalence_diagonal(p, p, ["a"]),
            "class_names must have one name for each of the 3 classes, but has 1",
        ),
        (
            lambda p: figures.error_by_shift(p, {"m": p[:, :2]}, p[0]),
            r"true and estimates\['m'\] must both be of shape",
        ),
        (
            lambda p: figures.error_by_shift(p, {}, p[0]),
            "estimates must hold 1 to 7 methods, but holds 0",
        ),
        (
            lambda p: figures.learned_histograms(p),
            r"histograms must be of shape \[K, f, b\], but is of shape \[20, 3\]",
        ),
        (
            lambda p: figures.learned_histograms(p[None], ["a", "b"]),
            "class_names must have one name for each of the 1 classes, but has 2",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(prevalences(20, 3))


def test_measures_by_size_have_a_panel_each():
    measures = {"absolute_error": [0.1, 0.2, None], "exact": [1.0, 0.5, 0.25]}
    figure = figures.measures_by_size([1, 5.5, 10], measures)
    error, exact = figure.axes
    (line,) = error.get_lines()
    np.testing.assert_allclose(line.get_xydata()[:2], [[1, 0.1], [5.5, 0.2]])
    (line,) = exact.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 1], [5.5, 0.5], [10, 0.25]])
    assert error.get_title(loc="left") == "absolute error"
    rendered(figure)


def test_predicted_numbers_lie_around_the_diagonal():
    true = np.arange(2000.0)
    figure = figures.predicted_numbers(true, true + 1)
    diagonal, dots = figure.axes[0].get_lines()
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1999, 1999]])
    x, y = dots.get_xydata().T
    assert len(x) == 500
    np.testing.assert_array_equal(y - x, 1)
    rendered(figure)


def test_clusters_are_drawn_with_their_ellipses():
    rng = np.random.default_rng(0)
    points = [rng.normal(size=(n, 3)) for n in (5, 40, 0)]
    labels = [np.arange(n) % 9 for n in (5, 40, 0)]
    means, scales = rng.normal(size=(3, 9, 3)), rng.uniform(1, 2, (3, 9, 3))
    figure = figures.clusters(points, labels, (means, scales), (means + 1, scales))
    rendered(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "5 points",
        "40 points",
        "0 points",
    ]
    for number, axes in enumerate(figure.axes):
        found, true = axes.patches[:9], axes.patches[9:]
        np.testing.assert_allclose([e.center for e in found], means[number, :, :2])
        np.testing.assert_allclose([e.center for e in true], means[number, :, :2] + 1)
        np.testing.assert_allclose([e.width for e in true], 4 * scales[number, :, 0])
        drawn = np.concatenate([line.get_xydata() for line in axes.lines])
        assert sorted(drawn[:, 0]) == sorted(points[number][:, 0])


@pytest.mark.parametrize("num_classes", [3, 40])
def test_confusion_is_in_shares_of_the_true_class(num_classes):
    counts = np.random.default_rng(0).integers(0, 9, (num_classes, num_classes))
    counts[0] = 0
    names = [f"class {k}" for k in range(num_classes)]
    figure = figures.confusion(counts, names)
    rendered(figure)
    share = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(share[1:].sum(1), 1)
    np.testing.assert_allclose(share[1], counts[1] / counts[1].sum())
    assert not share[0].any()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == names


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_sought_is_framed(channels):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4, channels))
    probabilities = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    figure = figures.image_sets(images, probabilities, np.array([1, 2]))
    rendered(figure)
    frames = [
        axes.spines["left"].get_linestyle() if axes.spines["left"].get_visible() else ""
        for axes in figure.axes
    ]
    assert frames == ["", "-", "", "--", "", "-"]
    assert [axes.get_xlabel() for axes in figure.axes][:3] == ["10 %", "70 %", "20 %"]


def test_a_bar_stands_for_a_note():
    notes = np.array([[60, 0, 3], [67, 1, 2], [72, 2, 8]])
    figure = figures.piano_roll({"a": notes, "b": notes[:1], "c": notes[:0]}, "eighths")
    rendered(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b", "c"]
    for axes, count in zip(figure.axes, (3, 1, 0), strict=True):
        bars = axes.patches
        assert len(bars) == count
        for bar, (note, start, stop) in zip(bars, notes, strict=False):
            assert bar.get_y() < note < bar.get_y() + bar.get_height()
            assert bar.get_height() < 1
            # It ends before the next frame, which may strike the key again.
            assert bar.get_x() == start
            assert stop - 0.5 < bar.get_x() + bar.get_width() < stop
        ticks = dict(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True))
        assert ticks[60].get_text() == "C4" and ticks[72].get_text() == "C5"
        assert axes.get_ylim()[0] < 60 and axes.get_ylim()[1] > 72
    rendered(figures.piano_roll({"silence": notes[:0]}))


def test_gates_are_a_row_a_unit_the_most_open_first():
    rng = np.random.default_rng(0)
    activations = {name: rng.uniform(size=(4, 6)) for name in ("update", "output")}
    tokens = ["la", "casa", "<pad>", "$x$"]
    figure = figures.gates(activations, tokens)
    assert "casa" in rendered(figure)
    *panels, _ = figure.axes
    for axes, (name, values) in zip(panels, activations.items(), strict=True):
        drawn = axes.images[0].get_array()
        assert sorted(map(tuple, drawn)) == sorted(map(tuple, values.T))
        assert (np.diff(drawn.mean(1)) <= 0).all()
        assert axes.images[0].get_clim() == (0, 1)
        expected = f"{name}, mean {values.mean():.2f}"
        assert axes.get_title(loc="left") == expected
    assert [t.get_text() for t in panels[-1].get_xticklabels()] == tokens


def test_attention_has_the_target_in_rows():
    rng = np.random.default_rng(0)
    maps = [
        (rng.dirichlet(np.ones(source), target), ["t"] * target, ["s"] * source)
        for target, source in ((3, 2), (1, 40))
    ]
    figure = figures.attention_maps(maps)
    rendered(figure)
    for axes, (weights, target, source) in zip(figure.axes, maps, strict=True):
        image = axes.images[0]
        np.testing.assert_array_equal(image.get_array(), weights)
        # Darker is more.
        lightness = image.cmap(image.norm(np.sort(weights.ravel())))[:, :3].sum(1)
        assert (np.diff(lightness) <= 0).all() and lightness[0] > lightness[-1]
        assert [t.get_text() for t in axes.get_yticklabels()] == target
        assert [t.get_text() for t in axes.get_xticklabels()] == source


def test_gradient_flow_has_medians_bands_and_the_exact_line():
    norms = np.random.default_rng(0).normal(size=(5, 11)).cumsum(1)
    curves = {
        "gain 1": {"a": norms, "b": norms - 3},
        "gain 2": {"a": norms, "b": norms},
    }
    exact = {"gain 1": np.zeros(11), "gain 2": np.arange(11.0)}
    figure = figures.gradient_flow(curves, exact, "linear")
    rendered(figure)
    for axes, title in zip(figure.axes, curves, strict=True):
        assert axes.get_title(loc="left") == title
        lines = lines_of(axes)
        np.testing.assert_array_equal(lines["linear"][:, 1], exact[title])
        for (name, values), band in zip(
            curves[title].items(), axes.collections, strict=True
        ):
            np.testing.assert_allclose(lines[name][:, 1], np.median(values, 0))
            corners = band.get_paths()[0].vertices[:, 1]
            assert (corners.min(), corners.max()) == (values.min(), values.max())


def test_names_are_drawn_as_they_stand():
    true = prevalences(20, 3)
    names = ["$\\frac$", "a $ b $", "<script>"]
    figure = figures.prevalence_diagonal(true, true, names)
    titles = [axes.get_title(loc="left").splitlines()[0] for axes in figure.axes]
    assert titles == names
    assert "<script>" not in rendered(figure)


def test_styles_do_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.training_curves(ROWS)
    assert dict(matplotlib.rcParams) == before
