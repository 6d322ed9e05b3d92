"""Figures of a run, as pure functions: arrays in, a matplotlib `Figure` out.

The figures are narrow, so that a phone shows them without zooming, and transparent,
so that `experiments.report` can draw their ink in the page's own colour. Colours are
those of Okabe and Ito (2008), told apart by every kind of colour vision, and every
colour comes with a marker or a label.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

INK = "#1f2328"
"""Colour of all text and axes."""

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
)
MARKERS = "osD^vPX"

WIDTH = 4.0  # inches: what a phone shows at nearly full size
_SPLITS = ("train", "validation", "test")
_MAX_POINTS = 400
_SMALL = 8

_STYLE = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "font.size": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    # Names come from users: a dollar sign is a dollar sign.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "lines.linewidth": 1.6,
}


def metric_names(rows: Sequence[Mapping]) -> list[str]:
    """Names of the measured numbers: the loss, then measures, then the rest.

    Args:
      rows: lines of `metrics.jsonl`: dicts with `step`, `split` and numbers.

    Returns:
      The names; those of a split other than `train` count as measures.
    """
    measures: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "split") and _is_measured(value):
                held_out = row.get("split") != "train"
                measures[name] = measures.get(name, False) or held_out
    return sorted(measures, key=lambda name: (name != "loss", not measures[name]))


@matplotlib.rc_context(_STYLE)
def training_curves(
    rows: Sequence[Mapping], metrics: Sequence[str] | None = None
) -> Figure:
    """One panel per metric, one line per split, by training step.

    A metric whose positive values span more than a decade gets a logarithmic axis. Of
    more than 400 points, means of neighbours are drawn inside the band of their
    extremes. A split with a single point is a marker, and a dotted line marks the first
    step at which a number was not finite.

    Args:
      rows: lines of `metrics.jsonl`: dicts with `step`, `split` and numbers.
      metrics: the metrics to draw, in this order; by default all of them.

    Returns:
      A figure with one axes per metric.

    Raises:
      ValueError: there is no metric to draw.
    """
    metrics = metric_names(rows) if metrics is None else list(metrics)
    if not metrics:
        raise ValueError("rows must hold at least one number to draw, but hold none")
    figure = Figure(figsize=(WIDTH, 2.4 * len(metrics)))
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_metric(axes, rows, metric)
    return figure


@matplotlib.rc_context(_STYLE)
def prevalence_diagonal(
    true: np.ndarray, estimate: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """True against estimated prevalence: a panel per class, bags around the diagonal.

    Dots are bags (300 of them, evenly chosen); the line is the median error among
    bags of similar true prevalence, the band holds 80 % of them. Each title gives the
    bias, the mean of estimate - true. Of two classes only the second is drawn: the
    first is its mirror image.

    Args:
      true: true prevalences, float [bags, K].
      estimate: estimated prevalences, float [bags, K].
      class_names: the names of the K classes.

    Returns:
      A figure with one axes per class (one in all when K = 2).

    Raises:
      ValueError: the shapes do not fit together.
    """
    true, estimate = np.asarray(true, float), np.asarray(estimate, float)
    num_classes = _check_prevalences(true, estimate, "estimate")
    if len(class_names) != num_classes:
        raise ValueError(
            f"class_names must have one name for each of the {num_classes} classes, "
            f"but has {len(class_names)}"
        )
    drawn = [1] if num_classes == 2 else list(range(num_classes))
    limit = min(1.0, 1.03 * max(np.nanmax(true), np.nanmax(estimate)))
    dots = np.unique(np.linspace(0, len(true) - 1, 300).astype(int))
    figure, panels = _grid(len(drawn), max_columns=2 if num_classes <= 12 else 3)
    for axes, k in zip(panels, drawn, strict=True):
        x, y = true[:, k], estimate[:, k]
        axes.plot([0, limit], [0, limit], color=INK, linewidth=0.8, dashes=(4, 3))
        axes.plot(
            x[dots],
            y[dots],
            "o",
            color=PALETTE[5],
            markersize=2.2,
            markeredgewidth=0,
            alpha=0.6,
        )
        # Quantiles of the error, not of the estimate: those would also hold the spread
        # of the true prevalences within a group.
        bins = _equal_count_bins(x, 10)
        center = np.array([x[b].mean() for b in bins])
        low, median, high = np.array(
            [x[b].mean() + np.nanquantile((y - x)[b], [0.1, 0.5, 0.9]) for b in bins]
        ).T
        axes.fill_between(center, low, high, color=PALETTE[0], alpha=0.25, linewidth=0)
        axes.plot(center, median, color=PALETTE[0])
        bias = np.nanmean(y - x)
        axes.set_title(f"{class_names[k]}\nbias {bias:+.4f}", fontsize=_SMALL)
        axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal", adjustable="box")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("true prevalence", fontsize=9, color=INK)
    figure.supylabel("estimated prevalence", fontsize=9, color=INK)
    return figure


@matplotlib.rc_context(_STYLE)
def error_by_shift(
    true: np.ndarray,
    estimates: Mapping[str, np.ndarray],
    train_prevalence: np.ndarray,
) -> Figure:
    """Absolute error of each method by how far a bag is from the training classes.

    The shift of a bag is the total variation distance of its prevalences from those of
    the training examples, `sum_k |p_k - t_k| / 2`; its error is `mean_k |q_k - p_k|`.
    Bags are put into ten groups of equal size by their shift; the line is the mean
    error in a group, the band its 95 % confidence interval (normal approximation).

    Args:
      true: true prevalences, float [bags, K].
      estimates: name of a method -> its estimates, float [bags, K]; seven at most.
      train_prevalence: prevalences of the training examples, float [K].

    Returns:
      A figure with one axes, one line per method, the best method named first.

    Raises:
      ValueError: the shapes do not fit together, or there are more than seven methods.
    """
    true = np.asarray(true, float)
    if not 0 < len(estimates) <= len(PALETTE):
        raise ValueError(
            f"estimates must hold 1 to {len(PALETTE)} methods, but holds "
            f"{len(estimates)}"
        )
    errors = {}
    for name, estimate in estimates.items():
        _check_prevalences(true, np.asarray(estimate), f"estimates[{name!r}]")
        errors[name] = np.abs(np.asarray(estimate, float) - true).mean(axis=1)
    shift = 0.5 * np.abs(true - np.asarray(train_prevalence, float)).sum(axis=1)
    bins = _equal_count_bins(shift, 10)
    center = [shift[b].mean() for b in bins]

    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots()
    # A method keeps its colour whatever its rank.
    looks = dict(zip(estimates, zip(PALETTE, MARKERS, strict=True), strict=False))
    for name in sorted(errors, key=lambda name: np.mean(errors[name])):
        color, marker = looks[name]
        mean = np.array([errors[name][b].mean() for b in bins])
        half = np.array([_half_width(errors[name][b]) for b in bins])
        axes.fill_between(
            center, mean - half, mean + half, color=color, alpha=0.2, linewidth=0
        )
        label = f"{name} {errors[name].mean():.4f}"
        axes.plot(center, mean, color=color, marker=marker, markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("shift from training (total variation distance)")
    figure.legend(
        loc="outside upper left",
        title="mean absolute error, over all bags:",
        alignment="left",
        ncols=1 if max(map(len, estimates)) > 16 else 2,
    )
    return figure


@matplotlib.rc_context(_STYLE)
def learned_histograms(
    histograms: np.ndarray,
    class_names: Sequence[str] | None = None,
    num_features: int = 6,
) -> Figure:
    """Histograms of the classes in the features that tell them apart best.

    A feature's rank is the mean total variation distance between the histogram of a
    class and the mean histogram of all classes. Up to five classes are lines; more are
    rows of a heat map, whose colour is the share of the class's examples in the bin.

    Args:
      histograms: histogram of each class's examples, float [K, f, b], each of them
        summing to one over its b bins on [0, 1].
      class_names: the names of the K classes; their numbers by default.
      num_features: how many features to draw; all when there are fewer.

    Returns:
      A figure with one axes per feature (and one for the colour bar of heat maps).

    Raises:
      ValueError: `histograms` is not of three dimensions, or the names do not fit.
    """
    histograms = np.asarray(histograms, float)
    if histograms.ndim != 3:
        raise ValueError(
            "histograms must be of shape [K, f, b], but is of shape "
            f"{list(histograms.shape)}"
        )
    num_classes, _, num_bins = histograms.shape
    names = [str(k) for k in range(num_classes)] if class_names is None else class_names
    if len(names) != num_classes:
        raise ValueError(
            f"class_names must have one name for each of the {num_classes} classes, "
            f"but has {len(names)}"
        )
    distance = 0.5 * np.abs(histograms - histograms.mean(axis=0)).sum(axis=-1)
    chosen = np.argsort(-distance.mean(axis=0), kind="stable")[:num_features]
    as_lines = num_classes <= 5
    figure, panels = _grid(
        len(chosen),
        max_columns=2,
        height=1.7 if as_lines else max(1.5, 0.14 * num_classes + 0.6),
        sharey=True,
    )
    top = histograms[:, chosen].max()
    edges = np.linspace(0, 1, num_bins + 1)
    for index, (axes, feature) in enumerate(zip(panels, chosen, strict=True)):
        axes.set_title(f"feature {feature}", fontsize=_SMALL)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(2))
        if as_lines:
            for k in range(num_classes):
                axes.stairs(
                    histograms[k, feature],
                    edges,
                    color=PALETTE[k],
                    linewidth=1.4,
                    linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[k],
                    label=names[k] if index == 0 else None,
                )
            axes.set_ylim(0, 1.05 * top)
        else:
            axes.grid(False)
            image = axes.imshow(
                histograms[:, feature],
                extent=(0, 1, num_classes - 0.5, -0.5),
                aspect="auto",
                interpolation="nearest",
                cmap="cividis",
                vmin=0,
                vmax=top,
            )
            axes.set_yticks(range(num_classes), names, fontsize=7)
            axes.tick_params(axis="y", length=0)
    figure.supxlabel("value of the feature", fontsize=9, color=INK)
    if as_lines:
        figure.supylabel("share of the examples", fontsize=9, color=INK)
        figure.legend(loc="outside upper left", ncols=min(num_classes, 3))
    else:
        bar = figure.colorbar(
            image, ax=list(panels), location="top", fraction=0.04, aspect=40
        )
        bar.outline.set_visible(False)
        bar.set_label("share of the class's examples in the bin", fontsize=_SMALL)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()
    return figure


@matplotlib.rc_context(_STYLE)
def measures_by_size(
    sizes: Sequence[float],
    measures: Mapping[str, Sequence[float]],
    label: str = "elements in the set",
) -> Figure:
    """How each measure depends on a number, that of the elements in a set.

    Args:
      sizes: number of elements of a set (or the mean of a group of sets), [groups].
      measures: name of a measure -> its mean in each group, [groups].
      label: what the number is.

    Returns:
      A figure with one axes per measure.
    """
    figure = Figure(figsize=(WIDTH, 2.2 * len(measures)))
    panels = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, measures.items(), strict=True):
        axes.plot(sizes, values, color=PALETTE[0], marker=MARKERS[0], markersize=4)
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


@matplotlib.rc_context(_STYLE)
def predicted_numbers(true: np.ndarray, predicted: np.ndarray) -> Figure:
    """True against predicted numbers, 500 of them evenly chosen, and the diagonal.

    Args:
      true: float [n].
      predicted: float [n].

    Returns:
      A figure with one axes.
    """
    dots = np.unique(np.linspace(0, len(true) - 1, 500).astype(int))
    figure = Figure(figsize=(3.6, 3.6))
    axes = figure.subplots()
    limits = [np.min(true), np.max(true)]
    axes.plot(limits, limits, color=INK, linewidth=0.8, dashes=(4, 3))
    axes.plot(
        true[dots],
        predicted[dots],
        "o",
        color=PALETTE[0],
        markersize=2.5,
        markeredgewidth=0,
        alpha=0.6,
    )
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


@matplotlib.rc_context(_STYLE)
def clusters(
    points: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    true: tuple[np.ndarray, np.ndarray],
) -> Figure:
    """Sets of points in the plane and the Gaussians that describe them.

    Points have the colour of their component. A component is drawn as the ellipse of
    two standard deviations: filled as found, dashed as it truly is. Of more than two
    dimensions the first two are drawn.

    Args:
      points: of every set, float [n, d].
      labels: of every set, the component that each point most likely is of, int [n].
      found: means and standard deviations, each float [set, k, d].
      true: those that the points were drawn from, each float [set, k, d].

    Returns:
      A figure with one axes per set.
    """
    figure, panels = _grid(len(points), max_columns=2)
    for index, axes in enumerate(panels):
        for k in range(found[0].shape[1]):
            color = PALETTE[k % len(PALETTE)]
            of_component = points[index][labels[index] == k]
            axes.plot(
                *of_component[:, :2].T,
                MARKERS[k % len(MARKERS)],
                color=color,
                markersize=2,
                markeredgewidth=0,
                alpha=0.7,
            )
        for (means, scales), look in (
            (found, dict(alpha=0.3, linewidth=0)),
            (true, dict(fill=False, edgecolor=INK, linestyle=(0, (3, 2)))),
        ):
            for k, (mean, scale) in enumerate(
                zip(means[index], scales[index], strict=True)
            ):
                color = dict(facecolor=PALETTE[k % len(PALETTE)])
                axes.add_patch(
                    Ellipse(
                        mean[:2],
                        *(4 * scale[:2]),
                        **(color if "edgecolor" not in look else {}) | look,
                    )
                )
        axes.set_title(f"{len(points[index])} points", fontsize=_SMALL)
        axes.set_aspect("equal", adjustable="datalim")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure


@matplotlib.rc_context(_STYLE)
def confusion(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Which classes are taken for which, as shares of the examples of a class.

    Args:
      counts: int [K, K], examples of the class of the row that were called the class
        of the column.
      class_names: the names of the K classes.

    Returns:
      A figure with an axes and its colour bar.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    number = len(counts)
    figure = Figure(figsize=(WIDTH, WIDTH + 0.6))
    axes = figure.subplots()
    axes.grid(False)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    size = min(_SMALL, 220 / number)
    axes.set_xticks(range(number), class_names, rotation=90, fontsize=size)
    axes.set_yticks(range(number), class_names, fontsize=size)
    axes.tick_params(length=0)
    if number <= 12:
        for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
            axes.text(
                column,
                row,
                f"{100 * share[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if share[row, column] > 0.5 else "white",
            )
    axes.set_xlabel("called")
    axes.set_ylabel("is")
    bar = figure.colorbar(image, ax=axes, location="top", fraction=0.04, aspect=40)
    bar.outline.set_visible(False)
    bar.set_label("share of the sets of the class", fontsize=_SMALL)
    return figure


@matplotlib.rc_context(_STYLE)
def image_sets(
    images: np.ndarray, probabilities: np.ndarray, target: np.ndarray
) -> Figure:
    """Sets of images in rows, each with the probability of being the one sought.

    The one that is has a solid frame, the most probable one a dashed frame.

    Args:
      images: float [set, element, height, width, channel], in [-1, 1], of one or three
        channels.
      probabilities: float [set, element].
      target: int [set].

    Returns:
      A figure with one axes per image.
    """
    rows, columns = images.shape[:2]
    figure = Figure(figsize=(max(WIDTH, 0.5 * columns), 0.72 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for (row, column), axes in np.ndenumerate(panels):
        image = np.clip((images[row, column] + 1) / 2, 0, 1)
        if image.shape[-1] == 1:
            image = image.repeat(3, axis=-1)
        axes.imshow(image)
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        probability = probabilities[row, column]
        axes.set_xlabel(f"{100 * probability:.0f} %", fontsize=6, labelpad=1)
        is_target = column == target[row]
        guessed = column == probabilities[row].argmax()
        for spine in axes.spines.values():
            spine.set_visible(bool(is_target or guessed))
            spine.set_linewidth(2)
            spine.set_edgecolor(PALETTE[2] if is_target else PALETTE[1])
            spine.set_linestyle("-" if is_target else "--")
    return figure


@matplotlib.rc_context(_STYLE)
def piano_roll(
    pieces: Mapping[str, np.ndarray], label: str = "quarter notes"
) -> Figure:
    """Pieces of music, one below the other: a bar for every note that is held.

    Args:
      pieces: title -> notes int [note, 3]: the MIDI number, the first frame and the
        frame after the last.
      label: what a frame is.

    Returns:
      A figure with one axes per piece, all of the same keys.
    """
    figure = Figure(figsize=(WIDTH, 1.9 * len(pieces) + 0.3))
    panels = figure.subplots(len(pieces), 1, squeeze=False, sharey=True, sharex=True)
    every = np.concatenate([notes[:, 0] for notes in pieces.values()])
    low, high = (every.min(), every.max()) if len(every) else (60, 60)
    octaves = np.arange(12 * (low // 12), high + 13, 12)
    for axes, (title, notes) in zip(panels[:, 0], pieces.items(), strict=True):
        pitch, start, stop = notes.T
        axes.barh(
            pitch,
            # The gap tells one long note from two.
            stop - start - 0.15,
            left=start,
            height=0.85,
            align="center",
            color=PALETTE[0],
            linewidth=0,
        )
        axes.set_title(title)
        axes.set_yticks(octaves, [f"C{octave // 12 - 1}" for octave in octaves])
        axes.set_ylim(low - 2, high + 2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 8, 10]))
    panels[-1, 0].set_xlabel(label)
    return figure


@matplotlib.rc_context(_STYLE)
def gates(activations: Mapping[str, np.ndarray], tokens: Sequence[str]) -> Figure:
    """How far the gates of a recurrent layer are open while it reads a sentence.

    A panel a gate, a row a unit, a column a token; units are ordered by how far the
    gate is open on average, so that a column shows their distribution.

    Args:
      activations: name of a gate -> float [token, unit], in [0, 1].
      tokens: what is read.

    Returns:
      A figure with one axes per gate and that of the colour bar.
    """
    figure = Figure(figsize=(WIDTH, 1.6 * len(activations) + 1.1))
    panels = figure.subplots(len(activations), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, values) in zip(panels, activations.items(), strict=True):
        order = np.argsort(-values.mean(0), kind="stable")
        image = axes.imshow(
            values[:, order].T,
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=0,
            vmax=1,
        )
        axes.grid(False)
        axes.set_title(f"{name}, mean {values.mean():.2f}")
        axes.set_yticks([])
        axes.set_ylabel(f"{values.shape[1]} units", fontsize=_SMALL)
        axes.tick_params(length=0)
    size = min(_SMALL, 200 / len(tokens))
    panels[-1].set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=size)
    bar = figure.colorbar(
        image, ax=list(panels), location="top", fraction=0.03, aspect=40
    )
    bar.outline.set_visible(False)
    bar.set_label("gate: 0 closed, 1 open", fontsize=_SMALL)
    return figure


@matplotlib.rc_context(_STYLE)
def attention_maps(
    maps: Sequence[tuple[np.ndarray, Sequence[str], Sequence[str]]],
) -> Figure:
    """What each token of a target takes from the tokens of a source.

    Darker is more; the darkest is the largest weight of the pair.

    Args:
      maps: for each pair the weights, float [target, source] in [0, 1], the tokens of
        the target (rows) and those of the source (columns).

    Returns:
      A figure with one axes per pair.
    """
    # A row is as high as its text.
    heights = [
        0.15 * len(target) + 0.11 * max(map(len, source), default=1) + 0.2
        for _, target, source in maps
    ]
    figure = Figure(figsize=(WIDTH, sum(heights)))
    panels = figure.subplots(
        len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, (weights, target, source) in zip(panels, maps, strict=True):
        axes.imshow(
            weights, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0
        )
        axes.grid(False)
        axes.spines[:].set_visible(False)
        size = min(_SMALL, 220 / max(len(source), 1))
        axes.set_xticks(range(len(source)), source, rotation=90, fontsize=size)
        axes.set_yticks(range(len(target)), target)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    return figure


@matplotlib.rc_context(_STYLE)
def gradient_flow(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    reference: Mapping[str, np.ndarray],
    reference_name: str,
) -> Figure:
    """Norms of the Jacobians between the states of two steps, by their distance.

    Args:
      curves: title of a panel -> name of a cell -> log10 norms [seed, lag], from lag 0
        on. The line is the median, the band the range of all seeds.
      reference: title of a panel -> log10 norms [lag] that are known exactly; dashed.
      reference_name: what that is.

    Returns:
      A figure with one axes per panel.
    """
    figure = Figure(figsize=(WIDTH, 2.2 * len(curves) + 0.6))
    panels = figure.subplots(len(curves), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, cells) in zip(panels, curves.items(), strict=True):
        exact = reference[title]
        axes.plot(exact, color=INK, linewidth=1, dashes=(4, 3), label=reference_name)
        for (name, norms), color, marker in zip(
            cells.items(), PALETTE, MARKERS, strict=False
        ):
            axes.fill_between(
                np.arange(norms.shape[1]),
                norms.min(0),
                norms.max(0),
                color=color,
                alpha=0.2,
                linewidth=0,
            )
            axes.plot(
                np.median(norms, 0),
                color=color,
                marker=marker,
                markersize=4,
                markevery=max(norms.shape[1] // 10, 1),
                label=name,
            )
        axes.set_title(title)
        axes.set_xlim(0, len(exact) - 1)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{value:.0f}"))
    panels[-1].set_xlabel("steps between the two states, T - t")
    figure.supylabel("norm of the Jacobian", fontsize=9, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


@matplotlib.rc_context(_STYLE)
def accuracy_by_distance(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str, chance: float
) -> Figure:
    """Accuracies against a distance, a line for each model.

    Args:
      curves: name of a model -> (distances [distance], accuracies [run, distance]),
        NaN where a run has none. The line is the mean, the band the range of all runs.
      label: what the distance is.
      chance: the accuracy of guessing; dashed.

    Returns:
      A figure with one axes.
    """
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    axes.axhline(chance, color=INK, linewidth=1, dashes=(4, 3), label="chance")
    for i, (name, (distances, accuracies)) in enumerate(curves.items()):
        color = PALETTE[i % len(PALETTE)]
        axes.fill_between(
            distances,
            np.nanmin(accuracies, 0),
            np.nanmax(accuracies, 0),
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(
            distances,
            np.nanmean(accuracies, 0),
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linestyle="-" if i < len(PALETTE) else ":",
            label=name,
        )
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _draw_metric(axes: Axes, rows: Sequence[Mapping], metric: str) -> None:
    drawn, broken = [], []
    splits = [row.get("split", "") for row in rows]
    order = [s for s in _SPLITS if s in splits]
    order += sorted(set(splits) - set(_SPLITS))
    for index, split in enumerate(order):
        points = [
            (row["step"], _number(row[metric]))
            for row, other in zip(rows, splits, strict=True)
            if other == split and metric in row and _is_measured(row[metric])
        ]
        if not points:
            continue
        step, value = np.array(points, float).T
        finite = np.isfinite(value)
        broken += list(step[~finite][:1])
        step, value = step[finite], value[finite]
        if not len(step):
            continue
        drawn.append(value)
        color = PALETTE[index % len(PALETTE)]
        marker = MARKERS[index % len(MARKERS)]
        if len(step) > _MAX_POINTS:
            chunks = np.array_split(np.arange(len(step)), _MAX_POINTS // 2)
            low, high = zip(
                *((value[c].min(), value[c].max()) for c in chunks), strict=True
            )
            step = np.array([step[c].mean() for c in chunks])
            value = np.array([value[c].mean() for c in chunks])
            axes.fill_between(step, low, high, color=color, alpha=0.2, linewidth=0)
        few = len(step) <= 40
        axes.plot(
            step,
            value,
            color=color,
            label=split,
            marker=marker if few else None,
            markersize=7 if len(step) == 1 else 3,
            linestyle="none" if len(step) == 1 else "-",
        )
    values = np.concatenate(drawn) if drawn else np.array([1.0])
    decades = math.log10(values.max() / values.min()) if values.min() > 0 else 0
    if decades > 1:
        axes.set_yscale("log")
        subs = (1, 2, 5) if decades < 2.5 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if broken:
        axes.axvline(min(broken), color=INK, linewidth=1, linestyle=":")
        axes.text(
            min(broken),
            0.98,
            f"not finite at step {min(broken):,.0f}",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            ha="right",
            va="top",
            fontsize=_SMALL,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training step")
    axes.set_title(metric.replace("_", " "), pad=20 if drawn else 6)
    if drawn:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.2,
            borderpad=0,
            ncols=4,
            handlelength=1.4,
            columnspacing=1.2,
        )


def _is_measured(value: object) -> bool:
    # JSON has no NaN: a writer may have put null.
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool)
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _check_prevalences(true: np.ndarray, estimate: np.ndarray, name: str) -> int:
    if true.ndim != 2 or true.shape != estimate.shape:
        raise ValueError(
            f"true and {name} must both be of shape [bags, K], but are of shapes "
            f"{list(true.shape)} and {list(estimate.shape)}"
        )
    return true.shape[1]


def _equal_count_bins(values: np.ndarray, count: int) -> list[np.ndarray]:
    # Fewer groups of fewer bags say nothing about spread.
    count = max(1, min(count, len(values) // 10))
    return np.array_split(np.argsort(values, kind="stable"), count)


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return 0.0
    return 1.96 * values.std(ddof=1) / math.sqrt(len(values))


def _grid(
    count: int, max_columns: int, height: float | None = None, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels in rows, narrow enough for a phone."""
    columns = min(count, max_columns)
    rows = math.ceil(count / columns)
    width = WIDTH if columns > 1 else 3.6
    if height is None:
        height = width / columns + 0.1
    figure = Figure(figsize=(width, height * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]
