"""A stand-in for the dashboard of a Ray cluster, for what a real one cannot be made to do at will."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aiohttp import web
from s3 import free_port

JOB = {"submission_id": "job", "entrypoint": "python", "error_type": None}


class Dashboard:
    """One job, whose output and state the test sets.

    Attributes:
        status: of the job.
        text: that it has written.
        quiet: its output does not come to an end, nor does anything come, on connections made while this is true.
        kind: SUBMISSION or DRIVER.
        message: that Ray has for its state.
        exit_code: of its command; None: Ray has not seen it end.
        failing: status of every answer about the job instead of 200.
        hidden: status of every answer with its output instead of 200.
        sockets: whether what is on the way lets WebSockets through.
        token: that it asks for; empty for none.
        stops: times that it was told to stop the job.
    """

    def __init__(self) -> None:
        self.status, self.text, self.kind = "RUNNING", "", "SUBMISSION"
        self.message = "Job is currently running."
        self.exit_code: int | None = None
        self.quiet, self.failing, self.hidden = False, 0, 0
        self.sockets = True
        self.token, self.stops = "", 0
        self._end = asyncio.Event()
        self.url = f"http://127.0.0.1:{free_port()}"

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2", "ray_commit": "", "session_name": ""})

    async def job(self, request: web.Request) -> web.Response:
        if self.failing:
            return web.Response(status=self.failing, text="the agent is gone")
        state = {"type": self.kind, "status": self.status, "message": self.message, "driver_exit_code": self.exit_code}
        return web.json_response(JOB | state)

    async def listing(self, request: web.Request) -> web.Response:
        if self.token not in request.headers.get("Authorization", ""):
            return web.Response(status=401)
        return web.json_response([])

    async def stop(self, request: web.Request) -> web.Response:
        self.stops += 1
        return web.json_response({"stopped": True})

    async def logs(self, request: web.Request) -> web.Response:
        if self.hidden:
            return web.Response(status=self.hidden, text="the log is gone")
        return web.json_response({"logs": self.text})

    async def tail(self, request: web.Request) -> web.StreamResponse:
        if self.hidden or not self.sockets:
            return web.Response(status=self.hidden or 400, text="no WebSocket")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(self.text)
        self._end = asyncio.Event()
        while self.quiet or self.status == "RUNNING":
            with suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), 0.05)
                break
        return socket

    def cut(self) -> None:
        """End the connection that brings the output."""
        self._end.set()


@contextmanager
def running() -> Iterator[Dashboard]:
    """A dashboard that answers."""
    found, loop = Dashboard(), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/api/version", found.version)
    app.router.add_get("/api/jobs/", found.listing)
    app.router.add_get("/api/jobs/{id}", found.job)
    app.router.add_post("/api/jobs/{id}/stop", found.stop)
    app.router.add_get("/api/jobs/{id}/logs", found.logs)
    app.router.add_get("/api/jobs/{id}/logs/tail", found.tail)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", int(found.url.rpartition(":")[2])).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield found
    finally:
        found.quiet, found.status = False, "STOPPED"
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
