"""Where in the author's model an equation stands, and the error that refuses it."""

import re

from initjax.errors import UnsupportedLayerError
from initjax.trace.inline import Equation

_WRAPPER = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint|rematted_computation)\(([^()]*)\)")
_FOREIGN = {"jvp", "vmap", "while", "body", "cond", "scan", "closed_call", ""}


def scope_of(equation: Equation) -> str:
    """The author's module path: `MLP/Dense_0` from the name stack `jvp(MLP)/Dense_0`."""
    text = equation.scope
    while (stripped := _WRAPPER.sub(r"\1", text)) != text:
        text = stripped
    # jnp.einsum names its steps by the subscripts, such as `bqhd,bkhd->bhqk`
    return "/".join(part for part in text.split("/") if part not in _FOREIGN and "->" not in part)


def refusal(equation: Equation, near: str, reason: str, remedy: str, what: str = "") -> UnsupportedLayerError:
    """The four-part error for an equation that the exact theory does not cover.

    near : the last layer the operand went through; names the place where modules leave no scope (nnx).
    """
    scope = scope_of(equation)
    layer = scope or (f"after {near}" if near else "the input")
    place = f"in {layer}" if scope or not near else layer
    place += f" (after {near})" if scope and near and near not in scope else ""
    return UnsupportedLayerError(
        f"{what or equation.name} {place} (primitive `{equation.name}`)",
        "layers that the exact infinite-width theory covers: Dense, Conv, Embed, biases, elementwise functions of one "
        "pre-activation, gates of independent branches, sums of branches, norms, reshapes, average pooling, scans",
        reason,
        remedy,
        layer=layer,
        primitive=equation.name,
    )
