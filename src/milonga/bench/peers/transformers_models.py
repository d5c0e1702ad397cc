"""Whole models of transformers: Llama. Its Mamba needs minutes for one training step without other packages."""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from milonga.layers import AttentionConfig, SwiGLUConfig
from milonga.models import ModelConfig


class _Loss(nn.Module):
    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def model(config: ModelConfig, device_type: str) -> nn.Module | None:
    """Tokens -> mean loss, of the same shape; None if there is no model of that shape."""
    layers = [config.layers[name] for name in config.pattern.split()]
    attention, mlp = (*layers, None, None)[:2]
    if len(layers) != 2 or not isinstance(attention, AttentionConfig) or not isinstance(mlp, SwiGLUConfig):
        return None
    if attention.window is not None:
        return None
    heads, groups, width = attention.shape(config.d_model)
    made = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=mlp.d_hidden,
        num_hidden_layers=config.repeats,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        tie_word_embeddings=config.tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _Loss(LlamaForCausalLM(made))
