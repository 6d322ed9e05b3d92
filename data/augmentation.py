"""Views of images: what may be done to an image without changing what it shows."""

import jax
import jax.numpy as jnp


def shift_and_flip(
    key: jax.Array, images: jax.Array, max_shift: int, flip: bool
) -> jax.Array:
    """Images, each shifted by whole pixels and flipped left to right at random.

    Args:
        key: PRNG key.
        images: [n, height, width, channel].
        max_shift: the shifts in height and in width are uniform in
            -max_shift..max_shift; edge pixels are repeated outwards.
        flip: whether an image is mirrored with probability one half.

    Returns:
        The shape and dtype of `images`.
    """
    flip_key, shift_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    width = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = jnp.pad(images, width, mode="edge")
    offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * max_shift + 1)

    def crop(image, offset):
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def turn_and_mirror(key: jax.Array, sets: jax.Array) -> jax.Array:
    """Sets of square images, each set turned and mirrored as a whole at random.

    One of the eight symmetries of the square a set: transposed or not, upside down or
    not, left to right or not, each with probability one half.

    Args:
        key: PRNG key.
        sets: [set, element, size, size, channel].

    Returns:
        The shape and dtype of `sets`.
    """
    coins = jax.random.bernoulli(key, shape=(3, len(sets), 1, 1, 1, 1))
    sets = jnp.where(coins[0], sets.swapaxes(2, 3), sets)
    sets = jnp.where(coins[1], sets[:, :, ::-1], sets)
    return jnp.where(coins[2], sets[:, :, :, ::-1], sets)


def deform(
    key: jax.Array,
    images: jax.Array,
    *,
    max_rotation: float = 0.25,
    max_scaling: float = 0.15,
    max_shear: float = 0.25,
    max_shift: float = 2.0,
    max_bend: float = 1.0,
) -> jax.Array:
    """Images of handwriting, each deformed as another hand might have written it.

    A pixel at offset u from the middle of the result shows what the image holds at

        u' = R S u + t + b sin(2 pi (u / size + phase))

    with a rotation R, scalings and a shear S, a shift t and a wave b that bends rows
    along columns and columns along rows, all uniform within the limits; values
    between pixels are linear, and zero outside. MNIST8m (Loosli, Canu and Bottou,
    "Training invariant support vector machines using selective sampling", 2007) is
    MNIST with deformations of that kind.

    Args:
        key: PRNG key.
        images: floating [n, height, width, channel], zero being paper.
        max_rotation: in radians.
        max_scaling: of the natural logarithm of each side's scale.
        max_shear: columns a row.
        max_shift: in pixels.
        max_bend: in pixels.

    Returns:
        The shape of `images`.
    """
    num_images, height, width, channels = images.shape
    limits = jnp.array(
        [max_rotation, max_scaling, max_scaling, max_shear]
        + [max_shift, max_shift, max_bend, max_bend, 0.5, 0.5]
    )
    drawn = limits * jax.random.uniform(
        key, (num_images, len(limits)), minval=-1, maxval=1
    )
    rotation, log_y, log_x, shear, *rest = jnp.moveaxis(drawn, 1, 0)[..., None, None]
    shift_y, shift_x, bend_y, bend_x, phase_y, phase_x = rest

    # Where each pixel of the result looks, [n, height, width].
    y = jnp.arange(height)[:, None] - (height - 1) / 2
    x = jnp.arange(width) - (width - 1) / 2
    across, along = jnp.exp(log_x) * x + shear * y, jnp.exp(log_y) * y
    sine, cosine = jnp.sin(rotation), jnp.cos(rotation)
    look_y = cosine * along + sine * across + shift_y + (height - 1) / 2
    look_x = cosine * across - sine * along + shift_x + (width - 1) / 2
    look_y += bend_y * jnp.sin(2 * jnp.pi * (x / width + phase_y))
    look_x += bend_x * jnp.sin(2 * jnp.pi * (y / height + phase_x))

    # Linear between the four pixels around that place; a frame of zeros is outside.
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    flat = padded.reshape(num_images, -1, channels)
    look_y = jnp.clip(look_y + 1, 0, height + 1)
    look_x = jnp.clip(look_x + 1, 0, width + 1)
    top = jnp.minimum(look_y.astype(jnp.int32), height)
    left = jnp.minimum(look_x.astype(jnp.int32), width)
    down, right = (look_y - top)[..., None], (look_x - left)[..., None]

    def pixels(row, column):
        number = (row * (width + 2) + column).reshape(num_images, -1, 1)
        found = jnp.take_along_axis(flat, number, axis=1, mode="clip")
        return found.reshape(images.shape)

    upper = (1 - right) * pixels(top, left) + right * pixels(top, left + 1)
    lower = (1 - right) * pixels(top + 1, left) + right * pixels(top + 1, left + 1)
    return (1 - down) * upper + down * lower
