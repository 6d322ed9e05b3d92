import types

import flax.linen as nn
import jax
import numpy as np
import pytest

import archs
import data
from experiments.tasks import gates_report

DATASET = data.NumberAgreement(max_attractors=1)
SIZE = 5


@pytest.fixture(scope="module")
def first():
    sample = jax.jit(DATASET.sample, static_argnums=(1, 2))
    return jax.device_get(sample(jax.random.key(0), 6, "test", {}))


def sections(model, first):
    variables = model.init(jax.random.key(1), first["inputs"], first["lengths"])
    task = types.SimpleNamespace(model=model, dataset=DATASET)
    state = types.SimpleNamespace(variables=variables)
    return gates_report.gate_sections(task, state, first), variables


def classifier(cell, **fields):
    stack = archs.RecurrentStack(cell, **fields)
    size = len(DATASET.vocabulary)
    return archs.SequenceClassifier(stack, 2, size, embedding_size=3)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_drawing_is_of_the_gates_of_the_longest_sentence(first, bidirectional):
    model = classifier(archs.LSTMCell(SIZE), bidirectional=bidirectional)
    (section,), variables = sections(model, first)
    row = first["lengths"].argmax()
    ids = first["inputs"][row, : first["lengths"][row]]
    params = variables["params"]
    layer = params["stack"]["layers_0"]
    cell = (layer["forward"] if bidirectional else layer)["cell"]
    x = params["Embed_0"]["embedding"][ids]
    h, c, gates = np.zeros(SIZE), np.zeros(SIZE), []
    for t in range(len(ids)):
        a = x[t] @ cell["kernel"] + h @ cell["recurrent_kernel"] + cell["bias"]
        update, forget, output, candidate = np.split(np.asarray(a), 4)
        gates.append(sigmoid(np.stack([update, forget, output])))
        c = gates[-1][0] * np.tanh(candidate) + gates[-1][1] * c
        h = gates[-1][2] * np.tanh(c)
    gates = np.stack(gates, 1)  # [gate, token, unit]
    *panels, _ = section.figure.axes
    names = [axes.get_title(loc="left").split(",")[0] for axes in panels]
    assert names == ["update", "forget", "output"]
    for axes, values in zip(panels, gates, strict=True):
        drawn = axes.images[0].get_array()
        order = np.argsort(-values.mean(0), kind="stable")
        np.testing.assert_allclose(drawn, values[:, order].T, atol=1e-5)
    labels = [label.get_text() for label in panels[-1].get_xticklabels()]
    assert " ".join(labels) == DATASET.decode(ids)


def test_a_long_sentence_is_cut(first, monkeypatch):
    monkeypatch.setattr(gates_report, "SHOWN_TOKENS", 2)
    (section,), _ = sections(classifier(archs.GRUCell(SIZE), num_layers=2), first)
    assert section.figure.axes[0].images[0].get_array().shape == (SIZE, 2)
    assert "The gates (update, relevance)" in section.text
    assert "layers_1" in section.text


class Bag(nn.Module):
    @nn.compact
    def __call__(self, inputs, lengths=None):
        return nn.Embed(100, 2)(inputs).sum(1)


def test_models_without_gates_have_no_section(first):
    for model in (classifier(archs.SimpleCell(SIZE)), Bag()):
        assert sections(model, first)[0] == []
    numbers = {**first, "inputs": first["inputs"][..., None].astype(np.float32)}
    model = archs.SequenceClassifier(archs.RecurrentStack(archs.GRUCell(SIZE)), 2)
    assert sections(model, numbers)[0] == []
