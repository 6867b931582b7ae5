"""Ready sets for transformers without (much) normalization, periodic and recurrent networks."""

import math
import re
from typing import Any

import jax

from initjax.initializers.depth import deepnorm_scales, t_fixup_gain
from initjax.initializers.orthogonal import orthogonal
from initjax.initializers.protocol import count
from initjax.initializers.protocol import scale as checked_scale
from initjax.initializers.recurrent import forget_gate_bias
from initjax.reinit.info import ParamInfo
from initjax.reinit.rule import Rule, Rules, constant, keep
from initjax.reinit.sets import ByFan, is_bias, is_embedding, is_kernel, torch_default


def _transformer(encoder: str, decoder: str, gains: dict[str, float | None], query_key: str, what: str) -> Rules:
    """Glorot normal, times the gain of its stack for value, output and feed-forward kernels."""
    both = gains["encoder"] is not None and gains["decoder"] is not None

    def part(info: ParamInfo) -> str | None:
        if not both:
            return "encoder" if gains["encoder"] is not None else "decoder"
        found = [
            name for name, pattern in (("encoder", encoder), ("decoder", decoder)) if re.search(pattern, info.path)
        ]
        return found[0] if len(found) == 1 else None

    def std(info: ParamInfo) -> float:
        assert info.fan_in is not None and info.fan_out is not None
        stack = part(info)
        gain = gains[stack] if stack and not re.search(query_key, info.path) else 1.0
        return (gain or 1.0) * math.sqrt(2 / (info.fan_in + info.fan_out))

    return Rules(
        [
            Rule(is_kernel, ByFan(what, std), "kernel"),
            Rule(is_bias, constant(0.0), "bias", optional=True),
            Rule(..., keep, "other"),
        ]
    )


QUERY_KEY = r"(^|[/_])(query|key|q|k|q_proj|k_proj|to_q|to_k)([/_]|$)"


def deepnorm(
    encoder_layers: int = 0,
    decoder_layers: int = 0,
    *,
    encoder: str = "(?i)encoder",
    decoder: str = "(?i)decoder",
    query_key: str = QUERY_KEY,
) -> Rules:
    """DeepNorm: Glorot normal kernels, of gain beta but for queries and keys, biases zero.

    The model multiplies its residual stream by alpha itself: `ij.initializers.deepnorm_scales`.

    Parameters
    ----------
    encoder_layers, decoder_layers : depths of the stacks.
    encoder, decoder : expressions found in the paths of the two stacks, where there are both; kernels in neither have
        gain 1.
    query_key : expression found in the paths of query and key projections.

    Returns
    -------
    Rules.

    Raises
    ------
    InputError : no layers.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import initjax as ij
    >>> params = {"attention": {name: {"kernel": jnp.ones((64, 64))} for name in ("query", "value")}}
    >>> [round(row.new_std * 8, 4) for row in ij.plan(params, ij.rules.deepnorm(encoder_layers=2)).rows]
    [1.0, 0.5]

    References
    ----------
    Wang et al. 2022 (arXiv:2203.00555), figure 2.
    """
    scales = deepnorm_scales(encoder_layers, decoder_layers)
    gains = {"encoder": scales.encoder_beta, "decoder": scales.decoder_beta}
    return _transformer(encoder, decoder, gains, query_key, "deepnorm")


def t_fixup(
    encoder_layers: int = 0,
    decoder_layers: int = 0,
    *,
    encoder: str = "(?i)encoder",
    decoder: str = "(?i)decoder",
    query_key: str = QUERY_KEY,
) -> Rules:
    """T-Fixup, for transformers without layer norm and warm-up.

    Glorot normal kernels times 0.67 N^(-1/4) (encoder of N layers) or (9N)^(-1/4) (decoder), but for queries and keys;
    embeddings N(0, 1/features) times (9N)^(-1/4), N the larger depth; biases zero.

    Parameters
    ----------
    encoder_layers, decoder_layers, encoder, decoder, query_key : as in `deepnorm`.

    Returns
    -------
    Rules.

    Raises
    ------
    InputError : no layers.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import initjax as ij
    >>> params = {"mlp": {"kernel": jnp.ones((64, 64))}, "embed": {"embedding": jnp.ones((100, 64))}}
    >>> [round(row.new_std * 8, 4) for row in ij.plan(params, ij.rules.t_fixup(encoder_layers=16)).rows]
    [0.2887, 0.335]

    References
    ----------
    Huang et al. 2020 (Improving transformer optimization through better initialization, ICML), section 3.2.
    """
    n, m = count(encoder_layers, "encoder_layers", 0), count(decoder_layers, "decoder_layers", 0)
    deepest = count(max(n, m), "encoder_layers + decoder_layers")
    gains = {"encoder": t_fixup_gain(n) if n else None, "decoder": t_fixup_gain(m, "decoder") if m else None}
    kernels = _transformer(encoder, decoder, gains, query_key, "t_fixup")
    table = ByFan("t_fixup", lambda info: t_fixup_gain(deepest, "embedding") / math.sqrt(info.shape[-1]))
    return Rules([Rule(is_embedding, table, "embedding", optional=True), *kernels])


def siren(omega: float = 30.0) -> Rules:
    """SIREN: kernels uniform on +-sqrt(6 / fan_in) / omega, those that meet the coordinates on +-1 / fan_in.

    Which are the first is read from the traced program. Biases are uniform on +-1/sqrt(fan_in) of their kernel.

    Parameters
    ----------
    omega : frequency inside the hidden sines, > 0.

    Returns
    -------
    Rules, which need model= and inputs=.

    Raises
    ------
    InputError : omega not positive.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> sine = lambda x: jnp.sin(30.0 * x)
    >>> model, x = nn.Sequential([nn.Dense(600), sine, nn.Dense(600), sine, nn.Dense(1)]), jnp.ones((1, 2))
    >>> plan = ij.plan(model.init(jax.random.key(0), x), ij.rules.siren(), model=model, inputs=x)
    >>> [round(row.new_std * 3**0.5, 5) for row in plan.rows if "kernel" in row.path]
    [0.5, 0.00333, 0.00333]

    References
    ----------
    Sitzmann et al. 2020 (arXiv:2006.09661), section 3.2.
    """
    omega = checked_scale(omega, "omega", positive=True)

    def std(info: ParamInfo) -> float:
        assert info.fan_in is not None
        return 3**-0.5 / info.fan_in if info.depth == 0 else math.sqrt(2 / info.fan_in) / omega

    biases = torch_default()[1]
    return Rules(
        [Rule(is_kernel, ByFan("siren", std, "uniform"), "kernel"), biases, Rule(..., keep, "other")], needs_model=True
    )


def lstm(forget: float = 1.0) -> Rules:
    """LSTM cells of Flax: forget-gate bias, orthogonal recurrent kernels (each gate its own), everything else kept.

    Finds linen's `LSTMCell` and `OptimizedLSTMCell` and nnx's `LSTMCell` ("hf", "hi", "hg", "ho", "if", ...), and nnx's
    `OptimizedLSTMCell` ("dense_h" with four gates side by side). Biases of the other gates are zero.

    Parameters
    ----------
    forget : bias of the forget gate; sigmoid of it is what a cell keeps in each step.

    Returns
    -------
    Rules.

    Raises
    ------
    InputError : forget not finite; when applied, a tree without such a cell.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model, x = nn.RNN(nn.OptimizedLSTMCell(3)), jnp.ones((1, 4, 2))
    >>> params = ij.reinitialize(model.init(jax.random.key(0), x), ij.rules.lstm(), jax.random.key(1))["params"]["cell"]
    >>> print(params["hf"]["bias"], params["hi"]["bias"])
    [1. 1. 1.] [0. 0. 0.]

    References
    ----------
    Jozefowicz, Zaremba, Sutskever 2015 (An empirical exploration of recurrent network architectures), section 3;
    Saxe, McClelland, Ganguli 2014 (arXiv:1312.6120) for orthogonal kernels.
    """
    own, joint = r"(^|/)h[ifgo]/", r"(^|/)dense_h/"
    alone, together = forget_gate_bias(forget, gates="f"), forget_gate_bias(forget)

    def recurrent_kernel(key: Any, info: ParamInfo) -> jax.Array:
        hidden, wide = info.shape[-2:]
        if hidden == wide:
            return orthogonal()(key, info.shape, info.dtype)
        keys = jax.random.split(key, wide // hidden)
        gates = [orthogonal()(k, (hidden, hidden), info.dtype) for k in keys]
        return jax.numpy.concatenate(gates, 1)

    def is_cell(info: ParamInfo) -> bool:
        return bool(re.search(f"{own}|{joint}", info.path)) and len(info.shape) <= 2

    def forget_bias(key: Any, info: ParamInfo) -> jax.Array:
        return (together if re.search(joint, info.path) else alone)(key, info.shape, info.dtype)

    def is_forget(info: ParamInfo) -> bool:
        return is_cell(info) and info.name == "bias" and bool(re.search(f"hf/|{joint}", info.path))

    return Rules(
        [
            Rule(is_forget, forget_bias, "forget bias"),
            Rule(lambda info: is_cell(info) and info.name == "bias", constant(0.0), "bias", optional=True),
            Rule(lambda info: is_cell(info) and info.name == "kernel", recurrent_kernel, "recurrent kernel"),
            Rule(..., keep, "other"),
        ]
    )
