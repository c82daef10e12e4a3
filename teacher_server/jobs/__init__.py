"""Work over a whole data set: filling the signal store, and having a served teacher generate.

The top room: it may import all others.
"""
