"""How an item becomes a question to a model, and the model's answer a score: `paper`, `loglik`, `open`.

Of the evaluator `models`, `tasks`, `scoring` and the settings may be imported here.
"""

from __future__ import annotations

from tutelage.evaluator.protocols import loglik, open, paper
from tutelage.evaluator.protocols.base import EvaluationProtocol

PROTOCOLS: dict[str, EvaluationProtocol] = {"paper": paper, "loglik": loglik, "open": open}
