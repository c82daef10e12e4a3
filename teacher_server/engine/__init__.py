"""Engines that give hidden states of tokens and generate tokens; everything that knows vLLM is in here.

The lowest room: it imports `config` and the shared package `tutelage`.
"""
