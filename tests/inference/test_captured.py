"""Decoding in place: the buffers of a `Decoder` and of a `CapturedRunner` hold what the network itself computes."""

import numpy as np
import pytest
import torch

from milonga.errors import UserError
from milonga.inference.captured import RUN, CapturedRunner, Decoder, decode_step, runner_for
from milonga.inference.device_sampling import device_mode, draw_on_device
from milonga.inference.runner import NetworkRunner
from milonga.inference.sampling import Sampler, Sampling, Uniforms
from milonga.layers.linear import store_weights
from milonga.state import clone, named_tensors, select, to_flat
from tests.inference.helpers import ATTENTION, CONFIGS, GROWING, opinionated
from tests.laws.test_laws import SPLIT_BOUND, assert_same_state
from tests.ops.helpers import relative_rms

every_model = pytest.mark.parametrize("name", list(CONFIGS))


def read(network, tokens, state=None):
    with torch.no_grad():
        output = network(tokens, state, logits="last")
    return output.logits, output.state


@every_model
def test_steps_in_place_are_the_network(name: str) -> None:
    network = opinionated(CONFIGS[name]).network
    tokens = torch.randint(256, (3, 40))
    decoder = Decoder(network, 3, capacity=40)
    logits, state = read(network, tokens[:, :17])
    for row in range(3):
        decoder.load(row, select(state, [row]), logits[row])
    places = [tensor.data_ptr() for _, tensor in named_tensors(decoder.state)]
    for t in range(17, 40):
        decoder.tokens.copy_(tokens[:, t : t + 1])
        decoder.step(3)
        logits, state = read(network, tokens[:, t : t + 1], state)
        assert relative_rms(decoder.logits, logits) <= SPLIT_BOUND
    assert places == [tensor.data_ptr() for _, tensor in named_tensors(decoder.state)]
    for row in range(3):
        taken, behind = decoder.take(row, 40)
        assert_same_state(taken, select(state, [row]))
        assert torch.equal(behind, decoder.logits[row])
        assert {k: v.shape for k, v in to_flat(taken).items()} == {
            k: v.shape for k, v in to_flat(select(state, [row])).items()
        }


@every_model
def test_rows_move_clear_and_grow(name: str) -> None:
    network = opinionated(CONFIGS[name]).network
    decoder = Decoder(network, 4, capacity=8)
    tokens = torch.randint(256, (2, 9))
    states = []
    for row in range(2):
        logits, state = read(network, tokens[row : row + 1, : 5 + row])
        decoder.load(row, state, logits[0])
        states.append((state, logits[0]))
    decoder.move(1, 3)
    decoder.clear(1)
    assert not any(tensor[1].any() for _, tensor in named_tensors(decoder.state))
    assert not decoder.logits[1].any()
    decoder.ensure(9)
    assert decoder.capacity == (16 if name == "growing" else 8)
    for row, length, (state, logits) in ((0, 5, states[0]), (3, 6, states[1])):
        taken, behind = decoder.take(row, length)
        assert_same_state(taken, state, 0.0)
        assert torch.equal(behind, logits)


@every_model
def test_a_run_draws_what_the_sampler_draws(name: str) -> None:
    network = opinionated(CONFIGS[name]).network
    settings = [Sampling(temperature=0), Sampling(temperature=0.8, seed=3), Sampling(top_k=20, top_p=0.9, seed=4)]
    decoder = Decoder(network, 4, capacity=64)
    samplers = [Sampler(sampling) for sampling in settings]
    steps, expected = 20, []
    for row, sampling in enumerate(settings):
        decoder.temperature[row], decoder.top_p[row] = sampling.temperature, sampling.top_p or 1.0
        decoder.top_k[row] = sampling.top_k or 256
        uniforms = Uniforms(sampling.seed)
        decoder.uniforms[:steps, row] = torch.tensor([uniforms(position) for position in range(steps)])
        logits, state, ids = torch.zeros(1, 256), network.init_state(1), []
        for _ in range(steps):
            ids.append(samplers[row].draw(logits[0].numpy()))
            logits, state = read(network, torch.tensor([[ids[-1]]]), state)
        expected.append(ids)
    mode = device_mode(settings)
    assert mode == "sorted"
    got = decoder.run(4, steps, mode)
    assert got[:, :3].T.tolist() == expected


@pytest.mark.parametrize("mode", ["plain", "sorted"])
def test_the_device_draws_from_the_distribution(mode: str) -> None:
    """Many uniform numbers over one row of logits give exactly the ids that the host gives."""
    logits = torch.randn(50).double()
    logits[[3, 7]] = logits.max() + 1  # equals
    for sampling in (Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.6), Sampling(top_k=9, top_p=0.5)):
        if mode == "plain" and (sampling.top_k or sampling.top_p):
            continue
        count = 2000
        uniform = torch.from_numpy(np.random.default_rng(0).random(count))
        ids = draw_on_device(
            logits.expand(count, -1),
            torch.full((count,), sampling.temperature).double(),
            torch.full((count,), sampling.top_k or 50),
            torch.full((count,), sampling.top_p or 1.0).double(),
            uniform,
            mode,
        )
        sampler = Sampler(sampling)
        probabilities = sampler.probabilities(logits.numpy()).cumsum()
        expected = probabilities.searchsorted(uniform.numpy() * probabilities[-1], side="right")
        assert ids.tolist() == expected.tolist()


def test_settings_that_need_the_host() -> None:
    assert device_mode([Sampling(temperature=0), Sampling(temperature=0, seed=2)]) == "greedy"
    assert device_mode([Sampling(temperature=0), Sampling()]) == "plain"
    for sampling in (Sampling(min_p=0.1), Sampling(repetition_penalty=1.2), Sampling(banned=b"a")):
        assert device_mode([Sampling(), sampling]) is None


@every_model
def test_a_captured_runner_is_a_runner(name: str) -> None:
    network = opinionated(CONFIGS[name]).network
    plain, captured = NetworkRunner(network), CapturedRunner(network, 2, capacity=64)
    tokens = torch.randint(256, (2, 60))
    _, theirs = read(network, tokens[:, :11])
    mine, at = clone(theirs), 11
    pick = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for length in (3, 4, 7, 1, 8):
            piece = tokens[:, at : at + length]
            expected, trace = plain.verify(piece, theirs)
            got, captured_trace = captured.verify(piece, mine)
            assert relative_rms(got[:, :length], expected) <= SPLIT_BOUND
            keep = torch.randint(length + 1, (2,), generator=pick).tolist()
            for kept in ([0, length], keep):  # the trace serves once more
                theirs_after, mine_after = (
                    plain.commit(theirs, trace, kept),
                    captured.commit(mine, captured_trace, kept),
                )
                assert_same_state(mine_after, theirs_after)
            logits, theirs = plain.step(piece[:, -1:], theirs_after)
            behind, mine = captured.step(piece[:, -1:], mine_after)
            assert relative_rms(behind, logits) <= SPLIT_BOUND
            at += length


@pytest.mark.parametrize("name", ["growing", "attention"])
def test_a_captured_runner_grows(name: str) -> None:
    """Past three doublings: what it returned before stays its own, a long state comes in, stale traces are refused."""
    network = opinionated(GROWING if name == "growing" else ATTENTION.replace_layer("swa", window=None)).network
    plain, captured = NetworkRunner(network), CapturedRunner(network, 2, capacity=4)
    tokens = torch.randint(256, (2, 400))
    theirs = mine = network.init_state(2)
    at, capacities = 0, set()
    with torch.inference_mode():
        while at < 40:
            captured.ensure(at + 8)
            piece = tokens[:, at : at + 7]
            expected, trace = plain.verify(piece, theirs)
            got, captured_trace = captured.verify(piece, mine)
            assert relative_rms(got[:, :7], expected) <= SPLIT_BOUND
            theirs, mine = plain.commit(theirs, trace, [5, 7]), captured.commit(mine, captured_trace, [5, 7])
            logits, theirs = plain.step(piece[:, -1:], theirs)
            behind, mine = captured.step(piece[:, -1:], mine)
            assert relative_rms(behind, logits) <= SPLIT_BOUND
            assert any(mine is state for state in captured._states)
            at += 8
            capacities.add(captured.capacity)
        assert capacities == {8, 16, 32, 64}
        captured.verify(piece, mine)
        captured.ensure(65)
        with pytest.raises(AssertionError):
            captured.commit(mine, captured_trace, [1, 1])
        _, long = read(network, tokens[:, :300])  # its buffers have 512 slots
        expected, trace = plain.verify(piece, long)
        got, captured_trace = captured.verify(piece, long)
        assert captured.capacity == 512 and relative_rms(got[:, :7], expected) <= SPLIT_BOUND
        logits, _ = plain.step(piece[:, :1], plain.commit(long, trace, [3, 0]))
        behind, _ = captured.step(piece[:, :1], captured.commit(long, captured_trace, [3, 0]))
        assert relative_rms(behind, logits) <= SPLIT_BOUND


def test_a_runner_for_the_device() -> None:
    """On a CPU the plain one; one made outside inference mode grows inside it, and the other way round."""
    network = opinionated(GROWING).network
    assert isinstance(runner_for(network), NetworkRunner)
    with torch.inference_mode():
        captured = CapturedRunner(network)
    captured.ensure(65)
    with torch.no_grad():
        _, trace = captured.verify(torch.tensor([[1, 2]]), network.init_state(1))
        assert captured.commit(network.init_state(1), trace, [2]) is captured._states[1]


def test_bad_numbers() -> None:
    network = opinionated().network
    for arguments in (
        {"rows": 0},
        {"rows": 2, "capacity": 0},
        {"rows": 2, "buckets": [3]},
        {"rows": 2, "buckets": [0]},
    ):
        with pytest.raises(UserError, match="batch: "):
            Decoder(network, **arguments)
    assert Decoder(network, 6).buckets == [1, 2, 4, 6] and Decoder(network, 6).bucket(3) == 4 and RUN >= 1


def test_a_step_of_a_network_in_float64() -> None:
    network = opinionated().network.double()
    with torch.no_grad():
        logits = decode_step(network, torch.tensor([[7]]), state := network.init_state(1))
        expected = network(torch.tensor([[7]]))
    assert logits.dtype == torch.float64 and torch.equal(logits, expected.logits[:, 0])
    assert_same_state(state, expected.state, 1e-12)


@every_model
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_states_do_not_take_the_dtype_of_stored_weights(name: str, storage: str) -> None:
    network = opinionated(CONFIGS[name]).network
    expected = [tensor.dtype for _, tensor in named_tensors(network.init_state(1))]
    store_weights(network, storage)
    assert [tensor.dtype for _, tensor in named_tensors(network.init_state(1))] == expected
    tokens = torch.randint(256, (2, 9))
    logits, state = read(network, tokens)
    decoder = Decoder(network, 2, capacity=16)
    for row in range(2):
        decoder.load(row, select(state, [row]), logits[row])
    decoder.tokens.copy_(tokens[:, :1])
    decoder.step(2)
    assert relative_rms(decoder.logits, read(network, tokens[:, :1], state)[0]) <= SPLIT_BOUND
