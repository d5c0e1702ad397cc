"""A model is data: a pattern of named layers, each name with a typed config."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from milonga.errors import UserError, describe_validation
from milonga.layers import KINDS, LayerConfig, NormKind
from milonga.models.network import Network


def _parse_layer(value: Any) -> Any:
    """A layer's settings as a config of the class its `kind` names."""
    if isinstance(value, LayerConfig):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError(
            "layer", "expected the settings of a layer with a `kind`, got {got}", {"got": repr(value)}
        )
    kind = value.get("kind")
    if kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise PydanticCustomError(
            "layer", "kind {kind} is not known; choose from {known}", {"kind": repr(kind), "known": known}
        )
    try:
        return KINDS[kind].model_validate(value)
    except ValidationError as error:
        raise PydanticCustomError("layer", "{problem}", {"problem": describe_validation(error)}) from error


AnyLayer = Annotated[LayerConfig, BeforeValidator(_parse_layer), PlainSerializer(lambda layer: layer.model_dump())]


class ModelConfig(BaseModel):
    """The network `pattern * repeats`: every word names a layer of `layers`, every layer is a residual sub-layer.

    Args:
        vocab_size: V; 256 for bytes.
        d_model: D, the width of the residual stream.
        pattern: words separated by spaces, such as `mamba mlp swa mlp`.
        repeats: how often the pattern is stacked.
        layers: what each word means.
        norm: before every layer and before the head.
        tied: whether the head shares the embedding's weight.
        init: `mamba` (embedding N(0, 0.02), PyTorch's default for linear layers, residual outputs over the square root
            of the number of layers) or `small` (N(0, sqrt(2 / 5D)), residual outputs N(0, 2 / (layers sqrt(D)))): the
            two regimes in which the models of the Samba paper were trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: PositiveInt
    d_model: PositiveInt
    pattern: str
    repeats: PositiveInt = 1
    layers: dict[str, AnyLayer]
    norm: NormKind = "rms_norm"
    norm_eps: float = Field(1e-5, gt=0)
    tied: bool = True
    init: Literal["mamba", "small"] = "mamba"

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        words = self.pattern.split()
        if not words:
            raise ValueError("pattern is empty: name at least one layer")
        for word in words:
            if word not in self.layers:
                raise ValueError(
                    f"pattern word {word!r} has no layer: layers has {', '.join(sorted(self.layers)) or 'none'}"
                )
        for name in self.layers:
            if name not in words:
                raise ValueError(f"layer {name!r} is not used: the pattern is {self.pattern!r}")
        for name, layer in self.layers.items():
            try:
                layer.parameter_count(self.d_model)
            except ValueError as error:
                raise ValueError(f"layers.{name}: {error}") from error
        return self

    @property
    def stack(self) -> list[str]:
        """The name of every sub-layer in order."""
        return self.pattern.split() * self.repeats

    def replace(self, **changes: Any) -> "ModelConfig":
        """A checked copy with other fields; layers that a new pattern no longer names are dropped."""
        fields = dict(self) | changes
        words = fields["pattern"].split()
        if "layers" not in changes:
            fields["layers"] = {name: layer for name, layer in fields["layers"].items() if name in words}
        try:
            return ModelConfig(**fields)
        except ValidationError as error:
            raise UserError(f"replace: {describe_validation(error, 'model')}") from error

    def replace_layer(self, name: str, **changes: Any) -> "ModelConfig":
        """A checked copy in which the layer `name` has other settings.

        Raises:
            ValueError: if there is no such layer or setting.
        """
        if name not in self.layers:
            raise ValueError(f"replace_layer: no layer {name!r}: layers has {', '.join(sorted(self.layers))}")
        layer = self.layers[name]
        try:
            changed = type(layer).model_validate(layer.model_dump() | changes)
        except ValidationError as error:
            raise UserError(f"replace_layer: {describe_validation(error, f'layers.{name}')}") from error
        return self.replace(layers=self.layers | {name: changed})

    def build(self, *, seed: int = 0, device: torch.device | str | None = None) -> Network:
        """The network, initialised from `seed` (the same weights on every device; on `meta` only shapes)."""
        return Network(self, seed=seed, device=device)
