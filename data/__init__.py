"""Datasets as arrays with a spec, and samplers as pure functions of a key and a step.

dataset = data.load("digits")
inputs = data.normalize(
    dataset.splits["train"]["inputs"], dataset.shift, dataset.scale
)
"""

from data.bags import Bags
from data.datasets import DataError, Dataset, Spec, load, normalize
from data.gaussian_mixtures import GaussianMixtures
from data.image_sets import ImageDigitSums, UniqueCharacters
from data.lequa import LeQua
from data.number_sets import DigitSums, MaxOfNumbers, PopulationStatistics
from data.outlier_sets import OutlierSets
from data.point_clouds import ModelNet40, Solids

__all__ = [
    "Bags",
    "DataError",
    "Dataset",
    "DigitSums",
    "GaussianMixtures",
    "ImageDigitSums",
    "LeQua",
    "MaxOfNumbers",
    "ModelNet40",
    "OutlierSets",
    "PopulationStatistics",
    "Solids",
    "Spec",
    "UniqueCharacters",
    "load",
    "normalize",
]
