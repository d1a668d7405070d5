"""
Distil a text LLM (teacher) into a speech LLM (student), by text and by speech.

  python train_kd.py --data train.jsonl --eval-data heldout.jsonl --out out/run
  torchrun --nproc_per_node=8 train_kd.py --student WHISPER+LLM --data train.jsonl --out out/run

Reads   manifests of synth_speech.py: JSON lines with id, prompt, audio, response, finish
Writes  OUT/last, OUT/best (students), ckpt-STEP-SHA256.pt, log.jsonl, samples.jsonl, args.json,
        bad_rows.jsonl

t2t: the student reads the question.  loss = CE(answer) + lambda * tau^2 * KL(teacher || student)
s2t: the student hears it.            the same, from the same teacher, who reads it
sound: rows whose prompt is null.     CE(answer) alone, a mean over rows: no text stands for what
                                      is heard
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
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
from tqdm import tqdm

import losses
import model as m

EARLY = 8  # answer tokens before the answer itself gives the question away: the gap shows there
CHANNELS = ("t2t", "s2t", "sound")
EVAL_ROWS = 16        # measured together
SAMPLE_TOKENS = 40    # of an answer in samples.jsonl
KEYS = ("id", "prompt", "audio", "response", "reference", "finish", "instruction", "system",
        "language")   # of a row; others are not read
FREE_OPTIONS = ("resume", "device", "workers", "out", "save_every", "cache", "shard")  # of --resume
TRAINED_ONLY = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    natural, positive = m.number(int, 0), m.number(int, 1)
    rate, weight = m.number(float, 0, 1), m.number(float, 0)
    add = p.add_argument_group("models and data").add_argument
    add("--teacher", default=m.DEFAULT_LLM, help="frozen text LLM: folder or hub id, NAME@REVISION")
    add("--student", default=m.DEFAULT_STUDENT,
        help="WHISPER+LLM, a speech LLM of transformers, or a folder that this script wrote")
    add("--data", nargs="+", required=True, help="manifests to train on")
    add("--eval-data", nargs="+", default=[], help="manifests to measure on")
    add("--max-bad-rows", type=natural, default=0,
        help="leave out so many unusable rows; OUT/bad_rows.jsonl lists them")
    add("--labels", choices=["response", "reference"], default="response",
        help="the teacher's answer, or the data set's")
    add("--max-answer-tokens", type=positive, default=256, help="longer answers are cut there")
    add("--out", required=True, help="output folder")
    add("--cache", help="folder for what Whisper heard, kilobytes a clip; default: .cache beside "
                        "the first manifest")
    add("--teacher-cache", help="folder for the teacher's hidden rows of every answer: its body "
                                "runs once a row and leaves memory; 2 bytes x width a token; "
                                "default: no cache")
    add = p.add_argument_group("method").add_argument
    add("--channels", nargs="+", choices=["t2t", "s2t"], default=["t2t", "s2t"],
        help="text to text, speech to text")
    add("--t2t-weight", type=weight, default=1.0, help="of the text channel; speech has 1")
    add("--sound-weight", type=weight, default=1.0,
        help="of the rows without a teacher (prompt: null), a mean of their own")
    add("--loss", choices=list(losses.DIVERGENCES), default="forward_kl",
        help="divergence from the teacher")
    add("--kd-weight", type=weight, default=0.5, help="lambda of the divergence; the paper has 0.5")
    add("--ce-weight", type=weight, default=1.0,
        help="of the cross-entropy where there is a teacher; 0 = pure distillation")
    add("--temperature", type=m.number(float, 0.01), default=2.0,
        help="tau of both models; the loss is scaled by tau^2")
    add("--beta", type=m.number(float, 1e-6, 1 - 1e-6), default=0.5, help="of jsd and skew_kl")
    add = p.add_argument_group("what trains").add_argument
    add("--train", nargs="+", choices=["encoder", "adapter", "llm"], default=["adapter", "llm"],
        help="parts that train; Whisper never does")
    add("--lora-rank", type=natural, default=0,
        help="LoRA on the LLM's linear layers, embeddings and head frozen, at --lr-llm (1e-4 to "
             "1e-3); needs peft; 0 = off")
    add("--lr-encoder", type=rate, default=1e-5, help="peak learning rate")
    add("--lr-adapter", type=rate, default=2e-5,
        help="peak learning rate, 1e-5 to 1e-4: more spoils what a sound layer began with")
    add("--lr-llm", type=rate, default=2e-5, help="peak learning rate; the paper: 5e-6 for 7 B")
    add = p.add_argument_group("optimisation").add_argument
    add("--max-steps", type=natural, default=0, help="optimizer steps; 0 = --epochs")
    add("--epochs", type=m.number(float, 0.001), default=2,
        help="passes over the rows with a teacher, if --max-steps is 0")
    add("--batch-size", type=positive, default=8, help="rows with a teacher per GPU per forward")
    add("--sound-batch-size", type=positive, default=8,
        help="rows without one beside them, if there are any")
    add("--global-batch-size", type=natural, default=0,
        help="rows with a teacher per optimizer step over all GPUs; 0: no accumulation")
    add("--lr-warmup-steps", type=natural, default=10, help="linear, times a cosine to zero")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        default="bfloat16" if torch.cuda.is_available() else "float32",
        help="of the computation (on a CPU bfloat16 pays with AMX); what trains is float32")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations: less memory, about 30%% slower")
    add("--shard", action="store_true",
        help="FSDP2 in place of DDP: teacher, student and optimizer split over the GPUs")
    add("--device", choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs")
    add("--workers", type=natural, default=1, help="processes per GPU that load data; 0 = none")
    add("--seed", type=m.number(int, 0, 2**32), default=0, help="of the order of rows")
    add = p.add_argument_group("evaluation, checkpoints").add_argument
    add("--eval-every", type=natural, default=0,
        help="optimizer steps; 0 = before the first and after the last")
    add("--save-every", type=positive, default=50, help="optimizer steps between checkpoints")
    add("--resume", action="store_true",
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
    args.cache = args.cache or str(Path(args.data[0]).parent / ".cache")  # shared by its runs
    world = m.ranks()[1]
    at_once = args.batch_size * world  # rows of one forward on all GPUs
    args.global_batch_size = args.global_batch_size or at_once
    if args.global_batch_size % at_once:
        p.error(f"--global-batch-size {args.global_batch_size} is not a multiple of --batch-size "
                f"{args.batch_size} x {world} processes; use "
                f"{at_once * max(1, args.global_batch_size // at_once)}")
    return args


# ---- rows ----

def read_manifest(path, seen=None, bad=None):
    """Manifest -> rows, ids with the folder's name in front of them, absolute audio paths.

    What is wrong with a row raises ValueError that names the line, or is added to the list `bad`.
    seen: {id: where it was met}, of the manifests before.
    """
    path, seen = Path(path), {} if seen is None else seen
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; synth_speech.py writes one")

    def parse(row, where):
        lost = [key for key in ("id", "prompt", "response") if key not in row]
        if lost:
            raise ValueError(f"{where}: no {', '.join(lost)}; expected {', '.join(KEYS[:4])}")
        m.check_texts(row, where, *KEYS[1:])
        name = f"{path.resolve().parent.name}/{row['id']}"  # ids are unique within a folder
        if not isinstance(row["id"], str | int) or seen.setdefault(name, where) != where:
            raise ValueError(f"{where}: id {row['id']!r} is no text, or also that of "
                             f"{seen.get(name)}; every row needs its own")
        row["id"] = name
        if row["prompt"]:
            row["prompt"] = m.untagged(row["prompt"], where)  # others' <audio> at its ends
        if not (row.get("audio") if row["prompt"] is None else row["prompt"].strip()):
            raise ValueError(f"{where}: neither prompt nor audio, or a blank prompt; expected text,"
                             " or null where none stands for the sound")
        if row.get("audio"):
            row["audio"] = m.file_below(path.parent, row["audio"], where)
        return row

    return m.json_lines(path, parse, bad)


def channels_of(row, args):
    """The channels that a row serves: those of --channels, or "sound"; none without an answer."""
    if row["prompt"] is None:  # nothing that a teacher could read
        return ["sound"] if row["response"] else []
    if not row.get(args.labels):
        return []
    return [c for c in args.channels if c == "t2t" or row.get("audio")]  # no clip: by text alone


def choose_rows(args, rows, eval_rows):
    """-> rows to train on, which some channel can use; rows to measure on, which serve all, so that
    channels are compared on the same questions; how many each channel has, also in words.

    Raises: ValueError if a channel that was asked for has none, or nothing can be measured.
    """
    served = [channels_of(row, args) for row in rows]
    used = [row for row, channels in zip(rows, served) if channels]
    counts = collections.Counter(itertools.chain(*served))  # {channel: rows}
    sounds_only = counts["sound"] == len(used) > 0  # no teacher, so no channel is missed
    strange = set().union(*rows) - set(KEYS)  # `audio` under another name, for instance
    for channel in args.channels:
        if not counts[channel] and not sounds_only:
            needs = f"{'prompt' if channel == 't2t' else 'audio with words'} and {args.labels}"
            raise ValueError(
                f"{' '.join(args.data)}: none of {len(rows)} rows has {needs}, which channel "
                f"{channel} needs; unknown keys: {', '.join(sorted(strange)) or 'none'}; rename "
                f"one, or leave {channel} out of --channels")
    measured = [row for row in eval_rows if channels_of(row, args) == args.channels]
    if args.eval_data and not measured:
        raise ValueError(f"--eval-data {' '.join(args.eval_data)}: no row can be measured; that "
                         f"needs prompt, audio and {args.labels}")
    few = " (fewer than half: the rest has no audio)" * (counts["t2t"] > 2 * counts["s2t"] > 0)
    said = (f"rows: {counts['t2t']} by text, {counts['s2t']} by speech{few}, {counts['sound']} "
            f"without a teacher, {len(measured)} to measure on")
    return used, measured, counts, said


def read_data(args, master):
    """-> rows to train on, rows to measure on, how many each channel has, bad rows."""
    seen, bad, train_rows, eval_rows = {}, [], [], []
    for path in args.data:
        train_rows += read_manifest(path, seen, bad)
    for path in args.eval_data:
        eval_rows += read_manifest(path, {}, bad)  # may be a part of the training data
    m.leave_out(bad, args.max_bad_rows, args.out, master)
    train_rows, eval_rows, counts, said = choose_rows(args, train_rows, eval_rows)
    if master:
        print(said, flush=True)
    return train_rows, eval_rows, counts, bad


def answer_ids(tokenizer, row, labels, max_tokens):
    """The answer, tokenised once for teacher and both channels; a cut one teaches no stopping."""
    # what is said about a sound has no second form
    ids = m.text_ids(tokenizer, row["response" if row["prompt"] is None else labels])
    cut = (row.get("finish") == "length" and labels == "response") or len(ids) > max_tokens
    return ids[:max_tokens] + ([] if cut else [m.end_token(tokenizer)])  # the end counts, too


class Rows:
    """Rows of the manifest -> items: what a step needs of a row, and no model has to make.

    An item: id, answer (token ids), teacher_ids (its whole prompt; none for a sound), for each
    channel that the row serves the student's prompt; taught, the teacher's rows, if it has a cache.
    """

    def __init__(self, rows, student, teacher_tokenizer, args, heard_of):
        self.rows, self.student, self.teacher_tokenizer = rows, student, teacher_tokenizer
        self.args, self.heard_of, self.taught_of = args, heard_of, None  # main fills in taught_of
        self.context, self.new_tokens = math.inf, 0  # of the models; room for a sample

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        item = {"id": row["id"], "teacher_ids": [],
                "answer": answer_ids(self.student.tokenizer, row, self.args.labels,
                                     self.args.max_answer_tokens)}
        for channel in channels_of(row, self.args):
            if channel == "t2t":
                item["t2t"] = self.student.prompt({**row, "audio": None})  # reads, hears nothing
            else:
                item[channel] = self.student.prompt(row, self.heard_of(row))  # s2t, sound
        if row["prompt"] is not None:
            before, after = m.chat_parts(self.teacher_tokenizer, row.get("system"),
                                         row.get("instruction"))
            item["teacher_ids"] = before + m.text_ids(self.teacher_tokenizer, row["prompt"]) + after
            if self.taught_of:
                item["taught"] = self.taught_of(item)  # (n, H'), from --teacher-cache
        sizes = [m.positions(item[channel]) for channel in CHANNELS if channel in item]  # in tokens
        size = max(len(item["teacher_ids"]), *sizes) + max(len(item["answer"]), self.new_tokens)
        if size > self.context:
            raise ValueError(f"{size} tokens of prompt, speech and answer, the models have room for"
                             f" {self.context}; shorten it or lower --max-answer-tokens")
        return item

    def check(self, bad, ranks):
        """Make every item once, before anything trains -> ids of questions in whose clip no word
        was heard, which are read alone from here on. Rows that fail leave, into `bad`."""
        (rank, world), found = ranks, {}  # row number -> what is wrong; None: nothing heard
        for k in range(rank, len(self), world):  # each process tries its share
            try:
                prompt = self[k].get("s2t")
                if isinstance(prompt, m.Prompt) and not prompt.words:
                    found[k] = None
            except ValueError as error:
                found[k] = str(error)
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, found)  # every rank leaves out the same rows
            found = collections.ChainMap(*parts)
        silent = []
        for k, reason in sorted(found.items()):
            row = self.rows[k]
            if reason is None:
                row["audio"] = None  # a question without a word would teach guessing
                silent.append(row["id"])
            else:
                bad.append({"id": row["id"], "reason": f"row {row['id']!r}: {reason}"})
        self.rows = [row for k, row in enumerate(self.rows) if found.get(k) is None]
        return silent


def plan_steps(rows, args):
    """Which rows each step reads: a list of steps, each a list of micro-batches, which processes
    share, each a list of row numbers.

    A function of its arguments alone: no restart changes it, nor does a number of processes, if
    --global-batch-size is given. Rows without a teacher come question by question in turn: a rare
    question is learned as well.

    Raises: ValueError if there are fewer rows than one step needs.
    """
    def drawn(numbers):  # without end, each epoch in an order of its own
        for epoch in itertools.count():
            yield from random.Random(f"{args.seed} {epoch}").sample(numbers, len(numbers))

    asked, sounds, kinds, plan = [], {}, [], []
    for k, row in enumerate(rows):
        if row["prompt"] is None:
            sounds.setdefault(row.get("instruction"), []).append(k)
        else:
            asked.append(k)
    micro_batches = args.global_batch_size // args.batch_size  # of a step, of all processes
    for kind, questions, batch_size in (("with", [asked], args.batch_size),
                                        ("without", sounds.values(), args.sound_batch_size)):
        count, size = sum(map(len, questions)), micro_batches * batch_size
        if 0 < count < size:
            raise ValueError(f"{count} rows {kind} a teacher and with {args.labels} in "
                             f"{', '.join(args.data)}, fewer than the {size} of one step; "
                             "give more rows or a smaller batch")
        if count:  # questions take turns
            kinds.append((count, size, itertools.cycle([drawn(numbers) for numbers in questions])))
    count, size, _ = kinds[0]  # whose epochs count
    for _ in range(max(1, args.max_steps or round(args.epochs * count / size))):
        step = [[] for _ in range(micro_batches)]
        for _, size, turns in kinds:
            for k in range(size):
                step[k % micro_batches].append(next(next(turns)))  # the next question's next row
        plan.append(step)
    return plan


# ---- caches: what Whisper heard, what the teacher's body gave ----

def fingerprint(model, *more):
    """Twelve characters that change with a model's weights, and with what else is named."""
    digest = hashlib.sha1(repr(more).encode())
    for value in model.state_dict().values():  # a few of every tensor: a merged LoRA is seen
        some = value.flatten()[::max(1, value.numel() // 256)]                    # (256,) or so
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def fill_cache(folder, things, compute, what, ranks):
    """{name: thing} -> FOLDER/NAME.safetensors for each.

    compute: list of things -> list of {key: tensor}, or of None. 32 go together in the order
    given; what meets depends on `things` alone, so that a restart gives the same bits.
    """
    (rank, world), names = ranks, list(things)
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.stem for path in folder.glob("*.safetensors")}
    batches = [names[start:start + 32] for start in range(32 * rank, len(names), 32 * world)]
    todo = [batch for batch in batches if not there.issuperset(batch)]  # as a whole: same bits
    for batch in tqdm(todo, desc=what, unit="batch", disable=rank > 0 or not todo):
        for name, value in zip(batch, compute([things[name] for name in batch])):
            if value and name not in there:
                temporary = folder / f"{name}.{os.getpid()}"
                save_file({k: v.contiguous().cpu() for k, v in value.items()}, temporary)
                os.replace(temporary, folder / f"{name}.safetensors")  # whole, or not there
    if world > 1:
        dist.barrier()  # all read what all wrote


def hear_all(args, student, rows, ranks):
    """Let Whisper hear every clip once -> function from a row to what was heard of it.

    A file's name is the digest of the clip's bytes and the language, its folder's that of Whisper:
    none of them can change unnoticed. Students of transformers hear at each step.
    """
    if not isinstance(student, m.SpeechLLM):
        return lambda row: None
    student.whisper.to(args.device)
    # named after what is kept of a sound: another mean would need another folder
    folder, clips = Path(args.cache) / fingerprint(student.whisper, "mean so far"), {}
    digest = functools.cache(m.digest)

    def name_of(row):
        return hashlib.sha256(f"{digest(row['audio'])} {row.get('language')}".encode()).hexdigest()

    spoken = [row for row in rows if row.get("audio")]
    # like sizes together: what Whisper hears at once should end at once
    for row in sorted(spoken, key=lambda row: (os.path.getsize(row["audio"]), row["id"])):
        clips.setdefault(name_of(row), row)  # a clip of many rows is heard once

    def compute(batch):
        found, waveforms, languages = [None] * len(batch), {}, []
        for k, row in enumerate(batch):
            with contextlib.suppress(ValueError):  # a bad row: heard_of says why
                waveforms[k] = m.load_audio(row["audio"])
                languages.append(row.get("language"))
        for k, heard in zip(waveforms, student.hear(list(waveforms.values()), languages)):
            found[k] = {"ids": heard.ids, "states": heard.states.half(),  # 16 bits are enough
                        "sound": heard.sound.half()}
        return found

    def heard_of(row):
        path = folder / f"{name_of(row)}.safetensors"
        if not path.exists():
            m.load_audio(row["audio"])  # raises ValueError
        return student.whisper.heard(**load_file(path))

    fill_cache(folder, clips, compute, "hearing", ranks)
    return heard_of


def align_sounds(student, rows, heard_of):
    """Let a sound layer begin with what rows without a teacher say about their clips ->
    number of clips. An answer counts by the mean embedding of what its question's other answers
    lack, less the mean over them; one that is given once (a transcript) tells words, not sound."""
    table, answers = student.llm.get_input_embeddings().weight.detach().float(), {}
    for row in rows:
        if row["prompt"] is None:
            ids = m.text_ids(student.tokenizer, row["response"])
            answers.setdefault(row.get("instruction"), []).append((row, tuple(ids)))
    sounds, targets = {}, {}  # clip -> (A, D), (H,)
    for found in answers.values():
        counts = collections.Counter(ids for _, ids in found)
        kept = [(row, ids) for row, ids in found if counts[ids] > 1]  # no transcripts
        common = set.intersection(*[set(ids) for _, ids in kept]) if kept else set()
        vectors = []                                                              # (H,) each
        for _, ids in kept:
            own = [token for token in ids if token not in common]
            vectors.append(table[own].mean(0) if own else torch.zeros_like(table[0]))
        offsets = torch.stack(vectors) - torch.stack(vectors).mean(0) if kept else []
        for (row, _), offset in zip(kept, offsets):                               # (H,)
            clip = row["audio"]
            targets[clip] = targets.get(clip, 0) + offset  # several questions ask about a clip
            sounds[clip] = heard_of(row).sound.to(table.device)
    if sounds:
        student.adapter.align(list(sounds.values()), torch.stack([targets[c] for c in sounds]))
    return len(sounds)


def teach_all(args, teacher, datasets, ranks):
    """Let the teacher's body read each row once -> function from item to its hidden rows (n, H'),
    which give the exact divergence, whatever the loss; a few of the largest logits would not."""
    folder, items = Path(args.teacher_cache) / fingerprint(teacher, teacher.dtype), {}

    def name_of(item):
        return hashlib.sha256(str([item["teacher_ids"], item["answer"]]).encode()).hexdigest()

    for item in itertools.chain(*datasets):
        if item["teacher_ids"]:
            items[name_of(item)] = item
    fill_cache(folder, items, lambda batch: [{"x": x} for x in teacher_rows(teacher, batch)],
               "teaching", ranks)
    return lambda item: load_file(folder / f"{name_of(item)}.safetensors")["x"]


# ---- one pass through teacher and student ----

@torch.no_grad()
def teacher_rows(teacher, items):
    """One teacher forward for both channels -> the hidden rows that predict the answers,
    list of (n_i, H'); from the cache if the items carry them. The student's own LLM teaches with
    its adapters off."""
    if all("taught" in item for item in items):
        return [item["taught"] for item in items]
    rows = [torch.tensor(item["teacher_ids"] + item["answer"], device=teacher.device)
            for item in items]
    lengths = [len(item["answer"]) for item in items]
    shared = len(os.path.commonprefix([item["teacher_ids"] for item in items]))  # template's tokens
    own, training = hasattr(teacher, "peft_config"), teacher.training  # own: the student's LLM
    teacher.eval()  # no dropout
    if own:
        teacher.disable_adapters()
    states = m.answer_states(teacher, rows, lengths, shared)                      # (N, H')
    if own:
        teacher.enable_adapters()
    teacher.train(training)  # the student's own goes on training
    return states.split(lengths)


def passes_of(items, channels):
    """What a micro-batch asks of the student: (channel, its items) in turn. All processes make the
    same passes: where no row serves a channel, one that is read stands in, with no answer."""
    for channel in channels:
        chosen = [item for item in items if channel in item]
        if not chosen:
            idle = next(item for item in items if "t2t" in item)
            chosen = [{**idle, channel: idle["t2t"], "answer": []}]
        yield channel, chosen


def chunk_rows_of(head):
    """Rows whose logits exist at the same time. On a CPU 128 MiB of each model's, twice that if
    each chunk has to upcast the head; on a GPU more, since a chunk costs kernel launches."""
    if head.is_cuda:
        return max(256, 2**26 // len(head))
    size = 2**25 if head.dtype == torch.float32 else 2**26
    return 2 ** max(6, int(math.log2(size / len(head))))


def channel_loss(args, channel, llms, hidden, items):
    """Sums over a channel's answer tokens -> (loss, ce, kd).

    llms: the student's, and the teacher's (None if it is not asked). The teacher's rows are a part
    of the items. Rows without a teacher get CE, whatever --ce-weight is, and each counts once: a
    transcript of twelve tokens would drown "Fast.".
    """
    (llm, teacher), ce_weight, kd_weight = llms, args.ce_weight, args.kd_weight
    # a stand-in of passes_of has an answer of no token                         (n_i, H') each
    taught = [item["taught"][:len(item["answer"])] for item in items if "taught" in item]
    row_weights = None
    if channel == "sound":
        ce_weight, kd_weight = 1.0, 0.0
        lengths = torch.tensor([len(item["answer"]) for item in items], device=hidden.device)
        row_weights = (1 / lengths).repeat_interleave(lengths)                    # (N,)
    if not kd_weight:  # a stand-in, of the right shape
        teacher, taught = llm, [hidden.detach()]
    heads = [x.get_output_embeddings().weight for x in (llm, teacher)]  # (V, H), (V', H')
    targets = [token for item in items for token in item["answer"]]  # (N,)
    return losses.fused_ce_kd(  # chunk by chunk: no (N, V) logits ever exist
        student_hidden=hidden, student_weight=heads[0], student_logit_scale=m.logit_scale(llm),
        teacher_hidden=torch.cat(taught).to(hidden.device), teacher_weight=heads[1],
        teacher_logit_scale=m.logit_scale(teacher), kind=args.loss, beta=args.beta,
        targets=torch.tensor(targets, device=hidden.device), row_weights=row_weights,
        temperature=args.temperature,
        ce_weight=ce_weight, kd_weight=kd_weight, chunk_rows=chunk_rows_of(heads[0]))


# ---- evaluation ----

@torch.no_grad()
def measure(student, teacher, items, channels, autocast):
    """Divergence from the teacher, row by row -> {channel: [(kl (n,) nats at tau 1, agree (n,))]}
    over each answer's tokens."""
    answers, results = [item["answer"] for item in items], {}
    lengths = [len(answer) for answer in answers]
    heads = [whole(llm.get_output_embeddings().weight) for llm in (student.llm, teacher)]
    taught = torch.cat(list(teacher_rows(teacher, items))).to(student.llm.device)  # (N, H')
    for channel in channels:
        prompts = [item[channel] for item in items]
        with autocast():
            hidden = student(prompts, answers)                                    # (N, H)
        kl, agree = losses.token_kl(  # (N,) each; always at tau 1
            student_hidden=hidden, student_weight=heads[0], teacher_hidden=taught,
            teacher_weight=heads[1], student_logit_scale=m.logit_scale(student.llm),
            teacher_logit_scale=m.logit_scale(teacher))
        results[channel] = list(zip(kl.cpu().split(lengths), agree.cpu().split(lengths)))
    return results


def evaluate(args, student, teacher, rows, ranks, autocast):
    """Every rank measures its share -> record for the log: KL and agreement, over all answer
    tokens and over the first EARLY, of each channel; the gap between the channels."""
    (rank, world), training = ranks, student.training
    student.eval()
    sums = torch.zeros(len(args.channels), 2, 3, dtype=torch.float64, device=student.llm.device)
    share = -(-len(rows) // world)  # as many on every rank: sharded models work together
    for start in range(0, share, EVAL_ROWS):
        numbers = [rank + world * k for k in range(start, min(start + EVAL_ROWS, share))]
        items = [rows[k % len(rows)] for k in numbers]
        counted = sum(k < len(rows) for k in numbers)  # beyond the last they are read alone
        found = measure(student, teacher, items, args.channels, autocast)
        for c, channel in enumerate(args.channels):
            for kl, agree in found[channel][:counted]:
                for part, first in enumerate((len(kl), EARLY)):  # all tokens; the first of them
                    sums[c, part, 0] += kl[:first].sum()  # nats
                    sums[c, part, 1] += agree[:first].sum()
                    sums[c, part, 2] += len(kl[:first])  # tokens
    student.train(training)
    if world > 1:
        dist.all_reduce(sums)  # of counts and sums, so that the mean is exact
    record = {}
    for channel, parts in zip(args.channels, sums.tolist()):
        for suffix, (kl, agree, tokens) in zip(("", "8"), parts):
            record[f"eval_kl{suffix}_{channel}"] = kl / max(1, tokens)  # nats a token
            record[f"eval_agree{suffix}_{channel}"] = agree / max(1, tokens)
    if len(args.channels) == 2:
        record["eval_gap8"] = record["eval_kl8_s2t"] - record["eval_kl8_t2t"]  # nats a token
    return record


def write_samples(student, rows, path, step):
    """The student's answers to a few rows, for whoever would rather read than count."""
    rows = sorted(rows, key=lambda row: len(row["prompt"]))[:3]  # short ones are read at a glance
    student.eval()  # in training mode, gradient checkpointing turns the cache off
    answers = student.generate(rows, max_new_tokens=SAMPLE_TOKENS)
    student.train()
    for row, text in zip(rows, answers):
        way = "by_speech" if row.get("audio") else "by_text"
        append(path, {"step": step, "prompt": row["prompt"], way: text, "teacher": row["response"]})
    print(f"      asked: {rows[0]['prompt']!r}\n      answered: {answers[0]!r}")


# ---- what trains ----

def check_pair(teacher, teacher_tokenizer, student):
    """Same ordinary vocabulary and end of turn, and plain heads;
    special tokens may be named differently."""
    tokenizers = teacher_tokenizer, student.tokenizer
    taught, spoken = (t.get_vocab().items() - t.get_added_vocab().items() for t in tokenizers)
    ends, differ = [m.end_token(tokenizer) for tokenizer in tokenizers], sorted(taught ^ spoken)
    if differ or ends[0] != ends[1]:
        example = differ[0][0] if differ else None
        raise RuntimeError(f"teacher and student need one tokenizer: {tokenizers[0].name_or_path} "
                           f"and {tokenizers[1].name_or_path} differ, e.g. in {example!r}, and end "
                           f"a turn with {ends}")
    for llm in (teacher, student.llm):
        if getattr(llm.config.get_text_config(decoder=True), "final_logit_softcapping", None):
            raise RuntimeError(f"{llm.config.model_type}: capped logits (final_logit_softcapping) "
                               "are not supported; choose another model")


def load_teacher(args, student, dtype):
    """-> (teacher, tokenizer); with LoRA on the teacher's own weights, the student's LLM."""
    teacher, tokenizer = m.load_llm(args.teacher, dtype)
    check_pair(teacher, tokenizer, student)
    own = student.llm.state_dict()
    same = all(k in own and torch.equal(own[k].to(v), v) for k, v in teacher.state_dict().items())
    if same and args.lora_rank and not args.teacher_cache and not args.shard:
        teacher = student.llm  # asked with its adapters off: one copy in memory
    return teacher.requires_grad_(False), tokenizer  # it stays as it is: the answers are its own


def choose_what_trains(args, student, dtype):
    """Parts of --train stay in float32 and train; the rest is frozen, the LLM in `dtype`."""
    student.requires_grad_(False)  # then what --train names
    for name in args.train:
        if name not in student.parts():
            raise ValueError(f"--train {name}: {args.student} trains "
                             f"{', '.join(student.parts())}; its Whisper stays as it is")
        torch.nn.ModuleList(student.parts()[name]).requires_grad_(True)
    if args.lora_rank:
        # peft asks for it, and a part of a student has none
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
    """AdamW over the parts that train; matrices decay, vectors do not. main sets the rates."""
    groups = []
    for name in args.train:
        part = torch.nn.ModuleList(student.parts()[name])
        trained = [p for p in part.parameters() if p.requires_grad]
        for decay, matrices in ((0.01, True), (0.0, False)):  # what nearly everyone takes
            chosen = [p for p in trained if (p.dim() >= 2) == matrices]  # no norms, biases
            groups.append({"params": chosen, "weight_decay": decay, "part": name})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)  # main sets lr


def update(args, optimizer, scaler, step):
    """Clip each part's gradient by itself, step the optimizer -> norms for the log."""
    scaler.unscale_(optimizer)  # clip the true gradient
    norms = {}
    for name in args.train:
        trained = []  # of one part: the LLM's gradient would drown the adapter's
        for group in optimizer.param_groups:
            trained += group["params"] if group["part"] == name else []
        norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        norms[f"norm_{name}"] = norm
        if not math.isfinite(norm) and scaler.get_scale() <= 1:  # else fp16 skips the step
            raise RuntimeError(f"gradient norm {norm} of {name} in step {step}; lower the learning "
                               f"rate, or --dtype bfloat16; the newest checkpoint of {args.out} "
                               "keeps the last good state")
    scaler.step(optimizer)  # does nothing if an fp16 gradient overflowed
    scaler.update()         # and then halves the scale
    optimizer.zero_grad(set_to_none=True)
    return norms


def shard(student, teacher, dtype, device):
    """FSDP2: layers one by one, then the rest. Layers are gathered in `dtype` when they are needed,
    gradients are summed in float32; the adapter is all float32. The teacher's head stays whole."""
    mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))
    for llm in filter(None, (student.llm, teacher)):
        lists = (x for x in llm.base_model.modules() if isinstance(x, torch.nn.ModuleList))
        for layer in next(lists):  # the outermost list: its layers
            fully_shard(layer, **options)
    fully_shard(student.parts()["adapter"], mesh=mesh, reshard_after_forward=False,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    listener = getattr(student, "whisper", torch.nn.Module())
    fully_shard(student, ignored_params=set(listener.parameters()), **options)
    if teacher is not None:
        fully_shard(teacher.base_model, reshard_after_forward=True, **options)
        teacher.get_output_embeddings().to(device)  # each chunk of the loss reads all of it


def whole(tensor):
    """What FSDP has sharded, gathered: every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---- checkpoints ----

def checkpoints(out):
    """Files ckpt-STEP-SHA256.pt, the newest first."""
    return sorted(Path(out).glob("ckpt-*.pt"), reverse=True)


def run_identity(args, rows, world):
    """What must be the same for a run to go on: options, processes, the content of the rows."""
    same = {k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}
    content = [{**row, "audio": None} for row in rows]  # its path may change
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**same, "processes": world, "content of the rows": f"{len(rows)} {digest[:12]}"}


def save_checkpoint(args, student, optimizer, scaler, progress):
    """Trainable weights and everything else that a bit-exact continuation needs; complete or not
    there. Every rank must call it, the first one writes. Raises OSError if it cannot be written."""
    (step, best, identity), out = progress, Path(args.out)
    weights, moments = get_state_dict(student, optimizer, options=TRAINED_ONLY)
    if m.ranks()[0]:
        return
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # torch leaves out one of two names of a tied head
            weights.pop(name, None)
    temporary = out / "ckpt.tmp"  # beside its place: a rename cannot be half done
    try:
        with open(temporary, "wb") as file:
            torch.save({"model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
                        "step": step, "best": best, "identity": identity}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it has its name
    except (RuntimeError, OSError) as error:  # torch does not say why, the system not where
        raise OSError(f"{temporary} cannot be written ({error}): "
                      f"{shutil.disk_usage(out).free / 2**30:.2f} GiB are free there") from error
    # torch.load does not see a flipped bit: the name tells what the bytes must be
    path = out / f"ckpt-{step:06d}-{m.digest(temporary)[:16]}.pt"
    os.replace(temporary, path)
    for old in checkpoints(out)[2:]:  # two stay: one may be damaged
        old.unlink()


def load_checkpoint(args, student, optimizer, scaler, identity):
    """Restore the newest whole checkpoint of OUT -> step, best score, what to say about it."""
    said = []
    for path in checkpoints(args.out):
        if path.stem.endswith(m.digest(path)[:16]):
            break
        said.append(f"{path.name} is damaged")
    else:
        raise RuntimeError(f"{args.out}: no checkpoint has the SHA-256 that its name says "
                           f"({len(said)} tried); copy one back, or choose another --out")
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
    # torch names both by parameter: DDP, FSDP2 and one process read each other's
    set_state_dict(student, optimizer, model_state_dict=saved["model"],
                   optim_state_dict=saved["optimizer"], options=TRAINED_ONLY)
    scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["best"], [f"going on from step {saved['step']}", *said]


def save_folder(student, folder, dtype):
    """The student as a folder of transformers. Every rank must call it, the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(student, options=options)  # gathered, if it is sharded
    if not m.ranks()[0]:
        m.save_student(student, folder, dtype, state)


# ---- log ----

def append(path, record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def begin_logs(args, step, world):
    """args.json, and the logs of what was done before this step."""
    for name in ("log.jsonl", "samples.jsonl"):
        cut_back(Path(args.out, name), step)
    about = {**vars(args), "processes": world, "torch": torch.__version__,
             "transformers": transformers.__version__}
    m.write_atomically(Path(args.out, "args.json"), json.dumps(about, indent=1))


def cut_back(path, step):
    """Leave the lines before a step's evaluation, which is repeated: they are as they would be
    without a stop."""
    rows = m.json_lines(path, lambda row, _: row, []) if path.exists() else []  # whole lines
    kept = [row for row in rows if row["step"] < step or row["step"] == step and "loss" in row]
    m.write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def log(out, record, *more):
    """A line of log.jsonl, and one for people."""
    append(out / "log.jsonl", record)
    cells = [f"{key} {value:.4g}" for key, value in record.items() if key != "step"]
    print(f"step {record['step']}", *cells, *more, sep=" | ", flush=True)


def resources(device):
    """What a long run must not use more and more of, see tools/soak.py."""
    memory = (torch.cuda.max_memory_allocated() / 2**30 if device == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    record = {"memory": memory}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        record |= {"resident": pages * resource.getpagesize() / 2**30,
                   "open_files": len(os.listdir("/proc/self/fd"))}
    return record


# ---- main ----

def main(args):
    # ---- rows, before any model loads ----
    out, dtype, earlier = Path(args.out), getattr(torch, args.dtype), checkpoints(args.out)
    if earlier and not args.resume:
        raise ValueError(f"{earlier[0]} exists: add --resume to go on, or choose another --out")
    ranks = m.start_processes(args.device, "gloo" if args.device == "cpu" else "nccl")
    (rank, world), master = ranks, ranks[0] == 0  # world: processes, one a GPU
    train_rows, eval_rows, counts, bad = read_data(args, master)
    out.mkdir(parents=True, exist_ok=True)  # fails now, not after the first steps

    # ---- student, teacher ----
    student = m.load_student(args.student)  # in float32, on the CPU
    teacher, teacher_tokenizer = None, student.tokenizer
    if args.kd_weight and counts["t2t"] + counts["s2t"] or eval_rows:  # CE alone asks none
        teacher, teacher_tokenizer = load_teacher(args, student, dtype)
    choose_what_trains(args, student, dtype)  # before DDP and optimizer, which read the flags
    if args.gradient_checkpointing:
        student.llm.gradient_checkpointing_enable()
    if not args.shard:  # else it moves piece by piece
        student.to(args.device)

    # ---- what is heard, read and taught ----
    heard_of = hear_all(args, student, train_rows + eval_rows, ranks)
    contexts = [getattr(llm.config, "max_position_embeddings", None)
                for llm in (student.llm, teacher) if llm is not None]
    train_set = Rows(train_rows, student, teacher_tokenizer, args, heard_of)
    eval_set = Rows(eval_rows, student, teacher_tokenizer, args, heard_of)
    eval_set.new_tokens, silent = SAMPLE_TOKENS, []
    for dataset in (train_set, eval_set):
        dataset.context = min(filter(None, contexts), default=math.inf)  # of both models
        silent += dataset.check(bad, ranks)  # a bad row stops a run now, not at night
    said = [m.leave_out(bad, args.max_bad_rows, out, master)] if bad else []
    # again, now that it is known which clips are bad or silent
    train_set.rows, eval_set.rows, counts, line = choose_rows(args, train_set.rows, eval_set.rows)
    if silent:
        said.append(f"no words heard in {len(silent)} clips, e.g. {silent[0]}; they are read alone")
    said += [line] if said else []
    if isinstance(student, m.SpeechLLM) and not student.adapter.listens:  # untrained so far
        aligned = align_sounds(student, train_set.rows, heard_of)
        student.adapter.listens.fill_(True)
        said += [f"sound layer: begins with {aligned} clips, in closed form"] * (aligned > 0)
    if teacher is not None and (args.teacher_cache or not args.shard):
        teacher.to(args.device)
    if args.teacher_cache and teacher is not None:
        taught_of = teach_all(args, teacher, [train_set, eval_set], ranks)
        train_set.taught_of = eval_set.taught_of = taught_of
        teacher.base_model.to("meta")  # its body leaves memory, its head stays
    plan = plan_steps(train_set.rows, args)  # all steps, known before the first

    # ---- optimizer, resume, log ----
    if args.shard:
        shard(student, teacher, dtype, args.device)
    optimizer = make_optimizer(args, student)
    scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)  # bf16 needs none
    identity = run_identity(args, train_set.rows + eval_set.rows, world)
    step, best, steps = 0, None, len(plan)  # best: the score of OUT/best
    if earlier:
        step, best, more = load_checkpoint(args, student, optimizer, scaler, identity)
        said += more
    if master:
        begin_logs(args, step, world)
        weights = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(*said, f"{steps} steps; {weights / 1e6:.1f} M weights train", sep="\n", flush=True)
    stopped = []  # filled by SIGTERM; the loop ends before its next step
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))

    # ---- the loop ----
    model = student
    if world > 1 and not args.shard:
        model = torch.nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    # micro-batches go to the processes in turn: the plan knows nothing of their number
    todo = list(itertools.chain(*[batches[rank::world] for batches in plan[step:]]))
    stream = iter(torch.utils.data.DataLoader(  # workers outlive SIGTERM: a step is finished
        train_set, batch_sampler=todo, num_workers=args.workers, collate_fn=list,
        worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        multiprocessing_context="fork" if args.workers else None))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch raises in mid-step, not in next()
    autocast = functools.partial(torch.autocast, args.device, dtype, dtype != torch.float32)
    channel_weights = {"t2t": args.t2t_weight, "s2t": 1.0, "sound": args.sound_weight}
    # speech first: it keeps more for backward, and there are no gradients yet. By text only the LLM
    # can learn; the adapter is a part of the graph all the same: DDP waits for what trains
    channels = [c for c in CHANNELS[::-1] if counts[c] and (c != "t2t" or "llm" in args.train)]
    student.train()
    begun = time.perf_counter()  # s
    while True:
        if len(eval_set) and (step == steps or step % (args.eval_every or steps) == 0):
            record = evaluate(args, student, teacher, eval_set, ranks, autocast)
            score = record.get("eval_kl8_s2t", record.get("eval_kl8_t2t"))
            if best is None or score < best:  # the best early answers by speech
                best = score
                save_folder(student, out / "best", dtype)
            if master:
                log(out, {"step": step, **record})
            if master and not args.shard:  # sharded ranks would lose step
                write_samples(student, eval_set.rows, out / "samples.jsonl", step)
        if step == steps:
            break
        warm = (step + 1) / max(1, args.lr_warmup_steps)  # linear, times a cosine to zero
        for group in optimizer.param_groups:
            peak = getattr(args, f"lr_{group['part']}")
            group["lr"] = peak * min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * (step / steps)))

        # -------- one optimizer step --------
        started = time.perf_counter()
        micro_batches = [next(stream) for _ in range(len(plan[step]) // world)]  # of this rank
        # Mean over ALL supervised tokens of the step (sounds: rows), per channel: one a micro-batch
        # would weight a 3-token answer like a 300-token one. DDP averages over ranks, hence `world`
        counted = dict.fromkeys(CHANNELS, 0) | {"tokens": 0, "stopped": len(stopped)}
        for items in micro_batches:
            for channel, chosen in passes_of(items, channels):
                num_tokens = sum(len(item["answer"]) for item in chosen)
                counted[channel] += len(chosen) if channel == "sound" else num_tokens
                counted["tokens"] += num_tokens
        shared = torch.tensor(list(counted.values()), device=args.device)
        if world > 1:
            dist.all_reduce(shared)  # before the first backward: it divides by these
        counted = dict(zip(counted, shared.tolist()))
        if counted["stopped"]:  # SIGTERM came to one of the processes: all stop at one step
            break
        # dropout, if a model has any, is the same after a restart
        torch.manual_seed(args.seed + 100_003 * step + rank)
        sums = torch.zeros(len(CHANNELS), 3, dtype=torch.float64, device=args.device)
        for micro_step, items in enumerate(micro_batches):
            asked = [item for item in items if item["teacher_ids"]] if args.kd_weight else []
            for item, taught in zip(asked, teacher_rows(teacher, asked)):  # once for both channels
                item["taught"] = taught
            for channel, chosen in passes_of(items, channels):
                final = micro_step == len(micro_batches) - 1 and channel == channels[-1]
                # no_sync must cover forward AND backward:
                # DDP decides in forward whether this backward will sync
                with contextlib.nullcontext() if final or model is student else model.no_sync():
                    prompts = [item[channel] for item in chosen]
                    answers = [item["answer"] for item in chosen]
                    with autocast():
                        hidden = model(prompts, answers)                          # (N, H)
                        loss, ce, kd = channel_loss(args, channel, (student.llm, teacher), hidden,
                                                    chosen)
                    loss = channel_weights[channel] / max(1, counted[channel]) * loss
                    scaler.scale(loss * world).backward()  # frees this channel before the next
                sums[CHANNELS.index(channel)] += torch.stack([loss.detach(), ce, kd])
        if world > 1:
            dist.all_reduce(sums)  # logged is what all ranks optimised
        total = float(sums[:, 0].sum())
        if not sums.isfinite().all():  # on all ranks at once, since they are summed
            names = [item["id"] for item in itertools.chain(*micro_batches)]
            raise RuntimeError(f"loss {total} in step {step + 1}; rows of rank {rank}: "
                               f"{names}; the newest checkpoint of {out} keeps the last good state")
        norms = update(args, optimizer, scaler, step + 1)  # {norm_PART}, before clipping
        step += 1

        if master:
            seconds = time.perf_counter() - started
            record = {"step": step, "loss": total}
            for channel, (_, ce, kd) in zip(CHANNELS, sums.tolist()):
                count = counted[channel]  # of tokens, or rows
                if count:
                    record |= {f"ce_{channel}": ce / count, f"kd_{channel}": kd / count}
            record |= {**norms, "lr": max(group["lr"] for group in optimizer.param_groups),
                       "tokens_per_s": counted["tokens"] / seconds, "seconds": seconds,
                       "hours": (time.perf_counter() - begun) / 3600, **resources(args.device)}
            log(out, record, f"{seconds * (steps - step) / 60:.1f} minutes left")
        if step % args.save_every == 0 or step == steps:
            save_checkpoint(args, student, optimizer, scaler, (step, best, identity))

    # ---- the student ----
    if 0 < step < steps:  # before the first step, saving would count one in the optimizer
        save_checkpoint(args, student, optimizer, scaler, (step, best, identity))
    elif step == steps:
        save_folder(student, out / "last", dtype)  # complete, or not there at all
    if master:
        print(f"wrote {out / 'last'}" if step == steps else
              f"stopped by SIGTERM after step {step}; the same command with --resume goes on")
    if world > 1:
        dist.barrier()  # torchrun kills all when one has ended otherwise
        dist.destroy_process_group()
    return 0 if step == steps else 143  # 128 + SIGTERM, as a shell has it


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print("train_kd.py:", *str(error).split(), file=sys.stderr)
        for worker in torch.multiprocessing.active_children():
            worker.kill()  # of the loader: Python would wait for what outlives SIGTERM
        sys.exit(2)
