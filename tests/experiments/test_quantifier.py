"""`Quantifier`: what scikit-learn and QuaPy expect of it, and that it learns."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import train_test_split

from archs import DeepSets, HistNetQ, LinearHistogram, PrevalenceHead
from archs import absolute_error as absolute_error_of
from archs import relative_absolute_error as relative_absolute_error_of
from archs.encoders import MLP
from experiments import loop
from experiments.quantifier import Quantifier

SMALL = {
    "name": "HistNetQ",
    "encoder": {"name": "MLP", "hidden_sizes": (32,), "features": 16},
    "histogram": {"name": "LinearHistogram", "num_bins": 8},
    "head": {"name": "PrevalenceHead", "hidden_sizes": (32,)},
}
NAMES = np.array(["ape", "bee", "cat"])


def small(**fields):
    fields = {"num_steps": 200, "learning_rate": 3e-3, "num_bags": 64} | fields
    return Quantifier(SMALL, mixed_bags=16, validation_bags=40, **fields)


def points(size, prevalence=(1 / 3, 1 / 3, 1 / 3), seed=0):
    """Points of three overlapping classes, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size, p=prevalence)
    centres = 2.0 * np.array([[0, 0], [1, 0], [0, 1]])
    return centres[labels] + 0.5 * rng.normal(size=(size, 2)) + 7, labels


def share(labels):
    return np.bincount(labels, minlength=3) / len(labels)


def bags_of(number, sizes, seed=0):
    """Bags of points under uniform prevalences, and the prevalences in them."""
    rng = np.random.default_rng(seed)
    drawn = [
        points(rng.choice(sizes), rng.dirichlet(np.ones(3)), seed=[seed, i])
        for i in range(number)
    ]
    return [bag for bag, _ in drawn], np.stack([share(labels) for _, labels in drawn])


@pytest.fixture(scope="module")
def fitted():
    X, labels = points(400)
    return small().fit(X, NAMES[labels])


def test_it_learns_prevalences_under_the_labels_names(fitted):
    assert list(fitted.classes_) == list(NAMES)
    bags, prevalences = bags_of(50, [100], seed=1)
    estimate = fitted.predict_bags(bags)
    error = absolute_error_of(prevalences, estimate).mean()
    # Saying one third each is off by 0.20.
    assert error < 0.08
    np.testing.assert_allclose(estimate.sum(1), 1, atol=1e-5)


def test_bags_of_any_size_are_what_the_network_says_of_them(fitted):
    bags, _ = bags_of(6, [1, 2, 7, 40], seed=2)
    for bag, estimate in zip(bags, fitted.predict_bags(bags), strict=True):
        inputs = (bag - fitted._shift) / fitted._scale
        direct = fitted.model_.apply(fitted.variables_, jnp.float32(inputs)[None])[0]
        np.testing.assert_allclose(estimate, direct, atol=2e-6)
        np.testing.assert_array_equal(estimate, fitted.predict(bag))
        assert estimate.shape == (3,)


def test_sizes_are_compiled_by_powers_of_two(fitted, caplog):
    bag, _ = points(300)

    def compiled(sizes):
        caplog.clear()
        with jax.log_compiles():
            for size in sizes:
                fitted.predict(bag[:size])
        return sum("Compiling jit(_estimate)" in text for text in caplog.messages)

    assert compiled(range(129, 257, 7)) == 1
    assert compiled([130, 256, 257, 300]) == 1


def test_intervals_hold_the_estimate_and_widen_with_the_level(fitted):
    bag, _ = points(60, seed=3)
    widths = []
    for level in (0.5, 0.9):
        low, high = fitted.predict_interval(bag, level)
        assert low.shape == high.shape == (3,)
        estimate = fitted.predict(bag)
        assert (low <= estimate).all() and (estimate <= high).all()
        widths.append((high - low).mean())
    # The normal distribution's quantiles: 1.645 / 0.674.
    assert widths[1] / widths[0] == pytest.approx(2.44, rel=0.25)
    np.testing.assert_array_equal(
        fitted.predict_interval(bag), fitted.predict_interval(bag, 0.95)
    )
    joint = fitted.predict_interval(bag, joint=True)
    assert (joint[0] <= fitted.predict_interval(bag)[0]).all()
    assert (joint[1] > fitted.predict_interval(bag)[1]).any()


def test_parameters_are_those_of_an_estimator(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "classes_")
    copy.set_params(num_steps=7, bag_size=3)
    assert (copy.num_steps, copy.bag_size, fitted.num_steps) == (7, 3, 200)
    with pytest.raises(ValueError, match="Invalid parameter 'steps'"):
        copy.set_params(steps=7)


def test_a_pickle_says_the_same(fitted):
    bag, _ = points(30)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(bag), fitted.predict(bag))


def network():
    head = PrevalenceHead((8,), 3)
    return DeepSets(MLP((8,), 4), head, aggregation="max")


def images(size):
    """Pictures of 4 x 4 whose brightness tells the class."""
    labels = np.arange(size) % 3
    noise = np.random.default_rng(0).integers(0, 50, (size, 4, 4, 1))
    return (noise + 100 * labels[:, None, None, None]).astype(np.uint8), labels


def test_a_ready_network_of_images_is_fitted_quietly(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = images(60)
    quantifier = clone(small(num_steps=4).set_params(model=network())).fit(X, y)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert quantifier.model_ == network()
    inputs = np.float32(X) / 127.5 - 1
    direct = quantifier.model_.apply(quantifier.variables_, inputs[None])[0]
    np.testing.assert_allclose(quantifier.predict(X), direct, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 1\) of those before them"):
        quantifier.predict(np.zeros((5, 4, 5, 1)))


def test_it_learns_from_bags_that_have_prevalences_alone():
    bags, prevalences = bags_of(120, [20, 40, 60])
    quantifier = small(num_bags=None, num_steps=300).fit_bags(bags, prevalences)
    assert list(quantifier.classes_) == [0, 1, 2]
    bags, prevalences = bags_of(50, [100], seed=1)
    error = absolute_error_of(prevalences, quantifier.predict_bags(bags)).mean()
    assert error < 0.08


def test_an_offset_of_the_features_changes_nothing():
    # In float32 all of them would be 1e8.
    (X, labels), (bags, prevalences) = points(60), bags_of(10, [20])
    for fit in (
        lambda offset: small(num_steps=20).fit(X + offset, labels),
        lambda offset: small(num_steps=20, num_bags=None).fit_bags(
            (bag + offset for bag in bags), prevalences
        ),
    ):
        expected = fit(0).predict_bags(bags)
        found = fit(1e8).predict_bags(bag + 1e8 for bag in bags)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_bags_have_no_prevalences(fitted):
    assert fitted.predict_bags([]).shape == (0, 3)


def test_bags_as_given_and_joined_for_poolings_that_are_not_linear():
    bags, prevalences = bags_of(10, [8])
    estimates = [
        small(num_steps=4, num_bags=None)
        .set_params(model=network(), mixed_bags=mixed)
        .fit_bags(bags, prevalences)
        .predict_bags(bags)
        for mixed in (0, 16)
    ]
    assert np.isfinite(estimates).all()
    assert np.abs(estimates[0] - estimates[1]).max() > 1e-6


def test_an_interrupted_fit_resumes_in_its_folder(tmp_path, monkeypatch):
    X, y = points(60)
    quantifier = small(num_steps=40, workdir=tmp_path / "new" / "fit")
    expected = clone(quantifier).set_params(workdir=None).fit(X, y).predict(X)
    real = loop.compile_evaluation

    def interrupted(task):
        evaluate, calls = real(task), []

        def run(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise loop.Interrupted("SIGTERM: saved")
            return evaluate(*arguments)

        return run

    monkeypatch.setattr(loop, "compile_evaluation", interrupted)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM: saved"):
        quantifier.fit(X, y)
    monkeypatch.setattr(loop, "compile_evaluation", real)
    np.testing.assert_array_equal(quantifier.fit(X, y).predict(X), expected)
    for other in (quantifier.set_params(seed=1), clone(quantifier).set_params(seed=0)):
        inputs = X if other.seed else X + 1
        with pytest.raises(ValueError, match="workdir: .* of another fit"):
            other.fit(inputs, y)


# Mistakes.


def test_a_bag_before_the_fit():
    for ask in ("predict", "predict_interval"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(small(), ask)(np.zeros((3, 2)))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        small().predict_bags([np.zeros((3, 2))])


@pytest.mark.parametrize(
    ("bag", "part"),
    [
        (np.zeros((3, 5)), "X has 5 features, but Quantifier is expecting 2"),
        (np.zeros((3, 2, 2)), r"shape \(2,\) of those before them, not \(2, 2\)"),
        (np.full((3, 2), np.nan), "Input X contains NaN"),
        (np.full((3, 2), np.inf), "Input X contains infinity"),
        (np.full((3, 2), 1e39), "X holds values too large"),
        (np.zeros((0, 2)), r"Found array with 0 sample\(s\)"),
        (np.zeros(2), "Expected 2D array, got 1D array"),
    ],
)
def test_a_wrong_bag_is_a_sentence(fitted, bag, part):
    for ask in (fitted.predict, fitted.predict_interval):
        with pytest.raises(ValueError, match=part):
            ask(bag)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"level": 0.0}, "level must lie between 0 and 1, not 0.0"),
        ({"level": 95}, "level must lie between 0 and 1, not 95"),
        ({"resamples": 0}, "resamples must be 1 or more, not 0"),
    ],
)
def test_a_wrong_interval_is_a_sentence(fitted, fields, part):
    with pytest.raises(ValueError, match=part):
        fitted.predict_interval(np.zeros((3, 2)), **fields)


@pytest.mark.parametrize(
    ("X", "y", "part"),
    [
        (np.full((4, 2), np.nan), [0, 0, 1, 1], "Input X contains NaN"),
        (np.zeros((4, 2)), [0, 0, 1], "inconsistent numbers of samples"),
        (np.zeros((4, 2)), [0, 0, 0, 0], r"y must have two classes or more, not \[0\]"),
        (np.zeros((4, 2)), [0.5, 0.1, 0.2, 0.3], "Unknown label type"),
        (np.zeros((4, 2)), [0, 0, 0, 1], "least populated class"),
        (
            np.zeros((10, 2)),
            [0, 1, 2] * 3 + [0],
            "of the 10 examples of 3 classes cannot",
        ),
        (np.zeros((4, 2)), np.array(["a", "a", None, None]), "labels of one type"),
    ],
)
def test_wrong_examples_are_a_sentence(X, y, part):
    with pytest.raises(ValueError, match=part):
        small().fit(X, y)


@pytest.mark.parametrize(
    ("bags", "prevalences", "part"),
    [
        ([np.zeros((3, 2))], [[0.5, 0.5], [1, 0]], "there are 2 rows and 1 bags"),
        ([np.zeros((3, 2))] * 9, [[0.5, 0.6]] * 9, "sum to one"),
        ([np.zeros((3, 2))], [[0.5, 0.5]], r"two or more, .* shape \(1, 2\)"),
        ([np.zeros((3, 2))] * 9, [[1.0]] * 9, r"two or more, .* shape \(9, 1\)"),
        ([np.zeros((3, 2)), np.zeros((3, 4))], [[1, 0]] * 2, "X has 4 features"),
        (
            [np.zeros((3, 2)), np.zeros((3, 2, 1))],
            [[1, 0]] * 2,
            r"shape \(2,\) of those before them",
        ),
        ([np.zeros((0, 2))] * 3, [[1, 0]] * 3, r"0 sample\(s\)"),
        ([np.full((3, 2), np.nan)] * 3, [[1, 0]] * 3, "contains NaN"),
    ],
)
def test_wrong_bags_to_learn_from_are_a_sentence(bags, prevalences, part):
    with pytest.raises(ValueError, match=part):
        small().fit_bags(bags, prevalences)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"num_steps": 0}, "num_steps must lie between 1"),
        ({"learning_rate": -1.0}, "learning_rate must be > 0"),
        ({"bag_size": 0}, "bag_size must be 1 or more, not 0"),
        ({"protocol": "some"}, "protocol must be one of"),
        ({"loss": "some"}, "no measure 'some'"),
        ({"num_steps": 2.0}, "num_steps must be of the type Integral, not 2.0"),
        ({"seed": None}, "seed must be of the type Integral, not None"),
        ({"learning_rate": "x"}, "learning_rate must be of the type Real, not 'x'"),
        ({"task": "noise"}, "task must be fields by their names, not 'noise'"),
        ({"workdir": __file__}, "workdir: .* cannot be made a folder: File exists"),
        ({"evaluations": 0}, "evaluations must be 1 or more, not 0"),
        ({"task": {"noises": 1}}, "task: .* of Quantification are .*, not noises"),
        ({"task": {"num_bags": 1}}, "task: .* of Quantification are .*, not num_bags"),
        ({"model": {"name": "HistNet"}}, "model.name: there is no 'HistNet' in archs"),
        ({"model": SMALL | {"bins": 3}}, "model.bins: there is no such field"),
        ({"model": SMALL["head"]}, "PrevalenceHead is no set network"),
        (
            {"model": HistNetQ(MLP((), 2), LinearHistogram(2), PrevalenceHead((), 4))},
            r"must return prevalences of shape \(64, 3\)",
        ),
    ],
)
def test_a_wrong_parameter_is_a_sentence(fields, part):
    with pytest.raises(ValueError, match=part):
        small().set_params(**fields).fit(*points(30))


# QuaPy.


@pytest.fixture(scope="module")
def digits():
    """A quantifier fitted on digits, and QuaPy's collection of the others."""
    quapy = pytest.importorskip("quapy")
    X, y = load_digits(return_X_y=True)
    train, test, train_labels, labels = train_test_split(
        X, y, test_size=0.4, stratify=y, random_state=0
    )
    quantifier = small(num_steps=600, num_bags=128).fit(train, train_labels)
    return quantifier, quapy.data.LabelledCollection(test, labels)


def test_quapy_evaluates_it(digits):
    import quapy
    from quapy.protocol import UPP

    quantifier, collection = digits
    bags = UPP(collection, sample_size=100, repeats=50, random_state=0)
    mae = quapy.evaluation.evaluate(quantifier, bags, "mae")
    assert mae < 0.045  # saying one tenth each is off by 0.070
    true, estimate = quapy.evaluation.prediction(quantifier, bags)
    assert mae == pytest.approx(float(absolute_error_of(true, estimate).mean()))


def test_quapy_reports_on_it(digits, monkeypatch):
    import quapy
    from quapy.protocol import APP

    quantifier, collection = digits
    monkeypatch.setitem(quapy.environ, "SAMPLE_SIZE", 50)
    bags = APP(collection, n_prevalences=2, repeats=1)  # of one class each
    report = quapy.evaluation.evaluation_report(quantifier, bags, ["mae", "mrae"])
    estimate = quantifier.predict_bags([bag for bag, _ in bags()])
    relative = relative_absolute_error_of(
        np.stack([true for _, true in bags()]), estimate, epsilon=1 / 100
    )
    assert len(report) == len(estimate) == 10
    np.testing.assert_allclose(report["mrae"], relative, rtol=1e-5)


def test_a_network_with_classifiers_learns_from_labels():
    X, labels = points(300)
    model = {
        "name": "EMQNet",
        "encoder": {"name": "MLP", "hidden_sizes": (16,), "features": 8},
        "num_members": 2,
        "num_steps": 20,
    }
    quantifier = Quantifier(model, num_steps=100, num_bags=64, learning_rate=0.02)
    bags, prevalences = bags_of(20, [50])
    before = np.abs(prevalences - 1 / 3).mean()
    found = quantifier.fit(X, labels).predict_bags(bags)
    assert np.abs(prevalences - found).mean() < 0.25 * before
    with pytest.raises(ValueError, match="EMQNet learns from the labels"):
        quantifier.fit_bags(bags, prevalences)


def test_fit_in_another_thread():
    X, labels = points(120)
    estimator = small(num_steps=20)
    with ThreadPoolExecutor(1) as pool:
        fitted = pool.submit(estimator.fit, X, labels).result()
    np.testing.assert_array_equal(
        fitted.predict(X), clone(estimator).fit(X, labels).predict(X)
    )
