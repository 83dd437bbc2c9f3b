"""The Java programs that ship with pycocoevalcap: the PTB tokenizer and METEOR 1.5, each run once and closed.

They are run from here because pycocoevalcap's wrappers write into site-packages, misalign captions with odd line
breaks, and leave processes running when Java fails.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

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
        return "it needs Java, and `java` is not on the PATH (install a Java runtime, version 8 or later)"
    library = folder() / "spice" / "lib"
    absent = [name for name in SPICE_MODELS if not (library / name).is_file()]
    if metric == "spice" and absent:
        return f"it needs {', '.join(absent)} in {library} (from Stanford CoreNLP 3.6.0)"
    return None


def tokenize(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return each text as lower-case PTB tokens joined by spaces, without punctuation. RuntimeError if Java fails."""
    lines = [" ".join(text.split()) for several in texts.values() for text in several]
    done = subprocess.run(
        _command(TOKENIZER),
        cwd=folder() / "tokenizer",
        input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    output = done.stdout.decode().split("\n")
    # Lines missing at the end must be empty ones; the one line too many is what follows the last line break
    if done.returncode or any(output[len(lines) :]) or any(lines[len(output) :]):
        raise _failure("the PTB tokenizer", done.stderr)
    output += [""] * (len(lines) - len(output))
    rows = iter(" ".join(word for word in line.split() if word not in DROPPED) for line in output)
    return {key: [next(rows) for _ in several] for key, several in texts.items()}


def meteor(references: Mapping[str, Sequence[str]], captions: Mapping[str, Sequence[str]]) -> float:
    """Return METEOR of tokenized captions (one per image) over the whole set. RuntimeError if Java fails."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            _command(METEOR),
            cwd=folder() / "meteor",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # SCORE returns the statistics of a caption; EVAL of all statistics returns their scores, then the set's
            statistics = []
            for key in captions:
                texts = [" ".join(text.replace("|||", "").split()) for text in (*references[key], captions[key][0])]
                _send(process.stdin, ["SCORE", *texts])
                statistics.append(process.stdout.readline().strip())
                if not statistics[-1]:
                    raise EOFError("METEOR ended without statistics")
            _send(process.stdin, ["EVAL", *statistics])
            return [float(process.stdout.readline()) for _ in range(len(statistics) + 1)][-1]
        except (EOFError, OSError, ValueError) as error:
            process.kill()
            process.wait()
            stderr.seek(0)
            raise _failure("METEOR", stderr.read()) from error
        finally:
            process.kill()
            process.communicate()


def _send(stdin: IO[str], parts: Sequence[str]) -> None:
    stdin.write(" ||| ".join(parts) + "\n")
    stdin.flush()


def _command(arguments: str) -> list[str]:
    java = find_java() or "java"
    return [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-XX:+UseSerialGC", *arguments.split()]


def _failure(program: str, stderr: bytes) -> RuntimeError:
    return RuntimeError(f"{program} (a Java program of pycocoevalcap) failed: {stderr.decode(errors='replace')[-500:]}")
