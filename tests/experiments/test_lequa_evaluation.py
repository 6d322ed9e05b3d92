"""The organisers' measures, against QuaPy's and by hand."""

import numpy as np
import pytest
import quapy

import data
from data.lequa import write_prevalences
from experiments import lequa_evaluation
from experiments.lequa_evaluation import evaluate


def draw(num_classes, num_bags=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(num_classes), (2, num_bags))


@pytest.mark.parametrize(("task", "size"), [("T1A", 250), ("T2", 1000), ("T4", 250)])
def test_errors_are_those_of_quapy(task, size):
    true, estimate = draw(28 if task == "T2" else 2)
    errors = evaluate(task, true, estimate)
    rae = quapy.error.rae(true, estimate, eps=1 / (2 * size))
    ae = quapy.error.ae(true, estimate)
    assert errors == {
        "MRAE": pytest.approx((rae.mean(), rae.std()), rel=1e-4),
        "MAE": pytest.approx((ae.mean(), ae.std()), rel=1e-4),
    }


def test_ordered_classes_are_measured_by_match_distance():
    true, estimate = draw(5)
    errors = evaluate("T3", true, estimate)
    nmd = np.array(
        [quapy.error.nmd(*pair) for pair in zip(true, estimate, strict=True)]
    )
    assert errors["MNMD"] == pytest.approx((nmd.mean(), nmd.std()))


def test_the_macro_average_is_over_bins_of_stars():
    one, five = np.eye(5)[0], np.eye(5)[4]
    # Mean stars 1, 1.4, 4.2 and 5; the last is in no bin.
    true = np.array([one, 0.9 * one + 0.1 * five, 0.2 * one + 0.8 * five, five])
    estimate = np.tile(one, (4, 1))
    # NMD 0, 0.1, 0.8, 1; bins of means 0.05, 0, 0, 0.8.
    errors = evaluate("T3", true, estimate)
    bins = np.array([0.05, 0, 0, 0.8])
    assert errors["macro-NMD"] == pytest.approx((bins.mean(), bins.std()))
    assert errors["MNMD"][0] == pytest.approx(1.9 / 4)


@pytest.fixture
def run(tmp_path, capsys):
    """Scores two arrays by the command line: code, output, errors."""

    def score(task, *arrays):
        paths = [tmp_path / "true.txt", tmp_path / "predicted.txt"]
        for path, array in zip(paths, arrays, strict=True):
            write_prevalences(path, array)
        code = lequa_evaluation.main([task, *map(str, paths)])
        return code, *capsys.readouterr()

    return score


def test_the_command_prints_both_measures(run):
    true, estimate = draw(2, 1000)
    code, out, err = run("T1", true, estimate)
    assert code == 0 and not err
    shown = {
        name: tuple(map(float, values.split(" ~ ")))
        for name, values in (line.split(": ") for line in out.splitlines())
    }
    # The files have eight digits, the scores five.
    assert shown == {
        name: pytest.approx(values, abs=2e-5)
        for name, values in evaluate("T1", true, estimate).items()
    }


def test_a_number_of_bags_that_the_official_scorer_refuses_is_noted(run):
    assert "takes 1,000 or 5,000 bags, not 30" in run("T1", *draw(2))[2]


@pytest.mark.parametrize(
    ("task", "arrays", "message"),
    [
        ("T5", draw(2), "TASK must be one of T1A, T1B, T1, T2, T3, T4, not 'T5'"),
        ("T1", [draw(2)[0], draw(2, 29)[0]], "TRUE holds 30 bags of 2 classes, PRED"),
        ("T1", [draw(2)[0], draw(3)[0]], "PREDICTED 30 of 3"),
        ("T3", draw(4), "T3 has 5 classes, not 4"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(run, task, arrays, message):
    code, out, err = run(task, *arrays)
    assert code == 1 and not out
    assert message in err and "Traceback" not in err


def test_a_missing_file_is_a_sentence(tmp_path, capsys):
    code = lequa_evaluation.main(["T1", str(tmp_path / "a"), str(tmp_path / "b")])
    assert code == 1
    assert "a cannot be read: No such file" in capsys.readouterr().err
    with pytest.raises(data.DataError):
        evaluate("T2A", *draw(2))
