"""Texts: files written here in the published form, and the files themselves."""

import dataclasses
import gzip
import hashlib
import zipfile

import jax
import numpy as np
import pytest

import data
from data import samplers, sequences, texts
from data.sequences import Vocabulary

# Vocabularies.


def test_a_vocabulary_is_of_the_most_frequent_words():
    told = [list("bbbaaccd"), ["a"]]
    assert Vocabulary.of(told).words == ("a", "b", "c", "d")
    small = Vocabulary.of(told, limit=6)
    assert small.words == ("a", "b") and len(small) == 6
    assert small.encode(["b", "c", "a"]) == [5, 3, 4]
    assert small.decode([1, 5, 3, 4, 0]) == ["b", "<unk>", "a"]
    assert small.decode([1, 4, 2, 5, 5]) == ["a"]
    assert Vocabulary.of(told, min_count=3).words == ("a", "b")
    with pytest.raises(ValueError, match="limit must be above 4, not 4"):
        Vocabulary.of(told, limit=4)


def test_padding_and_compaction_undo_each_other():
    rows = [[5], [], [7, 6, 9]]
    array, lengths = sequences.pad(rows)
    assert array.dtype == lengths.dtype == np.int32
    assert array.tolist() == [[5, 0, 0], [0, 0, 0], [7, 6, 9]]
    gaps = np.array([[0, 5, 0, 0], [0, 0, 0, 0], [7, 0, 6, 9]])
    found, counted = sequences.compact(gaps)
    np.testing.assert_array_equal(found[:, :3], array)
    np.testing.assert_array_equal(counted, lengths)


# Characters.

PLAY = "".join(
    np.random.default_rng(0).choice(list("abcd EF\n"), 2000).tolist() + ["z"] * 10
)


@pytest.fixture
def play(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text(PLAY)
    sha256 = hashlib.sha256(PLAY.encode()).hexdigest()
    changed = dataclasses.replace(texts.SHAKESPEARE, sha256=sha256)
    monkeypatch.setattr(texts, "SHAKESPEARE", changed)
    return data.TinyShakespeare(7, source_dir=tmp_path)


def test_characters_come_back(play):
    assert play.spec.vocabulary_size == play.spec.num_classes == 4 + 8
    streams = {split: np.asarray(a["stream"]) for split, a in play.arrays.items()}
    # "z" is in the test split alone.
    assert "".join(map(play.decode, streams.values())) == PLAY.replace("z", "<unk>")
    test = streams["test"]
    assert len(test) == len(PLAY) - int(0.9 * len(PLAY))
    assert (test[-10:] == sequences.UNKNOWN).all()
    assert not any((streams[s] == sequences.UNKNOWN).any() for s in ("train",))
    assert play.spec.sizes == {split: len(s) for split, s in streams.items()}
    assert play.decode(play.encode("dEF\na")) == "dEF\na"


def test_windows_are_of_their_split(play):
    sample = jax.jit(play.sample, static_argnums=(1, 2))
    batch = sample(jax.random.key(0), 50, "validation", play.arrays)
    again = sample(jax.random.key(0), 50, "validation", play.arrays)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert batch["inputs"].shape == (50, 7) and batch["target_mask"].all()
    text = play.decode(play.arrays["validation"]["stream"])
    for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
        assert play.decode([*inputs, targets[-1]]) in text
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
    stream = play.arrays["train"]["stream"]
    batch = samplers.stream_batch(1, stream, 2, play.length)
    assert play.decode(batch["inputs"][0]) == PLAY[7:14]


def test_tiny_shakespeare(originals):
    dataset = data.TinyShakespeare(source_dir=originals)
    assert sum(dataset.spec.sizes.values()) == 1_115_394
    assert dataset.spec.sizes["test"] == 111_540
    assert dataset.spec.vocabulary_size == 4 + 65
    assert dataset.decode(dataset.arrays["train"]["stream"][:14]) == "First Citizen:"


# Words.

PROSE = """Uno dos tres. ¿Cuatro cinco?
Seis siete
ocho. Uno dos tres.

Nueve diez once doce trece"""


def write_lines(path, num_lines=60):
    rng = np.random.default_rng(1)
    lines = [
        " ".join(rng.choice(list("abcdefg"), rng.integers(1, 12))) + f" n{i}"
        for i in range(num_lines)
    ]
    path.write_text("\n".join(lines) + "\n")
    return lines


def test_prose_is_cut_into_sentences(tmp_path):
    path = tmp_path / "prose.txt.gz"
    path.write_bytes(gzip.compress(PROSE.encode()))
    dataset = data.WordText(
        path, max_words=4, validation_fraction=0.25, test_fraction=0.25
    )
    assert dataset.spec.sizes == {"train": 2, "validation": 1, "test": 1}
    found = {" ".join(s) for part in dataset._sentences.values() for s in part}
    assert found == {
        "uno dos tres .",
        "¿ cuatro cinco ?",
        "seis siete ocho .",
        "nueve diez once doce trece",
    }


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "lines.txt"), tmp_path / "lines.txt"


def test_each_word_is_told_from_those_before(lines):
    lines, path = lines
    dataset = data.WordText(path, unit="line", max_words=8, min_bucket_size=8)
    found = []
    for split, size in dataset.spec.sizes.items():
        select = jax.jit(dataset.select, static_argnums=1)
        batch = jax.device_get(select(np.arange(size), split, dataset.arrays))
        assert (np.diff(batch["lengths"]) >= 0).all()
        for row in range(size):
            n = batch["lengths"][row]
            inputs, targets = batch["inputs"][row], batch["targets"][row]
            assert inputs[0] == sequences.BOS
            np.testing.assert_array_equal(inputs[1:n], targets[: n - 1])
            assert not inputs[n:].any() and not targets[n:].any()
            np.testing.assert_array_equal(batch["target_mask"][row], targets > 0)
            ended = targets[n - 1] == sequences.EOS
            assert ended == (n <= 8) or (ended and n == 9)
            found.append((split, dataset.decode(inputs), bool(ended)))
    # Each line is in one split, cut to eight words; its number is unknown elsewhere.
    assert len(found) == len(lines)
    known = {line.split()[-1] for line in lines} & set(dataset.vocabulary.words)
    for split, text, ended in found:
        number = text.split()[-1]
        if ended:
            assert (number in known) if split == "train" else (number == "<unk>")


def test_the_vocabulary_is_of_the_train_split_alone(lines):
    _, path = lines
    whole = data.WordText(path, unit="line", min_bucket_size=8)
    train = {word for s in whole._sentences["train"] for word in s}
    assert set(whole.vocabulary.words) == train
    for split in ("validation", "test"):
        rows = whole.arrays[split]
        assert (np.asarray(rows["inputs"]) == sequences.UNKNOWN).any()
    limited = data.WordText(path, unit="line", vocabulary_limit=9, min_bucket_size=8)
    assert limited.spec.vocabulary_size == limited.spec.num_classes == 9
    assert limited.encode("a ZZZ g")[1] == sequences.UNKNOWN
    parts = [set(map(tuple, s)) for s in whole._sentences.values()]
    assert len(set.union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"unit": "page"}, "unit must be sentence or line, not 'page'"),
        ({"max_words": 0}, "max_words must be 1 or more, not 0"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1, not 1.0"),
        ({"test_fraction": 0.95}, "not add up to 1.05"),
    ],
)
def test_impossible_values_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.WordText("x", **fields)


def test_files_that_are_no_text_are_sentences(tmp_path):
    with pytest.raises(data.DataError, match="missing.txt cannot be read as text"):
        data.WordText(tmp_path / "missing.txt").arrays  # noqa: B018
    path = tmp_path / "short.txt"
    path.write_text("One sentence.")
    with pytest.raises(data.DataError, match="holds 1 sentences, too few"):
        data.WordText(path).arrays  # noqa: B018


# Opinions.


@pytest.fixture
def opinions(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    found = {}
    with zipfile.ZipFile(tmp_path / "sentence_polarity.zip", "w") as archive:
        for label, (name, original) in enumerate(texts.POLARITIES.items()):
            found[label] = [
                " ".join([name, *rng.choice(list("abcd"), rng.integers(1, 9))])
                + f" {name[0]}{i} , ."
                for i in range(40)
            ]
            content = "".join(f"{line} \n" for line in found[label]).encode()
            archive.writestr(original.name, content)
            sha256 = hashlib.sha256(content).hexdigest()
            changed = dataclasses.replace(original, sha256=sha256)
            monkeypatch.setitem(texts.POLARITIES, name, changed)
    return found, tmp_path


def test_sentences_have_the_class_of_their_file(opinions):
    written, folder = opinions
    dataset = data.MovieSentences(source_dir=folder, min_count=1, min_bucket_size=8)
    assert dataset.spec.sizes == {"train": 64, "validation": 8, "test": 8}
    counted = 0
    for split, size in dataset.spec.sizes.items():
        batch = dataset.select(np.arange(size), split, dataset.arrays)
        batch = jax.device_get(batch)
        assert batch["targets"].sum() == size // 2
        for ids, n, label in zip(*map(batch.get, FIELDS), strict=True):
            text = dataset.decode(ids)
            assert len(text.split()) == n
            assert text.startswith(dataset.spec.class_names[label])
            if split == "train":
                assert text in written[label]
            else:  # its number is not in the train split
                assert text.split()[-3] == "<unk>"
            counted += 1
    assert counted == 80
    other = data.MovieSentences(source_dir=folder, split_seed=1, min_bucket_size=8)
    assert other._read[0]["test"] != dataset._read[0]["test"]


FIELDS = ("inputs", "lengths", "targets")


def test_sentences_are_labelled_examples(opinions):
    _, folder = opinions
    dataset = data.MovieSentences(source_dir=folder, min_bucket_size=8)
    for split, size in dataset.spec.sizes.items():
        examples, arrays = dataset.splits[split], dataset.arrays[split]
        assert examples["inputs"].shape == (size, *dataset.spec.feature_shape)
        width = arrays["inputs"].shape[1]
        np.testing.assert_array_equal(examples["inputs"][:, :width], arrays["inputs"])
        assert not examples["inputs"][:, width:].any()
        np.testing.assert_array_equal(examples["labels"], arrays["targets"])
        ids = data.normalize(examples["inputs"], dataset.shift, dataset.scale)
        np.testing.assert_array_equal(ids, examples["inputs"])


def test_words_that_come_once_are_unknown(opinions):
    _, folder = opinions
    dataset = data.MovieSentences(source_dir=folder, min_bucket_size=8)
    assert set(dataset.vocabulary.words) == {"positive", "negative", *",.abcd"}
    assert (np.asarray(dataset.arrays["train"]["inputs"]) == 3).any(1).all()
    words = ["positive", "a's", "b-c", ",", "a", "."]
    assert dataset.encode("Positive a's b-c, a.") == dataset.vocabulary.encode(words)


def test_the_published_sentences(originals):
    dataset = data.MovieSentences(source_dir=originals)
    assert list(dataset.spec.sizes.values()) == [8530, 1066, 1066]
    train = dataset.arrays["train"]
    assert int(train["targets"].sum()) == 4265
    lengths = np.asarray(train["lengths"])
    steps = sum((b - a) * length for a, b, length in dataset.buckets)
    assert steps < 1.15 * lengths.sum() < 0.45 * len(lengths) * lengths.max()
