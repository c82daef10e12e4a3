"""One machine from one file: teachers, evaluator, Ray with its dashboard, Prometheus; started and ended together.

Drives the services by their commands only. The demonstration and studies start theirs through the same `Service`.
"""
