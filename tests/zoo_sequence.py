"""Networks on sequences, on tokens and with several heads as their authors write them, in linen and in nnx."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

WIDTH = 32


# ------------------------------------------------------------------ transformers


class Encoder(nn.Module):
    """One block: norms ahead of each branch (`pre`), or after each sum as in Vaswani et al. 2017."""

    pre: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x)
        attend, mlp = nn.MultiHeadDotProductAttention(2), nn.Sequential([nn.Dense(2 * WIDTH), nn.relu, nn.Dense(WIDTH)])
        for branch in (attend, mlp):
            norm = nn.LayerNorm()
            x = x + branch(norm(x)) if self.pre else norm(x + branch(x))
        return nn.Dense(1)(x.mean(axis=1))


class EncoderNnx(nnx.Module):
    def __init__(self, pre=True, *, rngs):
        self.pre, self.embed, self.head = pre, nnx.Linear(6, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 1, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        up, down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(up, nnx.relu, down)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.embed(x)
        for norm, branch in zip(self.norms, (self.attend, self.mlp), strict=True):
            x = x + branch(norm(x)) if self.pre else norm(x + branch(x))
        return self.head(x.mean(axis=1))


def rotate(x):
    """Rotary position embedding of (batch, time, heads, features)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(half) / half)
    sin, cos = (f(angle)[:, None, :].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q, k, v):
    """Causal attention of (batch, time, heads, features)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Decoder(nn.Module):
    """A block of today's language models: RMSNorm, rotary causal attention, SwiGLU, no biases."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, WIDTH)(tokens)
        h = nn.RMSNorm()(x)
        q, k, v = (nn.DenseGeneral((2, WIDTH // 2), use_bias=False, name=name)(h) for name in "qkv")
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")(attend(q, k, v))
        h = nn.RMSNorm()(x)
        gate, up = (nn.Dense(2 * WIDTH, use_bias=False, name=name)(h) for name in ("gate", "up"))
        x = x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.silu(gate) * up)
        return nn.Dense(11, use_bias=False, name="logits")(nn.RMSNorm()(x)[:, -1])


class DecoderNnx(nnx.Module):
    def __init__(self, *, rngs):
        heads = (2, WIDTH // 2)
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.q, self.k, self.v = (nnx.LinearGeneral(WIDTH, heads, use_bias=False, rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral(heads, WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(3)])
        self.logits = nnx.Linear(WIDTH, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        h = self.norms[0](x)
        x = x + self.out(attend(self.q(h), self.k(h), self.v(h)))
        h = self.norms[1](x)
        x = x + self.down(nnx.silu(self.gate(h)) * self.up(h))
        return self.logits(self.norms[2](x)[:, -1])


class TiedLanguageModel(nn.Module):
    """Logits by the transposed embedding, as in GPT-2."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, WIDTH)
        x = embed(tokens)
        return embed.attend(nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(WIDTH)(x))))[:, -1])


class TiedLanguageModelNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.embed, self.norm = nnx.Embed(11, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.embed.attend(self.norm(x + self.down(nnx.gelu(self.up(x))))[:, -1])


class TopOneExperts(nn.Module):
    """A mixture of experts with hard routing (Fedus et al. 2021): every example goes to its best expert."""

    @nn.compact
    def __call__(self, x):
        gate = nn.softmax(nn.Dense(4, name="router")(x))
        weight, choice = jax.lax.top_k(gate, 1)
        outputs = jnp.stack([nn.Dense(WIDTH)(nn.relu(nn.Dense(WIDTH)(x))) for _ in range(4)], axis=1)
        chosen = jnp.take_along_axis(outputs, choice[:, :, None], axis=1)
        return nn.Dense(1)(jnp.sum(weight[:, :, None] * chosen, axis=1))


class TopOneExpertsNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.router, self.head = nnx.Linear(10, 4, rngs=rngs), nnx.Linear(WIDTH, 1, rngs=rngs)
        self.up = nnx.List([nnx.Linear(10, WIDTH, rngs=rngs) for _ in range(4)])
        self.down = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        weight, choice = jax.lax.top_k(nnx.softmax(self.router(x)), 1)
        outputs = jnp.stack([down(nnx.relu(up(x))) for up, down in zip(self.up, self.down, strict=True)], axis=1)
        return self.head(jnp.sum(weight[:, :, None] * jnp.take_along_axis(outputs, choice[:, :, None], axis=1), axis=1))


# ------------------------------------------------------------------ recurrent networks


class Recurrent(nn.Module):
    """A cell over time by `nn.RNN`; the last hidden state is read out."""

    cell: object = nn.LSTMCell

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(self.cell(WIDTH))(x)[:, -1])


class RecurrentNnx(nnx.Module):
    def __init__(self, cell=nnx.LSTMCell, *, rngs):
        self.layer = nnx.RNN(cell(6, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.layer(x)[:, -1])


# ------------------------------------------------------------------ one trunk, several heads


class MultiHeadNnx(nnx.Module):
    """Twin of `zoo.TwoHeads`."""

    def __init__(self, *, rngs):
        self.trunk = nnx.Linear(10, 128, rngs=rngs)
        self.policy, self.value = nnx.Linear(128, 3, rngs=rngs), nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.trunk(x))
        return jnp.concatenate([self.policy(h), jnp.tanh(self.value(h))], axis=-1)
