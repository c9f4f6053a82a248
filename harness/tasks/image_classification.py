"""Classification of images with a convolutional or transformer backbone.

Shape letters: B examples, C channels, S pixels per edge, Y classes. An Example is
{pixels uint8[C*S*S], label int64[1]}: resized, 0..255; scaling and normalising happen in `collate`.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import ConfigError
from . import Batch, Example, RowError, Task
from .common import (
    IGNORE,
    class_counts,
    find_labels,
    label_index,
    summarise_classes,
    summed_cross_entropy,
    to_model_device,
    unwrap,
)

IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""Others are not opened: for some, Pillow starts another program."""


@dataclass(frozen=True)
class ImageProcessor:
    """How an image becomes pixels: edge, channels, and the mean and deviation of each channel (of 0..1 values)."""

    image_size: int
    num_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json as transformers reads it."""
        fields = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.num_channels == 3,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load_processor(config: Any) -> ImageProcessor:
    """From preprocessor_config.json beside the model, the model's config and task.image_size. Raises ConfigError."""
    from ..pretrained import load_config_of_model, load_json_beside_model

    model_config = load_config_of_model(config)
    saved = load_json_beside_model(config, "preprocessor_config.json") or {}
    own_size, wanted = getattr(model_config, "image_size", None), config.task.image_size
    if wanted and own_size and wanted != own_size:
        raise ConfigError(f"task.image_size={wanted}: the model takes images of {own_size}; leave task.image_size out")
    size = wanted or own_size or _saved_size(saved.get("size")) or 224
    num_channels = getattr(model_config, "num_channels", 3)
    mean, std = saved.get("image_mean") or [0.5], saved.get("image_std") or [0.5]
    if not isinstance(size, int):
        raise ConfigError(f"task.image_size: the model's image size {size!r} is not one edge; give task.image_size")
    if any(len(values) not in (1, num_channels) for values in (mean, std)):
        raise ConfigError(
            f"preprocessor_config.json has {len(mean)} channel means, the model has {num_channels} channels"
        )
    mean, std = (tuple(values) * (num_channels // len(values)) for values in (mean, std))
    return ImageProcessor(image_size=size, num_channels=num_channels, mean=mean, std=std)


def _saved_size(size: Any) -> int | None:
    if isinstance(size, dict):
        return size.get("height") or size.get("shortest_edge")
    return size


def auto_class() -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification


def encode(row: dict[str, Any], processor: ImageProcessor, config: Any, labels: list[str]) -> Example:
    """Row {image, label}. Raises RowError."""
    label = label_index(row, labels)
    pixels = _pixels(row.get("image"), processor)
    return {"pixels": pixels.reshape(-1), "label": np.array([label], dtype=np.int64)}


def _pixels(image: Any, processor: ImageProcessor) -> np.ndarray:
    """uint8 [C, S, S] from a path, encoded bytes, a PIL image, or numbers [H, W] or [H, W, C].

    Numbers with a fraction or none above 1 are taken as 0..1, others as 0..255. Raises RowError.
    """
    values = _values(image)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.size == 0 or not np.isfinite(values).all():
        raise RowError("bad_image", f"shape {values.shape}: an image is [height, width] or [height, width, channels]")
    if values.max() > 255 or values.min() < 0:
        raise RowError("bad_image", f"values {values.min():g}..{values.max():g} are outside 0..255")
    scale = 1.0 if values.dtype.kind == "f" and values.max() <= 1 else 255.0
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).permute(2, 0, 1) / scale
    channels, wanted = tensor.shape[0], processor.num_channels
    if channels == 4:
        tensor, channels = tensor[:3], 3
    if channels == 3 and wanted == 1:
        tensor = (tensor * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    elif channels == 1:
        tensor = tensor.expand(wanted, -1, -1)
    elif channels != wanted:
        raise RowError("bad_image", f"{channels} channels, the model takes {wanted}")
    size = (processor.image_size, processor.image_size)
    if tensor.shape[1:] != size:
        tensor = interpolate(tensor[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    return (tensor * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _values(image: Any) -> np.ndarray:
    """The image's numbers in the layout it came in."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, dict):  # as in `datasets`: {bytes, path}
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise RowError("missing_column", "no column image")
    if isinstance(image, (str, bytes)):
        if isinstance(image, str) and os.path.exists(image) and not os.path.isfile(image):
            raise RowError("bad_image", f"{image[:100]} is not a file")
        try:
            image = Image.open(image if isinstance(image, str) else io.BytesIO(image), formats=IMAGE_FORMATS)
            image.load()
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise RowError("bad_image", str(error)) from None
    if isinstance(image, Image.Image):
        if image.mode.startswith("I"):  # 16 bits a pixel
            return np.asarray(image, dtype=np.float32) / 65535
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "F") else "RGB"))
    try:
        values = np.asarray(image)
    except ValueError:
        raise RowError("bad_image", "rows of different lengths") from None
    if values.dtype.kind not in "uif":
        raise RowError("wrong_type", f"image holds {values.dtype}, not numbers")
    return values


def num_supervised(example: Example) -> int:
    return int(example["label"][0] != IGNORE)


def ignore(example: Example) -> Example:
    return example | {"label": np.array([IGNORE], dtype=np.int64)}


def collate(examples: list[Example], processor: ImageProcessor, config: Any, pad_to: int | None = None) -> Batch:
    """pixel_values float32 [B, C, S, S], normalised; labels [B]."""
    shape = (processor.num_channels, processor.image_size, processor.image_size)
    pixels = torch.from_numpy(np.stack([example["pixels"] for example in examples])).view(-1, *shape)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.mean, processor.std))
    batch = {"pixel_values": (pixels.float() / 255 - mean) / std}
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([int(example["label"][0]) for example in examples])
    return batch


def _logits(model: Any, batch: Batch) -> Tensor:
    """[B, Y]"""
    pixels = batch["pixel_values"].to(next(unwrap(model).parameters()).dtype)
    return model(pixel_values=pixels).logits


def loss(model: Any, batch: Batch, config: Any) -> Tensor:
    batch = to_model_device(batch, model)
    return summed_cross_entropy(_logits(model, batch), batch["labels"], label_smoothing=config.task.label_smoothing)


@torch.no_grad()
def evaluate(model: Any, batch: Batch, config: Any) -> dict[str, Tensor]:
    """loss_sum, count and the confusion matrix, without smoothing; the model must be in eval mode."""
    batch = to_model_device(batch, model)
    return class_counts(_logits(model, batch), batch["labels"])


@torch.no_grad()
def predict(model: Any, processor: ImageProcessor, inputs: list[Any], config: Any) -> list[dict[str, Any]]:
    """{label, probability} per image; an input is a path or anything `encode` takes as an image."""
    names, answers = unwrap(model).config.id2label, []
    for image in inputs:
        batch = collate([{"pixels": _pixels(image, processor).reshape(-1)}], processor, config)
        probabilities = _logits(model, to_model_device(batch, model))[0].float().softmax(-1)
        best = int(probabilities.argmax())
        answers.append({"label": names[best], "probability": round(float(probabilities[best]), 4)})
    return answers


def prompt(row: dict[str, Any]) -> Any:
    image = row["image"]
    return image if isinstance(image, str) else np.asarray(_values(image)).tolist()


TASK = Task(
    name="image_classification",
    load_processor=load_processor,
    auto_class=auto_class,
    find_labels=find_labels,
    encode=encode,
    num_supervised=num_supervised,
    ignore=ignore,
    collate=collate,
    loss=loss,
    evaluate=evaluate,
    summarise=summarise_classes,
    predict=predict,
    prompt=prompt,
)
