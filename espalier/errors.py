"""The errors that Espalier raises: one base class, one subclass per kind of cause.

Every message names the thing, what was expected, what was found and how to fix it. Each class takes just a message.
"""


class EspalierError(Exception):
    """Base of every error that Espalier raises on purpose."""


class CaptureError(EspalierError):
    """The model could not be captured: its forward failed, or the example inputs do not fit it."""


class PlanError(EspalierError):
    """A plan asks for what cannot be done: unknown names, units out of range or repeated, frozen axes."""


class SurgeryError(EspalierError):
    """Verification or commit of an edit failed; model and optimizer were rolled back to what they were before."""


class CheckpointError(EspalierError):
    """A saved network is damaged, of another version or for another model; nothing was changed."""


class DataError(EspalierError):
    """A data set, or the network or task named for it, is unknown, missing, damaged or not of the documented form."""


class OptimizerError(EspalierError):
    """The optimizer does not fit the model, or its state cannot follow an edit."""


class RunError(EspalierError):
    """A run of the command line cannot start or go on: its options, its folder or its device do not fit."""


class MethodError(EspalierError):
    """A method, its schedule or its budget does not fit the network, or its scores are no numbers."""


class ShrinkError(EspalierError):
    """A network cannot be shrunk or expanded as asked for, or the user's own functions failed on the way."""

    reached: object = None
    """The `espalier.Shrunk` that was reached before one of the user's functions failed."""


class ExportError(EspalierError):
    """A network cannot be handed on in the form that is asked for, or what was written does not compute the same."""


class ParallelError(EspalierError):
    """The processes of one training do not mean the same edit, or their wrapper cannot follow one."""


class EspalierWarning(UserWarning):
    """Training goes on, but something that was asked for was not done; the message says what and why."""
