"""Everything an operator can set, from environment variables with the prefix ANYTIME_.

Each description says what a larger or smaller value does. Knows nothing of the rest of the service.
"""

import os
import re
import sys
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, NoDecode, SettingsConfigDict

from service.policies import PolicyName
from service.scheduling import ANSWER_WORTH, HOPE, REFINE_BELOW

PREFIX = "ANYTIME_"
SECRET = frozenset({"api_keys", "admin_keys", "tls_key_password"})
"""Settings whose values are never shown, not even refused ones: they may be keys given for their hashes."""

KEY_HASH = re.compile(r"sha256:[0-9a-f]{64}")
COLLECTOR = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.-]+(:[0-9]+)?|https?://\[[0-9A-Fa-f:.]+\](:[0-9]+)?")


class SettingsError(Exception):
    """A setting is refused; the message is one sentence that names it and says what to do."""


def embedded_artifact() -> Path:
    """The artifact that ships beside this package, found by its place so that `model` is never imported."""
    return Path(__file__).resolve().parent.parent / "model" / "pretrained"


def platform_cache() -> Path:
    """Where this platform keeps files that may be deleted at any time."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "anytime"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "anytime"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anytime"


class Settings(BaseSettings):
    """One frozen record of every setting; `load` reads it from the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_prog_name="python -m service serve",
    )

    artifact: Path = Field(
        default_factory=embedded_artifact,
        description="Folder with manifest.json and one ONNX file per column.",
    )
    model_repository: Path | None = Field(
        None,
        description="Folder <name>/<version>/ of more artifacts, which the administrator may load while the "
        "server runs; empty: there are none.",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="What to load from the repository at the start beside the artifact, e.g. `cats,dogs/2`.",
    )
    max_models: int = Field(
        8, ge=1, description="Versions loaded at once; beyond it loading is refused. Larger: more memory."
    )
    load_timeout_s: float = Field(
        120.0,
        gt=0,
        description="How long loading may take beside serving. Larger: bigger artifacts on busy machines.",
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on; 0.0.0.0 opens the service to the network."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 lets the system choose one.")
    shares_port: bool = Field(
        False,
        description="Other servers may listen on the same port, and on that for gRPC, if all of them say so: "
        "Linux deals connections out among them. Takes more than one process on one machine; each needs "
        "an own_port.",
    )
    own_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="A second port for the same, of this process alone: for probes, metrics and the model "
        "repository where the other is shared; 0 lets the system choose one; empty: none.",
    )
    grpc_port: int | None = Field(
        8001,
        ge=0,
        le=65535,
        description="Port to listen on for gRPC (Open Inference Protocol), at the same address; 0 lets the "
        "system choose one; empty: no gRPC.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Lower levels say more. Single requests are logged as log_requests says; no level logs "
        "who sent them or what is in them.",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Lines for people; or for programs a JSON object a line, with time, request_id and "
        "trace_id.",
    )
    log_requests: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the requests for an answer that are logged, a line each: 1 logs all, 0 only "
        "those that fail (500), which always are. Larger: some 20 us more of each.",
    )
    traces_endpoint: str = Field(
        "",
        description="OpenTelemetry collector that spans are sent to over gRPC (OTLP), e.g. "
        "`http://127.0.0.1:4317`, or https; empty: none are made. Needs the extra `tracing`.",
    )
    trace_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the requests that is traced of those that belong to no trace; those that do "
        "are traced if their callers' traceparent says so. Larger: more to see, about 1 ms of a core each.",
    )
    max_traces_per_second: float = Field(
        10.0,
        gt=0,
        description="Requests that are traced in the long run, whoever wants it; those beyond it are not. "
        "Larger: callers who trace all that they send may take more of a core.",
    )
    max_waiting_traces: int = Field(
        256,
        ge=1,
        description="Traced requests whose spans wait to be sent; beyond it spans are lost. Larger: a longer "
        "absence of the collector is bridged, some 5 kB of memory each.",
    )
    traces_timeout_s: float = Field(
        5.0,
        gt=0,
        description="How long the collector may take for what is sent to it, repetitions included, and for "
        "the rest when stopping. Larger: fewer spans lost, slower restarts without a collector.",
    )

    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        repr=False,
        description="Hashes of the keys that open predictions, e.g. `sha256:5f…,sha256:9c…`; "
        "`python -m service hash-key` makes a key and its hash. Without any here or in the file, predictions "
        "are open to everybody.",
    )
    api_keys_file: Path | None = Field(
        None, description="File with more of these hashes, one a line, # begins a comment; read at the start."
    )
    admin_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        repr=False,
        description="Hashes of the keys that open the model repository, and nothing else. Without any here "
        "or in the file, it is closed to everybody.",
    )
    admin_keys_file: Path | None = Field(
        None, description="As api_keys_file, for the keys of the model repository."
    )
    max_requests_per_second: float = Field(
        0.0,
        ge=0,
        description="Requests that each client may send in the long run; above it 429; 0: any number. A "
        "client is a key, or without one an IPv4 address or an IPv6 /64 network. Larger: one client may take "
        "more of the server.",
    )
    request_burst: int = Field(
        20,
        ge=1,
        description="Requests that a client may send at once after a rest, if there is a rate. Larger: "
        "burstier clients are let through.",
    )
    max_clients: int = Field(
        100_000,
        ge=1,
        description="Clients whose rate is remembered; beyond it the one unseen for longest is forgotten and "
        "may send a burst again. Larger: 200 bytes of memory each.",
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of the proxies whose X-Forwarded-For and X-Forwarded-Proto are "
        "believed, or `*`. More: whoever sends from there may name any address as its own.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call this server from a browser, e.g. `https://example.org`, or "
        "`*`; empty: only pages of its own.",
    )

    tls_certificate: Path | None = Field(
        None, description="PEM file with the certificate and those between it and its root: https."
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key.")
    tls_key_password: SecretStr | None = Field(
        None, description="Opens the private key; better in the environment than on the command line."
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authorities that sign clients' certificates: whoever has none is "
        "turned away.",
    )

    max_connections: int = Field(
        2048,
        ge=1,
        description="Connections at once; beyond it new ones are closed. Larger: more memory and more open "
        "files, which the system must allow.",
    )
    max_connections_per_client: int = Field(
        0,
        ge=0,
        description="Connections at once from one IPv4 address or IPv6 /64 network; beyond it new ones are "
        "closed; 0: any number. Larger: one client may keep others out; behind a proxy all have its address.",
    )
    max_pipelined_requests: int = Field(
        8,
        ge=1,
        description="Requests that may be sent ahead on one connection while another is served; beyond it "
        "the connection is closed. Larger: more memory for each connection.",
    )
    max_header_bytes: int = Field(
        32 << 10,
        ge=256,
        description="Request line and headers of one request; above it 431. What surrounds the chunks of a "
        "body and comes after it has the same bound. Larger: more memory for each connection.",
    )
    max_query_bytes: int = Field(
        2048, ge=1, description="Parameters of one request; above it 414. Larger: more time to read them."
    )
    header_timeout_s: float = Field(
        10.0,
        gt=0,
        description="How long the TLS handshake may take, and from then or from its first byte the head of a "
        "request; above it 408 and the connection is closed. Larger: slow callers hold connections longer.",
    )
    keep_alive_s: float = Field(
        30.0,
        gt=0,
        description="How long a connection is kept for the next request, or for the rest of a body that "
        "nobody reads. Larger: fewer new connections, more idle ones; behind a proxy above the proxy's own.",
    )
    send_timeout_s: float = Field(
        10.0,
        gt=0,
        description="How long a reader may take nothing while bytes wait for it; the connection is broken "
        "before twice that. Larger: readers that hang hold memory longer.",
    )

    default_budget_ms: float = Field(
        50.0, gt=0, description="Budget of a request that names none. Larger: deeper, slower answers."
    )
    min_budget_ms: float = Field(
        0.1,
        gt=0,
        description="Smallest budget taken; below it 422. Smaller: more requests end in 429 instead.",
    )
    max_budget_ms: float = Field(
        10_000.0,
        gt=0,
        description="Largest budget taken; above it 422. Larger: a request may hold its place in the queue "
        "longer.",
    )
    policy: PolicyName = Field(
        "anytime",
        description="What decides which column runs for whom. The others are there to be compared with: one "
        "column a request, the shallowest, the deepest, the deepest that fits, or SlackFit.",
    )
    answer_worth: float = Field(
        ANSWER_WORTH,
        ge=0,
        description="What an answer in time is worth, in corrected answers. Larger: fewer deadlines missed "
        "because of a refinement, fewer answers refined.",
    )
    hope: float = Field(
        HOPE,
        gt=0,
        le=1,
        description="Share of the predicted time that must be left for a first answer to be tried for, while "
        "there is time for everybody. Larger: fewer in time who were not expected to be, more of those who "
        "get no answer learn it at once.",
    )
    refine_below: float = Field(
        REFINE_BELOW,
        gt=0,
        le=1,
        description="Answers are refined while no larger share of requests than this found the event loop at "
        "work for others when they came, or few come. Larger: deeper answers in heavy traffic, fewer in time "
        "there. 1: refined however busy it is.",
    )
    network_ms: float = Field(
        0.0,
        ge=0,
        description="How long requests and answers are on their way together, taken off each budget. Larger: "
        "budgets hold where the callers are, and less is done within them.",
    )
    overhead_reserve_ms: float = Field(
        0.4,
        ge=0,
        description="Part of each budget kept for building and writing the answer, until the server has seen "
        "how long that takes; an answer that waits to be refined is sent when twice that is left. Larger: "
        "fewer late answers at first.",
    )
    max_overhead_reserve_ms: float = Field(
        5.0,
        ge=0,
        description="The most that is kept, however long it takes. Larger: fewer late answers on a machine "
        "that is slow for a while, more refused in that time.",
    )
    write_reserve_ms: float = Field(
        0.1,
        ge=0,
        description="Part of the above that comes after `deadline_met` is decided. Larger: answers sent in "
        "the last "
        "moment are called late more readily; smaller: one might be called met and be written too late.",
    )
    max_waiting: int = Field(
        512,
        ge=1,
        description="Requests in the engine at once: beyond it those that have an answer are sent it, and if "
        "none has, 429. Larger: more memory, slower planning.",
    )

    max_body_bytes: int = Field(
        16 << 20,
        ge=1,
        description="Largest request body; above it 413. Larger: bigger photographs, more memory.",
    )
    max_bodies_bytes: int = Field(
        256 << 20,
        ge=1,
        description="The bodies of all open requests together; above it 429. Larger: more memory.",
    )
    max_values: int = Field(
        1 << 18,
        ge=100,
        description="Numbers, texts, lists and objects in a body of JSON, and bytes of lists of numbers in a "
        "gRPC message; above it 413. Larger: bigger tensors in these forms, and for up to 0.1 us each nobody "
        "else is served while they are read. Binary tensors and files have no such bound.",
    )
    max_images_per_request: int = Field(
        32,
        ge=1,
        description="Pictures in one request of the Open Inference Protocol; above it 422. Larger: one "
        "caller may fill more of the queue.",
    )
    max_pixels: int = Field(
        25_000_000,
        ge=1,
        description="Largest picture, judged before it is decoded; above it 413. Larger: bigger photographs. "
        "A JPEG is scaled down while it is decoded, which costs up to 6 bytes and some 20 ns a pixel.",
    )
    max_decoded_pixels: int = Field(
        9_000_000,
        ge=1,
        description="Largest picture to decode, judged likewise: all of a PNG or WebP, of a JPEG what it is "
        "scaled down to, an eighth of its height and width or four times the network's, whichever is more; "
        "above it 413. Larger: bigger screenshots; in each of `decode_threads` up to 20 bytes and 100 ns a "
        "pixel, for 3 ns of which nobody else is served.",
    )
    body_timeout_s: float = Field(
        10.0,
        gt=0,
        description="How long a body may take to arrive; above it 408. Larger: slow callers hold "
        "connections longer.",
    )
    max_open_requests: int = Field(
        1024,
        ge=1,
        description="Requests to /predict at once, those still sending their body included; above it 429. "
        "Larger: more memory.",
    )
    decode_threads: int = Field(
        2,
        ge=1,
        description="Threads that decode large pictures. Larger: more at once, fewer cores for inference.",
    )

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="Where to run: `cuda` and `tensorrt` refuse to start without a GPU, `auto` takes CUDA if "
        "it works and says what it took.",
    )
    cuda_graphs: bool = Field(
        True,
        description="With CUDA, record each column and batch size at the start and replay it as one launch. "
        "false: slower by a launch for each operator.",
    )
    cudnn_conv_algo_search: Literal["heuristic", "exhaustive", "default"] = Field(
        "heuristic",
        description="How algorithms for convolutions are chosen at the start, on a GPU. `exhaustive` tries "
        "all: runs may be shorter, the start longer by up to a second for each column and batch size.",
    )
    use_tf32: bool = Field(
        False,
        description="Multiply on a GPU with 10 bits instead of float32's 23. true: faster where convolutions "
        "are large, and the accuracy is not the one that the artifact was measured with.",
    )
    prefer_nhwc: bool = Field(
        False,
        description="Keep channels last in a GPU's memory. true: faster or slower, to be measured; tensor "
        "cores want it so.",
    )
    tensorrt_cache: Path | None = Field(
        default_factory=lambda: platform_cache() / "tensorrt",
        description="Folder for what TensorRT has built, which takes tens of seconds for each column; empty: "
        "it is built at every start.",
    )
    keep_warm_ms: float | None = Field(
        None,
        ge=0,
        description="Run the shallowest column on a blank picture when nothing has run for so long: a GPU "
        "that rests answers many times slower. Smaller: warmer, more power; 0: never; empty: 100 on a GPU, "
        "never on a CPU.",
    )
    intra_op_threads: int = Field(
        1,
        ge=1,
        description="Threads within one run on a CPU. Larger: faster on idle cores, erratic when anything "
        "else runs.",
    )
    brief_run_ms: float = Field(
        3.0,
        ge=0,
        description="On a CPU, first answers that are predicted to take no longer are not handed over to a "
        "thread, and wait for no refinement there; while the event loop is busy, no more requests share such "
        "a run than it can be brief for. Larger: less to do for two cores that also serve the network, but "
        "the server is deaf for so long.",
    )
    batch_sizes: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        None,
        description="Batch sizes that are warmed up and measured, e.g. `1,2,4,8`. Larger ones: more "
        "throughput where batching pays (GPUs), longer start-up; empty: `1,2,4,8` on a CPU, "
        "`1,2,4,8,16,32,64` on a GPU.",
    )
    profile_seconds: float = Field(
        3.0,
        gt=0,
        description="Time for measuring latencies at start-up. Larger: steadier predictions, later ready.",
    )
    profile_quantile: float = Field(
        0.8,
        gt=0.5,
        lt=1,
        description="The high quantile of measured latencies that admission trusts when time is scarce. "
        "Larger: fewer late answers, more 429.",
    )
    profile_cache: Path | None = Field(
        default_factory=platform_cache,
        description="Folder for measured latencies, so that a restart need not measure again; empty "
        "disables it.",
    )
    failed_runs_until_restart: int = Field(
        3,
        ge=1,
        description="Failed runs of one column in a row after which, if a blank picture fails, too, the "
        "server ends with status 70, to be started anew; of what CUDA calls final, one is enough, and of "
        "what may come of that, one and a blank picture. Larger: more requests fail before that.",
    )
    run_timeout_s: float = Field(
        30.0,
        gt=0,
        description="How long one run may take before the server ends as above. Larger: one that hangs is "
        "noticed later; smaller: a slow one may be taken for it.",
    )
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        description="How long everything is still answered after the signal to stop, while /healthz/ready "
        "says 503 already. Larger: balancers that go on sending for a while (Kubernetes: some seconds) lose "
        "nothing; slower restarts.",
    )
    drain_timeout_s: float = Field(
        5.0,
        ge=0,
        description="How long a run in progress, or a body on its way, may take to end when stopping. "
        "Larger: slower restarts.",
    )
    drain_linger_s: float = Field(
        1.0,
        ge=0.01,
        description="How long idle connections are kept when stopping, so that a request on one of them is "
        "turned away and not lost. Larger: callers with longer pauses are told in time; slower restarts.",
    )

    @field_validator(
        *("batch_sizes", "models", "api_keys", "admin_keys", "forwarded_allow_ips", "cors_origins"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _never_empty(cls, value: object) -> object:
        if value == "":  # a secret that was not filled in must not open the door
            raise ValueError("is empty: give the hash of a key, or leave the setting out")
        return value

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(KEY_HASH.fullmatch(hash_) for hash_ in value):
            raise ValueError(
                "must be sha256: and 64 digits from 0 to f, never a key itself: "
                "python -m service hash-key makes both"
            )
        return value

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if address != "*":
                ip_network(address)
        return value

    @field_validator("traces_endpoint")
    @classmethod
    def _collector(cls, value: str) -> str:
        if value and not COLLECTOR.fullmatch(value):
            raise ValueError("must be http:// or https:// with a host and a port, e.g. http://127.0.0.1:4317")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(ORIGIN.fullmatch(origin) for origin in value):
            raise ValueError("must be * or origins without a path, e.g. https://example.org")
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _ascending_from_one(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (value[:1] != (1,) or list(value) != sorted(set(value))):
            raise ValueError("must start at 1 and ascend, e.g. 1,2,4,8")
        return value

    @field_validator(
        *("own_port", "grpc_port", "profile_cache", "model_repository", "api_keys_file", "admin_keys_file"),
        *("tensorrt_cache", "keep_warm_ms", "batch_sizes"),
        *("tls_certificate", "tls_key", "tls_client_ca"),
        mode="before",
    )
    @classmethod
    def _empty_disables(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.min_budget_ms <= self.default_budget_ms <= self.max_budget_ms:
            raise ValueError("min_budget_ms <= default_budget_ms <= max_budget_ms must hold")
        if not self.write_reserve_ms <= self.overhead_reserve_ms <= self.max_overhead_reserve_ms:
            raise ValueError("write_reserve_ms <= overhead_reserve_ms <= max_overhead_reserve_ms must hold")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
        if self.tls_certificate is None and (self.tls_key_password or self.tls_client_ca):
            raise ValueError("tls_key_password and tls_client_ca need tls_certificate and tls_key")
        return self


def load(arguments: Sequence[str] = ()) -> Settings:
    """Read the settings from command line options (`--port 8001`), which win, and the environment.

    Raises:
        SettingsError: a variable is unknown or a value is refused; the sentence names it and says what is
            wrong.
        SystemExit: `--help` was asked for, or an option is unknown (status 2).
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(
        name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )
    if f"{PREFIX}SERVICE_HOST" in os.environ:
        raise SettingsError(
            "ANYTIME_SERVICE_HOST is set by Kubernetes, with ANYTIME_PORT and more, for a Service named "
            "anytime: set enableServiceLinks: false in the pod's spec, or name the Service otherwise."
        )
    if unknown:
        raise SettingsError(
            f"Unknown setting {', '.join(unknown)}: remove it or correct its name; known are "
            f"{', '.join(sorted(known))}."
        )
    try:
        return CliApp.run(Settings, cli_args=list(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper() if first["loc"] else "The settings"
        # Without a name, the input is all that was set; both may hold what must not be read in a log.
        is_secret = not first["loc"] or first["loc"][0] in SECRET
        was = "" if is_secret else f" (was {first['input']!r})"
        raise SettingsError(f"{name}: {first['msg']}{was}.") from (None if is_secret else error)
