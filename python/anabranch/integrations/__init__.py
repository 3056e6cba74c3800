"""Parts of other programs: `anabranch.integrations.vllm` is an attention backend for vLLM."""
