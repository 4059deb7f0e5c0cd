"""FLOPs of a Megatron model as named parts, under a stated convention, and their proof against torch's dispatcher.

    from harness.flops import flops
    print(flops(provider, seq=4096, batch=1, convention="causal").per_token)

`provider` is a finalized Megatron provider or TransformerConfig that also says `vocab_size`. docs/flops.md has the formulas.
"""

from harness.flops.fields import FlopsError
from harness.flops.model import flops
from harness.flops.run import CONVENTIONS, KERNELS, Flops, Part, Run

__all__ = ["CONVENTIONS", "KERNELS", "Flops", "FlopsError", "Part", "Run", "flops"]
