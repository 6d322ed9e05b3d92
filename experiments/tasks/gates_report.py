"""How far the gates of a recurrent network are open while it reads a sentence."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments import figures
from experiments.report import Section

SHOWN_TOKENS = 30
# In the order of the lecture.
GATES = ("update", "relevance", "forget", "output")


def gate_sections(task: Any, state: Any, batch: Mapping) -> list[Section]:
    """The gates of the last layer over one test sentence.

    It is the longest of the batch that has 30 tokens at most; the beginning of the
    shortest one, if all have more.

    Args:
      task: a `SequencePrediction` whose dataset has `token`.
      state: the trained state.
      batch: of test sentences: "inputs" and "lengths".

    Returns:
      One section; none where the model has no gates or reads no tokens.
    """
    inputs = batch["inputs"]
    if not np.issubdtype(inputs.dtype, np.integer):
        return []
    lengths = np.minimum(batch["lengths"], SHOWN_TOKENS)
    fits = batch["lengths"] <= SHOWN_TOKENS
    row = np.argmax(lengths * fits) if fits.any() else np.argmin(batch["lengths"])
    ids = inputs[row, : lengths[row]]
    if not len(ids):
        return []

    @jax.jit
    def read(variables, ids):
        _, found = task.model.apply(variables, ids[None], mutable=["intermediates"])
        return found.get("intermediates", {})

    layers = list(_gates(jax.device_get(read(state.variables, ids))))
    if not layers:
        return []
    # Of both directions the one that reads as we do.
    path, found = [layer for layer in layers if "backward" not in layer[0]][-1]
    gates = {name: found[name][0] for name in GATES if name in found}
    return [
        Section(
            title="Gates",
            text=f"The gates ({', '.join(gates)}) of every unit of the last layer, "
            f"{'/'.join(path)}, while it reads a test sentence. Rows are units, "
            "ordered by the mean of the gate.",
            figure=figures.gates(gates, [task.dataset.token(i) for i in ids]),
            alt="Gates of a recurrent layer, unit by token",
        )
    ]


def _gates(tree: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, dict]]:
    """(path of the cell, its gates) of all cells, in the order of their names."""
    for name in sorted(tree, key=lambda name: (len(name), name)):
        if name == "gates":
            yield path, tree[name][-1]
        elif isinstance(tree[name], Mapping):
            yield from _gates(tree[name], (*path, name))
