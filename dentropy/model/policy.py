"""A Hugging Face causal language model, prepared for packed passes.

The pass wants hidden states, so that logits exist only where a response token is predicted, and packed rows, so that
nothing is padded. Whether a model allows both is not read off its name but tried once, against its own logits.
"""

import warnings
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dentropy.doors import third_party
from dentropy.model import attention
from dentropy.model.checkpoint import load_checkpoint
from dentropy.model.compiled_layers.layers import FusedLayers
from dentropy.model.precision import full_float32


class Head(NamedTuple):
    """logits = softcap(scale · (hidden Wᵀ + bias)); softcap(z) = c·tanh(z/c)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


class Policy:
    """Wraps `model`, a transformers causal language model (PEFT models too), without changing it.

    At construction a few short sequences are run both through the model's own forward and through the pass that
    dentropy will use (packed row, hidden states, head); where they differ the pass falls back, says so once, and stays
    exact: `packs` is False for models that are run one sequence at a time with their eager attention, `splits_head`
    is False where logits come from the model's own head. Of a PEFT model's adapters the active ones count, as in its
    forward; parameters of the others have no effect.

    compile_layers: experimental: run decoder layers in a compiled form, primal and tangent in one graph (see
    `compiled_layers`). Made at the first pass of each kind, in tens of seconds; no gain has been recorded yet. A layer
    that cannot be compiled, or differs beyond rounding, goes on uncompiled, with a warning.

    Attributes: model; dtype, device (of the weights); vocab_size (token ids are below it); max_positions
    (longest sequence, None where the model sets no limit); packs; splits_head.

    Raises ValueError, naming the fix, for wrapped, sharded or quantized models, for weights that are not finite, for
    models whose logits depend on later tokens, and where no pass reproduces the model's logits.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> policy = Policy(AutoModelForCausalLM.from_config(config))
    >>> policy.packs, policy.splits_head, policy.vocab_size
    (True, True, 32)
    """

    def __init__(self, model: nn.Module, *, compile_layers: bool = False):
        _check_usable(model)
        if compile_layers and _is_dora(model):
            raise ValueError("compile_layers: True for a model with DoRA adapters, expected False")
        self.model = model
        # PEFT injects its layers into the model it wraps; that model's forward is the adapted policy.
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._backbone = self._causal_lm.base_model
        self._config = self._causal_lm.config.get_text_config()
        self.max_positions = getattr(self._config, "max_position_embeddings", None)
        self.vocab_size = int(self._causal_lm.get_input_embeddings().weight.shape[0])
        self._compiled_layers = None
        self.packs, self.splits_head = self._find_exact_pass()
        if compile_layers:
            self._compiled_layers = FusedLayers(self._decoder_layers())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir,
        dtype=torch.float32,
        device=None,
        *,
        compile_layers: bool = False,
        trust_remote_code: bool = False,
    ) -> "Policy":
        """Loads a model folder or hub id. dtype: float32 unless you say otherwise, whatever the checkpoint holds:
        entropy differences of small updates vanish in bf16 weights. device: CUDA where there is one, else the CPU.
        trust_remote_code: run code that comes with the checkpoint.
        ValueError for what cannot be loaded, and for checkpoints with tensors missing or left over.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_checkpoint(name_or_dir, "policy", dtype, trust_remote_code=trust_remote_code)
        with third_party(f"policy: {str(name_or_dir)!r} cannot be moved", f"a model that {device} can hold"):
            model.to(device)
        return cls(model, compile_layers=compile_layers)

    @contextmanager
    def ready(self, attention_name: str = attention.NAME):
        """For the time of a pass: eval mode (no dropout, no checkpointing), dentropy's attention, experts without
        grouped products (they have no forward mode), full float32 products. Everything is put back afterwards."""
        fused = self._compiled_layers if attention_name == attention.NAME else None
        with (
            self._ready(attention.register(attention_name) if self.packs else "eager"),
            nullcontext() if fused is None else fused.in_place(),
        ):
            yield

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Last hidden states [total, D] of packed `tokens` [total], sequences bounded by `cu_seqlens` [S + 1]."""
        return self._run(self._backbone, tokens, cu_seqlens, self.packs)[0]

    def logits(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The model's own logits [total, V]."""
        return self._run(self._causal_lm, tokens, cu_seqlens, self.packs)[0]

    def head(self) -> Head:
        """The head as it is now: inside a pass its weights may be moved, or dual tensors."""
        module = self._output_layer()
        if type(module) is not nn.Linear:
            raise ValueError(
                f"policy: its head became a {type(module).__name__}; make the Policy again, it was "
                "checked with a plain matrix"
            )
        scale = getattr(self._config, "logit_scale", None) or 1.0  # cohere
        scale *= getattr(self._config, "lm_head_multiplier", None) or 1.0  # falcon_h1
        scale /= getattr(self._config, "logits_scaling", None) or 1.0  # granite
        softcap = getattr(self._config, "final_logit_softcapping", None)  # gemma
        return Head(module.weight, module.bias, scale, softcap)

    def _decoder_layers(self) -> list[nn.Module]:
        n_layers = self._config.num_hidden_layers
        for module in self._backbone.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                return list(module)
        raise ValueError(
            f"compile_layers: True for {type(self.model).__name__}, which has no list of its {n_layers} "
            "layers, expected False"
        )

    def _output_layer(self) -> nn.Module:
        """The layer that makes the logits; where PEFT trains copies of it (modules_to_save), the active one."""
        layer = self._causal_lm.get_output_embeddings()
        copies = getattr(layer, "modules_to_save", None)
        if copies is None:
            return layer
        active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in copies]
        return copies[active[0]] if active else layer.original_module

    @contextmanager
    def _ready(self, attn_implementation: str):
        model = self._causal_lm
        training = {module: module.training for module in model.modules()}
        attn, experts = (_by_config(model.config, f"_{kind}_implementation") for kind in ("attn", "experts"))
        set_attn, set_experts = set(attn.values()) != {attn_implementation}, bool(set(experts.values()) - {"eager"})
        try:
            model.eval()
            if set_attn:
                model.set_attn_implementation(attn_implementation)
            if set_experts:
                model.set_experts_implementation("eager")
            # Inside autocast products would be half precision; inside inference_mode tangents would be dropped.
            with (
                torch.inference_mode(False),
                torch.autocast(self.device.type, enabled=False),
                full_float32(),
                _NothingDetached() if _is_dora(model) else nullcontext(),
            ):
                yield
        finally:
            if set_attn:
                model.set_attn_implementation(attn)
            if set_experts:
                model.set_experts_implementation(experts)
            for module, mode in training.items():
                module.training = mode

    @staticmethod
    def _run(module: nn.Module, tokens: Tensor, cu_seqlens: Tensor, packed: bool) -> Tensor:
        """The first output of `module`, [1, total, ...], for one packed row or sequence by sequence."""
        bounds = cu_seqlens.tolist()
        if not packed:
            rows = [
                module(input_ids=tokens[None, a:b], use_cache=False)[0]
                for a, b in zip(bounds[:-1], bounds[1:], strict=True)
            ]
            return torch.cat(rows, dim=1)
        lengths = cu_seqlens.diff()
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
        longest = int(lengths.max())
        positions = torch.arange(len(tokens), device=tokens.device) - starts
        return module(
            input_ids=tokens[None],
            position_ids=positions[None],
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
            use_cache=False,
        )[0]

    @torch.no_grad()
    def _find_exact_pass(self) -> tuple[bool, bool]:
        """(packs, splits_head): the first combination that reproduces the model's own logits."""
        lengths = torch.tensor([5, 1, 7])
        tokens = (torch.arange(int(lengths.sum())) * 7 + 3) % self.vocab_size
        tokens = tokens.to(self.device)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(self.device, torch.int32)
        failed = third_party("policy: its forward fails on short inputs", "a causal language model")
        with self._ready("eager"), failed:  # the reference form; older SDPA paths drop gemma2's softcap without a word
            own = self._run(self.model, tokens, cu_seqlens, packed=False)[0].float()
        if not torch.isfinite(own).all():
            raise ValueError(f"policy: {_not_finite(self.model)}, expected finite weights and logits")
        self._check_causal(own, tokens)
        self.vocab_size = min(self.vocab_size, own.shape[-1])
        tried = []
        for packs in (True, False):
            for splits_head in (True, False):
                difference = self._difference(own, tokens, cu_seqlens, packs, splits_head)
                if isinstance(difference, float) and difference <= _tolerance(self.dtype):
                    if not splits_head and torch.finfo(self.dtype).bits < 32:
                        raise ValueError(
                            f"policy: this model's logits come from its own head and would be rounded to "
                            f"{self.dtype}; load it with dtype=torch.float32"
                        )
                    _say_fallback(packs, splits_head, tried)
                    return packs, splits_head
                tried.append(difference if isinstance(difference, str) else f"relative difference {difference:.1e}")
        raise ValueError(
            f"policy: no pass reproduces the model's own logits ({'; '.join(tried)}); expected a causal "
            "model of transformers whose logits depend on input_ids alone"
        )

    def _check_causal(self, own: Tensor, tokens: Tensor) -> None:
        """ValueError where the logits of a position change with the tokens after it: other tokens stand there, not
        fewer, so that a causal model computes the same products. (Doge's experts are routed so.) In half precision a
        warning, since there the order of a sum can change which experts a token visits."""
        last, kept = tokens[-7:], 4
        changed = torch.cat([last[:kept], (last[kept:] + 1) % self.vocab_size])
        with self._ready("eager"):
            logits = self._run(self.model, changed, torch.tensor([0, len(last)]), packed=False)[0].float()
        difference = _relative(logits[:kept], own[-7:][:kept])
        if difference <= _tolerance(self.dtype):
            return
        said = (
            f"policy: {self._config.model_type}: logits of a position change with the tokens after it (relative "
            f"difference {difference:.1e}), so that sampling and scoring see different policies"
        )
        if torch.finfo(self.dtype).bits >= 32:
            raise ValueError(f"{said}; expected a causal model")
        warnings.warn(f"{said}, unless {self.dtype} is to blame; dtype=torch.float32 would tell", stacklevel=5)

    def _difference(
        self, own: Tensor, tokens: Tensor, cu_seqlens: Tensor, packs: bool, splits_head: bool
    ) -> float | str:
        """The largest difference of the logits to the model's `own`, over their largest; or why there are none."""
        if packs and _scales_rope_by_longest(self._config):
            return "its rotary embedding depends on the longest sequence of a packed row"
        if splits_head and (self._backbone is self._causal_lm or type(self._output_layer()) is not nn.Linear):
            return "its head is not a plain matrix behind a backbone"  # the tangent is more than that of one weight
        try:
            with self._ready(attention.register() if packs else "eager"):
                out = self._run(self._backbone if splits_head else self._causal_lm, tokens, cu_seqlens, packs)[0]
                logits = _project(out, self.head()) if splits_head else out
        except (attention.UnseenMask, ValueError, TypeError) as error:
            if not packs:
                raise
            return f"packed rows are refused: {' '.join(str(error).split())[:120]}"
        return _relative(logits, own)


class _NothingDetached(TorchFunctionMode):
    """DoRA detaches its norm, which training may do and a derivative may not: the norm moves with the weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def _is_dora(model: nn.Module) -> bool:
    return any(len(getattr(module, "lora_magnitude_vector", ())) for module in model.modules())


def _by_config(config, attribute: str) -> dict[str, str]:
    """The attribute of a model's config, under "", and of the configs of its parts (vision, text), by name: the form
    in which transformers takes it back. Left out where it is not set."""
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: getattr(part, attribute, None) for name, part in parts.items()}
    return {name: value for name, value in found.items() if value is not None}


def _relative(logits: Tensor, own: Tensor) -> float:
    """The largest difference, over the largest logit."""
    return float((logits - own).abs().max() / own.abs().max().clamp(min=torch.finfo(own.dtype).tiny))


def _scales_rope_by_longest(config) -> bool:
    """longrope takes its short or long factors by the largest position in the row, whichever sequence has it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic") for kind in kinds)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _project(hidden: Tensor, head: Head) -> Tensor:
    logits = at_least_float32(hidden) @ at_least_float32(head.weight).T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits, over their largest value, that rounding explains: a few hundred float32 units
    (models work in float32 inside, float64 ones too), a few units of the half precisions, whose roundings add up."""
    return 2e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def _say_fallback(packs: bool, splits_head: bool, differences: list[str]) -> None:
    if packs and splits_head:
        return
    said = []
    if not packs:
        said.append("packed rows do not reproduce this model's logits: sequences run one at a time, eager attention")
    if not splits_head:
        said.append("its head is not a plain matrix: logits come from the model's own head, all positions at once")
    warnings.warn(f"policy: {'; '.join(said)} (tried before: {'; '.join(differences)})", stacklevel=5)


def _check_usable(model: nn.Module) -> None:
    """ValueError for models that forward mode cannot go through, with what to do instead."""
    kind = type(model).__name__
    for wrapper in ("module", "_orig_mod"):
        if isinstance(getattr(model, wrapper, None), nn.Module) and not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"model: wrapped in {kind}, expected the model itself: pass model.{wrapper}")
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
        raise ValueError(f"model: {kind}, expected a causal language model of transformers (AutoModelForCausalLM)")
    if getattr(model, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError("model: quantized weights have no tangent; load it without quantization_config")
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError("model: weights made under torch.inference_mode lose their tangents; load it outside")
    if any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        raise ValueError(
            "model: sharded weights (DTensor), expected whole ones: gather them first "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )


def _not_finite(model: nn.Module) -> str:
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if not bad:
        return "logits of a short input are not finite"
    return f"weights that are not finite in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
