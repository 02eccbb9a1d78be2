"""A lean forward of Llama-family decoders for the batched engine: the same function in fewer operations.

The projections that read the same input are one matrix, laid out and multiplied as a CPU is fastest
with few rows (`laid_out`, `product`); norms are fused, rotary angles computed once, nothing is passed on
by keyword. Only the last layer's wanted rows are finished. The weights of the Hugging Face modules become
views of the fused ones, so memory is not doubled. It is used where it computes exactly the same
(`LeanDecoder.of`); any other model runs through its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.attention import Ragged

FAMILY = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)
ALIASING_BYTES = 2048  # rows a multiple of this apart fall into the same few sets of a CPU's first cache
APART = 16  # numbers between two such rows
FEW_ROWS = 64  # up to which rearranging a bfloat16 weight takes longer than what its product's other layout costs later
WHOLE = 16  # rows of which bfloat16 products on a CPU have a multiple


def laid_out(weight: Tensor) -> Tensor:
    """`weight` (inputs, outputs), equal in value, in the memory order that suits products of few rows with it.

    Its longer side is contiguous. On a CPU rows that would meet in the same sets of the cache are kept apart:
    with SmolLM2's 3,072 outputs that makes a product of 6 rows 1.4 times as fast, one of 192 rows 1.1 times.
    In bfloat16 on a CPU the inputs of each output are contiguous, as `product` wants them.
    """
    inputs, outputs = weight.shape
    if _halved_on_cpu(weight):
        return weight.t().contiguous().t()
    if outputs < inputs:
        return laid_out(weight.t()).t()
    apart = APART if weight.device.type == "cpu" and outputs * weight.itemsize % ALIASING_BYTES == 0 else 0
    stored = weight.new_empty(inputs, outputs + apart)[:, :outputs]
    return stored.copy_(weight)


def product(rows: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """Rows (T, inputs) times `weight` (inputs, outputs), plus `added` (outputs,) or (T, outputs).

    In bfloat16 on a CPU the library rearranges the right factor in every call, which takes longer than a product
    with few rows. There the weight becomes the left one, and the result is column-major.
    """
    if not _halved_on_cpu(weight) or len(rows) > FEW_ROWS:
        return rows @ weight if added is None else torch.addmm(added, rows, weight)
    columns = rows.t()
    if added is None:
        return (weight.t() @ columns).t()
    return torch.addmm(added.t() if added.dim() == 2 else added[:, None], weight.t(), columns).t()


def _halved_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


@dataclass
class Projection:
    """`weight` (inputs, outputs) and perhaps `bias` (outputs,)."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def fuse(cls, layer: nn.Module, names: tuple[str, ...]) -> Projection:
        """The named linears of a decoder layer side by side; their weights become views of the result."""
        linears = [part for name in names if isinstance(part := layer.get_submodule(name), nn.Linear)]
        fused = laid_out(torch.cat([linear.weight.detach().t() for linear in linears], dim=1))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        first = 0
        for linear in linears:
            linear.weight.data = fused[:, first : first + linear.out_features].t()
            first += linear.out_features
        return cls(fused, torch.cat(biases) if biases else None)

    def __call__(self, rows: Tensor) -> Tensor:
        return product(rows, self.weight, self.bias)

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        added = product(rows, self.weight, residual)
        return added if self.bias is None else added + self.bias


@dataclass
class Layer:
    """One decoder layer. `head_norm` (query and key heads, width) where heads are normalised (Qwen3)."""

    input_norm: Tensor
    attention_inputs: Projection
    head_norm: Tensor | None
    attention_output: Projection
    mlp_norm: Tensor
    mlp_inputs: Projection
    mlp_output: Projection


class LeanDecoder:
    """The decoder of `llm` (embeddings to last hidden states), over a ragged batch on KV memory."""

    def __init__(self, llm: PreTrainedModel) -> None:
        decoder, config = llm.get_decoder(), llm.config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon: float = config.rms_norm_eps
        self.rotary = decoder.rotary_emb
        self.norm: Tensor = decoder.norm.weight.detach()
        self.in_wholes = _halved_on_cpu(self.norm)
        self.head = llm.get_output_embeddings()
        self._lay_out_head()
        self.layers = [self._fuse(layer) for layer in decoder.layers]

    @classmethod
    def of(cls, llm: PreTrainedModel) -> LeanDecoder | None:
        """None where the lean forward would not be exact: another family, activation, or adapters inside."""
        decoder = llm.get_decoder()
        if type(decoder).__name__ not in FAMILY or llm.config.hidden_act not in ("silu", "swish"):
            return None
        names = (*ATTENTION_INPUTS, *ATTENTION_OUTPUT, *MLP_INPUTS, *MLP_OUTPUT)
        parts = [layer.get_submodule(name) for layer in decoder.layers for name in names]
        plain = all(type(part) is nn.Linear and not part.weight.requires_grad for part in parts)
        one_place = len({(p.device, p.dtype) for p in decoder.parameters()}) == 1
        return cls(llm) if plain and one_place else None

    def __call__(self, embeddings: Tensor, positions: Tensor, ragged: Ragged, wanted: Tensor) -> Tensor:
        """Embeddings (T, H) at `positions` (T,) to normalised hidden states (R, H) of the rows `wanted` (R,)."""
        cos, sin = (angles[0].unsqueeze(1) for angles in self.rotary(embeddings[None], positions[None]))
        half = self.width // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        marks = len(wanted)
        hidden, wanted = self._whole(embeddings), self._whole(wanted)
        for index, layer in enumerate(self.layers):
            attended = self._attend(index, layer, hidden, cos, sin, ragged)
            if index == len(self.layers) - 1:
                attended, hidden = attended[wanted], hidden[wanted]
            hidden = layer.attention_output.added_to(hidden, attended)
            gate, up = layer.mlp_inputs(self._normalise(hidden, layer.mlp_norm)).chunk(2, -1)
            hidden = layer.mlp_output.added_to(hidden, F.silu(gate).mul_(up))
        return self._normalise(hidden, self.norm)[:marks]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (R, H), as a call returns them, to logits (R, V)."""
        if type(self.head) is not nn.Linear:
            logits: Tensor = self.head(hidden)
            return logits
        return product(self._whole(hidden), self.head.weight.t(), self.head.bias)[: len(hidden)].contiguous()

    def _attend(self, index: int, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, ragged: Ragged) -> Tensor:
        """Attention over all sessions (T, heads x width), before its output projection."""
        rotated = self.heads + self.kv_heads
        mixed = layer.attention_inputs(self._normalise(hidden, layer.input_norm))[: len(cos)]
        mixed = mixed.view(len(cos), rotated + self.kv_heads, self.width)
        value, mixed = mixed[:, rotated:], mixed[:, :rotated]
        if layer.head_norm is not None:
            mixed = F.rms_norm(mixed, (self.width,), None, self.epsilon) * layer.head_norm
        mixed = torch.addcmul(mixed * cos, mixed.roll(self.width // 2, -1), sin)
        query, key = mixed[:, : self.heads], mixed[:, self.heads :]
        return self._whole(ragged.attend(index, query, key, value, self.width**-0.5).reshape(len(cos), -1))

    def _whole(self, rows: Tensor) -> Tensor:
        """`rows` (T, ...), in bfloat16 on a CPU with zeros up to a multiple of WHOLE.

        The library compiles kernels for every number of rows, about a megabyte each, and keeps a thousand of them.
        A single row would run through another kernel, which is no faster than 16 rows are in this one.
        """
        missing = -len(rows) % WHOLE if self.in_wholes else 0
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def _normalise(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(rows, weight.shape, weight, self.epsilon)

    def _lay_out_head(self) -> None:
        """Its one row of a token is multiplied twice as fast; a tied embedding looks its rows up in the same."""
        if type(self.head) is nn.Linear and self.head.weight.device.type == "cpu":
            self.head.weight.data = laid_out(self.head.weight.detach().t()).t()

    def _fuse(self, layer: nn.Module) -> Layer:
        head_norm = None
        if hasattr(layer.self_attn, "q_norm"):
            query, key = (layer.get_parameter(f"self_attn.{name}.weight").detach() for name in ("q_norm", "k_norm"))
            head_norm = torch.stack([query] * self.heads + [key] * self.kv_heads)
        return Layer(
            input_norm=layer.get_parameter("input_layernorm.weight").detach(),
            attention_inputs=Projection.fuse(layer, ATTENTION_INPUTS),
            head_norm=head_norm,
            attention_output=Projection.fuse(layer, ATTENTION_OUTPUT),
            mlp_norm=layer.get_parameter("post_attention_layernorm.weight").detach(),
            mlp_inputs=Projection.fuse(layer, MLP_INPUTS),
            mlp_output=Projection.fuse(layer, MLP_OUTPUT),
        )
