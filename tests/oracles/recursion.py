"""NNGP and NTK of plain fully connected networks by the textbook recursion, in NumPy alone.

Lee et al. 2018 (arXiv:1711.00165) eq. 5; Jacot et al. 2018 (arXiv:1806.07572) eq. 11; arc-cosine kernels of Cho, Saul
2009. Smooth activations use a tensor rule of its own: composite Gauss-Legendre in two independent standard normals.
"""

import math

import numpy as np


def normal_rule(reach=9.0, panels=36, order=14):
    """Nodes and weights for E over z ~ N(0, 1), with a panel edge at 0."""
    x, w = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(-reach, reach, panels + 1)
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + edges[1:, None]) / 2 + half * x
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return z.ravel(), (half * w * density).ravel()


_Z, _W = normal_rule()


def dual_smooth(f, q1, q2, k):
    """E[f(u) f(v)] for a smooth f: u along one axis, v from u and an independent second one."""
    rho = min(1.0, max(-1.0, k / math.sqrt(q1 * q2)))
    u = math.sqrt(q1) * _Z
    v = math.sqrt(q2) * (rho * _Z[:, None] + math.sqrt((1 - rho) * (1 + rho)) * _Z[None, :])
    return float(_W @ (f(u)[:, None] * f(v)) @ _W)


def dual_ramp(a, b):
    """E[f(u) f(v)] for f(x) = a x for x > 0, b x else."""

    def dual(q1, q2, k):
        norm = math.sqrt(q1 * q2)
        rho = min(1.0, max(-1.0, k / norm))
        angle = math.acos(rho) if rho < 1 - 1e-15 else 0.0
        positive = norm * (math.sin(angle) + (math.pi - angle) * rho) / (2 * math.pi)  # E[relu(u) relu(v)]
        # f = b x + (a - b) relu(x), and E[u relu(v)] = k / 2
        return b * b * k + (a - b) * b * k + (a - b) ** 2 * positive

    return dual


def dual_step(a, b):
    """E[f(u) f(v)] for f(x) = a for x > 0, b else."""

    def dual(q1, q2, k):
        rho = min(1.0, max(-1.0, k / math.sqrt(q1 * q2)))
        angle = math.acos(rho) if rho < 1 - 1e-15 else 0.0
        both = (math.pi - angle) / (2 * math.pi)
        return b * b + (a - b) * b + (a - b) ** 2 * both

    return dual


def smooth(f):
    return lambda q1, q2, k: dual_smooth(f, q1, q2, k)


_erf = np.vectorize(math.erf, otypes=[float])


def _density(x):
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _cdf(x):
    return 0.5 * (1 + _erf(x / math.sqrt(2)))


# name -> (dual of phi, dual of phi')
ACTIVATIONS = {
    "relu": (dual_ramp(1.0, 0.0), dual_step(1.0, 0.0)),
    "leaky_relu": (dual_ramp(1.0, 0.01), dual_step(1.0, 0.01)),
    "abs": (dual_ramp(1.0, -1.0), dual_step(1.0, -1.0)),
    "erf": (smooth(_erf), smooth(lambda x: 2 / math.sqrt(math.pi) * np.exp(-(x**2)))),
    "gelu": (smooth(lambda x: x * _cdf(x)), smooth(lambda x: _cdf(x) + x * _density(x))),
    "tanh": (smooth(np.tanh), smooth(lambda x: 1 / np.cosh(x) ** 2)),
}


def on_matrix(dual, cov, q1, q2):
    out = np.empty(cov.shape)
    for i in range(cov.shape[0]):
        for j in range(cov.shape[1]):
            out[i, j] = dual(q1[i], q2[j], cov[i, j])
    return out


def mlp(x1, x2, activation, variances, biases, widths):
    """Kernels of a fully connected network.

    Parameters
    ----------
    x1, x2 : inputs (n, d).
    activation : name in ACTIVATIONS.
    variances, biases : per layer, variance of one weight and of one bias entry (the last layer is the readout).
    widths : of the hidden layers.

    Returns
    -------
    nngp (n1, n2); dict of Theta per leaf, ("kernel", l) and ("bias", l); list of pre-activation covariances; the
    chi's, sigma_w^2 E[phi'^2] for x1.
    """
    phi, prime = ACTIVATIONS[activation]
    fans = [x1.shape[1], *widths]
    features = {"12": x1 @ x2.T, "11": np.sum(x1**2, 1), "22": np.sum(x2**2, 1)}
    covs, thetas, chis = [], {}, []
    for layer, (fan, var_w, var_b) in enumerate(zip(fans, variances, biases, strict=True)):
        if layer:
            previous, own1, own2 = covs[-1]
            dot = on_matrix(prime, previous, own1, own2)
            diagonal = np.array([prime(q, q, q) for q in own1])
            thetas = {leaf: var_w * fan * dot * theta for leaf, theta in thetas.items()}
            chis.append(var_w * fan * diagonal)
            features = {
                "12": fan * on_matrix(phi, previous, own1, own2),
                "11": fan * np.array([phi(q, q, q) for q in own1]),
                "22": fan * np.array([phi(q, q, q) for q in own2]),
            }
        thetas[("kernel", layer)] = features["12"].copy()
        thetas[("bias", layer)] = np.ones_like(features["12"])
        covs.append(tuple(var_w * features[s] + var_b for s in ("12", "11", "22")))
    return covs[-1][0], thetas, covs, chis


def conv_covariance(cov, window, stride, padding):
    """Covariance of a convolution's patches, per unit weight variance and channel, position by position.

    cov : (n, h, w, n, h, w). Sums cov over the taps of a square window; `padding` is "SAME" or "CIRCULAR" (odd window).
    """
    n, h, w = cov.shape[:3]
    high, wide = -(-h // stride), -(-w // stride)
    total_h = max((high - 1) * stride + window - h, 0) if padding == "SAME" else window - 1
    total_w = max((wide - 1) * stride + window - w, 0) if padding == "SAME" else window - 1
    top, left = total_h // 2, total_w // 2
    out = np.zeros((n, high, wide, n, high, wide))

    def source(i, j, a, b):
        y, x = i * stride + a - top, j * stride + b - left
        if padding == "CIRCULAR":
            return y % h, x % w
        return (y, x) if 0 <= y < h and 0 <= x < w else None

    for i, j, k, m in np.ndindex(high, wide, high, wide):
        for a, b in np.ndindex(window, window):
            one, two = source(i, j, a, b), source(k, m, a, b)
            if one is not None and two is not None:
                out[:, i, j, :, k, m] += cov[:, one[0], one[1], :, two[0], two[1]]
    return out


def through_activation(activation, cov):
    """(E[phi phi], E[phi' phi']) of a covariance over examples and positions."""
    shape, count = cov.shape, int(np.prod(cov.shape[: cov.ndim // 2]))
    flat = cov.reshape(count, count)
    return tuple(on_matrix(d, flat, np.diag(flat), np.diag(flat)).reshape(shape) for d in ACTIVATIONS[activation])


def cnn(x, activation, width, variances, bias, strides, padding, readout):
    """NNGP and summed NTK of conv layers (window 3) and a Dense readout after flatten ("flat") or a mean ("mean").

    variances : of one weight entry, for each conv layer and for the readout; bias : variance of the conv biases.
    """
    features = np.einsum("aijc,bklc->aijbkl", x, x)
    theta = np.zeros_like(features)
    for layer, (var, stride) in enumerate(zip(variances[:-1], strides, strict=True)):
        fan = width if layer else 1
        patches = fan * conv_covariance(features, 3, stride, padding)
        cov = var * patches + bias
        through = var * fan * conv_covariance(theta, 3, stride, padding)
        value, slope = through_activation(activation, cov)
        features, theta = value, slope * (patches + 1 + through)
    n, h, w = features.shape[:3]
    if readout == "flat":
        pick = lambda m: np.einsum("aijbij->ab", m)  # noqa: E731
    else:
        pick = lambda m: np.einsum("aijbkl->ab", m) / (h * w) ** 2  # noqa: E731
    nngp = variances[-1] * width * pick(features)
    return nngp, width * pick(features) + 1 + variances[-1] * width * pick(theta)


def concatenated(x, groups, variance, eps, normed):
    """NNGP and NTK of relu/tanh layers side by side, normed over groups of channels if asked, then a Dense readout.

    x : inputs (n, d); every layer is a Dense without random bias, of this weight variance times d, with a bias tangent.
    groups : for each group of channels that is normed together, its parts (channels, activation).
    normed : whether mean and variance of each group are taken out; the norm then has a scale and a bias of its own.
    """
    gram = x @ x.T
    cov = variance * gram
    q = np.diag(cov)
    channels = sum(width for group in groups for width, _ in group)
    nngp, slope = np.zeros_like(cov), np.zeros_like(cov)
    for group in groups:
        count = sum(width for width, _ in group)
        duals = [[on_matrix(d, cov, q, q) for d in ACTIVATIONS[name]] for _, name in group]
        value = sum(w * d[0] for (w, _), d in zip(group, duals, strict=True)) / count
        prime = sum(w * d[1] for (w, _), d in zip(group, duals, strict=True)) / count
        mean = sum(w * np.sqrt(q / (2 * np.pi)) for w, name in group if name == "relu") / count  # tanh is odd
        mean = mean * np.ones_like(q) * normed
        scale = 1 / np.sqrt(np.diag(value) - mean**2 + eps) if normed else np.ones_like(q)
        nngp += count / channels * (value - np.outer(mean, mean)) * np.outer(scale, scale)
        slope += count / channels * prime * np.outer(scale, scale)
    return nngp, channels * nngp + 1 + slope * (gram + 1) + normed * (nngp + 1)
