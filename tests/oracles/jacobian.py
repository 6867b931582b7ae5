"""Tangent kernels by definition: the Gram matrix of one dense Jacobian of the whole batch."""

import jax
import numpy as np


def gram(apply, params, x1, x2=None, keep=lambda name: True):
    """All pairs of outputs, (n1, n2, k, k), for outputs of any tree structure; float64 sums over kept parameters."""
    rows1 = _rows(apply, params, x1, keep)
    rows2 = rows1 if x2 is None else _rows(apply, params, x2, keep)
    return sum(np.einsum("nop,mqp->nmoq", a, b) for a, b in zip(rows1, rows2, strict=True))


def _rows(apply, params, x, keep):
    def flat(p):
        return [out.reshape(out.shape[0], -1) for out in jax.tree.leaves(apply(p, x))]

    jacobians = jax.jit(jax.jacrev(flat))(params)
    rows = []
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in _paths(params)]
    for i, name in enumerate(names):
        if keep(name):
            parts = [np.asarray(jax.tree.leaves(j)[i], np.float64) for j in jacobians]
            rows.append(np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=1))
    return rows


def _paths(params):
    return jax.tree_util.tree_flatten_with_path(params)[0]
