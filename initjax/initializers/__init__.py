"""Initializers `init(key, shape, dtype, out_sharding)`: JAX's own, unchanged, and those for an activation, a depth, a
width, a part of the network.

Ours take bfloat16 and complex weights, are frozen values (two of the same settings are equal), validated when built,
and say what is missing where a factory is given in the place of an initializer. JAX's `orthogonal` and
`delta_orthogonal` are replaced by ours of the same name.
"""

from jax.nn.initializers import Initializer as Initializer
from jax.nn.initializers import constant as constant
from jax.nn.initializers import glorot_normal as glorot_normal
from jax.nn.initializers import glorot_uniform as glorot_uniform
from jax.nn.initializers import he_normal as he_normal
from jax.nn.initializers import he_uniform as he_uniform
from jax.nn.initializers import kaiming_normal as kaiming_normal
from jax.nn.initializers import kaiming_uniform as kaiming_uniform
from jax.nn.initializers import lecun_normal as lecun_normal
from jax.nn.initializers import lecun_uniform as lecun_uniform
from jax.nn.initializers import normal as normal
from jax.nn.initializers import ones as ones
from jax.nn.initializers import truncated_normal as truncated_normal
from jax.nn.initializers import uniform as uniform
from jax.nn.initializers import variance_scaling as variance_scaling
from jax.nn.initializers import xavier_normal as xavier_normal
from jax.nn.initializers import xavier_uniform as xavier_uniform
from jax.nn.initializers import zeros as zeros

from initjax.gaussian import gain as gain
from initjax.initializers.depth import DeepNormScales as DeepNormScales
from initjax.initializers.depth import deepnorm as deepnorm
from initjax.initializers.depth import deepnorm_scales as deepnorm_scales
from initjax.initializers.depth import fixup as fixup
from initjax.initializers.depth import gpt2 as gpt2
from initjax.initializers.depth import t_fixup as t_fixup
from initjax.initializers.depth import t_fixup_gain as t_fixup_gain
from initjax.initializers.heads import Head as Head
from initjax.initializers.heads import center_bias as center_bias
from initjax.initializers.heads import log_prior_bias as log_prior_bias
from initjax.initializers.heads import multitask_heads as multitask_heads
from initjax.initializers.heads import optimistic_head as optimistic_head
from initjax.initializers.heads import transfer_head as transfer_head
from initjax.initializers.orthogonal import delta_orthogonal as delta_orthogonal
from initjax.initializers.orthogonal import orthogonal as orthogonal
from initjax.initializers.orthogonal import scaled_orthogonal as scaled_orthogonal
from initjax.initializers.recurrent import combined_fan as combined_fan
from initjax.initializers.recurrent import forget_gate_bias as forget_gate_bias
from initjax.initializers.scaled import FanAvg as FanAvg
from initjax.initializers.scaled import FanIn as FanIn
from initjax.initializers.scaled import exact_truncated_normal as exact_truncated_normal
from initjax.initializers.scaled import symmetric_uniform as symmetric_uniform
from initjax.initializers.scaled import torch_default as torch_default
from initjax.initializers.scaled import torch_default_bias as torch_default_bias
from initjax.initializers.structured import dirac as dirac
from initjax.initializers.structured import identity as identity
from initjax.initializers.structured import looks_linear as looks_linear
from initjax.initializers.structured import mirrored as mirrored
from initjax.initializers.structured import sparse as sparse
from initjax.initializers.tuned import critical as critical
from initjax.initializers.tuned import critical_bias as critical_bias
from initjax.initializers.tuned import variance_preserving as variance_preserving
from initjax.initializers.width import mup as mup
from initjax.initializers.width import siren as siren
from initjax.initializers.width import spectral_mup as spectral_mup
