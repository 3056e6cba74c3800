"""Triton kernels: tree attention, branch attention, the merge of partials, KV write, page copy. Installed as
``anabranch.kernels``."""
