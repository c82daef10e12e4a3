"""Engines that generate and score token ids, with transformers or vLLM.

Imports nothing of the evaluator's other rooms.
"""
