"""The comparison with QuaPy: what is done once, the tables, and the statistics."""

import dataclasses
import hashlib
import json
import math
import zipfile

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

pytest.importorskip("quapy")

from data import texts  # noqa: E402
from experiments import loop, quapy_comparison  # noqa: E402
from experiments.configs import quantify  # noqa: E402

FAST = ["--bags=20", "--bag_size=20", "--steps=4"]


@pytest.fixture
def compare(capsys):
    """Runs the comparison: exit code and what it printed."""

    def run(*arguments):
        code = quapy_comparison.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def rows(table):
    """{method: cells} of the first markdown table in a text."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def test_methods_of_both_kinds_on_the_same_bags(compare, tmp_path):
    flags = ["--datasets=wine", "--methods=CC,HistNetQ", f"--workdir={tmp_path}"]
    code, out, err = compare(*flags, "--seeds=1", *FAST)
    assert code == 0, err
    files = {path.name: path.read_text() for path in tmp_path.glob("wine-*.json")}
    assert set(files) == {"wine-cc-0.json", "wine-histnetq-0.json"}
    found = {name: json.loads(text) for name, text in files.items()}
    # 178 wines, 60 % to learn from; counting beats a network of four steps.
    assert {result["train_examples"] for result in found.values()} == {106}
    assert found["wine-cc-0.json"]["AE"] < found["wine-histnetq-0.json"]["AE"]
    table = rows(out.split("RAE")[0])
    assert list(table) == ["CC", "HistNetQ"]
    assert table["CC"] == [f"{found['wine-cc-0.json']['AE']:.4f} ± 0.0000", "1.00"]

    # Another seed and method: what is there is not repeated.
    flags[1] = "--methods=CC,EMQ"
    code, out, err = compare(*flags, "--seeds=2", *FAST)
    assert code == 0, err
    assert err.count("wine, seed") == 3
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text
    assert "over 2 blocks" in out
    assert (tmp_path / "ranks.png").stat().st_size > 1000

    # Other bags are no row of the same table.
    code, _, err = compare(*flags, "--bags=21", "--bag_size=20", "--steps=4")
    assert code == 1
    assert "choose another --workdir" in err


@pytest.mark.parametrize("method", quapy_comparison.METHODS)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_every_method_can_be_made(method, num_classes):
    problem = quapy_comparison.Problem(num_classes, 100, 0, 10, 500)
    quantifier = quapy_comparison.METHODS[method](problem)
    assert callable(quantifier.fit) and callable(quantifier.predict)
    if method == "HDy/DMy":
        assert type(quantifier).__name__ == ("HDy" if num_classes == 2 else "DMy")


def test_emqnet_of_few_examples_is_that_of_the_shipped_config(monkeypatch):
    """The task of `quantify.py:emqnet_breast_cancer`, and the settings around it."""
    made = []

    def train(task, training, folder, seed, progress):
        made.append((task, training))
        raise loop.Interrupted("seen enough")

    monkeypatch.setattr(loop, "train", train)
    shipped = quantify.get_config("emqnet_breast_cancer")
    problem = quapy_comparison.Problem(2, 100, 0, 2000, num_examples=341)
    examples = load_breast_cancer(return_X_y=True)
    with pytest.raises(KeyboardInterrupt):
        quapy_comparison.METHODS["EMQNet"](problem).fit(*examples)
    ((task, training),) = made
    for name, value in shipped.task.items():
        if name != "name":
            assert getattr(task, name) == value, name
    for name, value in shipped.optimizer.items():
        assert getattr(task.optimizer, name) == value, name
    assert training.num_steps == training.eval_every == shipped.training.num_steps
    sizes = task.dataset.spec.sizes
    assert sizes["validation"] == math.ceil(569 * shipped.dataset.validation_fraction)
    model = shipped.model
    assert task.model.num_members == model.num_members
    assert task.model.encoder.hidden_sizes == model.encoder.hidden_sizes
    assert task.model.encoder.dropout_rate == model.encoder.dropout_rate


def test_test_bags_depend_on_the_seed_alone(monkeypatch, tmp_path, compare):
    seen = []

    class Recorder:
        def fit(self, X, y):
            self.classes = len(np.unique(y))
            seen.append([])
            return self

        def predict(self, X):
            seen[-1].append(X)
            return np.full(self.classes, 1 / self.classes)

    recorders = {name: lambda _: Recorder() for name in ("a", "b")}
    monkeypatch.setattr(quapy_comparison, "METHODS", recorders)
    flags = ["--datasets=wine", f"--workdir={tmp_path}", "--seeds=2", "--methods=a,b"]
    code, _, err = compare(*flags, *FAST)
    assert code == 0, err
    a0, b0, a1, b1 = np.array(seen)  # [bag, element, feature] each
    assert a0.shape == (20, 20, 13)
    np.testing.assert_array_equal(a0, b0)
    np.testing.assert_array_equal(a1, b1)
    assert (a0 != a1).any()


def test_nan_is_no_result(monkeypatch, tmp_path, compare):
    class Broken:
        def fit(self, X, y):
            return self

        def predict(self, X):
            return np.full(3, np.nan)

    monkeypatch.setattr(quapy_comparison, "METHODS", {"a": lambda _: Broken()})
    flags = ["--datasets=wine", "--methods=a", f"--workdir={tmp_path}"]
    code, _, err = compare(*flags, *FAST)
    assert code == 1
    assert "a gave NaN on wine, seed 0" in err
    assert not list(tmp_path.glob("wine*"))


@pytest.fixture
def sentences(tmp_path, monkeypatch):
    """A folder with an archive like that of Pang and Lee, in UTF-8."""
    with zipfile.ZipFile(tmp_path / "sentence_polarity.zip", "w") as archive:
        for name, original in texts.POLARITIES.items():
            lines = [f"a {name} café number {i % 40}\n" for i in range(800)]
            content = "".join(lines).encode()
            archive.writestr(original.name, content)
            sha256 = hashlib.sha256(content).hexdigest()
            changed = dataclasses.replace(original, sha256=sha256)
            monkeypatch.setitem(texts.POLARITIES, name, changed)
    return tmp_path


def test_features_of_texts_are_made_of_the_train_part(sentences, monkeypatch):
    monkeypatch.setattr(quapy_comparison, "TEXT_FEATURES", 5)
    inputs, labels = quapy_comparison._read_sentences(sentences)
    assert len(inputs) == 1600 and labels.sum() == 800
    assert all(
        text.startswith(f"a {texts.MovieSentences.classes[label]} café")
        for text, label in zip(inputs, labels, strict=True)
    )
    train, train_labels, test, test_labels = quapy_comparison.split_examples(
        inputs, labels, seed=0
    )
    assert train.shape == (960, 5) and test.shape == (640, 5)
    assert train_labels.mean() == test_labels.mean() == 0.5
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-6)
    # What the test part holds changes nothing in the train part.
    _, of_test = train_test_split(
        np.arange(1600), train_size=0.6, stratify=labels, random_state=0
    )
    inputs[of_test] = "another text"
    again = quapy_comparison.split_examples(inputs, labels, seed=0)
    np.testing.assert_array_equal(train, again[0])
    assert np.ptp(again[2], axis=0).max() == 0 < np.ptp(test, axis=0).max()


def test_many_examples_are_thinned_out_to_learn_from():
    labels = np.repeat([0, 1], [6000, 4000])
    inputs = np.arange(20000.0).reshape(10000, 2)
    train, train_labels, test, test_labels = quapy_comparison.split_examples(
        inputs, labels, seed=1
    )
    assert train.shape == (5000, 2) and test.shape == (4000, 2)
    assert train_labels.mean() == test_labels.mean() == 0.4


def test_a_dataset_that_is_not_there_is_skipped(compare, tmp_path):
    code, out, err = compare(
        "--datasets=sentence_polarity,wine",
        "--methods=CC,PCC",
        "--seeds=1",
        f"--workdir={tmp_path}",
        *FAST,
    )
    assert code == 0
    assert "sentence_polarity is skipped: name the folder of" in err
    assert rows(out)["CC"][1] == "1.00" or rows(out)["PCC"][1] == "1.00"
    code, _, err = compare(
        "--datasets=sentence_polarity",
        f"--text_dir={tmp_path}",
        f"--workdir={tmp_path}",
    )
    assert code == 1
    assert "choose another --workdir" in err
    code, _, err = compare(
        "--datasets=sentence_polarity",
        f"--text_dir={tmp_path}",
        f"--workdir={tmp_path}",
        *FAST,
    )
    assert code == 1
    assert f"put sentence_polarity.zip of {texts.POLARITIES['negative'].url}" in err
    assert "no dataset is left" in err


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--datasets=iris", "--datasets: there is no 'iris'; choose from digits,"),
        ("--methods=SVM", "--methods: there is no 'SVM'; choose from HistNetQ,"),
        ("--bags=0", "--bags must be 1 or more"),
    ],
)
def test_a_wrong_flag_is_a_sentence(compare, tmp_path, flag, part):
    code, out, err = compare(f"--workdir={tmp_path / 'new'}", flag)
    assert code == 1 and not out
    assert part in err
    assert not (tmp_path / "new").exists()


# The statistics.


@pytest.fixture
def errors():
    """Of two methods alike and one far worse, over 20 blocks of unlike difficulty."""
    rng = np.random.default_rng(0)
    difficulty = 10.0 ** rng.uniform(-3, -1, 20)
    noise = rng.lognormal(0, 0.1, (3, 20))
    return dict(zip("abc", difficulty * noise * [[1], [1], [3]], strict=True))


def test_the_verdict_names_what_differs(errors):
    text = quapy_comparison.significance(errors)
    friedman = stats.friedmanchisquare(*errors.values())
    assert f"chi2 = {friedman.statistic:.1f}" in text
    assert "over 20 blocks" in text
    assert "differs from c (p = " in text
    best = "a" if "cannot be told from b." in text else "b"
    assert f"{best}, the best in mean rank" in text


def test_too_few_blocks_are_said_to_be_too_few(errors):
    # Three pairs: the smallest p-value of n blocks, 2^(1 - n), is corrected to three
    # times as much, 0.047 of seven blocks and 0.094 of six.
    for num_blocks, few in ((6, True), (7, False)):
        part = {name: values[:num_blocks] for name, values in errors.items()}
        text = quapy_comparison.significance(part)
        assert ("blocks are too few to tell any of 3 pairs apart" in text) == few


def test_p_values_are_holms_of_wilcoxons(errors):
    found = quapy_comparison.pairwise_p_values(errors)
    raw = {
        (i, j): stats.wilcoxon(
            np.log(errors["abc"[i]]), np.log(errors["abc"[j]])
        ).pvalue
        for i in range(3)
        for j in range(i + 1, 3)
    }
    # Holm (1979): the k-th smallest of m times m - k + 1, and never below the last.
    last = 0
    for number, pair in enumerate(sorted(raw, key=raw.get)):
        last = min(max(last, raw[pair] * (3 - number)), 1)
        assert found[pair] == found[pair[::-1]] == pytest.approx(last)
    np.testing.assert_array_equal(np.diag(found), 1)


def test_scale_of_a_block_changes_no_verdict(errors):
    scaled = {name: values * np.arange(1, 21) for name, values in errors.items()}
    np.testing.assert_allclose(
        quapy_comparison.pairwise_p_values(errors),
        quapy_comparison.pairwise_p_values(scaled),
    )


def test_methods_without_any_difference_are_not_told_apart():
    same = {"a": np.zeros(8), "b": np.zeros(8)}
    np.testing.assert_array_equal(quapy_comparison.pairwise_p_values(same), 1)


@pytest.mark.parametrize(
    ("alike", "groups"),
    [
        ([(0, 1)], [(0, 1)]),
        ([], []),
        ([(0, 1), (1, 2)], [(0, 1), (1, 2)]),
        ([(0, 1), (1, 2), (0, 2)], [(0, 2)]),
        ([(0, 2)], []),
    ],
)
def test_bars_join_runs_in_which_all_pairs_are_alike(alike, groups):
    matrix = np.eye(4, dtype=bool)
    for pair in alike:
        matrix[pair] = matrix[pair[::-1]] = True
    assert quapy_comparison._groups(matrix) == groups
