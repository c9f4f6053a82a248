"""The scale benchmark: collectives counted and timed on two ranks, rows, tables, and a run on Ray."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from burnish.bench import bench_scale, collectives, scale_run, scaling, turns
from burnish.bench.bench_scale import BENCHMARK, QUICK_ROUNDS, key_of
from burnish.bench.benchmark import Choice, Item, Setting, completed
from burnish.bench.collectives import Call, Recorder, loopback_bytes, waited_s
from burnish.bench.scale_cluster import Cluster, RankFailed
from burnish.bench.scale_job import Job, write_rows
from burnish.bench.scale_run import Measured, formula, row_of
from burnish.harness.traffic import Collective
from burnish.launch import processes
from distributed import on_ranks

FIELDS = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
FIELDS |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
TINY = Job("tiny", "full", 0, 2, num_sequences=2, length=16, device="cpu", init=FIELDS)
"""Matrices above and below the 100 000 elements from which ZeRO-3 partitions for good."""
NUM_TINY = 512 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256
STAGES = (0, 2, 3)
LATE_S = 0.6
ONE_BYTES = 2**22


def setting():
    return Setting(device="cpu", num_threads=2, num_rounds=2, is_quick=True, say=lambda text: None)


def run_item(item, cluster):
    return list(bench_scale.run_item(item, setting(), cluster=cluster))


# Collectives


def test_waiting_for_the_last_rank_is_no_communication():
    first = [Call("all_reduce", 8, 0.0, 1.5), Call("all_gather", 8, 2.0, 2.5)]
    last = [Call("all_reduce", 8, 1.0, 1.5), Call("all_gather", 8, 1.9, 2.5)]
    assert waited_s([first, last]) == pytest.approx([1.0, 0.1])
    with pytest.raises(ValueError, match="same collectives"):
        waited_s([first, last[:1]])


def test_the_loopback_counter_is_that_of_sent_bytes(tmp_path, monkeypatch):
    text = "Inter-|   Receive\n  eth0: 9 9 9 9 9 9 9 9 9 9\n    lo: 1 2 3 4 5 6 7 8 1234 10 0 0 0 0 0 0\n"
    (tmp_path / "dev").write_text(text)
    monkeypatch.setattr(collectives, "COUNTERS", tmp_path / "dev")
    assert loopback_bytes() == 1234
    monkeypatch.setattr(collectives, "COUNTERS", tmp_path / "absent")
    assert loopback_bytes() is None


def run_all(rank, world, folder, rows):
    """One all-reduce alone, one that rank 1 comes late to, and the tiny model at every stage."""
    import torch
    import torch.distributed as dist
    from burnish.bench.scale_worker import Rank

    found = {}
    tensor = torch.ones(ONE_BYTES // 4)
    for name, late_s in (("alone", 0.0), ("late", LATE_S)):
        dist.barrier()
        before = loopback_bytes()
        time.sleep(late_s * rank)
        with Recorder(lambda: None) as recorder:
            work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        dist.barrier()
        found[name] = recorder.calls
        found[f"{name} wire"] = (loopback_bytes() or 0) - (before or 0)
    for stage in STAGES:
        worker = Rank()
        job = replace(TINY, zero_stage=stage)
        built = worker.build(job.to_dict(), folder, rows, rank, 0)
        losses = worker.check(3)
        apart = [worker.take_apart(number) for number in range(2)]
        found[stage] = {"built": built, "losses": losses, "apart": apart, "saved_s": worker.save(folder)}
        worker.leave()
    worker = Rank()
    if rank == 0:
        worker.build_solo(TINY.to_dict(), folder, rows)
        found["alone losses"] = worker.check_solo(3, world)
        found["solo step"] = worker.step_solo(1)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    rows = write_rows(folder, TINY)
    return on_ranks(2, folder, run_all, str(folder / "run"), str(rows))


def test_an_all_reduce_alone_is_counted_and_timed(pair):
    """2 ranks send each half the tensor twice; other traffic on the machine can only add to the counter."""
    for found in pair:
        assert [(call.op, call.num_bytes) for call in found["alone"]] == [("all_reduce", ONE_BYTES)]
        assert 0 < found["alone"][0].end_s - found["alone"][0].start_s < LATE_S
    assert pair[0]["alone wire"] >= 2 * scaling.sent_bytes("all_reduce", ONE_BYTES, 2)


def test_a_late_rank_makes_the_other_wait_not_communicate(pair):
    calls = [found["late"] for found in pair]
    waited = waited_s(calls)
    assert waited[0] > 0.7 * LATE_S
    assert waited[1] < 0.3 * LATE_S
    assert sum(call.end_s - call.start_s for call in calls[0]) - waited[0] < 0.5 * LATE_S


@pytest.mark.parametrize("stage", STAGES)
def test_bytes_of_collectives_are_those_that_deepspeed_should_send(pair, stage):
    """fp32 gradients and bf16 weights, each once; the rest (loss, norm, overflow) is next to nothing."""
    assert pair[0][stage]["built"]["num_trained"] == pair[0][stage]["built"]["num_total"] == NUM_TINY
    sums = dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), 0)
    for op, num_bytes, *_ in pair[0][stage]["apart"][-1]["calls"]:
        sums[op] += num_bytes
    gradients, weights = 4 * NUM_TINY, 2 * NUM_TINY
    expected = {0: (gradients, 0, 0), 2: (gradients, weights, 0), 3: (0, weights, gradients)}[stage]
    assert tuple(sums.values()) == pytest.approx(expected, abs=256)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_worker_and_the_parts_make_up_the_step(pair, stage):
    found = [rank[stage] for rank in pair]
    assert scale_run.difference(found[0]["losses"], pair[0]["alone losses"]) is None
    fields = scale_run.split_fields([[rank["apart"][number] for rank in found] for number in range(2)])
    assert all(value >= 0 for value in fields["split"].values())
    assert fields["split"]["communication_s"] > 0
    whole = [sum(rank["apart"][number]["time_s"] for rank in found) / 2 for number in range(2)]
    assert sum(fields["split"].values()) == pytest.approx(sum(whole) / 2, rel=0.5)
    assert found[0]["saved_s"] > 0


# Rows


def measured(**changes):
    """Two workers at ZeRO-2, made up: rank 1 comes 10 ms late to one all-reduce of 0.1 s."""
    apart = [
        {"time_s": 0.5, "input_s": 0.01, "calls": [("all_reduce", 400, start, 1.11)], "loopback_bytes": 1000}
        | {"loopback_s": 0.5, "loss": 4.0}
        for start in (1.0, 1.01)
    ]
    fields = {
        "built": {"engine": "deepspeed", "num_trained": 100, "num_total": 100},
        "check_losses": [5.0, 4.9, 4.8],
        "alone_losses": [5.0, 4.9, 4.8],
        "alone": [[{"time_s": 0.2}], [{"time_s": 0.3}], [{"time_s": 0.2}]],
        "together": [[{"time_s": 0.4}, {"time_s": 0.3}]] * 3,
        "apart": [apart, apart],
        "others_cores": [0.0, 1.0, 0.5],
        "idle_bytes_per_s": 200.0,
        "small_s": [0.001] * 3,
        "large_s": [0.033554432 + 0.001] * 3,
        "checkpoint_s": 2.0,
    }
    return Measured(**fields | changes)


TWO = replace(TINY, zero_stage=2)


def test_a_row_by_hand():
    row = row_of(TWO, measured())
    assert row["state"] == "ok"
    assert row["times_s"] == [0.4] * 3
    assert row["efficiency_samples"] == pytest.approx([0.5, 0.75, 0.5])
    assert row["efficiency"] == pytest.approx(0.5)
    assert row["tokens_per_s"] == pytest.approx(64 / 0.4)
    parts = {"compute_s": 0.385, "communication_s": 0.1, "input_s": 0.01, "other_s": 0.005}
    assert row["split"] == pytest.approx(parts)
    assert row["wire_bytes"] == pytest.approx((1000 - 200 * 0.5) / 2)
    assert row["called_bytes"] == 400
    assert row["formula_bytes"] == (400 + 200) / 2
    assert row["link"] == pytest.approx({"bytes_per_s": 1e9, "latency_s": 0.0005})
    assert row["model_communication_s"] == pytest.approx(2 * 0.0005, rel=0.01)
    assert row["model_calls_s"] == pytest.approx(2 * 0.0005, rel=0.01)


def test_what_the_ranks_worked_is_not_counted_as_others(monkeypatch):
    busy = iter([10.0, 10.9])
    monkeypatch.setattr(turns, "others_s", lambda: next(busy))
    found = scale_run.others_cores(lambda: time.sleep(0.1) or 0.8)
    assert 0.1 < found <= 1.0


def test_gloo_runs_a_reduce_scatter_as_an_all_reduce():
    traffic = [Collective("reduce_scatter", 100), Collective("all_gather", 50)]
    assert scaling.traffic_bytes(scale_run.by_backend(traffic, "cpu"), 2) == 125
    assert scaling.traffic_bytes(scale_run.by_backend(traffic, "cuda"), 2) == 75


def test_losses_that_are_not_those_of_one_worker_make_the_row_void():
    for losses, word in (([5.1, 4.9, 4.8], "first loss"), ([5.0, 4.9, 4.9], "falls"), ([float("nan")] * 3, "first")):
        row = row_of(TWO, measured(check_losses=losses))
        assert row["state"] == "void"
        assert word in row["reason"]


def test_on_a_gpu_the_loopback_says_nothing():
    row = row_of(replace(TWO, device="cuda"), measured())
    assert row["wire_bytes"] is None
    assert row["called_bytes"] == 400
    assert not any("wire" in figure.key for figure in BENCHMARK.figures({"key": "k"} | row))


def test_formula_counts_the_frozen_weights_of_lora_at_stage_3():
    built = {"num_trained": 10, "num_total": 1000}
    two, three = (formula(replace(TWO, adapter="lora", zero_stage=stage), built) for stage in (2, 3))
    assert scaling.traffic_bytes(two, 2) == 30
    assert scaling.traffic_bytes(three, 2) == 2000 + 20


class FakeCluster(Cluster):
    """Fails where it is told to."""

    def __init__(self, error):
        super().__init__()
        self.error, self.is_stopped = error, False

    def grow(self, num_ranks, *, is_gpu, zero_stage):
        raise self.error

    def stop(self):
        self.is_stopped = True


def item_of(job):
    return Item(key_of(job), (key_of(job),), {"kind": "workers", "job": job.to_dict()})


def test_a_rank_that_dies_makes_a_failed_row_with_its_reason():
    rows = run_item(item_of(TWO), FakeCluster(RankFailed("a rank died")))
    assert [(row["key"], row["state"], row["reason"]) for row in rows] == [
        ("2 workers, ZeRO-2, full", "failed", "a rank died")
    ]


def test_an_interruption_ends_ray():
    cluster = FakeCluster(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_item(item_of(TWO), cluster)
    assert cluster.is_stopped


class CountingCluster(Cluster):
    """Ranks without Ray."""

    def __init__(self):
        super().__init__()
        self.num_ends = 0

    def start(self):
        pass

    def new_rank(self, *, is_gpu):
        return object()

    def call_each(self, method, arguments):
        return [None] * len(arguments)

    def end_ranks(self):
        self.num_ends += 1
        self.actors, self.num_partitioned = [], []


def test_ranks_start_anew_only_where_some_have_built_more_zero_3_models():
    cluster, ends = CountingCluster(), []
    for num_ranks, stage in ((4, 2), (4, 3), (2, 3), (1, 3), (4, 2), (2, 3), (2, 3)):
        cluster.grow(num_ranks, is_gpu=False, zero_stage=stage)
        ends.append(cluster.num_ends)
    assert ends == [0, 0, 0, 0, 0, 1, 1]
    assert len(cluster.actors) == 2


# Catalogue, figures, tables


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_catalogue_needs_no_machine(device):
    items = BENCHMARK.items(device, Choice())
    keys = [key for item in items for key in item.rows]
    assert len(keys) == len(set(keys))
    assert {"1 worker, ZeRO-0, full", "4 workers, ZeRO-3, full", "2 workers, ZeRO-2, lora"} <= set(keys)
    assert ("8 workers, ZeRO-3, full" in keys) == (device == "cuda")
    result = completed({"rows": [], "num_cores": 2, "environment": {}}, items, reason="no machine")
    tables = BENCHMARK.tables(result)
    assert len(tables) == (3 if device == "cuda" else 2)
    assert {cell for table in tables for row in table.rows for cell in row[1:]} == {"not measured", ""}
    assert len(BENCHMARK.items(device, Choice(is_quick=True))) < len(items)


def simulated():
    items = [item for item in BENCHMARK.items("cpu", Choice()) if item.what["kind"] == "simulation"]
    return [row for item in items for row in run_item(item, Cluster())]


def test_tables_and_figures_of_a_result():
    void = row_of(TWO, measured(check_losses=[9.0, 8.9, 8.8]))
    rows = [{"key": "2 workers, ZeRO-2, full"} | row_of(TWO, measured()), {"key": "2 workers, ZeRO-3, full"} | void]
    result = {"rows": [*rows, *simulated()], "num_cores": 2, "environment": {"cpu": "a processor"}}
    workers, wire, model = BENCHMARK.tables(result)
    for table in (workers, wire, model):
        assert {len(table.head)} == {len(row) for row in table.rows}
    assert workers.rows[0][8] == "50%"
    assert any("0.50 cores" in note for note in workers.notes)
    assert workers.rows[1][1:3] == ("void", "")
    assert any("first loss" in note for note in workers.notes)
    assert [row[0] for row in wire.rows] == ["2 workers, ZeRO-2, full"]
    cells = {row[0]: row[1:] for row in model.rows}
    assert cells["Llama-3 70B, full, ZeRO-3"][0] == "does not fit"
    assert cells["Llama-3 8B, full, ZeRO-3"][0].endswith("%)")
    assert any("assumed" in note for note in model.notes)
    found = [figure for row in result["rows"] if row["state"] == "ok" for figure in BENCHMARK.figures(row)]
    assert len({figure.key for figure in found}) == len(found)
    kinds = {figure.key.rpartition(" · ")[2]: (figure.kind, figure.better) for figure in found}
    assert kinds["efficiency"] == ("ratio", "higher")
    assert kinds["bytes on the wire"] == ("bytes", "lower")
    assert kinds["bytes in collectives"] == ("count", "lower")


def test_the_model_takes_the_measured_speed_where_there_is_one():
    item = next(item for item in BENCHMARK.items("cpu", Choice()) if item.what["kind"] == "simulation")
    cluster = Cluster()
    assumed = run_item(item, cluster)[0]
    cluster.flops_per_s["full"] = 2 * assumed["flops_per_s"]
    measured_row = run_item(item, cluster)[0]
    assert (assumed["is_speed_measured"], measured_row["is_speed_measured"]) == (False, True)
    assert measured_row["compute_s"] == assumed["compute_s"] / 2


# On Ray


def test_two_workers_on_ray_and_what_is_left_when_one_is_killed():
    cluster = Cluster()
    try:
        row = run_item(item_of(replace(TINY, zero_stage=3)), cluster)[0]
        assert (row["state"], row["reason"]) == ("ok", None)
        assert row["engine"] == "deepspeed"
        assert len(row["times_s"]) == setting().num_rounds < QUICK_ROUNDS
        assert row["wire_bytes"] >= 0.95 * row["backend_bytes"]
        pids = cluster.call("pid", num_ranks=2)
        os.kill(pids[1], signal.SIGKILL)
        row = run_item(item_of(TWO), cluster)[0]
        assert row["state"] == "failed"
        assert "died" in row["reason"]
        assert not cluster.actors
        folder = cluster.folder
        assert folder.exists()
    finally:
        cluster.stop()
    assert not folder.exists()
    left = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in processes.descendants(os.getpid())]
    assert not [line for line in left if b"ray" in line]
