"""The shapes that are measured, and the arithmetic of their products."""

import pytest

from milonga.bench.models import (
    ON_CPU,
    ON_GPU,
    STUDY,
    product_flops,
    study_model,
    training_shape,
    training_shapes,
)
from milonga.errors import UserError
from milonga.layers import AttentionConfig, SwiGLUConfig
from milonga.models import ModelConfig
from milonga.models.accounting import parameter_count


def test_the_shapes_of_record_have_the_sizes_they_are_named_for():
    shapes = training_shapes()
    millions = {name: round(parameter_count(shape.config) / 1e6) for name, shape in shapes.items()}
    assert millions["samba-421m"] == 422
    assert millions["llama-389m"] == 389
    assert millions["mambabyte-353m"] == 354
    assert millions["byte-samba-30m"] == 30
    assert {*ON_GPU, *ON_CPU} == set(shapes)
    assert {(shapes[name].batch, shapes[name].length) for name in ON_GPU} == {(8, 4096), (4, 8192), (32, 4096)}


def test_any_preset_can_be_trained_and_a_wrong_name_is_refused():
    assert training_shape("mamba-432m").batch == 8
    with pytest.raises(UserError, match=r"preset 'samba-420m' does not exist.*did you mean"):
        training_shape("samba-420m")


@pytest.mark.parametrize("name", STUDY)
def test_the_study_has_the_papers_shapes_with_aligned_mlps(name):
    config = study_model(name, small=False)
    assert config.d_model == 2048
    assert config.vocab_size == 50304
    assert 1.5e9 < parameter_count(config) < 1.85e9
    if "mlp" in config.layers:
        assert config.layers["mlp"].d_hidden == 8192
    small = study_model(name, small=True)
    assert small.pattern == config.pattern
    assert small.build().layers()


def test_a_wrong_model_of_the_study_is_refused():
    with pytest.raises(UserError, match=r"--model.*samba, swa, mamba, transformer"):
        study_model("gpt", small=True)


def test_products_are_counted_by_hand():
    config = ModelConfig(
        vocab_size=11,
        d_model=8,
        pattern="swa mlp",
        layers={"swa": AttentionConfig(heads=2, kv_heads=1, window=2), "mlp": SwiGLUConfig(d_hidden=5)},
    )
    weights = 8 * (2 + 2) * 4 + 8 * 8 + 3 * 8 * 5  # queries, keys and values; output; MLP
    pairs = 1 + 2 + 2  # of 3 steps
    attention = 4 * 2 * 4 * pairs / 3
    assert product_flops(config, 3, head=False) == pytest.approx(2 * weights + attention)
    assert product_flops(config, 3) == pytest.approx(2 * (weights + 11 * 8) + attention)
