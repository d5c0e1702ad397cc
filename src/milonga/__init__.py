"""Milonga: language models whose memory does not grow with the text they read.

Train, evaluate and stream Samba, Mamba and MambaByte, and the baselines their papers compare with.

    import milonga

    lm = milonga.load("runs/demo")
    session = lm.session()
    session.feed(b"It was the best of times")

Names are loaded when first used (PEP 562), so `import milonga` imports neither torch nor numba.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from milonga.errors import UserError as UserError
    from milonga.inference import LanguageModel as LanguageModel
    from milonga.inference import Session as Session
    from milonga.inference import load as load
    from milonga.layers import AttentionConfig as AttentionConfig
    from milonga.layers import MambaConfig as MambaConfig
    from milonga.layers import SwiGLUConfig as SwiGLUConfig
    from milonga.models import ModelConfig as ModelConfig
    from milonga.segments import Segments as Segments

# public name -> the module that defines it
_NAMES = {
    "AttentionConfig": "milonga.layers",
    "LanguageModel": "milonga.inference",
    "MambaConfig": "milonga.layers",
    "ModelConfig": "milonga.models",
    "Segments": "milonga.segments",
    "Session": "milonga.inference",
    "SwiGLUConfig": "milonga.layers",
    "UserError": "milonga.errors",
    "load": "milonga.inference",
}

_MODULES = ("data", "evaluation", "files", "inference", "layers", "models", "ops", "segments", "state", "training")

__all__ = [
    "AttentionConfig",
    "LanguageModel",
    "MambaConfig",
    "ModelConfig",
    "Segments",
    "Session",
    "SwiGLUConfig",
    "UserError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _NAMES:
        value: object = vars(importlib.import_module(_NAMES[name]))[name]
    elif name in _MODULES:
        value = importlib.import_module(f"milonga.{name}")
    else:
        raise AttributeError(f"module 'milonga' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *globals()})
