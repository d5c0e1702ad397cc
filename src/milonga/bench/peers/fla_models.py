"""Whole models of fla: Samba and the Transformer, on a GPU. Their MLPs have a width of their own, near 8/3 of the
model's, which is that of the shapes of record."""

from fla.models import SambaConfig, SambaForCausalLM, TransformerConfig, TransformerForCausalLM
from torch import Tensor, nn

from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig
from milonga.models import ModelConfig


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def model(config: ModelConfig, device_type: str) -> nn.Module | None:
    """Tokens -> mean loss, of the same shape; None if there is no model of that shape."""
    if device_type != "cuda":
        return None
    kinds = [type(config.layers[name]) for name in config.pattern.split()]
    attention = next((layer for layer in config.layers.values() if isinstance(layer, AttentionConfig)), None)
    mlp = next((layer for layer in config.layers.values() if isinstance(layer, SwiGLUConfig)), None)
    if attention is None or mlp is None:
        return None
    heads, groups, _ = attention.shape(config.d_model)
    if kinds == [MambaConfig, SwiGLUConfig, AttentionConfig, SwiGLUConfig]:
        blocks = 2 * config.repeats
        mixed = {
            "layers": list(range(1, blocks, 2)),
            "num_heads": heads,
            "num_kv_heads": groups,
            "qkv_bias": False,
            "window_size": attention.window,
            "rope_theta": attention.rope_base,
        }
        made = SambaConfig(
            hidden_size=config.d_model,
            num_hidden_layers=blocks,
            attn=mixed,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied,
        )
        return _Loss(SambaForCausalLM(made))
    if kinds == [AttentionConfig, SwiGLUConfig]:
        made = TransformerConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.repeats,
            num_heads=heads,
            num_kv_heads=groups,
            window_size=attention.window,
            intermediate_size=mlp.d_hidden,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied,
        )
        return _Loss(TransformerForCausalLM(made))
    return None
