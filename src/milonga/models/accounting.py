"""What a model costs, computed from its config alone: parameters, arithmetic, state."""

import torch

from milonga.layers import norm_parameter_count
from milonga.models.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the built network; a tied head counts once, as the embedding."""
    norms = (len(config.stack) + 1) * norm_parameter_count(config.norm, config.d_model)
    layers = sum(config.layers[name].parameter_count(config.d_model) for name in config.stack)
    return norms + layers + embedding_parameter_count(config)


def embedding_parameter_count(config: ModelConfig) -> int:
    """Parameters of the embedding and, where it is not tied, of the head."""
    return config.vocab_size * config.d_model * (1 if config.tied else 2)


def flops_per_token(config: ModelConfig, context: float = 0.0, *, training: bool = False) -> float:
    """Floating-point operations for one token that `context` earlier tokens precede.

    A multiply-add is two. Counted are the layers and the head; norms, residual sums and the embedding's look-up (less
    than a thousandth of the rest in the published sizes) are not. Averaged over a text of T tokens, full attention sees
    a context of (T - 1) / 2.

    Args:
        config: the network.
        context: earlier tokens, at least 0; a window sees no more than its own width of them.
        training: forward and backward, counted as three times the forward pass.
    """
    layers = sum(config.layers[name].flops_per_token(config.d_model, context) for name in config.stack)
    forward = layers + 2.0 * config.d_model * config.vocab_size
    return 3.0 * forward if training else forward


def state_bytes(config: ModelConfig, length: int, *, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one sequence's state after `length` tokens: constant, but for layers of full attention.

    Args:
        config: the network.
        length: tokens read, at least 0.
        dtype: of the activations. Recurrent sums are fp32 in every mode.
    """
    each = {name: layer.state_bytes(config.d_model, length, dtype) for name, layer in config.layers.items()}
    return sum(each[name] for name in config.stack)
