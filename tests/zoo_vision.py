"""Networks on images as their authors write them, each in linen and, beside it, in nnx."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from zoo import he

WIDTH = 32


# ------------------------------------------------------------------ LeNet with max-pooling


class LeNetMax(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(WIDTH, (3, 3))(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3)(nn.relu(nn.Dense(WIDTH)(x)))


class LeNetMaxNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, WIDTH, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.readout = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.readout(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


# ------------------------------------------------------------------ residual networks


class ResNetV1(nn.Module):
    """He et al. 2015: the activation comes after the sum. `gamma`: of the last norm of the branch."""

    gamma: float = 1.0

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(nn.Conv, WIDTH, (3, 3), use_bias=False, kernel_init=he)
        x = nn.relu(norm()(conv()(x)))
        h = nn.relu(norm()(conv()(x)))
        h = norm(scale_init=nn.initializers.constant(self.gamma))(conv()(h))
        return nn.Dense(3)(nn.relu(x + h).mean(axis=(1, 2)))


class ResNetV1Nnx(nnx.Module):
    def __init__(self, gamma=1.0, *, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=he, rngs=rngs)
        self.stem, self.stem_norm = conv(3, WIDTH), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.conv1, self.norm1 = conv(WIDTH, WIDTH), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.conv2 = conv(WIDTH, WIDTH)
        self.norm2 = nnx.BatchNorm(WIDTH, scale_init=nnx.initializers.constant(gamma), rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.eval()

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        h = nnx.relu(self.norm1(self.conv1(x)))
        return self.head(nnx.relu(x + self.norm2(self.conv2(h))).mean(axis=(1, 2)))


class PreActivationBlock(nn.Module):
    """Norm, relu, convolution, twice; a projection where the shape changes."""

    norm: object
    strides: int = 1
    dropout: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.relu(self.norm()(x))
        skip = x if self.strides == 1 else nn.Conv(WIDTH, (1, 1), self.strides, use_bias=False)(h)
        h = nn.relu(self.norm()(nn.Conv(WIDTH, (3, 3), self.strides, use_bias=False)(h)))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        return skip + nn.Conv(WIDTH, (3, 3), use_bias=False)(h)


class ResNetV2(nn.Module):
    """He et al. 2016, with any norm."""

    norm: object = nn.LayerNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (3, 3), use_bias=False)(x)
        for strides in (1, 2):
            x = PreActivationBlock(self.norm, strides)(x)
        return nn.Dense(3)(nn.relu(self.norm()(x)).mean(axis=(1, 2)))


class WideResNet(nn.Module):
    """A block of Zagoruyko, Komodakis 2016: dropout between the convolutions."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = PreActivationBlock(norm, dropout=0.3, train=train)(nn.Conv(WIDTH, (3, 3), use_bias=False)(x))
        return nn.Dense(3)(nn.relu(norm()(x)).mean(axis=(1, 2)))


class PreActivationBlockNnx(nnx.Module):
    def __init__(self, norm, strides=1, dropout=0.0, *, rngs):
        conv = functools.partial(nnx.Conv, WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = norm(WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs)
        self.conv1, self.conv2 = conv((3, 3), strides), conv((3, 3))
        self.dropout = nnx.Dropout(dropout, deterministic=False, rngs=rngs) if dropout else None
        self.skip = conv((1, 1), strides) if strides > 1 else None

    def __call__(self, x):
        h = nnx.relu(self.norm1(x))
        x = x if self.skip is None else self.skip(h)
        h = nnx.relu(self.norm2(self.conv1(h)))
        return x + self.conv2(h if self.dropout is None else self.dropout(h))


class ResNetV2Nnx(nnx.Module):
    def __init__(self, norm=nnx.LayerNorm, *, rngs):
        self.stem = nnx.Conv(3, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.blocks = nnx.List([PreActivationBlockNnx(norm, strides, rngs=rngs) for strides in (1, 2)])
        self.norm, self.head = norm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


class WideResNetNnx(nnx.Module):
    def __init__(self, *, rngs):
        norm = functools.partial(nnx.BatchNorm, use_running_average=True)
        self.stem = nnx.Conv(3, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.block = PreActivationBlockNnx(norm, dropout=0.3, rngs=rngs)
        self.norm, self.head = norm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.block(self.stem(x)))).mean(axis=(1, 2)))


# ------------------------------------------------------------------ DenseNet


class DenseNetNnx(nnx.Module):
    """Twin of `zoo.DenseNet`."""

    def __init__(self, growth=16, *, rngs):
        self.stem = nnx.Conv(3, 2 * growth, (3, 3), rngs=rngs)
        sizes = [2 * growth, 3 * growth]
        self.norms = nnx.List([nnx.LayerNorm(n, rngs=rngs) for n in sizes])
        self.convs = nnx.List([nnx.Conv(n, growth, (3, 3), rngs=rngs) for n in sizes])
        self.norm = nnx.LayerNorm(4 * growth, rngs=rngs)
        self.head = nnx.Linear(16 * growth, 1, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = jnp.concatenate([x, conv(nnx.relu(norm(x)))], axis=-1)
        x = nnx.avg_pool(nnx.relu(self.norm(x)), (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


# ------------------------------------------------------------------ patches: MLP-Mixer and ViT


class Mixer(nn.Module):
    """Tolstikhin et al. 2021: an MLP over tokens, then one over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2))(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        h = nn.LayerNorm()(x).swapaxes(1, 2)
        h = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(8)(h)))
        x = x + h.swapaxes(1, 2)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(axis=1))


class MixerNnx(nnx.Module):
    def __init__(self, tokens=4, *, rngs):
        self.patches = nnx.Conv(3, WIDTH, (2, 2), strides=(2, 2), rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])
        self.token = nnx.Sequential(nnx.Linear(tokens, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, tokens, rngs=rngs))
        up, down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.channel = nnx.Sequential(up, nnx.gelu, down)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.token(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
        x = x + self.channel(self.norms[1](x))
        return self.head(self.norms[2](x).mean(axis=1))


class ViT(nn.Module):
    """Dosovitskiy et al. 2020: patches, a class token, position embeddings, one encoder block."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2))(x).reshape(x.shape[0], -1, WIDTH)
        token = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH), x.dtype)
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH), x.dtype)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class ViTNnx(nnx.Module):
    def __init__(self, tokens=4, *, rngs):
        self.patches = nnx.Conv(3, WIDTH, (2, 2), strides=(2, 2), rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, WIDTH), jnp.float32))
        shape = (1, tokens + 1, WIDTH)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, jnp.float32))
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])
        up, down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.mlp, self.head = nnx.Sequential(up, nnx.gelu, down), nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], axis=1) + self.positions[...]
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x)[:, 0])
