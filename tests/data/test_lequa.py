"""The files of LeQua: read as published, written by the synthetic generator."""

import dataclasses
import shutil

import numpy as np
import pytest
from quapy.data._lequa import load_category_map, load_vector_documents_2022

import data
from data import lequa, synthetic_lequa

SMALL = {"dev_bags": 12, "test_bags": 7, "bag_size": 9, "dimensions": 4}
SMALL |= {"documents": 50, "num_classes": 3}


@pytest.fixture(scope="module", params=["T1B", "T3", "T4"])
def written(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("lequa")
    synthetic_lequa.write(request.param, root, **SMALL)
    return request.param, root


@pytest.fixture
def copied(tmp_path, tmp_path_factory):
    """A copy of T1B's files that a test may spoil."""
    synthetic_lequa.write("T1B", tmp_path, **SMALL)
    return tmp_path / "T1B" / "public"


def load(task, root, **fields):
    fields = {"data_dir": root / "cache", "validation_bags": 5} | fields
    return data.LeQua(task, root, **fields)


def test_bags_are_those_of_the_files(written):
    task, root = written
    public = root / task / "public"
    dataset = load(task, root)
    assert dataset.spec.sizes == {"train": 7, "validation": 5, "test": 7}
    assert dataset.spec.feature_shape == (4,) and dataset.spec.num_classes == 3
    names = load_category_map(public / "label_map.txt")[1]
    assert dataset.spec.class_names == tuple(names)
    # pandas reads the files for QuaPy.
    for part, splits in (("dev", ["train", "validation"]), ("test", ["test"])):
        prevalence = np.loadtxt(
            public / f"{part}_prevalences.txt", delimiter=",", skiprows=1
        )[:, 1:]
        found = [
            (bag, row)
            for split in splits
            for bag, row in zip(*map(dataset.splits[split].get, KEYS), strict=True)
        ]
        assert len(found) == len(prevalence)
        for number, row in enumerate(prevalence):
            path = public / f"{part}_samples" / f"{number}.txt"
            bag = load_vector_documents_2022(path)[0]
            (label,) = [
                label for inputs, label in found if np.allclose(inputs, bag, rtol=1e-6)
            ]
            np.testing.assert_allclose(label, row, rtol=1e-6)


KEYS = ("inputs", "prevalence")


def test_labelled_documents_are_those_of_the_files(written):
    task, root = written
    public, documents = root / task / "public", load(task, root).documents
    if task == "T3":
        files = [public / "training_samples" / f"{i}.txt" for i in range(100)]
    else:
        files = [public / "training_data.txt"]
    tables = [np.loadtxt(file, delimiter=",", skiprows=1) for file in files]
    expected = np.concatenate(
        [np.column_stack([t, np.full(len(t), i)]) for i, t in enumerate(tables)]
    )
    found = np.concatenate(
        [
            np.column_stack([split["labels"], split["inputs"], split["bag"]])
            for split in documents.splits.values()
        ]
    )
    order = [np.lexsort(table.T) for table in (expected, found)]
    np.testing.assert_allclose(found[order[1]], expected[order[0]], rtol=1e-6)
    assert documents.spec.sizes["validation"] == round(0.2 * len(expected))


def test_the_training_bags_of_t3_are_learned_from(tmp_path):
    synthetic_lequa.write("T3", tmp_path, **SMALL)
    public, plain = tmp_path / "T3" / "public", load("T3", tmp_path)
    dataset = load("T3", tmp_path, training_bags=True)
    assert dataset.spec.sizes == {"train": 107, "validation": 5, "test": 7}
    train = dataset.splits["train"]
    for key, values in plain.splits["train"].items():
        np.testing.assert_array_equal(train[key][:7], values)
    expected = lequa.read_prevalences(public / "training_prevalences.txt")
    np.testing.assert_allclose(train["prevalence"][7:], expected, rtol=1e-6)
    for number in (0, 99):
        path = public / "training_samples" / f"{number}.txt"
        table = np.loadtxt(path, delimiter=",", skiprows=1)
        np.testing.assert_allclose(train["inputs"][7 + number], table[:, 1:], rtol=1e-6)


def test_the_label_of_a_synthetic_bag_is_that_of_its_documents(tmp_path):
    # So far apart that the nearest class is the class.
    options = SMALL | {"separation": 60.0, "dimensions": 20}
    synthetic_lequa.write("T3", tmp_path, **options)
    dataset = load("T3", tmp_path, standardize=False)
    documents = dataset.documents.splits["train"]
    means = np.stack(
        [documents["inputs"][documents["labels"] == k].mean(0) for k in range(3)]
    )
    # In T3 the classes lie on a line, in their order.
    steps = np.diff(means, axis=0)
    cosine = steps[0] @ steps[1] / np.prod(np.linalg.norm(steps, axis=1))
    assert cosine > 0.99
    for split in dataset.splits.values():
        distance = ((split["inputs"][:, :, None] - means) ** 2).sum(-1)
        counted = np.stack([(distance.argmin(-1) == k).mean(1) for k in range(3)], 1)
        np.testing.assert_allclose(split["prevalence"], counted, atol=1e-6)


def test_inputs_are_standardised_in_2024_alone(tmp_path):
    for task in ("T1A", "T1"):
        synthetic_lequa.write(task, tmp_path, **SMALL | {"num_classes": 2})
    assert load("T1A", tmp_path).shift == 0
    for dataset in (load("T1", tmp_path), load("T1A", tmp_path, standardize=True)):
        inputs = dataset.splits["train"]["inputs"].reshape(-1, 4)
        values = data.normalize(inputs, dataset.shift, dataset.scale)
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-5)


def test_the_seed_chooses_the_validation_bags(written):
    task, root = written

    def bags(seed, split):
        return load(task, root, split_seed=seed).splits[split]["inputs"]

    np.testing.assert_array_equal(bags(0, "train"), bags(0, "train"))
    assert (bags(0, "validation") != bags(1, "validation")).any()
    both = np.concatenate([bags(1, "train"), bags(1, "validation")])
    assert len(np.unique(both.reshape(12, -1), axis=0)) == 12
    np.testing.assert_array_equal(bags(0, "test"), bags(1, "test"))


def test_text_is_read_once_and_again_when_it_changed(copied, monkeypatch):
    root = copied.parents[1]
    first = load("T1B", root)
    assert isinstance(first.splits["test"]["inputs"], np.memmap)
    with monkeypatch.context() as context:
        context.setattr(lequa, "_read_table", None)
        again = load("T1B", root)
    np.testing.assert_array_equal(
        first.splits["train"]["inputs"], again.splits["train"]["inputs"]
    )
    path = copied / "test_samples" / "0.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "9,9,9,9", *lines[2:]]) + "\n")
    changed = load("T1B", root).splits["test"]["inputs"]
    np.testing.assert_array_equal(changed[0, 0], 9)
    assert not list((root / "cache").rglob("*.tmp"))


def test_the_test_bags_may_be_missing_or_without_labels(copied):
    root = copied.parents[1]
    (copied / "test_prevalences.txt").unlink()
    (copied / "test_samples/._0.txt").touch()  # of an archive made on a Mac
    test = load("T1B", root).splits["test"]
    assert set(test) == {"inputs"} and len(test["inputs"]) == SMALL["test_bags"]
    shutil.rmtree(copied / "test_samples")
    assert set(load("T1B", root).splits) == {"train", "validation"}


@pytest.mark.parametrize(
    "name",
    [
        "training_data.txt",
        "label_map.txt",
        "dev_prevalences.txt",
        "dev_samples/3.txt",
        "test_samples/3.txt",
    ],
)
def test_a_missing_file_says_where_it_comes_from(copied, name):
    (copied / name).unlink()
    part = "test" if name.startswith("test") else "train_dev"
    message = rf"{name} is missing. Download T1B.{part}.zip from https.*/6546188 and"
    with pytest.raises(data.DataError, match=message):
        load("T1B", copied.parents[1])


def test_t3_names_its_training_bags_and_the_record_of_2024(tmp_path):
    synthetic_lequa.write("T3", tmp_path, **SMALL)
    (tmp_path / "T3/public/training_samples/7.txt").unlink()
    with pytest.raises(data.DataError, match="samples/7.txt is missing.*/11661820"):
        load("T3", tmp_path)


def test_no_source_dir_says_what_to_do():
    with pytest.raises(data.DataError, match="source_dir.*zenodo.org/records/11661820"):
        data.LeQua("T2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "T2A"}, "T2A and T2B are documents as text"),
        ({"validation_bags": "2"}, "validation_bags must be a whole number of 1 or"),
        ({"split_seed": -1}, "split_seed must be a whole number of 0 or more, not -1"),
        ({"validation_bags": 12}, "between 1 and 11, as there are 12"),
        ({"training_bags": True}, "only T3 has its labelled documents in bags"),
    ],
)
def test_impossible_fields_are_sentences(copied, fields, message):
    fields = {"task": "T1B", "root": copied.parents[1]} | fields
    with pytest.raises(data.DataError, match=message):
        load(**fields)


def damage(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dev_samples/2.txt", damage("0,1", "a,1"), r"2.txt: the header must be 0,1"),
        ("dev_samples/2.txt", damage("\n", "\nx,1,2,3\n"), "2.txt cannot be read"),
        ("dev_samples/2.txt", damage("\n", "\nnan,1,2,3\n"), "2.txt holds NaN"),
        ("dev_samples/2.txt", damage("\n", "\n1,1,2,3\n"), "2.txt holds 10 documents"),
        ("dev_samples/2.txt", lambda text: "", "2.txt: the header must be 0,1"),
        ("training_data.txt", damage("label", "class"), "header must be label,0,1"),
        ("training_data.txt", damage("\n", "\n7,1,1,1,1\n"), "between 0 and 2"),
        ("dev_samples/2.txt", damage("\n", "\n1,1,2,3 # 4\n"), "2.txt cannot be read"),
        ("label_map.txt", damage("class1 1", "class0 1"), "two classes have one name"),
        ("label_map.txt", damage(" 2", " 1"), "two classes have the number 1"),
        ("label_map.txt", damage(" 0", " zero"), "must hold a class's name and its"),
        ("label_map.txt", damage(" 0", " 5"), "must be numbered from 0"),
        (
            "training_data.txt",
            lambda text: "".join(text.splitlines(keepends=True)[:2]),
            "training_data.txt must hold two documents or more",
        ),
        ("dev_prevalences.txt", damage("id,0", "id,1"), "header must be id,0"),
        ("dev_prevalences.txt", damage("\n0,", "\n0,0,"), "must hold 3 prevalences"),
        ("dev_prevalences.txt", damage("\n0,", "\n12,"), "without gaps; missing: 0"),
        ("dev_prevalences.txt", damage("\n0,", "\n1,"), "the id 1 is there twice"),
        ("dev_prevalences.txt", damage("\n0,", "\n0,-1"), r"must lie in \[0, 1\]"),
        ("dev_prevalences.txt", damage("\n0,0", "\n0,0.5"), "hold an id and numbers"),
    ],
)
def test_a_damaged_file_is_a_sentence(copied, name, change, message):
    path = copied / name
    path.write_text(change(path.read_text()))
    with pytest.raises(data.DataError, match=message):
        load("T1B", copied.parents[1])


@pytest.mark.parametrize(
    "name",
    [
        "training_data.txt",
        "label_map.txt",
        "dev_prevalences.txt",
        "dev_samples/2.txt",
    ],
)
def test_a_file_that_is_no_text_is_named(copied, name):
    (copied / name).write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(data.DataError, match=f"{name} (cannot be read|is no csv file)"):
        load("T1B", copied.parents[1])
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(data.DataError, match=f"{name} cannot be read: .*directory"):
        load("T1B", copied.parents[1])


def test_prevalences_come_back_as_they_were_written(tmp_path):
    rows = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    lequa.write_prevalences(tmp_path / "p.csv", rows)
    np.testing.assert_allclose(
        lequa.read_prevalences(tmp_path / "p.csv"), rows, atol=1e-8
    )
    lines = (tmp_path / "p.csv").read_text().splitlines()
    (tmp_path / "q.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    np.testing.assert_allclose(
        lequa.read_prevalences(tmp_path / "q.csv"), rows, atol=1e-8
    )


def test_prevalences_may_miss_one_by_a_thousandth(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("id,0,1\n0,0.5,0.5009\n")
    assert lequa.read_prevalences(path).shape == (1, 2)
    path.write_text("id,0,1\n0,0.5,0.502\n")
    with pytest.raises(data.DataError, match="sum to 1.002, which is not 1"):
        lequa.read_prevalences(path)


def test_the_sizes_of_the_challenge_are_the_defaults(monkeypatch, tmp_path):
    shapes = {}
    monkeypatch.setattr(
        synthetic_lequa,
        "_write_table",
        lambda path, inputs, labels: shapes.update({path.parent.name: inputs.shape}),
    )
    counts = {"dev_bags": 1, "test_bags": 1}
    for task, (documents, size) in {
        "T1A": ((5000, 300), 250),
        "T2": ((20000, 256), 1000),
    }.items():
        synthetic_lequa.write(task, tmp_path, **counts)
        assert shapes["public"] == documents
        assert shapes["dev_samples"] == shapes["test_samples"] == (size, documents[1])


def test_covariates_move_between_the_bags_of_t4(tmp_path):
    """Between-bag variance of a mean beyond what the prevalences explain."""

    def unexplained(task):
        options = SMALL | {"bag_size": 200, "dev_bags": 60, "num_classes": 2}
        synthetic_lequa.write(task, tmp_path, **options)
        splits = load(task, tmp_path, standardize=False).splits
        means = np.concatenate([s["inputs"].mean(1) for s in splits.values()])
        label = np.concatenate([s["prevalence"] for s in splits.values()])
        return ((means - label @ np.linalg.lstsq(label, means)[0]) ** 2).sum(1).mean()

    # Noise alone: 4 / 200; the shift adds the variance one.
    assert unexplained("T1") < 0.05
    assert 0.4 < unexplained("T4") < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dev_bags", 0),
        ("bag_size", 0),
        ("num_classes", 0),
        ("seed", -1),
        ("separation", np.nan),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be . or more, not {value}"):
        synthetic_lequa.write("T1", tmp_path, **SMALL | {name: value})


# Bags in memory.


def bags(**changes):
    spec = data.Spec("b", (2,), 3, ("a", "b", "c"), {}, "", "", "", "")
    train = {"inputs": np.zeros((4, 5, 2)), "prevalence": np.full((4, 3), 1 / 3)}
    splits = {"train": train | changes, "validation": dict(train)}
    return data.Bags(spec, splits, np.float32(0), np.float32(1))


def test_bags_of_several_sizes():
    assert bags(sizes=np.array([1, 5, 3, 2])).splits["train"]["sizes"][1] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": np.zeros((4, 5, 1))}, r"inputs of the train split must have the"),
        ({"inputs": np.zeros((4, 0, 2))}, r"inputs of the train split must have the"),
        ({"prevalence": np.ones((4, 2)) / 2}, r"shape \[4, 3\] \(bags, classes\)"),
        ({"prevalence": np.ones((4, 3))}, "row 0 must hold numbers of 0 or more"),
        ({"prevalence": np.full((4, 3), np.nan)}, "row 0 must hold numbers"),
        ({"sizes": np.array([1, 6, 1, 1])}, "4 numbers between 1 and 5"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bags(**changes)


def test_training_bags_must_have_labels():
    whole = bags()
    splits = {"train": {"inputs": np.zeros((4, 5, 2))}}
    with pytest.raises(ValueError, match='splits must hold "train"'):
        dataclasses.replace(whole, splits=splits)
