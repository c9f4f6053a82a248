"""Every kind of source gives its rows; every kind of damage is counted and named by file and line."""

import csv
import gzip
import json

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from burnish.harness.config import Source
from burnish.harness.data.clean import Rejected, Row
from burnish.harness.data.sources import FORMAT, find_parts, read_source
from burnish.harness.errors import ConfigError, DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer\u2028\u0085 {i} ü"} for i in range(5)]
MAX_BYTES = 2000


def read(path, *, cwd=".", task_type="causal_lm", max_row_bytes=MAX_BYTES, **fields):
    source = Source(path=str(path), **fields)
    return list(read_source(source, cwd=str(cwd), task_type=task_type, max_row_bytes=max_row_bytes))


def good(items):
    return [item.values for item in items if isinstance(item, Row)]


def pairs(items):
    return [{"prompt": values["prompt"], "completion": values["completion"]} for values in good(items)]


def bad(items):
    return [(item.kind, item.place) for item in items if isinstance(item, Rejected)]


def write_jsonl(path, rows=ROWS):
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return path


def write_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, delimiter="\t"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_of_each_format_gives_its_rows(tmp_path, name, suffix):
    WRITERS[name](tmp_path / name)
    if suffix:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(content))
    items = read(name + suffix, cwd=tmp_path)
    assert pairs(items) == ROWS
    assert bad(items) == []
    assert {values[FORMAT] for values in good(items)} == {"prompt_completion"}


def test_folders_and_globs_read_their_files_in_order(tmp_path):
    (tmp_path / "data" / "more").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "b.jsonl", ROWS[2:])
    write_jsonl(tmp_path / "data" / "a.jsonl", ROWS[:2])
    (tmp_path / "data" / "notes.log").write_text("not data")
    write_jsonl(tmp_path / "data" / ".hidden.jsonl", ROWS)
    assert pairs(read("data", cwd=tmp_path)) == ROWS
    assert pairs(read("data/*.jsonl", cwd=tmp_path)) == ROWS
    assert [item.place for item in read("data", cwd=tmp_path)][:3] == [
        "data/a.jsonl:1",
        "data/a.jsonl:2",
        "data/b.jsonl:1",
    ]


def test_a_text_file_gives_one_row_per_paragraph(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\n\n  \nthree\r\n\r\n" + b"x" * 3000 + b"\nyes\n\n\xff\n\nlast")
    items = read("a.txt", cwd=tmp_path)
    assert [(item.values["text"], item.line) for item in items if isinstance(item, Row)] == [
        ("one\ntwo", 1),
        ("three", 6),
        ("last", 13),
    ]
    assert bad(items) == [("too_large", "a.txt:8"), ("bad_encoding", "a.txt:11")]


def test_a_datasets_folder_and_its_splits_are_read(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "many")
    assert pairs(read("one", cwd=tmp_path)) == ROWS
    assert pairs(read("many", cwd=tmp_path, split="test")) == ROWS[:1]
    with pytest.raises(ConfigError, match="no split 'tets'; did you mean test"):
        read("many", cwd=tmp_path, split="tets")


@pytest.mark.parametrize("name", ["memory://burnish-test/a.jsonl", "memory://burnish-test/*.jsonl"])
def test_an_fsspec_url_is_read(name):
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS) + b"{\n"
    with fsspec.open("memory://burnish-test/a.jsonl", "wb") as file:
        file.write(content)
    items = read(name)
    assert pairs(items) == ROWS
    assert bad(items) == [("bad_json", "memory://burnish-test/a.jsonl:6")]


def test_a_missing_url_is_one_sentence():
    with pytest.raises(DataError, match="nowhere"):
        read("memory://burnish-test/nowhere.jsonl")
    with pytest.raises(ConfigError, match="nowhere"):
        read("nowhere://bucket/file.jsonl")


def test_a_file_of_an_installed_package_is_read():
    columns = {"text": "Day", "label": "Weather"}
    with pytest.raises(ConfigError, match="no column 'Day'"):
        read("package:sklearn/datasets/data/iris.csv", task_type="sequence_classification", columns=columns)


class HubBuilder:
    """What `datasets` makes of a dataset of the hub: named for the module that reads its files."""

    def download_and_prepare(self):
        self.is_prepared = True

    def as_dataset(self, *, split):
        assert self.is_prepared
        assert split == "test"
        return datasets.Dataset.from_list(ROWS)


@pytest.mark.parametrize("kind", ["json", "pandas", "webdataset"])
def test_a_hub_dataset_is_loaded_without_code_and_fails_in_one_sentence(monkeypatch, kind):
    def load(path, subset):
        if path == "owner/missing":
            raise ConnectionError("Couldn't reach 'owner/missing' on the Hub")
        assert (path, subset) == ("owner/name", "main")
        return type("Builder", (HubBuilder,), {"__module__": f"datasets.packaged_modules.{kind}.{kind}"})()

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    if kind == "json":
        assert pairs(read("owner/name", subset="main", split="test")) == ROWS
    else:
        with pytest.raises(ConfigError, match=f"files of the kind {kind}, which are not read"):
            read("owner/name", subset="main", split="test")
    with pytest.raises(DataError, match="did not give it: Couldn't reach"):
        read("owner/missing")


DAMAGE = {
    "bad_json": [
        b'{"prompt": "a", "completion": ',
        b'{"prompt": NaN, "completion": "b"}',
        b'{"prompt": "a", "completion": -Infinity}',
        b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 1000 + b"}",
        b'{"prompt": "a", "completion": "b", "n": 1e999}',
        b"'single'",
        b'{"prompt": "raw \x01 control", "completion": "b"}',
    ],
    "duplicate_key": [b'{"prompt": "a", "prompt": "c", "completion": "b"}'],
    "too_deep": [
        b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
        b"[" * 1900,
    ],
    "bad_encoding": [b'{"prompt": "\xff\xfe", "completion": "b"}', "ünïcode".encode("latin-1")],
    "too_large": [b'{"prompt": "' + b"x" * MAX_BYTES + b'", "completion": "b"}', b"y" * (MAX_BYTES * 1500)],
    "lone_surrogate": [
        b'{"prompt": "\\ud800", "completion": "b"}',
        b'{"\\udc00": 1, "prompt": "a", "completion": "b"}',
    ],
    "garbled": [
        b'{"prompt": "\\u0000\\u0000", "completion": "b"}',
        '{"prompt": "�� a", "completion": "b"}'.encode(),
    ],
    "not_an_object": [b'["a", "b"]', b"3", b"null", b'"text"'],
    "missing_column": [b'{"prompt": "a"}', b"{}"],
}


def test_each_kind_of_damage_is_counted_and_named(tmp_path):
    lines, expected = [], []
    for kind, damaged in DAMAGE.items():
        for line in damaged:
            lines.append(json.dumps(ROWS[0]).encode())
            lines.append(line)
            expected.append((kind, f"dirty.jsonl:{len(lines)}"))
    (tmp_path / "dirty.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n  \n")
    items = read("dirty.jsonl", cwd=tmp_path)
    assert bad(items) == expected
    assert pairs(items) == [ROWS[0]] * len(expected)


def test_a_huge_nesting_is_a_rejected_row_not_a_crash(tmp_path):
    deep = b"[" * 100_000 + b"]" * 100_000
    (tmp_path / "a.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + deep + b"\n")
    assert bad(read("a.jsonl", cwd=tmp_path, max_row_bytes=10**6)) == [("too_deep", "a.jsonl:2")]


def test_a_damaged_row_of_a_json_list_is_rejected_alone(tmp_path):
    row = '{"prompt": "a", "completion": "b"}'
    (tmp_path / "a.json").write_text(f'[{row}, {{"prompt": NaN, "completion": "b"}}, 3, {row}]')
    items = read("a.json", cwd=tmp_path)
    assert bad(items) == [("bad_json", "a.json:2"), ("not_an_object", "a.json:3")]
    assert len(good(items)) == 2


def test_damaged_csv_rows_are_rejected_alone(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"prompt,completion\n"
        b"a,b\n"
        b"a,b,c\n"
        b"only\n"
        b'"two\nlines",b\n'
        b"\xff,b\n" + b"x" * (MAX_BYTES * 2) + b",b\n"
        b"c,d\n"
        b'a"b,"c"d\n'
        b"e,f\n"
    )
    items = read("a.csv", cwd=tmp_path)
    assert sorted(bad(items)) == [
        ("bad_csv", "a.csv:10"),
        ("bad_encoding", "a.csv:7"),
        ("too_large", "a.csv:8"),
        ("wrong_columns", "a.csv:3"),
        ("wrong_columns", "a.csv:4"),
    ]
    assert [row["prompt"] for row in pairs(items)] == ["a", "two\nlines", "c", "e"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2", "is not JSON"),
        ("a.json", b"\xff[]", "is not JSON"),
        ("a.json", b'{"rows": []}', "list of rows"),
        ("a.parquet", b"PAR1 but not really", "no readable Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-20], "damaged"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
        ("a.csv", b"", "header"),
        ("a.csv", b"a,a\n1,2\n", "twice"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(name, cwd=tmp_path)


def test_columns_are_mapped_and_the_file_keeps_its_other_columns(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "topic": "t", "prompt": "old"}])
    items = read("a.jsonl", cwd=tmp_path, columns={"prompt": "question", "completion": "answer"})
    assert good(items) == [
        {"question": "q", "answer": "a", "topic": "t", "prompt": "q", "completion": "a", FORMAT: "prompt_completion"}
    ]


def test_an_unknown_column_is_named_with_those_there_are(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"columns.text: a.jsonl has no column 'promt'; did you mean prompt\?"):
        read("a.jsonl", cwd=tmp_path, columns={"text": "promt"})
    with pytest.raises(ConfigError, match=r"where: a.jsonl has no column 'topic' \(it has prompt, completion\)"):
        read("a.jsonl", cwd=tmp_path, where={"topic": ["x"]})
    with pytest.raises(ConfigError, match=r"format alpaca needs instruction \+ output"):
        read("a.jsonl", cwd=tmp_path, format="alpaca")


@pytest.mark.parametrize(
    ("task_type", "columns", "layout"),
    [
        ("causal_lm", ["messages", "prompt"], "chat"),
        ("causal_lm", ["conversations"], "chat"),
        ("causal_lm", ["prompt", "completion", "text"], "prompt_completion"),
        ("causal_lm", ["instruction", "input", "output"], "alpaca"),
        ("causal_lm", ["text", "label"], "text"),
        ("sequence_classification", ["prompt", "completion", "text", "label"], "classification"),
        ("image_classification", ["image", "label"], "image"),
    ],
)
def test_auto_finds_the_format_from_the_columns(tmp_path, task_type, columns, layout):
    write_jsonl(tmp_path / "a.jsonl", [dict.fromkeys(columns, "x")])
    assert [row[FORMAT] for row in good(read("a.jsonl", cwd=tmp_path, task_type=task_type))] == [layout]


def test_auto_lists_the_columns_when_none_fits(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"frage": "x", "antwort": "y"}])
    with pytest.raises(ConfigError, match="fits its columns antwort, frage"):
        read("a.jsonl", cwd=tmp_path)


def test_where_and_limit_choose_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "n": i % 3} for i in range(30)])
    items = read("a.jsonl", cwd=tmp_path, where={"n": [1, 2]}, limit=5)
    assert [row["text"] for row in good(items)] == ["t1", "t2", "t4", "t5", "t7"]
    assert [kind for kind, _ in bad(items)] == ["filtered"] * 3
    with (tmp_path / "b.csv").open("w") as file:
        file.write("text,n\na,1\nb,2\n")
    assert [row["text"] for row in good(read("b.csv", cwd=tmp_path, where={"n": [2]}))] == ["b"]


def test_a_fingerprint_changes_with_the_content(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    source = Source(path="a.jsonl")
    before = find_parts(source, str(tmp_path))[0].fingerprint()
    assert find_parts(source, str(tmp_path))[0].fingerprint() == before
    write_jsonl(tmp_path / "a.jsonl", ROWS[::-1])
    assert find_parts(source, str(tmp_path))[0].fingerprint() != before


def test_a_missing_file_is_a_config_error(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"did you mean train\.jsonl"):
        read("trian.jsonl", cwd=tmp_path)
    (tmp_path / "model.zip").write_bytes(b"")
    with pytest.raises(ConfigError, match="unknown kind of data file"):
        read("model.zip", cwd=tmp_path)
    with pytest.raises(ConfigError, match="no such built-in corpus"):
        read("stdlib:nothing", cwd=tmp_path)
