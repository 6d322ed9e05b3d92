"""What can be learned: each task is a `loop.Task`, chosen by `config.task.name`."""

from experiments.tasks.bag_quantification import BagQuantification
from experiments.tasks.classification import Classification
from experiments.tasks.labelled_quantification import LabelledQuantification
from experiments.tasks.quantification import Quantification
from experiments.tasks.set_prediction import SetPrediction

__all__ = [
    "BagQuantification",
    "Classification",
    "LabelledQuantification",
    "Quantification",
    "SetPrediction",
]
