"""What the reports of sequence models show besides the training curves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from archs.decoding import sample
from data.sequences import BOS, EOS
from experiments import figures
from experiments.report import Section
from experiments.tasks import music_report
from experiments.tasks.gates_report import gate_sections
from experiments.tasks.groups import measures_by_size, size_groups
from experiments.tasks.sequence_batches import answers

SHOWN_SEQUENCES = 8
SHOWN_STEPS = 60
PROMPT_LENGTH = 32


def sections(task: Any, state: Any, workdir: Path, seed: int) -> list[Section]:
    """Sections of a `SequencePrediction` run; writes `test_sequences.npz`.

    Args:
      task: the run's.
      state: the trained state.
      workdir: the run's.
      seed: of what is generated.
    """
    told, measures, shown = task.evaluation_sequences(state, "test", SHOWN_SEQUENCES)
    np.savez_compressed(workdir / "test_sequences.npz", **told, **measures)
    found = [
        _by_number(name, numbers, measures)
        for name, numbers in told.items()
        if name != "targets" and len(np.unique(numbers)) > 1
    ]
    if hasattr(task.dataset, "decode"):
        found.append(_examples(task.dataset, shown))
        found += gate_sections(task, state, shown)
    begins = (shown["inputs"][:, 0] == BOS).all()
    if getattr(task.dataset, "predicts_next", False) and begins:
        found += _sentences(task, state, shown["inputs"].shape[1], seed)
    if task.objective == "frame_likelihood":
        found += music_report.sections(task, state, workdir, seed)
    return found


def _by_number(name: str, numbers: np.ndarray, measures: Mapping) -> Section:
    """The measures against what the batch says of a sequence in one number."""
    words = {"lengths": "steps"}.get(name, name.replace("_", " "))
    table = measures_by_size(numbers, measures, (words, "sequences"))
    centers = [numbers[group].mean() for group in size_groups(numbers)]
    columns = {key: [row[key.replace("_", " ")] for row in table] for key in measures}
    return Section(
        title=f"Test sequences by {words}",
        text=f"{len(numbers)} sequences; means over those of a group.",
        figure=figures.measures_by_size(centers, columns, words),
        table=table,
    )


def _sentences(task: Any, state: Any, length: int, seed: int) -> list[Section]:
    """Sentences from BOS on, of `length` tokens at most."""
    model = task.model
    if not hasattr(model, "decode_step"):
        return []

    @jax.jit
    def write(variables, key):
        def step(cache, tokens):
            return model.apply(variables, cache, tokens, method="decode_step")

        cache = model.apply(variables, SHOWN_SEQUENCES, length, method="init_cache")
        first = jnp.full(SHOWN_SEQUENCES, BOS)
        return sample(
            step, cache, first, length, EOS, key, task.temperature, top_p=task.top_p
        )[0]

    tokens = np.asarray(write(state.variables, jax.random.key(seed)))
    return [
        Section(
            title="Sentences the model writes",
            text="Each word is drawn from the most probable ones, which have the "
            f"probability {task.top_p:g} together, at temperature "
            f"{task.temperature:g}.",
            table=[{"sentence": task.dataset.decode(row)} for row in tokens],
        )
    ]


def _examples(dataset: Any, shown: Mapping) -> Section:
    """A few test sequences in words, and the answers."""
    rows = []
    answer = shown["prediction"].argmax(-1)  # [sequence] or [sequence, step]
    for i in range(len(answer)):
        row = {"sequence": dataset.decode(shown["inputs"][i][:SHOWN_STEPS])}
        if answer.ndim == 1:
            said, true = [answer[i]], [shown["targets"][i]]
        else:
            mask = shown["target_mask"][i][:SHOWN_STEPS]
            said, true = (
                list(a[i][:SHOWN_STEPS][mask]) for a in (answer, shown["targets"])
            )
        row["answer"], row["truth"] = (
            _words_of(dataset, labels, answer.ndim == 1) for labels in (said, true)
        )
        rows.append(row)
    return Section(title="Test sequences of all lengths", table=rows)


def _words_of(dataset: Any, labels: list[int], of_sequence: bool) -> str:
    names = dataset.spec.class_names
    if names:
        return ", ".join(names[k] for k in labels)
    return ", ".join(map(str, labels)) if of_sequence else dataset.decode(labels)


def window_cache(batch_size: int, window: int) -> tuple[jax.Array, jax.Array]:
    """What `window_step` has read at first: the tokens, and how many."""
    return jnp.zeros((batch_size, window), jnp.int32), jnp.zeros(batch_size, jnp.int32)


def window_step(predict: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable:
    """A step for `archs.decoding` of a model that reads its last tokens only.

    Args:
      predict: (tokens [batch, window], lengths [batch]) -> logits [batch, window, K].

    Returns:
      A function of a cache, that of `window_cache` at first, and tokens [batch].
    """

    def step(cache, tokens):
        read, lengths = cache
        window = read.shape[1]
        full = (lengths == window)[:, None]
        read = jnp.where(full, jnp.roll(read, -1, axis=1), read)
        lengths = jnp.minimum(lengths + 1, window)
        rows = jnp.arange(len(read))
        read = read.at[rows, lengths - 1].set(tokens)
        return predict(read, lengths)[rows, lengths - 1], (read, lengths)

    return step


def language_sections(task: Any, state: Any, workdir: Path, seed: int) -> list[Section]:
    """Texts that a `LanguageModeling` run writes; writes `samples.txt`.

    Args:
      task: the run's.
      state: the trained state.
      workdir: the run's.
      seed: of the samples.
    """
    variables, model = task.variables(state), task.model
    length = task.sample_length
    # A text begins as the test split does: a state knows little after one token.
    prompt = jnp.asarray(task.arrays["test"]["stream"][:PROMPT_LENGTH])

    @jax.jit
    def write(variables, key, temperature):
        if task.carry_state:
            steps = len(prompt) + length
            cache = model.apply(variables, 1, steps, method="init_cache")

            def step(cache, tokens):
                return model.apply(variables, cache, tokens, method="decode_step")
        else:
            cache = window_cache(1, task.window)
            step = window_step(lambda *read: answers(model.apply(variables, *read)))
        cache, _ = jax.lax.scan(
            lambda cache, token: (step(cache, token[None])[1], None), cache, prompt[:-1]
        )
        # No token of a stream ends it.
        tokens, _, _ = sample(
            step, cache, prompt[-1:], length, -1, key, temperature=temperature
        )
        return tokens[0]

    rows = []
    for number, temperature in enumerate(task.temperatures):
        key = jax.random.fold_in(jax.random.key(seed), number)
        tokens = np.asarray(write(variables, key, temperature))
        text = task.dataset.decode([*np.asarray(prompt), *tokens])
        rows.append((temperature, text))
    (workdir / "samples.txt").write_text(
        "\n\n".join(f"temperature {t}:\n{text}" for t, text in rows) + "\n"
    )
    return [
        Section(title=f"A text at temperature {temperature:g}", text=text)
        for temperature, text in rows
    ]
