import jax
import numpy as np
import pytest

import data


@pytest.fixture(scope="module")
def images():
    return data.load("digits")


def test_pixels_come_row_by_row(images):
    dataset = data.SequentialImages("digits")
    assert dataset.spec.feature_shape == (1,) and dataset.spec.num_classes == 10
    assert dataset.spec.sizes == images.spec.sizes
    assert dataset.buckets == ((0, images.spec.sizes["train"], 64),)
    select = jax.jit(dataset.select, static_argnums=1)
    for split, stored in images.splits.items():
        batch = select(np.array([3, 0, 5]), split, dataset.arrays)
        expected = data.normalize(
            stored["inputs"][[3, 0, 5]], images.shift, images.scale
        )
        assert batch["inputs"].dtype == np.float32
        np.testing.assert_array_equal(batch["inputs"], expected.reshape(3, 64, 1))
        np.testing.assert_array_equal(batch["targets"], stored["labels"][[3, 0, 5]])
        assert batch["lengths"].tolist() == [64] * 3


def test_a_permutation_is_the_same_for_all_images(images):
    plain = data.SequentialImages("digits")
    permuted = data.SequentialImages("digits", permutation_seed=3)
    assert permuted.spec.name == "permuted_digits"
    orders = []
    for split in ("train", "test"):
        before, after = (
            np.asarray(d.arrays[split]["inputs"])[..., 0] for d in (plain, permuted)
        )
        assert (before != after).any()
        # Pixels are told apart by their values in all images of the train split.
        np.testing.assert_array_equal(np.sort(before, 1), np.sort(after, 1))
        order = np.random.default_rng(3).permutation(64)
        np.testing.assert_array_equal(before[:, order], after)
        orders.append(order)
    other = data.SequentialImages("digits", permutation_seed=4)
    assert (other.arrays["test"]["inputs"] != permuted.arrays["test"]["inputs"]).any()


def test_only_images_are_read_pixel_by_pixel():
    with pytest.raises(data.DataError, match=r"must be images.*wine are \[13\]"):
        data.SequentialImages("wine").arrays  # noqa: B018
