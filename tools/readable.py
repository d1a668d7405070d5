"""
Numbers and signs as words, for a speech program that reads none: it stands before the program and its arguments.

  python tools/readable.py en 'In 1984, $5.99.' echo {words}                # In nineteen eighty-four, five dollars ninety-nine.
  python synth_speech.py --input in.jsonl --out data/my --engine command \\
      --tts-command python tools/readable.py en {text} my-tts {words} -o {wav}

tools/tts_server.py does the same for models of transformers. The teacher and the manifest keep the text as it is written.
"""
import os
import re
import sys

from num2words import num2words

# $5.99, 1st, 1984, 1960s, 1,200; the thousands' mark and the point are the language's
NUMBER = (r"([$€£])? ?(\d{{1,3}}(?:{0}\d{{3}})+(?!\d)|\d+)(?:{1}(\d+))?"
          r"( (?:thousand|million|billion|trillion)\b)?(?:(st|nd|rd|th|s)\b)?")
SIGNS = {"&": " and ", "%": " percent", "+": " plus ", "°": " degrees ",
         "$": " dollars ", "€": " euros ", "£": " pounds "}


def number_words(found, language):
    """A match of NUMBER -> words; English has money, ordinals and years, too."""
    sign, whole, part, size, ending = found.groups("")
    digits, kind = re.sub(r"\D", "", whole), "cardinal"
    number = float(f"{digits}.{part}") if part else int(digits)
    if language == "en" and sign and not size and len(part) < 3:
        code = {"$": "USD", "€": "EUR", "£": "GBP"}[sign]
        money = num2words(f"{digits}.{part or 0}", to="currency", currency=code)
        money = re.sub(r"^zero \w+, (?!zero)|, zero \w+$", "", money.replace(" sterling", ""))
        return " " + re.sub(r"(.*), (.*) (cents?|pence|penny)$", r"\1 \2", money) + " "
    if language == "en" and not (sign or part):
        if ending not in ("", "s"):
            kind, ending = "ordinal", ""
        elif whole.isdigit() and 1100 <= number < 2100:
            kind = "year"
    words = f" {num2words(number, lang=language, to=kind)}{ending}"
    return re.sub("tys$", "ties", words) + f"{size} {sign} "


def readable(text, language="en"):
    """Numbers and signs as words, for engines that do not read them themselves."""
    marks = (",", r"\.") if language in "en zh ja ko th he".split() else ("[. ]", ",")
    if language == "en":
        text = re.sub(r"(?<![\w)])-(?=[$€£]?\d)", "minus ", text)
        text = re.sub(r"(?<=\d):(?=\d\d(?!\d))", "  ", text.replace(":00", " o'clock "))  # 12:30
    # 007, but not the end of 1 007
    text = re.sub(r"(?<![\d.,])(?<!\d )0\d+(?![.,]?\d)", lambda n: " ".join(n[0]), text)
    try:
        text = re.sub(NUMBER.format(*marks), lambda n: number_words(n, language), text)
    except (NotImplementedError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"num2words reads no numbers in {language!r}; write them as words, or use an engine that reads "
                         "them") from error
    text = text.translate(str.maketrans(SIGNS if language == "en" else {}))
    return " ".join(re.sub(r"\s+(?=[.,;:?!])", "", text).split())


if __name__ == "__main__":
    if len(sys.argv) < 4 or "{words}" not in sys.argv[3:]:
        sys.exit("readable.py: expected LANGUAGE TEXT PROGRAM and its arguments, one of them {words}")
    try:
        language, said, *program = sys.argv[1:]
        told = readable(said, language)
        os.execvp(program[0], [told if word == "{words}" else word for word in program])  # never through a shell
    except (ValueError, OSError) as error:
        sys.exit(f"readable.py: {' '.join(str(error).split())}")
