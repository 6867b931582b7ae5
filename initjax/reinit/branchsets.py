"""Ready sets that act on residual branches, which are found in the traced program."""

import math

from initjax.errors import InputError
from initjax.initializers.protocol import choice
from initjax.initializers.protocol import scale as checked_scale
from initjax.reinit.info import ParamInfo
from initjax.reinit.rule import Rule, Rules, constant, keep
from initjax.reinit.sets import ByFan, is_bias, is_kernel


def zero_gamma() -> Rules:
    """Every residual branch starts at zero: its last scale (norm, gain) or kernel, and the biases behind, are zeroed.

    The branches are found in the traced program, so they may be written in any way. At initialization the model is its
    shortcuts, bit for bit; the kernels of a branch that ends in a scale have exactly zero gradient in the first step,
    the scale has not. Everything else is kept.

    Returns
    -------
    Rules, which need model= and inputs=.

    Raises
    ------
    InputError : when applied, a model without residual branches, or a branch that ends in a nonlinearity.

    Accuracy
    --------
    Exact, for finite branches.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x + nn.LayerNorm()(nn.Dense(4)(x))
    >>> x = jax.random.normal(jax.random.key(0), (2, 4))
    >>> params = Block().init(jax.random.key(1), x)
    >>> params = ij.reinitialize(params, ij.rules.zero_gamma(), jax.random.key(2), model=Block(), inputs=x)
    >>> bool((Block().apply(params, x) == x).all())
    True

    References
    ----------
    Goyal et al. 2017 (arXiv:1706.02677), section 5.1; De, Smith 2020 (arXiv:2002.10444) for the reason.
    """

    def ends_branch(info: ParamInfo) -> bool:
        return any(info.path in (_end(info, b), *map(info.traced.path, b.biases)) for b in _branches(info))

    return Rules([Rule(ends_branch, constant(0.0), "branch end"), Rule(..., keep, "other")], needs_model=True)


def rezero() -> Rules:
    """ReZero, x + alpha F(x) with alpha = 0: the same rules as `zero_gamma`, since alpha is the last scale of a branch.

    In a model without such gains it zeroes the last norm or kernel of each branch, which is the same function at
    initialization.

    Returns
    -------
    Rules, which need model= and inputs=.

    Raises
    ------
    InputError : as `zero_gamma`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> model = lambda key: {"w": jnp.eye(3), "alpha": jnp.ones(())}, lambda p, x: x + p["alpha"] * jnp.tanh(x @ p["w"])
    >>> new = ij.reinitialize(model[0](0), ij.rules.rezero(), jax.random.key(0), model=model, inputs=jnp.ones((1, 3)))
    >>> float(new["alpha"])
    0.0

    References
    ----------
    Bachlechner et al. 2020 (arXiv:2003.04887), eq. 2; De, Smith 2020 (arXiv:2002.10444), SkipInit.
    """
    return zero_gamma()


def fixup(classifier: str = "zero") -> Rules:
    """Fixup for residual networks without norms.

    Of L branches with m kernels each: He's law times L^(-1/(2m-2)) for all kernels of a branch but the last, which is
    zero, as are the last kernel of the model and all biases; He's law for the others (stem, shortcuts); gains are one.

    Parameters
    ----------
    classifier : "zero", or "keep" for models whose last layer is no classifier.

    Returns
    -------
    Rules, which need model= and inputs=.

    Raises
    ------
    InputError : when applied, a model without residual branches, or a branch that ends in a nonlinearity.

    Accuracy
    --------
    Variances are exact, with true fans.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         for _ in range(16):
    ...             x = x + nn.Dense(32, name=f"b{_}")(nn.relu(nn.Dense(32, name=f"a{_}")(nn.relu(x))))
    ...         return nn.Dense(10, name="head")(x)
    >>> x = jnp.ones((1, 32))
    >>> params = Net().init(jax.random.key(0), x)
    >>> rows = ij.plan(params, ij.rules.fixup(), model=Net(), inputs=x).rows
    >>> {r.path: round(r.new_std, 4) for r in rows if r.path in ("a3/kernel", "b3/kernel", "head/kernel")}
    {'a3/kernel': 0.0625, 'b3/kernel': 0.0, 'head/kernel': 0.0}

    References
    ----------
    Zhang, Dauphin, Ma 2019 (arXiv:1901.09321), section 3.
    """
    choice(classifier, "classifier", ("zero", "keep"), "the paper starts the classification layer at zero")

    def is_zero(info: ParamInfo) -> bool:
        if info.kind == "bias":
            return True
        if not is_kernel(info):
            return False
        last = info.traced.survey.names[info.traced.last_kernel] if classifier == "zero" else ""
        return info.path == last or any(info.path == info.traced.path(b.kernels[-1]) for b in _branches(info))

    def std(info: ParamInfo) -> float:
        assert info.fan_in is not None
        found = _branches(info)
        sizes = [len(b.kernels) for b in found if info.path in map(info.traced.path, b.kernels)]
        gain = len(found) ** (-1 / (2 * min(sizes) - 2)) if sizes and min(sizes) > 1 else 1.0
        return gain * math.sqrt(2 / info.fan_in)

    return Rules(
        [
            Rule(is_zero, constant(0.0), "zero"),
            Rule(is_kernel, ByFan("fixup", std), "kernel", optional=True),
            Rule(lambda info: info.kind == "scale", constant(1.0), "scale", optional=True),
            Rule(..., keep, "other"),
        ],
        needs_model=True,
    )


def gpt2(std: float = 0.02) -> Rules:
    """GPT-2: kernels and embeddings N(0, std^2), the last kernel of each of N branches N(0, std^2 / N).

    Biases are zero, norms are one. Branches are found in the traced program.

    Parameters
    ----------
    std : standard deviation.

    Returns
    -------
    Rules, which need model= and inputs=.

    Raises
    ------
    InputError : std negative; when applied, a model without residual branches.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         for i in range(4):
    ...             x = x + nn.Dense(8, name=f"out{i}")(nn.gelu(nn.Dense(32, name=f"in{i}")(nn.LayerNorm()(x))))
    ...         return x
    >>> x = jnp.ones((1, 8))
    >>> rows = ij.plan(Net().init(jax.random.key(0), x), ij.rules.gpt2(), model=Net(), inputs=x).rows
    >>> {r.path: round(r.new_std, 4) for r in rows if r.path in ("in0/kernel", "out0/kernel")}
    {'in0/kernel': 0.02, 'out0/kernel': 0.01}

    References
    ----------
    Radford et al. 2019 (Language models are unsupervised multitask learners), section 2.3.
    """
    std = checked_scale(std, "std")

    def of(info: ParamInfo) -> float:
        found = _branches(info)
        last = {info.traced.path(b.kernels[-1]) for b in found if b.kernels}
        return std / math.sqrt(len(found)) if info.path in last else std

    return Rules(
        [
            Rule(lambda info: info.kind in ("kernel", "embedding"), ByFan("gpt2", of), "weight"),
            Rule(is_bias, constant(0.0), "bias", optional=True),
            Rule(lambda info: info.kind == "scale", constant(1.0), "scale", optional=True),
            Rule(..., keep, "other"),
        ],
        needs_model=True,
    )


def _branches(info: ParamInfo):
    """The model's branches, refused if there are none or one has no end."""
    found = info.traced.branches
    if not found:
        raise InputError(
            "a model in whose program no residual branch is found",
            "a model with additions x + F(x), F with weights",
            "the rule acts on the ends of residual branches",
            "branches inside while loops, conditions and scans of more than 256 turns are not seen: unroll them",
        )
    for branch in found:
        if branch.end is None:
            inside = ", ".join(map(info.traced.path, branch.kernels))
            raise InputError(
                f"a residual branch that ends in a nonlinearity (its kernels: {inside})",
                "branches whose last operation is linear: a norm, a gain, a kernel",
                "zeroed in front of a relu, the branch would have no gradient for ever",
                "put a gain behind the nonlinearity",
            )
    return found


def _end(info: ParamInfo, branch) -> str:
    return info.traced.path(branch.end)
