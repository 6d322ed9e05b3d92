"""The project's own tensorflow-datasets builders; no TensorFlow is needed.

A dataset of the project is a config of one builder, `Archs`, so that its folder
(`DATA_DIR/archs/NAME/VERSION`) never meets a stock builder's of the same name.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import io
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from data import originals
from data.datasets import DataError

DEBIAN = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
# Of what an example of published files has, by type.
_FEATURES = {
    str: tfds.features.Text,
    int: lambda: tfds.features.Scalar(np.int32),
    np.ndarray: lambda: tfds.features.Tensor(
        shape=(None, None), dtype=np.uint8, encoding="zlib"
    ),
}
_SPLIT_PREFIXES = {"train": "train", "test": "t10k"}


@dataclasses.dataclass(eq=False, kw_only=True)
class ArchsConfig(tfds.core.BuilderConfig):
    """One dataset.

    Attributes:
        feature_shape: shape of one example's inputs.
        class_names: names of the classes, by label.
        licence: of the data.
        citation: BibTeX.
        homepage: URL.
        peak: for images, the largest value a pixel may have; None for vectors.
        url: for datasets of idx files, the folder they are published in.
        md5: for datasets of idx files, name -> checksum of the *uncompressed* content,
            which holds for any mirror, gzipped anew or not.
    """

    feature_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    licence: str
    citation: str
    homepage: str
    peak: int | None = None
    url: str = ""
    md5: dict[str, str] = dataclasses.field(default_factory=dict)


class Archs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of the project's datasets; one config each."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The idx files that the config's md5 names."
    BUILDER_CONFIGS = [
        ArchsConfig(
            name="digits",
            feature_shape=(8, 8, 1),
            class_names=tuple("0123456789"),
            peak=16,
            licence="CC BY 4.0",
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation="""@misc{alpaydin1998optical,
  title={Optical Recognition of Handwritten Digits},
  author={Alpaydin, E. and Kaynak, C.},
  year={1998},
  howpublished={UCI Machine Learning Repository},
  doi={10.24432/C50P49}
}""",
        ),
        ArchsConfig(
            name="breast_cancer",
            feature_shape=(30,),
            class_names=("malignant", "benign"),
            licence="CC BY 4.0",
            homepage="https://archive.ics.uci.edu/dataset/17",
            citation="""@misc{wolberg1993breast,
  title={Breast Cancer Wisconsin (Diagnostic)},
  author={Wolberg, William and Mangasarian, Olvi and Street, Nick and Street, W.},
  year={1993},
  howpublished={UCI Machine Learning Repository},
  doi={10.24432/C5DW2B}
}""",
        ),
        ArchsConfig(
            name="wine",
            feature_shape=(13,),
            class_names=("class_0", "class_1", "class_2"),
            licence="CC BY 4.0",
            homepage="https://archive.ics.uci.edu/dataset/109",
            citation="""@misc{aeberhard1991wine,
  title={Wine},
  author={Aeberhard, Stefan and Forina, M.},
  year={1991},
  howpublished={UCI Machine Learning Repository},
  doi={10.24432/C5PC7J}
}""",
        ),
        ArchsConfig(
            name="mnist",
            feature_shape=(28, 28, 1),
            class_names=tuple("0123456789"),
            peak=255,
            licence="CC BY-SA 3.0",
            homepage="http://yann.lecun.com/exdb/mnist/",
            citation="""@article{lecun1998gradient,
  title={Gradient-based learning applied to document recognition},
  author={LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal={Proceedings of the IEEE},
  volume={86},
  number={11},
  pages={2278--2324},
  year={1998}
}""",
            url="https://ossci-datasets.s3.amazonaws.com/mnist/",
            md5={
                "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
                "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
                "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
                "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
            },
        ),
        ArchsConfig(
            name="fashion_mnist",
            feature_shape=(28, 28, 1),
            class_names=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            peak=255,
            licence="MIT",
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation="""@article{xiao2017fashion,
  title={Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
         Algorithms},
  author={Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal={arXiv preprint arXiv:1708.07747},
  year={2017}
}""",
            url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            md5={
                "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
                "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
                "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
            },
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        inputs = tfds.features.Tensor(
            shape=config.feature_shape,
            dtype=np.float32 if config.peak is None else np.uint8,
            encoding="bytes",
        )
        label = tfds.features.ClassLabel(names=list(config.class_names))
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"inputs": inputs, "label": label}),
            supervised_keys=("inputs", "label"),
            disable_shuffling=True,  # the published order
            metadata=tfds.core.MetadataDict(),
            license=config.licence,
            citation=config.citation,
            homepage=config.homepage,
        )

    def _split_generators(self, dl_manager):
        config = self.builder_config
        if config.md5:
            folder = Path(dl_manager.manual_dir)
            arrays = {
                split: (
                    _read_idx(folder, f"{prefix}-images-idx3-ubyte", config),
                    _read_idx(folder, f"{prefix}-labels-idx1-ubyte", config),
                )
                for split, prefix in _SPLIT_PREFIXES.items()
            }
        else:
            from sklearn import datasets

            load = getattr(datasets, f"load_{config.name}")
            arrays = {"train": load(return_X_y=True)}
        return {
            split: self._generate_examples(
                inputs.reshape(-1, *config.feature_shape).astype(
                    self.info.features["inputs"].np_dtype
                ),
                labels,
            )
            for split, (inputs, labels) in arrays.items()
        }

    def _generate_examples(self, inputs, labels):
        for i, (example, label) in enumerate(zip(inputs, labels, strict=True)):
            yield i, {"inputs": example, "label": int(label)}


def published(
    name: str,
    data_dir: Path,
    example: Mapping[str, type],
    make: Callable[[], tuple[Mapping[str, Sequence[dict]], str]],
) -> tuple[dict[str, list[dict]], str]:
    """Examples of published files, prepared in `data_dir` at the first call.

    Args:
        name: of the folder; other contents must have another name.
        data_dir: where prepared datasets are kept.
        example: what an example has, see `originals.examples`.
        make: gives {split: examples}, and where they are from.

    Returns:
        {split: examples} in their order, and where they are from.

    Raises:
        DataError: `data_dir` cannot be written, or what is there is damaged.
    """

    builder = _published(name, data_dir, example)
    if not builder.data_path.exists():
        with _writing(name, data_dir), _lock(data_dir / "locks" / name):
            # Another process may have done it while this one waited.
            if not builder.data_path.exists():
                splits, source = make()
                _write(_published(name, data_dir, example, splits), source)
        builder = _published(name, data_dir, example)
    splits = {split: read_split(builder, split) for split in builder.info.splits}
    for row in (row for rows in splits.values() for row in rows):
        row.update(
            {key: row[key].decode() for key, kind in example.items() if kind is str}
        )
    return splits, builder.info.metadata["source"]


def _published(
    name: str,
    data_dir: Path,
    example: Mapping[str, type],
    splits: Mapping[str, Sequence[dict]] | None = None,
) -> tfds.core.DatasetBuilder:
    """The builder of a dataset of published files, which writes `splits`."""

    class Published(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {key: _FEATURES[kind]() for key, kind in example.items()}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # the published order
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError("the splits hold their examples")

    Published.name = name
    return Published(data_dir=data_dir, file_format="array_record")


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> list[dict]:
    """All examples of a split, in the order they were stored.

    Raises:
        DataError: they cannot be read.
    """
    try:
        source = builder.as_data_source(split=split)
        return list(source.__getitems__(range(len(source))))
    except (OSError, RuntimeError, ValueError, IndexError, NotImplementedError) as e:
        raise DataError(
            f"The prepared dataset in {builder.data_path} cannot be read ({e}). It is "
            "damaged, or not in array_record format: delete the folder and load again."
        ) from e


@contextlib.contextmanager
def _writing(name: str, data_dir: Path):
    try:
        yield
    except OSError as e:
        raise DataError(
            f"{name} cannot be prepared in {data_dir}: {e}. Another folder may be "
            "given as data_dir."
        ) from e


def _write(builder, source: str, manual_dir: Path | None = None, **metadata) -> None:
    """Prepares a dataset; call it under the lock."""
    # Whatever is incomplete belongs to a process that was killed.
    for leftover in builder.data_path.parent.glob("incomplete.*"):
        shutil.rmtree(leftover)
    builder.info.metadata.update(metadata, source=source)
    tfds.disable_progress_bar()
    # tfds announces a download here, which this never is.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )


def prepared(
    name: str,
    data_dir: Path,
    source_dir: str | os.PathLike | None,
    download: bool,
) -> tfds.core.DatasetBuilder:
    """Builder of a dataset, prepared in `data_dir`; see `data.load`.

    Raises:
        DataError: the dataset is unknown, or it is not prepared and cannot be.
    """
    if source_dir is not None:
        source_dir = Path(source_dir).expanduser().absolute()
    if name.startswith("tfds:"):
        find, prepare = _find_tfds, _prepare_tfds
    elif name in Archs.builder_configs:
        find, prepare = _find_own, _prepare_own
        if source_dir and not Archs.builder_configs[name].md5:
            raise DataError(f"source_dir must not be given for {name}: it needs none.")
    else:
        raise DataError(_unknown(name))

    builder = find(name, data_dir)
    if builder is None:
        lock = data_dir / "locks" / name.replace("/", "_")
        with _writing(name, data_dir), _lock(lock):
            # Another process may have done it while this one waited.
            builder = find(name, data_dir)
            if builder is None:
                builder = prepare(name, data_dir, source_dir, download)
    return builder


def _unknown(name: str) -> str:
    known = list(Archs.builder_configs)
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"Unknown dataset {name!r}{f', did you mean {near[0]!r}?' if near else '.'} "
        f"Expected one of {', '.join(known)} or tfds:NAME."
    )


@contextlib.contextmanager
def _lock(path: Path):
    """Holds a file lock, which the system releases even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_own(name, data_dir):
    builder = Archs(config=name, data_dir=data_dir, file_format="array_record")
    return builder if builder.data_path.exists() else None


def _prepare_own(name, data_dir, source_dir, download):
    builder = Archs(config=name, data_dir=data_dir, file_format="array_record")
    config = builder.builder_config
    if config.md5:
        folder, source = _idx_folder(config, data_dir, source_dir, download)
    else:
        import sklearn

        folder, source = None, f"embedded in scikit-learn {sklearn.__version__}"
    peak = {} if config.peak is None else {"peak": config.peak}
    _write(builder, source, folder, **peak)
    return builder


def _idx_folder(config, data_dir, source_dir, download) -> tuple[Path, str]:
    """The folder that holds all the idx files, and in words where they are from."""
    downloads = data_dir / "downloads" / "archs" / config.name
    debian = DEBIAN.get(config.name)
    candidates = {downloads: f"folder {downloads}"}
    if debian:
        candidates[debian] = f"Debian package dataset-{debian.name}"
    if source_dir:
        candidates = {source_dir: f"folder {source_dir}"}
    for folder, source in candidates.items():
        if all(_idx_path(folder, file).exists() for file in config.md5):
            return folder, source

    target = source_dir or downloads
    missing = [file for file in config.md5 if not _idx_path(target, file).exists()]
    remedy = (
        f"put {', '.join(f'{file}.gz' for file in missing)} (gzipped or not) into "
        f"{target}" + ("" if source_dir else ", or name their folder as source_dir")
    )
    if debian and not source_dir:
        remedy += f", or install Debian's dataset-{debian.name}"
    if source_dir or not download:
        allow = (
            ""
            if source_dir
            else (
                "allow the download with download=True "
                "(--config.dataset.download=True), or "
            )
        )
        raise DataError(
            f"{config.name} is not prepared in {data_dir} yet and its files are "
            f"missing: {allow}{remedy}."
        )
    for file in missing:
        check = functools.partial(_checked, config=config, file=file)
        url, path = f"{config.url}{file}.gz", downloads / f"{file}.gz"
        originals.fetch(url, path, check, remedy)
    return downloads, f"downloaded from {config.url}"


def _idx_path(folder: Path, file: str) -> Path:
    plain = folder / file
    return plain if plain.exists() else folder / f"{file}.gz"


def _read_idx(folder: Path, file: str, config: ArchsConfig) -> np.ndarray:
    """Values of an idx file, flat: its shape is known once its checksum is right."""
    content = _checked(_idx_path(folder, file), config, file)
    header_size = 4 + 4 * content[3]  # magic number, whose last byte is the rank
    return np.frombuffer(content, np.uint8, offset=header_size)


def _checked(path: Path, config: ArchsConfig, file: str) -> bytes:
    name = "an idx file, gzipped or not,"
    return originals.checked(path, name, "md5", config.md5[file])


def connect(url: str):
    """A streaming response, or an error within 8 seconds.

    The time-outs of requests are per address and leave out the name look-up, hence the
    thread.
    """
    import requests

    answers = queue.SimpleQueue()

    def request():
        try:
            response = requests.get(url, stream=True, timeout=(3, 5))
            response.raise_for_status()
            answers.put(response)
        except requests.RequestException as e:
            answers.put(e)

    threading.Thread(target=request, daemon=True).start()
    try:
        answer = answers.get(timeout=8)
    except queue.Empty:
        answer = requests.ConnectTimeout("no answer within 8 seconds")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _find_tfds(name, data_dir):
    try:
        return tfds.core.read_only_builder.builder_from_files(
            name.removeprefix("tfds:"), data_dir=data_dir
        )
    except tfds.core.DatasetNotFoundError:
        return None
    except ValueError as e:
        raise DataError(f"{name!r} is not tfds:NAME[/CONFIG][:VERSION]: {e}") from e


def _prepare_tfds(name, data_dir, source_dir, download):
    import requests
    import tensorflow_datasets.structured  # noqa: F401  else some are 'not found'
    from tensorflow_datasets.core.download import downloader

    remedy = (
        f"prepare it elsewhere (TFDS's own builders need TensorFlow for that) with "
        f"tfds.builder({name.removeprefix('tfds:')!r}, file_format='array_record')"
        f".download_and_prepare() and copy its folder into {data_dir}"
    )
    if not download:
        raise DataError(
            f"{name} is not prepared in {data_dir}: allow downloading and preparing it "
            f"with download=True (--config.dataset.download=True), or {remedy}."
        )
    retries = downloader.MAX_RETRIES
    try:
        builder = tfds.builder(
            name.removeprefix("tfds:"), data_dir=data_dir, file_format="array_record"
        )
        for url in list(builder.url_infos or {})[:1]:
            connect(url).close()
        downloader.MAX_RETRIES = 0  # ten of them take minutes without a network
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=source_dir)
        )
    except tfds.core.DatasetNotFoundError as e:
        raise DataError(f"tensorflow-datasets has no builder for {name}.") from e
    except requests.RequestException as e:
        raise DataError(f"Could not download {name} ({e}). Instead, {remedy}.") from e
    except Exception as e:  # stock builders fail in as many ways as there are of them
        raise DataError(
            f"{name} could not be prepared ({type(e).__name__}: {e}). Instead, "
            f"{remedy}."
        ) from e
    finally:
        downloader.MAX_RETRIES = retries
    return builder
