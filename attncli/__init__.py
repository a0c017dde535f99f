"""The linter and debugger for attention."""

__version__ = "0.1.0"
