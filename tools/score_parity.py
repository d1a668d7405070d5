"""
How often eval_voicebench.py's readers agree with another scorer of the same responses.

  python tools/score_parity.py scored.jsonl [more.jsonl ...]

Reads   one JSON object a line: a response and what the other scorer made of it.
          mcq     response, extracted ("A" to "D" or null)
          bbh     response, id (contains the task), extracted (1 = yes, (b); 0 = no, (a); or null)
          harm    response, refused (bool)
          ifeval  response, instruction_id_list, kwargs, strict and loose (a bool each instruction)
          qa      response, reference, panda (bool)
        A true `fallback_random` says that the other scorer drew an answer that it could not read.
        Rows without a response (votes of a judge) are passed over.
Prints  per evaluator the rows and decisions that the other scorer reads and how many agree, then
        each disagreement, then what becomes of the answers that the other scorer draws.
"""
import argparse
import collections
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval_voicebench import check_ifeval, extract_bbh, extract_choice, is_refusal, qa_match


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("files", nargs="+", help="JSONL of responses with another scorer's reading")
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


def main(args):
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
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(f"score_parity.py: {error}", file=sys.stderr)
        sys.exit(2)
