"""Activation shaping: DKS and TAT make deep networks trainable without norms or shortcuts, by four numbers a layer."""

from initjax.shaping.api import dks as dks
from initjax.shaping.api import tat as tat
from initjax.shaping.shaped import Conditions as Conditions
from initjax.shaping.shaped import ShapedActivation as ShapedActivation
from initjax.shaping.shaped import per_location_normalization as per_location_normalization
from initjax.shaping.subnetworks import SubnetworkMaximum as SubnetworkMaximum
from initjax.shaping.subnetworks import subnetwork_maximum as subnetwork_maximum

__all__ = [
    "Conditions",
    "ShapedActivation",
    "SubnetworkMaximum",
    "dks",
    "per_location_normalization",
    "subnetwork_maximum",
    "tat",
]
