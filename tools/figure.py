"""
Draw results/method.svg, the figure of the README: the method, left to right.

  python tools/figure.py
"""
from pathlib import Path

BOXES = [  # x, y, width, text, fill
    (10, 96, 120, "question, as text", "#f4f4f4"), (10, 186, 120, "the same, spoken", "#f4f4f4"),
    (180, 20, 190, "teacher: text LLM (frozen)", "#d9e5f3"), (180, 96, 190, "student: text LLM", "#fbe6d4"),
    (180, 186, 90, "speech encoder", "#e6e6e6"), (290, 186, 80, "adapter", "#fbe6d4"),
    (440, 20, 150, "answer, token by token", "#d9e5f3"), (440, 96, 150, "answer by text", "#fbe6d4"), (440, 186, 150, "answer by speech", "#fbe6d4")]
ARROWS = [(130, 106, 180, 40), (130, 114, 180, 114), (130, 204, 180, 204), (270, 204, 290, 204), (330, 186, 330, 134), (370, 38, 440, 38),
          (370, 110, 440, 110), (370, 124, 440, 196)]
LABELS = [(606, 70, "T2T: CE + \u03bb \u03c4\u00b2 KL"), (606, 136, "S2T: CE + \u03bb \u03c4\u00b2 KL + CTC"), (338, 164, "what was heard, as embeddings")]


def main():
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 240" font-family="sans-serif" font-size="13">',
             '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto"><path d="M0,0 L7,3 L0,6 z" fill="#555"/></marker></defs>',
             '<rect width="790" height="240" fill="white"/>']
    parts += [f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}" stroke="#555" marker-end="url(#a)"/>' for a, b, c, d in ARROWS]
    parts += [f'<path d="M{x},{y1} L{x},{y2}" stroke="#b03a2e" stroke-width="1.6" stroke-dasharray="5 3" fill="none"/>'
              for x, y1, y2 in ((600, 40, 112), (596, 44, 204))]
    for x, y, width, text, fill in BOXES:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="36" rx="5" fill="{fill}" stroke="#999"/>'
                     f'<text x="{x + width / 2}" y="{y + 23}" text-anchor="middle">{text}</text>')
    parts += [f'<text x="{x}" y="{y}" fill="{"#b03a2e" if x > 400 else "#555"}">{text}</text>' for x, y, text in LABELS]
    (Path(__file__).resolve().parent.parent / "results/method.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
