"""The translations of a test split: written, measured and shown."""

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import figures
from experiments.report import Section
from experiments.tasks.groups import spread
from experiments.tasks.sequence_batches import chosen_batch

FILE = "translations.tsv"
COLUMNS = ("source", "reference", "translation", "log probability")
SHOWN_PAIRS = 12
SHOWN_MAPS = 4


def measure_test(task: Any, state: Any, workdir: Path) -> dict[str, float]:
    """Decodes the test split, writes `translations.tsv` and compares with references.

    Returns:
      "bleu", of sacrebleu with its default tokens, and "exact", the share of
      translations that are the reference.
    """
    import sacrebleu  # slow to import

    @jax.jit
    def translate(state, arrays, index):
        batch = task.eval_batch("test", index, arrays)
        tokens, log_probability = task.translate(
            state, batch["inputs"], batch["lengths"]
        )
        return batch, tokens, log_probability

    dataset = task.dataset
    decode_source = getattr(dataset, "decode_source", dataset.decode)
    # As published, where sub-words lose some of it.
    texts = dataset.texts["test"] if hasattr(dataset, "texts") else None
    rows = []
    for index in range(task.num_eval_batches("test")):
        batch, tokens, log_probability = jax.device_get(
            translate(state, task.arrays, np.int32(index))
        )
        for i in np.flatnonzero(batch["counted"]):
            if texts:
                pair = texts[len(rows)]
            else:
                pair = (
                    decode_source(batch["inputs"][i]),
                    dataset.decode(batch["targets"][i]),
                )
            written = dataset.decode(tokens[i])
            rows.append((*pair, written, f"{log_probability[i]:.4f}"))
    with (workdir / FILE).open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(
            [COLUMNS, *rows]
        )
    references, found = ([row[k] for row in rows] for k in (1, 2))
    return {
        "bleu": sacrebleu.corpus_bleu(found, [references]).score,
        "exact": float(
            np.mean([a == b for a, b in zip(references, found, strict=True)])
        ),
    }


def sections(task: Any, state: Any, workdir: Path) -> list[Section]:
    """The first translations, and where the model looked while it wrote them."""
    with (workdir / FILE).open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    shown = [dict(zip(COLUMNS, row, strict=True)) for row in spread(rows, SHOWN_PAIRS)]
    found = [
        Section(
            title="Translations",
            text=f"{len(shown)} of {len(rows)} pairs of the test split, evenly chosen; "
            f"all are in {FILE}.",
            table=shown,
        )
    ]
    maps = _attention_maps(task, state)
    if maps:
        found.append(
            Section(
                title="Attention",
                text="What each token written (rows) takes from the tokens of the "
                "source (columns), when the true target is read; darker is more. "
                "Of a Transformer: the mean over the heads of the last layer.",
                figure=figures.attention_maps(maps),
                alt="Attention weights of target tokens over source tokens",
            )
        )
    return found


def _attention_maps(task: Any, state: Any) -> list[tuple]:
    """(weights [target, source], target tokens, source tokens) of a few pairs."""
    model = task.model
    if not hasattr(model, "attention_weights") or not getattr(model, "attention", True):
        return []
    batch = jax.device_get(chosen_batch(task, "test", SHOWN_MAPS))
    weights = jax.device_get(
        task.model.apply(
            state.variables,
            batch["inputs"],
            batch["targets"][:, :-1],
            batch["lengths"],
            batch["target_lengths"] - 1,
            method="attention_weights",
        )
    )
    source_token = getattr(task.dataset, "source_token", task.dataset.token)
    maps = []
    for i in range(len(weights)):
        read, written = batch["lengths"][i], batch["target_lengths"][i] - 1
        maps.append(
            (
                weights[i, :written, :read],
                [task.dataset.token(t) for t in batch["targets"][i][1 : written + 1]],
                [source_token(t) for t in batch["inputs"][i][:read]],
            )
        )
    return maps
