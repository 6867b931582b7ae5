"""Real images for the demonstration and the command line: scikit-learn's bundled handwritten digits."""

from typing import NamedTuple

import numpy as np

from initjax.errors import InputError

TEST_FRACTION = 0.2
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Handwritten digits, 8 x 8 pixels, ten classes.

    Attributes
    ----------
    x_train, x_test : float32 arrays of shape `(n, 64)`, each row with mean square 1.
    y_train, y_test : int32 arrays of shape `(n,)`, the classes 0 to 9.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def unit_second_moment(x) -> np.ndarray:
    """Scale each example so that the mean square of its entries is 1, i.e. |x|^2 / d = 1.

    Parameters
    ----------
    x : array of shape `(n, ...)`; every example needs at least one non-zero entry.

    Returns
    -------
    Array of the same shape and dtype.

    Raises
    ------
    InputError : an example is all zeros, or holds nan or inf.

    Examples
    --------
    >>> import numpy as np
    >>> unit_second_moment(np.array([[3.0, 4.0]])).round(4).tolist()
    [[0.8485, 1.1314]]
    """
    x = np.asarray(x)
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=tuple(range(1, x.ndim)), keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(mean_square) & (mean_square > 0)))
    if bad.size:
        raise InputError(
            given=f"an input batch whose example {bad[0]} has mean square {mean_square.reshape(-1)[bad[0]]}.",
            accepted="finite examples with at least one non-zero entry.",
            why="the signal theory starts at q = |x|^2 / d, and an example of mean square 0, nan or inf has no scale.",
            remedy="drop or repair that example first.",
        )
    return (x / np.sqrt(mean_square)).astype(x.dtype)


def load() -> Digits:
    """Load the digits, split them with a fixed seed, and scale each image to |x|^2 / d = 1.

    Returns
    -------
    Digits : 1438 training and 359 test images.

    Raises
    ------
    InputError : scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            given="a request for the handwritten digits, but scikit-learn is not installed.",
            accepted="an environment with scikit-learn, which carries the images.",
            why="the images are real data that initjax does not ship itself.",
            remedy="pip install 'initjax[data]'",
        ) from None
    images, labels = load_digits(return_X_y=True)
    images, labels = unit_second_moment(np.asarray(images, np.float32)), np.asarray(labels, np.int32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    n_test = int(TEST_FRACTION * len(images))
    test, train = order[:n_test], order[n_test:]
    return Digits(images[train], labels[train], images[test], labels[test])
