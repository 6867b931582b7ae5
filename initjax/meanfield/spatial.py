r"""Layers that mix positions: convolution and attention, on the covariance K_ij of the positions of one input.

    convolution   K'(a, b) = sigma_w^2 sum_d v_d K(a + d, b + d) + sigma_b^2
    attention     K' = sigma_v^2 A K A^T,  A = 1/T everywhere while the logits are small

v_d is the share of the weight variance at offset d. With periodic borders a perturbation of K(a, a + s) at spatial
frequency w multiplies by chi lambda_w, lambda_w = sum_d v_d exp(i w d): a uniform kernel forgets all but the spatial
mean, a kernel concentrated at its centre keeps every mode.

Sources: Xiao et al. 2018 (arXiv:1806.05393), section 2; for attention Dong, Cordonnier, Loukas 2021 (arXiv:2103.03404)
and Noci et al. 2022 (arXiv:2206.03126).
"""

import itertools

import numpy as np

from initjax.errors import InputError
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.state import Layer, State, refuse_tracers


def check_fractions(fractions) -> np.ndarray:
    """Shares of the weight variance by offset, float64, summing to 1."""
    refuse_tracers("fractions", fractions)
    v = np.asarray(fractions)
    good = v.dtype.kind in "fiub" and v.ndim and v.size and np.all(np.isfinite(v)) and np.all(v >= 0)
    if not good or abs(float(v.sum()) - 1) > 1e-6 or not all(n % 2 for n in v.shape):
        total = f", sum {v.sum():.6g}" if good else ""
        raise InputError(
            f"fractions of shape {v.shape}{total}.",
            "numbers >= 0 that sum to 1, an odd number of them in every dimension.",
            "they say how the weight variance is spread over the kernel's offsets, the centre being offset 0.",
            "np.full((3, 3), 1/9) for a uniform 3 x 3 kernel; np.outer of one-hot vectors for a delta kernel.",
        )
    return v.astype(np.float64)


def check_positions(positions, dimensions: int) -> tuple[int, ...]:
    """Sizes of the grid of positions."""
    sizes = (positions,) if isinstance(positions, (int, np.integer)) else positions
    good = isinstance(sizes, (tuple, list)) and all(isinstance(p, (int, np.integer)) and p > 0 for p in sizes)
    if not good or len(sizes) != dimensions:
        raise InputError(
            f"positions = {positions!r} with a kernel of {dimensions} dimensions.",
            "one positive integer for every dimension of the kernel.",
            "positions is the size of the image or sequence.",
            "for example positions=(8, 8) with fractions of shape (3, 3).",
        )
    return tuple(int(p) for p in sizes)


def _neighbours(positions, shape, padding):
    """For each offset of the kernel: index of position a + d, and whether it lies inside."""
    grid = np.indices(positions).reshape(len(positions), -1)
    sizes = np.array(positions)[:, None]
    for offset in itertools.product(*(range(-(n // 2), n // 2 + 1) for n in shape)):
        moved = grid + np.array(offset)[:, None]
        inside = np.all((moved >= 0) & (moved < sizes), axis=0) if padding == "zero" else np.ones(grid.shape[1], bool)
        yield np.ravel_multi_index(tuple(moved % sizes), positions), inside


class Convolution(Layer):
    """A convolution with stride 1, on the covariance of positions made by `covariance`.

    Parameters
    ----------
    fractions : (k, ...) shares of the weight variance by offset, sum 1; each k odd. Var W_d = sigma_w^2 v_d / C_in,
        so that uniform fractions are the usual sigma_w^2 / fan_in with fan_in = C_in prod(k).
    sigma_w, sigma_b : standard deviations.
    positions : size of each spatial dimension; the state has shape (prod(positions), prod(positions)).
    padding : "circular", or "zero" (SAME), which loses second moment at the borders in every layer.

    Raises
    ------
    InputError : fractions that do not sum to 1, another state shape, or unknown padding.

    Examples
    --------
    >>> import numpy as np, initjax as ij
    >>> layer = ij.layers.Convolution([1/3, 1/3, 1/3], positions=6, padding="zero")
    >>> print(layer.step(ij.layers.covariance(np.eye(6))).q1[:, 0].round(4))
    [0.6667 1.     1.     1.     1.     0.6667]

    References
    ----------
    Xiao et al. 2018 (arXiv:1806.05393), eqs. 2.4, 2.5.
    """

    has_weights = True

    def __init__(self, fractions, sigma_w=1.0, sigma_b=0.0, *, positions, padding="circular"):
        self.fractions = check_fractions(fractions)
        self.positions = check_positions(positions, self.fractions.ndim)
        self.sigma_w, self.sigma_b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
        if padding not in ("circular", "zero") or self.sigma_w.ndim or self.sigma_b.ndim:
            raise InputError(
                f"padding = {padding!r}, sigma_w = {sigma_w!r}, sigma_b = {sigma_b!r}.",
                'padding "circular" or "zero", and one number for each sigma.',
                "the borders decide which neighbours a position has.",
                'Flax\'s padding="SAME" is "zero" here, padding="CIRCULAR" is "circular".',
            )
        self.padding = padding
        self._near = list(_neighbours(self.positions, self.fractions.shape, padding))

    def _mix(self, matrix):
        out = np.zeros_like(matrix)
        for share, (index, inside) in zip(self.fractions.ravel(), self._near, strict=True):
            out += share * np.where(np.outer(inside, inside), matrix[np.ix_(index, index)], 0.0)
        return self.sigma_w**2 * out

    def step(self, state: State) -> State:
        check_square(state, int(np.prod(self.positions)), "Convolution")
        vb, zero = self.sigma_b**2, np.zeros_like(state.q1)
        diagonal = self._mix(np.asarray(state.k))
        q1 = np.broadcast_to(np.diag(diagonal)[:, None], diagonal.shape) + vb
        follow = self._mix(np.asarray(state.chi_k))
        chi = np.broadcast_to(np.diag(follow)[:, None], follow.shape).copy()
        return state.replace(
            q1=q1, q2=q1.T.copy(), k=diagonal + vb, mean1=zero, mean2=zero, chi=chi, chi_k=follow, gaussian=True
        )

    def __repr__(self) -> str:
        return f"Convolution({self.fractions.shape}, sigma_w={self.sigma_w}, padding={self.padding!r})"


class Attention(Layer):
    """Softmax attention at initialization: with small logits every token becomes the mean of all, times W_V.

    Without a skip connection one layer makes all tokens equal. With one, Residual(Attention(s), alpha, skip) keeps
    q - p, the difference of diagonal and off-diagonal covariance, at skip^2 per layer while p grows: cosines tend to 1.

    Parameters
    ----------
    sigma_v : standard deviation of the value (and output) weights together: Var = sigma_v^2 / fan_in.
    sigma_logit : standard deviation of a logit between two tokens of second moment 1: Cov(l_ij, l_km) = sigma_logit^2
        K_ik K_jm. 0 (default) for queries scaled by 1/d or zero query weights, where the layer is exact when wide.
        Queries and keys of variance 1/fan_in scaled by 1/sqrt(d) have 1.

    Notes
    -----
    For sigma_logit > 0 the mean of the ratio of exponentials is replaced by the ratio of the means, which holds for
    many tokens. Measured with 32 tokens after 10 layers with alpha = 0.5: sigma_logit = 0.3: q 1.268 (simulated
    1.281 +- 0.008), p 0.261 (0.276 +- 0.009); sigma_logit = 1: q 1.462 (1.441 +- 0.010), p 0.283 (0.303 +- 0.010).
    Beyond a logit variance of ln(tokens) softmax picks single tokens, and the step refuses. Small changes (chi) are
    then not followed, nan: they also pass through the logits.

    Raises
    ------
    InputError : when stepped on a state that is not a covariance of tokens, or with logits of variance above
        ln(tokens).

    Examples
    --------
    >>> import numpy as np, initjax as ij
    >>> block = ij.layers.Residual(ij.layers.Attention(1.0), alpha=0.5)
    >>> tokens = ij.layers.covariance(np.eye(32))
    >>> for _ in range(10):
    ...     tokens = block.step(tokens)
    >>> print(f"{tokens.q1[0, 0]:.4f} {tokens.k[0, 1]:.4f}")
    1.2598 0.2598

    References
    ----------
    Dong, Cordonnier, Loukas 2021 (arXiv:2103.03404); Noci et al. 2022 (arXiv:2206.03126), section 3.
    """

    has_weights = True

    def __init__(self, sigma_v=1.0, sigma_logit=0.0):
        refuse_tracers("Attention", sigma_v, sigma_logit)
        self.sigma_v, self.sigma_logit = check_sigma(sigma_v, "sigma_v"), check_sigma(sigma_logit, "sigma_logit")
        if self.sigma_v.ndim or self.sigma_logit.ndim:
            raise InputError(
                f"sigma_v = {sigma_v!r}, sigma_logit = {sigma_logit!r}.",
                "one number each.",
                "one layer has one of each.",
                "loop over the values.",
            )

    def step(self, state: State) -> State:
        check_square(state, None, "Attention")
        zero = np.zeros_like(state.q1)
        if self.sigma_logit > 0:
            k = self.sigma_v**2 * self._mixed(np.asarray(state.k))
            q1, lost = np.broadcast_to(np.diag(k)[:, None], k.shape).copy(), np.full_like(zero, np.nan)
            return state.replace(
                q1=q1, q2=q1.T.copy(), k=k, mean1=zero, mean2=zero, chi=lost, chi_k=lost, gaussian=True
            )
        signal, change = self.sigma_v**2 * np.mean(state.k), self.sigma_v**2 * np.mean(state.chi_k)
        flat = {name: np.full_like(zero, signal) for name in ("q1", "q2", "k")}
        follow = {name: np.full_like(np.asarray(state.chi_k), change) for name in ("chi", "chi_k")}
        return state.replace(**flat, **follow, mean1=zero, mean2=zero, gaussian=True)

    def _mixed(self, k: np.ndarray) -> np.ndarray:
        """E[A K A^T] as a ratio of means over Gaussian logits; a part common to all logits of a row drops out."""
        tokens, vl = len(k), self.sigma_logit**2
        centred = k - k.mean(axis=0) - k.mean(axis=1)[:, None] + k.mean()
        variance = float(vl * np.diag(k).max() * np.diag(centred).max())
        if variance > np.log(tokens):
            raise InputError(
                f"{self!r} has logits of variance {variance:.3g} over {tokens} tokens.",
                f"logits of variance at most ln(tokens) = {np.log(tokens):.3g}.",
                "above it softmax puts its weight on single tokens, and averages over tokens say nothing.",
                "a smaller sigma_logit, more tokens, or a normalization layer in front of the attention.",
            )
        own = np.exp(vl * np.diag(k)[:, None] * np.diag(centred)[None, :] / 2)  # (query, key)
        out = np.empty_like(k)
        for i in range(tokens):
            share = np.exp(vl * k[i][:, None, None] * centred) * own[i][:, None] * own[:, None, :]
            out[i] = np.einsum("ajb,jb->a", share, k) / share.sum(axis=(1, 2))
        return (out + out.T) / 2

    def __repr__(self) -> str:
        return f"Attention(sigma_v={self.sigma_v}, sigma_logit={self.sigma_logit})"


def check_square(state: State, size: int | None, where: str) -> None:
    """Refuse a state that is not the covariance of positions."""
    shape = np.shape(state.q1)
    if state.k is None or len(shape) != 2 or shape[0] != shape[1] or (size is not None and shape[0] != size):
        raise InputError(
            f"{where} got a state of shape {shape}.",
            f"the covariance of {size or 'n'} positions, of shape ({size or 'n'}, {size or 'n'}).",
            "it mixes the positions of one input, so it needs the covariance of every pair.",
            "start from ij.layers.covariance(K); where all positions look alike, ij.layers.Dense has the same fixed "
            "point as a convolution.",
        )


def convolution_modes(fractions, positions) -> np.ndarray:
    """lambda_w = sum_d v_d exp(i w d): what a circular convolution does to each Fourier mode of a covariance.

    A perturbation of K(a, a + s) at frequency w multiplies by chi_1 lambda_w per layer, so its depth scale is
    -1 / ln(chi_1 |lambda_w|).

    Parameters
    ----------
    fractions : (k, ...) shares of the weight variance by offset, sum 1, each k odd.
    positions : size of each spatial dimension.

    Returns
    -------
    complex128 array of shape `positions`, in the order of numpy.fft (frequency 2 pi m / positions at index m).

    Raises
    ------
    InputError : fractions that do not sum to 1; positions that do not match.

    Examples
    --------
    >>> import numpy as np, initjax as ij
    >>> print(ij.layers.convolution_modes([1/3, 1/3, 1/3], 4).real.round(4) + 0.0)
    [ 1.      0.3333 -0.3333  0.3333]

    References
    ----------
    Xiao et al. 2018 (arXiv:1806.05393), section 2.3.
    """
    v = check_fractions(fractions)
    sizes = check_positions(positions, v.ndim)
    out = np.zeros(sizes, complex)
    angles = np.meshgrid(*(2 * np.pi * np.arange(n) / n for n in sizes), indexing="ij")
    offsets = itertools.product(*(range(-(n // 2), n // 2 + 1) for n in v.shape))
    for share, offset in zip(v.ravel(), offsets, strict=True):
        phase = np.zeros(sizes)
        for angle, step in zip(angles, offset, strict=True):
            phase = phase + step * angle
        out += share * np.exp(1j * phase)
    return out


def padding_gain(fractions, positions, depth) -> np.ndarray:
    """Second moment left at each position after `depth` zero-padded (SAME) convolutions that keep it in the interior.

    For networks in which the second moment is proportional to the input's (linear, or relu with sigma_w^2 = 2, without
    biases). Circular and VALID convolutions lose nothing.

    Parameters
    ----------
    fractions : (k, ...) shares of the weight variance by offset, sum 1, each k odd.
    positions : size of each spatial dimension.
    depth : number of layers, an integer >= 0.

    Returns
    -------
    float64 array of shape `positions`; its mean is the loss of the whole image.

    Raises
    ------
    InputError : fractions that do not sum to 1; positions or depth that do not fit.

    Examples
    --------
    >>> import numpy as np, initjax as ij
    >>> left = ij.layers.padding_gain(np.full((3, 3), 1/9), (8, 8), depth=10)
    >>> print(f"{left.mean():.5f}")
    0.35303

    References
    ----------
    Derived from Xiao et al. 2018 (arXiv:1806.05393), eq. 2.4, with the sum over offsets cut at the border.
    """
    v = check_fractions(fractions)
    sizes = check_positions(positions, v.ndim)
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 0:
        raise InputError(
            f"depth = {depth!r}.", "an integer >= 0.", "depth counts layers.", "pass the number of layers."
        )
    near = list(_neighbours(sizes, v.shape, "zero"))
    energy = np.ones(int(np.prod(sizes)))
    for _ in range(depth):
        parts = [s * np.where(inside, energy[index], 0.0) for s, (index, inside) in zip(v.ravel(), near, strict=True)]
        energy = np.sum(parts, axis=0)
    return np.reshape(energy, sizes)
