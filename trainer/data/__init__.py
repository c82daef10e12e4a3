"""What students learn from: data sets as token ids, the order of their rows, sequences to score, derived seeds.

The lowest room: it imports the shared package `tutelage` and nothing of the trainer.
"""
