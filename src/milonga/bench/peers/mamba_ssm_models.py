"""Whole models of mamba_ssm: stacks of Mamba layers, on a GPU."""

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from torch import Tensor, nn
from torch.nn import functional as F

from milonga.layers import MambaConfig as MambaLayer
from milonga.models import ModelConfig


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def model(config: ModelConfig, device_type: str) -> nn.Module | None:
    """Tokens -> mean loss, of the same shape; None if there is no model of that shape."""
    if device_type != "cuda" or not all(isinstance(layer, MambaLayer) for layer in config.layers.values()):
        return None
    made = MambaConfig(
        d_model=config.d_model,
        n_layer=len(config.stack),
        vocab_size=config.vocab_size,
        ssm_cfg={"layer": "Mamba1"},
        rms_norm=config.norm == "rms_norm",
        pad_vocab_size_multiple=8,
        tie_embeddings=config.tied,
    )
    return _Loss(MambaLMHeadModel(made))
