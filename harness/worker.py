"""What one rank does, top to bottom: build, restore, evaluate, train, save, prove. A function of the plan alone.

Resuming needs no flag: the newest complete checkpoint in the run directory is the starting point, wherever it came
from (an interrupted run, or a worker that died a moment ago).
"""

import functools
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import backoff, checkpoint, export, interval, lock, models, offload
from .allocator import give_back_freed_memory, keep_freed_memory
from .data.loader import Loader, eval_batches
from .data.prepare import Prepared
from .data.sampler import Sampler
from .data.store import Store
from .detectors import Notices, Spikes
from .elastic import plan_for
from .engine import Engine, World, make_engine, shared_number
from .errors import Interrupted, SaveError, SupersededError, TrainingError
from .evaluate import evaluate
from .faults import arm_from_environment
from .generate import generate
from .job import Job, Report
from .loop import StepReport, pace_of, train
from .metrics import MetricsWriter, memory_bytes
from .plan import Plan
from .run_dir import RunDir, environment
from .tasks import get_task
from .tasks.common import unwrap
from .watchdog import Position, watched

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second is the first one's older name. Segments that grow leave no holes too small for the next tensor."""


def run(plan: Plan, prepared: Prepared, *, world: World, report: Report, driver: int = 0) -> dict[str, Any]:
    """Trains to the end of the plan and returns the summary of rank 0. `driver` is the number of who started it.

    Raises Interrupted when the stop file asked for an early end (a checkpoint is written first), TrainingError when
    training or the proof of the saved weights fails, OutOfMemory once all that this rank held is released,
    SupersededError when a later attempt has taken over the run directory.
    """
    plan = plan_for(plan, world.size)
    set_up_process(plan, world)
    arm_from_environment(world.rank)
    position = Position()
    try:
        with watched(plan, world.rank) as position.watchdog:
            return _run(plan, prepared, world=world, report=report, position=position, driver=driver)
    except Exception as error:
        if not backoff.found_no_memory(error):
            raise
        failure = backoff.explained(error, phase=position.phase, step=position.step)
        # Frames that have ended hold the model, the engine and the activations of a step.
        traceback.clear_frames(error.__traceback__)
    give_back_freed_memory(plan.device)
    raise failure


def _run(
    plan: Plan, prepared: Prepared, *, world: World, report: Report, position: Position, driver: int
) -> dict[str, Any]:
    job = _build(plan, prepared, world=world, report=report, position=position, driver=driver)
    try:
        first_step = position.first_step = _restore(job)
        position.at("step", step=first_step)
        if first_step == 0:
            _evaluate(job, "validation", step=0)
            _answer(job, "before")
        done = _train(job, first_step)
        if done < job.sampler.total_steps:
            raise Interrupted(f"stopped after step {done} of {job.sampler.total_steps}; a checkpoint is written")
        return _finish(job, done)
    finally:
        job.metrics.close()
        job.engine.close()


def set_up_process(plan: Plan, world: World) -> None:
    """Threads, the allocator, the rank variables DeepSpeed reads, the accelerator it uses, the tools it builds with.

    Raises ConfigError where this host lacks what the plan's offload needs.
    """
    torch.set_num_threads(plan.num_threads)
    if plan.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
            os.environ.update(dict.fromkeys(ALLOCATOR_VARIABLES, "expandable_segments:True"))
        torch.cuda.set_device(world.local_rank)
    offload.check(plan)
    if shutil.which("ninja") is None:  # pip puts it beside python; torch looks for it on PATH alone
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    ranks = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if plan.engine == "deepspeed":
        from .zero import load_operators

        load_operators(plan)
    torch.manual_seed(plan.config.seed)


def _build(plan: Plan, prepared: Prepared, *, world: World, report: Report, position: Position, driver: int) -> Job:
    config, run_dir = plan.config, RunDir(plan.run_dir)
    task = get_task(config.task.type)
    processor = task.load_processor(config)
    model = models.build(plan, prepared.labels)
    if plan.device == "cpu":
        keep_freed_memory()  # not before: loading frees more than training needs
    counts = models.parameter_counts(model)
    engine = make_engine(plan, model, world)
    store = Store(prepared.train)
    sampler = Sampler(
        store.source,
        prepared.weights,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        max_steps=config.train.max_steps,
        epochs=config.train.epochs,
    )
    loader = Loader(
        store,
        sampler,
        task,
        processor,
        config,
        micro_batch_size=plan.micro_batch_size,
        world_size=world.size,
        rank=world.rank,
    )
    job = Job(
        plan=plan,
        prepared=prepared,
        world=world,
        run_dir=run_dir,
        task=task,
        processor=processor,
        engine=engine,
        loader=loader,
        sampler=sampler,
        metrics=MetricsWriter(run_dir, config, is_writer=world.rank == 0),
        report=report,
        position=position,
        attempt=_attempt(plan, world, engine, driver=driver),
    )
    if job.is_first:
        run_dir.write_json(run_dir.env_json, environment())
    name = config.model.path or f"{config.model.init and config.model.init['model_type']} (random weights)"
    job.emit({"event": "model", "name": name, "dtype": config.model.dtype, "fused": unwrap(model).fused} | counts)
    size = {"total_steps": sampler.total_steps, "steps_per_epoch": sampler.steps_per_epoch, "world_size": world.size}
    job.emit({"event": "start"} | size)
    return job


def _attempt(plan: Plan, world: World, engine: Engine, *, driver: int) -> int:
    """The number that rank 0 takes from the fence, on every rank. Collective."""
    number = lock.fence(plan.run_dir, driver=driver) if world.rank == 0 else 0
    return int(shared_number(engine, world, number))


def _restore(job: Job) -> int:
    """Loads the newest complete checkpoint, if there is one; returns the number of steps already done."""
    if job.is_first:
        checkpoint.clean(job.plan.run_dir)
    path, broken = checkpoint.newest(job.plan.run_dir)
    for name in broken:
        job.emit({"event": "broken_checkpoint", "path": name})
    if path is None:
        job.metrics.start(0)
        return 0
    state, trainer, rng = checkpoint.load(path, job.world.rank)
    checkpoint.check_same(trainer, job.identity)
    job.engine.load_state(state)
    checkpoint.set_rng_state(rng)
    job.samples, job.num_skipped = trainer["samples"], trainer.get("skipped", 0)
    job.spikes = Spikes(trainer.get("losses", ()))
    job.metrics.start(trainer["step"])
    job.emit({"event": "resume", "step": trainer["step"], "path": str(path)})
    return int(trainer["step"])


def _train(job: Job, first_step: int) -> int:
    config, total = job.plan.config, job.sampler.total_steps
    saved_step = first_step
    share = functools.partial(shared_number, job.engine, job.world)
    saves = interval.of_run(job.plan, job.world, first_step=first_step, share=share, tell=job.emit)
    notices = Notices(job.emit, num_ranks=job.world.size)

    def after_step(step: StepReport) -> None:
        nonlocal saved_step
        done, job.num_skipped = step.step + 1, step.num_skipped
        job.position.at("step", step=done)
        if job.is_first:
            notices.see(step)
        job.peak_memory_bytes = max(job.peak_memory_bytes, memory_bytes(job.plan.device))
        if done % config.tracking.log_every_steps == 0 or done == total:
            extra = {"memory_bytes": memory_bytes(job.plan.device), "epoch": job.sampler.epoch(done)}
            job.log(step.record() | extra | {"tokens_per_s": step.tokens / step.time_s})
        if config.eval.every_steps and done % config.eval.every_steps == 0 and done < total:
            _evaluate(job, "validation", step=done)
        is_due = saves.is_due(done)
        is_last = step.is_stop_requested or done == total
        if is_due or is_last:
            saves.saved(done, _save(job, done, is_last=is_last))
            saved_step = done

    done = train(
        job.engine,
        job.task,
        config,
        loader=job.loader,
        first_step=first_step,
        total_steps=total,
        is_stopping=job.run_dir.stop.exists,
        after_step=after_step,
        spikes=job.spikes,
        num_skipped=job.num_skipped,
        pace=pace_of(job.world, zero_stage=job.plan.zero_stage),
        progress=job.position.progress,
    )
    assert saved_step == done or first_step >= total, (saved_step, done)
    return done


def _save(job: Job, step: int, *, is_last: bool) -> float | None:
    """The seconds that it took; None where it failed and `checkpoint.on_error` passes over it. Collective."""
    start = time.perf_counter()
    failure: TrainingError | None = None
    path: Path | None = None
    with job.during("save"):
        try:
            path = checkpoint.save(
                job.plan.run_dir,
                step,
                state=job.engine.state(),
                trainer=_trainer(job, step),
                world=job.world,
                barrier=job.engine.barrier,
                keep=job.plan.config.checkpoint.keep,
                attempt=job.attempt,
                may_commit=job.may_write,
            )
        except SupersededError:
            raise
        except TrainingError as error:
            failure = error
    time_s = time.perf_counter() - start
    may_skip = job.plan.config.checkpoint.on_error == "skip" and not is_last
    # Ranks see different sides of one failure; the first one's counts.
    if may_skip and shared_number(job.engine, job.world, float(isinstance(failure, SaveError))):
        job.emit({"event": "skipped_checkpoint", "step": step, "reason": str(failure)})
        return None
    if failure is not None:
        raise failure
    job.emit({"event": "checkpoint", "step": step, "path": str(path), "time_s": time_s})
    return time_s


def _trainer(job: Job, step: int) -> dict[str, Any]:
    """What a checkpoint has beside the state of the engine."""
    own = {"step": step, "samples": job.samples, "skipped": job.num_skipped, "losses": list(job.spikes.losses)}
    return own | job.identity


def _eval_batches(job: Job, store_dir: str, *, rank: int, world_size: int, max_examples: int | None) -> Any:
    config = job.plan.config
    return eval_batches(
        Store(store_dir),
        job.task,
        job.processor,
        config,
        micro_batch_size=config.eval.micro_batch_size or job.plan.micro_batch_size,
        world_size=world_size,
        rank=rank,
        max_examples=max_examples,
    )


def _evaluate(job: Job, split: str, *, step: int) -> dict[str, float]:
    """Metrics of a split over all ranks; nothing where the split has no data. Collective."""
    store_dir = getattr(job.prepared, split)
    if store_dir is None:
        return {}
    world, most = job.world, job.plan.config.eval.max_examples
    batches = _eval_batches(job, store_dir, rank=world.rank, world_size=world.size, max_examples=most)
    batches = job.position.each(batches)
    with job.during("evaluation"):
        metrics = evaluate(job.engine.module, batches, job.task, job.plan.config, reduce=job.engine.all_reduce_sum)
    job.log({"kind": "eval", "split": split, "step": step} | metrics)
    return metrics


def _answer(job: Job, when: str) -> None:
    """Answers the prompts `before` or `after` training. ZeRO-3 needs every rank for a forward, the others one."""
    wanted = job.plan.config.generation.prompts
    if wanted == "auto":
        first = job.prepared.first_prompt
        questions = [first] if first is not None else []
    else:
        questions = [{"prompt": prompt, "reference": None} for prompt in wanted]
    if not questions or not (job.is_first or job.plan.zero_stage == 3):
        return
    prompts = [question["prompt"] for question in questions]
    answers = generate(job.engine.model, job.processor, job.task, prompts, job.plan.config)
    if when == "before":
        job.samples = [dict(question) for question in questions]
    for sample, answer in zip(job.samples, answers, strict=True):
        sample[when] = answer
    if job.is_first:
        job.run_dir.write_json(job.run_dir.samples_json, job.samples)
    job.emit({"event": "samples", "when": when, "samples": job.samples})


def _finish(job: Job, step: int) -> dict[str, Any]:
    """Final metrics and samples, the saved result, and the proof that it reloads to the same loss."""
    final = {split: _evaluate(job, split, step=step) for split in ("validation", "test")}
    job.position.at("finish", step=step)
    _answer(job, "after")
    live_loss, batch = _proof_batch(job)
    state = job.engine.trained_state()
    summary: dict[str, Any] = {}
    if job.is_first:
        assert state is not None
        path = export.save_final(job.plan, job.engine.model, state, job.prepared.labels, may_commit=job.may_write)
    # The proof builds the model a second time, and on the same device.
    del state
    job.engine.release()
    give_back_freed_memory(job.plan.device)
    if job.is_first:
        proof = export.prove(job.plan, path, batch, live_loss, labels=job.prepared.labels)
        job.emit({"event": "proof", "path": str(path)} | proof)
        summary = {"steps": step, "result": str(path), "proof": proof} | {k: v for k, v in final.items() if v}
        summary["peak_memory_bytes"] = job.peak_memory_bytes
        job.emit({"event": "finish", "run_dir": job.plan.run_dir} | summary)
    job.engine.barrier()
    return summary


def _proof_batch(job: Job) -> tuple[float, Any]:
    """One batch (validation if there is any) and the live model's loss on it. Collective under ZeRO-3."""
    store_dir = job.prepared.validation or job.prepared.train
    batches = _eval_batches(job, store_dir, rank=0, world_size=1, max_examples=job.plan.micro_batch_size)
    batch = next(iter(batches))
    return evaluate(job.engine.module, [batch], job.task, job.plan.config)["loss"], batch
