"""The zoo in nnx: the same networks as in `zoo`, written as nnx users write them."""

import jax.numpy as jnp
from flax import nnx
from zoo import he, small, wide


class Gated(nnx.Module):
    def __init__(self, *, rngs):
        self.gate, self.value = nnx.Linear(10, 128, rngs=rngs), nnx.Linear(10, 128, rngs=rngs)
        self.readout = nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.silu(self.gate(x)) * self.value(x))


class Normed(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(10, 128, kernel_init=he, bias_init=small, rngs=rngs)
        self.norm, self.readout = nnx.LayerNorm(128, rngs=rngs), nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.norm(nnx.relu(self.dense(x))))


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        h = self.norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class PreNormBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Linear(10, 128, rngs=rngs)
        self.blocks = nnx.List([Block(128, rngs=rngs) for _ in range(2)])
        self.norm, self.readout = nnx.RMSNorm(128, rngs=rngs), nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


class TextClassifier(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 32, rngs=rngs)
        self.dense, self.readout = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, tokens):
        return self.readout(nnx.relu(self.dense(self.embed(tokens))).mean(axis=1))


class TiedRecurrent(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Linear(10, 128, rngs=rngs)
        self.cell = nnx.Linear(128, 128, kernel_init=wide, bias_init=small, rngs=rngs)
        self.readout = nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x)
        for _ in range(3):
            h = self.cell(jnp.tanh(h))
        return self.readout(h)


class Concatenated(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = nnx.Linear(10, 64, rngs=rngs), nnx.Linear(10, 32, rngs=rngs)
        self.norm, self.readout = nnx.LayerNorm(96, rngs=rngs), nnx.Linear(96, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.norm(jnp.concatenate([nnx.relu(self.a(x)), jnp.tanh(self.b(x))], axis=-1)))


class UNet(nnx.Module):
    def __init__(self, *, rngs):
        self.skip = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.down = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.up = nnx.ConvTranspose(64, 32, (2, 2), strides=(2, 2), rngs=rngs)
        self.join, self.readout = nnx.Conv(64, 32, (3, 3), rngs=rngs), nnx.Conv(32, 1, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip = nnx.relu(self.skip(x))
        h = jnp.concatenate([self.up(nnx.relu(self.down(skip))), skip], axis=-1)
        return self.readout(nnx.relu(self.join(h)))


class GroupedConvolution(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Conv(3, 64, (3, 3), rngs=rngs)
        self.second = nnx.Conv(64, 64, (3, 3), feature_group_count=2, use_bias=False, rngs=rngs)
        self.readout = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.relu(self.second(nnx.relu(self.first(x)))).mean(axis=(1, 2)))


class LeNet(nnx.Module):
    def __init__(self, *, rngs):
        self.c1 = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.c2 = nnx.Conv(32, 64, (2, 2), padding="VALID", rngs=rngs)
        self.d1, self.d2 = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(jnp.tanh(self.c1(x)), (2, 2), (2, 2))
        x = jnp.tanh(self.c2(x))
        return self.d2(jnp.tanh(self.d1(x.reshape(x.shape[0], -1))))


class Autoencoder(nnx.Module):
    def __init__(self, *, rngs):
        self.encode = nnx.Sequential(nnx.Linear(10, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 32, rngs=rngs))
        self.decode = nnx.Sequential(nnx.Linear(32, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs))

    def __call__(self, x):
        return self.decode(self.encode(x))


class Siren(nnx.Module):
    def __init__(self, *, rngs):
        sizes = [10, 64, 64, 1]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes[:-1], sizes[1:], strict=True)])

    def __call__(self, x):
        h = jnp.sin(3.0 * self.layers[0](x))
        return self.layers[2](jnp.sin(self.layers[1](h)))


class DeepSets(nnx.Module):
    def __init__(self, *, rngs):
        self.one, self.two = nnx.Linear(6, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
        self.readout = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.relu(self.two(nnx.relu(self.one(x))).mean(axis=1)))


class ConvNeXtBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 32, (1, 1), rngs=rngs)
        self.depthwise = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs)
        self.norm, self.up = nnx.LayerNorm(32, rngs=rngs), nnx.Linear(32, 64, rngs=rngs)
        self.down, self.readout = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        h = self.down(nnx.gelu(self.up(self.norm(self.depthwise(x)))))
        return self.readout((x + h).mean(axis=(1, 2)))


class PostActivationResNet(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = nnx.Linear(10, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
        self.readout = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        return self.readout(nnx.relu(x + self.b(x)))


class TiedAutoencoder(nnx.Module):
    def __init__(self, *, rngs):
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (10, 256), jnp.float32))

    def __call__(self, x):
        return nnx.relu(x @ self.w[...]) @ self.w[...].T
