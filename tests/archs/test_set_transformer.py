import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from archs import (
    CNN,
    ISAB,
    MAB,
    MLP,
    PMA,
    SAB,
    PrevalenceHead,
    SetNorm,
    SetTransformer,
    contracts,
)
from archs.set_transformer import attend, multihead_attention

FIELDS = {"hidden_size": 8, "num_heads": 2}
KINDS = [
    {"block": block, "normalization": normalization, "num_inducing_points": points}
    for block, normalization, points in [
        ("paper", "layer", 3),
        ("paper", "set", None),
        ("official", None, 3),
        ("official", "layer", None),
        ("clean_path", "set", 3),
        ("clean_path", "layer", None),
    ]
]


def name_of(kind):
    return " ".join(map(str, kind.values()))


def network(**kwargs):
    fields = {"num_layers": 1, "num_seeds": 2, **FIELDS, **kwargs}
    return SetTransformer(MLP((), 3), **fields)


def bags(shape=(4, 6, 5)):
    inputs = jax.random.normal(jax.random.key(0), shape)
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, shape[:2])
    return inputs, mask.at[:, 0].set(True).at[1].set(False)


def set_function(model, inputs):
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    return jax.jit(lambda *args: model.apply(variables, *args))


def summed(function):
    """What a network made of the elements' outputs and their squares reads."""

    def moments(x, mask, *args):
        y = function(x, mask, *args)
        return y.sum(1), jnp.square(y).sum(1)

    return moments


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_contracts(kind):
    inputs, mask = bags()
    f = set_function(network(**kind), inputs)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_weights_are_multiplicities(kind):
    inputs, mask = bags((3, 4, 5))
    f = set_function(network(**kind), inputs)
    contracts.assert_weights_are_multiplicities(f, inputs, mask, key=jax.random.key(0))


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("points", [3, None], ids=["ISAB", "SAB"])
def test_a_thousand_elements_come_in_any_order(points, wide):
    with jax.enable_x64(wide):
        inputs, mask = bags((3, 1000, 5))
        f = set_function(network(num_inducing_points=points), inputs)
        assert f(inputs, mask).dtype == (jnp.float64 if wide else jnp.float32)
        contracts.assert_permutation_invariant(
            f, inputs, mask, key=jax.random.key(0), rtol=1e-12 if wide else 1e-5
        )


def test_contracts_where_logits_are_computed_by_blocks(monkeypatch):
    monkeypatch.setattr("archs.attention._CPU_BLOCK", 4)
    inputs, mask = bags((3, 6, 5))
    f = set_function(network(num_inducing_points=None), inputs)
    assert "while" in f.lower(inputs, mask).as_text()
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_weights_are_multiplicities(f, inputs, mask, key=jax.random.key(0))


@pytest.mark.parametrize("model", [network(**KINDS[1]), PMA(**FIELDS)], ids=type)
def test_a_set_that_holds_all_twice_is_the_same(model):
    inputs, mask = bags((3, 5, 5))
    contracts.assert_duplication(set_function(model, inputs), inputs, mask)


def test_gradients_of_weights_are_those_of_finite_differences():
    inputs, mask = bags((2, 3, 5))
    weights = jnp.array([[2.0, 0.5, 1.0]] * 2)
    f = set_function(network(**KINDS[4]), inputs)
    jax.test_util.check_grads(
        lambda w: f(inputs, mask, w), (weights,), order=1, modes=("rev",), eps=1e-2
    )


@pytest.mark.parametrize("block", ["paper", "official", "clean_path"])
@pytest.mark.parametrize(
    "module", [SAB, functools.partial(ISAB, num_inducing_points=3)]
)
def test_blocks_are_equivariant(module, block):
    inputs, mask = bags((3, 6, 8))
    f = set_function(module(**FIELDS, block=block, normalization="set"), inputs)
    contracts.assert_permutation_equivariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(summed(f), inputs, mask)
    assert not np.asarray(f(inputs, mask))[~np.asarray(mask)].any()


def test_images_and_prevalences():
    inputs, mask = bags((3, 4, 8, 8, 1))
    model = SetTransformer(PrevalenceHead((8,), 3), CNN((2, 3), 6), **FIELDS)
    f = set_function(model, inputs)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)
    np.testing.assert_allclose(f(inputs, mask).sum(-1), 1, rtol=1e-6)


def test_a_set_does_not_depend_on_its_batch():
    inputs, mask = bags()
    f = set_function(network(num_decoder_layers=1), inputs)
    contracts.assert_batch_independent(f, inputs, mask)
    single = jax.jit(jax.vmap(lambda x, m: f(x[None], m[None])[0]))(inputs, mask)
    np.testing.assert_allclose(single, f(inputs, mask), rtol=1e-5, atol=1e-6)


def test_call_is_its_three_methods():
    inputs, mask = bags()
    model = network(encoder=MLP((8,), 7), per_seed=True)
    variables = jax.jit(model.init)(jax.random.key(1), inputs)

    @jax.jit
    def by_methods(inputs, mask):
        bound = model.bind(variables)
        features = bound.encode(inputs, mask)
        representation = bound.aggregate(features, mask)
        return features, representation, bound.decode(representation)

    features, representation, out = by_methods(inputs, mask)
    assert features.shape == (4, 6, 7)
    assert representation.shape == (4, 16)
    assert out.shape == (4, 2, 3)
    whole = jax.jit(model.apply)(variables, inputs, mask)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
    # The head meets each seed's vector on its own.
    head = variables["params"]["head"]["Dense_0"]
    for seed in range(2):
        own = representation[:, 8 * seed : 8 * (seed + 1)]
        expected = own @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(out[:, seed], expected, rtol=1e-5, atol=1e-6)


def test_a_set_without_elements_is_one_without_real_elements():
    inputs, mask = bags((2, 3, 5))
    f = set_function(network(), inputs)
    np.testing.assert_allclose(
        f(inputs[:, :0], mask[:, :0]), f(inputs, mask & False), rtol=1e-5, atol=1e-6
    )


def test_dropout_acts_only_in_training():
    inputs, mask = bags()
    model = network(dropout_rate=0.5)
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    train = jax.jit(
        lambda key: model.apply(
            variables, inputs, mask, train=True, rngs={"dropout": key}
        )
    )
    out = train(jax.random.key(2))
    np.testing.assert_array_equal(out, train(jax.random.key(2)))
    assert not np.allclose(out, train(jax.random.key(3)), atol=1e-4)
    assert not np.allclose(out, model.apply(variables, inputs, mask), atol=1e-4)


# Attention itself.


def attention_arguments(bags=2, heads=2, queries=7, keys=9, d=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((bags, heads, n, d)), dtype)
        for n in (queries, keys, keys)
    )
    log_weights = rng.standard_normal((bags, keys))
    log_weights[:, 2] = -np.inf
    log_weights[0] = -np.inf  # the empty set
    return q, k, v, jnp.asarray(log_weights, dtype)


def value_and_gradients(function, *args):
    def loss(args):
        out = function(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(args)
    return out, gradients


def assert_trees_close(found, expected, rtol=1e-5):
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        tolerance = rtol * max(1, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
# Blocks of several heads, of one, of some of its queries (the last one with padding).
@pytest.mark.parametrize("block_size", [130, 63, 30, 1])
def test_blocks_of_logits_change_nothing(block_size, weighted):
    args = attention_arguments(bags=12)
    args = args if weighted else args[:3]
    blocked = functools.partial(attend, block_size=block_size)
    assert "while" in jax.jit(blocked).lower(*args).as_text()
    assert_trees_close(
        value_and_gradients(blocked, *args), value_and_gradients(attend, *args)
    )


def test_attention_is_that_of_torch():
    q, k, v, log_weights = attention_arguments()
    q, k, v, bias = (
        torch.tensor(np.array(x), requires_grad=True)
        for x in (q, k, v, jnp.maximum(log_weights, -1e4))
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, bias[:, None, None], scale=1.0
    ).detach()
    for block_size in (None, 20):
        found = attend(*attention_arguments(), block_size=block_size)
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[0], 0)


@pytest.mark.parametrize("block_size", [None, 8])
def test_gradients_in_float64_are_those_of_finite_differences(block_size):
    with jax.enable_x64(True):
        q, k, v, log_weights = attention_arguments(2, 1, 3, 9, 2, dtype=jnp.float64)
        real = log_weights > -jnp.inf

        def f(q, k, v, w):
            w = jnp.where(real, w, -jnp.inf)
            return attend(q, k, v, w, block_size=block_size)

        finite = jnp.where(real, log_weights, 0)
        jax.test_util.check_grads(
            jax.jit(f), (q, k, v, finite), order=1, modes=("rev",), atol=1e-6
        )


@pytest.mark.parametrize("block_size", [None, 8])
def test_logits_may_be_huge(block_size):
    q, k, v, _ = attention_arguments(1, 1, 3, 40, 2)
    function = functools.partial(attend, block_size=block_size)
    out, gradients = value_and_gradients(function, 1e4 * q, k, v)
    for leaf in jax.tree.leaves((out, gradients)):
        assert np.isfinite(leaf).all()
    # The softmax is a maximum then.
    best = jnp.argmax(jnp.einsum("bhqd,bhkd->bhqk", q, k), -1)
    np.testing.assert_allclose(out[0, 0], v[0, 0][best[0, 0]], rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_queries", [2, 5])
def test_shared_queries_change_nothing(num_queries, weighted):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    _, _, _, log_weights = attention_arguments(3, keys=30)
    queries, elements = normal(num_queries, 8), normal(3, 30, 6)
    key, value = (normal(6, 8), normal(8)), (normal(6, 8), normal(8))

    def shared(queries, elements, key, value):
        weights = log_weights if weighted else None
        return multihead_attention(queries, elements, key, value, weights, num_heads=2)

    def plain(queries, *args):
        return shared(jnp.broadcast_to(queries, (3, num_queries, 8)), *args)

    args = queries, elements, key, value
    spared = jax.jit(shared).lower(*args).as_text()
    assert "3x30x8xf32" not in spared, "the projections of the elements are there"
    assert_trees_close(
        value_and_gradients(shared, *args), value_and_gradients(plain, *args)
    )


@pytest.mark.parametrize("kind", [0, 3, 4], ids=[name_of(KINDS[i]) for i in (0, 3, 4)])
def test_half_precision(kind):
    inputs, mask = bags()
    model = network(dtype=jnp.bfloat16, **KINDS[kind])
    f = set_function(model, inputs)
    wide = set_function(model.clone(dtype=None), inputs)(inputs, mask)
    out = f(inputs.astype(jnp.bfloat16), mask)
    assert np.abs(out - wide).max() < 0.05 * np.abs(wide).max()
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_permutation_invariant(
        f, inputs, mask, key=jax.random.key(0), rtol=2e-2
    )


@pytest.mark.parametrize("block_size", [None, 8])
def test_attention_in_float16_is_finite_with_masks(block_size):
    function = functools.partial(attend, block_size=block_size)
    wide = attention_arguments()
    args = [x.astype(jnp.float16) for x in wide]
    out, gradients = value_and_gradients(function, *args)
    for leaf in jax.tree.leaves((out, gradients)):
        assert leaf.dtype == jnp.float16 and np.isfinite(leaf).all()
    np.testing.assert_allclose(out, function(*wide), atol=0.01)


@pytest.mark.parametrize(
    "model",
    [SAB(**FIELDS), network(normalization="set"), network(num_inducing_points=None)],
    ids=["MAB", "ISAB", "SAB"],
)
def test_float16_is_finite_with_masks(model):
    inputs, mask = bags((3, 6, 8))
    wide = set_function(model, inputs)(inputs, mask)
    f = set_function(model.clone(dtype=jnp.float16), inputs)
    out, gradient = value_and_gradients(
        lambda x: f(x, mask), inputs.astype(jnp.float16)
    )
    for leaf in jax.tree.leaves((out, gradient)):
        assert np.isfinite(leaf).all()
    assert np.abs(out - wide).max() < 0.01 * np.abs(wide).max()


def test_softmax_statistics_are_float32_at_half_precision():
    # 2048 equal keys: a sum of ones in float16 or bfloat16 would stop at 2048 or 256.
    values = jnp.ones((1, 1, 4096, 2), jnp.bfloat16)
    out = attend(jnp.zeros((1, 1, 1, 2), jnp.bfloat16), values, values)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, 1)


@pytest.mark.parametrize("points", [16, None], ids=["ISAB", "SAB"])
def test_memory_is_linear_in_the_set(points):
    model = SetTransformer(
        MLP((), 1), hidden_size=32, num_layers=1, num_inducing_points=points
    )

    def memory(n):
        inputs = jnp.zeros((1, n, 2))
        variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
        gradient = jax.jit(jax.grad(lambda v, x: model.apply(v, x).sum()))
        compiled = gradient.lower(variables, inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(4000) <= 4.5 * memory(1000)
    # The logits of all elements to all elements would take 256 MB.
    assert memory(4000) < 16e6


# The published networks.


class TorchMAB(torch.nn.Module):
    """The multihead attention block of the published code."""

    def __init__(self, d_q, d_k, size, heads, normalized=False):
        super().__init__()
        linear = torch.nn.Linear
        norm = torch.nn.LayerNorm if normalized else torch.nn.Identity
        self.ln0, self.ln1 = norm(size), norm(size)
        self.size, self.heads = size, heads
        self.fc_q, self.fc_k = linear(d_q, size), linear(d_k, size)
        self.fc_v, self.fc_o = linear(d_k, size), linear(size, size)

    def forward(self, x, y):
        def heads(z):
            return torch.cat(z.split(self.size // self.heads, 2), 0)

        q, k, v = heads(self.fc_q(x)), heads(self.fc_k(y)), heads(self.fc_v(y))
        a = torch.softmax(q.bmm(k.transpose(1, 2)) / math.sqrt(self.size), 2)
        o = self.ln0(torch.cat((q + a.bmm(v)).split(x.shape[0], 0), 2))
        return self.ln1(o + torch.relu(self.fc_o(o)))


class TorchSAB(torch.nn.Module):
    def __init__(self, d, size, heads):
        super().__init__()
        self.mab = TorchMAB(d, d, size, heads)

    def forward(self, x):
        return self.mab(x, x)


class TorchISAB(torch.nn.Module):
    def __init__(self, d, size, heads, points):
        super().__init__()
        self.points = torch.nn.Parameter(torch.empty(1, points, size))
        torch.nn.init.xavier_uniform_(self.points)
        self.mab0 = TorchMAB(size, d, size, heads)
        self.mab1 = TorchMAB(d, size, size, heads)

    def forward(self, x):
        return self.mab1(x, self.mab0(self.points.repeat(len(x), 1, 1), x))


class TorchPMA(torch.nn.Module):
    def __init__(self, size, heads, seeds):
        super().__init__()
        self.points = torch.nn.Parameter(torch.empty(1, seeds, size))
        torch.nn.init.xavier_uniform_(self.points)
        self.mab = TorchMAB(size, size, size, heads)

    def forward(self, x):
        return self.mab(self.points.repeat(len(x), 1, 1), x)


def carried_layer(parameters, name):
    weight, bias = (parameters[f"{name}.{x}"].detach() for x in ("weight", "bias"))
    return {"kernel": weight.numpy().T, "bias": bias.numpy()}


def carried_mab(parameters, prefix=""):
    ours = {"query": "fc_q", "key": "fc_k", "value": "fc_v", "feedforward": "fc_o"}
    return {us: carried_layer(parameters, prefix + it) for us, it in ours.items()}


def carried(module, parameters):
    """Parameters (or gradients) of a module of torch, by name, as a tree of ours."""

    def array(name):
        return parameters[name].detach().numpy()

    def mab(name):
        return carried_mab(parameters, f"{name}.")

    tree, count = {}, {"ISAB": 0, "SAB": 0}
    pooled = False
    for i, part in enumerate(module):
        if isinstance(part, TorchISAB):
            tree[f"ISAB_{count['ISAB']}"] = {
                "inducing_points": array(f"{i}.points")[0],
                "MAB_0": mab(f"{i}.mab0"),
                "MAB_1": mab(f"{i}.mab1"),
            }
            count["ISAB"] += 1
        elif isinstance(part, TorchPMA):
            tree["PMA_0"] = {
                "seeds": array(f"{i}.points")[0],
                "MAB_0": mab(f"{i}.mab"),
            }
            pooled = True
            count["SAB"] = 0
        elif isinstance(part, TorchSAB):
            name = "decoder" if pooled else "SAB"
            tree[f"{name}_{count['SAB']}"] = {"MAB_0": mab(f"{i}.mab")}
            count["SAB"] += 1
        elif isinstance(part, torch.nn.Linear):
            tree["head"] = {"Dense_0": carried_layer(parameters, str(i))}
    return {"params": tree}


OFFICIAL = {"block": "official", "normalization": None}
# Ours, the published modules, inputs, and the published number of parameters.
PUBLISHED = {
    "clustering": (
        lambda: SetTransformer(
            MLP((), 4), num_seeds=4, num_decoder_layers=2, per_seed=True, **OFFICIAL
        ),
        lambda: [
            TorchISAB(2, 128, 4, 32),
            TorchISAB(128, 128, 4, 32),
            TorchPMA(128, 4, 4),
            TorchSAB(128, 128, 4),
            TorchSAB(128, 128, 4),
            torch.nn.Linear(128, 4),
        ],
        (2, 90, 2),
        423_172,
    ),
    "maximum": (
        lambda: SetTransformer(
            MLP((), 1), hidden_size=64, num_inducing_points=None, **OFFICIAL
        ),
        lambda: [
            TorchSAB(1, 64, 4),
            TorchSAB(64, 64, 4),
            TorchPMA(64, 4, 1),
            torch.nn.Flatten(),
            torch.nn.Linear(64, 1),
        ],
        (3, 7, 1),
        37_953,
    ),
    "point clouds": (
        lambda: SetTransformer(
            MLP((), 40),
            hidden_size=256,
            num_inducing_points=16,
            dropout_rate=0.5,
            **OFFICIAL,
        ),
        lambda: [
            TorchISAB(3, 256, 4, 16),
            TorchISAB(256, 256, 4, 16),
            TorchPMA(256, 4, 1),
            torch.nn.Flatten(),
            torch.nn.Linear(256, 40),
        ],
        (2, 20, 3),
        1_140_264,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    make, parts, shape, number = PUBLISHED[name]
    model = make()
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(*parts())
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = theirs(torch.tensor(x))
    mixture = torch.cos(torch.arange(expected.numel())).reshape(expected.shape)
    (mixture * expected).sum().backward()

    variables = carried(theirs, dict(theirs.named_parameters()))
    ours = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, ours)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == number
    found, (gradient,) = value_and_gradients(lambda v: model.apply(v, x), variables)
    assert_trees_close(found, expected.detach().numpy())
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert_trees_close(gradient, carried(theirs, gradients))


@pytest.mark.parametrize("name", PUBLISHED)
def test_initial_parameters_have_the_published_spread(name):
    make, parts, shape, _ = PUBLISHED[name]
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(*parts())
    expected = carried(theirs, dict(theirs.named_parameters()))
    found = jax.jit(make().init)(jax.random.key(0), jnp.zeros(shape))
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        if got.size < 40:
            continue
        # Four standard errors of the ratio of two standard deviations.
        error = 4 * math.sqrt(2 * 0.8 / 4 / got.size)
        assert abs(got.mean()) < 4 * got.std() / math.sqrt(got.size), path
        np.testing.assert_allclose(got.std() / want.std(), 1, atol=error + 0.01)


@pytest.mark.parametrize(("number", "std"), [(32, 0.0217), (4, 0.0559)])
def test_initial_inducing_points_and_seeds(number, std):
    # sqrt(2 / (fan_in + fan_out)) of number * 128 and 128; not Glorot's of the matrix.
    x = jnp.zeros((1, 2, 128))
    for module, name in (
        (ISAB(num_inducing_points=number), "inducing_points"),
        (PMA(num_seeds=number), "seeds"),
    ):
        points = jax.jit(module.init)(jax.random.key(0), x)["params"][name]
        assert points.shape == (number, 128)
        np.testing.assert_allclose(points.std(), std, rtol=0.08)


def test_the_official_block_with_layer_normalisation_is_that_of_torch():
    torch.manual_seed(0)
    theirs = TorchMAB(5, 7, 12, 3, normalized=True)
    for norm in (theirs.ln0, theirs.ln1):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    parameters = dict(theirs.named_parameters())

    def ours(parameters):
        params = carried_mab(parameters)
        for name, it in (("attention_norm", "ln0"), ("norm", "ln1")):
            layer = carried_layer(parameters, it)
            params[name] = {"scale": layer["kernel"], "bias": layer["bias"]}
        return {"params": params}

    x, y = bags((2, 4, 5))[0], bags((2, 6, 7))[0]
    expected = theirs(*(torch.tensor(np.array(z)) for z in (x, y)))
    mixture = torch.cos(torch.arange(expected.numel())).reshape(expected.shape)
    (mixture * expected).sum().backward()
    model = MAB(12, 3, "layer", "official")
    found, (gradient,) = value_and_gradients(
        lambda variables: model.apply(variables, x, y), ours(parameters)
    )
    assert_trees_close(found, expected.detach().numpy())
    gradients = {name: p.grad for name, p in parameters.items()}
    assert_trees_close(gradient, ours(gradients))


@pytest.mark.parametrize("block", ["paper", "clean_path"])
def test_block_is_that_of_torch_multihead_attention(block):
    size, heads = 12, 3
    queries, keys = bags((2, 4, size))[0], bags((2, 5, size))[0]
    mask = jnp.array([[True] * 5, [True, True, False, True, False]])
    model = MAB(size, heads, "layer", block)
    variables = jax.jit(model.init)(jax.random.key(1), queries, keys)
    params = variables["params"]

    def tensor(x):
        return torch.tensor(np.array(x))

    attention = torch.nn.MultiheadAttention(size, heads, batch_first=True)
    names = "query", "key", "value"
    kernels = [params[name]["kernel"].T for name in names]
    attention.in_proj_weight.data = tensor(jnp.concatenate(kernels))
    biases = [params[name]["bias"] for name in names]
    attention.in_proj_bias.data = tensor(jnp.concatenate(biases))
    attention.out_proj.weight.data = tensor(params["out"]["kernel"].T)
    attention.out_proj.bias.data = tensor(params["out"]["bias"])
    rff = torch.nn.Linear(size, size)
    rff.weight.data = tensor(params["feedforward"]["kernel"].T)
    rff.bias.data = tensor(params["feedforward"]["bias"])
    norm = torch.nn.LayerNorm(size)

    x, y, absent = tensor(queries), tensor(keys), tensor(~mask)
    if block == "paper":
        h = norm(x + attention(x, y, y, key_padding_mask=absent)[0])
        expected = norm(h + torch.relu(rff(h)))
    else:
        y = norm(y)
        h = x + attention(norm(x), y, y, key_padding_mask=absent)[0]
        expected = h + torch.relu(rff(norm(h)))
    found = jax.jit(model.apply)(variables, queries, keys, mask)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", ["layer", "set"])
def test_shared_queries_are_not_normalised_in_a_clean_path(normalization):
    fields = dict(FIELDS, block="clean_path", normalization=normalization)
    x = jnp.ones((2, 5, FIELDS["hidden_size"]))
    for model, query_norms in (
        (SAB(**fields), 1),
        (PMA(**fields, num_seeds=2), 0),
        (ISAB(**fields, num_inducing_points=3), 1),  # the elements, of the second MAB
    ):
        params = model.init(jax.random.key(0), x)["params"]
        paths = jax.tree_util.tree_leaves_with_path(params)
        found = {str(path[:-1]) for path, _ in paths if "query_norm" in str(path)}
        assert len(found) == query_norms, type(model)


def test_set_norm_keeps_one_feature_that_layer_norm_loses():
    x = jnp.arange(6.0).reshape(2, 3, 1)
    layer = nn.LayerNorm()
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(layer.apply(variables, x), 0)
    norm = SetNorm()
    found = norm.apply(norm.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(found.std((1, 2)), 1, rtol=1e-4)


def test_clean_path_is_the_identity_where_blocks_add_nothing():
    inputs, mask = bags((2, 5, 8))
    model = ISAB(**FIELDS, num_inducing_points=3, block="clean_path")
    variables = jax.jit(model.init)(jax.random.key(1), inputs)

    def silent(path, leaf):
        added = any(key.key in ("out", "feedforward") for key in path)
        return jnp.zeros_like(leaf) if added else leaf

    variables = jax.tree_util.tree_map_with_path(silent, variables)
    out = jax.jit(model.apply)(variables, inputs, mask)
    np.testing.assert_array_equal(out, jnp.where(mask[..., None], inputs, 0))


# Set normalisation.


def test_set_norm_is_numpys_over_the_real_elements():
    x, mask = bags()
    weights = jnp.array([[1.0, 2.0, 3.0, 0.0, 1.0, 2.0]] * 4)
    variables = {"params": {"scale": jnp.arange(1.0, 6), "bias": jnp.arange(5.0)}}
    found = jax.jit(SetNorm().apply)(variables, x, mask, weights)
    for i in range(4):
        real = np.asarray(mask[i] & (weights[i] > 0))
        copies = np.repeat(x[i][real], weights[i][real].astype(int), axis=0)
        expected = np.zeros((6, 5))
        if real.any():
            y = (x[i][real] - copies.mean()) / np.sqrt(copies.var() + 1e-5)
            expected[real] = y * np.arange(1, 6) + np.arange(5)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)


def test_set_norm_keeps_scales_that_layer_norm_loses():
    x = jnp.array([[[1.0], [2.0], [4.0]]])
    out = SetNorm().apply({"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}, x)
    expected = (x - 7 / 3) / jnp.std(x)
    np.testing.assert_allclose(out, expected, rtol=1e-4)


@pytest.mark.parametrize("x", [jnp.ones((1, 1, 3)), jnp.full((1, 4, 3), 7.0)])
def test_set_norm_without_variance_is_finite(x):
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    out, (gradient,) = value_and_gradients(lambda x: SetNorm().apply(variables, x), x)
    np.testing.assert_allclose(out, 0, atol=1e-3)
    assert np.isfinite(gradient).all()


# Known ways to do it wrong, which the contracts catch.


def test_masked_values_without_masked_logits_break_the_contract():
    inputs, mask = bags((3, 6, 4))

    def attention(x, mask):
        # Zeros for absent keys and values: their logit 0 still takes its share.
        x = jnp.where(mask[..., None], x, 0)
        a = jax.nn.softmax(jnp.einsum("d,bed->be", jnp.arange(4.0), x))
        return jnp.einsum("be,bed->bd", a, x)

    with pytest.raises(AssertionError, match="padding invariance"):
        contracts.assert_padding_invariant(attention, inputs, mask)


def test_heads_cut_along_the_elements_break_the_contract():
    inputs, _ = bags((2, 6, 4))

    def block(x, mask):
        # Head-major arrays read as if elements came first.
        q = jnp.concatenate(jnp.split(x, 2, -1), 0)  # [head * bag, element, d]
        a = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, q))
        return jnp.einsum("bqk,bkd->bqd", a, q).reshape(x.shape)

    with pytest.raises(AssertionError, match="permutation equivariance"):
        contracts.assert_permutation_equivariant(block, inputs, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (SAB(8, 3), [(2, 3, 8)], "hidden_size must be a multiple.*8 and 3"),
        (SAB(8, 2, block="post"), [(2, 3, 8)], "block must be one of .*'post'"),
        (SAB(8, 2, "batch"), [(2, 3, 8)], "normalization must be .*'batch'"),
        (SAB(8, 2), [(2, 3, 5)], r"hidden_size = 8 features.*\(2, 3, 5\)"),
        (SAB(8, 2), [(3, 8)], r"inputs must have shape.*\(3, 8\)"),
        (MAB(8, 2), [(2, 3, 8), (3, 3, 8)], r"bags.*\(2, 3, 8\).*\(3, 3, 8\)"),
        (ISAB(8, 2, 0), [(2, 3, 8)], "num_inducing_points must be 1 or more"),
        (PMA(8, 2, 0), [(2, 3, 8)], "num_seeds must be 1 or more"),
        (network(), [(2, 3, 4, 1)], r"\(2, 3, 4, 1\).*encoder"),
    ],
)
def test_wrong_arguments_are_named(model, args, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), *map(jnp.zeros, args))


def test_wrong_masks_and_weights_are_named():
    x = jnp.zeros((2, 3, 8))
    with pytest.raises(TypeError, match="mask must have dtype bool.*int32"):
        network().init(jax.random.key(0), x, jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\).*\(2, 1\)"):
        SAB(8, 2).init(jax.random.key(0), x, jnp.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"weights must have shape \(2, 3\).*\(3,\)"):
        network().init(jax.random.key(0), x, None, jnp.ones(3))
