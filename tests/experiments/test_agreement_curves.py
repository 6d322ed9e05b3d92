import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import agreement_curves, figures
from experiments.cells import stack


def write(workdir, cell, attractors, accuracy):
    workdir.mkdir(parents=True)
    config = {"model": {"name": "SequenceClassifier", "stack": stack(cell, 4)}}
    (workdir / "config.json").write_text(json.dumps(config))
    np.savez(workdir / "test_sequences.npz", attractors=attractors, accuracy=accuracy)
    return workdir


@pytest.fixture
def workdirs(tmp_path):
    number = np.array([0, 0, 1, 1, 1, 1])
    return [
        write(tmp_path / "a", "plain_gru", number, [1, 1, 1, 1, 1, 0]),
        write(tmp_path / "b", "gru", number, [1, 0, 1, 0, 0, 0]),
        write(tmp_path / "c", "gru", np.array([0, 2]), [1, 0]),
    ]


def test_runs_are_read_by_cell_and_distance(workdirs):
    found = agreement_curves.curves(workdirs)
    assert list(found) == ["gru", "plain_gru"]
    numbers, accuracies = found["gru"]
    np.testing.assert_array_equal(numbers, [0, 1, 2])
    expected = [[0.5, 0.25, np.nan], [1, np.nan, 0]]
    np.testing.assert_array_equal(accuracies, expected)
    np.testing.assert_array_equal(found["plain_gru"][1], [[1, 0.75]])


def test_each_cell_has_a_line(workdirs):
    found = agreement_curves.curves(workdirs)
    (axes,) = figures.accuracy_by_distance(found, "attractors", 0.5).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines.keys() == {"chance", "gru", "plain_gru"}
    assert lines["gru"] == [[0, 0.75], [1, 0.25], [2, 0]]
    assert lines["plain_gru"] == [[0, 1], [1, 0.75]]


def test_the_command_draws_one_picture(workdirs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "curves"
    monkeypatch.setattr(sys, "argv", ["", f"--output={folder}", *map(str, workdirs)])
    assert agreement_curves.main() == 0
    assert imread(folder / "agreement.png").std() > 0
    assert capsys.readouterr().out.splitlines() == [
        "gru        2 runs  0: 0.750  1: 0.250  2: 0.000",
        "plain_gru  1 runs  0: 1.000  1: 0.750",
        str(folder / "agreement.png"),
    ]


def test_what_is_no_run_is_named(tmp_path, monkeypatch, capsys):
    argv = ["", f"--output={tmp_path}", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        agreement_curves.main()
    assert "none has no finished run of number_agreement.py" in capsys.readouterr().err
