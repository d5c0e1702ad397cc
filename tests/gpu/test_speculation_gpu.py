"""Speculative decoding on a GPU: rounds are graphs that wait for nothing, and write what rounds from the host write."""

import pytest
import torch

from milonga.data.bpe import BpeCodec
from milonga.inference import LanguageModel, Sampling
from milonga.inference.captured import CapturedRunner
from milonga.inference.device_rows import DeviceRows
from milonga.inference.draft_length import AdaptiveDraft
from milonga.inference.drafters import NgramDrafter
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.passes import read_piece
from milonga.inference.speculative import SpeculativeDecoder
from milonga.inference.speculative_rows import SpeculativeRows
from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig
from milonga.models import ModelConfig
from milonga.ops.decode_step import MambaWeights, Norm
from milonga.ops.mamba_piece import ERROR_BOUND, triton
from milonga.ops.mamba_piece.reference import mamba_piece_reference
from tests.ops.helpers import relative_rms

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic")]

MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b" the", b"m"), (b"a", b"b"), (b"ab", b"c"), (b"c", b"a")]
SAMBA = ModelConfig(
    vocab_size=256,
    d_model=64,
    pattern="mamba mlp swa mlp",
    repeats=2,
    layers={
        "mamba": MambaConfig(),
        "swa": AttentionConfig(heads=4, kv_heads=2, head_dim=32, window=33),
        "mlp": SwiGLUConfig(d_hidden=96),
    },
)
MAMBA = SAMBA.replace(pattern="mamba mlp", repeats=3)


def model(config: ModelConfig, codec: BpeCodec | None = None, seed: int = 0, dtype=torch.float32) -> LanguageModel:
    network = config.replace(vocab_size=256 if codec is None else codec.vocab_size).build(seed=seed)
    with torch.no_grad():
        network.embedding.weight.mul_(20)
    return LanguageModel(network.cuda().to(dtype), codec)


def decoder(lm: LanguageModel, kind: str, rule, draft=8, dtype=torch.float32) -> SpeculativeDecoder:
    if kind == "ngram":
        drafter = NgramDrafter(longest=8, shortest=1)
    else:
        small = model(SAMBA, None, 0, dtype) if kind == "bytes" else model(MAMBA, BpeCodec(MERGES), 3, dtype)
        if kind == "bytes":
            with torch.no_grad():
                for parameter in small.network.parameters():
                    parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.1)
        drafter = ModelDrafter(small, CapturedRunner(small.network))
    return SpeculativeDecoder(lm, drafter, rule=rule, draft=draft, runner=CapturedRunner(lm.network))


def write(decoder: SpeculativeDecoder, prompt: bytes, count: int, sampling: Sampling, host: bool = False) -> bytes:
    session = decoder.verifier.session()
    session.feed(prompt)
    if host:
        decoder._buffers = None
    return b"".join(decoder.generate_bytes(session, count, sampling, context=prompt))


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


@pytest.mark.parametrize("config", [SAMBA, MAMBA], ids=["samba", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_is_the_network(config: ModelConfig, dtype: torch.dtype) -> None:
    network = model(config, dtype=dtype).network
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
    lm = model(SAMBA)
    for seed, prompt in enumerate((b"", b"abc the mat", b"the them " * 20)):
        sampling = Sampling(temperature=0.8, seed=seed)
        texts = [write(decoder(lm, kind, rule, 1), prompt, 60, sampling, host) for host in (False, True)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["bytes", "subwords", "ngram"])
def test_greedy_is_plain_greedy(kind: str) -> None:
    lm = model(SAMBA)
    for prompt in (b"", b"abc the mat", b"the them " * 20):
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
    lm = model(SAMBA, dtype=torch.bfloat16)
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
    lm = model(SAMBA)
    mine = decoder(lm, "subwords", "exact", 6)
    first = write(mine, b"abc", 80, Sampling(temperature=0.7, top_k=30, top_p=0.9))
    assert first == write(mine, b"abc", 80, Sampling(temperature=0.7, top_k=30, top_p=0.9)) and len(first) == 80
