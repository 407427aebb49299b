"""The Ray cluster of this process: connect to it, deploy models once for all fronts, remove unused deployments."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import ray
import ray.exceptions
import structlog
from ray import serve
from ray._private.services import canonicalize_bootstrap_address
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get
from ray.serve.api import RunTarget
from ray.serve.config import AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from gateway.cluster import head
from gateway.cluster.claims import NAMESPACE, Claims
from gateway.cluster.placing import LOCAL, PREFIX, Spec, actor_options, scaling_options
from gateway.cluster.replica import DRAIN_S, Replica, begun_key, fingerprint_key
from gateway.errors import StartError

log = structlog.get_logger(__name__)

NOT_STARTED: Final = "NOT_STARTED"
_DELETING: Final = "DELETING"
_DEPLOYMENT: Final = "model"
# A process connects to Ray once, and deploying a model is not thread-safe.
_TURN: Final = threading.Lock()
# Serve checks the health of a replica this often, and replaces a replica that does not answer in time.
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 30.0
_NUM_ATTEMPTS: Final = 2
_NUM_SERVE_ATTEMPTS, _SERVE_PAUSE_S = 40, 0.25
_LOCAL_STORE_BYTES: Final = 80 * 2**20
# Serve's message about replicas without a place; for those that load slowly it ends in "to initialize".
_WITHOUT_ROOM: Final = "to be scheduled"
_REASON = re.compile(r"LoadError: (.*)")
_LONGEST_REASON: Final = 500
# The name of a deployment, see `Spec.name`. Other programs may have applications on the cluster too.
_OURS = re.compile(rf"{PREFIX}.+-[0-9a-f]{{12}}")


@dataclass(frozen=True, slots=True)
class Deployed:
    """Serve's view of a model's deployment.

    Attributes:
        status: Serve's status, such as ``RUNNING``.
        reason: the reason why the deployment is not running; may be empty.
        num_running: the number of running replicas.
        num_starting: the number of replicas that are starting, waiting for resources, or that a new controller has found.
        is_without_room: Serve waits for room for one of them; it says so after half a minute.
    """

    name: str
    status: str
    reason: str
    num_running: int = 0
    num_starting: int = 0
    is_without_room: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether it does not exist, or is being deleted."""
        return self.status in (NOT_STARTED, _DELETING)

    @property
    def has_failed(self) -> bool:
        """Whether Serve has given up on it. Serve calls it the same while it replaces replicas that have all died."""
        return self.status in ("DEPLOY_FAILED", "UNHEALTHY") and not self.num_running and not self.num_starting


@cache
def _plugins() -> tuple[RequestRouterConfig, AutoscalingPolicy]:
    """Return the router and the scaling policy of all deployments.

    Ray pickles their modules by value when it makes these objects: it registers a module, and unregisters it afterward. If
    two threads do that at the same time, one fails, so it is done once in a process.
    """
    router: Any = "gateway.cluster.announcer:Announcer"  # Ray declares all arguments as dictionaries
    policy: Any = "gateway.cluster.scaling:wanted_replicas"
    return RequestRouterConfig(request_router_class=router), AutoscalingPolicy(policy_function=policy)  # type: ignore[no-untyped-call]


class Cluster:
    """The Ray cluster that this process uses. All methods block, so call them in a thread.

    Args:
        address: ``local``, ``auto`` or the ``HOST:PORT`` of the head.

    Attributes:
        claims: the gateways that use each deployment.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.has_cards = False
        self.claims = Claims()

    def connect(self, *, starts_serve: bool = True) -> None:
        """Connect to the cluster or start one on this machine, and start Ray Serve unless it runs.

        Args:
            starts_serve: whether to start Ray Serve.

        Raises:
            StartError: there is no cluster at the address, or it cannot be used.
        """
        with _TURN:
            self._connect()
            if starts_serve:
                _start_serve()
        self.has_cards = ray.cluster_resources().get("GPU", 0) > 0  # type: ignore[no-untyped-call]

    def _connect(self) -> None:
        if not ray.is_initialized():
            try:
                options = self._local_options() if self._address == LOCAL else {"address": _reached(self._address)}
                ray.init(namespace="serve", log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
                raise StartError(_unreachable(self._address, error)) from error
        logging.getLogger("ray").setLevel(logging.WARNING)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    @staticmethod
    def _local_options() -> dict[str, Any]:
        """Return the arguments to start a local cluster; :func:`gateway.cluster.environment.prepare` sets its token."""
        return {
            "address": LOCAL,
            "include_dashboard": False,
            "object_store_memory": _LOCAL_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }

    @property
    def head(self) -> str:
        """The ``HOST:PORT`` of the connected cluster's head."""
        return str(ray.get_runtime_context().gcs_address)

    def deploy(self, spec: Spec) -> None:
        """Deploy a model unless it is already deployed: fronts that start together deploy the same model once.

        A deployment that Serve has given up is deployed again. Serve gives up if two replicas fail to start before one has
        started, or if all replicas die while its controller restarts: the new controller does not know that they worked.

        Raises:
            TimeoutError: Serve does not remove the deployment that it has given up.
        """
        with _TURN:
            _start_serve()  # an operator may have shut it down
            if (found := self.look(spec.name)).has_failed:
                log.warning("deployed_again", model=spec.entry.id, deployment=spec.name, reason=found.reason)
                serve.delete(spec.name)  # without that, Serve would ignore the same version
            self._deploy(spec)

    @staticmethod
    def _deploy(spec: Spec) -> None:
        router, policy = _plugins()
        deployment = serve.deployment(
            name=_DEPLOYMENT,
            ray_actor_options=actor_options(spec),
            max_ongoing_requests=4096,
            health_check_period_s=_HEALTH_PERIOD_S,
            health_check_timeout_s=_HEALTH_TIMEOUT_S,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=DRAIN_S + 10,
            max_constructor_retry_count=_NUM_ATTEMPTS,
            request_router_config=router,
            **scaling_options(spec, policy),
        )(Replica)
        # The name already identifies the content. With a random version, Serve's default, a second front would restart
        # all replicas.
        deployment._version = spec.name
        target = RunTarget(target=deployment.bind(spec), name=spec.name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def watch(self, name: str) -> object:
        """Have Serve announce the replicas of a deployment to this process; see :mod:`gateway.cluster.discovery`.

        Returns Serve's handle. The announcements end when nothing holds it: Serve itself drops all of its handles when the
        controller has not answered for five seconds, and some of them if there are more than a hundred.
        """
        return serve.get_deployment_handle(_DEPLOYMENT, name, _check_exists=False).options(stream=False)

    def deployed(self) -> Mapping[str, Deployed]:
        """Return all deployments of gateways by name."""
        found = {}
        try:
            applications = serve.status().applications
        except (RayServeException, ray.exceptions.ActorDiedError):  # Serve does not run, or has been shut down
            return {}
        for name, app in applications.items():
            if not _OURS.fullmatch(name):
                continue
            deployment = app.deployments.get(_DEPLOYMENT)
            states = {} if deployment is None else {str(state): num for state, num in deployment.replica_states.items()}
            num_running = states.get("RUNNING", 0)
            message = "" if deployment is None else deployment.message
            reason = _reason(app.message or "", message)
            num_starting = states.get("STARTING", 0) + states.get("RECOVERING", 0)
            found[name] = Deployed(
                name,
                str(app.status.value),
                reason,
                num_running,
                num_starting,
                bool(num_starting) and _WITHOUT_ROOM in message,
            )
        return found

    def look(self, name: str) -> Deployed:
        """Return the deployment with a name; its status is ``NOT_STARTED`` if Serve does not know it."""
        return self.deployed().get(name) or Deployed(name, NOT_STARTED, "")

    def delete_unused(self, name: str) -> bool:
        """Delete a deployment unless a gateway uses it; return whether it was deleted.

        Its replicas finish the work in progress.
        """
        with self.claims.deleting(name) as is_unused:
            if is_unused:
                serve.delete(name, _blocking=False)
                for key in (fingerprint_key(name), begun_key(name)):
                    _internal_kv_del(key, namespace=NAMESPACE)
            return is_unused

    def has_begun(self, name: str) -> bool:
        """Return whether any replica of a deployment was ever placed on a machine."""
        return _internal_kv_get(begun_key(name), namespace=NAMESPACE) is not None

    def disconnect(self) -> None:
        """Disconnect from the cluster, which ends a local one."""
        if ray.is_initialized():
            ray.shutdown()


def _start_serve() -> None:
    """Start Ray Serve unless it runs. If another front is just starting it, wait a moment for that.

    Raises:
        StartError: Ray Serve does not start.
    """
    problem: Exception | None = None
    for _attempt in range(_NUM_SERVE_ATTEMPTS):
        try:
            serve.start(proxy_location="Disabled")
            return
        except (ray.exceptions.RayError, RayServeException, ValueError) as error:
            problem = error
            time.sleep(_SERVE_PAUSE_S)
    raise StartError(f"Ray Serve does not start: {_first_line(problem or RuntimeError())}") from problem


def _reason(*messages: str) -> str:
    """Extract a replica's own error from Serve's messages and tracebacks; otherwise return their last line."""
    reasons = [text for message in messages for text in _REASON.findall(message)]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return str((reasons or lines or [""])[-1]).strip()[:_LONGEST_REASON]


def _checked(address: str) -> str:
    """Return the address; for ``auto``, the environment's address that Ray itself would use, if it is a cluster's.

    Raises:
        StartError: ``RAY_ADDRESS`` is another kind of address.
    """
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else None
    if named and ("://" in named or named == LOCAL):
        raise StartError(
            f"GATEWAY_CLUSTER=auto uses the cluster in RAY_ADDRESS, which is {named}: set RAY_ADDRESS to the HOST:PORT of "
            "the head (6379, not Ray Client's port), or unset it on a machine of the cluster"
        )
    return named or address


def _reached(address: str) -> str:
    """Return the address once the cluster's head has answered there.

    Raises:
        ConnectionError: it does not answer.
        StartError: ``RAY_ADDRESS`` is another kind of address.
    """
    checked = _checked(address)
    if (found := canonicalize_bootstrap_address(checked)) is not None:
        head.require(found)
    return checked


def _unreachable(address: str, error: Exception) -> str:
    if address == LOCAL:
        return f"a Ray cluster cannot be started on this machine: {_first_line(error)}"
    # The head has answered a moment before. On a machine that has not joined the cluster, only the cause is another.
    is_outside = "resolve node to connect to" in str(error.__cause__)
    is_refused = str(error).startswith("Failed to connect to Ray cluster") and not is_outside
    if is_refused or isinstance(error, ray.exceptions.AuthenticationError):
        return (
            f"GATEWAY_CLUSTER={address}: {str(error).partition('. ')[0]}. Set RAY_AUTH_MODE and the token as on the head of "
            "the cluster: RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file"
        )
    if str(error).startswith("Version mismatch"):
        mismatch = " ".join(str(error).split())[:_LONGEST_REASON]
        return f"GATEWAY_CLUSTER={address}: {mismatch}. All machines must have the same versions of Ray and Python"
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    where = f"no Ray cluster was found at {named}" if named else "this machine does not belong to a Ray cluster"
    return (
        f"GATEWAY_CLUSTER={address}: {where}, or it cannot be reached ({_first_line(error)}). Start Ray here: `ray "
        "start --head` on the first machine, `ray start --address=HOST:6379` on the others"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
