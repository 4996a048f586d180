"""Contexts: what one model has read, kept as a durable folder that questions attend to."""
