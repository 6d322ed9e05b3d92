"""From the command line to a trained, evaluated and reported run."""

import argparse
import difflib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

import data
from experiments import config as configs
from experiments import loop, predict, report, tasks
from experiments.errors import UserError
from experiments.optimizers import Optimizer
from experiments.progress import Progress, format_values, parameter_table

MODES = ("train", "eval", "predict")
USAGE = """\
python run.py --config=FILE.py[:VARIANT] --workdir=DIR [--config.FIELD=VALUE ...]
python run.py --mode=eval --workdir=DIR
python run.py --mode=predict --workdir=DIR --bags=FILE.npz|FILE.csv|validation|test

train    trains, or resumes from the latest checkpoint in the workdir, evaluates on the
         test split and writes report.html
eval     evaluates the best checkpoint on the test split and writes report.html anew
predict  writes the prevalences of bags, with 95 % intervals, to --output
"""


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code.

    Args:
      argv: the arguments after the program's name.
    """
    warnings.showwarning = _show_warning
    # Background tasks of orbax and tensorboardX tell of damage and of a full disk in
    # tracebacks; the run tells of it in a sentence.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = threading.excepthook = lambda hidden: None
    try:
        _run(argv)
    except (UserError, data.DataError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except loop.Interrupted as interruption:
        print(interruption, file=sys.stderr)
    except KeyboardInterrupt:
        print("run.py: interrupted.", file=sys.stderr)
        return 130
    return 0


def _show_warning(message, category, filename, lineno, file=None, line=None):
    print(f"warning: {message}", file=sys.stderr)


def _run(argv: Sequence[str]) -> None:
    options, overrides = _parse(argv)
    workdir = Path(options.workdir).absolute()
    _enable_compilation_cache()
    if options.mode == "train":
        config = configs.load(options.config, overrides)
        dataset, task, training = build(config)
        with _locked(workdir):
            _check_same_config(workdir, config)
            _describe(workdir, config, dataset)
            _train(workdir, config, task, training)
            _evaluate(workdir, config, task)
    else:
        config = _stored_config(workdir, options.config, overrides)
        dataset, task, _ = build(config)
        if options.mode == "eval":
            with _locked(workdir):
                _evaluate(workdir, config, task)
        else:
            if not isinstance(task, (tasks.Quantification, tasks.BagQuantification)):
                raise UserError(
                    "--mode=predict estimates prevalences: it needs a run with "
                    "config.task.name=Quantification or BagQuantification."
                )
            step, state = loop.best_state(workdir, task, config.seed)
            output = Path(options.output or workdir / "predictions.csv")
            count = predict.predict(
                task,
                state,
                options.bags,
                output,
                options.bootstrap,
                config.seed,
                options.joint,
            )
            print(
                f"Wrote the prevalences of {count} bags, by the checkpoint of step "
                f"{step}, to {output}"
            )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message}\n\n{USAGE}")

    parser = Parser(
        prog="run.py",
        usage=USAGE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="config file, with its variant after a colon")
    parser.add_argument("--workdir", help="where the run's files are", required=True)
    parser.add_argument("--mode", default="train", help="train, eval or predict")
    parser.add_argument("--bags", help="predict: an npz or csv file, or a split")
    parser.add_argument("--output", help="predict: csv file; WORKDIR/predictions.csv")
    parser.add_argument(
        "--bootstrap", type=int, default=200, help="predict: number of resamples"
    )
    parser.add_argument(
        "--joint",
        action="store_true",
        help="predict: intervals that hold for all classes at once",
    )
    options, rest = parser.parse_known_args(argv)
    overrides, rest = _overrides(rest)
    if rest:
        known = [action.option_strings[0] for action in parser._actions]
        near = difflib.get_close_matches(rest[0].split("=")[0], known, n=1)
        raise UserError(
            f"unknown argument {rest[0]!r}"
            + (f"; did you mean {near[0]}?" if near else "")
            + f"\n\n{USAGE}"
        )
    if options.mode not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}.")
    if options.mode == "train" and not options.config:
        raise UserError(f"--config is required to train.\n\n{USAGE}")
    if options.mode == "predict" and not options.bags:
        raise UserError(f"--bags is required to predict.\n\n{USAGE}")
    if options.bootstrap < 1:
        raise UserError("--bootstrap must be 1 or more.")
    return options, overrides


def _overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Splits off `--config.FIELD=VALUE` and `--config.FIELD VALUE`."""
    overrides, rest, waiting = {}, [], None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--"):
            overrides[waiting], waiting = argument, None
        elif waiting is not None:
            break
        elif argument.startswith("--config."):
            field, equals, value = argument.removeprefix("--config.").partition("=")
            if equals:
                overrides[field] = value
            else:
                waiting = field
        else:
            rest.append(argument)
    if waiting is not None:
        raise UserError(f"--config.{waiting} needs a value.")
    return overrides, rest


def _enable_compilation_cache() -> None:
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "archs" / "jax"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load_run(workdir: Path) -> tuple[loop.Task, ConfigDict]:
    """Task and config of the run in a workdir."""
    config = _stored_config(workdir, None, {})
    return build(config)[1], config


def build(config: ConfigDict) -> tuple[data.Dataset, loop.Task, loop.Training]:
    """Dataset, task and training of a completed config.

    Raises:
      UserError, data.DataError: when a section's values are impossible, the dataset
        cannot be had, or the model does not fit it.
    """
    sections = config.to_dict()
    top = {key: sections[key] for key in ("seed", "precision", "check_contracts")}
    configs.instantiate(
        "config", partial(configs.Experiment, dataset={}, model={}, task={}), top
    )
    training = configs.instantiate(
        "config.training", loop.Training, sections["training"]
    )
    optimizer = configs.instantiate(
        "config.optimizer", Optimizer, sections["optimizer"]
    )
    dataset = configs.build_dataset(sections["dataset"])
    model = configs.build_module(
        sections["model"],
        spec=dataset.spec,
        precision=config.precision,
    )
    fields = dict(sections["task"])
    task = configs.instantiate(
        "config.task",
        getattr(tasks, fields.pop("name")),
        fields,
        model=model,
        dataset=dataset,
        optimizer=optimizer,
        training=training,
    )
    try:
        jax.eval_shape(task.sample, jax.random.key(0), np.int32(0), task.arrays)
        for split in ("validation", "test"):
            draw = partial(task.eval_batch, split)
            jax.eval_shape(draw, np.int32(0), task.arrays)
    except ValueError as error:
        raise UserError(f"config.task: {error}") from error
    try:
        loop.state_template(task, config.seed)
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        message = str(error).strip().splitlines()
        raise UserError(
            f"config.model does not fit the dataset {dataset.spec.name}: "
            f"{message[0] if message else type(error).__name__}"
        ) from error
    return dataset, task, training


class _locked:
    """Holds the workdir, made when missing, against a second run in it."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def __enter__(self):
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = (self._workdir / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"The workdir {self._workdir} cannot be written: {error.strerror}. "
                "Choose another --workdir."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"Another run is at work in {self._workdir}. Wait for it, or choose "
                "another --workdir."
            ) from None

    def __exit__(self, kind, error, traceback):
        self._file.close()
        if isinstance(error, OSError):
            raise UserError(
                f"Could not write to {self._workdir}: {error.strerror or error}. Free "
                "space or choose another --workdir; what was there is untouched, and "
                "the same command resumes."
            ) from error


def _check_same_config(workdir: Path, config) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    lines = configs.differences(_read_config(path), config.to_dict())
    if lines:
        raise UserError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(lines)
            + "\nChoose another --workdir, or give the config of that run to resume it."
        )


def _read_config(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _stored_config(workdir: Path, config_flag: str | None, overrides):
    """The workdir's config; a --config besides must not contradict it."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"There is no run in {workdir}: it has no config.json.")
    if config_flag:
        config = configs.load(config_flag, overrides)
        _check_same_config(workdir, config)
        return config
    raw = _read_config(path)
    if overrides:
        raise UserError(
            "--config.FIELD changes nothing in a finished run: leave it out, or train "
            "in another --workdir."
        )
    return configs.ConfigDict(configs.complete(raw)).lock()


def _describe(workdir: Path, config, dataset: data.Dataset) -> None:
    """Writes config.json and versions.json."""
    write_json(workdir / "config.json", config.to_dict())
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
    versions = {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "commit": _commit(),
        "backend": f"{jax.default_backend()}, {jax.device_count()} device(s)",
        "dataset_source": dataset.spec.source,
    }
    write_json(workdir / "versions.json", versions)


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output(
            [*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with local changes" if changed.strip() else "")


def write_json(path: Path, value) -> None:
    """Writes a whole file or none."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _train(workdir: Path, config, task: loop.Task, training: loop.Training) -> None:
    shapes = loop.state_template(task, config.seed)
    print(parameter_table(getattr(shapes, "params", shapes)), file=sys.stderr)
    if config.check_contracts and not (workdir / "checkpoints").exists():
        _check_contracts(config, task)
    progress = Progress(training.num_steps)
    loop.train(task, training, workdir, config.seed, progress)


def _check_contracts(config, task: loop.Task) -> None:
    check = getattr(task, "check_contracts", None)
    if check is None:
        return
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    state = loop.first_state(task, config.seed)
    batch = jax.jit(task.sample)(key, np.int32(0), task.arrays)
    try:
        check(state, batch)
    except AssertionError as error:
        raise UserError(
            f"The model breaks a contract on the first batch: {error}\n"
            "config.check_contracts=False trains it all the same."
        ) from error


def _evaluate(workdir: Path, config, task: loop.Task) -> None:
    step, state = loop.best_state(workdir, task, config.seed)
    measured = loop.compile_evaluation(task)(state, "test")
    if hasattr(task, "measure_test"):
        measured |= task.measure_test(state, workdir)
    sections = []
    if hasattr(task, "report"):
        sections = task.report(state, workdir, config.seed)
    write_json(workdir / "evaluation.json", {"step": step, "test": measured})
    path = report.write(workdir, sections)
    print(
        f"test ({task.num_eval_batches('test')} batches, checkpoint of step {step}): "
        f"{format_values(measured)}"
    )
    print(f"Report: {path}")
