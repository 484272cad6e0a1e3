"""Espalier grows and prunes neural networks while they train."""

from espalier.structure import attach as attach
