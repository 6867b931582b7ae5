"""Training of linear models, whose tangent kernel never moves: predictions must be exact."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import initjax as ij

RNG = np.random.default_rng(0)
N, M, P = 6, 3, 20
J, J_TEST, THETA = RNG.normal(size=(N, P)), RNG.normal(size=(M, P)), RNG.normal(size=P)
Y, F0, F0_TEST = RNG.normal(size=N), RNG.normal(size=N), RNG.normal(size=M)
NTK = J @ J.T
RATE = 0.3 * float(ij.max_learning_rate(NTK, n=N))
TIMES = [0, 1, 2, 7, 40]


def trained_by_optax(optimizer, anchor):
    """Outputs on training and test inputs at TIMES of f = f0 + J (theta - theta_0), decayed toward `anchor`."""

    def loss(theta):
        return 0.5 * jnp.mean((F0 + J @ (theta - THETA) - Y) ** 2)

    def step(carry, _):
        theta, state = carry
        updates, state = optimizer.update(jax.grad(loss)(theta), state, theta - anchor)
        return (optax.apply_updates(theta, updates), state), theta

    start = jnp.asarray(THETA)
    _, path = jax.lax.scan(step, (start, optimizer.init(start)), None, length=TIMES[-1] + 1)
    moved = np.asarray(path)[TIMES] - THETA
    return F0 + moved @ J.T, F0_TEST + moved @ J_TEST.T


@pytest.mark.parametrize("momentum", [{}, dict(momentum=0.7), dict(momentum=0.7, nesterov=True)])
@pytest.mark.parametrize("decay", [{}, dict(weight_decay=0.5), dict(weight_decay=0.5, decay_toward="zero")])
def test_every_setting_matches_a_scan_of_optax(momentum, decay):
    optimizer = optax.chain(
        optax.add_decayed_weights(decay.get("weight_decay", 0.0)), optax.sgd(RATE, **({"momentum": None} | momentum))
    )
    toward_zero = "decay_toward" in decay
    train, test = trained_by_optax(optimizer, 0.0 if toward_zero else THETA)
    radial = dict(radial=J @ THETA, radial_test=J_TEST @ THETA) if toward_zero else {}
    run = ij.trajectory(
        NTK, Y, TIMES, learning_rate=RATE, f0=F0, n=N, ntk_test_train=J_TEST @ J.T, f0_test=F0_TEST,
        **momentum, **decay, **radial,
    )  # fmt: skip
    # forty steps in float64
    np.testing.assert_allclose(run.train, train, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.test, test, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.loss, ((train - Y) ** 2).mean(1) / 2, rtol=1e-11)


@pytest.mark.parametrize("decay", [{}, dict(weight_decay=0.5), dict(weight_decay=0.5, decay_toward="zero")])
def test_flow_matches_an_integrated_differential_equation(decay):
    integrate = pytest.importorskip("scipy.integrate")
    anchor = 0.0 if "decay_toward" in decay else THETA

    def slope(_, theta):
        return -RATE * (J.T @ (F0 + J @ (theta - THETA) - Y) / N + decay.get("weight_decay", 0.0) * (theta - anchor))

    path = integrate.solve_ivp(slope, (0, 40), THETA, t_eval=TIMES, rtol=1e-11, atol=1e-12).y.T - THETA
    radial = dict(radial=J @ THETA, radial_test=J_TEST @ THETA) if "decay_toward" in decay else {}
    run = ij.trajectory(
        NTK, Y, TIMES, learning_rate=RATE, f0=F0, n=N, dynamics="flow", ntk_test_train=J_TEST @ J.T, f0_test=F0_TEST,
        **decay, **radial,
    )  # fmt: skip
    # the integrator's tolerance, times the condition of forty units of time
    np.testing.assert_allclose(run.train, F0 + path @ J.T, rtol=0, atol=1e-8)
    np.testing.assert_allclose(run.test, F0_TEST + path @ J_TEST.T, rtol=0, atol=1e-8)


def test_closed_form_on_a_diagonal_kernel_far_below_rounding():
    lam = np.array([0.1, 1.0, 4.0])
    limit = float(ij.max_learning_rate(np.diag(lam), n=3))
    run = ij.trajectory(np.diag(lam), np.zeros(3), [10, 2000], f0=np.ones(3), learning_rate=0.99 * limit, n=3)
    expected = (1 - 0.99 * limit * lam / 3) ** np.array([[10], [2000]])
    # t eps for t steps; 0.98^2000 = 3e-18 keeps its digits
    np.testing.assert_allclose(run.train, expected, rtol=2000 * 4e-16)
    assert abs(run.train[1, 2]) < 1e-17
    flow = ij.trajectory(np.diag(lam), np.zeros(3), [0.5, 30.0], f0=np.ones(3), learning_rate=1.0, dynamics="flow")
    np.testing.assert_allclose(flow.train, np.exp(-np.outer([0.5, 30.0], lam)), rtol=1e-13)
    with pytest.warns(UserWarning, match="above the largest stable one, 1.5: the outputs grow"):
        above = ij.trajectory(np.diag(lam), np.zeros(3), [2000], f0=np.ones(3), learning_rate=1.01 * limit, n=3)
    np.testing.assert_allclose(above.train[0, 2], 1.02**2000, rtol=2000 * 4e-16)  # 1.6e17


def test_several_outputs_share_one_kernel_or_have_all_pairs():
    y = RNG.normal(size=(N, 2))
    alike = ij.trajectory(NTK, y, TIMES, learning_rate=RATE, n=N, ntk_test_train=J_TEST @ J.T)
    assert alike.train.shape == (5, N, 2) and alike.test.shape == (5, M, 2)
    one = ij.trajectory(NTK, y[:, 1], TIMES, learning_rate=RATE, n=N)
    np.testing.assert_allclose(alike.train[..., 1], one.train, rtol=0, atol=1e-13)
    pairs = np.einsum("nm,op->nmop", NTK, np.eye(2))
    cross = np.einsum("nm,op->nmop", J_TEST @ J.T, np.eye(2))
    for ntk in (pairs, pairs.transpose(0, 2, 1, 3).reshape(2 * N, 2 * N)):
        full = ij.trajectory(ntk, y, TIMES, learning_rate=RATE, n=N, ntk_test_train=cross)
        np.testing.assert_allclose(full.train, alike.train, rtol=0, atol=1e-12)
        np.testing.assert_allclose(full.test, alike.test, rtol=0, atol=1e-12)
        np.testing.assert_allclose(full.loss, alike.loss, rtol=1e-11)


@pytest.mark.parametrize("settings", [{}, dict(momentum=0.7), dict(weight_decay=0.2), dict(dynamics="flow")])
def test_ensemble_mean_and_variance_over_initializations(settings):
    # f = J theta with theta ~ N(0, 1): its NNGP kernel is its tangent kernel
    run = ij.trajectory(
        NTK, Y, TIMES, learning_rate=RATE, n=N, ntk_test_train=J_TEST @ J.T,
        nngp=NTK, nngp_test_train=J_TEST @ J.T, nngp_test=J_TEST @ J_TEST.T, **settings,
    )  # fmt: skip
    thetas = np.random.default_rng(1).normal(size=(400, P))
    runs = [
        ij.trajectory(
            NTK,
            Y,
            TIMES,
            learning_rate=RATE,
            n=N,
            ntk_test_train=J_TEST @ J.T,
            f0=J @ t,
            f0_test=J_TEST @ t,
            **settings,
        )
        for t in thetas
    ]
    for mean, variance, draws in (
        (run.train, run.train_variance, np.stack([one.train for one in runs])),
        (run.test, run.test_variance, np.stack([one.test for one in runs])),
    ):
        # five standard errors of 400 draws
        assert np.all(np.abs(draws.mean(0) - mean) <= 5 * np.sqrt(variance / 400) + 1e-12)
        np.testing.assert_allclose(draws.var(0, ddof=1), variance, rtol=5 * np.sqrt(2 / 399), atol=1e-12)
    losses = np.stack([one.loss for one in runs])
    assert np.all(np.abs(losses.mean(0) - run.loss) < 5 * losses.std(0) / 20)
    np.testing.assert_allclose(run.train_variance[0], np.diagonal(NTK), rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_noise_matches_the_enumeration_of_all_batches(batch):
    j, y, steps = J[:2], Y[:2], 3
    ntk = j @ j.T
    choices = list(itertools.product(itertools.product(range(2), repeat=batch), repeat=steps))
    finals = []
    for batches in choices:
        residual = F0[:2] - y
        for some in batches:
            gradient = sum(ntk[:, i] * residual[i] for i in some) / batch
            residual = residual - RATE * gradient
        finals.append(residual)
    finals = np.array(finals)
    run = ij.trajectory(ntk, y, [0, steps], learning_rate=RATE, f0=F0[:2], n=2, batch_size=batch)
    np.testing.assert_allclose(run.train[1], y + finals.mean(0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(run.train_variance[1], finals.var(0), rtol=1e-11)
    np.testing.assert_allclose(run.loss[1], (finals**2).sum(1).mean() / 4, rtol=1e-11)
    assert np.all(run.train_variance[0] < 1e-14)


def test_time_to_fit_is_the_first_step_that_does():
    steps = ij.time_to_fit(NTK, Y, learning_rate=RATE, n=N, f0=F0, tolerance=0.05)
    run = ij.trajectory(NTK, Y, [0, steps - 1, steps], learning_rate=RATE, n=N, f0=F0)
    left = np.sqrt(run.loss / run.loss[0])
    assert left[2] <= 0.05 < left[1]
    flow = ij.time_to_fit(np.diag([2.0, 2.0]), np.ones(2), learning_rate=0.1, tolerance=0.01, dynamics="flow")
    np.testing.assert_allclose(flow, np.log(100) / 0.2, rtol=1e-12)
    assert ij.time_to_fit(np.eye(2), np.ones(2), learning_rate=1.0) == 1.0
    assert ij.time_to_fit(NTK, F0, f0=F0, learning_rate=RATE) == 0.0
    assert ij.time_to_fit(np.eye(2), np.ones(2), learning_rate=2.1) == np.inf
    singular = np.outer([1.0, 1.0], [1.0, 1.0])
    assert ij.time_to_fit(singular, np.array([1.0, -1.0]), learning_rate=0.1) == np.inf
    assert ij.time_to_fit(singular, np.array([1.0, 1.0]), learning_rate=0.1) < 100


def test_training_converges_to_kernel_regression_and_the_posterior_is_gaussian():
    stats = pytest.importorskip("scipy.stats")
    cross, own = J_TEST @ J.T, J_TEST @ J_TEST.T
    fit = ij.kernel_regression(NTK, Y, cross, own)
    run = ij.trajectory(NTK, Y, [10**6], learning_rate=RATE, n=N, ntk_test_train=cross)
    # a million steps leave exp(-1e6 ...) of the slowest direction
    np.testing.assert_allclose(run.test[0], fit.test, rtol=1e-9)
    np.testing.assert_allclose(fit.test, cross @ np.linalg.solve(NTK, Y), rtol=1e-11)
    noisy = ij.kernel_regression(NTK, Y, cross, np.diagonal(own), jitter=0.3)
    ridge = NTK + 0.3 * np.eye(N)
    np.testing.assert_allclose(noisy.train, NTK @ np.linalg.solve(ridge, Y), rtol=1e-11)
    covariance = own - cross @ np.linalg.solve(ridge, cross.T)
    np.testing.assert_allclose(noisy.variance, np.diagonal(covariance), rtol=1e-11)
    np.testing.assert_allclose(noisy.log_evidence, stats.multivariate_normal(np.zeros(N), ridge).logpdf(Y), rtol=1e-11)
    both = ij.kernel_regression(NTK, np.stack([Y, -Y], 1), cross, jitter=0.3)
    np.testing.assert_allclose(both.test[:, 1], -noisy.test, rtol=1e-12)
    np.testing.assert_allclose(both.log_evidence, 2 * noisy.log_evidence, rtol=1e-12)


def test_jitter_is_chosen_from_the_spectrum():
    assert ij.kernel_regression(NTK, Y).jitter == 0
    low = J[:, :4] @ J[:, :4].T  # rank 4 of 6
    fit = ij.kernel_regression(low, Y)
    np.testing.assert_allclose(fit.jitter, N * 2.3e-16 * np.linalg.eigvalsh(low)[-1], rtol=0.05)
    inside = low @ RNG.normal(size=N)
    np.testing.assert_allclose(ij.kernel_regression(low, inside).train, inside, rtol=1e-6)
    exact = ij.kernel_regression(low, Y, jitter=0.0)
    assert exact.dropped == 2 and exact.log_evidence == -np.inf and fit.dropped == 0
    np.testing.assert_allclose(exact.coefficients, np.linalg.pinv(low, rcond=1e-10, hermitian=True) @ Y, rtol=1e-8)
    single = ij.kernel_regression(low.astype(np.float32), Y)
    assert single.jitter > 1e8 * fit.jitter


def test_alignment_is_the_cosine_with_the_targets():
    y = np.array([1.0, 1.0, -1.0, -1.0])
    np.testing.assert_allclose(ij.kernel_alignment(np.outer(y, y), y), 1, rtol=1e-14)
    np.testing.assert_allclose(ij.kernel_alignment(np.eye(4), y), 1 / np.sqrt(3), rtol=1e-13)  # centered: rank 3
    np.testing.assert_allclose(ij.kernel_alignment(np.eye(4), y, centered=False), 0.5, rtol=1e-14)
    classes = np.repeat(np.eye(2), 2, 0)
    np.testing.assert_allclose(ij.kernel_alignment(np.outer(y, y) + 7, classes), 1, rtol=1e-13)
    assert ij.kernel_alignment(np.outer(y, y) + 7, classes, centered=False) < 0.999


def test_an_operator_is_formed_and_a_large_one_refused():
    class Products:
        dtype = np.dtype(np.float64)

        def __init__(self, matrix):
            self.matrix, self.shape = matrix, matrix.shape

        def __matmul__(self, v):
            return self.matrix @ v

    run = ij.trajectory(Products(NTK), Y, TIMES, learning_rate=RATE, n=N)
    np.testing.assert_allclose(
        run.train, ij.trajectory(NTK, Y, TIMES, learning_rate=RATE, n=N).train, rtol=0, atol=1e-13
    )
    large = Products(np.broadcast_to(0.0, (5000, 5000)))
    with pytest.raises(ij.InputError, match=r"5000 rows[\s\S]*4096"):
        ij.trajectory(large, np.ones(5000), [1], learning_rate=0.1)


def test_trajectory_draws_itself():
    pytest.importorskip("matplotlib")
    ax = ij.trajectory(NTK, Y, np.arange(20), learning_rate=RATE, n=N).plot()
    assert ax.get_ylabel() == "training loss" and len(ax.get_lines()[0].get_xdata()) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rate=0), r"learning_rate=0[\s\S]*max_learning_rate"),
        (dict(learning_rate=np.nan), r"learning_rate=nan"),
        (dict(times=[0.5]), r"whole numbers[\s\S]*flow"),
        (dict(times=[3, 1]), r"ascending"),
        (dict(times=[-1]), r">= 0"),
        (dict(y=np.ones(4)), r"ntk of shape \(6, 6\)[\s\S]*\(4, 4\)"),
        (dict(y=np.full(6, np.nan)), r"6 entries that are NaN"),
        (dict(f0=np.ones(5)), r"f0 of shape \(5,\)"),
        (dict(ntk=np.ones((6, 5))), r"ntk of shape \(6, 5\)"),
        (dict(ntk=-NTK), r"negative eigenvalue"),
        (dict(dynamics="adam"), r"dynamics='adam'[\s\S]*'flow'"),
        (dict(dynamics="flow", momentum=0.9), r"momentum=0.9 with dynamics[\s\S]*learning_rate / 0.1"),
        (dict(momentum=1.5), r"momentum=1.5"),
        (dict(weight_decay=0.1, decay_toward="zero"), r"radial[\s\S]*jvp"),
        (dict(decay_toward="mean"), r"decay_toward='mean'"),
        (dict(nngp=NTK, weight_decay=0.1, decay_toward="zero", radial=Y), r"nngp with decay_toward"),
        (dict(nngp=np.eye(3)), r"nngp of shape \(3, 3\)"),
        (dict(nngp=NTK, ntk_test_train=J_TEST @ J.T), r"nngp_test_train and nngp_test"),
        (dict(ntk_test_train=np.ones((3, 4))), r"ntk_test_train of shape \(3, 4\)[\s\S]*\(m, 6\)"),
        (dict(batch_size=2), r"batch_size=2[\s\S]*mean loss"),
        (dict(batch_size=2, n=N, momentum=0.5), r"momentum=0.5[\s\S]*exact mean over batches"),
        (dict(batch_size=0, n=N), r"batch_size=0"),
        (dict(times=[10**6], learning_rate=100.0), r"overflow by step"),
    ],
)
@pytest.mark.filterwarnings("ignore:learning_rate")
def test_bad_requests_get_four_part_errors(change, message):
    given = dict(ntk=NTK, y=Y, times=[0, 1], learning_rate=RATE) | change
    with pytest.raises(ij.InputError, match=message) as error:
        ij.trajectory(given.pop("ntk"), given.pop("y"), given.pop("times"), **given)
    assert all(error.value.parts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ij.time_to_fit(NTK, Y, learning_rate=RATE, tolerance=1.0), r"tolerance=1.0[\s\S]*\(0, 1\)"),
        (lambda: ij.kernel_regression(NTK, Y, jitter=-1), r"jitter=-1"),
        (lambda: ij.kernel_regression(NTK, Y, np.ones((2, 5))), r"kernel_test_train of shape \(2, 5\)"),
        (lambda: ij.kernel_regression(NTK, Y, J_TEST @ J.T, np.ones(2)), r"kernel_test of shape \(2,\)"),
        (lambda: ij.kernel_regression(NTK, Y[:3]), r"kernel of shape \(6, 6\)"),
        (lambda: ij.kernel_alignment(NTK, np.ones(6)), r"targets of norm[\s\S]*vary over examples"),
        (lambda: ij.kernel_alignment(np.zeros((6, 6)), Y, centered=False), r"not zero"),
        (lambda: jax.jit(lambda k: ij.trajectory(k, Y, [1], learning_rate=0.1).loss)(NTK), r"traced[\s\S]*outside jit"),
    ],
)
def test_bad_regressions_get_four_part_errors(call, message):
    with pytest.raises(ij.InputError, match=message) as error:
        call()
    assert all(error.value.parts)
