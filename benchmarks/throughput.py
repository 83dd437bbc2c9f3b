"""Speed of training and captioning with BLIP-2, at full size with random weights, against transformers' classes.

    python benchmarks/throughput.py                              # the GPU if there is one; else the CPU, 2 layers deep
    python benchmarks/throughput.py --parts stage1 --batch 128 --json stage1.json
    python benchmarks/throughput.py --tiny                       # some seconds, to check that it runs

Images and texts are synthetic, the tokenizers are the packaged small ones; the vocabularies are full-sized. Both sides
of a row have the same weights and do the same work in the same process, alternating; times are medians.
docs/performance.md says what is counted.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from blip2_jobs import PARTS, all_jobs
from measure import Row, measure, table

from lavis_lite.common.hardware import known_peak, process_peak_gib


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--depth", type=int, help="layers of image encoder and language model; default: all, cpu: 2")
    parser.add_argument("--image-size", type=int, help="default: 224")
    parser.add_argument("--batch", type=int, help="images per step; default: 64, cpu: 2")
    parser.add_argument("--words", type=int, default=12, help="words of a text")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a generated caption")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, whose median is reported")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU; default: by the GPU's name")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--json", type=Path, help="write the rows and settings to this file too")
    arguments = parser.parse_args(argv)
    if arguments.batch == 1 or arguments.words < 2:
        parser.error("--batch and --words must be at least 2: there are negatives to draw and texts to cut in halves")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bf16" if on_gpu else "fp32")
    arguments.batch = arguments.batch or (64 if on_gpu else 2)
    arguments.image_size = arguments.image_size or (48 if arguments.tiny else 224)
    if arguments.depth is None and not on_gpu and not arguments.tiny:
        arguments.depth = 2
    if arguments.peak_tflops is None and on_gpu:
        arguments.peak_tflops = known_peak(torch.cuda.get_device_name())
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure all jobs and print each row as soon as it is measured."""
    arguments = parse(argv)
    torch.manual_seed(0)
    rows: list[Row] = []

    def measured() -> Iterator[Row]:
        for job in all_jobs(arguments):
            rows.append(measure(job, repeats=arguments.repeats, peak_tflops=arguments.peak_tflops))
            del job  # and its model, before the next one is built
            yield rows[-1]

    settings = setting(arguments)
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    for line in table(measured()):
        print(line, flush=True)
    print(f"the process took {process_peak_gib():.1f} GiB of main memory at most")
    if arguments.json:
        report = {"settings": settings, "process_peak_gib": process_peak_gib(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings and versions of the measurement."""
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    own = {name: value for name, value in vars(arguments).items() if name != "json"}
    threads = None if gpu else torch.get_num_threads()
    return own | {"gpu": gpu, "threads": threads, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
