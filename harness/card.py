"""The model card (README.md) of a saved adapter or model. Imports no torch."""

from typing import Any

from .config import Config

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "image_classification": "image-classification",
}


def model_card(config: Config, record: dict[str, Any], *, merged: bool = False) -> str:
    """Markdown with the header that the hub reads; `record` is the content of burnish.json."""
    is_adapter = config.adapter.method in ("lora", "dora", "qlora") and not merged
    base = config.model.path or f"{(config.model.init or {}).get('model_type')} with random weights"
    header = {
        "library_name": "peft" if is_adapter else "transformers",
        "base_model": record["base"] or base,
        "pipeline_tag": PIPELINES[config.task.type],
        "tags": "[burnish]",
    }
    front = "\n".join(f"{key}: {value}" for key, value in header.items())
    labels = f"* labels: {', '.join(record['labels'])}\n" if record["labels"] else ""
    return (
        f"---\n{front}\n---\n\n# {config.name}\n\n"
        f"Fine-tuned with burnish {record['burnish']} from `{base}`.\n\n"
        f"* task: {config.task.type}\n* method: {config.adapter.method}\n* dtype: {config.model.dtype}\n"
        f"* quantization while training: {config.quantization.type}\n{labels}"
        f"* config sha256: `{record['config_sha256']}`\n* base fingerprint: `{record['base_fingerprint']}`\n\n"
        f"```python\n{_usage(config, record, is_adapter=is_adapter)}\n```\n"
    )


def _usage(config: Config, record: dict[str, Any], *, is_adapter: bool) -> str:
    auto = AUTO_CLASSES[config.task.type]
    if not is_adapter:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("THIS_FOLDER")'
    base = str(record["base"])
    source, extra, imports = f'"{base}"', "", auto
    if base.endswith(".gguf"):
        folder, _, file = base.rpartition("/")
        source, imports = f'"{folder}"', f"{auto}, GgufConfig"
        extra = f', gguf_file="{file}", quantization_config=GgufConfig(dequantize=True)'
    if record["labels"]:
        extra += f", num_labels={len(record['labels'])}"
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[config.model.dtype]
    return (
        f"from peft import PeftModel\nfrom transformers import {imports}\n\n"
        f'base = {auto}.from_pretrained({source}{extra}, dtype="{dtype}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    )
