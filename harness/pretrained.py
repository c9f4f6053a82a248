"""Where a pre-trained model's files are, and what is read from them: config, tokenizer, safetensors. Never a pickle.

Every transformers error that a user can cause becomes one ConfigError sentence here.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from .config import Config
from .data.format import chat_template
from .errors import BurnishError, ConfigError, InfeasibleError
from .paths import check_entries, is_hub_id, resolve_path

SAFE_SUFFIXES = (".safetensors", ".safetensors.index.json")
INDEX = f"model{SAFE_SUFFIXES[1]}"
MAX_INDEX_BYTES = 10 * 2**20
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Origin:
    """A folder or hub id, and the GGUF file in it if that is what holds the weights."""

    path: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def name(self) -> str:
        """What names the weights: the folder, hub id or GGUF file."""
        return os.path.join(self.path, self.gguf_file) if self.gguf_file else self.path

    def options(self) -> dict[str, Any]:
        """Keyword arguments for every from_pretrained."""
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {name: value for name, value in given.items() if value is not None}


def quiet() -> None:
    """No progress bars and no chatter: the command line shows its own progress."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def locate(path: str, *, key: str, revision: str | None = None) -> Origin:
    """Turns model.path or model.tokenizer (`key`) into an Origin. Raises ConfigError."""
    try:
        resolved = resolve_path(path)
        folder, file = (resolved, "") if os.path.isdir(resolved) else os.path.split(resolved)
        if os.path.exists(resolved):
            check_entries(folder)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    if os.path.isdir(resolved):
        return Origin(resolved)
    if os.path.isfile(resolved):
        if not file.endswith(".gguf"):
            raise ConfigError(
                f"{key}={path}: of single files only .gguf can be loaded; give the model's folder instead"
            )
        return Origin(folder, gguf_file=file)
    if not is_hub_id(resolved):
        raise ConfigError(f"{key}={path}: a model is a folder, a .gguf file, package:NAME/FILE or a hub id")
    return Origin(resolved, revision)


def model_origin(config: Config) -> Origin | None:
    """Origin of the weights, or None where model.init makes random ones. Raises ConfigError."""
    if config.model.path is None:
        return None
    return locate(config.model.path, key="model.path", revision=config.model.revision)


def processor_origin(config: Config) -> Origin | None:
    """Where the tokenizer or image processor is: model.tokenizer, else with the model."""
    if config.model.tokenizer is None:
        return model_origin(config)
    return locate(config.model.tokenizer, key="model.tokenizer", revision=None)


@contextmanager
def explained(key: str, name: str) -> Iterator[None]:
    """Errors of transformers and the hub about `name` become ConfigError."""
    try:
        yield
    except BurnishError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InfeasibleError(f"{key}={name} does not fit into memory: {str(error).splitlines()[0]}") from error
    except Exception as error:  # a broken file or a wrong field can raise anything in there
        raise ConfigError(f"{key}={name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    lower = text.lower()
    if "trust_remote_code" in lower:
        return "it needs its own Python code; read that code and set model.trust_remote_code=true if you trust it"
    if "couldn't connect" in lower or "cannot find the requested files" in lower or "offline" in lower:
        return "no such folder, and the Hugging Face hub cannot be reached; download the model and give its folder"
    if "not a local folder and is not a valid model identifier" in lower:
        return "no such folder, and no such model on the Hugging Face hub (a private one needs `hf auth login`)"
    if "no file named model.safetensors" in lower or "does not appear to have a file named model.safetensors" in lower:
        return "it holds no .safetensors weights; pickled weights (.bin, .pt) are never loaded, convert them first"
    return text[:300] or type(error).__name__


def load_config_of_model(config: Config) -> Any:
    """The transformers config of model.path or model.init. Raises ConfigError."""
    quiet()
    if config.model.init is not None:
        fields = dict(config.model.init)
        with explained("model.init", str(fields["model_type"])):
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
    origin = model_origin(config)
    assert origin is not None
    with explained("model.path", origin.name):
        if origin.is_local and not origin.gguf_file:
            _check_size(Path(origin.path) / "config.json", MAX_CONFIG_BYTES)
        found = AutoConfig.from_pretrained(
            origin.path, trust_remote_code=config.model.trust_remote_code, **origin.options()
        )
    _check_kernels(found, name=origin.name)
    return found


def _check_size(file: Path, most: int) -> None:
    if file.is_file() and file.stat().st_size > most:
        raise ConfigError(f"{file} is larger than {most // 2**20} MiB, so it is not read")


def _check_kernels(model_config: Any, *, name: str) -> None:
    """Raises ConfigError where the model's config names code on the hub as its attention."""
    parts = [model_config, *(getattr(model_config, part, None) for part in getattr(model_config, "sub_configs", {}))]
    named = [pair for part in parts if part is not None for pair in vars(part).items()]
    for key, value in named:
        if "implementation" in key and "/" in str(value):
            raise ConfigError(
                f"model.path={name}: its config takes {key} {str(value)[:100]!r} from the hub; such code is never run"
            )


def check_files(origin: Origin, model_config: Any) -> None:
    """Refuses what could make transformers read a pickle or a file outside the model. Raises ConfigError."""
    named = getattr(model_config, "transformers_weights", None)
    if named is not None and not str(named).endswith(SAFE_SUFFIXES):
        raise ConfigError(
            f"model.path={origin.name}: config.json names the weights {named!r}; only .safetensors is loaded"
        )
    if not origin.is_local:
        index = find_file(origin, INDEX)
        if index is not None:
            _check_index(Path(index), name=origin.name)
        return
    folder = Path(origin.path)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ConfigError(
            f"model.path={origin.name} is an adapter, not a model; make one with `burnish export RUN --format merged`"
        )
    for file in folder.glob("*.index.json"):
        _check_index(file, name=origin.name)


def _check_index(index: Path, *, name: str) -> None:
    """Raises ConfigError for a shard outside the model's folder, and for one that is no safetensors file."""
    _check_size(index, MAX_INDEX_BYTES)
    with explained("model.path", str(index)):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for shard in shards:
        if not str(shard).isprintable() or set(str(shard)) & {"/", "\\"} or str(shard) in ("", ".", ".."):
            raise ConfigError(f"model.path={name}: {index.name} names a file outside the model: {shard!r}")
        if index.name.endswith(SAFE_SUFFIXES[1]) and not str(shard).endswith(".safetensors"):
            raise ConfigError(f"model.path={name}: {index.name} names {shard!r}; only .safetensors is loaded")


def load_tokenizer(config: Config) -> Any:
    """The tokenizer, padding on the right, with a pad token and the chat template in use. Raises ConfigError."""
    quiet()
    origin = processor_origin(config)
    if origin is None:
        raise ConfigError("model.tokenizer is missing: a model made by model.init has no tokenizer of its own")
    with explained("model.tokenizer" if config.model.tokenizer else "model.path", origin.name):
        tokenizer = AutoTokenizer.from_pretrained(
            origin.path, trust_remote_code=config.model.trust_remote_code, **origin.options()
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer {origin.name} has no pad, end or unknown token to fill rows with")
    tokenizer.chat_template = chat_template(tokenizer, config)
    return tokenizer


def load_json_beside_model(config: Config, file: str) -> dict[str, Any] | None:
    """A JSON file of the model's (or model.tokenizer's) folder or hub repository; None if it has none."""
    origin = processor_origin(config)
    if origin is None:
        return None
    with explained("model.path", origin.name):
        found = find_file(origin, file)
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else None


def find_file(origin: Origin, file: str) -> str | None:
    """Where a file of a model is on this machine, fetched from the hub if need be; None if the model has none."""
    if origin.is_local:
        path = os.path.join(origin.path, file)
        return path if os.path.isfile(path) else None
    return cached_file(
        origin.path,
        file,
        revision=origin.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def fingerprint_of(processor: Any) -> str:
    """sha256 of a tokenizer (its tokens, merges and chat template) or of an image processor's settings."""
    backend = getattr(processor, "backend_tokenizer", None)
    parts = [backend.to_str(), processor.chat_template] if backend is not None else [processor]
    if backend is None and hasattr(processor, "get_vocab"):  # a tokenizer written in Python
        parts = [sorted(processor.get_vocab().items()), processor.chat_template]
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()
