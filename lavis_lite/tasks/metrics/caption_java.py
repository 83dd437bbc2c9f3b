"""The Java programs that ship with pycocoevalcap: the PTB tokenizer and METEOR 1.5, each run once and closed.

Run from here and not through pycocoevalcap's wrappers, which write into site-packages, misalign captions that hold odd
line breaks, and leave processes behind when Java fails.
"""

import importlib.util
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis_lite.common.errors import InputError, MissingPackageError

logger = logging.getLogger(__name__)

TIMEOUT_S = 3600
DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
NEEDS_JAVA = ("meteor", "spice")
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def find_java() -> str | None:
    """The path of `java`, if there is one."""
    return shutil.which("java")


def folder() -> Path:
    """Where pycocoevalcap is installed. Raises ImportError if it is not."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("caption metrics need pycocoevalcap: pip install pycocoevalcap")
    return Path(spec.submodule_search_locations[0])


def missing_for(metric: str) -> str | None:
    """What keeps a metric from being computed here; None if nothing does."""
    if metric not in NEEDS_JAVA:
        return None
    if find_java() is None:
        return "it needs Java, and there is no `java` on the PATH (install a Java runtime, version 8 or later)"
    if metric == "spice":
        absent = [name for name in SPICE_MODELS if not (folder() / "spice" / "lib" / name).is_file()]
        if absent:
            return f"it needs {', '.join(absent)} in {folder() / 'spice' / 'lib'} (from Stanford CoreNLP 3.6.0)"
    return None


def tokenize(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each text as lower-case PTB tokens joined by spaces, punctuation dropped. Raises RuntimeError if Java fails."""
    lines = [" ".join(text.split()) for several in texts.values() for text in several]
    arguments = [
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        _command(arguments),
        cwd=folder() / "tokenizer",
        input=text.encode(),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    answered = done.stdout.decode().split("\n")
    # What is missing at the end can only be empty lines; one line too many is the last line's end
    if done.returncode or any(answered[len(lines) :]) or any(lines[len(answered) :]):
        raise _failure("the PTB tokenizer", done.stderr)
    answered += [""] * (len(lines) - len(answered))
    rows = iter(" ".join(word for word in line.split() if word not in DROPPED) for line in answered)
    return {key: [next(rows) for _ in several] for key, several in texts.items()}


def meteor(references: Mapping[str, Sequence[str]], captions: Mapping[str, Sequence[str]]) -> float:
    """METEOR of tokenized captions (one an image) over the whole set. Raises RuntimeError if Java fails."""
    arguments = ["-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            _command(arguments),
            cwd=folder() / "meteor",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
        )
        try:
            # SCORE answers a caption's statistics; EVAL on all of them answers a score each and then the set's
            statistics = [_ask(process, _score_line(references[key], captions[key][0])) for key in captions]
            process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
            process.stdin.flush()
            return [float(process.stdout.readline()) for _ in range(len(statistics) + 1)][-1]
        except (OSError, ValueError) as error:
            process.kill()
            process.wait()
            complaints.seek(0)
            raise _failure("METEOR", complaints.read()) from error
        finally:
            process.kill()
            process.communicate()


def _score_line(references: Sequence[str], caption: str) -> str:
    return " ||| ".join(["SCORE", *(" ".join(text.replace("|||", "").split()) for text in (*references, caption))])


def _ask(process: subprocess.Popen, line: str) -> str:
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        raise InputError("no answer")
    return answer


def _command(arguments: Sequence[str]) -> list[str]:
    return [find_java() or "java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-XX:+UseSerialGC", *arguments]


def _failure(program: str, complaints: bytes) -> RuntimeError:
    return RuntimeError(
        f"{program} (a Java program of pycocoevalcap) failed: {complaints.decode(errors='replace')[-500:]}"
    )
