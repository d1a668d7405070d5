"""
The fused loss against its rivals: forward KL, loss and gradients, from the same hidden rows and heads.

Rivals: the three matrix products that no method can do without (four with a trainable head); plain autograd on full
logits; Liger-Kernel's chunked loss, on a GPU its Triton one too; TRL's chunked divergence (Triton on a GPU). Each has
a process of its own and all take turns. Memory: peak of a call above its inputs. Gradient error: of the hidden rows
against float64, on 16 rows of a near-matched pair (KL about 0.001). Called by bench.py.
"""
import sys
import time
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
NEEDS = {"GEMMs alone": [], "plain": [], "Liger": ["liger_kernel"], "Liger Triton": ["liger_kernel", "triton"],
         "TRL": ["trl", "datasets"], "ours": []}


def add_arguments(group):
    group.add_argument("--rows", type=int, nargs="+", help="answer tokens N")
    group.add_argument("--vocab", type=int, help="V")
    group.add_argument("--width", type=int, help="H of student and teacher")
    group.add_argument("--cases", nargs="+", choices=list(CASES), help="what is compared")


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


def gemms(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    with torch.no_grad():
        teacher_hidden @ teacher_weight.T
        logits = student_hidden @ student_weight.T
        logits @ student_weight
        if student_weight.requires_grad:
            logits.T @ student_hidden


def plain(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    student = F.log_softmax((student_hidden @ student_weight.T).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax((teacher_hidden @ teacher_weight.T).float(), dim=-1)
    F.kl_div(student, teacher, reduction="sum", log_target=True).backward()


def ours(**inputs):
    losses.fused_ce_kd(**inputs, temperature=1.0, ce_weight=0.0, kd_weight=1.0,
                       chunk_rows=train_kd.chunk_rows_of(inputs["student_weight"]))[0].backward()


def liger(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    options = {} if targets.is_cuda else dict(compiled=False, chunk_size=256)  # its defaults on a GPU
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, **options)
    (loss(student_hidden, student_weight, teacher_hidden, teacher_weight, targets) * len(targets)).backward()


def liger_triton(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from liger_kernel.transformers import LigerFusedLinearJSD
    loss = LigerFusedLinearJSD(jsd_beta=0.0)(student_hidden, student_weight, teacher_hidden, teacher_weight, targets)
    (loss * len(targets)).backward()


def trl(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    _chunked_divergence_loss(student_hidden[None], teacher_hidden[None], student_weight, teacher_weight,
                             torch.ones(1, len(targets), dtype=torch.long, device=targets.device), beta=0.0,
                             num_items_in_batch=1)[0].backward()


RUNS = {"GEMMs alone": gemms, "plain": plain, "Liger": liger, "Liger Triton": liger_triton, "TRL": trl, "ours": ours}


# ---- one rival's process ----

KEPT = {}  # the inputs, from job to job


def call(rival, inputs):
    """Seconds of one call, gradients included."""
    device = inputs["targets"].device.type
    for x in inputs.values():
        x.grad = None
    lib.wait(device)
    start = time.perf_counter()
    RUNS[rival](**inputs)
    lib.wait(device)
    return time.perf_counter() - start


def run(rival, calls, error=False, **sizes):
    """Job -> seconds of each call and the peak above the inputs; or the error of the gradient."""
    if error:
        return {"gradient_error": gradient_error(rival, {**sizes, "rows": 16})}
    if not KEPT:
        KEPT.update(make_inputs(**sizes))
        if sizes["device"] == "cpu":  # imports and thread pools; a GPU needs the real shapes
            call(rival, {k: (v.detach()[:64] % 64).requires_grad_(v.requires_grad) for k, v in KEPT.items()})
    if sizes["device"] == "cuda":
        call(rival, KEPT)
    for x in KEPT.values():
        x.grad = None
    rest = lib.rest_bytes(sizes["device"])
    answer = {"seconds": [call(rival, KEPT) for _ in range(calls)]}
    answer["peak_bytes"] = lib.peak_bytes(sizes["device"]) - rest
    if sizes["device"] == "cuda":
        torch.cuda.empty_cache()  # room for the other processes
    return answer


def gradient_error(rival, sizes):
    inputs = make_inputs(**sizes)
    if rival == "GEMMs alone":
        return None
    call(rival, inputs)
    exact = inputs["student_hidden"].detach().double().requires_grad_()
    head, teacher_head = inputs["student_weight"].detach().double(), inputs["teacher_weight"].double()
    teacher = (inputs["teacher_hidden"].double() @ teacher_head.T).log_softmax(-1)
    F.kl_div((exact @ head.T).log_softmax(-1), teacher, reduction="sum", log_target=True).backward()
    return float((inputs["student_hidden"].grad.double() - exact.grad).norm() / exact.grad.norm())


# ---- the part ----

def measure(args):
    """-> {"cases": [{case, rows, rivals: {name: seconds, peak_bytes, gradient_error, ...}}], sizes}"""
    rivals = [r for r in lib.installed(NEEDS) if r != "Liger Triton" or args.device == "cuda"]
    sizes, log, cases = dict(vocab=args.vocab, width=args.width, device=args.device), Path(args.out) / "loss.log", []
    calls = 5 if args.device == "cuda" else 1
    for case in args.cases:
        for rows in args.rows:
            answers = {rival: [] for rival in rivals}
            workers = {rival: lib.Worker(__file__, log) for rival in rivals}
            for worker, rival in zip(workers.values(), rivals):  # so that none still starts while another is timed
                worker.ask(rival=rival, calls=0, case=case, rows=rows, **sizes)
            for _ in range(args.repeats):
                for rival, worker in workers.items():
                    answers[rival].append(worker.ask(rival=rival, calls=calls, case=case, rows=rows, **sizes))
                    print(f"{case}, {rows} rows: {rival} {answers[rival][-1]}", flush=True)
            for rival, worker in workers.items():
                answers[rival].append(worker.ask(rival=rival, calls=0, error=True, case=case, rows=rows, **sizes))
                worker.close()
            cases.append({"case": case, "rows": rows, "rivals": {r: summary(answers[r]) for r in rivals}})
    return {"cases": cases, **sizes, "repeats": args.repeats, "calls": calls}


def summary(answers):
    """A rival's answers, the last of which is its error -> medians."""
    failed = [a["error"] for a in answers if "error" in a]
    if failed:
        return {"error": failed[0]}
    *answers, error = answers
    seconds = [s for a in answers for s in a["seconds"]]
    return {"seconds": lib.median(seconds), "all_seconds": seconds,
            "peak_bytes": lib.median([a["peak_bytes"] for a in answers]), **error}


def report(results):
    """Results of `measure` -> Markdown."""
    lines = []
    for case in results["cases"]:
        own, rows = case["rivals"]["ours"], []
        for name, r in case["rivals"].items():
            if "error" in r or "error" in own:
                rows.append([name, r.get("error"), *[None] * 4])
                continue
            error = "" if r["gradient_error"] is None else f"{r['gradient_error']:.0e}"
            rows.append([name, f"{r['seconds']:.4g}", f"{own['seconds'] / r['seconds']:.2f}", lib.gib(r["peak_bytes"]),
                         f"{own['peak_bytes'] / max(1, r['peak_bytes']):.2f}", error])
        header = ["", "s", "ours / it, time", "GiB above inputs", "ours / it, memory", "error of the gradient"]
        lines += [f"**Loss, {case['case']}**: N = {case['rows']:,} rows, H = {results['width']:,}, "
                  f"V = {results['vocab']:,}, {results['device']}", "", lib.table(header, rows), ""]
    return "\n".join(lines)


def draw(results, path):
    figure, axes = lib.figure(len(results["cases"]))
    for axis, case in zip(axes, results["cases"]):
        lib.scatter(axis, {name: (r["seconds"], r["peak_bytes"] / 2**30) for name, r in case["rivals"].items()
                           if "error" not in r},
                    title=f"{case['case']}, N = {case['rows']:,}", xlabel="seconds", ylabel="GiB above the inputs")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    lib.serve(run)
