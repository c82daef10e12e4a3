"""A vLLM teacher behind gRPC: the scoring engine, the signal head, the writing engine."""
