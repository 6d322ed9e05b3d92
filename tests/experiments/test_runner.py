"""Whole runs, their interruptions, and what may happen to their workdir."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from experiments import metrics

ROOT = Path(__file__).parents[2]


def rows_of(workdir, split=None):
    rows = metrics.read_rows(workdir)
    return [row for row in rows if split in (None, row["split"])]


def wait_for(process, workdir, step, split=None):
    """Returns once a row of `step` or later is written."""
    deadline = time.monotonic() + 100
    while not any(row["step"] >= step for row in rows_of(workdir, split)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def checkpoint_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


# A run.


def test_the_workdir_tells_all(finished):
    files = {path.name for path in finished.iterdir()}
    assert files == {
        ".lock",
        "checkpoints",
        "config.json",
        "evaluation.json",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
        "test_bags.npz",
        "versions.json",
    }
    versions = json.loads((finished / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["backend"] == "cpu, 1 device(s)"
    assert "scikit-learn" in versions["dataset_source"]
    assert versions["commit"]
    steps = [row["step"] for row in rows_of(finished, "validation")]
    assert steps == [10, 20, 30, 40]
    assert checkpoint_steps(finished)[-2:] == [30, 40]
    evaluation = json.loads((finished / "evaluation.json").read_text())
    best = min(rows_of(finished, "validation"), key=lambda row: row["absolute_error"])
    assert evaluation["step"] == best["step"]
    saved = np.load(finished / "test_bags.npz")
    assert evaluation["test"]["absolute_error"] == pytest.approx(
        np.abs(saved["true"] - saved["HistNetQ"]).mean(), rel=1e-4
    )


def test_events_hold_the_rows_and_the_speed(finished, events):
    found = {(step, name): value for step, name, value in events(finished)}
    rows = {
        (row["step"], f"{row['split']}/{name}"): value
        for row in rows_of(finished)
        for name, value in row.items()
        if name not in ("step", "split")
    }
    speed = {key: found.pop(key) for key in list(found) if key not in rows}
    assert found == pytest.approx(rows, rel=1e-6)
    assert set(speed) == {(step, "steps_per_second") for step in range(5, 41, 5)}
    assert all(value > 0 for value in speed.values())


def test_tensorflow_is_not_needed():
    code = "import experiments.runner, sys; print('tensorflow' in sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert shown.strip() == "False"


def test_the_same_command_again_changes_nothing(
    main, tiny, finished, copy_of, same_end, contents
):
    workdir = copy_of(finished)
    outcome = main(f"--config={tiny}", f"--workdir={workdir}")
    assert outcome.code == 0
    assert "step 5/40" not in outcome.err
    same_end(workdir, finished)
    assert contents(workdir / "checkpoints") == contents(finished / "checkpoints")


def test_the_seed_decides(main, tiny, finished, tmp_path, same_end):
    outcome = main(f"--config={tiny}", f"--workdir={tmp_path / 'same'}")
    assert outcome.code == 0
    same_end(tmp_path / "same", finished)
    assert outcome.out.startswith("test (2 batches, checkpoint of step ")
    assert "Report: " in outcome.out
    flags = ["--config.seed=1", "--config.training.num_steps=10"]
    outcome = main(f"--config={tiny}", f"--workdir={tmp_path / 'other'}", *flags)
    assert outcome.code == 0
    assert rows_of(tmp_path / "other")[0] != rows_of(finished)[0]


def test_steps_per_call_change_nothing_but_rounding(main, tiny, finished, tmp_path):
    flags = ["--config.training.steps_per_call=1", "--config.training.log_every=5"]
    outcome = main(f"--config={tiny}", f"--workdir={tmp_path / 'w'}", *flags)
    assert outcome.code == 0
    assert_close(rows_of(tmp_path / "w"), rows_of(finished), 1e-4)


def assert_close(rows, others, tolerance):
    for row, other in zip(rows, others, strict=True):
        row, other = dict(row), dict(other)
        assert row.pop("split") == other.pop("split")
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


def test_evaluation_alone(main, finished, copy_of, contents):
    workdir = copy_of(finished)
    for name in ("evaluation.json", "report.html"):
        (workdir / name).unlink()
    outcome = main("--mode=eval", f"--workdir={workdir}")
    assert outcome.code == 0
    assert (workdir / "evaluation.json").read_bytes() == (
        finished / "evaluation.json"
    ).read_bytes()
    assert (workdir / "report.html").exists()
    assert contents(workdir / "checkpoints") == contents(finished / "checkpoints")


def test_evaluation_of_nothing_is_a_sentence(refused, tmp_path):
    assert "There is no run in" in refused("--mode=eval")
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "w"
    assert "There is no run in" in refused("--mode=eval", workdir=workdir)


def test_a_finished_run_takes_no_overrides(refused, finished):
    message = refused("--mode=eval", "--config.seed=3", workdir=finished)
    assert "--config.FIELD changes nothing" in message


def test_classification_runs_too(main, tiny, tmp_path, refused):
    workdir = tmp_path / "w"
    outcome = main(
        f"--config={tiny}",
        f"--workdir={workdir}",
        "--config.task.name=Classification",
        "--config.task.batch_size=50",
        "--config.model.name=Classifier",
        "--config.precision=bfloat16",
    )
    assert outcome.code == 0, outcome.err
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert set(evaluation["test"]) == {"cross_entropy", "accuracy"}
    message = refused("--mode=predict", "--bags=test", workdir=workdir)
    assert "needs a run with config.task.name=Quantification" in message


# Interruptions.


def test_a_killed_run_resumes_bit_for_bit(
    main, start, tiny, finished, tmp_path, same_end
):
    workdir = tmp_path / "killed"
    flags = [f"--config={tiny}", f"--workdir={workdir}"]
    for step in (20, 30):
        process = start(*flags)
        wait_for(process, workdir, step)
        process.send_signal(signal.SIGSTOP)
        # Another process is refused meanwhile.
        outcome = main(*flags)
        assert outcome.code == 1
        assert "Another run is at work in" in outcome.err
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert not (workdir / "evaluation.json").exists()
    outcome = main(*flags)
    assert outcome.code == 0
    assert "Resuming from the checkpoint of step" in outcome.err
    same_end(workdir, finished)


def test_a_terminated_run_is_saved_and_resumes(main, start, tiny, tmp_path, same_end):
    # Long enough for the signal to come in time.
    flags = [f"--config={tiny}", "--config.training.num_steps=80"]
    workdir = tmp_path / "terminated"
    process = start(*flags, f"--workdir={workdir}")
    wait_for(process, workdir, 5)
    process.terminate()
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert "Traceback" not in shown
    last = shown.splitlines()[-1]
    assert last.startswith("SIGTERM: saved step ")
    step = int(last.split("saved step ")[1].split(".")[0])
    assert checkpoint_steps(workdir)[-1] == step
    outcome = main(*flags, f"--workdir={workdir}")
    assert f"Resuming from the checkpoint of step {step}." in outcome.err
    assert main(*flags, f"--workdir={tmp_path / 'straight'}").code == 0
    same_end(workdir, tmp_path / "straight")


def test_a_run_terminated_while_it_evaluates_resumes(
    main, start, tiny, tmp_path, same_end
):
    flags = [f"--config={tiny}", "--config.task.validation_bags=5000"]
    process = start(*flags, f"--workdir={tmp_path / 'terminated'}")
    wait_for(process, tmp_path / "terminated", 10, "train")
    process.terminate()
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert "SIGTERM: saved step 10." in shown
    assert not rows_of(tmp_path / "terminated", "validation")
    for name in ("terminated", "straight"):
        assert main(*flags, f"--workdir={tmp_path / name}").code == 0
    same_end(tmp_path / "terminated", tmp_path / "straight")


def test_an_interrupt_from_the_keyboard_saves_too(start, tiny, tmp_path):
    flags = [f"--config={tiny}", "--config.training.num_steps=1000"]
    process = start(*flags, f"--workdir={tmp_path / 'w'}")
    wait_for(process, tmp_path / "w", 5)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "SIGINT: saved step " in shown.splitlines()[-1]


# Damage.


def largest(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_costs_only_time(
    main, tiny, finished, copy_of, same_end, damage
):
    workdir = copy_of(finished)
    # It is the best as well: everything depends on it.
    damage(largest(workdir / "checkpoints" / "40"))
    outcome = main(f"--config={tiny}", f"--workdir={workdir}")
    assert outcome.code == 0
    assert "Traceback" not in outcome.err
    assert "warning: The checkpoint of step 40 cannot be read" in outcome.err
    assert "Resuming from the checkpoint of step 30." in outcome.err
    assert (workdir / "damaged_checkpoints" / "40").is_dir()
    same_end(workdir, finished)


def test_without_a_whole_checkpoint_the_run_stops(refused, tiny, finished, copy_of):
    workdir = copy_of(finished)
    steps = checkpoint_steps(workdir)
    for step in steps:
        truncate(largest(workdir / "checkpoints" / str(step)))
    message = refused("--mode=eval", workdir=workdir)
    assert "The best checkpoint, of step" in message and "cannot be read" in message
    message = refused_in(workdir, tiny)
    assert "None of the checkpoints in" in message
    kept = sorted(
        int(path.name) for path in (workdir / "damaged_checkpoints").iterdir()
    )
    assert kept == steps


def refused_in(workdir, tiny, limit="true"):
    """The message of a process that stops, started from a shell with a limit."""
    process = subprocess.run(
        ["sh", "-c", f'{limit} && exec "$@"', "sh", sys.executable, "run.py"]
        + [f"--config={tiny}", f"--workdir={workdir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert "Exception ignored" not in process.stderr
    return process.stderr


def test_a_damaged_config_is_a_sentence(refused, tiny, finished, copy_of):
    workdir = copy_of(finished)
    truncate(workdir / "config.json")
    for flags in (["--mode=eval"], [f"--config={tiny}"]):
        message = refused(*flags, workdir=workdir)
        assert "config.json cannot be read" in message


# The wrong workdir.


def test_another_config_is_refused_and_changes_nothing(
    refused, tiny, finished, copy_of, contents
):
    workdir = copy_of(finished)
    before = contents(workdir)
    message = refused(
        f"--config={tiny}",
        "--config.optimizer.learning_rate=0.5",
        "--config.model.encoder.hidden_sizes=(9,)",
        workdir=workdir,
    )
    assert "holds a run with another config" in message
    assert "config.optimizer.learning_rate: 0.01 there, 0.5 here" in message
    assert "config.model.encoder.hidden_sizes: [8] there, (9,) here" in message
    assert len(message.splitlines()) == 4
    assert contents(workdir) == before
    message = refused("--mode=eval", f"--config={tiny}:deepsets", workdir=workdir)
    assert "config.model.name" in message
    assert contents(workdir) == before


def test_a_workdir_that_cannot_be_is_a_sentence(refused, tiny, tmp_path):
    (tmp_path / "file").write_text("precious")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refused(f"--config={tiny}", workdir=workdir)
        assert message.startswith(f"The workdir {workdir} cannot be written: ")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("free", [0, 64])
def test_a_full_disk_harms_nothing(
    main, tiny, finished, copy_of, small_disk, same_end, contents, free
):
    workdir = shutil.copytree(copy_of(finished, upto=30), small_disk / "run")
    checkpoints = contents(workdir / "checkpoints")
    assert checkpoints
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        left = shutil.disk_usage(small_disk).free - free * 1024
        filler.write(b"x" * left)
    message = refused_in(workdir, tiny)
    (line,) = [line for line in message.splitlines() if line.startswith("run.py: ")]
    assert "Could not write" in line
    assert "No space left on device" in line
    after = contents(workdir / "checkpoints")
    assert {name: after[name] for name in checkpoints} == checkpoints
    (small_disk / "filler").unlink()
    assert main(f"--config={tiny}", f"--workdir={workdir}").code == 0
    same_end(workdir, finished)


@pytest.mark.slow
def test_a_limit_on_file_sizes_harms_nothing(
    main, tiny, finished, copy_of, same_end, contents
):
    workdir = copy_of(finished, upto=30)
    checkpoints = contents(workdir / "checkpoints")
    # In blocks of 512 or 1,024 bytes. The cache of compilations is not the matter here.
    limit = "export JAX_ENABLE_COMPILATION_CACHE=false; ulimit -f 8"
    message = refused_in(workdir, tiny, limit)
    assert "Could not write" in message
    after = contents(workdir / "checkpoints")
    assert {name: after[name] for name in checkpoints} == checkpoints
    assert main(f"--config={tiny}", f"--workdir={workdir}").code == 0
    same_end(workdir, finished)


# Mistakes that show in training.


def test_a_diverging_run_stops_with_the_step_and_the_metric(refused_run):
    message = refused_run(
        "--config.optimizer.name=sgd", "--config.optimizer.learning_rate=1e38"
    )
    assert "Training stopped: " in message
    assert " at step " in message
    assert "There is no checkpoint yet." in message


@pytest.fixture
def refused_run(main, tiny, tmp_path):
    def run(*flags):
        outcome = main(f"--config={tiny}", f"--workdir={tmp_path / 'w'}", *flags)
        assert outcome.code == 1
        assert "Traceback" not in outcome.err
        return outcome.err

    return run


class Ordered(archs.DeepSets):
    """Weighs an element by its place: no set network."""

    def aggregate(self, features, mask=None, weights=None):
        place = jnp.arange(features.shape[1])[:, None]
        mask = 1 if mask is None else mask[..., None]
        return (place * features * mask).mean(1)


def test_a_model_that_reads_the_order_is_stopped(refused_run, monkeypatch):
    monkeypatch.setattr(archs, "Ordered", Ordered, raising=False)
    monkeypatch.setattr(archs, "__all__", [*archs.__all__, "Ordered"])
    flags = [
        "--config.model.name=Ordered",
        "--config.model.phi.name=MLP",
        "--config.model.phi.hidden_sizes=()",
        "--config.model.phi.features=4",
        "--config.model.rho.name=PrevalenceHead",
        "--config.model.rho.hidden_sizes=()",
    ]
    message = refused_run(*flags)
    assert "The model breaks a contract on the first batch" in message
    assert "permutation" in message
    assert "config.check_contracts=False trains it all the same" in message


# Devices and compilations.


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(main, tiny, finished, copy_of, tmp_path):
    resumed = copy_of(finished, upto=30, name="resumed")
    eight = tmp_path / "eight"
    code = (
        "import sys; from experiments.runner import main; import jax\n"
        "assert jax.device_count() == 8\n"
        "for workdir in sys.argv[2:]:\n"
        "    assert not main([f'--config={sys.argv[1]}', f'--workdir={workdir}'])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tiny, eight, resumed],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        check=True,
        timeout=200,
    )
    versions = json.loads((eight / "versions.json").read_text())
    assert versions["backend"] == "cpu, 8 device(s)"
    assert_close(rows_of(eight), rows_of(finished), 1e-4)
    assert_close(rows_of(resumed), rows_of(finished), 1e-4)
    # And back to one.
    shutil.rmtree(eight / "checkpoints" / "40")
    assert main(f"--config={tiny}", f"--workdir={eight}").code == 0
    assert_close(rows_of(eight), rows_of(finished), 1e-4)


@pytest.mark.slow
def test_programs_are_compiled_once_for_all_runs(start, tiny, tmp_path):
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
    }
    shown = []
    for name in ("first", "second"):
        process = start(
            f"--config={tiny}",
            f"--workdir={tmp_path / name}",
            "--config.training.num_steps=10",
            environment=environment,
        )
        shown.append(process.communicate(timeout=100)[1])
        assert process.returncode == 0
    entries = list((tmp_path / "cache" / "archs" / "jax").iterdir())
    assert any("jit_run" in path.name for path in entries)
    hit = "Persistent compilation cache hit for 'jit_run'"
    assert hit not in shown[0]
    assert hit in shown[1]
    assert "PERSISTENT COMPILATION CACHE MISS" not in shown[1]
