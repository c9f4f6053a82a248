"""QLoRA with transformers, PEFT and bitsandbytes as their documents show it: `python -m …limit_peer FOLDER`.

The folder has the job and its rows; the losses and the adapter are written there. Nothing of burnish is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

LOSSES = "losses.json"


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["num_threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    torch.manual_seed(job["seed"])
    lora = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora).train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0)
    texts = [json.loads(line)["text"] for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    losses = []
    for number in job["order"]:
        batch = tokenizer(texts[number] + tokenizer.eos_token, return_tensors="pt", return_token_type_ids=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        (folder / LOSSES).write_text(json.dumps(losses))
    model.save_pretrained(folder / "adapter")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
