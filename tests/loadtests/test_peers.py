"""Other servers: each is asked in its own form, its answers are read, and those that are here are right."""

import base64
import json
import os
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loadtests.offline import Offline
from loadtests.peers import contest, launch
from loadtests.peers.adaptors import FOLDER, PEERS, Peer
from loadtests.peers.column import Column
from loadtests.peers.contest import N_CHECKED, peer_contestant
from loadtests.peers.tune import COLUMN, candidates, chosen_knobs
from tests.service import toy_artifact

SIDE = toy_artifact.HEIGHT
ADDRESS = urllib.parse.urlsplit("http://127.0.0.1:8765")
PIXELS = bytes(range(192))
every_peer = pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
with_environment = pytest.mark.parametrize(
    "peer", [peer for peer in PEERS.values() if peer.has_environment], ids=lambda peer: peer.name
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose calibration changes what is answered."""
    folder = toy_artifact.write(tmp_path_factory.mktemp("artifact") / "toy")
    manifest = json.loads((folder / "manifest.json").read_text())
    for rule in manifest["combinations"]:
        rule |= {"temperature": 4.0, "bias": [0.0, 2.0, 0.0, 0.0, -1.0]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module", name="images_NHWC")
def random_images() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (N_CHECKED, SIDE, SIDE, 3), np.uint8)


def asked(peer: Peer, budget_s: float = 0.005) -> tuple[str, dict[str, str], bytes]:
    """Request line, headers and all that follows, for one image."""
    body = peer.body(PIXELS)
    head, _, between = peer.head(ADDRESS, budget_s, peer.content_type, len(body)).partition(b"\r\n\r\n")
    line, *lines = head.decode("ascii").split("\r\n")
    return line, dict(each.lower().split(": ", 1) for each in lines), between + body


@every_peer
def test_a_request_is_whole(peer: Peer) -> None:
    line, headers, content = asked(peer)
    assert line.startswith("POST /")
    assert line.endswith(" HTTP/1.1")
    assert int(headers["content-length"]) == len(content)
    assert headers["host"] == "127.0.0.1:8765"
    assert headers["content-type"] == peer.content_type


@pytest.mark.parametrize("name", ["fastapi", "litserve", "ray", "mosec"])
def test_raw_pixels_go_as_they_are_where_that_is_understood(name: str) -> None:
    assert asked(PEERS[name])[2] == PIXELS
    assert PEERS[name].index(b'{\n "index": 7,\n "confidence": 0.5\n}') == 7


def test_bentoml_gets_a_list_of_base64_and_gives_a_list() -> None:
    (image,) = json.loads(asked(PEERS["bentoml"])[2])["images"]
    assert base64.b64decode(image) == PIXELS
    assert PEERS["bentoml"].index(b"[4]") == 4


def test_mlserver_gets_a_tensor_of_base64_and_gives_one_of_classes() -> None:
    (tensor,) = json.loads(asked(PEERS["mlserver"])[2])["inputs"]
    assert base64.b64decode(tensor["data"][0]) == PIXELS
    assert (tensor["shape"], tensor["parameters"]) == ([1, 1], {"content_type": "base64"})
    answer = {"outputs": [{"name": "index", "shape": [1, 1], "datatype": "INT64", "data": [3]}]}
    assert PEERS["mlserver"].index(json.dumps(answer).encode()) == 3


def test_triton_gets_a_binary_tensor_and_the_budget_as_its_timeout() -> None:
    _, headers, content = asked(PEERS["triton"], budget_s=0.0021)
    n_description = int(headers["inference-header-content-length"])
    assert content[n_description:] == PIXELS
    description = json.loads(content[:n_description])
    (tensor,) = description["inputs"]
    assert tensor["shape"] == [1, 8, 8, 3]
    assert tensor["parameters"] == {"binary_data_size": len(PIXELS)}
    assert description["parameters"] == {"timeout": 2100}
    assert PEERS["triton"].index(b'{"outputs":[{"name":"index"}]}' + (9).to_bytes(8, "little")) == 9


@every_peer
def test_its_folder_says_how_it_was_tuned_and_its_settings_are_told(peer: Peer) -> None:
    assert (peer.folder / "README.md").read_text().startswith(f"# {peer.title}")
    told = (peer.folder / "app.py").read_text().split('"""')[1]
    for knob in peer.knobs:
        assert knob in told
    for knob, values in peer.tried.items():
        assert peer.knobs[knob] in values or knob == COLUMN


@with_environment
def test_its_pins_are_exact(peer: Peer) -> None:
    pins = [line for line in (peer.folder / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert all("==" in pin for pin in pins)
    assert {"numpy", "onnxruntime", peer.distribution} <= {pin.partition("==")[0] for pin in pins}
    assert launch.version_of(peer) in "\n".join(pins)


def test_every_folder_is_a_peer() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/app.py")} == set(PEERS)


@with_environment
def test_an_environment_counts_while_the_pins_are_those_it_was_made_with(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = (peer.folder / "requirements.txt").read_text()
    monkeypatch.chdir(tmp_path)
    assert not launch.is_made(peer)
    made = launch.ENVIRONMENTS / peer.name / "made"
    made.parent.mkdir(parents=True)
    made.write_text(pins)
    assert launch.is_made(peer)
    made.write_text(pins + "more==1\n")
    assert not launch.is_made(peer)


@pytest.mark.parametrize("column", toy_artifact.COLUMNS)
def test_a_column_answers_as_the_artifact_does(
    artifact: Path, images_NHWC: NDArray[np.uint8], column: str
) -> None:
    served = Column(str(artifact), column)
    expected = Offline(artifact, images_NHWC)
    together = served.classify(images_NHWC.tobytes())
    alone = served.classify(images_NHWC[5].tobytes())
    assert [answer["index"] for answer in together] == expected.predictions([column]).tolist()
    assert [answer["index"] for answer in alone] == [together[5]["index"]]
    assert alone[0]["confidence"] == pytest.approx(together[5]["confidence"])
    confidences = [answer["confidence"] for answer in together]
    assert confidences == pytest.approx(expected.probabilities([column]).max(axis=1), abs=1e-5)


def test_what_is_no_whole_image_is_refused(artifact: Path) -> None:
    with pytest.raises(ValueError, match="reshape"):
        Column(str(artifact), "1").classify(PIXELS[1:])


@pytest.mark.timeout(170)  # Ray takes its time to start and to stop
@pytest.mark.parametrize(
    "peer",
    [pytest.param(peer, marks=[pytest.mark.slow] if peer.has_environment else []) for peer in PEERS.values()],
    ids=list(PEERS),
)
def test_a_peer_answers_as_the_artifact_does_and_leaves_nothing_running(
    peer: Peer, artifact: Path, images_NHWC: NDArray[np.uint8], tmp_path: Path
) -> None:
    if not launch.is_made(peer):
        pytest.skip(f"there is no .venvs/{peer.name}: python -m loadtests.compare makes it")
    pixels = [image.tobytes() for image in images_NHWC]
    knobs = {name: value for name, value in peer.knobs.items() if "TIMEOUT" not in name}
    with peer_contestant(peer, artifact, "2", pixels, tmp_path / "log", knobs, peer.title) as contestant:
        assert contestant.check(Offline(artifact, images_NHWC)) > 0
        with pytest.raises(ValueError, match="the artifact"):  # column 1 says otherwise of some
            contestant.check(Offline(_columns_swapped(artifact, tmp_path / "swapped"), images_NHWC))
    assert contestant.server.pids() == []


def _columns_swapped(artifact: Path, folder: Path) -> Path:
    """The artifact with column 1 for column 2."""
    folder.mkdir()
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["rungs"][1]["file"] = manifest["rungs"][0]["file"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    first = manifest["rungs"][0]["file"]
    (folder / first).write_bytes((artifact / first).read_bytes())
    return folder


@pytest.mark.skipif(not hasattr(os, "SCHED_FIFO"), reason="this system has no such class")
@pytest.mark.parametrize("is_allowed", [True, False])
def test_the_generator_is_ahead_of_servers_only_while_it_sends(
    is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = [os.sched_getscheduler(0)]

    def choose(_: int, chosen: int, __: os.sched_param) -> None:
        if not is_allowed and chosen == os.SCHED_FIFO | os.SCHED_RESET_ON_FORK:
            raise PermissionError
        classes.append(chosen)

    monkeypatch.setattr(os, "sched_setscheduler", choose)
    with contest._ahead_of_servers():
        inside = classes[-1]
    assert inside == (os.SCHED_FIFO | os.SCHED_RESET_ON_FORK if is_allowed else classes[0])
    assert classes[-1] == classes[0]


def test_tuning_changes_one_knob_at_a_time() -> None:
    setting = {"A": "1", "B": "2"}
    assert candidates(setting, "B", ["2", "3"]) == {"2": {"A": "1", "B": "2"}, "3": {"A": "1", "B": "3"}}
    assert setting == {"A": "1", "B": "2"}


@every_peer
def test_a_peer_has_a_setting_for_each_of_its_knobs(peer: Peer) -> None:
    assert set(chosen_knobs(peer)) == {COLUMN, *peer.knobs}
