"""The Hugging Face Hub's form of a model: a folder that timm loads, and how it gets there
(publish.py).
"""

from .folder import check, export, load, save

__all__ = ["check", "export", "load", "save"]
