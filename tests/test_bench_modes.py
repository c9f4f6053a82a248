"""The modes of the step benchmark: each takes the same step, in this process; two side by side, in their own."""

import io
import json
from importlib import import_module

import pytest
import tiny
import torch
from burnish.bench import errands, runner
from burnish.bench.bench_step import BENCHMARK
from burnish.bench.benchmark import Choice, Setting
from burnish.bench.modes import MODES
from burnish.bench.pool import WorkerDied, open_worker
from burnish.bench.step_run import LOSS_TOLERANCE
from burnish.bench.turns import Finished, Turns, step_flops
from burnish.bench.workload import Workload
from safetensors.torch import load_file

MEBIBYTE = 2**20
STEP = {"do": "step"}
SHAPE = {"model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sides are multiples of 64: with others bitsandbytes' nf4 is wrong on a CPU."""
NUM_TRAINED = 4 * 2 * ((128 + 128) * 2 + (128 + 64) * 2 + (128 + 256) * 3)
"""Rank 4, two layers: q and o, k and v, the three of the MLP."""


def answers_of(mode, workload, *requests):
    """What the mode answers to the requests, in this process."""
    answers = io.StringIO()
    turns = Turns(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    found = MODES[mode]
    function = getattr(import_module(found.module, "burnish.bench"), found.function)
    with pytest.raises(Finished):
        function(workload, turns, **found.options)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def _restored_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def work():
    return Workload(
        model={"init": SHAPE}, num_sequences=2, length=32, rank=4, num_threads=torch.get_num_threads()
    ).for_check()


@pytest.fixture(scope="module")
def expected(work):
    """Losses of three steps: PEFT in fp32, and PEFT over nf4."""
    return {
        mode: [answer["loss"] for answer in answers_of(mode, work, STEP, STEP, STEP)[1:]]
        for mode in ("fp32", "peft-qlora-gc")
    }


OTHERS = ("fp32", "peft-qlora-gc", "hf-deepspeed", "peft-compile", "sft-liger", "unsloth", "unsloth-qlora")
"""What the others are compared with, what has a test of its own or is slow to compile, what needs a GPU."""


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in OTHERS and "malloc" not in mode])
def test_every_mode_takes_the_same_step(work, expected, mode):
    """The losses are those of PEFT in fp32, or of PEFT over the same nf4 weights; quantised weights count in full."""
    wanted = expected["peft-qlora-gc" if MODES[mode].is_quantized else "fp32"]
    built, *answers = answers_of(mode, work, STEP, STEP, STEP)
    assert built["num_trained"] == NUM_TRAINED
    assert [answer["loss"] for answer in answers] == pytest.approx(wanted, rel=LOSS_TOLERANCE)
    assert wanted[-1] < wanted[0]
    assert built["flops_per_token"] == FLOPS_PER_TOKEN


LAYER = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128
NUM_IN_FORWARD = 2 * LAYER + 128 + 256 * 128 + NUM_TRAINED
"""Layers with their norms, the last norm, the head, the adapter; not the table of the input embedding."""
FLOPS_PER_TOKEN = 4 * NUM_IN_FORWARD + 2 * NUM_TRAINED + 12 * 2 * 32 * 128


def test_nf4_is_another_model(expected):
    assert expected["fp32"][0] != pytest.approx(expected["peft-qlora-gc"][0], rel=LOSS_TOLERANCE / 4)


def test_a_tied_embedding_counts_as_the_head_that_it_is():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{name: value for name, value in SHAPE.items() if name != "model_type"})
    untied, tied = (LlamaForCausalLM(config) for config.tie_word_embeddings in (False, True))
    assert sum(p.numel() for p in untied.parameters()) > sum(p.numel() for p in tied.parameters())
    assert step_flops(untied, 0, 32) == step_flops(tied, 0, 32)


@pytest.mark.parametrize("mode", ["peft", "sft", "burnish", "peft-qlora", "burnish-qlora"])
def test_a_model_from_a_folder_gives_every_mode_the_same_weights(tmp_path_factory, mode):
    """As test_every_mode…, with weights that are loaded; nf4 is then made while they are."""
    folder = tmp_path_factory.getbasetemp() / "model of nf4"
    if not folder.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        tiny.save_model(folder)
        shape = {name: value for name, value in SHAPE.items() if name != "model_type"} | {"vocab_size": 400}
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    work = Workload(model={"path": str(folder)}, num_sequences=2, length=32, rank=4, num_threads=1).for_check()
    base = "peft-qlora-gc" if MODES[mode].is_quantized else "fp32"
    losses, wanted = ([a["loss"] for a in answers_of(name, work, STEP, STEP)[1:]] for name in (mode, base))
    assert losses == pytest.approx(wanted, rel=LOSS_TOLERANCE)


def test_a_release_takes_no_step(work):
    built, released, step = answers_of("peft-bf16", work, {"do": "release"}, STEP)
    assert "num_trained" in built
    assert released == {}
    assert step["loss"] > 0


def test_a_profile_names_operations_and_their_shapes(work):
    *_, answer = answers_of("peft-bf16", work, {"do": "profile", "rows": 40})
    assert "aten::mm" in answer["profile"]
    assert "[[" in answer["profile"]


def test_two_modes_end_to_end(tmp_path, monkeypatch):
    """Fresh processes, the check of the losses, steps in turn, the table, and everything in the JSON file."""
    model, out, lines = tiny.save_model(tmp_path / "model"), tmp_path / "result.json", []
    monkeypatch.setattr(errands, "peaks", lambda device, num_threads: {"bfloat16": {"flops_per_s": 1e12}})
    choice = Choice(modes=("peft-bf16", "burnish"), model=str(model), batch="2x32")
    result = runner.run(BENCHMARK, Setting("cpu", 1, 3, False, lines.append), choice, path=out)
    result = json.loads(out.read_text())
    assert not result["is_interrupted"]
    assert result["peaks"] == {"bfloat16": {"flops_per_s": 1e12}}
    assert [row["mode"] for row in result["rows"]] == ["peft-bf16", "burnish"]
    facts = result["rows"][0]["facts"]
    assert 3 <= len(facts["rounds"]) <= 6
    assert facts["workload"]["model"] == {"path": str(model)}
    for row in result["rows"]:
        assert row["state"] == "ok", row["reason"]
        assert len(row["losses"]) == len(facts["rounds"])
        assert len(row["times_s"]) == len(row["ratio"]["samples"]) == len(facts["counted_rounds"])
        assert len(row["warmup_times_s"]) == facts["num_warmup"]
        assert row["check_losses"][0] > row["check_losses"][-1]
        assert row["peak_bytes"] > row["floor_bytes"] > MEBIBYTE
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
        assert 0 < row["mfu"] < 1


def test_a_process_that_ends_says_why(work):
    with pytest.raises(WorkerDied, match="KeyError: 'nothing'"), open_worker("nothing", work):
        pass


def test_deepspeed_takes_the_same_step(work, expected):
    """In a process of its own: accelerate and DeepSpeed keep state in theirs."""
    with open_worker("hf-deepspeed", work) as worker:
        losses = [worker.step()["loss"] for _ in range(3)]
    assert worker.built["num_trained"] == NUM_TRAINED
    assert losses == pytest.approx(expected["fp32"], rel=LOSS_TOLERANCE)


def test_unpacked_weights_are_those_of_the_file(tmp_path):
    """The errand that turns a GGUF file into safetensors, of a folder that holds the same already."""
    model = tiny.save_model(tmp_path / "model")
    assert "model.safetensors" in errands.unpack(path=str(model), folder=str(tmp_path / "copy"))
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert errands.with_unpacked_weights(work_of(model)) == work_of(model)


def work_of(folder):
    return Workload(model={"path": str(folder)})


def test_peaks_come_from_a_process_of_their_own():
    found = errands.peaks("cpu", 1)["bfloat16"]
    assert found["flops_per_s"] > found["bytes_per_s"] > 1e8


def test_an_errand_that_fails_says_why():
    with pytest.raises(errands.ErrandFailed, match="KeyError"):
        errands.run("nothing")
