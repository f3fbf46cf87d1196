"""Robust evaluation."""

from jaxrobust.evaluation.accuracy import accuracy_curve, correct

__all__ = ["accuracy_curve", "correct"]
