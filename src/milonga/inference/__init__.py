"""Reading and writing text with a trained model: language models, sessions, sampling."""

from milonga.inference.language_model import LanguageModel, choose_device, load
from milonga.inference.sampling import Sampler, Sampling, distribution
from milonga.inference.session import Mark, Session

__all__ = ["LanguageModel", "Mark", "Sampler", "Sampling", "Session", "choose_device", "distribution", "load"]
