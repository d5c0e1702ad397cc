"""Tree functions over states."""

from typing import NamedTuple

import pytest
import torch

from milonga import state as states


class Layer(NamedTuple):
    sums: torch.Tensor
    ring: torch.Tensor


def made(rows=2, slots=3, start=0.0):
    return (
        Layer(torch.arange(rows * 2.0).view(rows, 2) + start, torch.ones(rows, slots, 2) * (1 + start)),
        [torch.arange(rows)],
        (),
    )


def test_names_join_fields_and_indices():
    state = made()
    assert [name for name, _ in states.named_tensors(state)] == ["0.sums", "0.ring", "1.0"]
    assert list(states.to_flat(state)) == ["0.sums", "0.ring", "1.0"]
    assert states.nbytes(state) == 4 * 4 + 12 * 4 + 2 * 8
    assert (states.batch_size(state), states.batch_size(())) == (2, 0)


def test_flat_and_back():
    state = made()
    again = states.from_flat(states.to_flat(state), like=made(start=9.0))
    assert isinstance(again[0], Layer) and isinstance(again[1], list) and again[2] == ()
    for (_, left), (_, right) in zip(states.named_tensors(again), states.named_tensors(state), strict=True):
        assert torch.equal(left, right)
        assert left.data_ptr() != right.data_ptr()


def test_flat_takes_the_dtype_of_the_template():
    flat = {name: value.double() for name, value in states.to_flat(made()).items()}
    assert states.from_flat(flat, like=made())[0].sums.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda flat: flat.pop("0.sums"), "missing.*0.sums"),
        (lambda flat: flat.update(more=torch.zeros(1)), "unexpected.*more"),
        (lambda flat: flat.update({"0.ring": torch.zeros(2, 4, 2)}), r"0.ring must be \[2, 3, 2\], got \[2, 4, 2\]"),
        (lambda flat: flat.update({"0.sums": torch.zeros(3, 2)}), "0.sums must be"),
    ],
)
def test_flat_that_does_not_fit(change, words):
    flat = states.to_flat(made())
    change(flat)
    with pytest.raises(ValueError, match=words):
        states.from_flat(flat, like=made())


def test_a_buffer_that_grows_fits_an_empty_one():
    flat = states.to_flat(made(slots=5))
    assert states.from_flat(flat, like=made(slots=0))[0].ring.shape == (2, 5, 2)


def test_select_and_merge():
    left, right = made(2), made(1, start=10.0)
    both = states.merge([left, right])
    assert states.batch_size(both) == 3
    picked = states.select(both, [2, 0, 0])
    assert picked[0].sums.tolist() == [[10.0, 11.0], [0.0, 1.0], [0.0, 1.0]]
    assert torch.equal(states.select(both, torch.tensor([0, 1]))[0].ring, left[0].ring)
    with pytest.raises(ValueError, match="at least one"):
        states.merge([])


def test_merge_pads_the_shorter_buffer_at_its_end():
    ring = states.merge([made(1, slots=2), made(1, slots=4)])[0].ring
    assert ring[0, :, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert ring[1, :, 0].tolist() == [1.0] * 4


def test_clone_detach_and_to():
    state = states.map_tensors(lambda tensor: tensor.double().requires_grad_(), made())
    copy, cut = states.clone(state), states.detach(state)
    assert copy[0].sums.requires_grad and not cut[0].sums.requires_grad
    assert copy[0].sums.data_ptr() != state[0].sums.data_ptr() == cut[0].sums.data_ptr()
    moved = states.to(cut, "meta")
    assert moved[0].ring.device.type == "meta" and moved[0].ring.dtype == torch.float64
