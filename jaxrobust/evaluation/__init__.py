"""Accuracy under attack: of one attack, along eps, of AutoAttack, and as a report with its card.

report = evaluate(logits_fn, images, labels, threats={"linf": 8 / 255}, key=key, args=(variables,))
"""

from jaxrobust.evaluation.accuracy import LossOfModel, accuracy_curve, correct
from jaxrobust.evaluation.auto_attack import AutoAttackResult, auto_attack, suite
from jaxrobust.evaluation.checks import Check
from jaxrobust.evaluation.corrupted import corruption_accuracy
from jaxrobust.evaluation.evaluator import evaluate
from jaxrobust.evaluation.masking import report_card
from jaxrobust.evaluation.report import Report, ThreatReport

__all__ = [
    "AutoAttackResult",
    "Check",
    "LossOfModel",
    "Report",
    "ThreatReport",
    "accuracy_curve",
    "auto_attack",
    "correct",
    "corruption_accuracy",
    "evaluate",
    "report_card",
    "suite",
]
