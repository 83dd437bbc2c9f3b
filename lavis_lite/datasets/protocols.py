"""Protocols of what tasks require of datasets, and the keys of the batches that datasets make and models read.

A dataset need not derive from anything here: it conforms by having the attributes. `datasets/base.py` has a base class
that does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from lavis_lite.common.records import Record

IMAGE_KEYS = ("image", "image_mask")
"""The keys of a batch that say what each sample shows: whoever exchanges images exchanges both."""
Samples = dict[str, Any]
"""A batch; `SampleDict` lists the keys with a meaning. Models and datasets of your own may have further ones."""


class SampleDict(TypedDict, total=False):
    """The keys of a batch of B samples."""

    image: Tensor
    """Normalised pixels, float (B,3,H,W). Of videos (B,3,F,H,W) with F frames in time order, read by the models
    whose class has `takes_video`. With the processor `features` (B,N,W), N tokens of another encoder."""
    image_mean: Tensor
    """(B,3), where images are bytes (`output: uint8`): normalised by these and the next on the device, which removes
    both keys. Made by collaters, read by loaders (`normalised`)."""
    image_std: Tensor
    """The standard deviation, as `image_mean`."""
    image_digests: list[bytes]
    """With `model.cache_features`: a digest of each image's pixels, for which tokens are looked up."""
    image_is_encoded: bool
    """True if `image` holds the tokens (B,S,E) of the model's image encoder: of a frozen one with
    `model.cache_features`, in evaluation where samples share images."""
    same_image: list[int]
    """In evaluation, where samples share images: for each sample the position of the batch's first sample with the same
    pixels. Made by the loader, read by tasks (`encoded_once`)."""
    image_mask: Tensor
    """With features (B,N,W) of another encoder as `image`: LongTensor (B,N), 1 where a token counts."""
    image0: Tensor
    """As `image`: the first image of a pair. Made by `nlvr`, read by `blip_nlvr`."""
    image1: Tensor
    """The second image of a pair."""
    text_input: list[str]
    """Caption, question, statement or complete instruction."""
    prompt: str | list[str]
    """A prompt for all samples, or one per sample; `{}` says that `text_input` is complete. Set by callers, tasks and
    instruction datasets; read by generating models."""
    image_id: Tensor | list[Any]
    """In training a LongTensor (B), the image's index in first-seen order; the loader makes those of several datasets
    differ. In evaluation a list of the annotations' own ids, of any type. Made by `caption` and `retrieval`."""
    instance_id: list[str]
    """Unique in the dataset, for gathering results: the sample's index, or the annotation's field `instance_id`."""
    question_id: list[Any]
    """The annotation's own id. Made by `vqa` and `instruct` in evaluation."""
    answer: list[str]
    """All answers of the batch, flat. Made by `vqa` in training, as `weight` and `n_answers`; read by `blip_vqa`."""
    weight: Tensor
    """The weight of each answer, float (sum of `n_answers`)."""
    n_answers: Tensor
    """Answers per question, LongTensor (B)."""
    text_output: list[str]
    """Target text of a language model for `text_input`; one of several answers, drawn by its share."""
    candidates: list[list[str]]
    """B lists, of any lengths: the texts to choose from. Made by `instruct` in evaluation, of all records or none. The
    task `multimodal_classification` sets it to one list for all samples, the names of the classes."""
    label: Tensor
    """Class indices, LongTensor (B). Made by `nlvr` and `classification`."""
    index: list[int]
    """The image's position in a retrieval gallery."""
    ocr_tokens: list[list[str]]
    """Words read in each image, for a prompt with two placeholders. This key and the four below are set by callers."""
    choices: list[list[str]]
    """Answers to choose from, for a prompt with two placeholders: "(a) red (b) blue"."""
    context: list[str]
    """A text before the prompt."""
    history: list[str]
    """A dialogue before the prompt."""
    caption: list[str]
    """A caption before the prompt."""
    epoch: int
    """Set by the training loop, as `iters` and `num_iters_per_epoch`, for momentum models."""
    iters: int
    num_iters_per_epoch: int


class SampleDataset(Protocol):
    """A dataset that a run trains on."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Return one sample. Raises `UnreadableSample` if its files cannot be read."""
        ...

    def collater(self, samples: list[dict[str, Any]], /) -> Samples:
        """Return the batch of these samples."""
        ...


class EvalDataset(SampleDataset, Protocol):
    """A split that a task evaluates."""

    @property
    def annotation(self) -> Sequence[Record]:
        """One record per sample, with the ground truth: `answers` (strings; VQAv2 has ten), `question_type` and
        `answer_type` of questions; `label` (index of the right candidate), `classes` (one per candidate, equal where
        they mean the same) and `group` of instructions with candidates.
        """
        ...


@runtime_checkable
class HasReferences(Protocol):
    """A captioning split with reference captions."""

    def references(self) -> dict[Any, list[str]]:
        """Return the references of each image id; images without any are left out."""
        ...


@runtime_checkable
class HasExtraMetrics(Protocol):
    """A captioning split with metrics of its own."""

    def extra_metrics(self, captions: Mapping[Any, str], /) -> dict[str, float]:
        """Return further metrics of the captions by image id."""
        ...


@runtime_checkable
class JudgesCaptions(Protocol):
    """A captioning split that can judge a single caption, for the file of predictions."""

    def judge(self, image_id: Any, caption: str, /) -> dict[str, float]:
        """Return metrics of the caption of an image, in percent; `accuracy` says how right it is."""
        ...


@runtime_checkable
class HasAnswerList(Protocol):
    """A split of questions that may come with a list of answers to rank."""

    answer_list: list[str] | None


@runtime_checkable
class HasClasses(Protocol):
    """A classification split whose classes have names, by label; the list may be empty."""

    classes: Sequence[str]


@runtime_checkable
class HasLabels(Protocol):
    """A classification split whose labels are known before its samples are read."""

    labels: Sequence[int]

    def place(self, number: int, /) -> str:
        """Return file and line (or number) of a record, for errors."""
        ...


@runtime_checkable
class Gallery(Protocol):
    """A retrieval split: samples are images (`image`, `index`)."""

    text: Sequence[str]
    """All texts, in order."""
    txt2img: Sequence[int]
    """The image of each text."""
    img2txt: Sequence[Sequence[int]]
    """The texts of each image."""

    @property
    def annotation(self) -> Sequence[Record]:
        """One record per image."""
        ...
