"""The partitions of DeepSpeed's ZeRO stages 1, 2 and 3: where each parameter's piece lies, gather and scatter.

DeepSpeed keeps, per parameter group, one flat fp32 tensor with this rank's part of the masters; the optimizer's state
hangs on it in the same layout. A Fragment says which elements of a parameter lie where in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .engine import Pieces, State, on_cpu, to_cpu


@dataclass(frozen=True)
class Fragment:
    """[start, start + length) of a flattened parameter is [offset, offset + length) of flat tensor number `group`."""

    group: int
    offset: int
    start: int
    length: int


def is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def flat_masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 partitions; the attribute's name differs by stage (1 with bf16, 1 and 2, 3)."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise AssertionError(type(optimizer))


LIVE = ("bit16_groups_flat", "bf16_groups_flat", "fp16_partitioned_groups_flat")
"""Attributes of DeepSpeed's optimizers with the flat tensors of live weights: stage 2, 1 with bf16, and 3."""


def partitions(optimizer: Any) -> Iterator[torch.Tensor]:
    """All flat tensors of an optimizer: masters, live weights, and sums of gradients."""
    yield from flat_masters(optimizer)
    for name in LIVE:
        yield from (flat for flat in getattr(optimizer, name, ()) if flat is not None)
    sums = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if sums is not None:
        yield sums


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


def gather_state(optimizer: Any, trained: dict[str, torch.nn.Parameter]) -> Pieces:
    """Masters and optimizer state of every trained parameter in its own shape, on the CPU of rank 0; nothing elsewhere.

    One tensor at a time, so that no rank holds more than one whole one; with one rank those are views of the
    partitions. What lies in files is read piece by piece. Collective: every rank goes to its end.
    """
    base, groups = optimizer.optimizer.state, _groups(optimizer, trained)
    is_first = dist.get_rank() == 0
    for group, flat in enumerate(flat_masters(optimizer)):
        with _in_memory(optimizer, group, is_changed=False):
            state = dict(base[flat]) if flat in base else {}
            flats = {"param": flat} | {f"optim/{key}": value for key, value in sorted(state.items())}
            for name in (name for name in trained if groups[name] == group):
                fragment = find_fragment(optimizer, trained[name])
                for key, value in flats.items():
                    if isinstance(value, torch.Tensor) and value.shape == flat.shape:
                        whole = _whole(value, trained[name], fragment, is_lasting=not _is_in_files(optimizer, group))
                        if is_first:
                            yield f"{key}/{name}", on_cpu(whole)
                    elif value is not None and is_first:
                        # DeepSpeed's AdamW counts steps in a Python integer, torch in a float tensor.
                        yield f"{key}/{name}", to_cpu(torch.as_tensor(value, dtype=torch.float32))


@contextmanager
def _in_memory(optimizer: Any, group: int, *, is_changed: bool) -> Iterator[None]:
    """Inside, the masters and the optimizer state of a group are in memory, also where they lie in files."""
    if not _is_in_files(optimizer, group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    optimizer._writeback_swap_state(group, is_changed, False)


def _is_in_files(optimizer: Any, group: int) -> bool:
    return getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(group)


def _groups(optimizer: Any, trained: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    """Flat tensor of every parameter: on this rank's own fragments or not."""
    if is_stage_3(optimizer):
        return {name: optimizer.grad_position[optimizer.get_param_id(param)][0] for name, param in trained.items()}
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    by_id = {id(param): i for i, group in enumerate(groups) for param in group}
    return {name: by_id[id(param)] for name, param in trained.items()}


def _whole(
    flat: torch.Tensor, param: torch.nn.Parameter, fragment: Fragment | None, *, is_lasting: bool
) -> torch.Tensor:
    """The whole tensor on rank 0, a view of `flat` where that has all of it and stays as it is. Collective.

    Sums bit patterns: a sum of floats would lose the sign of -0.
    """
    shape = getattr(param, "ds_shape", param.shape)
    piece = None
    if fragment is not None:
        piece = flat.detach().narrow(0, fragment.offset, fragment.length)
    if is_lasting and piece is not None and dist.get_world_size() == 1:
        return piece.view(shape)
    # Offloaded partitions are in host memory; ranks beside GPUs talk through those.
    whole = torch.zeros(shape.numel(), dtype=torch.int32, device=param.device)
    if fragment is not None and piece is not None:
        whole.narrow(0, fragment.start, fragment.length).copy_(piece.view(torch.int32))
    dist.reduce(whole, dst=0)
    return whole.view(torch.float32).view(shape)


def scatter_state(
    optimizer: Any, trained: dict[str, torch.nn.Parameter], state: State, *, has_integer_steps: bool = False
) -> None:
    """The reverse of `gather_state`: every rank takes its fragments, then the live weights follow. Collective."""
    groups = _groups(optimizer, trained)
    for group, flat in enumerate(flat_masters(optimizer)):
        names = [name for name in trained if groups[name] == group]
        with torch.no_grad(), _in_memory(optimizer, group, is_changed=True):
            moments = optimizer.optimizer.state[flat]
            for key in set(moments) - {key for name in names for key in _keys_of(state, name)}:
                del moments[key]
            for name in names:
                fragment = find_fragment(optimizer, trained[name])
                _place(flat, state[f"param/{name}"], fragment)
                for key in _keys_of(state, name):
                    value = state[f"optim/{key}/{name}"]
                    if value.ndim == 0:
                        moments[key] = int(value) if has_integer_steps else value.to(flat.device, copy=True)
                        continue
                    if key not in moments:
                        moments[key] = torch.zeros_like(flat, requires_grad=False)
                    _place(moments[key], value, fragment)
            if is_stage_3(optimizer):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
    _refresh(optimizer)


def _keys_of(state: State, name: str) -> list[str]:
    return [key.split("/")[1] for key in state if key.startswith("optim/") and key.split("/", 2)[2] == name]


def _place(flat: torch.Tensor, value: torch.Tensor, fragment: Fragment | None) -> None:
    if fragment is not None:
        piece = value.reshape(-1).narrow(0, fragment.start, fragment.length)
        flat.narrow(0, fragment.offset, fragment.length).copy_(piece)


def _refresh(optimizer: Any) -> None:
    """Copies the masters into the live weights (stage 3 has done so) and gathers what every rank holds whole."""
    if not is_stage_3(optimizer):
        optimizer.update_lp_params()
    elif optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
