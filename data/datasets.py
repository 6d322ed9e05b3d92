"""`load`: a dataset by name, as arrays in memory with a spec."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


class DataError(Exception):
    """What the user can put right: a name, a missing or damaged file, the network."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a dataset is and where it came from.

    Attributes:
        name: the name it was loaded by.
        feature_shape: shape of one example's inputs.
        num_classes: K.
        class_names: K names.
        sizes: examples in each split.
        source: where the examples came from when they were prepared.
        licence: of the data.
        citation: BibTeX.
        homepage: URL.
        vocabulary_size: of integer inputs, how many ids there are; of translations,
            of the targets. None where inputs are no ids.
        source_vocabulary_size: of translations, how many ids the inputs have.
    """

    name: str
    feature_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    source: str
    licence: str
    citation: str
    homepage: str
    vocabulary_size: int | None = None
    source_vocabulary_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Arrays and their spec.

    Attributes:
        spec: the `Spec`.
        splits: "train", "validation" and "test", each with "inputs" [n, *feature_shape]
            (images uint8, vectors float32) and "labels" int32 [n].
        shift: float32, broadcasts to `feature_shape`; see `normalize`.
        scale: float32, broadcasts to `feature_shape`.
    """

    spec: Spec
    splits: dict[str, dict[str, np.ndarray]]
    shift: np.ndarray
    scale: np.ndarray


def normalize(
    inputs: jax.Array | np.ndarray,
    shift: jax.Array | np.ndarray,
    scale: jax.Array | np.ndarray,
) -> jax.Array:
    """`(inputs - shift) / scale` as float32, on the device.

    With a dataset's `shift` and `scale`, images come out in [-1, 1], and vectors with
    mean 0 and standard deviation 1 over the train split.

    Args:
        inputs: [n, *feature_shape], any numeric dtype.
        shift: broadcasts to `inputs`.
        scale: broadcasts to `inputs`.

    Returns:
        float32, the shape of `inputs`.
    """
    return (jnp.asarray(inputs, jnp.float32) - shift) / scale


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    source_dir: str | os.PathLike | None = None,
    download: bool = False,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.25,
    split_seed: int = 0,
) -> Dataset:
    """Loads a dataset, preparing it first where that has not been done yet.

    Preparing writes array_record files once; later calls read them. It is safe in
    several processes at once, and a process killed half way leaves nothing that is
    ever taken for a prepared dataset. Nothing is downloaded unless `download` is true.

    Official splits are kept. A missing test split is taken from the train split first
    (`test_fraction`), then a missing validation split from the rest
    (`validation_fraction`); both stratified by class and shuffled by `split_seed`.

    Args:
        name: "digits", "breast_cancer", "wine" (carried by scikit-learn), "mnist",
            "fashion_mnist", or "tfds:NAME" for any classification dataset of
            tensorflow-datasets with inputs of one fixed shape.
        data_dir: where prepared datasets are kept. Default: `TFDS_DATA_DIR` if set,
            else `archs` in the user's cache folder (`XDG_CACHE_HOME` or `~/.cache`).
        source_dir: a folder with the original files, for preparing "mnist" and
            "fashion_mnist" (four idx files, gzipped or not, checked against the
            published checksums) or a "tfds:" dataset with manual download.
        download: whether missing files may be downloaded.
        validation_fraction: in (0, 1).
        test_fraction: in (0, 1).
        split_seed: seed of the splits made here.

    Returns:
        A `Dataset`.

    Raises:
        DataError: what is wrong and what to do about it.
    """
    for key, fraction in (
        ("validation_fraction", validation_fraction),
        ("test_fraction", test_fraction),
    ):
        if not 0 < fraction < 1:
            raise DataError(f"{key} must lie between 0 and 1, got {fraction}.")

    from data import builders  # tensorflow-datasets is slow to import

    builder = builders.prepared(name, cache_dir(data_dir), source_dir, download)
    info = builder.info
    input_key, label_key = _supervised_keys(name, info)
    splits = {
        split: _read(builder, split, input_key, label_key)
        for split in info.splits
        if split in ("train", "validation", "test") or len(info.splits) == 1
    }
    if "train" not in splits:
        if len(splits) != 1:
            raise DataError(
                f"{name} has no train split, it has {', '.join(info.splits)}."
            )
        splits = {"train": splits.popitem()[1]}
    for split, fraction in (
        ("test", test_fraction),
        ("validation", validation_fraction),
    ):
        if split not in splits:
            splits["train"], splits[split] = _stratified_split(
                name, splits["train"], fraction, split_seed
            )
    splits = {split: splits[split] for split in ("train", "validation", "test")}

    train_inputs = splits["train"]["inputs"]
    metadata = dict(info.metadata or {})
    if train_inputs.dtype == np.uint8:
        shift = scale = np.float32(metadata.get("peak", 255) / 2)
    else:
        shift = train_inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = train_inputs.std(axis=0, dtype=np.float64).astype(np.float32)
        scale = np.where(deviation > 0, deviation, np.float32(1))
    class_label = info.features[label_key]
    spec = Spec(
        name=name,
        feature_shape=train_inputs.shape[1:],
        num_classes=class_label.num_classes,
        class_names=tuple(class_label.names),
        sizes={split: len(arrays["labels"]) for split, arrays in splits.items()},
        source=metadata.get("source", f"{name} prepared at {builder.data_path}"),
        licence=info.redistribution_info.license or "not stated",
        citation=info.citation,
        homepage=info.homepage,
    )
    return Dataset(spec, splits, np.asarray(shift), np.asarray(scale))


def cache_dir(data_dir: str | os.PathLike | None) -> Path:
    """Where prepared data is kept: `data_dir` or, if None, as `load` says."""
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR")
    if not data_dir:
        data_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "archs"
    return Path(data_dir).expanduser().absolute()


def _supervised_keys(name, info) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features = dict(info.features)
    keys = info.supervised_keys or ("image", "label")
    if (
        not set(keys) <= set(features)
        or len(keys) != 2
        or not isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        raise DataError(
            f"{name} is not a classification dataset: expected a class label as the "
            f"second of its supervised_keys={info.supervised_keys} (or a feature "
            f"'label' beside 'image'), found the features {features}."
        )
    return keys


def _read(builder, split, input_key, label_key) -> dict[str, np.ndarray]:
    """All examples of a split, in the order they were stored."""
    from data import builders

    examples = builders.read_split(builder, split)
    inputs = [np.asarray(example[input_key]) for example in examples]
    kinds = {(x.shape, x.dtype.name) for x in inputs}
    if len(kinds) != 1 or inputs[0].dtype.kind not in "buif":
        raise DataError(
            f"The inputs of the {split} split in {builder.data_path} must be numbers "
            f"of one shape, found {sorted(kinds)[:5]}."
        )
    inputs = np.stack(inputs)
    if inputs.dtype != np.uint8 or inputs.ndim != 4:
        inputs = inputs.astype(np.float32)
    return {
        "inputs": inputs,
        "labels": np.array([example[label_key] for example in examples], np.int32),
    }


def _stratified_split(name, arrays, fraction, seed):
    from sklearn.model_selection import train_test_split

    labels = arrays["labels"]
    try:
        parts = train_test_split(
            np.arange(len(labels)),
            test_size=fraction,
            stratify=labels,
            random_state=seed,
        )
    except ValueError as e:
        raise DataError(f"{name} cannot be split: {e}") from e
    return [{key: array[part] for key, array in arrays.items()} for part in parts]
