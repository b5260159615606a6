"""Loading a checkpoint so that nothing in it is missing, left over or filled in."""

import re

# What old checkpoints hold beside weights: constants that the model makes by itself.
_CONSTANT = re.compile(r"(?:^|\.)(?:masked_bias|position_ids|(?:original_)?inv_freq|(?:cos|sin)_cached)$")
_CAUSAL_MASK = re.compile(r"(?:^|\.)(?:attn|attention)\.bias$")


def is_constant(name: str, n_dims: int = 0) -> bool:
    """Whether a tensor is no weight but a constant that follows from the configuration: rotary frequencies, the causal
    mask ([1, 1, n, n], under the name of a bias), what masked positions are filled with."""
    return bool(_CONSTANT.search(name) or (n_dims == 4 and _CAUSAL_MASK.search(name)))


def load_checkpoint(source, argument: str, dtype):
    """The causal language model in a folder or of a hub id, in `dtype` ("auto": as saved).

    transformers fills tensors that a checkpoint lacks with random numbers and drops those it does not know; here both
    are a ValueError naming `argument`, as is whatever cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{argument}: {str(source)!r} could not be loaded: {reason}") from error
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in found[f"{kind}_keys"] if not is_constant(str(name)))
        if names:
            raise ValueError(
                f"{argument}: {source}: {len(names)} {kind} tensors ({', '.join(names[:3])}), expected exactly "
                "the model's own"
            )
    return model
