import itertools
import sys

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import data
from data import point_clouds

KEY = jax.random.key(0)
ALPHA = 1e-4


def surface(name, count=4000):
    uniform = jax.random.uniform(jax.random.key(3), (count, 4))
    points = np.asarray(point_clouds.SOLIDS[name](uniform), float)
    assert points.shape == (count, 3)
    return points


def share(found, expected):
    return stats.binomtest(int(found.sum()), len(found), expected).pvalue


# Each solid: its equation, and what uniformity by area says of some coordinate.


def test_sphere():
    points = surface("sphere")
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)
    for axis in range(3):  # Archimedes: every coordinate is uniform
        assert stats.kstest(points[:, axis], stats.uniform(-1, 2).cdf).pvalue > ALPHA


def test_hemisphere():
    points = surface("hemisphere")
    radius = np.linalg.norm(points, axis=1)
    base = points[:, 2] == 0
    np.testing.assert_allclose(radius[~base], 1, atol=1e-5)
    assert (points[:, 2] >= 0).all() and share(base, 1 / 3) > ALPHA
    assert stats.kstest(points[~base, 2], "uniform").pvalue > ALPHA
    assert stats.kstest(radius[base] ** 2, "uniform").pvalue > ALPHA


def test_cylinder():
    points = surface("cylinder")
    radius = np.hypot(*points[:, :2].T)
    cap = np.abs(points[:, 2]) == 1
    np.testing.assert_allclose(radius[~cap], 1, atol=1e-5)
    assert share(cap, 1 / 3) > ALPHA and share(points[cap, 2] > 0, 0.5) > ALPHA
    assert stats.kstest(radius[cap] ** 2, "uniform").pvalue > ALPHA
    assert stats.kstest(points[~cap, 2], stats.uniform(-1, 2).cdf).pvalue > ALPHA


def test_capsule():
    points = surface("capsule")
    axis = np.clip(points[:, 2], -1, 1)
    distance = np.linalg.norm(points - axis[:, None] * [0, 0, 1], axis=1)
    np.testing.assert_allclose(distance, 1, atol=1e-5)
    assert stats.kstest(points[:, 2], stats.uniform(-2, 4).cdf).pvalue > ALPHA


def test_cone():
    points = surface("cone")
    radius = np.hypot(*points[:, :2].T)
    base = points[:, 2] == 0
    np.testing.assert_allclose(points[~base, 2], 2 * (1 - radius[~base]), atol=1e-5)
    assert share(base, 1 / (1 + np.sqrt(5))) > ALPHA
    assert stats.kstest(radius**2, "uniform").pvalue > ALPHA


def test_torus():
    points = surface("torus")
    across = np.hypot(*points[:, :2].T) - 1
    np.testing.assert_allclose(np.hypot(across, points[:, 2]), 0.4, atol=1e-5)
    theta = np.arctan2(points[:, 2], across)
    turn = np.arctan2(*points[:, :2].T)

    def cdf(theta):  # the density of the tube's angle is (1 + 0.4 cos) / 2π
        return (theta + np.pi + 0.4 * np.sin(theta)) / (2 * np.pi)

    assert stats.kstest(theta, cdf).pvalue > ALPHA
    assert stats.kstest(turn, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > ALPHA


def test_helix():
    points = surface("helix")
    np.testing.assert_allclose(np.hypot(*points[:, :2].T), 1, atol=1e-5)
    angle = 2 * np.pi * 3 * points[:, 2] / 2.5
    np.testing.assert_allclose(points[:, 0], np.cos(angle), atol=1e-4)
    assert stats.kstest(points[:, 2], stats.uniform(0, 2.5).cdf).pvalue > ALPHA


@pytest.mark.parametrize("name", ["cube", "octahedron", "tetrahedron"])
def test_polyhedra(name):
    points = surface(name)
    if name == "cube":
        faces = np.concatenate([np.eye(3), -np.eye(3)])
    else:
        faces = np.array(list(itertools.product([-1, 1], repeat=3)))
        if name == "tetrahedron":
            faces = faces[faces.prod(1) < 0]
    height = points @ faces.T
    # On the boundary of {max_f <f, x> = 1}, and as often on each of its faces.
    np.testing.assert_allclose(height.max(1), 1, atol=1e-5)
    on = np.bincount(height.argmax(1), minlength=len(faces))
    assert stats.chisquare(on).pvalue > ALPHA
    # The second moment of a triangle with corners a: (sum a aᵀ + s sᵀ) / 12, s = sum a.
    if name == "cube":
        expected = (2 * (1 / 3) + 1) / 3
    else:
        corners = {"octahedron": np.eye(3), "tetrahedron": [[1, 1, 1], [1, -1, -1]]}
        corners = np.array(corners[name])
        if name == "tetrahedron":
            corners = np.concatenate([corners, [[-1, 1, -1]]])
        total = corners.sum(0)
        moment = (corners.T @ corners + np.outer(total, total)) / 12
        expected = np.trace(moment) / 3
    np.testing.assert_allclose(
        points.T @ points / len(points) / expected, np.eye(3), atol=0.06
    )


def draw(dataset, num_sets, key=KEY, split="train"):
    sample = jax.jit(dataset.sample, static_argnums=(1, 2))
    return jax.device_get(sample(key, num_sets, split, dataset.arrays))


def test_every_cloud_is_of_the_solid_its_label_names():
    dataset = data.Solids(num_points=1500, noise=0.0, outliers=0.0)
    batch = draw(dataset, 200)

    def profile(points):
        # Turning and scaling do not change it.
        points = points - points.mean(-2, keepdims=True)
        radius = np.linalg.norm(points, axis=-1)
        radius = radius / np.sqrt((radius**2).mean(-1, keepdims=True))
        spread = np.linalg.eigvalsh(np.cov(points.T))
        return np.append(
            np.quantile(radius, np.linspace(0.02, 0.98, 25)), spread / spread.sum()
        )

    known = np.stack(
        [profile(surface(name, 20_000)) for name in dataset.spec.class_names]
    )
    found = [
        np.linalg.norm(known - profile(points), axis=1).argmin()
        for points in batch["inputs"]
    ]
    np.testing.assert_array_equal(found, batch["target"])
    assert (
        set(batch["target"]) == set(range(10)) == set(range(dataset.spec.num_classes))
    )


def test_clouds_are_centred_and_of_the_size_stated():
    batch = draw(data.Solids(num_points=50, noise=0.0, outliers=0.0), 2000)
    points = batch["inputs"]
    np.testing.assert_allclose(points.mean(1), 0, atol=1e-5)
    scale = np.sqrt((points**2).sum(-1).mean(-1))
    assert stats.kstest(scale, stats.uniform(0.8, 0.45).cdf).pvalue > ALPHA
    assert stats.chisquare(np.bincount(batch["target"])).pvalue > ALPHA
    assert batch["mask"].shape == (2000, 50) and batch["mask"].all()


def test_noise_and_outliers_are_as_many_as_asked_for():
    clean = draw(data.Solids(noise=0.0, outliers=0.0), 100)["inputs"]
    noise = (draw(data.Solids(noise=0.1, outliers=0.0), 100)["inputs"] - clean) / 0.1
    assert stats.kstest(noise.ravel(), "norm").pvalue > ALPHA
    replaced = (draw(data.Solids(noise=0.0, outliers=0.3), 100)["inputs"] != clean).any(
        -1
    )
    assert share(replaced.ravel(), 0.3) > ALPHA


def test_solids_are_turned_about_the_third_axis_alone():
    batch = draw(data.Solids(num_points=400, noise=0.0, outliers=0.0), 1000)
    cube = data.Solids().spec.class_names.index("cube")
    cubes = batch["inputs"][batch["target"] == cube]
    # The faces at both ends stay level; the corners point in all directions.
    z = cubes[..., 2]
    top, bottom = z.max(1, keepdims=True), z.min(1, keepdims=True)
    level = (np.minimum(top - z, z - bottom) < 1e-3).mean(1)
    assert ((level > 0.2) & (level < 0.5)).all()
    corner = np.linalg.norm(cubes[..., :2], axis=-1).argmax(1)
    x, y = cubes[np.arange(len(cubes)), corner, :2].T
    quarter = np.arctan2(y, x) / (np.pi / 2) % 1
    assert stats.kstest(quarter, "uniform").pvalue > ALPHA


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_points=1), "num_points must be 2 or more, not 1"),
        (dict(noise=-0.1), "noise must be 0 or more"),
        (dict(outliers=1.0), r"outliers must lie in \[0, 1\), not 1.0"),
    ],
)
def test_impossible_solids_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data.Solids(**fields)


# ModelNet40, from files of its two layouts.

STORED = 30


def clouds_of(count, seed):
    """Clouds that tell their number: the labels can be looked up from the points."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, STORED, 3)).astype(np.float32)


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


@pytest.fixture(scope="module", params=["ply", "label", "labels"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"modelnet_{request.param}")
    train, test = clouds_of(20, 0), clouds_of(7, 1)
    train_labels = (np.arange(20) % 40).astype(np.uint8)
    test_labels = (39 - np.arange(7)).astype(np.uint8)
    if request.param == "ply":
        for index, part in enumerate((np.s_[:12], np.s_[12:])):
            write(
                folder / f"ply_data_train{index}.h5",
                data=train[part],
                label=train_labels[part, None],
            )
        write(folder / "ply_data_test0.h5", data=test, label=test_labels[:, None])
    else:
        write(
            folder / "ModelNet40_cloud.h5",
            **{
                "tr_cloud": train,
                f"tr_{request.param}": train_labels,
                "test_cloud": test,
                f"test_{request.param}": test_labels,
            },
        )
    return folder


def test_modelnet_is_read_from_either_layout(folder):
    dataset = data.ModelNet40(folder, num_points=10, validation_fraction=0.25)
    assert dataset.spec.sizes == {"train": 15, "validation": 5, "test": 7}
    assert dataset.spec.num_classes == len(dataset.spec.class_names) == 40
    stored = {
        split: (np.asarray(a["points"]), np.asarray(a["labels"]))
        for split, a in dataset.arrays.items()
    }
    np.testing.assert_array_equal(stored["test"][0], clouds_of(7, 1))
    np.testing.assert_array_equal(stored["test"][1], 39 - np.arange(7))
    points, labels = (
        np.concatenate([stored[split][i] for split in ("train", "validation")])
        for i in (0, 1)
    )
    order = np.argsort(labels)
    np.testing.assert_array_equal(points[order], clouds_of(20, 0))
    np.testing.assert_array_equal(labels[order], np.arange(20))


def test_clouds_are_points_of_the_stored_ones_and_others_each_time(folder):
    dataset = data.ModelNet40(folder, num_points=STORED)
    whole = draw(dataset, 50, split="test")
    stored = np.asarray(point_clouds.standardize(jnp.asarray(clouds_of(7, 1))))
    for points, label in zip(whole["inputs"], whole["target"], strict=True):
        number = 39 - label
        np.testing.assert_allclose(
            np.sort(points, axis=0), np.sort(stored[number], axis=0), atol=1e-5
        )
    assert set(whole["target"]) == set(range(33, 40))

    few = data.ModelNet40(folder, num_points=5, augment=False)
    every = [draw(few, 20, jax.random.key(i))["inputs"] for i in range(2)]
    assert (every[0] != every[1]).any()
    for points in every[0]:
        assert len(np.unique(points, axis=0)) == 5
        np.testing.assert_allclose(points.mean(0), 0, atol=1e-5)


def test_only_training_is_augmented(folder):
    fields = dict(num_points=STORED)
    plain = data.ModelNet40(folder, augment=False, **fields)
    moved = data.ModelNet40(folder, **fields)
    np.testing.assert_array_equal(
        draw(plain, 9, split="test")["inputs"], draw(moved, 9, split="test")["inputs"]
    )
    before, after = (draw(d, 9)["inputs"] for d in (plain, moved))
    for x, y in zip(before, after, strict=True):
        transform = np.linalg.lstsq(x, y, rcond=None)[0]
        np.testing.assert_allclose(x @ transform, y, atol=1e-4)
        stretch = np.linalg.norm(transform, axis=0)
        assert (stretch >= 0.8 - 1e-4).all() and (stretch <= 1.25 + 1e-4).all()
        turn = transform / stretch
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-4)
        np.testing.assert_allclose(turn[2], [0, 0, 1], atol=1e-4)
        assert turn[0, 0] >= np.cos(0.1 * np.pi) - 1e-4
        assert (x != y).any()


def test_what_is_wrong_with_the_files_is_said(tmp_path, monkeypatch):
    def refused(message, **fields):
        with pytest.raises(data.DataError, match=message):
            data.ModelNet40(tmp_path, **fields)

    refused("There is no ModelNet40 in .*ply_data_train")
    write(tmp_path / "ply_data_train0.h5", data=clouds_of(3, 0), label=[[0], [1], [2]])
    refused(r"none for test")
    write(tmp_path / "ply_data_test0.h5", data=clouds_of(3, 0), label=[[0], [1], [40]])
    refused(r"must lie in 0..39, but span 0..40")
    write(tmp_path / "ply_data_test0.h5", data=clouds_of(3, 0))
    refused("must hold 'data' and 'label', but holds")
    write(tmp_path / "ply_data_test0.h5", data=clouds_of(3, 0), label=[[0], [1]])
    refused(r"a label each")
    (tmp_path / "ply_data_test0.h5").write_bytes(b"damaged")
    refused("ply_data_test0.h5 cannot be read")
    write(tmp_path / "ply_data_test0.h5", data=clouds_of(3, 0), label=[[0], [1], [2]])
    with pytest.raises(ValueError, match=f"num_points must be at most {STORED}"):
        data.ModelNet40(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(r"pip install 'archs\[h5\]'")
