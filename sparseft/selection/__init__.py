"""Which weights to train: one file a method."""
