"""A checkpoint is resumed with the same data, tokenizer, base model, precision, adapter and format, or not at all."""

import json

import numpy as np
import pytest
from backbones import make_config, plan_of
from burnish.harness import checkpoint
from burnish.harness.data.store import StoreWriter
from burnish.harness.errors import ConfigError
from burnish.harness.identity import identity
from burnish.harness.pretrained import fingerprint_of
from burnish.harness.tasks.image_classification import ImageProcessor
from burnish.launch.cli import main
from test_checkpoint import save
from tiny import make_tokenizer, write_config


def make_store(path, ids=(1, 2, 3)):
    if not path.exists():
        writer = StoreWriter(path)
        writer.write({"input_ids": np.array(ids, dtype=np.int32)}, 0, 3)
        writer.close()
    return str(path)


def other_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{# #}"
    return tokenizer


def with_another_token():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["another"])
    return tokenizer


CHANGES = {
    "data": {"ids": (1, 2, 4)},
    "tokenizer": {"processor": with_another_token},
    "tokenizer ": {"processor": other_template},
    "base model": {"base": "b" * 64},
    "precision": {"model__dtype": "bf16"},
    "precision ": {"quantization": {"type": "nf4"}, "adapter": {"method": "qlora", "rank": 4, "alpha": 8}},
    "adapter": {"adapter__rank": 8},
    "optimizer": {"optimizer": {"name": "sgd"}},
    "global_batch_size": {"train__global_batch_size": 8},
    "seed": {"seed": 6},
}


def identity_of(folder, *, ids=(1, 2, 3), processor=make_tokenizer, base="a" * 64, **changes):
    plan = plan_of(make_config("llama", "model", **changes), folder)
    store = make_store(folder / "-".join(map(str, ids)), ids)
    return identity(plan, train_store=store, base_fingerprint=base, processor=processor())


@pytest.mark.parametrize("changed", CHANGES)
def test_what_changed_is_named_with_both_values(tmp_path, changed):
    saved = json.loads(json.dumps(identity_of(tmp_path)))
    checkpoint.check_same(saved, identity_of(tmp_path))
    now, key = identity_of(tmp_path, **CHANGES[changed]), changed.strip()
    with pytest.raises(ConfigError, match=f"cannot resume: {key} differs from the checkpoint") as caught:
        checkpoint.check_same(saved, now)
    assert repr(saved[key]) in str(caught.value)
    assert repr(now[key]) in str(caught.value)


def test_a_checkpoint_of_another_format_is_refused_with_both_numbers(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text()) | {"format": 1}
    (path / "MANIFEST.json").write_bytes(checkpoint._manifest_bytes(manifest))
    found, _ = checkpoint.newest(tmp_path)
    with pytest.raises(ConfigError, match=f"has checkpoint format 1, this burnish reads {checkpoint.FORMAT}"):
        checkpoint.load(found, 0)


def test_image_processors_differ_where_their_settings_do():
    one, other = (ImageProcessor(image_size=size, num_channels=1, mean=(0.5,), std=(0.5,)) for size in (8, 16))
    assert fingerprint_of(one) == fingerprint_of(ImageProcessor(image_size=8, num_channels=1, mean=(0.5,), std=(0.5,)))
    assert fingerprint_of(one) != fingerprint_of(other)


def test_a_model_or_tokenizer_that_changed_in_its_folder_stops_a_resume(tmp_path, capsys):
    config = write_config(tmp_path, train__max_steps=1, checkpoint={"every_steps": 1})
    assert main(["train", str(config)]) == 0
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + bytes([content[-2] ^ 0x55]) + content[-1:])
    assert main(["train", str(config), "--resume"]) == 2
    assert "base model differs from the checkpoint" in capsys.readouterr().err
    weights.write_bytes(content)
    [template] = (tmp_path / "model").glob("*.jinja")
    template.write_text(template.read_text() + "{# #}")
    assert main(["train", str(config), "--resume"]) == 2
    assert "tokenizer differs from the checkpoint" in capsys.readouterr().err
