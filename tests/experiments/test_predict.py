"""`--mode=predict` on the run of the tiny config."""

import csv
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import data
from experiments import loop, predict, runner


@pytest.fixture(scope="module")
def trained(finished):
    task, config = runner.load_run(finished)
    return task, loop.best_state(finished, task, config.seed)[1]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").splits["test"]


@pytest.fixture
def predicted(main, finished, tmp_path):
    """Runs the mode on a source: the rows of its csv, by bag."""

    def run(source, *flags):
        output = tmp_path / "new" / "folder" / "predictions.csv"
        outcome = main(
            "--mode=predict",
            f"--workdir={finished}",
            f"--bags={source}",
            f"--output={output}",
            "--bootstrap=60",
            *flags,
        )
        assert outcome.code == 0, outcome.err
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert f"Wrote the prevalences of {len(rows)} bags" in outcome.out
        assert str(output) in outcome.out
        return {
            row.pop("bag"): {name: float(value) for name, value in row.items()}
            for row in rows
        }

    return run


def vector(row, end=""):
    return np.array([row[f"{label}{end}"] for label in range(10)])


def direct(trained, bag):
    """The model applied to the bag as it is, without padding."""
    task, state = trained
    inputs = data.normalize(bag, task.dataset.shift, task.dataset.scale)
    return np.asarray(task.model.apply(state.variables, inputs[None]))[0]


def test_bags_of_several_sizes(predicted, trained, digits, tmp_path):
    sizes = {"one": 1, "seven": 7, "eight": 8, "many": 133}
    bags = {name: digits["inputs"][:size] for name, size in sizes.items()}
    np.savez(tmp_path / "bags.npz", **bags)
    rows = predicted(tmp_path / "bags.npz")
    assert list(rows) == list(sizes)
    for name, bag in bags.items():
        row = rows[name]
        assert set(row) == {
            f"{label}{end}" for label in range(10) for end in ("", "_low", "_high")
        }
        estimate = vector(row)
        np.testing.assert_allclose(estimate, direct(trained, bag), atol=2e-6)
        assert estimate.sum() == pytest.approx(1, abs=1e-5)
        assert (vector(row, "_low") <= vector(row, "_high")).all()
        for end in ("_low", "_high"):
            assert (vector(row, end) >= 0).all() and (vector(row, end) <= 1).all()


def test_one_array_with_an_axis_of_bags(predicted, trained, digits, tmp_path):
    bags = digits["inputs"][:60].reshape(3, 20, 8, 8, 1)
    np.savez_compressed(tmp_path / "bags.npz", bags)
    rows = predicted(tmp_path / "bags.npz")
    assert list(rows) == ["0", "1", "2"]
    for number, bag in enumerate(bags):
        np.testing.assert_allclose(
            vector(rows[str(number)]), direct(trained, bag), atol=2e-6
        )


def test_one_array_that_is_one_bag(predicted, trained, digits, tmp_path):
    np.savez(tmp_path / "bags.npz", only=digits["inputs"][:9])
    rows = predicted(tmp_path / "bags.npz")
    assert list(rows) == ["only"]
    np.testing.assert_allclose(
        vector(rows["only"]), direct(trained, digits["inputs"][:9]), atol=2e-6
    )


def write_csv(path, inputs, names=None, start=""):
    flat = inputs.reshape(len(inputs), -1)
    header = [f"pixel{i}" for i in range(flat.shape[1])]
    lines = [list(map(str, row)) for row in flat]
    if names is not None:
        header = [*header[:3], "bag", *header[3:]]
        lines = [
            [*line[:3], name, *line[3:]]
            for line, name in zip(lines, names, strict=True)
        ]
    text = "\n".join(",".join(line) for line in [header, *lines])
    path.write_text(start + text + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "from a spreadsheet"])
def test_csv_with_a_column_of_bags(predicted, trained, digits, tmp_path, start):
    inputs = digits["inputs"][:12]
    names = ["b", "a", "b", "b", "a", "a", "b", "c", "c", "a", "b", "b"]
    rows = predicted(write_csv(tmp_path / "bags.csv", inputs, names, start))
    assert list(rows) == ["b", "a", "c"]
    for name, row in rows.items():
        bag = inputs[[n == name for n in names]]
        np.testing.assert_allclose(vector(row), direct(trained, bag), atol=2e-6)


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "from a spreadsheet"])
def test_csv_without_one_is_one_bag(predicted, trained, digits, tmp_path, start):
    inputs = digits["inputs"][:12]
    rows = predicted(write_csv(tmp_path / "bags.csv", inputs, start=start))
    assert list(rows) == ["0"]
    np.testing.assert_allclose(vector(rows["0"]), direct(trained, inputs), atol=2e-6)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_bags_of_an_evaluation(predicted, trained, split):
    task, state = trained
    rows = predicted(split)
    _, _, estimates = task.evaluation_bags(state, split)
    assert list(rows) == [str(number) for number in range(len(estimates))]
    found = np.stack([vector(row) for row in rows.values()])
    np.testing.assert_allclose(found, estimates, atol=1e-5)
    # Resampling is about the bag itself: its estimate lies inside.
    inside = [
        (vector(row, "_low") <= vector(row)) & (vector(row) <= vector(row, "_high"))
        for row in rows.values()
    ]
    assert np.mean(inside) > 0.9


def test_the_same_command_gives_the_same_numbers(predicted):
    assert predicted("test") == predicted("test")


def resampled_interval(trained, bag, resamples, key, **options):
    task, state = trained
    inputs = data.normalize(bag, task.dataset.shift, task.dataset.scale)
    return predict.interval(
        task.model, state.variables, inputs, resamples, key, 0.95, **options
    )


def test_intervals_narrow_with_the_size_of_the_bag(trained, digits):
    rng = np.random.default_rng(0)

    def width(size):
        bag = digits["inputs"][rng.choice(len(digits["inputs"]), size)]
        _, low, high = resampled_interval(trained, bag, 200, jax.random.key(size))
        return (high - low).mean()

    widths = [width(size) for size in (25, 100, 400)]
    # As one over the square root of the size.
    np.testing.assert_allclose(widths[0] / widths[1], 2, rtol=0.35)
    np.testing.assert_allclose(widths[1] / widths[2], 2, rtol=0.35)
    assert width(1) < 1e-6  # of one example there is one resample


def test_intervals_are_quantiles_of_resampled_bags(trained, digits):
    task, state = trained
    bag = digits["inputs"][:40]
    _, low, high = resampled_interval(trained, bag, 400, jax.random.key(0))
    rng = np.random.default_rng(1)
    inputs = data.normalize(bag, task.dataset.shift, task.dataset.scale)
    resampled = jnp.asarray(inputs)[rng.integers(0, 40, (400, 40))]
    estimates = task.model.apply(state.variables, resampled)
    expected = np.quantile(estimates, [0.025, 0.975], axis=0)
    spread = (expected[1] - expected[0]).max()
    np.testing.assert_allclose(low, expected[0], atol=0.2 * spread)
    np.testing.assert_allclose(high, expected[1], atol=0.2 * spread)
    _, lower, higher = resampled_interval(
        trained, bag, 400, jax.random.key(0), wider=np.full(10, 0.03)
    )
    np.testing.assert_allclose(lower, np.maximum(low - 0.03, 0), atol=1e-6)
    np.testing.assert_allclose(higher, np.minimum(high + 0.03, 1), atol=1e-6)


class Biased:
    """A quantifier of two classes: the mean of the elements and what it is short of."""

    def apply(self, variables, inputs, mask=None, method=None):
        if method != "aggregate":
            return inputs
        mean = jnp.where(mask, inputs[..., 0], 0).sum(1) / mask.sum(1)
        shifted = jnp.clip(mean + variables["bias"], 0, 1)
        return jnp.stack([shifted, 1 - shifted], -1)


def known_bags(number, seed, size=64):
    """Bags of elements 0 and 1 (with noise), and how much of each is in them."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        ones = rng.binomial(size, rng.uniform(0.2, 0.8))
        bag = np.arange(size) < ones
        noisy = bag + rng.normal(0, 0.3)  # the same for all: no resample shows it
        share = ones / size
        yield noisy[:, None], np.array([share, 1 - share])


@pytest.mark.parametrize("joint", [False, True], ids=["per class", "joint"])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_hold_the_prevalences_of_other_bags(joint, level):
    model, variables = Biased(), {"bias": 0.1}
    common = 50, jax.random.key(0), level, joint

    wider = predict.margin(model, variables, known_bags(100, 0), *common)
    assert wider.shape == (2,) and (wider > 0.05).all()

    def coverage(wider):
        inside = []
        for bag, prevalence in known_bags(300, 1):
            _, low, high = predict.interval(model, variables, bag, *common, wider)
            inside.append((low <= prevalence) & (prevalence <= high))
        inside = np.array(inside)
        return (inside.all(1) if joint else inside.mean(1)).mean()

    assert coverage(0.0) < 0.5
    # Of 100 bags to measure by and 300 to be measured: four standard deviations.
    deviation = np.sqrt(level * (1 - level) * (1 / 100 + 1 / 300))
    assert abs(coverage(wider) - level) < 4 * deviation


@pytest.mark.parametrize(("number", "whole"), [(18, True), (19, False)])
def test_too_few_bags_say_nothing(number, whole):
    wider = predict.margin(
        Biased(), {"bias": 0.1}, known_bags(number, 0), 20, jax.random.key(0), 0.95
    )
    assert (wider == 1).all() == whole


def test_no_margin_where_intervals_are_wide_enough():
    model, variables = Biased(), {"bias": 0.0}
    bags = [(np.linspace(0, 1, 64)[:, None], np.array([0.5, 0.5]))] * 30
    wider = predict.margin(model, variables, bags, 50, jax.random.key(0), 0.9)
    np.testing.assert_array_equal(wider, [0, 0])


@settings(max_examples=30)
@given(st.integers(2, 7), st.sampled_from([0.5, 0.9, 0.95]), st.integers(0, 99))
def test_a_joint_region_holds_its_share_of_whole_resamples(classes, level, seed):
    draws = np.random.default_rng(seed).dirichlet(np.ones(classes), 300)
    draws[draws < 0.05] = 0  # ties, as where a class is absent
    low, high = predict.confidence_box(draws, level, joint=True)

    def share(low, high):
        return ((low <= draws) & (draws <= high)).all(1).mean()

    assert share(low, high) >= level
    marginal = predict.confidence_box(draws, level)
    assert (low <= marginal[0]).all() and (high >= marginal[1]).all()


def test_a_joint_region_is_no_wider_than_it_must_be():
    draws = np.random.default_rng(0).standard_normal((4000, 5))
    low, high = predict.confidence_box(draws, 0.9, joint=True)
    # Each of five independent classes must hold 0.9 to the power of 1/5.
    expected = norm.ppf((1 + 0.9 ** (1 / 5)) / 2)
    np.testing.assert_allclose([-low, high], np.full((2, 5), expected), rtol=0.08)


def test_joint_intervals_are_wider(predicted):
    alone, together = predicted("test"), predicted("test", "--joint")
    widths = {"alone": [], "together": []}
    for name, row in alone.items():
        np.testing.assert_array_equal(vector(row), vector(together[name]))
        for key, ends in (("alone", row), ("together", together[name])):
            widths[key].append(vector(ends, "_high") - vector(ends, "_low"))
    assert np.mean(widths["together"]) > np.mean(widths["alone"])


# Mistakes.


@pytest.fixture
def mistaken(refused, finished, tmp_path):
    def run(source, *flags):
        output = tmp_path / "predictions.csv"
        flags = ["--mode=predict", f"--bags={source}", f"--output={output}", *flags]
        message = refused(*flags, workdir=finished)
        assert not output.exists()
        assert "\n" not in message
        return message

    return run


@pytest.mark.parametrize(
    ("bag", "part"),
    [
        (np.zeros((5, 7, 8, 1)), "(8, 8, 1) of the dataset digits, not (7, 8, 1)"),
        (np.zeros((5, 64)), "not (64,)"),
        (np.zeros(()), "not ()"),
        (np.zeros((0, 8, 8, 1)), "bag wrong is empty"),
        (np.full((5, 8, 8, 1), np.nan), "holds NaN or infinite values"),
        (np.full((5, 8, 8, 1), np.inf), "holds NaN or infinite values"),
        (np.full((5, 8, 8, 1), "a"), "not numbers"),
        (np.full((5, 8, 8, 1), None), "Could not read"),
    ],
)
def test_a_wrong_bag_is_named(mistaken, tmp_path, bag, part):
    good = np.zeros((5, 8, 8, 1))
    np.savez(tmp_path / "bags.npz", good=good, wrong=bag)
    message = mistaken(tmp_path / "bags.npz")
    assert part in message
    assert "bags.npz" in message


def spoiled(tmp_path, how):
    path = tmp_path / "bags.npz"
    np.savez(path, bag=np.arange(640.0).reshape(10, 8, 8, 1))
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + b"?!" + content[middle + 2 :])
    elif how == "password":
        # A bit of the entry in the directory at the end.
        entry = content.index(b"PK\x01\x02") + 8
        path.write_bytes(content[:entry] + b"\x01" + content[entry + 1 :])
    elif how == "text":
        path.write_text("no archive")
    elif how == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros((5, 8, 8, 1)))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "no bag":
        np.savez(path)
    return path


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "empty",
        "truncated",
        "flipped",
        "password",
        "text",
        "npy",
        "folder",
        "no bag",
    ],
)
def test_a_file_that_is_no_archive_is_a_sentence(mistaken, tmp_path, how):
    message = mistaken(spoiled(tmp_path, how))
    assert message.startswith(("Could not read", f"{tmp_path / 'bags.npz'} holds"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "holds no bag"),
        ("a,b\n", "holds no bag"),
        ("a,b\n1,2\n", "2 feature columns where the model takes 64"),
        ("a,b\n1\n", "line 2 has another number of columns"),
        ("a,b\n1,2,3\n", "line 2 has another number of columns"),
        ("a,b\n1,x\n", "could not convert string to float: 'x'"),
        ("a,b\n1,\n", "could not convert"),
        ("a,b,a\n1,2,3\n", "the header names a column twice"),
        ("0.5,1\n1,2\n", "the first line is no header: it holds numbers"),
    ],
)
def test_a_wrong_csv_is_a_sentence(mistaken, tmp_path, text, part):
    (tmp_path / "bags.csv").write_text(text)
    assert part in mistaken(tmp_path / "bags.csv")


def test_nan_in_a_csv_is_found(mistaken, digits, tmp_path):
    inputs = digits["inputs"][:3].astype(float)
    inputs[1, 2, 3] = np.nan
    assert "holds NaN" in mistaken(write_csv(tmp_path / "bags.csv", inputs))


def test_another_suffix_is_a_sentence(mistaken, tmp_path):
    (tmp_path / "bags.txt").write_text("1")
    for source in (tmp_path / "bags.txt", "train"):
        assert "must be validation, test, a .npz or a .csv file" in mistaken(source)


def test_a_missing_csv_is_a_sentence(mistaken, tmp_path):
    assert "No such file" in mistaken(tmp_path / "bags.csv")


def test_an_output_that_cannot_be_written_is_a_sentence(refused, finished, tmp_path):
    flags = ["--mode=predict", "--bags=test", f"--output={tmp_path}"]
    message = refused(*flags, "--bootstrap=1", workdir=finished)
    assert message.startswith(f"Could not write {tmp_path}: ")


def test_prediction_without_a_checkpoint_is_a_sentence(refused, copy_of, finished):
    workdir = copy_of(finished)
    shutil.rmtree(workdir / "checkpoints")
    message = refused("--mode=predict", "--bags=test", workdir=workdir)
    assert "There is no checkpoint in" in message
