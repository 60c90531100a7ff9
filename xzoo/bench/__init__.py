"""`xzoo bench`: how fast layers and models are, what a training loop costs, and what trained
weights are worth.
"""

from .figures import Figure, check_file, machine, ratios, threads, write_csv
from .finetune import finetuning
from .layer import layers, policy, scaling, share
from .model import memory, models
from .plot import PICTURES, draw
from .training import loop

__all__ = [
    "PICTURES",
    "Figure",
    "check_file",
    "draw",
    "finetuning",
    "layers",
    "loop",
    "machine",
    "memory",
    "models",
    "policy",
    "ratios",
    "scaling",
    "share",
    "threads",
    "write_csv",
]
