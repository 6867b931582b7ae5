"""Scales that fall with depth: residual networks and transformers without, or with little, normalization."""

import math
from typing import Any, NamedTuple

from initjax.initializers.protocol import Axes, choice, count, factory, scale
from initjax.initializers.scaled import FanAvg, FanIn, Fixed


class DeepNormScales(NamedTuple):
    """The constants of DeepNorm, x <- LayerNorm(alpha x + F(x)).

    Attributes
    ----------
    encoder_alpha, decoder_alpha : factor on the residual stream (None where there is no such stack).
    encoder_beta, decoder_beta : gain of the value, output and feed-forward weights.
    """

    encoder_alpha: float | None
    encoder_beta: float | None
    decoder_alpha: float | None
    decoder_beta: float | None


@factory
def gpt2(blocks: int | None = None, std: Any = 0.02, *, branches_per_block: int = 2, dtype: Any = None) -> Fixed:
    """Weights N(0, std^2), or N(0, std^2 / (branches_per_block blocks)) for the last kernel of a residual branch.

    Parameters
    ----------
    blocks : number of transformer blocks, for kernels that write to the residual stream; None for all others.
    std : standard deviation without depth; 0.02 in GPT-2, whatever the fans.
    branches_per_block : branches that a block adds; 2 (attention, MLP) in a transformer.
    dtype : dtype where the call names none.

    Returns
    -------
    Fixed, an initializer for any shape.

    Raises
    ------
    InputError : blocks no integer >= 1, std negative.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> from initjax.initializers import gpt2
    >>> print(f"{gpt2().std((768, 3072)):.5f} {gpt2(blocks=12).std((3072, 768)):.5f}")
    0.02000 0.00408

    References
    ----------
    Radford et al. 2019 (Language models are unsupervised multitask learners), section 2.3: 1 / sqrt(N), N branches.
    """
    std = scale(std, "std")
    if blocks is not None:
        std /= math.sqrt(count(blocks, "blocks") * count(branches_per_block, "branches_per_block"))
    return Fixed(std, "normal", dtype)


def deepnorm_scales(encoder_layers: int = 0, decoder_layers: int = 0) -> DeepNormScales:
    """alpha and beta of DeepNorm for N encoder and M decoder layers.

    One stack of N: alpha = (2N)^(1/4), beta = (8N)^(-1/4). Both: encoder alpha = 0.81 (N^4 M)^(1/16), beta = 0.87
    (N^4 M)^(-1/16); decoder alpha = (3M)^(1/4), beta = (12M)^(-1/4).

    Parameters
    ----------
    encoder_layers, decoder_layers : N and M, at least one of them positive.

    Returns
    -------
    DeepNormScales.

    Raises
    ------
    InputError : negative numbers, or no layers at all.

    Accuracy
    --------
    The published constants, which have two digits in the encoder of an encoder-decoder.

    Examples
    --------
    >>> from initjax.initializers import deepnorm_scales
    >>> scales = deepnorm_scales(decoder_layers=8)
    >>> print(f"{scales.decoder_alpha:.4f} {scales.decoder_beta:.4f}")
    2.0000 0.3536

    References
    ----------
    Wang et al. 2022 (arXiv:2203.00555), table of section 4 (figure 2).
    """
    n, m = count(encoder_layers, "encoder_layers", 0), count(decoder_layers, "decoder_layers", 0)
    if not n + m:
        count(n + m, "encoder_layers + decoder_layers")
    if n and m:
        both = (n**4 * m) ** (1 / 16)
        return DeepNormScales(0.81 * both, 0.87 / both, (3 * m) ** 0.25, (12 * m) ** -0.25)
    one = (2 * (n + m)) ** 0.25, (8 * (n + m)) ** -0.25
    return DeepNormScales(*one, None, None) if n else DeepNormScales(None, None, *one)


@factory
def deepnorm(
    encoder_layers: int = 0,
    decoder_layers: int = 0,
    *,
    part: str | None = None,
    query_key: bool = False,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanAvg:
    """Glorot normal weights with DeepNorm's gain beta: variance 2 beta^2 / (fan_in + fan_out).

    Parameters
    ----------
    encoder_layers, decoder_layers : depths N and M of the model's stacks.
    part : "encoder" or "decoder", the stack of this kernel; needed only if there are both.
    query_key : for query and key projections, whose gain is 1.
    in_axis, out_axis, batch_axis, dtype : as in `FanIn`.

    Returns
    -------
    FanAvg. The model must also multiply its residual stream by alpha: `deepnorm_scales`.

    Raises
    ------
    InputError : no layers, an unknown part, a part that is missing where both stacks exist.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> from initjax.initializers import deepnorm
    >>> print(f"{deepnorm(encoder_layers=2).std((100, 100)) ** 2 * 100:.4f}")  # beta^2 = (8 * 2)^(-1/2)
    0.2500

    References
    ----------
    Wang et al. 2022 (arXiv:2203.00555), figure 2.
    """
    scales = deepnorm_scales(encoder_layers, decoder_layers)
    options = [name for name, beta in (("encoder", scales[1]), ("decoder", scales[3])) if beta is not None]
    if part is None and len(options) == 1:
        part = options[0]
    choice(part, "part", options, "the two stacks have different constants")
    beta = scales.encoder_beta if part == "encoder" else scales.decoder_beta
    assert beta is not None
    return FanAvg(1.0 if query_key else beta, "normal", in_axis, out_axis, batch_axis, dtype)


def t_fixup_gain(layers: int, part: str = "encoder") -> float:
    """The factor of T-Fixup on value, output, feed-forward (and embedding) weights.

    0.67 N^(-1/4) in an encoder of N layers, (9N)^(-1/4) in a decoder of N layers and for all embeddings.

    Parameters
    ----------
    layers : N.
    part : "encoder", "decoder" or "embedding".

    Returns
    -------
    The factor, a float.

    Raises
    ------
    InputError : layers no integer >= 1, an unknown part.

    Accuracy
    --------
    The published constants.

    Examples
    --------
    >>> from initjax.initializers import t_fixup_gain
    >>> print(f"{t_fixup_gain(16):.4f} {t_fixup_gain(9, 'decoder'):.4f}")
    0.3350 0.3333

    References
    ----------
    Huang et al. 2020 (Improving transformer optimization through better initialization, ICML), section 3.2.
    """
    choice(part, "part", ("encoder", "decoder", "embedding"), "the bounds differ by the number of branches in a layer")
    n = count(layers, "layers")
    return 0.67 * n**-0.25 if part == "encoder" else (9 * n) ** -0.25


@factory
def t_fixup(
    layers: int,
    part: str = "encoder",
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanAvg | FanIn:
    """Glorot normal weights times T-Fixup's factor g: variance 2 g^2 / (fan_in + fan_out); embeddings g^2 / features.

    For the value, output and feed-forward kernels of a transformer without layer norm and warm-up; queries and keys
    keep the plain Glorot law.

    Parameters
    ----------
    layers : number N of layers of the stack.
    part : "encoder", "decoder" or "embedding" (a table (tokens, features)).
    in_axis, out_axis, batch_axis, dtype : as in `FanIn`.

    Returns
    -------
    FanAvg, or FanIn over the features for embeddings.

    Raises
    ------
    InputError : as `t_fixup_gain`.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> from initjax.initializers import t_fixup
    >>> print(f"{t_fixup(16).std((64, 64)) * 8:.4f} {t_fixup(9, 'embedding').std((1000, 64)) * 8:.4f}")
    0.3350 0.3333

    References
    ----------
    Huang et al. 2020 (Improving transformer optimization through better initialization, ICML), section 3.2.
    """
    gain = t_fixup_gain(layers, part)
    if part == "embedding":
        return FanIn(gain, "normal", -1, -2, batch_axis, dtype)
    return FanAvg(gain, "normal", in_axis, out_axis, batch_axis, dtype)


@factory
def fixup(
    branches: int,
    layers_in_branch: int = 2,
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanIn:
    """He weights times L^(-1/(2m-2)): variance 2 L^(-1/(m-1)) / fan_in, all but the last layer of a branch.

    The last layer of every branch, and the classifier, start at zero.

    Parameters
    ----------
    branches : number L of residual branches.
    layers_in_branch : m >= 2, weight layers in a branch.
    in_axis, out_axis, batch_axis, dtype : as in `FanIn`.

    Returns
    -------
    FanIn.

    Raises
    ------
    InputError : branches below 1, layers_in_branch below 2.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> from initjax.initializers import fixup
    >>> print(f"{fixup(16, 2).sigma_w ** 2:.4f} {fixup(16, 3).sigma_w ** 2:.4f}")
    0.1250 0.5000

    References
    ----------
    Zhang, Dauphin, Ma 2019 (arXiv:1901.09321), section 3, rule 2.
    """
    m = count(layers_in_branch, "layers_in_branch", 2)
    gain = count(branches, "branches") ** (-1 / (2 * m - 2))
    return FanIn(math.sqrt(2) * gain, "normal", in_axis, out_axis, batch_axis, dtype)
