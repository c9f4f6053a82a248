"""Gradients of parameters that a micro-batch or a whole step does not use (experts), under DeepSpeed's stages 1 to 3.

DeepSpeed 0.19 takes the first micro-batch's gradient of a step for the sum so far and adds those of the others, so what
the first did not use keeps the last step's sum. And offloaded sums go to the optimizer's memory or files only in the
hooks of the last micro-batch, so what that one did not use stays behind.
"""

from typing import Any

import torch


def settle_unused(
    optimizer: Any, trained: dict[str, torch.nn.Parameter], *, is_first: bool, is_last: bool, is_offloaded: bool
) -> None:
    """Does both, after each backward pass of a step. `optimizer` is DeepSpeed's."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _settle_stage_3(optimizer, list(trained.values()), is_first=is_first, is_last=is_last)
    elif is_offloaded:
        _settle_stages_1_and_2(optimizer, is_first=is_first, is_last=is_last)


def clear_after_step(optimizer: Any, masters: list[torch.Tensor]) -> None:
    """Stages 1 and 2 with offload: what the next step does not use has no gradient there either."""
    for flat in masters:
        assert flat.grad is not None
        flat.grad.zero_()
    optimizer.averaged_gradients.clear()


def _settle_stage_3(optimizer: Any, trained: list[Any], *, is_first: bool, is_last: bool) -> None:
    pieces = gradient_pieces(optimizer)
    if is_first:
        for param in trained:
            if param.ds_id not in optimizer._offload_boundary_param_ids:
                pieces[param.ds_id].zero_()
    if is_last and optimizer.offload_optimizer:
        gradients: dict[int, list[torch.Tensor]] = {}
        offsets: dict[int, list[int]] = {}
        done = set(optimizer.norm_for_param_grads)
        for param in trained:
            if optimizer.get_param_id(param) not in done:
                optimizer._offload_grad_partition_at_boundary(param, pieces[param.ds_id], gradients, offsets)
        optimizer._swap_out_offload_fp32_gradients(gradients, offsets)


def gradient_pieces(optimizer: Any) -> dict[int, torch.Tensor]:
    """Stage 3: this rank's fp32 sum of gradients of every parameter, by DeepSpeed's number."""
    return optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition


def _settle_stages_1_and_2(optimizer: Any, *, is_first: bool, is_last: bool) -> None:
    used = optimizer._offload_accumulated_param_ids
    if is_first:
        for number, total in optimizer.accumulated_grads_in_cpu.items():
            if number not in used:
                total.zero_()
    if is_last:
        for group, params in enumerate(optimizer.params_in_partition):
            for param in params:
                number = optimizer.get_param_id(param)
                if number in used and number not in optimizer.norm_for_param_grads:
                    _finish(optimizer, param, group)


def _finish(optimizer: Any, param: torch.nn.Parameter, group: int) -> None:
    """What the hook of the last micro-batch does with a parameter's sum."""
    if optimizer._use_compact_grad_partition_buffer(group):
        optimizer.copy_grads_in_partition(param, group)
        return
    optimizer._restore_cpu_offload_grad_to_gpu(param)
    optimizer.set_norm_for_param_grad_in_gpu(param)
    optimizer.update_offload_overflow_tracker_for_param_grad(param)
    optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)
