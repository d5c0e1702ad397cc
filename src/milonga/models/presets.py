"""The models of the papers by name. Each is a config and nothing else: a name never changes code.

Sources: Samba is Ren et al., "Samba: Simple Hybrid State Space Models for Efficient Unlimited Context Language
Modeling" (2024), with tables 3, 5, 6, 10, 11 and 12 of its third version and the code beside it; MambaByte is Wang et
al., "MambaByte: Token-free Selective State Space Model" (2024).

Two regimes hide in the Samba paper: its 438M Llama models were trained untied with the `small` initialisation,
everything else tied with Mamba's. The presets keep that. The 1.6B to 3.8B models have no published code: they are tied
like the smaller ones, with their norm epsilon and initialisation.
"""

import difflib
from dataclasses import dataclass

from milonga.errors import UserError
from milonga.layers import AttentionConfig, LayerConfig, MambaConfig, SwiGLUConfig
from milonga.models.config import ModelConfig

SLIMPAJAMA = 32000  # Llama-2's vocabulary
PHI_2 = 50304
PHI_3 = 32064
SUBWORD = 32072  # 32,070 pieces of MambaByte's subword models, padded to a multiple of 8
WINDOW = 2048

SAMBA = "mamba mlp swa mlp"


@dataclass(frozen=True)
class Preset:
    """A published model.

    Args:
        config: the network.
        parameters_published: its size as the paper prints it, such as `421M`; None where no size is printed.
        source: paper and table.
        note: where our count and the printed size disagree, or what the paper leaves open; else empty.
    """

    config: ModelConfig
    parameters_published: str | None
    source: str
    note: str = ""


def _attention(heads: int, kv_heads: int | None = None, head_dim: int | None = None) -> AttentionConfig:
    return AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _swa(heads: int, kv_heads: int | None = None, head_dim: int | None = None) -> AttentionConfig:
    return AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=WINDOW)


def _model(d_model: int, pattern: str, repeats: int, *, vocab: int = SLIMPAJAMA, **layers: LayerConfig) -> ModelConfig:
    used = {word: layers[word] for word in dict.fromkeys(pattern.split())}
    return ModelConfig(vocab_size=vocab, d_model=d_model, pattern=pattern, repeats=repeats, layers=used)


def _small(pattern: str, repeats: int, *, d_hidden: int = 4096, mixer: AttentionConfig | None = None) -> ModelConfig:
    """The 421M class: width 1536, 12 heads of 128."""
    mixer = mixer or _swa(12)
    full = mixer.model_copy(update={"window": None})
    mlp2 = SwiGLUConfig(d_hidden=2 * 1536)
    return _model(
        1536,
        pattern,
        repeats,
        mamba=MambaConfig(),
        swa=mixer,
        attn=full,
        mlp=SwiGLUConfig(d_hidden=d_hidden),
        mlp2=mlp2,
    )


def _large(pattern: str, repeats: int) -> ModelConfig:
    """The 1.3B class: width 2304, 18 heads of 128."""
    mlp, mlp2 = SwiGLUConfig(d_hidden=6144), SwiGLUConfig(d_hidden=2 * 2304)
    return _model(2304, pattern, repeats, mamba=MambaConfig(), swa=_swa(18), attn=_attention(18), mlp=mlp, mlp2=mlp2)


def _phi_2(pattern: str, repeats: int) -> ModelConfig:
    """The models trained on Phi-2's data: width 2048, 32 query heads of 64 and 4 key heads, MLPs of 8196 as printed."""
    mlp, swa, attn = SwiGLUConfig(d_hidden=8196), _swa(32, 4), _attention(32, 4)
    return _model(2048, pattern, repeats, vocab=PHI_2, mamba=MambaConfig(), swa=swa, attn=attn, mlp=mlp)


def _untied(config: ModelConfig) -> ModelConfig:
    """The other regime: head and embedding apart, normal initialisation with small residual outputs."""
    return config.replace(tied=False, init="small")


def _mamba(d_model: int, layers: int, vocab: int) -> ModelConfig:
    return _model(d_model, "mamba", layers, vocab=vocab, mamba=MambaConfig())


def _mambabyte(d_model: int, layers: int) -> ModelConfig:
    return _mamba(d_model, layers, 256).replace(norm="layer_norm", tied=False)


def _hybrid(*attention_blocks: int) -> ModelConfig:
    """Mamba-MLP of 12 blocks with full attention instead of Mamba in some of them."""
    return _small(" ".join("attn mlp" if block in attention_blocks else "mamba mlp" for block in range(12)), 1)


def _samba_paper() -> dict[str, Preset]:
    main, sizes = "Samba, tables 3 and 12", "Samba, table 11"
    tying_open = "whether the embedding is tied is not published"
    swa, swa_large = _small("swa mlp", 12), _large("swa mlp", 20)
    return {
        "samba-421m": Preset(_small(SAMBA, 6), "421M", main),
        "samba-1.3b": Preset(_large(SAMBA, 9), "1.3B", main),
        "samba-1.7b": Preset(_phi_2(SAMBA, 12), "1.7B", sizes, tying_open),
        "samba-3.8b": Preset(
            _model(
                2816,
                SAMBA,
                16,
                vocab=PHI_3,
                mamba=MambaConfig(),
                swa=_swa(11, 1, 256),
                mlp=SwiGLUConfig(d_hidden=9984),
            ),
            "3.8B",
            sizes,
            f"{tying_open}; 3.77B without the embedding, 3.86B tied, 3.95B untied",
        ),
        "samba-nope-421m": Preset(_small(SAMBA, 6).replace_layer("swa", rope_base=None), "421M", main),
        "samba-nope-1.3b": Preset(_large(SAMBA, 9).replace_layer("swa", rope_base=None), "1.3B", main),
        "llama-2-438m": Preset(_untied(_small("attn mlp", 12)), "438M", main),
        "llama-2-1.3b": Preset(_large("attn mlp", 20), "1.3B", main),
        "llama-2-swa-438m": Preset(_untied(swa), "438M", main),
        "llama-2-swa-1.3b": Preset(swa_large, "1.3B", main),
        "llama-2-swa-sc-438m": Preset(
            _untied(swa.replace_layer("swa", short_conv=4)),
            None,
            "Samba, table 10",
            "the size with short convolutions is not printed",
        ),
        "llama-3-1.6b": Preset(_phi_2("attn mlp", 24), "1.6B", sizes, f"{tying_open}; 1.54B tied, 1.64B untied"),
        "mistral-1.6b": Preset(_phi_2("swa mlp", 24), "1.6B", sizes, f"{tying_open}; 1.54B tied, 1.64B untied"),
        "tfm++-3.8b": Preset(
            _model(3072, "attn mlp", 32, vocab=PHI_3, attn=_attention(32), mlp=SwiGLUConfig(d_hidden=8192)).replace(
                tied=False, init="small"
            ),
            "3.8B",
            sizes,
            "the architecture of Phi-3-mini, its initialisation unknown",
        ),
        "mamba-432m": Preset(_mamba(1024, 60, SLIMPAJAMA), "432M", main),
        "mamba-1.3b": Preset(_mamba(2048, 48, SLIMPAJAMA), "1.3B", main),
        "mamba-1.8b": Preset(
            _mamba(2048, 64, PHI_2),
            "1.8B",
            sizes,
            f"{tying_open}; 64 layers by table 11, 48 by the text of section 2.1",
        ),
        "mamba-swa-mlp-400m": Preset(_small("mamba swa mlp", 8), "400M", main, "the count is 395M"),
        "mamba-swa-mlp-1.3b": Preset(_large("mamba swa mlp", 12), "1.3B", main, "the count is 1.24B"),
        "mamba-swa-mlp-1.6b": Preset(_phi_2("mamba swa mlp", 18), "1.6B", sizes, f"{tying_open}; the count is 1.66B"),
        "mamba-mlp-1.9b": Preset(_phi_2("mamba mlp", 24), "1.9B", sizes, tying_open),
        "mlp2-swa-mlp-417m": Preset(_small("mlp2 mlp swa mlp", 6), "417M", main),
        "mlp2-swa-mlp-1.3b": Preset(_large("mlp2 mlp swa mlp", 9), "1.3B", main),
    }


def _variants() -> dict[str, Preset]:
    """What the Samba paper varies: heads, windows, and full attention in place of a window."""
    table = "Samba, table 6"
    heads = {
        "q12-kv1": (12, 1, 128, "414M", "424M"),
        "q12-kv2": (12, 2, 128, "419M", "426M"),
        "q12-kv4": (12, 4, 128, "428M", "431M"),
        "q6-kv1": (6, 1, 256, "419M", "426M"),
    }
    made: dict[str, Preset] = {}
    for name, (queries, keys, width, llama_size, samba_size) in heads.items():
        mixer = _swa(queries, keys, width)
        llama = _small("swa mlp", 12, d_hidden=4608, mixer=mixer)
        made[f"llama-2-swa-{llama_size.lower()}-{name}"] = Preset(_untied(llama), llama_size, table)
        made[f"samba-{samba_size.lower()}-{name}"] = Preset(
            _small(SAMBA, 6, d_hidden=4608, mixer=mixer), samba_size, table
        )
    for window in (512, 1024):
        config = _small(SAMBA, 6).replace_layer("swa", window=window)
        made[f"samba-421m-w{window}"] = Preset(config, None, "the Samba code's configs", "not in the paper's tables")
    for blocks, size in (((11,), "449M"), ((5,), "449M"), ((0,), "449M"), ((1, 5), "443M")):
        name = f"mamba-mlp-{size.lower()}-attn-{'-'.join(str(block) for block in blocks)}"
        made[name] = Preset(_hybrid(*blocks), size, "Samba, table 5")
    return made


def _mambabyte_paper() -> dict[str, Preset]:
    source, rebuttal = "MambaByte, section 4", "MambaByte, the authors' reply to its reviews"
    return {
        "mambabyte-353m": Preset(_mambabyte(1024, 53), "353M", source),
        "mambabyte-972m": Preset(_mambabyte(1792, 48), "972M", source, "the count is 974M with the code's untied head"),
        "mambabyte-1.6b": Preset(_mambabyte(2304, 48), "1.6B", source),
        "mamba-352m-subword": Preset(_mamba(1024, 48, SUBWORD), "352M", rebuttal),
        "mamba-578m-subword": Preset(_mamba(1328, 48, SUBWORD), "578M", rebuttal),
        "mamba-1.03b-subword": Preset(_mamba(1792, 48, SUBWORD), "1.03B", source),
    }


PRESETS: dict[str, Preset] = {**_samba_paper(), **_variants(), **_mambabyte_paper()}


def preset(name: str) -> ModelConfig:
    """The config of the model called `name`, such as `samba-421m`.

    Raises:
        UserError: if there is none of that name; with the names that are close.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "see `milonga presets`"
        raise UserError(f"preset {name!r} does not exist: {hint}")
    return PRESETS[name].config
