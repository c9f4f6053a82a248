"""Functions run on several ranks: one spawned process per rank, joined by gloo, one thread each."""

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

TIMEOUT_S = 480


def _work(
    function: Callable[..., Any], rank: int, world: int, rendezvous: str, args: tuple[Any, ...], out: Any
) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        out.put((rank, function(rank, world, *args), None))
    except BaseException:
        out.put((rank, None, traceback.format_exc()))


def on_ranks(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`[function(rank, world, *args) for every rank]`, computed by the ranks together.

    The function lies in an importable module and returns plain data (no tensors). Raises RuntimeError with the
    traceback of a rank that failed.
    """
    context = get_context("spawn")
    out = context.Queue()
    rendezvous = str(folder / f"rendezvous-{function.__name__}-{world}")
    processes = [
        context.Process(target=_work, args=(function, rank, world, rendezvous, args, out), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            rank, result, error = out.get(timeout=TIMEOUT_S)
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
            results[rank] = result
    except Empty:
        raise RuntimeError(f"no answer within {TIMEOUT_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [results[rank] for rank in range(world)]
