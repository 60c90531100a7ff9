"""What runs reached: the table of results, published figures, and both in pictures."""

from .runs import Row, aggregate, append, published, read, recipe_sha

__all__ = ["Row", "aggregate", "append", "published", "read", "recipe_sha"]
