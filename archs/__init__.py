"""Deep architectures as pure JAX and Flax modules.

Each module holds one architecture or one idea; all public names are importable from
here.
"""

from . import contracts, pooling, quantification
from .contracts import (
    assert_finite_on_empty_set,
    assert_padding_invariant,
    assert_permutation_equivariant,
    assert_permutation_invariant,
)
from .deepsets import DeepSets, EquivariantLayer
from .dropout import Dropout
from .encoders import CNN, MLP, Classifier, encode_elements
from .histnetq import HistNetQ, PrevalenceHead
from .histogram import (
    HardBinningHistogram,
    HardHistogram,
    LinearHistogram,
    RBFHistogram,
    SigmoidHistogram,
    SoftHistogram,
    hard_histogram,
    linear_histogram,
)
from .pooling import (
    aggregate,
    logsumexp_pool,
    lower_median_pool,
    max_pool,
    mean_pool,
    median_pool,
    min_pool,
    std_pool,
    sum_pool,
)
from .quantification import (
    absolute_error,
    adjusted_classify_and_count,
    classify_and_count,
    confusion_matrix,
    expectation_maximization,
    kl_divergence,
    match_distance,
    normalized_absolute_error,
    normalized_kl_divergence,
    normalized_match_distance,
    normalized_relative_absolute_error,
    probabilistic_adjusted_classify_and_count,
    probabilistic_classify_and_count,
    relative_absolute_error,
    simplex_least_squares,
    smooth,
    squared_error,
)

__all__ = [
    "CNN",
    "MLP",
    "Classifier",
    "DeepSets",
    "Dropout",
    "EquivariantLayer",
    "HardBinningHistogram",
    "HardHistogram",
    "HistNetQ",
    "LinearHistogram",
    "PrevalenceHead",
    "RBFHistogram",
    "SigmoidHistogram",
    "SoftHistogram",
    "absolute_error",
    "adjusted_classify_and_count",
    "aggregate",
    "assert_finite_on_empty_set",
    "assert_padding_invariant",
    "assert_permutation_equivariant",
    "assert_permutation_invariant",
    "classify_and_count",
    "confusion_matrix",
    "contracts",
    "encode_elements",
    "expectation_maximization",
    "hard_histogram",
    "kl_divergence",
    "linear_histogram",
    "logsumexp_pool",
    "lower_median_pool",
    "match_distance",
    "max_pool",
    "mean_pool",
    "median_pool",
    "min_pool",
    "normalized_absolute_error",
    "normalized_kl_divergence",
    "normalized_match_distance",
    "normalized_relative_absolute_error",
    "pooling",
    "probabilistic_adjusted_classify_and_count",
    "probabilistic_classify_and_count",
    "quantification",
    "relative_absolute_error",
    "simplex_least_squares",
    "smooth",
    "squared_error",
    "std_pool",
    "sum_pool",
]
