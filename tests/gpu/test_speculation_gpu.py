"""Speculative decoding on a GPU: rounds are graphs that wait for nothing, and write what rounds from the host write."""

import pytest
import torch

from milonga.inference import LanguageModel, Sampling
from milonga.inference.device_rows import DeviceRows
from milonga.inference.draft_length import AdaptiveDraft
from milonga.inference.passes import read_piece
from milonga.inference.speculative_rows import SpeculativeRows
from milonga.models import ModelConfig
from milonga.ops.decode_step import MambaWeights, Norm
from milonga.ops.mamba_piece import ERROR_BOUND, triton
from milonga.ops.mamba_piece.reference import mamba_piece_reference
from tests.gpu.helpers import MAMBA, PROMPTS, WIDE, decoder, scaled, write, written_both_ways
from tests.inference.helpers import FAILURES, assert_undone
from tests.ops.helpers import relative_rms

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic")]


@pytest.mark.parametrize(("batch", "time"), [(1, 8), (1, 16), (2, 32), (3, 5)])
def test_a_piece_of_a_large_shape(batch: int, time: int) -> None:
    width, inner, rank, states, taps = 512, 1024, 32, 16, 4
    matrix = lambda rows, columns: torch.randn(rows, columns, device="cuda") / columns**0.5  # noqa: E731
    vector = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    norm = Norm(vector(width), vector(width), 1e-5)
    weights = MambaWeights(
        matrix(2 * inner, width), vector(inner, taps), vector(inner), matrix(rank + 2 * states, inner),
        matrix(inner, rank), vector(inner, states), vector(inner), vector(inner) - 3, matrix(width, inner),
    )  # fmt: skip
    x, conv, ssm = vector(batch, time, width), vector(batch, taps - 1, inner), vector(batch, inner, states)
    wide = [
        tuple.__new__(type(v), [p.double() if isinstance(p, torch.Tensor) else p for p in v]) for v in (norm, weights)
    ]
    with torch.no_grad():
        got, added = triton.mamba_piece(x, norm, weights, conv, ssm)
        expected, truth = mamba_piece_reference(x.double(), *wide, conv.double(), ssm.double())
    assert relative_rms(got, expected) <= ERROR_BOUND
    for mine, other in zip(added, truth, strict=True):
        assert relative_rms(mine, other) <= ERROR_BOUND


@pytest.mark.parametrize("config", [WIDE, MAMBA], ids=["samba", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_is_the_network(config: ModelConfig, dtype: torch.dtype) -> None:
    network = scaled(config, dtype=dtype)
    tokens = torch.randint(256, (2, 40)).cuda()
    with torch.no_grad():
        state = network(tokens[:, :20], logits="last").state
        got, trace = read_piece(network, tokens[:, 20:36], state)
        expected = network(tokens[:, 20:36], state, logits="all", traced=True)
        keep = torch.tensor([3, 16]).cuda()
        mine, theirs = (network.commit(state, each, keep.cpu()) for each in (trace, expected.trace))
        network.commit_(state, trace, keep)
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    assert relative_rms(got, expected.logits) <= bound
    for part, other, moved in zip(mine, theirs, state, strict=True):
        for a, b, c in zip(part, other, moved, strict=True):
            if a.numel():
                assert relative_rms(a.float(), b.float()) <= bound and relative_rms(c.float(), b.float()) <= bound


@pytest.mark.parametrize("kind", ["bytes", "subwords", "ngram"])
@pytest.mark.parametrize("rule", ["greedy", "exact"])
def test_the_device_writes_what_the_host_writes(kind: str, rule) -> None:
    """Bytes of a draft are few enough that both draw as many tokens."""
    device, host = written_both_ways(LanguageModel(scaled(WIDE)), kind, rule, 1, 60, temperature=0.8)
    assert device == host


@pytest.mark.parametrize("draft", [8, 40])
@pytest.mark.parametrize("kind", ["bytes", "ngram"])
@pytest.mark.parametrize("rule", ["greedy", "exact"])
def test_long_drafts_of_bytes_too(kind: str, rule, draft: int) -> None:
    """As many tokens as bytes on both sides; 41 bytes are more than the kernels of a piece read."""
    device, host = written_both_ways(LanguageModel(scaled(WIDE)), kind, rule, draft, 120, temperature=0.8)
    assert device == host


@pytest.mark.parametrize(("kind", "draft"), [("bytes", 8), ("ngram", 8), ("subwords", 1)])
@pytest.mark.parametrize("settings", [{"top_k": 30}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.9}])
def test_settings_that_sort_too(kind: str, draft: int, settings) -> None:
    device, host = written_both_ways(LanguageModel(scaled(WIDE)), kind, "exact", draft, 80, temperature=0.7, **settings)
    assert device == host


@pytest.mark.parametrize("where", FAILURES)
def test_a_round_that_fails_is_undone(where: str) -> None:
    assert_undone(decoder(LanguageModel(scaled(WIDE)), "bytes", "exact", 6), where)


@pytest.mark.parametrize("kind", ["bytes", "subwords", "ngram"])
def test_greedy_is_plain_greedy(kind: str) -> None:
    lm = LanguageModel(scaled(WIDE))
    for prompt in PROMPTS:
        session = lm.session()
        session.feed(prompt)
        mine = decoder(lm, kind, "greedy", AdaptiveDraft())
        text = write(mine, prompt, 120, Sampling())
        assert text == b"".join(session.generate_bytes(120, temperature=0.0))
        assert mine.stats.bytes_per_verification > 1


@pytest.mark.parametrize("kind", ["bytes", "subwords"])
@pytest.mark.parametrize("rule", ["greedy", "exact"])
def test_a_round_waits_once(kind: str, rule) -> None:
    """No call waits for the GPU but for the event at the end of the round."""
    lm = LanguageModel(scaled(WIDE, dtype=torch.bfloat16))
    mine = decoder(lm, kind, rule, AdaptiveDraft(), torch.bfloat16)
    prompt, sampling = b"abc the mat ", mine.settings(Sampling(temperature=0.8))
    write(mine, prompt, 300, sampling)  # captured
    session = lm.session()
    session.feed(prompt)
    mark = session.mark()
    stream = mine.drafter.start([prompt])
    rows = mine.rows(mark.state, mark.logits[None], stream, [session.sampler(sampling, 300)], [300])
    assert isinstance(rows, DeviceRows) and isinstance(rows, SpeculativeRows)
    rows.round()
    rows.round()
    torch.cuda.set_sync_debug_mode("error")
    try:
        text = b"".join(rows.round()[0] for _ in range(12))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(text) >= 12
    rows.finish()


def test_settings_that_sort() -> None:
    lm = LanguageModel(scaled(WIDE))
    mine = decoder(lm, "subwords", "exact", 6)
    first = write(mine, b"abc", 80, Sampling(temperature=0.7, top_k=30, top_p=0.9))
    assert first == write(mine, b"abc", 80, Sampling(temperature=0.7, top_k=30, top_p=0.9)) and len(first) == 80
