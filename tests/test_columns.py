"""Neighbours in one storage are joined without a copy; everything else is copied, with the same values."""

import pytest
import torch
from burnish.kernels.columns import are_adjacent, joined, split_columns


def test_adjacent_columns_are_joined_as_a_view():
    whole = torch.randn(3, 4, 12)
    parts = whole[..., 1:11].split([2, 5, 3], dim=-1)
    assert joined(parts).data_ptr() == whole[..., 1:].data_ptr()
    assert torch.equal(joined(parts), whole[..., 1:11])


def test_adjacent_rows_are_joined_as_a_view():
    whole = torch.randn(12, 4)
    parts = (whole[:5], whole[5:6], whole[6:])
    assert joined(parts, dim=0).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(parts, dim=0), whole)
    transposed = tuple(part.t() for part in parts)
    assert torch.equal(joined(transposed, dim=1), whole.t())
    assert are_adjacent(transposed, dim=1)


@pytest.mark.parametrize("order", [(1, 0), (0, 2), (0, 0)])
def test_parts_that_do_not_follow_each_other_are_copied(order):
    whole = torch.randn(4, 9)
    pieces = whole.split(3, dim=-1)
    parts = [pieces[i] for i in order]
    assert not are_adjacent(parts)
    assert torch.equal(joined(parts), torch.cat(parts, dim=-1))


def test_separate_storages_and_mixed_strides_are_copied():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for parts in ((a, b), (a, torch.randn(3, 4).t()), (a.expand(2, 4, 3), b.expand(2, 4, 3))):
        assert torch.equal(joined(parts), torch.cat(parts, dim=-1))


def test_tracked_parts_keep_their_gradients():
    whole = torch.randn(4, 6)
    parts = [part.requires_grad_() for part in whole.split(3, dim=-1)]
    joined(parts).sum().backward()
    assert all(torch.equal(part.grad, torch.ones(4, 3)) for part in parts)


def test_gradients_of_split_columns_come_back_in_one_buffer():
    y = torch.randn(2, 5, 7, requires_grad=True)
    z = y * 1
    parts = split_columns(z, (3, 4))
    assert all(part.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() for part in parts)
    buffer = torch.randn(2, 5, 7)
    seen = []
    z.register_hook(seen.append)
    torch.autograd.backward(parts, buffer.split((3, 4), dim=-1))
    assert seen[0].data_ptr() == buffer.data_ptr()
    assert torch.equal(y.grad, buffer)


def test_a_part_without_gradient_counts_as_zero():
    y = torch.randn(3, 6, requires_grad=True)
    (split_columns(y, (2, 2, 2))[1] * 2).sum().backward()
    assert torch.equal(y.grad, torch.tensor([0.0, 0, 2, 2, 0, 0]).expand(3, 6))


def test_split_columns_equals_torch_in_double():
    y = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: split_columns(t, (1, 2, 3)), y)
    assert split_columns(y, (6,))[0] is y


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="do not add up"):
        split_columns(torch.randn(2, 5), (2, 2))
