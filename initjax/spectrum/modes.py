r"""How training moves one eigendirection of the tangent kernel: steps and flow, with momentum and weight decay.

The linearised network moves its parameters within the span of the gradients of the training outputs and, under weight
decay toward zero, along theta_0 itself: theta_t = (1 - gamma_t) theta_0 - J^T alpha_t, so that

    f_t = f_0 - gamma_t rho - Theta alpha_t,    rho = J theta_0,

on training and test points alike (Lee et al. 2019, arXiv:1902.06720, section 2.2, for plain gradient descent). In the
eigenbasis of Theta alpha is linear in the first residual r = f_0 - y and in rho: alpha = A r + B rho, and the residual
is f_t - y = R r + S rho with R = 1 - lambda A and S = -gamma - lambda B. R obeys a recursion of its own, so that
residuals far below rounding of f keep their digits.
"""

from typing import NamedTuple

import numpy as np


class Modes(NamedTuple):
    """Factors at T times for n eigenvalues: R, A (T, n), and S, B (T, n), gamma (T,), which are 0 without decay toward
    zero."""

    R: np.ndarray
    A: np.ndarray
    S: np.ndarray
    B: np.ndarray
    gamma: np.ndarray


def descent(lam, times, *, eta, n, momentum=0.0, nesterov=False, decay=0.0, toward_zero=False) -> Modes:
    """Factors after `times` (integers, ascending) steps of `optax.sgd` on 1/(2 n) sum (f - y)^2 + decay |theta|^2 / 2.

    Each step is a small matrix for each eigenvalue; steps between two times are its power, by repeated squaring.
    """
    one, zero = np.ones_like(lam), np.zeros_like(lam)
    r, v, a = np.eye(3)
    gradient = one[:, None] * (r / n - decay * a)
    velocity = gradient + momentum * v
    step = gradient + momentum * velocity if nesterov else velocity
    matrix = np.stack([r - (eta * lam)[:, None] * step, velocity, a + eta * step], 1)
    R, _, A = _powers(matrix, np.stack([one, zero, zero], -1), times)
    if not toward_zero:
        return Modes(R, A, np.zeros_like(R), np.zeros_like(R), np.zeros(len(times)))
    # S, the velocity and value of B, what is left of theta_0 (1 - gamma), and its velocity
    s, v, b, left, w = np.eye(5)
    gradient, shrink = one[:, None] * (s / n - decay * b), one[:, None] * (decay * left)
    velocity, pull = gradient + momentum * v, shrink + momentum * w
    step = gradient + momentum * velocity if nesterov else velocity
    fall = shrink + momentum * pull if nesterov else pull
    matrix = [s - eta * fall - (eta * lam)[:, None] * step, velocity, b + eta * step, left - eta * fall, pull]
    S, _, B, left, _ = _powers(np.stack(matrix, 1), np.stack([zero, zero, zero, one, zero], -1), times)
    return Modes(R, A, S, B, 1 - left[:, 0])


def _powers(matrix, state, times):
    """matrix^t state at every time, the components first: (d, T, n)."""
    found, last, cached = [], 0, {}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for time in times:
            jump = int(time) - last
            if jump not in cached:
                cached = {jump: np.linalg.matrix_power(matrix, jump)}
            state = (cached[jump] @ state[..., None])[..., 0]
            found.append(state)
            last = int(time)
    return np.moveaxis(np.array(found).reshape(len(times), *state.shape), -1, 0)


def flow(lam, times, *, eta, n, decay=0.0, toward_zero=False) -> Modes:
    """Factors at `times` of gradient flow, in units of steps: d theta / dt = -eta times the gradient."""
    t = np.asarray(times, np.float64)[:, None]
    slope = lam / n
    both = slope + decay

    def integral(rate):
        """(1 - exp(-eta rate t)) / rate."""
        positive = rate > 0
        return np.where(positive, -np.expm1(-eta * rate * t) / np.where(positive, rate, 1.0), eta * t)

    safe = np.where(both > 0, both, 1.0)
    R = np.where(both > 0, (decay + slope * np.exp(-eta * both * t)) / safe, 1.0)
    A = integral(both) / n
    if not toward_zero:
        return Modes(R, A, np.zeros_like(R), np.zeros_like(R), np.zeros(len(t)))
    gamma = -np.expm1(-eta * decay * t)
    B = -(integral(both) - np.exp(-eta * decay * t) * integral(slope)) / n
    return Modes(R, A, -gamma - lam * B, B, gamma[:, 0])
