"""Mixed precision: multiply in 16 or 8 bits, add up and keep what must last in 32.

    format   exponent  mantissa    largest    least      A gradient below half of the least is 0:
    fp32            8        23    3.4e38     1e-45      fp16 needs its loss scaled, bf16 does not.
    bf16            8         7    3.4e38     9e-41      An update below about 2^-(mantissa + 1) of
    fp16            5        10     65504     6e-8       its weight is lost: both need weights in
    e5m2 (fp8)      5         2     57344     1.5e-5     fp32 for the optimizer (or stochastic
    e4m3 (fp8)      4         3       448     0.002      rounding).

    w (fp32) --cast--> w16 --+                        scaled: loss * S
    x -------cast----> x16 --matmul, fp32 sums--> y16 --norms, softmax, loss in fp32--> loss
    step if all finite <-- g / S, in fp32 <-- dw (fp32) <-- dw16 = S g <-- backward <-- S

S doubles every 2000 good steps; a gradient that is inf or NaN on any rank halves it, and all skip.

Cost     states of Adam, bytes a parameter: 16 in fp32 (4 + 4 + 8) and 16 in mixed precision (2 + 2
         + 4 + 8): nothing is saved there. Saved: a third of the activations under autocast, where
         norms and the residual stream stay fp32, half in pure bf16; bytes to move; and the time of
         matmuls (Tensor Cores; H100 SXM's data sheet, dense TFLOP/s: fp32 67 without them, tf32
         495, bf16 and fp16 989, fp8 1979)
Paper    Micikevicius et al. 2018, section 3 (arXiv 1710.03740); Kalamkar et al. 2019 (bfloat16;
         1905.12322); Micikevicius et al. 2022, FP8 formats, table 1 (2209.05433)
Run      python amp.py            claims and figures/amp.png, about 25 s
         python amp.py --bench    times of a linear layer and a small GPT
Left out blocks of 32 with a scale each (MX, NVFP4), optimizer states in 8 bits, fp8 communication,
         sparse gradients, nn.LSTM and its kind (they ask for torch's own autocast; cells work)
"""

import argparse
import contextlib
import copy
import fnmatch
import functools
import math
import pathlib
import random
import statistics
import sysconfig
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

FLOATS = torch.float32, torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# What a region does with an op, by its name; close to torch.autocast's lists for CUDA. Other ops
# take inputs as they come, and promote them as torch always does. A function written in Python that
# calls others (nn.MultiheadAttention's, F.gumbel_softmax) is one op: nobody looks into it.
KIND = {name: kind for kind, names in {
    "low": """linear matmul __matmul__ __rmatmul__ mm mv bmm addmm addmv addr addbmm baddbmm einsum
        inner chain_matmul linalg_matmul linalg_multi_dot linalg_vecdot prelu conv1d conv2d conv3d
        conv_transpose1d conv_transpose2d conv_transpose3d lstm_cell gru_cell rnn_tanh_cell
        rnn_relu_cell scaled_dot_product_attention multi_head_attention_forward""",
    "fp32": """softmax log_softmax softmin logsumexp special_softmax special_log_softmax softplus
        special_logsumexp layer_norm rms_norm group_norm norm linalg_vector_norm linalg_matrix_norm
        normalize renorm dist cdist pdist cosine_similarity sum mean prod cumsum cumprod exp expm1
        log log2 log10 log1p pow __rpow__ reciprocal __rdiv__ rsqrt tan sinh cosh asin acos erfinv
        cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div poisson_nll_loss
        gaussian_nll_loss binary_cross_entropy binary_cross_entropy_with_logits ctc_loss
        hinge_embedding_loss margin_ranking_loss soft_margin_loss multi_margin_loss
        multilabel_margin_loss triplet_margin_loss cosine_embedding_loss""",
    "widest": """cat stack dot vdot tensordot cross bilinear addcdiv addcmul atan2 grid_sample
        index_put scatter_add index_add""",
    }.items() for name in names.split()}


class autocast(contextlib.ContextDecorator):
    """with autocast(torch.bfloat16): forward, loss. Or @autocast(dtype) before a function.

    A parameter is cast once in the outermost region, so open it for a whole step; again after an
    optimizer's step or another change that autograd counts (not p.data = ...), and apart for
    no_grad. The innermost region decides; enabled=False: ops run as they come. float64 is left
    alone. Backward needs no region. What it recomputes sees none, and needs one of its own:
    checkpoint(autocast(dtype)(block), x), or torch's context_fn. fp16 on a CPU: operands rounded
    to fp16, sums in fp32, the result rounded, as on a GPU; torch's own kernels are far slower."""

    def __init__(self, dtype, enabled=True):
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype}: pick torch.bfloat16 or torch.float16")
        self.dtype, self.entered = dtype if enabled else None, []

    def __enter__(self):
        around = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Policy)]
        mode = Policy(self.dtype, around)
        # Needed: fused optimizers change weights without counting it in their _version.
        hook = register_optimizer_step_post_hook(lambda *args: mode.casts.clear())
        self.entered.append((mode, hook))
        mode.__enter__()

    def __exit__(self, *exception):
        mode, hook = self.entered.pop()
        mode.__exit__(*exception)
        hook.remove()


class Policy(TorchFunctionMode):
    """What a region does: torch hands it every call of a torch function, made from Python. The
    regions around it get what it calls, and pass it on as it is."""

    def __init__(self, dtype, around):
        super().__init__()
        self.dtype, self.around, self.passing_on = dtype, around, 0
        self.casts = around[0].casts if around else {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for outer in self.around:
            outer.passing_on += 1
        try:
            return self.call(func, args, kwargs or {})
        finally:
            for outer in self.around:
                outer.passing_on -= 1

    def call(self, func, args, kwargs):
        kind = KIND.get(getattr(func, "__name__", ""))
        off = self.dtype is None or self.passing_on or kwargs.get("out") is not None
        if kind is None or off:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if kind == "fp32" or kind == "widest" and len({t.dtype for t in tensors} & {*FLOATS}) > 1:
            args, kwargs = tree_map(widen, (args, kwargs))
        if kind != "low":
            return func(*args, **kwargs)
        args, kwargs = tree_map(self.cast, (args, kwargs))
        if self.dtype != torch.float16 or any(t.device.type != "cpu" for t in tensors):
            return func(*args, **kwargs)
        args, kwargs = tree_map(widen, (args, kwargs))      # fp16 on a CPU
        return tree_map(self.cast, func(*args, **kwargs))

    def cast(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS or x.dtype == self.dtype:
            return x
        if not isinstance(x, nn.Parameter) or x.is_inference():
            return x.to(self.dtype)
        grad = torch.is_grad_enabled() and x.requires_grad                      # else no gradient
        key = id(x), self.dtype, grad, torch.is_inference_mode_enabled()
        if key not in self.casts or self.casts[key][1] != x._version:
            self.casts[key] = x, x._version, x.to(self.dtype)           # x: that its id stays its
        return self.casts[key][2]


def widen(x):
    low = isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if low else x


def bf16_is_native(device_type):
    """Does the hardware multiply bf16? A CPU without the instruction is slower than in fp32."""
    if device_type != "cpu":
        return device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()    # avx512_bf16, amx_bf16, ...
    return any(value for name, value in has.items() if "bf16" in name)


def all_finite(params):
    """Are all gradients finite? 0-dim, on the parameters' device, without waiting for it."""
    good = torch.ones((), dtype=torch.bool, device=params[0].device)
    finite = [p.grad.isfinite().all().to(good.device) for p in params if p.grad is not None]
    return torch.stack([good, *finite]).all()


class LossScaler:
    """scaler.scale(loss).backward(); scaler.unscale_(optimizer); clip; scaler.step(optimizer);
    scaler.update(). The verbs of torch.amp.GradScaler, with a scale that stays.

    Gradients are divided in their own type, but not fp16 (MasterWeights does it in fp32). If one is
    inf or NaN, on any rank of group (None: of all ranks), step() does nothing, on all. step() also
    unscales, if unscale_() did not. With several optimizers unscale all first: then all step or
    none (GradScaler looks at each alone).
    FloatingPointError: `patience` skipped steps in a row."""

    def __init__(self, init_scale=2.0**16, group=None, patience=20):
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale={init_scale}: must be above 0, and finite")
        self.value, self.group, self.patience = float(init_scale), group, patience
        self.skipped, self.finite, self.stepped = 0, {}, set()

    def get_scale(self):
        return self.value

    def scale(self, loss):
        """-> the loss to call backward() on. One in fp16 is refused: its gradient, the scale, might
        be beyond 65504."""
        if not isinstance(loss, torch.Tensor) or loss.dtype not in (
                torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"loss is {getattr(loss, 'dtype', type(loss))}: give a tensor, "
                             f"computed in float32 (float64, bfloat16)")
        if hasattr(loss, "scaled_by"):
            raise ValueError(f"this loss is scaled by {loss.scaled_by:g} already: scale it once")
        scaled = loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value
        scaled.scaled_by = self.value
        return scaled

    @torch.no_grad()
    def unscale_(self, optimizer):
        """Divide the gradients by the scale; after it they can be clipped. An optimizer with an
        unscale_ of its own (MasterWeights) does that itself, and then clips itself."""
        if id(optimizer) in self.finite:
            raise RuntimeError("unscale_() twice for an optimizer: call update() after step()")
        if hasattr(optimizer, "unscale_"):
            return self.judge(optimizer, optimizer.unscale_(1 / self.value))
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if any(g.dtype == torch.float16 for g in grads):
            raise ValueError("gradients in fp16: divided in place, small ones become 0 again; use "
                             "MasterWeights(optimizer_cls, params)")
        for g in grads:
            g.mul_(1 / self.value)
        self.judge(optimizer, all_finite(params))

    def judge(self, optimizer, finite):
        """For gradients unscaled elsewhere (ZeRO): are all of this rank finite? All ranks call it.
        """
        finite = torch.as_tensor(finite).to(torch.float32)
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN, group=self.group)
        self.finite[id(optimizer)] = bool(finite.item())

    def step(self, optimizer):
        """optimizer.step(), or nothing if a gradient is not finite. No closure: it would compute
        gradients that nobody has looked at."""
        if id(optimizer) in self.stepped:
            raise RuntimeError("step() twice for an optimizer: call update() in between")
        if id(optimizer) not in self.finite:
            self.unscale_(optimizer)
        self.stepped.add(id(optimizer))
        return optimizer.step() if all(self.finite.values()) else None

    def update(self):
        """Once per step, after the optimizers. -> was the step good?"""
        if not self.finite:
            raise RuntimeError("update() before unscale_() or step(): no gradient was looked at")
        good = all(self.finite.values())
        self.skipped = 0 if good else self.skipped + 1
        self.finite, self.stepped = {}, set()
        self.adapt(good)
        return good

    def adapt(self, good):
        if self.skipped >= self.patience:
            raise FloatingPointError(f"{self.skipped} steps in a row without finite gradients at "
                                     f"scale {self.value:g}: lower it, or see what overflows")

    def state_dict(self):
        return {"scale": self.value}

    def load_state_dict(self, state):
        self.value = float(state["scale"])


class DynamicLossScaler(LossScaler):
    """The scale grows after growth_interval good steps in a row, up to max_scale, and shrinks after
    a bad one. Reads and writes the state_dict of torch.amp.GradScaler.
    FloatingPointError: below min_scale; then not the scale is to blame, and nothing would train."""

    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5,
                 growth_interval=2000, min_scale=1.0, max_scale=2.0**24, group=None):
        super().__init__(init_scale, group)
        if not growth_factor > 1 or not 0 < backoff_factor < 1 or growth_interval < 1:
            raise ValueError(f"growth_factor={growth_factor}, backoff_factor={backoff_factor}, "
                             f"growth_interval={growth_interval}: need > 1, between 0 and 1, >= 1")
        if not min_scale <= init_scale <= max_scale:
            raise ValueError(f"init_scale={init_scale}: must lie in [{min_scale}, {max_scale}]")
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.growth_tracker = growth_interval, 0
        self.min_scale, self.max_scale = min_scale, max_scale

    def adapt(self, good):
        self.growth_tracker = self.growth_tracker + 1 if good else 0
        if not good:
            self.value *= self.backoff_factor
        elif self.growth_tracker == self.growth_interval:
            self.value = min(self.value * self.growth_factor, self.max_scale)
            self.growth_tracker = 0
        if not good and self.value < self.min_scale:
            raise FloatingPointError(
                f"the scale fell to {self.value:g}, below min_scale={self.min_scale:g}: gradients "
                f"are inf or NaN at any scale; look at the data and the forward, lower the rate")

    def state_dict(self):
        return {"scale": self.value, "growth_factor": self.growth_factor,
                "backoff_factor": self.backoff_factor, "growth_interval": self.growth_interval,
                "_growth_tracker": self.growth_tracker}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self.growth_tracker = state["_growth_tracker"]


class MasterWeights:
    """An optimizer for fp16 and bf16 parameters that steps fp32 copies of them.

    params, kwargs: as for optimizer_cls. Build it after the weights are loaded: from then on the
    copies count. Each tensor has an optimizer of its own, so that one fp32 gradient at a time
    exists: weight 2, gradient 2, master 4, and with Adam 8 bytes. p.grad stays scaled, as it came:
    clip with clip_grad_norm_(). fp32 parameters are stepped as they are. ValueError: other types.
    It is no torch.optim.Optimizer: schedules set "lr" in param_groups.
    stochastic_rounding: no master. The fp32 result of a step is rounded to bf16, up or down with
    probabilities that make it right on average (4 bytes less). The same seed on all ranks:
    replicas must round alike."""

    def __init__(self, optimizer_cls, params, stochastic_rounding=False, seed=0, **kwargs):
        self.stochastic, self.factor = stochastic_rounding, 1.0
        self.parts = []                         # (parameter, what is stepped, its optimizer)
        for group in optimizer_cls(params, **kwargs).param_groups:      # which it has checked
            for p in group["params"]:
                if p.dtype not in (torch.bfloat16, torch.float32) and (
                        stochastic_rounding or p.dtype != torch.float16):
                    raise ValueError(f"a parameter of {p.dtype}: give bfloat16 or float32"
                                     f"{'' if stochastic_rounding else ' or float16'}")
                master = p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
                optimizer = optimizer_cls([{**group, "params": [master]}], **kwargs)
                self.parts.append((p, master, optimizer))
                self._forget(p, master)
        devices = dict.fromkeys(p.device for p, _, _ in self.parts if stochastic_rounding)
        self.generators = {d: torch.Generator(d).manual_seed(seed) for d in devices}

    @property
    def param_groups(self):
        """One for each tensor, to set learning rates in; their params are the masters."""
        return [group for _, _, optimizer in self.parts for group in optimizer.param_groups]

    def _forget(self, p, master):
        if self.stochastic and master is not p:
            master.data = p.data.new_empty(0, dtype=torch.float32)

    @torch.no_grad()
    def unscale_(self, inverse):
        """step() will multiply gradients by it, in fp32. -> are all of them finite?"""
        self.factor = inverse
        return all_finite([p for p, _, _ in self.parts])

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm):
        """After unscale_. -> 2-norm of the gradient; step() will use it at most max_norm long."""
        norms = [p.grad.norm(dtype=torch.float32) for p, _, _ in self.parts if p.grad is not None]
        norm = nn.utils.get_total_norm(norms) * self.factor
        self.factor = self.factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)   # NaN stays NaN
        return norm

    @torch.no_grad()
    def step(self):
        for p, master, optimizer in self.parts:
            if p.grad is None:
                continue
            grad = p.grad
            if self.stochastic and master is not p:
                master.data = p.float()
            master.grad = grad.float() * self.factor        # first to fp32: 2^-25 in fp16 is 0
            optimizer.step()
            master.grad = grad if master is p else None
            if master is not p:
                p.copy_(self._round(master))
            self._forget(p, master)
        self.factor = 1.0

    def _round(self, master):
        if not self.stochastic:
            return master                       # copy_ rounds to the nearest
        bits = master.view(torch.int32)         # bf16: the upper 16 of the 32 bits of fp32
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device,
                              generator=self.generators[bits.device])
        rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
        return rounded.where(master.isfinite(), master)

    def zero_grad(self):
        self.factor = 1.0                       # also after a step that was skipped
        for p, _, _ in self.parts:
            p.grad = None

    def state_dict(self):
        """Masters, the optimizers' states, and where the random numbers stand: bitwise resuming."""
        return {"shapes": [p.shape for p, _, _ in self.parts],
                "masters": [master.detach().clone() for _, master, _ in self.parts],
                "optimizers": [copy.deepcopy(o.state_dict()) for _, _, o in self.parts],
                "generators": [g.get_state() for g in self.generators.values()]}

    @torch.no_grad()
    def load_state_dict(self, state):
        if state["shapes"] != [p.shape for p, _, _ in self.parts]:
            raise ValueError("the state is of other parameters: give those, in the same order")
        for generator, saved in zip(self.generators.values(), state["generators"], strict=True):
            generator.set_state(saved)          # first: RuntimeError, of another kind of device
        for (p, master, optimizer), saved, theirs in zip(self.parts, state["masters"],
                                                         state["optimizers"]):
            master.copy_(saved)
            optimizer.load_state_dict(theirs)
            if not self.stochastic:
                p.copy_(master)


class Float8(nn.Module):
    """x W^T with both factors in fp8: what a Float8Linear, or a layer's `product`, calls.

    scaling  "dynamic"  one scale per tensor, the largest |element| at 448 (gradients: 57344)
             "delayed"  the same from the largest of the last 16 calls with gradients; what exceeds
                        it is cut off there. A kernel that knows its scale before needs one pass
                        over a tensor, not two (not here); the history is a state to save,
                        and does not go with recomputation
             "rowwise"  one scale for each row and column of a product: outliers spoil only theirs
    The gradients' products take E5M2 for the gradient, E4M3 for x and W; they add up in fp32 (the
    forward on Hopper with fewer bits). The result is of the type F.linear would return here.
    ValueError: sizes that are no multiples of 16."""

    def __init__(self, scaling="dynamic", device=None):
        super().__init__()
        if scaling not in ("dynamic", "delayed", "rowwise"):
            raise ValueError(f"scaling={scaling!r}: pick dynamic, delayed or rowwise")
        self.scaling = scaling
        if scaling == "delayed":
            self.register_buffer("history", torch.zeros(3, 16, device=device))  # of x, W, gradient

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.scaling == "delayed":
            self.history = self.history.float()             # also after model.bfloat16()
        return self

    def forward(self, x, weight, bias=None):
        rows = x.numel() // x.shape[-1]
        whole = torch.is_grad_enabled() and weight.requires_grad        # dW adds up over the rows
        if any(size % 16 for size in weight.shape) or whole and rows % 16:
            raise ValueError(f"{rows} rows times a weight of {tuple(weight.shape)}: fp8 needs "
                             f"multiples of 16; pad (rows: batch x tokens), or skip this layer")
        if rows == 0:
            return F.linear(x, weight, bias)
        low = F.linear(x.new_empty(0, x.shape[-1]), weight[:0]).dtype   # what autocast would give
        learn = torch.is_grad_enabled()
        if self.scaling == "delayed" and torch._C._current_graph_task_id() != -1:
            raise RuntimeError("scaling='delayed' under recomputation: the history has moved on, "
                               "the second run would differ; use dynamic or rowwise")
        most = self.largest(0, x, learn), self.largest(1, weight, learn)
        y = Float8Product.apply(x.reshape(rows, -1).to(low), weight, self, most)
        y = y.reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(low)

    @torch.no_grad()
    def largest(self, i, t, learn):
        """Of tensor i, 0-dim fp32: what is scaled to the end of the format. None: row by row."""
        if self.scaling == "rowwise":
            return None
        now = t.abs().amax().float()
        if self.scaling == "dynamic":
            return now
        past = self.history[i].max()
        if learn:
            kept = now.where(now.isfinite(), 0)             # an inf would spoil 16 calls
            self.history[i] = torch.cat([kept[None], self.history[i, :-1]])
        return torch.where(past > 0, past, now) + 0 * now   # but now it is seen: NaN


class Float8Product(torch.autograd.Function):
    """x (M, K), weight (N, K) -> (M, N). What is kept for backward is x and weight as they came."""

    @staticmethod
    def forward(ctx, x, weight, layer, most):
        ctx.layer, ctx.most = layer, most
        ctx.save_for_backward(x, weight)
        return matmul8(x, weight.t(), x.dtype, E4M3, *most, fast=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, weight), (most_x, most_w) = ctx.saved_tensors, ctx.most
        most_g, dx, dw = ctx.layer.largest(2, g, True), None, None
        if ctx.needs_input_grad[0]:
            dx = matmul8(g, weight, x.dtype, E5M2, most_g, most_w)
        if ctx.needs_input_grad[1]:
            dw = matmul8(g.t(), x, weight.dtype, E5M2, most_g, most_x)
        return dx, dw, None, None


def matmul8(a, b, out_dtype, a_dtype, most_a=None, most_b=None, fast=False):
    """a (M, K) in a_dtype times b (K, N) in E4M3 -> (M, N). most: see Float8.largest.

    Where there are no fp8 units: the fp8 values multiplied and added in float64, all but exact.
    fast: may add with fewer bits, as the units of Hopper do (forward only)."""
    a, inverse_a = quantize(a, a_dtype, a.abs().amax(1, True) if most_a is None else most_a)
    b, inverse_b = quantize(b, E4M3, b.abs().amax(0, True) if most_b is None else most_b)
    if a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9):
        if most_a is None and out_dtype != torch.bfloat16:              # its rowwise kernel has one
            return matmul8_units(a, b, torch.bfloat16, inverse_a, inverse_b, fast).to(out_dtype)
        return matmul8_units(a, b, out_dtype, inverse_a, inverse_b, fast)
    return (a.double() @ b.double() * (inverse_a.double() * inverse_b)).to(out_dtype)


def matmul8_units(a, b, out_dtype, inverse_a, inverse_b, fast):
    return torch._scaled_mm(a.contiguous(), b.t().contiguous().t(), scale_a=inverse_a,
                            scale_b=inverse_b, out_dtype=out_dtype, use_fast_accum=fast)


def quantize(x, dtype, most):
    """-> x times a scale that brings `most` to the format's end, in fp8; 1 / scale, fp32."""
    end, most = torch.finfo(dtype).max, most.float()
    scale = end / most.clamp(min=1e-30)                     # a tensor of zeros: no 0 / 0
    x8 = (x.float() * scale).clamp(-end, end).to(dtype)     # a cast alone: 448 or NaN, E4M3 has
    return x8, 1 / scale + 0 * most                         # NaN, if `most` is inf: not hidden


class Float8Linear(nn.Linear):
    """nn.Linear whose three products, of forward and backward, are in fp8: see Float8."""

    def __init__(self, in_features, out_features, bias=True, scaling="dynamic", **kwargs):
        super().__init__(in_features, out_features, bias, **kwargs)
        self.product = Float8(scaling, self.weight.device)

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


def convert_to_float8(model, skip=(), scaling="dynamic"):
    """In place: every nn.Linear becomes a Float8Linear, with its own parameters; a layer with a
    `product` (tp.py's) gets Float8 as that. skip: patterns of module names, such as "head",
    "blocks.0.*". -> names of what was converted. ValueError, before anything changes: a layer
    that cannot be: sizes that are no multiples of 16, or a forward of its own."""
    modules = list(model.named_modules(remove_duplicate=False))
    skipped = {m for name, m in modules for pattern in skip if fnmatch.fnmatchcase(name, pattern)}
    layers = {m: name for name, m in reversed(modules)
              if isinstance(m, nn.Linear) and m not in skipped}
    for m, name in layers.items():
        own = getattr(m, "product", F.linear)               # an adapter's, of peft.py: lost
        if "forward" in vars(m) or own is not F.linear and not isinstance(own, Float8) or (
                type(m) not in (nn.Linear, Float8Linear) and not hasattr(m, "product")):
            raise ValueError(f"{name} is a {type(m).__name__}, which multiplies in its own way: "
                             f"skip=({name!r},)")
        if any(size % 16 for size in m.weight.shape):
            raise ValueError(f"{name} has a weight of {tuple(m.weight.shape)}: fp8 needs multiples "
                             f"of 16; change the size, or skip=({name!r},)")
    for m in layers:
        m.__class__ = Float8Linear if type(m) is nn.Linear else type(m)
        m.product = Float8(scaling, m.weight.device)
    return sorted(layers.values())


# ------------------------------------------------------------------ demo

fp16, bf16 = (functools.partial(autocast, dtype) for dtype in (torch.float16, torch.bfloat16))
# Bits of the mantissa and exponent of the smallest normal number, of each format.
FORMATS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), E5M2: (2, -14), E4M3: (3, -6)}


def rounded(x, dtype):
    """x in float64 -> rounded to the format by hand, in float64: what a cast must equal."""
    bits, low = FORMATS[dtype]
    exponent = (torch.frexp(x).exponent - 1).clamp(min=low)     # below `low`: steps stay equal
    step = torch.ldexp(torch.ones_like(x), exponent - bits)
    y = (x / step).round() * step                               # a tie goes to the even one
    return torch.where(y.abs() > torch.finfo(dtype).max, math.inf * y.sign(), y)


class Net(nn.Module):
    """A small GPT: tokens, targets (B, T) -> mean loss. C wide, heads of 16 or more."""

    def __init__(self, C=64, T=64, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = nn.Embedding(128, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(C), "qkv": nn.Linear(C, 3 * C), "o": nn.Linear(C, C),
            "norm2": nn.LayerNorm(C), "up": nn.Linear(C, 4 * C), "down": nn.Linear(4 * C, C)})
            for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 128)

    def forward(self, x, y):
        x = self.embed(x) + self.position.weight
        for block in self.blocks:
            qkv = block["qkv"](block["norm1"](x)).unflatten(-1, (3, 4, -1))     # (B, T, 3, H, D)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["o"](mixed.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), y.flatten())


def batches(count, B=16, T=64):
    """Python's own source, as bytes below 128."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = torch.tensor(list(b"".join(f.read_bytes() for f in files))).clamp(max=127)
    text = text.unfold(0, T + 1, 1)
    windows = [text[torch.randint(len(text), (B,))] for _ in range(count)]
    return [(w[:, :-1], w[:, 1:]) for w in windows]


def learn(data, parts, region, scaler=None, fp8=False):
    """Losses of training on data, a batch a step: one of `parts` equal microbatches of it."""
    model, scaler = Net(), scaler or LossScaler(1.0)
    if fp8:
        convert_to_float8(model, skip=("head",))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95)), []
    for x, y in data:
        with region():
            loss = model(x, y)
        scaler.scale(loss / parts).backward()
        scaler.unscale_(optimizer)
        for p in model.parameters():            # as if the other microbatches had given the same
            p.grad *= parts
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def activation_gradients(batch, region, scale):
    """|dL/dy| times scale of all linear layers' outputs y, end to end, fp32."""
    model, found = Net(), []

    def watch(module, args, y):
        y.register_hook(found.append)

    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(watch)
    with region():
        loss = model(*batch)
    (loss * scale).backward()
    return torch.cat([g.flatten().float().abs() for g in found])


def saved_bytes(model, region, batch):
    """What autograd keeps from a forward: each storage once, without the parameters'."""
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), region():
        loss = model(*batch)
    return sum(found.values()), loss


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def demo_formats():
    x = torch.randn(20_000, dtype=torch.float64)
    x = torch.cat([x * 2.0 ** e for e in range(-30, 20)]).float().double()
    for dtype in FORMATS:
        y = x.clamp(-448, 448) if dtype == E4M3 else x          # it has no inf
        off = rounded(y, dtype) != y.float().to(dtype).double()
        check(not off.any(), f"{str(dtype)[6:]}: rounding by hand = torch's cast",
              f"{off.sum()} of {len(x):,} differ")
    ones, total = torch.ones(4096, dtype=torch.float16), torch.zeros((), dtype=torch.float16)
    for one in ones:
        total += one
    check(total == 2048, "4096 ones added up in fp16; with a sum in fp32",
          f"{total:.0f}; {ones.sum(dtype=torch.float32):.0f}")
    gained = []
    for dtype, stochastic in ((torch.float16, None), (torch.bfloat16, None),
                              (torch.float16, False), (torch.bfloat16, False),
                              (torch.bfloat16, True)):
        p = nn.Parameter(torch.ones(512, dtype=dtype))
        way = torch.optim.SGD([p], 1e-4) if stochastic is None else MasterWeights(
            torch.optim.SGD, [p], stochastic, lr=1e-4)
        for _ in range(1000):
            p.grad = -torch.ones_like(p)
            way.step()
        gained.append(p.float().mean().item() - 1)
    lost, kept = gained[:2], gained[2:]
    check(lost == [0, 0] and all(abs(x - 0.1) < 0.003 for x in kept),
          "1000 updates of 1e-4 to a weight of 1 in fp16, bf16 alone",
          "gained {:.3f}, {:.3f}".format(*lost))
    print("     the same with a master in fp32; bf16 rounded stochastically".ljust(69),
          "{:.3f}, {:.3f}; {:.3f}".format(*kept))


def demo_autocast(batch):
    plain, results = contextlib.nullcontext, []
    for region in (bf16(), torch.autocast("cpu", torch.bfloat16)):
        model = Net()
        with region:
            loss = model(*batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    off = torch.stack([(a - b).abs().max() for a, b in zip(*results)]).max().item()
    check(off == 0, "bf16: loss and all gradients = torch.autocast's", f"off by {off:g}")

    print("\nbytes, Adam                  weights + gradients + rest, a parameter      activations")
    totals, kept = [], []
    for name, region, dtype, stochastic in (
            ("fp32", plain, None, None), ("autocast(bf16)", bf16, None, None),
            ("bf16 + master in fp32", plain, torch.bfloat16, False),
            ("bf16, rounded stochastically", plain, torch.bfloat16, True)):
        model = Net().to(dtype)
        size, loss = saved_bytes(model, region, batch)
        loss.backward()
        params = list(model.parameters())
        if dtype is None:
            optimizers = [torch.optim.AdamW(params)]
            optimizers[0].step()
            masters = []
        else:
            way = MasterWeights(torch.optim.AdamW, params, stochastic)
            way.step()
            masters, optimizers = ([part[i] for part in way.parts] for i in (1, 2))
        states = [t for o in optimizers for state in o.state.values() for t in state.values()]
        sizes = [sum(t.nbytes for t in tensors) / sum(p.numel() for p in params) for tensors in
                 (params, [p.grad for p in params], masters + [t for t in states if t.dim() > 0])]
        totals.append(sum(sizes))
        kept.append(size / 1e6)
        print(f"     {name:<28}", "{:g} + {:g} + {:g}".format(*sizes).ljust(11),
              f"= {totals[-1]:g}".ljust(25), f"{kept[-1]:.2f} MB, {kept[-1] / kept[0] - 1:+.0%}")
    check(totals == [16, 16, 16, 12], "bytes of states: mixed precision saves none of 16",
          "stochastic rounding saves 4")
    saved = [1 - size / kept[0] for size in kept[1:3]]
    check(0.3 < saved[0] < saved[1] < 0.5, "activations and casts: autocast, pure bf16 save",
          "{:.0%}, {:.0%}".format(*saved))


def demo_scaling(data):
    print("\ngradients of activations that fp16 makes 0, by tokens in the step (the loss is their "
          "mean)\n     tokens   unscaled   times 2^16")
    for tokens in (2**10, 2**16, 2**20, 2**22):
        share = 1024 / tokens                   # the batch is one of so many microbatches
        exact = activation_gradients(data[0], contextlib.nullcontext, share)
        lost = [((activation_gradients(data[0], fp16, share * scale) == 0) & (exact > 0))
                .float().mean().item() for scale in (1, 2**16)]
        print(f"{tokens:11,} {lost[0]:10.1%} {lost[1]:12.1%}")
        if tokens == 2**20:
            seen, at_20 = exact, lost
    check(at_20[0] > 0.5 and at_20[1] < 0.01, "lost at 2^20 tokens, unscaled and scaled",
          "{:.1%}, {:.1%}".format(*at_20))
    true = 2.0 ** -25
    p = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    p.grad = torch.tensor([true * 2**16], dtype=torch.float16)
    optimizer, scaler = MasterWeights(torch.optim.SGD, [p], lr=1.0), LossScaler(2.0**16)
    in_place = (p.grad / 2**16).item()
    scaler.step(optimizer)
    master = -optimizer.param_groups[0]["params"][0].item()
    check(in_place == 0 and master == true, "2^-25, scaled, divided in fp16; by MasterWeights",
          f"{in_place:g}; 2^{math.log2(master):g}")
    random.seed(0)
    theirs = torch.amp.GradScaler("cpu", 2.0**12, growth_interval=7)     # has no limits
    ours = DynamicLossScaler(2.0**12, growth_interval=7, min_scale=0.0, max_scale=math.inf)
    theirs.scale(torch.zeros(()))               # it starts with its first loss
    w, scales = nn.Parameter(torch.ones(3)), []
    for _ in range(400):
        grad = torch.tensor([1.0, random.choice([1.0] * 18 + [math.inf, math.nan]), 1.0])
        for scaler in (theirs, ours):
            w.grad, optimizer = grad.clone(), torch.optim.SGD([w], 0.1)
            scaler.step(optimizer)
            scaler.update()
        scales.append((theirs.get_scale(), ours.get_scale()))
    check(all(a == b for a, b in scales) and w.isfinite().all(),
          "400 steps, random overflows: torch.amp.GradScaler's scales, no NaN weight",
          f"{sum(a != b for a, b in scales)} differ; {min(scales)[1]:g} to {max(scales)[1]:g}")
    return seen


def demo_float8():
    torch.manual_seed(0)
    x, w, g = torch.randn(256, 512), torch.randn(384, 512) / 512**0.5, torch.randn(256, 384)
    print("\n|y - exact| / |exact| in fp8, all rows but the first        y = xW'       dx       dW")
    forward, worst = {}, []
    for scaling in ("dynamic", "rowwise"):
        for factor in (1, 100_000):
            layer, rows = Float8Linear(512, 384, False, scaling), x.clone()
            layer.weight.data.copy_(w)
            rows[0] *= factor
            y = layer(rows.requires_grad_())
            y.backward(g)
            errors = []
            for a, b, got, dtype in ((rows, w.T, y, E4M3), (g, w, rows.grad, E5M2),
                                     (g.T, rows, layer.weight.grad, E5M2)):
                exact = a.double() @ b.double()
                errors.append(((got - exact)[1:].norm() / exact[1:].norm()).item())
                worst.append(((got - exact).abs() / bound(a, b, dtype, scaling)).max())
            forward[scaling, factor] = errors[0]
            print(f"     {scaling}, the first row of x times {factor:<24,}",
                  *(f"{error:8.4f}" for error in errors))
    worst = torch.stack(worst).max().item()                 # NaN, if one is
    check(worst <= 1, "each element within what rounding can do", f"at most {worst:.2f} of it")
    tensor, row = (forward[scaling, 100_000] for scaling in ("dynamic", "rowwise"))
    check(row < 0.05 and tensor > 0.2, "a large row spoils the others, but not with rowwise scales",
          f"{tensor:.2f}, {row:.2f}")


def bound(a, b, a_dtype, scaling="dynamic"):
    """Of |a8 b8 - a b|, elementwise: |a b8 - ..| <= (|a| + e_a)(|b| + e_b) - |a||b|, summed."""
    (a, e_a), (b, e_b) = ((t.double().abs(), half_step(t.double().abs(), dtype, scaling, along))
                          for t, dtype, along in ((a, a_dtype, 1), (b, E4M3, 0)))
    return (a + e_a) @ (b + e_b) - a @ b


def half_step(t, dtype, scaling, along):        # relative where normal, else half of the least
    bits, low = FORMATS[dtype]
    most = t.amax(along, True) if scaling == "rowwise" else t.max()
    most = most / torch.finfo(dtype).max
    return (t * 2.0 ** -(bits + 1)).clamp(min=most * 2.0 ** (low - bits - 1))


def demo():
    torch.manual_seed(0)
    data = batches(150)
    demo_formats()
    demo_autocast(data[0])
    gradients = demo_scaling(data)
    demo_float8()
    plain, parts = contextlib.nullcontext, 1024             # 1024 x 1024 tokens: 2^20 in a step
    curves = {"fp32": learn(data, parts, plain), "bf16": learn(data, parts, bf16),
              "fp8": learn(data, parts, bf16, fp8=True),
              "fp16, scaled": learn(data, parts, fp16, DynamicLossScaler(growth_interval=50)),
              "fp16, not scaled": learn(data, parts, fp16)}
    print("\nmean loss, nats per byte, of the last 20 of 150 steps; gap to fp32")
    ends = {name: statistics.mean(losses[-20:]) for name, losses in curves.items()}
    for name, end in ends.items():
        print(f"     {name:<18} {end:.4f}   {end / ends['fp32'] - 1:+.2%}")
    gaps = [abs(end / ends["fp32"] - 1) for end in list(ends.values())[1:4]]
    check(max(gaps) < 0.01 and ends["fp16, not scaled"] > 1.2 * ends["fp32"],
          "bf16, fp8 and scaled fp16 learn like fp32, unscaled fp16 does not",
          "gaps {:.2%}, {:.2%}, {:.2%}".format(*gaps))
    draw(gradients, curves)


def draw(gradients, curves):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplot_mosaic([["histogram", "curves"], ["ranges", "curves"]],
                                 height_ratios=(3, 1.6))
    left, below, right = axes["histogram"], axes["ranges"], axes["curves"]
    exponents = gradients[gradients > 0].log2()
    for shift, color, name in ((0, "C1", "as they are"), (16, "C0", "x 2^16")):
        counts, edges, _ = left.hist(exponents + shift, bins=range(-50, 21), color=color,
                                     weights=[100 / len(exponents)] * len(exponents))
        left.annotate(name, (edges[counts.argmax() + shift // 16], 1.05 * counts.max()),
                      color=color, ha="left" if shift else "right")
    left.set(ylabel="% of the gradients", title="Gradients of activations",
             xlim=(-50, 20), xticklabels=[], ylim=(0, 1.2 * counts.max()))
    names = []
    for i, (dtype, (bits, low)) in enumerate(FORMATS.items()):
        least, most = low - bits, math.log2(torch.finfo(dtype).max)
        below.barh(i, most - least, left=least, color="0.5")
        names.append({E5M2: "fp8 e5m2", E4M3: "fp8 e4m3", torch.float16: "fp16"}.get(dtype, "bf16"))
    below.set(xlim=(-50, 20), yticks=range(len(names)), yticklabels=names, ylim=(3.6, -0.6),
              xlabel="log2 |gradient|; bars: what fits")
    together = []
    for (name, losses), color, style in zip(curves.items(), ("0.75", "C0", "C2", "C4", "C1"),
                                            ("-", "--", "-.", ":", "-")):
        smooth = [statistics.mean(losses[max(0, j - 9):j + 1]) for j in range(len(losses))]
        right.plot(smooth, style, lw=5 if color == "0.75" else 2, color=color)
        if color == "C1":
            right.annotate(f"{name}: {smooth[-1]:.2f}", (150, smooth[-1] + 0.1), color=color,
                           ha="right")
        else:
            together.append(f"{name}: {smooth[-1]:.2f}")
    right.annotate("\n".join(together), (4, 1.55))
    right.set(xlabel="step", ylabel="loss, nats per byte", title="A small GPT, trained five ways",
              ylim=(1.5, None))
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "amp.png")


def bench():
    """Median ms, the ways in turn. On a GPU all linear layers are compiled."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    plain = contextlib.nullcontext
    for d in (1024, 2048, 4096, 8192) if cuda else (256, 512, 1024, 2048):
        x, ways = torch.randn(8192 if cuda else 256, d, device=device), {}
        kinds = {"fp32": (nn.Linear, torch.float32), "bf16": (nn.Linear, torch.bfloat16)}
        if cuda:
            kinds |= {"fp8": (Float8Linear, torch.bfloat16),
                      "fp8 rowwise": (functools.partial(Float8Linear, scaling="rowwise"),
                                      torch.bfloat16)}
        for name, (kind, dtype) in kinds.items():
            layer = kind(d, d, bias=False).to(device, dtype)
            layer = torch.compile(layer) if cuda else layer
            ways[name] = layer, plain, [x.to(dtype, copy=True).requires_grad_()]
        report(f"linear, d = {d}, {len(x)} rows", ways, device)
    size = dict(C=768, T=1024, layers=12) if cuda else dict(C=256, T=128, layers=4)
    batch = [t.to(device) for t in batches(1, 8, size["T"])[0]]
    ways = {"fp32": plain, "tf32": plain} if cuda else {"fp32": plain}
    ways |= {"torch.autocast": lambda: torch.autocast(device, torch.bfloat16), "autocast": bf16}
    report("a GPT, {C} wide, {layers} blocks".format(**size), {
        name: (Net(**size).to(device), region, batch) for name, region in ways.items()}, device)


def report(what, ways, device, rounds=15):
    times = {name: [] for name in ways}
    for i in range(rounds + 3):                 # the first three warm up, and compile
        for name, (model, region, inputs) in ways.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with region():
                loss = model(*inputs).float().sum()
            loss.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
            for t in (*model.parameters(), *inputs):
                t.grad = None
    medians = {name: statistics.median(row[3:]) for name, row in times.items()}
    print(f"{what}: " + ", ".join(f"{name} {ms:.2f} ms ({medians['fp32'] / ms:.2f}x)"
                                  for name, ms in medians.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="mixed precision: demo, or times in ms")
    parser.add_argument("--bench", action="store_true", help="only times, medians")
    bench() if parser.parse_args().bench else demo()
