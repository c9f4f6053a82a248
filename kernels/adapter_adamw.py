"""AdamW for all adapters at once: gradient norm, clip and update of hundreds of small tensors in one or two launches.

    g' = g min(1, max_grad_norm / (‖all g‖ + 1e-6))
    m' = m + (1 - β1) (g' - m),   v' = β2 v + (1 - β2) g'²,   t' = t + 1                        (arXiv 1711.05101)
    p' = (1 - lr λ) p - lr / (1 - β1^t') m' / (√v' / √(1 - β2^t') + eps)

Every parameter has its own learning rate lr, weight decay λ and step count t. Shape letters: S parameters.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .adamw_update import Numbers, Segment, kernels, update
from .byte_moments import STATE_BLOCK
from .op import Case, Op, random_normal

MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep fp32 moments, as in bitsandbytes."""


def adapter_adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    num_steps: int,
    numbers: Sequence[Numbers],
    max_grad_norm: float,
    grad_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    if grad_dtype:
        grads = [grad.to(grad_dtype).to(grad.dtype) for grad in grads]
    if max_grad_norm:
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        grads = [grad * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for grad in grads]
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, g, m, v, (lr, weight_decay, beta1, beta2, eps) in zip(
        params, grads, exp_avgs, exp_avg_sqs, numbers, strict=True
    ):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g.square()
        root = v.sqrt() / (1 - beta2 ** (num_steps + 1)) ** 0.5 + eps
        p = (1 - lr * weight_decay) * p - lr / (1 - beta1 ** (num_steps + 1)) * m / root
        for result, value in zip(results, (p, m, v), strict=True):
            result.append(value)
    return results


class AdapterAdamW(torch.optim.Optimizer):
    """AdamW over fp32 parameters, of any number and shape, also the flat partitions of ZeRO.

    State is that of torch.optim.AdamW under its names (`step`, `exp_avg`, `exp_avg_sq`), so checkpoints go both ways.
    `max_grad_norm` > 0 clips by the norm of all gradients, leaves everything alone where that is not finite, and puts
    it into `grad_norm`; float("inf") only measures. `state_bits` 8 keeps moments as bytes, with the maxima of blocks
    of 256 in `exp_avg_max` and `exp_avg_sq_max`, for parameters of 4096 elements or more.
    `step` raises ValueError for a parameter that is not fp32; ZeRO puts its fp32 partitions in after construction.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float = 0.0,
        state_bits: Literal[8, 32] = 32,
    ) -> None:
        assert state_bits in (8, 32), state_bits
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm, self.state_bits = max_grad_norm, state_bits
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        segments: list[Segment] = []
        numbers: list[Numbers] = []
        for group in self.param_groups:
            shared = (float(group["lr"]), group["weight_decay"], *group["betas"], group["eps"])
            found = [self._segment(param) for param in group["params"] if param.grad is not None]
            segments += found
            numbers += [shared] * len(found)
        if segments:
            self.grad_norm = _update_any(segments, numbers, max_grad_norm=self.max_grad_norm)
        return loss

    def _segment(self, param: Tensor) -> Segment:
        state, grad = self.state[param], param.grad
        assert grad is not None
        if param.dtype != torch.float32:
            raise ValueError(f"AdapterAdamW updates fp32 parameters, not {param.dtype}")
        if grad.is_sparse:
            raise RuntimeError("AdapterAdamW does not take sparse gradients")
        if not state:
            state.update(_new_state(param, is_8bit=self.state_bits == 8 and param.numel() >= MIN_8BIT_ELEMENTS))
        if state["step"].device != param.device:
            state["step"] = state["step"].to(param.device)
        if "exp_avg_max" in state and state["exp_avg"].dtype != torch.uint8:
            # Optimizer.load_state_dict casts all state to the dtype of the parameter.
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].byte(), state["exp_avg_sq"].byte()
        maxima = state.get("exp_avg_max"), state.get("exp_avg_sq_max")
        return Segment(param, grad, state["exp_avg"], state["exp_avg_sq"], *maxima, state["step"])


def _new_state(param: Tensor, *, is_8bit: bool) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    if not is_8bit:
        return {"step": step, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    num_blocks = -(-param.numel() // STATE_BLOCK)
    state = {"step": step}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
        state[f"{name}_max"] = torch.zeros(num_blocks, dtype=torch.float32, device=param.device)
    return state


def _update_any(segments: list[Segment], numbers: Sequence[Numbers], *, max_grad_norm: float) -> Tensor | None:
    """`update` of tensors with any strides and gradients of any dtype: by way of contiguous copies where needed.

    A kernel sees addresses only; torch's own fused AdamW on a CPU takes every gradient for contiguous.
    """
    dtypes = {s.grad.dtype for s in segments}
    dtype = dtypes.pop() if dtypes in ({torch.float32}, {torch.bfloat16}) else torch.float32
    ready = []
    for s in segments:
        if not (s.param.is_contiguous() and s.exp_avg.is_contiguous() and s.exp_avg_sq.is_contiguous()):
            s = s._replace(
                param=s.param.contiguous(), exp_avg=s.exp_avg.contiguous(), exp_avg_sq=s.exp_avg_sq.contiguous()
            )
        if s.grad.dtype != dtype or not s.grad.is_contiguous():
            s = s._replace(grad=s.grad.to(dtype).contiguous())
        ready.append(s)
    norm = update(ready, numbers, max_grad_norm=max_grad_norm)
    for s, copy in zip(segments, ready, strict=True):
        for mine, updated in ((s.param, copy.param), (s.exp_avg, copy.exp_avg), (s.exp_avg_sq, copy.exp_avg_sq)):
            if mine is not updated:
                mine.copy_(updated)
    return norm


def adapter_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    num_steps: int,
    numbers: Sequence[Numbers],
    max_grad_norm: float,
    grad_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New parameters and moments after the step that follows `num_steps` others; the inputs stay as they are."""
    copies = [[tensor.clone() for tensor in tensors] for tensors in (params, exp_avgs, exp_avg_sqs)]
    low = [grad.to(grad_dtype) if grad_dtype else grad for grad in grads]
    steps = [torch.tensor(float(num_steps), device=param.device) for param in params]
    segments = [
        Segment(p, g, m, v, None, None, step)
        for p, g, m, v, step in zip(copies[0], low, *copies[1:], steps, strict=True)
    ]
    _update_any(segments, numbers, max_grad_norm=max_grad_norm)
    return copies[0], copies[1], copies[2]


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    def normals(scale: float) -> list[Tensor]:
        return [
            random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)
            for shape in case["shapes"]
        ]

    return {
        "params": normals(1.0),
        "grads": normals(0.1),
        "exp_avgs": normals(0.01),
        "exp_avg_sqs": [value.abs() for value in normals(1e-3)],
        "num_steps": case["num_steps"],
        "numbers": [(1e-2 * (i + 1), 0.1 * i, 0.9, 0.999, 1e-8) for i in range(len(case["shapes"]))],
        "max_grad_norm": case["max_grad_norm"],
        "grad_dtype": case.get("grad_dtype"),
    }


OP = Op(
    name="adapter_adamw",
    summary="gradient norm, clip and AdamW of all adapters in two launches",
    reference=adapter_adamw_reference,
    function=adapter_adamw,
    make_inputs=_make_inputs,
    cases=(
        {"shapes": ((7,), (16, 20), (1,)), "num_steps": 0, "max_grad_norm": 0.0},
        {"shapes": ((8, 129), (1, 1), (33, 64)), "num_steps": 5, "max_grad_norm": 0.5},
        {"shapes": ((130, 130), (5, 5)), "num_steps": 1000, "max_grad_norm": 1e6, "grad_dtype": torch.bfloat16},
        {"shapes": ((20000,),), "num_steps": 3, "max_grad_norm": 0.0, "grad_dtype": torch.bfloat16},
    ),
    kernels=kernels(),
    dtypes=(torch.float32,),
    bench_cases=({"shapes": ((16, 4096), (4096, 16)) * 320, "num_steps": 10, "max_grad_norm": 1.0},),
    num_flops=lambda case: 16.0 * sum(map(math.prod, case["shapes"])),
    num_bytes=lambda case: 32.0 * sum(map(math.prod, case["shapes"])),
)  # fmt: skip
