"""What can be learned: each task is a `loop.Task`, chosen by `config.task.name`."""

from experiments.tasks.classification import Classification
from experiments.tasks.quantification import Quantification

__all__ = ["Classification", "Quantification"]
