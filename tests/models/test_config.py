import pytest
import torch

from milonga.errors import UserError
from milonga.layers import MambaConfig
from milonga.models import ModelConfig
from tests.laws.subjects import MODELS


def test_replace_keeps_what_the_pattern_names() -> None:
    samba = MODELS["model-samba"]
    changed = samba.replace(pattern="mamba mlp", repeats=5)
    assert changed.stack == ["mamba", "mlp"] * 5 and set(changed.layers) == {"mamba", "mlp"}
    assert samba.stack == ["mamba", "mlp", "swa", "mlp"] * 2


def test_replace_layer_changes_one_setting() -> None:
    samba = MODELS["model-samba"]
    nope = samba.replace_layer("swa", rope_base=None)
    assert nope.layers["swa"].rope_base is None
    assert nope.layers["swa"].model_dump() | {"rope_base": 10000.0} == samba.layers["swa"].model_dump()


def test_errors_are_one_line_with_a_path() -> None:
    samba = MODELS["model-samba"]
    for call, words in (
        (lambda: samba.replace(pattern="mamba foo"), "pattern word 'foo' has no layer"),
        (lambda: samba.replace(d_model=0), "model.d_model"),
        (lambda: samba.replace_layer("swa", windw=3), "layers.swa.windw: no such setting"),
        (lambda: samba.replace_layer("swa", window=0), "layers.swa.window"),
        (lambda: samba.replace_layer("swa", kv_heads=3), "kv_heads must divide heads"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
            call()
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="no layer 'attn': layers has"):
        samba.replace_layer("attn", window=3)


def test_unused_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="layer 'other' is not used"):
        ModelConfig(vocab_size=9, d_model=8, pattern="mamba", layers={"mamba": MambaConfig(), "other": MambaConfig()})


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3).long()])
def test_tokens_must_be_integers(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tokens must be int64"):
        MODELS["model-samba"].build()(tokens)
