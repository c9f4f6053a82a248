"""Linear layers in NF4 or int8 and embeddings in NF4, one at a time: a dense matrix lives until its codes are made.

Which layers, and by which modules of bitsandbytes they are replaced, is transformers' decision; the codes are those of
bitsandbytes bit for bit. A quantised weight is a few tensors, its *parts*, that can be kept in a file:

    nf4   codes uint8 [ceil(NK/2), 1], absmax uint8 or (without double quantisation) fp32 [blocks],
          and with double quantisation absmax2 fp32 [ceil(blocks/256)], offset fp32 []
    int8  codes int8 [N, K], absmax fp32 [N]

Shape letters: N outputs, K inputs.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ..kernels.nf4_dequant import Nf4Weight, nf4_dequant
from ..kernels.nf4_quantize import BLOCKSIZE2, dynamic_map, nf4_quantize
from .allocator import trim_heap
from .loading import Keep, Parts, Shapes, in_memory

BLOCKSIZE = 64
TRIM_BYTES = 32 << 20
"""Buffers of many sizes leave holes in the heap: a quarter of a gigabyte for 1.5 billion weights, if they stay."""


@dataclass(frozen=True)
class Quantizing:
    """The quantised modules, still without weights, that replace some of a model's, by name."""

    model: Any
    quantizer: Any
    modules: dict[str, Any]

    def shapes(self) -> Shapes:
        """Data type and shape of all parts, by `MODULE.PART`."""
        return {f"{name}.{part}": of for name, module in self.modules.items() for part, of in layout(module).items()}

    def run(self, *, device: str, dense: Callable[[nn.Parameter], Tensor], keep: Keep = in_memory) -> None:
        """Puts the modules in their places on `device`, one after the other.

        `dense` gives the values behind a weight, in the model's dtype. On a CPU `keep` may put parts away and give
        others with the same content. Other parameters and buffers stay where they are.
        """
        untrimmed = 0
        for name, module in self.modules.items():
            old = self.model.get_submodule(name)
            untrimmed += old.weight.nbytes
            if untrimmed > TRIM_BYTES:
                trim_heap()
                untrimmed = 0
            if torch.device(device).type == "cpu":
                parts = keep(name, functools.partial(_quantized_parts, module, old, dense))
                module.weight = assembled(module, parts, dtype=old.weight.dtype)
            else:
                module.weight = _quantized_on(device, module.weight, _rows(old, dense))
            if getattr(old, "bias", None) is not None:
                module.bias = nn.Parameter(old.bias.data.to(device), requires_grad=False)
            self.model.set_submodule(name, module)
        self.model.hf_quantizer = self.quantizer
        self.quantizer.postprocess_model(self.model)


def quantizing(
    model: Any, quantization: BitsAndBytesConfig, *, device: str, embeddings: Iterable[str] = ()
) -> Quantizing:
    """What of the model is quantised: linear layers, and the embeddings of these names.

    Raises what transformers does where bitsandbytes cannot run on the device.
    """
    quantizer = AutoHfQuantizer.from_config(quantization)
    quantizer.validate_environment(device_map={"": device})
    modules = replacements(model, quantizer)
    for name in embeddings:
        old = model.get_submodule(name)
        module: Any = Nf4Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx, device="meta")
        module.weight = bitsandbytes.nn.Params4bit(
            module.weight.data,
            requires_grad=False,
            compress_statistics=quantization.bnb_4bit_use_double_quant,
            quant_type=quantization.bnb_4bit_quant_type,
        )
        modules[name] = module
    return Quantizing(model, quantizer, modules)


class Nf4Embedding(nn.Embedding):
    """An embedding in NF4: the rows that are looked up are dequantised, and no others.

    bitsandbytes' own knows no double quantisation.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K]."""
        table = _packed(self)
        if self.embedding_dim % table.blocksize:  # a block lies in two rows
            return nf4_dequant(table)[ids]
        rows, blocks = ids.reshape(-1), self.embedding_dim // table.blocksize
        at = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)
        absmax = table.absmax[at]
        if table.code2 is not None and table.absmax2 is not None and table.offset is not None:
            coarse = table.absmax2[at // table.blocksize2]
            absmax = (table.code2[absmax.int()] * coarse).add_(table.offset)
        packed = table.bytes_().view(self.num_embeddings, -1)[rows]
        found = Nf4Weight(packed, absmax.reshape(-1), (len(rows), self.embedding_dim), table.dtype, table.blocksize)
        return nf4_dequant(found).view(*ids.shape, self.embedding_dim)


def _packed(table: Any) -> Nf4Weight:
    return Nf4Weight.from_quant_state(table.weight, table.weight.quant_state)


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """The same model, dense again, its weights rounded as they were."""
    model = model.dequantize(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Embedding):
            weight = nf4_dequant(_packed(module)).to(dtype)
            model.set_submodule(name, nn.Embedding.from_pretrained(weight, padding_idx=module.padding_idx))
    return model


def _quantized_on(device: str, empty: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """Quantised on the GPU; bitsandbytes takes a weight for int8 from the CPU only."""
    is_int8 = isinstance(empty, bitsandbytes.nn.Int8Params)
    options = {"has_fp16_weights": False} if is_int8 else vars(empty)
    kind: Any = type(empty)
    quantized: nn.Parameter = kind(weight if is_int8 else weight.to(device), requires_grad=False, **options).to(device)
    return quantized


def _quantized_parts(module: Any, old: Any, dense: Callable[[nn.Parameter], Tensor]) -> Parts:
    return parts_of(module, _rows(old, dense))


def replacements(model: Any, quantizer: Any) -> dict[str, Any]:
    """The modules, without weights, that transformers puts in the place of linear layers; the model stays as it is."""
    before = dict(model.named_modules())
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    found = {name: module for name, module in model.named_modules() if before.get(name) is not module}
    for name in found:
        model.set_submodule(name, before[name])
    return found


def _rows(module: Any, dense: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """The dense weight [N, K]; Conv1D has it the other way round."""
    weight = dense(module.weight)
    return (weight.t() if isinstance(module, Conv1D) else weight).contiguous()


def _shape(module: Any) -> torch.Size:
    """(N, K) of the dense weight."""
    if isinstance(module, Nf4Embedding):
        return torch.Size((module.num_embeddings, module.embedding_dim))
    return torch.Size((module.out_features, module.in_features))


def layout(module: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Data type and shape of every part of a quantised module's weight."""
    rows, columns = _shape(module)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return {"codes": (torch.int8, (rows, columns)), "absmax": (torch.float32, (rows,))}
    blocks = -(-rows * columns // BLOCKSIZE)
    codes = (torch.uint8, (-(-rows * columns // 2), 1))
    if not module.weight.compress_statistics:
        return {"codes": codes, "absmax": (torch.float32, (blocks,))}
    second = (torch.float32, (-(-blocks // BLOCKSIZE2),))
    return {"codes": codes, "absmax": (torch.uint8, (blocks,)), "absmax2": second, "offset": (torch.float32, ())}


def parts_of(module: Any, weight: Tensor) -> Parts:
    """The parts of a dense weight [N, K] on the CPU, for this module."""
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        quantized: Any = bitsandbytes.nn.Int8Params(weight, requires_grad=False)
        quantized = quantized.to("cpu")
        return {"codes": quantized.CB, "absmax": quantized.SCB}
    made = nf4_quantize(weight, blocksize=BLOCKSIZE, double_quant=bool(module.weight.compress_statistics))
    parts = {"codes": made.packed, "absmax": made.absmax}
    if made.absmax2 is not None and made.offset is not None:
        parts |= {"absmax2": made.absmax2, "offset": made.offset}
    return parts


def assembled(module: Any, parts: Parts, *, dtype: torch.dtype) -> nn.Parameter:
    """The weight of a quantised module out of its parts, as bitsandbytes makes it of a dense one of this dtype."""
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        weight = bitsandbytes.nn.Int8Params(parts["codes"], requires_grad=False)
        weight.CB, weight.SCB = weight.data, parts["absmax"]
        return weight
    inner = None
    if "absmax2" in parts:
        inner = QuantState(absmax=parts["absmax2"], blocksize=BLOCKSIZE2, code=_dynamic_map(), dtype=torch.float32)
    state = QuantState(
        absmax=parts["absmax"],
        shape=_shape(module),
        dtype=dtype,
        blocksize=BLOCKSIZE,
        code=get_4bit_type("nf4", device="cpu"),
        quant_type="nf4",
        offset=parts.get("offset"),
        state2=inner,
    )
    options = vars(module.weight) | {"quant_state": state, "bnb_quantized": True, "blocksize": BLOCKSIZE}
    module.quant_state = state
    return bitsandbytes.nn.Params4bit(parts["codes"], requires_grad=False, **options)


@functools.cache
def _dynamic_map() -> Tensor:
    """One for all weights."""
    return dynamic_map()
