"""Quantification: estimating the prevalence of each class in a bag.

Measures compare the true prevalences p with an estimate p̂ over K classes; both are
`[..., K]` and the result is `[...]`. All are differentiable almost everywhere, so each
can be a loss. Measures that divide by prevalences smooth both first,

    p' = (p + ε) / (1 + K ε),    ε = 1/(2m) for bags of m examples by convention,

and require `epsilon`.

The classical methods turn a classifier's posteriors on a bag, `[..., element, K]`, into
prevalences; they are the baselines of any quantifier. `mask [..., element]` is True for
real elements. They are pure functions and compile under `jax.jit` and `jax.vmap`.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from .contracts import check_mask, zero_absent
from .pooling import mean_pool


def smooth(prevalence: jax.Array, epsilon: float) -> jax.Array:
    """`(p + ε) / (1 + K ε)`: no class is without prevalence, the sum remains one."""
    return (prevalence + epsilon) / (1 + prevalence.shape[-1] * epsilon)


def absolute_error(prevalence: jax.Array, estimate: jax.Array) -> jax.Array:
    """`AE = 1/K sum_k |p_k - p̂_k|`."""
    _check_prevalences(prevalence, estimate)
    return jnp.mean(jnp.abs(prevalence - estimate), axis=-1)


def normalized_absolute_error(prevalence: jax.Array, estimate: jax.Array) -> jax.Array:
    """`NAE = sum_k |p_k - p̂_k| / (2 (1 - min_k p_k))`, in [0, 1]."""
    _check_prevalences(prevalence, estimate)
    worst = 2 * (1 - jnp.min(prevalence, axis=-1))
    return jnp.sum(jnp.abs(prevalence - estimate), axis=-1) / worst


def squared_error(prevalence: jax.Array, estimate: jax.Array) -> jax.Array:
    """`SE = 1/K sum_k (p_k - p̂_k)^2`."""
    _check_prevalences(prevalence, estimate)
    return jnp.mean((prevalence - estimate) ** 2, axis=-1)


def relative_absolute_error(
    prevalence: jax.Array, estimate: jax.Array, *, epsilon: float
) -> jax.Array:
    """`RAE = 1/K sum_k |p'_k - p̂'_k| / p'_k` of the smoothed prevalences."""
    _check_prevalences(prevalence, estimate)
    p, q = smooth(prevalence, epsilon), smooth(estimate, epsilon)
    return jnp.mean(jnp.abs(p - q) / p, axis=-1)


def normalized_relative_absolute_error(
    prevalence: jax.Array, estimate: jax.Array, *, epsilon: float
) -> jax.Array:
    """`NRAE = RAE / max RAE`, in [0, 1], of the smoothed prevalences.

    The worst estimate puts everything on the rarest class:
    `max RAE = (K - 1 + (1 - min p') / min p') / K`.
    """
    _check_prevalences(prevalence, estimate)
    num_classes = prevalence.shape[-1]
    rarest = jnp.min(smooth(prevalence, epsilon), axis=-1)
    worst = (num_classes - 1 + (1 - rarest) / rarest) / num_classes
    return relative_absolute_error(prevalence, estimate, epsilon=epsilon) / worst


def kl_divergence(
    prevalence: jax.Array, estimate: jax.Array, *, epsilon: float
) -> jax.Array:
    """`KLD = sum_k p'_k log(p'_k / p̂'_k)` of the smoothed prevalences."""
    _check_prevalences(prevalence, estimate)
    p, q = smooth(prevalence, epsilon), smooth(estimate, epsilon)
    return jnp.sum(p * jnp.log(p / q), axis=-1)


def normalized_kl_divergence(
    prevalence: jax.Array, estimate: jax.Array, *, epsilon: float
) -> jax.Array:
    """`NKLD = 2 e^KLD / (1 + e^KLD) - 1 = tanh(KLD / 2)`, in [0, 1)."""
    return jnp.tanh(kl_divergence(prevalence, estimate, epsilon=epsilon) / 2)


def match_distance(prevalence: jax.Array, estimate: jax.Array) -> jax.Array:
    """`MD = sum_{k<K} |P_k - P̂_k|`, P the cumulated prevalences of ordered classes.

    It is the earth mover's distance where neighbouring classes are one apart.
    """
    _check_prevalences(prevalence, estimate)
    difference = jnp.cumsum(prevalence - estimate, axis=-1)
    return jnp.sum(jnp.abs(difference[..., :-1]), axis=-1)


def normalized_match_distance(prevalence: jax.Array, estimate: jax.Array) -> jax.Array:
    """`NMD = MD / (K - 1)`, in [0, 1]; for ordered classes."""
    return match_distance(prevalence, estimate) / (prevalence.shape[-1] - 1)


def classify_and_count(
    posteriors: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """CC: the share of elements whose likeliest class is k.

    Args:
      posteriors: [..., element, K].
      mask: None or bool [..., element].

    Returns:
      Prevalences [..., K]; zeros for a bag without any real element.
    """
    check_mask(mask, posteriors.shape[:-1])
    return mean_pool(_votes(posteriors), mask)


def probabilistic_classify_and_count(
    posteriors: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """PCC: the mean posterior `1/m sum_i P(k | x_i)`.

    Arguments and result are those of `classify_and_count`.
    """
    check_mask(mask, posteriors.shape[:-1])
    return mean_pool(posteriors, mask)


def confusion_matrix(
    posteriors: jax.Array, labels: jax.Array, *, probabilistic: bool = False
) -> jax.Array:
    """Estimates P(predicted | true) from labelled examples the classifier has not seen.

    `M[i, j] = mean over examples of class j of [i is the likeliest class]`, or of the
    posterior P(i | x) when `probabilistic`. Then `M p` is what CC (PCC) expects to
    count in a bag of prevalences p. A class without examples gets the
    identity's column.

    Args:
      posteriors: [n, K].
      labels: int [n], between 0 and K - 1; others count for no class.
      probabilistic: False for ACC, True for PACC.

    Returns:
      M [K predicted, K true], whose columns sum to one.
    """
    num_classes = posteriors.shape[-1]
    predicted = posteriors if probabilistic else _votes(posteriors)
    member = jax.nn.one_hot(labels, num_classes, dtype=posteriors.dtype)
    count = jnp.sum(member, axis=0)
    mean = jnp.matmul(predicted.T, member, precision="highest")
    mean = mean / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, jnp.eye(num_classes, dtype=mean.dtype))


def adjusted_classify_and_count(
    posteriors: jax.Array, confusion: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """ACC: undoes the classifier's confusion, `argmin_p |M p - CC|` on the simplex.

    Forman, "Quantifying counts and costs via classification", 2008; the constrained
    least squares keep the answer a distribution where M is (nearly) singular.

    Args:
      posteriors: [..., element, K].
      confusion: M [K, K] by `confusion_matrix`.
      mask: None or bool [..., element].

    Returns:
      Prevalences [..., K].
    """
    return simplex_least_squares(confusion, classify_and_count(posteriors, mask))


def probabilistic_adjusted_classify_and_count(
    posteriors: jax.Array, confusion: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """PACC: `argmin_p |M p - PCC|` on the simplex, M of the probabilistic confusion.

    Bella, Ferri, Hernández-Orallo and Ramírez-Quintana, "Quantification via probability
    estimators", 2010. Arguments and result are those of `adjusted_classify_and_count`.
    """
    counted = probabilistic_classify_and_count(posteriors, mask)
    return simplex_least_squares(confusion, counted)


def expectation_maximization(
    posteriors: jax.Array,
    train_prevalence: jax.Array,
    mask: jax.Array | None = None,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
) -> jax.Array:
    """EMQ (SLD): the prevalences of largest likelihood under prior shift.

    Starts from the training prevalences π and repeats

        E:  w_ik ∝ (p_k / π_k) P(k | x_i),  sum_k w_ik = 1
        M:  p_k = 1/m sum_i w_ik

    until the mean absolute change is below `tolerance` (tested from the 12th step on)
    or `max_steps` are done. Each step increases
    `sum_i log sum_k (p_k / π_k) P(k | x_i)`. An element whose posterior is zero at all
    classes with training examples has `w_i = p`: it says nothing.

    Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a
    priori probabilities", Neural Computation 2002.

    Args:
      posteriors: [..., element, K], calibrated.
      train_prevalence: π [K], the prevalences the classifier was trained at.
      mask: None or bool [..., element].
      tolerance: see above.
      max_steps: see above.

    Returns:
      Prevalences [..., K]; zeros for a bag without any real element.
    """
    check_mask(mask, posteriors.shape[:-1])
    if mask is None:
        mask = jnp.ones(posteriors.shape[:-1], bool)
    tiny = jnp.finfo(posteriors.dtype).tiny
    # Padding may hold NaN; a class without training examples has no likelihood.
    posteriors = zero_absent(posteriors, mask)
    seen = train_prevalence > 0
    likelihood = jnp.where(seen, posteriors / jnp.where(seen, train_prevalence, 1), 0)

    def one_bag(likelihood, mask):
        def unfinished(state):
            step, _, change = state
            return (step < max_steps) & ((change >= tolerance) | (step <= 11))

        def update(state):
            step, p, _ = state
            joint = p * likelihood
            total = jnp.sum(joint, axis=-1, keepdims=True)
            share = jnp.where(total >= tiny, joint / jnp.maximum(total, tiny), p)
            after = mean_pool(share, mask)
            return step + 1, after, jnp.mean(jnp.abs(after - p))

        start = jnp.asarray(train_prevalence, likelihood.dtype)
        infinite = jnp.asarray(jnp.inf, likelihood.dtype)
        return jax.lax.while_loop(unfinished, update, (0, start, infinite))[1]

    return jnp.vectorize(one_bag, signature="(m,k),(m)->(k)")(likelihood, mask)


def bias_corrected_temperature(
    posteriors: jax.Array, labels: jax.Array, *, num_steps: int = 100
) -> tuple[jax.Array, jax.Array]:
    """BCTS: the scale and bias of `calibrate_posteriors` of maximum likelihood.

    The scale is the inverse of a temperature; the log loss is convex in both. EMQ on
    posteriors calibrated so is EMQ-BCTS.

    Alexandari, Kundaje and Shrikumar, "Maximum likelihood with bias-corrected
    calibration is hard-to-beat at label shift adaptation", ICML 2020.

    Args:
      posteriors: [n, K], of labelled examples the classifier has not seen.
      labels: int [n].
      num_steps: of L-BFGS.

    Returns:
      `(scale [], bias [K])`.
    """
    logits = _logits(posteriors)

    def loss(calibration):
        scale, bias = calibration
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            scale * logits + bias, labels
        ).mean()

    optimizer = optax.lbfgs()

    def step(carry, _):
        calibration, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(
            calibration, state=state
        )
        updates, state = optimizer.update(
            gradient, state, calibration, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(calibration, updates), state), None

    none = (jnp.ones((), logits.dtype), jnp.zeros(logits.shape[-1], logits.dtype))
    carry = (none, optimizer.init(none))
    return jax.lax.scan(step, carry, None, length=num_steps)[0][0]


def calibrate_posteriors(
    posteriors: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """`softmax(scale log P(k | x_i) + bias)`; see `bias_corrected_temperature`.

    Args:
      posteriors: [..., K].
      scale: [].
      bias: [K].

    Returns:
      Calibrated posteriors [..., K].
    """
    return jax.nn.softmax(scale * _logits(posteriors) + bias)


def simplex_least_squares(matrix: jax.Array, target: jax.Array) -> jax.Array:
    """`argmin_p |A p - b|^2` subject to `p >= 0`, `sum_k p_k = 1`.

    An active-set method after Lawson and Hanson (1974): the equality-constrained
    problem is solved on a growing support, so the answer is exact up to rounding after
    about as many steps as it has non-zero entries, whatever A's conditioning. Where A
    does not determine p (equal columns), one of the solutions is returned.

    Args:
      matrix: A [..., c, K].
      target: b [..., c].

    Returns:
      p [..., K].
    """
    dtype = jnp.result_type(matrix, target, jnp.float32)
    solve = jnp.vectorize(_simplex_least_squares, signature="(c,k),(c)->(k)")
    return solve(jnp.asarray(matrix, dtype), jnp.asarray(target, dtype))


def _simplex_least_squares(matrix: jax.Array, target: jax.Array) -> jax.Array:
    rows, columns = matrix.shape
    dtype = matrix.dtype
    identity = jnp.eye(columns, dtype=dtype)
    size = jnp.max(jnp.abs(matrix))
    size *= size + jnp.max(jnp.abs(target))
    tolerance = 10 * jnp.finfo(dtype).eps * size

    def on_support(support):
        # The residual r is an unknown of its own: [[I, A, 0], [A', 0, 1], [0, 1', 0]]
        # has the conditioning of A, where normal equations would square it.
        a = matrix * support
        one = support[:, None].astype(dtype)
        outside = identity * (~support)[:, None]
        system = jnp.block(
            [
                [jnp.eye(rows, dtype=dtype), a, jnp.zeros((rows, 1), dtype)],
                [a.T, outside, one],
                [jnp.zeros((1, rows), dtype), one.T, jnp.zeros((1, 1), dtype)],
            ]
        )
        right = jnp.concatenate([target, jnp.zeros(columns, dtype), jnp.ones(1, dtype)])
        solution = jnp.linalg.solve(system, right)
        return solution[:rows], solution[rows:-1], solution[-1]

    def unfinished(state):
        step, _, _, done = state
        return (step < 4 * columns + 4) & ~done

    def update(state):
        step, support, p, _ = state
        residual, solution, multiplier = on_support(support)
        blocked = support & (solution <= 0)
        feasible = ~jnp.any(blocked)
        # Feasible: let the class in whose weight would reduce the error most.
        gain = jnp.where(
            support,
            -jnp.inf,
            jnp.matmul(residual, matrix, precision="highest") + multiplier,
        )
        grows = jnp.max(gain) > tolerance
        grown = support | ((jnp.arange(columns) == jnp.argmax(gain)) & grows)
        # Infeasible: go towards the solution until a class loses its last weight.
        ratio = jnp.where(
            blocked, p / jnp.maximum(p - solution, jnp.finfo(dtype).tiny), jnp.inf
        )
        moved = jnp.maximum(p + jnp.min(ratio) * (solution - p), 0)
        shrunk = support & (jnp.arange(columns) != jnp.argmin(ratio))
        return (
            step + 1,
            jnp.where(feasible, grown, shrunk),
            jnp.where(feasible, solution, jnp.where(shrunk, moved, 0)),
            feasible & ~grows,
        )

    errors = jnp.sum((matrix - target[:, None]) ** 2, axis=0)
    support = jnp.arange(columns) == jnp.argmin(errors)
    start = (0, support, support.astype(dtype), False)
    p = jax.lax.while_loop(unfinished, update, start)[2]
    return p / jnp.sum(p)


def _logits(posteriors: jax.Array) -> jax.Array:
    # Finite where a posterior has underflown to zero.
    return jnp.log(jnp.maximum(posteriors, jnp.finfo(posteriors.dtype).tiny))


def _votes(posteriors: jax.Array) -> jax.Array:
    likeliest = jnp.argmax(posteriors, axis=-1)
    return jax.nn.one_hot(likeliest, posteriors.shape[-1], dtype=posteriors.dtype)


def _check_prevalences(prevalence: jax.Array, estimate: jax.Array) -> None:
    # Broadcasting [n, K] against [K] would average over the wrong pairs unnoticed.
    chex.assert_equal_shape(
        [prevalence, estimate],
        custom_message=(
            "estimate must have the shape of prevalence, "
            f"{prevalence.shape}, but its shape is {estimate.shape}."
        ),
        exception_type=ValueError,
    )
