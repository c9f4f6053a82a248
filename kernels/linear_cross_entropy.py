"""Linear head and cross-entropy in one: the logits exist for one chunk of tokens at a time, never for all.

    z = W h + b (in the dtype of h); from here on in fp32: c = cap tanh(z / cap) or z, lse = log Σ_v exp(c_v)
    loss = lse - (1 - ε) c_y - ε/V Σ_v c_v + ζ lse²          of a token with target y; ε label smoothing, ζ z-loss
    dz_v = ((1 + 2 ζ lse) softmax(c)_v - ε/V - (1 - ε) [v = y]) (1 - (c_v / cap)²)

Forward makes the loss and, in the same pass, overwrites the logits with dz, from which dH = dz W (and dW, db where they
are trained) follow at once; backward only scales them. Tokens to ignore are left out before the first product.
Chunking after Liger Kernel (arXiv 2410.10989); z-loss after PaLM (arXiv 2204.02311).
Shape letters: M tokens, K hidden features, V vocabulary, C tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .op import Backend, Case, Config, Kernel, Op, backend_of, random_normal

MAX_CHUNK_ROWS = {"cpu": 512, "cuda": 4096}
MAX_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 1280 * 2**20}
MIN_CHUNK_ROWS = 64
TORCH_BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True)
class LossOptions:
    """What changes the loss of a token; softcap 0 is none."""

    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    raw = torch.nn.functional.linear(hidden, weight, bias)
    logits = raw if raw.dtype == torch.float64 else raw.float()
    counts = targets != ignore_index
    num_right = ((logits.argmax(-1) == targets) & counts).sum()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1)[counts].square().sum()
    return loss, num_right


@triton.jit
def _capped(z, softcap, CAP: tl.constexpr):
    """softcap * tanh(z / softcap); a polynomial around 0, where the quotient of exponentials would cancel."""
    if CAP:
        x = z / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        s = x * x
        p = ((-5.71702e-3 * s + 2.065056e-2) * s - 5.374349e-2) * s + 1.3331491e-1
        near = x + x * s * (p * s - 3.3333284e-1)
        z = softcap * tl.where(tl.abs(x) < 0.625, near, far)
    return z


@triton.jit
def _cross_entropy_kernel(
    z_ptr, target_ptr, loss_ptr, hit_ptr, V, smoothing, softcap, z_loss,
    CAP: tl.constexpr, GRAD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row of logits [M, V] (contiguous): its loss, whether its target comes first, and dz over z where GRAD."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    target = tl.load(target_ptr + row)
    # A target outside of the vocabulary reads nothing and makes the loss NaN.
    is_inside = (target >= 0) & (target < V)
    raw_target = tl.load(z_ptr + target, mask=is_inside, other=float("nan")).to(tl.float32)
    top = -float("inf")
    sums = tl.zeros([BV], tl.float32)
    plain = tl.zeros([BV], tl.float32)
    beaten = tl.zeros([BV], tl.int32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        raw = tl.load(z_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        beaten |= ((cols < V) & ((raw > raw_target) | ((raw == raw_target) & (cols < target)))).to(tl.int32)
        c = _capped(raw, softcap, CAP)
        plain += c
        c = tl.where(cols < V, c, -float("inf"))
        higher = tl.maximum(top, tl.max(c, 0))
        sums = sums * tl.exp(top - higher) + tl.exp(c - higher)
        top = higher
    log_sum = tl.log(tl.sum(sums, 0))
    lse = top + log_sum
    c_target = _capped(raw_target, softcap, CAP)
    # Without smoothing a logit of -inf must not turn 0 * -inf into NaN.
    shift = tl.where(smoothing > 0, smoothing * (tl.sum(plain, 0) / V), 0.0)
    loss = lse - (1.0 - smoothing) * c_target - shift + z_loss * lse * lse
    tl.store(loss_ptr + row, loss)
    tl.store(hit_ptr + row, (is_inside & (tl.max(beaten, 0) == 0)).to(tl.int64))
    if GRAD:
        weight = 1.0 + 2.0 * z_loss * lse
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            raw = tl.load(z_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            c = _capped(raw, softcap, CAP)
            dz = weight * tl.exp(c - top - log_sum) - smoothing / V - tl.where(cols == target, 1.0 - smoothing, 0.0)
            if CAP:
                dz *= 1.0 - (c / softcap) * (c / softcap)
            tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=cols < V)


BLOCK, NUM_WARPS = 4096, 16


def _rows(
    logits: Tensor, targets: Tensor, options: LossOptions, *, with_grad: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Loss, and 1 where the target comes first, of every row of logits [C, V]; dz over the logits if `with_grad`."""
    if backend == "torch":
        return _rows_in_torch(logits, targets, options, with_grad=with_grad)
    C, V = logits.shape
    losses = torch.empty(C, dtype=torch.float32, device=logits.device)
    hits = torch.empty(C, dtype=torch.int64, device=logits.device)
    values = (float(options.label_smoothing), float(options.softcap), float(options.z_loss))
    if backend == "native":
        native.call("cross_entropy", logits.dtype, logits, targets, losses, hits, C, V, *values, int(with_grad))
    else:
        _cross_entropy_kernel[(C,)](
            logits, targets, losses, hits, V, *values,
            CAP=options.softcap > 0, GRAD=with_grad, BV=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses, hits


def _rows_in_torch(logits: Tensor, targets: Tensor, options: LossOptions, *, with_grad: bool) -> tuple[Tensor, Tensor]:
    """`_rows` a few rows at a time, so that the fp32 copies of the logits stay in the cache."""
    num_rows = max(1, TORCH_BLOCK_ELEMENTS // logits.shape[1])
    parts = [
        _block_in_torch(block, y, options, with_grad=with_grad)
        for block, y in zip(logits.split(num_rows), targets.split(num_rows), strict=True)
    ]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _block_in_torch(raw: Tensor, targets: Tensor, options: LossOptions, *, with_grad: bool) -> tuple[Tensor, Tensor]:
    smoothing, cap, V = options.label_smoothing, options.softcap, raw.shape[1]
    hits = (raw.argmax(1) == targets).long()
    c = raw if raw.dtype == torch.float64 else raw.float()
    if cap:
        c = c.div_(cap).tanh_().mul_(cap)
    lse = c.logsumexp(1)
    at_target = (torch.arange(len(targets), device=raw.device), targets)
    losses = lse - (1 - smoothing) * c[at_target] + options.z_loss * lse.square()
    if smoothing:
        losses -= smoothing * c.mean(1)
    if with_grad:
        slope = 1 - (c / cap).square_() if cap else None
        dz = c.sub_(lse[:, None]).exp_().mul_((1 + 2 * options.z_loss * lse)[:, None]).sub_(smoothing / V)
        dz[at_target] -= 1 - smoothing
        raw.copy_(dz if slope is None else dz.mul_(slope))
    return losses, hits


def chunk_rows(num_tokens: int, weight: Tensor) -> int:
    """Tokens of a chunk: many, for fast products, but few enough bytes of logits; chunks of one batch are alike."""
    kind = "cuda" if weight.is_cuda else "cpu"
    fitting = MAX_CHUNK_BYTES[kind] // (weight.shape[0] * weight.element_size())
    limit = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS[kind], fitting))
    num_chunks = max(1, -(-num_tokens // limit))
    return min(limit, max(16, -(-num_tokens // num_chunks // 16) * 16))


class _Gradients:
    """dH, dW and db of the sum, filled chunk by chunk; None where not needed. dW and db are added up in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: list[bool], kept: Tensor | None) -> None:
        self.hidden, self.weight, self.kept = hidden, weight, kept
        wide = torch.promote_types(weight.dtype, torch.float32)
        new = torch.empty if kept is None else torch.zeros
        self.dh = new(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needed[0] else None
        self.dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
        self.db = torch.zeros(len(weight), dtype=wide, device=weight.device) if needed[2] else None

    def add(self, dz: Tensor, h: Tensor, chunk: slice) -> None:
        """Takes in the gradient of the chunk's logits [C, V]; h [C, K] are its hidden states."""
        if self.dh is not None and self.kept is None:
            torch.mm(dz, self.weight, out=self.dh[chunk])
        elif self.dh is not None and self.kept is not None:
            self.dh.index_copy_(0, self.kept[chunk], dz @ self.weight)
        if self.dw is not None and self.dw.dtype == dz.dtype:
            self.dw.addmm_(dz.t(), h)
        elif self.dw is not None:
            self.dw.add_(dz.t() @ h)
        if self.db is not None:
            self.db.add_(dz.sum(0, dtype=self.db.dtype))

    def finished(self) -> list[Tensor | None]:
        """The three, in the dtypes of what they are the gradients of."""
        dtype = self.weight.dtype
        return [None if grad is None else grad.to(dtype) for grad in (self.dh, self.dw, self.db)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        options: LossOptions,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        needed: list[bool] = [with_grad and needs for needs in ctx.needs_input_grad[:3]]
        kept: Tensor | None = (targets != ignore_index).nonzero().squeeze(1)
        assert kept is not None
        num_kept = len(kept)
        if num_kept == len(targets):
            kept = None
        elif num_kept:
            targets = targets[kept]
        _check_targets(targets[:num_kept], len(weight))
        backend, size = backend_of(hidden), chunk_rows(num_kept, weight)
        grads = _Gradients(hidden, weight, needed, kept)
        buffer = torch.empty(size, len(weight), dtype=hidden.dtype, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        num_right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, num_kept, size):
            chunk = slice(start, min(start + size, num_kept))
            h, logits = hidden[chunk if kept is None else kept[chunk]], buffer[: chunk.stop - start]
            if bias is None:
                torch.mm(h, weight.t(), out=logits)
            else:
                torch.addmm(bias, h, weight.t(), out=logits)
            losses, hits = _rows(logits, targets[chunk], options, with_grad=any(needed), backend=backend)
            loss += losses.sum(dtype=torch.float64)
            num_right += hits.sum()
            if any(needed):
                grads.add(logits, h, chunk)
        ctx.save_for_backward(*grads.finished())
        ctx.mark_non_differentiable(num_right)
        return loss.to(torch.promote_types(hidden.dtype, torch.float32)), num_right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *(None if grad is None else _scaled(grad, dloss) for grad in ctx.saved_tensors), None, None, None, None


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor with the factor in its own precision: 1 / num_tokens has no good bf16."""
    if not grad.is_cuda:
        return grad * factor.item()
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad))


def _check_targets(targets: Tensor, num_classes: int) -> None:
    """Raises IndexError, as torch's loss does. On CUDA the loss becomes NaN instead, which waits for nothing."""
    if targets.is_cuda or not len(targets):
        return
    lowest, highest = map(int, targets.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise IndexError(f"target {lowest if lowest < 0 else highest} is out of bounds of {num_classes} classes")


@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of hidden [..., K] against targets [...], with logits hidden @ weight [V, K]ᵀ + bias [V].

    Returns the sum (fp32; 0 if every target is `ignore_index`) and how many targets are the first highest logit
    (int64). Label smoothing as in torch.nn.functional.cross_entropy; softcap 0 or None is none. Raises IndexError on
    the CPU where a target is no row of the weight.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    options = LossOptions(label_smoothing=label_smoothing, softcap=softcap or 0.0, z_loss=z_loss)
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    return _LinearCrossEntropy.apply(flat, weight, bias, labels, ignore_index, options, torch.is_grad_enabled())


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    M, K, V = case["M"], case["K"], case["V"]
    options = {key: case[key] for key in ("label_smoothing", "softcap", "z_loss") if key in case}

    def normal(*shape: int, scale: float) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)

    hidden, weight = normal(M, 2 * K, scale=1.0)[:, ::2], normal(V, K, scale=3 * K**-0.5)
    if not case.get("is_strided"):
        hidden = hidden.contiguous()
    targets = torch.randint(V, (M,), generator=generator)
    targets[torch.rand(M, generator=generator) < case.get("ignored", 0.0)] = -100
    trained = case.get("trained", "h")
    return options | {
        "hidden": hidden.requires_grad_("h" in trained),
        "weight": weight.requires_grad_("w" in trained),
        "targets": targets.to(device),
        "bias": normal(V, scale=1.0).requires_grad_() if "b" in trained else None,
    }


def _kernel_configs() -> tuple[Config, ...]:
    return tuple(
        Config({"CAP": cap, "GRAD": grad, "BV": BLOCK}, num_warps=NUM_WARPS)
        for cap in (False, True)
        for grad in (False, True)
    )


OP = Op(
    name="linear_cross_entropy",
    summary="linear head and cross-entropy, chunk by chunk, with the gradient made in forward",
    reference=linear_cross_entropy_reference,
    function=linear_cross_entropy,
    make_inputs=_make_inputs,
    cases=(
        {"M": 7, "K": 16, "V": 100},
        {"M": 129, "K": 64, "V": 1000, "ignored": 0.5},
        {"M": 33, "K": 100, "V": 4099, "label_smoothing": 0.1, "is_strided": True},
        {"M": 33, "K": 64, "V": 257, "softcap": 2.0, "trained": "hw"},
        {"M": 65, "K": 64, "V": 513, "z_loss": 1e-3, "trained": "whb"},
        {"M": 65, "K": 32, "V": 100, "trained": "w", "ignored": 0.3},
        {"M": 9, "K": 16, "V": 64, "ignored": 1.1, "trained": "hwb"},
        {"M": 0, "K": 16, "V": 64, "trained": "hw"},
        {
            "M": 40, "K": 64, "V": 5000, "ignored": 0.5, "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-3,
            "trained": "hwb", "is_strided": True,
        },
    ),
    kernels=(
        Kernel(
            fn=_cross_entropy_kernel,
            signature={
                "z_ptr": "*bf16", "target_ptr": "*i64", "loss_ptr": "*fp32", "hit_ptr": "*i64", "V": "i32",
                "smoothing": "fp32", "softcap": "fp32", "z_loss": "fp32",
            },
            configs=_kernel_configs(),
            divisible=("V",),
        ),
    ),
    bench_cases=({"M": 4096, "K": 4096, "V": 128256}, {"M": 1024, "K": 576, "V": 49152}),
    num_flops=lambda case: 4.0 * case["M"] * case["K"] * case["V"],
    num_bytes=lambda case: 6.0 * case["M"] * case["V"] + 4.0 * case["K"] * (case["V"] + case["M"]),
)  # fmt: skip
