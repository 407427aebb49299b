"""The overview page: the state of the models, the troubles, the aliases, and the last errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from gateway.api.admin import verify
from gateway.api.cards import CardOfMachine, find_cards
from gateway.api.live import ErrorCard, LiveCard, LiveModel, error_list, live, shadow_cards
from gateway.api.model_cards import list_cards
from gateway.api.openai_schema import ModelCard
from gateway.config.wording import count
from gateway.console.charts import sparkline
from gateway.console.parts import Parts
from gateway.console.troubles import find_troubles
from gateway.console.web import visitor_of
from gateway.console.words import size
from gateway.errors import ModelNotFound, RequestError
from gateway.experiments.report import ExperimentReport
from gateway.routing.names import Client
from gateway.types import ModelState

_SHOWN_ERRORS = 12
_ANSWERS = (ModelState.READY.value, ModelState.UNLOADED.value)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model in the table.

    Attributes:
        trend: the points of a polyline with the requests in each minute of the window.
        is_on_demand: whether the model can be loaded and unloaded.
    """

    card: ModelCard
    live: LiveModel
    trend: str
    last_error: ErrorCard | None
    is_on_demand: bool


class Overview:
    """The handlers of the page and of its buttons."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def show(self, request: Request) -> Response:
        """Show the page."""
        deployment, visitor = self._parts.deployment, visitor_of(request)
        reports = self._reports(visitor.client)
        now = live(deployment, visitor.client)
        errors = self._errors(request)
        shadows = shadow_cards(deployment, visitor.client)
        rows = self._rows(now.data, visitor.client, errors)
        others = await _other_processes(now.cards) if visitor.is_operator and now.cards else {}
        return self._parts.pages.render(
            request,
            "overview.html.j2",
            headline=_headline(now.data),
            rows=rows,
            cards=now.cards,
            others=others,
            requests_per_s=sum(model.requests_per_s for model in now.data),
            num_requests=sum(model.requests for model in now.data),
            num_failed=sum(model.errors for model in now.data),
            has_started=deployment.fleet.started.is_set(),
            is_draining=deployment.is_draining,
            registry_path=deployment.registry.path.name,
            troubles=find_troubles(now.data, now.cards, reports, shadows, errors, others),
            aliases=self._aliases(visitor.client),
            reports=reports,
            shadows=shadows,
            errors=errors[:_SHOWN_ERRORS],
            num_errors=len(errors),
            done=self._parts.pages.gate.take_message(request),
        )

    async def reload(self, request: Request) -> Response:
        """Read the registry again."""
        reloaded = await self._parts.deployment.reload()
        changes = [
            f"{what}: {', '.join(names)}"
            for what, names in (("loaded", reloaded.loaded), ("removed", reloaded.removed))
            if names
        ]
        changes += [f"{name}: {change}" for name, change in {**reloaded.aliases, **reloaded.experiments}.items()]
        return self._parts.done(request, "", f"models.yaml was read. {'; '.join(changes) or 'Nothing has changed'}.")

    async def load(self, request: Request) -> Response:
        """Load a model that is loaded on demand."""
        return await self._change(request, is_loading=True)

    async def unload(self, request: Request) -> Response:
        """Unload a model that is loaded on demand."""
        return await self._change(request, is_loading=False)

    async def verify(self, request: Request) -> Response:
        """Compare a model with its golden vectors."""
        found = await verify(self._parts.deployment, request.path_params["model"])
        text = f"{found.id}: the lowest cosine to a golden vector is {found.cosine:.5f}; the limit is {found.limit:g}"
        return self._parts.done(
            request, "", f"{text}: {'the vectors are right' if found.ok else 'the vectors are wrong'}."
        )

    async def _change(self, request: Request, *, is_loading: bool) -> Response:
        model = self._parts.deployment.fleet.get(request.path_params["model"])
        backend = None if model is None else model.on_demand
        if model is None or backend is None or not backend.is_started:
            raise ModelNotFound("no model of this name is loaded on demand now; see the overview")
        with model.in_use():
            await (backend.load() if is_loading else backend.unload())
        return self._parts.done(request, "", f"{model.id} is {model.state.value}.")

    # ------------------------------------------------------------------------------------------------------ contents

    def _reports(self, client: Client) -> list[ExperimentReport]:
        """Return the reports of the experiments that a client may use."""
        deployment = self._parts.deployment
        names = deployment.router.names
        return [
            self._parts.report(experiment)
            for experiment in deployment.registry.experiments
            if names.allows(client, experiment.id)
        ]

    def _errors(self, request: Request) -> list[ErrorCard]:
        visitor = visitor_of(request)
        sees_all = visitor.is_operator or not self._parts.pages.gate.api_needs_key  # as GET /v1/errors
        errors = self._parts.deployment.errors
        return error_list(error for error in errors if sees_all or error.facts.client == visitor.client.name).data

    def _rows(self, models: Sequence[LiveModel], client: Client, errors: Sequence[ErrorCard]) -> list[ModelRow]:
        deployment = self._parts.deployment
        cards = {card.id: card for card in list_cards(deployment.router, deployment.registry, client)}
        rows = []
        for model in models:
            card, entry = cards[model.id], deployment.fleet.get(model.id)
            names = {model.id, *card.aliases}
            rows.append(
                ModelRow(
                    card,
                    model,
                    sparkline(model.requests_by_minute),
                    next((error for error in errors if error.model in names), None),
                    entry is not None and entry.on_demand is not None,
                )
            )
        return rows

    def _aliases(self, client: Client) -> list[tuple[str, str]]:
        """Return all aliases that a client may use, with their models and tasks."""
        deployment = self._parts.deployment
        found = []
        for alias in deployment.registry.aliases.values():
            try:
                choice = deployment.router.choose(alias.name, client)
            except RequestError:
                continue
            found.append((alias.name, choice.model.id + (f":{choice.task}" if choice.task else "")))
        return found


async def _other_processes(cards: Sequence[LiveCard]) -> dict[str, str]:
    """Return the other processes on each card that has any, by device."""
    found = await asyncio.to_thread(find_cards, {card.device: card for card in cards})
    return {card.device: _name_processes(card) for card in found.data if card.device is not None and card.others}


def _name_processes(card: CardOfMachine) -> str:
    return ", ".join(
        f"{other.name} (pid {other.pid})" + ("" if other.memory_bytes is None else f" {size(other.memory_bytes)}")
        for other in card.others
    )


def _headline(models: Sequence[LiveModel]) -> str:
    wanted = [model for model in models if model.state != ModelState.DISABLED.value]
    answering = [model for model in wanted if model.state in _ANSWERS]
    if not wanted:
        return "No model is switched on"
    if len(answering) == len(wanted):
        return "The model answers" if len(wanted) == 1 else f"All {len(wanted)} models answer"
    if not answering:
        return "No model answers"
    return f"{len(answering)} of {count(len(wanted), 'model')} {'answers' if len(answering) == 1 else 'answer'}"
