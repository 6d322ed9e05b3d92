import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from archs import (
    HistNetQ,
    LinearHistogram,
    PrevalenceHead,
    ResNet,
    assert_padding_invariant,
    assert_permutation_invariant,
)

CIFAR = dict(width=16, stem="cifar")
ZEROS = CIFAR | dict(shortcut="zeros")
WIDE = dict(width=160, stem="cifar", stem_width=16, preactivation=True)


@pytest.mark.parametrize(
    ("stage_sizes", "options", "size", "features", "published"),
    [
        # Counts of torchvision's documentation.
        ((2, 2, 2, 2), {}, 224, 1000, 11_689_512),
        ((3, 4, 6, 3), {}, 224, 1000, 21_797_672),
        ((3, 4, 6, 3), dict(bottleneck=True), 224, 1000, 25_557_032),
        ((3, 4, 23, 3), dict(bottleneck=True), 224, 1000, 44_549_160),
        ((3, 8, 36, 3), dict(bottleneck=True), 224, 1000, 60_192_808),
        # He et al. 2016, table 6, in millions; Zagoruyko and Komodakis 2016, table 4.
        ((3, 3, 3), ZEROS, 32, 10, 0.27e6),
        ((9, 9, 9), ZEROS, 32, 10, 0.85e6),
        ((18, 18, 18), ZEROS, 32, 10, 1.7e6),
        ((4, 4, 4), WIDE, 32, 10, 36.5e6),
    ],
)
def test_parameters_are_as_many_as_published(
    stage_sizes, options, size, features, published
):
    model = ResNet(stage_sizes, features, **options)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if isinstance(published, int):
        assert count == published
    else:
        assert count == pytest.approx(published, rel=0.02)


class Torch:
    """PyTorch's functions with the parameters of a ResNet, block by block."""

    def __init__(self, model, variables, train):
        self.model, self.train = model, train
        self.params = jax.tree.map(
            lambda leaf: torch.from_numpy(np.array(leaf)).requires_grad_(),
            variables["params"],
        )
        self.stats = jax.tree.map(
            lambda leaf: torch.from_numpy(np.array(leaf)),
            variables.get("batch_stats", {}),
        )

    def conv(self, x, scope, name, stride=1):
        kernel = scope[name]["kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(self, x, scope, stats, i):
        groups = self.model.num_groups
        if groups is not None:
            norm = scope[f"GroupNorm_{i}"]
            return F.group_norm(x, groups, norm["scale"], norm["bias"], eps=1e-5)
        norm, stats = scope[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]
        mean, var = stats["mean"], stats["var"]
        return F.batch_norm(
            x, mean, var, norm["scale"], norm["bias"], self.train, 0.1, 1e-5
        )

    def block(self, x, i, stride):
        scope, stats = self.params[f"_Block_{i}"], self.stats.get(f"_Block_{i}")
        bottleneck, before = self.model.bottleneck, self.model.preactivation
        layers = 3 if bottleneck else 2
        shortcut = y = x
        for layer in range(layers):
            if before:
                y = torch.relu(self.norm(y, scope, stats, layer))
                if layer == 0 and f"Conv_{layers}" in scope:
                    shortcut = y
            here = stride if layer == bottleneck else 1
            y = self.conv(y, scope, f"Conv_{layer}", here)
            if not before:
                y = self.norm(y, scope, stats, layer)
                y = y if layer == layers - 1 else torch.relu(y)
        if f"Conv_{layers}" in scope:
            shortcut = self.conv(shortcut, scope, f"Conv_{layers}", stride)
            if not before:
                shortcut = self.norm(shortcut, scope, stats, layers)
        elif shortcut.shape != y.shape:
            shortcut = shortcut[:, :, ::stride, ::stride]
            new = y.shape[1] - shortcut.shape[1]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, new))
        return shortcut + y if before else torch.relu(shortcut + y)

    def __call__(self, x):
        model = self.model
        imagenet = model.stem == "imagenet"
        x = self.conv(x, self.params, "Conv_0", 2 if imagenet else 1)
        if not model.preactivation:
            x = torch.relu(self.norm(x, self.params, self.stats, 0))
        if imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        i = 0
        for stage, blocks in enumerate(model.stage_sizes):
            for block in range(blocks):
                x = self.block(x, i, 2 if stage and not block else 1)
                i += 1
        if model.preactivation:
            x = torch.relu(self.norm(x, self.params, self.stats, 0))
        dense = self.params["Dense_0"]
        return x.mean((2, 3)) @ dense["kernel"] + dense["bias"]


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("options", "train"),
    [
        (dict(stem="imagenet"), True),
        (dict(stem="cifar", shortcut="zeros"), False),
        (dict(stem="cifar", bottleneck=True), True),
        (dict(stem="cifar", preactivation=True, num_groups=2), True),
        (dict(stem="imagenet", preactivation=True, bottleneck=True), True),
        (dict(stem="cifar", preactivation=True, shortcut="zeros"), True),
    ],
)
def test_it_is_pytorchs_convolutions_and_norms(options, train):
    model = ResNet((1, 2), 5, width=4, **options)
    x = jax.random.normal(jax.random.key(0), (3, 14, 14, 2))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    # No parameter keeps a value at which it does nothing.
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.2 * jnp.abs(jax.random.normal(key, leaf.shape))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    variables = jax.tree.unflatten(tree, leaves)
    state = {name: variables[name] for name in variables if name != "params"}

    @jax.jit
    def ours(params, x):
        def loss(params, x):
            out, new = model.apply(
                {"params": params} | state, x, train=train, mutable=list(state)
            )
            return jnp.sum(jnp.tanh(out) ** 2), (out, new)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (gradients, x_gradient), (out, new) = ours(variables["params"], x)
    net = Torch(model, variables, train)
    inputs = torch.from_numpy(np.array(x)).requires_grad_()
    expected = net(inputs.movedim(-1, 1))
    torch.sum(torch.tanh(expected) ** 2).backward()
    close(out, expected)
    close(x_gradient, inputs.grad)
    theirs = jax.tree.map(lambda leaf: leaf.grad, net.params)
    jax.tree.map(close, gradients, theirs)
    if train and state:
        means = jax.tree_util.tree_leaves_with_path(new["batch_stats"])
        for path, leaf in means:
            scope = net.stats
            for key in path:
                scope = scope[key.key]
            if path[-1].key == "mean":  # PyTorch's variances are the unbiased ones
                close(leaf, scope)


def test_a_block_begins_as_its_shortcut():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    short, long = (ResNet((n, 1), 5, **CIFAR) for n in (1, 3))
    variables = jax.jit(long.init)(jax.random.key(1), x)
    renamed = {
        kind: {name: leaves[name] for name in leaves if "_Block" not in name}
        | {"_Block_0": leaves["_Block_0"], "_Block_1": leaves["_Block_3"]}
        for kind, leaves in variables.items()
    }
    np.testing.assert_array_equal(
        jax.jit(long.apply)(variables, x), jax.jit(short.apply)(renamed, x)
    )


def test_dropout_is_within_the_blocks_while_training():
    model = ResNet((1, 1), 5, dropout_rate=0.5, num_groups=2, **CIFAR)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    variables = {"params": jax.tree.map(lambda leaf: leaf + 0.1, params)}
    one, two = (
        model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)})
        for i in range(2)
    )
    assert not np.allclose(one, two)
    still = ResNet((1, 1), 5, num_groups=2, **CIFAR)
    np.testing.assert_array_equal(model.apply(variables, x), still.apply(variables, x))


def test_it_computes_in_the_dtype_asked_for():
    model = ResNet((1, 1), 5, num_groups=2, dtype=jnp.bfloat16, **CIFAR)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    out, variables = jax.jit(model.init_with_output)(jax.random.key(1), x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("f4")}


@pytest.mark.parametrize("num_groups", [None, 4])
def test_contracts_of_a_set_network_over_it(num_groups):
    encoder = ResNet((1, 1), 6, num_groups=num_groups, **CIFAR)
    model = HistNetQ(encoder, LinearHistogram(4), PrevalenceHead((), 3))
    bags = jax.random.normal(jax.random.key(0), (2, 5, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), bags)
    apply = jax.jit(lambda bags, mask=None: model.apply(variables, bags, mask))
    assert_permutation_invariant(apply, bags, key=jax.random.key(2))
    assert_padding_invariant(apply, bags)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (4, 8, 8), r"\[n, height, width, channel\].*\(4, 8, 8\)"),
        (
            dict(stem="mnist"),
            (4, 8, 8, 1),
            "stem is 'imagenet' or 'cifar', but 'mnist'",
        ),
        (dict(shortcut="A"), (4, 8, 8, 1), "shortcut is 'projection' or 'zeros', but"),
    ],
)
def test_what_it_cannot_read_is_refused(options, shape, message):
    model = ResNet((1,), 3, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
