"""The daemon's one TOML file, read once, checked where each field is declared, then frozen.

Unknown keys are refused by name. A component receives its own section only. ``docs/config.md`` lists every field.
msgspec structs instead of dataclasses: they refuse unknown keys and name the offending path.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import socket
import tomllib
from collections.abc import Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from agent.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB
_BUDGET_BYTES_MIN: Final = 16 * MIB  # the largest chunk a bundle may have
EXIT_BAD_CONFIG: Final = 78  # EX_CONFIG, of the process: systemd need not try again at once
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION: Final = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}(-[0-9A-Za-z.-]{1,32})?")
_TIME: Final = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")
_GPU: Final = re.compile(r"cuda:(0|[1-9][0-9]?)")
_UNKNOWN_KEY: Final = re.compile(r"unknown field `(.+)`")
_STORE_SCHEMES: Final = ("file://", "http://", "https://", "s3://")
_BUCKET: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?$")
_KEEP_ALIVE_S: Final = 300.0  # of a lazy model, unless the configuration says otherwise
_SHARES_MAX: Final = 12  # of a canary
_DEVICE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Role = Literal["infer", "read", "operate", "admin"]
LoadWhen = Literal["eager", "lazy"]
KeepAlive = Literal["auto", "never"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: Final[tuple[Day, ...]] = get_args(Day)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, keyword only, no unknown keys."""


class DeviceConfig(Section, frozen=True):
    """Who this box is and where its files live."""

    id: str = ""  # empty: the host name
    tenant: str = "default"  # the fleet this box belongs to: part of every MQTT topic and signed command
    state_dir: str = "/var/lib/inferd"  # bundles, pointers, journal and outbox; one daemon per folder
    profile: str = "auto"  # file name in profiles/ without .toml, or "auto"; `inferctl probe` says which and why
    gpu_interval_s: float = 15.0  # between two looks at the GPUs: metrics, and whether one is lost

    def __post_init__(self) -> None:
        _require(not self.id or bool(_DEVICE_ID.fullmatch(self.id)), "id: letters, digits, '.', '_', '-', at most 64")
        _require(bool(_NAME.fullmatch(self.tenant)), "tenant: lower-case letters, digits, '.', '_', '-', at most 64")
        _require(1 <= self.gpu_interval_s <= 3600, "gpu_interval_s: 1..3600")

    @property
    def effective_id(self) -> str:
        """The configured id, or the host name."""
        return self.id or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "box"


class ServingConfig(Section, frozen=True):
    """The listeners. systemd's sockets named ``frames``, ``http-unix`` and ``http`` replace the paths and the port."""

    frame_socket: str = "/run/inferd/inferd.sock"  # client library and inferctl; its file mode says who may connect
    http_socket: str = "/run/inferd/http.sock"  # HTTP for local peers, who are known by uid and gid
    http_host: str = "127.0.0.1"  # address of the TCP listener; only loopback takes clients without a token
    http_port: int = 8080  # 0: no TCP listener
    header_bytes_max: int = 64 * KIB  # of one request: frame header, or HTTP request line and headers
    body_bytes_max: int = 64 * MIB  # of one request or answer
    read_timeout_s: float = 10.0  # for the rest of a request whose first byte has arrived
    idle_timeout_s: float = 75.0  # an HTTP keep-alive connection without a request
    connections_max: int = 512  # per listener
    write_timeout_s: float = 10.0  # a client that takes nothing of its answers for so long is cut
    output_bytes_max: int = 16 * MIB  # answers waiting for one slow client; with more waiting it is cut
    receive_bytes_max: int = 256 * MIB  # half-received bodies of all clients together; above it they are refused
    deadline_ms_default: int = 30_000  # queue time included
    drain_timeout_s: float = 20.0  # at shutdown, for requests that were accepted

    def __post_init__(self) -> None:
        _require(0 <= self.http_port <= 65535, "http_port: 0..65535")
        _require(KIB <= self.header_bytes_max <= MIB, "header_bytes_max: 1 KiB..1 MiB")
        _require(KIB <= self.body_bytes_max <= 1024 * MIB, "body_bytes_max: 1 KiB..1 GiB")
        _require(0 < self.read_timeout_s <= 600, "read_timeout_s: above 0, at most 600")
        _require(0 < self.idle_timeout_s <= 3600, "idle_timeout_s: above 0, at most 3600")
        _require(1 <= self.connections_max <= 65536, "connections_max: 1..65536")
        _require(0 < self.write_timeout_s <= 600, "write_timeout_s: above 0, at most 600")
        _require(64 * KIB <= self.output_bytes_max <= 1024 * MIB, "output_bytes_max: 64 KiB..1 GiB")
        _require(self.receive_bytes_max >= self.body_bytes_max, "receive_bytes_max: at least body_bytes_max")
        _require(1 <= self.deadline_ms_default <= 3_600_000, "deadline_ms_default: 1..3600000")
        _require(0 <= self.drain_timeout_s <= 600, "drain_timeout_s: 0..600")


class SharedMemoryConfig(Section, frozen=True):
    """Memory that clients share with workers, so that tensors are not sent. ``regions_max = 0`` refuses it."""

    regions_max: int = 64  # per connection
    region_bytes_max: int = 256 * MIB  # of one connection together
    total_regions_max: int = 256  # of all connections; each holds a descriptor of the daemon
    total_bytes_max: int = 1024 * MIB  # of all connections together
    arena_bytes_max: int = 256 * MIB  # the daemon's own, for large bodies that are sent; 0: workers get them sent too
    arena_idle_bytes_max: int = 16 * MIB  # of it kept for reuse
    arena_idle_s: float = 10.0  # and given back once it was not used for so long

    def __post_init__(self) -> None:
        _require(0 <= self.regions_max <= 4096, "regions_max: 0..4096")
        _require(64 * KIB <= self.region_bytes_max <= 1 << 40, "region_bytes_max: 64 KiB..1 TiB")
        _require(0 <= self.total_regions_max <= 65536, "total_regions_max: 0..65536")
        _require(self.total_bytes_max >= self.region_bytes_max, "total_bytes_max: at least region_bytes_max")
        _require(0 <= self.arena_bytes_max <= 1 << 40, "arena_bytes_max: 0..1 TiB")
        _require(self.arena_idle_bytes_max >= 0, "arena_idle_bytes_max: not negative")
        _require(0.1 <= self.arena_idle_s <= 86400, "arena_idle_s: 0.1..86400")


class TokenConfig(Section, frozen=True):
    """One bearer token of the TCP listener; only its hash is stored."""

    name: str  # who holds it, for the log and audit events
    sha256: str  # lower-case hex of the token's bytes: ``printf %s TOKEN | sha256sum``
    roles: tuple[Role, ...] = ("infer",)  # what the token may do

    def __post_init__(self) -> None:
        _require(bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)), "sha256: 64 lower-case hex digits")


class AuthConfig(Section, frozen=True):
    """Who may do what. Unix peers are known by uid and gid, TCP clients by token."""

    unix_default_roles: tuple[Role, ...] = ("infer", "read")  # any peer that the socket's file mode lets in
    operate_uids: tuple[int, ...] = ()  # may deploy and roll back; root and the daemon's own uid always hold admin
    operate_gids: tuple[int, ...] = ()  # peers of these groups may deploy and roll back
    tcp_anonymous_roles: tuple[Role, ...] = ("infer", "read")  # loopback only; never operate or admin
    tokens: tuple[TokenConfig, ...] = ()  # see `[[auth.tokens]]`

    def __post_init__(self) -> None:
        _require(
            not {"operate", "admin"} & set(self.tcp_anonymous_roles),
            "tcp_anonymous_roles: management is never open to an unauthenticated TCP client",
        )


class MirrorConfig(Section, frozen=True):
    """A store that needs more than an address to be reached. Whom it belongs to does not matter: signatures decide."""

    url: str  # file://, http(s):// or s3://bucket/prefix
    token_file: str = ""  # http(s): its first line is sent as the bearer token
    tls_ca_file: str = ""  # https, s3: PEM; authorities believed in place of the system's
    tls_certificate_file: str = ""  # https: PEM; this box's own certificate, if the server asks for one
    tls_key_file: str = ""  # https: PEM, unencrypted; the key of that certificate
    proxy: str = ""  # http://[user:password@]host:port; empty: none
    rate_bytes_per_s_max: int = 0  # of all its connections together; 0: no limit
    metered: bool = True  # counts against budget_bytes; false for a mirror in the same network
    endpoint: str = ""  # s3: http(s) address of a service that is not Amazon's
    region: str = ""  # s3; empty: of the environment
    credentials_file: str = ""  # s3: in the format of ~/.aws/credentials; empty: environment, then the machine's role
    credentials_profile: str = "default"  # s3: section of that file

    def __post_init__(self) -> None:
        _require(self.url.startswith(_STORE_SCHEMES), f"url: {self.url!r} is not file://, http(s):// or s3://")
        _require(_is_plain(self.url), "url: without user, query and fragment")
        https, s3 = self.url.startswith("https://"), self.url.startswith("s3://")
        _require(not s3 or bool(_BUCKET.match(self.url)), f"url: {self.url!r} is not s3://bucket or s3://bucket/prefix")
        _require(not self.token_file or self.url.startswith("http"), "token_file: only for http(s)://")
        _require(not self.tls_ca_file or https or s3, "tls_ca_file: only for https:// and s3://")
        _require(not self.tls_certificate_file or https, "tls_certificate_file: only for https://")
        _require(not self.tls_key_file or bool(self.tls_certificate_file), "tls_key_file: needs tls_certificate_file")
        _require(not self.proxy or self.proxy.startswith(("http://", "https://")), "proxy: http://host:port")
        _require(not self.proxy or not self.url.startswith("file://"), "proxy: not for file://")
        _require(self.rate_bytes_per_s_max >= 0, "rate_bytes_per_s_max: not negative")
        for name in ("endpoint", "region", "credentials_file"):
            _require(s3 or not getattr(self, name), f"{name}: only for s3://")
        _require(not self.endpoint or self.endpoint.startswith(("http://", "https://")), "endpoint: http(s)://host")
        _require(_is_plain(self.endpoint), "endpoint: without user, query and fragment")


class StoreConfig(Section, frozen=True):
    """Where bundles come from and how much a pull may take."""

    urls: tuple[str, ...] = ()  # file://, http(s):// or s3://bucket/prefix; mirrors in order
    mirrors: tuple[MirrorConfig, ...] = ()  # tried after urls, in order: see `[[store.mirrors]]`
    anchor: str = "/usr/share/inferd/anchor/root.json"  # the root of trust (root.json), installed with the box
    poll_interval_s: float = 3600.0  # for models that follow a channel; 0: never
    connections: int = 4  # parallel downloads of one pull
    rate_bytes_per_s_max: int = 0  # of one pull from all mirrors together; 0: no limit
    budget_bytes: int = 0  # chunks that may be fetched from metered mirrors in one window; 0: no limit
    budget_window_s: float = 2_592_000.0  # length of that window, which begins with its first byte
    stall_timeout_s: float = 30.0  # no byte for so long: try again
    metadata_timeout_s: float = 30.0  # whole download of one metadata file
    disk_reserve_bytes: int = 64 * MIB  # never filled by a pull, nor the last tenth of what it needs
    bundle_bytes_max: int = 16 * 1024 * MIB  # a larger bundle is refused before it is fetched
    tries: int = 3  # per chunk and source
    sideload_path: str = ""  # a folder where media are mounted: a store on one is taken without being asked for
    sideload_poll_s: float = 5.0  # it is looked at so often
    collect_above_percent: float = 85.0  # with a fuller disk, older versions than the newest two go, too
    link_mode: Literal["auto", "reflink", "copy"] = "auto"  # how files that did not change come from an older version

    def __post_init__(self) -> None:
        for url in self.urls:
            _require(url.startswith(_STORE_SCHEMES), f"urls: {url!r} is not file://, http(s):// or s3://")
            _require(_is_plain(url), "urls: without user, query and fragment")
        addresses = [mirror.url.rstrip("/") for mirror in self.sources]
        _require(len(set(addresses)) == len(addresses), "mirrors: two have the same url")
        _require(1 <= self.connections <= 16, "connections: 1..16")
        _require(self.rate_bytes_per_s_max >= 0, "rate_bytes_per_s_max: not negative")
        _require(
            self.budget_bytes == 0 or self.budget_bytes >= _BUDGET_BYTES_MIN,
            f"budget_bytes: 0, or at least {_BUDGET_BYTES_MIN}: a chunk that is larger could never be fetched",
        )
        _require(60 <= self.budget_window_s <= 366 * 86_400, "budget_window_s: 60 to 31622400")
        _require(0 < self.stall_timeout_s <= 600, "stall_timeout_s: above 0, at most 600")
        _require(0 < self.metadata_timeout_s <= 600, "metadata_timeout_s: above 0, at most 600")
        _require(self.disk_reserve_bytes >= 0, "disk_reserve_bytes: not negative")
        _require(self.bundle_bytes_max >= 1, "bundle_bytes_max: at least 1")
        _require(1 <= self.tries <= 20, "tries: 1..20")
        _require(not self.sideload_path or self.sideload_path.startswith("/"), "sideload_path: an absolute path")
        _require(0.1 <= self.sideload_poll_s <= 3600, "sideload_poll_s: 0.1..3600")
        _require(0 < self.collect_above_percent <= 100, "collect_above_percent: above 0, at most 100")

    @property
    def sources(self) -> tuple[MirrorConfig, ...]:
        """All mirrors in the order in which they are tried."""
        return (*(MirrorConfig(url=url) for url in self.urls), *self.mirrors)


class PolicyConfig(Section, frozen=True):
    """What a signed bundle is allowed to be on this box."""

    handler_code: Literal["signed", "never"] = "signed"  # never: only built-in handlers, no code of a bundle
    native_formats: Literal["signed", "never"] = "never"  # variants whose format holds native code
    fallback: Literal["prefer", "require", "cpu"] = (
        "prefer"  # require: the best variant, on the best device the bundle supports, or none; cpu: CPU variants only
    )
    sandbox: Literal["enforce", "best_effort"] = "enforce"  # enforce: no worker without seccomp and Landlock
    on_revoked: Literal["fallback", "stop", "warn"] = "fallback"  # of what serves: to an earlier version, else stop
    on_long_offline: Literal["continue", "stop"] = "continue"  # after 30 days without word from the store's signers
    code_sandbox: Literal["full", "partial", "none"] = (
        "full"  # the level that a bundle's own code and native formats need under best_effort; partial: one of the two
    )


class WorkersConfig(Section, frozen=True):
    """How many workers a model has: more while its requests queue, fewer once they are not needed.

    ``workers = 2`` in ``[engine]`` is short for ``workers = {min = 2, max = 2}``.
    """

    min: int = 1  # started with the model
    max: int = 0  # most; 0: ``workers_max`` of the profile, but not below min
    grow_delay_ms: float = 100.0  # with every worker busy and requests queued for so long, one more is started
    shrink_idle_s: float = 60.0  # with one worker too many for so long, one that is idle leaves
    share_weights: bool = False  # CPU: all workers read ONNX weights from the pages of external data files, at a cost

    def __post_init__(self) -> None:
        _require(1 <= self.min <= 64, "min: 1..64")
        _require(self.max == 0 or self.min <= self.max <= 64, "max: min..64, or 0")
        _require(1 <= self.grow_delay_ms <= 3_600_000, "grow_delay_ms: 1..3600000")
        _require(0.1 <= self.shrink_idle_s <= 86_400, "shrink_idle_s: 0.1..86400")


class ModelEngineConfig(Section, frozen=True):
    """How one model runs, whether the file, the fleet or a local pin brings it to this box.

    A key that is left out is as ``[engine]`` says.
    """

    name: str  # the slot
    workers: int | WorkersConfig | None = None  # instead of ``[engine.workers]`` as a whole; a number, or a table
    device: str = ""  # "cuda:1": where its GPU variants run; empty: the GPU with the most free memory
    load: LoadWhen | None = None  # "eager" or "lazy", instead of ``load`` in ``[engine]``
    keep_alive_s: float | KeepAlive | None = None  # instead of ``keep_alive_s`` in ``[engine]``
    pin: bool = False  # never unloaded for another model, nor for idleness
    selftest_ms_max: float = 0.0  # a golden input that takes longer fails; 0: than the publisher grants

    def __post_init__(self) -> None:
        _require(0 <= self.selftest_ms_max <= 3_600_000, "selftest_ms_max: 0..3600000")
        _require(bool(_NAME.fullmatch(self.name)), "name: lower-case letters, digits, '.', '_', '-', at most 64")
        _require(not self.device or bool(_GPU.fullmatch(self.device)), "device: cuda:NUMBER")
        if self.workers is not None:
            _require_workers(self.workers)
        if self.keep_alive_s is not None:
            _require_keep_alive(self.keep_alive_s)


class VariantsConfig(Section, frozen=True):
    """When another variant of a model is tried, and when an approximate one (int8) is preferred."""

    restart_first_s: float = 5.0  # with no variant left to serve: before the ladder is tried again; doubles
    retry_first_s: float = 60.0  # before a better variant that failed is tried beside the one that serves; doubles
    retry_cap_s: float = 3600.0  # longest wait between two tries
    retries_max: int = 12  # tries of a better variant; then not until the daemon's or the device's return
    healthy_s: float = 600.0  # after serving for so long, a variant's earlier failures are forgotten
    idle_s: float = 2.0  # without requests for so long, a model is idle enough to try another variant of it
    patience_s: float = 600.0  # a model that is never idle is tried all the same after so long
    measure_ms: float = 200.0  # of each of the two rounds in which an approximate variant is timed; 0: never prefer one
    speedup_min: float = 1.1  # an approximate variant must be so many times as fast as its exact rival
    agreement_min: float = 0.99  # and its worst output row have this cosine with the recorded one

    def __post_init__(self) -> None:
        _require(0 < self.restart_first_s <= self.retry_cap_s, "restart_first_s: above 0, at most retry_cap_s")
        _require(0 < self.retry_first_s <= self.retry_cap_s, "retry_first_s: above 0, at most retry_cap_s")
        _require(0 <= self.retries_max <= 1000, "retries_max: 0..1000")
        _require(self.healthy_s > 0, "healthy_s: above 0")
        _require(0 <= self.idle_s <= self.patience_s, "idle_s: 0..patience_s")
        _require(0 <= self.measure_ms <= 10_000, "measure_ms: 0..10000")
        _require(1 <= self.speedup_min <= 100, "speedup_min: 1..100")
        _require(0 <= self.agreement_min <= 1, "agreement_min: 0..1")


class EngineConfig(Section, frozen=True):
    """Bounds of pools and workers."""

    workers: int | WorkersConfig = msgspec.field(default_factory=WorkersConfig)  # of each model
    models: tuple[ModelEngineConfig, ...] = ()  # see `[[engine.models]]`
    pin_cores: Literal["profile", "always", "never"] = "profile"  # bind each worker to cores, one for each thread
    queue_requests_max: int = 256  # waiting and running, per model
    queue_bytes_max: int = 256 * MIB  # their bodies, per model
    start_timeout_s: float = 120.0  # fork to ready: load, warm-up and self-test
    hang_timeout_s: float = 60.0  # a dispatched request without an answer for so long: the worker is killed
    restart_first_s: float = 0.05  # before a dead worker's first restart; doubles up to restart_cap_s
    restart_cap_s: float = 30.0  # longest wait between restarts
    deaths_max: int = 5  # within deaths_window_s: the next variant takes over
    deaths_window_s: float = 60.0  # over which deaths are counted
    variants: VariantsConfig = msgspec.field(default_factory=VariantsConfig)  # falling back, and coming back
    lanes_max: int = 64  # direct lanes of local applications to workers; 0: everything goes through the daemon
    memory_bytes_max: int = 0  # RLIMIT_AS of a worker; 0: from the manifest's measured memory, with head room
    resident_bytes_max: int = 0  # of a worker's control group; 0: from the manifest's measured memory, with head room
    memory_cgroup: str = "auto"  # divided among workers; auto: what systemd delegated; never; or a group's path
    open_files_max: int = 256  # RLIMIT_NOFILE of a worker
    load: LoadWhen = "eager"  # eager: at the start, if there is room; lazy: by the first request, which waits for it
    keep_alive_s: float | KeepAlive = "auto"  # idle for so long: unloaded; auto: 300 if lazy, else never; 0: at once
    memory_share: float = 0.0  # of host memory, or of the control group's limit, for models together; 0: the profile's
    memory_budget_bytes: int = 0  # instead of that share; 0: the share holds
    device_memory_share: float = 0.8  # of each GPU's memory, for models together
    memory_wait_s: float = 10.0  # a load waits so long for models in use; then its requests are told to come back
    selftest_interval_s: float = 300.0  # a loaded model's golden inputs run again so often while it is idle; 0: never
    selftest_share_max: float = 0.01  # of the time may go into that for one model: longer tests run more seldom

    def __post_init__(self) -> None:
        _require_workers(self.workers)
        names = [model.name for model in self.models]
        _require(len(set(names)) == len(names), "models: two entries have the same name")
        _require(1 <= self.queue_requests_max <= 1_000_000, "queue_requests_max: 1..1000000")
        _require(self.queue_bytes_max >= MIB, "queue_bytes_max: at least 1 MiB")
        _require(0 < self.start_timeout_s <= 3600, "start_timeout_s: above 0, at most 3600")
        _require(0 < self.hang_timeout_s <= 3600, "hang_timeout_s: above 0, at most 3600")
        _require(0 < self.restart_first_s <= self.restart_cap_s, "restart_first_s: above 0, at most restart_cap_s")
        _require(1 <= self.deaths_max <= 1000, "deaths_max: 1..1000")
        _require(0 <= self.lanes_max <= 4096, "lanes_max: 0..4096")
        _require(self.resident_bytes_max == 0 or self.resident_bytes_max >= MIB, "resident_bytes_max: 0, or 1 MiB up")
        where = self.memory_cgroup
        _require(where in ("auto", "never") or where.startswith("/"), "memory_cgroup: auto, never or an absolute path")
        _require(16 <= self.open_files_max <= 65536, "open_files_max: 16..65536")
        _require_keep_alive(self.keep_alive_s)
        _require(0 <= self.memory_share <= 1, "memory_share: 0..1")
        _require(self.memory_budget_bytes >= 0, "memory_budget_bytes: not negative")
        _require(0 < self.device_memory_share <= 1, "device_memory_share: above 0, at most 1")
        _require(0 <= self.memory_wait_s <= 3600, "memory_wait_s: 0..3600")
        _require(0 <= self.selftest_interval_s <= 366 * 86_400, "selftest_interval_s: 0..a year")
        _require(0.0001 <= self.selftest_share_max <= 1, "selftest_share_max: 0.0001..1")

    def of(self, model: str) -> ModelEngineConfig:
        """Return the entry of ``model``, an empty one if it has none."""
        return next((entry for entry in self.models if entry.name == model), ModelEngineConfig(name=model))

    def workers_of(self, model: str) -> WorkersConfig:
        """Return the bounds that hold for ``model``."""
        own = self.of(model).workers
        bounds = self.workers if own is None else own
        return WorkersConfig(min=bounds, max=bounds) if isinstance(bounds, int) else bounds

    def device_of(self, model: str) -> str:
        """Return the GPU that ``model`` is pinned to, empty if to none."""
        return self.of(model).device

    def lazy(self, model: str) -> bool:
        """Return whether ``model`` is loaded by its first request."""
        return (self.of(model).load or self.load) == "lazy"

    def keep_alive_of(self, model: str) -> float:
        """Return for how long ``model`` may be idle before it is unloaded (seconds, maybe infinite)."""
        own = self.of(model).keep_alive_s
        value = self.keep_alive_s if own is None else own
        if value == "auto":
            return _KEEP_ALIVE_S if self.lazy(model) else math.inf
        return math.inf if value == "never" else float(value)


class ClientLimitConfig(Section, frozen=True):
    """How much one client may ask, over all models. The client ``*`` is everybody without an entry of their own."""

    client: str  # "uid:1000", "token:NAME" or "*"
    requests_per_s: float = 0.0  # 0: unlimited
    burst: int = 10  # at once, after a quiet time
    outstanding_max: int = 0  # admitted and not answered; 0: unlimited
    quota_requests: int = 0  # per window; 0: unlimited
    quota_window_s: float = 86_400.0  # after so long the quota is new

    def __post_init__(self) -> None:
        _require(bool(re.fullmatch(r"\*|uid:\d+|token:.{1,64}", self.client)), "client: uid:NUMBER, token:NAME or *")
        _require(0 <= self.requests_per_s <= 1e6, "requests_per_s: 0..1000000")
        _require(1 <= self.burst <= 1_000_000, "burst: 1..1000000")
        _require(self.outstanding_max >= 0, "outstanding_max: not negative")
        _require(self.quota_requests >= 0, "quota_requests: not negative")
        _require(0 < self.quota_window_s <= 366 * 86_400, "quota_window_s: above 0, at most a year")


class WindowConfig(Section, frozen=True):
    """A time of the week, by the clock on the wall there; one that ends before it starts goes past midnight."""

    days: tuple[Day, ...] = DAYS  # on which it starts
    start: str = "00:00"  # hour and minute
    end: str = "00:00"  # hour and minute; the same as start: a whole day
    timezone: str = ""  # such as "Europe/Berlin"; empty: the box's

    def __post_init__(self) -> None:
        _require(bool(self.days), "days: at least one")
        for name in ("start", "end"):
            _require(bool(_TIME.fullmatch(getattr(self, name))), f"{name}: hour and minute, such as 22:30")
        _require(not self.timezone or _is_zone(self.timezone), f"timezone: {self.timezone!r} is not known on this box")


class DeployConfig(Section, frozen=True):
    """How a new version comes to serve, and when."""

    probation_s: float = 60.0  # at least so long
    probation_calls_min: int = 20  # and so many good answers; idle models are probed by their golden inputs
    probation_limit_s: float = 600.0  # without enough good answers by then, the version is rolled back
    probation_errors_max: float = 0.02  # share of failed answers above the previous version's
    latency_factor_max: float = 2.0  # 95 % of its answers within so many times the time of the version before
    latency_slack_ms: float = 20.0  # and so much more: differences on a busy small box say nothing
    canary: tuple[float, ...] = ()  # percent of the routing keys a new version gets at first, growing; empty: all
    shadow_percent: float = 0.0  # of the requests are copied to a new version first, compared and dropped
    canary_s: float = 300.0  # each share, and the copying before the first, lasts at least so long
    canary_calls_min: int = 50  # and until so many good answers, or comparisons of copies
    canary_limit_s: float = 86_400.0  # without them by then, the version is given up
    agreement_min: float = 0.95  # of the compared copies, 0..1; a wish or manifest may ask for more
    starts_in_trial_max: int = 3  # starts during one trial after a crash or power cut; with more it is rolled back
    trial_retry_cap_s: float = 3600.0  # a version with nothing to roll back to is started again, at most so far apart
    fetch_retry_cap_s: float = 300.0  # longest wait between tries while the store cannot be reached
    fetch_limit_s: float = 72 * 3600.0  # of waiting, restarts included, for a store out of reach; then it fails
    keep_versions: int = 2  # per slot on disk, beside active and previous
    windows: tuple[WindowConfig, ...] = ()  # new versions are loaded in these only: see `[[deploy.windows]]`
    fetch_windows: tuple[WindowConfig, ...] = ()  # bytes are fetched in these only: see `[[deploy.fetch_windows]]`
    force_after_s: float = 0.0  # of waiting for windows and applications' holds, then neither counts; 0: never
    wait_limit_s: float = 30 * 86_400.0  # of waiting for windows and holds, then the deployment expires
    first_waits: bool = False  # also a model's first version, or one whose model serves nothing, waits for them
    hold_limit_s: float = 12 * 3600.0  # an application's hold counts no longer than this
    holds_max: int = 64  # by all applications together

    def __post_init__(self) -> None:
        _require(0 <= self.probation_s <= self.probation_limit_s, "probation_s: 0..probation_limit_s")
        _require(self.probation_calls_min >= 0, "probation_calls_min: not negative")
        _require(0 <= self.probation_errors_max <= 1, "probation_errors_max: 0..1")
        _require(1 <= self.latency_factor_max <= 1000, "latency_factor_max: 1..1000")
        _require(0 <= self.latency_slack_ms <= 60_000, "latency_slack_ms: 0..60000")
        _require(not canary_fault(self.canary), f"canary: {canary_fault(self.canary)}")
        _require(0 <= self.shadow_percent <= 100, "shadow_percent: 0..100")
        _require(0 <= self.canary_s <= self.canary_limit_s <= 2_592_000, "canary_s: 0..canary_limit_s, at most 30 days")
        _require(0 <= self.canary_calls_min <= 1_000_000, "canary_calls_min: 0..1000000")
        _require(0 <= self.agreement_min <= 1, "agreement_min: 0..1")
        _require(1 <= self.starts_in_trial_max <= 100, "starts_in_trial_max: 1..100")
        _require(self.trial_retry_cap_s > 0, "trial_retry_cap_s: above 0")
        _require(self.fetch_retry_cap_s > 0, "fetch_retry_cap_s: above 0")
        _require(self.fetch_limit_s > 0, "fetch_limit_s: above 0")
        _require(self.force_after_s >= 0, "force_after_s: not negative")
        _require(self.wait_limit_s > 0, "wait_limit_s: above 0")
        _require(self.hold_limit_s > 0, "hold_limit_s: above 0")
        _require(0 <= self.holds_max <= 4096, "holds_max: 0..4096")


class OutboxConfig(Section, frozen=True):
    """Bounds of the offline telemetry queue; the oldest rows of the lowest class go first."""

    size_bytes_max: int = 64 * MIB  # of the database on disk, its log included
    floors_percent: tuple[int, int, int, int] = (25, 12, 38, 25)  # P0 deploy/security/audit, P1 health, P2 metrics, P3
    inflight_max: int = 16  # unacknowledged publishes
    row_bytes_max: int = 64 * KIB  # one message; a larger one is dropped, counted and reported as a gap
    refusals_max: int = 8  # a message the broker itself calls bad so often is dropped, counted and reported as a gap
    drain_rows_per_s_max: int = 200  # a long backlog must not be felt by inference: a message costs about 0.2 ms of CPU

    def __post_init__(self) -> None:
        _require(self.size_bytes_max >= 256 * KIB, "size_bytes_max: at least 256 KiB")
        _require(sum(self.floors_percent) <= 100 and min(self.floors_percent) >= 0, "floors_percent: sum at most 100")
        _require(1 <= self.inflight_max <= 1000, "inflight_max: 1..1000")
        _require(KIB <= self.row_bytes_max <= MIB, "row_bytes_max: 1 KiB..1 MiB")
        _require(1 <= self.refusals_max <= 1000, "refusals_max: 1..1000")
        _require(1 <= self.drain_rows_per_s_max <= 100_000, "drain_rows_per_s_max: 1..100000")

    @property
    def message_bytes_max(self) -> int:
        """The largest message kept: a small outbox takes small ones only, so that one cannot displace the rest."""
        return min(self.row_bytes_max, self.size_bytes_max // 16)


class TelemetryConfig(Section, frozen=True):
    """The MQTT link. An empty ``host`` means no link; events still fill the outbox."""

    host: str = ""  # the broker; empty: no link
    port: int = 1883  # 1883 without TLS, 8883 with, by custom
    username: str = ""  # at the broker
    password_file: str = ""  # a file that holds the password alone; needs username
    tls_ca_file: str = ""  # set: TLS
    tls_certificate_file: str = ""  # PEM; this box's own certificate, if the broker asks for one
    tls_key_file: str = ""  # PEM; the key of that certificate
    keepalive_s: int = 30  # a silent connection is checked so often
    connect_timeout_s: float = 10.0  # for connecting, and for the broker's answer to it
    reconnect_first_s: float = 1.0  # before the first reconnect; doubles up to reconnect_cap_s, with a random part
    reconnect_cap_s: float = 300.0  # longest wait between reconnects
    session_expiry_s: int = 86_400  # the broker keeps commands for us for so long
    stable_after_s: float = 60.0  # a connection that held so long resets the reconnect delay
    first_connect_spread_s: float = 0.0  # boxes of a fleet spread their first connect over so long, by their ids
    will_delay_s: int = 20  # the broker reports us lost after so long without a reconnect
    flush_timeout_s: float = 2.0  # at shutdown, for what is still in the outbox
    metrics_interval_s: float = 60.0  # between two messages of measurements
    reported_interval_s: float = 5.0  # between two changes of the retained ``reported`` document
    commands_per_minute_max: int = 30  # signature checks; more commands than that are counted and dropped
    outbox: OutboxConfig = msgspec.field(default_factory=OutboxConfig)

    def __post_init__(self) -> None:
        _require(1 <= self.port <= 65535, "port: 1..65535")
        _require(5 <= self.keepalive_s <= 3600, "keepalive_s: 5..3600")
        _require(0 < self.connect_timeout_s <= 120, "connect_timeout_s: above 0, at most 120")
        _require(
            0 < self.reconnect_first_s <= self.reconnect_cap_s, "reconnect_first_s: above 0, at most reconnect_cap_s"
        )
        _require(0 < self.stable_after_s <= 86_400, "stable_after_s: above 0, at most 86400")
        _require(0 <= self.first_connect_spread_s <= 3600, "first_connect_spread_s: 0..3600")
        _require(0 <= self.will_delay_s <= 3600, "will_delay_s: 0..3600")
        _require(0 <= self.flush_timeout_s <= 60, "flush_timeout_s: 0..60")
        _require(0 <= self.session_expiry_s <= 4_294_967_295, "session_expiry_s: 0..4294967295")
        _require(0.1 <= self.metrics_interval_s <= 86_400, "metrics_interval_s: 0.1..86400")
        _require(0 <= self.reported_interval_s <= 3600, "reported_interval_s: 0..3600")
        _require(1 <= self.commands_per_minute_max <= 6000, "commands_per_minute_max: 1..6000")


class ModelConfig(Section, frozen=True):
    """A model this box serves unless the fleet or a local pin says otherwise."""

    name: str  # the slot: what clients ask for, and the model's name in the store
    team: str  # whose signature its bundles need
    version: str = ""  # exact version; empty: follow ``channel``
    channel: str = "stable"  # followed when no version is named
    beside: tuple[str, ...] = ()  # versions kept beside it, each answering the requests that name it
    allow_incompatible: bool = False  # also a version that callers of the one before would notice: docs/deployment.md

    def __post_init__(self) -> None:
        _require(bool(_NAME.fullmatch(self.name)), "name: lower-case letters, digits, '.', '_', '-', at most 64")
        _require(bool(_NAME.fullmatch(self.team)), "team: lower-case letters, digits, '.', '_', '-', at most 64")
        for version in self.beside:
            _require(bool(_VERSION.fullmatch(version)), f"beside: {version!r} is no exact version such as 1.4.0")
        _require(len(set(self.beside)) == len(self.beside), "beside: a version is named twice")


class LogConfig(Section, frozen=True):
    """Standard error, which systemd sends to the journal."""

    level: Literal["debug", "info", "warning", "error"] = "info"  # what is less severe is dropped
    style: Literal["auto", "json", "text"] = "auto"  # auto: text on a terminal, JSON elsewhere


class Config(Section, frozen=True):
    """The whole file."""

    device: DeviceConfig = msgspec.field(default_factory=DeviceConfig)
    serving: ServingConfig = msgspec.field(default_factory=ServingConfig)
    shared_memory: SharedMemoryConfig = msgspec.field(default_factory=SharedMemoryConfig)
    auth: AuthConfig = msgspec.field(default_factory=AuthConfig)
    store: StoreConfig = msgspec.field(default_factory=StoreConfig)
    policy: PolicyConfig = msgspec.field(default_factory=PolicyConfig)
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    deploy: DeployConfig = msgspec.field(default_factory=DeployConfig)
    telemetry: TelemetryConfig = msgspec.field(default_factory=TelemetryConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    models: tuple[ModelConfig, ...] = ()
    limits: tuple[ClientLimitConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        _require(len(set(names)) == len(names), "models: two entries have the same name")


def load(path: Path) -> Config:
    """Return the checked configuration.

    Raises:
        ConfigError: unreadable, not TOML, unknown key or a value out of bounds; the message names file and key.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(raw: dict[str, Any]) -> Config:
    """Return the configuration of already parsed TOML; see ``load``."""
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".")
        message += _advice(message, key)
        raise ConfigError(f"[{key}] {message}" if key else message) from error


def _advice(message: str, key: str) -> str:
    """Return what the value may be, or which key was probably meant, as far as that is known."""
    kind = _kind_at(key)
    texts = next((item for item in (kind, *get_args(kind)) if get_origin(item) is Literal), None)
    if message.startswith("Invalid enum value") and texts is not None:
        return f"; one of {', '.join(map(repr, get_args(texts)))}"
    unknown = _UNKNOWN_KEY.search(message)
    if unknown and isinstance(kind, type) and issubclass(kind, Section):
        close = difflib.get_close_matches(unknown[1], kind.__struct_fields__, n=1)
        return f"; did you mean `{close[0]}`?" if close else f"; there are {', '.join(kind.__struct_fields__)}"
    return ""


def _kind_at(key: str) -> Any:
    """Return the type of the value that a path such as ``auth.tokens[0].roles[1]`` names; ``None`` if unknown."""
    kind: Any = Config
    for name in key.split(".") if key else ():
        kind = section_of(kind)
        if kind is None:
            return None
        field, *brackets = name.split("[")
        kind = get_type_hints(kind).get(field)
        for _ in brackets:
            kind = next(iter(get_args(kind)), None)
    return section_of(kind) or kind


def canary_fault(shares: Sequence[float]) -> str:
    """Return what is wrong with the shares of a canary; empty if nothing is."""
    grows = all(before < after for before, after in itertools.pairwise(shares))
    if grows and len(shares) <= _SHARES_MAX and all(0 < share <= 100 for share in shares):
        return ""
    return f"growing percentages above 0, at most 100 and {_SHARES_MAX} of them, such as 5, 25, 50"


def section_of(kind: Any) -> type[Section] | None:
    """Return the section that a value of this type may be; ``None`` for plain values and for lists."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    return next((item for item in kinds if isinstance(item, type) and issubclass(item, Section)), None)


def _is_plain(url: str) -> bool:
    """Whether a store's address has no part that would be lost, or be shown to everybody who reads a log."""
    return url.startswith("file://") or not any(letter in url for letter in "@?#")


def zone_of(name: str) -> tzinfo | None:
    """Return a time zone by name; ``None`` for the box's own.

    Raises:
        ValueError: this box knows no such zone.
    """
    if not name:
        return None
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError) as error:
        raise ValueError(f"no time zone {name!r}") from error


def _is_zone(name: str) -> bool:
    try:
        zone_of(name)
    except ValueError:
        return False
    return True


def _require_workers(workers: int | WorkersConfig) -> None:
    few = not isinstance(workers, int) or 1 <= workers <= 64
    _require(few, "workers: 1..64, or a table such as {min = 1, max = 4}")


def _require_keep_alive(keep_alive_s: float | KeepAlive) -> None:
    fits = isinstance(keep_alive_s, str) or 0 <= keep_alive_s <= 366 * 86_400
    _require(fits, 'keep_alive_s: 0..31622400, "auto" or "never"')


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
