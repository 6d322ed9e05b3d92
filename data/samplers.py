"""Batches and bags as pure functions of `(key, step, arrays)`.

Nothing here keeps a state: the same key and step give the same batch in any process,
so resuming needs no iterator and everything runs inside the jitted training loop.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ClassTable(NamedTuple):
    """The examples of a dataset grouped by class.

    Class `k` holds the examples `order[start[k] : start[k] + count[k]]`.

    Attributes:
        order: int32 [n], example indices sorted by class.
        start: int32 [K], where each class begins in `order`.
        count: int32 [K], examples in each class; zero is allowed.
    """

    order: jax.Array
    start: jax.Array
    count: jax.Array


def class_table(labels: np.ndarray, num_classes: int) -> ClassTable:
    """Groups the examples by class; runs on the host, once.

    Args:
        labels: int [n], each in `range(num_classes)`.
        num_classes: K.

    Returns:
        A `ClassTable`.

    Raises:
        ValueError: `labels` is empty, not one-dimensional or out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(
            f"labels must be a non-empty vector, its shape is {labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1} (num_classes={num_classes}), "
            f"they span {labels.min()}..{labels.max()}."
        )
    count = np.bincount(labels, minlength=num_classes)
    return ClassTable(
        order=jnp.asarray(np.argsort(labels, kind="stable"), jnp.int32),
        start=jnp.asarray(np.cumsum(count) - count, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
    )


def epoch_indices(
    key: jax.Array, step: jax.Array | int, num_examples: int, batch_size: int
) -> jax.Array:
    """Example indices of one training step: every example exactly once an epoch.

    Position `p = step * batch_size + i` belongs to epoch `p // num_examples`, and each
    epoch has a permutation of its own, keyed by `fold_in(key, epoch)`. No example is
    dropped: a batch may hold the end of one epoch and the beginning of the next.
    Only the `batch_size` needed entries of the permutation are computed (see
    `_permute`), so the cost does not grow with the dataset.

    Args:
        key: PRNG key of the whole run.
        step: int32 scalar, may be traced.
        num_examples: n.
        batch_size: at most `num_examples`.

    Returns:
        int32 [batch_size] in `range(num_examples)`.

    Raises:
        ValueError: `batch_size` is not in `1..num_examples`, or the product of both
            does not fit 32 bits.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be in 1..num_examples={num_examples}, got {batch_size}."
        )
    if num_examples * batch_size >= 2**32:
        raise ValueError(
            "num_examples * batch_size must be below 2**32, got "
            f"{num_examples} * {batch_size}."
        )
    # step * batch_size would overflow in long runs; after n steps come batch_size
    # whole epochs, so only the remainder needs the product.
    step = jnp.asarray(step, jnp.uint32)
    offset = step % num_examples * batch_size
    epoch = step // num_examples * batch_size + offset // num_examples
    position = offset % num_examples + jnp.arange(batch_size, dtype=jnp.uint32)
    following = position >= num_examples

    words = jax.vmap(lambda e: _random_words(jax.random.fold_in(key, e), num_examples))(
        epoch + jnp.arange(2, dtype=jnp.uint32)
    )
    words = words[following.astype(jnp.int32)]
    position = jnp.where(following, position - num_examples, position)
    return _permute(words, position, num_examples)


def length_buckets(
    lengths: np.ndarray, num_buckets: int, min_size: int = 1
) -> tuple[tuple[int, int, int], ...]:
    """Cuts examples sorted by length into groups with the least padding; on the host.

    Every group is padded to its longest example. The cut is the best of all, by
    dynamic programming over the distinct lengths.

    Args:
        lengths: int [n], not decreasing.
        num_buckets: most groups.
        min_size: fewest examples of a group, such as the batch size.

    Returns:
        (start, stop, length) of each group: the examples `start` to `stop - 1`.

    Raises:
        ValueError: `lengths` is empty or decreases, or a number is below one.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not len(lengths) or (np.diff(lengths) < 0).any():
        raise ValueError("lengths must be a vector of numbers that do not decrease.")
    if num_buckets < 1 or min_size < 1:
        raise ValueError(
            "num_buckets and min_size must be 1 or more, got "
            f"{num_buckets} and {min_size}."
        )
    longest, counts = np.unique(lengths, return_counts=True)
    stops = np.concatenate([[0], np.cumsum(counts)])
    # Padded steps of a group that ends with length j and starts behind length i.
    size = stops[None, :] - stops[:, None]
    steps = size * np.concatenate([[0], longest]).astype(float)
    steps[size < min(min_size, len(lengths))] = np.inf
    best = [np.where(stops > 0, np.inf, 0.0)]
    cuts = []
    for _ in range(min(num_buckets, len(longest))):
        total = best[-1][:, None] + steps
        cuts.append(total.argmin(0))
        best.append(total.min(0))
    end, buckets = len(stops) - 1, []
    number = int(np.argmin([costs[-1] for costs in best[1:]]))
    for cut in cuts[number::-1]:
        start = cut[end]
        buckets.append((int(stops[start]), int(stops[end]), int(longest[end - 1])))
        end = start
    return tuple(buckets[::-1])


def bucketed_batch(
    key: jax.Array,
    step: jax.Array | int,
    buckets: Sequence[tuple[int, int, int]],
    batch_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Example indices of one training step, all of one bucket of alike lengths.

    An epoch has `sum_b size_b // batch_size` steps, in an order of its own, and visits
    every example at most once; what is left over of a bucket, less than a batch, is
    other examples each epoch. With the buckets' lengths as static branches,

        jax.lax.switch(bucket, [lambda i: step(select(i, length)) for ... in buckets],
                       indices)

    compiles once for each bucket.

    Args:
        key: PRNG key of the whole run.
        step: int32 scalar, may be traced.
        buckets: (start, stop, length) of each, see `length_buckets`.
        batch_size: at most the size of the smallest bucket.

    Returns:
        The bucket, int32 scalar, and indices, int32 [batch_size].

    Raises:
        ValueError: `batch_size` is not in 1 to the size of the smallest bucket.
    """
    start, stop = np.array([bucket[:2] for bucket in buckets]).T
    size = stop - start
    if not 1 <= batch_size <= size.min():
        raise ValueError(
            f"batch_size must be in 1..{size.min()}, the size of the smallest bucket, "
            f"got {batch_size}."
        )
    ends = np.cumsum(size // batch_size)
    epoch = step // int(ends[-1])
    order_key, example_key = jax.random.split(key)
    slot = epoch_indices(order_key, step, int(ends[-1]), 1)[0]
    bucket = (slot >= jnp.asarray(ends)).sum(dtype=jnp.int32)
    batch = slot - jnp.asarray(ends - size // batch_size)[bucket]
    example_key = jax.random.fold_in(jax.random.fold_in(example_key, epoch), bucket)
    place = _permute(
        _random_words(example_key, int(size.max())),
        batch * batch_size + jnp.arange(batch_size),
        jnp.asarray(size)[bucket],
    )
    return bucket, jnp.asarray(start, jnp.int32)[bucket] + place


def stream_batch(
    step: jax.Array | int, stream: jax.Array, batch_size: int, time: int
) -> dict[str, jax.Array]:
    """Windows that follow one another, for truncated backpropagation through time.

    The stream is cut into `batch_size` parts of `w * time` tokens, and each row reads a
    part of its own, `time` tokens a step: what row b holds at step s continues what it
    held at step s - 1. After w steps all begin again. Up to `batch_size * time` tokens
    at the end are left out.

    Args:
        step: int32 scalar, may be traced.
        stream: int [n], the tokens of a text.
        batch_size: number of parts.
        time: tokens of a window.

    Returns:
        "inputs" and "targets" [batch_size, time], the targets being one token ahead;
        "lengths" int32 [batch_size], all `time`; "reset" bool scalar: whether the
        windows are the first of the parts, so that no state is to be carried on.

    Raises:
        ValueError: the stream is shorter than one window for each row.
    """
    windows = (len(stream) - 1) // (batch_size * time) if batch_size * time > 0 else 0
    if windows < 1:
        raise ValueError(
            "batch_size and time must be 1 or more, and batch_size * time below the "
            f"stream's length {len(stream)}, got {batch_size} and {time}."
        )
    window = jnp.asarray(step, jnp.int32) % windows
    starts = jnp.arange(batch_size) * (windows * time) + window * time
    return _windows(stream, starts, time) | {"reset": window == 0}


def random_windows(
    key: jax.Array, stream: jax.Array, batch_size: int, time: int
) -> dict[str, jax.Array]:
    """Windows from anywhere, each starting point being alike likely.

    Args:
        key: PRNG key of the batch.
        stream: int [n], the tokens of a text.
        batch_size: number of windows.
        time: tokens of a window.

    Returns:
        "inputs", "targets" and "lengths", see `stream_batch`.

    Raises:
        ValueError: the stream is shorter than a window.
    """
    if not 1 <= time < len(stream):
        raise ValueError(
            f"time must be in 1..{len(stream) - 1}, one below the stream's length, got "
            f"{time}."
        )
    starts = jax.random.randint(key, (batch_size,), 0, len(stream) - time)
    return _windows(stream, starts, time)


def _windows(stream: jax.Array, starts: jax.Array, time: int) -> dict[str, jax.Array]:
    tokens = stream[starts[:, None] + jnp.arange(time + 1)]
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "lengths": jnp.full(len(starts), time, jnp.int32),
    }


def draw_prevalences(
    key: jax.Array,
    num_bags: int,
    num_classes: int,
    *,
    protocol: str = "uniform",
    concentration: float | jax.Array = 1.0,
    natural: jax.Array | None = None,
    bag_size: int | None = None,
    grid_points: int = 21,
) -> jax.Array:
    """Class prevalences of bags under a sampling protocol.

    Args:
        key: PRNG key.
        num_bags: B.
        num_classes: K.
        protocol: one of
            `"uniform"`: uniform on the simplex, by the gaps between K - 1 sorted
                uniform numbers (Kraemer's method; Smith & Tromble 2004, "Sampling
                uniformly from the unit simplex"), the artificial prevalence protocol
                without a grid;
            `"dirichlet"`: Dirichlet(`concentration`);
            `"natural"`: what independent draws of `bag_size` examples from `natural`
                give, Multinomial(`bag_size`, `natural`) / `bag_size`;
            `"grid"`: uniform over all points of the simplex whose coordinates are
                multiples of 1 / (`grid_points` - 1), the artificial prevalence
                protocol of Forman (2005);
            `"published"`: that of the published code of HistNetQ and of its figures
                on images, for comparison with them: the gaps between 0, K - 1 sorted
                whole numbers drawn from `round(0.01 m) .. round(0.99 m) - 1`, and m =
                `bag_size`, over m. It is not uniform on the simplex: the first and the
                last class are never absent, and of ten classes these two have a mean
                of 0.108 and 0.110 where the others have 0.098.
        concentration: for `"dirichlet"`, a positive scalar or [K].
        natural: for `"natural"`, [K], sums to one.
        bag_size: for `"natural"` and `"published"`, the number of examples of a bag.
        grid_points: for `"grid"`, at least 2.

    Returns:
        float32 [B, K], rows sum to one.

    Raises:
        ValueError: unknown protocol, or an argument it needs is missing.
    """
    if protocol == "uniform":
        cuts = jnp.sort(jax.random.uniform(key, (num_bags, num_classes - 1)), axis=-1)
        return jnp.diff(cuts, prepend=0.0, append=1.0, axis=-1)
    if protocol == "dirichlet":
        alpha = jnp.broadcast_to(jnp.float32(concentration), num_classes)
        return jax.random.dirichlet(key, alpha, (num_bags,))
    if protocol == "natural":
        if natural is None or bag_size is None:
            raise ValueError('protocol="natural" needs natural and bag_size.')
        natural = jnp.asarray(natural, jnp.float32)
        if natural.shape != (num_classes,):
            raise ValueError(
                f"natural must have shape ({num_classes},), it has {natural.shape}."
            )
        counts = jax.random.multinomial(
            key, bag_size, natural, shape=(num_bags, num_classes)
        )
        return counts / bag_size
    if protocol == "grid":
        if grid_points < 2:
            raise ValueError(f"grid_points must be at least 2, got {grid_points}.")
        # Stars and bars: the gaps between K - 1 bars among the stars. The grid has
        # binomial(grid_points + K - 2, K - 1) points, far too many to list.
        places = grid_points + num_classes - 2
        noise = jax.random.uniform(key, (num_bags, places))
        bars = jnp.sort(jnp.argsort(noise, axis=-1)[:, : num_classes - 1], axis=-1)
        stars = jnp.diff(bars, prepend=-1, append=places, axis=-1) - 1
        return stars / jnp.float32(grid_points - 1)
    if protocol == "published":
        if bag_size is None or bag_size < 2:
            raise ValueError(
                f'protocol="published" needs a bag_size of 2 or more, got {bag_size}.'
            )
        low, high = round(0.01 * bag_size), round(0.99 * bag_size)
        shape = (num_bags, num_classes - 1)
        cuts = jnp.sort(jax.random.randint(key, shape, low, high), axis=-1)
        return jnp.diff(cuts, prepend=0, append=bag_size, axis=-1) / bag_size
    raise ValueError(
        'protocol must be "uniform", "dirichlet", "natural", "grid" or "published", '
        f"got {protocol!r}."
    )


def draw_bags(
    key: jax.Array,
    table: ClassTable,
    prevalences: jax.Array,
    bag_size: int,
    *,
    replace: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Bags of examples with given prevalences, and the prevalences they really have.

    The class counts are the largest-remainder rounding of `prevalences * bag_size`.
    A class without examples gives its share to the others in proportion to theirs.
    Without replacement a class gives at most what it has; the rest comes from the
    other classes in proportion to what they have left. The label is exact for the
    bag drawn, whatever was asked. A bag is in random order, so that nothing can read
    the label from the positions.

    Args:
        key: PRNG key.
        table: the classes' examples, K classes.
        prevalences: float [B, K], rows sum to one.
        bag_size: m, examples per bag.
        replace: whether an example may come more than once in the same bag.

    Returns:
        indices int32 [B, m] into the dataset, prevalence float32 [B, K] of those
        examples.

    Raises:
        ValueError: shapes disagree, `bag_size` is not positive, or without
            replacement it exceeds the number of examples.
    """
    num_examples, num_classes = len(table.order), len(table.count)
    if prevalences.ndim != 2 or prevalences.shape[1] != num_classes:
        raise ValueError(
            f"prevalences must have shape [bags, {num_classes}] as the table has "
            f"{num_classes} classes, got {prevalences.shape}."
        )
    if bag_size < 1 or (not replace and bag_size > num_examples):
        limit = (
            "" if replace else f" and at most {num_examples}, the examples there are"
        )
        raise ValueError(f"bag_size must be at least 1{limit}, got {bag_size}.")

    def draw(asked, first, order_words, member_words):  # one bag
        share = jnp.where(table.count > 0, asked, 0.0)
        # All the mass on empty classes: any class that has examples will do.
        share = jnp.where(share.sum() > 0, share, table.count > 0)
        counts = _largest_remainder(share, bag_size, first)
        if not replace:
            counts = jnp.minimum(counts, table.count)
            counts += _largest_remainder(
                table.count - counts, bag_size - counts.sum(), first
            )
        ends = jnp.cumsum(counts)
        # Slots [0, ends[0]) are class 0's and so on; the bag takes them shuffled.
        slot = _permute(order_words, jnp.arange(bag_size), bag_size)
        label = jnp.searchsorted(ends, slot, side="right", method="compare_all")
        available = table.count[label]
        if replace:  # the modulo's bias is below num_examples / 2**32
            member = (member_words % available.astype(jnp.uint32)).astype(jnp.int32)
        else:
            within = slot - (ends - counts)[label]
            member = _permute(member_words[label], within, available)
        prevalence = counts.astype(jnp.float32) / bag_size
        return table.order[table.start[label] + member], prevalence

    num_bags = len(prevalences)
    order_key, member_key, first_key = jax.random.split(key, 3)
    first = jax.random.randint(first_key, (num_bags,), 0, num_classes)
    order_words = _random_words(order_key, bag_size, num_bags)
    if replace:
        member_words = jax.random.bits(member_key, (num_bags, bag_size), jnp.uint32)
    else:
        member_words = _random_words(member_key, num_examples, num_bags, num_classes)
    return jax.vmap(draw)(
        prevalences.astype(jnp.float32), first, order_words, member_words
    )


def whitened_components(
    inputs: Mapping[str, np.ndarray], num_components: int
) -> dict[str, np.ndarray]:
    """Where examples lie along the principal components of the train split.

    Each component has mean 0 and variance 1 there, as `draw_tilted_bags` expects of
    positions. Runs on the host, once.

    Args:
        inputs: {split: [n, *features]}, with "train".
        num_components: the most components; there are no more than features or
            examples.

    Returns:
        {split: float32 [n, d]}.
    """
    from sklearn.decomposition import PCA

    flat = {split: values.reshape(len(values), -1) for split, values in inputs.items()}
    num_components = min(num_components, *flat["train"].shape)
    fitted = PCA(num_components, whiten=True, random_state=0).fit(flat["train"])
    return {
        split: fitted.transform(values).astype(np.float32)
        for split, values in flat.items()
    }


def draw_tilted_bags(
    key: jax.Array,
    positions: jax.Array,
    labels: jax.Array,
    num_classes: int,
    num_bags: int,
    bag_size: int,
    strength: float,
) -> tuple[jax.Array, jax.Array]:
    """Bags under covariate shift: P(x) changes, P(y | x) does not.

    A bag draws its examples with replacement and probabilities `∝ exp(s u'z_i)`, where
    u is a direction drawn uniformly from the sphere and `s ~ U(0, strength)`. The
    probabilities depend on the examples' inputs alone, through their positions z, so
    that among examples of one position the classes keep their shares.

    Args:
        key: PRNG key.
        positions: z float [n, d], of variance one in every direction (whitened).
        labels: int [n].
        num_classes: K.
        num_bags: B.
        bag_size: m.
        strength: the largest tilt; of normal positions it moves the mean of a bag by
            so many standard deviations.

    Returns:
        indices int32 [B, m] into the dataset, prevalence float32 [B, K] of those
        examples.
    """
    direction_key, strength_key, place_key = jax.random.split(key, 3)
    directions = jax.random.normal(direction_key, (num_bags, positions.shape[1]))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
    tilt = jax.random.uniform(strength_key, (num_bags, 1), maxval=strength)
    share = jax.nn.softmax(tilt * (directions @ positions.T))  # [B, n]
    edges = jnp.cumsum(share, axis=1)
    # Up to the last edge and not to 1, which rounding may leave beyond it.
    place = jax.random.uniform(place_key, (num_bags, bag_size)) * edges[:, -1:]
    find = partial(jnp.searchsorted, side="right")
    indices = jnp.minimum(jax.vmap(find)(edges, place), len(labels) - 1)
    prevalence = jax.nn.one_hot(labels[indices], num_classes).mean(1)
    return indices.astype(jnp.int32), prevalence


def mixture_weights(
    key: jax.Array,
    bag_prevalences: jax.Array,
    prevalences: jax.Array,
    sharpness: float = 1.0,
) -> jax.Array:
    """Weights that mix the bags of a batch towards given prevalences.

    Bag b gets `w_b ∝ e_b^s sum_k p_k B_bk / sum_c B_ck`, `e_b ~ Exp(1)`: bags rich in
    the classes drawn weigh more, and the random factor (the Bayesian bootstrap's) makes
    every mixture another one. Of bags that hold a single class each, such as bags of
    one example, the mixture has almost the given prevalences if s is one; the exact
    prevalences of any mixture are `weights @ bag_prevalences`.

    Of each mixture s ~ U(1, sharpness): the larger, the fewer bags have nearly all of
    its weight (of 256, about 128 where s is one, seven where it is five), and the more
    its prevalences tell of each of them.

    Args:
        key: PRNG key.
        bag_prevalences: B [num_bags, K].
        prevalences: p [num_mixtures, K], those to aim at.
        sharpness: 1 or more.

    Returns:
        Weights [num_mixtures, num_bags]; each row sums to one.
    """
    share = bag_prevalences / jnp.maximum(bag_prevalences.sum(0), 1e-9)  # [bag, class]
    noise = jax.random.exponential(key, (len(prevalences), len(bag_prevalences)))
    if sharpness > 1:
        power_key = jax.random.fold_in(key, 0)
        noise **= jax.random.uniform(
            power_key, (len(prevalences), 1), minval=1, maxval=sharpness
        )
    weights = noise * (prevalences @ share.T)
    # All classes aimed at may be absent from the batch.
    weights = weights + 1e-9 * noise
    return weights / weights.sum(-1, keepdims=True)


class ChosenBags(NamedTuple):
    """Bags made of the examples of given bags, [n, m, ...].

    Attributes:
        bag: int32 [B, s], the bag that each example is of.
        element: int32 [B, s], its place in that bag.
        mask: bool [B, s], True where there is an example.
        prevalence: float32 [B, K], the labels.
    """

    bag: jax.Array
    element: jax.Array
    mask: jax.Array
    prevalence: jax.Array


def draw_whole_bags(
    key: jax.Array, prevalences: jax.Array, sizes: jax.Array, num_bags: int, length: int
) -> ChosenBags:
    """Given bags as they are, drawn with replacement.

    Args:
        key: PRNG key.
        prevalences: float [n, K], of the bags to draw from.
        sizes: int [n], their numbers of examples.
        num_bags: B.
        length: m, their length with padding.

    Returns:
        `ChosenBags` of s = m.
    """
    chosen = jax.random.randint(key, (num_bags,), 0, len(sizes))
    element = jnp.broadcast_to(jnp.arange(length), (num_bags, length))
    bag = jnp.broadcast_to(chosen[:, None], element.shape)
    return ChosenBags(
        bag, element, element < sizes[chosen][:, None], prevalences[chosen]
    )


def mix_bags(
    key: jax.Array,
    prevalences: jax.Array,
    sizes: jax.Array,
    num_bags: int,
    length: int,
    real_bags: float,
) -> ChosenBags:
    """The bag mixer published with HistNetQ: examples drawn from two bags at a time.

    With the probability `real_bags` a bag is one of the given bags as it is. Otherwise
    m examples are drawn with replacement from two of them taken together, and its label
    is what their examples have in common, the mean of the two prevalences (weighted by
    their sizes). The examples really drawn have other prevalences: for two classes the
    label is off by about `sqrt(q (1 - q) / m)`, q being the label.

    Pérez-Mon, Moreo, del Coz and González, "Quantification using permutation-invariant
    networks based on histograms", 2025.

    Args and result are those of `draw_whole_bags`, and `real_bags` in [0, 1].
    """
    real_key, whole_key, bag_key, place_key = jax.random.split(key, 4)
    first, second = jax.random.randint(bag_key, (2, num_bags), 0, len(sizes))
    both = sizes[first] + sizes[second]
    place = jax.random.uniform(place_key, (num_bags, length)) * both[:, None]
    place = jnp.minimum(place.astype(jnp.int32), both[:, None] - 1)
    of_first = place < sizes[first][:, None]
    bag = jnp.where(of_first, first[:, None], second[:, None])
    element = jnp.where(of_first, place, place - sizes[first][:, None])
    share = (sizes[first] / both)[:, None]
    mixed = ChosenBags(
        bag,
        element,
        jnp.ones_like(of_first),
        share * prevalences[first] + (1 - share) * prevalences[second],
    )
    real = draw_whole_bags(whole_key, prevalences, sizes, num_bags, length)
    return _choose(jax.random.bernoulli(real_key, real_bags, (num_bags,)), real, mixed)


def join_bags(
    key: jax.Array,
    prevalences: jax.Array,
    sizes: jax.Array,
    num_bags: int,
    length: int,
    real_bags: float,
) -> ChosenBags:
    """Two whole bags at a time as one, whose label is exact.

    With the probability `real_bags` a bag is one of the given bags and padding.

    Args are those of `mix_bags`; returns `ChosenBags` of s = 2m.
    """
    real_key, first_key, second_key = jax.random.split(key, 3)
    first, second = (
        draw_whole_bags(key, prevalences, sizes, num_bags, length)
        for key in (first_key, second_key)
    )
    size = first.mask.sum(1, keepdims=True), second.mask.sum(1, keepdims=True)
    share = size[0] / (size[0] + size[1])
    joined = ChosenBags(
        *(
            jnp.concatenate(pair, axis=1)
            for pair in zip(first[:3], second[:3], strict=True)
        ),
        share * first.prevalence + (1 - share) * second.prevalence,
    )
    alone = joined._replace(
        mask=joined.mask & (jnp.arange(2 * length) < length),
        prevalence=first.prevalence,
    )
    return _choose(
        jax.random.bernoulli(real_key, real_bags, (num_bags,)), alone, joined
    )


def pair_weights(
    key: jax.Array, num_mixtures: int, num_bags: int, real_bags: float
) -> jax.Array:
    """Weights that mix the bags of a batch two by two.

    A row has the weights `w` and `1 - w`, w ~ U(0, 1), at two different bags or, with
    the probability `real_bags`, 1 at one. Every bag is in as many mixtures as the
    others. With representations r that are linear in the empirical measure,
    `weights @ r` represents the mixtures, and their labels `weights @ prevalences` are
    exact.

    Args:
        key: PRNG key.
        num_mixtures: number of rows.
        num_bags: B, at least 2.
        real_bags: in [0, 1].

    Returns:
        float32 [num_mixtures, B], rows sum to one.
    """
    real_key, weight_key, bag_key = jax.random.split(key, 3)
    first = jnp.arange(num_mixtures) % num_bags
    second = (first + jax.random.randint(bag_key, first.shape, 1, num_bags)) % num_bags
    weight = jax.random.uniform(weight_key, first.shape)
    real = jax.random.bernoulli(real_key, real_bags, first.shape)
    weight = jnp.where(real, 1.0, weight)[:, None]
    first, second = (jax.nn.one_hot(bag, num_bags) for bag in (first, second))
    return weight * first + (1 - weight) * second


def _choose(condition: jax.Array, yes: ChosenBags, no: ChosenBags) -> ChosenBags:
    condition = condition[:, None]
    return ChosenBags(
        *(jnp.where(condition, *pair) for pair in zip(yes, no, strict=True))
    )


def _largest_remainder(
    share: jax.Array, total: jax.Array | int, first: jax.Array
) -> jax.Array:
    """Integers in proportion to `share` [K] (not normalized) that sum to `total`.

    Of equal remainders those come first that follow class `first`, in a ring.
    """
    exact = share / jnp.maximum(share.sum(), 1e-30) * total
    counts = jnp.floor(exact)
    # A share of zero never gets a unit, whatever the rounding errors.
    remainder = jnp.where(share > 0, exact - counts, -1.0)
    # How many remainders come before: for a few classes counting is much faster than
    # sorting.
    place = (jnp.arange(len(share)) - first) % len(share)
    later = place[:, None] > place
    before = (remainder > remainder[:, None]) | (
        (remainder == remainder[:, None]) & later
    )
    rank = before.sum(-1)
    missing = total - counts.sum()
    return (counts + (rank < missing)).astype(jnp.int32)


def _random_words(key: jax.Array, size: int, *shape: int) -> jax.Array:
    """Key of a permutation of `range(size)` for `_permute`, uint32 [*shape, rounds, 2].

    Six rounds per bit of `size`; the constant makes tiny sets uniform too.
    """
    num_rounds = 16 + 6 * math.ceil(math.log2(max(size, 2)))
    return jax.random.bits(key, (*shape, num_rounds, 2), jnp.uint32)


def _permute(words: jax.Array, position: jax.Array, size: jax.Array | int) -> jax.Array:
    """Entries of a random permutation, without computing the whole of it.

    The swap-or-not shuffle (Hoang, Morris & Rogaway 2012, "An enciphering scheme based
    on a card shuffle"): each round pairs x with `pivot - x mod size` and swaps the pair
    or not by a random bit of the pair. Every round is a bijection, hence so is the
    whole. `jax.random.permutation` sorts all `size` numbers instead, hundreds of times
    slower for a batch out of 60,000 examples.

    Args:
        words: uint32 [rounds, 2] or, to send each position through a permutation of
            its own, [n, rounds, 2].
        position: int [n], in `range(size)`.
        size: int scalar or [n].

    Returns:
        int32 [n], in `range(size)`.
    """
    size = jnp.asarray(size, jnp.uint32)

    def swap_or_not(x, round_words):  # x [n], round_words [2] or [2, n]
        pivot = round_words[0] % size
        partner = jnp.where(pivot >= x, pivot - x, pivot + (size - x))
        # The finalizer of MurmurHash3 (Appleby) as the pair's random bit.
        bit = jnp.maximum(x, partner) ^ round_words[1]
        bit = (bit ^ (bit >> 16)) * jnp.uint32(0x85EBCA6B)
        bit = (bit ^ (bit >> 13)) * jnp.uint32(0xC2B2AE35)
        bit = (bit ^ (bit >> 16)) & 1
        return jnp.where(bit == 1, partner, x), None

    rounds_first = jnp.moveaxis(words, (-2, -1), (0, 1))
    x, _ = jax.lax.scan(swap_or_not, position.astype(jnp.uint32), rounds_first)
    return x.astype(jnp.int32)
