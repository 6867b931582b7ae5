"""Models written as their authors would write them, without a thought of initjax; linen and nnx twins."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

ACTIVATIONS = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "erf": jax.lax.erf,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "tanh": jnp.tanh,
    "abs": jnp.abs,
    "silu": nn.silu,
    "softplus": nn.softplus,
    "elu": nn.elu,
    "relu6": nn.relu6,
    "square": jnp.square,
}

he = jax.nn.initializers.he_normal()
wide = jax.nn.initializers.variance_scaling(1.8, "fan_in", "normal")
small = jax.nn.initializers.normal(0.1)


class MLP(nn.Module):
    """Three hidden layers with biases."""

    activation: str = "relu"
    width: int = 256
    outputs: int = 1
    kernel_init: object = wide
    bias_init: object = small

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.Dense(self.width, kernel_init=self.kernel_init, bias_init=self.bias_init)(x)
            x = ACTIVATIONS[self.activation](x)
        return nn.Dense(self.outputs, kernel_init=self.kernel_init, bias_init=self.bias_init)(x)


class MLPnnx(nnx.Module):
    """The same network in nnx."""

    def __init__(self, features, activation="relu", width=256, outputs=1, *, rngs):
        sizes = [features, width, width, width, outputs]
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, kernel_init=wide, bias_init=small, rngs=rngs)
                for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )
        self.activation = activation

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))
        return self.layers[-1](x)


class PreActivationResNet(nn.Module):
    """A residual MLP: every block adds a branch to a linear stream."""

    width: int = 128
    blocks: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(self.blocks):
            h = nn.Dense(self.width, kernel_init=he)(nn.relu(x))
            x = x + 0.5 * nn.Dense(self.width, kernel_init=he)(nn.relu(h))
        return nn.Dense(1)(nn.relu(x))


class DependentBranches(nn.Module):
    """x + x and tanh(u) + u: sums of what is not independent."""

    @nn.compact
    def __call__(self, x):
        u = nn.Dense(128)(x)
        u = u + u
        h = jnp.tanh(u) + 0.3 * u
        return nn.Dense(1)(h)


class TiedRecurrent(nn.Module):
    """One Dense applied three times: shared weights in one role."""

    @nn.compact
    def __call__(self, x):
        cell = nn.Dense(128, kernel_init=wide, bias_init=small)
        h = nn.Dense(128)(x)
        for _ in range(3):
            h = cell(jnp.tanh(h))
        return nn.Dense(1)(h)


class FlattenedSequence(nn.Module):
    """Dense on every position, then flatten, then a readout."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64, kernel_init=he, bias_init=small)(x))
        return nn.Dense(1)(h.reshape(h.shape[0], -1))


class PooledSequence(nn.Module):
    """Dense on every position, then the mean over positions."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64, kernel_init=he, bias_init=small)(x))
        return nn.Dense(1)(h.mean(axis=1))


class CNN(nn.Module):
    """Two convolutions, then flatten or a global mean."""

    activation: str = "relu"
    readout: str = "flat"
    padding: str = "SAME"
    width: int = 64

    @nn.compact
    def __call__(self, x):
        phi = ACTIVATIONS[self.activation]
        x = phi(nn.Conv(self.width, (3, 3), padding=self.padding, kernel_init=he, bias_init=small)(x))
        stride = 2 if self.padding == "SAME" else 1
        x = phi(nn.Conv(self.width, (3, 3), stride, padding=self.padding, kernel_init=he, bias_init=small)(x))
        x = x.reshape(x.shape[0], -1) if self.readout == "flat" else x.mean(axis=(1, 2))
        return nn.Dense(1)(x)


class CNNnnx(nnx.Module):
    """The same network in nnx."""

    def __init__(self, channels, positions, *, rngs):
        self.first = nnx.Conv(channels, 64, (3, 3), kernel_init=he, bias_init=small, rngs=rngs)
        self.second = nnx.Conv(64, 64, (3, 3), strides=2, kernel_init=he, bias_init=small, rngs=rngs)
        self.readout = nnx.Linear(64 * positions, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.readout(x.reshape(x.shape[0], -1))


class ResNetV2(nn.Module):
    """Pre-activation residual blocks with LayerNorm, pooling in between, transposed convolution at the end."""

    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3))(x)
        for _ in range(2):
            h = nn.Conv(self.width, (3, 3))(nn.relu(nn.LayerNorm()(x)))
            x = x + nn.Conv(self.width, (3, 3))(nn.relu(h))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.ConvTranspose(self.width, (2, 2), (2, 2))(nn.relu(x))
        return nn.Dense(1)(x.mean(axis=(1, 2)))


class MaxPooled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.max_pool(nn.Conv(64, (2, 2))(x), (2, 2)).mean(axis=(1, 2)))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Conv(64, (1, 1))(x)
        return nn.Dense(1)(nn.Conv(64, (3, 3), feature_group_count=64)(h).mean(axis=(1, 2)))


class Blurred(nn.Module):
    """A fixed kernel over channels and positions."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(8, (1, 1))(x)
        kernel = jnp.ones((3, 3, 8, 8), h.dtype)
        h = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return nn.Dense(1)(nn.relu(h).mean(axis=(1, 2)))


class TiedAutoencoder(nn.Module):
    """relu(x W) W^T: the weights in two roles."""

    width: int = 256

    @nn.compact
    def __call__(self, x):
        w = self.param("w", jax.nn.initializers.lecun_normal(), (x.shape[-1], self.width), x.dtype)
        return nn.relu(x @ w) @ w.T


class TokenMixing(nn.Module):
    """A Dense over positions between Dense layers over channels, as in an MLP-Mixer."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64)(x))
        h = nn.Dense(h.shape[1], name="mix")(h.swapaxes(1, 2)).swapaxes(1, 2)
        return nn.Dense(1)(nn.relu(h).reshape(h.shape[0], -1))


class FixedMatrix(nn.Module):
    """A given matrix over channels, as a blur or a whitening."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        return nn.Dense(1)(nn.relu(h @ jnp.tri(64, dtype=h.dtype)))


class ChannelMax(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        return nn.Dense(1)(h - h.max(axis=-1, keepdims=True))


class Gated(nn.Module):
    """A gate (SwiGLU): the product of functions of two independent Gaussians."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        gate, value = nn.Dense(self.width, name="gate")(x), nn.Dense(self.width, name="value")(x)
        return nn.Dense(1)(nn.silu(gate) * value)


class Normed(nn.Module):
    """A Dense layer, an activation, a norm, a readout."""

    norm: object = nn.LayerNorm
    width: int = 128

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(self.norm()(nn.relu(nn.Dense(self.width, kernel_init=he, bias_init=small)(x))))


class PreNormBlock(nn.Module):
    """A residual stream with pre-normed gated blocks, as in today's language models (without attention)."""

    norm: object = nn.RMSNorm
    width: int = 128

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(2):
            h = self.norm()(x)
            h = nn.silu(nn.Dense(2 * self.width, use_bias=False)(h)) * nn.Dense(2 * self.width, use_bias=False)(h)
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(1)(self.norm()(x))


class GLU(nn.Module):
    """A gated linear unit as Flax has it: one Dense, split in two."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.glu(nn.Dense(2 * self.width, bias_init=small)(x)))


class Cell(nn.Module):
    width: int

    @nn.compact
    def __call__(self, carry, x):
        carry = jnp.tanh(nn.Dense(self.width, name="hidden")(carry) + nn.Dense(self.width, name="input")(x))
        return carry, carry


class ScannedRNN(nn.Module):
    """A recurrent network by nn.scan, its hidden states averaged."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        _, states = scan(self.width, name="cell")(jnp.zeros((x.shape[0], self.width), x.dtype), x)
        return nn.Dense(1)(states.mean(axis=1))


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(nn.LayerNorm()(x)))), None


class ScannedBlocks(nn.Module):
    """Residual blocks stacked by nn.scan: every block its own weights."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(self.width, name="blocks")(x, None)
        return nn.Dense(1)(x)


class LoopedBlocks(nn.Module):
    """The same blocks by a Python loop."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(3):
            x, _ = Block(self.width)(x, None)
        return nn.Dense(1)(x)


class TextClassifier(nn.Module):
    """Embeddings of tokens, averaged."""

    @nn.compact
    def __call__(self, tokens):
        h = nn.relu(nn.Dense(64)(nn.Embed(11, 32)(tokens)))
        return nn.Dense(1)(h.mean(axis=1))


class TiedEmbedding(nn.Module):
    """Embed and attend with one table."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 64)
        return embed.attend(nn.relu(nn.Dense(64)(embed(tokens)))).mean(axis=1)


class DependentGate(nn.Module):
    """A gate whose two sides share a Gaussian."""

    @nn.compact
    def __call__(self, x):
        u, v = nn.Dense(64)(x), nn.Dense(64)(x)
        return nn.Dense(1)(nn.silu(u) * (u + v))


class PostActivationResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        x = nn.relu(x + nn.Dense(64)(x))
        return nn.Dense(1)(x)


class UniformBias(nn.Module):
    """PyTorch's bias: random, not Gaussian, and not a sum of many."""

    @nn.compact
    def __call__(self, x):
        def bias_init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1.0, 1.0)

        return nn.Dense(1)(nn.relu(nn.Dense(64, bias_init=bias_init)(x)))


class OffsetWeights(nn.Module):
    """A kernel whose entries do not have mean zero."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(64, kernel_init=jax.nn.initializers.uniform(0.1))(x)))


class RawSkip(nn.Module):
    """A raw input added to features: channels are no longer identically distributed."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(x + nn.Dense(x.shape[-1])(x)))


class DiagonalDelta(nn.Module):
    """Weights that are not identically distributed."""

    @nn.compact
    def __call__(self, x):
        def init(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) * jnp.tri(*shape, dtype=dtype)

        return nn.Dense(1)(nn.relu(nn.Dense(64, kernel_init=init)(x)))


class HalfChannels(nn.Module):
    """Two halves of one layer's channels are independent of each other."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        return nn.Dense(1)(h[:, :32] + h[:, 32:])


class ChannelTranspose(nn.Module):
    """h + h^T over two channel axes: entry (i, j) meets entry (j, i)."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x).reshape(-1, 8, 8)
        return nn.Dense(1)((h + h.swapaxes(1, 2)).reshape(-1, 64))


class SharedScalar(nn.Module):
    """One random number for all channels."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        return nn.Dense(1)(nn.relu(h + nn.Dense(1)(x)))


# models outside the exact theory -> a word that its reason must hold
REFUSED = {
    TiedAutoencoder: "transpose",
    TokenMixing: "token mixing",
    FixedMatrix: "fixed matrix",
    ChannelMax: "maximum",
    DependentGate: "several different random fields",
    PostActivationResNet: "several different random fields",
    UniformBias: "not Gaussian",
    OffsetWeights: "mean",
    RawSkip: "varies along channels",
    DiagonalDelta: "not identically distributed",
    ChannelTranspose: "change places",
    SharedScalar: "repeated over all channels",
    MaxPooled: "maximum",
    TiedEmbedding: "transpose",
    Depthwise: "depthwise",
    Blurred: "known kernel",
}


class Concatenated(nn.Module):
    """Two layers side by side (and the raw input, if asked), normed over all of them."""

    norm: object = None
    raw: bool = False
    readout: str = "all"

    @nn.compact
    def __call__(self, x):
        h = [nn.relu(nn.Dense(64)(x)), jnp.tanh(nn.Dense(32)(x))] + [x] * self.raw
        h = jnp.concatenate(h, axis=-1)
        if self.norm is not None:
            h = self.norm()(h)
        if self.readout == "halves":
            left, right = jnp.split(h, 2, axis=-1)
            h = left + right
        if self.readout == "deep":
            h = nn.relu(nn.Dense(64)(h))
        return nn.Dense(1)(h)


class DenseNet(nn.Module):
    """Every convolution sees all earlier feature maps."""

    norm: object = nn.LayerNorm
    growth: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2 * self.growth, (3, 3))(x)
        for _ in range(2):
            h = nn.Conv(self.growth, (3, 3))(nn.relu(self.norm()(x)))
            x = jnp.concatenate([x, h], axis=-1)
        x = nn.avg_pool(nn.relu(self.norm()(x)), (2, 2), (2, 2))
        return nn.Dense(1)(x.reshape(x.shape[0], -1))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and the skip beside it; a value at every pixel."""

    width: int = 32

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(self.width, (3, 3))(x))
        h = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(skip))
        h = nn.ConvTranspose(self.width, (2, 2), strides=(2, 2))(h)
        h = jnp.concatenate([h, skip], axis=-1)
        return nn.Conv(1, (1, 1))(nn.relu(nn.Conv(self.width, (3, 3))(h)))


class TwoHeads(nn.Module):
    """A trunk with two heads, their outputs side by side."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(128)(x))
        return jnp.concatenate([nn.Dense(3)(h), jnp.tanh(nn.Dense(1)(h))], axis=-1)


class DropoutMLP(nn.Module):
    """Dropout between dense layers; `before`: ahead of the activation."""

    before: bool = False
    rate: float = 0.3
    width: int = 128

    @nn.compact
    def __call__(self, x, train=True):
        h = nn.Dense(self.width)(x)
        if self.before:
            h = nn.sigmoid(nn.Dropout(self.rate, deterministic=not train)(h))
        else:
            h = nn.Dropout(self.rate, deterministic=not train)(nn.relu(h))
        return nn.Dense(1)(h)


class DropoutResNet(nn.Module):
    """Residual blocks with dropout on the branches, pooled, and dropout before the readout."""

    width: int = 64

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(self.width, (3, 3))(x)
        h = nn.Conv(self.width, (3, 3))(nn.relu(x))
        x = x + nn.Dropout(0.3, deterministic=not train)(h)
        x = nn.relu(nn.Conv(self.width, (3, 3))(nn.relu(x))).mean(axis=(1, 2))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))


class GroupedConvolution(nn.Module):
    """ResNeXt's convolution: groups of channels that do not see each other."""

    groups: int = 2
    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.relu(nn.Conv(self.width, (3, 3), feature_group_count=self.groups, use_bias=False)(x))
        return nn.Dense(1)(x.mean(axis=(1, 2)))


class LocallyConnected(nn.Module):
    """Convolution windows with weights of their own at every position, or shared; pooled or flattened."""

    local: bool = True
    flat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.ConvLocal if self.local else nn.Conv
        h = jnp.tanh(layer(64, (2, 2), padding="VALID", use_bias=False, kernel_init=small)(x))
        h = h.reshape(h.shape[0], -1) if self.flat else h.mean(axis=(1, 2))
        return nn.Dense(1)(h)


class ScalarProduct(nn.Module):
    """Two branches and their scalar product, as in a DeepONet."""

    width: int = 64

    @nn.compact
    def __call__(self, x):
        left, right = nn.Dense(self.width)(x), nn.Dense(self.width)(x)
        return jnp.sum(left * right, axis=-1, keepdims=True)


REFUSED[ScalarProduct] = "its fluctuations"


class LeNet(nn.Module):
    """Convolutions, average pooling, dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(jnp.tanh(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = jnp.tanh(nn.Conv(64, (2, 2), padding="VALID")(x))
        x = jnp.tanh(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64)(x))
        h = nn.relu(nn.Dense(64)(nn.Dense(32)(h)))
        return nn.Dense(x.shape[-1])(h)


class Siren(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.sin(3.0 * nn.Dense(64)(x))
        return nn.Dense(1)(jnp.sin(nn.Dense(64)(h)))


class DeepSets(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(nn.relu(nn.Dense(64)(x))).mean(axis=1)
        return nn.Dense(1)(nn.relu(h))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, inverted bottleneck: refused, one channel in each group."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (1, 1))(x)
        h = nn.LayerNorm()(nn.Conv(32, (3, 3), feature_group_count=32)(x))
        return nn.Dense(1)((x + nn.Dense(32)(nn.gelu(nn.Dense(64)(h)))).mean(axis=(1, 2)))


REFUSED[ConvNeXtBlock] = "one channel in each group"


class BatchNormTraining(nn.Module):
    """Statistics of the batch itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(64)(x))))


REFUSED[BatchNormTraining] = "over the batch"
