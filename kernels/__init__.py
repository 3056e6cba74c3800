"""Triton kernels: tree attention, the merge of partials, KV write and page copy. Installed as ``anabranch.kernels``."""
