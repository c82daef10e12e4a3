"""Data that several services read: data set files, prompts, the hub, stored signals."""
