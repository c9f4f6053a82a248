"""The config of a job and the folders that it names: for the tests of what is submitted and of what travels."""

import yaml


def job_config(tmp_path, monkeypatch):
    """A config in the current folder whose data travels and whose model does not."""
    work, shared = tmp_path / "work", tmp_path / "shared"
    for folder in (work, shared / "model"):
        folder.mkdir(parents=True)
    (work / "rows.jsonl").write_text('{"text": "a"}\n')
    values = {
        "name": "tiny",
        "runs_dir": str(shared / "runs"),
        "model": {"path": str(shared / "model")},
        "task": {"type": "causal_lm"},
        "data": {"train": "rows.jsonl"},
        "adapter": {"method": "full"},
        "train": {"max_steps": 1},
        "launch": {"type": "ray", "num_workers": 2},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(work)
    return work / "config.yaml"
