"""Rules for `ij.plan`, `ij.reinitialize` and `ij.labels`: actions, and ready sets each of one paper.

Actions: `keep`, `scale(c)`, `constant(v)`, any initializer, or a function `fn(key, info)` of a `ParamInfo`.

Ready sets, ordered lists to which rules of your own may be put in front (`[("head", zeros), *ij.rules.he()]`):
    true fans             he, xavier, lecun_fixed, torch_default
    residual branches     zero_gamma, rezero, fixup, gpt2             need model= and inputs=
    transformers          deepnorm, t_fixup
    widths                mup, with the learning rates mup_rates
    periodic, recurrent   siren (needs model= and inputs=), lstm
"""

from initjax.reinit.branchsets import fixup as fixup
from initjax.reinit.branchsets import gpt2 as gpt2
from initjax.reinit.branchsets import rezero as rezero
from initjax.reinit.branchsets import zero_gamma as zero_gamma
from initjax.reinit.cells import deepnorm as deepnorm
from initjax.reinit.cells import lstm as lstm
from initjax.reinit.cells import siren as siren
from initjax.reinit.cells import t_fixup as t_fixup
from initjax.reinit.info import ParamInfo as ParamInfo
from initjax.reinit.rule import Action as Action
from initjax.reinit.rule import Rule as Rule
from initjax.reinit.rule import Rules as Rules
from initjax.reinit.rule import constant as constant
from initjax.reinit.rule import keep as keep
from initjax.reinit.rule import scale as scale
from initjax.reinit.sets import he as he
from initjax.reinit.sets import lecun_fixed as lecun_fixed
from initjax.reinit.sets import torch_default as torch_default
from initjax.reinit.sets import xavier as xavier
from initjax.reinit.width import mup as mup
from initjax.reinit.width import mup_rates as mup_rates
