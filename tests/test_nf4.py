"""NF4 against bitsandbytes on the CPU, bit for bit, in both directions.

Two things of bitsandbytes are avoided, not copied: its AVX-512 code takes a wrong absmax where a row is not a whole
number of blocks (weights are given to it as one row), and it flushes denormals in bf16 (those are compared in fp32).
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from burnish.kernels.nf4_dequant import CODE, Nf4Weight, nf4_dequant
from burnish.kernels.nf4_quantize import DTYPES, dynamic_map, nf4_quantize, quantize_values
from burnish.kernels.op import use_backend
from torch import Tensor

bitsandbytes = pytest.importorskip("bitsandbytes.functional")
SHAPES = ((1, 1), (3, 5), (7, 100), (33, 80), (40, 576))
BLOCKSIZES = (64, 128, 256, 512)
BACKENDS = ("native", "torch")


def quantized(w: Tensor, *, blocksize: int, nested: bool) -> tuple[Tensor, Any]:
    """bitsandbytes' packed tensor and state, the shape restored from one row."""
    packed, state = bitsandbytes.quantize_4bit(
        w.reshape(1, -1), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )
    state.shape = w.shape
    return packed, state


def dequantized(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' dense weight; an odd last element gets the byte's other half for company."""
    count = state.shape.numel()
    row = copy.copy(state)
    row.shape, row.dtype = torch.Size((1, count + count % 2)), dtype
    return bitsandbytes.dequantize_4bit(packed.view(-1, 1), row).view(-1)[:count].view(state.shape)


def assert_same(ours: Nf4Weight, packed: Tensor, state: Any) -> None:
    """Every field, bit for bit."""
    theirs = Nf4Weight.from_quant_state(packed, state)
    assert (ours.shape, ours.dtype, ours.blocksize) == (theirs.shape, theirs.dtype, theirs.blocksize)
    for name in ("packed", "absmax", "code2", "absmax2", "offset"):
        own, other = getattr(ours, name), getattr(theirs, name)
        assert (own is None) == (other is None), name
        if own is not None:
            assert own.dtype == other.dtype, name
            assert own.shape == other.shape, name
            assert torch.equal(own, other), name


def check(w: Tensor, *, blocksize: int, nested: bool) -> None:
    packed, state = quantized(w, blocksize=blocksize, nested=nested)
    for backend in BACKENDS:
        with use_backend(backend):
            assert_same(nf4_quantize(w, blocksize=blocksize, double_quant=nested), packed, state)
            weight = Nf4Weight.from_quant_state(packed, state)
            dense = nf4_dequant(weight, dtype=torch.float32)
            assert torch.equal(dense, dequantized(packed, state, torch.float32))
            for dtype in DTYPES:
                assert torch.equal(nf4_dequant(weight, dtype=dtype), dense.to(dtype))


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.02) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_random_weights_quantise_and_dequantise_as_in_bitsandbytes(dtype, nested, blocksize):
    for shape in SHAPES:
        check(normal(*shape, dtype=dtype), blocksize=blocksize, nested=nested)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantised_bits_equal_bitsandbytes_in_each_dtype(dtype):
    for blocksize in (32, 64, 1024):
        packed, state = quantized(normal(48, 512, dtype=dtype), blocksize=blocksize, nested=True)
        weight = Nf4Weight.from_quant_state(packed, state)
        for backend in BACKENDS:
            with use_backend(backend):
                assert torch.equal(nf4_dequant(weight), dequantized(packed, state, dtype))


def adversarial() -> dict[str, Tensor]:
    """Weights [N, 64] that sit on edges."""
    code = torch.tensor(CODE)
    bounds = (code[:-1] + code[1:]) / 2
    around = torch.cat([bounds, *(torch.nextafter(bounds, torch.tensor(to)) for to in (2.0, -2.0))])
    ties = torch.zeros(6, 64)
    ties[:, 0] = torch.tensor([1.0, -1.0, 0.37, 3.0, 1e-3, 7e4])
    ties[:, 1:46] = around * ties[:, :1].abs()
    codes = torch.ones(4, 64)
    codes[:, :16] = code * torch.tensor([1.0, 0.1, 17.0, 3e-5])[:, None]
    codes[:, 16:] = codes[:, 15:16]
    signs = torch.where(torch.arange(256).view(4, 64) % 3 == 0, -0.0, 0.0)
    sparse = torch.zeros(300, 64)
    sparse[::7, 5] = -torch.arange(1, 44, dtype=torch.float32)
    return {
        "ties": ties,
        "codes": codes,
        "signed zeros": signs,
        "zero blocks": sparse,
        "denormal": normal(40, 64, scale=1e-40),
        "around the smallest divisor": normal(40, 64, scale=1e-38),
        "equal statistics": torch.ones(512, 64),
        "huge": normal(40, 64, scale=1e35),
        "spread": normal(600, 64) * torch.logspace(-30, 30, 600)[:, None],
    }


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", list(adversarial()))
def test_edge_values_quantise_and_dequantise_as_in_bitsandbytes(name, nested):
    w = adversarial()[name]
    for blocksize in (64, 256):
        check(w, blocksize=blocksize, nested=nested)
        check(w.reshape(-1)[:-7].view(1, -1), blocksize=blocksize, nested=nested)


def test_the_dynamic_map_is_bitsandbytes():
    assert torch.equal(dynamic_map(), bitsandbytes.create_dynamic_map())


def test_statistics_on_every_step_of_the_dynamic_map_quantise_as_in_bitsandbytes():
    steps = (torch.arange(1, 65536).double() - 0.5) / 65535 * 2 - 1
    moved = [(steps + shift).float() for shift in (-1e-7, -3e-8, 0.0, 3e-8, 1e-7)]
    values = torch.cat(moved)[: len(moved) * 65535 // 255 * 255].view(-1, 255)
    w = torch.cat((torch.ones(len(values), 1), values), dim=1).view(-1)
    theirs, _ = bitsandbytes.quantize_blockwise(w, blocksize=256)
    ours, absmax = quantize_values(w)
    assert torch.equal(ours, theirs)
    assert bool((absmax == 1).all())


def test_a_round_trip_of_our_own_is_bitsandbytes_round_trip():
    w = normal(96, 200, dtype=torch.bfloat16)
    packed, state = quantized(w, blocksize=64, nested=True)
    assert torch.equal(nf4_dequant(nf4_quantize(w)), dequantized(packed, state, torch.bfloat16))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_other_storage_dtypes_are_read_as_bytes(storage):
    w = normal(16, 128)
    packed, state = bitsandbytes.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    dense = bitsandbytes.dequantize_4bit(packed, state)
    for backend in BACKENDS:
        with use_backend(backend):
            assert torch.equal(nf4_dequant(Nf4Weight.from_quant_state(packed, state)), dense)


@pytest.mark.parametrize("columns", [64, 75, 96])
def test_the_output_may_be_columns_of_a_larger_buffer(columns):
    weight = nf4_quantize(normal(21, columns))
    expected = nf4_dequant(weight)
    for backend in (*BACKENDS, "triton"):
        for dtype in (torch.float32, torch.float16):
            buffer = torch.full((21, columns + 16), 7.0, dtype=dtype)
            with use_backend(backend):
                nf4_dequant(weight, out=buffer[:, 8 : 8 + columns])
            assert torch.equal(buffer[:, 8 : 8 + columns], expected.to(dtype))
            assert bool((buffer[:, :8] == 7).all())
            assert bool((buffer[:, 8 + columns :] == 7).all())


def test_what_is_not_nf4_is_refused():
    packed, state = bitsandbytes.quantize_4bit(normal(16, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="fp4"):
        Nf4Weight.from_quant_state(packed, state)
    with pytest.raises(ValueError, match="block size"):
        nf4_quantize(normal(4, 4), blocksize=48)
    with pytest.raises(ValueError, match="float64"):
        nf4_quantize(normal(4, 4).double())
    weight = nf4_quantize(normal(8, 64))
    for change in ({"packed": weight.packed[:-1]}, {"absmax": weight.absmax[:-1]}, {"absmax2": weight.absmax2[:0]}):
        with pytest.raises(ValueError, match=next(iter(change))):
            nf4_dequant(replace(weight, **change))
    with pytest.raises(ValueError, match="strides"):
        nf4_dequant(weight, out=torch.empty(64, 8).t())


def test_the_result_does_not_depend_on_the_number_of_threads():
    w = normal(37, 1000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = nf4_quantize(w, double_quant=False)
            results.append((weight.packed, weight.absmax, nf4_dequant(weight)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
