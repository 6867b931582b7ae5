"""What is recorded at a product, arranged as matrices: data (n, g, T, I), cotangents (n, o, g, T, J), and gradients
(n, o, g, I, J) back in the shape of the weight."""

import jax
import jax.numpy as jnp
from jax import lax

from initjax.empirical.taps import Use


def data_view(use: Use, a: jax.Array) -> jax.Array:
    """Data of n examples as (n, g, T, I): for convolutions the patch at each position, for look-ups the row indices."""
    n, params = a.shape[0], use.step.eqn.params
    if use.kind == "lookup":
        return a.reshape(n, 1, use.positions, 1)
    if use.kind == "convolution":
        _, _, kernel = use.layout
        patches = _patches(a, params, kernel)
        channels = kernel[params["dimension_numbers"].rhs_spec[1]]
        patches = patches.reshape(n, use.positions, -1, use.groups, channels)
        return patches.transpose(0, 3, 1, 2, 4).reshape(n, use.groups, use.positions, use.inputs)
    contract, batch = params["dimension_numbers"]
    side = use.step.inputs.index(use.operand)
    free = [i for i in range(a.ndim - 1) if i not in (*contract[side], *batch[side])]
    order = (*batch[side], *free, *contract[side])
    return a.transpose(0, *(1 + i for i in order)).reshape(n, use.groups, use.positions, use.inputs)


def cotangent_view(use: Use, g: jax.Array) -> jax.Array:
    """Cotangents of y, (n, o, *y.shape), as (n, o, g, T, J)."""
    n, o, params = *g.shape[:2], use.step.eqn.params
    if use.kind == "lookup":
        return g.reshape(n, o, 1, use.positions, use.units)
    if use.kind == "convolution":
        batch, channel, *space = params["dimension_numbers"].out_spec
        g = g.transpose(0, 1, *(2 + i for i in (batch, *space, channel)))
        g = g.reshape(n, o, use.positions, use.groups, use.units)
        return g.transpose(0, 1, 3, 2, 4)
    if use.step.inputs.index(use.operand) == 1:  # the weight stands on the left, and so do its units in y
        return g.reshape(n, o, use.groups, use.units, use.positions).swapaxes(3, 4)
    return g.reshape(n, o, use.groups, use.positions, use.units)


def weight_view(use: Use, d: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gradients (n, o, g, I, J) in the shape of the weight, (n, o, *shape)."""
    n, o, params = *d.shape[:2], use.step.eqn.params
    if use.kind == "lookup":
        return d.reshape(n, o, *shape)
    if use.kind == "convolution":
        out, channel, *space = params["dimension_numbers"].rhs_spec
        kernel = [shape[i] for i in space][::-1]
        d = d.reshape(n, o, use.groups, *kernel, shape[channel], use.units)
        d = jnp.moveaxis(d, 2, -2).reshape(n, o, *kernel, shape[channel], shape[out])
        return jnp.transpose(d, (0, 1, *(2 + i for i in _inverse((*space[::-1], channel, out)))))
    contract, batch = params["dimension_numbers"]
    side = 1 - use.step.inputs.index(use.operand)
    free = [i for i in range(len(shape)) if i not in (*contract[side], *batch[side])]
    order = (*batch[side], *contract[side], *free)
    d = d.reshape(n, o, *(shape[i] for i in order))
    return d.transpose(0, 1, *(2 + i for i in _inverse(order)))


def _inverse(order):
    return [order.index(i) for i in range(len(order))]


def _patches(a, params, shape):
    """Patches of (n, *lhs) as (n, b, *positions, *reversed kernel, channels), by one slice for each offset and axis."""
    batch, channel, *space = params["dimension_numbers"].lhs_spec
    kernel = [shape[i] for i in params["dimension_numbers"].rhs_spec[2:]]
    x = a.transpose(0, *(1 + i for i in (batch, *space, channel)))
    padding = [(0, 0, 0)] * 2
    padding += [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [*padding, (0, 0, 0)])
    new = 2 + len(kernel)
    for axis, (k, stride, dilation) in enumerate(
        zip(kernel, params["window_strides"], params["rhs_dilation"], strict=True), 2
    ):
        length = (x.shape[axis] - (k - 1) * dilation - 1) // stride + 1
        if k == stride and dilation == 1 and length * k == x.shape[axis]:
            x = jnp.moveaxis(x.reshape(*x.shape[:axis], length, k, *x.shape[axis + 1 :]), axis + 1, new)
            continue
        starts = range(0, k * dilation, dilation)
        parts = [lax.slice_in_dim(x, i, i + (length - 1) * stride + 1, stride, axis) for i in starts]
        x = jnp.stack(parts, axis=new)
    return x
