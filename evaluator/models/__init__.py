"""Engines that generate and score token ids, with transformers or vLLM.

Nothing of the evaluator but its settings may be imported here.
"""
