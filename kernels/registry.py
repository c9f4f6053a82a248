"""All operations, by name: one line for each."""

from .dropout import OP as DROPOUT
from .op import Op

OPS: dict[str, Op] = {op.name: op for op in (DROPOUT,)}
