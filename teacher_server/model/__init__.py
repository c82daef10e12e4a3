"""A loaded teacher: from a configuration to engines and a head that have been checked against the model's own code.

May import `engine`, `signals` and `admission`.
"""
