"""Everything on the wire: the contract's stubs (`v1`), transport, TLS, tokens, and the codec of tensors and frames."""
