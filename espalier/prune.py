"""The methods that prune a network, as ``esp.prune.Name(...)``."""

from espalier.methods.dropout import dropout as Dropout
from espalier.methods.filter_l1 import filter_l1 as FilterL1
from espalier.methods.l0 import l0 as L0
from espalier.methods.l1 import l1 as L1
from espalier.methods.lamp import lamp as LAMP
from espalier.methods.layer_scales import layer_scales as LayerScales
from espalier.methods.layer_taylor import layer_taylor as LayerTaylor
from espalier.methods.layers_random import layers_random as LayersRandom
from espalier.methods.magnitude import magnitude as Magnitude
from espalier.methods.movement import movement as Movement
from espalier.methods.npn import npn_pruning as NPN
from espalier.methods.npn_layers import npn_layers as NPNLayers
from espalier.methods.npn_weights import npn_weights as NPNWeights
from espalier.methods.polarization import polarization as Polarization
from espalier.methods.random import random_pruning as Random
from espalier.methods.rotated_svd import rotated_svd as RotatedSVD
from espalier.methods.shortgpt import shortgpt as ShortGPT
from espalier.methods.slimming import slimming as Slimming
from espalier.methods.snip import snip as SNIP
from espalier.methods.synflow import synflow as SynFlow
from espalier.methods.taylor import taylor as Taylor
from espalier.methods.wanda import wanda as Wanda
from espalier.methods.wanda_units import wanda_units as WandaUnits
from espalier.methods.weights_magnitude import weights_magnitude as WeightsMagnitude
from espalier.methods.weights_random import weights_random as WeightsRandom

__all__ = [
    "L0", "L1", "LAMP", "NPN", "SNIP", "Dropout", "FilterL1", "LayerScales", "LayerTaylor", "LayersRandom", "Magnitude",
    "Movement", "NPNLayers", "NPNWeights", "Polarization", "Random", "RotatedSVD", "ShortGPT", "Slimming", "SynFlow",
    "Taylor", "Wanda", "WandaUnits", "WeightsMagnitude", "WeightsRandom",
]  # fmt: skip
