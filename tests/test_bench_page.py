"""The page of the benchmarks: every plot, every state of a row, nothing from outside, and no overflow in a browser."""

import json
import math
import os
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from html import unescape

import bench_rows
import pytest
from burnish.bench import page, suite
from burnish.bench.benchmark import Benchmark, Table
from burnish.bench.labels import Label, placed
from burnish.bench.page_rows import colour_of, metric, tick, times, tokens
from burnish.bench.plots import Bar, Curve, around_one, bars, linear, logarithmic, points

EVIL = "<script>alert('x')</script>\"'&\x00"


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Benchmarks that only make tables, so that the rows here need no measurement."""

    def fake(name):
        def cells(result):
            rows = [(row["key"], row["state"]) for row in result["rows"]]
            return [Table(f"Table of {name}", ("row", "state"), rows, (f"note of {name}",))]

        return Benchmark(name, f"what {name} measures", None, None, None, None, cells)

    monkeypatch.setattr(suite, "benchmark", fake)


def svgs(html):
    """Every picture of the page, parsed as XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def figure(html, title):
    """The text and the markup of the figure with this title."""
    [found] = [part for part in re.findall(r"<figure.*?</figure>", html, re.DOTALL) if f"<b>{title}</b>" in part]
    return found


def text_of(html):
    return unescape(re.sub(r"<[^>]+>", " ", html))


def test_every_plot_is_there_and_described():
    html = page.page(bench_rows.all_results())
    titles = [unescape(title) for title in re.findall(r"<figcaption><b>(.*?)</b>", html)]
    assert titles == [
        *("burnish is faster by", "Speed against memory", "Peak memory"),
        *("Roofline", "Share of the machine's peak", "Over the frozen products"),
        *(*bench_rows.OPS, "dora_norm"),
        *("Peak memory over the length of a sequence", "Longest sequence that fits"),
        *("Peak memory over the size of the model", "Largest model that fits"),
        *(
            "Where the time of a step goes",
            "Bytes on the wire",
            "Efficiency of llama-8b: model",
            "Efficiency of llama-70b: model",
        ),
    ]
    pictures = [one for one in svgs(html) if one.get("aria-hidden") != "true"]
    assert len(pictures) > 80
    assert all(one.get("role") == "img" and len(one.get("aria-label")) > 8 for one in pictures)


def test_the_pictures_are_well_formed_and_hold_numbers_only():
    for html in (page.page(bench_rows.all_results()), page.page(damaged())):
        for one in svgs(html):
            for element in one.iter():
                written = " ".join(element.get(key, "") for key in ("d", "x", "y", "width", "height"))
                assert not re.search(r"nan|inf|None", written)
                values = [float(value) for value in re.findall(r"-?\d+\.?\d*", written)]
                assert all(-100 <= value <= 1100 for value in values), written


def damaged():
    """Results in which numbers are missing or not finite."""
    results = bench_rows.all_results()
    for result in results:
        for number, row in enumerate(result["rows"]):
            for key in list(row)[3 + number % 5 :: 4]:
                row[key] = math.nan if isinstance(row[key], float) and number % 2 else None
        result["rows"].append({"key": "bare", "state": "failed", "reason": "it died"})
    results[0] |= {"peaks": None, "environment": {}, "command": None, "time": None}
    return results


def test_the_bars_have_the_numbers_of_the_rows():
    html = page.page(bench_rows.all_results())
    [peft] = [row for row in bench_rows.step_rows() if row["key"].endswith("· peft") and row["state"] == "ok"]
    faster = figure(html, "burnish is faster by")
    median, q1, q3 = (f"{peft['faster'][key]:.2f}" for key in ("median", "q1", "q3"))
    assert f"<b>{median}×</b><i>{q1}–{q3}</i>" in faster
    [rect] = re.findall(r"<rect[^>]*class=\"fill blue\"[^>]*>", faster)
    [sft] = re.findall(r"<rect[^>]*class=\"fill green\"[^>]*>", faster)
    widths = [float(re.search(r'width="([\d.]+)"', one)[1]) for one in (rect, sft)]
    assert widths[1] / widths[0] == pytest.approx(7.29 / 3.42, rel=1e-3)
    dots = re.search(r'd="([^"]*)" class="samples blue"', faster)[1]
    assert dots.count("h0") == len(peft["faster"]["samples"])
    assert "3.78 GiB" in figure(html, "Peak memory")
    assert "12.60×" in figure(html, "adapter_adamw")
    assert "2.44×" in figure(html, "Over the frozen products")


def test_the_headlines_are_computed_from_the_rows():
    html = page.page(bench_rows.all_results())
    found = dict(re.findall(r'<div class="tile"><small>(.*?)</small><b>(.*?)</b>', html))
    assert found == {
        "Speed-up over PEFT as installed": "3.66×",
        "Speed-up over TRL&#x27;s SFTTrainer": "7.80×",
        "Memory, of PEFT&#x27;s": "38%",
        "Fastest operations": "15 of 15",
        "Longer sequences": "4.00×",
        "Efficiency of 4 workers": "70% – 82%",
    }
    slower = bench_rows.kernel_rows()
    slower[0]["ratio"]["compiled"]["median"] = 0.9
    assert "<b>14 of 15</b>" in page.page([bench_rows.result("kernels", slower)])


def test_a_void_row_is_named_with_its_reason_and_has_no_bar():
    html = page.page(bench_rows.all_results())
    faster = figure(html, "burnish is faster by")
    assert "void: its first loss differs by 0.04, allowed is 0.002" in text_of(faster)
    assert faster.count("<rect") == len(bench_rows.MODES)
    alone = figure(html, "dora_norm")
    assert "void: the gradient of x is 0.3 off" in text_of(alone)
    assert "<rect" not in alone
    assert "dora_norm" not in figure(html, "Share of the machine&#x27;s peak")
    assert "1 not measured: needs a GPU" in html
    assert "Liger-Kernel (needs a GPU)" in html


def test_what_was_not_measured_here_says_so():
    html = page.page(bench_rows.all_results())
    assert "a model, not a measurement" in html
    assert html.count("Model: each GPU computes at 400 TFLOP/s (assumed).") == 2
    assert "Where a curve is missing, it does not fit: ZeRO 0." in html
    peaks = figure(html, "Peak memory over the length of a sequence")
    assert "Unsloth, published: 3,000 tokens in 3 GiB; published: a made-up page" in text_of(peaks)
    assert "Unsloth, published" in figure(html, "Longest sequence that fits")
    assert "what burnish plan predicts" in peaks
    rows = [bench_rows.row(f"row {n}", "not measured", f"reason {n}") for n in range(5)]
    many = page.page([bench_rows.result("kernels", rows)])
    assert "5 not measured: several reasons" in many
    assert "row 4: reason 4" in many


@pytest.mark.parametrize("state", ["void", "failed", "not measured"])
def test_a_result_without_a_good_row_has_no_plot_of_numbers(state):
    for result in bench_rows.all_results():
        for row in result["rows"]:
            row |= {"state": state, "reason": "no reason"}
        html = page.page([result])
        assert "<rect" not in html
        assert 'class="dots' not in html
        assert "no reason" in html
        assert '<div class="tile"' not in html


def test_any_benchmark_may_be_absent_and_machines_have_a_part_each():
    assert "There is no result to show." in page.page([])
    for result in bench_rows.all_results():
        html = page.page([result])
        assert html.count("<h2>") == 2
        assert f"Table of {result['benchmark']}" in html
    other = bench_rows.all_results(hardware="nvidia-made-up")
    html = page.page([*bench_rows.all_results(), *other])
    assert "<h2>cpu-2-made-up</h2>" in html
    assert "<h2>nvidia-made-up</h2>" in html
    assert html.count("<b>Roofline</b>") == 2
    anchors = re.findall(r' id="([^"]*)"', html)
    assert len(anchors) == len(set(anchors)) == 8
    assert {f"#{anchor}" for anchor in anchors} == set(re.findall(r'href="([^"]*)"', html))


def test_the_page_needs_nothing_from_outside_and_runs_no_script():
    html = page.page(bench_rows.all_results())
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|form)\b", html)
    assert not re.search(r"\s(src|srcset|on\w+|action|xlink:href)=", html)
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_hostile_text_stays_text():
    results = bench_rows.all_results(hardware=EVIL, command=[EVIL], time=EVIL)
    for result in results:
        result["environment"] = dict.fromkeys(bench_rows.ENVIRONMENT, EVIL) | {"libraries": {"torch": EVIL}}
        for row in result["rows"]:
            row |= {
                key: EVIL for key in ("key", "op", "case", "mode", "model", "label", "method", "reason") if key in row
            }
            row["facts"] = {"workload": {"length": EVIL, "rank": EVIL}}
    results.append(bench_rows.result(EVIL, []))
    html = page.page(results)
    assert "<script" not in html
    assert "\x00" not in html
    assert svgs(html)


def test_doubts_are_said():
    [result, *_] = bench_rows.all_results()
    assert "Quick, of smaller shapes" in page.page([result])
    sure = result | {"is_quick": False}
    assert 'class="notes"' not in page.page([sure])
    assert "interrupted" in page.page([sure | {"is_interrupted": True}])
    assert "other processes used up to 0.40 cores" in page.page([sure | {"others_cores": 0.4}])


def test_tables_and_commands_are_whole(tmp_path):
    page.write(bench_rows.all_results(), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for result in bench_rows.all_results():
        for row in result["rows"]:
            assert f"<td>{row['key']}</td><td>{row['state']}</td>" in html
        assert f"note of {result['benchmark']}" in html
    assert "burnish bench run --quick" in html
    assert bench_rows.ENVIRONMENT["git_commit"] in html
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_numbers_are_written_with_their_units():
    assert [times(value) for value in (None, 0.05, 3.664, 250.0)] == ["–", "0.05×", "3.66×", "250×"]
    assert [tick(value) for value in (0.5, 1.0, 16.0)] == ["½×", "1×", "16×"]
    assert [metric(value) for value in (1.05e12, 340e9, 12.0)] == ["1.05 T", "340 G", "12"]
    assert [tokens(value) for value in (300, 1024, 1500, 16384)] == ["300", "1k", "1,500", "16k"]


def test_a_mode_has_one_colour_and_burnish_is_copper():
    assert colour_of("burnish") == "copper"
    assert colour_of("burnish-qlora") == "copper pale"
    assert colour_of("peft") == "blue"
    assert colour_of("peft-compile") == colour_of("peft+compile") == "violet pale"
    assert colour_of("something new") == "grey"


def test_axes_hold_their_values_and_ticks():
    for axis in (
        linear("x", [3.0, 9.0], str),
        linear("x", [], str),
        linear("x", [0.0], str),
        logarithmic("x", [7.0, 7.0], str),
        logarithmic("x", [1.0, 1e9], str),
        logarithmic("x", [300.0, 340_000.0], str, base=2),
        around_one("x", [], str),
        around_one("x", [0.01, 900.0], str),
    ):
        assert len(axis.ticks) >= 2
        assert all(axis.low <= value <= axis.high for value in axis.ticks)
        assert axis.place(axis.low) == 0
        assert axis.place(axis.high) == 1000
        assert axis.place(axis.high * 9) == 1000
    assert 1.0 in around_one("x", [0.01, 900.0], str).ticks


def test_plots_without_marks_are_nothing():
    axis = linear("x", [], str)
    assert bars("a", [("", [])], axis) == ""
    assert points("a", axis, axis, curves=[Curve("b", [(1.0, None)], "blue")]) == ""
    assert "<rect" not in bars("a", [("", [Bar("b", None, note="void")])], axis)


def test_labels_never_overlap_and_crowds_lose_some():
    crowd = [Label(500 + i, 500.0, f"a long label {i}", "ink") for i in range(60)]
    found = placed(crowd, lines=[], width="half")
    assert 0 < len(found) < 2 * len(crowd)
    assert len(set(found)) == len(found)
    assert all(label.startswith("<span") for label in found)
    [alone] = placed([Label(500.0, 500.0, "one", "ink")], lines=[], width="full")
    assert 'class="label e ink"' in alone


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def browser(folder):
    """Asks a headless browser over its pipe: ask(method, **parameters) -> result."""
    (answers, theirs), (ours, questions) = os.pipe(), os.pipe()

    def as_three_and_four():
        copies = os.dup(ours), os.dup(theirs)
        for copy, number in zip(copies, (3, 4), strict=True):
            os.dup2(copy, number)

    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}", "about:blank"],
        preexec_fn=as_three_and_four,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(ours)
    session = {}
    with os.fdopen(answers, "rb") as reader, os.fdopen(questions, "wb", buffering=0) as writer:

        def message():
            found = b""
            while not found.endswith(b"\0"):
                found += reader.read(1) or pytest.fail("the browser died")
            return json.loads(found[:-1])

        def ask(method, **parameters):
            writer.write(json.dumps({"id": 1, "method": method, "params": parameters} | session).encode() + b"\0")
            while (answer := message()).get("id") != 1:
                if answer.get("method") == "Network.requestWillBeSent":
                    requests.append(answer["params"]["request"]["url"])
            return answer["result"]

        requests = []
        target = ask("Target.createTarget", url="about:blank")["targetId"]
        session["sessionId"] = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        yield ask, requests
        process.terminate()
        process.wait(timeout=20)


PROBE = """(() => {
  const root = document.documentElement, lost = [];
  for (const figure of document.querySelectorAll('figure')) {
    const card = figure.getBoundingClientRect();
    const texts = [...figure.querySelectorAll('span, b, i, p, small')].filter(
      one => one.checkVisibility() && one.textContent.trim() && !one.querySelector('*'));
    const boxes = texts.map(one => {
      const range = document.createRange(); range.selectNodeContents(one); return range.getBoundingClientRect(); });
    boxes.forEach((a, i) => {
      if (a.left < card.left || a.right > card.right) lost.push('cut: ' + texts[i].textContent);
      boxes.slice(i + 1).forEach((b, j) => {
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
          lost.push(texts[i].textContent + ' over ' + texts[i + 1 + j].textContent); }); });
  }
  return JSON.stringify({width: root.scrollWidth, lost, ink: getComputedStyle(document.body).color});
})()"""


def evaluated(ask, expression):
    return ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_nothing_overlaps_overflows_or_is_loaded(tmp_path):
    page.write(bench_rows.all_results(), tmp_path / "report.html")
    with browser(tmp_path / "profile") as (ask, requests):
        ask("Network.enable")
        ask("Page.navigate", url=(tmp_path / "report.html").as_uri())
        deadline = time.monotonic() + 20
        while not evaluated(ask, "document.readyState === 'complete' && document.querySelector('footer') !== null"):
            assert time.monotonic() < deadline
        inks = set()
        for width, scheme in ((1280, "light"), (800, "dark"), (390, "dark"), (360, "light")):
            ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
            ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            found = json.loads(evaluated(ask, PROBE))
            assert found["width"] == width
            assert found["lost"] == []
            inks.add((scheme, found["ink"]))
        assert len({ink for _, ink in inks}) == len(inks) == 2
    assert {url.partition(":")[0] for url in requests} == {"file"}
