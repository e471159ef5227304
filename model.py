"""A small GPT made of this project's parts; by switches, GPT-2 or the Transformer of 2017.

    p(x_1 .. x_T) = prod_t p(x_t | x_1 .. x_t-1)      loss = -1/T sum_t log p(x_t | ..)   in nats

    tokens (B, T) -> embed -> [ x + attention(norm(x)), x + mlp(norm(x)) ] * layers -> norm -> head

    default   RMSNorm before each part, RoPE, attention with QK-norm (kv_heads < heads: grouped-
              query), SwiGLU, untied head, no biases
    GPT-2     Config(norm="layernorm", position="learned", mlp="gelu", qk_norm=False, bias=True,
                     tied=True)     but for its GELU, an approximation by tanh (off by 5e-4 at most)
    Mixtral   Config(hidden=H, experts=8, expert_hidden=H, balance="aux", qk_norm=False)
    2017      old = dict(norm="layernorm", norm_place="post", position="sinusoidal", mlp="relu",
                         qk_norm=False, bias=True, tied=True, scale_embedding=True)
              encoder = GPT(Config(causal=False, **old))
              decoder = GPT(Config(cross_attention=True, **old))
              logits, loss = decoder(tokens, targets, memory=encoder.features(source))

Start values: each parameter is drawn from a generator seeded by (seed, its name), so it depends on
no other one, nor on how the model is spread over processes. The two layers that write into the
residual stream (o, down) start at zero: a pre-norm block starts as the identity.

Paper     Vaswani et al. 2017; Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama: RMSNorm,
          SwiGLU, RoPE); Ainslie et al. 2023 (grouped-query attention); Henry et al. 2020 (QK-norm)
Left out  padding masks (the sequences of a batch have one length), attention dropout, beam search
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
import zlib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import checkpoint, plan, selective_checkpoint
from flash_attn import flash_attention
from loss import chunked_cross_entropy, nats_and_dz
from moe import MoE, as_product
from rope import alibi_bias, apply_rope, rope_table, sinusoidal_table
from tp import (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, collective,
                column_parallel, copy_to_tp, cuts, gather_from_sp, gather_from_tp, part_like,
                reduce_from_tp, reduce_to_sp, tp_size, unshard, vocab_parallel_cross_entropy)

# Shape letters: B sequences, T tokens, S tokens of a memory, C width of the model, H query heads,
# K key/value heads, D width of a head (as a rule C / H), V vocabulary.


@dataclasses.dataclass
class Config:
    """The shape of a model. ValueError, with the rule and the fix, where the numbers do not fit.
    None becomes a number here, which dataclasses.replace(config, dim=...) then keeps."""
    vocab_size: int = 256
    seq_len: int = 256                  # the longest sequence the model reads, in tokens
    layers: int = 4
    dim: int = 256                      # C
    heads: int = 4                      # H
    kv_heads: int | None = None         # K; None: H. Fewer: grouped-query attention, 1: multi-query
    head_dim: int | None = None         # D, the width of a head; None: C / H
    hidden: int | None = None           # width inside the MLP; None: 4 C, for swiglu 8/3 C
    norm: str = "rmsnorm"               # rmsnorm | layernorm
    norm_place: str = "pre"             # pre: x + f(norm(x)) | post: norm(x + f(x)), as in 2017
    norm_eps: float = 1e-5
    position: str = "rope"              # rope | sinusoidal | learned | alibi | none
    rope_base: float = 10000.0
    rope_scaling: dict | None = None    # a Hugging Face rope dict, see rope.py
    mlp: str = "swiglu"                 # swiglu | gelu | relu | relu2
    experts: int = 0                    # E in a block, of which a token visits top_k; 0: an MLP
    top_k: int = 2
    shared_experts: int = 0             # that all tokens visit, besides
    expert_hidden: int | None = None    # width inside one; None: together as wide as the MLP
    moe_every: int = 1                  # 2: every other block, the second first, ...
    balance: str = "bias"               # against collapse, see moe.py: bias | aux | none
    qk_norm: bool = True                # RMSNorm on every head's q and k: bounds the scores
    bias: bool = False
    tied: bool = False                  # the head's matrix is the embedding's
    scale_embedding: bool = False       # times sqrt(C) (Vaswani 2017, section 3.4)
    causal: bool = True
    cross_attention: bool = False       # every block also attends to a memory (B, S, C)
    dropout: float = 0.0                # on the embedding and on what each part adds
    seed: int = 0

    def __post_init__(self):
        choices = {"norm": ("rmsnorm", "layernorm"), "norm_place": ("pre", "post"),
                   "position": ("rope", "sinusoidal", "learned", "alibi", "none"),
                   "mlp": ("swiglu", "gelu", "relu", "relu2"), "balance": ("bias", "aux", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: pick {' or '.join(allowed)}")
        if self.kv_heads is None:
            self.kv_heads = self.heads
        for name in ("vocab_size", "seq_len", "layers", "dim", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim={self.dim} does not split over heads={self.heads}: pick a "
                             f"multiple of {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} do not share kv_heads={self.kv_heads} evenly: "
                             f"pick a divisor of {self.heads}")
        if self.head_dim is None:
            self.head_dim = self.dim // self.heads
        if self.head_dim < 1 or self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} (by itself dim/heads): must be at least 1, "
                             f"and even with RoPE, which turns pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.hidden is None:                 # 8/3: three matrices as large as two of width 4 C
            exact = self.dim * (8 / 3 if self.mlp == "swiglu" else 4)
            self.hidden = math.ceil(exact / 16) * 16            # fp8 needs multiples of 16
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: must be at least 1")
        if self.experts:
            at_work = self.top_k + self.shared_experts
            if self.mlp != "swiglu" or self.bias:
                raise ValueError("experts are SwiGLU without biases: use mlp='swiglu', bias=False")
            if min(self.experts, self.top_k, self.moe_every, self.shared_experts + 1) < 1:
                raise ValueError(f"experts={self.experts}, top_k={self.top_k}, moe_every="
                                 f"{self.moe_every}: at least 1; shared_experts="
                                 f"{self.shared_experts}: at least 0")
            if self.moe_every > self.layers:
                raise ValueError(f"moe_every={self.moe_every} with {self.layers} layers: no block "
                                 f"would have experts: use at most {self.layers}")
            if self.expert_hidden is None:
                self.expert_hidden = math.ceil(self.hidden / at_work / 16) * 16

    def has_experts(self, i):
        """Has block i experts, or an MLP?"""
        return self.experts > 0 and (i + 1) % self.moe_every == 0

    def active(self, i):
        """Elements of the matrices of block i that work for a token."""
        C = self.dim
        attention = 2 * C * (self.heads + self.kv_heads) * self.head_dim
        if self.has_experts(i):
            width = (self.top_k + self.shared_experts) * self.expert_hidden
            return attention + 3 * C * width + C * self.experts
        return attention + (3 if self.mlp == "swiglu" else 2) * C * self.hidden

    def flops(self):
        """Of forward and backward, per token of a full sequence, decoder or encoder: 6 for each
        matrix element, 12 T H D for a block's scores (all T, as is the custom: causal needs half).
        """
        matrices = sum(map(self.active, range(self.layers))) + self.vocab_size * self.dim
        return 6 * matrices + 12 * self.layers * self.seq_len * self.heads * self.head_dim


def _norm(config):
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.dim, eps=config.norm_eps)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of every head. All ranks hold its weight, but each reads it for its own heads: a
    term of the gradient. copy_to_tp sums them (D elements; split tokens: later, with others)."""

    def __init__(self, config, group, sequence_parallel):
        super().__init__(config.head_dim, eps=config.norm_eps)
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, x):                                   # (B, T, h, D) -> same
        weight = self.weight
        if not self.sequence_parallel:
            weight = copy_to_tp(weight, self.group)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention of x to itself or, with a memory, to that (cross-attention)."""

    def __init__(self, config, causal, **split):
        super().__init__()
        C, H, K, D = config.dim, config.heads, config.kv_heads, config.head_dim
        self.head_dim, self.causal = D, causal
        self.q = ColumnParallelLinear(C, H * D, config.bias, heads=H, **split)
        self.k = ColumnParallelLinear(C, K * D, config.bias, heads=K, **split)
        self.v = ColumnParallelLinear(C, K * D, config.bias, heads=K, **split)
        self.o = RowParallelLinear(H * D, C, config.bias, **split)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(config, **split), HeadNorm(config, **split)

    def _heads(self, x, norm=nn.Identity()):                # (B, T, H D) -> (B, H, T, D)
        return norm(x.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)

    def forward(self, x, memory=None, rope=None, bias=None, past=None):
        """x (B, T, C), memory (B, S, C) or None -> (B, T, C).

        rope: (cos, sin) of these T tokens or None. bias: (H, T, all T) for the scores, or None.
        past: dict that holds the keys and values of earlier tokens (decoding), or None."""
        if memory is None:
            q, k, v = column_parallel(x, self.q, self.k, self.v)
        else:
            q, (k, v) = self.q(x), column_parallel(memory, self.k, self.v)
        q = self._heads(q, self.q_norm)                     # (B, H, T, D); H, K: of this rank
        k = self._heads(k, self.k_norm)                     # (B, K, T or S, D)
        v = self._heads(v)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if past is not None:
            if past:
                k, v = torch.cat([past["k"], k], dim=2), torch.cat([past["v"], v], dim=2)
            past.update(k=k, v=v)
        if bias is None:
            out = flash_attention(q, k, v, causal=self.causal)
        else:                                               # only SDPA takes a bias
            bias = bias.to(q.dtype)[None]                   # of 4 dimensions: a CPU's fused kernel
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))       # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    """down(f(up(x))); swiglu: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config, **split):
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = ColumnParallelLinear(config.dim, config.hidden, config.bias, **split)
        self.up = ColumnParallelLinear(config.dim, config.hidden, config.bias, **split)
        self.down = RowParallelLinear(config.hidden, config.dim, config.bias, **split)

    def forward(self, x):                                   # (B, T, C) -> (B, T, C)
        if self.kind == "swiglu":
            h, gate = column_parallel(x, self.up, self.gate)
            return self.down(F.silu(gate) * h)
        h = F.gelu(self.up(x)) if self.kind == "gelu" else F.relu(self.up(x))
        return self.down(h.square() if self.kind == "relu2" else h)


class AddLoss(torch.autograd.Function):
    """x, unchanged. Backward gives `loss` the gradient `scale`: as if backward had begun from a sum
    that holds scale * loss. So a block's loss need not travel to the end, or to the last stage."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.gradient = torch.full_like(loss, scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, ctx.gradient, None


class Experts(MoE):
    """moe.py's layer with 1/n of each expert's width on each of n tp ranks; all route alike, or,
    with sequence_parallel, each its own tokens. Adds its losses to the gradients: see AddLoss.

    load: (E,) choices on this rank since balance_experts(). loss_scale: see set_loss_scale()."""

    def __init__(self, config, ep_group, data_group, group, sequence_parallel):
        n, H = tp_size(group), config.expert_hidden
        if H % n:
            raise ValueError(f"expert_hidden={H} over {n} ranks: pick a multiple of {n}")
        if sequence_parallel and config.balance == "aux":
            raise ValueError("balance='aux' counts whole sequences, sequence_parallel splits them: "
                             "use balance='bias'")
        super().__init__(config.dim, H // n, config.experts, config.top_k,
                         num_shared=config.shared_experts, group=ep_group, data_group=data_group,
                         balance=None if config.balance == "none" else config.balance)
        self.tp_group, self.sequence_parallel, self.loss_scale = group, sequence_parallel, 1.0
        self.load = torch.zeros(config.experts, dtype=torch.int64)
        for name, dim in ("gate_up", 2), ("down", 2), ("shared_gate_up", 1), ("shared_down", 1):
            if n > 1 and hasattr(self, name):
                getattr(self, name).shard = ("tp", dim)

    def forward(self, x):                                   # (B, T, C) -> same
        weight, expert, aux = self.route(x)
        x = as_product(x)
        if self.training and torch._C._current_graph_task_id() == -1:       # not again, when
            self.load = self.load.to(x.device) + aux["load"]                # backward recomputes
        scale, enter, leave = self.loss_scale, copy_to_tp, reduce_from_tp
        if self.sequence_parallel:                          # a rank's losses are of T / n tokens
            scale, enter, leave = scale / tp_size(self.tp_group), gather_from_sp, reduce_to_sp
        y, _ = self.combine(*(enter(t, self.tp_group) for t in (x, weight, expert)))
        return AddLoss.apply(leave(y, self.tp_group), aux["loss"], scale)


class Block(nn.Module):
    """Attention, cross-attention if there is a memory, MLP: each adds to the residual stream x.
    experts: None, or the groups of Experts, which then take the place of the MLP."""

    def __init__(self, config, experts=None, **split):
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attn, self.attn_norm = Attention(config, config.causal, **split), _norm(config)
        if config.cross_attention:
            self.cross, self.cross_norm = Attention(config, False, **split), _norm(config)
        self.mlp = MLP(config, **split) if experts is None else Experts(config, *experts, **split)
        self.mlp_norm = _norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def _add(self, x, norm, part, **kwargs):
        if self.pre:
            return x + self.dropout(part(norm(x), **kwargs))
        return norm(x + self.dropout(part(x, **kwargs)))

    def forward(self, x, memory=None, rope=None, bias=None, past=None):     # (B, T, C) -> same
        x = self._add(x, self.attn_norm, self.attn, rope=rope, bias=bias, past=past)
        if memory is not None:
            x = self._add(x, self.cross_norm, self.cross, memory=memory)
        return self._add(x, self.mlp_norm, self.mlp)


class GPT(nn.Module):
    """model(tokens (B, T), targets (B, T) or None) -> logits (B, T, V), mean loss or None.

    tp_group: its ranks, all with the same tokens, split every layer (tp.py); with targets, logits
    are then this rank's (B, T, V / n). sequence_parallel: norms and residual stream, too.
    stages: (numbers, n), to have only the parts of these of n pipeline stages: see stage().
    ep_group: its ranks, each with tokens of its own, hold E / n experts each (moe.py). data_group:
    all ranks with tokens of their own: balance="aux" counts there. With experts, after a step call
    balance_experts()."""

    def __init__(self, config, tp_group=None, sequence_parallel=False, stages=((0,), 1),
                 ep_group=None, data_group=None):
        super().__init__()
        self.config, self.tp_group, self.data_group = config, tp_group, data_group or ep_group
        n, C, T = tp_size(tp_group), config.dim, config.seq_len
        numbers, cuts = stages[0], stage_blocks(config, stages[1])
        split = {"group": tp_group, "sequence_parallel": sequence_parallel and n > 1}
        if split["sequence_parallel"] and (T % n or config.cross_attention):
            raise ValueError(f"sequence_parallel splits seq_len={T} over {n} ranks: pick a "
                             f"multiple of {n}, and no cross_attention")
        self.sequence_parallel = split["sequence_parallel"]
        if 0 in numbers:
            self.embed = VocabParallelEmbedding(config.vocab_size, C, **split)
            if config.position == "learned":
                self.position = nn.Embedding(T, C)
        mine = {i for number in numbers for i in cuts[number]}
        experts = [(ep_group, data_group) if config.has_experts(i) else None
                   for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, experts[i], **split) if i in mine else None
                                    for i in range(config.layers))
        self.experts = [m for m in self.modules() if isinstance(m, Experts)]
        if len(cuts) - 1 in numbers:
            self.norm = _norm(config) if config.norm_place == "pre" else nn.Identity()
            self.head = ColumnParallelLinear(C, config.vocab_size, bias=False, **split)
            if config.tied and 0 in numbers:
                self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = {}                     # number of a block: how, see set_recompute()
        self.loss_chunk = 0                     # tokens whose logits exist at once; 0: all
        self.loss_of, self.loss_of_chunk = vocab_parallel_cross_entropy, nats_and_dz
        # Constants. Not buffers: model.to(bfloat16) would round the angles of RoPE.
        self.tables = {}
        if config.position == "rope":
            cos, sin = rope_table(T, config.head_dim, config.rope_base, config.rope_scaling)
            self.tables = {"cos": cos, "sin": sin}
        elif config.position == "sinusoidal":
            self.tables = {"wave": sinusoidal_table(T, C)}
        elif config.position == "alibi":
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            bias = collective("split", alibi_bias(config.heads, T), 0, tp_group)()
            self.tables = {"bias": bias.masked_fill(future, -math.inf) if config.causal else bias}
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Matrices: normal, variance 1 / fan-in; o and down: 0. Embeddings: normal, variance 1, or
        1 / C where they are the head's matrix, or multiplied by sqrt(C). Biases 0, norms 1."""
        downs = "o.weight", "down.weight", "mlp.down", "shared_down"
        for name, p in self.named_parameters():
            name = "embed.weight" if self.config.tied and name == "head.weight" else name
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(downs):
                p.zero_()
            else:
                seed = zlib.crc32(f"{self.config.seed} {name}".encode())
                shape = list(p.shape)
                for dim, group in cuts(p, self.tp_group):
                    shape[dim] *= tp_size(group)
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                p.copy_(part_like(p, whole, self.tp_group))
                narrow = self.config.tied or self.config.scale_embedding
                if name not in ("embed.weight", "position.weight") or narrow:
                    p.mul_(shape[-1] ** -0.5)

    def table(self, name, device):
        if self.tables[name].device != device:
            self.tables[name] = self.tables[name].to(device)
        return self.tables[name]

    def features(self, tokens, memory=None, cache=None):
        """tokens (B, T) -> (B, T, C), with sequence_parallel this rank's T / n: for the head, or as
        a decoder's memory.

        cache: [] before the first call; later calls give the tokens that follow the cached ones."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens {tuple(tokens.shape)}: pass (B, T), of one text tokens[None]")
        start = cache[0]["k"].shape[2] if cache else 0
        if self.config.cross_attention != (memory is not None):
            raise ValueError(f"cross_attention={self.config.cross_attention}, but memory is "
                             f"{'missing' if memory is None else 'given'}: use both or neither")
        positions = self.positions(start, start + tokens.shape[1], tokens.device)
        x = self.enter(tokens, start)
        if cache is not None and not cache:
            cache.extend({} for _ in self.blocks)
        for i in range(len(self.blocks)):
            past = None if cache is None else cache[i]
            x = self.run_block(i, x, memory=memory, past=past, **positions)
        return self.norm(x)

    def run_block(self, i, x, **kwargs):
        if i not in self.recompute or kwargs.get("past") is not None:
            return self.blocks[i](x, **kwargs)
        return self.recompute[i](self.blocks[i], x, **kwargs)

    def set_recompute(self, how, batch_size=1):
        """What backward computes again (checkpoint.py). "none"; "full": all blocks; "selective":
        all but matmuls and attention; 0.0 to 1.0: as many blocks as needed to keep that share of
        their activations' bytes, measured with batch_size sequences (and without a memory)."""
        mine = [i for i, block in enumerate(self.blocks) if block is not None]
        ways = {"none": None, "full": checkpoint, "selective": selective_checkpoint}
        if how in ways:
            self.recompute = {i: ways[how] for i in mine if how != "none"}
            return
        if isinstance(how, str) or not 0 <= how <= 1:
            raise ValueError(f"how={how!r}: pick none, full, selective, or a share from 0 to 1")
        p, T = next(self.blocks[mine[0]].parameters()), self.config.seq_len
        positions = self.positions(0, T, p.device)
        t = T // tp_size(self.tp_group) if self.sequence_parallel else T
        x = torch.randn(batch_size, t, self.config.dim, generator=torch.Generator().manual_seed(0))
        again = [plan([functools.partial(self.blocks[i], **positions) for i in mine],
                      x.to(p.device, p.dtype), float(how))]
        if self.experts and self.data_group is not None:    # ranks whose experts had other loads
            dist.broadcast_object_list(again, group=self.data_group, group_src=0)
        self.recompute = {mine[i]: checkpoint for i in again[0]}
        for layer in self.experts:                          # those tokens do not count
            layer.load.zero_()

    def compile_parts(self):
        """torch.compile for each block, equal ones sharing a graph, and for the loss. Not for all
        of the model at once: gradients are then ready, and sent, block by block. After
        set_recompute(), which measures blocks; a model to be copied: copy it before."""
        for block in self.blocks:
            if block is not None:                           # not block.compile(): hooks stay out
                block.forward = torch.compile(block.forward)
        self.loss_of = torch.compile(self.loss_of)
        self.loss_of_chunk = torch.compile(self.loss_of_chunk)

    def set_loss_scale(self, scale):
        """What the loss is multiplied by before backward (accumulation, fp16): the losses of
        experts, which the returned one does not hold, then are, too."""
        for layer in self.experts:
            layer.loss_scale = scale

    @torch.no_grad()
    def balance_experts(self, group=None, rate=0.003):
        """Once a step, after backward, on all ranks: count the choices since the last call over the
        ranks of `group`, which have other tokens (None: this one); balance="bias": move the biases.
        -> load of the busiest expert / its fair share, the worst of this rank's blocks, ()."""
        if not self.experts:                                # as on a pipeline stage without any
            return torch.zeros(())
        loads = torch.stack([layer.load for layer in self.experts])             # (blocks, E)
        for ranks in [group, self.tp_group if self.sequence_parallel else None]:
            loads = collective("all-reduce", loads, 0, ranks)()
        for layer, load in zip(self.experts, loads):
            layer.load.zero_()
            if layer.bias is not None:
                layer.update_bias(load, rate)
        return (loads.amax(1) / loads.double().mean(1)).max()

    def enter(self, tokens, start=0):
        """tokens (B, T) at positions start ... -> (B, T, C), or this rank's tokens: for block 0."""
        config, end = self.config, start + tokens.shape[1]
        x = self.embed(tokens)
        x = x * config.dim ** 0.5 if config.scale_embedding else x
        if config.position in ("learned", "sinusoidal"):
            learned = config.position == "learned"
            rows = self.position.weight if learned else self.table("wave", tokens.device)
            split = "split" if self.sequence_parallel else "copy"
            x = x + collective(split, rows[start:end], 0, self.tp_group)().to(x.dtype)
        return self.dropout(x)

    def positions(self, start, end, device):
        """What every block needs to know of the positions start ... end - 1."""
        if end > self.config.seq_len:
            raise ValueError(f"{end} tokens, but the model reads at most seq_len="
                             f"{self.config.seq_len}: crop them, or build it with a larger seq_len")
        if self.config.position == "rope":
            return {"rope": [self.table(name, device)[start:end] for name in ("cos", "sin")]}
        if self.config.position == "alibi":
            return {"bias": self.table("bias", device)[:, start:end, :end]}
        return {}

    @classmethod
    def from_pretrained(cls, folder, seq_len=None, **options):
        """A model of a Hugging Face folder (config.json, *.safetensors): Llama, Mistral, Qwen3 or
        Mixtral. seq_len: fewer tokens than it can read; options: GPT's, such as tp_group: a rank
        then reads only its own parts. The weights become float32. ValueError: what we do not have.
        """
        folder = pathlib.Path(folder)
        theirs = json.loads((folder / "config.json").read_text())
        model = cls(config_of(theirs, seq_len), **options)
        where = find_tensors(folder)
        names = "model.embed_tokens.weight", "lm_head.weight"
        if model.config.tied and all(name in where for name in names):
            one, other = (where[name].get_slice(name) for name in names)
            rows, *_ = one.get_shape()
            if one.get_shape() != other.get_shape() or not all(
                    torch.equal(one[i:i + 4096].float(), other[i:i + 4096].float())
                    for i in range(0, rows, 4096)):
                raise ValueError(f"{folder}: config.json says that {names[1]} is {names[0]}, but "
                                 f"they differ: set tie_word_embeddings to false there")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if model.config.tied and name == "head.weight":             # of a last stage
                    name = "embed.weight"
                p.copy_(read_tensor(where, name, p, model.tp_group))
        return model

    @torch.no_grad()
    def save_pretrained(self, folder, shard_bytes=5 * 10**9, copy_from=None, **more):
        """Write such a folder, whole, in the weights' types: transformers reads it as Qwen3 (with
        qk_norm), Llama or Mixtral. copy_from: the folder that it comes from, whose tokenizer,
        longest text and other settings it keeps. more: entries of config.json. An adapter (peft.py)
        is left out: merge it before. All ranks may call it, those of a split
        model must; else rank 0 alone looks, writes and raises. Not for a part of a pipeline.
        ValueError: no such model there, the folder exists."""
        folder, config = pathlib.Path(folder), theirs_of(self.config)
        if any(block is None for block in self.blocks):
            raise ValueError("this rank has only some stages: save a model that has all")
        if any(layer.bias is not None and layer.bias.any() for layer in self.experts):
            raise ValueError("the experts are chosen with biases, which Mixtral's are not: train "
                             "with balance='aux'")
        rank = dist.get_rank() if dist.is_initialized() else 0
        cut = any(tp_size(group) > 1 for p in self.parameters() for _, group in
                  cuts(p, self.tp_group))
        if rank > 0 and not cut:
            return                                              # rank 0 has all
        if folder.exists():
            raise ValueError(f"{folder} exists: nothing is overwritten, name another folder")
        if cut:
            dist.barrier()                                      # all have looked: now it may come
        beside, files = folder.with_name(f".{folder.name}.unfinished"), [{}]
        for name, p in self.named_parameters():
            if "adapters" in name.split("."):
                continue
            whole = theirs_from(name, unshard(p, self.tp_group))
            for key, t in whole.items() if rank == 0 else ():
                if sum(x.nbytes for x in files[-1].values()) + t.nbytes > shard_bytes:
                    files.append({})
                files[-1][key] = t.cpu().contiguous()
        if rank > 0:
            return
        shutil.rmtree(beside, ignore_errors=True)               # of a kill
        beside.mkdir(parents=True)
        config["torch_dtype"] = str(next(self.parameters()).dtype).removeprefix("torch.")
        if copy_from:
            known = json.loads(pathlib.Path(copy_from, "config.json").read_text())
            known = {key: value for key, value in known.items()
                     if key not in ("rope_scaling", "dtype", "quantization_config")}
            keep = "model_type", "architectures", "max_position_embeddings", "sliding_window"
            config = known | config | {key: value for key, value in known.items()
                                       if key in keep or key.endswith("_token_id")}
            for name in TOKENIZER:
                if pathlib.Path(copy_from, name).is_file():
                    shutil.copy(pathlib.Path(copy_from, name), beside)
        config |= more
        (beside / "config.json").write_text(json.dumps(config, indent=2))
        places = {}
        for i, tensors in enumerate(files):
            file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            safetensors_torch().save_file(tensors, beside / file, metadata={"format": "pt"})
            places |= {key: file for key in tensors}
        index = {"metadata": {}, "weight_map": places}
        (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        os.replace(beside, folder)                              # complete, or not there

    def stage(self, i, n):
        """Stage i of n of this model, for pp.Pipeline: tokens or (B, T, C) -> (B, T, C) or logits.
        Its parameters are the model's."""
        if self.config.cross_attention:
            raise ValueError("cross_attention: a memory does not travel from stage to stage")
        return Stage(self, stage_blocks(self.config, n)[i], i == 0, i == n - 1)

    def forward(self, tokens, targets=None, memory=None, cache=None):
        """-> logits (B, T, V), loss: mean nats per target; targets of -100 do not count. With
        loss_chunk and targets there are no logits (loss.py)."""
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets {tuple(targets.shape)}: pass one for each of the tokens "
                             f"{tuple(tokens.shape)}")
        x = self.features(tokens, memory, cache)
        if self.loss_chunk and targets is not None:
            if tp_size(self.tp_group) > 1 or hasattr(self.head, "adapters"):
                raise ValueError("loss_chunk multiplies by head.weight alone: not with a tp_group, "
                                 "nor with an adapter on the head")
            return None, chunked_cross_entropy(x, self.head.weight, targets, self.loss_chunk,
                                               per_chunk=self.loss_of_chunk)
        logits = self.head(x)
        if targets is None:
            return gather_from_tp(logits, self.tp_group), None
        return logits, self.loss_of(logits, targets, self.tp_group)

    @torch.no_grad()
    def generate(self, tokens, new_tokens, temperature=1.0, top_k=None, generator=None,
                 use_cache=True, memory=None):
        """tokens (B, T) -> (B, T + new_tokens). temperature 0: always the most likely token.

        top_k: draw among the k most likely. use_cache: keep keys and values, so that a step reads
        one token, not all; the result is the same. Beyond seq_len the older half is forgotten."""
        if not self.config.causal:
            raise ValueError("generate() needs causal=True: this model reads both sides of a token")
        if (tokens.dim() != 2 or tokens.shape[1] < 1 or temperature < 0
                or top_k is not None and top_k < 1):
            raise ValueError(f"tokens {tuple(tokens.shape)}, temperature={temperature}, top_k="
                             f"{top_k}: need (B, T) with T >= 1, temperature >= 0, top_k >= 1")
        training, limit = self.training, self.config.seq_len
        split = [m for m in self.modules() if getattr(m, "sequence_parallel", False)]
        for module in split:                                # a single token cannot be split
            module.sequence_parallel = False
        self.eval()
        try:
            start, cache = max(0, tokens.shape[1] - limit), []
            for _ in range(new_tokens):
                if tokens.shape[1] - start > limit:
                    start, cache = tokens.shape[1] - (limit + 1) // 2, []
                seen = cache[0]["k"].shape[2] if cache else 0
                new, known = tokens[:, start + seen:], cache if use_cache else None
                logits, _ = self(new, None, memory, known)
                token = pick(logits[:, -1].float(), temperature, top_k, generator)
                if tp_size(self.tp_group) > 1:              # the ranks may draw differently
                    dist.broadcast(token, group=self.tp_group, group_src=0)
                tokens = torch.cat([tokens, token], dim=1)
        finally:
            self.train(training)
            for module in split:
                module.sequence_parallel = True
        return tokens


class Stage(nn.Module):
    """Some blocks of a model, with what comes before the first and after the last of them."""

    def __init__(self, model, blocks, first, last):
        super().__init__()
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        if first:
            self.before.extend([model.embed, getattr(model, "position", None), model.dropout])
        self.numbers, self.run_block = blocks, model.run_block
        self.blocks = nn.ModuleList(model.blocks[i] for i in blocks)
        if last:
            self.after.extend([model.norm, model.head])
        if model.config.tied and first != last:             # one weight on two ranks: see pp.py
            (self.before[0] if first else self.after[1]).weight.tied = "embed.weight"
        self.enter, self.positions = model.enter, model.positions       # methods, not the module
        self.parts = tp_size(model.tp_group) if model.sequence_parallel else 1

    def forward(self, x):
        T = x.shape[1] * (1 if self.before else self.parts)
        positions = self.positions(0, T, x.device)
        x = self.enter(x) if self.before else x
        for i in self.numbers:
            x = self.run_block(i, x, **positions)
        for layer in self.after:
            x = layer(x)
        return x


# Our parts of names: Hugging Face's, of Llama and its kind.
THEIRS = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
          "head": "lm_head", "attn_norm": "input_layernorm", "attn": "self_attn",
          "mlp_norm": "post_attention_layernorm", "router": "gate"} | {
              part: f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


def hf_name(name):
    """Of a layer or parameter of a GPT -> what transformers calls it."""
    name = ".".join(THEIRS.get(part, part) for part in name.split("."))
    return name.replace("mlp.gate.", "block_sparse_moe.gate.")


def theirs_from(name, t):
    """A parameter -> {their name: their tensor}: experts are stored one by one."""
    if not name.endswith(("mlp.gate_up", "mlp.down")):
        return {hf_name(name): t}
    prefix = hf_name(name.rsplit(".mlp.", 1)[0]) + ".block_sparse_moe.experts"
    if name.endswith("down"):                                   # (E, C, H)
        return {f"{prefix}.{i}.w2.weight": w for i, w in enumerate(t)}
    return {f"{prefix}.{i}.{w}.weight": t[i, j]                 # (E, 2, H, C)
            for i in range(len(t)) for j, w in enumerate(("w1", "w3"))}


# Files that a tokenizer, and generation, may have beside a model.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja",
             "special_tokens_map.json", "generation_config.json")

# What transformers takes for a key that a config.json does not have.
THEIR_DEFAULTS = {"rms_norm_eps": 1e-6}
SOME_DEFAULTS = {"mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
                 "qwen3": {"head_dim": 128, "num_key_value_heads": 32},
                 "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8,
                             "num_local_experts": 8, "num_experts_per_tok": 2}}


TRAINED_LENGTH = "original_max_position_embeddings"


def config_of(theirs, seq_len=None):
    """Their config.json, a dict -> Config."""
    kind = theirs.get("model_type")
    if kind not in ("llama", "mistral", "qwen3", "mixtral"):
        raise ValueError(f"model_type {kind!r}: we have llama, mistral, qwen3 and mixtral")
    missing = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
               "intermediate_size", "max_position_embeddings"} - theirs.keys()
    if missing:
        raise ValueError(f"config.json lacks {sorted(missing)}: it is no whole one")
    if theirs.get("quantization_config"):
        raise ValueError("quantization_config: these weights are no plain numbers; take the "
                         "model's folder before quantization")
    theirs = THEIR_DEFAULTS | SOME_DEFAULTS.get(kind, {}) | theirs
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    slides = kind != "qwen3" or theirs.get("use_sliding_window", False)
    length, window = theirs["max_position_embeddings"], slides and theirs.get("sliding_window")
    limit = min(length, window or math.inf)
    for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if theirs.get(key, plain) != plain:
            raise ValueError(f"{key}={theirs[key]!r}: only {plain!r} is known here")
    if seq_len is not None and seq_len > limit:
        raise ValueError(f"seq_len={seq_len}: this model reads at most {limit} tokens"
                         f"{' in its window' if limit == window else ''}")
    how, trained = rope.get("rope_type", rope.get("type", "default")), TRAINED_LENGTH
    if how == "dynamic":                        # as transformers: whatever else is there
        rope = {**rope, trained: length}
    elif how in ("yarn", "llama3"):
        rope = {**rope, trained: theirs.get(trained) or rope.get(trained) or length}
    if kind == "mixtral" and theirs["num_experts_per_tok"] == 1:
        raise ValueError("num_experts_per_tok=1: their expert counts fully, ours by its score")
    experts = dict(experts=theirs["num_local_experts"], top_k=theirs["num_experts_per_tok"],
                   expert_hidden=theirs["intermediate_size"],
                   balance="aux") if kind == "mixtral" else {}
    return Config(
        vocab_size=theirs["vocab_size"], seq_len=seq_len or limit, dim=theirs["hidden_size"],
        layers=theirs["num_hidden_layers"], heads=theirs["num_attention_heads"],
        kv_heads=theirs.get("num_key_value_heads"), head_dim=theirs.get("head_dim"),
        hidden=theirs["intermediate_size"], norm_eps=theirs["rms_norm_eps"],
        rope_base=rope.get("rope_theta") or theirs.get("rope_theta") or (
            1e6 if kind == "mixtral" else 1e4),
        rope_scaling=None if how == "default" else rope, qk_norm=kind == "qwen3",
        tied=theirs.get("tie_word_embeddings", False), **experts)


def theirs_of(config):
    """Config -> their config.json, a dict."""
    fixed = dict(norm="rmsnorm", norm_place="pre", position="rope", mlp="swiglu", bias=False,
                 scale_embedding=False, causal=True, cross_attention=False, shared_experts=0,
                 moe_every=1)
    other = [key for key, value in fixed.items() if getattr(config, key) != value]
    if other or config.experts and config.qk_norm or config.experts and config.top_k == 1:
        raise ValueError(f"transformers has no such model: {other or 'experts'} must be "
                         f"{[fixed[key] for key in other] or 'without qk_norm, top_k above 1'}")
    kind = "qwen3" if config.qk_norm else "mixtral" if config.experts else "llama"
    if kind == "llama" and config.dim % config.heads:
        raise ValueError(f"transformers' Llama has dim / heads a whole number, not {config.dim} / "
                         f"{config.heads}")
    rope = {"rope_theta": config.rope_base, **(config.rope_scaling or {"rope_type": "default"})}
    how, trained = rope.get("rope_type", rope.get("type")), rope.get(TRAINED_LENGTH)
    if how == "dynamic" and trained < config.seq_len:
        raise ValueError(f"{TRAINED_LENGTH}={trained} below seq_len={config.seq_len}: transformers "
                         f"does not know that of dynamic RoPE")
    theirs = {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "head_dim": config.head_dim,
        "intermediate_size": config.expert_hidden if config.experts else config.hidden,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps, "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": config.tied, "bos_token_id": None, "eos_token_id": None,
        "rope_theta": rope["rope_theta"], "rope_parameters": rope}
    if how != "default":
        theirs["rope_scaling"] = rope                       # the name before transformers 5
    if config.experts:
        theirs |= {"num_local_experts": config.experts, "num_experts_per_tok": config.top_k,
                   "sliding_window": None}
    return theirs


def safetensors_torch():
    try:
        import safetensors.torch
    except ImportError as missing:
        raise ImportError("Hugging Face's folders hold safetensors: pip install safetensors"
                          ) from missing
    return safetensors.torch


def find_tensors(folder):
    """-> {their name: an open file}: of one, or of many, which an index names; no tensor is read
    yet."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if one in files:
        files = [one]
    elif files and index.is_file():     # beside its files may lie others, of an earlier download
        named = json.loads(index.read_text()).get("weight_map", {}).values()
        files = sorted({folder / name for name in named})
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: old *.bin files may run code, convert "
                         f"them (save_pretrained of transformers does)")
    opened = []
    for file in files:
        try:
            opened.append(safetensors_torch().safe_open(file, framework="pt"))
        except Exception as problem:                        # safetensors has its own kind
            raise ValueError(f"{file} cannot be read: {problem}") from problem
    return {name: file for file in opened for name in file.keys()}


def read_tensor(where, name, p, tp_group):
    """The part of a parameter that this rank holds, or all of it."""
    shape, mine = list(p.shape), [slice(None)] * p.dim()
    for dim, group in cuts(p, tp_group):
        n, i = tp_size(group), dist.get_rank(group) if tp_size(group) > 1 else 0
        mine[dim] = slice(i * shape[dim], (i + 1) * shape[dim])
        shape[dim] *= n

    def read(key, index, size):
        if key not in where:
            raise ValueError(f"no tensor {key} in the folder, for {name}")
        part = where[key].get_slice(key)
        if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{key} is of type {part.get_dtype()}: only plain numbers, no "
                             f"quantized ones, are known here")
        if part.get_shape() != size:
            raise ValueError(f"{key} has shape {part.get_shape()}, for {name} of shape {size}")
        return part[tuple(index)]

    names = list(theirs_from(name, torch.empty(shape, device="meta")))
    if len(names) == 1:
        return read(names[0], mine, shape)
    each = len(names) // shape[0]               # w1 and w3, or w2
    first = each * (mine[0].start or 0)         # of this rank's experts
    own = names[first:first + each * len(p)]
    return torch.stack([read(key, mine[-2:], shape[-2:]) for key in own]).view(p.shape)


def stage_blocks(config, n):
    """-> for each of n pipeline stages the range of its blocks, so that the slowest is as fast as
    can be. A block counts what Config.active() says, on average, and T x all heads' width for the
    scores (causal); the head V C; the embedding is a lookup, and counts nothing."""
    if not 1 <= n <= config.layers:
        raise ValueError(f"{n} stages for {config.layers} layers: use 1 to {config.layers} stages "
                         f"(ranks x chunks), or more layers")
    block = sum(map(config.active, range(config.layers))) / config.layers
    head = config.vocab_size * config.dim
    scores = config.seq_len * config.heads * config.head_dim
    load = [0.0] * (n - 1) + [head / (block + scores)]
    counts = [0] * n
    for _ in range(config.layers):              # one block each, then to who has least to do
        i = min(range(n), key=lambda i: (counts[i] > 0, load[i] + counts[i]))
        counts[i] += 1
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts)]


def pick(logits, temperature, top_k, generator):            # (B, V) -> (B, 1)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
