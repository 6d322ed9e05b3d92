"""Metrics as (sum, count) pairs, and the files they are written to.

A step returns ``{name: (sum, count)}``: sums over what is real in its batch (masked
elements count nothing), so that merging over batches, steps and devices is addition
and a mean is taken once, at the end. Under jit the arrays of a batch are global, so a
sum over a batch that is sharded over devices or hosts is already the sum over all.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = dict[str, tuple[float, float]]


def masked(values: jax.Array, mask: jax.Array | None = None) -> tuple:
    """(sum, count) of the values where the mask is True; NaN in the rest is nothing."""
    values = jnp.asarray(values, jnp.float32)
    if mask is None:
        return values.sum(), jnp.asarray(values.size, jnp.float32)
    mask = jnp.broadcast_to(mask, values.shape)
    return jnp.where(mask, values, 0).sum(), mask.sum().astype(jnp.float32)


def merge(sums: Sums, more: Mapping[str, Any]) -> Sums:
    """Adds the pairs of arrays in `more` (of any number of steps) in float64."""
    merged = dict(sums)
    for name, (total, count) in more.items():
        old_total, old_count = merged.get(name, (0.0, 0.0))
        merged[name] = (
            old_total + float(np.sum(np.asarray(total, np.float64))),
            old_count + float(np.sum(np.asarray(count, np.float64))),
        )
    return merged


def means(sums: Mapping) -> dict[str, float]:
    """{name: sum / count}; NaN where the count is 0."""
    return {
        name: total / count if count else math.nan
        for name, (total, count) in sums.items()
    }


def first_nonfinite(metrics: Mapping[str, Any]) -> tuple[int, str, float] | None:
    """The first step (index), metric and value that is NaN or infinite.

    Args:
      metrics: {name: (sum [steps, ...], count [steps, ...])}, as arrays.
    """
    found = []
    for name, (total, count) in metrics.items():
        total, count = np.asarray(total), np.asarray(count)
        bad = ~np.isfinite(total) & (count != 0)
        if bad.any():
            index = np.argwhere(bad)[0]
            found.append((int(index[0]), name, float(total[tuple(index)])))
    return min(found, default=None)


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard events.

    The rows hold nothing that depends on the clock, so a resumed run writes the very
    file of an uninterrupted one.

    Args:
      workdir: where the files are.
      position: length of `metrics.jsonl` to go on from, in bytes; what an interrupted
        run wrote after it is cut off.
      step: the step to go on from; later TensorBoard events are superseded.
    """

    def __init__(self, workdir: Path, position: int = 0, step: int = 0):
        # Imported here: evaluation and prediction write no events.
        from tensorboardX import SummaryWriter

        self._file = (Path(workdir) / "metrics.jsonl").open("ab")
        self._file.truncate(min(position, self._file.tell()))
        self._file.seek(0, 2)
        self._events = SummaryWriter(
            str(Path(workdir) / "tensorboard"),
            purge_step=step + 1 if step else None,
            write_to_disk=True,
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One row: `{"step": ..., "split": ..., **values}`."""
        row = {"step": step, "split": split, **values}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def write_event(self, step: int, name: str, value: float) -> None:
        """A value that depends on the clock: TensorBoard alone."""
        self._events.add_scalar(name, value, step)

    @property
    def position(self) -> int:
        """Length of `metrics.jsonl` in bytes."""
        return self._file.tell()

    def close(self) -> None:
        """Writes what is buffered and closes the files."""
        self._file.close()
        self._events.close()


def read_rows(workdir: Path) -> list[dict]:
    """The rows of `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines: Iterable[str] = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
