"""7,685 real pictures with human titles, as a CSV file for `reproduce.py real --data` or cgap.py.

They are Debian's packages of Open Clip Art (public domain) and of Tux Paint's stamps (each package's
copyright file names the makers). In an empty folder, on Debian or Ubuntu:

    for p in openclipart-png openclipart-svg tuxpaint-stamps-default; do
        apt-get download $p && dpkg -x ${p}_*.deb .
    done
    python clipart.py usr/share pairs.csv

A picture's captions are its title with its place among the folders, its title with its keywords, and
its description, as far as the SVG file has them; a stamp's is the sentence beside it.
"""
import csv
import re
import sys
from pathlib import Path


def tidy(text):
    """Without underscores, dashes, entities and line breaks."""
    return " ".join(re.sub(r"[_-]+|&\w+;", " ", text).split())


def clipart(folder):
    """(picture, caption) of each caption in openclipart."""
    for png in sorted(folder.glob("png/**/*.png")):
        place = png.relative_to(folder / "png")
        svg = folder / "svg" / place.with_suffix(".svg")
        source = svg.read_text(errors="replace") if svg.exists() else ""

        def found(tag):
            return [text for text in map(tidy, re.findall(f"<{tag}>([^<]*)", source)) if text]

        title = "".join(found("dc:title")[:1])
        keywords = list(dict.fromkeys(found("rdf:li")))
        folders = " ".join(map(tidy, place.parts[:-1]))
        name = tidy(re.sub(r"_.*|\d+", "", png.stem))
        captions = [f"{title}, {folders}" if title else f"{folders} {name}",
                    ", ".join([title, *keywords]) if keywords else "", *found("dc:description")[:1]]
        for caption in dict.fromkeys(captions):
            if re.search(r"\w", caption):
                yield png.resolve(), caption[:300]


def stamps(folder):
    """(picture, sentence) of each stamp."""
    for png in sorted(folder.rglob("*.png")):
        text = png.with_suffix(".txt")
        sentence = text.read_text(errors="replace").split("\n")[0].strip() if text.exists() else ""
        if sentence:
            yield png.resolve(), sentence


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    share = Path(sys.argv[1])
    with open(sys.argv[2], "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows(clipart(share / "openclipart"))
        writer.writerows(stamps(share / "tuxpaint/stamps"))
