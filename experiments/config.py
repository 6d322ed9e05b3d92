"""Configs: load a file, apply command-line overrides, check and complete every field.

Every section of a config is the keyword arguments of a Python signature:

==================  =====================================================
``config``          the fields of `Experiment`
``config.dataset``  the arguments of `data.load` or, where ``name`` is a class of
                    `data` that makes its sets itself, the fields of that class
``config.model``    ``name``: a module of `archs`; the rest: its fields, nested
                    modules being sections of the same form
``config.task``     ``name``: a task of `experiments.tasks`; the rest: its fields
``config.optimizer``  the fields of `experiments.optimizers.Optimizer`
``config.training`` the fields of `experiments.loop.Training`
==================  =====================================================

`complete` fills in the defaults of these signatures, so that every field can be
overridden from the command line and ``config.json`` names all of them, and stops at
a field that none of them has.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

import archs
import data
from experiments import tasks
from experiments.errors import UserError
from experiments.loop import Training
from experiments.optimizers import Optimizer

REQUIRED = inspect.Parameter.empty
# Fields of models that are the dataset's where a config leaves them None.
FROM_DATASET = ("num_classes", "vocabulary_size", "source_vocabulary_size")
PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The top level of a config.

    Attributes:
      dataset: a dataset by name, and the arguments of its factory, see
        `dataset_factory`.
      model: a module of `archs` by name, and its fields.
      task: a task of `experiments.tasks` by name, and its fields.
      optimizer: fields of `Optimizer`.
      training: fields of `Training`.
      seed: fixes initial weights, batches and dropout.
      precision: dtype of the model's computations: `float32` or `bfloat16`.
        Parameters, losses and measures are float32 either way.
      check_contracts: check on the first batch that the model keeps its contracts
        (a set network: permutation and padding invariance).
    """

    dataset: dict
    model: dict
    task: dict
    optimizer: dict = dataclasses.field(default_factory=dict)
    training: dict = dataclasses.field(default_factory=dict)
    seed: int = 0
    precision: str = "float32"
    check_contracts: bool = True

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, "
                f"not {self.precision!r}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32, not {self.seed}")


def load(config_flag: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The completed config of a file, with overrides.

    Args:
      config_flag: `path/of/file.py` or `path/of/file.py:variant`; the file defines
        `get_config()` or `get_config(variant)`.
      overrides: dotted field name (without `config.`) -> text of the value.

    Returns:
      A locked `ConfigDict` in which every field of every section is present.

    Raises:
      UserError: a missing or broken file, an unknown field or a wrong value.
    """
    raw = _read_file(config_flag)
    # Names first: they decide which other fields a section has.
    items = sorted((overrides or {}).items(), key=lambda kv: not _is_name(kv[0]))
    for path, text in items:
        _override(raw, path, text)
    return ConfigDict(complete(raw)).lock()


def _read_file(config_flag: str) -> dict:
    filename, _, variant = config_flag.partition(":")
    path = Path(filename)
    if not path.is_file():
        shipped = sorted(p.name for p in (Path(__file__).parent / "configs").glob("*"))
        shipped = [name for name in shipped if name.endswith(".py")]
        raise UserError(
            f"There is no config file {filename}. Shipped ones, in "
            f"experiments/configs: {', '.join(shipped)}."
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{filename}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{filename} defines no get_config() -> ConfigDict.")
    arguments = [variant] if variant else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise UserError(f"{filename}: get_config({variant!r}): {error}.") from error
    try:
        return ConfigDict(module.get_config(*arguments)).to_dict()
    except Exception as error:
        message = error.args[0] if error.args else type(error).__name__
        raise UserError(f"{filename}: {message}") from error


def _is_name(path: str) -> bool:
    return path.split(".")[-1] == "name"


def _override(raw: dict, path: str, text: str) -> None:
    *parents, field = path.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"config.{path}: config.{parent} has no fields of its own.")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if field == "name" and parents and parents[0] in ("dataset", "model", "task"):
        # The other fields in the file were the former module's: only those that
        # the new one has too are kept.
        if parents[0] == "dataset":
            signature = _signature(dataset_factory(value))
        else:
            signature = _named(".".join(["config", *parents]), value)
        for key in [k for k in section if k != "name" and k not in signature]:
            del section[key]
    section[field] = value


def complete(raw: Mapping) -> dict:
    """Checks a nested config against its signatures and fills in the defaults.

    Raises:
      UserError: naming the field, the fields of its section and the nearest name.
    """
    config = _section("config", raw, _signature(Experiment))
    config["dataset"] = _section(
        "config.dataset", config["dataset"], _dataset_signature(config["dataset"])
    )
    config["model"] = _named_section("config.model", config["model"])
    config["task"] = _named_section("config.task", config["task"])
    config["optimizer"] = _section(
        "config.optimizer", config["optimizer"], _signature(Optimizer)
    )
    config["training"] = _section(
        "config.training", config["training"], _signature(Training)
    )
    return config


def instantiate(path: str, factory: Callable, section: Mapping, **extra) -> Any:
    """Calls `factory` with a section's fields; a ValueError becomes a UserError."""
    try:
        return factory(**section, **extra)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def dataset_factory(name: Any) -> Callable:
    """The class of `data` of that name, if it has a `spec`; otherwise `data.load`."""
    classes = _dataset_classes() if isinstance(name, str) else {}
    return classes.get(name, data.load)


def build_dataset(section: Mapping) -> Any:
    """The dataset that `config.dataset` describes.

    Raises:
      UserError, data.DataError: when a value is impossible or the data are not there.
    """
    factory, fields = dataset_factory(section["name"]), dict(section)
    if factory is not data.load:
        del fields["name"]
    return instantiate("config.dataset", factory, fields)


def _dataset_classes() -> dict[str, type]:
    return {
        name: cls
        for name in data.__all__
        if isinstance(cls := getattr(data, name), type) and hasattr(cls, "spec")
    }


def _dataset_signature(section: Any) -> dict:
    name = section.get("name") if isinstance(section, Mapping) else None
    factory = dataset_factory(name)
    # Classes begin with a capital letter, the names of `data.load` do not.
    if factory is data.load and isinstance(name, str) and name[:1].isupper():
        classes = _dataset_classes()
        raise UserError(
            f"config.dataset.name: there is no {name!r} in data"
            f"{_nearest(name, classes)} It has: {', '.join(classes)}; for labelled "
            "examples see data.load."
        )
    own = {} if factory is data.load else {"name": (str, REQUIRED)}
    return own | _signature(factory)


def build_module(section: Mapping, *, spec: data.Spec, precision: str) -> nn.Module:
    """The module of `archs` that a section of `config.model` describes.

    Args:
      section: `name` and fields; sections in it are built likewise. Fields called like
        one of `FROM_DATASET` that it leaves `None` are the dataset's.
      spec: the dataset's.
      precision: the config's; sets every field called `dtype`.
    """
    cls = getattr(archs, section["name"])
    fields = {key: value for key, value in section.items() if key != "name"}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            fields[key] = build_module(value, spec=spec, precision=precision)
    for key in FROM_DATASET:
        if key in fields and fields[key] is None:
            fields[key] = getattr(spec, key)
    if any(field.name == "dtype" for field in dataclasses.fields(cls)):
        fields["dtype"] = PRECISIONS[precision]
    return cls(**fields)


def differences(old: Mapping, new: Mapping, prefix: str = "config") -> list[str]:
    """The dotted names of fields in which two configs differ, with both values."""
    lines = []
    for key in sorted({*old, *new}):
        path, a, b = f"{prefix}.{key}", old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, path)
        elif _plain(a) != _plain(b):
            lines.append(f"{path}: {a!r} there, {b!r} here")
    return lines


def _plain(value):
    return list(value) if isinstance(value, (tuple, list)) else value


def _named_section(path: str, section: Any) -> dict:
    if not isinstance(section, Mapping) or "name" not in section:
        raise UserError(f"{path} must be a section with a field `name`.")
    signature = _named(path, section["name"])
    completed = _section(path, section, {"name": (str, REQUIRED)} | signature)
    for key, value in completed.items():
        if path.startswith("config.model") and isinstance(value, Mapping):
            completed[key] = _named_section(f"{path}.{key}", value)
    return completed


def _named(path: str, name: str) -> dict:
    """The signature of the module or task that a `name` field names."""
    room, kind = (tasks, type) if path == "config.task" else (archs, nn.Module)
    choices = {
        public: cls
        for public in room.__all__
        if isinstance(cls := getattr(room, public), type)
        and (kind is type or issubclass(cls, kind))
    }
    if not isinstance(name, str) or name not in choices:
        raise UserError(
            f"{path}.name: there is no {name!r} in {room.__name__}"
            f"{_nearest(str(name), choices)} It has: {', '.join(choices)}."
        )
    return _signature(choices[name])


def _set_by_runner(target: Callable) -> set[str]:
    """Arguments of a section's target that are not fields of the section."""
    if inspect.isclass(target) and issubclass(target, nn.Module):
        return {"parent", "name", "dtype"}
    if target in vars(tasks).values():
        return {"model", "dataset", "optimizer", "training"}
    return set()


def _signature(target: Callable) -> dict[str, tuple[Any, Any]]:
    """Field name -> (annotation, default) of what a config section can set."""
    hints = typing.get_type_hints(
        target.__init__ if inspect.isclass(target) else target
    )
    signature = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in _set_by_runner(target):
            continue
        default = parameter.default
        if inspect.isclass(target) and dataclasses.is_dataclass(target):
            default = _dataclass_default(target, name)
        if isinstance(default, nn.Module):
            default = _module_section(default)
        signature[name] = (hints.get(name, Any), default)
    return signature


def _dataclass_default(cls: type, name: str) -> Any:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if name in FROM_DATASET else REQUIRED


def _module_section(module: nn.Module) -> dict:
    names = _signature(type(module))
    return {"name": type(module).__name__} | {
        name: getattr(module, name) for name in names
    }


def _section(path: str, given: Any, signature: Mapping) -> dict:
    if not isinstance(given, Mapping):
        raise UserError(f"{path} must be a section of fields, not {given!r}.")
    for key in given:
        if key not in signature:
            raise UserError(
                f"{path}.{key}: there is no such field"
                f"{_nearest(str(key), signature)} "
                f"Fields of {path}: {', '.join(signature)}."
            )
    completed = {}
    for key, (annotation, default) in signature.items():
        value = given.get(key, default)
        if value is REQUIRED:
            raise UserError(f"{path}.{key} is required and not set.")
        if key in FROM_DATASET and value is None:
            annotation = int | None
        completed[key] = _coerce(f"{path}.{key}", value, annotation)
    return completed


def _nearest(name: str, choices) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else "."


def _coerce(path: str, value: Any, annotation: Any) -> Any:
    """The value in the annotated type, or a UserError that names both."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(path, value, option)
            except UserError:
                continue
        raise UserError(f"{path} must be {_spell(annotation)}, not {value!r}.")
    if annotation is types.NoneType:
        ok = value is None
    elif annotation is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = ok and math.isfinite(value)
        value = float(value) if ok else value
    elif annotation is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif annotation in (bool, str):
        ok = isinstance(value, annotation)
    elif origin in (tuple, list, Sequence):
        ok = isinstance(value, (tuple, list))
        if ok and arguments:
            value = tuple(_coerce(path, item, arguments[0]) for item in value)
    elif annotation is dict or _is_module_type(annotation):
        ok = isinstance(value, Mapping)
        value = dict(value) if ok else value
    elif annotation is os.PathLike:
        ok = isinstance(value, os.PathLike)
        value = os.fspath(value) if ok else value
    else:
        ok = True
    if not ok:
        raise UserError(f"{path} must be {_spell(annotation)}, not {value!r}.")
    return value


def _is_module_type(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, nn.Module)


def _spell(annotation) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in arguments)
    if origin in (tuple, list, Sequence):
        return f"a tuple of {_spell(arguments[0])}" if arguments else "a tuple"
    if annotation is types.NoneType:
        return "None"
    if annotation is dict or _is_module_type(annotation):
        return "a section with a field `name`"
    return getattr(annotation, "__name__", str(annotation))
