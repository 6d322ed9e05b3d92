"""Datasets as arrays with a spec, and samplers as pure functions of a key and a step.

dataset = data.load("digits")
inputs = data.normalize(
    dataset.splits["train"]["inputs"], dataset.shift, dataset.scale
)
"""

from data.bags import Bags
from data.chorales import Chorales
from data.datasets import DataError, Dataset, Spec, load, normalize
from data.gaussian_mixtures import GaussianMixtures
from data.image_sets import ImageDigitSums, UniqueCharacters
from data.lequa import LeQua
from data.multi30k import Multi30k
from data.number_sets import DigitSums, MaxOfNumbers, PopulationStatistics
from data.outlier_sets import OutlierSets
from data.point_clouds import ModelNet40, Solids
from data.sentences import DateTranslation, NumberAgreement, RomaDisambiguation
from data.sequential_images import SequentialImages
from data.synthetic_sequences import (
    AddingProblem,
    CopyMemory,
    EmbeddedReber,
    TimeDelay,
)
from data.texts import MovieSentences, TinyShakespeare, WordText

__all__ = [
    "AddingProblem",
    "Bags",
    "Chorales",
    "CopyMemory",
    "DataError",
    "Dataset",
    "DateTranslation",
    "DigitSums",
    "EmbeddedReber",
    "GaussianMixtures",
    "ImageDigitSums",
    "LeQua",
    "MaxOfNumbers",
    "ModelNet40",
    "MovieSentences",
    "Multi30k",
    "NumberAgreement",
    "OutlierSets",
    "PopulationStatistics",
    "RomaDisambiguation",
    "SequentialImages",
    "Solids",
    "Spec",
    "TimeDelay",
    "TinyShakespeare",
    "UniqueCharacters",
    "WordText",
    "load",
    "normalize",
]
