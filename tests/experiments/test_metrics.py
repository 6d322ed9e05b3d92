import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments import metrics

values = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_merging_batches_gives_the_mean_over_examples(data):
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    sums, everything = {}, []
    for size in sizes:
        x = data.draw(hnp.arrays(np.float32, size, elements=values))
        mask = data.draw(hnp.arrays(bool, size))
        sums = metrics.merge(sums, {"m": metrics.masked(x, mask)})
        everything.append(x[mask])
    everything = np.concatenate(everything)
    mean = metrics.means(sums)["m"]
    if everything.size:
        np.testing.assert_allclose(mean, everything.mean(dtype=float), atol=1e-3)
    else:
        assert math.isnan(mean)


def test_a_mean_of_means_it_is_not():
    sums = metrics.merge({}, {"m": metrics.masked(np.zeros(9))})
    sums = metrics.merge(sums, {"m": metrics.masked(np.ones(1))})
    assert metrics.means(sums) == {"m": 0.1}


def test_what_is_masked_counts_nothing_whatever_it_is():
    x = np.array([[1, np.nan], [np.inf, 3]])
    mask = np.array([[True, False], [False, True]])
    assert metrics.masked(x, mask) == (4, 2)
    gradient = jax.grad(lambda x: metrics.masked(x, mask)[0])(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, mask)


def test_a_mask_is_broadcast_and_integers_are_averaged():
    total, count = metrics.masked(
        np.array([[1, 2], [3, 4]]), np.array([[True], [False]])
    )
    assert (total, count) == (3, 2)
    assert total.dtype == count.dtype == jnp.float32


def test_steps_merge_in_double_precision():
    rows = np.full(10_000, 0.1, np.float32)
    sums = metrics.merge({}, {"m": (rows, np.ones_like(rows))})
    assert metrics.means(sums)["m"] == pytest.approx(np.float32(0.1), rel=1e-12)


def test_the_first_nonfinite_step_and_metric_are_found():
    good, bad = np.zeros(5), np.array([0, 0, 0, np.nan, np.inf])
    late = np.array([0, 0, 0, 0, -np.inf])
    ones = np.ones(5)
    found = metrics.first_nonfinite({"late": (late, ones), "bad": (bad, ones)})
    assert found[:2] == (3, "bad") and math.isnan(found[2])
    assert metrics.first_nonfinite({"late": (late, ones)}) == (4, "late", -math.inf)
    assert metrics.first_nonfinite({"good": (good, ones)}) is None
    # Where nothing was counted there is nothing to be finite.
    assert metrics.first_nonfinite({"bad": (bad, np.zeros(5))}) is None
    population = np.stack([good, bad], axis=1)  # [step, member]
    pair = (population, np.ones_like(population))
    assert metrics.first_nonfinite({"p": pair})[:2] == (3, "p")


def test_rows_and_events_hold_the_same(tmp_path, events):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 0.5, "accuracy": 0.25})
    writer.write_event(1, "steps_per_second", 3.0)
    writer.write(2, "validation", {"loss": 0.75})
    writer.close()
    assert metrics.read_rows(tmp_path) == [
        {"step": 1, "split": "train", "loss": 0.5, "accuracy": 0.25},
        {"step": 2, "split": "validation", "loss": 0.75},
    ]
    assert sorted(events(tmp_path)) == [
        (1, "steps_per_second", 3.0),
        (1, "train/accuracy", 0.25),
        (1, "train/loss", 0.5),
        (2, "validation/loss", 0.75),
    ]


def test_going_on_from_a_position_cuts_off_what_came_after(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    position = writer.position
    writer.write(2, "train", {"loss": 2.0})
    writer.close()
    writer = metrics.MetricsWriter(tmp_path, position, step=1)
    writer.write(2, "train", {"loss": 3.0})
    writer.close()
    assert [row["loss"] for row in metrics.read_rows(tmp_path)] == [1.0, 3.0]


def test_a_file_that_was_deleted_is_not_filled_with_zeros(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, position=100, step=1)
    writer.write(2, "train", {"loss": 3.0})
    writer.close()
    assert metrics.read_rows(tmp_path) == [{"step": 2, "split": "train", "loss": 3.0}]


def test_a_line_cut_short_is_left_out(tmp_path):
    assert metrics.read_rows(tmp_path) == []
    line = json.dumps({"step": 1})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line[:4]}")
    assert metrics.read_rows(tmp_path) == [{"step": 1}]
