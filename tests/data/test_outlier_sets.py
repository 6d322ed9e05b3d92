import jax
import numpy as np
import pytest
from scipy import stats

import data

KEY = jax.random.key(0)
ALPHA = 1e-4


@pytest.fixture(scope="module")
def digits():
    return data.OutlierSets("digits", set_size=6)


@pytest.fixture(scope="module", params=["train", "test"])
def drawn(request, digits):
    sample = jax.jit(digits.sample, static_argnums=(1, 2))
    return request.param, jax.device_get(sample(KEY, 500, request.param, digits.arrays))


def examples_of(digits, split, batch):
    """Which examples of the split the elements are, [set, element]."""
    inputs = digits.dataset.splits[split]["inputs"]
    whole = np.asarray(
        data.normalize(inputs, digits.dataset.shift, digits.dataset.scale)
    )
    rows = {image.tobytes(): index for index, image in enumerate(whole)}
    assert len(rows) == len(whole)
    elements = batch["inputs"].reshape(-1, *whole.shape[1:])
    return np.reshape([rows[e.tobytes()] for e in elements], batch["mask"].shape)


def test_the_target_is_the_only_element_of_another_class(digits, drawn):
    split, batch = drawn
    labels = digits.dataset.splits[split]["labels"][examples_of(digits, split, batch)]
    np.testing.assert_array_equal(labels, batch["labels"])
    target = labels[np.arange(500), batch["target"]]
    others = np.array(
        [np.delete(*pair) for pair in zip(labels, batch["target"], strict=True)]
    )
    assert (others == others[:, :1]).all()
    assert (target != others[:, 0]).all()


def test_no_example_comes_twice_in_a_set(digits, drawn):
    split, batch = drawn
    indices = np.sort(examples_of(digits, split, batch), axis=1)
    assert (np.diff(indices, axis=1) > 0).all()
    assert batch["mask"].all()


def test_positions_and_pairs_of_classes_are_uniform(digits, drawn):
    _, batch = drawn
    assert stats.chisquare(np.bincount(batch["target"], minlength=6)).pvalue > ALPHA
    outlier = batch["labels"][np.arange(500), batch["target"]]
    normal = np.median(batch["labels"], axis=1).astype(int)
    for classes in (outlier, normal, (outlier - normal) % 10 - 1):
        count = np.bincount(classes, minlength=10 if classes.max() > 8 else 9)
        assert stats.chisquare(count).pvalue > ALPHA


@pytest.mark.parametrize("set_size", [3, 7, 8, 10, 11, 16, 20])
def test_there_is_one_outlier_whatever_the_size(set_size):
    digits = data.OutlierSets("digits", set_size=set_size)
    sample = jax.jit(digits.sample, static_argnums=(1, 2))
    batch = jax.device_get(sample(KEY, 100, "train", digits.arrays))
    for labels, position in zip(batch["labels"], batch["target"], strict=True):
        np.testing.assert_array_equal(
            labels == labels[position], np.arange(set_size) == position
        )
        assert len(set(labels)) == 2


def test_the_spec_asks_for_one_number_per_element(digits):
    assert digits.spec.num_classes == 1
    assert digits.spec.feature_shape == digits.dataset.spec.feature_shape
    assert digits.spec.source == digits.dataset.spec.source


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="set_size must be 3 or more"):
        data.OutlierSets("digits", set_size=2)
    with pytest.raises(data.DataError, match="digits is too small for sets of 200"):
        data.OutlierSets("digits", set_size=200)
