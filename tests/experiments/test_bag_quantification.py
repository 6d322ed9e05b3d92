"""Learning from bags labelled by prevalence, and a whole run on the files of LeQua."""

import dataclasses
import io
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
import data
from archs import quantification as measures_of
from data import synthetic_lequa
from data.sequences import spec
from experiments import lequa_evaluation, loop
from experiments.config import build_module, load
from experiments.optimizers import Optimizer
from experiments.progress import Progress
from experiments.tasks import BagQuantification

TRAINING = loop.Training(num_steps=200, steps_per_call=20, log_every=40, eval_every=40)
CONFIGS = "experiments/configs/lequa.py"


def histnetq():
    return archs.HistNetQ(
        archs.MLP((8,), 4), archs.LinearHistogram(4), archs.PrevalenceHead((8,), 3)
    )


def deepsets(aggregation="mean"):
    return archs.DeepSets(
        archs.MLP((8,), 4), archs.PrevalenceHead((8,), 3), aggregation
    )


def make_bags(num_bags, size=12, seed=0, ragged=False):
    """Bags of the classes 0, 1, 2, whose first feature is the class."""
    rng = np.random.default_rng(seed)
    labels = np.stack(
        [rng.choice(3, size, p=rng.dirichlet(np.ones(3))) for _ in range(num_bags)]
    )
    noise = rng.normal(size=labels.shape)
    split = {"inputs": np.stack([labels, noise], -1).astype(np.float32)}
    sizes = rng.integers(1, size + 1, num_bags) if ragged else np.full(num_bags, size)
    if ragged:
        split["sizes"] = sizes
    counts = [
        np.bincount(row[:s], minlength=3) / s
        for row, s in zip(labels, sizes, strict=True)
    ]
    return split | {"prevalence": np.stack(counts).astype(np.float32)}


def make_dataset(ragged=False, **splits):
    found = {"train": make_bags(30, ragged=ragged), "validation": make_bags(23, seed=1)}
    found |= splits
    spec = data.Spec(
        name="bags",
        feature_shape=(2,),
        num_classes=3,
        class_names=("a", "b", "c"),
        sizes={name: len(split["inputs"]) for name, split in found.items()},
        source="made here",
        licence="",
        citation="",
        homepage="",
    )
    return data.Bags(spec, found, np.float32(0), np.float32(1))


def make_task(model=None, dataset=None, training=TRAINING, **fields):
    return BagQuantification(
        model or histnetq(),
        dataset or make_dataset(),
        Optimizer(name="adam", learning_rate=0.02),
        training,
        **{"num_bags": 6, "baselines": False} | fields,
    )


def batch_of(task, step=0):
    return jax.jit(task.sample)(jax.random.key(1), step, task.arrays)


def counted(inputs, mask=None):
    """Prevalences of bags, read from the feature that is the class."""
    mask = np.ones(inputs.shape[:2], bool) if mask is None else np.asarray(mask)
    member = (inputs[..., :1] == np.arange(3)) & mask[..., None]
    return member.sum(1) / mask.sum(1, keepdims=True)


# Batches.


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("mixer", "model", "real_bags"),
    [
        (None, histnetq(), 0.0),
        ("exact", deepsets("max"), 0.0),
        ("exact", deepsets("max"), 0.5),
        ("published", histnetq(), 1.0),
    ],
)
def test_labels_are_exact(mixer, model, real_bags, ragged):
    task = make_task(model, make_dataset(ragged), mixer=mixer, real_bags=real_bags)
    batch = batch_of(task)
    joined = mixer == "exact"
    assert batch["inputs"].shape == (6, 24 if joined else 12, 2)
    assert ("mask" in batch) == (ragged or (joined and real_bags > 0))
    label = counted(batch["inputs"], batch.get("mask"))
    np.testing.assert_allclose(batch["prevalence"], label, atol=1e-6)
    assert (batch_of(task, 1)["inputs"] != batch["inputs"]).any()
    jax.tree.map(np.testing.assert_array_equal, batch_of(task), batch)


def with_documents(dataset, num_documents=40):
    """`dataset` and documents of the classes 0, 1, 2, each a row of its own."""
    labels = np.arange(num_documents) % 3
    inputs = np.stack([labels, 10 + np.arange(num_documents)], -1).astype(np.float32)
    split = {"inputs": inputs, "labels": labels}
    documents = data.Dataset(
        dataset.spec,
        {"train": split, "validation": split},
        np.float32(0),
        np.float32(1),
    )
    return dataclasses.replace(dataset, documents=documents)


@pytest.mark.parametrize(
    ("mixer", "model", "size"),
    [(None, histnetq(), 12), ("exact", deepsets("max"), 24), ("exact", histnetq(), 12)],
)
def test_labelled_bags_are_of_documents(mixer, model, size):
    dataset = with_documents(make_dataset())
    task = make_task(model, dataset, mixer=mixer, labelled_bags=2, real_bags=1.0)
    batch = batch_of(task)
    inputs = np.asarray(batch["inputs"])
    assert inputs.shape == (6, size, 2)
    assert (inputs[4:, :, 1] >= 10).all() and (inputs[:4, :, 1] < 10).all()
    label = counted(inputs, batch.get("mask"))
    if "weights" in batch:
        label = np.asarray(batch["weights"]) @ label
    np.testing.assert_allclose(batch["prevalence"], label, atol=1e-6)
    assert (batch_of(task, 1)["inputs"][4:] != inputs[4:]).any()


def test_labelled_bags_have_uniform_prevalences():
    dataset = with_documents(make_dataset())
    task = make_task(dataset=dataset, mixer=None, labelled_bags=5)
    draw = jax.jit(lambda step: task.sample(jax.random.key(0), step, task.arrays))
    found = np.concatenate([draw(step)["prevalence"][1:] for step in range(80)])
    # Means and standard deviations of Dirichlet(1, 1, 1).
    np.testing.assert_allclose(found.mean(0), 1 / 3, atol=0.04)
    np.testing.assert_allclose(found.std(0), 2**0.5 / 6, atol=0.03)


GMNET = archs.GMNet(archs.PrevalenceHead((8,), 3), None, 2, 4, 2, (4,))


@pytest.mark.parametrize(
    "model", [histnetq(), deepsets(), GMNET], ids=["HistNetQ", "mean", "GMNet"]
)
def test_a_mixture_in_representation_space_has_the_representation_of_its_bag(model):
    task = make_task(model, mixed_bags=40, real_bags=0.3)
    batch = batch_of(task)
    weights = np.asarray(batch["weights"])
    assert weights.shape == (40, 6)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        batch["prevalence"], weights @ counted(batch["inputs"]), atol=1e-6
    )
    # A bag of 3 copies of one bag and one of another is the mixture of weight 3/4.
    variables = model.init(jax.random.key(0), batch["inputs"])

    def representation(inputs):
        features = model.apply(variables, inputs, method="encode")
        return model.apply(variables, features, method="aggregate")

    representation = jax.jit(representation)
    first, second = batch["inputs"][:2]
    bag = jnp.concatenate([first, first, first, second])[None]
    mixture = np.array([0.75, 0.25]) @ representation(batch["inputs"][:2])
    np.testing.assert_allclose(representation(bag)[0], mixture, atol=1e-6)


def test_without_mixing_bags_are_learned_as_they_are():
    task = make_task(mixer=None)
    given = task.dataset.splits["train"]["inputs"]
    for bag in np.asarray(batch_of(task)["inputs"]):
        assert (bag == given).all((1, 2)).any()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_bag_is_evaluated_once(split, tmp_path):
    test = make_bags(27, seed=2)
    # A memory-mapped split is read batch by batch.
    np.save(tmp_path / "test.npy", test["inputs"])
    test["inputs"] = np.load(tmp_path / "test.npy", mmap_mode="r")
    task = make_task(dataset=make_dataset(test=test))
    assert set(task.arrays) == {"train", "validation"}
    state = jax.jit(task.init)(jax.random.key(0), batch_of(task))
    means = loop.compile_evaluation(task)(state, split)
    bags = task.dataset.splits[split]
    estimate = task.model.apply(state.variables, jnp.asarray(bags["inputs"]))
    np.testing.assert_allclose(
        task.evaluation_estimates(state, split), estimate, atol=1e-6
    )
    true = jnp.asarray(bags["prevalence"])
    assert means == {
        "absolute_error": pytest.approx(
            float(measures_of.absolute_error(true, estimate).mean()), rel=1e-5
        ),
        "relative_absolute_error": pytest.approx(
            float(
                measures_of.relative_absolute_error(
                    true, estimate, epsilon=1 / 24
                ).mean()
            ),
            rel=1e-5,
        ),
    }


def test_padding_is_not_evaluated():
    bags = make_bags(5, ragged=True)
    spoilt = bags["inputs"].copy()
    for bag, size in zip(spoilt, bags["sizes"], strict=True):
        bag[size:] = np.nan
    tasks = [
        make_task(dataset=make_dataset(validation=bags | {"inputs": inputs}))
        for inputs in (bags["inputs"], spoilt)
    ]
    state = jax.jit(tasks[0].init)(jax.random.key(0), batch_of(tasks[0]))
    np.testing.assert_array_equal(
        *(task.evaluation_estimates(state, "validation") for task in tasks)
    )


# Training.


def trained(task, tmp_path):
    return loop.train(task, task.training, tmp_path, 0, Progress(200, io.StringIO()))


@pytest.mark.parametrize("mixer", ["exact", "published"])
@pytest.mark.parametrize(
    ("model", "dataset"),
    [
        (histnetq(), make_dataset()),
        (deepsets(("mean", "max")), make_dataset(ragged=True)),
    ],
    ids=["HistNetQ", "ragged bags"],
)
def test_it_learns(mixer, model, dataset, tmp_path):
    task = make_task(model, dataset, mixer=mixer)
    state = trained(task, tmp_path)
    error = loop.compile_evaluation(task)(state, "validation")["absolute_error"]
    true = dataset.splits["validation"]["prevalence"]
    constant = np.abs(true - true.mean(0)).mean()
    assert error < 0.75 * constant


def test_ordered_classes_are_learned_by_match_distance(tmp_path):
    loss = "normalized_match_distance"
    task = make_task(loss=loss, measures=(loss,))
    assert task.monitor == loss
    means = loop.compile_evaluation(task)(trained(task, tmp_path), "validation")
    true = task.dataset.splits["validation"]["prevalence"]
    mean = np.broadcast_to(true.mean(0), true.shape)
    constant = float(measures_of.normalized_match_distance(true, mean).mean())
    assert set(means) == {loss} and means[loss] < 0.6 * constant


def test_what_a_model_adds_to_the_loss_is_learned_too():
    """GMNet sows its alignment, which is no part of the error."""
    batch = batch_of(make_task(GMNET))
    state = jax.jit(make_task(GMNET).init)(jax.random.key(0), batch)

    def after(weight):
        task = make_task(
            dataclasses.replace(GMNET, dropout_rate=0.0, cka_weight=weight)
        )
        return jax.jit(task.train_step)(state, batch, jax.random.key(2))

    (without, first), (aligned, second) = after(0.0), after(5.0)
    assert first["absolute_error"] == second["absolute_error"]
    assert first["gradient_norm"][0] < second["gradient_norm"][0]
    assert set(aligned.model_state) == set(without.model_state) == {"batch_stats"}
    assert (
        aligned.model_state["batch_stats"]["normalise"]["mean"]
        != state.model_state["batch_stats"]["normalise"]["mean"]
    ).any()


def test_the_warmup_learns_from_its_own_loss():
    rae = "relative_absolute_error"
    task = make_task(loss=rae, warmup_steps=3)
    plain = make_task(loss="absolute_error")
    later = make_task(loss=rae)
    batch = batch_of(task)
    state = jax.jit(task.init)(jax.random.key(0), batch)

    def params_after(task, steps):
        before = state.replace(steps=jnp.int32(steps))
        after, row = jax.jit(task.train_step)(before, batch, jax.random.key(2))
        assert np.isfinite(row[task.loss][0])
        return after.params

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, params_after(task, 2), params_after(plain, 2))
    jax.tree.map(close, params_after(task, 3), params_after(later, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "mixup"}, "mixer must be 'exact', 'published' or None"),
        ({"real_bags": 1.5}, "real_bags must lie between 0 and 1"),
        ({"num_bags": 0}, "num_bags must be 1 or more"),
        ({"num_bags": 1}, "num_bags must be 2 or more for mixer='exact'"),
        ({"loss": "error"}, "there is no measure 'error'"),
        ({"warmup_loss": "error"}, "there is no measure 'error'"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"labelled_bags": -1}, "labelled_bags must be 0 or more"),
        ({"labelled_bags": 6}, "labelled_bags must be fewer than num_bags=6, not 6"),
        ({"labelled_bags": 2}, "bags has no labelled documents"),
        ({"mixed_bags": 9, "mixer": None}, "made in representation space only"),
        ({"mixed_bags": 9, "model": deepsets("max")}, "representation space only"),
        ({"model": archs.MLP((), 3)}, "MLP is no set network"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_task(**fields)


def test_a_model_of_another_number_of_classes_is_refused():
    model = dataclasses.replace(histnetq(), head=archs.PrevalenceHead((), 4))
    task = make_task(model)
    with pytest.raises(ValueError, match=r"shape \(6, 3\) \(bags, classes\), not"):
        jax.eval_shape(task.init, jax.random.key(0), batch_of(task))


# Whole runs.

TINY = [
    "--config.dataset.validation_bags=10",
    "--config.model.encoder.hidden_sizes=(8,)",
    "--config.model.encoder.features=4",
    "--config.model.histogram.name=LinearHistogram",
    "--config.model.histogram.num_bins=4",
    "--config.model.head.hidden_sizes=(8,)",
    "--config.optimizer.learning_rate=0.01",
    "--config.optimizer.accumulation_steps=1",
    "--config.training.steps_per_call=5",
    "--config.training.log_every=5",
    "--config.training.eval_every=10",
    "--config.training.num_steps=20",
    "--config.task.warmup_steps=5",
    "--config.task.baseline_steps=20",
]


DEEPSETS = [
    flag.replace("model.encoder", "model.phi").replace("model.head", "model.rho")
    for flag in TINY
    if "histogram" not in flag
]


def write(task, root, **options):
    sizes = {"dev_bags": 30, "test_bags": 26, "dimensions": 5, "documents": 60}
    return synthetic_lequa.write(task, root, **sizes | options)


@pytest.fixture(scope="module")
def finished(main, tmp_path_factory):
    """Files of T1A, the flags of a run and its workdir."""
    root = tmp_path_factory.mktemp("t1a")
    public = write("T1A", root)
    flags = [f"--config={CONFIGS}:histnetq_t1a", f"--config.dataset.source_dir={root}"]
    flags += [f"--config.dataset.data_dir={root / 'cache'}", *TINY]
    outcome = main(*flags, f"--workdir={root / 'run'}")
    assert outcome.code == 0, outcome.err
    return public, flags, root / "run"


def test_the_submission_of_a_run_scores_as_the_run_says(finished, capsys):
    public, _, workdir = finished
    measured = json.loads((workdir / "evaluation.json").read_text())["test"]
    paths = [public / "test_prevalences.txt", workdir / "submission.csv"]
    assert lequa_evaluation.main(["T1A", *map(str, paths)]) == 0
    shown = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    for name, measure in {
        "MRAE": "relative_absolute_error",
        "MAE": "absolute_error",
    }.items():
        assert float(shown[name].split()[0]) == pytest.approx(
            measured[measure], abs=2e-5
        )


def test_the_report_has_classical_methods_beside_the_model(finished):
    workdir = finished[2]
    bags = np.load(workdir / "test_bags.npz")
    methods = {"CC", "PCC", "ACC", "PACC", "EMQ", "EMQ-BCTS"}
    assert set(bags.files) == {"true", "HistNetQ", *methods}
    for name in bags.files:
        assert bags[name].shape == (26, 2)
        np.testing.assert_allclose(bags[name].sum(1), 1, atol=1e-4)
    report = (workdir / "report.html").read_text()
    assert "Error on the test bags" in report
    assert "trained on 48 labelled documents" in report


def test_resumed_it_ends_the_same(finished, main, copy_of, same_end):
    _, flags, workdir = finished
    copy = copy_of(workdir, upto=10)
    shutil.rmtree(copy / "baseline_classifier")
    outcome = main(*flags, f"--workdir={copy}")
    assert outcome.code == 0, outcome.err
    same_end(copy, workdir)
    assert (copy / "submission.csv").read_bytes() == (
        workdir / "submission.csv"
    ).read_bytes()


@pytest.mark.parametrize("source", ["validation", "test"])
def test_predict_takes_the_splits(finished, main, tmp_path, source):
    workdir = finished[2]
    output = tmp_path / "p.csv"
    outcome = main(
        "--mode=predict",
        f"--workdir={workdir}",
        f"--bags={source}",
        f"--output={output}",
        "--bootstrap=2",
    )
    assert outcome.code == 0, outcome.err
    rows = np.loadtxt(output, delimiter=",", skiprows=1)
    assert len(rows) == (26 if source == "test" else 10)
    if source == "test":
        submission = np.loadtxt(workdir / "submission.csv", delimiter=",", skiprows=1)
        np.testing.assert_allclose(rows[:, 1:3], submission[:, 1:], atol=2e-6)


def test_test_bags_without_labels_are_estimated_and_not_measured(main, tmp_path):
    public = write("T3", tmp_path, documents=None, bag_size=20)
    (public / "test_prevalences.txt").unlink()
    workdir = tmp_path / "run"
    flags = [f"--config={CONFIGS}:deepsets_t3", *DEEPSETS]
    flags += [f"--config.dataset.source_dir={tmp_path}"]
    flags += [f"--config.dataset.data_dir={tmp_path}", "--config.task.baselines=False"]
    outcome = main(*flags, f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    assert json.loads((workdir / "evaluation.json").read_text())["test"] == {}
    assert data.lequa.read_prevalences(workdir / "submission.csv").shape == (26, 5)
    report = (workdir / "report.html").read_text()
    assert "Error on the validation bags" in report
    assert "normalized match distance" in report


OTHERS = {
    "gmnet_t1": [
        "task.num_bags=10",
        "task.labelled_bags=5",
        "model.num_spaces=2",
        "model.num_gaussians=3",
        "model.latent_size=2",
        "model.hidden_sizes=(4,)",
        "model.head.hidden_sizes=(8,)",
    ],
    "set_transformer_t2": [
        "task.num_bags=4",
        "model.encoder.hidden_sizes=(8,)",
        "model.encoder.features=4",
        "model.hidden_size=8",
        "model.num_heads=2",
        "model.num_inducing_points=3",
        "model.num_seeds=2",
        "model.num_decoder_layers=1",
        "model.head.hidden_sizes=(8,)",
    ],
}


@pytest.mark.parametrize("variant", OTHERS)
def test_other_networks_run(main, tmp_path, variant):
    write(variant.rpartition("_")[2].upper(), tmp_path, bag_size=20, test_bags=5)
    flags = [flag for flag in TINY if "model" not in flag]
    flags += [f"--config.{field}" for field in OTHERS[variant]]
    flags += [f"--config.dataset.source_dir={tmp_path}"]
    flags += [f"--config.dataset.data_dir={tmp_path}", "--config.task.baselines=False"]
    workdir = tmp_path / "run"
    outcome = main(f"--config={CONFIGS}:{variant}", *flags, f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    test = json.loads((workdir / "evaluation.json").read_text())["test"]
    assert 0 < test["absolute_error"] < 0.5


def test_missing_files_are_a_sentence(refused, tmp_path):
    flag = f"--config={CONFIGS}:histnetq_t1b"
    assert "T1B needs source_dir" in refused(flag)
    message = refused(flag, f"--config.dataset.source_dir={tmp_path}")
    assert "label_map.txt is missing. Download T1B.train_dev.zip" in message


@pytest.mark.parametrize("task", ["t1a", "t1b", "t1", "t2", "t3", "t4"])
@pytest.mark.parametrize("model", ["histnetq", "deepsets", "set_transformer", "gmnet"])
def test_variants_are_whole_configs(model, task):
    config = load(f"{CONFIGS}:{model}_{task}", {})
    training = config.training
    bags = training.eval_every * config.task.num_bags
    small = task in ("t1a", "t1", "t4") and model != "gmnet"
    assert bags == (1000 if small else 5000)
    assert training.num_steps == 1000 * training.eval_every


# The authors' networks have 29.77, 10.68 and 14.19 million. Their histogram keeps tens
# of thousands of fixed numbers as weights of convolutions; of SetTransformer a linear
# layer from 256 to 512 features is left out (131,584), and the head's first layer,
# which takes two of these, has 1,048,576 fewer.
PARAMETERS = {
    "histnetq": 29_744_174,
    "deepsets": 10_678_574,
    "set_transformer": 14_185_774 - 131_584 - 1_048_576,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_networks_have_the_published_number_of_parameters(model):
    section = load(f"{CONFIGS}:{model}_t1a", {}).model.to_dict()
    module = build_module(section, spec=spec("x", 2), precision="float32")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 300)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == PARAMETERS[model]
