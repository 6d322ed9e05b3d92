"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm


class Progress:
    """Shows steps, their rate, the time left, and the validation measure.

    Args:
      num_steps: steps of the whole run.
      stream: where to; a terminal gets a bar, anything else a line per event.
    """

    def __init__(self, num_steps: int, stream=None):
        self._stream = stream or sys.stderr
        self._num_steps = num_steps
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                unit=" steps",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps "
                "[{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
            )

    def message(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def advanced(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def resumed(self, step: int) -> None:
        """Starts the bar at a step that an earlier process reached."""
        self.message(f"Resuming from the checkpoint of step {step}.")
        if self._bar is not None:
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def logged(self, step: int, values: Mapping[str, float], rate: float) -> None:
        """Training metrics of the last steps; a line where there is no bar."""
        if self._bar is None:
            left = (self._num_steps - step) / rate
            self.message(
                f"step {step}/{self._num_steps}  {format_values(values)}  "
                f"({rate:.3g} steps/s, {left:.0f} s left)"
            )

    def evaluated(
        self, step: int, values: Mapping[str, float], monitor: str, best: Mapping | None
    ) -> None:
        """Validation measures, and the best of the monitored one if any was finite."""
        text = "none yet"
        if best:
            text = f"{best['value']:.4g} at step {best['step']}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{monitor} {values[monitor]:.4g}, best {text}")
        else:
            self.message(
                f"step {step}/{self._num_steps}  validation  {format_values(values)}"
                f"  (best {monitor} {text})"
            )

    def close(self) -> None:
        """Leaves the bar as it is and frees the line."""
        if self._bar is not None:
            self._bar.close()


def format_values(values: Mapping[str, float]) -> str:
    """`name value` pairs with four significant digits."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def parameter_table(parameters: Any) -> str:
    """A line for each parameter (path, shape, number) and their total."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    rows = [
        (
            "/".join(str(getattr(key, "key", key)) for key in path),
            "x".join(map(str, leaf.shape)) or "scalar",
            int(np.prod(leaf.shape)),
        )
        for path, leaf in leaves
    ]
    total = sum(row[2] for row in rows)
    rows.append(("total", "", total))
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"{name:<{width}}  {shape:>16}  {number:>12,}" for name, shape, number in rows
    )
