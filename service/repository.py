"""Which models are served: loads, swaps and unloads versions while requests go on.

Must not know of HTTP or gRPC. A swap is one assignment: a request sees the old version or the new one, whole.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import re
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service import models
from service.errors import NotFound, NotLoadable, Stopped
from service.gpu import Gpus
from service.inference import ArtifactError
from service.metrics import Metrics
from service.models import Model
from service.providers import DeviceLost
from service.settings import Settings

logger = logging.getLogger(__name__)

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of a model and of a version in the repository: no path leads out of it."""

GIVE_BACK_S = 1.0
"""After a change of the models until what they leave is given back: their threads have ended by then."""

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc has it; musl, for one, does not."""

REST = 4.0
"""Pauses while a new version is measured beside those that serve: it takes a fifth of one core."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One version that is loaded or could be, and if it is not, why."""

    name: str
    version: str
    state: State
    reason: str = ""


class Repository:
    """The loaded models, and the folder `<repository>/<name>/<version>/` that more can be loaded from.

    Args:
        settings: Where the folder is, and the bounds of each model.
        default: Loaded; its name is the one that answers where none is named.
    """

    def __init__(self, settings: Settings, default: Model) -> None:
        self._settings = settings
        self._default_name = default.name
        self._versions: dict[tuple[str, str], Model] = {}
        self._current: dict[str, Model] = {}
        """By name: the version that answers where none is named."""
        self._marks: dict[tuple[str, str], State] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._is_leaving = False
        self.is_stopping = False
        """No requests are taken any more."""
        self.broken = ""
        """Why this process cannot go on; empty as long as it can."""
        self._decode_threads = ThreadPoolExecutor(settings.decode_threads, "decode")
        self.metrics = Metrics(
            n_waiting=lambda: sum(model.n_waiting for model in self._versions.values()),
            slowdown=lambda: max((model.slowdown for model in self._versions.values()), default=1.0),
            reserve_s=lambda: max((model.reserve_s for model in self._versions.values()), default=0.0),
            run_times=lambda: (one for model in self._versions.values() for one in model.run_times()),
            gpus=Gpus() if settings.provider != "cpu" else None,
        )
        self.add(default)

    def add(self, model: Model) -> None:
        """Have one more model from the start."""
        self._versions[model.name, model.version] = self._current[model.name] = model

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Within it the models take requests; at its end they are drained and closed."""
        for key in self._versions:  # a variable for the model would keep it here after it is replaced
            self._open(self._versions[key])
        # What lives now lives for good: a full collection that looks at it again stalls requests for 100 ms
        # and more.
        gc.collect()
        gc.freeze()
        try:
            with self.metrics.watching():
                yield
        finally:
            await self.drain()
            gc.unfreeze()
            for model in self._versions.values():
                # The process ends and takes its sessions along: of a GPU that is lost they cannot be closed.
                model.close(keeps_inference=True)
            self._decode_threads.shutdown(wait=False, cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        """Whether requests that name no model are taken."""
        current = self._current.get(self._default_name)
        return current is not None and self.takes_for(current) and not self.is_stopping

    def takes_for(self, model: Model) -> bool:
        """Whether requests for this model should be sent here."""
        return model.is_ready and not self._is_leaving

    @property
    def is_running(self) -> bool:
        """Whether a column of any model is being run."""
        return any(model.is_running for model in self._versions.values())

    def model(self, name: str = "", version: str = "") -> Model:
        """The model that answers.

        Args:
            name: Empty: the default one.
            version: Empty: the one that was loaded last.

        Raises:
            NotFound: no such model is loaded.
            Stopped: none is named and the default one is not loaded.
        """
        found = self._versions.get((name, version)) if version else self._current.get(name)
        if found:
            return found
        if not name:
            if default := self._current.get(self._default_name):
                return default
            raise Stopped("No model is loaded: load one, or send the request to another server.")
        called = f"Model {name!r}" + (f" version {version!r}" if version else "")
        raise NotFound(f"{called} is not loaded: POST /v2/repository/index lists what there is.")

    def versions(self, name: str) -> list[str]:
        """The loaded versions of a model."""
        return [model.version for model in self._versions.values() if model.name == name]

    async def index(self, *, is_ready_only: bool = False) -> list[Listed]:
        """Everything that is loaded or lies in the repository."""
        root = self._settings.model_repository
        found = await asyncio.to_thread(_artifacts, root) if root else []
        on_disk = [(path.parent.name, path.name) for path in sorted(found)]
        known = dict.fromkeys([*self._versions, *self._marks, *on_disk])
        listed = [Listed(*key, self._state(key), self._reasons.get(key, "")) for key in known]
        return [one for one in listed if one.state == "READY" or not is_ready_only]

    def folder(self, name: str, version: str = "") -> Path:
        """Where a version lies in the repository. Reads the folder: not for the event loop.

        Raises:
            NotFound: it is not there.
        """
        root = self._settings.model_repository
        if root is None:
            raise NotFound("This server has no model repository: start it with the setting model_repository.")
        found = [path for path in _artifacts(root) if path.parent.name == name]
        if version:
            found = [path for path in found if path.name == version]
        if not found:
            called = f"{name}/{version}" if version else name
            raise NotFound(f"The repository has no {called}: POST /v2/repository/index lists what there is.")
        return max(found, key=_newness)

    async def load(self, name: str, version: str = "", *, keep_others: bool = False) -> None:
        """Load a version from the repository; it answers from then on where no version is named.

        Goes on in the background if the caller is cancelled. A failure changes nothing in what is served,
        unless the GPU is lost by it: then nothing is served any more.

        Args:
            name: Of the model's folder.
            version: Of the folder in it. Empty: the newest, by number.
            keep_others: Whether other versions of this name stay, to be asked for by version. Otherwise they
                are drained and unloaded.

        Raises:
            NotFound: there is no such folder.
            NotLoadable: what is in it cannot be served, or too much is loaded already.
            Stopped: the server is stopping.
        """
        await self._in_background(self._load(name, version, keep_others=keep_others))

    async def unload(self, name: str, version: str = "") -> None:
        """Take a model out of service, all of its versions or one, and drain it.

        Raises:
            NotFound: it is not loaded.
            Stopped: the server is stopping.
        """
        await self._in_background(self._unload(name, version))

    def announce_stop(self) -> None:
        """Be ready for nobody, but go on answering."""
        self._is_leaving = True

    def _break(self, why: str) -> None:
        """Be ready for nobody, and take nobody in: what runs one model runs all of them."""
        if self.broken:
            return
        self.broken = why
        self.announce_stop()
        logger.critical("This process cannot go on: %s", why)
        for model in self._versions.values():
            model.give_up(why)

    async def drain(self) -> None:
        """Take no more requests and settle those that are here, bounded by the setting `drain_timeout_s`."""
        self.is_stopping = True
        for change in tuple(self._changes):
            change.cancel()
        await asyncio.gather(*(model.stop() for model in self._versions.values()))

    async def _in_background(self, change: Coroutine[None, None, None]) -> None:
        if self.is_stopping:
            change.close()
            raise Stopped("This server is stopping: its models stay as they are.")
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if self.is_stopping:
                raise Stopped("This server is stopping: its models stay as they are.") from None
            raise
        finally:
            del task  # its error has come through this frame, and through some that hold what was loaded

    def _ended(self, change: asyncio.Task[None]) -> None:
        self._changes.discard(change)
        if not change.cancelled() and (error := change.exception()):
            logger.warning("The models stay as they are: %s", error)
        if not self._changes:
            asyncio.get_running_loop().call_later(GIVE_BACK_S, self._give_back)

    def _give_back(self) -> None:
        """Let the system have the memory of models that have gone, some 50 MB each.

        Circles of objects may still hold them (gRPC leaves one of each call), and with what is frozen out of
        its sight the collector seldom comes by itself; for the same reason it is done in 1 to 3 ms. What is
        free then, glibc keeps: each thread of a load had a heap of its own, with holes. To give it back takes
        15 to 70 ms of a thread, in which an allocation may wait for 5 ms.
        """
        if self._changes:  # the end of that will bring us here again
            return
        gc.collect()
        if TRIM:
            asyncio.get_running_loop().run_in_executor(None, TRIM, 0)

    async def _load(self, name: str, version: str, *, keep_others: bool) -> None:
        async with self._changing:
            folder = await asyncio.to_thread(self.folder, name, version)
            key = name, folder.name
            with self._marked(key, "LOADING"):
                try:
                    model = await self._loaded(key, folder)
                except NotLoadable as error:
                    self._reasons[key] = error.detail
                    raise
            self._reasons.pop(key, None)
            retired = [self._versions[key]] if key in self._versions else []
            self._open(model)
            self._versions[key] = self._current[name] = model
            logger.info("%s version %s answers now.", *key)
            if not keep_others:
                retired += [
                    other for other in self._versions.values() if other.name == name and other is not model
                ]
            await self._retire(retired)

    async def _loaded(self, key: tuple[str, str], folder: Path) -> Model:
        limit, timeout_s = self._settings.max_models, self._settings.load_timeout_s
        if key not in self._versions and len(self._versions) >= limit:
            raise NotLoadable(f"{limit} models are loaded, the most allowed: unload one, or set max_models.")
        try:
            async with asyncio.timeout(timeout_s):
                model = await models.load(self._settings, folder, rest=REST)
        except ArtifactError as error:
            raise NotLoadable(str(error)) from error
        except DeviceLost as error:  # by those who serve as well
            self._break(f"the GPU is lost: {error}")
            raise NotLoadable(f"The GPU is lost, and this server ends: {error}") from error
        except TimeoutError as error:
            raise NotLoadable(f"Loading took more than {timeout_s:g} s: set load_timeout_s.") from error
        if (model.name, model.version) != key:
            model.close()
            raise NotLoadable(
                f"The manifest says {model.name!r} version {model.version!r}: name the folders like that."
            )
        return model

    async def _unload(self, name: str, version: str) -> None:
        async with self._changing:
            retired = [self.model(name, version)] if version else []
            if not version:
                retired = [model for model in self._versions.values() if model.name == name]
            if not retired:
                self.model(name)  # says that there is none
            await self._retire(retired)

    async def _retire(self, retired: Sequence[Model]) -> None:
        """Forget these models at once; then let those who are still inside have their answers."""
        with contextlib.ExitStack() as stack:
            for model in retired:
                key = model.name, model.version
                if self._versions.get(key) is model:
                    del self._versions[key]
                    stack.enter_context(self._marked(key, "UNLOADING"))
                if self._current.get(model.name) is model:
                    del self._current[model.name]
                    left = [other for other in self._versions.values() if other.name == model.name]
                    if left:
                        self._current[model.name] = left[-1]
            await asyncio.gather(*(model.drain() for model in retired))
            for model in retired:
                if (model.name, model.version) not in self._versions:
                    self.metrics.remove_model(model.name, model.version)

    def _open(self, model: Model) -> None:
        model.open(self.metrics, self._decode_threads, self._break)
        self.metrics.add_model(
            model.name,
            model.version,
            sha256=model.sha256,
            provider=model.provider,
            columns=[rung.column for rung in model.manifest.rungs],
            batch_sizes=model.profile.batch_sizes,
            accuracy={one.columns: one.accuracy for one in model.manifest.combinations},
        )

    @contextlib.contextmanager
    def _marked(self, key: tuple[str, str], state: State) -> Iterator[None]:
        self._marks[key] = state
        try:
            yield
        finally:
            del self._marks[key]

    def _state(self, key: tuple[str, str]) -> State:
        if key in self._versions and self._versions[key].is_ready:
            return "READY"
        return self._marks.get(key, "UNAVAILABLE")


def _artifacts(root: Path) -> list[Path]:
    """Every folder of the repository that has a manifest where one belongs."""
    found = (path.parent for path in root.glob("*/*/manifest.json"))
    return [
        path for path in found if FOLDER_NAME.fullmatch(path.name) and FOLDER_NAME.fullmatch(path.parent.name)
    ]


def _newness(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


async def prepare(settings: Settings) -> Repository:
    """Load what is served from the start: the setting `artifact`, and `models` from the repository.

    Raises:
        ArtifactError: one of them cannot be used.
    """
    repository = Repository(settings, await models.load(settings, settings.artifact))
    for named in settings.models:
        name, _, version = named.partition("/")
        try:
            folder = repository.folder(name, version)
        except NotFound as error:
            raise ArtifactError(f"ANYTIME_MODELS names {named}, but: {error.detail}") from error
        repository.add(await models.load(settings, folder))
    return repository
