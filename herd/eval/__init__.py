"""Evaluations: each is one command whose JSON result says how it was made. `run` is the way in."""

from herd.eval.runner import NAMES, run, summary

__all__ = ["NAMES", "run", "summary"]
