"""Everything on the wire: the contract's stubs (`v1`), transport, TLS, tokens, and the codec of tensors and frames.

For every service and its commands. May import configuration, names and errors.
"""
