"""The Hugging Face Hub's form of a model: a folder that timm loads."""

from .folder import export, load, save

__all__ = ["export", "load", "save"]
