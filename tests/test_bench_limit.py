"""The benchmark of limits: the cgroup of a command, the search, rows, both ways of QLoRA; and a run that is killed."""

import json
import os
import random
import sys
from dataclasses import replace

import pytest
import tiny
from burnish.bench import bench_limit, cgroup, document, limit_cases, limit_models, suite
from burnish.bench.bench_limit import Probe, bracket, next_limit, row
from burnish.bench.benchmark import Choice, Setting
from burnish.bench.limit_cases import OWN, PEER, Case
from burnish.bench.table import as_text
from burnish.harness.run_dir import RunDir, read_jsonl

MIB = 2**20
WHY_NOT = cgroup.missing()
needs_cgroups = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
HOLD = "x = bytearray({size}); x[::4096] = bytes(len(x[::4096])); print('held')"


def python(code):
    return [sys.executable, "-c", code]


@needs_cgroups
def test_what_needs_more_than_the_limit_is_killed_and_what_needs_less_is_not():
    held = cgroup.run_limited(python(HOLD.format(size=20 * MIB)), limit_bytes=100 * MIB, timeout_s=60)
    assert (held.exit_code, held.num_killed, held.output) == (0, 0, "held\n")
    assert 20 * MIB < held.peak_bytes <= 100 * MIB
    killed = cgroup.run_limited(python(HOLD.format(size=200 * MIB)), limit_bytes=100 * MIB, timeout_s=60)
    assert (killed.exit_code, killed.num_killed, killed.output) == (-9, 1, "")
    assert killed.peak_bytes >= 95 * MIB


@needs_cgroups
def test_a_command_that_does_not_end_is_ended_with_all_its_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    ended = cgroup.run_limited(python(code), limit_bytes=200 * MIB, timeout_s=2)
    assert ended.is_out_of_time
    assert 2 <= ended.time_s < 15
    with cgroup.cgroup(100 * MIB) as (folder, _):
        parent = folder.parent
        assert folder.is_dir()
    assert not list(parent.glob(f"burnish-{os.getpid()}-*"))


def test_where_no_cgroup_can_be_made_the_reason_and_the_way_out_are_told(monkeypatch):
    monkeypatch.setattr(cgroup, "_parents", lambda: iter(()))
    told = cgroup.missing()
    assert "no memory controller" in told
    assert "systemd-run" in told


def searched(completes, own_bytes, *, start=4000 * MIB):
    """All probes of a search over a made-up run: what it completes in, and what it holds there."""

    def probe(limit):
        state = "completed" if completes(limit) else "killed"
        return Probe(limit, state, limit, min(limit, own_bytes(limit)), 1.0, 0)

    probes = [probe(start)]
    while (limit := next_limit(probes)) is not None:
        probes.append(probe(limit))
    return probes


@pytest.mark.parametrize("needs", [300 * MIB, 1111 * MIB, 3900 * MIB])
@pytest.mark.parametrize("adapts", [False, True])
def test_the_smallest_limit_is_found_to_three_percent(needs, adapts):
    own = (lambda limit: max(needs, 0.9 * limit)) if adapts else (lambda limit: needs)
    probes = searched(lambda limit: limit >= needs, own)
    low, high = bracket(probes)
    assert low < needs <= high <= 1.031 * low
    assert len(probes) <= bench_limit.MAX_PROBES


def test_a_run_that_never_completes_is_tried_once():
    assert len(searched(lambda limit: False, lambda limit: 1)) == 1


def made(limit, state, losses):
    return Probe(limit, state, limit, limit // 2, 1.0, 0, losses, None if state == "completed" else "no room")


def test_rows_have_the_ratio_to_the_peer_and_losses_that_differ_make_them_void():
    choice = Choice(is_quick=True)
    peer, own = limit_cases.cases(choice)[0]
    assert (peer.mode, own.mode) == (PEER, OWN)
    rows = [
        row(peer, [made(1030, "completed", [2.0, 1.5, 1.0]), made(1000, "killed", [2.0])], []),
        row(own, [made(515, "completed", [2.0, 1.5, 1.001]), made(500, "killed", [2.0])], [2.0, 1.5, 1.0]),
    ]
    assert [one["state"] for one in rows] == ["ok", "ok"]
    assert rows[1]["loss_difference"] == pytest.approx(0.001, rel=1e-6)
    result = {"rows": rows, "resolution": 0.03}
    [table] = bench_limit.tables(result)
    assert [line[-1] for line in table.rows] == ["1.00", "0.50"]
    assert "0.50" in as_text(table)
    assert [bench_limit.figures(one)[0].value for one in rows] == [1030, 515]
    wrong = row(own, [made(515, "completed", [2.0, 1.6, 1.0])], [2.0, 1.5, 1.0])
    assert wrong["state"] == "void"
    none = row(own, [made(515, "killed", [])], [2.0, 1.5, 1.0])
    assert (none["state"], none["reason"]) == ("failed", "no room")
    unconfirmed = row(own, [made(515, "completed", [2.0, 1.5]), made(515, "killed", [2.0, 1.5])], [2.0, 1.5, 1.0])
    assert unconfirmed["state"] == "failed"


def test_a_search_goes_on_where_an_interrupted_one_had_the_peer(monkeypatch, tmp_path):
    item = replace(limit_cases.items("cpu", Choice())[0], before=[{"key": Case(PEER, "qlora", "1.5B", 10, 256).key}])
    item.before[0]["losses"] = [2.0] * 10
    tried = []

    def found(case, model, _setting):
        tried.append(case.mode)
        return [Probe(100, "killed", 100, 100, 1.0, 1), Probe(102, "completed", 102, 100, 1.0, 0, [2.5] * 10)]

    monkeypatch.setattr(bench_limit, "found", found)
    monkeypatch.setattr(limit_models, "checkpoint", lambda name, folder: tmp_path)
    peer, own = bench_limit.measure(item, Setting("cpu", 1, None, False, lambda text: None))
    assert (peer, tried) == (item.before[0], [OWN])
    assert own["state"] == "void"


def test_whether_a_limit_is_enough_is_answered_by_yes_or_no():
    case = Case(OWN, "qlora", "7B", num_steps=2, length=128, limit_bytes=1000)
    rows = [row(case, [made(1000, state, [2.0, 1.0])], []) for state in ("completed", "killed")]
    assert [one["state"] for one in rows] == ["ok", "ok"]
    shown = [bench_limit.tables({"rows": [one], "resolution": 0.03})[0].rows[0][4] for one in rows]
    assert shown == ["yes", "no"]


def test_it_runs_only_where_it_is_named_and_promises_the_rows_that_it_makes():
    assert "limit" not in suite.MODULES
    benchmark = suite.benchmark("limit")
    items = benchmark.items("cpu", Choice())
    assert [len(item.rows) for item in items] == [2, 1, 1]
    assert json.loads(json.dumps([dict(item.what) for item in items]))


@pytest.fixture
def small_model(tmp_path, monkeypatch):
    """A checkpoint of two small shards, and the case of a run that trains it."""
    monkeypatch.setitem(limit_cases.MODELS, "small", limit_cases.llama(64, 128, 2, 4, 2) | {"vocab_size": 1024})
    monkeypatch.setattr(limit_models, "SHARD_BYTES", 150_000)
    return limit_models.checkpoint("small", tmp_path / "models")


def test_the_checkpoint_is_whole_and_made_once(small_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    index = json.loads((small_model / limit_models.INDEX).read_text())
    assert len(set(index["weight_map"].values())) >= 2
    model, told = AutoModelForCausalLM.from_pretrained(small_model, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert index["metadata"]["total_size"] == 2 * sum(param.numel() for param in model.parameters())
    assert len(AutoTokenizer.from_pretrained(small_model)("w1 w2 <eos>")["input_ids"]) == 3
    before = (small_model / limit_models.INDEX).stat().st_mtime_ns
    limit_models.checkpoint("small", small_model.parent)
    assert (small_model / limit_models.INDEX).stat().st_mtime_ns == before


@pytest.mark.nightly
@needs_cgroups
def test_both_ways_of_qlora_take_the_same_steps_on_the_same_rows(small_model):
    setting = Setting("cpu", 1, None, True, lambda _text: None)
    found = [
        bench_limit.tried(
            Case(mode, "qlora", "small", num_steps=3, length=32),
            4 * 2**30,
            small_model,
            setting,
            timeout_s=200,
        )
        for mode in (PEER, OWN)
    ]
    assert [probe.state for probe in found] == ["completed", "completed"], found
    assert found[0].losses == pytest.approx(found[1].losses, rel=bench_limit.LOSS_TOLERANCE)
    assert all(100 * MIB < probe.peak_own_bytes < 2**30 for probe in found)
    assert not [path for path in small_model.parent.iterdir() if path.name.startswith("limit-")]


@pytest.mark.nightly
@needs_cgroups
def test_an_inline_run_that_the_kernel_kills_goes_on_with_less_and_ends_with_the_losses_of_one_started_small(tmp_path):
    """A step of the whole batch takes 350 MiB. The budget keeps the planner from seeing the limit."""
    steps = {"max_steps": 3, "global_batch_size": 1024, "micro_batch_size": 1024, "num_threads": 1}
    path = tiny.write_config(tmp_path, train=steps, memory={"budget": "64GiB"})
    draw = random.Random(0)
    texts = [" ".join(draw.choices(tiny.WORDS, k=60)) for _ in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "burnish.launch.cli", "train", str(path)]
    free = cgroup.run_limited([*command, "name=free"], limit_bytes=4096 * MIB, timeout_s=300, cwd=tmp_path)
    assert free.exit_code == 0, free.output
    limit = free.peak_own_bytes - 150 * MIB
    limited = cgroup.run_limited(command, limit_bytes=limit, timeout_s=300, cwd=tmp_path)
    assert limited.exit_code == 0, limited.output
    assert limited.num_killed >= 1
    events = [e for e in read_jsonl(tmp_path / "runs/tiny/events.jsonl") if e["event"] == "out_of_memory"]
    assert len(events) == limited.num_killed
    assert events[0]["micro_batch_size_before"] == 1024
    small = f"train.micro_batch_size={events[-1]['micro_batch_size']}"
    again = cgroup.run_limited([*command, "name=small", small], limit_bytes=4096 * MIB, timeout_s=300, cwd=tmp_path)
    assert again.exit_code == 0, again.output
    losses = {name: tiny.losses(RunDir(tmp_path / "runs" / name)) for name in ("tiny", "small")}
    assert losses["tiny"] == pytest.approx(losses["small"], rel=1e-5)
    assert len(losses["tiny"]) == 3


@needs_cgroups
def test_a_run_that_is_killed_before_training_began_says_so(tmp_path):
    """The limit is below what the libraries take: there is nothing to give up."""
    path = tiny.write_config(tmp_path)
    command = [sys.executable, "-m", "burnish.launch.cli", "train", str(path)]
    ended = cgroup.run_limited(command, limit_bytes=150 * MIB, timeout_s=200, cwd=tmp_path)
    assert ended.exit_code == 3, ended.output
    assert "killed the process for want of memory before training began" in ended.output
    assert "Traceback" not in ended.output


def test_the_readme_quotes_the_limit_of_memory_where_both_have_one():
    def limit(mode, gib):
        key = f"smallest limit · 1.5B · qlora · {mode}"
        return {"key": key, "state": "ok", "smallest_limit_bytes": gib and int(gib * 2**30)}

    for peer, words in (
        (3.25, "limit of 1.34 GiB, with transformers + PEFT + bitsandbytes under 3.25 GiB"),
        (None, ""),
    ):
        rows = [limit(OWN, 1.34), limit(PEER, peer)]
        sentence = document.figures_sentence({"cpu-1": {}, "cpu-2": {"limit": {"rows": rows}}})
        assert words in sentence
        assert ("QLoRA" in sentence) == bool(words)
