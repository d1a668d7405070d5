"""
Distil a text LLM (teacher) into a speech LLM (student), by text and by speech.

  python train_kd.py --data train.jsonl --eval-data heldout.jsonl --out out/run
  torchrun --nproc_per_node=8 train_kd.py --student WHISPER+LLM --data train.jsonl --out out/run

Reads   manifests of synth_speech.py: JSON lines with id, prompt, audio, response, finish
Writes  OUT/last, OUT/best (students), ckpt-STEP-SHA256.pt, log.jsonl, samples.jsonl, args.json

t2t: the student reads the question.  loss = CE(answer) + lambda * tau^2 * KL(teacher || student)
s2t: the student hears it.            the same, from the same teacher, who reads it
sound: rows whose prompt is null.     CE(answer) alone: no text stands for what is heard
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

import losses
import model as m

EARLY = 8  # answer tokens before the answer itself gives the question away: the gap shows there
CHANNELS = ("t2t", "s2t", "sound")
MAX_GRAD_NORM = 1.0   # of each part by itself: the LLM's gradient would drown the adapter's
WEIGHT_DECAY = 0.01   # of matrices; what nearly everyone takes for fine-tuning
KEEP = 2              # newest checkpoints that stay: one may be damaged
EVAL_ROWS = 16        # measured together
SAMPLE_TOKENS = 40    # of an answer in samples.jsonl
LOADED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    natural, rate = m.number(int, 0), m.number(float, 0, 1)
    weight, positive = m.number(float, 0), m.number(int, 1)
    g = p.add_argument_group("models and data")
    g.add_argument("--teacher", default=m.DEFAULT_LLM,
                   help="text LLM, folder or hub id (NAME@REVISION); frozen")
    g.add_argument("--student", default=m.DEFAULT_STUDENT,
                   help="WHISPER+LLM, a speech LLM of transformers (folder or hub id), "
                        "or a folder that this script wrote")
    g.add_argument("--trust-remote-code", action="store_true",
                   help="run the code that comes in the student's folder; read it first")
    g.add_argument("--data", nargs="+", required=True, help="manifests to train on")
    g.add_argument("--eval-data", nargs="+", default=[], help="manifests to measure on")
    g.add_argument("--max-bad-rows", type=natural, default=0,
                   help="leave out so many unusable rows; OUT/bad_rows.jsonl lists them")
    g.add_argument("--labels", choices=["response", "reference"], default="response",
                   help="the teacher's answer, or the data set's")
    g.add_argument("--max-answer-tokens", type=positive, default=256,
                   help="longer answers are cut there")
    g.add_argument("--out", type=m.out_folder, required=True, help="output folder")
    g.add_argument("--cache", help="folder for what Whisper heard, kilobytes a clip; "
                                   "default: .cache beside the first manifest")
    g.add_argument("--teacher-cache",
                   help="folder for the teacher's hidden rows of every answer: its body runs once "
                        "a row and leaves memory; 2 bytes x width a token; default: no cache")
    g = p.add_argument_group("method")
    g.add_argument("--channels", nargs="+", choices=["t2t", "s2t"], default=["t2t", "s2t"],
                   help="text to text, speech to text")
    g.add_argument("--t2t-weight", type=weight, default=1.0,
                   help="weight of the text channel; the speech channel has 1")
    g.add_argument("--sound-weight", type=weight, default=1.0,
                   help="weight of the rows without a teacher (prompt: null), a mean of their own")
    g.add_argument("--loss", choices=list(losses.DIVERGENCES), default="forward_kl",
                   help="divergence from the teacher")
    g.add_argument("--kd-weight", type=weight, default=0.5,
                   help="lambda of the divergence; the paper has 0.5")
    g.add_argument("--ce-weight", type=weight, default=1.0,
                   help="weight of the cross-entropy; 0 = pure distillation")
    g.add_argument("--temperature", type=m.number(float, 0.01), default=2.0,
                   help="tau of both models; the loss is scaled by tau^2")
    g.add_argument("--beta", type=m.number(float, 1e-6, 1 - 1e-6), default=0.5,
                   help="of jsd and skew_kl, between 0 and 1")
    g = p.add_argument_group("what trains")
    g.add_argument("--train", nargs="+", choices=["encoder", "adapter", "llm"],
                   default=["adapter", "llm"], help="parts that train; Whisper never does")
    g.add_argument("--lora-rank", type=natural, default=0,
                   help="LoRA on the LLM's linear layers, embeddings and head frozen, at --lr-llm "
                        "(1e-4 to 5e-4); needs peft; 0 = off")
    g.add_argument("--lr-encoder", type=rate, default=1e-5, help="peak learning rate")
    g.add_argument("--lr-adapter", type=rate, default=2e-5,
                   help="peak learning rate; 1e-5 to 1e-4: more spoils what a sound layer began with")
    g.add_argument("--lr-llm", type=rate, default=2e-5,
                   help="peak learning rate; the paper: 5e-6 for 7 B")
    g = p.add_argument_group("optimisation")
    g.add_argument("--max-steps", type=natural, default=0,
                   help="optimizer steps; 0 = --epochs")
    g.add_argument("--epochs", type=m.number(float, 0.001), default=2,
                   help="passes over the rows with a teacher, if --max-steps is 0")
    g.add_argument("--batch-size", type=positive, default=8,
                   help="rows with a teacher per GPU per forward")
    g.add_argument("--sound-batch-size", type=positive, default=8,
                   help="rows without one beside them, if there are any")
    g.add_argument("--global-batch-size", type=natural, default=0,
                   help="rows with a teacher per optimizer step over all GPUs; 0: no accumulation")
    g.add_argument("--lr-warmup-steps", type=natural, default=10,
                   help="linear; a cosine to zero follows")
    g.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   default="bfloat16" if torch.cuda.is_available() else "float32",
                   help="of the computation (on a CPU bfloat16 pays with AMX); what trains is "
                        "float32")
    g.add_argument("--gradient-checkpointing", action="store_true",
                   help="recompute activations: less memory, about 30%% slower")
    g.add_argument("--shard", action="store_true",
                   help="FSDP2 in place of DDP: teacher, student and optimizer split over the GPUs")
    g.add_argument("--device", type=m.device,
                   default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    g.add_argument("--workers", type=natural, default=1,
                   help="processes per GPU that load data; 0 = none")
    g.add_argument("--seed", type=m.number(int, 0, 2**32), default=0, help="of the order of rows")
    g = p.add_argument_group("evaluation, checkpoints")
    g.add_argument("--eval-every", type=natural, default=0,
                   help="optimizer steps; 0 = before the first and after the last")
    g.add_argument("--save-every", type=positive, default=50,
                   help="optimizer steps between checkpoints")
    g.add_argument("--resume", action="store_true",
                   help="go on from the newest whole checkpoint of OUT, if there is one")
    args = p.parse_args(argv)
    for name in ("data", "eval_data", "channels", "train"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            p.error(f"--{name.replace('_', '-')} {' '.join(values)}: one is named twice")
    if args.lora_rank and "llm" not in args.train:
        p.error("--lora-rank trains the LLM: add llm to --train")
    if args.channels == ["t2t"] and "llm" not in args.train:
        p.error("--channels t2t trains nothing without --train llm")
    if args.shard and ("RANK" not in os.environ or args.dtype == "float16"):
        p.error("--shard needs torchrun, and does not go with --dtype float16")
    if not args.kd_weight + args.ce_weight:
        p.error("--kd-weight 0 and --ce-weight 0 leave nothing to learn; set one of them")
    args.cache = args.cache or str(Path(args.data[0]).parent / ".cache")
    return args


# ---- rows ----

def read_manifest(path, seen=None, bad=None):
    """Manifest -> rows with absolute audio paths; raises ValueError that names the line, or
    adds it to the list `bad`. seen: ids met before, and where; in several manifests they count
    with the name of the folder, FOLDER/ID."""
    path, prefix = Path(path), "" if seen is None else f"{Path(path).resolve().parent.name}/"
    seen = {} if seen is None else seen
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; synth_speech.py writes one")

    def parse(row, where):
        lost = [key for key in ("id", "prompt", "response") if key not in row]
        if lost:
            raise ValueError(f"{where}: no {', '.join(lost)}; expected id, prompt, audio, response")
        m.check_texts(row, where, "prompt", "response", "reference", "audio", "finish",
                      "instruction", "system", "language")
        seconds = row["seconds"] = row.get("seconds") or 0
        if not isinstance(seconds, int | float) or not 0 <= seconds <= m.MAX_SECONDS:
            raise ValueError(f"{where}: seconds is {seconds!r}, expected 0 to {m.MAX_SECONDS}")
        name = f"{prefix}{row['id']}"
        if not isinstance(row["id"], str | int) or seen.setdefault(name, where) != where:
            raise ValueError(f"{where}: id {row['id']!r} is no text, or also that of "
                             f"{seen.get(name)}; every row needs its own")
        row["id"] = name
        if m.AUDIO_MARK in f"{row.get('system')}{row.get('instruction')}":
            raise ValueError(f"{where}: {m.AUDIO_MARK} stands in system or instruction; it is the "
                             "place of the sound, take it out")
        if not (row.get("audio") if row["prompt"] is None else row["prompt"].strip()):
            raise ValueError(f"{where}: neither prompt nor audio, or a blank prompt; expected text,"
                             " or null where none stands for the sound")
        if row.get("audio"):
            row["audio"] = m.file_below(path.parent, row["audio"], where)
        return row

    return m.json_lines(path, parse, bad)


def channels_of(row, args):
    """The channels that a row can be used in: those of --channels, or "sound"."""
    if not row.get(args.labels):
        return []
    if row["prompt"] is None:
        return ["sound"]
    return [c for c in args.channels if c == "t2t" or row.get("audio")]


def answer_ids(tokenizer, row, labels, max_tokens):
    """The answer, tokenised once for teacher and both channels;
    a cut answer teaches no stopping."""
    ids = tokenizer(row[labels], add_special_tokens=False, split_special_tokens=True).input_ids
    cut = (row.get("finish") == "length" and labels == "response") or len(ids) > max_tokens
    return ids[:max_tokens] + ([] if cut else [m.end_token(tokenizer)])


class Rows(Dataset):
    """Rows of the manifest -> items: everything that a pass needs and no model makes.

    An item: id, answer (token ids), teacher (ids of its whole prompt, or None), and for each of
    its channels the student's prompt. heard_of, taught_of: functions that find what caches hold.
    """

    def __init__(self, rows, student, teacher_tokenizer, args, heard_of, taught_of=None):
        self.rows, self.student, self.teacher_tokenizer = rows, student, teacher_tokenizer
        self.args, self.heard_of, self.taught_of = args, heard_of, taught_of

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row, tokenizer = self.rows[i], self.student.tokenizer
        item = {"id": row["id"], "teacher": None,
                "answer": answer_ids(tokenizer, row, self.args.labels,
                                     self.args.max_answer_tokens)}
        for channel in channels_of(row, self.args):
            if channel == "t2t":
                item["t2t"] = self.student.prompt({**row, "audio": None})
            else:
                item[channel] = self.student.prompt(row, self.heard_of(row))
        if row["prompt"] is not None:
            before, after = m.chat_parts(self.teacher_tokenizer, row.get("system"),
                                         row.get("instruction"))
            item["teacher"] = before + m.text_ids(self.teacher_tokenizer, row["prompt"]) + after
            if self.taught_of:
                item["taught"] = self.taught_of(item)
        return item


def check_sizes(args, taught, sounds, world, global_batch_size):
    """ValueError if there are fewer rows than one step needs."""
    for what, found, size in (
            ("with a teacher", taught, global_batch_size),
            ("without a teacher", sounds,
             global_batch_size // args.batch_size * args.sound_batch_size)):
        if 0 < len(found) < size:
            raise ValueError(f"{len(found)} rows {what} with --labels {args.labels} in "
                             f"{', '.join(args.data)}, fewer than the {size} of one step; "
                             "give more rows or a smaller batch")


def plan_steps(taught, sounds, args, global_batch_size):
    """Which rows each step reads: a list of steps, each a list of micro-batches, one for each
    process and accumulation, each a list of row numbers.

    A function of its arguments alone: no restart changes it, and no number of processes changes
    which rows a step has.
    """
    def drawn(numbers, kind):  # without end, each epoch in an order of its own
        epoch = 0
        while numbers:
            yield from random.Random(f"{args.seed} {kind} {epoch}").sample(numbers, len(numbers))
            epoch += 1

    parts = global_batch_size // args.batch_size
    sizes = (global_batch_size if taught else 0, parts * args.sound_batch_size if sounds else 0)
    epoch = len(taught) / sizes[0] if taught else len(sounds) / sizes[1]
    streams, plan = (drawn(taught, "taught"), drawn(sounds, "sound")), []
    for _ in range(args.max_steps or max(1, round(args.epochs * epoch))):
        step = [[] for _ in range(parts)]
        for stream, size in zip(streams, sizes):
            for k in range(size):
                step[k % parts].append(next(stream))
        plan.append(step)
    return plan


# ---- caches: what Whisper heard, what the teacher's body gave ----

def fingerprint(model, *more):
    """Twelve characters that change with a model's weights, and with what else is named."""
    digest = hashlib.sha1(repr(more).encode())
    for value in model.state_dict().values():  # a few of every tensor: a merged LoRA is seen
        some = value.flatten()[::max(1, value.numel() // 256)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def fill_cache(folder, things, compute, what, ranks):
    """{name: thing} -> FOLDER/NAME.safetensors for each, or NAME.error, which says why not.

    compute: list of things -> list of {key: tensor}, or of str. 32 go together in the order
    given; what meets depends on `things` alone, so that a restart gives the same bits.
    """
    (rank, world), names = ranks, list(things)
    folder.mkdir(parents=True, exist_ok=True)
    batches = [names[i:i + 32] for i in range(0, len(names), 32)][rank::world]

    def there(name):
        return any((folder / f"{name}{end}").exists() for end in (".safetensors", ".error"))

    todo = [batch for batch in batches if not all(there(name) for name in batch)]
    with tqdm(total=sum(map(len, todo)), desc=what, disable=rank > 0 or not todo) as bar:
        for batch in todo:
            for name, value in zip(batch, compute([things[name] for name in batch])):
                temporary = folder / f"{name}.{os.getpid()}"
                if isinstance(value, str):
                    m.write_atomically(folder / f"{name}.error", value)
                elif not there(name):
                    save_file({k: v.contiguous().cpu() for k, v in value.items()}, temporary)
                    os.replace(temporary, folder / f"{name}.safetensors")
            bar.update(len(batch))
    if world > 1:
        dist.barrier()


def hear_all(args, student, rows, bad, ranks):
    """Let Whisper hear every clip once -> function from a row to what was heard; rows whose clip
    cannot be used are added to `bad`. A file's name is the digest of the clip's bytes, of Whisper
    and of the language, so that none of them can change unnoticed."""
    built_here = isinstance(student, m.SpeechLLM)
    listener = fingerprint(student.whisper, "mean so far") if built_here else "read"
    folder, names, clips = Path(args.cache) / listener, {}, {}
    for row in sorted(rows, key=lambda row: (row["seconds"], row["id"])):  # such end together
        if row.get("audio"):
            digest = hashlib.sha256(f"{m.digest(row['audio'])} {row.get('language')}".encode())
            names[row["audio"], row.get("language")] = name = digest.hexdigest()
            clips.setdefault(name, row)

    def compute(batch):
        results, readable = [], []
        for row in batch:
            try:
                readable.append((row.get("language"), m.load_audio(row["audio"])))
                results.append(None)
            except (ValueError, OSError) as error:
                results.append(str(error))
        languages, waveforms = map(list, zip(*readable)) if readable else ([], [])
        found = zip(student.hear(waveforms, languages), waveforms)
        for k, failed in enumerate(results):
            if failed is None:
                heard, waveform = next(found)
                results[k] = {"samples": torch.tensor(len(waveform))}
                if heard is not None:
                    results[k] = {"ids": heard.ids, "states": heard.states.half(),
                                  "sound": heard.sound.half()}
        return results

    fill_cache(folder, clips, compute, "hearing" if built_here else "reading", ranks)
    for row in rows:
        error = folder / f"{names.get((row.get('audio'), row.get('language')))}.error"
        if error.exists():
            bad.append({"id": row["id"], "reason": error.read_text()})

    def heard_of(row):
        if not built_here or not row.get("audio"):
            return None
        name = names[row["audio"], row.get("language")]
        return student.whisper.heard(**load_file(folder / f"{name}.safetensors"))

    return heard_of


def align_sounds(student, rows, heard_of):
    """Let a sound layer begin with what rows without a teacher say about their clips ->
    number of clips. An answer counts by its mean embedding, less the mean over its question's
    answers; one that is given once (a transcript) tells words, not sound."""
    table, answers = student.llm.get_input_embeddings().weight.detach().float(), {}
    for row in rows:
        if row["prompt"] is None:
            ids = m.text_ids(student.tokenizer, row["response"])
            answers.setdefault(row.get("instruction"), []).append((row, tuple(ids)))
    sounds, targets = {}, {}
    for found in answers.values():
        counts = collections.Counter(ids for _, ids in found)
        kept = [(row, ids) for row, ids in found if counts[ids] > 1]
        vectors = [table[list(ids)].mean(0) for _, ids in kept]                   # (H,) each
        for (row, _), vector in zip(kept, vectors):
            clip, offset = row["audio"], vector - torch.stack(vectors).mean(0)
            targets[clip] = targets.get(clip, 0) + offset
            sounds[clip] = heard_of(row).sound.to(student.device)
    if sounds:
        student.adapter.align(list(sounds.values()), torch.stack([targets[c] for c in sounds]))
    return len(sounds)


def teach_all(args, teacher, parts, ranks):
    """Let the teacher's body read each row once -> function from item to its hidden rows (n, H'),
    which give the exact divergence, whatever the loss; a few of the largest logits would not."""
    folder = Path(args.teacher_cache) / fingerprint(teacher, teacher.dtype)

    def name_of(item):
        return hashlib.sha256(json.dumps([item["teacher"], item["answer"]]).encode()).hexdigest()

    items = {}
    for part in parts:
        for k in range(len(part)):
            item = part[k]
            if item["teacher"]:
                items[name_of(item)] = item
    fill_cache(folder, items, lambda batch: [{"x": x} for x in teacher_rows(teacher, batch)],
               "teaching", ranks)
    return lambda item: load_file(folder / f"{name_of(item)}.safetensors")["x"]


# ---- one pass through teacher and student ----

@contextlib.contextmanager
def teaching(llm):
    """The student's own LLM as the teacher: adapters off, no dropout."""
    training = llm.training
    llm.eval()
    llm.disable_adapters()
    yield
    llm.enable_adapters()
    llm.train(training)


@torch.no_grad()
def teacher_rows(teacher, items):
    """One teacher forward for both channels -> the hidden rows that predict the answers,
    list of (n_i, H'); from the cache if the items carry them."""
    lengths = [len(item["answer"]) for item in items]
    if "taught" in items[0]:
        return [item["taught"] for item in items]
    if hasattr(teacher, "llm"):  # a student with LoRA on the teacher's own weights
        with teaching(teacher.llm):
            prompts = [teacher.unheard(item["teacher"]) for item in items]
            return teacher(prompts, [item["answer"] for item in items]).split(lengths)
    rows = [torch.tensor(item["teacher"] + item["answer"], device=teacher.device)
            for item in items]
    shared = len(os.path.commonprefix([item["teacher"] for item in items]))
    return m.answer_states(teacher, rows, lengths, shared).split(lengths)


def chunk_rows_of(head):
    """Rows whose logits exist at the same time. On a CPU 128 MiB of each model's, twice that if
    each chunk has to upcast the head; on a GPU more, since a chunk costs kernel launches."""
    if head.is_cuda:
        return max(256, 2**26 // len(head))
    size = 2**25 if head.dtype == torch.float32 else 2**26
    return 2 ** max(6, int(math.log2(size / len(head))))


def channel_loss(args, channel, llms, hidden, items, taught):
    """Sums over a channel's answer tokens -> (loss, ce, kd).

    llms: the student's, and the teacher's if there is one. taught: {id: the teacher's rows}.
    Rows without a teacher get CE, whatever --ce-weight is.
    """
    ce_weight, kd_weight = args.ce_weight, args.kd_weight
    if channel == "sound":
        ce_weight, kd_weight = 1.0, 0.0
    teacher_llm, teacher_hidden = llms[0], hidden.detach()
    if kd_weight:
        teacher_llm = llms[-1]
        rows = [taught[item["id"]][:len(item["answer"])] for item in items]
        teacher_hidden = torch.cat(rows).to(hidden.device)
    heads = [llm.get_output_embeddings().weight for llm in (llms[0], teacher_llm)]
    targets = [token for item in items for token in item["answer"]]
    return losses.fused_ce_kd(
        student_hidden=hidden, student_weight=heads[0], teacher_hidden=teacher_hidden,
        teacher_weight=heads[1], targets=torch.tensor(targets, device=hidden.device),
        kind=args.loss, temperature=args.temperature, beta=args.beta, ce_weight=ce_weight,
        kd_weight=kd_weight, student_logit_scale=m.logit_scale(llms[0]),
        teacher_logit_scale=m.logit_scale(teacher_llm), chunk_rows=chunk_rows_of(heads[0]))


def passes_of(items, channels, awaited):
    """What a micro-batch asks of the student: [(channel, its items)], speech first: it keeps more,
    and there are no gradients yet. A channel that others wait for is passed through in any case:
    a row that is read, with an answer of no token, stands in."""
    found = []
    for channel in channels:
        chosen = [item for item in items if channel in item]
        if not chosen and channel in awaited:
            chosen = [{**item, channel: item["t2t"], "answer": []}
                      for item in items if "t2t" in item][:1]
        found += [(channel, chosen)] if chosen else []
    return found


# ---- evaluation ----

@torch.no_grad()
def measure(student, teacher, items, channels, autocast):
    """Divergence from the teacher, row by row -> {channel: [(kl (n,) nats at tau 1, agree (n,))]}
    over each answer's tokens."""
    llms = student.llm, getattr(teacher, "llm", teacher)
    heads = [whole(llm.get_output_embeddings().weight).to(student.device) for llm in llms]
    scales, lengths = [m.logit_scale(llm) for llm in llms], [len(i["answer"]) for i in items]
    taught, results = torch.cat(teacher_rows(teacher, items)).to(student.device), {}
    for channel in channels:
        with autocast():
            hidden = student([item[channel] for item in items], [item["answer"] for item in items])
        kl, agree = losses.token_kl(
            student_hidden=hidden, student_weight=heads[0], student_logit_scale=scales[0],
            teacher_hidden=taught, teacher_weight=heads[1], teacher_logit_scale=scales[1])
        results[channel] = list(zip(kl.cpu().split(lengths), agree.cpu().split(lengths)))
    return results


def evaluate(args, student, teacher, rows, ranks, autocast):
    """Every rank measures its share -> record for the log: KL and agreement, over all answer
    tokens and over the first EARLY, of each channel; the gap between the channels."""
    (rank, world), was_training = ranks, student.training
    student.eval()
    share = -(-len(rows) // world)  # as many on every rank: sharded models work together
    sums = torch.zeros(len(args.channels), 2, 3, dtype=torch.float64)  # KL, agreements, tokens
    for start in range(0, share, EVAL_ROWS):
        numbers = [rank + world * k for k in range(start, min(start + EVAL_ROWS, share))]
        items = [rows[k % len(rows)] for k in numbers]
        found = measure(student, teacher, items, args.channels, autocast)
        for c, channel in enumerate(args.channels):
            for k, (kl, agree) in zip(numbers, found[channel]):
                for part, tokens in enumerate((len(kl), EARLY) if k < len(rows) else ()):
                    first = kl[:tokens].double()
                    sums[c, part] += torch.stack([first.sum(), agree[:tokens].double().sum(),
                                                  torch.tensor(len(first)).double()])
    student.train(was_training)
    if world > 1:
        sums = sums.to(student.device)
        dist.all_reduce(sums)
    record = {}
    for channel, parts in zip(args.channels, sums.tolist()):
        for suffix, (kl, agree, tokens) in zip(("", "8"), parts):
            record[f"eval_kl{suffix}_{channel}"] = kl / max(1, tokens)
            record[f"eval_agree{suffix}_{channel}"] = agree / max(1, tokens)
    if len(args.channels) == 2:
        record["eval_gap8"] = record["eval_kl8_s2t"] - record["eval_kl8_t2t"]
    return record


def write_samples(student, rows, path, step):
    """The student's answers by speech to a few rows, for whoever would rather read than count."""
    rows = sorted(rows, key=lambda row: len(row["prompt"]))[:3]
    answers = student.generate(rows, max_new_tokens=SAMPLE_TOKENS)
    with open(path, "a") as file:
        for row, text in zip(rows, answers):
            file.write(json.dumps({"step": step, "prompt": row["prompt"], "by_speech": text,
                                   "teacher": row["response"]}) + "\n")
    print(f"      asked: {rows[0]['prompt']!r}\n      by speech: {answers[0]!r}")


# ---- what trains ----

def check_pair(teacher, teacher_tokenizer, student):
    """Same ordinary vocabulary and end of turn, and plain heads;
    special tokens may be named differently."""
    a, b = teacher_tokenizer.get_vocab(), student.tokenizer.get_vocab()
    for tokenizer, vocab in ((teacher_tokenizer, a), (student.tokenizer, b)):
        for token in tokenizer.get_added_vocab():
            vocab.pop(token, None)
    ends = m.end_token(teacher_tokenizer), m.end_token(student.tokenizer)
    if a != b or ends[0] != ends[1]:
        example = next((t for t in sorted(a.keys() | b.keys()) if a.get(t) != b.get(t)), None)
        raise RuntimeError("teacher and student need one tokenizer: "
                           f"{teacher_tokenizer.name_or_path} and {student.tokenizer.name_or_path} "
                           f"differ, e.g. in {example!r}, and end a turn with {ends}")
    for llm in (getattr(teacher, "llm", teacher), student.llm):
        if getattr(llm.config.get_text_config(decoder=True), "final_logit_softcapping", None):
            raise RuntimeError(f"{llm.config.model_type}: capped logits (final_logit_softcapping) "
                               "are not supported; choose another model")


def load_teacher(args, student, dtype):
    """-> (teacher, tokenizer); with LoRA on the teacher's own weights, the student itself."""
    teacher, tokenizer = m.load_llm(args.teacher, dtype)
    check_pair(teacher, tokenizer, student)
    own = student.llm.state_dict()
    same = all(k in own and torch.equal(own[k].to(v), v) for k, v in teacher.state_dict().items())
    if args.lora_rank and same and not args.teacher_cache and isinstance(student, m.SpeechLLM):
        return student, student.tokenizer
    return teacher.requires_grad_(False), tokenizer


def choose_what_trains(args, student, dtype):
    """Parts of --train stay in float32 and train; the rest is frozen in `dtype`."""
    missing = [name for name in args.train if name not in student.parts()]
    if missing:
        raise ValueError(f"--train {missing[0]}: {args.student} trains "
                         f"{', '.join(student.parts())}; its Whisper stays as it is")
    student.requires_grad_(False)
    for name in args.train:
        for part in student.parts()[name]:
            part.requires_grad_(True)
    if args.lora_rank:
        student.llm.name_or_path = args.student.partition("+")[2] or args.student
        torch.manual_seed(args.seed)  # it starts at random
        m.add_lora(student.llm, args.lora_rank)
    for name, parameter in student.named_parameters():
        if "embed_positions" in name:  # sinusoids
            parameter.requires_grad_(False)
        # parameters alone: module.to would round RoPE's frequencies too
        if not parameter.requires_grad and not name.startswith(("adapter.", "whisper.")):
            parameter.data = parameter.data.to(dtype)


def make_optimizer(args, student):
    """AdamW over the parts that train; matrices decay, vectors do not. The loop sets the rates."""
    groups = []
    for name in args.train:
        trained = []
        for part in student.parts()[name]:
            trained += [p for p in part.parameters() if p.requires_grad]
        groups += [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY,
                    "part": name},
                   {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0,
                    "part": name}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def update(args, optimizer, scaler, step):
    """Clip each part's gradient by itself, step the optimizer -> norms for the log."""
    scaler.unscale_(optimizer)  # clip the true gradient
    norms = {}
    for name in args.train:
        trained = []
        for group in optimizer.param_groups:
            trained += group["params"] if group["part"] == name else []
        norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)))
        norms[f"norm_{name}"] = norm
        if not math.isfinite(norm) and scaler.get_scale() <= 1:  # else fp16 skips the step
            raise RuntimeError(f"gradient norm {norm} of {name} in step {step}; lower the learning "
                               f"rate, or --dtype bfloat16; the newest checkpoint of {args.out} "
                               "keeps the last good state")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norms


def shard(student, teacher, dtype, device):
    """FSDP2: layers one by one, then the rest. Layers are gathered in `dtype` when they are needed,
    gradients are summed in float32; the adapter is all float32. The teacher's head stays whole."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))
    apart = teacher is not None and teacher is not student
    for llm in [student.llm, teacher] if apart else [student.llm]:
        for layer in m.layers_of(llm):
            fully_shard(layer, **options)
    for part in student.parts()["adapter"]:
        fully_shard(part, mesh=mesh, reshard_after_forward=False,
                    mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    listener = getattr(student, "whisper", torch.nn.Module())
    fully_shard(student, ignored_params=set(listener.parameters()), **options)
    if apart:
        fully_shard(teacher.base_model, reshard_after_forward=True, **options)


def whole(tensor):
    """What FSDP has sharded, gathered: every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---- checkpoints ----

def checkpoints(out):
    """Files ckpt-STEP-SHA256.pt, the newest first."""
    return sorted(Path(out).glob("ckpt-*.pt"), reverse=True)


def run_identity(args, rows, world):
    """What must be the same for a run to go on: options, processes, the content of the rows."""
    free = ("resume", "device", "workers", "out", "save_every", "cache", "shard")
    same = {k: v for k, v in vars(args).items() if k not in free}
    content = [{k: v for k, v in row.items() if k != "audio"} for row in rows]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**same, "processes": world, "content of the rows": f"{len(rows)} {digest[:12]}"}


def save_checkpoint(args, student, optimizer, scaler, progress, identity):
    """Trainable weights and everything else that a bit-exact continuation needs; complete or not
    there. Every rank must call it, the first one writes. Raises OSError if it cannot be written."""
    weights, moments = get_state_dict(student, optimizer, options=LOADED)
    if int(os.environ.get("RANK", 0)):
        return
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # torch leaves out one of two names of a tied head
            weights.pop(name, None)
    out = Path(args.out)
    temporary = out / "ckpt.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save({"model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
                        **progress, "identity": identity}, file)
            file.flush()
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:  # torch does not say why, the system not where
        raise OSError(f"{temporary} cannot be written ({error}): "
                      f"{shutil.disk_usage(out).free / 2**30:.2f} GiB are free there") from error
    path = out / f"ckpt-{progress['step']:06d}-{m.digest(temporary)[:16]}.pt"
    os.replace(temporary, path)
    for old in checkpoints(out)[KEEP:]:
        old.unlink()


def load_checkpoint(args, student, optimizer, scaler, identity):
    """The newest whole checkpoint of OUT -> step, best score, names of damaged ones."""
    damaged = []
    for path in checkpoints(args.out):
        if path.stem.endswith(m.digest(path)[:16]):
            break
        damaged.append(path.name)
    else:
        raise RuntimeError(f"{args.out}: no checkpoint has the SHA-256 that its name says "
                           f"({len(damaged)} tried); copy one back, or choose another --out")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: no checkpoint can be read from it ({str(error)[:99]}); start "
                         "afresh in another --out") from error
    old = saved["identity"]
    changed = [f"{k} {old.get(k)!r} -> {v!r}" for k, v in identity.items() if old.get(k) != v]
    if changed:
        raise ValueError(f"{path} was written by another run; changed: {', '.join(changed)}; "
                         "repeat the old ones, or start afresh in another --out")
    set_state_dict(student, optimizer, model_state_dict=saved["model"],
                   optim_state_dict=saved["optimizer"], options=LOADED)
    scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["best"], damaged


def save_folder(student, folder, dtype):
    """The student as a folder of transformers. Every rank must call it, the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(student, options=options)
    if not int(os.environ.get("RANK", 0)):
        m.save_student(student, folder, dtype, state)


# ---- log ----

def cut_back(path, step):
    """Leave the lines before a step's evaluation, which is repeated: they are as they would be
    without a stop."""
    kept = []
    for line in path.read_text().splitlines(True) if path.exists() else []:
        record = json.loads(line) if line.endswith("\n") else {"step": math.inf}
        if record["step"] < step or record["step"] == step and "loss" in record:
            kept.append(line)
    m.write_atomically(path, "".join(kept))


def log(out, record):
    with open(Path(out) / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def resources(device):
    """What a long run must not use more and more of, see tools/soak.py."""
    memory = (torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    record = {"memory": memory}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        record |= {"resident": pages * resource.getpagesize() / 2**30,
                   "open_files": len(os.listdir("/proc/self/fd"))}
    return record


def print_step(record, steps):
    """One line for people: where the run is, what it costs, how long it takes."""
    cells = [f"step {record['step']:5d}/{steps}"]
    for key, value in record.items():
        if key == "loss" or key.startswith(("ce_", "kd_", "norm_")) or key == "lr":
            cells.append(f"{key} {value:.4g}")
    cells += [f"{record['tokens_per_s']:.0f} tok/s", f"{record['memory']:.1f} GiB",
              f"{record['seconds'] * (steps - record['step']) / 60:.1f} min left"]
    print(" | ".join(cells), flush=True)


# ---- main ----

def start_processes(args):
    """-> rank, world size and device; with torchrun, all processes have met."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device(args.device)
    if args.device == "cpu":
        dist.init_process_group("gloo")  # torchrun sets one thread a process
        torch.set_num_threads(max(1, m.cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
        return dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    dist.init_process_group("nccl")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def outlive_sigterm(_worker):
    """A loader's process ends with the run, which still finishes its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def usable_rows(args, rows):
    """Rows that some channel can use, and how many each channel has; ValueError if a channel that
    was asked for has none."""
    what = " ".join(args.data)
    used = [row for row in rows if channels_of(row, args)]
    counts = dict.fromkeys(CHANNELS, 0)
    for row in used:
        for channel in channels_of(row, args):
            counts[channel] += 1
    for channel in args.channels:
        taught = [row for row in used if row["prompt"] is not None]
        if taught and not counts[channel]:
            needs = {"t2t": "prompt", "s2t": "audio"}[channel]
            raise ValueError(f"{what}: no row has {needs} and {args.labels}, which the channel "
                             f"{channel} needs; rename the key, or leave out --channels {channel}")
    if not used:
        raise ValueError(f"{what}: none of {len(rows)} rows has {args.labels}; "
                         "synth_speech.py writes it")
    return used, counts


def render_all(rows, llms, bad, new_tokens=0):
    """Make every item once, before anything trains; what fails, or leaves no room for so many new
    tokens, is added to `bad`."""
    context = min(getattr(llm.config, "max_position_embeddings", None) or math.inf for llm in llms)
    for k, row in enumerate(rows.rows):
        try:
            item = rows[k]
        except ValueError as error:
            bad.append({"id": row["id"], "reason": f"row {row['id']!r}: {error}"})
            continue
        sizes = [len(item["teacher"] or [])]
        sizes += [m.positions(item[channel]) for channel in set(item) & set(CHANNELS)]
        size = max(sizes) + max(len(item["answer"]), new_tokens)
        if size > context:
            bad.append({"id": row["id"], "reason":
                        f"row {row['id']!r}: {size} tokens of prompt, speech and answer, the "
                        f"models' context is {context}; shorten it or lower --max-answer-tokens"})


def main(args):
    # ---- processes, rows ----
    signal.signal(signal.SIGTERM, m.stop_now)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rank, world, device = start_processes(args)
    ranks, master, out, dtype = (rank, world), rank == 0, Path(args.out), getattr(torch, args.dtype)
    autocast = functools.partial(torch.autocast, device.type, dtype, dtype != torch.float32)
    if checkpoints(out) and not args.resume:
        raise ValueError(f"{checkpoints(out)[0]} exists: add --resume to go on, "
                         "or choose another --out")
    seen, bad, at_once = {}, [], args.batch_size * world
    global_batch_size = args.global_batch_size or at_once
    if global_batch_size % at_once:
        raise ValueError(f"--global-batch-size {global_batch_size} is not a multiple of "
                         f"--batch-size {args.batch_size} x {world} processes; "
                         f"use {at_once * max(1, global_batch_size // at_once)}")
    train_rows = [row for path in args.data for row in read_manifest(path, seen, bad)]
    eval_rows = [row for path in args.eval_data for row in read_manifest(path, {}, bad)]
    m.leave_out(bad, args.max_bad_rows, out, master)
    train_rows, counts = usable_rows(args, train_rows)
    measured = [row for row in eval_rows if channels_of(row, args) == args.channels]
    if args.eval_data and not measured:
        raise ValueError(f"--eval-data {' '.join(args.eval_data)}: none of {len(eval_rows)} rows "
                         f"has prompt, audio and {args.labels}, which measuring needs")

    # ---- student, teacher ----
    student = m.load_student(args.student, args.trust_remote_code)
    teacher, teacher_tokenizer = None, student.tokenizer
    if args.kd_weight and counts["t2t"] + counts["s2t"] or measured:
        teacher, teacher_tokenizer = load_teacher(args, student, dtype)
    choose_what_trains(args, student, dtype)
    if args.gradient_checkpointing:
        student.llm.gradient_checkpointing_enable()
    if not args.shard:  # else they move piece by piece
        student.to(device)
    elif hasattr(student, "whisper"):
        student.whisper.to(device)

    # ---- what is heard, taught and read ----
    heard_of = hear_all(args, student, train_rows + measured, bad, ranks)
    lost = {row["id"] for row in bad}
    train_rows, measured = ([row for row in part if row["id"] not in lost]
                            for part in (train_rows, measured))
    rows = Rows(train_rows, student, teacher_tokenizer, args, heard_of)
    eval_set = Rows(measured, student, teacher_tokenizer, args, heard_of)
    llms = [llm for llm in (student.llm, getattr(teacher, "llm", teacher)) if llm is not None]
    for part, new_tokens in ((rows, 0), (eval_set, SAMPLE_TOKENS)):
        render_all(part, llms, bad, new_tokens)
        lost = {row["id"] for row in bad}
        part.rows = [row for row in part.rows if row["id"] not in lost]
    said = m.leave_out(bad, args.max_bad_rows, out, master)
    train_rows, counts = usable_rows(args, rows.rows)
    if args.eval_data and not eval_set.rows:
        raise ValueError(f"--eval-data {' '.join(args.eval_data)}: no row is left to measure on, "
                         f"see {out / 'bad_rows.jsonl'}")
    aligned = 0
    if isinstance(student, m.SpeechLLM) and not student.adapter.listens:
        aligned = align_sounds(student, train_rows, heard_of)
        student.adapter.listens.fill_(True)
    if teacher is not None and teacher is not student and (args.teacher_cache or not args.shard):
        teacher.to(device)
    if args.teacher_cache and teacher is not None:
        rows.taught_of = eval_set.taught_of = teach_all(args, teacher, [rows, eval_set], ranks)
        teacher.base_model.to("meta")  # its body leaves memory, its head stays
    taught = [k for k, row in enumerate(rows.rows) if row["prompt"] is not None]
    sounds = [k for k, row in enumerate(rows.rows) if row["prompt"] is None]
    check_sizes(args, taught, sounds, world, global_batch_size)
    plan = plan_steps(taught, sounds, args, global_batch_size)

    # ---- optimizer, resume, log ----
    if args.shard:
        shard(student, teacher, dtype, device)
    optimizer = make_optimizer(args, student)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    identity = run_identity(args, rows.rows + eval_set.rows, world)
    step, best, steps = 0, None, len(plan)
    out.mkdir(parents=True, exist_ok=True)
    if checkpoints(out):
        step, best, damaged = load_checkpoint(args, student, optimizer, scaler, identity)
        for name in [f"going on from step {step}", *(f"{name} is damaged" for name in damaged)]:
            print(name * master)
    if master:
        versions = {"processes": world, "torch": torch.__version__,
                    "transformers": transformers.__version__}
        m.write_atomically(out / "args.json", json.dumps({**vars(args), **versions}, indent=1))
        for name in ("log.jsonl", "samples.jsonl"):
            cut_back(out / name, step)
        print("\n".join([said] * bool(said) + [
            f"sound layer: begins with {aligned} clips, in closed form"] * bool(aligned) + [
            f"rows: {counts['t2t']} by text, {counts['s2t']} by speech, {counts['sound']} without "
            f"a teacher, {len(eval_set)} to measure on; {steps} steps; "
            f"{sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6:.1f} M "
            "weights train"]))
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))

    # ---- the loop ----
    model = student
    if world > 1 and not args.shard:
        model = DistributedDataParallel(student, gradient_as_bucket_view=True,
                                        device_ids=None if device.index is None else [device.index])
    todo = [micro_batch for rows_of_step in plan[step:] for micro_batch in rows_of_step[rank::world]]
    stream = iter(DataLoader(rows, batch_sampler=todo, num_workers=args.workers, collate_fn=list,
                             worker_init_fn=outlive_sigterm,
                             multiprocessing_context="fork" if args.workers else None))
    trained = [c for c in CHANNELS[::-1] if c != "t2t" or "llm" in args.train]
    awaited = ["s2t"] * (counts["s2t"] and (world > 1 or "llm" not in args.train))
    weights = {"t2t": args.t2t_weight, "s2t": 1.0, "sound": args.sound_weight}
    student.train()
    begun = time.perf_counter()
    while True:
        last = step == steps
        if len(eval_set) and (last or step % (args.eval_every or steps) == 0):
            record = evaluate(args, student, teacher, eval_set, ranks, autocast)
            score = record.get("eval_kl8_s2t", record.get("eval_kl8_t2t"))
            if best is None or score < best:  # the best early answers by speech
                best = score
                save_folder(student, out / "best", dtype)
            if master:
                log(out, {"step": step, **record})
                print("eval  " + " | ".join(f"{k[5:]} {v:.3f}" for k, v in record.items()))
            if master and not args.shard:  # sharded ranks would lose step
                write_samples(student, eval_set.rows, out / "samples.jsonl", step)
        if last:
            break
        factor = (min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
                  * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = getattr(args, f"lr_{group['part']}") * factor

        # -------- one optimizer step --------
        started = time.perf_counter()
        micro_batches = [next(stream) for _ in range(len(plan[step]) // world)]
        # Mean over ALL supervised tokens of the step, per channel: a mean per micro-batch would
        # weight a 3-token answer like a 300-token one. DDP averages over ranks, hence `world` below.
        counts = torch.zeros(len(CHANNELS) + 1, dtype=torch.float64)
        for items in micro_batches:
            for channel, chosen in passes_of(items, trained, awaited):
                counts[CHANNELS.index(channel)] += sum(len(item["answer"]) for item in chosen)
        counts[-1] = len(stopped)
        counts = counts.to(device)
        if world > 1:
            dist.all_reduce(counts)
        if counts[-1]:  # SIGTERM came to one of the processes
            break
        num_tokens = dict(zip(CHANNELS, counts.clamp(min=1).tolist()))
        # after the fetch: a new DataLoader iterator draws from this generator
        torch.manual_seed(args.seed + 100_003 * step + rank)
        sums = torch.zeros(len(CHANNELS), 3, dtype=torch.float64, device=device)  # loss, CE, KD
        for micro_step, items in enumerate(micro_batches):
            by_teacher = [item for item in items if item["teacher"]] if args.kd_weight else []
            rows_of = {}  # one teacher pass serves both channels
            if by_teacher:
                ids = [item["id"] for item in by_teacher]
                rows_of = dict(zip(ids, teacher_rows(teacher, by_teacher)))
            passes = passes_of(items, trained, awaited)
            for turn, (channel, chosen) in enumerate(passes):
                final = micro_step == len(micro_batches) - 1 and turn == len(passes) - 1
                # no_sync must cover forward AND backward:
                # DDP decides in forward whether this backward will sync
                with contextlib.nullcontext() if final or model is student else model.no_sync():
                    with autocast():
                        hidden = model([item[channel] for item in chosen],
                                       [item["answer"] for item in chosen])       # (N, H)
                        loss, *parts = channel_loss(args, channel, llms, hidden, chosen, rows_of)
                    loss = weights[channel] / num_tokens[channel] * loss
                    scaler.scale(loss * world).backward()
                sums[CHANNELS.index(channel)] += torch.stack([loss.detach(), *parts])
        if world > 1:
            dist.all_reduce(sums)
        if not sums.isfinite().all():
            names = [item["id"] for items in micro_batches for item in items]
            raise RuntimeError(f"loss {float(sums[:, 0].sum())} in step {step + 1}, factor of the "
                               f"learning rate {factor:.3f}; rows of rank {rank}: {names}; "
                               f"the newest checkpoint of {out} keeps the last good state")
        norms = update(args, optimizer, scaler, step + 1)
        step += 1
        # ------------------------------------

        if master:
            seconds = time.perf_counter() - started
            record = {"step": step, "loss": float(sums[:, 0].sum())}
            for channel, count, (_, ce, kd) in zip(CHANNELS, counts.tolist(), sums.tolist()):
                if count:
                    record |= {f"ce_{channel}": ce / count, f"kd_{channel}": kd / count}
            record |= {**norms, "lr": max(group["lr"] for group in optimizer.param_groups),
                       "tokens_per_s": float(counts[:-1].sum()) / seconds, "seconds": seconds,
                       "hours": (time.perf_counter() - begun) / 3600, **resources(device)}
            log(out, record)
            print_step(record, steps)
        if step % args.save_every == 0 or step == steps:
            save_checkpoint(args, student, optimizer, scaler, {"step": step, "best": best},
                            identity)

    # ---- the student ----
    if 0 < step < steps:  # before the first step, saving would count one in the optimizer
        save_checkpoint(args, student, optimizer, scaler, {"step": step, "best": best}, identity)
    elif step == steps:
        save_folder(student, out / "last", dtype)
    if master:
        print(f"wrote {out / 'last'}" if step == steps else
              f"stopped by SIGTERM after step {step}; the same command with --resume goes on")
    if world > 1:
        dist.barrier()  # torchrun kills all when one has ended otherwise
        dist.destroy_process_group()
    return 0 if step == steps else 143


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print("train_kd.py:", *str(error).split(), file=sys.stderr)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()  # of the loader: Python would wait for what outlives SIGTERM
        sys.exit(2)
