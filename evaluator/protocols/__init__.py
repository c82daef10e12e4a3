"""How an item becomes a question to a model, and the model's answer a score: `paper`, `loglik`, `open`."""
