"""Data sets for comparisons, uploaded as tables, for the operator."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from pydantic.config import JsonDict

from gateway.api.comparisons import Comparisons
from gateway.api.files import clean_name
from gateway.api.wire import AnswerBody, responses
from gateway.comparisons.jobs import Jobs
from gateway.comparisons.uploads import Stored, Table, store_data_set
from gateway.errors import BadInput, BodyTooLarge, Forbidden, NotFound
from gateway.http.multipart import Multipart, PartStart

FILES: Final = ("documents", "queries", "judgments")
_FILE: Final[JsonDict] = {"format": "binary"}


class DataSetForm(BaseModel):
    """The form of an upload."""

    name: str = Field(description="Name of the data set, and of its folder.")
    documents: str = Field(
        description="CSV or TSV whose first line names the columns: `text`, and perhaps `id` and `title`; JSON lines; or "
        "`.txt` with a text in each line.",
        json_schema_extra=_FILE,
    )
    queries: str | None = Field(
        None, description="A file in the same formats, with `group` instead of `title`.", json_schema_extra=_FILE
    )
    judgments: str | None = Field(
        None, description="CSV or TSV with the columns `query-id`, `corpus-id` and `score`.", json_schema_extra=_FILE
    )


class DataSetCard(AnswerBody):
    """A data set that was stored."""

    object: Literal["data_set"] = "data_set"
    name: str
    documents: int
    queries: int
    judgments: int


class DataSetDeleted(AnswerBody):
    """The data set was deleted."""

    object: Literal["data_set"] = "data_set"
    name: str
    deleted: Literal[True] = True


@dataclass(frozen=True, slots=True)
class DataForm:
    """A form as it was sent: its name, and its files by field."""

    name: str
    tables: Mapping[str, Table]

    async def store(self, folder: Path) -> Stored:
        """Write the data set.

        Raises:
            BadInput: a file is missing or wrong, or the data set cannot be written.
        """
        return await asyncio.to_thread(store_data_set, folder, self.name, self.tables)


async def read_data_form(request: Request) -> DataForm:
    """Read the form of an upload. A file field that the reader left empty counts as absent.

    Raises:
        BadInput: the body is not such a form.
        BodyTooLarge: the body is larger than a request may be.
    """
    form = Multipart(request.headers.get("content-type", ""))
    contents: dict[str, bytearray] = {}
    filenames: dict[str, str] = {}
    current = bytearray()
    async for data in request.stream():
        for event in form.feed(data):
            if isinstance(event, PartStart):
                if event.name in contents:
                    raise BadInput(f"the form has more than one `{event.name[:50]}`", param=event.name[:50])
                current = contents[event.name] = bytearray()
                filenames[event.name] = event.filename or ""
            else:
                current += event
    form.finish()
    tables = {
        field: Table(field, clean_name(filenames[field]), bytes(contents.pop(field)))
        for field in FILES
        if filenames.get(field) or contents.get(field)
    }
    return DataForm(contents.get("name", bytearray()).decode("utf-8", "replace").strip(), tables)


class DataSets:
    """The handlers."""

    def __init__(self, comparisons: Comparisons) -> None:
        self._comparisons = comparisons

    async def create_data_set(self, request: Request) -> DataSetCard:
        """Store documents, queries and judgments as a data set for comparisons."""
        jobs = self._require(request)
        stored = await (await read_data_form(request)).store(jobs.data_folder)
        return DataSetCard(
            name=stored.name,
            documents=stored.num_documents,
            queries=stored.num_queries,
            judgments=stored.num_judgments,
        )

    async def delete_data_set(self, request: Request, name: str) -> DataSetDeleted:
        """Delete a data set. Results of comparisons on it are kept."""
        await self._require(request).remove_data_set(name)
        return DataSetDeleted(name=name)

    def _require(self, request: Request) -> Jobs:
        _runs, jobs = self._comparisons.require(request)
        return jobs


def data_sets_router(comparisons: Comparisons) -> APIRouter:
    """Return the routes of the operator."""
    router = APIRouter(tags=["Admin"])
    handlers = DataSets(comparisons)
    content = {"multipart/form-data": {"schema": DataSetForm.model_json_schema()}}
    form: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    router.add_api_route(
        "/admin/data-sets",
        handlers.create_data_set,
        methods=["POST"],
        responses=responses(DataSetCard, BadInput, Forbidden, NotFound, BodyTooLarge),
        openapi_extra=form,
    )
    router.add_api_route(
        "/admin/data-sets/{name}",
        handlers.delete_data_set,
        methods=["DELETE"],
        responses=responses(DataSetDeleted, BadInput, Forbidden, NotFound),
    )
    return router
