"""Reading and writing text with a trained model: language models, sessions, sampling."""

from milonga.inference.batch import Batch, Event, Ticket
from milonga.inference.generation import Generation, Logprob
from milonga.inference.language_model import LanguageModel, choose_device, load
from milonga.inference.marks import Mark
from milonga.inference.sampling import Sampler, Sampling, distribution
from milonga.inference.session import Session
from milonga.inference.store import Reuse, StateStore

__all__ = [
    "Batch",
    "Event",
    "Generation",
    "LanguageModel",
    "Logprob",
    "Mark",
    "Reuse",
    "Sampler",
    "Sampling",
    "Session",
    "StateStore",
    "Ticket",
    "choose_device",
    "distribution",
    "load",
]
