"""Version 1 of the teacher's contract: generated stubs."""
