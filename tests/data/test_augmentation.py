"""Views of images, against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from data.augmentation import deform, shift_and_flip, turn_and_mirror

NOTHING = {
    f"max_{name}": 0.0 for name in ("rotation", "scaling", "shear", "shift", "bend")
}


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(0), (4, 9, 8, 2))


def test_views_shift_and_mirror():
    images = jax.random.uniform(jax.random.key(0), (64, 6, 5, 1))
    views = shift_and_flip(jax.random.key(1), images, 1, True)
    found = set()
    for image, view in zip(np.asarray(images), np.asarray(views), strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        mirrored = np.pad(image[:, ::-1], ((1, 1), (1, 1), (0, 0)), mode="edge")
        matches = [
            (side, y, x)
            for side, source in enumerate((padded, mirrored))
            for y in range(3)
            for x in range(3)
            if np.array_equal(source[y : y + 6, x : x + 5], view)
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 12


def test_a_set_is_turned_and_mirrored_as_a_whole():
    sets = np.asarray(jax.random.uniform(jax.random.key(0), (64, 3, 5, 5, 2)))
    found = []
    for images, view in zip(
        sets, np.asarray(turn_and_mirror(jax.random.key(1), sets)), strict=True
    ):
        turned = [np.rot90(images, turns, (1, 2)) for turns in range(4)]
        symmetries = turned + [images[:, :, ::-1] for images in turned]
        (symmetry,) = [i for i, s in enumerate(symmetries) if np.array_equal(s, view)]
        found.append(symmetry)
    assert set(found) == set(range(8))


def test_without_limits_nothing_is_deformed(images):
    found = deform(jax.random.key(1), images, **NOTHING)
    np.testing.assert_array_equal(found, images)


def draw(monkeypatch, *shares):
    """Lets `deform` draw these shares of its limits, in their order there."""

    def uniform(key, shape, *, minval, maxval):
        assert shape[1] == len(shares) and (minval, maxval) == (-1, 1)
        return jnp.broadcast_to(jnp.asarray(shares), shape)

    monkeypatch.setattr(jax.random, "uniform", uniform)


def test_a_shift_by_whole_pixels_moves_the_image_and_nothing_comes_in(
    images, monkeypatch
):
    # Rotation, two scales, shear, shifts down and right, two bends, two phases.
    draw(monkeypatch, 0, 0, 0, 0, 1, -0.5, 0, 0, 0, 0)
    found = np.asarray(deform(jax.random.key(1), images, **NOTHING | {"max_shift": 2}))
    # A pixel of the result shows what is two rows below and one column to the left.
    rolled = np.roll(images, (-2, 1), (1, 2))
    np.testing.assert_allclose(found[:, :-2, 1:], rolled[:, :-2, 1:], rtol=1e-6)
    assert not found[:, -2:].any() and not found[:, :, :1].any()


def test_linear_maps_are_those_of_scipy(images, monkeypatch):
    draw(monkeypatch, 0.7, 0.5, -0.9, 0.8, 0.3, -0.6, 0, 0, 0, 0)
    found = deform(jax.random.key(1), images)
    angle, log_y, log_x, shear = 0.7 * 0.25, 0.5 * 0.15, -0.9 * 0.15, 0.8 * 0.25
    sine, cosine = np.sin(angle), np.cos(angle)
    rotation = np.array([[cosine, sine], [-sine, cosine]])  # of (row, column)
    matrix = rotation @ np.array([[np.exp(log_y), 0], [shear, np.exp(log_x)]])
    middle = np.array([8, 7]) / 2
    offset = middle - matrix @ middle + 2 * np.array([0.3, -0.6])
    for image, view in zip(np.asarray(images), np.asarray(found), strict=True):
        for channel in range(2):
            expected = ndimage.affine_transform(
                image[..., channel], matrix, offset, order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(view[..., channel], expected, atol=1e-5)


def test_deformed_images_differ_by_key_and_image(images):
    same = jnp.broadcast_to(images[:1], images.shape)
    first, second = (deform(jax.random.key(seed), same) for seed in (1, 2))
    assert np.abs(first[0] - first[1]).max() > 0.01
    assert np.abs(first - second).max() > 0.01
