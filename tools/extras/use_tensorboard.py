"""Events in TensorBoard."""

from small import log

from espalier.adapters.tensorboard import TensorBoard

log(TensorBoard("logs"))
