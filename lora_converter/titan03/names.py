"""Canonical names: what torchtitan 0.2.2 calls what 0.3 calls otherwise. Seeds and fingerprints go by them."""

import re

_HERE_AND_THERE = (
    (re.compile(r"\.qkv_linear\."), "."),
    (re.compile(r"^lm_head(?=\.|$)"), "output"),
    (re.compile(r"\.moe\.routed_experts\.inner_experts\.(w\d)_E\w\w"), r".moe.experts.\1"),
    (re.compile(r"\.moe\.routed_experts\.inner_experts"), ".moe.experts"),
    (re.compile(r"\.moe\.expert_bias_E"), ".moe.expert_bias"),
)
"""Names of 0.3, and what 0.2.2 has in their place."""


def canonical_name(fqn: str) -> str:
    """A parameter's or module's name on any host: that of torchtitan 0.2.2."""
    for here, there in _HERE_AND_THERE:
        fqn = here.sub(there, fqn)
    return fqn
