import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archs.convolution import convolve


def layers(**fields):
    """The same layer with XLA's gradients and with those of `convolve`."""
    return nn.Conv(**fields), nn.Conv(**fields, conv_general_dilated=convolve)


@pytest.mark.parametrize("num_images", [1, 11])
@pytest.mark.parametrize(
    "fields",
    [
        dict(features=3, kernel_size=(5, 5)),
        dict(features=2, kernel_size=(3, 3), strides=2),
        dict(features=2, kernel_size=(2, 4), strides=(1, 3), padding="VALID"),
        dict(features=1, kernel_size=(1, 1), padding=((2, 0), (0, 1))),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_xla(fields, num_images):
    x = jax.random.normal(jax.random.key(0), (num_images, 9, 8, 4))
    xla, ours = layers(**fields)
    variables = xla.init(jax.random.key(1), x)

    def loss(layer, variables, x):
        return jnp.sum(jnp.sin(layer.apply(variables, x)))

    for layer in (xla, ours):
        jax.tree.map(
            np.testing.assert_array_equal,
            layer.apply(variables, x),
            xla.apply(variables, x),
        )
    expected, found = (
        jax.jit(jax.grad(lambda v, x, layer=layer: loss(layer, v, x), argnums=(0, 1)))(
            variables, x
        )
        for layer in (xla, ours)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


def test_a_penalty_on_the_gradient_has_a_gradient():
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    xla, ours = layers(features=2, kernel_size=(3, 3))
    variables = xla.init(jax.random.key(1), x)

    def penalty(variables, layer):
        of_inputs = jax.grad(lambda x: jnp.sum(jnp.tanh(layer.apply(variables, x))))(x)
        return jnp.sum(of_inputs**2)

    expected, found = (jax.grad(penalty)(variables, layer) for layer in (xla, ours))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


def test_it_is_vectorised_over_kernels():
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    xla, ours = layers(features=2, kernel_size=(3, 3))
    keys = jax.random.split(jax.random.key(1), 2)
    many = jax.vmap(lambda key: xla.init(key, x))(keys)

    def gradients(layer):
        def one(variables):
            return jax.grad(lambda v: jnp.sum(layer.apply(v, x) ** 2))(variables)

        return jax.vmap(one)(many)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradients(ours),
        gradients(xla),
    )


@pytest.mark.parametrize(
    "fields", [dict(feature_group_count=2), dict(kernel_dilation=2)], ids=str
)
def test_groups_and_dilation_are_left_to_xla(fields):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
    xla, ours = layers(features=2, kernel_size=(3, 3), **fields)
    variables = xla.init(jax.random.key(1), x)
    np.testing.assert_array_equal(ours.apply(variables, x), xla.apply(variables, x))
    tangent = jax.jvp(lambda x: ours.apply(variables, x), (x,), (x,))[1]
    assert tangent.shape == (2, 6, 6, 2)
