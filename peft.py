"""Parameter-efficient fine-tuning: freeze a model, train a few new parameters beside it.

    adapt(model, "lora", rank=8)      train p.requires_grad; then save_adapter(model, folder)

    lora      W x + s B A x           s = alpha / r; A (r, in) random, B (out, r) = 0: step 0 is the
                                      base. Were both 0, both gradients would be, for ever
    dora      m_i (W + s B A)_i / |(W + s B A)_i|     for rows i: a length that is learnt, and LoRA
    ia3       l * (k or v), W (l * x) in the MLP      l = 1
    bitfit    b + d                             biases only             d = 0
    adapter   y + up(relu(down(y)))             after attention and after the MLP; up = 0
    prefix    every attention also sees P keys and values of its own; an MLP a layer (the paper: one
              for all) makes them, and is not saved (reparametrize=False: none, P-tuning v2)
    prompt    P vectors before the embedded text;    p_tuning: the same, made by an MLP or LSTM

    methods that change what a layer computes            methods that add to what a model reads
    x --+-- W (frozen) --(+)-- y                         [p p p] x x x --> blocks --> [cut] y y y
        '-- A -- s B -----'                              k v of each layer: [p p p] k k k

Cost      r (in + out) parameters a layer for LoRA instead of in * out: gradient and Adam's moments,
          12 bytes in fp32, for each of few; backward still passes through W, but needs no gradient
          of it: about 2/3 of the FLOPs. Merged, it costs nothing; prefix and prompt: P more keys
Paper     Hu et al. 2021, LoRA, section 4 (arXiv 2106.09685); Kalajdzievski 2023, rsLoRA
          (2312.03732); Liu et al. 2024, DoRA, section 4 (2402.09353); Li & Liang 2021, prefix, 4.2
          and 4.3 (2101.00190); Lester et al. 2021, prompt (2104.08691); Liu et al. 2021, P-tuning,
          section 3 (2103.10385); Liu et al. 2022, v2 (2110.07602); Houlsby et al. 2019, adapter,
          2.1 (1902.00751); Liu et al. 2022, IA3, 3.3 (2205.05638); Ben Zaken et al. 2022, BitFit
          (2106.10199)
Run       python peft.py            claims and figures/peft.png
Left out  quantized bases (QLoRA), LoRA for convolutions, embeddings and stacked experts, adapters
          of several tasks in one batch; so of a model with experts the attention alone
"""

import argparse
import copy
import functools
import json
import math
import os
import pathlib
import sysconfig
import tempfile
import time
import zlib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Beside these names of layers, if no targets are given (this project's, Llama's, GPT-2's, T5's):
HEADS = "head", "lm_head"                       # lora and dora: all linear layers but those
KEYS_VALUES, DOWNS = ("k", "v", "k_proj", "v_proj"), ("down", "down_proj", "wo")
SUBLAYERS = "attn", "self_attn", "mlp"


def is_linear(layer):
    """Whose product can be changed: others, such as nn.MultiheadAttention's, may bypass forward."""
    own = getattr(layer, "product", None)               # tp.py's layers; a module: amp.py's fp8
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D" or (
        own is not None and not isinstance(own, nn.Module))


def matrix(layer):
    """The weight as (out, in): transformers' Conv1D holds (in, out)."""
    return layer.weight.mT if type(layer).__name__ == "Conv1D" else layer.weight


def wide(t, p):
    """t where p is, in p's type, but at least in float32: 16 bits would round small steps away."""
    return t.to(p.device, torch.promote_types(p.dtype, torch.float32))


def matches(name, targets):
    """The last parts of a dotted name: "v_proj" is no part of "video_proj"."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


class Change(nn.Module):
    """Beside a layer: before(x), after(W x, x), bias(b) if it is y = W x + b; output(y) for any."""

    def before(self, x):
        return x

    def after(self, y, x):
        return y

    def bias(self, b):
        return b

    def output(self, y):
        return y


class LinearChange(Change):
    """Beside layers of tp.py: a rank holds a part of W, cut along dimension `cut`. A parameter that
    is cut, too, is marked as W is; a whole one goes through share(): its gradient is a sum."""

    def __init__(self, layer):
        super().__init__()
        self.cut = layer.weight.shard[1] if hasattr(layer.weight, "shard") else None
        self.out_features, self.in_features = matrix(layer).shape
        self.layer = [layer]                    # in a list: no child of this module

    def parameter(self, t, cut=None):           # cut: along that dimension
        p = nn.Parameter(wide(t, self.layer[0].weight).contiguous())    # else fused AdamW errs
        if cut is not None:
            p.shard = ("tp", cut)
        return p

    def share(self, p):
        return p if self.cut is None or hasattr(p, "shard") else self.layer[0].share(p)


class LoRA(LinearChange):
    """A (r, in), B (out, r). rslora: scale alpha / sqrt(r), for large r.
    dora: also m (out,), the lengths of W's rows; a row of zeros stays so."""

    def __init__(self, name, layer, generator, rank=8, alpha=16, dropout=0.0, rslora=False,
                 dora=False):
        super().__init__(layer)
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"rank={rank}: at least 1; dropout={dropout}: from 0 to below 1")
        if dora and self.cut == 1:
            raise ValueError(f"dora needs whole rows of {name}: use lora, or no tensor parallelism")
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout, (n, i) = nn.Dropout(dropout), (1, 0)
        if self.cut == 1:
            n, i = dist.get_world_size(layer.group), dist.get_rank(layer.group)
        bound = (n * self.in_features) ** -0.5              # as nn.Linear starts, and peft's A
        whole = torch.empty(rank, n * self.in_features).uniform_(-bound, bound, generator=generator)
        self.A = self.parameter(whole.chunk(n, 1)[i], 1 if self.cut == 1 else None)
        self.B = self.parameter(torch.zeros(self.out_features, rank), 0 if self.cut == 0 else None)
        rows = 0 if self.cut == 0 else None
        W = matrix(layer).detach()
        self.m = self.parameter(wide(W, W).norm(dim=1), rows) if dora else None

    def delta(self):                                        # (out, in)
        return self.scale * self.B @ self.A

    def stretch(self):                          # the length is a constant for backward (DoRA, 4.3)
        length = (matrix(self.layer[0]) + self.delta()).norm(dim=1).detach()
        return self.m / length.masked_fill(length == 0, 1)

    def after(self, y, x):
        h = F.linear(self.dropout(x).to(self.A.dtype), self.share(self.A))
        y = y + self.scale * F.linear(h, self.share(self.B)).to(y.dtype)
        return y if self.m is None else y * self.stretch().to(y.dtype)

    def merged(self, weight, b):
        weight = weight + self.delta()
        return weight if self.m is None else self.stretch()[:, None] * weight, b


class IA3(LinearChange):
    """l scales the output; for the names in feedforward, the input."""

    def __init__(self, name, layer, generator, feedforward=DOWNS):
        super().__init__(layer)
        self.on_input = matches(name, feedforward)
        width = self.in_features if self.on_input else self.out_features
        if self.cut is not None and layer.bias is not None and not self.on_input:
            raise ValueError(f"ia3 scales the bias of {name}, too: not with tensor parallelism")
        dim = 1 if self.on_input else 0
        self.l = self.parameter(torch.ones(width), 0 if self.cut == dim else None)

    def before(self, x):
        return x * self.share(self.l).to(x.dtype) if self.on_input else x

    def after(self, y, x):
        return y if self.on_input else y * self.share(self.l).to(y.dtype)

    def bias(self, b):
        return b if self.on_input else b * self.l

    def merged(self, weight, b):
        return weight * (self.l if self.on_input else self.l[:, None]), None if b is None else (
            self.bias(b))


class BitFit(Change):
    """d is added to the bias: of a linear layer, or of a norm."""

    def __init__(self, name, layer, generator):
        super().__init__()
        if getattr(layer, "bias", None) is None:
            raise ValueError(f"bitfit: {name} has no bias to train: use another method or targets")
        self.d = nn.Parameter(wide(torch.zeros_like(layer.bias), layer.bias))
        if hasattr(layer.bias, "shard"):
            self.d.shard = layer.bias.shard
        # Not in the product where that is a rank's term of a sum: d would count n times.
        self.in_product = is_linear(layer) and getattr(layer.weight, "shard", (0, 0))[1] == 0

    def after(self, y, x):
        return y + self.d.to(y.dtype) if self.in_product else y

    def output(self, y):
        return y if self.in_product else y + self.d.to(y.dtype)

    def merged(self, weight, b):
        return weight, b + self.d


class Bottleneck(Change):
    """Houlsby's adapter: y + up(relu(down(y))), y a sublayer's output, before the residual."""

    def __init__(self, name, layer, generator, bottleneck=16):
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"bottleneck={bottleneck}: at least 1")
        if hasattr(layer, "router"):            # moe.py's
            width = layer.router.in_features
        else:
            width = matrix([m for m in layer.modules() if is_linear(m)][-1]).shape[0]
        like = next(layer.parameters())
        start = torch.empty(bottleneck, width).normal_(0, width ** -0.5, generator=generator)
        self.down = nn.Parameter(wide(start, like))
        self.up = nn.Parameter(wide(torch.zeros(width, bottleneck), like))
        self.inner = nn.Parameter(wide(torch.zeros(bottleneck), like))      # biases
        self.outer = nn.Parameter(wide(torch.zeros(width), like))

    def output(self, y):
        h = F.relu(F.linear(y.to(self.down.dtype), self.down, self.inner))
        return y + F.linear(h, self.up, self.outer).to(y.dtype)


class Encoder(Change):
    """P vectors of some width: parameters, or what an MLP or LSTM makes of parameters."""

    def __init__(self, like, generator, length, width, encoder=None, hidden=128):
        super().__init__()
        if length < 1 or encoder not in (None, "mlp", "lstm"):
            raise ValueError(f"length={length}: at least 1; encoder={encoder!r}: mlp, lstm or None")
        if encoder and (hidden < 1 or encoder == "lstm" and hidden % 2):
            raise ValueError(f"hidden={hidden}: at least 1, for lstm even: half for each direction")
        inner = hidden if encoder else width
        start = torch.empty(length, inner).normal_(0, 1 if encoder else 0.1, generator=generator)
        self.vectors, self.kind = nn.Parameter(wide(start, like)), encoder
        if encoder:
            if encoder == "lstm":
                self.lstm = nn.LSTM(hidden, hidden // 2, bidirectional=True)
            self.layers = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(),
                                        nn.Linear(hidden, width))
            with torch.no_grad():               # by this generator: any layout starts alike
                for p in [p for name, p in self.named_parameters() if name != "vectors"]:
                    p.uniform_(-1, 1, generator=generator).mul_(p.shape[-1] ** -0.5)
            self.to(self.vectors)

    def forward(self):                                      # (P, width)
        if self.kind is None:
            return self.vectors.clone()         # no Parameter: ZeRO-3 frees those in between
        h = self.lstm(self.vectors)[0] if self.kind == "lstm" else self.vectors
        return self.layers(h)


class Prefix(TorchFunctionMode):
    """While an attention module runs: scaled_dot_product_attention sees P more keys and values."""

    def __init__(self, made, heads):
        super().__init__()
        self.made, self.heads, self.calls = made, heads, 0      # made: (P, 2 K D)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        names = "query", "key", "value", "attn_mask", "dropout_p", "is_causal"
        given = dict(zip(names, args)) | kwargs
        q, k, v, mask = (given.pop(name, None) for name in names[:4])
        B, P, T, S = len(k), len(self.made), q.shape[2], k.shape[2]
        both = self.made.view(P, 2, self.heads, -1).permute(1, 2, 0, 3).to(k.dtype)
        both = both.repeat_interleave(k.shape[1] // self.heads, 1)      # (2, heads of k, P, D)
        more_k, more_v = both[:, None].expand(-1, B, -1, -1, -1)
        if given.pop("is_causal", False):
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            mask = F.pad(mask, (P, 0), value=True if mask.dtype == torch.bool else 0.0)
        k, v = torch.cat([more_k, k], 2), torch.cat([more_v, v], 2)
        return func(q, k, v, attn_mask=mask, **given)


# ------------------------------------------------------------------ where it is put

def current(place):
    """The Change (or other module) that works here now, or None."""
    return place.adapters[place.adapter] if place.adapter in place.adapters else None


def product(layer, plain, x, weight, b=None):
    """plain(x, weight, b), changed."""
    change = None if layer.merged else current(layer)
    if change is None:
        return plain(x, weight, b)
    y = change.after(plain(change.before(x), weight), x)
    return y if b is None else y + change.bias(b).to(y.dtype)


def linear(layer, x):
    """Takes the place of forward() of a nn.Linear or Conv1D."""
    return product(layer, F.linear, x, matrix(layer), layer.bias)


def on_output(place, args, output):             # a forward hook
    change = None if place.merged else current(place)
    if change is None:
        return output
    if isinstance(output, tuple):               # transformers' attention: (y, scores)
        return change.output(output[0]), *output[1:]
    return change.output(output)


def before_attention(place, args):
    if isinstance(current(place), Encoder):
        place.modes.append(Prefix(current(place)(), place.key_heads))
        place.modes[-1].__enter__()


def after_attention(place, args, output):       # always called, also after an error
    if place.modes:
        mode = place.modes.pop()
        mode.__exit__(None, None, None)
        if mode.calls != 1 and output is not None:
            raise RuntimeError(f"prefix: {type(place).__name__} called F.scaled_dot_product_"
                               f"attention {mode.calls} times, not once: it must attend by that")


def before_model(model, args, kwargs):
    """P ids, no matter which, at the place of the prompt: positions, masks and losses then fit."""
    prompt = current(model)
    if prompt is None:
        return None
    names = "tokens", "targets"
    given = dict(zip(names, args)) | {{"input_ids": "tokens", "labels": "targets"}.get(k, k): v
                                      for k, v in kwargs.items()}
    if len(args) > 2 and any(x for x in args[2:] if not torch.is_tensor(x)) or any(
            given.get(key) for key in ("cache", "past_key_values", "use_cache")):
        raise ValueError("prompt: decoding with a cache would put the prompt before each token: "
                         "use_cache=False")
    mask = given.get("attention_mask")
    other = [key for key in ("position_ids", "inputs_embeds", "logits_to_keep", "memory")
             if given.get(key) is not None] + ["return_dict=False"] * (
                 given.get("return_dict") is False) + ["a mask of 4 dimensions"] * (
                     mask is not None and mask.dim() != 2)
    if other or "tokens" not in given:
        raise ValueError(f"prompt: {other or 'no tokens'}: give tokens, labels and a (B, T) mask "
                         f"only; so transformers' generate() cannot, decode in a loop")
    tokens, at, P = given["tokens"], prompt.at, len(prompt.vectors)
    if tokens.shape[1] < at:
        raise ValueError(f"prompt: {tokens.shape[1]} tokens, but it stands after {at} of them")

    def widened(t, value):
        return torch.cat([t[:, :at], t.new_full((len(t), P), value), t[:, at:]], 1)

    new = {"tokens": widened(tokens, 0)}
    for key, value in ("targets", -100), ("attention_mask", 1):
        if given.get(key) is not None:
            new[key] = widened(given[key], value)
    model.prompt_made = prompt(), at            # in a tuple: an attribute would be a parameter
    args = [new.get(name, x) for name, x in zip(names, args)] + list(args[2:])
    kwargs = {k: new.get({"input_ids": "tokens", "labels": "targets"}.get(k, k), v)
              for k, v in kwargs.items()}
    return tuple(args), kwargs


def on_embedding(model, embedding, args, x):    # (B, T, C): the prompt in place of its P ids
    if model[0].prompt_made is None:
        return x
    made, at = model[0].prompt_made
    made = made.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :at], made, x[:, at + made.shape[1]:]], 1)


def after_model(model, args, kwargs, output):   # always called; logits of the text only
    made, model.prompt_made = model.prompt_made, None
    if made is None or output is None:
        return output
    P, at = len(made[0]), made[1]

    def cut(t):
        return torch.cat([t[:, :at], t[:, at + P:]], 1)

    if torch.is_tensor(output):
        return cut(output)
    if isinstance(output, tuple):
        return output[0] if output[0] is None else cut(output[0]), *output[1:]
    output["logits"] = cut(output["logits"])
    return output


METHODS = {"lora": LoRA, "dora": functools.partial(LoRA, dora=True), "ia3": IA3, "bitfit": BitFit,
           "adapter": Bottleneck, "prefix": Encoder, "prompt": Encoder, "p_tuning": Encoder}


def places_of(model, method, targets):
    """-> {name: module}: where the method puts something. ValueError: a target that is nowhere."""
    if isinstance(targets, str):
        raise ValueError(f"targets={targets!r}: give a list of names")
    modules = {name: m for name, m in model.named_modules() if "adapters" not in name.split(".")}
    if method in ("prompt", "p_tuning"):
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{method}: not for an encoder and decoder")
        return {"": model}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    keys = {name: next((getattr(m, k) for k in ("k", "k_proj") if hasattr(m, k)), None)
            for name, m in modules.items() if hasattr(m, "head_dim")}
    tests = {"adapter": lambda name, m: any(map(is_linear, m.modules())),
            "prefix": lambda name, m: keys.get(name) is not None,
            "bitfit": lambda name, m: isinstance(getattr(m, "bias", None), nn.Parameter) and (
                is_linear(m) or getattr(m, "weight", m.bias).dim() == 1)}
    fits = tests.get(method, lambda name, m: is_linear(m))
    containers = nn.Sequential, nn.ModuleList, nn.ModuleDict       # a child more would run, too
    able = {name: m for name, m in modules.items()
            if fits(name, m) and not isinstance(m, containers)      # a router's forward never runs
            and m is not getattr(modules.get(name.rpartition(".")[0]), "router", None)
            and m is not getattr(modules.get(name.rpartition(".")[0]), "noise", None)}
    if targets is None:
        kept = {"ia3": KEYS_VALUES + DOWNS, "adapter": SUBLAYERS}.get(method)
        found = {name: m for name, m in able.items() if (
            matches(name, kept) if kept else method in ("prefix", "bitfit")
            or not matches(name, HEADS) and m is not output)}
    else:
        found = {name: m for name, m in able.items() if matches(name, targets)}
        for target in targets:
            if not any(matches(name, [target]) for name in found):
                names = ", ".join(sorted({n.split(".")[-1] for n in able}))
                raise ValueError(f"{method}: it can change no layer named {target!r}; there are "
                                 f"{names}")
    if not found:
        names = ", ".join(sorted({n.split(".")[-1] for n in able})) or "none that fit"
        raise ValueError(f"{method}: no layer has a usual name: give targets=[...], of {names}")
    return found


def build(model, method, targets, seed, config):
    """-> {name of a place: (module, what is to be put there)}; the model does not change yet."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: pick {', '.join(METHODS)}")
    config, built = dict(config), {}
    for name, place in places_of(model, method, targets).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        arguments = (name, place, generator)
        if METHODS[method] is Encoder:
            own = {"length": config.get("length", 16), "hidden": config.get("hidden", 128)}
            if method == "prefix":
                k = getattr(place, "k", None) or place.k_proj
                if hasattr(k.weight, "shard"):
                    raise ValueError("prefix: not with tensor parallelism")
                own["encoder"] = "mlp" if config.get("reparametrize", True) else None
                arguments = (k.weight, generator, own.pop("length"), 2 * matrix(k).shape[0])
            else:
                embedding = embedding_of(model)
                if getattr(embedding, "sequence_parallel", False):
                    raise ValueError(f"{method}: not with sequence parallelism")
                own["encoder"] = config.get("encoder", "mlp") if method == "p_tuning" else None
                arguments = (embedding.weight, generator, own.pop("length"),
                             embedding.embedding_dim)
            known = {"prefix": {"length", "hidden", "reparametrize"}, "prompt": {"length", "at"},
                     "p_tuning": {"length", "hidden", "encoder", "at"}}[method]
            if config.keys() - known:
                raise ValueError(f"{method} has no {sorted(config.keys() - known)}: use "
                                 f"{sorted(known)}")
            if config.get("at", 0) < 0:
                raise ValueError(f"at={config['at']}: tokens before the prompt, at least 0")
            built[name] = place, Encoder(*arguments, **own)
            built[name][1].at = config.get("at", 0)
            continue
        try:
            built[name] = place, METHODS[method](*arguments, **config)
        except TypeError as error:
            raise ValueError(f"{method}: {error}") from error
    return built


def embedding_of(model):
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()
    return next(m for m in model.modules() if isinstance(m, nn.Embedding))


def adapt(model, method, name="default", targets=None, seed=0, **config):
    """Freeze the model, put a method's parameters beside its layers, in place; make them `name`,
    the active one. method: see the top.

    targets     names of layers, or last parts of them; None: those that the method is known for
    lora, dora  rank=8, alpha=16, dropout=0.0, rslora=False     adapter  bottleneck=16
    ia3         feedforward=(down, down_proj, wo): where l scales the input
    prefix      length=16, hidden=128, reparametrize=True       prompt   length=16, at=0
    p_tuning    length=16, hidden=128, encoder="mlp" or "lstm", at=0 (tokens before it)
    ValueError, before anything changes: a method, name, target or number that does not fit."""
    check_free(model, name)
    attach(model, name, method, build(model, method, targets, seed, config), config)


def check_free(model, name):
    try:
        nn.ModuleDict({name: nn.Identity()})
    except (KeyError, TypeError) as problem:
        raise ValueError(f"name={name!r}: {problem}: pick another") from problem
    if name in getattr(model, "peft", {}):
        raise ValueError(f"there is an adapter {name!r}: give this one another name=")
    if any(place.merged for place in places(model).values()):
        raise ValueError("an adapter is merged: unmerge() first")


def attach(model, name, method, built, config):
    for p in model.parameters():
        p.requires_grad_(False)
    for key, (place, change) in built.items():
        prepare(model, place, method)
        place.adapters[name] = change
        change.train(place.training)
    model.peft = {**getattr(model, "peft", {}), name: (method, dict(config))}
    activate(model, name)


def prepare(model, place, method):
    """Once a place: let what is in place.adapters work."""
    if not hasattr(place, "adapters"):
        place.adapters, place.adapter, place.merged = nn.ModuleDict(), None, False
        if hasattr(place, "product"):
            place.product = functools.partial(product, place, place.product)
        elif is_linear(place):
            place.forward = functools.partial(linear, place)
        if place is not model:
            place.register_forward_hook(on_output)
    if method == "prefix" and not hasattr(place, "modes"):
        k, place.modes = getattr(place, "k", None) or place.k_proj, []
        place.key_heads = matrix(k).shape[0] // place.head_dim
        place.register_forward_pre_hook(before_attention)
        place.register_forward_hook(after_attention, always_call=True)
    if place is model and not hasattr(model, "prompt_made"):
        model.prompt_made = None
        model.register_forward_pre_hook(before_model, with_kwargs=True)
        model.register_forward_hook(after_model, with_kwargs=True, always_call=True)
        embedding_of(model).register_forward_hook(functools.partial(on_embedding, [model]))


def places(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "adapters")}


def activate(model, name):
    """Let adapter `name` work, and be trained; None: the base alone."""
    if name is not None and name not in getattr(model, "peft", {}):
        raise ValueError(f"no adapter {name!r}: there are {list(getattr(model, 'peft', {}))}")
    if any(place.merged for place in places(model).values()):
        raise ValueError("an adapter is merged: unmerge() first")
    for place in places(model).values():
        place.adapter = name
        for key, change in place.adapters.items():
            change.requires_grad_(key == name)


@torch.no_grad()
def merge(model):
    """Write the active adapter into the base's weights: then it costs nothing. The originals are
    kept on the CPU, for unmerge(). ValueError: a method that is no change of weights."""
    todo = [(name, place, current(place)) for name, place in places(model).items()
            if current(place) is not None]
    uses = {}
    for name, m in model.named_modules():       # each once, whatever its names: it is one place
        for p in m.parameters(recurse=False):
            uses.setdefault(p, set()).add(name)
    for name, place, change in todo:
        if not hasattr(change, "merged"):
            raise ValueError(f"{type(change).__name__} is no change of weights: not to be merged")
        if place.merged:
            raise ValueError("merged already: unmerge() first")
        if len(uses[place.weight]) > 1:
            raise ValueError(f"{name}'s weight is also {sorted(uses[place.weight] - {name})}'s: "
                             f"merged, it would change there, too")
    for name, place, change in todo:
        b = getattr(place, "bias", None)
        place.original = [t.cpu().clone() for t in (place.weight, b) if t is not None]
        weight = matrix(place) if is_linear(place) else place.weight
        weight, new_b = change.merged(weight.clone(), b)
        (matrix(place) if is_linear(place) else place.weight).copy_(weight)
        if b is not None:
            b.copy_(new_b)
        place.merged = True


@torch.no_grad()
def unmerge(model):
    """The base's weights as they were, bit for bit."""
    for place in places(model).values():
        if place.merged:
            for t, was in zip((place.weight, getattr(place, "bias", None)), place.original):
                t.copy_(was)
            place.merged, place.original = False, None


# ------------------------------------------------------------------ files

def safetensors():
    try:
        import safetensors.torch
    except ImportError as missing:
        raise ImportError("adapters are files of safetensors: pip install safetensors") from missing
    return safetensors.torch


def gathered(p, layer):
    """p whole, on all ranks, if tp.py's layer holds a part of it."""
    if not hasattr(p, "shard"):
        return p
    parts = [torch.empty_like(p) for _ in range(dist.get_world_size(layer.group))]
    dist.all_gather(parts, p.contiguous(), group=layer.group)
    return torch.cat(parts, p.shard[1])


# Keys of Hugging Face's adapter_config.json that change nothing, or that we know. Others must be
# off: pissa and olora (init_lora_weights), for instance, have changed the base itself.
HARMLESS = set("""peft_type peft_version auto_mapping base_model_name_or_path revision task_type
    inference_mode r lora_alpha lora_dropout target_modules exclude_modules use_rslora use_dora
    fan_in_fan_out layers_to_transform layers_pattern megatron_core qalora_group_size""".split())
# What that library calls our parameters; other methods have names of ours.
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}


@torch.no_grad()
def state_of(built, method, rename=None):
    """{name in the file: (parameter or what an encoder makes, its layer)}"""
    rename, state = rename or (lambda name: name), {}
    for key, (place, change) in built.items():
        if method in ("lora", "dora"):
            state |= {f"base_model.model.{rename(key)}.{NAMES[part]}": (p, place)
                      for part, p in change.named_parameters()}
        elif isinstance(change, Encoder):
            made = change() if change.kind else change.vectors
            state[f"{key}.vectors".lstrip(".")] = made, place
        else:
            state |= {f"{key}.{part}": (p, place) for part, p in change.named_parameters()}
    return state


@torch.no_grad()
def save_adapter(model, folder, name="default", rename=None):
    """Write adapter `name`, nothing of the base, to a new folder: adapter_config.json and
    adapter_model.safetensors, for lora and dora as Hugging Face's peft writes and reads them.
    rename: of a layer of this model -> its name in Hugging Face's. All ranks may call it, those of
    a split adapter must; else rank 0 alone looks, writes and raises. ValueError: the folder exists.
    """
    if name not in getattr(model, "peft", {}):
        raise ValueError(f"no adapter {name!r}: there are {list(getattr(model, 'peft', {}))}")
    folder, (method, config) = pathlib.Path(folder), model.peft[name]
    built = {key: (place, place.adapters[name]) for key, place in places(model).items()
             if name in place.adapters}
    parts = state_of(built, method, rename)
    rank = dist.get_rank() if dist.is_initialized() else 0
    split = any(hasattr(p, "shard") for p, _ in parts.values())
    if rank > 0 and not split:
        return
    if folder.exists():
        raise ValueError(f"{folder} exists: nothing is overwritten, name another folder")
    if split:
        dist.barrier()                                      # all have looked: now it may come
    state = {key: gathered(p, place).detach().cpu().contiguous()
             for key, (p, place) in parts.items()}
    targets = [rename(key) if rename else key for key in built]
    if method in ("lora", "dora"):
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
                     "base_model_name_or_path": None, "target_modules": targets,
                     "r": config.get("rank", 8), "lora_alpha": config.get("alpha", 16),
                     "lora_dropout": config.get("dropout", 0.0), "use_dora": method == "dora",
                     "use_rslora": config.get("rslora", False)}
    else:
        kept = {k: v for k, v in config.items() if k not in ("reparametrize", "encoder", "hidden")}
        described = {"peft_type": method, "targets": list(built), "config": kept}
    if rank > 0:
        return
    beside = folder.with_name(f".{folder.name}.unfinished")
    beside.mkdir(parents=True, exist_ok=True)
    (beside / "adapter_config.json").write_text(json.dumps(described, indent=2))
    safetensors().save_file(state, beside / "adapter_model.safetensors")
    os.replace(beside, folder)                              # complete, or not there


@torch.no_grad()
def load_adapter(model, folder, name="default", rename=None):
    """Put a saved adapter into the model, as `name`, active. lora and dora: also of Hugging Face's
    peft. ValueError, before anything changes: another method, or a layer or a shape that is not
    this model's."""
    described = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
    state = safetensors().load_file(pathlib.Path(folder, "adapter_model.safetensors"))
    check_free(model, name)
    method = described.get("peft_type")
    if method not in METHODS and method != "LORA":
        raise ValueError(f"{folder}: peft_type={method!r}: of the library's methods only LORA is "
                         f"read here")
    if method == "LORA":
        for key, value in described.items():
            plain = {"bias": "none", "init_lora_weights": (True, "gaussian")}.get(key, ())
            if key not in HARMLESS and value and value not in plain:
                raise ValueError(f"{folder}: {key}={value!r} is unknown here: merge it into its "
                                 f"base by the library that made it")
        method = "dora" if described.get("use_dora") else "lora"
        config = {"rank": described["r"], "alpha": described["lora_alpha"],
                  "dropout": described.get("lora_dropout", 0.0),
                  "rslora": described.get("use_rslora", False)}
        rename = rename or (lambda key: key)
        here = {rename(key): key for key, m in model.named_modules() if is_linear(m)}
        there = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in state}
        if there - here.keys():
            raise ValueError(f"{folder}: this model has no linear layer "
                             f"{min(there - here.keys())}: it is of another model, or rename= is "
                             f"missing")
        targets = [here[key] for key in there]
    else:
        targets, config = described["targets"], described["config"]
        if method in ("prefix", "p_tuning"):    # the file holds what the encoder made
            config |= {"reparametrize": False} if method == "prefix" else {"encoder": None}
        targets = None if method in ("prompt", "p_tuning") else targets
    built = build(model, method, targets, 0, config)
    mine = state_of(built, method, rename)
    for key in sorted(mine.keys() | state.keys()):              # gathered(): all ranks alike
        shapes = [tuple(gathered(mine[key][0], mine[key][1]).shape) if key in mine else None,
                  tuple(state[key].shape) if key in state else None]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{folder}: {key} has shape {shapes[1]}, in this model {shapes[0]}")
    for key, (p, place) in mine.items():
        part = state[key]
        if hasattr(p, "shard"):
            n, i = dist.get_world_size(place.group), dist.get_rank(place.group)
            part = part.chunk(n, p.shard[1])[i]
        p.copy_(part)
    attach(model, name, method, built, config)


# ------------------------------------------------------------------ demo

class Attn(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.head_dim = C // heads
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
                      .flatten(2))


class MLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """A small GPT: bytes (B, T) -> logits (B, T, 256)."""

    def __init__(self, C=48, layers=2, T=96):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(C), "attn": Attn(C, 4), "norm2": nn.LayerNorm(C), "mlp": MLP(C)})
            for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 256)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x))


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def texts():
    """Windows of 65 bytes: Python's source, and the English of its manual."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    code = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[:2_000_000]
    manual = (library / "pydoc_data" / "topics.py").read_text()
    manual = manual.encode().decode("unicode_escape", "ignore").encode("utf-8", "ignore")
    return [torch.tensor(list(text)).unfold(0, 65, 1) for text in (code, manual)]


def loss_of(model, windows):
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(model, windows, lr, steps):
    """AdamW on the first 9 tenths -> ms of a step (median)."""
    generator, times = torch.Generator().manual_seed(0), []
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    for step in range(steps):
        began = time.perf_counter()
        adamw.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = windows[torch.randint(len(windows) * 9 // 10, (12,), generator=generator)]
        loss_of(model, batch).backward()
        adamw.step()
        adamw.zero_grad()
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times)[steps // 2]


@torch.no_grad()
def held_out(model, windows):
    last = windows[len(windows) * 9 // 10:]
    return loss_of(model.eval(), last[::len(last) // 128]).item()


# method: learning rates to try, settings
RUNS = {"all weights": ((3e-3, 1e-2, 3e-2), {}), "lora": ((1e-2, 3e-2, 1e-1), {}),
        "dora": ((1e-2, 3e-2, 1e-1), {}), "adapter": ((1e-2, 3e-2, 1e-1), {}),
        "bitfit": ((3e-2, 1e-1, 3e-1), {}), "ia3": ((1e-1, 3e-1, 1.0), {}),
        "prefix": ((3e-2, 1e-1, 3e-1), {"hidden": 32}), "prompt": ((1e-1, 3e-1, 1.0), {}),
        "p_tuning": ((3e-3, 1e-2, 3e-2), {"hidden": 32})}


def file_bytes(model):
    """Of the saved adapter; of a model without one, its weights in float32."""
    if not hasattr(model, "peft"):
        return sum(p.nbytes for p in model.parameters())
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, f"{folder}/adapter")
            return pathlib.Path(folder, "adapter", "adapter_model.safetensors").stat().st_size
    except ImportError:
        return math.nan


def adapted(base, method, **config):            # a copy of it
    model = copy.deepcopy(base)
    if method != "all weights":
        adapt(model, method, **config)
    return model


def demo_claims(base, windows):
    tokens = windows[:8, :-1]
    want = base(tokens)
    for method in ("lora", "dora", "adapter", "bitfit", "ia3"):
        error = (adapted(base, method)(tokens) - want).abs().max().item()
        check(error <= 1e-5, f"{method}: at step 0 the model is the base", f"{error:.0e} (<= 1e-5)")
    for start, claim in ((0.0, "A = 0 and B = 0: no gradient, it never learns"),
                         (1.0, "A random and B = 0: it learns")):
        model = adapted(base, "lora")
        changes = [place.adapters["default"] for place in places(model).values()]
        for change in changes:
            change.A.data *= start
        loss_of(model, windows[:8]).backward()
        largest = max(p.grad.abs().max().item() for change in changes for p in (change.A, change.B))
        check((largest > 0) == (start > 0), claim, f"largest gradient {largest:.0e}")
    model = adapted(base, "lora", rank=4)
    train(model, windows, 1e-2, 20)
    before = {name: p.clone() for name, p in model.named_parameters()}
    bytes_equal = all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    with torch.no_grad():
        y = model(tokens)
        merge(model)
        error = (model(tokens) - y).abs().max().item()
        unmerge(model)
    back = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    check(bytes_equal, "20 steps of lora: the base's weights are what they were", "bit for bit")
    check(error <= 1e-4 and back, "merged = unmerged; unmerge gives back the weights",
          f"{error:.0e} (<= 1e-4), bit for bit")
    try:
        safetensors()
    except ImportError as missing:
        return print(f"skipped: files ({missing})")
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, f"{folder}/adapter")
        other = copy.deepcopy(base)
        load_adapter(other, f"{folder}/adapter")
        size = sum(path.stat().st_size for path in pathlib.Path(folder, "adapter").iterdir())
    whole = sum(p.nbytes for p in base.parameters())
    check(torch.equal(other(tokens), y), "saved and loaded into the base: the same outputs",
          f"{size:,} bytes, the base has {whole:,}")


def demo(steps=100):
    torch.manual_seed(0)
    code, manual = texts()
    base = Net()
    train(base, code, 5e-3, 6 * steps)
    start = held_out(base, manual), held_out(base, code)
    demo_claims(base, manual)
    print(f"\n{steps} steps on the English of Python's manual, from a base that knows Python code; "
          f"nats a held-out byte\n{'':<12} {'trained':>8} {'share':>7} {'of Adam':>9} {'file':>9} "
          f"{'rate':>6} {'manual':>7} {'code':>6}  a step\n"
          f"{'the base':<53} {start[0]:>11.3f} {start[1]:>6.3f}")
    rows = {}
    for method, (rates, config) in RUNS.items():
        for lr in rates:
            model = adapted(base, method, **config)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            ms = train(model, manual, lr, steps)
            row = held_out(model, manual), held_out(model, code), count, lr, ms, file_bytes(model)
            rows[method] = min(rows.get(method, row), row)
        loss, forgot, count, lr, ms, size = rows[method]
        share = count / sum(p.numel() for p in base.parameters())
        print(f"{method:<12} {count:>8,} {share:>7.2%} {8 * count:>7,} B {size:>7,} B {lr:>6g} "
              f"{loss:>7.3f} {forgot:>6.3f}  {ms:.1f} ms")
    print()
    full, lora = rows["all weights"], rows["lora"]
    inside = {method for method, row in rows.items() if row[3] == sorted(RUNS[method][0])[1]}
    larger = {method for method in inside if rows[method][3] > full[3]}     # no end of its range
    check("all weights" in inside and len(larger) > len(rows) / 2,
          "most methods' best rates are larger than all weights'",
          f"not so: {', '.join(rows.keys() - larger - {'all weights'}) or 'none'}")
    gain = (start[0] - lora[0]) / (start[0] - full[0])
    check(gain > 0.7, "lora, best rate: most of what training all weights gains", f"{gain:.0%}")
    check(lora[1] < full[1], "lora forgets less of the code",
          f"{lora[1] - start[1]:+.3f}, all weights {full[1] - start[1]:+.3f} nats")
    draw(rows, start)


def draw(rows, start):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    beside = {"dora": (6, -14), "prompt": (6, -14), "ia3": (-5, 7), ("ia3", "right"): (7, -14),
              ("bitfit", "right"): (-45, 5), ("lora", "right"): (-30, 5), "all weights": (-75, 7)}
    for method, (loss, forgot, count, *_) in rows.items():
        color = "C1" if method == "all weights" else "C0"
        for axes, side, x in ((left, "left", count), (right, "right", forgot)):
            axes.plot(x, loss, "o", color=color)
            shift = beside.get((method, side), beside.get(method, (6, 4)))
            axes.annotate(method, (x, loss), xytext=shift, textcoords="offset points",
                          fontsize=11, color=color)
    left.axhline(start[0], color="0.5", ls="--", lw=1)
    left.annotate("the base", (1, start[0]), xycoords=("axes fraction", "data"), xytext=(0, 4),
                  textcoords="offset points", ha="right", color="0.4")
    right.axvline(start[1], color="0.5", ls="--", lw=1)
    right.annotate("the base", (start[1], 0), xycoords=("data", "axes fraction"), xytext=(5, 5),
                   textcoords="offset points", color="0.4")
    left.set(xscale="log", xlabel="trained parameters", title="More parameters learn more ...",
             ylabel="new text, nats per byte")
    right.set(xlabel="old text, nats per byte", title="... and forget more")
    for axes in (left, right):
        axes.margins(x=0.2, y=0.12)
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "peft.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()     # no flags
    demo()
