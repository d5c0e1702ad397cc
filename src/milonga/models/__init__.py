"""From a pattern to a network: configs, presets, accounting, weight files."""

from milonga.models.config import ModelConfig
from milonga.models.network import Network, NetworkOutput, NetworkState
from milonga.models.presets import PRESETS, Preset, preset

__all__ = ["PRESETS", "ModelConfig", "Network", "NetworkOutput", "NetworkState", "Preset", "preset"]
