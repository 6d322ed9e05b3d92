import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import data

KEY = jax.random.key(0)
DATASETS = [
    data.AddingProblem(10),
    data.CopyMemory(7),
    data.TimeDelay(3, 4),
    data.EmbeddedReber(max_length=14),
    data.NumberAgreement(max_attractors=2),
    data.RomaDisambiguation(),
    data.DateTranslation(),
]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def draw(dataset, key, num_sequences, split):
    return dataset.sample(key, num_sequences, split, dataset.arrays)


def numbers(dataset, num_sequences=500, split="train", key=KEY):
    return jax.tree.map(np.asarray, draw(dataset, key, num_sequences, split))


# What all generated datasets promise.


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: type(d).__name__)
def test_sequences_are_pure_functions_of_the_key(dataset):
    batch, again = (numbers(dataset, 32) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    other = numbers(dataset, 32, key=jax.random.key(1))
    assert (batch["inputs"] != other["inputs"]).any()
    assert (batch["targets"] != other["targets"]).any()
    inputs, lengths = batch["inputs"], batch["lengths"]
    assert lengths.dtype == np.int32 and lengths.shape == (32,)
    assert (lengths >= 1).all() and lengths.max() <= inputs.shape[1]
    padding = np.arange(inputs.shape[1]) >= lengths[:, None]
    assert not inputs[padding].any()
    if inputs.ndim == 2:  # ids
        assert inputs.dtype == np.int32 and inputs[~padding].min() >= 1
        size = dataset.spec.source_vocabulary_size or dataset.spec.vocabulary_size
        assert inputs.max() < size
    else:
        assert inputs.dtype == np.float32
        assert inputs.shape[2:] == dataset.spec.feature_shape
        assert dataset.spec.vocabulary_size is None
    targets = batch["targets"]
    if targets.dtype == np.int32:
        assert targets.min() >= 0 and targets.max() < dataset.spec.num_classes
    else:
        assert targets.shape == (32, dataset.spec.num_classes)
    if "target_mask" in batch:
        assert batch["target_mask"].shape == targets.shape == inputs.shape[:2]
        assert not batch["target_mask"][padding].any()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: data.AddingProblem(1), "length must be 2 or more, not 1"),
        (lambda: data.AddingProblem(5, 0), "test_length must be 2 or more, not 0"),
        (lambda: data.CopyMemory(0), "delay must be 1 or more, not 0"),
        (lambda: data.TimeDelay(5, 0), "num_delays must be 1 or more, not 0"),
        (lambda: data.EmbeddedReber(8), "min_length must lie between 9"),
        (lambda: data.EmbeddedReber(9, 8), "max_length=8, not 9"),
    ],
)
def test_impossible_values_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# Adding.


@pytest.mark.parametrize(("split", "length"), [("train", 11), ("test", 30)])
def test_the_target_is_the_sum_of_the_marked_numbers(split, length):
    batch = numbers(data.AddingProblem(11, test_length=30), 2000, split)
    assert batch["inputs"].shape == (2000, length, 2)
    value, mark = np.moveaxis(batch["inputs"], -1, 0)
    half = length // 2
    assert (mark[:, :half].sum(1) == 1).all() and (mark[:, half:].sum(1) == 1).all()
    expected = [v[m == 1].sum() for v, m in zip(value, mark, strict=True)]
    np.testing.assert_allclose(batch["targets"][:, 0], expected, rtol=1e-6)
    assert stats.kstest(value.ravel(), "uniform").pvalue > 1e-4
    assert stats.chisquare(mark[:, :half].sum(0)).pvalue > 1e-4


def test_the_chance_level_of_adding_is_a_sixth():
    dataset = data.AddingProblem(2)
    targets = numbers(dataset, 20_000)["targets"]
    error = (targets - 1) ** 2
    assert dataset.chance == 1 / 6
    standard_error = error.std() / math.sqrt(len(error))
    assert abs(error.mean() - dataset.chance) < 4 * standard_error


# Copy memory.


def test_the_symbols_come_again_after_the_signal():
    delay = 7
    batch = numbers(data.CopyMemory(delay))
    inputs, targets = batch["inputs"], batch["targets"]
    assert inputs.shape == targets.shape == (500, delay + 20)
    for row, target in zip(inputs, targets, strict=True):
        symbols = row[:10]
        assert set(symbols) <= set(range(5, 13))
        assert row[10:].tolist() == [4] * (delay - 1) + [13] * 11
        assert target.tolist() == [0] * (delay + 10) + (symbols - 4).tolist()
    counts = np.bincount(inputs[:, :10].ravel())[5:]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_chance_level_of_copying_is_that_of_a_memoryless_guess():
    dataset = data.CopyMemory(1000)
    assert dataset.chance == pytest.approx(0.0204, abs=5e-5)  # as published
    batch = numbers(data.CopyMemory(4), 50)
    blank = np.eye(9)[0]
    symbol = np.append(0, np.full(8, 1 / 8))
    time = np.arange(24)
    guess = np.where((time >= 14)[:, None], symbol, blank)
    cost = -np.log(guess[time, batch["targets"]]).mean()
    assert data.CopyMemory(4).chance == pytest.approx(cost)


# Delays.


def test_the_class_is_the_time_between_spikes():
    batch = numbers(data.TimeDelay(5, 6))
    for row, length, target, mask in zip(*map(batch.get, FIELDS), strict=True):
        spikes = np.flatnonzero(row[:, 0])
        assert spikes[0] == 0 and len(spikes) == 7 and length == spikes[-1] + 1
        assert np.flatnonzero(mask).tolist() == spikes[1:].tolist()
        assert target[mask].tolist() == (np.diff(spikes) - 5).tolist()
        assert not target[~mask].any()
    ones = int(batch["targets"][batch["target_mask"]].sum())
    assert stats.binomtest(ones, 500 * 6).pvalue > 1e-4


FIELDS = ("inputs", "lengths", "targets", "target_mask")


# The embedded Reber grammar. The edges of the published picture, written anew.

EDGES = ("0B1", "1T2", "1P3", "2S2", "2X4", "3T3", "3V5", "4X3", "4S6", "5P4")
EDGES += ("5V6", "6E7")


def reber_continuations(text):
    """What may follow a beginning of a string of Reber's grammar, or None."""
    node = "0"
    for symbol in text:
        ways = [edge[2] for edge in EDGES if edge[:2] == node + symbol]
        if not ways:
            return None
        (node,) = ways
    return {edge[1] for edge in EDGES if edge[0] == node}


def continuations(text):
    """Of the embedded grammar; the empty set after a whole string."""
    if len(text) < 2:
        return {"": {"B"}, "B": {"T", "P"}}.get(text)
    if text[0] != "B" or text[1] not in "TP":
        return None
    inner, rest = text[2:], ""
    if "E" in inner:
        end = inner.index("E") + 1
        inner, rest = inner[:end], inner[end:]
    ways = reber_continuations(inner)
    if ways is None or ways:
        return ways if not rest else None
    return {"": {text[1]}, text[1]: {"E"}, text[1] + "E": set()}.get(rest)


def test_the_automaton_of_this_test_knows_published_strings():
    for inner in ("BTSSXXTVVE", "BPVVE", "BTXXVPSE", "BPVPXVPXVPXVVE", "BTSXXVPSE"):
        assert continuations(f"BT{inner}TE") == set()
        assert continuations(f"BT{inner}PE") is None


def test_strings_are_of_the_grammar_and_all_legal_symbols_are_told():
    dataset = data.EmbeddedReber(max_length=20)
    batch = numbers(dataset, 300)
    names = np.array(dataset.spec.class_names)
    for inputs, length, target, mask, legal in zip(
        *map(batch.get, (*FIELDS, "legal")), strict=True
    ):
        whole = dataset.decode(np.append(inputs[:length], target[length - 1]))
        assert continuations(whole) == set()
        assert dataset.decode(target) == whole[1:]
        assert mask.tolist() == [t < length for t in range(len(mask))]
        for time in range(length):
            expected = continuations(whole[: time + 1])
            assert set(names[legal[time]]) == expected
            assert legal[time, target[time]]
        assert not legal[length:].any()


def test_strings_are_as_frequent_as_in_the_grammar():
    """All strings of 9 to 12 symbols, with the probabilities of their choices."""
    expected, open_strings = {}, {"": 1.0}
    for _ in range(12):
        longer = {}
        for text, probability in open_strings.items():
            ways = continuations(text)
            for symbol in ways:
                longer[text + symbol] = probability / len(ways)
        done = {text: p for text, p in longer.items() if not continuations(text)}
        expected |= done
        open_strings = {text: p for text, p in longer.items() if text not in done}
    dataset = data.EmbeddedReber(9, 12)
    batch = numbers(dataset, 4000)
    found = collections.Counter(
        "B" + dataset.decode(target) for target in batch["targets"]
    )
    assert set(found) <= set(expected)
    share = np.array(list(expected.values()))
    counts = [found[text] for text in expected]
    assert stats.chisquare(counts, 4000 * share / share.sum()).pvalue > 1e-4


def test_lengths_stay_between_the_bounds():
    batch = numbers(data.EmbeddedReber(15, 18), 400)
    assert set(batch["lengths"] + 1) == {15, 16, 17, 18}


def test_samples_run_inside_a_scan():
    dataset = data.EmbeddedReber(max_length=12)

    def step(total, key):
        return total + dataset.sample(key, 8, "train", {})["lengths"].sum(), None

    total, _ = jax.lax.scan(step, jnp.int32(0), jax.random.split(KEY, 3))
    assert 3 * 8 * 8 <= total <= 3 * 8 * 11
