"""The training of one student: preflight, batches that the teacher scored, optimizer steps, validation, control.

May import every room but `cluster`; knows nothing of Ray.
"""
