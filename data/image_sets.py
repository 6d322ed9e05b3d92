"""Sets of images: sums of handwritten digits, counts of distinct characters."""

import dataclasses
import functools
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import jax
import jax.numpy as jnp
import numpy as np

from data.augmentation import deform, turn_and_mirror
from data.datasets import DataError, Dataset, Spec, load, normalize
from data.number_sets import check_sizes, draw_mask, generated_spec

DEFORMED_AT_ONCE = 4096
_deform = jax.jit(deform)


@dataclasses.dataclass(frozen=True)
class ImageDigitSums:
    """The sum of some digits that are given as images.

        n ~ U{1..max_size},  x_i any image of the split,  target sum_i label(x_i)

    Zaheer et al., "Deep Sets", NeurIPS 2017, section 4.1.2, with the 8 million digits
    of MNIST8m: MNIST and deformed copies of its images. Here the train split of MNIST
    gets such copies (`num_deformed`). No label of a single image is used.

    Attributes:
        examples: labelled images by name, see `data.load`; their labels are what is
            added up.
        data_dir: see `data.load`.
        source_dir: see `data.load`.
        num_deformed: deformed copies that are added of each image of the train split;
            see `data.augmentation.deform`.
        max_size: most elements of a set of train and validation.
        test_max_size: of the test split.
        shared_images: images that all sets of a batch of the train split are drawn
            from, so that a network need encode no more; None: of the whole split.
    """

    examples: str = "mnist"
    data_dir: str | None = None
    source_dir: str | None = None
    num_deformed: int = 0
    max_size: int = 10
    test_max_size: int = 100
    shared_images: int | None = None

    def __post_init__(self):
        if self.shared_images is not None:
            check_sizes(shared_images=self.shared_images)
        check_sizes(max_size=self.max_size)
        check_sizes(test_max_size=self.test_max_size)
        if self.num_deformed < 0:
            raise ValueError(f"num_deformed must be 0 or more, not {self.num_deformed}")

    @functools.cached_property
    def _dataset(self) -> Dataset:
        return load(self.examples, data_dir=self.data_dir, source_dir=self.source_dir)

    @property
    def spec(self) -> Spec:
        """What the sets are."""
        spec = self._dataset.spec
        name = f"digit_sums_{self.examples}"
        return generated_spec(name, spec.feature_shape, f"sets of {spec.source}")

    @functools.cached_property
    def arrays(self) -> dict:
        """Images and labels of each split, on the device."""
        splits = dict(self._dataset.splits)
        images, labels = splits["train"]["inputs"], splits["train"]["labels"]
        # In the host's memory, and a part at a time: there may be millions.
        copies = np.empty((1 + self.num_deformed, *images.shape), images.dtype)
        copies[0] = images
        for copy in range(self.num_deformed):
            key = jax.random.fold_in(jax.random.key(0), copy)
            for start in range(0, len(images), DEFORMED_AT_ONCE):
                part = slice(start, start + DEFORMED_AT_ONCE)
                chunk = images[part].astype(np.float32)
                deformed = _deform(jax.random.fold_in(key, start), chunk)
                copies[1 + copy, part] = np.asarray(jnp.round(deformed))
        splits["train"] = {
            "inputs": copies.reshape(-1, *images.shape[1:]),
            "labels": np.tile(labels, 1 + self.num_deformed),
        }
        return jax.tree.map(jnp.asarray, splits)

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets; an image may come twice.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" float32 [set, element, *image], paper and padding 0 and ink 1, or,
            of shared images, "elements" float32 [shared_images, *image] and "indices"
            int32 [set, element]; "mask" bool [set, element]; "target" float32 [set, 1].
        """
        max_size = self.test_max_size if split == "test" else self.max_size
        size_key, example_key, shared_key = jax.random.split(key, 3)
        mask = draw_mask(size_key, num_sets, 1, max_size)
        images, labels = arrays[split]["inputs"], arrays[split]["labels"]
        shared = self.shared_images is not None and split == "train"
        if shared:
            chosen = jax.random.randint(
                shared_key, (self.shared_images,), 0, len(labels)
            )
            images, labels = images[chosen], labels[chosen]
        indices = jax.random.randint(example_key, mask.shape, 0, len(labels))
        target = jnp.where(mask, labels[indices], 0).sum(1, keepdims=True)
        if shared:
            inputs = {"elements": self._normalize(images), "indices": indices}
        else:
            inputs = {"inputs": _hide(self._normalize(images[indices]), mask)}
        return inputs | {"mask": mask, "target": target.astype(jnp.float32)}

    def _normalize(self, images: jax.Array) -> jax.Array:
        """Paper, most of an image, to 0 and ink to 1; networks learn it sooner so."""
        shift, scale = self._dataset.shift, self._dataset.scale
        return normalize(images, shift - scale, 2 * scale)


@dataclasses.dataclass(frozen=True)
class UniqueCharacters:
    """How many distinct characters there are among images of characters.

        n ~ U{min_size..max_size},  c ~ U{1..n},  target c

    c characters are chosen, each gets an image, and each of the other n - c images is
    of one of them, all alike likely. No image comes twice in a set. Train, validation
    and test have characters of their own.

    Lee et al., "Set Transformer", ICML 2019, section 5.2, with the images of Omniglot
    (Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through
    probabilistic program induction", Science 2015), which are read from a folder. They
    are scaled down from 105x105 to `image_size` squared, ink being 1 and paper 0.

    Attributes:
        source_dir: a folder with `images_background.zip`, `images_evaluation.zip`,
            `images_background_small1.zip` or others of
            https://github.com/brendenlake/omniglot, or with what is in them; all that
            are there are used.
        min_size: fewest elements of a set.
        max_size: most elements of a set, to which all are padded.
        image_size: height and width of the images.
        validation_fraction: of the characters.
        test_fraction: of the characters.
        split_seed: seed of the split.
        augment: whether the sets of the train split are varied, for few characters:
            each set is turned and mirrored as a whole, which leaves distinct what is
            distinct, and each image is deformed; see `data.augmentation`.
        shared_characters: characters that all sets of a batch of the train split are
            drawn from, with `max_size` images of each, so that a network need encode no
            more; all sets are then turned alike. None: of the whole split.
    """

    source_dir: str | None = None
    min_size: int = 6
    max_size: int = 10
    image_size: int = 28
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    augment: bool = False
    shared_characters: int | None = None

    def __post_init__(self):
        check_sizes(min_size=self.min_size, max_size=self.max_size)
        shared = self.shared_characters
        if shared is not None and shared < self.max_size:
            raise ValueError(
                f"shared_characters must be at least max_size, {self.max_size}, not "
                f"{self.shared_characters}"
            )
        check_sizes(image_size=self.image_size)
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie between 0 and 1, not {getattr(self, name)}"
                )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction must leave something to learn "
                f"from, not add up to {self.validation_fraction + self.test_fraction:g}"
            )

    @property
    def spec(self) -> Spec:
        """What the sets are; `sizes` counts the characters of each split."""
        shape = (self.image_size, self.image_size, 1)
        spec = generated_spec(
            "unique_characters", shape, f"sets of Omniglot images in {self.source_dir}"
        )
        sizes = {
            split: len(self.arrays[split]) for split in ("train", "validation", "test")
        }
        return dataclasses.replace(spec, sizes=sizes)

    @functools.cached_property
    def arrays(self) -> dict:
        """Images of each split, uint8 [character, drawing, height, width]."""
        images = read_characters(self.source_dir, self.image_size)
        num_characters, num_drawings = images.shape[:2]
        if num_drawings < self.max_size:
            raise DataError(
                f"Characters in {self.source_dir} have {num_drawings} images each, but "
                f"sets may need {self.max_size} (max_size) of one."
            )
        order = np.random.default_rng(self.split_seed).permutation(num_characters)
        ends = np.cumsum([self.test_fraction, self.validation_fraction])
        parts = np.split(order, np.round(ends * num_characters).astype(int))
        arrays = {}
        for split, chosen in zip(("test", "validation", "train"), parts, strict=True):
            if len(chosen) < self.max_size:
                raise DataError(
                    f"The {split} split has {len(chosen)} of the {num_characters} "
                    f"characters in {self.source_dir}, but sets may need "
                    f"{self.max_size} (max_size): add alphabets, or enlarge its "
                    "fraction."
                )
            arrays[split] = jnp.asarray(images[np.sort(chosen)])
        if (self.shared_characters or 0) > len(arrays["train"]):
            raise DataError(
                f"The train split has {len(arrays['train'])} characters, fewer than "
                f"shared_characters, {self.shared_characters}: lower it."
            )
        return arrays

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" float32 [set, max_size, *image], zero at padding, or, of shared
            characters, "elements" float32 [image, *image] and "indices" int32 [set,
            max_size]; "mask" bool [set, max_size]; "target" float32 [set, 1];
            "characters" int32 [set, max_size], which character of the split an element
            is.
        """
        images = arrays[split]
        number_of = jnp.arange(len(images))
        size_key, *keys, view_key, shared_key = jax.random.split(key, 8)
        shared = self.shared_characters is not None and split == "train"
        if shared:
            # Random orders by sorting: of all characters, and of each one's drawings.
            order_key, drawing_key = jax.random.split(shared_key)
            order = jax.random.uniform(order_key, images.shape[:1]).argsort()
            number_of = order[: self.shared_characters]
            drawings = jax.random.uniform(
                drawing_key, (self.shared_characters, images.shape[1])
            ).argsort()[:, : self.max_size]
            images = images[number_of[:, None], drawings]
        num_characters, num_drawings = images.shape[:2]
        mask = draw_mask(size_key, num_sets, self.min_size, self.max_size)
        size = mask.sum(1, keepdims=True)
        count = jax.random.randint(keys[0], size.shape, 1, size + 1)
        # Which of the set's characters an element is: first every one of them once.
        number = jnp.arange(self.max_size)
        repeated = jax.random.randint(keys[1], mask.shape, 0, count)
        which = jnp.where(number < count, number, repeated)
        # Shuffled, since otherwise the first elements would tell the count.
        places = jnp.where(mask, jax.random.uniform(keys[2], mask.shape), 2)
        which = jnp.take_along_axis(which, jnp.argsort(places), axis=1)
        chosen = jax.random.uniform(keys[3], (num_sets, num_characters)).argsort()
        drawings = jax.random.uniform(
            keys[4], (num_sets, self.max_size, num_drawings)
        ).argsort()
        characters = jnp.take_along_axis(chosen, which, axis=1)
        drawing = drawings[jnp.arange(num_sets)[:, None], which, number]
        # Sets [set, element, *image], or all that is shared as one of them.
        images = (
            images.reshape(1, -1, *images.shape[2:])
            if shared
            else images[characters, drawing]
        )
        images = normalize(images, 0, 255)[..., None]
        if self.augment and split == "train":
            turn_key, deform_key = jax.random.split(view_key)
            images = turn_and_mirror(turn_key, images)
            flat = deform(deform_key, images.reshape(-1, *images.shape[2:]))
            images = flat.reshape(images.shape)
        if shared:
            indices = characters * num_drawings + drawing
            inputs = {"elements": images[0], "indices": indices}
        else:
            inputs = {"inputs": _hide(images, mask)}
        return inputs | {
            "mask": mask,
            "target": count.astype(jnp.float32),
            "characters": number_of[characters],
        }


def _hide(images: jax.Array, mask: jax.Array) -> jax.Array:
    """Images [set, element, *image], zero where the mask is False."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (images.ndim - 2)), images, 0)


def read_characters(source_dir: str | os.PathLike | None, size: int) -> np.ndarray:
    """Omniglot's images, uint8 [character, drawing, size, size], ink being 255.

    Characters are in the order of their alphabets and numbers. A character that is in
    several archives (the small background sets share alphabets) is read once.

    Raises:
        DataError: which files to put where.
    """
    from PIL import Image, ImageOps

    if source_dir is None:
        raise DataError(f"source_dir is not set. {_WHERE}")
    folder = Path(source_dir)
    if not folder.is_dir():
        raise DataError(f"source_dir is {folder}, which is no folder. {_WHERE}")
    # {(alphabet, character): {file name: image}}
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for path, content in _png_files(folder):
        alphabet, character, name = path.parts[-3:]
        drawings = found.setdefault((alphabet, character), {})
        if name not in drawings:
            try:
                image = Image.open(io.BytesIO(content())).convert("L")
            except OSError as error:
                raise DataError(f"{path} in {folder} cannot be read: {error}") from None
            image = ImageOps.invert(image).resize((size, size), Image.Resampling.BOX)
            drawings[name] = np.asarray(image)
    if not found:
        raise DataError(f"There are no images of characters in {folder}. {_WHERE}")
    counts = {len(drawings) for drawings in found.values()}
    if len(counts) != 1:
        raise DataError(
            f"All characters in {folder} must have the same number of images, but they "
            f"have from {min(counts)} to {max(counts)}: an archive is incomplete."
        )
    return np.stack(
        [
            np.stack([drawings[name] for name in sorted(drawings)])
            for _, drawings in sorted(found.items())
        ]
    )


_WHERE = (
    "Put images_background.zip and images_evaluation.zip of "
    "https://github.com/brendenlake/omniglot/tree/master/python, or the smaller "
    "images_background_small1.zip and images_background_small2.zip, or the folders "
    "they unpack to, into one folder and name it as source_dir."
)


def _png_files(folder: Path) -> Iterator[tuple[PurePath, Callable[[], bytes]]]:
    """Path ALPHABET/CHARACTER/NAME.png, and what reads it, of every image."""
    for path in sorted(folder.glob("images_*")):
        if path.is_dir():
            for file in sorted(path.rglob("*/*/*.png")):
                yield file.relative_to(folder), file.read_bytes
        elif path.suffix == ".zip":
            try:
                with zipfile.ZipFile(path) as archive:
                    for name in sorted(archive.namelist()):
                        inner = PurePath(name)
                        if inner.suffix == ".png" and len(inner.parts) >= 3:
                            yield inner, functools.partial(archive.read, name)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
