"""Everything a run depends on, as one checked and frozen config: read from YAML, changed by `key.path=value`."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from milonga.data.bpe import load_tokenizer
from milonga.data.config import DataConfig
from milonga.data.text import ByteCodec
from milonga.errors import UserError, describe_validation
from milonga.layers.recompute import Cheap
from milonga.models import ModelConfig, preset
from milonga.training.optimizer import OptimizerConfig
from milonga.training.schedule import ScheduleConfig


class TrainingConfig(BaseModel):
    """How long, how much at a time, how precisely, and what is written down.

    Args:
        steps: updates of the weights. None: `minutes` decides, once, before step 0.
        minutes: how long the run may take where `steps` is None: a few steps are timed on a copy of the model and a
            fixed number of steps is written into the run's config.
        batch: rows of a step, all micro-batches together.
        window: T, tokens of a row.
        accumulation: micro-batches into which a step's rows are divided; the gradient is that of the whole batch.
        precision: `fp32`, or `bf16`: matrix products in bfloat16 by autocast, parameters in fp32.
        seed: of the initial weights and of the order of the data.
        evaluate_every: steps between two evaluations on held-out text; 0: only at the end.
        save_every: steps between two checkpoints; 0: only at the end (and on Ctrl-C and SIGTERM).
        keep: newest checkpoints that are kept.
        log_every: steps between two lines of metrics.
        device: `auto` takes a GPU where there is one; `cpu`, `cuda`, `cuda:1`.
        recompute: results that the backward pass makes again instead of keeping them, to save memory: any of `norm`,
            `gate`, `conv`, `dt`, `rotary`, `cast` (weights in bf16), `scan` (the output of a Mamba layer's scan, by
            the scan's own backward pass, and dt with it), `sum` (the residual stream before a norm, on a GPU in bf16:
            from what an RMS norm made of it, where `norm` is not named, or from a layer norm's rows before weight and
            bias). It changes no number, but that `scan` and `sum` round some gradients otherwise. With `compile: true`
            the compiler decides what to keep and this setting does nothing.
        residual: dtype of the residual stream where `precision` is bf16: `fp32` as in the papers' code, or `bf16`, that
            takes less memory and time.
        deterministic: the same bits on every run. False lets full attention on a GPU take a library's backward pass,
            which is faster and sums in another order each time.
        compile: run the network through `torch.compile`.
        capture: on a GPU replay the forward and backward passes of a step as one CUDA graph, from the third step on,
            instead of launching each kernel from Python. It changes no number. Packed batches, steps with a carried
            state and compiled networks are launched as without it; on a CPU there is nothing to capture.
        tensorboard: also write TensorBoard event files (extra `tensorboard`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt | None = None
    minutes: PositiveFloat | None = None
    batch: PositiveInt = 8
    window: PositiveInt = 512
    accumulation: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**63)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluate_every: NonNegativeInt = 200
    save_every: NonNegativeInt = 200
    keep: PositiveInt = 3
    log_every: PositiveInt = 10
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    recompute: tuple[Cheap, ...] = ()
    residual: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = True
    compile: bool = False
    capture: bool = True
    tensorboard: bool = False

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.steps is None and self.minutes is None:
            raise ValueError("say how long: set steps, or minutes")
        if self.residual == "bf16" and self.precision != "bf16":
            raise ValueError("residual bf16 needs precision bf16")
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation must divide batch, got batch {self.batch} and accumulation {self.accumulation}"
            )
        return self


class EvaluationSettings(BaseModel):
    """Evaluation while training.

    Args:
        tokens: held-out tokens scored each time, in windows spread over the held-out documents (fewer where there are
            not as many).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: PositiveInt = 65536


class RunConfig(BaseModel):
    """One run: the model, the data, the training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.data.tokenizer is None and self.model.vocab_size != ByteCodec.vocab_size:
            raise ValueError(
                f"model.vocab_size must be {ByteCodec.vocab_size}, because text is read as bytes, "
                f"got {self.model.vocab_size}; for subwords set data.tokenizer (see milonga tokenizer train --help)"
            )
        return self

    @classmethod
    def parse(cls, settings: Mapping[str, Any], where: str) -> "RunConfig":
        """The config of a nested mapping that came from `where`.

        A model that gives no vocab_size gets that of the tokenizer.

        Raises:
            UserError: one line with the path of every wrong key; or the tokenizer cannot be read.
        """
        try:
            return cls.model_validate(with_vocabulary(settings))
        except ValidationError as error:
            raise UserError(f"{where}: {describe_validation(error)}") from error

    @classmethod
    def load(cls, recipe: str | Path, changes: Sequence[str] = ()) -> "RunConfig":
        """The packaged recipe of that name, or the YAML file, with changes like `model.layers.swa.window=512`.

        Raises:
            UserError: if there is no such recipe, it is not YAML, or a key or value is wrong.
        """
        settings = read_recipe(recipe)
        expand_preset(settings)
        for change in changes:
            set_key(settings, change)
        expand_preset(settings)  # `--set model=samba-421m`
        return cls.parse(settings, str(recipe))

    def dump(self) -> str:
        """YAML that `load` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def with_steps(self, steps: int) -> "RunConfig":
        """The same with a fixed number of steps."""
        return self.model_copy(update={"training": self.training.model_copy(update={"steps": steps})})


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("milonga") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The settings of a packaged recipe or of a YAML file, unchecked.

    Raises:
        UserError: if there is no such recipe, or it is no YAML mapping.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"{recipe}: no such recipe file")
        text = path.read_bytes()
    elif str(recipe) in recipe_names():
        text = (files("milonga") / "recipes" / f"{recipe}.yaml").read_bytes()
    else:
        raise UserError(f"no recipe {str(recipe)!r}: there are {', '.join(recipe_names())}, or give a .yaml file")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{recipe}: expected a mapping with name, model, data and training")
    return settings


def expand_preset(settings: dict[str, Any]) -> None:
    """Put a preset's config where `model` names one: `model: NAME`, or `preset: NAME` beside what differs from it.

    Raises:
        UserError: if there is no such preset.
    """
    model = settings.get("model")
    if isinstance(model, str):
        settings["model"] = preset(model).model_dump(mode="json")
    elif isinstance(model, Mapping) and isinstance(model.get("preset"), str):
        changes = {key: value for key, value in model.items() if key != "preset"}
        settings["model"] = _merged(preset(model["preset"]).model_dump(mode="json"), changes)


def with_vocabulary(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with the tokenizer's vocabulary size where the model gives none.

    Raises:
        UserError: if the tokenizer cannot be read.
    """
    model, data = settings.get("model"), settings.get("data")
    path = data.get("tokenizer") if isinstance(data, Mapping) else None
    if isinstance(path, str) and isinstance(model, Mapping) and "vocab_size" not in model:
        return {**settings, "model": {**model, "vocab_size": load_tokenizer(Path(path).expanduser()).vocab_size}}
    return settings


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def set_key(settings: dict[str, Any], change: str) -> None:
    """Apply one `key.path=value` to nested settings; the value is read as YAML.

    Raises:
        UserError: if it has no `=`, its value is not YAML, or its path runs through something that is no group.
    """
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {change}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {change}: the value is not YAML: {' '.join(str(error).split())}") from error
    group = settings
    for depth, key in enumerate(keys[:-1], start=1):
        inner = group.get(key)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {change}: {'.'.join(keys[:depth])} is {inner!r}, not a group of settings")
        group[key] = inner
        group = inner
    group[keys[-1]] = value


# what may differ between a run and its continuation: the number of steps also moves the rates of those to come, which
# depend on it; the others leave what a step computes as it was, up to rounding (another device, more made again)
FREE_ON_RESUME = (
    "training.steps",
    "training.minutes",
    "training.device",
    "training.keep",
    "training.recompute",
    "training.capture",
    "training.tensorboard",
)


def changed_keys(before: RunConfig, after: RunConfig) -> list[str]:
    """Paths of the settings in which two configs differ, but for those that a continuation may change."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(after.model_dump(mode="json"))
    different = [key for key in sorted(old.keys() | new.keys()) if old.get(key, ...) != new.get(key, ...)]
    return [key for key in different if key not in FREE_ON_RESUME]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
