"""Which text a recipe trains on."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]


class DataConfig(BaseModel):
    """Text to train on, text held out, and how windows treat documents.

    Attributes:
        paths: files, folders, globs, `bundled:train`; a single one may stand without a list.
        heldout: the fraction of the bytes of `paths` to hold out, by document; or a list of other files, folders,
            globs, `bundled:heldout`, or of documents of `paths`, as `document:NAME-OR-GLOB`. An empty list holds
            nothing out. Files named here are left out of `paths`.
        heldout_tail: with a fraction, hold out the end of the last document: for a text of a single document.
        tokenizer: a `tokenizer.json` that `milonga tokenizer train` made, for a model of subwords; None for bytes.
        text_field: the field of `.jsonl` lines and the column of `.parquet` files that hold the text.
        separator: what follows each document, as text; empty for nothing.
        isolate: whether documents are kept apart where several fall into one window.
        carried: whether states are carried from step to step along the text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: Paths = Field(min_length=1)
    heldout: Annotated[float, Field(gt=0, lt=1)] | Paths = 0.05
    heldout_tail: bool = False
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    text_field: str = Field(default="text", min_length=1)
    separator: str = ""
    isolate: bool = True
    carried: bool = False

    @field_validator("paths")
    @classmethod
    def _no_document_names(cls, paths: list[str]) -> list[str]:
        for path in paths:
            if path.startswith("document:"):
                raise ValueError(f"{path} names a document; only data.heldout takes those")
        return paths
