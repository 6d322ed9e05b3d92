import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from archs import (
    CNN,
    MLP,
    Classifier,
    Embedding,
    GRUCell,
    HistNetQ,
    LinearHistogram,
    PrevalenceHead,
    RecurrentStack,
    SequenceClassifier,
    SequenceEncoder,
    TransformerClassifier,
    assert_padding_invariant,
    assert_permutation_invariant,
    encode_elements,
)


def torch_gradients(net, x):
    x = torch.from_numpy(np.array(x)).requires_grad_()
    out = net(x)
    torch.sum(torch.tanh(out) ** 2).backward()
    return out.detach().numpy(), x.grad.numpy()


def our_gradients(model, variables, x):
    def loss(variables, x):
        out = model.apply(variables, x)
        return jnp.sum(jnp.tanh(out) ** 2), out

    (_, out), gradients = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(variables, x)
    return out, gradients[0]["params"], gradients[1]


def close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_mlp_is_torch_linear_and_leaky_relu():
    model = MLP((7, 6), 4)
    x = jax.random.normal(jax.random.key(0), (9, 5))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params = variables["params"]
    linears = [torch.nn.Linear(*sizes) for sizes in ((5, 7), (7, 6), (6, 4))]
    for i, linear in enumerate(linears):
        kernel, bias = params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]
        linear.weight.data = torch.from_numpy(np.array(kernel.T))
        linear.bias.data = torch.from_numpy(np.array(bias))
    act = torch.nn.LeakyReLU(0.01)
    net = torch.nn.Sequential(linears[0], act, linears[1], act, linears[2])
    out, x_gradient = torch_gradients(net, x)
    ours, gradients, our_x_gradient = our_gradients(model, variables, x)
    close(ours, out)
    close(our_x_gradient, x_gradient)
    for i, linear in enumerate(linears):
        close(gradients[f"Dense_{i}"]["kernel"], linear.weight.grad.T)
        close(gradients[f"Dense_{i}"]["bias"], linear.bias.grad)


@pytest.mark.parametrize("size", [8, 11])
def test_cnn_is_torch_conv2d(size):
    model = CNN(channels=(3, 5), features=6)
    x = jax.random.normal(jax.random.key(0), (4, size, size, 2))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params = variables["params"]
    pooled = size // 2 // 2
    convs = [
        torch.nn.Conv2d(2, 3, 5, padding=2),
        torch.nn.Conv2d(3, 5, 5, padding=2),
    ]
    linear = torch.nn.Linear(5 * pooled**2, 6)
    for i, conv in enumerate(convs):
        kernel = np.array(params[f"Conv_{i}"]["kernel"])
        conv.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        conv.bias.data = torch.from_numpy(np.array(params[f"Conv_{i}"]["bias"]))
    # Ours flattens (height, width, channel), PyTorch (channel, height, width).
    order = np.arange(5 * pooled**2).reshape(pooled, pooled, 5).transpose(2, 0, 1)
    kernel = np.array(params["Dense_0"]["kernel"])[order.ravel()]
    linear.weight.data = torch.from_numpy(kernel.T.copy())
    linear.bias.data = torch.from_numpy(np.array(params["Dense_0"]["bias"]))
    relu, pool = torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    net = torch.nn.Sequential(
        convs[0], relu, pool, convs[1], relu, pool, torch.nn.Flatten(), linear
    )
    out, x_gradient = torch_gradients(net, jnp.moveaxis(x, -1, 1))
    ours, gradients, our_x_gradient = our_gradients(model, variables, x)
    close(ours, out)
    close(our_x_gradient, np.moveaxis(x_gradient, 1, -1))
    for i, conv in enumerate(convs):
        weight = conv.weight.grad.numpy().transpose(2, 3, 1, 0)
        close(gradients[f"Conv_{i}"]["kernel"], weight)
        close(gradients[f"Conv_{i}"]["bias"], conv.bias.grad)


@pytest.mark.parametrize("num_groups", [None, 2])
def test_strided_cnn_is_torch_conv2d_and_linear(num_groups):
    model = CNN(
        (4, 6), 4, kernel_size=3, stride=2, hidden_sizes=(6,), num_groups=num_groups
    )
    x = jax.random.normal(jax.random.key(0), (4, 11, 11, 2))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: np.array(leaf) + 0.1, variables["params"])
    variables = {"params": params}
    # 11 is halved to 6 with padding on both sides, 6 to 3 with padding at the end.
    pads = [torch.nn.ZeroPad2d(1), torch.nn.ZeroPad2d((0, 1, 0, 1))]
    convs = [torch.nn.Conv2d(2, 4, 3, stride=2), torch.nn.Conv2d(4, 6, 3, stride=2)]
    norms = [torch.nn.Identity(), torch.nn.Identity()]
    if num_groups is not None:
        norms = [torch.nn.GroupNorm(num_groups, size, eps=1e-6) for size in (4, 6)]
        for i, norm in enumerate(norms):
            norm.weight.data = torch.from_numpy(params[f"GroupNorm_{i}"]["scale"])
            norm.bias.data = torch.from_numpy(params[f"GroupNorm_{i}"]["bias"])
    linears = [torch.nn.Linear(54, 6), torch.nn.Linear(6, 4)]
    for i, (conv, linear) in enumerate(zip(convs, linears, strict=True)):
        kernel = params[f"Conv_{i}"]["kernel"]
        conv.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        conv.bias.data = torch.from_numpy(params[f"Conv_{i}"]["bias"])
        linear.weight.data = torch.from_numpy(params[f"Dense_{i}"]["kernel"].T.copy())
        linear.bias.data = torch.from_numpy(params[f"Dense_{i}"]["bias"])
    y = torch.from_numpy(np.array(x)).movedim(-1, 1)
    for pad, conv, norm in zip(pads, convs, norms, strict=True):
        y = torch.relu(norm(conv(pad(y))))
    y = linears[1](torch.relu(linears[0](y.movedim(1, -1).flatten(1))))
    close(jax.jit(model.apply)(variables, x), y.detach().numpy())


def test_embedded_tokens_are_looked_up():
    tokens = np.array([3, 0, 3, 4])
    model = Embedding(MLP((), 6, activation="tanh", activate_output=True), 7)
    x = jax.nn.one_hot(tokens, 5)
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    table, layer = params["Dense_0"]["kernel"], params["encoder"]["Dense_0"]
    expected = np.tanh(table[tokens] @ layer["kernel"] + layer["bias"])
    found = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 5 * 7 + 7 * 6 + 6


@pytest.mark.parametrize(
    ("model", "shape", "layer", "fan_in"),
    [(MLP((), 300), (1, 100), "Dense_0", 100), (CNN(), (1, 28, 28, 4), "Conv_0", 100)],
)
def test_initial_weights_have_torch_statistics(model, shape, layer, fan_in):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))["params"][layer]
    bound = fan_in**-0.5
    for weights in params.values():
        assert np.abs(weights).max() <= bound
        assert abs(np.std(weights) / (bound / 3**0.5) - 1) < 0.25
    assert abs(np.std(params["kernel"]) / (bound / 3**0.5) - 1) < 0.05


def test_mlp_flattens_images_and_drops_out_only_in_training():
    model = MLP((64,), 3, dropout_rate=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    out = model.apply(variables, x)
    np.testing.assert_array_equal(out, model.apply(variables, x.reshape(2, 16)))
    dropped = [
        model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], dropped[2])
    assert not np.allclose(dropped[0], out)


@pytest.mark.parametrize("model", [MLP((8,), 4), CNN((2,), 4)])
def test_elements_are_encoded_one_by_one(model):
    inputs = jax.random.normal(jax.random.key(0), (3, 2, 8, 8, 1))
    mask = jnp.array([[True, False], [True, True], [False, False]])
    variables = jax.jit(model.init)(jax.random.key(1), inputs[0])
    encoder = model.bind(variables)
    codes = encode_elements(encoder, inputs.at[0, 1].set(jnp.nan), mask)
    assert codes.shape == (3, 2, 4)
    for bag, element in np.argwhere(mask):
        alone = encoder(inputs[bag, element][None])[0]
        np.testing.assert_allclose(codes[bag, element], alone, rtol=1e-5, atol=1e-6)
    nothing = encoder(jnp.zeros((1, 8, 8, 1)))[0]
    np.testing.assert_allclose(codes[0, 1], nothing, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [MLP((8,), 4), CNN((2,), 4)])
def test_bfloat16_computes_in_bfloat16_with_float32_parameters(model):
    model = model.clone(dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    out = model.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    exact = model.clone(dtype=None).apply(variables, x)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


@pytest.mark.parametrize(
    ("inputs", "mask", "error", "sentence"),
    [
        (jnp.zeros((2, 3)), None, ValueError, r"inputs must .* is \(2, 3\)"),
        (jnp.zeros((2, 3, 4), jnp.uint8), None, TypeError, "inputs .* uint8"),
        (jnp.zeros((2, 3, 4)), jnp.ones((2, 3)), TypeError, "mask .* float32"),
        (
            jnp.zeros((2, 3, 4)),
            jnp.ones((2, 4), bool),
            ValueError,
            r"mask must have shape \(2, 3\).*\(2, 4\)",
        ),
    ],
)
def test_wrong_arguments_are_named(inputs, mask, error, sentence):
    model = MLP((), 2)
    with pytest.raises(error, match=sentence):
        encode_elements(model, inputs, mask)


def test_cnn_names_the_shape_it_cannot_read():
    with pytest.raises(ValueError, match=r"\[n, height, width, channel\].*\(2, 64\)"):
        CNN().init(jax.random.key(0), jnp.zeros((2, 64)))


def test_activation_is_named_when_unknown():
    with pytest.raises(ValueError, match="activation must name .*'rleu'"):
        MLP((2,), 2, activation="rleu").init(jax.random.key(0), jnp.zeros((1, 2)))


def test_classifier_is_linear_in_the_activated_code():
    encoder = MLP((4,), 6)
    model = Classifier(encoder, 3)
    x = jax.random.normal(jax.random.key(0), (5, 2))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    code = np.asarray(encoder.apply({"params": params["encoder"]}, x))
    code = np.where(code > 0, code, 0.01 * code)
    expected = code @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    found = model.apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


READERS = {
    "recurrent": SequenceClassifier(
        RecurrentStack(GRUCell(5), bidirectional=True),
        num_classes=6,
        vocabulary_size=9,
        pooling="max",
    ),
    "transformer": TransformerClassifier(
        num_classes=6, vocabulary_size=9, num_layers=1, num_heads=2, hidden_size=8
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_text_is_read_to_its_end(name):
    lengths = np.array([7, 3, 1, 0])
    tokens = np.random.default_rng(0).integers(1, 9, (4, 7))
    tokens = np.where(np.arange(7) < lengths[:, None], tokens, 0)
    model = SequenceEncoder(READERS[name])
    variables = model.init(jax.random.key(0), jnp.float32(tokens))
    codes = model.apply(variables, jnp.float32(tokens))
    own = {"params": variables["params"]["network"]}
    for i, length in enumerate(lengths[:3]):
        alone = READERS[name].apply(own, jnp.asarray(tokens[i : i + 1, :length]))
        np.testing.assert_allclose(codes[i], alone[0], rtol=1e-5, atol=1e-6)
    assert np.isfinite(codes).all()
    longer = jnp.pad(jnp.float32(tokens), ((0, 0), (0, 2)))
    np.testing.assert_allclose(
        model.apply(variables, longer), codes, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", READERS)
def test_bags_of_texts_are_sets(name):
    histogram, head = LinearHistogram(4), PrevalenceHead((5,), 3)
    model = HistNetQ(SequenceEncoder(READERS[name]), histogram, head)
    bags = jax.random.randint(jax.random.key(0), (2, 5, 6), 0, 9).astype(jnp.float32)
    variables = model.init(jax.random.key(1), bags)

    @jax.jit
    def prevalence(inputs, mask):
        return model.apply(variables, inputs, mask)

    assert_permutation_invariant(prevalence, bags, key=jax.random.key(2))
    assert_padding_invariant(prevalence, bags)


def test_a_text_is_one_axis_of_ids():
    model = SequenceEncoder(READERS["recurrent"])
    with pytest.raises(ValueError, match=r"\[n, time\].*\(2, 3, 4\)"):
        model.init(jax.random.key(0), jnp.zeros((2, 3, 4)))
