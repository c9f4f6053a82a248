"""Where a run's time went: made-up runs whose buckets are known, and any records at all."""

import time

import pytest
from burnish.harness import goodput
from burnish.harness.run_dir import RunDir
from hypothesis import given, settings
from hypothesis import strategies as st

SECONDS = st.floats(0.01, 50.0)


class Diary:
    """A run that keeps its files as a real one does, and knows where the time went."""

    def __init__(self):
        self.now, self.events, self.metrics = 1e9, [], []
        self.expected = dict.fromkeys(goodput.BUCKETS, 0.0)
        self.saved = self.step = self.reached = 0
        self.begin = None

    def spend(self, bucket, seconds):
        self.now += seconds
        self.expected[bucket] += seconds

    def event(self, name, **fields):
        self.events.append({"event": name, "time": self.now, **fields})

    def open(self, bucket, seconds):
        """One attempt until it trains: planned, built, restored."""
        self.event("plan") if bucket == "other" else self.spend(bucket, seconds)
        self.spend(bucket, seconds)
        self.event("model")
        self.event("start")
        self.step = self.saved
        self.metrics = [record for record in self.metrics if self.step and record["step"] <= self.step]
        if self.step:
            self.event("resume", step=self.step)

    def train(self, num_steps, seconds):
        for _ in range(num_steps):
            self.step += 1
            self.spend("replay" if self.step <= self.reached else "train", seconds)
            self.metrics.append({"kind": "train", "step": self.step, "time": self.now})
        self.reached = max(self.reached, self.step)

    def save(self, seconds):
        self.spend("save", seconds)
        self.saved = self.step
        self.event("checkpoint", step=self.step, time_s=seconds)

    def evaluate(self, seconds):
        self.spend("other", seconds)
        self.metrics.append({"kind": "eval", "split": "validation", "step": self.step, "time": self.now})

    def fail(self, detect, wait):
        self.spend("detect", detect / 2)
        self.event("worker_failure", reasons={})
        self.spend("detect", detect / 2)
        lost = {"from_step": self.saved, "lost_steps": self.step - self.saved}
        self.event("restart", **lost, detect_s=detect, wait_s=wait)
        self.spend("wait", wait)


PARTS = st.lists(
    st.tuples(st.integers(1, 6), SECONDS, SECONDS, SECONDS, st.sampled_from(["fail", "save", "evaluate", "interrupt"])),
    max_size=12,
)


@given(PARTS)
@settings(deadline=None, max_examples=200)
def test_every_second_of_a_run_is_in_the_bucket_where_it_was_spent(parts):
    run = Diary()
    run.open("other", 3.0)
    for num_steps, one, two, three, ending in parts:
        run.train(num_steps, one)
        if ending == "fail":
            run.fail(two, three)
            run.open("restart", one)
        elif ending == "interrupt":
            run.save(two)
            run.event("interrupt")
            run.now += 1000 * three
            run.open("other", one)
        else:
            run.save(two)
            if ending == "evaluate":
                run.evaluate(three)
    found = goodput.measure(run.events, run.metrics)
    wall = sum(run.expected.values())
    assert found.wall_s == pytest.approx(wall, rel=0.01)
    for buckets in (("save",), ("detect",), ("wait",), ("restart",), ("other",), ("train", "replay")):
        known = sum(run.expected[bucket] for bucket in buckets)
        assert sum(found.seconds[bucket] for bucket in buckets) == pytest.approx(known, abs=0.01 * wall), buckets
    assert found.num_restarts == sum(part[4] == "fail" for part in parts)


def test_what_was_lost_and_repeated_is_told_from_what_was_new():
    run = Diary()
    run.open("other", 10.0)
    run.train(10, 1.0)
    run.save(0.5)
    run.train(4, 1.0)
    run.fail(2.0, 1.0)
    run.open("restart", 3.0)
    run.train(10, 1.0)
    found = goodput.measure(run.events, run.metrics)
    assert {bucket: round(seconds, 6) for bucket, seconds in found.seconds.items()} == {
        **{"train": 20.0, "save": 0.5, "detect": 2.0, "wait": 1.0, "restart": 6.0, "replay": 4.0, "other": 10.0}
    }
    assert found.goodput == pytest.approx(20 / 33.5)
    assert (found.num_restarts, found.lost_steps) == (1, 4)
    assert found.to_dict()["goodput"] == 0.597


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 50), st.floats(allow_nan=False), st.text(max_size=3))
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["time", "time_s", "step", "kind", "from_step", "lost_steps", "detect_s", "wait_s", "event"]),
        st.one_of(VALUES, st.sampled_from([*goodput.SIGNS, *goodput.ENDINGS, "restart", "train", "eval"])),
    ),
    max_size=20,
)


@given(RECORDS, RECORDS)
@settings(deadline=None, max_examples=200)
def test_no_records_are_an_error_and_no_bucket_is_negative(events, metrics):
    found = goodput.measure(events, metrics)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert found.goodput is None or 0 <= found.goodput <= 1 or found.wall_s > 1e300


def test_a_restart_says_from_where_and_what_was_lost(tmp_path):
    run = RunDir(tmp_path)
    assert goodput.restart_event(run, cause="worker 1 died")["lost_steps"] == 0
    begin = time.time() - 100
    for at, name, fields in ((0, "plan", {}), (10, "start", {}), (30, "checkpoint", {"step": 5, "time_s": 1.0})):
        run.append_jsonl(run.events_jsonl, {"event": name, "time": begin + at, **fields})
    for folder in ("step_00000005", "step_x", ".step_00000009.1.tmp"):
        (run.checkpoints / folder).mkdir(parents=True)
        (run.checkpoints / folder / "MANIFEST.json").touch()
    for step in range(1, 9):
        run.append_jsonl(run.metrics_jsonl, {"kind": "train", "step": step, "time": begin + 50 + step})
    run.log_event("worker_failure", reasons={})
    event = goodput.restart_event(run, cause="worker 1 died", wait_s=2.0)
    assert (event["event"], event["cause"], event["attempt"]) == ("restart", "worker 1 died", 1)
    assert (event["from_step"], event["lost_steps"], event["wait_s"]) == (5, 3, 2.0)
    assert event["lost_s"] == pytest.approx(70, abs=2)
    assert event["detect_s"] == pytest.approx(42, abs=2)
    assert 0 < event["goodput"] < 1
    run.append_jsonl(run.events_jsonl, event)
    assert goodput.restart_event(run, cause="again")["attempt"] == 2
