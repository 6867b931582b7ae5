"""Maps of recurrent cells against closed forms, iteration, and simulated cells with new and with tied weights.

Simulated cells are NumPy with fixed seeds and share no code with the library. Inputs are drawn anew at every step.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import initjax as ij
from initjax import layers
from initjax.layers import GRU, Activation, Dense, Drive, MinimalRNN

TANH = jnp.tanh


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def matrix(rng, n, scale):
    return rng.normal(size=(n, n)) * scale / np.sqrt(n)


def drive(rng, n, variance, c):
    """Inputs of two sequences with correlation c, (n, 2)."""
    x, y = np.sqrt(variance) * rng.normal(size=(2, n))
    return np.stack([x, c * x + np.sqrt(1 - c * c) * y], axis=1)


# -- vanilla -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drive_variance, expected", [(0.01, 1.42421), (0.1, 1.98607), (0.25, 2.40149), (0.5, 2.84317), (1.0, 3.44321)]
)
def test_inputs_suppress_chaos_at_the_printed_recurrent_variances(drive_variance, expected):
    point = layers.critical(lambda w, b: Activation(TANH) >> Dense(w, b) >> Drive(drive_variance))
    assert abs(point.sigma_w**2 - expected) < 5.1e-6  # five decimals printed
    # second route: an input of variance v acts on q as a bias of variance v
    plain = ij.critical(TANH, drive_variance**0.5)
    np.testing.assert_allclose([point.sigma_w, point.q], [plain.sigma_w, plain.q], rtol=1e-9)
    assert point.stable


def test_correlated_inputs_set_the_correlation():
    w, b, r, c_x = 1.0, 0.0, 0.25, 0.5
    block = Activation(TANH) >> Dense(w, b) >> Drive(r, c_x)
    point = layers.fixed_point(block)
    assert abs(point.q - 0.53465) < 5e-6 and abs(point.c - 0.48314) < 5e-6  # printed digits
    q, c = 1.0, 0.0  # second route: iterate the two equations
    for _ in range(200):
        overlap = ij.gaussian.dual(TANH, q, q, c)
        new = w**2 * ij.gaussian.moment(TANH, q) + r
        q, c = new, (w**2 * overlap + r * c_x) / new
    np.testing.assert_allclose([point.q, point.c], [q, c], rtol=1e-10)
    np.testing.assert_allclose(point.chi_1, w**2 * ij.gaussian.moment_prime(TANH, q), rtol=1e-10)


def test_merged_sequences_stay_merged_only_with_a_common_input():
    for correlation, merged in ((1.0, True), (0.99, False)):
        point = layers.fixed_point(Activation(TANH) >> Dense(1.0) >> Drive(0.25, correlation))
        assert (point.c == 1) == merged and point.phase == "ordered"


def test_vanilla_cell_with_tied_weights_follows_the_map():
    n, steps, runs = 1000, 40, 6
    point = layers.fixed_point(Activation(TANH) >> Dense(1.0) >> Drive(0.25, 0.5))
    rows = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        w, x = matrix(rng, n, 1.0), drive(rng, n, 0.25, 0.5)  # one input for all times, as a constant sequence
        h = rng.normal(size=(n, 2))
        for _ in range(steps):
            h = w @ np.tanh(h) + x
        q = np.mean(h * h)
        rows.append([q, np.mean(h[:, 0] * h[:, 1]) / q])
    error = np.std(rows, axis=0, ddof=1) / np.sqrt(runs)
    # 5 standard errors of six draws (99.6 %), and O(1 / n) of finite width
    assert np.all(np.abs(np.mean(rows, axis=0) - [point.q, point.c]) < 5 * error + 2 / n)


def test_one_kernel_on_input_and_state_keeps_the_scale_but_not_the_memory():
    # joint fan-in: recurrent variance rho = d_h / (d_x + d_h), input variance 1 - rho; linear cell, unit inputs
    rho = 192 / (64 + 192)
    block = Activation(lambda x: x) >> Dense(rho**0.5) >> Drive(1 - rho)
    point = layers.fixed_point(block)
    np.testing.assert_allclose([point.q, point.chi_1], [1.0, rho], rtol=1e-11)
    path = layers.propagate(block, 10)
    np.testing.assert_allclose(path.gradient[0], 0.05631, atol=5e-6)  # rho^10, printed digits
    assert point.phase == "ordered"


# -- gated cells -------------------------------------------------------------------------------------------------------


def minimal(rng, n, steps, sigma_w, sigma_u, r, bias, c, tied, kept=10):
    """Mean over the last `kept` steps of (q, c), and the growth per step of the square of a small change there."""
    h, change, rows = np.zeros((n, 2)), np.ones(n), []
    w, v = matrix(rng, n, sigma_w), matrix(rng, n, sigma_u)
    for step in range(steps):
        if not tied:
            w, v = matrix(rng, n, sigma_w), matrix(rng, n, sigma_u)
        if step == steps - kept:
            change = rng.normal(size=n)
            start = np.mean(change**2)
        x = drive(rng, n, r, c)
        u = sigmoid(w @ h + v @ x + bias)
        gate, differ = u[:, 0], (h - x)[:, 0]
        change = gate * change + differ * gate * (1 - gate) * (w @ change)
        h = u * h + (1 - u) * x
        rows.append([np.mean(h * h), np.mean(h[:, 0] * h[:, 1])])
    q, k = np.mean(rows[-kept:], axis=0)
    return q, k / q, (np.mean(change**2) / start) ** (1 / kept)


def gru(rng, n, steps, sigma_w, sigma_u, r, bias, c, tied, kept=10):
    """As `minimal`."""

    def draw():
        return [(matrix(rng, n, sigma_w), matrix(rng, n, sigma_u)) for _ in range(3)]

    h, change, rows, weights = np.zeros((n, 2)), np.ones(n), [], draw()
    for step in range(steps):
        if not tied:
            weights = draw()
        if step == steps - kept:
            change = rng.normal(size=n)
            start = np.mean(change**2)
        (wz, uz), (wr, ur), (wg, ug) = weights
        x = drive(rng, n, r, c)
        z, reset = sigmoid(wz @ h + uz @ x + bias), sigmoid(wr @ h + ur @ x)
        g = np.tanh(wg @ (reset * h) + ug @ x)
        z0, r0, g0, h0 = (a[:, 0] for a in (z, reset, g, h))
        inner = wg @ (r0 * change + h0 * r0 * (1 - r0) * (wr @ change))
        change = z0 * change + (h0 - g0) * z0 * (1 - z0) * (wz @ change) + (1 - z0) * (1 - g0**2) * inner
        h = z * h + (1 - z) * g
        rows.append([np.mean(h * h), np.mean(h[:, 0] * h[:, 1])])
    q, k = np.mean(rows[-kept:], axis=0)
    return q, k / q, (np.mean(change**2) / start) ** (1 / kept)


def lstm(rng, n, steps, sigma_w, sigma_u, r, bias, c, tied, kept=10):
    """Second moments of c and h, correlation of h, kurtosis of c."""

    def draw():
        return [(matrix(rng, n, sigma_w), matrix(rng, n, sigma_u)) for _ in range(4)]

    h, cell, rows, weights = np.zeros((n, 2)), np.zeros((n, 2)), [], draw()
    for _ in range(steps):
        if not tied:
            weights = draw()
        x = drive(rng, n, r, c)
        f, i, o, g = (w @ h + u @ x for w, u in weights)
        cell = sigmoid(f + bias) * cell + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(cell)
        rows.append([np.mean(cell**2), np.mean(h * h), np.mean(h[:, 0] * h[:, 1]), np.mean(cell**4)])
    cells, hidden, k, fourth = np.mean(rows[-kept:], axis=0)
    return cells, hidden, k / hidden, fourth / cells**2


def simulate(cell, n, steps, parameters, tied, runs):
    rows = [cell(np.random.default_rng(seed), n, steps, *parameters, tied) for seed in range(runs)]
    return np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(runs)


PARAMETERS = (2.0, 1.0, 0.5, 1.0, 0.5)  # sigma_w, sigma_u, variance, gate bias, correlation of the inputs


def build(kind, parameters):
    sigma_w, sigma_u, variance, bias, c = parameters
    return kind(sigma_w, sigma_u, variance, c, bias=bias)


def test_minimal_rnn_satisfies_its_equations():
    point = layers.fixed_point(build(MinimalRNN, PARAMETERS))
    sigma_w, sigma_u, r, mu, c = PARAMETERS

    def opened(x):
        return 1 / (1 + jnp.exp(-x - mu))

    pre = sigma_w**2 * point.q + sigma_u**2 * r
    u2, shut2 = ij.gaussian.moment(opened, pre), ij.gaussian.moment(lambda x: 1 - opened(x), pre)
    # Q = R E[(1-u)^2] / (1 - E[u^2]) and chi = E[u^2] + sigma_w^2 (Q + R) E[u'^2]
    np.testing.assert_allclose(point.q, r * shut2 / (1 - u2), rtol=1e-11)
    slope = ij.gaussian.moment_prime(opened, pre)
    np.testing.assert_allclose(point.chi_1, u2 + sigma_w**2 * (point.q + r) * slope, rtol=1e-11)
    np.testing.assert_allclose(layers.fixed_point(build(MinimalRNN, (*PARAMETERS[:4], 1.0))).chi_c, point.chi_1)


def test_gru_satisfies_its_equation_and_small_weights_have_their_limit():
    sigma_w, sigma_u, r, mu, c = PARAMETERS
    point = layers.fixed_point(build(GRU, PARAMETERS))

    def opened(x):
        return 1 / (1 + jnp.exp(-x - mu))

    pre = sigma_w**2 * point.q + sigma_u**2 * r
    inner = sigma_w**2 * ij.gaussian.moment(lambda x: 1 / (1 + jnp.exp(-x)), pre) * point.q + sigma_u**2 * r
    shut2 = ij.gaussian.moment(lambda x: 1 - opened(x), pre)
    right = ij.gaussian.moment(opened, pre) * point.q + shut2 * ij.gaussian.moment(TANH, inner)
    np.testing.assert_allclose(point.q, right, rtol=1e-11)
    # no recurrent weights, weak inputs: h' = (h + g) / 2 with g of variance r: q = r / 4 / (1 - 1/4) = r / 3
    tiny = layers.fixed_point(GRU(0.0, 1.0, 1e-4))
    np.testing.assert_allclose(tiny.q, 1e-4 / 3, rtol=1e-3)  # next order in r
    np.testing.assert_allclose(tiny.chi_1, 0.25, rtol=1e-3)


@pytest.mark.parametrize("kind", [MinimalRNN, GRU])
def test_small_change_factor_of_gated_cells_is_the_slope_in_k(kind):
    cell, h = build(kind, PARAMETERS), 1e-4
    start = layers.state(0.3, 0.4)
    up, down = (cell.step(start.replace(k=start.k + s * h)).k for s in (1, -1))
    np.testing.assert_allclose(cell.step(start).chi_k, (up - down) / (2 * h), rtol=1e-7)  # h^2 of the difference


@pytest.mark.parametrize("kind, cell", [(MinimalRNN, minimal), (GRU, gru)])
def test_gated_cells_with_new_weights_at_every_step_follow_the_map(kind, cell):
    point = layers.fixed_point(build(kind, PARAMETERS))
    mean, error = simulate(cell, 250, 22, PARAMETERS, tied=False, runs=8)
    expected = np.array([point.q, point.c, point.chi_1])
    # 22 steps leave chi_q^22 < 1e-3 of the start; 5 standard errors of eight draws (99.8 %), and O(1/n) of width
    assert np.all(np.abs(mean - expected) < 5 * error + 2 / 250 * np.maximum(expected, 0.1))
    assert np.all(error < 0.06 * expected)  # so that the statement above means something


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, cell, lowest, highest",
    [(MinimalRNN, minimal, (-0.14, 0.0), (-0.02, 0.06)), (GRU, gru, (0.08, 0.08), (0.22, 0.22))],
)
def test_tied_weights_are_off_by_what_the_documentation_says(kind, cell, lowest, highest):
    # sigma_w = 2: minimalRNN q -8 %, chi +2 %; GRU q +14 %, chi +15 %, and no less at twice the width
    point = layers.fixed_point(build(kind, PARAMETERS))
    for n, runs in ((250, 12), (500, 8)):
        mean, error = simulate(cell, n, 30, PARAMETERS, tied=True, runs=runs)
        off = mean[[0, 2]] / [point.q, point.chi_1] - 1
        assert np.all(off > np.array(lowest) - 2 * error[[0, 2]]), off
        assert np.all(off < np.array(highest) + 2 * error[[0, 2]]), off


def test_long_memory_comes_with_the_gate_bias():
    chis = [layers.fixed_point(MinimalRNN(1.0, 1.0, 0.5, bias=mu)).chi_1 for mu in (0.0, 2.0, 6.0)]
    assert chis[0] < chis[1] < chis[2] < 1
    # u -> 1: 1 - E[u^2] -> 2 E[1 - u] = 2 e^{-mu + var / 2}, and E[u'^2] is of second order
    point = layers.fixed_point(MinimalRNN(0.0, 1.0, 0.5, bias=8.0))
    np.testing.assert_allclose(1 - point.chi_1, 2 * np.exp(-8 + 0.25), rtol=0.01)


def test_lstm_map_without_recurrent_weights_is_closed_form():
    # gates at 1/2 (no drive reaches them at variance 0 but the candidate needs it): use weak inputs
    point = layers.lstm(0.0, 1.0, 1e-6, forget_bias=2.0)
    f = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(point.forget, f**2, rtol=1e-5)
    np.testing.assert_allclose(point.cell, 1e-6 / 4 / (1 - f**2), rtol=1e-4)  # next order in the variance
    np.testing.assert_allclose(point.hidden, point.cell / 4, rtol=1e-4)
    np.testing.assert_allclose(point.memory, -1 / np.log(f**2), rtol=1e-5)
    assert point.cell_c == point.hidden_c == 1


@pytest.mark.slow
def test_lstm_with_new_weights_at_every_step_follows_the_map_although_its_cell_is_not_gaussian():
    sigma_w, sigma_u, r, bias, c = parameters = (1.0, 1.0, 1.0, 1.0, 0.5)
    point = layers.lstm(sigma_w, sigma_u, r, c, forget_bias=bias)
    mean, error = simulate(lstm, 250, 22, parameters, tied=False, runs=8)
    expected = np.array([point.cell, point.hidden, point.hidden_c])
    # 5 standard errors of eight draws; 2 % for the non-Gaussian cell in E[tanh(c)^2], O(1/n) of width
    assert np.all(np.abs(mean[:3] - expected) < 5 * error[:3] + 0.02 * expected)
    assert np.all(error[:2] < 0.04 * expected[:2])
    assert abs(mean[3] - 3) < 0.5  # kurtosis of the cell: near, not at, the Gaussian 3


@pytest.mark.slow
def test_lstm_with_tied_weights_and_long_memory_is_far_from_the_map():
    # stated in the documentation: at sigma_w = 2, forget_bias = 3 the cell's second moment is an order larger
    sigma_w, sigma_u, r, bias, c = parameters = (2.0, 1.0, 0.5, 3.0, 0.5)
    point = layers.lstm(sigma_w, sigma_u, r, c, forget_bias=bias)
    new, _ = simulate(lstm, 250, 50, parameters, tied=False, runs=3)
    tied, _ = simulate(lstm, 250, 60, parameters, tied=True, runs=3)
    np.testing.assert_allclose(new[0], point.cell, rtol=0.15)  # three draws of 250 units, correlated over 8 steps
    assert tied[0] > 5 * point.cell


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Drive(-1.0), "variance"),
        (lambda: Drive(1.0, 1.5), "c = 1.5"),
        (lambda: MinimalRNN(1.0, 1.0, 1.0, bias=np.nan), "finite real number"),
        (lambda: GRU(-1.0, 1.0, 1.0), "standard deviation"),
        (lambda: GRU(1.0, 1.0, 1.0).step(layers.state(1.0).replace(q2=2.0)), "equal second moments"),
        (lambda: layers.lstm(1.0, 1.0, 1.0, forget_bias=9.0, steps=5), "still move"),
    ],
)
def test_refusals_say_what_to_do(make, reason):
    with pytest.raises(ij.InputError, match=reason):
        make()
