"""The stubs of `proto/schema`, written by `make stubs`."""
