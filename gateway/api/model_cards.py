"""The cards of ``/v1/models``: one for each name that a client may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from gateway.api.openai_schema import ArmModelCard, ExperimentModelCard, ModelCard, ReplicaCard
from gateway.backends.base import Backend, Replicated
from gateway.config.fields import KNOWN_BY
from gateway.config.registry import Arm, Registry
from gateway.fleet import Model
from gateway.routing.names import Client
from gateway.routing.router import Choice, Router
from gateway.types import ModelInfo, ModelKind, ModelState

T = TypeVar("T")
ArmOf: TypeAlias = tuple[Arm, Model, str | None]
KnownArm: TypeAlias = tuple[Arm, ModelInfo, str | None]


def list_cards(router: Router, registry: Registry, client: Client) -> list[ModelCard]:
    """Return the cards of all names that a client may use: first the ready ones, each group in the registry's order."""
    cards = [_card(choice, None, router, registry, client) for choice in router.listed(client)]
    return sorted(cards, key=lambda card: card.state != ModelState.READY.value)


def find_card(name: str, router: Router, registry: Registry, client: Client) -> ModelCard:
    """Return the card of a name. A task in the name becomes the card's default task.

    Raises:
        ModelNotFound: no model, alias or experiment has that name.
        ModelNotAllowed: the client may not use it.
        BadInput: the name contains a task that the model does not have.
    """
    choice = router.choose(name, client)
    return _card(choice, router.task_of(choice), router, registry, client)


def _card(choice: Choice, task: str | None, router: Router, registry: Registry, client: Client) -> ModelCard:
    if choice.experiment is not None:
        return _experiment_card(choice, router.arms(choice))
    model = choice.model
    if router.names.allows(client, model.id):
        return model_card(model, registry, task)
    return _alias_card(choice, model_card(model, registry, router.task_of(choice)))


def model_card(model: Model, registry: Registry, task: str | None = None) -> ModelCard:
    """Return the card of a model.

    Args:
        task: the task in the requested name, if it is not the model's default.
    """
    info = model.info
    known_by = [name for name in registry.source_names_of(model.id) if name in KNOWN_BY]
    card = ModelCard(
        id=model.id,
        created=model.created,
        owned_by=model.entry.backend,
        source=model.entry.source,
        revision=model.entry.revision,
        license=model.entry.license,
        state=model.state.value,
        reason=model.reason or None,
        aliases=[*registry.aliases_of(model.id), *known_by],
        replicas=_replica_cards(model.backend),
    )
    if info is None:
        return card

    shown = {
        "kind": info.kind.value,
        "max_tokens": info.max_tokens,
        "max_model_len": info.max_tokens,
        "device": info.device,
        "dtype": info.dtype,
        "notes": list(info.notes),
    }
    if info.kind is not ModelKind.EMBED:  # without vectors and a space
        labels = {"labels": list(info.labels), "label_function": info.label_function.value} if info.labels else {}
        return card.model_copy(update={**shown, **labels})
    default_task = task or info.default_task
    return card.model_copy(
        update={
            **shown,
            "width": info.width or None,
            "dimensions": list(info.dimensions),
            "tasks": list(info.tasks),
            "default_task": default_task,
            "normalized": info.is_normalized,
            "outputs": [output.value for output in info.outputs],
            "rerank": {output.value: weight for output, weight in info.rerank.items()},
            "space": info.space(default_task),
            "spaces": {task: info.space(task) for task in info.tasks},
            "cache": model.cache is not None,
        }
    )


def _replica_cards(backend: Backend) -> list[ReplicaCard]:
    if not isinstance(backend, Replicated):
        return []
    return [
        ReplicaCard(
            name=replica.name,
            state=replica.state.value,
            reason=replica.reason or None,
            node=replica.node,
            device=replica.device,
        )
        for replica in backend.replicas()
    ]


def _alias_card(choice: Choice, card: ModelCard) -> ModelCard:
    """Reduce the card of a model to one of its aliases, for a client that may use only that name."""
    update: dict[str, object] = {"id": choice.asked, "aliases": []}
    if choice.task is not None and card.default_task is not None:
        task = card.default_task
        update |= {"tasks": [task], "spaces": {task: card.spaces[task]}}
    return card.model_copy(update=update)


def _experiment_card(choice: Choice, arms: Sequence[ArmOf]) -> ExperimentModelCard:
    """Return the card of an experiment. Properties that differ between its arms are left out: they depend on the arm."""
    assert choice.experiment is not None  # noqa: S101  the caller has checked
    infos = [(arm, model.info, task) for arm, model, task in arms if model.info is not None]
    vectors = [(arm, info, task) for arm, info, task in infos if info.kind is ModelKind.EMBED]

    def common(value: Callable[[Arm, ModelInfo, str | None], T], of: Sequence[KnownArm] = vectors) -> T | None:
        values = [value(*known) for known in of]
        return values[0] if len(values) == len(arms) and all(other == values[0] for other in values) else None

    tasks = common(lambda arm, info, task: (task,) if arm.task else tuple(info.tasks)) or ()
    is_one_space = choice.experiment.kind == "same_space"
    max_tokens = common(lambda _arm, info, _task: info.max_tokens, infos)
    state, reason = _state(arms)
    return ExperimentModelCard(
        id=choice.asked,
        experiment=choice.experiment.kind,
        arms=[_arm_card(*arm) for arm in arms],
        created=max((model.created for _arm, model, _task in arms), default=0) if state is ModelState.READY else 0,
        owned_by="gateway",
        state=state.value,
        reason=reason,
        normalized=common(lambda _arm, info, _task: info.is_normalized),
        width=common(lambda _arm, info, _task: info.width or None),
        dimensions=list(common(lambda _arm, info, _task: info.dimensions) or ()),
        max_tokens=max_tokens,
        max_model_len=max_tokens,
        tasks=[task for task in tasks if task is not None],
        default_task=common(lambda _arm, _info, task: task),
        outputs=[output.value for output in common(lambda _arm, info, _task: info.outputs) or ()],
        space=vectors[0][1].space(vectors[0][2]) if is_one_space and vectors else None,
        spaces={task: vectors[0][1].space(task) for task in tasks if task is not None} if is_one_space else {},
        device=common(lambda _arm, info, _task: info.device, infos),
        dtype=common(lambda _arm, info, _task: info.dtype, infos),
    )


def _arm_card(arm: Arm, model: Model, task: str | None) -> ArmModelCard:
    info = model.info
    has_vectors = info is not None and info.kind is ModelKind.EMBED
    return ArmModelCard(
        arm=arm.label,
        model=arm.model,
        task=task,
        weight=arm.weight,
        state=model.state.value,
        width=(info.width or None) if info and has_vectors else None,
        max_tokens=info.max_tokens if info else None,
        space=info.space(task) if info and has_vectors else None,
    )


def _state(arms: Sequence[ArmOf]) -> tuple[ModelState, str | None]:
    """Return the state of an experiment: that of its first arm that is not ready, with the reason."""
    for number, (arm, model, _task) in enumerate(arms):
        if model.state is not ModelState.READY and (arm.weight or number == 0):
            return model.state, f"arm {arm.label!r} is {model.state.value}: {model.reason or 'its model is loading'}"
    return ModelState.READY, None
