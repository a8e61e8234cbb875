"""One column behind plain FastAPI: what an engineer writes in an hour, with the options that matter.

Settings are environment variables: ARTIFACT, COLUMN, PORT, RUN (where a column runs: `loop`, `thread` for one
thread of its own, `pool` for Starlette's thread pool), WORKERS (processes), MAX_WAITING (requests in a
process beyond which 503 is answered at once; 0 for no bound).
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from loadtests.peers.column import Column

RUN = os.environ.get("RUN", "thread")
MAX_WAITING = int(os.environ.get("MAX_WAITING", "0"))

app = FastAPI()
column = Column(os.environ["ARTIFACT"], os.environ["COLUMN"])
thread = ThreadPoolExecutor(1)
n_waiting = 0


@app.get("/ready")
async def ready() -> dict[str, bool]:
    """Say that the model is loaded."""
    return {"ready": True}


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Classify one image: raw pixels."""
    global n_waiting  # noqa: PLW0603 - one event loop, one counter
    pixels = await request.body()
    if MAX_WAITING and n_waiting >= MAX_WAITING:
        return JSONResponse({"detail": "busy"}, 503)
    n_waiting += 1
    try:
        if RUN == "loop":
            answers = column.classify(pixels)
        elif RUN == "pool":
            answers = await run_in_threadpool(column.classify, pixels)
        else:
            answers = await asyncio.get_running_loop().run_in_executor(thread, column.classify, pixels)
    finally:
        n_waiting -= 1
    return JSONResponse(answers[0])


if __name__ == "__main__":
    uvicorn.run(
        "app:app",
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        workers=int(os.environ.get("WORKERS", "1")),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
