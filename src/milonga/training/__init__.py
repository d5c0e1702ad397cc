"""Training on one device: configs, optimizer, schedule, the loop, checkpoints, metrics."""

from milonga.training.captured import CapturedGradient
from milonga.training.checkpoint import list_checkpoints
from milonga.training.config import EvaluationSettings, RunConfig, TrainingConfig, recipe_names
from milonga.training.loop import train
from milonga.training.metrics import read_metrics
from milonga.training.optimizer import Optimizer, OptimizerConfig, build_optimizer
from milonga.training.report import Progress, TrainingResult
from milonga.training.schedule import ScheduleConfig, learning_rate
from milonga.training.signals import Interrupted
from milonga.training.start import apply_training, stored_config
from milonga.training.step import StepResult, training_step

__all__ = [
    "CapturedGradient",
    "EvaluationSettings",
    "Interrupted",
    "Optimizer",
    "OptimizerConfig",
    "Progress",
    "RunConfig",
    "ScheduleConfig",
    "StepResult",
    "TrainingConfig",
    "TrainingResult",
    "apply_training",
    "build_optimizer",
    "learning_rate",
    "list_checkpoints",
    "read_metrics",
    "recipe_names",
    "stored_config",
    "train",
    "training_step",
]
