"""The server as a Ray Serve application: `serve deploy deploy/ray/cpu.yaml`, or `gpu.yaml`.

Each replica is the whole of `service`, with models and a queue of its own; Ray starts replicas, carries
requests to them and counts them. Settings come from the environment that Ray was started in. Must not know
how a request is answered, nor how budgets get here, which is `budgets`' business.
"""

import os

from ray import serve
from starlette.types import ASGIApp

from deploy.ray import budgets
from service import repository, settings
from service.api import Service


@serve.deployment
@serve.ingress()
class Anytime:
    """One replica.

    Raises:
        RuntimeError: Ray was not told to count budgets from the arrival at its proxy.
        SettingsError, ArtifactError: nothing can be served like that.
    """

    async def __init__(self) -> None:  # type: ignore[misc] # Ray awaits it
        budgets.check_called(os.environ)
        chosen = settings.load()
        self._repository = await repository.prepare(chosen)
        self._service = Service(chosen, self._repository)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What answers; Ray opens its models before the first request and drains them after the last."""
        return self._service

    async def check_health(self) -> None:
        """Have Ray replace this replica when it takes no requests.

        Raises:
            RuntimeError: it does not.
        """
        if not self._repository.is_ready:
            raise RuntimeError("This replica takes no requests.")


application = Anytime.bind()  # type: ignore[attr-defined] # Ray has made a deployment of it
