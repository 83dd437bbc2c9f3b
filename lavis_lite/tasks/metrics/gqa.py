"""GQA's further metrics (Hudson & Manning 2019, section 4.4), beside the accuracy.

They need the fields of the owner's question file, which the records keep: `types`, `entailed`, `groups`, `semantic`
and, from its choices file, `valid` and `plausible`. Only balanced questions count, as in the owner's script; questions
that are not balanced serve as entailed ones.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lavis_lite.tasks.metrics.mean import Mean

Records = Mapping[str, Mapping[str, Any]]
GQA_METRICS = (
    *("binary", "open", "per_structural", "per_semantic", "per_detailed", "per_steps"),
    *("consistency", "validity", "plausibility", "distribution"),
)
_COMMON = ("color", "material", "shape")


def gqa_metrics(records: Records, predictions: Mapping[str, str], hits: Mapping[str, float]) -> dict[str, Any]:
    """Return, in percent, those metrics that the records have the fields for.

    All three are by question id: `records` with `answers`, predicted texts, and `hits`, 1 for a right prediction.
    `binary` and `open` are accuracies, `per_structural`, `per_semantic` and `per_detailed` by type, `per_steps` by the
    number of reasoning steps; `consistency` is over the questions entailed by one that was answered correctly;
    `validity` and `plausibility` ask whether the answer is in the question's scope, and in the images'; `distribution`
    is the chi-square distance of answers by group (lower is better, not in percent).
    """
    balanced = [key for key, record in records.items() if record.get("is_balanced", True)]
    found: dict[str, Any] = {}
    typed = [key for key in balanced if records[key].get("types")]
    if typed:
        kinds = {key: "open" if records[key]["types"]["structural"] == "query" else "binary" for key in typed}
        found |= _by(kinds, hits)
        for name in ("structural", "semantic", "detailed"):
            found[f"per_{name}"] = _by({key: str(records[key]["types"][name]) for key in typed}, hits)
    steps = {key: str(len(records[key]["semantic"])) for key in balanced if records[key].get("semantic")}
    found |= {"per_steps": _by(steps, hits)} if steps else {}
    consistent = [_consistency(key, records, hits) for key in balanced if hits[key]]
    known = [value for value in consistent if value is not None]
    found |= {"consistency": Mean(sum(known) / len(known), known)} if known else {}
    for name, scope in (("validity", "valid"), ("plausibility", "plausible")):
        scoped = [key for key in balanced if records[key].get(scope) is not None]
        inside = [100.0 * (predictions[key] in _scope(records[key], scope)) for key in scoped]
        found |= {name: Mean(sum(inside) / len(inside), inside)} if inside else {}
    distance = _distance(balanced, records, predictions)
    return found | ({"distribution": distance} if distance is not None else {})


def _by(kinds: Mapping[str, str], hits: Mapping[str, float]) -> dict[str, Mean]:
    groups: dict[str, list[float]] = defaultdict(list)
    for key, kind in kinds.items():
        groups[kind].append(100 * hits[key])
    return {kind: Mean(sum(groups[kind]) / len(groups[kind]), groups[kind]) for kind in sorted(groups)}


def _consistency(key: str, records: Records, hits: Mapping[str, float]) -> float | None:
    """Return the accuracy, in percent, on the questions that a question entails; None without any."""
    entailed = [other for other in map(str, records[key].get("entailed") or ()) if other != key and other in hits]
    return 100 * sum(hits[other] for other in entailed) / len(entailed) if entailed else None


def _scope(record: Mapping[str, Any], name: str) -> Sequence[str]:
    """Return the answers in scope; for what two objects have in common it is the names of attributes."""
    detailed = (record.get("types") or {}).get("detailed") or ""
    return _COMMON if "Common" in detailed else record[name]


def _distance(keys: Sequence[str], records: Records, predictions: Mapping[str, str]) -> float | None:
    """Return the chi-square distance of predicted from right answers, weighted by the size of the global groups."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for key in keys:
        group = (records[key].get("groups") or {}).get("global")
        if group is not None:
            gold[group][records[key]["answers"][0]] += 1
            given[group][predictions[key]] += 1
    if not gold:
        return None
    weighted, total = 0.0, 0
    for group, answers in gold.items():
        number = answers.total()
        weighted += number * sum((given[group][text] - count) ** 2 / count for text, count in answers.items())
        total += number
    return weighted / total
