"""Peers of single operations, through their own code: modules of PEFT, functions of bitsandbytes and Liger-Kernel."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ..kernels.nf4_dequant import Nf4Weight, code_on
from .op_runs import Run, fresh
from .plain import Problem, columns_of, gate_and_up, queries_and_keys, shrunk, side_by_side


def _layers(problem: Problem, projections: Sequence[Any], dtype: torch.dtype, *, is_dora: bool = False) -> list[Any]:
    """PEFT's layers over frozen linears that share the projections' weights; their adapters have `dtype`."""
    model = nn.Module()
    for j, part in enumerate(projections):
        linear = nn.Linear(part.weight.shape[1], part.weight.shape[0], bias=part.bias is not None, device="meta")
        linear.weight = nn.Parameter(part.weight.detach(), requires_grad=False)
        if part.bias is not None:
            linear.bias = nn.Parameter(part.bias.detach(), requires_grad=part.bias.requires_grad)
        model.add_module(f"linear{j}", linear)
    names, rank = [name for name, _ in model.named_children()], projections[0].a.shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=problem.inputs["p"], target_modules=names, use_dora=is_dora
    )
    inject_adapter_in_model(config, model)
    layers: list[Any] = [getattr(model, name) for name in names]
    for layer, part in zip(layers, projections, strict=True):
        layer.lora_A["default"].weight = nn.Parameter(part.a.detach().to(dtype, copy=True))
        layer.lora_B["default"].weight = nn.Parameter(part.b.detach().to(dtype, copy=True))
        layer.scaling["default"] = part.scale
    return layers


def _trained(layer: Any) -> list[Tensor]:
    """In the order of a Projection's fields."""
    weights = [layer.base_layer.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [weight for weight in weights if weight is not None]


def _autocast(problem: Problem, dtype: torch.dtype) -> Callable[[], Any]:
    """bf16 autocast where the adapters are in another dtype, as a trainer has it."""
    if dtype == problem.dtype:
        return nullcontext
    return lambda: torch.autocast(problem.device, dtype=problem.dtype)


def peft_lora(problem: Problem, dtype: torch.dtype) -> Run:
    layers = _layers(problem, problem.inputs["projections"], dtype)
    autocast = _autocast(problem, dtype)

    def function(x: Tensor, trained: Any) -> list[Tensor]:
        with autocast():
            return [layer(x) for layer in layers]

    arguments = {"x": fresh(problem.inputs["x"]), "trained": [_trained(layer) for layer in layers]}
    return Run(function, arguments, columns_of(problem.cotangents[0], problem.inputs["projections"]), side_by_side)


def peft_dora(problem: Problem, dtype: torch.dtype) -> Run:
    [layer] = _layers(problem, [problem.inputs["projection"]], dtype, is_dora=True)
    magnitude = nn.Parameter(problem.inputs["magnitude"].detach().to(dtype, copy=True))
    layer.lora_magnitude_vector["default"].weight = magnitude
    autocast = _autocast(problem, dtype)

    def function(x: Tensor, trained: Any, magnitude: Tensor) -> Tensor:
        with autocast():
            result: Tensor = layer(x)
            return result

    x = fresh(problem.inputs["x"])
    return Run(function, {"x": x, "trained": _trained(layer), "magnitude": magnitude}, problem.cotangents)


def peft_dora_norm(problem: Problem) -> Run:
    """The update made dense from an identity matrix, added to the dense weight, and the norm of its rows."""
    from peft.tuners.lora.dora import DoraLinearLayer

    layer, projection = DoraLinearLayer(fan_in_fan_out=False), problem.inputs["projection"]
    down, up = (nn.Linear(1, 1, bias=False, device="meta") for _ in range(2))
    down.weight, up.weight = (nn.Parameter(part.detach()) for part in (projection.a, projection.b))
    weight, quant = projection.weight, projection.quant
    state = None if quant is None else _quant_state(quant, problem.dtype)

    @torch.no_grad()
    def function(weight: Tensor) -> Tensor:
        dense = weight if state is None else bitsandbytes.functional.dequantize_4bit(weight, state)
        update = layer.get_lora_weight(lora_A=down, lora_B=up)
        result: Tensor = layer.get_weight_norm(dense, update, projection.scale)
        return result

    return Run(function, {"weight": weight if quant is None else quant.packed}, problem.cotangents)


def _quant_state(w: Nf4Weight, dtype: torch.dtype) -> Any:
    """bitsandbytes' description of a packed weight."""
    nested = None
    if w.nested:
        nested = bitsandbytes.functional.QuantState(
            absmax=w.absmax2, code=w.code2, blocksize=w.blocksize2, dtype=torch.float32
        )
    return bitsandbytes.functional.QuantState(
        absmax=w.absmax, shape=torch.Size(w.shape), code=code_on(w.packed.device), blocksize=w.blocksize,
        quant_type="nf4", dtype=dtype, offset=w.offset, state2=nested,
    )  # fmt: skip


def bnb_dequant(problem: Problem) -> Run:
    w = problem.inputs["w"]
    state = _quant_state(w, problem.inputs["dtype"])

    def function(w: Nf4Weight) -> Tensor:
        return bitsandbytes.functional.dequantize_4bit(w.packed, state)

    return Run(function, {"w": w}, problem.cotangents)


def bnb_quantize(problem: Problem) -> Run:
    def function(w: Tensor, blocksize: int, double_quant: bool) -> Any:
        return bitsandbytes.functional.quantize_4bit(
            w, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
        )

    def arranged(value: Any, _: list[Tensor]) -> list[Tensor]:
        packed, state = value
        nested = [] if state.state2 is None else [state.state2.absmax, state.offset, state.state2.code]
        return [part.float() for part in (packed, state.absmax, *nested)]

    return Run(function, problem.inputs, [], arranged)


def bnb_adamw(problem: Problem) -> Run:
    """AdamW8bit with the given moments, rounded to its 8 bits, and the norm clipped by PyTorch."""
    inputs = fresh(problem.inputs, copies=True)
    lr, weight_decay, beta1, beta2, eps = inputs["numbers"][0]
    params = [nn.Parameter(param) for param in inputs["params"]]
    optimizer = bitsandbytes.optim.AdamW8bit(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    for i, param in enumerate(params):
        optimizer.init_state(optimizer.param_groups[0], param, 0, i)
        state = optimizer.state[param]
        state["step"] = inputs["num_steps"]
        for number, moment in (("1", inputs["exp_avgs"][i]), ("2", inputs["exp_avg_sqs"][i])):
            if state[f"state{number}"].dtype == torch.float32:
                state[f"state{number}"].copy_(moment)
                continue
            code = state[f"qmap{number}"]
            values, found = bitsandbytes.functional.quantize_blockwise(moment, code=code, blocksize=256)
            state[f"state{number}"].copy_(values.view(moment.shape))
            state[f"absmax{number}"].copy_(found.absmax)

    def function(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        torch.nn.utils.clip_grad_norm_(params, inputs["max_grad_norm"])
        optimizer.step()
        return params

    return Run(function, {"params": params, "grads": inputs["grads"]}, [], lambda value, _: list(value))


def liger_norm(problem: Problem) -> Run:
    """Liger's norm; the residual is added, and the low-rank updates computed, by PyTorch."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def normed(h: Tensor, weight: Tensor, eps: float, offset: float = 0.0, bias: Tensor | None = None) -> Any:
        if problem.op.name == "layer_norm":
            return LigerLayerNormFunction.apply(h, weight, bias, eps)
        # Not in place: the gradient of y is an argument of the benchmark.
        return LigerRMSNormFunction.apply(h, weight, eps, offset, "gemma" if offset else "llama", False)

    def function(x: Tensor, residual: Tensor | None = None, shrink: Any = None, **options: Any) -> Any:
        h = x if residual is None else x + residual
        y = normed(h, **options)
        return y, None if residual is None else h, shrunk(y, shrink)

    return Run(function, fresh(problem.inputs), problem.cotangents)


def liger_glu(problem: Problem) -> Run:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return gate_and_up(problem, LigerSiLUMulFunction.apply)


def liger_rope(problem: Problem) -> Run:
    """On copies of queries and keys, as burnish: it rotates in place."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)

    return queries_and_keys(problem, function, are_heads_first=True)


def liger_cross_entropy(problem: Problem) -> Run:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Any:
        found = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, bias, None, -100, 0.0, 0.0, "sum", None, False
        )
        return found[0] if isinstance(found, tuple) else found

    return Run(function, fresh(problem.inputs), problem.cotangents)
