"""The partitions of DeepSpeed's ZeRO stages 1, 2 and 3: where each parameter's piece lies, gather and scatter.

DeepSpeed keeps, per parameter group, one flat fp32 tensor with this rank's part of the masters; the optimizer's state
hangs on it in the same layout. A Fragment says which elements of a parameter lie where in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .engine import State, to_cpu


@dataclass(frozen=True)
class Fragment:
    """[start, start + length) of a flattened parameter is [offset, offset + length) of flat tensor number `group`."""

    group: int
    offset: int
    start: int
    length: int


def flat_masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 partitions; the attribute's name differs by stage (1 with bf16, 1 and 2, 3)."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise AssertionError(type(optimizer))


def find_fragment(optimizer: Any, param: torch.nn.Parameter) -> Fragment | None:
    """This rank's fragment of a trained parameter, None if all of it lies on other ranks."""
    if hasattr(param, "ds_id"):
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(param)]
        start = dist.get_rank() * padded
        length = min(padded, param.ds_numel - start)  # type: ignore[attr-defined]
        return Fragment(group, offset, start, length) if length > 0 else None
    mapping = param._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(mapping.param_group_index, hp.start, lp.start, hp.numel)


def gather_state(optimizer: Any, trained: dict[str, torch.nn.Parameter]) -> State | None:
    """Masters and optimizer state of every trained parameter in its own shape, on the CPU of rank 0; else None.

    One parameter at a time, so no rank holds more than one whole parameter beside rank 0's result. Collective.
    """
    masters, base = flat_masters(optimizer), optimizer.optimizer.state
    states: list[dict[str, torch.Tensor]] = [dict(base[flat]) if flat in base else {} for flat in masters]
    groups = _groups(optimizer, trained)
    result: State = {}
    for name, param in trained.items():
        fragment, group = find_fragment(optimizer, param), groups[name]
        _collect(result, f"param/{name}", masters[group], param, fragment)
        for key, value in sorted(states[group].items()):
            if value is None:
                continue
            if value.shape == masters[group].shape:
                _collect(result, f"optim/{key}/{name}", value, param, fragment)
            else:
                result[f"optim/{key}/{name}"] = to_cpu(value)
    return result if dist.get_rank() == 0 else None


def _groups(optimizer: Any, trained: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    """Flat tensor of every parameter: on this rank's own fragments or not."""
    if hasattr(optimizer, "grad_position"):
        return {name: optimizer.grad_position[optimizer.get_param_id(param)][0] for name, param in trained.items()}
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    by_id = {id(param): i for i, group in enumerate(groups) for param in group}
    return {name: by_id[id(param)] for name, param in trained.items()}


def _collect(
    result: State, name: str, flat: torch.Tensor, param: torch.nn.Parameter, fragment: Fragment | None
) -> None:
    """Puts the whole tensor into `result` on rank 0. Sums bit patterns: a sum of floats would lose the sign of -0."""
    shape = getattr(param, "ds_shape", param.shape)
    whole = torch.zeros(shape.numel(), dtype=torch.int32, device=flat.device)
    if fragment is not None:
        piece = flat.detach().narrow(0, fragment.offset, fragment.length)
        whole.narrow(0, fragment.start, fragment.length).copy_(piece.view(torch.int32))
    dist.reduce(whole, dst=0)
    if dist.get_rank() == 0:
        result[name] = to_cpu(whole.view(torch.float32).view(shape))


def scatter_state(optimizer: Any, trained: dict[str, torch.nn.Parameter], state: State) -> None:
    """The reverse of `gather_state`: every rank takes its fragments, then the live weights follow. Collective."""
    masters, base, groups = flat_masters(optimizer), optimizer.optimizer.state, _groups(optimizer, trained)
    for flat in masters:
        base.pop(flat, None)
    with torch.no_grad():
        for name, param in trained.items():
            flat, fragment = masters[groups[name]], find_fragment(optimizer, param)
            _place(flat, state[f"param/{name}"], fragment)
            for key in _keys_of(state, name):
                value = state[f"optim/{key}/{name}"]
                if value.ndim == 0:
                    base[flat][key] = value.to(flat.device, copy=True)
                    continue
                if key not in base[flat]:
                    base[flat][key] = torch.zeros_like(flat)
                _place(base[flat][key], value, fragment)
    _refresh(optimizer)


def _keys_of(state: State, name: str) -> list[str]:
    return [key.split("/")[1] for key in state if key.startswith("optim/") and key.split("/", 2)[2] == name]


def _place(flat: torch.Tensor, value: torch.Tensor, fragment: Fragment | None) -> None:
    if fragment is not None:
        piece = value.reshape(-1).narrow(0, fragment.start, fragment.length)
        flat.narrow(0, fragment.offset, fragment.length).copy_(piece)


def _refresh(optimizer: Any) -> None:
    """Copies the masters into the live weights and gathers what every rank holds whole."""
    if not hasattr(optimizer, "grad_position"):
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
