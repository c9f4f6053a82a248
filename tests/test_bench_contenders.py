"""Contenders of the kernel benchmark: each computes what the reference does; shapes; counts."""

from dataclasses import replace

import pytest
import torch
from burnish.bench import counts, shapes
from burnish.bench.benchmark import Choice
from burnish.bench.contenders import (
    PEERS,
    contenders_of,
    fault,
    small_problem,
    smaller,
    without_dropout,
)
from burnish.bench.op_runs import Run, fresh, inputs_of, mistake, tensors_of
from burnish.bench.plain import plain, problem_of
from burnish.bench.schemes import chunk_rows
from burnish.kernels.registry import OPS

LIMITS = {"B": 2, "T": 24, "M": 48, "K": 128, "N": 80, "F": 96, "V": 600, "shapes": 96, "D": 16, "E": 8}
"""Small enough for a test. K is a multiple of 64: on a CPU bitsandbytes 0.50 decodes blocks that span rows wrongly."""


def cases(name):
    """The cases of the CPU's whole catalogue, small, each once."""
    found = []
    for item in shapes.items("cpu", Choice()):
        case = smaller(item.what["case"], LIMITS)
        if item.what["op"] == name and case not in found:
            found.append(case)
    return found


def pairs():
    for name, op in OPS.items():
        for contender in contenders_of(op, is_compiled=False):
            yield pytest.param(op, contender, id=f"{name}-{contender.name}")


@pytest.mark.parametrize(("op", "contender"), list(pairs()))
def test_every_contender_computes_what_the_reference_does(op, contender):
    """Outputs and gradients without dropout, in the dtype of the benchmark."""
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32
    num_compared = 0
    for case in cases(op.name):
        problem = problem_of(op, without_dropout(case), dtype, "cpu")
        if contender.reason(problem) is None:
            assert fault(contender, problem) is None, case
            num_compared += 1
    assert num_compared or contender.name == "liger"


@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].dtypes != (torch.float32,)])
def test_plain_pytorch_computes_what_the_reference_does_in_fp32(name):
    op = OPS[name]
    reference = contenders_of(op, is_compiled=False)[1]
    for case in cases(name):
        assert fault(reference, problem_of(op, without_dropout(case), torch.float32, "cpu")) is None


@pytest.mark.parametrize("name", ["lora_linear", "dora", "glu", "rope", "rms_norm"])
def test_a_broken_peer_is_noticed(name):
    op = OPS[name]
    small = small_problem(op, cases(name)[-1], torch.bfloat16, "cpu")
    good = contenders_of(op, is_compiled=False)[1]

    def broken(problem):
        run = good.make(problem)
        return replace(run, arranged=lambda value, grads: [*(out := run.arranged(value, grads))[:-1], out[-1] * 1.02])

    assert fault(good, small) is None
    assert "off by" in fault(replace(good, make=broken), small)


def test_the_frozen_products_are_those_of_the_linears():
    op = OPS["lora_linear"]
    case = {"M": 24, "K": 32, "N": (16, 8), "r": 4, "p": 0.0}
    problem = problem_of(op, case, torch.float32, "cpu")
    frozen = next(one for one in PEERS["lora_linear"] if one.name == "frozen")
    *outputs, dx = frozen.make(problem)()
    weight = torch.cat([part.weight for part in problem.inputs["projections"]])
    torch.testing.assert_close(torch.cat(outputs, dim=1), problem.inputs["x"].detach() @ weight.t())
    torch.testing.assert_close(dx, problem.cotangents[0] @ weight)


def test_dropout_drops_in_every_contender_that_has_it():
    """Two calls differ where the mask is drawn by PyTorch, and outputs are near those without dropout on average."""
    op = OPS["lora_linear"]
    problem = problem_of(op, {"M": 512, "K": 64, "N": (32,), "r": 16, "p": 0.5}, torch.float32, "cpu")
    for contender in contenders_of(op, is_compiled=False)[1:]:
        if contender.is_whole and contender.reason(problem) is None and contender.name != "peft-bf16":
            run = contender.make(problem)
            first, second = run(), run()
            assert not torch.equal(first[0], second[0]), contender.name
            mean = sum(run()[0].detach() for _ in range(200)) / 200
            truth = plain(problem_of(op, {**problem.case, "p": 0.0}, torch.float32, "cpu"))()[0].detach()
            assert float((mean - truth).norm() / truth.norm()) < 0.15, contender.name


def test_chunks_of_the_head_hold_logits_as_large_as_the_hidden_states():
    assert chunk_rows(4096, 4096, 128256) == 128
    assert chunk_rows(1024, 576, 49152) == 16
    assert chunk_rows(10, 64, 32) == 16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_quick", [False, True])
def test_every_operation_has_an_item_with_a_key_of_its_own(device, is_quick):
    items = shapes.items(device, Choice(is_quick=is_quick))
    assert {item.what["op"] for item in items} == set(OPS)
    assert len({item.key for item in items}) == len(items)
    assert all(item.rows == (item.key,) and item.cost_s > 0 for item in items)


def test_the_catalogue_of_a_gpu_has_every_model_and_both_sweeps():
    keys = [item.key for item in shapes.items("cuda", Choice())]
    for model in set(shapes.SHAPES) - {"smollm2-135m"}:
        assert f"lora_linear · {model} gate+up · M=8192 r=16" in keys
        assert f"linear_cross_entropy · {model} · M=8192" in keys
    for M, r in (*((M, 16) for M in (1024, 2048, 4096, 8192, 16384)), *((8192, r) for r in (8, 16, 32, 64, 128))):
        assert f"lora_linear · llama-8b qkv · M={M} r={r}" in keys
    first = {key.split(" · ")[0] for key in keys[: keys.index("lora_linear · llama-1b qkv · M=8192 r=16")]}
    assert first == set(OPS)


def test_an_operation_without_shapes_is_measured_on_the_cases_of_its_record(monkeypatch):
    monkeypatch.setattr(shapes, "CASES", {})
    op = OPS["multi_lora"]
    [(_, case)] = shapes.cases_of(op, "smollm2-135m", 1024, 16, device="cpu")
    assert (case["M"], case["K"], case["offsets"][-1]) == (1024, 576, 1024)
    [(_, case)] = shapes.cases_of(op, "llama-8b", 8192, 16, device="cuda")
    assert case == op.bench_cases[0]


@pytest.mark.parametrize("name", OPS)
def test_inputs_for_a_gpu_are_drawn_where_their_generator_is(name):
    """On the meta device, where a tensor of the CPU among them would be an error: no GPU is needed, and no memory."""
    op = OPS[name]
    for item in shapes.items("cuda", Choice()):
        if item.what["op"] == name and "nf4" not in item.what["case"]:
            dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32
            found = op_inputs_on_meta(op, item.what["case"], dtype)
            assert all(tensor.device.type == "meta" for tensor in tensors_of(found))
            for of in (op.num_bytes, op.num_flops):
                assert of is None or 0 < of(item.what["case"]) < 1e15


def op_inputs_on_meta(op, case, dtype):
    with torch.device("meta"):
        return op.make_inputs(case, dtype, "meta", torch.Generator())


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_the_same_in_every_run(name):
    op, case = OPS[name], cases(name)[0]
    first, second = (tensors_of(inputs_of(op, case, op.dtypes[0], "cpu")) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert mistake(op, case, op.dtypes[0], "cpu") is None


def of(function, **tensors):
    return Run.prepare(function, tensors)


def test_saved_bytes_count_what_backward_needs_without_the_inputs():
    x = torch.randn(8, 8, requires_grad=True)
    assert counts.saved_bytes(of(lambda x: x.exp(), x=x)) == 8 * 8 * 4
    assert counts.saved_bytes(of(lambda x: x * x, x=x)) == 0


def test_launches_are_operations_that_compute():
    x = torch.randn(8, 8, requires_grad=True)
    assert counts.num_launches(of(lambda x: x.exp(), x=x)) == 2
    assert counts.num_launches(of(lambda x: (x + 1).relu().view(-1).view(8, 8), x=x)) == 3
    assert counts.num_launches(of(lambda x: torch.empty(8).fill_(1), x=x.detach())) == 1


def test_a_call_of_the_native_library_is_a_launch():
    from burnish.kernels import native

    x = torch.randn(16, 32, requires_grad=True)
    if not native.supports(x):
        pytest.skip("no C++ compiler")
    call = native.call
    run = Run.prepare(OPS["dropout"].function, {"x": x, "p": 0.5, "seed": 2**40})
    assert counts.num_launches(run) == 2
    assert native.call is call


def test_the_peak_is_that_of_what_lives_at_the_same_time():
    x = torch.randn(64, requires_grad=True)
    one = 64 * 4
    assert counts.peak_bytes(of(lambda x: x.exp(), x=x)) == 2 * one
    # Three results are kept for backward, the sum beside them; one gradient at a time.
    assert counts.peak_bytes(of(lambda x: x.exp().exp().exp().sum(), x=x)) == 4 * one + 4
    # Without backward an operation's operand goes when the next one has read it.
    assert counts.peak_bytes(of(lambda x: x.exp().exp().exp(), x=x.detach())) == 2 * one


def test_launches_on_a_gpu_are_counted_from_one_spin_to_the_next():
    spin = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    assert counts.launches_after_spins([spin, "gemm", "Memset", spin, spin, "gemm"], 3) == [2, 0, 1]
    with pytest.raises(RuntimeError, match="1 of 2"):
        counts.launches_after_spins([spin, "gemm"], 2)


@pytest.mark.parametrize("name", OPS)
def test_counts_are_the_same_every_time(name):
    op, case = OPS[name], cases(name)[0]
    inputs = inputs_of(op, case, op.dtypes[0], "cpu")
    run = Run.prepare(op.function, fresh(inputs) | dict(op.options))
    first, *others = counts.all_counts([run] * 3)
    assert all(other == first for other in others)
    assert first == {key: getattr(counts, key)(run) for key in first}
    assert first["num_launches"] > 0
    assert first["peak_bytes"] > 0
