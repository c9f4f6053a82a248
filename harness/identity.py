"""What a run is made of, in fingerprints: a checkpoint is resumed with the same or not at all."""

from typing import Any

from .data.store import Store
from .plan import Plan
from .pretrained import fingerprint_of


def identity(plan: Plan, *, train_store: str, base_fingerprint: str, processor: Any) -> dict[str, Any]:
    """JSON-able values under the names that a refusal uses. Where and how the run is computed does not belong here."""
    config = plan.config
    return {
        "data": Store(train_store).manifest["content_hash"],
        "tokenizer": fingerprint_of(processor),
        "base model": base_fingerprint,
        "precision": {"dtype": config.model.dtype, "quantization": config.quantization.model_dump(mode="json")},
        "model": config.model.model_dump(mode="json"),
        "adapter": config.adapter.model_dump(mode="json"),
        "optimizer": config.optimizer.name,
        "global_batch_size": config.train.global_batch_size,
        "seed": config.seed,
    }
