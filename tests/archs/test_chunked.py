import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archs import (
    MLP,
    DeepSets,
    GMNet,
    HistNetQ,
    LinearHistogram,
    PowerMean,
    PrevalenceHead,
    SetTransformer,
    apply_in_chunks,
    apply_sharded,
)

ELEMENTS = 23
MODELS = {
    str(aggregation): DeepSets(MLP((8,), 7), MLP((8,), 3), aggregation)
    for aggregation in (
        "mean",
        "sum",
        "max",
        "logsumexp",
        ("min", "log_count", "sqrt_sum"),
        PowerMean(2.0),
    )
} | {
    "HistNetQ": HistNetQ(MLP((8,), 7), LinearHistogram(4), PrevalenceHead((8,), 3)),
    "GMNet": GMNet(
        PrevalenceHead((8,), 3),
        num_spaces=2,
        num_gaussians=4,
        latent_size=2,
        hidden_sizes=(6,),
    ),
}
# Elements that attend to each other do not add up.
ATTENTIVE = SetTransformer(MLP((), 3), hidden_size=4, num_heads=2, num_layers=1)


def network(name):
    model = MODELS[name]
    x = jax.random.normal(jax.random.key(0), (ELEMENTS, 5))
    return model, jax.jit(model.init)(jax.random.key(1), x[None]), np.asarray(x)


def split(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("name", MODELS)
def test_uneven_and_empty_chunks_are_the_whole(name):
    model, variables, x = network(name)
    whole = model.apply(variables, x[None])
    for sizes in ([23], [3, 0, 13, 7], [0, 23, 0]):
        # A generator: no chunk is asked for twice.
        chunks = (chunk for chunk in split(x, sizes))
        found = apply_in_chunks(model, variables, chunks, chunk_size=8)
        assert found.shape == whole.shape
        np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_weighted_chunks_are_the_whole(name):
    model, variables, x = network(name)
    weights = np.random.default_rng(0).uniform(0, 3, ELEMENTS).astype(np.float32)
    weights[::4] = 0
    weights[2::8] = np.nan  # no more an element than one of weight 0
    x = np.where(weights[:, None] > 0, x, np.float32(np.nan))
    whole = model.apply(variables, x[None], None, weights[None])
    sizes = [3, 0, 13, 7]
    pairs = zip(split(x, sizes), split(weights, sizes), strict=True)
    found = apply_in_chunks(model, variables, pairs, chunk_size=8)
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6)


def test_many_chunks_lose_no_digits():
    # Merged one after the other they lose several times the tolerance.
    x = np.random.default_rng(0).normal(3, 1, (20_000, 2)).astype(np.float32)
    model = DeepSets(MLP((), 2), MLP((), 2))
    eye = {"Dense_0": {"kernel": np.eye(2, dtype="f"), "bias": np.zeros(2, "f")}}
    variables = {"params": {"phi": eye, "rho": eye}}
    found = apply_in_chunks(model, variables, [x], chunk_size=8)
    np.testing.assert_allclose(found[0], x.mean(0, dtype=np.float64), rtol=5e-7)


def test_a_bag_without_elements():
    model, variables, x = network("sum")
    found = apply_in_chunks(model, variables, [x[:0], x[:0]], chunk_size=8)
    empty = model.apply(variables, x[None], jnp.zeros((1, ELEMENTS), bool))
    np.testing.assert_allclose(found, empty, rtol=1e-6)


def test_one_program_serves_all_chunks_and_calls():
    traces = []

    class Counting(DeepSets):
        def encode(self, *args, **kwargs):
            traces.append(1)
            return super().encode(*args, **kwargs)

    model = Counting(MLP((8,), 7), MLP((8,), 3))
    x = np.ones((ELEMENTS, 5), np.float32)
    variables = model.init(jax.random.key(1), x[None])
    apply_in_chunks(model, variables, [x], chunk_size=8)
    traces.clear()
    for sizes in ([23], [1, 2, 20], [9, 14]):
        apply_in_chunks(model, variables, split(x, sizes), chunk_size=8)
    assert not traces


@pytest.mark.parametrize(
    ("model", "chunks", "chunk_size", "sentence"),
    [
        (MLP((), 2), [np.ones((3, 5))], 8, "MLP has none"),
        (ATTENTIVE, [np.ones((3, 5), "f")], 8, "SetTransformer has none"),
        (MODELS["mean"], [], 8, "chunks must hold"),
        (MODELS["mean"], [np.ones((3, 5), "f")], 0, "chunk_size must be 1 or more"),
        (MODELS["mean"], [[np.ones((3, 5), "f"), np.ones(3, "f")]], 8, "is a list"),
        (MODELS["mean"], [(np.ones((3, 5), "f"), [1.0] * 3)], 8, "is a list"),
        (
            MODELS["mean"],
            [(np.ones((3, 5), "f"), np.ones(2, "f"))],
            8,
            "2 for 3 elements",
        ),
        (
            DeepSets(MLP((), 2), MLP((), 2), ("mean", "median")),
            [np.ones((3, 5), "f")],
            8,
            "the aggregation 'median' of a set does not follow",
        ),
    ],
)
def test_what_cannot_be_chunked_is_named(model, chunks, chunk_size, sentence):
    inputs = np.ones((3, 5) if isinstance(model, MLP) else (1, 3, 5), "f")
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    with pytest.raises(ValueError, match=sentence):
        apply_in_chunks(model, variables, chunks, chunk_size=chunk_size)


def test_an_axis_the_mesh_does_not_have_is_named():
    model, variables, x = network("mean")
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match=r"axis must name .*\('data',\).*'element'"):
        apply_sharded(model, variables, x[None], mesh=mesh)


def test_elements_that_attend_to_each_other_are_not_spread():
    mesh = jax.make_mesh((1,), ("element",))
    with pytest.raises(ValueError, match="adds up, but SetTransformer has none"):
        apply_sharded(ATTENTIVE, {}, np.ones((1, 3, 5), "f"), mesh=mesh)


# Runs in a process of its own, since the number of devices is fixed at the start.
ON_EIGHT_DEVICES = """
from functools import partial

import jax, jax.numpy as jnp, numpy as np
from archs import MLP, DeepSets, GMNet, HistNetQ, LinearHistogram, PowerMean
from archs import PrevalenceHead, apply_sharded

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("element",))
deepsets = DeepSets(
    MLP((8,), 7),
    MLP((8,), 3),
    ("mean", "sum", "sqrt_sum", "log_count", "max", "logsumexp"),
)
histnetq = HistNetQ(MLP((8,), 7), LinearHistogram(4), PrevalenceHead((8,), 3))
power_mean = DeepSets(MLP((8,), 7), MLP((8,), 3), PowerMean(2.0))
gmnet = GMNet(
    PrevalenceHead((8,), 3),
    num_spaces=2,
    num_gaussians=4,
    latent_size=2,
    hidden_sizes=(6,),
)
x = jax.random.normal(jax.random.key(0), (3, 21, 5))
# The second bag is empty, and so are most devices for the third, by mask or weights.
mask = jnp.arange(21) < jnp.array([[21], [0], [12]])
weights = jax.random.uniform(jax.random.key(1), (3, 21), maxval=3)
weights = weights.at[0, ::4].set(0).at[2, 3:].set(0)
for model in (deepsets, histnetq, power_mean, gmnet):
    variables = jax.jit(model.init)(jax.random.key(2), x)
    whole = jax.jit(model.apply)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.grad, has_aux=True)
    def gradient(trained, apply):
        variables, weights = trained
        out = apply(variables, x, mask, weights)
        return jnp.sum(jnp.sin(3 * out)), out

    trained = variables, weights
    sharded, found = gradient(trained, partial(apply_sharded, model, mesh=mesh))
    plain, expected = gradient(trained, model.apply)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (sharded, plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    if model in (power_mean, gmnet):
        continue  # The rest is compiled for two networks only, to save time.
    for args in ((), (mask,)):
        expected = whole(variables, x, *args)
        found = apply_sharded(model, variables, x, *args, mesh=mesh)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    # A bag that is spread over the devices already.
    by_element = jax.NamedSharding(mesh, jax.P(None, "element"))
    spread = jax.device_put(jnp.tile(x, (1, 8, 1)), by_element)
    found = apply_sharded(model, variables, spread, mesh=mesh)
    expected = whole(variables, jnp.tile(x, (1, 8, 1)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
"""


def test_sharded_over_eight_devices_is_the_whole():
    flags = os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=os.environ
        | {
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # rounding as outside of tests
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
