"""The commands `caption`, `ask`, `match` and `embed`: a model over many images, from files to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_lite.cli.commands.common import (
    Out,
    ResumableOptions,
    TextOptions,
    finish,
    given,
    lines_of,
    with_options,
)

if TYPE_CHECKING:
    from lavis_lite.cli.commands.run import Job

Prompt = Annotated[str | None, typer.Option(help="text that each caption begins with")]
Template = Annotated[str | None, typer.Option("--prompt", help="template of questions, with {} for the question")]


def job(task: str, options: ResumableOptions, **fields: Any) -> "Job":
    """Return the job of a task; importing it loads torch."""
    from lavis_lite.cli.commands.run import Job

    return Job(task=task, options=options, **fields)


@with_options(TextOptions, model="blip_caption/base_coco")
def caption(
    options: TextOptions,
    *,
    out: Out = None,
    sidecars: Annotated[bool, typer.Option("--sidecars", help="write a .txt file beside each image")] = False,
    prompt: Prompt = None,
    num_captions: Annotated[int, typer.Option(help="captions per image")] = 1,
    scores: Annotated[bool, typer.Option("--scores", help="add each caption's score")] = False,
    trigger: Annotated[str | None, typer.Option(help="word before each caption: WORD, a photo of ...")] = None,
    max_words: Annotated[int | None, typer.Option(min=1, help="words to which a caption is cut")] = None,
) -> None:
    """Write captions of images."""
    if out is not None and sidecars:
        raise typer.BadParameter("give --out or --sidecars, not both")
    if not sidecars:
        options.check_output(out)
    if num_captions > 1 and options.num_beams is None and not options.sample:
        options.num_beams = max(3, num_captions)
    settings = options.writing() | given(prompt=prompt, num_captions=num_captions)
    settings |= {"scores": True} if scores else {}

    def edited(row: dict[str, Any]) -> dict[str, Any]:
        if "captions" in row:
            row = row | {"captions": [_edited(text, trigger, max_words) for text in row["captions"]]}
        return row | {"caption": _edited(row["caption"], trigger, max_words)}

    finish(
        lambda: job("caption", options, settings=settings, seed=options.seed, text="caption", edit=edited).run(
            out, sidecars
        )
    )


@with_options(TextOptions, model="blip_vqa/vqav2")
def ask(
    options: TextOptions,
    *,
    question: Annotated[str | None, typer.Option("--question", "-q", help="one question about every image")] = None,
    question_column: Annotated[str | None, typer.Option(help="column of a table with the questions")] = None,
    answers: Annotated[Path | None, typer.Option(help="file with one answer per line, to choose from")] = None,
    out: Out = None,
    prompt: Template = None,
) -> None:
    """Answer a question about each image.

    The question is the same for all images, or a column of a table.
    """
    if (question is None) == (question_column is None):
        raise typer.BadParameter("give either --question or --question-column")
    if question is not None and not question.strip():
        raise typer.BadParameter("--question is blank; write a question")
    options.check_output(out)

    def execute() -> int:
        settings = options.writing() | given(prompt=prompt)
        settings |= {} if answers is None else {"answers": lines_of(answers)}
        settings |= {} if question is None else {"question": question}
        return job("ask", options, settings=settings, seed=options.seed, text="answer", column=question_column).run(out)

    finish(execute)


@with_options(ResumableOptions, model="blip_image_text_matching/base")
def match(
    options: ResumableOptions,
    *,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="a text to compare with; repeatable")] = None,
    texts: Annotated[Path | None, typer.Option(help="file with one text per line")] = None,
    out: Out = None,
) -> None:
    """Score how well texts fit each image.

    The scores are the probability of a match (itm) and the cosine similarity (itc).
    """
    if not text and texts is None:
        raise typer.BadParameter("give --text or --texts")
    options.check_output(out)

    def execute() -> int:
        compared = [*(text or []), *(lines_of(texts) if texts else [])]
        return job("match", options, settings={"texts": compared}, text="scores").run(out)

    finish(execute)


@with_options(ResumableOptions, model="blip_feature_extractor/base")
def embed(
    options: ResumableOptions,
    *,
    out: Annotated[Path, typer.Option(help="a .npy file, whose rows FILE.ids.txt names, or a .parquet table")] = Path(
        "embeddings.npy"
    ),
    features: Annotated[
        str, typer.Option(help="projected: unit vectors that the contrast compares; states: before the projection")
    ] = "projected",
    texts: Annotated[bool, typer.Option("--texts", help="PATHS are files with one text per line")] = False,
) -> None:
    """Compute features of images, or of texts.

    The rows are float32, one per image or text: (D,) for BLIP and for texts, (Q,D) for the Q queries of BLIP-2.
    """
    options.check_output(out)
    if texts and options.resume:
        raise typer.BadParameter("--resume is of images; texts are computed at once")

    def execute() -> int:
        from lavis_lite.cli.commands.embed import embed_texts_to, embed_to

        return embed_texts_to(out, options, features) if texts else embed_to(out, options, features)

    finish(execute)


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (caption, ask, match, embed):
        app.command(command.__name__)(command)


def _edited(text: str, trigger: str | None, max_words: int | None) -> str:
    """Return a caption cut to so many words, after the trigger word."""
    words = text.split()
    if max_words is not None and len(words) > max_words:
        text = " ".join(words[:max_words])
    return text if trigger is None else f"{trigger}, {text}"
