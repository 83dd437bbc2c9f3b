"""The Java programs that ship with pycocoevalcap: the PTB tokenizer and METEOR 1.5, run once or twice and closed.

They are run from here because pycocoevalcap's wrappers write into site-packages, misalign captions with odd line
breaks, and leave processes running when Java fails.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis_lite.common.errors import MissingPackageError

TIMEOUT_S = 3600
DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
TOKENIZER = "-cp stanford-corenlp-3.4.1.jar edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase"
METEOR = "-jar -Xmx2G meteor-1.5.jar - - -stdio -l en -norm"


def find_java() -> str | None:
    """Return the path of `java`, if it is installed."""
    return shutil.which("java")


def folder() -> Path:
    """Return the folder where pycocoevalcap is installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("caption metrics need pycocoevalcap: pip install pycocoevalcap")
    return Path(spec.submodule_search_locations[0])


def missing_for(metric: str) -> str | None:
    """Return why a metric cannot be computed here; None if it can."""
    if metric not in ("meteor", "spice"):
        return None
    if find_java() is None:
        return "it needs Java, and there is no `java` on the PATH (install a Java runtime, version 8 or later)"
    library = folder() / "spice" / "lib"
    absent = [name for name in SPICE_MODELS if not (library / name).is_file()]
    if metric == "spice" and absent:
        return f"it needs {', '.join(absent)} in {library} (from Stanford CoreNLP 3.6.0)"
    return None


def tokenize(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return each text as lower-case PTB tokens joined by spaces, without punctuation. RuntimeError if Java fails."""
    lines = [" ".join(text.split()) for several in texts.values() for text in several]
    output = _run("tokenizer", TOKENIZER, lines)
    # Lines missing at the end must be empty ones; the one line too many is what follows the last line break
    if any(output[len(lines) :]) or any(lines[len(output) :]):
        raise RuntimeError(f"the PTB tokenizer of pycocoevalcap gave {len(output) - 1} lines for {len(lines)} captions")
    output += [""] * (len(lines) - len(output))
    rows = iter(" ".join(word for word in line.split() if word not in DROPPED) for line in output)
    return {key: [next(rows) for _ in several] for key, several in texts.items()}


def meteor(references: Mapping[str, Sequence[str]], captions: Mapping[str, Sequence[str]]) -> float:
    """Return METEOR of tokenized captions (one per image) over the whole set. RuntimeError if Java fails."""
    rows = [[*references[key], captions[key][0]] for key in captions]
    # SCORE gives the statistics of a caption; EVAL of all statistics gives their scores, then the set's
    lines = [["SCORE", *(" ".join(text.replace("|||", "").split()) for text in row)] for row in rows]
    statistics = _run("meteor", METEOR, [" ||| ".join(line) for line in lines])[: len(rows)]
    return float(_run("meteor", METEOR, [" ||| ".join(["EVAL", *map(str.strip, statistics)])])[len(rows)])


def _run(part: str, arguments: str, lines: Sequence[str]) -> list[str]:
    """Return the lines that a program of this part of pycocoevalcap writes for those that it reads."""
    settings = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-XX:+UseSerialGC")
    done = subprocess.run(
        [find_java() or "java", *settings, *arguments.split()],
        cwd=folder() / part,
        input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace")[-500:]
        raise RuntimeError(f"{part} (a Java program of pycocoevalcap) failed: {reason}")
    return done.stdout.decode().split("\n")
