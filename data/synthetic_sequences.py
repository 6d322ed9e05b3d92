"""Sequences that ask for memory, generated, with known chance levels and grammars.

dataset = data.AddingProblem(length=200)
batch = dataset.sample(jax.random.key(0), 32, "train", dataset.arrays)
batch["inputs"], batch["targets"]  # [32, 200, 2], [32, 1]
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from data import sequences
from data.datasets import Spec
from data.number_sets import check_sizes


@dataclasses.dataclass(frozen=True)
class AddingProblem:
    """The sum of the two marked numbers of a sequence.

        u_t ~ U(0, 1),  m_t = 1 at one place of each half, else 0
        x_t = (u_t, m_t),  target = sum_t m_t u_t

    Chance: the best constant, 1, has a mean squared error of 1/6, the variance of the
    sum of two uniform numbers. (The 0.1767 that papers name is a slip.)

    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 1997,
    section 5.4; with one mark in each half as in Bai, Kolter and Koltun, "An empirical
    evaluation of generic convolutional and recurrent networks for sequence modeling",
    2018. Generated, so there is no licence.

    Attributes:
        length: steps T.
        test_length: of the test split; None: the same.
    """

    length: int = 200
    test_length: int | None = None

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        for name in ("length", "test_length"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"{name} must be 2 or more, not {getattr(self, name)}")

    @property
    def spec(self) -> Spec:
        """A number for a sequence of two numbers a step."""
        return sequences.spec("adding_problem", 1, feature_shape=(2,))

    @property
    def chance(self) -> float:
        """Mean squared error of the best constant."""
        return 1 / 6

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws sequences.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: "train", "validation" or "test".
            arrays: not used.

        Returns:
            "inputs" float32 [n, time, 2]; "lengths" int32 [n], all `length`; "targets"
            float32 [n, 1].
        """
        del arrays
        length = self.length
        if split == "test" and self.test_length is not None:
            length = self.test_length
        number_key, first_key, second_key = jax.random.split(key, 3)
        numbers = jax.random.uniform(number_key, (num_sequences, length))
        shape = (num_sequences, 1)
        first = jax.random.randint(first_key, shape, 0, length // 2)
        second = jax.random.randint(second_key, shape, length // 2, length)
        time = jnp.arange(length)
        marks = ((time == first) | (time == second)).astype(jnp.float32)
        return {
            "inputs": jnp.stack([numbers, marks], -1),
            "lengths": jnp.full(num_sequences, length, jnp.int32),
            "targets": (numbers * marks).sum(1, keepdims=True),
        }


@dataclasses.dataclass(frozen=True)
class CopyMemory:
    """Ten symbols to be repeated after a long silence.

        inputs    s_1 ... s_10, `delay - 1` blanks, 11 times the signal to recall
        targets   `delay + 10` blanks, s_1 ... s_10

    The s_i are drawn from eight symbols. Inputs are ids: 4 is the blank, 5 to 12 are
    the symbols and 13 is the signal. Targets are classes: 0 is the blank, k is the
    symbol of the id 4 + k.

    Chance: without any memory, blanks at no cost and then one of eight, which is
    10 ln 8 / (delay + 20) nats a step (`chance`).

    Hochreiter and Schmidhuber 1997; in the form of Arjovsky, Shah and Bengio, "Unitary
    evolution recurrent neural networks", ICML 2016, and Bai, Kolter and Koltun 2018,
    whose T is `delay`. Generated, so there is no licence.

    Attributes:
        delay: T; sequences have T + 20 steps.
    """

    delay: int = 100

    num_symbols: ClassVar[int] = 8
    num_copied: ClassVar[int] = 10
    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        check_sizes(delay=self.delay)

    @property
    def spec(self) -> Spec:
        """One of nine classes a step."""
        return sequences.spec("copy_memory", 9, vocabulary_size=14)

    @property
    def chance(self) -> float:
        """Cross-entropy a step, in nats, without memory."""
        return 10 * math.log(8) / (self.delay + 20)

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws sequences.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: all splits are alike.
            arrays: not used.

        Returns:
            "inputs" and "targets" int32 [n, delay + 20]; "lengths" int32 [n], all
            `delay + 20`; "target_mask" bool [n, delay + 20], all True.
        """
        del split, arrays
        shape = (num_sequences, self.num_copied)
        symbols = jax.random.randint(key, shape, 1, self.num_symbols + 1)
        blanks = jnp.zeros((num_sequences, self.delay + self.num_copied), jnp.int32)
        signal = jnp.full((num_sequences, self.num_copied + 1), self.num_symbols + 1)
        blank_id = len(sequences.SPECIAL_TOKENS)
        inputs = jnp.concatenate([symbols, blanks[:, : self.delay - 1], signal], 1)
        return {
            "inputs": blank_id + inputs,
            "lengths": jnp.full(num_sequences, inputs.shape[1], jnp.int32),
            "targets": jnp.concatenate([blanks, symbols], 1),
            "target_mask": jnp.ones(inputs.shape, bool),
        }


@dataclasses.dataclass(frozen=True)
class TimeDelay:
    """Whether the time since the last spike was `delay` or one step more.

        spikes at s_0 = 0 and s_i = s_(i-1) + delay + I_i,  I_i ~ U{0, 1}
        target I_i at s_i, for i from 1 to `num_delays`

    Between spikes the input is zero, so that a network has to count steps; peepholes
    let its gates see the counter. After the task "measuring spike delays" of Gers,
    Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks",
    JMLR 2002.

    Chance: one half, ln 2 nats. Generated, so there is no licence.

    Attributes:
        delay: the shorter time between two spikes.
        num_delays: delays of a sequence.
    """

    delay: int = 10
    num_delays: int = 10

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        check_sizes(delay=self.delay)
        check_sizes(num_delays=self.num_delays)

    @property
    def spec(self) -> Spec:
        """Two classes at some of the steps."""
        names = (str(self.delay), str(self.delay + 1))
        return sequences.spec("time_delay", 2, feature_shape=(1,), class_names=names)

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws sequences.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: all splits are alike.
            arrays: not used.

        Returns:
            "inputs" float32 [n, time, 1], one at spikes; "lengths" int32 [n], up to the
            last spike; "targets" int32 [n, time]; "target_mask" bool [n, time], True at
            all spikes but the first.
        """
        del split, arrays
        longer = jax.random.randint(key, (num_sequences, self.num_delays), 0, 2)
        spikes = jnp.cumsum(self.delay + longer, axis=1)
        time = jnp.arange(self.num_delays * (self.delay + 1) + 1)
        here = spikes[:, :, None] == time  # [n, delay, time]
        inputs = here.any(1) | (time == 0)
        return {
            "inputs": inputs[..., None].astype(jnp.float32),
            "lengths": (spikes[:, -1] + 1).astype(jnp.int32),
            "targets": (here * longer[:, :, None]).sum(1, dtype=jnp.int32),
            "target_mask": here.any(1),
        }


# Node -> the symbols that may follow and the nodes they lead to; of two, each has the
# probability 1/2. Node 7 is the end.
_REBER = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": 7},
)


def _embedded_reber() -> list[dict[str, int]]:
    """B, then T or P, a string of Reber's grammar, the same T or P again, and E."""
    size = len(_REBER) + 1
    nodes: list[dict[str, int]] = [{"B": 1}, {"T": 2, "P": 2 + size}]
    end = 2 + 2 * size
    for outer in "TP":
        offset = len(nodes)
        for node in _REBER:
            nodes.append({symbol: offset + to for symbol, to in node.items()})
        nodes.append({outer: end})
    return [*nodes, {"E": end + 1}, {}]


@dataclasses.dataclass(frozen=True)
class EmbeddedReber:
    """Strings of the embedded Reber grammar, to be told symbol by symbol.

    A string is B, T or P, a string of Reber's grammar, the same T or P as at first, and
    E. Where there are two ways each is taken with the probability 1/2; strings whose
    length is outside `min_length` to `max_length` are left out, exactly, by drawing
    from the conditional distribution.

    The target of a step is the next symbol. Only the outer T or P asks for memory, over
    the whole of the inner string: without it, chance is 1/2 there.

    Reber, "Implicit learning of artificial grammars", 1967; Fahlman, "The recurrent
    cascade-correlation architecture", 1991; Hochreiter and Schmidhuber 1997, section
    5.1. Generated, so there is no licence.

    Attributes:
        min_length: fewest symbols of a string, at least 9.
        max_length: most symbols.
    """

    min_length: int = 9
    max_length: int = 30

    symbols: ClassVar[str] = "BTPSXVE"
    predicts_next: ClassVar[bool] = True
    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        if not 9 <= self.min_length <= self.max_length:
            raise ValueError(
                "min_length must lie between 9, the shortest string, and "
                f"max_length={self.max_length}, not {self.min_length}"
            )

    @property
    def spec(self) -> Spec:
        """A symbol a step, given those before it."""
        size = len(sequences.SPECIAL_TOKENS) + len(self.symbols)
        names = (*sequences.SPECIAL_TOKENS, *self.symbols)
        return sequences.spec(
            "embedded_reber", size, vocabulary_size=size, class_names=names
        )

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Next nodes [node, symbol], -1 if none, and log-probabilities.

        The latter are [time, node, symbol], of the symbol at a time and a node.

        A symbol is as likely as it is in the grammar times the probability that a
        string of an allowed length comes of it.
        """
        nodes = _embedded_reber()
        following = np.full((len(nodes), len(self.symbols)), -1)
        for node, ways in enumerate(nodes):
            for symbol, to in ways.items():
                following[node, self.symbols.index(symbol)] = to
        ways = (following >= 0).sum(1, keepdims=True)
        # Probability of an end at an allowed length, [node] after `time` symbols.
        allowed = np.zeros(len(nodes))
        allowed[-1] = 1
        probabilities = []
        for time in range(self.max_length - 1, -1, -1):
            onward = np.where(following >= 0, allowed[following] / ways.clip(1), 0)
            probabilities.append(onward)
            allowed = onward.sum(1)
            allowed[-1] = self.min_length <= time
        with np.errstate(divide="ignore"):
            return following, np.log(np.stack(probabilities[::-1]))

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws strings.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: all splits are alike.
            arrays: not used.

        Returns:
            "inputs" int32 [n, max_length - 1], a string without its last symbol, of the
            ids 4 to 10 in the order of `symbols`; "lengths" int32 [n]; "targets" int32
            [n, max_length - 1], ids of the next symbols; "target_mask" bool
            [n, max_length - 1]; "legal" bool [n, max_length - 1, vocabulary], what the
            grammar allows as the next symbol.
        """
        del split, arrays
        following, log_probability = self._tables
        end = len(following) - 1

        def emit(node, inputs):
            key, table = inputs
            # After the end all symbols are impossible: whatever is drawn is padding.
            symbol = jax.random.categorical(key, table[node])
            next_node = jnp.asarray(following)[node, symbol]
            done = node == end
            return jnp.where(done, end, next_node), (node, jnp.where(done, -1, symbol))

        start = jnp.zeros(num_sequences, jnp.int32)
        table = jnp.asarray(log_probability, jnp.float32)
        table = table.at[:, end].set(0)
        keys = jax.random.split(key, self.max_length)
        _, (nodes, symbols) = jax.lax.scan(emit, start, (keys, table))
        nodes, symbols = nodes.T, symbols.T  # [n, time]
        num_special = len(sequences.SPECIAL_TOKENS)
        tokens = jnp.where(symbols >= 0, symbols + num_special, sequences.PADDING)
        targets = tokens[:, 1:]
        mask = targets != sequences.PADDING
        legal = jnp.pad(jnp.asarray(following >= 0), ((0, 0), (num_special, 0)))
        return {
            "inputs": jnp.where(mask, tokens[:, :-1], sequences.PADDING),
            "lengths": mask.sum(1, dtype=jnp.int32),
            "targets": targets,
            "target_mask": mask,
            "legal": legal[nodes[:, 1:]],
        }

    def decode(self, ids: np.ndarray) -> str:
        """Symbols of ids."""
        return "".join(map(self.token, sequences.real_ids(ids)))

    def token(self, token_id: int) -> str:
        """The symbol of an id."""
        return (*sequences.SPECIAL_TOKENS, *self.symbols)[token_id]
