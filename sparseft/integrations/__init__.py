"""Wiring into other libraries; the only importers of them."""
