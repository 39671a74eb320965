"""dualfocus: an edge-optimised inference runtime for two-pass vision-language models.

The rooms, in reading order: ``runtime.manifest`` (what a bundle says about itself),
``runtime.turns`` (the protocol's prompts), ``runtime.cache`` and ``runtime.engine``
(KV cache and decoder), ``runtime.scheduler`` (the two passes). Importing this package
imports none of them.
"""

__version__ = "0.1.0"
