"""The shapes that are trained, read and generated with, and what their matrix products cost."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from milonga.bench.work import visible_pairs
from milonga.errors import UserError
from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig
from milonga.layers.recompute import Cheap
from milonga.models import ModelConfig, preset

# What is made again in the backward pass of the shapes of record: what keeps them below their peers' memory, at the
# least cost. Without the residual stream and the scan's output, all else may stay, but for MambaByte's layer norms,
# whose rows are kept before weight and bias.
STREAM: tuple[Cheap, ...] = ("sum",)
HYBRID: tuple[Cheap, ...] = ("sum", "scan")
MAMBA: tuple[Cheap, ...] = ("norm", "sum", "scan")


@dataclass(frozen=True)
class TrainingShape:
    """A model and a step's batch."""

    name: str
    config: ModelConfig
    batch: int
    length: int
    recompute: tuple[Cheap, ...] = ()  # as in the training config, like the next two
    residual: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = True


def _byte_samba(d_model: int, repeats: int, heads: int, d_hidden: int, window: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=256,
        d_model=d_model,
        pattern="mamba mlp swa mlp",
        repeats=repeats,
        layers={
            "mamba": MambaConfig(),
            "swa": AttentionConfig(heads=heads, window=window),
            "mlp": SwiGLUConfig(d_hidden=d_hidden),
        },
    )


def training_shapes() -> dict[str, TrainingShape]:
    """The shapes of record by name, and a small one for a CPU."""
    tied = preset("llama-2-438m").replace(tied=True)
    shapes = (
        TrainingShape("samba-421m", preset("samba-421m"), 8, 4096, HYBRID),
        TrainingShape("llama-389m", tied, 8, 4096, STREAM),  # the 438M model with its head tied to the embedding
        TrainingShape("mambabyte-353m", preset("mambabyte-353m"), 4, 8192, MAMBA),
        TrainingShape("byte-samba-30m", _byte_samba(512, 4, 4, 1536, 2048), 32, 4096, HYBRID),
        TrainingShape("byte-samba-small", _byte_samba(128, 1, 4, 256, 128), 4, 256),
    )
    return {shape.name: shape for shape in shapes}


ON_GPU = ("samba-421m", "llama-389m", "mambabyte-353m", "byte-samba-30m")
ON_CPU = ("byte-samba-small",)
BATCH, LENGTH = 8, 4096  # of presets that are no shape of record


def training_shape(name: str) -> TrainingShape:
    """The shape of record of that name, or a preset at batch 8 and 4096 tokens.

    Raises:
        UserError: if there is neither.
    """
    shapes = training_shapes()
    if name in shapes:
        return shapes[name]
    try:
        return TrainingShape(name, preset(name), BATCH, LENGTH)
    except UserError as error:
        raise UserError(f"--{error}; shapes of the bench are {', '.join(shapes)}") from error


# What the throughput study compares, by the names of the paper's figures.
STUDY = {
    "samba": "samba-1.7b",
    "swa": "mistral-1.6b",
    "mamba": "mamba-1.8b",
    "transformer": "llama-3-1.6b",
}
BASELINE = "transformer"


def study_model(name: str, *, small: bool) -> ModelConfig:
    """A model of the throughput study: the paper's shape with MLPs of 8192 (8196 misaligns the rows of a GPU's
    products), or a small one of the same pattern; or any preset.

    Raises:
        UserError: if there is no such model.
    """
    if name not in STUDY:
        try:
            return preset(name)
        except UserError as error:
            raise UserError(f"--model: {error}; the study's models are {', '.join(STUDY)}") from error
    config = preset(STUDY[name])
    if "mlp" in config.layers:
        config = config.replace_layer("mlp", d_hidden=8192)
    return _small(config) if small else config


def _small(config: ModelConfig) -> ModelConfig:
    """The same pattern, narrow and short: for a CPU."""
    layers = dict(config.layers)
    for name, layer in layers.items():
        if isinstance(layer, AttentionConfig):
            layers[name] = layer.model_copy(
                update={"heads": 4, "kv_heads": 1, "window": 64 if layer.window is not None else None}
            )
        elif isinstance(layer, SwiGLUConfig):
            layers[name] = layer.model_copy(update={"d_hidden": 128})
    repeats = 1 if len(config.pattern.split()) > 2 else 2
    return config.replace(vocab_size=256, d_model=64, repeats=repeats, layers=layers)


def product_flops(config: ModelConfig, length: int, *, head: bool = True) -> float:
    """FLOPs of the matrix products for one token, forward, averaged over a text of `length` tokens.

    Weights, and the scores and weighted sums of attention over the keys in sight; the scan, the convolution and
    everything elementwise are left out. `head`: whether logits are computed for every token.
    """
    network = config.build(device="meta")
    weights = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    if not head:
        weights -= network.head.weight.numel()
    attention = 0.0
    for name in config.stack:
        layer = config.layers[name]
        if isinstance(layer, AttentionConfig):
            heads, _, width = layer.shape(config.d_model)
            attention += 4.0 * heads * width * visible_pairs(length, layer.window or 0) / length
    return 2.0 * weights + attention
