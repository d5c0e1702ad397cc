"""Timing decoded steps and prefill of a shape: what is timed is what a step does, and its bytes are counted right."""

import pytest
import torch

from milonga.errors import UserError
from milonga.evaluation.decoding import (
    Divergence,
    fill_state,
    first_divergence,
    measure_decode,
    measure_prefill,
    random_network,
    step_state_bytes,
    weight_bytes,
)
from milonga.models.presets import preset
from milonga.state import named_tensors
from tests.inference.helpers import CONFIGS, SAMBA, opinionated


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("drawing", ["none", "plain", "host"])
def test_decode_of_a_shape(name: str, drawing: str) -> None:
    time = measure_decode(
        CONFIGS[name], 2, position=9, drawing=drawing, dtype=torch.float32, device="cpu", steps=2, repeats=2
    )
    assert 0 < time.floor_milliseconds < time.milliseconds
    assert (time.batch, time.position, time.captured, time.device) == (2, 9, False, "cpu")
    assert time.to_json()["drawing"] == drawing


def test_prefill_reads_everything_in_pieces() -> None:
    network, seen = random_network(SAMBA, "cpu", torch.float32), []
    forward = network.forward

    def watched(tokens, *args, **kwargs):
        seen.append(tuple(tokens.shape))
        return forward(tokens, *args, **kwargs)

    network.forward = watched
    time = measure_prefill(network, 70, 2, piece=32, repeats=1)
    assert seen == [(2, 32), (2, 32), (2, 6)] * 2
    assert time.milliseconds > 0 and (time.length, time.batch, time.piece) == (70, 2, 32)


def test_bytes_of_a_step() -> None:
    network = random_network(SAMBA, "cpu", torch.bfloat16)
    state = network.init_state(3)
    fill_state(state, 4)
    assert all(tensor.any() for _, tensor in named_tensors(state) if tensor.numel())
    expected = 0
    for name, tensor in named_tensors(state):
        if name.endswith((".k", ".v")):  # window 7: 6 slots, 4 of them filled
            assert tensor.shape[1] == 6
            expected += 3 * 4 * 16 * 2
        elif not name.endswith(".position"):
            expected += 2 * tensor.numel() * tensor.element_size()
    positions = 2 * 2 * 3 * 8
    assert step_state_bytes(state, 4) == expected + positions
    assert weight_bytes(network) == sum(p.numel() * p.element_size() for p in network.parameters())
    untied = random_network(SAMBA.replace(tied=False), "cpu", torch.bfloat16)
    assert weight_bytes(untied) == weight_bytes(network)


def test_a_random_network_predicts_something() -> None:
    network = random_network(SAMBA, "cpu", torch.float32)
    logits = network(torch.randint(256, (1, 50))).logits
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    assert network.head.weight is network.embedding.weight
    assert random_network(preset("mamba-432m").replace(repeats=1), "cpu", torch.bfloat16).head.weight.shape[0] == 32000


def test_texts_written_together_do_not_diverge_where_it_is_exact() -> None:
    lm = opinionated()
    lm.network.bfloat16()
    exact = first_divergence(lm, texts=3, tokens=40, exact=True, temperature=0.8)
    assert exact == Divergence((None, None, None), 40, True) and exact.diverged == 0
    fast = first_divergence(lm, texts=3, tokens=40, prompt=b"once")
    assert len(fast.first) == 3 and all(place is None or 0 <= place < 40 for place in fast.first)
    assert fast.diverged == sum(place is not None for place in fast.first)


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"batch": 1, "steps": 0}, {"batch": 1, "position": -1}])
def test_numbers_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match="decode: "):
        measure_decode(SAMBA, device="cpu", **arguments)
    with pytest.raises(UserError, match="prefill: "):
        measure_prefill(SAMBA, 0, device="cpu")
    with pytest.raises(UserError, match="first_divergence: "):
        first_divergence(opinionated(), texts=0)
