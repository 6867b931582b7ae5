"""The zoo in linen and in nnx: twins of equal variances have equal kernels; both are refused for one reason."""

import numpy as np
import pytest
import zoo_nnx
from test_infinite import IMAGES, SEQUENCE, TOKENS, X

import initjax as ij
from initjax.errors import UnsupportedLayerError

INPUTS = {"vectors": X, "images": IMAGES, "sequences": SEQUENCE, "tokens": TOKENS}


@pytest.mark.parametrize("name", zoo_nnx.TWINS)
def test_twins_have_equal_kernels(name):
    model, factory, inputs = zoo_nnx.TWINS[name]
    x = INPUTS[inputs]
    linen, twin = (ij.kernel_fn(m, x)(x) for m in (model, lambda rngs: factory(rngs=rngs)))
    np.testing.assert_allclose(twin.nngp, linen.nngp, rtol=1e-12)  # the same sums, up to their order
    np.testing.assert_allclose(twin.ntk, linen.ntk, rtol=1e-12)
    assert linen.exact and np.all(np.linalg.eigvalsh(linen.ntk) > 0)


@pytest.mark.parametrize("factory", zoo_nnx.REFUSED)
def test_nnx_twins_are_refused_by_name(factory):
    inputs, words = zoo_nnx.REFUSED[factory]
    with pytest.raises(UnsupportedLayerError, match=words) as caught:
        ij.kernel_fn(lambda rngs: factory(rngs=rngs), INPUTS[inputs])
    error = caught.value
    assert error.layer and error.primitive and all(error.parts)
