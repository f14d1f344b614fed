"""The version, alone in a module so that nothing else is imported for it."""

__version__ = "0.1.0"
