"""Failures of the machine, not of the program: out of memory, a dead loader worker, a lost rank; each
is one line that says what to change.
"""

import errno
import re

MEMORY = (
    "lower run.batch_size_train (and raise run.accum_grad_iters by the same factor), run.batch_size_eval or "
    "model.image_size; recompute activations (BLIP: model.vit_grad_ckpt=true, BLIP-2: model.use_grad_checkpoint=true); "
    "set run.precision=bf16"
)
LIMITS = (
    "lower run.num_workers (0 loads in the main process), or raise the machine's limits of open files (ulimit -n) and "
    "of processes (ulimit -u)"
)
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_NO_MORE = ("Too many open files", "can't start new thread", "unable to open shared memory object")
_FULL = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\) (?:is killed by signal: (.*?)\.|exited)")


def explain(error: BaseException) -> str | None:
    """Return what failed and what to change, or None for an error that is none of these."""
    text = own_words(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return f"out of memory on the CPU: {_memory_hint('cpu')}"
    if getattr(error, "errno", None) in _TOO_MANY or any(part in text for part in _NO_MORE):
        return f"{text.split('. ')[0]}: {LIMITS}"
    if not isinstance(error, RuntimeError):
        return None
    worker = _WORKER.search(text)
    if worker:
        return _worker(worker[1].strip(), worker[2])
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _FULL):
        return f"out of memory ({_first_sentences(text)}): {_memory_hint('cpu' if 'CPUAllocator' in text else 'gpu')}"
    return _rank(error)


def own_words(error: BaseException) -> str:
    """Return the message; of an error that a loader worker raised, without the traceback that torch puts before it."""
    text = str(error).strip()
    if not text.startswith("Caught ") or " in DataLoader worker process " not in text:
        return text
    _, found, words = text.rpartition(f"{type(error).__name__}: ")
    return words if found else text.splitlines()[-1].split(": ", 1)[-1]


def _memory_hint(place: str) -> str:
    return MEMORY if place == "gpu" else f"{MEMORY}; lower run.num_workers"


def _worker(pid: str, signal: str | None) -> str:
    how = f"was killed by the signal {signal}" if signal else "ended unexpectedly"
    return (
        f"loader worker {pid} {how}, perhaps because memory or /dev/shm is full: lower run.num_workers (0 loads in the "
        "main process) or run.batch_size_train, or give a container more shared memory (docker run --shm-size=8g)"
    )


def _rank(error: RuntimeError) -> str | None:
    from lavis_lite.common import dist

    found = dist.lost_rank(error)
    if found is None:
        return None
    return f"{found}. run.step_timeout is how many seconds a step waits for it; --resume auto continues"


def _first_sentences(text: str) -> str:
    """The message's first two sentences without the place in torch's source."""
    line = re.sub(r"^\[enforce fail at [^\]]*\]( err == 0)?[. ]*", "", text.splitlines()[0])
    return ". ".join(re.split(r"\.\s", line)[:2]).rstrip(". ")
