"""What a prediction of training may be asked for: shapes, options, rates, each refused in four parts."""

import warnings

import numpy as np

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced

DYNAMICS = ("descent", "flow")


def as_times(times, dynamics):
    """Times as an ascending array, whole for descent."""
    if dynamics not in DYNAMICS:
        raise InputError(
            f"dynamics={dynamics!r}",
            " or ".join(repr(known) for known in DYNAMICS),
            "training is a sequence of steps, or their limit of small rates",
            'leave dynamics out for "descent"',
        )
    found = np.atleast_1d(finite(times, "times"))
    whole = dynamics == "flow" or np.all(found == np.round(found))
    if found.ndim != 1 or np.any(found < 0) or np.any(np.diff(found) < 0) or not whole or np.any(found > 2.0**62):
        raise InputError(
            f"times={times!r}",
            "a list of times >= 0 in ascending order, whole numbers of steps for descent",
            "the curve is followed from one time to the next",
            'give np.arange(100), or dynamics="flow" for times in between',
        )
    return found if dynamics == "flow" else found.astype(np.int64)


def check_options(dynamics, momentum, weight_decay, decay_toward, radial, radial_test, ntk_test_train):
    """Refuse options that do not go together."""
    if decay_toward not in ("init", "zero"):
        raise InputError(
            f"decay_toward={decay_toward!r}",
            '"init" or "zero"',
            "weight decay pulls the parameters to where they started, or to zero",
            'leave it out for "init"',
        )
    if dynamics == "flow" and momentum:
        raise InputError(
            f'momentum={momentum} with dynamics="flow"',
            'momentum with dynamics="descent"',
            "at small rates heavy ball is gradient flow with the rate learning_rate / (1 - momentum)",
            f"give learning_rate / {1 - momentum:g} and no momentum",
        )
    zero = weight_decay > 0 and decay_toward == "zero"
    if zero and (radial is None or (ntk_test_train is not None and radial_test is None)):
        raise InputError(
            'decay_toward="zero" without the derivative of the outputs along the parameters',
            "radial (and radial_test for test inputs), in the shape of the outputs",
            "shrinking all parameters moves the outputs along J theta_0, which no kernel tells",
            "radial = jax.jvp(lambda p: f(p, x), (params,), (params,))[1]",
        )


def check_ensemble(nngp, nngp_test_train, nngp_test, ntk_test_train, weight_decay, decay_toward, ntk):
    """Refuse ensembles whose covariances are not all known."""
    if nngp is None:
        return
    if weight_decay > 0 and decay_toward == "zero":
        raise InputError(
            'nngp with decay_toward="zero"',
            'nngp with decay_toward="init", or without weight decay',
            "J theta_0 is random over initializations too, and its covariance with f_0 is not in these kernels",
            'use decay_toward="init"',
        )
    if np.ndim(ntk) == 4:
        raise InputError(
            f"nngp with an ntk of shape {np.shape(ntk)}",
            "an ntk of shape (n, n)",
            "an ensemble over initializations is stated at infinite width, where outputs are independent and alike",
            "give kernel_fn(x).ntk",
        )
    if ntk_test_train is not None and (nngp_test_train is None or nngp_test is None):
        raise InputError(
            "nngp and ntk_test_train without nngp_test_train and nngp_test",
            "all three covariances of the first outputs",
            "the variance on test inputs needs theirs, and that with the training inputs",
            "kernel_fn(x_test, x).nngp and kernel_fn(x_test).nngp",
        )


def warn_unstable(lam, eta, count, momentum, nesterov, weight_decay):
    """Warn of a learning rate at which the outputs grow."""
    curvature = lam[-1] / count + weight_decay
    factor = (1 + momentum) / (1 + 2 * momentum) if nesterov else 1 + momentum
    if eta * curvature > 2 * factor * (1 + 1e-12):
        warnings.warn(
            f"learning_rate {eta:.4g} is above the largest stable one, {2 * factor / curvature:.4g}: the outputs grow",
            stacklevel=3,
        )


def refuse_overflow(modes, times, eta):
    """Raise where a factor is no longer a number."""
    for time, row in zip(times, zip(*modes[:4], strict=True), strict=True):
        if not all(np.all(np.isfinite(part)) for part in row):
            raise overflow(time, eta, "learning_rate below ij.max_learning_rate(ntk, n)")


def overflow(time, eta, remedy):
    """The error for outputs that overflow."""
    return InputError(
        f"learning_rate={eta:.4g}, with which the outputs overflow by step {int(time)}",
        "a rate and times at which the outputs are finite numbers",
        "above the stable rate they grow exponentially",
        remedy,
    )


def refuse_traced(*values):
    """Raise for tracers."""
    if is_traced(*values):
        raise InputError(
            "traced kernels, targets or times",
            "concrete arrays",
            "the kernel is decomposed in float64 on the host",
            "call this outside jit, grad and vmap",
        )


def finite(values, name):
    """`values` in float64; refuses what is no number or not finite."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise bad_shape(name, type(values).__name__, "an array of real numbers") from None
    if not np.all(np.isfinite(found)):
        raise InputError(
            f"{name} with {np.count_nonzero(~np.isfinite(found))} entries that are NaN or infinite",
            "finite numbers",
            "one of them would spread over the whole curve",
            "clean the data",
        )
    return found


def positive(value, name):
    """A positive finite float."""
    if not (isinstance(value, int | float | np.number) or np.ndim(value) == 0) or not 0 < float(value) < np.inf:
        raise InputError(
            f"{name}={value!r}",
            "a positive finite number",
            "steps are learning_rate / n times the gradient of the sum",
            "for example learning_rate=0.5 * ij.max_learning_rate(ntk, n), n=len(y)",
        )
    return float(value)


def like(values, shape_of, name):
    """`values`, a number or of the shape of targets, as (n, k)."""
    found = finite(values, name)
    if found.ndim == 0:
        return np.full(shape_of.shape, float(found))
    flat = found.reshape(len(found), -1) if found.ndim in (1, 2) else found
    if flat.shape != shape_of.shape:
        raise bad_shape(name, found.shape, f"a number or {shape_of.shape} ({shape_of.shape[:1]} for one output)")
    return flat


def square(kernel, n, name):
    """`kernel` of shape (n, n)."""
    found = finite(kernel, name)
    if found.shape != (n, n):
        raise bad_shape(name, found.shape, f"({n}, {n})")
    return found


def cross_kernel(kernel, examples, k, paired):
    """Kernel between test and training inputs as a matrix."""
    found = finite(kernel, "ntk_test_train")
    if paired and found.ndim == 4 and found.shape[1:] == (examples, k, k):
        return found.transpose(0, 2, 1, 3).reshape(-1, examples * k)
    if not paired and found.ndim == 2 and found.shape[1] == examples:
        return found
    expected = f"(m, {examples}, {k}, {k})" if paired else f"(m, {examples})"
    raise bad_shape("ntk_test_train", found.shape, expected)


def bad_shape(name, shape, accepted):
    """The error for arrays that do not fit."""
    return InputError(
        f"{name} of shape {shape}" if isinstance(shape, tuple) else f"{name} of type {shape}",
        str(accepted),
        "kernels, targets and outputs belong to the same examples",
        "kernel_fn(x).ntk with y of shape (len(x),) or (len(x), outputs)",
    )
