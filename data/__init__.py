"""Datasets as arrays with a spec, and samplers as pure functions of a key and a step.

dataset = data.load("digits")
inputs = data.normalize(
    dataset.splits["train"]["inputs"], dataset.shift, dataset.scale
)
"""

from data.datasets import DataError, Dataset, Spec, load, normalize

__all__ = ["DataError", "Dataset", "Spec", "load", "normalize"]
