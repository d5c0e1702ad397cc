"""The named models have the parameters, the ties and the initialisation of their papers."""

import pytest

from milonga.errors import UserError
from milonga.models import PRESETS, ModelConfig, preset
from milonga.models.accounting import embedding_parameter_count, parameter_count

# Millions of parameters, counted from the papers' tables and code, to the digits known.
MILLIONS = {
    "samba-421m": "421.8",
    "samba-1.3b": "1330.2",
    "samba-1.7b": "1742",
    "samba-3.8b": "3864",
    "samba-nope-421m": "421.8",
    "samba-nope-1.3b": "1330.2",
    "llama-2-438m": "438.1",
    "llama-2-1.3b": "1347.8",
    "llama-2-swa-438m": "438.1",
    "llama-2-swa-1.3b": "1347.8",
    "llama-2-swa-sc-438m": "438.3",
    "llama-3-1.6b": "1538",
    "mistral-1.6b": "1538",
    "tfm++-3.8b": "3821",
    "mamba-432m": "432.8",
    "mamba-1.3b": "1334.7",
    "mamba-1.8b": "1795",
    "mamba-swa-mlp-400m": "395.0",
    "mamba-swa-mlp-1.3b": "1239.4",
    "mamba-swa-mlp-1.6b": "1655",
    "mamba-mlp-1.9b": "1946",
    "mlp2-swa-mlp-417m": "417.2",
    "mlp2-swa-mlp-1.3b": "1316.0",
    "samba-421m-w512": "421.8",
    "samba-421m-w1024": "421.8",
    "mamba-mlp-449m-attn-11": "449.2",
    "mamba-mlp-449m-attn-5": "449.2",
    "mamba-mlp-449m-attn-0": "449.2",
    "mamba-mlp-443m-attn-1-5": "443.7",
    "mambabyte-353m": "353.95",
    "mambabyte-972m": "973.93",
    "mambabyte-1.6b": "1606.1",
    "mamba-352m-subword": "352.9",
    # 578.80 with LayerNorm; the other subword models' counts are those of RMSNorm
    "mamba-578m-subword": "578.74",
    "mamba-1.03b-subword": "1030.40",
}
# The head variants are printed in whole millions, cut off rather than rounded.
WHOLE_MILLIONS = {
    "llama-2-swa-414m-q12-kv1": 414,
    "llama-2-swa-419m-q12-kv2": 419,
    "llama-2-swa-428m-q12-kv4": 428,
    "llama-2-swa-419m-q6-kv1": 419,
    "samba-424m-q12-kv1": 424,
    "samba-426m-q12-kv2": 426,
    "samba-431m-q12-kv4": 431,
    "samba-426m-q6-kv1": 426,
}


def test_every_preset_is_checked_against_its_paper():
    assert set(PRESETS) == set(MILLIONS) | set(WHOLE_MILLIONS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_paper_and_of_the_built_network(name):
    built = sum(parameter.numel() for parameter in preset(name).build(device="meta").parameters())
    assert parameter_count(preset(name)) == built
    if name in WHOLE_MILLIONS:
        assert built // 1_000_000 == WHOLE_MILLIONS[name]
    else:
        digits = len(MILLIONS[name].partition(".")[2])
        assert f"{built / 1e6:.{digits}f}" == MILLIONS[name]


def test_the_two_regimes():
    untied = {name for name, made in PRESETS.items() if not made.config.tied}
    llama = {"llama-2-438m", "llama-2-swa-438m", "llama-2-swa-sc-438m", "tfm++-3.8b"}
    llama |= {name for name in WHOLE_MILLIONS if name.startswith("llama")}
    assert untied == llama | {"mambabyte-353m", "mambabyte-972m", "mambabyte-1.6b"}
    assert {name for name, made in PRESETS.items() if made.config.init == "small"} == llama
    # the confound of the paper's table 3, in parameters outside the embeddings
    outside = [parameter_count(c) - embedding_parameter_count(c) for c in map(preset, ("llama-2-438m", "samba-421m"))]
    assert [round(value / 1e6, 1) for value in outside] == [339.8, 372.6]


def test_layers_by_type():
    def counts(name):
        stack = preset(name).stack
        return {word: stack.count(word) for word in set(stack)}

    assert counts("samba-1.7b") == {"mamba": 12, "swa": 12, "mlp": 24}
    assert counts("samba-3.8b") == {"mamba": 16, "swa": 16, "mlp": 32}
    assert counts("mamba-swa-mlp-1.6b") == {"mamba": 18, "swa": 18, "mlp": 18}
    assert counts("mlp2-swa-mlp-1.3b") == {"mlp2": 9, "swa": 9, "mlp": 18}
    assert counts("mamba-mlp-443m-attn-1-5") == {"mamba": 10, "attn": 2, "mlp": 12}
    blocks = preset("mamba-mlp-443m-attn-1-5").stack[::2]
    assert [index for index, word in enumerate(blocks) if word == "attn"] == [1, 5]


def test_windows_and_positions():
    assert preset("samba-421m").layers["swa"].window == 2048
    assert preset("samba-421m-w512").layers["swa"].window == 512
    assert preset("llama-2-438m").layers["attn"].window is None
    assert preset("samba-nope-1.3b").layers["swa"].rope_base is None
    assert preset("llama-2-swa-sc-438m").layers["swa"].short_conv == 4
    assert preset("mambabyte-972m").norm == "layer_norm"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    assert ModelConfig.model_validate_json(preset(name).model_dump_json()) == preset(name)


def test_an_unknown_name_gives_the_close_ones():
    with pytest.raises(UserError, match=r"'samba-420m'.*samba-421m"):
        preset("samba-420m")
    with pytest.raises(UserError, match="milonga presets"):
        preset("???")
