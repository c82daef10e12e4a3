"""From an output to a score: extraction of answers, agreement and fidelity of two evaluations, kinds of errors.

The lowest room: it imports the shared package `tutelage` and nothing of the evaluator.
"""
