"""What a training run shows in a terminal: banner, one live line, the comparison at the end. The only user of rich."""

import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..harness import backoff, goodput
from ..harness.markup import duration, number, size
from ..harness.plan import Plan
from ..harness.run_dir import RunDir, read_json

PLAIN_EVERY_S = 5.0
RECENT_STEPS = 20
MAX_PROMPT_CHARS, MAX_ANSWER_CHARS = 600, 400
BAR_CELLS = 24
ZERO = {"torch": "one process", "deepspeed": "DeepSpeed ZeRO-{stage}"}

NOTICED = {
    "hang": "rank {rank} hung after step {step} ({phase}); stacks are in {stacks}",
    "straggler": "rank {rank} takes {ratio} times as long as the others (step {step})",
    "skipped_step": "step {step} was skipped, {reason} ({num_skipped} so far)",
    "skipped_checkpoint": "no checkpoint after step {step}: {reason}",
    "loss_spike": "the loss of step {step} jumped to {loss:.4g}; above {limit:.4g} is a spike",
}
"""Events that ranks write about what they notice, in words."""


class Progress:
    """Shows the events and metrics records of one run as they come. Writes plain lines where there is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self.live: Live | None = None
        self.last_plain = 0.0
        self.total_steps = 0
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self.handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "plan": self._plan,
            "data": self._data,
            "model": self._model,
            "start": self._start,
            "resume": lambda event: self._line("resumed", f"at step {event['step']} from {shown_path(event['path'])}"),
            "broken_checkpoint": lambda event: self._line("ignored", f"{event['path']}: damaged checkpoint"),
            "worker_failure": self._worker_failure,
            **dict.fromkeys(NOTICED, self._noticed),
            backoff.EVENT: self._out_of_memory,
            goodput.EVENT: self._restart,
            "notice": lambda event: self._line("note", event["text"]),
            "train": self._step,
            "eval": self._eval,
        }

    def report(self, record: dict[str, Any]) -> None:
        """Takes one event or metrics record; kinds it does not know are not shown."""
        handler = self.handlers.get(record.get("event") or record.get("kind") or "")
        if handler is not None:
            handler(record)

    def close(self) -> None:
        """Ends the live line and leaves it on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _print(self, text: Text) -> None:
        """One logical line; the terminal wraps it, so that a path can be copied whole."""
        self.console.print(text, soft_wrap=True)

    def _line(self, name: str, text: str) -> None:
        self._print(Text.assemble((f"  {name:<12}", "bold"), printable(text)))

    def _plan(self, event: dict[str, Any]) -> None:
        plan: Plan = event["plan"]
        config = plan.config
        self._print(Text.assemble(("burnish ", "bold"), version("burnish"), " · ", (config.name, "bold")))
        self._line("run", shown_path(plan.run_dir))
        workers = f"{plan.world_size} workers" if plan.world_size > 1 else "1 worker"
        engine = ZERO[plan.engine].format(stage=plan.zero_stage)
        where = "Ray" if config.launch.type == "ray" else "no Ray"
        self._line("plan", f"{workers} on {plan.device.upper()} ({where}), {engine}, {num_threads(plan)} each")
        batch = f"{plan.micro_batch_size} examples × {plan.gradient_accumulation_steps} accumulation × {workers}"
        self._line("batch", f"{config.train.global_batch_size} = {batch}")
        optimizer = config.optimizer
        self._line("method", f"{method(plan)}, {optimizer.name} at {optimizer.learning_rate:g}, {config.schedule.lr}")
        if config.launch.type == "ray":
            address = config.launch.address
            self._line("ray", f"connecting to {address}" if address else "starting a cluster on this machine")

    def _data(self, event: dict[str, Any]) -> None:
        for split, counts in event["counts"].items():
            if isinstance(counts, dict):
                self._line("data" if split == "train" else "", f"{split}: {counted(counts)}")

    def _model(self, event: dict[str, Any]) -> None:
        total, trained = event["total"], event["trainable"]
        share = 100 * trained / max(1, total)
        name = Path(event["name"]).name if "/" in event["name"] and ":" in event["name"] else event["name"]
        text = f"{name}, {short(total)} parameters, {short(trained)} trained ({share:.2g} %), {event['dtype']}"
        self._line("model", text)
        fused = [f"{count} {name}" for name, count in event["fused"].items() if count > 1]
        if fused:
            self._line("", f"fused: {', '.join(fused)}")

    def _start(self, event: dict[str, Any]) -> None:
        self.total_steps = event["total_steps"]
        self._line(
            "steps", f"{number(self.total_steps)} ({event['total_steps'] / event['steps_per_epoch']:.2g} epochs)"
        )

    def _noticed(self, event: dict[str, Any]) -> None:
        self._line("noticed", NOTICED[event["event"]].format(**event))

    def _worker_failure(self, event: dict[str, Any]) -> None:
        for rank, reason in event["reasons"].items():
            self._line("failed", f"worker {rank}: {reason}")

    def _restart(self, event: dict[str, Any]) -> None:
        self.close()
        self.recent.clear()
        self._line("restart", restarted(event))

    def _out_of_memory(self, event: dict[str, Any]) -> None:
        self.close()
        self.recent.clear()
        wanted = f", {size(event['wanted_bytes'])} more were asked for" if event["wanted_bytes"] else ""
        self._line("memory", f"out of memory {backoff.where(event['phase'], event['step'])}{wanted}")
        accumulation = f"accumulation {event['gradient_accumulation_steps']}"
        self._line("", f"goes on with {event['change']} ({accumulation})")

    def _eval(self, record: dict[str, Any]) -> None:
        skipped = ("kind", "split", "step", "time", "count", "non_finite")
        values = [f"{key.replace('_', ' ')} {number(value)}" for key, value in record.items() if key not in skipped]
        self._line(record["split"], f"{', '.join(values)} (step {record['step']})")

    def _step(self, record: dict[str, Any]) -> None:
        self.recent.append(record)
        is_last = record["step"] >= self.total_steps
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, auto_refresh=False, transient=False)
                self.live.start()
            self.live.update(self._live_line(record), refresh=True)
        elif is_last or time.monotonic() - self.last_plain >= PLAIN_EVERY_S:
            self.last_plain = time.monotonic()
            self._print(self._live_line(record))
        if is_last:
            self.close()

    def _live_line(self, record: dict[str, Any]) -> Text:
        step, total = record["step"], max(1, self.total_steps)
        times = [item.get("time_s") or 0.0 for item in self.recent]
        tokens_per_s = sum(item.get("tokens") or 0 for item in self.recent) / max(1e-9, sum(times))
        eta = duration((total - step) * sum(times) / len(times))
        filled = BAR_CELLS * step // total
        loss = record.get("loss")
        parts = [
            f"loss {'not finite' if loss is None else format(loss, '.4f')}",
            f"lr {record['lr']:.2e}",
            f"{short(tokens_per_s)} tokens/s",
            size(record.get("memory_bytes") or 0),
            f"ETA {eta}",
        ]
        bar = ("━" * filled, "green"), ("━" * (BAR_CELLS - filled), "bright_black")
        head = Text.assemble((f"  {'step':<12}", "bold"), f"{step:>{len(str(total))}}/{total} ")
        if self.console.is_terminal:
            head = Text.assemble(head, *bar, " ")
        line = Text.assemble(head, "  ".join(parts))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line

    def finish(self, run: RunDir, summary: dict[str, Any], *, program: str) -> None:
        """Validation before and after, the same prompts before and after, the proof, and what to do next."""
        self.close()
        self._comparison(summary["validation"])
        for sample in read_json(run.samples_json, [])[:3]:
            self._sample(sample)
        proof, folder = summary.get("proof") or {}, shown_path(run.path)
        self.console.print()
        if proof:
            losses = f"loss {proof['reloaded']:.6f}, live {proof['live']:.6f}, difference {proof['difference']:.1e}"
            self._line("saved", f"{shown_path(proof['path'])}; reloaded into a fresh model: {losses}")
        self._line("report", f"{folder}/report.html")
        self._line("took", duration(summary.get("wall_time_s")) + f", peak {size(summary.get('peak_memory_bytes'))}")
        self._line("goodput", time_spent(summary["goodput"]))
        self._print(Text("\nNext", style="bold"))
        for command in next_commands(run, summary, program):
            self._print(Text(f"  {command}"))

    def _comparison(self, validation: dict[str, Any]) -> None:
        before, after = validation.get("before") or {}, validation.get("after") or {}
        keys = [key for key in after if key in before and key not in ("step", "count")]
        if not keys:
            return
        table = Table(title="validation", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in ("", "before", "after", "change"):
            table.add_column(heading, justify="left" if not heading else "right")
        for key in keys:
            relative = (validation["change"].get(key) or {}).get("relative")
            change = "" if relative is None else f"{100 * relative:+.1f} %".replace("-", "−")
            table.add_row(f"  {key.replace('_', ' ')}", number(before[key]), number(after[key]), change)
        self.console.print()
        self.console.print(table)

    def _sample(self, sample: dict[str, Any]) -> None:
        self.console.print()
        rows = {"prompt": MAX_PROMPT_CHARS, "before": MAX_ANSWER_CHARS, "after": MAX_ANSWER_CHARS}
        if sample.get("reference") is not None:
            rows["reference"] = MAX_ANSWER_CHARS
        styles = {"before": "yellow", "after": "green"}
        for key, limit in rows.items():
            lines = shortened(readable(sample.get(key)), limit).splitlines() or ["(empty)"]
            for i, line in enumerate(lines):
                name = f"  {key if i == 0 else '':<12}"
                self._print(Text.assemble((name, "bold"), (line, styles.get(key, ""))))


def method(plan: Plan) -> str:
    """`lora rank 16, bf16`: how and in which precision it is trained."""
    config = plan.config
    rank = getattr(config.adapter, "rank", None)
    quantization = f" over {config.quantization.type}" if config.quantization.type != "none" else ""
    name = config.adapter.method + (f" rank {rank}" if rank else "") + quantization
    return f"{config.task.type}, {name}, {config.model.dtype}"


def num_threads(plan: Plan) -> str:
    return f"{plan.num_threads} threads" if plan.num_threads > 1 else "1 thread"


def restarted(event: dict[str, Any]) -> str:
    """`1 from step 20: worker 1 died; 3 steps and 4.2 s lost; goodput 91 %`."""
    steps = f"{event['lost_steps']} step{'s' if event['lost_steps'] != 1 else ''}"
    share = "" if event["goodput"] is None else f"; goodput {100 * event['goodput']:.0f} %"
    wait = f"; waiting {event['wait_s']:g} s" if event.get("wait_s") else ""
    lost = f"{steps} and {event['lost_s']:.1f} s lost"
    return f"{event['attempt']} from step {event['from_step']}: {event['cause']}; {lost}{share}{wait}"


def time_spent(found: dict[str, Any]) -> str:
    """`97 %: train 80 %, save 3 %, other 17 % of 1 min 40 s`; what took nothing is left out."""
    wall_s = max(1e-9, found["wall_s"])
    shares = {bucket: 100 * seconds / wall_s for bucket, seconds in found["seconds"].items()}
    words = [f"{bucket} {share:.0f} %" for bucket, share in shares.items() if share >= 0.5]
    head = "" if found["goodput"] is None else f"{100 * found['goodput']:.0f} %: "
    return f"{head}{', '.join(words)} of {duration(found['wall_s'])}"


def counted(counts: dict[str, Any]) -> str:
    """The numbers of one split in a line; zeros and lists of examples are left out."""
    words = [f"{short(value)} {key}" for key, value in counts.items() if isinstance(value, int | float) and value]
    rejected = counts.get("rejected")
    if isinstance(rejected, dict):
        words += [f"{value} {kind}" for kind, value in rejected.items() if isinstance(value, int) and value]
    return ", ".join(word.replace("_", " ") for word in words)


def next_commands(run: RunDir, summary: dict[str, Any], program: str) -> list[str]:
    folder = shown_path(run.path)
    kinds = {"adapter": "merged", "model": "merged"}
    form = next((kinds[name] for name in ("adapter", "model") if name in summary["paths"]), "merged")
    return [
        f'{program} generate {folder} --prompt "…"',
        f"{program} eval {folder}",
        f"{program} export {folder} --format {form} --out {run.name}-{form}",
    ]


def readable(value: Any) -> str:
    """A prompt or answer as text: chats as `role: content` lines, anything else as it is written."""
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {turn['content']}" for turn in value)
    return "" if value is None else str(value)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, cut in the middle, without control characters."""
    text = printable(text.strip())
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} […] {text[-limit // 3 :]}"


def printable(text: str) -> str:
    """A model may answer with escape sequences; a terminal must not obey them."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)


def shown_path(path: str | Path) -> str:
    """Relative to the current folder where it lies below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def short(value: float) -> str:
    """134515008 -> 134.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
