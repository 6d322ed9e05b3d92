"""Point clouds to be classified: generated solids, and ModelNet40 from its files."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from data.datasets import DataError, Spec

# Points on the surfaces of solids, each a function of four independent uniform numbers
# a point: u [..., 4] in [0, 1) -> [..., 3]. What is uniform in u is uniform on the
# surface, by area.


def _disc(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    radius, angle = jnp.sqrt(u[..., 0]), 2 * math.pi * u[..., 1]
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def _sphere(u: jax.Array) -> jax.Array:
    z, angle = 1 - 2 * u[..., 0], 2 * math.pi * u[..., 1]
    radius = jnp.sqrt(1 - z**2)
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle), z], -1)


def _hemisphere(u: jax.Array) -> jax.Array:
    dome = jnp.abs(_sphere(u) * jnp.array([0, 0, 1.0]))
    dome = dome + _sphere(u) * jnp.array([1.0, 1, 0])
    x, y = _disc(u)
    base = jnp.stack([x, y, jnp.zeros_like(x)], -1)
    return jnp.where(u[..., 2:3] < 2 / 3, dome, base)


def _cylinder(u: jax.Array) -> jax.Array:
    angle, height = 2 * math.pi * u[..., 1], 2 * u[..., 0] - 1
    side = jnp.stack([jnp.cos(angle), jnp.sin(angle), height], -1)
    x, y = _disc(u)
    cap = jnp.stack([x, y, jnp.where(u[..., 3] < 0.5, -1.0, 1.0)], -1)
    return jnp.where(u[..., 2:3] < 2 / 3, side, cap)


def _capsule(u: jax.Array) -> jax.Array:
    angle, height = 2 * math.pi * u[..., 1], 2 * u[..., 0] - 1
    side = jnp.stack([jnp.cos(angle), jnp.sin(angle), height], -1)
    ball = _sphere(u)
    cap = ball + jnp.sign(ball[..., 2:]) * jnp.array([0, 0, 1.0])
    return jnp.where(u[..., 2:3] < 1 / 2, side, cap)


def _cone(u: jax.Array) -> jax.Array:
    x, y = _disc(u)
    radius = jnp.sqrt(u[..., 0])
    side = jnp.stack([x, y, 2 * (1 - radius)], -1)
    base = jnp.stack([x, y, jnp.zeros_like(x)], -1)
    slant = math.sqrt(5)  # of radius 1 and height 2; areas π slant and π
    return jnp.where(u[..., 2:3] < slant / (1 + slant), side, base)


def _torus(u: jax.Array, tube: float = 0.4) -> jax.Array:
    # The area at angle θ of the tube is as 1 + tube cos θ: θ is reflected to the outer
    # side with the probability that makes it so.
    theta = 2 * math.pi * u[..., 0]
    inner = u[..., 2] < (1 - tube * jnp.cos(theta)) / 2
    theta = jnp.where(inner, math.pi - theta, theta)
    angle, radius = 2 * math.pi * u[..., 1], 1 + tube * jnp.cos(theta)
    return jnp.stack(
        [radius * jnp.cos(angle), radius * jnp.sin(angle), tube * jnp.sin(theta)], -1
    )


def _helix(u: jax.Array, turns: float = 3.0) -> jax.Array:
    angle = 2 * math.pi * turns * u[..., 0]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), 2.5 * u[..., 0]], -1)


def _polyhedron(u: jax.Array, triangles: np.ndarray) -> jax.Array:
    """Faces of equal area, [face, corner, 3]."""
    face = (u[..., 2] * len(triangles)).astype(jnp.int32)
    a, b, c = jnp.moveaxis(jnp.asarray(triangles, jnp.float32)[face], -2, 0)
    root, v = jnp.sqrt(u[..., 0:1]), u[..., 1:2]
    return (1 - root) * a + root * (1 - v) * b + root * v * c


_TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
_TETRAHEDRON = _TETRAHEDRON[[[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]]
_OCTAHEDRON = np.array(
    [np.diag([x, y, z]) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
)
_SQUARE = np.array([[[0, 0], [1, 0], [0, 1]], [[1, 1], [1, 0], [0, 1]]]) * 2 - 1
_CUBE = np.concatenate(
    [np.insert(_SQUARE, axis, side, axis=-1) for axis in (0, 1, 2) for side in (-1, 1)]
)

SOLIDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sphere": _sphere,
    "hemisphere": _hemisphere,
    "cylinder": _cylinder,
    "capsule": _capsule,
    "cone": _cone,
    "torus": _torus,
    "helix": _helix,
    "tetrahedron": functools.partial(_polyhedron, triangles=_TETRAHEDRON),
    "octahedron": functools.partial(_polyhedron, triangles=_OCTAHEDRON),
    "cube": functools.partial(_polyhedron, triangles=_CUBE),
}
"""Class name -> its surface: independent uniform numbers [..., 4] -> [..., 3]."""


@dataclasses.dataclass(frozen=True)
class Solids:
    """Points on the surface of one of ten solids, to be told which.

    Points are drawn uniformly by area (a helix: by length) and brought to mean 0 and a
    root mean square distance of 1 from it. Then the cloud is turned about the third
    axis by any angle, multiplied by a number between 0.8 and 1.25, and blurred by
    Gaussian noise; some of its points are replaced by others, drawn uniformly from the
    ball of radius 2. Every split draws anew.

    Attributes:
        num_points: points of a cloud.
        noise: standard deviation of the noise, in each direction.
        outliers: share of the points that are replaced, on average.
    """

    num_points: int = 100
    noise: float = 0.05
    outliers: float = 0.05

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        if self.num_points < 2:
            raise ValueError(f"num_points must be 2 or more, not {self.num_points}")
        if self.noise < 0:
            raise ValueError(f"noise must be 0 or more, not {self.noise}")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers must lie in [0, 1), not {self.outliers}")

    @property
    def spec(self) -> Spec:
        """Ten classes of points in space."""
        return Spec(
            name="solids",
            feature_shape=(3,),
            num_classes=len(SOLIDS),
            class_names=tuple(SOLIDS),
            sizes={},
            source="generated",
            licence="",
            citation="",
            homepage="",
        )

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws clouds, every class being equally likely.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: all splits are alike.
            arrays: not used.

        Returns:
            "inputs" float32 [set, num_points, 3]; "mask" bool [set, num_points], all
            True; "target" int32 [set], the class.
        """
        del split, arrays
        keys = jax.random.split(key, 8)
        shape = (num_sets, self.num_points)
        target = jax.random.randint(keys[0], (num_sets,), 0, len(SOLIDS))
        uniform = jax.random.uniform(keys[1], (*shape, 4))
        surfaces = jnp.stack([surface(uniform) for surface in SOLIDS.values()])
        points = surfaces[target, jnp.arange(num_sets)]
        angle = jax.random.uniform(keys[2], (num_sets,), maxval=2 * math.pi)
        points = standardize(points) @ _about_third_axis(angle)
        scale = jax.random.uniform(keys[3], (num_sets, 1, 1), minval=0.8, maxval=1.25)
        points = scale * points + self.noise * jax.random.normal(keys[4], (*shape, 3))
        ball = 2 * jax.random.ball(keys[5], 3, shape=shape)
        replaced = jax.random.bernoulli(keys[6], self.outliers, (*shape, 1))
        return {
            "inputs": jnp.where(replaced, ball, points),
            "mask": jnp.ones(shape, bool),
            "target": target,
        }


def standardize(points: jax.Array) -> jax.Array:
    """Clouds [..., point, 3] of mean 0 and root mean square distance 1 from it."""
    points = points - points.mean(-2, keepdims=True)
    square = jnp.mean(jnp.sum(points**2, -1, keepdims=True), -2, keepdims=True)
    return points / jnp.sqrt(jnp.maximum(square, 1e-12))


@dataclasses.dataclass(frozen=True)
class ModelNet40:
    """Points on the surfaces of 12,311 CAD models of 40 kinds of objects.

    Reads either of the two published conversions, whatever lies in `data_dir`:

    - `modelnet40_ply_hdf5_2048`: `ply_data_train*.h5` and `ply_data_test*.h5`, each
      with `data` [n, 2048, 3] and `label` [n, 1] (Qi et al., "PointNet", CVPR 2017);
    - `ModelNet40_cloud.h5`: `tr_cloud`, `tr_labels`, `test_cloud`, `test_labels` (or
      `tr_label`, `test_label`), clouds of 10,000 points (Zaheer et al., "Deep Sets",
      NeurIPS 2017).

    Every time a cloud is drawn it is `num_points` of its stored points, others each
    time, at mean 0 and root mean square distance 1. In training it is also turned
    about the third axis by up to a tenth of half a turn and stretched along each axis
    by a factor between 0.8 and 1.25.

    Wu et al., "3D ShapeNets: a deep representation for volumetric shapes", CVPR 2015.

    Attributes:
        data_dir: the folder with the files.
        num_points: points of a cloud.
        augment: whether training turns and stretches.
        validation_fraction: share of the train clouds that are kept for validation.
        split_seed: seed of that split.
    """

    data_dir: str | os.PathLike
    num_points: int = 1000
    augment: bool = True
    validation_fraction: float = 0.1
    split_seed: int = 0

    def __post_init__(self):
        if self.num_points < 2:
            raise ValueError(f"num_points must be 2 or more, not {self.num_points}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                "validation_fraction must lie between 0 and 1, "
                f"not {self.validation_fraction}"
            )
        files = _read_modelnet(Path(self.data_dir).expanduser())
        clouds, labels = files["train"]
        stored = clouds.shape[1]
        if self.num_points > stored:
            raise ValueError(
                f"num_points must be at most {stored}, the points that the files hold "
                f"of a cloud, not {self.num_points}"
            )
        order = np.random.default_rng(self.split_seed).permutation(len(labels))
        kept = max(1, round(self.validation_fraction * len(labels)))
        parts = {
            "train": (clouds[order[kept:]], labels[order[kept:]]),
            "validation": (clouds[order[:kept]], labels[order[:kept]]),
            "test": files["test"],
        }
        arrays = {
            split: {"points": jnp.asarray(c), "labels": jnp.asarray(k)}
            for split, (c, k) in parts.items()
        }
        object.__setattr__(self, "arrays", arrays)

    @property
    def spec(self) -> Spec:
        """Forty classes of points in space."""
        return Spec(
            name="modelnet40",
            feature_shape=(3,),
            num_classes=40,
            class_names=_MODELNET_CLASSES,
            sizes={split: len(a["labels"]) for split, a in self.arrays.items()},
            source=f"h5 files in {self.data_dir}",
            licence="for research",
            citation="Wu et al., 3D ShapeNets, CVPR 2015",
            homepage="https://modelnet.cs.princeton.edu",
        )

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws clouds of a split, with replacement; evaluation uses `select`.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" float32 [set, num_points, 3]; "mask" bool [set, num_points], all
            True; "target" int32 [set], the class.
        """
        key, which_key = jax.random.split(key)
        count = len(arrays[split]["labels"])
        which = jax.random.randint(which_key, (num_sets,), 0, count)
        return self.select(key, which, split, arrays)

    def select(
        self, key: jax.Array, indices: jax.Array, split: str, arrays: dict
    ) -> dict:
        """The clouds of given indices; the key draws their points.

        Args:
            key: PRNG key.
            indices: int [set], of clouds of the split.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            As `sample`.
        """
        point_key, angle_key, stretch_key = jax.random.split(key, 3)
        clouds, labels = arrays[split]["points"], arrays[split]["labels"]
        num_sets, stored = len(indices), clouds.shape[1]
        noise = jax.random.uniform(point_key, (num_sets, stored))
        chosen = jax.lax.top_k(noise, self.num_points)[1]
        points = standardize(clouds[indices[:, None], chosen])
        if self.augment and split == "train":
            angle = jax.random.uniform(
                angle_key, (num_sets,), minval=-0.1 * math.pi, maxval=0.1 * math.pi
            )
            points = points @ _about_third_axis(angle)
            points *= jax.random.uniform(
                stretch_key, (num_sets, 1, 3), minval=0.8, maxval=1.25
            )
        return {
            "inputs": points,
            "mask": jnp.ones(points.shape[:2], bool),
            "target": labels[indices],
        }


def _about_third_axis(angle: jax.Array) -> jax.Array:
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    rows = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, zero + 1]]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def _read_modelnet(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Clouds float32 [n, point, 3] and labels int32 [n] of "train" and "test"."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            "ModelNet40 is read from h5 files, for which h5py is needed: "
            "pip install 'archs[h5]'."
        ) from error
    if (whole := folder / "ModelNet40_cloud.h5").is_file():
        paths = {"train": [whole], "test": [whole]}
        keys = {
            split: (f"{prefix}_cloud", (f"{prefix}_labels", f"{prefix}_label"))
            for split, prefix in (("train", "tr"), ("test", "test"))
        }
    else:
        paths = {
            split: sorted(folder.glob(f"ply_data_{split}*.h5"))
            for split in ("train", "test")
        }
        keys = {split: ("data", ("label",)) for split in paths}
    result = {}
    for split, files in paths.items():
        if not files:
            raise DataError(
                f"There is no ModelNet40 in {folder}: expected ModelNet40_cloud.h5, or "
                f"ply_data_train*.h5 and ply_data_test*.h5 (none for {split})."
            )
        clouds, labels = [], []
        cloud_key, label_keys = keys[split]
        for path in files:
            try:
                with h5py.File(path) as file:
                    label_key = next((k for k in label_keys if k in file), None)
                    if cloud_key not in file or label_key is None:
                        raise DataError(
                            f"{path} must hold {cloud_key!r} and {label_keys[0]!r}, "
                            f"but holds {sorted(file)}."
                        )
                    clouds.append(np.asarray(file[cloud_key], np.float32))
                    labels.append(np.asarray(file[label_key], np.int32).reshape(-1))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error}.") from error
        result[split] = np.concatenate(clouds), np.concatenate(labels)
        _check_modelnet(folder, split, *result[split])
    return result


def _check_modelnet(folder: Path, split: str, clouds: np.ndarray, labels: np.ndarray):
    if clouds.ndim != 3 or clouds.shape[2] != 3 or len(clouds) != len(labels):
        raise DataError(
            f"The {split} clouds in {folder} must be of shape [n, points, 3] with a "
            f"label each, but are of shape {clouds.shape} with {len(labels)} labels."
        )
    if labels.min() < 0 or labels.max() >= 40:
        raise DataError(
            f"The {split} labels in {folder} must lie in 0..39, but span "
            f"{labels.min()}..{labels.max()}."
        )


_MODELNET_CLASSES = (
    "airplane",
    "bathtub",
    "bed",
    "bench",
    "bookshelf",
    "bottle",
    "bowl",
    "car",
    "chair",
    "cone",
    "cup",
    "curtain",
    "desk",
    "door",
    "dresser",
    "flower_pot",
    "glass_box",
    "guitar",
    "keyboard",
    "lamp",
    "laptop",
    "mantel",
    "monitor",
    "night_stand",
    "person",
    "piano",
    "plant",
    "radio",
    "range_hood",
    "sink",
    "sofa",
    "stairs",
    "stool",
    "table",
    "tent",
    "toilet",
    "tv_stand",
    "vase",
    "wardrobe",
    "xbox",
)
