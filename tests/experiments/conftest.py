"""A tiny config, and what several files need to run it and to look at a run."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import data
from experiments import loop, runner
from experiments.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]

TINY = textwrap.dedent(
    '''
    from ml_collections import ConfigDict


    def get_config(model="histnetq"):
        """`histnetq` or `deepsets`."""
        if model not in ("histnetq", "deepsets"):
            raise ValueError(f"there is no variant {model!r}")
        encoder = dict(name="MLP", hidden_sizes=(8,), features=4, dropout_rate=0.1)
        head = dict(name="PrevalenceHead", hidden_sizes=(8,))
        config = ConfigDict()
        config.dataset = dict(name="digits")
        if model == "histnetq":
            histogram = dict(name="LinearHistogram", num_bins=4)
            config.model = dict(
                name="HistNetQ", encoder=encoder, histogram=histogram, head=head
            )
        else:
            config.model = dict(name="DeepSets", phi=encoder, rho=head)
        config.task = dict(
            name="Quantification",
            num_bags=8,
            bag_size=10,
            validation_bags=25,
            test_bags=30,
            baselines=False,
        )
        config.optimizer = dict(learning_rate=0.01, schedule="cosine")
        config.training = dict(
            num_steps=40, steps_per_call=5, log_every=5, eval_every=10
        )
        return config
    '''
)


@pytest.fixture(autouse=True)
def _own_hooks(monkeypatch):
    # `main` sets them for its process.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of a config file: a small HistNetQ on digits, 40 steps."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return str(path)


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


def _main(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = runner.main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def main():
    """Runs `runner.main`: exit code and what it printed."""
    return _main


@pytest.fixture
def measured(tmp_path):
    """Runs a config with fields of it changed in `tmp_path`: measures of its test."""

    def run(config, fields=None):
        changed = (f"--config.{name}={value}" for name, value in (fields or {}).items())
        outcome = _main(f"--config={config}", f"--workdir={tmp_path}", *changed)
        assert outcome.code == 0, outcome.err
        return json.loads((tmp_path / "evaluation.json").read_text())["test"]

    return run


@pytest.fixture
def refused(tmp_path):
    """Runs `main` with a mistake: checks that it stops with a message, returns it."""

    def run(*arguments, workdir=None):
        workdir = workdir or tmp_path / "refused"
        outcome = _main(*arguments, f"--workdir={workdir}")
        assert outcome.code == 1
        assert outcome.err.startswith("run.py: ")
        assert "Traceback" not in outcome.err
        assert not outcome.out
        return outcome.err.removeprefix("run.py: ").rstrip("\n")

    return run


@pytest.fixture
def start():
    """Starts `run.py` in a process of its own."""
    running = []

    def popen(*arguments, environment=(), **options):
        running.append(
            subprocess.Popen(
                [sys.executable, "run.py", *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                **options,
            )
        )
        return running[-1]

    yield popen
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The workdir of an uninterrupted run of the tiny config; not to be changed."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    outcome = _main(f"--config={tiny}", f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    return workdir


@pytest.fixture
def copy_of(tmp_path):
    """Copies a workdir; `upto` leaves out the checkpoints after a step."""

    def copy(workdir, upto=None, name="copy"):
        target = shutil.copytree(workdir, tmp_path / name)
        for checkpoint in (target / "checkpoints").iterdir():
            if upto is not None and int(checkpoint.name) > upto:
                shutil.rmtree(checkpoint)
        return target

    return copy


def files_of(directory):
    """{path: bytes} of every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def contents():
    return files_of


def bits(tree):
    """The bytes of every leaf, for comparisons without tolerance."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


@pytest.fixture(scope="session")
def same_end():
    """Checks that two runs ended alike, bit for bit."""

    def last(workdir):
        task, config = runner.load_run(Path(workdir))
        checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
        step = checkpoints.steps()[-1]
        state, notes = checkpoints.restore(step, loop.state_template(task, config.seed))
        best = checkpoints.best_step()
        checkpoints.close()
        return step, best, notes, bits(state)

    def check(workdir, other):
        assert last(workdir) == last(other)
        for name in ("metrics.jsonl", "evaluation.json", "config.json"):
            assert (Path(workdir) / name).read_bytes() == (
                Path(other) / name
            ).read_bytes(), name

    return check


@pytest.fixture(scope="session")
def vectors():
    """A dataset of three classes of points in the plane."""
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [2, 0], [0, 2]], np.float32)

    def split(size):
        labels = np.arange(size) % 3
        noise = 0.6 * rng.normal(size=(size, 2)).astype(np.float32)
        return {"inputs": centres[labels] + noise, "labels": labels.astype(np.int32)}

    splits = {"train": split(90), "validation": split(30), "test": split(45)}
    spec = data.Spec(
        name="points",
        feature_shape=(2,),
        num_classes=3,
        class_names=("a", "b", "c"),
        sizes={name: len(s["labels"]) for name, s in splits.items()},
        source="made here",
        licence="",
        citation="",
        homepage="",
    )
    return data.Dataset(spec, splits, np.float32(0.5), np.float32(2))


def scalars(workdir):
    """(step, name, value) of all scalars, read as the TFRecord files they are."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        stream = path.read_bytes()
        while stream:
            (length,) = struct.unpack("<Q", stream[:8])
            event = event_pb2.Event.FromString(stream[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            stream = stream[12 + length + 4 :]
    return found


@pytest.fixture(scope="session")
def events():
    return scalars
