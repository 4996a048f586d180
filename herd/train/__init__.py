"""`run` trains by a recipe: pool → hidden states → a closed-form start → the loop → weights of what was grown."""

from herd.train.run import run

__all__ = ["run"]
