"""Models and decoders of the tests that compare a GPU with the network or with rounds from the host; on any device."""

import torch

from milonga.data.bpe import BpeCodec
from milonga.inference import LanguageModel, Sampling
from milonga.inference.captured import CapturedRunner
from milonga.inference.drafters import NgramDrafter
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.speculative import SpeculativeDecoder
from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig
from milonga.models import ModelConfig, Network

MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b" the", b"m"), (b"a", b"b"), (b"ab", b"c"), (b"c", b"a")]
SAMBA = ModelConfig(
    vocab_size=256,
    d_model=64,
    pattern="mamba mlp swa mlp",
    repeats=2,
    layers={
        "mamba": MambaConfig(),
        "swa": AttentionConfig(heads=4, kv_heads=2, head_dim=32, window=7),
        "mlp": SwiGLUConfig(d_hidden=96),
    },
)
CONFIGS = {
    "samba": SAMBA,
    "growing": SAMBA.replace_layer("swa", window=None),
    "conv": SAMBA.replace_layer("swa", short_conv=3),
    "mamba": SAMBA.replace(pattern="mamba", repeats=3, norm="layer_norm", tied=False),
}
WIDE = SAMBA.replace_layer("swa", window=33)  # what speculation is measured with
MAMBA = SAMBA.replace(pattern="mamba mlp", repeats=3)
PROMPTS = (b"", b"abc the mat", b"the them " * 20)


def scaled(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Network:
    """A network whose predictions are far from uniform: its embedding is scaled up."""
    network = config.build(seed=seed)
    with torch.no_grad():
        network.embedding.weight.mul_(20)
    return network.to(device).to(dtype).eval()


def drafting(kind: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> LanguageModel:
    """A drafter's model: of `bytes`, near the one of `WIDE`, or of `subwords`."""
    if kind == "subwords":
        codec = BpeCodec(MERGES)
        config = MAMBA.replace(vocab_size=codec.vocab_size)
        return LanguageModel(scaled(config, seed=3, dtype=dtype, device=device), codec)
    near, generator = scaled(WIDE, dtype=dtype, device=device), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in near.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * parameter.abs().mean() * 0.1)
    return LanguageModel(near)


def decoder(lm: LanguageModel, kind: str, rule, draft=8, dtype: torch.dtype = torch.float32) -> SpeculativeDecoder:
    """What `kind` drafts for `lm`, on its device, everything captured."""
    if kind == "ngram":
        drafter = NgramDrafter(longest=8, shortest=1)
    else:
        small = drafting(kind, dtype, lm.device.type)
        drafter = ModelDrafter(small, CapturedRunner(small.network))
    return SpeculativeDecoder(lm, drafter, rule=rule, draft=draft, runner=CapturedRunner(lm.network))


def write(decoder: SpeculativeDecoder, prompt: bytes, count: int, sampling: Sampling, host: bool = False) -> bytes:
    """A text behind a prompt; with `host` in rounds from there."""
    session = decoder.verifier.session()
    session.feed(prompt)
    if host:
        decoder._buffers = None
    return b"".join(decoder.generate_bytes(session, count, sampling, context=prompt))


def written_both_ways(lm, kind, rule, draft, count, **settings) -> tuple[list[bytes], list[bytes]]:
    """Texts behind `PROMPTS`, each with its seed: (in rounds on the device, in rounds from the host)."""
    each = [(prompt, Sampling(seed=seed, **settings)) for seed, prompt in enumerate(PROMPTS)]
    device, host = decoder(lm, kind, rule, draft), decoder(lm, kind, rule, draft)
    assert device._buffers is not None
    there = [write(device, prompt, count, sampling) for prompt, sampling in each]
    return there, [write(host, prompt, count, sampling, host=True) for prompt, sampling in each]
