"""``attn_implementation="anabranch"`` for any Hugging Face decoder, through Transformers' own registries."""

from anabranch.hf.cache import cache_shape
from anabranch.hf.latent import latent_dims, latents_of
from anabranch.hf.mask import beside_branch_mask, tree_mask
from anabranch.hf.probe import ModelShape, UnsupportedModel, describe, is_compiled, uses_anabranch
from anabranch.hf.register import enable, register
from anabranch.hf.segments import SegmentVectors
from anabranch.hf.weight_pages import large_pages
from anabranch.kv.model import set_reader

__all__ = [
    "ModelShape",
    "SegmentVectors",
    "UnsupportedModel",
    "beside_branch_mask",
    "describe",
    "enable",
    "is_compiled",
    "large_pages",
    "latent_dims",
    "latents_of",
    "register",
    "tree_mask",
    "uses_anabranch",
]

set_reader(cache_shape)  # from now on TreeCache.for_model knows what a model looks like
