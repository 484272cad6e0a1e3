"""Pooling, resampling, padding, folding: operators over the trailing spatial dimensions."""

from __future__ import annotations

from espalier.graph.rules.registry import Dims, Reading, Result, Term, refs_in, rule, size
from espalier.graph.solver import is_plain, product
from espalier.graph.trace import Call, Ref


def _names() -> list[str]:
    names = []
    for rank in (2, 3):
        names += [f"max_pool{rank}d_with_indices", f"avg_pool{rank}d", f"_adaptive_avg_pool{rank}d"]
        names += [f"adaptive_max_pool{rank}d", f"grid_sampler_{rank}d", f"fractional_max_pool{rank}d"]
    for rank in (1, 2, 3):
        names += [f"reflection_pad{rank}d", f"replication_pad{rank}d"]
        names += [f"upsample_nearest{rank}d", f"_upsample_nearest_exact{rank}d"]
    names += ["upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"]
    return [*names, "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]


@rule(*_names())
def spatial(reading: Reading, call: Call) -> Result:
    """Pooling, resampling and padding of the trailing spatial dimensions: batch and channels pass through."""
    rank = int(next(letter for letter in call.name if letter.isdigit()))
    dims = reading.of(call.args[0])
    freeze_spatial(reading, call, dims[-rank:])
    for other in refs_in(call.args[1:]):
        freeze_spatial(reading, call, reading.of(other))
    return [None if out is None else (*dims[:-rank], *reading.shape(out)[-rank:]) for out in call.outputs]


@rule("max_unpool2d", "max_unpool3d")
def unpool(reading: Reading, call: Call) -> Result:
    """Every value at the spatial position that a pooling of the same channels remembers."""
    rank = int(call.name[-2])
    dims, places = (reading.of(ref) for ref in call.args[:2])
    freeze_spatial(reading, call, (*dims[-rank:], *places[-rank:]))
    for term, place in zip(dims[:-rank], places[:-rank], strict=True):
        reading.unify(term, place, call)
    return (*dims[:-rank], *_shape(reading, call)[-rank:])


def freeze_spatial(reading: Reading, call: Call, dims: Dims) -> None:
    """Spatial sizes are not axes: a parameter's dimension among them may not change."""
    for term in dims:
        if not is_plain(term):
            reading.freeze(term, "size", "it is a spatial size", call)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(reading: Reading, call: Call) -> Result:
    """Channels C x r x r become spatial, or the other way round."""
    dims, factor, shape = reading.of(call.args[0]), call.args[1], _shape(reading, call)
    freeze_spatial(reading, call, dims[-2:])
    channels: Term
    if call.name.endswith("pixel_shuffle"):
        channels, places = reading.split(dims[-3], shape[-3], factor * factor, call)
        reading.freeze(places, "size", "its units become places of the image", call)
    else:
        channels = product(dims[-3], factor * factor)
    return (*dims[:-3], channels, *shape[-2:])


@rule("channel_shuffle")
def channel_shuffle(reading: Reading, call: Call) -> Result:
    """Channels seen as groups x channels of a group, and these exchanged."""
    dims, groups = reading.of(call.args[0]), call.args[1]
    group, within = reading.split(dims[1], groups, size(dims[1]) // groups, call)
    reading.expect(call, "groups", group)
    return (dims[0], product(within, group), *dims[2:])


@rule("im2col")
def unfold(reading: Reading, call: Call) -> Result:
    """Patches side by side: (..., C, height, width) becomes (..., C x kernel positions, patches)."""
    dims, (height, width) = reading.of(call.args[0]), call.args[1]
    freeze_spatial(reading, call, dims[-2:])
    return (*dims[:-3], product(dims[-3], height * width), _shape(reading, call)[-1])


@rule("col2im")
def fold(reading: Reading, call: Call) -> Result:
    """Patches summed where they overlap: (..., C x kernel positions, patches) becomes (..., C, height, width)."""
    dims, (height, width), shape = reading.of(call.args[0]), call.args[2], _shape(reading, call)
    freeze_spatial(reading, call, dims[-1:])
    channels, places = reading.split(dims[-2], shape[-3], height * width, call)
    reading.freeze(places, "size", "its units become places of the image", call)
    return (*dims[:-2], channels, *shape[-2:])


def _shape(reading: Reading, call: Call) -> tuple[int, ...]:
    out = call.outputs[0]
    assert isinstance(out, Ref)
    return reading.shape(out)
