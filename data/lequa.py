"""LeQua 2022 and 2024: bags labelled by prevalence, read from the files as published.

The archives of a task unpack to

    TASK/public/training_data.txt        label,0,...,d-1: the labelled documents
    TASK/public/label_map.txt            a class's name and its number
    TASK/public/dev_samples/0.txt ...    0,...,d-1: a document a line, a bag a file
    TASK/public/dev_prevalences.txt      id,0,...,K-1
    TASK/public/test_samples, test_prevalences.txt   likewise

and T3 has training_samples and training_prevalences.txt, bags of labelled documents,
in place of training_data.txt. Text is slow to read, so what was read once is kept as
.npy files and memory-mapped from then on.
"""

import csv
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.bags import TOLERANCE, Bags
from data.datasets import DataError, Dataset, Spec, cache_dir

RECORDS = {2022: 6546188, 2024: 11661820}
CITATIONS = {
    2022: "Esuli, Moreo, Sebastiani and Sperduti, A detailed overview of LeQua@CLEF "
    "2022: learning to quantify, CEUR Workshop Proceedings 3180, 2022",
    2024: "Esuli, Moreo, Sebastiani and Sperduti, An overview of LeQua 2024, the 2nd "
    "international data challenge on learning to quantify, LQ 2024",
}
DOCUMENT_VALIDATION = 0.2


@dataclasses.dataclass(frozen=True)
class LeQuaTask:
    """What the organisers fixed: the edition and the size m of a bag."""

    edition: int
    bag_size: int


TASKS = {
    "T1A": LeQuaTask(2022, 250),
    "T1B": LeQuaTask(2022, 1000),
    "T1": LeQuaTask(2024, 250),
    "T2": LeQuaTask(2024, 1000),
    "T3": LeQuaTask(2024, 200),
    "T4": LeQuaTask(2024, 250),
}


@dataclasses.dataclass(frozen=True)
class LeQua:
    """A task of LeQua with documents as vectors, as `Bags`.

    The development bags become the train and the validation split. The test split is
    that of the organisers, memory-mapped, where its files are there; its prevalences
    may be missing, as they were during the challenge. `documents` holds the labelled
    documents, 80 % of them in "train"; those of T3 have in "bag" the training bag that
    each is of.

    Attributes:
        task: "T1A", "T1B" (2022), "T1", "T2", "T3" or "T4" (2024).
        source_dir: the folder that the archives were unpacked in: it holds TASK/public.
        data_dir: where the .npy files are kept; the default is that of `data.load`.
        validation_bags: how many of the development bags; the others are to learn from.
        training_bags: of T3, whether its bags of labelled documents are in the train
            split, too, with their prevalences.
        standardize: inputs of mean 0 and standard deviation 1 in each feature of the
            bags to learn from; None: for the tasks of 2024, as published with HistNetQ.
        split_seed: chooses the validation bags.

    Raises:
        DataError: a file is missing or damaged, or a field is out of range.
    """

    task: str
    source_dir: str | os.PathLike | None = None
    data_dir: str | os.PathLike | None = None
    validation_bags: int = 300
    training_bags: bool = False
    standardize: bool | None = None
    split_seed: int = 0

    def __post_init__(self):
        if self.task not in TASKS:
            raise DataError(
                f"task must be one of {', '.join(TASKS)}, not {self.task!r}; T2A and "
                "T2B are documents as text, which are not read here."
            )
        if self.training_bags and self.task != "T3":
            raise DataError(
                f"training_bags must be False for {self.task}: only T3 has its "
                "labelled documents in bags."
            )
        for name, least in (("validation_bags", 1), ("split_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise DataError(
                    f"{name} must be a whole number of {least} or more, not {value!r}."
                )
        object.__setattr__(self, "_bags", _Reader(self).bags())

    @property
    def spec(self) -> Spec:
        """See `Bags`."""
        return self._bags.spec

    @property
    def splits(self) -> dict[str, dict[str, np.ndarray]]:
        """See `Bags`."""
        return self._bags.splits

    @property
    def shift(self) -> np.ndarray:
        """See `Bags`."""
        return self._bags.shift

    @property
    def scale(self) -> np.ndarray:
        """See `Bags`."""
        return self._bags.scale

    @property
    def documents(self) -> Dataset:
        """See `Bags`."""
        return self._bags.documents


def read_prevalences(path: str | os.PathLike) -> np.ndarray:
    """Prevalences of bags in a file of the organisers' form, checked as their scorer.

    The header is `id,0,...,K-1`; the ids are 0 to n - 1 in any order; prevalences lie
    in [0, 1] and sum to one up to 0.001.

    Args:
        path: of the csv file.

    Returns:
        float64 [n, K], in the order of the ids.

    Raises:
        DataError: naming the file and the line, or what else is wrong.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no csv file: {error}.") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    classes = len(header) - 1
    if classes < 2 or header != ["id", *map(str, range(classes))]:
        raise DataError(
            f"{path}: the header must be id,0,...,K-1 for K >= 2 classes, not "
            f"{','.join(header)!r}."
        )
    found: dict[int, list[float]] = {}
    for row in rows[1:]:
        line = f"{path}, the row {','.join(row)[:80]!r}"
        try:
            number, values = int(row[0]), [float(cell) for cell in row[1:]]
        except ValueError as error:
            raise DataError(f"{line} must hold an id and numbers.") from error
        if len(values) != classes:
            raise DataError(f"{line} must hold {classes} prevalences.")
        if not all(0 <= value <= 1 for value in values):
            raise DataError(f"{line}: prevalences must lie in [0, 1].")
        if abs(sum(values) - 1) > TOLERANCE:
            raise DataError(
                f"{line}: the prevalences sum to {sum(values):.6g}, which is not 1 up "
                f"to {TOLERANCE}."
            )
        if number in found:
            raise DataError(f"{line}: the id {number} is there twice.")
        found[number] = values
    if not found:
        raise DataError(f"{path} holds no prevalences.")
    if missing := sorted(set(range(len(found))) - set(found)):
        raise DataError(
            f"{path}: the ids must be 0 to {len(found) - 1} without gaps; missing: "
            f"{', '.join(map(str, missing[:5]))}."
        )
    return np.array([found[number] for number in range(len(found))])


def write_prevalences(path: str | os.PathLike, prevalences: np.ndarray) -> None:
    """Writes the file that `read_prevalences` reads: a submission to the organisers.

    Args:
        path: of the csv file.
        prevalences: [n, K], the row of bag i at i.
    """
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *range(prevalences.shape[1])])
        for number, row in enumerate(prevalences):
            writer.writerow([number, *(f"{value:.8f}" for value in row)])


class _Reader:
    """Reads the files of one `LeQua`."""

    def __init__(self, options: LeQua):
        self.options = options
        self.edition = TASKS[options.task].edition
        if options.source_dir is None:
            raise DataError(
                f"LeQua {options.task} needs source_dir, the folder with "
                f"{options.task}/public. {self._remedy('train_dev')}"
            )
        self.root = Path(options.source_dir).expanduser().absolute()
        self.public = self.root / options.task / "public"
        self.cache = cache_dir(options.data_dir) / "lequa"

    def _remedy(self, archive: str) -> str:
        task = self.options.task
        return (
            f"Download {task}.{archive}.zip from https://zenodo.org/records/"
            f"{RECORDS[self.edition]} and unpack it in source_dir, so that "
            f"SOURCE_DIR/{task}/public is there."
        )

    def _existing(self, path: Path, archive: str = "train_dev") -> Path:
        if not path.exists():
            raise DataError(f"{path} is missing. {self._remedy(archive)}")
        return path

    def bags(self) -> Bags:
        names = self._class_names()
        dev = read_prevalences(self._existing(self.public / "dev_prevalences.txt"))
        num_classes = dev.shape[1]
        if len(names) != num_classes:
            raise DataError(
                f"{self.public / 'label_map.txt'} names {len(names)} classes, "
                f"dev_prevalences.txt has {num_classes}."
            )
        held_out = self.options.validation_bags
        if not 1 <= held_out < len(dev):
            raise DataError(
                f"validation_bags must lie between 1 and {len(dev) - 1}, as there are "
                f"{len(dev)} development bags, not {held_out}."
            )
        inputs = self._samples("dev_samples", len(dev), "train_dev")
        order = np.random.default_rng(self.options.split_seed).permutation(len(dev))
        # Sorted, so that the file is read from its beginning to its end.
        parts = {"train": order[held_out:], "validation": order[:held_out]}
        splits = {
            name: {
                "inputs": inputs[np.sort(part)],
                "prevalence": dev[np.sort(part)].astype(np.float32),
            }
            for name, part in parts.items()
        }
        if self.options.training_bags:
            added = self._training_bags(inputs.shape[1:], num_classes)
            splits["train"] = {
                name: np.concatenate([values, added[name]])
                for name, values in splits["train"].items()
            }
        splits |= self._test_split(inputs.shape[1:], num_classes)
        shift, scale = self._normalization(splits["train"]["inputs"])
        record = f"https://zenodo.org/records/{RECORDS[self.edition]}"
        spec = Spec(
            name=f"LeQua {self.edition} {self.options.task}",
            feature_shape=inputs.shape[2:],
            num_classes=num_classes,
            class_names=names,
            sizes={name: len(split["inputs"]) for name, split in splits.items()},
            source=f"{self.public}; the published files are those of {record}",
            licence=f"see {record}",
            citation=CITATIONS[self.edition],
            homepage=f"https://lequa{self.edition}.github.io",
        )
        documents = self._documents(spec, shift, scale)
        return Bags(spec, splits, shift, scale, documents)

    def _class_names(self) -> tuple[str, ...]:
        path = self._existing(self.public / "label_map.txt")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} cannot be read: {reason}.") from error
        names = {}
        for line in lines:
            if line.strip():
                *name, number = line.replace(",", " ").split()
                if not number.isdecimal() or not name:
                    raise DataError(
                        f"{path}: a line must hold a class's name and its number, not "
                        f"{line!r}."
                    )
                if int(number) in names:
                    raise DataError(f"{path}: two classes have the number {number}.")
                names[int(number)] = " ".join(name)
        if sorted(names) != list(range(len(names))):
            raise DataError(
                f"{path}: the classes must be numbered from 0 without gaps."
            )
        if len(set(names.values())) < len(names):
            raise DataError(f"{path}: two classes have one name.")
        return tuple(names[number] for number in range(len(names)))

    def _samples(self, folder: str, count: int, archive: str) -> np.memmap:
        files = [self.public / folder / f"{number}.txt" for number in range(count)]
        for file in files:
            self._existing(file, archive)
        return self._parsed(folder, files)

    def _test_split(self, shape: tuple[int, ...], num_classes: int) -> dict:
        folder = self.public / "test_samples"
        if not folder.is_dir():
            return {}
        path, split = self.public / "test_prevalences.txt", {}
        # Archives made on a Mac hold files like ._0.txt, too.
        count = sum(file.stem.isdecimal() for file in folder.glob("*.txt"))
        if path.exists():
            prevalence = read_prevalences(path)
            if prevalence.shape[1] != num_classes:
                raise DataError(
                    f"{path} has {prevalence.shape[1]} classes, dev_prevalences.txt "
                    f"{num_classes}."
                )
            count = len(prevalence)
            split["prevalence"] = prevalence.astype(np.float32)
        if not count:
            raise DataError(f"{folder} holds no bag. {self._remedy('test')}")
        inputs = self._samples("test_samples", count, "test")
        if inputs.shape[2:] != shape[1:]:
            raise DataError(
                f"{folder}: documents have {inputs.shape[2]} dimensions, those of "
                f"dev_samples {shape[1]}."
            )
        return {"test": {"inputs": inputs, **split}}

    def _training_bags(self, shape: tuple[int, ...], num_classes: int) -> dict:
        path = self.public / "training_prevalences.txt"
        prevalence = read_prevalences(self._existing(path)).astype(np.float32)
        inputs = self._labelled()[1][..., 1:]
        found = (*inputs.shape[1:], prevalence.shape[1])
        if found != (*shape, num_classes):
            raise DataError(
                f"{path}: the documents, dimensions and classes of training bags are "
                f"{found}, those of the development bags {(*shape, num_classes)}."
            )
        return {"inputs": inputs, "prevalence": prevalence}

    def _labelled(self) -> tuple[Path, np.memmap]:
        """The first file, and the labelled documents [file, document, 1 + d]."""
        if self.options.task == "T3":
            path = self._existing(self.public / "training_prevalences.txt")
            count = len(read_prevalences(path))
            folder = self.public / "training_samples"
            files = [folder / f"{number}.txt" for number in range(count)]
        else:
            files = [self.public / "training_data.txt"]
        for file in files:
            self._existing(file)
        return files[0], self._parsed("training", files, labelled=True)

    def _documents(self, spec: Spec, shift: np.ndarray, scale: np.ndarray) -> Dataset:
        file, table = self._labelled()
        columns = table.shape[2]
        if columns - 1 != spec.feature_shape[0]:
            raise DataError(
                f"{file}: documents have {columns - 1} dimensions, those of "
                f"dev_samples {spec.feature_shape[0]}."
            )
        bag = np.repeat(np.arange(table.shape[0], dtype=np.int32), table.shape[1])
        table = table.reshape(-1, columns)
        labels = table[:, 0].astype(np.int32)
        if (labels != table[:, 0]).any() or not (
            0 <= labels.min() <= labels.max() < spec.num_classes
        ):
            raise DataError(
                f"{file}: labels must be whole numbers between 0 and "
                f"{spec.num_classes - 1}."
            )
        if len(labels) < 2:
            raise DataError(f"{file} must hold two documents or more.")
        order = np.random.default_rng(self.options.split_seed).permutation(len(labels))
        held_out = max(round(DOCUMENT_VALIDATION * len(labels)), 1)
        splits = {
            name: {"inputs": table[part, 1:], "labels": labels[part], "bag": bag[part]}
            for name, part in (
                ("train", np.sort(order[held_out:])),
                ("validation", np.sort(order[:held_out])),
            )
        }
        sizes = {name: len(split["labels"]) for name, split in splits.items()}
        spec = dataclasses.replace(
            spec, name=f"{spec.name}, labelled documents", sizes=sizes
        )
        return Dataset(spec, splits, shift, scale)

    def _normalization(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        standardize = self.options.standardize
        if standardize is None:
            standardize = self.edition == 2024
        if not standardize:
            return np.float32(0), np.float32(1)
        # Bag by bag: a float64 copy of all of them would be twice their size.
        mean = np.mean([bag.mean(0, dtype=np.float64) for bag in inputs], axis=0)
        variance = np.mean([((bag - mean) ** 2).mean(0) for bag in inputs], axis=0)
        deviation = np.sqrt(variance)
        scale = np.where(deviation > 0, deviation, 1)
        return mean.astype(np.float32), scale.astype(np.float32)

    def _parsed(
        self, part: str, files: Sequence[Path], *, labelled: bool = False
    ) -> np.memmap:
        """The tables of files as one array [file, line, column], read once."""
        seen = hashlib.sha256()
        for file in files:
            status = file.stat()
            seen.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        name = f"{self.options.task}-{part}-{seen.hexdigest()[:16]}"
        path = self.cache / f"{name}.npy"
        try:
            if not path.exists():
                self._parse(files, path, labelled)
            return np.load(path, mmap_mode="r")
        except OSError as error:
            raise DataError(
                f"{path} cannot be written or read: {error.strerror or error}. Another "
                "data_dir may help."
            ) from error
        except ValueError as error:
            raise DataError(
                f"{path} is damaged ({error}): delete it and load again."
            ) from error

    def _parse(self, files: Sequence[Path], path: Path, labelled: bool) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        array = None
        try:
            for index, file in enumerate(
                tqdm(files, f"reading {path.stem}", disable=None, delay=2, leave=False)
            ):
                table = _read_table(file, labelled)
                if array is None:
                    array = np.lib.format.open_memmap(
                        temporary, "w+", np.float32, (len(files), *table.shape)
                    )
                if table.shape != array.shape[1:]:
                    raise DataError(
                        f"{file} holds {table.shape[0]} documents of {table.shape[1]} "
                        f"columns, {files[0].name} {array.shape[1]} of "
                        f"{array.shape[2]}."
                    )
                array[index] = table
            array.flush()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read_table(file: Path, labelled: bool) -> np.ndarray:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            header = [cell.strip() for cell in stream.readline().split(",")]
            first = ["label"] if labelled else []
            if header != [*first, *map(str, range(len(header) - len(first)))]:
                raise DataError(
                    f"{file}: the header must be "
                    f"{','.join([*first, '0', '1', '...'])}, not "
                    f"{','.join(header)[:80]!r}."
                )
            table = np.loadtxt(
                stream, np.float32, comments=None, delimiter=",", ndmin=2
            )
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    if table.shape[1:] != (len(header),) or not len(table):
        raise DataError(
            f"{file} must hold lines of {len(header)} numbers, as its header says, but "
            f"its numbers are of the shape {list(table.shape)}."
        )
    if not np.isfinite(table).all():
        raise DataError(f"{file} holds NaN or infinite numbers.")
    return table
