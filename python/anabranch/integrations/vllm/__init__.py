"""An attention backend for vLLM: requests that share a prefix, at any depth, have it read once.

Where anabranch is installed beside vLLM, ``--attention-backend CUSTOM`` chooses it; nothing else changes. `register`
is what vLLM calls (entry point group ``vllm.general_plugins``). Of the files here `plugin`, `backend`, `builder`,
`impl` and `mirror` import vLLM; the others know its objects by their attributes alone.

Example::

    vllm.LLM(model, attention_backend="CUSTOM").generate(prompt, vllm.SamplingParams(n=16))
"""

from anabranch.integrations.vllm.plugin import register

__all__ = ["register"]
