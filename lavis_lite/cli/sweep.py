"""`lavis-lite sweep`: evaluate a recipe as it is and in each of its `alternatives`, and print which comes closest.

An alternative is a reading of the protocol that the published value may have been measured by, where the source does
not say.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lite.cli import main as cli
from lavis_lite.cli.published import EVALUATION
from lavis_lite.common.config.config import Config, parser
from lavis_lite.common.config.expected import Alternative
from lavis_lite.common.errors import UserError

PUBLISHED = "as the recipe is"
HELP = """Evaluate a recipe as it is, and with each of its `alternatives`, and print which comes closest to the
published value.

example:
  lavis-lite sweep --cfg-path projects/instructblip/eval/hateful_memes.yaml"""


@dataclass(frozen=True)
class Outcome:
    """The value that one reading of the protocol gave."""

    name: str
    metric: str
    here: float | None
    """None: the evaluation has no such metric."""
    published: float

    @property
    def distance(self) -> float:
        """Return the difference from the published value, without its sign; infinite if nothing was measured."""
        return math.inf if self.here is None else abs(self.here - self.published)

    def __str__(self) -> str:
        return "not measured" if self.here is None else f"{self.here:8.2f}  {self.here - self.published:+8.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lavis-lite sweep`; ends the process."""
    p = parser(prog="lavis-lite sweep", description=HELP)
    p.add_argument("--checkpoint", metavar="PATH", help="weights to evaluate")
    p.add_argument("--limit", type=int, metavar="N", help="evaluate the first N samples of each split")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these alternatives")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = p.parse_args(argv)
    sys.exit(sweep(args))


def sweep(args: argparse.Namespace) -> int:
    """Run every evaluation, print the table, and return the exit code: that of the first evaluation that failed."""
    try:
        cfg = Config.from_args(args)
        chosen = alternatives(cfg, args.only)
        for alternative in chosen:  # a mistake in the last one is found before the first evaluation
            layer = alternative.layer(f"{cfg.source}: alternatives: {alternative.name}")
            Config.from_file(args.cfg_path, args.options, flags=[layer])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for alternative in [Alternative(name=PUBLISHED), *chosen]:
        if alternative.settings or alternative.name == PUBLISHED:
            job = _job(args.job_id, alternative.name)
            print(f"== {alternative.name}", file=sys.stderr)
            if code := _evaluate(args, alternative, job):
                return code
            if args.dry_run:
                continue
            found.append(json.loads((Path(cfg.run.output_dir) / job / EVALUATION).read_text(encoding="utf-8")))
        if not args.dry_run:
            percent = (found[-1] if alternative.settings else found[0])["percent"]
            outcomes += outcomes_of(percent, found[0]["verdict"], alternative)
    if not args.dry_run:
        print("\n".join(table(outcomes)))
    return 0


def alternatives(cfg: Config, only: Sequence[str] | None) -> list[Alternative]:
    """Return the recipe's alternatives, or those of these names; ConfigError if there are none."""
    from lavis_lite.common.config.files import ConfigError
    from lavis_lite.common.registry import did_you_mean

    known = {alternative.name: alternative for alternative in cfg.alternatives}
    if not known or not cfg.expected:
        raise ConfigError(f"{cfg.source}: has no `alternatives` to sweep over, or no `expected` value to come close to")
    for name in only or ():
        if name not in known:
            raise ConfigError(f"--only: {cfg.source} has no alternative {name!r}. {did_you_mean(name, known)}")
    return [known[name] for name in only or known]


def _job(job_id: str | None, name: str) -> str:
    return f"{job_id or 'sweep'}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}"


def _evaluate(args: argparse.Namespace, alternative: Alternative, job: str) -> int:
    argv = ["--cfg-path", args.cfg_path, "--job-id", job]
    argv += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    argv += ["--limit", str(args.limit)] if args.limit is not None else []
    argv += ["--resume", args.resume] if args.resume is not None else []
    argv += ["--dry-run"] if args.dry_run else []
    options = list(args.options)
    options += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in alternative.settings.items()]
    return cli.evaluate([*argv, *(["--options", *options] if options else [])], command=sys.argv)


def outcomes_of(
    percent: dict[str, dict[str, float]], rows: Sequence[dict[str, Any]], alternative: Alternative
) -> list[Outcome]:
    """Return what an evaluation gave for the published values of `rows`, by the alternative's split and metric.

    `percent` are metrics by split.
    """
    found = []
    for row in rows:
        here = percent.get(alternative.split or row["split"], {}).get(alternative.metric or row["key"])
        found.append(Outcome(alternative.name, f"{row['split']} {row['metric']}", here, row["published"]))
    return found


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of the table, nearest first, and what they say."""
    if all(outcome.here is None for outcome in outcomes):
        return ["nothing was measured that has a published value"]
    lines = []
    for metric in dict.fromkeys(outcome.metric for outcome in outcomes):
        own = sorted((one for one in outcomes if one.metric == metric), key=lambda outcome: outcome.distance)
        width = max(len(one.name) for one in own)
        lines += [f"{metric}: published {own[0].published:g}"]
        lines += [f"  {one.name.ljust(width)}  {one}" for one in own]
        lines += [f"  closest: {own[0].name}"] if own[0].here is not None else []
    return lines
