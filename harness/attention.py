"""Fast attention on the CPU for models of transformers: their attention calls go to `kernels.attention`.

`use_fast_attention(model)` sets the implementation NAME, which this module registers with transformers' interfaces: a
mask function, called once per forward pass, that describes the mask by one range of keys per query, and an attention
function, called by every layer. What has no such form (a mask with holes, attention dropout, position biases, sinks)
goes to transformers' own sdpa with the ordinary mask. B batch, T queries, S keys.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..kernels import native
from ..kernels.attention import allowed_keys, attention

NAME = "burnish"
NO_END = 2**31 - 1
Bounds = tuple[Tensor, Tensor]
"""First key and one past the last key, in positions of the whole sequence; both broadcast to [B, T]."""

HANDLES_MASKS = re.compile(
    r"_attn_implementation\s*(==|!=|in|not in)\s[^\n]*sdpa"  # does for sdpa, by name, what would be missed
    r"|allow_is_(causal|bidirectional)_skip=False"  # goes on to change the mask
    r"|(attention|causal)_mask\[:, :, "
)
"""Source of models that look into their masks: they keep sdpa."""


def use_fast_attention(model: nn.Module) -> bool:
    """Whether the model's attention now runs in `kernels.attention`: on the CPU, where there is a compiler, and for
    models that use sdpa through transformers' interface (or have a softcap, which sdpa has not)."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models or native.library() is None or not all(map(_can_switch, models)):
        return False
    if any(p.device.type != "cpu" or p.dtype == torch.float16 for p in model.parameters()):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    models[0].set_attn_implementation(NAME)
    return True


def _can_switch(model: PreTrainedModel) -> bool:
    """Whether one model's attention goes through the interface, and nothing in its code relies on what sdpa gets."""
    has_softcap = getattr(model.config, "attn_logit_softcapping", None) is not None
    is_supported = model._supports_sdpa if not has_softcap else not getattr(model.config, "attention_dropout", 0.0)
    chosen = model.config._attn_implementation
    if not is_supported or chosen not in ("sdpa", NAME, *(["eager"] if has_softcap else [])):
        return False
    if not model._can_set_attn_implementation():
        return False
    try:
        return not HANDLES_MASKS.search(inspect.getsource(sys.modules[type(model).__module__]))
    except (OSError, TypeError):
        return False


# What transformers' mask functions allow, read from the functions themselves. `queries` [1 or B, T] are positions.


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _bounds_of_causal(queries: Tensor) -> Bounds:
    return torch.zeros_like(queries), queries + 1


def _bounds_of_all(queries: Tensor) -> Bounds:
    return torch.zeros_like(queries), torch.full_like(queries, NO_END)


def _bounds_of_and(queries: Tensor, mask_functions: tuple[Callable[..., Any], ...]) -> Bounds | None:
    low, high = _bounds_of_all(queries)
    for function in mask_functions:
        bounds = _bounds(function, queries)
        if bounds is None:
            return None
        low, high = torch.maximum(low, bounds[0]), torch.minimum(high, bounds[1])
    return low, high


def _bounds_of_window(queries: Tensor, sliding_window: int) -> Bounds:
    return queries - sliding_window + 1, torch.full_like(queries, NO_END)


def _bounds_of_window_to_both_sides(queries: Tensor, sliding_window: int) -> Bounds:
    return queries - sliding_window, queries + sliding_window + 1


def _bounds_of_chunk(queries: Tensor, chunk_size: int, left_padding: Tensor) -> Bounds:
    start = left_padding[:, None]
    low = start + (queries - start) // chunk_size * chunk_size
    return low, low + chunk_size


def _bounds_of_document(queries: Tensor, packed_sequence_mask: Tensor) -> Bounds:
    """Documents are numbered in the order in which they follow each other."""
    numbers = packed_sequence_mask.contiguous()
    return torch.searchsorted(numbers, numbers), torch.searchsorted(numbers, numbers, right=True)


def _bounds_of_positions(queries: Tensor, mask_function: Callable[..., Any], position_ids: Tensor) -> Bounds | None:
    """Positions count from the start of each document; holds inside a document, to which another mask confines it."""
    bounds = _bounds(mask_function, position_ids)
    starts = queries - position_ids
    return None if bounds is None else (bounds[0] + starts, bounds[1] + starts)


BOUNDS: dict[str, Callable[..., Bounds | None]] = {
    "causal_mask_function": _bounds_of_causal,
    "bidirectional_mask_function": _bounds_of_all,
    "and_masks": _bounds_of_and,
    "sliding_window_overlay": _bounds_of_window,
    "sliding_window_bidirectional_overlay": _bounds_of_window_to_both_sides,
    "chunked_overlay": _bounds_of_chunk,
    "packed_sequence_mask_function": _bounds_of_document,
    "remap_positions_for_packed_sequence": _bounds_of_positions,
}
"""Functions of transformers.masking_utils, or functions that make them, whose masks are ranges."""


def _bounds(function: Callable[..., Any], queries: Tensor) -> Bounds | None:
    """None for a function that is not known."""
    name = function.__qualname__.partition(".")[0]
    if function.__module__ != causal_mask_function.__module__ or name not in BOUNDS:
        return None
    known, found = BOUNDS[name], _closure(function)
    return known(queries, **found) if set(found) == set(inspect.signature(known).parameters) - {"queries"} else None


def _bounds_of_padding(padding: Tensor) -> Bounds | None:
    """Of a 2-D mask [B, S]; None where a row has a hole."""
    count = padding.sum(-1, keepdim=True)
    first = padding.int().argmax(-1, keepdim=True)
    last = padding.shape[-1] - padding.flip(-1).int().argmax(-1, keepdim=True)
    whole = (count == 0) | (last - first == count)
    return (first, first + count) if bool(whole.all()) else None


# The mask function: once per forward pass.


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Ranges as int32 [B, 1, T, 2] (four dimensions, as transformers passes only those on unchanged); None for what
    `attend` takes from None (all keys, or causal); else sdpa's boolean mask."""
    arguments: dict[str, Any] = {
        **{"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset},
        **{"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask},
    }
    shape = (batch_size, q_length, kv_length)
    with torch.inference_mode(False):
        queries = (torch.arange(q_length, device=device) + q_offset)[None]
        ranges = None if use_vmap else _ranges(mask_function, attention_mask, queries, shape, kv_offset)
    if ranges is None:
        mask = sdpa_mask(**arguments, use_vmap=use_vmap, device=device, **options)
        ranges = None if mask is None else _ranges_of_mask(mask)
        return mask if ranges is None else ranges[:, None]
    may_skip = options.get("allow_is_causal_skip", True) or options.get("allow_is_bidirectional_skip", False)
    is_causal = mask_function is not bidirectional_mask_function
    if may_skip and q_length in (1, kv_length) and torch.equal(ranges, _uniform(*shape, is_causal, ranges.device)):
        return None
    return ranges[:, None]


def _ranges(
    function: Callable[..., Any],
    padding: Tensor | None,
    queries: Tensor,
    shape: tuple[int, int, int],
    kv_offset: int,
) -> Tensor | None:
    """[B, T, 2], None where the mask is not known to be ranges. What was read is checked at the ends of each range."""
    batch, num_queries, num_keys = shape
    bounds = _bounds(function, queries)
    if bounds is None:
        return None
    low, high = bounds[0] - kv_offset, bounds[1] - kv_offset
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + num_keys]
        padding = nn.functional.pad(padding, (0, num_keys - padding.shape[-1]))
        inside = _bounds_of_padding(padding)
        if inside is None:
            return None
        low, high = torch.maximum(low, inside[0]), torch.minimum(high, inside[1])
    low, high = (x.clamp(0, num_keys).expand(batch, num_queries) for x in (low, high))
    ranges = torch.stack([low, torch.maximum(low, high)], dim=-1).int()
    if function in (causal_mask_function, bidirectional_mask_function):
        return ranges
    return ranges if _holds(function, padding, queries, ranges, num_keys, kv_offset) else None


def _holds(
    function: Callable[..., Any],
    padding: Tensor | None,
    queries: Tensor,
    ranges: Tensor,
    num_keys: int,
    kv_offset: int,
) -> bool:
    """Whether the mask is what `ranges` say, at the ends and in the middle of every range."""
    low, high = ranges.long().unbind(-1)
    keys = torch.stack([low - 1, low, (low + high) // 2, high - 1, high], dim=-1).clamp_(0, num_keys - 1)
    expected = (keys >= low[..., None]) & (keys < high[..., None])
    rows = torch.arange(len(ranges), device=ranges.device)[:, None, None]
    found = function(rows[..., None], rows[:1, ..., None], queries[:, None, :, None], keys[:, None] + kv_offset)
    found = found.expand(len(ranges), 1, *keys.shape[1:])[:, 0]
    return torch.equal(expected, found if padding is None else found & padding[rows, keys])


def _ranges_of_mask(mask: Tensor) -> Tensor | None:
    """[B, T, 2] of a boolean mask [B, 1, T, S]; None where a row has a hole or heads differ."""
    if mask.shape[1] != 1:
        return None
    bounds = _bounds_of_padding(mask.flatten(0, 2))
    if bounds is None:
        return None
    return torch.cat(bounds, dim=-1).int().view(mask.shape[0], mask.shape[2], 2)


@functools.lru_cache(maxsize=32)
def _uniform(batch: int, num_queries: int, num_keys: int, is_causal: bool, device: torch.device) -> Tensor:
    """[B, T, 2] of all keys, or of the keys up to the query's own where there is more than one query."""
    with torch.inference_mode(False):
        ranges = torch.zeros(batch, num_queries, 2, dtype=torch.int32, device=device)
        is_causal = is_causal and num_queries > 1
        ranges[..., 1] = torch.arange(1, num_queries + 1, device=device) if is_causal else num_keys
        return ranges


# The attention function: every layer.


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Output [B, T, H, D] of query [B, H, T, D], key and value [B, Hk, S, D]; `attention_mask` is from `make_mask`."""
    if not _has_kernel(query, key, value, attention_mask, dropout, options):
        mask = attention_mask
        if mask is not None and _is_ranges(mask):
            mask = _expanded(mask, key.shape[2])
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return output
    batch, _, num_queries, head_dim = query.shape
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        ranges = _uniform(batch, num_queries, key.shape[2], is_causal, query.device)
    else:
        ranges = attention_mask[:, 0].expand(batch, num_queries, 2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = head_dim**-0.5 if scaling is None else scaling
    return attention(q, k, v, ranges, scale=scale, softcap=options.get("softcap")), None


def _has_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]
) -> bool:
    """Whether `kernels.attention` computes this call; anything else is for sdpa."""
    if dropout or (mask is not None and not _is_ranges(mask)) or query.device.type != "cpu":
        return False
    if query.shape[2] == 1 and options.get("softcap") is None:  # one new token: too little work to pay for the blocks
        return False
    if value.shape != key.shape or key.shape[0] != query.shape[0] or key.shape[-1] != query.shape[-1]:
        return False
    changes_scores = any(isinstance(x, Tensor) and x.is_floating_point() for x in options.values())  # biases, sinks
    return not changes_scores and options.get("cache") is None and not options.get("output_attentions")


def _is_ranges(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


_masks: Any = WeakTensorKeyDictionary()
"""Ranges -> the boolean mask made of them, for all layers of a forward pass."""


def _expanded(ranges: Tensor, num_keys: int) -> Tensor:
    if ranges not in _masks:
        _masks[ranges] = allowed_keys(ranges, num_keys)
    mask: Tensor = _masks[ranges]
    return mask
