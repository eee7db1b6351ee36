"""Drop-in optimizers that read and write selected entries only."""
