"""Robust evaluation."""

from jaxrobust.evaluation.accuracy import accuracy_curve, correct
from jaxrobust.evaluation.auto_attack import AutoAttackResult, auto_attack, suite

__all__ = ["AutoAttackResult", "accuracy_curve", "auto_attack", "correct", "suite"]
