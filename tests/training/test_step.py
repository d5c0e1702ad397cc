"""Gradients of micro-batches, carried states, and what a step does with a loss that is no number."""

import math

import numpy as np
import pytest
import torch

from milonga.data.prepare import prepare
from milonga.data.windows import WindowSampler
from milonga.state import named_tensors
from milonga.training import OptimizerConfig, build_optimizer, training_step
from milonga.training.step import backward, enter, leave, micro_batches

from . import runs

CPU = torch.device("cpu")
# float64 sums of 100 terms in another order
ROUNDING = 1e-12


@pytest.fixture
def network():
    return runs.RunConfig.parse(runs.settings("nowhere"), "test").model.build().double()


@pytest.fixture
def corpus(tmp_path):
    made = runs.config(runs.write_texts(tmp_path / "texts"))
    return prepare(made.data, tmp_path / "data")[0]


def _gradients(network, batch, state=None, accumulation=1):
    network.zero_grad()
    nats, tokens, after = backward(network, batch, state, device=CPU, accumulation=accumulation)
    return float(nats), tokens, after, {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation_gives_the_gradient_of_the_whole_batch(network, corpus, packed, carried, accumulation):
    sampler = WindowSampler(corpus, window=200 if packed else 40, batch=6, seed=1, carried=carried, isolate=packed)
    batch = sampler.batch(0)
    assert (batch.segments is not None) is packed
    state = enter(network, network.init_state(6), batch) if carried else None
    nats, tokens, after, whole = _gradients(network, batch, state)
    again, counted, pieces_after, pieces = _gradients(network, batch, state, accumulation)
    assert counted == tokens == int((batch.targets != -100).sum())
    assert again == pytest.approx(nats, rel=1e-6)  # the losses are summed in fp32
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        assert (pieces[name] - gradient).abs().max().item() <= ROUNDING * max(scale, 1.0), name
    if carried:
        for (name, one), (_, other) in zip(named_tensors(after), named_tensors(pieces_after), strict=True):
            assert (one - other).abs().max().item() <= ROUNDING if one.numel() else other.numel() == 0, name
            assert not one.requires_grad


def test_pieces_of_a_packed_row_cover_it(corpus):
    batch = WindowSampler(corpus, window=300, batch=4, seed=1).batch(0)
    pieces = list(micro_batches(batch, 3))
    assert 1 < len(pieces) <= 3
    assert torch.equal(torch.cat([piece.tokens for piece in pieces], 1), batch.tokens)
    assert torch.equal(torch.cat([piece.targets for piece in pieces], 1), batch.targets)
    assert [n for piece in pieces for n in piece.segments.lengths.tolist()] == batch.segments.lengths.tolist()
    assert [piece.rows.start for piece in pieces[1:]] == [piece.rows.stop for piece in pieces[:-1]]


def test_a_carried_state_is_that_of_the_document_read_so_far(network, corpus):
    """After many steps, through documents that end and start inside rows, each row's state is what a plain reading of
    its document from its start gives."""
    sampler = WindowSampler(corpus, window=60, batch=3, seed=2, carried=True)
    state, packed, fresh = network.init_state(3), 0, 0
    for step in range(25):
        batch = sampler.batch(step)
        packed, fresh = packed + (batch.segments is not None), fresh + int(batch.fresh.sum())
        before = enter(network, state, batch)
        _, _, after = backward(network, batch, before, device=CPU)
        state = leave(after, batch)
    assert packed > 3
    assert fresh >= 3
    compared = 0
    for row, position in enumerate(sampler.positions(25)):
        index = sampler.ring.at((position - 1) % sampler.ring.length)
        start, end = sampler.ring.start(index), (position - 1) % sampler.ring.length + 1
        if (sampler.positions(0)[row] - start) % sampler.ring.length < end - start:
            continue  # the row began inside this document
        text = torch.from_numpy(np.array(corpus.document(index)[: end - start], dtype=np.int64))[None]
        expected = network(text).state
        for (name, one), (_, other) in zip(named_tensors(expected), named_tensors(state), strict=True):
            assert (one[0] - other[row]).abs().max().item() <= 1e-9 if one.numel() else True, name
        compared += 1
    assert compared >= 2


def test_a_step_clips_and_reports_the_norm_before_clipping(network, corpus):
    batch = WindowSampler(corpus, window=20, batch=2, seed=0).batch(0)
    optimizer = build_optimizer(network, OptimizerConfig())
    *_, gradients = _gradients(network, batch)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    result = training_step(network, optimizer, batch, device=CPU, lr=0.01, clip=norm / 10)
    assert result.grad_norm == pytest.approx(norm)
    clipped = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters()))
    assert clipped == pytest.approx(norm / 10, rel=1e-4)
    assert training_step(network, optimizer, batch, device=CPU, lr=0.01, clip=None).grad_norm > norm / 10


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nothing_moves_on_a_loss_that_is_no_number(network, corpus, kind):
    """Whether the device decides it (AdamW) or the host: nor do moments, and no step is counted."""
    batch = WindowSampler(corpus, window=20, batch=2, seed=0).batch(0)
    optimizer = build_optimizer(network, OptimizerConfig(name=kind))
    assert optimizer.decides == (kind == "adamw")
    training_step(network, optimizer, batch, device=CPU, lr=0.01)
    moments = {name: value.clone() for name, value in optimizer.tensors().items()}
    with torch.no_grad():
        network.norm.weight[3] = float("nan")
    before = [parameter.clone() for parameter in network.parameters()]
    result = training_step(network, optimizer, batch, device=CPU, lr=0.01)
    assert math.isnan(result.nats)
    for one, other in zip(before, network.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    after = optimizer.tensors()
    assert moments.keys() == after.keys() and all(torch.equal(moments[name], after[name]) for name in moments)
