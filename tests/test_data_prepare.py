"""Stores survive a round trip and detect damage; preparation splits, counts, refuses and remembers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from burnish.harness import tasks
from burnish.harness.config import Config, Split
from burnish.harness.data import prepare
from burnish.harness.data.audit import audit, render
from burnish.harness.data.prepare import POLICY, Prepared, prepare_data
from burnish.harness.data.split import group_hash, make_cut
from burnish.harness.data.store import Store, StoreWriter
from burnish.harness.errors import ConfigError, DataError
from burnish.harness.tasks.causal_lm import TASK
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENIZER = tiny.make_tokenizer()


@pytest.fixture(autouse=True)
def _tiny_tokenizer(monkeypatch):
    """The real causal_lm task with the tiny tokenizer, and no model."""
    task = SimpleNamespace(**{name: getattr(TASK, name) for name in TASK.__dataclass_fields__})
    task.load_processor = lambda config: TOKENIZER
    monkeypatch.setattr(prepare, "get_task", lambda name: task if name == "causal_lm" else tasks.get_task(name))
    monkeypatch.setattr("burnish.harness.data.audit.get_task", lambda name: task)


def make_config(folder, **changes):
    changes = {"data__train": [str(folder / "rows.jsonl")], "data__split": {}, **changes}
    return Config.model_validate(tiny.run_config(folder, **changes))


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def make_rows(count, groups=7):
    return [{"prompt": f"say {i}", "completion": f"one {i}", "topic": f"topic {i % groups}"} for i in range(count)]


def examples():
    rng = np.random.default_rng(0)
    return [
        {
            "input_ids": rng.integers(0, 100, size, dtype=np.int32),
            "image": rng.random((size, 2, 3)).astype(np.float32),
            "label": np.array(size, dtype=np.int64),
        }
        for size in (3, 1, 0, 7)
    ]


def write_store(path):
    writer = StoreWriter(path)
    for number, example in enumerate(examples()):
        writer.write(example, number % 2, number)
    writer.close({"split": "train"})
    return Store(path)


def test_a_store_gives_back_what_was_written(tmp_path):
    store = write_store(tmp_path / "store")
    store.verify()
    assert len(store) == 4
    for written, read in zip(examples(), (store[i] for i in range(4)), strict=True):
        assert written.keys() == read.keys()
        for name in written:
            assert (written[name].dtype, written[name].shape) == (read[name].dtype, read[name].shape)
            assert (written[name] == read[name]).all()
    assert store.lengths.tolist() == [3, 1, 0, 7]
    assert store.num_supervised.tolist() == [0, 1, 2, 3]
    assert store.source.tolist() == [0, 1, 0, 1]
    assert store.manifest["split"] == "train"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_equal_content_has_an_equal_hash(tmp_path):
    one, other = write_store(tmp_path / "one"), write_store(tmp_path / "other")
    assert one.manifest["content_hash"] == other.manifest["content_hash"]


def test_every_flipped_byte_and_torn_file_of_a_store_is_detected(tmp_path):
    write_store(tmp_path / "store")
    for file in sorted((tmp_path / "store").glob("*.bin")):
        content = file.read_bytes()
        for broken in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content + b"\0"):
            file.write_bytes(broken)
            with pytest.raises(DataError, match=file.name):
                Store(tmp_path / "store").verify()
        file.write_bytes(content)
    Store(tmp_path / "store").verify()
    manifest = tmp_path / "store" / "MANIFEST.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(DataError, match="no complete data store"):
        Store(tmp_path / "store")


def test_an_unfinished_store_is_not_visible(tmp_path):
    writer = StoreWriter(tmp_path / "store")
    writer.write(examples()[0], 0, 1)
    assert not (tmp_path / "store").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=3, max_size=40),
    st.floats(0.01, 0.4),
    st.floats(0.01, 0.4),
    st.integers(0, 99),
)
def test_no_group_is_in_two_splits_and_each_split_has_one(sizes, validation, test, seed):
    split = Split(validation=validation, test=test, by="g", seed=seed)
    rows = [{"g": group, "n": n} for group, size in enumerate(sizes) for n in range(size)]
    cut = make_cut((group_hash(row, split) for row in rows), split, {"validation": validation, "test": test})
    homes = {}
    for row in rows:
        homes.setdefault(row["g"], set()).add(cut.split_of(row))
    assert all(len(home) == 1 for home in homes.values())
    counts = [sum(cut.split_of(row) == name for row in rows) for name in ("train", "validation", "test")]
    assert min(counts) > 0
    for count, share in zip(counts[1:], (validation, test), strict=True):
        assert count <= share * len(rows) + max(sizes)


def test_rows_are_cut_in_the_wanted_share_and_copies_stay_together():
    split = Split(validation=0.1, test=0.05)
    rows = [{"text": f"row {i // 2}"} for i in range(2000)]
    hashes = [group_hash(row, split) for row in rows]
    cut = make_cut(hashes, split, {"validation": 0.1, "test": 0.05})
    homes = [cut.split_of(row) for row in rows]
    assert (homes.count("validation"), homes.count("test")) == (200, 100)
    assert homes[::2] == homes[1::2]


def test_preparation_splits_by_group_and_counts(tmp_path):
    write_lines(tmp_path / "rows.jsonl", make_rows(70))
    split = {"validation": 0.15, "test": 0.15, "by": "topic"}
    prepared = prepare_data(make_config(tmp_path, data__split=split), str(tmp_path), "runs")
    assert {name: facts["kept"] for name, facts in prepared.counts.items()} == {
        "train": 50,
        "validation": 10,
        "test": 10,
    }
    assert prepared.first_prompt["prompt"].startswith("say ")
    assert prepared.first_prompt["reference"].startswith("one ")
    assert Prepared.from_dict(json.loads(json.dumps(prepared.to_dict()))) == prepared
    store = Store(prepared.train)
    assert prepared.counts["train"]["tokens"] == store.lengths.sum()
    assert prepared.counts["train"]["supervised"] == store.num_supervised.sum()
    digits = {"".join(TOKENIZER.decode(store[i]["input_ids"]).split()) for i in range(len(store))}
    assert len(digits) == 50


def test_a_second_preparation_reads_nothing_and_a_damaged_one_is_redone(tmp_path, monkeypatch):
    write_lines(tmp_path / "rows.jsonl", make_rows(20))
    config = make_config(tmp_path)
    first = prepare_data(config, str(tmp_path), "runs")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_build", None)
        assert prepare_data(config, str(tmp_path), "runs") == first
    file = Path(first.train) / "input_ids.data.bin"
    content = file.read_bytes()
    file.write_bytes(b"\xff" + content[1:])
    assert prepare_data(config, str(tmp_path), "runs") == first
    assert file.read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "runs/.cache").iterdir()) == [Path(first.train).parent.name]


def test_what_changes_the_examples_changes_the_folder(tmp_path):
    write_lines(tmp_path / "rows.jsonl", make_rows(20))
    folders = {prepare_data(make_config(tmp_path), str(tmp_path), "runs").train}
    same = {"data__packing": True, "optimizer__learning_rate": 1.0}
    folders.add(prepare_data(make_config(tmp_path, **same), str(tmp_path), "runs").train)
    assert len(folders) == 1
    for changes in ({"data__max_length": 32}, {"data__loss_on": "all"}, {"data__chat_template": "none"}):
        folders.add(prepare_data(make_config(tmp_path, **changes), str(tmp_path), "runs").train)
    write_lines(tmp_path / "rows.jsonl", make_rows(21))
    folders.add(prepare_data(make_config(tmp_path), str(tmp_path), "runs").train)
    assert len(folders) == 5


def test_weights_come_from_the_config(tmp_path):
    for name, count in (("rows", 4), ("more", 6)):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
    sources = [{"path": "rows.jsonl"}, {"path": "more.jsonl", "weight": 2.5}]
    prepared = prepare_data(make_config(tmp_path, data__train=sources), str(tmp_path), "runs")
    assert prepared.weights == [1.0, 2.5]
    assert Store(prepared.train).source.tolist() == [0] * 4 + [1] * 6


DIRTY = [
    *make_rows(16),
    "{broken",
    {"prompt": "a", "completion": ""},
    {"prompt": 1, "completion": "b"},
    {"prompt": "a"},
]


def test_bad_rows_are_counted_listed_and_left_out(tmp_path):
    write_lines(tmp_path / "rows.jsonl", DIRTY)
    prepared = prepare_data(make_config(tmp_path, data__max_bad_fraction=0.2), str(tmp_path), "runs")
    counts = prepared.counts["train"]
    assert (counts["rows"], counts["kept"], counts["bad"]) == (20, 16, 4)
    assert counts["rejected"] == {
        "bad_json": {"count": 1, "examples": ["rows.jsonl:17"]},
        "missing_column": {"count": 1, "examples": ["rows.jsonl:20"]},
        "empty": {"count": 1, "examples": ["rows.jsonl:18"]},
        "wrong_type": {"count": 1, "examples": ["rows.jsonl:19"]},
    }
    listed = (Path(prepared.train).parent / "rejected.jsonl").read_text().splitlines()
    assert [(json.loads(line)["kind"], json.loads(line)["line"]) for line in listed] == [
        ("bad_json", 17),
        ("empty", 18),
        ("wrong_type", 19),
        ("missing_column", 20),
    ]


def test_too_many_bad_rows_stop_with_their_places(tmp_path):
    write_lines(tmp_path / "rows.jsonl", DIRTY)
    with pytest.raises(
        DataError, match=r"4 of 20 rows \(20\.0%\).*max_bad_fraction=0\.19.*rows.jsonl:17 bad_json"
    ) as error:
        prepare_data(make_config(tmp_path, data__max_bad_fraction=0.19), str(tmp_path), "runs")
    listed = tmp_path / "runs/.cache/rejected.jsonl"
    assert str(listed) in str(error.value)
    assert len(listed.read_text().splitlines()) == 4
    assert [path.name for path in listed.parent.iterdir()] == ["rejected.jsonl"]


def test_rows_left_out_by_policy_are_not_bad(tmp_path):
    long = {"prompt": "say " * 80, "completion": "one"}
    write_lines(tmp_path / "rows.jsonl", [*make_rows(4), long])
    for truncation, kind in (("drop", "too_long"), ("right", "no_target")):
        config = make_config(tmp_path, data__truncation=truncation, data__max_bad_fraction=0)
        counts = prepare_data(config, str(tmp_path), "runs").counts["train"]
        assert (counts["kept"], counts["bad"], counts["dropped"]) == (4, 0, {kind: 1})
        assert kind in POLICY
    left = prepare_data(make_config(tmp_path, data__truncation="left"), str(tmp_path), "runs").counts["train"]
    assert (left["kept"], left["truncated"]) == (5, 1)
    with pytest.raises(DataError, match=r"rows.jsonl:5 is too long: .* tokens, data.max_length is 64"):
        prepare_data(make_config(tmp_path, data__truncation="error"), str(tmp_path), "runs")


def test_no_row_left_and_no_such_column_are_one_sentence(tmp_path):
    write_lines(tmp_path / "rows.jsonl", make_rows(4))
    source = {"path": "rows.jsonl", "where": {"topic": ["none of these"]}}
    with pytest.raises(DataError, match="no row is left \\(4 filtered\\)"):
        prepare_data(make_config(tmp_path, data__train=[source]), str(tmp_path), "runs")
    split = {"validation": 0.5, "by": "topics"}
    with pytest.raises(ConfigError, match="no column 'topics'"):
        prepare_data(make_config(tmp_path, data__split=split), str(tmp_path), "runs")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no row is left"):
        prepare_data(make_config(tmp_path), str(tmp_path), "runs")


def test_a_split_that_gets_no_row_is_refused(tmp_path):
    write_lines(tmp_path / "rows.jsonl", make_rows(1))
    with pytest.raises(DataError, match=r"data\.validation: no row is left"):
        prepare_data(make_config(tmp_path, data__split={"validation": 0.5}), str(tmp_path), "runs")


def test_packing_changes_neither_examples_nor_counts(tmp_path):
    write_lines(tmp_path / "rows.jsonl", make_rows(20))
    counts = [
        prepare_data(make_config(tmp_path, data__packing=packing), str(tmp_path), "runs").counts
        for packing in (False, True)
    ]
    assert counts[0] == counts[1]


def test_the_audit_measures_duplicates_leakage_and_what_is_learned(tmp_path):
    rows = make_rows(10)
    write_lines(tmp_path / "rows.jsonl", [*rows, rows[0], {"prompt": "SAY  1", "completion": "ONE 1"}])
    leaked = [rows[2], {"prompt": "say  3", "completion": "one 3"}, {"prompt": "say 4", "completion": "other"}]
    write_lines(tmp_path / "val.jsonl", [*leaked, {"prompt": "fresh", "completion": "new"}])
    config = make_config(tmp_path, data__validation=["val.jsonl"])
    found = audit(config, str(tmp_path), "runs")
    json.dumps(found)
    assert found["splits"]["train"]["duplicates"] == {"exact": 1, "near": 2}
    leak = found["leakage"]["validation"]
    assert (leak["exact"], leak["near"], leak["prompt"]) == (1, 2, 2)
    assert found["stop_token"] == {"share": 1.0, "tokens": ["<|end|>"]}
    assert 0 < found["splits"]["train"]["supervised_share"] < 1
    assert sum(each["count"] for each in found["splits"]["train"]["lengths"]["histogram"]) == 12
    shown = render(found)
    assert "\x1b[32mone 0<|end|>\x1b[0m" in shown
    assert "12 of 12 rows kept" in shown


def test_the_audit_does_not_let_data_steer_the_terminal(tmp_path):
    evil = {"prompt": "clear \x1b[2J the screen", "completion": "one"}
    write_lines(tmp_path / "rows.jsonl", [evil, *make_rows(3)])
    assert "\x1b[2J" not in render(audit(make_config(tmp_path), str(tmp_path), "runs"))
