"""Results of a run on disk: saved, reloaded and compared before they are called done.

A run's own result is `adapter/` (a PEFT folder) or `model/` (a Hugging Face checkpoint). Exports are copies of it, or
the adapter merged into its base. Only safetensors and JSON are written and read.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import adapters, models
from .card import model_card
from .config import Config
from .config_hardware import Kernels
from .errors import ConfigError, SupersededError, TrainingError
from .evaluate import evaluate
from .paths import check_entries
from .plan import Plan
from .run_dir import RunDir
from .tasks import Batch, get_task
from .tasks.common import accepts, unwrap

RECORD = "burnish.json"
"""What made the result: config hash, base fingerprint, labels, method."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""How far a reloaded loss may be from the live one, relative to it; a GPU adds in another order."""
FORMATS = ("adapter", "merged")


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to be evaluated or asked."""

    model: nn.Module
    processor: Any
    config: Config
    labels: list[str] | None


def config_hash(config: Config) -> str:
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def save_final(
    plan: Plan,
    model: nn.Module,
    state: dict[str, Tensor],
    labels: list[str] | None,
    *,
    may_commit: Callable[[], bool] = lambda: True,
) -> Path:
    """Writes adapter/ or model/ of the run directory from the gathered trained weights; rank 0 only.

    The frozen weights are read again from where they came, so the live ones may be partitioned. Replaces what an
    earlier attempt left. Raises TrainingError for weights that are empty or not finite, SupersededError where
    `may_commit` says no once all is written.
    """
    run, config = RunDir(plan.run_dir), plan.config
    target = run.adapter if config.makes_adapter else run.model
    _check_finite(state)
    with _written_whole(target) as folder:
        if config.makes_adapter:
            save_file(adapters.adapter_tensors(model, state), folder / adapters.ADAPTER_WEIGHTS, {"format": "pt"})
            adapters.save_adapter_config(model, str(folder))
        else:
            _whole_model(config, state, labels).save_pretrained(folder)  # type: ignore[operator]
        models.load_processor(config).save_pretrained(folder)
        record = {
            "burnish": version("burnish"),
            "config_sha256": config_hash(config),
            "base": getattr(unwrap(model), "origin_name", None),
            "base_fingerprint": unwrap(model).base_fingerprint,
            "task": config.task.type,
            "method": config.adapter.method,
            "labels": labels,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(config, record), encoding="utf-8")
        if not may_commit():
            raise SupersededError
    return target


def _check_finite(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            what = "empty" if tensor.numel() == 0 else "not finite"
            raise TrainingError(f"the trained weight {name} is {what}, so nothing was saved; look at the loss curve")


def _whole_model(config: Config, state: dict[str, Tensor], labels: list[str] | None) -> nn.Module:
    """The model as it was loaded, with the trained tensors themselves in place of its own: no copy of them is made."""
    model = models.load_model(config, labels=labels)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    unknown = [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]
    if unknown:
        raise TrainingError(f"trained weights that the model does not have: {unknown[:3]}")
    for name, tensor in state.items():
        own[name].data = tensor.to(own[name].dtype)
    return model


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, and vanishes when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_result(config: Config, folder: Path, *, labels: list[str] | None, device: str = "cpu") -> nn.Module:
    """The trained model in eval mode, built afresh from the base and the saved result.

    Raises ConfigError if the folder is incomplete or the base is not the one that was trained on.
    """
    check_entries(folder)
    record = read_record(folder)
    if not config.makes_adapter:
        model = models.load_model(config, labels=labels, device=device, path=str(folder))
        return models.with_kernels(model, config)
    if not (folder / adapters.ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{folder} has no {adapters.ADAPTER_WEIGHTS}; a pickled adapter is never loaded")
    base = models.load_model(config, labels=labels, device=device)
    if base.base_fingerprint != record["base_fingerprint"]:
        raise ConfigError(f"{record['base']} is not the base model that {folder} was trained on: its weights differ")
    return models.with_kernels(adapters.load_adapter(base, str(folder), config), config)


def read_record(folder: Path) -> dict[str, Any]:
    """burnish.json of a result. Raises ConfigError if it is missing or broken."""
    try:
        if not (folder / RECORD).is_file():
            raise OSError("it is no file")
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder} is no result of burnish: {RECORD} cannot be read ({error})") from None


def config_of(run: RunDir, *, trusts_code: bool) -> Config:
    """The run's config. Raises ConfigError where its model brings code that nobody here has said to trust.

    A run directory may come from someone else, and its plan.json with it.
    """
    config = run.load_config()
    if config.model.trust_remote_code and not trusts_code:
        raise ConfigError(
            f"the model of {run.path} brings Python code of its own ({config.model.path}); read that code, and add "
            "--trust-remote-code to run it"
        )
    return config


def load_run(path: str | Path, *, device: str = "cpu", trusts_code: bool = False) -> LoadedRun:
    """The trained model of a run directory with its processor. Raises ConfigError if there is none."""
    run = RunDir.open(path)
    config, folder = config_of(run, trusts_code=trusts_code), run.trained_folder()
    labels = read_record(folder)["labels"]
    model = load_result(config, folder, labels=labels, device=device)
    return LoadedRun(model, models.load_processor(config), config, labels)


def prove(plan: Plan, path: Path, batch: Batch, live_loss: float, *, labels: list[str] | None) -> dict[str, float]:
    """Reloads the result into a fresh model and compares its loss on one batch: {live, reloaded, difference}.

    Raises TrainingError if they differ by more than rounding.
    """
    device = "cpu" if plan.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    model = load_result(plan.config, Path(path), labels=labels, device=device)
    reloaded = evaluate(model, [batch], get_task(plan.config.task.type), plan.config)["loss"]
    difference = abs(reloaded - live_loss)
    if not difference <= TOLERANCE[plan.config.model.dtype] * max(1.0, abs(live_loss)):
        raise TrainingError(
            f"the saved result is wrong: {path} reloads to loss {reloaded:.6f}, live it is {live_loss:.6f}"
        )
    return {"live": live_loss, "reloaded": reloaded, "difference": difference}


def export_run(run_dir: str | Path, format: str, out: str | Path, *, trusts_code: bool = False) -> dict[str, Any]:
    """Exports a run's result and returns {format, path, max_logit_difference, mean_kl, …} against the run's own model.

    adapter = the PEFT folder, merged = a Hugging Face checkpoint. Raises ConfigError if `out` is in use or the run has
    nothing of that format, TrainingError if the export does not reload to what was exported.
    """
    run, out = RunDir.open(run_dir), Path(out)
    # Others will run the export without our kernels: that is what it is compared with.
    config = config_of(run, trusts_code=trusts_code).model_copy(update={"kernels": Kernels(enabled=False)})
    source = run.trained_folder()
    if format not in EXPORTS:
        raise ConfigError(f"--format {format}: choose one of {', '.join(EXPORTS)}")
    _check_out(out)
    labels = read_record(source)["labels"]
    with _written_whole(out) as folder:
        result = EXPORTS[format](config, source, folder, labels)
    return {"format": format, "path": str(out)} | result


def _check_out(out: Path) -> None:
    """Raises ConfigError unless the folder can be new: it is not there, or empty."""
    try:
        out.lstat()
        is_new = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {str(out)[:100]!r} cannot be a folder: {error}") from None
    if not is_new:
        raise ConfigError(f"--out {out} exists and is not empty, or is no folder; choose another one")


def _export_adapter(config: Config, source: Path, folder: Path, labels: list[str] | None) -> dict[str, Any]:
    if not config.makes_adapter:
        raise ConfigError(
            f"--format adapter: the run trained whole weights (adapter.method {config.adapter.method}), so there is no "
            "adapter; use --format merged"
        )
    shutil.copytree(source, folder, dirs_exist_ok=True)
    probe = _probe(config)
    own = _logits(load_result(config, source, labels=labels), probe)
    return _compare(own, _logits(load_result(config, folder, labels=labels), probe), limit=0.0)


def _export_merged(config: Config, source: Path, folder: Path, labels: list[str] | None) -> dict[str, Any]:
    probe = _probe(config)
    model = load_result(config, source, labels=labels)
    own = _logits(model, probe)
    if config.quantization.type != "none":
        from .quantized import dequantized

        del model
        dense = dequantized(models.load_model(config, labels=labels), adapters.torch_dtype(config))
        model = adapters.load_adapter(dense, str(source), config)
    if config.makes_adapter:
        model = adapters.merge(model)
    merged = _logits(model, probe)
    model.save_pretrained(folder)  # type: ignore[operator]
    models.load_processor(config).save_pretrained(folder)
    record = read_record(source)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(config, record, merged=True), encoding="utf-8")
    del model
    auto = get_task(config.task.type).auto_class()
    reloaded = auto.from_pretrained(
        folder,
        dtype=adapters.torch_dtype(config),
        use_safetensors=True,
        trust_remote_code=config.model.trust_remote_code,
    )
    _compare(merged, _logits(reloaded, probe), limit=0.0)
    exact = config.model.dtype == "fp32" and config.quantization.type == "none"
    return _compare(own, merged, limit=1e-3 if exact else float("inf")) | {"dtype": config.model.dtype}


EXPORTS: dict[str, Callable[[Config, Path, Path, list[str] | None], dict[str, Any]]] = {
    "adapter": _export_adapter,
    "merged": _export_merged,
}


def _probe(config: Config) -> dict[str, Tensor]:
    """Random inputs that any model of the task takes: two texts of 16 tokens, or two images."""
    draw = torch.Generator().manual_seed(0)
    processor = models.load_processor(config)
    if config.task.type == "image_classification":
        shape = (2, processor.num_channels, processor.image_size, processor.image_size)
        return {"pixel_values": torch.randn(shape, generator=draw)}
    ids = torch.randint(len(processor), (2, 16), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _logits(model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    inputs: dict[str, Any] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in probe.items()}
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    return model.eval()(**inputs).logits.float()


def _compare(one: Tensor, other: Tensor, *, limit: float) -> dict[str, float]:
    """Largest difference of logits, mean KL divergence. Raises TrainingError above `limit` times the largest logit."""
    difference = float((one - other).abs().max())
    largest = float(one.abs().max())
    if not difference <= limit * largest + 1e-6:
        raise TrainingError(f"the export is wrong: its logits differ by {difference:.3g} (largest logit {largest:.3g})")
    logs = [logits.log_softmax(-1) for logits in (one, other)]
    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    return {"max_logit_difference": difference, "max_logit": largest, "mean_kl": max(kl, 0.0)}
