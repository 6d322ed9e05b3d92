"""What can be learned: each task is a `loop.Task`, chosen by `config.task.name`."""

from experiments.tasks.bag_quantification import BagQuantification
from experiments.tasks.classification import Classification
from experiments.tasks.labelled_quantification import LabelledQuantification
from experiments.tasks.language_modeling import LanguageModeling
from experiments.tasks.quantification import Quantification
from experiments.tasks.sequence_prediction import SequencePrediction
from experiments.tasks.set_prediction import SetPrediction
from experiments.tasks.translation import Translation

__all__ = [
    "BagQuantification",
    "Classification",
    "LabelledQuantification",
    "LanguageModeling",
    "Quantification",
    "SequencePrediction",
    "SetPrediction",
    "Translation",
]
