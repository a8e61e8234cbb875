"""Who may come in, and how often."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.access import Access, Rates, client_of, door_of, hashed, is_probe, new_key
from service.errors import Forbidden, QueryTooLong, TooManyRequests, Unauthorized
from service.settings import KEY_HASH, Settings, SettingsError
from tests.service import toy_artifact
from tests.service.conftest import Launcher

KEY, HASH = new_key()
ADMIN_KEY, ADMIN_HASH = new_key()
BEARER = {"authorization": f"Bearer {KEY}"}
RAW = {"content-type": "application/octet-stream"}
PIXELS = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)


def access(clock: Callable[[], float] = lambda: 0.0, **settings: Any) -> Access:
    return Access(Settings(_env_file=None, **settings), clock)


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


# ---- keys ----


def test_a_key_is_256_random_bits_and_its_hash_is_what_the_settings_take() -> None:
    assert len({new_key() for _ in range(100)}) == 100
    assert len(KEY.removeprefix("anytime_")) * 6 >= 256
    assert hashed(KEY) == HASH
    assert KEY_HASH.fullmatch(HASH)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        {b"authorization": b"bearer  " + KEY.encode()},
        {b"x-api-key": KEY.encode()},
        {b"authorization": b"Basic dXNlcjpwYXNz", b"x-api-key": KEY.encode()},
    ],
)
@pytest.mark.parametrize("keys", [(HASH,), (HASH, hashed("other")), (hashed("other"), HASH)])
def test_each_key_that_is_listed_opens_predictions(
    headers: dict[bytes, bytes], keys: tuple[str, ...]
) -> None:
    access(api_keys=keys).admit("predict", headers, "192.0.2.1")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer(KEY[:-1]),
        bearer(KEY + "a"),
        bearer(HASH),
        {b"authorization": KEY.encode()},
        {b"authorization": b"Bearer wrong", b"x-api-key": KEY.encode()},
        {b"x-api-key": b"\xff\xfe"},
    ],
)
def test_no_other_key_does(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Unauthorized, match="X-API-Key") as refused:
        access(api_keys=(HASH,)).admit("predict", headers, "192.0.2.1")
    assert refused.value.headers == {"www-authenticate": "Bearer"}
    assert KEY not in refused.value.detail


def test_without_keys_predictions_are_open_and_the_repository_is_closed() -> None:
    nobody_known = access()
    nobody_known.admit("predict", {}, "192.0.2.1")
    nobody_known.admit("predict", bearer("whatever"), "192.0.2.1")
    with pytest.raises(Forbidden, match="ANYTIME_ADMIN_KEYS"):
        nobody_known.admit("admin", bearer("whatever"), "192.0.2.1")


def test_neither_kind_of_key_opens_the_other_door() -> None:
    both = access(api_keys=(HASH,), admin_keys=(ADMIN_HASH,))
    both.admit("predict", bearer(KEY), "192.0.2.1")
    both.admit("admin", bearer(ADMIN_KEY), "192.0.2.1")
    with pytest.raises(Forbidden, match="does not open this"):
        both.admit("admin", bearer(KEY), "192.0.2.1")
    with pytest.raises(Forbidden, match="does not open this"):
        both.admit("predict", bearer(ADMIN_KEY), "192.0.2.1")
    with pytest.raises(Unauthorized):
        both.admit("admin", bearer("wrong"), "192.0.2.1")
    access(api_keys=(HASH, ADMIN_HASH), admin_keys=(ADMIN_HASH,)).admit("predict", bearer(ADMIN_KEY), "")


def test_a_file_adds_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the shop\n{HASH}  # till 2027\n\n{ADMIN_HASH}\n")
    listed = access(api_keys=(hashed("third"),), api_keys_file=file)
    for key in (KEY, ADMIN_KEY, "third"):
        listed.admit("predict", bearer(key), "192.0.2.1")
    with pytest.raises(Unauthorized):
        listed.admit("predict", {}, "192.0.2.1")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "it is no text"),
        (b"# nobody yet\n", "has no key"),
        (f"{HASH}\n{KEY}\n".encode(), "line 2 of .* is no hash"),
    ],
)
def test_a_file_that_gives_no_keys_refuses_to_start_and_shows_none(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"ANYTIME_ADMIN_KEYS_FILE: .*{says}") as refused:
        access(admin_keys_file=file)
    assert KEY not in str(refused.value)


# ---- rates ----


def test_a_client_may_send_a_burst_and_then_its_rate() -> None:
    rates = Rates(per_second=4.0, burst=3, max_clients=10)
    assert [rates.wait_s("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.25]
    assert [rates.wait_s("a", 0.25) for _ in range(2)] == [0.0, 0.25]
    assert rates.wait_s("b", 0.25) == 0.0
    assert [rates.wait_s("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.25]


@given(
    gaps_s=st.lists(st.floats(0, 3), min_size=1, max_size=60),
    per_second=st.sampled_from([0.5, 1.0, 4.0]),
    burst=st.integers(1, 5),
)
def test_no_client_ever_has_more_than_its_burst_and_its_rate(
    gaps_s: list[float], per_second: float, burst: int
) -> None:
    rates, now_s, let_in_s = Rates(per_second, burst, 10), 0.0, list[float]()
    for gap_s in gaps_s:
        now_s += gap_s
        wait_s = rates.wait_s("a", now_s)
        if wait_s == 0:
            let_in_s.append(now_s)
        else:
            assert rates.wait_s("a", now_s + wait_s + 1e-9) == 0, "it was told when to come again"
            now_s += wait_s + 1e-9
            let_in_s.append(now_s)
    for i, first_s in enumerate(let_in_s):
        for j, last_s in enumerate(let_in_s[i:], start=1):
            assert j <= burst + (last_s - first_s) * per_second + 1e-6


def test_only_so_many_clients_are_remembered_and_the_one_unseen_for_longest_is_forgotten() -> None:
    rates = Rates(per_second=1.0, burst=1, max_clients=2)
    assert rates.wait_s("a", 0.0) == 0
    assert rates.wait_s("b", 0.0) == 0
    assert rates.wait_s("a", 0.0) > 0  # refused, but seen
    assert rates.wait_s("c", 0.0) == 0  # b is forgotten
    assert rates.n_clients == 2
    assert rates.wait_s("a", 0.0) > 0
    assert rates.wait_s("b", 0.0) == 0


def test_a_client_is_its_key_or_else_its_address() -> None:
    once = access(api_keys=(HASH, ADMIN_HASH), max_requests_per_second=1.0, request_burst=1)
    once.admit("predict", bearer(KEY), "192.0.2.1")
    with pytest.raises(TooManyRequests, match="your share") as refused:
        once.admit("predict", bearer(KEY), "192.0.2.2")
    assert refused.value.headers == {"retry-after": "1", "retry-after-ms": "1000"}
    once.admit("predict", bearer(ADMIN_KEY), "192.0.2.1")  # another key from the same address
    for guess in ("first", "second"):  # wrong keys are no clients of their own
        with pytest.raises(Unauthorized if guess == "first" else TooManyRequests):
            once.admit("predict", bearer(guess), "192.0.2.3")


def test_a_rate_holds_for_what_is_open_to_all_but_never_for_health() -> None:
    once = access(max_requests_per_second=1.0, request_burst=1)
    for _ in range(3):
        once.check("/healthz/live", b"", {}, "192.0.2.1")
        once.check("/v2/health/ready", b"", {}, "192.0.2.1")
    once.check("/metrics", b"", {}, "192.0.2.1")
    with pytest.raises(TooManyRequests):
        once.check("/metrics", b"", {}, "192.0.2.1")


def test_time_gives_a_client_its_rate_back() -> None:
    now_s = 0.0
    once = access(lambda: now_s, max_requests_per_second=1.0, request_burst=1)
    once.admit(None, {}, "192.0.2.1")
    now_s = 0.75
    with pytest.raises(TooManyRequests) as refused:
        once.admit(None, {}, "192.0.2.1")
    assert refused.value.headers["retry-after-ms"] == "250"
    now_s = 1.0
    once.admit(None, {}, "192.0.2.1")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
        ("fe80::1%eth0", "fe80::2%eth1"),
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("x" * 1000, "x" * 2000),
        ("::no:address::" + "x" * 1000, "::no:address::" + "x" * 2000),
    ],
)
def test_addresses_of_one_client(one: str, other: str) -> None:
    assert client_of(one) == client_of(other)
    assert len(client_of(one)) <= 64


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:3::1"),
        ("192.0.2.1", "192.0.2.2"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2"),
    ],
)
def test_addresses_of_two_clients(one: str, other: str) -> None:
    assert client_of(one) != client_of(other)


# ---- queries and paths ----


def test_a_query_is_bounded() -> None:
    bounded = access(max_query_bytes=10)
    bounded.check("/predict", b"x" * 10, {}, "192.0.2.1")
    with pytest.raises(QueryTooLong, match="11 bytes and may have 10"):
        bounded.check("/predict", b"x" * 11, {}, "192.0.2.1")


@pytest.mark.parametrize(
    ("path", "door"),
    [
        ("/predict", "predict"),
        ("/v2/models/cats/infer", "predict"),
        ("/v2/models/cats/versions/2/infer", "predict"),
        ("/v2/repository/index", "admin"),
        ("/v2/repository/models/cats/load", "admin"),
        ("/v2/repository/models/infer/infer", "admin"),
        ("/v2/models/cats", None),
        ("/healthz/live", None),
        ("/metrics", None),
        ("/model", None),
        ("/docs", None),
        ("/", None),
    ],
)
def test_the_door_of_each_path(path: str, door: str | None) -> None:
    assert door_of(path) == door


def test_health_is_what_orchestrators_ask_for() -> None:
    assert is_probe("/healthz/ready")
    assert is_probe("/v2/health/live")
    assert not is_probe("/predict")


# ---- at the door of the server ----


def test_with_keys_predictions_need_one_and_what_people_look_at_stays_open(launch: Launcher) -> None:
    server = launch(api_keys=(HASH,), admin_keys=(ADMIN_HASH,))
    url = "/predict?budget_ms=5000"
    for headers in ({}, {"x-api-key": "anytime_wrong"}, {"authorization": f"Basic {KEY}"}):
        refused = server.client.post(url, content=PIXELS, headers=RAW | headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["type"] == "urn:anytime:problem:unauthorized"
        assert "x-request-id" in refused.headers
    assert server.client.post(url, content=PIXELS, headers=RAW | {"x-api-key": ADMIN_KEY}).status_code == 403
    for headers in (BEARER, {"x-api-key": KEY}):
        assert server.client.post(url, content=PIXELS, headers=RAW | headers).status_code == 200
    for path in ("/", "/model", "/metrics", "/healthz/live", "/healthz/ready", "/docs", "/openapi.json"):
        assert server.client.get(path).status_code == 200, path
    assert server.metric('anytime_requests_total{outcome="invalid"}') == 4
    assert server.metric('anytime_requests_total{outcome="answered"}') == 2


def test_a_client_that_comes_too_often_is_told_when_to_come_again(launch: Launcher) -> None:
    server = launch(max_requests_per_second=0.01, request_burst=2)
    url = "/predict?budget_ms=5000"
    statuses = [server.client.post(url, content=PIXELS, headers=RAW).status_code for _ in range(2)]
    refused = server.client.post(url, content=PIXELS, headers=RAW)
    assert [*statuses, refused.status_code] == [200, 200, 429]
    assert 0 < int(refused.headers["retry-after"]) <= 100
    assert server.client.get("/model").status_code == 429
    assert server.client.get("/healthz/live").status_code == 200


@pytest.mark.parametrize(
    ("believed", "statuses"),
    [((), [200, 429, 429]), (("192.0.2.9",), [200, 429, 429]), (("127.0.0.1",), [200, 200, 429])],
)
def test_only_a_proxy_that_is_listed_may_say_who_calls(
    launch: Launcher, believed: tuple[str, ...], statuses: list[int]
) -> None:
    server = launch(forwarded_allow_ips=believed, max_requests_per_second=0.01, request_burst=1)
    callers = ("192.0.2.1", "192.0.2.2", "192.0.2.2")
    asked = [server.client.get("/model", headers={"x-forwarded-for": caller}) for caller in callers]
    assert [response.status_code for response in asked] == statuses


def test_a_query_that_is_too_long_is_not_read(launch: Launcher) -> None:
    server = launch(max_query_bytes=20)
    for path in ("/predict", "/model"):
        refused = server.client.post(f"{path}?budget_ms={'0' * 20}1", content=PIXELS, headers=RAW)
        assert refused.status_code == 414
        assert "20" in refused.json()["detail"]


def test_pages_of_other_origins_may_call_only_if_they_are_listed(launch: Launcher) -> None:
    origin = {"origin": "https://example.org"}
    asking = origin | {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    closed, open_ = launch(), launch(cors_origins=("https://example.org",))
    for path in ("/predict", "/model"):
        assert "access-control-allow-origin" not in closed.client.options(path, headers=asking).headers
        allowed = open_.client.options(path, headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        other = open_.client.options(path, headers=asking | {"origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
    answered = open_.client.post("/predict?budget_ms=5000", content=PIXELS, headers=RAW | origin)
    assert answered.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-credentials" not in answered.headers
