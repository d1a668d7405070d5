"""
The fused loss against its rivals: forward KL, loss and gradients, from the same hidden rows and heads.

Rivals: plain autograd on full logits; Liger-Kernel's chunked loss; TRL's chunked divergence (Triton on a GPU). Memory:
peak of a call above its inputs. Gradient error: of the hidden rows against float64, on 16 rows of a near-matched pair
(KL about 0.001). Called by bench.py.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import losses
import train_kd

CASES = {  # name: does the head train, dtype of rows and heads
    "frozen head, fp32": (False, "float32"), "trainable head, fp32": (True, "float32"),
    "frozen head, bf16": (False, "bfloat16"), "trainable head, bf16": (True, "bfloat16")}
NEEDS = {"plain": [], "Liger": ["liger_kernel"], "TRL": ["trl", "datasets"], "ours": []}
KEPT = {}  # the inputs, from job to job


def make_inputs(case, rows, vocab, width, device):
    """Near-matched pair: hidden rows of width 1 that differ by 3%, logits of a few nats."""
    trainable, dtype = CASES[case]
    g = torch.Generator(device).manual_seed(0)
    to, make = dict(dtype=getattr(torch, dtype)), dict(generator=g, device=device)
    student = torch.randn(rows, width, **make)
    teacher = student + 0.03 * torch.randn(rows, width, **make)
    head = torch.randn(vocab, width, **make).mul_(1.5 / width**0.5).to(**to)
    return dict(student_hidden=student.to(**to).requires_grad_(), student_weight=head.requires_grad_(trainable),
                teacher_hidden=teacher.to(**to), teacher_weight=head.detach().clone(),
                targets=torch.randint(vocab, (rows,), **make))


def plain(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    student = F.log_softmax((student_hidden @ student_weight.T).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax((teacher_hidden @ teacher_weight.T).float(), dim=-1)
    F.kl_div(student, teacher, reduction="sum", log_target=True).backward()


def liger(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    options = {} if targets.is_cuda else dict(compiled=False, chunk_size=256)  # its defaults on a GPU
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, **options)
    (loss(student_hidden, student_weight, teacher_hidden, teacher_weight, targets) * len(targets)).backward()


def trl(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    _chunked_divergence_loss(student_hidden[None], teacher_hidden[None], student_weight, teacher_weight,
                             torch.ones(1, len(targets), dtype=torch.long, device=targets.device), beta=0.0,
                             num_items_in_batch=1)[0].backward()


def ours(**inputs):
    losses.fused_ce_kd(**inputs, temperature=1.0, ce_weight=0.0, kd_weight=1.0,
                       chunk_rows=train_kd.chunk_rows_of(inputs["student_weight"]))[0].backward()


RUNS = {"plain": plain, "Liger": liger, "TRL": trl, "ours": ours}


def call(rival, inputs):
    """Seconds of one call, gradients included."""
    device = inputs["targets"].device.type
    for x in inputs.values():
        x.grad = None
    start = lib.now(device)
    RUNS[rival](**inputs)
    return lib.now(device) - start


def run(rival, size, device, **sizes):
    """Job: a case -> seconds of each call, the peak above the inputs, the error of the gradient."""
    if KEPT.get("case") != size:
        KEPT.clear()
        KEPT.update(case=size, error=gradient_error(rival, size, device, **{**sizes, "rows": 16}))
        KEPT["inputs"] = make_inputs(size, device=device, **sizes)
        if device == "cuda":  # compiles
            call(rival, KEPT["inputs"])
    for x in KEPT["inputs"].values():
        x.grad = None
    rest = lib.rest_bytes(device)
    seconds = [call(rival, KEPT["inputs"]) for _ in range(5 if device == "cuda" else 1)]
    peak = lib.peak_bytes(device) - rest
    if device == "cuda":
        torch.cuda.empty_cache()  # room for the other processes
    return {"seconds": seconds, "peak_bytes": peak, "gradient_error": KEPT["error"]}


def gradient_error(rival, case, device, **sizes):
    inputs = make_inputs(case, device=device, **sizes)
    call(rival, inputs)
    exact = inputs["student_hidden"].detach().double().requires_grad_()
    head, teacher_head = inputs["student_weight"].detach().double(), inputs["teacher_weight"].double()
    teacher = (inputs["teacher_hidden"].double() @ teacher_head.T).log_softmax(-1)
    F.kl_div((exact @ head.T).log_softmax(-1), teacher, reduction="sum", log_target=True).backward()
    return float((inputs["student_hidden"].grad.double() - exact.grad).norm() / exact.grad.norm())


def measure(args):
    """-> {case: {rival: {seconds, all_seconds, peak_bytes, gradient_error} or {error}}}, title, table"""
    answers = lib.compare(run, lib.installed(NEEDS), args.cases, args, rows=args.rows, vocab=args.vocab, width=args.width)
    cases = {case: {} for case in args.cases}
    for rival, of in answers.items():
        for case, some in of.items():
            cases[case][rival] = some[0]
            if "error" not in some[0]:
                seconds = [s for answer in some for s in answer["seconds"]]
                cases[case][rival] |= {"seconds": lib.median(seconds), "all_seconds": seconds}
    rows = []
    for case, rivals in cases.items():
        own = rivals["ours"]
        for rival, r in rivals.items():
            if "error" in r or "error" in own:
                rows.append([case, rival, r.get("error"), *[None] * 4])
                continue
            rows.append([case, rival, f"{r['seconds']:.4g}", f"{own['seconds'] / r['seconds']:.2f}",
                         f"{r['peak_bytes'] / 2**30:.2f}", f"{own['peak_bytes'] / max(1, r['peak_bytes']):.2f}",
                         f"{r['gradient_error']:.0e}"])
    header = ["", "", "s", "ours / it, time", "GiB above inputs", "ours / it, memory", "error of the gradient"]
    title = f"**Loss**: N = {args.rows:,} rows, H = {args.width:,}, V = {args.vocab:,}, {args.device}"
    return cases, title, lib.table(header, rows)
