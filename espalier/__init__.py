"""Espalier grows and prunes neural networks while they train."""

from espalier.structure import attach as attach
from espalier.train.checkpoint import load as load
from espalier.train.checkpoint import save as save
