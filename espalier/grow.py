"""The methods that grow a network, as ``esp.grow.Name(...)``."""

from espalier.methods.autogrow import autogrow as AutoGrow
from espalier.methods.copy_blocks import copy_blocks as CopyBlocks
from espalier.methods.firefly import firefly as Firefly
from espalier.methods.firefly_deeper import firefly_deeper as FireflyDeeper
from espalier.methods.gradmax import gradmax as GradMax
from espalier.methods.gradmax_opt import gradmax_opt as GradMaxOpt
from espalier.methods.naive_zero_in import naive_zero_in as NaiveZeroIn
from espalier.methods.net2deeper import net2deeper as Net2Deeper
from espalier.methods.net2net import net2net as Net2Net
from espalier.methods.north import north as North
from espalier.methods.npn import npn_growing as NPN
from espalier.methods.random import random_growing as Random
from espalier.methods.rigl import rigl as RigL
from espalier.methods.sensli import sensli as SensLI
from espalier.methods.set import sparse_evolution as SET
from espalier.methods.splitting import splitting as Splitting
from espalier.methods.tiny import tiny as Tiny
from espalier.methods.variance_transfer import variance_transfer as VarianceTransfer
from espalier.methods.wider_or_deeper import wider_or_deeper as WiderOrDeeper

__all__ = [
    "NPN",
    "SET",
    "AutoGrow",
    "CopyBlocks",
    "Firefly",
    "FireflyDeeper",
    "GradMax",
    "GradMaxOpt",
    "NaiveZeroIn",
    "Net2Deeper",
    "Net2Net",
    "North",
    "Random",
    "RigL",
    "SensLI",
    "Splitting",
    "Tiny",
    "VarianceTransfer",
    "WiderOrDeeper",
]
