import functools
import gzip
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets as sklearn_datasets

import data
from data import builders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def rows(inputs, labels):
    """The examples as a sorted list, to compare datasets as multisets."""
    flat = np.asarray(inputs, np.float32).reshape(len(inputs), -1)
    return sorted(map(tuple, np.column_stack([flat, labels]).tolist()))


def run_python(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The embedded datasets.


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine"])
def test_splits_are_a_stratified_partition_of_the_original(name, cache):
    dataset = data.load(name, data_dir=cache)
    inputs, labels = getattr(sklearn_datasets, f"load_{name}")(return_X_y=True)
    splits = dataset.splits
    assert list(splits) == ["train", "validation", "test"]
    together = [
        np.concatenate([arrays[key] for arrays in splits.values()])
        for key in ("inputs", "labels")
    ]
    assert rows(*together) == rows(inputs, labels)

    n = len(labels)
    sizes = [n * 0.75 * 0.8, n * 0.75 * 0.2, n * 0.25]
    overall = np.bincount(labels) / n
    for (split, arrays), size in zip(splits.items(), sizes, strict=True):
        count = len(arrays["labels"])
        assert abs(count - size) <= 2
        assert dataset.spec.sizes[split] == count
        assert arrays["labels"].dtype == np.int32
        found = np.bincount(arrays["labels"], minlength=len(overall))
        assert np.abs(found - overall * count).max() <= 1.5
        assert arrays["inputs"].shape == (count, *dataset.spec.feature_shape)
        assert (np.diff(arrays["labels"]) < 0).any()  # not sorted by class


def test_spec_describes_the_dataset(cache):
    spec = data.load("wine", data_dir=cache).spec
    assert (spec.name, spec.feature_shape, spec.num_classes) == ("wine", (13,), 3)
    assert len(spec.class_names) == 3
    assert spec.source.startswith("embedded in scikit-learn")
    assert spec.licence == "CC BY 4.0"
    assert spec.citation.startswith("@misc{") and spec.homepage.startswith("https://")


def test_digits_are_images_normalized_to_plus_minus_one(cache):
    dataset = data.load("digits", data_dir=cache)
    inputs = dataset.splits["train"]["inputs"]
    assert inputs.dtype == np.uint8 and inputs.shape[1:] == (8, 8, 1)
    normalized = data.normalize(inputs, dataset.shift, dataset.scale)
    assert normalized.dtype == np.float32
    assert (normalized.min(), normalized.max()) == (-1, 1)


def test_vectors_are_normalized_by_the_train_split(cache):
    dataset = data.load("breast_cancer", data_dir=cache)
    train = dataset.splits["train"]["inputs"]
    assert train.dtype == np.float32
    assert dataset.shift.dtype == dataset.scale.dtype == np.float32
    normalized = data.normalize(train, dataset.shift, dataset.scale)
    np.testing.assert_allclose(normalized.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std(axis=0), 1, atol=1e-4)


def test_split_seed_decides_the_splits(cache):
    first, again, other = (
        data.load("wine", data_dir=cache, split_seed=seed).splits for seed in (0, 0, 1)
    )
    for split in first:
        np.testing.assert_array_equal(first[split]["inputs"], again[split]["inputs"])
        assert rows(**first[split]) != rows(**other[split])


def test_fractions_are_respected_and_checked(cache):
    sizes = data.load(
        "digits", data_dir=cache, validation_fraction=0.5, test_fraction=0.1
    ).spec.sizes
    assert sizes["test"] == 180 and abs(sizes["validation"] - sizes["train"]) <= 1
    for key in ("validation_fraction", "test_fraction"):
        with pytest.raises(data.DataError, match=f"{key} must lie between 0 and 1"):
            data.load("digits", data_dir=cache, **{key: 1.0})
    with pytest.raises(data.DataError, match="wine cannot be split"):
        data.load("wine", data_dir=cache, test_fraction=0.001)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(data.DataError, match="did you mean 'fashion_mnist'"):
        data.load("fashion-mnist")
    with pytest.raises(data.DataError, match="source_dir must not be given for wine"):
        data.load("wine", source_dir="anywhere")


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.load("wine")
    assert (tmp_path / "xdg" / "archs" / "archs" / "wine" / "1.0.0").is_dir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    data.load("wine")
    assert (tmp_path / "tfds" / "archs" / "wine" / "1.0.0").is_dir()


def test_prepared_datasets_are_read_from_a_read_only_folder(tmp_path):
    expected = data.load("wine", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "locks")
    (tmp_path / "locks").write_text("no lock can be taken any more")
    found = data.load("wine", data_dir=tmp_path)
    assert rows(**found.splits["test"]) == rows(**expected.splits["test"])
    with pytest.raises(data.DataError, match="digits cannot be prepared in"):
        data.load("digits", data_dir=tmp_path)


def test_damaged_cache_says_what_to_delete(tmp_path):
    data.load("wine", data_dir=tmp_path)
    folder = tmp_path / "archs" / "wine" / "1.0.0"
    (records,) = folder.glob("*.array_record*")
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(data.DataError, match=f"{folder}.*delete the folder"):
        data.load("wine", data_dir=tmp_path)


def test_importing_the_package_is_cheap():
    code = (
        "import sys, data; print({'tensorflow_datasets', 'sklearn'} & {*sys.modules})"
    )
    out, err = run_python(code).communicate(timeout=60)
    assert out.strip() == "set()", err


# Several processes.

LOAD = """
import sys, data
dataset = data.load("digits", data_dir=sys.argv[1])
print(int(dataset.splits["train"]["inputs"].sum()), dataset.spec.sizes["train"])
"""


def test_two_processes_prepare_at_once(tmp_path, cache):
    processes = [run_python(LOAD, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    train = data.load("digits", data_dir=cache).splits["train"]["inputs"]
    expected = f"{train.sum()} {len(train)}"
    assert [out.strip() for out, _ in outputs] == [expected] * 2, outputs
    assert [p.name for p in (tmp_path / "archs" / "digits").iterdir()] == ["1.0.0"]


def test_a_process_killed_half_way_leaves_nothing_that_counts(tmp_path):
    code = """
import itertools, os, signal, sys, data
from data import builders
generate = builders.Archs._generate_examples
def killed(self, inputs, labels):
    yield from itertools.islice(generate(self, inputs, labels), 900)
    os.kill(os.getpid(), signal.SIGKILL)
builders.Archs._generate_examples = killed
data.load("digits", data_dir=sys.argv[1])
"""
    process = run_python(code, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "archs" / "digits"
    assert [p.name for p in folder.iterdir() if p.name == "1.0.0"] == []
    assert list(folder.glob("incomplete.*"))
    dataset = data.load("digits", data_dir=tmp_path)
    assert sum(dataset.spec.sizes.values()) == 1797
    assert [p.name for p in folder.iterdir()] == ["1.0.0"]


# The datasets of idx files.


def idx(array):
    header = bytes([0, 0, 8, array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    """A folder of small idx files that take the place of the published ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    arrays = {}
    for prefix, size in (("train", 100), ("t10k", 30)):
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(
            0, 256, (size, 28, 28), np.uint8
        )
        arrays[f"{prefix}-labels-idx1-ubyte"] = (np.arange(size) % 10).astype(np.uint8)
    for name in ("mnist", "fashion_mnist"):
        for file, array in arrays.items():
            content = idx(array)
            md5 = hashlib.md5(content).hexdigest()
            monkeypatch.setitem(builders.Archs.builder_configs[name].md5, file, md5)
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(builders, "DEBIAN", {"fashion_mnist": tmp_path / "debian"})
    return folder, arrays


def test_idx_folder_keeps_the_official_test_split(tmp_path, idx_files):
    folder, arrays = idx_files
    plain = folder / "train-images-idx3-ubyte"  # one of the files not gzipped
    plain.write_bytes(gzip.decompress(plain.with_suffix(".gz").read_bytes()))
    plain.with_suffix(".gz").unlink()

    dataset = data.load("mnist", data_dir=tmp_path, source_dir=folder)
    assert dataset.spec.sizes == {"train": 80, "validation": 20, "test": 30}
    assert dataset.spec.source == f"folder {folder}"
    test = dataset.splits["test"]
    np.testing.assert_array_equal(
        test["inputs"], arrays["t10k-images-idx3-ubyte"][..., None]
    )
    np.testing.assert_array_equal(test["labels"], arrays["t10k-labels-idx1-ubyte"])
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    assert (np.bincount(validation["labels"]) == 2).all()
    assert rows(
        np.concatenate([train["inputs"], validation["inputs"]]),
        np.concatenate([train["labels"], validation["labels"]]),
    ) == rows(arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"])
    assert (dataset.shift, dataset.scale) == (127.5, 127.5)

    # Prepared, so the folder is needed no more, and the source is still known.
    shutil.rmtree(folder)
    assert data.load("mnist", data_dir=tmp_path).spec == dataset.spec


def test_files_where_the_message_says_are_found(tmp_path, idx_files):
    folder, arrays = idx_files
    with pytest.raises(data.DataError) as error:
        data.load("fashion_mnist", data_dir=tmp_path)
    message = str(error.value)
    assert "download=True (--config.dataset.download=True)" in message
    assert all(f"{file}.gz" in message for file in arrays)
    target = re.search(r"into (\S+),", message)[1]
    shutil.copytree(folder, target)
    found = data.load("fashion_mnist", data_dir=tmp_path)
    assert found.spec.source == f"folder {target}"


def test_debian_package_is_found(tmp_path, idx_files):
    idx_files[0].rename(tmp_path / "debian")
    dataset = data.load("fashion_mnist", data_dir=tmp_path)
    assert dataset.spec.source == "Debian package dataset-debian"


def test_missing_and_damaged_files_are_named(tmp_path, idx_files):
    folder, _ = idx_files
    path = folder / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    wrong = idx(np.zeros(30, np.uint8))
    for content in (whole[:-5], whole[:15] + b"\xff" * 9 + whole[24:], b"", wrong):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=f"{path} is damaged or not"):
            data.load("mnist", data_dir=tmp_path, source_dir=folder)
    path.unlink()
    with pytest.raises(data.DataError, match=f"put {path.name} .* into {folder}"):
        data.load("mnist", data_dir=tmp_path, source_dir=folder)
    path.write_bytes(whole)
    data.load("mnist", data_dir=tmp_path, source_dir=folder)


# Downloads.


@pytest.fixture
def server(idx_files, monkeypatch):
    """The idx files behind a local web server that logs what is asked."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(idx_files[0]))
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setattr(builders.Archs.builder_configs["mnist"], "url", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield asked
        httpd.shutdown()


def test_nothing_is_downloaded_unasked(tmp_path, server):
    with pytest.raises(data.DataError, match="download=True"):
        data.load("mnist", data_dir=tmp_path)
    assert server == []
    dataset = data.load("mnist", data_dir=tmp_path, download=True)
    assert dataset.spec.source.startswith("downloaded from http://127.0.0.1")
    assert len(server) == 4
    data.load("mnist", data_dir=tmp_path, download=True)
    assert len(server) == 4


def test_a_partial_download_is_never_taken_as_whole(tmp_path, server, idx_files):
    path = idx_files[0] / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DataError, match="is damaged or not the published file"):
        data.load("mnist", data_dir=tmp_path, download=True)
    path.write_bytes(whole)
    # What was whole is not asked for again.
    server.clear()
    assert data.load("mnist", data_dir=tmp_path, download=True).spec.sizes["test"] == 30
    assert server == [
        "/t10k-images-idx3-ubyte.gz",
        "/t10k-labels-idx1-ubyte.gz",
    ]


def test_refused_connection_and_missing_page_are_clear_errors(
    tmp_path, server, idx_files, monkeypatch
):
    (idx_files[0] / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(data.DataError, match=r"(?s)404.*put train-images-idx3-ubyte"):
        data.load("mnist", data_dir=tmp_path, download=True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        monkeypatch.setattr(builders.Archs.builder_configs["mnist"], "url", url)
        with pytest.raises(data.DataError, match="Could not download http://127"):
            data.load("mnist", data_dir=tmp_path, download=True)


@pytest.mark.slow
@pytest.mark.parametrize("silent", ["server", "name look-up"])
def test_silence_ends_in_an_error_within_ten_seconds(
    tmp_path, idx_files, monkeypatch, silent
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        monkeypatch.setattr(builders.Archs.builder_configs["mnist"], "url", url)
        if silent == "name look-up":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
        start = time.monotonic()
        with pytest.raises(data.DataError, match="Could not download"):
            data.load("mnist", data_dir=tmp_path, download=True)
        assert time.monotonic() - start < 10


# Any builder of tensorflow-datasets.


class Shades(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """PNG images, with official splits and features beside the supervised ones."""

    VERSION = tfds.core.Version("2.1.0")
    SPLITS = {"train": 20, "validation": 6, "test": 8, "unlabelled": 3}
    SIDES = (6,)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["dark", "light"]),
                    "id": tfds.features.Text(),
                }
            ),
            license="public domain",
            citation="@misc{shades}",
            homepage="https://example.org/",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(n) for split, n in self.SPLITS.items()}

    def _generate_examples(self, n):
        for i in range(n):
            side = self.SIDES[i % len(self.SIDES)]
            image = np.full((side, 5, 3), i + 200 * (i % 2), np.uint8)
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2, "id": str(i)}


class OneSplit(Shades, skip_registration=True):
    SPLITS = {"everything": 40}


class Ragged(Shades, skip_registration=True):
    SIDES = (6, 7)


class Unlabelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"x": np.zeros(2, np.float32)}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Shades, OneSplit, Ragged, Unlabelled):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_prepared_tfds_dataset_keeps_its_splits_and_decodes_images(tfds_dir):
    dataset = data.load("tfds:shades", data_dir=tfds_dir)
    spec = dataset.spec
    assert spec.sizes == {"train": 20, "validation": 6, "test": 8}
    assert (spec.feature_shape, spec.class_names) == ((6, 5, 3), ("dark", "light"))
    assert spec.source == f"tfds:shades prepared at {tfds_dir}/shades/2.1.0"
    assert (spec.licence, spec.citation) == ("public domain", "@misc{shades}")
    for arrays in dataset.splits.values():
        assert arrays["inputs"].dtype == np.uint8
        np.testing.assert_array_equal(
            arrays["inputs"][:, 0, 0, 0] >= 200, arrays["labels"] == 1
        )
    assert dataset.shift == dataset.scale == np.float32(127.5)
    assert data.load("tfds:shades:2.1.0", data_dir=tfds_dir).spec.sizes == spec.sizes


def test_single_split_of_any_name_is_split_three_ways(tfds_dir):
    sizes = data.load("tfds:one_split", data_dir=tfds_dir).spec.sizes
    assert sizes == {"train": 24, "validation": 6, "test": 10}


def test_unsuitable_tfds_datasets_say_why(tfds_dir):
    with pytest.raises(data.DataError, match="numbers of one shape"):
        data.load("tfds:ragged", data_dir=tfds_dir)
    with pytest.raises(data.DataError, match="is not a classification dataset"):
        data.load("tfds:unlabelled", data_dir=tfds_dir)


def test_unprepared_tfds_dataset(tmp_path):
    with pytest.raises(data.DataError, match=r"download=True.*array_record"):
        data.load("tfds:mnist", data_dir=tmp_path)
    with pytest.raises(data.DataError, match="has no builder for tfds:no_such_thing"):
        data.load("tfds:no_such_thing", data_dir=tmp_path, download=True)
    with pytest.raises(data.DataError, match="is not tfds:NAME"):
        data.load("tfds:a b", data_dir=tmp_path)


def test_unprepared_tfds_dataset_without_a_network_fails_soon(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for variable in [v for v in os.environ if v.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    start = time.monotonic()
    with pytest.raises(data.DataError, match="Could not download tfds:mnist"):
        data.load("tfds:mnist", data_dir=tmp_path, download=True)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.skipif(
    not builders.DEBIAN["fashion_mnist"].exists(), reason="dataset-fashion-mnist"
)
def test_fashion_mnist(tmp_path):
    dataset = data.load("fashion_mnist", data_dir=tmp_path)
    assert dataset.spec.sizes == {"train": 48000, "validation": 12000, "test": 10000}
    assert dataset.spec.source == "Debian package dataset-fashion-mnist"
    assert (np.bincount(dataset.splits["validation"]["labels"]) == 1200).all()
    labels = dataset.splits["test"]["labels"]
    assert labels[:5].tolist() == [9, 2, 1, 1, 6]
