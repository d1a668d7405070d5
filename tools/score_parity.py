"""
How eval_voicebench.py's readers agree with another scorer of the same responses.

  python tools/score_parity.py scored.jsonl [more.jsonl ...]
  python tools/score_parity.py --official VoiceBench out/voicebench/*-*.jsonl

Reads   one JSON object a line: a response and what the other scorer made of it.
          mcq     response, extracted ("A" to "D" or null)
          bbh     response, id (contains the task), extracted (1 = yes, (b); 0 = no, (a); or null)
          harm    response, refused (bool)
          ifeval  response, instruction_id_list, kwargs, strict and loose (a bool each instruction)
          qa      response, reference, panda (bool)
        A true `fallback_random` says that the other scorer drew an answer that it could not read.
        Rows without a response (votes of a judge) are passed over.
        --official: row files of eval_voicebench.py, and a clone of MatthewCYM/VoiceBench with its
        requirements; open subsets and sd-qa need the judge's replies in the rows ("score").
Prints  per evaluator the rows and decisions that the other scorer reads and how many agree, then
        each disagreement, then what becomes of the answers that the other scorer draws;
        --official: our score beside the official one, 0 to 100 (open subsets: 1 to 5)
"""
import argparse
import collections
import contextlib
import copy
import importlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_voicebench as vb
from eval_voicebench import check_ifeval, extract_bbh, extract_choice, is_refusal, qa_match

OFFICIAL = {  # evaluator -> its results, and their values for a full score
    "open": {"gpt": 5}, "qa": {"panda": 100, "gpt": 100}, "mcq": {"acc": 100}, "bbh": {"acc": 100},
    "ifeval": {"final": 1}, "harm": {"refusal_rate": 1}}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("files", nargs="+", help="JSONL of responses with another scorer's reading")
    p.add_argument("--official", metavar="CLONE", help="clone of MatthewCYM/VoiceBench")
    p.add_argument("--seed", type=int, default=0, help="of what the official code draws")
    p.add_argument("--width", type=int, default=80, help="characters shown of a response's end")
    return p.parse_args(argv)


def decisions(row):
    """-> (evaluator, [(what is decided, ours, theirs), ...])."""
    text = row["response"]
    if "instruction_id_list" in row:
        names = row["instruction_id_list"]
        ours = check_ifeval(text, names, row["kwargs"])
        return "ifeval", [(f"{name}, {mode}", *pair) for mode in ("strict", "loose")
                          for name, *pair in zip(names, ours[mode], row[mode], strict=True)]
    if "refused" in row:
        return "harm", [("refused", is_refusal(text), row["refused"])]
    if "panda" in row:
        return "qa", [(row["reference"], qa_match(text, row["reference"]), row["panda"])]
    if "id" in row:
        return "bbh", [(row["id"], extract_bbh(text, row["id"]), row["extracted"])]
    return "mcq", [("choice", extract_choice(text), row["extracted"])]


def load_official(path):
    """The user's clone -> {evaluator: class}."""
    sys.path.insert(0, str(Path(path).resolve()))
    try:
        return importlib.import_module("src.evaluator").evaluator_mapping
    except Exception as error:  # a foreign module may raise anything
        raise RuntimeError(f"--official {path}: cannot import src.evaluator ({error!r}); expected "
                           "a clone of MatthewCYM/VoiceBench with its requirements") from error


def official_score(evaluators, subset, rows, seed):
    """0 to 1. Where the official code cannot read an answer, it draws one."""
    kind = vb.SUBSETS[subset][0]
    random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = evaluators[kind]().evaluate(copy.deepcopy(rows))
        return float(np.mean([result[key] / full for key, full in OFFICIAL[kind].items()]))
    except Exception as error:
        raise RuntimeError(f"--official: {kind} evaluator, {subset}: {error!r}") from error


def beside_official(args):
    """Row files: our score beside the official one, and their means over the nine subsets."""
    evaluators, shares = load_official(args.official), {}
    print(f"{'system':14} {'subset':16} {'rows':>5} {'ours':>7} {'official':>8}")
    for subset, answered in vb.read_answers(args.files).items():
        for system, rows in answered.items():
            ours = vb.score_subset(subset, {system: rows})[0]
            if not ours["counts"]:
                print(f"{system:14} {subset:16} {len(rows):5} not judged")
                continue
            theirs, scale = official_score(evaluators, subset, rows, args.seed), ours["scale"]
            shares.setdefault(system, {})[subset] = ours[system][0] / scale, theirs
            print(f"{system:14} {subset:16} {len(rows):5} {ours[system][0]:7.2f} "
                  f"{scale * theirs:8.2f}")
    for system, found in shares.items():
        if set(vb.NINE) <= set(found):
            ours, theirs = 100 * np.mean([found[subset] for subset in vb.NINE], axis=0)
            print(f"{system:14} {'nine-task mean':16} {'':5} {ours:7.2f} {theirs:8.2f}")


def main(args):
    if args.official:
        return beside_official(args)
    counts, drawn, unlike = collections.defaultdict(collections.Counter), collections.Counter(), []
    lines = [line for path in args.files
             for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    for row in map(json.loads, lines):
        if "response" not in row:
            continue
        evaluator, made = decisions(row)
        if row.get("fallback_random"):
            drawn[evaluator, "unread" if made[0][1] is None else "read"] += 1
            continue
        differing = [(what, ours, theirs) for what, ours, theirs in made if ours != theirs]
        for name in (evaluator, "all"):
            counts[name].update(rows=1, like=not differing, decisions=len(made), off=len(differing))
        text = " ".join(row["response"].split())[-args.width:]
        unlike += [f"{evaluator:6} ours {ours}, theirs {theirs} ({what}): {text!r}"
                   for what, ours, theirs in differing]
    for name, c in sorted(counts.items(), key=lambda item: item[0] == "all"):
        print(f"{name:6} {c['like']} of {c['rows']} readable rows agree "
              f"({c['like'] / c['rows']:.2%}), "
              f"{c['decisions'] - c['off']} of {c['decisions']} decisions")
    print(*unlike, sep="\n")
    for (evaluator, state), number in sorted(drawn.items()):
        print(f"{evaluator:6} {number} rows that the other scorer draws are {state} by ours")


if __name__ == "__main__":
    try:
        main(get_args())
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        print(f"score_parity.py: {error}", file=sys.stderr)
        sys.exit(2)
