"""Running a server: uvicorn, logs as JSON lines, and an end that lets answers finish."""

from __future__ import annotations

import logging
import sys
from typing import Any

import uvicorn

from anabranch.serve.app import create_app
from anabranch.serve.settings import Settings


class Running(uvicorn.Server):
    """Lets open pages go before it waits for answers to finish: their feeds never end by themselves. A second Ctrl-C
    cuts answers off; the engine is closed all the same."""

    async def shutdown(self, sockets: Any = None) -> None:
        app: Any = self.config.app
        app.state.live.close()
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


def run(engine: Any, settings: Settings, host: str, port: int, grace: int = 30) -> None:
    """Serve until Ctrl-C or SIGTERM; answers under way then have `grace` seconds to finish."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "level": "%(levelname)s", "event": %(message)s}'))
    logger = logging.getLogger("anabranch.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    config = uvicorn.Config(
        create_app(engine, settings), host=host, port=port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=grace, server_header=False,
    )  # fmt: skip
    Running(config).run()
