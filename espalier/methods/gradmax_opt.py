"""GradMax-Opt: new units are trained to have a large gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.steepest import AsFound, Steepest

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def gradmax_opt(steps: int = 10, lr: float = 1e-2, pairs: bool | None = False, **options: Unpack[Growing]) -> Method:
    """Add units whose incoming weights, random at first, were optimised for the gradient by their outgoing weights.

    Adam climbs |dL/d outgoing| with outgoing weights of zero (the variant that is best in the paper, and the one that
    works with every activation and norm); after each step all rows are as long as old ones again. Nothing is
    differentiated twice, and batch norms keep their statistics.

    Args:
        steps: of Adam, two passes each (default 10; the paper takes 100).
        lr: of Adam (default 1e-2, the paper's 1e-3 times the factor by which there are fewer steps).
        pairs: whether units come in pairs that cancel, as in `gradmax`; None: on axes with a norm; default False.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    return growing(
        "gradmax-opt",
        Steepest("out", pairs, rounds=steps, climb=lr),
        init=AsFound(),
        paper="Evci et al. 2022, GradMax, section 3 and appendix (arXiv:2201.05125)",
        description="adds units optimised by Adam for the gradient that their outgoing weights get",
        **options,
    )
