"""neural-tangents 0.6.5 on a JAX it was not written for: the names it expects are put where it looks for them.

Enough for its analytic kernels and for all three implementations of its empirical kernels. Install with `pip install
--no-deps neural-tangents==0.6.5 frozendict`.

Errors of the peer itself, so that a difference is read rightly: relu-family NTK diagonals are off by up to 6e-4 in
float32 and 1.5e-8 in float64, ElementwiseNumerical by 4e-5 to 7e-6 on diagonals.
"""

import functools
import importlib
import importlib.util
import sys
import types
import warnings

import jax
import jax.extend.core
import pytest


def load():
    """The module `neural_tangents`; skips the calling test, with the reason, where it is missing or cannot be
    loaded."""
    for name in ("neural_tangents", "frozendict"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install --no-deps neural-tangents==0.6.5 frozendict)")
    if "neural_tangents" in sys.modules:
        return sys.modules["neural_tangents"]
    with warnings.catch_warnings():
        # deprecations of the old names it uses
        warnings.simplefilter("ignore")
        _prepare()
        return importlib.import_module("neural_tangents")


def _prepare():
    # TensorFlow is wanted by its experimental part only
    sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")

    private = importlib.import_module("jax._src.core")
    for name in ("Jaxpr", "JaxprEqn", "ClosedJaxpr", "Literal", "Var", "Primitive", "jaxpr_as_fun", "new_jaxpr_eqn"):
        _give(jax.core, name, getattr(jax.extend.core, name, getattr(private, name, None)))
    for name in ("Value", "AbstractValue", "ShapedArray", "eval_context", "get_aval", "lattice_join"):
        _give(jax.core, name, getattr(private, name, object))
    _give(jax.core, "DShapedArray", type("DShapedArray", (), {}))

    util = types.ModuleType("jax.util")
    private_util = importlib.import_module("jax._src.util")
    for name in ("safe_map", "safe_zip"):
        setattr(util, name, getattr(private_util, name))
    sys.modules["jax.util"] = util
    _give(jax, "util", util)

    ad = importlib.import_module("jax.interpreters.ad")
    _give(ad, "source_info_util", importlib.import_module("jax._src.source_info_util"))
    _give(ad, "zeros_like_p", private.Primitive("zeros_like"))
    private_ad = importlib.import_module("jax._src.interpreters.ad")
    for name in ("Zero", "UndefinedPrimal"):
        _give(ad, name, getattr(private_ad, name, None))
    # what structured derivatives need beyond that
    ad.linearize = _linearize
    ad.config = types.SimpleNamespace(jax_enable_checks=False)
    ad.reducing_transposes = {}
    ad.get_primitive_transpose = functools.partial(_transpose, private_ad)
    private.Primitive.map_primitive = False


def _transpose(ad, primitive):
    """The transpose of a primitive in the old form, also where JAX now keeps it in another one."""
    if primitive in ad.primitive_transposes:
        return ad.primitive_transposes[primitive]

    def transpose(cotangent, *operands, **params):
        linear = [ad.is_undefined_primal(operand) for operand in operands]

        def apply(*arguments):
            given = iter(arguments)
            return primitive.bind(
                *(next(given) if is_linear else operand for is_linear, operand in zip(linear, operands, strict=True)),
                **params,
            )

        avals = [operand.aval for operand, is_linear in zip(operands, linear, strict=True) if is_linear]
        results = iter(jax.linear_transpose(apply, *avals)(cotangent))
        return [next(results) if is_linear else None for is_linear in linear]

    return transpose


class _Unknown:
    """What partial evaluation said of an output that depends on the differentiated inputs."""

    def is_known(self):
        return False


def _linearize(function, *primals, has_aux=False):
    """The old `ad.linearize`: outputs, which of them are known, the program of the tangents, and its constants."""
    assert not has_aux
    out, tangents = jax.linearize(function.call_wrapped, *primals)
    closed = jax.make_jaxpr(tangents)(*(jax.numpy.zeros_like(p) for p in primals))
    return out, [_Unknown()] * len(out), closed.jaxpr, closed.consts


def _give(module, name, value):
    """Set `module.name` where reading it fails, or warns that it will."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(module, name)
    except (AttributeError, DeprecationWarning):
        setattr(module, name, value)
