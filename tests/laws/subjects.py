"""What the laws are run on: every kind of layer in its variants, and small whole models, behind one face.

Each runs on the CPU under its name, and on a GPU, where there is one, as `name@cuda`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from milonga.layers import AttentionConfig, LayerConfig, MambaConfig, SwiGLUConfig
from milonga.layers.base import Keep, Layer
from milonga.models import ModelConfig, Network
from milonga.segments import Segments
from milonga.state import State

WIDTH = 24
WINDOW = 6

LAYERS: dict[str, LayerConfig] = {
    "mamba": MambaConfig(),
    "mamba-small": MambaConfig(d_state=3, d_conv=1, expand=1, dt_rank=2),
    "window": AttentionConfig(heads=4, kv_heads=2, window=WINDOW),
    "window-1": AttentionConfig(heads=2, window=1),
    "window-nope": AttentionConfig(heads=3, head_dim=5, window=WINDOW, rope_base=None),
    "window-conv": AttentionConfig(heads=4, kv_heads=1, window=WINDOW, short_conv=3),
    "full": AttentionConfig(heads=2),
    "full-conv": AttentionConfig(heads=2, kv_heads=1, short_conv=4),
    "swiglu": SwiGLUConfig(d_hidden=40),
}
GROWING = {"full", "full-conv", "model-llama"}

_mlp = SwiGLUConfig(d_hidden=32)
MODELS: dict[str, ModelConfig] = {
    "model-samba": ModelConfig(
        vocab_size=256,
        d_model=WIDTH,
        pattern="mamba mlp swa mlp",
        repeats=2,
        layers={"mamba": MambaConfig(), "swa": LAYERS["window"], "mlp": _mlp},
    ),
    "model-mamba": ModelConfig(
        vocab_size=256,
        d_model=WIDTH,
        pattern="mamba",
        repeats=3,
        layers={"mamba": MambaConfig()},
        norm="layer_norm",
        tied=False,
    ),
    "model-llama": ModelConfig(
        vocab_size=40,
        d_model=WIDTH,
        pattern="attn mlp",
        repeats=2,
        layers={"attn": LAYERS["full"], "mlp": _mlp},
        tied=False,
        init="small",
    ),
}


@dataclass(frozen=True)
class Subject:
    """A layer or a model: reads `[B T ...]` after a state."""

    name: str
    module: Layer | Network
    inputs: Callable[[int, int], Tensor]  # (B, T) -> x
    device: str = "cpu"

    def run(self, x: Tensor, state: State | None = None, segments: Segments | None = None) -> tuple[Tensor, State]:
        """-> (y, state after)."""
        if isinstance(self.module, Network):
            output = self.module(x, state, segments)
            return output.logits, output.state
        return self.module(x, state, segments)

    def trace(self, x: Tensor, state: State | None = None, segments: Segments | None = None) -> object:
        """What `commit` takes."""
        if isinstance(self.module, Network):
            return self.module(x, state, segments, traced=True).trace
        return self.module.advance(x, state, segments)[1]

    def advance(self, x: Tensor, state: State | None = None) -> Tensor:
        """The output alone, without a commit."""
        if isinstance(self.module, Network):
            return self.module(x, state, traced=True).logits
        return self.module.advance(x, state)[0]

    def commit(self, state: State | None, trace: object, keep: Keep | None = None) -> State:
        """The state after the first `keep` steps."""
        return self.module.commit(state, trace, keep)

    def empty(self, batch: int) -> State:
        """The empty state."""
        return self.module.init_state(batch, device=self.device)

    @property
    def grows(self) -> bool:
        """Whether the state grows with the text, as full attention's does."""
        return self.name in GROWING


@cache
def subject(name: str) -> Subject:
    """The subject of that name, with random weights that make every part matter: the same on every device."""
    torch.manual_seed(7)
    name, _, device = name.partition("@")
    device = device or "cpu"
    if name in MODELS:
        config = MODELS[name]
        network = config.build(seed=3)
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if parameter.ndim == 2 and "A_log" not in key:
                    parameter.mul_(1.5)
        vocabulary = config.vocab_size
        return Subject(name, network.to(device), lambda b, t: torch.randint(vocabulary, (b, t)).to(device), device)
    layer = LAYERS[name].build(WIDTH).to(device)
    return Subject(name, layer, lambda b, t: torch.randn(b, t, WIDTH).to(device), device)


def on_devices(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a law on subjects of these names, on the CPU and on a GPU."""
    # PyTorch warns of operations whose order of sums it does not promise; laws have bounds for that
    marks = (pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"))
    names = list(names)
    return pytest.mark.parametrize("name", [*names, *(pytest.param(f"{name}@cuda", marks=marks) for name in names)])


NAMES = [*LAYERS, *MODELS]
