"""Checkpoints of a run: orbax, asynchronous, the latest and the best kept.

The only module that knows orbax.
"""

import json
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import UserError

_policies = ocp.checkpoint_managers


class Checkpoints:
    """Checkpoints (a pytree and a JSON dictionary) of one run, by step.

    The two latest are kept (the one before serves when the latest is damaged) and
    the `keep_best` with the smallest measure.

    Args:
      directory: where they are; made when missing.
      keep_best: how many of the best are kept besides.
      read_only: leaves alone what another process may be writing.
    """

    def __init__(self, directory: Path, keep_best: int = 1, read_only: bool = False):
        self.directory = Path(directory).absolute()
        preservation = _policies.AnyPreservationPolicy(
            [
                _policies.LatestN(2),
                _policies.BestN(
                    get_metric_fn=lambda metrics: metrics["measure"],
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["measure"],
            best_mode="min",
            preservation_policy=preservation,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            # Else threads wait minutes for a directory that could not be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._open()

    def _open(self):
        # The manager reads all measures at once and raises at a damaged one.
        for file in self.directory.glob("[0-9]*/metrics/metrics"):
            try:
                json.loads(file.read_text())["measure"]
            except (ValueError, KeyError, TypeError) as error:
                self._set_aside(int(file.parts[-3]), error)
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the smallest measure, the latest if none was measured."""
        best = self._manager.best_step()
        return self._manager.latest_step() if best is None else best

    def save(
        self, step: int, state: Any, progress: Mapping, measure: float | None
    ) -> None:
        """Saves in the background; waits for the save before it, if any.

        A checkpoint of the same step is replaced.

        Args:
          step: number of training steps behind the state.
          state: a pytree of arrays. It may be donated after the call.
          progress: JSON values that the loop needs beside the state.
          measure: the validation measure of this state; None when not measured.

        Raises:
          UserError: when this or the save before it cannot be written.
        """
        # Donation may reuse the buffers before the background write has read them.
        state = jax.tree.map(jnp.copy, state)
        progress = {"notes": dict(progress), "checksum": _checksum(state, progress)}
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics=None if measure is None else {"measure": measure},
            )
        except Exception as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Blocks until the save in the background is complete on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Waits for the save in the background and frees the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, step: int, template: Any) -> tuple[Any, dict]:
        """The state and the progress of one checkpoint.

        Args:
          step: one of `steps()`.
          template: a pytree of arrays or `jax.ShapeDtypeStruct` like the state.

        Raises:
          ValueError: when it is not what was saved, bit for bit; whatever orbax raises
            for a checkpoint that cannot be decoded.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template),
                progress=ocp.args.JsonRestore(),
            ),
        )
        state, progress = restored.state, restored.progress["notes"]
        if _checksum(state, progress) != restored.progress["checksum"]:
            raise ValueError("its checksum is not that of what was saved")
        return state, progress

    def restore_latest(self, template: Any) -> tuple[int, Any, dict] | None:
        """The newest checkpoint that can be read: (step, state, progress).

        A damaged one is moved to `damaged_checkpoints` beside the directory, with a
        warning, and the one before is tried.

        Raises:
          UserError: when there are checkpoints but none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                state, progress = self.restore(step, template)
            except Exception as error:
                self._manager.close()
                self._set_aside(step, error)
                self._open()
            else:
                return step, state, progress
        if steps:
            raise UserError(
                f"None of the checkpoints in {self.directory} can be read. They were "
                f"moved to {self._damaged}. Start again with another --workdir."
            )
        return None

    @property
    def _damaged(self) -> Path:
        return self.directory.parent / "damaged_checkpoints"

    def _set_aside(self, step: int, error: Exception) -> None:
        self._damaged.mkdir(exist_ok=True)
        target = self._damaged / str(step)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(self.directory / str(step), target)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"The checkpoint of step {step} cannot be read ({first_line[:200]}); it is "
            f"now in {target}. Falling back to the one before.",
            stacklevel=3,
        )

    def _unwritable(self, error: Exception) -> UserError:
        # The operating system's word; in a long message of tensorstore it comes last.
        text = str(error).rpartition(": ")[2] or type(error).__name__
        if isinstance(error, OSError):
            text = error.strerror or text
        kept = [step for step in self.steps() if (self.directory / str(step)).is_dir()]
        return UserError(
            f"Could not write a checkpoint to {self.directory}: {text}. "
            f"Free space or choose another --workdir; checkpoints of steps {kept} are "
            "untouched, and the same command resumes from the last of them."
        )


def _checksum(state: Any, progress: Mapping) -> int:
    """CRC-32 of all bytes: a flipped one may be decoded to just another number."""
    checksum = zlib.crc32(json.dumps(progress, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8), checksum)
    return checksum
