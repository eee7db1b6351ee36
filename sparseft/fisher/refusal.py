"""The errors that this package raises while it runs a model, told from the model's own."""


class Refusal(ValueError):
    """Says what is refused, and what to do: nobody has to explain it further."""
