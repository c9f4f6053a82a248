"""The memory benchmark: the catalogue, rows in every state, figures, tables, the plan beside them, real probes."""

import contextlib
import io
import json
from dataclasses import replace

import pytest
from burnish.bench import bench_memory, lengths_worker, memory_cases, memory_tables, probes, published
from burnish.bench.bench_memory import BENCHMARK, planned
from burnish.bench.benchmark import Choice, Setting, completed
from burnish.bench.fit import Probe
from burnish.bench.memory_cases import GB, GIB, MIB, budget_bytes, budget_text, params_of
from burnish.bench.modes import MODES
from burnish.bench.pool import WorkerDied
from burnish.bench.runner import run
from burnish.bench.workload import Workload
from burnish.harness.models import count_parameters
from made_up import SHAPES, Machine

TINY = {
    **memory_cases.llama(64, 128, 2, 1, 1),
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}


def test_parameters_are_counted_as_the_model_has_them(tmp_path):
    for init in (TINY, TINY | {"tie_word_embeddings": False, "num_attention_heads": 2}):
        (tmp_path / "config.json").write_text(json.dumps(init))
        counts = count_parameters(Workload(model={"path": str(tmp_path)}).config())
        assert params_of(init) == counts.total - counts.trainable


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ladders_grow_and_their_names_tell_their_size(device):
    ladder = memory_cases.LADDERS[device]
    counts = [params_of(init) for init in ladder.values()]
    assert counts == sorted(counts)
    for name, count in zip(ladder, counts, strict=True):
        value = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        assert 0.75 < count / value < 1.3
        shape = ladder[name]
        assert shape["hidden_size"] % 64 == shape["intermediate_size"] % 64 == 0


def test_the_catalogue_names_every_row_before_anything_runs():
    quick, full = (BENCHMARK.items("cpu", Choice(is_quick=is_quick)) for is_quick in (True, False))
    gpu = BENCHMARK.items("cuda", Choice())
    assert [item.what["method"] for item in quick] == ["peft", "peft-gc", "burnish", "burnish-full-gc"]
    assert sum(item.cost_s for item in quick) <= 70
    assert len(full) > len(quick)
    for items in (quick, full, gpu, BENCHMARK.items("cuda", Choice(is_quick=True))):
        keys = [key for item in items for key in item.rows]
        assert len(set(keys)) == len(keys)
        assert all(item.what["method"] in MODES for item in items)
        assert json.loads(json.dumps([item.what for item in items])) == [item.what for item in items]
    assert "length · llama-8b · burnish-qlora-gc · 24 GB" in [key for item in gpu for key in item.rows]
    assert "length · llama-70b · peft-qlora-gc · 48 GB" in [key for item in gpu for key in item.rows]
    assert any(key.startswith("model · 2048 tokens · burnish-qlora-gc · ") for item in gpu for key in item.rows)


def test_budgets_as_text_and_back():
    for num_bytes, text in ((512 * MIB, "512 MiB"), (2 * GIB, "2 GiB"), (24 * GB, "24 GB")):
        assert budget_text(num_bytes) == text
        assert budget_bytes(text) == num_bytes


def test_every_published_figure_has_a_row_beside_it_and_a_source():
    gpu = BENCHMARK.items("cuda", Choice())
    places = {(item.what.get("model"), item.what["method"], b) for item in gpu for b in item.what["budgets"]}
    for one in published.CONTEXTS:
        assert (one.model, one.method, round(one.budget_gb * GB)) in places
        assert "unsloth.ai" in one.source
    fields = published.as_fields(published.contexts("llama-8b", "burnish-qlora-gc", 24 * GB))
    assert [(field["label"], field["max_tokens"]) for field in fields] == [("Unsloth", 78475)]
    assert fields[0]["source"].startswith("published: ")
    assert published.as_text(published.contexts("llama-8b", "peft-qlora-gc", 8 * GB)).endswith("out of memory")
    assert published.as_fields(published.contexts("smollm2-135m", "burnish", GIB)) is None


QUICK = Setting(device="cpu", num_threads=1, num_rounds=None, is_quick=True, say=lambda _: None)


def item_of(method, *budgets, kind="length"):
    found = memory_cases.lengths if kind == "length" else memory_cases.models
    subject = ("smollm2-135m",) if kind == "length" else ()
    return found(*subject, [method], budgets, "cpu", True)[0]


def faked(monkeypatch, machine):
    """Probes of `machine` in the place of processes."""
    monkeypatch.setattr(bench_memory, "in_fresh_processes", lambda *_: contextlib.nullcontext(machine))


def measured(monkeypatch, machine, *items):
    """A result whose methods all have the machine's peaks."""
    benchmark = replace(BENCHMARK, items=lambda *_: list(items))
    faked(monkeypatch, machine)
    return run(benchmark, QUICK, Choice())


class Forgetful(Machine):
    """A machine of several methods: a size may be asked for again."""

    def __call__(self, sizes):
        self.asked = []
        return super().__call__(sizes)


def test_rows_hold_the_curve_the_plan_and_the_answer(monkeypatch):
    result = measured(monkeypatch, Machine(SHAPES["linear"]), item_of("burnish", GIB, 2 * GIB))
    first, second = result["rows"]
    assert [row["key"] for row in result["rows"]] == [f"length · smollm2-135m · burnish · {n} GiB" for n in (1, 2)]
    assert first["probes"] == second["probes"]
    lengths = [probe["tokens"] for probe in first["probes"]]
    assert lengths == sorted(lengths)
    assert {256, 1024} <= set(lengths)
    assert first["max_tokens"] < second["max_tokens"]
    assert first["peak_bytes"] == SHAPES["linear"](first["max_tokens"]) <= GIB
    assert [one["tokens"] for one in first["predicted"]] == lengths
    assert first["predicted_parts"] == ["gradients", "master_weights", "optimizer_state", "weights"]
    for one in first["predicted"]:
        assert one["predicted_bytes"] == one["parts"]["total"] == sum(one["parts"].values()) / 2
        assert 256 * MIB < one["predicted_bytes"] < 400 * MIB
    assert json.loads(json.dumps(result["rows"])) == result["rows"]


def test_the_planner_is_asked_for_the_method_of_the_mode(monkeypatch):
    """A plan of QLoRA has quantised weights; other methods than burnish's have no plan."""
    init = memory_cases.INITS["smollm2-135m"]
    work = Workload(model={"init": init}, num_sequences=1)
    plain, quantised = (planned(mode, work) for mode in ("burnish-full-gc", "burnish-qlora-gc"))
    assert quantised["weights"] < 0.6 * plain["weights"]
    assert quantised["gradients"] == plain["gradients"]
    rows = measured(monkeypatch, Machine(SHAPES["linear"]), item_of("peft", GIB))["rows"]
    assert (rows[0]["predicted"], rows[0]["predicted_parts"]) == ([], [])


def test_figures_are_the_common_peaks_once_and_what_is_no_bound(monkeypatch):
    result = measured(monkeypatch, Machine(SHAPES["linear"]), item_of("burnish", GIB, 2 * GIB))
    found = [figure for row in result["rows"] for figure in BENCHMARK.figures(row)]
    assert [(figure.key.rpartition(" · ")[2], figure.kind, figure.better) for figure in found] == [
        ("peak at 256 tokens", "peak", "lower"),
        ("peak at 1024 tokens", "peak", "lower"),
        ("max_tokens", "count", "higher"),
        ("max_tokens", "count", "higher"),
    ]
    assert len({figure.key for figure in found}) == 4
    bound = result["rows"][1] | {"bound": "at least"}
    assert BENCHMARK.figures(bound) == []


def test_tables_of_rows_in_every_state(monkeypatch):
    """What was not measured has its state and no figure; a bound is marked; a failure has its reason once."""
    budgets = (GIB, 64 * GIB)
    machine = Forgetful(SHAPES["flat"])
    items = [item_of(method, *budgets) for method in ("peft", "burnish")]
    result = measured(monkeypatch, machine, *items)
    broken = [row["key"] for row in result["rows"] if row["key"].endswith("peft · 64 GiB")]
    rows = [
        {"key": row["key"], "state": "failed", "reason": "in a step: KeyError"} if row["key"] in broken else row
        for row in result["rows"]
    ]
    extra = [item_of("sft", GIB), item_of("peft", GIB, kind="model")]
    table, peaks, models = BENCHMARK.tables(completed(result | {"rows": rows}, extra, reason="the run was interrupted"))
    cells = {row[:2]: row[2:] for row in table.rows}
    exact = next(row for row in result["rows"] if row["key"].endswith("peft · 1 GiB"))
    assert cells["peft", "1 GiB"][0] == f"{exact['max_tokens']:,}"
    assert cells["peft", "1 GiB"][2] == "1.0x (burnish)"
    assert cells["burnish", "64 GiB"][0] == "8,192 (all)"
    assert cells["peft", "64 GiB"] == ("failed", "–", "–", "–", "–")
    assert cells["sft", "1 GiB"] == ("not measured", "–", "–", "–", "–")
    assert models.rows == [("peft", "1 GiB", "not measured", "–", "–", "–")]
    assert [row[0] for row in peaks.rows] == ["peft", "burnish"]
    notes = "\n".join(table.notes)
    assert notes.count("in a step: KeyError") == 1
    assert "the run was interrupted" not in notes
    assert "Planner: what burnish plan predicts for gradients, master weights, optimizer state, weights" in notes
    unmeasured = BENCHMARK.tables(completed(result | {"device": "cuda", "rows": []}, gpu_items(), reason=""))
    assert any("Unsloth 78,475" in row[-1] for table in unmeasured for row in table.rows)
    assert memory_tables.minimums().rows[-1] == ("405B", "237 GB", "950 GB")


def gpu_items():
    return BENCHMARK.items("cuda", Choice())


def test_the_largest_model_is_a_rung_of_the_ladder(monkeypatch):
    machine = Machine(lambda params: 100 * MIB + 3 * params)
    (row,) = measured(monkeypatch, machine, item_of("burnish", GIB, kind="model"))["rows"]
    assert (row["largest"], row["bound"]) == ("135M", "exact")
    assert row["max_params"] == params_of(memory_cases.INITS["smollm2-135m"])
    assert [probe["model"] for probe in row["probes"]] == ["50M", "135M", "360M"]
    assert all(probe["predicted_bytes"] > 2 * probe["params"] for probe in row["probes"])


def test_an_interruption_keeps_the_budgets_that_have_an_answer(monkeypatch):
    class Interrupted(Machine):
        def probe(self, size):
            if size > 2000:
                raise KeyboardInterrupt
            return super().probe(size)

    rows = measured(monkeypatch, Interrupted(SHAPES["linear"]), item_of("peft", GIB, 2 * GIB))["rows"]
    assert [row["state"] for row in rows] == ["ok", "not measured"]


def test_a_method_that_cannot_be_loaded_has_failed_and_one_without_its_package_is_not_measured(monkeypatch):
    def unloadable(sizes):
        return [Probe(size, "failed", reason="while the model was loaded: CUDA out of memory") for size in sizes]

    (row,) = measured(monkeypatch, unloadable, item_of("peft", GIB))["rows"]
    assert (row["state"], row["max_tokens"]) == ("failed", None)
    assert "while the model was loaded" in row["reason"]
    monkeypatch.setitem(MODES, "sft", replace(MODES["sft"], needs=("no_such_package",)))
    (row,) = measured(monkeypatch, unloadable, item_of("sft", GIB))["rows"]
    assert (row["state"], row["reason"]) == ("not measured", "no_such_package is not installed")


def test_only_a_death_in_a_step_for_want_of_memory_says_that_it_does_not_fit():
    for words in ("killed, most likely for want of memory", "torch.OutOfMemoryError: CUDA out of memory. Tried"):
        assert probes.ended(64, WorkerDied(words), while_doing=probes.TRAINING).state == "out of memory"
        assert probes.ended(64, WorkerDied(words), while_doing=probes.LOADING).state == "failed"
    assert probes.ended(64, WorkerDied("KeyError: 'x'"), while_doing=probes.TRAINING).state == "failed"


def test_one_process_takes_steps_of_every_length():
    """The batch has the length asked for, and the peak of an earlier step is forgotten."""
    first = Workload(model={"init": TINY}, num_sequences=1, length=32).to_dict()
    asked = [{"do": "step"}, *({"do": "step", "length": length} for length in (1024, 64)), {"do": "stop"}]
    answers = io.StringIO()
    lengths = []
    batch = lengths_worker.AnyLength.batch

    def seen(self, number, vocab_size):
        found = batch(self, number, vocab_size)
        lengths.append(found.shape[1])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths_worker.AnyLength, "batch", seen)
        lines = io.StringIO("".join(json.dumps(request) + "\n" for request in asked))
        lengths_worker.run("peft-bf16", first, lines, answers)
    built, *steps = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert lengths == [32, 1024, 64]
    assert built["num_trained"] > 0
    assert len(steps) == 3


def test_two_methods_end_to_end_in_processes_of_their_own(monkeypatch):
    """Real steps of a tiny model: each process says its peak over its own floor, and the table has both."""
    monkeypatch.setitem(memory_cases.INITS, "tiny", TINY | {"max_position_embeddings": 128})
    monkeypatch.setitem(memory_cases.COMMON_TOKENS, "cpu", (128,))
    monkeypatch.setitem(bench_memory.LENGTH_STEP, "cpu", 128)
    items = memory_cases.lengths("tiny", ["peft-bf16", "burnish"], [GIB], "cpu", True)
    result = run(replace(BENCHMARK, items=lambda *_: items), QUICK, Choice())
    for row in result["rows"]:
        assert (row["state"], row["max_tokens"], row["bound"]) == ("ok", 128, "all")
        (probe,) = row["probes"]
        assert 0 < probe["peak_bytes"] < 300 * MIB
        assert probe["floor_bytes"] > 200 * MIB
        assert probe["time_s"] > 0
    assert [row[2] for row in BENCHMARK.tables(result)[0].rows] == ["128 (all)", "128 (all)"]


def test_the_figures_of_a_largest_model_are_the_peaks_that_it_follows_from():
    """360M takes 1 % more than the budget: the next time it may fit, and nothing has changed."""
    probes = [{"model": "135M", "peak_bytes": 600}, {"model": "360M", "peak_bytes": 1010}]
    row = {"key": "model", "kind": "model", "bound": "exact", "max_params": 135, "probes": probes}
    assert [(one.key.rpartition(" ")[2], one.kind, one.value) for one in bench_memory.figures(row)] == [
        ("135M", "peak", 600),
        ("360M", "peak", 1010),
    ]
