"""Recurrent networks: cells, the loop that runs them, stacks of them, and models.

    x(1)     x(2)            x(T)
     │        │               │
    cell ─── cell ─── ... ─── cell ─── final state
     │        │               │
    h(1)     h(2)            h(T)

The same weights serve every step t. M = [W | U] acts on [h(t-1), x(t)], the state and
the input side by side; here U is `kernel` and W is `recurrent_kernel`, stored
[inputs, outputs], the gates side by side. σ is the logistic function, * is element by
element, and h(0) is zero or learned:

    SimpleCell        h(t) = tanh(M [h(t-1), x(t)] + b)                  or relu

    GRUCell           Gu   = σ(M_u [h(t-1), x(t)] + b_u)
                      Gr   = σ(M_r [h(t-1), x(t)] + b_r)     without relevance gate: 1
                      ĥ    = tanh(M [Gr * h(t-1), x(t)] + b)
                      h(t) = Gu * ĥ + (1 - Gu) * h(t-1)

    LSTMCell          Gu, Gf, Go = σ(M_g [h(t-1), x(t)] + b_g)           g = u, f, o
                      ĉ    = tanh(M_c [h(t-1), x(t)] + b_c)
                      c(t) = Gu * ĉ + Gf * c(t-1)
                      h(t) = Go * tanh(c(t))

    PeepholeLSTMCell  Gu, Gf see p_g * c(t-1) too, and Go sees p_o * c(t)

To call a cell is one step; `Recurrent` runs one over time, `Bidirectional` two, and
`RecurrentStack` several layers of either. `SequenceClassifier` (M to 1),
`SequenceModel` with `generate` (M to M, 1 to N) and `RecurrentEncoderDecoder` (M to N)
are made of stacks.

Sequences are `inputs [batch, time, feature]`, or integer token ids `[batch, time]`, and
`lengths [batch]` says how many steps, from the first, are real (None: all). What stands
past the length, NaN included, changes nothing; outputs there are zero, and a sequence
of length 0 ends in its initial state.

`apply(..., mutable=["intermediates"])` of whatever runs a cell returns its gates, too:
"gates" of every cell, {name: [batch, time, hidden]}, of the names "update" (Gu),
"relevance" (Gr), "forget" (Gf) and "output" (Go).

The loops of all cells but the peephole LSTM have derivatives written by hand: the loop
backward in time leaves the gradients of M to one product for all steps after it. They
may be differentiated again in reverse mode; JAX refuses forward mode (`jax.jvp`,
`jax.jacfwd`) of them.

Elman, "Finding structure in time", Cognitive Science 1990. Hochreiter and Schmidhuber,
"Long short-term memory", Neural Computation 1997; the forget gate: Gers, Schmidhuber
and Cummins, "Learning to forget", 2000; peepholes: Gers, Schraudolph and Schmidhuber,
"Learning precise timing with LSTM recurrent networks", JMLR 2002. Cho et al.,
"Learning phrase representations using RNN encoder-decoder", 2014, arXiv 1406.1078.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from .attention import AdditiveAttention, padding_mask
from .contracts import check_lengths
from .dropout import Dropout
from .encoders import dense, uniform_fan_in
from .pooling import max_pool, mean_pool
from .precision import widen

_MERGES = ("concat", "sum", "mean")
_POOLINGS = ("last", "mean", "max")
# Fewer sequences than this meet U in one product before the loop on CPUs, too.
_CPU_BATCH = 8


def orthogonal_blocks(num_blocks: int) -> nn.initializers.Initializer:
    """Initialiser of [n, num_blocks * n]: each block is orthogonal, drawn on its own.

    Drawn in float32 and cast, as there is no decomposition in half precision. Saxe,
    McClelland and Ganguli, arXiv 1312.6120.
    """

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32):
        size = (shape[0], shape[1] // num_blocks)
        draw = nn.initializers.orthogonal()
        keys = jax.random.split(key, num_blocks)
        blocks = [draw(key, size, jnp.float32) for key in keys]
        return jnp.concatenate(blocks, -1).astype(dtype)

    return init


class _Simple:
    """Equations of `SimpleCell`; see `_run` for what the functions are."""

    gates, sigmoids = 1, ()
    activation = staticmethod(jnp.tanh)

    @staticmethod
    def slope(h):
        return 1 - h * h

    @classmethod
    def step(cls, w, h, x):
        return cls.activation(x + h @ w["recurrent"]), ()

    @classmethod
    def back(cls, w, previous, h, saved, d):
        dx = d * cls.slope(h)
        return dx @ w["recurrent"], dx

    @staticmethod
    def gradients(w, previous, saved, dx):
        return {"recurrent": _outer(previous, dx)}


class _SimpleRelu(_Simple):
    activation = staticmethod(jax.nn.relu)

    @staticmethod
    def slope(h):
        return (h > 0).astype(h.dtype)


class _PlainGRU:
    """`GRUCell` without relevance gate."""

    gates, sigmoids = 2, ("update",)

    @staticmethod
    def step(w, h, x):
        a = jnp.tanh(x + h @ w["recurrent"])
        update, candidate = _split(a, 2)
        return h + (0.5 * update + 0.5) * (candidate - h), a

    @staticmethod
    def back(w, h, new, a, d):
        update, candidate = _split(a, 2)
        gate = 0.5 * update + 0.5
        dx = _join(
            d * (candidate - h) * (0.5 - 0.5 * update * update),
            d * gate * (1 - candidate * candidate),
        )
        return d * (1 - gate) + dx @ w["recurrent"], dx

    @staticmethod
    def gradients(w, previous, a, dx):
        return {"recurrent": _outer(previous, dx)}


class _GRU:
    """`GRUCell`: the relevance gate acts before the product with W."""

    gates, sigmoids = 3, ("update", "relevance")

    @staticmethod
    def step(w, h, x):
        size = h.shape[-1]
        gates = jnp.tanh(x[..., : 2 * size] + h @ w["recurrent"])
        update, relevance = _split(gates, 2)
        kept = (0.5 * relevance + 0.5) * h
        candidate = jnp.tanh(x[..., 2 * size :] + kept @ w["candidate"])
        new = h + (0.5 * update + 0.5) * (candidate - h)
        return new, (gates, candidate)

    @staticmethod
    def back(w, h, new, saved, d):
        gates, candidate = saved
        update, relevance = _split(gates, 2)
        gate_u, gate_r = 0.5 * update + 0.5, 0.5 * relevance + 0.5
        d_candidate = d * gate_u * (1 - candidate * candidate)
        d_kept = d_candidate @ w["candidate"]
        d_gates = _join(
            d * (candidate - h) * (0.5 - 0.5 * update * update),
            d_kept * h * (0.5 - 0.5 * relevance * relevance),
        )
        d = d * (1 - gate_u) + d_kept * gate_r + d_gates @ w["recurrent"]
        return d, _join(d_gates, d_candidate)

    @staticmethod
    def gradients(w, previous, saved, dx):
        size = previous.shape[-1]
        kept = (0.5 * saved[0][..., size:] + 0.5) * previous
        return {
            "recurrent": _outer(previous, dx[..., : 2 * size]),
            "candidate": _outer(kept, dx[..., 2 * size :]),
        }


class _ResetAfterGRU:
    """`GRUCell(reset_after=True)`: the relevance gate acts after the product with W."""

    gates, sigmoids = 3, ("update", "relevance")

    @staticmethod
    def step(w, h, x):
        size = h.shape[-1]
        recurrent = h @ w["recurrent"]
        gates = jnp.tanh(x[..., : 2 * size] + recurrent[..., : 2 * size])
        update, relevance = _split(gates, 2)
        reset = recurrent[..., 2 * size :] + w["recurrent_bias"]
        candidate = jnp.tanh(x[..., 2 * size :] + (0.5 * relevance + 0.5) * reset)
        new = h + (0.5 * update + 0.5) * (candidate - h)
        return new, (gates, candidate, reset)

    @staticmethod
    def back(w, h, new, saved, d):
        gates, candidate, reset = saved
        update, relevance = _split(gates, 2)
        gate_u, gate_r = 0.5 * update + 0.5, 0.5 * relevance + 0.5
        d_candidate = d * gate_u * (1 - candidate * candidate)
        d_update = d * (candidate - h) * (0.5 - 0.5 * update * update)
        d_relevance = d_candidate * reset * (0.5 - 0.5 * relevance * relevance)
        d_recurrent = _join(d_update, d_relevance, d_candidate * gate_r)
        d = d * (1 - gate_u) + d_recurrent @ w["recurrent"]
        return d, _join(d_update, d_relevance, d_candidate)

    @staticmethod
    def gradients(w, previous, saved, dx):
        size = previous.shape[-1]
        d_reset = (0.5 * saved[0][..., size:] + 0.5) * dx[..., 2 * size :]
        d_recurrent = _join(dx[..., : 2 * size], d_reset)
        return {
            "recurrent": _outer(previous, d_recurrent),
            "recurrent_bias": d_reset.sum((0, 1)),
        }


class _LSTM:
    """`LSTMCell`; the state is (h, c)."""

    gates, sigmoids = 4, ("update", "forget", "output")

    @staticmethod
    def step(w, state, x):
        h, c = state
        a = jnp.tanh(x + h @ w["recurrent"])
        update, forget, output, candidate = _split(a, 4)
        c = (0.5 * update + 0.5) * candidate + (0.5 * forget + 0.5) * c
        squashed = jnp.tanh(c)
        return ((0.5 * output + 0.5) * squashed, c), (a, squashed)

    @staticmethod
    def back(w, previous, new, saved, d):
        (_, c), (a, squashed), (dh, dc) = previous, saved, d
        update, forget, output, candidate = _split(a, 4)
        dc = dc + dh * (0.5 * output + 0.5) * (1 - squashed * squashed)
        dx = _join(
            dc * candidate * (0.5 - 0.5 * update * update),
            dc * c * (0.5 - 0.5 * forget * forget),
            dh * squashed * (0.5 - 0.5 * output * output),
            dc * (0.5 * update + 0.5) * (1 - candidate * candidate),
        )
        return (dx @ w["recurrent"], dc * (0.5 * forget + 0.5)), dx

    @staticmethod
    def gradients(w, previous, saved, dx):
        return {"recurrent": _outer(previous, dx)}


class _PeepholeLSTM:
    """`PeepholeLSTMCell`: left to automatic differentiation."""

    gates, sigmoids = 4, ("update", "forget", "output")

    @staticmethod
    def step(w, state, x):
        h, c = state
        see = jnp.multiply if w["peephole"].ndim == 2 else jnp.matmul
        p_update, p_forget, p_output = w["peephole"]
        update, forget, output, candidate = _split(x + h @ w["recurrent"], 4)
        update = jnp.tanh(update + see(c, p_update))
        forget = jnp.tanh(forget + see(c, p_forget))
        c = (0.5 * update + 0.5) * jnp.tanh(candidate) + (0.5 * forget + 0.5) * c
        output = jnp.tanh(output + see(c, p_output))
        state = (0.5 * output + 0.5) * jnp.tanh(c), c
        return state, _join(update, forget, output)


def _split(x: jax.Array, parts: int) -> list[jax.Array]:
    return jnp.split(x, parts, -1)


def _join(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, -1)


def _outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum over all steps and sequences of the outer products, [in, out]."""

    def rows(x):  # of two contracted axes XLA's CPU backend makes a slow product
        return x.reshape(-1, x.shape[-1])

    return rows(left).T @ rows(right)


def _select(real: jax.Array | None, new: Any, old: Any) -> Any:
    if real is None:
        return new
    return jax.tree.map(lambda new, old: jnp.where(real, new, old), new, old)


def _hidden(state: Any) -> jax.Array:
    return state[0] if isinstance(state, tuple) else state


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(equations, reverse, w, x, state, real):
    """Runs a cell over time.

    The logistic function is σ(a) = (1 + tanh(a/2)) / 2 everywhere, so that one tanh
    serves all gates; x and w come with the halves multiplied in.

    Args:
      equations: a class with
        step(w, state, x) -> state, saved, which begins with the tanh of the gates that
          `sigmoids` names;
        back(w', previous state, state, saved, d_state) -> d_previous, dx, where w' are
          the matrices of w transposed;
        gradients(w, previous states, saved, dx) -> dw, of all steps.
      reverse: whether time runs backward.
      w: what the steps share: a dict of arrays. With "kernel" and "bias" in it, U x(t)
        + b is computed within the loop.
      x: [time, batch, gates * hidden], U x(t) + b; or x(t), [time, batch, feature].
      state: the initial state.
      real: None or bool [time, batch, 1]; other steps leave the state as it is.

    Returns:
      The outputs [time, batch, hidden] and the final state.
    """
    return _run_forward(equations, reverse, w, x, state, real)[0]


def _run_forward(equations, reverse, w, x, state, real):
    def step(state, step_inputs):
        x, real = step_inputs
        if "kernel" in w:
            x = x @ w["kernel"] + w["bias"]
        new, saved = equations.step(w, state, x)
        new = _select(real, new, state)
        return new, (new, saved)

    last, (states, saved) = jax.lax.scan(step, state, (x, real), reverse=reverse)
    outputs = _select(real, _hidden(states), 0.0)
    return (outputs, last), (w, x, state, real, states, saved)


def _run_backward(equations, reverse, residuals, d):
    w, x, state, real, states, saved = residuals
    d_outputs, d_last = d

    def shift(first, rest):
        first = first[None]
        parts = (rest[1:], first) if reverse else (first, rest[:-1])
        return jnp.concatenate(parts)

    previous = jax.tree.map(shift, state, states)
    # Transposed once: XLA would otherwise read them across in every step.
    transposed = jax.lax.optimization_barrier(jax.tree.map(jnp.transpose, w))

    def step(d, step_inputs):
        previous, new, saved, d_output, real = step_inputs
        if isinstance(d, tuple):
            d = (d[0] + _select(real, d_output, 0.0), *d[1:])
        else:
            d = d + _select(real, d_output, 0.0)
        passed = d
        d = _select(real, d, jax.tree.map(jnp.zeros_like, d))
        d, dx = equations.back(transposed, previous, new, saved, d)
        if real is not None:
            d = jax.tree.map(lambda d, p: d + jnp.where(real, 0, p), d, passed)
        return d, dx

    d_state, dx = jax.lax.scan(
        step,
        d_last,
        (previous, states, saved, d_outputs, real),
        reverse=not reverse,
    )
    previous = _hidden(previous)
    dw = equations.gradients(w, previous, saved, dx)
    if "kernel" in w:
        dw |= {"kernel": _outer(x, dx), "bias": dx.sum((0, 1))}
        dx = dx @ w["kernel"].T
    return dw, dx, d_state, None


_run.defvjp(_run_forward, _run_backward)


def _run_cudnn(w, inputs, state, real, reverse):
    """`_run` of an LSTM by cuDNN, whose gates are u, f, the candidate and o.

    JAX has its kernel in float32 alone, hence half precision is in the results only.
    """
    from jax.experimental import rnn

    size, dtype = state[0].shape[-1], w["kernel"].dtype
    w, inputs, state = jax.tree.map(jnp.float32, (w, inputs, state))

    def theirs(x: jax.Array) -> jax.Array:  # [..., 4 hidden] -> [4 hidden, ...]
        update, forget, output, candidate = _split(x, 4)
        # Without the halves of the logistic function.
        gates = _join(2 * update, 2 * forget, candidate, 2 * output)
        return jnp.moveaxis(gates, -1, 0).ravel()

    bias = theirs(w["bias"])
    kernels = theirs(w["kernel"]), theirs(w["recurrent"])
    weights = jnp.concatenate([*kernels, bias, jnp.zeros_like(bias)])
    time = jnp.arange(len(inputs))[:, None]
    lengths = jnp.full(inputs.shape[1], len(inputs), jnp.int32)
    if real is not None:
        lengths = real[..., 0].sum(0, dtype=jnp.int32)

    def turn(x: jax.Array) -> jax.Array:  # each sequence back to front, [time, batch]
        if not reverse:
            return x
        order = jnp.where(time < lengths, lengths - 1 - time, time)
        return jnp.take_along_axis(x, order[..., None], 0)

    x = turn(inputs).swapaxes(0, 1)  # [batch, time, feature]
    outputs, h, c = rnn.lstm(
        x,
        *(s[None] for s in state),
        weights,
        jnp.maximum(lengths, 1),  # cuDNN has no empty sequence
        x.shape[-1],
        size,
        1,
        0.0,
        False,
    )
    outputs = _select(real, turn(outputs.swapaxes(0, 1)), 0.0)
    last = h[0], c[0]
    if real is not None:
        last = _select(lengths[:, None] > 0, last, state)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), (outputs, last))


def _project(kernel: jax.Array, bias: jax.Array, inputs: jax.Array) -> jax.Array:
    """U x + b; tokens gather rows of U."""
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        return kernel[inputs] + bias
    return inputs.astype(kernel.dtype) @ kernel + bias


class _Cell(nn.Module):
    """What the cells share: parameters, one step and the loop over many."""

    hidden_size: int
    vocabulary_size: int | None = None
    dtype: Any = None

    def equations(self) -> Any:
        raise NotImplementedError

    def initial_state(self, batch_size: int, dtype: Any = None) -> Any:
        """h(0) = 0, [batch, hidden]."""
        dtype = dtype or self.dtype or jnp.float32
        return jnp.zeros((batch_size, self.hidden_size), dtype)

    def init_bias(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32):
        return jnp.zeros(shape, dtype)

    @nn.compact
    def weights(self, inputs: jax.Array) -> dict[str, jax.Array]:
        """What the steps share, for inputs like these, in the compute dtype."""
        gates, sigmoids = self.equations().gates, len(self.equations().sigmoids)
        size = self.hidden_size
        tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
        if tokens and self.vocabulary_size is None:
            raise ValueError(
                "inputs of integer dtype are tokens, for which the cell needs its "
                "vocabulary_size, but that is None."
            )
        if tokens:
            shape = (self.vocabulary_size, gates * size)
            # A token reads one row: the fan-in is one.
            init = nn.initializers.normal(1 / math.sqrt(size))
        else:
            shape = (inputs.shape[-1], gates * size)
            init = nn.initializers.lecun_normal()
        parameters = {
            "kernel": self.param("kernel", init, shape),
            "recurrent_kernel": self.param(
                "recurrent_kernel", orthogonal_blocks(gates), (size, gates * size)
            ),
            "bias": self.param("bias", self.init_bias, (gates * size,)),
            **self.more_parameters(),
        }
        names = list(parameters)
        values = promote_dtype(
            *parameters.values(), *([] if tokens else [inputs[:0]]), dtype=self.dtype
        )
        parameters = dict(zip(names, values, strict=False))
        # The halves of σ(a) = (1 + tanh(a/2)) / 2.
        halves = np.repeat([0.5] * sigmoids + [1.0] * (gates - sigmoids), size)
        for name in ("kernel", "recurrent_kernel", "bias"):
            value = parameters[name]
            parameters[name] = value * jnp.asarray(halves, value.dtype)
        shared = self.shared(parameters)
        return shared | {name: parameters[name] for name in ("kernel", "bias")}

    def more_parameters(self) -> dict[str, jax.Array]:
        return {}

    def shared(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"recurrent": parameters["recurrent_kernel"]}

    def run(
        self, inputs: jax.Array, state: Any, real: jax.Array | None, reverse: bool
    ) -> tuple[jax.Array, Any]:
        """All steps of time-major inputs; see `_run`.

        Where the collection "intermediates" is mutable, it gets the "gates" of all
        steps, {name: [batch, time, hidden]}, which mean nothing past the length.
        """
        equations = self.equations()
        w = self.weights(inputs)
        state = jax.tree.map(lambda leaf: leaf.astype(w["kernel"].dtype), state)
        # A CPU is faster where U x(t) is still in its cache when it is needed.
        on_cpu = jax.default_backend() == "cpu"
        tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
        if tokens or not on_cpu or inputs.shape[1] < _CPU_BATCH:
            x = _project(w.pop("kernel"), w.pop("bias"), inputs)
        else:
            x = inputs.astype(w["kernel"].dtype)
        asked = self.is_mutable_collection("intermediates")
        if hasattr(equations, "back") and not asked:
            return _run(equations, reverse, w, x, state, real)
        result, residuals = _run_forward(equations, reverse, w, x, state, real)
        if asked and equations.sigmoids:
            tanh = jax.tree.leaves(residuals[-1])[0].swapaxes(0, 1)
            parts = _split(0.5 * tanh + 0.5, tanh.shape[-1] // self.hidden_size)
            gates = dict(zip(equations.sigmoids, parts, strict=False))
            self.sow("intermediates", "gates", gates)
        return result

    def __call__(self, state: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          state: the state before, as `initial_state` returns it.
          inputs: floating [batch, feature] or integer [batch].

        Returns:
          The state after, and h(t) [batch, hidden].
        """
        _check_inputs(inputs, ("batch",))
        _check_state(self, state, inputs.shape[0])
        w = self.weights(inputs)
        x = _project(w["kernel"], w["bias"], inputs)
        state = jax.tree.map(lambda leaf: leaf.astype(x.dtype), state)
        state, _ = self.equations().step(w, state, x)
        return state, _hidden(state)


class SimpleCell(_Cell):
    """Simple recurrent cell, `h(t) = g(W h(t-1) + U x(t) + b)`. Elman 1990.

    Without g, dh(T)/dh(1) would be W to the power T - 1: the gradients vanish or
    explode as its eigenvalues say. The lecture's y(t) = g2(V h(t) + b_y) is the head of
    `SequenceModel`; its g2, the sigmoid, suits binary and multi-label targets, the next
    word wants a softmax.

    Attributes:
      hidden_size: the width of h.
      vocabulary_size: the number of tokens, where inputs are integers: they gather rows
        of U, which equals the product with one-hot vectors.
      dtype: compute dtype, also of states and outputs; None: as the inputs, float32 at
        least. Parameters are float32.
      activation: g, "tanh" or "relu".
    """

    activation: str = "tanh"

    def equations(self) -> Any:
        if self.activation not in ("tanh", "relu"):
            raise ValueError(
                f"activation must be 'tanh' or 'relu', but {self.activation!r} was "
                "given."
            )
        return _Simple if self.activation == "tanh" else _SimpleRelu


class GRUCell(_Cell):
    """Gated recurrent unit, with or without relevance gate.

        Gu   = σ(M_u [h(t-1), x(t)] + b_u)
        Gr   = σ(M_r [h(t-1), x(t)] + b_r)
        ĥ    = tanh(M [Gr * h(t-1), x(t)] + b)
        h(t) = Gu * ĥ + (1 - Gu) * h(t-1)

    Gu, the update gate, says how much of the candidate ĥ replaces the memory: where it
    stays near 0, h(k) is still about h(j) of a much earlier step. Gr, the relevance
    gate, says how much of the memory the candidate sees. The slides print Gr where the
    last equation first has Gu; Cho et al. 2014 and Chung et al. 2014 (arXiv 1412.3555)
    have the update gate in both places.

    With `reset_after` the gate acts after the product, as in PyTorch and cuDNN:

        ĥ    = tanh(U x(t) + b + Gr * (W h(t-1) + b_n))

    This is another function, which no choice of weights turns into the lecture's. What
    PyTorch calls z is 1 - Gu.

    The columns of `kernel` and `recurrent_kernel` are the gates u, r and the candidate;
    without relevance gate u and the candidate. `recurrent_bias` is b_n.

    Attributes:
      hidden_size, vocabulary_size, dtype: see `SimpleCell`.
      relevance_gate: whether there is Gr; otherwise it is 1.
      reset_after: whether Gr acts after the product with W.
      chrono_max_length: the longest dependency T expected: b_u starts from
        -log(uniform(1, T - 1)), so that memories, of which 1 - Gu is kept in a step,
        last for 1 to T steps; None: from 0. Tallec and Ollivier, arXiv 1804.11188.
    """

    relevance_gate: bool = True
    reset_after: bool = False
    chrono_max_length: int | None = None

    def equations(self) -> Any:
        if self.reset_after and not self.relevance_gate:
            raise ValueError(
                "reset_after says where the relevance gate acts, but relevance_gate is "
                "False."
            )
        if not self.relevance_gate:
            return _PlainGRU
        return _ResetAfterGRU if self.reset_after else _GRU

    def init_bias(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32):
        bias = jnp.zeros(shape, dtype)
        if self.chrono_max_length is None:
            return bias
        size = self.hidden_size
        return bias.at[:size].set(-_log_times(key, size, self.chrono_max_length))

    def more_parameters(self) -> dict[str, jax.Array]:
        if not self.reset_after:
            return {}
        shape = (self.hidden_size,)
        bias = self.param("recurrent_bias", nn.initializers.zeros, shape)
        return {"recurrent_bias": bias}

    def shared(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        kernel = parameters["recurrent_kernel"]
        if self.reset_after:
            return {
                "recurrent": kernel,
                "recurrent_bias": parameters["recurrent_bias"],
            }
        if not self.relevance_gate:
            return {"recurrent": kernel}
        gates, candidate = jnp.split(kernel, [2 * self.hidden_size], -1)
        return {"recurrent": gates, "candidate": candidate}


class LSTMCell(_Cell):
    """Long short-term memory; the state is (h, c).

        Gu   = σ(M_u [h(t-1), x(t)] + b_u)
        Gf   = σ(M_f [h(t-1), x(t)] + b_f)
        Go   = σ(M_o [h(t-1), x(t)] + b_o)
        ĉ    = tanh(M_c [h(t-1), x(t)] + b_c)
        c(t) = Gu * ĉ + Gf * c(t-1)
        h(t) = Go * tanh(c(t))

    The slides print Gr where the second gate is computed, but use it as Gf, the forget
    gate, and hats on h(t) and c(t), which denote candidates elsewhere.
    Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000.

    The columns of `kernel` and `recurrent_kernel` are u, f, o and the candidate.

    Attributes:
      hidden_size, vocabulary_size, dtype: see `SimpleCell`.
      forget_bias: what b_f starts from. With 0 half of the memory is lost in every
        step; 1 is the usual cure (Jozefowicz, Zaremba and Sutskever, ICML 2015).
      chrono_max_length: the longest dependency T expected: b_f starts from
        log(uniform(1, T - 1)) and b_u from -b_f, so that memories last for 1 to T
        steps. Replaces forget_bias. Tallec and Ollivier, arXiv 1804.11188.
      cudnn: whether a GPU runs floating inputs by cuDNN's kernel, in float32 whatever
        the dtype. JAX knows its first reverse-mode derivative, but neither a second
        one nor `jax.vmap` of it, and refuses them: for these False keeps our own loop.
    """

    forget_bias: float = 1.0
    chrono_max_length: int | None = None
    cudnn: bool = True

    def equations(self) -> Any:
        return _LSTM

    def initial_state(
        self, batch_size: int, dtype: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """h(0) = 0 and c(0) = 0, each [batch, hidden]."""
        zeros = super().initial_state(batch_size, dtype)
        return zeros, zeros

    def run(
        self, inputs: jax.Array, state: Any, real: jax.Array | None, reverse: bool
    ) -> tuple[jax.Array, Any]:
        """See `_Cell.run`; on a GPU by cuDNN where it can."""
        if (
            jax.default_backend() != "gpu"
            or not self.cudnn
            or self.equations() is not _LSTM
            or jnp.issubdtype(inputs.dtype, jnp.integer)
            or jnp.float64 in (inputs.dtype, self.dtype)
            or self.is_mutable_collection("intermediates")
        ):
            return super().run(inputs, state, real, reverse)
        return _run_cudnn(self.weights(inputs), inputs, state, real, reverse)

    def init_bias(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32):
        forget = jnp.full((self.hidden_size,), self.forget_bias)
        update = jnp.zeros((self.hidden_size,))
        if self.chrono_max_length is not None:
            forget = _log_times(key, self.hidden_size, self.chrono_max_length)
            update = -forget
        return jnp.concatenate([update, forget, 0 * forget, 0 * forget]).astype(dtype)


def _log_times(key: jax.Array, size: int, longest: int) -> jax.Array:
    """log(uniform(1, longest - 1)), [size], of the chrono initialisation."""
    if longest < 3:
        raise ValueError(
            f"chrono_max_length must be 3 or more, but {longest} was given."
        )
    return jnp.log(jax.random.uniform(key, (size,), minval=1.0, maxval=longest - 1.0))


class PeepholeLSTMCell(LSTMCell):
    """LSTM whose gates see the memory c; the state is (h, c).

        Gu   = σ(M_u [h(t-1), x(t)] + p_u * c(t-1) + b_u)
        Gf   = σ(M_f [h(t-1), x(t)] + p_f * c(t-1) + b_f)
        ĉ    = tanh(M_c [h(t-1), x(t)] + b_c)
        c(t) = Gu * ĉ + Gf * c(t-1)
        Go   = σ(M_o [h(t-1), x(t)] + p_o * c(t) + b_o)
        h(t) = Go * tanh(c(t))

    The output gate sees the memory already updated; the candidate sees none. The slides
    print the plain LSTM's equations again. Gers, Schraudolph and Schmidhuber 2002.

    `peephole` holds p_u, p_f and p_o.

    Attributes:
      hidden_size, vocabulary_size, dtype: see `SimpleCell`.
      forget_bias, chrono_max_length: see `LSTMCell`.
      cudnn: without meaning here.
      full: whether a gate sees all of c, through a matrix, `c @ p`; else each unit sees
        its own.
    """

    full: bool = False

    def equations(self) -> Any:
        return _PeepholeLSTM

    def more_parameters(self) -> dict[str, jax.Array]:
        size = self.hidden_size
        shape = (3, size, size) if self.full else (3, size)
        return {"peephole": self.param("peephole", uniform_fan_in(size), shape)}

    def shared(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            "recurrent": parameters["recurrent_kernel"],
            "peephole": 0.5 * parameters["peephole"],
        }


class Recurrent(nn.Module):
    """Runs a cell over time.

    Final state in, initial state out: a long sequence may be cut, and the state carried
    from piece to piece. With `jax.lax.stop_gradient` on it this is truncated
    backpropagation through time.

    Attributes:
      cell: a cell of this module or of `archs.linear_recurrent`, or any module with
        `__call__(state, inputs [batch, feature]) -> (state, output [batch, hidden])`
        and `initial_state(batch_size, dtype)`. A cell may have a loop of its own,
        `run(inputs [time, batch, feature], state, real, reverse)`, that returns outputs
        and the final state; otherwise JAX differentiates the loop over `__call__`.
      reverse: whether time runs backward: each sequence from its own last element to
        the first. Outputs stand where their inputs do.
      learned_initial_state: whether the initial state is a parameter, zero at first; of
        a complex one its "real" and "imag" parts are.
    """

    cell: nn.Module
    reverse: bool = False
    learned_initial_state: bool = False

    def setup(self) -> None:
        if self.learned_initial_state:
            self.first_state = self.param(
                "initial_state",
                lambda key: _parts(self.cell.initial_state(1, jnp.float32)),
            )

    def initial_state(self, batch_size: int, dtype: Any = None) -> Any:
        """The state before the first step, [batch, hidden] or a tuple of such."""
        state = self.cell.initial_state(batch_size, dtype)
        if not self.learned_initial_state:
            return state
        return jax.tree.map(
            lambda zero, first: jnp.broadcast_to(first, zero.shape).astype(zero.dtype),
            state,
            _merge(state, self.first_state),
        )

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        initial_state: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Maps sequences to the cell's outputs.

        Args:
          inputs: floating [batch, time, feature], or integer [batch, time].
          lengths: None or integer [batch], how many steps are real.
          initial_state: None or what `initial_state` returns.

        Returns:
          The outputs [batch, time, hidden], zero past the length, and the final state.

        Raises:
          ValueError: a wrong rank or shape.
          TypeError: a wrong dtype.
        """
        check_sequences(inputs, lengths)
        batch, time = inputs.shape[:2]
        floating = jnp.issubdtype(inputs.dtype, jnp.floating)
        if initial_state is None:
            dtype = inputs.dtype if floating else None
            initial_state = self.initial_state(batch, dtype)
        _check_state(self.cell, initial_state, batch)
        inputs = inputs.swapaxes(0, 1)  # [time, batch, ...]
        real = None
        if lengths is not None:
            real = padding_mask(lengths, time).T[..., None]
            inputs = jnp.where(real if floating else real[..., 0], inputs, 0)
        run = getattr(self.cell, "run", self._run)
        outputs, state = run(inputs, initial_state, real, self.reverse)
        return outputs.swapaxes(0, 1), state

    def _run(self, inputs, state, real, reverse):
        def step(cell, state, step_inputs):
            x, real = step_inputs
            new, output = cell(state, x)
            # Float32 parameters may promote what a loop must keep as it was.
            new = jax.tree.map(lambda n, s: n.astype(s.dtype), new, state)
            return _select(real, new, state), _select(real, output, 0.0)

        scan = nn.scan(
            step,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            reverse=reverse,
        )
        state, outputs = scan(self.cell, state, (inputs, real))
        return outputs, state


class Bidirectional(nn.Module):
    """A cell that reads forward, and one of its own weights that reads backward.

    `y(t) = g(V_f h_f(t) + V_b h_b(t) + b_y)` for a layer that follows "concat": every
    step knows what comes before and after it. Schuster and Paliwal, "Bidirectional
    recurrent neural networks", 1997.

    Attributes:
      cell: the cell of both, see `Recurrent`.
      merge: "concat", "sum" or "mean" of the two outputs.
      learned_initial_state: whether the initial states are parameters.
    """

    cell: nn.Module
    merge: str = "concat"
    learned_initial_state: bool = False

    def setup(self) -> None:
        if self.merge not in _MERGES:
            raise ValueError(
                f"merge must be one of {_MERGES}, but {self.merge!r} was given."
            )
        learned = self.learned_initial_state
        self.forward = Recurrent(_copy(self.cell), False, learned)
        self.backward = Recurrent(_copy(self.cell), True, learned)

    def initial_state(self, batch_size: int, dtype: Any = None) -> Any:
        """The states before the first step, forward and backward."""
        return tuple(
            one.initial_state(batch_size, dtype)
            for one in (self.forward, self.backward)
        )

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        initial_state: Any = None,
    ) -> tuple[jax.Array, Any]:
        """See `Recurrent`; the states are pairs (forward, backward)."""
        before, after = (None, None) if initial_state is None else initial_state
        forward, before = self.forward(inputs, lengths, before)
        backward, after = self.backward(inputs, lengths, after)
        if self.merge == "concat":
            outputs = jnp.concatenate([forward, backward], -1)
        else:
            outputs = forward + backward
            outputs = outputs / 2 if self.merge == "mean" else outputs
        return outputs, (before, after)


class RecurrentStack(nn.Module):
    """Layers of a cell: each reads the outputs of the one below.

        y = layer(x);  y = LayerNorm(y);  y = dropout(y);  y = x + y

    where asked for. Dropout leaves the way along time alone (Zaremba, Sutskever and
    Vinyals, arXiv 1409.2329); `variational` draws one mask for all steps of a sequence
    (Gal and Ghahramani, arXiv 1512.05287).

    Attributes:
      cell: the cell of all layers, see `Recurrent`; each layer has its own weights.
      num_layers: how many.
      bidirectional: whether layers are `Bidirectional`, outputs concatenated.
      residual: whether a layer's input is added to its output, where the widths agree.
      layer_norm: whether the outputs of layers are normalised (Ba, Kiros and Hinton,
        arXiv 1607.06450, do so within the cell).
      dropout_rate: applied to the outputs of every layer when `train`; needs the rng
        stream "dropout".
      variational: whether the dropout mask is the same for all steps.
      learned_initial_state: whether initial states are parameters.
    """

    cell: nn.Module
    num_layers: int = 1
    bidirectional: bool = False
    residual: bool = False
    layer_norm: bool = False
    dropout_rate: float = 0.0
    variational: bool = False
    learned_initial_state: bool = False

    def setup(self) -> None:
        if self.num_layers < 1:
            raise ValueError(
                f"num_layers must be 1 or more, but {self.num_layers} was given."
            )
        kind = Bidirectional if self.bidirectional else Recurrent
        learned = self.learned_initial_state
        count = range(self.num_layers)
        self.layers = [
            kind(_copy(self.cell), learned_initial_state=learned) for _ in count
        ]
        if self.layer_norm:
            dtype = getattr(self.cell, "dtype", None)
            self.norms = [nn.LayerNorm(dtype=dtype) for _ in count]
        self.dropout = Dropout(self.dropout_rate)

    def initial_state(self, batch_size: int, dtype: Any = None) -> tuple[Any, ...]:
        """The states before the first step, one a layer."""
        return tuple(layer.initial_state(batch_size, dtype) for layer in self.layers)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        initial_state: Any = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Maps sequences to the outputs of the last layer.

        Args:
          inputs: floating [batch, time, feature], or integer [batch, time].
          lengths: None or integer [batch], how many steps are real.
          initial_state: None or a state a layer.
          train: switches dropout on.

        Returns:
          The outputs [batch, time, hidden], zero past the length, and the final states,
          one a layer.

        Raises:
          ValueError, TypeError: see `Recurrent`.
        """
        check_sequences(inputs, lengths)
        if initial_state is None:
            initial_state = (None,) * self.num_layers
        if len(initial_state) != self.num_layers:
            raise ValueError(
                f"initial_state must hold one state a layer, {self.num_layers}, but "
                f"holds {len(initial_state)}."
            )
        real = None
        if lengths is not None:
            real = padding_mask(lengths, inputs.shape[1])[..., None]
        x, final_states = inputs, []
        for i, (layer, state) in enumerate(
            zip(self.layers, initial_state, strict=True)
        ):
            y, state = layer(x, lengths, state)
            final_states.append(state)
            if self.layer_norm:
                y = _select(real, self.norms[i](y), 0.0)
            y = self._drop(y, train)
            if self.residual and x.shape == y.shape:
                y = y + _select(real, x, 0.0).astype(y.dtype)
            x = y
        return x, tuple(final_states)

    def _drop(self, y: jax.Array, train: bool) -> jax.Array:
        if not self.variational:
            return self.dropout(y, train=train)
        return y * self.dropout(jnp.ones_like(y[:, :1]), train=train)


def _parts(state: Any) -> Any:
    """A state of real arrays: complex ones become {"real": ..., "imag": ...}."""

    def parts(leaf: jax.Array) -> Any:
        if not jnp.iscomplexobj(leaf):
            return leaf
        return {"real": leaf.real, "imag": leaf.imag}

    return jax.tree.map(parts, state)


def _merge(state: Any, parts: Any) -> Any:
    """The inverse of `_parts`, which tells by `state` what is complex."""

    def merge(leaf: jax.Array, part: Any) -> jax.Array:
        if not jnp.iscomplexobj(leaf):
            return part
        return jax.lax.complex(widen(part["real"]), widen(part["imag"]))

    return jax.tree.map(merge, state, parts)


def _copy(cell: nn.Module) -> nn.Module:
    """The cell once more, with weights of its own."""
    return cell.clone(parent=None, name=None)


def check_sequences(inputs: jax.Array, lengths: jax.Array | None) -> None:
    """Checks the arguments of a sequence network while it is traced.

    Args:
      inputs: floating [batch, time, feature], or integer [batch, time].
      lengths: None or integer [batch].

    Raises:
      ValueError: an argument has the wrong rank or shape.
      TypeError: an argument has the wrong dtype.
    """
    _check_inputs(inputs, ("batch", "time"))
    if inputs.shape[1] == 0:
        raise ValueError("inputs must have one step of time or more, but have none.")
    check_lengths(lengths, inputs.shape[0])


def _check_inputs(inputs: jax.Array, axes: tuple[str, ...]) -> None:
    integers = ", ".join(axes)
    chex.assert_type(
        inputs,
        int if jnp.issubdtype(inputs.dtype, jnp.integer) else float,
        custom_message=(
            "inputs must be floating, or integers where they are tokens, but their "
            f"dtype is {inputs.dtype}."
        ),
        exception_type=TypeError,
    )
    tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
    chex.assert_rank(
        inputs,
        len(axes) if tokens else len(axes) + 1,
        custom_message=(
            f"inputs must have shape [{integers}, feature], or [{integers}] where they "
            f"are integers, but their shape is {inputs.shape} of {inputs.dtype}."
        ),
        exception_type=ValueError,
    )


def _check_state(cell: nn.Module, state: Any, batch_size: int) -> None:
    want = jax.tree.map(jnp.shape, cell.initial_state(batch_size, jnp.float32))
    given = jax.tree.map(jnp.shape, state)
    if want != given:
        raise ValueError(
            f"The state must have the shapes {want} of the cell's initial_state, "
            f"[batch, hidden_size], but those given are {given}."
        )


class SequenceClassifier(nn.Module):
    """M to 1: the logits of a whole sequence, `Dense(K)(pool(stack(x)))`.

    Sentiment from a review, a digit from its pixels; as well a regression, K numbers.

    Attributes:
      stack: a `RecurrentStack`.
      num_classes: K.
      vocabulary_size: the number of tokens, where inputs are integers.
      embedding_size: the width of the vectors that tokens become.
      pooling: "last", what stands at the last real step, and for the backward half of
        a bidirectional stack at the first; "mean" or "max" over the real steps. Zero
        for a sequence of length 0.
      dropout_rate: applied to embeddings and to the pooled vector when `train`; needs
        the rng stream "dropout".
      dtype: compute dtype of embedding and head; parameters are float32.
    """

    stack: nn.Module
    num_classes: int
    vocabulary_size: int | None = None
    embedding_size: int = 128
    pooling: str = "last"
    dropout_rate: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps sequences to logits.

        Args:
          inputs: floating [batch, time, feature], or integer [batch, time].
          lengths: None or integer [batch], how many steps are real.
          train: switches dropout on.

        Returns:
          [batch, num_classes].

        Raises:
          ValueError, TypeError: see `Recurrent`.
        """
        check_sequences(inputs, lengths)
        if self.pooling not in _POOLINGS:
            raise ValueError(
                f"pooling must be one of {_POOLINGS}, but {self.pooling!r} was given."
            )
        dropout = Dropout(self.dropout_rate)
        x = inputs
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            embed = _embedding(self.vocabulary_size, self.embedding_size, self.dtype)
            x = dropout(embed(inputs), train=train)
        outputs, _ = self.stack(x, lengths, train=train)
        pooled = self._pool(outputs, lengths)
        pooled = dropout(pooled, train=train)
        return dense(self.num_classes, pooled.shape[-1], dtype=self.dtype)(pooled)

    def _pool(self, outputs: jax.Array, lengths: jax.Array | None) -> jax.Array:
        batch, time, width = outputs.shape
        if lengths is None:
            lengths = jnp.full((batch,), time)
        if self.pooling != "last":
            pool = {"mean": mean_pool, "max": max_pool}[self.pooling]
            return pool(outputs, padding_mask(lengths, time))
        last = jnp.maximum(lengths - 1, 0)
        last = jnp.take_along_axis(outputs, last[:, None, None], 1)[:, 0]
        if getattr(self.stack, "bidirectional", False):
            half = width // 2
            last = jnp.concatenate([last[:, :half], outputs[:, 0, half:]], -1)
        return last


class SequenceModel(nn.Module):
    """M to M: a prediction at every step, `y(t) = V h(t) + b_y`, before its g2.

    Trained to predict the next element it is a model of language or of music; with
    `decode_step` it continues a sequence, from one note if need be: see `generate`.

    Attributes:
      stack: a `RecurrentStack`.
      num_classes: K, the width of a prediction: the vocabulary's size, 88 notes.
      vocabulary_size: the number of tokens, where inputs are integers.
      embedding_size: the width of the vectors that tokens become.
      dropout_rate: applied to embeddings when `train`; needs the rng stream "dropout".
      dtype: compute dtype of embedding and head; parameters are float32.
    """

    stack: nn.Module
    num_classes: int
    vocabulary_size: int | None = None
    embedding_size: int = 128
    dropout_rate: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        initial_state: Any = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Maps sequences to a prediction at every step.

        Args:
          inputs: floating [batch, time, feature], or integer [batch, time].
          lengths: None or integer [batch], how many steps are real.
          initial_state: None or the final states of the piece before.
          train: switches dropout on.

        Returns:
          Predictions [batch, time, num_classes], which mean nothing past the length,
          and the final states, one a layer.

        Raises:
          ValueError, TypeError: see `Recurrent`.
        """
        check_sequences(inputs, lengths)
        x = inputs
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            embed = _embedding(self.vocabulary_size, self.embedding_size, self.dtype)
            x = Dropout(self.dropout_rate)(embed(inputs), train=train)
        x, final_states = self.stack(x, lengths, initial_state, train=train)
        head = dense(self.num_classes, x.shape[-1], dtype=self.dtype)
        return head(x), final_states

    def init_cache(self, batch_size: int, max_length: int | None = None) -> Any:
        """The states before the first step; `max_length` does not matter here."""
        if getattr(self.stack, "bidirectional", False):
            raise ValueError(
                "a bidirectional stack reads what is still to be written: decoding "
                "needs bidirectional=False."
            )
        return self.stack.initial_state(batch_size)

    def decode_step(self, cache: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
        """The prediction after one more element.

        Args:
          cache: of `init_cache`, or the final states of a call.
          inputs: integer [batch] or floating [batch, feature].

        Returns:
          [batch, num_classes], as the whole call gives at that step, and the new cache.
        """
        outputs, cache = self(inputs[:, None], initial_state=cache)
        return outputs[:, 0], cache


class _Bridge(nn.Module):
    """A decoder's initial state, `tanh(W s + b)` of what the encoder ended with."""

    @nn.compact
    def __call__(self, summary: jax.Array, template: Any) -> Any:
        def state(leaf: jax.Array) -> jax.Array:
            layer = dense(leaf.shape[-1], summary.shape[-1], dtype=summary.dtype)
            # The decoder may compute in another dtype than the encoder.
            return jnp.tanh(layer(summary)).astype(leaf.dtype)

        return _merge(template, jax.tree.map(state, _parts(template)))


class RecurrentEncoderDecoder(nn.Module):
    """M to N: an encoder reads the source, a decoder writes the target.

        s(0) = tanh(W_s [final states of the encoder's last layer] + b_s)
        s(t), d(t) = decoder(s(t-1), embedding of y(t-1))
        without attention:  logits(t) = V d(t) + b
        with attention:     k(t) = sum_j a_tj h_j,  a_t = softmax_j of score(d(t), h_j)
                            logits(t) = V tanh(W_d [d(t), k(t)] + b_d) + b

    The score is the additive one of Bahdanau, Cho and Bengio 2015 (arXiv 1409.0473). It
    is asked after the decoder's step, not before as there (the order of Luong, Pham and
    Manning 2015, arXiv 1508.04025): so the decoder runs over the whole target at once,
    and attention is computed for all steps together. Sutskever, Vinyals and Le 2014
    (arXiv 1409.3215) is the network without attention.

    Attributes:
      encoder: a `RecurrentStack`.
      decoder: a `RecurrentStack`, not bidirectional, whose initial state is s(0), so
        that it has none to learn.
      num_classes: K, the size of the target's vocabulary.
      source_vocabulary_size: that of the source; None: as the target's.
      embedding_size: the width of the vectors that tokens become.
      attention: whether the decoder attends to the source.
      attention_size: the width of the attention's hidden layer, and of W_d.
      dropout_rate: applied to embeddings and before V when `train`; needs the rng
        stream "dropout".
      dtype: compute dtype of all but the stacks; parameters are float32.
    """

    encoder: nn.Module
    decoder: nn.Module
    num_classes: int
    source_vocabulary_size: int | None = None
    embedding_size: int = 128
    attention: bool = True
    attention_size: int = 128
    dropout_rate: float = 0.0
    dtype: Any = None

    def setup(self) -> None:
        if getattr(self.decoder, "learned_initial_state", False):
            raise ValueError(
                "the decoder begins with what the encoder ended with: it needs "
                "learned_initial_state=False."
            )
        source_size = self.source_vocabulary_size or self.num_classes
        size = self.embedding_size
        self.source_embedding = _embedding(source_size, size, self.dtype)
        self.target_embedding = _embedding(self.num_classes, size, self.dtype)
        self.bridge = _Bridge()
        if self.attention:
            self.attend = AdditiveAttention(self.attention_size, self.dtype)
            self.combine = nn.Dense(self.attention_size, dtype=self.dtype)
        self.head = nn.Dense(self.num_classes, dtype=self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def encode(
        self,
        source: jax.Array,
        source_lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """What the decoder knows of source [batch, time]; batch leads everywhere."""
        check_sequences(source, source_lengths)
        embedded = self.source_embedding(source)
        embedded = self.dropout(embedded, train=train)
        keys, final_states = self.encoder(embedded, source_lengths, train=train)
        summary = jnp.concatenate(jax.tree.leaves(_parts(final_states[-1])), -1)
        template = self.decoder.initial_state(source.shape[0])
        if source_lengths is None:
            source_lengths = jnp.full(source.shape[:1], source.shape[1])
        memory = {
            "keys": keys,
            "lengths": source_lengths,
            "state": self.bridge(summary, template),
        }
        if self.attention:
            projected = self.attend.project_keys(keys, source_lengths)
            memory["projected_keys"] = projected
        return memory

    def attention_weights(
        self,
        source: jax.Array,
        target: jax.Array,
        source_lengths: jax.Array | None = None,
        target_lengths: jax.Array | None = None,
    ) -> jax.Array:
        """What each step of the target takes from each of the source.

        Args: see `__call__`.

        Returns:
          [batch, target_time, source_time]; rows, which sum to one, mean nothing past
          the target's length.

        Raises:
          ValueError: there is no attention.
          ValueError, TypeError: see `Recurrent`.
        """
        if not self.attention:
            raise ValueError("attention_weights needs attention=True, but it is False.")
        check_sequences(target, target_lengths)
        memory = self.encode(source, source_lengths)
        return self._read(memory, target, target_lengths, False)[2]

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
        source_lengths: jax.Array | None = None,
        target_lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Logits of every next token, the true ones before it given.

        Args:
          source: integer [batch, source_time].
          target: integer [batch, target_time], from the start token on.
          source_lengths: None or integer [batch].
          target_lengths: None or integer [batch].
          train: switches dropout on.

        Returns:
          [batch, target_time, num_classes], which mean nothing past the length.

        Raises:
          ValueError, TypeError: see `Recurrent`.
        """
        check_sequences(target, target_lengths)
        memory = self.encode(source, source_lengths, train=train)
        return self._decode(memory, target, target_lengths, train)[0]

    def init_cache(
        self, memory: dict[str, Any], max_length: int | None = None
    ) -> dict[str, Any]:
        """The state before the first token; `max_length` does not matter here."""
        return memory

    def decode_step(
        self, cache: dict[str, Any], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits [batch, num_classes] after the tokens [batch], and the new cache."""
        logits, state = self._decode(cache, tokens[:, None], None, False)
        return logits[:, 0], {**cache, "state": state}

    def _decode(self, memory, target, lengths, train):
        x, state, _ = self._read(memory, target, lengths, train)
        return self.head(self.dropout(x, train=train)), state

    def _read(self, memory, target, lengths, train):
        x = self.dropout(self.target_embedding(target), train=train)
        x, state = self.decoder(x, lengths, memory["state"], train=train)
        if not self.attention:
            return x, state, None
        context, weights = self.attend(
            x,
            memory["keys"],
            memory["lengths"],
            projected_keys=memory["projected_keys"],
        )
        x = jnp.tanh(self.combine(jnp.concatenate([x, context], -1)))
        return x, state, weights


def generate(
    step: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    cache: Any,
    first: jax.Array,
    num_steps: int,
    sample: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
) -> jax.Array:
    """1 to N: continues from one element, each output the next input.

    For tokens see `decoding`; this is for whatever else a model may predict, such as
    the notes that sound together:

        def sample(key, logits):
            return jax.random.bernoulli(key, jax.nn.sigmoid(logits / temperature))

    Args:
      step: (cache, inputs [batch, ...]) -> (logits [batch, K], cache), such as
        `SequenceModel.decode_step` with its variables.
      cache: what the first step gets.
      first: the element to start from, [batch, ...].
      num_steps: how many elements to write.
      sample: (key, logits) -> the next element, of the shape of `first`.
      key: of the random numbers.

    Returns:
      [batch, num_steps, ...], without `first`, in its dtype.
    """

    def write(carry, key):
        cache, element = carry
        logits, cache = step(cache, element)
        element = sample(key, logits).astype(first.dtype)
        return (cache, element), element

    _, elements = jax.lax.scan(write, (cache, first), jax.random.split(key, num_steps))
    return elements.swapaxes(0, 1)


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a `RecurrentStack` from those of torch's RNN, GRU or LSTM.

    The cell is `SimpleCell`, `GRUCell(reset_after=True)` or `LSTMCell`; layers and
    directions are as many as the names tell.

    Args:
      state_dict: name -> numpy array, as of
        `{k: v.numpy() for k, v in module.state_dict().items()}`.

    Returns:
      What belongs under "params"; that of a `Recurrent` is its "layers_0".

    Raises:
      ValueError: the names or shapes are of something else.
    """
    weights = {name: np.asarray(value) for name, value in state_dict.items()}
    params: dict[str, Any] = {}
    while f"weight_ih_l{len(params)}" in weights:
        end = f"_l{len(params)}"
        layer = _cell_from_torch(weights, end)
        if f"weight_ih{end}_reverse" in weights:
            backward = _cell_from_torch(weights, f"{end}_reverse")
            layer = {"forward": layer, "backward": backward}
        params[f"layers_{len(params)}"] = layer
    expected = {name for name in weights if re.fullmatch(_TORCH_NAME, name)}
    if not params or expected != set(weights):
        raise ValueError(
            "state_dict must be that of torch.nn.RNN, GRU or LSTM without projections, "
            f"but its names are {sorted(weights)}."
        )
    return params


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: name -> numpy array, for `load_state_dict`.

    Where torch adds two biases, the second is zero.

    Args:
      params: of a `RecurrentStack` of cells that torch has, too.

    Raises:
      ValueError: torch has no such cell, no layer norm, or no learned initial state.
    """
    weights: dict[str, np.ndarray] = {}
    for i in range(len(params)):
        layer = params.get(f"layers_{i}")
        if layer is None:
            raise ValueError(
                "torch has stacks of cells and nothing between them, but the "
                f"parameters are {sorted(params)}."
            )
        if "cell" in layer:
            weights |= _cell_to_torch(layer, f"_l{i}")
        else:
            weights |= _cell_to_torch(layer["forward"], f"_l{i}")
            weights |= _cell_to_torch(layer["backward"], f"_l{i}_reverse")
    return weights


# Where each gate of ours, u r c or u f o c, stands in torch: r z n or i f g o.
_TORCH_ORDER = {1: [0], 3: [1, 0, 2], 4: [0, 1, 3, 2]}
_TORCH_NAME = r"(weight|bias)_[ih]h_l\d+(_reverse)?"


def _cell_from_torch(weights: dict[str, np.ndarray], end: str) -> dict[str, Any]:
    recurrent = weights[f"weight_hh{end}"]
    size = recurrent.shape[1]
    gates = recurrent.shape[0] // size
    if gates not in _TORCH_ORDER:
        raise ValueError(f"torch has no recurrent layer with {gates} gates.")

    def ours(name: str) -> np.ndarray:  # [gate, hidden, ...]
        if name.startswith("bias") and name not in weights:
            return np.zeros((gates, size), recurrent.dtype)  # bias=False
        value = weights[name]
        value = value.reshape(gates, size, *value.shape[1:])[_TORCH_ORDER[gates]]
        return _negate_update(value)

    bias, recurrent_bias = ours(f"bias_ih{end}"), ours(f"bias_hh{end}")
    cell = {
        "kernel": ours(f"weight_ih{end}").reshape(gates * size, -1).T,
        "recurrent_kernel": ours(f"weight_hh{end}").reshape(gates * size, size).T,
    }
    if gates == 3:
        cell["recurrent_bias"] = recurrent_bias[2]
        recurrent_bias = recurrent_bias * np.array([[1], [1], [0]], recurrent.dtype)
    cell["bias"] = (bias + recurrent_bias).reshape(-1)
    return {"cell": cell}


def _cell_to_torch(layer: Mapping[str, Any], end: str) -> dict[str, np.ndarray]:
    if "initial_state" in layer:
        raise ValueError(
            "torch's initial state is an argument, no parameter: of a stack with "
            "learned_initial_state convert the cells alone, without initial_state."
        )
    cell = layer["cell"]
    names, gates = {"kernel", "recurrent_kernel", "bias"}, 0
    if names <= set(cell):
        size, width = np.shape(cell["recurrent_kernel"])
        gates = width // size
    if gates == 3:
        names |= {"recurrent_bias"}
    if gates not in _TORCH_ORDER or names != set(cell):
        raise ValueError(
            "torch has SimpleCell, GRUCell(reset_after=True) and LSTMCell, but the "
            f"parameters of the cell are {sorted(cell)}, of {gates} gates."
        )
    cell = {name: np.asarray(value) for name, value in cell.items()}

    def torchs(value: np.ndarray) -> np.ndarray:  # of [..., gates * hidden]
        value = _negate_update(value.T.reshape(gates, size, *value.shape[:-1]))
        value = value[np.argsort(_TORCH_ORDER[gates])]
        return value.reshape(gates * size, *value.shape[2:])

    recurrent_bias = np.zeros_like(cell["bias"])
    if gates == 3:
        recurrent_bias[2 * size :] = cell["recurrent_bias"]
    return {
        f"weight_ih{end}": torchs(cell["kernel"]),
        f"weight_hh{end}": torchs(cell["recurrent_kernel"]),
        f"bias_ih{end}": torchs(cell["bias"]),
        f"bias_hh{end}": recurrent_bias,
    }


def _negate_update(value: np.ndarray) -> np.ndarray:
    """Torch's z is 1 - Gu: what leads to the first of three gates changes its sign."""
    if len(value) != 3:
        return value
    return np.concatenate([-value[:1], value[1:]])


def _embedding(vocabulary_size: int | None, size: int, dtype: Any) -> nn.Embed:
    if vocabulary_size is None:
        raise ValueError(
            "inputs of integer dtype are tokens, for which the model needs its "
            "vocabulary_size, but that is None."
        )
    return nn.Embed(vocabulary_size, size, dtype=dtype)
