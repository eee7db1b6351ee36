"""Exact per-sample Fisher information, for every parameter, in one backward pass a batch."""
