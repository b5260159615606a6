"""Loading a checkpoint so that nothing in it is missing, left over or filled in."""


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
        names = sorted(str(name) for name in found[f"{kind}_keys"])
        if names:
            raise ValueError(
                f"{argument}: {source}: {len(names)} {kind} tensors ({', '.join(names[:3])}), expected exactly "
                "the model's own"
            )
    return model
