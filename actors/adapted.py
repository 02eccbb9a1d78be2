"""The forward that trains: a Llama-family decoder with LoRA matrices inside, in as few passes as it takes.

The arithmetic is that of the Hugging Face modules under PEFT; the backward of each piece is written out,
because automatic differentiation of the same expressions spends about as long on copies, sums and
intermediate results as on matrix products. Projections that read the same input are one product, and their
weights become views of it, so memory is not doubled. Where something would differ (another family, adapters
of another kind) `AdaptedDecoder.of` answers none, and the model trains through its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from actors.packed import Packed

FAMILY = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)


@dataclass
class Lora:
    """One module's adapter, on the outputs [start, stop) of a projection."""

    down: nn.Parameter
    up: nn.Parameter
    scaling: float
    dropout: nn.Module
    start: int
    stop: int


@dataclass
class Projection:
    """Frozen `weight` (outputs, inputs) of modules that read the same input, with their adapters."""

    weight: Tensor
    bias: Tensor | None
    loras: list[Lora]

    @classmethod
    def fuse(cls, layer: nn.Module, names: tuple[str, ...]) -> Projection:
        modules = [layer.get_submodule(name) for name in names]
        linear = [cast(nn.Linear, m.base_layer if isinstance(m, LoraLinear) else m) for m in modules]
        weight = linear[0].weight.detach()
        if len(linear) > 1:
            weight = torch.cat([part.weight.detach() for part in linear])
            for part, own in zip(linear, weight.split([part.out_features for part in linear]), strict=True):
                part.weight.data = own
        biases = [part.bias.detach() for part in linear if part.bias is not None]
        loras, start = [], 0
        for module, part in zip(modules, linear, strict=True):
            stop = start + part.out_features
            if isinstance(module, LoraLinear):
                down, up = (module.get_parameter(f"lora_{side}.default.weight") for side in "AB")
                dropout = module.get_submodule("lora_dropout.default")
                loras.append(Lora(down, up, module.scaling["default"], dropout, start, stop))
            start = stop
        return cls(weight, torch.cat(biases) if biases else None, loras)

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """Rows (T, inputs) projected, plus `residual` (T, outputs)."""
        if any(isinstance(lora.dropout, nn.Dropout) and lora.dropout.training for lora in self.loras):
            return self._with_dropout(rows, residual)
        places = tuple((lora.start, lora.stop, lora.scaling) for lora in self.loras)
        downs = [lora.down.to(rows.dtype) for lora in self.loras]
        ups = [lora.up.to(rows.dtype) for lora in self.loras]
        return cast(Tensor, _Project.apply(rows, residual, self.weight, self.bias, places, *downs, *ups))

    def _with_dropout(self, rows: Tensor, residual: Tensor | None) -> Tensor:
        """Each adapter drops inputs of its own, so nothing can be shared between them."""
        projected = F.linear(rows, self.weight, self.bias)
        added = []
        for lora in self.loras:
            low = F.linear(lora.dropout(rows), lora.down.to(rows.dtype)) * lora.scaling
            added.append(F.pad(F.linear(low, lora.up.to(rows.dtype)), (lora.start, len(self.weight) - lora.stop)))
        return sum(added, projected if residual is None else projected + residual)


class _Project(torch.autograd.Function):
    """residual + rows W' + bias, and for every adapter scaling (rows A') B' on its columns."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        places: tuple[tuple[int, int, float], ...],
        *adapters: Tensor,
    ) -> Tensor:
        start = residual if residual is not None else bias
        projected = rows @ weight.t() if start is None else torch.addmm(start, rows, weight.t())
        if residual is not None and bias is not None:
            projected += bias
        downs, ups = adapters[: len(places)], adapters[len(places) :]
        low = rows.new_empty(0)
        if places:
            low = rows @ torch.cat(downs).t()
            parts = low.split([len(down) for down in downs], dim=1)
            for (first, last, scaling), part, up in zip(places, parts, ups, strict=True):
                projected[:, first:last].addmm_(part, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, low, *adapters)
        ctx.weight, ctx.places, ctx.added = weight, places, residual is not None  # type: ignore[attr-defined]
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, *adapters = ctx.saved_tensors  # type: ignore[attr-defined]
        places = ctx.places  # type: ignore[attr-defined]
        gradient = gradient.contiguous()
        downs, ups = adapters[: len(places)], adapters[len(places) :]
        found: list[Tensor] = []
        of_rows = gradient @ ctx.weight  # type: ignore[attr-defined]
        if places:
            sizes = [len(down) for down in downs]
            of_low = torch.empty_like(low)
            of_ups = []
            for (first, last, scaling), up, part, of_part in zip(
                places, ups, low.split(sizes, dim=1), of_low.split(sizes, dim=1), strict=True
            ):
                own = gradient[:, first:last]
                of_part.addmm_(own, up, beta=0, alpha=scaling)
                of_ups.append((own.t() @ part).mul_(scaling))
            of_rows.addmm_(of_low, torch.cat(downs))
            found = [*(of_low.t() @ rows).split(sizes), *of_ups]
        residual = gradient if ctx.added else None  # type: ignore[attr-defined]
        return of_rows, residual, None, None, None, *found


class _Normalise(torch.autograd.Function):
    """x / rms(x) * weight, with a frozen weight; computed in float32. For a CPU, which has no such kernel."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = rows.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norms.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(rows, scale)
        ctx.weight = weight  # type: ignore[attr-defined]
        return (wide * scale).to(rows.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        found = (gradient * ctx.weight).float()  # type: ignore[attr-defined]
        wide = rows.float()
        along = torch.linalg.vecdot(found, wide).unsqueeze(-1)
        along = along.mul_(scale.pow(3)).div_(-rows.shape[-1])
        return found.mul_(scale).addcmul_(wide, along).to(rows.dtype), None, None


class _Rotate(torch.autograd.Function):
    """Rotary positions on states (T, heads, width); the backward turns the other way."""

    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turned(gradient, cos, -sin), None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin (T, 1, width / 2)."""
    turned = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    (left, right), (new_left, new_right) = states.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin)
    return turned


class _Gate(torch.autograd.Function):
    """silu(gate) * up, for gate and up side by side."""

    @staticmethod
    def forward(ctx: FunctionCtx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors  # type: ignore[attr-defined]
        gate, up = both.chunk(2, -1)
        found = torch.empty_like(both)
        of_gate, of_up = found.chunk(2, -1)
        torch.mul(F.silu(gate), gradient, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found


@dataclass
class Layer:
    input_norm: Tensor
    attention_inputs: Projection
    head_norms: tuple[Tensor, Tensor] | None
    attention_output: Projection
    mlp_norm: Tensor
    mlp_inputs: Projection
    mlp_output: Projection


class AdaptedDecoder:
    """The decoder of `llm`, embeddings to last hidden states, over a pack."""

    def __init__(self, llm: PreTrainedModel) -> None:
        decoder, config = llm.get_decoder(), llm.config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon: float = config.rms_norm_eps
        self.rotary = decoder.rotary_emb
        self.norm: Tensor = decoder.norm.weight.detach()
        self.layers = [self._fuse(layer) for layer in decoder.layers]

    @classmethod
    def of(cls, llm: PreTrainedModel) -> AdaptedDecoder | None:
        """None where this forward would not be the model's own."""
        decoder = llm.get_decoder()
        if type(decoder).__name__ not in FAMILY or llm.config.hidden_act not in ("silu", "swish"):
            return None
        if getattr(llm.config, "sliding_window", None) and getattr(llm.config, "use_sliding_window", True):
            return None
        names = (*ATTENTION_INPUTS, *ATTENTION_OUTPUT, *MLP_INPUTS, *MLP_OUTPUT)
        parts = [layer.get_submodule(name) for layer in decoder.layers for name in names]
        frozen = not any(p.requires_grad for name, p in decoder.named_parameters() if ".lora_" not in name)
        return cls(llm) if frozen and all(_is_plain(part) for part in parts) else None

    def __call__(self, embeddings: Tensor, packed: Packed, wanted: Tensor, recompute: bool = False) -> Tensor:
        """Embeddings (T, H) to normalised hidden states (K, H) of the positions `wanted` (K,).

        `recompute` keeps only the states between layers for the backward, at the price of a second forward.
        """
        cos, sin = (a[0, :, None, : self.width // 2] for a in self.rotary(embeddings[None], packed.positions[None]))
        hidden = embeddings
        for layer in self.layers:
            rows = wanted if layer is self.layers[-1] else None
            if recompute:
                hidden = checkpoint(self._layer, layer, hidden, cos, sin, packed, rows, use_reentrant=False)
            else:
                hidden = self._layer(layer, hidden, cos, sin, packed, rows)
        return self._normalise(hidden, self.norm)

    def _layer(
        self, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, packed: Packed, rows: Tensor | None
    ) -> Tensor:
        """One layer; with `rows`, only these come out, as nothing else of the last layer is read."""
        rotated = self.heads + self.kv_heads
        mixed = layer.attention_inputs(self._normalise(hidden, layer.input_norm))
        mixed = mixed.view(len(hidden), rotated + self.kv_heads, self.width)
        turning, value = mixed.split([rotated, self.kv_heads], dim=1)
        if layer.head_norms is not None:
            heads = turning.split([self.heads, self.kv_heads], dim=1)
            turning = torch.cat(
                [
                    F.rms_norm(part, (self.width,), norm, self.epsilon)
                    for part, norm in zip(heads, layer.head_norms, strict=True)
                ],
                dim=1,
            )
        query, key = cast(Tensor, _Rotate.apply(turning, cos, sin)).split([self.heads, self.kv_heads], dim=1)
        attended = packed.attend(query, key, value, self.width**-0.5).reshape(len(hidden), -1)
        if rows is not None:
            attended, hidden = attended[rows], hidden[rows]
        hidden = layer.attention_output(attended, hidden)
        both = layer.mlp_inputs(self._normalise(hidden, layer.mlp_norm))
        return layer.mlp_output(cast(Tensor, _Gate.apply(both)), hidden)

    def _normalise(self, rows: Tensor, weight: Tensor) -> Tensor:
        if not rows.is_cuda:
            return cast(Tensor, _Normalise.apply(rows, weight, self.epsilon))
        return F.rms_norm(rows, weight.shape, weight, self.epsilon)

    def _fuse(self, layer: nn.Module) -> Layer:
        norms = None
        if hasattr(layer.self_attn, "q_norm"):
            query, key = (layer.get_parameter(f"self_attn.{name}.weight").detach() for name in ("q_norm", "k_norm"))
            norms = (query, key)
        return Layer(
            input_norm=layer.get_parameter("input_layernorm.weight").detach(),
            attention_inputs=Projection.fuse(layer, ATTENTION_INPUTS),
            head_norms=norms,
            attention_output=Projection.fuse(layer, ATTENTION_OUTPUT),
            mlp_norm=layer.get_parameter("post_attention_layernorm.weight").detach(),
            mlp_inputs=Projection.fuse(layer, MLP_INPUTS),
            mlp_output=Projection.fuse(layer, MLP_OUTPUT),
        )


def _is_plain(module: nn.Module) -> bool:
    """A linear layer, or one with a single LoRA adapter as `adapter.attach` makes it."""
    if isinstance(module, LoraLinear) and list(module.lora_A) == ["default"] and not module.lora_variant:
        return type(module.base_layer) is nn.Linear
    return type(module) is nn.Linear
