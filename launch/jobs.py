"""The job server of a Ray cluster: reaching it, what the cluster has, and the jobs on it. Nothing here trains.

With RAY_AUTH_MODE=token, set before this module is imported, Ray finds the token by itself (RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token) and sends it as a header; it is never read or shown here.
"""

import asyncio
import contextlib
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ray.dashboard.modules.job.sdk import aiohttp
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from ..harness.errors import BurnishError, ConfigError, TrainingError

ANSWER_TIMEOUT_S = 5
POLL_S = 0.5
MAX_NODES = 10_000
FOLLOW_TRIES = 5
NOWHERE = "http://nowhere.invalid"
"""Stands for an address until Ray puts RAY_API_SERVER_ADDRESS or RAY_ADDRESS in its place."""
STOP_WAIT_S = 90
"""Between SIGTERM and SIGKILL of a job that is stopped: time for a step and a checkpoint."""
LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.authentication.http_token_authentication",
    "ray._private.runtime_env.packaging",
)
"""They tell of uploads and tokens in the middle of the output."""
ENDED = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 5, JobStatus.STOPPED: 130}
"""Final states, and the exit code of who waits for a job whose own is not known."""
SETUP = "docs/clusters.md says how to set one up"


@dataclass(frozen=True)
class Node:
    """A node that is alive, and what it has in all (CPU, GPU, memory in bytes …)."""

    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Job:
    """One submitted job. Times are seconds since 1970; what it was started with in `metadata`, and no environment."""

    id: str
    status: str
    message: str
    start: float | None
    end: float | None
    exit_code: int | None
    node: str | None
    entrypoint: str
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def final_code(self) -> int:
        """The exit code of a command that waited for this job: its own if it has one."""
        if self.status == JobStatus.FAILED and self.exit_code is not None and 0 < self.exit_code < 256:
            return self.exit_code
        return ENDED.get(JobStatus(self.status), 5)


def connect(address: str | None) -> "Server":
    """The job server at a URL, or at RAY_API_SERVER_ADDRESS or RAY_ADDRESS where none is given.

    Raises ConfigError if there is none, if it refuses the token, and if it asks for none: then anyone who can reach it
    can run code there.
    """
    # The variables would win over an address that is given.
    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address = _checked(address)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        url = get_address_for_submission_client(NOWHERE).rstrip("/")
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS ({_line(error)}); give --address http://HOST:8265"
        ) from None
    if url == NOWHERE:
        raise ConfigError(f"no cluster given; use --address http://HOST:8265 or set RAY_API_SERVER_ADDRESS ({SETUP})")
    url = _checked(url)
    _refuse_open(url)
    with explained(url):
        return Server(url, JobSubmissionClient(url))


@dataclass(frozen=True)
class Server:
    """A job server that answers and takes our token."""

    url: str
    client: JobSubmissionClient

    def nodes(self) -> list[Node]:
        """The nodes that are alive and can run something, in the order of their addresses."""
        with explained(self.url):
            found = list_nodes(self.url, filters=[("state", "=", "ALIVE")], limit=MAX_NODES, timeout=ANSWER_TIMEOUT_S)
        nodes = [Node(node["node_ip"], dict(node["resources_total"])) for node in found]
        return sorted(nodes, key=lambda node: node.address)

    def jobs(self) -> list[Job]:
        """Every submitted job that the cluster remembers, oldest first."""
        with explained(self.url):
            found = [_job(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.start or 0.0)

    def job(self, name: str) -> Job:
        """Raises ConfigError if there is no such job."""
        with explained(self.url, job=name, known=self._names):
            return _job(self.client.get_job_info(name))

    def submit(self, name: str, entrypoint: str, *, folder: str, modules: list[str], metadata: dict[str, str]) -> str:
        """Uploads the folder and the packages, and queues the command; returns the job's id.

        The driver reserves no CPU: it waits while workers work, and the head often has none to give.
        """
        environment: dict[str, Any] = {
            "working_dir": folder,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        }
        if modules:
            environment["py_modules"] = modules
        with explained(self.url):
            return self.client.submit_job(
                entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=metadata
            )

    def logs(self, name: str) -> str:
        with explained(self.url, job=name, known=self._names):
            return self.client.get_job_logs(name)

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Hands on what the job prints until it ends; a connection that breaks is made again where it broke."""
        job, seen, tries = self.job(name), 0, 0

        def fresh(text: str, *, start: int) -> None:
            nonlocal seen
            if start + len(text) > seen:
                write(text[max(0, seen - start) :])
                seen = start + len(text)

        while True:
            before = seen
            try:
                asyncio.run(self._tail(name, fresh))
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                if tries == FOLLOW_TRIES:
                    raise TrainingError(
                        f"the logs of {name} cannot be followed ({_line(error)}); the job goes on: see its status"
                    ) from None
            job = self.job(name)
            if job.has_ended:
                return job
            tries = tries + 1 if seen == before else 0
            time.sleep(POLL_S)

    async def _tail(self, name: str, take: Callable[..., None]) -> None:
        """Hands on the log from its beginning, each piece with the number of characters before it."""
        start = 0
        async for text in self.client.tail_job_logs(name):
            take(text, start=start)
            start += len(text)

    def wait(self, name: str, *, timeout_s: float) -> Job:
        """The job once it has ended, or as it is after so long."""
        deadline = time.monotonic() + timeout_s
        while not (job := self.job(name)).has_ended and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return job

    def stop(self, name: str) -> Job:
        """Asks the job to end and waits until it has. Raises TrainingError if it does not."""
        with explained(self.url, job=name, known=self._names):
            self.client.stop_job(name)
        job = self.wait(name, timeout_s=STOP_WAIT_S + 3 * ANSWER_TIMEOUT_S)
        if not job.has_ended:
            raise TrainingError(f"{name} was asked to stop and is still {job.status}; look at its node, {job.node}")
        return job

    def _names(self) -> list[str]:
        return [job.id for job in self.jobs()]


@contextlib.contextmanager
def explained(url: str, *, job: str = "", known: Callable[[], list[str]] = list) -> Iterator[None]:
    """Turns what Ray's clients raise into one sentence."""
    try:
        yield
    except BurnishError:
        raise
    except AuthenticationError as error:
        is_refused = "Authentication failed" in str(error)
        raise ConfigError(_unauthorised(url, is_refused=is_refused)) from None
    except (RayStateApiException, RayError, RuntimeError, ValueError, OSError, aiohttp.ClientError) as error:
        text = _line(error)
        if "status code 404" in text and job:
            names = known()
            close = get_close_matches(job, names, n=1)
            hint = f"did you mean {close[0]}?" if close else "burnish jobs lists those there are"
            raise ConfigError(f"{url} has no job {job}; {hint}") from None
        if "No available agent" in text:
            raise TrainingError(
                f"{url} has no agent to start jobs with: another Ray on its host has the agent's port; start the nodes "
                "with --dashboard-agent-listen-port=0"
            ) from None
        raise TrainingError(f"{url} did not do what was asked ({text})") from None


def free_name(name: str, jobs: list[Job]) -> str:
    """NAME, else the first of NAME-2, NAME-3, … that no job has had. Raises ConfigError if one of them still runs."""
    numbered = re.compile(rf"{re.escape(name)}(-\d+)?")
    mine = [job for job in jobs if numbered.fullmatch(job.id)]
    for job in mine:
        if not job.has_ended:
            raise ConfigError(
                f"job {job.id} is {job.status.lower()} already; stop it (burnish stop {job.id}), wait for it, or "
                "start another run with name=…"
            )
    taken = {job.id for job in mine}
    candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        status=str(details.status.value if isinstance(details.status, JobStatus) else details.status),
        message=(details.message or "").strip(),
        start=details.start_time / 1000 if details.start_time else None,
        end=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        node=details.driver_info.node_ip_address if details.driver_info else None,
        entrypoint=details.entrypoint,
        metadata=dict(details.metadata or {}),
    )


def _checked(url: str) -> str:
    """Raises ConfigError for what is no plain http(s) URL; a password in one would end up in logs."""
    if "@" in url:
        raise ConfigError("--address: no user or password belongs into the URL; the token is found by itself")
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
        raise ConfigError(f"--address={url[:200]}: give the URL of the cluster's dashboard, such as http://HOST:8265")
    return url.rstrip("/")


def _refuse_open(url: str) -> None:
    """Asks without a token: a server that answers then takes commands from everyone who can reach it."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_TIMEOUT_S) as answer:
            is_ray = b"ray_version" in answer.read(10_000)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise ConfigError(f"{url} is not the dashboard of a Ray cluster (HTTP {error.code}); {SETUP}") from None
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return
        raise ConfigError(
            f"no Ray cluster answers at {url} ({_line(reason)}); check the address, and that the head was started with "
            "--dashboard-host of an address that this machine reaches"
        ) from None
    if not is_ray:
        raise ConfigError(f"{url} is not the dashboard of a Ray cluster; {SETUP}")
    raise ConfigError(
        f"{url} asks for no token, so anyone who reaches it can run code there; start every node with "
        f"RAY_AUTH_MODE=token ({SETUP})"
    )


def _unauthorised(url: str, *, is_refused: bool) -> str:
    if is_refused:
        return f"{url} refuses the token (403); RAY_AUTH_TOKEN_PATH must name a file with the token of this cluster"
    return (
        f"{url} asks for a token (401) and there is none here; put the cluster's token into a file of mode 0600 and "
        "set RAY_AUTH_TOKEN_PATH to it"
    )


def _line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
