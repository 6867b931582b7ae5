"""A network at its real width: its exact tangent kernel, and its signals measured over seeds."""

from initjax.empirical.ntk import empirical_ntk as empirical_ntk
