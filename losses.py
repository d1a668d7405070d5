"""
Every loss of cross-modal knowledge distillation, as plain functions: tensors in, a float32 sum out.

Copy one function, or the file: it imports torch only. All losses take rows, one for each supervised
token, and return SUMS; divide once, in the training loop, by the number of tokens over all GPUs and
micro-batches. Student comes before teacher, and everything is passed by keyword. `fused_ce_kd` is
the one place through which train_kd.py calls the others.
"""
import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def response_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the rows that predict supervised tokens: the causal shift, done once and only here.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, unshifted: labels[b, t] is the token AT t, or IGNORE_INDEX.
    Returns:
        rows (N, V) and targets (N,). Row n is the distribution that the model gives for targets[n].
    Raises:
        ValueError: if the two disagree on (B, T).
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} "
                         "disagree on (B, T)")
    targets = labels[:, 1:]            # position t is predicted from t-1
    keep = targets != IGNORE_INDEX     # (B, T-1), 1 = the loss sees it
    return logits[:, :-1][keep], targets[keep]


def cross_entropy(*, student_logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log p_student(target).

    Args:
        student_logits: (N, V) float, any dtype. Gradient flows.
        targets: (N,) int64 in [0, V).
    Returns:
        () float32, in nats x tokens; exactly 0 for N = 0.
    Raises:
        ValueError: if the lengths differ.
    """
    if student_logits.shape[:1] != targets.shape:
        raise ValueError(f"student rows {tuple(student_logits.shape)} "
                         f"and targets {tuple(targets.shape)} disagree on N")
    return F.cross_entropy(student_logits.float(), targets, reduction="sum")


def _log_probs(student_logits: Tensor, teacher_logits: Tensor,
               temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student rows {tuple(student_logits.shape)} "
                         f"!= teacher rows {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    return (F.log_softmax(student_logits.float() / temperature, dim=-1),
            F.log_softmax(teacher_logits.float() / temperature, dim=-1))


def _mixture(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    """log(beta * teacher + (1 - beta) * student), in log space."""
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, expected 0 < beta < 1")
    log_beta = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_teacher + log_beta[0], log_student + log_beta[1])


def forward_kl(*, student_logits: Tensor, teacher_logits: Tensor,
               temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(teacher || student), times T^2. Mode-covering; the method's loss.

    Args:
        student_logits: (N, V) float, any dtype; one row per supervised token. Gradient flows.
        teacher_logits: (N, V) float, same V and token order. Compute it under no_grad.
        temperature: T > 0 divides both logits. T^2 keeps the size of the gradient
            comparable across T.
    Returns:
        () float32, in nats x tokens; exactly 0 for N = 0.
    Raises:
        ValueError: if the shapes differ, or T is not positive.
            Logits must be finite: 0 * inf is NaN.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    return (log_teacher.exp() * (log_teacher - log_student)).sum() * temperature**2


def reverse_kl(*, student_logits: Tensor, teacher_logits: Tensor,
               temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(student || teacher), times T^2. Mode-seeking. Arguments as in forward_kl.

    Source: Gu et al. 2023, MiniLLM (arXiv:2306.08543), section 2.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    return (log_student.exp() * (log_student - log_teacher)).sum() * temperature**2


def jsd(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
        beta: float = 0.5) -> Tensor:
    """Sum over rows of beta * KL(teacher || m) + (1 - beta) * KL(student || m), times T^2.

    m = beta * teacher + (1 - beta) * student with 0 < beta < 1; other arguments as in forward_kl.

    Source: Agarwal et al. 2023, GKD (arXiv:2306.13649), equation 1.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    log_mixture = _mixture(log_student, log_teacher, beta)
    teacher_term = (log_teacher.exp() * (log_teacher - log_mixture)).sum()
    student_term = (log_student.exp() * (log_student - log_mixture)).sum()
    return (beta * teacher_term + (1 - beta) * student_term) * temperature**2


def skew_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
            beta: float = 0.1) -> Tensor:
    """Sum over rows of KL(teacher || beta * teacher + (1 - beta) * student), times T^2;
    0 < beta < 1.

    Bounded gradients where the student gives a teacher token almost no probability.
    Arguments as in forward_kl.

    Source: Ko et al. 2024, DistiLLM (arXiv:2402.03898), equation 3.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    log_mixture = _mixture(log_student, log_teacher, beta)
    return (log_teacher.exp() * (log_teacher - log_mixture)).sum() * temperature**2


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}


CPU_BLOCK_ROWS = 4      # rows whose point-wise work is done together on a CPU: in its cache
HALF_HEAD_TILE = 2048   # tokens of a half-precision head that are upcast together on a CPU
GPU_WEIGHT_ROWS = 1024  # rows that are summed in one product for a trainable head on a GPU


def _tiles(head):
    on_cpu = head.device.type == "cpu"
    step = (HALF_HEAD_TILE if on_cpu and head.dtype in (torch.bfloat16, torch.float16)
            else max(1, len(head)))
    return [slice(i, i + step) for i in range(0, len(head), step)]


def _addmm(out: Tensor, a: Tensor, b: Tensor, factors: torch.dtype, beta: int = 1) -> None:
    """out = beta * out + a @ b in out's float32 or float64: a and b are rounded to `factors`
    where that makes it quicker, the result never."""
    if b.is_cuda and factors in (torch.bfloat16, torch.float16):
        torch.addmm(out, a.to(factors), b.to(factors), out_dtype=torch.float32, beta=beta, out=out)
    elif factors == torch.bfloat16:  # oneDNN rounds them on its way, if the processor has bfloat16
        with torch.backends.mkldnn.flags(None, None, None, fp32_precision="bf16"):
            out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


def _ce_kd_rows(student_logits, teacher_logits, targets, row_weights, dtype, space, kind,
                temperature, beta, ce_weight, kd_weight):
    """Logits (n, V) -> sums (2,) of CE and KD,
    and the gradient (n, V) of ce_weight * CE + kd_weight * KD, rounded to dtype at the end.
    space: four (n, V) to write to, so that a CPU need not ask for memory anew; or four None."""
    a, b, c, d = space

    def log_softmax(logits, out):
        if temperature != 1:
            logits = torch.div(logits, temperature, out=c)
        return torch.log_softmax(logits, -1, out=out)

    log_student, log_teacher = log_softmax(student_logits, a), log_softmax(teacher_logits, b)
    student, teacher = torch.exp(log_student, out=c), torch.exp(log_teacher, out=d)
    # Beside each KL(a || b) stands sum(b - a) = 0:
    # with it, rounded normalisers have no first-order effect.
    if kind == "forward_kl":
        gradient = torch.sub(student, teacher, out=c)
        ratio = torch.sub(log_teacher, log_student, out=b)
        kd = torch.mul(teacher, ratio, out=b).sum(-1) + gradient.sum(-1)
    else:
        if kind == "reverse_kl":
            slope = log_student - log_teacher                  # d kd / d student, up to a constant
            kd = (student * slope).sum(-1) + (teacher - student).sum(-1)
        else:
            log_mixture = _mixture(log_student, log_teacher, beta)
            mixture = log_mixture.exp()
            kd = (teacher * (log_teacher - log_mixture)).sum(-1) + (mixture - teacher).sum(-1)
            slope = (beta - 1) * (log_teacher - log_mixture).exp()
            if kind == "jsd":
                slope = (1 - beta) * (log_student - log_mixture)
                kd = (beta * kd + (student * slope).sum(-1)
                      + (1 - beta) * (mixture - student).sum(-1))
        gradient = student * (slope - (student * slope).sum(-1, keepdim=True))
    gradient *= (kd_weight * temperature * row_weights)[:, None]
    log_probs = log_student if temperature == 1 else torch.log_softmax(student_logits, -1, out=a)
    ce = -log_probs.gather(-1, targets[:, None])[:, 0]
    if ce_weight:
        scale = (ce_weight * row_weights)[:, None]
        gradient += torch.exp(log_probs, out=b).mul_(scale)
        if targets.is_cuda:  # compiled, this costs no pass of its own; a scatter would
            vocab = torch.arange(gradient.shape[1], device=targets.device)
            gradient -= torch.where(vocab == targets[:, None], scale, 0.0)
        else:
            gradient.scatter_add_(-1, targets[:, None], -scale)
    sums = torch.stack([row_weights @ ce, row_weights @ kd * temperature**2])
    return sums, gradient.to(dtype)


@functools.cache
def _point_wise(device_type):
    compiled = device_type == "cuda" and importlib.util.find_spec("triton")
    if not compiled:
        return _ce_kd_rows
    # a row is as long as the vocabulary: one program a row reads it twice, split rows are read more
    return torch.compile(_ce_kd_rows, dynamic=True, options={"split_reductions": False})


class _FusedCeKd(torch.autograd.Function):

    @staticmethod
    def forward(ctx, student_hidden, student_weight, teacher_hidden, teacher_weight, targets,
                row_weights, needs_grad, half, chunk_rows, scales, *options):
        needs_hidden, needs_weight = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        dtype, device = (torch.promote_types(student_hidden.dtype, torch.float32),
                         student_hidden.device)
        vocab, row_weights = min(len(student_weight), len(teacher_weight)), row_weights.to(dtype)
        heads = [w[:vocab] for w in (student_weight, teacher_weight)]
        factors = [half or head.dtype for head in heads]
        hiddens = student_hidden, teacher_hidden
        buffers = [torch.empty(min(chunk_rows, len(targets)), vocab, dtype=dtype, device=device)
                   for _ in heads]
        on_cpu, together, pending = device.type == "cpu", 1, []
        block_rows, space = chunk_rows, [None] * 4
        if on_cpu:
            block_rows = min(CPU_BLOCK_ROWS, chunk_rows)
            space = [torch.empty(min(block_rows, len(targets)), vocab, dtype=dtype)
                     for _ in space]
        else:  # the weight gradient is read and written as seldom as memory allows
            together = max(1, GPU_WEIGHT_ROWS // chunk_rows)
            heads, hiddens = ([x.to(factor) for x, factor in zip(pair, factors)]
                              for pair in (heads, hiddens))
        sums = torch.zeros(2, dtype=torch.float64, device=device)                     # CE, KD
        grad_hidden = (torch.zeros(student_hidden.shape, dtype=dtype, device=device)
                       if needs_hidden else None)
        grad_weight = None
        if needs_weight:
            grad_weight = torch.empty(student_weight.shape, dtype=dtype, device=device)
            grad_weight[vocab if len(targets) else 0:] = 0  # what no product below fills
        for start in range(0, len(targets), chunk_rows):
            stop = min(start + chunk_rows, len(targets))
            logits = [buffer[:stop - start] for buffer in buffers]                    # 2 x (n, V)
            for hidden, head, factor, scale, out in zip(hiddens, heads, factors, scales, logits):
                for tile in _tiles(head):
                    _addmm(out[:, tile], hidden[start:stop], head[tile].T, factor, beta=0)
                if scale != 1:
                    out *= scale
            for first in range(start, stop, block_rows):
                block = slice(first, min(first + block_rows, stop))
                rows = slice(first - start, block.stop - start)
                values, gradient = _point_wise(device.type)(
                    logits[0][rows], logits[1][rows], targets[block], row_weights[block],
                    dtype if on_cpu else heads[0].dtype,
                    [x[:block.stop - first] if on_cpu else x for x in space], *options)
                sums += values
                if on_cpu:
                    logits[0][rows] = gradient                        # takes the logits' place
            gradient = logits[0] if on_cpu else gradient                              # (n, V)
            if stop == len(targets):  # the teacher's logits make room for a gradient
                out = logits = buffers = None
            if scales[0] != 1:
                gradient *= scales[0]
            for tile in _tiles(heads[0]) if needs_hidden else []:
                _addmm(grad_hidden[start:stop], gradient[:, tile], heads[0][tile],
                       factors[0])                                                    # (n, H)
            if needs_weight:
                pending.append(gradient)
                if len(pending) == together or stop == len(targets):
                    first = stop - sum(map(len, pending))
                    gradient = torch.cat(pending) if len(pending) > 1 else gradient
                    _addmm(grad_weight[:vocab], gradient.T, hiddens[0][first:stop],
                           factors[0], beta=int(first > 0))                           # (V, H)
                    pending = []
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = student_hidden.dtype, student_weight.dtype
        ce_sum, kd_sum = sums.to(dtype).unbind()
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return options[3] * ce_sum + options[4] * kd_sum, ce_sum, kd_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _ce, _kd):
        # scaled and rounded at once, in place unless retain_graph: no second float32 copy
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [None if grad is None else
                 torch.mul(grad, grad_loss, out=grad if grad.dtype == dtype and not retained
                           else torch.empty_like(grad, dtype=dtype))
                 for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, *[None] * 13


def token_kl(*, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
             teacher_weight: Tensor, student_logit_scale: float = 1.0,
             teacher_logit_scale: float = 1.0, chunk_rows: int = 64) -> tuple[Tensor, Tensor]:
    """What evaluation reports, token by token: KL(teacher || student) at temperature 1.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, scales: as of fused_ce_kd.
        chunk_rows: rows whose two (rows, V) float32 logits exist at the same time.
    Returns:
        kl (N,) float32, in nats; agree (N,) bool: both prefer the same token.
    """
    vocab = min(len(student_weight), len(teacher_weight))
    student_weight, teacher_weight = student_weight[:vocab].float(), teacher_weight[:vocab].float()
    kls, agreements = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for student, teacher in zip(student_hidden.split(chunk_rows), teacher_hidden.split(chunk_rows)):
        log_student = (student_logit_scale * student.float() @ student_weight.T).log_softmax(-1)
        log_teacher = (teacher_logit_scale * teacher.float() @ teacher_weight.T).log_softmax(-1)
        kls.append((log_teacher.exp() * (log_teacher - log_student)).sum(-1).cpu())
        agreements.append((log_teacher.argmax(-1) == log_student.argmax(-1)).cpu())
    return torch.cat(kls), torch.cat(agreements)


def fused_ce_kd(*, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
                teacher_weight: Tensor, targets: Tensor, kind: str = "forward_kl",
                temperature: float = 2.0, beta: float = 0.5, ce_weight: float = 1.0,
                kd_weight: float = 0.5, row_weights: Tensor | None = None,
                chunk_rows: int = 256, student_logit_scale: float = 1.0,
                teacher_logit_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Output heads, losses and their gradient together, a chunk of rows at a time:
    no (N, V) tensor ever exists.

    Args:
        student_hidden: (N, H) answer rows of the student before its output head. Gradient flows.
        student_weight: (V, H) its head; gets a gradient, summed in float32, if it requires one.
        teacher_hidden, teacher_weight: (N, H'), (V', H') of the teacher. No gradient.
        targets: (N,) int64 answer tokens.
        kind: one of DIVERGENCES; beta is for jsd and skew_kl only.
        row_weights: (N,) multiplies CE and KD of a row; None = 1.
        chunk_rows: rows whose two (rows, V) float32 logits exist at the same time.
        student_logit_scale, teacher_logit_scale: logits = scale * hidden @ weight.T.
    Returns:
        loss = ce_weight * ce_sum + kd_weight * kd_sum, which alone carries a gradient (once: no
        second derivative), and ce_sum and kd_sum for the log (row weights and T^2 included);
        () float32. Logits are float32, also of half-precision inputs; autocast to half precision
        rounds the factors of the products, never their results. Both
        vocabularies are cut to the smaller one, since models pad them differently.
    Raises:
        ValueError: if a target is negative or beyond the common vocabulary (on a GPU, where looking
            would wait for it: CUDA's own assertion), if the numbers of rows differ, or an option
            is out of range.
    """
    if not len(student_hidden) == len(teacher_hidden) == len(targets):
        raise ValueError(f"rows differ: student {len(student_hidden)}, "
                         f"teacher {len(teacher_hidden)}, targets {len(targets)}; "
                         "same answer ids on both sides?")
    if kind not in DIVERGENCES or not temperature > 0 or chunk_rows < 1 or not 0 < beta < 1:
        raise ValueError(f"kind {kind!r}, temperature {temperature}, beta {beta}, "
                         f"chunk_rows {chunk_rows}; expected one of {', '.join(DIVERGENCES)}, "
                         "temperature > 0, 0 < beta < 1, chunk_rows >= 1")
    vocab = min(len(student_weight), len(teacher_weight))
    if (targets.device.type == "cpu" and len(targets)
            and not 0 <= targets.min() <= targets.max() < vocab):
        raise ValueError(f"targets {targets.min()} to {targets.max()} lie beyond "
                         f"the common vocabulary of {vocab} tokens")
    row_weights = (torch.ones(len(targets), device=targets.device)
                   if row_weights is None else row_weights)
    device = student_hidden.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        return _FusedCeKd.apply(
            student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(),
            targets, row_weights.detach(), torch.is_grad_enabled(), half, chunk_rows,
            (student_logit_scale, teacher_logit_scale),
            kind, temperature, beta, ce_weight, kd_weight)
