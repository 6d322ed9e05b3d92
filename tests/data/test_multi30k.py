"""Multi30k: tiny files in the published form, and the files themselves."""

import dataclasses
import gzip
import hashlib

import jax
import numpy as np
import pytest

import data
from data import multi30k, sequences

SIZES = {"train": 40, "val": 6, "test_2016_flickr": 5}
WORDS = {
    "en": ["a", "dog", "runs", "over", "green", "grass", "and", "jumps", "high"],
    "de": ["ein", "Hund", "rennt", "über", "grünes", "Gras", "und", "springt", "hoch"],
    "fr": ["un", "chien", "court", "sur", "herbe", "verte", "et", "saute", "là"],
}


def sentence(rng, language, split):
    words = rng.choice(WORDS[language], rng.integers(2, 10)).tolist()
    if split == "test_2016_flickr":
        words.append("Ωxq")
    return " ".join(words).capitalize() + "."


@pytest.fixture
def written(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lines = {}
    for split, size in SIZES.items():
        for language in WORDS:
            name = f"{split}.{language}"
            lines[name] = [sentence(rng, language, split) for _ in range(size)]
            content = "".join(f"{line}\n" for line in lines[name]).encode()
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            change(monkeypatch, name, content)
    return lines, tmp_path


def change(monkeypatch, name, content):
    sha256 = hashlib.sha256(content).hexdigest()
    changed = dataclasses.replace(multi30k.ORIGINALS[name], sha256=sha256)
    monkeypatch.setitem(multi30k.ORIGINALS, name, changed)


def load(folder, **fields):
    fields = {"vocabulary_limit": 80, "min_bucket_size": 8} | fields
    return data.Multi30k(source_dir=folder, data_dir=folder / "cache", **fields)


@pytest.mark.parametrize("lowercase", [True, False])
def test_pairs_stay_together_and_come_back(written, lowercase):
    lines, folder = written
    dataset = load(folder, lowercase=lowercase)
    assert dataset.spec.sizes == {"train": 40, "validation": 6, "test": 5}
    assert dataset.spec.num_classes == dataset.spec.vocabulary_size == 80
    assert dataset.spec.source_vocabulary_size == 80
    for split, file in multi30k._FILES.items():
        size = dataset.spec.sizes[split]
        select = jax.jit(dataset.select, static_argnums=1)
        batch = jax.device_get(select(np.arange(size), split, dataset.arrays))
        both = np.maximum(batch["lengths"], batch["target_lengths"])
        assert (np.diff(both) >= 0).all()
        found = []
        for source, n, target, m in zip(*map(batch.get, FIELDS), strict=True):
            assert source[n - 1] == sequences.EOS and not source[n:].any()
            assert target[0] == sequences.BOS and target[m - 1] == sequences.EOS
            assert not target[m:].any() and sequences.BOS not in source
            found.append((dataset.decode(source), dataset.decode(target)))
        asked = list(zip(lines[f"{file}.en"], lines[f"{file}.de"], strict=True))
        if lowercase:
            asked = [tuple(text.lower() for text in pair) for pair in asked]
        assert sorted(dataset.texts[split]) == sorted(asked)
        if split != "test":
            assert found == dataset.texts[split]


def test_french_is_read_from_its_own_files(written):
    lines, folder = written
    dataset = load(folder, target_language="fr")
    assert dataset.spec.name == "multi30k_en_fr"
    asked = zip(lines["val.en"], lines["val.fr"], strict=True)
    asked = sorted((a.lower(), b.lower()) for a, b in asked)
    arrays = jax.device_get(dataset.arrays["validation"])
    for name, column in (("inputs", 0), ("targets", 1)):
        found = sorted(dataset.decode(row) for row in arrays[name])
        assert found == sorted(pair[column] for pair in asked)
    assert sorted(dataset.texts["validation"]) == asked


FIELDS = ("inputs", "lengths", "targets", "target_lengths")


def test_subwords_are_learned_from_the_train_split_alone(written, monkeypatch):
    lines, folder = written
    dataset = load(folder)
    # The signs that only the test split has are unknown.
    for row in np.asarray(dataset.arrays["test"]["inputs"]):
        assert sequences.UNKNOWN in row
    for split in ("train", "validation"):
        assert not (np.asarray(dataset.arrays[split]["inputs"]) == 3).any()
    # Another test split changes nothing in the sub-words.
    content = ("Ωxq xq\n" * 5).encode()
    (folder / "test_2016_flickr.en.gz").write_bytes(gzip.compress(content))
    change(monkeypatch, "test_2016_flickr.en", content)
    again = load(folder)
    for name in FIELDS:
        np.testing.assert_array_equal(
            again.arrays["train"][name], dataset.arrays["train"][name]
        )
    assert len(list((folder / "cache" / "subwords").iterdir())) == 1


def test_subwords_are_learned_once_for_each_set_of_options(written, monkeypatch):
    _, folder = written
    learned = []
    learn = multi30k._learn
    monkeypatch.setattr(
        multi30k, "_learn", lambda *args: learned.append(args) or learn(*args)
    )
    models = [load(folder, **fields) for fields in ({}, {}, {"lowercase": False})]
    ids = [model.encode("A dog runs.") for model in models]
    assert len(learned) == 2 and ids[0] == ids[1]
    assert ids[0][-1] == sequences.EOS
    assert models[0].decode(ids[0]) == "a dog runs."
    assert models[2].decode(ids[2]) == "A dog runs."


def test_a_bucket_holds_both_sides_whole(written):
    _, folder = written
    dataset = load(folder, num_buckets=3)
    assert len(dataset.buckets) == 3
    for start, stop, length in dataset.buckets:
        indices = np.arange(start, stop)
        whole = dataset.select(indices, "train", dataset.arrays)
        for name in ("inputs", "targets"):
            assert not whole[name][:, length:].any()


def test_impossible_values_are_sentences(written, monkeypatch):
    lines, folder = written
    with pytest.raises(ValueError, match="target_language must be de or fr, not 'es'"):
        data.Multi30k("es")
    with pytest.raises(data.DataError, match="vocabulary_limit=100000"):
        load(folder, vocabulary_limit=100_000).spec  # noqa: B018
    content = b"one line\n"
    (folder / "val.en.gz").write_bytes(gzip.compress(content))
    change(monkeypatch, "val.en", content)
    with pytest.raises(data.DataError, match="val.en has 1 lines, but val.de has 6"):
        load(folder).arrays  # noqa: B018
    (folder / "val.de.gz").unlink()
    with pytest.raises(data.DataError, match="val.de: put val.de.gz of https"):
        load(folder).arrays  # noqa: B018


@pytest.mark.parametrize("language", ["de", "fr"])
def test_the_published_files(originals, language, tmp_path):
    folder = originals / "multi30k"
    dataset = data.Multi30k(language, source_dir=folder, data_dir=tmp_path)
    assert list(dataset.spec.sizes.values()) == [29_000, 1014, 1000]
    for split in ("train", "validation", "test"):
        targets = np.asarray(dataset.arrays[split]["targets"][::50])
        for ids, (_, text) in zip(targets, dataset.texts[split][::50], strict=True):
            assert dataset.decode(ids) == " ".join(text.split()) or 3 in ids
    train = dataset.arrays["train"]
    longer = np.maximum(train["lengths"], train["target_lengths"])
    steps = sum((b - a) * length for a, b, length in dataset.buckets)
    assert steps < 1.1 * longer.sum()
