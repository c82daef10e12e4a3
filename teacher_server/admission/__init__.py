"""What is let in and when: every field of a request is checked, and students take fair turns.

May import `engine`.
"""
