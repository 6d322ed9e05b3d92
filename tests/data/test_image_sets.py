import io
import zipfile

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import data

KEY = jax.random.key(0)


def draw(dataset, num_sets, split, key=KEY):
    sample = jax.jit(dataset.sample, static_argnums=(1, 2))
    batch = sample(key, num_sets, split, dataset.arrays)
    return jax.tree.map(np.asarray, batch)


# Sums of digits.


@pytest.fixture(scope="module")
def digit_sums():
    return data.ImageDigitSums("digits", max_size=4, test_max_size=9)


def sets_of(batch):
    """The elements of the sets [set, element, ...] of a batch that shares them."""
    return batch["elements"][batch["indices"]]


@pytest.mark.parametrize(
    ("split", "max_size", "shared"),
    [("train", 4, None), ("test", 9, None), ("train", 4, 20), ("test", 9, 20)],
)
def test_labels_of_the_images_add_up(split, max_size, shared):
    dataset = data.ImageDigitSums(
        "digits", max_size=4, test_max_size=9, shared_images=shared
    )
    batch = draw(dataset, 50, split)
    if shared and split == "train":
        assert batch["elements"].shape == (20, 8, 8, 1)
        assert set(batch["indices"][batch["mask"]]) == set(range(20))
        batch["inputs"] = sets_of(batch)
    else:
        assert not batch["inputs"][~batch["mask"]].any()
    assert batch["inputs"].shape == (50, max_size, 8, 8, 1)
    arrays = data.load("digits")
    known = {
        ((np.asarray(image, np.float32)) / 16).tobytes(): label
        for image, label in zip(*arrays.splits[split].values(), strict=True)
    }
    for inputs, mask, target in zip(
        batch["inputs"], batch["mask"], batch["target"], strict=True
    ):
        assert target == sum(known[image.tobytes()] for image in inputs[mask])
    assert set(batch["mask"].sum(1)) == set(range(1, max_size + 1))


def test_the_source_of_the_images_is_told(digit_sums):
    assert "scikit-learn" in digit_sums.spec.source
    assert digit_sums.spec.num_classes == 1


def test_deformed_copies_are_added_to_the_train_split(digit_sums):
    plain = digit_sums.arrays
    more = data.ImageDigitSums("digits", num_deformed=2).arrays
    jax.tree.map(np.testing.assert_array_equal, more["test"], plain["test"])
    images, labels = (np.asarray(more["train"][k]) for k in ("inputs", "labels"))
    first, second, third = np.split(images, 3)
    np.testing.assert_array_equal(first, plain["train"]["inputs"])
    np.testing.assert_array_equal(labels, np.tile(plain["train"]["labels"], 3))
    assert images.dtype == plain["train"]["inputs"].dtype
    for copy in (second, third):
        # Another image, but of the same digit: nearer to its own than to the next.
        own, other = (np.abs(copy - x).mean() for x in (first, np.roll(first, 1, 0)))
        assert 0 < own < other
    assert (second != third).any()


# Unique characters.

NUM_CHARACTERS = 20
NUM_DRAWINGS = 6


def drawing(alphabet, character, number):
    """A drawing that tells which it is: a black row and a black column on white."""
    image = np.full((105, 105), True)
    image[5 * (10 * alphabet + character)] = False
    image[:, 5 * number] = False
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def files(alphabets=(0, 1), drawings=NUM_DRAWINGS):
    return {
        f"alphabet{a}/character{c:02d}/{n:04d}.png": drawing(a, c, n)
        for a in alphabets
        for c in range(NUM_CHARACTERS // 2)
        for n in range(drawings)
    }


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{path.stem}/{name}", data)


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omniglot")
    write_zip(folder / "images_background_small1.zip", files())
    return str(folder)


def characters(omniglot, **fields):
    fields = {"min_size": 2, "max_size": 5, "image_size": 105} | fields
    fields = {"validation_fraction": 0.3, "test_fraction": 0.3} | fields
    return data.UniqueCharacters(omniglot, **fields)


def which(image):
    """(alphabet and character, number of the drawing) of an image."""
    ink = image[..., 0] > 0.5
    row = np.flatnonzero(ink.all(1))
    column = np.flatnonzero(ink.all(0))
    assert len(row) == len(column) == 1
    return row[0] // 5, column[0] // 5


def test_the_target_is_how_many_characters_differ(omniglot):
    dataset = characters(omniglot)
    batch = draw(dataset, 400, "train")
    assert batch["inputs"].shape == (400, 5, 105, 105, 1)
    assert not batch["inputs"][~batch["mask"]].any()
    first_are_distinct = 0
    for inputs, mask, target in zip(
        batch["inputs"], batch["mask"], batch["target"], strict=True
    ):
        found = [which(image) for image in inputs[mask]]
        assert len({character for character, _ in found}) == target
        assert len(set(found)) == len(found)  # no drawing twice
        count = int(target[0])
        first_are_distinct += len({c for c, _ in found[:count]}) == count
    # Were elements not shuffled, the first `target` ones would always differ.
    assert first_are_distinct < 350
    size = batch["mask"].sum(1)
    assert set(size) == {2, 3, 4, 5}
    for n in range(2, 6):
        counts = np.bincount(batch["target"][size == n, 0].astype(int))[1:]
        assert len(counts) == n and stats.chisquare(counts).pvalue > 1e-4


def test_sets_of_a_batch_share_characters(omniglot):
    dataset = characters(omniglot, shared_characters=6)
    batch = draw(dataset, 400, "train")
    assert batch["elements"].shape == (6 * 5, 105, 105, 1)
    shown = [which(image) for image in batch["elements"]]
    assert len(set(shown)) == 30  # five drawings of six characters, each once
    for indices, mask, target in zip(
        batch["indices"], batch["mask"], batch["target"], strict=True
    ):
        found = [shown[index] for index in indices[mask]]
        assert len({character for character, _ in found}) == target
        assert len(set(found)) == len(found)  # no drawing twice
    # All that is shared is used, and "characters" are those of the split.
    assert set(batch["indices"][batch["mask"]]) == set(range(30))
    of_split = [which(image[..., None] / 255)[0] for image in images_of(dataset)]
    character_of = np.array([character for character, _ in shown])
    np.testing.assert_array_equal(
        np.array(of_split)[batch["characters"]], character_of[batch["indices"]]
    )
    other = draw(dataset, 1, "train", jax.random.key(1))
    assert (batch["elements"] != other["elements"]).any()


def images_of(dataset):
    """An image of each character of the train split."""
    return np.asarray(dataset.arrays["train"][:, 0])


def test_shared_characters_are_varied_as_one_set(omniglot):
    dataset = characters(omniglot, shared_characters=5, augment=True)
    plain = draw(characters(omniglot, shared_characters=5), 4, "train")
    varied = draw(dataset, 4, "train")
    np.testing.assert_array_equal(plain["indices"], varied["indices"])
    assert (plain["elements"] != varied["elements"]).any((1, 2, 3)).all()
    # Other splits keep their own images.
    assert draw(dataset, 4, "test")["inputs"].shape == (4, 5, 105, 105, 1)


def test_more_shared_characters_than_there_are_is_refused(omniglot):
    with pytest.raises(data.DataError, match="has 8 characters, fewer than .* 9"):
        _ = characters(omniglot, shared_characters=9).arrays
    for shared in (0, 4):
        with pytest.raises(ValueError, match=f"at least max_size, 5, not {shared}"):
            characters(omniglot, shared_characters=shared)
    with pytest.raises(ValueError, match="shared_images must be 1 or more, not 0"):
        data.ImageDigitSums("digits", shared_images=0)


def test_only_images_of_the_train_split_are_varied(omniglot):
    plain, varied = characters(omniglot), characters(omniglot, augment=True)
    for split in ("train", "validation", "test"):
        expected, found = draw(plain, 20, split), draw(varied, 20, split)
        images, others = expected.pop("inputs"), found.pop("inputs")
        chex.assert_trees_all_equal(expected, found)
        same = (images == others).all((2, 3, 4))
        mask = expected["mask"]
        assert not others[~mask].any()
        assert (same[mask] == (split != "train")).all()
        assert others.min() >= 0 and others.max() <= 1


def test_splits_have_characters_of_their_own(omniglot):
    dataset = characters(omniglot)
    assert dataset.spec.sizes == {"train": 8, "validation": 6, "test": 6}
    found = [
        {which(image)[0] for image in images[:, 0, :, :, None] / 255}
        for images in dataset.arrays.values()
    ]
    assert sum(map(len, found)) == len(set.union(*found)) == NUM_CHARACTERS
    other = characters(omniglot, split_seed=1)
    assert (dataset.arrays["train"] != other.arrays["train"]).any()


def test_folders_and_archives_are_read_alike_and_characters_once(omniglot, tmp_path):
    expected = characters(omniglot).arrays
    for name, content in files(alphabets=(0,)).items():
        path = tmp_path / "images_background" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    # The small archives have alphabets in common with the large one.
    write_zip(tmp_path / "images_background_small2.zip", files())
    found = characters(str(tmp_path)).arrays
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_images_are_scaled_down_and_ink_is_one(omniglot):
    dataset = characters(omniglot, image_size=21)
    batch = draw(dataset, 20, "test")
    assert batch["inputs"].shape == (20, 5, 21, 21, 1)
    real = batch["inputs"][batch["mask"]]
    # A row and a column of 105 pixels, averaged over squares of five by five.
    np.testing.assert_allclose(real.mean((1, 2, 3)), (2 * 105 - 1) / 105**2, atol=2e-3)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"source_dir": None}, "source_dir is not set. Put images_background.zip"),
        ({"source_dir": "/no/such"}, "/no/such, which is no folder. Put"),
        ({"max_size": 7}, r"6 images each, but sets may need 7 \(max_size\)"),
        ({"test_fraction": 0.1}, r"test split has 2 of the 20 .* need 5 \(max_size\)"),
    ],
)
def test_missing_images_are_named(omniglot, fields, sentence):
    fields = {"omniglot": omniglot} | fields
    source = fields.pop("source_dir", fields.pop("omniglot"))
    with pytest.raises(data.DataError, match=sentence):
        _ = characters(source, **fields).arrays


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(data.DataError, match="no images of characters in .* Put"):
        _ = characters(str(tmp_path)).arrays
    archive = tmp_path / "images_background.zip"
    write_zip(archive, files() | files(alphabets=(0,), drawings=NUM_DRAWINGS + 1))
    with pytest.raises(data.DataError, match="the same number .* from 6 to 7"):
        _ = characters(str(tmp_path)).arrays
    write_zip(archive, {"alphabet0/character01/0001.png": b"no image"})
    with pytest.raises(data.DataError, match="0001.png in .* cannot be read"):
        _ = characters(str(tmp_path)).arrays
    archive.write_bytes(b"no archive")
    with pytest.raises(data.DataError, match="images_background.zip cannot be read"):
        _ = characters(str(tmp_path)).arrays


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"min_size": 0}, "min_size must be 1 or more, not 0"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1, not 1.0"),
        ({"test_fraction": 0.8}, "must leave something to learn"),
    ],
)
def test_impossible_values_are_named(omniglot, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        characters(omniglot, **fields)
