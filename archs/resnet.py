"""Residual networks: blocks that learn what to add to their input.

    y = relu(x + F(x))      as first published, a normalisation after each convolution
    y = x + F(x)            with preactivation: normalisation and relu before each

F is two convolutions of 3 x 3, or, as a bottleneck, 1 x 1, 3 x 3 and 1 x 1. Where F
halves the height and width or changes the number of channels, the shortcut x does, too.

He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016;
"Identity mappings in deep residual networks", ECCV 2016 (preactivation); Zagoruyko and
Komodakis, "Wide residual networks", BMVC 2016.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .convolution import convolve
from .dropout import Dropout
from .encoders import check_images, dense


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean over height and width, Dense.

    A stage has `width` channels, twice as many as the stage before it, and halves the
    height and width in its first block (but in the first stage). The networks of the
    papers:

        ResNet-18, -34     ResNet((2, 2, 2, 2), 1000), ResNet((3, 4, 6, 3), 1000)
        ResNet-50          ResNet((3, 4, 6, 3), 1000, bottleneck=True)
        ResNet-101         ResNet((3, 4, 23, 3), 1000, bottleneck=True)
        ResNet-152         ResNet((3, 8, 36, 3), 1000, bottleneck=True)
        CIFAR, 6n+2 layers ResNet((n, n, n), 10, width=16, stem="cifar",
                                  shortcut="zeros")
        WRN-(6n+4)-k       ResNet((n, n, n), 10, width=16 * k, stem="cifar",
                                  stem_width=16, preactivation=True)

    Bottlenecks halve the height and width in their 3 x 3 convolution ("v1.5"), as all
    libraries do; the paper does in the first of 1 x 1. Kernels are initialised by He's
    normal distribution of the fan-out; the last scale of each F is zero at first, so
    that a block begins as its shortcut (Goyal et al. 2017; not with preactivation,
    where no normalisation ends F).

    With batch normalisation, a training step passes the collection "batch_stats" on.
    As encoder of the elements of sets take `num_groups`: the statistics of a batch
    would let the elements, and the padding, see each other while training.

    Attributes:
      stage_sizes: number of blocks of each stage.
      features: the width f of the output, such as the number of classes.
      width: number of channels of the first stage, within its blocks; those of a
        bottleneck end with four times as many.
      bottleneck: F is 1 x 1, 3 x 3, 1 x 1 instead of 3 x 3, 3 x 3.
      preactivation: normalise and activate before each convolution ("v2").
      stem: "imagenet" (7 x 7 with stride 2, 3 x 3 max pooling with stride 2) or
        "cifar" (3 x 3), for small images.
      stem_width: number of channels of the stem; None: `width`.
      shortcut: "projection", a convolution of 1 x 1 where the shape changes, or
        "zeros": every second pixel, and zeros for new channels.
      dropout_rate: before the second convolution of each block when `train`; needs the
        rng stream "dropout".
      num_groups: None: batch normalisation; or group normalisation of so many groups
        (Wu and He 2018).
      dtype: compute dtype; parameters are float32.
    """

    stage_sizes: Sequence[int]
    features: int
    width: int = 64
    bottleneck: bool = False
    preactivation: bool = False
    stem: str = "imagenet"
    stem_width: int | None = None
    shortcut: str = "projection"
    dropout_rate: float = 0.0
    num_groups: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images x [n, height, width, channel] to [n, features].

        Raises:
          ValueError: x has another rank, or `stem` or `shortcut` another value.
        """
        check_images(x, "ResNet")
        self._check_options()
        if self.num_groups is None:
            norm = partial(
                nn.BatchNorm,
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
            )
        else:
            norm = partial(
                nn.GroupNorm, self.num_groups, epsilon=1e-5, dtype=self.dtype
            )
        imagenet = self.stem == "imagenet"
        conv = partial(_conv, dtype=self.dtype)
        x = conv(self.stem_width or self.width, 7 if imagenet else 3, 1 + imagenet)(x)
        if not self.preactivation:
            x = nn.relu(norm()(x))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _Block(
                    self.width * 2**stage,
                    stride,
                    self.bottleneck,
                    self.preactivation,
                    self.shortcut,
                    self.dropout_rate,
                    norm,
                    conv,
                )(x, train=train)
        if self.preactivation:
            x = nn.relu(norm()(x))
        x = x.mean((1, 2))
        return dense(self.features, x.shape[-1], dtype=self.dtype)(x)

    def _check_options(self) -> None:
        for name, values in (
            ("stem", ("imagenet", "cifar")),
            ("shortcut", ("projection", "zeros")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {values[0]!r} or {values[1]!r}, but "
                    f"{getattr(self, name)!r} was given."
                )


def _conv(features: int, size: int, stride: int = 1, *, dtype: Any) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=convolve,
    )


class _Block(nn.Module):
    """One residual block; see `ResNet` for the attributes."""

    width: int
    stride: int
    bottleneck: bool
    preactivation: bool
    shortcut: str
    dropout_rate: float
    norm: Any
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride)]
            layers += [(4 * self.width, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (self.width, 3, 1)]
        features = layers[-1][0]
        changes = self.stride > 1 or x.shape[-1] != features
        project = changes and self.shortcut == "projection"
        shortcut = y = x
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            if self.preactivation:
                y = nn.relu(self.norm()(y))
                if i == 0 and project:
                    shortcut = y  # the projection reads what F reads
            if i == 1:
                y = Dropout(self.dropout_rate)(y, train=train)
            y = self.conv(*layer)(y)
            if not self.preactivation:
                scale_init = nn.initializers.zeros if last else nn.initializers.ones
                y = self.norm(scale_init=scale_init)(y)
                y = y if last else nn.relu(y)
        if project:
            shortcut = self.conv(features, 1, self.stride)(shortcut)
            if not self.preactivation:
                shortcut = self.norm()(shortcut)
        elif changes:
            shortcut = shortcut[:, :: self.stride, :: self.stride]
            new = features - shortcut.shape[-1]
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new)))
        return shortcut + y if self.preactivation else nn.relu(shortcut + y)
