"""A small draft model for the adapted SmolLM2 (README.md)."""
