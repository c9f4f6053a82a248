"""All operations, by name: one line for each."""

from .adapter_adamw import OP as ADAPTER_ADAMW
from .attention import OP as ATTENTION
from .dora import OP as DORA
from .dora_norm import OP as DORA_NORM
from .dropout import OP as DROPOUT
from .glu import OP as GLU
from .layer_norm import OP as LAYER_NORM
from .linear_cross_entropy import OP as LINEAR_CROSS_ENTROPY
from .lora_grads import OP as LORA_GRADS
from .lora_linear import OP as LORA_LINEAR
from .multi_lora import OP as MULTI_LORA
from .nf4_dequant import OP as NF4_DEQUANT
from .nf4_quantize import OP as NF4_QUANTIZE
from .op import Op
from .rms_norm import OP as RMS_NORM
from .rope import OP as ROPE

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        ADAPTER_ADAMW,
        ATTENTION,
        DORA,
        DORA_NORM,
        DROPOUT,
        GLU,
        LAYER_NORM,
        LINEAR_CROSS_ENTROPY,
        LORA_GRADS,
        LORA_LINEAR,
        MULTI_LORA,
        NF4_DEQUANT,
        NF4_QUANTIZE,
        RMS_NORM,
        ROPE,
    )
}
