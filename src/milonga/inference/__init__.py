"""Reading and writing text with a trained model: language models, sessions, sampling."""

from milonga.inference.batch import Batch, Event, Ticket
from milonga.inference.draft_length import AdaptiveDraft
from milonga.inference.drafters import NgramDrafter
from milonga.inference.generation import Generation, Logprob
from milonga.inference.language_model import LanguageModel, choose_device, load
from milonga.inference.marks import Mark
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.sampling import Sampler, Sampling, distribution
from milonga.inference.session import Session
from milonga.inference.speculative import SpeculativeDecoder
from milonga.inference.speculative_rows import SpeculationStats
from milonga.inference.store import Reuse, StateStore

__all__ = [
    "AdaptiveDraft",
    "Batch",
    "Event",
    "Generation",
    "LanguageModel",
    "Logprob",
    "Mark",
    "ModelDrafter",
    "NgramDrafter",
    "Reuse",
    "Sampler",
    "Sampling",
    "Session",
    "SpeculationStats",
    "SpeculativeDecoder",
    "StateStore",
    "Ticket",
    "choose_device",
    "distribution",
    "load",
]
