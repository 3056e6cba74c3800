"""Strategies over a server that people already run: the books of `anabranch.threads`, with decodes sent over HTTP."""

from anabranch.remote.engine import RemoteEngine

__all__ = ["RemoteEngine"]
