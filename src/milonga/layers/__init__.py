"""The kinds of layers: one idea per file, and one table that is open to a user's own."""

from milonga.layers.attention import Attention, AttentionConfig, AttentionState
from milonga.layers.base import Layer, LayerConfig
from milonga.layers.mamba import Mamba, MambaConfig, MambaState
from milonga.layers.norm import LayerNorm, NormKind, RMSNorm, build_norm, norm_parameter_count
from milonga.layers.swiglu import NoState, SwiGLU, SwiGLUConfig

KINDS: dict[str, type[LayerConfig]] = {
    "mamba": MambaConfig,
    "attention": AttentionConfig,
    "swiglu": SwiGLUConfig,
}


def register(config: type[LayerConfig]) -> type[LayerConfig]:
    """Add a kind of layer of your own; use it as a decorator on its config class.

    Raises:
        ValueError: if the class gives its `kind` no default, or another class has that kind.
    """
    field = config.model_fields.get("kind")
    if field is None or not isinstance(field.default, str):
        raise ValueError(f'layers: {config.__name__} needs a line like `kind: Literal["name"] = "name"`')
    if KINDS.setdefault(field.default, config) is not config:
        raise ValueError(f"layers: the kind {field.default!r} is taken by {KINDS[field.default].__name__}")
    return config


__all__ = [
    "KINDS",
    "Attention",
    "AttentionConfig",
    "AttentionState",
    "Layer",
    "LayerConfig",
    "LayerNorm",
    "Mamba",
    "MambaConfig",
    "MambaState",
    "NoState",
    "NormKind",
    "RMSNorm",
    "SwiGLU",
    "SwiGLUConfig",
    "build_norm",
    "norm_parameter_count",
    "register",
]
