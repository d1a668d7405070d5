"""
How time and memory grow: with the answer rows N and the vocabulary V (the loss), the batch (a step of the LLM), the
length of the clips (encoder and adapter) and the processes (train_kd.py under gloo, one thread each).

Each series is a few points; the exponent is the slope of log(seconds) or log(memory) on log(size). Called by bench.py.
"""
import math
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import bench_step
import losses
import model as m

# per device: the loss's H, its N where V grows, its V where N grows; then the sizes of each series
POINTS = {"cpu": dict(width=576, rows=512, vocab=32_768, clips=2, **{
              "answer rows": [256, 512, 1024, 2048], "vocabulary": [8_192, 16_384, 32_768, 65_536],
              "batch": [1, 2, 4, 8], "clip seconds": [2, 4, 8, 16, 30], "processes": [1, 2]}),
          "cuda": dict(width=3584, rows=4096, vocab=152_064, clips=8, **{
              "answer rows": [2048, 4096, 8192, 16_384], "vocabulary": [38_016, 76_032, 152_064, 304_128],
              "batch": [4, 8, 16, 32], "clip seconds": [2, 4, 8, 16, 30], "processes": []})}
SEQUENCE, ANSWER = 80, 40  # tokens of each row of the batch series


def add_arguments(group):
    group.add_argument("--series", nargs="+", choices=[k for k, v in POINTS["cpu"].items() if isinstance(v, list)],
                       help="all where none is named")


# ---- one series' process ----

STUDENT = {}


def student_of(llm, encoder, device, dtype):
    if not STUDENT:
        STUDENT["model"] = m.load_student(f"{encoder}+{llm}").to(device)
        STUDENT["model"].encoder.requires_grad_(False).to(dtype)
        STUDENT["model"].train()
    return STUDENT["model"]


def loss_call(rows, width, vocab, device, dtype):
    """A call of the fused loss with a frozen head -> function without arguments."""
    make = dict(device=device, dtype=dtype)
    student, teacher, head = (torch.randn(n, width, **make) for n in (rows, rows, vocab))
    student.requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)

    def call():
        student.grad = None
        losses.fused_ce_kd(student_hidden=student, student_weight=head, teacher_hidden=teacher, teacher_weight=head,
                           targets=targets)[0].backward()
    return call


def batch_call(student, batch, dtype):
    """Forward, loss and backward of the text channel for so many rows."""
    device = student.device
    inputs = dict(before=[[row, *[5] * (SEQUENCE - ANSWER - 3)] for row in range(batch)],  # none shares another's start
                  after=[[6] * 2] * batch, answers=[[7] * ANSWER] * batch)
    targets = torch.full((batch * ANSWER,), 7, device=device)

    def call():
        student.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden, *_, head = student(**inputs)
            losses.fused_ce_kd(student_hidden=hidden, student_weight=head, teacher_hidden=hidden, teacher_weight=head,
                               targets=targets)[0].backward()
    return call


def clip_call(student, clips, seconds, dtype):
    """Encoder forward, adapter forward and backward for clips of so many seconds."""
    bins = student.config.encoder.num_mel_bins
    mels = [torch.randn(bins, m.MEL_RATE_HZ * seconds, device=student.device) for _ in range(clips)]

    def call():
        student.zero_grad(set_to_none=True)
        with torch.autocast(student.device.type, dtype=dtype, enabled=dtype != torch.float32):
            student.spell(student.features(mels))[1].sum().backward()
    return call


def run(series, size, calls, dtype, device, width, rows, vocab, clips, llm, encoder):
    """Job of a process -> seconds of each call and its peak above what was there before."""
    dtype = getattr(torch, dtype)
    if series == "answer rows":
        call = loss_call(size, width, vocab, device, dtype if device == "cuda" else torch.float32)
    elif series == "vocabulary":
        call = loss_call(rows, width, size, device, dtype if device == "cuda" else torch.float32)
    elif series == "batch":
        call = batch_call(student_of(llm, encoder, device, dtype), size, dtype)
    else:
        call = clip_call(student_of(llm, encoder, device, dtype), clips, size, dtype)
    call()
    if STUDENT:  # gradients are no growth: they stay
        gradients = sum(p.grad.numel() * 4 for p in STUDENT["model"].parameters() if p.grad is not None)
        STUDENT["model"].zero_grad(set_to_none=True)
    else:
        gradients = 0
    rest, seconds = lib.rest_bytes(device), []
    for _ in range(calls):
        lib.wait(device)
        start = time.perf_counter()
        call()
        lib.wait(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "bytes": lib.peak_bytes(device) - rest - gradients}


# ---- the part ----

def measure(args):
    """-> {"series": {name: {"sizes", "seconds", "bytes", "time_exponent", "memory_exponent"}}}"""
    points, log, series = POINTS[args.device], Path(args.out) / "growth.log", {}
    fixed = {k: points[k] for k in ("width", "rows", "vocab", "clips")}
    with tempfile.TemporaryDirectory() as folder:
        llm, encoder = bench_step.prepare_models(args, Path(folder))
        for name, sizes in points.items():
            if name in fixed or not sizes or args.series and name not in args.series:
                continue
            if name == "processes":
                answers = [processes(args, world, Path(folder) / f"processes{world}", llm, encoder, log)
                           for world in sizes]
            else:
                job = dict(series=name, calls=2, dtype=args.dtype, device=args.device, llm=llm, encoder=encoder)
                with lib.Worker(__file__, log) as worker:
                    answers = [worker.ask(size=size, **job, **fixed) for size in sizes]
            answers = [(size, a) for size, a in zip(sizes, answers) if "error" not in a]
            sizes, seconds = [size for size, _ in answers], [min(a["seconds"]) for _, a in answers]
            memory = [a["bytes"] for _, a in answers]
            series[name] = {"sizes": sizes, "seconds": seconds, "bytes": memory,
                            "time_exponent": exponent(sizes, seconds), "memory_exponent": exponent(sizes, memory)}
            print(f"growth: {name} {series[name]}", flush=True)
    return {"series": series, **{k: getattr(args, k) for k in ("device", "llm", "encoder", "dtype")}, **fixed}


def processes(args, world, folder, llm, encoder, log):
    """train_kd.py by text with `world` processes of one thread each, args.batch_size // 4 rows each
    -> seconds of a step, peak of the first process above its weights, gradients and optimizer."""
    batch = max(1, args.batch_size // 4)
    bench_step.prepare_data(args, folder, batch * world * 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [lib.Worker(bench_step.__file__, log, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          LOCAL_WORLD_SIZE=str(lib.cores()), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                          OMP_NUM_THREADS="1") for rank in range(world)]
    for worker in workers:
        worker.send(llm=llm, encoder=encoder, features=str(folder / "features"), batch_size=batch, steps=1, warm_up=1,
                    dtype=args.dtype, answer_tokens=args.answer_tokens, device=args.device, setting="text",
                    rival="ours", data=str(folder / "text.jsonl"), out=str(folder / "out"))
    answer = workers[0].receive()
    for worker in workers:  # the others still wait for the first
        worker.close(patience_s=2)
    if "error" in answer:
        return answer
    return {"seconds": answer["seconds"], "bytes": answer["peak_bytes"] - answer["rest_bytes"]}  # DDP's gradients stay


def exponent(sizes, values):
    """Slope of log(value) on log(size), least squares; None where nothing is left to fit."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def report(results):
    of = {"answer rows": f"loss, V = {results['vocab']:,}, H = {results['width']}",
          "vocabulary": f"loss, N = {results['rows']:,}, H = {results['width']}",
          "batch": f"step of the LLM, {SEQUENCE} tokens a row",
          "clip seconds": f"encoder and adapter, {results['clips']} clips",
          "processes": "train_kd.py by text, the same rows for each"}
    rows = []
    for name, s in results["series"].items():
        cells = [" ".join(f"{x:,}" for x in s["sizes"]), " ".join(f"{x:.3g}" for x in s["seconds"]),
                 " ".join(f"{x / 2**20:.0f}" for x in s["bytes"])]
        fits = ["" if s[key] is None else f"{s[key]:.2f}" for key in ("time_exponent", "memory_exponent")]
        rows.append([name, of[name], cells[0], cells[1], fits[0], cells[2], fits[1]])
    title = f"**Growth**, {results['device']}, {results['llm']}, {results['encoder']}: y = c * size ^ exponent"
    header = ["size", "of", "sizes", "seconds", "exponent", "MiB above inputs or state", "exponent"]
    return title + "\n\n" + lib.table(header, rows) + "\n"


def draw(results, path):
    figure, axes = lib.figure(2)
    for name, s in results["series"].items():
        for axis, values in zip(axes, (s["seconds"], [b / 2**20 for b in s["bytes"]])):
            axis.loglog([x / s["sizes"][0] for x in s["sizes"]], values, marker="o", markersize=3, label=name)
    for axis, label in zip(axes, ("seconds", "MiB")):
        axis.set(title="growth", xlabel="size / smallest size", ylabel=label)
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    lib.serve(run)
