"""The command that asks a server, against a real one: what is printed, where, and the exit status."""

import http.server
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.__main__ import main
from service.access import new_key
from tests.service import toy_artifact
from tests.service.conftest import Launcher, Running, profile_of

PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
AMPLE = ("--budget-ms", "5000")
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "toy.png"
    Image.fromarray(PIXELS).save(path)
    return str(path)


def ask(server: Running, *arguments: str) -> int:
    return main(["predict", *arguments, "--url", str(server.client.base_url)])


def test_each_picture_is_one_readable_line(server: Running, picture: str, capsys: Printed) -> None:
    assert ask(server, picture, picture, *AMPLE) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    first, second = printed.splitlines()
    for line in (first, second):
        assert line.startswith(f"{picture}: ")
        assert any(f" {label} " in line for label in toy_artifact.LABELS)
        assert ", column 3, stopped by deepest, " in line
        assert line.endswith(" ms, in time")


def test_as_json_a_line_is_the_answer_and_its_file(server: Running, picture: str, capsys: Printed) -> None:
    assert ask(server, picture, *AMPLE, "--json", "--top-k", "2", "--min-confidence", "0") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == picture
    assert (answer["columns_run"], answer["stopped_by"], answer["budget_ms"]) == (["1"], "confidence", 5000)
    assert len(answer["top"]) == 2


def test_a_stream_is_a_line_for_each_rung_and_one_for_its_end(
    server: Running, picture: str, capsys: Printed
) -> None:
    assert ask(server, picture, *AMPLE, "--stream") == 0
    *rungs, done = capsys.readouterr().out.splitlines()
    assert [f"column {column}, " in line for column, line in zip("123", rungs, strict=True)] == [True] * 3
    assert "done: 1+2+3, stopped by deepest" in done
    assert ask(server, picture, *AMPLE, "--stream", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["event"] for record in records] == ["prediction"] * 3 + ["done"]
    assert {record["file"] for record in records} == {picture}


def test_a_dash_reads_standard_input(
    server: Running, picture: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(picture).read_bytes())))
    assert ask(server, "-", *AMPLE) == 0
    assert capsys.readouterr().out.startswith("-: ")


def test_a_file_without_an_answer_holds_up_no_other(
    server: Running, picture: str, tmp_path: Path, capsys: Printed
) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("hello")
    missing = str(tmp_path / "missing.png")
    assert ask(server, str(text), missing, picture, *AMPLE) == 1
    printed, said = capsys.readouterr()
    assert len(printed.splitlines()) == 1
    refused, unread = said.splitlines()
    assert refused.startswith(f"{text}: The content is no PNG, JPEG or WebP")
    assert refused.endswith("(status 415)")
    assert unread == f"{missing}: cannot be read (No such file or directory)."


def test_a_refusal_repeats_the_servers_sentence(launch: Launcher, picture: str, capsys: Printed) -> None:
    assert ask(launch(profile=profile_of(1.0)), picture, "--budget-ms", "300") == 1
    printed, said = capsys.readouterr()
    assert printed == ""
    assert "grant at least 100" in said


def test_without_a_server_it_says_so_once(picture: str, capsys: Printed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert main(["predict", picture, picture, "--url", f"http://127.0.0.1:{port}"]) == 3
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith(f"predict: No server can be reached at http://127.0.0.1:{port}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://example.org", "http://x:port", ""])
def test_an_address_that_is_none_is_wrong_usage(picture: str, url: str, capsys: Printed) -> None:
    assert main(["predict", picture, "--url", url]) == 2
    assert "try http://127.0.0.1:8000" in capsys.readouterr().err


@pytest.mark.parametrize("budget_ms", ["0", "-1", "nan", "inf", "soon"])
def test_a_budget_that_is_none_is_wrong_usage(picture: str, budget_ms: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["predict", picture, f"--budget-ms={budget_ms}"])
    assert stopped.value.code == 2
    assert "milliseconds above 0" in capsys.readouterr().err


class _Stranger(http.server.BaseHTTPRequestHandler):
    """Some other web server: it answers, but not what was asked; and notes the key that it was shown."""

    status = 200
    body = b"<html>hello</html>"
    shown: str | None

    def do_POST(self) -> None:
        type(self).shown = self.headers["authorization"]
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def stranger() -> Iterator[tuple[str, type[_Stranger]]]:
    handler = type("Stranger", (_Stranger,), {})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"<html>hello</html>", "no prediction"),
        (200, b'{"label": "cat"}', "no prediction"),
        (200, b'{"stopped_by": "deepest"}', "no prediction"),
        (200, b"", "broke off"),
        (404, b"<html>nothing</html>", "status 404 without an explanation"),
        (502, b"[]", "status 502 without an explanation"),
    ],
)
def test_what_is_no_answer_is_called_so(
    stranger: tuple[str, type[_Stranger]], picture: str, capsys: Printed, status: int, body: bytes, says: str
) -> None:
    url, handler = stranger
    handler.status, handler.body = status, body
    assert main(["predict", picture, "--url", url]) == 1
    printed, said = capsys.readouterr()
    assert printed == ""
    assert says in said


def test_a_stream_without_its_end_counts_as_no_answer(
    stranger: tuple[str, type[_Stranger]], server: Running, picture: str, capsys: Printed
) -> None:
    content = Path(picture).read_bytes()
    asked, headers = "/predict?budget_ms=5000&stream=ndjson", {"content-type": "image/png"}
    whole = server.client.post(asked, content=content, headers=headers)
    url, handler = stranger
    handler.body = whole.content.splitlines(keepends=True)[0]
    assert main(["predict", picture, "--url", url, "--stream"]) == 1
    assert "broke off" in capsys.readouterr().err


def test_the_key_is_shown_to_the_server_and_to_nobody_else(
    stranger: tuple[str, type[_Stranger]],
    picture: str,
    tmp_path: Path,
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, handler = stranger
    key, _ = new_key()
    file = tmp_path / "key"
    file.write_text(key + "\n")
    main(["predict", picture, "--url", url])
    assert not handler.shown
    main(["predict", picture, "--url", url, "--api-key-file", str(file)])
    assert handler.shown == f"Bearer {key}"
    monkeypatch.setenv("PREDICT_API_KEY", key[::-1])
    main(["predict", picture, "--url", url])
    assert handler.shown == f"Bearer {key[::-1]}"
    file.write_text(key + "\n" + key)
    assert main(["predict", picture, "--url", url, "--api-key-file", str(file)]) == 2
    file.write_text("")
    assert main(["predict", picture, "--url", url, "--api-key-file", str(file)]) == 2
    assert main(["predict", picture, "--url", url, "--api-key-file", str(tmp_path / "none")]) == 2
    printed, said = capsys.readouterr()
    assert key not in printed + said
