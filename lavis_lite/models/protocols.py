"""Protocols of what tasks require of models beside `model(samples)`, which returns `loss` and its parts `loss_*`.

A model need not derive from anything here: it conforms by having the method. Samples are batches as in
`datasets/protocols.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@runtime_checkable
class CountsTokens(Protocol):
    """A model that counts the tokens of the texts that it reads (`tokens_per_s` of the log)."""

    @property
    def num_text_tokens(self) -> int:
        """Tokens of all texts that were tokenised so far, without padding."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A model that writes texts about images (task `captioning`, and `instruct` without candidates)."""

    def generate(self, samples: dict[str, Any], /, **settings: Any) -> list[str]:
        """Return `num_captions` texts per image, those of one image in a row, without the prompt.

        `settings` replace the model's own; they are those of `GenerationConfig`, also by other names (`max_len`).
        """
        ...


@runtime_checkable
class AnswersQuestions(Protocol):
    """A model that answers questions (task `vqa` and those derived from it)."""

    def predict_answers(self, samples: dict[str, Any], /, *, inference_method: str, **settings: Any) -> list[str]:
        """Return one answer per question.

        `rank` picks from the setting `answer_list` the likeliest of the `num_ans_candidates` answers with the likeliest
        first tokens; `generate` writes. `prompt` is a template with a placeholder for `text_input` and one for another
        key of the samples. Further settings are those of `GenerationConfig`.
        """
        ...


@runtime_checkable
class ScoresAnswers(AnswersQuestions, Protocol):
    """A model that also gives the scores of its answers (task `vqa` with `save_scores`)."""

    def scored_answers(self, samples: dict[str, Any], /, **settings: Any) -> list[list[tuple[str, float]]]:
        """Return the answers of each question with their scores, best first: of `generate` one, of `rank` all that were
        compared. `settings` are those of `predict_answers`.
        """
        ...


@runtime_checkable
class ScoresCandidates(Protocol):
    """A model that tells how likely given texts are (task `instruct` with candidates)."""

    def class_losses(self, samples: dict[str, Any], candidates: Any, /, *, divided: bool) -> Tensor:
        """Return the loss of each candidate, (B,C): inf where a sample has fewer than C.

        `candidates` are one list for all samples, or one per sample. `divided`: by the number of tokens.
        """
        ...


class Classifies(Protocol):
    """A model that classifies images, pairs, or images with texts (task `multimodal_classification`)."""

    def predict(self, samples: dict[str, Any], /, **settings: Any) -> Mapping[str, Tensor]:
        """Return `predictions`, the logits (B,C), and `targets`, the labels (B), if the samples have them.

        A model that also `ScoresCandidates` gets the names of the classes as `candidates`, and settings by keyword.
        """
        ...


@runtime_checkable
class ScoresPairs(Protocol):
    """A model that tells how well texts fit images (tasks `matching` and `capfilt`)."""

    def match_scores(self, samples: dict[str, Any], /) -> Mapping[str, Tensor]:
        """Return scores of each text for its image, float32, higher where it fits better: `itm`, the probability of a
        match, from a matching head, and `itc`, the cosine similarity. At least one of them is there.

        `text_input` has as many texts as there are images, or k times as many, the k texts of an image in a row.
        """
        ...


@runtime_checkable
class ClassifiesByPrompts(Protocol):
    """A model that compares images with texts about classes (task `zero_shot_classification`)."""

    def class_features(self, prompts: Sequence[Sequence[str]], /) -> Tensor:
        """Return the feature (C,D) of each class, given its prompts."""
        ...

    def class_scores(
        self,
        samples: dict[str, Any],
        prompts: Sequence[Sequence[str]],
        features: Tensor,
        /,
        *,
        match_head: str,
        k_test: int,
    ) -> Tensor:
        """Return the score (B,C) of each class for each image, by `itc` (features) or `itm` (the matching head)."""
        ...


@runtime_checkable
class Retrieves(Protocol):
    """A model that compares all images of a gallery with all its texts (task `retrieval`)."""

    def compute_sim_matrix(self, loader: Iterable[dict[str, Any]], /, k_test: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores (images, texts) and (texts, images), float32, whole on every rank.

        The matching head re-ranks the `k_test` most similar candidates of each query (at most all); the others score
        -100. 0 returns the similarities of all pairs.
        """
        ...


def method_names(*protocols: type) -> tuple[str, ...]:
    """Return the methods that the protocols ask for."""
    return tuple(name for protocol in protocols for name in vars(protocol) if not name.startswith("_"))
