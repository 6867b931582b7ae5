"""Layer maps: write the map of a block, get its fixed points, chi and critical line.

`Activation(phi) >> Dense(sigma_w, sigma_b)` is a plain network. `propagate`, `fixed_point` and `critical` answer for
any composition of the layers here, or of your own (subclass `Layer`).

A block begins and ends at Gaussian pre-activations. In the language of one block:
    dropout          Activation(phi) >> Dropout(keep) >> Dense(w, b)
    residual         Residual(Activation(phi) >> Dense(w, b), alpha)
    pre-norm         Residual(LayerNorm() >> Activation(phi) >> Dense(w, b))
    post-norm        Residual(Activation(phi) >> Dense(w, b)) >> LayerNorm()
    batch norm       BatchNorm() >> Activation(phi) >> Dense(w, b)
    recurrent        Activation(phi) >> Dense(w, b) >> Drive(variance, correlation)
    convolution      Activation(phi) >> Convolution(fractions, w, b, positions=n), on a `covariance` of positions
    transformer      Residual(Attention(v)) >> Residual(Activation(phi) >> Dense(w)), on a `covariance` of tokens
"""

from initjax.meanfield.blocks import fixed_point as fixed_point
from initjax.meanfield.blocks import propagate as propagate
from initjax.meanfield.edge import critical as critical
from initjax.meanfield.elementary import Activation as Activation
from initjax.meanfield.elementary import BatchNorm as BatchNorm
from initjax.meanfield.elementary import Dense as Dense
from initjax.meanfield.elementary import Dropout as Dropout
from initjax.meanfield.elementary import LayerNorm as LayerNorm
from initjax.meanfield.elementary import Residual as Residual
from initjax.meanfield.elementary import RMSNorm as RMSNorm
from initjax.meanfield.recurrent import GRU as GRU
from initjax.meanfield.recurrent import Drive as Drive
from initjax.meanfield.recurrent import LSTMPoint as LSTMPoint
from initjax.meanfield.recurrent import MinimalRNN as MinimalRNN
from initjax.meanfield.recurrent import lstm as lstm
from initjax.meanfield.spatial import Attention as Attention
from initjax.meanfield.spatial import Convolution as Convolution
from initjax.meanfield.spatial import convolution_modes as convolution_modes
from initjax.meanfield.spatial import padding_gain as padding_gain
from initjax.meanfield.state import Chain as Chain
from initjax.meanfield.state import Layer as Layer
from initjax.meanfield.state import State as State
from initjax.meanfield.state import covariance as covariance
from initjax.meanfield.state import state as state
