"""An OpenAI-compatible server over an engine: strategies by request, threads in the stream."""

from anabranch.serve.app import create_app
from anabranch.serve.settings import Settings

__all__ = ["Settings", "create_app"]
