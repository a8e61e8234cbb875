"""Who may come in, and how often: keys, rates, and what counts as one client.

Must not know what is asked or answered. Keys are compared here and never kept, logged or repeated.
"""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from service.errors import Forbidden, QueryTooLong, TooManyRequests, Unauthorized
from service.settings import KEY_HASH, Settings, SettingsError

Door = Literal["predict", "admin"]
"""What a key opens: predictions, or the model repository. Neither opens the other."""

Headers = Mapping[bytes, bytes]

MAX_ADDRESS = 64
"""Characters of a client's address that count: a proxy may hand on whatever it was told."""


def new_key() -> tuple[str, str]:
    """A fresh key for a client, and its hash for the server's settings."""
    key = "anytime_" + secrets.token_urlsafe(32)
    return key, hashed(key)


def hashed(key: str) -> str:
    """What is kept of a key.

    One plain SHA-256: a key is 256 random bits, so there is no dictionary to try and nothing that a slow hash
    would make harder. A password hash takes 50 ms and more, ten times a whole budget of 5 ms, and whoever
    sends wrong keys could keep the server busy with it.
    """
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def client_of(address: str) -> str:
    """The client behind an address: itself, or for IPv6 its /64 network, all of which one subscriber has.

    Cost: 0.1 us for IPv4, some 5 us for IPv6.
    """
    if ":" not in address:
        return address[:MAX_ADDRESS]
    try:
        ip = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address[:MAX_ADDRESS]
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return ip.packed[:8].hex(":", 2) + "::/64"


class Rates:
    """How often each client may come: a token bucket for each, kept as the time at which it is full again.

    Args:
        per_second: Tokens that a bucket gains.
        burst: Tokens that it holds.
        max_clients: Buckets remembered; beyond it the one untouched for longest is forgotten.
    """

    def __init__(self, per_second: float, burst: int, max_clients: int) -> None:
        self._interval_s = 1 / per_second
        self._room_s = (burst - 1) / per_second
        self._max_clients = max_clients
        self._full_s: OrderedDict[str, float] = OrderedDict()

    @property
    def n_clients(self) -> int:
        """Clients remembered."""
        return len(self._full_s)

    def wait_s(self, client: str, now_s: float) -> float:
        """Take a token: 0 if there was one, otherwise how long until there is [s].

        Cost: O(1).
        """
        full_s = max(now_s, self._full_s.get(client, now_s))
        wait_s = max(0.0, full_s - self._room_s - now_s)
        # Refused or not, it was here: a bucket that is asked in vain must not be the next to be forgotten.
        self._full_s[client] = full_s if wait_s else full_s + self._interval_s
        self._full_s.move_to_end(client)
        if len(self._full_s) > self._max_clients:
            self._full_s.popitem(last=False)
        return wait_s


class Access:
    """Lets requests in or says why not.

    Args:
        settings: The keys, the rate, and the bound of a query.
        clock: Monotonic time [s].

    Raises:
        SettingsError: a file of keys cannot be used.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._max_query_bytes = settings.max_query_bytes
        self._hashes: Mapping[Door, tuple[bytes, ...]] = {
            "predict": _hashes("api_keys_file", settings.api_keys, settings.api_keys_file),
            "admin": _hashes("admin_keys_file", settings.admin_keys, settings.admin_keys_file),
        }
        self._rates: Rates | None = None
        if settings.max_requests_per_second:
            self._rates = Rates(
                settings.max_requests_per_second, settings.request_burst, settings.max_clients
            )

    def check(self, path: str, query: bytes, headers: Headers, address: str) -> None:
        """Let an HTTP request in, before anything of it is read but its head.

        Raises:
            QueryTooLong: its parameters have too many bytes.
            TooManyRequests, Unauthorized, Forbidden: as `admit`.
        """
        if len(query) > self._max_query_bytes:
            raise QueryTooLong(
                f"The query has {len(query)} bytes and may have {self._max_query_bytes}: /docs lists the "
                "parameters there are."
            )
        if not is_probe(path):
            self.admit(door_of(path), headers, address)

    def admit(self, door: Door | None, headers: Headers, address: str) -> None:
        """Let a caller in.

        Args:
            door: What it wants; None if that is open to everybody.
            headers: By lower-case name.
            address: Where it calls from, as far as that is known.

        Raises:
            TooManyRequests: it has used its rate up, whatever it wants.
            Unauthorized: it shows no key that is known.
            Forbidden: its key opens something else, or no key opens this.

        Cost: without keys and rates 0.2 us; 0.3 us for each key that is known.
        """
        digest = _shown(headers)
        opens = {name for name, hashes in self._hashes.items() if _is_among(digest, hashes)} if digest else ()
        if self._rates:
            client = digest.decode() if digest and opens else client_of(address)
            wait_s = self._rates.wait_s(client, self._clock())
            if wait_s:
                raise TooManyRequests("You have sent more requests than your share: retry later.", wait_s)
        if door is None or door in opens or (door == "predict" and not self._hashes["predict"]):
            return
        if not self._hashes[door]:
            raise Forbidden(
                "The model repository is closed: its operator opens it by setting ANYTIME_ADMIN_KEYS or "
                "ANYTIME_ADMIN_KEYS_FILE."
            )
        if opens:
            raise Forbidden("This key does not open this: ask the operator for one that does.")
        raise Unauthorized(
            "A key is needed that this server knows: send it as `Authorization: Bearer <key>` or `X-API-Key`."
        )


def door_of(path: str) -> Door | None:
    """Which keys a path needs; None if it is open to everybody.

    Open are what orchestrators, dashboards and people look at: health, metrics, descriptions, pages.
    """
    if path == "/predict":
        return "predict"
    if path.startswith("/v2/repository"):
        return "admin"
    if path.startswith("/v2/") and path.endswith("/infer"):
        return "predict"
    return None


def is_probe(path: str) -> bool:
    """Whether this asks for health: never refused, or an orchestrator would restart a server that is well."""
    return path.startswith(("/healthz/", "/v2/health/"))


def _shown(headers: Headers) -> bytes | None:
    """The hash of the key that a caller shows; a bearer's wins."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        key = headers.get(b"x-api-key", b"")
    key = key.strip()
    return b"sha256:" + hashlib.sha256(key).hexdigest().encode() if key else None


def _is_among(digest: bytes, hashes: tuple[bytes, ...]) -> bool:
    """Compare with every one, whichever is right: how long it takes says nothing."""
    return sum([hmac.compare_digest(digest, known) for known in hashes]) > 0


def _hashes(setting: str, listed: tuple[str, ...], file: Path | None) -> tuple[bytes, ...]:
    """All hashes of one door.

    Raises:
        SettingsError: the file cannot be read, has a line that is no hash, or has none: a list of keys that
            was lost on its way must not open the door.
    """
    name = f"ANYTIME_{setting.upper()}"
    if file is None:
        return tuple(hash_.encode() for hash_ in listed)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"{name}: {file} cannot be read ({reason}): correct the path.") from error
    found = list(listed)
    for number, line in enumerate(lines, start=1):
        hash_ = line.partition("#")[0].strip()
        if not hash_:
            continue
        if not KEY_HASH.fullmatch(hash_):
            raise SettingsError(
                f"{name}: line {number} of {file} is no hash of a key: write sha256: and 64 digits, as "
                "python -m service hash-key makes them, or remove it."
            )
        found.append(hash_)
    if len(found) == len(listed):
        raise SettingsError(f"{name}: {file} has no key: add the hash of one, or leave the setting out.")
    return tuple(hash_.encode() for hash_ in found)
