"""The two-dimensional convolution of `nn.Conv`, with gradients that are fast on CPUs.

    nn.Conv(features, (5, 5), conv_general_dilated=convolve)

XLA's CPU backend computes the gradient of a kernel as a convolution whose window is
the whole image, far below what its matrix products reach. Here it is products of the
shifted inputs and the outputs' gradient,

    dL/dK[i, j] = sum_n x[n, s y + i, s x + j]' dL/dy[n, y, x],

a few images at a time, which stay in the cache. On other backends it is XLA's own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Images whose shifted copies fit into a core's cache together.
IMAGES_AT_ONCE = 4


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    **kwargs: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` as `nn.Conv` calls it.

    Without dilation and groups its gradient with respect to the kernel is that of this
    file; it then has no forward-mode derivative (`jax.jvp`).

    Args:
      inputs: [n, height, width, channel].
      kernel: [kernel height, kernel width, channel, feature].
      window_strides: of height and width.
      padding: before and after, of height and width, or "SAME" or "VALID".
      lhs_dilation: of the inputs.
      rhs_dilation: of the kernel.
      kwargs: see `lax.conv_general_dilated`.

    Returns:
      [n, height', width', feature].
    """
    dilated = {*lhs_dilation, *rhs_dilation} != {1}
    if kernel.ndim != 4 or dilated or kwargs.get("feature_group_count", 1) != 1:
        return lax.conv_general_dilated(
            inputs,
            kernel,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            **kwargs,
        )
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(
            inputs.shape[1:3], kernel.shape[:2], strides, padding
        )
    pads = tuple(tuple(sides) for sides in padding)
    return _convolve(inputs, kernel, strides, pads, kwargs.get("precision"))


def _xla(inputs, kernel, strides, padding, precision):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        inputs,
        kernel,
        strides,
        padding,
        dimension_numbers=layout,
        precision=precision,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(inputs, kernel, strides, padding, precision):
    return _xla(inputs, kernel, strides, padding, precision)


def _forward(inputs, kernel, strides, padding, precision):
    return _convolve(inputs, kernel, strides, padding, precision), (inputs, kernel)


def _backward(strides, padding, precision, residuals, gradient):
    inputs, kernel = residuals

    def of_xla(inputs, kernel, gradient):
        convolution = partial(
            _xla, strides=strides, padding=padding, precision=precision
        )
        return jax.vjp(convolution, inputs, kernel)[1](gradient)

    def by_products(inputs, kernel, gradient):
        of_inputs, _ = of_xla(inputs, kernel, gradient)  # what is not used is dropped
        return of_inputs, _kernel_gradient(
            inputs, gradient, kernel.shape, strides, padding, precision
        ).astype(kernel.dtype)

    return lax.platform_dependent(
        inputs, kernel, gradient, cpu=by_products, default=of_xla
    )


_convolve.defvjp(_forward, _backward)


def _kernel_gradient(inputs, gradient, shape, strides, padding, precision):
    height, width, channels, features = shape
    _, rows, columns, _ = gradient.shape
    down, right = strides

    def of_images(inputs, gradient):
        padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
        # [n, rows, padded width, kernel height * channels]
        tall = jnp.concatenate(
            [
                lax.slice_in_dim(padded, i, i + down * (rows - 1) + 1, down, axis=1)
                for i in range(height)
            ],
            axis=-1,
        )
        gradient = gradient.reshape(-1, features)
        products = []
        for j in range(width):
            end = j + right * (columns - 1) + 1
            shifted = lax.slice_in_dim(tall, j, end, right, axis=2)
            shifted = shifted.reshape(-1, height * channels)
            products.append(jnp.dot(shifted.T, gradient, precision=precision))
        return jnp.stack(products)  # [kernel width, kernel height * channels, feature]

    whole = len(inputs) // IMAGES_AT_ONCE * IMAGES_AT_ONCE
    parts = jax.tree.map(
        lambda leaf: leaf[:whole].reshape(-1, IMAGES_AT_ONCE, *leaf.shape[1:]),
        (inputs, gradient),
    )
    total = of_images(inputs[whole:], gradient[whole:])
    total, _ = lax.scan(lambda sum_, p: (sum_ + of_images(*p), None), total, parts)
    total = total.reshape(width, height, channels, features)
    return jnp.swapaxes(total, 0, 1)
