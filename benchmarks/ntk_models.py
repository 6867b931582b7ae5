"""The networks whose empirical kernels are timed: one class each, no dropout, float32."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Mlp(nn.Module):
    width: int = 512
    depth: int = 3
    outputs: int = 10

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.outputs)(x)


class Cnn(nn.Module):
    """Convolutions with pooling between them, global average, ten classes."""

    widths: tuple[int, ...]
    pool: bool = True

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            if self.pool and i + 1 < len(self.widths):
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class ResNet(nn.Module):
    """Pre-activation blocks with group norm; the second stage halves the grid by a strided convolution."""

    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3))(x)
        for stage in range(2):
            width, stride = self.width * 2**stage, 1 + stage
            for block in range(2):
                strides = stride if block == 0 else 1
                h = nn.relu(nn.GroupNorm(8)(x))
                skip = x if strides == 1 else nn.Conv(width, (1, 1), strides)(h)
                h = nn.Conv(width, (3, 3), strides)(h)
                h = nn.Conv(width, (3, 3))(nn.relu(nn.GroupNorm(8)(h)))
                x = skip + h
        return nn.Dense(10)(nn.relu(nn.GroupNorm(8)(x)).mean((1, 2)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None] if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(d)(nn.gelu(nn.Dense(4 * d)(nn.LayerNorm()(x))))


class ViT(nn.Module):
    """4 x 4 patches of a 32 x 32 image, class token, position table."""

    d: int = 96
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.d, (4, 4), 4)(x)
        x = x.reshape(x.shape[0], -1, self.d)
        token = self.param("cls", nn.initializers.normal(0.02), (1, 1, self.d))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.d)), x], 1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.d))
        for _ in range(self.depth):
            x = Block(4, causal=False)(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class LanguageModel(nn.Module):
    """Causal transformer; the outputs are the logits of ten tokens that follow the last position."""

    vocabulary: int = 2000
    d: int = 128
    depth: int = 2
    length: int = 32

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.d)(ids)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, self.length, self.d))
        for _ in range(self.depth):
            x = Block(4, causal=True)(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, -1])


def case(name: str):
    """`(model, params, x)` of a row, from fixed keys."""
    key = jax.random.key(0)
    if name == "lm":
        model, x = LanguageModel(), jax.random.randint(key, (16, 32), 0, 2000)
    else:
        model, shape = {
            "mlp": (Mlp(), (256, 784)),
            "cnn32": (Cnn((32, 64, 64)), (16, 32, 32, 3)),
            "cnn8": (Cnn((64, 64, 64), pool=False), (64, 8, 8, 3)),
            "resnet": (ResNet(), (8, 32, 32, 3)),
            "vit": (ViT(), (8, 32, 32, 3)),
        }[name]
        x = jax.random.normal(key, shape)
    params = jax.jit(model.init)(jax.random.key(1), x[:1])["params"]
    return model, params, x
