import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from archs import (
    CNN,
    MLP,
    DeepSets,
    EquivariantLayer,
    PowerMean,
    PrevalenceHead,
    Quantiles,
    contracts,
)

NAMES = ("sum", "mean", "sqrt_sum", "log_count", "max", "min", "median")
NAMES += ("lower_median", "std", "logsumexp", 0.3, 0.9)
AGGREGATIONS = ["mean", NAMES, PowerMean(), Quantiles((0.2, 0.5))]


def set_function(model, inputs):
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    return jax.jit(lambda x, mask, *weights: model.apply(variables, x, mask, *weights))


def bags(shape=(4, 6, 5)):
    inputs = jax.random.normal(jax.random.key(0), shape)
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, shape[:2])
    return inputs, mask.at[:, 0].set(True).at[1].set(False)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_contracts(aggregation):
    inputs, mask = bags()
    f = set_function(DeepSets(MLP((8,), 7), MLP((8,), 3), aggregation), inputs)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_batch_independent(f, inputs, mask)
    contracts.assert_weights_are_multiplicities(f, inputs, mask, key=jax.random.key(0))


@pytest.mark.parametrize("aggregation", ["mean", "median", "max", PowerMean()])
def test_duplicates_change_nothing_where_only_the_distribution_counts(aggregation):
    inputs, mask = bags()
    f = set_function(DeepSets(MLP((8,), 7), MLP((8,), 3), aggregation), inputs)
    contracts.assert_duplication(f, inputs, mask)


def test_permutation_invariance_without_a_mask():
    inputs, _ = bags()
    f = set_function(DeepSets(MLP((8,), 7), MLP((8,), 3), NAMES), inputs)
    contracts.assert_permutation_invariant(f, inputs, key=jax.random.key(0))
    full = jnp.ones(inputs.shape[:2], bool)
    np.testing.assert_allclose(f(inputs, full), f(inputs, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("aggregation", [NAMES, PowerMean()])
def test_a_thousand_elements_come_in_any_order(aggregation, wide):
    with jax.enable_x64(wide):
        inputs, mask = bags((3, 1000, 5))
        f = set_function(DeepSets(MLP((8,), 7), MLP((8,), 3), aggregation), inputs)
        assert f(inputs, mask).dtype == (jnp.float64 if wide else jnp.float32)
        contracts.assert_permutation_invariant(
            f, inputs, mask, key=jax.random.key(0), rtol=1e-12 if wide else 1e-5
        )


def test_contracts_with_images():
    inputs, mask = bags((3, 4, 8, 8, 1))
    f = set_function(DeepSets(CNN((2, 3), 6), PrevalenceHead((8,), 3)), inputs)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)


@pytest.mark.parametrize("aggregation", ["mean", ("max", "sum"), PowerMean()])
def test_equivariant_layer(aggregation):
    inputs, mask = bags()
    f = set_function(EquivariantLayer(4, aggregation), inputs)
    for m in (None, mask):
        contracts.assert_permutation_equivariant(f, inputs, m, key=jax.random.key(0))

    # The weighted sum over the elements makes an invariant network of it.
    @jax.jit
    def pooled(x, mask, weights=None):
        y = f(x, mask, weights)
        return jnp.sum(y if weights is None else y * weights[..., None], axis=1)

    contracts.assert_padding_invariant(pooled, inputs, mask)
    contracts.assert_finite_on_empty_set(pooled, inputs)
    contracts.assert_weights_are_multiplicities(
        pooled, inputs, mask, key=jax.random.key(0)
    )
    absent = jnp.where(mask, 1.0, 0.0)
    np.testing.assert_array_equal(f(inputs, None, absent), f(inputs, mask))


def test_equivariant_layer_is_the_matrix_of_the_theorem():
    # One feature: y = (λ I + γ/m 1 1') x + b.
    layer = EquivariantLayer(1)
    x = jax.random.normal(jax.random.key(0), (2, 5, 1))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    jacobian = jax.jacobian(lambda x: layer.apply(variables, x[None])[0, :, 0])(x[0])
    own = variables["params"]["Dense_0"]["kernel"][0, 0]
    shared = variables["params"]["Dense_1"]["kernel"][0, 0]
    expected = own * np.eye(5) + shared / 5 * np.ones((5, 5))
    np.testing.assert_allclose(jacobian[..., 0], expected, rtol=1e-5, atol=1e-6)


def test_is_rho_of_the_mean_of_phi_in_torch():
    model = DeepSets(MLP((7,), 6), MLP((5,), 2))
    inputs = jax.random.normal(jax.random.key(0), (3, 4, 5))
    variables = jax.jit(model.init)(jax.random.key(1), inputs)

    def net(params):
        layers = []
        for i in (0, 1):
            kernel, bias = params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]
            layer = torch.nn.Linear(*kernel.shape)
            layer.weight.data = torch.from_numpy(np.array(kernel.T))
            layer.bias.data = torch.from_numpy(np.array(bias))
            layers.append(layer)
        return torch.nn.Sequential(layers[0], torch.nn.LeakyReLU(0.01), layers[1])

    phi, rho = net(variables["params"]["phi"]), net(variables["params"]["rho"])
    expected = rho(phi(torch.from_numpy(np.array(inputs))).mean(1)).detach().numpy()
    np.testing.assert_allclose(
        model.apply(variables, inputs), expected, rtol=1e-5, atol=1e-6
    )


def test_call_is_its_three_methods():
    inputs, mask = bags()
    weights = jax.random.uniform(jax.random.key(3), mask.shape)
    model = DeepSets(MLP((8,), 7), PrevalenceHead((8,), 3), ("mean", "max"))
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    bound = model.bind(variables)
    features = bound.encode(inputs, mask)
    assert features.shape == (4, 6, 7)
    for args in ((mask,), (mask, weights)):
        representation = bound.aggregate(features, *args)
        assert representation.shape == (4, 14)
        np.testing.assert_array_equal(
            bound.decode(representation), model.apply(variables, inputs, *args)
        )


@pytest.mark.parametrize("aggregation", ["mean", ("sum", "log_count"), PowerMean(3.0)])
def test_representations_of_parts_are_merged(aggregation):
    inputs, mask = bags()
    model = DeepSets(MLP((8,), 7), MLP((8,), 3), aggregation)
    bound = model.bind(jax.jit(model.init)(jax.random.key(1), inputs))
    contracts.assert_chunk_invariant(
        bound.aggregate,
        bound.merge,
        bound.encode(inputs, mask),
        mask,
        key=jax.random.key(0),
    )


def test_an_aggregation_with_parameters_learns_them():
    inputs, mask = bags()
    model = DeepSets(MLP((8,), 7), MLP((8,), 3), PowerMean())
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    assert variables["params"]["aggregation"]["exponent"].tolist() == [1] * 7
    gradient = jax.jit(jax.grad(lambda v: model.apply(v, inputs, mask).sum()))
    assert np.all(gradient(variables)["params"]["aggregation"]["exponent"])


def test_extrapolates_a_size_that_the_mean_and_the_count_tell():
    # The sum of the elements from their mean and their number, exactly.
    def error(size):
        x = jax.random.uniform(jax.random.key(size), (8, size, 1))
        mean, log_count = jnp.split(
            DeepSets(identity, identity, ("mean", "log_count")).apply({}, x), 2, axis=1
        )
        return jnp.max(jnp.abs(mean * jnp.expm1(log_count) / x.sum(1) - 1))

    class Identity(nn.Module):
        def __call__(self, x, *, train=False):
            return x

    identity = Identity()
    contracts.assert_size_generalization(error, (1, 50, 1000), bound=1e-5)


@pytest.mark.parametrize("aggregation", ["mean", "logsumexp"])
def test_gradients_in_float64_are_those_of_finite_differences(aggregation):
    with jax.enable_x64(True):
        inputs, mask = (jnp.asarray(a) for a in bags((2, 4, 3)))
        inputs = inputs.astype(jnp.float64)
        model = DeepSets(MLP((5,), 4, activation="tanh"), MLP((), 2), aggregation)
        variables = jax.jit(model.init)(jax.random.key(1), inputs)
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
        f = jax.jit(lambda x, mask: model.apply(variables, x, mask))
        assert f(inputs, mask).dtype == jnp.float64
        jax.test_util.check_grads(
            lambda x: f(x, mask), (inputs,), order=1, modes=("rev",), atol=1e-6
        )
        contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("aggregation", ["mean", "median", NAMES])
def test_half_precision(aggregation, dtype):
    inputs, mask = bags()

    def network(dtype):
        head = PrevalenceHead((8,), 3, dtype=dtype)
        model = DeepSets(MLP((8,), 7, dtype=dtype), head, aggregation)
        return set_function(model, inputs)

    f = network(dtype)
    out = f(inputs.astype(dtype), mask)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-6)
    wide, rtol = network(None)(inputs, mask), float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out, wide, rtol=rtol)
    contracts.assert_permutation_invariant(
        f, inputs, mask, key=jax.random.key(0), rtol=2e-2
    )


@pytest.mark.parametrize(
    ("model", "shape", "published"),
    [
        (
            DeepSets(MLP((1024, 1024), 300, 0.5), PrevalenceHead((2048,) * 3, 2, 0.5)),
            (1, 2, 300),
            10.68,
        ),
        (DeepSets(CNN(), PrevalenceHead((1024,), 10, 0.1)), (1, 2, 28, 28, 1), 0.69),
    ],
)
def test_parameter_counts_are_the_published_ones(model, shape, published):
    # Of HistNetQ's comparison on LeQua 2022 T1A and on Fashion-MNIST, in millions.
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert round(count / 1e6, 2) == published


def test_wrong_inputs_are_named():
    model = DeepSets(MLP((), 2), MLP((), 2))
    with pytest.raises(ValueError, match=r"inputs must .*\(3, 2\)"):
        model.init(jax.random.key(0), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"weights must have shape \(3, 2\)"):
        model.init(jax.random.key(0), jnp.zeros((3, 2, 1)), None, jnp.ones(3))
    with pytest.raises(ValueError, match="aggregation must name"):
        model.clone(aggregation="mode").init(jax.random.key(0), jnp.zeros((3, 2, 1)))
