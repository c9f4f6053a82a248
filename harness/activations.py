"""What of a forward pass is kept for backward, and where: the activation policy, and saved tensors in host memory."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .tasks.common import unwrap

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")
"""ATen operations, by the beginning of their names, whose results the selective policy keeps."""
MIN_OFFLOADED_BYTES = 2**20
"""Smaller tensors stay on the device: their copies would cost more time than they free memory."""


def _keep_matrix_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = operation.name().removeprefix("aten::").startswith(MATRIX_PRODUCTS)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_policy(model: nn.Module, policy: str) -> None:
    """none, selective (recompute all but matrix products and attention) or full (keep only the inputs of layers).

    A fused model is selective of itself: its operations keep nothing else. Non-reentrant, so that frozen embeddings
    need no detour for gradients to flow.
    """
    base: Any = unwrap(model)
    if policy == "none" or (policy == "selective" and base.fused.get("linears")):
        return
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
    enable(options)
    if hasattr(base, "disable_input_require_grads"):
        base.disable_input_require_grads()  # only re-entrant checkpointing needs what transformers has just enabled


class Offloaded(saved_tensors_hooks):
    """Inside, what autograd saves goes to host memory (pinned beside a GPU) and comes back when backward needs it.

    Parameters, views of them and tensors under `min_bytes` stay where they are. Whole checkpointed layers save only
    their inputs, so only those go. Copies run on the stream of the forward pass and of the backward pass: they are
    ordered with what writes, reads and frees the tensors. `num_bytes` adds up what went.
    """

    def __init__(self, model: nn.Module, *, min_bytes: int = MIN_OFFLOADED_BYTES) -> None:
        super().__init__(self.pack, self.unpack)
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.min_bytes, self.num_bytes = min_bytes, 0

    def pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.nbytes < self.min_bytes or self._is_parameter(tensor):
            return tensor
        self.num_bytes += tensor.nbytes
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(self, packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    def _is_parameter(self, tensor: Tensor) -> bool:
        # ZeRO-3 gathers a parameter into other memory than it had when the forward pass began.
        owner = tensor._base if tensor._is_view() else tensor
        return isinstance(owner, nn.Parameter) or tensor.untyped_storage().data_ptr() in self.parameters


def offload_activations(model: nn.Module, *, min_bytes: int = MIN_OFFLOADED_BYTES) -> None:
    """Keeps what the forward passes of the model save in host memory; the results are the same bit for bit."""
    base: Any = unwrap(model)
    forward: Callable[..., Any] = base.forward

    @wraps(forward)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with Offloaded(base, min_bytes=min_bytes):
            return forward(*args, **kwargs)

    base.forward = offloaded
