"""Strategies that change how tokens are computed, and none of the tokens."""
