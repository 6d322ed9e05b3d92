import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from data.sequences import spec
from experiments import config as configs
from experiments import runner
from experiments.errors import UserError

SHIPPED = Path(__file__).parents[2] / "experiments" / "configs"


def leaves(section, prefix=""):
    """Dotted name -> value of every field."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_at(section, path):
    for key in path.split("."):
        section = section[key]
    return section


# What can be overridden, and what it becomes.


@pytest.mark.parametrize("variant", ["histnetq", "deepsets"])
def test_every_field_can_be_overridden(tiny, variant):
    flag = f"{tiny}:{variant}"
    fields = dict(leaves(configs.load(flag).to_dict()))
    assert {
        "seed",
        "precision",
        "dataset.split_seed",
        "task.replace",
        "optimizer.clip_norm",
        "training.patience",
    } <= set(fields)
    for path, old in fields.items():
        if path.endswith("name") and path != "dataset.name":
            continue  # a name has its own test: it changes the other fields
        by_type = {
            bool: [not old],
            int: [11],
            float: [0.625],
            str: ["other"],
            tuple: [(3, 4), ("squared_error",)],
            type(None): [3, 0.625, "other"],
        }
        seen = []
        for new in by_type[type(old)]:
            try:
                config = configs.load(flag, {path: repr(new)}).to_dict()
            except UserError:
                continue
            seen.append(value_at(config, path))
            others = dict(leaves(config)) | {path: old}
            assert others == fields  # nothing else changed
            assert seen[-1] == new and type(seen[-1]) in (type(new), float)
        assert seen, path


def test_every_field_is_in_the_stored_config_and_read_back(tiny):
    config = configs.load(tiny)
    stored = json.loads(json.dumps(config.to_dict()))
    assert configs.complete(stored) == config.to_dict()
    assert configs.differences(stored, config.to_dict()) == []


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.clip_norm", "None", None),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.clip_norm", "2", 2.0),
        ("training.patience", "3", 3),
        ("training.patience", "None", None),
        ("task.replace", "false", False),
        ("task.replace", "True", True),
        ("model.encoder.hidden_sizes", "(3,)", (3,)),
        ("model.encoder.hidden_sizes", "()", ()),
        ("model.encoder.hidden_sizes", "[3, 4]", (3, 4)),
        ("task.measures", "('squared_error',)", ("squared_error",)),
        ("dataset.data_dir", "some/folder", "some/folder"),
        ("precision", "bfloat16", "bfloat16"),
        ("precision", "'bfloat16'", "bfloat16"),
    ],
)
def test_values_get_the_type_of_their_field(tiny, path, text, value):
    got = value_at(configs.load(tiny, {path: text}).to_dict(), path)
    assert got == value
    assert type(got) is type(value)


def test_a_folder_in_a_file_may_be_a_path(tmp_path):
    raw = configs.load(str(SHIPPED / "quantify.py")).to_dict()
    raw["dataset"]["data_dir"] = tmp_path
    assert configs.complete(raw)["dataset"]["data_dir"] == str(tmp_path)


def test_a_dataset_of_sets_has_the_fields_of_its_class(tiny):
    overrides = {"dataset.name": "MaxOfNumbers", "dataset.max_size": "7"}
    dataset = configs.load(tiny, overrides).to_dict()["dataset"]
    assert dataset["max_size"] == 7
    assert configs.build_dataset(dataset).max_size == 7
    with pytest.raises(UserError, match="'GausianMixtures' in data; did you mean 'Gau"):
        configs.load(tiny, {"dataset.name": "GausianMixtures"})
    with pytest.raises(UserError, match="config.dataset.max_sise: there is no such"):
        configs.load(tiny, overrides | {"dataset.max_sise": "7"})


def test_another_module_drops_the_fields_it_lacks(tiny):
    overrides = {
        # Wherever it stands on the command line, the name comes first.
        "model.encoder.kernel_size": "3",
        "model.encoder.name": "CNN",
    }
    encoder = configs.load(tiny, overrides).to_dict()["model"]["encoder"]
    assert encoder == {
        "name": "CNN",
        "channels": (16, 32),
        "features": 4,  # the file's, which both have
        "dropout_rate": 0.1,
        "hidden_sizes": (8,),
        "kernel_size": 3,
        "num_groups": None,
        "stride": 1,
    }
    overrides = {
        "model.name": "DeepSets",
        "model.phi.name": "MLP",
        "model.phi.hidden_sizes": "(5,)",
        "model.phi.features": "6",
        "model.rho.name": "PrevalenceHead",
        "model.rho.hidden_sizes": "()",
    }
    model = configs.load(tiny, overrides).to_dict()["model"]
    assert set(model) == {"name", "phi", "rho", "aggregation"}
    assert model["phi"]["features"] == 6


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.py")), ids=lambda p: p.stem)
def test_shipped_configs_are_complete(path):
    assert set(configs.load(str(path)).to_dict()) == {
        "dataset",
        "model",
        "task",
        "optimizer",
        "training",
        "seed",
        "precision",
        "check_contracts",
    }


# Mistakes in fields: on the command line and in a file alike.

MISSPELT = [
    ("trainning.num_steps", "3", "config.trainning", "training", "optimizer"),
    ("sed", "3", "config.sed", "seed", "precision"),
    (
        "training.num_step",
        "3",
        "config.training.num_step",
        "num_steps",
        "steps_per_call",
    ),
    ("task.bagsize", "3", "config.task.bagsize", "bag_size", "num_bags"),
    (
        "optimizer.lerning_rate",
        "0.1",
        "config.optimizer.lerning_rate",
        "learning_rate",
        "weight_decay",
    ),
    ("dataset.splitseed", "3", "config.dataset.splitseed", "split_seed", "data_dir"),
    ("model.heads", "3", "config.model.heads", "head", "histogram"),
    (
        "model.encoder.hiden_sizes",
        "(3,)",
        "config.model.encoder.hiden_sizes",
        "hidden_sizes",
        "activation",
    ),
    (
        "model.encodr.name",
        "'MLP'",
        "config.model.encodr",
        "encoder",
        "histogram",
    ),
    (
        "model.histogram.name",
        "'LinearHistgram'",
        "config.model.histogram.name",
        "LinearHistogram",
        "RBFHistogram",
    ),
    ("model.name", "'HistnetQ'", "config.model.name", "HistNetQ", "DeepSets"),
    (
        "task.name",
        "'Quantifcation'",
        "config.task.name",
        "Quantification",
        "Classification",
    ),
]


@pytest.mark.parametrize("where", ["command line", "file"])
@pytest.mark.parametrize(
    ("path", "text", "named", "nearest", "neighbour"),
    MISSPELT,
    ids=[case[0] for case in MISSPELT],
)
def test_a_misspelt_field_is_named_with_the_nearest(
    refused, tiny, tmp_path, where, path, text, named, nearest, neighbour
):
    if where == "file":
        *parents, field = path.split(".")
        target = "".join(f"[{p!r}]" for p in parents[:-1])
        lines = f"    raw = config.to_dict()\n    section = raw{target}\n"
        if parents:
            lines += f"    section = section.setdefault({parents[-1]!r}, {{}})\n"
        lines += f"    section[{field!r}] = {text}\n    return raw\n"
        file = tmp_path / "misspelt.py"
        file.write_text(Path(tiny).read_text().replace("    return config\n", lines))
        message = refused(f"--config={file}")
    else:
        message = refused(f"--config={tiny}", f"--config.{path}={text}")
    assert "\n" not in message
    assert message.startswith(f"{named}: ")
    assert f"did you mean {nearest!r}?" in message
    assert neighbour in message.split("did you mean")[1]
    assert not (tmp_path / "refused").exists()


def test_a_field_like_no_other_is_named_without_a_guess(refused, tiny):
    message = refused(f"--config={tiny}", "--config.qqq=3")
    assert message.startswith("config.qqq: there is no such field. Fields of config: ")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.num_steps=abc", ["must be int, not 'abc'"]),
        ("training.num_steps=1.5", ["must be int, not 1.5"]),
        ("training.num_steps=True", ["must be int, not True"]),
        ("training.num_steps=None", ["must be int, not None"]),
        ("training.patience=soon", ["must be int or None, not 'soon'"]),
        ("model.encoder.hidden_sizes=3", ["must be a tuple of int, not 3"]),
        ("model.encoder.hidden_sizes=(3,'a')", ["must be int, not 'a'"]),
        ("model.encoder=3", ["must be a section with a field `name`, not 3"]),
        ("model.encoder.hidden_sizes.x=3", ["has no fields of its own"]),
        ("model=3", ["config.model"]),
        ("model.name=3", ["config.model.name", "there is no 3"]),
        ("model.name=[1]", ["config.model.name", "there is no [1]"]),
        ("optimizer.learning_rate=fast", ["must be float, not 'fast'"]),
        ("optimizer.learning_rate=1e999", ["must be float, not inf"]),
        ("optimizer.learning_rate=nan", ["must be float, not 'nan'"]),
        ("dataset.name=3", ["must be str, not 3"]),
        ("dataset.data_dir=3", ["must be str or PathLike or None, not 3"]),
        ("task.replace=1", ["must be bool, not 1"]),
        ("training=3", ["must be a section"]),
    ],
)
def test_a_value_of_another_type_is_a_sentence(refused, tiny, override, parts):
    message = refused(f"--config={tiny}", f"--config.{override}")
    assert "\n" not in message
    assert message.startswith(f"config.{override.split('=')[0].split('.')[0]}")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "override",
    [
        "training.num_steps=0",
        "training.num_steps=-10",
        "training.num_steps=10000000000",
        "training.num_steps=42",  # no multiple of steps_per_call
        "training.steps_per_call=0",
        "training.log_every=-5",
        "training.eval_every=7",
        "training.patience=0",
        "training.keep_best=0",
        "optimizer.learning_rate=0",
        "optimizer.learning_rate=-1",
        "optimizer.schedule=linear",
        "optimizer.warmup_steps=-1",
        "optimizer.end_learning_rate=1",
        "optimizer.plateau_factor=1.5",
        "optimizer.plateau_patience=-1",
        "optimizer.weight_decay=-0.1",
        "optimizer.momentum=2",
        "optimizer.clip_norm=0",
        "optimizer.accumulation_steps=0",
        "optimizer.ema_decay=1",
        "optimizer.name=adamm",
        "optimizer.name=softmax_cross_entropy",
        "optimizer.name=lbfgs",
        "seed=-1",
        "seed=99999999999999999999999",
        "precision=float16",
        "task.num_bags=0",
        "task.bag_size=-3",
        "task.validation_bags=0",
        "task.test_bags=0",
        "task.mixed_bags=-1",
        "task.evaluation_bag_size=0",
        "task.protocol=unifrm",
        "task.evaluation_protocol=unifrm",
        "task.concentration=0",
        "task.loss=absolute_eror",
        "task.measures=('absolute_eror',)",
    ],
)
def test_an_impossible_value_is_a_sentence(refused, tiny, override):
    message = refused(f"--config={tiny}", f"--config.{override}")
    section, _, field = override.split("=")[0].rpartition(".")
    assert "\n" not in message
    assert message.startswith(f"config.{section}: " if section else "config: ")
    assert field in message or override.split("=")[1].strip("(),'") in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.histogram.num_bins=0"], "num_bins"),
        (["model.encoder.hidden_sizes=(-3,)"], "config.model"),
        (["model.encoder.hidden_sizes=(0,)"], "no input features"),
        (["model.encoder.dropout_rate=1.0"], "rate must lie"),
        (["model.encoder.dropout_rate=-0.1"], "rate must lie"),
        (["model.encoder.activation=relux"], "activation"),
        (["model.head.num_classes=3"], "classes"),
        (["model.encoder.name=CNN", "dataset.name=wine"], "shape"),
        (["task.protocol=grid", "task.grid_points=1"], "grid_points"),
        (["task.replace=False", "task.bag_size=100000"], "bag_size"),
        # Enough for the train split, too much for the others.
        (["task.replace=False", "task.evaluation_bag_size=1000"], "bag_size"),
        (["dataset.name=digts"], "digits"),
        (["dataset.test_fraction=1.5"], "test_fraction"),
        (["task.name=Classification", "task.batch_size=0"], "batch_size"),
        (
            ["task.name=Classification", "task.batch_size=9", "dataset.name=wine"],
            "config.model does not fit",
        ),
        (["model.name=MLP", "model.hidden_sizes=()", "model.features=3"], "MLP"),
    ],
)
def test_what_does_not_fit_together_is_a_sentence(refused, tiny, overrides, part):
    flags = [f"--config.{override}" for override in overrides]
    assert part in refused(f"--config={tiny}", *flags)


def test_a_required_field_that_is_missing_is_named(refused, tiny):
    message = refused(f"--config={tiny}", "--config.model.name=DeepSets")
    assert message == "config.model.phi is required and not set."


# Mistakes with files and flags.


def test_a_missing_file_is_named_with_the_shipped_ones(refused):
    message = refused("--config=experiments/configs/quantfy.py")
    assert "quantfy.py" in message
    assert "quantify.py" in message.split("Shipped")[1]


def test_a_missing_variant_is_named(refused, tiny):
    assert "'histnet'" in refused(f"--config={tiny}:histnet")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1\n", ["defines no get_config"]),
        ("def get_config(:\n", ["line 1", "invalid syntax"]),
        ("import no_such_module\n", ["ModuleNotFoundError", "no_such_module"]),
        ("def get_config():\n    return 1 / 0\n", ["division by zero"]),
        ("def get_config():\n    return nothing\n", ["nothing"]),
        ("def get_config():\n    return 'text'\n", ["broken.py"]),
        ("def get_config():\n    return None\n", ["config.dataset is required"]),
        ("def get_config(variant):\n    return {}\n", ["variant"]),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config():\n"
            "    config = ConfigDict(dict(optimizer=dict(name='adam')))\n"
            "    config.optimzer.name = 'sgd'\n",
            ["optimzer", "optimizer"],
        ),
    ],
)
def test_a_broken_file_is_a_sentence(refused, tmp_path, text, parts):
    file = tmp_path / "broken.py"
    file.write_text(text)
    message = refused(f"--config={file}")
    for part in parts:
        assert part in message


def test_a_variant_for_a_file_without_variants_is_refused(refused, tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("def get_config():\n    return {}\n")
    assert "too many positional arguments" in refused(f"--config={file}:big")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--config.seed"], "--config.seed needs a value"),
        (["--config.seed", "--config.precision=float32"], "--config.seed needs"),
        (["--confg.seed=3"], "unknown argument '--confg.seed=3'"),
        (["--mod=eval"], "did you mean --mode?"),
        (["stray"], "unknown argument 'stray'"),
        (["--mode=trian"], "--mode must be one of train, eval, predict"),
        (["--mode=predict"], "--bags is required"),
        (["--bootstrap=many"], "--bootstrap"),
        (["--bootstrap=0"], "--bootstrap must be 1 or more"),
    ],
)
def test_a_wrong_flag_is_a_sentence(refused, tiny, flags, part):
    assert part in refused(f"--config={tiny}", *flags)


def test_config_and_workdir_are_required(main, tmp_path):
    outcome = main("--config=x.py")
    assert outcome.code == 1 and "--workdir" in outcome.err
    outcome = main(f"--workdir={tmp_path / 'w'}")
    assert outcome.code == 1 and "--config is required" in outcome.err


def test_value_after_a_space(tiny):
    options, overrides = runner._parse(
        ["--config", tiny, "--config.seed", "3", "--workdir", "w", "--config.x.y=a=b"]
    )
    assert overrides == {"seed": "3", "x.y": "a=b"}
    assert options.workdir == "w"


def test_the_program_stops_with_the_message_and_exit_code_1(tiny, tmp_path):
    process = subprocess.run(
        [
            sys.executable,
            "run.py",
            f"--config={tiny}",
            f"--workdir={tmp_path / 'w'}",
            "--config.model.encoder.hiden_sizes=(3,)",
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("run.py: config.model.encoder.hiden_sizes: ")
    assert not (tmp_path / "w").exists()


# From a section to a module.


def test_modules_are_built_with_classes_and_precision(tiny):
    section = configs.load(tiny).to_dict()["model"]
    model = configs.build_module(section, spec=spec("x", 7), precision="bfloat16")
    assert isinstance(model, archs.HistNetQ)
    assert model.head.num_classes == 7
    assert model.encoder.dtype == model.head.dtype == jnp.bfloat16
    assert model.encoder.hidden_sizes == (8,)
    model = configs.build_module(section, spec=spec("x", 7), precision="float32")
    assert model.encoder.dtype is None


def test_default_modules_are_sections_too(monkeypatch):
    class Inner(nn.Module):
        size: int = 3

    class Outer(nn.Module):
        inner: nn.Module = Inner(4)

    monkeypatch.setattr(archs, "Inner", Inner, raising=False)
    monkeypatch.setattr(archs, "Outer", Outer, raising=False)
    monkeypatch.setattr(archs, "__all__", [*archs.__all__, "Inner", "Outer"])
    completed = configs._named_section("config.model", {"name": "Outer"})
    assert completed == {"name": "Outer", "inner": {"name": "Inner", "size": 4}}


def test_differences_name_the_fields():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    new = {"a": {"b": 2, "c": (1, 2)}, "d": None, "e": np.float32(1)}
    assert configs.differences(old, new) == [
        "config.a.b: 1 there, 2 here",
        f"config.e: None there, {np.float32(1)!r} here",
    ]
