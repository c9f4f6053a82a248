"""Published schemes of others for the same work, implemented anew from their descriptions over PyTorch's products.

Unsloth's low-rank linears (no dropout), LoRAFusion's split graph (arXiv 2510.00206), Liger-Kernel's chunked linear
cross-entropy (arXiv 2410.10989), mLoRA's loop over adapters (arXiv 2312.02515), and the frozen products alone.
What their authors fuse into kernels of their own takes several operations here.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .op_runs import Run, fresh
from .plain import Problem, columns_of, side_by_side


def frozen(problem: Problem) -> Run:
    """y_j = x W_jᵀ and dx = sum_j dy_j W_j: what is left of lora_linear without its adapters."""
    projections = problem.inputs["projections"]

    def function(x: Tensor, weights: Sequence[Tensor], dys: Sequence[Tensor]) -> list[Tensor]:
        outputs = [torch.mm(x, weight.t()) for weight in weights]
        dx = torch.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        return [*outputs, dx]

    weights = [part.weight for part in projections]
    dys = columns_of(problem.cotangents[0], projections)
    return Run(function, {"x": problem.inputs["x"].detach(), "weights": weights, "dys": dys}, [])


class _Unsloth(torch.autograd.Function):
    """Linears that share x: only x is kept; x Aᵀ and dY B are computed wherever they are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], *parameters: Tensor) -> tuple[Tensor, ...]:
        count = len(scales)
        weights, a, b = (parameters[i * count : (i + 1) * count] for i in range(3))
        ctx.scales = scales
        ctx.save_for_backward(x, *parameters)
        return tuple(
            torch.mm(x, weight.t()).addmm_(x @ down.t(), up.t(), alpha=scale)
            for weight, down, up, scale in zip(weights, a, b, scales, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        count = len(ctx.scales)
        weights, a, b = (parameters[i * count : (i + 1) * count] for i in range(3))
        grads_a, grads_b = [], []
        dx: Tensor | None = None
        for dy, weight, down, up, scale in zip(dys, weights, a, b, ctx.scales, strict=True):
            grads_b.append((dy.t() @ (x @ down.t())).mul_(scale))
            grads_a.append(((dy @ up).t() @ x).mul_(scale))
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
            dx.addmm_(dy @ up, down, alpha=scale)
        return dx, None, *[None] * count, *grads_a, *grads_b


def unsloth(problem: Problem) -> Run:
    def function(x: Tensor, projections: Sequence[Any], **_: Any) -> Any:
        parameters = [getattr(part, name) for name in ("weight", "a", "b") for part in projections]
        return _Unsloth.apply(x, [part.scale for part in projections], *parameters)

    arguments = fresh(problem.inputs)
    return Run(function, arguments, columns_of(problem.cotangents[0], arguments["projections"]), side_by_side)


class _LoraFusion(torch.autograd.Function):
    """One linear, its graph split around S = drop(x) Aᵀ: the dropped input, the mask and S are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
        dropped, mask = torch.ops.aten.native_dropout(x, p, True) if p > 0 else (x, None)
        s = dropped @ a.t()
        ctx.scale, ctx.p = scale, p
        ctx.save_for_backward(dropped, mask, s, weight, a, b)
        return torch.mm(x, weight.t()).addmm_(s, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dropped, mask, s, weight, a, b = ctx.saved_tensors
        ds = (dy @ b).mul_(ctx.scale)
        db = (dy.t() @ s).mul_(ctx.scale)
        dx = torch.mm(dy, weight)
        if mask is None:
            dx.addmm_(ds, a)
        else:
            dx.add_(torch.ops.aten.native_dropout_backward(ds @ a, mask, 1 / (1 - ctx.p)))
        return dx, None, ds.t() @ dropped, db, None, None


def lorafusion(problem: Problem) -> Run:
    def function(x: Tensor, projections: Sequence[Any], p: float, **_: Any) -> list[Any]:
        return [_LoraFusion.apply(x, part.weight, part.a, part.b, part.scale, p) for part in projections]

    arguments = fresh(problem.inputs)
    return Run(function, arguments, columns_of(problem.cotangents[0], arguments["projections"]), side_by_side)


class _Liger(torch.autograd.Function):
    """Cross-entropy of a frozen head, chunk by chunk; forward makes the gradient of hidden, backward scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        rows = chunk_rows(hidden.shape[0], hidden.shape[1], weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, labels = hidden[start : start + rows], targets[start : start + rows, None]
            logits = (part @ weight.t()).float()
            log_probabilities = logits.log_softmax(dim=-1)
            total -= log_probabilities.gather(1, labels).sum()
            gradient = log_probabilities.exp_().scatter_add_(
                1, labels, torch.full_like(labels, -1, dtype=torch.float32)
            )
            torch.mm(gradient.to(weight.dtype), weight, out=grad[start : start + rows])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * dloss.to(grad.dtype), None, None


def chunk_rows(num_rows: int, num_features: int, num_classes: int) -> int:
    """Liger-Kernel's chunk: a power of two, at which the logits take about the memory of the hidden states."""
    wanted = -(-num_rows // -(-num_classes // num_features))
    return 1 << (wanted - 1).bit_length()


def liger_cross_entropy(problem: Problem) -> Run:
    def function(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Any:
        return _Liger.apply(hidden, weight, targets)

    return Run(function, fresh(problem.inputs), problem.cotangents)


def mlora(problem: Problem) -> Run:
    """One adapter after the other, in fp32, each added to the rows of its job."""
    arguments = fresh(problem.inputs)
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    offsets, jobs = arguments["offsets"], arguments["adapters"]
    factors = [[part.detach().float().requires_grad_() for part in (job.a, job.b)] for job in jobs]
    rows = [torch.arange(start, stop, device=x.device) for start, stop in itertools.pairwise(offsets)]

    def function(x: Tensor, factors: Sequence[Sequence[Tensor]]) -> Tensor:
        y = F.linear(x, weight, bias)
        for (a, b), job, own in zip(factors, jobs, rows, strict=True):
            low = F.linear(F.dropout(x.index_select(0, own).float(), job.p), a)
            y = y.index_add(0, own, (F.linear(low, b) * job.scale).to(y.dtype))
        return y

    return Run(function, {"x": x, "factors": factors}, problem.cotangents)
