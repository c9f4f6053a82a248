"""Who takes part in the benchmark of an operation: burnish, plain and compiled PyTorch, and the operation's peers.

All do the same work, forward and backward to every trained input, with the same dropout and the dtypes of their
labels; `fault` compares each with the reference in fp64, without dropout. One that does less says so (`is_whole`) and
only serves as a denominator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..kernels.adapter_adamw import AdapterAdamW
from ..kernels.nf4_quantize import nf4_quantize
from ..kernels.op import Case, Op
from . import schemes
from .kernel_tables import BURNISH, COMPILED, FROZEN, REFERENCE
from .op_runs import Run, difference, fresh
from .plain import Problem, in_bytes, plain, problem_of, shrunk
from .shapes import smaller

CHECK_LIMITS = {
    "cpu": {"B": 1, "T": 64, "M": 64, "K": 1024, "N": 1024, "F": 1024, "V": 8192, "shapes": 1024},
    "cuda": {"B": 1, "T": 256, "M": 256},
}
"""Largest value of a shape letter in the comparison of a contender."""
EIGHT_BITS = 0.02
"""Error that moments of 8 bits may cause in an update, of the parameters' norm."""

Reason = Callable[[Problem], str | None]


def always(_: Problem) -> None:
    """No reason not to run."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `reason`: why it cannot run on a problem."""

    name: str
    label: str
    make: Callable[[Problem], Run]
    reason: Reason = always
    allowed_error: float | None = None
    """Relative to the norm of a result; None: twice the reference's own error in the dtype."""
    is_whole: bool = True


def burnish(problem: Problem) -> Run:
    return Run(problem.op.function, fresh(problem.inputs) | dict(problem.op.options), problem.cotangents)


def compiled(problem: Problem) -> Run:
    run = plain(problem)
    # What was compiled for other items may be forgotten: there is a limit to how often one function is compiled.
    torch.compiler.reset()
    return Run(torch.compile(run.function, dynamic=False), run.arguments, run.cotangents, run.arranged)


def _can_compile(problem: Problem) -> str | None:
    if problem.op.name == "adapter_adamw":
        return "a graph of all operations on all tensors takes minutes to compile"
    return None


def _needs_no_dropout(problem: Problem) -> str | None:
    return "the scheme has no dropout" if problem.p > 0 else None


def _needs_liger(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return "Liger-Kernel runs on GPUs"
    return None if find_spec("liger_kernel") else "the package liger-kernel is not installed"


def _nf4_quantize(problem: Problem) -> Run:
    return Run(nf4_quantize, problem.inputs, [], in_bytes)


def _adamw(problem: Problem, make: Callable[..., torch.optim.Optimizer], *, clips: bool) -> Run:
    """One step of an optimizer in place; `clips`: the norm is clipped by PyTorch first."""
    inputs = fresh(problem.inputs, copies=True)
    lr, weight_decay, beta1, beta2, eps = inputs["numbers"][0]
    params = [nn.Parameter(param) for param in inputs["params"]]
    optimizer = make(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    for param, m, v in zip(params, inputs["exp_avgs"], inputs["exp_avg_sqs"], strict=True):
        step = torch.tensor(float(inputs["num_steps"]), device=param.device)
        optimizer.state[param] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def function(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Any) -> Any:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if clips:
            torch.nn.utils.clip_grad_norm_(params, inputs["max_grad_norm"])
        optimizer.step()
        return params, moments

    moments = inputs["exp_avgs"], inputs["exp_avg_sqs"]
    arguments = {"params": params, "grads": inputs["grads"], "moments": moments}
    return Run(function, arguments, [], lambda value, _: [*value[0], *value[1][0], *value[1][1]])


def _own_adamw(problem: Problem) -> Run:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return AdapterAdamW(params, max_grad_norm=problem.inputs["max_grad_norm"], **options)

    return _adamw(problem, make, clips=False)


def _torch_adamw(problem: Problem) -> Run:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, fused=True, **options)

    return _adamw(problem, make, clips=True)


def _torch_rms_norm(problem: Problem) -> Run:
    def function(x: Tensor, weight: Tensor, eps: float, offset: float, residual: Any = None, shrink: Any = None) -> Any:
        h = x if residual is None else x + residual
        y = F.rms_norm(h, (h.shape[-1],), weight + offset if offset else weight, eps)
        return y, None if residual is None else h, shrunk(y, shrink)

    return Run(function, fresh(problem.inputs), problem.cotangents)


def _torch_attention(problem: Problem) -> Run:
    def function(q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return y.transpose(1, 2)

    return Run(function, fresh(problem.inputs), problem.cotangents)


def _needs_causal(problem: Problem) -> str | None:
    return None if problem.case["mask"] == "causal" else "only the causal mask"


def _peer(name: str, *arguments: Any) -> Callable[[Problem], Run]:
    """A function of kernel_peers, whose libraries take seconds to import."""

    def make(problem: Problem) -> Run:
        from . import kernel_peers

        run: Run = getattr(kernel_peers, name)(problem, *arguments)
        return run

    return make


PEFT = "PEFT as installed: fp32 adapters, bf16 autocast"
LIGER = "Liger-Kernel"
PEERS: dict[str, tuple[Contender, ...]] = {
    "adapter_adamw": (
        Contender("torch-fused", "torch.optim.AdamW(fused=True) and clip_grad_norm_", _torch_adamw),
        Contender(
            "bitsandbytes-8bit", "bitsandbytes AdamW8bit (moments of 8 bits) and clip_grad_norm_", _peer("bnb_adamw"),
            allowed_error=EIGHT_BITS,
        ),
    ),
    "attention": (Contender("torch", "F.scaled_dot_product_attention", _torch_attention, _needs_causal),),
    "dora": (
        Contender("peft-dora", PEFT, _peer("peft_dora", torch.float32)),
        Contender("peft-dora-bf16", "PEFT, bf16 adapters", _peer("peft_dora", torch.bfloat16)),
    ),
    "dora_norm": (Contender("peft", "PEFT's computation of the norm", _peer("peft_dora_norm")),),
    "glu": (Contender("liger", f"{LIGER} SiLUMul; the rest in PyTorch", _peer("liger_glu"), _needs_liger),),
    "layer_norm": (Contender("liger", f"{LIGER} LayerNorm; the rest in PyTorch", _peer("liger_norm"), _needs_liger),),
    "linear_cross_entropy": (
        Contender("liger", f"{LIGER} FusedLinearCrossEntropy", _peer("liger_cross_entropy"), _needs_liger),
        Contender("liger-scheme", f"scheme of {LIGER}, own implementation", schemes.liger_cross_entropy),
    ),
    "lora_linear": (
        Contender(FROZEN, "the frozen products alone", schemes.frozen, is_whole=False),
        Contender("peft", PEFT, _peer("peft_lora", torch.float32)),
        Contender("peft-bf16", "PEFT, bf16 adapters", _peer("peft_lora", torch.bfloat16)),
        Contender("unsloth-scheme", "scheme of Unsloth, own implementation", schemes.unsloth, _needs_no_dropout),
        Contender("lorafusion-scheme", "scheme of LoRAFusion, own implementation", schemes.lorafusion),
    ),
    "multi_lora": (
        Contender("mlora-scheme", "scheme of mLoRA, own implementation: a loop, fp32 adapters", schemes.mlora),
    ),
    "nf4_dequant": (Contender("bitsandbytes", "bitsandbytes dequantize_4bit", _peer("bnb_dequant")),),
    "nf4_quantize": (Contender("bitsandbytes", "bitsandbytes quantize_4bit", _peer("bnb_quantize")),),
    "rms_norm": (
        Contender("torch", "F.rms_norm; the rest in PyTorch", _torch_rms_norm),
        Contender("liger", f"{LIGER} RMSNorm; the rest in PyTorch", _peer("liger_norm"), _needs_liger),
    ),
    "rope": (Contender("liger", f"{LIGER} rope, on copies", _peer("liger_rope"), _needs_liger),),
}  # fmt: skip
OWN: dict[str, Callable[[Problem], Run]] = {"adapter_adamw": _own_adamw, "nf4_quantize": _nf4_quantize}
"""How burnish does the work where the function of the record, made for tests, copies or converts around it."""


def contenders_of(op: Op, *, is_compiled: bool) -> list[Contender]:
    """burnish, the reference and all others that an operation has."""
    return [
        Contender(BURNISH, "burnish", OWN.get(op.name, burnish)),
        Contender(REFERENCE, "plain PyTorch", plain),
        *([Contender(COMPILED, "torch.compile of the reference", compiled, _can_compile)] if is_compiled else []),
        *PEERS.get(op.name, ()),
    ]


def fault(contender: Contender, small: Problem) -> str | None:
    """What is wrong with a contender's results on a problem without dropout; None if nothing is.

    The frozen products are compared by nothing: they are a denominator. What is compiled is not compared here: on
    another shape it would be compiled a second time.
    """
    if not contender.is_whole or contender.name == COMPILED or contender.reason(small) is not None:
        return None
    found = contender.make(small).results()
    return difference(found, small.expected, small.dtype, allowed_error=contender.allowed_error)


def small_problem(op: Op, case: Case, dtype: torch.dtype, device: str) -> Problem:
    return problem_of(op, without_dropout(smaller(case, CHECK_LIMITS[device])), dtype, device)


def without_dropout(case: Case) -> Case:
    if "p" not in case:
        return case
    return {**case, "p": (0.0,) if isinstance(case["p"], tuple | list) else 0.0}
