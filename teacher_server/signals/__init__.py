"""From hidden states to what travels: unembedding, logit head, the cache of states, frames.

May import `engine` and `admission`.
"""
