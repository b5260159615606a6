"""A Hugging Face causal language model, prepared for packed passes.

The pass wants hidden states, so that logits exist only where a response token is predicted, and packed rows, so that
nothing is padded. Whether a model allows both is not read off its name but tried once, against its own logits
(`exact_pass`).
"""

import itertools
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from dentropy.doors import third_party
from dentropy.model import attention
from dentropy.model.adapter_layers import check_not_idle, is_dora, train_adapters, unusual_adapters
from dentropy.model.binding import Binding
from dentropy.model.checkpoint import load_checkpoint
from dentropy.model.compiled_layers.layers import FusedLayers
from dentropy.model.direction import Direction
from dentropy.model.exact_pass import check_on_rollouts, find_exact_pass
from dentropy.model.exact_tangent import check_tangents
from dentropy.model.fully_sharded import is_linear
from dentropy.model.head import Head
from dentropy.model.in_place import TURN, in_place_of_parameters, in_turn
from dentropy.model.memory import is_out_of_memory
from dentropy.model.packed_row import PackedRow
from dentropy.model.precision import full_float32
from dentropy.model.short_tangents import ShortTangents
from dentropy.model.spread import spread_of
from dentropy.model.usable import check_usable
from dentropy.shown import count, line
from dentropy.stats.tables import TokenStats
from dentropy.stats.token_stats import linear_token_stats, token_stats


class Policy:
    """Wraps `model`, a transformers causal language model (PEFT models too), without changing it.

    At construction a few short sequences are run both through the model's own forward and through the pass that
    dentropy will use (packed row, hidden states, head); where they differ the pass falls back, says so once, and stays
    exact: `packs` is False for models that are run one sequence at a time with their eager attention, `splits_head`
    is False where logits come from the model's own head. Of a PEFT model's adapters the active ones count, as in its
    forward; parameters of the others have no effect.

    A model under FSDP2 (`fully_shard`) or tensor parallel (transformers' `tp_plan`) is known by its parameters; every
    rank makes the Policy and runs every pass.

    Args:
        model: the causal language model, on its device, in its dtype.
        compile_layers: experimental: run decoder layers in a compiled form, primal and tangent in one graph (see
            `compiled_layers`). Made at the first pass of each kind, in tens of seconds; no gain has been recorded
            yet. A layer that cannot be compiled, or differs beyond rounding, goes on uncompiled, with a warning.

    Attributes:
        model: as given.
        dtype, device: of the weights.
        config: of its text model.
        vocab_size: token ids are below it.
        max_positions: longest sequence, None where the model sets no limit.
        packs: sequences run end to end in one row.
        splits_head: logits are made from hidden states and the head, where they are needed.
        is_sharded: parameters are spread over ranks.
        in_unison: ranks run the same rollouts at the same time, each its part of every product (tensor parallel).
        turn: held by the thread that is in a pass, whatever its policy; others wait.

    Raises:
        ValueError: naming the fix, for wrapped or quantized models, for ones that are sharded otherwise than FSDP2 does
            by default or transformers' `tp_plan` says, for weights that are not finite, for models whose logits depend
            on later tokens, and where no pass reproduces the model's logits.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> policy = Policy(AutoModelForCausalLM.from_config(config))
        >>> policy.packs, policy.splits_head, policy.vocab_size
        (True, True, 32)
    """

    packs: bool
    splits_head: bool
    turn = TURN

    def __init__(self, model: nn.Module, *, compile_layers: bool = False):
        check_usable(model)
        if compile_layers and is_dora(model):
            raise ValueError("compile_layers: True for a model with DoRA adapters, expected False")
        self._sharded = spread_of(model)
        if compile_layers and self.is_sharded:
            raise ValueError("compile_layers: True for sharded weights, expected False")
        self.model = model
        # PEFT injects its layers into the model it wraps; that model's forward is the adapted policy.
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._backbone = self._causal_lm.base_model
        self.config = self._causal_lm.config.get_text_config()
        self.max_positions = getattr(self.config, "max_position_embeddings", None)
        self.vocab_size = int(self._causal_lm.get_input_embeddings().weight.shape[0])
        self._compiled_layers = None
        self._binding = Binding(model)
        self._seen_rollouts = False
        try:
            row = find_exact_pass(self)
            if self.is_sharded and not self.packs:
                raise ValueError(
                    "policy: sharded weights, and packed rows do not reproduce the model's logits, so that ranks would "
                    "run forwards in different numbers and wait for each other; expected whole weights"
                )
            check_tangents(self, row)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise MemoryError(
                "policy: a few tokens do not fit into memory beside the weights, expected a smaller dtype or more "
                f"memory ({reason})"
            ) from error
        if compile_layers:
            self._compiled_layers = FusedLayers(self._decoder_layers())

    def __repr__(self) -> str:
        return line(
            self,
            type(self.model).__name__,
            count(sum(p.numel() for p in self.model.parameters()), "parameter"),
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
            "packed rows" if self.packs else "one sequence at a time",
            *(["sharded over ranks"] if self.is_sharded else []),
            "head split off" if self.splits_head else "the model's own head",
        )

    @property
    def is_sharded(self) -> bool:
        return self._sharded is not None

    @property
    def in_unison(self) -> bool:
        return self._sharded is not None and self._sharded.in_unison

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
        shard: bool = False,
    ) -> "Policy":
        """The policy in a model folder, or of a hub id.

        Args:
            name_or_dir: what `AutoModelForCausalLM.from_pretrained` takes. Of an adapter's folder, the adapter on its
                base model; then the adapter's parameters are those that ask for gradients.
            dtype: float32 unless you say otherwise, whatever the checkpoint holds: entropy differences of small
                updates vanish in bf16 weights.
            device: None is CUDA where there is one, else the CPU.
            compile_layers: as above.
            trust_remote_code: run code that comes with the checkpoint.
            shard: spread it over the ranks of the process group by FSDP2, each of which calls this and reads no more
                than its part, with transformers 5.24 or newer, on the device of the group.

        Raises:
            ValueError: for what cannot be loaded, and for checkpoints with tensors missing or left over.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_checkpoint(name_or_dir, "policy", dtype, trust_remote_code=trust_remote_code, shard=shard)
        if shard:
            if torch.device(device).type != model.device.type:
                raise ValueError(f"device: {device}, expected {model.device.type}, on which the ranks hold their parts")
            return cls(model, compile_layers=compile_layers)
        with third_party(f"policy: {str(name_or_dir)!r} cannot be moved", f"a model that {device} can hold"):
            model.to(device)
        train_adapters(model)
        return cls(model, compile_layers=compile_layers)

    @contextmanager
    def ready(self, attention_name: str = attention.NAME, *, compiled: bool = True):
        """For the time of a pass: eval mode (no dropout, no checkpointing), dentropy's attention, experts without
        grouped products (they have no forward mode), full float32 products, the compiled layers where there are some.
        Other threads wait. Everything is put back afterwards."""
        fused = self._compiled_layers if compiled and attention_name == attention.NAME else None
        with (
            TURN,
            self._ready(attention.register(attention_name) if self.packs else "eager"),
            self._running(),
            nullcontext() if fused is None else fused.in_place(),
        ):
            yield

    @in_turn
    def moving(self, direction: Direction) -> list[tuple[nn.Parameter, Tensor]]:
        """`direction.on(model)`, made once for all passes along a direction; of sharded parameters each v in parts as
        they are. ValueError where all that it moves is an adapter that is not in use."""
        if self._sharded is not None:
            self._sharded.rest()
        pairs = self._binding.pairs(direction)
        check_not_idle(self.model, [p for p, _ in pairs])
        return pairs

    @contextmanager
    def in_place(self, makes: Mapping[int, Callable[[Tensor], Tensor]]):
        """Inside, make(x) stands in the place of each parameter x, by the id() of it as it stands now; x is what a pass
        sees of it (`as_it_stands`). Those of FSDP2 are made each time that their module runs, others at once."""
        if self._sharded is not None:
            with self._sharded.instead(makes):
                yield
            return
        made = {id(p): makes[id(p)](p.detach()) for p in self.model.parameters() if id(p) in makes}
        with in_place_of_parameters(self.model, made):
            yield

    def as_it_stands(self, v: Tensor) -> Tensor:
        """v of a parameter in the form in which that stands in a pass: whole, or this rank's part."""
        return v if self._sharded is None else self._sharded.as_it_stands(v)

    @property
    def seen_rollouts(self) -> bool:
        """Whether `check_on` has passed."""
        return self._seen_rollouts

    @in_turn
    def check_on(self, sequences: Callable[[], list[np.ndarray]]) -> None:
        """The self-check on token ids that look like the user's: the first that come, once. Raises as at
        construction."""
        if self._seen_rollouts:
            return
        try:
            check_on_rollouts(self, sequences())
            self._seen_rollouts = True
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.is_sharded:  # other ranks wait where this one failed
                raise  # else the pass, which needs less, names what does not fit, and the next batch is looked at

    def score(self, row: PackedRow, temperature: float = 1.0, *, tangent: bool = False) -> TokenStats:
        """Statistics [N] of the tokens row.targets, at the sampling temperature, with gradients off.

        tangent: whether the weights carry tangents; then the statistics have first derivatives.
        """
        # A compiled layer carries tangents of its own, and would be compiled anew inside a mode.
        short = ShortTangents() if tangent and self._compiled_layers is None else nullcontext()
        try:
            with short:
                outputs, head = self.outputs(row)
        except NotImplementedError as error:
            raise ValueError(_without_forward_mode(self.model, str(error).splitlines()[0])) from error
        x, dx = forward_ad.unpack_dual(outputs)
        if head is None:
            return token_stats(x, row.targets, _tangent(x, dx, tangent), temperature=temperature)
        weight, dweight = forward_ad.unpack_dual(head.weight)
        bias, dbias = (None, None) if head.bias is None else forward_ad.unpack_dual(head.bias)
        if dweight is None and dbias is None:
            dx = _tangent(x, dx, tangent)
        settings = head.transform(temperature) | dict(bias=bias, dbias=dbias, process_group=head.group)
        return linear_token_stats(x, weight, row.targets, dx, dweight, **settings)

    def outputs(self, row: PackedRow) -> tuple[Tensor, Head | None]:
        """What logits at row.rows are made of: hidden states [N, D] and the head, or the model's own logits [N, V] and
        None."""
        if self.splits_head:
            return self.hidden(row)[row.rows], self.head()
        return self.logits(row)[row.rows], None

    def hidden(self, row: PackedRow) -> Tensor:
        """Last hidden states [total, D]."""
        return _run(self._backbone, row, self.packs)

    def logits(self, row: PackedRow) -> Tensor:
        """The logits [total, V] of the model's own head."""
        return _run(self._causal_lm, row, self.packs)

    def own_logits(self, row: PackedRow) -> Tensor:
        """The logits [total, V] of the model's own forward, one sequence at a time, in float32 or better."""
        # The reference form; older SDPA paths drop gemma2's softcap without a word.
        own = nullcontext() if self._sharded is None else self._sharded.running_its_own()
        with TURN, self._ready("eager"), own:
            logits = _run(self.model, row, packed=False)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def head(self) -> Head:
        """The head as it is now: inside a pass its weights may be moved, or dual tensors."""
        module = self._output_layer()
        if not is_linear(module):
            raise ValueError(
                f"policy: its head became a {type(module).__name__}, expected the plain matrix that was checked; make "
                "the Policy again"
            )
        if self._sharded is None:
            return Head.of(module.weight, module.bias, self.config)
        weight, bias, group = self._sharded.head(module)
        return Head.of(weight, bias, self.config, group)

    @property
    def has_plain_head(self) -> bool:
        """Whether logits are a matrix product of what a backbone gives."""
        return self._backbone is not self._causal_lm and is_linear(self._output_layer())

    def _decoder_layers(self) -> list[nn.Module]:
        n_layers = self.config.num_hidden_layers
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

    def _running(self):
        """Around forwards of a pass, where weights are sharded."""
        return nullcontext() if self._sharded is None else self._sharded.running()

    @contextmanager
    def _ready(self, attn_implementation: str):
        model = self._causal_lm
        training = {module: module.training for module in self.model.modules()}
        attn, experts = (_by_config(model.config, f"_{kind}_implementation") for kind in ("attn", "experts"))
        set_attn, set_experts = set(attn.values()) != {attn_implementation}, bool(set(experts.values()) - {"eager"})
        enabled = torch.is_grad_enabled()
        try:
            self.model.eval()
            if set_attn:
                model.set_attn_implementation(attn_implementation)
            if set_experts:
                model.set_experts_implementation("eager")
            # Inside autocast products would be half precision; inside inference_mode tangents would be dropped.
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(enabled),  # which leaving inference mode would turn on
                torch.autocast(self.device.type, enabled=False),
                full_float32(),
                _NothingDetached() if is_dora(model) else nullcontext(),
            ):
                yield
        finally:
            if set_attn:
                model.set_attn_implementation(attn)
            if set_experts:
                model.set_experts_implementation(experts)
            for module, mode in training.items():
                module.training = mode


def _run(module: nn.Module, row: PackedRow, packed: bool) -> Tensor:
    """The first output of `module`, [total, ...], for one packed row or sequence by sequence."""
    if not packed:
        sequences = itertools.pairwise(row.bounds)
        return torch.cat([module(input_ids=row.tokens[None, a:b], use_cache=False)[0][0] for a, b in sequences])
    return module(
        input_ids=row.tokens[None],
        position_ids=row.positions[None],
        cu_seq_lens_q=row.cu_seqlens,
        cu_seq_lens_k=row.cu_seqlens,
        max_length_q=row.longest,
        max_length_k=row.longest,
        use_cache=False,
    )[0][0]


def _tangent(x: Tensor, dx: Tensor | None, wanted: bool) -> Tensor | None:
    """Where nothing that moves reaches these tokens (an expert nobody visits) the derivative is 0, not missing."""
    return torch.zeros_like(x) if wanted and dx is None else dx


def _without_forward_mode(model: nn.Module, reason: str) -> str:
    """What to say where an operation has no rule for tangents."""
    whose = unusual_adapters(model) or type(model).__name__
    if "autograd.Function" in reason:
        return (
            f"policy: {whose}: a custom autograd function without a jvp ({reason}), expected modules of plain PyTorch, "
            "without fused kernels of their own"
        )
    return (
        f"policy: {whose} has an operation without forward mode ({reason}), expected attn_implementation='eager' and "
        "experts_implementation='eager' when it is loaded, and no fused kernels of its own"
    )


class _NothingDetached(TorchFunctionMode):
    """DoRA detaches its norm, which training may do and a derivative may not: the norm moves with the weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def _by_config(config, attribute: str) -> dict[str, str]:
    """The attribute of a model's config, under "", and of the configs of its parts (vision, text), by name: the form
    in which transformers takes it back. Left out where it is not set."""
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: getattr(part, attribute, None) for name, part in parts.items()}
    return {name: value for name, value in found.items() if value is not None}
