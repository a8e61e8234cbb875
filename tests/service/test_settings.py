"""What an operator relies on: names, defaults, and a sentence for every mistake."""

import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.settings import Settings, SettingsError, embedded_artifact, load


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")


def test_names_and_defaults_are_frozen() -> None:
    chosen = Settings().model_dump()
    del chosen["profile_cache"], chosen["tensorrt_cache"]  # depend on the platform
    assert chosen == {
        "artifact": embedded_artifact(),
        "model_repository": None,
        "models": (),
        "max_models": 8,
        "load_timeout_s": 120.0,
        "host": "127.0.0.1",
        "port": 8000,
        "shares_port": False,
        "own_port": None,
        "grpc_port": 8001,
        "log_level": "info",
        "log_format": "text",
        "log_requests": 0.0,
        "traces_endpoint": "",
        "trace_share": 0.01,
        "max_traces_per_second": 10.0,
        "max_waiting_traces": 256,
        "traces_timeout_s": 5.0,
        "api_keys": (),
        "api_keys_file": None,
        "admin_keys": (),
        "admin_keys_file": None,
        "max_requests_per_second": 0.0,
        "request_burst": 20,
        "max_clients": 100_000,
        "forwarded_allow_ips": (),
        "cors_origins": (),
        "tls_certificate": None,
        "tls_key": None,
        "tls_key_password": None,
        "tls_client_ca": None,
        "max_connections": 2048,
        "max_connections_per_client": 0,
        "max_pipelined_requests": 8,
        "max_header_bytes": 32_768,
        "max_query_bytes": 2048,
        "header_timeout_s": 10.0,
        "keep_alive_s": 30.0,
        "send_timeout_s": 10.0,
        "default_budget_ms": 50.0,
        "min_budget_ms": 0.1,
        "max_budget_ms": 10_000.0,
        "policy": "anytime",
        "answer_worth": 4.0,
        "refine_below": 0.3,
        "hope": 0.4,
        "network_ms": 0.0,
        "overhead_reserve_ms": 0.4,
        "max_overhead_reserve_ms": 5.0,
        "write_reserve_ms": 0.1,
        "max_waiting": 512,
        "max_body_bytes": 16_777_216,
        "max_bodies_bytes": 268_435_456,
        "max_values": 262_144,
        "max_images_per_request": 32,
        "max_pixels": 25_000_000,
        "max_decoded_pixels": 9_000_000,
        "body_timeout_s": 10.0,
        "max_open_requests": 1024,
        "decode_threads": 2,
        "provider": "auto",
        "intra_op_threads": 1,
        "cuda_graphs": True,
        "cudnn_conv_algo_search": "heuristic",
        "use_tf32": False,
        "prefer_nhwc": False,
        "keep_warm_ms": None,
        "brief_run_ms": 3.0,
        "batch_sizes": None,
        "profile_seconds": 3.0,
        "profile_quantile": 0.8,
        "failed_runs_until_restart": 3,
        "run_timeout_s": 30.0,
        "drain_notice_s": 0.0,
        "drain_timeout_s": 5.0,
        "drain_linger_s": 1.0,
    }


def test_every_setting_says_what_it_does() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYTIME_PORT", "9001")
    monkeypatch.setenv("ANYTIME_BATCH_SIZES", "1,16")
    assert (load().port, load().batch_sizes) == (9001, (1, 16))
    assert load(["--port", "9002", "--batch-sizes", "1,3"]).port == 9002


@pytest.mark.parametrize("name", ["profile_cache", "tensorrt_cache"])
def test_an_empty_cache_folder_disables_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert getattr(load(), name) is not None
    monkeypatch.setenv(f"ANYTIME_{name.upper()}", "")
    assert getattr(load(), name) is None


@pytest.mark.parametrize("name", ["keep_warm_ms", "batch_sizes"])
def test_what_is_empty_is_left_to_the_provider(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ANYTIME_{name.upper()}", "")
    assert getattr(load(), name) is None


def test_an_unknown_variable_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYTIME_BUDGET_MS", "5")
    with pytest.raises(SettingsError, match="ANYTIME_BUDGET_MS: remove it or correct its name"):
        load()


def test_variables_that_kubernetes_sets_are_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYTIME_PORT", "tcp://10.0.0.7:8000")
    monkeypatch.setenv("ANYTIME_SERVICE_HOST", "10.0.0.7")
    monkeypatch.setenv("ANYTIME_PORT_8000_TCP", "tcp://10.0.0.7:8000")
    with pytest.raises(SettingsError, match="enableServiceLinks: false"):
        load()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "99999", "ANYTIME_PORT"),
        ("PROVIDER", "tpu", "ANYTIME_PROVIDER"),
        ("BATCH_SIZES", "2,4", "start at 1"),
        ("BATCH_SIZES", "1,4,2", "ascend"),
        ("BATCH_SIZES", ",", "start at 1"),
        ("DEFAULT_BUDGET_MS", "0.01", "min_budget_ms <= default_budget_ms"),
        ("WRITE_RESERVE_MS", "1", "write_reserve_ms <= overhead_reserve_ms"),
        ("OVERHEAD_RESERVE_MS", "6", "overhead_reserve_ms <= max_overhead_reserve_ms"),
        ("ANSWER_WORTH", "-1", "ANYTIME_ANSWER_WORTH"),
        ("REFINE_BELOW", "0", "ANYTIME_REFINE_BELOW"),
        ("POLICY", "clairvoyant", "ANYTIME_POLICY"),
        ("MAX_PIXELS", "0", "ANYTIME_MAX_PIXELS"),
        ("API_KEYS", "", "ANYTIME_API_KEYS.*is empty"),
        ("ADMIN_KEYS", "sha256:12", "ANYTIME_ADMIN_KEYS.*hash-key makes both"),
        ("FORWARDED_ALLOW_IPS", "proxy.example", "ANYTIME_FORWARDED_ALLOW_IPS"),
        ("CORS_ORIGINS", "https://example.org/", "ANYTIME_CORS_ORIGINS.*without a path"),
        ("LOG_FORMAT", "xml", "ANYTIME_LOG_FORMAT"),
        ("LOG_REQUESTS", "1.5", "ANYTIME_LOG_REQUESTS"),
        ("TRACES_ENDPOINT", "collector.example:4317", "ANYTIME_TRACES_ENDPOINT.*http://127.0.0.1:4317"),
        ("TRACES_ENDPOINT", "http://user:word@127.0.0.1:4317", "ANYTIME_TRACES_ENDPOINT"),
        ("TLS_CERTIFICATE", "server.pem", "tls_certificate and tls_key go together"),
        ("TLS_CLIENT_CA", "ca.pem", "tls_client_ca need tls_certificate"),
    ],
)
def test_a_refused_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(f"ANYTIME_{name}", value)
    with pytest.raises(SettingsError, match=says):
        load()


@pytest.mark.parametrize(
    "environ",
    [
        {"API_KEYS": "a-key-by-mistake"},
        {"ADMIN_KEYS": "sha256:a-key-by-mistake"},
        {"TLS_KEY_PASSWORD": "a-key-by-mistake"},
        {"API_KEYS": "sha256:" + "ab" * 32, "WRITE_RESERVE_MS": "1"},
    ],
)
def test_a_refusal_repeats_no_secret(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(f"ANYTIME_{name}", value)
    with pytest.raises(SettingsError) as refused:
        load()
    whole = "".join(traceback.format_exception(refused.value))
    assert "by-mistake" not in whole
    assert "abab" not in whole


def test_settings_show_no_secret() -> None:
    chosen = Settings(
        api_keys=("sha256:" + "ab" * 32,),
        admin_keys=("sha256:" + "ab" * 32,),
        tls_certificate=Path("a.pem"),
        tls_key=Path("b.pem"),
        tls_key_password=SecretStr("abab"),
    )
    assert "abab" not in repr(chosen)
    assert "abab" not in str(chosen)


def test_the_embedded_artifact_lies_beside_the_package() -> None:
    assert embedded_artifact() == Path(__file__).resolve().parents[2] / "model" / "pretrained"
