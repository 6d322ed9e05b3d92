"""What `SetPrediction` and `SequencePrediction` share: objectives by name.

An objective is a public function of a module, `f(prediction, batch) -> {measure:
values}`.
"""

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def check(module: ModuleType, name: str) -> None:
    """Raises ValueError if the module has no objective of that name."""
    known = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and list(inspect.signature(value).parameters) == ["prediction", "batch"]
        and not key.startswith("_")
    ]
    if name not in known:
        raise ValueError(f"objective must be one of {', '.join(known)}, not {name!r}")


def measure(module: ModuleType, name: str, prediction: Any, batch: Mapping) -> dict:
    """What it measures, {measure: (values, mask or None)}, the loss first."""
    measured = getattr(module, name)(prediction, batch)
    return {
        key: values if isinstance(values, tuple) else (values, None)
        for key, values in measured.items()
    }
