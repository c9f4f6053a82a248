"""Made-up results of the four benchmarks with the fields that real ones have, for tests of what reads them."""

import random

ENVIRONMENT = {
    "python": "3.11.7",
    "libraries": {"burnish": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0", "ray": "2.50.0"},
    "cpu": "Made-up Processor (no figures of a real machine)",
    "num_cpus": 2,
    "cpu_features": ["amx_bf16", "avx2"],
    "gpu": None,
    "memory_bytes": 8 * 2**30,
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
}
OPS = {
    "rms_norm": (1.6, 1.1, None, 9.4e6),
    "glu": (2.4, 1.3, None, 28.3e6),
    "rope": (3.9, 1.6, None, 4.7e6),
    "dropout": (4.4, 1.9, None, 9.4e6),
    "attention": (2.2, 2.0, 4.2e9, 8.1e6),
    "lora_linear": (1.5, 1.4, 7.4e9, 10.1e6),
    "dora": (3.1, 2.2, 7.9e9, None),
    "multi_lora": (5.0, 3.9, 7.6e9, 12.9e6),
    "linear_cross_entropy": (1.9, 1.7, 116e9, 364e6),
    "nf4_dequant": (6.2, 2.9, None, 2.2e6),
    "nf4_quantize": (7.7, 4.1, None, 2.3e6),
    "adapter_adamw": (12.6, 2.6, 78e6, 156e6),
    "lora_grads": (2.1, 1.8, 0.1e9, 4.3e6),
}
"""Name -> ratio to the reference and to the compiled one, operations, bytes."""
PEAKS = {"flops_per_s": 1.05e12, "bytes_per_s": 21.7e9}
MODES = {"peft": (3.42, 3.78), "peft-bf16": (3.33, 3.28), "sft": (7.29, 2.45), "peft-compile": (2.61, 3.02)}
"""Mode -> seconds of a step, GiB."""


def quartiles(median, samples=()):
    return {"q1": 0.96 * median, "median": median, "q3": 1.05 * median, "samples": list(samples)}


def around(median, count=8, seed=0):
    draw = random.Random(f"{median}{seed}")
    return [median * draw.uniform(0.93, 1.09) for _ in range(count)]


def result(benchmark, rows, **fields):
    return {
        "format": 1,
        "benchmark": benchmark,
        "device": "cpu",
        "hardware": "cpu-2-made-up",
        "time": "2026-01-02T03:04:05Z",
        "command": ["burnish", "bench", "run", "--quick"],
        "environment": ENVIRONMENT,
        "options": {"is_quick": True},
        "options_hash": "0" * 64,
        "is_quick": True,
        "is_interrupted": False,
        "time_s": 61.5,
        "rows": rows,
    } | fields


def all_results(**fields):
    made = {"kernels": kernel_rows, "step": step_rows, "memory": memory_rows, "scale": scale_rows}
    peaks = {"bfloat16": PEAKS, "float32": PEAKS | {"flops_per_s": 0.14e12}}
    return [
        result(name, rows(), **({"peaks": peaks, "num_rounds": 8} if name == "kernels" else {}), **fields)
        for name, rows in made.items()
    ]


def row(key, state="ok", reason=None, **fields):
    return {"key": key, "state": state, "reason": reason} | fields


def step_row(case, mode, time_s, gib):
    samples, base, own = around(time_s), MODES["peft"][0], 0.935
    return row(
        f"{case} · {mode}",
        case=case,
        mode=mode,
        summary=f"summary of {mode}",
        check_losses=[3.2, 3.1, 3.0],
        losses=[3.2, 3.1],
        warmup_times_s=[time_s, time_s],
        times_s=samples,
        time_s=quartiles(time_s),
        tokens_per_s=1024 / time_s,
        mfu=0.21,
        peak_bytes=int(gib * 2**30),
        floor_bytes=530_000_000,
        loaded_bytes=860_000_000,
        num_trained=4_884_480,
        ratio=quartiles(base / time_s, around(base / time_s)),
        faster=quartiles(time_s / own, around(time_s / own)),
        facts={
            "workload": {"num_sequences": 4, "length": 256, "rank": 16, "num_threads": 2},
            "baseline": "peft",
            "own": "burnish",
            "rounds": [{}] * 8,
            "others_cores": 0.01,
        }
        if mode == "peft"
        else None,
    )


def step_rows(case="smollm2-135m"):
    rows = [step_row(case, mode, *what) for mode, what in {**MODES, "burnish": (0.935, 1.44)}.items()]
    wrong = {"state": "void", "reason": "its first loss differs by 0.04, allowed is 0.002", "faster": None}
    return [*rows, step_row(case, "fp32", 6.1, 5.2) | wrong, row("llama-8b · peft", "not measured", "needs a GPU")]


def kernel_rows():
    rows = [kernel_row(op, case, *what) for op, what in OPS.items() for case in cases_of(op)]
    broken = {"state": "void", "reason": "the gradient of x is 0.3 off, allowed is 0.01", "ratio": {}}
    return [*rows, kernel_row("dora_norm", "N=576", 2.0, 1.5, None, 1e6) | broken]


def cases_of(op):
    return ["M=1024 K=576 r=16", "M=1024 K=1536 r=64"] if op in ("lora_linear", "rms_norm") else ["M=1024 K=576"]


def kernel_row(op, case, to_reference, to_compiled, flops, num_bytes):
    factor = 1 + 1.2 * ("1536" in case)
    flops, num_bytes = (None if count is None else count * factor for count in (flops, num_bytes))
    floor_s = max((flops or 0) / PEAKS["flops_per_s"], (num_bytes or 0) / PEAKS["bytes_per_s"])
    share = 0.3 + 0.6 * random.Random(op + case).random()
    own = floor_s / share
    times = {"burnish": own, "reference": own * to_reference, "compiled": own * to_compiled}
    times |= {"peft": own * 2.3, "peft-bf16": own * 1.7} if op == "lora_linear" else {}
    contenders = {
        name: {"label": LABELS[name], "state": "ok", "reason": None, "samples": around(time_s)}
        | {"time_s": quartiles(time_s), "peak_bytes": None, "saved_bytes": 9_000_000, "num_launches": None}
        for name, time_s in times.items()
    }
    contenders["frozen"] = contenders["burnish"] | {"label": "the frozen products alone"}
    contenders["liger"] = {"label": "Liger-Kernel", "state": "not measured", "reason": "needs a GPU"}
    frozen = {name: quartiles(time_s / own * 1.06) for name, time_s in times.items()}
    return row(
        f"{op} · {case}",
        op=op,
        case={},
        label=f"{op} {case}",
        dtype="bfloat16",
        backend="native",
        contenders=contenders,
        ratio={
            name: quartiles(time_s / own, around(time_s / own)) for name, time_s in times.items() if name != "burnish"
        },
        num_flops=flops,
        num_bytes=num_bytes,
        floor_s=floor_s,
        share_of_peak=share,
        over_frozen=frozen if op == "lora_linear" else None,
    )


LABELS = {
    "burnish": "burnish",
    "reference": "plain PyTorch",
    "compiled": "torch.compile",
    "peft": "PEFT as installed",
    "peft-bf16": "PEFT, bf16 adapters",
}
METHODS = {
    "burnish": (1.1e6, 0.9),
    "burnish-full-gc": (0.5e6, 0.9),
    "burnish-qlora-gc": (0.5e6, 0.6),
    "peft": (3.6e6, 0.9),
    "peft-gc": (1.9e6, 0.9),
    "peft-bf16": (2.9e6, 0.95),
}
"""Method -> bytes a token, GiB without tokens."""
PUBLISHED = {"label": "Unsloth", "max_tokens": 3000, "budget_bytes": 3 * 2**30, "source": "published: a made-up page"}


def memory_rows(budget_gib=3):
    rows = []
    for method, (slope, base) in METHODS.items():
        peaks = {tokens: int(base * 2**30 + slope * tokens) for tokens in (256, 512, 1024, 2048, 4096)}
        fits = [tokens for tokens, peak in peaks.items() if peak <= budget_gib * 2**30]
        said = [{"tokens": tokens, "predicted_bytes": int(1.07 * peak)} for tokens, peak in peaks.items()]
        rows.append(
            row(
                f"length · {method}",
                kind="length",
                method=method,
                label=method,
                model="SmolLM2-135M",
                budget_bytes=budget_gib * 2**30,
                max_tokens=max(fits),
                probes=[
                    {"tokens": tokens, "peak_bytes": peak if tokens in fits else None, "state": "ok"}
                    for tokens, peak in peaks.items()
                ],
                predicted=said if method.startswith("burnish") else [],
                predicted_parts={},
                bound="exact",
                peak_bytes=peaks[max(fits)],
                published=[PUBLISHED] if method == "burnish-qlora-gc" else None,
            )
        )
        tried = {"made-up 135M": 135e6, "made-up 360M": 360e6, "made-up 1B": 1.1e9}
        sizes = {
            name: int((base - 0.5) * 2**30 + params * (2.2 if "q" not in method else 1.2))
            for name, params in tried.items()
        }
        rows.append(
            row(
                f"model · {method}",
                kind="model",
                method=method,
                label=method,
                budget_bytes=2 * 2**30,
                tokens=512,
                bound="exact",
                max_params=max(params for name, params in tried.items() if sizes[name] <= 2 * 2**30),
                probes=[
                    {"model": name, "params": params, "predicted_bytes": int(0.95 * sizes[name])}
                    | {"peak_bytes": sizes[name] if sizes[name] <= 2 * 2**30 else None}
                    for name, params in tried.items()
                ],
            )
        )
    return rows


def scale_rows():
    rows = []
    for stage in (0, 2, 3):
        for count in (1, 2, 4):
            sent = 0 if count == 1 else 4.9e6 * 4 * (2 if stage < 3 else 3) * (count - 1) / count
            split = {"compute_s": 1.6, "communication_s": 0.12 * (count - 1) * (1 + stage / 3), "input_s": 0.02}
            whole = sum(split.values()) + 0.05
            rows.append(
                row(
                    f"workers · {count} · zero{stage}",
                    kind="workers",
                    num_workers=count,
                    zero_stage=stage,
                    adapter="full",
                    model="llama-tiny",
                    times_s=around(whole),
                    time_s=quartiles(whole),
                    split=split | {"other_s": 0.05},
                    checkpoint_s=0.4,
                    wire_bytes=int(sent * 1.01),
                    formula_bytes=int(sent),
                    tokens_per_s=1024 * count / whole,
                    efficiency=1.67 / whole,
                    first_loss=3.2,
                )
            )
        rows += [simulated(model, count, stage) for model in ("llama-8b", "llama-70b") for count in (8, 64, 256, 1024)]
    return rows


def simulated(model, count, stage):
    return row(
        f"simulation · {model} · {count} · zero{stage}",
        kind="simulation",
        model=model,
        num_gpus=count,
        zero_stage=stage,
        hardware={"name": "made-up GPU", "inside_bytes_per_s": 360e9, "between_latency_s": 5e-6, "gpus_per_node": 8},
        flops_per_s=4e14,
        is_speed_measured=False,
        overlap=0.5,
        fits=not (model == "llama-70b" and stage == 0),
        compute_s=1.0,
        communication_s=0.02 * count**0.3 * (1 + stage),
        step_s=1.0,
        tokens_per_s=8192.0 * count,
        efficiency=1 / (1 + 0.02 * count**0.3 * (1 + stage)),
        wire_bytes=10**8,
        is_model=True,
    )
