"""Piano rolls: files written here in the published form, and the files themselves."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest
import scipy.io

import data
from data import chorales

SIZES = {"train": [5, 3, 9, 4], "validation": [2, 6], "test": [7, 1, 3]}


def rolls():
    rng = np.random.default_rng(0)
    return {
        split: [(rng.random((n, 88)) < 0.05).astype(np.uint8) for n in lengths]
        for split, lengths in SIZES.items()
    }


def write(path, pieces):
    names = {"train": "traindata", "validation": "validdata", "test": "testdata"}
    cells = {}
    for split, name in names.items():
        cells[name] = np.empty((1, len(pieces[split])), object)
        cells[name][0, :] = pieces[split]
    scipy.io.savemat(path, cells)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path, monkeypatch):
    sha256 = write(tmp_path / "JSB_Chorales.mat", rolls())
    original = dataclasses.replace(chorales.ORIGINALS["jsb"], sha256=sha256)
    monkeypatch.setitem(chorales.ORIGINALS, "jsb", original)
    return data.Chorales(source_dir=tmp_path, num_buckets=2, min_bucket_size=2)


def test_every_frame_is_predicted_from_the_one_before(small):
    assert small.spec.sizes == {s: len(lengths) for s, lengths in SIZES.items()}
    assert small.spec.num_classes == 88 and small.spec.feature_shape == (88,)
    for split, pieces in rolls().items():
        pieces = sorted(pieces, key=len)
        select = jax.jit(small.select, static_argnums=1)
        batch = select(np.arange(len(pieces)), split, small.arrays)
        batch = jax.tree.map(np.asarray, batch)
        assert batch["inputs"].dtype == batch["targets"].dtype == np.float32
        for row, piece in enumerate(pieces):
            n = len(piece)
            assert batch["lengths"][row] == n
            inputs, targets = batch["inputs"][row], batch["targets"][row]
            np.testing.assert_array_equal(targets[:n], piece)
            np.testing.assert_array_equal(inputs[1:n], piece[:-1])
            assert not inputs[0].any()
            assert not inputs[n:].any() and not targets[n:].any()
            mask = batch["target_mask"][row]
            assert mask.tolist() == [t < n for t in range(len(mask))]


def test_a_bucket_holds_its_pieces_whole(small):
    assert small.buckets == ((0, 2, 4), (2, 4, 9))
    for start, stop, length in small.buckets:
        whole = small.select(np.arange(start, stop), "train", small.arrays)
        assert whole["lengths"].max() <= length
        assert not whole["targets"][:, length:].any()


def test_impossible_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="collection must be one of jsb, nott.*'muse'"):
        data.Chorales("muse")
    with pytest.raises(data.DataError, match="JSB_Chorales.mat"):
        data.Chorales(source_dir=tmp_path).arrays  # noqa: B018


def test_files_of_another_form_are_sentences(tmp_path):
    path = tmp_path / "file.mat"
    write(path, rolls() | {"test": [np.zeros((3, 87), np.uint8)] * 2})
    with pytest.raises(data.DataError, match=r"one of the test split is \[3, 87\]"):
        chorales.read_piano_rolls(path.read_bytes())
    scipy.io.savemat(path, {"traindata": np.zeros(3)})
    with pytest.raises(data.DataError, match="validdata"):
        chorales.read_piano_rolls(path.read_bytes())
    with pytest.raises(data.DataError, match="Expected a MATLAB file"):
        chorales.read_piano_rolls(b"no such thing" * 99)


@pytest.mark.parametrize(
    ("collection", "pieces", "frames", "chance"),
    [
        ("jsb", [229, 76, 77], [13_807, 4602, 4725], 11.06),
        ("nottingham", [694, 173, 170], [176_561, 45_513, 44_463], 10.25),
    ],
)
def test_the_published_files(originals, collection, pieces, frames, chance):
    dataset = data.Chorales(collection, source_dir=originals)
    assert list(dataset.spec.sizes.values()) == pieces
    arrays = jax.tree.map(np.asarray, dataset.arrays)
    found = [int(arrays[split]["lengths"].sum()) for split in dataset.spec.sizes]
    assert found == frames
    train, test = arrays["train"], arrays["test"]
    share = (train["frames"].sum((0, 1)) + 1) / (train["lengths"].sum() + 2)
    keys = test["frames"].sum((0, 1))
    rest = test["lengths"].sum() - keys
    cost = -(keys * np.log(share) + rest * np.log1p(-share)).sum()
    assert cost / test["lengths"].sum() == pytest.approx(chance, abs=0.01)
