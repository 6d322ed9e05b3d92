"""Recurrent cells whose memory meets no matrix, so that time runs in parallel.

    h(t) = a(t) * h(t-1) + b(t)

where a(t) and b(t) know x(t) alone. Two such steps, one after the other, are one again,

    (a, b) after (a', b')   =   (a * a', a * b' + b)

hence T steps are an associative scan: log2 T rounds, each in parallel over all steps,
instead of T. Called step by step, a cell gives the same outputs in constant memory.

    MinGRUCell           Gu   = σ(M_u x(t) + b_u)
                         ĥ    = M x(t) + b
                         h(t) = Gu * ĥ + (1 - Gu) * h(t-1)

    MinLSTMCell          Gu, Gf = σ(M_g x(t) + b_g)                      g = u, f
                         ĥ    = M x(t) + b
                         h(t) = Gu / (Gu + Gf) * ĥ + Gf / (Gu + Gf) * h(t-1)

    LinearRecurrentUnit  s(t) = λ * s(t-1) + γ * B x(t)                  complex
                         h(t) = g(Re(C s(t)) + D x(t))

They are the cells of `archs.recurrent` without W h(t-1), and take their place in
`Recurrent`, `Bidirectional`, `RecurrentStack` and all that is made of these. Gates that
do not see the memory can react to it only through layers: use two or more, with
`residual` and `layer_norm`. Inputs are floating; tokens are embedded before.

Martin and Cundy, "Parallelizing linear recurrent neural nets over sequence length",
ICLR 2018, arXiv 1709.04057. Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, "Were RNNs
all we needed?", arXiv 2410.01201 (minGRU, minLSTM). Orvieto et al., "Resurrecting
recurrent neural networks for long sequences", ICML 2023, arXiv 2303.06349.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .precision import wide_dtype, widen


def linear_recurrence(
    a: jax.Array,
    b: jax.Array,
    state: jax.Array,
    real: jax.Array | None = None,
    *,
    reverse: bool = False,
) -> jax.Array:
    """All states of `h(t) = a(t) * h(t-1) + b(t)`, by an associative scan.

    Args:
      a: floating or complex [time, ...].
      b: of the same shape.
      state: h(0), of the shape of one step.
      real: None or bool, broadcasts to a; other steps leave the state as it is.
      reverse: whether time runs backward, from the last step to the first.

    Returns:
      The states [time, ...].
    """
    chex.assert_equal_shape([a, b], exception_type=ValueError)
    if real is not None:
        a, b = jnp.where(real, a, 1), jnp.where(real, b, 0)

    def after(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    a, b = jax.lax.associative_scan(after, (a, b), reverse=reverse)
    return a * state + b


class _LinearCell(nn.Module):
    """What the cells share: one step, and all steps at once."""

    hidden_size: int
    dtype: Any = None

    def initial_state(self, batch_size: int, dtype: Any = None) -> jax.Array:
        """h(0) = 0, [batch, hidden]."""
        dtype = dtype or self.dtype or jnp.float32
        return jnp.zeros((batch_size, self.hidden_size), dtype)

    def terms(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """a(t) and b(t) of inputs [..., feature]: [..., hidden], float32 at least."""
        raise NotImplementedError

    def outputs(self, states: jax.Array, inputs: jax.Array) -> jax.Array:
        """What the cell shows of its states [..., hidden]."""
        return states

    def run(
        self, inputs: jax.Array, state: Any, real: jax.Array | None, reverse: bool
    ) -> tuple[jax.Array, Any]:
        """All steps at once.

        Args:
          inputs: floating [time, batch, feature].
          state: the state before, [batch, hidden].
          real: None or bool [time, batch, 1].
          reverse: whether time runs backward.

        Returns:
          The outputs [time, batch, hidden], zero where not real, and the final state.
        """
        dtype = self._compute_dtype(inputs)
        a, b = self.terms(inputs)
        states = linear_recurrence(a, b, state, real, reverse=reverse)
        outputs = self.outputs(states, inputs).astype(dtype)
        if real is not None:
            outputs = jnp.where(real, outputs, 0)
        return outputs, self._narrow(states[0 if reverse else -1], dtype)

    def __call__(self, state: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          state: the state before, as `initial_state` returns it.
          inputs: floating [batch, feature].

        Returns:
          The state after, and h(t) [batch, hidden].
        """
        chex.assert_rank(
            inputs,
            2,
            custom_message=(
                f"inputs must have shape [batch, feature], but theirs is {inputs.shape}"
                "."
            ),
            exception_type=ValueError,
        )
        dtype = self._compute_dtype(inputs)
        a, b = self.terms(inputs)
        state = a * state + b
        return self._narrow(state, dtype), self.outputs(state, inputs).astype(dtype)

    def _compute_dtype(self, inputs: jax.Array) -> Any:
        chex.assert_type(
            inputs,
            float,
            custom_message=(
                f"{type(self).__name__} reads floating inputs, but their dtype is "
                f"{inputs.dtype}: embed tokens first."
            ),
            exception_type=TypeError,
        )
        return self.dtype or wide_dtype(inputs)

    def _narrow(self, state: jax.Array, dtype: Any) -> jax.Array:
        return state.astype(dtype)

    def _sow_gates(self, **gates: jax.Array) -> None:
        """Tells the gates of a loop, [time, batch, hidden], as other cells do."""
        if gates["update"].ndim == 3:
            gates = {name: gate.swapaxes(0, 1) for name, gate in gates.items()}
            self.sow("intermediates", "gates", gates)


class MinGRUCell(_LinearCell):
    """Minimal GRU: neither gate nor candidate sees the memory.

        Gu   = σ(M_u x(t) + b_u)
        ĥ    = M x(t) + b
        h(t) = Gu * ĥ + (1 - Gu) * h(t-1)

    Feng et al. 2024, arXiv 2410.01201. The columns of `project`'s kernel are u and the
    candidate.

    Attributes:
      hidden_size: the width of h.
      dtype: compute dtype, also of states and outputs; None: as the inputs, float32 at
        least. States are added up in float32, parameters are float32.
    """

    def setup(self) -> None:
        self.project = nn.Dense(2 * self.hidden_size, dtype=self.dtype)

    def terms(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """1 - Gu and Gu * ĥ."""
        update, candidate = jnp.split(widen(self.project(inputs)), 2, -1)
        self._sow_gates(update=nn.sigmoid(update))
        return nn.sigmoid(-update), nn.sigmoid(update) * candidate


class MinLSTMCell(_LinearCell):
    """Minimal LSTM: neither gates nor candidate see the memory, which h shows whole.

        Gu, Gf = σ(M_g x(t) + b_g)                                       g = u, f
        ĥ      = M x(t) + b
        h(t)   = Gu / (Gu + Gf) * ĥ + Gf / (Gu + Gf) * h(t-1)

    Feng et al. 2024, arXiv 2410.01201. The columns of `project`'s kernel are u, f and
    the candidate.

    Attributes:
      hidden_size, dtype: see `MinGRUCell`.
    """

    def setup(self) -> None:
        self.project = nn.Dense(3 * self.hidden_size, dtype=self.dtype)

    def terms(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gf / (Gu + Gf) and Gu / (Gu + Gf) * ĥ."""
        update, forget, candidate = jnp.split(widen(self.project(inputs)), 3, -1)
        self._sow_gates(update=nn.sigmoid(update), forget=nn.sigmoid(forget))
        # The share Gf / (Gu + Gf) is σ of the difference of the logarithms.
        kept = nn.log_sigmoid(forget) - nn.log_sigmoid(update)
        return nn.sigmoid(kept), nn.sigmoid(-kept) * candidate


class LinearRecurrentUnit(_LinearCell):
    """Linear recurrent unit: a diagonal complex matrix is all that acts on the memory.

        s(t) = λ * s(t-1) + γ * B x(t)           λ = exp(-exp(ν) + i exp(θ))
        h(t) = gelu(Re(C s(t)) + D x(t))

    |λ| < 1 whatever is learned. At first λ is uniform in the ring between `min_radius`
    and `max_radius` and γ² = 1 - |λ|², with which white inputs leave s the variance of
    B x. Orvieto et al. 2023, arXiv 2303.06349, whose blocks are gated after this layer.

    `input` [feature, 2 * hidden] holds the real and imaginary parts of B side by side,
    `output` [2 * hidden, hidden] those of C one above the other, the imaginary negated;
    `skip` is D with a bias.

    Attributes:
      hidden_size: the width of s and h.
      dtype: compute dtype of products with real matrices, also of outputs; None: as the
        inputs, float32 at least. The state is complex64.
      min_radius, max_radius: of |λ| at first. Memories last some 1 / (1 - |λ|) steps.
      max_phase: of the argument of λ at first, which is uniform from 0.
    """

    min_radius: float = 0.0
    max_radius: float = 1.0
    max_phase: float = 2 * np.pi

    def setup(self) -> None:
        if not 0 <= self.min_radius < self.max_radius <= 1:
            raise ValueError(
                "min_radius and max_radius must be ordered within [0, 1], but "
                f"{self.min_radius:g} and {self.max_radius:g} were given."
            )
        size = (self.hidden_size,)
        low, high = self.min_radius**2, self.max_radius**2

        def init_nu(key, shape):  # ν = log(-log |λ|), |λ|² uniform
            square = jax.random.uniform(key, shape, minval=low, maxval=high)
            return jnp.log(-0.5 * jnp.log(jnp.clip(square, 1e-6, 1 - 1e-6)))

        def init_theta(key, shape):
            phase = jax.random.uniform(key, shape, maxval=self.max_phase)
            return jnp.log(jnp.maximum(phase, 1e-6))

        def init_gamma(key, shape):  # log γ
            return 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(self.nu)))

        self.nu = self.param("nu", init_nu, size)
        self.theta = self.param("theta", init_theta, size)
        self.gamma = self.param("gamma", init_gamma, size)
        self.skip = nn.Dense(self.hidden_size, dtype=self.dtype)
        self.input = nn.Dense(2 * self.hidden_size, use_bias=False, dtype=self.dtype)
        self.output = nn.Dense(self.hidden_size, use_bias=False, dtype=self.dtype)

    def initial_state(self, batch_size: int, dtype: Any = None) -> jax.Array:
        """s(0) = 0, complex64 [batch, hidden]."""
        return jnp.zeros((batch_size, self.hidden_size), jnp.complex64)

    def terms(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """λ, the same in all steps, and γ * B x(t)."""
        eigenvalues = jnp.exp(jax.lax.complex(-jnp.exp(self.nu), jnp.exp(self.theta)))
        b = jax.lax.complex(*jnp.split(widen(self.input(inputs)), 2, -1))
        return jnp.broadcast_to(eigenvalues, b.shape), jnp.exp(self.gamma) * b

    def outputs(self, states: jax.Array, inputs: jax.Array) -> jax.Array:
        """gelu(Re(C s) + D x)."""
        parts = jnp.concatenate([states.real, states.imag], -1)
        return nn.gelu(self.output(parts) + self.skip(inputs))

    def _narrow(self, state: jax.Array, dtype: Any) -> jax.Array:
        return state
