"""The order of rows is a stateless function of the step; the batches do not depend on how they are shared out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from burnish.harness.data.loader import Loader, cut_cells, eval_batches
from burnish.harness.data.sampler import ABSENT, Sampler
from burnish.harness.data.store import Store, StoreWriter
from hypothesis import given, settings
from hypothesis import strategies as st

FACTORISATIONS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1), (1, 8)]
"""(micro_batch_size, world_size) of a global batch of 8."""


def make_sampler(num_rows, *, batch=8, seed=0, weights=(1.0,), sources=None, **length):
    source = np.zeros(num_rows, dtype=np.uint16) if sources is None else np.array(sources, dtype=np.uint16)
    length = length or {"max_steps": 100}
    return Sampler(source, list(weights), seed=seed, global_batch_size=batch, **length)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_every_row_is_seen_once_per_epoch(num_rows, batch, epochs, seed):
    sampler = make_sampler(num_rows, batch=batch, seed=seed, epochs=epochs)
    seen = np.concatenate([sampler.indices(step) for step in range(sampler.total_steps)])
    assert (seen[: num_rows * epochs] != ABSENT).all()
    assert (seen[num_rows * epochs :] == ABSENT).all()
    for epoch in range(epochs):
        assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 16), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_does_not_depend_on_the_steps_before(num_rows, batch, steps):
    warm = make_sampler(num_rows, batch=batch)
    for step in steps:
        cold = make_sampler(num_rows, batch=batch)
        assert (warm.indices(step) == cold.indices(step)).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.lists(st.floats(0.01, 4), min_size=3, max_size=3),
    st.integers(0, 5),
)
def test_weights_repeat_and_thin_out_sources(sizes, weights, epoch):
    weights = weights[: len(sizes)]
    sources = [number for number, size in enumerate(sizes) for _ in range(size)]
    sampler = make_sampler(len(sources), batch=1, weights=weights, sources=sources)
    size = sampler.epoch_size
    seen = np.array([sampler.indices(step)[0] for step in range(epoch * size, (epoch + 1) * size)])
    for number, (rows, weight) in enumerate(zip(sizes, weights, strict=True)):
        of_rows = np.bincount(seen, minlength=len(sources))[np.array(sources) == number]
        assert set(of_rows) <= {int(weight), int(weight) + 1}
        assert abs(of_rows.sum() - weight * rows) <= 0.5 + 1e-9 or size == 1


def test_the_fraction_of_a_source_is_fresh_in_every_epoch():
    sampler = make_sampler(100, batch=50, weights=[0.5])
    assert sampler.epoch_size == 50
    assert set(sampler.indices(0)) != set(sampler.indices(1))


def test_epochs_differ_and_seeds_differ():
    sampler = make_sampler(64, batch=64)
    assert (sampler.indices(0) != sampler.indices(1)).any()
    assert (make_sampler(64, batch=64, seed=1).indices(0) != sampler.indices(0)).any()


def test_the_order_is_frozen():
    assert make_sampler(10, batch=10, seed=42).indices(0).tolist() == [0, 1, 4, 2, 6, 8, 5, 9, 7, 3]


def test_steps_and_epochs_are_counted():
    sampler = make_sampler(20, batch=8, epochs=2.5)
    assert (sampler.total_steps, sampler.steps_per_epoch, sampler.epoch(5)) == (7, 2.5, 2.0)
    assert sampler.indices(6).tolist()[2:] == [ABSENT] * 6
    assert make_sampler(20, max_steps=3).total_steps == 3


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_cells_hold_every_index_once(data, micro, packing):
    lengths = np.array(data.draw(st.lists(st.integers(1, 50), min_size=8, max_size=30)))
    indices = np.array(data.draw(st.lists(st.integers(-1, len(lengths) - 1), min_size=8, max_size=8)))
    cells = cut_cells(indices, lengths, micro_batch_size=micro, packing=packing)
    assert all(len(cell) == micro for cell in cells)
    assert sorted(index for cell in cells for index in cell) == sorted(indices.tolist())
    shuffled = cut_cells(indices[::-1], lengths, micro_batch_size=micro, packing=packing)
    assert shuffled == cells


def test_packed_cells_are_balanced_and_padded_cells_are_alike():
    lengths = np.array([100, 1, 2, 3, 90, 4, 5, 80])
    packed = cut_cells(np.arange(8), lengths, micro_batch_size=4, packing=True)
    loads = [lengths[cell].sum() for cell in packed]
    assert max(loads) - min(loads) <= 75
    assert cut_cells(np.arange(8), lengths, micro_batch_size=4, packing=False) == [[0, 4, 7, 6], [5, 3, 2, 1]]


def make_store(folder, *, num_rows=21):
    rng = np.random.default_rng(0)
    writer = StoreWriter(folder)
    for row in range(num_rows):
        size = int(rng.integers(2, 12))
        mask = np.array([0, *rng.integers(0, 2, size - 2), 1], dtype=np.uint8)
        writer.write({"input_ids": np.full(size, row, dtype=np.int32), "loss_mask": mask}, 0, int(mask.sum()))
    writer.close()
    return Store(folder)


def collate(examples, processor, config, pad_to=None):
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), width), -1)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, example in enumerate(examples):
        ids[i, : len(example["input_ids"])] = torch.from_numpy(example["input_ids"].astype(np.int64))
        mask[i, : len(example["loss_mask"])] = torch.from_numpy(example["loss_mask"].astype(bool))
    return {"input_ids": ids, "loss_mask": mask}


TASK = SimpleNamespace(
    collate=collate, ignore=lambda example: example | {"loss_mask": np.zeros_like(example["loss_mask"])}
)


def config(*, packing=False):
    return SimpleNamespace(data=SimpleNamespace(packing=packing))


def supervised_rows(batches):
    """Sorted (row, number of its learned tokens) of all examples that are not switched off."""
    return sorted(
        (int(ids[0]), int(mask.sum()))
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True)
        if mask.any()
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("micro", "world"), FACTORISATIONS)
def test_every_factorisation_gives_the_same_rows_and_counts(tmp_path, micro, world, packing):
    store = make_store(tmp_path / "store")
    sampler = make_sampler(len(store), epochs=2)
    for step in range(sampler.total_steps):
        parts = []
        for rank in range(world):
            options = {"micro_batch_size": micro, "world_size": world, "rank": rank}
            loader = Loader(store, sampler, TASK, None, config(packing=packing), **options)
            parts.append(loader.step(step))
        present = [index for index in sampler.indices(step).tolist() if index != ABSENT]
        assert supervised_rows(batch for part in parts for batch in part.micro_batches) == sorted(
            (index, int(store.num_supervised[index])) for index in present
        )
        assert {part.num_supervised for part in parts} == {int(store.num_supervised[present].sum())}
        assert {part.num_tokens for part in parts} == {int(store.lengths[present].sum())}
        assert {len(part.micro_batches) for part in parts} == {8 // micro // world}
        assert sorted(cell for part in parts for cell in part.cells) == list(range(8 // micro))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_micro_batch_depends_on_its_cell_and_not_on_the_world(tmp_path, micro):
    store = make_store(tmp_path / "store")
    cells = {}
    for world in (1, 2):
        for rank in range(world):
            options = {"micro_batch_size": micro, "world_size": world, "rank": rank}
            part = Loader(store, make_sampler(len(store)), TASK, None, config(), **options).step(3)
            for cell, batch in zip(part.cells, part.micro_batches, strict=True):
                assert torch.equal(cells.setdefault(cell, batch)["input_ids"], batch["input_ids"])


@pytest.mark.parametrize(("micro", "world"), FACTORISATIONS)
@pytest.mark.parametrize("max_examples", [None, 1, 5, 100])
def test_evaluation_sees_every_example_once_on_any_world(tmp_path, micro, world, max_examples):
    store = make_store(tmp_path / "store")
    options = {"micro_batch_size": micro, "world_size": world, "max_examples": max_examples}
    ranks = [list(eval_batches(store, TASK, None, config(), rank=rank, **options)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [row for row, _ in supervised_rows(batch for batches in ranks for batch in batches)]
    count = min(len(store), max_examples or len(store))
    assert len(set(seen)) == len(seen) == count
    if count == len(store):
        assert seen == list(range(len(store)))
