"""The Hugging Face Hub's form of a model: a folder that timm loads."""

from .folder import load, save

__all__ = ["load", "save"]
