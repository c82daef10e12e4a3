"""What the services share: the gRPC contract, its codec, identities, errors and configuration."""

__version__ = "0.1.0"
