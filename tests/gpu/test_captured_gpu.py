"""Captured decoding on a GPU: the graphs compute what the network computes, and never wait for the host."""

import pytest
import torch

from milonga.evaluation.decoding import first_divergence
from milonga.inference import LanguageModel, Sampling
from milonga.inference.captured import CapturedRunner, Decoder
from milonga.inference.runner import NetworkRunner
from milonga.ops.decode_step import ERROR_BOUND, MambaWeights, Norm, ReplayInputs, reference, triton
from milonga.state import clone, named_tensors, select
from tests.gpu.helpers import CONFIGS, scaled
from tests.laws.test_laws import SPLIT_BOUND, assert_same_state
from tests.ops.helpers import relative_rms

pytestmark = pytest.mark.gpu

every_model = pytest.mark.parametrize("name", list(CONFIGS))


def network_of(name: str, dtype: torch.dtype = torch.float32):
    return scaled(CONFIGS[name], dtype=dtype)


def read(network, tokens, state=None):
    with torch.no_grad():
        output = network(tokens, state, logits="last")
    return output.logits, output.state


@every_model
def test_steps_in_place_are_the_network(name: str) -> None:
    network = network_of(name)
    tokens = torch.randint(256, (3, 40)).cuda()
    decoder = Decoder(network, 4, capacity=64)
    logits, state = read(network, tokens[:, :17])
    for row in range(3):
        decoder.load(row, select(state, [row]), logits[row])
    for t in range(17, 40):
        decoder.tokens[:3].copy_(tokens[:, t : t + 1])
        decoder.step(4)
        logits, state = read(network, tokens[:, t : t + 1], state)
        assert relative_rms(decoder.logits[:3], logits) <= SPLIT_BOUND
    for row in range(3):
        assert_same_state(decoder.take(row, 40)[0], select(state, [row]))


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_beside_any_others(name: str, dtype: torch.dtype) -> None:
    """To the last bit: alone in a bucket, and at another place beside other texts and NaN."""
    network = network_of(name, dtype)
    tokens = torch.randint(256, (4, 30)).cuda()
    logits, state = read(network, tokens[:1, :9])
    alone, crowded = Decoder(network, 4, capacity=64, buckets=[4]), Decoder(network, 4, capacity=64, buckets=[4])
    alone.load(0, state, logits[0])
    crowded.load(2, state, logits[0])
    for row in (0, 1):
        crowded.load(
            row, *(part if index == 0 else part[0] for index, part in enumerate(read(network, tokens[1:2])[::-1]))
        )
    with torch.no_grad():
        crowded.logits[3].fill_(float("nan"))
    for t in range(9, 30):
        alone.tokens[0, 0], crowded.tokens[2, 0] = tokens[0, t], tokens[0, t]
        crowded.tokens[[0, 1, 3], 0] = tokens[1:, t]
        alone.step(4)
        crowded.step(4)
        assert torch.equal(alone.logits[0], crowded.logits[2])


@every_model
def test_a_captured_runner_is_a_runner(name: str) -> None:
    network = network_of(name)
    plain, captured = NetworkRunner(network), CapturedRunner(network, 2, capacity=64)
    tokens = torch.randint(256, (2, 60)).cuda()
    _, theirs = read(network, tokens[:, :11])
    mine, at = clone(theirs), 11
    with torch.no_grad():
        for length, keep in ((3, [1, 3]), (4, [4, 0]), (7, [2, 5]), (1, [1, 0]), (8, [8, 7])):
            piece = tokens[:, at : at + length]
            expected, trace = plain.verify(piece, theirs)
            got, captured_trace = captured.verify(piece, mine)
            assert relative_rms(got[:, :length], expected) <= SPLIT_BOUND
            for kept in ([0, length], keep):
                theirs_after, mine_after = (
                    plain.commit(theirs, trace, kept),
                    captured.commit(mine, captured_trace, kept),
                )
                assert_same_state(mine_after, theirs_after)
            logits, theirs = plain.step(piece[:, -1:], theirs_after)
            behind, mine = captured.step(piece[:, -1:], mine_after)
            assert relative_rms(behind, logits) <= SPLIT_BOUND
            at += length


@every_model
def test_commit_in_place_does_not_wait(name: str) -> None:
    network = network_of(name)
    _, state = read(network, torch.randint(256, (2, 9)).cuda())
    with torch.no_grad():
        state = network.resized(state, 32)
        trace = network(torch.randint(256, (2, 5)).cuda(), state, traced=True).trace
        keep = torch.tensor([2, 5])
        expected, device_keep = network.commit(state, trace, keep), keep.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            network.commit_(state, trace, device_keep)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same_state(state, expected)


@pytest.mark.parametrize("batch", [1, 16, 33])
def test_the_mamba_step_of_a_large_shape(batch: int) -> None:
    width, inner, rank, states, taps = 1792, 3584, 112, 16, 4
    matrix = lambda rows, columns: torch.randn(rows, columns, device="cuda") / columns**0.5  # noqa: E731
    vector = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    norm = Norm(vector(width), vector(width), 1e-5)
    weights = MambaWeights(
        matrix(2 * inner, width), vector(inner, taps), vector(inner), matrix(rank + 2 * states, inner),
        matrix(inner, rank), vector(inner, states), vector(inner), vector(inner) - 3, matrix(width, inner),
    )  # fmt: skip
    x, conv, ssm = vector(batch, width), vector(batch, taps - 1, inner), vector(batch, inner, states)
    wide = [
        tuple.__new__(type(v), [p.double() if isinstance(p, torch.Tensor) else p for p in v]) for v in (norm, weights)
    ]
    exact_conv, exact_ssm = conv.double(), ssm.double()
    with torch.no_grad():
        got = triton.mamba_step_(x, norm, weights, conv, ssm)
        expected = reference.mamba_step_reference(x.double(), *wide, exact_conv, exact_ssm)
    assert relative_rms(got, expected) <= ERROR_BOUND
    assert relative_rms(ssm, exact_ssm) <= ERROR_BOUND and relative_rms(conv, exact_conv) <= ERROR_BOUND


def test_replay_of_a_large_shape() -> None:
    vector = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    inputs = ReplayInputs(vector(4, 8, 7168)[..., :3584], vector(4, 8, 3584), vector(4, 8, 3584) - 3, vector(4, 8, 16))
    A_log, bias, conv, ssm = vector(3584, 16), vector(3584), vector(4, 3, 3584), vector(4, 3584, 16)
    exact_conv, exact_ssm = conv.double(), ssm.double()
    triton.mamba_replay_(inputs, A_log, bias, torch.tensor([0, 1, 5, 8]).cuda(), conv, ssm)
    wide = ReplayInputs(*(value.double() for value in inputs))
    reference.mamba_replay_reference(wide, A_log.double(), bias.double(), [0, 1, 5, 8], exact_conv, exact_ssm)
    assert relative_rms(ssm, exact_ssm) <= ERROR_BOUND and torch.equal(conv.double(), exact_conv)


def test_a_moved_row_leaves_nothing_behind() -> None:
    network = network_of("samba")
    decoder = Decoder(network, 2)
    logits, state = read(network, torch.randint(256, (1, 9)).cuda())
    decoder.load(0, state, logits[0])
    decoder.move(0, 1)
    decoder.clear(0)
    assert not any(tensor[0].any() for _, tensor in named_tensors(decoder.state))
    assert_same_state(decoder.take(1, 9)[0], state, 0.0)


@every_model
@pytest.mark.filterwarnings("ignore:.*deterministic")  # cumsum, whose order of sums on a GPU PyTorch does not promise
@pytest.mark.parametrize("device", [False, True])
def test_a_batch_writes_what_sessions_write(name: str, device: bool) -> None:
    lm = LanguageModel(network_of(name))
    batch, expected, texts = lm.batch(max_rows=3), {}, {}
    for index, length in enumerate((0, 5, 40, 300)):
        prompt = bytes(range(index, index + 5)) * (length // 5)
        sampling = Sampling(temperature=(0.0, 0.8)[index % 2], top_k=(None, 9)[index == 3], seed=index)
        session = lm.session()
        session.feed(prompt)
        expected[batch.join(prompt, sampling, 20 + 9 * index)] = b"".join(
            session.generate_bytes(20 + 9 * index, sampling)
        )
    while batch.rows or batch.waiting:
        for event in batch.run(7) if device else batch.step():
            texts[event.ticket] = texts.get(event.ticket, b"") + event.data
    assert texts == expected


@every_model
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_exact_batches_do_not_diverge(name: str) -> None:
    lm = LanguageModel(network_of(name, torch.bfloat16))
    assert first_divergence(lm, texts=4, tokens=60, exact=True, temperature=0.8).diverged == 0


def test_a_captured_runner_grows() -> None:
    """Past three doublings, its graphs captured anew: as the plain one, whose states grow by themselves."""
    network = network_of("growing")
    plain, captured = NetworkRunner(network), CapturedRunner(network, 2, capacity=4)
    tokens = torch.randint(256, (2, 40)).cuda()
    theirs = mine = network.init_state(2)
    with torch.inference_mode():
        for at in range(0, 40, 8):
            captured.ensure(at + 8)
            piece = tokens[:, at : at + 7]
            expected, trace = plain.verify(piece, theirs)
            got, captured_trace = captured.verify(piece, mine)
            assert relative_rms(got[:, :7], expected) <= SPLIT_BOUND
            theirs, mine = plain.commit(theirs, trace, [5, 7]), captured.commit(mine, captured_trace, [5, 7])
            logits, theirs = plain.step(piece[:, -1:], theirs)
            behind, mine = captured.step(piece[:, -1:], mine)
            assert relative_rms(behind, logits) <= SPLIT_BOUND
    assert captured.capacity == 64
