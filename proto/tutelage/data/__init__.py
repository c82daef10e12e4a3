"""Data that several services read: rows, conversations, prompts, token ids; the hub; stored signals.

For every service. May import `rpc` (the stubs of what is stored) and what stands below it; no transformers: tokenizers
are passed in.
"""
