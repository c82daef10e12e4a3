"""From hidden states to what travels: unembedding, logit head, the store of states, frames.

May import `engine` and `admission`.
"""
