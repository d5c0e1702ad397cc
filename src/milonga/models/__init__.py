"""From a pattern to a network: configs, presets, accounting, weight files."""

from milonga.models.config import ModelConfig
from milonga.models.network import Network, NetworkOutput, NetworkState

__all__ = ["ModelConfig", "Network", "NetworkOutput", "NetworkState"]
