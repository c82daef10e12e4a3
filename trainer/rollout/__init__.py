"""Live sampling: the student writes continuations of prompts with the weights that it has now.

`base` is what every sampler is; `vllm_sampler` alone imports vLLM. May import `model` and the rooms below it.
"""
